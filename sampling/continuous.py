"""What sample.py does with a checkpoint of --objective gaussian: text out of noise in one piece,
behind a prompt or in gaps.

    if is_gaussian(saved):
        records = asked(args, origins, writer, tokenizer, saved, prompts, watch)

sampling/gaussian_writer.py does the work. No torch here.
"""
from dataclasses import dataclass

import config
from common.console import UserError, say
from sampling.settings import is_framed, opening
from sampling.written import GappedText, record

SAMPLERS = ("ddim", "ddpm", "dpmpp")
# what is not typed
STEPS = 50
TEMPERATURE = 1.0

# ways of writing that need masks, a cache, or tokens that come one after the other
NEED_MASKS = (
    "blockwise", "frozen_context", "min_decode_layers", "interactive", "stream", "transliterate",
    "remask", "repetition_penalty", "cache_dtype",
)
# flags that change nothing
UNREAD = (
    "threshold", "alg_temp", "remask_rule", "reveal", "top_k", "top_p", "block_size",
    "temperature_end", "warmup_runs", "benchmark_runs", "edge_profile",
)


@dataclass
class Settings:
    """How noise becomes text."""
    max_new_tokens: int
    steps: int = STEPS
    sampler: str = SAMPLERS[0]
    eta: float = 0.0
    temperature: float = TEMPERATURE
    guidance_scale: float = 1.0
    null_prompt: tuple = ()         # ids of the other side of guidance
    eos_id: int = None              # None: never stop early
    mode: str = "full"


def is_gaussian(saved):
    """Was it trained with --objective gaussian?"""
    return saved.config["model"].get("gaussian", False)


def asked(args, origins, writer, tokenizer, saved, prompts, watch):
    """The records of what sample was asked for."""
    refuse(args, origins, saved)
    longest = max(len(opening(tokenizer, prompt, is_framed(saved))) for prompt in prompts)
    settings = settings_of(args, origins, saved, tokenizer, longest)
    return texts(args, writer, tokenizer, settings, prompts, watch)


def refuse(args, origins, saved):
    """What was typed and cannot be had, in one sentence."""
    who = f"{saved.path} was trained with --objective gaussian"
    typed = [name for name in NEED_MASKS if origins[name] == "flag" and getattr(args, name)]
    if typed:
        words = ", ".join(f"--{name}" for name in typed)
        raise UserError(f"{who} and writes all tokens at once: leave {words} out")
    if args.sampler not in (None, *SAMPLERS):
        raise UserError(
            f"{who}, and --sampler {args.sampler} reveals masks: give --sampler ddim, ddpm or dpmpp"
        )
    if args.precision not in ("auto", "fp32"):
        raise UserError(f"{who} and writes in float32: leave --precision {args.precision} out")
    if args.text is not None and is_framed(saved):
        raise UserError(
            f"{saved.path} was trained on pairs and answers prompts: it fills no gaps; give a "
            "--prompt instead of --text"
        )
    if args.text is not None and args.guidance_scale != 1:
        raise UserError("--guidance_scale follows a prompt, and --text has none: leave one out")
    unread = [f"--{name}" for name in UNREAD if origins[name] == "flag"]
    if unread:
        say(f"notice: without effect: {', '.join(unread)} ({who})")


def settings_of(args, origins, saved, tokenizer, longest):
    """Arguments of sample.py -> Settings. longest: tokens of the longest prompt."""
    sampler = args.sampler or SAMPLERS[0]
    if origins["eta"] == "flag" and sampler != "ddim":
        say(f"notice: without effect: --eta (it is ddim's, and --sampler is {sampler})")
    trained = config.trained_length(saved)
    length = args.max_new_tokens
    if length is None:
        length = min(config.LONGEST, max(trained - longest, trained // 2))
    temperature = TEMPERATURE if args.temperature is None else args.temperature
    settings = Settings(
        max_new_tokens=length,
        steps=args.steps or STEPS,
        sampler=sampler,
        eta=args.eta,
        temperature=temperature,
        guidance_scale=args.guidance_scale,
        null_prompt=tuple(opening(tokenizer, "", is_framed(saved))),
        eos_id=None if args.ignore_eos else tokenizer.eos_id,
    )
    if args.text is None:
        say(
            f"text: {length} tokens out of noise, all at once; {sampler}, {settings.steps} "
            f"forwards, temperature {temperature:g}"
        )
        if longest + length > trained:
            say(
                f"warning: prompt and new tokens are {longest + length} positions, the model was "
                f"trained on {trained}: --max_new_tokens {max(1, trained - longest)} fits"
            )
    return settings


def texts(args, writer, tokenizer, settings, prompts, watch):
    """Every prompt with all its seeds as a batch, or the gaps of --text -> records."""
    if args.text is not None:
        yield from fill_text(args, writer, tokenizer, settings, watch)
        return
    for number, prompt in enumerate(prompts):
        first = args.seed + number * args.num_samples
        seeds = list(range(first, first + args.num_samples))
        result = continued(writer, tokenizer, prompt, settings, seeds, watch)
        shown = "" if writer.cfg.framed else prompt
        for row, seed in enumerate(seeds):
            ids = result.rows[row]
            text = shown + tokenizer.written(ids)
            yield record(args, settings, prompt, text, seed, result, row, len(ids))


def continued(writer, tokenizer, prompt, settings, seeds, watch=None):
    """The Result of one prompt."""
    ids = opening(tokenizer, prompt, writer.cfg.framed)
    ids += [writer.cfg.mask_id] * settings.max_new_tokens
    return writer.write(ids, settings, seeds, watch)


def fill_text(args, writer, tokenizer, settings, watch):
    """Fill the gaps of --text, once for each seed -> records."""
    text = GappedText(args.text, tokenizer)
    settings.eos_id = None
    seeds = list(range(args.seed, args.seed + args.num_samples))
    result = writer.write(text.ids, settings, seeds, watch)
    for row, seed in enumerate(seeds):
        whole = text.filled(refilled(text.ids, result.rows[row], writer.cfg.mask_id))
        yield record(args, settings, args.text, whole, seed, result, row, text.masked)


def refilled(ids, answers, mask_id):
    """ids with the answers in the place of the masks."""
    answers = iter(answers)
    return [next(answers) if token == mask_id else token for token in ids]
