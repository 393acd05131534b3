"""Hinglish and Hindi out of Devanagari text: each sentence as several people type it.

    for typed, meant, sentence in typed_rows(text, typists=2, seed=1337, length=97): ...
    sentences("ye accha hai. kal milte hain")       # [["ye", "accha", "hai."], ["kal", ...]]

A typist is a style of text/romanise.py, who types word for word. On top come slips of the fingers
and, as often as not, no full stop at the end. A sentence with a Latin letter is left out: what is
typed in Latin letters is always meant in Devanagari. Capitals are not told apart. A long sentence
is cut between words (text/interlace.py), and so is what the model is asked later.

Used by prepare (--source transliterate) and by sample (--transliterate).
"""
import random
import re
from functools import cache

from text.interlace import cut
from text.romanise import Romaniser
from text.tokenizer import normalise, script_of

STYLES = 32           # typists there are
SLIPS = 0.04          # words with a slip
ENDS = ("।", "॥", "?", "!", ".")
VOWELS = "aeiou"
LATIN = re.compile("[a-zA-Z]")
SPACE_BEFORE_END = re.compile(r" +(?=[।॥?!])")


def sentences(text):
    """A text -> its sentences, each a list of words."""
    for line in text.split("\n"):
        words = []
        for word in line.split():
            words.append(word)
            if word.endswith(ENDS):
                yield words
                words = []
        if words:
            yield words


@cache
def typist(style):
    return Romaniser(style)


def typed_rows(text, typists, seed, length):
    """(what is typed, what is meant, the sentence that both are of) of each Devanagari sentence of
    a text, by so many typists, in rows of at most so many tokens.
    """
    for sentence in sentences(SPACE_BEFORE_END.sub("", normalise(text))):
        whole = " ".join(sentence)
        if script_of(whole) != "devanagari" or LATIN.search(whole):
            continue
        chance = random.Random(f"{seed} {whole}")
        for style in chance.sample(range(STYLES), typists):
            meant = list(sentence)
            if chance.random() < 0.5:
                meant[-1] = meant[-1].rstrip("।॥?!.") or meant[-1]
            typed = [slipped(typist(style)(word).lower(), chance) for word in meant]
            if all(len(word.split()) == 1 for word in typed):
                yield from in_rows(typed, meant, whole, length)


def in_rows(typed, meant, sentence, length):
    """One sentence by one typist, in rows."""
    at = 0
    for row in cut(typed, length):
        yield " ".join(row), " ".join(meant[at:at + len(row)]), sentence
        at += len(row)


def slipped(word, chance):
    """The word, at times with a slip: a vowel left out, a letter twice, or two letters exchanged.
    """
    if len(word) < 4 or not word.isalpha() or chance.random() >= SLIPS:
        return word
    at = chance.randrange(1, len(word) - 1)
    kind = chance.randrange(3)
    if kind == 0:
        if word[at] not in VOWELS:
            return word
        return word[:at] + word[at + 1:]
    if kind == 1:
        return word[:at] + word[at] + word[at:]
    return word[:at] + word[at + 1] + word[at] + word[at + 2:]
