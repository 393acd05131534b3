"""What a sampling is asked for: its settings, out of flags, a profile and the checkpoint.

Used by sample.py, evaluate.py and edge_benchmark.py; imports no torch, so that a command can refuse
what is wrong at once. sample.py goes this way:

    args = suited(args, origins, saved, longest)                   # a value for what was not typed
    settings = settings_of_sample(args, origins, saved, tokenizer)   # Settings, with its notices
    say(in_words(settings, causal))

The other two have modes instead of switches and call decode_settings themselves. `saved` is a
checkpoint as checkpoint.load returns it; `origins` says where each argument's value comes from.
"""
import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import config
from common.console import UserError, say
from sampling import proved

MODES = ("full", "block", "block_frozen")
ADAPTIVE = ("threshold", "factor", "entropy")  # rules whose text decides how many forwards it takes
SPECULATE = "speculate"   # no rule for positions: drafts that are verified from left to right
PROMPT_BYTES = 100_000    # of a line of --prompts_file: reading more would take minutes
LONG = 100                # tokens of a text from which opening what verifies drafts pays
DRAFT = 8                 # tokens of its block, if --block_size is not typed
SCHEDULERS = dict(ddim="confidence", ddpm="ancestral", dpmpp="confidence")
GAP = re.compile(r"\[MASK\]|__+")

# tokens that a forward may reveal while their words still fit (docs/experiments/decoding.md)
AT_ONCE = dict(confidence=1.5, margin=1, random=1, ancestral=1)

# flags that one token at a time does not read
UNREAD_LEFT_TO_RIGHT = (
    "steps", "sampler", "threshold", "alg_temp", "remask", "remask_rule", "reveal",
    "temperature_end",
)

# a text is written left to right, unless one of these flags asks for another way
ASK_FOR_ANOTHER_WAY = (
    *UNREAD_LEFT_TO_RIGHT, "block_size", "blockwise", "frozen_context", "text", "guidance_scale",
    "min_decode_layers",
)

# flags that an autoregressive checkpoint does not read
UNREAD_BY_AR = (
    "blockwise", "frozen_context", *UNREAD_LEFT_TO_RIGHT, "guidance_scale", "block_size",
    "min_decode_layers",
)

# flags that --text does not read
UNREAD_BY_TEXT = (
    "block_size", "blockwise", "frozen_context", "max_new_tokens", "ignore_eos", "stream",
    "benchmark_runs", "warmup_runs", "guidance_scale",
)

# fields that Settings takes from the arguments as they are
TAKEN_OVER = (
    "max_new_tokens", "sampler", "reveal", "threshold", "alg_temp", "remask", "remask_rule",
    "temperature", "temperature_end", "top_k", "top_p", "repetition_penalty", "guidance_scale",
)


@dataclass
class Settings:
    """How to decode; sample.py fills it from the command line."""
    max_new_tokens: int
    steps: int                        # denoising forwards per block, an upper limit
    mode: str = "full"
    block_size: int = 64
    sampler: str = "confidence"       # which positions first: a name in unmasking.py; or speculate
    reveal: str = "linear"            # how many at each forward
    threshold: float = 0.9            # of the adaptive rules
    alg_temp: float = 0.0             # noise on the choice of positions
    remask: float = 0.0               # chance of a decided token to become a mask again (ReMDM)
    remask_rule: str = "cap"          # cap, rescale, conf
    temperature: float = 1.0
    temperature_end: float = None
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    guidance_scale: float = 1.0       # 1: plain conditional
    null_prompt: tuple = None         # ids that stand for no prompt, of a model of pairs
    eos_id: int = None                # None: never stop early
    window: int = None                # positions that a growing cache keeps; None: all
    min_depth: int = 0                # layers of a block's first forward, all at its last; 0: all

    @property
    def left_to_right(self):
        """One token at a time, of the clean stream. Early exits are the noisy one's, and so is
        guidance where there is no null prompt.
        """
        return (
            self.mode == "block_frozen"
            and self.block_size == 1
            and (self.guidance_scale == 1 or self.null_prompt is not None)
            and not self.min_depth
        )

    @property
    def speculates(self):
        """One token at a time, of the clean stream, in drafts of the noisy one."""
        return self.sampler == SPECULATE


def must_suit_drafts(settings):
    """Refuses what --sampler speculate cannot keep its promise with: the text of one token at a
    time.
    """
    if not settings.speculates:
        return
    if settings.mode != "block_frozen":
        raise UserError(
            "--sampler speculate verifies its drafts over the exact cache: leave --text, --steps, "
            "--blockwise and --frozen_context out, or give edge_benchmark --modes block_frozen"
        )
    if settings.guidance_scale != 1:
        raise UserError(
            f"--guidance_scale {settings.guidance_scale:g} needs a text without its context at "
            "every forward, and --sampler speculate has none: leave one of them out"
        )
    if settings.remask:
        raise UserError(
            f"--remask {settings.remask:g} takes tokens back, and what --sampler speculate writes "
            "is final: leave one of them out"
        )


# ---- what was asked for --------------------------------------------------------------------------

def opening(tokenizer, prompt, framed):
    """The ids that a text begins with. framed: the model was trained on pairs (text/pairs.py)."""
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if framed:
        ids.append(tokenizer.pad_id)
    return ids


def read_prompts(args):
    """The prompts of --prompt and --prompts_file; without any, one empty prompt."""
    prompts = list(args.prompt)
    if "-" in prompts:
        if prompts.count("-") > 1:
            raise UserError("--prompt - reads standard input to its end: give it once")
        prompts[prompts.index("-")] = typed_prompt()
    path = args.prompts_file
    if path:
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise UserError(f"--prompts_file {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"--prompts_file {path} is not UTF-8 (byte {error.start}): save it as UTF-8"
            ) from None
        found = [line for line in lines if line.strip()]
        for number, line in enumerate(lines, 1):
            size = len(line.encode())
            if size > PROMPT_BYTES:
                raise UserError(
                    f"{path}, line {number}: {size:,} bytes, and {PROMPT_BYTES:,} are the most of "
                    "a prompt: break it into shorter lines"
                )
        if not found:
            raise UserError(
                f"--prompts_file {path} holds no prompt: write one on each line, or leave the flag "
                "out"
            )
        prompts += found
    return prompts or [""]


def must_fit_row(args, prompts, tokenizer, length):
    """Refuses a prompt that leaves no token of a row to answer it, of a model of pairs, whose rows
    have this length.
    """
    for number, prompt in enumerate(prompts):
        tokens = len(opening(tokenizer, prompt, framed=True))
        if tokens >= length:
            raise UserError(
                f"{place_of_prompt(args, number)}: with its frame this prompt has {tokens:,} "
                f"tokens, and the model learned from rows of {length}, answer included: shorten it"
            )


def place_of_prompt(args, number):
    """Where the prompt with this number, counted from 0, was written."""
    number -= len(args.prompt)
    if number < 0:
        return "--prompt"
    lines = Path(args.prompts_file).read_text(encoding="utf-8").split("\n")
    filled = [line_number for line_number, line in enumerate(lines, 1) if line.strip()]
    return f"{args.prompts_file}, line {filled[number]}"


def typed_prompt():
    """All of standard input, without its last line break."""
    try:
        text = sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt -: standard input is not UTF-8 (byte {error.start}): convert it"
        ) from None
    if not text.strip():
        raise UserError("--prompt -: standard input is empty: pipe a text into it")
    return text


def masked_sampler(name):
    """A sampler's name, which may be one of a Gaussian model (--scheduler ddim) -> the one that is
    meant.
    """
    if name not in SCHEDULERS:
        return name
    meant = SCHEDULERS[name]
    say(f"notice: --scheduler {name}: this is a masked model, so --sampler {meant} is used")
    return meant


def suited(args, origins, saved, longest, alone=False):
    """The arguments with a value for everything that was not typed; longest: tokens of the longest
    prompt; alone: there is one text to write.

    --steps alone is a command of the older guides and keeps its meaning: the text in one piece, by
    confidence. If no flag asks for another way, the text is written left to right, which is both
    the fastest and the best judged (docs/experiments/decoding.md). Else in blocks over the exact
    cache if the checkpoint was trained for it. A text alone is written in verified drafts where the
    export has measured that they pay: it is the same text, up to the rounding of 8 bits.
    """
    def said(*names):
        return any(origins[name] != "default" for name in names)

    args = with_stored_guidance(args, origins, saved)
    found = {}
    if args.max_new_tokens is None:
        trained = config.trained_length(saved)
        found["max_new_tokens"] = min(config.LONGEST, max(trained - longest, trained // 2))
    usual = config.OLDER if said("steps") else config.NEWER
    rest = dict(usual)
    if said("threshold"):
        rest["sampler"] = "threshold"
    elif said("reveal", "remask", "alg_temp") or args.text is not None:
        # the flags need a schedule; a gap is small, so it gets a forward for each token
        rest["sampler"] = "confidence"
    found |= {name: value for name, value in rest.items() if getattr(args, name) is None}
    if nothing_else_asked(origins, saved):
        rule = proved.settings_of(saved.path, args, args.edge_profile)
        rule = rule or left_to_right(args.edge_profile)
        pays = alone and getattr(saved, "drafts_pay", False)
        tokens = args.max_new_tokens or found["max_new_tokens"]
        pays = pays and tokens >= LONG and rule["block_size"] == 1
        if pays and args.guidance_scale == 1:
            rule |= dict(block_size=DRAFT, sampler=SPECULATE)
        if origins["temperature"] == "flag":
            rule.pop("temperature", None)
        found |= dict(blockwise=True, frozen_context=True) | rule
    elif args.blockwise is None:
        found["blockwise"] = not said("steps") and args.text is None and not cannot_freeze(saved)
        if args.frozen_context is None:
            found["frozen_context"] = found["blockwise"]
    return dataclasses.replace(args, **found)


def with_stored_guidance(args, origins, saved):
    """The arguments with the --guidance_scale that was typed in training, where it can be had and
    none is typed now; origins follows.
    """
    stored = saved.config["args"].get("guidance_scale", 1.0)
    typed = origins["guidance_scale"] not in ("default", "checkpoint")
    if stored == 1 or typed or args.text is not None:
        return args
    if saved.config["model"]["causal"] or args.sampler == SPECULATE:
        return args
    origins["guidance_scale"] = "checkpoint"
    say(f"notice: --guidance_scale {stored:g}, as it was stored in training")
    return dataclasses.replace(args, guidance_scale=stored)


def nothing_else_asked(origins, saved):
    """Is the text to be written left to right because no flag asks for another way?"""
    if cannot_freeze(saved) or saved.config["model"]["causal"]:
        return False
    for name in ASK_FOR_ANOTHER_WAY:
        if name == "guidance_scale" and is_framed(saved):
            continue
        origin = origins[name]
        if origin != "default" and not origin.startswith("profile "):
            return False
    return True


def left_to_right(profile):
    """The settings of sample that make one token at a time of a profile: of two temperatures, the
    one in the middle.
    """
    settings = config.SAMPLE_PROFILES[profile]
    found = dict(block_size=1)
    if "temperature_end" in settings:
        found["temperature"] = (settings["temperature"] + settings["temperature_end"]) / 2
    return found


def why_so(args, saved):
    """In words, why a text is written so if no flag asks for another way."""
    profile = args.edge_profile
    if profile == "none":
        return "the default; --sampler threshold writes in blocks, in any order"
    if proved.settings_of(saved.path, args, profile) is not None:
        return f"--edge_profile {profile}, as measured here"
    return (
        f"--edge_profile {profile}, not measured here: edge_benchmark {saved.path} --profiles "
        f"{profile}"
    )


# ---- from arguments to Settings ------------------------------------------------------------------

def settings_of_sample(args, origins, saved, tokenizer):
    """`suited` arguments of sample.py -> Settings, with a notice for what cannot be had."""
    causal = saved.config["model"]["causal"]
    if causal:
        say_what_ar_leaves_unread(origins, saved)
        mode = "block_frozen"
    else:
        mode = mode_of(args, saved)
    largest = max(trained_blocks(saved))
    if mode == "full" and largest < config.trained_length(saved):
        say(
            f"notice: {saved.path} never saw a whole text, only blocks of {largest} tokens and "
            "their past: what is written in one piece will be poor; --blockwise --frozen_context "
            "is what it learned"
        )
    eos_id = None if args.ignore_eos else tokenizer.eos_id
    settings = decode_settings(args, saved, mode, eos_id)
    if is_framed(saved):
        if args.text is not None:
            raise UserError(
                f"{saved.path} was trained on pairs and answers prompts: it fills no gaps; give a "
                "--prompt instead of --text"
            )
        settings.null_prompt = tuple(opening(tokenizer, "", framed=True))
    if not causal:
        for line in idle(args, origins, settings):
            say(line)
        if args.text is None:
            for line in degenerate(settings, saved):
                say(line)
    return settings


def say_what_ar_leaves_unread(origins, saved):
    unread = []
    for name in UNREAD_BY_AR:
        read = name == "guidance_scale" and is_framed(saved)
        read = read or name == "sampler" and saved.config["model"].get("interlaced", False)
        if origins[name] == "flag" and not read:
            unread.append(f"--{name}")
    if unread:
        say(
            f"notice: {saved.path} was trained with --objective ar: it writes one token at a time "
            "over an exact cache, without " + ", ".join(unread)
        )


def mode_of(args, saved):
    """The mode that the switches of sample.py ask for, with a notice for what cannot be had."""
    if args.text is not None:
        return "full"                                # a gap needs what stands on both sides
    if not args.blockwise:
        if args.frozen_context:
            say(
                "notice: --frozen_context needs --blockwise; the whole text is decoded in one piece"
            )
        return "full"
    if not args.frozen_context:
        return "block"
    why_not = cannot_freeze(saved)
    if why_not:
        say(f"warning: {why_not}: --blockwise alone is used")
        return "block"
    return "block_frozen"


def decode_settings(args, saved, mode, eos_id):
    """Arguments of sample.py, evaluate.py or edge_benchmark.py, a mode -> Settings."""
    depth = least_layers(args, saved)
    if args.remask and args.sampler in ADAPTIVE:
        raise UserError(
            f"--remask {args.remask:g} needs a schedule, --sampler {args.sampler} has none: use "
            "confidence, margin, random or ancestral"
        )
    speculates = args.sampler == SPECULATE
    block = args.block_size or (DRAFT if speculates else usual_block(saved))
    why_not = cannot_freeze(saved)
    if speculates and why_not:
        raise UserError(f"{why_not}: leave --sampler {args.sampler} out")
    steps = args.steps
    if not steps:
        steps = saved.config["args"]["sample_steps"]
        if args.sampler in ADAPTIVE:  # it stops by itself, after a forward a token at the latest
            steps = args.max_new_tokens if mode == "full" else block
    taken_over = {name: getattr(args, name) for name in TAKEN_OVER}
    settings = Settings(
        steps=steps, min_depth=depth, mode=mode, block_size=block, eos_id=eos_id, **taken_over
    )
    if not saved.config["model"]["causal"]:
        must_suit_drafts(settings)
    return settings


def least_layers(args, saved):
    """--min_decode_layers as Settings.min_depth has it, with a notice where it cannot be had."""
    depth = args.min_decode_layers
    layers = saved.config["model"]["n_layers"]
    if depth > layers:
        say(f"notice: --min_decode_layers {depth}: this model has {layers} layers, all are used")
    if depth and not saved.config["model"]["exits"]:
        say(
            "notice: --min_decode_layers needs exits that were trained (train --exit_loss_weight "
            "0.1); this checkpoint has none, all layers are used"
        )
        depth = 0
    if depth and args.sampler in ADAPTIVE:
        say(
            f"notice: --sampler {args.sampler} cannot know its last forward, which has to be a "
            "full one: all layers are used"
        )
        depth = 0
    return depth if depth < layers else 0


# ---- what the checkpoint was trained for ---------------------------------------------------------

def is_framed(saved):
    """Was it trained on pairs? Then a prompt stands in a frame, and the text is its answer."""
    return saved.config["model"].get("framed", False)


def refuse_interlaced(saved):
    """A model that transliterates does nothing else."""
    if saved.config["model"].get("interlaced", False):
        raise UserError(
            f"{saved.path} transliterates and continues no text: use python -m sample {saved.path} "
            "--transliterate TEXT"
        )


def trained_blocks(saved):
    sizes = saved.config["args"]["train_block_sizes"]
    return config.block_sizes(sizes, config.trained_length(saved))


def parts_of_a_text(saved):
    """The trained blocks that may follow other text; a whole sequence never does."""
    whole = config.trained_length(saved)
    return sorted({size for size in trained_blocks(saved) if size < whole}, reverse=True)


def usual_block(saved):
    """The largest block that was trained, up to the size that the checkpoint stores for decoding.
    """
    stored, trained = saved.config["model"]["block_size"], parts_of_a_text(saved)
    if not trained:  # no block was trained, so any will do
        return min(stored, max(trained_blocks(saved)))
    return max((size for size in trained if size <= stored), default=min(trained))


def cannot_freeze(saved):
    """Why this checkpoint's context cannot be frozen; empty if it can."""
    trained = saved.config["args"]
    if min(trained_blocks(saved)) < config.trained_length(saved) or saved.config["model"]["causal"]:
        return ""
    return (
        f"{saved.path} was not trained in blocks (--train_block_sizes "
        f"{trained['train_block_sizes']}), "
        "so its context cannot be frozen"
    )


# ---- what is said about the settings -------------------------------------------------------------

def in_words(settings, causal):
    """One line that says how the text is made."""
    if causal or settings.left_to_right:
        where = "one token at a time"
        rule = "left to right"
    elif settings.speculates:
        where = "one token at a time"
        rule = f"left to right, in verified drafts of {settings.block_size}"
    else:
        where = {
            "full": "in one piece",
            "block": f"in blocks of {settings.block_size}, with all before them computed again",
            "block_frozen": f"in blocks of {settings.block_size} over the exact cache",
        }[settings.mode]
        rule = f"{settings.sampler}, {settings.steps} forwards at most"
        if settings.sampler in ADAPTIVE:
            rule = f"{settings.sampler} {settings.threshold:g}"
    line = (
        f"text: up to {settings.max_new_tokens} tokens {where}; {rule}, "
        f"temperature {settings.temperature:g}"
    )
    if settings.top_k:
        line += f", top_k {settings.top_k}"
    return line


def idle(args, origins, settings):
    """A notice for every typed flag that changes nothing under these settings."""
    sampler = settings.sampler
    greedy = settings.temperature == 0
    if settings.temperature_end and not (settings.left_to_right or settings.speculates):
        greedy = False
    # (flags, are they without effect, why)
    rules = [
        (
            ("block_size",),
            settings.mode == "full",
            "the text is decoded in one piece, not --blockwise",
        ),
        (("threshold",), sampler not in ADAPTIVE, f"--sampler {sampler} has no bound"),
        (
            ("alg_temp",),
            sampler not in ("confidence", "margin"),
            f"--sampler {sampler} does not rank by chance",
        ),
        (("reveal",), sampler in ADAPTIVE, f"--sampler {sampler} has no schedule"),
        (("remask_rule",), not settings.remask, "--remask is 0"),
        (("top_k", "top_p"), greedy, "temperature 0 takes the likeliest token"),
    ]
    if getattr(args, "text", None) is not None:
        why = "--text fills gaps, with all of the text around them, in one piece"
        rules[0] = (UNREAD_BY_TEXT, True, why)
    if settings.left_to_right or settings.speculates:
        why = "one token at a time has no order and no schedule"
        unread = UNREAD_LEFT_TO_RIGHT
        if not settings.left_to_right:
            unread = [name for name in unread if name != "sampler"]
        rules = [(unread, True, why), rules[-1]]
    off = dict(
        block_size=0, top_k=0, top_p=1.0, guidance_scale=1.0, alg_temp=0.0, steps=0, remask=0.0,
        warmup_runs=0,
    )
    for names, without_effect, why in rules:
        if not without_effect:
            continue
        typed = []
        for name in names:
            value = getattr(args, name)
            asks = value is not False and value is not None and value != off.get(name)
            if asks and origins.get(name) == "flag":
                typed.append(f"--{name}")
        if typed:
            yield f"notice: without effect: {', '.join(typed)} ({why})"


def degenerate(settings, saved):
    """A warning for settings that make poor text of any model, or of this one."""
    if settings.speculates:  # a draft decides nothing about the text
        return
    trained = parts_of_a_text(saved)
    if settings.mode == "block_frozen" and settings.block_size not in (1, *trained):
        sizes = ", ".join(map(str, trained))
        yield (
            f"warning: this checkpoint was not trained in blocks of {settings.block_size} (but of "
            f"{sizes}), so the text will be poor: leave --block_size out"
        )
    tokens = settings.max_new_tokens
    if settings.mode != "full":
        tokens = min(settings.block_size, tokens)
    yield from too_few(settings, tokens)


def too_few(settings, tokens):
    """A warning if so many tokens are revealed in too few forwards."""
    steps = settings.steps
    sampler = settings.sampler
    at_once = tokens / steps
    if sampler in ADAPTIVE:
        if at_once > AT_ONCE["confidence"]:
            yield (
                f"warning: {steps} forwards for {tokens} tokens: the last one reveals all that is "
                "left, sure or not, so the text will be poor: leave --steps out"
            )
    elif at_once > AT_ONCE[sampler]:
        advice = "leave --steps and --sampler out"
        if sampler in ("confidence", "margin"):  # the others are poor at one token a forward, too
            advice += f", or --steps {tokens}"
        yield (
            f"warning: {steps} forwards for {tokens} tokens are {at_once:.1f} at once, and "
            f"--sampler {sampler} bears {AT_ONCE[sampler]:g}, so words will not fit together: "
            f"{advice}"
        )
