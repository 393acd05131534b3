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
    attn_every_1, 2, 3 each (second, third) layer has attention over all the text before in place of
                       its memory: with 1 it is a transformer with the convolution
    untied             an output matrix of its own: equal layers, so more parameters in all

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
from attention import MultiHead
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


# ---- layers: only the training form, which is all that train and evaluate ask for ----------------

class NoConv(EcoLayer):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.conv = NoTaps(cfg)

    def convolve(self, h, rows, halo):
        return h, halo


class NoTaps(nn.Module):
    """In a convolution's place, for those who ask how far it reaches."""

    def __init__(self, cfg):
        super().__init__()
        self.reach = cfg.conv_kernel // 2


class Mixer(nn.Module):
    """x + out(silu(conv(gate)) * up): the gate is convolved as the layer's input else is."""
    convolve = EcoLayer.convolve

    def __init__(self, cfg):
        super().__init__()
        self.norm = RMSNorm(cfg.d_model)
        self.conv = LocalConv(cfg.d_model, cfg.conv_kernel)
        self.in_proj = Linear(cfg.d_model, 2 * cfg.d_model)
        self.out_proj = Linear(cfg.d_model, cfg.d_model)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, rows):
        gate, up = self.in_proj(self.norm(x)).chunk(2, dim=-1)                     # (R, D) each
        gate = gate.float()
        gate, _ = self.convolve(gate, rows, nothing_before(self, gate, rows))
        return self.out_proj.residual_add(x, F.silu(gate).to(up.dtype) * up, self.dropout)


class ConvSeparate(NoConv):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.mixer = Mixer(cfg)

    def streams(self, x, rows):
        return super().streams(self.mixer(x, rows), rows)


def nothing_before(layer, h, rows):
    """The halo of a training row, (B, r + 1, D)."""
    return h.new_zeros(rows.batch, layer.conv.reach + 1, h.shape[-1])


def places(rows, device):
    """The place in the text of the clean rows, (T,), and of the noisy blocks' rows, (n, S + 1)."""
    clean = torch.arange(rows.clean, device=device)
    opens = torch.arange(rows.count, device=device) * rows.block - rows.before
    return clean, opens[:, None] + torch.arange(rows.block + 1, device=device)


class NoMemory(EcoLayer):
    """Convolution and gated feed-forward; context(h, rows) is what a subclass adds, h (R, D)."""

    def __init__(self, cfg):
        super().__init__(cfg)
        del self.slot_key, self.decay
        self.in_proj = Linear(cfg.d_model, 2 * cfg.d_ff)
        self.out_proj = Linear(cfg.d_ff, cfg.d_model)

    def context(self, h, rows):
        return 0

    def streams(self, x, rows):
        h = self.norm(x)
        h, _ = self.convolve(h, rows, nothing_before(self, h, rows))
        gate, up = self.in_proj(h).chunk(2, dim=-1)
        x = self.out_proj.residual_add(x, F.silu(gate) * up, self.dropout)
        return (x + self.context(h, rows),)


class Attention(NoMemory):
    """Attention in place of the memory, beside the gated feed-forward: causal in the clean stream;
    a noisy block sees the clean rows before it and itself.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        self.attn = MultiHead(cfg)

    def context(self, h, rows):
        clean, noisy = rows.split(h)
        row, place = places(rows, h.device)
        mask = None
        if rows.count:
            before = row <= rows.opens[:, None]                                    # (n, T)
            before = before.repeat_interleave(rows.block + 1, dim=0)               # (N, T)
            block = torch.arange(rows.count, device=h.device)
            block = block.repeat_interleave(rows.block + 1)                        # (N,)
            own = (block[:, None] == block) & (rows.writes.flatten() > 0)          # (N, N)
            mask = torch.cat((before, own), dim=1)
        table = rotary_table(torch.cat((row, place.flatten())), self.attn.heads.turned)
        x = torch.cat((clean, noisy.flatten(1, 2)), dim=1)                         # (B, T + N, D)
        y = self.dropout(self.attn.streams(x, table, rows.clean, mask))
        noisy = y[:, rows.clean:].view(noisy.shape)                                # (B, n, S+1, D)
        return rows.join((y[:, :rows.clean], noisy))


class NoDecay(EcoLayer):
    def __init__(self, cfg):
        super().__init__(cfg)
        del self.decay

    def decay_rate(self):
        return torch.zeros(self.H, self.M, device=self.slot_key.device)


class EveryState(EcoLayer):
    """The same layer in a few lines, which a variant can change: the state behind each clean token
    is made.
    """

    def streams(self, x, rows):
        h = self.norm(x)
        h, _ = self.convolve(h, rows, nothing_before(self, h, rows))
        gate, up, q, v, s = self.project(h)
        q_clean, q_noisy = rows.split(q)
        v_clean, v_noisy = rows.split(v)
        s_clean, s_noisy = rows.split(s)
        place, noisy_place = places(rows, h.device)

        # each clean token is a group of its own
        place = place[:, None]                                                     # (T, 1)
        own = self.write_at(v_clean[:, :, None], s_clean[:, :, None], place)       # (B, T, H, M, E)
        state = own + self.decay_factor(1) * self.prefix(own, 1)
        answers = [self.read_at(q_clean[:, :, None], state, place)]                # (B, T, 1, H*E)

        if rows.count:
            own = self.write_at(v_noisy, s_noisy, noisy_place, rows.writes)        # (B, n, H, M, E)
            total = own + state[:, rows.opens]
            answers.append(self.read_at(q_noisy, total, noisy_place))              # (B, n, S+1, .)
        return (self.mix(x, gate, up, rows.join(answers)),)

    def write_at(self, v, s, place, valid=None):
        """write, of tokens at these places (..., S) in the text."""
        return self.write(v, s, valid)

    def read_at(self, q, num, place):
        return self.read(q, num)


class RotaryRead(EveryState):
    """q_i (R(-i) N) = (R(i) q_i) N, so a sum over tokens can be read by relative place: only v, q
    and what is read are turned. rms(N) and the slots' names know no place. Nothing is learned, and
    the frozen context stays one sum.
    """

    def turn(self, x, place, back=False):
        """x (..., S, H*E) turned by its place (..., S) in the text."""
        E = x.shape[-1] // self.H
        cos, sin = rotary_table(place.flatten(), E)
        cos = cos.view(*place.shape, 1, E // 2)
        sin = sin.view(*place.shape, 1, E // 2)
        if back:
            sin = -sin
        return rotate(x.unflatten(-1, (self.H, E)), (cos, sin)).flatten(-2)

    def write_at(self, v, s, place, valid=None):
        return self.write(self.turn(v, place), s, valid)

    def read_at(self, q, num, place):
        value = unit_rms(num).to(q.dtype)                                          # (..., H, M, E)
        plain = self.heads(q)                                                      # (..., H, S, E)
        turned = self.heads(self.turn(q, place))
        score = torch.matmul(turned, value.mT) + torch.matmul(plain, self.slot_key.to(q.dtype).mT)
        share = (score * plain.shape[-1] ** -0.5).softmax(-1).to(q.dtype)          # (..., H, S, M)
        y = torch.matmul(share, value).transpose(-3, -2).flatten(-2)               # (..., S, H*E)
        return self.turn(y, place, back=True)


class NoConvRotary(RotaryRead, NoConv):
    pass


class MeanRead(EveryState):
    """A last column of ones in v makes the sum of the weights part of the state."""

    def write(self, v, s, valid=None):
        v = v.unflatten(-1, (self.H, -1))                                          # (..., S, H, E)
        v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1)
        return super().write(v.flatten(-2), s, valid)

    def read(self, q, num):
        value = (num[..., :-1] / num[..., -1:]).to(q.dtype)                        # (..., H, M, E)
        q = self.heads(q)                                                          # (..., H, S, E)
        key = (value + self.slot_key.to(q.dtype)) * q.shape[-1] ** -0.5
        share = torch.matmul(q, key.mT).softmax(-1).to(q.dtype)                    # (..., H, S, M)
        return torch.matmul(share, value).transpose(-3, -2).flatten(-2)            # (..., S, H*E)


class UncappedWrite(EveryState):
    def write(self, v, s, valid=None):
        w = s.float().clamp(max=UNCAPPED).exp()                                    # (..., S, H*M)
        if valid is not None:
            w = w * valid
        return self.add_up(w, v)


# ---- head ----------------------------------------------------------------------------------------

class Untied(TiedEmbedding):
    def __init__(self, cfg):
        super().__init__(cfg.rows, cfg.d_model, (cfg.pad_id, cfg.mask_id))
        self.inputs = nn.Parameter(torch.empty_like(self.weight))

    def embed(self, ids):
        return F.embedding(ids, self.inputs)


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
    "untied": changed(head=Untied),
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
    noisy = ids if block > 1 else None
    with (
        FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.convolution_backward: depthwise}
        ) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        (states,) = net.both_states(ids, noisy, block, with_clean=block < length)
        sum(each.sum() for each in states if each is not None).backward()
    return counter.get_total_flops() / length


def train_flops(name, c, length, block, masked_share):
    """As model_config.train_flops, of a variant."""
    asked = 0
    if block < length:
        asked += 1
    if block > 1:
        asked += masked_share
    return layer_flops(name, c, length, block) + 3 * asked * 2 * c.d_model * c.rows


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
