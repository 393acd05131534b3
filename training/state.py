"""How far a run has come: what state.json holds besides tensors, and what one process remembers.

Used by training/setup.py, step.py, validation.py, saving.py and by the loop in train.py.
"""
import math
from dataclasses import dataclass, field
from typing import NamedTuple


class Reached(NamedTuple):
    """The counters after the last finite step: what a checkpoint says."""
    step: int
    position: int
    window: int
    tokens_seen: int
    skipped: int


@dataclass
class RunState:
    """The counters of a run. `step` is the number of optimizer steps that are done."""
    step: int = 0
    position: int = 0            # windows of the text that were drawn, those of skipped steps too
    window: int = 1              # tokens of such a window: the length of the rows
    tokens_seen: int = 0
    skipped: int = 0             # steps whose loss or gradient was not finite
    rollbacks: int = 0           # times that a loss spike took the run back
    best: float = math.inf       # the lowest held-out figure of the run
    kept: float = math.inf       # the figure of the checkpoint that the pointer `best` names

    # of this process alone
    first_step: int = 0          # where this process began
    held_step: int = -1          # the last step that is on the disk
    ruined_step: int = 0         # a step whose update ruined the weights: it is never saved
    eval_due: bool = False       # this turn of the loop owes an evaluation
    scored_step: int | None = None    # the step that `nats` belongs to
    nats: float | None = None    # the last held-out figure
    bad_in_a_row: int = 0        # steps that were not finite, since the last finite one
    unsaved: int = 0             # saves in a row that failed
    saved_at: float = 0.0        # time.monotonic() of the last save
    good: Reached = field(default_factory=lambda: Reached(0, 0, 1, 0, 0))

    def remember_good(self):
        """A step that is not finite is skipped and changes no weight. So until the next finite step
        the state to save is the one before the first of them: a checkpoint never ends on a step
        that failed.
        """
        if not self.bad_in_a_row:
            self.good = Reached(
                self.step, self.position, self.window, self.tokens_seen, self.skipped
            )

    @property
    def scored(self):
        """Whether this step has been evaluated."""
        return self.scored_step == self.step

    @property
    def can_be_saved(self):
        """Whether the last finite step is worth a save: new, and it did not ruin the weights."""
        return self.good.step > max(self.held_step, self.ruined_step, 0)

    @property
    def cannot_be_kept(self):
        """Whether the last finite step is lost if the run ends now: no save of it succeeded."""
        return self.unsaved > 0 or self.good.step == self.ruined_step > 0
