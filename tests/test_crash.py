"""tests/stress/crash.py in its short form: real SIGKILLs, SIGINT and SIGTERM, a full disk; and what
retention may delete.

    python -m pytest tests/test_crash.py
"""
import json
import random
import subprocess
import sys

import pytest
import torch

import checkpoint as ck
from common import files
from common.console import UserError
from conftest import ROOT


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and asks for a small file system")
def test_no_kill_changes_the_result():
    words = "--kills 12 --cases 2 --every 70 --exhaustive 1 --stops 3 --real 0".split()
    command = [sys.executable, "tests/stress/crash.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (
        result["random"]["kills"] >= 12
        and 2 * result["random"]["in_save"] >= result["random"]["kills"]
    )
    assert result["every"][0]["points"] == 3 and result["every"][0]["of"] > 150, (
        "the points of a save were not met"
    )
    assert (
        result["stops"]["plans"] == 3
        and result["stops"]["slowest_s"] < 60
        and result["failures"] == []
    )


def put(run, step, best, keep_last):
    w = torch.full((4,), float(step))
    ck.save(
        run,
        step,
        model_state={"w": w},
        optimizer_state={"m": w},
        state={},
        config={},
        tokenizer_bytes=b"t",
        best=best,
        keep_last=keep_last,
        keep_full=1,
    )


def good_steps(run):
    def is_good(folder):
        try:
            return ck.verify(folder)
        except UserError:
            return False
    return {step for step, folder in ck.list_steps(run).items() if is_good(folder)}


@pytest.mark.parametrize("seed", range(12))
def test_retention_never_deletes_the_only_good_one(tmp_path, monkeypatch, seed):
    """Saves, rewinds, damage, and a disk that fills up inside a save: something whole is left, and
    `best` is never deleted.
    """
    rng, step, room = random.Random(seed), 0, 0
    monkeypatch.setattr(ck.os, "fsync", lambda fd: None)
    real = files.write_file

    def write_file(path, data):
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(28, "No space left on device", str(path))
        real(path, data)
    monkeypatch.setattr(ck, "write_file", write_file)
    monkeypatch.setattr(files, "write_file", write_file)
    for _ in range(25):
        good, best = good_steps(tmp_path), ck.read_pointer(tmp_path, "best")[0]
        if len(good) > 1 and rng.random() < 0.3:                       # damage, but never to all
            file = tmp_path / ck.step_name(hurt := rng.choice(sorted(good))) / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"x")
            good.discard(hurt)
        step = rng.choice(sorted(good)) if good and rng.random() < 0.2 else step + rng.randint(1, 3)
        room, saved = rng.randrange(10) if rng.random() < 0.4 else 99, True
        try:
            put(tmp_path, step, rng.random() < 0.3, rng.randint(1, 3))
        except OSError:
            saved = False
        left, now = good_steps(tmp_path), ck.read_pointer(tmp_path, "best")[0]
        assert step in left if saved else left or not good, "nothing is left to resume from"
        assert not left or ck.load(tmp_path).step in left
        assert now == best or now == step, (
            "best has moved to another step than the one that was saved"
        )
        assert now is None or now in ck.list_steps(tmp_path), "the best one was deleted"
        assert now not in good or now in left
