"""Checkpoints of cut-up weights: real gloo ranks, real FSDP2, written by some and read by any other
number of them.

    python -m pytest tests/test_shards.py               # whole torchrun jobs with --fsdp:
        tests/test_distributed.py
"""
import contextlib
import errno
import json
import multiprocessing
import os
import re
import signal
import struct
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import TINIER, scratch, tiny_config, tiny_model

import checkpoint
import checkpoint_shards
import model_config
from common.console import Damage, UserError
from common.files import file_sha256, to_json
from config import TrainArgs
from model import build_model
from training import distributed, optim, rounding

# two heads over three and four ranks: some of them hold nothing of a slot's names
CFG = tiny_config("primary", 50, shape=TINIER)
SMALL = dict(config={}, tokenizer_bytes=b"pieces")


@pytest.fixture(scope="module")
def ram():
    with scratch() as folder:
        yield Path(folder)


def together(world, work, folder):
    """work(ranks) in so many forked gloo processes -> what each returned (JSON can say it); an
    exception fails the test.
    """
    def one(rank):
        torch.set_num_threads(1)
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
            )
            found = work(distributed.Ranks(rank, world, sharded=True))
        except BaseException:
            found = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(found))
        os._exit(0)                                              # gloo's threads end with it

    folder.mkdir()
    children = [
        multiprocessing.get_context("fork").Process(target=one, args=(rank,))
        for rank in range(world)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode is not None, "a rank hangs"
    files = [folder / f"{rank}.json" for rank in range(world)]
    found = [json.loads(f.read_text()) if f.exists() else None for f in files]
    assert not any("Traceback" in str(f) for f in found), "\n".join(map(str, found))
    return found


def unmade_model(seed=3, cfg=CFG):
    """On the meta device: what --fsdp begins with."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        return build_model(cfg)


def trained(ranks):
    """A sharded model after two steps of AdamW, and the averages of it: (model, optimizer, ema).
    Every rank alike.
    """
    model = ranks.to_device(unmade_model(), torch.device("cpu"), None)
    optimizer, ema = (
        optim.make_optimizer(model, TrainArgs(optimizer="adamw")),
        optim.EMA(model, 0.9),
    )
    for i in range(2):
        ids = torch.randint(4, 50, (2, 12), generator=torch.Generator().manual_seed(i))
        (model.block_states(ids, ids, 4) ** 2).mean().div(ranks.world).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    return model, optimizer, ema


def store(ranks, run, step, model, optimizer=None, ema=None, **more):
    def write(**tensors):
        checkpoint.save(run, step, state={"n": step}, **SMALL, **tensors, **more)
        return True

    return ranks.save(
        write,
        model=model.state_dict(),
        ema=ema and ema.state(),
        optimizer=optimizer and optimizer.state_tensors(),
    )


def whole(tensors):
    return {
        name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()
    }


@pytest.fixture(scope="module")
def saved(ram):
    """A checkpoint of three ranks, and the same state gathered into safetensors of whole tensors by
    rank 0.
    """
    def work(ranks):
        model, optimizer, ema = trained(ranks)
        parts = dict(
            model_state=model.state_dict(),
            ema_state=ema.state(),
            optimizer_state=optimizer.state_tensors(),
        )
        parts = {name: whole(tensors) for name, tensors in parts.items()}
        if ranks.main:
            checkpoint.save(ram / "whole", 5, state={}, **SMALL, **parts)
        return store(ranks, ram / "cut", 5, model, optimizer, ema)
    assert together(3, work, ram / "save") == [True] * 3
    return ram / "cut" / "step_000005"


def same(one, other):
    assert one.keys() == other.keys() and all(
        torch.equal(t, other[name]) for name, t in one.items()
    )


def test_one_process_reads_what_three_wrote(saved):
    """As whole tensors, bit for bit; each rank wrote about a third of every part, in safetensors,
    and nothing is pickle.
    """
    cut, one = (
        checkpoint.load(path, parts=checkpoint.PARTS)
        for path in (saved, saved.parents[1] / "whole")
    )
    for part in checkpoint.PARTS:
        same(getattr(cut, part), getattr(one, part))
        sizes = [file.stat().st_size for file in cut.files[part]]
        assert len(sizes) == 3 and max(sizes) < 0.5 * sum(sizes)
    assert {f.suffix for f in saved.iterdir()} == {".safetensors", ".json", ".model"}
    model = build_model(CFG)
    checkpoint.load_into(model, cut.model)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("source", ["cut", "whole"])
def test_other_numbers_of_ranks_read_it(saved, ram, world, source):
    """Their own parts alone: weights, averages and moments of two and four ranks are those that
    three had, or one.
    """
    found = checkpoint.load(ram / source, parts=checkpoint.PARTS)

    def work(ranks):
        seen = ranks.broadcast_checkpoint(
            checkpoint.load(ram / source, parts=()) if ranks.main else None
        )
        assert seen.model is None and seen.optimizer is None, "nobody holds the whole"
        model = unmade_model(seed=4)
        model = ranks.to_device(model, torch.device("cpu"), None, seen.files["model"])
        same(whole(model.state_dict()), found.model)
        optimizer, ema = (
            optim.make_optimizer(model, TrainArgs(optimizer="adamw")),
            optim.EMA(model, 0.5),
        )
        optimizer.load_state_tensors(ranks.load_aux(seen, "optimizer", model))
        ema.load(ranks.load_aux(seen, "ema", model), 2)
        same(whole(optimizer.state_tensors()), found.optimizer)
        same(whole(ema.state()), found.ema)
        return ranks.rank
    assert together(world, work, ram / f"read_{world}_{source}") == list(range(world))


def test_another_model_is_refused_on_every_rank(saved, ram):
    def work(ranks):
        model = tiny_model("primary", 50, shape=TINIER, d_ff=32)
        try:
            ranks.to_device(
                model, torch.device("cpu"), None, checkpoint.load(saved, parts=()).files["model"]
            )
        except UserError as error:
            return str(error)
    for why in together(2, work, ram / "other"):
        assert re.search(
            r"does not fit the model: layers\.0\.in_proj\.weight is \(\d+, 16\) there and "
            r"\(\d+, 16\) here",
            why,
        )


@contextlib.contextmanager
def full_disk(owner, name):
    """Inside, owner.name() fails, as it does on a disk without space."""
    real = getattr(owner, name)

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    setattr(owner, name, fail)
    try:
        yield
    finally:
        setattr(owner, name, real)


@pytest.mark.parametrize(
    "fault, victim",
    [("NaN", 0), ("NaN", 2), ("rename", 1), ("fsync", 1), ("fsync", 2), ("mkdir", 0)],
)
def test_what_fails_on_one_rank_fails_on_all_and_leaves_the_last_one(ram, fault, victim):
    """In its tensors, in DCP's files, in their names, before there is a folder; and the next save
    works.
    """
    run = ram / f"{fault} {victim}"

    def work(ranks):
        model, _, ema = trained(ranks)
        store(ranks, run, 1, model, ema=ema)
        before, mine = sorted(map(str, run.rglob("*"))), model.head.weight.detach().to_local()
        kept = mine.clone()
        dist.barrier()  # nobody writes before all have looked

        def write(**tensors):
            with pytest.raises(
                (OSError, FloatingPointError), match="NaN" if fault == "NaN" else "No space left"
            ):
                checkpoint.save(run, 2, state={}, **SMALL, **tensors)
            return False
        with contextlib.ExitStack() as undo:
            if ranks.rank == victim and fault == "NaN":
                mine.fill_(torch.nan)
            elif ranks.rank == victim and victim:  # not of what rank 0 writes by itself
                undo.enter_context(full_disk(os, "replace" if fault == "rename" else fault))
            elif ranks.rank == victim:
                undo.enter_context(full_disk(os, "mkdir"))
            assert ranks.save(write, model=model.state_dict(), ema=ema.state()) is False
        assert sorted(map(str, run.rglob("*"))) == before
        mine.copy_(kept)
        dist.barrier()
        return store(ranks, run, 3, model, ema=ema)
    assert together(3, work, ram / f"ranks {fault} {victim}") == [True] * 3
    assert list(checkpoint.list_steps(run)) == [1, 3] and not list(run.glob(".*-*"))
    assert checkpoint.load(run, parts=("model", "ema")).step == 3


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("at", ["before", "between", "after"])
def test_a_rank_killed_in_a_save(ram, victim, at):
    """Before its files, between the parts, after them: the others end, the step before is whole,
    the next writer sweeps up.
    """
    run = ram / f"killed {victim} {at}"

    def work(ranks):
        model, _, ema = trained(ranks)
        store(ranks, run, 1, model, ema=ema)
        real, calls = checkpoint_shards.dcp.save, [0]

        def save(*args, **kwargs):
            calls[0] += 1
            if ranks.rank == victim and calls[0] == {"before": 1, "between": 2, "after": 0}[at]:
                os.kill(os.getpid(), signal.SIGKILL)
            done = real(*args, **kwargs)
            if ranks.rank == victim and (at, calls[0]) == ("after", 2):
                os.kill(os.getpid(), signal.SIGKILL)
            return done
        checkpoint_shards.dcp.save = save
        try:
            store(ranks, run, 2, model, ema=ema)
        except (RuntimeError, OSError) as error:  # distributed.process_group makes a sentence of it
            return type(error).__name__
        return "saved"
    found = together(2, work, ram / f"ranks killed {victim} {at}")
    assert found[victim] is None and found[1 - victim] != "saved"
    assert checkpoint.load(run, parts=("model", "ema")).step == 1 and list(
        checkpoint.list_steps(run)
    ) == [1]
    with checkpoint.run_lock(run):
        assert not list(run.glob(".*-*"))


def test_old_moments_are_dropped_from_all_files(ram):
    run = ram / "pruned"

    def work(ranks):
        model, optimizer, _ = trained(ranks)
        for step in (1, 2, 3):
            store(ranks, run, step, model, optimizer, keep_last=2, keep_full=1)
        return True
    together(2, work, ram / "ranks pruned")
    two, three = (checkpoint.load(run / f"step_00000{n}", parts=()) for n in (2, 3))
    assert sorted(two.files) == ["model"] and sorted(three.files) == ["model", "optimizer"]
    assert not list(two.path.glob("optimizer*"))
    (two.path / "optimizer-00001-of-00002.safetensors").write_bytes(b"left behind by a kill")
    checkpoint.verify(two.path)


# ---- damage --------------------------------------------------------------------------------------

def forge(source, target, change):
    """A copy whose manifest vouches for whatever change(folder, manifest) did: only the content can
    give it away.
    """
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    manifest = checkpoint.read_manifest(target)
    change(target, manifest)
    for file in manifest["files"]:
        manifest["files"][file] = {
            "size": (target / file).stat().st_size,
            "sha256": file_sha256(target / file),
        }
    (target / "MANIFEST.json").write_bytes(to_json(checkpoint.seal(manifest)))
    return target


def header(path, change):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    value = json.loads(data[8:8 + size])
    change(value)
    text = json.dumps(value).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size:])


def offsets(new):
    def change(value):
        info = json.loads(value["__metadata__"]["DCP_SHARDING_INFO"])
        info["head.weight"] = new
        value["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(info)
    return change


SECOND = "model-00002-of-00003.safetensors"


def drop(folder, manifest):
    manifest["files"].pop(SECOND)
    (folder / SECOND).unlink()


@pytest.mark.parametrize(
    "change",
    [
        drop,
        lambda folder, _: (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-4]),
        lambda folder, _: (folder / SECOND).write_bytes(
            (folder / "model-00003-of-00003.safetensors").read_bytes()
        ),
        *(
            lambda folder, _, new=new: header(folder / SECOND, offsets(new))
            for new in (
                {"saved_offsets": [0, 0]},
                {"saved_offsets": [10**9, 0]},
                {"saved_offsets": [-17, 0]},
                {"saved_offsets": [17]},
                {"saved_offsets": "17"},
                {"saved_offsets": [17.5, 0]},
                {},
                None,
            )
        ),
        lambda folder, _: header(
            folder / SECOND, lambda value: value["__metadata__"].update(DCP_SHARDING_INFO="{")
        ),
        lambda folder, _: header(folder / SECOND, lambda value: value["__metadata__"].clear()),
    ],
    ids=[
        "no file", "short", "twice", "overlap", "far", "negative", "few", "text", "half", "empty",
        "null", "no json", "none",
    ],
)
def test_parts_that_make_no_whole_are_refused(saved, tmp_path, change):
    """Whatever the manifest says; and --resume_latest takes the checkpoint before."""
    forge(saved, tmp_path / "step_000005", change)
    with pytest.raises(Damage, match=r"model-0000"):
        checkpoint.load(tmp_path / "step_000005")


def test_a_flipped_bit_in_any_shard_is_found(saved, tmp_path):
    for i, name in enumerate(sorted(f.name for f in saved.glob("*.safetensors"))):
        folder = forge(saved, tmp_path / str(i), lambda *_: None)
        data = bytearray((folder / name).read_bytes())
        data[-3] ^= 16
        (folder / name).write_bytes(data)
        with pytest.raises(Damage, match=re.escape(name)):
            checkpoint.load(folder, parts=())


# ---- a model that no process holds ---------------------------------------------------------------

@pytest.mark.parametrize("kind", ["primary", "backup"])
@pytest.mark.parametrize("narrow", [False, True])
def test_parts_are_those_of_the_plain_build(ram, kind, narrow):
    """The same seed, the same weights, bit for bit; in bf16 they are rounded to the nearest."""
    cfg = tiny_config(kind, 50, shape=TINIER, exits=True)
    torch.manual_seed(3)
    plain = build_model(cfg)
    if narrow:
        rounding.store_in_bf16(plain)

    def work(ranks):
        model = unmade_model(cfg=cfg)
        if narrow:
            rounding.store_in_bf16(model)
        model = ranks.to_device(model, torch.device("cpu"), None)
        same(whole(model.state_dict()), plain.state_dict())
        return True
    assert together(3, work, ram / f"parts {kind} {narrow}") == [True] * 3


def peak_growth(work):
    """Bytes by which this process was larger at its peak inside work() than before."""
    def kilobytes(what):
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.search(rf"{what}:\s+(\d+) kB", status)[1])
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")        # the peak begins anew
    before = kilobytes("VmRSS")
    work()
    return 1024 * (kilobytes("VmHWM") - before)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no Linux")
def test_no_process_holds_the_whole(ram):
    """Of two ranks each has half of the weights, and while it makes them hardly more: not the
    whole, as it would take to build a model first and cut it then.
    """
    shape = dict(d_model=256, n_layers=16, n_heads=4, d_ff=1024, memory_slots=4)
    cfg = tiny_config("backup", 1000, shape=shape)
    size = 4 * model_config.count_params(cfg)

    def work(ranks):
        # what the libraries take at the first use
        ranks.to_device(unmade_model(), torch.device("cpu"), None)
        held = []
        parts = peak_growth(lambda: held.append(
            ranks.to_device(unmade_model(cfg=cfg), torch.device("cpu"), None)))
        return parts / size
    for parts in together(2, work, ram / "peak"):
        assert parts < 0.8


# ---- gradients, without --fsdp -------------------------------------------------------------------

class TwoWeights(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(5))
        self.other = torch.nn.Parameter(torch.ones(5))

    def forward(self, x):
        return (self.one * x).sum() + (self.other * x * x).sum()


def test_gradients_are_sums(ram):
    """Over two and four ranks, in accumulation, with weights that start apart; a lone forward
    leaves the ranks to themselves.
    """
    def work(ranks):
        net = TwoWeights()
        with torch.no_grad():
            net.one.add_(ranks.rank)                             # rank 0's weights are everybody's
        ranks.sharded = False
        replica = ranks.replicate(net)
        assert torch.equal(net.one, torch.ones(5))
        every = [torch.arange(5.0) + rank + 1 for rank in range(ranks.world)]
        x = every[ranks.rank]
        for _ in range(4):
            net.zero_grad(set_to_none=True)
            with ranks.accumulate(replica):
                replica(x).backward()
            assert torch.equal(net.one.grad, x)                  # so far its own
            replica(10 * x).backward()
            assert torch.equal(net.one.grad, 11 * sum(every))
            assert torch.equal(net.other.grad, 101 * sum(x * x for x in every))
        return True
    for world in (2, 4):
        assert together(world, work, ram / f"sums {world}") == [True] * world
