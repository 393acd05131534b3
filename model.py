"""The backup denoiser, a bidirectional transformer, and build_model for both denoisers.

    from model import build_model
    model = build_model(cfg)            # cfg.model: "primary" (EcoHybrid) or "backup"

Both read text in two streams, and both streams are shifted: the row that reads token i - 1 answers
for token i.
    clean   [start, x_0, x_1, ...], causal, one row a token: exact left to right. The start is the
            mask's row.
    noisy   a block [x_{p-1}, xt_p .. xt_{p+S-1}]: it sees the clean rows up to x_{p-1} and itself.
            The front row x_{p-1} is seen by nobody, as it is among the clean rows.

The denoiser protocol, which masking.py, evaluation/ and sampling/torch_model.py rely on:
    model.cfg                           ModelConfig
    model.both_states(x0, xt=None, block=None, first=None, with_clean=True, early=None)
                                        training: x0, xt (B, T) -> [(clean, noisy)], (B, T, D) each,
                                        states about each token, None of a stream not asked.
                                        Noisy blocks stand behind the clean text before them; block
                                        0 may be shorter (`first` tokens), and so may the last.
                                        early: also leave behind that many layers, a second pair
    model.block_states(xt, x0, block, first=None), model.clean_states(x0)
                                        one of the two, (B, T, D)
    model.head.weight, .never           the (V, D) head matrix, and the rows that are never an
                                        answer
    model.logits(states)                (..., D) -> (..., V) float32; the mask's and the pad's logit
                                        is -inf
    model.new_cache(batch, length)      the frozen context of so many tokens at most; the start is
                                        in it. .length .nbytes .select(rows), maybe .beside(other)
    model.step(x0, cache)               the next tokens (B, T) join the context, however they are
                                        cut -> (B, T, D), each about its successor
    model.states(xt, cache, depth=None) (B, S) ids of a noisy block behind the context -> (B, S, D),
                                        each about its own token; depth: leave early
    model.step_and_states(x0, xt, cache)
                                        maybe: both in one pass -> the block's states
    model(xt, cache=None)               logits(states(xt, cache)); without a cache xt is all there
                                        is
No loss, no knowledge of masking, no time input. Logits with the cache equal logits recomputed from
clean text, in float32 up to its rounding: to 1e-5 of the logits' size.

Legend: B batch, N rows of any kind, T clean rows, S block, n blocks, C positions of the frozen
context, D width, H heads, E head size, V vocabulary rows.
"""
import torch
import torch.nn.functional as F
from torch import nn

from eco_hybrid import EcoHybrid
from layers import (
    Denoiser,
    Linear,
    RMSNorm,
    openings,
    rotary_table,
    rotate,
    shifted,
)


def attend(q, k, v, mask=None, causal=False):
    """The one call of the attention kernel: q (N,H,Tq,E), k, v (N,H,Tk,E), mask (Tq,Tk) bool or
    None -> (N,H,Tq,E).

    causal: a query sees the keys up to its own, which are the last Tq ones.
    """
    new = q.shape[2]
    old = k.shape[2] - new
    if causal and old and new > 1:  # the kernel's own causal mask would begin at the first key
        mask = torch.ones(new, old + new, dtype=torch.bool, device=q.device).tril(old)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and not old, scale=q.shape[-1] ** -0.5
    )


class NoisyRows:
    """The noisy rows of a training row of so many tokens, block after block, each with its front
    row, (N,) = T + n: which token a row reads, its position, what it sees.
    """

    def __init__(self, length, block, first, device):
        self.opens, self.clean = openings(length, block, first, device)            # (n,)
        token = torch.arange(length, device=device)
        number = (token + block - first) // block                                  # (T,) its block
        # the row that reads each token, and the one before it, which answers for it
        self.tokens = token + number + 1                                           # (T,)
        self.answers = self.tokens - 1
        self.fronts = self.opens + torch.arange(len(self.opens), device=device)    # (n,)
        self.position = torch.cat((token, self.opens))                             # (N,)
        self.position[self.tokens] = token + 1
        self.position[self.fronts] = self.opens

    def mask(self, clean):
        """What noisy rows see of [so many clean rows, noisy rows] (N, T + N); None: one block
        behind one clean row, which sees all but its own front row.
        """
        if len(self.opens) == clean == 1:
            return None
        block = torch.zeros_like(self.position)
        block[self.fronts] = 1
        block = block.cumsum(0) - 1                                                # (N,)
        row = torch.arange(clean, device=block.device)
        before = row <= self.opens[block].unsqueeze(1)                             # (N, T)
        own = block.unsqueeze(1) == block                                          # (N, N)
        own[:, self.fronts] = False
        return torch.cat((before, own), dim=1)


class MultiHead(nn.Module):
    """All heads in one projection in and one out; no bias and no norm on q and k, so that
    llama.cpp's graph can run it.
    """

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.n_heads
        self.qkv_proj = Linear(cfg.d_model, 3 * cfg.d_model)
        self.out_proj = Linear(cfg.d_model, cfg.d_model)

    def project(self, x, table):
        """x (N, T, D) -> q, k, v (N, H, T, E), q and k rotated."""
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1))                  # (N, T, 3, H, E)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                             # (N, H, T, E)
        return rotate(q, table), rotate(k, table), v

    def join(self, y):
        """(N, H, T, E) -> (N, T, D)."""
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def next_rows(self, x, table, context=None):
        """The next clean rows x (B, T, D) behind a frozen context -> (output, their k, their v)."""
        q, k, v = self.project(x, table)
        keys, values = self.behind(context, k, v)
        return self.join(attend(q, keys, values, causal=True)), k, v

    def block(self, x, table, context):
        """One noisy block with its front row x (B, S + 1, D) behind a frozen context -> output."""
        q, k, v = self.project(x, table)
        keys, values = self.behind(context, k[:, :, 1:], v[:, :, 1:])
        return self.join(attend(q, keys, values))

    @staticmethod
    def behind(context, k, v):
        """Old keys and values, then the new ones (B, H, C + S, E)."""
        if context is None:
            return k, v
        old_k, old_v = context
        return torch.cat((old_k.to(k.dtype), k), dim=2), torch.cat((old_v.to(k.dtype), v), dim=2)

    def streams(self, x, table, clean, mask):
        """Training: x (B, T + N, D), T clean rows, then the noisy ones, which see what mask says.
        """
        q, k, v = self.project(x, table)
        sizes = [clean, x.shape[1] - clean]
        q_clean, q_noisy = q.split(sizes, dim=2)
        k_clean, k_noisy = k.split(sizes, dim=2)
        v_clean, v_noisy = v.split(sizes, dim=2)
        y = attend(q_clean, k_clean, v_clean, causal=True)                         # (B, H, T, E)
        if not sizes[1]:
            return self.join(y)
        if mask is None:  # one block: its front row leaves
            k = torch.cat((k_clean, k_noisy[:, :, 1:]), dim=2)
            v = torch.cat((v_clean, v_noisy[:, :, 1:]), dim=2)
        noisy = attend(q_noisy, k, v, mask)                                        # (B, H, N, E)
        return self.join(torch.cat((y, noisy), dim=2))


class KVCache:
    """The frozen context, preallocated: keys and values (L, B, H, room, E) of L layers. A text that
    is longer than the room slides: the oldest positions leave. `held` counts the positions that are
    there; `length` counts all rows that were ever read, the start included, which is where rotary
    positions go on.
    """

    def __init__(self, cfg, batch, room, device, dtype):
        shape = (cfg.n_layers, batch, cfg.n_heads, room, cfg.d_model // cfg.n_heads)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.front = None               # the last token that was read (B, 1)
        self.length = 0
        self.held = 0

    @property
    def nbytes(self):
        return sum(t.numel() * t.element_size() for t in (self.k, self.v))

    def select(self, rows):
        """Keep only these rows of the batch."""
        self.k = self.k[:, rows]
        self.v = self.v[:, rows]
        self.front = self.front[rows]

    def context(self, layer):
        """What a layer sees of it: keys and values (B, H, C, E), or None while nothing is held."""
        if not self.held:
            return None
        return self.k[layer, :, :, :self.held], self.v[layer, :, :, :self.held]

    def make_room(self, tokens):
        """Before so many tokens are read: if they do not fit, the oldest leave."""
        room = self.k.shape[3]
        if tokens > room:
            raise ValueError(f"the cache holds {room} positions, {tokens} come at once")
        gone = self.held + tokens - room
        if gone > 0:
            self.held -= gone
            for t in (self.k, self.v):
                t[:, :, :, :self.held] = t[:, :, :, gone:gone + self.held].clone()

    def write(self, layer, k, v):
        """Behind what is held; it counts only after advance(), when all layers have written."""
        end = self.held + k.shape[2]
        self.k[layer, :, :, self.held:end] = k
        self.v[layer, :, :, self.held:end] = v

    def advance(self, x0):
        self.length += x0.shape[1]
        self.held += x0.shape[1]
        self.front = x0[:, -1:]


class FeedForward(nn.Module):
    """Gated: down(silu(gate x) * up x)."""

    def __init__(self, cfg):
        super().__init__()
        self.in_proj = Linear(cfg.d_model, 2 * cfg.d_ff)
        self.out_proj = Linear(cfg.d_ff, cfg.d_model)

    def forward(self, x):
        gate, up = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(F.silu(gate) * up)


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the input."""

    def __init__(self, cfg):
        super().__init__()
        self.attn_norm = RMSNorm(cfg.d_model)
        self.attn = MultiHead(cfg)
        self.ff_norm = RMSNorm(cfg.d_model)
        self.ff = FeedForward(cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def add(self, x, y):
        """x (N, T, D) and what attention made of it -> the layer's output."""
        x = x + self.dropout(y)
        return x + self.dropout(self.ff(self.ff_norm(x)))

    def forward(self, x, table, clean, mask):
        """x (B, T + N, D) -> the same: what training calls, compiles and recomputes."""
        return self.add(x, self.attn.streams(self.attn_norm(x), table, clean, mask))

    def read(self, x, table, context):
        """The next clean rows x (B, T, D) -> the layer's output, its k, its v."""
        y, k, v = self.attn.next_rows(self.attn_norm(x), table, context)
        return self.add(x, y), k, v

    def read_block(self, x, table, context):
        """One noisy block with its front row x (B, S + 1, D) -> the layer's output."""
        return self.add(x, self.attn.block(self.attn_norm(x), table, context))


class Transformer(Denoiser):
    """The denoiser; its methods are the protocol at the top of this file."""

    def __init__(self, cfg):
        super().__init__(cfg, [TransformerLayer(cfg) for _ in range(cfg.n_layers)])

    def table(self, positions):
        """The rotary table of these positions."""
        return rotary_table(positions, self.cfg.d_model // self.cfg.n_heads)

    def positions(self, start, length):
        return torch.arange(start, start + length, device=self.head.weight.device)

    # ---- training --------------------------------------------------------------------------------

    def rows_of_step(self, x0, xt, block, first, with_clean):
        T = x0.shape[1]
        read = shifted(x0, self.cfg.mask_id)                                       # (B, T)
        positions = self.positions(0, T)
        if xt is None:
            return read, lambda x: (x, None), self.table(positions), T, None
        rows = NoisyRows(T, block, first, x0.device)
        if not with_clean:
            T = rows.clean
        ids = torch.cat((read[:, :T], noisy_ids(xt, read, rows)), dim=1)           # (B, T + N)
        table = self.table(torch.cat((positions[:T], rows.position)))

        def answers(x):
            clean, noisy = x.split([T, x.shape[1] - T], dim=1)
            return (clean if with_clean else None), noisy[:, rows.answers]
        return ids, answers, table, T, rows.mask(T)

    # ---- decoding --------------------------------------------------------------------------------

    def states(self, xt, cache, depth=None):
        S = xt.shape[1]
        x = self.head.embed(torch.cat((cache.front, xt), dim=1))                   # (B, S + 1, D)
        table = self.table(self.positions(cache.length - 1, S + 1))
        for i, layer in enumerate(self.layers[:depth]):
            x = layer.read_block(x, table, cache.context(i))
        return self.exits(x[:, :-1], depth)

    def new_cache(self, batch, length):
        device = self.head.weight.device
        cache = KVCache(self.cfg, batch, length + 1, device, torch.float32)
        self.step(torch.full((batch, 1), self.cfg.mask_id, device=device), cache)
        return cache

    def step(self, x0, cache):
        S = x0.shape[1]
        x = self.head.embed(x0)                                                    # (B, S, D)
        cache.make_room(S)
        table = self.table(self.positions(cache.length, S))
        for i, layer in enumerate(self.layers):
            x, k, v = layer.read(x, table, cache.context(i))
            cache.write(i, k, v)
        cache.advance(x0)
        return self.exits(x)


def noisy_ids(xt, read, rows):
    """What the noisy rows read: the tokens of xt, and in front of each block the last one before
    it, of `read` (B, T) -> (B, N).
    """
    ids = xt.new_empty(len(xt), len(rows.position))
    ids[:, rows.tokens] = xt
    ids[:, rows.fronts] = read[:, rows.opens]
    return ids


def build_model(cfg):
    """The denoiser that the configuration names."""
    denoiser = {"primary": EcoHybrid, "backup": Transformer}[cfg.model]
    return denoiser(cfg)
