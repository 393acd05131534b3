"""EcoHybrid, the primary denoiser: local convolution + memory slots, O(T*M) in time, constant memory in the context.

    from model import build_model; build_model(cfg)        # cfg.model == "primary"

One layer reads its input through a norm and a short depthwise convolution, then does two things in parallel:
a gated feed-forward, and a slim memory. The memory's M slots per head hold running sums over tokens,
    N = sum_j w_j v_j      D = sum_j w_j      w_j = exp(bounded score of token j for this slot),
and a token reads the slot values N/D by attention. Sums are what make the block rule cheap: the context of block b is a
(decayed) prefix sum over blocks, computed for all blocks at once in training and kept as one small state in decoding.

The block rule (DESIGN section 1): noisy block b sees prefix(<b) of the *clean* stream plus its own tokens; clean block b sees
prefix(<=b). The convolution's left neighbours come from the previous clean block (the halo), its right ones end with the block.
So a frozen context is exactly (N, D, halo) per layer: a theorem, tested to 1e-5, and its size never grows.
Legend: B batch, T positions, S block, n blocks, D width, H heads, E memory head size, M slots, F feed-forward width.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

from layers import Exits, Linear, LocalConv, RMSNorm, TiedHead, initialise, unit_rms

SCORE_CAP = 8.0  # |score| of a write: exp(8) = 3,000 to 1 is as selective as a write may be, and never overflows a sum


class EcoCache:
    """The frozen context: per layer N (B,H,M,E), D (B,H,M,1) and the halo (B,r,D). Constant in the context's length."""

    def __init__(self, cfg, batch, device, dtype):
        E = cfg.d_mem // cfg.n_heads
        self.num = torch.zeros(cfg.n_layers, batch, cfg.n_heads, cfg.memory_slots, E, device=device, dtype=dtype)
        self.den = torch.zeros(cfg.n_layers, batch, cfg.n_heads, cfg.memory_slots, 1, device=device, dtype=dtype)
        self.halo = torch.zeros(cfg.n_layers, batch, cfg.conv_kernel // 2, cfg.d_model, device=device, dtype=dtype)
        self.length = 0

    @property
    def nbytes(self):
        return sum(t.numel() * t.element_size() for t in (self.num, self.den, self.halo))

    def select(self, rows):
        """Keep only these rows of the batch."""
        self.num, self.den, self.halo = (t[:, rows] for t in (self.num, self.den, self.halo))

    def beside_empty(self):
        """A cache of 2B rows, the second half of which has no context: both sides of guidance in one batch."""
        both = copy.copy(self)
        both.num, both.den, both.halo = (torch.cat((t, torch.zeros_like(t)), dim=1) for t in (self.num, self.den, self.halo))
        return both

    def reset(self):
        self.length = 0
        for t in (self.num, self.den, self.halo):
            t.zero_()


class EcoLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D, self.ff, self.dm, self.H, self.M = cfg.d_model, cfg.d_ff, cfg.d_mem, cfg.n_heads, cfg.memory_slots
        self.norm = RMSNorm(D)
        self.conv = LocalConv(D, cfg.conv_kernel)
        # one matrix in, one out: two big products keep a CPU (or a GPU) busier than seven small ones
        writes = self.dm + self.H * self.M
        self.in_proj = Linear(D, 2 * self.ff + self.dm + writes, tails=(writes,))
        self.out_proj = Linear(self.ff + self.dm, D)
        self.slot_key = nn.Parameter(torch.randn(self.H, self.M, self.dm // self.H) * 0.5)       # a slot's own name
        # e-folding length of a slot in tokens, log-spaced: some slots remember the sentence, others the document
        self.decay = nn.Parameter(torch.linspace(2.5, 8.0, self.M).repeat(self.H, 1))            # (H, M), log tokens
        self.dropout = nn.Dropout(cfg.dropout)

    def write(self, v, s, valid=None):
        """The sums of one block: v (..., S, H*E), s (..., S, H*M) -> N (..., H, M, E), D (..., H, M, 1), float32."""
        w = torch.exp(SCORE_CAP * torch.tanh(s.float() / SCORE_CAP))               # (..., S, H*M)
        if valid is not None:
            w = w * valid
        den = w.sum(-2).unflatten(-1, (self.H, self.M)).unsqueeze(-1)              # (..., H, M, 1)
        w = w.to(v.dtype).unflatten(-1, (self.H, self.M)).movedim(-3, -1)          # (..., H, M, S)
        v = v.unflatten(-1, (self.H, -1)).movedim(-3, -2)                          # (..., H, S, E)
        return torch.matmul(w, v).float(), den

    def read(self, q, num, den):
        """q (..., S, H*E) attends over the M slot values N/D -> (..., S, H*E)."""
        value = unit_rms(num / den).to(q.dtype)                                    # (..., H, M, E)
        key = value + self.slot_key.to(q.dtype)
        q = q.unflatten(-1, (self.H, -1)).movedim(-3, -2)                          # (..., H, S, E)
        score = torch.matmul(q, key.mT) * q.shape[-1] ** -0.5                      # (..., H, S, M)
        out = torch.matmul(score.softmax(-1).to(q.dtype), value)                   # (..., H, S, E)
        return out.movedim(-3, -2).flatten(-2)                                     # (..., S, H*E)

    def keep(self, tokens):
        """What a slot still holds after so many further tokens: exp(-tokens / length) -> (H, M, 1)."""
        return torch.exp(-tokens * torch.exp(-self.decay.float())).unsqueeze(-1)

    def prefix(self, own, block):
        """Sums over earlier blocks: own (B, n, H, M, X) -> same shape, block b holds the decayed total of blocks < b."""
        n = own.shape[1]
        age = torch.arange(n, device=own.device)
        age = (age[:, None] - age[None, :] - 1) * block                            # (n, n) tokens between end of c and start of b
        keep = torch.exp(-age.clamp(min=0) * torch.exp(-self.decay.float())[..., None, None])    # (H, M, n, n)
        keep = keep * (age >= 0)
        return torch.einsum("hmbc,zchmx->zbhmx", keep, own)

    def split(self, h):
        return self.in_proj(h).split([self.ff, self.ff, self.dm, self.dm, self.H * self.M], dim=-1)

    def split_write(self, h):
        """Only what a token writes: v and s."""
        return self.in_proj.tail(h, self.dm + self.H * self.M).split([self.dm, self.H * self.M], dim=-1)

    def mix(self, x, gate, up, memory):
        return x + self.dropout(self.out_proj(torch.cat((F.silu(gate) * up, memory.to(up.dtype)), dim=-1)))

    def one_block(self, x, num=None, den=None, halo=None):
        """One block x (B, S, D) against a frozen state; returns (x, own N, own D, its last hidden states)."""
        h = self.norm(x)
        gate, up, q, v, s = self.split(self.conv(h, halo))
        own_n, own_d = self.write(v, s)
        total = (own_n, own_d) if num is None else (own_n + num, own_d + den)
        return self.mix(x, gate, up, self.read(q, *total)), own_n, own_d, h

    def all_blocks(self, x, valid, last=False):
        """x (2, B, n, S, D): noisy and clean stream at once, each block seeing exactly what the block rule allows.

        Nobody reads the clean stream behind the last layer: there it only writes, and (1, B, n, S, D) comes back.
        """
        _, B, n, S, D = x.shape
        r = self.conv.reach
        h = self.norm(x)
        if valid is not None:
            h = h * valid
        # the last r clean hidden states before each block; a block shorter than r reaches into the ones before it
        clean = F.pad(h[1].flatten(1, 2), (0, 0, r, 0))                            # (B, r + n*S, D)
        halo = clean.unfold(1, r, S)[:, :n].transpose(2, 3)                        # (B, n, r, D)
        h = self.conv(h.flatten(0, 2), halo.expand(2, B, n, r, D).flatten(0, 2))   # (2*B*n, S, D)
        h = h.view(2, B, n, S, D)                                                  # (2, B, n, S, D)
        if last:
            x, h, clean_h = x[:1], h[:1], h[1]
            clean_v, clean_s = self.split_write(clean_h)
        gate, up, q, v, s = self.split(h)
        own = torch.cat(self.write(v, s, valid), dim=-1)                           # (2, B, n, H, M, E + 1), numerators and D
        context = torch.cat(self.write(clean_v, clean_s, valid), dim=-1) if last else own[1]
        total = own + self.prefix(context, S)                                      # the context is the clean stream's, twice
        return self.mix(x, gate, up, self.read(q, total[..., :-1], total[..., -1:]))


class EcoHybrid(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.head = TiedHead(cfg.rows, cfg.d_model, (cfg.pad_id, cfg.mask_id))
        self.layers = nn.ModuleList(EcoLayer(cfg) for _ in range(cfg.n_layers))
        self.exits = Exits(cfg)
        initialise(self, depth=cfg.n_layers)

    def hidden(self, xt, cache=None, depth=None):
        """(B, S) ids, one noisy block, against the frozen cache -> (B, S, D). Without a cache: the whole sequence, B = T."""
        x = self.head(xt)                                                         # (B, S, D)
        for i, layer in zip(range(depth or len(self.layers)), self.layers, strict=False):
            state = () if cache is None or not cache.length else (cache.num[i], cache.den[i], cache.halo[i])
            x = layer.one_block(x, *state)[0]
        return self.exits(x, depth)

    def hidden_blocks(self, xt, x0, block, first=None, early=None):
        """Training form: xt, x0 (B, T) -> (B, T, D), noisy block b given clean blocks < b. Block 0 has `first` tokens.

        early: also leave behind that many layers; then the result is (1 + 1, B, T, D): last, early.
        """
        T, out = xt.shape[1], []
        if block >= T:
            x = self.head(xt)                                                     # (B, T, D)
            for i, layer in enumerate(self.layers, 1):
                x = layer.one_block(x)[0]
                if i in (early, len(self.layers)):
                    out.append(self.exits(x, i))
            return out[0] if early is None else torch.stack(out[::-1])
        before = block - (first or block)                                          # padding that completes block 0 ...
        after = -(before + T) % block                                              # ... and the last block
        ids = F.pad(torch.stack((xt, x0)), (before, after), value=self.cfg.pad_id)              # (2, B, n*S)
        valid = None
        if before or after:  # padding writes nothing, and to a convolution it is zero
            at = torch.arange(ids.shape[2], device=xt.device) - before
            valid = ((at >= 0) & (at < T)).float().view(1, -1, block, 1)           # (1, n, S, 1)
        x = self.head(ids.unflatten(2, (-1, block)))                               # (2, B, n, S, D)
        for i, layer in enumerate(self.layers, 1):
            x = layer.all_blocks(x, valid, last=i == len(self.layers))
            if i in (early, len(self.layers)):
                out.append(self.exits(x[0].flatten(1, 2)[:, before:before + T], i))             # (B, T, D)
        return out[0] if early is None else torch.stack(out[::-1])

    def logits(self, h):
        return self.head.logits(h)

    def forward(self, xt, cache=None):
        return self.logits(self.hidden(xt, cache))

    def new_cache(self, batch, length=0):
        return EcoCache(self.cfg, batch, self.head.weight.device, torch.float32)

    def commit(self, x0, cache):
        """Freeze one finished clean block (B, S): one pass through all layers, then the block is a few sums."""
        x = self.head(x0)
        for i, layer in enumerate(self.layers):
            state = (cache.num[i], cache.den[i], cache.halo[i]) if cache.length else ()
            if i + 1 < len(self.layers):
                x, own_n, own_d, h = layer.one_block(x, *state)
            else:                                                                  # nobody reads x behind the last layer
                h = layer.norm(x)
                own_n, own_d = layer.write(*layer.split_write(layer.conv(h, *state[2:])))
            keep = layer.keep(x0.shape[1])
            cache.num[i] = cache.num[i] * keep + own_n
            cache.den[i] = cache.den[i] * keep + own_d
            cache.halo[i] = torch.cat((cache.halo[i], h.to(cache.halo.dtype)), dim=1)[:, -layer.conv.reach:]
        cache.length += x0.shape[1]

    def commit_and_hidden(self, x0, xt, cache):
        """commit(x0) and hidden(xt) of the block behind it in one pass: both (B, S) ids; the weights are read once."""
        B, S = x0.shape
        x = self.head(torch.cat((x0, xt)))                                        # (2B, S, D), clean rows first
        for i, layer in enumerate(self.layers):
            h = layer.norm(x)
            halo = torch.cat((cache.halo[i], h[:B].to(cache.halo.dtype)), dim=1)[:, -layer.conv.reach:]
            gate, up, q, v, s = layer.split(layer.conv(h, torch.cat((cache.halo[i], halo))))
            own_n, own_d = layer.write(v, s)
            keep = layer.keep(S)
            num, den = cache.num[i] * keep + own_n[:B], cache.den[i] * keep + own_d[:B]
            total = torch.cat((cache.num[i] + own_n[:B], num + own_n[B:])), torch.cat((cache.den[i] + own_d[:B], den + own_d[B:]))
            x = layer.mix(x, gate, up, layer.read(q, *total))
            cache.num[i], cache.den[i], cache.halo[i] = num, den, halo
        cache.length += S
        return self.exits(x[B:])
