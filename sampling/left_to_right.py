"""The places of interlaced rows (text/interlace.py) filled from left to right, by a model of
--objective ar.

    ids, forwards = letter_by_letter(model, ids, places, settings, generator)     # one row
    filled, forwards = with_guesses(model, rows, places, guesses, settings, generators)

Letter by letter takes a forward for each. But what a word means can mostly be guessed from what was
typed, so with_guesses has many letters verified at once: one forward reads whole rows with guesses
in the places, and says of each place what it would have written behind what stands before. As long
as that is the guess, the next answer is right, too; the first wrong guess is corrected. What the
model says of all places behind is the next guess. So every forward settles a letter at least, and
the text is that of letter by letter, seed for seed (up to the rounding of many rows beside one).

Used by sampling/places.py. Legend: B rows, T positions, N open places of a row, n of a word.
"""
from typing import NamedTuple

import numpy as np

from sampling import unmasking
from sampling.unmasking import must_be_finite
from text.interlace import word_by_word

NOT_FINITE = "the model gives no finite answer: its training went wrong"


class Guesses(NamedTuple):
    words: list             # of each row, the ids that each of its words probably means
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

def with_guesses(model, rows, places, guesses, settings, generators, on_step=None):
    """Fill the masks of rows (B, T) of one length -> ids (B, T), forwards (B,)."""
    signs = guesses.signs
    open_rows = [Row(*row, signs, model.cfg, settings) for row in zip(
        rows, places, guesses.words, generators, strict=True
    )]
    forwards = np.zeros(len(rows), np.int64)
    step = 0
    while True:
        busy = [number for number, row in enumerate(open_rows) if row.words]
        if not busy:
            return np.stack([row.ids for row in open_rows]), forwards
        asked = [open_rows[number] for number in busy]
        ids = np.stack([row.ids[row.order] for row in asked])                      # (B, T)
        states = model.step(ids, model.new_cache(*ids.shape))
        for number, row in enumerate(asked):
            before = row.reads_before()                                            # (N,)
            logits = model.logits(states, np.full_like(before, number), before)    # (N, V)
            must_be_finite(logits, NOT_FINITE)
            row.settle(logits)
        forwards[busy] += 1
        if on_step:
            on_step(None, 0, rows.shape[1], step)
        step += 1


class Row:
    """A row whose masked places hold guesses; those of `words` are open, of the first word perhaps
    a part.
    """

    def __init__(self, ids, places, guesses, generator, signs, cfg, settings):
        self.settings = settings
        self.generator = generator
        self.signs = signs
        self.ids = ids.copy()
        self.words = []
        self.sizes = {where[-1]: len(where) for where in places}    # of a word, by its last place
        for where, guess in zip(places, guesses, strict=True):
            if ids[where[0]] == cfg.mask_id:
                self.words.append(where)
                self.guess(where, guess)
        self.order = word_by_word(ids, cfg.pad_id)
        self.index = np.empty(len(ids), np.int64)
        self.index[self.order] = np.arange(len(ids))

    def guess(self, where, letters):
        """Of the places (n,) of a word: letters, cut off at their end, and EOS behind them."""
        eos_id = self.settings.eos_id
        letters = list(letters)[:len(where)]
        if eos_id in letters:
            letters = letters[:letters.index(eos_id)]
        self.ids[where] = letters + [eos_id] * (len(where) - len(letters))

    def reads_before(self):
        """The position in the order of reading before each open place (N,): its state answers."""
        return self.index[np.concatenate(self.words)] - 1

    def settle(self, logits):
        """Settle letters of the open places up to the first wrong guess; logits (N, V)."""
        settled = 0
        right = True
        while right and self.words:
            where = self.words[0]
            letter = unmasking.draw(
                logits[settled:settled + 1], self.settings.temperature, self.settings,
                self.generator,
            )[0]
            guessed = self.ids[where].tolist()
            right = letter == guessed[0]
            if letter == self.settings.eos_id:
                self.ids[where] = letter
                settled += len(where)
                self.words.pop(0)
            else:
                self.ids[where[0]] = letter
                settled += 1
                self.words[0] = where[1:]
                if not right:
                    self.guess(where[1:], rest_of(guessed, letter, self.signs))
                if len(where) == 1:
                    self.words.pop(0)
        self.guess_again(logits[settled:].argmax(-1))

    def guess_again(self, said):
        """What the model has said (N,) of the open places is the new guess of whole words."""
        begin = 0
        for where in self.words:
            if len(where) == self.sizes[where[-1]]:
                self.guess(where, said[begin:begin + len(where)].tolist())
            begin += len(where)


def rest_of(guessed, letter, signs):
    """A guess, whose first letter is wrong, and the right one -> what probably follows that."""
    rest = guessed[1:]
    if letter in rest[:1]:              # the guess had a letter too much
        return rest[1:]
    if letter in signs and guessed[0] not in signs:
        return guessed                  # or lacked this sign
    return rest
