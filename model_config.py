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
from common.flags import again, checked, defaults_of_later, flag, show

OLD_MODELS = dict(eco="primary", eco_hybrid="primary", baseline="backup", diffusion="backup")
OLD_VARIANTS = dict(baseline="mha", standard="mha")

# the widths that each attention variant of the transformer has of its own
ATTENTION_FLAGS = {
    "mha": (),
    "gqa": ("kv_heads",),
    "gqa_kv2": ("kv_heads",),
    "bottleneck": ("attn_dim",),
    "decoupled": ("sem_dim", "geo_dim", "attn_dim"),
}
ATTENTION_WIDTHS = ("kv_heads", "sem_dim", "geo_dim", "attn_dim")
ATTENTION_OPTIONS = ("null_attn", "tie_qk", "learned_temp")

LEVEL_FEATURES = 32     # of the share of noise, which the network of --objective gaussian reads


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
    attn: str = flag(
        "mha",
        "the transformer's attention: all heads alike; gqa: fewer heads of keys (gqa_kv2: 2); "
        "bottleneck: narrow; decoupled: semantic and positional scores, added",
        "must",
        choices=("mha", "gqa", "gqa_kv2", "bottleneck", "decoupled"),
        values=OLD_VARIANTS,
        aliases=("variant", "attn_mode"),
        rare=True,
        later=True,
    )
    kv_heads: int = flag(
        0,
        "heads of keys and values, 0 = a quarter of the heads; gqa only",
        "must",
        at_least=0,
        aliases=("kv_head",),
        rare=True,
        later=True,
    )
    sem_dim: int = flag(
        0,
        "width of the semantic scores, 0 = d_model / 16; decoupled only",
        "must",
        at_least=0,
        rare=True,
        later=True,
    )
    geo_dim: int = flag(
        0,
        "width of the positional scores, 0 = d_model / 8; decoupled only",
        "must",
        at_least=0,
        rare=True,
        later=True,
    )
    attn_dim: int = flag(
        0,
        "width of the values, and of bottleneck's keys, 0 = the sum of the two; bottleneck and "
        "decoupled only",
        "must",
        at_least=0,
        rare=True,
        later=True,
    )
    null_attn: bool = flag(
        False, "a learned key of no token, to attend to nothing", "must", rare=True, later=True
    )
    tie_qk: bool = flag(
        False, "one projection for queries and keys; not with gqa", "must", rare=True, later=True
    )
    learned_temp: bool = flag(
        False, "a learned factor on each head's scores", "must", rare=True, later=True
    )
    dropout: float = flag(0.0, "share of activations dropped", at_least=0, below=1, rare=True)
    embed_dim: int = flag(
        16,
        "numbers of a token's embedding; gaussian only",
        "must",
        at_least=2,
        rare=True,
        later=True,
    )
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
    """What build_model needs. Derived numbers are properties; a width of 0 becomes its default."""
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
    attn: str = again(ModelFlags, "attn")
    kv_heads: int = again(ModelFlags, "kv_heads")
    sem_dim: int = again(ModelFlags, "sem_dim")
    geo_dim: int = again(ModelFlags, "geo_dim")
    attn_dim: int = again(ModelFlags, "attn_dim")
    null_attn: bool = again(ModelFlags, "null_attn")
    tie_qk: bool = again(ModelFlags, "tie_qk")
    learned_temp: bool = again(ModelFlags, "learned_temp")
    embed_dim: int = again(ModelFlags, "embed_dim")
    block_size: int = again(ModelFlags, "block_size")
    exits: bool = flag(False, "a norm behind every layer, for leaving early")
    causal: bool = flag(False, "left to right: --objective ar")
    gaussian: bool = flag(False, "continuous: --objective gaussian", later=True)
    pad: bool = flag(
        True, "id 0 is a pad, which no text holds; off: it is a piece, as in GPT-2's", later=True
    )
    framed: bool = flag(
        False, "trained on pairs: a prompt stands in a frame, and is answered", later=True
    )
    interlaced: bool = flag(
        False, "trained to transliterate: beside each letter stands its answer", later=True
    )

    def __post_init__(self):
        problems = list(shape_problems(self))
        if problems:
            raise UserError("\n  ".join(problems))
        object.__setattr__(self, "d_mem", self.d_mem or self.d_model // 2)
        for name, width in attention_widths(self).items():
            object.__setattr__(self, name, width)

    @property
    def answers(self):
        """Was it trained on pairs, one a row, rather than on running text?"""
        return self.framed or self.interlaced

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
        """Strict: every key that its version knew, no other key, each of its own type."""
        saved = defaults_of_later(cls) | saved
        names = {field.name for field in dataclasses.fields(cls)}
        missing = names - set(saved)
        if missing:
            raise UserError(f"model configuration without {', '.join(sorted(missing))}")
        return cls(**checked(cls, {"args": saved}, "model configuration"))


def model_config(args, vocab_size, pad=True, framed=False, interlaced=False):
    """The ModelConfig that these training arguments and this many base pieces ask for. pad: whether
    the first of them is kept for it. framed, interlaced: the text is pairs, in one of two frames.
    """
    settings = dict(
        vocab_size=vocab_size, exits=args.exit_loss_weight > 0, pad=pad, framed=framed,
        interlaced=interlaced,
    )
    for field in dataclasses.fields(ModelConfig):
        if field.name not in settings:
            settings[field.name] = getattr(args, field.name)
    return ModelConfig(**settings)


def shape_problems(shape):
    """Relations between the widths, of training arguments and of a ModelConfig alike."""
    d_model, n_heads = shape.d_model, shape.n_heads
    d_mem = shape.d_mem or d_model // 2
    if d_model % n_heads:
        yield f"--d_model {d_model} is not divisible by --n_heads {n_heads}"
    elif shape.model == "primary" and d_mem % n_heads:
        yield f"--d_mem {d_mem} is not divisible by --n_heads {n_heads}"
    elif shape.model == "backup":
        yield from attention_problems(shape)
    if shape.model == "primary":
        for name in ("attn", *ATTENTION_WIDTHS, *ATTENTION_OPTIONS):
            value = getattr(shape, name)
            if value != getattr(ModelFlags, name):
                yield f"--{name} {show(value)} is the transformer's: add --model backup"
    if shape.conv_kernel % 2 == 0:
        yield f"--conv_kernel {shape.conv_kernel}: must be odd"


# --------------------------------------------------------------------------------------------------
# attention of the transformer

class Heads(NamedTuple):
    """The heads of an attention layer. Each head of keys serves equally many of the queries."""
    queries: int
    keys: int
    key: int            # numbers of a query and of a key
    value: int          # numbers of a value
    turned: int         # numbers of a key, the last ones, that carry its position


def up(number, unit):
    """The least multiple of unit that is not below number."""
    return -(-number // unit) * unit


def attention_widths(shape):
    """{flag: width} of the widths that the variant has of its own, the default in place of a 0.

    The defaults are d_model / 16 and / 8, and a quarter of the heads, up to what the heads divide.
    """
    d, heads = shape.d_model, shape.n_heads
    if shape.attn == "gqa":
        wanted = max(1, heads // 4)
        quarter = max(n for n in range(1, wanted + 1) if heads % n == 0)
        return {"kv_heads": shape.kv_heads or quarter}
    if shape.attn == "gqa_kv2":
        return {"kv_heads": 2}
    if shape.attn == "bottleneck":
        return {"attn_dim": shape.attn_dim or up(-(-3 * d // 16), 2 * heads)}
    if shape.attn == "decoupled":
        sem = shape.sem_dim or up(-(-d // 16), heads)
        geo = shape.geo_dim or up(-(-d // 8), 2 * heads)
        return {"sem_dim": sem, "geo_dim": geo, "attn_dim": shape.attn_dim or sem + geo}
    return {}


def attention_heads(shape):
    """The Heads of this shape's attention."""
    heads = shape.n_heads
    widths = attention_widths(shape)
    size = shape.d_model // heads
    if shape.attn == "decoupled":
        semantic, positional, value = (
            widths[name] // heads for name in ("sem_dim", "geo_dim", "attn_dim")
        )
        return Heads(heads, heads, semantic + positional, value, positional)
    if shape.attn == "bottleneck":
        size = widths["attn_dim"] // heads
    return Heads(heads, widths.get("kv_heads", heads), size, size, size)


def attention_problems(shape):
    """What is wrong with the widths of the transformer's attention, in sentences."""
    widths = attention_widths(shape)
    for name in ATTENTION_WIDTHS:
        given = getattr(shape, name)
        if given and name not in ATTENTION_FLAGS[shape.attn]:
            owners = [attn for attn, flags in ATTENTION_FLAGS.items() if name in flags]
            yield f"--{name} {given} belongs to --attn {' or '.join(owners)}, not to {shape.attn}"
    if shape.attn == "gqa_kv2" and shape.kv_heads not in (0, 2):
        yield f"--attn gqa_kv2 and --kv_heads {shape.kv_heads} contradict: use --attn gqa"

    fits = True
    for name, width in widths.items():
        if name == "kv_heads":
            if shape.n_heads % width:
                yield f"--n_heads {shape.n_heads} is not divisible by the {width} of --kv_heads"
        elif width % shape.n_heads:
            fits = False
            yield f"--{name} {width} is not divisible by --n_heads {shape.n_heads}"
    turned = attention_heads(shape).turned
    if fits and turned % 2:
        whole = {"bottleneck": "attn_dim", "decoupled": "geo_dim"}.get(shape.attn, "d_model")
        width = widths.get(whole, shape.d_model)
        yield (
            f"--{whole} {width} / --n_heads {shape.n_heads}: the head size {turned} must be even, "
            "as positions turn pairs of numbers"
        )
    if shape.tie_qk and shape.attn.startswith("gqa"):
        yield f"--tie_qk needs as many keys as queries: leave it out with --attn {shape.attn}"


def attention_warnings(shape):
    """What works and is hardly meant, in sentences."""
    if shape.attn == "decoupled":
        widths = attention_widths(shape)
        scores = widths["sem_dim"] + widths["geo_dim"]
        if widths["attn_dim"] != scores:
            yield (
                f"--attn_dim {widths['attn_dim']} is not --sem_dim + --geo_dim = {scores}: keys "
                "and values have different widths, and the attention kernel pads the narrower one"
            )


def attention_params(shape):
    """Parameters of one layer's attention."""
    heads = attention_heads(shape)
    queries = heads.queries * heads.key
    keys = heads.keys * heads.key
    values = heads.keys * heads.value
    total = shape.d_model * (queries + keys + values + heads.queries * heads.value)
    if shape.tie_qk:
        total -= shape.d_model * queries
    if shape.null_attn:
        total += keys
    if shape.learned_temp:
        total += heads.queries
    return total


# how the frozen context can be stored: bytes of a number, and of the scale that the numbers of a
# head have in common
STORED = {"fp32": (4, 0), "bf16": (2, 0), "int8": (1, 2)}


def cache_bytes_per_token(shape, stored):
    """Bytes that a token of the frozen context takes in all of the transformer's layers."""
    heads = attention_heads(shape)
    number, scale = STORED[stored]
    head = number * (heads.key + heads.value) + 2 * scale
    return shape.n_layers * heads.keys * head


# --------------------------------------------------------------------------------------------------
# parameters

def block_params(shape):
    """Parameters of all layers in closed form (a test compares it with the real models)."""
    d, ff = shape.d_model, shape.d_ff
    if shape.model == "backup":
        feed_forward = 3 * d * ff
        norms = 2 * d
        return shape.n_layers * (attention_params(shape) + feed_forward + norms)

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
    exit, and what gaussian has beside them.
    """
    norms = shape.n_layers if shape.exits else 1
    total = shape.rows * shape.d_model + block_params(shape) + shape.d_model * norms
    if shape.gaussian:
        inputs = 2 * shape.embed_dim + LEVEL_FEATURES
        total += shape.rows * shape.embed_dim + shape.d_model * inputs
    return total


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
    heads = attention_heads(shape)
    each = 2 * (attention_params(shape) + 3 * d * ff)       # and the gated feed-forward
    # a clean row sees the clean ones, a noisy row all: scores and values
    seen = rows.clean * rows.clean + rows.noisy * (rows.clean + rows.noisy)
    if shape.null_attn:
        seen += rows.clean + rows.noisy
    products = 4 * heads.queries * max(heads.key, heads.value)      # the narrower is filled up
    return (rows.clean + rows.noisy) * each + products * seen


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
