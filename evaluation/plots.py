"""The pictures of the toolkit, and the one place that imports matplotlib, which is optional.

    plots.mask_rate_curves(path, curves, length, name)       # evaluate --out_png
    plots.learning_curves(groups, ...)                       # report.html of run_experiments
    plots.final_bounds(groups, ...)

evaluation/speed_picture.py draws the one of edge_benchmark --grid. The callers have computed the
figures; here they are only drawn. Without matplotlib pyplot() says so in one line and gives None.
"""
import base64
import io
import statistics

from common.console import say

NO_PICTURE = "notice: no picture, as matplotlib is not installed (pip install matplotlib)"
LINE_STYLES = ("-", "--", ":")
DPI = 130
COLOURS = 10        # of matplotlib's cycle; then the line style changes


def pyplot(notice=NO_PICTURE):
    """matplotlib's pyplot, drawing into files; without matplotlib None, and the notice is said."""
    try:
        from matplotlib import pyplot
        pyplot.switch_backend("Agg")             # into files, whatever the machine shows
    except ImportError:
        say(notice)
        return None
    return pyplot


def save(plt, figure, path):
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    plt.close(figure)
    say(f"picture: {path}")


def embedded(plt, figure):
    """The figure as base64, for an <img> that carries its own bytes."""
    data = io.BytesIO()
    figure.savefig(data, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return base64.b64encode(data.getvalue()).decode()


# ---- evaluate ------------------------------------------------------------------------------------

def mask_rate_curves(path, curves, length, name):
    """{block: [(share hidden up to, CE)]}: what a hidden token costs, by the share that is hidden.
    """
    plt = pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for block, curve in curves.items():
        if curve:
            rule = "T" if int(block) >= length else block
            shares = [share for share, _ in curve]
            costs = [cost for _, cost in curve]
            axes.plot(shares, costs, marker="o", markersize=3, label=f"block {rule}")
    axes.set(
        xlabel="share of the block that is hidden (up to)",
        ylabel="cross-entropy of hidden tokens, nats",
        xlim=(0, 1.02),
        title=f"What a hidden token costs: {name}",
    )
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    save(plt, figure, path)


# ---- run_experiments -----------------------------------------------------------------------------

def learning_curves(plt, groups, column, label):
    """{variant: its lines of results.jsonl} -> validation by tokens and by seconds, as base64: the
    mean over seeds as a line, their range as a band. Without step 0.

    column: which figure of a line's curve is drawn; label: its axis.
    """
    figure, (by_tokens, by_seconds) = plt.subplots(
        1, 2, figsize=(12, 4.4), sharey=True, gridspec_kw={"wspace": 0.08}
    )
    for number, (variant, runs) in enumerate(groups.items()):
        colour = f"C{number % COLOURS}"
        line_style = LINE_STYLES[number // COLOURS % len(LINE_STYLES)]

        # the steps that all seeds were validated at
        points = []
        for run in runs:
            known = [row for row in run["curve"] if row[0] and row[column] is not None]
            points.append({row[0]: row for row in known})
        steps = sorted(set.intersection(*map(set, points)))
        heights = [[seed[step][column] for seed in points] for step in steps]
        means = [statistics.fmean(values) for values in heights]

        for axes, along, scale in ((by_tokens, 1, 1e6), (by_seconds, 2, 1)):
            x = [statistics.fmean(seed[step][along] for seed in points) / scale for step in steps]
            axes.plot(
                x,
                means,
                color=colour,
                label=variant,
                marker="o",
                markersize=3,
                linestyle=line_style,
            )
            if len(runs) > 1:
                lowest = [min(values) for values in heights]
                highest = [max(values) for values in heights]
                axes.fill_between(x, lowest, highest, color=colour, alpha=0.15, linewidth=0)
    by_tokens.set(xlabel="tokens of training, millions", ylabel=label, title="by tokens")
    by_seconds.set(xlabel="seconds of training", title="by seconds")
    for axes in (by_tokens, by_seconds):
        axes.grid(alpha=0.3)
    by_seconds.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return embedded(plt, figure)


def final_bounds(plt, ends, label):
    """{variant: (values of its seeds, error of their mean)}, the reference first -> the end of
    every variant, as base64: mean with its error, and every seed as a point.
    """
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.42 * len(ends)))
    for at, (values, error) in enumerate(ends.values()):
        colour = "C0" if len(values) > 1 else "C7"
        mean = statistics.fmean(values)
        axes.errorbar(mean, at, xerr=error, fmt="o", capsize=4, color=colour)
        axes.plot(values, [at] * len(values), "|", color="black", markersize=9, alpha=0.6)
    reference, _ = next(iter(ends.values()))
    axes.axvline(statistics.fmean(reference), color="C3", linewidth=0.8, linestyle="--")
    axes.set(
        yticks=range(len(ends)),
        yticklabels=list(ends),
        xlabel=label,
        ylim=(len(ends) - 0.5, -0.5),
    )
    axes.grid(alpha=0.3, axis="x")
    return embedded(plt, figure)
