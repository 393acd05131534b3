"""From documents to token files, in three passes: read and clean, train the tokenizer, encode."""
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.console import UserError
from common.files import lock, read_json, rename, seal_holds, sealed, write_json
from text import dataset, hub
from text.clean import RULES, Cleaner
from text.documents import find_files, kind_of, read_documents
from text.spool import Spool
from text.starter import grammar
from text.tokenizer import NORMALISER, SAMPLE_BYTES, SCRIPTS, Tokenizer, normalise, train_tokenizer

SPLITS = ("train", "val")


SYNC_BYTES = 64_000_000                    # text between two states on the disk while encoding


WORK = ".aria_prepare"                     # folder inside the data folder for what is not finished


WORK_FILES = ("stdin.txt", "spool.bin", "spool.json", "encode.json", "train.bin", "val.bin",
              "meta.json")                 # in it; nothing else is ever removed from there


def documents_of(args, source, path, log):
    """(text as it stands there, kind of text it should be) of one source."""
    if args.source == "builtin":
        log(
            "notice: the starter corpus is synthetic, made by a small grammar: for trying things "
            "out, no more"
        )
        return (
            (text, "any") for _, text in grammar.starter_documents(args.seed, args.hinglish_ratio)
        )
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
            why = (
                "the cleaning rules dropped every document; --no_clean keeps them"
                if cleaner
                else "every document is empty"
            )
            raise UserError(f"no text in {', '.join(map(str, args.input)) or args.source}: {why}")
        if spool.full and args.source != "builtin":
            log(
                f"notice: stopped at the limit, {spool.docs.total():,} documents and "
                f"{spool.chars:,} characters; raise "
                "--max_docs or --max_chars to read everything"
            )
        if spool.docs.total() < 1000:
            log(f"WARNING: only {spool.docs.total()} documents; a model learns so few by heart")
        if cleaner:
            for line in cleaner.table():
                log(line)
        spool.extra = dict(sources=sources, cleaning=cleaner.counts() if cleaner else None)
        spool.close(args.wants("romanise"), log)
        if args.report and cleaner:
            scripts = {script: spool.docs[i] for i, script in enumerate(SCRIPTS) if spool.docs[i]}
            cleaner.write_html(
                args.report,
                f"What cleaning did to {', '.join(map(str, args.input)) or args.source}",
                scripts,
            )
            log(f"report: {args.report}")
    finally:
        spool.file.close()


def get_tokenizer(args, spool, log):
    """Pass 2, unless there is one."""
    path, asked = Path(args.tokenizer), args.tokenizer_vocab
    if not path.exists():
        log(
            f"tokenizer: training on {min(spool.bytes, SAMPLE_BYTES) / 1e6:.1f} MB of the training "
            "text ..."
        )
        return train_tokenizer(spool.sample(), path, asked, args.model_type, spool.bytes, log)
    tok = Tokenizer(path)
    # a text too small for it may have given fewer than asked for
    with contextlib.suppress(UserError):
        if read_json(path.with_suffix(".json")).get("asked_vocab_size") == asked:
            asked = tok.vocab_size
    if asked not in (0, tok.vocab_size):
        raise UserError(
            f"--tokenizer_vocab {asked}, but {path} has {tok.vocab_size} pieces: delete it or name "
            "another "
            "--tokenizer to train one, or leave --tokenizer_vocab out to reuse it"
        )
    log(
        f"tokenizer: reusing {path} ({tok.vocab_size:,} pieces); to train one on this text, delete "
        "it or name another"
    )
    return tok


def encode(folder, spool, tok, log):
    """Pass 3: ids aside, in the work folder; -> (Counter of (split, script, what), both files'
    sha256).

    encode.json says how far both files are good and where the spool goes on: a run that was killed
    continues there.
    """
    dtype, count, start, sizes = dataset.token_dtype(tok.vocab_size), Counter(), 0, [0, 0]
    progress = folder / "encode.json"
    marks = {"spool": [spool.digest, spool.written], "tokenizer": tok.sha256}
    paths = [folder / f"{split}.bin" for split in SPLITS]
    written = [hashlib.sha256(), hashlib.sha256()]
    with contextlib.suppress(UserError, OSError):
        saved = read_json(progress)
        if seal_holds(saved) and all(saved[key] == marks[key] for key in marks):
            found = list(map(hash_of_start, paths, saved["sizes"]))
            whole = [digest.hexdigest() for digest in found] == saved["sha256"]
        else:
            whole = False
        if whole:
            start, sizes, written = saved["start"], saved["sizes"], found
            count = Counter(
                {(int(val), script, what): n for val, script, what, n in saved["count"]}
            )
            log(
                "continuing the run that was broken off, at "
                f"{100 * start / spool.path.stat().st_size:.0f} % of the text"
            )
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "r+b" if start else "wb")) for path in paths]
        for f, size in zip(files, sizes, strict=True):
            f.truncate(size)
            f.seek(size)
        bar = stack.enter_context(
            tqdm(
                total=spool.path.stat().st_size,
                initial=start,
                unit="B",
                unit_scale=True,
                desc="encode",
                disable=None,
            )
        )
        safe = start
        for batch in spool.batches(start):
            ids = tok.encode_many([text for *_, text in batch], normalised=True)
            for (_, val, script, _, text), doc in zip(batch, ids, strict=True):
                row = np.empty(len(doc) + 2, dtype)
                row[0], row[1:-1], row[-1] = tok.bos_id, doc, tok.eos_id
                files[val].write(row)
                written[val].update(row)
                for what, n in (("docs", 1), ("tokens", len(row)), ("bytes", len(text.encode()))):
                    # of normalised text, which is what decoding gives
                    count[val, script, what] += n
            place = batch[-1][0]
            bar.update(place - bar.n)
            if place - safe >= SYNC_BYTES:
                safe = place
                for f in files:
                    f.flush()
                    os.fsync(f.fileno())
                state = dict(start=place, sizes=[f.tell() for f in files],
                             sha256=[digest.hexdigest() for digest in written],
                             count=[[*key, n] for key, n in count.items()])
                write_json(progress, sealed(marks | state))
        for f in files:
            f.flush()
            os.fsync(f.fileno())
    return count, [digest.hexdigest() for digest in written]


def hash_of_start(path, size):
    """The sha256 object after so many bytes of a file, or after all of a shorter one."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for at in range(0, size, 1 << 20):
            digest.update(f.read(min(1 << 20, size - at)))
    return digest


def flags_of(args):
    """The flags that make this text again, as typed; --data_dir is left out, as a folder may move.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    words = []
    for name in ("source", "input", "tokenizer", "tokenizer_vocab", "model_type", "hinglish_ratio",
                 "val_doc_frac", "max_docs", "max_chars", "clean", "romanise", "raw_dir", "seed"):
        value = getattr(args, name)
        if name == "source" or value != defaults[name]:
            parts = value if isinstance(value, tuple) else [value]
            words += [f"--{name}", *(shlex.quote(printable(part)) for part in parts)]
    return " ".join(words)


def printable(path):
    """A file's name as text that JSON can hold: a byte that is no UTF-8 becomes \\udcff or the
    like.
    """
    return str(path).encode("utf-8", "backslashreplace").decode()


def publish(args, work, spool, tok, digest, count, hashes, log):
    """Rename what is ready. meta.json goes first and comes last: without it nothing here is
    trusted.
    """
    folder = work.parent
    dtype = dataset.token_dtype(tok.vocab_size)
    meta = dict(
        version=dataset.VERSION,
        vocab_size=tok.vocab_size,
        mask_token_id=tok.vocab_size,
        pad_id=tok.pad_id,
        unk_id=tok.unk_id,
        bos_id=tok.bos_id,
        eos_id=tok.eos_id,
        dtype=dtype.name,
        tokenizer=str(args.tokenizer),
        tokenizer_sha256=tok.sha256,
        normaliser=NORMALISER,
        source=args.source,
        sources=spool.extra["sources"],
        scripts={},
        settings_sha256=digest,
        seed=args.seed,
        cleaning=spool.extra["cleaning"],
        romanised_share=round(spool.romanised, 4),
        flags=flags_of(args),
    )
    for val, split in enumerate(SPLITS):
        for what in ("tokens", "docs", "bytes"):
            meta[f"{split}_{what}"] = sum(count[val, script, what] for script in SCRIPTS)
        meta[f"{split}_sha256"] = hashes[val]
        meta["scripts"][split] = {script: count[val, script, "docs"] for script in SCRIPTS}
    write_json(work / "meta.json", sealed(meta))
    (folder / "meta.json").unlink(missing_ok=True)
    for name in ("train.bin", "val.bin", "meta.json"):
        rename(work / name, folder / name)
    for script in SCRIPTS:
        docs, n, size = (
            [count[val, script, what] for val in (0, 1)] for what in ("docs", "tokens", "bytes")
        )
        if sum(docs):
            log(f"{script:>10}: {docs[0]:,} documents for training, {docs[1]:,} for validation, "
                f"{sum(size) / sum(n):.2f} bytes/token")
    log(
        f"{folder} ({args.source}): {meta['train_tokens']:,} training and {meta['val_tokens']:,} "
        "validation tokens, "
        f"{tok.vocab_size:,} pieces from {args.tokenizer}"
    )


def find_sources(args, folder, log):
    """(what meta.json says of each source, their files, the sha256 of everything that decides what
    comes out).
    """
    flags = "source tokenizer_vocab model_type val_doc_frac max_docs max_chars seed".split()
    settings = {flag: getattr(args, flag) for flag in flags} | {
        "version": dataset.VERSION,
        "normaliser": NORMALISER,
    }
    settings |= {"clean": args.wants("clean") and RULES, "romanise": args.wants("romanise")}
    if args.source == "builtin" or settings["romanise"]:
        settings["hinglish_ratio"] = args.hinglish_ratio
    if args.source == "builtin":
        sources, paths = [grammar.describe()], [None]
        settings["corpus"] = sources[0]["version"]
    else:
        if args.source == "files":
            files = find_files(stdin_to_file(args.input, folder / WORK), log)
            found = [(path, dict(name=printable(path), licence=None)) for path in files]
        else:  # more than the budget, because cleaning takes some of it
            found = hub.download(
                args.source, Path(args.raw_dir), args.hinglish_ratio, int(1.2 * args.max_chars), log
            )
        paths = [path for path, _ in found]
        sources = [record | {"sha256": dataset.file_sha256(path)} for path, record in found]
        settings["files"] = [
            [kind_of(path), s["sha256"]] for path, s in zip(paths, sources, strict=True)
        ]
    return sources, paths, hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def stdin_to_file(inputs, folder):
    """The inputs with "-" replaced by a copy of standard input: it is needed whole, for its hash,
    before it is read.
    """
    if "-" not in map(str, inputs):
        return inputs
    path = folder / "stdin.txt"
    with open(path, "wb") as f:
        shutil.copyfileobj(sys.stdin.buffer, f)
    return [path if str(name) == "-" else name for name in inputs]


def is_current(args, digest, log):
    """Is the folder already what would be built?"""
    if args.force or not Path(args.data_dir, "meta.json").exists():
        return False
    try:
        meta = [dataset.TokenData(args.data_dir, split).meta for split in SPLITS][0]
        if "seal" not in meta:
            log(f"{args.data_dir} was made by an older version, which did not seal meta.json: "
                "building it again")
            return False
        if meta["settings_sha256"] == digest and meta["tokenizer_sha256"] == dataset.file_sha256(
            args.tokenizer
        ):
            log(
                f"already there: {args.data_dir}, made with these settings "
                f"({meta['train_tokens']:,} training tokens); "
                "--force builds it again"
            )
            return True
        log(f"{args.data_dir} was made with other settings or another tokenizer: building it again")
    except UserError as error:
        log(f"{args.data_dir} is not usable, building it again: {error}")
    return False


@contextlib.contextmanager
def alone(folder):
    """One builder per folder, the next one waits -> the work folder: what lies there is ours or a
    dead run's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as f, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):                 # some network drives cannot lock
            lock(f, wait=None)
        work = folder / WORK
        work.mkdir(exist_ok=True)
        stack.callback(clear, work)
        yield work


def clear(work):
    """Remove the files that prepare makes in its work folder, by their names, then the folder."""
    for path in work.iterdir():
        # what write_json had aside when it was killed
        name = re.sub(r"^\.tmp-(.+)-\d+$", r"\1", path.name)
        if name in WORK_FILES:
            path.unlink()
    with contextlib.suppress(OSError):
        work.rmdir()


def refuse_foreign(args, folder):
    """Dies if token files are in the way that prepare did not make: it leaves meta.json or .lock
    there.
    """
    there = [name for name in ("train.bin", "val.bin") if (folder / name).exists()]
    ours = (folder / "meta.json").exists() or (folder / ".lock").exists()
    if there and not ours and not args.force:
        raise UserError(
            f"{folder} holds {' and '.join(there)} without a meta.json, so prepare did not "
            "make it: name another --data_dir, or give --force to replace it"
        )


def build(args, log=print):
    """Make args.data_dir what the settings say; returns its meta."""
    folder = Path(args.data_dir)
    if args.offline and args.source in hub.SOURCES:
        log(f"notice: --offline: the built-in starter corpus instead of {args.source}")
        args = dataclasses.replace(args, source="builtin")
    refuse_foreign(args, folder)
    try:
        with alone(folder) as work:
            sources, paths, digest = find_sources(args, folder, log)
            if not is_current(args, digest, log):
                spool = Spool(work, args, digest)
                if not spool.restore(log):
                    read(args, spool, sources, paths, log)
                tok = get_tokenizer(args, spool, log)
                publish(args, work, spool, tok, digest, *encode(work, spool, tok, log), log)
    except OSError as error:
        raise UserError(f"cannot build {folder}: {error}", code=1) from None
    return read_json(folder / "meta.json")


def holds(args):
    """Is args.data_dir already the text that build(args) would put there? For --source builtin:
    nothing is downloaded.
    """
    quiet = [].append
    _, _, digest = find_sources(args, Path(args.data_dir), quiet)
    return is_current(dataclasses.replace(args, force=False), digest, quiet)
