"""Files: strict JSON, hashes, the one way to write a file whole or not at all, and the one lock.

Who writes what:
* write_text, write_json: a file that the user named; devices, pipes and links are written into.
  Trouble is a UserError that names the file. can_write asks beforehand whether they would succeed.
* replace_file: a file of our own, such as a pointer of a run. Trouble stays an OSError.
* write_file: a file in a folder that is itself still aside, as a checkpoint is while it is saved,
  or an exported model (folder_aside).
"""
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
from pathlib import Path

from common.console import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock: there a second process goes unnoticed
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent       # of the repository
LOCK_POLL = 0.5                                     # seconds between two tries to lock

# --------------------------------------------------------------------------------------------------
# reading

def strict_json(text):
    """The value of a JSON text: no NaN, no key twice. Trouble is a ValueError, or a
    RecursionError.
    """
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def read_json(path):
    """An object from strict JSON in UTF-8. Trouble is a UserError that names the file."""
    try:
        value = strict_json(Path(path).read_bytes().decode())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def read_lines(path):
    """JSON lines -> their objects. A file that is not there is empty; a line that a kill or a full
    disk tore is left out.
    """
    found = []
    try:
        # not splitlines: a text may hold other line ends
        lines = Path(path).read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return found
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [value for value in found if isinstance(value, dict)]


def file_sha256(path):
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# JSON

def json_text(value, indent=None):
    """Strict JSON as readable text. Escaped are only what UTF-8 cannot say (half a surrogate pair,
    as a name that is no UTF-8 has it) and the control characters that json leaves raw, which a
    terminal obeys.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    return re.sub("[\x7f-\x9f\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def to_json(value):
    """Strict JSON as the bytes of one of our own files."""
    return (json_text(value, indent=1) + "\n").encode()


def sealed(value):
    """The object with a hash of its content under "seal", so that a changed value shows when it is
    read.
    """
    body = {key: part for key, part in value.items() if key != "seal"}
    as_read = json.loads(json.dumps(body))  # a file has no numbers as keys
    digest = hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()
    return {**body, "seal": digest}


def seal_holds(value):
    """Does an object from a JSON file still have the content that it was sealed with?"""
    return value == sealed(value)


# --------------------------------------------------------------------------------------------------
# writing

def sync(path):
    """Wait until a file, or the list of a folder's names, is on the disk."""
    folder = os.path.isdir(path)
    if folder and os.name == "nt":  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems: no folder sync
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def rename(source, target):
    """Take the target's place in one step. What the folder lists is on the disk after its sync."""
    for wait in (0.1, 0.5, 2.0, None):
        try:
            return os.replace(source, target)
        except PermissionError:  # on Windows somebody else's open file blocks a rename for a moment
            if os.name != "nt" or wait is None:
                raise
            time.sleep(wait)


def write_file(path, data):
    """Write bytes, and wait until they are on the disk. After a kill the file may be a part."""
    with open(path, "wb") as file:
        file.write(data)
    sync(path)


def aside_of(path, folder=None):
    """The name under which a file is written before it gets its own, in its own folder or in this
    one. checkpoint.sweep clears such names from a run folder after a kill.
    """
    return Path(folder or path.parent) / f".tmp-{path.name}-{os.getpid()}"


def replace_file(path, data, folder=None):
    """Replace a file by these bytes: a reader, also after a kill, finds the old file or the new
    one. It is written aside (in `folder`, where its own may hold nothing else), synced, renamed.
    """
    aside = aside_of(path, folder)
    try:
        write_file(aside, data)
        rename(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def folder_aside(output):
    """Where a folder is written until it is whole: at the end it takes the name `output`, and an
    older one there goes. After trouble nothing of it is left.
    """
    aside = aside_of(output)
    with told_of(output):
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            old = output.with_name(f".old-{output.name}-{os.getpid()}")
            if output.exists():
                rename(output, old)
            rename(aside, output)
            sync(output.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def in_place(path):
    """Is this a device, a pipe or a link? A file that was written aside would take its place: it
    has to be written into.
    """
    try:
        return not stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def told_of(path, remedy=""):
    """What goes wrong in here is a UserError about this file; `remedy` ends its message."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}){remedy}") from None


def write_text(path, text):
    """Write a file that the user named, whole, its folder made; devices, pipes and links are
    written into.
    """
    path = Path(path)
    data = text.encode(errors="replace")
    with told_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if in_place(path):
            with open(path, "wb") as file:
                file.write(data)
        else:
            replace_file(path, data)


def write_json(path, value):
    """Write strict JSON as write_text writes text."""
    write_text(path, json_text(value, indent=1))


def can_write(args, *names):
    """Dies before long work, and not after it, if a file that these flags name cannot be written.
    """
    for name in names:
        path = getattr(args, name)
        if path:
            with told_of(path, f": name another --{name}"):
                try_to_write(Path(path))


def try_to_write(path):
    """An OSError if write_text(path, ...) would meet one now; makes the folder, as that does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not in_place(path):
        aside = aside_of(path)
        aside.touch()
        aside.unlink()
    elif os.path.exists(path) and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


# --------------------------------------------------------------------------------------------------
# the lock

def lock(file, wait=0):
    """Lock an open file until it is closed; the kernel frees it however its holder dies.

    BlockingIOError: another process still holds it after `wait` seconds (None: wait for ever). Any
    other OSError: it cannot be locked, as on some network drives. Without flock nothing happens.
    """
    if fcntl is None:
        return
    if wait is None:
        fcntl.flock(file, fcntl.LOCK_EX)
        return
    end = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
        time.sleep(LOCK_POLL)
