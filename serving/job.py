"""What the model has to write for one request, and the events that tell of it.

    job = Job(prompts, settings, seeds)
    event = job.events.get()        # Step, Block, ... and Done or Failed at the end

Used by serving/requests.py, which makes them, serving/worker.py, which writes them, and
serving/paths.py, whose clients wait for the events.
"""
import queue
import time
from typing import NamedTuple

import numpy as np

from sampling import decode
from sampling.together import Text
from serving.errors import Refused


class Step(NamedTuple):
    """The positions [lo, hi) of the first row after a forward."""
    lo: int
    hi: int
    ids: np.ndarray                   # (S,)
    chance: np.ndarray                # (S,)
    forwards: int
    seconds: float


class Block(NamedTuple):
    """Tokens of a row that are final."""
    row: int
    ids: list


class Done(NamedTuple):
    """All is written."""
    result: object                    # what the job's write returned


class Failed(NamedTuple):
    """Nothing more comes, and this is why."""
    error: Refused


class Cancelled(Exception):
    """Nobody waits for this text any more."""


class Job:
    """What the model has to write for one request, and the events that tell of it.

    prompts: ids per row; of a text with gaps (fills), the same ids for each row. watched: every
    forward of the first row is an event.
    """

    def __init__(self, prompts, settings, seeds, fills=False, watched=False):
        self.prompts = prompts
        self.settings = settings
        self.seeds = seeds
        self.fills = fills
        self.watched = watched
        self.joins = not fills            # are its rows those of Text?
        self.cancelled = False
        self.forwards = 0
        self.texts = len(seeds)
        self.tokens = 0                   # of the finished texts
        self.started = None
        self.events = queue.SimpleQueue()

    def rows(self):
        """Its rows for a batch with those of other jobs."""
        count = len(self.prompts)
        result = decode.Result([None] * count, [None] * count, row_forwards=[0] * count)
        return [
            Text(self, row, self.prompts, self.settings, self.seeds, result, self.watched)
            for row in range(count)
        ]

    def write(self, model):
        """-> Result. Cancelled is raised after the forward during which somebody asked for it."""
        if self.cancelled:
            raise Cancelled
        if self.fills:
            result = decode.infill(
                model, self.prompts[0], self.settings, self.seeds, self.after_forward
            )
        else:
            result = decode.generate(
                model, self.prompts, self.settings, self.seeds, self.after_forward, self.after_block
            )
        self.tokens = sum(map(len, result.full_rows))
        return result

    def after_forward(self, canvas, lo, hi, step):
        """on_step of the decode loop."""
        if self.cancelled:
            raise Cancelled
        self.forwards += 1
        if self.watched:
            self.after_watched(canvas, lo, hi)

    def after_watched(self, canvas, lo, hi):
        """The first row of a canvas after a forward."""
        ids = canvas.ids[0, lo:hi].copy()
        chance = canvas.chance[0, lo:hi].copy()
        self.events.put(Step(lo, hi, ids, chance, self.forwards, self.seconds))

    def after_block(self, canvas, lo, hi):
        """on_block of the decode loop."""
        for at, row in enumerate(canvas.numbers):
            self.events.put(Block(row, canvas.ids[at, lo:hi].tolist()))

    @property
    def seconds(self):
        """Since the model began with it."""
        return time.perf_counter() - self.started
