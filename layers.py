"""The parts that both denoisers are built from: norm, rotary positions, local convolution, matrix,
tied embedding, exits, initial values.

Used by model.py and eco_hybrid.py. Nothing here knows about masking or data.
Legend: B batch, N rows of any kind (sequences or blocks), T positions, S block, D width, E
head size, V vocabulary rows, k the convolution's kernel, r = k // 2 its reach.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def shifted(x0, start):
    """What the clean stream reads so that its row i answers for token i: `start` (the mask's id),
    then all but the last.
    """
    column = torch.full_like(x0[:, :1], start)                                     # (B, 1)
    return torch.cat((column, x0[:, :-1]), dim=1)                                  # (B, T)


def openings(length, block, first, device):
    """Where the blocks of so many tokens begin (n,), the first one of `first`, and how many clean
    rows they need: up to the one behind which the last of them opens.
    """
    count = 1 + math.ceil((length - first) / block)
    begin = first - block + block * torch.arange(count, device=device)
    return begin.clamp(min=0), max(0, (count - 1) * block - (block - first)) + 1


def recomputed(on, layer, *args):
    """layer(*args). If on, autograd keeps the arguments alone, and the backward pass computes the
    inside again, with the same dropout.
    """
    if not torch.is_grad_enabled():
        return layer(*args)
    if on:
        out = checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=True)
    else:
        out = layer(*args)
    if out.requires_grad:
        out.register_hook(let_signals_in)
    return out


def let_signals_in(_):
    """Does nothing, but in Python. The backward pass runs in C++, where Python's signal handlers
    wait; this hook at each layer lets them run.
    """


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 whatever the autocast."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, 1e-6)


def unit_rms(x):
    """x / rms(x) over the last dimension (float32). The scale of x cancels, so a sum is as good as
    a mean; 0 stays 0.
    """
    return F.rms_norm(x, x.shape[-1:], None, 1e-20)


def rotary_table(positions, head_size, base=10_000.0):
    """cos and sin for integer positions (T,) -> two float32 tensors (T, E/2). Never cast: bf16
    cannot tell 500 from 501.
    """
    pair = torch.arange(0, head_size, 2, dtype=torch.float64, device=positions.device)
    inverse = base ** (-pair / head_size)                                          # (E/2,)
    angle = positions.double().unsqueeze(1) * inverse                              # (T, E/2)
    return angle.cos().float(), angle.sin().float()


def rotate(x, table):
    """Turn the pairs (x_i, x_{i+E/2}) of x (..., T, E) by their position's angle; keeps x's dtype.
    """
    cos, sin = table
    a, b = x.float().chunk(2, dim=-1)                                              # (..., T, E/2)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return turned.to(x.dtype)


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
        """x (N, S, D), halo (N, r, D) or None: nothing stands to the left -> (N, S, D)."""
        r = self.reach
        padding = r
        if halo is not None:
            right = x.new_zeros(x.shape[0], r, x.shape[2])
            x = torch.cat((halo, x, right), dim=1)                                 # (N, r+S+r, D)
            padding = 0
        return self.product(x, self.weight, padding)                               # (N, S, D)

    def causal(self, x):
        """The same without what stands to the right, of the last S positions of x (N, r + S, D) ->
        (N, S, D).
        """
        r = self.reach
        if x.shape[1] > r + 1:
            return self.product(x, self.weight[:, :r + 1], 0)
        return (x.mT * self.weight[:, :r + 1]).sum(-1).unsqueeze(1)                # (N, 1, D)

    @staticmethod
    def product(x, weight, padding):
        """x (N, S, D) with each row of weight (D, k'), and so many zeros on both sides."""
        x = x.transpose(1, 2).unsqueeze(2)  # (N, D, 1, ...), channels last in memory
        kernel = weight[:, None, None, :]                                          # (D, 1, 1, k)
        # in float32: the bf16 backward is 2.5x slower on CPUs
        with torch.autocast(x.device.type, enabled=False):
            y = F.conv2d(x, kernel, groups=x.shape[1], padding=(0, padding))
        return y.squeeze(2).transpose(1, 2)                                        # (N, S, D)


class Widened(torch.autograd.Function):
    """A bf16 weight in float32, whose gradient stays float32: PyTorch would round it on its way."""

    @staticmethod
    def forward(ctx, weight):
        return weight.float()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class WideRows(torch.autograd.Function):
    """The rows of a bf16 weight (V, D) in float32, whose gradient is added up in float32. In bf16 a
    sum of ones ends at 256, and the mask's row alone gets thousands.
    """

    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(ids)
        ctx.rows = len(weight)
        return F.embedding(ids, weight).float()

    @staticmethod
    def backward(ctx, gradient):
        ids, = ctx.saved_tensors
        total = torch.ops.aten.embedding_dense_backward(gradient, ids, ctx.rows, -1, False)
        return total, None


def product(x, weight):
    """x W^T in the type of x, or of autocast: bf16 is how a weight is kept, not how it counts."""
    if weight.dtype is torch.bfloat16 and not torch.is_autocast_enabled(x.device.type):
        weight = Widened.apply(weight)
    return F.linear(x, weight)


class Linear(nn.Linear):
    """A matrix without bias. In decoding sampling/fast.py puts other layouts in its place."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        return product(x, self.weight)

    def residual_add(self, x, y, dropout):
        """x + dropout(the product with y): the end of a residual branch."""
        return x + dropout(self(y))


class TiedEmbedding(nn.Module):
    """Embedding and head share one (V, D) matrix; V = pieces + 1, the last row is the mask.

    `never`: the rows that can never be an answer, those of the mask and the pad. Their logits are
    -inf everywhere: in the loss, in scores, in decoding.
    """

    def __init__(self, rows, dim, never):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))
        self.never = tuple(never)
        self.product = None  # in decoding, the product with sampling/fast.py's layout

    def embed(self, ids):
        if self.weight.dtype is torch.bfloat16:
            return WideRows.apply(self.weight, ids)                                # (..., D)
        return F.embedding(ids, self.weight)                                       # (..., D)

    def logits(self, states):
        if self.product:
            z = self.product(states).float()
        else:
            z = product(states, self.weight).float()                               # (..., V)
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
        self.depth = cfg.n_layers
        self.early_norm = None
        if cfg.exits and cfg.n_layers > 1:
            self.early_norm = nn.Parameter(torch.ones(cfg.n_layers - 1, cfg.d_model))

    def forward(self, x, depth=None):
        if depth is None or depth == self.depth:
            return self.final_norm(x)
        weight = self.early_norm[depth - 1]
        return F.rms_norm(x.float(), x.shape[-1:], weight, 1e-6)


class Denoiser(nn.Module):
    """What both denoisers have in common; the protocol is at the top of model.py. A subclass has
    the class of its layers, layer_type(cfg); states, step and new_cache; and for both_states

        rows_of_step(x0, xt, block, first, with_clean) -> the ids of all rows that a step needs; the
            function from the states of these rows to (clean, noisy); what else a layer is given
        rows_of_vectors(vectors) -> the rows themselves instead of ids, the function to (B, T, D),
            what else a layer is given
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.head = TiedEmbedding(cfg.rows, cfg.d_model, (cfg.pad_id, cfg.mask_id))
        self.layers = nn.ModuleList(self.layer_type(cfg) for _ in range(cfg.n_layers))
        self.exits = Exits(cfg)
        self.recompute = False  # train.py's --activation_checkpointing
        initialise(self, depth=cfg.n_layers)

    @property
    def device(self):
        """Where its weights lie."""
        return self.head.weight.device

    def both_states(self, x0, xt=None, block=None, first=None, with_clean=True, early=None):
        length = x0.shape[1]
        if block:
            block = min(block, length)
            first = min(first or block, block)
        ids, answers, *rows = self.rows_of_step(x0, xt, block, first, with_clean)
        x = self.head.embed(ids)
        found = []
        for i, layer in enumerate(self.layers, 1):
            x = recomputed(self.recompute, layer, x, *rows)
            if i in (early, len(self.layers)):  # the last layer's come first
                found.insert(0, answers(self.exits(x, i)))
        return found

    def starts(self, vectors, count):
        """The start's embedding so many times in front of vectors (B, T, D) -> (B, count, D)."""
        ids = torch.full((len(vectors), count), self.cfg.mask_id, device=vectors.device)
        return self.head.embed(ids)

    def block_states(self, xt, x0, block, first=None):
        """The noisy stream alone is asked."""
        (_, noisy), = self.both_states(x0, xt, block, first, with_clean=False)
        return noisy                                                               # (B, T, D)

    def clean_states(self, x0):
        """The clean stream alone."""
        (clean, _), = self.both_states(x0)
        return clean                                                               # (B, T, D)

    def logits(self, states):
        return self.head.logits(states)

    def forward(self, xt, cache=None):
        if cache is None:
            cache = self.new_cache(*xt.shape)
        return self.logits(self.states(xt, cache))


def initialise(model, std=0.02, depth=1):
    """Every parameter gets its value by a rule here; an unknown name is an error, so none is
    forgotten.
    """
    for name, p in model.named_parameters():
        initialise_one(name, p, std, depth)


def initialise_one(name, p, std=0.02, depth=1):
    if name.endswith(("norm.weight", "early_norm")):
        nn.init.ones_(p)
    elif "conv." in name:
        nn.init.normal_(p, std=p.shape[1] ** -0.5)
    elif name.endswith(("null_key", "log_temperature")):
        nn.init.zeros_(p)  # the score 0, the factor 1
    elif set_by_module(name):
        pass  # constants with a meaning, not noise
    elif p.dim() == 2:
        scale = std if name.startswith("head") else p.shape[1] ** -0.5
        if "out_proj" in name:
            scale = scale / math.sqrt(2 * depth)
        nn.init.normal_(p, std=scale)
    else:
        raise AssertionError(f"no initialisation rule for {name} {tuple(p.shape)}")


def set_by_module(name):
    return "decay" in name or "slot" in name


def first_weights(model):
    """What the parameters of a denoiser on the meta device would be if it had been built in memory,
    one after the other, in the order of named_parameters(): the same random numbers, while never
    more than one layer or one parameter is there.
    """
    # PyTorch draws weights for a matrix when it is made, which initialise() then replaces
    constants = {}
    for i in range(model.cfg.n_layers):
        layer = model.layer_type(model.cfg)
        for name, p in layer.named_parameters():
            if set_by_module(name):
                constants[f"layers.{i}.{name}"] = p.detach()
    for name, p in model.named_parameters():
        whole = constants.get(name)
        if whole is None:
            whole = torch.empty(p.shape)
            initialise_one(name, whole, depth=model.cfg.n_layers)
        yield whole
