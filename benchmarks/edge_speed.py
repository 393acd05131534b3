"""The exported model beside PyTorch: milliseconds of a forward, tokens/s, memory, the first token.

    python benchmarks/edge_speed.py                         # 5M, 15M and 38M parameters
    python benchmarks/edge_speed.py --sizes 38M --engines onnx8 torch-int8 --rounds 15

1. Milliseconds of a forward, head included: one token of the clean stream, noisy blocks, a prompt
   of 1,024 tokens.
2. Tokens/s of 128 new tokens behind prompts of 64 and 1,024: left to right, and in blocks of 32
   that take 8 forwards each. Text that is drafted and verified depends on the weights: see
   `python -m edge_benchmark`.
3. Bytes of the folder, peak memory of python -m sample on it, and seconds from the shell to the
   first token.

Random weights: this measures speed alone. Engines in turn, medians of the rounds, in as many
threads as --threads says. A turn is one untimed call and then CALLS of them (a prompt: one), as
text is written: the weights that another engine has pushed out of the processor's cache are back.
The last line is a JSON document. Not part of CI.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from harness import ROOT, arguments, in_turn  # first: it puts the repository on the path

import cli
import config
import model_config
import prepare
from common import machine
from common.flags import to_dict
from edge import engine, folder
from model import build_model
from sampling import fast
from sampling.decode import generate
from sampling.settings import Settings
from sampling.torch_model import TorchModel

SIZES = {
    "5M": dict(d_model=192, n_layers=6, n_heads=6, d_ff=768, memory_slots=16),
    "15M": dict(d_model=320, n_layers=8, n_heads=8, d_ff=1280, memory_slots=16),
    "38M": dict(d_model=512, n_layers=10, n_heads=8, d_ff=1920, memory_slots=16),
}
VOCAB = 8000
ENGINES = ("torch-fp32", "torch-bf16", "torch-int8", "onnx32", "onnx8", "onnx4")
ROWS = (1, 8, 16, 32, 64)
PROMPT = 1024
CALLS = 8
NEW = 128
LEFT_TO_RIGHT = Settings(
    max_new_tokens=NEW, steps=1, mode="block_frozen", block_size=1, eos_id=None, temperature=0.0
)
IN_BLOCKS = Settings(
    max_new_tokens=NEW, steps=8, mode="block_frozen", block_size=32, eos_id=None, temperature=0.0,
    sampler="confidence",
)
FIRST_TOKEN = """
import sys, time
import sample
sample.main(sys.argv[1:])
ended = time.time()
# of this program alone: the record of resource begins with that of whoever started it
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) / 1024, ended)
"""


def network(size):
    torch.manual_seed(0)
    cfg = model_config.ModelConfig(model="primary", vocab_size=VOCAB, **SIZES[size])
    return build_model(cfg).eval()


def engine_of(name, size, home, threads, wide=False):
    """The engine with this name, random weights in it. wide: for browsers (graphs.Products)."""
    model = network(size)
    kind, bits = name[:4], name[4:]
    if kind != "onnx":
        fast.prepare(model, name.partition("-")[2])
        return TorchModel(model)
    path = home / f"{size}_{bits}{'_wide' * wide}"
    if not path.exists():
        path.mkdir()
        saved = SimpleNamespace(
            tokenizer_bytes=tokenizer_bytes(home),
            config={"model": model.cfg.to_dict(), "args": settings_of_a_run(home)},
            step=0,
            state={},
        )
        folder.write_folder(model, saved, path, int(bits), 32, wide)
    return engine.load(path, threads)


def tokenizer_bytes(home):
    """A tokenizer of VOCAB pieces, so that sample can run on the folder."""
    path = home / "words" / "t.model"
    if not path.exists():
        prepare.main(["--source", "builtin", "--tokenizer_vocab", str(VOCAB), "--quiet",
                      "--data_dir", str(path.parent), "--tokenizer", str(path)])
    return path.read_bytes()


def settings_of_a_run(home):
    """The settings of a training on that text."""
    args, _ = cli.parse(config.TrainArgs, ["--data_dir", str(home / "words")], "train")
    return to_dict(args)


# ---- what is measured ----------------------------------------------------------------------------

def forwards(engines, rounds):
    """{case: {engine: median milliseconds}}."""
    rng = np.random.default_rng(0)
    text = rng.integers(4, VOCAB, (1, PROMPT))
    caches = {}
    for name, runner in engines.items():
        caches[name] = runner.new_cache(1, 2 * PROMPT)
        runner.step(text[:, :64], caches[name])

    def look(runner, states, count):
        positions = np.arange(count)
        return runner.logits(states, np.zeros_like(positions), positions)

    def one_token(name):
        runner = engines[name]
        look(runner, runner.step(text[:, :1], caches[name]), 1)

    def block(name, rows):
        runner = engines[name]
        masks = np.full((1, rows), runner.cfg.mask_id)
        look(runner, runner.states(masks, caches[name]), rows)

    def prompt(name):
        runner = engines[name]
        look(runner, runner.step(text, runner.new_cache(1, 2 * PROMPT)), 1)

    cases = {"one token": one_token, f"prompt of {PROMPT}": prompt}
    for rows in ROWS:
        cases[f"block of {rows}"] = lambda name, rows=rows: block(name, rows)
    found = {}
    for case, run in cases.items():
        calls = 1 if case.startswith("prompt") else CALLS
        found[case] = warm_medians(run, engines, rounds, calls)
    return found


def warm_medians(run, engines, rounds, calls):
    """{engine: median milliseconds of a call, directly behind another}."""
    taken = {name: [] for name in engines}
    for _ in range(rounds):
        for name in engines:
            run(name)
            started = time.perf_counter()
            for _ in range(calls):
                run(name)
            taken[name].append((time.perf_counter() - started) / calls)
    return {name: 1e3 * statistics.median(seconds) for name, seconds in taken.items()}


def medians(run, engines, rounds):
    taken = in_turn({name: lambda name=name: run(name) for name in engines}, rounds)
    return {name: 1e3 * statistics.median(seconds) for name, seconds in taken.items()}


def speeds(engines, rounds):
    """{case: {engine: tokens/s}}."""
    rng = np.random.default_rng(0)
    found = {}
    for length in (64, PROMPT):
        prompt = rng.integers(4, VOCAB, length).tolist()
        for way, settings in (("left to right", LEFT_TO_RIGHT), ("blocks of 32", IN_BLOCKS)):
            def run(name, prompt=prompt, settings=settings):
                generate(engines[name], prompt, settings, [0])
            taken = medians(run, engines, rounds)
            case = f"{way}, prompt of {length}"
            found[case] = {name: 1e3 * NEW / ms for name, ms in taken.items()}
    return found


def from_the_shell(path, rounds):
    """python -m sample on a folder -> {"folder_mb", "peak_mb", "first_token_s"}, medians."""
    peaks, seconds = [], []
    flags = ["--prompt", "mai kal", "--max_new_tokens", "1", "--blockwise", "--frozen_context",
             "--block_size", "1", "--quiet"]
    for _ in range(rounds):
        started = time.time()
        done = subprocess.run(
            [sys.executable, "-c", FIRST_TOKEN, str(path), *flags],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
            check=True,
        )
        peak, ended = done.stdout.splitlines()[-1].split()
        peaks.append(float(peak))
        seconds.append(float(ended) - started)
    return {
        "folder_mb": sum(file.stat().st_size for file in path.iterdir()) / 1e6,
        "peak_mb": statistics.median(peaks),
        "first_token_s": statistics.median(seconds),
    }


def table(title, found, engines):
    print(f"\n{title}", flush=True)
    width = max(map(len, found))
    print(" " * width, *(f"{name:>11}" for name in engines))
    for case, figures in found.items():
        cells = [f"{figures[name]:11.2f}" for name in engines]
        print(f"{case:{width}}", *cells)


def main():
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    machine.start(args.threads)
    torch.set_grad_enabled(False)
    document = {"threads": args.threads, **machine.environment(torch.device("cpu")), "sizes": {}}
    with tempfile.TemporaryDirectory() as home:
        for size in args.sizes:
            engines = {
                name: engine_of(name, size, Path(home), args.threads) for name in args.engines
            }
            found = {
                "parameters": model_config.count_params(next(iter(engines.values())).cfg),
                "milliseconds": forwards(engines, args.rounds),
                "tokens_per_second": speeds(engines, args.rounds),
                "shell": {},
            }
            document["sizes"][size] = found
            table(f"{size}: milliseconds of a forward", found["milliseconds"], engines)
            table(f"{size}: tokens/s", found["tokens_per_second"], engines)
            for name, runner in engines.items():
                if name.startswith("onnx"):
                    found["shell"][name] = from_the_shell(runner.folder, args.rounds)
                    print(name, found["shell"][name])
    print(json.dumps(document))


if __name__ == "__main__":
    main()
