"""The plan of a large run: the command for train, and what it will take of tokens, memory and time.

    args, origins = parse(argv)
    plan = Plan(args, origins)           # a UserError says what cannot be
    plan.lines()                         # [plan] ...
    plan.command()                       # the words of a shell
    plan.remarks                         # what a person should know

Used by run_1b_launch.py. No torch and nothing of the model is built: a plan has to be instant.
"""
import dataclasses
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import cli
import config
import model_config
from common.console import UserError
from common.files import ROOT, read_json
from common.flags import checked, defaults_of_later, show
from config import GPT2_PIECES, LaunchArgs, TrainArgs, variant_name
from evaluation.study_plan import flops
from model_config import ModelFlags
from text.token_file import is_token_file, meta_path, read_meta
from training.footprint import footprint
from training.lengths import warnings

GB = 1e9
TIERS = (80, 48, 24, 16)       # GB of the GPUs that a plan is compared with
ROOM = 0.9                     # of them that a plan may take: the context and losses need the rest
WELL_TRAINED = 20              # tokens for each parameter, of the scaling laws
MOST_EPOCHS = 4                # passes over a text that are as good as new text
FOLDER = re.compile(r"(.+)_(mha|baseline|gqa|gqa_kv2|bottleneck|decoupled)_seed([0-9]+)(_v[0-9]+)?")

# fields of TrainArgs that the launcher sets by itself, or that are its own
OURS = {"output_dir", "resume", "resume_latest", "ckpt", "preset", "config", "edge_profile",
        "version", "print_config"}
OF_PRIMARY = {"memory_slots", "conv_kernel", "d_mem"}
SHAPE = {
    field.name for field in dataclasses.fields(ModelFlags) if field.metadata["resume"] == "must"
}


def parse(argv):
    """-> the launcher's arguments, checked, and their origins."""
    return cli.parse(LaunchArgs, argv, "run_1b_launch", tier=base)


def base(typed):
    """The settings just above the defaults; --tier auto becomes that of this machine's GPU."""
    if typed.get("tier") != "auto":
        return config.launch_base(typed)
    memory = gpu_memory()
    fitting = [name for name, (least, _) in config.LAUNCH_TIERS.items() if memory >= least]
    if not fitting:
        raise UserError(
            f"--tier auto: a GPU with {memory / GB:.0f} GB is seen here, and the tiers begin at "
            f"16: name one of them ({', '.join(config.LAUNCH_TIERS)}), or take --preset medium"
        )
    return config.launch_base(typed | {"tier": fitting[0]})


def gpu_memory():
    """Bytes of the first GPU, as its driver says; 0 where none is seen."""
    words = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
        return int(done.stdout.split()[0]) * 2**20
    except (OSError, subprocess.TimeoutExpired, LookupError, ValueError):
        return 0


# --------------------------------------------------------------------------------------------------
# the text and the checkpoint

def vocabulary(args):
    """The pieces of the text, from what lies there; GPT-2's where nothing does."""
    meta = Path(args.data_dir, "meta.json")
    if meta.exists():
        return read_json(meta).get("vocab_size", GPT2_PIECES)
    return args.vocab_size or GPT2_PIECES


def tokens_of_text(args):
    """How many tokens the text has; None where that is not said."""
    path = Path(args.data_dir)
    if (path / "meta.json").exists():
        return read_json(path / "meta.json").get("train_tokens")
    if is_token_file(path) and path.exists() and meta_path(path).exists():
        return read_meta(path)["tokens"]
    return None


def resumed_folder(args):
    """The run folder that a resume goes on in, by names alone; None: nothing is resumed."""
    if not args.resume and not args.resume_latest:
        return None
    path = args.run_dir
    if args.resume not in (None, "latest"):
        path = Path(args.resume)
    elif args.ckpt:
        path = Path(args.ckpt)
    for folder in (path, path.parent):
        if (folder / "latest").is_file():
            return folder
    if args.resume_latest:
        return None                             # nothing is there yet: it starts fresh
    return path if not path.suffix else path.parent


def take_over(args, origins, saved):
    """What was not typed is as in the run that is resumed."""
    for name, value in (defaults_of_later(TrainArgs) | saved).items():
        rule = TrainArgs.__dataclass_fields__[name].metadata["resume"]
        if origins[name] != "flag" and rule != "ignore":
            setattr(args, name, value)
            origins[name] = "checkpoint"


def check_folder(args, origins, folder):
    """A usage error where a typed tag is another one than that of the folder's name."""
    found = FOLDER.fullmatch(folder.resolve().name)
    if origins["tag"] == "flag" and found and found[1] != args.tag:
        raise UserError(f"--tag {args.tag}, but {folder} is a run of the tag {found[1]}")


# --------------------------------------------------------------------------------------------------
# the command

def words_of(name, value):
    """A flag as words of a command line."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    if isinstance(value, tuple):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", show(value)]


def train_words(args, origins, folder):
    """The arguments of train: what was typed, and what differs from its own defaults. A resume into
    `folder` has its settings there already: with what was typed comes the shape alone, as the typed
    widths are checked with it. Of a budget a new run gets the steps; a resume solves it by its own
    settings.
    """
    words = []
    for field in dataclasses.fields(TrainArgs):
        name, value = field.name, getattr(args, field.name)
        wanted = origins[name] == "flag"
        if value != field.default and name not in OF_PRIMARY:
            wanted = wanted or not folder or name in SHAPE
        if name == "target_tokens":
            wanted = wanted and folder
        if wanted and name not in OURS:
            words += words_of(name, value)
    if folder:
        source = args.resume if args.resume not in (None, "latest") else args.ckpt
        return [*words, "--resume", str(source or folder)]
    words += ["--output_dir", str(args.run_dir)]
    if args.ckpt:
        words += ["--ckpt", args.ckpt]
    if args.resume_latest:
        words.append("--resume_latest")
    return words


def match_baseline(args):
    """--match params: the d_ff that gives the variant as many parameters as the baseline has."""
    shape = model_config.model_config(args, vocabulary(args))
    widths = dict.fromkeys(model_config.ATTENTION_WIDTHS, 0)
    options = dict.fromkeys(model_config.ATTENTION_OPTIONS, False)
    baseline = dataclasses.replace(shape, attn="mha", **widths, **options)
    args.d_ff = model_config.match_d_ff(shape, model_config.count_params(baseline))


# --------------------------------------------------------------------------------------------------
# the plan

class Plan:
    """What is asked for (args, of the launcher), what train is given (words, train), and what
    follows: lengths, shape, tokens, flops of a token, peak of memory, folder.
    """

    def __init__(self, args, origins):
        self.args = args
        self.remarks = []
        self.folder = resumed_folder(args)
        saved = None
        if self.folder:
            check_folder(args, origins, self.folder)
            saved = self.saved_settings()
        if saved:
            take_over(args, origins, saved)
        if args.match == "params":
            match_baseline(args)
        self.remarks += [f"notice: {sentence}" for sentence in args.idle(origins)]

        # what train makes of its words, with all of its own checks
        self.words = train_words(args, origins, self.folder)
        words = self.words
        if self.folder and not saved:
            words = train_words(args, origins, None)
        self.train, train_origins = cli.parse(TrainArgs, words, "train")
        if saved:
            self.train, changes = cli.resume_check(saved, self.train, train_origins)
            self.remarks += [f"notice: changed on resume: {change}" for change in changes]
        self.compute()
        self.warn()

    def saved_settings(self):
        """The settings of the run that is resumed; None where it is not there."""
        path = self.folder / "config.json"
        if path.is_file():
            return checked(TrainArgs, read_json(path), path)
        self.remarks.append(
            f"warning: there is no run in {self.folder}: this is the plan of the flags, and --run "
            "would end here"
        )
        return None

    def compute(self):
        """The figures."""
        train = self.train
        self.rows = train.rows
        self.lengths = train.lengths
        self.tokens = self.lengths.tokens(train.max_steps, self.rows)
        self.shape = model_config.model_config(train, vocabulary(self.args))
        self.params = model_config.count_params(self.shape)
        self.mixed = train.amp != "off"
        if train.device == "cpu":
            self.mixed = train.amp == "on"
        self.peak = max(
            (self.memory(stage.length) for stage in train.stages), key=lambda peak: peak.total
        )
        self.flops = flops(self.shape, train)

    def memory(self, length):
        """The Footprint of rows of this length."""
        return footprint(self.train, self.shape, length, self.mixed, self.args.gpus)

    @property
    def speeds(self):
        """Tokens a second, the lowest first."""
        return self.args.speeds or [measured_speed(self.args.tok_s)]

    @property
    def out(self):
        """The run folder, before --if_exists."""
        return self.folder or self.args.run_dir

    # ---- what a person should know ---------------------------------------------------------------

    def warn(self):
        args, train = self.args, self.train
        say = self.remarks.append
        for sentence in warnings(self.lengths, train.max_steps):
            say(f"warning: {sentence}")
        for sentence in model_config.attention_warnings(train):
            say(f"warning: {sentence}")
        if train.device != "cpu" and not gpu_memory():
            say("warning: no GPU is seen here (nvidia-smi)")
        if not Path(args.data_dir).exists():
            say(
                f"warning: {args.data_dir} is not there: python -m prepare_fineweb --tokens 1B "
                f"--output {shlex.quote(args.data_dir)} makes it"
            )
        text = tokens_of_text(args)
        if text and self.tokens > MOST_EPOCHS * text:
            say(
                f"warning: {self.tokens / text:.1f} passes over the {text:,} tokens of "
                f"{args.data_dir}: above {MOST_EPOCHS}, more text is better"
            )
        if self.tokens < self.params:
            say(
                f"warning: {self.tokens / self.params:.2f} tokens for each parameter, far below "
                f"the {WELL_TRAINED} of a well trained model: --target_tokens 20B asks for more"
            )
        tier = self.args.tier.removesuffix("gb")
        if tier.isdecimal() and not self.fits(int(tier)):
            say(
                f"warning: {self.peak.total / GB:.1f} GB is more than {ROOM:.0%} of --tier "
                f"{args.tier}: shorter rows, or --preset medium"
            )

    def fits(self, tier):
        return self.peak.total <= ROOM * tier * GB

    # ---- what is printed -------------------------------------------------------------------------

    def lines(self):
        """The plan, line by line."""
        return [f"[plan] {line}" for line in self.sentences()]

    def sentences(self):
        args, train = self.args, self.train
        target = args.target_tokens or "none"
        yield (
            f"global_batch={self.rows} steps={train.max_steps} "
            f"planned_tokens≈{self.tokens / 1e9:.3f}B (target={target})"
        )
        yield f"lengths={self.lengths} blocks={self.block_rules()}"
        yield (
            f"model={train.model} variant={variant_name(train)} params={self.params / 1e9:.3f}B "
            f"tokens/param={self.tokens / self.params:.2f} ({WELL_TRAINED} is well trained: about "
            f"{WELL_TRAINED * self.params / 1e9:.1f}B tokens)"
        )
        parts = [
            f"{name} {size / GB:.2f}" for name, size in self.peak.parts.items() if size >= 5e6
        ]
        answers = ["yes" if self.fits(tier) else "no" for tier in TIERS]
        yield (
            f"memory≈{self.peak.total / GB:.1f} GB: {' + '.join(parts)}, {self.peak.moment}; fits "
            f"{'/'.join(map(str, TIERS))} GB: {'/'.join(answers)}"
        )
        yield self.hours()
        yield f"arithmetic≈{self.flops / 1e9:.1f} GFLOP a token: {self.asked_speed()}"
        yield f"out={self.out}"

    def block_rules(self):
        return "left to right" if self.train.causal else self.train.train_block_sizes

    def hours(self):
        """How long it takes at the given speeds, and what that costs."""
        hours = [self.tokens / speed / 3600 for speed in reversed(self.speeds)]
        speeds = "-".join(f"{speed:.0f}" for speed in reversed(self.speeds))
        line = f"time≈{'-'.join(f'{hour:.1f}' for hour in hours)} h at {speeds} tok/s"
        if self.args.price:
            each = self.args.price * self.args.gpus
            costs = "-".join(f"{hour * each:.0f}" for hour in hours)
            line += f", cost≈{costs} at {self.args.price:g} an hour and GPU"
        return line

    def asked_speed(self):
        """What the speeds ask of the GPU."""
        asked = "-".join(f"{speed * self.flops / 1e12:.0f}" for speed in reversed(self.speeds))
        line = f"that speed asks for {asked} TFLOP/s"
        if self.args.tok_s == LaunchArgs.tok_s and not self.train.causal:
            line += "; it is the guide's, for a causal model, and both streams are trained here"
        return line

    def command(self):
        """The command as words: this interpreter, or torchrun's launcher, and train."""
        words = [self.args.python or sys.executable]
        if self.args.gpus > 1:
            words += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            words += [str(self.args.gpus)]
        return [*words, "-m", "train", *self.words]


def measured_speed(path):
    """The median tokens a second of a run, from its train.jsonl."""
    log = Path(path, "train.jsonl")
    if not log.is_file():
        raise UserError(
            f"--tok_s {path}: must be a number, two such as 10000-25000, or a run folder with a "
            "train.jsonl"
        )
    found = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "train":
            found.append(event.get("tok_s"))
    numbers = [speed for speed in found if isinstance(speed, (int, float)) and speed > 0]
    if not numbers:
        raise UserError(f"--tok_s {path}: {log} has no finished step")
    return statistics.median(numbers)


def environment(inherited):
    """Of the process that trains: it finds this project's modules wherever it was started."""
    paths = [str(ROOT), inherited.get("PYTHONPATH", "")]
    return {**inherited, "PYTHONPATH": ":".join(filter(None, paths))}
