"""The trainer as a user sees it: exact resume, signals, damage control, logs. Tiny models; a
process only where it matters.
"""
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import TINIER, tiny_model

import checkpoint
import cli
import config
import conftest
import layers
import masking
import model as models
import model_config
import train
from common import machine
from common.files import read_json, sealed
from conftest import ROOT, aria, log, tree
from sampling import decode
from training import logs, optim, recovery, setup, step as training_step, validation

SHAPE = (
    "--d_model", 16, "--n_layers", 2, "--n_heads", 2, "--d_ff", 32, "--memory_slots", 2,
    "--seq_len", 16, "--batch_size", 4, "--grad_accum", 2, "--train_block_sizes", "T,8,4",
    "--ar_fade", 0, "--block_size", 4, "--lr", 3e-3, "--eval_batches", 1, "--threads", 1,
    "--no_amp", "--no_show_samples", "--live", "off",
)
# all that carries state, and every kind of step: whole rows, blocks beside left to right, that
# alone
HARD = (
    "--dropout", 0.1, "--ema", 0.9, "--masking_strategy", "span", "--keep_full", 9,
    "--train_block_sizes", "T,8,4,1", "--noisy_weight", 0.5, "--exit_loss_weight", 0.1,
)


def call(*words):
    return conftest.call(train.main, *words)


def fresh(text, run, *more):
    return call("--data_dir", text, "--output_dir", run, *SHAPE, *more)


def curve(run):
    """What must not depend on how often one looks or where one stopped: {step: figures}."""
    return {
        line["step"]: [line[key] for key in ("loss", "mask", "lr", "gnorm", "block", "first")]
        for line in log(run)
    }


def weights(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }


# ---- nobody listens ------------------------------------------------------------------------------

def test_a_closed_pipe_or_terminal_costs_no_work(text, tmp_path):
    """Whoever read the output has gone: the training goes on. SIGHUP, a closed terminal, is a stop
    that saves.
    """
    for name, number in (("pipe", None), ("hangup", signal.SIGHUP)):
        words = [
            "--data_dir", text, *SHAPE, "--max_steps", 5000 if number else 30, "--save_interval", 0,
            "--log_interval", 1, "--eval_interval", 0, "--output_dir", tmp_path / name,
        ]
        with subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *map(str, words)],
            stderr=subprocess.PIPE,
            # whatever a nohup around the tests has said
            stdout=subprocess.DEVNULL,
            cwd=tmp_path,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        ) as process:
            while b"step 1/" not in process.stderr.readline():
                assert process.poll() is None
            process.stderr.close()
            if number:
                process.send_signal(number)
            assert process.wait(timeout=60) == 0
        end = log(tmp_path / name, "end")[-1]
        assert (
            end["stopped"] == ("SIGHUP" if number else None)
            and (tmp_path / name / "latest").exists()
        )
        assert end["step"] == 30 or number and end["step"] < 5000


# ---- the best checkpoint -------------------------------------------------------------------------

def state(folder):
    return json.loads((folder / "state.json").read_text())


def test_best_is_the_best_of_what_was_both_scored_and_saved(text, tmp_path):
    """Scored every 4 steps, saved every 6: a save between two validations bears nobody's figure,
    step 0's least of all.
    """
    run = tmp_path / "run"
    assert (
        fresh(
            text, run, "--max_steps", 36, "--eval_interval", 4, "--save_interval", 6,
            "--keep_last", 0,
        )
        == 0
    )
    nats = {line["step"]: line["val_nelbo"] for line in log(run, "eval")}
    saves = {line["step"]: line["best"] for line in log(run, "save")}
    best = math.inf
    for step, is_best in saves.items():
        assert is_best == (nats.get(step, math.inf) < best), step
        best = min(best, nats[step]) if is_best else best
        assert state(run / f"step_{step:06d}")["kept"] == (None if best == math.inf else best)
    assert {step for step, is_best in saves.items() if is_best} <= {12, 24, 36} and best == min(
        nats[s] for s in (12, 24, 36)
    )
    assert (run / "best").read_text().startswith(f"step_{min((12, 24, 36), key=nats.get):06d}")


def test_another_validation_has_another_best(text, tmp_path):
    """Other held-out windows are another question: their first figure is the best so far, whatever
    the earlier ones said.
    """
    run = tmp_path / "run"
    words = ("--eval_interval", 5, "--save_interval", 5, "--keep_full", 9)
    assert fresh(text, run, *words, "--max_steps", 10, "--train_block_sizes", 4) == 0
    before = state(run / "step_000010")["best"]
    assert call("--resume", run, "--max_steps", 15, "--eval_batches", 2, "--no_show_samples") == 0
    now = {line["step"]: line["val_nelbo"] for line in log(run, "eval")}[15]
    after = state(run / "step_000015")
    assert after["best"] == after["kept"] == now and before is not None
    assert (run / "best").read_text().startswith("step_000015")
    assert call("--resume", run, "--max_steps", 16, "--lr", 1e-9, "--no_show_samples") == 0
    assert state(run / "step_000016")["best"] <= now, "the rate is no part of the question"


def test_text_of_unknown_size_is_scored_in_nats(text, tmp_path, capsys):
    shutil.copytree(text, tmp_path / "data")
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    (tmp_path / "data/meta.json").write_text(json.dumps(sealed(meta | {"val_bytes": 0})))
    assert fresh(tmp_path / "data", tmp_path / "run", "--max_steps", 1) == 0
    assert "bits/byte" not in re.findall("^eval .*", capsys.readouterr().err, re.M)[0]


def test_one_layer_has_no_early_exit(text, tmp_path):
    """There is none before the last: the run is saved, and says so in no file."""
    assert (
        fresh(text, tmp_path / "run", "--n_layers", 1, "--exit_loss_weight", 0.1, "--max_steps", 2)
        == 0
    )
    assert (tmp_path / "run/latest").exists()


def test_the_probe_for_memory_tries_every_block_rule(text, tmp_path, monkeypatch):
    """Those of the fade, too."""
    asked, real = [], training_step.mask_sample

    def noted(run, step, block, *rest, **more):
        asked.append(block)
        return real(run, step, block, *rest, **more)

    monkeypatch.setattr(training_step, "mask_sample", noted)
    words = ("--train_block_sizes", "T,8", "--ar_fade", 0.5, "--max_steps", 1, "--eval_interval", 0)
    assert fresh(text, tmp_path / "run", *words, "--auto_batch") == 0
    assert asked[:3] == [16, 8, 1]


# ---- block rules ---------------------------------------------------------------------------------

def test_left_to_right_alone_comes_first_and_fades_out(text, tmp_path, capsys):
    """A run's own log: at first every step is left to right alone, after half of them none is;
    before and after a resume.
    """
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = (
        "--max_steps", 60, "--eval_interval", 0, "--save_interval", 17, "--keep_full", 9,
        "--train_block_sizes", "T,8", "--ar_fade", 0.5,
    )
    assert fresh(text, whole, *words) == 0
    ones = [line["block"] == 1 for line in log(whole)]
    assert all(ones[:2]) and 11 <= sum(ones[:30]) <= 20 and not any(ones[30:]), (
        "evenly: half of 30, three deviations around"
    )
    assert all((line["mask"] == 1) == one for line, one in zip(log(whole), ones, strict=True))
    shutil.copytree(whole / "step_000017", cut / "step_000017")
    assert call("--resume", cut / "step_000017", "--no_show_samples") == 0
    assert curve(cut) == {step: value for step, value in curve(whole).items() if step > 17}
    said = "left to right alone, which until step 30 gives way to T,8"
    assert said in capsys.readouterr().err
    assert fresh(text, tmp_path / "off", "--max_steps", 4, "--eval_interval", 0) == 0
    assert "gives way" not in capsys.readouterr().err
    assert not any(line["block"] == 1 for line in log(tmp_path / "off"))


def test_which_block_rules_a_run_learns():
    """Left to right is learned beside every block that is no whole row, so it is among the rules
    without being drawn.
    """
    def args(sizes="T,32", **changes):
        return config.TrainArgs(max_steps=100, train_block_sizes=sizes, **changes)

    assert config.TrainArgs().block_rules == [512, 32, 16, 4, 1]
    assert args(ar_fade=0.0).block_rules == [512, 32, 1]
    assert args("T").block_rules == [512, 1] and args("T", ar_fade=0.0).block_rules == [512]
    assert args("1").block_rules == args(objective="ar").block_rules == [1]
    assert args(objective="ar").block_choices == [1]
    assert args(ar_fade=0.5).rule_shares == {512: 0.375, 32: 0.375, 1: 0.25}
    assert args("T,1", ar_fade=0.0).rule_shares == {512: 0.5, 1: 0.5}
    assert args(objective="ar").rule_shares == {1: pytest.approx(1)}
    assert [args(ar_fade=0.5).single_chance(step) for step in (0, 25, 50, 99)] == [1, 0.5, 0, 0]
    assert [masking.pick_blocks([512, 32], 512, 0, s) for s in range(50)] == [
        masking.pick_blocks([512, 32], 512, 0, s, 1e-9) for s in range(50)
    ], "the other draws stay what they were"


@pytest.mark.parametrize("early", [None, 1, 2])
@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_every_kind_of_step_gives_every_weight_a_gradient(kind, early):
    """DistributedDataParallel waits for all of them. With early exits both streams leave there."""
    net = tiny_model(kind, 50, shape=TINIER | {"n_layers": 3}, exits=bool(early))
    args = config.TrainArgs(seq_len=16)
    run = SimpleNamespace(args=args, rows=2, length=16, mine=slice(None))
    x0 = torch.randint(4, 50, (2, 16))
    for block, first in ((16, 16), (8, 8), (8, 3), (1, 1)):
        net.zero_grad(set_to_none=True)
        masks = training_step.mask_sample(run, 0, block, first)
        loss = masking.denoising_loss(net, x0, masks, "elbo", early=early, early_weight=0.1).loss
        loss.backward()
        assert all(p.grad is not None for p in net.parameters()), (block, first)


def test_what_a_step_asks_of_the_clean_stream():
    """Nothing beside whole rows, its share beside blocks, all of it left to right: then every token
    is asked for.
    """
    args = config.TrainArgs(seq_len=16, noisy_weight=3.0)
    run = SimpleNamespace(args=args, rows=4, length=16, mine=slice(1, 3))
    asked = {block: training_step.mask_sample(run, 0, block) for block in (16, 4, 1)}
    shares = {block: masks.clean_share for block, masks in asked.items()}
    assert shares == {16: 0, 4: 0.25, 1: 1}
    assert all(masks.mask.shape == (2, 16) for masks in asked.values())
    assert asked[1].mask.all() and asked[1].masked_count == 4 * 16


# ---- resume --------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["primary", "backup"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_equals_the_uninterrupted_run(text, tmp_path, kind, optimizer):
    """Bit for bit, from the middle of one epoch into the next, with intervals that do not divide.
    """
    a, b = tmp_path / "a", tmp_path / "b"
    assert (
        fresh(
            text, a, *HARD, "--model", kind, "--optimizer", optimizer, "--max_steps", 52,
            "--save_interval", 19, "--eval_interval", 7, "--log_interval", 3,
        )
        == 0
    )
    windows = read_json(text / "meta.json")["train_tokens"] // 16
    assert 19 * 8 < windows < 52 * 8 and windows % (19 * 8), (
        "the resume has to be mid-epoch, and the end in the next one"
    )
    shutil.copytree(a / "step_000019", b / "step_000019")
    assert (
        call(
            "--resume", b, "--eval_interval", 10, "--save_interval", 23, "--log_interval", 2,
            "--threads", 1, "--no_show_samples",
        )
        == 0
    )
    files = weights(a / "step_000052")
    assert set(files) == {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert files == weights(b / "step_000052")
    one, two = curve(a), curve(b)
    assert list(one) == list(range(1, 53)) and two == {step: one[step] for step in range(20, 53)}, (
        "a record per step"
    )
    ends = [read_json(run / "step_000052" / "state.json") for run in (a, b)]
    assert all(
        ends[0][key] == ends[1][key]
        for key in ("position", "tokens_seen", "skipped", "ema_updates")
    )


def test_a_checkpoint_without_the_optimizer(text, tmp_path, capsys):
    """--no_save_optim: no file of it, and a resume says that it begins with a fresh one."""
    run = tmp_path / "run"
    words = ("--max_steps", 2, "--no_save_optim")
    assert fresh(text, run, *HARD, *words) == 0
    saved = checkpoint.load(run, parts=checkpoint.PARTS)
    assert saved.optimizer is None and saved.model
    capsys.readouterr()
    assert call("--resume", run, "--max_steps", 4) == 0
    assert "the optimizer starts fresh" in "".join(capsys.readouterr())


@pytest.mark.parametrize("kind, optimizer", [("primary", "muon"), ("backup", "adamw")])
def test_n_and_n_steps_are_2n_steps_across_processes(text, tmp_path, kind, optimizer):
    """The command line's own way: --max_steps N, then --resume --max_steps 2N; the rate must not
    depend on the total.
    """
    more = (
        "--model", kind, "--optimizer", optimizer, "--lr_schedule", "constant", "--warmup_steps", 4,
        "--save_interval", 4, "--eval_interval", 5, *HARD,
    )
    assert fresh(text, tmp_path / "a", *more, "--max_steps", 18) == 0
    assert {line["block"] for line in log(tmp_path / "a")} == {16, 8, 4, 1}
    # this process; the rest is another's
    assert fresh(text, tmp_path / "b", *more, "--max_steps", 9) == 0
    done = aria(
        "train", "--output_dir", "b", "--resume", "--max_steps", 18, "--threads", 1, cwd=tmp_path,
        check=0,
    )
    assert "max_steps: 9 -> 18" in done.stderr
    assert weights(tmp_path / "a/step_000018") == weights(tmp_path / "b/step_000018")
    one, two = curve(tmp_path / "a"), curve(tmp_path / "b")
    assert one == two and len(one) == 18


def test_sigterm_saves_and_the_resume_changes_nothing(text, tmp_path, capsys):
    """Also: while it runs, a second trainer is refused and touches nothing."""
    a, b = tmp_path / "a", tmp_path / "my b"
    words = [
        "--data_dir", text, *SHAPE, "--max_steps", 120, "--eval_interval", 0, "--save_interval", 0,
        "--log_interval", 1,
    ]
    assert call(*words, "--output_dir", a) == 0
    command = [sys.executable, str(ROOT / "train.py"), *map(str, words), "--output_dir", str(b)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, encoding="utf-8", cwd=tmp_path
    ) as process:
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and process.poll() is None:
                with contextlib.suppress(OSError, json.JSONDecodeError):
                    if len(log(b)) >= 5:
                        break
                time.sleep(0.01)
            process.send_signal(signal.SIGSTOP)  # hold it, so that the second trainer meets it
            capsys.readouterr()
            assert call(*words, "--output_dir", b) == 2
            assert f"process {process.pid} trains in" in capsys.readouterr().err
            assert len(log(b)) >= 5 and not list(b.glob("previous_*"))
        finally:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "stopped by SIGTERM" in errors, errors[-2000:]
    stopped = read_json(b / (b / "latest").read_text().split()[0] / "state.json")["step"]
    assert 5 <= stopped < 120
    hint = re.search(r"to go on: python -m train (.*)$", errors, re.M)[1]
    assert call(*shlex.split(hint), "--threads", 1) == 0
    assert weights(a / "step_000120") == weights(b / "step_000120")
    assert curve(a) == curve(b)


@pytest.fixture(scope="module")
def many_parts(text, tmp_path_factory):
    """A run whose steps and evaluations have many parts, and the words that start it."""
    run = tmp_path_factory.mktemp("many") / "run"
    words = (
        "--batch_size", 1, "--grad_accum", 8, "--eval_batches", 5, "--max_steps", 6,
        "--eval_interval", 3, "--save_interval", 2, *HARD,
    )
    assert fresh(text, run, *words) == 0
    return run, words


@pytest.mark.parametrize(
    "place, number, at",
    [
        ("forward", 5 * 4 + 8 * 2 + 5, 2),  # step 3, fifth of its eight forwards
        # step 4, in the middle of a backward pass; step 3 was evaluated
        ("backward", 8 * 2 * 3 + 7, 3),
        ("forward", 5 * 4 + 8 * 3 + 7, 3),  # the evaluation of step 3, by four block rules
        ("forward", 2 * 5 * 4 + 8 * 6 + 7, 6),  # the evaluation of the last step
        ("forward", 5, 0),
    ],
)  # the evaluation before the first step: there is nothing to save
def test_a_signal_ends_a_step_or_an_evaluation_in_its_middle(
    many_parts, text, tmp_path, monkeypatch, place, number, at
):
    """What was given up leaves no trace: the resumed run has the weights, losses and evaluations of
    the uninterrupted one.
    """
    reference, words = many_parts
    module, name = {"forward": (masking, "denoising_loss"), "backward": (layers, "let_signals_in")}[
        place
    ]
    real, calls = getattr(module, name), []
    # asked at each save: its forwards are not counted here
    monkeypatch.setattr(recovery, "can_learn", lambda *_: True)

    def signalled(*args, **kwargs):
        calls.append(place)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)
    monkeypatch.setattr(module, name, signalled)
    run = tmp_path / "run"
    assert fresh(text, run, *words) == 0
    monkeypatch.undo()
    end = log(run, "end")[-1]
    assert (end["stopped"], end["step"], end["code"]) == ("SIGTERM", at, 0)
    assert len(calls) == number, "the work went on after the signal"
    assert len(log(run)) == at and (run / "latest").exists() == (at > 0)
    assert (
        call("--resume", run, "--threads", 1, "--no_show_samples")
        if at
        else fresh(text, run, *words)
    ) == 0
    assert weights(run / "step_000006") == weights(reference / "step_000006")
    assert curve(run) == curve(reference)
    evals = [{line["step"]: line["val_nelbo"] for line in log(r, "eval")} for r in (run, reference)]
    assert evals[0] == evals[1] and len(log(run, "eval")) == len(log(reference, "eval"))


def test_a_signal_during_the_samples_leaves_them_out(text, tmp_path, monkeypatch, capsys):
    """Those at an evaluation: the step is saved. Those at the end: the run is finished, which is
    what it says.
    """
    real, calls = decode.generate, []

    def signalled(model, *args):
        calls.append(model)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(model, *args)
    monkeypatch.setattr(validation, "generate", signalled)
    words = ("--max_steps", 4, "--eval_interval", 2, "--show_samples")
    number = 4                                                       # two at each evaluation
    assert fresh(text, tmp_path / "a", *words) == 0
    end = log(tmp_path / "a", "end")[-1]
    assert (end["stopped"], end["step"], len(calls), len(log(tmp_path / "a", "sample"))) == (
        "SIGTERM", 2, 4, 3,
    )
    number, before = 6 + 2, len(calls)
    calls.clear()
    capsys.readouterr()
    assert fresh(text, tmp_path / "b", *words) == 0 and before == 4
    assert log(tmp_path / "b", "end")[-1]["stopped"] is None and len(calls) == 8
    assert capsys.readouterr().out.count("---") == 1


def test_evaluating_more_often_leaves_the_loss_curve(text, tmp_path):
    runs = {every: tmp_path / str(every) for every in (2, 5, 0)}
    for every, run in runs.items():
        assert fresh(text, run, "--max_steps", 11, "--dropout", 0.1, "--eval_interval", every) == 0
    assert curve(runs[2]) == curve(runs[5]) == curve(runs[0])
    assert not log(runs[0], "eval") and [line["step"] for line in log(runs[5], "eval")] == [
        0, 5, 10, 11,
    ]
    assert log(runs[2], "eval")[-1]["val_nelbo"] == log(runs[5], "eval")[-1]["val_nelbo"], (
        "one model, two validation scores"
    )


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    assert fresh(text, run, "--max_steps", 4, "--save_interval", 2) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_resume_rules(run, capsys):
    before = tree(run)
    assert call("--resume", run, "--d_model", 32, "--max_steps", 6) == 2
    assert (
        "--d_model 32" in (error := capsys.readouterr().err)
        and "16" in error
        and "Traceback" not in error
    )
    assert tree(run).items() >= before.items()
    assert call("--resume", run, "--lr", 1e-3, "--max_steps", 6, "--threads", 1) == 0
    assert "lr: 0.003 -> 0.001" in capsys.readouterr().err
    assert (
        "lr: 0.003 -> 0.001" in str(log(run, "resume")[-1]["notes"]) and log(run)[-1]["step"] == 6
    )


def change_state(folder, **values):
    """Really saved, then changed and sealed again."""
    import checkpoint
    from common.files import to_json
    data = to_json(state(folder) | values)
    (folder / "state.json").write_bytes(data)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"]["state.json"] = {
        "size": len(data),
        "sha256": checkpoint.file_sha256(folder / "state.json"),
    }
    (folder / "MANIFEST.json").write_bytes(to_json(checkpoint.seal(manifest)))


def test_a_checkpoint_of_an_older_aria_is_refused_in_one_sentence(text, tmp_path, capsys):
    """Really saved, then sealed under the older format: every command that reads it says why it
    does not, and it stays as it is. A new training moves it aside.
    """
    import checkpoint
    import edge_benchmark
    import evaluate
    import sample
    from common.files import to_json
    run = tmp_path / "run"
    assert fresh(text, run, *HARD, "--max_steps", 2, "--save_interval", 1) == 0
    for folder in checkpoint.list_steps(run).values():
        manifest = read_json(folder / "MANIFEST.json") | {"format": "aria-checkpoint-1"}
        (folder / "MANIFEST.json").write_bytes(to_json(checkpoint.seal(manifest)))
    before = tree(run)
    capsys.readouterr()
    for main, words in (
        (sample.main, (run,)),
        (evaluate.main, ("--ckpt", run)),
        (evaluate.main, ("--check_run", run)),
        (edge_benchmark.main, (run,)),
        (train.main, ("--resume", run, "--max_steps", 4)),
        (train.main, ("--ckpt", run, "--data_dir", text, "--run_name", "fork", *SHAPE)),
    ):
        assert conftest.call(main, *words) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(error) == 1 and "step_000002 was trained by an older Aria" in error[0]
    assert tree(run) == before
    assert fresh(text, run, "--max_steps", 1, "--eval_interval", 0) == 0
    assert (run / "previous_1/step_000002").exists() and checkpoint.load(run).step == 1


def test_a_resume_compares_with_what_best_names(text, tmp_path):
    """The lowest figure of all may belong to a step that nobody saved: the next saved one need not
    be below that.
    """
    run = tmp_path / "run"
    assert fresh(text, run, "--max_steps", 2, "--eval_interval", 2) == 0
    change_state(run / "step_000002", best=0.001)
    assert call("--resume", run, "--max_steps", 4, "--threads", 1, "--no_show_samples") == 0
    assert state(run / "step_000004")["kept"] < state(run / "step_000002")["kept"], (
        "the test needs a better one"
    )
    assert (run / "best").read_text().startswith("step_000004")


def test_a_resume_from_an_earlier_step_keeps_the_later_ones(text, tmp_path, capsys):
    """The run goes on in its own folder; what it had reached before is a run of its own, best
    included.
    """
    import checkpoint
    run = tmp_path / "run"
    assert (
        fresh(
            text, run, "--max_steps", 9, "--eval_interval", 3, "--save_interval", 3,
            "--keep_full", 9,
        )
        == 0
    )
    assert (run / "best").read_text().startswith("step_000009")
    before = {name: tree(run / name) for name in ("step_000006", "step_000009")}
    capsys.readouterr()
    words = (
        "--lr", 10, "--lr_schedule", "constant", "--warmup_steps", 0, "--threads", 1,
        "--no_show_samples",
    )
    assert call("--resume", run / "step_000003", *words) == 0
    assert "later checkpoints (step_000006, step_000009) were moved to" in capsys.readouterr().err
    old = run / "previous_1"
    assert {name: tree(old / name) for name in before} == before
    assert [checkpoint.load(old / name).step for name in ("latest", "best")] == [9, 9]
    assert log(run, "eval")[-1]["val_nelbo"] > log(run, "eval")[1]["val_nelbo"], (
        "the test needs a worse run"
    )
    assert checkpoint.load(run / "best").step == 3 and checkpoint.load(run).step == 9, (
        "best of what is here"
    )
    assert call("--resume", run, "--max_steps", 10, "--threads", 1, "--no_show_samples") == 0
    assert not (run / "previous_2").exists()


def test_another_validation_text_has_another_best(text, tmp_path, capsys):
    """The figures of two texts do not compare, so the first one on the new text is the best."""
    data, run = Path(shutil.copytree(text, tmp_path / "data")), tmp_path / "run"
    words = ("--eval_interval", 3, "--threads", 1, "--no_show_samples")
    assert fresh(data, run, "--max_steps", 3, *words) == 0
    change_state(run / "step_000003", best=0.001, kept=0.001)
    assert call("--resume", run, "--max_steps", 6, *words) == 0
    assert (run / "best").read_text().startswith(
        "step_000003"
    ) and "validation text" not in capsys.readouterr().err
    tokens = (data / "val.bin").read_bytes()
    (data / "val.bin").write_bytes(tokens[2:] + tokens[:2])
    meta = json.loads((data / "meta.json").read_text())
    meta["val_sha256"] = hashlib.sha256((data / "val.bin").read_bytes()).hexdigest()
    (data / "meta.json").write_text(json.dumps(sealed(meta)))
    assert call("--resume", run, "--max_steps", 9, *words) == 0
    assert "the validation text is not the one of before" in capsys.readouterr().err
    assert (run / "best").read_text().startswith("step_000009")
    assert state(run / "step_000009")["kept"] == log(run, "eval")[-1]["val_nelbo"]


def test_a_rate_that_nobody_typed_stays(text, tmp_path, capsys):
    """--optimizer adamw, typed again, is no wish for another rate; and a rate that jumps is told
    with both figures.
    """
    run = tmp_path / "run"
    words = [word for word in SHAPE if word not in ("--lr", 3e-3)]
    schedule = ("--lr_schedule", "cosine", "--warmup_steps", 0, "--eval_interval", 0)
    assert (
        call(
            "--data_dir", text, "--output_dir", run, *words, "--optimizer", "adamw", "--lr", 5e-4,
            *schedule, "--max_steps", 4, "--save_interval", 2, "--keep_full", 9,
        )
        == 0
    )
    capsys.readouterr()
    once = ("--threads", 1, "--no_show_samples")
    assert call("--resume", run / "step_000002", "--optimizer", "adamw", *once) == 0
    assert (
        "lr:" not in (error := capsys.readouterr().err) and "the learning rate at step" not in error
    )
    rates = [line["lr"] for line in log(run)]
    assert rates[2:4] == rates[4:6]
    assert call("--resume", run, "--optimizer", "adamw", "--max_steps", 8, *once) == 0
    error = capsys.readouterr().err
    now = log(run)[-4]["lr"]
    assert (
        f"the learning rate at step 5 is {now:.2e}, where the run had {rates[3]:.2e} before"
        in error
        and now > 3 * rates[3]
    )
    assert (
        call("--resume", run, "--optimizer", "lion", "--reset_optimizer", "--max_steps", 9, *once)
        == 0
    )
    assert f"lr: 0.0005 -> {config.RATES['lion']}" in capsys.readouterr().err, (
        "another optimizer brings its own"
    )


@pytest.mark.parametrize("how", ["archive", "skip", "error"])
def test_a_folder_that_is_no_run_is_left_alone(text, tmp_path, monkeypatch, capsys, how):
    """A repository, text, the folder above running trainings: one sentence, and nothing moves."""
    (tmp_path / "mine/.git").mkdir(parents=True)
    (tmp_path / "mine/train.jsonl").write_text('{"text": "namaste"}\n')
    (tmp_path / "mine/step_000500").mkdir()
    (tmp_path / "mine/latest").write_text("step_000500\n")
    before = tree(tmp_path / "mine")
    assert fresh(text, tmp_path / "mine", "--max_steps", 1, "--if_exists", how) == 2
    assert "mine is no run folder" in (error := capsys.readouterr().err) and "--output_dir" in error
    assert tree(tmp_path / "mine") == before and (tmp_path / "mine/.git").exists()


def test_what_a_user_put_into_a_run_folder_stays_there(text, run):
    (run / "notes.txt").write_text("mine")
    assert fresh(text, run, "--max_steps", 1, "--eval_interval", 0) == 0
    assert (run / "notes.txt").read_text() == "mine" and (run / "previous_1/step_000004").exists()


def test_a_resume_never_takes_another_run(text, tmp_path, monkeypatch, capsys):
    """Of two runs `last.ckpt` means the newest; a name that no run has is refused with those that
    there are.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("day1", "day2"):
        assert fresh(text, Path("checkpoints") / name, "--max_steps", 2, "--eval_interval", 2) == 0
    before = tree(tmp_path / "checkpoints")
    once = ("--max_steps", 3, "--threads", 1, "--no_show_samples")
    for typed in ("best-base.ckpt", "best.ckpt", "step_000002.pt", "base.ckpt"):
        assert call("--resume", f"checkpoints/{typed}", *once) == 2
        assert (
            "checkpoints/day1/step_000002, checkpoints/day2/step_000002" in capsys.readouterr().err
        )
    assert tree(tmp_path / "checkpoints") == before
    assert call("--resume", "checkpoints/last.ckpt", *once) == 0
    assert (
        "checkpoint: checkpoints/last.ckpt -> checkpoints/day2/step_000002\n"
        in capsys.readouterr().err
    )
    assert (
        log(tmp_path / "checkpoints/day2")[-1]["step"] == 3
        and log(tmp_path / "checkpoints/day1")[-1]["step"] == 2
    )


def test_without_validation_any_text_is_long_enough(text, tmp_path):
    """--eval_interval 0 asks nothing of the held-out text, be it shorter than one window."""
    data = Path(shutil.copytree(text, tmp_path / "data"))
    (data / "val.bin").write_bytes((data / "val.bin").read_bytes()[:2 * 7])
    meta = json.loads((data / "meta.json").read_text())
    meta |= {
        "val_tokens": 7,
        "val_sha256": hashlib.sha256((data / "val.bin").read_bytes()).hexdigest(),
    }
    (data / "meta.json").write_text(json.dumps(sealed(meta)))
    assert fresh(data, tmp_path / "run", "--max_steps", 2, "--eval_interval", 0) == 0
    assert fresh(data, tmp_path / "other", "--max_steps", 2, "--eval_interval", 1) == 2


def test_a_resume_on_a_read_only_disk_is_one_sentence(run, monkeypatch, capsys):
    import builtins
    import errno
    real = open

    def read_only(path, mode="r", *more, **options):
        if str(path).endswith("LOCK"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, mode, *more, **options)
    monkeypatch.setattr(builtins, "open", read_only)
    assert call("--resume", run, "--max_steps", 6) == 2
    error = capsys.readouterr().err
    assert (
        "cannot write to the run folder" in error
        and "Read-only" in error
        and "Traceback" not in error
    )


def test_saves_that_fail_for_good_end_the_run_with_a_sentence(text, tmp_path, monkeypatch, capsys):
    import checkpoint

    def full(*args, **options):
        raise OSError(28, "No space left on device")
    assert fresh(text, tmp_path / "run", "--max_steps", 2, "--eval_interval", 0) == 0
    monkeypatch.setattr(checkpoint, "save", full)
    capsys.readouterr()
    assert (
        call(
            "--resume", tmp_path / "run", "--max_steps", 9, "--save_interval", 1,
            "--no_show_samples",
        )
        == 1
    )
    error = capsys.readouterr().err
    assert (
        "error: step 5 is not saved (3 saves failed in a row): the run stops; a resume goes on "
        "from step 2"
        in error
    )


def test_resume_at_the_end_has_nothing_to_do(run, capsys):
    before = tree(run / "step_000004")
    for steps in ((), ("--max_steps", 4), ("--max_steps", 3)):
        assert call("--resume", run, *steps) == 0
        assert re.search(r"nothing to do: step 4 of [43]\b", capsys.readouterr().err)
    assert tree(run / "step_000004") == before and log(run)[-1]["step"] == 4


def test_resume_latest_starts_fresh_when_nothing_is_there(text, tmp_path, capsys):
    words = ("--resume_latest", "--eval_interval", 0, "--max_steps")
    assert fresh(text, tmp_path / "run", *words, 2) == 0
    assert fresh(text, tmp_path / "run", *words, 3) == 0
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3] and len(
        log(tmp_path / "run", "resume")
    ) == 1
    assert call("--resume", "--output_dir", tmp_path / "none") == 2
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_a_used_folder(text, run, capsys):
    before = tree(run)
    one = ("--max_steps", 1, "--eval_interval", 0, "--if_exists")
    assert fresh(text, run, *one, "error") == 2 and "--resume" in capsys.readouterr().err
    assert fresh(text, run, *one, "skip") == 0 and tree(run) == before
    assert fresh(text, run, *one, "suffix") == 0 and tree(run) == before
    assert log(run.with_name("run_v2"))[-1]["step"] == 1
    assert fresh(text, run, *one, "archive") == 0
    before.pop("LOCK")
    assert tree(run / "previous_1") == before, "the earlier run was not kept whole"
    assert [line["step"] for line in log(run)] == [1] and "previous_1" in capsys.readouterr().err


def test_a_resume_returns_to_the_suffixed_folder(text, run):
    assert fresh(text, run, "--max_steps", 1, "--eval_interval", 0, "--if_exists", "suffix") == 0
    other = run.with_name("run_v2")
    before = tree(run)
    assert call("--resume", other, "--max_steps", 2, "--threads", 1) == 0
    assert log(other)[-1]["step"] == 2 and tree(run) == before


# ---- numbers that are none -----------------------------------------------------------------------

def poison(monkeypatch, steps, where):
    """Make loss or gradient of these steps (from 1) NaN; each step has 2 forwards."""
    calls, real = [], masking.denoising_loss

    def damaged(*args, **kwargs):
        out = real(*args, **kwargs)
        if torch.is_grad_enabled() and args[0].training:
            calls.append(1)
            if (len(calls) + 1) // 2 in steps:
                if where == "loss":
                    return out._replace(loss=out.loss * float("nan"))
                out.loss.register_hook(lambda grad: grad * float("inf"))
        return out
    monkeypatch.setattr(masking, "denoising_loss", damaged)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(text, tmp_path, monkeypatch, where):
    poison(monkeypatch, {3}, where)
    assert (
        fresh(
            text, tmp_path / "run", *HARD, "--max_steps", 4, "--save_interval", 1,
            "--eval_interval", 0,
        )
        == 0
    )
    assert sorted(p.name for p in (tmp_path / "run").glob("step_*")) == [
        "step_000001", "step_000002", "step_000004",
    ]
    before = state(tmp_path / "run/step_000002")["ema_updates"]
    assert state(tmp_path / "run/step_000004")["ema_updates"] == before + 1, (
        "the skipped step was averaged"
    )
    kept = weights(tmp_path / "run/step_000002")
    shutil.rmtree(tmp_path / "run")
    poison(monkeypatch, {3, 4}, where)
    assert (
        fresh(
            text, tmp_path / "run", *HARD, "--max_steps", 4, "--save_interval", 4,
            "--eval_interval", 0,
        )
        == 0
    )
    assert (tmp_path / "run/latest").read_text().startswith("step_000002"), (
        "the last finite step is saved under its number"
    )
    assert weights(tmp_path / "run/step_000002") == kept, (
        "the skipped steps changed weights, averages or moments"
    )
    monkeypatch.undo()
    assert (
        call("--resume", tmp_path / "run", "--threads", 1) == 0
        and state(tmp_path / "run/step_000004")["position"] == 32
    )
    shutil.rmtree(tmp_path / "run")
    poison(monkeypatch, {3}, where)
    assert (
        fresh(
            text, tmp_path / "run", *HARD, "--max_steps", 4, "--save_interval", 1,
            "--eval_interval", 0,
        )
        == 0
    )
    assert [line["skipped"] for line in log(tmp_path / "run")] == [0, 0, 1, 1]
    assert [line["step"] for line in log(tmp_path / "run", "warn")] == [3]


def test_five_such_steps_in_a_row_end_the_run(text, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {2, 4, 5, 6, 7, 8}, "loss")
    assert (
        fresh(text, tmp_path / "run", "--max_steps", 20, "--save_interval", 1, "--eval_interval", 0)
        == 1
    )
    error = capsys.readouterr().err
    assert "step 8" in error and "--lr" in error
    assert log(tmp_path / "run", "end")[-1]["code"] == 1 and log(tmp_path / "run")[-1]["step"] == 8
    assert log(tmp_path / "run")[-1]["loss"] is None, "JSON has no NaN"


# ---- compile -------------------------------------------------------------------------------------

def compiles():
    return shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(not compiles(), reason="no C++ compiler, which torch.compile needs on a CPU")
def test_compile_compiles_the_step_that_runs(text, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    words = (
        "--model", "backup", "--n_layers", 1, "--train_block_sizes", "T", "--max_steps", 3,
        "--eval_interval", 0,
    )
    assert fresh(text, tmp_path / "eager", *words) == 0
    counters.clear()
    calls, real = [], torch.compile

    def counted(function, **options):
        fast = real(function, **options)
        return lambda *args: calls.append(torch.is_grad_enabled()) or fast(*args)
    monkeypatch.setattr(torch, "compile", counted)
    assert fresh(text, tmp_path / "compiled", *words, "--compile") == 0
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert sum(calls) >= 1 + 3 * 2, (
        "the loop does not call what was compiled: 3 steps of 2 forwards"
    )
    for step, figures in curve(tmp_path / "eager").items():
        assert figures[0] == pytest.approx(curve(tmp_path / "compiled")[step][0], abs=1e-3)
    torch.compiler.reset()


@pytest.mark.parametrize("lengths", [(32,), (16, 20)])
@pytest.mark.parametrize("kind", ["backup", "primary"])
def test_nothing_is_compiled_in_mid_run(kind, lengths, monkeypatch, capsys):
    """The graphs before step 1 are those of every step, with first blocks of any length and early
    exits, whether the block divides the row or not, of every length of a schedule; depth adds none.
    """
    from torch._dynamo.utils import counters
    real = torch.compile  # graphs are counted, so nobody needs the C++ compiler
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic, mode: real(f, backend="eager", dynamic=dynamic)
    )
    args = config.TrainArgs(
        model=kind,
        d_model=16,
        n_layers=3,
        n_heads=2,
        d_ff=24,
        memory_slots=2,
        seq_len=lengths[0],
        seq_schedule=f"{lengths[-1]}@9",
        train_block_sizes="T,8,1",
        ar_fade=0.0,
        exit_loss_weight=0.1,
    )
    net = models.build_model(model_config.model_config(args, 50))
    torch.compiler.reset()
    counters.clear()
    setup.compile_step(net, args, [(2, length) for length in lengths], "cpu")
    assert "failed" not in capsys.readouterr().err
    graphs = counters["stats"]["unique_graphs"]
    short = [(8, first) for first in range(1, 9)]
    for length in lengths:
        assert len(setup.forms_of_a_step(args, length)) == 4, "T, two of 8, left to right"
        run = SimpleNamespace(args=args, rows=2, length=length, mine=slice(None))
        for step, (block, first) in enumerate([(length, length), (1, 1), *short]):
            masking.denoising_loss(
                net,
                torch.randint(4, 50, (2, length)),
                training_step.mask_sample(run, step, block, first),
                "elbo",
                early=masking.pick_exit(3, 0, step),
                early_weight=0.1,
            ).loss.backward()
    assert graphs == 4 * len(lengths)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    torch.compiler.reset()


def test_a_compiler_that_fails_is_named_and_training_goes_on(text, tmp_path, monkeypatch, capsys):
    def broken(function, **options):
        def fail(*args):
            raise RuntimeError("no toolchain on this machine")
        return fail
    monkeypatch.setattr(torch, "compile", broken)
    assert fresh(text, tmp_path / "run", "--max_steps", 2, "--eval_interval", 0, "--compile") == 0
    assert (
        "no toolchain on this machine" in capsys.readouterr().err
        and len(log(tmp_path / "run")) == 2
    )


# ---- what a run leaves ---------------------------------------------------------------------------

def test_console_and_log(text, tmp_path, capsys):
    run = tmp_path / "run"
    assert (
        fresh(
            text, run, "--max_steps", 25, "--log_interval", 10, "--save_interval", 10,
            "--eval_interval", 10,
        )
        == 0
    )
    error = capsys.readouterr().err
    line = (
        r"^step (\d+)/25 \| loss \d+\.\d{4} \| mask 0\.\d\d \| lr \d\.\de-\d\d"
        r" \| gnorm \d+\.\d\d \| tok/s \d+ \| ETA \d+:\d\d \| MFU \d+% \| \d+\.\d GB$"
    )
    assert re.findall(line, error, re.M) == ["1", "10", "20", "25"]
    assert not re.search(r"\bppl\b|perplexity", error)
    saved = re.findall(
        rf"^saved {re.escape(str(run))}/step_(\d+)(, the best so far)?$", error, re.M
    )
    assert [int(step) for step, _ in saved] == [10, 20, 25] and any(best for _, best in saved), (
        "each save, in one line"
    )
    keys = {
        "meta": "time version argv config params_total params_blocks torch device data "
                "planned_tokens",
        "train": "step loss loss_kind mask lr gnorm tok_s mfu seq_len global_batch tokens_seen "
                 "step_ms data_ms mem_mb "
        "skipped",
        "eval": "step val_nelbo val_ci val_bpb val_masked_mean best",
        "save": "step",
        "end": "step",
    }
    for event, names in keys.items():
        found = log(run, event)
        assert found and all(set(names.split()) <= set(entry) for entry in found), event
    assert [entry["step"] for entry in log(run)] == list(range(1, 26))
    assert [entry["step"] for entry in log(run, "eval")] == [0, 10, 20, 25]
    assert [entry["step"] for entry in log(run, "save")] == [10, 20, 25]
    assert all(
        0.05 < entry["mask"] < 0.95 and entry["tokens_seen"] == 128 * entry["step"]
        for entry in log(run)
    )
    best = min(log(run, "eval")[1:], key=lambda entry: entry["val_nelbo"])
    assert (run / "best").read_text().startswith(f"step_{best['step']:06d}")
    assert {"latest", "best", "summary.md", "report.html", "config.json"} <= {
        p.name for p in run.iterdir()
    }
    summary = (run / "summary.md").read_text(encoding="utf-8")
    assert "builtin" in summary and "python -m sample" in summary and "--resume" in summary
    bits = min(entry["val_bpb"] for entry in log(run, "eval"))
    assert f" nats/token, {bits:.4f} bits/byte\n" in summary


def test_quiet_leaves_only_warnings_and_the_files(text, tmp_path, capsys):
    words = ("--max_steps", 3, "--eval_interval", 0, "--spike_factor", 1e-6 + 1, "--live", "off")
    assert fresh(text, tmp_path / "loud", *words) == 0
    loud = capsys.readouterr().err
    assert fresh(text, tmp_path / "quiet", *words, "--quiet") == 0
    assert "step 1/3" in loud and "settings:" in loud and "# " in loud
    told = capsys.readouterr().err.splitlines()
    assert all(line.startswith(("notice", "warning")) for line in told), told
    assert (
        curve(tmp_path / "loud") == curve(tmp_path / "quiet")
        and (tmp_path / "quiet/summary.md").exists()
    )


@pytest.mark.parametrize(
    "seconds, told",
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (245, "4:05"),
        (7445, "2:04:05"),
        (86399, "23:59:59"),
        (86400, "1 d 0 h"),
        (644 * 3600 + 916, "26 d 20 h"),
    ],
)
def test_time_left_in_words(seconds, told):
    assert logs.duration(seconds) == told


@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_the_loss_falls(text, tmp_path, kind):
    assert (
        fresh(
            text, tmp_path / "run", "--model", kind, "--d_model", 32, "--d_ff", 64, "--lr", 1e-2,
            "--max_steps", 60, "--log_interval", 1, "--eval_interval", 60,
        )
        == 0
    )
    losses = [line["loss"] for line in log(tmp_path / "run")]
    assert sum(losses[-5:]) / 5 <= 0.9 * losses[0]
    first, last = (line["val_nelbo"] for line in log(tmp_path / "run", "eval"))
    assert last <= 0.9 * first, "held-out text did not get easier"


@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_one_batch_is_learned_by_heart(kind):
    args = config.TrainArgs(
        model=kind, d_model=32, n_layers=2, n_heads=2, d_ff=64, memory_slots=4, weight_decay=0.0
    )
    torch.manual_seed(0)
    net = models.build_model(model_config.model_config(args, vocab_size=60))
    optimizer = optim.make_optimizer(net, args)
    optimizer.set_lr(1e-2)
    x0 = torch.randint(4, 60, (2, 16))
    start = masking.bound(net, x0, 8)[1]
    for step in range(200):
        block, first = masking.pick_blocks([16, 8], 16, 0, step)
        masks = masking.corrupt(args, 0, step, 2, 16, block, first)
        masking.denoising_loss(net, x0, masks, "elbo").loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert masking.bound(net, x0, 8)[1] < 0.5 * start


# ---- what is said and refused before the first step ----------------------------------------------

@pytest.mark.parametrize(
    "words,said",
    [
        (("--d_model", 64000), ("cannot fit", "--d_model")),
        (("--d_model", 1_000_000), ("cannot fit",)),
        (("--n_layers", 10**12), ("cannot fit",)),
        (("--preset", "full"), ("full", "--device cpu")),
        (("--lr", 1e300), ("--lr", "at most")),
        (("--weight_decay", 1e99), ("at most",)),
        (("--max_steps", 10**30), ("below 2^63",)),
    ],
)
def test_what_no_machine_holds_is_refused_before_anything_is_built(
    words, said, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(models, "build_model", lambda cfg: pytest.fail("a model was built"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call("--data_dir", text, "--output_dir", tmp_path / "run", *words) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in said) and "Traceback" not in error, error
    assert not (tmp_path / "run/train.jsonl").exists()


def test_memory_comes_before_the_first_step_and_time_after_twenty(
    text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(machine, "thread_times", lambda: ([6.0, 5.0, 7.0], [1.0, 1.1, 0.9]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert (
        fresh(text, tmp_path / "run", "--max_steps", 25, "--eval_interval", 0, "--log_interval", 1)
        == 0
    )
    lines = capsys.readouterr().err.splitlines()

    def first(start):
        return next(i for i, line in enumerate(lines) if line.startswith(start))
    assert re.match(r"memory: \S+ GB for weights.* GB free", lines[first("memory: ")])
    assert (
        first("memory: ")
        < first("step 1/")
        < first("step 20/")
        < first("speed: ")
        < first("step 22/")
    )
    assert (
        "to go" in (speed := lines[first("speed: ")])
        and "6.0 times faster" in speed
        and "--threads 1" in speed
    )
    assert sum(line.startswith("notice") and "passes over this text" in line for line in lines) <= 1


@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_the_memory_for_activations_is_a_lower_bound_of_what_a_step_keeps(kind):
    """What autograd keeps of a forward in float32, less the weights, is never below the figure, nor
    eight times as much. Blocks of 4 take the most, left to right alone and whole rows half.
    """
    shape = dict(model=kind, d_model=32, n_layers=3, n_heads=2, d_ff=64, memory_slots=2)
    figures = {}
    for sizes in ("T", "4", "1"):
        args = config.TrainArgs(seq_len=64, train_block_sizes=sizes, ar_fade=0.0, **shape)
        cfg = model_config.model_config(args, vocab_size=20)
        net = models.build_model(cfg)
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        kept = {}

        def keep(tensor, kept=kept):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
            return tensor

        run = SimpleNamespace(args=args, rows=2, length=64, mine=slice(None))
        masks = training_step.mask_sample(run, 0, args.block_choices[0])
        x0 = torch.randint(4, 20, (2, 64))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = masking.denoising_loss(net, x0, masks, "elbo").loss
        found = sum(storage.nbytes() for at, storage in kept.items() if at not in weights)
        logits = 4 * 2 * 64 * cfg.rows
        figures[sizes] = recovery.memory_needed(cfg, args, 2)[1] - logits
        assert figures[sizes] < found < 8 * figures[sizes], sizes
        loss.backward()
    assert figures["4"] > 2.1 * figures["1"] and figures["T"] < 1.05 * figures["1"]


def test_threads_that_wait_are_told_from_threads_that_help():
    """Recorded on two cores, seconds of the same products with two threads and with one: alone,
    then beside two busy loops.
    """
    assert machine.waiting_threads([0.011, 0.011, 0.012], [0.021, 0.020, 0.020]) is None
    assert machine.waiting_threads([0.019, 0.02, 0.2], [0.02, 0.019, 0.02]) is None, (
        "one hiccup is no busy machine"
    )
    assert machine.waiting_threads([0.24, 0.31, 0.12], [0.04, 0.05, 0.04]) == pytest.approx(6)


def test_the_times_of_threads_are_taken_and_their_number_stays():
    before = torch.get_num_threads()
    many, one = machine.thread_times(rounds=2)
    assert torch.get_num_threads() == before and min(many + one) > 0


def test_far_too_many_passes_name_a_number_of_steps(text, tmp_path, capsys):
    tokens = json.loads((text / "meta.json").read_text())["train_tokens"]
    words = ("--max_steps", 100_000, "--print_config")
    with pytest.raises(SystemExit):
        fresh(text, tmp_path / "run", *words)
    capsys.readouterr()
    steps = 3 * setup.MANY_EPOCHS * tokens // (4 * 2 * 16)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(train, "NON_FINITE_LIMIT", 1)
        patch.setattr(optim, "clip_grad_norm", lambda *a: math.nan)                  # ends at once
        assert fresh(text, tmp_path / "run", "--max_steps", steps, "--eval_interval", 0) == 1
    advised = re.search(
        r"24 passes over this text are far too many: .*--max_steps (\d+)", capsys.readouterr().err
    )
    assert abs(int(advised[1]) - steps / 3) <= 1


@pytest.mark.parametrize(
    "words,sizes",
    [
        ((), (192, 16)),
        (("--max_steps", 7), (192, 16)),
        (("--preset", "none"), (512, 4)),
        (("--d_model", 64), (64, 4)),
        (("--data_dir", "elsewhere"), (512, 4)),
        (("--edge_profile", "laptop"), (320, 4)),
        (("--preset", "nano"), (64, 8)),
        (("--resume_latest",), (512, 4)),
    ],
)
def test_a_cpu_without_text_trains_the_starter_preset_unless_a_size_is_typed(
    words, sizes, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    args, origins = cli.parse(
        config.TrainArgs, [str(w) for w in ("--device", "cpu", *words)], "train", tier=train.advised
    )
    assert (args.d_model, args.batch_size) == sizes
    starter = cli.parse(config.TrainArgs, ["--preset", "starter"], "train")[0]
    assert (args.d_ff == starter.d_ff) == (sizes == (192, 16))
    (tmp_path / "data/processed").mkdir(parents=True)
    (tmp_path / "data/processed/meta.json").write_text("{}")
    assert train.advised({}) == {}, "there is prepared text"


def test_samples_of_ruined_weights_end_in_a_sentence(text, tmp_path, monkeypatch, capsys):
    """The weights give held-out text a finite loss, so they are saved, but no sample."""
    def ruined(*_args, **_more):
        raise FloatingPointError(
            "the denoiser returned NaN at forward 1; the checkpoint is damaged"
        )

    monkeypatch.setattr(validation, "generate", ruined)
    assert fresh(text, tmp_path / "run", "--max_steps", 2, "--show_samples", "--lr", 1e-3) == 1
    error = capsys.readouterr().err
    assert "--lr 0.001 is too high" in error and "damaged" not in error.split("step 2/2")[1]


def test_flags_that_do_nothing_are_named(text, tmp_path, capsys):
    words = (
        "--lr_schedule", "wsd", "--min_lr_ratio", 0.2, "--timesteps", 8, "--mean_span_length", 4,
    )
    assert fresh(text, tmp_path / "run", "--max_steps", 1, *words) == 0
    error = capsys.readouterr().err
    assert all(
        f"notice: --{name} does nothing here" in error
        for name in ("min_lr_ratio", "timesteps", "mean_span_length")
    )
    assert (
        fresh(
            text, tmp_path / "ar", "--max_steps", 1, "--model", "backup", "--objective", "ar",
            "--ar_fade", 0.5, "--noisy_weight", 2,
        )
        == 0
    )
    error = capsys.readouterr().err
    assert all(
        f"--{name} does nothing here" in error
        for name in ("ar_fade", "noisy_weight", "train_block_sizes", "memory_slots")
    )
    assert "--seq_len" not in error and "--min_lr_ratio" not in error
    for sizes, idle in (("T", True), ("1", True), ("T,1", True), ("T,4", False)):
        words = ["--train_block_sizes", sizes, "--noisy_weight", "2"]
        args, origins = cli.parse(config.TrainArgs, words, "train")
        assert any("--noisy_weight" in said for said in args.idle(origins)) == idle, sizes


# ---- what each rank and each evaluation really uses ----------------------------------------------

def test_validation_scores_the_averaged_weights(text, tmp_path):
    """Those of the checkpoint's ema file, not the raw ones beside them."""
    from safetensors.torch import load_file

    from evaluation import estimators
    from text.dataset import TokenData
    run = tmp_path / "run"
    assert (
        fresh(text, run, "--max_steps", 6, "--ema", 0.9, "--eval_interval", 6, "--save_interval", 6)
        == 0
    )
    folder, saved = run / "step_000006", json.loads((run / "config.json").read_text())
    held = TokenData(text, "val").val_windows(4, 16)
    scores = {}
    for part in ("model", "ema"):
        net = models.build_model(model_config.ModelConfig.from_dict(saved["model"]))
        net.load_state_dict(load_file(folder / f"{part}.safetensors"))
        found = estimators.held_out(net.eval(), held, [16, 8, 4, 1], 0, 4, 1)
        scores[part] = sum(r["nats"] for r in found.values()) / 4
    said = log(run, "eval")[-1]["val_nelbo"]
    assert said == pytest.approx(scores["ema"], abs=1e-5) and abs(said - scores["model"]) > 1e-3, (
        scores
    )


def test_each_rank_has_its_own_dropout(text, tmp_path, monkeypatch):
    from training import distributed
    seeds = {}
    real = torch.manual_seed
    for rank in (0, 1):
        ranks, taken = distributed.Ranks(), seeds.setdefault(rank, [])
        ranks.rank, ranks.share = rank, lambda rows: slice(0, rows)
        monkeypatch.setattr(
            distributed, "process_group", lambda args, ranks=ranks: contextlib.nullcontext(ranks)
        )
        monkeypatch.setattr(
            torch, "manual_seed", lambda seed, taken=taken: taken.append(seed) or real(seed)
        )
        assert (
            fresh(
                text, tmp_path / str(rank), "--max_steps", 3, "--eval_interval", 0, "--dropout", 0.1
            )
            == 0
        )
    of_steps = [taken[-3:] for taken in seeds.values()]
    assert len({*of_steps[0], *of_steps[1]}) == 6, of_steps


@pytest.mark.parametrize("broken", [False, True])
def test_compile_shows_how_far_it_is_and_names_its_cache(monkeypatch, capsys, broken):
    """Each form of a step gets a line; a compiler that fails is followed by the folder to delete,
    and an uncompiled step.
    """
    def compiled(function, **_):
        def step(*args):
            if broken:
                raise RuntimeError("file too short")
            return function(*args)
        return step
    monkeypatch.setattr(torch, "compile", compiled)
    net = tiny_model("backup", 50, shape=TINIER)
    args = config.TrainArgs(seq_len=16, train_block_sizes="T,4", ar_fade=0.0)
    setup.compile_step(net, args, [(2, 16)], torch.device("cpu"))
    said = capsys.readouterr().err
    assert (
        ("form 4 of 4" in said and "failed" not in said)
        if not broken
        else "file too short" in said and ": delete /" in said
    )
    assert ("forward" in net.layers[0].__dict__) != broken
