"""Bad numbers are contained: loss scaling, spikes and rollbacks, the cause of a step that is not
finite, a torn log.

    python -m pytest tests/test_guard.py
"""
import contextlib
import errno
import itertools
import json
import math
import re
import shutil

import pytest
import torch
from test_train import HARD, call, fresh, poison, weights
from tiny import TINIER, tiny_model
from torch import nn

import masking
from common import machine
from config import TrainArgs
from conftest import log
from training import logs, optim, recovery

# ---- loss scaling, on CPU tensors ----------------------------------------------------------------

def scaled(seed=0):
    torch.manual_seed(seed)
    net = nn.Linear(3, 2, bias=False)
    net.norm = nn.Parameter(torch.ones(2))
    optimizer = optim.make_optimizer(net, TrainArgs(lr=1e-2))
    return net, optimizer, optim.LossScaler(optimizer, torch.device("cpu"), on=True)


def backward(net, scaler, factor=1.0):
    loss = (net(torch.ones(4, 3)) * net.norm).square().mean() * factor ** 0.5 * factor ** 0.5
    scaler.scale(loss).backward()
    scaler.unscale()
    return float(loss.detach()), float(optim.clip_grad_norm(net, 0.0))


def test_unscaled_gradients_are_those_without_scaling():
    net, _, scaler = scaled()
    _, norm = backward(net, scaler)
    got = [p.grad.clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = None
    (net(torch.ones(4, 3)) * net.norm).square().mean().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(got, net.parameters(), strict=True)), (
        "a power of two changes no bit"
    )
    assert norm > 0 and not scaler.update(1.0, norm) and scaler.overflows == 0


def test_an_overflow_halves_the_scale_and_is_counted_apart():
    net, optimizer, scaler = scaled()
    start = scaler.state()["scale"]
    loss, norm = backward(net, scaler, 1e35)                       # finite, but not times the scale
    assert math.isfinite(loss) and not math.isfinite(norm)
    assert scaler.update(loss, norm) and (scaler.state()["scale"], scaler.overflows) == (
        start / 2,
        1,
    )
    optimizer.zero_grad()
    factor = 3.3e38 / (loss / 1e35)  # a finite loss, whose gradient has no room at any scale
    while scaler.state()["scale"] > 1:
        assert scaler.update(*backward(net, scaler, factor))
        optimizer.zero_grad()
    assert not scaler.update(*backward(net, scaler, factor)), "no scale mends this: a bad number"


def test_the_scale_grows_again_and_survives_a_resume():
    net, optimizer, scaler = scaled()
    scaler.update(*backward(net, scaler, 1e35))
    optimizer.zero_grad()
    for _ in range(1500):
        scaler.update(*backward(net, scaler))
        optimizer.zero_grad()
    state = json.loads(json.dumps(scaler.state()))                 # as in state.json
    other_net, other_optimizer, other = scaled()
    other.load(state)
    assert other.state() == scaler.state() and state["_growth_tracker"] == 1500
    for s, n, o in ((scaler, net, optimizer), (other, other_net, other_optimizer)):
        for _ in range(500):
            s.update(*backward(n, s))
            o.zero_grad()
        assert s.state()["scale"] == 2 * state["scale"] and s.overflows == 1


def test_off_it_changes_nothing_and_stores_nothing():
    net, optimizer, _ = scaled()
    off = optim.LossScaler(optimizer, torch.device("cpu"), on=False)
    loss = net(torch.ones(1, 3)).sum()
    assert off.scale(loss) is loss and off.state() is None
    off.unscale()
    assert not off.update(1.0, math.inf) and off.overflows == 0
    off.load(None)


def test_the_run_survives_overflows_and_stores_the_scale(text, tmp_path, monkeypatch):
    """The whole loop in float16, which a CPU can do although no command asks it to: the first scale
    is far too large.
    """
    class Large(optim.LossScaler):
        def __init__(self, optimizer, device, on):
            super().__init__(optimizer, device, on)
            self.scaler._init_scale = 2.0 ** 30
    monkeypatch.setattr(machine, "pick_precision", lambda *_: (torch.float16, "fp16"))
    monkeypatch.setattr(optim, "LossScaler", Large)
    a, b = tmp_path / "a", tmp_path / "b"
    words = (
        *HARD, "--max_steps", 40, "--save_interval", 30, "--eval_interval", 0, "--log_interval", 1,
    )
    assert fresh(text, a, *words) == 0
    overflows = [line["overflows"] for line in log(a)]
    assert overflows[-1] > 5, "more than NON_FINITE_LIMIT overflows in a row must not end the run"
    assert {line["skipped"] for line in log(a)} == {0} and overflows[-1] == len(log(a, "warn"))
    shutil.copytree(a / "step_000030", b / "step_000030")
    assert call("--resume", b, "--threads", 1, "--no_show_samples") == 0
    assert weights(a / "step_000040") == weights(b / "step_000040")
    ends = [json.loads((run / "step_000040/state.json").read_text())["scaler"] for run in (a, b)]
    assert (
        ends[0] == ends[1] and ends[0]["overflows"] == overflows[-1] and ends[0]["scale"] < 2.0**30
    )


# ---- precision -----------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "asked, has_bf16, want",
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float16),
        ("bf16", False, torch.float16),
        ("fp16", True, torch.float16),
    ],
)
def test_amp_dtype_on_a_gpu(monkeypatch, asked, has_bf16, want):
    """No GPU here: what it answers is set, also that torch says yes where bf16 is only emulated (a
    T4).
    """
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: has_bf16 or including_emulation,
    )
    dtype, why = machine.pick_precision("auto", asked, torch.device("cuda"))
    assert (
        dtype is want
        and ("scaling" in why) == (want is torch.float16)
        and ("no bf16" in why) == (not has_bf16)
    )


# ---- spikes --------------------------------------------------------------------------------------

def test_a_spike_is_far_above_the_median_of_the_window():
    watch = recovery.SpikeWatch(3)
    assert not any(watch.spike(9.0**n, 64) for n in range(recovery.ENOUGH)), (
        "too few losses to know what is usual"
    )
    watch.losses.clear()
    assert (
        not any(watch.spike(1.0 + n % 3, 64) for n in range(200))
        and len(watch.losses[64]) == recovery.WINDOW
    )
    assert watch.spike(5.9, 64) is None and watch.spike(6.1, 64) == 2.0
    assert not any(watch.spike(9.0, 128) for _ in range(60)), (
        "whole rows may cost more than blocks: a rule is judged by itself"
    )
    other = recovery.SpikeWatch(3)
    other.load(json.loads(json.dumps(watch.state())))
    assert other.losses == watch.losses and other.spike(6.2, 64) == watch.spike(6.2, 64)
    assert not any(recovery.SpikeWatch(0).spike(x, 64) for x in [1.0] * 60 + [1e9])


def spike(monkeypatch, at, times):
    """Raise the loss of step `at` (from 1), the first `times` times that it is taken; each step has
    2 forwards.
    """
    taken, real, corrupt = [], masking.denoising_loss, masking.corrupt

    def drawn(args, seed, step, *more):
        taken.append(step + 1) if torch.is_grad_enabled() else None
        return corrupt(args, seed, step, *more)

    def raised(*args, **kwargs):
        out = real(*args, **kwargs)
        now = (
            torch.is_grad_enabled()
            and args[0].training
            and taken[-1] == at
            and taken.count(at) <= times
        )
        return out._replace(loss=out.loss * 50) if now else out
    monkeypatch.setattr(masking, "corrupt", drawn)
    monkeypatch.setattr(masking, "denoising_loss", raised)
    return taken


WATCHED = (
    *HARD, "--max_steps", 24, "--save_interval", 8, "--eval_interval", 6, "--log_interval", 1,
    "--spike_factor", 6, "--train_block_sizes", 8,
)


def test_a_spike_is_logged(text, tmp_path, monkeypatch, capsys):
    spike(monkeypatch, 19, 1)
    assert fresh(text, tmp_path / "run", *WATCHED) == 0
    assert [line["step"] for line in log(tmp_path / "run", "warn")] == [19] and not log(
        tmp_path / "run", "rollback"
    )
    assert "times the median" in capsys.readouterr().err


def test_a_rollback_goes_on_from_the_checkpoint_with_other_text(text, tmp_path, monkeypatch):
    """Steps 17.. are repeated from step 16's checkpoint, exactly as a run that had seen those
    windows next.
    """
    run, check = tmp_path / "run", tmp_path / "check"
    taken = spike(monkeypatch, 19, 1)
    assert fresh(text, run, *WATCHED, "--spike_rollback") == 0
    assert taken == [*range(1, 20), *range(17, 25)]
    [event] = log(run, "rollback")
    assert (event["step"], event["to"], event["position"]) == (19, 16, 19 * 8)
    monkeypatch.undo()
    shutil.copytree(run / "step_000016", check / "step_000016")
    reposition(check / "step_000016", 19 * 8)
    assert call("--resume", check, "--threads", 1, "--no_show_samples") == 0
    assert weights(check / "step_000024") == weights(run / "step_000024")
    state = json.loads((run / "step_000024/state.json").read_text())
    assert (state["rollbacks"], state["position"]) == (1, 27 * 8)


def reposition(folder, position):
    import checkpoint
    from common.files import to_json
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_bytes(to_json({**state, "position": position}))
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"]["state.json"] = {"size": (folder / "state.json").stat().st_size,
                                       "sha256": checkpoint.file_sha256(folder / "state.json")}
    (folder / "MANIFEST.json").write_bytes(to_json(checkpoint.seal(manifest)))


def test_at_most_three_rollbacks_then_it_goes_on(text, tmp_path, monkeypatch):
    taken = spike(monkeypatch, 18, 99)
    assert fresh(text, tmp_path / "run", *WATCHED, "--spike_rollback") == 0
    assert (
        taken.count(18) == 4
        and len(log(tmp_path / "run", "rollback")) == 3
        and log(tmp_path / "run")[-1]["step"] == 24
    )


def test_a_spike_before_the_first_checkpoint_is_only_logged(text, tmp_path, monkeypatch):
    spike(monkeypatch, 14, 1)
    assert fresh(text, tmp_path / "run", *WATCHED, "--save_interval", 20, "--spike_rollback") == 0
    assert len(log(tmp_path / "run", "warn")) == 1 and not log(tmp_path / "run", "rollback")


# ---- the cause -----------------------------------------------------------------------------------

@pytest.fixture
def net():
    return tiny_model("primary", 60, shape=TINIER, d_ff=32).train()


def cause(net, autocast=contextlib.nullcontext, loss=math.nan):
    rows = torch.randint(4, 60, (2, 16), generator=torch.Generator().manual_seed(1))
    return recovery.likely_cause(net, rows, 8, autocast, loss, math.inf, range(40, 80), 1e-3)


def test_the_likely_cause(net):
    assert cause(net).startswith("the data") and "windows 40 to 79" in cause(net)
    assert cause(net, loss=2.5).startswith("the gradient") and "--detect_anomaly" in cause(
        net, loss=2.5
    )
    before = [p.clone() for p in net.parameters()]
    with torch.no_grad():
        net.exits.final_norm.weight.fill_(3e38)
        net.head.weight.mul_(1e3)
    assert cause(net).startswith("the learning rate: held-out") and "--lr 5.0e-04" in cause(net)
    with torch.no_grad():
        for p, old in zip(net.parameters(), before, strict=True):
            p.copy_(old)
        net.layers[0].in_proj.weight.mul_(1e6)  # sums above 65,504, which float16 cannot hold

    def half():
        return torch.autocast("cpu", torch.float16)

    assert cause(net, half).startswith("overflow in half precision") and not cause(net).startswith(
        "overflow"
    )
    with torch.no_grad():
        next(net.parameters())[0] = math.inf
    assert cause(net).startswith("the learning rate: the weight") and net.training


def test_a_rate_that_ruins_the_weights_ends_with_that_cause(text, tmp_path, capsys):
    """Nothing injected: weights that are not finite are never saved, and the reason is right.

    Whatever the masks: the first step brings the weights to 1e30. Either the next one is not
    finite, for weights of that size, or it brings them to infinity, as decay multiplies them by
    5e28.
    """
    run = tmp_path / "run"
    assert (
        fresh(
            text,
            run,
            "--max_steps",
            30,
            "--lr",
            1e30,
            "--optimizer",
            "lion",
            "--warmup_steps",
            0,
            "--save_interval",
            3,
            # a third failed save in a row would end it before its fifth bad step
            "--eval_interval",
            1,
        )
        == 1
    )
    error = capsys.readouterr().err
    assert "likely cause: the learning rate" in error and "Traceback" not in error, error[-800:]
    import checkpoint

    assert all(
        checkpoint.load(folder, parts=("model", "optimizer")) for folder in run.glob("step_*")
    ), "saved, but not finite"


def ruin(monkeypatch, at):
    """The update of step `at` really ruins the weights, once: finite they stay, but no text has a
    finite loss any more.
    """
    real, steps = optim.make_optimizer, []

    def made(model, args):
        optimizer = real(model, args)
        step = optimizer.step

        def stepped():
            step()
            steps.append(1)
            if len(steps) == at:
                with torch.no_grad():
                    for p in model.parameters():
                        p.mul_(1e30)
        optimizer.step = stepped
        return optimizer
    monkeypatch.setattr(optim, "make_optimizer", made)


@pytest.mark.parametrize(
    "words",
    [
        ("--save_interval", 1, "--keep_last", 1),
        ("--save_interval", 2, "--keep_last", 1),
        ("--save_interval", 1),
        ("--save_interval", 0, "--save_minutes", 1e-9),
    ],
    ids=str,
)
def test_the_advice_after_numbers_that_are_none_can_be_followed(
    text, tmp_path, monkeypatch, capsys, words
):
    """Ruined by step 6 and saved between the bad steps: the last good checkpoint is there, and the
    printed words go on.
    """
    import checkpoint
    run = tmp_path / "run"
    ruin(monkeypatch, 6)
    assert fresh(text, run, "--max_steps", 12, "--eval_interval", 0, *words) == 1
    error = capsys.readouterr().err
    good = 4 if words[:2] == ("--save_interval", 2) else 5
    assert (
        checkpoint.read_pointer(run, "latest")[0] == good
        and max(checkpoint.list_steps(run)) == good
    )
    [advice] = re.findall(r"resume with (--lr \S+)", error)
    assert (
        call(
            "--resume", run, *advice.split(), "--max_steps", 12, "--threads", 1, "--no_show_samples"
        )
        == 0
    )
    assert log(run, "train")[-1]["step"] == 12 and all(line["loss"] for line in log(run)[-6:])


def test_without_a_sound_checkpoint_the_advice_is_a_new_start(text, tmp_path, monkeypatch, capsys):
    ruin(monkeypatch, 1)
    assert (
        fresh(text, tmp_path / "run", "--max_steps", 12, "--eval_interval", 0, "--save_interval", 1)
        == 1
    )
    assert (
        "start again with --lr" in (error := capsys.readouterr().err) and "resume with" not in error
    )
    assert not list((tmp_path / "run").glob("step_*"))


def test_a_run_that_dies_between_saves_keeps_its_last_finite_step(text, tmp_path, monkeypatch):
    """The weights are sound, the text is not: nothing of the steps before it is lost."""
    poison(monkeypatch, {4, 5, 6, 7, 8}, "loss")
    assert fresh(text, tmp_path / "run", "--max_steps", 20, "--eval_interval", 0) == 1
    saved = json.loads((tmp_path / "run/step_000003/state.json").read_text())
    assert (saved["position"], saved["skipped"]) == (3 * 8, 0) and (
        tmp_path / "run/latest"
    ).read_text().startswith("step_000003")


def test_a_resume_knows_the_spikes_of_before(text, tmp_path, monkeypatch):
    """Its first steps are judged by the losses of the run so far, of which one process alone has
    too few.
    """
    run = tmp_path / "run"
    assert fresh(text, run, *WATCHED, "--max_steps", 16) == 0
    spike(monkeypatch, 18, 1)
    assert call("--resume", run, "--max_steps", 20, "--threads", 1, "--no_show_samples") == 0
    assert [line["step"] for line in log(run, "warn")] == [18]


def test_five_bad_steps_name_their_windows(text, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {3, 4, 5, 6, 7}, "loss")
    assert fresh(text, tmp_path / "run", "--max_steps", 20, "--eval_interval", 0) == 1
    assert (
        "likely cause: the data" in (error := capsys.readouterr().err)
        and "windows 16 to 55" in error
    )
    assert "likely cause" in log(tmp_path / "run", "warn")[-1]["message"]


def test_detect_anomaly_stops_at_the_operation(text, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {2}, "loss")
    assert (
        fresh(text, tmp_path / "run", "--max_steps", 4, "--eval_interval", 0, "--detect_anomaly")
        == 1
    )
    error = capsys.readouterr().err
    assert "step 2: Function 'MulBackward0' returned nan" in error and "--detect_anomaly" in error
    assert not torch.is_anomaly_enabled()


# ---- the log -------------------------------------------------------------------------------------

def test_the_log_has_whole_lines_only(tmp_path, monkeypatch, capsys):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"event": "a"}\n{"event": "tor')
    log_file = logs.JsonLines(path)
    log_file.write("b", loss=math.nan, nested={"c": [1.5, math.inf]}, text="हिन्दी")
    real, turn = log_file.file, itertools.count()

    class Full:
        """A disk that takes half of a line, then nothing, then everything: the real file
        underneath.
        """
        name = str(path)

        def __getattr__(self, name):
            return getattr(real, name)

        def write(self, line):
            number = next(turn)
            if number == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real.write(line[:len(line) // 2] if number == 0 else line)
    log_file.file = Full()
    for event in ("lost", "lost", "kept"):
        log_file.write(event)
    log_file.close()
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        {"event": "a"},
        {"event": "b", "loss": None, "nested": {"c": [1.5, None]}, "text": "हिन्दी"},
        {"event": "kept"},
    ]
    assert capsys.readouterr().err.count("lines are lost") == 1
