"""Both denoisers by their definition: a second implementation in float64, row after row, which
shares the weights and a bound of the decay with the product and nothing else.

    clean, noisy = by_definition(net, x0, xt, block, first)     # ids (T,) -> states (T, D) each

A row is what reads one token. A layer is two questions: which rows does a row see, and how old is
what it sees. Legend: N rows, T tokens, D width, H heads, K heads of keys, E numbers of a head's
key, F of its value, n rows that are seen, M slots, r the reach.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from eco_hybrid import FASTEST


class Row(NamedTuple):
    token: int      # what it reads
    position: int   # it answers for the token of this number
    block: int      # the noisy block it belongs to; -1: the clean stream
    front: int      # the position of its block's front row; of a clean row its own


def lay_out(x0, xt, block, first, start):
    """The clean rows, and behind them each noisy block with its front row -> [Row]."""
    read = [start, *x0.tolist()[:-1]]
    rows = [Row(token, i, -1, i) for i, token in enumerate(read)]
    if xt is None:
        return rows
    tokens = xt.tolist()
    edges = [0, *range(first, len(tokens), block), len(tokens)]
    for number, lo in enumerate(edges[:-1]):
        rows.append(Row(read[lo], lo, number, lo))
        for i in range(lo, edges[number + 1]):
            rows.append(Row(tokens[i], i + 1, number, lo))
    return rows


def seen(row, rows, window=None):
    """The numbers of the rows that this one sees: of a clean row those up to it, of a noisy one
    those up to its block's opening, and its block without the front.
    """
    found = []
    for number, other in enumerate(rows):
        if other.block == -1:
            sees = other.position <= row.front
            if window is not None:
                sees = sees and other.position > row.front - window
        else:
            sees = other.block == row.block and other.position > other.front
        if sees:
            found.append(number)
    return found


def neighbour(row, rows, tap):
    """The number of the row that stands so many places further in the text, as this one sees it."""
    position = row.position + tap
    for number, other in enumerate(rows):
        if other.position != position:
            continue
        own = other.block == row.block and (row.block >= 0 or tap <= 0)
        before = other.block == -1 and row.block >= 0 and position < row.front
        if own or before:
            return number
    return None


def norm(x, weight, eps=1e-6):
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * weight.double()


def product(linear, x):
    return x @ linear.weight.double().T


def eco_layer(layer, x, rows, window, cfg):
    """x (N, D) -> (N, D)."""
    h = norm(x, layer.norm.weight)
    taps = layer.conv.weight.double()                                              # (D, k)
    reach = layer.conv.reach
    convolved = torch.zeros_like(h)
    for number, row in enumerate(rows):
        for tap in range(-reach, reach + 1):
            other = neighbour(row, rows, tap)
            if other is not None:
                convolved[number] += taps[:, reach + tap] * h[other]

    H = layer.H
    sizes = [layer.ff, layer.ff, layer.dm, layer.dm, H * layer.M]
    gate, up, q, v, s = product(layer.in_proj, convolved).split(sizes, dim=-1)
    q = q.unflatten(-1, (H, -1))                                                   # (N, H, E)
    v = v.unflatten(-1, (H, -1))
    w = torch.exp(8 * torch.tanh(s / 8) - 6).unflatten(-1, (H, -1))                # (N, H, M)
    rate = torch.exp(-layer.decay.double()).clamp(max=FASTEST)                     # (H, M)
    memory = []
    for number, row in enumerate(rows):
        total = 0
        for other in seen(row, rows):
            age = 0  # a block is a bag
            if rows[other].block == -1:
                age = row.front - rows[other].position
            keep = torch.exp(-age * rate)
            total = total + (keep * w[other]).unsqueeze(-1) * v[other].unsqueeze(1)
        slots = total / total.square().mean(-1, keepdim=True).sqrt()               # (H, M, E)
        names = slots + layer.slot_key.double()
        score = torch.einsum("he,hme->hm", q[number], names) / q.shape[-1] ** 0.5
        memory.append(torch.einsum("hm,hme->he", score.softmax(-1), slots).flatten())
    y = torch.cat((F.silu(gate) * up, torch.stack(memory)), dim=-1)
    return x + product(layer.out_proj, y)


def turned(x, position):
    """The pairs (x_i, x_{i + E/2}) of x (H, E) as complex numbers, turned by the position."""
    E = x.shape[-1]
    angle = position * 10_000.0 ** (-torch.arange(0, E, 2).double() / E)
    z = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)


def score_parts(cfg):
    """What a score of the transformer adds up: [(numbers of a head, do positions turn them?)]."""
    H = cfg.n_heads
    if cfg.attn == "decoupled":
        return [(cfg.sem_dim // H, False), (cfg.geo_dim // H, True)]
    if cfg.attn == "bottleneck":
        return [(cfg.attn_dim // H, True)]
    return [(cfg.d_model // H, True)]


def scores_of(q, keys, parts):
    """q (H, E), keys (n, H, E) -> (H, n): the sum of the parts, each with its own scale."""
    total, at = 0.0, 0
    for width, _ in parts:
        part = slice(at, at + width)
        total = total + torch.einsum("he,nhe->hn", q[:, part], keys[:, :, part]) / width ** 0.5
        at += width
    return total


def placed(x, rows, parts):
    """x (N, H, E): the parts that positions turn, turned."""
    found = []
    for one, row in zip(x, rows, strict=True):
        pieces = one.split([width for width, _ in parts], dim=-1)
        turns = [turned(piece, row.position) if turn else piece
                 for piece, (_, turn) in zip(pieces, parts, strict=True)]
        found.append(torch.cat(turns, dim=-1))
    return torch.stack(found)


def attention(attn, cfg, h, rows, window):
    """h (N, D) -> the heads' answers (N, H F)."""
    H = cfg.n_heads
    K = cfg.kv_heads or H
    parts = score_parts(cfg)
    E = sum(width for width, _ in parts)
    size = cfg.attn_dim // H if cfg.attn_dim else E                                # F
    queries = [] if cfg.tie_qk else [H * E]
    *q, k, v = product(attn.qkv_proj, h).split([*queries, K * E, K * size], dim=-1)
    server = torch.arange(H) * K // H       # the head of keys that each head of queries asks
    k = placed(k.unflatten(-1, (K, E)), rows, parts)[:, server]                    # (N, H, E)
    v = v.unflatten(-1, (K, size))[:, server]                                      # (N, H, F)
    q = placed(q[0].unflatten(-1, (H, E)), rows, parts) if q else k
    factor = attn.log_temperature.double().exp() if cfg.learned_temp else torch.ones(H).double()
    answers = []
    for number, row in enumerate(rows):
        others = seen(row, rows, window)
        keys, values = k[others], v[others]                                        # (n, H, ...)
        if cfg.null_attn:
            keys = torch.cat((attn.null_key.double()[server][None], keys))
            values = torch.cat((torch.zeros_like(values[:1]), values))
        share = (factor[:, None] * scores_of(q[number], keys, parts)).softmax(-1)  # (H, n)
        answers.append(torch.einsum("hn,nhe->he", share, values).flatten())
    return torch.stack(answers)


def transformer_layer(layer, x, rows, window, cfg):
    """x (N, D) -> (N, D)."""
    answers = attention(layer.attn, cfg, norm(x, layer.attn_norm.weight), rows, window)
    x = x + product(layer.attn.out_proj, answers)
    h = product(layer.ff.in_proj, norm(x, layer.ff_norm.weight))
    gate, up = h.chunk(2, dim=-1)
    return x + product(layer.ff.out_proj, F.silu(gate) * up)


@torch.no_grad()
def by_definition(net, x0, xt=None, block=None, first=None, window=None):
    """ids (T,) -> the states about each token of both streams, (T, D) each; without xt the noisy
    ones are None. window: the transformer's clean rows see no more than so many, themselves
    included.
    """
    layer_of = {"primary": eco_layer, "backup": transformer_layer}[net.cfg.model]
    rows = lay_out(x0, xt, block, first, net.cfg.mask_id)
    x = net.head.weight.double()[[row.token for row in rows]]                      # (N, D)
    for layer in net.layers:
        x = layer_of(layer, x, rows, window, net.cfg)
    x = norm(x, net.exits.final_norm.weight)

    T = len(x0)
    if xt is None:
        return x, None
    noisy = torch.empty(T, x.shape[-1], dtype=x.dtype)
    for number, row in enumerate(rows):
        last = number + 1 == len(rows) or rows[number + 1].block != row.block
        if row.block >= 0 and not last:
            noisy[row.position] = x[number]
    return x[:T], noisy
