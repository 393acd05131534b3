"""Every flag of Aria, declared once: its default, its help, its limits and its rule on a resume.

    args, origins = cli.parse(config.TrainArgs, argv, "train")    # how every command starts

Every command reads it, and nothing else holds a default. --help, docs/flags.md, and the check of a
saved configuration derive from these declarations. In this order: the prompts, the presets and
profiles, the flags in groups, the commands, what to type next, the settings in a checkpoint.

A flag is a dataclass field. Its metadata says, among other things, what a resumed run does with it:
  must    it has to be as in the checkpoint
  may     it may differ, and the difference is logged
  ignore  it belongs to this one call: neither a checkpoint nor a --config file sets it
common/flags.py has the words of a declaration and reads the flags; cli.py puts presets, files and
flags together. The flags of a model's shape are in model_config.py, those of the studies in
studies.py. No torch and no numpy here: --help has to be instant.
"""
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from common.console import UserError
from common.flags import again, checked, flag, split_list
from hf.published import is_name
from model_config import OLD_MODELS, ModelFlags, shape_problems
from studies import ExperimentFlags
from text import starter
from training.lengths import MOST_STEPS, SHORTEST, Lengths, read_schedule

VERSION = "1.0"

# continued at the end of a training and in its verdict
PROMPTS = (
    "mai kal bazaar gaya tha aur",
    "भारत में आज मौसम",
    "yaar mujhe samajh nahi aa raha",
    "मुझे एक अच्छी कहानी सुनाओ",
)
# continued by edge_benchmark
BENCH_PROMPTS = ("namaste", "mai kal bazaar gaya tha", "aaj mausam kaisa hai")

# --------------------------------------------------------------------------------------------------
# presets, profiles and tiers: only what differs from the defaults

# the peak rate of each optimizer where none is given. Muon's updates are as large as AdamW's at the
# same rate, and it bears a higher one
RATES = {"muon": 1e-2, "adamw": 2e-3, "lion": 3e-4}

# Of the large presets. Small blocks with 32 memory slots take more memory, as each block keeps a
# state; and a convolution of 3 places was not measured at this length of training.
LARGE = dict(optimizer="adamw", train_block_sizes="T,64,32", conv_kernel=7)
# d_ff is the backup's; cli.parse matches the primary's to the same number of parameters
PRESETS = {
    "none": {},
    "starter": dict(
        d_model=192,
        n_layers=6,
        n_heads=4,
        d_ff=576,
        memory_slots=8,
        seq_len=128,
        batch_size=16,
        grad_accum=1,
        lr=2e-2,
        sample_steps=32,
        max_steps=800,
        save_interval=400,
        eval_interval=400,
        eval_batches=12,
        # for a grammar: more of the noisy stream, and a convolution that reaches over whole phrases
        train_block_sizes="T,T,64,32",
        ar_fade=0.3,
        conv_kernel=7,
    ),
    "nano": dict(
        d_model=64,
        n_layers=3,
        n_heads=4,
        d_ff=192,
        memory_slots=8,
        seq_len=64,
        batch_size=8,
        grad_accum=1,
        optimizer="adamw",
        lr=1e-3,
        warmup_steps=50,
        max_steps=500,
        save_interval=100,
    ),
    "tiny": dict(
        d_model=128,
        n_layers=3,
        n_heads=4,
        d_ff=512,
        memory_slots=8,
        seq_len=128,
        batch_size=8,
        grad_accum=1,
        optimizer="adamw",
        lr=3e-4,
        warmup_steps=100,
        max_steps=1000,
    ),
    "micro": dict(
        d_ff=2048,
        seq_len=256,
        optimizer="adamw",
        lr=5e-4,
        warmup_steps=500,
        max_steps=50_000,
        save_interval=1000,
        dropout=0.1,
    ),
    "medium": dict(
        d_model=1024,
        n_layers=24,
        n_heads=16,
        d_ff=2816,
        memory_slots=32,
        seq_len=1024,
        batch_size=1,
        grad_accum=32,
        lr=3e-4,
        warmup_steps=300,
        max_steps=20_000,
        save_interval=1000,
    )
    | LARGE,
    "full": dict(
        d_model=2048,
        n_layers=24,
        n_heads=16,
        d_ff=6144,
        memory_slots=32,
        seq_len=2048,
        batch_size=8,
        grad_accum=16,
        lr=1e-4,
        warmup_steps=5000,
        max_steps=500_000,
        save_interval=5000,
    )
    | LARGE,
}
GPU_ONLY_PRESETS = ("full",)              # on a CPU only with an explicit --device cpu
# pieces of the vocabulary with which a preset has its documented size
BASE_PIECES = dict(nano=2048, tiny=2048, starter=4000, micro=8192, medium=50_257, full=32_768)

# without the masked spans of the older guides, which cost 0.14 bits/byte (docs/results.md)
TRAIN_PROFILES = {
    "none": {},
    "tiny": dict(
        d_model=256,
        n_layers=6,
        n_heads=4,
        d_ff=768,
        memory_slots=8,
        timesteps=16,
        sample_steps=8,
        seq_len=384,
    ),
    "laptop": dict(d_model=320, d_ff=960, memory_slots=12, timesteps=24, sample_steps=10),
}

# Of sample: left to right, unless a flag asks for blocks. Then each forward reveals all tokens that
# the model is sure of, at least one, in blocks of the size that the checkpoint was trained in, at
# most 64: a fixed number of steps would also reveal tokens that it is not sure of.
SURE = dict(sampler="threshold", steps=64, top_k=0, blockwise=True, frozen_context=True)
SAMPLE_PROFILES = {
    "none": {},
    "balanced": SURE | dict(temperature=0.8, temperature_end=0.6),
    "max": SURE | dict(temperature=0.0),
}

# of colab_train_eco: (least bytes of memory, settings)
GPU_TIERS = (
    (70e9, dict(batch_size=8, grad_accum=4, seq_len=2048)),
    (35e9, dict(batch_size=4, grad_accum=8, seq_len=2048)),
    (14e9, dict(batch_size=2, grad_accum=16, seq_len=1024)),
    (0, dict(batch_size=1, grad_accum=32, seq_len=512)),
)
CPU_TIER = dict(batch_size=1, grad_accum=8, seq_len=256)

# of run_1b_launch: {name: (least bytes of memory, settings)}, as in the guide, but for the variant
LAUNCH_TIERS = {
    "80gb": (70e9, dict(seq_len=2048, seq_schedule=None, grad_accum=8)),
    "48gb": (
        35e9, dict(seq_len=1024, seq_schedule="512@0,1024@2000,2048@12000", grad_accum=16)
    ),
    "24gb": (20e9, dict(seq_len=512, seq_schedule="512@0,1024@12000", grad_accum=32)),
    "16gb": (14e9, dict(seq_len=256, seq_schedule="256@0,512@12000", grad_accum=64)),
}


def gpu_tier(memory, typed=()):
    """Settings for a GPU with so many bytes (None: a CPU). A batch_size typed alone keeps the
    sequences per step.
    """
    if memory is None:
        tier = dict(CPU_TIER)
    else:
        tier = dict(next(settings for least, settings in GPU_TIERS if memory >= least))

    if "batch_size" in typed and "grad_accum" not in typed:
        per_step = tier["batch_size"] * tier["grad_accum"]
        tier["grad_accum"] = max(1, round(per_step / typed["batch_size"]))
    return tier


# --------------------------------------------------------------------------------------------------
# the flags of train, by the groups of its --help

@dataclass
class PresetFlags:
    "Preset"
    preset: str = flag(
        "none",
        "shape and training settings",
        "ignore",
        choices=tuple(PRESETS),
        aliases=("size",),
        elsewhere={"laptop": "that is an --edge_profile"},
    )
    config: str = flag(None, "a preset's name, or FILE.json (a run's config.json)", "ignore")
    edge_profile: str = flag(
        "none",
        "small shapes",
        "ignore",
        choices=tuple(TRAIN_PROFILES),
        elsewhere=dict.fromkeys(("balanced", "max"), "that is a profile of sample"),
    )
    list_presets: bool = flag(
        False,
        "each preset's parameters, memory, and speed as measured here in seconds, then stop; of "
        "train only",
        "ignore",
        rare=True,
    )

    def problems(self):
        if self.list_presets and type(self) is not TrainArgs:
            yield "--list_presets belongs to train: python -m train --list_presets"


@dataclass
class DataFlags:
    "Data"
    data_dir: str = flag(
        "data/processed",
        "folder that prepare made; train and evaluate also take a token file, .npy or .bin with "
        "its .meta (prepare_fineweb)",
        aliases=("data",),
    )


GPT2_PIECES = 50257      # the vocabulary of a token file; text/gpt2.py has the pieces


def token_file_pieces(path):
    """The size of its vocabulary, if this is the name of a token file, else 0."""
    return GPT2_PIECES if Path(path).suffix in (".npy", ".bin") else 0


@dataclass
class TokenFileFlags:
    "Token file"
    data_format: str = flag(
        "auto",
        "of a token file; auto = by its first bytes",
        "ignore",
        choices=("auto", "npy", "bin"),
        rare=True,
        later=True,
    )
    vocab_size: int = flag(
        None,
        "of a token file; none = that of its .meta, which it may not contradict",
        "ignore",
        at_least=1,
        rare=True,
        later=True,
    )
    val_frac: float = flag(
        0.01,
        "tail of a token file kept for validation",
        at_least=0,
        below=1,
        rare=True,
        later=True,
    )


@dataclass
class MaskFlags:
    "Objective"
    objective: str = flag(
        "masked",
        "masked diffusion beside left to right, or its control: ar, left to right alone; gaussian "
        "= continuous diffusion on embeddings",
        "must",
        choices=("masked", "ar", "gaussian"),
    )
    loss: str = flag(
        "masked_mean",
        "mean over masked tokens (gaussian: over noisy ones), or elbo: the bound, which is what "
        "validation always prints",
        choices=("elbo", "masked_mean"),
    )
    noise_schedule: str = flag(
        "cosine",
        "share of noise as a function of time; gaussian only",
        choices=("linear", "cosine", "sqrt"),
        rare=True,
        later=True,
    )
    mask_schedule: str = flag(
        "linear", "mask rate as a function of time", choices=("cosine", "linear")
    )
    min_mask_rate: float = flag(
        0.0,
        "lowest mask rate; text for transliteration has 0.6 to 1 if neither rate is given",
        at_least=0,
        at_most=1,
        rare=True,
    )
    max_mask_rate: float = flag(
        0.8,
        "highest mask rate; with 1, --loss elbo is the whole bound",
        at_least=0,
        at_most=1,
        rare=True,
    )
    time_mode: str = flag(
        "continuous", "times: any, or levels", choices=("continuous", "discrete"), rare=True
    )
    timestep_sampling: str = flag(
        "stratified", "draw of times", choices=("stratified", "uniform"), rare=True
    )
    timesteps: int = flag(32, "levels of discrete time", at_least=2, rare=True)
    masking_strategy: str = flag("token", "what is hidden in training", choices=("token", "span"))
    mean_span_length: float = flag(3.0, "tokens per span", above=0, rare=True)
    sample_steps: int = flag(12, "stored default of sample --steps", at_least=1, rare=True)
    train_block_sizes: str = flag(
        "T,32,16,4",
        "blocks of the noisy stream, drawn per step: T (whole sequence) or numbers; 1: none, left "
        "to right alone",
    )
    ar_fade: float = flag(
        0.6,
        "begin left to right alone, which over this share of the steps gives way to both streams; "
        "0 = off",
        at_least=0,
        at_most=1,
        rare=True,
    )
    noisy_weight: float = flag(
        1.0, "weight of the noisy stream's loss; left to right has 1", above=0, rare=True
    )
    conditioning_dropout: float = flag(
        0.1,
        "share of the pairs that are learned without their prompt, for sample --guidance_scale; "
        "of prepare --source pairs only",
        at_least=0,
        below=1,
        rare=True,
        later=True,
    )
    guidance_scale: float = flag(
        1.0,
        "stored default of sample --guidance_scale",
        at_least=0,
        rare=True,
        later=True,
    )

    @property
    def causal(self):
        """Is this the control, which predicts left to right?"""
        return self.objective == "ar"

    @property
    def gaussian(self):
        """Is noise added to embeddings, instead of masks to tokens?"""
        return self.objective == "gaussian"

    @property
    def measure(self):
        """What a held-out figure is: left to right it is exact."""
        return "NLL" if self.causal else "bound"

    @property
    def block_choices(self):
        """The numbers of --train_block_sizes, from which each step draws one, in the longest rows
        of the run.
        """
        return self.block_choices_at(self.longest)

    def block_choices_at(self, length):
        """The same, in rows of this length."""
        if self.causal:
            return [1]
        if self.gaussian:
            return [length]
        return block_sizes(self.train_block_sizes, length)

    def single_chance(self, step):
        """How likely this step is left to right alone, whatever --train_block_sizes says."""
        if not self.ar_fade or self.gaussian:
            return 0.0
        return max(0.0, 1 - step / (self.ar_fade * self.max_steps))

    @property
    def rule_shares(self):
        """{block rule: the share of a run's steps that have it}, the largest first."""
        return self.rule_shares_at(self.longest)

    def rule_shares_at(self, length):
        """The same, of the steps with rows of this length."""
        choices = self.block_choices_at(length)
        if self.gaussian:
            return {length: 1.0}
        single = self.ar_fade / 2       # the chance falls evenly from 1 to 0 over the fade
        rules = {*choices, 1} if single else set(choices)
        shares = {}
        for block in sorted(rules, reverse=True):
            shares[block] = (1 - single) * choices.count(block) / len(choices)
            if block == 1:
                shares[block] += single
        return shares

    @property
    def block_rules(self):
        """All block rules that a run learns, the largest first, in its longest rows. 1 is left to
        right, which all steps learn but those of whole rows.
        """
        return self.block_rules_at(self.longest)

    def block_rules_at(self, length):
        """The same, in rows of this length."""
        rules = set(self.rule_shares_at(length))
        if min(rules) < length:
            rules.add(1)
        return sorted(rules, reverse=True)


def mask_problems(args):
    """What is wrong with the flags of the objective, in sentences."""
    yield from block_problems("train_block_sizes", args.train_block_sizes)
    if args.min_mask_rate >= args.max_mask_rate:
        yield (
            f"--min_mask_rate {args.min_mask_rate:g} must be below "
            f"--max_mask_rate {args.max_mask_rate:g}"
        )
    if args.gaussian:
        for name in ("fsdp", "compile", "exit_loss_weight", "lora_rank"):
            if getattr(args, name):
                yield f"--{name} works with masks only: leave it out with --objective gaussian"
        if args.analysis_every and args.instrument in ("medium", "full"):
            yield (
                f"--instrument {args.instrument} looks at clean text, which --objective gaussian "
                "never reads: use --instrument basic"
            )


def block_sizes(text, length):
    """--train_block_sizes and --blocks as numbers; T, and whatever is longer than a sequence, is
    the whole sequence.
    """
    sizes = []
    for part in split_list(text):
        asked = length if part == "T" else int(part)
        sizes.append(min(asked, length))
    return sizes


def block_problems(name, text):
    """What is wrong with a list of block sizes, the value of the flag --name, in sentences."""
    for part in split_list(text):
        if part != "T" and not re.fullmatch("0*[1-9][0-9]{0,8}", part):
            yield f"--{name} {text}: {part!r} is neither T nor a number of at least 1"


SIZES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def size_of(text):
    """"1.5M" -> 1,500,000: a whole number or a decimal with K, M or B; None if it is none of these,
    or no whole number above zero.
    """
    found = re.fullmatch(r"([0-9]{1,15})(?:\.([0-9]{1,9}))?([KMB]?)", text.upper())
    if not found:
        return None
    whole, decimals, suffix = found[1], found[2] or "", found[3]
    size, rest = divmod(int(whole + decimals) * SIZES[suffix], 10 ** len(decimals))
    if rest or not 0 < size < 2**60:
        return None
    return size


@dataclass
class OptimFlags:
    "Optimisation"
    max_steps: int = flag(5000, "optimizer steps in total", at_least=1, aliases=("steps",))
    seq_len: int = flag(512, "training length", "must", at_least=16, aliases=("train_seq_len",))
    seq_schedule: str = flag(
        None,
        "training length by completed steps, LENGTH@STEP,..., such as 512@0,1024@2000; before the "
        "first of them --seq_len",
        rare=True,
        later=True,
    )
    max_context: int = flag(
        None,
        "upper limit of the training lengths; none = the longest of them",
        at_least=SHORTEST,
        rare=True,
        aliases=("block", "max_seq_len"),
        later=True,
    )
    keep_tokens: bool = flag(
        False,
        "with --seq_schedule: each step has the tokens of the first, so longer rows are fewer rows",
        rare=True,
        later=True,
    )
    target_tokens: str = flag(
        None,
        "a budget such as 500000, 100M or 1.5B instead of --max_steps: the fewest steps that "
        "reach it",
        rare=True,
        later=True,
    )
    batch_size: int = flag(4, "sequences per forward", at_least=1)
    grad_accum: int = flag(
        8, "forwards per step", at_least=1, at_most=65_536, aliases=("accumulate_grad_batches",)
    )
    auto_batch: bool = flag(
        False, "out of memory: half the batch, twice the forwards; probed first", "ignore"
    )
    lr: float = flag(
        RATES["muon"],
        f"peak rate; not given: {RATES['adamw']} of adamw, {RATES['lion']} of lion",
        above=0,
        aliases=("learning_rate",),
    )
    lr_schedule: str = flag("cosine", "after the warm-up", choices=("cosine", "constant", "wsd"))
    warmup_steps: int = flag(-1, "linear warm-up; -1 = 5 % of the steps, at most 300", at_least=-1)
    min_lr_ratio: float = flag(0.1, "last rate / peak rate", at_least=0, at_most=1, rare=True)
    weight_decay: float = flag(0.05, "on matrices only", at_least=0)
    optimizer: str = flag("muon", "update rule", "must", choices=tuple(RATES))
    param_dtype: str = flag(
        "fp32",
        "how matrices and the embedding are kept; bf16, rounded at random: half the memory, "
        "optimizer included",
        "must",
        choices=("fp32", "bf16"),
        rare=True,
        later=True,
    )
    opt_fused: bool = flag(
        True,
        "AdamW's update in one kernel; off: PyTorch's plain one",
        "ignore",
        rare=True,
        later=True,
    )
    ema: float = flag(0.0, "decay of averaged weights; 0 = off", at_least=0, below=1)
    grad_clip: float = flag(1.0, "limit of the gradient norm; 0 = off", at_least=0, rare=True)
    amp: str = flag(
        "auto",
        "mixed precision",
        choices=("auto", "on", "off"),
        bare="on",
        values={"True": "on", "true": "on", "False": "off", "false": "off"},
    )
    amp_dtype: str = flag(
        "auto",
        "its number type; fp16, scaled, only on CUDA; auto = bf16 where the GPU has it, else fp16",
        choices=("auto", "bf16", "fp16"),
        rare=True,
    )
    spike_factor: float = flag(
        0.0, "warn of a loss above this x the median of the last 50; 0 = off", at_least=0, rare=True
    )
    spike_rollback: bool = flag(
        False,
        "at such a loss go back to the last checkpoint and on with other windows, 3 times at "
        "most; a stop saves, and so can change where to",
        rare=True,
    )
    detect_anomaly: bool = flag(
        False, "name the operation whose gradient is NaN, and stop there; slow", "ignore", rare=True
    )
    compile: bool = flag(False, "torch.compile the training step")
    compile_mode: str = flag(
        "default",
        "for torch.compile",
        choices=("default", "reduce-overhead", "max-autotune"),
        rare=True,
    )
    activation_checkpointing: bool = flag(
        False,
        "keep no activations inside the layers, compute them again: far less memory, more time",
        rare=True,
        aliases=("grad_checkpoint", "gradient_checkpointing"),
    )
    fsdp: bool = flag(
        False, "cut weights and optimizer up over torchrun's processes", "ignore", rare=True
    )

    @property
    def lengths(self):
        """The length of a row as a function of the step."""
        return Lengths.of(self.seq_len, self.seq_schedule, self.keep_tokens)

    @property
    def stages(self):
        """The parts of the run that have one length each."""
        return self.lengths.stages(self.max_steps)

    @property
    def longest(self):
        """The longest row of the run: what is scored."""
        return self.lengths.longest(self.max_steps)

    @property
    def rows(self):
        """Sequences of a step; --keep_tokens changes their number, and this is the first one."""
        return self.batch_size * self.grad_accum

    def rows_at(self, length):
        """Sequences of a step with rows of this length."""
        return self.lengths.rows(length, self.rows)

    def batch_at(self, length):
        """Sequences of a forward with rows of this length."""
        return max(1, self.lengths.rows(length, self.batch_size))

    def solve_steps(self):
        """--target_tokens makes --max_steps."""
        target = size_of(self.target_tokens)
        steps = self.lengths.steps_for(target, self.rows)
        if steps is None:
            raise UserError(
                f"--target_tokens {self.target_tokens}: {self.rows} rows a step reach only "
                f"{self.lengths.tokens(MOST_STEPS, self.rows):,} tokens in "
                f"{MOST_STEPS:,} steps, the most: give a larger --batch_size, --grad_accum "
                "or --seq_len"
            )
        self.max_steps = steps


def length_problems(args):
    """What is wrong with the lengths of the rows and the budget of tokens, in sentences."""
    if args.target_tokens is not None and not size_of(args.target_tokens):
        yield (
            f"--target_tokens {args.target_tokens}: must be a whole number of tokens above 0, such "
            "as 500000, 100M or 1.5B"
        )
    most = args.max_context
    try:
        if args.seq_schedule is not None:
            read_schedule(args.seq_schedule, most)
    except ValueError as error:
        yield f"--seq_schedule {error}"
        return

    first = args.lengths.at(0)
    if most is not None and first > most:
        yield f"--seq_len {first} is above --max_context {most}: lower it, or raise that"
    if args.keep_tokens and args.seq_schedule is None:
        yield "--keep_tokens needs a --seq_schedule: without one all rows are equally long"
    for length, tokens in args.lengths.uneven(args.rows):
        yield (
            f"--keep_tokens: the {tokens} tokens of the first step (--batch_size {args.batch_size} "
            f"x --grad_accum {args.grad_accum} rows of {first}) are no whole number of rows of "
            f"{length}: change --batch_size or --grad_accum"
        )


@dataclass
class RunFlags:
    "Run folder and log"
    output_dir: str = flag(
        None,
        "run folder; none = checkpoints/ eco_hybrid_hi (primary), diffusion_hi (backup); "
        "of --objective ar eco_ar_hi, ar_hi; of gaussian eco_gaussian_hi, gaussian_hi",
        "ignore",
        aliases=("out_dir",),
    )
    run_name: str = flag(None, "run folder checkpoints/NAME", "ignore", aliases=("name",))
    save_interval: int = flag(
        500, "steps between checkpoints; 0 = latest only", at_least=0, aliases=("save_every",)
    )
    save_minutes: float = flag(0.0, "also save after so many minutes; 0 = off", at_least=0)
    drive: str = flag(
        None,
        "folder for a verified copy of each checkpoint; --resume_latest finds it",
        "ignore",
        rare=True,
    )
    log_interval: int = flag(
        10,
        "steps between printed lines; train.jsonl has every step",
        at_least=1,
        aliases=("log_every",),
    )
    eval_interval: int = flag(
        500, "steps between validations; 0 = off", at_least=0, aliases=("eval_every",)
    )
    eval_batches: int = flag(
        20, "batches per validation", at_least=1, aliases=("eval_iters",), rare=True
    )
    keep_last: int = flag(0, "numbered checkpoints kept; 0 = all", at_least=0, rare=True)
    keep_full: int = flag(2, "newest ones that keep the optimizer file", at_least=1, rare=True)
    save_optim: bool = flag(
        True,
        "optimizer state in checkpoints; without it a resume begins with a fresh optimizer",
        "ignore",
        rare=True,
        later=True,
    )
    if_exists: str = flag(
        "archive",
        "a fresh start in a used folder",
        "ignore",
        rare=True,
        choices=("archive", "suffix", "skip", "error"),
    )
    live: str = flag(
        "auto",
        "console: plain lines (off), a bar (basic), a view of the run (rich, the package)",
        "ignore",
        rare=True,
        choices=("auto", "off", "basic", "rich"),
    )
    show_samples: bool = flag(True, "continue fixed prompts at the end", "ignore", rare=True)
    sample_every: int = flag(
        0,
        "steps between continuations of fixed prompts, in the console and every log; 0 = off",
        at_least=0,
        rare=True,
        later=True,
    )
    sample_prompts: tuple = flag(
        (),
        "these prompts, each in quotes; none = four of ours, of pairs the first held-out ones",
        many="several",
        rare=True,
        later=True,
    )
    instrument: str = flag(
        "basic",
        "what --analysis_every measures: gradients (basic), attention or memory slots too "
        "(medium), ranks of matrices too (full)",
        choices=("off", "basic", "medium", "full"),
        rare=True,
        later=True,
    )
    analysis_every: int = flag(
        0, "steps between analyses; 0 = never", at_least=0, rare=True, later=True
    )


@dataclass
class SinkFlags:
    "Other logs"
    tensorboard: str = flag(
        "auto",
        "event files in --log_dir; auto = where the package is installed",
        "ignore",
        bare="on",
        choices=("auto", "on", "off"),
        aliases=("tb",),
        rare=True,
    )
    log_dir: str = flag("logs", "folder of TensorBoard and of W&B's own files", "ignore", rare=True)
    wandb: bool = flag(False, "send the log to Weights & Biases", "ignore")
    wandb_project: str = flag("aria", "its project", "ignore", rare=True)
    wandb_entity: str = flag(None, "its account or team", "ignore", rare=True)
    wandb_group: str = flag(None, "its group of runs", "ignore", rare=True)
    wandb_tags: tuple = flag((), "its tags, A,B or A B", "ignore", many="several", rare=True)
    wandb_name: str = flag(
        None, "its name for the run; none = the run folder's", "ignore", rare=True
    )
    wandb_id: str = flag(
        None,
        "its run to go on with; none = that of the checkpoint, or a new one",
        "ignore",
        rare=True,
    )
    wandb_mode: str = flag(
        None,
        "offline keeps the files here; none = WANDB_MODE, else online",
        "ignore",
        rare=True,
        choices=("online", "offline", "disabled"),
    )

    def problems(self):
        for name in ("entity", "group", "tags", "name", "id", "mode"):
            if getattr(self, f"wandb_{name}") and not self.wandb:
                yield f"--wandb_{name} needs --wandb"


@dataclass
class ResumeFlags:
    "Resume"
    resume: str = flag(
        None,
        "continue PATH; alone: --ckpt, else the run folder's latest",
        "ignore",
        bare="latest",
        values={"True": "latest", "true": "latest"},
    )
    resume_latest: bool = flag(
        False, "like --resume, but start fresh when nothing is there", "ignore", rare=True
    )
    ckpt: str = flag(
        None,
        "with --resume: what to resume; without: first weights, step 0, and their shape",
        "ignore",
    )
    reset_optimizer: bool = flag(False, "fresh optimizer on resume", "ignore", rare=True)
    lora_rank: int = flag(
        0,
        "with --ckpt: learn adapters of this rank beside the layers' matrices, and leave the "
        "weights as they are; 0 = learn all weights",
        "must",
        at_least=0,
        rare=True,
        later=True,
    )


@dataclass
class EveryFlags:
    "Everywhere"
    quiet: bool = flag(False, "only results, warnings, notices and errors", "ignore")
    version: bool = flag(False, "print the version, then stop", "ignore")


@dataclass
class CommonFlags(EveryFlags):
    "Everywhere"
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps", "ignore", shortcuts={"cpu": "cpu"})
    seed: int = flag(1337, "all randomness", "must", at_least=0, below=2**63)
    threads: int = flag(
        0, "CPU threads; 0 = PyTorch's choice", "ignore", at_least=0, at_most=1024, rare=True
    )
    print_config: bool = flag(
        False, "show every setting with its origin and the parameter count, then stop", "ignore"
    )

    def problems(self):
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", self.device):
            yield f"--device {self.device}: must be auto, cpu, cuda, cuda:N or mps"


# --------------------------------------------------------------------------------------------------
# the flags of the other commands, by group

OF_INPUT = ("files", "pairs", "transliterate")     # sources that are read from --input


@dataclass
class PrepareFlags(DataFlags):
    "Preparation"
    source: str = flag(
        "hindi",
        "the hub (hindi, fineweb), --input, or the offline starter corpus",
        "ignore",
        choices=("hindi", "builtin", "files", "fineweb", "pairs", "transliterate"),
    )
    input: tuple = flag(
        (),
        "text files or folders for --source files, .jsonl for pairs; - is standard input",
        "ignore",
        many="several",
    )
    pair_tokens: int = flag(
        512,
        "longest pair, and the least --seq_len of train; of --source pairs and transliterate",
        "ignore",
        at_least=8,
    )
    cut_documents: bool = flag(
        False,
        "--source pairs out of documents: the title or first sentence of each, answered by what "
        "follows",
        "ignore",
    )
    prompt_words: int = flag(
        0,
        "--cut_documents with topics for prompts: 1 to so many words of a document that few others "
        "have, answered by the document; 0 = titles and first sentences",
        "ignore",
        at_least=0,
        at_most=16,
    )
    typists: int = flag(
        2,
        "people who type each sentence of --source transliterate in Latin letters",
        "ignore",
        at_least=1,
        at_most=32,
        rare=True,
    )
    raw_dir: str = flag("data/raw", "what was downloaded", "ignore", rare=True)
    tokenizer: str = flag("data/tokenizer/aria_hindi.model", "trained when missing", "ignore")
    tokenizer_vocab: int = flag(
        0, "base pieces, mask not included; 0 = by corpus size", "ignore", at_least=0,
        at_most=1_000_000,
    )
    model_type: str = flag(
        "bpe",
        "kind of SentencePiece model; char: single letters, always so for --source transliterate",
        "ignore",
        choices=("bpe", "unigram", "char"),
    )
    hinglish_ratio: float = flag(
        0.35, "wanted share of romanised documents", "ignore", at_least=0, at_most=1
    )
    val_doc_frac: float = flag(
        0.02, "share of documents kept for validation", "ignore", above=0, below=1
    )
    max_docs: int = flag(120_000, "documents at most", "ignore", at_least=2)
    max_chars: int = flag(60_000_000, "characters at most", "ignore", at_least=1)
    clean: str = flag(
        "auto",
        "repair and filter documents; auto = those of the hub",
        "ignore",
        choices=("auto", "on", "off"),
        bare="on",
        values={"True": "on", "False": "off"},
    )
    romanise: str = flag(
        "auto",
        "type Hindi in Latin letters up to --hinglish_ratio; auto = that of the hub",
        "ignore",
        choices=("auto", "on", "off"),
        bare="on",
        values={"True": "on", "False": "off"},
    )
    report: str = flag(None, "write what cleaning removed to this .html", "ignore")
    offline: bool = flag(False, "never download; the starter corpus instead", "ignore")
    force: bool = flag(False, "rebuild what is there", "ignore")

    @property
    def of_pairs(self):
        """Does the text consist of prompts and responses?"""
        return self.source in ("pairs", "transliterate")

    def wants(self, what):
        """Is --clean or --romanise on for this source?"""
        asked = getattr(self, what)
        if asked == "auto":
            return self.source in ("hindi", "fineweb")
        return asked == "on"

    def problems(self):
        if 0 < self.tokenizer_vocab < 300:
            yield (
                f"--tokenizer_vocab {self.tokenizer_vocab}: must be 0 or at least 300 "
                "(256 bytes, special pieces)"
            )
        if (self.source in OF_INPUT) != bool(self.input):
            yield (
                f"--source {' or '.join(OF_INPUT)} and --input go together "
                f"(now: source {self.source}, {len(self.input)} inputs)"
            )
        if self.of_pairs and (self.wants("clean") or self.wants("romanise")):
            yield f"--clean and --romanise are for documents, not for --source {self.source}"
        if self.cut_documents and self.source != "pairs":
            yield f"--cut_documents makes pairs: add --source pairs (now: {self.source})"
        if self.prompt_words and not self.cut_documents:
            yield (
                f"--prompt_words {self.prompt_words} takes prompts out of documents: add --source "
                "pairs --cut_documents"
            )
        if self.report and not self.wants("clean"):
            yield f"--report {self.report} tells what cleaning removed: add --clean"


@dataclass
class ColabFlags:
    "One-shot"
    skip_setup: bool = flag(False, "use the data as it is", "ignore")
    allow_cpu: bool = flag(False, "train without a GPU", "ignore")


@dataclass
class CheckpointFlags:
    "Checkpoint"

    ckpt: str = flag(
        None,
        "checkpoint or run folder, or hf:owner/name@revision on the hub; the flag's name may be "
        "left out",
        positional=True,
    )

    needs_ckpt = True

    def problems(self):
        if self.needs_ckpt and not self.ckpt and not getattr(self, "check_run", None):
            yield "--ckpt is missing: name a checkpoint or a run folder (python -m train makes one)"


SAMPLERS = (
    "confidence",
    "threshold",
    "factor",
    "entropy",
    "margin",
    "random",
    "ancestral",
    "speculate",
    "ddim",
    "ddpm",
    "dpmpp",
)


@dataclass
class DecodeFlags:
    "Decoding"
    max_new_tokens: int = flag(128, "length of the new text", at_least=1, aliases=("seq_len",))
    steps: int = flag(
        0,
        "forwards at most, per block if blockwise; 0 = the checkpoint's",
        at_least=0,
        aliases=("num_steps",),
    )
    sampler: str = flag(
        "confidence",
        "which positions come first; speculate = left to right in verified drafts; of gaussian "
        "ddim, ddpm, dpmpp, which are else confidence, ancestral, confidence",
        aliases=("scheduler",),
        choices=SAMPLERS,
        values={"first_hitting": "random"},
    )
    threshold: float = flag(0.9, "bound of threshold, factor and entropy", at_least=0, at_most=1)
    alg_temp: float = flag(0.0, "noise on the choice of positions", at_least=0, rare=True)
    remask: float = flag(
        0.0, "share of revealed tokens that may go back", at_least=0, below=1, rare=True
    )
    remask_rule: str = flag(
        "cap", "ReMDM's rule for them", choices=("cap", "rescale", "conf"), rare=True
    )
    reveal: str = flag("linear", "how many come at each forward", choices=("linear", "cosine"))
    temperature: float = flag(1.0, "0 = greedy", at_least=0)
    temperature_end: float = flag(
        None, "reached linearly from --temperature", at_least=0, rare=True
    )
    top_k: int = flag(50, "0 = off", at_least=0)
    top_p: float = flag(1.0, "1 = off", above=0, at_most=1)
    repetition_penalty: float = flag(1.0, "1 = off", above=0, rare=True)
    guidance_scale: float = flag(
        1.0,
        "1 = plain conditional; above: follow the context more",
        at_least=0,
        rare=True,
        aliases=("cfg_scale",),
    )
    block_size: int = flag(
        0, "block of the block modes; 0 = the checkpoint's; 1 = left to right", at_least=0
    )
    min_decode_layers: int = flag(
        0, "layers of a block's first forward; 0 = all", at_least=0, rare=True
    )


@dataclass
class GenerateFlags(DecodeFlags, CheckpointFlags):
    "Generation"
    tokenizer: str = flag(None, "a tokenizer that has to be the checkpoint's own", rare=True)
    model: str = flag(
        "auto", "a check, not a cast", choices=("auto", "primary", "backup"), values=OLD_MODELS
    )
    prompt: tuple = flag(
        (), "text to continue; may be repeated; - is standard input", many="repeat"
    )
    prompts_file: str = flag(None, "a file with one prompt per line")
    precision: str = flag(
        "auto",
        "of the products; auto = bf16 on a CPU that has it, else fp32, which is exact",
        choices=("auto", "fp32", "bf16", "int8"),
        shortcuts={"quantize_dynamic": "int8", "int8": "int8"},
    )
    engine: str = flag(
        "auto",
        "what computes: torch a checkpoint, onnx an exported folder (python -m export); with the "
        "name of a run, its folder in exports/; auto = by what --ckpt is",
        choices=("auto", "torch", "onnx"),
    )


# --------------------------------------------------------------------------------------------------
# the commands

# A dataclass collects the fields of its bases from the last to the first: --help shows these groups
# from the bottom up.
@dataclass
class TrainArgs(
    CommonFlags,
    ResumeFlags,
    SinkFlags,
    RunFlags,
    OptimFlags,
    MaskFlags,
    ModelFlags,
    TokenFileFlags,
    DataFlags,
    PresetFlags,
):
    examples = (
        ("python -m train --preset starter", "the built-in corpus, minutes on a laptop"),
        ("python -m train --data_dir data/processed", "your own text, after python -m prepare"),
        ("python -m train --resume checkpoints/eco_hybrid_hi", "go on exactly where a run stopped"),
        ("python -m train --list_presets", "sizes, and speed and hours on this machine"),
    )

    @property
    def run_dir(self):
        """The run folder that these flags name."""
        if self.output_dir:
            return Path(self.output_dir)
        if self.run_name:
            return Path("checkpoints", self.run_name)
        names = dict(primary="eco_hybrid_hi", backup="diffusion_hi")
        if self.causal:
            names = dict(primary="eco_ar_hi", backup="ar_hi")
        if self.gaussian:
            names = dict(primary="eco_gaussian_hi", backup="gaussian_hi")
        return Path("checkpoints", names[self.model])

    def idle(self, origins):
        """Flags that were typed and that these settings never look at: [sentence]."""
        of_blocks = (
            "mask_schedule",
            "min_mask_rate",
            "max_mask_rate",
            "time_mode",
            "timesteps",
            "masking_strategy",
            "mean_span_length",
            "train_block_sizes",
            "ar_fade",
            "noisy_weight",
            "block_size",
            "sample_steps",
            "guidance_scale",
        )
        of_masks = (*of_blocks, "timestep_sampling", "loss")
        # names of flags, whether they do nothing, why
        rules = (
            (of_masks, self.causal, "--objective ar hides nothing"),
            (of_blocks, self.gaussian, "--objective gaussian has no masks and no blocks"),
            (
                ("noise_schedule", "embed_dim"),
                not self.gaussian,
                "it belongs to --objective gaussian",
            ),
            (("timesteps",), self.time_mode == "continuous", "it needs --time_mode discrete"),
            (
                ("mean_span_length",),
                self.masking_strategy == "token",
                "it needs --masking_strategy span",
            ),
            (("min_lr_ratio",), self.lr_schedule != "cosine", "it belongs to --lr_schedule cosine"),
            (
                ("memory_slots", "conv_kernel", "d_mem"),
                self.model == "backup",
                "it belongs to --model primary",
            ),
            (
                ("noisy_weight",),
                set(self.block_rules) <= {1, self.longest},
                "left to right is learned beside blocks only, and --train_block_sizes has none",
            ),
            (
                ("seq_len",),
                self.lengths.entries[0] != (0, self.seq_len) and not self.resume,
                "--seq_schedule begins at step 0",
            ),
            (("compile_mode",), not self.compile, "it needs --compile"),
            (("amp_dtype",), self.amp == "off", "--no_amp is given"),
            (("eval_batches",), not self.eval_interval, "--eval_interval 0 never validates"),
            (("sample_prompts",), not self.sample_every, "it needs --sample_every"),
            (
                ("instrument",),
                self.instrument != "off" and not self.analysis_every,
                "it needs --analysis_every",
            ),
            (
                ("analysis_every",),
                self.analysis_every and self.instrument == "off",
                "--instrument off measures nothing",
            ),
            (("keep_full",), not self.save_optim, "--no_save_optim keeps no optimizer file"),
            (("keep_last",), not self.save_interval, "--save_interval 0 keeps the latest only"),
            (("reset_optimizer",), not (self.resume or self.resume_latest), "nothing is resumed"),
        )
        said = {}
        for names, does_nothing, why in rules:
            for name in names:
                if does_nothing and origins[name] == "flag":
                    said.setdefault(name, f"--{name} does nothing here: {why}")
        return list(said.values())

    @property
    def warmup(self):
        """Steps of the warm-up."""
        if self.warmup_steps < 0:
            return min(300, self.max_steps // 20)
        return self.warmup_steps

    def problems(self):
        yield from shape_problems(self)
        yield from mask_problems(self)
        yield from length_problems(self)
        if self.amp_dtype == "fp16" and self.device in ("cpu", "mps"):
            yield f"--amp_dtype fp16 works only on CUDA, not with --device {self.device}"
        if 0 < self.spike_factor <= 1:
            yield f"--spike_factor {self.spike_factor:g}: must be 0 (off) or above 1"
        if self.spike_rollback and not self.spike_factor:
            yield "--spike_rollback needs a --spike_factor, such as 3"
        if self.fsdp and self.compile:
            yield "--fsdp and --compile: give only one of them"
        if self.fsdp and self.optimizer == "muon":
            yield (
                "--optimizer muon needs whole matrices, which --fsdp cuts up: "
                "use --optimizer adamw, or leave --fsdp out"
            )
        if self.fsdp and (self.auto_batch or self.spike_rollback):
            yield (
                "--fsdp with --auto_batch or --spike_rollback: "
                "one process cannot step back alone; leave it out"
            )
        if self.fsdp and self.analysis_every and self.instrument in ("medium", "full"):
            yield (
                f"--fsdp with --instrument {self.instrument}: no process has a whole layer to look "
                "at: use --instrument basic"
            )
        if self.fsdp and self.sample_every:
            yield "--fsdp with --sample_every: no process has a whole model to ask: leave it out"
        for name, value, off in (("ema", self.ema, 0), ("param_dtype", self.param_dtype, "fp32"),
                                 ("fsdp", self.fsdp, False)):
            if self.lora_rank and value != off:
                yield f"--lora_rank and --{name}: give only one of them"
        if self.run_name and not re.fullmatch(r"\w[^/\\\0]*", self.run_name):
            yield (
                f"--run_name {self.run_name}: must be a plain folder name "
                "(a path goes to --output_dir)"
            )
        if re.search("[\ud800-\udfff]", str(self.run_dir)):
            name = "run_name" if self.run_name else "output_dir"
            yield (
                f"--{name} {self.run_dir}: the name is not UTF-8, and tensor files need one that "
                "is: choose another"
            )
        for first, second in (
            ("preset", "edge_profile"),
            ("output_dir", "run_name"),
            ("resume", "resume_latest"),
        ):
            one, other = getattr(self, first), getattr(self, second)
            unset = (None, False, "none")
            if one not in unset and other not in unset:
                yield f"--{first} {one} and --{second} {other}: give only one of them"
        if self.resume not in (None, "latest", self.ckpt) and self.ckpt:
            yield (
                f"--resume {self.resume} and --ckpt {self.ckpt} are two checkpoints: give only "
                "one of them"
            )


@dataclass
class PrepareArgs(PrepareFlags, CommonFlags):
    examples = (
        ("python -m prepare --source files --input my_text.txt", "your own text"),
        (
            "python -m prepare --source hindi --report cleaned.html",
            "Hindi and Hinglish from the hub, cleaned",
        ),
        ("python -m prepare --source builtin", "the starter corpus, without a network"),
        (
            "python -m prepare --source pairs --input pairs.jsonl",
            'prompts that are answered: {"prompt": "...", "response": "..."}',
        ),
    )
    first = ("Preparation",)


@dataclass
class FinewebArgs(EveryFlags):
    "Preparation"
    examples = (
        (
            "python -m prepare_fineweb --tokens 100M --output fineweb_100m.npy",
            "English web text; stopped, the same again goes on",
        ),
        ("python -m prepare_fineweb --tokens 1B --output fineweb_1b.npy", "ten times as much"),
    )
    first = ("Preparation",)
    tokens: str = flag("100M", "exactly so many, K, M or B behind a number", "ignore")
    output: str = flag(None, "the token file; none = fineweb_TOKENS.npy", "ignore")
    format: str = flag(
        "auto", "of the file; auto = by its name", "ignore", choices=("auto", "npy", "bin")
    )
    force: bool = flag(False, "begin anew, whatever is there", "ignore")

    @property
    def count(self):
        """The number of tokens."""
        return size_of(self.tokens)

    @property
    def path(self):
        """The token file."""
        suffix = "npy" if self.format == "auto" else self.format
        return Path(self.output or f"fineweb_{self.tokens.lower()}.{suffix}")

    @property
    def kind(self):
        """npy or bin; None if neither the flag nor the name says which."""
        if self.format != "auto":
            return self.format
        suffix = self.path.suffix.removeprefix(".")
        return suffix if suffix in ("npy", "bin") else None

    def problems(self):
        if not self.count:
            yield (
                f"--tokens {self.tokens}: must be a whole number of tokens above 0, such as "
                "500000, 100M or 1.5B"
            )
        if not self.kind:
            yield (
                f"--output {self.output}: end its name in .npy or .bin, or add --format npy"
            )


def starter_args(folder=starter.FOLDER, chars=None):
    """Arguments of prepare for the starter corpus with its own tokenizer inside the folder."""
    return PrepareArgs(
        source="builtin",
        data_dir=str(folder),
        tokenizer=str(Path(folder, "tokenizer.model")),
        tokenizer_vocab=starter.VOCAB,
        max_chars=chars or starter.CHARS,
    )


# of sample in blocks, where they are not typed: with --steps, as in the older guides; without it,
# the best ones measured (docs/experiments/decoding.md); left to right has the same temperature
OLDER = dict(sampler="confidence", temperature=1.0, top_k=50)
NEWER = dict(sampler="threshold", temperature=0.7, top_k=0)
INTERACTIVE_LEAVES_OUT = (
    "prompt", "prompts_file", "text", "transliterate", "json", "out_json", "stream",
)
LONGEST = 128             # new tokens of sample, if --max_new_tokens is not typed


@dataclass
class SampleArgs(GenerateFlags, CommonFlags):
    "Sampling"
    examples = (
        ("python -m sample", "a text of the newest run, with what suits its checkpoint"),
        (
            'python -m sample checkpoints/eco_hybrid_hi --prompt "mai kal bazaar gaya tha"',
            "continue a text",
        ),
        (
            'python -m sample checkpoints/eco_hybrid_hi --text "mai kal ____ gaya tha"',
            "fill the gap in a text",
        ),
        (
            "python -m sample checkpoints/eco_hybrid_hi --prompts_file prompts.txt --json",
            "a line per prompt, as JSON",
        ),
    )
    first = ("Sampling", "Generation", "Checkpoint")
    # what is not typed is chosen to suit the checkpoint, by sampling/settings.py
    ckpt: str = flag(
        None,
        "checkpoint or run folder, or hf:owner/name@revision on the hub; none = the newest run "
        "under checkpoints/; the flag's name may be left out",
        positional=True,
    )
    max_new_tokens: int = flag(
        None,
        f"length of the new text; none = {LONGEST}, or as many as the checkpoint was trained for",
        at_least=1,
        aliases=("seq_len",),
    )
    steps: int = flag(
        0,
        "forwards at most, per block if blockwise; 0 = the checkpoint's, or as many as threshold, "
        "factor and entropy need. Typed without --blockwise: the text in one piece, by "
        f"{OLDER['sampler']}, temperature {OLDER['temperature']:g}, top_k {OLDER['top_k']}, as in "
        "the older guides",
        at_least=0,
        aliases=("num_steps",),
    )
    sampler: str = flag(
        None,
        "which positions come first; speculate = left to right in verified drafts; of gaussian "
        "ddim, ddpm, dpmpp, which are else confidence, ancestral, confidence; none = left to "
        "right where the checkpoint was trained in blocks and no other flag asks for them, else "
        f"{NEWER['sampler']}, with --steps {OLDER['sampler']}",
        aliases=("scheduler",),
        choices=SAMPLERS,
        values={"first_hitting": "random"},
    )
    temperature: float = flag(
        None,
        f"0 = greedy; none = {NEWER['temperature']:g}, with --steps {OLDER['temperature']:g}",
        at_least=0,
    )
    top_k: int = flag(
        None, f"0 = off; none = {NEWER['top_k']}, with --steps {OLDER['top_k']}", at_least=0
    )
    eta: float = flag(
        0.0, "noise of ddim, 1 = ddpm's; gaussian only", at_least=0, at_most=1, rare=True
    )
    text: str = flag(
        None, "infill: every ____ (two underscores a token) or [MASK] is filled, the rest stays"
    )
    transliterate: str = flag(
        None,
        "Hinglish to Hindi, with a model of prepare --source transliterate: this text; alone, the "
        "lines of --prompts_file or of standard input, each answered as soon as it is read",
        bare="-",
    )
    num_samples: int = flag(
        1,
        "continuations per prompt; seeds seed, seed+1, ..., on and on over all prompts",
        at_least=1,
        at_most=100_000,
    )
    blockwise: bool = flag(
        None,
        "in blocks, one after the other; none = where the checkpoint was trained in blocks, but "
        "not with --steps",
        bare="on",
    )
    frozen_context: bool = flag(
        None,
        "exact cached context of the blocks; none = as --blockwise, if that is not typed either",
        bare="on",
    )
    edge_profile: str = flag(
        "none",
        "balanced = temperature 0.8, max = greedy; left to right, or in blocks where "
        "edge_benchmark --profiles proved them faster or a flag asks for them",
        choices=tuple(SAMPLE_PROFILES),
        elsewhere=dict.fromkeys(("tiny", "laptop"), "that is a profile of train"),
    )
    ignore_eos: bool = flag(False, "always the full length")
    cache_dtype: str = flag(
        "auto",
        "numbers in the transformer's cache; auto = as the products give them, which is exact; "
        "int8 has a scale for each head and token, and is an approximation",
        choices=("auto", "fp32", "bf16", "int8"),
        aliases=("kv_cache",),
        rare=True,
    )
    interactive: bool = flag(
        False, "prompts are typed one after the other; /help there lists what else is possible"
    )
    stream: bool = flag(False, "print each block as soon as it is final")
    show_steps: bool = flag(
        False,
        "watch every forward on stderr, coloured by confidence; --sampler threshold shows a block "
        "that is filled in",
    )
    json: bool = flag(False, "one JSON object per sample instead of text")
    benchmark_runs: int = flag(1, "timed runs; more than one prints [bench]", at_least=1, rare=True)
    warmup_runs: int = flag(0, "untimed runs before them", at_least=0, rare=True)
    out_json: str = flag(None, "write texts and statistics", rare=True)
    completion: str = flag(
        None,
        "print a script that lets the tab key complete all commands' flags, then stop",
        choices=("bash", "zsh"),
        rare=True,
    )

    needs_ckpt = False

    def problems(self):
        if self.stream and self.json:
            yield (
                "--stream prints text while it grows, --json prints objects: "
                "give only one of them"
            )
        if self.text is not None and (self.prompt or self.prompts_file):
            yield (
                "--text fills gaps, --prompt and --prompts_file are continued: "
                "give only one of them"
            )
        if self.transliterate is not None:
            yield from self.problems_of_transliterate()
        if self.interactive:
            for name in INTERACTIVE_LEAVES_OUT:
                if getattr(self, name):
                    yield (
                        f"--interactive asks for prompts and prints each text while it grows: "
                        f"leave --{name} out"
                    )
        if self.text == "":
            yield "--text is empty: write ____ or [MASK] where text is missing"


    def problems_of_transliterate(self):
        if self.prompt or self.text is not None or self.num_samples > 1:
            yield (
                "--transliterate has a text of its own and one answer: leave --prompt, --text and "
                "--num_samples out"
            )
        if self.prompts_file and self.transliterate != "-":
            yield "--transliterate TEXT and --prompts_file: give only one of them"


@dataclass
class EvaluateArgs(DecodeFlags, CheckpointFlags, CommonFlags):
    "Evaluation"
    examples = (
        (
            "python -m evaluate checkpoints/eco_hybrid_hi",
            "the bound and the chain rule of held-out text",
        ),
        ("python -m evaluate checkpoints/eco_hybrid_hi --samples 64", "text of its own, judged"),
        (
            "python -m evaluate --check_run checkpoints/eco_hybrid_hi",
            "the runbook's verdict on a run",
        ),
        (
            "python -m evaluate checkpoints/eco_hybrid_hi --needle --lengths 128 256 512",
            "what a long context is worth",
        ),
    )
    first = ("Evaluation", "Checkpoint")
    engine: str = again(GenerateFlags, "engine")
    data_dir: str = flag(
        None,
        "prepared text, whose validation part is scored; none = the checkpoint's",
        aliases=("data",),
    )
    text: str = flag(
        None,
        "score this file instead: .txt (a blank line ends a document) or .jsonl, as prepare reads "
        "it",
    )
    max_docs: int = flag(0, "documents at most; 0 = as many as --batches allows", at_least=0)
    blocks: str = flag(None, "block rules to score, such as T,64; none = those it was trained with")
    batches: int = flag(20, "batches of windows at most, of the size used in training", at_least=1)
    draws: int = flag(4, "mask draws per sequence", at_least=1)
    check_run: str = flag(None, "instead: judge this run folder by the runbook's criteria")
    chain_docs: int = flag(
        32,
        "documents (first window) for infilling and the chain rule, S forwards each; 0 = all",
        at_least=0,
    )
    repeats: int = flag(
        8,
        "passes of each estimator when they are compared; below 2 = not compared",
        at_least=0,
        rare=True,
    )
    max_new_tokens: int = flag(64, "length of a sample", at_least=1)
    samples: int = flag(0, "continue so many held-out beginnings and judge the text", at_least=0)
    judge: str = flag(
        None,
        "an autoregressive checkpoint that judges them beside the n-gram model of the training "
        "text",
    )
    judge_text: str = flag(
        None, "text that the model has not read, .txt or .jsonl: its n-gram model judges them, too"
    )
    lengths: tuple = flag(
        (),
        "instead: bits/byte left to right by position, up to these lengths, such as 128 256 512",
        many="several",
    )
    needle: bool = flag(
        False,
        "instead: is a value found again whose key stood earlier in held-out text? in --lengths, "
        "or half, once and twice the trained length",
    )
    cache_dtype: str = again(SampleArgs, "cache_dtype")
    out_json: str = flag(None, "write the numbers")
    out_png: str = flag(None, "draw the cross-entropy by mask rate")

    def problems(self):
        yield from block_problems("blocks", self.blocks or "T")
        if self.ckpt and self.check_run:
            yield "--ckpt asks for the bound, --check_run for the verdict: give only one of them"
        for name in ("judge", "judge_text"):
            if getattr(self, name) and not self.samples:
                yield f"--{name} {getattr(self, name)} judges samples: add --samples 64"
        yield from self.context_problems()

    def context_problems(self):
        """What is wrong with --lengths and --needle, in sentences."""
        wrong = [word for word in self.lengths if not re.fullmatch("[0-9]{2,7}", word)]
        if wrong or any(length < 32 for length in self.lengths_asked):
            yield f"--lengths {' '.join(self.lengths)}: must be numbers of tokens of at least 32"
        if (self.lengths or self.needle) and (self.samples or self.check_run):
            other = "samples" if self.samples else "check_run"
            yield f"--lengths and --needle come instead of --{other}: give only one of them"
        if self.cache_dtype != "auto" and not (self.lengths or self.needle):
            yield f"--cache_dtype {self.cache_dtype} belongs to --lengths and --needle: add one"

    @property
    def lengths_asked(self):
        """--lengths as numbers, the shortest first."""
        return sorted({int(word) for word in self.lengths if word.isdecimal()})


@dataclass
class BenchArgs(GenerateFlags, CommonFlags):
    "Benchmark"
    examples = (
        (
            "python -m edge_benchmark checkpoints/eco_hybrid_hi",
            "speed and text of every decode mode",
        ),
        (
            "python -m edge_benchmark checkpoints/eco_hybrid_hi --profiles balanced max",
            "which rule sample's profiles take here",
        ),
        (
            "python -m edge_benchmark checkpoints/eco_hybrid_hi --grid threshold=0.7,0.9",
            "every one of these settings, and a picture",
        ),
    )
    first = ("Benchmark", "Generation", "Checkpoint")
    temperature: float = again(GenerateFlags, "temperature", 0.0)
    top_k: int = again(GenerateFlags, "top_k", 0)
    modes: tuple = flag(
        ("full", "block", "block_frozen"),
        "decode modes",
        choices=("full", "block", "block_frozen"),
        many="several",
    )
    runs_per_prompt: int = flag(3, "timed runs", at_least=1)
    warmup_runs: int = flag(1, "untimed runs, per mode and prompt", at_least=0)
    grid: tuple = flag(
        (),
        "NAME=VALUE,VALUE ...: every combination of these settings of sample, and a picture",
        many="several",
    )
    peer: tuple = flag(
        (),
        "FILE ...: other engines' speed (JSON, or what benchmarks/decode_peers.py prints), drawn "
        "into the picture of --grid",
        many="several",
    )
    profiles: tuple = flag(
        (),
        "instead: these profiles of sample in blocks and left to right; sample takes what is "
        "proved to be faster here and to lose nothing",
        many="several",
        choices=tuple(SAMPLE_PROFILES)[1:],
    )
    data_dir: str = flag(
        None,
        "prepared text for the judge and the held-out bound; none = the checkpoint's",
        rare=True,
    )
    out_json: str = flag("benchmarks/edge_benchmark.json", "where the result goes")

    def problems(self):
        if self.profiles and self.grid:
            yield "--profiles and --grid: give only one of them"
        if self.peer and not self.grid:
            yield "--peer is drawn into the picture of --grid: give that, too"


@dataclass
class ExportArgs(CheckpointFlags, EveryFlags):
    "Export"
    examples = (
        (
            "python -m export checkpoints/eco_hybrid_hi",
            "a folder in exports/ that needs no PyTorch",
        ),
        ("python -m export checkpoints/eco_hybrid_hi --bits 32", "the same, with nothing lost"),
        (
            "python -m export checkpoints/eco_hybrid_hi --format hf --output exports/hindi",
            "a folder that transformers loads",
        ),
        (
            "python -m export checkpoints/eco_hybrid_hi --format web",
            "a folder for any static host: the model runs in the visitor's browser",
        ),
    )
    first = ("Export", "Checkpoint")
    format: str = flag(
        "onnx",
        "what is written: onnx runs without PyTorch, hf in the transformers library, web in a "
        "browser without a server",
        choices=("onnx", "hf", "web"),
    )
    bits: str = flag(
        "8",
        "of a weight in onnx and web: 8 loses next to nothing, 4 is smaller, 32 is exact",
        choices=("8", "4", "32"),
    )
    output: str = flag(
        None,
        "the folder; none = exports/ and the run's name, with -hf or -web behind it for these",
    )
    weight_block: int = flag(
        32, "weights that share a scale: 16, 32, 64, 128 or 256", at_least=16, rare=True
    )
    data_dir: str = flag(
        None, "prepared text for the bits/byte that are lost; none = the checkpoint's", rare=True
    )
    push: str = flag(
        None, "publish the folder of hf on the hub as owner/name; what is new there is private"
    )
    figures: str = flag(None, "for the card of hf: a file that evaluate --out_json wrote")
    licence: str = flag(
        None, "of the weights, for the card of hf, as the hub calls it, such as apache-2.0"
    )
    web_runtime: str = flag(
        None,
        "for web: the folder of npm's package onnxruntime-web; none = node_modules/onnxruntime-web",
    )
    seed: int = again(CommonFlags, "seed")
    threads: int = again(CommonFlags, "threads")

    def problems(self):
        if self.weight_block not in (16, 32, 64, 128, 256):
            yield f"--weight_block {self.weight_block}: must be 16, 32, 64, 128 or 256"
        for name in ("figures", "licence"):
            if getattr(self, name) and self.format != "hf":
                yield f"--{name} is for the model card, which only --format hf writes"
        if self.push and self.format != "hf":
            yield "--push is for --format hf, which the hub's users can load"
        if self.push and not is_name(self.push):
            yield f"--push {self.push}: name it owner/name, as the hub does"
        if self.web_runtime and self.format != "web":
            yield "--web_runtime is for --format web"
        if self.licence and not re.fullmatch(r"[a-z0-9.-]+", self.licence):
            yield f"--licence {self.licence}: name it as the hub does, such as apache-2.0 or mit"


@dataclass
class ServeArgs(CheckpointFlags, EveryFlags):
    "Serving"
    examples = (
        ("python -m serve", "the newest run, at http://127.0.0.1:8000/"),
        ("python -m serve checkpoints/eco_hybrid_hi --port 9000", "another run, another port"),
        ("python -m serve --ckpt exports/eco_hybrid_hi", "an exported model, without PyTorch"),
    )
    first = ("Serving", "Checkpoint")
    ckpt: str = again(SampleArgs, "ckpt")
    host: str = flag(
        "127.0.0.1", "address to listen at; another than this machine's own needs --token_file"
    )
    port: int = flag(8000, "where it listens; 0 = any free one", at_least=0, below=65536)
    token_file: str = flag(
        None, "a file whose first line clients must send as their API key; none = no key"
    )
    queue: int = flag(64, "requests that may wait; more are refused with 429", at_least=1)
    parallel: int = flag(
        16, "texts from left to right that are written at once; 1 = one request at a time",
        at_least=1,
    )
    max_length: int = flag(2048, "tokens of a text at most, prompt included", at_least=2)
    max_work: int = flag(
        1_000_000,
        "positions that go through the network for a request at most: forwards x what each reads",
        at_least=1,
        rare=True,
    )
    engine: str = again(GenerateFlags, "engine")
    precision: str = again(GenerateFlags, "precision")
    device: str = again(CommonFlags, "device")
    threads: int = again(CommonFlags, "threads")
    print_config: bool = again(CommonFlags, "print_config")

    needs_ckpt = False

    def problems(self):
        yield from CommonFlags.problems(self)


@dataclass
class ReportArgs(CheckpointFlags, EveryFlags):
    "Report"
    examples = (
        ("python -m report checkpoints/eco_hybrid_hi", "report.html in that run folder"),
        ("python -m report checkpoints/eco_hybrid_hi --out page.html", "the same page elsewhere"),
    )
    first = ("Report", "Checkpoint")
    out: str = flag(None, "where the page goes; none = report.html in the run folder")


@dataclass
class ColabArgs(TrainArgs, PrepareFlags, ColabFlags):
    examples = (
        (
            "python -m colab_train_eco --max_steps 500 --compile",
            "data, tokenizer, training and verdict on a GPU",
        ),
        (
            "python -m colab_train_eco --drive /content/drive/MyDrive/Aria",
            "with copies on a drive: the same again goes on there",
        ),
        (
            "python -m colab_train_eco --allow_cpu --preset tiny --max_steps 50",
            "a small try without a GPU",
        ),
    )
    first = ("One-shot",)
    n_layers: int = again(ModelFlags, "n_layers", 10)
    auto_batch: bool = again(OptimFlags, "auto_batch", True)
    save_minutes: float = again(RunFlags, "save_minutes", 10.0)


@dataclass
class ExperimentArgs(TrainArgs, ExperimentFlags):
    "Scoring"
    examples = (
        ("python -m run_experiments", "the plan of 8 runs and their commands, nothing else"),
        ("python -m run_experiments --max_steps 2000 --execute", "run what is not finished"),
        (
            "python -m run_experiments --study memory_slots --halving --execute",
            "only the better half goes on",
        ),
        (
            "python -m run_experiments --report checkpoints/ablations",
            "report.html and results.md there",
        ),
    )
    first = ("Experiments", "Scoring")
    max_steps: int = again(OptimFlags, "max_steps", 2000)
    d_model: int = again(ModelFlags, "d_model", 384)
    d_ff: int = again(ModelFlags, "d_ff", 1024)
    batches: int = again(EvaluateArgs, "batches")
    draws: int = again(EvaluateArgs, "draws")
    chain_docs: int = again(EvaluateArgs, "chain_docs", 8)


@dataclass
class LaunchFlags:
    "Launch"
    run: bool = flag(False, "start it; without this flag only the plan is printed", "ignore")
    tier: str = flag(
        "none",
        "lengths and --grad_accum for this memory of a GPU; auto = of the GPU that is here",
        "ignore",
        choices=("none", "auto", *LAUNCH_TIERS),
    )
    match: str = flag(
        "none",
        "params: the --d_ff that gives the variant as many parameters as the baseline has",
        "ignore",
        choices=("none", "params"),
    )
    run_root: str = flag("runs", "where run folders go", "ignore")
    tag: str = flag("oneb", "the run folder is RUN_ROOT/TAG_VARIANT_seedSEED", "ignore")
    tok_s: str = flag(
        "10000-25000",
        "tokens a second, for the hours: a number, two, or a run folder that measured it",
        "ignore",
    )
    price: float = flag(
        0.0, "of an hour of one GPU, for the cost; 0 = not known", "ignore", at_least=0
    )
    gpus: int = flag(1, "processes on this machine, one a GPU, by torchrun", "ignore", at_least=1)
    python: str = flag(None, "the interpreter; none = the one that runs this", "ignore")


@dataclass
class LaunchArgs(TrainArgs, LaunchFlags):
    examples = (
        ("python -m run_1b_launch --data fineweb_1b.npy", "the plan of a run, and its command"),
        ("python -m run_1b_launch --data fineweb_1b.npy --run", "the same, and start it"),
        (
            "python -m run_1b_launch --data fineweb_1b.npy --variant gqa --tier 24gb",
            "another attention, for a smaller GPU",
        ),
    )
    first = ("Launch",)
    data_dir: str = again(DataFlags, "data_dir", "fineweb_1b.npy")
    model: str = again(ModelFlags, "model", "backup")
    attn: str = again(ModelFlags, "attn", "decoupled")
    d_model: int = again(ModelFlags, "d_model", 2048)
    n_layers: int = again(ModelFlags, "n_layers", 22)
    n_heads: int = again(ModelFlags, "n_heads", 32)
    d_ff: int = again(ModelFlags, "d_ff", 5632)
    max_steps: int = again(OptimFlags, "max_steps", 20_000)
    seq_len: int = again(OptimFlags, "seq_len", 1024)
    seq_schedule: str = again(OptimFlags, "seq_schedule", "1024@0,2048@10000")
    max_context: int = again(OptimFlags, "max_context", 2048)
    batch_size: int = again(OptimFlags, "batch_size", 1)
    grad_accum: int = again(OptimFlags, "grad_accum", 16)
    optimizer: str = again(OptimFlags, "optimizer", "lion")
    lr: float = again(OptimFlags, "lr", 2e-4)
    param_dtype: str = again(OptimFlags, "param_dtype", "bf16")
    activation_checkpointing: bool = again(OptimFlags, "activation_checkpointing", True)
    save_interval: int = again(RunFlags, "save_interval", 0)
    log_interval: int = again(RunFlags, "log_interval", 20)
    if_exists: str = again(RunFlags, "if_exists", "suffix")
    live: str = again(RunFlags, "live", "off")

    @property
    def run_dir(self):
        return Path(self.run_root, f"{self.tag}_{variant_name(self)}_seed{self.seed}")

    @property
    def speeds(self):
        """--tok_s as numbers, the lowest first; none if it names a run folder."""
        found = re.fullmatch(r"([0-9.]{1,12})(?:-([0-9.]{1,12}))?", self.tok_s)
        if not found:
            return []
        try:
            return sorted(float(number) for number in found.groups() if number)
        except ValueError:
            return []

    def problems(self):
        if self.model != "backup":
            yield f"--model {self.model}: the launcher plans the transformer: use python -m train"
        for name in ("output_dir", "run_name"):
            if getattr(self, name):
                yield f"--{name}: the launcher names the folder: use --run_root and --tag"
        if not re.fullmatch(r"\w[^/\\\0]*", self.tag):
            yield f"--tag {self.tag}: must be a plain name (a path goes to --run_root)"
        if self.batch_size * self.grad_accum % self.gpus:
            yield (
                f"--batch_size {self.batch_size} x --grad_accum {self.grad_accum} do not divide "
                f"over --gpus {self.gpus}: change one of the three"
            )
        if self.speeds and self.speeds[0] <= 0:
            yield f"--tok_s {self.tok_s}: must be above 0"


def variant_name(args):
    """The guide's name of an attention variant."""
    return "baseline" if args.attn == "mha" else args.attn


def launch_base(typed):
    """The settings of run_1b_launch just above its defaults: a tier's, and what follows from what
    was typed. A typed --seq_len, or a preset's, takes the place of the default schedule.
    """
    # together, so that the rate is taken for that of this optimizer
    settings = {"lr": LaunchArgs.lr, "optimizer": typed.get("optimizer", LaunchArgs.optimizer)}
    if typed.get("tier", "none") in LAUNCH_TIERS:
        settings |= LAUNCH_TIERS[typed["tier"]][1]
    if "seq_len" in typed or typed.get("preset", "none") != "none":
        settings["seq_schedule"] = None
    return settings


COMMANDS = dict(
    train=TrainArgs,
    sample=SampleArgs,
    prepare=PrepareArgs,
    prepare_fineweb=FinewebArgs,
    evaluate=EvaluateArgs,
    edge_benchmark=BenchArgs,
    export=ExportArgs,
    serve=ServeArgs,
    report=ReportArgs,
    colab_train_eco=ColabArgs,
    run_experiments=ExperimentArgs,
    run_1b_launch=LaunchArgs,
)


def next_commands(run, step, max_steps, source):
    """[(what it does, the command)] for a run folder: summary.md, report.html and colab_train_eco
    print the same ones. source: of its text.
    """
    name = shlex.quote(str(run))
    go_on = f"python -m train --resume {name}"
    if step >= max_steps:
        go_on += f" --max_steps {2 * max_steps}"
    if source == "transliterate":       # it does nothing else
        ask = f'python -m sample --ckpt {name} --transliterate "{PROMPTS[0]}"'
        return [("sample", ask), ("go on", go_on)]
    return [
        ("sample", f'python -m sample --ckpt {name} --prompt "{PROMPTS[0]}"'),
        ("evaluate", f"python -m evaluate --ckpt {name}"),
        ("go on", go_on),
    ]


# --------------------------------------------------------------------------------------------------
# the settings in a checkpoint

# what the users of a trained model read from the settings of its training
READ_LATER = ("seq_len", "batch_size", "train_block_sizes", "sample_steps", "data_dir")
READ_IF_THERE = ("seq_schedule", "max_steps", "guidance_scale")     # an older run has none


def longest_row(settings, steps=None):
    """Of the settings in a checkpoint: the longest row of its run, or of so many steps of it."""
    schedule = settings.get("seq_schedule")
    if schedule is None:
        return settings["seq_len"]
    if steps is None:
        steps = settings["max_steps"]
    return Lengths.of(settings["seq_len"], schedule).longest(steps)


def trained_length(saved):
    """Tokens of the longest row that this checkpoint has learned from."""
    return longest_row(saved.config["args"], saved.step)


def scored_length(saved):
    """Tokens of a held-out window: the longest row of the run, so that the figures of all its
    checkpoints compare, with each other and with those of the training.
    """
    return longest_row(saved.config["args"])


def check_saved(settings, where):
    """As check_any; what knows masks alone reads no checkpoint of --objective gaussian."""
    check_any(settings, where)
    if settings.get("objective") == "gaussian":
        raise UserError(
            f"{where}: trained with --objective gaussian, which only train, sample and evaluate "
            "read: name a checkpoint of --objective masked or ar"
        )


def check_any(settings, where):
    """The settings in a checkpoint, before its model is used: those that commands read are there,
    and within their limits. `where` names the file.
    """
    missing = [name for name in READ_LATER if name not in settings]
    if missing:
        raise UserError(
            f"{where} lacks {', '.join(missing)}: another version wrote it, or it was changed by "
            "hand"
        )

    read = {name: settings[name] for name in READ_LATER}
    read |= {name: settings[name] for name in READ_IF_THERE if name in settings}
    values = checked(TrainArgs, read, where)
    problems = list(block_problems("train_block_sizes", values["train_block_sizes"]))
    problems += saved_schedule_problems(values)
    if "\0" in values["data_dir"]:
        problems.append("data_dir holds a zero byte, which no path can")
    if problems:
        raise UserError(f"{where}: " + "; ".join(problems))


def saved_schedule_problems(values):
    """What is wrong with the schedule in a checkpoint, in sentences."""
    if values.get("seq_schedule") is None:
        return
    if "max_steps" not in values:
        yield "seq_schedule needs max_steps, which is missing"
    try:
        read_schedule(values["seq_schedule"])
    except ValueError as error:
        yield f"seq_schedule {error}"
