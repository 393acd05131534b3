"""The backup denoiser, a bidirectional transformer, and build_model for both denoisers.

    from model import build_model
    model = build_model(cfg)            # cfg.model: "primary" (EcoHybrid) or "backup"

The denoiser protocol, which sampling/decode.py, masking.py and the tests' fake rely on:
    model.cfg                           ModelConfig
    model.states(xt, cache=None, depth=None)
                                        (B, S) ids of ONE noisy block, given the frozen cache ->
                                        (B, S, D); depth: leave early
    model.block_states(xt, x0, block, first=None, early=None)
                                        (B, T), (B, T) -> (B, T, D): training; noisy block b sees
                                        clean blocks < b and itself; block 0 may be shorter (`first`
                                        tokens), and so may the last; early: also leave there
    model.head.weight, .never           the (V, D) head matrix, and the rows that are never an
                                        answer
    model.logits(states)                (..., D) -> (..., V) float32; the mask's and the pad's logit
                                        is -inf
    model(xt, cache=None)               logits(states(xt, cache))
    model.new_cache(batch, length)      frozen context; .length .nbytes .reset() .select(rows),
                                        maybe .beside_empty()
    model.commit(x0, cache, block=None)
                                        freeze finished clean tokens, as one block of any length or
                                        as several of `block`
Only if cfg.causal (--objective ar), where a state is about the *next* token and the mask's row
means "nothing before":
    model.step(x, cache)                the next tokens (B, S) join the cache -> (B, S, D), in one
                                        pass
No loss, no shift, no knowledge of masking, no time input. Logits with the cache equal logits
recomputed from clean text, in float32 up to its rounding: to 1e-5 of the logits' size.

Legend: B batch, N rows of any kind, T positions, S block, C positions of the frozen context, D
width, H heads, E head size, V vocabulary rows.
"""
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from eco_hybrid import EcoHybrid
from layers import (
    Exits,
    Linear,
    RMSNorm,
    TiedEmbedding,
    initialise,
    last_and_early,
    recomputed,
    rotary_table,
    rotate,
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


def block_masks(length, block, first, device):
    """The block rule as two boolean masks: clean sees clean (T, T); noisy sees [clean, noisy] (T,
    2T).
    """
    number = (torch.arange(length, device=device) + block - first) // block        # (T,) its block
    earlier = number[:, None] > number[None, :]                                    # (T, T)
    own = number[:, None] == number[None, :]
    return earlier | own, torch.cat((earlier, own), dim=1)


class MultiHead(nn.Module):
    """All heads in one projection in and one out; no bias and no norm on q and k, so that
    llama.cpp's graph can run it.
    """

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.n_heads
        self.causal = cfg.causal
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

    def one_block(self, x, table, context=None, mask=None):
        """One block x (B, S, D), bidirectional inside unless causal, after a frozen context;
        returns (output, its k, its v).

        mask (S, C + S): x is several blocks.
        """
        q, k, v = self.project(x, table)
        keys = k
        values = v
        if context is not None:
            old_k, old_v = context
            keys = torch.cat((old_k.to(k.dtype), k), dim=2)                        # (B, H, C+S, E)
            values = torch.cat((old_v.to(k.dtype), v), dim=2)
        y = attend(q, keys, values, mask, self.causal)
        return self.join(y), k, v

    def all_blocks(self, x, table, masks, last=False):
        """x (2B, T, D), noisy rows first: the clean stream block-causally, the noisy stream on
        clean context + own block.

        Nobody reads the clean stream behind the last layer: there only its keys count, and (B, T,
        D) comes back.
        """
        q, k, v = self.project(x, table)
        q_noisy, q_clean = q.chunk(2)                                              # (B, H, T, E)
        k_noisy, k_clean = k.chunk(2)
        v_noisy, v_clean = v.chunk(2)
        clean_mask, noisy_mask = masks

        keys = torch.cat((k_clean, k_noisy), dim=2)                                # (B, H, 2T, E)
        values = torch.cat((v_clean, v_noisy), dim=2)
        noisy = attend(q_noisy, keys, values, noisy_mask)                          # (B, H, T, E)
        if last:
            return self.join(noisy)                                                # (B, T, D)
        clean = attend(q_clean, k_clean, v_clean, clean_mask)                      # (B, H, T, E)
        return self.join(torch.cat((noisy, clean)))                                # (2B, T, D)


class KVCache:
    """The frozen context, preallocated: keys and values (L, B, H, room, E) of L layers. A text that
    is longer than the room slides: the oldest positions leave. `held` counts the positions that are
    there; `length` counts all that was ever committed, which is where rotary positions go on.
    """

    def __init__(self, cfg, batch, room, device, dtype):
        shape = (cfg.n_layers, batch, cfg.n_heads, room, cfg.d_model // cfg.n_heads)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.reset()

    @property
    def nbytes(self):
        return sum(t.numel() * t.element_size() for t in (self.k, self.v))

    def reset(self):
        self.length = 0
        self.held = 0

    def select(self, rows):
        """Keep only these rows of the batch."""
        self.k = self.k[:, rows]
        self.v = self.v[:, rows]

    def context(self, layer):
        """What a layer sees of it: keys and values (B, H, C, E), or None while nothing is held."""
        if not self.held:
            return None
        return self.k[layer, :, :, :self.held], self.v[layer, :, :, :self.held]

    def fits(self, tokens):
        return self.held + tokens <= self.k.shape[3]

    def make_room(self, tokens):
        """Before a commit of so many tokens: if they do not fit, the oldest leave."""
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

    def advance(self, tokens):
        self.length += tokens
        self.held += tokens


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

    def forward(self, x, table, masks=None, last=False):
        """x (B, T, D), or with masks (2B, T, D) -> the same; (B, T, D) behind the last layer.
        Training compiles it.
        """
        h = self.attn_norm(x)
        if masks is None:
            y, _, _ = self.attn.one_block(h, table)
        else:
            y = self.attn.all_blocks(h, table, masks, last)
        return self.add(x[:len(y)], y)

    def read(self, x, table, context=None, mask=None):
        """One block x (B, S, D) behind a frozen context -> the layer's output, its k, its v."""
        y, k, v = self.attn.one_block(self.attn_norm(x), table, context, mask)
        return self.add(x, y), k, v

    def keys_and_values(self, x, table):
        """All that a frozen block needs of the last layer."""
        _, k, v = self.attn.project(self.attn_norm(x), table)
        return k, v


class Transformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.head = TiedEmbedding(cfg.rows, cfg.d_model, (cfg.pad_id, cfg.mask_id))
        self.layers = nn.ModuleList(TransformerLayer(cfg) for _ in range(cfg.n_layers))
        self.exits = Exits(cfg)
        self.recompute = False  # train.py's --activation_checkpointing
        initialise(self, depth=cfg.n_layers)

    def table(self, start, length):
        """The rotary table of the positions start .. start + length - 1."""
        positions = torch.arange(start, start + length, device=self.head.weight.device)
        return rotary_table(positions, self.cfg.d_model // self.cfg.n_heads)

    def states(self, xt, cache=None, depth=None):
        """(B, S) ids, one noisy block, against the frozen cache -> (B, S, D). Without a cache: the
        whole sequence, S = T.
        """
        x = self.head.embed(xt)                                                    # (B, S, D)
        start = 0
        if cache is not None:
            start = cache.length
        table = self.table(start, xt.shape[1])
        for i, layer in enumerate(itertools.islice(self.layers, depth)):
            context = None
            if cache is not None:
                context = cache.context(i)
            x, _, _ = layer.read(x, table, context)
        return self.exits(x, depth)

    def block_states(self, xt, x0, block, first=None, early=None):
        """Training form: xt, x0 (B, T) -> (B, T, D), noisy block b given clean blocks < b. Block 0
        has `first` tokens.

        early: also leave behind that many layers; then the result is (1 + 1, B, T, D): last, early.
        """
        T = xt.shape[1]
        first = min(first or block, block)
        table = self.table(0, T)
        if first >= T:  # one block is all there is: nobody needs the clean stream
            masks = None
            ids = xt
        else:
            masks = block_masks(T, block, first, xt.device)
            ids = torch.cat((xt, x0))                                              # (2B, T)

        x = self.head.embed(ids)                                                   # (B or 2B, T, D)
        found = []
        for i, layer in enumerate(self.layers, 1):
            x = recomputed(self.recompute, layer, x, table, masks, i == len(self.layers))
            if i in (early, len(self.layers)):
                noisy = x[:len(xt)]                                                # (B, T, D)
                found.append(self.exits(noisy, i))
        return last_and_early(found, early)

    def logits(self, states):
        return self.head.logits(states)

    def forward(self, xt, cache=None):
        return self.logits(self.states(xt, cache))

    def new_cache(self, batch, length):
        return KVCache(self.cfg, batch, length, self.head.weight.device, torch.float32)

    def commit(self, x0, cache, block=None):
        """Freeze finished clean tokens (B, S), one block or several of `block`: their keys and
        values join the context.
        """
        S = x0.shape[1]
        several = block and block < S
        if several and not cache.fits(S):  # then each block sees another window
            for part in x0.split(block, dim=1):                                    # (B, block)
                self.commit(part, cache)
            return
        cache.make_room(S)
        mask = None
        if several:
            clean, _ = block_masks(S, block, block, x0.device)                     # (S, S)
            context = clean.new_ones(S, cache.held)                                # (S, C)
            mask = torch.cat((context, clean), dim=1)                              # (S, C + S)

        x = self.head.embed(x0)                                                    # (B, S, D)
        table = self.table(cache.length, S)
        for i, layer in enumerate(self.layers):
            if i + 1 == len(self.layers):  # nobody reads x behind the last layer
                k, v = layer.keys_and_values(x, table)
            else:
                x, k, v = layer.read(x, table, cache.context(i), mask)
            cache.write(i, k, v)
        cache.advance(S)

    def step(self, x0, cache):
        """Causal: read the next tokens (B, S), keep their keys and values -> (B, S, D), each about
        its successor.
        """
        S = x0.shape[1]
        x = self.head.embed(x0)                                                    # (B, S, D)
        cache.make_room(S)
        table = self.table(cache.length, S)
        for i, layer in enumerate(self.layers):
            x, k, v = layer.read(x, table, cache.context(i))
            cache.write(i, k, v)
        cache.advance(S)
        return self.exits(x)


def build_model(cfg):
    """The denoiser that the configuration names."""
    denoiser = {"primary": EcoHybrid, "backup": Transformer}[cfg.model]
    return denoiser(cfg)
