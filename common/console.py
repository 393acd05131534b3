"""The console: what a command says to people, errors that are sentences, exit codes.

Every command uses it: run(main) calls it, say() prints for people, and a UserError ends it in one
sentence. It knows nothing of models or text.
"""
import errno
import importlib.util
import os
import re
import subprocess
import sys

try:
    from tqdm import tqdm
    write_above_bar = tqdm.write
except ModuleNotFoundError:  # then there is no bar: --help and an exported model need no package
    write_above_bar = print


class UserError(Exception):
    """What the user can mend: printed as one sentence, exit code 2 (3: something outside of us is
    missing).
    """

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


class Damage(UserError):
    """A file that must not be used, as it is not what was written; the message names it."""


# without these no command works
PACKAGES = ("torch", "numpy", "sentencepiece", "safetensors", "tqdm")


SPEECH = {"quiet": False}

# with --quiet, of the lines for people only those that begin with these words are printed
ALWAYS = (
    "error",
    "warning",
    "notice",
    "stopped",
    "skipped",
    "nothing to do",
    "compile: failed",
    "[bench]",
)


def be_quiet(on):
    """From now on say() prints everything, or only what begins with a word of ALWAYS."""
    SPEECH["quiet"] = on


def say(text):
    """A line for people, on stderr and above a progress bar if there is one."""
    if SPEECH["quiet"] and not text.lower().startswith(ALWAYS):
        return
    try:
        write_above_bar(printable(text), file=sys.stderr)
    except OSError:
        mute(sys.stderr)


def printable(text):
    """Control characters, but newline and tab, become U+FFFD: neither a model's text nor a file's
    name moves the cursor.
    """
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def mute(stream):
    """The reader of this stream has gone (`| head`, a closed terminal): send further output to
    /dev/null, so that the work can go on.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def check_packages():
    """If something of requirements.txt is missing, say how to get it and leave with exit code 3."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: this Python ({sys.executable}) lacks {', '.join(missing)}: switch to the "
            "environment of the README "
            "(. .venv/bin/activate), or python -m pip install -r requirements.txt -c "
            "constraints.txt",
            file=sys.stderr,
        )
        sys.exit(3)


def need(package, why):
    """Dies with exit code 3 if an optional package that a flag asks for is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"the package {package} is needed {why}: python -m pip install {package}", code=3
        )


def commit_hash(folder):
    """The commit of the code in this folder, '+' when the tree is dirty; 'unknown' outside git."""
    def git(*words):
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD") or "unknown"
        if git("status", "--porcelain"):
            commit += "+"
        return commit
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def leave(code):
    """The end of an interrupted program. Threads of pyarrow that still read for the hub's library
    would abort while the interpreter ends (SIGABRT): then there is no such end.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.flush()
    if "pyarrow" in sys.modules:
        os._exit(code)
    sys.exit(code)


def run(main, argv=None):
    """Call an entry point; a UserError becomes one message on stderr and its exit code. Output is
    UTF-8 everywhere.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        code = main(argv)
        if sys.stdout:
            sys.stdout.flush()
        sys.exit(code or 0)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.code)
    except BrokenPipeError:  # `| head` has read enough: the interpreter flushes once more
        mute(sys.stdout)
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = ""
        if error.filename:
            where = f": {printable(str(error.filename))}"
        print(
            f"error: {error.strerror}{where}: make room, then go on (train: --resume); finished "
            "files are intact",
            file=sys.stderr,
        )
        sys.exit(1)
    except ModuleNotFoundError:
        check_packages()
        raise
    except KeyboardInterrupt:
        leave(130)
