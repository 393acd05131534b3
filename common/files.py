"""Files: strict JSON, hashes, and the one way to write a file whole or not at all."""
import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import time
from pathlib import Path

from common.console import UserError


def read_json(path):
    """An object from strict JSON: UTF-8, no NaN, no key twice. Trouble is a UserError that names
    the file.
    """
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    try:
        value = json.loads(
            Path(path).read_bytes().decode(), object_pairs_hook=unique, parse_constant=refuse
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


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


def read_lines(path):
    """JSON lines -> their objects. What is not there is empty, and a line that a kill or a full
    disk tore is none.
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


def json_text(value, indent=None):
    """Strict JSON as readable text. Escaped are only what UTF-8 cannot say (half a surrogate pair,
    as a name that is no UTF-8 has it) and the control characters that json leaves raw, which a
    terminal obeys."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    return re.sub("[\x7f-\x9f\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def write_json(path, value):
    write_text(path, json_text(value, indent=1))


def in_place(path):
    """Is this a device, a pipe or a link? A file that was written aside would take its place: it
    has to be written into.
    """
    try:
        return not stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def written_aside(path, fix=""):
    """Yields a name beside the path, whose folder is made; the path itself where it must be written
    in place.

    What goes wrong there is said of the path; `fix` ends the message.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    here = in_place(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path if here else aside
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}){fix}") from None
    finally:
        if not here:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


def write_text(path, text):
    """Written aside, synced, renamed, so a reader finds the old file or the new one; devices, pipes
    and links in place.
    """
    with written_aside(path) as name:
        with open(name, "w", encoding="utf-8", errors="replace", newline="") as f:
            f.write(text)
            f.flush()
            if name != Path(path):
                os.fsync(f.fileno())
        if name != Path(path):
            os.replace(name, path)


def can_write(args, *names):
    """Dies before long work, and not after it, if a file that these flags name cannot be written.
    """
    for name in names:
        if path := getattr(args, name):
            with written_aside(path, f": name another --{name}") as aside:
                if Path(path).is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                if not in_place(path):
                    aside.touch()
                elif os.path.exists(path) and not os.access(path, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def sync(path):
    folder = os.path.isdir(path)
    if folder and os.name == "nt":  # Windows cannot open a folder
        return
    fd = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(fd)
    except OSError as error:
        # some network file systems: no folder sync
        if not folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def write_file(path, data):
    with open(path, "wb") as f:
        f.write(data)
    sync(path)


def rename(source, target):
    for wait in (0.1, 0.5, 2.0, None):
        try:
            return os.replace(source, target)
        except PermissionError:  # on Windows somebody else's open file blocks a rename for a moment
            if os.name != "nt" or wait is None:
                raise
            time.sleep(wait)


def replace_file(path, data, run):
    """Replace a small file whole. Its temporary twin lies in the run folder, where sweep() finds it
    after a kill.
    """
    temp = run / f".tmp-{path.name}-{os.getpid()}"
    write_file(temp, data)
    rename(temp, path)
    sync(path.parent)


def to_json(value):
    return (json_text(value, indent=1) + "\n").encode()
