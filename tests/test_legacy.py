"""The oldest document's commands (diffusion.*), as pasted: each does what it says, in the folders
that it names.
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import colab_train_eco
import train
from common.files import read_json
from conftest import ROOT, aria

TRAIN = """python -m diffusion.train_{0} \\
  --data_dir data/processed \\
  --output_dir checkpoints/{0}_hi \\
  --seq_len 512 \\
  --batch_size 4 \\
  --grad_accum 8 \\
  --max_steps 5000 \\
  --time_mode continuous \\
  --timestep_sampling stratified \\
  --masking_strategy span
"""
SAMPLE = """python -m diffusion.sample_{0} \\
  --ckpt checkpoints/{0}_hi/latest.pt \\
  --tokenizer data/tokenizer/aria_hindi.model \\
  --prompt "mai kal bazaar gaya tha" \\
  --max_new_tokens 128 \\
  --steps {1}
"""
ONE_SHOT = (
    "python -m diffusion.colab_train_eco --max_steps 500 --save_interval 100 --log_interval 10 "
    "--compile"
)
RUNBOOK_SAMPLE = """python -m diffusion.sample_eco_hybrid \\
  --ckpt checkpoints/eco_hybrid_hi/latest.pt \\
  --tokenizer data/tokenizer/aria_hindi.model \\
  --prompt "mai kal bazaar gaya tha" \\
  --max_new_tokens 80 \\
  --steps 12 \\
  --temperature 1.0 \\
  --top_k 50
"""
SMALL = (
    "--d_model", 16, "--n_layers", 1, "--n_heads", 2, "--d_ff", 32, "--memory_slots", 2,
    "--threads", 1,
)
SHORT = (
    "--seq_len", 32, "--batch_size", 2, "--grad_accum", 1, "--max_steps", 2, "--eval_interval", 0,
    "--no_show_samples",
)
MODELS = {"diffusion": "backup", "eco_hybrid": "primary"}


def paste(document, *more, cwd, by_path=False, env=None):
    """Run a pasted command, with small settings after it, as a module or by its path."""
    module, *words = shlex.split(document.replace("\\\n", " "))[2:]
    words += map(str, more)
    if not by_path:
        return aria(module, *words, cwd=cwd, env=env)
    script = str(ROOT / (module.replace(".", "/") + ".py"))
    return subprocess.run(
        [sys.executable, script, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
        env={**os.environ, **(env or {})},
    )


@pytest.fixture(scope="module")
def folder(corpus_dir, tmp_path_factory):
    """A folder with prepared text only, which the tests of this file fill in their order."""
    here = tmp_path_factory.mktemp("legacy")
    shutil.copytree(corpus_dir / "data", here / "data")
    return here


@pytest.mark.parametrize("name", MODELS)
def test_train_then_sample(folder, name):
    done = paste(TRAIN.format(name), *SMALL, *SHORT, cwd=folder, by_path=name == "eco_hybrid")
    assert done.returncode == 0, done.stderr[-3000:]
    run = folder / f"checkpoints/{name}_hi"
    assert (run / "step_000002/model.safetensors").exists() and (
        run / "latest"
    ).read_text().startswith("step_000002")
    saved = read_json(run / "config.json")["args"]
    assert (saved["model"], saved["masking_strategy"], saved["seq_len"]) == (
        MODELS[name],
        "span",
        32,
    )
    steps = 16 if name == "diffusion" else 12
    done = paste(
        SAMPLE.format(name, steps), "--threads", 1, cwd=folder, by_path=name == "diffusion"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("mai kal bazaar gaya tha") and "latest.pt -> " in done.stderr
    figures = dict(pair.split("=") for pair in done.stderr.split("[stats]")[1].split())
    assert (
        int(figures["forwards"]) <= steps
        and int(figures["new"]) <= 128
        and figures["mode"] == "full"
    )


def test_the_other_model_is_refused(folder):
    """Needs the runs of the test before. A wrapper stands for one model, and the message names the
    way out.
    """
    done = paste(SAMPLE.format("diffusion", 4).replace("diffusion_hi", "eco_hybrid_hi"), cwd=folder)
    assert (
        done.returncode == 2 and "--model primary" in done.stderr and "Traceback" not in done.stderr
    )
    done = paste(TRAIN.format("diffusion"), "--model", "primary", cwd=folder)
    assert done.returncode == 2 and "contradicts" in done.stderr


def test_one_shot_with_text(folder):
    """Text that is there is used, an earlier run in the folder is kept when a fresh one was asked
    for.
    """
    # the compiler itself is tested in test_train, and costs half a minute
    env = {"TORCHDYNAMO_DISABLE": "1"}
    had = (folder / "checkpoints/eco_hybrid_hi/step_000002").exists()
    done = paste(
        ONE_SHOT, "--allow_cpu", *SMALL, *SHORT, "--max_steps", 3, "--save_interval", 1,
        "--if_exists", "archive", cwd=folder, env=env,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = folder / "checkpoints/eco_hybrid_hi"
    assert [path.name for path in sorted(run.glob("step_*"))] == [
        "step_000001", "step_000002", "step_000003",
    ]
    assert (run / "previous_1/step_000002").exists() == had
    assert [line.split(",")[0] for line in done.stderr.split("\n") if line.startswith("stage")] == [
        "stage 1", "stages 2-4", "stage 5", "stage 6"]
    assert "python -m sample" in done.stdout and "data/processed is there" in done.stderr


def test_one_shot_from_nothing(tmp_path):
    """No text: the starter corpus, announced and recorded; the runbook's sampling command works on
    the result.
    """
    done = paste(
        ONE_SHOT, "--allow_cpu", *SMALL, *SHORT, "--no_compile", "--max_chars", 100_000,
        cwd=tmp_path, by_path=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "synthetic" in done.stderr
    # data/builtin is train's to make
    assert read_json(tmp_path / "data/one_shot/meta.json")["source"] == "builtin"
    run = tmp_path / "checkpoints/eco_hybrid_hi"
    assert (
        "builtin" in (run / "summary.md").read_text(encoding="utf-8") and (run / "latest").exists()
    )
    meta = json.loads((run / "train.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert meta["data"]["source"] == "builtin"
    done = paste(RUNBOOK_SAMPLE, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("mai kal bazaar gaya tha"), done.stderr[
        -3000:
    ]


@pytest.mark.parametrize(
    "memory, typed, wanted",
    [
        (80e9, (), (8, 4, 2048)),
        (40e9, (), (4, 8, 2048)),
        (16e9, (), (2, 16, 1024)),
        (8e9, (), (1, 32, 512)),
        (16e9, ("--batch_size", "8"), (8, 4, 1024)),
        (16e9, ("--seq_len", "384"), (2, 16, 384)),
        (80e9, ("--preset", "tiny"), (8, 1, 128)),
        (None, ("--allow_cpu",), (1, 8, 256)),
    ],
)
def test_one_shot_picks_a_tier(folder, monkeypatch, capsys, memory, typed, wanted):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(colab_train_eco, "gpu", lambda device: (memory and "a GPU", memory))
    seen = []
    monkeypatch.setattr(train, "start", lambda args, origins: seen.append(args) or (0, None))
    monkeypatch.setattr(colab_train_eco, "judge", lambda *_: 0)  # nothing was trained
    words = shlex.split(ONE_SHOT)[3:]
    assert colab_train_eco.main([*words, *typed]) == 0
    [args] = seen
    assert (args.batch_size, args.grad_accum, args.seq_len) == wanted
    if "--preset" not in typed:
        assert (args.d_model, args.n_layers, args.n_heads, args.memory_slots) == (512, 10, 8, 16), (
            "the runbook's shape"
        )
    assert (args.max_steps, args.save_interval, args.log_interval, args.compile) == (
        500, 100, 10, True,
    )
    assert (
        args.run_dir == Path("checkpoints/eco_hybrid_hi")
        and f"batch_size {wanted[0]}" in capsys.readouterr().err
    )


def test_cd_train_is_harmless(tmp_path):
    """The oldest documents begin with `cd train`: there is no such folder, so the line fails and
    the next one works.
    """
    assert not (ROOT / "train").exists()
    script = f"cd train\n{shlex.quote(sys.executable)} -m diffusion.train_diffusion --help\n"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "--masking_strategy" in done.stdout and "train" in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "train_diffusion", "train_eco_hybrid", "sample_diffusion", "sample_eco_hybrid",
        "colab_train_eco",
    ],
)
def test_each_wrapper_runs_by_its_path(tmp_path, name):
    done = paste(f"python -m diffusion.{name} --help", cwd=tmp_path, by_path=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m")
