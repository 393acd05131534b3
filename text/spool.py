"""Documents between reading and encoding: one file of normalised text, and the plan of the split,
both kept over a kill.

Used by prepare: pass 1 adds documents, `close` fixes the split and leaves spool.bin with
spool.json; passes 2 and 3 iterate, from any place. A second run with the same settings finds the
pair and does not read the sources again, if both are still what was written: the plan carries the
hash of the text and its own. The split is by hash of the text, so a copy of a training document is
never in validation. With --romanise a share of the Devanagari documents, chosen by the same hash,
comes out in Latin letters: never both forms of one document.
"""
import hashlib
import os
import struct
from collections import Counter
from pathlib import Path

from common.console import UserError
from common.files import file_sha256, read_json, seal_holds, sealed, write_json
from text.romanise import Romaniser
from text.tokenizer import SAMPLE_BYTES, SCRIPTS, normalise, script_of

ENOUGH = 20  # a script with so many documents is in validation for certain
BATCH_CHARS = 500_000                      # text that is encoded at a time
PIECE_CHARS = 50_000                       # the tokenizer's sample takes pieces of long documents
TYPISTS = 16                               # for --romanise: each types in one way throughout
FEW = 1000                                 # up to so many documents their sizes are remembered
RECORD = struct.Struct("<QBQ")  # hash of the document, script, bytes of the text that follows
KEPT = ("docs", "bytes", "chars", "full", "limit", "forced", "high", "cut", "romanised",
        "script_bytes", "extra", "written")


def spread(key, salt):
    """Another hash of a hash, as a number in [0, 1)."""
    digest = hashlib.blake2b(key.to_bytes(8, "little"), digest_size=7, salt=salt).digest()
    return int.from_bytes(digest, "little") / 2**56


class Spool:
    """The documents of one run of prepare, in a file, and how they are split."""

    def __init__(self, folder, args, digest):
        self.args = args
        self.digest = digest               # of the settings and the sources
        self.path = Path(folder, "spool.bin")
        self.plan_path = Path(folder, "spool.json")

        # what was added; scripts are numbers, by their place in SCRIPTS
        self.docs = Counter()              # script -> documents
        self.script_bytes = Counter()
        self.bytes = 0
        self.chars = 0
        self.full = False                  # was a limit reached?
        self.low = {}                      # script -> smallest hash of a document
        self.high = {}                     # script -> largest
        self.sizes = {}                    # hash -> bytes, of the first FEW documents

        # the plan, made by close()
        self.limit = 0                     # a document with a smaller hash is validation
        self.forced = set()                # hashes of more of them
        self.cut = False                   # a single document, whose end is validation
        self.romanised = 0.0               # share of the Devanagari documents
        self.written = None                # sha256 of the file, once it is whole
        self.extra = {}                    # what the caller wants to find again

    # ---- pass 1
    def begin(self):
        self.plan_path.unlink(missing_ok=True)
        self.file = open(self.path, "wb")
        self.hash = hashlib.sha256()

    def add(self, text, decides):
        """False once a limit is reached; the first document comes in whatever its length. `text` is
        normalised. decides: the part of it that says on which side of the split it belongs, and in
        what script it is.
        """
        if not text:
            return True
        self.full |= self.docs.total() >= self.args.max_docs
        self.full |= 0 < self.chars > self.args.max_chars - len(text)
        if self.full:
            return False
        raw = text.encode()
        script = SCRIPTS.index(script_of(decides))
        digest = hashlib.sha256(f"{self.args.seed}:".encode() + decides.encode()).digest()
        key = int.from_bytes(digest[:8], "little")
        record = RECORD.pack(key, script, len(raw)) + raw
        self.file.write(record)
        self.hash.update(record)

        self.docs[script] += 1
        self.script_bytes[script] += len(raw)
        self.bytes += len(raw)
        self.chars += len(text)
        self.low[script] = min(key, self.low.get(script, key))
        self.high[script] = max(key, self.high.get(script, key))
        if len(self.sizes) < FEW:
            self.sizes[key] = len(raw)
        return True

    def close(self, romanise, log):
        """Fix the split: by hash within each script; no script with ENOUGH documents and no split
        stays empty.
        """
        self.limit = int(self.args.val_doc_frac * 2**64)
        several = [script for script in self.docs if self.low[script] < self.high[script]]
        self.forced = {self.low[script] for script in several if self.docs[script] >= ENOUGH}
        self.cut = len(self.sizes) == 1
        if self.cut:
            log(
                "notice: there is only one document, so its end becomes the validation text; put "
                "blank lines between "
                "documents (.txt) or give more of them"
            )
        elif not self.forced and all(self.low[script] >= self.limit for script in several):
            # a handful of documents: the one whose size fits best
            wanted = self.args.val_doc_frac * self.bytes
            self.forced = {min(self.sizes, key=lambda key: (abs(self.sizes[key] - wanted), key))}

        # so many that Latin documents are the wanted share of both
        devanagari = self.docs[SCRIPTS.index("devanagari")]
        latin = self.docs[SCRIPTS.index("latin")]
        if romanise and devanagari:
            missing = self.args.hinglish_ratio * (devanagari + latin) - latin
            self.romanised = min(1.0, max(0.0, missing / devanagari))

        # the text is on the disk before the plan that vouches for it
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.written = self.hash.hexdigest()
        plan = {name: getattr(self, name) for name in KEPT}
        plan |= {"forced": sorted(self.forced), "digest": self.digest}
        write_json(self.plan_path, sealed(plan))

    def restore(self, log):
        """Is there a spool of these settings, whole? Then its plan is taken over."""
        try:
            plan = read_json(self.plan_path)
        except UserError:
            return False
        if plan.get("digest") != self.digest or not self.path.exists():
            return False
        if not seal_holds(plan) or file_sha256(self.path) != plan["written"]:
            log(
                f"notice: {self.path}, left by a run that was broken off, is damaged: reading the "
                "text "
                "again"
            )
            return False
        for name in KEPT:
            value = plan[name]
            if name in ("docs", "script_bytes", "high"):   # JSON has no numbers as keys
                value = {int(script): number for script, number in value.items()}
                value = type(getattr(self, name))(value)
            elif name == "forced":
                value = set(value)
            setattr(self, name, value)
        return True

    # ---- passes 2 and 3
    def records(self, start=0):
        """(place after it, is it validation, script, hash, text), in the order of the sources."""
        typists = [Romaniser(style) for style in range(TYPISTS)] if self.romanised else []
        with open(self.path, "rb") as file:
            file.seek(start)
            while head := file.read(RECORD.size):
                key, number, size = RECORD.unpack(head)
                text = file.read(size).decode()
                script = SCRIPTS[number]
                # the largest hash of a script always trains
                below = key < self.limit and key != self.high[number]
                validation = int(key in self.forced or below)

                if (
                    typists
                    and script == "devanagari"
                    and spread(key, b"romanise") < self.romanised
                ):
                    text = normalise(typists[key % len(typists)](text))
                    script = script_of(text)

                if self.cut:
                    for side, part in enumerate(self.halves(text)):
                        yield file.tell(), side, script, key, part
                else:
                    yield file.tell(), validation, script, key, text

    def halves(self, text):
        """A single document as (training part, validation part), cut at a line break or space."""
        end = len(text) - max(int(len(text) * self.args.val_doc_frac), min(1000, len(text) // 5))
        middle = len(text) // 2
        cut = max(text.rfind("\n", middle, end), text.rfind(" ", middle, end))
        if len(text) < 200 or cut < 0:
            raise UserError(
                f"the text is one document of {len(text)} characters, too short to keep a part for "
                "validation: give more text, with blank lines between documents"
            )
        return text[:cut].strip(), text[cut:].strip()

    def sample(self):
        """Training text for the tokenizer: all of it, or pieces from everywhere, chosen by hash."""
        share = SAMPLE_BYTES / self.bytes
        for _, validation, _, key, text in self.records():
            if validation:
                continue
            if share >= 1:
                yield text
                continue
            for i, start in enumerate(range(0, len(text), PIECE_CHARS)):
                if (key + i * 0x9E3779B97F4A7C15) % 2**32 < share * 2**32:
                    yield text[start:start + PIECE_CHARS]

    def batches(self, start):
        """Lists of records, each enough for one call of the tokenizer."""
        batch = []
        size = 0
        for record in self.records(start):
            batch.append(record)
            size += len(record[-1])
            if size >= BATCH_CHARS and not self.cut:  # the halves of one document stay together
                yield batch
                batch = []
                size = 0
        if batch:
            yield batch
