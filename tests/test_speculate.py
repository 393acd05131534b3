"""Verified drafts give the text of one token at a time: token for token if greedy, else with its
very law, on an engine whose drafts are deliberately wrong and on both networks.
"""
import dataclasses
import itertools
import json
import shlex
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_model

import cli
import config
import edge_benchmark
import sample
from common.console import UserError
from conftest import RUNS, call
from edge import drafts
from sampling import decode, settings, speculate
from sampling.settings import Settings
from sampling.torch_model import TorchModel
from sampling.unmasking import distribution

EOS = 3
SPECULATE = Settings(
    12, 1, mode="block_frozen", block_size=4, sampler="speculate", temperature=0, eos_id=None
)


def one_by_one(asked):
    return dataclasses.replace(asked, sampler="confidence", block_size=1)


@pytest.fixture
def always(monkeypatch):
    """A draft at every turn, whether it pays or not."""
    monkeypatch.setattr(speculate, "LOSS", 1e9)


class ToyCache:
    nbytes = 0

    def __init__(self):
        self.text = ()
        self.tried = None

    def select(self, rows):
        assert len(rows) <= 1

    def keep(self, tokens):
        self.text += self.tried[:tokens]
        self.tried = None


class Toy:
    """An engine of one row. What follows a text is a table of its own; `quality` is the share of
    that law in the draft, whose rest is wrong. A state is (the text, the place in the block).
    """

    def __init__(self, quality=0.5, vocab=5, sharp=1.5):
        self.cfg = SimpleNamespace(
            mask_id=vocab, pad_id=0, vocab_size=vocab, n_layers=2, causal=False
        )
        self.quality = quality
        self.sharp = sharp
        self.damaged = None
        self.known = {}                 # laws that were made before

    def new_cache(self, rows, length):
        assert rows == 1
        return ToyCache()

    def chances(self, seed):
        """A law over all ids but the pad and the mask."""
        if seed not in self.known:
            generator = np.random.default_rng(seed)
            p = np.exp(self.sharp * generator.standard_normal(self.cfg.vocab_size + 1))
            p[[0, -1]] = 0
            self.known[seed] = p / p.sum()
        return self.known[seed]

    def behind(self, text):
        return self.chances((1, *text))

    def draft(self, text, place):
        return self.quality * self.behind(text) + (1 - self.quality) * self.chances((2, place))

    def clean_rows(self, x0, cache):
        assert self.cfg.mask_id not in x0, "a mask was read as clean text"
        assert cache.tried is None, "tokens wait to be kept"
        new = tuple(x0[0].tolist())
        return [("clean", cache.text + new[:n + 1]) for n in range(len(new))], new

    def step(self, x0, cache):
        states, new = self.clean_rows(x0, cache)
        cache.text += new
        return states

    def try_step(self, x0, cache):
        states, cache.tried = self.clean_rows(x0, cache)
        return states

    def states(self, xt, cache, depth=None):
        row = xt[0].tolist()
        assert row[0] != self.cfg.mask_id and set(row[1:]) == {self.cfg.mask_id}
        return [("noisy", (*cache.text, row[0]), place) for place in range(len(row))]

    def logits(self, states, rows, positions):
        laws = []
        for position in positions:
            kind, text, *place = states[position]
            laws.append(self.behind(text) if kind == "clean" else self.draft(text, *place))
            if kind == self.damaged:
                laws[-1][1] = np.nan
        with np.errstate(divide="ignore"):
            return np.log(np.array(laws)).astype(np.float32)


# ---- the law of the text -------------------------------------------------------------------------

def enumerated(toy, prompt, asked):
    """{every text that one token at a time can give: its chance}."""
    found = {}

    def go(new, chance):
        if len(new) == asked.max_new_tokens or new and new[-1] == asked.eos_id:
            found[new] = chance
            return
        text = (*prompt, *new)
        with np.errstate(divide="ignore"):
            logits = np.log(toy.behind(text))[None]
        p = speculate.law(logits, np.array(text), asked)[0]
        for token in np.flatnonzero(p):
            go((*new, int(token)), chance * p[token])
    go((), 1.0)
    return found


def deviation(toy, prompt, asked, n):
    """Chi-square of the texts of n seeds against the enumerated law, in deviations above its
    degrees of freedom; rare texts are one cell.
    """
    law = enumerated(toy, prompt, asked)
    assert sum(law.values()) == pytest.approx(1)
    out = decode.generate(toy, prompt, asked, list(range(n)))
    assert out.rounds > n / 4
    seen = Counter(map(tuple, out.full_rows))
    assert set(seen) <= set(law), "a text that has no chance"
    cells = [(seen[text], n * p) for text, p in law.items() if n * p >= 5]
    rest = n - sum(want for _, want in cells)
    if rest > 5:
        cells.append((n - sum(count for count, _ in cells), rest))
    free = len(cells) - 1
    chi2 = sum((count - want) ** 2 / want for count, want in cells)
    return (chi2 - free) / (2 * free) ** 0.5


LAWS = [
    dict(temperature=1.0),
    dict(temperature=0.7),
    dict(temperature=1.4, top_k=2),
    dict(temperature=1.0, top_p=0.8),
    dict(temperature=0.8, repetition_penalty=1.6),
    dict(temperature=0.9, top_k=3, top_p=0.9, repetition_penalty=0.7),
]
PROMPT = [2, 4]
SHORT = dataclasses.replace(SPECULATE, max_new_tokens=4, block_size=3, eos_id=EOS)


@pytest.mark.parametrize("rule", LAWS, ids=str)
@pytest.mark.parametrize("quality", [0.0, 0.8])
def test_sampled_text_has_the_law_of_one_token_at_a_time(always, rule, quality):
    asked = dataclasses.replace(SHORT, **rule)
    assert deviation(Toy(quality), PROMPT, asked, 1500) < 5


def test_the_law_does_not_depend_on_when_a_draft_is_asked_for(monkeypatch):
    """Some turns with a draft, some without."""
    monkeypatch.setattr(speculate, "LOSS", 0.5)
    asked = dataclasses.replace(SHORT, temperature=1.0)
    out = decode.generate(Toy(0.3), PROMPT, asked, list(range(300)))
    turns = out.forwards - out.rounds
    assert 0.2 * turns < out.rounds < 0.8 * turns
    assert deviation(Toy(0.3), PROMPT, asked, 1500) < 5


def accept_always(drafts, q, p, eos_id, generator):
    return [*drafts, speculate.drawn(p(len(drafts)), generator)], len(drafts)


def without_the_remainder(drafts, q, p, eos_id, generator):
    """At a rejection the token comes from p itself."""
    for number, token in enumerate(drafts):
        if generator.random() * q[number, token] >= p(number)[token]:
            return [*drafts[:number], speculate.drawn(p(number), generator)], number
    return accept_always(drafts, q, p, eos_id, generator)


def by_p_alone(drafts, q, p, eos_id, generator, right=speculate.verified):
    """A draft is kept with the chance p instead of min(1, p / q)."""
    return right(drafts, np.ones_like(q), p, eos_id, generator)


@pytest.mark.parametrize("wrong", [accept_always, without_the_remainder, by_p_alone])
@pytest.mark.parametrize("quality", [0.0, 0.8])
def test_the_bound_fails_for_wrong_rules(always, monkeypatch, wrong, quality):
    asked = dataclasses.replace(SHORT, temperature=1.0, eos_id=None, max_new_tokens=3)
    monkeypatch.setattr(speculate, "verified", wrong)
    assert deviation(Toy(quality), PROMPT, asked, 3000) > 10


def small(model, seed=3, vocab=40):
    return tiny_model(model, vocab, seed=seed, away=0.2, conv_kernel=7)


@pytest.mark.parametrize("model, more", [
    ("primary", dict(temperature=1.0)),
    ("backup", dict(temperature=0.6, top_k=3)),
])
def test_both_networks_have_the_clean_streams_law(model, more, always):
    """All texts of two tokens of a small vocabulary; the noisy stream's law is another one."""
    net = small(model, vocab=6)
    prompt = [2, 4, 5]
    texts = list(itertools.product([1, 2, 3, 4, 5], repeat=2))
    x0 = torch.tensor([[*prompt, *text] for text in texts])
    asked = dataclasses.replace(SPECULATE, max_new_tokens=2, **more)
    laws = []
    with torch.no_grad():
        for states in (net.clean_states(x0), net.block_states(torch.full_like(x0, 6), x0, 2)):
            logits = net.logits(states)[:, 3:].flatten(0, 1).numpy()
            p = distribution(logits, asked.temperature, asked.top_k, 1.0)
            p = p[np.arange(len(p)), x0[:, 3:].flatten().numpy()]
            laws.append(p.reshape(-1, 2).prod(1))
    n = 500
    out = decode.generate(TorchModel(net), prompt, asked, list(range(n)))
    found = Counter(map(tuple, out.rows))
    seen = np.array([found[text] for text in texts])
    assert seen.sum() == n == out.rounds and 0 < out.accepted < n
    chi2 = []
    for law in laws:
        often = n * law >= 5
        counts = np.append(seen[often], seen[~often].sum())
        wanted = np.append(n * law[often], max(1e-9, n * law[~often].sum()))
        keep = wanted >= 5
        free = keep.sum() - 1
        chi2.append((((counts - wanted) ** 2 / wanted)[keep].sum() - free) / (2 * free) ** 0.5)
    assert chi2[0] < 5 < chi2[1], chi2


# ---- greedy text ---------------------------------------------------------------------------------

@pytest.mark.parametrize("model", ["primary", "backup"])
def test_greedy_text_is_that_of_one_token_at_a_time(model, always):
    """Block sizes, seeds, ends; drafts are kept and refused."""
    kept = refused = ended = 0
    for seed in range(4):
        writer = TorchModel(small(model, seed))
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(4, 40, (1 + 7 * seed,), generator=generator).tolist()
        asked = dataclasses.replace(SPECULATE, max_new_tokens=33)
        free = decode.generate(writer, prompt, one_by_one(asked), [0]).rows[0]
        for eos in (None, free[13]):
            want = decode.generate(
                writer, prompt, one_by_one(dataclasses.replace(asked, eos_id=eos)), [0]
            )
            ended += len(want.full_rows[0]) < 33
            for size in (1, 2, 3, 5, 8, 13, 16):
                mine = dataclasses.replace(asked, eos_id=eos, block_size=size)
                out = decode.generate(writer, prompt, mine, [5])
                assert (out.rows, out.full_rows) == (want.rows, want.full_rows), (seed, size)
                assert (out.rounds > 0) == (size > 1)
                kept += out.accepted
                refused += out.rounds * (size - 1) - out.accepted
    assert kept > 100 and refused > 100 and ended >= 3


@pytest.mark.parametrize("model", ["primary", "backup"])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_the_drafts_stop_where_the_cache_begins_to_slide(model, penalty, always):
    """A token that left it for a draft that was refused would be missing."""
    writer = TorchModel(small(model, seed=4))
    asked = dataclasses.replace(
        SPECULATE, max_new_tokens=70, window=32, block_size=6, repetition_penalty=penalty
    )
    want = decode.generate(writer, [2, 5, 6], one_by_one(asked), [0])
    out = decode.generate(writer, [2, 5, 6], asked, [0])
    assert out.rows == want.rows and out.cache_bytes == want.cache_bytes
    assert 5 < out.rounds and out.forwards > 40
    wide = dataclasses.replace(asked, window=None)
    assert decode.generate(writer, [2, 5, 6], wide, [0]).rounds > out.rounds


@pytest.mark.parametrize("model", ["primary", "backup"])
def test_tried_tokens_join_as_if_they_had_been_stepped(model):
    """Any number of them, behind a prompt and behind the start alone; until then the cache stays
    as it was.
    """
    net = small(model)
    x0 = torch.randint(4, 40, (2, 30), generator=torch.Generator().manual_seed(1))
    xt = torch.full((2, 5), 40)
    with torch.no_grad():
        for known in (0, 9):
            for tokens in (1, 2, 3, 8, 21):
                for kept in {1, tokens // 2 or 1, tokens}:
                    mine, other = net.new_cache(2, 40), net.new_cache(2, 40)
                    if known:
                        net.step(x0[:, :known], mine)
                        net.step(x0[:, :known], other)
                    new = x0[:, known:known + tokens]
                    before = net.states(xt, mine)
                    got = net.try_step(new, mine)
                    assert torch.equal(net.states(xt, mine), before)
                    mine.keep(kept)
                    want = []
                    for i in range(tokens):
                        want.append(net.step(new[:, i:i + 1], other))
                        if i + 1 == kept:
                            after = net.states(xt, other)
                            assert mine.length == other.length
                    close = dict(rtol=1e-5, atol=1e-5)
                    torch.testing.assert_close(got, torch.cat(want, dim=1), **close)
                    torch.testing.assert_close(net.states(xt, mine), after, **close)
        cache = net.new_cache(1, 16)
        with pytest.raises(ValueError, match="oldest|most"):
            net.try_step(torch.full((1, 40), 7), cache)


# ---- a table of drafts ---------------------------------------------------------------------------

class Guesser:
    """A table that answers anything: the text's own future, if it is told, with some wrong tokens
    in it, always sure.
    """

    def __init__(self, future, wrong=0.4, vocab=40, seed=0):
        self.future = future
        self.wrong = wrong
        self.vocab = vocab
        self.chance = np.random.default_rng(seed)
        self.at = 0                     # new tokens that were written, which the test counts

    def behind(self, text, most):
        tokens = []
        for token in self.future[self.at:self.at + most]:
            if self.chance.random() < self.wrong:
                token = int(self.chance.integers(4, self.vocab))
            tokens.append(int(token))
        return tokens, [1.0] * len(tokens)


def with_table(writer, table, try_cost=(1.0, 0.1)):
    writer.drafts = table
    writer.try_cost = try_cost
    return writer


RULES = [
    dict(temperature=0.0),
    dict(temperature=0.0, repetition_penalty=1.5),
    dict(temperature=0.8),
    dict(temperature=1.2, top_k=7, top_p=0.9, repetition_penalty=1.3),
]


@pytest.mark.parametrize("model", ["primary", "backup"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_table_changes_no_text_of_any_seed(model, rule, always):
    """Right drafts and wrong ones, ends inside of them: the text is that without drafts, token for
    token, whatever the temperature.
    """
    writer = TorchModel(small(model, seed=1))
    kept = refused = ended = 0
    for seed in range(6):
        asked = dataclasses.replace(SPECULATE, max_new_tokens=30, block_size=6, **rule)
        prompt = [2, 7 + seed, 9]
        free = decode.generate(writer, prompt, one_by_one(asked), [seed]).rows[0]
        for eos in (None, free[11]):
            asked = dataclasses.replace(asked, eos_id=eos)
            want = decode.generate(writer, prompt, one_by_one(asked), [seed])
            table = Guesser(free, seed=seed)

            def count(canvas, lo, hi, table=table):
                table.at = hi - 3
            drafted = with_table(TorchModel(writer.model), table)
            out = decode.generate(drafted, prompt, asked, [seed], None, count)
            assert out.full_rows == want.full_rows and out.rows == want.rows
            assert out.forwards <= want.forwards
            kept += out.accepted
            refused += 5 * out.rounds - out.accepted
            ended += len(out.full_rows[0]) < 30
    assert kept > 60 and refused > 60 and ended >= 3


def test_a_table_that_is_sure_and_wrong_costs_three_percent_at_most():
    toy = with_table(Toy(vocab=17), Guesser([0] * 999, wrong=0), (1.0, 0.6))
    asked = dataclasses.replace(SPECULATE, max_new_tokens=400, block_size=2)
    out = decode.generate(toy, PROMPT, asked, [0])
    cost = 1.6
    assert out.rounds == pytest.approx(0.03 * 400 / (cost - 1), abs=1) and out.accepted == 0
    assert (out.forwards - out.rounds + out.rounds * cost) / 400 <= 1.03
    assert out.layer_passes == 2 * out.forwards


def test_a_table_that_knows_nothing_costs_three_percent_at_most():
    """A forward that could verify takes longer than one of one token, with nothing to verify, too:
    after a while the other one is taken.
    """
    toy = with_table(Toy(vocab=17), Guesser([]), (1.1, 0.1))
    tries = []
    toy.try_step = lambda x0, cache: tries.append(x0) or Toy.try_step(toy, x0, cache)
    asked = dataclasses.replace(SPECULATE, max_new_tokens=200, block_size=4)
    out = decode.generate(toy, PROMPT, asked, [0])
    assert out.rounds == 0 and out.forwards == 200
    assert len(tries) == pytest.approx(0.03 * 200 / 0.1, abs=2)


@pytest.mark.parametrize("chances, try_cost, count", [
    ([0.9, 0.8, 0.7], (1.0, 0.1), 3),
    ([0.9, 0.8, 0.1], (1.0, 0.2), 2),       # the third brings less than its row costs
    ([0.3, 0.1], (1.0, 0.1), 1),
    ([0.1], (1.0, 0.2), 0),                 # 1.2 steps for 1.1 tokens
    ([0.3, 0.3, 0.3], (1.0, 0.4), 0),
    ([0.1], (2.0, 0.1), 1),                 # little, but the row in front is dear already
    ([], (1.0, 0.1), 0),
])
def test_so_many_drafts_as_pay_are_verified(chances, try_cost, count):
    first, each = try_cost
    table = speculate.FromTable(with_table(Toy(), None, try_cost))
    assert table.worth(chances) == (count, pytest.approx(first + each * count))


def test_a_table_knows_what_follows_most_often():
    """Contexts of two tokens and more; a longer one only if it says something else."""
    a, b, c, d, e, f = range(10, 16)
    text = ([a, b, c, f] * 20 + [d, b, c, e] * 30 + [f, f]) * 3
    table = drafts.Drafts(drafts.count(text))
    assert table.next([b, c]) == table.next([c, b, c])      # the surest context that is known
    assert table.next([b, c])[0] == e and 0.5 < table.next([b, c])[1] < 0.65
    assert table.next([a, b, c])[0] == f and table.next([a, b, c])[1] > 0.95
    assert table.next([99, 98]) is None
    tokens, chances = table.behind([0, 0, a, b], 4)
    assert tokens[:2] == [c, f] and all(np.diff(chances) <= 0) and chances[0] > 0.9
    assert table.behind([b], 3) == ([], [])
    entries = drafts.count(text)
    # three tokens before e say no more than the last two of them
    known = set(entries.contexts.tolist())
    assert drafts.number_of([d, b]) in known and drafts.number_of([f, d, b]) not in known


def test_contexts_have_the_same_number_alone_and_in_an_array():
    ids = np.random.default_rng(0).integers(0, 60_000, 50)
    for length in drafts.LENGTHS:
        many = drafts.numbers_of(ids.astype(np.uint64), length)
        alone = [drafts.number_of(ids[i:i + length].tolist()) for i in range(51 - length)]
        assert many.tolist() == alone


@pytest.mark.parametrize("largest", [500, 70_000])
def test_a_table_is_what_was_written(tmp_path, largest):
    text = np.tile(np.random.default_rng(1).integers(0, largest, 400), 3)
    entries = drafts.count(text)
    assert 100 < len(entries.tokens) and (np.diff(entries.contexts.astype(np.int64)) >= 0).all()
    told = drafts.write(tmp_path / "t", entries)
    for mine, back in zip(entries, drafts.read(tmp_path / "t", told), strict=True):
        assert mine.dtype == back.dtype and (mine == back).all()
    assert len(drafts.count(np.zeros(0, np.int64)).tokens) == 0


# ---- promises ------------------------------------------------------------------------------------

def test_same_seed_same_text_whatever_the_batch(always):
    toy = Toy(0.6, vocab=17, sharp=1.0)
    asked = dataclasses.replace(SPECULATE, max_new_tokens=20, temperature=1.0, eos_id=EOS)
    prompts = [[2, 6, 8], [2, 6, 8], [2, 9], [2, 5, 5, 5, 7]]
    seeds = [11, 12, 13, 11]
    batch = decode.generate(toy, prompts, asked, seeds)
    assert len({tuple(row) for row in batch.rows}) == 4
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = decode.generate(toy, prompt, asked, [seed])
        assert alone.rows[0] == batch.rows[row]
        assert alone.forwards == alone.row_forwards[0] == batch.row_forwards[row]
    assert sum(batch.row_forwards) == batch.forwards


def test_an_end_in_a_draft_ends_the_text_and_nothing_is_taken_back(always):
    """What on_block and on_step see is final: no mask, no draft that is refused later."""
    ended = 0
    for seed in range(200):
        seen, ends = [], []

        def grow(canvas, lo, hi, seen=seen, ends=ends):
            assert lo == 2 + len(seen) and hi > lo
            seen[:] = canvas.ids[0, 2:hi].tolist()
            ends.append(hi)

        def look(canvas, lo, hi, step):
            assert (canvas.ids[0, :hi] != 5).all() and (canvas.ids[0, hi:] == 5).all()
            assert 0 < canvas.chance[0, lo:hi].min() <= canvas.chance[0, lo:hi].max() <= 1

        asked = dataclasses.replace(SPECULATE, temperature=1.0, eos_id=EOS)
        out = decode.generate(Toy(0.9), PROMPT, asked, [seed], look, grow)
        assert seen == out.full_rows[0] and not {0, 5} & set(seen)
        assert EOS not in seen[:-1] and (seen[-1] == EOS or len(seen) == 12)
        assert len(ends) == out.forwards - out.rounds
        if seen[-1] == EOS and len(seen) > 1 and ends[-1] - ends[-2:][0] > 1:
            ended += 1
    assert ended > 20, "no end came out of a draft"


@pytest.mark.parametrize("kind", ["clean", "noisy"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_no_answer_comes_from_logits_that_are_not_finite(always, kind, temperature):
    toy = Toy()
    toy.damaged = kind
    asked = dataclasses.replace(SPECULATE, temperature=temperature)
    with pytest.raises(UserError, match="NaN or infinity"):
        decode.generate(toy, PROMPT, asked, [0])


def test_an_early_exit_is_a_cheaper_draft_of_the_same_text(always):
    net = tiny_model("primary", 40, seed=3, away=0.2, conv_kernel=7, exits=True)
    writer = TorchModel(net)
    full, early = (
        decode.generate(writer, [2, 5], dataclasses.replace(SPECULATE, min_depth=depth), [0])
        for depth in (0, 1)
    )
    assert full.rows == early.rows
    assert full.layer_passes == 2 * full.forwards
    assert early.layer_passes == 2 * early.forwards - early.rounds


# ---- when a draft is asked for -------------------------------------------------------------------

def counted(out, tokens, round_cost):
    """Steps of one token that a text has taken."""
    return (out.forwards - 2 * out.rounds + out.rounds * round_cost) / tokens


@pytest.mark.parametrize("tokens", [10, 60, 128, 600])
@pytest.mark.parametrize("round_cost", [2.2, 3.4])
def test_drafts_that_fail_cost_three_percent_at_most(tokens, round_cost):
    class Wrong(Toy):
        def draft(self, text, place):
            law = np.zeros(18)
            law[1 + int(self.behind(text).argmax()) % 16] = 1
            return law
    toy = Wrong(vocab=17)
    toy.round_cost = round_cost
    asked = dataclasses.replace(SPECULATE, max_new_tokens=tokens, block_size=8)
    out = decode.generate(toy, PROMPT, asked, [0])
    assert counted(out, tokens, round_cost) <= 1.03
    assert (out.rounds > 0) == (0.03 * tokens >= round_cost - 1)


def test_drafts_that_pay_go_on_and_good_ones_that_turn_bad_stop():
    class Turning(Toy):
        """Right for the first 100 tokens, then wrong."""

        def draft(self, text, place):
            right = self.behind((*text, *self.future(text, place - 1)))
            return right if len(text) < 100 else 1 - right

        def future(self, text, count):
            new = []
            for _ in range(count):
                new.append(int(self.behind((*text, *new)).argmax()))
            return new
    toy = Turning(vocab=17)
    toy.round_cost = 2.5
    asked = dataclasses.replace(SPECULATE, max_new_tokens=80, block_size=8)
    good = decode.generate(toy, PROMPT, asked, [0])
    assert good.rounds == 10 and good.accepted == 70 and good.forwards == 20
    long = decode.generate(toy, PROMPT, dataclasses.replace(asked, max_new_tokens=600), [0])
    want = decode.generate(toy, PROMPT, one_by_one(dataclasses.replace(asked, max_new_tokens=600)),
                           [0])
    assert long.rows == want.rows
    assert 13 < long.rounds < 80 and counted(long, 600, 2.5) <= 1.03


# ---- what is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("more, words", [
    (dict(mode="full"), "exact cache"),
    (dict(mode="block"), "exact cache"),
    (dict(guidance_scale=2.0), "--guidance_scale 2"),
    (dict(remask=0.1), "--remask 0.1"),
])
def test_what_it_cannot_promise_is_refused(more, words):
    asked = dataclasses.replace(SPECULATE, **more)
    with pytest.raises(UserError, match=words):
        decode.generate(Toy(), PROMPT, asked, [0])


def test_gaps_and_engines_that_cannot_verify_are_refused():
    with pytest.raises(UserError, match="leave --text"):
        decode.infill(Toy(), [2, 5, 5, 4], SPECULATE, [0])

    class Plain(Toy):
        try_step = property()
    with pytest.raises(UserError, match="this engine cannot verify"):
        decode.generate(Plain(), PROMPT, SPECULATE, [0])


def resolved(line, blocks="T,8", length=32, causal=False):
    """A command line of sample on a checkpoint trained like this -> its Settings."""
    args, origins = cli.parse(config.SampleArgs, ["x", *shlex.split(line)], "sample")
    saved = SimpleNamespace(
        path="x",
        step=10,
        config={
            "model": dict(block_size=64, n_layers=2, exits=False, causal=causal),
            "args": dict(train_block_sizes=blocks, seq_len=length, sample_steps=12),
        },
    )
    chosen = settings.suited(args, origins, saved, 1)
    return settings.settings_of_sample(chosen, origins, saved, SimpleNamespace(eos_id=3))


def test_its_settings_and_words(capsys):
    asked = resolved("--sampler speculate")
    assert (asked.mode, asked.block_size, asked.temperature) == ("block_frozen", 8, 0.7)
    assert asked.speculates and not asked.left_to_right
    assert "left to right, in verified drafts of 8" in settings.in_words(asked, False)
    assert resolved("--sampler speculate --block_size 5").block_size == 5
    assert capsys.readouterr().err == ""
    assert resolved("--sampler speculate --block_size 1").left_to_right
    resolved("--sampler speculate --threshold 0.5 --reveal cosine")
    said = capsys.readouterr().err
    assert "without effect: --threshold, --reveal (one token at a time" in said


@pytest.mark.parametrize("line, blocks, words", [
    ("--text 'a ____ b'", "T,8", "leave --text"),
    ("--steps 8", "T,8", "--steps"),
    ("--blockwise", "T,8", "--blockwise"),
    ("--guidance_scale 3", "T,8", "--guidance_scale 3"),
    ("--remask 0.2", "T,8", "--remask 0.2"),
    ("", "T", "not trained in blocks"),
])
def test_usage_errors(line, blocks, words):
    with pytest.raises(UserError, match=words) as error:
        resolved(f"--sampler speculate {line}", blocks)
    assert "\n" not in str(error.value)


def test_an_autoregressive_checkpoint_goes_on_by_itself(capsys):
    asked = resolved("--sampler speculate", "1", causal=True)
    assert "without --sampler" in capsys.readouterr().err
    toy = Toy()
    toy.cfg.causal = True
    assert decode.generate(toy, PROMPT, asked, [0]).rounds == 0


@pytest.mark.parametrize("kind", RUNS)
def test_it_is_one_token_at_a_time_from_the_commands(here, capsys, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(speculate, "LOSS", 1e9)
    texts = []
    for rule in ("--sampler speculate", "--block_size 1 --blockwise --frozen_context"):
        line = f"--ckpt {RUNS[kind]} --threads 1 --precision fp32 --temperature 0 --ignore_eos "
        assert call(sample.main, *shlex.split(line + rule)) == 0
        out, err = capsys.readouterr()
        texts.append(out)
    assert texts[0] == texts[1]
    out_json = tmp_path / "grid.json"
    line = f"{RUNS[kind]} --threads 1 --precision fp32 --modes block_frozen --runs_per_prompt 1 " \
        f"--max_new_tokens 12 --out_json {out_json} --grid sampler=speculate block_size=1,4"
    assert call(edge_benchmark.main, *shlex.split(line)) == 0
    one, four = json.loads(out_json.read_text(encoding="utf-8"))["results"].values()
    assert one["texts"] == four["texts"] and one["held_out_nats"] == four["held_out_nats"]
    assert one["mean_forwards"] != four["mean_forwards"]
