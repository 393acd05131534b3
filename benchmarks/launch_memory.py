"""The memory that a plan of run_1b_launch says, beside the peak of the process that trains.

    python benchmarks/launch_memory.py             # three sizes, float32 and bf16; Linux, minutes
    python benchmarks/launch_memory.py --only 2    # the largest alone

The peak is VmHWM in /proc/PID/status, read while the process trains, before it saves. From it goes
that of a training of next to nothing, which is Python with PyTorch. Freed memory goes back to the
kernel at once (MALLOC_MMAP_THRESHOLD_), so that the peak is what lives; with --kept also the peak
under the allocator as train sets it, which keeps what was freed.
"""
import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training import launch_plan  # noqa: E402

SIZES = (
    "--d_model 256 --n_layers 6 --n_heads 8 --d_ff 704 --seq_len 256 --batch_size 4",
    "--d_model 512 --n_layers 8 --n_heads 8 --d_ff 1408 --seq_len 512 --batch_size 2",
    "--d_model 1024 --n_layers 10 --n_heads 16 --d_ff 2816 --seq_len 512 --batch_size 1",
)
KINDS = (
    "--no_amp --param_dtype fp32",
    "--no_amp --param_dtype fp32 --no_activation_checkpointing",
    "--amp --param_dtype fp32 --optimizer adamw",
    "--amp --param_dtype bf16",
)
NOTHING = "--d_model 8 --n_layers 1 --n_heads 1 --d_ff 8 --seq_len 16 --batch_size 1"
STEPS = 3
ALLOCATORS = {
    "lives": {"ARIA_ALLOCATOR": "default", "MALLOC_MMAP_THRESHOLD_": "65536"},
    "kept": {},
}


def token_file(folder, pieces=50257):
    """A token file of random ids."""
    path = folder / f"ids{pieces}.npy"
    ids = np.random.default_rng(1).integers(0, pieces - 1, 400_000).astype(np.uint16)
    np.save(path, ids)
    about = f"tokens: {len(ids)}\ndocuments: 1\nencoding: gpt2\nvocab_size: {pieces}\n"
    Path(f"{path}.meta").write_text(about)
    return path


def peak_of(words, folder, allocator):
    """Bytes of VmHWM when the last step is done and nothing is saved yet."""
    run = folder / "run"
    subprocess.run(["rm", "-rf", run], check=True)
    environment = {**os.environ, **ALLOCATORS[allocator], "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *words, "--output_dir", str(run)],
        env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )
    peak = 0
    told = []
    for line in process.stderr:
        told.append(line)
        status = Path(f"/proc/{process.pid}/status").read_text()
        if line.startswith(f"step {STEPS}/50"):
            fields = dict(part.split(":", 1) for part in status.splitlines())
            peak = int(fields["VmHWM"].split()[0]) * 1024
            process.kill()
    process.wait()
    assert peak, "".join(told)
    return peak


def plan_of(argv):
    """-> the plan, the words of train without its folder."""
    plan = launch_plan.Plan(*launch_plan.parse(argv))
    return plan, plan.words[:plan.words.index("--output_dir")]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", type=int, choices=range(len(SIZES)))
    parser.add_argument("--kind", type=int, choices=range(len(KINDS)))
    parser.add_argument("--kept", action="store_true")
    asked = parser.parse_args()
    sizes = range(len(SIZES)) if asked.only is None else [asked.only]
    kinds = KINDS if asked.kind is None else [KINDS[asked.kind]]
    allocators = ALLOCATORS if asked.kept else ["lives"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = (
            f"--data {token_file(folder)} --cpu --threads 1 --max_steps 50 --log_interval 1 "
            "--eval_interval 0 --no_show_samples --save_interval 0 --grad_accum 2 "
            "--train_block_sizes 4 --ar_fade 0"
        )
        plan, words = plan_of(f"{common} {NOTHING} --no_amp --param_dtype fp32".split())
        base = {}
        for allocator in allocators:
            base[allocator] = peak_of(words, folder, allocator) - plan.peak.total
            print(f"Python and PyTorch, {allocator}: {base[allocator] / 1e9:.3f} GB", flush=True)
        for size, kind in itertools.product(sizes, kinds):
            plan, words = plan_of(f"{common} {SIZES[size]} {kind}".split())
            planned = plan.peak.total
            line = f"{size} {kind}: {plan.params / 1e6:.0f}M, planned {planned / 1e9:.3f} GB"
            for allocator in allocators:
                peak = peak_of(words, folder, allocator) - base[allocator]
                line += f", {allocator} {peak / 1e9:.3f} ({planned / peak - 1:+.1%})"
            print(f"{line}, {plan.peak.moment}", flush=True)


if __name__ == "__main__":
    main()
