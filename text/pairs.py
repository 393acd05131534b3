"""Pairs of a prompt and a response: read, framed, told apart, and in rows of one pair each.

    for prompt, response in read_pairs(path): ...        # {"prompt": "...", "response": "..."}
    windows = windows_of(data, seq_len, seed, dropout, rows=32)    # PairWindows, or Windows
    x0 = windows.batch(position, 32)                               # (B, T) ids
    asked = windows.asked(position, 32)                            # (B, T) bool; None: all tokens

A pair is framed as

    BOS prompt SEP response EOS

SEP is the id of the pad: no text holds it, and it is never an answer, so where it stands says what
is prompt and what is response. No second file is needed for that. A row holds one pair, and EOS
behind it; only the response and its first EOS are asked. The null prompt is the same frame with
nothing in front of SEP: training draws it for a share of the rows (--conditioning_dropout), and
sampling takes it for an empty prompt and for the other side of guidance.

Used by prepare and by training; sampling/settings.py frames a prompt (opening).

Legend: B rows, T positions, N pairs.
"""
import json
import re
from bisect import bisect_right
from pathlib import Path

import numpy as np

from common.console import UserError
from text.dataset import Windows, hashed, permute, tensor_of
from text.documents import LINE_BYTES, kind_of, read_lines
from text.interlace import MARK, InterlacedWindows, is_interlaced
from text.tokenizer import normalise

CHUNK = 64            # steps whose pairs are sorted by the lengths of their prompts
EXAMPLE = '{"prompt": "...", "response": "..."}'
SENTENCE_END = re.compile(r"(?<=[।॥?!.])\s+|\n+")
LONGEST_PIECE = 16    # letters of a piece of SentencePiece, at most


# ---- reading -------------------------------------------------------------------------------------

def read_pairs(path):
    """(prompt, response) of each line of a .jsonl file, normalised."""
    path = Path(path)
    if kind_of(path) not in (".jsonl", None) and path.name != "stdin.txt":
        raise UserError(f"{path}: pairs are read from .jsonl files, each line {EXAMPLE}")
    for number, line in read_lines(path):
        yield parse_pair(line, f"{path}, line {number}")


def parse_pair(line, where):
    """The two texts of one line."""
    if not line.strip():
        raise UserError(f"{where}: an empty line; delete it, as each line is a pair")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = f"not valid JSON ({error})"
        if len(line.encode()) > LINE_BYTES - 8:         # then this is only a part of the line
            why = f"longer than {LINE_BYTES:,} bytes"
        raise UserError(f"{where}: {why}; each line must be {EXAMPLE}") from None
    texts = []
    for name in ("prompt", "response"):
        text = record.get(name) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f'{where}: no "{name}"; each line must be {EXAMPLE}')
        text = normalise(text).strip()
        if not text:
            raise UserError(f'{where}: the "{name}" is empty; fill it in or delete the line')
        texts.append(text)
    return texts


# ---- cutting documents ---------------------------------------------------------------------------

def cut_document(text):
    """A document -> [its title or first sentence, the rest]; without a second sentence []."""
    halves = SENTENCE_END.split(normalise(text).strip(), maxsplit=1)
    return halves if len(halves) == 2 else []


def shortened(text, tokenizer, most):
    """Prompt, MARK, response -> the same, with as many whole sentences of the response as make a
    pair of at most so many tokens; if not even one does, all of it.
    """
    if len(text.encode()) + 2 <= most:          # no token is less than a byte; BOS and EOS
        return text
    prompt, response = text.split(MARK)
    room = most - 3 - len(tokenizer.encode(prompt))
    ends = [end.start() for end in SENTENCE_END.finditer(response)] + [len(response)]
    fit = bisect_right(ends, room, key=lambda end: len(tokenizer.encode(response[:end])))
    if not fit:
        return text
    return MARK.join((prompt, response[:ends[fit - 1]]))


# ---- framing -------------------------------------------------------------------------------------

def rows_of_pairs(texts, tokenizer, dtype):
    """Texts with MARK between prompt and response -> (their framed ids, tokens in front of the
    response) of each.
    """
    halves = [half for text in texts for half in text.split(MARK)]
    encoded = tokenizer.encode_many(halves, normalised=True)
    for prompt, response in zip(encoded[::2], encoded[1::2], strict=True):
        parts = (
            [tokenizer.bos_id], prompt, [tokenizer.pad_id], response, [tokenizer.eos_id]
        )
        yield np.concatenate(parts).astype(dtype), len(prompt) + 2


# ---- rows ----------------------------------------------------------------------------------------

def are_pairs(data):
    """Did prepare make this text of pairs?"""
    return "pairs" in data.meta and not is_interlaced(data)


def windows_of(data, seq_len, seed, dropout, rows, causal=False):
    """What a training reads, so many rows a step."""
    if is_interlaced(data):
        return InterlacedWindows(data, seq_len, seed, causal)
    if are_pairs(data):
        return PairWindows(data, seq_len, seed, dropout, rows)
    return Windows(data, seq_len, seed)


def held_out_rows(data, count, seq_len, causal=False):
    """The same evenly spaced rows each time -> (ids (R, T), where they are asked or None)."""
    if "pairs" not in data.meta:
        return data.val_windows(count, seq_len), None
    windows = windows_of(data, seq_len, 0, 0.0, 1, causal)
    count = min(count, windows.per_epoch)
    numbers = np.arange(count) * windows.per_epoch // count
    if is_interlaced(data):
        return windows.rows(numbers), windows.answers(numbers)
    without = np.zeros(count, bool)
    return windows.rows(numbers, without), windows.responses(numbers, without)


class PairWindows(Windows):
    """One pair a row, in a seeded order: each pair once an epoch. Which row has the null prompt is
    a function of its number, too.
    """

    def __init__(self, data, seq_len, seed, dropout, step_rows):
        self.data = data
        self.seq_len = seq_len
        self.seed = seed
        self.dropout = dropout
        self.step_rows = step_rows
        self.bos_id = data.meta["bos_id"]
        self.eos_id = data.meta["eos_id"]
        ids = np.asarray(data.tokens)
        self.begins = np.flatnonzero(ids == self.bos_id)                           # (N,)
        self.responses_begin = np.flatnonzero(ids == data.meta["pad_id"]) + 1
        self.ends = np.append(self.begins[1:], len(ids))
        self.per_epoch = len(self.begins)
        self.check()

    def check(self):
        """Every pair is whole, and none is longer than a row."""
        data = self.data
        sound = len(self.begins) == len(self.responses_begin) == data.meta[f"{data.split}_docs"]
        if sound:
            in_order = (self.begins < self.responses_begin) & (self.responses_begin < self.ends)
            sound = in_order.all()
        if not sound:
            data.refuse(f"{data.path} does not hold the pairs that meta.json tells of")
        lengths = self.ends - self.begins
        if lengths.max() > self.seq_len:
            raise UserError(
                f"pair {lengths.argmax() + 1:,} of {data.path} has {lengths.max():,} tokens, but "
                f"--seq_len is {self.seq_len}: give --seq_len {lengths.max()}, or prepare the "
                f"pairs with --pair_tokens {self.seq_len}, which names the lines that are too long"
            )

    def chosen(self, index, count):
        """The pairs of rows index .. index+count-1, and which of them get the null prompt."""
        rows = np.arange(index, index + count, dtype=np.int64)
        size = self.step_rows * CHUNK
        numbers = [self.in_steps(chunk, size) for chunk in np.unique(rows // size)]
        numbers = np.concatenate(numbers)[rows - rows[0] // size * size]
        share = hashed(self.seed + 1, rows).astype(np.float64) / 2.0**64
        return numbers, share < self.dropout

    def in_steps(self, chunk, size):
        """The pairs of one chunk: those of a step have prompts of one length, as far as there are
        enough of them, so that a block begins where the responses begin, as it does in sampling.
        """
        _, numbers = self.places(chunk * size, size)
        length = (self.responses_begin - self.begins)[numbers]
        steps = numbers[np.argsort(length, kind="stable")].reshape(CHUNK, self.step_rows)
        key = np.repeat(hashed(self.seed + 2, np.array([chunk])), CHUNK)
        return steps[permute(np.arange(CHUNK), CHUNK, key).astype(np.int64)].reshape(-1)

    def first_block(self, index, count, block, first):
        """The first block's length that lets the responses of this step begin with a block."""
        if block >= self.seq_len:
            return first
        numbers, _ = self.chosen(index, count)
        before = (self.responses_begin - self.begins)[numbers]
        return int(np.median(before)) % block or block

    def batch(self, index, count):
        return self.rows(*self.chosen(index, count))

    def asked(self, index, count):
        return self.responses(*self.chosen(index, count))

    def rows(self, numbers, without_prompt):
        """These pairs (B,) as rows (B, T) int64: their tokens, and EOS behind them."""
        rows = np.full((len(numbers), self.seq_len), self.eos_id, np.int64)
        for row, number, without in zip(rows, numbers, without_prompt, strict=True):
            ids = self.data.tokens[self.begins[number]:self.ends[number]]
            if without:
                response = self.responses_begin[number] - self.begins[number]
                ids = np.concatenate((ids[:1], ids[response - 1:]))
            row[:len(ids)] = ids
        if len(rows):
            self.data.check_ids(rows)
        return tensor_of(rows)

    def responses(self, numbers, without_prompt):
        """Where these rows hold their responses, the first EOS included, (B, T) bool."""
        tokens = (self.ends - self.responses_begin)[numbers]                       # (B,)
        before = (self.responses_begin - self.begins)[numbers]
        before = np.where(without_prompt, 2, before)[:, None]
        position = np.arange(self.seq_len)
        inside = (position >= before) & (position < before + tokens[:, None])
        return tensor_of(inside)
