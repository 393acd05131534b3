"""Token files: strict opening of what prepare wrote, and windows whose order is a pure function of
a counter.

Used by train and evaluate:
    data = TokenData("data/processed", "train")
    windows = Windows(data, seq_len=512, seed=1337)
    x = windows.batch(position, 32)    # (B, T) int64; a resumed run continues with its counter
Notable: nothing is guessed and nothing clipped, a file that does not fit its meta.json is refused
with both numbers. The order is a seeded permutation computed on the fly: no list of indices, the
state is one integer.
"""
import os
import shlex
from functools import cached_property
from pathlib import Path

import numpy as np

from common import files
from common.console import UserError, say
from common.files import read_json, seal_holds
from text import starter
from text.tokenizer import NORMALISER

VERSION = 1
# every key of meta.json with its type and, for numbers, the smallest value allowed
KEYS = {
    "version": 1,
    "vocab_size": 1,
    "mask_token_id": 1,
    "pad_id": 0,
    "unk_id": 0,
    "bos_id": 0,
    "eos_id": 0,
    "dtype": str,
    "train_tokens": 1,
    "val_tokens": 0,
    "train_docs": 1,
    "val_docs": 0,
    "train_bytes": 1,
    "val_bytes": 0,
    "train_sha256": str,
    "val_sha256": str,
    "tokenizer": str,
    "tokenizer_sha256": str,
    "normaliser": str,
    "source": str,
    "scripts": dict,
    "sources": list,
    "settings_sha256": str,
    "seed": 0,
}
UNSEALED = {"cleaning", "romanised_share"}  # other keys that a meta.json without a seal may have
TOLD = set()                # folders without a seal that were spoken of
# up to this size every id and the hash are checked at opening, above it ids as the windows are read
SCAN_BYTES = 10**9


def token_dtype(vocab_size):
    """The mask's id must fit too, although it never occurs in a file. Always little-endian."""
    return np.dtype("<u2") if vocab_size + 1 <= 65536 else np.dtype("<u4")


def tensor_of(array):
    """The array as a tensor."""
    import torch                                                 # late: prepare does without it
    return torch.from_numpy(array)


def file_sha256(path):
    try:
        return files.file_sha256(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None


def how_to_rebuild(data_dir, flags=None):
    """The end of a message: what makes this folder again. flags: those in its meta.json, if that
    can be trusted.
    """
    if not flags and Path(data_dir) == Path(starter.FOLDER):
        tokenizer = Path(data_dir, "tokenizer.model")
        flags = (
            f"--source builtin --tokenizer {tokenizer} --tokenizer_vocab {starter.VOCAB} "
            f"--max_chars {starter.CHARS}"
        )
    if flags:
        return f"python -m prepare {flags} --data_dir {data_dir} --force builds it again"
    return (
        f"to build it again, type the python -m prepare that made {data_dir} once more, with "
        "--force"
    )


def flags_with_values(words):
    """Words of a command line -> a list for each flag: its name and its values."""
    groups = []
    for word in words:
        if word.startswith("--"):
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups


class TokenData:
    """One split of a prepared folder: `.tokens` (read-only memory map), `.meta`, `.vocab_size`,
    `len(data)`.

    verify: compare the file with its sha256, which reads all of it; None does so up to SCAN_BYTES.
    text/token_file.py opens such a folder or a single file.
    """
    LONGER_VAL = "a larger --val_doc_frac in prepare"

    def __init__(self, data_dir, split="train", verify=None):
        self.dir = Path(data_dir)
        self.split = split
        self.path = self.dir / f"{split}.bin"
        self.fix = how_to_rebuild(data_dir)
        if not os.path.exists(self.dir / "meta.json"):
            raise UserError(
                f"no prepared text in {data_dir} (no meta.json): run python -m prepare --source "
                "files "
                f"--input YOUR_TEXT.txt --data_dir {data_dir}, or python -m colab_train_eco for "
                "everything"
            )
        self.meta = self.read_meta()
        self.vocab_size = self.meta["vocab_size"]
        self.dtype = token_dtype(self.vocab_size)
        self.tokens = self.open_tokens()

        small = self.tokens.nbytes <= SCAN_BYTES
        if small:
            for start in range(0, len(self), 2**22):
                self.check_ids(self.tokens[start:start + 2**22])
        if small if verify is None else verify:
            found = file_sha256(self.path)
            said = self.meta[f"{split}_sha256"]
            if found != said:
                self.refuse(f"{self.path} has sha256 {found[:12]}, but meta.json says {said[:12]}")

    def open_tokens(self):
        """The token file as a read-only memory map; its size has to be what meta.json says."""
        try:
            size = self.path.stat().st_size
            count = self.meta[f"{self.split}_tokens"]
            if size != count * self.dtype.itemsize:
                self.refuse(
                    f"{self.path} has {size:,} bytes, but meta.json says {count:,} "
                    f"{self.dtype.name} tokens = "
                    f"{count * self.dtype.itemsize:,} bytes"
                )
            if not count:
                self.refuse(f"{self.path} has 0 tokens")
            return np.memmap(self.path, self.dtype, "r")
        except OSError as error:
            self.refuse(f"cannot read {self.path} ({error.strerror})")

    def for_run(self, source, path):
        """The end of a message: how this folder is made fit for a run that had its text from
        `source`.

        path: the tokenizer of the run. The starter corpus where train puts it is the same each
        time.
        """
        if source == "builtin" and self.dir == Path(starter.FOLDER):
            return how_to_rebuild(starter.FOLDER)
        words = shlex.split(self.meta.get("flags", ""))
        kept = []
        for flag_and_values in flags_with_values(words):
            if flag_and_values[0] not in ("--tokenizer", "--tokenizer_vocab"):
                kept += flag_and_values
        if not kept:
            return f"prepare the text with --tokenizer {path}"
        return (
            f"python -m prepare {shlex.join(kept)} --tokenizer {path} --data_dir {self.dir} "
            "--force prepares it so"
        )

    def old_text(self, source):
        """The same, when the tokenizer is right and the text is not."""
        if source == "builtin" and self.dir == Path(starter.FOLDER):
            return how_to_rebuild(starter.FOLDER)
        return "give the old text"

    def refuse(self, what):
        raise UserError(f"{what}; {self.fix}")

    def read_meta(self):
        """meta.json with its seal checked; only a file of an older version has none, which is said
        once.
        """
        name = self.dir / "meta.json"
        try:
            meta = read_json(name)
        except UserError as error:
            self.refuse(str(error))
        if "seal" in meta and not seal_holds(meta):
            self.refuse(f"{name} was changed after it was written: its seal does not fit")
        self.check_meta(meta)
        if "seal" in meta:
            self.fix = how_to_rebuild(self.dir, meta.get("flags"))
        elif set(meta) - set(KEYS) - UNSEALED:
            self.refuse(f"{name} has keys that it should not have, and no seal")
        elif str(name) not in TOLD:
            TOLD.add(str(name))
            say(
                f"notice: {name} has no seal, as older versions wrote it, so its figures cannot be "
                f"checked; {how_to_rebuild(self.dir)}"
            )
        return meta

    def check_meta(self, meta):
        """Every key is there, of its type, in its range, and fits the others."""
        name = self.dir / "meta.json"
        for key, rule in KEYS.items():
            if key not in meta:
                self.refuse(f"{name} has no {key!r}")
            kind = rule if isinstance(rule, type) else int
            value = meta[key]
            if type(value) is not kind or (kind is int and not rule <= value < 2**63):
                self.refuse(
                    f"{name}: {key} is {str(value)[:60]!r}, which is no valid {kind.__name__}"
                )

        vocab = meta["vocab_size"]
        specials = [meta[key] for key in ("pad_id", "unk_id", "bos_id", "eos_id")]
        for what, found, wanted in (
            ("version", meta["version"], VERSION),
            ("normaliser", meta["normaliser"], NORMALISER),
            ("mask_token_id", meta["mask_token_id"], vocab),
            ("dtype", meta["dtype"], token_dtype(vocab).name),
        ):
            if found != wanted:
                self.refuse(
                    f"{name}: {what} is {found}, but this Aria needs {wanted} with {vocab} pieces"
                )
        if vocab >= 2**31 or max(specials) >= vocab or len(set(specials)) < 4:
            self.refuse(f"{name}: special ids {specials} do not fit a vocabulary of {vocab}")

    def check_ids(self, ids):
        top = int(ids.max())
        if top >= self.vocab_size:
            what = "the mask, which no text may hold" if top == self.vocab_size else "out of range"
            self.refuse(
                f"{self.path} holds the id {top}, {what}: the vocabulary is {self.vocab_size}"
            )

    def __len__(self):
        return len(self.tokens)

    @cached_property
    def tokenizer_path(self):
        """The tokenizer that made these ids: where meta.json says, or in the data folder; its hash
        must fit.
        """
        said = Path(self.meta["tokenizer"])
        wanted = self.meta["tokenizer_sha256"]
        places = (said, files.ROOT / said, self.dir / said.name)
        found = [path for path in places if os.path.isfile(path)]      # no error for any name
        hashes = [file_sha256(path) for path in found]
        if wanted in hashes:
            return found[hashes.index(wanted)]
        if not found:
            self.refuse(f"the tokenizer {said} of {self.dir} is missing")
        self.refuse(
            f"{self.dir} was made with tokenizer {wanted[:12]}, but {found[0]} is {hashes[0][:12]}"
        )

    def documents(self):
        """The ids of each document, BOS first."""
        ids = np.asarray(self.tokens)
        starts = np.flatnonzero(ids == self.meta["bos_id"])
        return np.split(ids, starts)[1:]

    def need(self, seq_len):
        if len(self) < seq_len:
            raise UserError(
                f"{self.path} has {len(self):,} tokens, fewer than one window of {seq_len}: use a "
                f"shorter --seq_len or --seq_schedule, more text, or (for val) {self.LONGER_VAL}"
            )

    def gather(self, starts, seq_len):
        """Windows from these positions on, (B, T) int64; the text is a ring, its end continues at
        its beginning.
        """
        rows = np.empty((len(starts), seq_len), np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            head = self.tokens[start:start + seq_len]
            row[:len(head)] = head
            row[len(head):] = self.tokens[:seq_len - len(head)]
        if len(rows) and len(self) * self.dtype.itemsize > SCAN_BYTES:
            self.check_ids(rows)
        return tensor_of(rows)                                   # (B, T)

    def val_windows(self, n, seq_len):
        """The same evenly spaced, disjoint windows each time: n of them, or as many as the text
        has.
        """
        self.need(seq_len)
        n = min(n, len(self) // seq_len)
        spare = len(self) - n * seq_len
        number = np.arange(n)
        return self.gather(number * seq_len + number * spare // max(n - 1, 1), seq_len)


def _mix(x):
    """splitmix64's finaliser, on uint64 arrays: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed(seed, numbers):
    """uint64 array of pseudo-random numbers, one for each of `numbers`."""
    base = _mix(np.array([seed % 2**64], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return _mix(base ^ _mix(numbers.astype(np.uint64) + np.uint64(0x632BE59BD9B4E019)))


def permute(index, n, key):
    """Element-wise bijection of 0..n-1 chosen by `key` (uint64 arrays): a Feistel network over the
    next power of 4, walked until it falls below n. No memory, whatever n."""
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    out = index.astype(np.uint64)
    todo = np.arange(len(index))
    while len(todo):
        keys = key[todo]
        left = out[todo] >> half
        right = out[todo] & low
        for turn in range(6):
            left, right = right, left ^ (_mix(keys + np.uint64(turn << 33) + right) & low)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= n]
    return out


class Windows:
    """Disjoint windows of seq_len tokens in a seeded order: per epoch another offset, each window
    exactly once.

    Window number i (0, 1, 2, ... over all epochs) depends on (seed, i) alone, so a run resumes from
    its counter.
    """

    def __init__(self, data, seq_len, seed):
        data.need(seq_len)
        self.data = data
        self.seq_len = seq_len
        self.seed = seed
        self.per_epoch = len(data) // seq_len

    def places(self, index, count):
        """Rows index .. index+count-1 -> (the key of each one's epoch, its number in the text)."""
        number = np.arange(index, index + count, dtype=np.int64)
        epoch, i = np.divmod(number, self.per_epoch)
        key = hashed(self.seed, epoch)
        return key, permute(i, self.per_epoch, key).astype(np.int64)

    def starts(self, index, count):
        """Where windows index .. index+count-1 begin in the text."""
        key, place = self.places(index, count)
        offset = (_mix(~key) % np.uint64(len(self.data))).astype(np.int64)
        return (offset + place * self.seq_len) % len(self.data)

    def batch(self, index, count):
        """Windows number index .. index+count-1 as a (B, T) int64 tensor."""
        return self.data.gather(self.starts(index, count), self.seq_len)

    def asked(self, index, count):
        """Which tokens of these windows are asked for: None, all of them."""
        return None

    def first_block(self, index, count, block, first):
        """The length of the first block of these windows: as it was drawn."""
        return first
