"""Lines of Hinglish into Hindi, with a model that prepare --source transliterate made the text of.

    args, origins = with_rule(args, origins, saved)     # the likeliest letters, many at once
    for text in lines(args): ...                        # each line of a file as soon as it comes
    for record in transliterate(args, model, tokenizer, settings, lines(args), length): ...

The words of a line are cut into rows as the training text was (text/interlace.py), the rows are
filled (sampling/places.py), many at once, and put together again. A word without a Latin letter
stays as it is, and so does the space between words. A model of --objective ar verifies what
text/spell_back.py guesses.

Used by sample.py, by training (its samples) and by serving/typed.py.
"""
import dataclasses
import sys
import time
from functools import cache
from unicodedata import category

import numpy as np

from common.console import UserError, say
from sampling.left_to_right import Guesses
from sampling.places import fill, places_of, words_of
from sampling.settings import SPECULATE
from sampling.settings import in_words as of_settings
from sampling.terminal import Stream
from text.interlace import ROOM, cut, interlaced, tokens_of
from text.spell_back import in_devanagari
from text.tokenizer import normalise
from text.transliterate import LATIN, sentences

BATCH = 64            # rows that are filled at once
LETTERS = 24          # of a word; a longer one is cut
LINE_BYTES = 100_000  # of a line
RULE = dict(
    temperature=0.0, top_k=0, blockwise=False, frozen_context=False, sampler="threshold",
    threshold=0.8,
)
LEFT_TO_RIGHT = dict(temperature=0.0, top_k=0, sampler=SPECULATE)


# ---- what is asked for ---------------------------------------------------------------------------

def with_rule(args, origins, saved):
    """The arguments with the likeliest letters, all that are sure at once, or from left to right
    all that were guessed (docs/CPU_GUIDE.md). What was typed stays.
    """
    rule = LEFT_TO_RIGHT if saved.config["model"]["causal"] else RULE
    found = {name: value for name, value in rule.items() if origins[name] != "flag"}
    chosen = dict.fromkeys(found, "transliterate")
    return dataclasses.replace(args, **found), origins | chosen


def in_words(settings, causal):
    """One line that says how the answers are made."""
    if causal and settings.speculates:
        return (
            f"text: rows of up to {settings.max_new_tokens} tokens, left to right, guessed and "
            f"verified, temperature {settings.temperature:g}"
        )
    return of_settings(settings, causal)


def refuse_other_models(saved):
    if not saved.config["model"].get("interlaced", False):
        raise UserError(
            f"{saved.path} was not trained to transliterate: make its text with python -m prepare "
            "--source transliterate, then python -m train"
        )


def lines(args):
    """The texts to transliterate, as they come."""
    if args.transliterate != "-":
        yield from args.transliterate.split("\n")
        return
    name = args.prompts_file
    number = 0
    try:
        file = open(name, "rb") if name else sys.stdin.buffer
        with file:
            for raw in file:
                number += 1
                yield raw.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserError(
            f"{name or 'standard input'}, line {number}: not valid UTF-8; save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"--prompts_file {name}: {error.strerror}") from None


def answer_to(model, tokenizer, text, settings, length):
    """One text of one line at once."""
    line = Line(model, tokenizer, text, length)
    for rows in line.batches(BATCH):
        line.answer(rows, settings, seed=0)
    return line


# ---- lines ---------------------------------------------------------------------------------------

def transliterate(args, model, tokenizer, settings, texts, length, on_step=None):
    """Records as written.py's, one for each text; length: tokens of a row in training; on_step:
    after each forward, as decode.generate's. Of args it reads stream and seed.
    """
    told = False
    for number, text in enumerate(texts, 1):
        size = len(text.encode("utf-8", "replace"))
        if size > LINE_BYTES:
            raise UserError(
                f"line {number} has {size:,} bytes, and {LINE_BYTES:,} are the most: break it into "
                "shorter lines"
            )
        started = time.perf_counter()
        line = Line(model, tokenizer, text, length)
        if text.strip() and not LATIN.search(text) and not told:
            told = True
            say(
                f"notice: line {number} has no Latin letter ({text.strip()[:30]!r}): it stays as "
                "it is, as do others like it"
            )
        stream = Stream() if args.stream else None
        for rows in line.batches(1 if stream else BATCH):
            line.answer(rows, settings, args.seed, on_step)
            if stream:
                stream.grow(line.text_so_far())
        if stream:
            stream.grow(line.text_so_far(), final=True)
        yield line.record(args, settings, time.perf_counter() - started)


class Word:
    """A word as it was typed, or a piece of a long one, and its answer: None where it is still to
    come.
    """

    def __init__(self, text, tokenizer, goes_on):
        self.text = text.lower()
        self.ids = tokenizer.encode(self.text)
        self.goes_on = goes_on          # a piece that the next one is joined to
        self.asked = bool(LATIN.search(text))
        self.answer = None if self.asked else text

    def __len__(self):
        return len(self.ids)

    def guess(self, tokenizer):
        """The ids of what it probably means."""
        return tokenizer.encode(in_devanagari(self.text))

    def places(self, mask_id):
        """What stands in its places: masks, or the word itself."""
        if self.asked:
            return [mask_id] * (len(self) + ROOM)
        return self.ids


@cache
def signs_of(tokenizer):
    """The ids of letters that hang on the one before."""
    written = {number: tokenizer.written([number]) for number in range(tokenizer.vocab_size)}
    return frozenset(
        number for number, text in written.items() if text and category(text[0]).startswith("M")
    )


def words_in(sentence, tokenizer):
    """The words of a sentence, long ones in pieces."""
    found = []
    for word in sentence:
        for start in range(0, len(word), LETTERS):
            goes_on = start + LETTERS < len(word)
            found.append(Word(word[start:start + LETTERS], tokenizer, goes_on))
    return found


class Line:
    """A text as rows of words, and what was answered."""

    def __init__(self, model, tokenizer, text, length):
        self.model = model
        self.tokenizer = tokenizer
        self.text = text
        self.rows = []                  # [Word, ...] each
        for sentence in sentences(normalise(text)):
            self.rows += cut(words_in(sentence, tokenizer), length)
        self.tokens = 0                 # letters of the answers
        self.decided = 0                # with the end of each word
        self.forwards = 0

    def batches(self, most):
        """The rows that ask something, those of one length together, so many at once."""
        if most == 1:
            yield from ([row] for row in self.asked)
            return
        by_length = {}
        for row in self.asked:
            by_length.setdefault(sum(map(tokens_of, map(len, row))), []).append(row)
        for rows in by_length.values():
            for start in range(0, len(rows), most):
                yield rows[start:start + most]

    def ids_of(self, row):
        """A row with masks in the places that are asked, (T,)."""
        mask_id = self.model.cfg.mask_id
        places = [word.places(mask_id) for word in row]
        return interlaced([word.ids for word in row], places, self.tokenizer)

    @property
    def asked(self):
        """The rows in which a word is still to be answered."""
        return [row for row in self.rows if any(word.answer is None for word in row)]

    def answer(self, rows, settings, seed, on_step=None):
        """Fill rows of one length."""
        tokenizer = self.tokenizer
        ids = np.stack([self.ids_of(row) for row in rows])                         # (B, T)
        places = [places_of(map(len, row)) for row in rows]
        guesses = None
        if settings.sampler == SPECULATE:
            signs = signs_of(tokenizer)
            words = [[word.guess(tokenizer) for word in row] for row in rows]
            guesses = [Guesses(row, signs) for row in words]
        seeds = [seed] * len(rows)
        filled = fill(self.model, ids, places, guesses, settings, seeds, on_step)
        for row, where, found in zip(rows, places, filled.ids, strict=True):
            for word, answer in zip(row, words_of(found, where, tokenizer.eos_id), strict=True):
                if word.asked:
                    word.answer = tokenizer.written(answer)
                    self.tokens += len(answer)
                    self.decided += len(answer) + 1
        self.forwards += int(filled.forwards.sum())

    def text_so_far(self):
        """All answers before the first word that is still to come."""
        done = []
        for word in (word for row in self.rows for word in row):
            if word.answer is None:
                break
            done.append(word.answer)
            if not word.goes_on:
                done.append(" ")
        return "".join(done).rstrip()

    def record(self, args, settings, seconds):
        return {
            "prompt": self.text,
            "seed": args.seed,
            "text": self.text_so_far(),
            "new_tokens": self.decided,
            "tokens_before_eos": self.tokens,
            "forwards": self.forwards,
            "context_passes": 0,
            "seconds": seconds,
            "tok_per_s": self.tokens / seconds,
            "tokens_per_forward": self.decided / max(1, self.forwards),
            "mode": settings.mode,
            "cache_bytes": 0,
        }
