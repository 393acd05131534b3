"""One thread owns the model. It writes one request after the other; the others wait in a queue.

    worker = Worker(model, most_waiting)
    worker.submit(job)          # from any thread; a Refused with 429 if too many wait
    event = job.events.get()    # Step, Block, ... and Done or Failed at the end
    worker.cancel(job)          # it leaves the queue, or ends behind the forward in progress
    worker.run()                # the owner's loop, until close()

Used by serving/server.py, a thread for each client, and by serve.py, whose main thread runs it.
The rows of one request are one batch. Rows of different requests are never in one batch: that would
pay left to right alone, and only for prompts of equal length and equal settings (docs/SERVE.md).
"""
import queue
import threading
import time
import traceback
from collections import deque
from typing import NamedTuple

import numpy as np

from common.console import UserError, say
from sampling import decode
from serving.errors import Refused

RETRY = "the server is busy: try again in a moment"
ENDING = "the server is being stopped"


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
    result: decode.Result


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
        self.cancelled = False
        self.forwards = 0
        self.started = None
        self.events = queue.SimpleQueue()

    def write(self, model):
        """-> Result. Cancelled is raised after the forward during which somebody asked for it."""
        if self.cancelled:
            raise Cancelled
        if self.fills:
            return decode.infill(
                model, self.prompts[0], self.settings, self.seeds, self.after_forward
            )
        return decode.generate(
            model, self.prompts, self.settings, self.seeds, self.after_forward, self.after_block
        )

    def after_forward(self, canvas, lo, hi, step):
        """on_step of the decode loop."""
        if self.cancelled:
            raise Cancelled
        self.forwards += 1
        if self.watched:
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


class Worker:
    """The queue before the model, and the loop that empties it."""

    def __init__(self, model, most_waiting, metrics):
        self.model = model
        self.most_waiting = most_waiting
        self.metrics = metrics
        self.waiting = deque()
        self.busy = False
        self.closed = False
        self.changed = threading.Condition()

    def submit(self, job):
        """Put a job at the end of the queue."""
        with self.changed:
            if self.closed:
                raise Refused(503, ENDING)
            if len(self.waiting) >= self.most_waiting:
                raise Refused(429, RETRY, code="queue_full")
            self.waiting.append(job)
            self.changed.notify()

    def cancel(self, job):
        """Nobody waits for this job any more; nothing happens if it is done."""
        job.cancelled = True
        with self.changed:
            if job in self.waiting:
                self.waiting.remove(job)

    def close(self):
        """Whoever waits is told that nothing comes."""
        with self.changed:
            self.closed = True
            for job in self.waiting:
                job.events.put(Failed(Refused(503, ENDING)))
            self.waiting.clear()
            self.changed.notify()

    def run(self):
        """Write what comes, until the worker is closed."""
        while True:
            job = self.next_job()
            if job is None:
                return
            self.busy = True
            self.do(job)
            self.busy = False

    def next_job(self):
        """Wait for a job; None when the worker is closed."""
        with self.changed:
            while not self.waiting and not self.closed:
                self.changed.wait(1)        # not for ever: Ctrl-C is looked at in between
            if self.closed:
                return None
            return self.waiting.popleft()

    def do(self, job):
        """Write one job. Whatever goes wrong is its client's answer, and the others go on."""
        job.started = time.perf_counter()
        try:
            result = job.write(self.model)
            end = Done(result)
            self.metrics.count("texts", len(result.rows))
            self.metrics.count("tokens", sum(map(len, result.full_rows)))
        except Cancelled:
            end = Failed(Refused(503, "cancelled"))
            self.metrics.count("cancelled")
        except UserError as error:
            end = Failed(Refused(400, str(error).replace("--", "")))
        except KeyboardInterrupt:
            job.events.put(Failed(Refused(503, ENDING)))
            raise
        except Exception as error:
            # its message could quote the text, so only the place is printed
            place = traceback.extract_tb(error.__traceback__)[-1]
            say(f"error: {type(error).__name__} at {place.filename}:{place.lineno}")
            end = Failed(Refused(500, "the model failed on this request"))
        self.metrics.count("forwards", job.forwards)
        self.metrics.count("seconds", job.seconds)
        job.events.put(end)
