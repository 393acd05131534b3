"""Text to token files: train.bin, val.bin and meta.json, and a tokenizer when there is none yet.

    python -m prepare --source files --input my_texts/ more.jsonl.gz --data_dir data/processed
    python -m prepare --source hindi --report report.html  # Hindi and Hinglish from the hub, cleaned (hub.py, clean.py)
    python -m prepare --source builtin                     # the synthetic starter corpus, offline

documents.py says which files are read; "-" is standard input. An existing --tokenizer is reused and never overwritten: to
train one on the new text, delete it or name another path. Notable: three passes in bounded memory (read and clean, train the
tokenizer, encode). Everything is written aside and renamed at the end: a run that dies leaves the old data whole, and the
next one goes on where it stopped.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import cli
import config
import knobs

if __name__ == "__main__":
    cli.answer_help(config.PrepareArgs, "prepare")      # before the heavy imports: --help has to be instant
    knobs.check_packages()

import numpy as np
from tqdm import tqdm

import corpus
import hub
import tokens
from clean import RULES, Cleaner
from documents import find_files, kind_of, read_documents
from knobs import UserError
from spool import Spool
from tokenizer import NORMALISER, SAMPLE_BYTES, SCRIPTS, Tokenizer, normalise, train_tokenizer

try:
    import fcntl
except ImportError:                        # Windows: two runs in one folder at once are not held apart
    fcntl = None

SPLITS = ("train", "val")
SYNC_BYTES = 64_000_000                    # text between two states on the disk while encoding


def documents_of(args, source, path, log):
    """(text as it stands there, kind of text it should be) of one source."""
    if args.source == "builtin":
        log("notice: the starter corpus is synthetic, made by a small grammar: for trying things out, no more")
        return ((text, "any") for _, text in corpus.starter_documents(args.seed, args.hinglish_ratio))
    return ((text, source.get("kind", "any")) for text in read_documents(path, log))


def read(args, spool, sources, paths, log):
    """Pass 1: all sources into the spool, normalised and cleaned, up to the limits."""
    cleaner = Cleaner() if args.wants("clean") else None
    spool.begin()
    try:
        with tqdm(unit=" docs", desc="read", disable=None) as bar:
            for source, path in zip(sources, paths, strict=True):
                docs, size = spool.docs.total(), spool.bytes
                for text, kind in documents_of(args, source, path, log):
                    text = normalise(text).strip()
                    if not spool.add(cleaner(text, kind) if cleaner and text else text):
                        break
                    bar.update()
                source |= dict(documents=spool.docs.total() - docs, bytes=spool.bytes - size)
        if not spool.bytes:
            why = "the cleaning rules dropped every document; --no_clean keeps them" if cleaner else "every document is empty"
            raise UserError(f"no text in {', '.join(map(str, args.input)) or args.source}: {why}")
        if spool.full and args.source != "builtin":
            log(f"notice: stopped at the limit, {spool.docs.total():,} documents and {spool.chars:,} characters; raise "
                "--max_docs or --max_chars to read everything")
        if spool.docs.total() < 1000:
            log(f"WARNING: only {spool.docs.total()} documents; a model learns so few by heart")
        if cleaner:
            for line in cleaner.table():
                log(line)
        spool.extra = dict(sources=sources, cleaning=cleaner.counts() if cleaner else None)
        spool.close(args.wants("romanise"), log)
        if args.report and cleaner:
            scripts = {script: spool.docs[i] for i, script in enumerate(SCRIPTS) if spool.docs[i]}
            cleaner.write_html(args.report, f"What cleaning did to {', '.join(map(str, args.input)) or args.source}", scripts)
            log(f"report: {args.report}")
    finally:
        spool.file.close()


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


def encode(folder, spool, tok, log):
    """Pass 3: ids aside, in train.bin.tmp and val.bin.tmp; -> Counter of (split, script, what).

    encode.json.tmp says how far both files are good and where the spool goes on: a run that was killed continues there.
    """
    dtype, count, start, sizes = tokens.token_dtype(tok.vocab_size), Counter(), 0, [0, 0]
    progress, marks = folder / "encode.json.tmp", {"spool": spool.digest, "tokenizer": tok.sha256}
    paths = [folder / f"{split}.bin.tmp" for split in SPLITS]
    with contextlib.suppress(UserError, OSError):
        saved = knobs.read_json(progress)
        if all(saved[key] == marks[key] for key in marks) and all(
                path.stat().st_size >= size for path, size in zip(paths, saved["sizes"], strict=True)):
            start, sizes = saved["start"], saved["sizes"]
            count = Counter({(int(val), script, what): n for val, script, what, n in saved["count"]})
            log(f"continuing the run that was broken off, at {100 * start / spool.path.stat().st_size:.0f} % of the text")
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "r+b" if start else "wb")) for path in paths]
        for f, size in zip(files, sizes, strict=True):
            f.truncate(size)
            f.seek(size)
        bar = stack.enter_context(tqdm(total=spool.path.stat().st_size, initial=start, unit="B", unit_scale=True,
                                       desc="encode", disable=None))
        safe = start
        for batch in spool.batches(start):
            ids = tok.encode_many([text for *_, text in batch], normalised=True)
            for (_, val, script, _, text), doc in zip(batch, ids, strict=True):
                row = np.empty(len(doc) + 2, dtype)
                row[0], row[1:-1], row[-1] = tok.bos_id, doc, tok.eos_id
                files[val].write(row)
                for what, n in (("docs", 1), ("tokens", len(row)), ("bytes", len(text.encode()))):
                    count[val, script, what] += n          # of normalised text, which is what decoding gives
            place = batch[-1][0]
            bar.update(place - bar.n)
            if place - safe >= SYNC_BYTES:
                safe = place
                for f in files:
                    f.flush()
                    os.fsync(f.fileno())
                knobs.write_json(progress, marks | dict(start=place, sizes=[f.tell() for f in files],
                                                        count=[[*key, n] for key, n in count.items()]))
        for f in files:
            f.flush()
            os.fsync(f.fileno())
    return count


def publish(args, folder, spool, tok, digest, count, log):
    """Rename what is ready. meta.json goes first and comes last: without it nothing here is trusted."""
    dtype = tokens.token_dtype(tok.vocab_size)
    meta = dict(version=tokens.VERSION, vocab_size=tok.vocab_size, mask_token_id=tok.vocab_size, pad_id=tok.pad_id,
                unk_id=tok.unk_id, bos_id=tok.bos_id, eos_id=tok.eos_id, dtype=dtype.name,
                tokenizer=str(args.tokenizer), tokenizer_sha256=tok.sha256, normaliser=NORMALISER, source=args.source,
                sources=spool.extra["sources"], scripts={}, settings_sha256=digest, seed=args.seed,
                cleaning=spool.extra["cleaning"], romanised_share=round(spool.romanised, 4))
    for val, split in enumerate(SPLITS):
        for what in ("tokens", "docs", "bytes"):
            meta[f"{split}_{what}"] = sum(count[val, script, what] for script in SCRIPTS)
        meta[f"{split}_sha256"] = tokens.file_sha256(folder / f"{split}.bin.tmp")
        meta["scripts"][split] = {script: count[val, script, "docs"] for script in SCRIPTS}
    knobs.write_json(folder / "meta.json.tmp", meta)
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


def find_sources(args, folder, log):
    """(what meta.json says of each source, their files, the sha256 of everything that decides what comes out)."""
    flags = "source tokenizer_vocab model_type val_doc_frac max_docs max_chars seed".split()
    settings = {flag: getattr(args, flag) for flag in flags} | {"version": tokens.VERSION, "normaliser": NORMALISER}
    settings |= {"clean": args.wants("clean") and RULES, "romanise": args.wants("romanise")}
    if args.source == "builtin" or settings["romanise"]:
        settings["hinglish_ratio"] = args.hinglish_ratio
    if args.source == "builtin":
        sources, paths = [corpus.describe()], [None]
        settings["corpus"] = sources[0]["version"]
    else:
        if args.source == "files":
            found = [(path, dict(name=str(path), licence=None)) for path in find_files(stdin_to_file(args.input, folder))]
        else:                                              # more than the budget, because cleaning takes some of it
            found = hub.download(args.source, Path(args.raw_dir), args.hinglish_ratio, int(1.2 * args.max_chars), log)
        paths = [path for path, _ in found]
        sources = [record | {"sha256": tokens.file_sha256(path)} for path, record in found]
        settings["files"] = [[kind_of(path), s["sha256"]] for path, s in zip(paths, sources, strict=True)]
    return sources, paths, hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def stdin_to_file(inputs, folder):
    """The inputs with "-" replaced by a copy of standard input: it is needed whole, for its hash, before it is read."""
    if "-" not in map(str, inputs):
        return inputs
    path = folder / "stdin.txt.tmp"
    with open(path, "wb") as f:
        shutil.copyfileobj(sys.stdin.buffer, f)
    return [path if str(name) == "-" else name for name in inputs]


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
    folder = Path(args.data_dir)
    if args.offline and args.source in hub.SOURCES:
        log(f"notice: --offline: the built-in starter corpus instead of {args.source}")
        args = dataclasses.replace(args, source="builtin")
    try:
        with alone(folder):
            sources, paths, digest = find_sources(args, folder, log)
            if not is_current(args, digest, log):
                spool = Spool(folder, args, digest)
                if not spool.restore():
                    read(args, spool, sources, paths, log)
                tok = get_tokenizer(args, spool, log)
                publish(args, folder, spool, tok, digest, encode(folder, spool, tok, log), log)
    except OSError as error:
        raise UserError(f"cannot build {folder}: {error}", code=1) from None
    return knobs.read_json(folder / "meta.json")


def ensure_builtin(folder=config.STARTER_DIR, chars=config.STARTER_CHARS, log=print):
    """The prepared starter corpus, with its own tokenizer inside the folder; built if it is not there. For train."""
    build(config.PrepareArgs(source="builtin", data_dir=str(folder), tokenizer=str(Path(folder, "tokenizer.model")),
                             tokenizer_vocab=config.STARTER_VOCAB, max_chars=chars), log)
    return folder


def main(argv=None):
    args, origins = cli.parse(config.PrepareArgs, argv, "prepare")
    cli.announce(args, origins)
    build(args, knobs.say if args.quiet else print)
    print(f"next: python -m train --data_dir {args.data_dir}")


if __name__ == "__main__":
    cli.run(main)
