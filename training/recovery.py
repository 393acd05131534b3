"""What goes wrong in a training, contained: loss spikes, steps that are not finite, memory that
runs out.

Used by the other files of training/; nothing here runs by itself. Notable:
* a step whose loss or gradient is not finite is never taken, so the weights stay as they were, and
  likely_cause() can ask them what is wrong;
* with --auto_batch a step that runs out of memory is done again with fewer rows per forward: the
  same rows, the same gradients.
"""
import contextlib
import gc
import math
import statistics
from collections import deque

import torch

import gaussian
import lora
import masking
from common import machine
from common.console import UserError
from model_config import count_params, rows_of_step
from training.footprint import of_a_parameter

WINDOW = 50      # losses whose median says what is usual
ENOUGH = 10      # below so many, nothing is called a spike
ROLLBACKS = 3    # times that a run goes back at most; later spikes are only logged
HUGE = 1e6  # no weight of a sound model is as large; far below, products in half precision overflow
SPARE = 0.95     # of the memory that is there: the allocator's own losses need the rest


# ---- loss spikes ---------------------------------------------------------------------------------

class SpikeWatch:
    """A loss above factor x the median of the last finite ones of its block rule is a spike; factor
    0 sees none.

    By rule, as whole rows cost more than left to right alone, and a fade brings them in mid-run.
    """

    def __init__(self, factor):
        self.factor = factor
        self.losses = {}  # block rule -> its last losses

    def spike(self, loss, block):
        """-> the median that this loss is far above, or None; remembers the loss."""
        losses = self.losses.setdefault(block, deque(maxlen=WINDOW))
        known = len(losses) >= ENOUGH
        usual = statistics.median(losses) if known else math.inf
        losses.append(loss)
        if self.factor and loss > self.factor * usual:
            return usual
        return None

    def state(self):
        return {str(block): list(losses) for block, losses in self.losses.items()}

    def load(self, state):
        self.losses = {}
        for block, losses in state.items():
            self.losses[int(block)] = deque(losses, maxlen=WINDOW)


# ---- steps that are not finite -------------------------------------------------------------------

@torch.no_grad()
def sound(model, rows, block, context, asked=None):
    """Whether these weights give the text of `rows` (B, T) a finite loss inside this context.
    asked: as in masking.row_bounds.
    """
    training = model.training
    model.eval()
    with context:
        row_bounds = gaussian.row_bounds if model.cfg.gaussian else masking.row_bounds
        sums = row_bounds(model, rows, block, batch=len(rows), asked=asked)
        finite = bool(torch.isfinite(sums).all())
    model.train(training)
    return finite


def can_learn(model, rows, block, context, asked=None):
    """Whether the text of `rows` (B, T) has a finite loss and a finite gradient norm; the model's
    gradients stay as they are.

    A loss can still be finite where the gradient is not: weights that have grown too large learn
    nothing any more.
    """
    training = model.training
    model.eval()
    with torch.no_grad():
        if model.cfg.gaussian:
            masks = gaussian.held_out_sample(model, *rows.shape, asked)
        elif block == 1:
            masks = masking.left_to_right(*rows.shape, asked=asked)
        else:
            masks = masking.corrupt(
                masking.EXACT_COUNT, 0, 0, *rows.shape, block, asked=asked,
                ends=not model.cfg.interlaced,
            )
    loss_of = gaussian.gaussian_loss if model.cfg.gaussian else masking.denoising_loss
    with context:
        loss = loss_of(model, rows, masks, "elbo").loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norms = [gradient.norm() for gradient in gradients if gradient is not None]
    model.train(training)
    return math.isfinite(loss.detach()) and math.isfinite(torch.stack(norms).norm())


@torch.no_grad()
def likely_cause(
    model, rows, block, autocast, loss, gnorm, windows, lr, saved=True, asked=None
):
    """Why a step was not finite, as a sentence with the way out; `rows` (B, T) is held-out text,
    known to be sound.

    saved: whether the run has a checkpoint to resume from; without one, a lower rate means a new
    start.

    Weights that score held-out text are sound, then the windows of the step are not; weights that
    score it only outside autocast() overflow in its number type; else they have grown, which is
    what too high a rate does.
    """
    slower = f"{'resume' if saved else 'start again'} with --lr {lr / 2:.1e}"
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            return f"the learning rate: the weight {name} is not finite; {slower}"

    sound_full = sound(model, rows, block, contextlib.nullcontext(), asked)
    sound_half = sound(model, rows, block, autocast(), asked)
    model.train()
    if not sound_full:
        return f"the learning rate: held-out text has no finite loss either; {slower}"
    for name, p in model.named_parameters():
        largest = float(p.abs().max())
        if largest > HUGE:
            return f"the learning rate: the weight {name} has grown to {largest:.0e}; {slower}"
    if not sound_half:
        return (
            "overflow in half precision: held-out text has a finite loss only in float32; "
            "--amp_dtype bf16 or --no_amp"
        )
    if not math.isfinite(loss):
        return (
            f"the data: held-out text has a finite loss, windows {windows.start} to "
            f"{windows.stop - 1} do not; look at that text, or {slower}"
        )
    return (
        f"the gradient (norm {gnorm}) of a finite loss: --detect_anomaly names the operation; "
        f"--no_amp, or {slower}"
    )


# ---- out of memory: before the run ---------------------------------------------------------------

def usable_memory(device):
    """Bytes that this process may fill: known on CUDA, elsewhere only found by hitting the limit.
    """
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def free_memory(device):
    """Bytes that are free for a run; None where nobody says: of a CPU what Linux calls available,
    within a cgroup's limit.
    """
    if device.type == "cuda":
        return usable_memory(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = [line for line in file if line.startswith("MemAvailable")]
        free = int(lines[0].split()[1]) * 1024
    except (OSError, LookupError, ValueError):
        return None
    try:
        with (
            open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit,
            open("/sys/fs/cgroup/memory.current", encoding="ascii") as used,
        ):
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):      # no such file, or "max"
        pass
    return max(0, free)


def memory_needed(model_config, args, micro, world=1):
    """Bytes, from shapes alone: (weights, gradients and optimizer; the least that micro rows per
    forward keep for backward).

    The second is a lower bound: the input of each layer, its wide activations once, one chunk of
    logits.
    """
    each = of_a_parameter(args)
    trained = lora.trained_parameters(model_config, args.lora_rank)
    fixed = count_params(model_config) * each.pop("weights") + trained * sum(each.values())
    if args.fsdp:
        fixed //= world

    width = 4 * model_config.d_model
    if not args.activation_checkpointing:
        width += 2 * 3 * model_config.d_ff  # gate, up and their product in 2 bytes
    rows = 0
    for block in args.block_rules:
        step = rows_of_step(model_config, args.longest, block)
        rows = max(rows, step.clean + step.noisy)
    activations = micro * rows * model_config.n_layers * width
    logits = 4 * min(512, micro * args.longest) * model_config.rows
    return fixed, activations + logits


def check_memory(model_config, args, micro, device, world=1):
    """Before anything is built: one line about memory; what cannot fit is a UserError."""
    fixed, least = memory_needed(model_config, args, micro, world)
    if args.auto_batch:
        least //= micro                                                # it goes down to one row
    free = free_memory(device)
    if free is not None and fixed + least > free:
        raise UserError(
            f"this run cannot fit: {count_params(model_config):,} parameters need "
            f"{fixed / 1e9:,.1f} GB with gradients and optimizer, {micro} x {args.longest} tokens "
            f"at least {least / 1e9:,.1f} GB more, and {free / 1e9:,.1f} GB are free: give a "
            "smaller --d_model, --n_layers, --batch_size or --seq_len, or --preset starter"
        )
    line = (
        f"{fixed / 1e9:.2f} GB for weights, gradients and optimizer, at least "
        f"{least / 1e9:.2f} GB for activations"
    )
    if free is not None:
        line += f"; {free / 1e9:.1f} GB free"
    return line


# ---- out of memory: in a step --------------------------------------------------------------------

def is_oom(error):
    """The allocators of CUDA, MPS, the CPU and oneDNN each say it in their own way."""
    if isinstance(error, MemoryError):
        return True
    words = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "bad_alloc",
        "could not create a memory",
    )
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in words)


def fewer_rows(micro, rows):
    """The most rows per forward that are at most half of micro and divide the step's rows evenly;
    None below one.
    """
    for fewer in range(micro // 2, 0, -1):
        if rows % fewer == 0:
            return fewer
    return None


def memory_advice(args, micro, length):
    """What to reduce, in this order: the length of the rows, then batch_size, then d_model or
    n_layers; each with a value that is allowed.
    """
    shorter = f"--seq_len first (--seq_len {max(16, length // 2)})"
    if args.seq_schedule:
        shorter = f"the {length} of --seq_schedule first (to {max(16, length // 2)})"
    batch = "(--batch_size is at 1 already)"
    if micro > 1:
        batch = f"--batch_size {max(1, micro // 2)} or --auto_batch"
    unit = 2 * args.n_heads
    width = max(unit, args.d_model * 3 // 4 // unit * unit)
    layers = max(1, args.n_layers - max(1, args.n_layers // 5))
    return (
        f"out of memory with {micro} x {length} tokens per forward: reduce {shorter}, then "
        f"{batch}, then --d_model {width} or --n_layers {layers}"
    )


def attempt(work, micro):
    """-> (work(micro), ""), or (None, why) when memory ran out. The error dies here, and with it
    the tensors it holds.
    """
    try:
        return work(micro), ""
    except (MemoryError, RuntimeError) as error:
        if not is_oom(error):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        return None, lines[0][:200]


def backing_off(work, micro, step, args, undo, say, alone=True):
    """work(micro), with fewer rows per forward each time that memory runs out -> (its result, the
    rows that fit). step: (rows of a step, their length).

    Not alone, when other processes are in the midst of adding up their gradients, nobody can do the
    step again.
    """
    rows, length = step
    while True:
        result, trouble = attempt(work, micro)
        if not trouble:
            return result, micro

        undo()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        fewer = fewer_rows(micro, rows) if args.auto_batch and alone else None
        if fewer is None:
            raise UserError(f"{memory_advice(args, micro, length)}\n  ({trouble})", code=1)
        say(
            f"notice: out of memory with {micro} x {length} tokens per forward: from here on "
            f"{fewer} rows, {rows // fewer} forwards per step, the same "
            f"{rows * length:,} tokens ({trouble})"
        )
        micro = fewer


def measure_rows(probe, micro, step, args, device, later, undo, say):
    """--auto_batch, before the first step: probe(micro) is a real forward and backward -> the rows
    per forward that fit. step: (rows of a step, their length).

    later: bytes that the optimizer will take at its first step and that the probe cannot see.
    """
    limit = SPARE * usable_memory(device)

    def work(micro):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        probe(micro)
        need = machine.peak_memory_mb(device) * 2 ** 20 + later
        if need > limit:
            raise MemoryError(f"{need / 1e9:.1f} GB needed, {limit / 1e9:.1f} GB there")
        return need

    need, micro = backing_off(work, micro, step, args, undo, say)
    undo()
    rows, length = step
    limits = ", all of this process"
    if limit < float("inf"):
        limits = f" of {limit / 1e9:.1f} GB"
    say(
        f"memory: {micro} x {length} tokens per forward, {rows // micro} forwards per step: "
        f"{need / 1e9:.2f} GB at most{limits}"
    )
    return micro
