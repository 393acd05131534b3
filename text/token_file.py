"""A token file with its .meta beside it: what prepare_fineweb writes, and what other tools wrote.

    data = open_split("fineweb_1b.npy", "train", val_frac=0.01)     # or a folder that prepare made
    windows = Windows(data, seq_len=512, seed=1337)                 # as text/dataset.py has it

FILE.npy is an array of uint16 or uint32, FILE.bin the same numbers without a header. FILE.meta has
lines `key: value`. Nothing else is needed: the tail of the file, from a beginning of a document on,
is the validation text. Before anything is read from a file, its size has to fit its .meta, and its
largest id the vocabulary.
"""
import hashlib
import json
from pathlib import Path

import numpy as np

from common.console import UserError, say
from text import gpt2
from text.dataset import SCAN_BYTES, TokenData, file_sha256, token_dtype

SUFFIXES = (".npy", ".bin")
MAGIC = b"\x93NUMPY"
HEADER_BYTES = 128                         # of an .npy file, as NumPy pads its header
DTYPES = ("uint16", "uint32")
CHUNK = 2**22                              # tokens that are looked at together
# an older tool reserved the whole file first: one that was killed ends in zeros
LONGEST_ZEROS = 64
# a validation text begins at a document, if one begins within so many tokens
SEARCH = 2**20
PIECE = 1024                               # tokens of a document where the file shows none
NUMBERS = ("tokens", "documents", "vocab_size", "eot_id", "bytes")
NEEDED = ("tokens", "encoding")


def meta_path(path):
    """FILE.npy -> FILE.npy.meta"""
    return Path(f"{path}.meta")


def is_token_file(path):
    """Does this path name a token file, there or not, and no prepared folder?"""
    path = Path(path)
    if path.is_dir():
        return False
    return path.suffix in SUFFIXES or path.is_file()


def open_split(path, split, val_frac, data_format=None, vocab_size=None, verify=None):
    """One split of a prepared folder, which knows all by itself, or of a token file. data_format:
    npy or bin, anything else: by its first bytes.
    """
    if not is_token_file(path):
        return TokenData(path, split, verify)
    return TokenFile(path, split, val_frac, data_format, vocab_size, verify)


# ---- the .meta -----------------------------------------------------------------------------------

def meta_text(values):
    """The content of a .meta."""
    return "".join(f"{key}: {value}\n" for key, value in values.items())


def read_meta(path):
    """The .meta of a token file -> {key: text or number}. Older tools wrote fewer keys."""
    name = meta_path(path)
    try:
        lines = name.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"{path} has no {name.name} beside it, which says how many tokens of which encoding "
            "it holds: copy that file, too, or write it, with the lines tokens: NUMBER and "
            f"encoding: {gpt2.ENCODING}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {name}: {error}") from None

    values = {}
    for line in filter(str.strip, lines):
        key, colon, value = line.partition(":")
        key = key.strip()
        if not colon or key in values:
            raise UserError(f"{name}: {line[:60]!r} is no line of the form key: value, once a key")
        values[key] = value.strip()
    for key in NEEDED:
        if key not in values:
            raise UserError(f"{name} has no {key!r}: add a line {key}: VALUE")
    for key in NUMBERS:
        if key in values:
            if not values[key].isascii() or not values[key].isdigit():
                raise UserError(f"{name}: {key} is {values[key][:60]!r}, which is no number")
            values[key] = int(values[key])
    if values["encoding"] != gpt2.ENCODING:
        raise UserError(
            f"{name}: the encoding is {values['encoding'][:60]!r}, but only {gpt2.ENCODING} is "
            "known here"
        )
    return values


# ---- the file ------------------------------------------------------------------------------------

def npy_header(count, dtype):
    """The first HEADER_BYTES of an .npy file of so many tokens."""
    fields = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": (count,)}
    start = MAGIC + b"\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
    return start + repr(fields).ljust(HEADER_BYTES - 11).encode() + b"\n"


class TokenFile(TokenData):
    """One split of a token file, with what TokenData has: `.tokens`, `.meta`, `.vocab_size`.

    verify: compare the file with the sha256 in its .meta; None does so up to SCAN_BYTES.
    """
    LONGER_VAL = "a larger --val_frac"

    def __init__(self, path, split, val_frac, data_format, vocab_size, verify):
        self.path = self.dir = Path(path)
        self.split = split
        self.fix = f"python -m prepare_fineweb --output {path} --force makes such a file anew"
        if not self.path.exists():
            raise UserError(
                f"no token file {path}: python -m prepare_fineweb --tokens 100M --output {path} "
                "makes one"
            )
        self.about = read_meta(path)
        self.vocab_size = self.about.get("vocab_size", gpt2.VOCAB_SIZE)
        if vocab_size not in (None, self.vocab_size):
            raise UserError(
                f"--vocab_size {vocab_size}, but {meta_path(path)} says {self.vocab_size}: leave "
                "the flag out"
            )
        for key, wanted in (("vocab_size", gpt2.VOCAB_SIZE), ("eot_id", gpt2.END_ID)):
            if self.about.get(key, wanted) != wanted:
                raise UserError(
                    f"{meta_path(path)}: {key} is {self.about[key]}, but that of {gpt2.ENCODING} "
                    f"is {wanted}"
                )
        whole = self.open_tokens(data_format)
        self.check_whole(whole)
        self.begin = begin_of_validation(whole, val_frac)
        self.tokens = whole[:self.begin] if split == "train" else whole[self.begin:]
        self.dtype = whole.dtype
        if not len(self.tokens):
            raise UserError(
                f"--val_frac {val_frac:g} of {path}, which has {len(whole):,} tokens, leaves 0 of "
                f"them for {split}: give another share, or --eval_interval 0"
            )
        self.scan(whole if split == "train" else self.tokens)
        self.meta = self.describe(whole, self.identify(verify))

    # ---- opening
    def open_tokens(self, data_format):
        """All tokens as a read-only memory map."""
        try:
            with open(self.path, "rb") as file:
                is_npy = file.read(len(MAGIC)) == MAGIC
            if data_format == "npy" and not is_npy:
                self.refuse(f"--data_format npy, but {self.path} is no .npy file")
            if data_format == "bin":
                is_npy = False
            if is_npy:
                return self.open_npy()
            return self.open_bin()
        except OSError as error:
            self.refuse(f"cannot read {self.path} ({error.strerror or error})")

    def open_npy(self):
        try:
            tokens = np.lib.format.open_memmap(self.path, mode="r")
        except ValueError as error:        # no header, an array of objects, a file that is cut off
            self.refuse(f"{self.path} is no sound .npy file ({str(error)[:100]})")
        if tokens.ndim != 1 or tokens.dtype.name not in DTYPES:
            self.refuse(
                f"{self.path} holds {tokens.dtype.name} of shape {tokens.shape}, but a token file "
                "holds one row of uint16 or uint32"
            )
        size = self.path.stat().st_size
        if size != tokens.offset + tokens.nbytes:
            self.refuse(
                f"{self.path} has {size:,} bytes, but its header says {len(tokens):,} tokens = "
                f"{tokens.offset + tokens.nbytes:,} bytes"
            )
        return tokens

    def open_bin(self):
        dtype = token_dtype(self.vocab_size)
        if "dtype" in self.about:
            if self.about["dtype"] not in DTYPES:
                self.refuse(f"{meta_path(self.path)}: dtype is {self.about['dtype'][:60]!r}")
            dtype = np.dtype(self.about["dtype"]).newbyteorder("<")
        size = self.path.stat().st_size
        said = self.about["tokens"]
        if size != said * dtype.itemsize:
            self.refuse(
                f"{self.path} has {size:,} bytes, but {meta_path(self.path).name} says {said:,} "
                f"{dtype.name} tokens = {said * dtype.itemsize:,} bytes"
            )
        if not size:
            self.refuse(f"{self.path} has 0 tokens")
        return np.memmap(self.path, dtype, "r")

    def check_whole(self, whole):
        """The number of tokens fits the .meta, and the file was written to its end."""
        said = self.about["tokens"]
        if len(whole) != said or not said:
            self.refuse(
                f"{self.path} has {len(whole):,} tokens, but {meta_path(self.path).name} says "
                f"{said:,}"
            )
        complete = self.about.get("complete", "true")
        if complete != "true":
            self.refuse(f"{self.path} is not complete: its .meta says {complete[:20]}")
        tail = np.asarray(whole[-LONGEST_ZEROS:])
        if "complete" not in self.about and not tail.any() and len(tail) == LONGEST_ZEROS:
            self.refuse(
                f"{self.path} ends in {LONGEST_ZEROS} zeros or more: the tool that wrote it was "
                "stopped"
            )

    # ---- its content
    def scan(self, tokens):
        """Every id is below the vocabulary; otherwise a kernel would be the first to notice."""
        if tokens.nbytes > SCAN_BYTES:
            say(f"looking at all {len(tokens):,} ids of {self.path} ...")
        for start in range(0, len(tokens), CHUNK):
            self.check_ids(tokens[start:start + CHUNK])

    def identify(self, verify):
        """The sha256 of the file: that of its .meta, compared if that takes no time or is asked
        for.
        """
        said = self.about.get("sha256")
        small = self.path.stat().st_size <= SCAN_BYTES
        if said and not (small if verify is None else verify):
            return said
        found = file_sha256(self.path)
        if said and said != found:
            self.refuse(
                f"{self.path} has sha256 {found[:12]}, but {meta_path(self.path).name} says "
                f"{said[:12]}"
            )
        return found

    def describe(self, whole, identity):
        """What users of a TokenData read from its meta.json."""
        counts = dict(train=self.begin, val=len(whole) - self.begin)
        meta = dict(
            vocab_size=self.vocab_size,
            mask_token_id=self.vocab_size,
            bos_id=gpt2.END_ID,
            eos_id=gpt2.END_ID,
            tokenizer=str(gpt2.MERGES),
            tokenizer_sha256=gpt2.SHA256,
            source=self.about.get("source", "unknown"),
            dtype=self.tokens.dtype.name,
        )
        for split, count in counts.items():
            meta[f"{split}_tokens"] = count
            part = json.dumps([identity, split, self.begin, len(whole)])
            meta[f"{split}_sha256"] = hashlib.sha256(part.encode()).hexdigest()
        meta["val_bytes"] = bytes_of_text(whole[self.begin:])
        return meta

    @property
    def tokenizer_path(self):
        return gpt2.MERGES

    def documents(self):
        """The ids of each document between two ends of text; of a file without any, pieces."""
        ids = np.asarray(self.tokens)
        starts = np.flatnonzero(ids == gpt2.END_ID)
        if not len(starts):
            parts = np.split(ids, range(PIECE, len(ids), PIECE))
            return [np.concatenate(([gpt2.END_ID], part)) for part in parts]
        parts = np.split(ids, starts)[1:]
        return [np.concatenate((part, [gpt2.END_ID])) for part in parts[:-1]] + parts[-1:]

    def for_run(self, source, path):
        return "give the text of that checkpoint"

    def old_text(self, source):
        return "give the old file"


def begin_of_validation(whole, val_frac):
    """Where the tail begins: at a document, so that each is in one split only."""
    begin = len(whole) - int(len(whole) * val_frac)
    starts = np.flatnonzero(whole[begin:begin + SEARCH] == gpt2.END_ID)
    if len(starts) and begin + starts[0] + 1 < len(whole):
        begin += int(starts[0])
    return begin


def bytes_of_text(tokens):
    """How many bytes of text these ids are."""
    total = 0
    for start in range(0, len(tokens), CHUNK):
        total += int(gpt2.piece_bytes()[tokens[start:start + CHUNK]].sum())
    return total
