"""The machine: device, precision and why, allocator, threads, signals, the metrics file, peak
speed, memory.

Used by the entry points. Nothing here knows a model.
"""
import contextlib
import ctypes
import functools
import math
import os
import platform
import signal
import statistics
import sys
import time

import torch

from common.console import UserError, commit_hash
from common.files import ROOT

ECHO = 2.0          # seconds in which a second SIGINT under torchrun is the first one, passed on


def pick_device(name):
    """'auto', 'cpu', 'cuda', 'cuda:N' or 'mps' -> torch.device; asking for what is not there is a
    user's usage error.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if name.startswith("cuda"):
        count = torch.cuda.device_count()
        if int(name.partition(":")[2] or 0) >= count:
            raise UserError(
                f"--device {name}: this machine shows {count} CUDA devices; use --device cpu or "
                "auto"
            )
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available here; use --device cpu or auto")
    return torch.device(name)


def keep_freed_memory():
    """Tell glibc to keep freed memory instead of returning it to the kernel; -> what was done, in
    words.

    A training step frees and asks again for hundreds of megabytes of activations. By default each
    large one is mapped afresh, and the kernel zeroes it page by page: up to half of a step
    (docs/experiments/ has the figures).
    """
    # for the measurement of what this function is worth
    if os.environ.get("ARIA_ALLOCATOR") == "default":
        return "default (ARIA_ALLOCATOR=default)"
    if platform.libc_ver()[0] != "glibc":
        return "default"
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8          # malloc.h
    done = [libc.mallopt(m_mmap_max, 0), libc.mallopt(m_trim_threshold, 2 ** 31 - 1),
            libc.mallopt(m_top_pad, 64 << 20), libc.mallopt(m_arena_max, 1)]
    return "glibc, freed memory kept" if all(done) else "default (mallopt refused)"


def start(threads):
    """First thing in every command that computes: allocator and thread count -> what the allocator
    was told.
    """
    told = keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    return told


def thread_times(rounds=5):
    """Seconds that a series of small products takes with all threads and with one, in turn: ([all],
    [one]).
    """
    many, a = torch.get_num_threads(), torch.randn(192, 192)
    taken = {many: [], 1: []}
    try:
        for _ in range(rounds):
            for threads, seconds in taken.items():
                torch.set_num_threads(threads)
                torch.mm(a, a)
                started = time.perf_counter()
                for _ in range(20):
                    torch.mm(a, a)
                seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(many)
    return taken[many], taken[1]


def waiting_threads(many, one):
    """How many times longer several threads take than one; None when they do not hinder each other.

    On a busy machine each product ends when its slowest thread gets its turn, and the others spin
    until then.
    """
    times = statistics.median(many) / statistics.median(one)
    return times if times > 1.5 else None


def advice_on_threads(device):
    """What to add to a line about speed: a remedy when threads wait for each other, else nothing.
    """
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return ""
    times = waiting_threads(*thread_times())
    if times is None:
        return ""
    return (
        f"; the machine is busy: {torch.get_num_threads()} threads wait for each other, one is "
        f"{times:.1f} times faster: "
        "stop and resume with --threads 1"
    )


def matmul_flops(dtypes, device="cpu", size=1024, runs=7, limit=math.inf):
    """Best of a few square products for each dtype, taken in turn: {dtype: floating point
    operations per second}.

    No further round begins after `limit` seconds.
    """
    best = dict.fromkeys(dtypes, float("inf"))
    inputs = {dtype: torch.randn(size, size, device=device).to(dtype) for dtype in dtypes}
    began = time.perf_counter()
    for i in range(runs):
        if i > 1 and time.perf_counter() - began > limit:
            break
        for dtype, a in inputs.items():
            started = time.perf_counter()
            torch.mm(a, a)
            synchronise(device)
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    return {dtype: 2 * size ** 3 / seconds for dtype, seconds in best.items()}


@functools.cache
def peak_flops(device, dtype):
    """What MFU is measured against: the fastest product that this machine shows now, in the
    training's precision.
    """
    dtype = dtype or torch.float32
    size = 8192 if device.type == "cuda" else 1024
    return matmul_flops((dtype,), device, size, limit=0.15)[dtype]


def cpu_bf16_units():
    """The CPU's own bf16 instructions, as Linux names them; empty where there are none or they
    cannot be asked for.
    """
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as f:
            flags = next((line for line in f if line.startswith(("flags", "Features"))), "")
    except OSError:
        return []
    return sorted({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))


def pick_precision(amp, amp_dtype, device, before=None):
    """-> (autocast dtype or None, reason). On a CPU bf16 pays only where the hardware has it: asked
    of the CPU, else measured.

    `before` is what a resumed run used: the same again, or it would not continue exactly.
    """
    if amp == "off":
        return None, "float32 (--no_amp)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if amp_dtype != "fp16" and torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"bf16 ({name})"
        return (
            torch.float16,
            f"fp16 with loss scaling ({name}{'' if amp_dtype == 'fp16' else ' has no bf16'})",
        )
    if amp_dtype == "fp16":
        raise UserError("--amp_dtype fp16 needs a CUDA GPU; use bf16 here")
    if device.type == "mps":
        return None, "float32 (MPS)"
    if amp == "on":
        return torch.bfloat16, "bf16 (--amp)"
    if before in ("torch.bfloat16", "None"):
        return (
            (torch.bfloat16, "bf16 (as before)")
            if before == "torch.bfloat16"
            else (None, "float32 (as before)")
        )
    units = cpu_bf16_units()
    speed = matmul_flops((torch.bfloat16, torch.float32))
    fast, slow = (speed[d] / 1e9 for d in (torch.bfloat16, torch.float32))
    measured = f"matmul {fast:.0f} GFLOP/s in bf16, {slow:.0f} in float32"
    if units or fast > 1.5 * slow:
        return (
            torch.bfloat16,
            f"bf16 ({'the CPU has ' + ', '.join(units) if units else 'faster here'}; {measured})",
        )
    return None, f"float32 (bf16 is not faster here; {measured})"


def autocast(device, dtype):
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def synchronise(device):
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    elif str(device) == "mps":
        torch.mps.synchronize()


def seed_everything(seed):
    """Weight initialisation and dropout; data order and masks have their own counters and never
    touch this state.
    """
    torch.manual_seed(seed % 2 ** 63)


def peak_memory_mb(device=None):
    """Peak resident memory of this process, or of the GPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource
    except ImportError:
        return 0.0                                       # Windows keeps no such record
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def environment(device):
    """What a reader needs to repeat a number."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": commit_hash(ROOT),
    }


def by_torchrun():
    return "TORCHELASTIC_RUN_ID" in os.environ


class Stopped(BaseException):
    """A signal came during work that can be given up. No Exception: a compiler or a library would
    take it for its own.
    """


class StopFlag:
    """SIGINT, SIGTERM and a closed terminal ask the loop to save and leave; a second SIGINT leaves
    at once.

    Saving does not wait for the end of a step or of an evaluation, which can take minutes: what
    runs inside piece() or at_once() is given up, and Stopped is raised. Nothing inside may change
    what is saved.
    """

    def __init__(self, ranks):
        self.ranks = ranks
        self.signal, self.came = None, 0.0
        self.open = False                    # whether a signal raises Stopped now
        self.answer = "saving, then leaving"
        self.before = {}

    def __enter__(self):
        # Windows has none; nohup has said that it does not matter
        hangup = getattr(signal, "SIGHUP", None)
        for s in (
            signal.SIGINT,
            signal.SIGTERM,
            *([hangup] if hangup and signal.getsignal(hangup) is signal.SIG_DFL else []),
        ):
            self.before[s] = signal.signal(s, self.catch)
        return self

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def catch(self, number, _frame):
        if self.signal is not None and number == signal.SIGINT and not self.is_echo():
            raise KeyboardInterrupt
        if self.signal is None:  # a save may take a while: no silence until its end
            self.came = time.monotonic()
            word = signal.Signals(number).name
            with contextlib.suppress(OSError):  # of a terminal that is gone
                os.write(
                    2,
                    f"\n{word}: {self.answer}{', once more leaves at once' * (word == 'SIGINT')}\n".encode(),
                )
        self.signal = number
        if self.open:
            self.open = False
            raise Stopped

    def is_echo(self):
        """Ctrl-C reaches torchrun's processes twice: from the terminal, and passed on by torchrun.
        """
        return by_torchrun() and time.monotonic() - self.came < ECHO

    @contextlib.contextmanager
    def at_once(self):
        """Around work of this process alone: a signal, also one that came before, raises Stopped in
        the middle of it.
        """
        self.open = True
        try:
            if self.signal is not None:
                raise Stopped
            yield
        finally:
            self.open = False

    @contextlib.contextmanager
    def piece(self, agreed=False):
        """Around one of several pieces of work that all ranks do in step, such as the forward and
        backward of some rows.

        One process gives it up at once. Several finish it, as others may be waiting for their
        gradients, and agree before the next one whether a signal has come to any of them; agreed:
        they have just done so.
        """
        if self.ranks.world == 1:
            with self.at_once():
                yield
            return
        if not agreed and self.ranks.all_reduce_max(self.signal) is not None:
            raise Stopped
        yield

    @property
    def name(self):
        return None if self.signal is None else signal.Signals(self.signal).name

