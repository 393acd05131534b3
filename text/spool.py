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
from text.tokenizer import SAMPLE_BYTES, SCRIPTS, normalise, script_of

ENOUGH = 20  # a script with so many documents is in validation for certain
BATCH_CHARS = 500_000                      # text that is encoded at a time
PIECE_CHARS = 50_000                       # the tokenizer's sample takes pieces of long documents
RECORD = struct.Struct("<QBQ")  # hash of the document, script, bytes of the text that follows
KEPT = (
    "docs",
    "bytes",
    "chars",
    "full",
    "limit",
    "forced",
    "high",
    "cut",
    "romanised",
    "script_bytes",
    "extra",
    "written",
)


def spread(h, salt):
    """Another hash of a hash, as a number in [0, 1)."""
    return (
        int.from_bytes(
            hashlib.blake2b(h.to_bytes(8, "little"), digest_size=7, salt=salt).digest(), "little"
        )
        / 2**56
    )


class Spool:
    def __init__(self, folder, args, digest):
        self.args, self.digest = args, digest
        self.path, self.plan_path = Path(folder, "spool.bin"), Path(folder, "spool.json")
        self.docs, self.bytes, self.chars, self.full, self.script_bytes = (
            Counter(),
            0,
            0,
            False,
            Counter(),
        )
        # smallest and largest hash of a script; hash -> bytes
        self.low, self.high, self.sizes = {}, {}, {}
        self.limit, self.forced, self.cut, self.romanised, self.extra = 0, set(), False, 0.0, {}
        self.written = None                                # sha256 of the file, once it is whole

    # ---- pass 1
    def begin(self):
        self.plan_path.unlink(missing_ok=True)
        self.file = open(self.path, "wb")
        self.hash = hashlib.sha256()

    def add(self, text):
        """False once a limit is reached; the first document comes in whatever its length. `text` is
        normalised.
        """
        if not text:
            return True
        self.full |= self.docs.total() >= self.args.max_docs
        self.full |= 0 < self.chars > self.args.max_chars - len(text)
        if self.full:
            return False
        raw, script = text.encode(), SCRIPTS.index(script_of(text))
        h = int.from_bytes(
            hashlib.sha256(f"{self.args.seed}:".encode() + raw).digest()[:8], "little"
        )
        record = RECORD.pack(h, script, len(raw)) + raw
        self.file.write(record)
        self.hash.update(record)
        self.docs[script] += 1
        self.script_bytes[script] += len(raw)
        self.bytes, self.chars = self.bytes + len(raw), self.chars + len(text)
        self.low[script], self.high[script] = (
            min(h, self.low.get(script, h)),
            max(h, self.high.get(script, h)),
        )
        if len(self.sizes) < 1000:
            self.sizes[h] = len(raw)
        return True

    def close(self, romanise, log):
        """Fix the split: by hash within each script; no script with ENOUGH documents and no split
        stays empty.
        """
        self.limit = int(self.args.val_doc_frac * 2**64)
        several = [s for s in self.docs if self.low[s] < self.high[s]]
        self.forced = {self.low[s] for s in several if self.docs[s] >= ENOUGH}
        self.cut = len(self.sizes) == 1
        if self.cut:
            log(
                "notice: there is only one document, so its end becomes the validation text; put "
                "blank lines between "
                "documents (.txt) or give more of them"
            )
        elif not self.forced and all(self.low[s] >= self.limit for s in several):
            # a handful of documents: the one whose size fits best
            wanted = self.args.val_doc_frac * self.bytes
            self.forced = {min(self.sizes, key=lambda h: (abs(self.sizes[h] - wanted), h))}
        deva, latin = (self.docs[SCRIPTS.index(script)] for script in ("devanagari", "latin"))
        if romanise and deva:  # so that Latin documents are the wanted share of both
            self.romanised = min(
                1.0, max(0.0, (self.args.hinglish_ratio * (deva + latin) - latin) / deva)
            )
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.written = self.hash.hexdigest()
        plan = {key: getattr(self, key) for key in KEPT} | {
            "forced": sorted(self.forced),
            "digest": self.digest,
        }
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
        for key in KEPT:
            value = plan[key]
            if key in ("docs", "script_bytes", "high"):    # JSON has no numbers as keys
                value = type(getattr(self, key))({int(k): v for k, v in value.items()})
            setattr(self, key, set(value) if key == "forced" else value)
        return True

    # ---- passes 2 and 3
    def records(self, start=0):
        """(place after it, is it validation, script, hash, text), in the order of the sources."""
        romaniser = None
        if self.romanised:
            from text.romanise import Romaniser
            romaniser = [Romaniser(style) for style in range(16)]        # so many typists
        with open(self.path, "rb") as f:
            f.seek(start)
            while head := f.read(RECORD.size):
                h, script, size = RECORD.unpack(head)
                text = f.read(size).decode()
                val = h in self.forced or h < self.limit and h != self.high[script]
                if (
                    romaniser
                    and SCRIPTS[script] == "devanagari"
                    and spread(h, b"romanise") < self.romanised
                ):
                    text = normalise(romaniser[h % len(romaniser)](text))
                    script = SCRIPTS.index(script_of(text))
                if self.cut:
                    yield from (
                        (f.tell(), side, SCRIPTS[script], h, part)
                        for side, part in enumerate(self.halves(text))
                    )
                else:  # the largest hash of a script always trains
                    yield f.tell(), int(val), SCRIPTS[script], h, text

    def halves(self, text):
        """A single document as (training part, validation part), cut at a line break or space."""
        end = len(text) - max(int(len(text) * self.args.val_doc_frac), min(1000, len(text) // 5))
        at = max(text.rfind("\n", len(text) // 2, end), text.rfind(" ", len(text) // 2, end))
        if len(text) < 200 or at < 0:
            raise UserError(
                f"the text is one document of {len(text)} characters, too short to keep a part for "
                "validation: give more text, with blank lines between documents"
            )
        return text[:at].strip(), text[at:].strip()

    def sample(self):
        """Training text for the tokenizer: all of it, or pieces from everywhere, chosen by hash."""
        share = SAMPLE_BYTES / self.bytes
        for _, val, _, h, text in self.records():
            pieces = (
                [text]
                if share >= 1
                else [text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)]
            )
            yield from (piece for i, piece in enumerate(pieces)
                        if not val and (h + i * 0x9E3779B97F4A7C15) % 2**32 < share * 2**32)

    def batches(self, start):
        batch, size = [], 0
        for record in self.records(start):
            batch.append(record)
            size += len(record[-1])
            if size >= BATCH_CHARS and not self.cut:  # the halves of one document stay together
                yield batch
                batch, size = [], 0
        if batch:
            yield batch
