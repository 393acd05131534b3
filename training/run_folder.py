"""The run folder of a training: which one, whether it is free, that only one process writes to it,
and where it resumes.

Used by train.py; nothing here runs by itself.
"""
import contextlib
import json
import math
import re
from pathlib import Path

import checkpoint
from common.console import Damage, UserError, say
from common.files import rename, replace_file, sync
from config import TrainArgs, longest_row
from training import drive, optim

# settings: two validation figures of a run compare while these stay
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
# what a run resumes from in state.json -> the smallest value of a whole number, or a type
COUNTERS = {
    "position": 0,
    "window": 1,
    "tokens_seen": 0,
    "skipped": 0,
    "ema_updates": 0,
    "rollbacks": 0,
    "eval_due": 0,
    "best": (float, int, type(None)),
    "kept": (float, int, type(None)),
    "data_sha256": str,
    "val_sha256": (str, type(None)),
    "precision": str,
    "losses": dict,
    "scaler": (dict, type(None)),
    "wandb_id": (str, type(None)),
}
SCALER = {
    "scale",
    "growth_factor",
    "backoff_factor",
    "growth_interval",
    "_growth_tracker",
    "overflows",
}


# ---- which folder, and from which checkpoint -----------------------------------------------------

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
        if args.resume not in (None, "latest"):
            source = args.resume
        elif not source:
            source = str(args.run_dir)
        fork = origins["output_dir"] == "flag" or origins["run_name"] == "flag"
        source, home = find_source(source, args.run_dir if fork else None)
        if not fork or home.resolve() == args.run_dir.resolve():
            return str(home), source, True

    run_dir = args.run_dir
    if not is_used(run_dir):
        return str(run_dir), source, resuming
    if args.if_exists == "suffix":
        return str(next_suffix(run_dir)), source, resuming
    if not is_ours(run_dir):
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
    return str(run_dir), source, resuming  # archive: not before the arguments have proved sound


def find_source(source, fork=None):
    """What a resume names -> (the same, exact; its run folder). fork: the folder that it goes on
    in, if that is another one. Then the run that is named stays as it is, so `best-base.ckpt` may
    mean the newest of several; but never the fork's own, which a second call would take.
    """
    found = checkpoint.candidates(source, guess=fork is not None)
    if fork is not None and found[0].parent.resolve() == fork.resolve():
        found = checkpoint.candidates(source, guess=False)
    home = found[0].parent
    if home.resolve() not in (Path(source).resolve(), Path(source).resolve().parent):
        # the name of a run one level below: another one may be the newest by the time that the
        # weights are read
        exact = str(home) if len(found) > 1 else str(found[0])
        say(f"checkpoint: {source} -> {exact}")
        source = exact
    return source, home


def next_suffix(run_dir):
    """The first of RUN_v2, RUN_v3, ... that is free."""
    number = 2
    while Path(f"{run_dir}_v{number}").exists():
        number += 1
    return Path(f"{run_dir}_v{number}")


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
    for path in Path(run_dir).glob("*"):
        if path.name not in unused and not path.name.startswith("previous_"):
            return True
    return False


def is_ours(run_dir):
    """Whether a training made this folder, by what only a training writes: a sealed checkpoint, or
    the log's first line.
    """
    for folder in checkpoint.list_steps(run_dir).values():
        with contextlib.suppress(UserError):
            checkpoint.read_manifest(folder)
            return True
    log = Path(run_dir) / "train.jsonl"
    with contextlib.suppress(OSError, ValueError), open(log, encoding="utf-8") as file:
        first = json.loads(file.readline(1 << 20))
        if isinstance(first, dict):
            return first.get("event") == "meta" and "planned_tokens" in first
    return False


# ---- what was there before: archived, compared, rewound ------------------------------------------

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
    for path in run_dir.glob("*"):
        ours = path.name in FILES or FOLDERS.fullmatch(path.name)
        if ours and path.name != "LOCK" and not path.name.startswith("previous_"):
            path.rename(aside / path.name)
    say(f"notice: the earlier run in {run_dir} was moved to {aside}")


def same_validation(config, state, args, meta):
    """Whether a validation figure of that checkpoint compares with those of a run with these
    arguments and this text.
    """
    old = config.get("args", {})
    asked = all(old.get(key) == getattr(args, key) for key in VALIDATION)
    if not asked or longest_row(old) != args.longest:
        return False
    return state.get("val_sha256") in (None, meta["val_sha256"])


def best_score(steps, args, meta):
    """Of these checkpoints {step: folder} -> (the lowest figure of those that compare, its step),
    or (inf, None).
    """
    found = (math.inf, None)
    for step, folder in steps.items():
        with contextlib.suppress(UserError):
            state = checkpoint.read_json(folder / "state.json")
            config = checkpoint.read_json(folder / "config.json")
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
            replace_file(aside / name, (run_dir / name).read_bytes(), aside)

    # the pointers first: after a kill in between, the run goes on from this step all the same
    checkpoint.write_pointer(run_dir, "latest", saved.step)
    if best in later:
        earlier = {step: folder for step, folder in steps.items() if step <= saved.step}
        kept, best = best_score(earlier, args, meta)
        if best is None:
            (run_dir / "best").unlink()
        else:
            checkpoint.write_pointer(run_dir, "best", best)

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


# ---- where a run goes on -------------------------------------------------------------------------

def rate_jump(saved, args, step):
    """[a sentence], if the rate of the next update is another one than the run before this resume
    would have taken.
    """
    settings = {}
    for name, value in saved.config["args"].items():
        if name in TrainArgs.__dataclass_fields__:
            settings[name] = value
    old = TrainArgs(**settings)
    before = rate_of(old, step)
    now = rate_of(args, step)
    if abs(now - before) <= 0.01 * before:
        return []
    return [
        f"the learning rate at step {step + 1} is {now:.2e}, where the run had {before:.2e} "
        f"before: it follows --max_steps ({old.max_steps} -> {args.max_steps}), --lr "
        f"({old.lr:g} -> {args.lr:g}) and the schedule"
    ]


def rate_of(args, step):
    return optim.lr_at(
        step, args.max_steps, args.lr, args.warmup, args.lr_schedule, args.min_lr_ratio
    )


def counters(saved):
    """state.json as train needs it; an older one has no window, as all rows were equally long."""
    where = saved.path / "state.json"
    state = {"window": saved.config["args"]["seq_len"]} | saved.state
    for key, rule in COUNTERS.items():
        value = state.get(key, ...)
        if not fits(value, rule):
            raise Damage(f"{where}: {key} is {str(value)[:60]!r}, from which nothing can go on")

    scaler = state["scaler"] or dict.fromkeys(SCALER, 1)
    blocks_fit = all(re.fullmatch("[0-9]{1,9}", block) for block in state["losses"])
    numbers_fit = all(map(are_numbers, (list(scaler.values()), *state["losses"].values())))
    if set(scaler) != SCALER or not blocks_fit or not numbers_fit:
        raise Damage(f"{where}: losses or scaler are no numbers, from which nothing can go on")
    return state


def fits(value, rule):
    """Whether a value of state.json is what COUNTERS asks for."""
    if isinstance(value, bool):
        return False
    if isinstance(rule, int):
        return type(value) is int and rule <= value < 2**63
    return isinstance(value, rule)


def are_numbers(values):
    if not isinstance(values, list):
        return False
    return all(type(value) in (int, float) and 0 <= value < 2**128 for value in values)
