"""The machinery of knobs: a dataclass field that declares a setting, and the reading of flags and JSON files into it.

Generic: it knows no setting of Aria's (config.py declares those). A knob is a field whose metadata holds help, choices,
limits, old names and its resume rule; --help, the tables of the docs and the reading of saved files derive from it.
Reading argv is a loop of our own: argparse stops at the first mistake, suggests nothing, and cannot read `--x`, `--no_x`
and `--x True` next to a positional. No torch and no numpy here: --help has to be instant.
"""
import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import operator
import os
import re
import stat
import subprocess
import sys
import textwrap
from collections import deque
from pathlib import Path


class UserError(Exception):
    """A slip the user can mend: printed as one sentence, exit code 2 (3: something external is missing)."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


class Damage(UserError):
    """A file that must not be used, as it is not what was written; the message names it."""


PACKAGES = ("torch", "numpy", "sentencepiece", "safetensors", "tqdm")


SPEECH = {"quiet": False}      # --quiet: of the lines for people only those that begin with these words are printed
ALWAYS = ("error", "warning", "notice", "stopped", "skipped", "nothing to do", "compile: failed", "[bench]")
WIDTH, COLUMN = 80, 26         # of --help: all of it, and where the meaning of a flag begins


def be_quiet(on):
    """What say() prints from now on."""
    SPEECH["quiet"] = on


def say(text):
    """A line for people, on stderr and above a progress bar if there is one."""
    if SPEECH["quiet"] and not text.lower().startswith(ALWAYS):
        return
    from tqdm import tqdm
    try:
        tqdm.write(printable(text), file=sys.stderr)
    except OSError:
        mute(sys.stderr)


def printable(text):
    """Control characters, but newline and tab, become U+FFFD: neither a model's text nor a file's name moves the cursor."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def mute(stream):
    """Nobody reads this any more (`| head`, a closed terminal): what comes goes nowhere, and the work goes on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def check_packages():
    """If something of requirements.txt is missing, say how to get it and leave with exit code 3."""
    import importlib.util
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: this Python ({sys.executable}) lacks {', '.join(missing)}: switch to the environment of the README "
              "(. .venv/bin/activate), or python -m pip install -r requirements.txt -c constraints.txt", file=sys.stderr)
        sys.exit(3)


def need(package, why):
    """An optional package that a flag asks for; exit code 3 when it is not there."""
    import importlib.util
    if importlib.util.find_spec(package) is None:
        raise UserError(f"the package {package} is needed {why}: python -m pip install {package}", code=3)


def commit_hash(folder):
    """The commit of the code in this folder, '+' when the tree is dirty; 'unknown' outside git."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10).stdout.strip()
    try:
        return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def run(main, argv=None):
    """Call an entry point; a UserError becomes one message on stderr and its exit code. Output is UTF-8 everywhere."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        code = main(argv) or 0
        if sys.stdout:
            sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.code)
    except BrokenPipeError:      # `| head` has read enough; the interpreter's last flush goes nowhere
        mute(sys.stdout)
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = f": {printable(str(error.filename))}" if error.filename else ""
        print(f"error: {error.strerror}{where}: make room, then go on (train: --resume); finished files are intact",
              file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError:
        check_packages()
        raise
    except KeyboardInterrupt:
        sys.exit(130)


# ---- declaring -------------------------------------------------------------------------------------------------------

def knob(default, help, resume="may", **meta):
    """A field with one knob's declaration. The type is the annotation's; a default of None also accepts "none".

    choices; values: old value -> value; aliases: other flag names; shortcuts: flag -> the value it stands for;
    at_least, above, at_most, below: limits; bare: value of the flag alone; many: "repeat" (one value each time) or
    "several"; positional; rare: only under --help_all; elsewhere: wrong choice -> what it is.
    """
    if isinstance(default, bool):
        meta["bare"] = "on"
    return dataclasses.field(default=default, metadata=dict(help=help, resume=resume, **meta))


def again(cls, name, *default):
    """Another class's knob, with a default of its own if one is given."""
    f = cls.__dataclass_fields__[name]
    return dataclasses.field(default=default[0] if default else f.default, metadata=f.metadata)


# ---- reading values and flags ----------------------------------------------------------------------------------------

WORDS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
LARGEST = 1e30     # of a number with a point: weights are float32, which ends at 3e38
LIMITS = dict(at_least=operator.ge, above=operator.gt, at_most=operator.le, below=operator.lt)


def convert(f, value):
    """A flag's text (or a JSON value of the right type) -> the knob's value. A ValueError says what is wrong."""
    meta, is_text = f.metadata, isinstance(value, str)
    if f.default is None and is_text and value.lower() == "none":
        return None
    if f.type is bool and is_text:
        if value.lower() not in WORDS:
            raise ValueError("must be True or False")
        return WORDS[value.lower()]
    try:
        value = f.type(value)
    except (ValueError, OverflowError):
        raise ValueError("must be a whole number" if f.type is int else "must be a number") from None
    if f.type is float and not math.isfinite(value):
        raise ValueError("must be finite")
    if f.type in (int, float) and abs(value) > (LARGEST if f.type is float else 2 ** 63):
        raise ValueError(f"is more than a machine holds; at most {LARGEST:g}" if f.type is float else "must be below 2^63")
    for limit, holds in LIMITS.items():
        if limit in meta and not holds(value, meta[limit]):
            raise ValueError(f"must be {limit.replace('_', ' ')} {meta[limit]}")
    if f.type is str:
        value = meta.get("values", {}).get(value, value)
    elif f.type is tuple:
        if not all(isinstance(part, str) for part in value):
            raise ValueError("must be a list of texts")
        value = tuple(meta.get("values", {}).get(part, part) for part in value)
    for part in value if f.type is tuple else (value,):
        if "choices" in meta and part not in meta["choices"]:
            raise ValueError(meta.get("elsewhere", {}).get(part) or f"must be one of {', '.join(meta['choices'])}")
    return value


def flag_names(cls):
    """Every name of every flag in snake case -> (its field, the text it stands for or None)."""
    names = {}
    for f in dataclasses.fields(cls):
        names |= {name: (f, None) for name in (f.name, *f.metadata.get("aliases", ()))}
        names |= {name: (f, text) for name, text in f.metadata.get("shortcuts", {}).items()}
        if f.type is bool or "bare" in f.metadata and "choices" in f.metadata:
            names["no_" + f.name] = (f, "off")
    return names


def suggestion(name, names, others=()):
    """A hint for an unknown name: the command it belongs to, or the nearest name. others: command -> its knobs."""
    import difflib  # costs 10 ms, and only a mistake needs it
    for other, cls in dict(others).items():
        if name in flag_names(cls):
            return f" (it belongs to {other})"
    near = difflib.get_close_matches(name, names, 1)
    return f", did you mean --{near[0]}?" if near else ""


def read_flags(cls, argv, prog, commands=()):
    """argv -> ({field: value}, [all that is wrong with it], {unreadable fields}). Only flag names are normalised."""
    names, queue, typed, problems, bad = flag_names(cls), deque(argv), {}, [], set()
    positional = next((f for f in dataclasses.fields(cls) if f.metadata.get("positional")), None)
    place = None                                                   # the positional argument

    def take(accept=None):
        """The next argument, unless it is a flag or none of accept."""
        if queue and not re.match("--[A-Za-z]|-h$", queue[0]) and (accept is None or queue[0].lower() in accept):
            return queue.popleft()

    while queue:
        token = queue.popleft()
        if token in ("-h", "--help", "--help_all", "--help-all"):
            print(help_text(cls, prog, everything="all" in token))
            raise SystemExit(0)
        if token and not token.strip("\\ \r\n"):
            problems.append("a lone \\ is no argument: use a single \\ at the line end, with nothing after it")
            continue
        if not token.startswith("-") and positional and place is None:
            place = token
            continue
        name, equals, text = token[2:].partition("=")
        name, text = name.replace("-", "_"), text if equals else None
        if not token.startswith("--") or name not in names:
            if token.startswith("--"):
                problems.append(f"unknown flag --{name}{suggestion(name, names, commands)}")
                take()                                             # most likely its value
            else:
                problems.append(f"unexpected argument {token!r}")
            continue
        f, stands_for = names[name]
        try:
            value = flag_value(f, stands_for, text, take)
        except ValueError as error:
            problems.append(f"--{name} {error}")
            bad.add(f.name)
            continue
        typed[f.name] = typed.get(f.name, ()) + value if f.metadata.get("many") == "repeat" else value
    if place is not None and typed.setdefault(positional.name, place) != place:
        problems.append(f"{place} and --{positional.name} {typed[positional.name]} differ: give only one of them")
    return typed, problems, bad


def flag_value(f, stands_for, text, take):
    """The value of one flag; text is what followed its "=", take() hands out the arguments after it."""
    many, bare, choices = (f.metadata.get(key) for key in ("many", "bare", "choices"))
    if stands_for:                                                 # --no_x, --cpu
        if text is not None or take(WORDS):
            raise ValueError("takes no value")
        text = stands_for
    elif text is None and bare:                                    # a switch takes only what can be its value
        words = {*WORDS, *(choices or ()), *(["none"] if f.default is None else [])}
        text = take(words if choices or f.type is bool else None) or bare
    elif text is None:
        text = take()
    if text is None:
        raise ValueError("needs a value")
    parts = [text]
    while many == "several" and (more := take()) is not None:
        parts.append(more)
    if many and choices:
        parts = [part for text in parts for part in split_list(text)]
    try:
        return convert(f, parts if many else text)
    except ValueError as error:
        raise ValueError(f"{' '.join(parts)}: {error}") from None


def split_list(text):
    return [part.strip() for part in text.split(",")]


# ---- JSON files ------------------------------------------------------------------------------------------------------

def read_json(path):
    """An object from strict JSON: UTF-8, no NaN, no key twice. Trouble is a UserError that names the file."""
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    try:
        value = json.loads(Path(path).read_bytes().decode(), object_pairs_hook=unique, parse_constant=refuse)
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
    """The object with a hash of its content under "seal", so that a changed value shows when it is read."""
    body = {key: part for key, part in value.items() if key != "seal"}
    as_read = json.loads(json.dumps(body))                            # a file has no numbers as keys
    digest = hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()
    return {**body, "seal": digest}


def seal_holds(value):
    """Does an object from a JSON file still have the content that it was sealed with?"""
    return value == sealed(value)


def read_lines(path):
    """JSON lines -> their objects. What is not there is empty, and a line that a kill or a full disk tore is none."""
    found = []
    try:
        lines = Path(path).read_bytes().split(b"\n")                  # not splitlines: a text may hold other line ends
    except (FileNotFoundError, NotADirectoryError):
        return found
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [value for value in found if isinstance(value, dict)]


def json_text(value, indent=None):
    """Strict JSON as readable text. Escaped are only what UTF-8 cannot say (half a surrogate pair, as a name that is no UTF-8
    has it) and the control characters that json leaves raw, which a terminal obeys."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    return re.sub("[\x7f-\x9f\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def write_json(path, value):
    write_text(path, json_text(value, indent=1))


def in_place(path):
    """Is this a device, a pipe or a link? A file that was written aside would take its place: it has to be written into."""
    try:
        return not stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def written_aside(path, fix=""):
    """Yields a name beside the path, whose folder is made; the path itself where it must be written in place.

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
    """Written aside, synced, renamed, so a reader finds the old file or the new one; devices, pipes and links in place."""
    with written_aside(path) as name:
        with open(name, "w", encoding="utf-8", errors="replace", newline="") as f:
            f.write(text)
            f.flush()
            if name != Path(path):
                os.fsync(f.fileno())
        if name != Path(path):
            os.replace(name, path)


def can_write(args, *names):
    """Dies before long work, and not after it, if a file that these knobs name cannot be written."""
    for name in names:
        if path := getattr(args, name):
            with written_aside(path, f": name another --{name}") as aside:
                if Path(path).is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                if not in_place(path):
                    aside.touch()
                elif os.path.exists(path) and not os.access(path, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def checked(cls, saved, where):
    """Values for fields of cls from JSON, flat or as the "args" of a run. Unknown keys and wrong types die."""
    if isinstance(saved.get("args"), dict):
        saved = saved["args"]
    fields, values, problems = cls.__dataclass_fields__, {}, []
    for name, value in saved.items():
        if name not in fields:
            problems.append(f"unknown setting {name}{suggestion(name, fields).replace('--', '')}")
            continue
        f = fields[name]
        kinds = {float: (float, int), tuple: (list, tuple)}.get(f.type, (f.type,))
        try:
            if type(value) not in kinds and not (value is None and f.default is None):
                raise ValueError(f"must be of type {f.type.__name__}")
            values[name] = value if value is None else convert(f, value)
        except ValueError as error:
            problems.append(f"{name} {value}: {error}")
    if problems:
        raise UserError(f"{where}:\n  " + "\n  ".join(problems))
    return values


def to_dict(args, cls=None):
    """The "args" section of a run's config.json: every knob of cls (none: of the arguments' own command)."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(cls or args)}


def problems_of(args):
    """Everything wrong with the relations between knobs, in sentences that name the flags and the numbers."""
    return [p for c in type(args).__mro__ if "problems" in vars(c) for p in c.problems(args)]


# ---- showing ---------------------------------------------------------------------------------------------------------

def show(value):
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def describe(cls):
    """(group, flag names, kind, default, help, rare) of every knob: the one source of --help and of the tables."""
    for f in dataclasses.fields(cls):
        owner = next(c for c in reversed(cls.__mro__) if f.name in vars(c).get("__annotations__", ()))
        names = [f"--{name}" for name in (f.name, *f.metadata.get("aliases", ()), *f.metadata.get("shortcuts", ()))]
        kind = {str: "text", tuple: "texts", bool: ""}.get(f.type, f.type.__name__)
        kind = "|".join(f.metadata.get("choices", ())) or kind
        yield owner.__doc__, names, kind, show(f.default), f.metadata["help"], f.metadata.get("rare")


def wrapped(text, indent, first=None):
    """The text as lines of at most WIDTH columns; `first` stands in the place of the first line's indent."""
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent if first is None else first,
                         subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def flag_help(names, kind, default, text):
    """One flag as lines of --help."""
    head, meaning = f"  {', '.join(names)} {kind}".rstrip(), f"{text} [{default}]"
    if len(head) < COLUMN:
        return wrapped(meaning, COLUMN, f"{head:{COLUMN}}")
    heads = [head] if len(head) <= WIDTH else wrapped(head.strip().replace("|", " | "), 6, "  ")
    return [*heads, *wrapped(meaning, COLUMN)]


def help_text(cls, prog, everything=True):
    """Usage, examples, then the flags by group: those that cls.first names, the others as declared, "Everywhere" last."""
    place = any(f.metadata.get("positional") for f in dataclasses.fields(cls))
    lines = [f"usage: python -m {prog} {'[CHECKPOINT] ' if place else ''}[--flag value] ...", "", "Examples"]
    for command, what in getattr(cls, "examples", ()):
        lines += [*wrapped(what, 2, "  # "), f"  {command}"]
    groups = {}
    for group, names, kind, default, text, rare in describe(cls):
        if everything or not rare:
            groups.setdefault(group, []).extend(flag_help(names, kind, default, text))
    first = [name for name in getattr(cls, "first", ()) if name in groups]
    rest = [name for name in groups if name not in (*first, "Everywhere")]
    for name in (*first, *rest, *(name for name in groups if name == "Everywhere")):
        lines += ["", name, *groups[name]]
    lines += ["", *wrapped("--a_b and --a-b are one flag; a switch --x is turned off by --no_x.", 0)]
    if not everything:
        lines.append(f"More flags: python -m {prog} --help_all")
    return "\n".join(lines)


def table(cls):
    """The knobs of a command as a markdown table, for the README and the docs."""
    lines = ["| Flag | Value | Default | Meaning |", "|---|---|---|---|"]
    for _, names, kind, default, text, _ in describe(cls):
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {kind.replace('|', ', ')} | {default} | {text} |")
    return "\n".join(lines)
