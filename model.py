"""The backup denoiser, a bidirectional transformer, and build_model for both denoisers.

    from model import build_model; model = build_model(cfg)          # cfg.model: "primary" (EcoHybrid) or "backup"

The denoiser protocol, which decode.py, masking.py and the tests' fake rely on:
    model.cfg                            ModelConfig
    model.hidden(xt, cache=None, depth=None)
                                         (B, S) ids of ONE noisy block, given the frozen cache -> (B, S, D); depth: leave early
    model.hidden_blocks(xt, x0, block, first=None, early=None)
                                         (B, T), (B, T) -> (B, T, D): training; noisy block b sees clean blocks < b and itself;
                                         block 0 may be shorter (`first` tokens), and so may the last; early: also leave there
    model.head.weight, .never            the (V, D) head matrix, and the rows that are never an answer
    model.logits(h)                      (..., D) -> (..., V) float32; the mask's and the pad's logit is -inf
    model(xt, cache=None)                logits(hidden(xt, cache))
    model.new_cache(batch, length)       frozen context; .length .nbytes .reset() .select(rows), maybe .beside_empty()
    model.commit(x0, cache, block=None)  freeze finished clean tokens, as one block of any length or as several of `block`
Only if cfg.causal (--objective ar), where a hidden state is about the *next* token and the mask's row means "nothing before":
    model.step(x, cache)                 the next tokens (B, S) join the cache -> (B, S, D), in one pass
No loss, no shift, no knowledge of masking, no time input. Logits with the cache equal logits recomputed from clean text,
in float32 up to its rounding: to 1e-5 of the logits' size.
Legend: B batch, T positions, S block, D width, V vocabulary rows.
"""
import torch
import torch.nn.functional as F
from torch import nn

from attention import KVCache, MultiHead, block_masks
from eco_hybrid import EcoHybrid
from layers import Exits, Linear, RMSNorm, TiedHead, initialise, recomputed, rotary_table


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
    def __init__(self, cfg):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(cfg.d_model), MultiHead(cfg)
        self.ff_norm, self.ff = RMSNorm(cfg.d_model), FeedForward(cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def add_ff(self, x):
        return x + self.dropout(self.ff(self.ff_norm(x)))

    def train_step(self, x, table, masks=None, last=False):
        """x (B, T, D), or with masks (2B, T, D) -> the same; (B, T, D) behind the last layer. Training compiles it."""
        h = self.attn_norm(x)
        y = self.attn.one_block(h, table)[0] if masks is None else self.attn.all_blocks(h, table, masks, last)
        return self.add_ff(x[:len(y)] + self.dropout(y))


class Transformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.head = TiedHead(cfg.rows, cfg.d_model, (cfg.pad_id, cfg.mask_id))
        self.layers = nn.ModuleList(TransformerLayer(cfg) for _ in range(cfg.n_layers))
        self.exits = Exits(cfg)
        self.recompute = False                                                     # train.py's --activation_checkpointing
        initialise(self, depth=cfg.n_layers)

    def table(self, start, length):
        positions = torch.arange(start, start + length, device=self.head.weight.device)
        return rotary_table(positions, self.cfg.d_model // self.cfg.n_heads)

    def hidden(self, xt, cache=None, depth=None):
        """(B, S) ids, one noisy block, against the frozen cache -> (B, S, D). Without a cache: the whole sequence, B = T."""
        x = self.head(xt)                                                         # (B, S, D)
        table = self.table(cache.length if cache is not None else 0, xt.shape[1])
        for i, layer in zip(range(depth or len(self.layers)), self.layers, strict=False):
            context = cache.context(i) if cache is not None and cache.length else None
            x = layer.add_ff(x + layer.dropout(layer.attn.one_block(layer.attn_norm(x), table, context)[0]))
        return self.exits(x, depth)

    def hidden_blocks(self, xt, x0, block, first=None, early=None):
        """Training form: xt, x0 (B, T) -> (B, T, D), noisy block b given clean blocks < b. Block 0 has `first` tokens.

        early: also leave behind that many layers; then the result is (1 + 1, B, T, D): last, early.
        """
        T, out = xt.shape[1], []
        first = min(first or block, block)
        whole = first >= T                                                         # one block is all there is
        masks = None if whole else block_masks(T, block, first, xt.device)
        table = self.table(0, T)
        x = self.head(xt if whole else torch.cat((xt, x0)))                       # (B, T, D), or (2B, T, D), noisy rows first
        for i, layer in enumerate(self.layers, 1):
            x = recomputed(self.recompute, layer.train_step, x, table, masks, i == len(self.layers))
            if i in (early, len(self.layers)):
                out.append(self.exits(x[:len(xt)], i))                             # (B, T, D)
        return out[0] if early is None else torch.stack(out[::-1])

    def logits(self, h):
        return self.head.logits(h)

    def forward(self, xt, cache=None):
        return self.logits(self.hidden(xt, cache))

    def new_cache(self, batch, length):
        return KVCache(self.cfg, batch, length, self.head.weight.device, torch.float32)

    def commit(self, x0, cache, block=None):
        """Freeze finished clean tokens (B, S), one block or several of `block`: their keys and values join the context."""
        S, mask = x0.shape[1], None
        if block and block < S and not cache.fits(S):                              # then each block sees another window
            for part in x0.split(block, dim=1):                                    # (B, block)
                self.commit(part, cache)
            return
        cache.make_room(S)
        if block and block < S:
            clean = block_masks(S, block, block, x0.device)[0]                     # (S, S)
            mask = torch.cat((clean.new_ones(S, cache.held), clean), dim=1)        # (S, C + S)
        x = self.head(x0)                                                         # (B, S, D)
        table = self.table(cache.length, S)
        for i, layer in enumerate(self.layers):
            context = cache.context(i) if cache.held else None
            if i + 1 == len(self.layers):                                          # nobody reads x behind the last layer
                _, k, v = layer.attn.project(layer.attn_norm(x), table)
            else:
                y, k, v = layer.attn.one_block(layer.attn_norm(x), table, context, mask)
                x = layer.add_ff(x + layer.dropout(y))
            cache.write(i, k, v)
        cache.advance(S)

    def step(self, x0, cache):
        """Causal: read the next tokens (B, S), keep their keys and values -> (B, S, D), each about its successor."""
        x = self.head(x0)                                                         # (B, S, D)
        cache.make_room(x0.shape[1])
        table = self.table(cache.length, x0.shape[1])
        for i, layer in enumerate(self.layers):
            y, k, v = layer.attn.one_block(layer.attn_norm(x), table, cache.context(i) if cache.held else None)
            cache.write(i, k, v)
            x = layer.add_ff(x + layer.dropout(y))
        cache.advance(x0.shape[1])
        return self.exits(x)


def build_model(cfg):
    """The denoiser that the configuration names."""
    return {"primary": EcoHybrid, "backup": Transformer}[cfg.model](cfg)
