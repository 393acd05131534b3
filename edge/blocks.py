"""Matrices in 8 or 4 bits. numpy only.

pack_rows: bytes with a scale for each output. pack: 4 bits, blocks of weights that share a scale.
Both are laid out as ONNX Runtime's MatMulNBits reads them: value = (code - middle) * scale, middle
128 or 8. even: what is done before, so that less is lost. Legend: O outputs, I inputs of a matrix,
n blocks of a row, b weights of a block.
"""
import numpy as np

MIDDLE = 128           # the code of 0 in 8 bits
BLOCKS = (128, 64, 32, 16)


def pack_rows(weight):
    """(O, I) float32 -> codes (O, n, b) uint8, scales (O,) float32. The last block of an output
    ends in zeros if it has to.
    """
    scale = np.maximum(np.abs(weight).max(1) / 127, 1e-12).astype(np.float32)
    codes = np.round(weight / scale[:, None]) + MIDDLE
    return split(codes, block_of(weight.shape[1]), MIDDLE).astype(np.uint8), scale


def block_of(inputs):
    """The size of block that needs the fewest zeros behind so many inputs."""
    return min(BLOCKS, key=lambda block: -inputs % block)


def split(weight, block, fill=0):
    """(O, I) -> (O, n, b), `fill` behind the last input."""
    rows, inputs = weight.shape
    padded = np.full((rows, -(-inputs // block) * block), fill, np.float32)
    padded[:, :inputs] = weight
    return padded.reshape(rows, -1, block)                                         # (O, n, b)


def unsigned(codes, inputs):
    """The codes (O, n, b) of pack_rows as a product of unsigned bytes reads them: (I, O) uint8."""
    flat = codes.reshape(len(codes), -1)[:, :inputs]
    return np.ascontiguousarray(flat.T)


def turned(codes, inputs):
    """The same for a product of signed bytes, int8."""
    return (unsigned(codes, inputs) ^ MIDDLE).view(np.int8)


def widened(codes, inputs):
    """The same as float32, without their scales."""
    return turned(codes, inputs).astype(np.float32)


# ---- what is made of a weights file when a graph is opened ---------------------------------------

def made_of_codes(make):
    def at(file, place, outputs, row, inputs):
        """The matrix whose codes stand in a file (bytes) at this place, a row of it for an output.
        """
        codes = file[place:place + outputs * row]
        return make(codes.reshape(outputs, row), inputs)
    return at


def repeated(file, place, outputs, count):
    """The scales (O,) at this place, each for so many blocks: (O * count,)."""
    return file[place:place + 4 * outputs].view(np.float32).repeat(count)


FORMS = {
    "turned": made_of_codes(turned),
    "unsigned": made_of_codes(unsigned),
    "widened": made_of_codes(widened),
    "repeated": repeated,
}


def pack(weight, block):
    """(O, I) float32 -> codes of 4 bits, two in a byte, (O, n, b / 2) uint8, scales (O, n) float32.
    """
    parts = split(weight, block)
    # the value that is farthest from 0 becomes the code 0, as 4 bits reach from -8 to 7
    far = np.abs(parts).argmax(-1)[..., None]                                      # (O, n, 1)
    scale = np.take_along_axis(parts, far, -1)[..., 0] / -8                        # (O, n)
    divisor = np.where(scale == 0, 1, scale)[..., None]
    codes = np.clip(np.round(parts / divisor) + 8, 0, 15).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scale.astype(np.float32)


def unpack(codes, scale, bits, inputs):
    """What pack or pack_rows made -> the weights that the product uses, (O, inputs) float32; scale
    (O, n), or (O, 1) for all blocks of an output.
    """
    middle = MIDDLE
    if bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:2], -1)
        middle = 8
    values = (codes.astype(np.float32) - middle) * scale[..., None]                # (O, n, b)
    return values.reshape(len(values), -1)[:, :inputs]


# ---- even columns --------------------------------------------------------------------------------

def even(weight):
    """A matrix (O, I) -> the same with columns of more equal size, and the factors (I,) that its
    inputs are multiplied by instead: half of the difference in size, as what a large column gives
    up its input takes on (SmoothQuant, Xiao et al. 2023). It halves the rounding of a row.
    """
    size = np.abs(weight).max(0)
    factors = np.sqrt(np.maximum(size / size.mean(), 1e-3)).astype(np.float32)
    return weight / factors, factors


def even_layers(cfg, parameters):
    """The parameters of all layers with even columns in their matrices. The factors go into what
    stands before each: the convolution's or norm's weights, or the rows that make `up`.
    """
    found = dict(parameters)
    for i in range(cfg.n_layers):
        p = f"layers.{i}."
        if cfg.model == "primary":
            even_gated(found, p, cfg.d_ff)
            matrix, factors = even(found[p + "in_proj.weight"])
            found[p + "in_proj.weight"] = matrix
            found[p + "conv.weight"] = found[p + "conv.weight"] * factors[:, None]
        else:
            even_gated(found, p + "ff.", cfg.d_ff)
            for norm, name in (("attn_norm", "attn.qkv_proj"), ("ff_norm", "ff.in_proj")):
                matrix, factors = even(found[f"{p}{name}.weight"])
                found[f"{p}{name}.weight"] = matrix
                found[f"{p}{norm}.weight"] = found[f"{p}{norm}.weight"] * factors
    return found


def even_gated(found, p, d_ff):
    """The columns of out_proj that read the gated feed-forward; `up` takes their factors."""
    out = found[p + "out_proj.weight"].copy()
    up = found[p + "in_proj.weight"].copy()
    out[:, :d_ff], factors = even(out[:, :d_ff])
    up[d_ff:2 * d_ff] *= factors[:, None]
    found[p + "out_proj.weight"] = out
    found[p + "in_proj.weight"] = up
