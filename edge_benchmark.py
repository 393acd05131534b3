"""How fast is each decode mode, and what does the speed cost: full, block and block_frozen on the same prompts.

    python -m edge_benchmark --ckpt checkpoints/eco_hybrid_hi --modes full block block_frozen --runs_per_prompt 3

One line per mode for people; the last line on stdout, and benchmarks/edge_benchmark.json, hold everything. Notable:
* the timed runs of all modes alternate, so that a slow minute of the machine hits each of them alike;
* a run is timed from the prompt's text to the new ids; only new tokens before EOS count;
* quality stands beside speed: nll_per_token is the checkpoint's own -log p of what the mode wrote, each token scored while
  it is hidden, left to right over the frozen text before it (the block rule with blocks of one token: a chain rule, no
  bound). A low value is no proof of good text, as repetition scores well too: read it together with distinct_2;
* peak_rss_mb is taken in an extra untimed run per mode, after memory that is only kept was given back.
"""
import contextlib
import ctypes
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path

import config


def peak_rss(run, device):
    """Peak memory in MB while run() works: resident memory where Linux lets us reset its record, else of the process."""
    import torch

    import runtime
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")              # VmHWM starts again from here
    run()
    if device.type != "cuda":
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().split("\n")
            return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    return runtime.peak_memory_mb(device)


def nll(model, prompt, new, frozen):
    """-log p of the new tokens, summed: token i is a mask when it is scored, and everything before it is known.

    frozen: against the cache, in blocks of one token. Else (trained without blocks) the whole text is one block, and
    what comes after token i is hidden too.
    """
    import torch
    device, mask_id = model.head.weight.device, model.cfg.mask_id
    ids = torch.tensor([[*prompt, *new]], device=device)           # (1, P + N)
    canvas = ids.clone()
    canvas[:, len(prompt):] = mask_id
    cache, total = model.new_cache(1, ids.shape[1]) if frozen else None, 0.0
    for i in range(ids.shape[1]):
        if i >= len(prompt):
            h = model.hidden(canvas[:, i:i + 1], cache)[:, 0] if frozen else model.hidden(canvas)[:, i]      # (1, D)
            total -= float(model.logits(h).double().log_softmax(-1)[0, ids[0, i]])
            canvas[:, i] = ids[:, i]
        if frozen:
            model.commit(ids[:, i:i + 1], cache)
    return total


def agreement(row, reference):
    """Share of positions with the same token; a missing one differs."""
    longest = max(len(row), len(reference))
    return sum(a == b for a, b in zip(row, reference, strict=False)) / longest if longest else 1.0


def distinct_2(rows):
    """Distinct pairs of neighbouring tokens / all of them, over all continuations; None if there is no pair."""
    pairs = [pair for row in rows for pair in zip(row, row[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else None


def measure(model, tokenizer, prompts, modes, args, frozen, device):
    """{mode: decode.Settings} -> {mode: the figures of COMMANDS 4.6}."""
    from decode import generate

    def decode(mode, prompt):
        started = time.perf_counter()
        result = generate(model, [tokenizer.bos_id, *tokenizer.encode(prompt)], settings[mode], [args.seed])
        return result, time.perf_counter() - started               # generate ends with a copy to the CPU: nothing is pending

    settings = modes if "full" in modes else modes | {"full": dataclasses.replace(next(iter(modes.values())), mode="full")}
    reference = [decode("full", prompt)[0].rows[0] for prompt in prompts]
    longest = max(prompts, key=lambda prompt: len(tokenizer.encode(prompt)))
    memory = {mode: peak_rss(lambda mode=mode: decode(mode, longest), device) for mode in modes}
    kept, seconds, tokens = {}, {mode: [] for mode in modes}, dict.fromkeys(modes, 0)
    for index, prompt in enumerate(prompts):
        for number in range(-args.warmup_runs, args.runs_per_prompt):
            for mode in modes:
                result, took = decode(mode, prompt)
                before = kept.setdefault((mode, index), result)
                if before.rows != result.rows or before.forwards != result.forwards:
                    print(f"warning: {mode} gave another text with the same seed", file=sys.stderr)
                if number >= 0:
                    seconds[mode].append(took)
                    tokens[mode] += len(result.rows[0])
    figures = {}
    for mode, times in seconds.items():
        results = [kept[mode, index] for index in range(len(prompts))]
        rows, ordered = [r.rows[0] for r in results], sorted(times)
        count = sum(map(len, rows))
        scores = [nll(model, [tokenizer.bos_id, *tokenizer.encode(p)], row, frozen)
                  for p, row in zip(prompts, rows, strict=True)]
        forwards = statistics.mean(r.forwards for r in results)
        figures[mode] = {
            "runs": len(times), "warmup_runs": args.warmup_runs * len(prompts),
            "mean_latency_s": statistics.mean(times), "p50_latency_s": statistics.median(times),
            "p90_latency_s": ordered[math.ceil(0.9 * len(ordered)) - 1],
            "mean_tok_s": tokens[mode] / sum(times), "mean_generated_tokens": count / len(rows),
            "mean_forwards": forwards, "mean_layer_passes": forwards * model.cfg.n_layers,
            "mean_context_passes": statistics.mean(r.context_passes for r in results),
            "cache_bytes": max(r.cache_bytes for r in results), "peak_rss_mb": memory[mode],
            "nll_per_token": sum(scores) / count if count else None, "distinct_2": distinct_2(rows),
            "agree_with_full": statistics.mean(map(agreement, rows, reference)),
            "texts": [tokenizer.decode(row) for row in rows]}
    return figures


def card(mode, r):
    if "skipped" in r:
        return f"{mode:12} skipped: {r['skipped']}"
    nats, pairs = (f"{r[key]:.3f}" if r[key] is not None else "-" for key in ("nll_per_token", "distinct_2"))
    return (f"{mode:12} {r['mean_tok_s']:8.1f} tok/s | p50 {r['p50_latency_s']:.3f} s | p90 {r['p90_latency_s']:.3f} s | "
            f"{r['mean_generated_tokens']:.1f} tokens | {r['mean_forwards']:.1f} forwards | {r['peak_rss_mb']:.0f} MB | "
            f"nll {nats} | distinct_2 {pairs} | as full {r['agree_with_full']:.0%}")


def main(argv=None):
    args, origins = config.parse(config.BenchArgs, argv, "edge_benchmark")
    config.announce(args, origins)
    import torch

    import checkpoint
    import fast
    import runtime
    import sample
    allocator = runtime.start(args.threads)
    device = runtime.pick_device(args.device)
    prompts = sample.read_prompts(args) if args.prompt or args.prompts_file else list(config.BENCH_PROMPTS)
    model, tokenizer, saved = checkpoint.load_model(args.ckpt, device, args.model, args.tokenizer)
    precision, why = fast.pick(args.precision, device)
    weights = fast.prepare(model, precision)
    why_not = sample.cannot_freeze(saved)
    usable = [mode for mode in dict.fromkeys(args.modes) if mode != "block_frozen" or not why_not]
    first = sample.decode_settings(args, saved, "full", tokenizer.eos_id)
    modes = {mode: dataclasses.replace(first, mode=mode) for mode in usable}
    with torch.no_grad():
        figures = measure(model, tokenizer, prompts, modes, args, not why_not, device) if modes else {}
    results = {mode: figures.get(mode, {"skipped": why_not}) for mode in dict.fromkeys(args.modes)}
    document = {
        "version": 1, "model": saved.config["model"]["model"], "ckpt": str(saved.path), "step": saved.step,
        **runtime.environment(device), "allocator": allocator, "precision": precision, "weights_bytes": weights,
        "batch": 1, "seed": args.seed, "prompts": prompts,
        "params": config.count_params(model.cfg), "args": config.to_dict(args), "results": results}
    for mode, r in results.items():
        print(card(mode, r))
    runtime.write_json(args.out_json, document)
    print(json.dumps(document, ensure_ascii=False, allow_nan=False))


if __name__ == "__main__":
    config.run(main)
