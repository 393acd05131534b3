"""So many tokens of English web text in GPT-2's encoding, from the hub into one token file.

    build(Path("fineweb_1b.npy"), 10**9, "npy", False, print)      # all that prepare_fineweb does

An end of text stands before each document. The last one is cut, so that the number of tokens is
exact. Rows are kept as they come: FILE.part grows, FILE.part.json counts what is certainly in it
and has the place in the stream, and whoever is stopped at any moment goes on there. The same number
of tokens is the same file, byte for byte, however often its making was stopped. In memory is one
batch of documents.
"""
import glob
import os
import shutil
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.console import UserError, need
from common.files import (
    file_sha256,
    lock,
    read_json,
    rename,
    replace_file,
    seal_holds,
    sealed,
    sync,
    to_json,
)
from text import gpt2, hub, token_file

SOURCE = hub.SOURCES["fineweb"][0]
DTYPE = np.dtype("<u2")
BATCH_CHARS = 4_000_000                    # of documents that are in memory together
SAY_SECONDS = 30                           # between two lines of progress where there is no bar


class TokenStream(hub.Stream):
    """The source's rows as ids in FILE.part, up to the wanted number."""

    def __init__(self, path, count, kind):
        self.source = SOURCE
        self.count = count
        self.head = token_file.HEADER_BYTES if kind == "npy" else 0
        self.path = path
        self.part = Path(f"{path}.part")
        self.state_path = Path(f"{path}.part.json")
        # full: the number of tokens at which a document was cut
        self.state = dict(
            asdict(SOURCE), rows=0, tokens=0, documents=0, bytes=0, ended=False, full=None, at=None,
            format=kind,
        )

    def size_of(self, state):
        """Bytes of the file that holds the tokens of a state."""
        return self.head + state["tokens"] * DTYPE.itemsize

    # ---- what an earlier run left
    def restore(self):
        """Takes over what an earlier run left, if it is of this source and whole."""
        try:
            saved = read_json(self.state_path)
        except UserError:
            return
        if not seal_holds(saved):
            return
        del saved["seal"]
        if not self.same_source(saved) or saved["format"] != self.state["format"]:
            return
        if os.fstat(self.file.fileno()).st_size < self.size_of(saved):
            return
        if saved["tokens"] > self.count or saved["full"] not in (None, self.count):
            raise UserError(
                f"{self.part} holds {saved['tokens']:,} tokens of an earlier run, and "
                f"{self.count:,} are asked for: give the earlier number, or --force to begin anew"
            )
        self.state = saved

    # ---- what hub.Stream calls
    def missing(self):
        left = self.count - self.state["tokens"] - self.new["tokens"]
        return BATCH_CHARS if left > 0 else 0

    def rewind(self):
        size = self.size_of(self.state)
        self.file.truncate(size)
        self.file.seek(size)
        self.new = dict(rows=0, tokens=0, documents=0, bytes=0)
        self.bar.update(self.state["tokens"] - self.bar.n)

    def keep(self, texts):
        left = self.count - self.state["tokens"] - self.new["tokens"]
        rows = []
        for ids in self.tokenizer.encode_many(texts):
            if len(ids) and left > 0:
                row = np.concatenate(([gpt2.END_ID], ids))[:left]
                left -= len(row)
                rows.append(row)
        if left == 0:
            self.state["full"] = self.count
        batch = np.concatenate(rows).astype(DTYPE) if rows else np.empty(0, DTYPE)
        self.file.write(batch)
        self.new["rows"] += len(texts)
        self.new["tokens"] += len(batch)
        self.new["documents"] += len(rows)
        self.new["bytes"] += int(gpt2.piece_bytes()[batch].sum())
        self.show(len(batch))

    def keep_state(self):
        replace_file(self.state_path, to_json(sealed(self.state)))

    def held(self):
        return f"{self.state['tokens']:,} of {self.count:,} tokens"

    # ---- progress
    def show(self, more):
        """The bar, or where nobody sees one, a line from time to time."""
        self.bar.update(more)
        self.read_now += more
        now = time.monotonic()
        if self.bar.disable and now - self.said >= SAY_SECONDS:
            self.said = now
            done = self.state["tokens"] + self.new["tokens"]
            speed = self.read_now / (now - self.began)
            left = round((self.count - done) / max(speed, 1))
            self.log(
                f"{done / 1e6:,.1f}M of {self.count / 1e6:,.1f}M tokens "
                f"({done / self.count:.1%}), {speed:,.0f} tokens/s, "
                f"{timedelta(seconds=left)} to go"
            )

    # ---- the whole
    def fetch(self, log):
        """Streams into the open part -> why it was given up, or None."""
        self.log = log
        self.began = self.said = time.monotonic()
        self.read_now = 0
        self.bar = tqdm(
            total=self.count,
            initial=self.state["tokens"],
            unit=" tokens",
            unit_scale=True,
            desc=self.path.name,
            disable=None,
        )
        with self.bar:
            self.rewind()
            if self.state["ended"] or not self.missing():
                return None
            need("datasets", "to read the hub")
            self.tokenizer = gpt2.Gpt2Tokenizer()
            answering = hub.Hub(log)
            if not answering.answers():
                return "the hub does not answer"
            return self.read(log, answering)

    def finish(self):
        """The part becomes the file. The .meta comes first: where the file is, it is whole."""
        tokens = self.state["tokens"]
        if self.head:
            self.file.seek(0)
            self.file.write(token_file.npy_header(tokens, DTYPE))
        self.file.flush()
        os.fsync(self.file.fileno())
        about = self.about(file_sha256(self.part))
        self.path.unlink(missing_ok=True)
        replace_file(token_file.meta_path(self.path), token_file.meta_text(about).encode())
        rename(self.part, self.path)
        sync(self.path.absolute().parent)
        self.state_path.unlink(missing_ok=True)
        # what replace_file had aside in a run that was killed
        for left in self.path.parent.glob(f".tmp-{glob.escape(self.path.name)}.*"):
            left.unlink()

    def about(self, digest):
        """The lines of the .meta."""
        state = self.state
        about = dict(
            tokens=state["tokens"],
            documents=state["documents"],
            encoding=gpt2.ENCODING,
            vocab_size=gpt2.VOCAB_SIZE,
            eot_id=gpt2.END_ID,
            source=SOURCE.repo,
            config=SOURCE.config,
            revision=state["revision"],
            licence=SOURCE.licence,
            tokenizer_sha256=gpt2.SHA256,
            format=state["format"],
            dtype=DTYPE.name,
            bytes=state["bytes"],
            sha256=digest,
        )
        if state["tokens"] < self.count:
            about["source_ended"] = "true"
        return about | {"complete": "true"}


# ---- the command ---------------------------------------------------------------------------------

def build(path, count, kind, force, log):
    """Make `path` a token file of so many tokens, or go on with it. A UserError says what came
    between.
    """
    if not force and already_there(path, count, log):
        return
    stream = TokenStream(path, count, kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(stream.part, os.O_RDWR | os.O_CREAT, 0o666)
        with os.fdopen(descriptor, "r+b") as stream.file:
            take_alone(stream)
            if force:
                stream.state_path.unlink(missing_ok=True)
            stream.restore()
            make(stream, log)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): {stream.held()} are kept in "
            f"{stream.part}; make room, then the same command goes on",
            code=1,
        ) from None


def already_there(path, count, log):
    """Is the file there, whole, with so many tokens? Dies if it is another one."""
    if not path.exists():
        return False
    meta = token_file.meta_path(path)
    other = "name another --output, or give --force to replace it"
    if not meta.exists():
        raise UserError(f"{path} has no {meta.name}, so it is not of this command: {other}")
    # every id and the number of tokens, and of a small file the hash
    data = token_file.open_split(path, "train", val_frac=0)
    if data.about.get("source_ended") and len(data) < count:
        raise UserError(
            f"{path} is already there, with all {len(data):,} tokens that the source has; "
            f"{count:,} are asked for",
            code=1,
        )
    if len(data) != count:
        raise UserError(f"{path} holds {len(data):,} tokens, not {count:,}: {other}")
    TokenStream(path, count, "npy").state_path.unlink(missing_ok=True)
    log(f"already there: {path}, {count:,} tokens; --force builds it again")
    return True


def take_alone(stream):
    """Dies if another process writes this file."""
    try:
        lock(stream.file)
    except BlockingIOError:
        raise UserError(
            f"another process is writing {stream.part}: wait for it, or name another --output"
        ) from None
    except OSError:                        # some network drives cannot lock
        pass


def make(stream, log):
    """The rest of the tokens, then the file; a part that is not whole stays where it is."""
    path = stream.path
    try:
        check_room(stream)
        if stream.state["tokens"]:
            log(f"going on at {stream.held()} of {stream.part}")
        trouble = stream.fetch(log)
    except BaseException:
        leave(stream, log)
        raise
    if trouble:
        leave(stream, log)
    if trouble and stream.state["tokens"]:
        raise UserError(
            f"the hub gave no more ({trouble}): {stream.held()} are kept; the same command goes "
            "on there",
            code=3,
        )
    if trouble:
        raise UserError(
            f"nothing could be read from the hub ({trouble}): check the network and run it again, "
            f"or copy a finished {path.name} and its .meta here",
            code=3,
        )
    if not stream.state["tokens"]:
        stream.part.unlink()
        raise UserError(f"{SOURCE.repo} holds no text", code=1)
    stream.finish()
    state = stream.state
    log(
        f"{path}: {state['tokens']:,} tokens of {state['documents']:,} documents, "
        f"{state['bytes'] / state['tokens']:.2f} bytes/token"
    )
    if state["tokens"] < stream.count:
        raise UserError(
            f"the source ended: {path} holds all {state['tokens']:,} tokens that it has, and "
            f"{stream.count:,} were asked for",
            code=1,
        )


def leave(stream, log):
    """Before an end without the file: an empty part goes, of another one it is said what it has."""
    if stream.state["tokens"]:
        log(f"notice: {stream.held()} are kept in {stream.part}")
    else:
        stream.part.unlink()


def check_room(stream):
    """Dies before hours of work if the disk cannot hold the file."""
    whole = stream.head + stream.count * DTYPE.itemsize
    missing = whole - stream.size_of(stream.state)
    free = shutil.disk_usage(stream.part.absolute().parent).free
    if missing > free:
        raise UserError(
            f"{stream.path} takes {whole / 1e9:,.2f} GB, of which {missing / 1e9:,.2f} GB are "
            f"missing, and the disk has {free / 1e9:,.2f} GB: make room, ask for fewer --tokens, "
            "or name another --output"
        )
