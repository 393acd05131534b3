"""The length of a training row as a function of the step, and how many steps make a token budget.

    lengths = Lengths.of(512, "512@0,1024@2000")   # --seq_len, --seq_schedule
    lengths.at(2000)                               # 1024: the step after 2,000 completed ones
    lengths.tokens(20_000, rows=16)                # of all steps together
    lengths.steps_for(10**10, rows=16)             # the fewest steps that reach so many tokens

Used by whoever plans a training. No torch and no numpy: a plan has to be instant.
"""
import re
from typing import NamedTuple

SHORTEST = 16               # tokens of a training row
MOST_STEPS = 50_000_000     # that a token budget may be solved for
ENTRY = re.compile(r" *([0-9]{1,15}) *@ *([0-9]{1,15}) *")


class Stage(NamedTuple):
    """Steps that share a length: begin completed ones up to, but not including, end."""
    begin: int
    end: int
    length: int


class Lengths(NamedTuple):
    """entries: ((step, length), ...), the first at step 0; each holds until the next one.

    keep: a step has as many tokens as at the first length, so that longer rows are fewer rows.
    """
    entries: tuple
    keep: bool = False

    @classmethod
    def of(cls, seq_len, schedule=None, keep=False):
        """seq_len holds before the first entry of the schedule, which is None or text that
        read_schedule accepts.
        """
        entries = read_schedule(schedule) if schedule else ()
        if not entries or entries[0][0] > 0:
            entries = ((0, seq_len), *entries)
        return cls(entries, keep)

    def at(self, step):
        """The length in force after so many completed steps."""
        return [length for begin, length in self.entries if begin <= step][-1]

    def stages(self, steps):
        """The Stages of a run of so many steps; what it never reaches is left out."""
        ends = [begin for begin, _ in self.entries[1:]]
        found = []
        for (begin, length), end in zip(self.entries, [*ends, steps], strict=True):
            if begin < steps:
                found.append(Stage(begin, min(end, steps), length))
        return found

    def longest(self, steps):
        """The longest length of a run of so many steps; of none: that of the first."""
        return max(stage.length for stage in self.stages(max(steps, 1)))

    def rows(self, length, rows):
        """Rows of a step with this length, if the first length has so many."""
        if not self.keep:
            return rows
        return rows * self.entries[0][1] // length

    def step_tokens(self, length, rows):
        return self.rows(length, rows) * length

    def tokens(self, steps, rows):
        """Tokens of a run of so many steps."""
        return sum(
            (stage.end - stage.begin) * self.step_tokens(stage.length, rows)
            for stage in self.stages(steps)
        )

    def steps_for(self, target, rows):
        """The fewest steps that reach so many tokens; None if they are more than MOST_STEPS."""
        left = target
        for begin, end, length in self.stages(MOST_STEPS):
            each = self.step_tokens(length, rows)
            if left <= (end - begin) * each:
                return begin + -(-left // each)
            left -= (end - begin) * each
        return None

    def uneven(self, rows):
        """With keep: [(length, tokens of a first step)] where no whole number of rows keeps it."""
        if not self.keep:
            return []
        whole = rows * self.entries[0][1]
        return [(length, whole) for _, length in self.entries if whole % length]

    def falls(self):
        """[(step, length before, length)] where rows become shorter."""
        pairs = zip(self.entries, self.entries[1:], strict=False)
        return [(step, was, now) for (_, was), (step, now) in pairs if now < was]

    def never_reached(self, steps):
        """[(step, length)] of the entries that a run of so many steps never comes to."""
        return [(step, length) for step, length in self.entries[1:] if step >= steps]

    def __str__(self):
        return ",".join(f"{length}@{step}" for step, length in self.entries)


def read_schedule(text, most=None):
    """"512@0, 1024@2000" -> ((0, 512), (2000, 1024)): LENGTH@STEP, where STEP is the number of
    completed steps.

    most: the longest length that is allowed. A ValueError quotes the part that is wrong.
    """
    entries = []
    for part in text.split(","):
        found = ENTRY.fullmatch(part)
        if not found:
            raise ValueError(
                f"{part[:40]!r} is not LENGTH@STEP, two whole numbers: write it as 512@0,1024@2000"
            )
        length, step = int(found[1]), int(found[2])
        if length < SHORTEST:
            raise ValueError(f"{part!r}: a length of {length} is below {SHORTEST}")
        if most is not None and length > most:
            raise ValueError(f"{part!r}: a length of {length} is above --max_context {most}")
        if entries and step <= entries[-1][0]:
            raise ValueError(
                f"{part!r}: step {step} does not come after step {entries[-1][0]}, the one before"
            )
        entries.append((step, length))
    return tuple(entries)


def warnings(lengths, steps):
    """What a person should know of a schedule before a run of so many steps: [sentence]."""
    found = []
    for step, was, now in lengths.falls():
        if step < steps:
            found.append(
                f"--seq_schedule: rows become shorter at step {step}, {was} -> {now} tokens"
            )
    for step, length in lengths.never_reached(steps):
        found.append(
            f"--seq_schedule: {length}@{step} is never reached, the run ends at step {steps}"
        )
    return found
