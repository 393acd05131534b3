"""The older CPU guide's own commands, word for word, in the order in which its reader types them:
first on an empty folder without a network, then on a text of one's own. And docs/CPU_GUIDE.md,
whose table of troubles quotes messages that are in the code.

    python -m pytest tests/test_cpu_guide.py

What is added to a command is a small shape and few steps; step 5000 is step 11 here.
"""
import ast
import contextlib
import importlib
import io
import re
import shlex
import socket
from pathlib import Path
from typing import NamedTuple

import pytest

import cli
import config
import train
from common.console import UserError
from conftest import ROOT, call, log, tree
from text import starter

GUIDE = ROOT / "docs/CPU_GUIDE.md"
SEED = next(iter((ROOT.parent / "shared/seeds").glob("004*.txt")), None)
NOT_OURS = ("source ", "wandb login", "tensorboard ")

SMALL = (
    "--d_model 16 --n_layers 1 --n_heads 2 --d_ff 32 --memory_slots 2 --dropout 0 --seq_len 32 "
    "--batch_size 2 --grad_accum 1 --eval_batches 1 --no_show_samples --no_amp"
)
FEW = f"{SMALL} --max_steps 2"

# (the document's line, what is added to it), in the order of its recommended workflow
DAY_1 = (("python train.py --config micro --cpu --name day1",
          f"{SMALL} --max_steps 22 --save_interval 11"),)
DAY_2 = (
    ("python sample.py checkpoints/sunfish-epoch=00-step=5000.ckpt --num_samples 3 --seq_len 64",
     ""),
    ("python train.py --config micro --cpu --resume checkpoints/last.ckpt",
     f"{SMALL} --max_steps 24"),
)
DAY_3 = (
    ("python sample.py checkpoints/last.ckpt --num_samples 3 --seq_len 128 --num_steps 20", ""),
    ('python sample.py checkpoints/last.ckpt --prompt "Write about nature" --guidance_scale 7.0 '
     "--num_samples 3 --seq_len 128 --num_steps 20", ""),
    ("python sample.py checkpoints/sunfish-epoch=00-step=5000.ckpt --num_samples 1 --seq_len 64 "
     "--num_steps 10", ""),
    ("python train.py --config micro --cpu --name my-first-model", FEW),
    ("python train.py --config micro --cpu --name experiment-1", FEW),
    ("python train.py --config micro --cpu --name base-model", FEW),
    ("python sample.py checkpoints/last.ckpt --num_samples 3", ""),
    ("python train.py --config micro --cpu --resume checkpoints/best-base.ckpt --name "
     "prompt-finetuning", f"{SMALL} --max_steps 3"),
    ('python sample.py checkpoints/last.ckpt --prompt "Your prompt here" --guidance_scale 7.0', ""),
)
FRAGMENTS = (
    "--num_steps 10 --scheduler ddim",
    "--num_steps 20 --scheduler ddim",
    "--num_steps 50 --scheduler ddim",
    "--num_steps 100 --scheduler ddpm",
)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str
    before: dict          # the files in checkpoints/ and their hashes


def lines_of(text):
    """Every line of every bash block, its continuations joined and its comments gone."""
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            line = " ".join(line.split())
            if line and not line.startswith("#"):
                yield line


def typed(line, added=""):
    """The command of a line, in this process."""
    words = shlex.split(f"{line.replace('step=5000', 'step=11')} {added}")
    main = importlib.import_module(words[1].removesuffix(".py")).main
    out, err = io.StringIO(), io.StringIO()
    before = tree(Path("checkpoints"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = call(main, *words[2:])
    return Outcome(code, out.getvalue(), err.getvalue(), before)


def refuse(*_):
    raise AssertionError("it tried to reach a network")


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """The folder, and the outcome of every line of the document, in a folder where nothing is. The
    starter corpus is shorter than usual.
    """
    folder = tmp_path_factory.mktemp("clone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(starter, "CHARS", 300_000)
        patch.setattr(starter, "VOCAB", 800)
        patch.setattr(socket.socket, "connect", refuse)
        found = {line: typed(line, added) for line, added in (*DAY_1, *DAY_2, *DAY_3)}
    return folder, found


def outcome(days, start):
    """What came of the only line that begins so."""
    [found] = [outcome for line, outcome in days[1].items() if line.startswith(start)]
    return found


# ---- the document's commands ---------------------------------------------------------------------

@pytest.mark.skipif(not SEED, reason="the user's document is not at hand")
def test_no_line_of_the_document_is_forgotten():
    document = set(lines_of(SEED.read_text(encoding="utf-8")))
    ours = {line for line in document if not line.startswith(NOT_OURS)}
    assert ours == {line for line, _ in (*DAY_1, *DAY_2, *DAY_3)} | set(FRAGMENTS)


def test_every_line_works_without_text_and_without_a_network(days):
    failed = [f"{line}\n{found.err[-800:]}" for line, found in days[1].items() if found.code]
    assert not failed, "\n\n".join(failed)


def test_the_first_day_trains_on_the_starter_corpus_and_says_so(days):
    folder = days[0]
    found = outcome(days, "python train.py --config micro --cpu --name day1")
    assert "the built-in starter corpus is used" in found.err
    run = folder / "checkpoints/day1"
    assert "source builtin (synthetic" in (run / "summary.md").read_text(encoding="utf-8")
    assert not (folder / "wandb").exists() and not (folder / "logs").exists()
    [speed] = re.findall(r"^speed: (\S+) for all 22 steps, (\S+) to go, measured on \d+ steps",
                         found.err, re.M)
    assert all(re.fullmatch(r"\d+:\d\d", time) for time in speed)


def test_samples_are_three_texts_with_their_own_seeds(days):
    found = outcome(days, DAY_2[0][0])
    assert found.out.count("---\n") == 2
    assert re.findall(r"seed=(\d+)", found.err) == ["1337", "1338", "1339"]
    assert "step=11.ckpt -> checkpoints/day1/step_000011" in found.err


def test_guidance_is_on_and_a_prompt_stays_as_it_was(days):
    found = outcome(days, 'python sample.py checkpoints/last.ckpt --prompt "Write')
    assert all(text.startswith("Write about nature") for text in found.out.split("---\n"))
    assert "forwards=20" in found.err


def test_a_resume_goes_on_in_the_run_itself(days):
    found = outcome(days, "python train.py --config micro --cpu --resume checkpoints/last.ckpt")
    assert "checkpoints/last.ckpt -> checkpoints/day1" in found.err
    run = days[0] / "checkpoints/day1"
    assert [event["step"] for event in log(run, "resume")] == [22]
    assert [event["step"] for event in log(run)] == list(range(1, 25))


def test_a_resume_under_another_name_leaves_its_source_alone(days):
    found = outcome(days, "python train.py --config micro --cpu --resume checkpoints/best-base")
    assert "best-base.ckpt -> checkpoints/base-model/step_" in found.err
    after = tree(days[0] / "checkpoints/base-model")
    before = {name: value for name, value in found.before.items() if "base-model/" in name}
    assert after == {name.partition("base-model/")[2]: value for name, value in before.items()}
    run = days[0] / "checkpoints/prompt-finetuning"
    assert [event["step"] for event in log(run)] == [3]


def test_a_second_fork_never_takes_its_own_folder(days, monkeypatch):
    """It would be the newest run, and go on where the first one stopped."""
    monkeypatch.chdir(days[0])
    pointer = Path("checkpoints/prompt-finetuning/latest")
    step = pointer.read_text(encoding="utf-8").split("\n")[0]
    pointer.write_text(f"{step}\n9999-12-31T00:00:00\n", encoding="utf-8")
    again = typed(*DAY_3[-2])
    assert again.code == 2 and "there are: checkpoints/" in again.err
    assert tree(Path("checkpoints")) == again.before


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_schedulers_of_the_older_system_have_a_meaning(days, monkeypatch, fragment):
    monkeypatch.chdir(days[0])
    found = typed(f"python sample.py checkpoints/day1 {fragment}")
    meant = "ancestral" if "ddpm" in fragment else "confidence"
    assert found.code == 0 and found.out.strip()
    assert f"so --sampler {meant} is used" in found.err


def test_the_settings_of_the_guides_file_are_flags(days, monkeypatch):
    """Their older names are taken, with a text that is named; the scale is what sample begins with.
    """
    monkeypatch.chdir(days[0])
    line = (
        "python train.py --config config/micro_config.py --cpu --name own --learning_rate 3e-4 "
        "--n_layer 1 --n_head 2 --n_embd 16 --accumulate_grad_batches 1 "
        "--conditioning_dropout 0.15 --guidance_scale 5.0 --data_dir data/builtin"
    )
    small = "--d_ff 32 --memory_slots 2 --seq_len 32 --batch_size 2 --eval_batches 1 --no_amp"
    found = typed(line, f"{small} --max_steps 2 --no_show_samples")
    assert found.code == 0 and "corpus is used" not in found.err, found.err
    run = days[0] / "checkpoints/own"
    settings = log(run, "meta")[0]["config"]["args"]
    assert (settings["lr"], settings["preset"], settings["d_model"]) == (3e-4, "micro", 16)

    plain = typed("python sample.py checkpoints/own --guidance_scale 1 --max_new_tokens 8")
    stored = typed("python sample.py checkpoints/own --max_new_tokens 8")
    asked = typed("python sample.py checkpoints/own --guidance_scale 5 --max_new_tokens 8")
    assert "notice: --guidance_scale 5, as it was stored in training" in stored.err
    assert stored.out == asked.out and "in blocks" in stored.err
    assert "left to right" in plain.err or "in blocks" in plain.err


def test_a_line_that_is_too_long_for_a_prompt_is_named(days, monkeypatch):
    monkeypatch.chdir(days[0])
    Path("prompts.txt").write_text("mai\n\n" + "lal " * 262_144 + "\nkal\n", encoding="utf-8")
    found = typed("python sample.py checkpoints/day1 --prompts_file prompts.txt")
    assert found.code == 2 and not found.out
    assert "error: prompts.txt, line 3: 1,048,576 bytes, and 100,000 are the most" in found.err


# ---- the list of presets -------------------------------------------------------------------------

def test_presets_are_listed_with_what_is_measured_and_what_is_not(monkeypatch, capsys):
    from training import presets
    monkeypatch.setattr(presets, "SECONDS", 0.01)
    monkeypatch.setattr(presets, "LARGEST", 5e5)       # the smallest preset alone is run
    assert train.main(["--list_presets", "--cpu", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines[1:-1]}
    assert list(rows) == sorted(config.BASE_PIECES, key=lambda name: int(
        rows[name].split()[1].replace(",", "")))
    assert set(rows) == set(config.PRESETS) - {"none"}
    measured = [name for name, row in rows.items() if "~" not in row]
    assert measured == ["nano"] and lines[-1].startswith("~ not run here")
    for name, row in rows.items():
        assert f"{config.PRESETS[name]['max_steps']:,} steps" in row
        assert re.search(r"[\d.]+ (minutes|hours|years)", row)


def test_other_commands_do_not_take_the_list():
    with pytest.raises(UserError, match="belongs to train"):
        cli.parse(config.LaunchArgs, ["--list_presets"], "run_1b_launch")


# ---- docs/CPU_GUIDE.md ---------------------------------------------------------------------------

def strings_of_the_code():
    """All texts in the code, with U+0000 where a value is put in."""
    found = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        if path.parent.name in ("tests", "benchmarks"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", "\0") for part in node.values]
                found.append("".join(part if isinstance(part, str) else "\0" for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_each_message_that_the_guide_quotes_is_in_the_code():
    """In the first column of the table of troubles; what differs from case to case is `...`."""
    troubles = GUIDE.read_text(encoding="utf-8").partition("## Troubleshooting")[2]
    quoted = re.findall(r"^\| `([^`]+)`", troubles, re.M)
    assert len(quoted) >= 12
    texts = strings_of_the_code()
    for message in quoted:
        for part in message.split("..."):
            part = part.strip().removeprefix("error: ")
            assert any(part in text for text in texts), f"no message says {part!r}"
