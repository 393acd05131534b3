"""How fast training is on this machine: tokens/s, where a step's time goes, share of matmul peak.

    python benchmarks/train_speed.py
    python benchmarks/train_speed.py --exits --shapes d256
    python benchmarks/train_speed.py --compile --recompute --shapes d256
    python benchmarks/train_speed.py --allocator
    python benchmarks/train_speed.py --lengths 256 512 1024 2048 4096 --blocks T 64
    python benchmarks/train_speed.py --memory

Without a flag: two shapes, two models, and the three sorts of steps: whole rows (T), both streams
(blocks of 32), left to right alone (1); about 6 minutes.

    --exits        what the early-exit loss costs
    --compile      --compile of train, cold and warm; --recompute: --activation_checkpointing
    --allocator    what keeping freed memory is worth, page faults included
    --lengths      tokens/s as the rows get longer
    --memory       a small run of 2,000 steps: its memory must not grow with the steps

Every figure is a median over rounds; in a round each variant runs once, one after the other, so
that a noisy neighbour hits all of them. FLOPs are counted by torch's flop counter while a real step
runs, not taken from a formula. The models of one shape have equal parameters
(model_config.match_d_ff). Prints a table; the last line is one JSON document.
"""
import dataclasses
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from harness import ROOT, arguments, tiny_text  # first: it puts the repository on the path

import config
import masking
import model_config
from common import machine
from model import build_model
from training import optim, setup
from training.step import mask_sample

VOCAB = 8000
COMPILED, RECOMPUTED = " compiled", " recomputed"
SHAPES = {  # name: (arguments, sequences per forward)
    "d256": (dict(d_model=256, n_layers=6, n_heads=4, d_ff=768, memory_slots=8, seq_len=256), 8),
    "d512": (dict(d_model=512, n_layers=10, n_heads=8, d_ff=1536, memory_slots=16, seq_len=512), 4),
}
TOKENS = 4096             # of a step of --lengths


def attention_flops(q, k, v, *_, **__):
    b, h, t, e = q
    return 4 * b * h * t * k[2] * e


def attention_flops_backward(grad, q, k, v, *_, **__):
    b, h, t, e = q
    # five products of the forward's size: flash recomputes the scores
    return 10 * b * h * t * k[2] * e


def depthwise_backward(grad, x, w, *_, **__):
    # the registered formula counts every channel with every other
    return 2 * 2 * math.prod(grad) * math.prod(w[1:])


COUNTED = {
    torch.ops.aten.convolution_backward: depthwise_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_flops_backward,
}


class Variant:
    """One model at one shape with one block rule; step() runs a whole optimizer step and returns
    its parts in seconds.
    """

    def __init__(self, model, shape, block, optimizer, dtype, exit_weight=0.0, way=""):
        settings, batch = SHAPES[shape]
        args = config.TrainArgs(
            model=model,
            batch_size=batch,
            grad_accum=1,
            optimizer=optimizer,
            exit_loss_weight=exit_weight,
            **settings,
        )
        cfg = model_config.model_config(args, VOCAB)
        if model == "primary":
            backup = dataclasses.replace(cfg, model="backup")
            cfg = dataclasses.replace(
                cfg, d_ff=model_config.match_d_ff(cfg, model_config.count_params(backup))
            )
        torch.manual_seed(0)
        self.args, self.cfg, self.dtype = args, cfg, dtype
        # what mask_sample asks a run for
        self.rows = batch
        self.mine = slice(None)
        self.length = args.seq_len
        self.block = args.seq_len if block == "T" else int(block)
        self.model = build_model(cfg)
        self.optimizer = optim.make_optimizer(self.model, args)
        self.name = dict(
            shape=shape,
            model=model,
            block=block,
            optimizer=optimizer + (" + exit" if exit_weight else "") + way,
        )
        self.tokens, self.flops, self.count, self.compile_s = batch * args.seq_len, 0, 0, {}
        self.model.recompute = way == RECOMPUTED
        if way == COMPILED:
            self.compiled()

    def compiled(self):
        """Compile twice: with an empty cache on the disk, and as a second run finds it."""
        args = dataclasses.replace(self.args, train_block_sizes=self.name["block"], ar_fade=0.0)
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            for state in ("cold", "warm"):
                torch.compiler.reset()
                for layer in self.model.layers:
                    layer.__dict__.pop("forward", None)
                started = time.perf_counter()
                with machine.autocast(torch.device("cpu"), self.dtype):
                    shape = (args.batch_size, args.seq_len)
                    setup.compile_step(self.model, args, [shape], "cpu")
                self.compile_s[state] = time.perf_counter() - started

    def step(self):
        marks = [time.perf_counter()]
        x0 = torch.randint(4, VOCAB, (self.args.batch_size, self.args.seq_len))
        masks = mask_sample(self, self.count, self.block)
        self.count += 1
        marks.append(time.perf_counter())
        with machine.autocast(torch.device("cpu"), self.dtype):
            early = masking.pick_exit(self.cfg.n_layers, 1, self.count) if self.cfg.exits else None
            out = masking.denoising_loss(
                self.model, x0, masks, "elbo",
                early=early, early_weight=self.args.exit_loss_weight,
            )
        marks.append(time.perf_counter())
        out.loss.backward()
        marks.append(time.perf_counter())
        optim.clip_grad_norm(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(time.perf_counter())
        return [b - a for a, b in zip(marks, marks[1:], strict=False)]

    def count_flops(self):
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            self.step()
        self.flops = counter.get_total_flops()


def measure(variants, rounds):
    for v in variants:
        v.step()
        if v.name["optimizer"].endswith((COMPILED, RECOMPUTED)):
            v.flops = next(
                w.flops
                for w in variants
                if all(w.name[key] == v.name[key] for key in ("model", "block"))
            )
        else:
            v.count_flops()  # no counter sees into a graph; what is done again is no progress
        v.parts = []
    for _ in range(rounds):
        for v in variants:
            v.parts.append(v.step())


def report(variants, peak):
    rows = []
    for v in variants:
        data, forward, backward, update = (
            1e3 * statistics.median(column) for column in zip(*v.parts, strict=True)
        )
        whole = sorted(sum(p) for p in v.parts)
        seconds = statistics.median(whole)
        rows.append(
            {
                **v.name,
                "length": v.args.seq_len,
                "params": model_config.count_params(v.cfg),
                "tok_per_s": v.tokens / seconds,
                "step_ms": 1e3 * seconds,
                "step_ms_min": 1e3 * whole[0],
                "step_ms_max": 1e3 * whole[-1],
                "forward_ms": forward,
                "backward_ms": backward,
                "optimizer_ms": update,
                "data_ms": data,
                "gflop": v.flops / 1e9,
                "of_peak": v.flops / seconds / peak,
                "compile_s": v.compile_s,
            }
        )
        print(
            "{shape} {model:8} {block:>3} {optimizer:12} {params:>11,} {tok_per_s:8.0f} tok/s  "
            "step {step_ms:6.0f} ms "
            "({step_ms_min:.0f}-{step_ms_max:.0f}) = forward {forward_ms:.0f} + backward "
            "{backward_ms:.0f} + optimizer "
            "{optimizer_ms:.0f} + data {data_ms:.1f}   {of_peak:.0%} of peak".format(**rows[-1]),
            *(f"{state} {s:.0f} s" for state, s in v.compile_s.items()),
            flush=True,
        )
    return rows


def exponents(rows):
    """How the time of a row grows with its length: the slope of log seconds against log length, by
    model and block rule.
    """
    found = {}
    for model, block in dict.fromkeys((r["model"], r["block"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["block"]) == (model, block)]
        x = [math.log(r["length"]) for r in mine]
        y = [math.log(r["length"] / r["tok_per_s"]) for r in mine]
        found[f"{model} {block}"] = statistics.linear_regression(x, y).slope
        print(
            f"{model:8} {block:>3}: the time of a row grows with its length to the power of "
            f"{found[f'{model} {block}']:.2f}"
        )
    return found


def allocator(rounds):
    """One subprocess for each setting, taken in turn: seconds and page faults of d512 steps."""
    results = {"kept": [], "default": []}
    for _ in range(rounds):
        for setting, taken in results.items():
            done = subprocess.run(
                [sys.executable, __file__, "--child"],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "ARIA_ALLOCATOR": setting},
            )
            taken.append(json.loads(done.stdout.splitlines()[-1]))
    out = {
        s: {k: statistics.median(r[k] for r in taken) for k in taken[0]}
        for s, taken in results.items()
    }
    for setting, r in out.items():
        print(
            f"freed memory {setting:8} step {r['step_ms']:.0f} ms, {r['faults']:,.0f} page faults "
            "per step, "
            f"peak memory {r['peak_mb']:.0f} MB"
        )
    return out


def child():
    v = Variant("primary", "d512", "64", "adamw", torch.bfloat16)
    v.step(), v.step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    times = [sum(v.step()) for _ in range(4)]
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / len(times)
    print(
        json.dumps(
            {
                "step_ms": 1e3 * statistics.median(times),
                "faults": faults,
                "peak_mb": machine.peak_memory_mb(),
            }
        )
    )


def memory(steps=2000, early=200):
    """The real command, 2,000 steps of a small model: peak memory after 200 steps and at the end,
    seconds of the first 200.
    """
    settings = dict(
        d_model=64,
        n_layers=2,
        n_heads=4,
        d_ff=192,
        memory_slots=8,
        seq_len=64,
        batch_size=8,
        grad_accum=1,
        train_block_sizes="T,32,8",
        threads=1,
        max_steps=steps,
        save_interval=steps,
    )
    settings |= dict(eval_interval=500, eval_batches=6)
    with tempfile.TemporaryDirectory() as folder:
        tiny_text(Path(folder))
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        subprocess.run(
            [
                sys.executable, "-m", "train", "--data_dir", folder,
                "--output_dir", f"{folder}/run", *words, "--no_show_samples",
            ],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        lines = Path(folder, "run", "train.jsonl").read_text(encoding="utf-8").splitlines()
    taken = [line for line in map(json.loads, lines) if line["event"] == "train"]
    found = {"early_mb": taken[early - 1]["mem_mb"], "end_mb": taken[-1]["mem_mb"],
             "early_s": sum(line["step_ms"] for line in taken[:early]) / 1e3}
    found["growth"] = found["end_mb"] / found["early_mb"] - 1
    print(
        f"memory after {early} steps {found['early_mb']:.0f} MB, after {steps} "
        f"{found['end_mb']:.0f} MB "
        f"({found['growth']:+.1%}); the first {early} steps took {found['early_s']:.1f} s"
    )
    return found


def main():
    p = arguments(__doc__)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    p.add_argument("--blocks", nargs="+", default=["T", "32", "1"])
    p.add_argument("--optimizers", nargs="+", default=["adamw"])
    p.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        help=f"instead: the d256 shape at these lengths, {TOKENS} tokens a step",
    )
    p.add_argument(
        "--exits", action="store_true", help="each variant also with the early-exit loss"
    )
    p.add_argument(
        "--compile",
        action="store_true",
        help="each variant also compiled, one block rule, and how long that takes",
    )
    p.add_argument(
        "--recompute", action="store_true", help="each variant also with --activation_checkpointing"
    )
    p.add_argument("--allocator", action="store_true")
    p.add_argument("--memory", action="store_true")
    p.add_argument("--child", action="store_true")
    args = p.parse_args()
    told = machine.start(0)
    if args.child:
        return child()
    if args.memory:
        print(json.dumps({"memory": memory(), **machine.environment(torch.device("cpu"))}))
        return
    if args.allocator:
        print(
            json.dumps(
                {"allocator": allocator(args.rounds), **machine.environment(torch.device("cpu"))}
            )
        )
        return
    speed = machine.matmul_flops((torch.bfloat16, torch.float32), size=2048)
    dtype, why = machine.pick_precision("auto", "bf16", torch.device("cpu"))
    peak = speed[dtype or torch.float32]
    print(
        f"matmul peak: bf16 {speed[torch.bfloat16] / 1e9:.0f} GFLOP/s, float32 "
        f"{speed[torch.float32] / 1e9:.0f}; "
        f"training in {why}; memory: {told}"
    )
    if args.lengths:
        base = SHAPES["d256"][0]
        SHAPES.update(
            {f"d256_{n}": (base | dict(seq_len=n), max(1, TOKENS // n)) for n in args.lengths}
        )
        args.shapes = [f"d256_{n}" for n in args.lengths]
    rows = []
    for shape in args.shapes:
        ways = ["", *[COMPILED] * args.compile, *[RECOMPUTED] * args.recompute]
        variants = [
            Variant(m, shape, b, o, dtype, weight, way)
            for b in args.blocks
            for o in args.optimizers
            for m in ("primary", "backup")
            for weight in ((0.0, 0.1) if args.exits else (0.0,))
            for way in ways
        ]
        measure(variants, args.rounds)
        rows += report(variants, peak)
    print(
        json.dumps(
            {
                "rows": rows,
                "exponents": exponents(rows) if args.lengths else {},
                "rounds": args.rounds,
                "peak_gflops": {str(d): f / 1e9 for d, f in speed.items()},
                **machine.environment(torch.device("cpu")),
            }
        )
    )


if __name__ == "__main__":
    main()
