"""Text from a checkpoint: continue a prompt in one piece, in blocks, or in blocks over an exact frozen context.

    python -m sample                                                    # the newest run, and what suits its checkpoint
    python -m sample --ckpt checkpoints/eco_hybrid_hi --prompt "mai kal bazaar gaya tha"
    python -m sample --ckpt checkpoints/eco_hybrid_hi --prompt "namaste" --blockwise --frozen_context --benchmark_runs 5

A checkpoint needs nothing but itself: shape, tokenizer and defaults come out of its folder. Whatever is not typed is chosen
for it by `suited`. Text goes to stdout, statistics to stderr: new tokens before EOS, forwards, seconds with the prompt's
encoding included.
"""
import dataclasses
import re
import statistics
import time
from pathlib import Path

import cli
import config
import model_config
from common.console import UserError, printable, say
from common.files import can_write, json_text, write_json

NEWEST = "checkpoints/latest"                      # the resolver takes the run there that saved last
# tokens that a forward may reveal while their words still fit (docs/experiments/decoding.md)
AT_ONCE = dict(confidence=1.5, margin=1, random=1, ancestral=1)
SCHEDULERS = dict(ddim="confidence", ddpm="ancestral")
UNREAD = ("steps", "sampler", "threshold", "alg_temp", "remask", "remask_rule", "reveal", "temperature_end", "guidance_scale",
          "block_size", "min_decode_layers")       # of an autoregressive checkpoint


def suited(args, origins, saved, longest):
    """The arguments with a value for everything that was not typed; longest: tokens of the longest prompt.

    --steps alone is a command of the older guides and keeps its meaning: the text in one piece, by
    confidence. Else the rule and temperature of the best judged text, in blocks over the exact
    cache if the checkpoint was trained for it.
    """
    def said(*names):
        return any(origins[name] != "default" for name in names)

    found = {}
    if args.max_new_tokens is None:
        trained = saved.config["args"]["seq_len"]
        found["max_new_tokens"] = min(config.LONGEST, max(trained - longest, trained // 2))
    rest = dict(config.OLDER if said("steps") else config.NEWER)
    if said("threshold"):
        rest["sampler"] = "threshold"
    elif said("reveal", "remask", "alg_temp") or args.text is not None:
        # the flags need a schedule; a gap is small, so it gets a forward for each token
        rest["sampler"] = "confidence"
    found |= {name: value for name, value in rest.items() if getattr(args, name) is None}
    if args.blockwise is None:
        found["blockwise"] = not said("steps") and args.text is None and not cannot_freeze(saved)
        if args.frozen_context is None:
            found["frozen_context"] = found["blockwise"]
    return dataclasses.replace(args, **found)


def settings(args, origins, saved, tokenizer):
    """`suited` arguments -> decode.Settings, with a notice for what cannot be had."""
    mode = "full"
    if saved.config["model"].get("causal"):
        unread = [name for name in ("blockwise", "frozen_context", *UNREAD) if origins[name] == "flag"]
        if unread:
            say(f"notice: {saved.path} was trained with --objective ar: it writes one token at a time over an exact cache, "
                "without " + ", ".join(f"--{name}" for name in unread))
        mode = "block_frozen"
    elif args.text is not None:
        mode = "full"                                # a gap needs what stands on both sides
    elif args.blockwise:
        mode = "block_frozen" if args.frozen_context else "block"
        if args.frozen_context and (why := cannot_freeze(saved)):
            say(f"warning: {why}: --blockwise alone is used")
            mode = "block"
    elif args.frozen_context:
        say("notice: --frozen_context needs --blockwise; the whole text is decoded in one piece")
    largest = max(trained_blocks(saved))
    if mode == "full" and largest < saved.config["args"]["seq_len"]:
        say(f"notice: {saved.path} never saw a whole text, only blocks of {largest} tokens and their past: what is written in "
            "one piece will be poor; --blockwise --frozen_context is what it learned")
    s = decode_settings(args, saved, mode, None if args.ignore_eos else tokenizer.eos_id)
    if not saved.config["model"].get("causal"):
        for line in (*idle(args, origins, s), *(degenerate(s, saved) if args.text is None else ())):
            say(line)
    return s


def told(s, causal):
    """One line that says how the text is made."""
    from sampling.unmasking import ADAPTIVE
    where = {"full": "in one piece",
             "block": f"in blocks of {s.block_size}, with all before them computed again",
             "block_frozen": f"in blocks of {s.block_size} over the exact cache"}[s.mode]
    rule = f"{s.sampler}, {s.steps} forwards at most"
    if s.sampler in ADAPTIVE:
        rule = f"{s.sampler} {s.threshold:g}"
    if causal:
        where, rule = "one token at a time", "left to right"
    top_k = f", top_k {s.top_k}" if s.top_k else ""
    return (f"text: up to {s.max_new_tokens} tokens {where}; {rule}, "
            f"temperature {s.temperature:g}{top_k}")


def idle(args, origins, s):
    """A notice for every typed flag that changes nothing under these settings."""
    from sampling.unmasking import ADAPTIVE
    greedy = s.temperature == 0 and not s.temperature_end
    rules = [
        (("block_size",), s.mode == "full", "the text is decoded in one piece, not --blockwise"),
        (("threshold",), s.sampler not in ADAPTIVE, f"--sampler {s.sampler} has no bound"),
        (("alg_temp",), s.sampler not in ("confidence", "margin"),
         f"--sampler {s.sampler} does not rank by chance"),
        (("reveal",), s.sampler in ADAPTIVE, f"--sampler {s.sampler} has no schedule"),
        (("remask_rule",), not s.remask, "--remask is 0"),
        (("top_k", "top_p"), greedy, "temperature 0 takes the likeliest token")]
    if getattr(args, "text", None) is not None:
        names = ("block_size", "blockwise", "frozen_context", "max_new_tokens", "ignore_eos", "stream",
                 "benchmark_runs", "warmup_runs", "guidance_scale")
        rules[0] = (names, True, "--text fills gaps, with all of the text around them, in one piece")
    off = dict(block_size=0, top_k=0, top_p=1.0, guidance_scale=1.0, alg_temp=0.0)
    for names, holds, why in rules:
        typed = []
        for name in names if holds else ():
            value = getattr(args, name)
            if origins.get(name) == "flag" and value not in (False, None, off.get(name)):
                typed.append(f"--{name}")
        if typed:
            yield f"notice: without effect: {', '.join(typed)} ({why})"


def degenerate(s, saved):
    """A warning for settings that make poor text of any model, or of this one."""
    trained = parts_of_a_text(saved)
    if s.mode == "block_frozen" and s.block_size not in trained:
        sizes = ", ".join(map(str, trained))
        yield (f"warning: this checkpoint was not trained in blocks of {s.block_size} (but of {sizes}), "
               "so the text will be poor: leave --block_size out")
    tokens = s.max_new_tokens
    if s.mode != "full":
        tokens = min(s.block_size, tokens)
    yield from too_few(s, tokens)


def too_few(s, tokens):
    """A warning if so many tokens are revealed in too few forwards."""
    from sampling.unmasking import ADAPTIVE
    at_once = tokens / s.steps
    if s.sampler in ADAPTIVE:
        if at_once > AT_ONCE["confidence"]:
            yield (f"warning: {s.steps} forwards for {tokens} tokens: the last one reveals all that is "
                   "left, sure or not, so the text will be poor: leave --steps out")
    elif at_once > AT_ONCE[s.sampler]:
        advice = "leave --steps and --sampler out"
        if s.sampler in ("confidence", "margin"):           # the others are poor at one token a forward, too
            advice += f", or --steps {tokens}"
        yield (f"warning: {s.steps} forwards for {tokens} tokens are {at_once:.1f} at once, and --sampler "
               f"{s.sampler} bears {AT_ONCE[s.sampler]:g}, so words will not fit together: {advice}")


def decode_settings(args, saved, mode, eos_id):
    """Also for edge_benchmark and evaluate, whose command lines have modes instead of switches."""
    from sampling.decode import Settings
    from sampling.unmasking import ADAPTIVE
    depth, layers = args.min_decode_layers, saved.config["model"]["n_layers"]
    if depth > layers:
        say(f"notice: --min_decode_layers {depth}: this model has {layers} layers, all are used")
    if depth and not saved.config["model"]["exits"]:
        say("notice: --min_decode_layers needs exits that were trained (train --exit_loss_weight 0.1); this checkpoint has none, "
            "all layers are used")
        depth = 0
    if depth and args.sampler in ADAPTIVE:
        say(f"notice: --sampler {args.sampler} cannot know its last forward, which has to be a full one: all layers are used")
        depth = 0
    if args.remask and args.sampler in ADAPTIVE:
        raise UserError(f"--remask {args.remask:g} needs a schedule, --sampler {args.sampler} has none: use confidence, margin, "
                        "random or ancestral")
    block = args.block_size or usual_block(saved)
    longest = args.max_new_tokens if mode == "full" else block       # an adaptive rule stops by itself
    steps = args.steps or (longest if args.sampler in ADAPTIVE else saved.config["args"]["sample_steps"])
    names = ("max_new_tokens", "sampler", "reveal", "threshold", "alg_temp", "remask", "remask_rule", "temperature",
             "temperature_end", "top_k", "top_p", "repetition_penalty", "guidance_scale")
    return Settings(steps=steps, min_depth=depth if depth < layers else 0, mode=mode, block_size=block, eos_id=eos_id,
                    **{name: getattr(args, name) for name in names})


def usual_block(saved):
    """The largest block that was trained, up to the size that the checkpoint stores for decoding."""
    stored, trained = saved.config["model"]["block_size"], parts_of_a_text(saved)
    if not trained:                                                # no block was trained, so any will do
        return min(stored, max(trained_blocks(saved)))
    return max((size for size in trained if size <= stored), default=min(trained))


def parts_of_a_text(saved):
    """The trained blocks that may follow other text; a whole sequence never does."""
    return sorted({size for size in trained_blocks(saved) if size < saved.config["args"]["seq_len"]}, reverse=True)


def trained_blocks(saved):
    trained = saved.config["args"]
    return config.block_sizes(trained["train_block_sizes"], trained["seq_len"])


def cannot_freeze(saved):
    """Why this checkpoint's context cannot be frozen; empty if it can."""
    trained = saved.config["args"]
    if min(trained_blocks(saved)) < trained["seq_len"] or saved.config["model"].get("causal"):
        return ""
    return (f"{saved.path} was not trained in blocks (--train_block_sizes {trained['train_block_sizes']}), "
            "so its context cannot be frozen")


def read_prompts(args):
    prompts = list(args.prompt)
    if args.prompts_file:
        try:
            found = [line for line in Path(args.prompts_file).read_text(encoding="utf-8").split("\n") if line.strip()]
        except OSError as error:
            raise UserError(f"--prompts_file {args.prompts_file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts_file {args.prompts_file} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
        if not found:
            raise UserError(f"--prompts_file {args.prompts_file} holds no prompt: write one on each line, or leave the flag out")
        prompts += found
    return prompts or [""]


GAP = re.compile(r"\[MASK\]|__+")


def with_gaps(text, tokenizer):
    """--text -> (fixed strings, number of tokens of the gap behind each but the last)."""
    fixed = GAP.split(text)
    sizes = [1 if gap[0] == "[MASK]" else len(gap[0]) // 2 for gap in GAP.finditer(text)]
    if not sizes:
        raise UserError(f"--text {text}: there is no gap to fill; write ____ or [MASK] where text is missing")
    return fixed, sizes


def fill_text(args, model, tokenizer, s, watch):
    """Infill --text once per seed -> records."""
    from sampling.decode import infill
    fixed, sizes = with_gaps(args.text, tokenizer)
    ids, gaps = [tokenizer.bos_id], []
    for part, size in zip(fixed, [*sizes, 0], strict=True):
        # a piece carries the space before it, so the space before a gap is the gap's first piece's, not a token of its own
        ids += tokenizer.encode(part[:-1] if size and part.endswith(" ") else part)
        gaps.append(slice(len(ids), len(ids) + size))
        ids += [tokenizer.vocab_size] * size
    s = dataclasses.replace(s, mode="full", eos_id=None, steps=args.steps or sum(sizes), guidance_scale=1.0)
    for line in too_few(s, sum(sizes)):
        say(line)
    for seed in range(args.seed, args.seed + args.num_samples):
        result = infill(model, ids, s, [seed], watch)
        answers = [tokenizer.written(result.rows[0][gap]) for gap in gaps]
        text = "".join(part + (a.removeprefix(" ") if part.endswith(" ") else a) for part, a in zip(fixed, answers, strict=True))
        yield record(args, args.text, text, seed, result, 0, sum(sizes), s)


def record(args, prompt, text, seed, result, row, tokens, s):
    """What --json and --out_json hold for one sample; seconds are the batch's, shared by its rows."""
    seconds = result.seconds / len(result.rows)
    return {"prompt": prompt, "seed": seed, "text": text, "new_tokens": len(result.full_rows[row]) if not args.text else tokens,
            "tokens_before_eos": tokens, "forwards": result.row_forwards[row], "context_passes": result.context_passes,
            "seconds": seconds, "tok_per_s": tokens / seconds, "tokens_per_forward": tokens / max(1, result.row_forwards[row]),
            "mode": s.mode, "cache_bytes": result.cache_bytes}


def continue_prompts(args, model, tokenizer, s, prompts, watch, trained_length):
    """Every prompt with all its seeds as a batch -> records; with --stream one by one, printed while they grow.

    No two samples share a seed: prompts of one file that did would share their errors.
    """
    from sampling.decode import generate
    from sampling.terminal import Stream
    if model.cfg.model == "backup" and s.mode == "block_frozen":               # its cache grows, so it gets a window
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
                yield record(args, prompt, prompt + tokenizer.written(result.rows[i]), seed, result, i, len(result.rows[i]), s)
            if args.benchmark_runs > 1:
                tokens, mean = sum(map(len, result.rows)), statistics.mean(times)
                say(f"[bench] runs={args.benchmark_runs} warmup={args.warmup_runs} mean={mean:.3f}s "
                    f"p50={statistics.median(times):.3f}s tok/s={tokens / mean:.1f} tokens={tokens} forwards={result.forwards}")


def newest():
    """The name of the newest run's checkpoint, where none was typed."""
    import checkpoint
    if not any(checkpoint.is_run(child) for child in Path(NEWEST).parent.glob("*")):
        raise UserError("--ckpt is missing, and there is no run under checkpoints/: name a checkpoint or a "
                        "run folder, or make one with python -m train --preset starter")
    return NEWEST


def masked_sampler(name):
    """A sampler's name, which may be one of a Gaussian model (--scheduler ddim) -> the one that is meant."""
    if name not in SCHEDULERS:
        return name
    say(f"notice: --scheduler {name}: this is a masked model, so --sampler {SCHEDULERS[name]} is used")
    return SCHEDULERS[name]


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
    model, tokenizer, saved = checkpoint.load_model(args.ckpt, device, args.model, args.tokenizer)
    precision, why = fast.pick(args.precision, device)
    fast.prepare(model, precision)
    say(f"model: {model.cfg.model}, {model_config.count_params(model.cfg):,} parameters; products in {precision} ({why})")
    longest = max(len(tokenizer.encode(prompt)) for prompt in prompts) + 1
    args = suited(args, origins, saved, longest)
    s = settings(args, origins, saved, tokenizer)
    trained_length = saved.config["args"]["seq_len"]
    if not args.text:
        say(told(s, model.cfg.causal))
        longest += s.max_new_tokens
        endless = s.mode == "block_frozen"
        if endless and model.cfg.model == "backup" and longest > trained_length:
            say(f"notice: {longest} positions, trained on {trained_length}: the cache slides, the oldest text leaves it")
        elif longest > trained_length and not endless:
            say(f"warning: prompt and new tokens are {longest} positions, the model was trained on {trained_length}: "
                "--blockwise --frozen_context goes on without a limit")
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
        say("[stats] new={new_tokens} before_eos={tokens_before_eos} forwards={forwards} context={context_passes} "
            "seconds={seconds:.3f} tok/s={tok_per_s:.1f} seed={seed} mode={mode}".format(**r))
    if args.out_json:
        write_json(args.out_json, {"checkpoint": str(saved.path), "samples": records})


if __name__ == "__main__":
    cli.run(main)
