"""Saving a run and restoring it: what lies in a checkpoint besides the weights, and where it goes.

    save(run, is_best, score)          # the state after the last finite step -> is it on the disk?
    restore(run, saved)                # optimizer, averages, loss scale, spikes, counters
    publish(run, "summary.md", text)   # a small file of the run folder

Used by the loop in train.py, by training/setup.py (resume) and training/step.py (after a spike).
"""
import functools
import math
import time

import checkpoint
import lora
from common.console import say
from common.files import replace_file
from training import drive, logs, run_folder


def save(run, is_best=False, score=None):
    """Save the state after the last finite step, on every rank -> whether it is there now.

    score: the held-out figure of these weights, if this turn has one.
    """
    tensors = {
        "model": lora.own_tensors(run.model),
        "ema": run.ema.state() if run.ema else None,
        "optimizer": run.optimizer.state_tensors() if run.args.save_optim else None,
    }
    return run.ranks.save(functools.partial(write, run, is_best, score), **tensors)


def write(run, is_best, score, **tensors):
    """Write the checkpoint and tell the log and the drive -> whether it is there now."""
    args, good = run.args, run.state.good
    started = time.perf_counter()
    try:
        folder = checkpoint.save(
            run.folder,
            good.step,
            **tensors,
            state=state_json(run, is_best, score),
            config=run.saved_args,
            tokenizer_bytes=run.tokenizer.model_bytes,
            best=is_best,
            keep_last=args.keep_last if args.save_interval else 1,
            keep_full=args.keep_full,
        )
    # disk full, NaN: what was saved before is intact, training goes on
    except (OSError, FloatingPointError) as error:
        run.log.write("warn", step=good.step, message=f"save failed: {error}")
        say(
            f"warning: step {good.step} could not be saved: {error}; the checkpoints before it are "
            "intact"
        )
        return False
    seconds = round(time.perf_counter() - started, 3)
    run.log.write("save", step=good.step, folder=folder.name, seconds=seconds, best=is_best)
    remark = ", the best so far" if is_best else ""
    say(f"saved {folder}{remark}")
    if args.drive:
        drive.store(folder, args.drive, say)
    return True


def state_json(run, is_best, score):
    """What a resume needs besides tensors and settings."""
    state, good = run.state, run.state.good
    unfinished_turn = state.eval_due and not state.scored and state.step == good.step
    return {
        "tokens_seen": good.tokens_seen,
        "position": good.position,
        "window": good.window,
        "skipped": good.skipped,
        "best": logs.finite(state.best),
        "kept": state.nats if is_best else logs.finite(state.kept),
        "ema_updates": run.ema.updates if run.ema else 0,
        "model": run.args.model,
        "base": run.base,
        "data_sha256": run.data.meta["train_sha256"],
        "val_sha256": run.data.meta["val_sha256"],
        "score": score if score is None else logs.finite(score),
        "source": run.data.meta["source"],
        "environment": run.environment,
        "compiled": run.args.compile,
        "precision": str(run.dtype),
        "scaler": run.scaler.state(),
        "losses": run.spikes.state(),
        "rollbacks": state.rollbacks,
        "wandb_id": run.wandb_id,
        "eval_due": int(unfinished_turn),
    }


def restore(run, saved, with_optimizer=True):
    """Everything of a checkpoint but its weights: optimizer, averages, loss scale, spikes, and the
    counters that a rewound run takes over -> all counters.
    """
    counters = run_folder.counters(saved)
    if with_optimizer:
        tensors = run.ranks.load_aux(saved, "optimizer", run.model)
        run.optimizer.load_state_tensors(tensors)
    if run.ema and "ema" in saved.files:
        tensors = run.ranks.load_aux(saved, "ema", run.model)
        run.ema.load(tensors, counters["ema_updates"])
    run.scaler.load(counters["scaler"])
    run.spikes.load(counters["losses"])

    # figures of another validation text or another mixture do not compare
    alike = run_folder.same_validation(saved.config, saved.state, run.args, run.data.meta)
    state = run.state
    state.best = math.inf
    state.kept = math.inf
    if alike and counters["best"] is not None:
        state.best = counters["best"]
    if alike and counters["kept"] is not None:
        state.kept = counters["kept"]
    state.skipped = counters["skipped"]
    state.tokens_seen = counters["tokens_seen"]
    return counters


def publish(run, name, text):
    """Write a small file of the run folder, a text or bytes; trouble is told and changes nothing.
    """
    if not run.ranks.main:
        return
    data = text if isinstance(text, bytes) else text.encode(errors="replace")
    try:
        replace_file(run.folder / name, data)
    except OSError as error:
        say(f"warning: {run.folder / name} could not be written: {error.strerror}")
