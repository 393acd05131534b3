"""Runs a command as it would run on an older CPU: in what code it takes, not in how fast that is.

    python benchmarks/older_cpu.py avx2 python -m sample --prompt "भारत"

Kinds: avx-vnni (Intel laptops from 2021 on), avx512 (servers before VNNI, 2017), avx2 (laptops of
2013 to 2020, AMD to Zen 3), sse (Celeron and Pentium to 2021), each as far as this CPU has it. ONNX
Runtime, PyTorch and numpy ask the CPU what it can, and older_cpu.c answers; programs with a handler
of their own for SIGSEGV cannot run so. Linux on an Intel CPU, and gcc.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = ("avx-vnni", "avx512", "avx2", "sse")
SOURCE = Path(__file__).with_suffix(".c")


def units():
    """What Linux knows of this CPU, a set of words."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()


def build(folder):
    """Compile the library -> its path, or None where it cannot be built or would not work."""
    if "cpuid_fault" not in units():
        return None
    path = Path(folder) / "older_cpu.so"
    try:
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", path, SOURCE], check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return path


def environment(library, kind):
    """What a process needs to be on such a CPU."""
    return {"LD_PRELOAD": str(library), "OLDER_CPU": kind}


def main():
    kind, *command = sys.argv[1:] or [""]
    if kind not in KINDS or not command:
        sys.exit(f"usage: python benchmarks/older_cpu.py {'|'.join(KINDS)} COMMAND ...")
    with tempfile.TemporaryDirectory() as folder:
        library = build(folder)
        if library is None:
            sys.exit("this needs Linux, an Intel CPU on which cpuid may trap, and gcc")
        sys.exit(subprocess.run(command, env=os.environ | environment(library, kind)).returncode)


if __name__ == "__main__":
    main()
