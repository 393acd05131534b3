"""EcoHybrid with its block changed, one thing at a time: what each choice is worth.

    python benchmarks/eco_variants.py --max_steps 500 --data_dir DIR
    python benchmarks/eco_variants.py --max_steps 500 --data_dir DIR --execute
    python benchmarks/eco_variants.py --only no_conv untied --seeds 1337 --execute
    python -m run_experiments --report checkpoints/studies/eco_variants

The first prints the plan and its sizes and does nothing else; --execute runs what is not finished;
with --only the reference always runs beside the named ones; the last writes report.html and
results.md. None of this is an option of the product.

    reference          the block as it is
    no_conv            no convolution: inside its block a token does not know where it stands
    no_conv_rotary     ... but the memory knows places (rotary_read): what the convolution is worth
                       beyond telling the order
    conv_separate      a gated convolution as a sub-layer of its own (norm, in, convolved gate, out,
                       residual) instead of in front
    no_memory          no memory: context comes through the halos alone
    no_decay           slots forget nothing
    rotary_read        what a token writes is turned by its place and turned back by the reader's:
                       sum_j w_j R(j - i) v_j
    mean_read          slot values are weighted means N / sum w instead of N / rms(N)
    uncapped_write     w = exp(score), not exp(8 tanh(score / 8))
    attn_every_1, 2, 3 each (second, third) layer has block-causal attention over everything in
                       place of its memory: with 1 it is a transformer with the convolution
    untied             an output matrix of its own: equal layers, so more parameters in all
    time_conditioning  the embeddings are told which share of their block is masked: half a sine and
                       a cosine of it, projected
    time_gently        ... a tenth as loud

Every run is a process of its own that changes the model, then calls train or evaluate. The layers
of all have equally many parameters, by d_ff; the numbers in the report are counted on the built
model. Other flags are those of run_experiments. The checkpoints are for this script alone: those of
rotary_read, mean_read and uncapped_write have the product's very tensors, and would be read there
as something that they are not.
"""
import dataclasses
import functools
import importlib
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import harness  # noqa: F401  first: it puts the repository on the path

import cli
import config
import model_config
import run_experiments
from common.console import UserError
from eco_hybrid import EcoHybrid, EcoLayer
from evaluation import study_plan
from layers import (
    Linear,
    LocalConv,
    RMSNorm,
    TiedEmbedding,
    initialise,
    rotary_table,
    rotate,
    unit_rms,
)
from model import MultiHead, block_masks
from studies import SMALL, STUDIES, Study

STUDY = "eco_variants"
FIXED = (
    "model",
    "objective",
    "study",
    "match",
    "report",
    "architectures",
    "show_samples",
    *run_experiments.OURS_IN_STUDIES,
)
UNCAPPED = 40.0       # of uncapped_write: exp(40) only keeps a float32 sum finite
WAVES = 8             # of time_conditioning


# ---- layers: only the training form, which is all that train and evaluate ask for ----------------

class Same(nn.Module):
    """In a convolution's place."""
    reach = 0

    def forward(self, x, halo=None):
        return x


class NoConv(EcoLayer):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.conv = Same()

    def conv_blocks(self, h, halo):
        return h


class Mixer(nn.Module):
    """x + out(silu(conv(gate)) * up): the gate is convolved under the block rule."""
    conv_blocks = EcoLayer.conv_blocks

    def __init__(self, cfg):
        super().__init__()
        self.norm, self.conv = RMSNorm(cfg.d_model), LocalConv(cfg.d_model, cfg.conv_kernel)
        self.in_proj, self.out_proj = (
            Linear(cfg.d_model, 2 * cfg.d_model),
            Linear(cfg.d_model, cfg.d_model),
        )
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, valid=None):
        gate, up = self.in_proj(self.norm(x)).chunk(2, dim=-1)  # (..., S, D) each
        gate = gate.float() if valid is None else gate.float() * valid
        if x.dim() == 3:
            gate = self.conv(gate)
        else:
            gate = self.conv_blocks(gate, gate.new_zeros(x.shape[1], self.conv.reach, x.shape[-1]))
        return self.out_proj.residual_add(x, F.silu(gate).to(up.dtype) * up, self.dropout)


class ConvSeparate(NoConv):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.mixer = Mixer(cfg)

    def one_block(self, x):
        return super().one_block(self.mixer(x))

    def all_blocks(self, x, valid=None, last=False):
        return super().all_blocks(self.mixer(x, valid), valid, last)


class NoMemory(EcoLayer):
    """Convolution and gated feed-forward; context(h, valid, last) is what a subclass adds, h (2, B,
    n, S, D) or (B, S, D).
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        del self.slot_key, self.decay
        self.in_proj, self.out_proj = (
            Linear(cfg.d_model, 2 * cfg.d_ff),
            Linear(cfg.d_ff, cfg.d_model),
        )

    def context(self, h, valid, last):
        return 0

    def add(self, x, h, valid=None, last=False):
        y = self.context(h, valid, last)
        if last:
            x, h = x[:1], h[:1]
        gate, up = self.in_proj(h).chunk(2, dim=-1)
        return self.out_proj.residual_add(x, F.silu(gate) * up, self.dropout) + y

    def one_block(self, x):
        return (self.add(x, self.conv(self.norm(x))),)

    def all_blocks(self, x, valid=None, last=False):
        h = self.norm(x)
        if valid is not None:
            h = h * valid
        return self.add(
            x,
            self.conv_blocks(h, h.new_zeros(x.shape[1], self.conv.reach, x.shape[-1])),
            valid,
            last,
        )


class Attention(NoMemory):
    """Attention over the clean blocks before and the own one, in place of the memory: beside the
    gated feed-forward.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        self.attn = MultiHead(cfg)

    def context(self, h, valid, last):
        n, S = h.shape[-3:-1] if h.dim() == 5 else (1, h.shape[1])
        E = h.shape[-1] // self.attn.heads
        table = rotary_table(torch.arange(n * S, device=h.device), E)
        if h.dim() == 3:
            return self.dropout(self.attn.one_block(h, table)[0])
        clean, noisy = block_masks(n * S, S, S, h.device)                          # (T, T), (T, 2T)
        if valid is not None:  # nobody sees padding
            real = valid.flatten() > 0                                             # (T,)
            clean, noisy = clean & real, noisy & real.repeat(2)
        # (2B, T, D), or (B, T, D)
        y = self.attn.all_blocks(h.flatten(2, 3).flatten(0, 1), table, (clean, noisy), last)
        return self.dropout(y.view(1 if last else 2, *h.shape[1:]))


class NoDecay(EcoLayer):
    def __init__(self, cfg):
        super().__init__(cfg)
        del self.decay

    def prefix(self, own, block):
        return torch.einsum(
            "bc,zchme->zbhme",
            torch.ones(own.shape[1], own.shape[1], device=own.device).tril(-1),
            own,
        )


class RotaryRead(EcoLayer):
    """q_i (R(-i) N) = (R(i) q_i) N, so a sum over tokens can be read by relative place: only v, q
    and what is read are turned. rms(N) and the slots' names know no place. Nothing is learned, and
    the frozen context stays one sum.
    """

    def turn(self, x, back=False):
        """x (..., S, H*E), behind (B, n, S) or (B, S): turned by the place in the text, up to a
        common start.
        """
        n, S = x.shape[-3:-1] if x.dim() > 3 else (1, x.shape[-2])
        E = x.shape[-1] // self.H
        cos, sin = (
            t.view(n, S, 1, E // 2) for t in rotary_table(torch.arange(n * S, device=x.device), E)
        )
        cos, sin = (cos, sin) if x.dim() > 3 else (cos[0], sin[0])
        return rotate(x.unflatten(-1, (self.H, E)), (cos, -sin if back else sin)).flatten(-2)

    def write(self, v, s, valid=None):
        return super().write(self.turn(v), s, valid)

    def read(self, q, num):
        value = unit_rms(num).to(q.dtype)           # (..., H, M, E)
        # (..., H, S, E)
        plain, turned = (z.unflatten(-1, (self.H, -1)).transpose(-3, -2) for z in (q, self.turn(q)))
        # (..., H, S, M)
        score = torch.matmul(turned, value.mT) + torch.matmul(plain, self.slot_key.to(q.dtype).mT)
        share = (score * plain.shape[-1] ** -0.5).softmax(-1).to(q.dtype)
        # (..., S, H*E)
        return self.turn(torch.matmul(share, value).transpose(-3, -2).flatten(-2), back=True)


class Cells(EcoLayer):
    """Inside a block, too, slots forget with distance, to both sides, in cells of c tokens."""
    c = 8

    def around(self, own):
        """own (N, m, H, M, E), sums of a block's cells -> same shape, what each cell has around it,
        itself included.
        """
        ahead = self.prefix(own.flip(1), self.c).flip(1)
        return own + self.prefix(own, self.c) + ahead

    def cells(self, *parts):
        return [part.unflatten(-2, (-1, self.c)) for part in parts]

    def one_block(self, x):
        if x.shape[1] <= self.c or x.shape[1] % self.c:
            return super().one_block(x)
        gate, up, q, v, s = self.split(self.conv(self.norm(x)))
        q, v, s = self.cells(q, v, s)                                              # (B, m, c, ...)
        return (self.mix(x, gate, up, self.read(q, self.around(self.write(v, s))).flatten(1, 2)),)

    def all_blocks(self, x, valid=None, last=False):
        S, c = x.shape[-2], self.c
        if S <= c or S % c:
            return super().all_blocks(x, valid, last)
        m = S // c
        h = self.norm(x)
        if valid is not None:
            h = h * valid
            valid = valid.unflatten(-2, (-1, c))                                   # (1, n, m, c, 1)
        # (2, B, n, S, D)
        h = self.conv_blocks(h, h.new_zeros(x.shape[1], self.conv.reach, x.shape[-1]))
        if last:
            clean = self.write(*self.cells(*self.split_write(h[1])), valid)  # (B, n, m, H, M, E)
            x, h = x[:1], h[:1]
        gate, up, q, v, s = self.split(h)
        q, v, s = self.cells(q, v, s)  # (K, B, n, m, c, ...)
        own = self.write(v, s, valid)  # (K, B, n, m, H, M, E)
        # (B, n, H, M, E)
        before = self.prefix((clean if last else own[1]).flatten(1, 2), c)[:, ::m]
        fade = torch.stack([self.decay_factor(i * c) for i in range(m)])  # (m, H, M, 1)
        near = self.around(own.flatten(0, 2)).view(own.shape)
        total = near + before[:, :, None] * fade
        return self.mix(x, gate, up, self.read(q, total).flatten(-3, -2))


class NoConvRotary(RotaryRead, NoConv):
    pass


class MeanRead(EcoLayer):
    """A last column of ones in v makes the sum of the weights part of the state."""

    def write(self, v, s, valid=None):
        v = v.unflatten(-1, (self.H, -1))  # (..., S, H, E)
        return super().write(
            torch.cat((v, torch.ones_like(v[..., :1])), dim=-1).flatten(-2), s, valid
        )

    def read(self, q, num):
        value = (num[..., :-1] / num[..., -1:]).to(q.dtype)                        # (..., H, M, E)
        q = q.unflatten(-1, (self.H, -1)).transpose(-3, -2)                        # (..., H, S, E)
        key = (value + self.slot_key.to(q.dtype)) * q.shape[-1] ** -0.5
        share = torch.matmul(q, key.mT).softmax(-1).to(q.dtype)                    # (..., H, S, M)
        return torch.matmul(share, value).transpose(-3, -2).flatten(-2)            # (..., S, H*E)


class UncappedWrite(EcoLayer):
    def write(self, v, s, valid=None):
        w = s.float().clamp(max=UNCAPPED).exp()  # (..., S, H*M)
        w = (
            (w if valid is None else w * valid)
            .to(v.dtype)
            .unflatten(-1, (self.H, self.M))
            .movedim(-3, -1)
        )
        # (..., H, M, E)
        return torch.matmul(w, v.unflatten(-1, (self.H, -1)).transpose(-3, -2)).float()


# ---- heads ---------------------------------------------------------------------------------------

class Untied(TiedEmbedding):
    def __init__(self, cfg):
        super().__init__(cfg.rows, cfg.d_model, (cfg.pad_id, cfg.mask_id))
        self.inputs = nn.Parameter(torch.empty_like(self.weight))

    def embed(self, ids):
        return F.embedding(ids, self.inputs)


class Timed(TiedEmbedding):
    """Embeddings that know which share of their block is hidden: measured, so none of clean text,
    and the cache needs no time.
    """
    loud = 1

    def __init__(self, cfg):
        super().__init__(cfg.rows, cfg.d_model, (cfg.pad_id, cfg.mask_id))
        self.pad, self.mask = cfg.pad_id, cfg.mask_id
        self.time_proj = Linear(2 * WAVES, cfg.d_model)

    def embed(self, ids):  # (..., S), a block
        share = (ids == self.mask).sum(-1, keepdim=True) / (ids != self.pad).sum(
            -1, keepdim=True
        ).clamp(min=1)
        angle = math.pi * share * torch.arange(1, WAVES + 1, device=ids.device)  # (..., WAVES)
        return (
            super().embed(ids)
            + self.time_proj(torch.cat((angle.sin(), angle.cos()), dim=-1)).unsqueeze(-2)
            * self.loud
        )


class TimedGently(Timed):
    loud = 0.1


# ---- models --------------------------------------------------------------------------------------

def changed(layer=EcoLayer, head=None, every=1):
    """EcoHybrid with another class in every n-th layer, or with another head."""
    class Changed(EcoHybrid):
        def __init__(self, cfg):
            super().__init__(cfg)
            self.head = head(cfg) if head else self.head
            self.layers = nn.ModuleList(
                (EcoLayer if i % every else layer)(cfg) for i in range(1, cfg.n_layers + 1)
            )
            initialise(self, depth=cfg.n_layers)
    return Changed


VARIANTS = {
    "reference": EcoHybrid,
    "no_conv": changed(NoConv),
    "no_conv_rotary": changed(NoConvRotary),
    "conv_separate": changed(ConvSeparate),
    "no_memory": changed(NoMemory),
    "no_decay": changed(NoDecay),
    "rotary_read": changed(RotaryRead),
    "mean_read": changed(MeanRead),
    "uncapped_write": changed(UncappedWrite),
    "attn_every_1": changed(Attention),
    "attn_every_2": changed(Attention, every=2),
    "attn_every_3": changed(Attention, every=3),
    "cells_8": changed(Cells),
    "untied": changed(head=Untied),
    "time_conditioning": changed(head=Timed),
    "time_gently": changed(head=TimedGently),
}


# ---- sizes, counted on built models --------------------------------------------------------------

@functools.cache
def counts(name, c):
    """A built model's parameters: (all, those of its layers)."""
    with torch.device("meta"):
        net = VARIANTS[name](c)
    return tuple(sum(p.numel() for p in part.parameters()) for part in (net, net.layers))


def match_d_ff(name, c):
    """The d_ff, a multiple of 8, that gives the variant's layers the size of the reference's."""
    low, high = (counts(name, dataclasses.replace(c, d_ff=d_ff))[1] for d_ff in (8, 16))
    return max(8, 8 + 8 * round((counts("reference", c)[1] - low) / (high - low)))


@functools.cache
def layer_flops(name, c, length, block):
    """FLOPs per token of a forward and backward through everything but the head, counted by torch.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # torch's own formula counts every channel with every other
    def depthwise(grad, x, w, *_, **__):
        return 2 * 2 * math.prod(grad) * math.prod(w[1:])
    with torch.random.fork_rng(devices=[]):  # a training in this process does not notice
        net, ids = VARIANTS[name](c), torch.zeros(1, length, dtype=torch.long)
    with (
        FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.convolution_backward: depthwise}
        ) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        net.block_states(ids, ids, block).sum().backward()
    return counter.get_total_flops() / length


def train_flops(name, c, length, block, masked_share):
    """As model_config.train_flops, of a variant."""
    return layer_flops(name, c, length, block) + 3 * masked_share * 2 * c.d_model * c.rows


def sizes(name, c, a):
    cost = functools.partial(train_flops, name)
    return {
        "params": counts(name, c)[0],
        "params_blocks": counts(name, c)[1],
        "flops_per_token": model_config.flops_per_token(
            c, a.seq_len, a.rule_shares, study_plan.mean_mask_rate(a), cost
        ),
    }


# ---- runs ----------------------------------------------------------------------------------------

def inside(name, command, words):
    """In a run's own process: change the model and what is said of its size, then be the command.
    """
    import model
    model.EcoHybrid = VARIANTS[name]
    model_config.count_params, model_config.block_params = (
        (lambda c: counts(name, c)[0]),
        (lambda c: counts(name, c)[1]),
    )
    model_config.train_flops = functools.partial(train_flops, name)
    return importlib.import_module(command).main(words)


def plan(args, origins, root):
    """-> [Run], seed by seed, the reference first."""
    vocab = study_plan.vocabulary(args.data_dir)
    if not vocab:
        raise UserError(
            f"{args.data_dir} holds no prepared text; first: python -m prepare --data_dir "
            f"{args.data_dir}"
        )
    c = model_config.model_config(args, vocab)
    own = {name: dict(d_ff=match_d_ff(name, c)) for name in VARIANTS}
    STUDIES[STUDY] = Study("What is each choice in EcoHybrid's block worth?", own, base=SMALL)
    args = dataclasses.replace(args, study=STUDY, show_samples=False)
    by_hand = dataclasses.replace(args, match="tokens")  # sizes are equal already
    return args, [
        run._replace(
            via=(str(Path(__file__).resolve()), "--variant", run.variant),
            counted=sizes(run.variant, model_config.model_config(run.args, vocab), run.args),
        )
        for run in study_plan.make_plan(by_hand, origins, root)
    ]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--variant"]:
        return inside(argv[1], argv[2], argv[3:])
    args, origins = cli.parse(config.ExperimentArgs, argv, "run_experiments", tier=SMALL)
    if mine := [name for name in FIXED if origins[name] == "flag"]:
        raise UserError(f"--{mine[0]} is set by this script itself: leave it out")
    cli.announce(args, origins)
    root = Path(args.output_root or f"checkpoints/studies/{STUDY}")
    args, runs = plan(args, origins, root)
    return run_experiments.carry_out(args, runs, root)


if __name__ == "__main__":
    cli.run(main)
