"""Masked diffusion: what is hidden, and what the answer costs. The project's mathematics in one
file.

Used by train.py and evaluate.py; knows no model (it calls model.block_states and reads model.head,
no more).

A schedule is one function alpha(t), the share of tokens still visible at time t in [0, 1].
Everything else is derived from it. Time t hides exactly k = ceil(L (1 - alpha(t))) of a block's L
tokens, never none, and each hidden token weighs
        -alpha'(t) / (k / L),
the familiar -alpha'/(1 - alpha) with the rate that was really used. Integrating over t gives every
k the same total weight, so
        E_t [ weight * sum of CE ] / L  =  mean over k = 1..L of (mean CE over k hidden tokens)
the exact-count form of the bound on -log p for every schedule, neither clipped nor biased
(docs/DIFFUSION_MODEL_DETAILED.md). With --time_mode discrete the counts are even only under the
linear schedule with a multiple of L levels; cosine's are uneven. Legend: R rows of the whole
optimizer step, T positions, S block, n blocks, D width, V vocabulary rows, N hidden positions.
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
    """-alpha'(t) / (1 - alpha(t)): what a hidden token weighs in the bound when tokens are hidden
    independently.
    """
    return -alpha_slope(t, *bounds) / (1 - alpha(t.double(), *bounds))


def folded(seed):
    """A seed of any size -> the 32 bits that PyTorch's generator on a CPU takes; a small seed is
    its own.

    Cut off, s and s + 2^32 would be one seed.
    """
    return (
        seed
        if 0 <= seed < 2**32
        else int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
    )


def step_generator(seed, step, purpose):
    """Randomness is a function of (seed, step, purpose), never of history: a resumed run sees the
    masks it would have seen.

    Two purposes differ in their first four letters, as PyTorch's generator on a CPU takes 32 bits
    of a seed.
    """
    mixed = (folded(seed) * 1_000_003 + step) * 1_000_003 + sum(
        ord(c) << (8 * i) for i, c in enumerate(purpose[:4])
    )
    return torch.Generator().manual_seed(mixed % (2 ** 63))


def strata(n, sampling, generator):
    """n numbers in [0, 1): one per n-th (a shared offset, then shuffled), or independent ones."""
    if sampling == "uniform":
        return torch.rand(n, generator=generator, dtype=torch.float64)
    grid = (
        torch.arange(n, dtype=torch.float64)
        + torch.rand((), generator=generator, dtype=torch.float64)
    ) / n
    # shuffled: or the rate would follow the block's place in the row
    return grid[torch.randperm(n, generator=generator)]


def hide(count, real, span, generator, part=slice(None)):
    """Boolean masks (..., S) with exactly `count` (...) of the `real` (..., S) positions hidden.

    span = 1: any positions. span > 1: runs of that mean length (geometric), the last one cut to hit
    the count exactly. Every position gets a priority, shared inside a run; the first `count` by
    priority are hidden. No loop over rows. part: only these rows are wanted; the numbers are drawn
    for all of them, so that the others' masks do not matter.
    """
    shape = (*count.shape, real.shape[-1])
    # (..., S) run number, 0..S
    run = (torch.rand(shape, generator=generator)[part] * span < 1.0).cumsum(-1)
    priority = torch.rand(*count.shape, shape[-1] + 1, generator=generator)[part].gather(-1, run)
    priority = priority.masked_fill(~real[part], math.inf)
    rank = priority.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)  # (..., S)
    return rank < count[part][..., None]


class MaskSample(NamedTuple):
    """The corruption of one optimizer step: of all its rows, or in mask and weight of those of one
    rank.
    """
    mask: torch.Tensor      # (R, T) bool, True = hidden
    weight: torch.Tensor    # (R, T) float32, -alpha'(t) / (k / L) of the position's block
    t: torch.Tensor         # (R, n) time of each block
    block: int
    first: int              # length of block 0
    masked_count: int = 0   # hidden tokens of the whole step


def corrupt(args, seed, step, rows, length, block, first=None, part=slice(None)):
    """Corruption for a whole optimizer step: rows x blocks share one stratified grid of times.
    part: only these rows' masks.
    """
    g = step_generator(seed, step, "mask")
    block = min(block, length)
    first = min(first or block, block)
    n = 1 + math.ceil((length - first) / block)
    at = torch.arange(n * block) - (block - first)  # position of each slot; outside: padding
    real = ((at >= 0) & (at < length)).view(n, block)                    # (n, S)
    size = real.sum(-1)  # (n,) tokens of each block
    u = strata(rows * n, args.timestep_sampling, g).view(rows, n)            # (R, n)
    bounds = args.mask_schedule, args.min_mask_rate, args.most_hidden
    if args.time_mode == "discrete":  # levels 1..N; the slope is the step's own difference quotient
        level = torch.floor(u * args.timesteps)
        t, before = (level + 1) / args.timesteps, level / args.timesteps
        slope = (alpha(t, *bounds) - alpha(before, *bounds)) * args.timesteps
    else:
        t = 1 - u                                       # in (0, 1]
        slope = alpha_slope(t, *bounds)
    count = torch.ceil((1 - alpha(t, *bounds)) * size - 1e-9).long().clamp(min=1)  # (R, n)
    span = args.mean_span_length if args.masking_strategy == "span" else 1.0
    mask = hide(count, real.expand(rows, n, block), span, g, part)                 # (R, n, S)
    weight = -slope / (args.most_hidden - args.min_mask_rate) * size / count     # (R, n)
    weight = weight.float()[part][..., None].expand(mask.shape)
    # (R, n, S)[:, real] -> (R, T)
    return MaskSample(mask[:, real], weight[:, real], t, block, first, int(count.sum()))


def pick_blocks(sizes, length, seed, step, single=0.0):
    """The block structure of this step: a size from the list, and for half of the steps a shorter
    first block.

    A prompt rarely ends on a multiple of the block; the shorter first block makes that a trained
    case. single: the chance that, whatever the list says, the blocks have one token.
    """
    if single and torch.rand((), generator=step_generator(seed, step, "single")) < single:
        return 1, 1
    g = step_generator(seed, step, "blocks")
    block = min(sizes[int(torch.randint(len(sizes), (), generator=g))], length)
    short = torch.rand((), generator=g) < 0.5 and block < length
    return block, int(torch.randint(1, block + 1, (), generator=g)) if short else block


def whole_rows(rows, length, part=slice(None)):
    """The sample of --objective ar: every token is a question, and no question weighs more than
    another.
    """
    ones = torch.ones(rows, length)
    return MaskSample(ones[part].bool(), ones[part], ones[:, :1], length, length, rows * length)


def shifted(x0, start):
    """What a causal model reads so that position i answers for token i: `start` (the mask's id),
    then all but the last.
    """
    return torch.cat((torch.full_like(x0[:, :1], start), x0[:, :-1]), dim=1)       # (B, T)


class LinearCrossEntropy(torch.autograd.Function):
    """sum_i w_i CE(h_i W^T, y_i) and each CE, in chunks: the logits of all positions never exist at
    once.

    The gradient is made in the forward pass, chunk by chunk, while the logits are there; backward
    only scales it. Each chunk is padded with rows of weight 0 to a multiple of ROWS. The number of
    hidden tokens differs at every step, and oneDNN compiles and keeps a product for each shape that
    it meets: without the padding, memory grows with the steps.
    """

    @staticmethod
    def forward(ctx, h, weight, target, w, never, chunk, dtype):
        matrix = weight.to(dtype)                                                  # (V, D)
        grads = ctx.needs_input_grad[0]
        dh = torch.empty_like(h) if grads else None
        dweight = torch.zeros_like(weight) if grads else None
        ce = torch.empty(len(h), dtype=torch.float32, device=h.device)
        for a in range(0, len(h), chunk):
            n = min(chunk, len(h) - a)
            more = -n % ROWS
            rows = F.pad(h[a:a + n].to(dtype), (0, 0, 0, more))                    # (n + more, D)
            y = F.pad(target[a:a + n], (0, more))[:, None]                         # (n + more, 1)
            z = (rows @ matrix.T).float()                                          # (n + more, V)
            z[:, never] = -math.inf
            z -= z.logsumexp(-1, keepdim=True)
            ce[a:a + n] = -z[:n].gather(1, y[:n])[:, 0]
            if grads:  # d CE / d logits = softmax - one hot
                z.exp_().scatter_add_(1, y, torch.full_like(z[:, :1], -1.0))
                dz = z.mul_(F.pad(w[a:a + n], (0, more))[:, None]).to(dtype)       # (n + more, V)
                dh[a:a + n] = (dz @ matrix)[:n]
                dweight += dz.T @ rows
        ctx.save_for_backward(dh, dweight)
        ctx.mark_non_differentiable(ce)
        return (ce * w).sum(), ce

    @staticmethod
    def backward(ctx, dtotal, _):
        dh, dweight = ctx.saved_tensors
        return dh * dtotal, dweight * dtotal, None, None, None, None, None


class Loss(NamedTuple):
    loss: torch.Tensor  # scalar to differentiate, already divided by the whole step's normaliser
    nll: torch.Tensor       # (N,) CE of each hidden token, detached
    masked: torch.Tensor    # (R', T) bool


def pick_exit(layers, seed, step):
    """The early exit that this step trains besides the last layer: 1 .. layers - 1."""
    return int(torch.randint(1, layers, (), generator=step_generator(seed, step, "exit")))


def denoising_loss(
    model, x0, masks, kind, normaliser, rows=slice(None), chunk=512, early=None, early_weight=0.0
):
    """The loss of some rows of a step: x0 (R', T) are the rows `rows` of the sample.

    1. hide the masked tokens (causal: shift by one instead)  2. run the denoiser  3. keep hidden
        positions only
    4. head + CE in chunks  5. weigh: "elbo" by `weight`, "masked_mean" by 1
    6. divide by the step's count: tokens (elbo) or hidden tokens
    """
    mask = masks.mask[rows].to(x0.device)
    xt = (
        shifted(x0, model.cfg.mask_id)
        if model.cfg.causal
        else torch.where(mask, model.cfg.mask_id, x0)
    )
    h = model.block_states(xt, x0, masks.block, masks.first, **({"early": early} if early else {}))
    h, h_early = h if early else (h, None)                                         # (R', T, D)
    h, y = h[mask], x0[mask]  # (N, D), (N,)
    w = (
        masks.weight[rows].to(x0.device)[mask]
        if kind == "elbo"
        else torch.ones_like(y, dtype=torch.float32)
    )
    device = h.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
    with torch.autocast(device, enabled=False):
        total, ce = LinearCrossEntropy.apply(
            h, model.head.weight, y, w, list(model.head.never), chunk, dtype
        )
        if early:
            extra, _ = LinearCrossEntropy.apply(
                h_early[mask], model.head.weight, y, w, list(model.head.never), chunk, dtype
            )
            total = total + early_weight * extra
    return Loss(total / normaliser, ce.detach(), mask)


class DenoisingLoss(torch.nn.Module):
    """denoising_loss of one model, as a module: what can be replicated."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return denoising_loss(self.model, *args, **kwargs)


def normaliser(kind, masks):
    """What one optimizer step's sum is divided by: all its tokens for the bound, its hidden tokens
    for the plain mean.
    """
    return len(masks.t) * masks.mask.shape[1] if kind == "elbo" else masks.masked_count


EXACT_COUNT = SimpleNamespace(
    mask_schedule="linear",
    min_mask_rate=0.0,
    most_hidden=1.0,
    time_mode="continuous",
    timestep_sampling="stratified",
    masking_strategy="token",
)


@torch.no_grad()
def row_bounds(
    model, x0, block, first=None, seed=0, batch=8, part=slice(None), piece=contextlib.nullcontext
):
    """What rows x0 (R, T) cost in nats, on the CPU: (R, 3), of each its bound per token, its plain
    sum of CE, its hidden tokens.

    Linear time, so every count weighs the same; stratified over rows and blocks; masks fixed by the
    seed. Of a causal model: the exact NLL, whatever block and seed. part: only these rows, with the
    masks that they have among all. piece: a context for each batch, in which a signal may end it.
    """
    R, T = x0.shape
    d = (
        whole_rows(R, T, part)
        if model.cfg.causal
        else corrupt(EXACT_COUNT, seed, 0, R, T, block, first, part)
    )
    x0, found = x0[part], []
    for a in range(0, len(x0), batch):
        rows = slice(a, a + batch)
        with piece():
            out = denoising_loss(model, x0[rows], d, "elbo", 1, rows)
        scored = torch.zeros(out.masked.shape, device=x0.device)
        scored[out.masked] = out.nll
        nats = (scored * d.weight[rows].to(x0.device)).sum(1) / T
        found.append(torch.stack((nats, scored.sum(1), out.masked.sum(1)), dim=1).cpu().double())
    return torch.cat(found)


def bound(model, x0, block, first=None, seed=0, batch=8):
    """The exact-count bound in nats per token for rows x0 (R, T): (means per row (R,), mean CE of
    hidden tokens).
    """
    nats, plain, masked_count = row_bounds(model, x0, block, first, seed, batch).unbind(1)
    return nats.float(), float(plain.sum() / masked_count.sum())
