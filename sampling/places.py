"""The places of interlaced rows (text/interlace.py) filled by a denoiser, all words at once.

    filled = fill(model, rows, places, guesses, settings, seeds)    # Filled
    answers = words_of(filled.ids[0], places[0], eos_id)    # ids of the answer to each word

The places of a word are masked, then it is asked, or hold the word that is given. One forward looks
at the whole row, a rule of sampling/unmasking.py chooses among the masked places. Each word has an
end of its own: nothing behind the first end that the model guesses in a word is chosen, no end
stands before a letter that was decided, and behind an end the places hold EOS without being asked.
A model of --objective ar fills them from left to right (sampling/left_to_right.py).

Used by sampling/transliteration.py and by training (its samples); the engine is that of
sampling/decode.py. Legend: B rows, T positions, n places of a word.
"""
from typing import NamedTuple

import numpy as np

from common.console import UserError
from sampling import unmasking
from sampling.decode import generator_of
from sampling.left_to_right import NOT_FINITE, letter_by_letter, with_guesses
from sampling.settings import SPECULATE
from sampling.unmasking import LOOKING, Look, must_be_finite
from text.interlace import ROOM


class Filled(NamedTuple):
    ids: np.ndarray                   # (B, T)
    forwards: np.ndarray              # (B,) of each row, while a place of it was masked


def places_of(sizes):
    """Where the places of words with so many letters are, [(n,)] for each word."""
    found = []
    begin = 1
    for size in sizes:
        end = begin + 2 * (size + ROOM)
        found.append(np.arange(begin + 1, end, 2))
        begin = end
    return found


def words_of(ids, places, eos_id):
    """The ids of each word's answer."""
    found = []
    for where in places:
        answer = ids[where].tolist()
        if eos_id in answer:
            answer = answer[:answer.index(eos_id)]
        found.append(answer)
    return found


def fill(model, rows, places, guesses, settings, seeds, on_step=None):
    """Fill the masks of rows (B, T) of one length; places: of each row, places_of its words;
    guesses: of each row left_to_right.Guesses, for --sampler speculate; on_step: as
    decode.generate's, without a canvas.
    """
    verified = model.cfg.causal and settings.sampler == SPECULATE
    if settings.sampler not in LOOKING and not verified:
        raise UserError(
            f"--sampler {settings.sampler}: transliteration takes {', '.join(LOOKING)}"
        )
    ids = rows.copy()
    mask_id = model.cfg.mask_id
    generators = [generator_of(seed) for seed in seeds]
    forwards = np.zeros(len(ids), np.int64)
    if model.cfg.causal:
        for number, row in enumerate(ids):
            given = (model, row, places[number])
            drawn = (settings, generators[number], on_step)
            if verified:
                forwards[number] = with_guesses(*given, guesses[number], *drawn)
            else:
                forwards[number] = letter_by_letter(*given, *drawn)
        return Filled(ids, forwards)
    step = 0
    while True:
        busy = np.flatnonzero((ids == mask_id).any(1))
        if not len(busy):
            return Filled(ids, forwards)
        states = model.states(ids[busy], model.new_cache(len(busy), 0))
        for at, row in enumerate(busy):
            masked = np.flatnonzero(ids[row] == mask_id)
            logits = model.logits(states, np.full(len(masked), at), masked)
            must_be_finite(logits, NOT_FINITE)
            reveal(ids[row], masked, logits, places[row], step, settings, generators[row])
        forwards[busy] += 1
        if on_step:
            on_step(None, 0, ids.shape[1], step)
        step += 1


def reveal(ids, masked, logits, places, step, settings, generator):
    """Write some of the masked places of one row (T,), whose logits (N, V) these are."""
    for where in places:
        # a word does not end before a letter that stands
        letters = where[(ids[where] != settings.eos_id) & ~np.isin(where, masked)]
        if len(letters):
            inside = np.isin(masked, where) & (masked < letters[-1])
            logits[inside, settings.eos_id] = -np.inf
    open_places = before_the_ends(masked, logits.argmax(-1), places, settings.eos_id)
    masked = masked[open_places]
    logits = logits[open_places]

    count = len(masked)
    if step < settings.steps:
        count = unmasking.reveal_count(count, step, settings.steps, settings.reveal)
    chosen = LOOKING[settings.sampler](Look(logits), count, settings, generator)
    ids[masked[chosen]] = unmasking.draw(
        logits[chosen], settings.temperature, settings, generator
    )

    # behind an end there is nothing
    for where in places:
        ended = np.flatnonzero(ids[where] == settings.eos_id)
        if len(ended):
            ids[where[ended[0]:]] = settings.eos_id


def before_the_ends(masked, guesses, places, eos_id):
    """Which of the masked places (N,) of a row are open: in each word those up to the first end
    that the model guesses.
    """
    is_open = np.ones(len(masked), bool)
    for where in places:
        inside = np.flatnonzero(np.isin(masked, where))
        ends = np.flatnonzero(guesses[inside] == eos_id)
        if len(ends):
            is_open[inside[ends[0] + 1:]] = False
    return is_open
