"""The run folder of a training: which one, whether it is free, that only one process writes to it,
and where it resumes.

Used by train.py; nothing here runs by itself.
"""
import contextlib
import json
import math
import re
from datetime import datetime, timezone
from pathlib import Path

import checkpoint
from common.console import Damage, UserError, say
from common.files import rename, replace_file, sync
from config import TrainArgs
from training import drive

# two figures of a run compare while these stay
VALIDATION = ("train_block_sizes", "batch_size", "eval_batches")
# what a training writes into its run folder, next to the folders of its checkpoints
FILES = {
    "LOCK",
    "latest",
    "best",
    "train.jsonl",
    "config.json",
    "summary.md",
    "report.html",
    "analysis.npz",
}
FOLDERS = re.compile(r"step_[0-9]{6,12}|previous_[0-9]+|\.(tmp|trash|old|corrupt)-.+")
COUNTERS = {  # what a run resumes from in state.json -> the smallest value of a number, or a type
    "position": 0, "tokens_seen": 0, "skipped": 0, "ema_updates": 0, "rollbacks": 0, "eval_due": 0,
    "data_sha256": str, "precision": str, "val_sha256": (str, type(None)),
    "losses": (dict, list), "wandb_id": (str, type(None)), "scaler": (dict, type(None)),
    **dict.fromkeys(("best", "kept"), (float, int, type(None)))}
SCALER = {
    "scale",
    "growth_factor",
    "backoff_factor",
    "growth_interval",
    "_growth_tracker",
    "overflows",
}


def choose(args, origins):
    """-> (run folder or None to skip, checkpoint to start from or None, whether it is a resume).
    Reads no weights.
    """
    if args.drive:
        drive.open_folder(args.drive)
        if args.resume_latest:
            drive.restore(args.run_dir, args.drive, say)
    if args.resume_latest and not checkpoint.is_run(args.run_dir):
        args.resume_latest = False               # nothing there yet: a fresh start
    resuming = bool(args.resume or args.resume_latest)
    source = args.ckpt
    if resuming:
        source = (
            args.resume if args.resume not in (None, "latest") else args.ckpt or str(args.run_dir)
        )
    fork = any(origins[name] == "flag" for name in ("output_dir", "run_name"))
    if resuming:
        found = checkpoint.candidates(source, guess=False)
        home = found[0].parent
        if home.resolve() not in (Path(source).resolve(), Path(source).resolve().parent):
            # the name of a run one level below: another one may be the newest by the time that the
            # weights are read
            exact = str(home) if len(found) > 1 else str(found[0])
            say(f"checkpoint: {source} -> {exact}")
            source = exact
        if not fork or home.resolve() == args.run_dir.resolve():
            return str(home), source, True
    run_dir = args.run_dir
    if is_used(run_dir):
        if args.if_exists != "suffix" and not is_ours(run_dir):
            raise UserError(
                f"{run_dir} is no run folder, and nothing in it is moved or changed: choose "
                "another --output_dir"
            )
        if args.if_exists == "error":
            raise UserError(
                f"{run_dir} already holds a run: add --resume to continue it, or choose another "
                "--output_dir"
            )
        if args.if_exists == "skip":
            return None, source, resuming
        if args.if_exists == "suffix":
            number = 2
            while Path(f"{run_dir}_v{number}").exists():
                number += 1
            run_dir = Path(f"{run_dir}_v{number}")
    return str(run_dir), source, resuming


@contextlib.contextmanager
def locked(run_dir):
    """Inside, the folder is there and nobody else writes to it; a run that failed before it began
    leaves no trace.
    """
    new = not run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder {run_dir} ({error.strerror}): name another "
            "--output_dir"
        ) from None
    try:
        with contextlib.ExitStack() as lock:
            try:
                lock.enter_context(checkpoint.run_lock(run_dir))
            except OSError as error:
                raise UserError(
                    f"cannot write to the run folder {run_dir} ({error.strerror}): copy it to "
                    "where you can, "
                    "or name another --output_dir"
                ) from None
            yield
    finally:
        if new and run_dir.exists() and not is_used(run_dir):
            (run_dir / "LOCK").unlink(missing_ok=True)
            run_dir.rmdir()


def what_is_there(run_dir):
    """The end of a sentence: from which step a resume goes on."""
    step = checkpoint.read_pointer(Path(run_dir), "latest")[0]
    return "it has no checkpoint" if step is None else f"a resume goes on from step {step}"


def is_used(run_dir):
    unused = {"LOCK", *checkpoint.STRAY}
    return any(
        p.name not in unused and not p.name.startswith("previous_") for p in Path(run_dir).glob("*")
    )


def is_ours(run_dir):
    """Whether a training made this folder, by what only a training writes: a sealed checkpoint, or
    the log's first line.
    """
    for folder in checkpoint.list_steps(run_dir).values():
        with contextlib.suppress(UserError):
            checkpoint.read_manifest(folder)
            return True
    with (
        contextlib.suppress(OSError, ValueError),
        open(Path(run_dir) / "train.jsonl", encoding="utf-8") as f,
    ):
        first = json.loads(f.readline(1 << 20))
        return (
            isinstance(first, dict) and first.get("event") == "meta" and "planned_tokens" in first
        )
    return False


def next_previous(run_dir):
    """A new folder previous_N inside the run folder."""
    number = 1
    while (run_dir / f"previous_{number}").exists():
        number += 1
    aside = run_dir / f"previous_{number}"
    aside.mkdir()
    return aside


def archive(run_dir):
    """--if_exists archive: the files of the earlier run move to previous_N/, none is lost; others
    stay where they are.
    """
    aside = next_previous(run_dir)
    for p in run_dir.glob("*"):
        ours = p.name in FILES or FOLDERS.fullmatch(p.name)
        if ours and p.name != "LOCK" and not p.name.startswith("previous_"):
            p.rename(aside / p.name)
    say(f"notice: the earlier run in {run_dir} was moved to {aside}")


def same_validation(config, state, args, meta):
    """Whether a validation figure of that checkpoint compares with those of a run with these
    arguments and this text.
    """
    old = config.get("args", {})
    asked = all(old.get(key) == getattr(args, key) for key in VALIDATION)
    return asked and state.get("val_sha256") in (None, meta["val_sha256"])


def best_score(steps, args, meta):
    """Of these checkpoints {step: folder} -> (the lowest figure of those that compare, its step),
    or (inf, None).
    """
    found = (math.inf, None)
    for step, folder in steps.items():
        with contextlib.suppress(UserError):
            state, config = (
                checkpoint.read_json(folder / name) for name in ("state.json", "config.json")
            )
            score = state.get("score")
            if type(score) is float and same_validation(config, state, args, meta):
                found = min(found, (score, step))
    return found


def rewind(run_dir, saved, kept, args, meta):
    """A resume inside its own run from step `saved.step`: later checkpoints move to previous_N/,
    which is a run of its own.

    -> the figure of the checkpoint that `best` names from now on; kept, if nothing moved.
    """
    steps = checkpoint.list_steps(run_dir)
    later = {step: folder for step, folder in steps.items() if step > saved.step}
    if not later:
        return kept
    aside = next_previous(run_dir)
    best = checkpoint.read_pointer(run_dir, "best")[0]
    for name in ("best", "latest"):
        if checkpoint.read_pointer(run_dir, name)[0] in later:
            replace_file(aside / name, (run_dir / name).read_bytes())

    # the pointers first: after a kill in between, the run goes on from this step all the same
    def point(name, step):
        text = f"{checkpoint.step_name(step)}\n{datetime.now(timezone.utc).isoformat()}\n"
        replace_file(run_dir / name, text.encode())
    point("latest", saved.step)
    if best in later:
        kept, best = best_score(
            {step: steps[step] for step in steps if step <= saved.step}, args, meta
        )
        if best is None:
            (run_dir / "best").unlink()
        else:
            point("best", best)
    for step, folder in later.items():
        rename(folder, aside / checkpoint.step_name(step))
    sync(aside)
    sync(run_dir)
    names = ", ".join(checkpoint.step_name(step) for step in later)
    say(
        f"notice: the run goes on from step {saved.step}; its later checkpoints ({names}) were "
        f"moved to {aside}"
    )
    return kept


def rate_jump(saved, args, step):
    """[a sentence], if the rate of the next update is another one than the run before this resume
    would have taken.
    """
    from training import optim

    old = TrainArgs(
        **{
            key: value
            for key, value in saved.config["args"].items()
            if key in TrainArgs.__dataclass_fields__
        }
    )

    def rate(a):
        return optim.lr_at(step, a.max_steps, a.lr, a.warmup, a.lr_schedule, a.min_lr_ratio)
    before, now = rate(old), rate(args)
    if abs(now - before) <= 0.01 * before:
        return []
    return [
        f"the learning rate at step {step + 1} is {now:.2e}, where the run had {before:.2e} "
        "before: it follows "
        f"--max_steps ({old.max_steps} -> {args.max_steps}), --lr ({old.lr:g} -> {args.lr:g}) and "
        "the schedule"
    ]


def counters(saved):
    """state.json as train needs it; the keys that older runs lack get what those runs meant."""
    older = {
        "rollbacks": 0,
        "eval_due": 0,
        "losses": {},
        "scaler": None,
        "wandb_id": None,
        "val_sha256": None,
    }
    state = older | {"kept": saved.state.get("best")} | saved.state
    for key, rule in COUNTERS.items():
        value = state.get(key, ...)
        fits = (
            type(value) is int and rule <= value < 2**63
            if isinstance(rule, int)
            else isinstance(value, rule)
        )
        if not fits or isinstance(value, bool):
            raise Damage(
                f"{saved.path / 'state.json'}: {key} is {str(value)[:60]!r}, from which nothing "
                "can go on"
            )
    scaler = state["scaler"] or dict.fromkeys(SCALER, 1)
    losses = state["losses"]
    # once of all block rules in one
    losses = state["losses"] = losses if isinstance(losses, dict) else {"0": losses}
    if (
        set(scaler) != SCALER
        or not all(re.fullmatch("[0-9]{1,9}", block) for block in losses)
        or not all(
            isinstance(some, list)
            and all(type(n) in (int, float) and 0 <= n < 2**128 for n in some)
            for some in (list(scaler.values()), *losses.values())
        )
    ):
        raise Damage(
            f"{saved.path / 'state.json'}: losses or scaler are no numbers, from which nothing can "
            "go on"
        )
    return state
