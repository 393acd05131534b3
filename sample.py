"""Text from a checkpoint: continue a prompt in one piece, in blocks, or in blocks over an exact frozen context.

    python -m sample --ckpt checkpoints/eco_hybrid_hi --prompt "mai kal bazaar gaya tha"
    python -m sample --ckpt checkpoints/eco_hybrid_hi --prompt "namaste" --blockwise --frozen_context --benchmark_runs 5

A checkpoint needs nothing but itself: shape, tokenizer and defaults come out of its folder. Text goes to stdout, statistics
to stderr: new tokens before EOS, forwards, seconds with the prompt's encoding included.
"""
import statistics
import sys
import time
from pathlib import Path

import config
import knobs
from knobs import UserError


def settings(args, saved, tokenizer):
    """Command line + the checkpoint's stored defaults -> decode.Settings, with a notice for what cannot be had."""
    mode = "full"
    if args.blockwise:
        mode = "block_frozen" if args.frozen_context else "block"
        if args.frozen_context and (why := cannot_freeze(saved)):
            say(f"warning: {why}: --blockwise alone is used")
            mode = "block"
    elif args.frozen_context:
        say("notice: --frozen_context needs --blockwise; the whole text is decoded in one piece")
    return decode_settings(args, saved, mode, None if args.ignore_eos else tokenizer.eos_id)


def decode_settings(args, saved, mode, eos_id):
    """Also for edge_benchmark, whose command line has modes instead of switches."""
    from decode import Settings
    if args.min_decode_layers:
        say("notice: --min_decode_layers needs exits that were trained; this checkpoint has none, all layers are used")
    return Settings(max_new_tokens=args.max_new_tokens, steps=args.steps or saved.config["args"]["sample_steps"], mode=mode,
                    block_size=args.block_size or saved.config["model"]["block_size"], sampler=args.sampler,
                    reveal=args.reveal, temperature=args.temperature, temperature_end=args.temperature_end,
                    top_k=args.top_k, top_p=args.top_p, eos_id=eos_id)


def cannot_freeze(saved):
    """Why this checkpoint's context cannot be frozen; empty if it can."""
    trained = saved.config["args"]
    if any(b < trained["seq_len"] for b in block_choices(trained)):
        return ""
    return (f"{saved.path} was not trained in blocks (--train_block_sizes {trained['train_block_sizes']}), "
            "so its context cannot be frozen")


def block_choices(trained):
    return [trained["seq_len"] if b == "T" else int(b) for b in knobs.split_list(trained["train_block_sizes"])]


def say(text):
    print(text, file=sys.stderr, flush=True)


def read_prompts(args):
    prompts = list(args.prompt)
    if args.prompts_file:
        try:
            prompts += [line for line in Path(args.prompts_file).read_text(encoding="utf-8").split("\n") if line.strip()]
        except OSError as error:
            raise UserError(f"--prompts_file {args.prompts_file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts_file {args.prompts_file} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    return prompts or [""]


def main(argv=None, pinned=None):
    args, origins = config.parse(config.SampleArgs, argv, "sample", pinned=pinned)
    config.announce(args, origins)
    import checkpoint
    import runtime
    from decode import generate
    runtime.start(args.threads)
    device = runtime.pick_device(args.device)
    prompts = read_prompts(args)
    model, tokenizer, saved = checkpoint.load_model(args.ckpt, device, args.model, args.tokenizer)
    s = settings(args, saved, tokenizer)
    longest = max(len(tokenizer.encode(p)) for p in prompts) + 1 + args.max_new_tokens
    endless = s.mode == "block_frozen" and model.cfg.model == "primary"       # its cache has no window
    if longest > saved.config["args"]["seq_len"] and not endless:
        say(f"warning: prompt and new tokens are {longest} positions, the model was trained on {saved.config['args']['seq_len']}")

    texts, records = [], []
    for prompt in prompts:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        seeds = [args.seed + i for i in range(args.num_samples)]
        times = []
        for timed in [False] * args.warmup_runs + [True] * args.benchmark_runs:
            started = time.perf_counter()
            result = generate(model, ids, s, seeds)
            if timed:
                times.append(time.perf_counter() - started)
        for seed, row, full in zip(seeds, result.rows, result.full_rows, strict=True):
            text = prompt + tokenizer.decode(row)
            print(("---\n" if texts else "") + text, flush=True)
            texts.append(text)
            seconds = result.seconds / len(seeds)
            stats = {"prompt": prompt, "seed": seed, "text": text, "new_tokens": len(full), "tokens_before_eos": len(row),
                     "forwards": result.forwards, "context_passes": result.context_passes, "seconds": seconds,
                     "tok_per_s": len(row) / seconds, "mode": s.mode, "cache_bytes": result.cache_bytes}
            records.append(stats)
            say(f"[stats] new={len(full)} before_eos={len(row)} forwards={result.forwards} context={result.context_passes} "
                f"seconds={seconds:.3f} tok/s={stats['tok_per_s']:.1f} seed={seed} mode={s.mode}")
        if args.benchmark_runs > 1:
            tokens = sum(map(len, result.rows))
            mean = statistics.mean(times)
            say(f"[bench] runs={args.benchmark_runs} warmup={args.warmup_runs} mean={mean:.3f}s "
                f"p50={statistics.median(times):.3f}s tok/s={tokens / mean:.1f} tokens={tokens} forwards={result.forwards}")
    if args.out_json:
        runtime.write_json(args.out_json, {"checkpoint": str(saved.path), "samples": records})


if __name__ == "__main__":
    config.run(main)
