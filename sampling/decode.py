"""Text out of a denoiser: one loop over blocks, one rule for which positions are revealed, an exact
cached context.

Used by sample.py, train.py, evaluate.py and edge_benchmark.py. The settings are in
sampling/settings.py, the rules in sampling/unmasking.py. Sees a denoiser only through the protocol
in model.py's docstring. Settings.mode says what is a block, and what a block sees:

    full          the whole continuation is one block, with the prompt inside it
                  (block rule B = T)
    block         left to right in blocks; the whole prefix is recomputed with each forward
                  (block rule B = T, prefix fixed)
    block_frozen  left to right in blocks; finished text is frozen into the cache
                  (block rule B = block, exact)

block_frozen in blocks of one token is the clean stream: its only forward reads the token before it
into the cache (exact, one row a token), whatever the rule and its steps. A causal model
(--objective ar) has nothing else, whatever was asked for. Guided or leaving early, a block of one
is a noisy block like any other.

Promises, tested with a fake denoiser on ten thousand cases: the prompt is untouched; no mask and no
pad is ever an answer; a block ends within `steps` forwards; no forward runs when nothing is masked;
NaN logits are an error, not an answer; the same seed gives the same text, whatever else is in the
batch. Rows whose prompts have different lengths are decoded in groups of equal length, so no row
ever sees another's padding. In bf16 (sample --precision) the last promise holds up to rounding: a
product of many rows may add up in another order than one of few, and where two tokens are nearly as
likely the text can then differ (5 of 144 texts; none in float32 and int8).

Legend: B rows, P tokens of the prompt, S positions of a block, T all positions, D width, N masked
positions that are looked at, V vocabulary rows.
"""
import dataclasses
import math
import os
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from common.console import UserError
from masking import folded
from sampling import unmasking
from sampling.settings import MODES
from sampling.unmasking import LOOKING, Look

PROMPT_TOKENS = 1024  # of a prompt that go through the network at once


class NotFinite(UserError, FloatingPointError):
    """The logits hold NaN or infinity: there is no answer, and the message says why."""


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
    """The rows of one group while they are written: their ids, how sure each choice was, which rows
    are finished, and each row's own randomness.
    """

    def __init__(self, ids, seeds, mask_id, keep_chance):
        self.ids = ids                                                             # (B, T)
        self.mask_id = mask_id
        self.keep_chance = keep_chance
        # the probability of each token when it was chosen
        self.chance = torch.ones(ids.shape, device=ids.device)                     # (B, T)
        self.done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)     # (B,)
        self.forwards = [0] * len(ids)
        self.generators = [torch.Generator().manual_seed(folded(seed)) for seed in seeds]

    def select(self, rows):
        """Keep only these rows."""
        self.ids = self.ids[rows]
        self.chance = self.chance[rows]
        self.done = self.done[rows]
        numbers = rows.tolist()
        self.forwards = [self.forwards[row] for row in numbers]
        self.generators = [self.generators[row] for row in numbers]


# ---- whole texts ---------------------------------------------------------------------------------

@torch.no_grad()
def generate(model, prompt, settings, seeds, on_step=None, on_block=None):
    """Continue prompts (BOS included), one row per seed, as a batch -> Result.

    prompt: ids for all rows, or one list of ids per row. on_step(canvas, lo, hi, step) after each
    forward, on_block(canvas, lo, hi) when a block is final.
    """
    if settings.mode not in MODES:
        raise UserError(f"decode mode {settings.mode!r} is none of {', '.join(MODES)}")
    if model.cfg.causal or settings.left_to_right:
        settings = one_token_at_a_time(settings)
    if prompt and isinstance(prompt[0], (list, tuple)):
        prompts = prompt
    else:
        prompts = [prompt] * len(seeds)
    started = time.perf_counter()
    B = len(prompts)
    result = Result([None] * B, [None] * B, row_forwards=[0] * B)
    for length in sorted({len(ids) for ids in prompts}):
        group = [row for row, ids in enumerate(prompts) if len(ids) == length]
        write_group(model, group, prompts, settings, seeds, result, on_step, on_block)
    result.seconds = time.perf_counter() - started
    return result


def one_token_at_a_time(settings):
    """What is left of any settings: one forward a token, so no order and no schedule. A second one
    would read the token before it into the cache again.
    """
    return dataclasses.replace(
        settings,
        mode="block_frozen",
        block_size=1,
        steps=1,
        sampler="confidence",
        alg_temp=0.0,
        remask=0.0,
        min_depth=0,
        guidance_scale=1.0,
    )


def write_group(model, group, prompts, settings, seeds, result, on_step, on_block):
    """Write the rows with these numbers, whose prompts have one length, and put them into result.
    """
    # The canvas: prompts, and masks behind them
    device = next(model.parameters()).device
    P = len(prompts[group[0]])
    T = P + settings.max_new_tokens
    must_fit(model, len(group), T, settings, device)
    ids = torch.full((len(group), T), model.cfg.mask_id, device=device)
    ids[:, :P] = torch.tensor([prompts[row] for row in group], device=device)
    keep_chance = bool(on_step) or settings.remask_rule == "conf"
    canvas = Canvas(ids, [seeds[row] for row in group], model.cfg.mask_id, keep_chance)

    # The cache, with the prompts in it
    cache = None
    if settings.mode == "block_frozen":
        room = positions_in_cache(T, settings)
        cache = model.new_cache(len(group), room)
        result.cache_bytes = max(result.cache_bytes, cache.nbytes)
        # left to right, the first forward reads the prompt's last token
        known = P - 1 if settings.left_to_right else P
        if known:
            for part in ids[:, :known].split(max(1, min(PROMPT_TOKENS, room // 2)), dim=1):
                model.step(part, cache)
            result.context_passes += 1  # one pass over the prompt, whatever its number of parts

    # Block after block; a finished row leaves the batch
    alive = group                     # the numbers of the rows that the canvas still holds
    lo = P
    while lo < T and alive:
        hi = min(T, lo + block_length(settings))
        forward = forward_of_block(model, cache, canvas, P, lo, hi, settings, result)
        forwards, layers = fill_block(model, canvas, lo, hi, forward, settings, on_step)
        result.forwards += forwards
        result.layer_passes += layers
        if on_block:
            on_block(canvas, lo, hi)
        lo = hi
        ending = canvas.done if lo < T else torch.ones_like(canvas.done)
        if ending.any():
            for at in ending.nonzero()[:, 0].tolist():
                row = alive[at]
                written = canvas.ids[at, :lo].tolist()
                result.row_forwards[row] = canvas.forwards[at]
                keep_answer(result, row, written, prompts[row], settings, model)
            going = (~ending).nonzero()[:, 0]
            alive = [alive[at] for at in going.tolist()]
            canvas.select(going)
            if cache is not None:
                cache.select(going)


def block_length(settings):
    """Tokens of a block: everything in mode full."""
    if settings.mode == "full":
        return settings.max_new_tokens
    return settings.block_size


def positions_in_cache(length, settings):
    return min(length, settings.window or length)


def keep_answer(result, row, ids, prompt, settings, model):
    """Check the promises about a finished row of ids, prompt included, and put it into result."""
    P = len(prompt)
    assert ids[:P] == list(prompt), "the prompt was changed"
    new = ids[P:]
    ended = settings.eos_id is not None and settings.eos_id in new
    if ended:
        new = new[:new.index(settings.eos_id) + 1]
    unanswered = {model.cfg.mask_id, model.cfg.pad_id} & set(new)
    assert not unanswered, "an answer holds a mask or a pad"
    result.full_rows[row] = new
    result.rows[row] = new[:-1] if ended else new


def must_fit(model, rows, length, settings, device):
    """Refuses what the machine cannot hold: the ids of all positions, and the logits of one block.
    """
    block = min(block_length(settings), settings.max_new_tokens)
    asked = rows * (length * 8 + block * model.cfg.vocab_size * 4)
    there = memory_of(device)
    if not there or asked <= there:
        return
    advice = "ask for fewer tokens"
    if settings.mode == "full":
        advice += ", or write them in blocks (--blockwise --frozen_context)"
    raise UserError(
        f"--max_new_tokens {settings.max_new_tokens}, {rows} texts at once: this takes at least "
        f"{asked / 2**30:,.0f} GB of memory, and {device} has {there / 2**30:,.0f}: {advice}"
    )


def memory_of(device):
    """Bytes of memory that the device has in all; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):                                  # Windows
        return None


@torch.no_grad()
def infill(model, ids, settings, seeds, on_step=None):
    """Fill every mask of one text (ids, BOS included), once per seed; everything else stays ->
    Result with whole rows.
    """
    if model.cfg.causal or settings.left_to_right:
        raise UserError(
            "this checkpoint was trained with --objective ar and sees only what stands before a "
            "gap: fill gaps with a checkpoint of --objective masked, or continue a --prompt"
        )
    started = time.perf_counter()
    # the text behind a gap is given: no EOS in a gap can end it
    settings = dataclasses.replace(settings, eos_id=None)
    mask_id = model.cfg.mask_id
    device = next(model.parameters()).device
    keep_chance = bool(on_step) or settings.remask_rule == "conf"
    canvas = Canvas(torch.tensor([ids] * len(seeds), device=device), seeds, mask_id, keep_chance)
    given = canvas.ids != mask_id
    before = canvas.ids.clone()

    # The whole text is one block
    forward = forward_of(model, None, canvas, 1, 0, len(ids), settings)
    result = Result([], [])
    if not given.all():
        result.forwards, result.layer_passes = fill_block(
            model, canvas, 0, len(ids), forward, settings, on_step
        )

    assert torch.equal(canvas.ids[given], before[given]), "fixed text was changed"
    result.rows = result.full_rows = canvas.ids.tolist()
    assert all(mask_id not in row for row in result.rows), "a gap is left"
    result.row_forwards = canvas.forwards
    result.seconds = time.perf_counter() - started
    return result


# ---- the forward of a block ----------------------------------------------------------------------

def forward_of_block(model, cache, canvas, P, lo, hi, settings, result):
    """forward_of, and the block before [lo, hi) joins the cache: in a pass of its own now, or in
    the first forward where the model can do both at once.
    """
    if cache is None or lo == P or settings.left_to_right:  # no block waits to join the cache
        return forward_of(model, cache, canvas, P, lo, hi, settings)
    size = block_length(settings)
    finished = canvas.ids[:, lo - size:lo]
    both_at_once = (
        hasattr(model, "step_and_states")
        and settings.guidance_scale == 1
        and not settings.min_depth
    )
    if both_at_once:
        forward = forward_of(model, cache, canvas, P, lo, hi, settings)
        return joins_first(model, cache, finished, lo, hi, forward)
    model.step(finished, cache)
    result.context_passes += 1
    return forward_of(model, cache, canvas, P, lo, hi, settings)


def forward_of(model, cache, canvas, P, lo, hi, settings):
    """The function (ids (B, T), depth) -> hidden states of [lo, hi); if guided, the same rows
    without their context follow.
    """
    if settings.left_to_right:
        return lambda ids, depth: model.step(ids[:, lo - 1:lo], cache)
    guided = settings.guidance_scale != 1
    if cache is not None:
        if not guided:
            return lambda ids, depth: model.states(ids[:, lo:hi], cache, depth)
        return both_contexts(model, cache, lo, hi)

    # nothing stands before the ids
    rows = len(canvas.ids)
    if not guided:
        empty = model.new_cache(rows, 0)
        return lambda ids, depth: model.states(ids[:, :hi], empty, depth)[:, lo:hi]
    empty = model.new_cache(2 * rows, 0)

    def both_sides(ids, depth):
        bare = ids[:, :hi].clone()
        bare[:, 1:P] = model.cfg.mask_id        # BOS stays: a text begins there, whatever it says
        both = torch.cat((ids[:, :hi], bare))
        return model.states(both, empty, depth)[:, lo:hi]
    return both_sides


def both_contexts(model, cache, lo, hi):
    """forward_of, guided, over a cache."""
    rows = len(cache.front)
    if hasattr(cache, "beside"):                # both sides in one batch
        both = cache.beside(model.new_cache(rows, 0))
        return lambda ids, depth: model.states(ids[:, lo:hi].repeat(2, 1), both, depth)
    contexts = (cache, model.new_cache(rows, 0))
    return lambda ids, depth: torch.cat(
        [model.states(ids[:, lo:hi], context, depth) for context in contexts]
    )


def joins_first(model, cache, finished, lo, hi, forward):
    """The same function whose first call also reads the finished block before it into the cache. A
    block always has a forward, as something in it is masked.
    """
    waiting = [finished]

    def first_then(ids, depth):
        if waiting:
            return model.step_and_states(waiting.pop(), ids[:, lo:hi], cache)
        return forward(ids, depth)
    return first_then


# ---- one block -----------------------------------------------------------------------------------

def fill_block(model, canvas, lo, hi, forward, settings, on_step=None):
    """Reveal canvas.ids[:, lo:hi] in place; forward(ids, depth) -> hidden states (B, S, D), twice
    as many rows if guided.

    Returns the forwards used, at most settings.steps, and their layers: none runs when no row looks
    at a position.
    """
    block = canvas.ids[:, lo:hi]                                                   # (B, S), a view
    to_decide = block == canvas.mask_id                                            # (B, S)

    # A rule with a schedule of its own keeps it: more steps than masks make ancestral sampling
    # better, and cost no forwards
    steps = settings.steps
    if not settings.remask and settings.sampler != "ancestral":
        most = int((to_decide & ~canvas.done[:, None]).sum(1).max())
        steps = min(steps, most)

    forwards = 0
    layers = 0
    for step in range(steps):
        masked = (block == canvas.mask_id) & ~canvas.done[:, None]                 # (B, S)
        if not masked.any():
            break

        # What each row does now
        turns = []
        for row in (~canvas.done).nonzero()[:, 0].tolist():
            turn = plan(
                canvas, row, lo, hi, masked[row], to_decide[row], step, steps, settings
            )
            if turn:
                turns.append(turn)

        # One forward for all rows, if any of them looks at a position
        logits = None
        if any(len(turn.look_at) for turn in turns):
            depth = depth_at(step, steps, settings.min_depth, model.cfg.n_layers)
            states = forward(canvas.ids, depth)
            logits = read_logits(model, states, len(block), turns, settings, step)
            forwards += 1
            layers += depth or model.cfg.n_layers

        # Tokens in, and what the rule takes back out
        heat = temperature(settings, step, steps)
        at = 0
        for turn in turns:
            looked = len(turn.look_at)
            if looked:
                reveal(canvas, turn, logits[at:at + looked], lo, hi, heat, settings)
                at += looked
            block[turn.row, turn.back] = canvas.mask_id

        # A row is finished when an EOS stands and nothing before it is masked
        if settings.eos_id is not None:
            whole_so_far = (block == canvas.mask_id).cumsum(1) == 0
            canvas.done |= ((block == settings.eos_id) & whole_so_far).any(1)
        if on_step:
            on_step(canvas, lo, hi, step)
    return forwards, layers


class Turn(NamedTuple):
    """What one row does at one forward; positions are counted inside the block."""
    row: int
    look_at: torch.Tensor             # masked positions whose logits are asked for
    count: int                        # how many of them the rule is asked to reveal; None: all
    back: torch.Tensor                # decided positions that become masks again


def plan(canvas, row, lo, hi, masked, to_decide, step, steps, settings):
    """The Turn of one row, or None: masked (S,) where it is masked now, to_decide (S,) where it was
    when the block began.
    """
    generator = canvas.generators[row]
    positions = masked.nonzero()[:, 0]                                             # (N,)
    none = positions[:0]
    if not len(positions):  # this row's block is complete, whatever its neighbours still do
        return None
    if step + 1 == steps:
        return Turn(row, positions, None, none)

    # What the schedule keeps masked, and which decided positions become masks again
    before = unmasking.masked_share(step, steps, settings.reveal)
    after = unmasking.masked_share(step + 1, steps, settings.reveal)
    back = none
    stay = after / before
    if settings.remask:
        chance = canvas.chance[row, lo:hi]
        decided = to_decide & ~masked
        back, stay = going_back(chance, decided, before, after, settings, generator)

    # Where the row looks, and how much it reveals there
    count = None
    if settings.sampler == "ancestral":
        chosen = unmasking.ancestral(len(positions), stay, generator)
        look_at = positions[chosen.to(positions.device)]
    else:
        if settings.remask:  # what goes back comes on top of the schedule
            target = round(int(to_decide.sum()) * after)
            back = back[:target]
            count = min(len(positions), max(0, len(positions) + len(back) - target))
        else:
            count = unmasking.reveal_count(len(positions), step, steps, settings.reveal)
        look_at = positions if count else none
        if settings.sampler == "random":
            chosen = unmasking.random(len(positions), count, generator)
            look_at = positions[chosen.to(positions.device)]
            count = None
    if not len(look_at) and not len(back):
        return None
    return Turn(row, look_at, count, back)


def going_back(chance, decided, before, after, settings, generator):
    """ReMDM: (positions that become masks again in random order, chance of a masked position to
    stay masked). before, after: the shares of the block that are masked before and after this step.
    """
    # sigma: the chance of a decided position to go back
    sigma_max = 0.0
    if before < 1:
        sigma_max = min(1.0, after / (1 - before))
    if settings.remask_rule == "cap":
        sigma = min(settings.remask, sigma_max)
    else:
        sigma = settings.remask * sigma_max
    stay = 1 - min(1.0, max(0.0, ((1 - after) - (1 - sigma) * (1 - before)) / before))

    positions = decided.nonzero()[:, 0]
    each = torch.full((len(positions),), sigma, dtype=torch.float64)
    if settings.remask_rule == "conf" and len(positions):
        # the unsure ones first, as many on average
        unsure = (-chance[positions].double().cpu()).softmax(0)
        each = (unsure * sigma * len(positions)).clamp(max=1.0)
    goes = torch.rand(len(positions), generator=generator, dtype=torch.float64) < each
    back = positions[goes.to(positions.device)]
    order = torch.randperm(len(back), generator=generator)
    return back[order.to(positions.device)], stay


def depth_at(step, steps, least, layers):
    """Layers of forward `step` of `steps`: from `least` to all, and all at the last one. None (all
    at every forward) if least is 0.
    """
    if not least:
        return None
    if step + 1 >= steps:
        return layers
    return min(layers, least + math.ceil((layers - least) * step / (steps - 1)))


def read_logits(model, states, rows, turns, settings, step):
    """Hidden states -> logits (N, V) of the positions that are looked at, all turns one after the
    other.
    """
    damaged = (
        f"the denoiser returned NaN or infinity at forward {step + 1}: the checkpoint is damaged, "
        "or its training went wrong; use an earlier one"
    )
    looked = torch.cat([states[turn.row, turn.look_at] for turn in turns])         # (N, D)
    logits = model.logits(looked)                                                  # (N, V)
    must_be_finite(logits, damaged)
    if settings.guidance_scale == 1:
        return logits

    # Guidance: away from what the model says without the context
    looked = torch.cat([states[rows + turn.row, turn.look_at] for turn in turns])
    bare = model.logits(looked)
    must_be_finite(bare, damaged)
    never = torch.isneginf(logits)
    logits = logits.log_softmax(-1)
    bare = bare.log_softmax(-1)
    # -inf - -inf is not a number
    guided = torch.where(never, logits, bare + settings.guidance_scale * (logits - bare))
    must_be_finite(
        guided,
        f"--guidance_scale {settings.guidance_scale:g} is too large: the guided logits overflow; "
        "1 to 5 is usual",
    )
    return guided


def must_be_finite(logits, message):
    """The largest of each row of logits (N, V) is a number: no NaN, no +inf, and something can be
    an answer.
    """
    if not torch.isfinite(logits.amax(-1)).all():
        raise NotFinite(message)


def temperature(settings, step, steps):
    """The temperature of forward `step` of `steps`: on a straight line to its end, if it has one.
    """
    start = settings.temperature
    end = settings.temperature_end
    if end is None:
        return start
    return start + step / max(1, steps - 1) * (end - start)


def reveal(canvas, turn, logits, lo, hi, heat, settings):
    """Choose among the positions of one row, draw their tokens, write them."""
    row = turn.row
    generator = canvas.generators[row]
    canvas.forwards[row] += 1
    if settings.repetition_penalty != 1:
        seen = canvas.ids[row, :hi].unique()
        seen = seen[seen != canvas.mask_id]
        logits = unmasking.discourage(logits, seen, settings.repetition_penalty)

    # Positions first, by what the model thinks; then their tokens
    look = Look(logits)
    chosen = slice(None)
    if turn.count is not None:
        chosen = LOOKING[settings.sampler](look, turn.count, settings, generator)
    tokens = unmasking.draw(logits[chosen], heat, settings, generator)
    positions = lo + turn.look_at[chosen]
    canvas.ids[row, positions] = tokens
    if canvas.keep_chance:
        chance = look.logp[chosen].gather(1, tokens[:, None])[:, 0].exp()
        canvas.chance[row, positions] = chance
