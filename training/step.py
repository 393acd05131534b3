"""One optimizer step: masks, forward and backward in parts that fit, clipping, bad numbers, update.

    result = train_step(run)     # None: given up by a signal, or taken back after a loss spike

Used by the loop in train.py; training/setup.py probes with the same forward and backward. Whatever
the number of parts and of ranks, the gradient is that of the whole step.
"""
import contextlib
import functools
import math
import time
from typing import NamedTuple

import torch

import checkpoint
import gaussian
import masking
import model_config
from common import machine
from common.console import UserError, say
from training import instrument, logs, optim, recovery, row_length
from training.saving import restore

MEASURED = 20     # steps after which the time of the whole run is said
SOON = 30         # or seconds, if the steps are slow


class StepResult(NamedTuple):
    """What the log needs of a step."""
    loss: float                 # of the whole step, all ranks together
    gnorm: float                # before clipping
    lr: float
    block: int                  # the block rule
    first: int                  # tokens of the first block
    mask: float                 # share of the tokens that were hidden
    seconds: float
    data_ms: float


def mask_sample(run, step, block, first=None, asked=None, ends=True):
    """What is asked of this rank's rows; whole rows do without the clean stream. asked (R, T): the
    responses of pairs, of all ranks; ends: masking.corrupt's.
    """
    length = run.length
    if run.args.gaussian:
        return gaussian.noisy_sample(
            run.args, run.args.seed, step, run.rows, length, run.mine, asked
        )
    if block == 1:
        return masking.left_to_right(run.rows, length, run.mine, asked)
    masks = masking.corrupt(
        run.args, run.args.seed, step, run.rows, length, block, first, run.mine, asked, ends
    )
    if block < length:
        return masks._replace(clean_share=1 / (1 + run.args.noisy_weight))
    return masks


def gradients(run, x0, masks, step, micro, last=True):
    """Forward and backward of these rows (B, T), `micro` at a time -> this rank's loss.

    last: no further rows of this rank follow, so the ranks add up their gradients in the last part.
    Where both streams are asked, what is learned is the sum L_AR + a L_diff, and what is told is
    their mean, as of the other steps.
    """
    args = run.args
    weight = 1 / masks.clean_share if masks.clean_share else 1.0
    early = None
    if run.cfg.exits and args.n_layers > 1:
        early = masking.pick_exit(args.n_layers, args.seed, step)
    loss = 0.0
    for begin in range(0, len(x0), micro):
        part = slice(begin, begin + micro)
        summing = last and begin + micro >= len(x0)
        # a probe of --auto_batch is no piece: each rank probes as often as it has to
        piece = run.stop.piece(agreed=begin == 0) if last else contextlib.nullcontext()
        alone = contextlib.nullcontext() if summing else run.ranks.accumulate(run.loss_of)
        with piece, alone:
            with run.autocast():
                out = run.loss_of(
                    x0[part], masks, args.loss, part,
                    early=early, early_weight=args.exit_loss_weight,
                )
            try:
                run.scaler.scale(weight * out.loss).backward()
            except RuntimeError as error:
                if not args.detect_anomaly or "returned nan" not in str(error):
                    raise
                raise UserError(
                    f"step {step + 1}: {error} (--detect_anomaly; the forward call is shown above)",
                    1,
                ) from None
        loss += float(out.loss.detach())
    return loss


def probe(run, micro):
    """One real forward and backward of `micro` rows for each block rule: does it fit?"""
    for block in run.args.block_rules:
        asked = run.windows.asked(run.state.position, run.rows)
        masks = mask_sample(run, 0, block, asked=asked, ends=not run.cfg.interlaced)
        x0 = run.windows.batch(run.state.position + run.mine.start, micro).to(run.device)
        gradients(run, x0, masks, 0, micro, last=False)


def roll_back(run):
    """After a loss spike: weights and counters of the last checkpoint, and on with other text."""
    state = run.state
    saved = checkpoint.load(run.folder, parts=("model", "ema", "optimizer"), quarantine=True)
    # adapters are saved without their base, which is here
    checkpoint.load_into(run.model, run.model.state_dict() | saved.model)
    restore(run, saved, bool(saved.optimizer))
    run.log.write("rollback", step=state.step + 1, to=saved.step, position=state.position)
    say(f"notice: back to step {saved.step}, and on with the text after window {state.position}")
    state.rollbacks += 1
    state.bad_in_a_row = 0
    state.step = saved.step
    state.held_step = saved.step
    state.scored_step = None
    run.optimizer.zero_grad()


def warn_of_spike(run, loss, usual):
    """-> whether the run shall go back to its last checkpoint."""
    message = (
        f"loss {loss:.4f} is {loss / usual:.1f} times the median of the last such steps, "
        f"{usual:.4f}"
    )
    run.log.write("warn", step=run.state.step + 1, message=message)
    say(f"warning: step {run.state.step + 1}: {message}")
    may_go_back = run.args.spike_rollback and run.state.rollbacks < recovery.ROLLBACKS
    return may_go_back and checkpoint.is_run(run.folder)


def update(run, loss, gnorm, overflow):
    """Take the step if its numbers are finite; else skip it, count it and say so."""
    state = run.state
    if math.isfinite(loss) and math.isfinite(gnorm):
        run.optimizer.step()
        if run.ema:
            run.ema.update()
        state.bad_in_a_row = 0
    elif overflow:
        message = "float16 overflow: step skipped, the loss scale is halved"
        run.log.write("warn", step=state.step + 1, message=message)
    else:
        state.skipped += 1
        state.bad_in_a_row += 1
        message = "loss or gradient is not finite: step skipped"
        run.log.write("warn", step=state.step + 1, message=message)
        say(
            f"warning: step {state.step + 1}: loss {loss}, gradient norm {gnorm}: not finite, "
            "step skipped"
        )
    run.optimizer.zero_grad()


def train_step(run):
    """One optimizer step -> StepResult; None if a signal or a loss spike gave it up."""
    args, state, ranks = run.args, run.state, run.ranks
    started = time.perf_counter()
    row_length.follow_schedule(run)

    # the rate, the dropout and the masks are functions of (seed, step)
    run.model.train()
    lr = optim.lr_at(
        state.step, args.max_steps, args.lr, args.warmup, args.lr_schedule, args.min_lr_ratio
    )
    run.optimizer.set_lr(lr)
    run.optimizer.set_seed(masking.step_generator(args.seed, state.step, "round").initial_seed())
    dropout = masking.step_generator(args.seed, state.step, "drop")
    torch.manual_seed(dropout.initial_seed() + ranks.rank)
    block, first = masking.pick_blocks(
        args.block_choices_at(run.length), run.length, args.seed, state.step,
        args.single_chance(state.step),
    )
    first = run.windows.first_block(state.position, run.rows, block, first)
    asked = run.windows.asked(state.position, run.rows)
    masks = mask_sample(run, state.step, block, first, asked, ends=not run.cfg.interlaced)

    # the text: this rank's rows (B, T)
    begin = state.position + run.mine.start
    x0 = run.windows.batch(begin, run.mine.stop - run.mine.start).to(run.device)
    data_ms = 1e3 * (time.perf_counter() - started)

    # forward and backward, with fewer rows at a time where memory runs out
    work = functools.partial(gradients, run, x0, masks, state.step)
    try:
        loss, micro = recovery.backing_off(
            work, run.micro, (len(x0), run.length), args, run.optimizer.zero_grad, say,
            ranks.world == 1,
        )
    except machine.Stopped:  # nothing of this step has happened: save what was before
        run.optimizer.zero_grad()
        return None
    row_length.found_to_fit(run, micro)

    # the ranks' losses and gradients, clipping, bad numbers
    loss = ranks.all_reduce_sum(loss)
    ranks.add_up_gradients(run.model)
    run.scaler.unscale()
    instrument.analyse(run)
    gnorm = float(optim.clip_grad_norm(run.model, args.grad_clip))
    overflow = run.scaler.update(loss, gnorm)
    usual = run.spikes.spike(loss, block) if math.isfinite(loss) else None
    state.position += run.rows
    state.tokens_seen += run.step_tokens
    if usual and warn_of_spike(run, loss, usual):
        roll_back(run)
        return None

    update(run, loss, gnorm, overflow)
    return StepResult(
        loss, gnorm, lr, block, first, masks.masked_count / run.step_tokens,
        time.perf_counter() - started, data_ms,
    )


# ---- what is said of it --------------------------------------------------------------------------

def log_step(run, result):
    """The step in train.jsonl, on the progress bar and, now and then, as a line."""
    args, state = run.args, run.state
    done = state.step + 1
    tok_s = run.step_tokens / result.seconds
    memory = machine.peak_memory_mb(run.device)
    flops = model_config.train_flops(run.cfg, run.length, result.block, result.mask)
    mfu = tok_s * flops / run.peak
    run.progress.step(
        done, run.step_tokens, result.seconds, loss=result.loss,
        gnorm=result.gnorm, mask=result.mask, mfu=mfu, memory=memory, lr=result.lr,
    )
    run.log.write(
        "train",
        step=done,
        loss=logs.finite(result.loss),
        loss_kind=args.loss,
        mask=result.mask,
        lr=result.lr,
        gnorm=logs.finite(result.gnorm),
        tok_s=tok_s,
        mfu=mfu,
        seq_len=run.length,
        block=result.block,
        first=result.first,
        global_batch=run.rows,
        tokens_seen=state.tokens_seen,
        step_ms=1e3 * result.seconds,
        data_ms=result.data_ms,
        mem_mb=memory,
        skipped=state.skipped,
        overflows=run.scaler.overflows,
    )
    if state.step == state.first_step or done % args.log_interval == 0 or done == args.max_steps:
        length = f" | length {run.length}" if args.seq_schedule else ""
        run.progress.line(
            f"step {done}/{args.max_steps} | loss {result.loss:.4f} | mask {result.mask:.2f} | "
            f"lr {result.lr:.1e} | gnorm {result.gnorm:.2f} | tok/s {run.progress.tok_s:.0f} | "
            f"ETA {run.progress.eta} | MFU {mfu:.0%} | {memory / 1024:.1f} GB{length}"
        )
    say_time_to_go(run, done)


def say_time_to_go(run, done):
    """Once, as soon as the speed is known: how long the run will take, and whether threads wait."""
    measured = done - run.state.first_step
    known = measured == MEASURED or measured > 2 and run.progress.elapsed > SOON
    if run.timed or not known or done == run.args.max_steps:
        return
    run.timed = True
    advice = machine.advice_on_threads(run.device)
    say(
        f"speed: {run.progress.whole} for all {run.args.max_steps} steps, "
        f"{run.progress.eta} to go, measured on {measured} steps{advice}"
    )
