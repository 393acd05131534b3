"""The profiles of sample, as edge_benchmark --profiles measures them: each left to right and in
blocks, and which of the two sample takes here.

Used by edge_benchmark.py. Imports no torch.
"""
import dataclasses
import math
import statistics

import config
from common.console import say
from sampling.settings import DRAFT, SPECULATE, left_to_right

IN_BLOCKS = " in blocks"
LEFT_TO_RIGHT = " left to right"
LIMIT = 0.05              # of judged quality, that blocks may cost
FASTER = 1.05             # blocks have to be so many times as fast


def profiles(names):
    """{label: settings}: each profile of sample in blocks and left to right."""
    known = {f.name for f in dataclasses.fields(config.GenerateFlags)}
    found = {}
    for name in names:
        blocks = {k: v for k, v in config.SAMPLE_PROFILES[name].items() if k in known}
        found[name + IN_BLOCKS] = blocks
        single = dict(min_decode_layers=0) | left_to_right(name)
        found[name + LEFT_TO_RIGHT] = blocks | single
    return found


def with_drafts(chosen, saved):
    """The same, with verified drafts left to right where sample takes them for this model."""
    if not getattr(saved, "drafts_pay", False):
        return chosen
    drafted = dict(sampler=SPECULATE, block_size=DRAFT)
    return {
        label: settings | drafted if label.endswith(LEFT_TO_RIGHT) else settings
        for label, settings in chosen.items()
    }


def price(name, results, args):
    """What blocks give and cost against left to right -> {"settings": of sample (none: left
    to right stays), "faster", "judged", "error"}, told on stderr; None if it was not measured.

    Blocks are proved if they are faster and, with two standard errors of the difference over the
    beginnings, lose no more than the limit.
    """
    blocks = figures_of(results, name + IN_BLOCKS)
    single = figures_of(results, name + LEFT_TO_RIGHT)
    if "skipped" in blocks:
        return None
    pairs = []
    for pair in zip(blocks["judge_nats_each"], single["judge_nats_each"], strict=True):
        if None not in pair:  # no judge, or a text that ended at once
            pairs.append(pair)
    if len(pairs) < 2:
        say(f"profile {name}: no judge, or fewer than two texts, so nothing is proved")
        return None

    differences = [of_blocks - of_single for of_blocks, of_single in pairs]
    nats = statistics.mean(of_single for _, of_single in pairs)
    found = {
        "faster": blocks["mean_tok_s"] / single["mean_tok_s"],
        "judged": statistics.mean(differences) / nats,
        "error": statistics.stdev(differences) / math.sqrt(len(pairs)) / nats,
    }
    proved = found["faster"] >= FASTER and found["judged"] + 2 * found["error"] <= LIMIT
    settings = {}
    verdict = "left to right"
    if proved:
        settings = {"block_size": args.block_size, "threshold": args.threshold}
        verdict = "blocks"
    say(
        f"profile {name}: blocks are {found['faster']:.2f}x as fast as left to right (at least "
        f"{FASTER:g}x), judged nats/token {found['judged']:+.1%} ± {found['error']:.1%} over "
        f"{len(pairs)} texts (limit +{LIMIT:.0%} with two errors), repeated 4-grams "
        f"{blocks['repeat_rate']:.1%} against {single['repeat_rate']:.1%}: {verdict}"
    )
    return {"settings": settings, **found}


def figures_of(results, label):
    """The figures of the variant with these settings, in whatever mode."""
    return next(figures for name, figures in results.items() if name.endswith(f" {label}"))
