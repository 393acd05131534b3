"""Checkpoints of weights that --fsdp has cut up: torch.distributed.checkpoint (DCP), a safetensors
file per process and part.

    step_000500/model-00001-of-00004.safetensors ...    beside them manifest, JSON and tokenizer

Used by checkpoint.py (read_whole) and training/distributed.py (save, read_into, read_beside);
nothing here runs by itself. Notable:
* each process writes and hashes its own part, so no machine has to hold, or to wait for, the whole
  model;
* a file says where its parts lie (saved_offsets), so any number of processes reads what any other
  number wrote;
* DCP's own metadata file is a pickle, its safetensors format needs none: none is written, none is
  read.
"""
import errno
import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.tensor import zeros

from common.console import Damage, UserError
from common.files import file_sha256

# ---- save: every rank calls it -------------------------------------------------------------------

def save(ranks, parts, write):
    """write(shards) is rank 0's save, which calls shards(folder) in its midst, where the other
    ranks join. Returns its result on every rank.
    """
    if ranks.main:
        joined = False

        def shards(folder):
            nonlocal joined
            joined = True
            return write_parts(ranks, Path(ranks.broadcast_object(str(folder))), parts)

        result = write(shards=shards)
        if not joined:  # it failed before there was a folder
            ranks.broadcast_object(None)
        return ranks.broadcast_object(result)

    folder = ranks.broadcast_object(None)
    if folder:
        try:
            write_parts(ranks, Path(folder), parts)
        except (OSError, FloatingPointError):
            pass  # rank 0 has the same one, and says it
    return ranks.broadcast_object(None)


def write_parts(ranks, folder, parts):
    """{part: {name: tensor}} into the folder -> {file: its manifest entry} of all ranks; what fails
    on one, fails on all.
    """
    refuse_non_finite(ranks, parts)

    own = {}  # the entries of the files that this rank has written
    trouble = None
    for part, tensors in parts.items():
        writer = dcp.HuggingFaceStorageWriter(folder / part, save_distributed=True)
        try:
            dcp.save(tensors, storage_writer=writer)
        except dcp.CheckpointException as error:  # on every rank, whoever's disk is full
            raise cause(error) from None
        try:
            for written in (folder / part).glob(f"shard-{ranks.rank + 1:05d}-*"):
                name = f"{part}-{ranks.rank + 1:05d}-of-{ranks.world:05d}.safetensors"
                path = folder / name
                os.replace(written, path)
                own[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        except OSError as error:
            trouble = trouble or str(error)

    # every rank hears of every file, and of the first trouble
    reports = [None] * ranks.world
    dist.all_gather_object(reports, (own, trouble))
    entries = {}
    for found, why in reports:
        if why:
            raise OSError(errno.EIO, why)
        entries |= found
    if ranks.main:
        for part in parts:
            os.rmdir(folder / part)
    return entries


def refuse_non_finite(ranks, parts):
    bad = []
    for part, tensors in parts.items():
        bad += [f"{part}: {name}" for name, tensor in tensors.items() if not finite(tensor)]
    if ranks.all_reduce_max(len(bad)):
        where = bad[0] if bad else "another process"
        raise FloatingPointError(f"{where} holds NaN or infinity; nothing was saved")


def finite(tensor):
    """Whether what this process holds of a tensor is free of NaN and infinity."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def cause(error):
    """What DCP says of all ranks -> the OSError that one of them met."""
    for why, _ in error.failures.values():
        if isinstance(why, OSError):
            return why
    return OSError(errno.EIO, " ".join(str(error).split())[-300:])


# ---- read ----------------------------------------------------------------------------------------

class Reader(dcp.HuggingFaceStorageReader):
    """Of these files, those that the manifest vouches for, and of nothing else that may lie beside
    them.
    """

    def __init__(self, files):
        super().__init__(files[0].parent)
        self.fs.ls = lambda _: [str(file) for file in files]


def contents(files):
    """{name in the files: (shape, dtype)}; parts that do not make up whole tensors are damage."""
    try:
        found = Reader(files).read_metadata().state_dict_metadata
        for name, tensor in found.items():
            held = sum(chunk.sizes.numel() for chunk in tensor.chunks)
            sane = all(0 < side < 1 << 32 for side in tensor.size)
            if held != tensor.size.numel() or not sane:
                raise ValueError(
                    f"{name} is not whole: {held} values of the shape {tuple(tensor.size)}"
                )
    except (
        SafetensorError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise Damage(f"{files[0]} and its like are no valid tensor files: {error!r}") from None
    return {name: (tensor.size, tensor.properties.dtype) for name, tensor in found.items()}


def read(files, targets, alone):
    """Fill the targets, {name in the files: tensor}, each process its own part of them; alone:
    without asking the others.
    """
    try:
        with warnings.catch_warnings():
            # it wonders whether one process is what was meant
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(targets, storage_reader=Reader(files), no_dist=alone)
    except (dcp.CheckpointException, SafetensorError, OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[-300:]
        raise Damage(f"{files[0]} and its like cannot be read: {why}") from None
    for name, tensor in targets.items():
        if not finite(tensor):
            raise Damage(f"{files[0]} and its like: {name} holds NaN or infinity")


def read_whole(files):
    """{name: tensor}, put together on this one process."""
    whole = {name: blank(shape, dtype) for name, (shape, dtype) in contents(files).items()}
    read(files, whole, alone=True)
    return whole


def blank(shape, dtype):
    """To be filled: a gap between parts would stay NaN, and be found."""
    value = torch.nan if dtype.is_floating_point else 0
    return torch.full(shape, value, dtype=dtype)


def read_into(files, model):
    """The weights in the files, whole or cut up on any number of ranks -> the model's own parts of
    them. Every rank calls it.
    """
    own = model.state_dict()
    found = {name: shape for name, (shape, _) in contents(files).items()}
    for name in (*own, *found):
        theirs = tuple(found[name]) if name in found else "missing"
        ours = tuple(own[name].shape) if name in own else "missing"
        if theirs != ours:
            raise UserError(
                f"the checkpoint does not fit the model: {name} is {theirs} there and {ours} here"
            )
    targets = {name: tensor.detach() for name, tensor in own.items()}
    read(files, targets, alone=False)


def read_beside(files, model):
    """What was saved beside the weights -> {name: tensor}, cut as the parameter in its name is.
    Every rank calls it.
    """
    params = dict(model.named_parameters())
    targets = {}
    for name, (shape, dtype) in contents(files).items():
        inner = name.partition(".")[2].rpartition(".")[0]  # adamw.<name>.exp_avg -> <name>
        p = params.get(name, params.get(inner))
        if p is not None and p.shape == shape:
            targets[name] = zeros(
                shape, dtype=dtype, device_mesh=p.device_mesh, placements=p.placements
            )
        else:
            targets[name] = blank(shape, dtype)
    read(files, targets, alone=False)
    return targets
