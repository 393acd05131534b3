"""Weights laid out for decoding on a CPU: bf16 or int8, reordered once instead of at every product.

Used by checkpoint.load_model's callers after loading; training never comes here.

    fast.prepare(model, "bf16")        # in place; "fp32" leaves the model as it was trained

A block of 32 tokens is a short product against a large matrix. In float32 it is slow (oneDNN
reorders the weights each time); with bf16 weights in oneDNN's own layout it runs near the machine's
peak. int8 quantises each output row of the weights once and each token's activations on the fly,
with the operators that torch.export's quantisation compiles to (torch's older quantised tensors are
deprecated). Where an operator is missing (another CPU, another PyTorch), bf16 runs as an ordinary
product, and int8 is refused. Legend: I inputs, O outputs of a matrix.
"""
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from attention import CACHES
from common import machine
from common.console import UserError
from layers import Linear

ROWS = 32       # tokens that the packed layout is tuned for


def pick(precision, device):
    """'auto' -> what this machine is fast in, with the reason; int8 and bf16 elsewhere are refused,
    not ignored.
    """
    if precision == "auto":
        units = []
        if device.type == "cpu":
            units = machine.cpu_bf16_units()
        if units:
            return "bf16", f"the CPU has {', '.join(units)}"
        return "fp32", f"no bf16 units known of this {device.type}"
    if precision == "int8" and device.type != "cpu":
        raise UserError(f"--quantize_dynamic works on a CPU only, not on {device}: leave it out")
    return precision, "asked for"


class PackedBF16(nn.Module):
    """y = x W^T with W in oneDNN's layout; returns bf16."""

    def __init__(self, weight):
        super().__init__()
        self.nbytes = weight.numel() * 2
        self.packed = None
        self.plain = None
        weight = weight.detach().bfloat16()
        try:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
        except (AttributeError, RuntimeError, NotImplementedError):
            self.plain = weight  # a PyTorch or a CPU without oneDNN

    def forward(self, x):
        x = x.bfloat16()
        if self.plain is not None:
            return F.linear(x, self.plain)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")

    def residual_add(self, x, y, dropout):
        return x + self(y)                      # decoding has no dropout


@cache
def bytes_of_activations():
    """(largest byte, the one that is 0) of an activation that this CPU multiplies exactly.

    CPUs of before about 2019 add two products of an unsigned and a signed byte up in 16 bits, and
    cut off what does not fit: 255 * 127 twice does not, 127 * 127 does.
    """
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scale = torch.ones(16)
    zeros = torch.zeros(16, dtype=torch.int32)
    q = torch.full((8, 64), 255, dtype=torch.uint8)
    found = product_of_bytes(q, 128, packed, scale, zeros)
    if (found == 64 * 127 * 127).all():
        return 127, 128
    return 63, 64


def product_of_bytes(q, zero, packed, scale, zeros):
    """(N, I) unsigned bytes, less their zero, times packed signed ones -> (N, O) float32."""
    return torch.ops.onednn.qlinear_pointwise(
        q,
        1.0,                # the activations' scale
        zero,
        packed,
        scale,
        zeros,              # the weights' zeros
        None,               # no bias
        1.0,                # the output's scale and zero: unused, as it is float32
        0,
        torch.float32,
        "none",             # no function behind the product
        [],
        "",
    )


class PackedInt8(nn.Module):
    """Symmetric int8 weights with a scale for each row; activations to 8 bits on the fly, 7 where
    the CPU needs that, a scale for each token; float32 out.

    The operator knows one activation scale. It is told 1, and the tokens' own ones multiply the
    rows of what comes out.
    """

    def __init__(self, weight):
        super().__init__()
        self.nbytes = weight.numel()
        weight = weight.detach().float()                                           # (O, I)
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)                      # (O,)
        rounded = (weight / scale.unsqueeze(1)).round().to(torch.int8)
        try:
            self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)
            self.most, self.zero = bytes_of_activations()
        except (AttributeError, RuntimeError, NotImplementedError) as error:
            raise UserError(
                f"--quantize_dynamic: this PyTorch has no int8 product for this CPU ({error})"
            ) from None
        self.scale = scale / self.most
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)

    def rows(self, x):
        """x (..., I) -> (product, largest value of each token): one times the other is the answer.
        """
        x = x.float()
        top = x.abs().amax(-1, keepdim=True).clamp_(min=1e-12)                     # (..., 1)
        # 1 to 255, or to 127; signed bytes have no fast product
        q = (x * (self.most / top)).add_(self.zero + 0.5).to(torch.uint8)
        return product_of_bytes(q, self.zero, self.packed, self.scale, self.zeros), top

    def forward(self, x):
        product, top = self.rows(x)
        return product.mul_(top)

    def residual_add(self, x, y, dropout):
        product, top = self.rows(y)
        return torch.addcmul(x, product, top)


def prepare(model, precision):
    """Replace the products of a trained model in place -> bytes of its matrices."""
    if precision == "fp32":
        return sum(p.numel() * p.element_size() for p in model.parameters())
    kind = {"bf16": PackedBF16, "int8": PackedInt8}[precision]
    total = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear):
                fast = kind(child.weight)
                setattr(parent, name, fast)
                total += fast.nbytes
    model.head.product = kind(model.head.weight)
    if precision == "bf16" and model.cfg.model == "backup":
        model.cache_type = CACHES["bf16"]       # the keys and values are bf16 already
    return total + model.head.product.nbytes


def store_cache(model, stored):
    """From now on the model's frozen contexts are stored in this type; auto: as prepare left it."""
    if model.cfg.model == "backup":
        if stored != "auto":
            model.cache_type = CACHES[stored]
    elif stored not in ("auto", "fp32"):
        raise UserError(
            f"--cache_dtype {stored}: EcoHybrid's cache is small and holds sums, which need "
            "float32; leave the flag out"
        )
