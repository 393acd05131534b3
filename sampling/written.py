"""What sample.py writes: prompts continued, gaps filled, and a record of each text.

Used by sample.py, which turns the records into lines, and by serving/, for its gaps. A record is
what --json and --out_json hold for one text; it comes as soon as its text is finished.
"""
import dataclasses
import statistics
import time

from common.console import UserError, say
from sampling import decode
from sampling.settings import GAP, opening, too_few
from sampling.terminal import Stream


def record(args, settings, prompt, text, seed, result, row, tokens):
    """What --json and --out_json hold for one text; seconds are the batch's, shared by its rows."""
    seconds = result.seconds / len(result.rows)
    forwards = result.row_forwards[row]
    return {
        "prompt": prompt,
        "seed": seed,
        "text": text,
        "new_tokens": tokens if args.text else len(result.full_rows[row]),
        "tokens_before_eos": tokens,
        "forwards": forwards,
        "context_passes": result.context_passes,
        "seconds": seconds,
        "tok_per_s": tokens / seconds,
        "tokens_per_forward": tokens / max(1, forwards),
        "mode": settings.mode,
        "cache_bytes": result.cache_bytes,
    }


# ---- gaps ----------------------------------------------------------------------------------------

def with_gaps(text, tokenizer):
    """--text -> (fixed strings, number of tokens of the gap behind each but the last)."""
    fixed = GAP.split(text)
    sizes = []
    for gap in GAP.findall(text):
        sizes.append(1 if gap == "[MASK]" else len(gap) // 2)
    if not sizes:
        raise UserError(
            f"--text {text}: there is no gap to fill; write ____ or [MASK] where text is missing"
        )
    return fixed, sizes


class GappedText:
    """A text with ____ or [MASK] in it: its ids, with masks in its gaps, and the text again when
    they are filled.
    """

    def __init__(self, text, tokenizer):
        self.tokenizer = tokenizer
        self.fixed, sizes = with_gaps(text, tokenizer)
        self.masked = sum(sizes)                        # tokens
        self.ids = [tokenizer.bos_id]
        self.gaps = []                                  # where each is in the ids
        for part, size in zip(self.fixed, [*sizes, 0], strict=True):
            # a piece carries the space before it, so the space before a gap is the gap's first
            # piece's, not a token of its own
            if size and part.endswith(" "):
                part = part[:-1]
            self.ids += tokenizer.encode(part)
            self.gaps.append(slice(len(self.ids), len(self.ids) + size))
            self.ids += [tokenizer.vocab_size] * size

    def answers(self, ids):
        """The text of each gap in ids that a model filled; the last one has no gap and is empty."""
        found = []
        for part, gap in zip(self.fixed, self.gaps, strict=True):
            answer = self.tokenizer.written(ids[gap])
            if part.endswith(" "):
                answer = answer.removeprefix(" ")
            found.append(answer)
        return found

    def filled(self, ids):
        """The whole text."""
        pairs = zip(self.fixed, self.answers(ids), strict=True)
        return "".join(part + answer for part, answer in pairs)


def settings_of_gaps(settings, steps, masked):
    """Settings for the gaps of a text, `masked` tokens in all; steps: 0 for a forward a token."""
    return dataclasses.replace(
        settings, mode="full", eos_id=None, steps=steps or masked, guidance_scale=1.0
    )


def fill_text(args, model, tokenizer, settings, watch):
    """Infill --text once per seed -> records."""
    text = GappedText(args.text, tokenizer)
    settings = settings_of_gaps(settings, args.steps, text.masked)
    for line in too_few(settings, text.masked):
        say(line)
    for seed in range(args.seed, args.seed + args.num_samples):
        result = decode.infill(model, text.ids, settings, [seed], watch)
        whole = text.filled(result.rows[0])
        yield record(args, settings, args.text, whole, seed, result, 0, text.masked)


# ---- prompts -------------------------------------------------------------------------------------

def with_window(settings, model, trained_length):
    """The transformer's cache grows, so it gets a window."""
    if model.cfg.model != "backup" or settings.mode != "block_frozen":
        return settings
    window = max(trained_length, settings.block_size)
    return dataclasses.replace(settings, window=window)


def continue_prompts(args, model, tokenizer, settings, prompts, watch, trained_length):
    """Every prompt with all its seeds as a batch -> records; with --stream one by one, printed
    while they grow.

    No two samples share a seed: prompts of one file that did would share their errors.
    """
    settings = with_window(settings, model, trained_length)
    written = 0
    for number, prompt in enumerate(prompts):
        first = args.seed + number * args.num_samples
        seeds = list(range(first, first + args.num_samples))
        batches = [[seed] for seed in seeds] if args.stream else [seeds]
        for batch in batches:
            result, times = timed_runs(
                args, model, tokenizer, settings, prompt, batch, watch, divided=written > 0
            )
            for row, seed in enumerate(batch):
                ids = result.rows[row]
                text = before_answer(model, prompt) + tokenizer.written(ids)
                yield record(args, settings, prompt, text, seed, result, row, len(ids))
            written += len(batch)
            if args.benchmark_runs > 1:
                say_speed(args, result, times)


def timed_runs(args, model, tokenizer, settings, prompt, seeds, watch, divided):
    """Write one batch as often as --warmup_runs and --benchmark_runs say -> (the last Result,
    seconds of each run that counts). --stream prints the first of these, behind --- if divided.
    """
    ids = opening(tokenizer, prompt, model.cfg.framed)
    shown = before_answer(model, prompt)
    for _ in range(args.warmup_runs):
        decode.generate(model, ids, settings, seeds, watch, None)
    times = []
    for run in range(args.benchmark_runs):
        stream = None
        grow = None
        if args.stream and run == 0:
            if divided:
                print("---")
            stream = Stream()
            grow = grower(stream, tokenizer, settings, shown, len(ids))
        started = time.perf_counter()
        result = decode.generate(model, ids, settings, seeds, watch, grow)
        times.append(time.perf_counter() - started)
        if stream:
            stream.grow(shown + tokenizer.written(result.rows[0]), final=True)
    return result, times


def before_answer(model, prompt):
    """What of a text is shown in front of the new tokens: a prompt that is continued, not one that
    is answered.
    """
    return "" if model.cfg.framed else prompt


def grower(stream, tokenizer, settings, shown, prompt_length):
    """on_block of generate: the text so far, up to an EOS, goes to the stream."""
    def grow(canvas, lo, hi):
        new = canvas.ids[0, prompt_length:hi].tolist()
        if settings.eos_id in new:
            new = new[:new.index(settings.eos_id)]
        stream.grow(shown + tokenizer.written(new))
    return grow


def say_speed(args, result, times):
    tokens = sum(map(len, result.rows))
    mean = statistics.mean(times)
    say(
        f"[bench] runs={args.benchmark_runs} warmup={args.warmup_runs} mean={mean:.3f}s "
        f"p50={statistics.median(times):.3f}s tok/s={tokens / mean:.1f} tokens={tokens} "
        f"forwards={result.forwards}"
    )
