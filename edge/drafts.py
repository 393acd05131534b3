"""Drafts out of a table: which token mostly follows the last few. No network is asked.

    entries = count(tokens)                     # of the training text
    drafts = Drafts(entries)
    tokens, chances = drafts.behind(text, 7)    # up to 7 tokens that may follow, and how surely

python -m export counts them in the training text and writes them beside the model's weights
(drafts.bin); sampling/speculate.py has them verified, so that a table that is wrong costs time and
changes no text. A table knows what follows 2 to 5 tokens, for as many contexts as pay most: those
that are met often, and whose shorter context does not say the same already.

Legend: N tokens, C contexts of one length.
"""
from array import array
from bisect import bisect_left
from typing import NamedTuple

import numpy as np

LENGTHS = (2, 3, 4, 5)      # tokens of a context
ENTRIES = 24_000            # of a table: 170 KB
TOKENS = 4_000_000          # of the training text that are counted
LEAST = 0.25                # chance of a token that is worth an entry
UNSURE = 0.1                # chance of a draft that is worth no row of a verification
GAIN = 0.1                  # in chance, of a longer context that says what a shorter one says
FACTOR = 0x9E3779B97F4A7C15                     # of the hash: 2 ** 64 by the golden ratio
WORD = (1 << 64) - 1
MOST_TOKENS = 1 << 24       # tokens there may be: one and its context fit into 64 bits


class Entries(NamedTuple):
    """Contexts as numbers, in their order, the token behind each, and its chance in 255ths."""
    contexts: np.ndarray    # (N,) uint32
    tokens: np.ndarray      # (N,) uint32, or uint16 where that is enough
    chances: np.ndarray     # (N,) uint8


class Drafts:
    """A table, ready to be asked."""

    def __init__(self, entries):
        # a search in arrays takes longer than one in a dict, and a dict takes long to make
        self.contexts = array("I", entries.contexts.tobytes())
        self.entries = entries

    def behind(self, text, most):
        """What may follow a text (a list of ids) -> (tokens, chances that each and all before it
        are right).
        """
        text = list(text[-LENGTHS[-1]:])
        tokens = []
        chances = []
        sure = 1.0
        while len(tokens) < most:
            found = self.next(text)
            if found is None:
                break
            token, chance = found
            sure *= chance
            if sure < UNSURE:
                break
            tokens.append(token)
            chances.append(sure)
            text = [*text, token]
        return tokens, chances

    def next(self, text):
        """(token, chance) of the context that is surest, or None."""
        best = None
        for length in LENGTHS:
            if length <= len(text):
                number = number_of(text[-length:])
                at = bisect_left(self.contexts, number)
                if at < len(self.contexts) and self.contexts[at] == number:
                    chance = int(self.entries.chances[at]) / 255
                    if best is None or chance > best[1]:
                        best = int(self.entries.tokens[at]), chance
        return best


def number_of(context):
    """A few ids -> 32 bits that stand for them. Two contexts with one number do no harm."""
    number = len(context)
    for token in context:
        number = ((number ^ token) * FACTOR) & WORD
        number ^= number >> 31
    return number >> 32


def numbers_of(tokens, length):
    """number_of every context of this length in tokens (N,) -> (N - length + 1,) uint64."""
    end = len(tokens) - length + 1
    numbers = np.full(end, length, np.uint64)
    for place in range(length):
        numbers = (numbers ^ tokens[place:place + end]) * np.uint64(FACTOR)
        numbers ^= numbers >> np.uint64(31)
    return numbers >> np.uint64(32)


def count(tokens):
    """Token ids (N,) -> the Entries that pay most."""
    tokens = np.asarray(tokens[:TOKENS]).astype(np.uint64)
    found = []
    shorter = None
    for length in LENGTHS:
        if len(tokens) > length:
            contexts, followers, times, chances = commonest(tokens, length)
            gain = chances.copy()
            if shorter is not None:
                gain -= said_already(tokens, length, contexts, followers, shorter)
            pays = (gain >= GAIN) & (chances >= LEAST) & (times >= 2)
            worth = (times * gain)[pays]
            found.append((worth, contexts[pays], followers[pays], chances[pays]))
            shorter = (contexts, followers, np.where(chances >= LEAST, chances, 0))
    return best_of(found)


def commonest(tokens, length):
    """Of each context of this length that occurs: (its number, the token that follows most often,
    how often, with which chance), each (C,), sorted by the number.
    """
    pairs = numbers_of(tokens[:-1], length) * np.uint64(MOST_TOKENS) + tokens[length:]
    pairs, times = np.unique(pairs, return_counts=True)
    contexts = pairs // np.uint64(MOST_TOKENS)
    begins = np.flatnonzero(np.append(True, contexts[1:] != contexts[:-1]))        # (C,)
    total = np.add.reduceat(times, begins)
    # sorted by context and then by count, the last of a context is its commonest
    order = np.lexsort((times, contexts))
    top = order[np.append(begins[1:], len(order)) - 1]
    chances = (times[top] - 0.5) / (total + 1)
    return contexts[top], pairs[top] % np.uint64(MOST_TOKENS), times[top], chances


def said_already(tokens, length, contexts, followers, shorter):
    """The chance (C,) that the same context without its first token gives the same follower; 0
    where it gives another.
    """
    # one place of each context in the text, and the number of what is shorter there
    _, places = np.unique(numbers_of(tokens[:-1], length), return_index=True)
    suffixes = numbers_of(tokens[:-1], length - 1)[places + 1]
    known, their_followers, their_chances = shorter
    at = np.searchsorted(known, suffixes)
    return np.where(their_followers[at] == followers, their_chances[at], 0)


def best_of(found):
    """[(worth, contexts, followers, chances)] of every length -> Entries."""
    if not found:
        found = [(np.zeros(0),) * 4]
    columns = zip(*found, strict=True)
    worth, contexts, followers, chances = (np.concatenate(parts) for parts in columns)
    order = np.argsort(-worth, kind="stable")[:ENTRIES]
    order = order[np.argsort(contexts[order], kind="stable")]
    kind = np.uint16 if followers.max(initial=0) < 1 << 16 else np.uint32
    return Entries(
        contexts[order].astype(np.uint32),
        followers[order].astype(kind),
        np.round(255 * chances[order]).astype(np.uint8),
    )


# ---- the file ------------------------------------------------------------------------------------

def write(path, entries):
    """One array of an Entries behind the other -> what the manifest says of it."""
    with open(path, "wb") as file:
        for array in entries:
            file.write(array.tobytes())
    return {"entries": len(entries.tokens), "token_bytes": entries.tokens.itemsize}


def read(path, told):
    """told: what write gave -> Entries."""
    size = told["entries"]
    kinds = (np.uint32, np.dtype(f"<u{told['token_bytes']}"), np.uint8)
    arrays = []
    offset = 0
    for kind in kinds:
        arrays.append(np.fromfile(path, kind, size, offset=offset))
        offset += arrays[-1].nbytes
    return Entries(*arrays)
