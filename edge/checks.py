"""Is an exported model the trained one: its logits and its speed. Used by export.py.

Every function takes engines as sampling/decode.py sees them: the exported one, and TorchModel,
which is PyTorch behind the same words. Legend: B rows, L tokens of a row, S block, N rows of any
kind, V vocabulary rows.
"""
import dataclasses
import math
import statistics
import time
from functools import partial

import numpy as np

from sampling.decode import generate
from sampling.settings import DRAFT, SPECULATE, Settings

REPEATS = 15
BEGINNING = 12         # tokens of a text that is continued
NEW = 64               # tokens that are written behind it
TURNS = 5
READ = 70              # tokens of a row that are read in one step: more than a graph's chunk


# ---- logits --------------------------------------------------------------------------------------

def every_path(model, ids):
    """The logits (N, V) of all graphs on the text ids (B, L): read at once, one by one and in odd
    cuts, and of noisy blocks behind it.
    """
    B, L = ids.shape
    mask_id = model.cfg.mask_id
    cache = model.new_cache(B, 2 * L)
    found = []

    def read(x0):
        found.append(all_logits(model, model.step(x0, cache), x0))

    def look(xt):
        found.append(all_logits(model, model.states(xt, cache), xt))

    def attempt(keep):
        row = model.new_cache(1, 2 * L)
        model.step(ids[:1, :L // 2], row)
        x0 = ids[:1, L // 2:L // 2 + 6]
        found.append(all_logits(model, model.try_step(x0, row), x0))
        row.keep(keep)
        after = x0[:, keep:keep + 1]
        found.append(all_logits(model, model.step(after, row), after))

    read(ids[:, :1])
    read(ids[:, 1:READ + 1])
    for first in range(READ + 1, L, 5):
        read(ids[:, first:first + 5])
    if not model.cfg.causal or model.cfg.interlaced:
        attempt(1)
        attempt(5)
    if not model.cfg.causal:
        masks = np.full((B, 6), mask_id, np.int64)
        half = ids[:, :6].copy()
        half[:, ::2] = mask_id
        look(masks)
        look(half)
        for x0, xt in ((ids[:, :READ], half), (ids[:, :1], masks[:, :1])):
            if hasattr(model, "step_and_states"):
                states = model.step_and_states(x0, xt, cache)
            else:
                model.step(x0, cache)
                states = model.states(xt, cache)
            found.append(all_logits(model, states, xt))
        read(ids[:, -1:])
    return np.concatenate(found)


def all_logits(model, states, ids):
    """The logits (N, V) about every one of the rows ids (B, R)."""
    rows, positions = np.indices(ids.shape)
    return model.logits(states, rows.flatten(), positions.flatten())


def difference(engine, reference, ids):
    """(largest, root mean square) difference of the logits, in parts of their size."""
    found = every_path(engine, ids)
    right = every_path(reference, ids)
    possible = np.isfinite(right)
    if not (possible == np.isfinite(found)).all():
        return math.inf, math.inf
    size = right[possible].astype(np.float64)
    gap = found[possible] - size
    return np.abs(gap).max() / np.abs(size).max(), math.sqrt((gap ** 2).mean() / (size ** 2).mean())


# ---- speed ---------------------------------------------------------------------------------------

def speed(model, ids):
    """Milliseconds of a forward, head included: {what: median of REPEATS}."""
    text = ids[:1]
    cache = model.new_cache(1, 2 * text.shape[1] + 20 * REPEATS)
    model.step(text, cache)
    token = text[:, :1]
    cases = {"one token": lambda: all_logits(model, model.step(token, cache), token)}
    if not model.cfg.causal:
        for rows in (DRAFT, 32):
            cases[f"block of {rows}"] = partial(all_masks, model, rows, cache)
        cases[f"{DRAFT} tokens tried"] = partial(tried, model, text[:, :DRAFT], cache)
    times = {name: [] for name in cases}
    for _ in range(REPEATS):
        for name, forward in cases.items():     # in turn, so that a busy moment hits all
            forward()
            started = time.perf_counter()
            forward()
            times[name].append(time.perf_counter() - started)
    return {name: 1000 * statistics.median(taken) for name, taken in times.items()}


def tried(model, x0, cache):
    """A verification, of which one token is kept."""
    logits = all_logits(model, model.try_step(x0, cache), x0)
    cache.keep(1)
    return logits


def gain_of_drafts(model, prompts):
    """How many times as fast text from left to right is with verified drafts, in turn."""
    plain = Settings(NEW, 1, mode="block_frozen", block_size=1, eos_id=None, temperature=0.7)
    drafted = dataclasses.replace(plain, block_size=DRAFT, sampler=SPECULATE)
    gains = []
    for seed in range(-1, TURNS):
        seconds = []
        for settings in (plain, drafted):
            taken = [generate(model, prompt, settings, [seed]).seconds for prompt in prompts]
            seconds.append(sum(taken))
        if seed >= 0:       # the first turn opens what is used
            gains.append(seconds[0] / seconds[1])
    return round(statistics.median(gains), 2)


def try_cost(model, ids):
    """What verifying the last token's row takes, and each draft's, in steps of one token. Each is
    repeated until its weights are where a text finds them.
    """
    cache = model.new_cache(1, 2 * ids.shape[1] + 60 * TURNS)
    model.step(ids[:1], cache)
    token = ids[:1, :1]
    cases = (
        lambda: all_logits(model, model.step(token, cache), token),
        lambda: tried(model, token, cache),
        lambda: tried(model, ids[:1, :DRAFT], cache),
    )
    costs = []
    for _ in range(TURNS):
        one, single, many = (median_time(forward) for forward in cases)
        costs.append((single / one, (many - single) / (DRAFT - 1) / one))
    first, each = (statistics.median(column) for column in zip(*costs, strict=True))
    return [round(max(1.0, first), 2), round(max(0.01, each), 3)]


def median_time(forward):
    times = []
    for _ in range(10):
        started = time.perf_counter()
        forward()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def round_cost(milliseconds):
    """What a draft and its verification take, in steps of one token (sampling/speculate.py)."""
    both = milliseconds[f"block of {DRAFT}"] + milliseconds[f"{DRAFT} tokens tried"]
    return round(both / milliseconds["one token"], 2)


def all_masks(model, rows, cache):
    masks = np.full((1, rows), model.cfg.mask_id, np.int64)
    return all_logits(model, model.states(masks, cache), masks)
