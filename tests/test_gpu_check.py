"""benchmarks/gpu_check.py on a machine without a GPU: its parts run, one that fails or is too slow
stops no other, and its figures are those of the trainings.
"""
import json
import subprocess
import sys
import time

import gpu_check
import gpu_exact
import gpu_speed
import pytest

from common.files import ROOT
from conftest import RUNS, log
from model_config import ModelConfig, count_params


def checked(path, *words):
    """-> (exit code, the document that it printed, the one in the file, seconds)."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu_check.py", *words, "--out_json", path],
        capture_output=True,
        text=True,
    )
    printed = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, printed, json.loads(path.read_text()), time.monotonic() - started


def test_its_parts_are_there_and_fit_into_eight_minutes():
    assert set(gpu_check.PARTS) == {*gpu_exact.PARTS, *gpu_speed.PARTS}
    assert sum(gpu_check.PARTS.values()) <= gpu_check.SECONDS < 8 * 60 - 10


def test_one_part_that_fails_stops_no_other(tmp_path):
    """d512 has no text to train on, as the part `text` is left out; exact comes to its end."""
    words = ("--tiny", "--parts", "d512", "exact", "--folder", tmp_path / "here")
    code, printed, document, _ = checked(tmp_path / "found.json", *words)
    assert printed == document and code == 1 and not document["good"]
    parts = document["parts"]
    assert parts["d512"]["state"] == "failed" and "the part `text`" in parts["d512"]["error"]
    assert parts["d512"]["last_lines"]
    assert parts["decode"]["state"] == "skipped"
    assert not list((tmp_path / "here").iterdir()), "it left its folder behind"

    exact = parts["exact"]
    assert exact["state"] == "done" and exact["wrong"] == []
    models = exact["figures"]["models"]
    assert len(models) == 6 and {name.split()[0].strip(",") for name in models} == set(RUNS)
    for found in models.values():
        for step in found["loss"].values():
            assert step["float32"]["gradient_error"]["all"] > 0, "compared with itself"
            rough = step["bf16"]["gradient_error"]["all"]
            assert rough > 100 * step["float32"]["gradient_error"]["all"], "not in bf16"
        assert 0 < found["cache"]["largest"] < 1e-5
    for forms in exact["figures"]["kernels_of_a_1b_layer"].values():
        assert all(form["kernels"] and form["ms"] > 0 for form in forms.values())


def test_what_takes_too_long_is_cut_and_said(tmp_path):
    words = ("--tiny", "--parts", "exact", "--seconds", "2")
    code, document, _, seconds = checked(tmp_path / "found.json", *words)
    assert code == 1 and seconds < 20
    assert document["parts"]["exact"]["state"] == "cut"
    assert "ended after its" in document["parts"]["exact"]["error"]


def test_wrong_figures_are_found_at_every_depth():
    figures = {"a": {"right": True, "b": {"right": False}}, "c": {"d": [1], "right": False}}
    assert gpu_check.wrong_in(figures) == ["a/b", "c"]
    document = {"parts": {"x": {"state": "done", "wrong": []}}}
    assert gpu_check.is_good(document)
    document["parts"]["x"]["wrong"] = ["a/b"]
    assert not gpu_check.is_good(document)


@pytest.mark.parametrize("model", RUNS)
def test_the_speed_of_a_training_is_that_of_its_log(trained, model):
    run = trained / RUNS[model]
    found = gpu_speed.speeds(run)
    steps = log(run)
    assert found["last_step"] == 12 and found["tokens_per_step"] == 8 * 32
    assert found["params"] == log(run, "meta")[-1]["params_total"]
    later = [step for step in steps if step["step"] > gpu_speed.WARM]
    assert set(found["rules"]) <= {str(step["block"]) for step in steps}
    assert sum(rule["steps"] for rule in found["rules"].values()) <= len(steps)
    for key, ours in (("tok_s", "tok_s"), ("mfu", "mfu_of_measured_peak")):
        values = [step[key] for step in later]
        assert 0.9 * min(values) < found[ours] < 1.1 * max(values), key
    assert found["peak_mb"] == max(step["mem_mb"] for step in steps)


def test_the_large_models_have_a_billion_parameters():
    """Those of the table of 1B variants (tests/test_attention.py)."""
    widths = {name: gpu_speed.ONE_B[name] for name in ("d_model", "n_layers", "n_heads", "d_ff")}
    for attn, params in (("gqa", 1_094_973_440), ("decoupled", 933_492_736)):
        shape = ModelConfig(model="backup", vocab_size=50_257, attn=attn, **widths)
        assert count_params(shape) == params
