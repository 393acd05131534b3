"""Several processes equal one: real torchrun jobs of two and four gloo ranks on the CPU, killed,
resumed and sharded.

    python -m pytest tests/test_distributed.py          # tests/stress/distributed.py has the larger
        grid
"""
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import TINIER, tiny_model

import checkpoint
import config
import masking
import train
from common.console import UserError
from conftest import ROOT, log
from evaluation import estimators
from training import distributed, recovery

# 12 rows a step: alone 4 + 4 + 4, two ranks 4 + 2 each, four ranks 3 each, so no two ways add up in
# the same order.
# The rate is the default: AdamW divides by the gradient's own size; where that is 1e-8, a sum's
# order moves a weight by lr/100.
SHAPE = (
    "--d_model", 16, "--n_layers", 2, "--n_heads", 2, "--d_ff", 24, "--memory_slots", 2,
    "--seq_len", 16, "--batch_size", 4, "--grad_accum", 3, "--train_block_sizes", "T,8,4,1",
    "--ar_fade", 0, "--seed", 3, "--block_size", 4, "--lr", 3e-4, "--lr_schedule", "constant",
    "--warmup_steps", 2, "--ema", 0.9,
    "--eval_batches", 1, "--eval_interval", 3, "--save_interval", 2, "--keep_full", 99,
    "--log_interval", 1, "--threads", 1, "--no_amp", "--no_show_samples", "--live", "off",
)
# With this seed the first five steps are of all block rules.
# Ranks hide unequal numbers of tokens. Muon orthogonalises in bf16, where the order of a sum shows
# more: a lower rate.
PRIMARY = ("--model", "primary", "--optimizer", "muon", "--loss", "masked_mean", "--lr", 1e-4)
BACKUP = ("--model", "backup", "--optimizer", "adamw", "--exit_loss_weight", 0.3)
FOREVER = 10 ** 6


def alone(*words):
    """train.main in this process, where there is no torchrun."""
    return train.main([str(word) for word in words])


class Job:
    """torchrun with so many ranks, as a user types it."""

    def __init__(self, processes, folder, *words):
        self.out = folder / f"{time.time_ns()}.out"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", processes, "-m", "train", *words,
        ]
        with open(self.out, "wb") as out:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=folder,
                stdout=out,
                stderr=out,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.terminate()                             # torchrun passes it on
            self.process.wait(60)

    def end(self, timeout=200):
        """-> (exit code, all that was printed)"""
        return self.process.wait(timeout), self.out.read_text(encoding="utf-8", errors="replace")

    def pid(self, rank):
        children = (
            Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        )
        return next(
            int(p)
            for p in children
            if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{p}/environ").read_bytes()
        )


def forked(world, folder, *words):
    """The ranks of one run as children of this process, which is seconds faster than torchrun ->
    exit codes, what rank 0 said.
    """
    def rank_of_many(rank):
        with open(folder / f"rank{rank}.out", "wb") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        sys.stdout = sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)
        os.environ.update(
            dict.fromkeys(distributed.TORCHRUN, "0"),
            RANK=str(rank),
            WORLD_SIZE=str(world),
            TORCHELASTIC_RUN_ID="none",
        )
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
        )
        code = 1
        try:
            code = alone(*words)
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)

    children = [
        multiprocessing.get_context("fork").Process(target=rank_of_many, args=(rank,))
        for rank in range(world)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(200)
        child.kill()
    return [child.exitcode for child in children], (folder / "rank0.out").read_text(
        encoding="utf-8"
    )


def wait_for(run, step, job):
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and job.process.poll() is None:
        with contextlib.suppress(OSError, json.JSONDecodeError):
            if any(line["step"] >= step for line in log(run)):
                return
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come: {job.out.read_text(errors='replace')[-3000:]}")


def same(one, other, step, within=1e-5):
    """Weights, averages and optimizer state of two runs at a step, and their logs up to there."""
    for name in ("model", "ema", "optimizer"):
        a, b = (
            getattr(checkpoint.load(run / f"step_{step:06d}", parts=(name,)), name)
            for run in (one, other)
        )
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(
                a[key], b[key], rtol=0, atol=within, msg=lambda m, what=(name, key): f"{what}: {m}"
            )
    for key in ("loss", "gnorm", "mask", "tokens_seen"):
        a, b = (
            {line["step"]: line[key] for line in log(run) if line["step"] <= step}
            for run in (one, other)
        )
        assert {s: a[s] for s in b} == pytest.approx(b, abs=within, rel=within) and step in b, key


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):
    """One process of each kind to compare with, and meanwhile the job that needs nothing else."""
    folder = tmp_path_factory.mktemp("runs")
    words = ("--data_dir", text, *SHAPE)
    with Job(2, folder, *words, *BACKUP, "--output_dir", "two", "--max_steps", 4) as job:
        assert alone(*words, *PRIMARY, "--output_dir", folder / "primary", "--max_steps", 6) == 0
        assert alone(*words, *BACKUP, "--output_dir", folder / "backup", "--max_steps", 8) == 0
        return folder, job.end()


def test_two_ranks_then_one_then_two_sharded_ones_and_a_kill_then_four(runs):
    """Each checkpoint equals the uninterrupted single process; --fsdp takes up whole tensors and
    leaves behind a part for each rank, four ranks or one go on from the parts of two, and what a
    killed rank leaves behind is sound.
    """
    folder, (code, printed) = runs
    one, run = folder / "backup", folder / "two"
    assert code == 0, printed[-3000:]
    assert printed.count("step 1/4 |") == 1 and printed.count("settings:") == 1, (
        "more than one rank prints"
    )
    same(one, run, 4)
    assert alone("--resume", run, "--max_steps", 6, "--threads", 1, "--no_show_samples") == 0
    same(one, run, 6)
    with Job(
        2, folder, "--resume", run, "--fsdp", "--activation_checkpointing", "--max_steps", FOREVER,
        "--threads", 1,
    ) as job:
        wait_for(run, 9, job)
        os.kill(job.pid(1), signal.SIGKILL)
        killed = time.monotonic()
        code, printed = job.end()
    assert code != 0 and time.monotonic() - killed < 30
    assert (
        "2 processes, sharded" in printed
        and "error: rank 0 of 2: another process of this run has ended" in printed
    )
    assert "Signal 9 (SIGKILL)" in printed  # torchrun's own table names the rank and the cause
    same(one, run, 8)
    evals = [
        {line["step"]: line["val_nelbo"] for line in log(r, "eval") if line["step"] in (3, 6)}
        for r in (one, run)
    ]
    assert len(evals[0]) == 2 and evals[0] == pytest.approx(evals[1], abs=1e-5), (
        "the averaged weights were scored wrongly"
    )
    last = checkpoint.load(run, parts=("model", "ema", "optimizer"))  # every file against its hash
    assert [f.name for f in last.files["model"]] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    with Job(
        4, folder, "--resume", run, "--fsdp", "--max_steps", last.step + 1, "--threads", 1
    ) as job:
        code, printed = job.end()
    assert code == 0 and not list(run.glob(".tmp-*")), printed[-3000:]
    assert len(checkpoint.load(run, parts=()).files["optimizer"]) == 4
    for r in (one, run):
        assert (
            alone("--resume", r, "--max_steps", last.step + 2, "--threads", 1, "--no_show_samples")
            == 0
        )
    same(one, run, last.step + 2)
    # what sample does
    model, _, four = checkpoint.load_model(
        run / f"step_{last.step + 1:06d}", torch.device("cpu"), config.check_saved
    )
    assert all(torch.equal(t, four.ema[name]) for name, t in model.state_dict().items())


def test_four_ranks_and_a_signal_to_one_of_them(runs):
    """They go on from one process's checkpoint; SIGTERM for a single rank, and all of them save the
    same step and leave.
    """
    folder, _ = runs
    one, run = folder / "primary", folder / "four"
    shutil.copytree(one / "step_000002", run / "step_000002")
    with Job(
        4, folder, "--resume", run, "--activation_checkpointing", "--auto_batch",
        "--max_steps", FOREVER, "--threads", 1,
    ) as job:
        wait_for(run, 6, job)
        os.kill(job.pid(2), signal.SIGTERM)
        code, printed = job.end()
    end = log(run, "end")[-1]
    assert (
        code == end["code"] == 0
        and end["stopped"] == "SIGTERM"
        and "another process" not in printed
    ), printed[-3000:]
    assert checkpoint.load(run).step == end["step"] >= 6
    same(one, run, 6)


def test_the_probe_of_auto_batch_leaves_the_first_step_alone(text, tmp_path):
    """Its gradients are none of the first step's, which is one by whole rows."""
    words = (
        "--data_dir", text, *SHAPE, *PRIMARY, "--seed", 4, "--max_steps", 2,
        "--eval_interval", 0,
    )
    assert masking.pick_blocks((16, 8, 4, 1), 16, 4, 0)[0] == 16, (
        "the first step has to be one by whole rows"
    )
    codes, printed = forked(2, tmp_path, *words, "--auto_batch", "--output_dir", tmp_path / "two")
    assert codes == [0, 0], printed[-3000:]
    assert alone(*words, "--output_dir", tmp_path / "one") == 0
    same(tmp_path / "one", tmp_path / "two", 2)


def test_a_signal_in_the_middle_of_a_step_of_two_ranks(text, tmp_path, monkeypatch):
    """It comes to rank 1 in the first of the step's two forwards: both ranks give the step up
    before the second.
    """
    real, calls = masking.denoising_loss, []

    def signalled(*args, **kwargs):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 2 * 2 + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert len(calls) <= 2 * 2 + 1, "the second forward took place"
        return real(*args, **kwargs)
    words = ("--data_dir", text, *SHAPE, *PRIMARY, "--max_steps", 4, "--eval_interval", 0)
    assert alone(*words, "--output_dir", tmp_path / "one") == 0
    monkeypatch.setattr(masking, "denoising_loss", signalled)
    # asked at each save: its forwards are not counted here
    monkeypatch.setattr(recovery, "sound", lambda *_: True)
    codes, printed = forked(2, tmp_path, *words, "--output_dir", tmp_path / "two")
    monkeypatch.undo()
    assert codes == [0, 0] and "stopped by SIGTERM at step 2, saved" in printed, printed[-3000:]
    assert "SignalException" in printed, "that torchrun calls this a failure comes as a surprise"
    assert alone("--resume", tmp_path / "two", "--threads", 1, "--no_show_samples") == 0
    same(tmp_path / "one", tmp_path / "two", 4)


def test_a_stopped_rank_is_named(text, tmp_path, monkeypatch):
    """Rank 1 is frozen for a while: rank 0 says who is awaited, and the run goes on when it is
    back.
    """
    real, calls = masking.denoising_loss, []

    def frozen(*args, **kwargs):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(*args, **kwargs)
    monkeypatch.setattr(masking, "denoising_loss", frozen)
    monkeypatch.setattr(distributed, "BEAT", 0.2)
    monkeypatch.setattr(distributed, "SILENCE", 2)
    codes, printed = forked(
        2, tmp_path, "--data_dir", text, *SHAPE, *BACKUP, "--max_steps", 3, "--eval_interval", 0,
        "--output_dir", tmp_path / "run",
    )
    assert codes == [0, 0] and "no sign of life from rank 1 (process" in printed, printed[-3000:]
    assert printed.index("no sign of life") < printed.index("step 3/3")


# ---- in this process -----------------------------------------------------------------------------

@pytest.mark.parametrize("block, first", [(24, None), (8, 3)])
@pytest.mark.parametrize("strategy", ["token", "span"])
def test_the_parts_of_a_draw_are_the_draw(block, first, strategy):
    """Each rank's masks, times and weights are its rows of the one draw of the whole step; so are
    the counts.
    """
    args = config.TrainArgs(masking_strategy=strategy)
    whole = masking.corrupt(args, 1, 5, 12, 24, block, first)
    parts = [
        masking.corrupt(args, 1, 5, 12, 24, block, first, distributed.Ranks(r, 4).share(12))
        for r in range(4)
    ]
    assert torch.equal(torch.cat([p.mask for p in parts]), whole.mask)
    assert torch.equal(torch.cat([p.weight for p in parts]), whole.weight)
    for p in parts:
        assert torch.equal(p.t, whole.t)
        assert masking.normaliser("elbo", p) == whole.mask.numel()
        assert masking.normaliser("masked_mean", p) == int(whole.mask.sum())


@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_an_evaluation_is_shared(kind, tmp_path):
    """10 held-out rows over 2 and 4 gloo processes: each one knows the figures of one process, for
    1/2 and 3/10 of its work.
    """
    net = tiny_model(kind, 50, seed=3, shape=TINIER, block_size=4)
    rows, work, real = torch.randint(4, 50, (10, 16)), [], net.both_states
    net.both_states = lambda x0, *more: work.append(len(x0)) or real(x0, *more)

    def score(rank=0, world=1):
        if world > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{tmp_path}/store{world}", rank=rank, world_size=world
            )
        found = estimators.held_out(net, rows, [16, 4, 1], 0, 4, 2, distributed.Ranks(rank, world))
        (tmp_path / f"{world}.{rank}.json").write_text(json.dumps([found, work]))
        return json.loads(json.dumps(found))

    one, alone_work = score(), sum(work)
    assert alone_work == 10 * 2 * 3 and all(r["se"] > 0 for r in one.values()), (
        "10 rows, 2 draws, 3 block rules"
    )
    work.clear()
    for world, share in ((2, 5), (4, 3)):
        children = [
            multiprocessing.get_context("fork").Process(target=score, args=(rank, world))
            for rank in range(world)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        for rank in range(world):
            found, theirs = json.loads((tmp_path / f"{world}.{rank}.json").read_text())
            assert sum(theirs) == share * 2 * 3
            for block in one:
                assert found[block] == pytest.approx(one[block], rel=1e-6)


def test_slips_of_many_processes(text, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="8 sequences .* over 3 processes"):
        distributed.Ranks(0, 3).share(8)
    with pytest.raises(UserError, match="torchrun --nproc_per_node"):
        alone("--data_dir", text, *SHAPE, "--fsdp", "--output_dir", tmp_path / "run")
    for words in (("--optimizer", "muon"), ("--compile",)):
        with pytest.raises(UserError, match=f"{words[0]}.*--fsdp|--fsdp.*{words[0]}"):
            alone("--fsdp", *words)
    with pytest.raises(UserError, match="--device cuda:1"):
        distributed.choose_device("cuda:1", 2, 0)
    assert not list(tmp_path.iterdir())


