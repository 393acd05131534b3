"""The mathematics: schedules and their weights, exact counts, strata, the bound, the loss of both
streams and its normalisation over micro-batches.
"""
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tiny import TINIER, moved_away, nll_by_steps, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import masking
from config import TrainArgs

BASE = dict(
    mask_schedule="linear",
    min_mask_rate=0.0,
    max_mask_rate=1.0,
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
        self.cfg = SimpleNamespace(mask_id=vocab, pad_id=0, causal=False, interlaced=False)
        self.head = SimpleNamespace(weight=torch.zeros(vocab + 1, 4), never=(0, vocab))

    def both_states(self, x0, xt=None, block=None, first=None, with_clean=True, early=None):
        states = torch.zeros(*x0.shape, 4)
        return [(states, states)]


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
        max_mask_rate=high,
    )
    x0 = torch.randint(1, vocab, (rows, 24))
    d = masking.corrupt(args, 7, 3, rows, 24, 24)
    loss = masking.denoising_loss(net, x0, d, "elbo").loss
    tolerance = 1e-6 if schedule == "linear" and mode == "continuous" else 0.01
    assert float(loss) == pytest.approx(math.log(vocab - 1), rel=tolerance)
    plain = masking.denoising_loss(net, x0, d, "masked_mean").loss
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
            loss = masking.denoising_loss(net, x0, d, "elbo").loss.detach()
            weighted += float(loss) / math.comb(L, k) / L
    assert weighted == pytest.approx(truth, abs=1e-6)

    draws = 4000                # and the estimator that training uses: unbiased, for both schedules
    for schedule in masking.SCHEDULES:
        d = masking.corrupt(flags(mask_schedule=schedule), 1, 0, draws, L, L)
        with torch.no_grad():
            estimate = float(masking.denoising_loss(net, x0.expand(draws, L), d, "elbo").loss)
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


def test_single_steps_are_drawn_beside_the_list():
    """pick_blocks: the clean stream alone with the chance `single`, and otherwise just what the
    list would have given.
    """
    choices = [16, 8, 4]
    steps = range(2000)
    listed = [masking.pick_blocks(choices, 16, 3, step) for step in steps]
    assert {block for block, _ in listed} == {16, 8, 4}
    assert all(masking.pick_blocks(choices, 16, 3, step, 1.0) == (1, 1) for step in range(50))
    drawn = [masking.pick_blocks(choices, 16, 3, step, 0.3) for step in steps]
    assert drawn.count((1, 1)) / 2000 == pytest.approx(0.3, abs=0.03)
    assert all(got in ((1, 1), want) for got, want in zip(drawn, listed, strict=True))
    # who is drawn at a small chance is drawn at a larger one too
    more = [masking.pick_blocks(choices, 16, 3, step, 0.6) for step in steps]
    assert all(b == (1, 1) for a, b in zip(drawn, more, strict=True) if a == (1, 1))
    assert masking.pick_blocks([1], 16, 3, 0) == (1, 1)


def test_wholly_hidden_blocks_are_trained():
    """Decoding starts from them: with --max_mask_rate 1 every rule of the noisy stream meets them,
    by default only the smallest blocks do.
    """
    args = TrainArgs(seq_len=64, max_steps=1000)
    by_default = masking.corrupt(args, 0, 0, 64, 64, 16)
    assert not by_default.mask.view(64, 4, 16).all(-1).any()
    assert masking.corrupt(args, 0, 0, 64, 64, 4).mask.view(64, 16, 4).all(-1).any()
    args.max_mask_rate = 1.0
    found = Counter()
    steps = Counter()
    for step in range(1000):
        block, first = masking.pick_blocks(
            args.block_choices, 64, 0, step, args.single_chance(step)
        )
        steps[block] += 1
        if block > 1:
            masks = masking.corrupt(args, 0, step, 8, 64, block, first)
            whole = masks.mask[:, first:first + block] if block < 64 else masks.mask
            found[block] += int(whole.all(1).sum())
    assert set(steps) == {64, 32, 16, 4, 1}
    for block in (64, 32, 16, 4):  # k = L is one of L equally likely counts
        assert found[block] / steps[block] / 8 == pytest.approx(1 / block, rel=0.5), found


def test_corruption_is_a_function_of_seed_and_step():
    def one(seed, step):
        return masking.corrupt(flags(), seed, step, 8, 32, 8).mask
    assert torch.equal(one(1, 5), one(1, 5))
    assert not torch.equal(one(1, 5), one(1, 6)) and not torch.equal(one(1, 5), one(2, 5))
    torch.rand(10)                                      # global state plays no part
    assert torch.equal(one(1, 5), one(1, 5))


def sample(rows, length, share, **changes):
    """A step of 8 token blocks, first 5, whose clean stream weighs so much; 1: left to right alone.
    """
    if share == 1:
        return masking.left_to_right(rows, length)
    masks = masking.corrupt(flags(**changes), 2, 4, rows, length, 8, 5)
    return masks._replace(clean_share=share)


def gradient(net):
    """All parameters' gradients as one vector, and none left for the next."""
    found = []
    for p in net.parameters():
        found.append(torch.zeros(p.numel()) if p.grad is None else p.grad.flatten())
    net.zero_grad()
    return torch.cat(found)


def plain_ce(net, states, targets):
    """(N, D), (N,) -> (N,) without anything of the code's own loss."""
    return nn.functional.cross_entropy(net.logits(states), targets, reduction="none")


@pytest.mark.parametrize("model", ["primary", "backup"])
@pytest.mark.parametrize("kind", ["elbo", "masked_mean"])
@pytest.mark.parametrize("early", [None, 1])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_loss_is_that_of_each_stream_times_its_share(model, kind, early, share):
    """One head for both streams, against a forward and a plain cross-entropy for each: loss,
    gradient and the NLL that is reported; the logits of an early exit count beside the last.
    """
    net = tiny(model, exits=True)
    moved_away(net, 0.1)
    x0 = torch.randint(1, 11, (6, 20))
    masks = sample(6, 20, share)
    mask = masks.mask
    xt = torch.where(mask, net.cfg.mask_id, x0)
    weight = masks.weight[mask] / (6 * 20)
    if kind == "masked_mean":
        weight = torch.full_like(weight, 1 / int(mask.sum()))

    def loss_at(exit):
        total = 0.0
        ce = None
        if share < 1:
            found = net.both_states(x0, xt, 8, 5, with_clean=False, early=exit)
            ce = plain_ce(net, found[-1][1][mask], x0[mask])
            total = total + (1 - share) * (weight * ce).sum()
        if share > 0:
            clean, _ = net.both_states(x0, early=exit)[-1]
            clean_ce = plain_ce(net, clean.flatten(0, 1), x0.flatten())
            total = total + share * clean_ce.mean()
            ce = clean_ce if ce is None else ce
        return total, ce

    expected, nll = loss_at(None)
    if early:
        expected = expected + 0.3 * loss_at(early)[0]
    expected.backward()
    wanted = gradient(net)
    assert wanted.abs().max() > 0.01
    for chunk in (512, 64):
        out = masking.denoising_loss(
            net, x0, masks, kind, chunk=chunk, early=early, early_weight=0.3
        )
        out.loss.backward()
        assert float(out.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        torch.testing.assert_close(gradient(net), wanted, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(out.nll, nll.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["primary", "backup"])
@pytest.mark.parametrize("kind", ["elbo", "masked_mean"])
@pytest.mark.parametrize("early", [None, 1])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_micro_batches_equal_one_big_batch(model, kind, early, share):
    """8 rows at once, 4 x 2 and 1 + 7 rows: the same loss and gradient, although their masked
    counts differ.
    """
    net = tiny(model, exits=early is not None)
    x0 = torch.randint(1, 11, (8, 20))
    masks = sample(8, 20, share, masking_strategy="span")

    def run(parts):
        loss = 0.0
        for part in parts:
            out = masking.denoising_loss(
                net, x0[part], masks, kind, part, early=early, early_weight=0.5
            )
            out.loss.backward()
            loss += float(out.loss.detach())
        return loss, gradient(net)

    whole = run([slice(0, 8)])
    for parts in ([slice(a, a + 2) for a in range(0, 8, 2)], [slice(0, 1), slice(1, 8)]):
        split = run(parts)
        assert split[0] == pytest.approx(whole[0], rel=1e-6)
        torch.testing.assert_close(split[1], whole[1], atol=1e-6, rtol=1e-5)


def test_ranks_share_the_clean_stream_as_they_share_the_masks():
    """Each rank has a part of the rows of left_to_right and of corrupt, and divides by the whole
    step: their losses add up to the step's.
    """
    net = tiny()
    x0 = torch.randint(1, 11, (8, 20))
    for make in (
        lambda part: masking.left_to_right(8, 20, part),
        lambda part: masking.corrupt(flags(), 2, 4, 8, 20, 8, 5, part)._replace(clean_share=0.5),
    ):
        whole = make(slice(None))
        loss = float(masking.denoising_loss(net, x0, whole, "elbo").loss.detach())
        total = 0.0
        for part in (slice(0, 3), slice(3, 8)):
            masks = make(part)
            assert len(masks.mask) == part.stop - part.start
            assert masks.masked_count == whole.masked_count
            total += float(masking.denoising_loss(net, x0[part], masks, "elbo").loss.detach())
        assert total == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("model", ["primary", "backup"])
@torch.no_grad()
def test_blocks_of_one_token_are_the_exact_nll(model, causal):
    """masking.bound in blocks of one token, against decoding token by token: no mask, no seed, no
    difference between bound and plain mean.
    """
    net = tiny(model, causal=causal)
    moved_away(net, 0.1)
    x0 = torch.randint(1, 11, (5, 37))
    logp = nll_by_steps(net, x0)
    nats, plain = masking.bound(net, x0, 1, batch=2)
    torch.testing.assert_close(nats, logp.mean(1), atol=1e-5, rtol=1e-5)
    assert plain == pytest.approx(float(logp.mean()), rel=1e-5)
    again, _ = masking.bound(net, x0, 1, seed=9)
    torch.testing.assert_close(again, nats, atol=1e-6, rtol=1e-6)
    some = masking.row_bounds(net, x0, 1, part=slice(3, 5))[:, 0]
    torch.testing.assert_close(some.float(), nats[3:], atol=1e-6, rtol=1e-6)


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
    net = tiny(model, vocab=52, n_layers=1)
    counts = set()
    of_loss = set()
    forms = {}                                          # blocks of a row -> the other products
    for step in range(40):
        block, first = masking.pick_blocks(args.block_choices, 64, 1, step)
        masks = masking.corrupt(args, 1, step, 3, 64, block, first)
        if block < 64:
            masks = masks._replace(clean_share=0.5)
        counts.add(masks.masked_count)
        products = Products()
        with products, torch.autocast("cpu", torch.bfloat16):
            masking.denoising_loss(net, torch.full((3, 64), 5), masks, "elbo").loss.backward()
        of_head = {shapes for shapes in products.shapes if any(53 in s for s in shapes[1:])}
        of_loss |= of_head
        rest = products.shapes - of_head
        assert forms.setdefault(masks.t.shape[1], rest) == rest
    assert len(counts) > 25, "too few different counts to prove anything"
    assert len(of_loss) <= 3 * 6, of_loss  # three products of 64, 128, ... 384 rows
    assert set(forms) == {1, 4, 5}


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


@pytest.mark.parametrize("share, of_clean", [(0.0, 0), (0.5, 64), (1.0, 0)])
def test_the_head_sees_what_is_asked_and_never_the_mask_logit(monkeypatch, share, of_clean):
    """The masked positions and, if the clean stream is asked, all its rows, in one call; raising
    the mask's and the pad's row of the head by 100 changes no loss.
    """
    net = tiny()
    x0 = torch.randint(1, 11, (4, 16))
    masks = sample(4, 16, share)
    seen = []
    real = masking.LinearCrossEntropy.apply

    def counted(states, *rest):
        seen.append(len(states))
        return real(states, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(masking.LinearCrossEntropy, "apply", staticmethod(counted))
        before = float(masking.denoising_loss(net, x0, masks, "elbo").loss.detach())
    assert seen == [int(masks.mask.sum()) + of_clean]

    raised = net.head.weight.detach().clone()
    raised[[0, 11]] += 100
    other = SimpleNamespace(
        cfg=net.cfg,
        head=SimpleNamespace(weight=raised, never=net.head.never),
        both_states=net.both_states,
    )
    after = float(masking.denoising_loss(other, x0, masks, "elbo").loss.detach())
    assert after == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("share, asked", [(0.0, "noisy"), (0.5, "both"), (1.0, "clean")])
def test_a_stream_that_is_not_asked_is_not_run(share, asked):
    """denoising_loss says so to the model: whole rows do without the clean stream's answers, and
    left to right has no noisy rows.
    """
    net = Uniform(11)
    said = []

    def both_states(x0, xt=None, block=None, first=None, with_clean=True, early=None):
        said.append("clean" if xt is None else "both" if with_clean else "noisy")
        states = torch.zeros(*x0.shape, 4)
        return [(states if with_clean else None, None if xt is None else states)]

    net.both_states = both_states
    masking.denoising_loss(net, torch.ones(4, 16, dtype=torch.long), sample(4, 16, share), "elbo")
    assert said == [asked]


def test_training_seeds_beyond_32_bits_are_other_seeds():
    draws = [
        torch.rand(4, generator=masking.step_generator(seed, 3, "mask")).tolist()
        for seed in (7, 7 + 2**32, 7 + 2**40)
    ]
    assert draws[0] != draws[1] != draws[2] != draws[0]
