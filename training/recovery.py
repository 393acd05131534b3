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
def sound(model, rows, block, context):
    """Whether these weights give the text of `rows` (B, T) a finite loss inside this context."""
    training = model.training
    model.eval()
    with context:
        finite = math.isfinite(masking.bound(model, rows, block, batch=len(rows))[1])
    model.train(training)
    return finite


def can_learn(model, rows, block, context):
    """Whether the text of `rows` (B, T) has a finite loss and a finite gradient norm; the model's gradients stay as they are.

    A loss can still be finite where the gradient is not: weights that have grown too large learn nothing any more.
    """
    training = model.training
    model.eval()
    with torch.no_grad():
        if model.cfg.causal:
            asked = masking.whole_rows(*rows.shape, slice(None))
        else:
            asked = masking.draw(masking.EXACT_COUNT, 0, 0, *rows.shape, block, None, slice(None))
    with context:
        loss = masking.denoising_loss(model, rows, asked, "elbo", rows.numel()).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norms = [g.norm() for g in gradients if g is not None]
    model.train(training)
    return math.isfinite(loss.detach()) and math.isfinite(torch.stack(norms).norm())


@torch.no_grad()
def likely_cause(model, rows, block, autocast, loss, gnorm, windows, lr, saved=True):
    """Why a step was not finite, as a sentence with the way out; `rows` (B, T) is held-out text, known to be sound.

    saved: whether the run has a checkpoint to resume from; without one, a lower rate means a new start.

    Weights that score held-out text are sound, then the windows of the step are not; weights that score it only outside
    autocast() overflow in its number type; else they have grown, which is what too high a rate does.
    """
    slower = f"{'resume' if saved else 'start again'} with --lr {lr / 2:.1e}"
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            return f"the learning rate: the weight {name} is not finite; {slower}"

    sound_full = sound(model, rows, block, contextlib.nullcontext())
    sound_half = sound(model, rows, block, autocast())
    model.train()
    if not sound_full:
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
