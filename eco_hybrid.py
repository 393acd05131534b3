"""EcoHybrid, the primary denoiser: local convolution + memory slots, O(T*M) in time, constant
memory in the context.

    from model import build_model; build_model(cfg)        # cfg.model == "primary"

One layer reads its input through a norm and a short depthwise convolution, then does two things in
parallel: a gated feed-forward, and a slim memory. The memory's M slots per head hold running sums
over tokens,
    N = sum_j w_j v_j      w_j = exp(bounded score of token j for this slot),
and a token reads the slot values N / rms(N) by attention: a weighted mean's direction, whatever the
sum of the weights. Sums are what make the block rule cheap: the context of block b is a (decayed)
prefix sum over blocks, computed for all blocks at once in training and kept as one small state in
decoding.

The block rule (DESIGN section 1): noisy block b sees prefix(<b) of the *clean* stream plus its own
tokens; clean block b sees prefix(<=b). The convolution's left neighbours come from the previous
clean block (the halo), its right ones end with the block. So a frozen context is exactly (N, halo)
per layer: a theorem, tested in float32 to 1e-5 of the logits' size. The context takes the same
memory whatever its length. Legend: B batch, T positions, S block, n blocks, D width, H heads, E
memory head size, M slots, F feed-forward width.
"""
import copy
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from layers import (
    Exits,
    Linear,
    LocalConv,
    RMSNorm,
    TiedEmbedding,
    initialise,
    recomputed,
    unit_rms,
)

FEW_BLOCKS = 16  # up to so many, one product adds up all pairs of blocks
SCORE_CAP = 8.0  # |score| of a write: exp(8) = 3,000 to 1 is as selective as a write may be
# added to all scores: N / rms(N) does not notice, and a float16 sum over thousands of tokens stays
# finite
SHARED = -6.0


class EcoCache:
    """The frozen context: per layer N (B,H,M,E) and the halo (B,r,D). Constant in the context's
    length.
    """

    def __init__(self, cfg, batch, device, dtype):
        E = cfg.d_mem // cfg.n_heads
        self.num = torch.zeros(
            cfg.n_layers, batch, cfg.n_heads, cfg.memory_slots, E, device=device, dtype=dtype
        )
        self.halo = torch.zeros(
            cfg.n_layers, batch, cfg.conv_kernel // 2, cfg.d_model, device=device, dtype=dtype
        )
        self.length = 0

    @property
    def nbytes(self):
        return sum(t.numel() * t.element_size() for t in (self.num, self.halo))

    def select(self, rows):
        """Keep only these rows of the batch."""
        self.num, self.halo = (t[:, rows] for t in (self.num, self.halo))

    def beside_empty(self):
        """A cache of 2B rows, the second half of which has no context: both sides of guidance in
        one batch.
        """
        both = copy.copy(self)
        both.num, both.halo = (
            torch.cat((t, torch.zeros_like(t)), dim=1) for t in (self.num, self.halo)
        )
        return both

    def reset(self):
        self.length = 0
        for t in (self.num, self.halo):
            t.zero_()


def weights(s):
    """Scores of a write -> weights, float32: exp(C tanh(s / C)), by the sigmoid, a third of tanh's
    time on a CPU.
    """
    return torch.exp(
        2 * SCORE_CAP * torch.sigmoid(s.float() * (2 / SCORE_CAP)) - SCORE_CAP + SHARED
    )


class SquaredNorm(torch.autograd.Function):
    """|x|^2 over the last dimension, float32. The backward that torch derives moves twice as much.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square()

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        return (x.float() * (2 * grad).unsqueeze(-1)).to(x.dtype)


class EcoLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D, self.ff, self.dm, self.H, self.M = (
            cfg.d_model,
            cfg.d_ff,
            cfg.d_mem,
            cfg.n_heads,
            cfg.memory_slots,
        )
        self.norm = RMSNorm(D)
        self.conv = LocalConv(D, cfg.conv_kernel)
        # one matrix in, one out: two big products keep a CPU (or a GPU) busier than seven small
        # ones
        writes = self.dm + self.H * self.M
        self.in_proj = Linear(D, 2 * self.ff + self.dm + writes, tails=(writes,))
        self.out_proj = Linear(self.ff + self.dm, D)
        # a slot's own name
        self.slot_key = nn.Parameter(torch.randn(self.H, self.M, self.dm // self.H) * 0.5)
        # e-folding length of a slot in tokens, log-spaced: some slots remember the sentence, others
        # the document
        # (H, M), log tokens
        self.decay = nn.Parameter(torch.linspace(2.5, 8.0, self.M).repeat(self.H, 1))
        self.dropout = nn.Dropout(cfg.dropout)

    def write(self, v, s, valid=None):
        """The sums of one block: v (..., S, H*E), s (..., S, H*M) -> N (..., H, M, E), float32."""
        w = weights(s)                                                             # (..., S, H*M)
        if valid is not None:
            w = w * valid
        w = w.to(v.dtype).unflatten(-1, (self.H, self.M)).movedim(-3, -1)          # (..., H, M, S)
        v = v.unflatten(-1, (self.H, -1)).transpose(-3, -2)                        # (..., H, S, E)
        return torch.matmul(w, v).float()

    def read(self, q, num):
        """q (..., S, H*E) attends over the M slot values N / rms(N) -> (..., S, H*E).

        The quotient is never made: with small blocks N is as large as all activations of a layer.
        """
        if q.dtype is torch.float16:  # whose range N leaves; bf16 has float32's
            num = unit_rms(num)
        q = q.unflatten(-1, (self.H, -1)).transpose(-3, -2)                        # (..., H, S, E)
        E, num = q.shape[-1], num.to(q.dtype)                                      # (..., H, M, E)
        norm = torch.linalg.vector_norm(num, dim=-1, dtype=torch.float32)          # (..., H, M)
        scale = (E ** 0.5 / norm.clamp(min=1e-10)).unsqueeze(-2)  # 1 / rms(N), (..., H, 1, M)
        score = torch.matmul(q, num.mT) * scale + torch.matmul(q, self.slot_key.to(q.dtype).mT)
        share = (score * E ** -0.5).softmax(-1) * scale                            # (..., H, S, M)
        return torch.matmul(share.to(q.dtype), num).transpose(-3, -2).flatten(-2)  # (..., S, H*E)

    def read_tokens(self, q, v, s, v_clean, s_clean):
        """read(q, own + prefix) for blocks of one token: q, v, s (K, B, n, 1, .), the clean
        stream's v, s (B, n, 1, .).

        N = P + w v is never made, P being the prefix: q.N, |N|^2 and the answer need products with
        P, which all K streams share, and numbers. As M*E numbers for each token and stream, N would
        be moved about a dozen times.
        """
        K, n = q.shape[0], q.shape[2]
        c = min(n, FEW_BLOCKS)

        def grouped(t):  # (..., B, n, 1, H*X) -> (..., B, g, H, c, X)
            t = F.pad(t.squeeze(-2), (0, 0, 0, -n % c))  # (..., B, g*c, H*X)
            return t.unflatten(-1, (self.H, -1)).unflatten(-3, (-1, c)).transpose(-3, -2)
        # (B, g, H, c, M, E)
        past = self.token_prefix(weights(grouped(s_clean)).to(v.dtype), grouped(v_clean))
        both = grouped(torch.cat((q, v))).movedim(0, -2).contiguous()  # (B, g, H, c, 2K, E)
        q, v = both.split(K, dim=-2)
        w = weights(grouped(s).movedim(0, -2))  # (B, g, H, c, K, M)
        # (B, g, H, c, K, M)
        q_past, v_past = torch.matmul(past, both.mT).mT.float().contiguous().split(K, dim=-2)
        # (B, g, H, c, K, 1)
        q_own, v_own = ((t * v).sum(-1, keepdim=True, dtype=torch.float32) for t in (q, v))
        # |N|^2, (B, g, H, c, K, M)
        square = SquaredNorm.apply(past).unsqueeze(-2) + w * (2 * v_past + w * v_own)
        scale = (both.shape[-1] / square.clamp(min=1e-20)) ** 0.5                  # 1 / rms(N)
        # (B, g, H, c, K, M)
        name = torch.matmul(q.flatten(3, 4), self.slot_key.to(q.dtype).mT).view(w.shape)
        score = ((q_past + w * q_own) * scale + name) * both.shape[-1] ** -0.5
        # a softmax: torch's is slow over few numbers
        share = torch.exp(score - score.amax(-1, keepdim=True).detach())
        share = share / share.sum(-1, keepdim=True) * scale  # (B, g, H, c, K, M)
        # (B, g, H, c, K, E)
        y = torch.matmul(share.to(past.dtype), past) + (share * w).sum(-1, keepdim=True) * v
        # (K, B, n, 1, H*E)
        return y.movedim(-2, 0).transpose(-3, -2).flatten(2, 3)[:, :, :n].flatten(-2).unsqueeze(-2)

    def keep(self, tokens):
        """What a slot still holds after so many further tokens: exp(-tokens / length) -> (H, M, 1).
        """
        return torch.exp(-tokens * torch.exp(-self.decay.float())).unsqueeze(-1)

    def kept(self, tokens):
        """The same for a tensor of numbers, 0 where one is negative -> (H, M, *its shape)."""
        # (H, M, 1, ...)
        rate = torch.exp(-self.decay.float()).view(self.H, self.M, *(1,) * tokens.dim())
        return torch.exp(-tokens.clamp(min=0) * rate) * (tokens >= 0)

    def prefix(self, own, block):
        """Sums over earlier blocks: own (B, n, H, M, E) -> same shape, block b holds the decayed
        total of blocks < b.

        Many blocks are added up in groups of c, then the groups: n c + (n / c)^2 products instead
        of n^2.
        """
        n = own.shape[1]
        c = n if n <= FEW_BLOCKS else round(n ** 0.5)
        own = F.pad(own, (0, 0) * 3 + (0, -n % c)).unflatten(1, (-1, c))  # (B, g, c, H, M, E)
        at = torch.arange(c + 1, device=own.device) * block
        keep = self.kept(at[:, None] - at[1:])  # (H, M, c + 1, c) from the end of j to i
        own = torch.einsum("hmij,zgjhme->zgihme", keep, own)  # (B, g, c + 1, H, M, E)
        own, ends = own.split([c, 1], dim=2)  # of each block, and at a group's end
        if n > c:
            # (c, H, M, 1) of what came before the group
            keep = self.kept(at[:c]).movedim(-1, 0).unsqueeze(-1)
            own = own + keep * self.prefix(ends[:, :, 0], c * block)[:, :, None]
        return own.flatten(1, 2)[:, :n]

    def token_prefix(self, w, v):
        """prefix() of blocks of one token, whose own sums are never made: w, v (B, g, H, c, M or E)
        -> (B, g, H, c, M, E).

        The c tokens of a group see each other and what came before the group: one product, of (c M,
        c + M) with (c + M, E).
        """
        c = w.shape[3]
        at = torch.arange(c + 1, device=w.device)
        # (H, c, M, c), (H, 1, M, c)
        keep, end = self.kept(at[:, None] - at[1:]).transpose(1, 2).split([c, 1], dim=1)
        w = w.mT.unsqueeze(3)  # (B, g, H, 1, M, c)
        if w.shape[1] > 1:
            # (B, g, H, M, E)
            before = self.prefix(torch.matmul((end.to(w.dtype) * w).squeeze(3), v), c)
            # (H, c, M, M)
            fade = self.kept(at[:c]).mT.unsqueeze(-1) * torch.eye(self.M, device=w.device)
            keep = torch.cat((keep, fade), dim=-1)  # (H, c, M, c + M)
            w = torch.cat((w, w.new_ones(()).expand(*w.shape[:-1], self.M)), dim=-1)
            v = torch.cat((v, before.to(v.dtype)), dim=-2)  # (B, g, H, c + M, E)
        return torch.matmul((keep.to(w.dtype) * w).flatten(3, 4), v).unflatten(3, (c, self.M))

    def split(self, h):
        wide, slim = self.in_proj(h).split([2 * self.ff, 2 * self.dm + self.H * self.M], dim=-1)
        # decoding with bf16 weights: small bf16 products are slow on CPUs
        if not torch.is_autocast_enabled(h.device.type):
            slim = slim.float()
        return *wide.chunk(2, dim=-1), *slim.split([self.dm, self.dm, self.H * self.M], dim=-1)

    def split_write(self, h):
        """Only what a token writes: v and s."""
        return self.in_proj.tail(h, self.dm + self.H * self.M).split(
            [self.dm, self.H * self.M], dim=-1
        )

    def mix(self, x, gate, up, memory):
        y = torch.cat((F.silu(gate) * up, memory.to(up.dtype)), dim=-1)  # (..., S, F + H*E)
        return self.out_proj.onto(x, y, self.dropout)

    def one_block(self, x, num=None, halo=None):
        """One block x (B, S, D) against a frozen state; returns (x, own N, its last hidden states).
        """
        h = self.norm(x)
        gate, up, q, v, s = self.split(self.conv(h, halo))
        own = self.write(v, s)
        return self.mix(x, gate, up, self.read(q, own if num is None else own + num)), own, h

    def all_blocks(self, x, valid=None, last=False):
        """x (2, B, n, S, D): noisy and clean stream at once, each block seeing exactly what the
        block rule allows.

        Nobody reads the clean stream behind the last layer: there it only writes, and (1, B, n, S,
        D) comes back.
        """
        h = self.norm(x)
        if valid is not None:
            h = h * valid
        # (2, B, n, S, D)
        h = self.conv_blocks(h, h.new_zeros(x.shape[1], self.conv.reach, x.shape[-1]))
        if last:
            clean = self.split_write(h[1])
            x, h = x[:1], h[:1]
        gate, up, q, v, s = self.split(h)
        clean = clean if last else (v[1], s[1])
        # whose range P leaves; below 3, |N|^2 cancels
        exact = q.dtype is not torch.float16 and self.dm // self.H > 2
        if x.shape[-2] == 1 and exact:
            return self.mix(x, gate, up, self.read_tokens(q, v, s, *clean))
        own = self.write(v, s, valid)  # (2, B, n, H, M, E)
        context = self.write(*clean, valid) if last else own[1]                    # (B, n, H, M, E)
        # the same context twice
        return self.mix(x, gate, up, self.read(q, own + self.prefix(context, x.shape[-2])))

    def forward(self, x, valid=None, last=False):
        """One block (B, T, D), or both streams as in all_blocks: what training calls, compiles and
        recomputes.
        """
        return self.one_block(x)[0] if x.dim() == 3 else self.all_blocks(x, valid, last)

    def clean_blocks(self, x, num, halo, last=False):
        """The clean stream alone, n finished blocks x (B, n, S, D) behind a frozen state -> (x, the
        new N, the new halo).

        Behind the last layer nobody reads x: it comes back as it was.
        """
        S = x.shape[2]
        h = self.norm(x)
        halo_after = latest(halo, h.flatten(1, 2))                                 # (B, r, D)
        h = self.conv_blocks(h[None], halo)[0]                                     # (B, n, S, D)
        gate, up, q, v, s = (None,) * 3 + tuple(self.split_write(h)) if last else self.split(h)
        own = self.write(v, s)                                                     # (B, n, H, M, E)
        before = num[:, None]  # (B, 1, H, M, E): the state is block -1
        if x.shape[1] > 1:
            before = self.prefix(torch.cat((before, own), dim=1), S)[:, 1:]        # (B, n, H, M, E)
        after = before[:, -1] * self.keep(S) + own[:, -1]                          # (B, H, M, E)
        return x if last else self.mix(x, gate, up, self.read(q, own + before)), after, halo_after

    def conv_blocks(self, h, halo):
        """h (K, B, n, S, D), the clean stream last, behind a halo (B, r, D) -> same shape: each
        block is convolved by itself.

        The r clean hidden states before each block are its halo; a block shorter than r reaches
        into the ones before it.
        """
        K, B, n, S, D = h.shape
        r = self.conv.reach
        clean = torch.cat((halo, h[-1].flatten(1, 2)), dim=1)                      # (B, r + n*S, D)
        halos = clean.unfold(1, r, S)[:, :n].transpose(2, 3)                       # (B, n, r, D)
        y = self.conv(h.flatten(0, 2), halos.expand(K, B, n, r, D).flatten(0, 2))  # (K*B*n, S, D)
        return y.view(h.shape)                                                     # (K, B, n, S, D)


def latest(halo, h):
    """The last r hidden states of halo (B, r, D), then h (B, S, D)."""
    r = halo.shape[1]
    return h[:, -r:] if h.shape[1] >= r else torch.cat((halo, h), dim=1)[:, -r:]   # (B, r, D)


class EcoHybrid(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.head = TiedEmbedding(cfg.rows, cfg.d_model, (cfg.pad_id, cfg.mask_id))
        self.layers = nn.ModuleList(EcoLayer(cfg) for _ in range(cfg.n_layers))
        self.exits = Exits(cfg)
        self.recompute = False  # train.py's --activation_checkpointing
        initialise(self, depth=cfg.n_layers)

    def states(self, xt, cache=None, depth=None):
        """(B, S) ids, one noisy block, against the frozen cache -> (B, S, D). Without a cache: the
        whole sequence, B = T.
        """
        x = self.head.embed(xt)                                                   # (B, S, D)
        states = itertools.repeat(()) if cache is None else zip(cache.num, cache.halo, strict=True)
        for layer, state in zip(self.layers[:depth], states, strict=False):
            x = layer.one_block(x, *state)[0]
        return self.exits(x, depth)

    def block_states(self, xt, x0, block, first=None, early=None):
        """Training form: xt, x0 (B, T) -> (B, T, D), noisy block b given clean blocks < b. Block 0
        has `first` tokens.

        early: also leave behind that many layers; then the result is (1 + 1, B, T, D): last, early.
        """
        T, out = xt.shape[1], []
        block = min(block, T)
        first = min(first or block, block)
        if first == T:  # one block is all there is
            x = self.head.embed(xt)                                               # (B, T, D)
            for i, layer in enumerate(self.layers, 1):
                x = recomputed(self.recompute, layer, x)
                if i in (early, len(self.layers)):
                    out.append(self.exits(x, i))
            return out[0] if early is None else torch.stack(out[::-1])
        before = block - first  # padding that completes block 0 ...
        after = -(before + T) % block  # ... and the last block
        ids = F.pad(torch.stack((xt, x0)), (before, after), value=self.cfg.pad_id)  # (2, B, n*S)
        valid = None
        if before or after:  # padding writes nothing, and to a convolution it is zero
            at = torch.arange(ids.shape[2], device=xt.device) - before
            valid = ((at >= 0) & (at < T)).float().view(1, -1, block, 1)           # (1, n, S, 1)
        x = self.head.embed(ids.unflatten(2, (-1, block)))                         # (2, B, n, S, D)
        for i, layer in enumerate(self.layers, 1):
            x = recomputed(self.recompute, layer, x, valid, i == len(self.layers))
            if i in (early, len(self.layers)):
                out.append(self.exits(x[0].flatten(1, 2)[:, before:before + T], i))  # (B, T, D)
        return out[0] if early is None else torch.stack(out[::-1])

    def logits(self, states):
        return self.head.logits(states)

    def forward(self, xt, cache=None):
        return self.logits(self.states(xt, cache))

    def new_cache(self, batch, length=0):
        return EcoCache(self.cfg, batch, self.head.weight.device, torch.float32)

    def commit(self, x0, cache, block=None):
        """Freeze finished clean tokens (B, n*S), n blocks of S or one: a pass through all layers,
        then they are a few sums.
        """
        B, T = x0.shape
        x = self.head.embed(x0.view(B, -1, block or T))                           # (B, n, S, D)
        after = []
        for layer, num, halo in zip(self.layers, cache.num, cache.halo, strict=True):
            x, *state = layer.clean_blocks(x, num, halo, last=layer is self.layers[-1])
            after.append(state)
        cache.num, cache.halo = (torch.stack(t) for t in zip(*after, strict=True))
        cache.length += T

    def commit_and_states(self, x0, xt, cache):
        """commit(x0) and states(xt) of the block behind it in one pass: both (B, S) ids; the
        weights are read once.
        """
        B, S = x0.shape
        x = self.head.embed(torch.cat((x0, xt)))  # (2B, S, D), clean rows first
        after = []
        for layer, num, halo in zip(self.layers, cache.num, cache.halo, strict=True):
            h = layer.norm(x)
            halo_after = latest(halo, h[:B])                                       # (B, r, D)
            gate, up, q, v, s = layer.split(layer.conv(h, torch.cat((halo, halo_after))))
            own = layer.write(v, s)                                                # (2B, H, M, E)
            num_after = num * layer.keep(S) + own[:B]
            x = layer.mix(x, gate, up, layer.read(q, own + torch.cat((num, num_after))))
            after.append((num_after, halo_after))
        cache.num, cache.halo = (torch.stack(t) for t in zip(*after, strict=True))
        cache.length += S
        return self.exits(x[B:])
