"""Checkpoints are folders, `checkpoints/<run>/step_000500/`: safetensors, JSON, the tokenizer, a
manifest of hashes.

Used by train.py (run_lock, save, load), sample.py and edge_benchmark.py (load); nothing here runs
by itself. Notable:
* a save is written aside, synced, then renamed: a kill at any moment leaves the earlier or the new
  state, never a half;
* neither safetensors nor torch notices a flipped bit: every file is hashed here, and checked on
  every load;
* no pickle: the file names that older guides type (`last.ckpt`, `step_000500.pt`) are only names
  for such folders.
"""
import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import files
from common.console import Damage, UserError, say
from common.files import file_sha256, lock, rename, replace_file, sync, to_json, write_file
from model import build_model
from model_config import ModelConfig, count_params, weight_name
from text.tokenizer import Tokenizer

FORMAT = "aria-checkpoint-1"
PARTS, MANIFEST = ("model", "ema", "optimizer"), "MANIFEST.json"
SMALL = {"state.json", "config.json", "tokenizer.model"}
EVERY = math.inf  # checkpoints to keep
LARGEST_MANIFEST = 1 << 26  # bytes; a manifest has some 150 for each file
READ_LIMIT = 20  # times that a reader looks again for a checkpoint that was pruned before its eyes
# file managers leave these anywhere; nothing reads them
STRAY = {".DS_Store", "desktop.ini", "Thumbs.db"}

# --------------------------------------------------------------------------------------------------
# disk work

def remove(path):
    """A file, a folder, or a link: of a link only the link itself, never what it names."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

def discard(folder):
    """Rename first, delete then: what bears a checkpoint's name is always whole."""
    trash = folder.with_name(f".trash-{folder.name.lstrip('.')}-{time.time_ns()}")
    rename(folder, trash)
    sync(folder.parent)
    remove(trash)

def sweep(run):
    """Clear up after a killed writer. Only the one writer of a run may call this."""
    for path in run.glob(".*-*"):
        if path.name.startswith((".tmp-", ".trash-")):
            remove(path)
        elif path.name.startswith(".old-step_"):
            final = path.with_name(path.name.removeprefix(".old-"))
            discard(path) if final.exists() else rename(path, final)

@contextlib.contextmanager
def run_lock(run_dir):
    """One writer per run folder; a second one is refused. The kernel frees the lock however its
    holder dies.
    """
    run = Path(run_dir)
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "LOCK", "a+") as f:
        try:
            lock(f)
        except BlockingIOError:
            f.seek(0)
            raise UserError(
                f"process {f.read(20)} trains in {run}: wait, or choose another --output_dir"
            ) from None
        except OSError as error:
            say(
                f"warning: {run} cannot be locked ({error.strerror}): start only one training in it"
            )
        f.truncate(0)
        f.write(str(os.getpid()))
        f.flush()
        sweep(run)
        yield

# --------------------------------------------------------------------------------------------------
# save

def save(
    run_dir,
    step,
    *,
    state,
    config,
    tokenizer_bytes,
    model_state=None,
    ema_state=None,
    optimizer_state=None,
    shards=None,
    best=False,
    keep_last=EVERY,
    keep_full=EVERY,
):
    """Write checkpoint `step`, point (`best` and) `latest` at it, prune; returns its folder.

    shards(folder) -> {file: its entry} writes the tensors instead, where several processes have a
    part of each (checkpoint_shards.py).

    FloatingPointError: a tensor is not finite, nothing was touched. OSError (disk full, ...): what
    was there is intact and nothing half-written bears a checkpoint's name. Saving a step that
    exists replaces it.
    """
    assert model_state or shards, "a checkpoint without weights"
    run, name = Path(run_dir), step_name(step)
    temp, final, old = run / f".tmp-{name}-{os.getpid()}", run / name, run / f".old-{name}"
    tensors = {f"{part}.safetensors": pack(found, part) for part, found in
               zip(PARTS, (model_state, ema_state, optimizer_state), strict=True) if found}
    small = {
        "state.json": to_json({**state, "format": FORMAT, "step": step}),
        "config.json": to_json(config),
        "tokenizer.model": tokenizer_bytes,
    }
    run.mkdir(parents=True, exist_ok=True)
    try:
        sweep(run)
        temp.mkdir()
        for file, data in small.items():
            write_file(temp / file, data)
        for file, (part, tied) in tensors.items():
            write_tensors(temp / file, part, tied)
        files = {
            f: {"size": (temp / f).stat().st_size, "sha256": file_sha256(temp / f)}
            for f in (*small, *tensors)
        }
        files |= shards(temp) if shards else {}
        write_file(
            temp / MANIFEST,
            to_json(
                seal(
                    {
                        "format": FORMAT,
                        "step": step,
                        "files": files,
                        "tokenizer_sha256": files["tokenizer.model"]["sha256"],
                        "config_sha256": files["config.json"]["sha256"],
                    }
                )
            ),
        )
        sync(temp)
        # the old one steps aside, to where list_steps() and sweep() still find it
        if final.exists():
            rename(final, old)
        rename(temp, final)
        sync(run)
        if any((final / file).stat().st_size != entry["size"] for file, entry in files.items()):
            rename(final, temp)
            raise OSError(errno.EIO, "a file has another size than what was written", str(final))
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        with contextlib.suppress(OSError):
            sweep(run)
        raise
    # latest last: a kill in between repeats this save, best included
    for pointer in ("best", "latest") if best else ("latest",):
        replace_file(
            run / pointer, f"{name}\n{datetime.now(timezone.utc).isoformat()}\n".encode(), run
        )
    try:
        prune(run, step, keep_last, keep_full)
    except OSError as error:  # the new checkpoint is safe, and the next save prunes again
        say(f"warning: old checkpoints in {run} could not be removed: {error}")
    return final

def pack(tensors, part):
    """Tensors -> (what safetensors takes: on the CPU, dense, each storage once; {name tied to
    another: that one}).
    """
    kept, tied, seen = {}, {}, {}
    for key, t in tensors.items():
        assert "_orig_mod." not in key, f"{key}: save the bare module, not its compiled wrapper"
        assert t.numel(), f"{part}: {key} is empty"
        if t.is_floating_point() and not torch.isfinite(t).all():
            raise FloatingPointError(f"{part}: {key} holds NaN or infinity; nothing was saved")
        first = seen.setdefault((t.device, t.data_ptr(), t.shape, t.stride(), t.dtype), key)
        if first != key:
            tied[key] = first
            continue
        t = t.detach().cpu().contiguous()
        # a slice without its whole storage
        kept[key] = t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
    return kept, tied

def write_tensors(path, tensors, tied):
    try:
        save_file(tensors, path, metadata={"tied": json.dumps(tied)})
    except SafetensorError as error:  # the library tells a full disk only in words
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error), str(path)) from error
    # the library's 0600 ignores the umask
    os.chmod(path, (path.parent / "state.json").stat().st_mode & 0o777)
    sync(path)

def prune(run, step, keep_last, keep_full):
    """Newest first: the steps up to the one just saved, then those that the run had reached before
    it was rewound.
    """
    sweep(run)
    steps = list_steps(run)
    for rank, s in enumerate(sorted(steps, key=lambda s: (s <= step, s), reverse=True)):
        folder = steps[s]
        if keep_last and rank >= keep_last and s not in (step, read_pointer(run, "best")[0]):
            discard(folder)
        elif rank >= keep_full and (
            moments := [path for path in folder.iterdir() if part_of(path.name) == "optimizer"]
        ):
            try:
                manifest = read_manifest(folder)
            except UserError:
                continue  # damaged: somebody may want to look at it as it is
            # a kill leaves files that count no more
            if any([manifest["files"].pop(path.name, None) for path in moments]):
                replace_file(
                    folder / MANIFEST,
                    to_json(seal({**manifest, "dropped": "optimizer.safetensors"})),
                    run,
                )
            for path in moments:
                path.unlink()

# --------------------------------------------------------------------------------------------------
# load

def read_json(path):
    try:
        return files.read_json(path)
    except UserError as error:
        raise Damage(str(error)) from None

def seal(manifest):
    """Adds the manifest's own hash, so that a flipped bit in the list of hashes shows as well."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return {**body, "sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}

def regular(path):
    """The status of a regular file: a pipe would be waited for, and a device may never end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return found

def read_manifest(folder):
    path = folder / MANIFEST
    try:
        size = regular(path).st_size
    except OSError as error:
        raise Damage(f"cannot read {path}: {error.strerror}") from None
    if size > LARGEST_MANIFEST:
        raise Damage(f"{path} has {size:,} bytes, which is no manifest")
    manifest = read_json(path)
    try:
        # byte for byte: not even a space may differ
        whole = path.read_bytes() == to_json(seal(manifest))
    except (OSError, ValueError):
        whole = False
    if not whole:
        raise Damage(f"{path} was changed after it was written")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path} has the format {manifest.get('format')!r}, but this Aria reads {FORMAT}"
        )
    files, step = manifest.get("files"), manifest.get("step")
    known = (
        isinstance(files, dict)
        and set(files) >= SMALL
        and "model" in parts_of(folder, files)
        and all(file in SMALL or part_of(file) for file in files)
    )
    if not known or type(step) is not int:
        raise Damage(f"{path} is incomplete")
    if re.fullmatch(r"step_[0-9]+", folder.name) and folder.name != step_name(step):
        raise Damage(f"{path} belongs to step {step}, not to {folder.name}")
    return manifest

def difference(found, entry):
    """What is there now and what the manifest says, in words."""
    if not isinstance(entry, dict) or type(entry.get("size")) is not int:
        return "the manifest does not say what it was"
    if found["size"] != entry["size"]:
        return f"it has {found['size']:,} bytes instead of {entry['size']:,}"
    return "its bytes have changed (another SHA-256)"


def verify(folder):
    """Every listed file is there with its size and hash, and no other; returns the manifest."""
    manifest = read_manifest(folder)
    for file, entry in manifest["files"].items():
        try:
            found = {"size": regular(folder / file).st_size}
            if isinstance(entry, dict) and found["size"] == entry.get("size"):
                found["sha256"] = file_sha256(folder / file)
        except OSError as error:
            raise Damage(f"{folder / file} cannot be read: {error.strerror}") from None
        if found != entry:
            raise Damage(f"{folder / file} is not what was saved: {difference(found, entry)}")
    try:
        extra = set(os.listdir(folder)) - {MANIFEST, *manifest["files"], *STRAY}
    except OSError as error:
        raise Damage(f"{folder} cannot be read: {error.strerror}") from None
    extra = {
        file for file in extra if not (manifest.get("dropped") and part_of(file) == "optimizer")
    }
    if extra:
        raise Damage(f"{folder / min(extra)} does not belong to this checkpoint: move it away")
    return manifest

def read_tensors(path):
    tensors = {}
    try:
        with safe_open(path, framework="pt") as f:
            for key in f.keys():  # noqa: SIM118
                if not all(0 < side < 1 << 32 for side in f.get_slice(key).get_shape()):
                    raise Damage(f"{path}: {key} has the shape {f.get_slice(key).get_shape()}")
                # a copy: what stays mapped must not be written over
                t = tensors[key] = f.get_tensor(key).clone()
                if t.is_floating_point() and not torch.isfinite(t).all():
                    raise Damage(f"{path}: {key} holds NaN or infinity")
            tied = json.loads((f.metadata() or {}).get("tied", "{}"))
            return tensors | {key: tensors[first] for key, first in tied.items()}
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Damage(f"{path} is no valid tensor file: {error!r}") from None

def read_part(files):
    """One part of a checkpoint, whole, from the one file that holds it or from those of several
    processes.
    """
    if len(files) == 1 and files[0].stem in PARTS:
        tensors = read_tensors(files[0])
    else:
        import checkpoint_shards
        tensors = checkpoint_shards.read_whole(files)
    return {weight_name(key): t for key, t in tensors.items()}

def load(path, *, parts=("model",), quarantine=False):
    """Any spelling of a checkpoint -> .path .step .config .state .tokenizer_bytes .files .model
    .ema .optimizer (or None).

    All files are verified, the tensors of `parts` are read. A damaged `latest` falls back to the
    one before, loudly; with quarantine (for the holder of the lock) it is renamed .corrupt-*.
    Damage in a step that was named raises.
    """
    def read(folder):
        manifest, found = verify(folder), dict.fromkeys(PARTS)
        state, config = read_json(folder / "state.json"), read_json(folder / "config.json")
        if (state.get("format"), state.get("step")) != (FORMAT, manifest["step"]):
            raise Damage(f"{folder / 'state.json'} is not of step {manifest['step']}")
        files = parts_of(folder, manifest["files"])
        for part in parts:
            found[part] = read_part(files[part]) if part in files else None
        try:
            tokenizer_bytes = (folder / "tokenizer.model").read_bytes()
        except OSError as error:
            raise Damage(f"{folder / 'tokenizer.model'} cannot be read: {error.strerror}") from None
        return SimpleNamespace(
            path=folder,
            step=manifest["step"],
            config=config,
            state=state,
            files=files,
            tokenizer_bytes=tokenizer_bytes,
            **found,
        )

    return first_good(path, read, quarantine)

def section(saved, name):
    """config.json's "model" or "args"."""
    if not isinstance(saved.config.get(name), dict):
        raise Damage(f"{saved.path / 'config.json'} has no {name!r}")
    return saved.config[name]

def may_fit(cfg, tensors):
    """Before a model is built: a shape beyond all that the file holds is refused, and takes no
    memory.
    """
    asked, found = count_params(cfg), sum(t.numel() for t in tensors.values())
    if asked > 2 * found:
        raise UserError(
            f"the checkpoint does not fit the model: {asked:,} parameters by the shape, {found:,} "
            "in the file"
        )


def load_into(model, tensors):
    """Copy tensors into the model; every name and every shape must match."""
    own = model.state_dict()
    for key in (*own, *tensors):
        theirs, ours = (
            tuple(side[key].shape) if key in side else "missing" for side in (tensors, own)
        )
        if theirs != ours:
            raise UserError(
                f"the checkpoint does not fit the model: {key} is {theirs} there and {ours} here"
            )
    model.load_state_dict(tensors)

# --------------------------------------------------------------------------------------------------
# names

def part_of(file):
    """"model.safetensors", or "model-00001-of-00004.safetensors" -> "model"; None of another name.
    """
    match = re.fullmatch(rf"({'|'.join(PARTS)})(-[0-9]{{5}}-of-[0-9]{{5}})?\.safetensors", file)
    return match and match[1]

def parts_of(folder, files):
    """{part: the paths of its files} of those that there are."""
    found = {
        part: [folder / file for file in sorted(files) if part_of(file) == part] for part in PARTS
    }
    return {part: paths for part, paths in found.items() if paths}

def step_name(step):
    return f"step_{step:06d}"

def list_steps(run_dir):
    """{step: folder}, ascending. What a killed re-save had set aside counts as long as its own name
    is free.
    """
    found = {}
    # ".old-step_" sorts first, so its successor overrides it
    for folder in sorted(Path(run_dir).glob("*step_*")):
        match = re.fullmatch(r"(?:\.old-)?(step_([0-9]{6,12}))", folder.name)
        if match and match[1] == step_name(int(match[2])) and os.path.isdir(folder):
            found[int(match[2])] = folder
    return dict(sorted(found.items()))

def read_pointer(run, pointer):
    """The text file `latest` or `best` -> (step or None, the time it was written)."""
    with contextlib.suppress(OSError, ValueError):
        regular(run / pointer)
        name, *when = (run / pointer).read_text(encoding="utf-8").split("\n")
        if re.fullmatch(r"step_[0-9]{6,12}", name):
            return int(name[5:]), "".join(when)
    return None, ""

def is_run(folder):
    return os.path.isfile(Path(folder) / "latest") or bool(list_steps(folder))

def choose_run(runs, name, want, guess):
    """The run that is meant by a name one level above several -> its folder, or None.

    It is the run that saved last, of those that have step `want` if that is a number. A resume
    writes into the run, so it does not guess: `last.ckpt` means the newest run, and any other name
    has to fit exactly one.
    """
    if isinstance(want, int):
        runs = [run for run in runs if want in list_steps(run)]
    if not guess and want != "latest":
        exact = isinstance(want, int) or re.fullmatch(r"best(\..*)?", name)
        if len(runs) != 1 or not exact:
            return None
    return max(runs, key=lambda run: read_pointer(run, "latest")[1], default=None)

def candidates(path, guess=True):
    """What was typed -> the folders to try, in order; more than one only where `latest` is meant.

    guess: a name that no run has by itself may mean the newest one of several runs, see
    choose_run().
    """
    p, run, folder = Path(path), Path(path).parent, os.path.isdir(path)
    if folder and (re.fullmatch(r"step_[0-9]{6,12}", p.name) or os.path.exists(p / MANIFEST)):
        return [p]
    if os.path.exists(p) and not folder and p.name not in ("latest", "best"):
        raise UserError(
            f"{p} is a file, and Aria opens no foreign checkpoints: name a folder such as "
            "step_000500"
        )
    number = re.findall(r"(?<![a-z])step[=_]?([0-9]{1,12})(?![0-9])", p.name)
    if folder:
        run, want = p, "latest"
    elif number:
        want = int(number[-1])
    else:
        want = (
            "best"
            if p.name.startswith("best")
            else re.fullmatch(r"(latest|last)(\..*)?", p.name) and "latest"
        )
    below = [] if is_run(run) else [child for child in run.glob("*") if is_run(child)]
    if below and not folder:
        run = choose_run(below, p.name, want, guess)
    steps = list_steps(run) if run else {}
    if want == "latest" and steps:
        target = read_pointer(run, "latest")[0]
        if target is None:
            say(f"warning: {run / 'latest'} is missing or damaged: taking the newest checkpoint")
            target = max(steps)
        order = sorted({target, *steps}, key=lambda s: (s <= target, s), reverse=True)
        return [steps.get(s, run / step_name(s)) for s in order]
    want = read_pointer(run, "best")[0] if run and want == "best" else want
    if want in steps:
        return [steps[want]]
    known = [str(found) for r in (below or [run]) for found in list_steps(r).values()]
    there = f"there are: {', '.join(known)}" if known else "python -m train makes one"
    raise UserError(f"there is no checkpoint {p}; {there}")

class Moved(Exception):
    """A training replaced or pruned a checkpoint while it was being read."""

def manifest_bytes(folder):
    with contextlib.suppress(OSError):
        return (folder / MANIFEST).read_bytes()
    return None

def first_good(path, use, quarantine=False):
    """use(folder), of the first candidate that is not damaged; a training may save and prune at the
    same time.
    """
    for _ in range(READ_LIMIT):
        with contextlib.suppress(Moved):
            return first_of(candidates(path), path, use, quarantine)
    raise UserError(
        f"{path} changed {READ_LIMIT} times while it was being read: name a step that stays, or "
        "wait"
    )


def first_of(folders, path, use, quarantine):
    first = None
    for folder in folders:
        before = manifest_bytes(folder)
        try:
            result = use(folder)
        except Damage as damage:
            if manifest_bytes(folder) != before or candidates(path) != folders:
                raise Moved from None
            if len(folders) == 1:
                raise
            first = first or damage
            say(f"warning: {damage}; trying the checkpoint before it")
            if quarantine and folder.exists():
                rename(
                    folder, folder.with_name(f".corrupt-{folder.name.lstrip('.')}-{time.time_ns()}")
                )
            continue
        if folder != Path(path):
            say(f"checkpoint: {path} -> {folder.as_posix()}")
        return result
    raise UserError(f"no usable checkpoint at {path}: {first}")

def load_model(path, device, check_settings, model="auto", tokenizer_path=None):
    """Any spelling of a checkpoint -> (model in eval mode, its averaged weights if it has them;
    tokenizer; checkpoint).

    check_settings(settings, where) refuses settings of the training that the caller cannot use.
    """
    saved = load(path, parts=("model", "ema"))
    cfg = ModelConfig.from_dict(section(saved, "model"))
    check_settings(section(saved, "args"), saved.path / "config.json")
    may_fit(cfg, saved.model)
    if model not in ("auto", cfg.model):
        raise UserError(
            f"{saved.path} holds a {cfg.model} model, --model says {model}: use --model {cfg.model}"
        )
    tokenizer = Tokenizer(saved.tokenizer_bytes)
    if tokenizer_path is not None:
        if not os.path.exists(tokenizer_path):
            raise UserError(
                f"--tokenizer {tokenizer_path}: no such file; leave the flag out, the checkpoint "
                "carries its "
                "own tokenizer"
            )
        given = Tokenizer(tokenizer_path)
        if given.sha256 != tokenizer.sha256:
            raise UserError(
                f"--tokenizer {tokenizer_path} ({given.sha256[:12]}) is not the one this "
                "checkpoint was trained with "
                f"({tokenizer.sha256[:12]}): leave the flag out, the checkpoint carries its own"
            )
    net = build_model(cfg)
    load_into(net, saved.ema or saved.model)
    return net.eval().to(device), tokenizer, saved
