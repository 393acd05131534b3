"""Where the events of a run go besides train.jsonl: TensorBoard and Weights & Biases, neither of which can stop the training.

    log = sinks.Events(json_lines, sinks.opened(args, run_dir, run_id, first_step))
    log.write("train", step=1, loss=8.9)              # train.jsonl at once, the others in threads of their own
    tensorboard --logdir logs                         # --tensorboard auto: whenever that package is installed
    python -m train --wandb --wandb_mode offline      # nothing is sent unless --wandb says so

Used by train.py. A sink that raises, hangs or falls behind is named once and dropped: the training only puts into its queue.
Both packages are imported when a sink opens, in its thread; the numbers of an event become EVENT/KEY.
"""
import html
import importlib.util
import os
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from common.flags import UserError, knob, need, say, split_list

ROOM = 10_000            # events that may wait for a sink; one that is further behind is dropped
PATIENCE = 30            # seconds that W&B may take to begin, and to end
HURRY = 3                # seconds that all sinks have together when the run was told to stop


@dataclass
class SinkKnobs:
    "Other logs"
    tensorboard: str = knob("auto", "event files in --log_dir; auto = where the package is installed", "ignore", bare="on",
                            choices=("auto", "on", "off"), aliases=("tb",), rare=True)
    log_dir: str = knob("logs", "folder of TensorBoard and of W&B's own files", "ignore", rare=True)
    wandb: bool = knob(False, "send the log to Weights & Biases", "ignore")
    wandb_project: str = knob("aria", "its project", "ignore", rare=True)
    wandb_entity: str = knob(None, "its account or team", "ignore", rare=True)
    wandb_group: str = knob(None, "its group of runs", "ignore", rare=True)
    wandb_tags: tuple = knob((), "its tags, A,B or A B", "ignore", many="several", rare=True)
    wandb_name: str = knob(None, "its name for the run; none = the run folder's", "ignore", rare=True)
    wandb_id: str = knob(None, "its run to go on with; none = that of the checkpoint, or a new one", "ignore", rare=True)
    wandb_mode: str = knob(None, "offline keeps the files here; none = WANDB_MODE, else online", "ignore", rare=True,
                           choices=("online", "offline", "disabled"))

    def problems(self):
        for name in ("entity", "group", "tags", "name", "id", "mode"):
            if getattr(self, f"wandb_{name}") and not self.wandb:
                yield f"--wandb_{name} needs --wandb"


def numbers(event, values):
    """The figures of an event as {"train/loss": 8.9}; an object inside, such as by_block, one level deeper."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= numbers(f"{event}/{key}", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
            flat[f"{event}/{key}"] = value
    return flat


class TensorBoard:
    """Event files in a folder; what an earlier run or a rewound one had written there from `step` on no longer counts."""

    def __init__(self, folder, step):
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        self.event, self.summary, self.tensor, self.shape = event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2
        self.writer = EventFileWriter(str(folder))
        self.begin(step)

    def begin(self, step):
        start = self.event.SessionLog(status=self.event.SessionLog.START)
        self.writer.add_event(self.event.Event(wall_time=time.time(), step=step, session_log=start))

    def text(self, tag, words):
        plugin = self.summary.SummaryMetadata.PluginData(plugin_name="text")
        tensor = self.tensor.TensorProto(dtype="DT_STRING", string_val=[words.encode()], tensor_shape=self.shape.TensorShapeProto(
            dim=[self.shape.TensorShapeProto.Dim(size=1)]))
        return self.summary.Summary.Value(tag=tag, metadata=self.summary.SummaryMetadata(plugin_data=plugin), tensor=tensor)

    def write(self, event, values):
        if event == "rollback":
            self.begin(values["to"] + 1)
        rows = [self.summary.Summary.Value(tag=tag, simple_value=value) for tag, value in numbers(event, values).items()]
        if event == "sample":
            rows.append(self.text(f"sample/{values['prompt']}", values["prompt"] + values["text"]))
        if rows and "step" in values:
            self.writer.add_event(self.event.Event(wall_time=time.time(), step=values["step"],
                                                   summary=self.summary.Summary(value=rows)))
            self.writer.flush()                                   # a full disk shows here

    def close(self):
        self.writer.close()


class WandB:
    """One run of Weights & Biases, gone on with by its id; its figures count our steps, so that a rewound run may repeat some."""

    def __init__(self, args, run_dir, run_id):
        import wandb
        Path(args.log_dir).mkdir(parents=True, exist_ok=True)
        self.html = wandb.Html
        self.run = wandb.init(
            project=args.wandb_project, entity=args.wandb_entity, group=args.wandb_group, mode=args.wandb_mode,
            tags=[tag for words in args.wandb_tags for tag in split_list(words)], name=args.wandb_name or run_dir.name,
            id=run_id, resume="allow", dir=args.log_dir,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, init_timeout=PATIENCE,
                                    finish_timeout=PATIENCE, finish_timeout_raises=True))
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, event, values):
        if event == "meta":
            self.run.config.update(values["config"], allow_val_change=True)
        elif event == "sample":
            text = f'<p lang="hi"><b>{html.escape(values["prompt"])}</b>{html.escape(values["text"])}</p>'
            self.run.log({f"sample/{values['prompt']}": self.html(text), "step": values["step"]})
        elif "step" in values:
            self.run.log({**numbers(event, values), "step": values["step"]})

    def close(self):
        self.run.finish()


class Sink(threading.Thread):
    """One place that events go to, opened, fed and closed in a thread of its own."""

    def __init__(self, name, make, room=ROOM):
        super().__init__(name=name, daemon=True)
        self.make, self.waiting, self.dead = make, queue.Queue(room), False
        self.start()

    def run(self):
        try:
            target = self.make()
            while (item := self.waiting.get()) is not None:
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


class Events:
    """The log of a run: train.jsonl, then every sink."""

    def __init__(self, file, sinks):
        self.file, self.sinks = file, sinks

    def write(self, event, **values):
        self.file.write(event, **values)
        for sink in self.sinks:
            sink.put((event, values))

    def close(self, hurry=False):
        self.file.close()
        until = time.monotonic() + (HURRY if hurry else PATIENCE + HURRY)
        for sink in self.sinks:
            sink.finish(max(0, until - time.monotonic()))


# ---- what the flags ask for ------------------------------------------------------------------------------------------

def check(args):
    """Before anything is loaded: a package or an account that a flag asks for is there, or exit 3."""
    if args.tensorboard == "on":
        need("tensorboard", "for --tensorboard on")
    if args.wandb:
        need("wandb", "for --wandb")
        if (args.wandb_mode or os.environ.get("WANDB_MODE", "online")) == "online":
            import wandb
            if not wandb.login(prompt=False, verify=False):       # a network that is down now may be back later
                raise UserError("--wandb: nobody is logged in here: wandb login, or --wandb_mode offline", code=3)


def wandb_id(args, before):
    """The id that this run has at W&B: the one asked for, that of the run it goes on with, or a new one."""
    return args.wandb_id or before or os.urandom(4).hex() if args.wandb else before


def opened(args, run_dir, run_id, step):
    """The sinks that are asked for. auto: TensorBoard if it is installed and the tests have not turned it off."""
    wanted = args.tensorboard == "on" or args.tensorboard == "auto" and os.environ.get("ARIA_TENSORBOARD") != "off"
    sinks = []
    if wanted and importlib.util.find_spec("tensorboard") is None:
        say("notice: TensorBoard is not installed, so no event files are written (train.jsonl and the report are): "
            "python -m pip install tensorboard, or --tensorboard off")
    elif wanted:
        sinks.append(Sink("TensorBoard", lambda: TensorBoard(Path(args.log_dir, run_dir.name), step)))
    if args.wandb:
        sinks.append(Sink("Weights & Biases", lambda: WandB(args, run_dir, run_id)))
    return sinks
