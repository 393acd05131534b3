"""Checkpoints are folders, `checkpoints/<run>/step_000500/`: safetensors, JSON, the tokenizer, a
manifest of hashes.

Used by training (run_lock, save, load) and by every command that reads a model (load_model);
nothing here runs by itself. Notable:
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

import lora
from common import files
from common.console import Damage, UserError, say
from common.files import file_sha256, lock, rename, replace_file, sync, to_json, write_file
from gaussian_model import network_of
from hf import hub, published
from model_config import ModelConfig, count_params
from text.gpt2 import check_tokenizer, open_tokenizer

FORMAT = "aria-checkpoint-2"
PARTS = ("model", "ema", "optimizer")  # the tensors, a file each, or one of each process
SMALL = {"state.json", "config.json", "tokenizer.model"}
MANIFEST = "MANIFEST.json"
EVERY = math.inf            # checkpoints to keep
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
            if final.exists():
                discard(path)
            else:
                rename(path, final)


@contextlib.contextmanager
def run_lock(run_dir):
    """One writer per run folder; a second one is refused. The kernel frees the lock however its
    holder dies.
    """
    run = Path(run_dir)
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "LOCK", "a+") as file:
        try:
            lock(file)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"process {file.read(20)} trains in {run}: wait, or choose another --output_dir"
            ) from None
        except OSError as error:
            say(
                f"warning: {run} cannot be locked ({error.strerror}): start only one training in it"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
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
    run = Path(run_dir)
    temp = run / f".tmp-{step_name(step)}-{os.getpid()}"
    final = run / step_name(step)

    # what must not be saved is refused here, before the disk is touched
    tensors = {}
    for part, state_dict in zip(PARTS, (model_state, ema_state, optimizer_state), strict=True):
        if state_dict:
            tensors[f"{part}.safetensors"] = pack(state_dict, part)
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
        entries = {file: manifest_entry(temp / file) for file in (*small, *tensors)}
        if shards:
            entries |= shards(temp)
        write_manifest(temp, step, entries)
        sync(temp)
        put_in_place(temp, final, entries)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        with contextlib.suppress(OSError):
            sweep(run)
        raise

    # latest last: a kill in between repeats this save, best included
    if best:
        write_pointer(run, "best", step)
    write_pointer(run, "latest", step)
    try:
        prune(run, step, keep_last, keep_full)
    except OSError as error:  # the new checkpoint is safe, and the next save prunes again
        say(f"warning: old checkpoints in {run} could not be removed: {error}")
    return final


def manifest_entry(path):
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def write_manifest(folder, step, entries):
    manifest = {
        "format": FORMAT,
        "step": step,
        "files": entries,
        "tokenizer_sha256": entries["tokenizer.model"]["sha256"],
        "config_sha256": entries["config.json"]["sha256"],
    }
    write_file(folder / MANIFEST, to_json(seal(manifest)))


def put_in_place(temp, final, entries):
    """Rename a checkpoint that is whole on the disk to its final name."""
    # the old one steps aside, to where list_steps() and sweep() still find it
    if final.exists():
        rename(final, final.with_name(f".old-{final.name}"))
    rename(temp, final)
    sync(final.parent)
    for file, entry in entries.items():
        if (final / file).stat().st_size != entry["size"]:
            rename(final, temp)
            raise OSError(errno.EIO, "a file has another size than what was written", str(final))


def write_pointer(run, pointer, step):
    """`latest` or `best`: a text file with a step's name and the time."""
    now = datetime.now(timezone.utc).isoformat()
    replace_file(run / pointer, f"{step_name(step)}\n{now}\n".encode(), run)


def pack(tensors, part):
    """{name: tensor} -> (the same as safetensors takes it: on the CPU, dense, each storage once;
    {name of a tied tensor: the name that its storage is saved under}).
    """
    kept, tied, seen = {}, {}, {}
    for name, tensor in tensors.items():
        assert "_orig_mod." not in name, f"{name}: save the bare module, not its compiled wrapper"
        assert tensor.numel(), f"{part}: {name} is empty"
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FloatingPointError(f"{part}: {name} holds NaN or infinity; nothing was saved")

        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        first = seen.setdefault(place, name)
        if first != name:
            tied[name] = first
            continue
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # a slice without its whole storage
        kept[name] = tensor
    return kept, tied


def write_tensors(path, tensors, tied):
    try:
        save_file(tensors, path, metadata={"tied": json.dumps(tied)})
    except SafetensorError as error:  # the library tells a full disk only in words
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, str(error), str(path)) from error
    # the library's 0600 ignores the umask
    os.chmod(path, (path.parent / "state.json").stat().st_mode & 0o777)
    sync(path)


def prune(run, step, keep_last, keep_full):
    """Remove the checkpoints beyond the newest keep_last, and the optimizer's files beyond the
    newest keep_full.

    Newest first: the steps up to the one just saved, then those that the run had reached before
    it was rewound.
    """
    sweep(run)
    steps = list_steps(run)
    newest_first = sorted(steps, key=lambda other: (other <= step, other), reverse=True)
    for rank, other in enumerate(newest_first):
        too_many = keep_last and rank >= keep_last
        if too_many and other not in (step, read_pointer(run, "best")[0]):
            discard(steps[other])
        elif rank >= keep_full:
            drop_optimizer(steps[other], run)


def drop_optimizer(folder, run):
    """A checkpoint without its optimizer: the manifest first, the files then."""
    paths = [path for path in folder.iterdir() if part_of(path.name) == "optimizer"]
    if not paths:
        return
    try:
        manifest = read_manifest(folder)
    except UserError:
        return  # damaged: somebody may want to look at it as it is

    listed = [path.name for path in paths if path.name in manifest["files"]]
    for name in listed:
        del manifest["files"][name]
    if listed:  # else a kill has left files that count no more
        manifest["dropped"] = "optimizer.safetensors"
        replace_file(folder / MANIFEST, to_json(seal(manifest)), run)
    for path in paths:
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
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return {**body, "sha256": digest}


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

    if manifest.get("format") == "aria-checkpoint-1":
        raise UserError(
            f"{path.parent} was trained by an older Aria, whose weights answer another question "
            "(the token at a place, not the next one): train it again, or use that version"
        )
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path} has the format {manifest.get('format')!r}, but this Aria reads {FORMAT}"
        )
    step = manifest.get("step")
    if not lists_a_checkpoint(folder, manifest.get("files")) or type(step) is not int:
        raise Damage(f"{path} is incomplete")
    if re.fullmatch(r"step_[0-9]+", folder.name) and folder.name != step_name(step):
        raise Damage(f"{path} belongs to step {step}, not to {folder.name}")
    return manifest


def lists_a_checkpoint(folder, entries):
    """Whether a manifest's files are the small ones, the weights, and nothing unknown."""
    if not isinstance(entries, dict) or not SMALL <= set(entries):
        return False
    if "model" not in parts_of(folder, entries):
        return False
    return all(file in SMALL or part_of(file) for file in entries)


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
        path = folder / file
        try:
            found = {"size": regular(path).st_size}
            if isinstance(entry, dict) and found["size"] == entry.get("size"):
                found["sha256"] = file_sha256(path)
        except OSError as error:
            raise Damage(f"{path} cannot be read: {error.strerror}") from None
        if found != entry:
            raise Damage(f"{path} is not what was saved: {difference(found, entry)}")

    try:
        extra = set(os.listdir(folder)) - {MANIFEST, *manifest["files"], *STRAY}
    except OSError as error:
        raise Damage(f"{folder} cannot be read: {error.strerror}") from None
    if manifest.get("dropped"):  # a kill may have left files that were to be dropped
        extra = {file for file in extra if part_of(file) != "optimizer"}
    if extra:
        raise Damage(f"{folder / min(extra)} does not belong to this checkpoint: move it away")
    return manifest


def read_tensors(path):
    """{name: tensor} of one safetensors file."""
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                shape = file.get_slice(name).get_shape()
                if not all(0 < side < 1 << 32 for side in shape):
                    raise Damage(f"{path}: {name} has the shape {shape}")
                # a copy: what stays mapped must not be written over
                tensor = file.get_tensor(name).clone()
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise Damage(f"{path}: {name} holds NaN or infinity")
                tensors[name] = tensor
            tied = json.loads((file.metadata() or {}).get("tied", "{}"))
            return tensors | {name: tensors[first] for name, first in tied.items()}
    except (
        SafetensorError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise Damage(f"{path} is no valid tensor file: {error!r}") from None


def read_part(paths):
    """One part of a checkpoint, whole, from the one file that holds it or from those of several
    processes.
    """
    if len(paths) == 1 and paths[0].stem in PARTS:
        return read_tensors(paths[0])
    import checkpoint_shards  # a second of imports that only the parts of --fsdp need
    return checkpoint_shards.read_whole(paths)


def load(path, *, parts=("model",), quarantine=False):
    """Any spelling of a checkpoint -> .path .step .config .state .tokenizer_bytes .files .model
    .ema .optimizer (or None).

    All files are verified, the tensors of `parts` are read. A damaged `latest` falls back to the
    one before, loudly; with quarantine (for the holder of the lock) it is renamed .corrupt-*.
    Damage in a step that was named raises.
    """
    return first_good(path, lambda folder: read_folder(folder, parts), quarantine)


def read_folder(folder, parts):
    """One checkpoint, verified; see load()."""
    manifest = verify(folder)
    state = read_json(folder / "state.json")
    config = read_json(folder / "config.json")
    if (state.get("format"), state.get("step")) != (FORMAT, manifest["step"]):
        raise Damage(f"{folder / 'state.json'} is not of step {manifest['step']}")

    paths = parts_of(folder, manifest["files"])
    tensors = dict.fromkeys(PARTS)
    for part in parts:
        if part in paths:
            tensors[part] = read_part(paths[part])
    try:
        tokenizer_bytes = (folder / "tokenizer.model").read_bytes()
    except OSError as error:
        raise Damage(f"{folder / 'tokenizer.model'} cannot be read: {error.strerror}") from None
    return SimpleNamespace(
        path=folder,
        name=name_of(folder),
        step=manifest["step"],
        config=config,
        state=state,
        files=paths,
        tokenizer_bytes=tokenizer_bytes,
        **tensors,
    )


def weights(saved):
    """{name: tensor} of the model that a loaded checkpoint means: averaged, if it has averages, and
    with its adapters merged into their base.
    """
    if saved.state.get("base"):
        return lora.merged(base_weights(saved), saved.model)
    return saved.ema or saved.model


def base_weights(saved):
    """The weights that a checkpoint's adapters were trained beside: those of another checkpoint,
    which has to be there, unchanged.
    """
    base = saved.state["base"]
    if not isinstance(base, dict) or not all(type(base.get(k)) is str for k in ("path", "sha256")):
        raise Damage(f"{saved.path / 'state.json'}: base is {str(base)[:60]!r}")
    try:
        found = load(base["path"], parts=("model", "ema"))
    except UserError as error:
        raise UserError(
            f"{saved.path} holds adapters alone, and their base cannot be read: {error}"
        ) from None
    tensors = found.ema or found.model
    if lora.fingerprint(tensors) != base["sha256"]:
        raise UserError(
            f"{saved.path} holds adapters for {base['path']}, whose weights are others now "
            f"(not sha256 {base['sha256'][:12]}): put the old ones there"
        )
    return tensors


def name_of(folder):
    """What a checkpoint is called: its run's name, or its own where it stands alone."""
    folder = folder.resolve()
    if folder.name.startswith("step_"):
        return folder.parent.name
    return folder.name


def read_published(path):
    """What python -m export --format hf wrote, here or on the hub (hf:owner/name@revision), as
    load() returns it; None of any other path.
    """
    if hub.is_spelling(path):
        folder = hub.fetched(path)
    elif published.is_published(path):
        folder = Path(path)
    else:
        return None
    manifest = published.read_manifest(folder)
    if not hub.is_spelling(path):
        published.check_files(folder, manifest, published.NEEDED, published.AGAIN)
    tensors = {}
    for name, tensor in read_tensors(folder / published.WEIGHTS).items():
        tensors[name.removeprefix(published.PREFIX)] = tensor
    return SimpleNamespace(
        path=folder,
        name=Path(path).name,
        step=manifest["step"],
        config=manifest["config"],
        state={"data_sha256": manifest["data_sha256"]},
        tokenizer_bytes=(folder / published.TOKENIZER).read_bytes(),
        model=tensors,
        ema=None,
    )


def section(saved, name):
    """config.json's "model" or "args"."""
    if not isinstance(saved.config.get(name), dict):
        raise Damage(f"{saved.path / 'config.json'} has no {name!r}")
    return saved.config[name]


def may_fit(model_config, tensors):
    """Before a model is built: a shape beyond all that the file holds is refused, and takes no
    memory.
    """
    asked = count_params(model_config)
    found = sum(tensor.numel() for tensor in tensors.values())
    if asked > 2 * found:
        raise UserError(
            f"the checkpoint does not fit the model: {asked:,} parameters by the shape, {found:,} "
            "in the file"
        )


def load_into(model, tensors):
    """Copy tensors into the model; every name and every shape must match."""
    own = model.state_dict()
    for name in (*own, *tensors):
        theirs = tuple(tensors[name].shape) if name in tensors else "missing"
        ours = tuple(own[name].shape) if name in own else "missing"
        if theirs != ours:
            raise UserError(
                f"the checkpoint does not fit the model: {name} is {theirs} there and {ours} here"
            )
    model.load_state_dict(tensors)


# --------------------------------------------------------------------------------------------------
# names


def part_of(file):
    """"model.safetensors", or "model-00001-of-00004.safetensors" -> "model"; None of another name.
    """
    parts = "|".join(PARTS)
    match = re.fullmatch(rf"({parts})(-[0-9]{{5}}-of-[0-9]{{5}})?\.safetensors", file)
    return match[1] if match else None


def parts_of(folder, names):
    """{part: the paths of its files}, of those that are among the names."""
    found = {}
    for part in PARTS:
        paths = [folder / name for name in sorted(names) if part_of(name) == part]
        if paths:
            found[part] = paths
    return found


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
    typed = Path(path)
    is_folder = os.path.isdir(path)
    if is_folder:
        if re.fullmatch(r"step_[0-9]{6,12}", typed.name) or os.path.exists(typed / MANIFEST):
            return [typed]
    elif os.path.exists(typed) and typed.name not in ("latest", "best"):
        raise UserError(
            f"{typed} is a file, and Aria opens no foreign checkpoints: name a folder such as "
            "step_000500"
        )

    # which run is meant, and what of it
    if is_folder:
        run, want = typed, "latest"
    else:
        run, want = typed.parent, wanted(typed.name)
    below = []
    if not is_run(run):
        below = [child for child in run.glob("*") if is_run(child)]
    if below and not is_folder:
        run = choose_run(below, typed.name, want, guess)
    steps = list_steps(run) if run else {}

    if want == "latest" and steps:
        return newest_first(run, steps)
    if want == "best" and run:
        want = read_pointer(run, "best")[0]
    if want in steps:
        return [steps[want]]

    known = []
    for other in below or [run]:
        known += [str(folder) for folder in list_steps(other).values()]
    there = f"there are: {', '.join(known)}" if known else "python -m train makes one"
    raise UserError(f"there is no checkpoint {typed}; {there}")


def wanted(name):
    """What a name asks for that is no folder: the number of a step, "best", "latest", or None."""
    numbers = re.findall(r"(?<![a-z])step[=_]?([0-9]{1,12})(?![0-9])", name)
    if numbers:
        return int(numbers[-1])
    if name.startswith("best"):
        return "best"
    if re.fullmatch(r"(latest|last)(\..*)?", name):
        return "latest"
    return None


def newest_first(run, steps):
    """The folders of {step: folder}: what `latest` names, what was before it, then what is newer.
    """
    latest = read_pointer(run, "latest")[0]
    if latest is None:
        say(f"warning: {run / 'latest'} is missing or damaged: taking the newest checkpoint")
        latest = max(steps)
    order = sorted({latest, *steps}, key=lambda step: (step <= latest, step), reverse=True)
    return [steps.get(step, run / step_name(step)) for step in order]


class Moved(Exception):
    """A training replaced or pruned a checkpoint while it was being read."""


def manifest_bytes(folder):
    with contextlib.suppress(OSError):
        path = folder / MANIFEST
        if regular(path).st_size <= LARGEST_MANIFEST:
            return path.read_bytes()
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
    """first_good() of these folders, as long as nobody changes them."""
    first_damage = None
    for folder in folders:
        before = manifest_bytes(folder)
        try:
            result = use(folder)
        except Damage as damage:
            if manifest_bytes(folder) != before or candidates(path) != folders:
                raise Moved from None
            if len(folders) == 1:
                raise
            if first_damage is None:
                first_damage = damage
            say(f"warning: {damage}; trying the checkpoint before it")
            if quarantine and folder.exists():
                corrupt = f".corrupt-{folder.name.lstrip('.')}-{time.time_ns()}"
                rename(folder, folder.with_name(corrupt))
            continue
        if folder != Path(path):
            say(f"checkpoint: {path} -> {folder.as_posix()}")
        return result
    raise UserError(f"no usable checkpoint at {path}: {first_damage}")


def load_model(path, device, check_settings, model="auto", tokenizer_path=None):
    """Any spelling of a checkpoint, or what export --format hf made of one -> (model in eval mode,
    its averaged weights if it has them; tokenizer; checkpoint).

    check_settings(settings, where) refuses settings of the training that the caller cannot use.
    """
    saved = read_published(path) or load(path, parts=("model", "ema"))
    shape = ModelConfig.from_dict(section(saved, "model"))
    check_settings(section(saved, "args"), saved.path / "config.json")
    tensors = weights(saved)
    may_fit(shape, tensors)
    if model not in ("auto", shape.model):
        raise UserError(
            f"{saved.path} holds a {shape.model} model, --model says {model}: use --model "
            f"{shape.model}"
        )
    tokenizer = open_tokenizer(saved.tokenizer_bytes)
    if tokenizer_path is not None:
        check_tokenizer(tokenizer_path, tokenizer)
    net = network_of(shape)
    load_into(net, tensors)
    return net.eval().to(device), tokenizer, saved
