"""The run folder of a training: which one, whether it is free, that only one process writes to it, and where it resumes.

Used by train.py; nothing here runs by itself.
"""
import contextlib
import re
from pathlib import Path

import checkpoint
import drive
from knobs import Damage, UserError, say

COUNTERS = {  # what a run resumes from in state.json -> the smallest value of a number, or a type
    "position": 0, "tokens_seen": 0, "skipped": 0, "ema_updates": 0, "rollbacks": 0, "eval_due": 0,
    "data_sha256": str, "precision": str,
    "losses": (dict, list), "wandb_id": (str, type(None)), "scaler": (dict, type(None)),
    **dict.fromkeys(("best", "kept"), (float, int, type(None)))}
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker", "overflows"}


def choose(args, origins):
    """-> (run folder or None to skip, checkpoint to start from or None, whether it is a resume). Reads no weights."""
    if args.drive:
        drive.open_folder(args.drive)
        if args.resume_latest:
            drive.restore(args.run_dir, args.drive, say)
    if args.resume_latest and not checkpoint.is_run(args.run_dir):
        args.resume_latest = False               # nothing there yet: a fresh start
    resuming = bool(args.resume or args.resume_latest)
    source = args.ckpt
    if resuming:
        source = args.resume if args.resume not in (None, "latest") else args.ckpt or str(args.run_dir)
    fork = any(origins[name] == "flag" for name in ("output_dir", "run_name"))
    if resuming:
        home = checkpoint.candidates(source)[0].parent
        if not fork or home.resolve() == args.run_dir.resolve():
            return str(home), source, True
    run_dir = args.run_dir
    if is_used(run_dir):
        if args.if_exists == "error":
            raise UserError(f"{run_dir} already holds a run: add --resume to continue it, or choose another --output_dir")
        if args.if_exists == "skip":
            return None, source, resuming
        if args.if_exists == "suffix":
            number = 2
            while Path(f"{run_dir}_v{number}").exists():
                number += 1
            run_dir = Path(f"{run_dir}_v{number}")
    return str(run_dir), source, resuming


@contextlib.contextmanager
def held(run_dir):
    """Inside, the folder is there and nobody else writes to it; a run that failed before it began leaves no trace."""
    new = not run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to the run folder {run_dir} ({error.strerror}): name another --output_dir") from None
    try:
        with checkpoint.run_lock(run_dir):
            yield
    finally:
        if new and run_dir.exists() and not is_used(run_dir):
            (run_dir / "LOCK").unlink(missing_ok=True)
            run_dir.rmdir()


def is_used(run_dir):
    return any(p.name != "LOCK" and not p.name.startswith("previous_") for p in Path(run_dir).glob("*"))


def archive(run_dir):
    """--if_exists archive: the files of the earlier run move to previous_N/, none is lost."""
    number = 1
    while (run_dir / f"previous_{number}").exists():
        number += 1
    aside = run_dir / f"previous_{number}"
    aside.mkdir()
    for p in run_dir.glob("*"):
        if p.name != "LOCK" and not p.name.startswith("previous_"):
            p.rename(aside / p.name)
    say(f"notice: the earlier run in {run_dir} was moved to {aside}")


def counters(saved):
    """state.json as train needs it; the keys that older runs lack get what those runs meant."""
    older = {"rollbacks": 0, "eval_due": 0, "losses": {}, "scaler": None, "wandb_id": None}
    state = older | {"kept": saved.state.get("best")} | saved.state
    for key, rule in COUNTERS.items():
        value = state.get(key, ...)
        fits = type(value) is int and rule <= value < 2 ** 63 if isinstance(rule, int) else isinstance(value, rule)
        if not fits or isinstance(value, bool):
            raise Damage(f"{saved.path / 'state.json'}: {key} is {str(value)[:60]!r}, from which nothing can go on")
    scaler = state["scaler"] or dict.fromkeys(SCALER, 1)
    losses = state["losses"]
    losses = state["losses"] = losses if isinstance(losses, dict) else {"0": losses}          # once of all block rules in one
    if set(scaler) != SCALER or not all(re.fullmatch("[0-9]{1,9}", block) for block in losses) or not all(
            isinstance(some, list) and all(type(n) in (int, float) and 0 <= n < 2 ** 128 for n in some)
            for some in (list(scaler.values()), *losses.values())):
        raise Damage(f"{saved.path / 'state.json'}: losses or scaler are no numbers, from which nothing can go on")
    return state
