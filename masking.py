"""Masked diffusion: which tokens are masked, and what the answer costs. The project's mathematics
in one file.

Used by training, evaluate.py and the benchmarks. It knows no model: it calls model.both_states and
reads model.head, no more.

A schedule is one function alpha(t), the share of tokens still visible at time t in [0, 1].
Everything else is derived from it. Time t masks exactly k = ceil(L (1 - alpha(t))) of a block's L
tokens, never none, and each masked token weighs
        -alpha'(t) / (k / L),
the familiar -alpha'/(1 - alpha) with the rate that was really used. Integrating over t gives every
k the same total weight, so
        E_t [ weight * sum of CE ] / L  =  mean over k = 1..L of (mean CE over k masked tokens)
the exact-count form of the bound on -log p for every schedule, neither clipped nor biased
(docs/DIFFUSION_MODEL_DETAILED.md). With --time_mode discrete the counts are even only under the
linear schedule with a multiple of L levels; cosine's are uneven. Legend: R rows of the whole
optimizer step, R' rows of a micro-batch, T positions, S block, n blocks, D width, V vocabulary
rows, N masked positions.
"""
import contextlib
import hashlib
import math
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

ROWS = 64   # the rows of the loss's products are a multiple of this
SCHEDULES = {  # alpha(t) for the full range; min/max_mask_rate stretch it
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 1 - torch.sin(t * (math.pi / 2)),
}


def alpha(t, schedule="linear", low=0.0, high=1.0):
    """Share of visible tokens at time t, falling from 1 - low to 1 - high: the one definition of a
    schedule.
    """
    return 1 - (low + (high - low) * (1 - SCHEDULES[schedule](t)))


def alpha_slope(t, schedule="linear", low=0.0, high=1.0):
    """alpha'(t), by autograd from alpha, so that the weight cannot disagree with the schedule."""
    with torch.enable_grad():
        t = t.detach().double().requires_grad_()
        return torch.autograd.grad(alpha(t, schedule, low, high).sum(), t)[0]


def weight(t, *bounds):
    """-alpha'(t) / (1 - alpha(t)): what a masked token weighs in the bound when tokens are masked
    independently.
    """
    return -alpha_slope(t, *bounds) / (1 - alpha(t.double(), *bounds))


def folded(seed):
    """A seed of any size -> the 32 bits that PyTorch's generator on a CPU takes; a small seed is
    its own.

    If the upper bits were cut off instead, a seed and the seed + 2^32 would be the same.
    """
    if 0 <= seed < 2**32:
        return seed
    digest = hashlib.sha256(str(seed).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def step_generator(seed, step, purpose):
    """Randomness is a function of (seed, step, purpose), never of history: a resumed run sees the
    masks it would have seen.

    Two purposes differ in their first four letters, as PyTorch's generator on a CPU takes 32 bits
    of a seed.
    """
    number = 0
    for i, letter in enumerate(purpose[:4]):
        number += ord(letter) << (8 * i)
    mixed = (folded(seed) * 1_000_003 + step) * 1_000_003 + number
    return torch.Generator().manual_seed(mixed % (2 ** 63))


def strata(n, sampling, generator):
    """n numbers in [0, 1): one per n-th (a shared offset, then shuffled), or independent ones."""
    if sampling == "uniform":
        return torch.rand(n, generator=generator, dtype=torch.float64)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    grid = (torch.arange(n, dtype=torch.float64) + offset) / n
    # shuffled, or the rate would follow the block's place in the row
    return grid[torch.randperm(n, generator=generator)]


def hide(count, real, span, generator, part=slice(None)):
    """Boolean masks (..., S) with exactly `count` (...) of the `real` (..., S) positions masked.

    span = 1: any positions. span > 1: runs of that mean length (geometric), the last one cut to hit
    the count exactly. Every position gets a priority, shared inside a run; the first `count` by
    priority are masked. No loop over rows. part: only these rows are wanted; the numbers are drawn
    for all of them, so that the other ranks' masks do not matter.
    """
    S = real.shape[-1]

    # a run ends behind each position with the chance 1 / span: numbers of the runs, 0..S
    ends = torch.rand((*count.shape, S), generator=generator)[part] * span < 1.0
    run = ends.cumsum(-1)                                                          # (..., S)

    # a priority for each run, and last the positions that are padding
    priority = torch.rand((*count.shape, S + 1), generator=generator)[part]
    priority = priority.gather(-1, run).masked_fill(~real[part], math.inf)         # (..., S)

    # stable, so that the positions of one run stay beside each other
    order = priority.argsort(dim=-1, stable=True)
    rank = order.argsort(dim=-1, stable=True)                                      # (..., S)
    return rank < count[part].unsqueeze(-1)


class MaskSample(NamedTuple):
    """What one optimizer step asks: of all its rows, or in mask and weight of those of one rank.

    In blocks of one token the clean stream alone is asked, for every token.
    """
    mask: torch.Tensor      # (R, T) bool, True = masked
    weight: torch.Tensor    # (R, T) float32, -alpha'(t) / (k / L) of the position's block
    t: torch.Tensor         # (R, n) time of each block
    block: int
    first: int              # length of block 0
    masked_count: int = 0   # masked tokens of the whole step
    clean_share: float = 0.0        # of the clean stream in the loss; 0: it is not asked
    asked: torch.Tensor = None      # (R, T) bool, the responses of pairs; None: every token
    asked_count: int = 0            # of them, in the whole step

    @property
    def tokens(self):
        """What the whole step asks for."""
        return self.asked_count or len(self.t) * self.mask.shape[1]


def times(args, u):
    """Numbers u in [0, 1) -> the times of --time_mode, and the slope of alpha at each."""
    bounds = args.mask_schedule, args.min_mask_rate, args.max_mask_rate
    if args.time_mode != "discrete":
        t = 1 - u                                                                  # in (0, 1]
        return t, alpha_slope(t, *bounds)
    # levels 1..N; the slope is the step's own difference quotient
    level = torch.floor(u * args.timesteps)
    t = (level + 1) / args.timesteps
    before = level / args.timesteps
    return t, (alpha(t, *bounds) - alpha(before, *bounds)) * args.timesteps


def corrupt(
    args, seed, step, rows, length, block, first=None, part=slice(None), asked=None, ends=True
):
    """Corruption for a whole optimizer step: rows x blocks share one stratified grid of times.
    part: only these rows' masks. asked (R, T): the responses of pairs, nothing else is hidden but,
    with `ends`, what fills the block behind one.
    """
    generator = step_generator(seed, step, "mask")
    block = min(block, length)
    first = min(first or block, block)

    # n blocks of S places; the first and the last block may have fewer tokens than places
    n = 1 + math.ceil((length - first) / block)
    position = torch.arange(n * block) - (block - first)
    real = (position >= 0) & (position < length)
    real = real.view(n, block).expand(rows, n, block)                              # (R, n, S)
    hidden = real
    if asked is not None:
        hidden = in_blocks(asked, block - first, real, ends)
    size = hidden.sum(-1)                                                          # (R, n) tokens

    # the time of each block, and from it the exact count of masked tokens
    u = strata(rows * n, args.timestep_sampling, generator).view(rows, n)          # (R, n)
    t, slope = times(args, u)
    rate = 1 - alpha(t, args.mask_schedule, args.min_mask_rate, args.max_mask_rate)
    count = torch.ceil(rate * size - 1e-9).long().clamp(min=1).minimum(size)       # (R, n)

    # which ones
    span = 1.0
    if args.masking_strategy == "span":
        span = args.mean_span_length
    mask = hide(count, hidden, span, generator, part)                              # (R, n, S)

    # what each of them weighs: times drawn from a part of the range count for the whole of it
    weight = -slope / (args.max_mask_rate - args.min_mask_rate)
    weight = weight * size / count.clamp(min=1)                                    # (R, n)
    weight = weight.float()[part].unsqueeze(-1).expand(mask.shape)                 # (R, n, S)

    # (R, n, S)[:, real] -> (R, T)
    real = real[0]
    sample = MaskSample(mask[:, real], weight[:, real], t, block, first, int(count.sum()))
    return of_responses(sample, asked, part)


def in_blocks(asked, before, real, ends):
    """Where the noisy stream may hide tokens of pairs (R, n, S): responses, asked (R, T), and, with
    `ends`, what stands behind one in its last block. There EOS is the answer, as a sampler has a
    whole block to fill.
    """
    R, n, S = real.shape
    after = n * S - before - asked.shape[1]
    places = F.pad(asked, (before, after)).view(R, n, S)                           # (R, n, S)
    if ends:
        places = places.cumsum(-1) > 0
    return places & real


def of_responses(sample, asked, part):
    """The same sample, whose loss is that of the responses."""
    if asked is None:
        return sample
    return sample._replace(asked=asked[part], asked_count=int(asked.sum()))


def pick_blocks(sizes, length, seed, step, single=0.0):
    """The block structure of this step: a size from the list, and for half of the steps a shorter
    first block.

    A prompt rarely ends on a multiple of the block; the shorter first block makes that a trained
    case. single: the chance that, whatever the list says, the clean stream alone is asked.
    """
    if single:
        chance = torch.rand((), generator=step_generator(seed, step, "single"))
        if chance < single:
            return 1, 1
    generator = step_generator(seed, step, "blocks")
    choice = int(torch.randint(len(sizes), (), generator=generator))
    block = min(sizes[choice], length)
    short = torch.rand((), generator=generator) < 0.5
    if short and block < length:
        first = int(torch.randint(1, block + 1, (), generator=generator))
        return block, first
    return block, block


def left_to_right(rows, length, part=slice(None), asked=None):
    """The sample of the clean stream alone: every token is asked for, or those of the responses,
    asked (R, T), and all weigh the same.
    """
    ones = torch.ones(rows, length)
    if asked is None:
        weight = ones[part]
        return MaskSample(weight.bool(), weight, ones[:, :1], 1, 1, rows * length, 1.0)
    weight = asked[part].float()
    sample = MaskSample(asked[part], weight, ones[:, :1], 1, 1, int(asked.sum()), 1.0)
    return of_responses(sample, asked, part)


class LinearCrossEntropy(torch.autograd.Function):
    """sum_i w_i CE(h_i W^T, y_i) and each CE, in chunks: the logits of all positions never exist at
    once.

    The gradient is made in the forward pass, chunk by chunk, while the logits are there; backward
    only scales it. Each chunk is padded with rows of weight 0 to a multiple of ROWS. The number of
    masked tokens differs at every step, and oneDNN compiles and keeps a product for each shape that
    it meets: without the padding, memory grows with the steps.
    """

    @staticmethod
    def forward(ctx, states, weight, target, token_weight, never, chunk, dtype):
        with_gradient = ctx.needs_input_grad[0]
        matrix = weight.to(dtype)                                                  # (V, D)
        ce = torch.empty(len(states), dtype=torch.float32, device=states.device)   # (N,)
        d_states = None
        d_weight = None
        if with_gradient:
            d_states = torch.empty_like(states)                                    # (N, D)
            d_weight = torch.zeros_like(weight, dtype=torch.float32)               # (V, D)

        for start in range(0, len(states), chunk):
            n = min(chunk, len(states) - start)
            part = slice(start, start + n)
            padding = -n % ROWS
            h = F.pad(states[part].to(dtype), (0, 0, 0, padding))                  # (n', D)
            y = F.pad(target[part], (0, padding)).unsqueeze(1)                     # (n', 1)

            # log-probabilities, in the place of the logits
            z = (h @ matrix.T).float()                                             # (n', V)
            for row in never:
                z[:, row] = -math.inf
            z -= z.logsumexp(-1, keepdim=True)
            ce[part] = -z[:n].gather(1, y[:n])[:, 0]
            if not with_gradient:
                continue

            # d CE / d logits = softmax - one hot, in the same place again
            z.exp_().scatter_add_(1, y, torch.full_like(z[:, :1], -1.0))
            w = F.pad(token_weight[part], (0, padding)).unsqueeze(1)               # (n', 1)
            d_logits = z.mul_(w).to(dtype)                                         # (n', V)
            d_states[part] = (d_logits @ matrix)[:n]
            d_weight += d_logits.T @ h

        ctx.save_for_backward(d_states, d_weight)
        ctx.mark_non_differentiable(ce)
        return (ce * token_weight).sum(), ce

    @staticmethod
    def backward(ctx, d_total, _):
        d_states, d_weight = ctx.saved_tensors
        return d_states * d_total, d_weight * d_total, None, None, None, None, None


class Loss(NamedTuple):
    loss: torch.Tensor      # scalar to differentiate, a part of the whole step's mean
    nll: torch.Tensor       # (N,) CE of each masked token, detached
    masked: torch.Tensor    # (R', T) bool


def pick_exit(layers, seed, step):
    """The early exit that this step trains besides the last layer: 1 .. layers - 1."""
    return int(torch.randint(1, layers, (), generator=step_generator(seed, step, "exit")))


def denoising_loss(
    model, x0, masks, kind, rows=slice(None), chunk=512, early=None, early_weight=0.0
):
    """The loss of some rows of a step: x0 (R', T) are the rows `rows` of the sample `masks`.

    1. put the mask in the place of the masked tokens
    2. run both streams, or the one that is asked
    3. keep of the noisy stream the masked positions only
    4. weigh: the clean stream's tokens by 1, the masked ones by `weight` ("elbo") or by 1
       ("masked_mean"); each stream is divided by its count in the step, times its share
    5. head and CE of all that is asked, in chunks
    """
    mask = masks.mask[rows].to(x0.device)                                          # (R', T)
    clean_asked = masks.clean_share > 0
    noisy_asked = masks.clean_share < 1
    everywhere = masks.asked is None
    if not everywhere:
        asked_clean = masks.asked[rows].to(x0.device)                              # (R', T)
    xt = None
    if noisy_asked:
        xt = torch.where(mask, model.cfg.mask_id, x0)
    found = model.both_states(x0, xt, masks.block, masks.first, clean_asked, early)

    # the targets of both streams one after the other, and what each weighs
    targets = []
    weights = []
    if clean_asked:
        targets.append(x0.flatten() if everywhere else x0[asked_clean])
        each = masks.clean_share / masks.tokens
        weights.append(torch.full((len(targets[0]),), each, device=x0.device))
    if noisy_asked:
        targets.append(x0[mask])
        weight = masks.weight[rows].to(x0.device)[mask]
        if kind != "elbo":
            weight = torch.ones_like(weight)
        share = 1 - masks.clean_share
        weights.append(weight * (share / normaliser(kind, masks)))
    targets = torch.cat(targets)                                                   # (N,)
    weights = torch.cat(weights)

    # the products run in autocast's type, the rest in float32
    device = x0.device.type
    head = model.head
    totals = []
    for clean, noisy in found:
        asked = []
        if clean_asked:
            asked.append(clean.flatten(0, 1) if everywhere else clean[asked_clean])
        if noisy_asked:
            asked.append(noisy[mask])
        states = torch.cat(asked)                                                  # (N, D)
        dtype = states.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            totals.append(LinearCrossEntropy.apply(
                states, head.weight, targets, weights, head.never, chunk, dtype
            ))
    loss, ce = totals[0]
    if early:
        loss = loss + early_weight * totals[1][0]
    nll = ce.detach()[-int(mask.sum()):]                        # the noisy stream's, if it is asked
    return Loss(loss, nll, mask)


class DenoisingLoss(torch.nn.Module):
    """denoising_loss of one model, as a module: what can be replicated."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return denoising_loss(self.model, *args, **kwargs)


def normaliser(kind, masks):
    """What one optimizer step's sum over masked tokens is divided by: all tokens that it asks for
    for the bound, its masked tokens for the plain mean.
    """
    if kind == "elbo":
        return masks.tokens
    return masks.masked_count


EXACT_COUNT = SimpleNamespace(
    mask_schedule="linear",
    min_mask_rate=0.0,
    max_mask_rate=1.0,
    time_mode="continuous",
    timestep_sampling="stratified",
    masking_strategy="token",
)


@torch.no_grad()
def row_bounds(
    model, x0, block, first=None, seed=0, batch=8, part=slice(None), piece=contextlib.nullcontext,
    asked=None,
):
    """What rows x0 (R, T) cost in nats, on the CPU: (R, 3), of each its bound per token, its plain
    sum of CE, its masked tokens.

    Linear time, so every count weighs the same; stratified over rows and blocks; masks fixed by the
    seed. In blocks of one token it is the clean stream's exact NLL, whatever the seed. part: only
    these rows, with the masks that they have among all. piece: a context for each batch, in which a
    signal may end it. asked (R, T): of pairs, the responses; "per token" is then per token of the
    mean response.
    """
    R, T = x0.shape
    if block == 1:
        masks = left_to_right(R, T, part, asked)
    else:
        ends = not model.cfg.interlaced
        masks = corrupt(EXACT_COUNT, seed, 0, R, T, block, first, part, asked, ends)
    tokens = masks.tokens / R
    x0 = x0[part]
    found = []
    for start in range(0, len(x0), batch):
        rows = slice(start, start + batch)
        with piece():
            out = denoising_loss(model, x0[rows], masks, "elbo", rows)
        ce = torch.zeros(out.masked.shape, device=x0.device)                       # (R', T)
        ce[out.masked] = out.nll
        nats = (ce * masks.weight[rows].to(x0.device)).sum(1) / tokens
        figures = torch.stack((nats, ce.sum(1), out.masked.sum(1)), dim=1)         # (R', 3)
        found.append(figures.cpu().double())
    return torch.cat(found)


def bound(model, x0, block, first=None, seed=0, batch=8, asked=None):
    """The exact-count bound in nats per token for rows x0 (R, T): (means per row (R,), mean CE of
    masked tokens).
    """
    nats, plain, masked_count = row_bounds(
        model, x0, block, first, seed, batch, asked=asked
    ).unbind(1)
    return nats.float(), float(plain.sum() / masked_count.sum())
