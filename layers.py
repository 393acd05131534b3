"""Small parts that both denoisers are built from: norm, rotary positions, local convolution,
blocks, the tied head.

Used by model.py, eco_hybrid.py and model.py. Nothing here knows about masking or data.
Legend for shapes: B batch, T positions, D width, H heads, E head size, V vocabulary rows, M slots,
S block size, n blocks.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def recomputed(on, layer, *args):
    """layer(*args). If on, autograd keeps the arguments alone, and the backward pass computes the
    inside again, same dropout.
    """
    if not torch.is_grad_enabled():
        return layer(*args)
    out = (
        checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=True)
        if on
        else layer(*args)
    )
    if out.requires_grad:
        out.register_hook(let_signals_in)
    return out


def let_signals_in(_):
    """Does nothing, but in Python: the backward pass runs in C++, where signals wait, so each layer
    of it ends in this.
    """


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 whatever the autocast."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, 1e-6)


def unit_rms(x):
    """x / rms(x) over the last dimension, whatever the scale of x (float32): a sum is as good as a
    mean. 0 stays 0.
    """
    return F.rms_norm(x, x.shape[-1:], None, 1e-20)


def rotary_table(positions, head_size, base=10_000.0):
    """cos and sin for integer positions (T,) -> two float32 tensors (T, E/2). Never cast: bf16
    cannot tell 500 from 501.
    """
    inverse = base ** (
        -torch.arange(0, head_size, 2, dtype=torch.float64, device=positions.device) / head_size
    )
    angle = positions.double()[:, None] * inverse                                  # (T, E/2)
    return angle.cos().float(), angle.sin().float()


def rotate(x, table):
    """Turn the pairs (x_i, x_{i+E/2}) of x (..., T, E) by their position's angle; keeps x's dtype.
    """
    cos, sin = table
    a, b = x.float().chunk(2, dim=-1)  # (..., T, E/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class LocalConv(nn.Module):
    """Depthwise convolution over positions, centred, kernel k odd. It starts as noise over all k:
    started near the identity, a model stays on the unigram plateau for hundreds of steps longer
    (docs/experiments/).

    It is given its k//2 left neighbours explicitly (the halo) and sees zeros to the right of the
    block.
    """

    def __init__(self, dim, kernel):
        super().__init__()
        self.reach = kernel // 2
        self.weight = nn.Parameter(torch.empty(dim, kernel))

    def forward(self, x, halo=None):
        r = self.reach  # x (N, S, D), halo (N, r, D) or None
        if halo is not None and x.shape[1] == 1:  # one token: r + 1 products, and no zeros
            y = x.float() * self.weight[:, r]                                      # (N, 1, D)
            for j in range(r):
                y = torch.addcmul(y, halo[:, j:j + 1].float(), self.weight[:, j])
            return y
        if halo is not None:
            x = torch.cat((halo, x, x.new_zeros(x.shape[0], r, x.shape[2])), dim=1)  # (N, r+S+r, D)
        x = x.transpose(1, 2).unsqueeze(2)  # (N, D, 1, S+2r), channels last in memory
        # float32: its bf16 backward is 2.5x slower on CPUs
        with torch.autocast(x.device.type, enabled=False):
            y = F.conv2d(
                x,
                self.weight[:, None, None, :],
                groups=x.shape[1],
                padding=(0, 0 if halo is not None else r),
            )
        return y.squeeze(2).transpose(1, 2)                                        # (N, S, D)


class Linear(nn.Linear):
    """A matrix without bias that may also be used by its last rows alone; sampling/fast.py puts
    other layouts in its place.
    """

    def __init__(self, inputs, outputs, tails=()):
        super().__init__(inputs, outputs, bias=False)
        self.tails = tails

    def onto(self, x, y, change):
        """x + change(the product with y): the end of a residual branch, dropout being the change.
        """
        return x + change(self(y))

    def tail(self, x, width):
        return F.linear(x, self.weight[-width:])


class TiedEmbedding(nn.Module):
    """Embedding and head share one (V, D) matrix; V = pieces + 1, the last row is the mask.

    The mask and the pad can never be an answer, so their logits are -inf everywhere: in the loss,
    in scores, in decoding.
    """

    def __init__(self, rows, dim, never):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))
        self.never = tuple(never)
        self.product = None  # sampling/fast.py's, in decoding

    def embed(self, ids):
        return F.embedding(ids, self.weight)                                       # (..., D)

    def logits(self, states):
        if self.product:
            z = self.product(states).float()
        else:
            z = F.linear(states, self.weight).float()                              # (..., V)
        for row in self.never:
            z[..., row] = -math.inf
        return z


class Exits(nn.Module):
    """The way out of a network at any depth: the last norm, or for --min_decode_layers a trained
    norm for each earlier layer.
    """

    def __init__(self, cfg):
        super().__init__()
        self.final_norm = RMSNorm(cfg.d_model)
        self.early_norm = (
            nn.Parameter(torch.ones(cfg.n_layers - 1, cfg.d_model))
            if cfg.exits and cfg.n_layers > 1
            else None
        )
        self.depth = cfg.n_layers

    def forward(self, x, depth=None):
        if depth is None or depth == self.depth:
            return self.final_norm(x)
        return F.rms_norm(x.float(), x.shape[-1:], self.early_norm[depth - 1], 1e-6)


def initialise(model, std=0.02, depth=1):
    """Every parameter gets its value by a rule here; an unknown name is an error, so none is
    forgotten.
    """
    for name, p in model.named_parameters():
        if name.endswith(("norm.weight", "early_norm")):
            nn.init.ones_(p)
        elif "conv." in name:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        elif "decay" in name or "slot" in name:
            pass  # set by their module: they are constants with a meaning, not noise
        elif p.dim() == 2:
            scale = std if name.startswith("head") else p.shape[1] ** -0.5
            if "out_proj" in name:
                scale = scale / math.sqrt(2 * depth)
            nn.init.normal_(p, std=scale)
        else:
            raise AssertionError(f"no initialisation rule for {name} {tuple(p.shape)}")
