"""Usage errors: each command ends with exit code 2 and a sentence that names the way out, and
leaves every file as it was.
"""
import contextlib
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys

import pytest

import conftest
from conftest import ROOT, aria, aria_here

RUN = "checkpoints/eco_hybrid_hi"
TRAIN = (
    "--d_model 16 --n_layers 1 --n_heads 2 --d_ff 32 --max_steps 20 --threads 1 --output_dir " + RUN
)


def tree(folder):
    """conftest's, lock files aside."""
    return {
        path: value
        for path, value in conftest.tree(folder).items()
        if not path.upper().endswith(("/LOCK", "/.LOCK"))
    }


@pytest.fixture
def user(trained, text, tmp_path):
    """A user's folder that a usage error could ruin: text, tokenizer, two runs, and another text
    with its tokenizer.
    """
    folder = tmp_path / "user"
    shutil.copytree(trained, folder)
    shutil.copytree(text, folder / "other")
    return folder


def put(name, content):
    def change(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return change


def cut(name):
    def change(folder):
        os.truncate(folder / name, (folder / name).stat().st_size - 2)
    return change


def remove(name):
    return lambda folder: (folder / name).unlink()


# what is wrong -> (what the user did to the folder, the command, what the message has to say)
SLIPS = {
    "missing input file": (
        None,
        "prepare --source files --input nowhere.txt",
        ("nowhere.txt", "no such file"),
    ),
    "empty corpus": (
        put("empty.txt", b"\n\n \n"),
        "prepare --source files --input empty.txt",
        ("empty.txt", "empty"),
    ),
    "text not UTF-8": (
        put("bad.txt", b"fine\n\xff\xfe\n"),
        "prepare --source files --input bad.txt",
        ("bad.txt", "line 2", "iconv"),
    ),
    "unknown kind of file": (
        put("a.pdf", b"%PDF"),
        "prepare --source files --input a.pdf",
        ("a.pdf", ".jsonl"),
    ),
    "unknown flag": (
        None,
        f"train {TRAIN} --learning_rat 1",
        ("--learning_rat", "--learning_rate"),
    ),
    "impossible width": (None, f"train {TRAIN} --d_model 33", ("--d_model 33", "--n_heads 2")),
    "missing --config file": (None, f"train {TRAIN} --config gone.json", ("gone.json",)),
    "no meta.json": (
        remove("data/processed/meta.json"),
        f"train {TRAIN} --data_dir data/processed",
        ("meta.json", "python -m prepare", "colab_train_eco"),
    ),
    "meta.json and train.bin disagree": (
        cut("data/processed/train.bin"),
        f"train {TRAIN}",
        ("train.bin", "--force"),
    ),
    "meta.json is no JSON": (
        put("data/processed/meta.json", b"{"),
        f"train {TRAIN}",
        ("meta.json",),
    ),
    "seq_len longer than the text": (None, f"train {TRAIN} --seq_len 999999", ("--seq_len",)),
    "seq_len longer than the validation text": (
        None,
        f"train {TRAIN} --seq_len 3000",
        ("val", "--seq_len"),
    ),
    "a GPU that is not there": (None, f"train {TRAIN} --device cuda:9", ("cuda:9", "--device cpu")),
    "a file in place of the run folder": (
        put("taken", b"mine"),
        f"train {TRAIN} --output_dir taken/run",
        ("taken", "--output_dir"),
    ),
    "truncated checkpoint, resume": (
        cut(RUN + "/step_000010/model.safetensors"),
        f"train --resume {RUN}/step_000010",
        ("step_000010", "model.safetensors"),
    ),
    "truncated checkpoint, sample": (
        cut(RUN + "/step_000010/model.safetensors"),
        f"sample {RUN}/step_000010",
        ("step_000010", "model.safetensors"),
    ),
    "another width on resume": (None, f"train --resume {RUN} --d_model 64", ("--d_model 64", "32")),
    "another text's tokenizer, first weights": (
        None,
        f"train {TRAIN} --ckpt {RUN} --data_dir other",
        ("400", "800", "--tokenizer"),
    ),
    "weights of another width": (
        None,
        f"train {TRAIN} --ckpt {RUN}",
        ("does not fit", "head.weight"),
    ),
    "another text's tokenizer, sample": (
        None,
        f"sample {RUN} --tokenizer other/t.model",
        ("leave the flag out",),
    ),
    "missing tokenizer": (None, f"sample {RUN} --tokenizer gone.model", ("gone.model",)),
    "missing prompts file": (
        None,
        f"sample {RUN} --prompts_file gone.txt",
        ("gone.txt", "No such file"),
    ),
    "prompts not UTF-8": (
        put("p.txt", b"\xff"),
        f"sample {RUN} --prompts_file p.txt",
        ("p.txt", "UTF-8"),
    ),
    "a prompts file without a prompt": (
        put("p.txt", b"\n \n"),
        f"sample {RUN} --prompts_file p.txt",
        ("p.txt", "no prompt"),
    ),
    "gaps and a prompt": (
        None,
        f"sample {RUN} --text a____b --prompt c",
        ("--text", "--prompt", "only one"),
    ),
    "gaps of nothing": (None, f"sample {RUN} --text=", ("--text is empty", "____")),
    "no such checkpoint": (
        None,
        f"sample {RUN}/step_000099.pt",
        ("step_000099", "step_000005", "step_000012"),
    ),
    "a pickle": (put("old.pt", pickle.dumps({"a": 1})), "sample old.pt", ("old.pt", "foreign")),
    "no checkpoint named, and no run": (
        lambda folder: shutil.rmtree(folder / "checkpoints"),
        "sample --engine torch",
        ("--ckpt", "no run under checkpoints/"),
    ),
    "a result where none can be": (
        put("taken", b"mine"),
        f"edge_benchmark {RUN} --max_new_tokens 2 --runs_per_prompt 1 --out_json taken/b.json",
        ("taken/b.json", "--out_json"),
    ),
    "a result where none can be, known before the work": (
        put("taken", b"mine"),
        f"evaluate {RUN} --out_json taken/e.json",
        ("taken/e.json", "--out_json"),
    ),
    "a folder in place of a picture": (
        None,
        f"evaluate {RUN} --out_png data",
        ("data", "Is a directory", "--out_png"),
    ),
    "a judge that is not there": (None, f"evaluate {RUN} --samples 4 --judge gone", ("gone",)),
    "no GPU for the one-shot": (None, "colab_train_eco", ("--allow_cpu",)),
    "one-shot without text": (
        remove("data/processed/meta.json"),
        "colab_train_eco --allow_cpu --skip_setup",
        ("--skip_setup", "python -m prepare"),
    ),
}


# started as a user starts them, one of each kind; the others run in this process, which is cheaper
AS_A_USER = {
    "missing input file",
    "a pickle",
    "no checkpoint named, and no run",
    "a folder in place of a picture",
    "no GPU for the one-shot",
}


@pytest.mark.parametrize("mistake", SLIPS)
def test_slip(user, mistake):
    change, command, words = SLIPS[mistake]
    if change:
        change(user)
    before = tree(user)
    name, *arguments = command.split()
    if mistake in AS_A_USER:
        done = aria(name, *arguments, cwd=user, env={"CUDA_VISIBLE_DEVICES": ""})
    else:
        done = aria_here(name, *arguments, cwd=user)
    said = done.stderr
    message = said[said.rfind("error:"):]
    assert done.returncode == 2, said[-3000:]
    assert "Traceback" not in said, said[-3000:]
    assert all(word in message for word in words), said[-3000:]
    assert len(message) < 700, "that is no sentence"
    assert tree(user) == before, "a usage error changed files"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on file sizes")
def test_full_disk(user):
    """No file may grow beyond 64 KB: the save fails, training says so and ends with 1, and what was
    there stays whole.
    """
    before = tree(user)
    command = [
        sys.executable, "-m", "train", "--resume", RUN, "--max_steps", "14", "--eval_interval", "0",
        "--threads", "1",
    ]
    done = subprocess.run(
        command,
        cwd=user,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "could not be saved" in done.stderr
    after = tree(user)
    steps = {
        name: value
        for name, value in before.items()
        if "/step_" in name or name.endswith(("latest", "best"))
    }
    assert steps.items() <= after.items() and not [name for name in after if "step_000014" in name]
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(user)


@pytest.mark.parametrize(
    "command",
    [
        "train", "prepare", "sample --ckpt x", "evaluate --ckpt x", "edge_benchmark --ckpt x",
        "colab_train_eco --allow_cpu",
    ],
)
def test_a_python_without_the_packages(tmp_path, command):
    """The wrong Python, which is what a forgotten activate gives: one sentence that names the fix,
    no traceback.
    """
    done = subprocess.run(
        [sys.executable, "-S", "-m", *command.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (
        done.returncode == 3 and "lacks torch, numpy" in done.stderr and "activate" in done.stderr
    ), done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("**/*.*"))


def test_a_reader_that_has_seen_enough():
    """`| head -1`: no traceback."""
    with subprocess.Popen(
        [sys.executable, "-m", "run_experiments", "--help_all"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as command:
        command.stdout.close()          # before it has written anything
        assert command.wait() == 141 and command.stderr.read() == b""


# ---- following what a message says ---------------------------------------------------------------

SMALL = (
    TRAIN.replace(RUN, "checkpoints/new")
    + " --seq_len 32 --batch_size 2 --grad_accum 1 --max_steps 1 --no_show_samples"
)
PREPARE_AGAIN = "prepare --source files --input YOUR_TEXT.txt --data_dir again"
TEXT = "".join(
    f"मैं कल {i} बार बाज़ार गया था। mai kal {i} baar bazaar gaya tha.\n\n" for i in range(400)
)


def own_text(folder):
    (folder / "YOUR_TEXT.txt").write_text(TEXT, encoding="utf-8")


def without_text(folder):
    own_text(folder)
    shutil.rmtree(folder / "data/processed")


def printed(message, name):
    """The first `python -m NAME ...` of a message, up to the punctuation that ends it, as words."""
    found = re.search(rf"python -m ({name}\b[^\n;:,)]*)", message)
    assert found, f"no python -m {name} in: {message}"
    return found[1]


def named(message, pattern):
    """What a message names: the group of the pattern, or all of it."""
    found = re.search(pattern, message)
    assert found, f"no {pattern} in: {message}"
    return found[found.re.groups]


# what went wrong -> (what the user did to the folder, the command, message -> the commands that
# follow it)
HINTS = {
    "no prepared text": (
        without_text,
        f"train {SMALL} --data_dir data/processed",
        lambda m: [printed(m, "prepare"), f"train {SMALL} --data_dir data/processed"],
    ),
    "the one-shot without text": (
        without_text,
        "colab_train_eco --allow_cpu --skip_setup " + SMALL,
        lambda m: [printed(m, "prepare"), "colab_train_eco --allow_cpu --skip_setup " + SMALL],
    ),
    "no GPU for the one-shot": (
        None,
        "colab_train_eco " + SMALL,
        lambda m: [f"colab_train_eco {SMALL} {named(m, '--allow_cpu')}"],
    ),
    "no such GPU": (
        None,
        f"train {SMALL} --device cuda:9",
        lambda m: [f"train {SMALL} {named(m, '--device cpu')}"],
    ),
    "no such step": (
        None,
        f"sample {RUN}/step_000099.pt --max_new_tokens 4",
        lambda m: [
            f"sample {RUN}/{step}.pt --max_new_tokens 4"
            for step in re.findall(r"step_0000(?!99)\d\d", m)
        ],
    ),
    "another text's tokenizer": (
        None,
        f"sample {RUN} --tokenizer other/t.model --max_new_tokens 4",
        lambda m: [f"sample {RUN} --max_new_tokens 4"] if "leave the flag out" in m else [],
    ),
    "no such tokenizer": (
        None,
        f"sample {RUN} --tokenizer gone.model --max_new_tokens 4",
        lambda m: [f"sample {RUN} --max_new_tokens 4"] if "leave the flag out" in m else [],
    ),
    "held-out text of another tokenizer": (
        own_text,
        f"evaluate {RUN} --data_dir other --chain_docs 0 --batches 1",
        lambda m: [
            f"{PREPARE_AGAIN} {named(m, '--tokenizer [^, )]+')}",
            f"evaluate {RUN} --data_dir again --chain_docs 0 --batches 1",
            f"evaluate {RUN} {named(m, '--text')} YOUR_TEXT.txt --chain_docs 0 --batches 1",
        ],
    ),
    "another width on resume": (
        None,
        f"train --resume {RUN} --d_model 64 --max_steps 13 --no_show_samples",
        lambda m: [
            f"train --resume {RUN} --d_model {named(m, 'the checkpoint has ([0-9]+)')} "
            "--max_steps 13 --no_show_samples"
        ],
    ),
    "weights of another vocabulary": (
        own_text,
        f"train {SMALL} --ckpt {RUN} --data_dir other",
        lambda m: [f"{PREPARE_AGAIN} {named(m, '--tokenizer [^, )]+')}"],
    ),
    "a new run in a used folder": (
        None,
        f"train {SMALL} --output_dir {RUN} --if_exists error",
        lambda m: [
            f"train {named(m, '--resume')} --output_dir {RUN} --max_steps 13 --no_show_samples",
            f"train {SMALL} --if_exists error",
        ],
    ),
    "no checkpoint at all": (
        lambda folder: shutil.rmtree(folder / "checkpoints"),
        f"sample {RUN} --max_new_tokens 4",
        lambda m: [
            f"{printed(m, 'train')} {SMALL} --output_dir {RUN}".replace("train makes one", "train"),
            f"sample {RUN} --max_new_tokens 4",
        ],
    ),
}


@pytest.mark.parametrize("what", HINTS)
def test_a_hint_works_when_it_is_followed(user, what, monkeypatch):
    change, command, follow = HINTS[what]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if change:
        change(user)

    def typed(line):
        name, *words = line.split()
        done = aria_here(name, *words, cwd=user)
        return done.returncode, done.stderr

    code, message = typed(command)
    assert code == 2, message
    commands = follow(message[message.rfind("error:"):])
    assert commands, message
    for line in commands:
        code, said = typed(line)
        assert code == 0, f"{line}\n{said[-1500:]}"
