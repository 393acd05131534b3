"""Pairs of Hinglish and Hindi out of Devanagari text: each sentence as several people type it.

    for prompt, response, sentence in typed_pairs(text, typists=2, seed=1337): ...
    parts("ye accha hai. kal milte hain")       # ["ye accha hai.", "kal milte hain"]

A typist is a style of text/romanise.py. On top come slips of the fingers, a capital at the
beginning and, as often as not, no full stop at the end. A long sentence is cut between words, so
that a pair fits into a short row; what the model is asked later is cut in the same way.

Used by prepare (--source transliterate) and by sample (--transliterate).
"""
import random
from functools import cache

from text.romanise import Romaniser
from text.tokenizer import normalise, script_of

WORDS = 4             # of a pair
LETTERS = 36          # of a pair; a longer word is cut
STYLES = 32           # typists there are
SLIPS = 0.04          # words with a slip
ENDS = ("।", "॥", "?", "!", ".")
VOWELS = "aeiou"


def parts(text):
    """A text -> its sentences; a long one in parts, cut between words."""
    found = []
    for line in text.split("\n"):
        words = []
        letters = 0
        for word in pieces_of_words(line):
            if words and (len(words) == WORDS or letters + len(word) >= LETTERS):
                found.append(" ".join(words))
                words = []
                letters = 0
            words.append(word)
            letters += len(word) + 1
            if word.endswith(ENDS):
                found.append(" ".join(words))
                words = []
                letters = 0
        if words:
            found.append(" ".join(words))
    return found


def pieces_of_words(line):
    """The words of a line; one that is too long for a pair in pieces."""
    for word in line.split():
        for start in range(0, len(word), LETTERS):
            yield word[start:start + LETTERS]


@cache
def typist(style):
    return Romaniser(style)


def typed_pairs(text, typists, seed):
    """(what is typed, what is meant, the sentence that both are of) of each Devanagari sentence of
    a text, by so many typists.
    """
    for sentence in parts(normalise(text)):
        if script_of(sentence) != "devanagari":
            continue
        chance = random.Random(f"{seed} {sentence}")
        for style in chance.sample(range(STYLES), typists):
            meant = sentence
            if chance.random() < 0.5:
                meant = sentence.rstrip("।॥?!. ") or sentence
            typed = " ".join(slipped(word, chance) for word in typist(style)(meant).split())
            if chance.random() < 0.3:
                typed = typed[:1].upper() + typed[1:]
            yield normalise(typed), meant, sentence


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
