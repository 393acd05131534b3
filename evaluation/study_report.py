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
import textwrap

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
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1280px;margin:2em auto;padding:0 1em;
color:#1b1f24}
h1{font-size:1.6em}
h2{font-size:1.25em;margin-top:2.2em;border-top:1px solid #d0d7de;padding-top:1em}
img{max-width:100%;height:auto}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.82em;font-variant-numeric:tabular-nums}
th,td{padding:.35em .55em;border-bottom:1px solid #d8dee4;text-align:right;white-space:nowrap}
th{background:#f6f8fa}th:first-child,td:first-child{text-align:left}
p.note{color:#57606a;font-size:.9em}"""
WIDTH = 100         # of a line of prose in a page of Markdown
LEGEND = (
    "± is the standard deviation over seeds; to the reference: over the block rules of both, with "
    "the standard error of the difference over seeds, or of one seed over documents. Bound: of "
    "held-out documents, its bits/byte the mean over block rules; chain rule: of fewer documents. "
    "Speeds: of the machine as busy as it was."
)
BARS_SHOW = (
    "Blue: mean over seeds and their standard deviation. Grey: one seed, and the standard error "
    "over documents of its difference to the reference. Small bars: single runs; dashed: the "
    "reference."
)


# ---- lines ---------------------------------------------------------------------------------------

def by_seed(path):
    """(variant, seed) -> its last line: the same run may have borne two names."""
    return {(line["variant"], line["seed"]): line for line in read_lines(path)}


def append(path, line):
    """One more line, on the disk when this returns; a torn one before it is cut off."""
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write((json_text(line) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def curve(events):
    """train.jsonl -> [[step, tokens, seconds of training, nats, bits/byte]] at every validation.

    Seconds are those of the logged steps, each standing for the ones since the line before:
    evaluating, saving and whatever was lost by a kill do not count. A step that was repeated after
    a resume counts as it was the last time.
    """
    steps = {event["step"]: event for event in events if event["event"] == "train"}
    at, seconds, tokens = [0], [0.0], [0]
    for step in sorted(steps):
        since = step - at[-1]
        at.append(step)
        seconds.append(seconds[-1] + steps[step]["step_ms"] / 1e3 * since)
        tokens.append(steps[step]["tokens_seen"])

    # between two logged steps a straight line
    rows = {}
    for event in events:
        step = event.get("step")
        if event["event"] != "eval" or step > at[-1]:
            continue
        i = bisect.bisect_left(at, step)
        low = max(0, i - 1)
        share = 1.0
        if i:
            share = (step - at[low]) / (at[i] - at[low])
        rows[step] = [
            step,
            round(tokens[low] + share * (tokens[i] - tokens[low])),
            round(seconds[low] + share * (seconds[i] - seconds[low]), 3),
            event["val_nelbo"],
            event["val_bpb"],
        ]
    found = [rows[step] for step in sorted(rows)]
    if at[-1] not in rows:
        found.append([at[-1], tokens[-1], round(seconds[-1], 3), None, None])
    return found


def value(line, rules=()):
    """The figure that variants are compared by, over these block rules or all: bits/byte, where no
    bytes are known nats/token.
    """
    key = "nats"
    if "bits_per_byte" in line:
        key = "bits_per_byte"
    return statistics.fmean(line["bound"][rule][key] for rule in rules or line["bound"])


def common(lines):
    """The block rules that all of them were scored by."""
    return [rule for rule in lines[0]["bound"] if all(rule in line["bound"] for line in lines)]


def said(line):
    bits = ""
    if "bits_per_byte" in line:
        bits = f"{line['bits_per_byte']:.4f} bits/byte, "
    return (
        f"{line['nats']:.4f} nats/token, {bits}{line['tok_s']:,.0f} tokens/s, "
        f"{line['seconds']:.0f} s of training"
    )


# ---- tables --------------------------------------------------------------------------------------

def grouped(lines):
    """variant -> its lines, in order of appearance, the reference first."""
    groups = {}
    for line in sorted(lines, key=lambda line: line["variant"] != line["reference"]):
        groups.setdefault(line["variant"], []).append(line)
    return groups


def spread(values, digits=4):
    """The mean of the seeds, with their standard deviation if there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def paired(own, base):
    """Two runs over the same documents: the standard error of their difference in bits/byte over
    documents, or None.
    """
    sizes = own["documents"]["bytes"]
    n = len(sizes)
    if n < 2 or sizes != base["documents"]["bytes"]:
        return None
    rules = common([own, base])
    own_nats = nats_of_documents(own, rules)
    base_nats = nats_of_documents(base, rules)
    if own_nats is None or base_nats is None:
        return None

    gaps = [(x - y) / math.log(2) for x, y in zip(own_nats, base_nats, strict=True)]
    mean = sum(gaps) / sum(sizes)
    squares = sum((gap - mean * size) ** 2 for gap, size in zip(gaps, sizes, strict=True))
    return math.sqrt(squares * n / (n - 1)) / sum(sizes)


def nats_of_documents(line, rules):
    """The nats of each document, the mean over these block rules; None if they are not known."""
    found = line["documents"]["nats"]
    if isinstance(found, list):                  # of an older line: the mean over its rules
        if rules == list(line["bound"]):
            return found
        return None
    by_rule = [found[rule] for rule in rules or found]
    return [statistics.fmean(several) for several in zip(*by_rule, strict=True)]


def difference(own, reference):
    """Mean over common seeds of own - reference, by the block rules of both: with its standard
    error over seeds, or documents.
    """
    if own is reference:
        return "reference"
    base = {line["seed"]: line for line in reference}
    pairs = [(line, base[line["seed"]]) for line in own if line["seed"] in base]
    if not pairs:
        return "-"
    rules = common([*own, *reference])
    gaps = [value(line, rules) - value(other, rules) for line, other in pairs]
    if len(gaps) > 1:
        error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    else:
        error = paired(*pairs[0])
    mean = f"{statistics.fmean(gaps):+.4f}"
    if error is None:
        return mean
    return f"{mean} ± {error:.4f}"


def rows(lines):
    """The table, as text: per variant the mean over seeds ± their standard deviation."""
    groups = grouped(lines)
    reference = next(iter(groups.values()), [])
    for variant, own in groups.items():
        first = own[0]
        by_rule = []
        for rule in common(own):
            nats = [line["bound"][rule]["nats"] for line in own]
            by_rule.append(f"{rule} {spread(nats, 3)}")
        chain = []
        for line in own:
            if line["chain_rule"]:
                found = line["chain_rule"].values()
                chain.append(statistics.fmean(figures["bits_per_byte"] for figures in found))
        yield (
            variant,
            str(len(own)),
            f"{first['params']:,}",
            f"{first['params_blocks']:,}",
            f"{first['flops_per_token'] / 1e6:.1f}",
            f"{first['tokens'] / 1e6:.2f}M",
            spread([line["tok_s"] for line in own], 0),
            ", ".join(by_rule),
            spread([value(line) for line in own]),
            difference(own, reference),
            spread(chain) if chain else "-",
        )


def pipes(head, body):
    """A table of Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *body)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def origin(lines):
    """Where the numbers come from, in a sentence."""
    def all_of(key):
        return ", ".join(sorted({str(line[key]).partition(" (")[0] for line in lines}))

    seeds = ", ".join(map(str, sorted({line["seed"] for line in lines})))
    finished = max(line["finished"] for line in lines)
    return (
        f"{len(lines)} runs, seeds {seeds}; matched by {all_of('match')}; commit "
        f"{all_of('commit')}; {all_of('device_name')}, {all_of('threads')} threads, torch "
        f"{all_of('torch')}, {all_of('precision')}; last one finished {finished}. {LEGEND}"
    )


def markdown(title, lines, states=None, rungs=()):
    """A section: table, what did not finish, the rounds of --halving."""
    parts = [f"## {title}"]
    if lines:
        parts.append(pipes(HEAD, rows(lines)))
        parts.append(textwrap.fill(origin(lines), WIDTH, break_on_hyphens=False))
    else:
        parts.append("Nothing has finished yet.")

    unfinished = []
    for name, state in (states or {}).items():
        if state["status"] != "finished":
            unfinished.append(f"* {name}: {told(state)}")
    if unfinished:
        parts.append("\n".join(unfinished))

    for rung in rungs:
        scores = []
        for variant, found in rung["scores"].items():
            out = "" if variant in rung["kept"] else " (out)"
            scores.append(f"{variant} {spread(found)}{out}")
        parts.append(
            f"Halving at step {rung['step']}, bits/byte of the validation: {', '.join(scores)}"
        )
    return "\n\n".join(parts) + "\n"


def told(state):
    """The state of a run that has not finished, in words."""
    if "code" in state:
        return f"{state['status']} with exit code {state['code']}: {state['error']}"
    if "step" in state:
        return f"{state['status']} at step {state['step']}"
    return state["status"]


# ---- pictures ------------------------------------------------------------------------------------

def unit(lines):
    return "bits/byte" if all("bits_per_byte" in line for line in lines) else "nats/token"


def measure(lines):
    """What a held-out figure is: a bound, or left to right the exact NLL."""
    causal = {line.get("objective") == "ar" for line in lines}
    if causal == {True}:
        return "NLL"
    return "bound (of ar: the NLL)" if True in causal else "bound"


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
    found = []
    for path in (folder / "results.jsonl", *sorted(folder.glob("*/results.jsonl"))):
        lines = list(by_seed(path).values())
        if lines:
            found.append((path.resolve().parent.name, lines))
    return found


def pictures(plt, name, lines):
    """Both pictures of a section and what they show, as HTML."""
    curves, bars = picture_data(plt, lines)
    spreads = ""
    if len({line["seed"] for line in lines}) > 1:
        spreads = ": mean over seeds, the band is their range"
    shown = html.escape(name)
    return (
        f'<img alt="Learning curves of {shown}" src="data:image/png;base64,{curves}">'
        f'<p class="note">Validation during training{spreads}.</p>'
        f'<img alt="Final bounds of {shown}" src="data:image/png;base64,{bars}">'
        f'<p class="note">{BARS_SHOW}</p>'
    )


def html_table(lines):
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in HEAD)
    body = []
    for row in rows(lines):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def build(folder, path):
    """report.html: one file that needs nothing beside it. Without matplotlib it has the tables and
    no pictures.
    """
    missing = (
        "matplotlib is not installed: python -m pip install matplotlib, then "
        f"python -m run_experiments --report {shlex.quote(str(folder))}"
    )
    plt = plots.pyplot(f"notice: {path} has tables and no pictures, as {missing}")
    parts = []
    for name, lines in sections(folder):
        if plt:
            shown = pictures(plt, name, lines)
        else:
            shown = f'<p class="note">No pictures: {html.escape(missing)}</p>'
        parts.append(
            f"<h2>{html.escape(name)}</h2>{shown}{html_table(lines)}"
            f'<p class="note">{html.escape(origin(lines))}</p>'
        )
    write_text(
        path,
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Aria: experiments</title><style>{STYLE}</style></head>"
        f"<body><h1>Experiments</h1>{''.join(parts)}</body></html>\n",
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
        if old.search(text):
            text = old.sub(lambda _, body=body: body, text)
        else:
            text = f"{text.rstrip()}\n\n{body}\n"
    write_text(page, text)
    say(f"results: {page}: {', '.join(name for name, _ in found)}")
    return 0
