"""Several processes train one model: torchrun's process group, what its ranks tell each other,
weights cut up by --fsdp.

    torchrun --nproc_per_node 8 -m train --preset medium             # more: docs/SCALING.md

Used by training; nothing here runs by itself. Without torchrun there is one rank, and every method
is the identity. Notable:
* rank 0 alone prints, logs and writes what is small; the others hear from it, as JSON or as
  tensors;
* what can differ between machines (a signal, a full disk, a measured precision) is agreed upon, all
  else is computed alike;
* DistributedDataParallel sums gradients, FSDP2 cuts weights up, and torch.distributed.checkpoint
  saves what is cut (checkpoint_shards.py);
* a checkpoint of any number of ranks resumes on any other, sharded or not.
"""
import atexit
import contextlib
import itertools
import json
import os
import platform
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import layers
from common.console import UserError
from training.rounding import local

# the environment that torchrun gives each process
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# of one wait: rank 0 may be writing a large checkpoint. A dead process shows at once
TIMEOUT = timedelta(minutes=30)
PATIENCE = 2    # seconds in which rank 0 speaks first, and torchrun ends the others
BEAT = 5        # seconds between two signs of life of a rank
SILENCE = 60    # seconds without one, then the others say who is awaited
WATCHER = "signs of life"  # the name of the thread


def sharded_checkpoints():
    """The module for checkpoints of --fsdp: a second of imports that only --fsdp needs."""
    import checkpoint_shards
    return checkpoint_shards


class Ranks:
    """The processes of a run as one of them sees them."""

    def __init__(self, rank=0, world=1, sharded=False):
        self.rank = rank
        self.world = world
        self.main = rank == 0
        self.sharded = sharded
        self.code = 1                          # of the exit

    def share(self, rows):
        """The rows of a step that are this rank's: equal parts, as on one process in sum."""
        if rows % self.world:
            raise UserError(
                f"{rows} sequences per step (--batch_size x --grad_accum) do not divide over "
                f"{self.world} processes: change one of the three"
            )
        each = rows // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def shard_rows(self, rows):
        """Of so many rows those that this rank scores: as many as each other rank, some of the
        first ones twice if need be.
        """
        each = -(-rows // self.world)
        return [(self.rank * each + i) % rows for i in range(each)]

    def gather_rows(self, found, rows):
        """What each rank found for the rows dealt to it (each, ...) -> (rows, ...) on every rank,
        each row once, in order.
        """
        if self.world == 1:
            return found
        parts = found.new_zeros(self.world, *found.shape)
        parts[self.rank] = found
        dist.all_reduce(parts)  # to zeros: the same bits as on the rank that found them
        return parts.flatten(0, 1)[:rows]

    # ---- what the ranks tell each other; small things on the CPU, whatever the device ------------

    def broadcast_object(self, value):
        """Rank 0's value, anything JSON can say, on every rank; nobody goes on before rank 0 has
        come here.
        """
        if self.world == 1:
            return value
        text = bytearray()
        if self.main:
            text += json.dumps(value).encode()
        size = torch.tensor(len(text))
        dist.broadcast(size, 0)

        if self.main:
            data = torch.frombuffer(text, dtype=torch.uint8)
        else:
            data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0)
        return json.loads(data.numpy().tobytes())

    @contextlib.contextmanager
    def main_first(self):
        """Inside, rank 0 is done before the others begin: what it prepares, they find."""
        if not self.main:
            self.broadcast_object(None)
        yield
        if self.main:
            self.broadcast_object(None)

    def all_reduce_sum(self, x):
        """The sum of a number over the ranks."""
        return self.all_reduce(x, dist.ReduceOp.SUM)

    def all_reduce_max(self, number):
        """The highest number that any rank has; None counts as none."""
        if self.world == 1:
            return number
        return int(self.all_reduce(number or 0, dist.ReduceOp.MAX)) or None

    def all_reduce_min(self, number):
        return int(self.all_reduce(number, dist.ReduceOp.MIN))

    def all_reduce(self, x, operation):
        if self.world == 1:
            return x
        x = torch.tensor(x, dtype=torch.float64)
        dist.all_reduce(x, operation)
        return float(x)

    def broadcast_tensors(self, tensors):
        """Rank 0's {name: tensor on the CPU} or None, on every rank."""
        if self.world == 1:
            return tensors
        forms = None
        if tensors:
            forms = {name: [str(tensor.dtype), tensor.shape] for name, tensor in tensors.items()}
        forms = self.broadcast_object(forms)
        if not forms:
            return tensors
        if not self.main:
            tensors = {}
            for name, (dtype, shape) in forms.items():
                dtype = getattr(torch, dtype.removeprefix("torch."))
                tensors[name] = torch.empty(shape, dtype=dtype)
        for name in forms:
            dist.broadcast(tensors[name], 0)
        return tensors

    def broadcast_checkpoint(self, saved):
        """The checkpoint that rank 0 has loaded, on every rank; its weights stay there. Sharded:
        only what is small.
        """
        if self.world == 1:
            return saved

        small = None
        if self.main:
            small = {
                "step": saved.step,
                "config": saved.config,
                "state": saved.state,
                "path": str(saved.path),
                "files": {part: [path.name for path in files]
                          for part, files in saved.files.items()},
            }
        small = self.broadcast_object(small)
        path = Path(small["path"])
        files = {}
        for part, names in small["files"].items():
            files[part] = [path / name for name in names]

        large = {"ema": None, "optimizer": None}
        if not self.sharded:
            for part in large:
                large[part] = self.broadcast_tensors(getattr(saved, part) if self.main else None)
        return SimpleNamespace(
            path=path,
            step=small["step"],
            config=small["config"],
            state=small["state"],
            files=files,
            model=saved.model if self.main else None,
            tokenizer_bytes=saved.tokenizer_bytes if self.main else None,
            **large,
        )

    # ---- weights, gradients, optimizer state -----------------------------------------------------

    def to_device(self, model, device, dtype, source=None):
        """The model on its device, with rank 0's weights on every rank. With --fsdp it comes on the
        meta device, and only this rank's part of it is made: filled from the checkpoint files
        `source`, else with the first weights.
        """
        if not self.sharded:
            model = model.to(device)
            if self.world > 1:
                for p in model.parameters():
                    dist.broadcast(p.detach(), 0)
            return model
        model = shard(model, device, dtype, self.world)
        model.to_empty(device=device)
        if source:
            sharded_checkpoints().read_into(source, model)
        else:
            self.fill(model)
        return model

    @torch.no_grad()
    def fill(self, model):
        """The first weights of a sharded model: rank 0 draws one parameter after the other, and
        each rank keeps its rows.
        """
        drawn = layers.first_weights(model) if self.main else itertools.repeat(None)
        for p, whole in zip(model.parameters(), drawn, strict=False):
            if whole is None:
                whole = torch.empty(p.shape)
            dist.broadcast(whole, 0)
            rows = -(-len(whole) // self.world)
            local(p).copy_(whole[self.rank * rows:(self.rank + 1) * rows])

    def replicate(self, loss):
        """The module whose forward is the loss -> the same, its gradients summed over the ranks
        while backward runs.

        Each rank's gradients are already divided by the whole step's count, and every kind of step
        gives every weight one. Call it after every backward pass that is not a training step (the
        probe of --auto_batch, --compile): DDP would take its gradients for those of the first step.
        """
        if self.world == 1 or self.sharded or has_bf16(loss):
            return loss
        replica = nn.parallel.DistributedDataParallel(loss, gradient_as_bucket_view=True)
        replica.register_comm_hook(None, sum_gradients)
        return replica

    def add_up_gradients(self, model):
        """After the last backward of a step: the sums of the gradients of bf16 weights, in float32.
        DDP would add up in bf16.
        """
        if self.world > 1 and not self.sharded and has_bf16(model):
            for p in model.parameters():
                dist.all_reduce(p.grad)

    def accumulate(self, replica):
        """Inside, backward leaves the gradients of this rank as they are: all forwards of a step
        but the last.
        """
        if isinstance(replica, nn.parallel.DistributedDataParallel):
            return replica.no_sync()
        return contextlib.nullcontext()

    def reshard(self, model):
        """After a forward without backward: the gathered copy of the weights of root and head is
        stale as soon as they change.
        """
        if self.sharded:
            model.reshard()
            if hasattr(model.head, "reshard"):
                model.head.reshard()

    def save(self, write, **parts):
        """write(**tensors) on rank 0 -> its result; sharded it gets a function instead, by which
        all ranks write theirs.
        """
        if self.sharded:
            held = {part: tensors for part, tensors in parts.items() if tensors}
            return sharded_checkpoints().save(self, held, write)
        result = None
        if self.main:
            result = write(**{f"{part}_state": tensors for part, tensors in parts.items()})
        return self.broadcast_object(result)

    def load_aux(self, saved, part, model):
        """What was saved beside the weights (ema, optimizer): whole, or sharded as the weights are.
        None: it was not.
        """
        if not self.sharded:
            return getattr(saved, part)
        if part not in saved.files:
            return None
        return sharded_checkpoints().read_beside(saved.files[part], model)


def has_bf16(module):
    return any(p.dtype is torch.bfloat16 for p in module.parameters())


def sum_gradients(_, bucket):
    """DDP's hook for a bucket of gradients that is complete: their sum, where its own would make it
    a mean.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def shard(model, device, dtype, world):
    """FSDP2: each layer's matrices are one unit, gathered in `dtype` when needed; the rest (head,
    norms, convolutions) is the root's, in float32 like everything that autocast leaves alone, and
    stays gathered from forward to backward. A head in bf16 is a unit of its own, as a unit has one
    type, and stays gathered as well.
    """
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )
    mesh = init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.layers:
        matrices = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        fully_shard(matrices, mesh=mesh, mp_policy=policy)
    if model.head.weight.dtype is torch.bfloat16:
        fully_shard(model.head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        register_fsdp_forward_method(model.head, "embed")
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "both_states")
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums, not means: the loss has the whole step's divisor
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)       # gloo knows no other
    return model


# ---- signs of life -------------------------------------------------------------------------------

def show_life(store, rank, world, tell):
    """Put this rank's signs of life into the store, and tell when another one's fail to come. Runs
    in a thread.

    A rank that is stopped (SIGSTOP, a suspended machine) looks like one that computes: the others
    wait in a collective. Rank 0 watches all, rank 1 watches rank 0.
    """
    name = f"process {os.getpid()} on {platform.node()}"
    watched = {0: range(1, world), 1: [0]}.get(rank, [])
    now = time.monotonic()
    last = dict.fromkeys(watched, ("", now))  # rank -> its last sign, since when
    silent = set()

    for beat in itertools.count():
        store.set(f"life{rank}", f"{beat} {name}")
        now = time.monotonic()
        for other in watched:
            sign = ""
            if store.check([f"life{other}"]):
                sign = store.get(f"life{other}").decode()
            known, since = last[other]
            if sign != known:
                last[other] = (sign, now)
                if other in silent:
                    silent.remove(other)
                    tell(f"notice: rank {other} is back")
            elif now - since > SILENCE and other not in silent:
                silent.add(other)
                process = known.partition(" ")[2] or "it has not begun"
                tell(
                    f"warning: no sign of life from rank {other} ({process}) for "
                    f"{now - since:.0f} s: the others wait for it, {TIMEOUT.seconds // 60} minutes "
                    "at most; let it go on (kill -CONT), or stop the job and start it again with "
                    "--resume_latest"
                )
        time.sleep(BEAT)


def watch(rank, world):
    """Begin with show_life()."""
    store = dist.distributed_c10d._get_default_store()
    if hasattr(store, "clone"):
        store = store.clone()  # a connection of its own
    stderr = sys.stderr        # before it is redirected

    def tell(text):
        print(text, file=stderr, flush=True)

    def work():
        # the store, or the terminal, is gone: the end
        with contextlib.suppress(RuntimeError, OSError, ValueError):
            show_life(store, rank, world, tell)

    threading.Thread(target=work, name=WATCHER, daemon=True).start()


# ---- start and end -------------------------------------------------------------------------------

def choose_device(name, world, local):
    """--device under torchrun: each process of a machine has the GPU of its number, or all share
    the CPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world > 1 and name not in ("cuda", "cpu"):
        raise UserError(
            f"--device {name}: with torchrun use cuda (each process takes its own GPU) or cpu"
        )
    if name == "cuda":
        devices = torch.cuda.device_count()
        if local >= devices:
            raise UserError(
                f"torchrun started more processes here than the {devices} CUDA devices that there "
                f"are: use --nproc_per_node {max(1, devices)}, or --device cpu"
            )
        torch.cuda.set_device(local)  # from now on "cuda" is this one
    return name


@contextlib.contextmanager
def process_group(args):
    """The ranks of this run: those that torchrun started, else one. Only rank 0 prints, and nobody
    leaves before rank 0.

    A rank that dies ends the job: torchrun stops the others, and gloo tells them at once, which is
    the message below.
    """
    if not all(name in os.environ for name in TORCHRUN):
        if args.fsdp:
            raise UserError(
                "--fsdp cuts the weights up between the processes that torchrun starts: "
                "torchrun --nproc_per_node N -m train --fsdp ..., or leave it out"
            )
        yield Ranks()
        return
    rank, world, local = (int(os.environ[name]) for name in TORCHRUN[:3])
    args.device = choose_device(args.device, world, local)
    if not dist.is_initialized():  # a second run of one process goes on with the first one's
        backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    if world > 1 and not any(thread.name == WATCHER for thread in threading.enumerate()):
        watch(rank, world)

    ranks = Ranks(rank, world, args.fsdp)
    try:
        with contextlib.nullcontext() if ranks.main else no_output():
            yield ranks
            ranks.broadcast_object(None)
    except UserError as error:
        if ranks.main:
            raise
        time.sleep(PATIENCE)  # most likely rank 0 has the same to say
        raise UserError(f"rank {rank}: {error}", error.code) from None
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise
        if rank > 1:
            time.sleep(PATIENCE)  # rank 0, or if it is gone rank 1, says it for all
        raise UserError(
            f"rank {rank} of {world}: another process of this run has ended or does not answer; "
            "what was saved is whole: start again with --resume "
            f"({str(error).splitlines()[0][-120:]})",
            code=1,
        ) from None

    def leave():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ranks.code)

    # gloo's threads can outlive even destroy_process_group, and the end of the interpreter now and
    # then aborts on them, which torchrun would take for a failure: after the last flush, nothing
    # is left to take apart
    atexit.register(leave)


@contextlib.contextmanager
def no_output():
    """Inside, this process prints nothing."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
