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

The block rule: noisy block b sees the *clean* blocks before it, as prefix(<b), and its own tokens;
clean block b sees prefix(<=b). The convolution's left neighbours come from the clean block before
(the halo), its right ones end with the block. So a frozen context is exactly (N, halo) per layer: a
theorem, tested in float32 to 1e-5 of the logits' size. The context takes the same memory whatever
its length.

Legend: B batch, T positions, S block, n blocks, D width, H heads, E memory head size, M slots, F
feed-forward width, r the convolution's reach, K streams (noisy first, clean last), c blocks of a
group and g groups, where prefix sums are made in groups.
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
    last_and_early,
    recomputed,
    unit_rms,
)

FEW_BLOCKS = 16  # up to so many, one product adds up all pairs of blocks
SCORE_CAP = 8.0  # |score| of a write: exp(8) = 3,000 to 1 is as selective as a write may be
# Added to all scores. It multiplies N and rms(N) by the same number, so it cancels in N / rms(N);
# and a float16 sum over thousands of tokens stays finite.
SHARED = -6.0


class EcoCache:
    """The frozen context: per layer N (B,H,M,E) and the halo (B,r,D). Constant in the context's
    length.
    """

    def __init__(self, cfg, batch, device, dtype):
        rows = (cfg.n_layers, batch)
        sums = (cfg.n_heads, cfg.memory_slots, cfg.d_mem // cfg.n_heads)           # (H, M, E)
        last = (cfg.conv_kernel // 2, cfg.d_model)                                 # (r, D)
        self.num = torch.zeros(*rows, *sums, device=device, dtype=dtype)
        self.halo = torch.zeros(*rows, *last, device=device, dtype=dtype)
        self.length = 0

    @property
    def nbytes(self):
        return sum(t.numel() * t.element_size() for t in (self.num, self.halo))

    def select(self, rows):
        """Keep only these rows of the batch."""
        self.num = self.num[:, rows]
        self.halo = self.halo[:, rows]

    def beside_empty(self):
        """A cache of 2B rows, the second half of which has no context: both sides of guidance in
        one batch.
        """
        both = copy.copy(self)
        both.num = torch.cat((self.num, torch.zeros_like(self.num)), dim=1)
        both.halo = torch.cat((self.halo, torch.zeros_like(self.halo)), dim=1)
        return both

    def reset(self):
        self.length = 0
        self.num.zero_()
        self.halo.zero_()


def write_weights(scores):
    """Scores of a write -> weights exp(C tanh(score / C) + SHARED), float32.

    With tanh(x) = 2 sigmoid(2x) - 1: the sigmoid takes a third of tanh's time on a CPU.
    """
    gate = torch.sigmoid(scores.float() * (2 / SCORE_CAP))
    return torch.exp(2 * SCORE_CAP * gate - SCORE_CAP + SHARED)


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
        twice = (2 * grad).unsqueeze(-1)
        return (x.float() * twice).to(x.dtype)


class EcoLayer(nn.Module):
    """One layer. Its inside, h, is the normed and convolved input; of it
        gate, up  (F each)  are the gated feed-forward,
        q         (H*E)     is what a token asks the slots,
        v         (H*E)     is what it writes into them,
        s         (H*M)     is its score for each slot.
    """

    def __init__(self, cfg):
        super().__init__()
        D = cfg.d_model
        self.ff = cfg.d_ff
        self.dm = cfg.d_mem
        self.H = cfg.n_heads
        self.M = cfg.memory_slots
        self.norm = RMSNorm(D)
        self.conv = LocalConv(D, cfg.conv_kernel)
        # one matrix in, one out: two big products keep a CPU (or a GPU) busier than seven small
        # ones
        writes = self.dm + self.H * self.M
        self.in_proj = Linear(D, 2 * self.ff + self.dm + writes, used_alone=(writes,))
        self.out_proj = Linear(self.ff + self.dm, D)
        # a slot's own name
        self.slot_key = nn.Parameter(torch.randn(self.H, self.M, self.dm // self.H) * 0.5)
        # the logarithm of a slot's e-folding length in tokens, (H, M): evenly spaced, so that some
        # slots remember the sentence, others the document
        self.decay = nn.Parameter(torch.linspace(2.5, 8.0, self.M).repeat(self.H, 1))
        self.dropout = nn.Dropout(cfg.dropout)

    def heads(self, x):
        """(..., S, H*X) -> (..., H, S, X)."""
        return x.unflatten(-1, (self.H, -1)).transpose(-3, -2)

    # ---- the memory: writing, reading ------------------------------------------------------------

    def write(self, v, s, valid=None):
        """The sums of one block: v (..., S, H*E), s (..., S, H*M) -> N (..., H, M, E), float32."""
        w = write_weights(s)                                                       # (..., S, H*M)
        if valid is not None:
            w = w * valid
        w = w.to(v.dtype).unflatten(-1, (self.H, self.M)).movedim(-3, -1)          # (..., H, M, S)
        return torch.matmul(w, self.heads(v)).float()

    def read(self, q, num):
        """q (..., S, H*E) attends over the M slot values N / rms(N) -> (..., S, H*E).

        The quotient is never made: with small blocks N is as large as all activations of a layer.
        Instead the products with N are multiplied by 1 / rms(N), a number for each slot.
        """
        if q.dtype is torch.float16:  # whose range N leaves; bf16 has float32's
            num = unit_rms(num)
        q = self.heads(q)                                                          # (..., H, S, E)
        E = q.shape[-1]
        num = num.to(q.dtype)                                                      # (..., H, M, E)

        # 1 / rms(N), (..., H, 1, M)
        norm = torch.linalg.vector_norm(num, dim=-1, dtype=torch.float32)          # (..., H, M)
        scale = (E ** 0.5 / norm.clamp(min=1e-10)).unsqueeze(-2)

        # attention over the slots: by what they hold, and by their names
        name = torch.matmul(q, self.slot_key.to(q.dtype).mT)                       # (..., H, S, M)
        score = torch.matmul(q, num.mT) * scale + name
        share = (score * E ** -0.5).softmax(-1) * scale                            # (..., H, S, M)
        y = torch.matmul(share.to(q.dtype), num)                                   # (..., H, S, E)
        return y.transpose(-3, -2).flatten(-2)                                     # (..., S, H*E)

    def read_tokens(self, q, v, s, v_clean, s_clean):
        """read(q, own + prefix) for blocks of one token: q, v, s (K, B, n, 1, .), the clean
        stream's v, s (B, n, 1, .) -> (K, B, n, 1, H*E). read_tokens_plainly says the same in a few
        lines.

        There a token's N = P + w v is made, P being the prefix, w and v what the token itself
        writes. As M*E numbers for each token and stream, N would be moved about a dozen times. Here
        only P is made, which all K streams share, and everything that N is used for follows from
        products with P and from numbers:
            q.N    =  q.P + w (q.v)
            |N|^2  =  |P|^2 + w (2 v.P + w v.v)
            sum_m share_m N_m  =  sum_m share_m P_m  +  (sum_m share_m w_m) v
        """
        K, n = q.shape[0], q.shape[2]
        c = min(n, FEW_BLOCKS)

        # P of each token, (B, g, H, c, M, E)
        w_clean = write_weights(self.grouped(s_clean, c)).to(v.dtype)              # (B, g, H, c, M)
        past = self.token_prefix(w_clean, self.grouped(v_clean, c))

        # the streams as rows beside each other, so that one product serves them all
        both = self.grouped(torch.cat((q, v)), c).movedim(0, -2).contiguous()      # (..., 2K, E)
        q, v = both.split(K, dim=-2)                                               # (..., K, E)
        w = write_weights(self.grouped(s, c).movedim(0, -2))                       # (..., K, M)
        E = both.shape[-1]

        # q.P and v.P, (B, g, H, c, K, M); q.v and v.v, (B, g, H, c, K, 1)
        products = torch.matmul(past, both.mT).mT.float().contiguous()
        q_past, v_past = products.split(K, dim=-2)
        q_own = (q * v).sum(-1, keepdim=True, dtype=torch.float32)
        v_own = (v * v).sum(-1, keepdim=True, dtype=torch.float32)

        # 1 / rms(N), (B, g, H, c, K, M)
        square = SquaredNorm.apply(past).unsqueeze(-2) + w * (2 * v_past + w * v_own)
        scale = (E / square.clamp(min=1e-20)) ** 0.5

        # the shares of the slots: a softmax by hand, as torch's is slow over few numbers
        name = torch.matmul(q.flatten(3, 4), self.slot_key.to(q.dtype).mT)
        name = name.view(w.shape)                                                  # (..., K, M)
        score = ((q_past + w * q_own) * scale + name) * E ** -0.5
        share = torch.exp(score - score.amax(-1, keepdim=True).detach())
        share = share / share.sum(-1, keepdim=True) * scale                        # (..., K, M)

        # the answer, (B, g, H, c, K, E), and back to the order of the tokens
        own_share = (share * w).sum(-1, keepdim=True)
        y = torch.matmul(share.to(past.dtype), past) + own_share * v
        y = y.movedim(-2, 0).transpose(-3, -2).flatten(2, 3)[:, :, :n]             # (K, B, n, H, E)
        return y.flatten(-2).unsqueeze(-2)

    def read_tokens_plainly(self, q, v, s, v_clean, s_clean):
        """What read_tokens computes, by its definition, token by token: the tests' reference."""
        answers = []
        for i in range(q.shape[2]):
            N = self.write(v[:, :, i], s[:, :, i])                                 # (K, B, H, M, E)
            for j in range(i):
                earlier = self.write(v_clean[:, j], s_clean[:, j])                 # (B, H, M, E)
                N = N + self.decay_factor(i - 1 - j) * earlier
            value = unit_rms(N)                                                    # (K, B, H, M, E)
            query = self.heads(q[:, :, i])                                         # (K, B, H, 1, E)
            score = query @ (value + self.slot_key).mT                             # (K, B, H, 1, M)
            share = (score * query.shape[-1] ** -0.5).softmax(-1)
            answer = share @ value                                                 # (K, B, H, 1, E)
            answers.append(answer.transpose(-3, -2).flatten(-2))                   # (K, B, 1, H*E)
        return torch.stack(answers, dim=2)

    def grouped(self, x, c):
        """One token a block in groups of c: (..., B, n, 1, H*X) -> (..., B, g, H, c, X)."""
        x = x.squeeze(-2)
        x = F.pad(x, (0, 0, 0, -x.shape[-2] % c))  # (..., B, g*c, H*X)
        return x.unflatten(-1, (self.H, -1)).unflatten(-3, (-1, c)).transpose(-3, -2)

    # ---- the memory: decay and sums over earlier blocks ------------------------------------------

    def decay_factor(self, tokens):
        """What a slot still holds after so many further tokens: exp(-tokens / length) -> (H, M, 1).
        """
        return torch.exp(-tokens * torch.exp(-self.decay.float())).unsqueeze(-1)

    def decay_factors(self, tokens):
        """The same for a tensor of numbers, 0 where one is negative -> (H, M, *its shape)."""
        rate = torch.exp(-self.decay.float())
        rate = rate.view(self.H, self.M, *(1,) * tokens.dim())                     # (H, M, 1, ...)
        return torch.exp(-tokens.clamp(min=0) * rate) * (tokens >= 0)

    def prefix(self, own, block):
        """Sums over earlier blocks: own (B, n, H, M, E) -> same shape, block b holds the decayed
        total of blocks < b.

        Many blocks are added up in groups of c, then the groups: n c + (n / c)^2 products instead
        of n^2.
        """
        n = own.shape[1]
        c = n
        if n > FEW_BLOCKS:
            c = round(n ** 0.5)
        own = F.pad(own, (0, 0) * 3 + (0, -n % c)).unflatten(1, (-1, c))  # (B, g, c, H, M, E)

        # inside a group: from the end of block j to the start of block i, and to the group's end
        start = torch.arange(c + 1, device=own.device) * block
        decay = self.decay_factors(start[:, None] - start[1:])  # (H, M, c + 1, c)
        total = torch.einsum("hmij,zgjhme->zgihme", decay, own)  # (B, g, c + 1, H, M, E)
        total, group = total.split([c, 1], dim=2)

        # what came before the group
        if n > c:
            before = self.prefix(group[:, :, 0], c * block)                        # (B, g, H, M, E)
            decay = self.decay_factors(start[:c]).movedim(-1, 0).unsqueeze(-1)     # (c, H, M, 1)
            total = total + decay * before[:, :, None]
        return total.flatten(1, 2)[:, :n]

    def token_prefix(self, w, v):
        """prefix() of blocks of one token, whose own sums are never made: w, v (B, g, H, c, M or E)
        -> (B, g, H, c, M, E).

        The c tokens of a group see each other and what came before the group: one product, of (c M,
        c + M) with (c + M, E).
        """
        c = w.shape[3]
        start = torch.arange(c + 1, device=w.device)
        decay = self.decay_factors(start[:, None] - start[1:]).transpose(1, 2)  # (H, c + 1, M, c)
        decay, to_end = decay.split([c, 1], dim=1)
        w = w.mT.unsqueeze(3)  # (B, g, H, 1, M, c)

        # what came before the group enters as M more tokens, one for each slot, with weight 1
        if w.shape[1] > 1:
            at_end = (to_end.to(w.dtype) * w).squeeze(3)                           # (B, g, H, M, c)
            before = self.prefix(torch.matmul(at_end, v), c)                       # (B, g, H, M, E)
            own_slot = torch.eye(self.M, device=w.device)
            fade = self.decay_factors(start[:c]).mT.unsqueeze(-1) * own_slot       # (H, c, M, M)
            decay = torch.cat((decay, fade), dim=-1)  # (H, c, M, c + M)
            one = w.new_ones(()).expand(*w.shape[:-1], self.M)
            w = torch.cat((w, one), dim=-1)  # (B, g, H, 1, M, c + M)
            v = torch.cat((v, before.to(v.dtype)), dim=-2)  # (B, g, H, c + M, E)
        weight = (decay.to(w.dtype) * w).flatten(3, 4)  # (B, g, H, c*M, ...)
        return torch.matmul(weight, v).unflatten(3, (c, self.M))

    # ---- a layer's way in and out ----------------------------------------------------------------

    def split(self, h):
        """h (..., S, D) -> gate, up, q, v, s."""
        sizes = [2 * self.ff, 2 * self.dm + self.H * self.M]
        feed_forward, memory = self.in_proj(h).split(sizes, dim=-1)
        # decoding with bf16 weights: small bf16 products are slow on CPUs
        if not torch.is_autocast_enabled(h.device.type):
            memory = memory.float()
        gate, up = feed_forward.chunk(2, dim=-1)
        q, v, s = memory.split([self.dm, self.dm, self.H * self.M], dim=-1)
        return gate, up, q, v, s

    def split_write(self, h):
        """Only what a token writes: v and s."""
        sizes = [self.dm, self.H * self.M]
        return self.in_proj.last_rows(h, sum(sizes)).split(sizes, dim=-1)

    def mix(self, x, gate, up, memory):
        """Both branches' results into one product, added to x."""
        feed_forward = F.silu(gate) * up
        y = torch.cat((feed_forward, memory.to(up.dtype)), dim=-1)  # (..., S, F + H*E)
        return self.out_proj.residual_add(x, y, self.dropout)

    def one_block(self, x, num=None, halo=None):
        """One block x (B, S, D) against a frozen state; returns (x, own N, its normed input)."""
        h = self.norm(x)
        gate, up, q, v, s = self.split(self.conv(h, halo))
        own = self.write(v, s)                                                     # (B, H, M, E)
        total = own
        if num is not None:
            total = own + num
        return self.mix(x, gate, up, self.read(q, total)), own, h

    def all_blocks(self, x, valid=None, last=False):
        """x (2, B, n, S, D): noisy and clean stream at once, each block seeing exactly what the
        block rule allows.

        Nobody reads the clean stream behind the last layer: there it only writes, and (1, B, n, S,
        D) comes back.
        """
        h = self.norm(x)
        if valid is not None:
            h = h * valid
        nothing = h.new_zeros(x.shape[1], self.conv.reach, x.shape[-1])            # (B, r, D)
        h = self.conv_blocks(h, nothing)                                           # (2, B, n, S, D)

        # what the clean stream writes
        if last:
            v_clean, s_clean = self.split_write(h[1])
            x = x[:1]
            h = h[:1]
        gate, up, q, v, s = self.split(h)
        if not last:
            v_clean = v[1]
            s_clean = s[1]

        # single tokens: not in float16, whose range P leaves; below 3 numbers |N|^2 cancels
        exact = q.dtype is not torch.float16 and self.dm // self.H > 2
        if x.shape[-2] == 1 and exact:
            return self.mix(x, gate, up, self.read_tokens(q, v, s, v_clean, s_clean))

        # both streams read their own sums and the same context
        own = self.write(v, s, valid)  # (K, B, n, H, M, E)
        if last:
            clean = self.write(v_clean, s_clean, valid)                            # (B, n, H, M, E)
        else:
            clean = own[1]
        context = self.prefix(clean, x.shape[-2])
        return self.mix(x, gate, up, self.read(q, own + context))

    def forward(self, x, valid=None, last=False):
        """One block (B, T, D), or both streams as in all_blocks: what training calls, compiles and
        recomputes.
        """
        if x.dim() == 3:
            return self.one_block(x)[0]
        return self.all_blocks(x, valid, last)

    def clean_blocks(self, x, num, halo, last=False):
        """The clean stream alone, n finished blocks x (B, n, S, D) behind a frozen state -> (x, the
        new N, the new halo).

        Behind the last layer nobody reads x: it comes back as it was.
        """
        S = x.shape[2]
        h = self.norm(x)
        halo_after = next_halo(halo, h.flatten(1, 2))                              # (B, r, D)
        h = self.conv_blocks(h[None], halo)[0]                                     # (B, n, S, D)
        if last:
            v, s = self.split_write(h)
        else:
            gate, up, q, v, s = self.split(h)
        own = self.write(v, s)                                                     # (B, n, H, M, E)

        before = num[:, None]  # (B, 1, H, M, E): the state is block -1
        if x.shape[1] > 1:
            before = self.prefix(torch.cat((before, own), dim=1), S)[:, 1:]        # (B, n, H, M, E)
        after = before[:, -1] * self.decay_factor(S) + own[:, -1]                  # (B, H, M, E)
        if not last:
            x = self.mix(x, gate, up, self.read(q, own + before))
        return x, after, halo_after

    def conv_blocks(self, h, halo):
        """h (K, B, n, S, D), the clean stream last, behind a halo (B, r, D) -> same shape: each
        block is convolved by itself.

        The r clean positions before each block are its halo; if a block is shorter than r, they
        reach into the blocks before it.
        """
        K, B, n, S, D = h.shape
        r = self.conv.reach
        clean = torch.cat((halo, h[-1].flatten(1, 2)), dim=1)                      # (B, r + n*S, D)
        halos = clean.unfold(1, r, S)[:, :n].transpose(2, 3)                       # (B, n, r, D)
        halos = halos.expand(K, B, n, r, D).flatten(0, 2)                          # (K*B*n, r, D)
        y = self.conv(h.flatten(0, 2), halos)                                      # (K*B*n, S, D)
        return y.view(h.shape)                                                     # (K, B, n, S, D)


def next_halo(halo, h):
    """The last r positions of halo (B, r, D), then h (B, S, D) -> (B, r, D)."""
    r = halo.shape[1]
    if h.shape[1] < r:
        h = torch.cat((halo, h), dim=1)
    return h[:, -r:]


class EcoHybrid(nn.Module):
    """The denoiser; its methods are the protocol at the top of model.py."""

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
        contexts = itertools.repeat((None, None))
        if cache is not None:
            contexts = zip(cache.num, cache.halo, strict=True)
        for layer, (num, halo) in zip(self.layers[:depth], contexts, strict=False):
            x = layer.one_block(x, num, halo)[0]
        return self.exits(x, depth)

    def block_states(self, xt, x0, block, first=None, early=None):
        """Training form: xt, x0 (B, T) -> (B, T, D), noisy block b given clean blocks < b. Block 0
        has `first` tokens.

        early: also leave behind that many layers; then the result is (1 + 1, B, T, D): last, early.
        """
        T = xt.shape[1]
        block = min(block, T)
        first = min(first or block, block)
        if first == T:
            return self.whole_states(xt, early)

        # blocks of one length: padding completes block 0 and the last block
        before = block - first
        after = -(before + T) % block
        ids = torch.stack((xt, x0))                                                # (2, B, T)
        ids = F.pad(ids, (before, after), value=self.cfg.pad_id)                   # (2, B, n*S)
        valid = None
        if before or after:  # padding writes nothing, and to a convolution it is zero
            position = torch.arange(ids.shape[2], device=xt.device) - before
            valid = (position >= 0) & (position < T)
            valid = valid.float().view(1, -1, block, 1)                            # (1, n, S, 1)

        x = self.head.embed(ids.unflatten(2, (-1, block)))                         # (2, B, n, S, D)
        found = []
        for i, layer in enumerate(self.layers, 1):
            x = recomputed(self.recompute, layer, x, valid, i == len(self.layers))
            if i in (early, len(self.layers)):
                noisy = x[0].flatten(1, 2)[:, before:before + T]                   # (B, T, D)
                found.append(self.exits(noisy, i))
        return last_and_early(found, early)

    def whole_states(self, xt, early):
        """block_states where one block is all there is: nobody needs the clean stream."""
        x = self.head.embed(xt)                                                    # (B, T, D)
        found = []
        for i, layer in enumerate(self.layers, 1):
            x = recomputed(self.recompute, layer, x)
            if i in (early, len(self.layers)):
                found.append(self.exits(x, i))
        return last_and_early(found, early)

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
        x = self.head.embed(x0.view(B, -1, block or T))                            # (B, n, S, D)
        nums, halos = [], []
        for layer, num, halo in zip(self.layers, cache.num, cache.halo, strict=True):
            x, num_after, halo_after = layer.clean_blocks(x, num, halo, layer is self.layers[-1])
            nums.append(num_after)
            halos.append(halo_after)
        cache.num = torch.stack(nums)
        cache.halo = torch.stack(halos)
        cache.length += T

    def commit_and_states(self, x0, xt, cache):
        """commit(x0) and states(xt) of the block behind it in one pass: both (B, S) ids; the
        weights are read once.
        """
        B, S = x0.shape
        x = self.head.embed(torch.cat((x0, xt)))  # (2B, S, D), clean rows first
        nums, halos = [], []
        for layer, num, halo in zip(self.layers, cache.num, cache.halo, strict=True):
            h = layer.norm(x)
            halo_after = next_halo(halo, h[:B])                                    # (B, r, D)
            h = layer.conv(h, torch.cat((halo, halo_after)))                       # (2B, S, D)
            gate, up, q, v, s = layer.split(h)
            own = layer.write(v, s)                                                # (2B, H, M, E)
            num_after = num * layer.decay_factor(S) + own[:B]
            context = torch.cat((num, num_after))                                  # (2B, H, M, E)
            x = layer.mix(x, gate, up, layer.read(q, own + context))
            nums.append(num_after)
            halos.append(halo_after)
        cache.num = torch.stack(nums)
        cache.halo = torch.stack(halos)
        cache.length += S
        return self.exits(x[B:])
