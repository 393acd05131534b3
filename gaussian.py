"""Continuous diffusion on embeddings (--objective gaussian): how noise is added, what the answer
costs, and how it is taken away again. For it what masking.py is for masks.

Used by training, evaluate.py and sample.py. It knows no network: it calls what gaussian_model.py
has, no more.

A token is its embedding x0, E numbers of mean square 1. A time t in [0, 1] has one number, the
share of noise s in the variance; --noise_schedule says which:
        z = sqrt(1 - s) x0 + sqrt(s) noise,        s(0) = 0, s(1) = 1 exactly.
At t = 1 nothing of the text is left, so pure noise, where sampling begins, is what was trained. The
network answers which token each position holds, p(x | z); its guess of x0 is the mean embedding
under p. In terms of the signal-to-noise ratio SNR = (1 - s) / s, with steps that become infinitely
small, the bound on -log p of a text is (Kingma et al. 2021, Variational Diffusion Models)
        E [ -log p(x | z at s_min) ]  +  1/2 integral of |x0 - guess|^2 dSNR  +  0.
The last term is the prior's, and exactly 0, as z at t = 1 does not depend on the text. The bound is
that of the model that samples in small steps; it does not depend on the schedule.

Legend: R rows of the whole optimizer step, B rows of a forward, T positions, E numbers of an
embedding, D width, V vocabulary rows, N tokens of a chunk.
"""
import contextlib
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from masking import hide, step_generator, strata

AGAIN = 0.5         # share of the steps in which the network reads its first guess
PROMPTS = 0.25      # share of the rows whose beginning is known
GAPS = 0.25         # share of the rows of which all is known but gaps
GAP = 3.0           # tokens of a gap
LEAST = 1e-3        # share of noise out of which the bound reads the tokens
CHUNK = 512         # positions whose probabilities are there at once

SCHEDULES = {  # the share of noise at time t; t = 0 has none and t = 1 nothing else, exactly
    "linear": lambda t: t,
    "cosine": lambda t: torch.sin(t * (math.pi / 2)).square(),
    "sqrt": lambda t: t.sqrt(),
}


# ---- noise ---------------------------------------------------------------------------------------

def noise_at(t, schedule):
    """The share of noise at times t: the one definition of a schedule."""
    return SCHEDULES[schedule](t)


def snr_slope(t, schedule):
    """-d SNR / dt, by autograd from the schedule: what the bound weighs half a squared error by."""
    with torch.enable_grad():
        t = t.detach().double().requires_grad_()
        noise = noise_at(t, schedule)
        return -torch.autograd.grad(((1 - noise) / noise).sum(), t)[0]


def mixed(x0, noise, share):
    """z for embeddings x0, noise of the same shape, and the share of noise in the variance."""
    return (1 - share).sqrt() * x0 + share.sqrt() * noise


# ---- samplers ------------------------------------------------------------------------------------

class Step(NamedTuple):
    """One step of a sampler: from the share of noise `share` down to `after`."""
    z: torch.Tensor
    guess: torch.Tensor         # of x0, of z
    share: float
    after: float
    eta: float                  # of ddim
    draw: object                # -> new noise, of the shape of z
    guess_before: torch.Tensor  # of the step before, None at the first
    share_before: float


def posterior(z, x0, share, after):
    """q(z at `after` | z at `share`, x0), Ho et al. 2020 -> mean, variance."""
    kept = (1 - share) / (1 - after)            # of the variance of the signal, from after to share
    of_z = math.sqrt(kept) * after / share
    of_x0 = math.sqrt(1 - after) * (1 - kept) / share
    return of_z * z + of_x0 * x0, after / share * (1 - kept)


def ddpm(step):
    """The true posterior, with the guess as x0. Ho et al. 2020, Denoising Diffusion Probabilistic
    Models.
    """
    mean, variance = posterior(step.z, step.guess, step.share, step.after)
    return mean + math.sqrt(variance) * step.draw()


def ddim(step):
    """The same marginals with less noise: eta = 0 none, 1 as ddpm. Song et al. 2021, Denoising
    Diffusion Implicit Models.
    """
    _, variance = posterior(step.z, step.guess, step.share, step.after)
    variance = step.eta ** 2 * variance
    noise = (step.z - math.sqrt(1 - step.share) * step.guess) / math.sqrt(step.share)
    z = math.sqrt(1 - step.after) * step.guess + math.sqrt(step.after - variance) * noise
    if not variance:
        return z
    return z + math.sqrt(variance) * step.draw()


def dpmpp(step):
    """ddim with a guess that is carried on in a straight line from the last two, in half the
    logarithm of the SNR. Lu et al. 2022, DPM-Solver++ (2M). The first and the last step, which have
    an end at infinity, are ddim's.
    """
    guess = step.guess
    if step.after and step.guess_before is not None:
        size = half_log_snr(step.after) - half_log_snr(step.share)
        before = half_log_snr(step.share) - half_log_snr(step.share_before)
        guess = guess + size / (2 * before) * (guess - step.guess_before)
    return ddim(step._replace(guess=guess, eta=0.0))


def half_log_snr(share):
    """-infinity where nothing of the text is left."""
    if share == 1:
        return -math.inf
    return math.log((1 - share) / share) / 2


SAMPLERS = {"ddim": ddim, "ddpm": ddpm, "dpmpp": dpmpp}


def levels(steps):
    """The shares of noise of so many steps: steps + 1 numbers from 1 to 0, whatever the schedule of
    the training was. They are even in the angle between text and noise, as of "cosine": of unit
    variance, ddim's error is the least there.
    """
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return noise_at(t, "cosine").tolist()


def sample(denoise, z, shares, sampler, draw, eta):
    """From noise to embeddings. denoise(z, share, guess of the step before or None) -> guess of x0;
    draw() -> new noise of the shape of z.
    """
    guess = None
    share_before = None
    for share, after in pairwise(shares):
        guess_before = guess
        guess = denoise(z, share, guess_before)
        step = Step(z, guess, share, after, eta, draw, guess_before, share_before)
        z = SAMPLERS[sampler](step)
        share_before = share
    return z


# ---- what a step asks ----------------------------------------------------------------------------

class NoiseSample(NamedTuple):
    """What one optimizer step asks: of all its rows, or in `noise` of those of one rank."""
    t: torch.Tensor         # (R,) time of each row
    known: torch.Tensor     # (R, T) bool: tokens without noise, a prompt or what surrounds gaps
    asked: torch.Tensor     # (R, T) bool: tokens that are in the loss, none of them known
    noise: torch.Tensor     # (R, T, E)
    again: bool             # the network reads its own first guess
    schedule: str
    masked_count: int       # asked tokens of the whole step
    clean_share: float = 0.0            # there is no clean stream


def noisy_sample(args, seed, step, rows, length, part=slice(None), asked=None):
    """The times, the known tokens and the noise of a whole optimizer step, all as functions of
    (seed, step). asked (R, T): the responses of pairs, whose prompts are known.
    """
    generator = step_generator(seed, step, "gaussian")
    t = 1 - strata(rows, args.timestep_sampling, generator)                        # (R,) in (0, 1]
    again = bool(torch.rand((), generator=generator) < AGAIN)
    known = known_tokens(rows, length, generator)
    if asked is None:
        asked = ~known
    else:
        known = asked.cumsum(-1) == 0
    noise = torch.randn(rows, length, args.embed_dim, generator=generator)
    return NoiseSample(
        t, known[part], asked[part], noise[part], again, args.noise_schedule, int(asked.sum())
    )


def known_tokens(rows, length, generator):
    """(R, T) bool: nothing in most rows, in some a beginning, in some all but a few gaps."""
    kind = torch.rand(rows, 1, generator=generator)
    end = (torch.rand(rows, 1, generator=generator) * length).long()               # below T
    beginning = torch.arange(length) < end
    count = (torch.rand(rows, generator=generator) * length).long() + 1            # 1 to T
    everywhere = torch.ones(rows, length, dtype=torch.bool)
    around = ~hide(count, everywhere, GAP, generator)
    return torch.where(kind < PROMPTS, beginning, around) & (kind < PROMPTS + GAPS)


def held_out_sample(model, rows, length, asked=None):
    """A sample that does not depend on a training's settings: is there a finite loss?"""
    settings = SimpleNamespace(
        timestep_sampling="stratified", noise_schedule="linear", embed_dim=model.cfg.embed_dim
    )
    return noisy_sample(settings, 0, 0, rows, length, asked=asked)


# ---- the loss ------------------------------------------------------------------------------------

class Loss(NamedTuple):
    loss: torch.Tensor      # scalar to differentiate, a part of the whole step's mean


class GaussianLoss(torch.nn.Module):
    """gaussian_loss of one model, as a module: what can be replicated."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, sample, kind, rows=slice(None), **_):
        return gaussian_loss(self.model, ids, sample, kind, rows)


def gaussian_loss(model, ids, sample, kind, rows=slice(None)):
    """The loss of some rows of a step: ids (B, T) are the rows `rows` of the sample.

    1. add noise to the embeddings of all tokens that are not known
    2. in half of the steps guess once without a gradient: the network learns to read a guess
    3. run the network: p(x | z), and the guess of x0 under it
    4. weigh: for "elbo" half the squared error of the guess by the slope of the SNR; else the
       rounding cross-entropy -log p(x | z) plus half the squared error, all times alike
    """
    device = ids.device
    known = sample.known[rows].to(device)                                          # (B, T)
    t = sample.t[rows].to(device)                                                  # (B,)
    x0 = model.embed(ids)                                                          # (B, T, E)
    share = noise_at(t, sample.schedule).float()                                   # (B,)
    noisy = noisy_text(x0, sample.noise[rows].to(device), share, known)
    guess = None
    if sample.again:
        with torch.no_grad():
            guess = answers(model, ids, x0, noisy)[0]
    _, ce, squared = answers(model, ids, x0, noisy, guess)

    cost = ce + squared / 2
    if kind == "elbo":
        weight = snr_slope(t, sample.schedule).float()
        cost = squared / 2 * weight.unsqueeze(-1)
    # not a product: SEP, a known token of pairs, is never an answer and costs infinitely much
    cost = cost.masked_fill(~sample.asked[rows].to(device), 0)
    return Loss(cost.sum() / sample.masked_count)


class Noisy(NamedTuple):
    """What the network reads of some rows, beside a guess."""
    z: torch.Tensor         # (B, T, E), x0 where it is known
    share: torch.Tensor     # (B, T) of noise, 0 where it is known
    known: torch.Tensor     # (B, T) bool


def noisy_text(x0, noise, share, known):
    """Embeddings x0 (B, T, E) with their row's share of noise (B,)."""
    share = share.unsqueeze(-1).expand(known.shape).masked_fill(known, 0)          # (B, T)
    return Noisy(mixed(x0, noise, share.unsqueeze(-1)), share, known)


def answers(model, ids, x0, noisy, guess=None):
    """What the network makes of it -> its guess of x0 (B, T, E), in which known tokens are as they
    are, -log p of each token (B, T), the squared error of each guess (B, T).
    """
    known = noisy.known.unsqueeze(-1)
    if guess is None:
        guess = torch.where(known, x0, 0)
    states = model.states(noisy.z, noisy.share, guess)                             # (B, T, D)
    ce, guess = rounded(model, states, noisy.z, noisy.share, ids)
    guess = torch.where(known, x0, guess)
    return guess, ce, (guess - x0).square().sum(-1)


def rounded(model, states, z, share, ids):
    """-log p of the tokens (B, T), and the mean embedding under p (B, T, E). The probabilities of
    all positions never exist at once: those of a chunk are made again for the gradient.
    """
    def one_chunk(states, z, share, ids):
        log_p = model.log_p(states, z, share)                                      # (N, V)
        ce = -log_p.gather(1, ids.unsqueeze(1)).squeeze(1)                         # (N,)
        return ce, model.mean_embedding(log_p.exp())

    flat = [x.flatten(0, 1).split(CHUNK) for x in (states, z, share, ids)]
    ces, guesses = [], []
    for parts in zip(*flat, strict=True):
        if torch.is_grad_enabled():
            ce, guess = checkpoint(one_chunk, *parts, use_reentrant=False)
        else:
            ce, guess = one_chunk(*parts)
        ces.append(ce)
        guesses.append(guess)
    return torch.cat(ces).view(ids.shape), torch.cat(guesses).view(z.shape)  # (B, T), (B, T, E)


# ---- the bound -----------------------------------------------------------------------------------

@torch.no_grad()
def row_nats(model, ids, known, asked, times, noise):
    """What the asked tokens of rows (B, T) cost in nats, at one time of each row, times (B,) in
    (0, 1] -> (B, 3): the reconstruction out of the least noise; the integral of the squared error,
    by its value at that time; the plain sum of -log p there.

    The share of noise goes evenly from LEAST to 1. What the network reads beside z is its own first
    guess, a function of z: so "less noise, given z" is a proper step of a sampler.
    """
    x0 = model.embed(ids)
    least = noisy_text(x0, noise, torch.full_like(times, LEAST), known)
    _, at_least, _ = answers(model, ids, x0, least)

    share = LEAST + (1 - LEAST) * times
    noisy = noisy_text(x0, noise, share, known)
    first, _, _ = answers(model, ids, x0, noisy)
    _, ce, squared = answers(model, ids, x0, noisy, first)
    weight = (1 - LEAST) / share.square() / 2           # d SNR = d share / share^2
    parts = (at_least, weight.unsqueeze(-1) * squared, ce)
    return torch.stack([part.masked_fill(~asked, 0).sum(1) for part in parts], dim=1)


def window_nats(model, ids, given, end, times, generator, batch):
    """row_nats of windows (R, T) whose first `given` tokens are known, and those from `end` on
    neither known nor asked -> (R, 3), on the CPU.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    known = place < given                                                          # (T,)
    asked = ~known & (place < end)
    found = []
    for x, t in zip(ids.split(batch), times.split(batch), strict=True):
        noise = torch.randn(*x.shape, model.cfg.embed_dim, generator=generator)
        here = (known.expand(x.shape), asked.expand(x.shape))
        nats = row_nats(model, x, *here, t.to(x.device), noise.to(x.device))
        found.append(nats.cpu().double())
    return torch.cat(found)


@torch.no_grad()
def row_bounds(
    model, ids, block=None, first=None, seed=0, batch=8, part=slice(None),
    piece=contextlib.nullcontext, asked=None,
):
    """What rows (R, T) cost in nats, on the CPU, as masking.row_bounds: (R, 3), of each its bound
    per token, its plain sum of -log p at its time, its tokens. Times are stratified over the rows.
    There is one block, the whole row.
    """
    R, T = ids.shape
    generator = step_generator(seed, 0, "noisy bound")
    times = (1 - strata(R, "stratified", generator)).float()[part]                 # (R',)
    noise = torch.randn(R, T, model.cfg.embed_dim, generator=generator)[part]
    known = torch.zeros(R, T, dtype=torch.bool)
    if asked is None:
        asked = ~known
    else:
        known = asked.cumsum(-1) == 0
    tokens = asked.sum() / R
    known, asked, ids = known[part], asked[part], ids[part]
    found = []
    for start in range(0, len(ids), batch):
        rows = slice(start, start + batch)
        here = [x[rows].to(ids.device) for x in (ids, known, asked, times, noise)]
        with piece():
            nats = row_nats(model, *here)
        count = here[2].sum(1, keepdim=True)
        bound = nats[:, :2].sum(1, keepdim=True) / tokens
        found.append(torch.cat((bound, nats[:, 2:], count), dim=1).cpu().double())
    return torch.cat(found)
