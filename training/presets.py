"""The presets on this machine: parameters, memory, speed and hours, for train --list_presets.

    show(args)       # a table on stdout; --model, --data_dir, --device and --threads count

Used by train.py. The speed is that of real steps on random text: forward, backward and update, for
about a second a preset, after one pass that is not timed. A large preset on a CPU, or one that does
not fit, is not run: its speed follows from its FLOPs, at the rate of the preset above it, and the
table says so. Other programs on the machine make all of it slower; the load is printed.
"""
import functools
import itertools
import os
import time
from typing import NamedTuple

import torch

import cli
import config
import masking
import model_config
from common import machine
from common.console import printable, say
from evaluation.study_plan import flops, vocabulary
from model import build_model
from training import optim, recovery, setup, step

SECONDS = 1.0         # of timed passes
LARGEST = 100e6       # parameters of a preset that a CPU runs: a pass of more takes many seconds
SPARE = 1.5           # times the least memory must be free
GB = 1e9


class Row(NamedTuple):
    """A line of the table."""
    name: str
    args: object
    params: int
    memory: float         # bytes
    tok_s: float
    of_peak: float        # share of the fastest product of this machine; None if not measured

    @property
    def measured(self):
        return self.of_peak is not None


def show(args, ranks):
    """Measure and print."""
    machine.start(args.threads)
    device = machine.pick_device(args.device)
    dtype, precision = machine.pick_precision(args.amp, args.amp_dtype, device)
    pieces = vocabulary(args.data_dir)
    told = f"{pieces:,} pieces, as in {args.data_dir}" if pieces else "each preset's own vocabulary"
    say(f"device {device}{on_cpu(device)}, precision {precision}; {told}; some 10 seconds")
    print(
        f"{'preset':8} {'parameters':>13} {'memory':>12} {'tokens/s':>11} {'of peak':>8}   "
        "to its last step"
    )
    rate = None
    for name, preset, shape in presets(args, pieces):
        run = made(preset, shape, ranks, device, dtype)
        row, rate = measured(name, run, rate)
        print(printable(line(row)), flush=True)
    print(
        "~ not run here: the speed is scaled by FLOPs from the preset above it, the memory is the "
        "least"
    )


def on_cpu(device):
    """The threads, and how busy the machine is, where the system says so."""
    if device.type != "cpu":
        return ""
    told = f", {torch.get_num_threads()} threads"
    if hasattr(os, "getloadavg"):
        told += f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return told


def presets(args, pieces):
    """(name, its arguments, its shape) of each preset, the smallest first."""
    found = []
    for name in config.BASE_PIECES:
        words = ["--preset", name, "--model", args.model, "--seed", str(args.seed)]
        preset, _ = cli.parse(config.TrainArgs, words, "train")
        shape = model_config.model_config(preset, pieces or config.BASE_PIECES[name])
        found.append((name, preset, shape))
    return sorted(found, key=lambda each: model_config.count_params(each[2]))


def made(args, shape, ranks, device, dtype):
    """What a step needs of a Run, but for the model."""
    run = setup.Run(args, None, ranks, None)
    run.cfg = shape
    run.device = device
    run.dtype = dtype
    run.params = model_config.count_params(shape)
    run.length = args.seq_len
    run.rows = args.batch_size
    run.mine = slice(0, args.batch_size)
    return run


# ---- one preset ----------------------------------------------------------------------------------

def measured(name, run, rate):
    """-> (Row, FLOPs a second). rate: that of the preset before, None if this is the first."""
    args = run.args
    least = sum(recovery.memory_needed(run.cfg, args, run.rows))
    each = flops(run.cfg, args)                                   # of a token
    free = recovery.free_memory(run.device)
    fits = free is None or SPARE * least < free
    if fits and (run.device.type != "cpu" or run.params < LARGEST):
        tok_s = speed(run)
        memory = machine.peak_memory_mb(run.device) * 2 ** 20
        of_peak = tok_s * each / machine.peak_flops(run.device, run.dtype)
        return Row(name, args, run.params, memory, tok_s, of_peak), tok_s * each
    return Row(name, args, run.params, least, (rate or 0) / each, None), rate


def speed(run):
    """Tokens a second of steps as in training."""
    args = run.args
    machine.seed_everything(args.seed)
    run.model = build_model(run.cfg).to(run.device).train()
    run.model.recompute = args.activation_checkpointing
    run.loss_of = masking.DenoisingLoss(run.model)
    run.optimizer = optim.make_optimizer(run.model, args)
    run.scaler = optim.LossScaler(run.optimizer, run.device, on=run.dtype is torch.float16)
    seconds_a_flop = pass_times(run)
    update = timed(run.device, run.optimizer.step)
    tokens = run.rows * run.length
    forward_backward = seconds_a_flop * flops(run.cfg, args) * tokens
    return tokens * args.grad_accum / (args.grad_accum * forward_backward + update)


def pass_times(run):
    """Seconds of forward and backward for one FLOP, over the block rules of the run in turn."""
    ids = torch.randint(run.cfg.vocab_size, (run.rows, run.length), device=run.device)
    taken = 0.0
    done = 0.0
    for number, block in enumerate(itertools.cycle(run.args.block_rules)):
        masks = step.mask_sample(run, number, block)
        work = functools.partial(step.gradients, run, ids, masks, number, run.rows, last=False)
        seconds = timed(run.device, work)
        if number == 0:                                           # the kernels are made in it
            continue
        mask = masks.masked_count / ids.numel()
        taken += seconds
        done += ids.numel() * model_config.train_flops(run.cfg, run.length, block, mask)
        if taken > SECONDS:
            return taken / done


def timed(device, work):
    machine.synchronise(device)
    started = time.perf_counter()
    work()
    machine.synchronise(device)
    return time.perf_counter() - started


# ---- a line of the table -------------------------------------------------------------------------

def line(row):
    args = row.args
    tokens = args.lengths.tokens(args.max_steps, args.rows)
    about = "" if row.measured else "~ "
    least = "" if row.measured else ">= "
    each = args.lengths.step_tokens(args.seq_len, args.rows)
    speed_shown = f"{about}{row.tok_s:,.0f}"
    of_peak = f"{row.of_peak:.0%}" if row.measured else ""
    memory = f"{least}{row.memory / GB:.2f} GB"
    return (
        f"{row.name:8} {row.params:13,} {memory:>12} {speed_shown:>11} {of_peak:>8}   "
        f"{about}{hours(tokens, row.tok_s)}: {args.max_steps:,} steps of {each:,} tokens"
    )


def hours(tokens, tok_s):
    """The time for so many tokens."""
    if not tok_s:
        return "unknown"
    found = tokens / tok_s / 3600
    if found < 0.1:
        return f"{60 * found:.1f} minutes"
    if found < 1000:
        return f"{found:.1f} hours"
    return f"{found / 24 / 365:.1f} years"
