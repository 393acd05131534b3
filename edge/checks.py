"""Is an exported model the trained one: its logits and its speed. Used by export.py.

Every function takes engines as sampling/decode.py sees them: the exported one, and TorchModel,
which is PyTorch behind the same words. Legend: B rows, L tokens of a row, S block, N rows of any
kind, V vocabulary rows.
"""
import math
import statistics
import time

import numpy as np

from sampling.settings import DRAFT

REPEATS = 15
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

    read(ids[:, :1])
    read(ids[:, 1:READ + 1])
    for first in range(READ + 1, L, 5):
        read(ids[:, first:first + 5])
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
    cache = model.new_cache(1, 2 * text.shape[1] + 4 * REPEATS)
    model.step(text, cache)
    token = text[:, :1]
    found = {"one token": timed(lambda: all_logits(model, model.step(token, cache), token))}
    if not model.cfg.causal:
        for rows in (DRAFT, 32):
            found[f"block of {rows}"] = timed(lambda rows=rows: all_masks(model, rows, cache))
        drafted = text[:, :DRAFT]
        found[f"{DRAFT} tokens tried"] = timed(
            lambda: all_logits(model, model.try_step(drafted, cache), drafted)
        )
    return found


def round_cost(milliseconds):
    """What a draft and its verification take, in steps of one token (sampling/speculate.py)."""
    both = milliseconds[f"block of {DRAFT}"] + milliseconds[f"{DRAFT} tokens tried"]
    return round(both / milliseconds["one token"], 2)


def all_masks(model, rows, cache):
    masks = np.full((1, rows), model.cfg.mask_id, np.int64)
    return all_logits(model, model.states(masks, cache), masks)


def timed(action):
    action()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)
