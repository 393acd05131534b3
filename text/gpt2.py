"""GPT-2's tokenizer: its byte-level BPE by the package tokenizers, its list of merges from this
folder.

    tokenizer = open_tokenizer(source)      # a path or bytes: SentencePiece's or GPT-2's
    ids = tokenizer.encode("Hello world")   # [15496, 995]

Used where text was made by prepare_fineweb, or by another tool in the same encoding. Nothing is
downloaded: gpt2_merges.txt is the file vocab.bpe that OpenAI published with GPT-2, byte for byte
(its licence: gpt2_merges.licence.txt), and all 50,257 pieces follow from it: the 256 bytes, one
piece for each merge, and the end of text. Text goes in as it is: no normaliser, so the ids are
those that every other tool makes. There is no pad and no unknown; the end of text stands before
each document, so it is the first id of a prompt, and it ends a text that a model writes.
"""
import hashlib
import os
import re
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np

try:
    import tokenizers
except ModuleNotFoundError:  # optional: Gpt2Tokenizer says how to get it
    tokenizers = None

from common.console import Damage, UserError, need
from text.tokenizer import Tokenizer

ENCODING = "gpt2"
MERGES = Path(__file__).with_name("gpt2_merges.txt")
SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"      # of MERGES
FIRST_WORDS = b"#version: 0.2\n"           # what the file begins with
END = "<|endoftext|>"
VOCAB_SIZE = 50257
END_ID = VOCAB_SIZE - 1
PART_CHARS = 50_000                        # longer texts are encoded in parts
# between a letter and a lone space, where no piece of GPT-2's goes across
_CUT = re.compile(r"(?<=\S) (?=\S)")


def open_tokenizer(source):
    """The tokenizer in a file, or in the bytes that a checkpoint carries."""
    if isinstance(source, bytes):
        start = source
    else:
        try:
            with open(source, "rb") as file:
                start = file.read(len(FIRST_WORDS) + 1)
        except OSError:
            start = b""                    # Tokenizer says what is wrong with it
    if start.replace(b"\r\n", b"\n").startswith(FIRST_WORDS):
        return Gpt2Tokenizer(source)
    return Tokenizer(source)


def check_tokenizer(path, own):
    """--tokenizer may only name the one that the checkpoint carries itself."""
    if not os.path.exists(path):
        raise UserError(
            f"--tokenizer {path}: no such file; leave the flag out, the checkpoint carries its own "
            "tokenizer"
        )
    given = open_tokenizer(path)
    if given.sha256 != own.sha256:
        raise UserError(
            f"--tokenizer {path} ({given.sha256[:12]}) is not the one this checkpoint was trained "
            f"with ({own.sha256[:12]}): leave the flag out, the checkpoint carries its own"
        )


def byte_letters():
    """The letter that stands for each byte in a piece: itself where it can be printed, else one
    from U+0100 on; in the order of their ids, the printable bytes first.
    """
    printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    for number, byte in enumerate(others):
        letters[byte] = chr(0x100 + number)
    return letters


@cache
def read_merges():
    """The pairs of MERGES in their order."""
    return parse_merges(MERGES.read_bytes(), MERGES)


def parse_merges(data, name):
    data = data.replace(b"\r\n", b"\n")    # a checkout on Windows
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise Damage(f"{name} is not the list of merges of GPT-2: it was changed")
    lines = data.decode().split("\n")[1:-1]
    return [tuple(line.split(" ")) for line in lines]


@cache
def pieces():
    """The text of each id, a letter for each byte."""
    merged = ["".join(pair) for pair in read_merges()]
    return [*byte_letters().values(), *merged, END]


@cache
def piece_bytes():
    """How many bytes of text each id is; the end of text is none."""
    sizes = np.array([len(piece) for piece in pieces()], np.int64)
    sizes[END_ID] = 0
    return sizes


def parts_of(text):
    """A long text in parts whose ids are those of the whole."""
    start = 0
    while start + PART_CHARS < len(text):
        cut = _CUT.search(text, start + PART_CHARS)
        if not cut:
            break
        yield text[start:cut.start()]
        start = cut.start()
    yield text[start:]


class Gpt2Tokenizer:
    """Text to ids and back, with the methods of text.tokenizer.Tokenizer that users of a model
    need.
    """
    vocab_size = VOCAB_SIZE                # the mask's id is this number
    pad_id = None
    unk_id = None
    bos_id = END_ID
    eos_id = END_ID

    def __init__(self, source=MERGES):
        need("tokenizers", "for text in GPT-2's encoding (requirements_gpt2.txt)")
        name = source
        if isinstance(source, bytes):
            name = "the tokenizer"
            self.model_bytes = source.replace(b"\r\n", b"\n")
        else:
            try:
                self.model_bytes = Path(source).read_bytes().replace(b"\r\n", b"\n")
            except OSError as error:
                raise UserError(f"no tokenizer at {name} ({error.strerror})") from None
        merges = parse_merges(self.model_bytes, name)
        self.sha256 = SHA256
        ids = {piece: number for number, piece in enumerate(pieces())}
        self.bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=merges))
        self.bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.bpe.decoder = tokenizers.decoders.ByteLevel()

    def encode(self, text):
        """Ids of one text, without the end of text, whatever the text says."""
        [ids] = self.encode_many([text])
        return ids.tolist()

    def encode_many(self, texts):
        """The same, as one uint16 array per text, on all cores."""
        groups = []
        for text in texts:
            sound = text.encode("utf-8", "replace").decode()     # half a surrogate pair becomes ?
            groups.append(list(parts_of(sound)))
        encoded = self.bpe.encode_batch_fast(list(chain(*groups)), add_special_tokens=False)
        rows = iter(encoded)
        found = []
        for group in groups:
            ids = [next(rows).ids for _ in group]
            found.append(np.fromiter(chain(*ids), np.uint16))
        return found

    def decode(self, ids):
        """Text of ids (list, array, tensor); the end of text, the mask and ids out of range are
        left out.
        """
        return self.bpe.decode([i for i in map(int, ids) if 0 <= i < END_ID])

    def written(self, ids):
        """Text of ids that a model wrote: its length may cut a letter that is made of bytes, whose
        first ones are left out.
        """
        return self.decode(ids).rstrip("\ufffd")

    def opens_word(self, token):
        """Whether a word begins with this id: with a space or a line break."""
        return pieces()[token].startswith(("\u0120", "\u010a"))
