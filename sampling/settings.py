"""What a sampling is asked for: its settings, from flags, a profile and the checkpoint."""
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import config
from common.console import UserError, say

MODES = ("full", "block", "block_frozen")


@dataclass
class Settings:
    """How to decode; sample.py fills it from the command line."""
    max_new_tokens: int
    steps: int                        # denoising forwards per block, an upper limit
    mode: str = "full"
    block_size: int = 64
    sampler: str = "confidence"       # which positions first: a name in sampling/unmasking.py
    reveal: str = "linear"            # how many at each forward
    threshold: float = 0.9            # of the adaptive rules
    alg_temp: float = 0.0             # noise on the choice of positions
    remask: float = 0.0  # chance of a revealed token to go back (ReMDM), bounded by the schedule
    remask_rule: str = "cap"          # cap, rescale, conf
    temperature: float = 1.0
    temperature_end: float = None
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    guidance_scale: float = 1.0       # 1: plain conditional
    eos_id: int = None                # None: never stop early
    window: int = None                # positions that a growing cache keeps; None: all
    # layers of a block's first forward, growing to all at its last; 0: always all
    min_depth: int = 0


# tokens that a forward may reveal while their words still fit (docs/experiments/decoding.md)
AT_ONCE = dict(confidence=1.5, margin=1, random=1, ancestral=1)


SCHEDULERS = dict(ddim="confidence", ddpm="ancestral")


UNREAD = (
    "steps",
    "sampler",
    "threshold",
    "alg_temp",
    "remask",
    "remask_rule",
    "reveal",
    "temperature_end",
    "guidance_scale",
    "block_size",
    "min_decode_layers",
)  # of an autoregressive checkpoint


def suited(args, origins, saved, longest):
    """The arguments with a value for everything that was not typed; longest: tokens of the longest
    prompt.

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
        unread = [
            name for name in ("blockwise", "frozen_context", *UNREAD) if origins[name] == "flag"
        ]
        if unread:
            say(
                f"notice: {saved.path} was trained with --objective ar: it writes one token at a "
                "time over an exact cache, "
                "without " + ", ".join(f"--{name}" for name in unread)
            )
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
        say(
            f"notice: {saved.path} never saw a whole text, only blocks of {largest} tokens and "
            "their past: what is written in "
            "one piece will be poor; --blockwise --frozen_context is what it learned"
        )
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
        names = (
            "block_size",
            "blockwise",
            "frozen_context",
            "max_new_tokens",
            "ignore_eos",
            "stream",
            "benchmark_runs",
            "warmup_runs",
            "guidance_scale",
        )
        rules[0] = (
            names,
            True,
            "--text fills gaps, with all of the text around them, in one piece",
        )
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
        yield (
            f"warning: this checkpoint was not trained in blocks of {s.block_size} (but of "
            f"{sizes}), "
            "so the text will be poor: leave --block_size out"
        )
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
            yield (
                f"warning: {s.steps} forwards for {tokens} tokens: the last one reveals all that "
                "is "
                "left, sure or not, so the text will be poor: leave --steps out"
            )
    elif at_once > AT_ONCE[s.sampler]:
        advice = "leave --steps and --sampler out"
        if s.sampler in ("confidence", "margin"):  # the others are poor at one token a forward, too
            advice += f", or --steps {tokens}"
        yield (
            f"warning: {s.steps} forwards for {tokens} tokens are {at_once:.1f} at once, and "
            "--sampler "
            f"{s.sampler} bears {AT_ONCE[s.sampler]:g}, so words will not fit together: {advice}"
        )


def decode_settings(args, saved, mode, eos_id):
    """Also for edge_benchmark and evaluate, whose command lines have modes instead of switches."""
    from sampling.settings import Settings
    from sampling.unmasking import ADAPTIVE
    depth, layers = args.min_decode_layers, saved.config["model"]["n_layers"]
    if depth > layers:
        say(f"notice: --min_decode_layers {depth}: this model has {layers} layers, all are used")
    if depth and not saved.config["model"]["exits"]:
        say(
            "notice: --min_decode_layers needs exits that were trained (train --exit_loss_weight "
            "0.1); this checkpoint has none, "
            "all layers are used"
        )
        depth = 0
    if depth and args.sampler in ADAPTIVE:
        say(
            f"notice: --sampler {args.sampler} cannot know its last forward, which has to be a "
            "full one: all layers are used"
        )
        depth = 0
    if args.remask and args.sampler in ADAPTIVE:
        raise UserError(
            f"--remask {args.remask:g} needs a schedule, --sampler {args.sampler} has none: use "
            "confidence, margin, "
            "random or ancestral"
        )
    block = args.block_size or usual_block(saved)
    longest = args.max_new_tokens if mode == "full" else block  # an adaptive rule stops by itself
    steps = args.steps or (
        longest if args.sampler in ADAPTIVE else saved.config["args"]["sample_steps"]
    )
    names = (
        "max_new_tokens",
        "sampler",
        "reveal",
        "threshold",
        "alg_temp",
        "remask",
        "remask_rule",
        "temperature",
        "temperature_end",
        "top_k",
        "top_p",
        "repetition_penalty",
        "guidance_scale",
    )
    return Settings(
        steps=steps,
        min_depth=depth if depth < layers else 0,
        mode=mode,
        block_size=block,
        eos_id=eos_id,
        **{name: getattr(args, name) for name in names},
    )


def usual_block(saved):
    """The largest block that was trained, up to the size that the checkpoint stores for decoding.
    """
    stored, trained = saved.config["model"]["block_size"], parts_of_a_text(saved)
    if not trained:  # no block was trained, so any will do
        return min(stored, max(trained_blocks(saved)))
    return max((size for size in trained if size <= stored), default=min(trained))


def parts_of_a_text(saved):
    """The trained blocks that may follow other text; a whole sequence never does."""
    return sorted(
        {size for size in trained_blocks(saved) if size < saved.config["args"]["seq_len"]},
        reverse=True,
    )


def trained_blocks(saved):
    trained = saved.config["args"]
    return config.block_sizes(trained["train_block_sizes"], trained["seq_len"])


def cannot_freeze(saved):
    """Why this checkpoint's context cannot be frozen; empty if it can."""
    trained = saved.config["args"]
    if min(trained_blocks(saved)) < trained["seq_len"] or saved.config["model"].get("causal"):
        return ""
    return (
        f"{saved.path} was not trained in blocks (--train_block_sizes "
        f"{trained['train_block_sizes']}), "
        "so its context cannot be frozen"
    )


def read_prompts(args):
    prompts = list(args.prompt)
    if args.prompts_file:
        try:
            found = [
                line
                for line in Path(args.prompts_file).read_text(encoding="utf-8").split("\n")
                if line.strip()
            ]
        except OSError as error:
            raise UserError(f"--prompts_file {args.prompts_file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"--prompts_file {args.prompts_file} is not UTF-8 (byte {error.start}): save it as "
                "UTF-8"
            ) from None
        if not found:
            raise UserError(
                f"--prompts_file {args.prompts_file} holds no prompt: write one on each line, or "
                "leave the flag out"
            )
        prompts += found
    return prompts or [""]


GAP = re.compile(r"\[MASK\]|__+")


def masked_sampler(name):
    """A sampler's name, which may be one of a Gaussian model (--scheduler ddim) -> the one that is
    meant.
    """
    if name not in SCHEDULERS:
        return name
    say(
        f"notice: --scheduler {name}: this is a masked model, so --sampler {SCHEDULERS[name]} is "
        "used"
    )
    return SCHEDULERS[name]
