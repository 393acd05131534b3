"""Exact frozen decoding: beside decoding the whole text at once, by context, and its operators.

    python benchmarks/decode_speed.py

1. tokens/s of full, block and block_frozen for 128 new tokens at equal forwards per token, batch 1,
   behind prompts of 64, 256 and 1,024 tokens: what the block rule is worth. Beside them
   left_to_right, a forward of one row for each token.
2. Milliseconds of one block (its forwards, and reading it into the cache) after 256, 1,024 and
   4,096 tokens of context: whether its cost grows.
3. Milliseconds of reading a prompt of 1,024 tokens into the cache block by block and in one pass.
4. Milliseconds of one forward, head included, of one token of the clean stream and of blocks of 1
   to 128 tokens, beside two limits: reading every weight once at the measured memory speed, and 2 x
   parameters x block at the measured speed of a product. What lies above both is small operators.
5. Operators that one block's forward calls from Python, and all that those call, and those of one
   token of the clean stream: figures that no busy machine can blur.

d 512, 10 layers, 8,000 pieces, equal parameters, random weights, bf16 where the CPU has it;
variants in turn, medians of 7 (of 2 behind 1,024 tokens).
"""
import json
import math
import statistics
import time
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from harness import arguments, in_turn  # first: it puts the repository on the path

import model_config
from benchmarks.decode_peers import BLOCK, VOCAB, shape
from common import machine
from model import build_model
from sampling import fast
from sampling.decode import generate
from sampling.settings import Settings
from sampling.torch_model import TorchModel

ROUNDS, NEW, PER_FORWARD = 7, 128, 4
CONTEXTS = (256, 1024, 4096)
PROMPTS = (64, 256, 1024)
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)


def timed(runs, rounds=ROUNDS):
    """{name: function} -> {name: median milliseconds}, taken in turn after one untimed round."""
    return {
        name: 1e3 * statistics.median(seconds) for name, seconds in in_turn(runs, rounds).items()
    }


def operators(run):
    """-> (operators called from Python, all that ran), views and casts included."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return sum(e.cpu_parent is None for e in seen.events()), len(seen.events())


def given(model):
    """{way: milliseconds} of reading 1,024 tokens into the cache."""
    prompt = torch.randint(4, VOCAB, (1, 1024))

    def by_block():
        cache = model.new_cache(1, 1024)
        for part in prompt.split(BLOCK, dim=1):
            model.step(part, cache)

    return timed(
        {
            "one_pass": lambda: model.step(prompt, model.new_cache(1, 1024)),
            "by_block": by_block,
        }
    )


def memory_speed():
    """Bytes per second of reading 512 MB, far more than any cache holds; the best of 5."""
    big, best = torch.ones(2**27), math.inf
    for _ in range(5):
        started = time.perf_counter()
        big.sum()
        best = min(best, time.perf_counter() - started)
    return 4 * big.numel() / best


def modes(kind, model, out):
    """full, block, block_frozen and left to right behind each prompt."""
    writer = TorchModel(model)
    for length in PROMPTS:
        settings = {
            mode: Settings(
                NEW, n // PER_FORWARD, mode=mode, block_size=BLOCK, temperature=0, eos_id=None
            )
            for mode, n in (("full", NEW), ("block", BLOCK), ("block_frozen", BLOCK))
        }
        settings["left_to_right"] = Settings(
            NEW, 1, mode="block_frozen", block_size=1, temperature=0, eos_id=None
        )
        prompt = [2] + [5] * (length - 1)
        ms = timed(
            {mode: partial(generate, writer, prompt, s, [0]) for mode, s in settings.items()},
            min(ROUNDS, 2048 // length),
        )
        print(f"{kind:8} prompt {length}, {PER_FORWARD} tokens per forward: "
              + ", ".join(f"{m} {1e3 * NEW / t:.0f} tok/s" for m, t in ms.items())
              + f"; block_frozen / full {ms['full'] / ms['block_frozen']:.2f}x", flush=True)
        out.setdefault("mode_ms", {})[length] = ms


def widths(kind, model, precision, product, memory, out):
    """One forward of one token of the clean stream and of blocks of several lengths, head included,
    and its two limits in milliseconds.
    """
    cache = model.new_cache(1, 256 + WIDTHS[-1])
    model.step(torch.randint(4, VOCAB, (1, 64)), cache)
    blocks = {w: torch.randint(4, VOCAB, (1, w)) for w in WIDTHS}
    runs = {w: lambda b=b: model.logits(model.states(b, cache)) for w, b in blocks.items()}
    runs["step"] = lambda: model.logits(model.step(blocks[1], cache))
    ms = timed(runs, 3 * ROUNDS)
    params, bytes_each = (
        model_config.count_params(model.cfg),
        {"fp32": 4, "bf16": 2, "int8": 1}[precision],
    )
    print(
        f"{kind:8} {precision}: a forward of 1 token reads {params * bytes_each / 1e6:.0f} MB, at "
        "least "
        f"{1e3 * params * bytes_each / memory:.1f} ms"
    )
    print(f"{kind:8} {precision}: the next token, left to right, takes {ms['step']:5.1f} ms")
    for w in WIDTHS:
        t = ms[w]
        print(
            f"{kind:8} {precision}: a block of {w:3} takes {t:5.1f} ms, {t / w:5.2f} a token; its "
            "products "
            f"{2e3 * params * w / product:5.1f} ms at the bf16 peak",
            flush=True,
        )
    out.setdefault("width_ms", {})[precision] = ms


def main():
    arguments(__doc__).parse_args()
    machine.start(0)
    torch.set_grad_enabled(False)
    precision, why = fast.pick("auto", torch.device("cpu"))
    product, memory = (
        machine.matmul_flops((torch.bfloat16,), size=2048)[torch.bfloat16],
        memory_speed(),
    )
    print(
        f"products in {precision} ({why}); {product / 1e9:.0f} GFLOP/s in bf16, memory "
        f"{memory / 1e9:.1f} GB/s"
    )
    out = {"precision": precision, "gflops": product / 1e9, "memory_gb_s": memory / 1e9}
    for kind in ("primary", "backup"):
        torch.manual_seed(0)
        model = build_model(shape(kind)).eval()
        fast.prepare(model, precision)
        out[kind] = {}
        modes(kind, model, out[kind])
        widths(kind, model, precision, product, memory, out[kind])
        if precision != "int8":
            torch.manual_seed(0)
            other = build_model(shape(kind)).eval()
            fast.prepare(other, "int8")
            widths(kind, other, "int8", product, memory, out[kind])
        caches = {}
        for context in CONTEXTS:
            caches[context] = model.new_cache(1, CONTEXTS[-1] + 64 * BLOCK)
            for _ in range(0, context, 64):
                model.step(torch.randint(4, VOCAB, (1, 64)), caches[context])
        block = torch.randint(4, VOCAB, (1, BLOCK))

        def one_block(cache, model=model, block=block):
            for _ in range(BLOCK // PER_FORWARD):
                model.states(block, cache)
            model.step(block, cache)
        grown = timed({context: lambda c=cache: one_block(c) for context, cache in caches.items()})
        print(
            f"{kind:8} a block after "
            + ", ".join(
                f"{c}: {t:.1f} ms ({caches[c].nbytes / 1e6:.2f} MB of cache)"
                for c, t in grown.items()
            )
            + f"; growth {grown[CONTEXTS[-1]] / grown[CONTEXTS[0]] - 1:+.1%}",
            flush=True,
        )
        prompt_ms = given(model)
        near = caches[CONTEXTS[0]]
        called, ran = operators(partial(model.states, block, near))
        called_one, ran_one = operators(partial(model.step, block[:, :1], near))
        print(
            f"{kind:8} a prompt of 1,024: one pass {prompt_ms['one_pass']:.0f} ms, by block "
            f"{prompt_ms['by_block']:.0f} ms; "
            f"a block's forward calls {called} operators, {ran} with those inside, the next token "
            f"left to right {called_one} and {ran_one}",
            flush=True,
        )
        out[kind] |= {
            "block_ms": grown,
            "prompt_ms": prompt_ms,
            "operators": [called, ran],
            "operators_left_to_right": [called_one, ran_one],
        }
    print(json.dumps({**out, **machine.environment(torch.device("cpu"))}))


if __name__ == "__main__":
    main()
