"""Out of memory: what it looks like, half the rows per forward, the same step again.

Used by train.py. A step's rows, masks and loss do not depend on how many rows go through the model at once, so halving them
and doing the step again gives the same gradient: batch_size halves, grad_accum doubles, tokens per step stay.
"""
import gc

import torch

from common import machine
from common.console import UserError
from model_config import count_params

SPARE = 0.95          # of the memory that is there: the allocator's own losses need the rest


def is_oom(error):
    """The allocators of CUDA, MPS, the CPU and oneDNN each say it in their own way."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "could not create a memory")
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words)


def fewer(micro, rows):
    """The most rows per forward that are at most half of micro and divide the step's rows evenly; None below one."""
    return next((n for n in range(micro // 2, 0, -1) if rows % n == 0), None)


def advice(args, micro):
    """The runbook's order: seq_len, then batch_size, then d_model or n_layers; each with a value that is allowed."""
    batch = f"--batch_size {max(1, micro // 2)} or --auto_batch" if micro > 1 else "(--batch_size is at 1 already)"
    unit = 2 * args.n_heads
    width, layers = max(unit, args.d_model * 3 // 4 // unit * unit), max(1, args.n_layers - max(1, args.n_layers // 5))
    return (f"out of memory with {micro} x {args.seq_len} tokens per forward: reduce --seq_len first "
            f"(--seq_len {max(16, args.seq_len // 2)}), then {batch}, then --d_model {width} or --n_layers {layers}")


def attempt(work, micro):
    """-> (work(micro), ""), or (None, why) when memory ran out. The error dies here, and with it the tensors it holds."""
    try:
        return work(micro), ""
    except (MemoryError, RuntimeError) as error:
        if not is_oom(error):
            raise
        return None, (str(error).splitlines() or [type(error).__name__])[0][:200]


def backing_off(work, micro, rows, args, undo, say, alone=True):
    """work(micro), with fewer rows per forward each time that memory runs out -> (its result, the rows that fit).

    Not alone, when other processes are in the midst of adding up their gradients, nobody can do the step again.
    """
    while True:
        result, trouble = attempt(work, micro)
        if not trouble:
            return result, micro
        undo()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        less = fewer(micro, rows) if args.auto_batch and alone else None
        if less is None:
            raise UserError(f"{advice(args, micro)}\n  ({trouble})", code=1)
        say(f"notice: out of memory with {micro} x {args.seq_len} tokens per forward: from here on {less} rows, {rows // less} "
            f"forwards per step, the same {rows * args.seq_len:,} tokens ({trouble})")
        micro = less


def there(device):
    """Bytes that are free for a run; None where nobody says: of a CPU what Linux calls available, within a cgroup's limit."""
    if device.type == "cuda":
        return room(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit, \
             open("/sys/fs/cgroup/memory.current", encoding="ascii") as used:
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):      # no such file, or "max"
        pass
    return max(0, free)


def needed(cfg, args, micro, world=1):
    """Bytes, from shapes alone: (weights, gradients and optimizer; the least that micro rows per forward keep for backward).

    The second is a lower bound: the input of each layer, its wide activations once, one chunk of logits.
    """
    params = count_params(cfg)
    states = {"adamw": 8, "muon": 4, "lion": 4}[args.optimizer]        # bytes a parameter; Muon's embedding has twice as many
    kept = params * (8 + states + (4 if args.ema else 0)) // (world if args.fsdp else 1)
    tokens = micro * args.seq_len
    wide = 0 if args.activation_checkpointing else 2 * 3 * cfg.d_ff    # gate, up and their product in 2 bytes
    streams = 2 if min(args.block_choices) < args.seq_len else 1
    return kept, streams * tokens * cfg.n_layers * (4 * cfg.d_model + wide) + 4 * min(512, tokens) * cfg.rows


def check(cfg, args, micro, device, world=1):
    """Before anything is built: one line about memory; what cannot fit is a UserError."""
    kept, least = needed(cfg, args, micro, world)
    if args.auto_batch:
        least //= micro                                                # it goes down to one row
    free = there(device)
    if free is not None and kept + least > free:
        raise UserError(f"this run cannot fit: {count_params(cfg):,} parameters need {kept / 1e9:,.1f} GB with gradients and "
                        f"optimizer, {micro} x {args.seq_len} tokens at least {least / 1e9:,.1f} GB more, and {free / 1e9:,.1f} "
                        "GB are free: give a smaller --d_model, --n_layers, --batch_size or --seq_len, or --preset starter")
    beside = "" if free is None else f"; {free / 1e9:.1f} GB free"
    return f"{kept / 1e9:.2f} GB for weights, gradients and optimizer, at least {least / 1e9:.2f} GB for activations{beside}"


def room(device):
    """Bytes that this process may fill: known on CUDA, elsewhere only found by hitting the limit."""
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def measured(probe, micro, rows, args, device, later, undo, say):
    """--auto_batch, before the first step: probe(micro) is a real forward and backward -> the rows per forward that fit.

    later: bytes that the optimizer will take at its first step and that the probe cannot see.
    """
    limit = SPARE * room(device)

    def work(micro):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        probe(micro)
        need = machine.peak_memory_mb(device) * 2 ** 20 + later
        if need > limit:
            raise MemoryError(f"{need / 1e9:.1f} GB needed, {limit / 1e9:.1f} GB there")
        return need

    need, micro = backing_off(work, micro, rows, args, undo, say)
    undo()
    say(f"memory: {micro} x {args.seq_len} tokens per forward, {rows // micro} forwards per step: {need / 1e9:.2f} GB at most"
        + (f" of {limit / 1e9:.1f} GB" if limit < float("inf") else ", all of this process"))
    return micro
