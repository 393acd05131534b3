"""Text out of a denoiser: one loop over blocks, one rule for which positions are revealed, an exact
cached context.

Used by sample.py, train.py and edge_benchmark.py; the rules are in sampling/unmasking.py. Sees a
denoiser only through the protocol in model.py's docstring.

    full          the whole continuation is one block, the prompt is inside it         (block rule B
        = T)
    block         left to right in blocks; the whole prefix is recomputed with each     (block rule
        B = T, prefix fixed)
    block_frozen  left to right in blocks; what is finished is frozen into the cache    (block rule
        B = block, exact)

    ar            --objective ar has this one mode, whatever was asked for: block_frozen with blocks
        of one token, whose only
                  forward reads the token before it                                     (exact)

Promises, tested with a fake denoiser on ten thousand cases: the prompt is untouched; no mask and no
pad is ever an answer; a block ends within `steps` forwards; no forward runs when nothing is masked;
NaN logits are an error, not an answer; the same seed gives the same text, whatever else is in the
batch. Rows whose prompts have different lengths are decoded in groups of equal length, so no row
ever sees another's padding. In bf16 (sample --precision) the last promise holds up to rounding: a
product of many rows may add up in another order than one of few, and where two tokens are nearly as
likely the text can then differ (5 of 144 texts; none in float32 and int8). Legend: B rows, P
prompt, S block, T all positions, V vocabulary rows.
"""
import dataclasses
import math
import os
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from common.console import UserError
from masking import folded, shifted
from sampling import unmasking
from sampling.settings import MODES
from sampling.unmasking import LOOKING, Look


class NotFinite(UserError, FloatingPointError):
    """The logits hold NaN or infinity: there is no answer, and the message says why."""


PROMPT_TOKENS = 1024  # of a prompt that go through the network at once, in whole blocks


@dataclass
class Result:
    rows: list                        # per row: new token ids, cut before the first EOS
    full_rows: list                   # per row: every new position that was decided, EOS included
    forwards: int = 0                 # denoising forwards, of all groups
    layer_passes: int = 0             # layers of those forwards
    context_passes: int = 0           # clean passes of their own that filled the cache
    seconds: float = 0.0              # wall time, prompt included
    cache_bytes: int = 0
    row_forwards: list = field(default_factory=list)  # per row: forwards while it was not finished


class Canvas:
    """The rows of one group while they are written: ids (B, T), how sure each choice was, who is
    finished, whose randomness.
    """

    def __init__(self, ids, seeds, mask_id, keep_chance):
        self.ids, self.mask_id, self.keep_chance = ids, mask_id, keep_chance
        # (B, T) probability when it was chosen
        self.chance = torch.ones(ids.shape, device=ids.device)
        self.done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.forwards = [0] * len(ids)
        self.generators = [torch.Generator().manual_seed(folded(seed)) for seed in seeds]

    def select(self, rows):
        """Keep only these rows."""
        self.ids, self.chance, self.done = self.ids[rows], self.chance[rows], self.done[rows]
        self.forwards, self.generators = (
            [x[i] for i in rows.tolist()] for x in (self.forwards, self.generators)
        )


class Turn(NamedTuple):
    """What one row does at one forward; positions are counted inside the block."""
    row: int
    look_at: torch.Tensor             # masked positions whose logits are asked for
    count: int                        # how many of them the rule is asked to reveal; None: all
    back: torch.Tensor                # decided positions that become masks again


def plan(canvas, row, lo, hi, here, start, step, steps, s):
    """The Turn of one row, or None: here (S,) its masked positions, start (S,) those that this
    block had to decide.
    """
    masked, generator = here.nonzero()[:, 0], canvas.generators[row]
    none = masked[:0]
    if not len(masked):  # this row's block is complete, whatever its neighbours still do
        return None
    if step + 1 == steps:
        return Turn(row, masked, None, none)
    before, after = (unmasking.masked_share(i, steps, s.reveal) for i in (step, step + 1))
    back, stay, count = none, after / before, None
    if s.remask:
        back, stay = going_back(
            canvas.chance[row, lo:hi], start & ~here, before, after, s, generator
        )
    if s.sampler == "ancestral":
        look_at = masked[unmasking.ancestral(len(masked), stay, generator).to(masked.device)]
    else:
        if s.remask:  # what goes back comes on top of the schedule
            target = round(int(start.sum()) * after)
            back = back[:target]
            count = min(len(masked), max(0, len(masked) + len(back) - target))
        else:
            count = unmasking.reveal_count(len(masked), step, steps, s.reveal)
        look_at = masked if count else none
        if s.sampler == "random":
            look_at = masked[unmasking.random(len(masked), count, generator).to(masked.device)]
    if not len(look_at) and not len(back):
        return None
    return Turn(row, look_at, count if s.sampler in LOOKING else None, back)


def going_back(chance, decided, before, after, s, generator):
    """ReMDM: (positions that become masks again in random order, chance of a masked position to
    stay masked).
    """
    sigma_max = min(1.0, after / (1 - before)) if before < 1 else 0.0
    sigma = min(s.remask, sigma_max) if s.remask_rule == "cap" else s.remask * sigma_max
    stay = 1 - min(1.0, max(0.0, ((1 - after) - (1 - sigma) * (1 - before)) / before))
    at = decided.nonzero()[:, 0]
    each = torch.full((len(at),), sigma, dtype=torch.float64)
    if s.remask_rule == "conf" and len(at):  # the unsure ones first, as many on average
        each = ((-chance[at].double().cpu()).softmax(0) * sigma * len(at)).clamp(max=1.0)
    gone = at[(torch.rand(len(at), generator=generator, dtype=torch.float64) < each).to(at.device)]
    return gone[torch.randperm(len(gone), generator=generator).to(at.device)], stay


def fill_block(model, canvas, lo, hi, forward, s, on_step=None):
    """Reveal canvas.ids[:, lo:hi] in place; forward(ids, depth) -> hidden states (B, S, D), twice
    as many rows if guided.

    Returns the forwards used, at most s.steps, and their layers: none runs when no row looks at a
    position.
    """
    block = canvas.ids[:, lo:hi]                                                   # (B, S), a view
    start = block == canvas.mask_id
    most = int((start & ~canvas.done[:, None]).sum(1).max())
    # a rule with a schedule of its own keeps it: more steps than masks make ancestral sampling
    # better, and cost no forwards
    steps = s.steps if s.remask or s.sampler == "ancestral" else min(s.steps, most)
    used = layers = 0
    for step in range(steps):
        masked = (block == canvas.mask_id) & ~canvas.done[:, None]                 # (B, S)
        if not masked.any():
            break
        turns = [plan(canvas, row, lo, hi, masked[row], start[row], step, steps, s)
                 for row in range(len(block)) if not canvas.done[row]]
        turns = [t for t in turns if t]
        if any(len(t.look_at) for t in turns):
            depth = depth_at(step, steps, s.min_depth, model.cfg.n_layers) if s.min_depth else None
            logits = read(model, forward(canvas.ids, depth), len(block), turns, s, step)
            used, layers = used + 1, layers + (depth or model.cfg.n_layers)
        heat, at = temperature(s, step, steps), 0
        for t in turns:
            if len(t.look_at):
                reveal(canvas, t, logits[at:at + len(t.look_at)], lo, hi, heat, s)
                at += len(t.look_at)
            block[t.row, t.back] = canvas.mask_id
        # a row is finished when an EOS stands and nothing before it is masked
        if s.eos_id is not None:
            canvas.done |= ((block == s.eos_id) & ((block == canvas.mask_id).cumsum(1) == 0)).any(1)
        if on_step:
            on_step(canvas, lo, hi, step)
    return used, layers


def depth_at(step, steps, least, layers):
    """Layers of forward `step` of `steps`: from `least` to all, and all at the last one."""
    return (
        layers
        if step + 1 >= steps
        else min(layers, least + math.ceil((layers - least) * step / (steps - 1)))
    )


def read(model, h, rows, turns, s, step):
    """Hidden states -> logits (N, V) of the positions that are looked at, all turns one after the
    other.
    """
    z = model.logits(torch.cat([h[t.row, t.look_at] for t in turns]))
    damaged = (
        f"the denoiser returned NaN or infinity at forward {step + 1}: the checkpoint is damaged, "
        "or its training went "
        "wrong; use an earlier one"
    )
    must_be_finite(z, damaged)
    if s.guidance_scale == 1:
        return z
    bare = model.logits(torch.cat([h[rows + t.row, t.look_at] for t in turns]))
    must_be_finite(bare, damaged)
    never = torch.isneginf(z)
    z, bare = z.log_softmax(-1), bare.log_softmax(-1)
    # -inf - -inf is not a number
    guided = torch.where(never, z, bare + s.guidance_scale * (z - bare))
    must_be_finite(
        guided,
        f"--guidance_scale {s.guidance_scale:g} is too large: the guided logits overflow; 1 to 5 "
        "is usual",
    )
    return guided


def must_be_finite(z, message):
    """The largest of each row of logits (N, V) is a number: no NaN, no +inf, and something can be
    an answer.
    """
    if not torch.isfinite(z.amax(-1)).all():
        raise NotFinite(message)


def temperature(s, step, steps):
    if s.temperature_end is None:
        return s.temperature
    return s.temperature + step / max(1, steps - 1) * (s.temperature_end - s.temperature)


def reveal(canvas, turn, logits, lo, hi, heat, s):
    """Choose among the positions of one row, draw their tokens, write them."""
    row, generator = turn.row, canvas.generators[turn.row]
    canvas.forwards[row] += 1
    if s.repetition_penalty != 1:
        seen = canvas.ids[row, :hi].unique()
        logits = unmasking.discourage(logits, seen[seen != canvas.mask_id], s.repetition_penalty)
    look = Look(logits)
    chosen = (
        slice(None) if turn.count is None else LOOKING[s.sampler](look, turn.count, s, generator)
    )
    tokens = unmasking.draw(logits[chosen], heat, s, generator)
    at = lo + turn.look_at[chosen]
    canvas.ids[row, at] = tokens
    if canvas.keep_chance:
        canvas.chance[row, at] = look.logp[chosen].gather(1, tokens[:, None])[:, 0].exp()


@torch.no_grad()
def generate(model, prompt, s, seeds, on_step=None, on_block=None):
    """Continue prompts (BOS included), one row per seed, as a batch -> Result.

    prompt: ids for all rows, or one list of ids per row. on_step(canvas, lo, hi, step) after each
    forward, on_block(canvas, lo, hi) when a block is final.
    """
    if s.mode not in MODES:
        raise UserError(f"decode mode {s.mode!r} is none of {', '.join(MODES)}")
    if model.cfg.causal:
        s = dataclasses.replace(
            s,
            mode="block_frozen",
            block_size=1,
            steps=1,
            sampler="confidence",
            remask=0.0,
            min_depth=0,
            guidance_scale=1.0,
        )
    prompts = prompt if prompt and isinstance(prompt[0], (list, tuple)) else [prompt] * len(seeds)
    started = time.perf_counter()
    B = len(prompts)
    result = Result([None] * B, [None] * B, row_forwards=[0] * B)
    for length in sorted({len(p) for p in prompts}):
        group = [i for i, p in enumerate(prompts) if len(p) == length]
        write_group(model, group, prompts, s, seeds, result, on_step, on_block)
    result.seconds = time.perf_counter() - started
    return result


def write_group(model, group, prompts, s, seeds, result, on_step, on_block):
    """Rows whose prompts have one length, from prompt to result."""
    device, mask_id = next(model.parameters()).device, model.cfg.mask_id
    P = len(prompts[group[0]])
    T = P + s.max_new_tokens
    must_fit(model, len(group), T, s, device)
    ids = torch.full((len(group), T), mask_id, device=device)
    ids[:, :P] = torch.tensor([prompts[i] for i in group], device=device)
    canvas = Canvas(
        ids, [seeds[i] for i in group], mask_id, bool(on_step) or s.remask_rule == "conf"
    )
    size = s.max_new_tokens if s.mode == "full" else s.block_size
    cache = None
    if s.mode == "block_frozen":
        cache = model.new_cache(len(group), min(T, s.window or T))
        result.cache_bytes = max(result.cache_bytes, cache.nbytes)
        if model.cfg.causal:  # all but the prompt's last token, which the first forward reads
            read, most = shifted(ids[:, :P], mask_id), max(1, min(T, s.window or T) // 2)
            for lo in range(0, P, most):
                model.step(read[:, lo:lo + most], cache)
        else:
            # a context that is no multiple of the block starts with the shorter one
            first = P % size or size
            model.commit(ids[:, :first], cache)
            most = max(1, PROMPT_TOKENS // size) * size
            for lo in range(first, P, most):
                model.commit(ids[:, lo:min(P, lo + most)], cache, size)
        result.context_passes += 1  # one pass over the prompt, whatever its number of blocks
    alive = list(range(len(group)))             # rows of the group that the canvas still holds
    rows = [None] * len(group)
    lo = P
    while lo < T and alive:
        hi = min(T, lo + size)
        # to be committed
        due = (
            canvas.ids[:, lo - size : lo]
            if cache is not None and lo > P and not model.cfg.causal
            else None
        )
        shared = (
            hasattr(model, "commit_and_states")
            and hi - lo == size
            and s.guidance_scale == 1
            and not s.min_depth
        )
        if due is not None and not shared:
            model.commit(due, cache)
            due, result.context_passes = None, result.context_passes + 1
        forward = forward_of(model, cache, P, lo, hi, s)
        if due is not None:
            forward = commits_first(model, cache, due, lo, hi, forward)
        forwards, layers = fill_block(model, canvas, lo, hi, forward, s, on_step)
        result.forwards, result.layer_passes = (
            result.forwards + forwards,
            result.layer_passes + layers,
        )
        if on_block:
            on_block(canvas, lo, hi)
        lo = hi
        going = (~canvas.done).nonzero()[:, 0] if lo < T else canvas.done.nonzero()[:0, 0]
        if len(going) < len(alive):             # finished rows leave the batch
            for at, row in enumerate(alive):
                if at not in going.tolist():
                    rows[row] = canvas.ids[at, :lo].tolist()
                    result.row_forwards[group[row]] = canvas.forwards[at]
            alive = [alive[at] for at in going.tolist()]
            canvas.select(going)
            if cache is not None:
                cache.select(going)
    for row, i in zip(rows, group, strict=True):
        assert row[:P] == list(prompts[i]), "the prompt was changed"
        new = row[P:]
        if s.eos_id is not None and s.eos_id in new:
            new = new[:new.index(s.eos_id) + 1]
        assert mask_id not in new and model.cfg.pad_id not in new, "an answer holds a mask or a pad"
        result.full_rows[i] = new
        result.rows[i] = new[:-1] if s.eos_id is not None and new[-1:] == [s.eos_id] else new


def must_fit(model, rows, length, s, device):
    """Refuses what the machine cannot hold: the ids of all positions, and the logits of one
    block's.
    """
    block = s.max_new_tokens if s.mode == "full" else min(s.block_size, s.max_new_tokens)
    asked = rows * (length * 8 + block * model.cfg.vocab_size * 4)
    there = memory_of(device)
    if there and asked > there:
        raise UserError(
            f"--max_new_tokens {s.max_new_tokens}, {rows} texts at once: this takes at least "
            f"{asked / 2**30:,.0f} GB of memory, and {device} has {there / 2**30:,.0f}: ask for "
            "fewer tokens"
            + ", or write them in blocks (--blockwise --frozen_context)"
            * (s.mode == "full")
        )


def memory_of(device):
    """Bytes of memory that the device has in all; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):                                  # Windows
        return None


def forward_of(model, cache, P, lo, hi, s):
    """The function (ids (B, T), depth) -> hidden states of [lo, hi); if guided, the same rows
    without their context follow.
    """
    mask_id = model.cfg.mask_id
    if model.cfg.causal:
        return lambda ids, depth: model.step(ids[:, lo - 1:lo], cache)
    if cache is not None:
        if s.guidance_scale == 1:
            return lambda ids, depth: model.states(ids[:, lo:hi], cache, depth)
        if hasattr(cache, "beside_empty"):      # both sides in one batch
            both = cache.beside_empty()
            return lambda ids, depth: model.states(ids[:, lo:hi].repeat(2, 1), both, depth)
        return lambda ids, depth: torch.cat(
            [model.states(ids[:, lo:hi], c, depth) for c in (cache, None)]
        )
    if s.guidance_scale == 1:
        return lambda ids, depth: model.states(ids[:, :hi], None, depth)[:, lo:hi]

    def both_sides(ids, depth):
        bare = ids[:, :hi].clone()
        bare[:, 1:P] = mask_id                  # BOS stays: a text begins there, whatever it says
        return model.states(torch.cat((ids[:, :hi], bare)), None, depth)[:, lo:hi]
    return both_sides


def commits_first(model, cache, due, lo, hi, forward):
    """The same function whose first call also commits the block before: every block has a forward,
    as something is masked.
    """
    waiting = [due]

    def first_then(ids, depth):
        if waiting:
            return model.commit_and_states(waiting.pop(), ids[:, lo:hi], cache)
        return forward(ids, depth)
    return first_then


@torch.no_grad()
def infill(model, ids, s, seeds, on_step=None):
    """Fill every mask of one text (ids, BOS included), once per seed; everything else stays ->
    Result with whole rows.
    """
    if model.cfg.causal:
        raise UserError(
            "this checkpoint was trained with --objective ar and sees only what stands before a "
            "gap: fill gaps with "
            "a checkpoint of --objective masked, or continue a --prompt"
        )
    started = time.perf_counter()
    # the text behind a gap is given: no EOS in a gap can end it
    s = dataclasses.replace(s, eos_id=None)
    mask_id, device = model.cfg.mask_id, next(model.parameters()).device
    canvas = Canvas(
        torch.tensor([ids] * len(seeds), device=device),
        seeds,
        mask_id,
        bool(on_step) or s.remask_rule == "conf",
    )
    given = canvas.ids != mask_id
    before = canvas.ids.clone()
    forward = forward_of(model, None, 1, 0, len(ids), s)
    result = Result([], [])
    if (~given).any():
        result.forwards, result.layer_passes = fill_block(
            model, canvas, 0, len(ids), forward, s, on_step
        )
    assert torch.equal(canvas.ids[given], before[given]), "fixed text was changed"
    result.rows = result.full_rows = canvas.ids.tolist()
    assert all(mask_id not in row for row in result.rows), "a gap is left"
    result.row_forwards = canvas.forwards
    result.seconds = time.perf_counter() - started
    return result
