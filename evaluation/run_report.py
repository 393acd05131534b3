"""The page of a run: report.html out of train.jsonl, for report.py and at each end of train.py.

    html = page("checkpoints/eco_hybrid_hi/train.jsonl")

The page holds everything it shows: inline SVG, no script, no font and no picture from elsewhere.
Whatever train.jsonl holds, a page comes out: lines and figures that are none are left out, texts
are escaped. What a resume or a rollback took back is not drawn.
"""
import html
import math
import statistics
from pathlib import Path

import config
from common.files import read_lines

# a chart, in its own units
WIDE = 520
HIGH = 210
LEFT = 52
RIGHT = 20
TOP = 12
BOTTOM = 24

BUCKETS = 130       # of a curve with more points than these: mean, lowest and highest
TEXTS = 40          # evaluations whose samples are shown
WARNINGS = 100      # the last ones are shown
SETTLED = 10        # of the first logged steps, that a median of speed leaves out
MACHINE = (
    "device",
    "device_name",
    "threads",
    "precision",
    "allocator",
    "peak_flops",
    "torch",
    "python",
    "commit",
    "time",
)
STYLE = """
:root{--ink:#1d2330;--soft:#667085;--line:#e3e6ec;--card:#fff;--page:#f6f7f9;
--mark:#2f6fde;--warn:#b54708}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#2b313c;--card:#171b22;
--page:#0f1216;--mark:#7aa7ff;--warn:#f0a35e}}
*{box-sizing:border-box}
body{font:15px/1.55 system-ui,"Noto Sans","Noto Sans Devanagari","Nirmala UI","Kohinoor Devanagari",
Mangal,sans-serif;
color:var(--ink);background:var(--page);max-width:72rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2.2rem 0 .7rem}
.soft,dt,th{color:var(--soft)}.warn{color:var(--warn)}
.tiles,.charts{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fit,minmax(8.3rem,1fr));
margin-top:1rem}
.charts{grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr))}
.tiles div,figure,.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;
padding:.7rem .9rem;margin:0}
.tiles b{display:block;font-size:1.25rem;font-variant-numeric:tabular-nums}
figcaption{display:flex;justify-content:space-between;gap:1rem;margin-bottom:.3rem}
figcaption b{font-variant-numeric:tabular-nums}
svg{display:block;width:100%;height:auto}svg text{font-size:11px;fill:var(--soft)}
.grid{stroke:var(--line)}
.curve{fill:none;stroke:var(--mark);stroke-width:1.8;stroke-linejoin:round}
.band{fill:var(--mark);opacity:.17}.dot{fill:var(--mark)}
.card{overflow:auto;max-height:34rem}table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.35rem .9rem .35rem 0;
border-top:1px solid var(--line)}
tr:first-child>*{border:0}
td.text{line-height:1.8;min-width:14rem;white-space:pre-wrap;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.2rem;margin:0}
dd{margin:0;overflow-wrap:anywhere}
details{margin-top:.8rem}summary{cursor:pointer}code{overflow-wrap:anywhere}
"""


# ---- what happened -------------------------------------------------------------------------------

def read_log(path):
    """The events of a train.jsonl."""
    return [line for line in read_lines(path) if "event" in line]


def number(x):
    """A number that a curve can show, or None."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return None
    return x if x == 0 or 1e-18 < abs(x) < 1e18 else None


def history(events):
    """The events of a log, oldest first -> {event: {step: the last one}}, less what a resume or a
    rollback took back.
    """
    kept = {"train": {}, "eval": {}, "sample": {}, "analysis": {}}
    for event in events:
        name = event["event"]
        step = number(event.get("to", event.get("step")))
        if step is None:
            continue
        if name in ("resume", "rollback"):
            for kind, steps in kept.items():
                kept[kind] = {at: value for at, value in steps.items() if at <= step}
        elif name == "sample":
            texts = kept["sample"].setdefault(step, {})
            texts[str(event.get("prompt"))] = str(event.get("text"))
        elif name in ("train", "eval", "analysis"):
            kept[name][step] = event
    return {kind: dict(sorted(steps.items())) for kind, steps in kept.items()}


def curve(steps, key):
    """[(step, figure)] of the events that have it."""
    points = []
    for step, event in steps.items():
        y = number(event.get(key))
        if y is not None:
            points.append((step, y))
    return points


def inner(value, *keys):
    """value[key][key]... where that is an object, else an empty one."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def last_of(events, *names):
    """The last event of these names, or an empty one."""
    for event in reversed(events):
        if event["event"] in names:
            return event
    return {}


def ending(events):
    """How the last session ended, in words."""
    last = last_of(events, "meta", "end")
    if last.get("event") != "end":
        return "running, or killed"
    if last.get("stopped"):
        signal = "Ctrl-C" if last["stopped"] == "SIGINT" else last["stopped"]
        return f"stopped by {signal}"
    code = last.get("code")
    if not isinstance(code, int):
        return "ended"
    return {0: "finished", 1: "failed"}.get(code, "ended")


# ---- a chart -------------------------------------------------------------------------------------

def ticks(low, high, about=4):
    """Round numbers inside [low, high]."""
    span = high - low
    step = 10 ** math.floor(math.log10(span / about))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= about + 1)
    first = math.ceil(low / step)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def short(x):
    """A figure in a few letters: 0.00031 -> 3.1e-04, 12345 -> 12k."""
    size = abs(x)
    if x and (size < 1e-3 or size >= 1e9):
        return f"{x:.1e}"
    if size >= 1e6:
        return f"{x / 1e6:.3g}M"
    if size >= 1e4:
        return f"{x / 1e3:.3g}k"
    return f"{x:.4g}"


def percent(x):
    return f"{x:.0%}"


def thinned(points):
    """Many points -> [(step, mean, lowest, highest)] of equal parts of the way; few points as they
    are.
    """
    if len(points) <= BUCKETS:
        return [(x, y, y, y) for x, y in points]
    first = points[0][0]
    span = points[-1][0] - first + 1
    parts = {}
    for x, y in points:
        parts.setdefault(int((x - first) * BUCKETS // span), []).append((x, y))
    rows = []
    for part in parts.values():
        ys = [y for _, y in part]
        step = statistics.fmean(x for x, _ in part)
        rows.append((step, statistics.fmean(ys), min(ys), max(ys)))
    return rows


def widened(first, last):
    """An interval that is not a single point."""
    if last - first > 1e-9 * abs(last):
        return last
    return first + (abs(first) or 1)


def frame(rows, from_zero):
    """What a chart of [(step, figure, lowest, highest)] shows -> (first, last) step, (low, high)
    figure.
    """
    low = min(row[2] for row in rows)
    high = max(row[3] for row in rows)
    if from_zero:
        low = min(low, 0)
    high = widened(low, high)
    margin = 0.06 * (high - low)
    high += margin
    if not from_zero or low != 0:
        low -= margin

    first, last = rows[0][0], rows[-1][0]
    if first < 0.1 * last:
        first = 0
    return first, widened(first, last), low, high


def chart(title, points, to_words=short, from_zero=True, dots=False):
    """[(step, figure)] or [(step, figure, lowest, highest)] -> one figure as SVG; nothing when
    there are no points.
    """
    if not points:
        return ""
    rows = points if dots else thinned(points)
    first, last, low, high = frame(rows, from_zero)

    def across(x):
        return f"{LEFT + (WIDE - LEFT - RIGHT) * (x - first) / (last - first):.1f}"

    def down(y):
        return f"{TOP + HIGH * (high - y) / (high - low):.1f}"

    def at(x, y):
        return f"{across(x)},{down(y)}"

    # the grid and its numbers
    marks = []
    for y in ticks(low, high):
        marks.append(
            f'<path class="grid" d="M{across(first)} {down(y)}H{WIDE - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{down(y)}" dy="4" text-anchor="end">{to_words(y)}</text>'
        )
    for x in ticks(first, last):
        marks.append(
            f'<text x="{across(x)}" y="{TOP + HIGH + 16}" text-anchor="middle">{short(x)}</text>'
        )

    # the band, the curve, and a dot for each point of a curve of few
    upper = [at(step, highest) for step, _, _, highest in rows]
    lower = [at(step, lowest) for step, _, lowest, _ in reversed(rows)]
    line = [at(step, y) for step, y, _, _ in rows]
    marks.append(f'<polygon class="band" points="{" ".join(upper + lower)}"/>')
    marks.append(f'<polyline class="curve" points="{" ".join(line)}"/>')
    if dots or len(rows) == 1:
        for step, y, _, _ in rows:
            told = f"step {short(step)}: {to_words(y)}"
            marks.append(
                f'<circle class="dot" cx="{across(step)}" cy="{down(y)}" r="3.5">'
                f"<title>{told}</title></circle>"
            )
    latest = to_words(points[-1][1])
    return (
        f"<figure><figcaption><span>{title}</span><b>{latest}</b></figcaption>"
        f'<svg viewBox="0 0 {WIDE} {TOP + HIGH + BOTTOM}" role="img" '
        f'aria-label="{title}, last {latest}">{"".join(marks)}</svg></figure>'
    )


def charts(train, evals, measure):
    bound = []
    for step, y in curve(evals, "val_nelbo"):
        half = number(evals[step].get("val_ci")) or 0.0
        bound.append((step, y, y - half, y + half))
    yield chart("Training loss, nats/token", curve(train, "loss"), from_zero=False)
    yield chart(
        f"Held-out {measure}, nats/token, with its 95 % interval",
        bound,
        "{:.4g}".format,
        from_zero=False,
        dots=True,
    )
    yield chart("Gradient norm, before clipping", curve(train, "gnorm"))
    yield chart("Learning rate", curve(train, "lr"))
    yield chart("Tokens per second", curve(train, "tok_s"))
    yield chart("MFU: share of the measured matmul peak", curve(train, "mfu"), percent)
    yield chart("Mask rate of a step", curve(train, "mask"), "{:.2f}".format)
    yield chart("Peak memory, MB", curve(train, "mem_mb"))


# ---- the parts of the page -----------------------------------------------------------------------

def escaped(x):
    if isinstance(x, float):
        x = f"{x:g}"
    elif type(x) is int:
        x = f"{x:,}"
    return html.escape(str(x))


def listing(pairs):
    """A dictionary as a definition list; objects inside are flattened."""
    flat = {}
    for key, value in pairs.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": part for name, part in value.items()}
        else:
            flat[key] = value
    items = [f"<dt>{escaped(key)}</dt><dd>{escaped(value)}</dd>" for key, value in flat.items()]
    return f"<dl>{''.join(items)}</dl>"


def card(text, kind=""):
    return f'<div class="card{kind}">{text}</div>'


def tiles(events, train, evals, measure):
    """The figures of the whole run: (what, in words)."""
    bounds = curve(evals, "val_nelbo")
    best = bits = "–"
    if bounds:
        step, nats = min(bounds, key=lambda point: point[1])
        best = f"{nats:.4f}"
        per_byte = number(evals[step].get("val_bpb"))
        if per_byte is not None:
            bits = f"{per_byte:.4f}"
    yield f"best held-out {measure}, nats/token", best
    yield "that is in bits/byte", bits

    yield "tokens seen", last_figure(train, "tokens_seen")
    yield "skipped steps", last_figure(train, "skipped")
    yield "tokens/s, median", median_figure(train, "tok_s", short)
    yield "MFU, median", median_figure(train, "mfu", percent)

    seconds = 0
    for event in events:
        if event["event"] == "end":
            seconds += number(event.get("seconds")) or 0
    if seconds >= 7200:
        yield "time, all sessions", f"{seconds / 3600:.1f} h"
    else:
        yield "time, all sessions", f"{seconds / 60:.1f} min"


def last_figure(train, key):
    points = curve(train, key)
    return short(points[-1][1]) if points else "–"


def median_figure(train, key, to_words):
    ys = [y for _, y in curve(train, key)]
    if not ys:
        return "–"
    return to_words(statistics.median(ys[SETTLED:] or ys))


def samples(texts):
    """What the model wrote at each evaluation, newest first: {step: {prompt: text}}."""
    steps = list(texts)
    if len(steps) > TEXTS:
        steps = [steps[round(i * (len(steps) - 1) / (TEXTS - 1))] for i in range(TEXTS)]
    prompts = list(dict.fromkeys(prompt for step in steps for prompt in texts[step]))
    if not prompts:
        return ""
    head = "".join(f'<th lang="hi">{escaped(prompt)} …</th>' for prompt in prompts)
    rows = []
    for step in reversed(steps):
        written = [escaped(texts[step].get(prompt, "")) for prompt in prompts]
        cells = "".join(f'<td class="text" lang="hi">{text}</td>' for text in written)
        rows.append(f"<tr><th>{escaped(step)}</th>{cells}</tr>")
    note = ""
    if len(texts) > TEXTS:
        note = f' <span class="soft">({TEXTS} of {len(texts)} evaluations)</span>'
    table = f"<table><tr><th>step</th>{head}</tr>{''.join(rows)}</table>"
    return f"<h2>Samples through time{note}</h2>{card(table)}"


def usage(run, step, args, source):
    """What can be done with the run: commands that work in the folder where it was trained."""
    if run is None:
        return card("No checkpoint has been saved yet.", " soft")
    limit = args.get("max_steps")
    if type(limit) is not int:
        limit = step + 1
    rows = []
    for what, command in config.next_commands(run, step, limit, source):
        rows.append(f"<tr><th>{what}</th><td><code>{escaped(command)}</code></td></tr>")
    return card(f"<table>{''.join(rows)}</table>")


def warnings(events):
    """The last warnings as a table."""
    found = [event for event in events if event["event"] == "warn"]
    if not found:
        return card("none", " soft")
    rows = []
    for event in found[-WARNINGS:]:
        step, message = escaped(event.get("step", "")), escaped(event.get("message", ""))
        rows.append(f"<tr><th>{step}</th><td>{message}</td></tr>")
    return card(f"<table>{''.join(rows)}</table>", " warn")


def configuration(meta, args):
    """The command, and every setting behind a fold."""
    argv = meta.get("argv")
    command = " ".join(map(str, argv)) if isinstance(argv, list) else ""
    return card(
        f"<code>{escaped(command)}</code>\n"
        f'<details><summary class="soft">every setting</summary>{listing(args)}</details>'
    )


# ---- the page ------------------------------------------------------------------------------------

def render(events, name, run=None):
    """The events of a log -> the page. run: the run folder as commands name it, if it has a
    checkpoint.
    """
    kept = history(events)
    train, evals = kept["train"], kept["eval"]
    meta = last_of(events, "meta")
    args = inner(meta, "config", "args")
    step = max([*train, *evals], default=0)
    measure = "NLL" if args.get("objective") == "ar" else "bound"

    # the line under the title
    sessions = sum(event["event"] == "meta" for event in events)
    plural = "" if sessions == 1 else "s"
    model = f"{args.get('model', '?')}, {escaped(meta.get('params_total', '?'))} parameters"
    steps = f"step {escaped(step)} of {escaped(args.get('max_steps', '?'))}, {ending(events)}"

    figures = []
    for what, words in tiles(events, train, evals, measure):
        figures.append(f'<div><b>{escaped(words)}</b><span class="soft">{what}</span></div>')
    machine = {key: meta[key] for key in MACHINE if key in meta}
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">\
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escaped(name)}: training report</title><style>{STYLE}</style></head><body>
<h1>{escaped(name)}</h1>
<div class="soft">{steps}; {escaped(model)};
{sessions} session{plural}</div>
<div class="tiles">{"".join(figures)}</div>
<div class="charts">{"".join(charts(train, evals, measure))}</div>
<h2>Use this run</h2>{usage(run, step, args, inner(meta, "data").get("source"))}
{samples(kept["sample"])}
<h2>Warnings</h2>{warnings(events)}
<h2>Data</h2>{card(listing(inner(meta, "data")))}
<h2>Machine</h2>{card(listing(machine))}
<h2>Configuration</h2>{configuration(meta, args)}
</body></html>
"""


def page(log):
    """train.jsonl -> the page as text."""
    folder = Path(log).resolve().parent
    here = Path.cwd()
    run = folder.relative_to(here) if here in folder.parents else folder
    if not (folder / "latest").is_file():
        run = None
    return render(read_log(log), folder.name, run)
