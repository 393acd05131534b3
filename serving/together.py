"""Requests of several clients that the model writes as one batch.

    if can_join(first, other): ...
    results = Together(jobs).write(model)         # a Result for each job

Left to right, many rows cost little more than one (docs/SERVE.md has the figures); in blocks
nothing is gained. The decode loop takes rows of one prompt length under the same settings. Each row
has a seed of its own, and its text is the one that it would be alone: no row sees another.

Used by serving/worker.py.
"""
from sampling import decode
from serving.job import Block, Cancelled

MOST_ROWS = 16


def can_join(job, other):
    """May these be written as one batch?"""
    return (
        job.joins
        and other.joins
        and len(job.prompts[0]) == len(other.prompts[0])
        and job.settings == other.settings
    )


class Together:
    """Jobs whose rows are one batch, and which of its rows are whose."""

    def __init__(self, jobs):
        self.jobs = jobs
        self.rows = []                    # of the batch: (job, which of its rows)
        for job in jobs:
            self.rows += [(job, number) for number in range(len(job.prompts))]
        self.cut = set()                  # jobs that were left before their end
        self.forwards = 0

    def write(self, model):
        """-> a Result for each job, None for one that was left. Cancelled is raised when nobody
        waits any more.
        """
        prompts = [job.prompts[number] for job, number in self.rows]
        seeds = [job.seeds[number] for job, number in self.rows]
        whole = decode.generate(
            model, prompts, self.jobs[0].settings, seeds, self.after_forward, self.after_block
        )
        return [self.part(whole, job) for job in self.jobs]

    def part(self, whole, job):
        """What of the batch's Result is this job's."""
        if job in self.cut:
            return None
        places = [place for place, (owner, _) in enumerate(self.rows) if owner is job]
        rows = [whole.rows[place] for place in places]
        full_rows = [whole.full_rows[place] for place in places]
        job.tokens = sum(map(len, full_rows))
        return decode.Result(rows, full_rows, forwards=job.forwards, seconds=whole.seconds)

    def after_forward(self, canvas, lo, hi, step):
        """on_step of the decode loop."""
        if all(job.cancelled for job in self.jobs):
            raise Cancelled
        self.forwards += 1
        writing = [self.rows[place][0] for place in canvas.numbers]
        for job in self.jobs:
            if job in writing:
                job.forwards += 1

    def after_block(self, canvas, lo, hi):
        """on_block of the decode loop. The rows of a job that nobody waits for leave the batch."""
        for at, place in enumerate(canvas.numbers):
            job, number = self.rows[place]
            job.events.put(Block(number, canvas.ids[at, lo:hi].tolist()))
            if job.cancelled and not canvas.done[at]:
                canvas.done[at] = True
                self.cut.add(job)
