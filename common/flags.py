"""The machinery of flags: a dataclass field that declares a setting, and the reading of flags and
JSON files into it.

Generic: it knows no setting of Aria's (config.py declares those). A flag is a field whose metadata
holds help, choices, limits, old names and its resume rule; --help, the tables of the docs and the
reading of saved files derive from it. Reading argv is a loop of our own: argparse stops at the
first mistake, suggests nothing, and cannot read `--x`, `--no_x` and `--x True` next to a
positional. No torch and no numpy here: --help has to be instant.
"""
import dataclasses
import math
import operator
import re
import textwrap
from collections import deque

from common.console import UserError

WIDTH, COLUMN = 80, 26         # of --help: all of it, and where the meaning of a flag begins


# ---- declaring -----------------------------------------------------------------------------------

def flag(default, help, resume="may", **meta):
    """A field with one flag's declaration. The type is the annotation's; a default of None also
    accepts "none".

    choices; values: old value -> value; aliases: other flag names; shortcuts: flag -> the value it
    stands for; at_least, above, at_most, below: limits; bare: value of the flag alone; many:
    "repeat" (one value each time) or "several"; positional; rare: only under --help_all; elsewhere:
    wrong choice -> what it is.
    """
    if isinstance(default, bool):
        meta["bare"] = "on"
    return dataclasses.field(default=default, metadata=dict(help=help, resume=resume, **meta))


def again(cls, name, *default):
    """Another class's flag, with a default of its own if one is given."""
    f = cls.__dataclass_fields__[name]
    return dataclasses.field(default=default[0] if default else f.default, metadata=f.metadata)


# ---- reading values and flags --------------------------------------------------------------------

WORDS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(
    ("false", "no", "off", "0"), False
)
LARGEST = 1e30     # of a number with a point: weights are float32, which ends at 3e38
LIMITS = dict(at_least=operator.ge, above=operator.gt, at_most=operator.le, below=operator.lt)


def convert(f, value):
    """A flag's text (or a JSON value of the right type) -> the flag's value. A ValueError says what
    is wrong.
    """
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
        raise ValueError(
            "must be a whole number" if f.type is int else "must be a number"
        ) from None
    if f.type is float and not math.isfinite(value):
        raise ValueError("must be finite")
    if f.type in (int, float) and abs(value) > (LARGEST if f.type is float else 2 ** 63):
        raise ValueError(
            f"is more than a machine holds; at most {LARGEST:g}"
            if f.type is float
            else "must be below 2^63"
        )
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
            raise ValueError(
                meta.get("elsewhere", {}).get(part)
                or f"must be one of {', '.join(meta['choices'])}"
            )
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
    """A hint for an unknown name: the command it belongs to, or the nearest name. others: command
    -> its flags.
    """
    import difflib  # costs 10 ms, and only a mistake needs it
    for other, cls in dict(others).items():
        if name in flag_names(cls):
            return f" (it belongs to {other})"
    near = difflib.get_close_matches(name, names, 1)
    return f", did you mean --{near[0]}?" if near else ""


def read_flags(cls, argv, prog, commands=()):
    """argv -> ({field: value}, [all that is wrong with it], {unreadable fields}). Only flag names
    are normalised.
    """
    names, queue, typed, problems, bad = flag_names(cls), deque(argv), {}, [], set()
    positional = next((f for f in dataclasses.fields(cls) if f.metadata.get("positional")), None)
    place = None                                                   # the positional argument

    def take(accept=None):
        """The next argument, unless it is a flag or none of accept."""
        if (
            queue
            and not re.match("--[A-Za-z]|-h$", queue[0])
            and (accept is None or queue[0].lower() in accept)
        ):
            return queue.popleft()

    while queue:
        token = queue.popleft()
        if token in ("-h", "--help", "--help_all", "--help-all"):
            print(help_text(cls, prog, everything="all" in token))
            raise SystemExit(0)
        if token and not token.strip("\\ \r\n"):
            problems.append(
                "a lone \\ is no argument: use a single \\ at the line end, with nothing after it"
            )
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
        typed[f.name] = (
            typed.get(f.name, ()) + value if f.metadata.get("many") == "repeat" else value
        )
    if place is not None and typed.setdefault(positional.name, place) != place:
        problems.append(
            f"{place} and --{positional.name} {typed[positional.name]} differ: give only one of "
            "them"
        )
    return typed, problems, bad


def flag_value(f, stands_for, text, take):
    """The value of one flag; text is what followed its "=", take() hands out the arguments after
    it.
    """
    many, bare, choices = (f.metadata.get(key) for key in ("many", "bare", "choices"))
    if stands_for:                                                 # --no_x, --cpu
        if text is not None or take(WORDS):
            raise ValueError("takes no value")
        text = stands_for
    elif text is None and bare:  # a switch takes only what can be its value
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


# ---- JSON files ----------------------------------------------------------------------------------

def checked(cls, saved, where):
    """Values for fields of cls from JSON, flat or as the "args" of a run. Unknown keys and wrong
    types die.
    """
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
    """The "args" section of a run's config.json: every flag of cls (none: of the arguments' own
    command).
    """
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(cls or args)}


def problems_of(args):
    """Everything wrong with the relations between flags, in sentences that name the flags and the
    numbers.
    """
    return [p for c in type(args).__mro__ if "problems" in vars(c) for p in c.problems(args)]


# ---- showing -------------------------------------------------------------------------------------

def show(value):
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def describe(cls):
    """(group, flag names, kind, default, help, rare) of every flag: the one source of --help and of
    the tables.
    """
    for f in dataclasses.fields(cls):
        owner = next(
            c for c in reversed(cls.__mro__) if f.name in vars(c).get("__annotations__", ())
        )
        names = [
            f"--{name}"
            for name in (f.name, *f.metadata.get("aliases", ()), *f.metadata.get("shortcuts", ()))
        ]
        kind = {str: "text", tuple: "texts", bool: ""}.get(f.type, f.type.__name__)
        kind = "|".join(f.metadata.get("choices", ())) or kind
        yield (
            owner.__doc__,
            names,
            kind,
            show(f.default),
            f.metadata["help"],
            f.metadata.get("rare"),
        )


def wrapped(text, indent, first=None):
    """The text as lines of at most WIDTH columns; `first` stands in the place of the first line's
    indent.
    """
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=" " * indent if first is None else first,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def flag_help(names, kind, default, text):
    """One flag as lines of --help."""
    head, meaning = f"  {', '.join(names)} {kind}".rstrip(), f"{text} [{default}]"
    if len(head) < COLUMN:
        return wrapped(meaning, COLUMN, f"{head:{COLUMN}}")
    heads = [head] if len(head) <= WIDTH else wrapped(head.strip().replace("|", " | "), 6, "  ")
    return [*heads, *wrapped(meaning, COLUMN)]


def help_text(cls, prog, everything=True):
    """Usage, examples, then the flags by group: those that cls.first names, the others as declared,
    "Everywhere" last.
    """
    place = any(f.metadata.get("positional") for f in dataclasses.fields(cls))
    lines = [
        f"usage: python -m {prog} {'[CHECKPOINT] ' if place else ''}[--flag value] ...",
        "",
        "Examples",
    ]
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
    lines += [
        "",
        *wrapped("--a_b and --a-b are one flag; a switch --x is turned off by --no_x.", 0),
    ]
    if not everything:
        lines.append(f"More flags: python -m {prog} --help_all")
    return "\n".join(lines)


def table(cls):
    """The flags of a command as a markdown table, for the README and the docs."""
    lines = ["| Flag | Value | Default | Meaning |", "|---|---|---|---|"]
    for _, names, kind, default, text, _ in describe(cls):
        lines.append(
            f"| {', '.join(f'`{name}`' for name in names)} | {kind.replace('|', ', ')} | {default} "
            f"| {text} |"
        )
    return "\n".join(lines)
