"""How a flag is declared, and how flags and JSON files are read into a dataclass.

Used by config.py, model_config.py and studies.py, which declare; by cli.py, which reads. It knows
no setting of Aria's. A flag is a field whose metadata holds help, choices, limits, old names and
its resume rule; --help, the tables of the docs and the reading of saved files derive from it.
Reading argv is a loop of our own: argparse stops at the first mistake, suggests nothing, and cannot
read `--x`, `--no_x` and `--x True` next to a positional. No torch and no numpy here: --help has to
be instant.
"""
import dataclasses
import math
import operator
import re
import textwrap
from collections import deque
from difflib import get_close_matches
from typing import NamedTuple

from common.console import UserError

WIDTH = 80          # columns of --help
COLUMN = 26         # of them before the meaning of a flag

# --------------------------------------------------------------------------------------------------
# declaring

def flag(default, help, resume="may", **meta):
    """A field with one flag's declaration. The type is the annotation's; a default of None also
    accepts "none".

    resume: what a resumed run does with it, see config.py. The rest, all of it optional:
      choices                           the values that it may have
      values                            {older value: the one it stands for}
      aliases                           other names of the flag
      shortcuts                         {another flag: the value that it stands for}
      at_least, above, at_most, below   limits of a number
      bare                              the value of the flag alone
      many                              "repeat" (one value each time) or "several"
      positional                        the name of the flag may be left out
      rare                              shown only by --help_all
      later                             settings that an earlier version saved lack it, and its
                                        default is what they mean
      elsewhere                         {wrong choice: what it is instead}
    """
    if isinstance(default, bool):
        meta["bare"] = "on"
    return dataclasses.field(default=default, metadata=dict(help=help, resume=resume, **meta))


def again(cls, name, *default):
    """Another class's flag, with a default of its own if one is given."""
    field = cls.__dataclass_fields__[name]
    [own] = default or [field.default]
    return dataclasses.field(default=own, metadata=field.metadata)


# --------------------------------------------------------------------------------------------------
# reading values and flags

WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
LARGEST = 1e30     # of a number with a point: weights are float32, which ends at 3e38
LIMITS = dict(at_least=operator.ge, above=operator.gt, at_most=operator.le, below=operator.lt)


def convert(field, value):
    """A flag's text (or a JSON value of the right type) -> the flag's value. A ValueError says what
    is wrong.
    """
    if isinstance(value, str):
        if field.default is None and value.lower() == "none":
            return None
        if field.type is bool:
            if value.lower() not in WORDS:
                raise ValueError("must be True or False")
            return WORDS[value.lower()]
    if field.type in (int, float):
        value = number(field, value)
    else:
        value = field.type(value)

    # older values, then the choices: of a text, or of each of several
    newer = field.metadata.get("values", {})
    if field.type is str:
        value = newer.get(value, value)
        parts = (value,)
    elif field.type is tuple:
        if not all(isinstance(part, str) for part in value):
            raise ValueError("must be a list of texts")
        value = tuple(newer.get(part, part) for part in value)
        parts = value
    else:
        parts = (value,)
    choices = field.metadata.get("choices")
    for part in parts:
        if choices is not None and part not in choices:
            elsewhere = field.metadata.get("elsewhere", {}).get(part)
            raise ValueError(elsewhere or f"must be one of {', '.join(choices)}")
    return value


def number(field, value):
    """The value of a flag that is a number, within its limits."""
    whole = field.type is int
    try:
        value = field.type(value)
    except (ValueError, OverflowError):
        raise ValueError("must be a whole number" if whole else "must be a number") from None
    if whole and abs(value) > 2 ** 63:
        raise ValueError("must be below 2^63")
    if not whole and not math.isfinite(value):
        raise ValueError("must be finite")
    if not whole and abs(value) > LARGEST:
        raise ValueError(f"is more than a machine holds; at most {LARGEST:g}")
    for limit, holds in LIMITS.items():
        bound = field.metadata.get(limit)
        if bound is not None and not holds(value, bound):
            raise ValueError(f"must be {limit.replace('_', ' ')} {bound}")
    return value


def flag_names(cls):
    """Every name of every flag in snake case -> (its field, the text it stands for or None)."""
    names = {}
    for field in dataclasses.fields(cls):
        meta = field.metadata
        for name in (field.name, *meta.get("aliases", ())):
            names[name] = (field, None)
        for name, text in meta.get("shortcuts", {}).items():
            names[name] = (field, text)
        if field.type is bool or "bare" in meta and "choices" in meta:
            names["no_" + field.name] = (field, "off")
    return names


def suggestion(name, names, others=()):
    """A hint for an unknown name: the command it belongs to, or the nearest name. others: command
    -> its flags.
    """
    for other, cls in dict(others).items():
        if name in flag_names(cls):
            return f" (it belongs to {other})"
    near = get_close_matches(name, names, 1)
    if not near:
        return ""
    return f", did you mean --{near[0]}?"


def take(words, accept=None):
    """The next of the words, unless it is a flag or none of accept; None then."""
    if not words or re.match("--[A-Za-z]|-h$", words[0]):
        return None
    if accept is not None and words[0].lower() not in accept:
        return None
    return words.popleft()


def read_flags(cls, argv, prog, commands=()):
    """argv -> ({field: value}, [all that is wrong with it], {unreadable fields}). Only the names of
    flags are normalised. commands: {name: class}, where an unknown flag may belong.
    """
    names = flag_names(cls)
    words = deque(argv)
    positional = None
    for field in dataclasses.fields(cls):
        if field.metadata.get("positional"):
            positional = field
    place = None                                # what was typed without the positional's name
    typed, problems, unreadable = {}, [], set()

    while words:
        word = words.popleft()
        if word in ("-h", "--help", "--help_all", "--help-all"):
            print(help_text(cls, prog, everything="all" in word))
            raise SystemExit(0)

        # words that are no flags
        if word and not word.strip("\\ \r\n"):
            problems.append(
                "a lone \\ is no argument: use a single \\ at the line end, with nothing after it"
            )
            continue
        if not word.startswith("-") and positional and place is None:
            place = word
            continue
        if not word.startswith("--"):
            problems.append(f"unexpected argument {word!r}")
            continue

        # a flag, --name or --name=text
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in names:
            problems.append(f"unknown flag --{name}{suggestion(name, names, commands)}")
            take(words)                         # most likely its value
            continue
        field, stands_for = names[name]
        try:
            value = flag_value(field, stands_for, text if equals else None, words)
        except ValueError as error:
            problems.append(f"--{name} {error}")
            unreadable.add(field.name)
            continue
        if field.metadata.get("many") == "repeat":
            value = typed.get(field.name, ()) + value
        typed[field.name] = value

    if place is not None and typed.setdefault(positional.name, place) != place:
        problems.append(
            f"{place} and --{positional.name} {typed[positional.name]} differ: give only one of "
            "them"
        )
    return typed, problems, unreadable


def flag_value(field, stands_for, text, words):
    """The value of one flag; text is what followed its "=", words are those after it."""
    many = field.metadata.get("many")
    bare = field.metadata.get("bare")
    choices = field.metadata.get("choices")
    if stands_for:                              # --no_x, --cpu
        if text is not None or take(words, WORDS):
            raise ValueError("takes no value")
        text = stands_for
    elif text is None and bare:
        text = take(words, switch_words(field)) or bare
    elif text is None:
        text = take(words)
    if text is None:
        raise ValueError("needs a value")

    parts = [text]
    if many == "several":
        more = take(words)
        while more is not None:
            parts.append(more)
            more = take(words)
    if many and choices:
        parts = [part for text in parts for part in split_list(text)]
    try:
        return convert(field, parts if many else text)
    except ValueError as error:
        raise ValueError(f"{' '.join(parts)}: {error}") from None


def switch_words(field):
    """The words that can be the value of a flag which also stands alone; None: any word."""
    choices = field.metadata.get("choices")
    if not choices and field.type is not bool:
        return None
    accept = {*WORDS, *(choices or ())}
    if field.default is None:
        accept.add("none")
    return accept


def split_list(text):
    """"A, B" -> ["A", "B"]."""
    return [part.strip() for part in text.split(",")]


# --------------------------------------------------------------------------------------------------
# saved settings

def checked(cls, saved, where):
    """Values for fields of cls from JSON, flat or as the "args" of a run. Unknown keys and wrong
    types die.
    """
    if isinstance(saved.get("args"), dict):
        saved = saved["args"]
    fields = cls.__dataclass_fields__
    values, problems = {}, []
    for name, value in saved.items():
        if name not in fields:
            problems.append(f"unknown setting {name}{suggestion(name, fields).replace('--', '')}")
            continue
        field = fields[name]
        if value is None and field.default is None:
            values[name] = None
            continue
        kinds = {float: (float, int), tuple: (list, tuple)}.get(field.type, (field.type,))
        try:
            if type(value) not in kinds:
                raise ValueError(f"must be of type {field.type.__name__}")
            values[name] = convert(field, value)
        except ValueError as error:
            problems.append(f"{name} {value}: {error}")
    if problems:
        raise UserError(f"{where}:\n  " + "\n  ".join(problems))
    return values


def defaults_of_later(cls):
    """{field: default} of the flags that came after the first saved settings."""
    fields = dataclasses.fields(cls)
    return {field.name: field.default for field in fields if field.metadata.get("later")}


def to_dict(args, cls=None):
    """The "args" section of a run's config.json: every flag of cls (none: of the arguments' own
    command).
    """
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(cls or args)}


def problems_of(args):
    """Everything wrong with the relations between flags, in sentences that name the flags and the
    numbers.
    """
    found = []
    for group in type(args).__mro__:
        if "problems" in vars(group):
            found += group.problems(args)
    return found


# --------------------------------------------------------------------------------------------------
# showing

def show(value):
    """A flag's value in words."""
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


class Description(NamedTuple):
    """One flag, as --help and the tables of the docs show it."""
    group: str
    names: list         # with their dashes
    kind: str           # what can be its value
    default: str
    help: str
    rare: bool


def describe(cls):
    """The Description of every flag of a command: the one source of --help and of the tables."""
    for field in dataclasses.fields(cls):
        meta = field.metadata
        names = (field.name, *meta.get("aliases", ()), *meta.get("shortcuts", ()))
        kind = {str: "text", tuple: "texts", bool: ""}.get(field.type, field.type.__name__)
        yield Description(
            group=owner_of(cls, field.name).__doc__,
            names=[f"--{name}" for name in names],
            kind="|".join(meta.get("choices", ())) or kind,
            default=show(field.default),
            help=meta["help"],
            rare=bool(meta.get("rare")),
        )


def owner_of(cls, name):
    """The class that declares a field first: its docstring is the name of the field's group."""
    for group in reversed(cls.__mro__):
        if name in vars(group).get("__annotations__", ()):
            return group


def wrapped(text, indent, first=None):
    """The text as lines of at most WIDTH columns; `first` stands in the place of the first line's
    indent.
    """
    if first is None:
        first = " " * indent
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def flag_help(flag):
    """One flag as lines of --help."""
    head = f"  {', '.join(flag.names)} {flag.kind}".rstrip()
    meaning = f"{flag.help} [{flag.default}]"
    if len(head) < COLUMN:
        return wrapped(meaning, COLUMN, f"{head:{COLUMN}}")
    if len(head) <= WIDTH:
        heads = [head]
    else:
        heads = wrapped(head.strip().replace("|", " | "), 6, "  ")
    return [*heads, *wrapped(meaning, COLUMN)]


def help_text(cls, prog, everything=True):
    """Usage, examples, then the flags by group: those that cls.first names, the others as declared,
    "Everywhere" last.
    """
    has_place = any(field.metadata.get("positional") for field in dataclasses.fields(cls))
    place = "[CHECKPOINT] " if has_place else ""
    lines = [f"usage: python -m {prog} {place}[--flag value] ...", "", "Examples"]
    for command, what in getattr(cls, "examples", ()):
        lines += [*wrapped(what, 2, "  # "), f"  {command}"]

    groups = {}
    for described in describe(cls):
        if everything or not described.rare:
            groups.setdefault(described.group, []).extend(flag_help(described))
    first = [name for name in getattr(cls, "first", ()) if name in groups]
    last = [name for name in groups if name == "Everywhere"]
    rest = [name for name in groups if name not in first + last]
    for name in first + rest + last:
        lines += ["", name, *groups[name]]

    rule = "--a_b and --a-b are one flag; a switch --x is turned off by --no_x."
    lines += ["", *wrapped(rule, 0)]
    if not everything:
        lines.append(f"More flags: python -m {prog} --help_all")
    return "\n".join(lines)


def table(cls):
    """The flags of a command as a markdown table, for the docs."""
    lines = ["| Flag | Value | Default | Meaning |", "|---|---|---|---|"]
    for described in describe(cls):
        names = ", ".join(f"`{name}`" for name in described.names)
        kind = described.kind.replace("|", ", ")
        lines.append(f"| {names} | {kind} | {described.default} | {described.help} |")
    return "\n".join(lines)
