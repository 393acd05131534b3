"""Prompts for documents that have none: a few words of the document that few other documents have.

    known = topic_words(documents, max_docs, max_chars)      # the words that may be asked for
    topic_of(text, known, count=3, seed=1337, letters=200)   # "नदी, किसान"; or ""

What people ask of a small model is a topic, "write about rivers", and what they can check is
whether the answer has it. Used by prepare (--cut_documents --prompt_words N).

Notable: a word of a topic is drawn, not the rarest one of its document. So each word is asked for
at times, and a common one as often as it can be.
"""
import random
import unicodedata
from collections import Counter

from text.pairs import MARK
from text.tokenizer import normalise

SHORTEST = 3           # letters of a word of a topic, vowel signs included
FEWEST = 1 / 3000      # share of the documents that a word is in: fewer teach it too seldom ...
MOST = 1 / 50          # ... and more have it whatever the topic is
FEWEST_DOCS = 2        # the same for a small text
MOST_DOCS = 10
LETTERS = 3            # of a token, as far as one may hope: words further on may not fit
REMEMBERED = 1_000_000                     # words whose documents are counted at a time
BETWEEN = ", "


def is_letter(character):
    return unicodedata.category(character)[0] in "LM"


def words_of(text):
    """The words of a normalised text in their order, without the marks at their edges: letters
    alone, and more than two of them.
    """
    words = []
    for piece in text.lower().split():
        marks = [character for character in piece if not is_letter(character)]
        word = piece.strip("".join(marks))
        if len(word) >= SHORTEST and all(map(is_letter, word)):
            words.append(word)
    return words


def topic_words(documents, max_docs, max_chars):
    """The words that may be asked for: in few of these documents, but in enough to be learned."""
    counts = Counter()
    docs = 0
    chars = 0
    for text in documents:
        text = normalise(text).strip()
        if not text:
            continue
        if docs >= max_docs or 0 < chars > max_chars - len(text):
            break
        docs += 1
        chars += len(text)
        counts.update(set(words_of(text)))
        if len(counts) > REMEMBERED:       # most words of a long text are misspelt ones, seen once
            counts = forgotten(counts)
    fewest = max(FEWEST_DOCS, FEWEST * docs)
    most = max(MOST_DOCS, MOST * docs)
    return {word for word, number in counts.items() if fewest <= number <= most}


def forgotten(counts):
    """The commoner half of what was counted, or less: ties are forgotten, whatever their order."""
    least = sorted(counts.values())[len(counts) // 2]
    return Counter({word: number for word, number in counts.items() if number > least})


def topic_of(text, known, count, seed, letters):
    """One to so many known words out of the first letters of a text, in their order; "" if there is
    none. The same text and seed have the same topic.
    """
    words = words_of(text[:letters])
    if len(text) > letters:
        words = words[:-1]                 # perhaps only a part of a word
    words = [word for word in dict.fromkeys(words) if word in known]
    if not words:
        return ""
    chance = random.Random(f"{seed} {text}")
    number = min(chance.randint(1, count), len(words))
    return BETWEEN.join(words[at] for at in sorted(chance.sample(range(len(words)), number)))


def still_asked(pair):
    """A pair whose response was cut, without the words that went with the rest; "" if no word of
    its topic is left.
    """
    topic, response = pair.split(MARK)
    there = set(words_of(response))
    left = [word for word in topic.split(BETWEEN) if word in there]
    return MARK.join((BETWEEN.join(left), response)) if left else ""
