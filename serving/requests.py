"""What a client asks for: the fields of its JSON become a Job, with settings that suit the
checkpoint for all that it does not say.

    request = completion(body, served)          # a Refused names the field that is wrong

Used by serving/server.py. A field that is a flag of python -m sample has that flag's name, limits
and meaning; a field that nobody knows is refused, so that a misspelt one is not ignored. The one
difference: `steps` alone does not change the mode, as it does on the command line.
"""
import dataclasses
import math
import secrets
from difflib import get_close_matches
from functools import cached_property
from typing import NamedTuple

import config
import model_config
from common.console import UserError
from common.flags import convert
from sampling import written
from sampling.settings import (
    MODES,
    SCHEDULERS,
    Settings,
    cannot_freeze,
    decode_settings,
    degenerate,
    idle,
    opening,
    suited,
    too_few,
    trained_blocks,
    usual_block,
)
from serving import typed
from serving.errors import wrong
from serving.job import Job

MOST_TEXTS = 16            # of one request
MOST_AT_ONCE = 8192        # positions whose logits lie in memory at once: texts x block
MOST_STOPS = 4             # of one request, as in OpenAI's API
LONGEST_STOP = 100         # characters

# field of the JSON -> flag of python -m sample
SHARED = {
    "max_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "n": "num_samples",
    "seed": "seed",
}
OWN = (
    "steps", "sampler", "threshold", "top_k", "repetition_penalty", "guidance_scale", "block_size",
    "alg_temp", "remask", "remask_rule", "reveal", "temperature_end", "ignore_eos",
)
FLAGS = SHARED | {name: name for name in OWN}
OF_GAPS = {
    name: flag
    for name, flag in FLAGS.items()
    if name not in ("max_tokens", "block_size", "guidance_scale", "ignore_eos")
}

# fields of OpenAI's API that this model does not have, and the values that ask for nothing
WITHOUT = {
    "best_of": (1,),
    "suffix": ("",),
    "logprobs": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
INSTEAD = {
    "suffix": ": POST /v1/infill fills gaps",
    "presence_penalty": ": repetition_penalty is what there is",
    "frequency_penalty": ": repetition_penalty is what there is",
}


@dataclasses.dataclass
class Served:
    """What the server has: a model, and how much a request may ask of it."""
    name: str
    model: object
    tokenizer: object
    saved: object
    max_length: int                   # tokens of a text, prompt included
    max_work: int                     # positions that go through the network for a request

    @property
    def causal(self):
        return self.model.cfg.causal

    @property
    def framed(self):
        """Was it trained on pairs? Then a text is the answer to its prompt."""
        return self.model.cfg.framed

    @cached_property
    def typed_rule(self):
        """How lines in Latin letters are answered."""
        return typed.rule_of(self.saved, self.tokenizer)


class Request(NamedTuple):
    """A request that was understood."""
    job: Job
    settings: Settings
    prompts: list                     # one text for each row, without what is written
    prompt_tokens: int
    block: int                        # positions that are written together
    seed: int                         # of the first row
    notices: list
    gapped: object = None             # of a text with gaps: GappedText
    stops: tuple = ()
    echo: bool = False
    stream: bool = False
    include_usage: bool = False


# ---- fields --------------------------------------------------------------------------------------

def known_fields(body, served, names):
    """Refuses a body that is no object or has fields of no meaning, and another model's name."""
    if not isinstance(body, dict):
        raise wrong("the body must be a JSON object")
    for name in body:
        if name not in names:
            near = get_close_matches(name, names, 1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise wrong(f"unknown field {name[:60]!r}{hint}", name[:60])
    model = body.get("model")
    if model not in (None, "", served.name):
        error = wrong(
            f"the model {str(model)[:60]!r} is not served here, only {served.name!r}",
            "model",
            "model_not_found",
        )
        error.status = 404
        raise error


def nothing_we_lack(body):
    """Refuses fields of OpenAI's API that could not be kept."""
    for name, idle_values in WITHOUT.items():
        if body.get(name) is not None and body[name] not in idle_values:
            raise wrong(f"{name} is not supported{INSTEAD.get(name, '')}", name)


def flag_values(body, names):
    """{flag: value} of the fields that stand for a flag of python -m sample."""
    fields = config.SampleArgs.__dataclass_fields__
    values = {}
    for name, flag in names.items():
        value = body.get(name)
        if value is None:
            continue
        field = fields[flag]
        kinds = {float: (float, int)}.get(field.type, (field.type,))
        if type(value) not in kinds:
            raise wrong(f"{name} must be of type {field.type.__name__}", name)
        try:
            values[flag] = convert(field, value)
        except ValueError as error:
            raise wrong(f"{name} {str(value)[:60]}: {error}", name) from None
    if values.get("num_samples", 1) > MOST_TEXTS:
        raise wrong(f"n {values['num_samples']}: at most {MOST_TEXTS}", "n")
    return values


def switch(body, name):
    """A field that is true or false."""
    value = body.get(name)
    if value not in (None, True, False):
        raise wrong(f"{name} must be true or false", name)
    return bool(value)


def text_of(body, name):
    """A field that is text."""
    value = body.get(name)
    if not isinstance(value, str):
        raise wrong(f"{name} must be a text", name)
    return value


def prompts_of(body):
    """The prompts, a text or several."""
    value = body.get("prompt")
    if value is None:
        return [""]
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise wrong("prompt must be a text or a list of texts", "prompt")
    if not all(isinstance(text, str) for text in value):
        raise wrong("prompt must hold texts: token ids are not taken", "prompt")
    return value


def stops_of(body):
    """The texts of which none may be in an answer."""
    value = body.get("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    sound = isinstance(stops, list) and all(isinstance(text, str) and text for text in stops)
    if not sound or len(stops) > MOST_STOPS or max(map(len, stops), default=0) > LONGEST_STOP:
        raise wrong(
            f"stop must be a text, or at most {MOST_STOPS}, of 1 to {LONGEST_STOP} characters",
            "stop",
        )
    return tuple(stops)


# ---- settings ------------------------------------------------------------------------------------

def settings_of(served, values, longest, mode=None, text=None):
    """-> (Settings, [notices]). values: {flag: value}; longest: tokens of the longest prompt; mode:
    None for the one that suits the checkpoint; text: with gaps, instead of a prompt.
    """
    saved = served.saved
    values = dict(values)
    if values.get("steps") and "sampler" not in values:
        values["sampler"] = "confidence"       # a number of forwards is a schedule
    if values.get("sampler") in SCHEDULERS:
        values["sampler"] = SCHEDULERS[values["sampler"]]
    origins = dict.fromkeys(config.SampleArgs.__dataclass_fields__, "default")
    origins |= dict.fromkeys(values, "flag")
    as_sent = dict(origins)
    if text is not None:
        as_sent["max_new_tokens"] = "default"  # the gaps say how many
    origins["steps"] = "default"               # else it means the mode of the older guides
    if mode is not None or text is not None:
        origins["blockwise"] = "flag"          # another way than left to right is asked for
    args = suited(config.SampleArgs(**values, text=text), origins, saved, longest)

    if mode is None:
        mode = "block_frozen" if args.frozen_context else "full"
    why_not = cannot_freeze(saved)
    if mode == "block_frozen" and why_not:
        raise wrong(f"mode block_frozen: {why_not}", "mode")
    eos_id = None if args.ignore_eos else served.tokenizer.eos_id
    try:
        settings = decode_settings(args, saved, mode, eos_id)
    except UserError as error:
        raise wrong(str(error).replace("--", "")) from None
    settings = written.with_window(settings, served.model, config.trained_length(saved))
    if served.framed:
        settings.null_prompt = tuple(opening(served.tokenizer, "", framed=True))

    notices = []
    if not served.causal:
        notices += idle(args, as_sent, settings)
        if text is None:
            notices += degenerate(settings, saved)
    return settings, [notice.replace("--", "") for notice in notices]


def mode_of(body, served):
    """The decode mode that was asked for, or None."""
    mode = body.get("mode")
    if mode is None or served.causal:
        return None
    if mode not in MODES:
        raise wrong(f"mode must be one of {', '.join(MODES)}", "mode")
    return mode


def must_be_bounded(served, settings, prompt_length, texts):
    """Refuses what would hold up the others for too long, or take too much memory -> the positions
    that are written together.
    """
    new = settings.max_new_tokens
    length = prompt_length + new
    if length > served.max_length:
        raise wrong(
            f"prompt and new tokens are {length}, this server writes {served.max_length} at most: "
            "ask for fewer max_tokens",
            "max_tokens",
        )
    one_by_one = served.causal or settings.left_to_right or settings.speculates
    block = new if settings.mode == "full" else min(settings.block_size, new)
    if one_by_one:
        block = 1
    if texts * block > MOST_AT_ONCE:
        raise wrong(f"{texts} texts in blocks of {block} are too many at once: ask for fewer")

    # forwards x the positions that each reads
    forwards = settings.steps
    if not settings.remask and settings.sampler != "ancestral":
        forwards = min(forwards, block)
    read = block if settings.mode == "block_frozen" else length
    sides = 1 if settings.guidance_scale == 1 else 2
    work = texts * (length + math.ceil(new / block) * forwards * read * sides)
    if one_by_one:
        work = texts * 3 * length              # drafts and their verification
    must_be_affordable(served, work, "fewer max_tokens, steps or texts", "max_tokens")
    return block


def must_be_affordable(served, work, instead, param):
    """Refuses what would hold up the others for too long. work: positions in the network."""
    if work > served.max_work:
        raise wrong(
            f"this takes {work:,} positions in the network, and {served.max_work:,} are allowed "
            f"for a request: ask for {instead}",
            param,
        )


def described(served):
    """What a client can know of the model: what it gets without settings, and the bounds."""
    settings, _ = settings_of(served, {}, 1)
    return {
        "kind": served.model.cfg.model,
        "parameters": model_config.count_params(served.model.cfg),
        "step": served.saved.step,
        "left_to_right_only": served.causal,
        "can_freeze": not cannot_freeze(served.saved),
        "fills_gaps": not served.causal and not served.framed,
        "transliterates": typed.can_transliterate(served.saved),
        "trained_length": config.trained_length(served.saved),
        "trained_blocks": sorted(set(trained_blocks(served.saved)), reverse=True),
        "usual_block": usual_block(served.saved),
        "max_length": served.max_length,
        "defaults": {
            "mode": settings.mode,
            "block_size": settings.block_size,
            "max_tokens": settings.max_new_tokens,
            "sampler": settings.sampler,
            "threshold": settings.threshold,
            "temperature": settings.temperature,
        },
    }


# ---- requests ------------------------------------------------------------------------------------

def completion(body, served):
    """The body of POST /v1/completions -> Request."""
    more = ("model", "prompt", "mode", "stop", "echo", "stream", "stream_options", "user")
    known_fields(body, served, (*FLAGS, *WITHOUT, *more))
    nothing_we_lack(body)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise wrong("stream_options must be an object", "stream_options")
    request = continued(body, served, watched=False)
    return request._replace(
        stops=stops_of(body),
        echo=switch(body, "echo"),
        stream=switch(body, "stream"),
        include_usage=switch(options, "include_usage"),
    )


def must_continue(served):
    """Refuses a model that does nothing but transliterate."""
    if served.model.cfg.interlaced:
        raise wrong(f"{served.name} transliterates alone: POST /v1/transliterate")


def continued(body, served, watched):
    """The Request for prompts that are continued."""
    must_continue(served)
    prompts = prompts_of(body)
    values = flag_values(body, FLAGS)
    n = values.pop("num_samples", 1)
    texts = len(prompts) * n
    if texts > MOST_TEXTS:
        raise wrong(f"{texts} texts in one request: at most {MOST_TEXTS}", "n")
    tokenizer = served.tokenizer
    ids = [opening(tokenizer, prompt, served.framed) for prompt in prompts]
    longest = max(map(len, ids))
    settings, notices = settings_of(served, values, longest, mode_of(body, served))
    block = must_be_bounded(served, settings, longest, texts)
    seed = values.get("seed", secrets.randbelow(2**31))
    job = Job(
        [row for row in ids for _ in range(n)],
        settings,
        list(range(seed, seed + texts)),
        watched=watched,
    )
    prompt_tokens = sum(len(row) - 1 for row in ids)
    prompts_of_rows = [prompt for prompt in prompts for _ in range(n)]
    return Request(job, settings, prompts_of_rows, prompt_tokens, block, seed, notices)


def infill(body, served, watched=False):
    """The body of POST /v1/infill -> Request."""
    known_fields(body, served, (*OF_GAPS, "model", "text", "user"))
    must_continue(served)
    if served.causal or served.framed:
        raise wrong(f"{served.name} fills no gaps: it was trained left to right alone, or on pairs")
    text = text_of(body, "text")
    values = flag_values(body, OF_GAPS)
    n = values.pop("num_samples", 1)
    if values.get("sampler") == "speculate":
        raise wrong("sampler speculate writes from left to right and fills no gaps", "sampler")
    try:
        gapped = written.GappedText(text, served.tokenizer)
    except UserError:
        raise wrong("there is no gap in the text: write ____ or [MASK]", "text") from None
    steps = values.get("steps", 0)
    longest = len(gapped.ids)
    given = longest - gapped.masked
    values["max_new_tokens"] = gapped.masked
    settings, notices = settings_of(served, values, given, "full", text)
    settings = written.settings_of_gaps(settings, steps, gapped.masked)
    block = must_be_bounded(served, settings, given, n)
    notices += [line.replace("--", "") for line in too_few(settings, gapped.masked)]
    seed = values.get("seed", secrets.randbelow(2**31))
    job = Job([gapped.ids] * n, settings, list(range(seed, seed + n)), fills=True, watched=watched)
    return Request(job, settings, [text] * n, given - 1, block, seed, notices, gapped)


def transliteration(body, served):
    """The body of POST /v1/transliterate -> Request."""
    known_fields(body, served, ("model", "text", "user"))
    if not typed.can_transliterate(served.saved):
        raise wrong(
            f"{served.name} continues texts: only a model of prepare --source transliterate does "
            "this"
        )
    text = text_of(body, "text")
    args, settings = served.typed_rule
    lines = text.split("\n")
    length = config.trained_length(served.saved)
    asked = typed.asked_of(lines, served.model, served.tokenizer, length)
    must_be_affordable(served, len(asked) * length, "a shorter text", "text")
    job = typed.TypedJob(lines, args, settings, served.tokenizer, length)
    prompt_tokens = sum(len(ids) // 2 for ids in asked)
    return Request(job, settings, [text], prompt_tokens, 1, args.seed, [])


def watched(body, served):
    """The body of POST /steps, one prompt or one text with gaps -> Request."""
    if isinstance(body, dict) and body.get("text") is not None:
        if body.get("n") not in (None, 1):
            raise wrong("n must be 1: one text is watched", "n")
        return infill(body, served, watched=True)
    known_fields(body, served, (*FLAGS, "model", "prompt", "mode"))
    if not isinstance(body.get("prompt", ""), str) or body.get("n") not in (None, 1):
        raise wrong("one text is watched: give one prompt, and n 1", "prompt")
    return continued(body, served, watched=True)
