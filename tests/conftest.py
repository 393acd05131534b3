"""Shared by all tests: the repository on the path, no network, one small prepared corpus and one trained run per session."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")     # tiny models: on a busy machine two threads mostly wait for each other
os.environ["ARIA_TENSORBOARD"] = "off"             # automatic where it is installed: tests would fill the repository's logs/
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:1"  # nobody listens there: child processes must not reach for the hub either
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any connection but a local socket pair is a bug: nothing here may reach for a hub."""
    def refuse(self, address):
        raise AssertionError(f"a test tried to connect to {address}")
    monkeypatch.setattr(socket.socket, "connect", refuse)


def aria(command, *args, cwd, timeout=240, env=None, check=None):
    """Run `python -m command args` in a folder as a user would -> CompletedProcess with text output."""
    words = [sys.executable, "-m", *command.split(), *map(str, args)]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=timeout,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})})
    if check is not None:
        assert done.returncode == check, f"exit {done.returncode}, wanted {check}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """A folder with data/processed and data/tokenizer made by the real prepare command from the starter corpus."""
    folder = tmp_path_factory.mktemp("aria")
    aria("prepare", "--source", "builtin", "--max_chars", 300_000, "--tokenizer_vocab", 800, cwd=folder, check=0)
    return folder


TINY = ("--d_model", 32, "--n_layers", 2, "--n_heads", 2, "--d_ff", 64, "--memory_slots", 4, "--seq_len", 32, "--batch_size", 4,
        "--grad_accum", 2, "--train_block_sizes", "T,8", "--block_size", 8, "--eval_batches", 2, "--lr", 3e-3, "--threads", 1)


@pytest.fixture(scope="session")
def trained(corpus_dir):
    """The same folder with one tiny trained run of each model, under the names of the user's documents."""
    for model, name in (("primary", "eco_hybrid_hi"), ("backup", "diffusion_hi")):
        aria("train", "--model", model, *TINY, "--max_steps", 12, "--save_interval", 5, "--eval_interval", 6, "--log_interval", 2,
             "--no_show_samples", cwd=corpus_dir, check=0)
        assert (corpus_dir / "checkpoints" / name / "latest").exists()
    return corpus_dir
