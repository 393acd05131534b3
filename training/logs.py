"""The log of a run: train.jsonl, TensorBoard and Weights & Biases, the progress, the summary.

    log = logs.Events(logs.JsonLines(path), logs.open_sinks(args, run_dir, run_id, first_step))
    log.write("train", step=1, loss=8.9)    # train.jsonl at once, the sinks in threads of their own
    tensorboard --logdir logs                       # --tensorboard auto: wherever it is installed
    python -m train --wandb --wandb_mode offline    # nothing is sent unless --wandb says so

Used by the other files of training/. No sink can stop the training: one that raises, hangs or falls
behind is named once and dropped, as the training only puts into its queue. Both packages are
imported when a sink opens, in its thread; the numbers of an event become EVENT/KEY. The picture of
--live rich is drawn by training/live.py.
"""
import contextlib
import errno
import html
import importlib.util
import math
import os
import queue
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path

from tqdm import tqdm

from common.console import UserError, mute, need, say
from common.files import json_text
from common.flags import split_list
from common.machine import peak_memory_mb
from config import next_commands

ROOM = 10_000            # events that may wait for a sink; one that is further behind is dropped
PATIENCE = 30            # seconds that W&B may take to begin, and to end
HURRY = 3                # seconds that all sinks have together when the run was told to stop


# ---- the log file --------------------------------------------------------------------------------

def finite(value):
    """JSON has no NaN: a number that is not finite is logged as null, inside lists and objects too.
    """
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class JsonLines:
    """train.jsonl: one object per line, whole or not there, the source of every plot. A full disk
    costs lines, not the run.

    Without a path nothing is written: of several processes only one keeps the log.
    """

    def __init__(self, path):
        self.file = None
        self.told = False  # that lines are lost
        if path is not None:
            self.file = open(path, "ab+", buffering=0)
            self.drop_torn_line()

    def drop_torn_line(self):
        """What a power cut has left of the last line."""
        size = os.fstat(self.file.fileno()).st_size
        self.file.seek(max(0, size - 2 ** 20))
        tail = self.file.read()
        self.file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)

    def write(self, event, **values):
        if self.file is None:
            return
        line = (json_text(finite({"event": event, **values})) + "\n").encode()
        size = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.file.truncate(size)
            if not self.told:
                say(f"warning: {self.file.name}: lines are lost: {error.strerror}")
            self.told = True

    def close(self):
        if self.file is not None:
            self.file.close()


class Events:
    """The log of a run: train.jsonl, then every sink."""

    def __init__(self, file, sinks):
        self.file = file
        self.sinks = sinks

    def write(self, event, **values):
        self.file.write(event, **values)
        for sink in self.sinks:
            sink.put((event, values))

    def close(self, hurry=False):
        self.file.close()
        patience = HURRY if hurry else PATIENCE + HURRY
        until = time.monotonic() + patience
        for sink in self.sinks:
            sink.finish(max(0, until - time.monotonic()))


# ---- the sinks -----------------------------------------------------------------------------------

def numbers(event, values):
    """The figures of an event as {"train/loss": 8.9}; an object inside, such as by_block, one level
    deeper.
    """
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= numbers(f"{event}/{key}", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
            flat[f"{event}/{key}"] = value
    return flat


def sample_name(values):
    """What a sink calls the texts of one prompt; a name that ends in "/" would be none."""
    return f"sample/{values['prompt'] or '(no prompt)'}"


def event_files(folder, step):
    """TensorBoard's part; its package is imported here, in the thread of the sink."""
    from training.event_files import EventFiles
    return EventFiles(folder, step, numbers, sample_name)


def wandb_package():
    """Weights & Biases, imported when it is asked for: 27 MB with all it needs."""
    import wandb
    return wandb


class WandB:
    """One run of Weights & Biases; a resume goes on with it by its id. Its figures count our steps,
    so that a rewound run may repeat some.
    """

    def __init__(self, args, run_dir, run_id):
        wandb = wandb_package()
        Path(args.log_dir).mkdir(parents=True, exist_ok=True)
        self.html = wandb.Html
        self.run = wandb.init(
            project=args.wandb_project,
            entity=args.wandb_entity,
            group=args.wandb_group,
            mode=args.wandb_mode,
            tags=[tag for words in args.wandb_tags for tag in split_list(words)],
            name=args.wandb_name or run_dir.name,
            id=run_id,
            resume="allow",
            dir=args.log_dir,
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                init_timeout=PATIENCE,
                finish_timeout=PATIENCE,
                finish_timeout_raises=True,
            ),
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, event, values):
        if event == "meta":
            self.run.config.update(values["config"], allow_val_change=True)
        elif event == "sample":
            prompt = html.escape(values["prompt"])
            answer = html.escape(values["text"])
            page = self.html(f'<p lang="hi"><b>{prompt}</b>{answer}</p>')
            self.run.log({sample_name(values): page, "step": values["step"]})
        elif "step" in values:
            self.run.log({**numbers(event, values), "step": values["step"]})

    def close(self):
        self.run.finish()


class Sink(threading.Thread):
    """One place that events go to, opened, fed and closed in a thread of its own."""

    def __init__(self, name, make, room=ROOM):
        super().__init__(name=name, daemon=True)
        self.make = make
        self.waiting = queue.Queue(room)
        self.dead = False
        self.start()

    def run(self):
        try:
            target = self.make()
            for item in iter(self.waiting.get, None):
                target.write(*item)
            target.close()
        except (Exception, SystemExit) as error:  # whatever another package's code may raise
            self.drop(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def drop(self, why):
        if not self.dead:
            self.dead = True
            say(f"warning: {self.name}: {why}; nothing more goes there, the training goes on")

    def put(self, item):
        try:
            if not self.dead:
                self.waiting.put_nowait(item)
        except queue.Full:
            self.drop(f"{ROOM:,} events behind")

    def finish(self, seconds):
        self.put(None)
        if not self.dead:
            self.join(seconds)
            if self.is_alive():
                self.drop(f"not done after {seconds:.0f} s")


def check_sinks(args):
    """Before anything is loaded: a package or an account that a flag asks for is there, or exit 3.
    """
    if args.live == "rich":
        need("rich", "for --live rich")
    if args.tensorboard == "on":
        need("tensorboard", "for --tensorboard on")
    if args.wandb:
        need("wandb", "for --wandb")
        mode = args.wandb_mode or os.environ.get("WANDB_MODE", "online")
        if mode == "online":
            # a network that is down now may be back later
            if not wandb_package().login(prompt=False, verify=False):
                raise UserError(
                    "--wandb: nobody is logged in here: wandb login, or --wandb_mode offline",
                    code=3,
                )


def wandb_id(args, before):
    """The id that this run has at W&B: the one asked for, that of the run it goes on with, or a new
    one.
    """
    if not args.wandb:
        return before
    return args.wandb_id or before or os.urandom(4).hex()


def open_sinks(args, run_dir, run_id, step):
    """The sinks that are asked for. auto: TensorBoard if it is installed and the tests have not
    turned it off.
    """
    wanted = args.tensorboard == "on"
    if args.tensorboard == "auto":
        wanted = os.environ.get("ARIA_TENSORBOARD") != "off"
    sinks = []
    if wanted and importlib.util.find_spec("tensorboard") is None:
        say(
            "notice: TensorBoard is not installed, so no event files are written (train.jsonl and "
            "the report are): python -m pip install tensorboard, or --tensorboard off"
        )
    elif wanted:
        folder = Path(args.log_dir, run_dir.name)
        sinks.append(Sink("TensorBoard", lambda: event_files(folder, step)))
    if args.wandb:
        sinks.append(Sink("Weights & Biases", lambda: WandB(args, run_dir, run_id)))
    return sinks


# ---- the progress --------------------------------------------------------------------------------

def duration(seconds):
    """Seconds -> "4:05", "2:04:05" or from a day on "26 d 20 h"."""
    left = round(seconds)
    if left >= 86400:
        return f"{left // 86400} d {left // 3600 % 24} h"
    if left >= 3600:
        return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    return f"{left // 60}:{left % 60:02d}"


class Bar:
    """--live basic: one line that is redrawn."""

    def __init__(self, progress):
        self.held = ""                       # the last held-out figure
        self.bar = tqdm(
            total=progress.total,
            initial=progress.done,
            unit="step",
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} {elapsed}{postfix}",
        )

    def scored(self, progress, nats):
        self.held = f"{progress.measure} {nats:.3f}, "

    def show(self, progress, loss, gnorm, mask, mfu, memory, **_):
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, {self.held}{progress.tok_s:,.0f} tok/s, ETA {progress.eta}, "
            f"MFU {mfu:.0%}, gnorm {gnorm:.2f}, mask {mask:.2f}, {memory / 1024:.1f} GB",
            refresh=False,
        )
        self.bar.update(progress.done - self.bar.n)          # less than 0 after a rollback

    def close(self):
        self.bar.close()


@contextlib.contextmanager
def until_it_is_gone(terminal):
    """Around what draws on it."""
    try:
        yield
    except OSError:
        mute(terminal)


class Progress:
    """The progress of a run: a picture of it on a terminal, or plain lines alone; speed and time
    left from its own steps.

    Only training steps are timed: evaluation and saving do not count. The first ten steps warm up
    and are left out of the estimate as soon as there are others.
    """

    def __init__(self, args, start, title):
        self.live = args.live
        self.title = title
        terminal = sys.stderr.isatty()
        if args.live == "auto":
            self.live = "basic" if terminal and not args.quiet else "off"
        if args.live == "rich" and not terminal:
            say("notice: --live rich needs a terminal, and this is none: plain lines")
            self.live = "off"
        self.measure = args.measure
        self.total = args.max_steps
        self.first = start
        self.done = start
        self.began = time.perf_counter()
        self.lengths = args.lengths
        self.rows = args.rows
        self.seconds = deque(maxlen=50)      # of a token, in the last steps
        self.speeds = []                     # tokens per second of every step
        self.picture = None

    def __enter__(self):
        if self.live == "basic":
            self.picture = Bar(self)
        if self.live == "rich":
            from training.live import View
            self.picture = View(self.title)
        return self

    def __exit__(self, *_):
        if self.picture is not None:
            self.picture.close()

    def step(self, done, tokens, seconds, **figures):
        """figures: loss gnorm mask mfu memory lr of the step."""
        self.done = done
        if done == self.first + 11:
            self.seconds.clear()
        self.seconds.append(seconds / tokens)
        self.speeds.append(tokens / seconds)
        self.tok_s = 1 / statistics.median(self.seconds)
        if self.picture is not None:
            with until_it_is_gone(sys.stderr):
                self.picture.show(self, **figures)

    def scored(self, nats):
        """There is a new held-out figure."""
        if self.picture is not None:
            with until_it_is_gone(sys.stderr):
                self.picture.scored(self, nats)

    @property
    def eta(self):
        """The time of the steps that are left."""
        return self.time_of_steps(self.done)

    @property
    def whole(self):
        """The time of all steps at the speed of now, also of those before a resume."""
        return self.time_of_steps(0)

    def time_of_steps(self, done):
        tokens = self.lengths.tokens(self.total, self.rows)
        tokens -= self.lengths.tokens(done, self.rows)
        return duration(tokens * statistics.mean(self.seconds))

    @property
    def elapsed(self):
        return time.perf_counter() - self.began

    def line(self, text):
        say(text)


# ---- the summary ---------------------------------------------------------------------------------

def summary(args, run_dir, params, data, best, bits, progress, tokens_seen, step):
    """summary.md: what was trained, how it went, how to go on."""
    source = data.meta["source"]
    if source == "builtin":
        source += " (synthetic: written by a program, not real text)"
    bound = "not measured"
    if math.isfinite(best):
        bound = f"{best:.4f} nats/token"
    if bits is not None:
        bound += f", {bits:.4f} bits/byte"
    tok_s = math.nan
    if progress.speeds:
        tok_s = statistics.median(progress.speeds[10:] or progress.speeds)

    attention = ""
    if args.attn != "mha":
        attention = f", attention {args.attn}"

    rows = f"{args.rows} of {args.lengths.at(0)} tokens a step"
    if args.seq_schedule:
        rows = f"{args.rows} a step, length by step {args.lengths}"
        if args.keep_tokens:
            tokens = args.lengths.step_tokens(args.lengths.at(0), args.rows)
            rows = f"{tokens} tokens a step, length by step {args.lengths}"

    lines = [
        f"# {run_dir}: step {step} of {args.max_steps}",
        "",
        f"- model: {args.model}, {params:,} parameters, d_model {args.d_model}, "
        f"{args.n_layers} layers, d_ff {args.d_ff}{attention}",
        f"- text: {args.data_dir}, source {source}, {data.meta['train_tokens']:,} tokens; "
        f"{tokens_seen:,} seen, {tokens_seen / params:.2f} per parameter",
        f"- rows: {rows}",
        f"- best held-out {args.measure}: {bound}",
        f"- speed: median {tok_s:,.0f} tokens/s; {progress.elapsed:.0f} s in all; peak memory "
        f"{peak_memory_mb():.0f} MB",
    ]
    if Path(run_dir, "latest").is_file():
        for what, command in next_commands(run_dir, step, args.max_steps, data.meta["source"]):
            lines.append(f"- {what}: {command}")
    return "\n".join(lines) + "\n"
