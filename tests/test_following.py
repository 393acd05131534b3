"""Following a run: what --instrument measures, --sample_every and --live rich, and that none of
them changes a bit of the training.

    python -m pytest tests/test_following.py
"""
import io
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from test_train import HARD, call, fresh, weights

import lora
from conftest import log
from layers import Linear, unit_rms
from tiny import half_masked, tiny_model
from training import instrument

STEPS = 6
# what is measured -> the words for it
ASKED = {
    "off": ("--instrument", "off"),
    "basic": ("--analysis_every", 3),
    "medium": ("--instrument", "medium", "--analysis_every", 2),
    "full": (
        "--instrument", "full", "--analysis_every", 2, "--sample_every", 4, "--sample_prompts",
        "mai kal", "", "--save_interval", 4,
    ),
}
FIGURES = {
    "off": set(), "basic": {"gnorm"}, "medium": {"gnorm", "entropy", "slots"},
    "full": {"gnorm", "entropy", "slots", "rank"},
}


@pytest.fixture(scope="module", params=["primary", "backup"])
def runs(request, text, tmp_path_factory):
    """One run for each level, with all else that has a state -> model, {level: folder}."""
    folder = tmp_path_factory.mktemp(request.param)
    words = ("--model", request.param, *HARD, "--max_steps", STEPS, "--save_interval", 0)
    words += ("--eval_interval", 0)
    for level, asked in ASKED.items():
        assert fresh(text, folder / level, *words, *asked) == 0
    return request.param, {level: folder / level for level in ASKED}


def test_a_run_ends_with_the_same_bits_at_every_level(runs):
    _, folders = runs
    first, *others = (weights(folder / f"step_{STEPS:06}") for folder in folders.values())
    assert len(first) == 3 and all(other == first for other in others)


def test_each_level_measures_more(runs):
    model, folders = runs
    for level, folder in folders.items():
        found = log(folder, "analysis")
        every = 3 if level == "basic" else 2
        steps = [] if level == "off" else list(range(every, STEPS + 1, every))
        assert [event["step"] for event in found] == steps
        wanted = FIGURES[level] - ({"slots"} if model == "backup" else set())
        for event in found:
            assert event.keys() - {"event", "step", "instrument", "seconds"} == wanted
        assert (folder / "analysis.npz").exists() == (level == "full")


def test_the_parts_of_the_gradient_are_the_whole_of_it(runs):
    _, folders = runs
    whole = {event["step"]: event["gnorm"] for event in log(folders["full"])}
    for event in log(folders["full"], "analysis"):
        assert event["gnorm"].keys() == {"head", "layers.0", "layers.1", "exits"}
        norm = math.hypot(*event["gnorm"].values())
        assert norm == pytest.approx(whole[event["step"]], rel=1e-5)


def test_analysis_npz_holds_the_log(runs):
    _, folders = runs
    events = log(folders["full"], "analysis")
    with np.load(folders["full"] / "analysis.npz", allow_pickle=False) as table:
        assert table["step"].tolist() == [event["step"] for event in events]
        assert table["gnorm.layers.1"].tolist() == [
            event["gnorm"]["layers.1"] for event in events
        ]
        ranks = [event["rank"]["layers.0"]["query"] for event in events]
        assert table["rank.layers.0.query"].tolist() == ranks
        assert table["entropy.layers.0.most"].shape == (3,)


def test_samples_come_at_their_steps_and_always_with_the_same_seed(runs, tmp_path, capsys):
    """At step 0, every 4, at the end; a resume repeats none that it has, and writes the same."""
    _, folders = runs
    prompts = ["mai kal", ""]
    said = log(folders["full"], "sample")
    assert [(e["step"], e["prompt"]) for e in said] == [(s, p) for s in (0, 4, 6) for p in prompts]
    assert len({e["text"] for e in said if e["prompt"] == ""}) > 1, "the text never changes"

    run = tmp_path / "run"
    shutil.copytree(folders["full"], run)
    assert call("--resume", run / "step_000004", "--threads", 1, "--no_show_samples") == 0
    again = log(run, "sample")
    assert again[-2:] == said[-2:] and len(again) == len(said) + 2
    shown = capsys.readouterr().err
    assert shown.count("sample 6/6 | mai kal ▸ ") == 1 and "sample 4/6" not in shown


# ---- what is measured is what the model does -----------------------------------------------------

@pytest.mark.parametrize("options", [
    dict(), dict(attn="gqa", kv_heads=1, null_attn=True, learned_temp=True),
    dict(attn="decoupled", sem_dim=16, geo_dim=16, attn_dim=16), dict(tie_qk=True),
], ids=str)
def test_attention_shares_are_those_of_the_kernel(options):
    """Shares times values are what the attention gives."""
    net = tiny_model("backup", away=0.3, **options)
    row, _ = half_masked(20, batch=1)
    ids, _, turns, *_ = net.rows_of_step(row, None, None, None, True)
    x = net.head.embed(ids)
    layer = net.layers[0]
    share = instrument.attention_shares(layer, x, turns)
    attn = layer.attn
    q, k, v = attn.project(layer.attn_norm(x), turns)
    values = attn.behind(None, k, v)[1][0]
    values = values.repeat_interleave(len(q[0]) // len(values), dim=0)
    answer = torch.einsum("rhc,hcf->hrf", share, values)
    torch.testing.assert_close(answer, attn.read_text(q, k, v)[0], rtol=1e-4, atol=1e-5)


def test_slot_shares_are_those_of_the_memory():
    """Shares times the slots' values are what each token reads."""
    net = tiny_model("primary", away=0.3)
    row, _ = half_masked(20, batch=1)
    ids, _, rows = net.rows_of_step(row, None, None, None, True)
    x = net.head.embed(ids)
    layer = net.layers[0]
    share = instrument.slot_shares(layer, x, rows)                                # (T, H, M)
    h = layer.norm(x)
    h, _ = layer.convolve(h, rows, h.new_zeros(1, layer.conv.reach + 1, h.shape[-1]))
    q, v, s = (part[None] for part in layer.project(h)[2:])
    answer, _ = layer.read_causal(q, v, s)
    num = torch.zeros(1, *share.shape[1:], v.shape[-1] // layer.H)
    for i in range(20):
        num = num * layer.decay_factor(1) + layer.write(v[:, i:i + 1], s[:, i:i + 1])
        read = torch.einsum("hm,hme->he", share[i], unit_rms(num)[0])
        torch.testing.assert_close(read.flatten(), answer[0, i], rtol=1e-3, atol=1e-4)


def test_entropy_and_rank_of_known_cases():
    assert instrument.entropy(torch.full((8,), 1 / 8)) == pytest.approx(math.log(8))
    assert instrument.entropy(torch.tensor([1.0, 0.0])) == 0
    assert instrument.effective_rank(torch.eye(7)) == pytest.approx(7, rel=1e-5)
    assert instrument.effective_rank(torch.ones(5, 9)) == pytest.approx(1, rel=1e-3)
    assert math.isnan(instrument.effective_rank(torch.full((2, 2), math.nan)))


def test_rank_of_an_adapted_matrix():
    """What an adapter adds counts: a matrix of zeros with an adapter of rank 2."""
    frozen = Linear(8, 8)
    torch.nn.init.zeros_(frozen.weight)
    adapted = lora.AdaptedLinear(frozen, 2)
    torch.nn.init.orthogonal_(adapted.lora_a)
    torch.nn.init.orthogonal_(adapted.lora_b)
    rank = instrument.effective_rank(instrument.matrix_of(adapted).detach())
    assert rank == pytest.approx(2, rel=1e-3)


# ---- usage errors ------------------------------------------------------------------------------

def test_what_cannot_be_followed_is_said_at_once(text, tmp_path, capsys):
    for words, told in (
        (("--sample_every", 1, "--sample_prompts", "mai kal " * 20), "mai kal mai kal"),
        (("--objective", "gaussian", "--instrument", "full", "--analysis_every", 1), "basic"),
        (("--fsdp", "--instrument", "medium", "--analysis_every", 1), "basic"),
    ):
        assert fresh(text, tmp_path / "run", "--exit_loss_weight", 0, *words) == 2
        assert told in capsys.readouterr().err and not (tmp_path / "run/train.jsonl").exists()


def test_what_does_nothing_is_said(text, tmp_path, capsys):
    words = ("--max_steps", 1, "--eval_interval", 0)
    idle = ("--instrument", "full", "--sample_prompts", "a")
    assert fresh(text, tmp_path / "run", *words, *idle) == 0
    told = capsys.readouterr().err
    assert "--instrument does nothing here: it needs --analysis_every" in told
    assert "--sample_prompts does nothing here: it needs --sample_every" in told


def test_the_other_objective_is_followed_too(text, tmp_path):
    words = ("--objective", "gaussian", "--exit_loss_weight", 0, "--eval_interval", 0)
    words += ("--max_steps", 2)
    asked = ("--sample_every", 2, "--sample_prompts", "mai", "--analysis_every", 1)
    assert fresh(text, tmp_path / "run", *words, *asked) == 0
    assert [event["step"] for event in log(tmp_path / "run", "sample")] == [0, 2]
    found = log(tmp_path / "run", "analysis")[-1]["gnorm"]
    assert {"head", "layers.0", "layers.1", "exits"} <= found.keys()


# ---- the picture of --live rich ------------------------------------------------------------------

class Terminal(io.StringIO):
    """Keeps what a program wrote to a terminal."""
    encoding = "utf-8"

    def isatty(self):
        return True


def test_the_picture_shows_the_run_and_changes_nothing(runs, text, tmp_path, monkeypatch):
    pytest.importorskip("rich")
    model, folders = runs
    if model == "backup":
        return                          # one model is enough
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    run = tmp_path / "run"
    words = ("--model", model, *HARD, "--max_steps", STEPS, "--save_interval", 0)
    assert fresh(text, run, *words, "--eval_interval", 3, "--live", "rich") == 0
    assert sys.stderr is screen, "the terminal was not given back"
    shown = screen.getvalue()
    assert weights(run / "step_000006") == weights(folders["off"] / "step_000006")
    last = shown[shown.rindex("╭"):]
    assert str(run)[:20] in last and f"step {STEPS} of {STEPS}, 100%" in last
    assert f"{log(run)[-1]['loss']:.4f}" in last and f"steps 1 to {STEPS}" in last
    assert f"{log(run, 'eval')[-1]['val_nelbo']:.4f}" in last, "the last evaluation is missing"
    assert shown.count("step 6/6 | loss") == 1 and "\x1b[?25h" in shown


def test_without_a_terminal_or_the_package(text, tmp_path, monkeypatch, capsys):
    """No terminal: one notice, plain lines. No package: exit code 3 before anything is loaded."""
    words = ("--max_steps", 1, "--eval_interval", 0, "--live", "rich")
    find = "training.logs.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None)
    assert fresh(text, tmp_path / "none", *words) == 3
    told = capsys.readouterr().err
    assert "pip install rich" in told and not (tmp_path / "none").exists()
    monkeypatch.setattr(find, lambda name: name)
    assert fresh(text, tmp_path / "run", *words) == 0
    told = capsys.readouterr().err
    assert told.count("--live rich needs a terminal") == 1 and "step 1/1 | loss" in told


def test_a_curve_of_dots():
    pytest.importorskip("rich")
    from training import live
    points = []
    for step in range(1, 9001):
        points = live.with_point(points, step, 10 - step / 1000)
    assert len(points) <= live.MOST and points[-1] == (9000, pytest.approx(1, abs=0.01))
    lines, low, high = live.curve(points, 30, 5)
    assert [len(line) for line in lines] == [30] * 5
    assert lines[0][0] != chr(live.EMPTY) == lines[4][0], "it begins at the top"
    assert lines[4][29] != chr(live.EMPTY) == lines[0][29], "it ends at the bottom"
    assert 9.7 < high < 10 and 1 <= low < 1.3
    points = live.with_point(points, 9001, math.nan)
    assert points[-1][0] == 9000, "a gap"
    assert live.with_point(points, 50, 3.0)[-1] == (50, 3.0), "taken back by a rollback"
    assert live.curve([(4, 2.5)], 10, 3)[1:] == (2.5, 2.5)
