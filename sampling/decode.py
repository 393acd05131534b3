"""Text out of a denoiser: one loop over blocks, one rule for which positions are revealed, an exact
cached context.

Used by sample.py, train.py, evaluate.py and edge_benchmark.py. The settings are in
sampling/settings.py, the rules in sampling/unmasking.py. It works on numpy arrays and imports no
torch, so that any engine can stand behind it. Settings.mode says what is a block, and what a block
sees:

    full          the whole continuation is one block, with the prompt inside it
                  (block rule B = T)
    block         left to right in blocks; the whole prefix is recomputed with each forward
                  (block rule B = T, prefix fixed)
    block_frozen  left to right in blocks; finished text is frozen into the cache
                  (block rule B = block, exact)

block_frozen in blocks of one token is the clean stream: its only forward reads the token before it
into the cache (exact, one row a token), whatever the rule and its steps. A causal model
(--objective ar) has nothing else, whatever was asked for. Guided or leaving early, a block of one
is a noisy block like any other. With the sampler speculate a block is a draft for the clean stream
(sampling/speculate.py); each row keeps a number of its own, so rows are written one by one.

Promises, tested with a fake denoiser on ten thousand cases (tests/stress/decode.py; the tests run a
quarter of them): the prompt is untouched; no mask and no pad is ever an answer; a block ends within
`steps` forwards; no forward runs when nothing is masked; NaN logits are an error, not an answer;
the same seed gives the same text, whatever else is in the batch. Rows whose prompts have different
lengths are decoded in groups of equal length, so no row ever sees another's padding. In bf16
(sample --precision) the last promise holds up to rounding: a product of many rows may add up in
another order than one of few, and where two tokens are nearly as likely the text can then differ (5
of 144 texts; none in float32 and int8).

The engine is seen only through these parts of the denoiser protocol (model.py's docstring says
what each of them means), with ids (rows, tokens) as int64 arrays. sampling/torch_model.py gives
them to a PyTorch model.
    model.cfg                           .mask_id .pad_id .vocab_size .n_layers .causal
    model.new_cache(rows, length)       .nbytes .select(rows), maybe .beside(other)
    model.step(x0, cache)               -> states, which stay as the engine likes them
    model.read(x0, cache)               maybe: step, and nobody asks for the states
    model.states(xt, cache, depth=None) -> states
    model.step_and_states(x0, xt, cache)
                                        maybe -> states of the block
    model.try_step(x0, cache), cache.keep(tokens)
                                        maybe, for speculate, of one row: states of step, and the
                                        first so many tokens join the context when keep is called;
                                        no states are asked between the two, and without keep the
                                        cache stays as it was
    model.round_cost                    maybe, for speculate: what states and try_step of 8 tokens
                                        take together, in steps of one token
    model.logits(states, rows, positions)
                                        (N,), (N,) of these states -> (N, V) float32, which the loop
                                        may change and has read when it asks for the next ones
    model.exact_rows                    maybe: are a row's numbers the same in any batch, up to the
                                        rounding of float32? Not with bf16 products, nor on a GPU
    model.device_memory()               maybe -> (name, bytes) of a device with memory of its own

Guidance: what the model says with the prompt, away from what it says without. Beyond 1 a token that
it hardly finds possible would win, if it is still rarer without the prompt: so none is lifted that
is less than PLAUSIBLE times as likely as the best one. A model of pairs was trained without
prompts, too, and Settings.null_prompt has the ids that stand for none: the response so far follows
them. Without it, the block stands alone.

Legend: B rows, P tokens of the prompt, S positions of a block, T all positions, N masked positions
that are looked at, V vocabulary rows.
"""
import dataclasses
import math
import os
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from common.console import UserError
from sampling import speculate, unmasking
from sampling.settings import MODES, must_suit_drafts
from sampling.unmasking import LOOKING, Look, must_be_finite

PROMPT_TOKENS = 1024  # of a prompt that go through the network at once
PLAUSIBLE = 0.1       # of the best token's chance


@dataclass
class Result:
    rows: list                        # per row: new token ids, cut before the first EOS
    full_rows: list                   # per row: every new position that was decided, EOS included
    forwards: int = 0                 # denoising forwards, of all groups
    layer_passes: int = 0             # layers of those forwards
    context_passes: int = 0           # clean passes of their own that filled the cache
    rounds: int = 0                   # drafts that were verified, of all rows
    accepted: int = 0                 # drafted tokens that were kept, of all rows
    seconds: float = 0.0              # wall time, prompt included
    cache_bytes: int = 0
    row_forwards: list = field(default_factory=list)  # per row: forwards while it was not finished


class Canvas:
    """The rows of one group while they are written: their ids, how sure each choice was, which rows
    are finished, and each row's own randomness.

    numbers: which of the rows of the whole request these are, as finished ones leave.
    """

    def __init__(self, ids, seeds, mask_id, keep_chance, numbers=None):
        self.ids = ids                                                             # (B, T)
        self.numbers = list(range(len(ids))) if numbers is None else list(numbers)
        self.mask_id = mask_id
        self.keep_chance = keep_chance
        # the probability of each token when it was chosen
        self.chance = np.ones(ids.shape, dtype=np.float32)                         # (B, T)
        self.done = np.zeros(len(ids), dtype=bool)                                 # (B,)
        self.bare = None                  # the cache without the prompt, of guided framed prompts
        self.forwards = [0] * len(ids)
        self.generators = [generator_of(seed) for seed in seeds]

    def select(self, rows):
        """Keep only these rows."""
        self.ids = self.ids[rows]
        self.chance = self.chance[rows]
        self.done = self.done[rows]
        self.numbers = [self.numbers[row] for row in rows]
        self.forwards = [self.forwards[row] for row in rows]
        self.generators = [self.generators[row] for row in rows]
        if self.bare is not None:
            self.bare.select(rows)


def generator_of(seed):
    """The randomness of one row. Any whole number is a seed of its own, a negative one, too."""
    return np.random.Generator(np.random.Philox(2 * abs(seed) + (seed < 0)))


# ---- whole texts ---------------------------------------------------------------------------------

def generate(model, prompt, settings, seeds, on_step=None, on_block=None):
    """Continue prompts (BOS included), one row per seed, as a batch -> Result.

    prompt: ids for all rows, or one list of ids per row. on_step(canvas, lo, hi, step) after each
    forward, on_block(canvas, lo, hi) when a block is final.
    """
    if settings.mode not in MODES:
        raise UserError(f"decode mode {settings.mode!r} is none of {', '.join(MODES)}")
    if model.cfg.causal or settings.left_to_right:
        settings = one_token_at_a_time(settings)
    must_suit_drafts(settings)
    if prompt and isinstance(prompt[0], (list, tuple)):
        prompts = prompt
    else:
        prompts = [prompt] * len(seeds)
    started = time.perf_counter()
    B = len(prompts)
    result = Result([None] * B, [None] * B, row_forwards=[0] * B)
    for length in sorted({len(ids) for ids in prompts}):
        group = [row for row, ids in enumerate(prompts) if len(ids) == length]
        if settings.speculates:
            for row in group:
                write_row(model, row, prompts, settings, seeds, result, on_step, on_block)
        else:
            write_group(model, group, prompts, settings, seeds, result, on_step, on_block)
    result.seconds = time.perf_counter() - started
    return result


def one_token_at_a_time(settings):
    """What is left of any settings: one forward a token, so no order and no schedule. A second one
    would read the token before it into the cache again. Guidance has a cache of its own, which
    begins with the null prompt, if there is one.
    """
    guidance = settings.guidance_scale if settings.null_prompt else 1.0
    return dataclasses.replace(
        settings,
        mode="block_frozen",
        block_size=1,
        steps=1,
        sampler="confidence",
        alg_temp=0.0,
        remask=0.0,
        min_depth=0,
        guidance_scale=guidance,
    )


def begin(model, group, prompts, settings, seeds, result, keep_chance):
    """The rows with these numbers, whose prompts have one length -> (their Canvas, the cache with
    the prompts in it, or None).
    """
    # The canvas: prompts, and masks behind them
    P = len(prompts[group[0]])
    T = P + settings.max_new_tokens
    must_fit(model, len(group), T, settings)
    ids = np.full((len(group), T), model.cfg.mask_id, dtype=np.int64)
    ids[:, :P] = [prompts[row] for row in group]
    canvas = Canvas(ids, [seeds[row] for row in group], model.cfg.mask_id, keep_chance, group)

    # The cache, with the prompts in it
    cache = None
    if settings.mode == "block_frozen":
        room = positions_in_cache(T, settings)
        cache = model.new_cache(len(group), room)
        result.cache_bytes = max(result.cache_bytes, cache.nbytes)
        # left to right, the first forward reads the prompt's last token
        known = P - 1 if settings.left_to_right or settings.speculates else P
        if known:
            size = max(1, min(PROMPT_TOKENS, room // 2))
            read = getattr(model, "read", model.step)
            for start in range(0, known, size):
                read(ids[:, start:min(known, start + size)], cache)
            result.context_passes += 1  # one pass over the prompt, whatever its number of parts
        if settings.guidance_scale != 1 and settings.null_prompt:
            null = np.tile(np.array(settings.null_prompt), (len(group), 1))
            if settings.left_to_right:          # both end with the same token
                null = null[:, :-1]
            canvas.bare = model.new_cache(len(group), room)
            model.step(null, canvas.bare)
            result.context_passes += 1
    return canvas, cache


def write_row(model, row, prompts, settings, seeds, result, on_step, on_block):
    """Write the row with this number by verified drafts, and put it into result."""
    if not hasattr(model, "try_step"):
        raise UserError("--sampler speculate: this engine cannot verify drafts: leave it out")
    P = len(prompts[row])
    canvas, cache = begin(model, [row], prompts, settings, seeds, result, bool(on_step))
    room = positions_in_cache(P + settings.max_new_tokens, settings)
    written = speculate.write_text(model, cache, canvas, P, settings, room, on_step, on_block)
    result.forwards += written.forwards
    result.layer_passes += written.layers
    result.rounds += written.rounds
    result.accepted += written.accepted
    result.row_forwards[row] = canvas.forwards[0]
    ids = canvas.ids[0, :written.end].tolist()
    keep_answer(result, row, ids, prompts[row], settings, model)


def write_group(model, group, prompts, settings, seeds, result, on_step, on_block):
    """Write the rows with these numbers, whose prompts have one length, and put them into result.
    """
    keep_chance = bool(on_step) or settings.remask_rule == "conf"
    canvas, cache = begin(model, group, prompts, settings, seeds, result, keep_chance)
    P = len(prompts[group[0]])
    T = P + settings.max_new_tokens

    # Block after block; a finished row leaves the batch
    lo = P
    while lo < T and canvas.numbers:
        hi = min(T, lo + block_length(settings))
        forward = forward_of_block(model, cache, canvas, P, lo, hi, settings, result)
        forwards, layers = fill_block(model, canvas, lo, hi, forward, settings, on_step)
        result.forwards += forwards
        result.layer_passes += layers
        if on_block:
            on_block(canvas, lo, hi)
        lo = hi
        ending = canvas.done if lo < T else np.ones_like(canvas.done)
        if ending.any():
            for at in np.flatnonzero(ending):
                row = canvas.numbers[at]
                written = canvas.ids[at, :lo].tolist()
                result.row_forwards[row] = canvas.forwards[at]
                keep_answer(result, row, written, prompts[row], settings, model)
            going = np.flatnonzero(~ending)
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


def must_fit(model, rows, length, settings):
    """Refuses what the machine cannot hold: the ids of all positions, and the logits of one block.
    """
    block = min(block_length(settings), settings.max_new_tokens)
    asked = rows * (length * 8 + block * model.cfg.vocab_size * 4)
    device, there = memory_of(model)
    if not there or asked <= there:
        return
    advice = "ask for fewer tokens"
    if settings.mode == "full":
        advice += ", or write them in blocks (--blockwise --frozen_context)"
    raise UserError(
        f"--max_new_tokens {settings.max_new_tokens}, {rows} texts at once: this takes at least "
        f"{asked / 2**30:,.0f} GB of memory, and {device} has {there / 2**30:,.0f}: {advice}"
    )


def memory_of(model):
    """-> (the device's name, bytes of memory that it has in all: None where the system does not
    say).
    """
    if hasattr(model, "device_memory"):
        return model.device_memory()
    try:
        return "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):                                  # Windows
        return "cpu", None


def infill(model, ids, settings, seeds, on_step=None):
    """Fill every mask of one text (ids, BOS included), once per seed; everything else stays ->
    Result with whole rows.
    """
    if model.cfg.causal:
        raise UserError(
            "this checkpoint was trained with --objective ar and sees only what stands before a "
            "gap: fill gaps with a checkpoint of --objective masked, or continue a --prompt"
        )
    started = time.perf_counter()
    # the text behind a gap is given: no EOS in a gap can end it
    settings = dataclasses.replace(settings, eos_id=None, mode="full")
    must_suit_drafts(settings)
    mask_id = model.cfg.mask_id
    keep_chance = bool(on_step) or settings.remask_rule == "conf"
    rows = np.array([ids] * len(seeds), dtype=np.int64)                            # (B, T)
    canvas = Canvas(rows, seeds, mask_id, keep_chance)
    given = canvas.ids != mask_id
    before = canvas.ids.copy()

    # The whole text is one block
    forward = forward_of(model, None, canvas, 1, 0, len(ids), settings)
    result = Result([], [])
    if not given.all():
        result.forwards, result.layer_passes = fill_block(
            model, canvas, 0, len(ids), forward, settings, on_step
        )

    assert np.array_equal(canvas.ids[given], before[given]), "fixed text was changed"
    result.rows = result.full_rows = canvas.ids.tolist()
    assert all(mask_id not in row for row in result.rows), "a gap is left"
    result.row_forwards = canvas.forwards
    result.seconds = time.perf_counter() - started
    return result


# ---- the forward of a block ----------------------------------------------------------------------

class Seen(NamedTuple):
    """The block among the states that an engine returned: the places of its first row and its first
    position.
    """
    states: object
    row: int = 0
    position: int = 0


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
    if canvas.bare is not None:
        model.step(finished, canvas.bare)
    result.context_passes += 1
    return forward_of(model, cache, canvas, P, lo, hi, settings)


def forward_of(model, cache, canvas, P, lo, hi, settings):
    """The function (ids (B, T), depth) -> [Seen] of [lo, hi); if guided, the block without its
    context is the second one.
    """
    if settings.left_to_right:
        caches = [cache] if canvas.bare is None else [cache, canvas.bare]
        return lambda ids, depth: [Seen(model.step(ids[:, lo - 1:lo], each)) for each in caches]
    rows = len(canvas.ids)
    guided = settings.guidance_scale != 1
    if cache is not None:
        if not guided:
            return lambda ids, depth: [Seen(model.states(ids[:, lo:hi], cache, depth))]
        return both_contexts(model, cache, canvas, lo, hi)

    # nothing stands before the ids
    if not guided:
        empty = model.new_cache(rows, 0)
        return lambda ids, depth: [Seen(model.states(ids[:, :hi], empty, depth), 0, lo)]
    if settings.null_prompt:
        return without_prompt(model, canvas, P, lo, hi, settings.null_prompt)
    empty = model.new_cache(2 * rows, 0)

    def both_sides(ids, depth):
        bare = ids[:, :hi].copy()
        bare[:, 1:P] = model.cfg.mask_id        # BOS stays: a text begins there, whatever it says
        states = model.states(np.concatenate((ids[:, :hi], bare)), empty, depth)
        return [Seen(states, 0, lo), Seen(states, rows, lo)]
    return both_sides


def without_prompt(model, canvas, P, lo, hi, null_prompt):
    """forward_of, guided, in one piece: beside the prompt stands the null prompt, of another
    length.
    """
    rows = len(canvas.ids)
    null = np.tile(np.array(null_prompt), (rows, 1))
    empty = model.new_cache(rows, 0)

    def both_sides(ids, depth):
        given = model.states(ids[:, :hi], empty, depth)
        bare = model.states(np.concatenate((null, ids[:, P:hi]), axis=1), empty, depth)
        return [Seen(given, 0, lo), Seen(bare, 0, lo - P + len(null_prompt))]
    return both_sides


def both_contexts(model, cache, canvas, lo, hi):
    """forward_of, guided, over a cache."""
    rows = len(canvas.ids)
    bare = canvas.bare
    if bare is None:
        bare = model.new_cache(rows, 0)
    # a framed prompt and the null prompt have different lengths
    if canvas.bare is not None or not hasattr(cache, "beside"):
        return lambda ids, depth: [
            Seen(model.states(ids[:, lo:hi], context, depth)) for context in (cache, bare)
        ]
    both = cache.beside(bare)                   # both sides in one batch

    def both_sides(ids, depth):
        states = model.states(np.tile(ids[:, lo:hi], (2, 1)), both, depth)
        return [Seen(states), Seen(states, rows)]
    return both_sides


def joins_first(model, cache, finished, lo, hi, forward):
    """The same function whose first call also reads the finished block before it into the cache. A
    block always has a forward, as something in it is masked.
    """
    waiting = [finished]

    def first_then(ids, depth):
        if waiting:
            return [Seen(model.step_and_states(waiting.pop(), ids[:, lo:hi], cache))]
        return forward(ids, depth)
    return first_then


# ---- one block -----------------------------------------------------------------------------------

def fill_block(model, canvas, lo, hi, forward, settings, on_step=None):
    """Reveal canvas.ids[:, lo:hi] in place; forward(ids, depth) -> [Seen], two of them if guided.

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
        for row in np.flatnonzero(~canvas.done):
            turn = plan(
                canvas, row, lo, hi, masked[row], to_decide[row], step, steps, settings
            )
            if turn:
                turns.append(turn)

        # One forward for all rows, if any of them looks at a position
        logits = None
        if any(len(turn.look_at) for turn in turns):
            depth = depth_at(step, steps, settings.min_depth, model.cfg.n_layers)
            logits = read_logits(model, forward(canvas.ids, depth), turns, settings, step)
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
    look_at: np.ndarray               # masked positions whose logits are asked for
    count: int                        # how many of them the rule is asked to reveal; None: all
    back: np.ndarray                  # decided positions that become masks again


def plan(canvas, row, lo, hi, masked, to_decide, step, steps, settings):
    """The Turn of one row, or None: masked (S,) where it is masked now, to_decide (S,) where it was
    when the block began.
    """
    generator = canvas.generators[row]
    positions = np.flatnonzero(masked)                                             # (N,)
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
        look_at = positions[unmasking.ancestral(len(positions), stay, generator)]
    else:
        if settings.remask:  # what goes back comes on top of the schedule
            target = round(int(to_decide.sum()) * after)
            back = back[:target]
            count = min(len(positions), max(0, len(positions) + len(back) - target))
        else:
            count = unmasking.reveal_count(len(positions), step, steps, settings.reveal)
        look_at = positions if count else none
        if settings.sampler == "random":
            look_at = positions[unmasking.random(len(positions), count, generator)]
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

    positions = np.flatnonzero(decided)
    each = sigma
    if settings.remask_rule == "conf":
        # the unsure ones first, as many on average
        unsure = np.exp(-chance[positions].astype(np.float64))
        each = unsure / unsure.sum() * sigma * len(positions)
    goes = generator.random(len(positions)) < each
    return generator.permutation(positions[goes]), stay


def depth_at(step, steps, least, layers):
    """Layers of forward `step` of `steps`: from `least` to all, and all at the last one. None (all
    at every forward) if least is 0.
    """
    if not least:
        return None
    if step + 1 >= steps:
        return layers
    return min(layers, least + math.ceil((layers - least) * step / (steps - 1)))


def read_logits(model, sides, turns, settings, step):
    """[Seen] of a forward -> logits (N, V) of the positions that are looked at, all turns one after
    the other.
    """
    damaged = (
        f"the denoiser returned NaN or infinity at forward {step + 1}: the checkpoint is damaged, "
        "or its training went wrong; use an earlier one"
    )
    rows = np.repeat([turn.row for turn in turns], [len(turn.look_at) for turn in turns])
    positions = np.concatenate([turn.look_at for turn in turns])                   # (N,)
    side = sides[0]
    logits = model.logits(side.states, side.row + rows, side.position + positions)
    must_be_finite(logits, damaged)
    if settings.guidance_scale == 1:
        return logits

    # Guidance: away from what the model says without the context
    never = np.isneginf(logits)
    logits = unmasking.log_softmax(logits)
    side = sides[1]
    bare = model.logits(side.states, side.row + rows, side.position + positions)
    must_be_finite(bare, damaged)
    bare = unmasking.log_softmax(bare)
    with np.errstate(over="ignore", invalid="ignore"):  # -inf - -inf is not a number
        guided = bare + settings.guidance_scale * (logits - bare)
    if settings.guidance_scale > 1:
        unlikely = logits < logits.max(-1, keepdims=True) + math.log(PLAUSIBLE)
        guided = np.where(unlikely, np.minimum(guided, logits), guided)
    guided[never] = -np.inf
    must_be_finite(
        guided,
        f"--guidance_scale {settings.guidance_scale:g} is too large: the guided logits overflow; "
        "1 to 5 is usual",
    )
    return guided


def temperature(settings, step, steps):
    """The temperature of forward `step` of `steps`: on a straight line to its end, if it has one.
    """
    start = settings.temperature
    end = settings.temperature_end
    if end is None:
        return start
    return start + step / max(1, steps - 1) * (end - start)


def choose(look, logits, count, settings, generator):
    """Which of the positions that are looked at (N,) the rule reveals.

    In the answer of a model of pairs, nothing behind the first end that it guesses, and the end
    only with all before it: the surest positions are those behind the answer, and an answer that is
    told early where it ends gets too short.
    """
    rule = LOOKING[settings.sampler]
    ends = np.flatnonzero(logits.argmax(-1) == settings.eos_id)
    if settings.null_prompt is None or not len(ends):
        return rule(look, count, settings, generator)
    end = ends[0]
    chosen = rule(Look(logits[:end + 1]), count, settings, generator)
    if len(chosen) == end + 1:
        return chosen
    return rule(Look(logits[:end]), count, settings, generator)


def reveal(canvas, turn, logits, lo, hi, heat, settings):
    """Choose among the positions of one row, draw their tokens, write them."""
    row = turn.row
    generator = canvas.generators[row]
    canvas.forwards[row] += 1
    if settings.repetition_penalty != 1:
        seen = np.unique(canvas.ids[row, :hi])
        seen = seen[seen != canvas.mask_id]
        logits = unmasking.discourage(logits, seen, settings.repetition_penalty)

    # Positions first, by what the model thinks; then their tokens
    look = Look(logits)
    chosen = slice(None)
    if turn.count is not None:
        chosen = choose(look, logits, turn.count, settings, generator)
    tokens = unmasking.draw(logits[chosen], heat, settings, generator)
    positions = lo + turn.look_at[chosen]
    canvas.ids[row, positions] = tokens
    if canvas.keep_chance:
        canvas.chance[row, positions] = look.chance(chosen, tokens)
