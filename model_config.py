"""The shape of a model: what build_model needs, its parameters and arithmetic in closed form, and
equal sizes.

    cfg = shapes.model_config(args, vocab_size=8000)
    shapes.count_params(cfg)                             # before anything is built
    shapes.train_flops(cfg, 512, 64, 0.5)                # of a training token
    shapes.match_d_ff(cfg, target)                       # the primary's d_ff that gives it the
        backup's size
"""
import dataclasses
import re
from dataclasses import dataclass

from common.console import UserError
from common.flags import again, checked, flag

# a field of ModelConfig that came later -> what older checkpoints mean
ADDED = dict(causal=False, exits=False)
OLD_MODELS = dict(eco="primary", eco_hybrid="primary", baseline="backup", diffusion="backup")


@dataclass
class ModelFlags:
    "Model"

    model: str = flag(
        "primary", "which denoiser", "must", choices=("primary", "backup"), values=OLD_MODELS
    )
    d_model: int = flag(
        512, "width, divisible by the heads", "must", at_least=2, aliases=("n_embd",)
    )
    n_layers: int = flag(8, "blocks", "must", at_least=1, aliases=("layers", "n_layer"))
    n_heads: int = flag(8, "heads", "must", at_least=1, aliases=("n_head",))
    d_ff: int = flag(1536, "feed-forward width", "must", at_least=1)
    memory_slots: int = flag(16, "memory slots per head; primary only", "must", at_least=2)
    conv_kernel: int = flag(
        3,
        "odd width of the convolution; primary only",
        "must",
        at_least=3,
        rare=True,
        aliases=("conv_kernel_size",),
    )
    d_mem: int = flag(
        0, "width of the memory, 0 = half of d_model; primary only", "must", at_least=0, rare=True
    )
    dropout: float = flag(0.0, "share of activations dropped", at_least=0, below=1, rare=True)
    block_size: int = flag(64, "decode block, stored for sample", at_least=1, rare=True)
    exit_loss_weight: float = flag(
        0.0,
        "trains the exits of sample --min_decode_layers; 0 = no exits",
        at_least=0,
        rare=True,
        aliases=("exit_loss",),
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What build_model needs. Derived numbers are properties; d_mem 0 becomes half the width."""
    model: str = again(ModelFlags, "model", dataclasses.MISSING)
    vocab_size: int = flag(dataclasses.MISSING, "base pieces; the mask is one more row", at_least=1)
    d_model: int = again(ModelFlags, "d_model")
    n_layers: int = again(ModelFlags, "n_layers")
    n_heads: int = again(ModelFlags, "n_heads")
    d_ff: int = again(ModelFlags, "d_ff")
    dropout: float = again(ModelFlags, "dropout")
    memory_slots: int = again(ModelFlags, "memory_slots")
    conv_kernel: int = again(ModelFlags, "conv_kernel")
    d_mem: int = again(ModelFlags, "d_mem")
    block_size: int = again(ModelFlags, "block_size")
    exits: bool = flag(False, "a norm behind every layer, for leaving early")
    causal: bool = flag(False, "left to right: --objective ar")

    def __post_init__(self):
        object.__setattr__(self, "d_mem", self.d_mem or self.d_model // 2)
        if problems := list(shape_problems(self)):
            raise UserError("\n  ".join(problems))

    rows = property(lambda self: self.vocab_size + 1)
    mask_id = property(lambda self: self.vocab_size)
    pad_id = property(lambda self: 0)

    def to_dict(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, saved):
        """Strict: every key, no other key, each of its own type."""
        names, saved = {f.name for f in dataclasses.fields(cls)}, ADDED | saved
        if missing := names - set(saved):
            raise UserError(f"model configuration without {', '.join(sorted(missing))}")
        return cls(**checked(cls, {"args": saved}, "model configuration"))


def model_config(args, vocab_size):
    """The ModelConfig that these training arguments and this many base pieces ask for."""
    names = {f.name for f in dataclasses.fields(ModelConfig)} - {"vocab_size", "exits"}
    return ModelConfig(
        vocab_size=vocab_size,
        exits=args.exit_loss_weight > 0,
        **{name: getattr(args, name) for name in names},
    )


def shape_problems(c):
    """Relations between the widths, of training arguments and of a ModelConfig alike."""
    d_mem = c.d_mem or c.d_model // 2
    if c.d_model % c.n_heads:
        yield f"--d_model {c.d_model} is not divisible by --n_heads {c.n_heads}"
    elif c.model == "backup" and c.d_model // c.n_heads % 2:
        yield f"--d_model {c.d_model} / --n_heads {c.n_heads}: the head size {c.d_model // c.n_heads} must be even"
    elif c.model == "primary" and d_mem % c.n_heads:
        yield f"--d_mem {d_mem} is not divisible by --n_heads {c.n_heads}"
    if c.causal and c.model != "backup":
        yield "--objective ar needs --model backup: the primary's convolution and memory look both ways"
    if c.conv_kernel % 2 == 0:
        yield f"--conv_kernel {c.conv_kernel}: must be odd"


def block_params(c):
    """Parameters of all layers in closed form (a test compares it with the real models)."""
    d, ff, dm, slots = c.d_model, c.d_ff, c.d_mem or c.d_model // 2, c.n_heads * c.memory_slots
    if c.model == "backup":               # attention, gated feed-forward, two norms
        return c.n_layers * (4 * d * d + 3 * d * ff + 2 * d)
    # gated feed-forward; memory query, value and output; slot scores, names and decays; convolution
    # and norm
    return c.n_layers * (
        3 * d * ff + 3 * d * dm + d * slots + c.memory_slots * dm + slots + d * c.conv_kernel + d
    )


def count_params(c):
    """The true number of parameters: tied embedding with the mask's row, layers, a norm for each
    exit.
    """
    return c.rows * c.d_model + block_params(c) + c.d_model * (c.n_layers if c.exits else 1)


def weight_name(name):
    """What a weight, or a state of a weight, is called today: the last norm came to be one of
    several exits.
    """
    return re.sub(r"(?<!exits\.)\bfinal_norm\.", "exits.final_norm.", name)


def train_flops(c, length, block, masked_share):
    """FLOPs of forward and backward per token of a training row (a test compares them with torch's
    counter).

    A multiplication and an addition are two; backward is twice forward. Only products count
    (matrices, attention, convolution), as masked attention computes them, and nothing that is
    computed again. Below a block of the whole length there are two streams, noisy and clean, of
    which the last layer only writes the clean one. masked_share: share of tokens that ask the head.
    """
    d, ff, dm, two = c.d_model, c.d_ff, c.d_mem, block < length
    if c.model == "backup":  # q, k, v, output, gated feed-forward; scores and values over the keys
        stream, last, mix = 2 * (4 * d * d + 3 * d * ff), 2 * 3 * d * d, 4 * d * length
        layers = c.n_layers * (stream + mix)
        if two:  # the noisy stream sees clean and noisy keys, the clean one its own
            layers += (c.n_layers - 1) * (stream + mix) + last + c.n_layers * mix
    else:  # in and out; one product writes the slots and three read them
        slots = 2 * c.memory_slots * dm
        writes = 2 * d * (dm + c.n_heads * c.memory_slots) + 2 * d * c.conv_kernel + slots
        stream = writes + 2 * d * (2 * ff + dm) + 2 * d * (ff + dm) + 3 * slots
        layers = c.n_layers * stream
        if two:                           # and the sums over earlier blocks
            layers += (c.n_layers - 1) * stream + writes
            sums = (
                token_products(c, length)
                if block == 1
                else prefix_products(-(-length // block)) / length
            )
            layers += c.n_layers * slots * sums
    return 3 * (layers + (2 if c.exits and c.n_layers > 1 else 1) * masked_share * 2 * d * c.rows)


def prefix_products(n):
    """Pairs of blocks, or of groups of blocks, that EcoLayer.prefix multiplies for n blocks."""
    size = n if n <= 16 else round(n ** 0.5)
    groups = -(-n // size)
    return groups * size * (size + 1) + (prefix_products(groups) if n > size else 0)


def token_products(c, length):
    """The same of EcoLayer.token_prefix, per token: its group, and a column for each slot of what
    came before.
    """
    groups = -(-length // 16)
    return min(length, 16) + (groups > 1) * (c.memory_slots + 1 + prefix_products(groups) / length)


def flops_per_token(c, length, shares, asked, flops=None):
    """The mean of train_flops, or of another formula, over a run's steps; shares: {block rule: its
    share of them}.

    asked: the share of tokens that are hidden; a small block has more, as one of its tokens always
    is.
    """
    def cost(block):
        return (flops or train_flops)(
            c, length, block, min(1.0, max(1 / block, asked + 1 / (2 * block)))
        )

    return round(sum(share * cost(block) for block, share in shares.items()))


def match_d_ff(c, target, cost=count_params):
    """The d_ff, a multiple of 8, that brings this shape's cost, which grows evenly with it, closest
    to a target.
    """
    rest, more = (cost(dataclasses.replace(c, d_ff=d_ff)) for d_ff in (0, 1))
    return max(8, 8 * round((target - rest) / (more - rest) / 8))
