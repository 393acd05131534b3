"""The named studies of run_experiments: what is asked, and what changes, one thing at a time.

    python -m run_experiments --study memory_slots            # the plan; --execute runs it

Used by run_experiments.py and by config.py, for the flags at the end. A study is a base (settings
of train just above the defaults; a preset or a flag beats them) and variants, each the settings
that differ from the base. The first variant is the reference: sizes are matched to it and
differences are against it. `before`: what has to be prepared first. Only what a model can do is
here.
"""
import re
from dataclasses import dataclass
from typing import NamedTuple

from common.flags import flag
from model_config import OLD_MODELS

# About 5M parameters in the layers; 3,000 steps of 4,096 tokens. The validations are the curve, so
# they come often.
SMALL = dict(
    d_model=256,
    n_layers=6,
    n_heads=4,
    d_ff=1024,
    memory_slots=16,
    seq_len=256,
    batch_size=16,
    grad_accum=1,
    optimizer="muon",
    lr=2e-2,
    max_steps=3000,
    eval_interval=250,
    save_interval=500,
    show_samples=False,
)
# about 15M parameters in the layers, for what matters most
LARGE = SMALL | dict(d_model=448, n_layers=8, n_heads=8, d_ff=1120, lr=1e-2)
SEEDS = ("1337", "1338", "1339")


class Study(NamedTuple):
    question: str
    variants: dict          # name -> {flag of train: value}
    measure: str = "bound in every block rule and bits/byte on held-out documents, tokens/s"
    base: dict = SMALL
    before: tuple = ()      # commands that prepare its data
    seeds: tuple = SEEDS


# What is compared in the studies of the objective, each at the rate of Muon at which it learned
# best (study rates, docs/results.md).
ARMS = dict(
    primary=dict(lr=2e-2),
    backup=dict(model="backup", lr=5e-3),
    ar=dict(model="backup", objective="ar", lr=1e-2),
    eco_ar=dict(objective="ar", lr=2e-2),
)


def rates(optimizer, *peaks):
    """A variant for each peak rate of this optimizer."""
    return {f"{optimizer}_{peak:g}": dict(optimizer=optimizer, lr=peak) for peak in peaks}


# The attentions that run_1b_launch offers, at a size that a small machine trains, with heads as
# wide as there. --d_ff makes their parameters equal, so that a narrower one has a wider MLP.
ATTENTIONS = dict(
    mha={},
    gqa=dict(attn="gqa"),
    bottleneck=dict(attn="bottleneck"),
    decoupled=dict(attn="decoupled"),
)
ATTENTION = dict(
    model="backup",
    objective="ar",
    d_model=256,
    n_layers=4,
    n_heads=4,
    d_ff=512,
    seq_len=256,
    batch_size=16,
    grad_accum=1,
    optimizer="muon",
    lr=1e-2,
    max_steps=400,
    eval_interval=200,
    save_interval=400,
    show_samples=False,
    compile=True,
)


def rates_of(arms, peaks):
    """A variant for each arm at each of these peak rates."""
    return {
        f"{arm}_{peak:g}": settings | dict(lr=peak)
        for arm, settings in arms.items()
        for peak in peaks
    }


def rates_of_arms():
    """A variant for each arm at each of three peak rates."""
    variants = {}
    for arm, settings in ARMS.items():
        third = 4e-2 if arm == "primary" else 5e-3
        for peak in (2e-2, 1e-2, third):
            variants[f"{arm}_{peak:g}"] = settings | dict(lr=peak)
    return variants


VOCABULARIES = (8000, 2000, 4000, 16000)
STUDIES = {
    "loss": Study(
        "Which loss, schedule and draw of times?",
        dict(
            masked_mean={},
            elbo=dict(loss="elbo"),
            cosine=dict(mask_schedule="cosine"),
            uniform_times=dict(timestep_sampling="uniform"),
        ),
    ),
    "blocks": Study(
        "Which block rules should training draw from, and what does each cost?",
        {
            "T_32_16_4": {},
            "no_fade": dict(ar_fade=0.0),
            "fade_1": dict(ar_fade=1.0),
        }
        | {
            rules.replace(",", "_"): dict(train_block_sizes=rules)
            for rules in ("T,64,32", "T,32,4,1", "T", "32", "4")
        },
        "bound in T, 32, 4 and the NLL of every variant, whatever it was trained with; tokens/s",
    ),
    "noisy_weight": Study(
        "How much should the noisy stream's loss weigh beside left to right?",
        {"1": {}, "0.3": dict(noisy_weight=0.3), "3": dict(noisy_weight=3.0)},
    ),
    "memory_slots": Study(
        "How many memory slots?",
        {
            "16": {},
            "8": dict(memory_slots=8),
            "32": dict(memory_slots=32),
            "64": dict(memory_slots=64),
        },
    ),
    "memory_width": Study(
        "How wide is the memory?", {"half": {}, "quarter": dict(d_mem=64), "full": dict(d_mem=256)}
    ),
    "conv_kernel": Study(
        "How far should the convolution reach?",
        {"3": {}, "5": dict(conv_kernel=5), "7": dict(conv_kernel=7), "11": dict(conv_kernel=11)},
    ),
    "optimizer": Study(
        "Which update rule, each at its own best rate?",
        rates("muon", 2e-2, 1e-3, 1e-2, 4e-2)
        | rates("adamw", 1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
        | rates("lion", 1e-4, 3e-4, 1e-3, 3e-3),
    ),
    "weight_decay": Study(
        "How much weight decay?",
        {"0.05": {}, "0": dict(weight_decay=0.0), "0.2": dict(weight_decay=0.2)},
    ),
    "ema": Study(
        "Are averaged weights better?",
        {"off": {}, "0.99": dict(ema=0.99), "0.999": dict(ema=0.999)},
    ),
    "vocabulary": Study(
        "How many pieces?",
        {f"{v}": dict(data_dir=f"data/pieces_{v}") for v in VOCABULARIES},
        "bits/byte of all held-out text, as each cuts its windows elsewhere; layers of equal size, "
        "so the embedding differs",
        base=SMALL | dict(data_dir=f"data/pieces_{VOCABULARIES[0]}", batches=1000),
        before=tuple(
            "python -m prepare --source files --input hindi.jsonl hinglish.jsonl "
            f"--tokenizer_vocab {v} "
            f"--tokenizer data/tokenizer/pieces_{v}.model --data_dir data/pieces_{v}"
            for v in VOCABULARIES
        ),
    ),
    "masking": Study(
        "Hide tokens or spans?",
        dict(
            token={},
            span_3=dict(masking_strategy="span"),
            span_6=dict(masking_strategy="span", mean_span_length=6.0),
        ),
        "bound; it always hides single tokens",
    ),
    "mask_rates": Study(
        "Which shares should be hidden in training? Decoding begins with all.",
        {
            "0_to_0.8": {},
            "0_to_1": dict(max_mask_rate=1.0),
            "0.2_to_0.9": dict(min_mask_rate=0.2, max_mask_rate=0.9),
            "0.3_to_1": dict(min_mask_rate=0.3, max_mask_rate=1.0),
            "0_to_0.6": dict(max_mask_rate=0.6),
        },
        "bound, which weighs every share alike",
    ),
    "rates": Study(
        "At which rate does each arm learn best? Before the arms are compared, each at its own.",
        rates_of_arms(),
    ),
    "objective": Study(
        "What does diffusion cost against left to right, and EcoHybrid against the transformer?",
        ARMS,
    ),
    "objective_15m": Study(
        "The same at 15M in the layers. A width where EcoHybrid learns best at half the rate.",
        ARMS | dict(primary={}, ar=ARMS["ar"] | dict(lr=5e-3), eco_ar=dict(objective="ar")),
        base=LARGE,
    ),
    "epochs": Study(
        "Many passes over a small corpus: does diffusion overtake?",
        {k: ARMS[k] for k in ("primary", "ar")}
        | dict(
            ar_dropout=ARMS["ar"] | dict(dropout=0.1),
            backup=ARMS["backup"],
            whole_rows=dict(lr=2e-2, train_block_sizes="T", ar_fade=0.0),
        ),
        "the curve over the passes (tokens / tokens of the corpus), its lowest point and its end",
        base=SMALL | dict(data_dir="data/small", max_steps=4000),
        before=(
            "python -m prepare --source files --input hindi.jsonl --max_chars 2000000 "
            "--tokenizer_vocab 4000 "
            "--tokenizer data/tokenizer/small.model --data_dir data/small",
        ),
    ),
    "attention_rates": Study(
        "At which rate does each attention of the transformer learn best?",
        rates_of(ATTENTIONS, (1e-2, 5e-3, 2e-2)),
        base=ATTENTION,
    ),
    "attention": Study(
        "What does a smaller cache cost the transformer at equal parameters?",
        ATTENTIONS,
        base=ATTENTION,
    ),
}


@dataclass
class ExperimentFlags:
    "Experiments"
    execute: bool = flag(False, "run them; without it only the plan is written")
    study: str = flag(
        None, "a named study (studies.py) instead of the matrix", choices=tuple(STUDIES)
    )
    output_root: str = flag(
        None, "folder of the runs; none = checkpoints/ablations, or checkpoints/studies/STUDY"
    )
    architectures: tuple = flag(
        ("primary", "backup"),
        "denoisers of the matrix; the first is the size reference",
        many="several",
        choices=("primary", "backup"),
        values=OLD_MODELS,
    )
    time_modes: tuple = flag(
        ("discrete", "continuous"), "its times", many="several", choices=("discrete", "continuous")
    )
    masking_strategies: tuple = flag(
        ("token", "span"), "what it hides", many="several", choices=("token", "span")
    )
    match: str = flag(
        "params",
        "what all share beside the tokens: params or flops, by their d_ff; tokens: nothing; time: "
        "parameters and seconds",
        choices=("params", "flops", "tokens", "time"),
        values={"none": "tokens"},
    )
    seeds: tuple = flag((), "a run for each; none = --seed, of a study its three", many="several")
    only: tuple = flag(
        (), "these variants and the first, to which they are compared; none = all", many="several"
    )
    halving: bool = flag(
        False, "go on with the better half at an eighth, a quarter, ... of the steps"
    )
    report: str = flag(
        None,
        "instead: make report.html and results.md of this folder from its results.jsonl, or those "
        "one level below",
    )
    results_page: str = flag(
        None,
        "page whose generated part --report renews; none = results.md in the folder of --report",
        rare=True,
    )

    def problems(self):
        for seed in self.seeds:
            if not re.fullmatch("[0-9]{1,18}", seed):
                yield f"--seeds {seed}: must be whole numbers of at least 0"
        if self.halving and self.match == "time":
            yield (
                "--halving judges all at one step, --match time gives each its own number: "
                "give only one of them"
            )
        if self.report and (self.execute or self.study):
            yield "--report reads what has run: leave out --execute and --study"
