"""How a training ends: the last lines of its log, the summary, the report, what to do next.

Used by train.py.
"""
import contextlib
import math
import shlex

import checkpoint
from common import machine
from common.console import say
from evaluation import run_report
from evaluation.estimators import bits_per_byte
from training import drive, instrument, logs, recovery, run_folder
from training.saving import publish, save
from training.validation import still_sound


def give_up(run, result):
    """Too many steps in a row were not finite: save what is sound, and say the likely cause."""
    state, args = run.state, run.args
    if state.can_be_saved and still_sound(run, run.scoring_rows):
        save(run)                            # what the advice below goes on from
    windows = range(state.position - state.bad_in_a_row * run.rows, state.position)
    cause = recovery.likely_cause(
        run.model, run.held[:8], run.blocks[-1], run.autocast, result.loss, result.gnorm, windows,
        args.lr, saved=checkpoint.is_run(run.folder), asked=run.held_part(8)[1],
    )
    message = (
        f"{state.bad_in_a_row} steps in a row were not finite, the last is step {state.step + 1}; "
        f"likely cause: {cause}"
    )
    run.log.write("warn", step=state.step + 1, message=message)
    say(f"error: {message}")


def say_unsaved(run):
    """The run stops because its last finite step cannot be saved."""
    many = ""
    if run.state.unsaved:
        many = f" ({run.state.unsaved} saves failed in a row)"
    say(
        f"error: step {run.state.good.step} is not saved{many}: the run stops; "
        f"{run_folder.what_is_there(run.folder)}"
    )


def close_log(run, code):
    """The `end` event, summary.md, report.html -> the name of the signal that stopped the run."""
    args, state, ranks = run.args, run.state, run.ranks
    run.stop.signal = ranks.all_reduce_max(run.stop.signal)
    unfinished = state.step < args.max_steps or state.eval_due and not state.scored
    stopped = run.stop.name if unfinished and not code else None
    best = None if state.best == math.inf else state.best
    run.log.write(
        "end", step=state.step, code=code, stopped=stopped, best=best,
        seconds=run.progress.elapsed,
    )
    bits = None if best is None else bits_per_byte(best, run.data.meta)
    run.summary = logs.summary(
        args, run.folder, run.params, run.data, state.best, bits, run.progress, state.tokens_seen,
        state.step,
    )
    run.summary += how_to_ask_what_is_forgotten(run)
    publish(run, "summary.md", run.summary)
    run.log.close(hurry=run.stop.signal is not None)
    if ranks.main:
        with contextlib.suppress(OSError):                # its log cannot be read
            publish(run, "report.html", run_report.page(run.folder / "train.jsonl"))
            if args.instrument == "full" and args.analysis_every:
                publish(run, "analysis.npz", instrument.table(run.folder / "train.jsonl"))
    return stopped


def how_to_ask_what_is_forgotten(run):
    """A line of the summary, if the run began from another one, on other text."""
    if not run.saved or run.in_place:
        return ""
    before = run.saved.config["args"]["data_dir"]
    if before == run.args.data_dir:
        return ""
    ask = f"python -m evaluate --data_dir {shlex.quote(before)} --ckpt"
    return (
        f"- what it has forgotten: {ask} {shlex.quote(str(run.folder))}, and before: {ask} "
        f"{shlex.quote(str(run.saved.path))}\n"
    )


def store_once_more(run):
    """The newest checkpoint goes to the drive again, with the end of the log."""
    if run.args.drive and run.ranks.main and checkpoint.is_run(run.folder):
        drive.store(checkpoint.candidates(run.folder)[0], run.args.drive, say)


def say_how_to_go_on(run, stopped):
    """The last lines of a run that a signal stopped."""
    program = "python" if run.ranks.world == 1 else "torchrun ..."
    advice = ""
    if run.state.held_step > 0:
        folder = shlex.quote(str(run.folder))
        advice = f", saved; to go on: {program} -m train --resume {folder}"
    say(f"stopped by {stopped} at step {run.state.step}{advice}")
    if machine.by_torchrun():
        say(
            "notice: if the signal was sent to torchrun (Ctrl-C, kill, a scheduler), torchrun now "
            "shows a traceback that ends in SignalException and exits with 1, as it always does; "
            "the training itself has exited with 0"
        )
