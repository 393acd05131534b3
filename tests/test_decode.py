"""The promises of the decode loop, on a fake denoiser with the worst habits, and cached against uncached text on real nets."""
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import config
from decode import Settings, choose_positions, generate, reveal_count, token_distribution
from model import build_model

V, EOS = 17, 3
MASK = V


class FakeCache:
    nbytes, length = 0, 0


class Fake(nn.Module):
    """Random but repeatable logits; habit: mask_lover, all_eos, late_eos, nan, constant."""

    def __init__(self, habit="plain", vocab=V):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1))
        self.cfg = SimpleNamespace(mask_id=vocab, pad_id=0, vocab_size=vocab)
        self.habit, self.vocab = habit, vocab
        self.hidden_calls, self.head_rows, self.commits = 0, [], []

    def hidden(self, xt, cache=None):
        self.hidden_calls += 1
        return nn.functional.one_hot(xt, self.vocab + 1).float().cumsum(1)         # something that depends on the text

    def logits(self, h):
        self.head_rows.append(len(h))
        g = torch.Generator().manual_seed(int(h.sum()) % 1000)
        z = torch.randn(*h.shape[:-1], self.vocab + 1, generator=g)
        if self.habit == "mask_lover":
            z[..., [0, self.vocab]] = 50.0
        if self.habit == "all_eos":
            z[..., EOS] = 50.0
        if self.habit == "no_eos":
            z[..., EOS] = -50.0
        if self.habit == "constant":
            z[:] = 0.0
        if self.habit == "nan":
            z[0, 1] = float("nan")
        z[..., [0, self.vocab]] = -float("inf")                                    # the protocol: never an answer
        return z

    def new_cache(self, batch, length):
        return FakeCache()

    def commit(self, x0, cache):
        self.commits.append(tuple(x0.shape))


def blocks_of(s):
    size = s.max_new_tokens if s.mode == "full" else s.block_size
    return [min(size, s.max_new_tokens - a) for a in range(0, s.max_new_tokens, size)]


def test_guarantees_on_many_random_cases():
    """Ends within the stated forwards, no mask left, no pad, prompt untouched, for any length, block, steps, temperature."""
    rnd = random.Random(0)
    for case in range(1000):
        habit = rnd.choice(["plain", "mask_lover", "all_eos", "no_eos", "constant"])
        s = Settings(max_new_tokens=rnd.randint(1, 130), steps=rnd.randint(1, 200),
                     mode=rnd.choice(["full", "block", "block_frozen"]),
                     block_size=rnd.randint(1, 64), sampler=rnd.choice(["confidence", "random"]),
                     reveal=rnd.choice(["linear", "cosine"]), temperature=rnd.choice([0, 1e-6, 0.7, 1.0, 10.0]),
                     temperature_end=rnd.choice([None, 0.0, 0.5]), top_k=rnd.choice([0, 1, 5, 99]),
                     top_p=rnd.choice([1.0, 0.9, 0.1]),
                     eos_id=rnd.choice([EOS, None]))
        if case % 10:                                                              # mostly short ones: there is much to try
            s.max_new_tokens, s.steps = rnd.randint(1, 24), rnd.randint(1, 30)
        prompt = [2, *(rnd.randint(4, V - 1) for _ in range(rnd.randint(0, 40)))]
        net, B = Fake(habit), rnd.randint(1, 3)
        out = generate(net, prompt, s, [rnd.randrange(10 ** 6) for _ in range(B)])
        assert net.hidden_calls == out.forwards <= sum(min(s.steps, n) for n in blocks_of(s))
        for row, full in zip(out.rows, out.full_rows, strict=True):
            assert all(0 < token < V for token in full) and row == [t for t in full[:len(row)]]
            ended = s.eos_id is not None and EOS in full
            assert len(full) == s.max_new_tokens or ended
            assert EOS not in row or s.eos_id is None
        if habit == "no_eos" or s.eos_id is None:
            assert all(len(row) == s.max_new_tokens for row in out.rows)


def test_twelve_steps_are_twelve_forwards_of_at_most_six():
    net = Fake("no_eos")
    out = generate(net, [2, 5], Settings(64, 12), [0])
    assert out.forwards == net.hidden_calls == 12
    revealed = [a - b for a, b in zip(net.head_rows, [*net.head_rows[1:], 0], strict=True)]
    assert sum(revealed) == 64 and max(revealed) <= 6 and min(revealed) >= 5
    assert net.head_rows[0] == 64                                                  # the head sees masked positions only


@pytest.mark.parametrize("rule", ["linear", "cosine"])
def test_reveal_schedule_adds_up(rule):
    for masked in range(1, 70):
        for steps in range(1, 20):
            left, shares = masked, []
            for step in range(steps):
                if left:
                    shares.append(reveal_count(left, step, steps, rule))
                    assert 1 <= shares[-1] <= left
                    left -= shares[-1]
            assert left == 0
            if rule == "linear":
                assert max(shares) - min(shares) <= 1 or min(shares) == 1
    first, last = reveal_count(64, 0, 8, "cosine"), reveal_count(64, 0, 8, "linear")
    assert first < last                                                            # cosine is careful at first


def test_nan_is_an_error_and_not_an_answer():
    with pytest.raises(FloatingPointError, match="NaN"):
        generate(Fake("nan"), [2], Settings(8, 4), [0])


def test_same_seed_same_text_whatever_the_batch():
    class RowWise(Fake):                                # logits depend on the row's own hidden state only
        def logits(self, h):
            z = torch.sin(h @ torch.arange(1, (V + 1) * (V + 1) + 1).view(V + 1, V + 1).float() * 0.37) * 2
            z[..., [0, V]] = -float("inf")
            return z
    s = Settings(20, 5, mode="block", block_size=7, temperature=1.0, eos_id=None)
    batch = generate(RowWise(), [2, 6, 8], s, [11, 12, 13]).rows
    assert [generate(RowWise(), [2, 6, 8], s, [seed]).rows[0] for seed in (11, 12, 13)] == batch
    assert len({tuple(row) for row in batch}) == 3


def test_eos_stops_only_when_nothing_before_it_is_masked():
    """A net that says EOS late first: the text before it must be completed; one that says EOS everywhere stops at once."""
    class LateEos(Fake):
        def hidden(self, xt, cache=None):
            self.hidden_calls += 1
            return torch.arange(xt.shape[1]).float().expand(len(xt), -1)[..., None]

        def logits(self, h):
            z = torch.zeros(len(h), V + 1)
            at = h[:, 0]
            z[at < 9, 7] = 3 + at[at < 9] * 0.1                                    # later ones are surer
            z[at >= 9, EOS] = 50.0
            z[..., [0, V]] = -float("inf")
            return z
    out = generate(LateEos(), [2], Settings(20, 20, temperature=0, eos_id=EOS), [0])
    assert out.rows == [[7] * 8] and out.full_rows == [[7] * 8 + [EOS]]
    out = generate(Fake("all_eos"), [2], Settings(64, 64, mode="block", block_size=16, temperature=0, eos_id=EOS), [0])
    assert out.rows == [[]] and out.forwards <= 16


def test_frozen_mode_passes():
    """Two blocks: one context pass for the prompt, one for the finished block that has a successor, none for the last."""
    net = Fake("no_eos")
    out = generate(net, [2, 5, 6], Settings(128, 6, mode="block_frozen", block_size=64, eos_id=EOS), [0])
    assert (out.forwards, out.context_passes) == (12, 2)
    assert net.commits == [(1, 3), (1, 64)]
    net = Fake("no_eos")
    generate(net, [2] + [5] * 9, Settings(8, 2, mode="block_frozen", block_size=4), [0])
    assert net.commits == [(1, 2), (1, 4), (1, 4), (1, 4)]                         # the shorter block of a prompt comes first


def test_confidence_ignores_a_constant_added_to_a_position():
    z = torch.randn(6, V + 1)
    masked, g = torch.arange(6), torch.Generator()
    shifted = z + torch.tensor([0.0, 100.0, -50.0, 3.0, 0.0, 9.0])[:, None]
    assert torch.equal(choose_positions(z, masked, 4, "confidence", g), choose_positions(shifted, masked, 4, "confidence", g))


def test_token_distribution():
    z = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    torch.testing.assert_close(token_distribution(z, 1.0, 0, 1.0).float(), z.exp())
    assert (token_distribution(z, 1.0, 2, 1.0) > 0).sum() == 2
    torch.testing.assert_close(token_distribution(z, 1.0, 0, 0.75)[0, :3].float(), torch.tensor([0.625, 0.375, 0.0]))
    assert token_distribution(z, 0.1, 0, 1.0)[0, 0] > 0.99
    assert token_distribution(z, 1.0, 0, 1.0).dtype == torch.float64


def test_rare_tokens_keep_their_share():
    """1,000 tokens of 1e-5 each: their pooled share is 1 % within 5 % of it (D6)."""
    z = torch.full((1, 1001), 1e-5)
    z[0, 0] = 0.99
    p = token_distribution(z.log(), 1.0, 0, 1.0)
    draws = torch.multinomial(p.expand(1000, -1), 1000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert float((draws > 0).double().mean()) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("model", ["primary", "backup"])
def test_cached_text_equals_uncached_text(model):
    """Greedy text of block_frozen equals decoding the same rule without any cache, for many prompts (C6)."""
    torch.manual_seed(3)
    net = build_model(config.ModelConfig(model=model, vocab_size=40, d_model=32, n_layers=2, n_heads=2, d_ff=48,
                                         memory_slots=4)).eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn_like(p)
    s = Settings(20, 4, mode="block_frozen", block_size=8, temperature=0, eos_id=None)
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        prompt = torch.randint(4, 40, (1 + seed,), generator=g).tolist()
        got = generate(net, prompt, s, [0]).rows[0]
        text, first = list(prompt), len(prompt) % 8 or 8
        for lo in range(0, 20, 8):                      # the same rule, recomputed from the clean text at every forward
            n = min(8, 20 - lo)
            block = [40] * n
            for step in range(4):
                ids = torch.tensor([text + block])
                clean = torch.tensor([text + [1] * n])  # the clean side of the active block is never seen
                z = net.logits(net.hidden_blocks(ids, clean, 8, first))[0, len(text):].detach()
                masked = torch.tensor([i for i, t in enumerate(block) if t == 40])
                if len(masked):
                    count = reveal_count(len(masked), step, min(4, n), "linear")
                    for i in masked[choose_positions(z[masked], masked, count, "confidence", g)].tolist():
                        block[i] = int(z[i].argmax())
            text += block
        assert got == text[len(prompt):], seed


@pytest.mark.parametrize("model", ["primary", "backup"])
def test_longer_than_any_training_length(model):
    net = build_model(config.ModelConfig(model=model, vocab_size=V, d_model=16, n_layers=1, n_heads=2, d_ff=16,
                                         memory_slots=2)).eval()
    out = generate(net, [2], Settings(200, 2, mode="block_frozen", block_size=16, eos_id=None), [0])
    assert len(out.rows[0]) == 200 and MASK not in out.rows[0]
