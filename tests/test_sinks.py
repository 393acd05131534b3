"""TensorBoard and Weights & Biases, the real packages: fed from the log's events, and dead ones
never stop or change a training.

    python -m pytest tests/test_sinks.py
"""
import html
import json
import socket
import threading
import time

import pytest
from test_train import HARD, call, fresh, weights

import config
from common.console import UserError
from conftest import aria, log
from training import logs as sinks

CONNECT = socket.socket.connect         # before the tests refuse it
QUICKLY = ("--threads", 1, "--no_show_samples")

# ---- a sink may do what it likes -----------------------------------------------------------------

class Kept:
    def __init__(self):
        self.items = []

    def write(self, event, values):
        self.items.append((event, values))

    def close(self):
        self.items.append("closed")


class Breaks(Kept):
    """Raises at its third event, or at the end."""

    def __init__(self, error, at=3):
        super().__init__()
        self.error, self.at = error, at

    def write(self, event, values):
        super().write(event, values)
        if len(self.items) == self.at:
            raise self.error

    def close(self):
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("a\nb"), SystemExit(1)], ids=repr
)
@pytest.mark.parametrize("at", [3, None])
def test_a_sink_that_raises_is_named_once_and_dropped(error, at, capsys):
    kept, lines, broken = Kept(), Kept(), Breaks(error, at)
    lines.write = lambda event, **values: lines.items.append((event, values))
    events = sinks.Events(
        lines, [sinks.Sink("Broken", lambda: broken), sinks.Sink("Whole", lambda: kept)]
    )
    for i in range(50):
        events.write("train", step=i)
    events.close()
    told = capsys.readouterr().err
    assert told.count("warning: Broken: ") == 1 == told.count("\n") and type(error).__name__ in told
    assert (
        kept.items == [*(("train", {"step": i}) for i in range(50)), "closed"]
        and len(lines.items) == 51
    )
    assert len(broken.items) == (at or 50)


def test_a_sink_that_hangs_costs_no_time(capsys):
    free = threading.Event()
    sink = sinks.Sink("Stuck", free.wait, room=10)
    started = time.perf_counter()
    for i in range(1000):
        sink.put(("train", {"step": i}))
    assert time.perf_counter() - started < 1
    sink.finish(5)  # it is dead already: nobody waits for it
    slow = sinks.Sink("Slow", free.wait)
    slow.finish(0.05)
    assert time.perf_counter() - started < 3
    told = capsys.readouterr().err
    assert told.count("Stuck: ") == 1 and told.count("Slow: not done after 0 s") == 1
    free.set()


def test_numbers_of_an_event():
    assert sinks.numbers(
        "eval", dict(step=3, best=True, text="x", none=None, val=1.5, by_block={"T": 2, "8": 3.0})
    ) == {"eval/val": 1.5, "eval/by_block/T": 2, "eval/by_block/8": 3.0}


# ---- the training does not notice ----------------------------------------------------------------

@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_samples_and_sinks_change_no_weight(text, tmp_path, kind, capsys):
    """With samples at every second step and TensorBoard, with neither, and with a TensorBoard that
    cannot write: equal bits.
    """
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("in the way")
    words = ("--model", kind, *HARD, "--max_steps", 9, "--eval_interval", 2, "--save_interval", 0)
    for name, more in (
        ("a", ()),
        ("b", ("--show_samples", "--tensorboard", "--log_dir", tmp_path / "logs")),
        ("c", ("--tensorboard", "--log_dir", tmp_path / "file")),
    ):
        assert fresh(text, tmp_path / name, *words, *more) == 0
    a, b, c = (weights(tmp_path / name / "step_000009") for name in "abc")
    assert a == b == c
    said = log(tmp_path / "b", "sample")
    assert [e["step"] for e in said] == [
        s for s in (0, 2, 4, 6, 8, 9) for _ in range(2)
    ] and not log(tmp_path / "a", "sample")
    assert capsys.readouterr().err.count("warning: TensorBoard: ") == 1
    assert said[-1]["prompt"] in (tmp_path / "b/report.html").read_text(encoding="utf-8")


def test_tensorboard_holds_the_log(text, tmp_path):
    """Read back by TensorBoard itself: every figure of every step; what a resume does again counts
    once.
    """
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, logs = tmp_path / "run", ("--tensorboard", "on", "--log_dir", tmp_path / "logs")
    words = ("--save_interval", 4, "--eval_interval", 3, "--show_samples", *logs)
    assert fresh(text, run, *words, "--max_steps", 6, "--lr_schedule", "constant") == 0
    assert (
        call(
            "--resume", run / "step_000004", "--max_steps", 8, "--threads", 1, *logs,
            "--show_samples",
        )
        == 0
    )
    lines = {e["step"]: e for e in log(run)}  # the later one of two
    found = loader.EventAccumulator(
        str(tmp_path / "logs/run"), size_guidance={"scalars": 0, "tensors": 0}
    )
    found.Reload()
    for key in ("loss", "mfu", "gnorm", "mask", "lr", "tok_s"):
        assert [(s.step, s.value) for s in found.Scalars(f"train/{key}")] == [
            (step, pytest.approx(e[key], rel=1e-6)) for step, e in sorted(lines.items())], key
    assert [s.step for s in found.Scalars("eval/val_nelbo")] == [
        0, 3, 6, 8,
    ] and "eval/by_block/T" in found.Tags()["scalars"]
    spoken = [t for t in found.Tags()["tensors"] if t.startswith("sample/")]
    assert len(spoken) == 2 and found.Tensors(spoken[0])[0].tensor_proto.string_val[
        0
    ].decode().startswith(spoken[0][7:])


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The real package in this process, without a network: its service answers on this machine."""
    wandb = pytest.importorskip("wandb")

    def local(sock, address):
        here = sock.family == getattr(socket, "AF_UNIX", None) or address[0] == "127.0.0.1"
        assert here, f"a test tried to connect to {address}"
        return CONNECT(sock, address)

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    wandb.teardown()


def test_wandb_offline_goes_on_with_its_run(text, offline, capsys):
    """Twice: figures and texts in its files on the disk, and the same run after a resume. Nothing
    is sent.
    """
    def run_id(step):
        return json.loads((offline / f"run/step_{step:06}/state.json").read_text())["wandb_id"]

    prompts = ("", "a/b: *c* ../d")
    following = ("--sample_every", 2, "--sample_prompts", *prompts)
    words = ("--wandb", "--wandb_tags", "a,b", "--max_steps", 3, "--eval_interval", 3, *following)
    assert fresh(text, offline / "run", *words) == 0
    assert call("--resume", offline / "run", "--max_steps", 4, "--wandb", *QUICKLY) == 0
    assert "Weights" not in capsys.readouterr().err, "a warning of the sink"
    files = sorted(offline.glob(f"logs/wandb/offline-run-*/run-{run_id(3)}.wandb"))
    assert len(files) == 2 and run_id(4) == run_id(3)
    for path in files:
        assert b"train/loss" in path.read_bytes()

    # the texts of the first run: steps 0, 2 and 3, each prompt
    pages = sorted(files[0].parent.glob("files/media/html/**/*.html"))
    shown = [page.read_text(encoding="utf-8") for page in pages]
    said = [event["text"] for event in log(offline / "run", "sample") if event["step"] < 4]
    assert len(shown) == len(said) == 6
    for answer in said:
        assert any(html.escape(answer) in page for page in shown)

    # not asked for: not fed
    assert call("--resume", offline / "run", "--max_steps", 5, *QUICKLY) == 0
    assert len(list(offline.glob("logs/wandb/offline-run-*"))) == 2 and run_id(5) == run_id(3)


# ---- usage errors --------------------------------------------------------------------------------

def test_what_is_missing_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    done = aria(
        "train",
        "--data_dir",
        "nothing",
        "--wandb",
        cwd=tmp_path,
        env={
            "HOME": str(tmp_path),
            "WANDB_CONFIG_DIR": str(tmp_path),
            "NETRC": str(tmp_path / "none"),
        },
        check=3,
    )
    assert (
        "wandb login" in done.stderr
        and "Traceback" not in done.stderr
        and not list(tmp_path.glob("checkpoints/*"))
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for words, package in ((["--wandb"], "wandb"), (["--tensorboard"], "tensorboard")):
        with pytest.raises(UserError, match=f"pip install {package}") as error:
            call_raw(words)
        assert error.value.code == 3


def call_raw(words):
    import cli
    import config
    sinks.check_sinks(cli.parse(config.TrainArgs, words, "train")[0])


def test_a_missing_tensorboard_is_said_once(tmp_path, monkeypatch, capsys):
    """By default it is used where it is installed; where it is not, one line says so and how to get
    it or silence this.
    """
    monkeypatch.delenv("ARIA_TENSORBOARD", raising=False)
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    asked = config.TrainArgs(log_dir=str(tmp_path))
    assert sinks.open_sinks(asked, tmp_path / "run", None, 0) == []
    told = capsys.readouterr().err
    assert (
        told.count("\n") == 1 and "pip install tensorboard" in told and "--tensorboard off" in told
    )
    assert sinks.open_sinks(config.TrainArgs(tensorboard="off"), tmp_path / "run", None, 0) == []
    assert not capsys.readouterr().err


def test_wandb_flags_need_wandb():
    with pytest.raises(UserError, match="--wandb_tags needs --wandb"):
        call_raw(["--wandb_tags", "a"])
