"""A command line becomes a command's arguments; a resume takes over those of its checkpoint.

    args, origins = cli.parse(config.TrainArgs, argv, "train")    # how every command starts
    cli.announce(args, origins)         # what is not a default, and why; --print_config ends here
    cli.run(main)                       # how a command is called as a script

Every command uses it. A later layer beats an earlier one: default, hardware tier, preset or
profile, --config FILE.json, flag. No torch here: --help has to be instant.
"""
import dataclasses
import re
import sys
from pathlib import Path

from common.console import UserError, be_quiet, commit_hash, printable, run, say
from common.files import ROOT, read_json
from common.flags import checked, defaults_of_later, problems_of, read_flags, show
from config import (
    COMMANDS,
    PRESETS,
    RATES,
    SAMPLE_PROFILES,
    TRAIN_PROFILES,
    VERSION,
    SampleArgs,
    TrainArgs,
    token_file_pieces,
)
from model_config import ModelFlags, count_params, match_d_ff, model_config

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
    if commit.startswith("unknown"):
        return f"Aria {VERSION}"
    return f"Aria {VERSION} (commit {commit})"


def parse(cls, argv, prog, pinned=None, tier=None):
    """argv (None: the process's own) -> (arguments, origins: field -> where its value comes from).

    pinned: {field: value} that this command stands for; contradicting it is an error (the old
    command names). tier: settings just above the defaults, or a function from the typed flags to
    them, called only if they are sound.
    """
    if argv is None:
        argv = sys.argv[1:]
    typed, problems, unreadable = read_flags(cls, argv, prog, COMMANDS)
    if typed.get("version"):
        print(version())
        raise SystemExit(0)

    # every layer, and the arguments that they give together
    config_path, from_file = read_config(cls, typed, problems)
    if callable(tier):
        tier = {} if problems else tier(typed)
    preset = typed.get("preset", "none")
    profile = typed.get("edge_profile", "none")
    profiles = SAMPLE_PROFILES if cls is SampleArgs else TRAIN_PROFILES
    values, origins, rate_of = stack(
        cls,
        ("tier", tier or {}),
        (f"preset {preset}", PRESETS[preset]),
        (f"profile {profile}", profiles[profile]),
        (f"config {config_path}", from_file),
        ("flag", typed),
    )
    pin(pinned or {}, values, origins, problems, prog)
    follow_optimizer(values, origins, rate_of)
    args = cls(**values)

    # a relation is judged only if each of its flags could be read
    for problem in problems_of(args):
        if not unreadable & set(re.findall(r"--(\w+)", problem)):
            problems.append(problem)
    problems += typed_together(typed, args)
    if problems:
        raise UserError("\n  ".join(problems) + f"\nall flags: python -m {prog} --help_all")
    follow_budget(args, origins)

    if preset != "none" and origins["d_ff"] == f"preset {preset}" and args.model == "primary":
        shape = model_config(args, vocab_size=1)  # the vocabulary is the same on both sides
        args.d_ff = match_d_ff(shape, count_params(dataclasses.replace(shape, model="backup")))
    be_quiet(args.quiet)
    return args, origins


def read_config(cls, typed, problems):
    """--config: a preset's name goes to typed["preset"]; a FILE.json is read -> (what was named,
    {field: value} of the file). What is wrong is added to problems.
    """
    path = typed.get("config")
    if not path:
        return path, {}
    named = preset_of_settings_file(path)
    if named:
        print(
            f"notice: --config {path}: that file's name stands for --preset {named}, and what "
            "stands in it is not read: its settings are flags here, such as --lr and --max_steps",
            file=sys.stderr,
        )
        path = named

    if path in PRESETS:
        if typed.setdefault("preset", path) != path:
            problems.append(
                f"--config {path} and --preset {typed['preset']} differ: give only one of them"
            )
        del typed["config"]
        return path, {}
    if not path.endswith(".json"):
        problems.append(f"--config {path}: neither a preset ({', '.join(PRESETS)}) nor a FILE.json")
        return path, {}

    saved = read_json(path)
    values = {}
    for name, value in checked(cls, saved, path).items():
        if cls.__dataclass_fields__[name].metadata["resume"] != "ignore":
            values[name] = value
    return path, values


def preset_of_settings_file(path):
    """The older guide keeps a preset in config/micro_config.py: that name -> micro; any other name
    -> None.
    """
    found = re.fullmatch(r"(?:.*[/\\])?(\w+)_config\.py", path)
    return found[1] if found and found[1] in PRESETS else None


def stack(cls, *layers):
    """Layers (origin, {field: value}), each over the ones before -> (values, origins of all fields
    of cls, the optimizer that the layers had when the last one brought a rate).
    """
    values = {}
    origins = {field.name: "default" for field in dataclasses.fields(cls)}
    rate_of = TrainArgs.optimizer
    for origin, layer in layers:
        values |= layer
        origins |= dict.fromkeys(layer, origin)
        if "lr" in layer:
            rate_of = values.get("optimizer", TrainArgs.optimizer)
    return values, origins, rate_of


def pin(pinned, values, origins, problems, prog):
    """Set what a command stands for; who typed something else is told the command for that."""
    for name, value in pinned.items():
        if values.get(name, value) != value:
            problems.append(
                f"--{name} {values[name]} contradicts this command, which means --{name} {value}: "
                f"use python -m {prog} --{name} {values[name]}"
            )
        values[name] = value
        origins[name] = "command"


def follow_optimizer(values, origins, rate_of):
    """--fsdp brings AdamW, and an optimizer brings its own rate, unless they were typed."""
    if values.get("fsdp") and origins["optimizer"] == "default":
        values["optimizer"] = "adamw"
        origins["optimizer"] = "as --fsdp cuts matrices up"

    optimizer = values.get("optimizer", rate_of)
    if "lr" in origins and origins["lr"] != "flag" and optimizer != rate_of:
        values["lr"] = RATES[optimizer]
        origins["lr"] = f"{origins['optimizer']}{DERIVED}{optimizer}"


def typed_together(typed, args):
    """What was typed together and cannot be; a preset's number of steps gives way to a budget."""
    if {"max_steps", "target_tokens"} <= typed.keys():
        yield (
            f"--max_steps {typed['max_steps']} and --target_tokens {typed['target_tokens']}: give "
            "only one of them"
        )
    most = getattr(args, "max_context", None)
    if "seq_schedule" in typed and most is not None and typed.get("seq_len", 0) > most:
        yield f"--seq_len {typed['seq_len']} is above --max_context {most}: lower it, or raise that"


def follow_budget(args, origins):
    """--target_tokens sets --max_steps, unless a later layer brought a number of steps."""
    if getattr(args, "target_tokens", None) is None:
        return
    if origins["max_steps"] == "flag":
        args.target_tokens = None
        return
    args.solve_steps()
    origins["max_steps"] = "target_tokens"


def changed(args, origins):
    """What the user asked for, and what followed from it, in one line; what a preset or a file
    holds is not repeated.
    """
    pairs = []
    silent = ("default", "command", "checkpoint", "tier", "one-shot")
    for name, origin in origins.items():
        if origin in silent or origin.startswith(("preset ", "profile ", "config ")):
            continue
        pair = f"{name}={shortened(show(getattr(args, name)))}"
        if origin != "flag":
            pair += f" ({origin})"
        pairs.append(pair)
    if "checkpoint" in origins.values():
        pairs.append("the rest as in the checkpoint")
    return ", ".join(pairs) or "all defaults"


def shortened(text, most=60):
    """At most so many characters; one that no terminal prints becomes U+FFFD."""
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    if len(text) > most:
        return text[:most - 3] + "..."
    return text


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
        if not vocab_size and meta.exists():
            vocab_size = read_json(meta).get("vocab_size")
        vocab_size = vocab_size or token_file_pieces(args.data_dir)
        shape = model_config(args, vocab_size or 0)
        if vocab_size:
            more = f"with {vocab_size} pieces"
        else:
            more = f"+ {shape.d_model} per piece, as there is no {meta} yet"
        print(f"{'parameters':20} {count_params(shape):,} {more}")
    raise SystemExit(0)


def resume_check(saved, args, origins):
    """(args of the checkpoint's config.json, arguments now, their origins) -> (arguments to use,
    changes to log).

    The checkpoint gives every value that was not typed now. A "must" flag that was typed, or comes
    from another preset than the run's own, and differs is a UserError; "may" flags that differ are
    the changes. origins follows.
    """
    saved = checked(TrainArgs, saved, "the checkpoint's config.json")
    old = defaults_of_later(TrainArgs) | saved
    rules = {field.name: field.metadata["resume"] for field in dataclasses.fields(TrainArgs)}
    missing = set(rules) - set(old)
    if missing:
        raise UserError(
            f"the checkpoint's config.json lacks {', '.join(sorted(missing))}: another version "
            "wrote it"
        )

    # the preset and the profile of the run are kept, so that the next resume still knows them
    sets = ("preset", "edge_profile")
    kept = {}
    if all(origins[name] == "default" for name in sets):
        kept = {name: old[name] for name in sets}

    # another preset than the run's own insists on its "must" flags
    insisted = set()
    if any(kept.get(name, getattr(args, name)) != old[name] for name in sets):
        for table in (PRESETS, TRAIN_PROFILES):
            for settings in table.values():
                insisted |= settings.keys()

    changes = []
    problems = []
    for name, rule in rules.items():
        was, now, origin = old[name], getattr(args, name), origins[name]
        if rule == "ignore" or was == now:
            continue
        if DERIVED in origin:  # a rate that nobody typed follows another optimizer only
            wanted = args.optimizer != old["optimizer"]
        else:
            wanted = origin.startswith(("flag", "config", "command"))
        if not wanted and not (rule == "must" and name in insisted and origin != "tier"):
            kept[name] = was
            origins[name] = "checkpoint"
        elif rule == "must" and not (name == "optimizer" and args.reset_optimizer):
            problems.append(f"--{name} {now} ({origin}), but the checkpoint has {was}")
        else:
            changes.append(f"{name}: {was} -> {now}")

    args = dataclasses.replace(args, **kept)
    problems = problems or problems_of(args)
    if problems:
        raise UserError("cannot resume:\n  " + "\n  ".join(problems))
    follow_budget_on_resume(args, old, origins, changes)
    return args, changes


def take_shape(saved, args, origins):
    """The first weights of a training bring their shape and the length of their rows: (args of the
    checkpoint's config.json, arguments now, their origins) -> the arguments, with each of these
    flags that nobody set as the checkpoint has it.
    """
    old = defaults_of_later(TrainArgs) | checked(TrainArgs, saved, "the checkpoint's config.json")
    kept = {}
    for name in ("seq_len", *(field.name for field in dataclasses.fields(ModelFlags))):
        if origins[name] == "default" and name in old:
            kept[name] = old[name]
            origins[name] = "checkpoint"
    args = dataclasses.replace(args, **kept)
    problems = problems_of(args)
    if problems:
        raise UserError("\n  ".join(problems))
    return args


def follow_budget_on_resume(args, old, origins, changes):
    """A number of steps that is asked for now replaces the checkpoint's budget of tokens; else a
    budget is solved again, as a resume may change the batch.
    """
    asked_now = ("flag", "config")
    steps = origins["max_steps"].startswith(asked_now)
    if args.target_tokens is None:
        return
    if steps and not origins["target_tokens"].startswith(asked_now):
        changes.append(f"target_tokens: {args.target_tokens} -> none")
        args.target_tokens = None
        return
    args.solve_steps()
    if args.max_steps != old["max_steps"]:
        changes.append(f"max_steps: {old['max_steps']} -> {args.max_steps}")
