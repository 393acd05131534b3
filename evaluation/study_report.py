"""What run_experiments.py found, for people: learning curves, error bars and tables, from the lines
of results.jsonl alone.

    python -m run_experiments --report checkpoints/ablations         # report.html and results.md
        there

Used by run_experiments.py. Errors: over seeds a standard deviation; of a difference to the
reference a standard error, over the seeds that both have, or where that is one seed over the
held-out documents; of one run a standard error over documents.
"""
import bisect
import html
import math
import os
import re
import shlex
import statistics

from common.console import UserError, say
from common.files import json_text, read_lines, write_text
from evaluation import plots

HEAD = (
    "variant",
    "runs",
    "parameters",
    "in the layers",
    "MFLOP/token",
    "tokens",
    "tokens/s",
    "bound, nats/token",
    "bits/byte",
    "to the reference",
    "chain rule, bits/byte",
)
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1280px;margin:2em auto;padding:0 1em;color:#1b1f24}
h1{font-size:1.6em}h2{font-size:1.25em;margin-top:2.2em;border-top:1px solid #d0d7de;padding-top:1em}
img{max-width:100%;height:auto}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.82em;font-variant-numeric:tabular-nums}
th,td{padding:.35em .55em;border-bottom:1px solid #d8dee4;text-align:right;white-space:nowrap}
th{background:#f6f8fa}th:first-child,td:first-child{text-align:left}p.note{color:#57606a;font-size:.9em}"""


# ---- lines ---------------------------------------------------------------------------------------

def by_seed(path):
    """(variant, seed) -> its last line: the same run may have borne two names."""
    return {(line["variant"], line["seed"]): line for line in read_lines(path)}


def append(path, line):
    """One more line, on the disk when this returns; a torn one before it is cut off."""
    with open(path, "ab+") as f:
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)
        f.write((json_text(line) + "\n").encode())
        f.flush()
        os.fsync(f.fileno())


def curve(events):
    """train.jsonl -> [[step, tokens, seconds of training, nats, bits/byte]] at every validation.

    Seconds are those of the logged steps, each standing for the ones since the line before:
    evaluating, saving and whatever was lost by a kill do not count. A step that was repeated after
    a resume counts as it was the last time.
    """
    steps = {e["step"]: e for e in events if e["event"] == "train"}
    at, seconds, tokens, before = [0], [0.0], [0], 0
    for step in sorted(steps):
        at.append(step)
        seconds.append(seconds[-1] + steps[step]["step_ms"] / 1e3 * (step - before))
        tokens.append(steps[step]["tokens_seen"])
        before = step
    rows = {}
    for e in events:
        if e["event"] == "eval" and e["step"] <= at[-1]:
            i = bisect.bisect_left(at, e["step"])
            share = 1.0 if not i else (e["step"] - at[i - 1]) / (at[i] - at[i - 1])
            low = max(0, i - 1)
            rows[e["step"]] = [
                e["step"],
                round(tokens[low] + share * (tokens[i] - tokens[low])),
                round(seconds[low] + share * (seconds[i] - seconds[low]), 3),
                e["val_nelbo"],
                e["val_bpb"],
            ]
    end = [at[-1], tokens[-1], round(seconds[-1], 3)]
    return [rows[s] for s in sorted(rows)] + ([] if at[-1] in rows else [[*end, None, None]])


def value(line, rules=()):
    """The figure that variants are compared by, over these block rules or all: bits/byte, where no
    bytes are known nats/token.
    """
    key = "bits_per_byte" if "bits_per_byte" in line else "nats"
    return statistics.fmean(line["bound"][rule][key] for rule in rules or line["bound"])


def common(lines):
    """The block rules that all of them were scored by."""
    return [rule for rule in lines[0]["bound"] if all(rule in line["bound"] for line in lines)]


def said(line):
    return (
        f"{line['nats']:.4f} nats/token, "
        + (f"{line['bits_per_byte']:.4f} bits/byte, " if "bits_per_byte" in line else "")
        + f"{line['tok_s']:,.0f} tokens/s, {line['seconds']:.0f} s of training"
    )


# ---- tables --------------------------------------------------------------------------------------

def grouped(lines):
    """variant -> its lines, in order of appearance, the reference first."""
    groups = {}
    for line in sorted(lines, key=lambda line: line["variant"] != line["reference"]):
        groups.setdefault(line["variant"], []).append(line)
    return groups


def spread(values, digits=4):
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def paired(own, base):
    """Two runs over the same documents: the standard error of their difference in bits/byte over
    documents, or None.
    """
    size, n, rules = own["documents"]["bytes"], len(own["documents"]["bytes"]), common([own, base])
    if n < 2 or size != base["documents"]["bytes"]:
        return None

    def nats(line):
        found = line["documents"]["nats"]
        if isinstance(found, list):                  # of an older line: the mean over its rules
            return found if rules == list(line["bound"]) else None
        return [
            statistics.fmean(some)
            for some in zip(*(found[rule] for rule in rules or found), strict=True)
        ]

    if None in (pair := (nats(own), nats(base))):
        return None
    gaps = [(x - y) / math.log(2) for x, y in zip(*pair, strict=True)]
    mean = sum(gaps) / sum(size)
    return math.sqrt(
        sum((g - mean * b) ** 2 for g, b in zip(gaps, size, strict=True)) * n / (n - 1)
    ) / sum(size)


def difference(own, reference):
    """Mean over common seeds of own - reference, by the block rules of both: with its standard
    error over seeds, or documents.
    """
    base = {line["seed"]: line for line in reference}
    pairs = [(line, base[line["seed"]]) for line in own if line["seed"] in base]
    if own is reference or not pairs:
        return "reference" if own is reference else "-"
    rules = common([*own, *reference])
    gaps = [value(line, rules) - value(other, rules) for line, other in pairs]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else paired(*pairs[0])
    return f"{statistics.fmean(gaps):+.4f}" + ("" if error is None else f" ± {error:.4f}")


def rows(lines):
    """The table, as text: per variant the mean over seeds ± their standard deviation."""
    groups = grouped(lines)
    reference = next(iter(groups.values()), [])
    for variant, own in groups.items():
        first = own[0]
        rules = [
            f"{rule} {spread([line['bound'][rule]['nats'] for line in own], 3)}"
            for rule in common(own)
        ]
        chain = [
            statistics.fmean(r["bits_per_byte"] for r in line["chain_rule"].values())
            for line in own
            if line["chain_rule"]
        ]
        yield (
            variant,
            str(len(own)),
            f"{first['params']:,}",
            f"{first['params_blocks']:,}",
            f"{first['flops_per_token'] / 1e6:.1f}",
            f"{first['tokens'] / 1e6:.2f}M",
            spread([x["tok_s"] for x in own], 0),
            ", ".join(rules),
            spread([value(x) for x in own]),
            difference(own, reference),
            spread(chain) if chain else "-",
        )


def pipes(head, body):
    return "\n".join(
        [
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
            *("| " + " | ".join(r) + " |" for r in body),
        ]
    )


def origin(lines):
    """Where the numbers come from, in a sentence."""
    def all_of(key):
        return ", ".join(sorted({str(line[key]).partition(" (")[0] for line in lines}))
    seeds = ", ".join(map(str, sorted({line["seed"] for line in lines})))
    return (
        f"{len(lines)} runs, seeds {seeds}; matched by {all_of('match')}; commit "
        f"{all_of('commit')}; "
        f"{all_of('device_name')}, {all_of('threads')} threads, torch {all_of('torch')}, "
        f"{all_of('precision')}; last one "
        f"finished {max(line['finished'] for line in lines)}. ± is the standard deviation over "
        "seeds; to the reference: over "
        "the block rules of both, with the standard error of the difference over seeds, or of one "
        "seed over documents. "
        "Bound: of held-out documents, its bits/byte the mean over block rules; chain rule: of "
        "fewer documents. Speeds: of "
        "the machine as busy as it was."
    )


def markdown(title, lines, states=None, rungs=()):
    """A section: table, what did not finish, the rounds of --halving."""
    parts = [
        f"## {title}",
        pipes(HEAD, rows(lines)) + f"\n\n{origin(lines)}" if lines else "Nothing has finished yet.",
    ]
    open_ones = {name: s for name, s in (states or {}).items() if s["status"] != "finished"}
    if open_ones:
        parts.append(
            "\n".join(
                f"* {name}: {s['status']}"
                + (
                    f" with exit code {s['code']}: {s['error']}"
                    if "code" in s
                    else f" at step {s['step']}"
                    if "step" in s
                    else ""
                )
                for name, s in open_ones.items()
            )
        )
    for rung in rungs:
        scores = ", ".join(
            f"{v} {spread(s)}{'' if v in rung['kept'] else ' (out)'}"
            for v, s in rung["scores"].items()
        )
        parts.append(f"Halving at step {rung['step']}, bits/byte of the validation: {scores}")
    return "\n\n".join(parts) + "\n"


# ---- pictures ------------------------------------------------------------------------------------

def unit(lines):
    return "bits/byte" if all("bits_per_byte" in line for line in lines) else "nats/token"


def measure(lines):
    """What a held-out figure is: a bound, or left to right the exact NLL."""
    causal = {line.get("objective") == "ar" for line in lines}
    return "NLL" if causal == {True} else "bound (of ar: the NLL)" if True in causal else "bound"


def picture_data(plt, lines):
    """Learning curves and final bounds as base64."""
    groups = grouped(lines)
    figure_of_curve = 4 if unit(lines) == "bits/byte" else 3
    label = f"{measure(lines)}, {unit(lines)}"
    curves = plots.learning_curves(plt, groups, figure_of_curve, f"validation {label}")

    reference = next(iter(groups.values()))
    ends = {}
    for variant, own in groups.items():
        values = [value(line) for line in own]
        if len(values) > 1:
            error = statistics.stdev(values)
        else:
            error = paired(own[0], reference[0])
        ends[variant] = values, error
    bars = plots.final_bounds(plt, ends, f"held-out {label} (less is better)")
    return curves, bars


# ---- pages ---------------------------------------------------------------------------------------

def sections(folder):
    """Folder -> [(its name, lines)] of its results.jsonl and of those one level below."""
    paths = [folder / "results.jsonl", *sorted(folder.glob("*/results.jsonl"))]
    return [
        (path.resolve().parent.name, lines)
        for path in paths
        if (lines := list(by_seed(path).values()))
    ]


def pictures(plt, name, lines):
    """Both pictures of a section and what they show, as HTML."""
    curves, bars = picture_data(plt, lines)
    several = len({line["seed"] for line in lines}) > 1
    return (
        f'<img alt="Learning curves of {html.escape(name)}" '
        f'src="data:image/png;base64,{curves}">'
        '<p class="note">Validation during '
        f'training{": mean over seeds, the band is their range" * several}.</p>'
        f'<img alt="Final bounds of {html.escape(name)}" src="data:image/png;base64,{bars}">'
        '<p class="note">Blue: mean over seeds and their standard deviation. Grey: one seed, and '
        'the standard '
        'error over documents of its difference to the reference. Small bars: single runs; dashed: '
        'the '
        'reference.</p>'
    )


def build(folder, path):
    """report.html: one file that needs nothing beside it. Without matplotlib it has the tables and
    no pictures.
    """
    parts = []
    missing = ("matplotlib is not installed: python -m pip install matplotlib, then "
               f"python -m run_experiments --report {shlex.quote(str(folder))}")
    plt = plots.pyplot(f"notice: {path} has tables and no pictures, as {missing}")
    for name, lines in sections(folder):
        table = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows(lines)
        )
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in HEAD)
        shown = (
            pictures(plt, name, lines)
            if plt
            else f'<p class="note">No pictures: {html.escape(missing)}</p>'
        )
        parts.append(
            f"<h2>{html.escape(name)}</h2>{shown}"
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{table}</tbody></table></div>'
            f'<p class="note">{html.escape(origin(lines))}</p>'
        )
    write_text(
        path,
        (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            'content="width=device-width">'
            "<title>Aria: "
            f"experiments</title><style>{STYLE}</style></head><body><h1>Experiments</h1>{''.join(parts)}"
            "</body></html>\n"
        ),
    )
    if plt:
        say(f"report: {path}")


def rebuild(folder, page):
    """--report: report.html in the folder, and the sections of the page between their marks. ->
    exit code
    """
    found = sections(folder)
    if not found:
        raise UserError(
            f"--report {folder}: no results.jsonl with a finished run there or one level below"
        )
    build(folder, folder / "report.html")
    text = page.read_text(encoding="utf-8") if page.exists() else "# Results\n"
    for name, lines in found:
        start, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        body = f"{start}\n{markdown(name, lines)}{end}"
        old = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.S)
        text = (
            old.sub(lambda _, body=body: body, text)
            if old.search(text)
            else f"{text.rstrip()}\n\n{body}\n"
        )
    write_text(page, text)
    say(f"results: {page}: {', '.join(name for name, _ in found)}")
    return 0
