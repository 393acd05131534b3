"""Numbers one can trust: each estimator against enumeration by hand, errors over documents, the
command as a user runs it.
"""
import copy
import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tiny import TINIER, nll_by_steps, tiny_model

import checkpoint
import config
import evaluate
import masking
import train
from conftest import RUNS, TINY, call
from evaluation import estimators, ngram, sample_quality
from evaluation.estimators import cut, ratio, windows
from text.dataset import TokenData
from text.tokenizer import script_of

V, T = 9, 6
TEXT = torch.tensor([2, 5, 7, 4, 8, 5])


def tiny(kind, scale=40, **changes):
    """Far from uniform, so that the bound depends on which tokens are hidden."""
    net = tiny_model(kind, V, shape=TINIER, memory_slots=3, conv_kernel=3, **changes)
    with torch.no_grad():
        net.head.weight *= scale
    return net


def frozen(net, x, upto):
    """The exact cache of the start and x[:upto]."""
    cache = net.new_cache(1, T)
    if upto:
        net.step(x[None, :upto], cache)
    return cache


def exact_count(k, size):
    """What the CE of one set of k hidden tokens of `size` weighs in the bound."""
    return 1 / (k * math.comb(size, k))


def by_quadrature(schedule):
    """The same weight from a schedule: the integral of -alpha' / (1 - alpha) times the chance of
    just this set at time t.
    """
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    masked, weight = 1 - masking.alpha(t, schedule), masking.weight(t, schedule)
    return lambda k, size: float((weight * masked ** k * (1 - masked) ** (size - k)).mean())


@torch.no_grad()
def by_enumeration(net, x, block, weigh=exact_count):
    """The bound from every set of hidden tokens, block by block behind BOS. Nothing of
    evaluation/estimators.py in here.
    """
    total = 0.0
    for a in [1] if block >= T else range(1, T, block):
        scored = range(a, min(T, a + block))
        start = 0 if block >= T else a  # the block alone, or all in one piece
        cache = frozen(net, x, start)
        for masked in itertools.chain(
            *(itertools.combinations(scored, k) for k in range(1, len(scored) + 1))
        ):
            xt = x[start:scored[-1] + 1].clone()
            xt[[i - start for i in masked]] = V
            logp = net.logits(net.states(xt[None], cache))[0].log_softmax(-1)
            total -= weigh(len(masked), len(scored)) * sum(
                float(logp[i - start, x[i]]) for i in masked
            )
    return total


@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_linear_cosine_and_exact_count_are_one_number(kind):
    """No sampling: every mask of T = 6, the time integral of each schedule. Within 0.1 %."""
    net = tiny(kind)
    for block in (T, 2):
        exact = by_enumeration(net, TEXT, block)
        for schedule in masking.SCHEDULES:
            assert by_enumeration(net, TEXT, block, by_quadrature(schedule)) == pytest.approx(
                exact, rel=1e-3
            )


@pytest.mark.parametrize("kind", ["primary", "backup"])
@pytest.mark.parametrize("block", [T, 2])
def test_every_estimator_has_the_mean_that_enumeration_gives(kind, block):
    """T = 6, all masks by hand; the estimators see the text 1,000 times. Tolerance: 4.5 of their
    own standard errors.
    """
    net, copies = tiny(kind), 1000
    exact = by_enumeration(net, TEXT, block)
    pieces = [estimators.Piece(TEXT.expand(copies, T), 1, torch.arange(copies))]
    nats, curve, _ = estimators.bound(net, pieces, block, draws=1, batch=copies)
    assert abs(float(nats.mean()) - exact) < 4.5 * float(nats.std()) / math.sqrt(copies)
    assert abs(float(nats.mean()) - exact) < 0.03 * exact
    if block == T:  # 5 counts, each in a bin of its own
        assert sum(ce for _, ce in curve) == pytest.approx(exact, rel=0.03) and len(curve) == 5
    for name, r in estimators.compare(net, pieces, block, 8, batch=copies).items():
        found, error = r["nats"] * (T - 1), max(r["se"] * (T - 1), 1e-3)
        assert abs(found - exact) < 4.5 * error and abs(found - exact) < 0.1 * exact, (
            name,
            found,
            exact,
        )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["primary", "backup"])
@pytest.mark.parametrize("block", [T, 3, 2])
def test_chain_rule_by_hand(kind, block):
    """A real probability of the text: token by token, with what follows inside the block hidden and
    later blocks absent.
    """
    net, total = tiny(kind), 0.0
    for i in range(1, T):
        a, b = (
            (0, T)
            if block == T
            else (1 + (i - 1) // block * block, min(T, 1 + (i - 1) // block * block + block))
        )
        xt = TEXT[a:b].clone()
        xt[i - a:] = V
        z = net.logits(net.states(xt[None], frozen(net, TEXT, a)))[0].log_softmax(-1)
        total -= float(z[i - a, TEXT[i]])
    found = estimators.chain_rule(net, cut([TEXT.tolist()], T), block)
    assert float(found[0]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_blocks_of_one_token_give_the_exact_nll(kind, causal):
    """bound in blocks of one token, against decoding token by token: every window by itself, given
    tokens are read and not scored; no draw, no seed, no curve; chain_rule says the same.
    """
    net = tiny(kind, causal=causal)
    generator = torch.Generator().manual_seed(3)
    documents = []
    for n in (3, 8, 21, 17, 2):
        documents.append([2, *torch.randint(4, V, (n - 1,), generator=generator).tolist()])
    wanted = []
    for ids in documents:
        total = 0.0
        for start, size, known in windows(len(ids), 8):
            window = torch.tensor([ids[start:start + size]])
            total += float(nll_by_steps(net, window)[0, known:].double().sum())
        wanted.append(total)
    wanted = torch.tensor(wanted, dtype=torch.float64)
    pieces = cut(documents, 8)
    assert {piece.given for piece in pieces} >= {0, 1}
    for draws, seed in ((1, 0), (4, 7)):
        nats, curve, plain = estimators.bound(net, pieces, 1, draws, seed, batch=2)
        torch.testing.assert_close(nats, wanted, rtol=1e-5, atol=1e-5)
        assert curve == []
        tokens = sum(map(len, documents)) - len(documents)
        assert plain == pytest.approx(float(wanted.sum()) / tokens, rel=1e-5)
    torch.testing.assert_close(estimators.chain_rule(net, pieces, 1), nats, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_windows_of_one_stream_in_training(kind):
    """held_out, which validates a run: blocks of one token are the exact NLL of all tokens, BOS
    too, without an error from masks; a larger block is masking.bound.
    """
    net = tiny(kind)
    rows = torch.randint(4, V, (6, 16), generator=torch.Generator().manual_seed(5))
    found = estimators.held_out(net, rows, [16, 4, 1], 3, 4, 2)
    exact = nll_by_steps(net, rows).mean(1)
    assert found[1]["nats"] == pytest.approx(float(exact.mean()), rel=1e-5)
    assert found[1]["masked_mean"] == pytest.approx(float(exact.mean()), rel=1e-5)
    assert found[1]["se"] == pytest.approx(float(exact.std()) / 6 ** 0.5, rel=1e-4)
    for block in (16, 4):
        draws = [masking.bound(net, rows, block, seed=seed)[0] for seed in (3, 4)]
        mean = float(torch.stack(draws).mean())
        assert found[block]["nats"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_an_early_exit_is_scored_as_the_shorter_model_would_be(kind):
    """at_depth, against a copy that has the first layers alone and that exit's norm: both streams.
    """
    net = tiny(kind, n_layers=3, exits=True)
    with torch.no_grad():
        net.exits.early_norm.add_(0.3 * torch.randn_like(net.exits.early_norm))
    pieces = cut([TEXT.tolist(), [2, 4, 4, 6]], T)
    seen = set()
    for depth in (1, 2):
        short = copy.deepcopy(net)
        short.layers = short.layers[:depth]
        short.exits.final_norm.weight.data.copy_(net.exits.early_norm[depth - 1])
        for block in (T, 2, 1):
            nats = estimators.bound(estimators.at_depth(net, depth), pieces, block, 2)[0]
            wanted = estimators.bound(short, pieces, block, 2)[0]
            torch.testing.assert_close(nats, wanted, rtol=1e-5, atol=1e-5)
            seen.add(round(float(nats.sum()), 4))
    assert len(seen) == 6


@torch.no_grad()
@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_left_to_right_frozen_or_not(kind):
    """Frozen: the clean stream's -log p of the new tokens. Not frozen: each token is the next one
    in one block of the noisy stream in which it and all after it are hidden.
    """
    net = tiny(kind)
    prompt, new = TEXT[:2].tolist(), TEXT[2:].tolist()
    exact = float(nll_by_steps(net, TEXT[None])[0, 2:].sum())
    assert estimators.left_to_right(net, prompt, new) == pytest.approx(exact, rel=1e-5)

    total = 0.0
    for i in range(2, T):
        xt = TEXT.clone()
        xt[i:] = V
        logp = net.logits(net.states(xt[None], net.new_cache(1, T)))[0, i].log_softmax(-1)
        total -= float(logp[TEXT[i]])
    found = estimators.left_to_right(net, prompt, new, frozen=False)
    assert found == pytest.approx(total, rel=1e-5)
    assert abs(found - exact) > 1e-3


@given(st.integers(2, 70), st.integers(2, 20))
@settings(max_examples=100, deadline=None)
def test_windows_score_every_token_once(tokens, length):
    scored = []
    for start, size, known in windows(tokens, length):
        assert size == min(length, tokens) and 0 <= known < size and start + size <= tokens
        scored += range(start + known, start + size)
    assert scored == list(range(1, tokens))


def without_specials(z):
    """The pad's and the mask's logit are -inf."""
    z[:, [0, V]] = -math.inf
    return z


@pytest.mark.parametrize("block", [1, 4, 8, 99])
def test_a_long_document_is_scored_whole_and_given_tokens_are_never_hidden(block):
    """A uniform guess costs ln V at each scored token, whatever the cut; so masks, weights and
    windows are right together.
    """
    net = SimpleNamespace(
        cfg=SimpleNamespace(mask_id=V, pad_id=0, causal=False),
        logits=lambda states: without_specials(states @ torch.zeros(4, V + 1)),
    )
    net.block_states = lambda xt, *_: torch.zeros(*xt.shape, 4)
    net.clean_states = lambda x0: torch.zeros(*x0.shape, 4)
    documents = [[2] + [5] * (n - 1) for n in (3, 8, 20, 17, 24)]
    pieces = cut(documents, 8)
    expected = torch.tensor(
        [math.log(V - 1) * (len(d) - 1) for d in documents], dtype=torch.float64
    )
    nats, curve, plain = estimators.bound(net, pieces, block, draws=3)
    torch.testing.assert_close(nats, expected, rtol=1e-5, atol=0)
    assert all(
        ce == pytest.approx(math.log(V - 1), rel=1e-5) for _, ce in curve
    ) and plain == pytest.approx(math.log(V - 1))
    torch.testing.assert_close(
        estimators.chain_rule(net, pieces, block), expected, rtol=1e-5, atol=0
    )
    layouts = [estimators.lay_out(p, block) for p in pieces]
    for masks in (estimators.exact_counts(pieces, layouts, torch.Generator()),
                  estimators.independent(pieces, layouts, torch.Generator(), "linear")):
        assert all(
            mask.shape == p.x0.shape and not mask[:, : p.given].any()
            for p, (mask, *_) in zip(pieces, masks, strict=True)
        )
    assert {p.given for p in pieces} == {0, 1, 4, 7}
    assert estimators.scored_tokens(pieces) == sum(map(len, documents)) - len(documents)


@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_strata_beat_independent_times(kind):
    """At equal forwards, at least 5 times less variance than t iid; the means agree within their
    errors.
    """
    net = tiny(kind, scale=8)
    rows = torch.randint(4, V, (48, 16), generator=torch.Generator().manual_seed(1))
    rows[:, 0] = 2
    found = estimators.compare(net, cut(rows.tolist(), 16), 16, 40, batch=48)
    exact = found["exact count"]
    for name in ("linear, t iid", "cosine, t iid"):
        assert found[name]["variance"] > 5 * exact["variance"], found
        assert abs(found[name]["nats"] - exact["nats"]) < 4.5 * (found[name]["se"] + exact["se"])


def test_strata_pay_where_the_cost_depends_on_the_count():
    """A denoiser that is the surer the more it sees: counts that cover the range leave little to
    chance.
    """
    weight = torch.eye(V + 1, 12)
    net = SimpleNamespace(
        cfg=SimpleNamespace(mask_id=V, causal=False),
        logits=lambda states: without_specials(states @ weight.T),
    )
    net.block_states = lambda xt, x0, *_: 8 * (xt != V).float().mean(1)[:, None, None] * weight[x0]
    pieces = cut([[2] + [5, 7, 6, 4] * 4] * 64, 17)
    found = estimators.compare(net, pieces, 17, 40, batch=64)
    assert found["exact count, count iid"]["variance"] > 100 * found["exact count"]["variance"]
    nats = torch.stack(
        [
            estimators.bound(net, pieces[:1], 17, draws, seed)[0][:8]
            for draws in (1, 8)
            for seed in range(30)
        ]
    )
    assert nats[:30].std(0).mean() > 6 * nats[30:].std(0).mean(), (
        "the draws of one window are strata too"
    )


def test_errors_are_over_documents():
    """The error of a ratio, against the spread of many drawn sets of documents; one document has no
    error.
    """
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 200, (3000,), generator=g).double()
    nats = tokens * (3 + 0.5 * torch.randn(3000, generator=g).double())
    many = [ratio(nats[i:i + 30], tokens[i:i + 30]) for i in range(0, 3000, 30)]
    spread = torch.tensor([r for r, _ in many]).std()
    assert float(torch.tensor([e for _, e in many]).mean()) == pytest.approx(
        float(spread), rel=0.25
    )
    assert ratio(nats[:1], tokens[:1])[1] is None
    found = estimators.figures(
        torch.tensor([10.0, 20.0]), {"tokens": [5, 5], "bytes": [20, 40], "chars": [10, 10]}
    )
    assert found["nats"] == 3 and found["se"] == pytest.approx(1) and found["tokens"] == 10
    assert found["bits_per_byte"] == pytest.approx(30 / 60 / math.log(2))
    assert found["bits_per_char"] == pytest.approx(30 / 20 / math.log(2))


def test_infilling_counts_right_guesses():
    """A denoiser that knows every token but 7: right everywhere else, and as many hidden as asked
    for.
    """
    weight = torch.eye(V + 1)
    net = SimpleNamespace(
        cfg=SimpleNamespace(mask_id=V, causal=False),
        logits=lambda states: states @ weight.T,
    )
    net.block_states = lambda xt, x0, block, first: torch.nn.functional.one_hot(
        torch.where(x0 == 7, 6, x0), V + 1
    ).float()
    found = estimators.infilling(net, cut([[2] + [5] * 20, [2] + [7] * 20], 21))
    for rate, (right, asked) in found.items():
        assert asked.tolist() == [round(20 * rate)] * 2 and right.tolist() == [asked[0], 0]


# ---- judge ---------------------------------------------------------------------------------------

def text(prompt, new, row, ended=True):
    return sample_quality.Text(prompt, new, [2], row, ended)


def test_words_and_their_edges():
    assert sample_quality.words("मैं, घर-वापस \"गया\" था। Kya?  123 — 'haan'...") == [
        "मैं", "घर-वापस", "गया", "था", "kya", "haan",
    ]
    assert text("ek din ma", "in ghar gay", [], ended=False).new_words() == ["ghar"], (
        "begun before, and cut off"
    )
    assert text("ek din", " main ghar", []).new_words() == ["main", "ghar"]


def test_quality_by_hand():
    known = {"ek", "do", "teen"}
    found = sample_quality.quality(
        [text("ek", " do xyz", [5, 6, 6, 3]), text("ek", " मैं", [5, 7], ended=False)],
        script_of,
        known,
        {"ngram": lambda rows, contexts: 1.5},
    )
    assert (
        found["ngram_nats"] == 1.5
        and found["distinct_1"] == 4 / 6
        and found["ended"] == 0.5
        and found["script_kept"] == 0.5
    )
    assert found["real_words"] == 0.5, (
        "do is known, xyz is not, and the last word of a cut text does not count"
    )
    p = [2 / 6, 2 / 6, 1 / 6, 1 / 6]
    assert (
        found["unigram_entropy"] == pytest.approx(-sum(q * math.log(q) for q in p))
        and found["mean_tokens"] == 3
    )


def test_how_much_of_a_judges_text_was_read_before():
    rng = np.random.default_rng(0)
    text, other = rng.integers(5, 400, 5000), rng.integers(5, 400, 3000)
    assert (
        ngram.shared(other, text) == 0
        and ngram.shared(text[100:900], text) == 1
        and ngram.shared([1, 2], text) == 0
    )
    mixed = np.concatenate([other, text[:1000]])  # a passage across the seam is nobody's
    assert ngram.shared(mixed, text) == pytest.approx((1000 - 12) / (4000 - 12))
    text[::13] = 1  # a change in every passage
    assert ngram.shared(mixed, text) == 0


def test_a_loop_that_pleases_the_judge_is_caught():
    ids = [3 + i % 4 for i in range(400)]
    model = ngram.NGram(ids, 20)
    loop, honest = [3, 4, 5, 6] * 10, [3, 4, 5, 6, 9, 8, 12, 7, 11, 10]
    found = [
        sample_quality.quality([text("ek", "do", row)], script_of, set(), {"ngram": model.nats})
        for row in (loop, honest)
    ]
    assert found[0]["ngram_nats"] < found[1]["ngram_nats"]
    assert (
        found[0]["repeat_rate"] > 0.8 > found[1]["repeat_rate"]
        and found[0]["unigram_entropy"] < found[1]["unigram_entropy"]
    )


# ---- the command ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def controls(trained):
    """A left-to-right run of each model beside the two that have both streams, on the same text."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        for model in RUNS:
            words = ("--model", model, "--objective", "ar", *TINY, "--max_steps", 12)
            quiet = ("--eval_interval", 0, "--no_show_samples")
            assert call(train.main, *words, *quiet, "--run_name", f"ar_{model}") == 0
            found[model] = f"checkpoints/ar_{model}"
    return found


@pytest.mark.parametrize("blocks, compared", [("T,1", {"32"}), ("1", set())])
def test_blocks_of_one_token_leave_nothing_to_compare(here, capsys, tmp_path, blocks, compared):
    """They are exact: there is no variance by which another could be divided."""
    assert (
        call(
            evaluate.main, RUNS["primary"], "--blocks", blocks, "--max_docs", 4, "--draws", 1,
            "--chain_docs", 1, "--repeats", 2, "--out_json", tmp_path / "e.json", "--threads", 1,
        )
        == 0
    )
    found = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert set(found["compared"]) == compared and "1" in found["bound"]


def test_the_whole_report(here, controls, capsys, tmp_path):
    out, unread = tmp_path / "e.json", tmp_path / "unread.txt"
    data, tokenizer = (
        TokenData("data/processed", "train"),
        checkpoint.load_model(RUNS["primary"], torch.device("cpu"), config.check_saved)[1],
    )
    unread.write_text(
        tokenizer.decode(data.tokens[:200].tolist())
        + "\n\nyeh kahani kisi ne kabhi nahi padhi thi\n" * 9,
        "utf-8",
    )
    assert (
        call(
            evaluate.main, RUNS["primary"], "--max_docs", 12, "--draws", 2, "--chain_docs", 4,
            "--repeats", 2, "--out_json", out, "--out_png", tmp_path / "e.png", "--samples", 3,
            "--judge", controls["backup"], "--judge_text", unread, "--max_new_tokens", 12,
            "--threads", 1,
        )
        == 0
    )
    said = capsys.readouterr()
    assert "has learned from the same text" in said.err and "is not independent" in said.err
    printed, found = said.out, json.loads(out.read_text(encoding="utf-8"))
    assert (tmp_path / "e.png").read_bytes()[:4] == b"\x89PNG"
    assert set(found["bound"]) == {"32", "8", "1"}
    assert set(found["chain_rule"]) == set(found["compared"]) == {"32", "8"}
    for block, r in found["bound"].items():
        scripts = r["scripts"]
        each = found["documents"]
        assert (
            sum(each["nats"][block]) == pytest.approx(r["nats"] * sum(each["tokens"]))
            and len(each["script"]) == 12
        )
        assert r["documents"] == 12 and r["nats"] == scripts["all"]["nats"] and len(scripts) > 2
        assert sum(s["documents"] for s in scripts.values()) == 24 and r["bits_per_byte_se"] > 0
        assert r["nats"] * r["tokens"] == pytest.approx(
            sum(s["nats"] * s["tokens"] for n, s in scripts.items() if n != "all")
        )
        if block == "1":
            assert found["curve"][block] == [] and r["masked_mean"] == pytest.approx(r["nats"])
        else:
            assert len(found["curve"][block]) >= 5
            assert found["chain_rule"][block]["documents"] == 4
    assert (
        "n-gram of --judge_text" in printed
        and 0 < found["samples"]["judge_text"]["in_training_text"] < 1
    )
    assert found["samples"]["samples"]["unread_nats"] != found["samples"]["samples"]["ngram_nats"]
    assert set(found["infilling"]) == {"0.15", "0.50", "0.85"}
    figures = set(found["samples"]["samples"])
    assert (
        figures == set(found["samples"]["held_out"])
        and {
            "ngram_nats", "ar_nats", "unigram_entropy", "distinct_1", "distinct_2", "distinct_3",
            "repeat_rate", "real_words", "script_kept", "ended", "mean_tokens",
        }
        <= figures
    ), "never one without the others"
    assert (
        found["samples"]["held_out"]["real_words"] > 0.5
        and len(found["samples"]["samples_texts"]) == 3
    )
    assert len(re.findall(r"^(?:T|8) +(?:bound|chain rule|its bound) +all", printed, re.M)) == 6
    assert len(re.findall(r"^1 +NLL +all", printed, re.M)) == 1


@pytest.mark.parametrize("objective", ["masked", "ar"])
@pytest.mark.parametrize("kind", list(RUNS))
def test_the_exact_nll_is_printed(here, controls, capsys, tmp_path, kind, objective):
    """Of all four checkpoints, from one pass: NLL in block 1, the same as token by token, and in
    --out_json as bound["1"]; beside it the bounds of larger blocks, where there are such.
    """
    run = RUNS[kind] if objective == "masked" else controls[kind]
    lines = tmp_path / "t.txt"
    lines.write_text("मैं घर गया।\n\nmain ghar gaya tha aur wahan bahut log "
                     "the\n", encoding="utf-8")
    assert (
        call(
            evaluate.main, run, "--text", lines, "--out_json", tmp_path / "e.json", "--threads", 1,
            "--draws", 1, "--repeats", 0,
        )
        == 0
    )
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert found["objective"] == objective
    larger = ["32", "8"] if objective == "masked" else []
    assert list(found["bound"]) == [*larger, "1"] and list(found["chain_rule"]) == larger
    told = re.findall(r"^(\w+) +(bound|chain rule|NLL) +all", printed, re.M)
    wanted = []
    for rule in ("T", "8"):
        wanted += [(rule, "bound"), (rule, "chain rule")]
    assert told == (wanted if larger else []) + [("1", "NLL")]

    net, tokenizer, _ = checkpoint.load_model(run, torch.device("cpu"), config.check_saved)
    total, count = 0.0, 0
    for line in lines.read_text(encoding="utf-8").split("\n\n"):
        ids = [tokenizer.bos_id, *tokenizer.encode(line.strip()), tokenizer.eos_id]
        assert len(ids) <= 32
        total += float(nll_by_steps(net, torch.tensor([ids]))[0, 1:].sum())
        count += len(ids) - 1
    r = found["bound"]["1"]
    assert r["tokens"] == count and r["nats"] == pytest.approx(total / count, rel=1e-4)
    size = len(lines.read_text(encoding="utf-8").replace("\n", "").encode())
    assert r["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-4)


def test_slips_of_evaluate(here, controls, capsys, tmp_path):
    for words, said in (
        (("--judge", controls["backup"]), "--samples 64"),
        (("--judge_text", "t.txt"), "--samples 64"),
        (("--samples", 1, "--judge_text", "nowhere.txt"), "--judge_text nowhere.txt"),
        (("--text", "nowhere.txt"), "--text nowhere.txt"),
        (
            ("--samples", 1, "--judge", RUNS["backup"], "--max_docs", 1, "--chain_docs", 1),
            "--objective ar",
        ),
    ):
        assert call(evaluate.main, RUNS["primary"], *words) == 2 and said in capsys.readouterr().err
