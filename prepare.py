"""Text to token files: train.bin, val.bin and meta.json, and a tokenizer when there is none yet.

    python -m prepare --source files --input my_texts/ more.jsonl.gz --data_dir data/processed
    python -m prepare --source builtin                     # the synthetic starter corpus, offline

documents.py says what is read. An existing --tokenizer is reused and never overwritten: to train one on the new text,
delete it or name another path. Notable: three passes in bounded memory (read, train the tokenizer, encode). Documents
are split by a hash of their text, so a copy of a training document is never in validation. Everything is written aside
and renamed at the end: a run that dies leaves the old data whole.
"""
import contextlib
import hashlib
import json
import os
import struct
import tempfile
from collections import Counter
from pathlib import Path

import config
import knobs

if __name__ == "__main__":
    config.answer_help(config.PrepareArgs, "prepare")      # before the heavy imports: --help has to be instant
    knobs.check_packages()

import numpy as np
from tqdm import tqdm

import corpus
import tokens
from knobs import UserError
from documents import find_files, kind_of, read_documents
from tokenizer import NORMALISER, SAMPLE_BYTES, SCRIPTS, Tokenizer, normalise, script_of, train_tokenizer

try:
    import fcntl
except ImportError:                        # Windows: two runs in one folder at once are not held apart
    fcntl = None

SPLITS = ("train", "val")
ENOUGH = 20                                # a script with so many documents is in validation for certain
BATCH_CHARS = 500_000                      # text that is encoded at a time
PIECE_CHARS = 50_000                       # the tokenizer's sample takes pieces of long documents
RECORD = struct.Struct("<QBQ")             # spool: hash of the document, script, bytes of the text that follows


class Spool:
    """Pass 1: normalised documents in an unnamed temporary file, and what the split needs to know of all of them."""

    def __init__(self, folder, args):
        self.file, self.args = tempfile.TemporaryFile(dir=folder), args
        self.docs, self.bytes, self.chars, self.full = Counter(), 0, 0, False
        self.low, self.high, self.sizes = {}, {}, {}       # smallest and largest hash of a script; hash -> bytes

    def add(self, text):
        """False once a limit is reached; the first document comes in whatever its length."""
        text = normalise(text).strip()
        if not text:
            return True
        self.full |= self.docs.total() >= self.args.max_docs
        self.full |= 0 < self.chars > self.args.max_chars - len(text)
        if self.full:
            return False
        raw, script = text.encode(), SCRIPTS.index(script_of(text))
        h = int.from_bytes(hashlib.sha256(f"{self.args.seed}:".encode() + raw).digest()[:8], "little")
        self.file.write(RECORD.pack(h, script, len(raw)) + raw)
        self.docs[script] += 1
        self.bytes, self.chars = self.bytes + len(raw), self.chars + len(text)
        self.low[script], self.high[script] = min(h, self.low.get(script, h)), max(h, self.high.get(script, h))
        if len(self.sizes) < 1000:
            self.sizes[h] = len(raw)
        return True

    def plan(self, log):
        """Fix the split: by hash within each script; no script with ENOUGH documents and no split stays empty."""
        self.limit = int(self.args.val_doc_frac * 2**64)
        several = [s for s in self.docs if self.low[s] < self.high[s]]
        self.forced = {self.low[s] for s in several if self.docs[s] >= ENOUGH}
        self.cut = len(self.sizes) == 1
        if self.cut:
            log("notice: there is only one document, so its end becomes the validation text; put blank lines between "
                "documents (.txt) or give more of them")
        elif not self.forced and all(self.low[s] >= self.limit for s in several):
            wanted = self.args.val_doc_frac * self.bytes   # a handful of documents: the one whose size fits best
            self.forced = {min(self.sizes, key=lambda h: (abs(self.sizes[h] - wanted), h))}

    def __iter__(self):
        """(is it validation, script, hash, text), in the order of the sources."""
        self.file.seek(0)
        while head := self.file.read(RECORD.size):
            h, script, size = RECORD.unpack(head)
            text = self.file.read(size).decode()
            if self.cut:
                yield from ((val, SCRIPTS[script], h, part) for val, part in enumerate(self.halves(text)))
            else:                                          # the largest hash of a script always trains
                val = h in self.forced or h < self.limit and h != self.high[script]
                yield int(val), SCRIPTS[script], h, text

    def halves(self, text):
        """A single document as (training part, validation part), cut at a line break or space."""
        end = len(text) - max(int(len(text) * self.args.val_doc_frac), min(1000, len(text) // 5))
        at = max(text.rfind("\n", len(text) // 2, end), text.rfind(" ", len(text) // 2, end))
        if len(text) < 200 or at < 0:
            raise UserError(f"the text is one document of {len(text)} characters, too short to keep a part for "
                            "validation: give more text, with blank lines between documents")
        return text[:at].strip(), text[at:].strip()

    def sample(self):
        """Training text for the tokenizer: all of it, or pieces from everywhere, chosen by hash."""
        share = SAMPLE_BYTES / self.bytes
        for val, _, h, text in self:
            pieces = [text] if share >= 1 else [text[i:i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)]
            yield from (piece for i, piece in enumerate(pieces)
                        if not val and (h + i * 0x9E3779B97F4A7C15) % 2**32 < share * 2**32)

    def batches(self):
        batch, size = [], 0
        for item in self:
            batch.append(item)
            size += len(item[-1])
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
        yield batch


def read(args, folder, sources, log):
    """All sources into the spool, up to the limits."""
    spool = Spool(folder, args)
    with tqdm(unit=" docs", desc="read", disable=None) as bar:
        for source in sources:
            if args.source == "builtin":
                log("notice: the starter corpus is synthetic, made by a small grammar: for trying things out, no more")
                stream = (text for _, text in corpus.starter_documents(args.seed, args.hinglish_ratio))
            else:
                stream = read_documents(Path(source["name"]), log)
            docs, size = spool.docs.total(), spool.bytes
            for text in stream:
                if not spool.add(text):
                    break
                bar.update()
            source |= dict(documents=spool.docs.total() - docs, bytes=spool.bytes - size)
    if not spool.bytes:
        raise UserError(f"no text in {', '.join(map(str, args.input))}: every document is empty")
    if spool.full and args.source == "files":
        log(f"notice: stopped at the limit, {spool.docs.total():,} documents and {spool.chars:,} characters; raise "
            "--max_docs or --max_chars to read everything")
    if spool.docs.total() < 1000:
        log(f"WARNING: only {spool.docs.total()} documents; a model learns so few by heart")
    spool.plan(log)
    return spool


def get_tokenizer(args, spool, log):
    """Pass 2, unless there is one."""
    path, asked = Path(args.tokenizer), args.tokenizer_vocab
    if not path.exists():
        log(f"tokenizer: training on {min(spool.bytes, SAMPLE_BYTES) / 1e6:.1f} MB of the training text ...")
        return train_tokenizer(spool.sample(), path, asked, args.model_type, spool.bytes, log)
    tok = Tokenizer(path)
    with contextlib.suppress(UserError):                   # a text too small for it may have given fewer than asked for
        if knobs.read_json(path.with_suffix(".json")).get("asked_vocab_size") == asked:
            asked = tok.vocab_size
    if asked not in (0, tok.vocab_size):
        raise UserError(f"--tokenizer_vocab {asked}, but {path} has {tok.vocab_size} pieces: delete it or name another "
                        "--tokenizer to train one, or leave --tokenizer_vocab out to reuse it")
    log(f"tokenizer: reusing {path} ({tok.vocab_size:,} pieces); to train one on this text, delete it or name another")
    return tok


def publish(args, folder, spool, tok, sources, digest, log):
    """Pass 3: encode aside, then rename. meta.json goes first and comes last: without it nothing here is trusted."""
    dtype, count = tokens.token_dtype(tok.vocab_size), Counter()
    with (open(folder / "train.bin.tmp", "wb") as train, open(folder / "val.bin.tmp", "wb") as val_file,
          tqdm(total=spool.bytes, unit="B", unit_scale=True, desc="encode", disable=None) as bar):
        for batch in spool.batches():
            ids = tok.encode_many([text for *_, text in batch], normalised=True)
            for (val, script, _, text), doc in zip(batch, ids, strict=True):
                (train, val_file)[val].write(np.concatenate([[tok.bos_id], doc, [tok.eos_id]]).astype(dtype).tobytes())
                size = len(text.encode())                  # of normalised text, which is what decoding gives
                count.update({(val, script, "docs"): 1, (val, script, "tokens"): len(doc) + 2,
                              (val, script, "bytes"): size})
                bar.update(size)
        for f in (train, val_file):
            f.flush()
            os.fsync(f.fileno())
    meta = dict(version=tokens.VERSION, vocab_size=tok.vocab_size, mask_token_id=tok.vocab_size, pad_id=tok.pad_id,
                unk_id=tok.unk_id, bos_id=tok.bos_id, eos_id=tok.eos_id, dtype=dtype.name,
                tokenizer=str(args.tokenizer), tokenizer_sha256=tok.sha256, normaliser=NORMALISER, source=args.source,
                sources=sources, scripts={}, settings_sha256=digest, seed=args.seed)
    for val, split in enumerate(SPLITS):
        for what in ("tokens", "docs", "bytes"):
            meta[f"{split}_{what}"] = sum(count[val, script, what] for script in SCRIPTS)
        meta[f"{split}_sha256"] = tokens.file_sha256(folder / f"{split}.bin.tmp")
        meta["scripts"][split] = {script: count[val, script, "docs"] for script in SCRIPTS}
    with open(folder / "meta.json.tmp", "w", encoding="utf-8") as f:
        json.dump(meta, f, ensure_ascii=False, indent=1)
        f.flush()
        os.fsync(f.fileno())
    (folder / "meta.json").unlink(missing_ok=True)
    for name in ("train.bin", "val.bin", "meta.json"):
        os.replace(folder / f"{name}.tmp", folder / name)
    for script in SCRIPTS:
        docs, n, size = ([count[val, script, what] for val in (0, 1)] for what in ("docs", "tokens", "bytes"))
        if sum(docs):
            log(f"{script:>10}: {docs[0]:,} documents for training, {docs[1]:,} for validation, "
                f"{sum(size) / sum(n):.2f} bytes/token")
    log(f"{folder} ({args.source}): {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens, "
        f"{tok.vocab_size:,} pieces from {args.tokenizer}")


def find_sources(args):
    """(what meta.json says of each source, the sha256 of everything that decides what comes out)."""
    flags = "source tokenizer_vocab model_type val_doc_frac max_docs max_chars seed".split()
    settings = {flag: getattr(args, flag) for flag in flags} | {"version": tokens.VERSION, "normaliser": NORMALISER}
    if args.source == "builtin":
        sources = [corpus.describe()]
        settings |= {"hinglish_ratio": args.hinglish_ratio, "corpus": sources[0]["version"]}
    else:
        paths = find_files(args.input)
        sources = [dict(name=str(path), licence=None, sha256=tokens.file_sha256(path)) for path in paths]
        settings["files"] = [[kind_of(path), s["sha256"]] for path, s in zip(paths, sources, strict=True)]
    return sources, hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def is_current(args, digest, log):
    """Is the folder already what would be built?"""
    if args.force or not Path(args.data_dir, "meta.json").exists():
        return False
    try:
        meta = [tokens.TokenData(args.data_dir, split).meta for split in SPLITS][0]
        if meta["settings_sha256"] == digest and meta["tokenizer_sha256"] == tokens.file_sha256(args.tokenizer):
            log(f"already there: {args.data_dir}, made with these settings ({meta['train_tokens']:,} training tokens); "
                "--force builds it again")
            return True
        log(f"{args.data_dir} was made with other settings or another tokenizer: building it again")
    except UserError as error:
        log(f"{args.data_dir} is not usable, building it again: {error}")
    return False


@contextlib.contextmanager
def alone(folder):
    """One builder per folder, the next one waits; so the temporary files found at the end are ours or a dead run's."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as f, contextlib.ExitStack() as stack:
        if fcntl:
            with contextlib.suppress(OSError):             # some network drives cannot lock
                fcntl.flock(f, fcntl.LOCK_EX)
        stack.callback(lambda: [path.unlink() for path in folder.glob("*.tmp")])
        yield


def build(args, log=print):
    """Make args.data_dir what the settings say; returns its meta."""
    if args.source == "files" and not args.input:
        raise UserError("--source files needs --input FILES_OR_FOLDERS")
    folder = Path(args.data_dir)
    sources, digest = find_sources(args)
    try:
        with alone(folder):
            if not is_current(args, digest, log):
                spool = read(args, folder, sources, log)
                publish(args, folder, spool, get_tokenizer(args, spool, log), sources, digest, log)
    except OSError as error:
        raise UserError(f"cannot build {folder}: {error}", code=1) from None
    return knobs.read_json(folder / "meta.json")


def ensure_builtin(folder=config.STARTER_DIR, chars=config.STARTER_CHARS, log=print):
    """The prepared starter corpus, with its own tokenizer inside the folder; built if it is not there. For train."""
    build(config.PrepareArgs(source="builtin", data_dir=str(folder), tokenizer=str(Path(folder, "tokenizer.model")),
                             tokenizer_vocab=config.STARTER_VOCAB, max_chars=chars), log)
    return folder


def main(argv=None):
    args, origins = config.parse(config.PrepareArgs, argv, "prepare")
    config.announce(args, origins)
    build(args)
    print(f"next: python -m train --data_dir {args.data_dir}")


if __name__ == "__main__":
    config.run(main)
