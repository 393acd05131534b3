"""One thread owns the model. It writes one request after the other; the others wait in a queue.
Texts from left to right share their forwards with those of other requests.

    worker = Worker(model, most_waiting, parallel, metrics)
    worker.submit(job)          # from any thread; a Refused with 429 if too many wait
    event = job.events.get()    # serving/job.py
    worker.cancel(job)          # it leaves the queue, or ends behind the forward in progress
    worker.run()                # the owner's loop, until close()

Used by serving/server.py, a thread for each client, and by serve.py, whose main thread runs it.
In blocks, the rows of one request are a batch of their own: there a larger one would gain nothing
(docs/SERVE.md).
"""
import threading
import time
import traceback
from collections import deque

from common.console import UserError, say
from sampling.together import Batch
from serving.errors import Refused
from serving.job import Cancelled, Done, Failed

RETRY = "the server is busy: try again in a moment"
ENDING = "the server is being stopped"


class Worker:
    """The queue before the model, and the loop that empties it.

    parallel: texts from left to right that are written at once, at most.
    """

    def __init__(self, model, most_waiting, parallel, metrics):
        self.model = model
        self.most_waiting = most_waiting
        self.parallel = parallel
        self.metrics = metrics
        self.batch = Batch(model)
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
            started = time.perf_counter()
            if self.shares(job):
                self.write_together(job)
            else:
                self.write_alone(job)
            self.metrics.count("seconds", time.perf_counter() - started)
            self.busy = False

    def next_job(self):
        """Wait for a job; None when the worker is closed."""
        with self.changed:
            while not self.waiting and not self.closed:
                self.changed.wait(1)        # not for ever: Ctrl-C is looked at in between
            if self.closed:
                return None
            return self.waiting.popleft()

    def shares(self, job):
        """May its texts be written beside others?"""
        return self.parallel > 1 and job.joins and self.batch.takes(job.settings)

    def end(self, job, event):
        """The last event of a job."""
        if isinstance(event, Done):
            self.metrics.count("texts", job.texts)
            self.metrics.count("tokens", job.tokens)
        elif job.cancelled:
            self.metrics.count("cancelled")
        job.events.put(event)

    # ---- a request by itself ---------------------------------------------------------------------

    def write_alone(self, job):
        """Write one job. Whatever goes wrong is its client's answer, and the others go on."""
        job.started = time.perf_counter()
        try:
            end = Done(job.write(self.model))
        except Exception as error:
            end = failure(error)
        except KeyboardInterrupt:
            job.events.put(Failed(Refused(503, ENDING)))
            raise
        self.metrics.count("forwards", job.forwards)
        self.end(job, end)

    # ---- requests in one batch -------------------------------------------------------------------

    def write_together(self, job):
        """Write a job, and beside it those of its kind that come meanwhile; one of another kind
        lets no more of them in, so that its turn comes.
        """
        try:
            while job:
                self.take_in(job)
                job = self.next_beside()
                while self.batch.texts and not job:
                    self.one_token_each()
                    job = self.next_beside()
        except KeyboardInterrupt:
            for job in self.jobs():
                job.events.put(Failed(Refused(503, ENDING)))
            raise

    def jobs(self):
        """Those whose texts are in the batch."""
        return list(dict.fromkeys(text.owner for text in self.batch.texts))

    def next_beside(self):
        """The next job of the queue, if there is room for it in the batch; or None."""
        with self.changed:
            if not self.waiting or self.closed:
                return None
            job = self.waiting[0]
            texts = len(self.batch.texts) + len(job.prompts)
            if not self.shares(job) or (self.batch.texts and texts > self.parallel):
                return None
            return self.waiting.popleft()

    def take_in(self, job):
        """The texts of this job join the batch, each with its first token."""
        job.started = time.perf_counter()
        texts = job.rows()
        try:
            for text in texts:
                if job.cancelled:
                    raise Cancelled
                self.metrics.count("forwards")
                self.batch.join(text)
                self.tell(text)
        except Exception as error:
            self.give_up(job, error)
            return
        self.end_if_written(texts)

    def one_token_each(self):
        """One forward for all texts of the batch."""
        for job in self.jobs():
            if job.cancelled:
                self.give_up(job, Cancelled())
        if not self.batch.texts:
            return
        self.metrics.count("forwards")
        try:
            written = self.batch.forward()
        except Exception as error:
            for job in self.jobs():
                self.give_up(job, error)
            return
        failed = {text.owner: error for text, error in written if error}
        for job, error in failed.items():
            self.give_up(job, error)
        sound = [text for text, _ in written if text.owner not in failed]
        for text in sound:
            self.tell(text)
        self.end_if_written(sound)

    def tell(self, text):
        """The events of a text's newest token."""
        job = text.owner
        job.forwards = max(job.forwards, text.canvas.forwards[0])
        if job.watched and text.row == 0:
            job.after_watched(text.canvas, text.end - 1, text.end)
        job.after_block(text.canvas, text.end - 1, text.end)

    def end_if_written(self, texts):
        """These texts have told their newest tokens: a job whose rows are all written ends."""
        for job, result in {text.owner: text.result for text in texts}.items():
            if None not in result.rows:
                result.seconds = job.seconds
                job.tokens = sum(map(len, result.full_rows))
                self.end(job, Done(result))

    def give_up(self, job, error):
        """A job ends with this error."""
        self.batch.leave({text for text in self.batch.texts if text.owner is job})
        self.end(job, failure(error))


def failure(error):
    """What the client is told whose request has ended with this error."""
    if isinstance(error, Cancelled):
        return Failed(Refused(503, "cancelled"))
    if isinstance(error, UserError):
        return Failed(Refused(400, str(error).replace("--", "")))
    # its message could quote the text, so only the place is printed
    place = traceback.extract_tb(error.__traceback__)[-1]
    say(f"error: {type(error).__name__} at {place.filename}:{place.lineno}")
    return Failed(Refused(500, "the model failed on this request"))
