"""Prompts that are typed one after the other: sample --interactive.

    hold(argv, pinned, writer, tokenizer, saved)

Used by sample.py only. A line is a prompt, or a text with gaps (____), or a command that begins
with /. A line that ends with a backslash goes on in the next one. What is typed on a terminal is
kept for the arrow keys, in this session and in the next ones. Each text has a seed of its own.
"""
import contextlib
import dataclasses
import shlex
import sys
from pathlib import Path

try:
    import readline  # arrow keys and history for input()
except ImportError:  # Windows, whose console has both; a slim Linux
    readline = None

import cli
import config
from common.console import UserError, printable, say
from common.flags import show
from sampling.settings import (
    GAP,
    in_words,
    masked_sampler,
    opening,
    settings_of_sample,
    suited,
)
from sampling.terminal import Watch
from sampling.written import continue_prompts, fill_text

HISTORY = Path.home() / ".aria_history"
KEPT = 1000             # lines of it
HELP = """\
a prompt             is continued; with ____ in it, its gaps are filled (two underscores a token)
... \\                a backslash at the end: the text goes on in the next line
/again               another text for the last prompt
/settings            all settings that can be changed here, and their values
/settings NAME VALUE [NAME VALUE ...]     change some; the value default takes a change back
/help  /quit         this list; the end, as Ctrl-D. Ctrl-C stops a text"""
CHANGEABLE = (
    *(field.name for field in dataclasses.fields(config.DecodeFlags)),
    "blockwise", "frozen_context", "ignore_eos", "num_samples", "seed", "show_steps",
)


class Conversation:
    """The model, the settings as they are now, and the prompt that was typed last."""

    def __init__(self, argv, pinned, writer, tokenizer, saved):
        self.argv = list(argv)
        self.pinned = pinned
        self.writer = writer
        self.tokenizer = tokenizer
        self.saved = saved
        self.changed = {}               # {flag: its new value, as it was typed}
        self.prompt = None
        self.count = 0                  # texts so far, with this seed
        self.args, self.origins = self.parsed(self.changed)

    def parsed(self, changed):
        """The arguments of the command line with these changes behind it, and their origins."""
        words = [f"--{name}={value}" for name, value in changed.items()]
        args, origins = cli.parse(
            config.SampleArgs, [*self.argv, *words], "sample", pinned=self.pinned
        )
        args.sampler = masked_sampler(args.sampler)
        return args, origins

    def answer(self, line):
        """What is to be done about one line -> go on?"""
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return False
        if word == "/help":
            print(HELP)
        elif word == "/settings":
            self.settings(rest)
        elif word == "/again":
            if self.prompt is None:
                raise UserError("/again: there is no prompt yet")
            self.write()
        elif line.startswith("/") and "\n" not in line:
            raise UserError(f"{word} is no command: /help lists them")
        else:
            self.prompt = line
            self.write()
        return True

    def settings(self, text):
        """/settings: change some, or show all."""
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UserError(f"/settings: {error}") from None
        if not words:
            for name in CHANGEABLE:
                print(f"{name:20} {show(getattr(self.args, name)):24} {self.origins[name]}")
            print("none: chosen to suit the checkpoint")
            return
        if len(words) % 2:
            raise UserError("/settings takes names and values, such as /settings temperature 0.5")
        changed = dict(self.changed)
        for name, value in zip(words[::2], words[1::2], strict=True):
            name = name.removeprefix("--").replace("-", "_")
            if name not in CHANGEABLE:
                raise UserError(f"/settings {name}: it is none of {', '.join(CHANGEABLE)}")
            changed[name] = value
            if value == "default":
                del changed[name]
        args, origins = self.parsed(changed)
        _, settings = self.suited("", args, origins)    # refuses what does not go together
        if args.seed != self.args.seed:
            self.count = 0
        self.args = args
        self.origins = origins
        self.changed = changed
        say(in_words(settings, self.writer.cfg.causal))

    def suited(self, prompt, args, origins):
        """The arguments for this prompt, and the Settings that follow from them."""
        given = dict(stream=True, seed=args.seed + self.count)
        if GAP.search(prompt):
            given["text"] = prompt
        args = dataclasses.replace(args, **given)
        ids = opening(self.tokenizer, prompt, self.writer.cfg.framed)
        args = suited(args, origins, self.saved, len(ids), alone=args.num_samples == 1)
        return args, settings_of_sample(args, origins, self.saved, self.tokenizer)

    def write(self):
        """The texts of the prompt: printed while they grow, or with their gaps filled."""
        args, settings = self.suited(self.prompt, self.args, self.origins)
        watch = Watch(self.tokenizer) if args.show_steps else None
        if args.text:
            records = fill_text(args, self.writer, self.tokenizer, settings, watch)
        else:
            records = continue_prompts(
                args,
                self.writer,
                self.tokenizer,
                settings,
                [self.prompt],
                watch,
                config.trained_length(self.saved),
            )
        for record in records:
            self.count += 1
            if args.text:
                print(printable(record["text"]), flush=True)
            say(
                f"[{record['tokens_before_eos']} tokens, {record['tok_per_s']:.0f} a second, "
                f"seed {record['seed']}]"
            )


def hold(argv, pinned, writer, tokenizer, saved):
    """Read lines and answer them until there are none."""
    conversation = Conversation(argv, pinned, writer, tokenizer, saved)
    say("type a prompt, or /help")
    with history():
        going_on = True
        while going_on:
            try:
                line = read_line()
                if line.strip():
                    going_on = conversation.answer(line)
            except UserError as error:
                print(f"error: {printable(str(error))}", file=sys.stderr)
            except KeyboardInterrupt:
                print()
                say("stopped; /quit or Ctrl-D ends the conversation")
            except EOFError:
                going_on = False


def read_line():
    """The next line, and those that it goes on in."""
    sign = "> " if sys.stdin.isatty() else ""
    line = input(sign)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input(". " if sign else "")
    return line


@contextlib.contextmanager
def history():
    """The lines of earlier sessions; at the end, those of this one join them."""
    if readline is None or not sys.stdin.isatty():
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(HISTORY)
    readline.set_history_length(KEPT)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            HISTORY.touch(mode=0o600)
            readline.write_history_file(HISTORY)
