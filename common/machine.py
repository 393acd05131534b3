"""The machine: device, precision and why, allocator, threads, signals, peak speed, memory.

Used by every command that computes. Nothing here knows a model.
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

try:
    import resource
except ImportError:  # Windows keeps no record of a process's memory
    resource = None

ECHO = 2.0          # seconds in which a second SIGINT under torchrun is the first one, passed on
LONG_PRODUCT = 0.5  # seconds that a larger product may take, where the peak speed is looked for


def pick_device(name):
    """'auto', 'cpu', 'cuda', 'cuda:N' or 'mps' -> torch.device; asking for what is not there is a
    user's usage error.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
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
    settings = (             # the numbers of malloc.h
        (-4, 0),             # M_MMAP_MAX: map nothing apart
        (-1, 2 ** 31 - 1),   # M_TRIM_THRESHOLD: return nothing
        (-2, 64 << 20),      # M_TOP_PAD: ask the kernel for 64 MiB at a time
        (-8, 1),             # M_ARENA_MAX: one heap for all threads
    )
    done = [libc.mallopt(parameter, value) for parameter, value in settings]
    if not all(done):
        return "default (mallopt refused)"
    return "glibc, freed memory kept"


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
    many = torch.get_num_threads()
    matrix = torch.randn(192, 192)
    taken = {many: [], 1: []}
    try:
        for _ in range(rounds):
            for threads, seconds in taken.items():
                torch.set_num_threads(threads)
                torch.mm(matrix, matrix)
                started = time.perf_counter()
                for _ in range(20):
                    torch.mm(matrix, matrix)
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
    if times > 1.5:
        return times
    return None


def advice_on_threads(device):
    """A remedy to add to a line about speed, when threads wait for each other; else nothing."""
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
        for dtype, matrix in inputs.items():
            started = time.perf_counter()
            torch.mm(matrix, matrix)
            synchronise(device)
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    return {dtype: 2 * size ** 3 / seconds for dtype, seconds in best.items()}


@functools.cache
def peak_flops(device, dtype):
    """What MFU is measured against: the fastest product that this machine shows now, in the
    training's precision.
    """
    dtype = dtype or torch.float32
    if device.type == "cuda":
        return matmul_flops((dtype,), device, 8192, limit=0.15)[dtype]
    # a product of 1,024 may run in one thread, whatever the number of threads
    speed = matmul_flops((dtype,), device, 1024, limit=0.15)[dtype]
    if 2 * 2048 ** 3 / speed < LONG_PRODUCT:
        larger = matmul_flops((dtype,), device, 2048, limit=0.15)[dtype]
        speed = max(speed, larger)
    return speed


def cpu_bf16_units():
    """The CPU's own bf16 instructions, as Linux names them; empty where there are none or they
    cannot be asked for.
    """
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return sorted({"avx512_bf16", "amx_bf16", "bf16"} & set(line.split()))
    except OSError:
        pass
    return []


def pick_precision(amp, amp_dtype, device, before=None):
    """-> (autocast dtype or None, reason). On a CPU bf16 pays only where the hardware has it: asked
    of the CPU, else measured.

    `before` is what a resumed run used: the same again, or it would not continue exactly.
    """
    if amp == "off":
        return None, "float32 (--no_amp)"
    if device.type == "cuda":
        return gpu_precision(amp_dtype, device)
    if amp_dtype == "fp16":
        raise UserError("--amp_dtype fp16 needs a CUDA GPU; use bf16 here")
    if device.type == "mps":
        return None, "float32 (MPS)"
    if amp == "on":
        return torch.bfloat16, "bf16 (--amp)"
    if before == "torch.bfloat16":
        return torch.bfloat16, "bf16 (as before)"
    if before == "None":
        return None, "float32 (as before)"
    return cpu_precision()


def gpu_precision(amp_dtype, device):
    """-> (autocast dtype, reason) on a CUDA GPU."""
    name = torch.cuda.get_device_name(device)
    if amp_dtype == "fp16":
        return torch.float16, f"fp16 with loss scaling ({name})"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, f"bf16 ({name})"
    return torch.float16, f"fp16 with loss scaling ({name} has no bf16)"


def cpu_precision():
    """-> (autocast dtype or None, reason) on a CPU, from its instructions and a measurement."""
    units = cpu_bf16_units()
    speed = matmul_flops((torch.bfloat16, torch.float32))
    bf16 = speed[torch.bfloat16] / 1e9
    float32 = speed[torch.float32] / 1e9
    measured = f"matmul {bf16:.0f} GFLOP/s in bf16, {float32:.0f} in float32"
    if units:
        return torch.bfloat16, f"bf16 (the CPU has {', '.join(units)}; {measured})"
    if bf16 > 1.5 * float32:
        return torch.bfloat16, f"bf16 (faster here; {measured})"
    return None, f"float32 (bf16 is not faster here; {measured})"


def autocast(device, dtype):
    """Mixed precision in this number type; None: none."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def synchronise(device):
    """Wait until the device has done what it was given."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    elif str(device) == "mps":
        torch.mps.synchronize()


def seed_everything(seed):
    """Seeds what draws from PyTorch's own state: weight initialisation and dropout. The order of
    the data and the masks have counters of their own and never touch it.
    """
    torch.manual_seed(seed % 2 ** 63)


def peak_memory_mb(device=None):
    """Peak resident memory of this process, or of the GPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # in bytes there, in KiB elsewhere
        return peak / 2 ** 20
    return peak / 2 ** 10


def environment(device):
    """What a reader needs to repeat a number."""
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    else:
        device_name = platform.machine()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "device_name": device_name,
        "threads": torch.get_num_threads(),
        "commit": commit_hash(ROOT),
    }


def by_torchrun():
    """Is this one of the processes that torchrun starts?"""
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
        self.signal = None                   # the number of the signal that came
        self.came = 0.0                      # when the first one came
        self.open = False                    # whether a signal raises Stopped now
        self.answer = "saving, then leaving"
        self.before = {}                     # the handlers to put back

    def __enter__(self):
        caught = [signal.SIGINT, signal.SIGTERM]
        hangup = getattr(signal, "SIGHUP", None)  # Windows has none
        # under nohup it is ignored, and stays so
        if hangup and signal.getsignal(hangup) is signal.SIG_DFL:
            caught.append(hangup)
        for number in caught:
            self.before[number] = signal.signal(number, self.catch)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def catch(self, number, _frame):
        """The handler of the signals."""
        if self.signal is not None and number == signal.SIGINT and not self.is_echo():
            raise KeyboardInterrupt
        if self.signal is None:  # a save may take a while: no silence until its end
            self.came = time.monotonic()
            answer = f"{signal.Signals(number).name}: {self.answer}"
            if number == signal.SIGINT:
                answer += ", once more leaves at once"
            with contextlib.suppress(OSError):  # of a terminal that is gone
                os.write(2, f"\n{answer}\n".encode())
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
        """The name of the signal that came, or None."""
        if self.signal is None:
            return None
        return signal.Signals(self.signal).name

