"""What a training asks: the objective, how much is hidden, in which blocks and when. Knobs, and what follows from them.

    args.block_choices, args.single_chance(step)     # what masking.pick_blocks draws from
    args.most_hidden                                 # how much masking.draw hides at most
"""
import re
from dataclasses import dataclass

from common.flags import knob, split_list

AR_FADE, MOST_HIDDEN = 0.6, 0.8      # docs/experiments/, 2026-11-22


@dataclass
class MaskKnobs:
    "Objective"
    objective: str = knob("masked", "masked diffusion, or its control: ar, autoregressive, left to right; backup only", "must",
                          choices=("masked", "ar"))
    loss: str = knob("masked_mean", "mean over masked tokens, or elbo: the bound, which is what validation always prints",
                     choices=("elbo", "masked_mean"))
    mask_schedule: str = knob("linear", "mask rate as a function of time", choices=("cosine", "linear"))
    min_mask_rate: float = knob(0.0, "lowest mask rate", at_least=0, at_most=1, rare=True)
    max_mask_rate: float = knob(-1.0, "highest mask rate; -1 = 1, or 0.8 of masked_mean with single tokens among the blocks, "
                                "which are hidden whole", at_least=-1, at_most=1, rare=True)
    time_mode: str = knob("continuous", "times: any, or levels", choices=("continuous", "discrete"), rare=True)
    timestep_sampling: str = knob("stratified", "draw of times", choices=("stratified", "uniform"), rare=True)
    timesteps: int = knob(32, "levels of discrete time", at_least=2, rare=True)
    masking_strategy: str = knob("token", "what is hidden in training", choices=("token", "span"))
    mean_span_length: float = knob(3.0, "tokens per span", above=0, rare=True)
    sample_steps: int = knob(12, "stored default of sample --steps", at_least=1, rare=True)
    train_block_sizes: str = knob("T,32,4,1", "block rules drawn per step: T (whole sequence) or numbers")
    ar_fade: float = knob(-1.0, "begin autoregressive, with blocks of one token, which over this share of the steps give way to "
                          "--train_block_sizes; 0 = off, -1 = 0.6 if 1 is among them", at_least=-1, at_most=1, rare=True)

    @property
    def causal(self):
        return self.objective == "ar"

    @property
    def measure(self):
        """What a held-out figure is: left to right it is exact."""
        return "NLL" if self.causal else "bound"

    @property
    def block_choices(self):
        return [self.seq_len] if self.causal else block_sizes(self.train_block_sizes, self.seq_len)

    @property
    def fade(self):
        """The share of the steps that --ar_fade takes."""
        asked = AR_FADE if 1 in self.block_choices and len(set(self.block_choices)) > 1 else 0.0
        return 0.0 if self.causal else asked if self.ar_fade < 0 else self.ar_fade

    def single_chance(self, step):
        """How likely this step has blocks of one token, whatever --train_block_sizes says."""
        return max(0.0, 1 - step / (self.fade * self.max_steps)) if self.fade else 0.0

    @property
    def most_hidden(self):
        """The highest mask rate. Decoding starts at 1: that is learned from whole rows, or from blocks of one token."""
        mixed = self.loss == "masked_mean" and 1 in self.block_choices and self.min_mask_rate < MOST_HIDDEN
        return self.max_mask_rate if self.max_mask_rate >= 0 else MOST_HIDDEN if mixed else 1.0

    @property
    def rule_shares(self):
        """{block rule: the share of a run's steps that have it}, the largest first."""
        choices, single = self.block_choices, self.fade / 2
        rules = sorted({*choices, *([1] if single else [])}, reverse=True)
        return {b: (1 - single) * choices.count(b) / len(choices) + single * (b == 1) for b in rules}

    @property
    def block_rules(self):
        """All block rules that a run may see, the largest first."""
        return list(self.rule_shares)


def mask_problems(args):
    yield from (blocks := list(block_problems("train_block_sizes", args.train_block_sizes)))
    if -1 < args.ar_fade < 0:
        yield f"--ar_fade {args.ar_fade:g}: must be -1 or 0 to 1"
    if -1 < args.max_mask_rate < 0:
        yield f"--max_mask_rate {args.max_mask_rate:g}: must be -1 or 0 to 1"
    elif not blocks and args.min_mask_rate >= args.most_hidden:
        yield f"--min_mask_rate {args.min_mask_rate:g} must be below --max_mask_rate {args.most_hidden:g}"


def block_sizes(text, length):
    """--train_block_sizes and --blocks as numbers; T, and whatever is longer than a sequence, is the whole sequence."""
    return [length if b == "T" else min(int(b), length) for b in split_list(text)]


def block_problems(name, text):
    for part in split_list(text):
        if part != "T" and not re.fullmatch("0*[1-9][0-9]{0,8}", part):
            yield f"--{name} {text}: {part!r} is neither T nor a number of at least 1"
