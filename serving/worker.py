"""One thread owns the model. It writes one request after the other; the others wait in a queue.

    worker = Worker(model, most_waiting, metrics)
    worker.submit(job)          # from any thread; a Refused with 429 if too many wait
    event = job.events.get()    # serving/job.py
    worker.cancel(job)          # it leaves the queue, or ends behind the forward in progress
    worker.run()                # the owner's loop, until close()

Used by serving/server.py, a thread for each client, and by serve.py, whose main thread runs it.
The rows of one request are one batch. Requests that wait and can join the first in the queue are
written with it (serving/together.py), if the model gives a row the same numbers in any batch.
"""
import threading
import time
import traceback
from collections import deque

from common.console import UserError, say
from serving.errors import Refused
from serving.job import Cancelled, Done, Failed
from serving.together import MOST_ROWS, Together, can_join

RETRY = "the server is busy: try again in a moment"
ENDING = "the server is being stopped"
CANCELLED = Failed(Refused(503, "cancelled"))


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
            jobs = self.next_jobs()
            if not jobs:
                return
            self.busy = True
            self.do(jobs)
            self.busy = False

    def next_jobs(self):
        """Wait for a job -> it and what is written with it; [] when the worker is closed."""
        with self.changed:
            while not self.waiting and not self.closed:
                self.changed.wait(1)        # not for ever: Ctrl-C is looked at in between
            if self.closed:
                return []
            first = self.waiting.popleft()
            jobs = [first]
            if not getattr(self.model, "exact_rows", False):
                return jobs
            rows = len(first.prompts)
            for job in list(self.waiting):
                if can_join(first, job) and rows + len(job.prompts) <= MOST_ROWS:
                    rows += len(job.prompts)
                    jobs.append(job)
                    self.waiting.remove(job)
            return jobs

    def do(self, jobs):
        """Write jobs as one batch. Whatever goes wrong is their clients' answer, and the others go
        on.
        """
        work = jobs[0]
        if len(jobs) > 1:
            work = Together(jobs)
        started = time.perf_counter()
        for job in jobs:
            job.started = started
        try:
            results = work.write(self.model)
            if work is jobs[0]:
                results = [results]
            ends = [Done(result) if result else CANCELLED for result in results]
        except Cancelled:
            ends = [CANCELLED] * len(jobs)
        except UserError as error:
            ends = [Failed(Refused(400, str(error).replace("--", "")))] * len(jobs)
        except KeyboardInterrupt:
            for job in jobs:
                job.events.put(Failed(Refused(503, ENDING)))
            raise
        except Exception as error:
            # its message could quote the text, so only the place is printed
            place = traceback.extract_tb(error.__traceback__)[-1]
            say(f"error: {type(error).__name__} at {place.filename}:{place.lineno}")
            ends = [Failed(Refused(500, "the model failed on this request"))] * len(jobs)
        self.metrics.count("forwards", work.forwards)
        self.metrics.count("seconds", time.perf_counter() - started)
        for job, end in zip(jobs, ends, strict=True):
            if end is CANCELLED:
                self.metrics.count("cancelled")
            elif isinstance(end, Done):
                self.metrics.count("texts", job.texts)
                self.metrics.count("tokens", job.tokens)
            job.events.put(end)
