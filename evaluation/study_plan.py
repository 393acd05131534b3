"""What run_experiments.py will run: the variants of a matrix or a study, at matched sizes, for
every seed; and their commands.

    runs = make_plan(args, origins, root)            # [Run], seed by seed
    terms(run.args)                                  # what makes a run the one that it is,
    scoring(args, run)                               # and what its score

Used by run_experiments.py and benchmarks/eco_variants.py; nothing here runs anything.
"""
import dataclasses
import itertools
import math
import shlex
from functools import partial
from pathlib import Path
from typing import NamedTuple

import model_config
from common.console import UserError, say
from common.files import read_json
from common.flags import defaults_of_later, problems_of
from config import TrainArgs, token_file_pieces
from studies import STUDIES

ROUNDS = 3            # of --halving at most: an eighth, a quarter, half
FIELDS = dataclasses.fields(TrainArgs)
# flags that change nothing of what is learned; the text is known by its hash, and train itself
# moves to the starter corpus
LOOSE = {
    "target_tokens",      # the steps that it makes are compared
    "max_context",
    "data_dir",
    "data_format",
    "vocab_size",
    "block_size",
    "sample_steps",
    "sample_every",
    "sample_prompts",
    "instrument",
    "analysis_every",
    "compile",
    "compile_mode",
    "activation_checkpointing",
    "save_interval",
    "save_minutes",
    "log_interval",
    "eval_interval",
    "keep_last",
    "keep_full",
}


class Run(NamedTuple):
    name: str
    variant: str
    args: TrainArgs
    # words in front of its commands: a script that changes the model before it runs them ...
    via: tuple = ()
    counted: dict | None = None  # ... and what the changed model really has, of sizes

    @property
    def folder(self):
        return self.args.run_dir

    @property
    def log(self):
        return self.folder.with_name(f"{self.name}.log")

    @property
    def sizes(self):
        if self.counted:
            return self.counted
        shape = model_config.model_config(self.args, vocabulary(self.args.data_dir))
        return {
            "params": model_config.count_params(shape),
            "params_blocks": model_config.block_params(shape),
            "flops_per_token": flops(shape, self.args),
        }


# ---- variants and their sizes --------------------------------------------------------------------

def variants(args):
    """name -> the settings that make it; with --only the first, which is the reference, and those.
    """
    if args.study:
        found = STUDIES[args.study].variants
    else:
        found = {}
        matrix = itertools.product(args.architectures, args.time_modes, args.masking_strategies)
        for model, time_mode, strategy in matrix:
            diff = dict(model=model, time_mode=time_mode, masking_strategy=strategy)
            found[f"{model}_{time_mode}_{strategy}"] = diff
    if not args.only:
        return found
    for name in args.only:
        if name not in found:
            raise UserError(f"--only {name}: there are {', '.join(found)}")
    wanted = {next(iter(found)), *args.only}
    return {name: diff for name, diff in found.items() if name in wanted}


def mean_mask_rate(train_args):
    """The mean share of tokens that are hidden in training."""
    if train_args.causal:
        return 1.0
    mean = {"linear": 1 / 2, "cosine": 2 / math.pi}[train_args.mask_schedule]
    lowest = train_args.min_mask_rate
    return lowest + mean * (train_args.max_mask_rate - lowest)


def vocabulary(data_dir):
    """The size of the prepared text's vocabulary; 0 without a prepared text."""
    if Path(data_dir).is_file():
        return token_file_pieces(data_dir)
    meta = Path(data_dir, "meta.json")
    if not meta.exists():
        return 0
    return read_json(meta).get("vocab_size", 0)


def flops(shape, train_args):
    """Of a token, as a mean over those of the run."""
    lengths = train_args.lengths
    planned = lengths.tokens(train_args.max_steps, train_args.rows)
    total = 0
    for begin, end, length in train_args.stages:
        share = (end - begin) * lengths.step_tokens(length, train_args.rows) / planned
        rules = train_args.rule_shares_at(length)
        total += share * model_config.flops_per_token(
            shape, length, rules, mean_mask_rate(train_args)
        )
    return total


def settings(args):
    """variant -> its TrainArgs, the size matched to that of the first."""
    base = TrainArgs(**{field.name: getattr(args, field.name) for field in FIELDS})
    # their values are in it
    base = dataclasses.replace(base, preset="none", edge_profile="none", config=None)
    found = {}
    problems = []
    for name, diff in variants(args).items():
        found[name] = dataclasses.replace(base, **diff)
        problems += [f"{name}: {problem}" for problem in problems_of(found[name])]
        if args.match != "tokens" and not problems:
            match_size(name, found, args.match, vocabulary(base.data_dir))
    if problems:
        raise UserError("\n  ".join(problems))
    return found


def match_size(name, found, match, vocab):
    """Give this variant the d_ff at which it costs what the first one costs."""
    reference = next(iter(found))

    def shape_of(train_args):
        return model_config.model_config(train_args, vocab)

    def cost(train_args, shape):
        if match == "flops":
            return flops(shape, train_args)
        return model_config.block_params(shape)

    goal = cost(found[reference], shape_of(found[reference]))
    own = found[name]
    shape = shape_of(own)
    if cost(own, shape) == goal:
        return
    own.d_ff = model_config.match_d_ff(shape, goal, partial(cost, own))
    gap = cost(own, shape_of(own)) / goal - 1
    if abs(gap) > 0.01:
        say(
            f"notice: {name} has {gap:+.1%} of the {match} of {reference}, even with --d_ff "
            f"{own.d_ff}"
        )


# ---- the runs ------------------------------------------------------------------------------------

def seeds_of(args, origins):
    given = (str(args.seed),)
    if args.seeds:
        given = args.seeds
    elif args.study and origins["seed"] == "default":
        given = STUDIES[args.study].seeds
    return list(dict.fromkeys(map(int, given)))


def make_plan(args, origins, root):
    """-> [Run], seed by seed, so that what has run so far can be compared."""
    found = settings(args)
    if args.halving:
        unit = args.max_steps >> rounds(len(found))
        if not unit:
            raise UserError(
                f"--halving of {len(found)} variants needs more than --max_steps {args.max_steps}"
            )
        for train_args in found.values():
            train_args.eval_interval = unit
    runs = []
    for seed in seeds_of(args, origins):
        for variant, train_args in found.items():
            name = variant if seed == TrainArgs.seed else f"{variant}_s{seed}"
            own = dataclasses.replace(train_args, seed=seed, output_dir=str(root / name))
            runs.append(Run(name, variant, own))
    return runs


def rounds(count):
    """How often --halving halves so many variants."""
    return min(ROUNDS, math.ceil(math.log2(count))) if count > 1 else 0


def flags(train_args):
    """TrainArgs as the flags that make them: what differs from the defaults, presets resolved."""
    words = []
    for field in FIELDS:
        value = getattr(train_args, field.name)
        # the default of lr is that of the optimizer
        own_default = value == field.default and field.name != "lr"
        # a budget has become the number of steps, and both together are refused
        if field.name in ("resume_latest", "quiet", "target_tokens") or own_default:
            continue
        if field.type is bool:
            words.append(f"--{field.name}" if value else f"--no_{field.name}")
        elif field.type is tuple:
            words += [f"--{field.name}", *map(str, value)]
        else:
            words += [f"--{field.name}", str(value)]
    return [*words, "--resume_latest"]


def terms(train_args):
    """What makes a run the one that it is: every flag that changes what is learned, with what -1
    and a default mean today.
    """
    kept = {}
    for field in FIELDS:
        if field.metadata["resume"] != "ignore" and field.name not in LOOSE:
            kept[field.name] = getattr(train_args, field.name)
    kept["warmup_steps"] = train_args.warmup
    return kept


def unlike(found, train_args):
    """Saved terms against what is asked for -> {flag: what was saved} of those that differ; None
    of a flag that the version lacks which saved them; one that came `later` had its default there.
    """
    asked = terms(train_args)
    found = defaults_of_later(TrainArgs) | found
    return {name: found.get(name) for name, value in asked.items() if found.get(name) != value}


def trained(saved):
    """The terms of a run from the args that its train.jsonl has, as far as it has them."""
    known = {field.name for field in FIELDS}
    found = terms(TrainArgs(**{name: saved[name] for name in saved if name in known}))
    return {name: value for name, value in found.items() if name in saved}


def scoring(args, run):
    """How a trained run is scored: by its base's block rules, unless it learned left to right
    alone.
    """
    rules = args.block_rules
    if run.args.block_rules == [1]:
        rules = [1]
    names = ["T" if block == args.longest else str(block) for block in rules]
    return {
        "blocks": ",".join(names),
        "batches": args.batches,
        "draws": args.draws,
        "chain_docs": args.chain_docs,
    }


def as_json(args, runs, step_ms):
    entries = []
    for run in runs:
        entry = {
            "name": run.name,
            "variant": run.variant,
            "seed": run.args.seed,
            "module": "train",
            "via": run.via,
            "args": flags(run.args),
        }
        entries.append(entry | run.sizes)
    return {
        "version": 1,
        "study": args.study,
        "architectures": args.architectures,
        "time_modes": args.time_modes,
        "masking_strategies": args.masking_strategies,
        "seeds": sorted({run.args.seed for run in runs}),
        "match": args.match,
        "step_ms": step_ms,
        "runs": entries,
    }


def tell(args, runs, root):
    """The plan for people, on stdout: shapes, then commands."""
    if args.study:
        study = STUDIES[args.study]
        print(f"study {args.study}: {study.question}\nmeasured: {study.measure}")
    first = runs[0].args
    tokens = first.lengths.tokens(first.max_steps, first.rows)
    without = ""
    if not vocabulary(first.data_dir):
        without = "; no prepared text yet, so parameters are without embedding"
    print(
        f"{len(runs)} runs of {first.max_steps} steps, {tokens / 1e6:.1f}M tokens each; "
        f"matched: {args.match}; plan: {root / 'experiment_plan.json'}{without}"
    )
    for run in {run.variant: run for run in runs}.values():
        print(
            f"  {run.variant:28} {run.args.model}, d_ff {run.args.d_ff}, {run.sizes['params']:,} "
            f"parameters, {run.sizes['flops_per_token'] / 1e6:.1f} MFLOP/token"
        )
    for run in runs:
        print(shlex.join(["python", *(run.via or ("-m",)), "train", *flags(run.args)]))
