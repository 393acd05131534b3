"""The places of interlaced rows (text/interlace.py) filled from left to right, by a model of
--objective ar.

    forwards = letter_by_letter(model, ids, places, settings, generator)    # the masks of one row
    forwards = with_guesses(model, ids, places, guesses, settings, generator)

Letter by letter takes a forward for each. But what a word means can mostly be guessed from what was
typed, so with_guesses has many letters verified at once: one forward reads on with guesses in the
places, and says of each place what it would have written behind what stands before. As long as that
is the guess, the next answer is right, too; the first wrong guess is corrected, and what was read
from there on does not join the cache. What the model says of the words behind is their next guess.
So every forward settles a letter at least, and the text is that of letter by letter, seed for seed
(up to the rounding of many rows beside one).

Used by sampling/places.py. Legend: T positions, N places, n of a word, V vocabulary rows.
"""
from typing import NamedTuple

import numpy as np

from sampling import unmasking
from sampling.unmasking import must_be_finite
from text.interlace import word_by_word

NOT_FINITE = "the model gives no finite answer: its training went wrong"
MOST = 32               # positions that a forward reads, the most that try_step takes


class Guesses(NamedTuple):
    words: list             # ids that each word of the row probably means
    signs: frozenset        # ids of letters that hang on the one before: vowel signs and the like


# ---- letter by letter ----------------------------------------------------------------------------

def letter_by_letter(model, ids, places, settings, generator, on_step=None):
    """Fill the masks of one row (T,) -> forwards."""
    word_of = {place: where for where in places for place in where}
    cache = model.new_cache(1, len(ids))
    unread = []
    forwards = 0
    for position in word_by_word(ids, model.cfg.pad_id):
        if ids[position] == model.cfg.mask_id:
            states = model.step(np.array([unread]), cache)
            last = np.array([len(unread) - 1])
            logits = model.logits(states, np.zeros(1, np.int64), last)             # (1, V)
            must_be_finite(logits, NOT_FINITE)
            unread = []
            forwards += 1
            if on_step:
                on_step(None, position, position + 1, 0)
            ids[position] = unmasking.draw(logits, settings.temperature, settings, generator)[0]
            if ids[position] == settings.eos_id:
                where = word_of[position]
                ids[where[where > position]] = settings.eos_id
        unread.append(ids[position])
    return forwards


# ---- with guesses --------------------------------------------------------------------------------

def with_guesses(model, ids, places, guesses, settings, generator, on_step=None):
    """Fill the masks of one row (T,) -> forwards."""
    row = Row(ids, places, guesses, model.cfg, settings, generator)
    cache = model.new_cache(1, len(ids))
    read = 0                            # positions in the cache, and what comes next is settled
    forwards = 0
    while row.open:
        block = row.order[read:read + MOST]
        states = model.try_step(ids[block][None], cache)
        kept = len(block)
        asked = row.asked_behind(read, kept)                                       # (N,)
        if asked:
            at = row.index[asked] - read - 1
            logits = model.logits(states, np.zeros_like(at), at)                   # (N, V)
            must_be_finite(logits, NOT_FINITE)
            wrong = row.settle(asked, logits)
            if wrong is not None:
                kept = row.index[wrong] - read
        cache.keep(int(kept))
        read += kept
        forwards += 1
        if on_step:
            on_step(None, 0, read, forwards)
    return forwards


class Row:
    """A row whose masked places hold guesses, until they are settled."""

    def __init__(self, ids, places, guesses, cfg, settings, generator):
        self.ids = ids
        self.signs = guesses.signs
        self.settings = settings
        self.generator = generator
        self.order = word_by_word(ids, cfg.pad_id)
        self.index = np.empty(len(ids), np.int64)           # of a position in the order
        self.index[self.order] = np.arange(len(ids))
        self.open = []                                      # places, as they are read
        self.words = {}                                     # the places of each one's word
        for where, letters in zip(places, guesses.words, strict=True):
            if ids[where[0]] == cfg.mask_id:
                self.open += where.tolist()
                self.words |= dict.fromkeys(where.tolist(), where)
                self.guess(where, letters)

    def asked_behind(self, read, rows):
        """The open places that are answered by so many rows behind what is read."""
        return [place for place in self.open if self.index[place] <= read + rows]

    def guess(self, where, letters):
        """Of the places (n,) of a word: letters, cut off at their end, and EOS behind them."""
        eos_id = self.settings.eos_id
        letters = list(letters)[:len(where)]
        if eos_id in letters:
            letters = letters[:letters.index(eos_id)]
        self.ids[where] = letters + [eos_id] * (len(where) - len(letters))

    def settle(self, asked, logits):
        """Settle open places, whose logits (N, V) these are, up to the first wrong guess -> its
        place, or None.
        """
        said = logits.argmax(-1).tolist()
        wrong = None
        settled = 0
        while settled < len(asked) and wrong is None:
            place = asked[settled]
            where = self.words[place]
            where = where[where >= place]
            guessed = self.ids[where].tolist()
            letter = unmasking.draw(
                logits[settled:settled + 1], self.settings.temperature, self.settings,
                self.generator,
            )[0]
            if letter != guessed[0]:
                wrong = place
                self.guess(where, [letter, *rest_of(guessed, letter, self.signs)])
            settled += len(where) if letter == self.settings.eos_id else 1
        self.open = self.open[settled:]
        self.guess_again(asked[settled:], said[settled:])
        return wrong

    def guess_again(self, asked, said):
        """What the model has said of whole words is their new guess."""
        for at, place in enumerate(asked):
            where = self.words[place]
            if where[0] == place and where[-1] in asked:
                self.guess(where, said[at:at + len(where)])


def rest_of(guessed, letter, signs):
    """A guess, whose first letter is wrong, and the right one -> what probably follows that."""
    rest = guessed[1:]
    if letter in rest[:1]:              # the guess had a letter too much
        return rest[1:]
    if letter in signs and guessed[0] not in signs:
        return guessed                  # or lacked this sign
    return rest
