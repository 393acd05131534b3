"""From a command line to a command's arguments, and from a checkpoint's saved arguments to those of
a resume.

    args, origins = parse(TrainArgs, argv, "train")   # how every entry point starts
    announce(args, origins)                           # what is not a default, and why;
        --print_config ends here
    run(main)                                         # how it is called

Precedence: default < tier < preset or profile < --config FILE.json < flag. No torch: --help has to
be instant.
"""
import dataclasses
import re
import sys
from pathlib import Path

from common.console import UserError, be_quiet, commit_hash, printable, run, say
from common.files import ROOT, read_json
from common.flags import checked, problems_of, read_flags, show
from config import (
    ADDED,
    COMMANDS,
    PRESETS,
    RATES,
    SAMPLE_PROFILES,
    TRAIN_PROFILES,
    VERSION,
    SampleArgs,
    TrainArgs,
)
from model_config import count_params, match_d_ff, model_config

DERIVED = ": that of "       # in the origin of a rate that comes with the optimizer


def answer_help(cls, prog):
    """For a command with slow imports, called before them: print help or version and leave, if that
    was asked for.
    """
    if {"-h", "--help", "--help_all", "--help-all", "--version"} & set(sys.argv[1:]):
        run(lambda argv: parse(cls, argv, prog))


def version():
    """The name and version of this program, with the commit where the code lies in git."""
    commit = commit_hash(ROOT)
    return f"Aria {VERSION}" + ("" if commit.startswith("unknown") else f" (commit {commit})")


def preset_of_settings_file(path):
    """The older guide keeps a preset in config/micro_config.py: that name -> micro; any other name
    -> None.
    """
    found = re.fullmatch(r"(?:.*[/\\])?(\w+)_config\.py", path or "")
    return found[1] if found and found[1] in PRESETS else None


def parse(cls, argv, prog, pinned=None, tier=None):
    """argv (None: the process's own) -> (arguments, origins: field -> where its value comes from).

    pinned: {field: value} that this command stands for; contradicting it is an error (the old
    command names). tier: settings just above the defaults, or a function from the typed flags to
    them, called only if they are sound.
    """
    typed, problems, bad = read_flags(cls, sys.argv[1:] if argv is None else argv, prog, COMMANDS)
    if typed.get("version"):
        print(version())
        raise SystemExit(0)
    path, file = typed.get("config"), {}
    named = preset_of_settings_file(path)
    if named:
        print(
            f"notice: --config {path}: that file's name stands for --preset {named}, and what "
            "stands in it is not read: "
            f"its settings are flags here, such as --lr and --max_steps",
            file=sys.stderr,
        )
        path = named
    if path in PRESETS:
        if typed.setdefault("preset", path) != path:
            problems.append(
                f"--config {path} and --preset {typed['preset']} differ: give only one of them"
            )
        del typed["config"]
    elif path and not path.endswith(".json"):
        problems.append(f"--config {path}: neither a preset ({', '.join(PRESETS)}) nor a FILE.json")
    elif path:
        saved = read_json(path)
        # a whole run's
        older = ADDED if isinstance(saved.get("args"), dict) and cls is TrainArgs else {}
        saved = older | checked(cls, saved, path)
        file = {
            name: v
            for name, v in saved.items()
            if cls.__dataclass_fields__[name].metadata["resume"] != "ignore"
        }
    if callable(tier):
        tier = {} if problems else tier(typed)
    preset, profile = typed.get("preset", "none"), typed.get("edge_profile", "none")
    profiles = SAMPLE_PROFILES if cls is SampleArgs else TRAIN_PROFILES
    values, origins, rate_of = (
        {},
        {f.name: "default" for f in dataclasses.fields(cls)},
        TrainArgs.optimizer,
    )
    for origin, layer in (
        ("tier", tier or {}),
        (f"preset {preset}", PRESETS[preset]),
        (f"profile {profile}", profiles[profile]),
        (f"config {path}", file),
        ("flag", typed),
    ):
        values |= layer
        origins |= dict.fromkeys(layer, origin)
        rate_of = values.get("optimizer", TrainArgs.optimizer) if "lr" in layer else rate_of
    for name, value in (pinned or {}).items():
        if values.get(name, value) != value:
            problems.append(
                f"--{name} {values[name]} contradicts this command, which means --{name} {value}: "
                f"use python -m {prog} --{name} {values[name]}"
            )
        values[name], origins[name] = value, "command"
    if values.get("fsdp") and origins["optimizer"] == "default":
        values["optimizer"], origins["optimizer"] = "adamw", "as --fsdp cuts matrices up"
    # that of another one
    if "lr" in origins and origins["lr"] != "flag" and values.get("optimizer", rate_of) != rate_of:
        values["lr"] = RATES[values["optimizer"]]
        origins["lr"] = f"{origins['optimizer']}{DERIVED}{values['optimizer']}"
    args = cls(**values)
    # a relation is judged only if each of its flags could be read
    problems += [p for p in problems_of(args) if not bad & set(re.findall(r"--(\w+)", p))]
    if problems:
        raise UserError("\n  ".join(problems) + f"\nall flags: python -m {prog} --help_all")
    if preset != "none" and origins["d_ff"] == f"preset {preset}" and args.model == "primary":
        shape = model_config(args, vocab_size=1)  # the vocabulary is the same on both sides
        args.d_ff = match_d_ff(shape, count_params(dataclasses.replace(shape, model="backup")))
    be_quiet(args.quiet)
    return args, origins


def changed(args, origins):
    """What the user asked for, and what followed from it, in one line; what a preset or a file
    holds is not repeated.
    """
    pairs, silent = [], ("default", "command", "checkpoint", "tier", "one-shot")
    for name, why in origins.items():
        if why in silent or why.startswith(("preset ", "profile ", "config ")):
            continue
        value = "".join(c if c.isprintable() else "\ufffd" for c in show(getattr(args, name)))
        value = value if len(value) <= 60 else value[:57] + "..."
        pairs.append(f"{name}={value}" + (f" ({why})" if why != "flag" else ""))
    if "checkpoint" in origins.values():
        pairs.append("the rest as in the checkpoint")
    return ", ".join(pairs) or "all defaults"


def announce(args, origins, vocab_size=None):
    """What the user has set, on stderr. With --print_config everything on stdout, and the program
    ends.
    """
    if not args.print_config:
        say(f"settings: {changed(args, origins)} (all of them: --print_config)")
        return
    for name, origin in origins.items():
        print(printable(f"{name:20} {show(getattr(args, name)):24} {origin}"))
    if isinstance(args, TrainArgs):
        meta = Path(args.data_dir, "meta.json")
        vocab_size = vocab_size or (read_json(meta).get("vocab_size") if meta.exists() else None)
        c = model_config(args, vocab_size or 0)
        more = (
            f"with {vocab_size} pieces"
            if vocab_size
            else f"+ {c.d_model} per piece, as there is no {meta} yet"
        )
        print(f"{'parameters':20} {count_params(c):,} {more}")
    raise SystemExit(0)


def resume_check(saved, args, origins):
    """(args of the checkpoint's config.json, arguments now, their origins) -> (arguments to use,
    changes to log).

    The checkpoint gives every value that was not typed now. A "must" flag that was typed, or comes
    from another preset than the run's own, and differs is a UserError; "may" flags that differ are
    the changes. origins follows.
    """
    old = ADDED | checked(TrainArgs, saved, "the checkpoint's config.json")
    rules = {f.name: f.metadata["resume"] for f in dataclasses.fields(TrainArgs)}
    if missing := set(rules) - set(old):
        raise UserError(
            f"the checkpoint's config.json lacks {', '.join(sorted(missing))}: another version "
            "wrote it"
        )
    kept, changes, problems = {}, [], []
    sets = ("preset", "edge_profile")
    if all(origins[name] == "default" for name in sets):
        kept = {name: old[name] for name in sets}  # so that the next resume still knows
    binding = set()  # what another preset than the run's own insists on
    if any(kept.get(name, getattr(args, name)) != old[name] for name in sets):
        binding = {
            key for table in (PRESETS, TRAIN_PROFILES) for diff in table.values() for key in diff
        }
    for name, rule in rules.items():
        was, now, origin = old[name], getattr(args, name), origins[name]
        typed = origin.startswith(("flag", "config", "command"))
        if DERIVED in origin:  # a rate that nobody typed follows another optimizer only
            typed = args.optimizer != old["optimizer"]
        if rule == "ignore" or was == now:
            continue
        if not typed and not (rule == "must" and name in binding and origin != "tier"):
            kept[name], origins[name] = was, "checkpoint"
        elif rule == "must" and not (name == "optimizer" and args.reset_optimizer):
            problems.append(f"--{name} {now} ({origin}), but the checkpoint has {was}")
        else:
            changes.append(f"{name}: {was} -> {now}")
    args = dataclasses.replace(args, **kept)
    if problems := problems or problems_of(args):
        raise UserError("cannot resume:\n  " + "\n  ".join(problems))
    return args, changes
