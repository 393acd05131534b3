"""Text from a checkpoint: continue a prompt in one piece, in blocks, or in blocks over an exact
frozen context.

    python -m sample                                                    # the newest run, and what
        suits its checkpoint
    python -m sample --ckpt checkpoints/eco_hybrid_hi --prompt "mai kal bazaar gaya tha"
    python -m sample --ckpt checkpoints/eco_hybrid_hi --prompt "namaste" --blockwise
    --frozen_context --benchmark_runs 5

A checkpoint needs nothing but itself: shape, tokenizer and defaults come out of its folder.
Whatever is not typed is chosen for it by `suited`. Text goes to stdout, statistics to stderr: new
tokens before EOS, forwards, seconds with the prompt's encoding included.
"""
import dataclasses
import statistics
import time
from pathlib import Path

import cli
import config
import model_config
from common.console import UserError, printable, say
from common.files import can_write, json_text, write_json
from sampling.settings import GAP, masked_sampler, read_prompts, settings, suited, told, too_few

NEWEST = "checkpoints/latest"  # the resolver takes the run there that saved last


def with_gaps(text, tokenizer):
    """--text -> (fixed strings, number of tokens of the gap behind each but the last)."""
    fixed = GAP.split(text)
    sizes = [1 if gap[0] == "[MASK]" else len(gap[0]) // 2 for gap in GAP.finditer(text)]
    if not sizes:
        raise UserError(
            f"--text {text}: there is no gap to fill; write ____ or [MASK] where text is missing"
        )
    return fixed, sizes


def fill_text(args, model, tokenizer, s, watch):
    """Infill --text once per seed -> records."""
    from sampling.decode import infill
    fixed, sizes = with_gaps(args.text, tokenizer)
    ids, gaps = [tokenizer.bos_id], []
    for part, size in zip(fixed, [*sizes, 0], strict=True):
        # a piece carries the space before it, so the space before a gap is the gap's first piece's,
        # not a token of its own
        ids += tokenizer.encode(part[:-1] if size and part.endswith(" ") else part)
        gaps.append(slice(len(ids), len(ids) + size))
        ids += [tokenizer.vocab_size] * size
    s = dataclasses.replace(
        s, mode="full", eos_id=None, steps=args.steps or sum(sizes), guidance_scale=1.0
    )
    for line in too_few(s, sum(sizes)):
        say(line)
    for seed in range(args.seed, args.seed + args.num_samples):
        result = infill(model, ids, s, [seed], watch)
        answers = [tokenizer.written(result.rows[0][gap]) for gap in gaps]
        text = "".join(
            part + (a.removeprefix(" ") if part.endswith(" ") else a)
            for part, a in zip(fixed, answers, strict=True)
        )
        yield record(args, args.text, text, seed, result, 0, sum(sizes), s)


def record(args, prompt, text, seed, result, row, tokens, s):
    """What --json and --out_json hold for one sample; seconds are the batch's, shared by its rows.
    """
    seconds = result.seconds / len(result.rows)
    return {
        "prompt": prompt,
        "seed": seed,
        "text": text,
        "new_tokens": len(result.full_rows[row]) if not args.text else tokens,
        "tokens_before_eos": tokens,
        "forwards": result.row_forwards[row],
        "context_passes": result.context_passes,
        "seconds": seconds,
        "tok_per_s": tokens / seconds,
        "tokens_per_forward": tokens / max(1, result.row_forwards[row]),
        "mode": s.mode,
        "cache_bytes": result.cache_bytes,
    }


def continue_prompts(args, model, tokenizer, s, prompts, watch, trained_length):
    """Every prompt with all its seeds as a batch -> records; with --stream one by one, printed
    while they grow.

    No two samples share a seed: prompts of one file that did would share their errors.
    """
    from sampling.decode import generate
    from sampling.terminal import Stream
    # its cache grows, so it gets a window
    if model.cfg.model == "backup" and s.mode == "block_frozen":
        s = dataclasses.replace(s, window=max(trained_length, s.block_size))
    number = 0
    for index, prompt in enumerate(prompts):
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        first = args.seed + index * args.num_samples
        seeds_of_prompt = list(range(first, first + args.num_samples))
        batches = [[seed] for seed in seeds_of_prompt] if args.stream else [seeds_of_prompt]
        for seeds in batches:
            times = []
            for timed in [False] * args.warmup_runs + [True] * args.benchmark_runs:
                stream = Stream() if args.stream and timed and not times else None

                def grow(canvas, lo, hi, stream=stream, prompt=prompt, ids=ids):
                    new = canvas.ids[0, len(ids):hi].tolist()
                    new = new[:new.index(s.eos_id)] if s.eos_id in new else new
                    stream.grow(prompt + tokenizer.written(new))
                if stream and number:
                    print("---")
                started = time.perf_counter()
                result = generate(model, ids, s, seeds, watch, grow if stream else None)
                if timed:
                    times.append(time.perf_counter() - started)
                if stream:
                    stream.grow(prompt + tokenizer.written(result.rows[0]), final=True)
            for i, seed in enumerate(seeds):
                number += 1
                yield record(
                    args,
                    prompt,
                    prompt + tokenizer.written(result.rows[i]),
                    seed,
                    result,
                    i,
                    len(result.rows[i]),
                    s,
                )
            if args.benchmark_runs > 1:
                tokens, mean = sum(map(len, result.rows)), statistics.mean(times)
                say(
                    f"[bench] runs={args.benchmark_runs} warmup={args.warmup_runs} "
                    f"mean={mean:.3f}s "
                    f"p50={statistics.median(times):.3f}s tok/s={tokens / mean:.1f} "
                    f"tokens={tokens} forwards={result.forwards}"
                )


def newest():
    """The name of the newest run's checkpoint, where none was typed."""
    import checkpoint
    if not any(checkpoint.is_run(child) for child in Path(NEWEST).parent.glob("*")):
        raise UserError(
            "--ckpt is missing, and there is no run under checkpoints/: name a checkpoint or a "
            "run folder, or make one with python -m train --preset starter"
        )
    return NEWEST


def main(argv=None, pinned=None):
    args, origins = cli.parse(config.SampleArgs, argv, "sample", pinned=pinned)
    cli.announce(args, origins)
    import checkpoint
    from common import machine
    from sampling import fast
    from sampling.terminal import Watch
    machine.start(args.threads)
    can_write(args, "out_json")
    device = machine.pick_device(args.device)
    prompts = read_prompts(args)
    args.ckpt = args.ckpt or newest()
    args.sampler = masked_sampler(args.sampler)
    model, tokenizer, saved = checkpoint.load_model(
        args.ckpt, device, config.check_saved, args.model, args.tokenizer
    )
    precision, why = fast.pick(args.precision, device)
    fast.prepare(model, precision)
    say(
        f"model: {model.cfg.model}, {model_config.count_params(model.cfg):,} parameters; products "
        f"in {precision} ({why})"
    )
    longest = max(len(tokenizer.encode(prompt)) for prompt in prompts) + 1
    args = suited(args, origins, saved, longest)
    s = settings(args, origins, saved, tokenizer)
    trained_length = saved.config["args"]["seq_len"]
    if not args.text:
        say(told(s, model.cfg.causal))
        longest += s.max_new_tokens
        endless = s.mode == "block_frozen"
        if endless and model.cfg.model == "backup" and longest > trained_length:
            say(
                f"notice: {longest} positions, trained on {trained_length}: the cache slides, the "
                "oldest text leaves it"
            )
        elif longest > trained_length and not endless:
            say(
                f"warning: prompt and new tokens are {longest} positions, the model was trained on "
                f"{trained_length}: "
                "--blockwise --frozen_context goes on without a limit"
            )
    watch = Watch(tokenizer) if args.show_steps else None
    records = []
    if args.text:
        made = fill_text(args, model, tokenizer, s, watch)
    else:
        made = continue_prompts(args, model, tokenizer, s, prompts, watch, trained_length)
    for r in made:
        if args.json:
            print(json_text(r), flush=True)
        elif not args.stream or args.text:
            print(("---\n" if records else "") + printable(r["text"]), flush=True)
        records.append(r)
        say(
            "[stats] new={new_tokens} before_eos={tokens_before_eos} forwards={forwards} "
            "context={context_passes} "
            "seconds={seconds:.3f} tok/s={tok_per_s:.1f} seed={seed} mode={mode}".format(**r)
        )
    if args.out_json:
        write_json(args.out_json, {"checkpoint": str(saved.path), "samples": records})


if __name__ == "__main__":
    cli.run(main)
