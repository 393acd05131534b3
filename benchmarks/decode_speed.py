"""Figures of exact frozen decoding: against decoding the whole text at once, against the length of the context, its operators.

    python benchmarks/decode_speed.py

1. tokens/s of full and block_frozen for 128 new tokens at equal forwards per token, batch 1: what the block rule is worth.
2. Milliseconds of one block (forwards and commit) after 256, 1,024 and 4,096 tokens of context: whether its cost grows.
3. Milliseconds of a prompt of 1,024 tokens committed block by block and in one pass.
4. Operators that one block's forward calls from Python, and all that those call: figures that no busy machine can blur.
d 512, 10 layers, 8,000 pieces, equal parameters, random weights, bf16 where the CPU has it; variants in turn, medians of 7.
"""
import json
import statistics
from functools import partial

import torch
from common import in_turn
from torch.profiler import ProfilerActivity, profile

import fast
import runtime
from benchmarks.decode_peers import BLOCK, VOCAB, shape
from decode import Settings, generate
from model import build_model

ROUNDS, NEW, PER_FORWARD = 7, 128, 4
CONTEXTS = (256, 1024, 4096)
PROMPT = [2] + [5] * 63


def timed(runs, rounds=ROUNDS):
    """{name: function} -> {name: median milliseconds}, taken in turn after one untimed round."""
    return {name: 1e3 * statistics.median(seconds) for name, seconds in in_turn(runs, rounds).items()}


def operators(run):
    """-> (operators called from Python, all that ran), views and casts included."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return sum(e.cpu_parent is None for e in seen.events()), len(seen.events())


def given(model):
    """{way: milliseconds} of committing 1,024 tokens."""
    prompt = torch.randint(4, VOCAB, (1, 1024))

    def by_block():
        cache = model.new_cache(1, 1024)
        for part in prompt.split(BLOCK, dim=1):
            model.commit(part, cache)
    return timed({"one_pass": lambda: model.commit(prompt, model.new_cache(1, 1024), BLOCK), "by_block": by_block})


def main():
    runtime.start(0)
    torch.set_grad_enabled(False)
    precision, why = fast.pick("auto", torch.device("cpu"))
    print(f"products in {precision} ({why})")
    out = {"precision": precision}
    for kind in ("primary", "backup"):
        torch.manual_seed(0)
        model = build_model(shape(kind)).eval()
        fast.prepare(model, precision)
        modes = {mode: Settings(NEW, n // PER_FORWARD, mode=mode, block_size=BLOCK, temperature=0, eos_id=None)
                 for mode, n in (("full", NEW), ("block", BLOCK), ("block_frozen", BLOCK))}
        ms = timed({mode: lambda s=s, model=model: generate(model, PROMPT, s, [0]) for mode, s in modes.items()})
        print(f"{kind:8} {PER_FORWARD} tokens per forward: " + ", ".join(f"{m} {1e3 * NEW / t:.0f} tok/s" for m, t in ms.items())
              + f"; block_frozen / full {ms['full'] / ms['block_frozen']:.2f}x", flush=True)
        caches = {}
        for context in CONTEXTS:
            caches[context] = model.new_cache(1, CONTEXTS[-1] + 64 * BLOCK)
            for _ in range(0, context, 64):
                model.commit(torch.randint(4, VOCAB, (1, 64)), caches[context])
        block = torch.randint(4, VOCAB, (1, BLOCK))

        def one_block(cache, model=model, block=block):
            for _ in range(BLOCK // PER_FORWARD):
                model.hidden(block, cache)
            model.commit(block, cache)
        grown = timed({context: lambda c=cache: one_block(c) for context, cache in caches.items()})
        print(f"{kind:8} a block after " + ", ".join(f"{c}: {t:.1f} ms ({caches[c].nbytes / 1e6:.2f} MB of cache)"
                                                     for c, t in grown.items())
              + f"; growth {grown[CONTEXTS[-1]] / grown[CONTEXTS[0]] - 1:+.1%}", flush=True)
        prompt_ms = given(model)
        called, ran = operators(partial(model.hidden, block, caches[CONTEXTS[0]]))
        print(f"{kind:8} a prompt of 1,024: one pass {prompt_ms['one_pass']:.0f} ms, by block {prompt_ms['by_block']:.0f} ms; "
              f"a block's forward calls {called} operators, {ran} with those inside", flush=True)
        out[kind] = {"mode_ms": ms, "block_ms": grown, "prompt_ms": prompt_ms, "operators": [called, ran]}
    print(json.dumps({**out, **runtime.environment(torch.device("cpu"))}))


if __name__ == "__main__":
    main()
