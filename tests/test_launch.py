"""run_1b_launch: every line of its guide, what it refuses, the memory that it plans, and a run that
is killed inside a save.

    python -m pytest tests/test_launch.py
"""
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import model_config
import run_1b_launch
from conftest import ROOT, aria, call, log, tree
from model import build_model
from model_config import ModelConfig, rows_of_step
from test_user_documents import SEEDS, lines_of
from training.footprint import kept_of_layer, layer_matrices

DATA = "--device cuda --data fineweb_1b.npy"
# the guide's lines -> what is planned: steps, tokens in 10^9, parameters in 10^9, the lengths
GUIDE = {
    f"{DATA} --variant gqa --kv-head 8 --train-seq-len 2048 --grad-accum 8":
        (20_000, 0.328, 1.095, "2048@0"),
    f'{DATA} --train-seq-len 1024 --seq-schedule "512@0,1024@2000,2048@12000" --grad-accum 16':
        (20_000, 0.442, 0.933, "512@0,1024@2000,2048@12000"),
    f'{DATA} --train-seq-len 512 --seq-schedule "512@0,1024@12000" --grad-accum 32 '
    "--instrument off --analysis-every 0":
        (20_000, 0.459, 0.933, "512@0,1024@12000"),
    f'{DATA} --train-seq-len 256 --seq-schedule "256@0,512@12000" --grad-accum 64 '
    "--instrument off --analysis-every 0":
        (20_000, 0.459, 0.933, "256@0,512@12000"),
    f"{DATA} --wandb --wandb-project experiments": (20_000, 0.492, 0.933, "1024@0,2048@10000"),
    f"{DATA} --wandb --wandb-group g --wandb-tags oneb,decoupled":
        (20_000, 0.492, 0.933, "1024@0,2048@10000"),
    DATA: (20_000, 0.492, 0.933, "1024@0,2048@10000"),
    f"{DATA} --null-attn --tie-qk": (20_000, 0.492, 0.916, "1024@0,2048@10000"),
    f"{DATA} --save-every 500": (20_000, 0.492, 0.933, "1024@0,2048@10000"),
    f"{DATA} --tag oneb_decoupled --variant decoupled --seed 1337 "
    "--ckpt runs/oneb_decoupled_decoupled_seed1337/last.pt --resume":
        (20_000, 0.492, 0.933, "1024@0,2048@10000"),
    f'{DATA} --block 4096 --seq-schedule "1024@0,2048@10000,4096@80000" --target-tokens 10B':
        (195_088, 10, 0.933, "1024@0,2048@10000,4096@80000"),
    f'{DATA} --block 8192 --seq-schedule "2048@0,4096@60000,8192@140000" --target-tokens 10B':
        (161_294, 10, 0.933, "2048@0,4096@60000,8192@140000"),
    f"{DATA} --target-tokens 10B": (310_176, 10, 0.933, "1024@0,2048@10000"),
    f"{DATA} --target-tokens 20B": (615_352, 20, 0.933, "1024@0,2048@10000"),
    f"{DATA} --variant baseline": (20_000, 0.492, 1.233, "1024@0,2048@10000"),
    f"{DATA} --variant gqa_kv2": (20_000, 0.492, 1.060, "1024@0,2048@10000"),
    f"{DATA} --variant bottleneck": (20_000, 0.492, 0.933, "1024@0,2048@10000"),
    f"{DATA} --live rich": (20_000, 0.492, 0.933, "1024@0,2048@10000"),
}


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A folder with nothing in it, and no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    yield tmp_path
    assert not list(tmp_path.iterdir()), "a dry run has written"


def dry(capsys, line):
    """-> what a dry run prints, its remarks on stderr."""
    code = call(run_1b_launch.main, *shlex.split(line))
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert shown.out.endswith("dry run: add --run to start\n")
    return shown.out, shown.err


@pytest.mark.parametrize("line", GUIDE)
def test_the_plan_of_each_line_of_the_guide(line, empty, capsys):
    steps, tokens, params, lengths = GUIDE[line]
    out, err = dry(capsys, line)
    assert f"steps={steps} planned_tokens≈{tokens:.3f}B" in out
    assert f"params={params:.3f}B" in out and f"lengths={lengths} " in out
    assert "fineweb_1b.npy is not there" in err and "no GPU" in err

    # the command can be pasted, and its arguments are train's
    command = shlex.split(out.splitlines()[-2])
    assert command[1:3] == ["-m", "train"] and command[0] == sys.executable
    assert ("tokens for each parameter" in err) == (tokens < params)


@pytest.mark.skipif(not list(SEEDS.glob("003*")), reason="the user's document is not at hand")
def test_every_line_of_the_document_itself(empty, capsys):
    """All its commands of the launcher, as they stand there but for --run; `pythono` is a misprint,
    and the doubled backslash at a line's end too.
    """
    text = next(SEEDS.glob("003*")).read_text(encoding="utf-8")
    lines = [re.sub(r"^pythono|^python3", "python", line) for line in lines_of(text)]
    ours = [line for line in lines if line.startswith("python run_1b_launch.py")]
    broken = [line for line in ours if "\\" in line]
    assert len(ours) >= 15 and len(broken) == 3
    for line in ours:
        line = line.removesuffix(" --run")
        if line in broken or line + " --run" in broken:
            # the shell ends the command there, with a lone backslash
            words = [*shlex.split(line.split("\\ ")[0])[2:], "\\"]
            assert call(run_1b_launch.main, *words) == 2
            assert "use a single \\ at the line end" in capsys.readouterr().err
        out, err = dry(capsys, " ".join(line.replace("\\ ", "").split()[2:]))
        assert "planned_tokens≈" in out, err


@pytest.mark.parametrize(
    "line, words",
    [
        ("--seq-schedule 512@0,1024", ("'1024'", "LENGTH@STEP")),
        ("--seq-schedule 512@0,1024@0", ("step 0",)),
        ("--seq-schedule 512@0,4096@10", ("4096", "2048")),
        ("--train-seq-len 4096", ("4096", "2048")),
        ("--train-seq-len 4096 --seq-schedule 512@0", ("4096", "2048")),
        ("--target-tokens 10X", ("10X",)),
        ("--target-tokens 10B --steps 5", ("10B", "5")),
        ("--n-head 30", ("2048", "30")),
        ("--sem-dim 100", ("100", "32")),
        ("--geo-dim 32", ("32", "even")),
        ("--variant gqa --kv-head 5", ("32", "5")),
        ("--variant gqa --tie-qk", ("tie_qk", "gqa")),
        ("--variant gqa --sem-dim 128", ("sem_dim", "decoupled")),
        ("--model primary", ("python -m train",)),
        ("--output_dir here", ("run_root",)),
        ("--tag a/b", ("a/b",)),
        ("--gpus 3", ("16", "3")),
        ("--tok_s fast", ("fast", "train.jsonl")),
        ("--blok 4096", ("--block",)),
        ("--tier auto", ("80gb",)),
    ],
)
def test_what_is_refused(line, words, empty, capsys):
    """In one sentence with the numbers, before anything is written; --run changes nothing."""
    for run in ("", " --run"):
        assert call(run_1b_launch.main, *shlex.split(line + run)) == 2
        message = capsys.readouterr().err
        assert all(word in message for word in words), message
        assert "Traceback" not in message


def test_what_is_typed_wins_over_tier_and_preset(empty, capsys):
    out, _ = dry(capsys, f"{DATA} --tier 24gb --grad-accum 4")
    assert "global_batch=4 " in out and "lengths=512@0,1024@12000 " in out
    out, _ = dry(capsys, f"{DATA} --tier 24gb --train-seq-len 128")
    assert "global_batch=32 " in out and "lengths=128@0 " in out
    out, err = dry(capsys, f"{DATA} --size medium")
    assert "lengths=1024@0 " in out and "--optimizer adamw" in out and "params=0.278B" in out
    out, _ = dry(capsys, f"{DATA} --optimizer adamw")
    assert "--lr 0.0002 --optimizer adamw" in out, "the launcher's rate, not a small model's"
    _, err = dry(capsys, f"{DATA} --train-seq-len 64 --seq-schedule 512@0,1024@30000")
    assert "--seq_len does nothing here" in err and "never reached" in err


def test_matched_variants_have_equally_many_parameters(empty, capsys):
    counts = []
    for variant in ("baseline", "gqa", "bottleneck", "decoupled"):
        out, _ = dry(capsys, f"{DATA} --variant {variant} --match params")
        counts.append(float(re.search(r"params=(\S+)B", out)[1]))
    assert max(counts) - min(counts) <= 0.001 and counts[0] == 1.233


def test_hours_and_cost(empty, tmp_path_factory, capsys):
    out, _ = dry(capsys, f"{DATA} --tok_s 20000 --price 2.5 --gpus 2")
    assert "time≈6.8 h at 20000 tok/s, cost≈34 at 2.5" in out
    assert "-m torch.distributed.run --standalone --nproc_per_node 2 -m train" in out
    run = tmp_path_factory.mktemp("measured")
    events = [{"event": "train", "tok_s": speed} for speed in (10.0, 9000.0, 9100.0)]
    (run / "train.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    out, _ = dry(capsys, f"{DATA} --tok_s {run}")
    assert "h at 9000 tok/s" in out


def test_a_plan_is_instant_and_needs_no_torch(tmp_path):
    code = (
        "import sys, run_1b_launch; run_1b_launch.main([]);"
        "sys.exit('torch' in sys.modules)"
    )
    before = os.times().children_user
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    assert os.times().children_user - before < 2


# --------------------------------------------------------------------------------------------------
# memory

def kept_by_autograd(shape, mixed, block, length, batch):
    """Bytes of all tensors that a forward keeps, the model's own and its copies left out."""
    torch.manual_seed(0)
    model = build_model(shape)
    x = torch.randint(1, 90, (batch, length))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed),
    ):
        model.both_states(x, x if block > 1 else None, block, with_clean=block < length)
    total = sum(size for size, _ in kept.values())
    return total - 2 * shape.n_layers * layer_matrices(shape) * mixed


@pytest.mark.parametrize(
    "options",
    [
        {"attn": "mha"},
        {"attn": "mha", "tie_qk": True},
        {"attn": "mha", "null_attn": True},
        {"attn": "gqa"},
        {"attn": "gqa_kv2", "learned_temp": True},
        {"attn": "bottleneck"},
        {"attn": "decoupled"},
        {"attn": "decoupled", "null_attn": True},
        {"attn": "decoupled", "tie_qk": True},
        {"attn": "decoupled", "attn_dim": 8},
        {"attn": "decoupled", "attn_dim": 32},
    ],
    ids=str,
)
def test_what_a_layer_keeps_is_what_autograd_keeps(options):
    shape = ModelConfig(
        model="backup", vocab_size=100, d_model=64, n_layers=2, n_heads=4, d_ff=96, **options
    )
    deeper = dataclasses.replace(shape, n_layers=3)
    for mixed in (False, True):
        for block in (1, 4, 64):
            found = [kept_by_autograd(s, mixed, block, 64, 2) for s in (shape, deeper)]
            rows = rows_of_step(shape, 64, block)
            planned = 2 * kept_of_layer(shape, rows, 2 if mixed else 4)
            assert planned == pytest.approx(found[1] - found[0], rel=0.02), (mixed, block)


def memory(capsys, line):
    out, _ = dry(capsys, line)
    parts = re.search(r"memory≈([0-9.]+) GB: (.*), in", out)
    numbers = [float(part.split()[-1]) for part in parts[2].split(" + ")]
    assert sum(numbers) == pytest.approx(float(parts[1]), abs=0.1), "the parts add up"
    return float(parts[1])


def test_memory_of_the_guides_plans(empty, capsys):
    """The two small tiers stay below 90 %, and what saves memory saves it in the plan."""
    lines = list(GUIDE)
    assert memory(capsys, lines[2]) <= 0.9 * 24
    assert memory(capsys, lines[3]) <= 0.9 * 16
    plain = memory(capsys, DATA)
    full = memory(capsys, f"{DATA} --param_dtype fp32")
    assert memory(capsys, f"{DATA} --optimizer adamw") == pytest.approx(plain + 1.9, abs=0.1)
    assert full == pytest.approx(plain + 5.6, abs=0.1)          # weights, Lion's state, copies
    assert memory(capsys, f"{DATA} --no_activation_checkpointing") > plain + 8
    assert memory(capsys, f"{DATA} --ema 0.999") == pytest.approx(plain + 3.7, abs=0.1)
    assert memory(capsys, f"{DATA} --gpus 4 --fsdp") < 0.6 * plain
    _, err = dry(capsys, f"{DATA} --tier 16gb --param_dtype fp32 --optimizer adamw")
    assert "--preset medium" in err


# --------------------------------------------------------------------------------------------------
# the run

TINY = (
    "--cpu --threads 1 --no_amp --d_model 16 --layers 2 --n_head 2 --d_ff 32 "
    "--seq-schedule 16@0,32@2 --batch_size 2 --grad-accum 2 --steps 4 --save-every 1 "
    "--eval_every 2 --eval_batches 1 --log_every 1 --no_show_samples --train_block_sizes T,8 "
    "--instrument full --analysis-every 2 --sample_every 4 --sample_prompts a --live off"
).split()


def token_file(folder):
    """Random ids and the .meta of the older tool."""
    path = folder / "a b.npy"
    np.save(path, np.random.default_rng(1).integers(0, 50256, 20_000).astype(np.uint16))
    about = "tokens: 20000\ndocuments: 1\nencoding: gpt2\nvocab_size: 50257\n"
    (folder / "a b.npy.meta").write_text(about)
    return path


def kill_inside_a_save(words, folder, run, step):
    """SIGKILL as soon as the folder that is written aside for this step is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "run_1b_launch", *words], cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None:
        if list(run.glob(f".tmp-step_{step:06}-*")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL
    return list(run.glob(".tmp-*"))


def test_a_run_killed_inside_a_save_ends_as_the_untouched_one(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    words = ["--data", str(token_file(tmp_path)), *TINY, "--run"]
    whole = tmp_path / "whole/t_decoupled_seed1337"
    aria("run_1b_launch", *words, "--run_root", "whole", "--tag", "t", cwd=tmp_path, check=0)

    run = tmp_path / "runs/t_decoupled_seed1337"
    left = kill_inside_a_save([*words, "--tag", "t"], tmp_path, run, 3)
    assert left, "the kill came too late"
    assert (run / "latest").read_text().split()[0] == "step_000002"

    resume = ["--ckpt", "runs/t_decoupled_seed1337/last.pt", "--resume", "--run"]
    about = ["--data", str(tmp_path / "a b.npy"), "--variant", "decoupled", "--seed", "1337"]
    about += ["--cpu", "--tag", "t"]
    monkeypatch.chdir(tmp_path)
    for wrong in ("--seed 7", "--attn gqa", "--tag u", "--d_model 32"):
        assert call(run_1b_launch.main, *about, *wrong.split(), *resume) == 2
        assert wrong.split()[0] in capsys.readouterr().err
    aria("run_1b_launch", *about, *resume, cwd=tmp_path, check=0)

    ends = [tree(folder / "step_000004") for folder in (whole, run)]
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert ends[0][file] == ends[1][file]
    losses = [
        {line["step"]: line["loss"] for line in log(folder)} for folder in (whole, run)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert not list(run.glob(".tmp-*"))

    config = json.loads((run / "config.json").read_text())["model"]
    params = model_config.count_params(ModelConfig.from_dict(config))
    for folder in (whole, run):
        summary = (folder / "summary.md").read_text(encoding="utf-8")
        assert f"{params:,}" in summary and str(2 * 4 * 16 + 2 * 4 * 32) in summary, summary
        assert (folder / "analysis.npz").exists()
        assert {event["step"] for event in log(folder, "sample")} == {0, 4}


def test_a_start_that_fails_leaves_nothing(tmp_path):
    """No GPU: exit code 2, and no folder."""
    words = ("--device", "cuda", "--train-seq-len", 32, "--run")
    done = aria("run_1b_launch", *words, cwd=tmp_path, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and "error: --device cuda" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*"))
