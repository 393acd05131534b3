"""What a training measures of itself every --analysis_every steps: the event `analysis` of the log.

    analyse(run)                        # in training/step.py, behind the backward pass of each step
    table(run.folder / "train.jsonl")   # the bytes of analysis.npz, at the end

Each level of --instrument is the one before and more:
    basic   gnorm     norms of the gradient before clipping: of the head, each layer, the exits
    medium  entropy   how widely each head looks, in nats: over the tokens before a token, or, of
                      EcoHybrid, over the memory slots
            slots     of EcoHybrid: how many of a head's slots are in use, e^(entropy of the mean
                      share of each slot)
    full    rank      of each projection, e^(entropy of its singular values): 1 for a matrix of rank
                      1, its smaller side if all are equal

Of heads the mean, the least and the most are kept. Entropy and slots are those of the clean stream
over the first held-out row, in float32 and without dropout. Nothing here draws a random number or
changes a weight, so a run ends with the same bits at each level (a test).
"""
import io
import math
import re
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from eco_hybrid import EcoLayer
from evaluation.run_report import history, read_log
from lora import AdaptedLinear
from training.logs import numbers

LONGEST = 1024      # tokens of the row that is looked at, at most
ROWS = 128          # of them, those whose attention is looked at


def analyse(run):
    """Measure what --instrument says, if this step is one of --analysis_every."""
    args = run.args
    step = run.state.step + 1
    if args.instrument == "off" or not args.analysis_every or step % args.analysis_every:
        return
    started = time.perf_counter()
    found = {"gnorm": gradient_norms(run.model)}        # of parts on several ranks: all are needed
    if run.ranks.main and args.instrument != "basic":
        row = run.held[:1, :min(run.length, LONGEST)]                              # (1, T)
        found |= what_heads_see(run.model, row)
        if args.instrument == "full":
            found["rank"] = ranks_of(run.model)
    seconds = time.perf_counter() - started
    run.log.write("analysis", step=step, instrument=args.instrument, seconds=seconds, **found)


def table(log):
    """All analyses of a train.jsonl as one .npz: `step` (n,), and of each figure its values (n,),
    NaN where a step has none.
    """
    steps = history(read_log(log))["analysis"]
    rows = [numbers("", event) for event in steps.values()]
    columns = {"step": np.array(list(steps), dtype=np.int64)}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name, math.nan) for row in rows]
        columns[name.strip("/").replace("/", ".")] = np.array(values, dtype=np.float64)
    data = io.BytesIO()
    np.savez(data, **columns)
    return data.getvalue()


# ---- basic ---------------------------------------------------------------------------------------

def gradient_norms(model):
    """{part of the model: the norm of its gradient}."""
    parts = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            part = re.match(r"(?:net\.)?(layers\.\d+|[^.]+)", name)[1]
            parts.setdefault(part, []).append(p.grad)
    norms = {}
    for part, gradients in parts.items():
        norm = nn.utils.get_total_norm(gradients)
        if hasattr(norm, "full_tensor"):                # of a sharded gradient
            norm = norm.full_tensor()
        norms[part] = float(norm)
    return norms


# ---- medium --------------------------------------------------------------------------------------

@torch.no_grad()
def what_heads_see(model, row):
    """The figures of each layer for a clean row (1, T)."""
    model.eval()
    found = {"entropy": {}}
    ids, _, *shared = model.rows_of_step(row, None, None, None, True)
    x = model.head.embed(ids)
    for i, layer in enumerate(model.layers):
        if isinstance(layer, EcoLayer):
            share = slot_shares(layer, x, *shared)                                 # (T, H, M)
            slots = entropy(share.mean(0)).exp()                                   # (H,)
            found.setdefault("slots", {})[f"layers.{i}"] = spread(slots)
        else:
            share = attention_shares(layer, x, shared[0])                          # (R, H, C)
        found["entropy"][f"layers.{i}"] = spread(entropy(share).mean(0))
        x = type(layer).forward(layer, x, *shared)      # not the compiled one: other shapes
    return found


def entropy(share):
    """Of shares (..., n) that add up to 1, in nats -> (...)."""
    return torch.special.entr(share).sum(-1)


def spread(values):
    """Of the heads of a layer (H,)."""
    return {
        "mean": float(values.mean()), "least": float(values.min()), "most": float(values.max())
    }


def attention_shares(layer, x, turns):
    """What some tokens of a clean row x (1, T, D) give to each token before them, the null key
    first -> (R, H, C).
    """
    attn = layer.attn
    T = x.shape[1]
    q, k, v = attn.project(layer.attn_norm(x), turns)
    keys, _ = attn.behind(None, k, v)                                              # (1, K, C, E)
    keys = keys.repeat_interleave(q.shape[1] // keys.shape[1], dim=1)              # (1, H, C, E)
    row = torch.linspace(0, T - 1, min(T, ROWS), device=x.device).long()           # (R,)
    scores = q[:, :, row].float() @ keys.float().mT * attn.scale                   # (1, H, R, C)
    place = torch.arange(keys.shape[2], device=x.device) - (keys.shape[2] - T)     # (C,)
    scores = scores.masked_fill(place > row[:, None], -math.inf)
    return scores.softmax(-1)[0].transpose(0, 1)


def slot_shares(layer, x, rows):
    """What each token of a clean row x (T, D) gives to each memory slot -> (T, H, M)."""
    h = layer.norm(x)
    halo = h.new_zeros(1, layer.conv.reach + 1, h.shape[-1])
    h, _ = layer.convolve(h, rows, halo)
    _, _, q, v, s = layer.project(h)
    q, v, s = (part[None, :, None] for part in (q, v, s))                          # (1, T, 1, .)

    # the state behind each token, and what the token reads of it
    own = layer.write(v, s)                                                        # (1, T, H, M, E)
    num = own + layer.decay_factor(1) * layer.prefix(own, 1)
    q = layer.heads(q)                                                             # (1, T, H, 1, E)
    scale = q.shape[-1] ** 0.5 / torch.linalg.vector_norm(num, dim=-1).clamp(min=1e-10)
    scale = scale.unsqueeze(-2)                                                    # (1, T, H, 1, M)
    share = layer.slot_shares(q, q @ num.mT, scale) / scale
    return share[0, :, :, 0]


# ---- full ----------------------------------------------------------------------------------------

@torch.no_grad()
def ranks_of(model):
    """{layer: {projection: its effective rank}}."""
    return {
        f"layers.{i}": {name: effective_rank(matrix) for name, matrix in projections(layer)}
        for i, layer in enumerate(model.layers)
    }


def projections(layer):
    """The matrices of a layer by what they make, (name, (outputs, inputs))."""
    if isinstance(layer, EcoLayer):
        sizes = [layer.ff, layer.ff, layer.dm, layer.dm, layer.H * layer.M]
        parts = matrix_of(layer.in_proj).split(sizes)
        yield from zip(("gate", "up", "query", "value", "score"), parts, strict=True)
        yield "out", matrix_of(layer.out_proj)
        return
    attn = layer.attn
    names = ("query", "key", "value")[-len(attn.parts):]                # tied: queries are keys
    yield from zip(names, matrix_of(attn.qkv_proj).split(attn.parts), strict=True)
    yield "attention_out", matrix_of(attn.out_proj)
    yield from zip(("gate", "up"), matrix_of(layer.ff.in_proj).chunk(2), strict=True)
    yield "out", matrix_of(layer.ff.out_proj)


def matrix_of(module):
    """The matrix that a module multiplies by, its adapter added."""
    if isinstance(module, AdaptedLinear):
        return module.weight + module.lora_b @ module.lora_a
    return module.weight


def effective_rank(matrix):
    """Roy and Vetterli 2007, "The effective rank"."""
    matrix = matrix.float()
    if not matrix.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(matrix)
    return float(entropy(F.normalize(values, p=1, dim=0)).exp())
