"""The command lines in the user's own documents, where those are at hand: each runs here, with its
sizes reduced.

The documents lie beside the project, in ../shared/seeds. Their commands are taken out of their
text, so that none is forgotten; what is added to each (a small shape, few steps) stands in SMALLER.
A document's commands run in their order in one folder, as its reader would run them.
"""
import importlib
import re
import shlex
import shutil

import pytest

import cli
import config
from conftest import ROOT, call

SEEDS = ROOT.parent / "shared" / "seeds"
FOUND = sorted(
    path for number in ("000", "001", "002", "004") for path in SEEDS.glob(number + "*.txt")
)
pytestmark = pytest.mark.skipif(not FOUND, reason="the user's documents are not at hand")

SHAPE = "--d_model 16 --n_layers 1 --n_heads 2 --d_ff 32 --memory_slots 2 --dropout 0"
SIZE = (
    f"--threads 1 {SHAPE} --seq_len 32 --batch_size 2 --grad_accum 1 "
    "--eval_batches 1 --save_interval 1 --log_interval 1"
)
SMALLER = {
    "train": f"{SIZE} --max_steps 2 --no_show_samples",
    "colab_train_eco": f"{SIZE} --max_steps 2 --no_show_samples --no_compile --allow_cpu",
    "run_experiments": f"{SIZE} --max_steps 1 --no_show_samples "
    "--architectures primary --time_modes continuous --masking_strategies span",
    "sample": "--threads 1 --max_new_tokens 8 --steps 2",
    "edge_benchmark": "--threads 1 --max_new_tokens 8 --steps 2 --runs_per_prompt 1 --warmup_runs "
                      "0 --prompt namaste",
}
OLDER = {
    "train_diffusion": "train",
    "train_eco_hybrid": "train",
    "sample_diffusion": "sample",
    "sample_eco_hybrid": "sample",
}
# no run of this name is anywhere, and a resume does not choose among runs
UNCLEAR = "checkpoints/best-base.ckpt"
# the reader's shell and other programs
NOT_OURS = ("source ", "wandb login", "tensorboard ", "git clone ", "cd Aria")

def lines_of(text):
    """Every line of every bash block, its continuations joined, its notebook signs and comments
    gone.
    """
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"^[!%]", "", line.strip())
            if line and not line.startswith("#"):
                yield " ".join(line.split())


def documents():
    return {path.name[:3]: path.read_text(encoding="utf-8") for path in FOUND}


def command_of(line):
    """'python -m diffusion.x ...', 'python x.py ...' -> (module, words), or None."""
    words = shlex.split(line)
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    if words[0] == "python":
        return words[1].removesuffix(".py"), words[2:]
    return None


def command_name(module):
    name = module.rpartition(".")[2]
    return OLDER.get(name, name)


def test_every_line_is_known():
    """Nothing in the documents' shell blocks is passed over in silence."""
    commands = 0
    for number, text in documents().items():
        for line in lines_of(text):
            if command_of(line):
                assert command_name(command_of(line)[0]) in config.COMMANDS, f"{number}: {line}"
                commands += 1
            elif line == "cd train":
                assert not (ROOT / "train").exists(), (
                    "the line has to fail, so that the next one runs in the root"
                )
            elif line.startswith("pip install -r "):
                assert (ROOT / line.split()[-1]).is_file()
            else:
                assert line.startswith(("--num_steps", *NOT_OURS)), f"{number}: {line}"
    assert commands >= 25


@pytest.fixture
def folder(corpus_dir, tmp_path, monkeypatch):
    shutil.copytree(corpus_dir / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


# those of the CPU guide run in tests/test_cpu_guide.py
@pytest.mark.parametrize("number", sorted(documents().keys() - {"004"}))
def test_each_command_runs(number, folder, capsys):
    seen, failures = set(), []
    for line in lines_of(documents()[number]):
        if not command_of(line) or line in seen:
            continue
        seen.add(line)
        module, words = command_of(line)
        name = command_name(module)
        words = [word.replace("step=5000", "step=2") for word in words]
        main = importlib.import_module(module).main
        code = call(main, *words, *SMALLER[name].split())
        shown = capsys.readouterr()
        # the message names the checkpoints, and with one of them it goes on
        if UNCLEAR in words and code == 2:
            there = re.search(r"there are: ([^,\s]+)", shown.err)[1]
            words[words.index(UNCLEAR)] = there
            code = call(main, *words, *SMALLER[name].split())
            shown = capsys.readouterr()
        if code != 0:
            failures.append(f"exit {code}: {line}\n{shown.err[-500:]}")
        elif name == "sample":
            prompt = words[words.index("--prompt") + 1] if "--prompt" in words else ""
            assert shown.out.startswith(prompt) and shown.out.strip(), line
    assert not failures, "\n\n".join(failures)
    assert any(folder.glob("checkpoints/*/latest")), "no training left a run"


def test_fragments_of_sampling_parse():
    """Lines that begin with a flag, and flags within the text, are for the command that the
    document speaks of.
    """
    for number, text in documents().items():
        for line in lines_of(text):
            if line.startswith("--"):
                cli.parse(config.SampleArgs, ["checkpoints/x", *line.split()], "sample")
        for flag, value in re.findall(r"`--(\w+) ([\w.-]+)`", text):
            cls = (
                config.SampleArgs if flag in ("steps", "top_k", "temperature") else config.ColabArgs
            )
            cli.parse(cls, ["--ckpt", "x", f"--{flag}", value], number)


def test_settings_of_the_guides_file_are_flags(capsys):
    """The guide edits config/micro_config.py: its name stands for the preset, and each setting
    there is a flag of train.
    """
    settings = {}
    for block in re.findall(r"```python\n(.*?)```", documents()["004"], re.S):
        settings |= dict(re.findall(r"^(\w+): \w+ = (\S+)", block, re.M))
    assert {"learning_rate", "n_layer", "n_head", "n_embd", "accumulate_grad_batches"} <= set(
        settings
    )
    words = [f"--{name}={value}" for name, value in settings.items()]
    args, origins = cli.parse(
        config.TrainArgs, ["--config", "config/micro_config.py", "--cpu", *words], "train"
    )
    assert (args.preset, args.max_steps, args.d_model, args.n_layers) == ("micro", 100_000, 384, 6)
    told = capsys.readouterr().err
    assert told.count("notice") == 1 and "micro_config.py" in told and "--preset micro" in told
