"""evaluate --lengths and --needle: figures by hand, a model that knows only what it has read, all
caches, and what is refused.
"""
import json
import math

import pytest
import torch
from tiny import nll_by_steps, tiny_model

import evaluate
import train
from attention import CACHES
from common.console import UserError
from conftest import RUNS, TINY, call
from evaluation import long_context
from evaluation.held_out import measured
from text.token_file import open_split
from text.tokenizer import Tokenizer

KEY = long_context.KEY
NEEDLES = long_context.NEEDLES


class Copier(torch.nn.Module):
    """Knows what followed the last two tokens earlier in its context, and nothing else; it reaches
    back over so many tokens. The protocol as far as long_context looks at it.
    """

    def __init__(self, reach):
        super().__init__()
        self.reach = reach
        self.device = torch.device("cpu")
        self.cfg = tiny_model("primary", 1000).cfg

    def new_cache(self, rows, length):
        return {"read": torch.zeros(rows, 0, dtype=torch.int64)}

    def step(self, x0, cache):
        start = cache["read"].shape[1]
        cache["read"] = read = torch.cat((cache["read"], x0), dim=1)
        guesses = torch.zeros(x0.shape, dtype=torch.int64)
        for row, ids in enumerate(read.tolist()):
            for at in range(x0.shape[1]):
                end = start + at
                for i in range(max(1, end - self.reach), end):
                    if ids[i - 1:i + 1] == ids[end - 1:end + 1]:
                        guesses[row, at] = ids[i + 1]
        return guesses[..., None].float()

    def logits(self, states):
        logits = torch.zeros(*states.shape[:-1], 1000)
        return logits.scatter_(-1, states.long(), 12.0)


def rows_of_their_own(count, length):
    """No pair of tokens comes twice, so that nothing but the needle can be copied."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(999, generator=generator)[:length] + 1
                        for _ in range(count)])


def test_a_needle_is_found_by_a_model_that_reaches_it(capsys):
    rows = rows_of_their_own(6, 64)
    for reach in (1000, 20):
        found = long_context.needles(Copier(reach), rows, [32, 64], 5, seed=3)
        assert len(found) == 2 * len(long_context.DEPTHS)
        for figures in found:
            # back to the end of the needle's key: its value, what follows it, the key again
            reached = figures["distance"] + 2 * KEY <= reach
            assert figures["guessed"] < 0.2
            assert (figures["recalled"] > 0.8) == reached, figures
            assert (figures["gain"] > 3) == reached
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 * (1 + len(found)) and "recalled" in shown[0]


def test_depth_and_distance():
    questions = long_context.Questions(rows_of_their_own(6, 64), 40, 0)
    assert questions.texts.shape == (NEEDLES, 40 - 3 * KEY)
    for depth in long_context.DEPTHS:
        texts, distance = questions.with_needle(depth)
        assert texts.shape == (NEEDLES, 40 - KEY), "with the question, the asked length"
        end = texts.shape[1] - distance
        assert torch.equal(texts[:, end - 2 * KEY:end - KEY], questions.keys)
        assert torch.equal(texts[:, end - KEY:end], questions.values)
        rest = torch.cat((texts[:, :end - 2 * KEY], texts[:, end:]), dim=1)
        assert torch.equal(rest, questions.texts)
    assert distance == 0 and end == texts.shape[1]


@pytest.mark.parametrize("kind", RUNS)
def test_costs_are_those_of_every_token_behind_all_before_it(kind, monkeypatch):
    """Read in pieces, several rows at a time, against token by token."""
    net = tiny_model(kind, away=0.1)
    rows = torch.randint(1, 40, (5, 30), generator=torch.Generator().manual_seed(1))
    wanted = nll_by_steps(net, rows)[:, 1:]
    for size in (7, 512):
        monkeypatch.setattr(long_context, "READ", size)
        found = long_context.costs(net, rows, 2)
        torch.testing.assert_close(found, wanted.double(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("stored", ["bf16", "int8"])
def test_a_smaller_cache_is_read_token_by_token(stored):
    """Each token sees all before it rounded, and the line says by how much it moves."""
    net = tiny_model("backup", away=0.1)
    rows = torch.randint(1, 40, (6, 24), generator=torch.Generator().manual_seed(1))
    exact = long_context.costs(net, rows, 4)
    net.cache_type = CACHES[stored]
    assert not long_context.is_exact(net)
    nats = long_context.costs(net, rows, 4)
    torch.testing.assert_close(nats, nll_by_steps(net, rows)[:, 1:].double(), rtol=1e-5, atol=1e-5)
    found = long_context.cost_of_storage(net, rows, nats, 4)
    moved = nats - exact
    assert found["nats"] == pytest.approx(float(moved.mean()), abs=1e-9) and moved.any()
    assert found["rms"] == pytest.approx(float(moved.square().mean().sqrt()))
    assert net.cache_type is CACHES[stored], "the model is as it was"


@pytest.mark.parametrize("kind", RUNS)
def test_both_commands_on_held_out_text(here, tmp_path, capsys, kind):
    """The parts by position add up to the whole text's nats and bytes; rows that begin anew cost
    what they cost by themselves.
    """
    path = tmp_path / "found.json"
    words = ("--lengths", 64, 32, 128, "--needle", "--batches", 2)
    assert call(evaluate.main, RUNS[kind], *words, "--out_json", path) == 0
    shown = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["trained_length"] == 32 and found["cache_dtype"] == "auto"
    assert [part["to"] for part in found["lengths"]] == [32, 64, 128]
    assert [part["from"] for part in found["lengths"]] == [1, 32, 64]
    assert found["rows"] == long_context.LEAST_ROWS
    assert sum(part["tokens"] for part in found["lengths"]) == 127 * found["rows"]
    assert ["gain_over_anew" in part for part in found["lengths"]] == [False, True, True]
    assert len(found["needle"]) == 3 * len(long_context.DEPTHS) and "cache" not in found
    assert shown.count("\n") == 1 + 3 + 1 + len(found["needle"])

    data = open_split("data/processed", "val", None)
    rows = long_context.rows_of(list(data.documents()), 128, 4)
    tokenizer = Tokenizer(data.tokenizer_path)
    text = measured([row.tolist() for row in rows], tokenizer)
    first = measured([row[:1].tolist() for row in rows], tokenizer)
    bits = bytes_ = 0
    for part in found["lengths"]:
        nats = part["nats"] * part["tokens"]
        bits += nats / math.log(2)
        bytes_ += nats / math.log(2) / part["bits_per_byte"]
    assert bytes_ == pytest.approx(sum(text["bytes"]) - sum(first["bytes"]), rel=1e-6)
    assert 0 < bits / bytes_ < 8


def test_all_caches_of_the_transformer(here, tmp_path, capsys):
    for stored in CACHES:
        path = tmp_path / f"{stored}.json"
        words = ("--lengths", 48, "--needle", "--batches", 2, "--cache_dtype", stored)
        assert call(evaluate.main, RUNS["backup"], *words, "--out_json", path) == 0
    found = {stored: json.loads((tmp_path / f"{stored}.json").read_text()) for stored in CACHES}
    assert "cache" not in found["fp32"]
    shown = capsys.readouterr().out
    for stored in ("bf16", "int8"):
        cache = found[stored]["cache"]
        assert cache["stored"] == stored and 0 < abs(cache["nats"]) < 0.01 and cache["rms"] > 0
        assert f"cache in {stored}: " in shown
        exact, rounded = (found[each]["needle"][0]["nats"] for each in ("fp32", stored))
        assert rounded != exact and rounded == pytest.approx(exact, abs=0.01)
    assert call(evaluate.main, RUNS["primary"], "--lengths", 64, "--cache_dtype", "int8") == 2
    assert "EcoHybrid's cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (("--lengths", "12", "64"), "at least 32"),
        (("--lengths", "many"), "at least 32"),
        (("--needle", "--samples", "4"), "give only one of them"),
        (("--cache_dtype", "int8"), "belongs to --lengths and --needle"),
        (("--lengths", "1000000"), "two rows of 1000000 need 2,000,000"),
    ],
)
def test_what_is_refused(here, capsys, words, said):
    assert call(evaluate.main, RUNS["backup"], *words) == 2
    assert said in capsys.readouterr().err


def test_a_model_that_only_knows_whole_rows_is_refused(here, tmp_path, capsys):
    run = tmp_path / "whole"
    words = ("--data_dir", "data/processed", *TINY, "--train_block_sizes", "T", "--ar_fade", 0)
    quick = ("--max_steps", 1, "--eval_interval", 0, "--no_show_samples", "--output_dir", run)
    assert call(train.main, *words, *quick) == 0
    assert call(evaluate.main, run, "--needle") == 2
    assert "not trained in blocks" in capsys.readouterr().err


def test_a_model_of_pairs_is_refused():
    model = tiny_model("primary", framed=True)
    with pytest.raises(UserError, match="pairs"):
        long_context.examine(model, None, [], None, None)
