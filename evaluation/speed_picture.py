"""Quality against speed: the picture of edge_benchmark --grid.

    speed_picture.draw(path, lines, real, peers, caption)

A line for each rule with its name at its fast end, the value of the joined setting at every point,
and behind them the frontier: what no other setting beats in both. Lower right is best. Other
engines (--peer) are stars, or vertical lines where only their speed is known.
"""
import math
from dataclasses import dataclass

from common.console import say
from evaluation.labels import Board
from evaluation.plots import DPI, pyplot, save

WIDTH = 9                       # inches
ABOVE = 0.95                    # inches of title above the axes
BELOW = 0.62                    # inches of text below them, without
ENTRY = 0.19                    # inches for each line of the legend
MARKER = 5.5                    # points
LEADER = 22                     # pixels: a name further from its point than this gets a thin line
LETTER = 0.013                  # width of a letter of a name, as a share of the points' range
LOGARITHMIC = 4                 # from this ratio of speeds on, the axis is logarithmic
PEER_COLOUR = "black"
FRONTIER_COLOUR = "#f5e3ab"
RULE_COLOURS = (
    "#0b57d0", "#c2410c", "#15803d", "#9333ea", "#0e7490", "#be185d", "#854d0e", "#475569",
)
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))


@dataclass
class Label:
    """A text that belongs to a point of the picture."""
    text: str
    point: tuple            # (tokens/s, nats)
    colour: object
    is_name: bool = False   # of a line or an engine; else the value at a point


def draw(path, lines, real, peers, caption):
    """lines: [grid.Line]; real: nats/token of held-out text, or None; peers: [peer_figures.Peer];
    caption: one line that says what was measured.
    """
    if not lines:
        say("notice: no picture, as no text was judged")
        return
    plt = pyplot()
    if plt is not None:
        save(plt, figure_of(plt, lines, real, peers, caption), path)


def figure_of(plt, lines, real, peers, caption):
    """The picture as a figure of matplotlib."""
    below = BELOW + ENTRY * (2 + len(peers))
    height = max(4.8, 2.8 + 0.22 * (len(lines) + len(peers))) + below
    figure, axes = plt.subplots(figsize=(WIDTH, height), dpi=DPI)
    figure.subplots_adjust(
        left=0.08, right=0.985, bottom=below / height, top=1 - ABOVE / height
    )
    set_scales(axes, lines, real, peers)
    axes.set_xlabel("tokens/s, prompt included (further right: faster)")
    axes.set_ylabel("nats/token under an n-gram model (lower: likelier text)")
    axes.grid(color="0.93", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

    # From the back to the front
    best = frontier([point for line in lines for point in line.points])
    explained = [draw_frontier(axes, best)]
    if real is not None:
        explained.append(draw_held_out(axes, real))
    looks = looks_of(plt, lines)
    for line in lines:
        draw_line(axes, line, best, *looks[line.name])
    explained += [draw_peer(axes, peer) for peer in peers]

    # The text
    figure.canvas.draw()
    board = board_of(axes, lines, real, peers)
    wanted = [*names_of(axes, lines, peers, looks), *values_of(lines, best, looks)]
    for label in wanted:
        write_label(axes, board, label)
    write_title(figure, caption, lines)
    legend = figure.legend(
        handles=explained, loc="lower left", bbox_to_anchor=(0.07, 0), fontsize=9, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


# ---- scales and looks ----------------------------------------------------------------------------

def set_scales(axes, lines, real, peers):
    """Room for every point, and to the right of them for names."""
    speeds = [speed for line in lines for _, speed, _ in line.points]
    speeds += [peer.tok_s for peer in peers]
    slowest = min(speeds)
    fastest = max(speeds)
    longest = max([len(line.name) for line in lines] + [len(peer.name) for peer in peers])
    beside = 0.05 + LETTER * min(longest, 30)
    ratio = fastest / slowest
    if ratio >= LOGARITHMIC:
        left = slowest / ratio ** 0.06
        right = fastest * ratio ** beside
        axes.set_xscale("log")
        axes.minorticks_off()
        ticks = round_numbers(left, right)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlim(left, right)
    else:
        room = max(fastest - slowest, 0.1 * fastest)
        axes.set_xlim(max(0, slowest - 0.06 * room), fastest + beside * room)

    costs = [nats for line in lines for _, _, nats in line.points]
    costs += [peer.nats for peer in peers if peer.nats is not None]
    if real is not None:
        costs.append(real)
    room = max(max(costs) - min(costs), 0.5)
    axes.set_ylim(min(costs) - 0.08 * room, max(costs) + 0.1 * room)


def round_numbers(low, high):
    """1, 2, 5, 10, 20, 50, ... between two positive numbers."""
    found = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for digit in (1, 2, 5):
            if low <= digit * 10.0 ** power <= high:
                found.append(digit * 10.0 ** power)
    return found


def looks_of(plt, lines):
    """{name of a line: (colour, style)}: a colour for each rule, a style for each line of a rule;
    if there is one rule only, a colour for each line.
    """
    groups = {}
    for line in lines:
        groups.setdefault(line.rule, []).append(line)
    if len(groups) == 1:
        groups = {line.name: [line] for line in lines}

    colours = RULE_COLOURS
    if len(groups) > len(colours):
        shades = [(number + 0.5) / len(groups) for number in range(len(groups))]
        # darker, as yellow names are not read on white
        colours = [tuple(colour[:3]) for colour in 0.8 * plt.cm.turbo(shades)]
    looks = {}
    for colour, group in zip(colours, groups.values(), strict=False):
        for number, line in enumerate(group):
            looks[line.name] = colour, LINE_STYLES[number % len(LINE_STYLES)]
    return looks


# ---- what is drawn -------------------------------------------------------------------------------

def frontier(points):
    """Of (value, speed, nats) those that no other beats in both, the fastest first."""
    kept = []
    for point in sorted(points, key=lambda point: (-point[1], point[2])):
        if not kept or point[2] < kept[-1][2]:
            kept.append(point)
    return kept


def draw_frontier(axes, best):
    """A staircase: at least so fast, nothing is likelier. Its ends go on to the edges."""
    speeds = [speed for _, speed, _ in best]
    costs = [nats for _, _, nats in best]
    left, _ = axes.get_xlim()
    _, top = axes.get_ylim()
    [band] = axes.step(
        [speeds[0], *speeds, left],
        [top, *costs, costs[-1]],
        where="post",
        linewidth=8,
        color=FRONTIER_COLOUR,
        zorder=1,
        label="frontier: no other setting is both faster and likelier (its points are filled)",
    )
    return band


def draw_held_out(axes, real):
    return axes.axhline(
        real,
        linestyle=(0, (6, 4)),
        linewidth=1,
        color="0.45",
        zorder=1.5,
        label=f"held-out text: {real:.2f} (likelier text is no better: it tends to repeat itself)",
    )


def draw_line(axes, line, best, colour, style):
    speeds = [speed for _, speed, _ in line.points]
    costs = [nats for _, _, nats in line.points]
    axes.plot(speeds, costs, linestyle=style, linewidth=1.4, color=colour, zorder=2)
    for point in line.points:
        _, speed, nats = point
        inside = "white"
        if point in best:
            inside = colour
        axes.plot(
            speed,
            nats,
            "o",
            markersize=MARKER,
            markeredgewidth=1.3,
            markeredgecolor=colour,
            markerfacecolor=inside,
            zorder=3,
        )


def draw_peer(axes, peer):
    """A star, or a vertical line where only the speed is known."""
    said = f"{peer.name}: {peer.tok_s:.4g} tokens/s"
    if peer.note:
        said += f", {peer.note}"
    if peer.nats is None:
        said += " (speed only)"
        return axes.axvline(
            peer.tok_s, linestyle=":", linewidth=1.6, color=PEER_COLOUR, zorder=1.5, label=said
        )
    [star] = axes.plot(
        peer.tok_s,
        peer.nats,
        "*",
        markersize=13,
        color=PEER_COLOUR,
        linestyle="none",
        zorder=4,
        label=said,
    )
    return star


# ---- what is written -----------------------------------------------------------------------------

def board_of(axes, lines, real, peers):
    """The axes in pixels, with everything that a label should keep clear of."""
    board = Board(*axes.get_window_extent().extents)

    def in_pixels(points):
        return axes.transData.transform(points).tolist()

    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    marker = (MARKER + 2) * DPI / 72
    for line in lines:
        places = in_pixels([(speed, nats) for _, speed, nats in line.points])
        board.add_path(places)
        for place in places:
            board.add_point(*place, marker)
    for peer in peers:
        if peer.nats is None:
            board.add_path(in_pixels([(peer.tok_s, bottom), (peer.tok_s, top)]))
        else:
            board.add_point(*in_pixels((peer.tok_s, peer.nats)), 2 * marker)
    if real is not None:
        board.add_path(in_pixels([(left, real), (right, real)]))
    return board


def names_of(axes, lines, peers, looks):
    """The names of the engines and of the lines, each at its fast end."""
    found = []
    bottom, top = axes.get_ylim()
    for peer in peers:
        height = peer.nats
        if height is None:
            height = top - 0.05 * (top - bottom)
        found.append(Label(peer.name, (peer.tok_s, height), PEER_COLOUR, is_name=True))
    for line in lines:
        colour, _ = looks[line.name]
        _, speed, nats = max(line.points, key=lambda point: point[1])
        found.append(Label(line.name, (speed, nats), colour, is_name=True))
    return found


def values_of(lines, best, looks):
    """The values at the points, those of the frontier first, as there may be no room for all."""
    first = []
    others = []
    for line in lines:
        if len(line.points) < 2:
            continue
        colour, _ = looks[line.name]
        for point in line.points:
            value, speed, nats = point
            label = Label(value, (speed, nats), colour)
            if point in best:
                first.append(label)
            else:
                others.append(label)
    return first + others


def write_label(axes, board, label):
    """A value without a free place beside its point is left out. A name may stand further away, at
    the end of a thin line.
    """
    size = 8.5
    weight = "normal"
    if label.is_name:
        size = 9.5
        weight = "bold"
    text = axes.annotate(
        label.text,
        (0, 0),
        xycoords="figure pixels",
        fontsize=size,
        weight=weight,
        color=label.colour,
        va="bottom",
        zorder=2.5,
        parse_math=False,
        annotation_clip=False,
    )
    text.set_in_layout(False)
    extent = text.get_window_extent()
    anchor = axes.transData.transform(label.point)
    box = board.place(anchor, extent.width, extent.height, near_only=not label.is_name)
    if box is None:
        text.remove()
        return
    left, bottom, right, top = box
    text.set_position((left, bottom))
    text.set_bbox(dict(facecolor="white", alpha=0.7, linewidth=0, pad=0.5))

    end = (min(max(anchor[0], left), right), min(max(anchor[1], bottom), top))
    if math.dist(anchor, end) > LEADER:
        axes.annotate(
            "",
            label.point,
            end,
            textcoords="figure pixels",
            arrowprops=dict(arrowstyle="-", linewidth=0.8, color=label.colour, shrinkA=0),
            zorder=1.8,
        )


def write_title(figure, caption, lines):
    height = figure.get_figheight()
    figure.text(
        0.012, 1 - 0.1 / height, "Quality against speed", fontsize=13, weight="bold", va="top"
    )
    meaning = numbers_mean(lines)
    if meaning:
        caption += f"\nNumbers at the points: {meaning}"
    figure.text(
        0.012,
        1 - 0.4 / height,
        caption,
        fontsize=9,
        color="0.3",
        va="top",
        linespacing=1.4,
        parse_math=False,
    )


def numbers_mean(lines):
    """"steps", or "steps (confidence, margin), threshold (factor)" where the rules differ."""
    rules = {}
    for line in lines:
        if line.axis and len(line.points) > 1:
            rules.setdefault(line.axis, []).append(line.rule)
    if len(rules) == 1:
        return next(iter(rules))
    parts = []
    for axis, names in rules.items():
        parts.append(f"{axis} ({', '.join(dict.fromkeys(names))})")
    return ", ".join(parts)
