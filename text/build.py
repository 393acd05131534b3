"""From documents to token files, in three passes: read and clean, train the tokenizer, encode.

Used by prepare, train (its starter corpus) and colab_train_eco:
    build(args, log=print)        # args: config.PrepareArgs; returns the meta.json of args.data_dir

Notable: everything is written aside, in a work folder inside the data folder, and renamed at the
end. A run that dies leaves the old data whole, and the next one goes on where it stopped.
"""
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
from text import dataset, hub, interlace, pairs, topics, transliterate
from text.clean import RULES, Cleaner
from text.documents import find_files, kind_of, read_documents
from text.spool import Spool
from text.starter import grammar
from text.tokenizer import NORMALISER, SAMPLE_BYTES, SCRIPTS, Tokenizer, normalise, train_tokenizer

SPLITS = ("train", "val")
SYNC_BYTES = 64_000_000                    # text between two states on the disk while encoding
FEW_DOCS = 1000                            # fewer are worth a warning

# The folder inside the data folder for what is not finished, and the files in it: nothing else is
# ever removed from there.
WORK = ".aria_prepare"
WORK_FILES = ("stdin.txt", "spool.bin", "spool.json", "encode.json", "train.bin", "val.bin",
              "meta.json")


# ---- pass 1: read and clean ----------------------------------------------------------------------

def documents_of(args, source, path, log):
    """(text as it stands there, kind of text it should be) of one source."""
    if args.source == "builtin":
        log(
            "notice: the starter corpus is synthetic, made by a small grammar: for trying things "
            "out, no more"
        )
        for _, text in grammar.starter_documents(args.seed, args.hinglish_ratio):
            yield text, "any"
    else:
        kind = source.get("kind", "any")
        for text in read_documents(path, log):
            yield text, kind


def read(args, spool, sources, paths, log):
    """Pass 1: all sources into the spool, normalised and cleaned, up to the limits."""
    cleaner = Cleaner() if args.wants("clean") else None
    given = ", ".join(map(str, args.input)) or args.source
    known = topic_words(args, paths) if args.prompt_words else None
    spool.begin()
    try:
        with tqdm(unit=" docs", desc="read", disable=None) as bar:
            for source, path in zip(sources, paths, strict=True):
                read_source(args, spool, cleaner, known, source, path, bar, log)
        check_amount(args, spool, cleaner, given, log)
        if cleaner:
            for line in cleaner.table():
                log(line)

        spool.extra = dict(sources=sources, cleaning=cleaner.counts() if cleaner else None)
        spool.close(args.wants("romanise"), log)
        if args.report and cleaner:
            scripts = {script: spool.docs[i] for i, script in enumerate(SCRIPTS) if spool.docs[i]}
            cleaner.write_html(args.report, f"What cleaning did to {given}", scripts)
            log(f"report: {args.report}")
    finally:
        spool.file.close()


def topic_words(args, paths):
    """The words that may be asked for, of a first pass over all files; read() reads them again, and
    says then what there is to say of them.
    """
    texts = (text for path in paths for text in read_documents(path, [].append))
    texts = tqdm(texts, unit=" docs", desc="count words", disable=None)
    return topics.topic_words(texts, args.max_docs, args.max_chars)


def pairs_of(args, known, path, log):
    """(pair, the part of it that says on which side of the split it belongs) of one file."""
    if args.prompt_words:
        yield from pairs_of_topics(args, known, path, log)
        return
    if args.cut_documents:
        yield from pairs_of_documents(args, path, log)
        return
    if args.source == "pairs":
        for prompt, response in pairs.read_pairs(path):
            pair = pairs.MARK.join((prompt, response))
            yield pair, pair
        return
    for text in read_documents(path, log):
        for typed, meant, sentence in transliterate.typed_rows(
            text, args.typists, args.seed, args.pair_tokens
        ):
            yield pairs.MARK.join((typed, meant)), sentence


def pairs_of_documents(args, path, log):
    """(pair, its prompt) of each document that has more than one sentence."""
    most = pairs.LONGEST_PIECE * args.pair_tokens       # letters of a pair
    left_out = 0
    for text in read_documents(path, log):
        halves = pairs.cut_document(text)
        if halves:
            prompt, rest = halves
            yield pairs.MARK.join((prompt, rest[:most])), prompt
        elif text.strip():
            left_out += 1
    if left_out:
        log(f"notice: {path}: {left_out:,} documents of one sentence are left out")


def pairs_of_topics(args, known, path, log):
    """(pair, its document) of each document that has a word that may be asked for."""
    most = pairs.LONGEST_PIECE * args.pair_tokens       # letters of a pair
    room = topics.LETTERS * args.pair_tokens            # letters of it that may well fit
    left_out = 0
    for text in read_documents(path, log):
        text = normalise(text).strip()
        topic = topics.topic_of(text, known, args.prompt_words, args.seed, room)
        if topic:
            yield pairs.MARK.join((topic, text[:most])), text
        elif text:
            left_out += 1
    if left_out:
        log(
            f"notice: {path}: {left_out:,} documents without a word that few documents have are "
            "left out"
        )


def cleaned(args, cleaner, source, path, log):
    """(document, itself) of one source: normalised and, if that is asked for, cleaned."""
    for text, kind in documents_of(args, source, path, log):
        text = normalise(text).strip()
        if cleaner and text:
            text = cleaner(text, kind)
        yield text, text


def read_source(args, spool, cleaner, known, source, path, bar, log):
    """One source into the spool; how much came of it is noted in `source`."""
    docs_before = spool.docs.total()
    bytes_before = spool.bytes
    if args.of_pairs:
        texts = pairs_of(args, known, path, log)
    else:
        texts = cleaned(args, cleaner, source, path, log)
    for text, decides in texts:
        if not spool.add(text, decides):
            break
        bar.update()
    source["documents"] = spool.docs.total() - docs_before
    source["bytes"] = spool.bytes - bytes_before


def check_amount(args, spool, cleaner, given, log):
    """Dies without any text; says when a limit was reached and when there is little."""
    if not spool.bytes:
        why = "every document is empty"
        if args.cut_documents:
            why = "no document has a second sentence"
        if args.prompt_words:
            why = (
                "no word of it is in several documents, but in few of them; give more documents, "
                "or leave --prompt_words out"
            )
        if args.source == "transliterate":
            why = "no sentence of it is in Devanagari"
        if cleaner:
            why = "the cleaning rules dropped every document; --no_clean keeps them"
        raise UserError(f"no text in {given}: {why}")
    if args.of_pairs and len(spool.sizes) < 2:
        raise UserError(f"{given} holds one pair only, and one is kept for validation: give more")
    if spool.full and args.source != "builtin":
        log(
            f"notice: stopped at the limit, {spool.docs.total():,} documents and "
            f"{spool.chars:,} characters; raise "
            "--max_docs or --max_chars to read everything"
        )
    if spool.docs.total() < FEW_DOCS:
        log(f"WARNING: only {spool.docs.total()} documents; a model learns so few by heart")


# ---- pass 2: the tokenizer -----------------------------------------------------------------------

def get_tokenizer(args, spool, log):
    """Pass 2, unless there is one."""
    path = Path(args.tokenizer)
    asked = args.tokenizer_vocab
    if not path.exists():
        log(
            f"tokenizer: training on {min(spool.bytes, SAMPLE_BYTES) / 1e6:.1f} MB of the training "
            "text ..."
        )
        texts = (text.replace(pairs.MARK, "\n") for text in spool.sample())
        kind = args.model_type
        if args.source == "transliterate":
            kind = "char"
        return train_tokenizer(texts, path, asked, kind, spool.bytes, log)
    tok = Tokenizer(path)
    if args.source == "transliterate" and not tok.of_letters:
        raise UserError(
            f"--tokenizer {path} has pieces of several letters, and --source transliterate needs "
            "single ones: name a file that does not exist yet, and it is made"
        )
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


# ---- pass 3: encode ------------------------------------------------------------------------------

@dataclasses.dataclass
class Encoded:
    """What pass 3 has written so far; each list holds train's first, then val's."""
    place: int                             # in the spool: where it goes on
    sizes: list                            # bytes of the token files
    hashes: list                           # their sha256 objects, which go on, too
    count: Counter                         # (split, script, what) -> number; split 0 train, 1 val


def encode(args, folder, spool, tok, log):
    """Pass 3: ids aside, in the work folder; -> (Counter of (split, script, what), both files'
    sha256).

    encode.json says how far both files are good and where the spool goes on: a run that was killed
    continues there.
    """
    progress = folder / "encode.json"
    marks = {"spool": [spool.digest, spool.written], "tokenizer": tok.sha256}
    paths = [folder / f"{split}.bin" for split in SPLITS]
    whole = spool.path.stat().st_size
    done = encoded_before(progress, paths, marks)
    if done:
        log(
            f"continuing the run that was broken off, at {100 * done.place / whole:.0f} % of the "
            "text"
        )
    else:
        done = Encoded(0, [0, 0], [hashlib.sha256(), hashlib.sha256()], Counter())

    with contextlib.ExitStack() as stack:
        mode = "r+b" if done.place else "wb"
        files = [stack.enter_context(open(path, mode)) for path in paths]
        for file, size in zip(files, done.sizes, strict=True):
            file.truncate(size)
            file.seek(size)
        bar = tqdm(
            total=whole, initial=done.place, unit="B", unit_scale=True, desc="encode", disable=None
        )
        stack.enter_context(bar)
        synced = done.place
        for batch in spool.batches(done.place):
            if args.cut_documents:
                batch = shortened(args, batch, tok)
            write_batch(args, batch, encoded(batch, tok, args, spool, done), files, done)
            bar.update(done.place - bar.n)
            if done.place - synced >= SYNC_BYTES:
                synced = done.place
                sync_files(files)
                save_progress(progress, marks, done)
        sync_files(files)
    return done.count, [digest.hexdigest() for digest in done.hashes]


def shortened(args, batch, tok):
    """These records, with pairs that end with a sentence after at most --pair_tokens, and whose
    prompts name no word behind that. What cannot be so is left as it is, too long.
    """
    records = []
    for *about, text in batch:
        short = pairs.shortened(text, tok, args.pair_tokens)
        if args.prompt_words:
            short = topics.still_asked(short) or text
        records.append((*about, short))
    return records


def encoded(batch, tok, args, spool, done):
    """The ids of these records, in their frame, and how many tokens stand in front of a pair's
    response.
    """
    dtype = dataset.token_dtype(tok.vocab_size)
    texts = [text for *_, text in batch]
    if args.of_pairs:
        before = sum(done.count[key] for key in done.count if key[2] == "docs")
        frame = pairs.rows_of_pairs
        if args.source == "transliterate":
            frame = interlace.rows_of_pairs
        rows = frame(texts, tok, dtype)
        for number, (row, prompt) in enumerate(rows, before):
            given = args.source == "pairs" and not args.cut_documents
            if len(row) > args.pair_tokens and given:
                raise UserError(
                    f"{place_of(number, spool)}: this pair has {len(row):,} tokens, {prompt:,} of "
                    f"them in front of the response: shorten it, or give --pair_tokens {len(row)} "
                    "and train with such a --seq_len"
                )
            yield row, prompt
        return
    for ids in tok.encode_many(texts, normalised=True):
        row = np.empty(len(ids) + 2, dtype)
        row[0] = tok.bos_id
        row[1:-1] = ids
        row[-1] = tok.eos_id
        yield row, 0


def place_of(number, spool):
    """The file and line of a pair, counted from 0 over all files: each line is one."""
    for source in spool.extra["sources"]:
        if number < source["documents"]:
            return f"{source['name']}, line {number + 1}"
        number -= source["documents"]


def write_batch(args, batch, rows, files, done):
    """These rows into the files; `done` follows."""
    for record, (row, prompt) in zip(batch, rows, strict=True):
        place, split, script, _, text = record
        # of words that only bytes can spell, or whose places hold no answer
        if prompt and not 0 < len(row) <= args.pair_tokens:
            done.place = place
            done.count[split, script, "too_long"] += 1
            continue
        files[split].write(row)
        done.place = place
        done.sizes[split] += row.nbytes
        done.hashes[split].update(row)
        done.count[split, script, "docs"] += 1
        done.count[split, script, "tokens"] += len(row)
        # of normalised text, which is what decoding gives
        done.count[split, script, "bytes"] += len(text.encode())
        if prompt:
            response = text.split(pairs.MARK)[1]
            longest = max(len(row), done.count[split, script, "longest"])
            done.count[split, script, "longest"] = longest
            done.count[split, script, "response_tokens"] += len(row) - prompt
            done.count[split, script, "response_bytes"] += len(response.encode())


def check_pairs(args, count):
    """Dies if the limit on pairs has left nothing to train with, or nothing to validate with."""
    for number, what in enumerate(("training", "validation")):
        if not any(count[number, script, "docs"] for script in SCRIPTS):
            raise UserError(
                f"no pair for {what} has at most --pair_tokens {args.pair_tokens} tokens: give a "
                "larger one, or more text"
            )


def sync_files(files):
    for file in files:
        file.flush()
        os.fsync(file.fileno())


def save_progress(path, marks, done):
    """encode.json, after the files are on the disk: it never says more than they hold."""
    state = dict(
        start=done.place,
        sizes=done.sizes,
        sha256=[digest.hexdigest() for digest in done.hashes],
        count=[[*key, number] for key, number in done.count.items()],
    )
    write_json(path, sealed(marks | state))


def encoded_before(progress, paths, marks):
    """What a killed run has encoded of the same text with the same tokenizer; None if nothing, or
    if the files are not what it wrote.
    """
    try:
        saved = read_json(progress)
        if not seal_holds(saved) or any(saved[key] != marks[key] for key in marks):
            return None
        hashes = [
            hash_of_start(path, size) for path, size in zip(paths, saved["sizes"], strict=True)
        ]
    except (UserError, OSError):
        return None
    if [digest.hexdigest() for digest in hashes] != saved["sha256"]:
        return None
    count = Counter()
    for split, script, what, number in saved["count"]:
        count[int(split), script, what] = number
    return Encoded(saved["start"], saved["sizes"], hashes, count)


def hash_of_start(path, size):
    """The sha256 object after so many bytes of a file, or after all of a shorter one."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start in range(0, size, 1 << 20):
            digest.update(file.read(min(1 << 20, size - start)))
    return digest


# ---- what is published ---------------------------------------------------------------------------

def flags_of(args):
    """The flags that make this text again, as typed; --data_dir is left out, as a folder may move.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    words = []
    for name in ("source", "input", "tokenizer", "tokenizer_vocab", "model_type", "hinglish_ratio",
                 "pair_tokens", "cut_documents", "prompt_words", "typists", "val_doc_frac",
                 "max_docs", "max_chars", "clean", "romanise", "raw_dir", "seed"):
        value = getattr(args, name)
        if value is True:
            words.append(f"--{name}")
        elif name == "source" or value != defaults[name]:
            parts = value if isinstance(value, tuple) else [value]
            words.append(f"--{name}")
            words += [shlex.quote(printable(part)) for part in parts]
    return " ".join(words)


def printable(path):
    """A file's name as text that JSON can hold: a byte that is no UTF-8 becomes \\udcff or the
    like.
    """
    return str(path).encode("utf-8", "backslashreplace").decode()


def make_meta(args, spool, tok, digest, count, hashes):
    """What meta.json says of the token files."""
    meta = dict(
        version=dataset.VERSION,
        vocab_size=tok.vocab_size,
        mask_token_id=tok.vocab_size,
        pad_id=tok.pad_id,
        unk_id=tok.unk_id,
        bos_id=tok.bos_id,
        eos_id=tok.eos_id,
        dtype=dataset.token_dtype(tok.vocab_size).name,
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
    for number, split in enumerate(SPLITS):
        for what in ("tokens", "docs", "bytes"):
            meta[f"{split}_{what}"] = sum(count[number, script, what] for script in SCRIPTS)
        meta[f"{split}_sha256"] = hashes[number]
        meta["scripts"][split] = {script: count[number, script, "docs"] for script in SCRIPTS}
    if args.of_pairs:
        meta["pairs"] = about_pairs(count)
    if args.source == "transliterate":
        meta["frame"] = interlace.FRAME
    return meta


def about_pairs(count):
    """What meta.json says of pairs: the longest one, tokens and bytes of the responses."""
    about = {"longest": max(number for key, number in count.items() if key[2] == "longest")}
    for number, split in enumerate(SPLITS):
        for what in ("tokens", "bytes"):
            found = sum(count[number, script, f"response_{what}"] for script in SCRIPTS)
            about[f"{split}_{what}"] = found
    return about


def publish(args, work, meta, count, log):
    """Rename what is ready. meta.json goes first and comes last: without it nothing here is
    trusted.
    """
    folder = work.parent
    write_json(work / "meta.json", sealed(meta))
    (folder / "meta.json").unlink(missing_ok=True)
    for name in ("train.bin", "val.bin", "meta.json"):
        rename(work / name, folder / name)

    left_out = sum(count[key] for key in count if key[2] == "too_long")
    if left_out:
        log(
            f"notice: {left_out:,} pairs of more than {args.pair_tokens} tokens are left out; a "
            "larger --pair_tokens keeps them"
        )
    for script in SCRIPTS:
        train_docs = count[0, script, "docs"]
        val_docs = count[1, script, "docs"]
        if train_docs or val_docs:
            tokens = count[0, script, "tokens"] + count[1, script, "tokens"]
            size = count[0, script, "bytes"] + count[1, script, "bytes"]
            log(
                f"{script:>10}: {train_docs:,} documents for training, {val_docs:,} for "
                f"validation, {size / tokens:.2f} bytes/token"
            )
    log(
        f"{folder} ({args.source}): {meta['train_tokens']:,} training and {meta['val_tokens']:,} "
        "validation tokens, "
        f"{meta['vocab_size']:,} pieces from {args.tokenizer}"
    )


# ---- the sources, and whether anything has to be done --------------------------------------------

def find_sources(args, folder, log):
    """(what meta.json says of each source, their files, the sha256 of everything that decides what
    comes out).
    """
    settings = {"version": dataset.VERSION, "normaliser": NORMALISER}
    for name in ("source", "tokenizer_vocab", "model_type", "val_doc_frac", "max_docs", "max_chars",
                 "seed"):
        settings[name] = getattr(args, name)
    settings["clean"] = args.wants("clean") and RULES
    settings["romanise"] = args.wants("romanise")
    if args.source == "builtin" or settings["romanise"]:
        settings["hinglish_ratio"] = args.hinglish_ratio
    if args.of_pairs:
        settings["pair_tokens"] = args.pair_tokens
    if args.cut_documents:
        settings["cut_documents"] = True
    if args.prompt_words:
        settings["prompt_words"] = args.prompt_words
    if args.source == "transliterate":
        settings["typists"] = args.typists

    if args.source == "builtin":
        sources = [grammar.describe()]
        paths = [None]
        settings["corpus"] = sources[0]["version"]
    else:
        sources = []
        paths = []
        settings["files"] = []
        for path, record in source_files(args, folder, log):
            digest = dataset.file_sha256(path)
            paths.append(path)
            sources.append(record | {"sha256": digest})
            settings["files"].append([kind_of(path), digest])
    return sources, paths, hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def source_files(args, folder, log):
    """[(file, what meta.json says of it)]: the input, or what the hub gives."""
    if args.input:
        inputs = stdin_to_file(args.input, folder / WORK)
        return [
            (path, dict(name=printable(path), licence=None)) for path in find_files(inputs, log)
        ]
    # more than the budget, because cleaning takes some of it
    chars = int(1.2 * args.max_chars)
    return hub.download(args.source, Path(args.raw_dir), args.hinglish_ratio, chars, log)


def stdin_to_file(inputs, folder):
    """The inputs with "-" replaced by a copy of standard input: it is needed whole, for its hash,
    before it is read.
    """
    if "-" not in map(str, inputs):
        return inputs
    path = folder / "stdin.txt"
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return [path if str(name) == "-" else name for name in inputs]


def is_current(args, digest, log):
    """Is the folder already what would be built?"""
    if args.force or not Path(args.data_dir, "meta.json").exists():
        return False
    try:
        opened = [dataset.TokenData(args.data_dir, split) for split in SPLITS]
        meta = opened[0].meta
        if "seal" not in meta:
            log(f"{args.data_dir} was made by an older version, which did not seal meta.json: "
                "building it again")
            return False
        same_settings = meta["settings_sha256"] == digest
        if same_settings and meta["tokenizer_sha256"] == dataset.file_sha256(args.tokenizer):
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
                count, hashes = encode(args, work, spool, tok, log)
                if args.of_pairs:
                    check_pairs(args, count)
                meta = make_meta(args, spool, tok, digest, count, hashes)
                publish(args, work, meta, count, log)
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
