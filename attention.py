"""Self-attention of the backup denoiser: multi-head attention with rotary positions, its block rule, and its exact cache.

Used by model.py. One place calls the kernel (attend); each new attention variant is one short class beside MultiHead.
Legend: B batch, T positions, S block, D width, H heads, E head size, C cached positions.
"""
import torch
import torch.nn.functional as F
from torch import nn

from layers import Linear, rotate


def attend(q, k, v, mask=None, causal=False):
    """The one call of the attention kernel: q (B,H,Tq,E), k, v (B,H,Tk,E), mask (Tq,Tk) bool or None -> (B,H,Tq,E).

    causal: a query sees the keys up to its own, which are the last Tq ones.
    """
    new, old = q.shape[2], k.shape[2] - q.shape[2]
    if causal and old and new > 1:
        mask = torch.ones(new, old + new, dtype=torch.bool, device=q.device).tril(old)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and not old, scale=q.shape[-1] ** -0.5)


def block_masks(length, block, first, device):
    """The block rule as two boolean masks: clean sees clean (T, T); noisy sees [clean, noisy] (T, 2T)."""
    b = (torch.arange(length, device=device) + block - first) // block
    earlier, own = b[:, None] > b[None, :], b[:, None] == b[None, :]
    return earlier | own, torch.cat((earlier, own), dim=1)


class KVCache:
    """The frozen context, preallocated: keys and values (L, B, H, room, E). A text that is longer than the room slides: the
    oldest positions leave. `length` counts all that was ever committed, which is where rotary positions go on.
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
        self.length = self.held = 0

    def select(self, rows):
        """Keep only these rows of the batch."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]

    def context(self, layer):
        return self.k[layer, :, :, :self.held], self.v[layer, :, :, :self.held]                # (B, H, C, E) each

    def fits(self, tokens):
        return self.held + tokens <= self.k.shape[3]

    def make_room(self, tokens):
        """Before a commit of so many tokens: if they do not fit, the oldest leave."""
        room = self.k.shape[3]
        if tokens > room:
            raise ValueError(f"the cache holds {room} positions, {tokens} come at once")
        if (gone := self.held + tokens - room) > 0:
            self.held -= gone
            for t in (self.k, self.v):
                t[:, :, :, :self.held] = t[:, :, :, gone:gone + self.held].clone()

    def write(self, layer, k, v):
        end = self.held + k.shape[2]
        self.k[layer, :, :, self.held:end] = k
        self.v[layer, :, :, self.held:end] = v

    def advance(self, tokens):
        self.length, self.held = self.length + tokens, self.held + tokens


class MultiHead(nn.Module):
    """All heads in one projection in and one out; no bias and no norm on q and k, so that llama.cpp's graph can run it."""

    def __init__(self, cfg):
        super().__init__()
        self.heads, self.causal = cfg.n_heads, cfg.causal
        self.qkv_proj = Linear(cfg.d_model, 3 * cfg.d_model)
        self.out_proj = Linear(cfg.d_model, cfg.d_model)

    def project(self, x, table):
        """x (N, T, D) -> q, k, v (N, H, T, E), q and k rotated."""
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1))                   # (N, T, 3, H, E)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)                             # (N, H, T, E) each
        return rotate(q, table), rotate(k, table), v

    def join(self, y):
        return self.out_proj(y.transpose(1, 2).flatten(2))                         # (N, H, T, E) -> (N, T, D)

    def one_block(self, x, table, context=None, mask=None):
        """One block x (B, S, D), bidirectional inside unless causal, after a frozen context; returns (output, its k, its v).

        mask (S, C + S): x is several blocks.
        """
        q, k, v = self.project(x, table)
        if context is None:
            return self.join(attend(q, k, v, mask, self.causal)), k, v
        keys, values = (torch.cat((c.to(k.dtype), own), dim=2) for c, own in zip(context, (k, v), strict=True))
        return self.join(attend(q, keys, values, mask, self.causal)), k, v                              # keys (B, H, C+S, E)

    def all_blocks(self, x, table, masks, last=False):
        """x (2B, T, D), noisy rows first: the clean stream block-causally, the noisy stream on clean context + own block.

        Nobody reads the clean stream behind the last layer: there only its keys count, and (B, T, D) comes back.
        """
        q, k, v = self.project(x, table)
        (q_noisy, q_clean), (k_noisy, k_clean), (v_noisy, v_clean) = (z.chunk(2) for z in (q, k, v))
        clean_mask, noisy_mask = masks
        noisy = attend(q_noisy, torch.cat((k_clean, k_noisy), dim=2), torch.cat((v_clean, v_noisy), dim=2), noisy_mask)
        if last:
            return self.join(noisy)                                                # (B, T, D)
        clean = attend(q_clean, k_clean, v_clean, clean_mask)                      # (B, H, T, E)
        return self.join(torch.cat((noisy, clean)))                                # (2B, T, D)
