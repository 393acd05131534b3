"""The page of a run: report.html out of train.jsonl."""
import html
import math
import statistics
from pathlib import Path

import config

WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM = 520, 210, 52, 20, 12, 24      # of a chart, in its own units


BUCKETS = 130  # of a curve with more points than these: mean, lowest and highest


TEXTS = 40                                                 # evaluations whose samples are shown


STYLE = """
:root{--ink:#1d2330;--soft:#667085;--line:#e3e6ec;--card:#fff;--page:#f6f7f9;--mark:#2f6fde;--warn:#b54708}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#2b313c;--card:#171b22;--page:#0f1216;--mark:#7aa7ff;
--warn:#f0a35e}}
*{box-sizing:border-box}
body{font:15px/1.55 system-ui,"Noto Sans","Noto Sans Devanagari","Nirmala UI","Kohinoor Devanagari",Mangal,sans-serif;
color:var(--ink);background:var(--page);max-width:72rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2.2rem 0 .7rem}
.soft,dt,th{color:var(--soft)}.warn{color:var(--warn)}
.tiles,.charts{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fit,minmax(8.3rem,1fr));margin-top:1rem}
.charts{grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr))}
.tiles div,figure,.card{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.7rem .9rem;margin:0}
.tiles b{display:block;font-size:1.25rem;font-variant-numeric:tabular-nums}
figcaption{display:flex;justify-content:space-between;gap:1rem;margin-bottom:.3rem}
figcaption b{font-variant-numeric:tabular-nums}
svg{display:block;width:100%;height:auto}svg text{font-size:11px;fill:var(--soft)}
.grid{stroke:var(--line)}.curve{fill:none;stroke:var(--mark);stroke-width:1.8;stroke-linejoin:round}
.band{fill:var(--mark);opacity:.17}.dot{fill:var(--mark)}
.card{overflow:auto;max-height:34rem}table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.35rem .9rem .35rem 0;border-top:1px solid var(--line)}tr:first-child>*{border:0}
td.text{line-height:1.8;min-width:14rem;white-space:pre-wrap;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.2rem;margin:0}dd{margin:0;overflow-wrap:anywhere}
details{margin-top:.8rem}summary{cursor:pointer}code{overflow-wrap:anywhere}
"""


def number(x):
    """A number that a curve can show, or None."""
    return (
        x
        if isinstance(x, (int, float))
        and not isinstance(x, bool)
        and (x == 0 or 1e-18 < abs(x) < 1e18)
        else None
    )


def history(events):
    """The events of a log, oldest first -> {event: {step: the last one}}, less what a resume or a
    rollback took back.
    """
    kept = {"train": {}, "eval": {}, "sample": {}}
    for e in events:
        name, step = e["event"], number(e.get("to", e.get("step")))
        if name in ("resume", "rollback") and step is not None:
            kept = {
                kind: {at: value for at, value in steps.items() if at <= step}
                for kind, steps in kept.items()
            }
        elif name == "sample" and step is not None:
            kept[name].setdefault(step, {})[str(e.get("prompt"))] = str(e.get("text"))
        elif name in ("train", "eval") and step is not None:
            kept[name][step] = e
    return {kind: dict(sorted(steps.items())) for kind, steps in kept.items()}


def curve(steps, key):
    """[(step, figure)] of the events that have it."""
    return [(step, y) for step, e in steps.items() if (y := number(e.get(key))) is not None]


def ticks(low, high, about=4):
    """Round numbers inside [low, high]."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= about + 1)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def short(x):
    """A figure in a few letters: 0.00031 -> 3.1e-04, 12345 -> 12k."""
    if x and (abs(x) < 1e-3 or abs(x) >= 1e9):
        return f"{x:.1e}"
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if abs(x) >= size:
            return f"{x / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{x:.4g}"


def thinned(points):
    """Many points -> [(step, mean, lowest, highest)] of equal parts of the way; few points as they
    are.
    """
    if len(points) <= BUCKETS:
        return [(x, y, y, y) for x, y in points]
    first, span, parts = points[0][0], points[-1][0] - points[0][0] + 1, {}
    for x, y in points:
        parts.setdefault(int((x - first) * BUCKETS // span), []).append((x, y))
    return [
        (
            statistics.fmean(x for x, _ in part),
            statistics.fmean(ys := [y for _, y in part]),
            min(ys),
            max(ys),
        )
        for part in parts.values()
    ]


def chart(title, points, to_words=short, from_zero=True, dots=False):
    """[(step, figure)] or [(step, figure, lowest, highest)] -> one figure as SVG; nothing when
    there are no points.
    """
    if not points:
        return ""
    rows = points if dots else thinned(points)
    low, high = min(r[2] for r in rows), max(r[3] for r in rows)
    low = min(low, 0) if from_zero else low
    high = high if high - low > 1e-9 * abs(high) else low + (abs(low) or 1)
    margin = 0.06 * (high - low)
    low, high = low if from_zero and low == 0 else low - margin, high + margin
    first, last = (0 if rows[0][0] < 0.1 * rows[-1][0] else rows[0][0]), rows[-1][0]
    last = last if last - first > 1e-9 * abs(last) else first + (abs(first) or 1)

    def at(x, y):
        return f"{LEFT + (WIDE - LEFT - RIGHT) * (x - first) / (last - first):.1f},{TOP + HIGH * (high - y) / (high - low):.1f}"

    lines = []
    for y in ticks(low, high):
        x, place = at(first, y).split(",")
        lines.append(
            f'<path class="grid" d="M{x} {place}H{WIDE - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{place}" dy="4" text-anchor="end">{to_words(y)}</text>'
        )
    for x in ticks(first, last):
        lines.append(
            f'<text x="{at(x, low).split(",")[0]}" y="{TOP + HIGH + 16}" '
            f'text-anchor="middle">{short(x)}</text>'
        )
    band = [at(r[0], r[3]) for r in rows] + [at(r[0], r[2]) for r in reversed(rows)]
    marks = [f'<polygon class="band" points="{" ".join(band)}"/>',
             f'<polyline class="curve" points="{" ".join(at(r[0], r[1]) for r in rows)}"/>']
    for r in rows if dots or len(rows) == 1 else ():
        x, y = at(r[0], r[1]).split(",")
        told = f"step {short(r[0])}: {to_words(r[1])}"
        marks.append(
            f'<circle class="dot" cx="{x}" cy="{y}" r="3.5"><title>{told}</title></circle>'
        )
    return (
        f'<figure><figcaption><span>{title}</span><b>{to_words(points[-1][1])}</b></figcaption>'
        f'<svg viewBox="0 0 {WIDE} {TOP + HIGH + BOTTOM}" role="img" aria-label="{title}, last '
        f'{to_words(points[-1][1])}">'
        f'{"".join(lines + marks)}</svg></figure>'
    )


def charts(train, evals, measure):
    bound = [(step, y, y - ci, y + ci) for step, y in curve(evals, "val_nelbo")
             for ci in [number(evals[step].get("val_ci")) or 0.0]]
    percent = "{:.0%}".format
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


def escaped(x):
    return html.escape(f"{x:,}" if type(x) is int else f"{x:g}" if isinstance(x, float) else str(x))


def listing(pairs):
    """A dictionary as a definition list; objects inside are flattened."""
    flat = {}
    for key, value in pairs.items():
        flat |= (
            {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        )
    return (
        "<dl>"
        + "".join(f"<dt>{escaped(k)}</dt><dd>{escaped(v)}</dd>" for k, v in flat.items())
        + "</dl>"
    )


def inner(value, *keys):
    """value[key][key]... where that is an object, else an empty one."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def tiles(events, train, evals, measure):
    """The figures of the whole run."""
    bounds = [(y, number(evals[step].get("val_bpb"))) for step, y in curve(evals, "val_nelbo")]
    best, bits = min(bounds, key=lambda pair: pair[0], default=(None, None))
    yield f"best held-out {measure}, nats/token", "–" if best is None else f"{best:.4f}"
    yield "that is in bits/byte", "–" if bits is None else f"{bits:.4f}"
    for name, key, words in (
        ("tokens seen", "tokens_seen", short),
        ("skipped steps", "skipped", short),
    ):
        points = curve(train, key)
        yield name, words(points[-1][1]) if points else "–"
    for name, key, words in (
        ("tokens/s, median", "tok_s", short),
        ("MFU, median", "mfu", "{:.0%}".format),
    ):
        ys = [y for _, y in curve(train, key)]
        yield name, words(statistics.median(ys[10:] or ys)) if ys else "–"
    seconds = [
        y for e in events if e["event"] == "end" and (y := number(e.get("seconds"))) is not None
    ]
    yield (
        "time, all sessions",
        f"{sum(seconds) / 3600:.1f} h" if sum(seconds) >= 7200 else f"{sum(seconds) / 60:.1f} min",
    )


def ending(events):
    """How the last session ended, in words."""
    last = next((e for e in reversed(events) if e["event"] in ("meta", "end")), {})
    if last.get("event") != "end":
        return "running, or killed"
    if last.get("stopped"):
        return (
            "stopped by Ctrl-C" if last["stopped"] == "SIGINT" else f"stopped by {last['stopped']}"
        )
    return (
        {0: "finished", 1: "failed"}.get(last["code"], "ended")
        if isinstance(last.get("code"), int)
        else "ended"
    )


def samples(texts):
    """What the model wrote at each evaluation, newest first."""
    steps = list(texts)
    if len(steps) > TEXTS:
        steps = [steps[round(i * (len(steps) - 1) / (TEXTS - 1))] for i in range(TEXTS)]
    prompts = list(dict.fromkeys(prompt for step in steps for prompt in texts[step]))
    if not prompts:
        return ""
    head = "".join(f'<th lang="hi">{escaped(p)} …</th>' for p in prompts)
    cells = {
        step: "".join(
            f'<td class="text" lang="hi">{escaped(texts[step].get(p, ""))}</td>' for p in prompts
        )
        for step in steps
    }
    rows = "".join(f"<tr><th>{escaped(step)}</th>{cells[step]}</tr>" for step in reversed(steps))
    note = (
        f' <span class="soft">({TEXTS} of {len(texts)} evaluations)</span>'
        if len(texts) > TEXTS
        else ""
    )
    return f'<h2>Samples through time{note}</h2><div class="card"><table><tr><th>step</th>{head}</tr>{rows}</table></div>'


def usage(run, step, args):
    """What can be done with the run: commands that work in the folder where it was trained."""
    if run is None:
        return '<div class="card soft">No checkpoint has been saved yet.</div>'
    limit = args.get("max_steps")
    limit = limit if type(limit) is int else step + 1
    commands = config.next_commands(run, step, limit)
    rows = "".join(
        f"<tr><th>{what}</th><td><code>{escaped(command)}</code></td></tr>"
        for what, command in commands
    )
    return f'<div class="card"><table>{rows}</table></div>'


def render(events, name, run=None):
    """The events of a log -> the page. run: the run folder as commands name it, if it has a
    checkpoint.
    """
    kept = history(events)
    train, evals = kept["train"], kept["eval"]
    meta = next((e for e in reversed(events) if e["event"] == "meta"), {})
    args, step = inner(meta, "config", "args"), max([*train, *evals], default=0)
    machine = {
        key: meta[key]
        for key in (
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
        if key in meta
    }
    warnings = [e for e in events if e["event"] == "warn"]
    told = "".join(
        f'<tr><th>{escaped(e.get("step", ""))}</th><td>{escaped(e.get("message", ""))}</td></tr>'
        for e in warnings[-100:]
    )
    sessions, argv = sum(e["event"] == "meta" for e in events), meta.get("argv")
    measure = "NLL" if args.get("objective") == "ar" else "bound"
    model = f"{args.get('model', '?')}, {escaped(meta.get('params_total', '?'))} parameters"
    figures = "".join(f'<div><b>{escaped(v)}</b><span class="soft">{k}</span></div>'
                      for k, v in tiles(events, train, evals, measure))
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escaped(name)}: training report</title><style>{STYLE}</style></head><body>
<h1>{escaped(name)}</h1>
<div class="soft">step {escaped(step)} of {escaped(args.get("max_steps", "?"))}, {ending(events)}; {escaped(model)};
{sessions} session{"s" * (sessions != 1)}</div>
<div class="tiles">{figures}</div>
<div class="charts">{"".join(charts(train, evals, measure))}</div>
<h2>Use this run</h2>{usage(run, step, args)}
{samples(kept["sample"])}
<h2>Warnings</h2>{f'<div class="card warn"><table>{told}</table></div>' if told else '<div class="card soft">none</div>'}
<h2>Data</h2><div class="card">{listing(inner(meta, "data"))}</div>
<h2>Machine</h2><div class="card">{listing(machine)}</div>
<h2>Configuration</h2><div class="card"><code>{escaped(" ".join(map(str, argv if isinstance(argv, list) else [])))}</code>
<details><summary class="soft">every setting</summary>{listing(args)}</details></div>
</body></html>
"""


def page(log):
    """train.jsonl -> the page as text."""
    from evaluation.check_run import read_log
    folder, here = Path(log).resolve().parent, Path.cwd()
    run = folder.relative_to(here) if here in folder.parents else folder
    return render(read_log(log), folder.name, run if (folder / "latest").is_file() else None)
