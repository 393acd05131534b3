"""Bad numbers, contained: loss spikes, and the likely cause of steps that are not finite.

Used by train.py; nothing here runs by itself. A step whose loss or gradient is not finite is never taken, so the weights
stay as they were, and what is wrong can be asked of them: likely_cause() does.
"""
import contextlib
import math
import statistics
from collections import deque

import torch

import masking

WINDOW = 50      # losses whose median says what is usual
HUGE = 1e6       # no weight of a sound model is as large; far below, products in half precision overflow
ENOUGH = 10      # below so many, nothing is called a spike
ROLLBACKS = 3    # times that a run goes back at most; later spikes are only logged


class SpikeWatch:
    """A loss above factor x the median of the last finite ones of its block rule is a spike; factor 0 sees none.

    By rule, as whole rows cost nearly twice what single tokens cost, and a fade brings them in mid-run.
    """

    def __init__(self, factor):
        self.factor, self.losses = factor, {}

    def spike(self, loss, block):
        """-> the median that this loss is far above, or None; remembers the loss."""
        losses = self.losses.setdefault(block, deque(maxlen=WINDOW))
        usual = statistics.median(losses) if len(losses) >= ENOUGH else math.inf
        losses.append(loss)
        return usual if self.factor and loss > self.factor * usual else None

    def state(self):
        return {str(block): list(losses) for block, losses in self.losses.items()}

    def load(self, state):
        self.losses = {int(block): deque(losses, maxlen=WINDOW) for block, losses in state.items()}


@torch.no_grad()
def likely_cause(model, rows, block, autocast, loss, gnorm, windows, lr):
    """Why a step was not finite, as a sentence with the way out; `rows` (B, T) is held-out text, known to be sound.

    Weights that score held-out text are sound, then the windows of the step are not; weights that score it only outside
    autocast() overflow in its number type; else they have grown, which is what too high a rate does.
    """
    slower = f"resume with --lr {lr / 2:.1e}"
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            return f"the learning rate: the weight {name} is not finite; {slower}"

    def scores(context):
        with context:
            return math.isfinite(masking.bound(model, rows, block)[1])
    model.eval()
    sound, sound_half = scores(contextlib.nullcontext()), scores(autocast())
    model.train()
    if not sound:
        return f"the learning rate: held-out text has no finite loss either; {slower}"
    for name, p in model.named_parameters():
        largest = float(p.abs().max())
        if largest > HUGE:
            return f"the learning rate: the weight {name} has grown to {largest:.0e}; {slower}"
    if not sound_half:
        return "overflow in half precision: held-out text has a finite loss only in float32; --amp_dtype bf16 or --no_amp"
    if not math.isfinite(loss):
        return (f"the data: held-out text has a finite loss, windows {windows.start} to {windows.stop - 1} do not; "
                f"look at that text, or {slower}")
    return f"the gradient (norm {gnorm}) of a finite loss: --detect_anomaly names the operation; --no_amp, or {slower}"
