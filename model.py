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
    model.try_step(x0, cache), cache.keep(n)
                                        the states of step for a few tokens that may be wrong: the
                                        context stays as it is until keep lets the first n join
    model.step_and_states(x0, xt, cache)
                                        maybe: both in one pass -> the block's states
    model(xt, cache=None)               logits(states(xt, cache)); without a cache xt is all there
                                        is
    model.rows_of_vectors(vectors)      for gaussian_model.py: one whole noisy block that reads
                                        vectors (B, T, D) where it reads tokens otherwise, as in
                                        layers.Denoiser; an answer is about its own place
No loss, no knowledge of masking, no time input. Logits with the cache equal logits recomputed from
clean text, in float32 up to its rounding: to 1e-5 of the logits' size.

Legend: B batch, N rows of any kind, T clean rows, S block, n blocks, D width, V vocabulary rows.
"""
import torch
import torch.nn.functional as F
from torch import nn

from attention import CACHES, attention_of, for_all_layers
from eco_hybrid import EcoHybrid
from layers import Denoiser, Linear, RMSNorm, openings, rotary_table, shifted
from model_config import attention_heads


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

    def mask(self, clean, null_key=False):
        """What noisy rows see of [the null key, so many clean rows, noisy rows] (N, 1 + T + N);
        None: one block behind one clean row, which sees all but its own front row.
        """
        if len(self.opens) == clean == 1:
            return None
        block = torch.zeros_like(self.position)
        block[self.fronts] = 1
        block = block.cumsum(0) - 1                                                # (N,)
        row = torch.arange(-1 if null_key else 0, clean, device=block.device)
        before = row <= self.opens[block].unsqueeze(1)                             # (N, 1 + T)
        own = block.unsqueeze(1) == block                                          # (N, N)
        own[:, self.fronts] = False
        return torch.cat((before, own), dim=1)


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
        self.attn = attention_of(cfg)
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
    layer_type = TransformerLayer

    def __init__(self, cfg):
        super().__init__(cfg)
        self.cache_type = CACHES["fp32"]  # whoever decodes may choose another one

    def table(self, positions):
        """The rotary table of these positions, in float32 whatever the parameters are."""
        return rotary_table(positions, attention_heads(self.cfg).turned)

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
        mask = rows.mask(T, self.cfg.null_attn)
        if mask is not None:
            mask = for_all_layers(mask, self.head.weight)
        return ids, answers, table, T, mask

    def rows_of_vectors(self, vectors):
        T = vectors.shape[1]
        rows = NoisyRows(T, T, T, vectors.device)
        x = torch.cat((self.starts(vectors, 2), vectors), dim=1)                   # (B, 1 + N, D)
        positions = torch.cat((self.positions(0, 1), rows.position))
        return x, lambda x: x[:, 2:], self.table(positions), 1, None

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
        cache = self.cache_type(self.cfg, batch, length + 1, device)
        self.step(torch.full((batch, 1), self.cfg.mask_id, device=device), cache)
        return cache

    def step(self, x0, cache):
        cache.make_room(x0.shape[1])
        states = self.read_behind(x0, cache)
        cache.advance(x0)
        return states

    def try_step(self, x0, cache):
        if cache.held + x0.shape[1] > cache.k.shape[3]:
            raise ValueError("the oldest positions would leave the cache, and cannot come back")
        cache.tried = x0
        return self.read_behind(x0, cache)

    def read_behind(self, x0, cache):
        """The next tokens (B, S), whose keys and values are written behind what is held -> (B, S,
        D).
        """
        S = x0.shape[1]
        x = self.head.embed(x0)                                                    # (B, S, D)
        table = self.table(self.positions(cache.length, S))
        for i, layer in enumerate(self.layers):
            x, k, v = layer.read(x, table, cache.context(i))
            cache.write(i, k, v)
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
