"""How fast is each decode mode, and what does the speed cost: full, block and block_frozen on the
same prompts.

    python -m edge_benchmark --ckpt checkpoints/eco_hybrid_hi --runs_per_prompt 3
    python -m edge_benchmark --ckpt checkpoints/eco_hybrid_hi --modes block_frozen \\
        --grid steps=4,8,16,32 precision=fp32,bf16,int8
    python -m edge_benchmark --ckpt checkpoints/eco_hybrid_hi --profiles balanced max

--profiles measures sample's profiles left to right and in blocks, and keeps beside the checkpoint
which of the two sample takes on this machine (evaluation/profiles.py). --grid takes
every combination of the named settings of sample, in every mode, and draws quality against speed
(evaluation/grid.py); --peer adds another engine's measured speed to that picture. One line per
variant for people; the last line on stdout, and benchmarks/edge_benchmark.json, hold everything.
Notable:
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
from pathlib import Path

import cli
import config
import model_config
from common.console import UserError, say
from common.files import can_write, json_text, write_json
from common.flags import to_dict
from evaluation import grid, speed_picture
from evaluation.peer_figures import read_peers
from evaluation.profiles import price, profiles, with_drafts
from sampling import proved, settings


def show(value, form):
    return "-" if value is None else format(value, form)


def card(name, figures, width):
    """One line for people about one variant."""
    if "skipped" in figures:
        return f"{name:{width}} skipped: {figures['skipped']}"
    parts = [
        f"{figures['mean_tok_s']:8.1f} tok/s",
        f"p50 {figures['p50_latency_s']:.3f} s",
        f"p90 {figures['p90_latency_s']:.3f} s",
        f"{figures['mean_generated_tokens']:.1f} tokens",
        f"{figures['tokens_per_forward']:.2f} per forward",
        f"{figures['peak_rss_mb']:.0f} MB",
        f"judge {show(figures['judge_nats'], '.3f')}",
        f"nll {show(figures['nll_per_token'], '.3f')}",
        f"held out {show(figures['held_out_nats'], '.4f')}",
        f"distinct_2 {show(figures['distinct_2'], '.3f')}",
        f"repeat {figures['repeat_rate']:.1%}",
        f"as full {figures['agree_with_full']:.0%}",
    ]
    return f"{name:{width}} " + " | ".join(parts)


def main(argv=None):
    args, origins = cli.parse(config.BenchArgs, argv, "edge_benchmark")
    cli.announce(args, origins)
    peers = read_peers(args.peer)
    if args.profiles:
        chosen = profiles(args.profiles)
        args.modes = ("block_frozen",)
    else:
        chosen = grid.combinations(args.grid)

    # these import torch, which --help and a usage error do not wait for
    from common import machine
    from evaluation.decode_modes import Judges, measure_all
    from evaluation.loading import load_models

    allocator = machine.start(args.threads)
    can_write(args, "out_json")
    device = machine.pick_device(args.device)
    prompts = list(config.BENCH_PROMPTS)
    if args.prompt or args.prompts_file:
        prompts = settings.read_prompts(args)
    args.sampler = settings.masked_sampler(args.sampler)

    # A model for each precision, and what is compared
    models, tokenizer, saved = load_models(args, chosen, device)
    settings.refuse_interlaced(saved)
    chosen = with_drafts(chosen, saved)
    cfg = next(iter(models.values())).model.cfg
    causal = cfg.causal
    if causal:
        say(
            "notice: an autoregressive checkpoint has one mode, left to right over its cache: "
            "block_frozen"
        )
        args.modes = ("block_frozen",)
    why_not_frozen = settings.cannot_freeze(saved)
    variants, results, idle = variants_of(
        args, origins, chosen, models, tokenizer, saved, why_not_frozen
    )
    if not causal:
        for line in idle:
            say(line)

    # The measurements: speed, then quality beside it
    data_dir = args.data_dir or saved.config["args"]["data_dir"]
    judges = Judges(data_dir, tokenizer, saved, device)
    if variants:
        results |= measure_all(
            tokenizer, prompts, variants, args, not why_not_frozen, device, judges
        )

    # The answer: cards for people, one document, a picture of a grid
    real = judges.real()
    document = {
        "version": 1,
        "model": saved.config["model"]["model"],
        "ckpt": str(saved.path),
        "step": saved.step,
        **machine.environment(device),
        "allocator": allocator,
        "weights_bytes": {loaded.precision: loaded.weights for loaded in models.values()},
        "batch": 1,
        "seed": args.seed,
        "prompts": prompts,
        "params": model_config.count_params(cfg),
        "args": to_dict(args),
        "judge_nats_of_held_out_text": real,
        "results": results,
        "peers": [dataclasses.asdict(peer) for peer in peers],
    }
    width = max(map(len, results))
    for name, figures in results.items():
        print(card(name, figures, width))
    if args.profiles:
        document["profiles"] = {name: price(name, results, args) for name in args.profiles}
        if not causal:
            keep_proved(saved.path, args, document["profiles"])
    write_json(args.out_json, document)
    if args.grid:
        picture = Path(args.out_json).with_suffix(".png")
        lines = grid.lines_of(results)
        speed_picture.draw(picture, lines, real, peers, grid.caption(document))
    print(json_text(document))


def variants_of(args, origins, chosen, models, tokenizer, saved, why_not_frozen):
    """Every mode with every choice of settings -> ({name: (Loaded, Settings)}, {name: why it is
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
            variants[name] = (models[mine.engine, mine.precision], asked)
            without_effect.append(set(settings.idle(mine, origins, asked)))
    if not without_effect:
        return variants, skipped, []
    return variants, skipped, sorted(set.intersection(*without_effect))


def keep_proved(folder, args, prices):
    """What was measured of the profiles goes beside the checkpoint, where sample finds it."""
    entries = {name: entry for name, entry in prices.items() if entry}
    if not entries:
        return
    try:
        path = proved.keep(folder, args, entries)
    except UserError as error:
        say(f"notice: sample will not know of this: {error}")
        return
    say(f"{path}: python -m sample --edge_profile goes by it on this machine")


if __name__ == "__main__":
    cli.run(main)
