"""A second home for a run: --drive DIR, such as a mounted Google Drive, which outlives the machine.

    drive.open_folder(dir)                     at the start: a wrong path is refused at once
    drive.store(checkpoint_folder, dir, say)   after each save; never raises: a drive that fails
                                               costs the copy, not the training
    drive.restore(run_dir, dir, say)           on a fresh machine: the newest whole checkpoint
                                               comes back

Only what was verified here goes there (MANIFEST.json); it is written aside, verified again where it
lies, and renamed. In DIR: <run>/step_000500/ with its pointers and train.jsonl (the newest KEPT and
the best), and text/<folder>/.
"""
import contextlib
import os
import shutil
from pathlib import Path

import checkpoint
from common.console import UserError
from common.files import read_json, rename, replace_file, sync
from text.dataset import TokenData, file_sha256

KEPT = 2
BESIDE = ("train.jsonl", "config.json", "summary.md", "report.html")      # of the run folder


def open_folder(folder):
    """DIR is made if need be, its parent never: a Drive that is not mounted must not become a
    folder of this machine.
    """
    try:
        Path(folder).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--drive {folder}: {error.strerror}: mount the drive, or name a folder inside another"
        ) from None


def copy_folder(source, target, check):
    """Copy aside, sync, check(copy), rename: what bears the name is whole. What bore it before is
    replaced.
    """
    aside = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        shutil.copytree(source, aside)
        for path in aside.iterdir():
            sync(path)
        check(aside)
        if target.exists():
            checkpoint.discard(target)
        rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def copy_files(source, target, names):
    for name in names:
        if (source / name).is_file():
            replace_file(target / name, (source / name).read_bytes())


def same(folder, other):
    """Both hold the same checkpoint, byte for byte."""
    with contextlib.suppress(UserError):               # damage, or an older one of that name
        return checkpoint.verify(folder)["files"] == checkpoint.verify(other)["files"]
    return False


def store(folder, drive, say):
    """Copy one checkpoint, then the pointers that name it and the log. Returns whether it is there
    now.
    """
    folder = Path(folder)
    run = folder.parent
    there = Path(drive) / run.name
    try:
        checkpoint.verify(folder)
        there.mkdir(exist_ok=True)  # one level: the drive itself has to be there
        checkpoint.sweep(there)
        if not same(folder, there / folder.name):
            copy_folder(folder, there / folder.name, checkpoint.verify)

        # a pointer goes there as soon as what it names is there
        copies = checkpoint.list_steps(there)
        pointed = {name: checkpoint.read_pointer(run, name)[0] for name in ("latest", "best")}
        pointers = [name for name, step in pointed.items() if step in copies]
        copy_files(run, there, (*BESIDE, *pointers))

        spare = sorted(set(copies) - set(pointed.values()))
        for step in spare[:-(KEPT - 1)]:
            checkpoint.discard(copies[step])
    except (OSError, UserError) as error:
        say(
            f"warning: {folder.name} could not be copied to --drive {drive}: {error}; the next "
            "save tries again"
        )
        return False
    return True


def restore(run_dir, drive, say):
    """If run_dir holds no run and DIR has one of its name: its newest whole checkpoint (and its
    best) comes back.
    """
    run = Path(run_dir)
    there = Path(drive) / run.name
    if checkpoint.is_run(run) or not checkpoint.is_run(there):
        return

    def bring(folder):
        name = checkpoint.step_name(checkpoint.verify(folder)["step"])
        run.mkdir(parents=True, exist_ok=True)
        copy_folder(folder, run / name, checkpoint.verify)
        return name

    try:
        name = checkpoint.first_good(there, bring)
        best = checkpoint.read_pointer(there, "best")[0]
        with contextlib.suppress(checkpoint.Damage):
            if best in checkpoint.list_steps(there) and checkpoint.step_name(best) != name:
                bring(checkpoint.list_steps(there)[best])
        pointers = ["best"] if best in checkpoint.list_steps(run) else []
        copy_files(there, run, (*BESIDE, *pointers))
        replace_file(run / "latest", f"{name}\n\n".encode(), run)
    except OSError as error:
        raise UserError(
            f"the run in {there} cannot be read ({error}): mend the drive, or leave --drive out",
            code=1,
        ) from None
    say(f"drive: {there / name} is back in {run}")


def check_text(folder):
    """Every hash of a prepared folder that carries its own tokenizer."""
    data = TokenData(folder, "train", verify=True)
    TokenData(folder, "val", verify=True)
    tokenizer = folder / Path(data.meta["tokenizer"]).name
    if not tokenizer.is_file() or file_sha256(tokenizer) != data.meta["tokenizer_sha256"]:
        raise UserError(f"{tokenizer} is not the tokenizer of this text")
    return data.meta


def store_text(data_dir, drive, say):
    """The prepared text with its tokenizer, once: a run goes on only with the very tokens that it
    began with.
    """
    folder = Path(data_dir)
    there = Path(drive) / "text" / folder.name
    try:
        meta = read_json(folder / "meta.json")
        if (there / "meta.json").exists() and read_json(there / "meta.json") == meta:
            return
        there.parent.mkdir(exist_ok=True)

        def finish(copy):
            shutil.copyfile(TokenData(folder).tokenizer_path, copy / Path(meta["tokenizer"]).name)
            check_text(copy)

        copy_folder(folder, there, finish)
    except (OSError, UserError) as error:
        say(f"warning: the text of {folder} could not be copied to --drive {drive}: {error}")


def restore_text(data_dir, drive, say):
    """The prepared text and its tokenizer, if this machine lacks them and DIR has them."""
    folder = Path(data_dir)
    there = Path(drive) / "text" / folder.name
    if (folder / "meta.json").exists() or not (there / "meta.json").exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        copy_folder(there, folder, check_text)
        tokenizer = Path(read_json(folder / "meta.json")["tokenizer"])
        if not tokenizer.is_absolute() and not tokenizer.exists():
            tokenizer.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / tokenizer.name, tokenizer)
        say(f"drive: the prepared text {there} is back in {folder}")
    except (OSError, UserError) as error:
        say(f"warning: the text in {there} is not usable: {error}")
