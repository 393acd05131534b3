"""Text out of a denoiser: one loop over blocks, one rule for which positions are revealed, an exact cached context.

Used by sample.py, train.py and edge_benchmark.py. Sees a denoiser only through the protocol in model.py's docstring.

    full          the whole continuation is one block, the prompt is inside it         (block rule B = T)
    block         left to right in blocks; the whole prefix is recomputed with each     (block rule B = T, prefix fixed)
    block_frozen  left to right in blocks; what is finished is frozen into the cache    (block rule B = block, exact)

Promises, tested with a fake denoiser: the prompt is untouched; no mask and no pad is ever an answer; every forward reveals
at least one token of each unfinished row, so it ends within `steps` forwards per block; no forward runs when nothing is
masked; NaN logits are an error, not an answer; the same seed gives the same text, whatever else is in the batch.
Legend: B rows, P prompt, S block, V vocabulary rows.
"""
import math
import time
from dataclasses import dataclass, field

import torch

from knobs import UserError

MODES = ("full", "block", "block_frozen")


@dataclass
class Settings:
    """How to decode; sample.py fills it from the command line."""
    max_new_tokens: int
    steps: int                        # denoising forwards per block, an upper limit
    mode: str = "full"
    block_size: int = 64
    sampler: str = "confidence"       # which positions first
    reveal: str = "linear"            # how many at each forward
    temperature: float = 1.0
    temperature_end: float = None
    top_k: int = 0
    top_p: float = 1.0
    eos_id: int = None                # None: never stop early


@dataclass
class Result:
    rows: list                        # per row: new token ids, cut before the first EOS
    full_rows: list                   # per row: every new position that was decided, EOS included
    forwards: int = 0                 # denoising forwards
    context_passes: int = 0           # clean passes that filled the cache
    seconds: float = 0.0              # wall time, prompt included
    cache_bytes: int = 0
    steps: list = field(default_factory=list)


def reveal_count(masked, step, steps, rule):
    """How many of `masked` (those left now) to reveal at forward `step` of `steps`: never 0, and all at the last one.

    linear: equal shares. cosine: few at first, when little is known (MaskGIT). A running remainder keeps either exact.
    """
    left = steps - step
    if rule == "cosine":
        stay = math.cos(math.pi / 2 * (step + 1) / steps) / math.cos(math.pi / 2 * step / steps)
        return max(1, masked - math.floor(masked * stay + 1e-9))
    return math.ceil(masked / left)


def token_distribution(logits, temperature, top_k, top_p):
    """logits (N, V) -> float64 probabilities after temperature, top-k, top-p. float64: rare tokens keep their chance."""
    z = logits.double() / temperature
    if top_k and top_k < z.shape[-1]:
        z = z.masked_fill(z < z.topk(top_k, dim=-1).values[..., -1:], -math.inf)
    p = z.softmax(-1)
    if top_p < 1:
        sorted_p, order = p.sort(-1, descending=True)
        drop = sorted_p.cumsum(-1) - sorted_p >= top_p                             # keep until the mass before a token reaches p
        p = p.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def choose_positions(logits, masked, count, sampler, generator):
    """Which of one row's masked positions are revealed: logits (N, V) of those positions, masked (N,) -> (count,) positions."""
    if sampler == "random":
        score = torch.rand(len(masked), generator=generator).to(logits.device)
    else:  # probability of the best token, untempered; never the raw logit, which has no scale
        score = logits.float().softmax(-1).amax(-1)
    return score.topk(min(count, len(masked))).indices


def fill_block(model, canvas, lo, hi, forward, s, generators, done, on_step=None):
    """Reveal canvas[:, lo:hi] (B, T) in place; forward(canvas) -> hidden states (B, hi - lo, D). Returns forwards used."""
    mask_id = model.cfg.mask_id
    budget = min(s.steps, hi - lo)
    for step in range(budget):
        hidden_positions = (canvas[:, lo:hi] == mask_id) & ~done[:, None]          # (B, S)
        if not hidden_positions.any():
            return step
        h = forward(canvas)
        logits = model.logits(h[hidden_positions])                                 # (N, V): the head sees masked positions only
        if torch.isnan(logits).any():
            raise FloatingPointError(f"the denoiser returned NaN at forward {step + 1}; the checkpoint is damaged")
        anneal = step / max(1, s.steps - 1)
        heat = s.temperature if s.temperature_end is None else s.temperature + anneal * (s.temperature_end - s.temperature)
        start = 0
        for row, here in enumerate(hidden_positions):
            masked = here.nonzero()[:, 0]
            if not len(masked):
                continue
            z = logits[start:start + len(masked)]
            start += len(masked)
            count = reveal_count(len(masked), step, budget, s.reveal)
            chosen = choose_positions(z, masked, count, s.sampler, generators[row])
            if heat == 0:
                tokens = z[chosen].argmax(-1)
            else:
                p = token_distribution(z[chosen], heat, s.top_k, s.top_p)
                tokens = torch.multinomial(p.cpu(), 1, generator=generators[row])[:, 0].to(canvas.device)
            canvas[row, lo + masked[chosen]] = tokens
        if s.eos_id is not None:  # a row is finished when an EOS stands and nothing before it is masked
            block = canvas[:, lo:hi]
            done |= ((block == s.eos_id) & ((block == mask_id).cumsum(1) == 0)).any(1)
        if on_step:
            on_step(canvas, step)
    return budget


@torch.no_grad()
def generate(model, prompt, s, seeds, on_step=None):
    """Continue one prompt (list of ids, BOS included) once per seed, as a batch -> Result."""
    if s.mode not in MODES:
        raise UserError(f"decode mode {s.mode!r} is none of {', '.join(MODES)}")
    started = time.perf_counter()
    device = next(model.parameters()).device
    B, P, T = len(seeds), len(prompt), len(prompt) + s.max_new_tokens
    canvas = torch.full((B, T), model.cfg.mask_id, device=device)
    canvas[:, :P] = torch.tensor(prompt, device=device)
    generators = [torch.Generator().manual_seed(seed % 2 ** 63) for seed in seeds]
    done = torch.zeros(B, dtype=torch.bool, device=device)
    result = Result([], [])
    size = s.max_new_tokens if s.mode == "full" else s.block_size
    cache = None
    if s.mode == "block_frozen":
        cache = model.new_cache(B, T)
        result.cache_bytes = cache.nbytes
        first = P % size or size                # a context that is no multiple of the block starts with the shorter one
        for lo in [0, *range(first, P, size)]:
            model.commit(canvas[:, lo:min(P, first if lo == 0 else lo + size)], cache)
        result.context_passes += 1              # one pass over the prompt, whatever its number of blocks
    lo = P
    while lo < T and not bool(done.all()):
        hi = min(T, lo + size)
        if cache is not None:
            if lo > P:
                model.commit(canvas[:, lo - size:lo], cache)
                result.context_passes += 1
            forward = lambda c, lo=lo, hi=hi: model.hidden(c[:, lo:hi], cache)              # noqa: E731
        else:
            forward = lambda c, lo=lo, hi=hi: model.hidden(c[:, :hi])[:, lo:hi]             # noqa: E731
        result.forwards += fill_block(model, canvas, lo, hi, forward, s, generators, done, on_step)
        lo = hi
    result.seconds = time.perf_counter() - started
    for row in canvas[:, P:lo].tolist():
        if s.eos_id is not None and s.eos_id in row:
            row = row[:row.index(s.eos_id) + 1]
        assert model.cfg.mask_id not in row and model.cfg.pad_id not in row, "an answer holds a mask or a pad"
        result.full_rows.append(row)
        result.rows.append(row[:-1] if s.eos_id is not None and row[-1:] == [s.eos_id] else row)
    assert canvas[:, :P].tolist() == [list(prompt)] * B, "the prompt was changed"
    return result
