"""sample --transliterate: what is typed in Latin letters, in Devanagari.

    args, origins = with_rule(args, origins)         # its own rule, where none was typed
    for record in transliterate(args, model, tokenizer, settings, lines(args), length): ...

A line is cut as the training text was (text/transliterate.py), its parts are answered, many rows at
once, and put together again. A part without a Latin letter stays as it is.

Used by sample.py and by serving/typed.py.
"""
import dataclasses
import re
import sys
import time

from common.console import UserError, say
from sampling import decode
from sampling.settings import is_framed, opening
from sampling.terminal import Stream
from text.transliterate import parts

BATCH = 64            # parts that are answered at once
LEAST_ROOM = 0.4      # of a row, for the answer
LATIN = re.compile("[a-zA-Z]")
RULE = dict(temperature=0.0, top_k=0, blockwise=True, frozen_context=True)


# ---- what is asked for ---------------------------------------------------------------------------

def with_rule(args, origins):
    """The arguments with the likeliest answer, left to right: the best and, with small models, the
    fastest (docs/CPU_GUIDE.md). A --sampler or --block_size that was typed stays.
    """
    found = {name: value for name, value in RULE.items() if getattr(args, name) is None}
    if args.sampler is None and not args.block_size:
        found["block_size"] = 1
    chosen = dict.fromkeys(found, "transliterate")
    return dataclasses.replace(args, **found), origins | chosen


def refuse_other_models(saved):
    if not is_framed(saved):
        raise UserError(
            f"{saved.path} continues texts: --transliterate needs a model of pairs, made with "
            "python -m prepare --source transliterate and python -m train"
        )


def lines(args):
    """The texts to transliterate, as they come."""
    if args.transliterate != "-":
        yield from args.transliterate.split("\n")
        return
    name = args.prompts_file
    number = 0
    try:
        file = open(name, "rb") if name else sys.stdin.buffer
        with file:
            for raw in file:
                number += 1
                yield raw.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserError(
            f"{name or 'standard input'}, line {number}: not valid UTF-8; save it as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"--prompts_file {name}: {error.strerror}") from None


# ---- one line ------------------------------------------------------------------------------------

def transliterate(args, model, tokenizer, settings, texts, length, on_step=None):
    """Records as written.py's, one for each text; length: tokens of a row in training; on_step:
    after each forward, as decode.generate's.
    """
    told = False
    for text in texts:
        started = time.perf_counter()
        line = Line(model, tokenizer, text, length)
        if text.strip() and not line.asked and not told:
            told = True
            say(f"notice: no Latin letter in {text[:40]!r}: such a line stays as it is")
        stream = Stream() if args.stream else None
        at_once = 1 if stream else BATCH
        for start in range(0, len(line.asked), at_once):
            line.answer(settings, line.asked[start:start + at_once], args.seed, on_step)
            if stream:
                stream.grow(line.text_so_far())
        if stream:
            stream.grow(line.text_so_far(), final=True)
        yield line.record(args, settings, time.perf_counter() - started)


class Line:
    """A text in parts, the ids of those that are asked, and what was answered."""

    def __init__(self, model, tokenizer, text, length):
        self.model = model
        self.tokenizer = tokenizer
        self.text = text
        self.length = length
        self.answers = []               # of each part; None where it is still to come
        self.ids = []
        for part in parts(text):
            for piece in self.fitting(part):
                self.ids.append(opening(tokenizer, piece, framed=True))
                self.answers.append(None if LATIN.search(piece) else piece)
        self.asked = [number for number, answer in enumerate(self.answers) if answer is None]
        self.tokens = 0                 # of the answers, without their EOS
        self.decided = 0                # with them
        self.forwards = 0
        self.contexts = 0
        self.cache_bytes = 0

    def fitting(self, part):
        """The part, cut where its tokens leave too little of a row for the answer."""
        tokens = len(self.tokenizer.encode(part)) + 2
        if tokens <= (1 - LEAST_ROOM) * self.length or len(part) < 2:
            return [part]
        middle = len(part) // 2
        at = part.rfind(" ", 1, middle + 1)
        if at < 0:
            at = middle
        return [*self.fitting(part[:at].rstrip()), *self.fitting(part[at:].lstrip())]

    def answer(self, settings, numbers, seed, on_step=None):
        """Answer these parts; those of one length share a batch and have one limit."""
        for size in sorted({len(self.ids[number]) for number in numbers}):
            group = [number for number in numbers if len(self.ids[number]) == size]
            room = dataclasses.replace(
                settings, max_new_tokens=min(settings.max_new_tokens, self.length - size)
            )
            prompts = [self.ids[number] for number in group]
            result = decode.generate(self.model, prompts, room, [seed] * len(group), on_step)
            for number, row in zip(group, result.rows, strict=True):
                self.answers[number] = self.tokenizer.written(row)
            self.tokens += sum(map(len, result.rows))
            self.decided += sum(map(len, result.full_rows))
            self.forwards += sum(result.row_forwards)
            self.contexts += result.context_passes
            self.cache_bytes = max(self.cache_bytes, result.cache_bytes)

    def text_so_far(self):
        """All answers before the first part that is still to come."""
        done = []
        for answer in self.answers:
            if answer is None:
                break
            done.append(answer)
        return " ".join(done)

    def record(self, args, settings, seconds):
        return {
            "prompt": self.text,
            "seed": args.seed,
            "text": self.text_so_far(),
            "new_tokens": self.decided,
            "tokens_before_eos": self.tokens,
            "forwards": self.forwards,
            "context_passes": self.contexts,
            "seconds": seconds,
            "tok_per_s": self.tokens / seconds,
            "tokens_per_forward": self.decided / max(1, self.forwards),
            "mode": settings.mode,
            "cache_bytes": self.cache_bytes,
        }
