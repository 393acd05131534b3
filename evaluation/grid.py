"""The grid of edge_benchmark: which settings are compared, and which of them one line of the
picture joins.

Used by edge_benchmark.py. A variant is named after its mode and its settings, as in
"block_frozen sampler=margin steps=4"; lines_of reads these names again. Imports no torch.
"""
import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path

import config
from common.console import UserError
from common.flags import convert, split_list
from sampling.settings import ADAPTIVE

PACE = ("steps", "threshold")        # they trade quality for speed: a line joins these, if it can


@dataclass
class Line:
    """Variants that differ in one number only, in its order."""
    rule: str       # what is not a number: sampler, mode, precision; it gives the line its colour
    name: str       # the rule, and the numbers that all points of the line have in common
    axis: str       # the setting that differs along the line; empty for a single point
    points: list    # [(value of the axis as text, tokens/s, nats)]


# ---- what is compared ----------------------------------------------------------------------------

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

    found = {}
    for pairs in itertools.product(*axes):
        chosen = without_unread(dict(pairs))
        found[" ".join(f"{name}={value}" for name, value in chosen.items())] = chosen
    return found


def without_unread(chosen):
    """A choice of settings without the pace that its sampler does not go by, so that a grid over
    steps and thresholds does not run the same thing several times.
    """
    if "sampler" not in chosen or "threshold" not in chosen:
        return chosen
    unread = "threshold"
    if chosen["sampler"] in ADAPTIVE:
        unread = "steps"
    return {name: value for name, value in chosen.items() if name != unread}


# ---- what the picture joins ----------------------------------------------------------------------

def lines_of(results):
    """{variant: figures} -> [Line]. Along a line runs the number with the most values, of equals
    the one that sets the pace.
    """
    found = {}
    for variant, figures in results.items():
        if figures.get("judge_nats") is not None:
            mode, *pairs = variant.split(" ")
            chosen = {"mode": mode} | dict(pair.split("=", 1) for pair in pairs)
            found[variant] = chosen

    # What does not differ at all is in no name
    numbers, words = differing(found.values())
    rules = {}
    for variant, chosen in found.items():
        rule = " ".join(chosen[name] for name in words if name in chosen)
        rules.setdefault(rule, []).append(variant)

    lines = {}
    for rule, variants in rules.items():
        axis = joined([found[variant] for variant in variants])
        for variant in variants:
            chosen = found[variant]
            parts = [f"{name} {chosen[name]}" for name in numbers if name in chosen]
            if axis:
                parts.remove(f"{axis} {chosen[axis]}")
            if rule:
                parts.insert(0, rule)
            name = " ".join(parts) or chosen["mode"]
            line = lines.setdefault(name, Line(rule or chosen["mode"], name, axis, []))
            figures = results[variant]
            point = (chosen.get(axis, ""), figures["mean_tok_s"], figures["judge_nats"])
            line.points.append(point)
    for line in lines.values():
        if line.axis:
            line.points.sort(key=lambda point: float(point[0]))
    return list(lines.values())


def differing(choices):
    """[{setting: text}] -> (settings that differ and are numbers, settings that differ and are
    not).
    """
    values = {}
    for chosen in choices:
        for name, value in chosen.items():
            values.setdefault(name, set()).add(value)
    several = [name for name, texts in values.items() if len(texts) > 1]
    numbers = [name for name in several if all(map(is_number, values[name]))]
    words = [name for name in several if name not in numbers]
    return numbers, words


def joined(choices):
    """The number that a line over these choices runs along, or an empty text."""
    numbers, _ = differing(choices)

    def weight(name):
        return len({chosen.get(name) for chosen in choices}), name in PACE

    return max(numbers, key=weight, default="")


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def caption(document):
    """One line under the picture's title: of what the figures are."""
    args = document["args"]
    threads = document["threads"]
    device = document["device"]
    if device == "cpu":
        device = f"{threads} CPU threads"
        if threads == 1:
            device = "1 CPU thread"
    path = Path(document["ckpt"])
    if path.name.startswith("step_"):
        path = path.parent
    return (
        f"{path.name}, {document['params'] / 1e6:.1f}M parameters, step {document['step']:,}; "
        f"{len(document['prompts'])} prompts, up to {args['max_new_tokens']} new tokens, "
        f"temperature {args['temperature']:g}; {device}"
    )
