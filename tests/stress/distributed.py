"""Several processes against one: ranks x model x optimizer x sharding x precision; and kills.

    python tests/stress/distributed.py [--kills 10]

Not part of CI (tests/test_distributed.py is the short form). Each row is one real torchrun job of
gloo ranks on the CPU, 6 steps, compared with one process at equal global batch: largest difference
of weights, averages and optimizer state, of losses and gradient norms. Then rounds of: start 2
ranks with --resume_latest, wait for 3 more steps, SIGKILL one rank in turn; every checkpoint has to
verify, and the end has to equal the run that nobody touched. Prints rows, then one JSON document.
"""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2]), str(HERE.parents[2] / "benchmarks")]

import checkpoint
from harness import ROOT, arguments

os.environ["PYTHONPATH"] = str(ROOT)
SHAPE = (
    "--d_model", 32, "--n_layers", 2, "--n_heads", 2, "--d_ff", 48, "--memory_slots", 4,
    "--seq_len", 32, "--batch_size", 4, "--grad_accum", 3, "--train_block_sizes", "T,8,1",
    "--ar_fade", 0, "--seed", 3,    # of all three among the first six steps
    "--block_size", 8, "--lr", 3e-4, "--lr_schedule", "constant", "--warmup_steps", 2, "--ema", 0.9,
    "--eval_batches", 1, "--eval_interval", 3, "--keep_full", 10**6, "--log_interval", 1,
    "--threads", 1, "--no_show_samples", "--live", "off", "--data_dir", "text",
)
GRID = [
    (2, "primary", "muon", ()),
    (2, "backup", "adamw", ()),
    (4, "primary", "adamw", ()),
    (4, "backup", "muon", ()),
    (2, "primary", "lion", ()),
    (2, "primary", "adamw", ("--fsdp",)),
    (2, "backup", "adamw", ("--fsdp",)),
    (4, "primary", "lion", ("--fsdp",)),
    (4, "backup", "adamw", ("--fsdp",)),
    (2, "primary", "adamw", ("--amp",)),
    (2, "primary", "adamw", ("--fsdp", "--amp")),
    (2, "backup", "adamw", ("--fsdp", "--amp")),
]


def command(ranks, *words):
    start = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
        if ranks > 1
        else []
    )
    return [str(word) for word in (sys.executable, *start, "-m", "train", *words)]


def run(folder, ranks, *words):
    done = subprocess.run(command(ranks, *words), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def log(run):
    lines = map(json.loads, (run / "train.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line for line in lines if line["event"] == "train"}


def apart(one, other, step):
    """Largest differences: tensors of each file, losses and gradient norms."""
    out = {}
    for name in ("model", "ema", "optimizer"):
        a, b = (
            getattr(checkpoint.load(r / f"step_{step:06d}", parts=(name,)), name)
            for r in (one, other)
        )
        out[name] = max(float((a[key] - b[key]).abs().max()) for key in a)
    a, b = log(one), log(other)
    return out | {key: max(abs(a[s][key] - b[s][key]) for s in a) for key in ("loss", "gnorm")}


def main():
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=10)
    kills = parser.parse_args().kills
    result = {"grid": [], "kills": []}
    with tempfile.TemporaryDirectory() as temp:
        folder, known = Path(temp), {}
        prepare = (
            "--source", "builtin", "--max_chars", "20000", "--tokenizer_vocab", "400",
            "--data_dir", "text",
        )
        subprocess.run(
            [sys.executable, "-m", "prepare", *prepare, "--tokenizer", "text/t.model"],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        for ranks, model, optimizer, more in GRID:
            words = (
                *SHAPE, "--model", model, "--optimizer", optimizer, "--max_steps", 6,
                "--save_interval", 6,
            )
            amp = () if "--amp" in more else ("--no_amp",)
            key = f"{model}_{optimizer}_{len(amp)}"
            if key not in known:
                known[key] = folder / key
                run(folder, 1, *words, *(amp or ("--amp",)), "--output_dir", key)
            name = f"{ranks} ranks, {model}, {optimizer} {' '.join(more)}".strip()
            run(folder, ranks, *words, *amp, *more, "--output_dir", name)
            row = {"job": name} | apart(known[key], folder / name, 6)
            result["grid"].append(row)
            print(
                f"{name:38} " + "  ".join(f"{k} {v:.1e}" for k, v in row.items() if k != "job"),
                flush=True,
            )

        words = (
            *SHAPE, "--model", "primary", "--optimizer", "adamw", "--no_amp", "--save_interval", 2,
        )
        for turn in range(kills):  # DDP and FSDP in turn: each goes on from the other's files
            before, cut = (
                max(log(folder / "killed"), default=0) if turn else 0,
                ("--fsdp",) * (turn // 2 % 2),
            )
            with open(folder / "out", "wb") as out:
                job = subprocess.Popen(
                    command(
                        2, *words, *cut, "--output_dir", "killed", "--resume_latest",
                        "--max_steps", 10**6,
                    ),
                    cwd=folder,
                    stdout=out,
                    stderr=out,
                )
            while job.poll() is None and not (
                (folder / "killed/latest").exists() and max(log(folder / "killed")) >= before + 3
            ):
                time.sleep(0.02)
            for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
                if (
                    f"\0RANK={turn % 2}\0".encode()
                    in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
                ):
                    os.kill(int(pid), signal.SIGKILL)
            killed = time.perf_counter()
            code = job.wait()
            saved = checkpoint.load(folder / "killed", parts=("model", "ema", "optimizer"))
            row = {
                "rank": turn % 2,
                "fsdp": bool(cut),
                "code": code,
                "step": saved.step,
                "seconds": round(time.perf_counter() - killed, 2),
                "said": "another process of this run has ended"
                in (folder / "out").read_text(errors="replace"),
            }
            result["kills"].append(row)
            print("kill", row, flush=True)
        if kills:
            end = (max(log(folder / "killed")) // 2 + 1) * 2
            run(folder, 2, *words, "--output_dir", "killed", "--resume_latest", "--max_steps", end)
            run(folder, 1, *words, "--output_dir", "untouched", "--max_steps", end)
            result["after_kills"] = apart(folder / "untouched", folder / "killed", end) | {
                "step": end
            }
            print("after the kills", result["after_kills"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
