"""The one-shot: its verdict on itself, back-off when memory runs out, saves by the clock, copies on
a drive, its notebook.
"""
import ast
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st
from test_train import curve, fresh

import checkpoint
import cli
import colab_train_eco
import config
import conftest
import evaluate
import masking
import prepare
import sample
import train
from common.console import UserError, printable
from common.flags import to_dict
from conftest import ROOT, RUNS, log
from evaluation import check_run
from text import starter
from training import drive, recovery
from training.step import mask_sample

BASE = {"event": "train", "skipped": 0, "step_ms": 100.0, "mask": 0.5}


# ---- the verdict ---------------------------------------------------------------------------------

def good_log(steps=500):
    meta = {"event": "meta", "config": {"args": {"save_interval": 100, "keep_last": 0}}}
    return [
        meta,
        *(
            {**BASE, "step": s, "loss": 9 - 2 * s / 500}
            for s in range(1, steps + 1)
            if s <= 20 or s % 10 == 0
        ),
    ]


def good_samples():
    return [
        {"prompt": p, "text": " मैं kal गया", "ids": list(range(40 * i, 40 * i + 40)), "special": 0}
        for i, p in enumerate(config.PROMPTS)
    ]


def failed(lines):
    return [line.name for line in lines if line.ok is False]


def test_a_good_run_passes_everything():
    lines = check_run.verdict(
        good_log(), dict.fromkeys(range(100, 501, 100), True), 500, good_samples()
    )
    assert (
        not failed(lines)
        and check_run.passed(lines) is True
        and {line.step for line in lines} == {20, 100, 500}
    )


def spoil(step, **values):
    return lambda run: run["log"].__setitem__(step, {**run["log"][step], **values})


def spoil_all(**values):
    return lambda run: run.update(
        log=[{**e, **values} if e["event"] == "train" else e for e in run["log"]]
    )


def spoil_text(**values):
    return lambda run: run["samples"][2].update(values)


BROKEN = {  # what is broken -> the criteria that have to fail, and no other
    "a loss that is not finite": (spoil(7, loss=None), ["loss finite"]),
    "a step that was skipped": (spoil(20, skipped=1), ["loss finite"]),
    "a mask too low": (spoil(3, mask=0.14), ["mask metric in range"]),
    "a mask too high": (spoil(3, mask=0.91), ["mask metric in range"]),
    "a step of blocks, all hidden": (spoil(3, mask=1.0, block=4), ["mask metric in range"]),
    "three slow steps": (
        lambda run: [spoil(s, step_ms=301)(run) for s in (6, 9, 12)],
        ["throughput stable"],
    ),
    "a rising loss": (
        lambda run: (
            run["log"].reverse()
            or run.update(
                log=[
                    {**e, "loss": 9 + e["step"] / 500} if e["event"] == "train" else e
                    for e in run["log"]
                ]
            )
        ),
        ["loss falls", "loss down by 10 %", "loss down by 20 %, the target"],
    ),
    "a flat end": (
        lambda run: run.update(
            log=[{**e, "loss": max(e["loss"], 8.2)} if "loss" in e else e for e in run["log"]]
        ),
        ["loss down by 10 %", "loss down by 20 %, the target"],
    ),
    "15 % down": (
        lambda run: run.update(
            log=[{**e, "loss": max(e["loss"], 7.6)} if "loss" in e else e for e in run["log"]]
        ),
        ["loss down by 20 %, the target"],
    ),
    "no checkpoint at 100": (lambda run: run["folders"].pop(100), ["checkpoint files"]),
    "the newest is damaged": (
        lambda run: run["folders"].update({500: False}),
        ["checkpoint files"],
    ),
    "no latest": (lambda run: run.update(latest=None), ["checkpoint files"]),
    "a mask token in the text": (spoil_text(special=1), ["text is valid"]),
    "broken UTF-8": (spoil_text(text="मैं \ufffd kal"), ["text is valid"]),
    "a foreign script": (
        lambda run: [s.update(text="これは文です kal") for s in run["samples"]],
        ["script"],
    ),
    "one text that repeats itself": (spoil_text(ids=[7, 8] * 20), ["no text repeats itself"]),
    "an empty text": (spoil_text(ids=[]), ["no text repeats itself"]),
    "the same few tokens everywhere": (
        lambda run: [s.update(ids=[1, 2, 3, 4, 5] * 20 + s["ids"]) for s in run["samples"]],
        ["no few tokens everywhere"],
    ),
    "two equal texts": (
        lambda run: run["samples"][1].update(ids=run["samples"][0]["ids"]),
        ["no two texts equal"],
    ),
    "no samples at all": (
        lambda run: run.update(samples=None),
        [
            "text is valid", "script", "no text repeats itself", "no few tokens everywhere",
            "no two texts equal",
        ],
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_each_criterion_can_fail_alone(what):
    run = dict(
        log=good_log(),
        folders=dict.fromkeys(range(100, 501, 100), True),
        latest=500,
        samples=good_samples(),
    )
    breaks, wanted = BROKEN[what]
    breaks(run)
    lines = check_run.verdict(run["log"], run["folders"], run["latest"], run["samples"])
    assert failed(lines) == wanted
    soft = {"throughput stable", "loss down by 20 %, the target"}
    assert check_run.passed(lines) is (set(wanted) <= soft), "soft ones do not decide"
    told = list(check_run.table(lines))
    advice = [t for t in told if t.startswith("advice: ")]
    assert 1 <= len(advice) == len({line.advice for line in lines if line.ok is False})


def test_a_short_run_is_neither_good_nor_bad():
    lines = check_run.verdict(good_log(12), {12: True}, 12, good_samples())
    assert {line.ok for line in lines} == {None} and check_run.passed(lines) is None
    lines = check_run.verdict(good_log(40), {40: True}, 40, good_samples())
    assert {line.step for line in lines if line.ok} == {20} and {
        line.ok for line in lines if line.step > 20
    } == {None}
    # done again after a resume: the later counts
    again = [*good_log(40), {**BASE, "step": 3, "loss": 8.0, "mask": 0.99}]
    assert failed(check_run.verdict(again, {}, None, None)) == ["mask metric in range"]
    # a block of one token is all hidden
    single = [*good_log(40), {**BASE, "step": 3, "loss": 8.0, "mask": 1.0, "block": 1}]
    assert not failed(check_run.verdict(single, {}, None, None))
    part = [*good_log(40), {**BASE, "step": 3, "loss": 8.0, "mask": 0.5, "block": 1}]
    assert failed(check_run.verdict(part, {}, None, None)) == ["mask metric in range"]


def corrupted(steps=500, **settings):
    """The log of a run of which only the corruption is real: pick_blocks and mask_sample, as
    training calls them.
    """
    args = config.TrainArgs(
        **{"seq_len": 64, "batch_size": 16, "grad_accum": 1, "max_steps": 500, **settings}
    )
    rows = args.batch_size * args.grad_accum
    run = SimpleNamespace(args=args, rows=rows, length=args.seq_len, mine=slice(None))
    log = [{"event": "meta", "config": {"args": to_dict(args, config.TrainArgs)}}]
    for step in range(steps):
        chance = args.single_chance(step)
        block, first = masking.pick_blocks(
            args.block_choices, args.seq_len, args.seed, step, chance
        )
        masks = mask_sample(run, step, block, first)
        log.append(
            {
                **BASE,
                "step": step + 1,
                "loss": 9 - step / 250,
                "mask": masks.masked_count / (rows * args.seq_len),
                "block": block,
                "first": first,
                "seq_len": args.seq_len,
                "global_batch": rows,
            }
        )
    return log


def mask_line(log):
    lines = check_run.verdict(log, {}, None, None)
    [line] = [line for line in lines if line.name == "mask metric in range"]
    return line


MASKS = {
    "the default mixture": {},
    "whole rows": dict(train_block_sizes="T"),
    "short blocks": dict(train_block_sizes="T,4,2"),
    "cosine": dict(train_block_sizes="T,8", mask_schedule="cosine"),
    "levels": dict(time_mode="discrete", timesteps=4),
    "independent times": dict(timestep_sampling="uniform", batch_size=4),
    "spans": dict(masking_strategy="span"),
    "nearly all": dict(train_block_sizes="T,8", min_mask_rate=0.9),
    "little": dict(max_mask_rate=0.2),
}


@pytest.mark.parametrize("what", MASKS)
def test_the_mask_criterion_passes_the_real_corruption_and_no_other(what, monkeypatch):
    settings = MASKS[what] | {"ar_fade": 0.04, "seq_len": 32}
    line = mask_line(corrupted(60, **settings))
    assert line.ok is True, line.number
    assert "20 steps with blocks of several tokens" in line.number
    real = masking.alpha
    broken = {
        "everything is hidden": lambda *bounds: 0 * real(*bounds),
        "nothing but the least is hidden": lambda *bounds: 1 + 0 * real(*bounds),
        "the rates of another range": lambda t, schedule, low, high: real(
            t, schedule, 0.4 * low, 0.5 * high
        ),
    }
    for name, alpha in broken.items():
        monkeypatch.setattr(masking, "alpha", alpha)
        line = mask_line(corrupted(60, **settings))
        assert line.ok is False, f"{name}: {line.number}"


def test_the_mask_criterion_waits_for_a_step_that_can_tell():
    """The default mixture begins left to right: 20 such steps say nothing of the corruption."""
    log = corrupted(20)
    assert {e["block"] for e in log[1:]} == {1}
    assert mask_line(log).ok is None and "none has longer blocks yet" in mask_line(log).number
    assert mask_line(corrupted(500)).ok is True
    log[7]["mask"] = 0.5
    assert mask_line(log).ok is False
    assert mask_line(corrupted(20, train_block_sizes="1")).ok is True
    for model in ("primary", "backup"):
        assert mask_line(corrupted(20, model=model, objective="ar")).ok is True


def test_special_tokens_of_a_text_are_counted(here, monkeypatch):
    """The mask's row follows the vocabulary: the last ordinary piece is none, the mask is one."""
    device = torch.device("cpu")
    model, tokenizer, _ = checkpoint.load_model(RUNS["primary"], device, config.check_saved)
    ordinary, mask = tokenizer.vocab_size - 1, model.cfg.mask_id
    assert mask == tokenizer.vocab_size
    rows = iter([[ordinary, ordinary], [ordinary, mask], [tokenizer.unk_id], [tokenizer.pad_id]])
    monkeypatch.setattr(check_run, "generate", lambda *_: SimpleNamespace(rows=[next(rows)]))
    monkeypatch.setattr(type(tokenizer), "written", lambda self, ids: "")
    samples, _ = check_run.write_samples(RUNS["primary"], device)
    assert [s["special"] for s in samples] == [0, 1, 1, 1]


def test_check_run_reads_a_real_run(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    run = "checkpoints/eco_hybrid_hi"
    code = evaluate.main(
        ["--check_run", run, "--out_json", str(tmp_path / "v.json"), "--threads", "1"]
    )
    assert code == 1, "12 steps are not 500"
    shown = capsys.readouterr().out
    assert shown.count("not reached") >= 11 and "verdict: not reached" in shown
    saved = json.loads((tmp_path / "v.json").read_text(encoding="utf-8"))
    assert (
        [s["prompt"] for s in saved["samples"]] == list(config.PROMPTS)
        and saved["step"] == 12
        and saved["passed"] is None
    )
    words = ["--prompt", config.PROMPTS[0], *(f"--{k}={v}" for k, v in check_run.SETTINGS.items())]
    # the runbook's sampling command
    sample.main([run, *words, "--precision", "fp32", "--threads", "1"])
    text = printable(config.PROMPTS[0] + saved["samples"][0]["text"])     # as it is printed
    assert capsys.readouterr().out.strip() == text.strip()


# ---- memory --------------------------------------------------------------------------------------

@given(st.integers(1, 64), st.integers(1, 64))
def test_fewer_rows_divide_the_step(micro, accum):
    rows, less = micro * accum, recovery.fewer_rows(micro, micro * accum)
    assert less is None and micro == 1 or rows % less == 0 and 1 <= less <= micro / 2


def limited(most, monkeypatch, error=torch.OutOfMemoryError, from_step=0):
    """The real loss, on a machine where more rows than `most` do not fit -> the row counts that
    were tried.
    """
    real, tried = masking.denoising_loss, []

    def loss(model, x0, *rest, **more):
        tried.append(len(x0))
        if len(x0) > most and len(tried) > from_step:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, x0, *rest, **more)
    monkeypatch.setattr(masking, "denoising_loss", loss)
    return tried


@pytest.mark.parametrize("from_step", [0, 7])  # found by the probe, and in the middle of a step
def test_out_of_memory_changes_no_gradient(text, tmp_path, monkeypatch, capsys, from_step):
    shape = (
        "--batch_size", 8, "--grad_accum", 2, "--max_steps", 4, "--eval_interval", 0,
        "--auto_batch",
    )
    assert fresh(text, tmp_path / "whole", *shape) == 0
    with monkeypatch.context() as patch:
        tried = limited(2, patch, from_step=from_step)
        assert fresh(text, tmp_path / "less", *shape) == 0
    told = capsys.readouterr().err
    assert (
        {8, 4, 2} <= set(tried)
        and tried[-1] == 2
        and "8 forwards per step, the same 256 tokens" in told
    )
    whole, less = (log(tmp_path / name) for name in ("whole", "less"))
    assert (
        [e["tokens_seen"] for e in whole]
        == [e["tokens_seen"] for e in less]
        == [256, 512, 768, 1024]
    )
    for a, b in zip(whole, less, strict=True):
        assert (a["mask"], a["global_batch"]) == (b["mask"], b["global_batch"])
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5) and a["gnorm"] == pytest.approx(
            b["gnorm"], abs=2e-4
        )
    saved = checkpoint.load(tmp_path / "less").config["args"]
    assert (saved["batch_size"], saved["grad_accum"]) == (8, 2), (
        "what was asked for: another machine may hold it"
    )


@pytest.mark.parametrize("flag, rows", [("--auto_batch", 1), ("--no_auto_batch", 4)])
def test_out_of_memory_at_the_end_of_the_road(text, tmp_path, monkeypatch, capsys, flag, rows):
    limited(0, monkeypatch)
    assert fresh(text, tmp_path / "run", "--max_steps", 2, "--eval_interval", 0, flag) == 1
    message = capsys.readouterr().err
    message = message[message.rfind("error:"):]
    places = [message.find(word) for word in ("--seq_len", "batch_size", "--d_model", "--n_layers")]
    assert -1 not in places and places == sorted(places) and f"{rows} x 16 tokens" in message
    assert not list(tmp_path.glob("run/step_*"))


def test_another_error_is_no_lack_of_memory(text, tmp_path, monkeypatch):
    limited(0, monkeypatch, error=ValueError)
    with pytest.raises(ValueError):
        fresh(text, tmp_path / "run", "--max_steps", 2, "--auto_batch")


def test_the_probe_counts_what_comes_later(monkeypatch, capsys):
    """Rows that fit by themselves, but not with what the optimizer will take at its first step, are
    too many.
    """
    monkeypatch.setattr(recovery, "usable_memory", lambda device: 10e9)
    monkeypatch.setattr(
        recovery.machine, "peak_memory_mb", lambda device: now["rows"] * 1e9 / 2**20
    )
    args, now, said = config.ColabArgs(batch_size=8, grad_accum=4), {}, []
    for later, wanted in ((0, 8), (2e9, 4), (7e9, 2)):
        micro = recovery.measure_rows(
            lambda n: now.update(rows=n),
            8,
            (32, args.seq_len),
            args,
            torch.device("cpu"),
            later,
            lambda: None,
            said.append,
        )
        assert micro == wanted and f"{32 // wanted} forwards per step" in said[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory")
def test_real_lack_of_memory(text, tmp_path):
    """A child that may take 265 MB more than it has: 256 rows of 64 do not fit, fewer do, and the
    step stays whole.
    """
    script = (
        "import resource, sys, torch, train, config, model\n"
        "from common import console, machine\nfrom sampling import decode\nfrom text import "
        "dataset, tokenizer\n"
        "from training import drive, optim, recovery\n"
        "machine.start(1); torch.ones(64, 64) @ torch.ones(64, 64)\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * 4096 + 265 * 2 ** 20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "console.run(train.main, sys.argv[1:])"
    )
    words = (
        "--data_dir", text, "--output_dir", tmp_path / "run", "--d_model", 64, "--n_layers", 2,
        "--n_heads", 2, "--d_ff", 128, "--seq_len", 64, "--batch_size", 256, "--grad_accum", 1,
        "--max_steps", 1, "--eval_interval", 0, "--threads", 1, "--no_amp", "--no_show_samples",
        "--auto_batch", "--train_block_sizes", "T", "--memory_slots", 2,
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "notice: out of memory with 256 x 64" in done.stderr
        and log(tmp_path / "run")[-1]["tokens_seen"] == 256 * 64
    )


# ---- the clock, the drive ------------------------------------------------------------------------

def test_saving_by_the_clock_changes_no_result(text, tmp_path):
    quiet = ("--max_steps", 9, "--eval_interval", 0, "--save_interval", 100)
    assert fresh(text, tmp_path / "plain", *quiet) == 0
    assert fresh(text, tmp_path / "clock", *quiet, "--save_minutes", 1e-5) == 0
    assert list(checkpoint.list_steps(tmp_path / "plain")) == [9]
    assert list(checkpoint.list_steps(tmp_path / "clock")) == list(range(1, 10))
    assert curve(tmp_path / "plain") == curve(tmp_path / "clock")
    a, b = (checkpoint.load(tmp_path / name).model for name in ("plain", "clock"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_run_outlives_its_machine(text, tmp_path, capsys):
    """Saved to the drive, the machine is gone, the newest copy has a flipped bit: the one before
    goes on to the same end.
    """
    away = ("--drive", tmp_path / "drive", "--save_interval", 2, "--eval_interval", 4)
    assert (
        fresh(
            text, tmp_path / "whole/run", "--max_steps", 8, "--save_interval", 2,
            "--eval_interval", 4,
        )
        == 0
    )
    assert fresh(text, tmp_path / "a/run", "--max_steps", 8, *away) == 0
    there = tmp_path / "drive/run"
    kept = checkpoint.list_steps(there)
    assert (
        list(kept)[-1] == 8
        and 2 <= len(kept) <= drive.KEPT + 1
        and all(checkpoint.verify(folder) for folder in kept.values())
    )
    assert (there / "train.jsonl").read_bytes() == (tmp_path / "a/run/train.jsonl").read_bytes()
    assert not list(there.glob(".*"))
    flip(kept[8] / "model.safetensors")
    shutil.rmtree(tmp_path / "a")
    assert fresh(text, tmp_path / "b/run", "--max_steps", 8, *away, "--resume_latest") == 0
    told = capsys.readouterr().err
    assert "step_000006 is back" in told and "is not what was saved" in told
    ours, whole = (checkpoint.load(tmp_path / name) for name in ("b/run", "whole/run"))
    assert ours.step == 8 and log(tmp_path / "b/run", "resume")[-1]["step"] == 6
    assert all(torch.equal(ours.model[key], whole.model[key]) for key in whole.model)
    assert checkpoint.verify(there / "step_000008"), "the damaged copy was replaced"


def test_a_failing_drive_never_stops_training(text, tmp_path, capsys):
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive/run").write_text("in the way")
    assert (
        fresh(
            text, tmp_path / "run", "--max_steps", 4, "--save_interval", 2,
            "--drive", tmp_path / "drive",
        )
        == 0
    )
    assert capsys.readouterr().err.count("could not be copied") >= 2 and list(
        checkpoint.list_steps(tmp_path / "run")
    ) == [2, 4]
    flip(tmp_path / "run/step_000004/model.safetensors")
    (tmp_path / "drive/run").unlink()
    told = []
    assert not drive.store(tmp_path / "run/step_000004", tmp_path / "drive", told.append), (
        "a damaged one must not travel"
    )
    assert (
        drive.store(tmp_path / "run/step_000002", tmp_path / "drive", told.append)
        and len(told) == 1
    )
    assert list(checkpoint.list_steps(tmp_path / "drive/run")) == [2]


def test_a_drive_that_is_not_mounted_is_a_slip(text, tmp_path, capsys):
    assert (
        fresh(text, tmp_path / "run", "--max_steps", 4, "--drive", tmp_path / "drive/MyDrive/Aria")
        == 2
    )
    assert (
        "mount" in capsys.readouterr().err
        and not (tmp_path / "drive").exists()
        and not (tmp_path / "run").exists()
    )


# ---- the one-shot and its notebook ---------------------------------------------------------------

TINY = (
    "--d_model 16 --n_layers 1 --n_heads 2 --d_ff 32 --memory_slots 2 --seq_len 32 --batch_size 2 "
    "--grad_accum 4 --threads 1 "
    "--eval_interval 0 --live off --allow_cpu --no_compile --max_chars 60000 --tokenizer_vocab 400"
).split()


def test_the_one_shot_goes_on_by_itself_and_judges_itself(tmp_path, monkeypatch, capsys):
    """Run, lose the machine (run and text), run again: both come back, and the run goes on. Then
    one that fails.
    """
    here = [tmp_path / "a", tmp_path / "b"]
    for folder in here:
        folder.mkdir()
    monkeypatch.chdir(here[0])
    words = [*TINY, "--drive", str(tmp_path / "drive"), "--device", "cpu"]
    assert colab_train_eco.main([*words, "--max_steps", "4"]) == 0
    shown = capsys.readouterr().out
    assert "verdict: not reached" in shown and all(prompt in shown for prompt in config.PROMPTS)
    monkeypatch.chdir(here[1])
    assert colab_train_eco.main([*words, "--max_steps", "21"]) == 0
    told = capsys.readouterr()
    assert (
        "is back in data" in told.err
        and "is back in checkpoints" in told.err
        and "PASS" in told.out
    )
    run = here[1] / "checkpoints/eco_hybrid_hi"
    assert log(run, "resume")[0]["step"] == 4 and [e["step"] for e in log(run)] == list(
        range(1, 22)
    )
    assert (
        json.loads((run / "verdict.json").read_text(encoding="utf-8"))["criteria"][0]["ok"] is True
    )
    # nothing left to do: judged again
    assert colab_train_eco.main([*words, "--max_steps", "21"]) == 0
    # the advice after an OOM, in the same folder
    with pytest.raises(UserError, match="--if_exists archive"):
        colab_train_eco.main([*words, "--max_steps", "30", "--d_model", "32"])
    real = masking.corrupt  # a corruption that hides far more than the settings ask for

    def hide_more(args, *rest):
        if isinstance(args, config.TrainArgs):  # not the check of weights before a save
            args = dataclasses.replace(args, min_mask_rate=0.97, max_mask_rate=1.0)
        return real(args, *rest)

    monkeypatch.setattr(masking, "corrupt", hide_more)
    code = colab_train_eco.main(
        [*words, "--max_steps", "20", "--if_exists", "suffix", "--train_block_sizes", "T,8"]
    )
    told = capsys.readouterr().out
    steps = log(here[1] / "checkpoints/eco_hybrid_hi_v2")
    masks = [line["mask"] for line in steps if line["block"] > 1]
    assert len(masks) >= 5 and min(masks) > 0.96
    assert code == 1 and "FAIL" in told and "advice: mask out of range" in told


def follow(told, monkeypatch):
    """Every `python -m X ...` that a text says to type, typed -> the commands that were run."""
    ran = []
    for line in told.splitlines():
        for command in re.findall(r"python -m ((?:sample|evaluate|train|report) .*)", line):
            words = shlex.split(re.split(r"\s{3,}|;", command)[0])
            small = {
                "sample": "--max_new_tokens 4",
                "evaluate": "--max_docs 2",
                "train": "--no_show_samples",
            }
            small = small.get(words[0], "").split()
            assert conftest.call(importlib.import_module(words[0]).main, *words[1:], *small) == 0, (
                command
            )
            ran.append(words[0])
    return ran


def test_the_one_shot_leaves_the_text_of_other_runs_alone(tmp_path, monkeypatch, capsys):
    """Without a hub: the starter corpus of a starter run stays, bit for bit; what the one-shot
    prints to type next works.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(starter, "CHARS", 60_000)
    monkeypatch.setattr(starter, "VOCAB", 500)
    shape = [
        word
        for word in TINY
        if word not in ("--allow_cpu", "--max_chars", "60000", "--tokenizer_vocab", "400")
    ]
    assert fresh_starter(shape) == 0
    before = conftest.tree(tmp_path / "data/builtin")
    words = [*TINY, "--device", "cpu", "--run_name", "one", "--no_show_samples"]
    capsys.readouterr()
    assert colab_train_eco.main([*words, "--max_steps", "2"]) == 0
    told = capsys.readouterr()
    assert "in data/one_shot:" in told.err
    assert {"sample", "evaluate", "train"} <= set(follow(told.out, monkeypatch))
    mine = conftest.tree(tmp_path / "data/one_shot")
    args, origins = cli.parse(config.ColabArgs, [*words, "--offline"], "colab_train_eco")
    # the same again: on the same text
    assert colab_train_eco.prepare_text(args, origins) == Path("data/one_shot")
    args.max_chars = 40_000  # another text: beside it
    assert colab_train_eco.prepare_text(args, origins) == Path("data/one_shot_2")
    assert (
        conftest.tree(tmp_path / "data/one_shot") == mine
        and conftest.tree(tmp_path / "data/builtin") == before
    )
    for main, more in (
        (train.main, ("--resume", "checkpoints/starter", "--max_steps", "3", "--no_show_samples")),
        (evaluate.main, ("--ckpt", "checkpoints/starter", "--max_docs", "2")),
    ):
        assert conftest.call(main, *more, "--threads", "1") == 0


def fresh_starter(shape):
    return train.main(
        [
            *shape, "--run_name", "starter", "--max_steps", "2", "--no_show_samples",
            "--no_auto_batch",
        ]
    )


@pytest.mark.parametrize("vocab", ["500", "400"])
def test_the_hint_of_a_starter_run_whose_text_was_replaced_brings_it_back(
    tmp_path, monkeypatch, vocab
):
    """Another text, with the run's tokenizer or another: the command in the message, typed, and the
    run goes on.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(starter, "CHARS", 60_000)
    monkeypatch.setattr(starter, "VOCAB", 500)
    shape = [
        word
        for word in TINY
        if word not in ("--allow_cpu", "--max_chars", "60000", "--tokenizer_vocab", "400")
    ]
    assert fresh_starter(shape) == 0
    tokenizer = "data/builtin/tokenizer.model" if vocab == "500" else "t.model"
    prepare.main(
        [
            "--source", "builtin", "--data_dir", "data/builtin", "--tokenizer", tokenizer,
            "--tokenizer_vocab", vocab, "--max_chars", "40000",
        ]
    )
    resume = [
        "--resume", "checkpoints/starter", "--max_steps", "3", "--threads", "1",
        "--no_show_samples",
    ]
    with pytest.raises(UserError) as caught:
        train.main(resume)
    if vocab == "400":
        with pytest.raises(UserError, match="builds it again, or give a text"):
            evaluate.main(["--ckpt", "checkpoints/starter", "--threads", "1"])
    [command] = re.findall("python -m prepare (.*) builds it again", str(caught.value))
    prepare.main(shlex.split(command))
    assert train.main(resume) == 0


def test_runtime_requirements_are_the_others_without_torch():
    names = [
        [
            line
            for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
            if line and not line.startswith("#")
        ]
        for name in ("requirements.txt", "requirements_runtime.txt")
    ]
    assert (
        names[1] == [line for line in names[0] if not line.startswith("torch")]
        and len(names[1]) == len(names[0]) - 1
    )


FORM = re.compile(
    r'^([A-Z_]+) = (.+?)  #@param (\{type:"(?:string|boolean|integer|slider)".*\}|\[".*"\])$', re.M
)


def notebook():
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.read(ROOT / "colab.ipynb", as_version=4)
    nbformat.validate(book)
    return book


def filled_in(source, **values):
    """The source of a cell as a user leaves its form."""
    for name, value in values.items():
        source, found = re.subn(
            rf"^{name} = .+?(?=  #@param)",
            lambda _, n=name, v=value: f"{n} = {v!r}",
            source,
            flags=re.M,
        )
        assert found == 1, name
    return source


def test_the_notebook_is_clean_and_has_a_form_and_a_text_for_each_step():
    book = notebook()
    assert (ROOT / "colab.ipynb").stat().st_size < 14_000
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in book.cells)
    cells = book.cells[1:]
    assert [cell.cell_type for cell in cells] == ["markdown", "code"] * 7
    fields = {}
    for number, (text, step) in enumerate(zip(cells[::2], cells[1::2], strict=True), 1):
        assert text.source.startswith(f"## {number}. ") and step.source.startswith("#@title ")
        found = FORM.findall(step.source)
        assert len(found) == step.source.count("#@param"), "a field that Colab cannot show"
        fields |= {name: ast.literal_eval(value) for name, value, _ in found}
    whole = "".join(cell.source for cell in book.cells)
    assert "OWNER" not in whole and "environ" not in whole and fields["REPOSITORY"] == ""
    assert {"PROMPT", "MAX_STEPS", "USE_DRIVE", "TEXT", "SEED"} <= set(fields)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"TEXT": "starter corpus", "COMPILE": False, "ALLOW_CPU": True},
        {"MORE_FLAGS": "--lr 1e-3"},
        {"TEXT": "my file", "MY_FILE": "a file.txt"},
    ],
)
def test_the_form_makes_a_command_line_that_the_one_shot_takes(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file.txt").write_text("mai kal bazaar gaya tha")
    [cell] = [cell for cell in notebook().cells if cell.id == "train"]
    source = filled_in(cell.source, **form).partition("earlier = ")[0]
    names = {"USE_DRIVE": True, "DRIVE_FOLDER": "drive", "sys": sys, "os": os}
    exec(source, names)
    args, _ = cli.parse(config.ColabArgs, names["words"][3:], "colab_train_eco")
    assert (
        str(args.run_dir) == names["RUN"]
        and args.drive == "drive"
        and args.max_steps == names["MAX_STEPS"]
    )
    assert args.source == {"starter corpus": "builtin", "my file": "files"}.get(
        names["TEXT"], "hindi"
    )


def test_the_notebook_runs(corpus_dir, tmp_path, monkeypatch):
    """Every cell, in order, in a real kernel, from a real clone; the first one without an address,
    too, and twice.
    """
    import nbclient
    home = tmp_path / "home"
    shutil.copytree(corpus_dir / "data", home / "data")
    for path in [*ROOT.glob("*.py"), ROOT / "requirements_runtime.txt"]:
        shutil.copy(path, home)
    for room in ("common", "text", "training", "sampling", "evaluation", "edge", "hf"):
        shutil.copytree(ROOT / room, home / room)
    for words in (
        ("init", "-q"),
        ("add", "-A"),
        ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all"),
    ):
        subprocess.run(["git", *words], cwd=home, check=True)
    for name, value in {"IPYTHONDIR": str(tmp_path / "ipython"), "PIP_NO_INDEX": "1",
                        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a kernel shows pictures in the page
    book = notebook()
    cell = {cell.id: cell for cell in book.cells}
    empty = cell["setup"].copy()
    cell["setup"]["source"] = filled_in(cell["setup"].source, REPOSITORY=f"file://{home}")
    cell["train"]["source"] = filled_in(
        cell["train"].source, MAX_STEPS=3, MORE_FLAGS=" ".join(TINY)
    )
    cell["sample"]["source"] = filled_in(
        cell["sample"].source, PROMPT='kya "aap" $HOME गए', NEW_TOKENS=8
    )
    at = [c.id for c in book.cells].index("setup")
    again = cell["setup"].copy()
    empty["id"], empty["metadata"], again["id"] = "empty", {"tags": ["raises-exception"]}, "again"
    book.cells[at:at + 1] = [empty, cell["setup"], again]
    work = tmp_path / "work"
    work.mkdir()
    nbclient.NotebookClient(
        book, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    ).execute()
    [refusal] = empty["outputs"]
    assert "Stopped: fill in REPOSITORY" in "".join(
        refusal["traceback"]
    ) and "Traceback" not in "".join(refusal["traceback"])
    output = {c.id: json.dumps(c.get("outputs", []), ensure_ascii=False) for c in book.cells}
    assert (
        "image/png" in output["follow"]
        and "stage 6" in output["follow"]
        and "ready in" in output["again"]
    )
    assert (
        "kya" in output["sample"]
        and "$HOME गए" in output["sample"]
        and "verdict: not reached" in output["evaluate"]
    )
    assert "aria_checkpoint.zip" in output["download"] and not (work / "Aria/Aria").exists()
    shutil.unpack_archive(work / "Aria/aria_checkpoint.zip", tmp_path / "away")
    assert (tmp_path / "away/report.html").exists()
    assert not sample.main(
        [
            str(tmp_path / "away/step_000003"), "--prompt", "mai", "--max_new_tokens", "4",
            "--threads", "1",
        ]
    )


@pytest.mark.parametrize(
    "words, told",
    [
        (["--check_run", "nothing"], "nothing"),
        (["--check_run", "a", "--ckpt", "b"], "only one"),
        ([], "--ckpt is missing"),
    ],
)
def test_slips_of_check_run(tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        evaluate.main(words)
