"""Everything that a training needs before its first step: machine, text, model, optimizer, resume.

    run = setup(args, origins, ranks, run_dir, source, resuming)      # None: there is nothing to do

Used by train.py. The stages stand in the order in which they run; each one takes the Run and adds
to it. What is typed wrong, does not fit or does not belong together ends here in one sentence,
before anything in the run folder changes.
"""
import contextlib
import sys
import time
from pathlib import Path

import torch

import checkpoint
import cli
import config
import gaussian
import lora
import masking
import model_config
from common import machine
from common.console import UserError, say
from common.files import to_json
from common.flags import to_dict
from gaussian_model import network_of
from text import starter
from text.build import build as build_text
from text.gpt2 import open_tokenizer
from text.interlace import is_interlaced, typed_in
from text.pairs import are_pairs, held_out_rows
from text.token_file import open_split
from training import lengths, logs, optim, recovery, rounding, row_length, run_folder
from training.footprint import of_a_parameter
from training.saving import publish, restore
from training.state import RunState
from training.step import probe

MANY_EPOCHS = 8  # docs/experiments/, 2026-11-27: from there on left to right is learned by heart
BUDGET_EPOCHS = 4  # a budget of more passes than these is warned of
ANSWERED = dict(min_mask_rate=0.6, max_mask_rate=1.0)  # of transliteration; docs/experiments/


class Run:
    """What a step, an evaluation and a save need; the same on every rank but for `mine`.

    args origins ranks folder            what was asked for, the processes, the run folder
    saved resuming in_place notes        the checkpoint it begins with, and what to say of that
    device dtype allocator precision     the machine; dtype is None in float32
    data val windows tokenizer           the text; val is None where nobody asks held-out text
    cfg model loss_of params trained     the network, the module whose forward is its loss, how many
                                         parameters there are, and how many of them learn
    optimizer ema scaler spikes          what a checkpoint holds besides the weights
    state                                the counters (training/state.py)
    length rows mine step_tokens        tokens of a row now, rows of a step, this rank's, its tokens
    micro fits                           rows of a forward; tokens of one, if memory ran out
    held held_asked blocks prompts       the held-out windows, which of their tokens are asked, the
                                         block rules that are scored, the prompts that are continued
    stop log progress                    signals, train.jsonl and its sinks, the console
    """

    def __init__(self, args, origins, ranks, folder):
        self.args = args
        self.origins = origins
        self.ranks = ranks
        self.folder = folder
        self.notes = []
        self.base = None             # of --lora_rank: the checkpoint that the adapters stand on
        self.state = RunState()
        self.timed = False           # whether the time to go was said
        self.fits = None             # tokens of a forward, once memory ran out

    def autocast(self):
        return machine.autocast(self.device, self.dtype)

    def averaged(self):
        """Inside, the model has its averaged weights, if it keeps some."""
        return self.ema.swap() if self.ema else contextlib.nullcontext()

    @property
    def scoring_rows(self):
        """Held-out rows in a forward; all are as long as the longest rows of the run."""
        return row_length.micro_at(self, self.args.longest)

    def held_part(self, rows):
        """The first held-out windows, and which of their tokens are asked (None: all)."""
        asked = self.held_asked
        return self.held[:rows], asked if asked is None else asked[:rows]

    def anomaly_detection(self):
        """Inside, --detect_anomaly names the operation whose gradient is NaN."""
        return torch.autograd.set_detect_anomaly(self.args.detect_anomaly)


def setup(args, origins, ranks, run_dir, source, resuming):
    """All stages -> the Run; None if the run that was named is already done."""
    logs.check_sinks(args)
    run = Run(args, origins, ranks, run_dir)
    run.resuming = resuming
    pick_machine(run)
    load_checkpoint(run, source)
    open_text(run)
    if is_done(run):
        return None
    build(run)
    resume(run)
    say_what_runs(run)
    hold_out(run)
    fit_memory(run)
    claim_folder(run)
    if run.args.compile:
        with run.autocast():
            compile_step(run.model, run.args, shapes_to_come(run), run.device)
    run.loss_of = ranks.replicate(run.loss_of)  # after the probe and the compiler: see there
    run.environment = machine.environment(run.device)
    return run


# ---- the machine and the checkpoint --------------------------------------------------------------

def pick_machine(run):
    args = run.args
    run.allocator = machine.start(args.threads)
    run.device = machine.pick_device(args.device)
    on_cpu = run.device.type == "cpu" and run.origins["device"] != "flag"
    if args.preset in config.GPU_ONLY_PRESETS and on_cpu:
        raise UserError(
            f"--preset {args.preset} is made for GPUs and there is none here: add --device cpu to "
            "train it on the CPU nevertheless, or take --preset starter"
        )


def load_checkpoint(run, source):
    """The checkpoint to begin with, and the settings that a resume takes over from it."""
    args, ranks = run.args, run.ranks
    run.saved = None
    if source:
        found = None
        if ranks.main:
            inside = run.resuming and checkpoint.candidates(source)[0].parent == run.folder
            parts = () if args.fsdp else checkpoint.PARTS
            found = checkpoint.load(source, parts=parts, quarantine=inside)
        run.saved = ranks.broadcast_checkpoint(found)
    if args.lora_rank:
        check_base(run)
    if run.resuming:
        before = {"args": checkpoint.section(run.saved, "args")}
        run.args, changes = cli.resume_check(before, args, run.origins)
        run.notes = [f"changed on resume: {change}" for change in changes]
    elif run.saved:
        before = {"args": checkpoint.section(run.saved, "args")}
        run.args = cli.take_shape(before, args, run.origins)
    cli.announce(run.args, run.origins)
    if run.origins["d_model"] == "tier":
        say(
            "notice: no GPU, no prepared text and no size asked for: the settings of --preset "
            "starter (--preset none: the large defaults)"
        )
    for idle in run.args.idle(run.origins):
        say(f"notice: {idle}")
    for warning in model_config.attention_warnings(run.args):
        say(f"warning: {warning}")


def check_base(run):
    """Adapters need the weights of another run, in a folder where they stay."""
    rank = run.args.lora_rank
    if not run.saved:
        raise UserError(f"--lora_rank {rank} adapts a trained model: name it with --ckpt PATH")
    if run.resuming and not run.saved.state.get("base"):
        raise UserError(
            f"{run.saved.path} has no adapters to go on with: to begin some beside its weights, "
            "name it with --ckpt instead of --resume"
        )
    if run.resuming:
        return
    if run.saved.state.get("base"):
        raise UserError(
            f"{run.saved.path} is adapters itself, and new ones need whole weights: to go on with "
            "these, name it with --resume, and the new run with --run_name"
        )
    if run.saved.path.parent.resolve() == run.folder.resolve():
        raise UserError(
            f"{run.folder} holds the base, which has to stay where it is: add --run_name NEW"
        )


# ---- the text ------------------------------------------------------------------------------------

def find_data(args, origins):
    """The data folder; when none was asked for and none is there, the starter corpus is prepared,
    never silently.
    """
    folder = Path(args.data_dir)
    if (folder / "meta.json").exists() or origins["data_dir"] not in ("default", "checkpoint"):
        return folder
    if origins["data_dir"] == "checkpoint" and args.data_dir != starter.FOLDER:
        return folder
    say(
        "notice: no prepared text in data/processed, so the built-in starter corpus is used "
        "(synthetic Hindi and Hinglish,\n"
        "        written by a program; for your own text: python -m prepare --source files --input "
        "FILES)"
    )
    build_text(config.starter_args(), say)
    return Path(starter.FOLDER)


def open_text(run):
    """Token files, windows, tokenizer; refuses text that does not belong to the checkpoint."""
    args, saved = run.args, run.saved
    for stage in args.stages:
        run.ranks.share(args.rows_at(stage.length))
    with run.ranks.main_first():
        data_dir = find_data(args, run.origins)
    args.data_dir = str(data_dir)
    # it listens from the loop on; before the loop there is nothing to save
    run.stop = machine.StopFlag(run.ranks)
    how = (args.val_frac, args.data_format, args.vocab_size)
    run.data = open_split(data_dir, "train", *how)
    scores = args.eval_interval > 0 or run.data.meta["val_tokens"] >= args.longest
    run.val = open_split(data_dir, "val", *how) if scores else None
    run.tokenizer = open_tokenizer(run.data.tokenizer_path)
    has_pad = run.tokenizer.pad_id is not None
    framed = are_pairs(run.data)
    interlaced = is_interlaced(run.data)
    run.cfg = model_config.model_config(args, run.data.vocab_size, has_pad, framed, interlaced)
    if not run.cfg.answers:
        run.data.need(args.longest)
    elif args.seq_schedule is not None:
        raise UserError(
            f"--seq_schedule {args.seq_schedule}: {data_dir} has one pair a row, and no row may be "
            "shorter than its pair: leave the flag out, --seq_len is enough"
        )
    if interlaced and args.gaussian:
        raise UserError(
            f"{data_dir} has the two sides of each pair in turn, which --objective gaussian does "
            "not learn: use --objective masked"
        )
    if interlaced:
        answer_whole_rows(run)
    begin = saved.step if run.resuming else 0
    row_length.use_length(run, args.lengths.at(begin))
    run.state.window = run.length
    if not framed and run.origins["conditioning_dropout"] == "flag":
        say("notice: --conditioning_dropout does nothing here: this text has no prompts")
    if saved and run.ranks.main and saved.tokenizer_bytes != run.tokenizer.model_bytes:
        refuse_tokenizer(run)
    run.in_place = run.resuming and run.folder.resolve() == saved.path.parent.resolve()
    run.counters = run_folder.counters(saved) if run.resuming else None
    if run.in_place and run.counters["data_sha256"] != run.data.meta["train_sha256"]:
        raise UserError(
            f"{data_dir} has changed since this run began (sha256 "
            f"{run.data.meta['train_sha256'][:12]}, the checkpoint "
            f"{run.counters['data_sha256'][:12]}): {run.data.old_text(saved.state.get('source'))}, "
            "or fork with --run_name NEW"
        )


def answer_whole_rows(run):
    """Where each letter's answer stands beside it, there is nothing to learn but whole rows, mostly
    hidden: sampling begins with masks alone and writes many at once.
    """
    args = run.args
    if args.causal:
        return
    if not run.resuming and {run.origins[name] for name in ANSWERED} == {"default"}:
        for name, rate in ANSWERED.items():
            setattr(args, name, rate)
    whole = dict(train_block_sizes="T", ar_fade=0.0)
    for name, value in whole.items():
        if getattr(args, name) != value and run.origins[name] == "flag":
            raise UserError(
                f"--{name} {getattr(args, name)}: {args.data_dir} is text for transliteration, "
                f"which is learned in whole rows: leave the flag out"
            )
    for name, value in whole.items():
        setattr(args, name, value)


def refuse_tokenizer(run):
    old, new = open_tokenizer(run.saved.tokenizer_bytes), run.tokenizer
    advice = run.data.for_run(run.saved.state.get("source"), run.saved.path / "tokenizer.model")
    raise UserError(
        f"{run.args.data_dir} has a tokenizer of {run.cfg.vocab_size} pieces ({new.sha256[:12]}), "
        f"the checkpoint's has {old.vocab_size} ({old.sha256[:12]}): {advice}"
    )


def is_done(run):
    """Whether a resume has no step left; it may still owe the last evaluation."""
    run.state.first_step = run.saved.step if run.resuming else 0
    if run.state.first_step < run.args.max_steps:
        return False
    if run.resuming and run.counters["eval_due"]:
        return False
    say(f"nothing to do: step {run.state.first_step} of {run.args.max_steps}")
    return True


# ---- model, optimizer, resume --------------------------------------------------------------------

def build(run):
    """The model with its first weights, the optimizer and its helpers."""
    args, ranks, saved = run.args, run.ranks, run.saved
    before = run.counters["precision"] if run.resuming else None
    dtype, run.precision = machine.pick_precision(args.amp, args.amp_dtype, run.device, before)
    known = {str(dtype): dtype for dtype in (None, torch.bfloat16, torch.float16)}
    run.dtype = known[ranks.broadcast_object(str(dtype))]          # rank 0's, if it was measured
    if args.fsdp and run.dtype is torch.float16:
        raise UserError("--fsdp works in bf16 or float32: add --no_amp, or use GPUs with bf16")
    run.room = recovery.check_memory(run.cfg, args, run.scoring_rows, run.device, ranks.world)

    machine.seed_everything(args.seed)
    here = saved and ranks.main and not args.fsdp       # the weights are in this process
    # a fork takes the averaged weights
    part = "model"
    if saved and "ema" in saved.files and not run.resuming:
        part = "ema"
    if here:
        first = first_weights(run)
        checkpoint.may_fit(run.cfg, first)
    # with --fsdp in no memory: each rank makes its part in to_device
    with torch.device("meta" if args.fsdp else "cpu"):
        model = network_of(run.cfg)
    if here:
        checkpoint.load_into(model, first)
    if args.lora_rank:
        lora.adapt(model, args.lora_rank)
        if here and run.resuming:
            checkpoint.load_into(model, first | saved.model)
    if args.param_dtype == "bf16":
        rounding.store_in_bf16(model)
    run.model = ranks.to_device(model, run.device, run.dtype, saved and saved.files[part])
    loss = gaussian.GaussianLoss if args.gaussian else masking.DenoisingLoss
    run.loss_of = loss(run.model)
    run.model.recompute = args.activation_checkpointing
    run.optimizer = optim.make_optimizer(run.model, args)
    run.ema = optim.EMA(run.model, args.ema) if args.ema else None
    run.scaler = optim.LossScaler(run.optimizer, run.device, on=run.dtype is torch.float16)
    run.spikes = recovery.SpikeWatch(args.spike_factor)
    run.params = model_config.count_params(run.cfg)
    run.trained = lora.trained_parameters(run.cfg, args.lora_rank)
    run.saved_args = {"args": to_dict(args, config.TrainArgs), "model": run.cfg.to_dict()}


def first_weights(run):
    """What the model begins with, of adapters their base -> {name: tensor}."""
    saved = run.saved
    if not run.args.lora_rank:
        return saved.model if run.resuming else checkpoint.weights(saved)
    if run.resuming:
        run.base = saved.state["base"]
        return checkpoint.base_weights(saved)
    tensors = checkpoint.weights(saved)
    run.base = {"path": saved.path.as_posix(), "sha256": lora.fingerprint(tensors)}
    return tensors


def resume(run):
    """Counters and optimizer of the checkpoint; what a person should know of the difference."""
    args, state, saved = run.args, run.state, run.saved
    state.step = state.first_step
    has_optimizer = run.resuming and "optimizer" in saved.files
    run.fresh_optimizer = not has_optimizer or args.reset_optimizer
    before = None
    if run.resuming:
        restore(run, saved, not run.fresh_optimizer)
        state.position = run.counters["position"]
        state.window = run.counters["window"]
        state.rollbacks = run.counters["rollbacks"]
        state.held_step = state.first_step - run.counters["eval_due"]
        if run.fresh_optimizer:
            run.notes.append("the optimizer starts fresh")
        if run.in_place:
            before = run.counters["wandb_id"]
            if run.counters["val_sha256"] not in (None, run.data.meta["val_sha256"]):
                run.notes.append(
                    "the validation text is not the one of before: no earlier figure compares, "
                    "`best` starts anew"
                )
        else:
            state.best = float("inf")
            state.kept = float("inf")
        run.notes += run_folder.rate_jump(saved, args, state.first_step)
    run.wandb_id = logs.wandb_id(args, before)


def say_what_runs(run):
    """The lines before the first step: model, text, blocks, memory, too many passes."""
    args, data = run.args, run.data
    run.peak = run.ranks.all_reduce_sum(machine.peak_flops(run.device, run.dtype))
    processes = f", {run.ranks.world} processes" if run.ranks.world > 1 else ""
    sharded = ", sharded" if args.fsdp else ""
    adapters = ""
    if args.lora_rank:
        adapters = f" and {run.trained:,} in adapters, which alone are trained"
    say(
        f"model: {args.model}, {run.params:,} parameters{adapters}, d_ff {args.d_ff}; "
        f"device {run.device}, {torch.get_num_threads()} threads{processes}{sharded}; "
        f"precision {run.precision}; memory: {run.allocator}"
    )
    run.planned = args.lengths.tokens(args.max_steps, args.rows)
    each = f"{run.rows} x {run.length}"
    if args.seq_schedule:
        each = f"{args.rows} x {args.lengths}"
    tokens = data.meta["train_tokens"]
    epochs = args.max_steps * run.rows / run.windows.per_epoch
    if not run.cfg.answers:
        epochs = run.planned / tokens
    say(
        f"data: {args.data_dir} ({data.meta['source']}), {tokens:,} tokens, "
        f"{run.cfg.vocab_size} pieces; "
        f"{args.max_steps} steps of {each} = {run.planned / 1e6:.1f}M tokens, "
        f"{epochs:.2f} epochs; run folder {run.folder}"
    )
    for warning in lengths.warnings(args.lengths, args.max_steps):
        say(f"warning: {warning}")
    fade = round(args.ar_fade * args.max_steps)
    if run.state.first_step < fade and args.objective == "masked":
        say(
            f"blocks: none at first, left to right alone, which until step {fade} gives way to "
            f"{args.train_block_sizes}"
        )
    if run.cfg.answers:
        share = tokens / (run.windows.per_epoch * args.seq_len)
        line = (
            f"pairs: {run.windows.per_epoch:,}, one a row, which fill {share:.0%} of it; the loss "
            "is that of the responses"
        )
        if run.cfg.framed:
            line += f", and {args.conditioning_dropout:.0%} of the rows have no prompt"
        say(line)
    say(f"memory: {run.room}")
    if epochs > 2 * MANY_EPOCHS:
        advised = args.lengths.steps_for(MANY_EPOCHS * tokens, args.rows)
        say(
            f"notice: {epochs:.0f} passes over this text are far too many: it is learned by heart; "
            f"advised is --max_steps {advised} ({MANY_EPOCHS} passes), or more text"
        )
    elif epochs > MANY_EPOCHS:
        say(
            f"notice: {epochs:.0f} passes over this text: left to right unlearns after some five; "
            "the best checkpoint is kept, more text is better"
        )
    elif args.target_tokens and epochs > BUDGET_EPOCHS:
        say(
            f"warning: --target_tokens {args.target_tokens} is {epochs:.1f} passes over this text; "
            f"repeated text teaches less from {BUDGET_EPOCHS} on: more text is better"
        )


def hold_out(run):
    """The windows that are scored, the same at every evaluation, and their block rules."""
    args = run.args
    if run.val:
        count = args.eval_batches * args.batch_size
        held, run.held_asked = held_out_rows(run.val, count, args.longest, args.causal)
    else:
        windows = row_length.windows_at(run, args.longest)
        held = windows.batch(0, args.batch_size)
        run.held_asked = windows.asked(0, args.batch_size)
    run.held = held.to(run.device)
    run.prompts = config.PROMPTS
    if run.cfg.framed:
        # what stands before the response, without BOS and SEP, which decoding leaves out
        pairs = zip(held[:len(config.PROMPTS)], run.held_asked, strict=False)
        run.prompts = [run.tokenizer.decode(ids[:asked.int().argmax()]) for ids, asked in pairs]
    elif run.cfg.interlaced:
        first = held_out_rows(run.val or run.data, len(config.PROMPTS), args.longest)[0]
        run.prompts = [typed_in(ids, run.tokenizer) for ids in first]
    for prompt in args.sample_prompts:
        tokens = len(run.tokenizer.encode(prompt))
        if tokens >= args.longest:
            raise UserError(
                f"--sample_prompts: {prompt[:40]!r} has {tokens} tokens, and a row of this "
                f"training {args.longest}: shorten it"
            )
    run.prompts = args.sample_prompts or run.prompts
    run.blocks = args.block_rules
    # a sharded model cannot speak by itself
    alone = run.ranks.main and not args.fsdp
    run.speaks = args.show_samples and alone
    run.samples = args.sample_every and alone


# ---- memory, the run folder, the compiler --------------------------------------------------------

def fit_memory(run):
    """--auto_batch: as many rows in a forward as fit, the longest of the run; every rank does the
    same number of them.
    """
    if not run.args.auto_batch:
        return
    # the optimizer's state comes with the first step
    later = 0
    if run.fresh_optimizer:
        later = of_a_parameter(run.args)["optimizer"] * run.trained
    first = run.length
    row_length.use_length(run, run.args.longest)
    step = (run.mine.stop - run.mine.start, run.length)
    micro = recovery.measure_rows(
        lambda micro: probe(run, micro), run.micro, step, run.args, run.device, later,
        run.optimizer.zero_grad, say,
    )
    row_length.found_to_fit(run, run.ranks.all_reduce_min(micro))
    row_length.use_length(run, first)


def claim_folder(run):
    """The first change on the disk: the arguments have proved to be sound. An earlier run in the
    folder moves aside, and so do later checkpoints of a run that is taken up at an inner step.
    """
    if run.ranks.main and not run.in_place and run_folder.is_used(run.folder):
        run_folder.archive(run.folder)
    if run.in_place:
        kept = None
        if run.ranks.main:
            kept = run_folder.rewind(
                run.folder, run.saved, run.state.kept, run.args, run.data.meta
            )
        run.state.kept = run.ranks.broadcast_object(kept)


def shapes_to_come(run):
    """[(rows, length)] of the forwards of all steps that are left."""
    found = []
    for stage in run.args.stages:
        shape = (row_length.micro_at(run, stage.length), stage.length)
        if stage.end > run.state.step and shape not in found:
            found.append(shape)
    return found


def forms_of_a_step(args, length):
    """[(block, first)]: each block rule of rows of this length with a first block for every shape
    that its tensors can have, which are another number of blocks, and blocks with padding.
    """
    forms = []
    for block in args.block_rules_at(length):
        if block in (1, length):                        # there is no shorter first block
            forms.append((block, block))
            continue
        known = set()
        for first in range(block, 0, -1):
            places = block - first + length
            form = (-(-places // block), places == length and length % block == 0)
            if form not in known:
                known.add(form)
                forms.append((block, first))
    return forms


def compile_step(model, args, shapes, device):
    """Compile the layers' training form for rows of these shapes (B, T); if that fails, say why and
    go on uncompiled.

    All layers share their graphs: those of forms_of_a_step. What else changes from step to step
    (where block 0 ends, which early exit) stays outside, so that nothing is compiled in mid-run.
    """
    forms = []
    for shape in shapes:
        for block, first in forms_of_a_step(args, shape[1]):
            forms.append((shape, block, first))
    # beyond its own 8 graphs, PyTorch would go on in eager silently
    torch._dynamo.config.recompile_limit = max(64, 2 * len(forms))
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, mode=args.compile_mode, dynamic=False)
    started = time.perf_counter()
    try:
        say(
            f"compile: {len(forms)} forms of a step; on a CPU that takes minutes (each is kept for "
            "the next run)"
        )
        for number, (shape, block, first) in enumerate(forms, 1):
            ids = torch.zeros(shape, dtype=torch.long, device=device)
            noisy = ids if block > 1 else None
            (states,) = model.both_states(ids, noisy, block, first, with_clean=block < shape[1])
            sum(each.sum() for each in states if each is not None).backward()
            seconds = time.perf_counter() - started
            say(f"compile: form {number} of {len(forms)}, {seconds:.0f} s so far")
        model.zero_grad(set_to_none=True)
        say(f"compile: every block rule in {time.perf_counter() - started:.0f} s")
    except Exception as error:  # whatever a compiler, its C++ toolchain or its cache may raise
        for layer in model.layers:
            del layer.forward
        model.zero_grad(set_to_none=True)
        say(
            f"compile: failed, going on uncompiled: {type(error).__name__}: "
            f"{str(error).splitlines()[0][:200]}"
        )
        from torch._inductor.runtime.cache_dir_utils import cache_dir
        say(
            "compile: if it fails each time, a compiler that was killed may have left half a "
            f"file: delete {cache_dir()}"
        )


# ---- the log -------------------------------------------------------------------------------------

def open_log(run):
    """train.jsonl and its sinks, the first events, config.json."""
    args, data, main = run.args, run.data, run.ranks.main
    path = run.folder / "train.jsonl" if main else None
    begin = run.state.first_step + 1 if run.resuming else 0
    sinks = logs.open_sinks(args, run.folder, run.wandb_id, begin) if main else []
    run.log = logs.Events(logs.JsonLines(path), sinks)
    run.log.write(
        "meta",
        time=time.strftime("%Y-%m-%dT%H:%M:%S"),
        version=1,
        argv=sys.argv,
        config=run.saved_args,
        params_total=run.params,
        params_blocks=model_config.block_params(run.cfg),
        data={
            "source": data.meta["source"],
            "tokens": data.meta["train_tokens"],
            "sha256": data.meta["train_sha256"],
        },
        planned_tokens=run.planned,
        precision=run.precision,
        allocator=run.allocator,
        peak_flops=run.peak,
        **run.environment,
    )
    if run.resuming:
        run.log.write(
            "resume", step=run.state.first_step, checkpoint=str(run.saved.path), notes=run.notes
        )
    for note in run.notes:
        say(f"notice: {note}")
    publish(run, "config.json", to_json(run.saved_args).decode())
