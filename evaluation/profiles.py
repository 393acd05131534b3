"""The profiles of sample, as edge_benchmark --profiles measures them: each beside itself at one
token a forward, and what it costs and gives against that.

Used by edge_benchmark.py. Imports no torch.
"""
import dataclasses

import config
from common.console import say

CAREFUL = " at one token a forward"
LIMIT = 0.05              # of judged quality, that a profile may cost


def profiles(names):
    """Each profile of sample, and beside it the slow and careful way: one token a forward, all
    layers, no 8-bit products.
    """
    known = {f.name for f in dataclasses.fields(config.GenerateFlags)}
    found = {}
    for name in names:
        fast = {k: v for k, v in config.SAMPLE_PROFILES[name].items() if k in known}
        found[name] = fast
        found[name + CAREFUL] = fast | dict(
            sampler="confidence", steps=config.SURE["steps"], min_decode_layers=0, precision="auto"
        )
    return found


def price(name, results):
    """What a profile costs and gives, against the careful way -> its figures, told on stderr."""
    fast = figures_of(results, name)
    slow = figures_of(results, name + CAREFUL)
    # no judge, or a text that ended at once
    if "skipped" in fast or None in (fast["judge_nats"], slow["judge_nats"]):
        return None
    found = {
        "judged": fast["judge_nats"] / slow["judge_nats"] - 1,
        "faster": fast["mean_tok_s"] / slow["mean_tok_s"],
    }
    verdict = "NOT justified for this checkpoint"
    if found["judged"] <= LIMIT:
        verdict = "justified"
    say(
        f"profile {name}: {found['judged']:+.1%} judged nats/token (limit +{LIMIT:.0%}), repeated "
        "4-grams "
        f"{fast['repeat_rate']:.1%} against {slow['repeat_rate']:.1%}, "
        f"{fast['tokens_per_forward']:.2f} tokens per forward, "
        f"{found['faster']:.2f}x as fast: {verdict}"
    )
    return found


def figures_of(results, label):
    """The figures of the variant with these settings, in whatever mode."""
    return next(figures for name, figures in results.items() if name.endswith(f" {label}"))
