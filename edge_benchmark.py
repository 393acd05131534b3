"""How fast is each decode mode, and what does the speed cost: full, block and block_frozen on the
same prompts.

    python -m edge_benchmark --ckpt checkpoints/eco_hybrid_hi --runs_per_prompt 3
    python -m edge_benchmark --ckpt checkpoints/eco_hybrid_hi --modes block_frozen \\
        --grid steps=4,8,16,32 precision=fp32,bf16,int8
    python -m edge_benchmark --ckpt checkpoints/eco_hybrid_hi --profiles balanced max

--profiles measures what sample's profiles cost and give here. --grid takes every combination of the
named settings of sample, in every mode, and draws quality against speed. One line per variant for
people; the last line on stdout, and benchmarks/edge_benchmark.json, hold everything. Notable:
* the timed runs of all modes alternate, so that a slow minute of the machine hits each of them
  alike;
* a run is timed from the prompt's text to the new ids; only new tokens before EOS count;
* quality stands beside speed: nll_per_token is the checkpoint's own exact -log p of what the mode
  wrote, left to right by its clean stream in one pass, whatever the mode (a checkpoint without
  blocks scores each token as a mask with all behind it hidden). judge is -log p under an n-gram
  model of the training text, which no network can flatter. A low value is no proof of good text, as
  repetition scores well too: read both together with distinct_2 and repeat_rate;
* held_out is the held-out bound of the same weights in the same precision under the mode's block
  rule (in blocks of one token the exact -log p), so what int8 costs stands beside what it gives;
  cpu_s_per_token, processor seconds, stands in for energy;
* peak_rss_mb is taken in an extra untimed run per mode, after memory that is only kept was given
  back.
"""
import dataclasses
import itertools
import sys
from pathlib import Path

import cli
import config
import model_config
from common.console import UserError, say
from common.files import can_write, json_text, write_json
from common.flags import convert, split_list, to_dict
from evaluation import plots
from sampling import settings

CAREFUL = " at one token a forward"
LIMIT = 0.05              # of judged quality, that a profile may cost


def show(value, form):
    return "-" if value is None else format(value, form)


def card(name, r, width):
    if "skipped" in r:
        return f"{name:{width}} skipped: {r['skipped']}"
    return (
        f"{name:{width}} {r['mean_tok_s']:8.1f} tok/s | p50 {r['p50_latency_s']:.3f} s | p90 "
        f"{r['p90_latency_s']:.3f} s | "
        f"{r['mean_generated_tokens']:.1f} tokens | {r['tokens_per_forward']:.2f} per forward | "
        f"{r['peak_rss_mb']:.0f} MB | "
        f"judge {show(r['judge_nats'], '.3f')} | nll {show(r['nll_per_token'], '.3f')} | held out "
        f"{show(r['held_out_nats'], '.4f')} | distinct_2 {show(r['distinct_2'], '.3f')} | repeat "
        f"{r['repeat_rate']:.1%} | "
        f"as full {r['agree_with_full']:.0%}"
    )


def combinations(grid):
    """--grid steps=4,8 sampler=random -> {"steps=4 sampler=random": {"steps": 4, "sampler":
    "random"}, ...}
    """
    fields = {f.name: f for f in dataclasses.fields(config.GenerateFlags)}
    axes = []
    for axis in grid:
        name, _, values = axis.partition("=")
        if name not in fields or not values:
            raise UserError(
                f"--grid {axis}: write NAME=VALUE,VALUE with a setting of sample such as steps, "
                "sampler, threshold, "
                "block_size, precision, min_decode_layers"
            )
        try:
            axes.append([(name, convert(fields[name], value)) for value in split_list(values)])
        except ValueError as error:
            raise UserError(f"--grid {axis}: {error}") from None
    found = [dict(pairs) for pairs in itertools.product(*axes)]
    return {" ".join(f"{k}={v}" for k, v in chosen.items()): chosen for chosen in found}


def profiles(names):
    """Each profile of sample, and beside it the slow and careful way: one token a forward, all
    layers, no 8-bit products.
    """
    known, found = {f.name for f in dataclasses.fields(config.GenerateFlags)}, {}
    for name in names:
        found[name] = {k: v for k, v in config.SAMPLE_PROFILES[name].items() if k in known}
        found[name + CAREFUL] = found[name] | dict(
            sampler="confidence", steps=config.SURE["steps"], min_decode_layers=0, precision="auto"
        )
    return found


def price(name, results):
    """What a profile costs and gives, against the careful way -> its figures, told on stderr."""
    fast, slow = (
        next(r for key, r in results.items() if key.endswith(end))
        for end in (" " + name, " " + name + CAREFUL)
    )
    # no judge, or a text that ended at once
    if "skipped" in fast or None in (fast["judge_nats"], slow["judge_nats"]):
        return None
    found = {
        "judged": fast["judge_nats"] / slow["judge_nats"] - 1,
        "faster": fast["mean_tok_s"] / slow["mean_tok_s"],
    }
    say(
        f"profile {name}: {found['judged']:+.1%} judged nats/token (limit +{LIMIT:.0%}), repeated "
        "4-grams "
        f"{fast['repeat_rate']:.1%} against {slow['repeat_rate']:.1%}, "
        f"{fast['tokens_per_forward']:.2f} tokens per forward, "
        f"{found['faster']:.2f}x as fast: "
        + ("justified" if found["judged"] <= LIMIT else "NOT justified for this checkpoint")
    )
    return found


def lines_of(results):
    """{"block_frozen sampler=margin steps=4": figures} -> (axis, {"block_frozen margin": [(value,
    tokens/s, nats)]}).

    A line joins what differs in one setting only: of the settings that are numbers, the one with
    the most values.
    """
    found = []
    for name, r in results.items():
        if r.get("judge_nats") is not None:
            mode, *pairs = name.split(" ")
            found.append(
                (mode, dict(pair.split("=", 1) for pair in pairs), r["mean_tok_s"], r["judge_nats"])
            )
    values = {}
    for _, chosen, _, _ in found:
        for key, value in chosen.items():
            values.setdefault(key, set()).add(value)
    numbers = [
        key for key, several in values.items() if len(several) > 1 and all(map(is_number, several))
    ]
    axis = max(numbers, key=lambda key: len(values[key]), default=None)
    modes, lines = {mode for mode, *_ in found}, {}
    for mode, chosen, speed, nats in found:
        words = [mode] if len(modes) > 1 else []
        for key, value in chosen.items():
            if key != axis and len(values[key]) > 1:
                words.append(f"{key} {value}" if is_number(value) else value)
        lines.setdefault(" ".join(words) or mode, []).append((chosen.get(axis), speed, nats))
    for points in lines.values():
        points.sort(key=lambda point: float(point[0] or 0))
    return axis, lines


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def main(argv=None):
    args, origins = cli.parse(config.BenchArgs, argv, "edge_benchmark")
    cli.announce(args, origins)
    if args.profiles:
        chosen = profiles(args.profiles)
        args.modes = ("block_frozen",)
    else:
        chosen = combinations(args.grid)

    # these import torch, which --help and a usage error do not wait for
    from common import machine
    from evaluation.decode_modes import Judges, add_quality, load_models, measure

    allocator = machine.start(args.threads)
    can_write(args, "out_json")
    device = machine.pick_device(args.device)
    prompts = list(config.BENCH_PROMPTS)
    if args.prompt or args.prompts_file:
        prompts = settings.read_prompts(args)
    args.sampler = settings.masked_sampler(args.sampler)

    # A model for each precision, and what is compared
    models, of_wanted, weights, tokenizer, saved = load_models(args, chosen, device)
    cfg = next(reversed(models.values())).cfg
    causal = cfg.causal
    if causal:
        print(
            "notice: an autoregressive checkpoint has one mode, left to right over its cache: "
            "block_frozen",
            file=sys.stderr,
        )
        args.modes = ("block_frozen",)
    why_not_frozen = settings.cannot_freeze(saved)
    variants, results, idle = variants_of(
        args, origins, chosen, models, of_wanted, tokenizer, saved, why_not_frozen
    )
    if not causal:
        for line in idle:
            say(line)

    # The measurements: speed, then quality beside it
    data_dir = args.data_dir or saved.config["args"]["data_dir"]
    judges = Judges(data_dir, tokenizer, saved, device)
    if variants:
        first, first_settings = next(iter(variants.values()))
        reference = (first, dataclasses.replace(first_settings, mode="full"))
        reference = variants.get("full", reference)
        results |= measure(
            tokenizer, prompts, variants, reference, args, not why_not_frozen, device
        )
        add_quality(results, variants, models, judges, tokenizer, prompts)

    # The answer: cards for people, one document, a picture of a grid
    real = judges.real()
    document = {
        "version": 1,
        "model": saved.config["model"]["model"],
        "ckpt": str(saved.path),
        "step": saved.step,
        **machine.environment(device),
        "allocator": allocator,
        "weights_bytes": weights,
        "batch": 1,
        "seed": args.seed,
        "prompts": prompts,
        "params": model_config.count_params(cfg),
        "args": to_dict(args),
        "judge_nats_of_held_out_text": real,
        "results": results,
    }
    width = max(map(len, results))
    for name, figures in results.items():
        print(card(name, figures, width))
    if args.profiles:
        document["profiles"] = {name: price(name, results) for name in args.profiles}
    write_json(args.out_json, document)
    if args.grid:
        axis, lines = lines_of(results)
        picture = Path(args.out_json).with_suffix(".png")
        plots.quality_against_speed(picture, axis, lines, real)
    print(json_text(document))


def variants_of(args, origins, chosen, models, of_wanted, tokenizer, saved, why_not_frozen):
    """Every mode with every choice of settings -> ({name: (TorchModel, Settings)}, {name: why it is
    skipped}, notices about flags that no variant heeds).
    """
    variants = {}
    skipped = {}
    without_effect = []
    for label, pairs in chosen.items():
        if "sampler" in pairs:
            pairs["sampler"] = settings.masked_sampler(pairs["sampler"])
        for mode in dict.fromkeys(args.modes):
            name = f"{mode} {label}".strip()
            if mode == "block_frozen" and why_not_frozen:
                skipped[name] = {"skipped": why_not_frozen}
                continue
            mine = dataclasses.replace(args, **pairs)
            asked = settings.decode_settings(mine, saved, mode, tokenizer.eos_id)
            variants[name] = (models[of_wanted[mine.precision]], asked)
            without_effect.append(set(settings.idle(mine, origins, asked)))
    if not without_effect:
        return variants, skipped, []
    return variants, skipped, sorted(set.intersection(*without_effect))


if __name__ == "__main__":
    cli.run(main)
