"""What run_experiments.py will run: the variants of a matrix or a study, at matched sizes, for
every seed; and their commands.

    runs = make_plan(args, origins, root)            # [Run], seed by seed
    terms(run.args), scoring(args, run)              # what makes a run, and its score, the ones
        that they are

Used by run_experiments.py and benchmarks/eco_variants.py; nothing here runs anything.
"""
import dataclasses
import itertools
import math
import shlex
from pathlib import Path
from typing import NamedTuple

import config
import model_config
from common.console import UserError, say
from common.files import read_json
from common.flags import problems_of
from config import TrainArgs
from studies import STUDIES

ROUNDS = 3            # of --halving at most: an eighth, a quarter, half
# they change nothing of what is learned; the text is known by its hash, and train itself moves to
# the starter corpus
LOOSE = {
    "data_dir",
    "block_size",
    "sample_steps",
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
        c = model_config.model_config(self.args, vocabulary(self.args.data_dir))
        return self.counted or {
            "params": model_config.count_params(c),
            "params_blocks": model_config.block_params(c),
            "flops_per_token": flops(c, self.args),
        }


def variants(args):
    """name -> the settings that make it; with --only the first, which is the reference, and those.
    """
    found = STUDIES[args.study].variants if args.study else {
        f"{m}_{t}_{k}": dict(model=m, time_mode=t, masking_strategy=k) for m, t, k in
        itertools.product(args.architectures, args.time_modes, args.masking_strategies)}
    if unknown := [name for name in args.only if name not in found]:
        raise UserError(f"--only {unknown[0]}: there are {', '.join(found)}")
    first = next(iter(found))
    return {
        name: diff
        for name, diff in found.items()
        if not args.only or name == first or name in args.only
    }


def asked(a):
    """The mean share of tokens that are hidden in training."""
    mean = {"linear": 1 / 2, "cosine": 2 / math.pi}[a.mask_schedule]
    return 1.0 if a.causal else a.min_mask_rate + mean * (a.most_hidden - a.min_mask_rate)


def vocabulary(data_dir):
    meta = Path(data_dir, "meta.json")
    return read_json(meta).get("vocab_size", 0) if meta.exists() else 0


def flops(c, a):
    return model_config.flops_per_token(c, a.seq_len, a.rule_shares, asked(a))


def settings(args):
    """variant -> its TrainArgs, the size matched to that of the first."""
    base = TrainArgs(**{f.name: getattr(args, f.name) for f in dataclasses.fields(TrainArgs)})
    # their values are in it
    base = dataclasses.replace(base, preset="none", edge_profile="none", config=None)
    found, problems, vocab = {}, [], vocabulary(base.data_dir)
    for name, diff in variants(args).items():
        a = found[name] = dataclasses.replace(base, **diff)
        problems += [f"{name}: {p}" for p in problems_of(a)]
        if args.match == "tokens" or problems:
            continue
        first = next(iter(found.values()))
        cost = model_config.block_params if args.match != "flops" else lambda c, a=a: flops(c, a)
        goal = flops(model_config.model_config(first, vocab), first) if args.match == "flops" else \
            model_config.block_params(model_config.model_config(first, vocab))
        shape = model_config.model_config(a, vocab)
        if cost(shape) != goal:
            a.d_ff = model_config.match_d_ff(shape, goal, cost)
            if abs(gap := cost(model_config.model_config(a, vocab)) / goal - 1) > 0.01:
                say(
                    f"notice: {name} has {gap:+.1%} of the {args.match} of {next(iter(found))}, "
                    f"even with --d_ff {a.d_ff}"
                )
    if problems:
        raise UserError("\n  ".join(problems))
    return found


def seeds_of(args, origins):
    given = args.seeds or (
        STUDIES[args.study].seeds
        if args.study and origins["seed"] == "default"
        else (str(args.seed),)
    )
    return list(dict.fromkeys(map(int, given)))


def make_plan(args, origins, root):
    """-> [Run], seed by seed, so that what has run so far can be compared."""
    seeds, found = seeds_of(args, origins), settings(args)
    if args.halving:
        unit = args.max_steps >> rounds(len(found))
        if not unit:
            raise UserError(
                f"--halving of {len(found)} variants needs more than --max_steps {args.max_steps}"
            )
        for a in found.values():
            a.eval_interval = unit
    return [
        Run(name, variant, dataclasses.replace(a, seed=seed, output_dir=str(root / name)))
        for seed in seeds
        for variant, a in found.items()
        for name in [variant + f"_s{seed}" * (seed != TrainArgs.seed)]
    ]


def rounds(count):
    return min(ROUNDS, math.ceil(math.log2(count))) if count > 1 else 0


def flags(a):
    """TrainArgs as the flags that make them: what differs from the defaults, presets resolved."""
    words = []
    for f in dataclasses.fields(TrainArgs):
        value = getattr(a, f.name)
        # the default of lr is that of the optimizer
        own_default = value == f.default and f.name != "lr"
        if f.name in ("resume_latest", "quiet") or own_default:
            continue
        words += ([f"--{f.name}" if value else f"--no_{f.name}"] if f.type is bool else
                  [f"--{f.name}", *map(str, value if f.type is tuple else [value])])
    return [*words, "--resume_latest"]


def terms(a):
    """What makes a run the one that it is: every flag that changes what is learned, with what -1
    and a default mean today.
    """
    kept = {f.name: getattr(a, f.name) for f in dataclasses.fields(TrainArgs)
            if f.metadata["resume"] != "ignore" and f.name not in LOOSE}
    return kept | dict(ar_fade=a.fade, max_mask_rate=a.most_hidden, warmup_steps=a.warmup)


def unlike(found, a):
    """Saved terms, perhaps of an older version, against what is asked for -> {flag: what was saved}
    of those that differ.
    """
    old = {
        f.name: config.ADDED.get(f.name, f.default) for f in dataclasses.fields(TrainArgs)
    } | found
    return {name: old[name] for name, value in terms(a).items() if old[name] != value}


def trained(saved):
    """The terms of a run from the args that its train.jsonl has."""
    known = {f.name for f in dataclasses.fields(TrainArgs)}
    return terms(
        TrainArgs(
            **{name: value for name, value in (config.ADDED | saved).items() if name in known}
        )
    )


def scoring(args, run):
    """How a trained run is scored: by its base's block rules, unless it learned single tokens
    alone.
    """
    rules = "1" if set(run.args.block_choices) == {1} else args.train_block_sizes
    return {
        "blocks": rules,
        "batches": args.batches,
        "draws": args.draws,
        "chain_docs": args.chain_docs,
    }


def as_json(args, runs, step_ms):
    entries = []
    for run in runs:
        entries.append(
            {
                "name": run.name,
                "variant": run.variant,
                "seed": run.args.seed,
                "module": "train",
                "via": run.via,
                "args": flags(run.args),
                **run.sizes,
            }
        )
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
    first, vocab = runs[0], vocabulary(runs[0].args.data_dir)
    tokens = (
        first.args.max_steps * first.args.batch_size * first.args.grad_accum * first.args.seq_len
    )
    print(
        f"{len(runs)} runs of {first.args.max_steps} steps, {tokens / 1e6:.1f}M tokens each; "
        f"matched: {args.match}; plan: "
        f"{root / 'experiment_plan.json'}{'' if vocab else '; no prepared text yet, so parameters are without embedding'}"
    )
    for run in {run.variant: run for run in runs}.values():
        print(
            f"  {run.variant:28} {run.args.model}, d_ff {run.args.d_ff}, {run.sizes['params']:,} "
            "parameters, "
            f"{run.sizes['flops_per_token'] / 1e6:.1f} MFLOP/token"
        )
    for run in runs:
        print(shlex.join(["python", *(run.via or ("-m",)), "train", *flags(run.args)]))
