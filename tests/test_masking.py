"""The mathematics: schedules and their weights, exact counts, strata, the bound, normalisation over
micro-batches.
"""
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tiny import TINIER, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import masking
from config import TrainArgs

BASE = dict(
    mask_schedule="linear",
    min_mask_rate=0.0,
    most_hidden=1.0,
    time_mode="continuous",
    timestep_sampling="stratified",
    timesteps=16,
    masking_strategy="token",
    mean_span_length=3.0,
)


def flags(**changes):
    return SimpleNamespace(**{**BASE, **changes})


def tiny(model="primary", vocab=11, **changes):
    return tiny_model(model, vocab, shape=TINIER, **dict(memory_slots=3, conv_kernel=3) | changes)


class Uniform(nn.Module):
    """A denoiser that gives every allowed piece the same probability."""

    def __init__(self, vocab):
        super().__init__()
        self.cfg = SimpleNamespace(mask_id=vocab, pad_id=0, causal=False)
        self.head = SimpleNamespace(weight=torch.zeros(vocab + 1, 4), never=(0, vocab))

    def block_states(self, xt, x0, block, first=None):
        return torch.zeros(*xt.shape, 4)


@pytest.mark.parametrize("schedule", masking.SCHEDULES)
@pytest.mark.parametrize("low,high", [(0.0, 1.0), (0.05, 0.95), (0.2, 0.7)])
def test_weight_is_derived_from_alpha(schedule, low, high):
    t = torch.linspace(0.01, 0.99, 100, dtype=torch.float64)
    bounds, e = (schedule, low, high), 1e-5
    numeric = (masking.alpha(t + e, *bounds) - masking.alpha(t - e, *bounds)) / (2 * e)
    torch.testing.assert_close(masking.alpha_slope(t, *bounds), numeric, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        masking.weight(t, *bounds), -numeric / (1 - masking.alpha(t, *bounds)), atol=1e-4, rtol=1e-4
    )
    assert (masking.weight(t, *bounds) > 0).all()
    assert masking.alpha(torch.zeros(1), *bounds).item() == pytest.approx(1 - low, abs=1e-6)
    assert masking.alpha(torch.ones(1), *bounds).item() == pytest.approx(1 - high, abs=1e-6)


@pytest.mark.parametrize(
    "schedule,mode,strategy,low,high",
    [
        *itertools.product(
            masking.SCHEDULES, ("continuous", "discrete"), ("token", "span"), (0.0,), (1.0,)
        ),
        ("cosine", "continuous", "token", 0.1, 0.8),
        ("linear", "discrete", "span", 0.3, 1.0),
    ],
)
def test_uniform_predictor_scores_ln_v(schedule, mode, strategy, low, high):
    """Every schedule, mode and range: a uniform guess over the V allowed answers costs ln V nats
    per token.
    """
    vocab, rows = 50, 256
    net = Uniform(vocab)
    args = flags(
        mask_schedule=schedule,
        time_mode=mode,
        masking_strategy=strategy,
        min_mask_rate=low,
        most_hidden=high,
    )
    x0 = torch.randint(1, vocab, (rows, 24))
    d = masking.corrupt(args, 7, 3, rows, 24, 24)
    loss = masking.denoising_loss(net, x0, d, "elbo", masking.normaliser("elbo", d)).loss
    tolerance = 1e-6 if schedule == "linear" and mode == "continuous" else 0.01
    assert float(loss) == pytest.approx(math.log(vocab - 1), rel=tolerance)
    plain = masking.denoising_loss(
        net, x0, d, "masked_mean", masking.normaliser("masked_mean", d)
    ).loss
    assert float(plain) == pytest.approx(math.log(vocab - 1), rel=1e-6)


def test_bound_of_the_uniform_predictor_is_exact():
    nats, plain = masking.bound(Uniform(50), torch.randint(1, 50, (5, 23)), block=8, first=3)
    torch.testing.assert_close(nats, torch.full((5,), math.log(49)), atol=1e-5, rtol=1e-6)
    assert plain == pytest.approx(math.log(49), rel=1e-6)


@pytest.mark.parametrize("model", ["primary", "backup"])
def test_bound_agrees_with_brute_force(model):
    """Every mask of a 5-token text, enumerated: mean over k of the mean CE over k hidden tokens,
    and the code's estimate of it.

    The enumeration uses model(...) and a plain log-softmax; the code under test shares neither with
    it.
    """
    net, L = tiny(model), 5
    x0 = torch.tensor([[3, 7, 1, 9, 4]])
    by_count = {k: [] for k in range(1, L + 1)}
    with torch.no_grad():
        for bits in itertools.product((False, True), repeat=L):
            mask = torch.tensor([bits])
            if mask.any():
                xt = torch.where(mask, net.cfg.mask_id, x0)
                ce = -net(xt).double().log_softmax(-1).gather(-1, x0[..., None])[..., 0]
                by_count[sum(bits)].append(float(ce[mask].mean()))
    truth = sum(sum(v) / len(v) for v in by_count.values()) / L

    # the same sum through the code's own masks, weights and loss, one MaskSample per mask
    weighted = 0.0
    for bits in itertools.product((False, True), repeat=L):
        k = sum(bits)
        if k:
            mask = torch.tensor([bits])
            weight = torch.full(mask.shape, L / k)
            d = masking.MaskSample(mask, weight, torch.tensor([[k / L]]), L, L)
            loss = masking.denoising_loss(net, x0, d, "elbo", L).loss.detach()
            weighted += float(loss) / math.comb(L, k) / L
    assert weighted == pytest.approx(truth, abs=1e-6)

    draws = 4000                # and the estimator that training uses: unbiased, for both schedules
    for schedule in masking.SCHEDULES:
        d = masking.corrupt(flags(mask_schedule=schedule), 1, 0, draws, L, L)
        with torch.no_grad():
            estimate = float(
                masking.denoising_loss(net, x0.expand(draws, L), d, "elbo", draws * L).loss
            )
        assert estimate == pytest.approx(truth, rel=0.01), schedule


@pytest.mark.parametrize(
    "strategy,span", [("token", 3.0), ("span", 1.0), ("span", 3.0), ("span", 20.0)]
)
@pytest.mark.parametrize(
    "length,block,first", [(40, 40, 40), (40, 16, 16), (41, 16, 5), (7, 3, 1), (64, 1, 1)]
)
def test_masks_hit_their_count_exactly(strategy, span, length, block, first):
    args = flags(masking_strategy=strategy, mean_span_length=span)
    d = masking.corrupt(args, 5, 9, 64, length, block, first)
    edges = [0, *range(first, length, block), length]
    assert d.mask.shape == d.weight.shape == (64, length) and d.t.shape == (64, len(edges) - 1)
    for b, (lo, hi) in enumerate(itertools.pairwise(edges)):
        size = hi - lo
        wanted = torch.ceil(d.t[:, b] * size - 1e-9).clamp(min=1)
        assert (d.mask[:, lo:hi].sum(1) == wanted).all()
        torch.testing.assert_close(d.weight[:, lo].double(), size / wanted, rtol=1e-6, atol=0)


def test_spans_are_spans_and_tokens_are_not():
    def runs(strategy):
        args = flags(masking_strategy=strategy, mean_span_length=4.0)
        d = masking.corrupt(args, 0, 0, 400, 64, 64)
        starts = d.mask & ~torch.nn.functional.pad(d.mask[:, :-1], (1, 0))
        half = (d.t[:, 0] > 0.2) & (d.t[:, 0] < 0.3)
        return float(d.mask[half].sum() / starts[half].sum())
    assert runs("token") < 1.6 and runs("span") > 3.0


@pytest.mark.parametrize("mode", ["continuous", "discrete"])
def test_times_hit_each_stratum_once_over_the_whole_step(mode):
    rows, n = 12, 4                                     # rows x blocks of the step share one grid
    d = masking.corrupt(flags(time_mode=mode, timesteps=48), 3, 5, rows, 32, 8)
    cell = torch.floor(
        (1 - d.t if mode == "continuous" else d.t - 1 / 48) * rows * n + 1e-6
    ).flatten()
    assert sorted(cell.long().tolist()) == list(range(rows * n))


def test_strata_come_in_no_order():
    """Else a block's place in the row would say how much of it is hidden."""
    grids = torch.stack(
        [masking.strata(8, "stratified", torch.Generator().manual_seed(i)) for i in range(400)]
    )
    cells = (grids * 8).long()
    assert all(len(set(row)) == 8 for row in cells.tolist())
    assert all(len(set(column)) == 8 for column in cells.T.tolist()), (
        "a place that never sees some rates"
    )
    assert (grids.mean(0) - 0.5).abs().max() < 0.08


def test_each_purpose_has_its_own_stream(monkeypatch):
    """Block rule, single tokens, masks, exit and dropout of a step are independent draws."""
    real, asked = masking.step_generator, {}

    def kept(seed, step, purpose):
        generator = real(seed, step, purpose)
        asked.setdefault(purpose, []).append(
            (
                generator.initial_seed() % 2**32,
                float(torch.rand((), generator=real(seed, step, purpose))),
            )
        )
        return generator
    monkeypatch.setattr(masking, "step_generator", kept)
    masking.pick_blocks([8, 4], 8, 7, 3, single=1e-9)
    masking.corrupt(flags(), 7, 3, 2, 8, 4)
    masking.pick_exit(5, 7, 3)
    masking.step_generator(7, 3, "drop")
    assert len(asked) == 5 and all(len(times) == 1 for times in asked.values()), (
        "two draws share a purpose"
    )
    for part in (0, 1):
        assert len({times[0][part] for times in asked.values()}) == 5, asked
    names = ("mask", "blocks", "single", "exit", "drop", "bound", "compar", "0.15", "0.50", "0.85")
    assert len({real(7, 3, name).initial_seed() % 2 ** 32 for name in names}) == len(names)


def test_a_shorter_first_block_may_be_the_whole_block():
    """Half of the steps draw its length, evenly from 1 to the block: so 5 of 8 steps of blocks of 4
    begin with a whole one.
    """
    firsts = Counter(masking.pick_blocks([4], 16, 0, step)[1] for step in range(2000))
    assert set(firsts) == {1, 2, 3, 4} and firsts[4] / 2000 == pytest.approx(5 / 8, abs=0.04)
    assert all(firsts[n] / 2000 == pytest.approx(1 / 8, abs=0.03) for n in (1, 2, 3))


def test_strata_cut_the_variance():
    def spread(sampling):
        losses = []
        for step in range(300):
            d = masking.corrupt(flags(timestep_sampling=sampling), 1, step, 8, 64, 64)
            share = d.mask.float().mean(1, keepdim=True)
            # CE grows with the rate
            losses.append(float(((0.5 + 2.5 * share) * d.weight * d.mask).sum() / d.mask.numel()))
        return torch.tensor(losses).var().item()
    assert spread("stratified") * 2 < spread("uniform")


def test_fully_masked_rows_are_trained():
    """Decoding starts from them. By default they come in blocks of one token; a mixture without
    those hides whole rows.
    """
    full = sum(
        int(masking.corrupt(flags(), 0, step, 16, 16, 16).mask.all(1).sum()) for step in range(100)
    )
    assert full > 50  # k = L is one of 16 equally likely counts
    for changes, rules in (
        ({}, {1}),
        (dict(train_block_sizes="T,8"), {16}),
        (dict(loss="elbo", ar_fade=0.0), {1, 16}),
    ):
        args, found = TrainArgs(seq_len=16, max_steps=1000, **changes), Counter()
        for step in range(1000):
            block, first = masking.pick_blocks(
                args.block_choices, 16, 0, step, args.single_chance(step)
            )
            masks = masking.corrupt(args, 0, step, 2, 16, block, first)
            found[block] += int(masks.mask.all(1).sum())
        assert {block for block in found if found[block] > 5} >= rules and found.total() > 50, found


def test_corruption_is_a_function_of_seed_and_step():
    def one(seed, step):
        return masking.corrupt(flags(), seed, step, 8, 32, 8).mask
    assert torch.equal(one(1, 5), one(1, 5))
    assert not torch.equal(one(1, 5), one(1, 6)) and not torch.equal(one(1, 5), one(2, 5))
    torch.rand(10)                                      # global state plays no part
    assert torch.equal(one(1, 5), one(1, 5))


@pytest.mark.parametrize("model", ["primary", "backup"])
@pytest.mark.parametrize("kind", ["elbo", "masked_mean"])
def test_micro_batches_equal_one_big_batch(model, kind):
    """8 rows at once, 4 x 2 and 1 + 7 rows: the same loss and gradient, although their masked
    counts differ.
    """
    net = tiny(model)
    x0 = torch.randint(1, 11, (8, 20))
    d = masking.corrupt(flags(masking_strategy="span"), 2, 4, 8, 20, 8, 5)
    total = masking.normaliser(kind, d)

    def run(parts):
        net.zero_grad()
        loss = 0.0
        for part in parts:
            out = masking.denoising_loss(net, x0[part], d, kind, total, part)
            out.loss.backward()
            loss += float(out.loss.detach())
        return loss, torch.cat([p.grad.flatten() for p in net.parameters()])

    whole = run([slice(0, 8)])
    for parts in ([slice(a, a + 2) for a in range(0, 8, 2)], [slice(0, 1), slice(1, 8)]):
        split = run(parts)
        assert split[0] == pytest.approx(whole[0], rel=1e-6)
        torch.testing.assert_close(split[1], whole[1], atol=1e-6, rtol=1e-5)


def test_chunked_cross_entropy_equals_the_plain_one():
    torch.manual_seed(0)
    h, w, y = (
        torch.randn(37, 8, requires_grad=True),
        torch.randn(13, 8, requires_grad=True),
        torch.randint(1, 12, (37,)),
    )
    weight = torch.rand(37) + 0.1
    plain = torch.nn.functional.cross_entropy(
        (h @ w.T).index_fill(1, torch.tensor([0, 12]), -math.inf), y, reduction="none"
    )
    expected = torch.autograd.grad((plain * weight).sum(), (h, w))
    total, ce = masking.LinearCrossEntropy.apply(h, w, y, weight, [0, 12], 10, torch.float32)
    torch.testing.assert_close(ce, plain.detach())
    for got, want in zip(torch.autograd.grad(3 * total, (h, w)), expected, strict=True):
        torch.testing.assert_close(got, 3 * want, atol=1e-5, rtol=1e-5)


class Products(TorchDispatchMode):
    """Keeps the shapes of all matrix products, attention and convolutions that run inside."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in func.name() for word in ("mm", "convolution", "attention")):
            self.shapes.add(
                (func.name(), *(tuple(x.shape) for x in args if isinstance(x, torch.Tensor)))
            )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", ["primary", "backup"])
def test_the_number_of_hidden_tokens_makes_no_new_product(model):
    """oneDNN compiles and keeps a product for each shape: the shapes of a run have to be few,
    however many its steps.
    """
    args = TrainArgs(
        model=model,
        seq_len=64,
        timestep_sampling="uniform",
        train_block_sizes="T,16",
        max_steps=100,
    )
    net, products, counts = tiny(model, vocab=52, n_layers=1), Products(), set()
    for step in range(40):
        block, first = masking.pick_blocks(args.block_choices, 64, 1, step)
        masks = masking.corrupt(args, 1, step, 3, 64, block, first)
        counts.add(masks.masked_count)
        with products, torch.autocast("cpu", torch.bfloat16):
            masking.denoising_loss(net, torch.full((3, 64), 5), masks, "elbo", 1.0).loss.backward()
    assert len(counts) > 25, "too few different counts to prove anything"
    of_loss = {shapes for shapes in products.shapes if any(53 in shape for shape in shapes[1:])}
    assert len(of_loss) <= 3 * 3, of_loss  # three products of 64, 128 or 192 rows
    assert len(products.shapes - of_loss) <= 45, len(products.shapes - of_loss)


@pytest.mark.parametrize("dtype,close", [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_rows_that_fill_up_a_product_change_nothing(dtype, close):
    """Loss and gradients of any number of rows are those of the formula, and an answer never sees
    the filling.
    """
    for n in (1, 63, 64, 65, 300):
        g = torch.Generator().manual_seed(n)
        h, weight = (
            torch.randn(n, 24, generator=g).requires_grad_(),
            torch.randn(90, 24, generator=g).requires_grad_(),
        )
        target, w = torch.randint(1, 89, (n,), generator=g), torch.rand(n, generator=g)
        loss, each = masking.LinearCrossEntropy.apply(h, weight, target, w, [0, 89], 128, dtype)
        found = (loss, each, *torch.autograd.grad(loss, (h, weight)))
        z = (h.to(dtype) @ weight.to(dtype).T).float()
        z = z.index_fill(1, torch.tensor([0, 89]), -math.inf)
        each = nn.functional.cross_entropy(z, target, reduction="none")
        loss = (each * w).sum()
        for got, want in zip(
            found, (loss, each, *torch.autograd.grad(loss, (h, weight))), strict=True
        ):
            assert (got - want).abs().max() <= close * max(1, want.abs().max()), (n, got.shape)


def test_head_sees_masked_positions_only_and_never_the_mask_logit():
    """Raising the mask's and the pad's row of the head by 100 changes no loss; the head gets
    exactly the hidden rows.
    """
    net = tiny()
    x0 = torch.randint(1, 11, (4, 16))
    d = masking.corrupt(flags(), 0, 0, 4, 16, 16)
    seen = []
    real = masking.LinearCrossEntropy.apply
    masking.LinearCrossEntropy.apply = staticmethod(
        lambda h, *rest: (seen.append(len(h)), real(h, *rest))[1]
    )
    try:
        before = float(masking.denoising_loss(net, x0, d, "elbo", 1).loss)
    finally:
        masking.LinearCrossEntropy.apply = real
    assert seen == [int(d.mask.sum())]

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.cfg, self.head = (
                net.cfg,
                SimpleNamespace(weight=net.head.weight.detach().clone(), never=net.head.never),
            )
            self.head.weight[[0, 11]] += 100

        def block_states(self, *a, **k):
            return net.block_states(*a, **k)

    assert float(masking.denoising_loss(Shifted(), x0, d, "elbo", 1).loss) == pytest.approx(
        before, rel=1e-6
    )


def test_training_seeds_beyond_32_bits_are_other_seeds():
    draws = [
        torch.rand(4, generator=masking.step_generator(seed, 3, "mask")).tolist()
        for seed in (7, 7 + 2**32, 7 + 2**40)
    ]
    assert draws[0] != draws[1] != draws[2] != draws[0]
