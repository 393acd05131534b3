"""--live rich: the run as one picture on the terminal, redrawn in place; lines go by above it.

    view = View("checkpoints/nano: primary, 3,000,000 parameters")
    view.show(progress, loss=3.2, ...)      # after each step; drawn PER_SECOND times at most
    view.scored(progress, 3.1)              # after each evaluation
    view.close()                            # the last picture stays

Used by training/logs.py, which imports it for --live rich alone. It draws from the training's own
thread, so nothing is drawn in the middle of a step, and a terminal that is gone raises OSError.
"""
import statistics
import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PER_SECOND = 2
HIGH = 6            # lines of the curve
LOWEST = 18         # lines of a terminal that has room for a curve
MOST = 4000         # points of a curve that are kept
# the dots of a braille letter, its two columns from top to bottom, as bits
LEFT = (0x01, 0x02, 0x04, 0x40)
RIGHT = (0x08, 0x10, 0x20, 0x80)
EMPTY = 0x2800


class View:
    """The picture: how far, the figures of the last step, the curve of the loss."""

    def __init__(self, title):
        self.title = Text(title)
        self.console = Console(file=sys.stderr)
        self.losses = []                    # (step, loss)
        self.scores = []                    # (step, held-out figure)
        self.last = None                    # the figures of the last step
        self.drawn = 0.0
        # say() writes to sys.stderr, which is rich's while the picture stands
        self.live = Live(
            self.frame(Text("the first step is on its way")), console=self.console,
            auto_refresh=False, redirect_stdout=False,
        )
        self.live.start(refresh=True)

    def show(self, progress, loss, **figures):
        self.losses = with_point(self.losses, progress.done, loss)
        self.last = dict(loss=loss, **figures)
        now = time.monotonic()
        if now - self.drawn >= 1 / PER_SECOND or progress.done == progress.total:
            self.drawn = now
            self.draw(progress)

    def scored(self, progress, nats):
        """There is a new held-out figure."""
        self.scores = with_point(self.scores, progress.done, nats)
        if self.last:
            self.draw(progress)

    def draw(self, progress):
        parts = [way(progress), Text(), self.table(progress, **self.last)]
        if self.losses and self.console.height >= LOWEST:
            parts += [Text(), self.chart()]
        subtitle = "Ctrl-C saves and leaves" if progress.done < progress.total else None
        self.live.update(self.frame(Group(*parts), subtitle), refresh=True)

    def close(self):
        self.live.stop()

    def frame(self, inside, subtitle=None):
        return Panel(inside, title=self.title, subtitle=subtitle, border_style="dim")

    def table(self, progress, loss, gnorm, mask, mfu, memory, lr):
        """The figures of the last step, and the held-out one."""
        held = "not yet"
        best = ""
        if self.scores:
            held = f"{self.scores[-1][1]:.4f}"
            step, lowest = min(self.scores, key=lambda score: score[1])
            best = f"{lowest:.4f} at step {step:,}"
        rows = (
            ("loss", f"{loss:.4f}", "gradient norm", f"{gnorm:.2f}"),
            (f"held-out {progress.measure}", held, "learning rate", f"{lr:.1e}"),
            ("best", best, "masked", f"{mask:.0%}"),
            ("tokens/s", f"{progress.tok_s:,.0f}", "memory", f"{memory / 1024:.1f} GB"),
            ("MFU", f"{mfu:.0%}", "to go", progress.eta),
        )
        grid = Table.grid(padding=(0, 2), expand=True)
        for style in ("dim", "bold", "dim", "bold"):
            grid.add_column(style=style)
        for row in rows:
            grid.add_row(*row)
        return grid

    def chart(self):
        """The loss of all steps, with its highest and lowest figure at the side."""
        wide = max(10, self.console.width - 14)
        lines, low, high = curve(self.losses, wide, HIGH)
        grid = Table.grid(padding=(0, 1))
        grid.add_column(style="dim", justify="right", min_width=7)
        grid.add_column(style="cyan")
        for i, line in enumerate(lines):
            label = {0: f"{high:.2f}", HIGH - 1: f"{low:.2f}"}.get(i, "")
            grid.add_row(label, line)
        first, last = self.losses[0][0], self.losses[-1][0]
        grid.add_row("loss", Text(f"steps {first:,} to {last:,}", style="dim white"))
        return grid


def way(progress):
    """The bar and how far it is."""
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(ratio=1)
    grid.add_column()
    share = progress.done / progress.total
    grid.add_row(
        ProgressBar(total=progress.total, completed=progress.done, complete_style="cyan"),
        Text(f"step {progress.done:,} of {progress.total:,}, {share:.0%}"),
    )
    return grid


def with_point(points, step, y):
    """The points before this step and this one; of too many, neighbours become their mean. A figure
    that is not finite leaves a gap.
    """
    if points and points[-1][0] >= step:                # taken back by a rollback
        points = [point for point in points if point[0] < step]
    if y - y == 0:
        points.append((step, y))
    if len(points) <= MOST:
        return points
    pairs = zip(points[::2], points[1::2], strict=False)
    return [(later[0], (earlier[1] + later[1]) / 2) for earlier, later in pairs]


def curve(points, wide, high):
    """[(step, figure)] as so many lines of so many braille letters -> (lines, lowest, highest)."""
    columns = {}
    first = points[0][0]
    span = points[-1][0] - first + 1
    for step, y in points:
        columns.setdefault((step - first) * 2 * wide // span, []).append(y)
    means = {column: statistics.fmean(ys) for column, ys in columns.items()}
    low = min(means.values())
    top = max(means.values())

    # a column reaches from its own dot to its left neighbour's, so that the curve has no gaps
    dots = 4 * high - 1
    letters = [[EMPTY] * wide for _ in range(high)]
    before = None
    for column, y in means.items():
        row = round(dots * (top - y) / (top - low or 1))
        if before is None:
            before = row
        for dot in range(min(before, row), max(before, row) + 1):
            side = RIGHT if column % 2 else LEFT
            letters[dot // 4][column // 2] |= side[dot % 4]
        before = row
    return ["".join(map(chr, line)) for line in letters], low, top
