"""Shared by all tests: the repository on the path, no network, one small prepared corpus and one
trained run per session.
"""
import contextlib
import hashlib
import io
import json
import os
import pickle
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# tiny models: on a busy machine two threads mostly wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
# automatic where it is installed: tests would fill the repository's logs/
os.environ["ARIA_TENSORBOARD"] = "off"
# nobody listens there: child processes must not reach for the hub either
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:1"
sys.path.insert(0, str(ROOT))
# behind everything: they import common.py by its bare name
sys.path.append(str(ROOT / "benchmarks"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any connection but a local socket pair is a bug: nothing here may reach for a hub."""
    def refuse(self, address):
        raise AssertionError(f"a test tried to connect to {address}")
    monkeypatch.setattr(socket.socket, "connect", refuse)


def only_this_machine(monkeypatch):
    """What no_network is for tests with a server of their own."""
    connect = socket.socket.connect

    def local_only(self, address):
        assert address[0] == "127.0.0.1", f"a test tried to connect to {address}"
        return connect(self, address)
    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(autouse=True)
def aloud():
    """--quiet of one test silences no other one in the same process."""
    yield
    from common.console import be_quiet
    be_quiet(False)


def aria(command, *args, cwd, timeout=240, env=None, check=None):
    """Run `python -m command args` in a folder as a user would -> CompletedProcess with text
    output.
    """
    words = [sys.executable, "-m", *command.split(), *map(str, args)]
    done = subprocess.run(
        words,
        cwd=cwd,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
    )
    return checked(done, check)


def aria_here(command, *args, cwd, check=None):
    """The same in this process: where the test is not about processes, as each of them takes
    seconds of imports.
    """
    words = [command, *map(str, args)]
    out = io.StringIO()
    err = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_module(command, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code or 0
    done = subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
    return checked(done, check)


def checked(done, code):
    """A finished command, which ended with this code, if one is wanted."""
    if code is not None:
        assert done.returncode == code, (
            f"exit {done.returncode}, wanted {code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done


def call(main, *words):
    """An entry point in this process, as a command line would end -> exit code."""
    from common.console import UserError
    try:
        return main([str(word) for word in words]) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code


def log(run, event="train"):
    """The lines of one event of a run's train.jsonl."""
    lines = (run / "train.jsonl").read_text(encoding="utf-8").split("\n")
    return [line for line in map(json.loads, filter(None, lines)) if line["event"] == event]


def tree(folder):
    """{file: its hash}"""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def trap(canary):
    """A pickle that makes a folder of this name when it is loaded."""
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(canary),)
    return pickle.dumps(Trap())


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Token files of a few thousand tokens, so that a few dozen steps are more than an epoch. Tests
    read and copy them.
    """
    from harness import tiny_text
    folder = tiny_text(tmp_path_factory.mktemp("text"))
    before = tree(folder)
    yield folder
    assert tree(folder) == before, "a test wrote into the text that all share"


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """A folder with data/processed and data/tokenizer made by the real prepare command from the
    starter corpus.
    """
    folder = tmp_path_factory.mktemp("aria")
    aria_here(
        "prepare", "--source", "builtin", "--max_chars", 300_000, "--tokenizer_vocab", 800,
        cwd=folder, check=0,
    )
    return folder


def latest(path):
    """results.jsonl -> name: its last line."""
    return {
        line["name"]: line
        for line in map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
    }


TINY = (
    "--d_model", 32, "--n_layers", 2, "--n_heads", 2, "--d_ff", 64, "--memory_slots", 4,
    "--seq_len", 32, "--batch_size", 4, "--grad_accum", 2, "--train_block_sizes", "T,8",
    "--block_size", 8, "--eval_batches", 2, "--lr", 3e-3, "--threads", 1,
)
RUNS = {"primary": "checkpoints/eco_hybrid_hi", "backup": "checkpoints/diffusion_hi"}


@pytest.fixture(scope="session")
def trained(corpus_dir):
    """The same folder with one tiny trained run of each model, under the names of the user's
    documents.
    """
    for model, run in RUNS.items():
        aria_here(
            "train", "--model", model, *TINY, "--max_steps", 12, "--save_interval", 5,
            "--eval_interval", 6, "--log_interval", 2, "--no_show_samples", cwd=corpus_dir, check=0,
        )
        assert (corpus_dir / run / "latest").exists()
    return corpus_dir


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained
