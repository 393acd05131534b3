"""The shape of a model: what build_model needs, and its parameters and FLOPs in closed form.

    shape = model_config(args, vocab_size=8000)
    count_params(shape)                     # before anything is built
    train_flops(shape, 512, 64, 0.5)        # of a training token
    match_d_ff(shape, target)               # the primary's d_ff that gives it the backup's size

Used by config.py and cli.py, by model.py and checkpoint.py, and by studies for runs of equal cost.
In the formulas d is d_model, ff is d_ff and dm is d_mem.
"""
import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from common.console import UserError
from common.flags import again, checked, flag

LATER = {"pad"}     # fields of a ModelConfig that older checkpoints lack: they have the default
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
    pad: bool = flag(True, "id 0 is a pad, which no text holds; off: it is a piece, as in GPT-2's")

    def __post_init__(self):
        object.__setattr__(self, "d_mem", self.d_mem or self.d_model // 2)
        problems = list(shape_problems(self))
        if problems:
            raise UserError("\n  ".join(problems))

    @property
    def rows(self):
        """Rows of the embedding: the pieces and the mask."""
        return self.vocab_size + 1

    @property
    def mask_id(self):
        return self.vocab_size

    @property
    def pad_id(self):
        """What fills a row up. Where no piece is kept for it, the mask does: both are never an
        answer.
        """
        return 0 if self.pad else self.mask_id

    def to_dict(self):
        """The "model" section of a run's config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, saved):
        """Strict: every key, no other key, each of its own type. Older checkpoints lack LATER."""
        names = {field.name for field in dataclasses.fields(cls)}
        missing = names - set(saved) - LATER
        if missing:
            raise UserError(f"model configuration without {', '.join(sorted(missing))}")
        return cls(**checked(cls, {"args": saved}, "model configuration"))


def model_config(args, vocab_size, pad=True):
    """The ModelConfig that these training arguments and this many base pieces ask for. pad: whether
    the first of them is kept for it.
    """
    settings = dict(vocab_size=vocab_size, exits=args.exit_loss_weight > 0, pad=pad)
    for field in dataclasses.fields(ModelConfig):
        if field.name not in settings:
            settings[field.name] = getattr(args, field.name)
    return ModelConfig(**settings)


def shape_problems(shape):
    """Relations between the widths, of training arguments and of a ModelConfig alike."""
    d_model, n_heads = shape.d_model, shape.n_heads
    d_mem = shape.d_mem or d_model // 2
    head_size = d_model // n_heads
    if d_model % n_heads:
        yield f"--d_model {d_model} is not divisible by --n_heads {n_heads}"
    elif shape.model == "backup" and head_size % 2:
        yield (
            f"--d_model {d_model} / --n_heads {n_heads}: the head size {head_size} must be even"
        )
    elif shape.model == "primary" and d_mem % n_heads:
        yield f"--d_mem {d_mem} is not divisible by --n_heads {n_heads}"
    if shape.conv_kernel % 2 == 0:
        yield f"--conv_kernel {shape.conv_kernel}: must be odd"


# --------------------------------------------------------------------------------------------------
# parameters

def block_params(shape):
    """Parameters of all layers in closed form (a test compares it with the real models)."""
    d, ff = shape.d_model, shape.d_ff
    if shape.model == "backup":
        attention = 4 * d * d
        feed_forward = 3 * d * ff
        norms = 2 * d
        return shape.n_layers * (attention + feed_forward + norms)

    dm = shape.d_mem or d // 2
    slots = shape.n_heads * shape.memory_slots
    feed_forward = 3 * d * ff
    memory = 3 * d * dm                                     # query, value and output
    scores = d * slots
    names_and_decays = shape.memory_slots * dm + slots
    convolution_and_norm = d * shape.conv_kernel + d
    return shape.n_layers * (
        feed_forward + memory + scores + names_and_decays + convolution_and_norm
    )


def count_params(shape):
    """The true number of parameters: tied embedding with the mask's row, layers, a norm for each
    exit.
    """
    norms = shape.n_layers if shape.exits else 1
    return shape.rows * shape.d_model + block_params(shape) + shape.d_model * norms


def match_d_ff(shape, target, cost=count_params):
    """The d_ff, a multiple of 8, that brings this shape's cost, which grows evenly with it, closest
    to a target.
    """
    rest = cost(dataclasses.replace(shape, d_ff=0))
    per_d_ff = cost(dataclasses.replace(shape, d_ff=1)) - rest
    return max(8, 8 * round((target - rest) / per_d_ff / 8))


# --------------------------------------------------------------------------------------------------
# arithmetic

# of EcoHybrid's memory
FEW_BLOCKS = 16  # up to so many, one product adds up all pairs of blocks
CHUNK = 32       # tokens of the clean stream that see each other in one product


class StepRows(NamedTuple):
    """The rows of a layer's input that one training row makes."""
    clean: int          # of the clean stream
    noisy: int          # of all noisy blocks, each with its front row
    blocks: int
    block: int          # places of a block


def rows_of_step(shape, length, block):
    """Left to right alone, whole rows behind the start alone, or both streams."""
    if block == 1:
        return StepRows(length, 0, 0, 0)
    clean = length if block < length else 1
    blocks = -(-length // block)
    places = length
    if shape.model == "primary":
        places = blocks * block         # the last block is filled up
    return StepRows(clean, places + blocks, blocks, block)


def train_flops(shape, length, block, masked):
    """FLOPs of forward and backward per token of a training row (a test compares them with torch's
    counter). masked: the share of tokens that are predicted in noisy blocks; left to right, all
    are.

    A multiplication and an addition are two; backward is twice forward. Only products count
    (matrices, attention, convolution), as masked attention computes them, and nothing that is
    computed again.
    """
    rows = rows_of_step(shape, length, block)
    if shape.model == "backup":
        layers = transformer_flops(shape, rows)
    else:
        layers = eco_flops(shape, rows)

    asked = 0
    if block < length:
        asked += length
    if block > 1:
        asked += masked * length
    if shape.exits and shape.n_layers > 1:
        asked *= 2
    head = asked * 2 * shape.d_model * shape.rows
    return 3 * (shape.n_layers * layers + head) / length


def transformer_flops(shape, rows):
    """Forward FLOPs of a training row in one of the transformer's layers."""
    d, ff = shape.d_model, shape.d_ff
    each = 2 * (4 * d * d + 3 * d * ff)         # q, k, v, output, gated feed-forward
    # a clean row sees the clean ones, a noisy row all: scores and values
    seen = rows.clean * rows.clean + rows.noisy * (rows.clean + rows.noisy)
    return (rows.clean + rows.noisy) * each + 4 * d * seen


def eco_flops(shape, rows):
    """Forward FLOPs of a training row in one of EcoHybrid's layers."""
    d, ff, dm = shape.d_model, shape.d_ff, shape.d_mem
    slots = shape.n_heads * shape.memory_slots
    one = 2 * shape.memory_slots * dm           # one product of a token with all slots
    each = 2 * d * (2 * ff + 2 * dm + slots) + 2 * d * (ff + dm)
    layer = (rows.clean + rows.noisy) * each

    # the clean stream, in chunks: a token's products with those of its chunk, as q, v and shares
    # of slots, and with the slots
    chunk = min(rows.clean, CHUNK)
    chunks = -(-rows.clean // chunk)
    layer += rows.clean * 2 * d * (shape.conv_kernel // 2 + 1)
    layer += chunks * chunk * (6 * chunk * (dm + slots) + 5 * one)
    layer += prefix_products(chunks) * one

    # the noisy blocks: one product writes the slots and three read them; the states behind which
    # they open are summed from what the tokens before them write
    layer += rows.noisy * (2 * d * shape.conv_kernel + 4 * one)
    if rows.blocks > 1:
        layer += (rows.blocks - 1) * rows.block * one
        layer += prefix_products(rows.blocks) * one
    return layer


def prefix_products(groups):
    """Pairs of groups, or of groups of groups, that EcoLayer.prefix multiplies."""
    if groups <= FEW_BLOCKS:
        return groups * (groups + 1)
    size = round(groups ** 0.5)
    larger = -(-groups // size)
    return larger * size * (size + 1) + prefix_products(larger)


def flops_per_token(shape, length, shares, asked, flops=None):
    """The mean of train_flops, or of another formula, over a run's steps.

    shares: {block rule: its share of the steps}. asked: the share of tokens that are masked; a
    small block has more, as one of its tokens always is.
    """
    flops = flops or train_flops
    parts = []
    for block, share in shares.items():
        masked = min(1.0, max(1 / block, asked + 1 / (2 * block)))
        parts.append(share * flops(shape, length, block, masked))
    return round(sum(parts))
