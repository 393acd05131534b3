"""The frame of transliteration: beside each letter that was typed stands a place for the answer.

    BOS d . i . l . l . i . SEP . SEP . k . a . l . SEP . SEP .          dilli kal

The dots are the places. A word of n letters has n + ROOM of them: first the letters of its answer,
then EOS up to the end of the word. So all words of a row can be answered at once, in any order, and
a letter stands near the letters that it is made of: nothing has to be counted or looked for.

    rows = cut(["dilli", "kal"], 97)                  # of at most 97 tokens: [["dilli", "kal"]]
    row = interlaced([ids of dilli, ids of kal], [ids of दिल्ली, ids of कल], tokenizer)
    windows = InterlacedWindows(data, seq_len, seed)  # training: rows, and what they ask

A model of --objective ar reads the same rows with each word's letters before its places.

SEP is the id of the pad, as in text/pairs.py. Letters are pieces of the tokenizer, which prepare
makes of single letters (--source transliterate).

Used by prepare, by training and by sampling/transliteration.py. Legend: B rows, T positions, P
places of a row, N rows of the text.
"""
import numpy as np

from common.console import UserError
from text.dataset import Windows, tensor_of

FRAME = "interlaced"  # in meta.json
MARK = "\x1f"         # between the two halves of a pair in prepare's spool; in no normalised text
ROOM = 2              # places of a word beyond its letters; 99.6 % of the answers fit


def is_interlaced(data):
    """Did prepare make this text for transliteration?"""
    return data.meta.get("frame") == FRAME


def tokens_of(letters):
    """What a word of so many letters takes in a row."""
    return 2 * (letters + ROOM)


def cut(words, length):
    """Words, cut into rows of at most so many tokens; a word that is too long gets a row of its
    own.
    """
    rows = [[]]
    tokens = 1
    for word in words:
        size = tokens_of(len(word))
        if rows[-1] and tokens + size > length:
            rows.append([])
            tokens = 1
        rows[-1].append(word)
        tokens += size
    return rows


def interlaced(typed, answers, tokenizer):
    """The ids of words as typed, and those of their answers -> a row; None if an answer is longer
    than the places of its word.
    """
    letters = []
    places = []
    for word, answer in zip(typed, answers, strict=True):
        spare = len(word) + ROOM - len(answer)
        if spare < 0:
            return None
        letters += [*word, *[tokenizer.pad_id] * ROOM]
        places += [*answer, *[tokenizer.eos_id] * spare]
    row = np.empty(1 + 2 * len(letters), np.int64)
    row[0] = tokenizer.bos_id
    row[1::2] = letters
    row[2::2] = places
    return row


def word_by_word(row, pad_id):
    """The positions of a row in another order: of each word first the letters, then the places, as
    a model needs them that reads from left to right.
    """
    ends = np.flatnonzero(row[1::2] == pad_id)[ROOM - 1::ROOM] + 1
    order = [np.zeros(1, np.int64)]
    begin = 0
    for end in ends:
        place = np.arange(begin, end)
        order += [1 + 2 * place, 2 + 2 * place]
        begin = end
    return np.concatenate(order)


def typed_in(row, tokenizer):
    """What was typed in a row."""
    letters = [int(letter) for letter in row[1::2]]
    words = []
    word = []
    for letter in letters:
        if letter != tokenizer.pad_id:
            word.append(letter)
        elif word:
            words.append(tokenizer.decode(word))
            word = []
    return " ".join(words)


def rows_of_pairs(texts, tokenizer, dtype):
    """Texts as those of text/pairs.py, a word of the answer for each typed one -> (the ids, tokens
    that are not asked) of each; no ids where an answer does not fit.
    """
    halves = [half.split(" ") for text in texts for half in text.split(MARK)]
    words = [word for half in halves for word in half]
    encoded = iter(tokenizer.encode_many(words, normalised=True))
    encoded = [[next(encoded) for _ in half] for half in halves]
    for typed, answers in zip(encoded[::2], encoded[1::2], strict=True):
        row = interlaced(typed, answers, tokenizer)
        if row is None:
            row = np.empty(0)
        yield row.astype(dtype), 1 + len(row) // 2


# ---- training ------------------------------------------------------------------------------------

class InterlacedWindows(Windows):
    """One row of the text a row of training, each once an epoch, in a seeded order; EOS behind it.
    left_to_right: each word's letters stand before its places.
    """

    def __init__(self, data, seq_len, seed, left_to_right=False):
        self.data = data
        self.left_to_right = left_to_right
        self.seq_len = seq_len
        self.seed = seed
        self.eos_id = data.meta["eos_id"]
        ids = np.asarray(data.tokens)
        self.begins = np.flatnonzero(ids == data.meta["bos_id"])                   # (N,)
        self.lengths = np.diff(np.append(self.begins, len(ids)))
        self.per_epoch = len(self.begins)
        if self.per_epoch != data.meta[f"{data.split}_docs"] or not (self.lengths % 2).all():
            data.refuse(f"{data.path} does not hold the rows that meta.json tells of")
        longest = self.lengths.max()
        if longest > seq_len:
            raise UserError(
                f"the longest row of {data.path} has {longest:,} tokens, but --seq_len is "
                f"{seq_len}: give --seq_len {longest}, or prepare with --pair_tokens {seq_len}"
            )

    def batch(self, index, count):
        return self.rows(self.places(index, count)[1])

    def asked(self, index, count):
        return self.answers(self.places(index, count)[1])

    def row(self, number):
        """One row of the text, and which of its tokens are asked."""
        begin = self.begins[number]
        ids = np.asarray(self.data.tokens[begin:begin + self.lengths[number]])
        position = np.arange(len(ids))
        if self.left_to_right:
            position = word_by_word(ids, self.data.meta["pad_id"])
        return ids[position], (position > 0) & (position % 2 == 0)

    def rows(self, numbers):
        """These rows of the text (B,) -> (B, T) int64."""
        rows = np.full((len(numbers), self.seq_len), self.eos_id, np.int64)
        for row, number in zip(rows, numbers, strict=True):
            row[:self.lengths[number]] = self.row(number)[0]
        if len(rows):
            self.data.check_ids(rows)
        return tensor_of(rows)

    def answers(self, numbers):
        """Where these rows hold their answers, (B, T) bool."""
        asked = np.zeros((len(numbers), self.seq_len), bool)
        for row, number in zip(asked, numbers, strict=True):
            row[:self.lengths[number]] = self.row(number)[1]
        return tensor_of(asked)
