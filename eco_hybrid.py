"""EcoHybrid, the primary denoiser: local convolution + memory slots, O(T*M) in time, constant
memory in the context.

    from model import build_model; build_model(cfg)        # cfg.model == "primary"

One layer reads its input through a norm and a short depthwise convolution, then does two things in
parallel: a gated feed-forward, and a slim memory. The memory's M slots per head hold decaying sums
over tokens,
    N = sum_j keep(j) w_j v_j      w_j = exp(bounded score of token j for this slot),
and a token reads the slot values N / rms(N) by attention: a weighted mean's direction, whatever the
sum of the weights. Sums are what make the context cheap: all that was read is one small state.

Two streams, both shifted: the row that reads token i - 1 answers for token i.

    clean   [start, x_0, x_1, ...] one row a token. A row sees the rows before it: convolution taps
            of the past, and N faded token by token. It is an autoregressive model with a constant
            state; the start is the mask's row.
    noisy   one block: [x_{p-1}, xt_p .. xt_{p+S-1}], behind the state of the clean stream at
            x_{p-1}. It sees itself on both sides. Its front row x_{p-1} writes nothing, as the
            state holds it.

So a frozen context is exactly (N, halo) per layer, one function of the text: a theorem, tested in
float32 to 1e-5 of the logits' size. It takes the same memory whatever its length.

Legend: B batch, T clean rows, p a block's first token, S block, n blocks, D width, H heads, E
memory head size, M slots, F feed-forward width, r the convolution's reach, c tokens of a chunk and
g chunks, R rows of both streams.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

from layers import (
    Denoiser,
    Linear,
    LocalConv,
    RMSNorm,
    openings,
    shifted,
    unit_rms,
)
from model_config import CHUNK, FEW_BLOCKS

SLIM = 4         # in heads of fewer numbers the sums nearly cancel now and then
SCORE_CAP = 8.0  # |score| of a write: exp(8) = 3,000 to 1 is as selective as a write may be
# Added to all scores. It multiplies N and rms(N) by the same number, so it cancels in N / rms(N);
# and sums over thousands of tokens stay small.
SHARED = -6.0
# A slot keeps at least exp(-1) from one token to the next; the squares of a chunk's weights, which
# are taken behind its half, stay within float32's range.
FASTEST = 1.0


class EcoCache:
    """The frozen context: per layer N (B,H,M,E) and the halo, the convolution's input at the last
    r + 1 rows (B,r+1,D). Constant in the context's length.
    """

    def __init__(self, cfg, batch, device, dtype):
        rows = (cfg.n_layers, batch)
        sums = (cfg.n_heads, cfg.memory_slots, cfg.d_mem // cfg.n_heads)           # (H, M, E)
        last = (cfg.conv_kernel // 2 + 1, cfg.d_model)                             # (r + 1, D)
        self.num = torch.zeros(*rows, *sums, device=device, dtype=dtype)
        self.halo = torch.zeros(*rows, *last, device=device, dtype=dtype)
        self.front = None               # the last token that was read (B, 1)
        self.length = 0                 # rows that were read, the start included
        self.tried = None               # what try_step read: tokens, N behind each, the rows

    @property
    def nbytes(self):
        return sum(t.numel() * t.element_size() for t in (self.num, self.halo))

    def keep(self, tokens):
        """The first so many tokens of the last try_step join the context."""
        x0, nums, halos = self.tried
        self.tried = None
        last = self.halo.shape[2]                                                  # r + 1
        self.num = nums[:, :, tokens - 1]
        self.halo = halos[:, :, tokens:tokens + last]
        self.front = x0[:, tokens - 1:tokens]
        self.length += tokens

    def select(self, rows):
        """Keep only these rows of the batch."""
        self.num = self.num[:, rows]
        self.halo = self.halo[:, rows]
        self.front = self.front[rows]

    @property
    def tensors(self):
        """All that a forward needs of it; their sizes never change."""
        return self.num, self.halo, self.front

    def holding(self, num, halo, front):
        """A cache like this one with other tensors."""
        other = copy.copy(self)
        other.num = num
        other.halo = halo
        other.front = front
        return other

    def beside(self, other):
        """A cache of the rows of both: the two sides of guidance in one batch."""
        return self.holding(
            torch.cat((self.num, other.num), dim=1),
            torch.cat((self.halo, other.halo), dim=1),
            torch.cat((self.front, other.front)),
        )


class Rows:
    """The rows of a layer's input (R, D): T clean ones of each sequence, then n noisy blocks of
    S + 1. Block b opens behind the clean row opens[b], and its front row repeats that row's token.

    All blocks have S places. `real` (n, S): which of them hold a token; the others write nothing,
    and to a convolution they are zero. `each`: the state behind every clean row is wanted.
    """

    def __init__(
        self, batch, clean, opens=None, block=0, reach=0, real=None, before=0, each=False
    ):
        self.batch = batch
        self.clean = clean                                                         # T
        self.each = each
        self.before = before                  # places of block 0 in front of its first token
        self.block = block                                                         # S
        self.opens = opens                                                         # (n,)
        self.count = 0 if opens is None else len(opens)                            # n
        if not self.count:
            return
        device = opens.device
        # the r clean rows before each front row, among all that the clean stream has seen
        self.halo = (opens[:, None] + torch.arange(1, reach + 1, device=device)).flatten()
        # the tokens between two openings, by their clean rows; there are none below row 1
        places = torch.arange(1 - block, 1, device=device)
        self.between = opens[1:, None] + places                                    # (n - 1, S)

        writes = torch.ones(self.count, block, device=device)
        if real is not None:
            writes = real.float()
        writes = F.pad(writes, (1, 0))                                             # (n, S + 1)
        self.writes = writes[None, :, :, None]
        self.valid = None
        if real is not None:  # the front row stands right before the first token
            front = F.one_hot(real.long().argmax(-1), block + 1).float()
            self.valid = self.writes + front[None, :, :, None]

    @classmethod
    def of_training(cls, batch, length, block, first, with_clean, reach, device):
        """All blocks of sequences of so many tokens, the first one of `first`, beside the whole
        clean stream or what the blocks need of it.
        """
        opens, clean = openings(length, block, first, device)
        if with_clean:
            clean = length
        before = block - first
        real = None
        if (before + length) % block or before:
            position = torch.arange(len(opens) * block, device=device) - before
            real = ((position >= 0) & (position < length)).view(-1, block)         # (n, S)
        return cls(batch, clean, opens, block, reach, real, before)

    @classmethod
    def behind(cls, batch, clean, block, reach, device):
        """One block behind so many clean rows, which stand behind a frozen state."""
        return cls(batch, clean, torch.full((1,), clean - 1, device=device), block, reach)

    def split(self, x):
        """x (R, X) -> the clean rows (B, T, X), the noisy ones (B, n, S + 1, X)."""
        X = x.shape[-1]
        end = self.batch * self.clean
        clean = x[:end].view(self.batch, self.clean, X)                            # (B, T, X)
        noisy = x[end:].view(self.batch, self.count, self.block + 1, X)  # (B, n, S + 1, X)
        return clean, noisy

    @staticmethod
    def join(parts):
        """What split gives -> (R, X); without the streams that are not there."""
        return torch.cat([part.flatten(0, -2) for part in parts])


def write_weights(scores):
    """Scores of a write -> weights exp(C tanh(score / C) + SHARED), float32.

    With tanh(x) = 2 sigmoid(2x) - 1: the sigmoid takes a third of tanh's time on a CPU.
    """
    gate = torch.sigmoid(scores.float() * (2 / SCORE_CAP))
    return torch.exp(2 * SCORE_CAP * gate - SCORE_CAP + SHARED)


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
        self.in_proj = Linear(D, 2 * self.ff + 2 * self.dm + self.H * self.M)
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

    # ---- the memory of a block: writing, reading -------------------------------------------------

    def write(self, v, s, valid=None):
        """The sums of one block: v (..., S, H*E), s (..., S, H*M) -> N (..., H, M, E), float32."""
        w = write_weights(s)                                                       # (..., S, H*M)
        if valid is not None:
            w = w * valid
        return self.add_up(w, v)

    def add_up(self, w, v):
        """Weights (..., S, H*M), values (..., S, H*E) -> their sums (..., H, M, E), float32."""
        return torch.matmul(self.heads(w).mT.to(v.dtype), self.heads(v)).float()

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

        share = self.slot_shares(q, torch.matmul(q, num.mT), scale)                # (..., H, S, M)
        y = torch.matmul(share.to(q.dtype), num)                                   # (..., H, S, E)
        return y.transpose(-3, -2).flatten(-2)                                     # (..., S, H*E)

    def slot_shares(self, q, products, scale):
        """The products q.N (..., S, M), 1 / rms(N) -> what multiplies each slot's N in the answer.

        Attention over the slots: by what they hold, and by their names. The softmax is made by
        hand, as torch's is slow over few numbers.
        """
        name = torch.matmul(q, self.slot_key.to(q.dtype).mT)                       # (..., S, M)
        score = (products * scale + name) * q.shape[-1] ** -0.5
        share = torch.exp(score - score.amax(-1, keepdim=True).detach())
        return share / share.sum(-1, keepdim=True) * scale

    # ---- the memory of the clean stream ----------------------------------------------------------

    def read_causal(self, q, v, s, num=None):
        """Every token reads the state behind itself: q, v (B, T, H*E), s (B, T, H*M), all behind
        the state num (B, H, M, E) -> (B, T, H*E), the state behind the last token.

        read_one_by_one says the same in a few lines. Here no token's state is made. In a chunk of
        c tokens, behind its half, take of the state N_i of token i
            U_i = N_i / keep(i - half) = U + sum_{j <= i} a_j v_j,    a_j = w_j / keep(j - half),
        the state up to a factor, which a read does not feel. All that a read uses of it follows
        from products of the chunk's q and v with its v and with U:
            q_i.U_i = q_i.U + sum_{j <= i} (q_i.v_j) a_j             as in linear attention
            |U_i|^2 = |U|^2 + sum_{j <= i} (2 a_j v_j.U_{j-1} + a_j^2 v_j.v_j)
            sum_m share_m U_im = share.U + sum_{j <= i} (share.a_j) v_j
        """
        T = q.shape[1]
        if T == 1:
            state = self.write(v, s)                                               # (B, H, M, E)
            if num is not None:
                state = num * self.decay_factor(1) + state
            return self.read(q, state), state
        if self.dm < SLIM * self.H:
            return self.read_states(q, v, s, num)
        if q.dtype is torch.float16:  # whose range the sums leave
            with torch.autocast(q.device.type, enabled=False):
                return self.read_causal(q.float(), v.float(), s, num)

        # the chunks, and what their tokens write
        c = min(T, CHUNK)
        half = c // 2
        q, v, s = (self.chunks(x, c) for x in (q, v, s))                           # (B, g, H, c, .)
        place = torch.arange(c, device=q.device)
        grown = self.decay_factors(half - place, signed=True).transpose(1, 2)      # (H, c, M)
        a = write_weights(s) * grown                                               # (B, g, H, c, M)
        a_low = a.to(v.dtype)
        sums = torch.matmul(a_low.mT, v).float()                                   # (B, g, H, M, E)

        # U of each chunk, from the states before the chunks
        own = sums * self.decay_factor(c - 1 - half)
        if num is None:
            before = self.prefix(own, c)
        else:
            before = self.prefix(torch.cat((num[:, None], own), dim=1), c)[:, 1:]
        start = before * self.decay_factor(half + 1)                               # (B, g, H, M, E)
        start_low = start.to(v.dtype)
        last = (T - 1) % c                                                         # its place
        after = (start[:, -1] + sums[:, -1]) * self.decay_factor(last - half)

        # q.U and v.U of each token, (B, g, H, c, M)
        earlier = (place[:, None] > place).to(v.dtype)                             # (c, c)
        up_to = (place[:, None] >= place).to(v.dtype)
        both = torch.cat((q, v), dim=-2)                                           # (..., 2c, E)
        pairs = torch.matmul(both, v.mT) * torch.cat((up_to, earlier))             # (..., 2c, c)
        products = torch.matmul(pairs, a_low).float() + torch.matmul(both, start_low.mT).float()
        q_state, v_state = products.split(c, dim=-2)

        # 1 / rms(U); where the terms cancel, |U|^2 is not below their rounding, and |N| >= 1e-10
        length = torch.linalg.vector_norm(v, dim=-1, keepdim=True, dtype=torch.float32)
        first = start.square().sum(-1).unsqueeze(-2)                               # (B, g, H, 1, M)
        terms = first + (a * length).square().cumsum(-2)
        square = terms + 2 * (a * v_state).cumsum(-2)
        least = terms * torch.finfo(v.dtype).eps + 1e-20 * grown.square()
        # a quotient of roots, as the derivative of a root of the quotient may leave the range
        scale = q.shape[-1] ** 0.5 / torch.maximum(square, least.detach()).sqrt()

        # the answer, (B, g, H, c, E), and back to the order of the tokens
        share = self.slot_shares(q, q_state, scale).to(v.dtype)                    # (..., c, M)
        pairs = torch.matmul(share, a_low.mT) * up_to                              # (..., c, c)
        y = torch.matmul(pairs, v) + torch.matmul(share, start_low)
        return y.transpose(2, 3).flatten(-2).flatten(1, 2)[:, :T], after

    def read_states(self, q, v, s, num):
        """The same, and every token's state is made: for slim heads. When the terms of a sum nearly
        cancel, |U|^2 has lost twice as many digits as U.
        """
        own = self.write(v.unsqueeze(2), s.unsqueeze(2))                           # (B, T, H, M, E)
        if num is None:
            num = torch.zeros_like(own[:, 0])
        own = torch.cat((num[:, None], own), dim=1)                                # (B, T + 1, ...)
        states = own + self.decay_factor(1) * self.prefix(own, 1)
        return self.read(q.unsqueeze(2), states[:, 1:]).squeeze(2), states[:, -1]

    def read_each(self, q, v, s, num):
        """The same for a few tokens in decoding, and every token's state (B, T, H, M, E) is the
        answer's second part.
        """
        T = q.shape[1]
        if T > CHUNK:  # beyond that, the factors leave float32's range
            raise ValueError(f"{T} tokens are tried at once, and {CHUNK} is the most")
        w = write_weights(s).unflatten(-1, (self.H, self.M, 1))                    # (B, T, H, M, 1)
        v = v.float().unflatten(-1, (self.H, 1, -1))                               # (B, T, H, 1, E)
        place = torch.arange(1, T + 1, device=v.device).view(T, 1, 1, 1)
        fade = torch.exp(-place * self.decay_rate().unsqueeze(-1))                 # (T, H, M, 1)
        states = ((w / fade * v).cumsum(1) + num[:, None]) * fade                  # (B, T, H, M, E)
        return self.read(q.unsqueeze(2), states).squeeze(2), states

    def read_one_by_one(self, q, v, s, num):
        """What read_causal computes, by its definition, token by token: the tests' reference."""
        answers = []
        for i in range(q.shape[1]):
            here = slice(i, i + 1)
            num = num * self.decay_factor(1) + self.write(v[:, here], s[:, here])
            answers.append(self.read(q[:, here], num))
        return torch.cat(answers, dim=1), num

    def chunks(self, x, c):
        """(B, T, H*X) -> (B, g, H, c, X), zero behind the last token."""
        x = F.pad(x, (0, 0, 0, -x.shape[1] % c))
        return self.heads(x.unflatten(1, (-1, c)))

    def states_at(self, v, s, rows):
        """The clean stream's state at each opening, from what its rows write: v (B, T, H*E),
        s (B, T, H*M) -> (B, n, H, M, E).
        """
        # the start
        own = self.write(v[:, :1], s[:, :1])[:, None]                              # (B, 1, H, M, E)
        fade = self.decay_factors(rows.opens).movedim(-1, 0).unsqueeze(-1)         # (n, H, M, 1)
        start = fade * own
        if rows.count == 1:
            return start

        # the tokens, in groups of S that end where the next block opens
        row = rows.between.clamp(min=0).flatten()
        w = write_weights(s.index_select(1, row))
        w = w.unflatten(1, rows.between.shape)                                     # (B, n-1, S, .)
        place = torch.arange(rows.block, device=v.device)
        fade = self.decay_factors(rows.block - 1 - place).flatten(0, 1).mT         # (S, H*M)
        w = w * fade * (rows.between >= 1).unsqueeze(-1)                           # (B, n-1, S, .)
        v = v.index_select(1, row).unflatten(1, rows.between.shape)                # (B, n-1, S, .)
        groups = F.pad(self.add_up(w, v), (0, 0) * 3 + (0, 1))                     # (B, n, H, M, E)
        return start + self.prefix(groups, rows.block)

    # ---- decay and sums over earlier groups ------------------------------------------------------

    def decay_rate(self):
        return torch.exp(-self.decay.float()).clamp(max=FASTEST)                   # (H, M)

    def decay_factor(self, tokens):
        """What a slot still holds after so many further tokens: exp(-tokens / length) -> (H, M, 1).
        """
        return torch.exp(-tokens * self.decay_rate()).unsqueeze(-1)

    def decay_factors(self, tokens, signed=False):
        """The same for a tensor of numbers -> (H, M, *its shape): 0 where one is negative, if it is
        not signed.
        """
        rate = self.decay_rate().view(self.H, self.M, *(1,) * tokens.dim())        # (H, M, 1, ...)
        if signed:
            return torch.exp(-tokens * rate)
        return torch.exp(-tokens.clamp(min=0) * rate) * (tokens >= 0)

    def prefix(self, own, block):
        """Sums over earlier groups of `block` tokens: own (B, n, H, M, E), each faded to its
        group's end -> same shape, at b the total of groups < b, faded to the end of b - 1.

        Many groups are added up in groups of c, then those: n c + (n / c)^2 products instead of
        n^2.
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

    # ---- a layer's way in and out ----------------------------------------------------------------

    def project(self, h):
        """h (R, D) -> gate, up, q, v, s."""
        sizes = [2 * self.ff, 2 * self.dm + self.H * self.M]
        feed_forward, memory = self.in_proj(h).split(sizes, dim=-1)
        # decoding with bf16 weights: small bf16 products are slow on CPUs
        if not torch.is_autocast_enabled(h.device.type):
            memory = memory.float()
        gate, up = feed_forward.chunk(2, dim=-1)
        q, v, s = memory.split([self.dm, self.dm, self.H * self.M], dim=-1)
        return gate, up, q, v, s

    def mix(self, x, gate, up, memory):
        """Both branches' results into one product, added to x."""
        feed_forward = F.silu(gate) * up
        y = torch.cat((feed_forward, memory.to(up.dtype)), dim=-1)                 # (R, F + H*E)
        return self.out_proj.residual_add(x, y, self.dropout)

    def convolve(self, h, rows, halo):
        """h (R, D) behind a halo (B, r + 1, D) -> (R, D), the halo behind the clean rows; if each
        row's is wanted, all rows (B, r + 1 + T, D).
        """
        clean, noisy = rows.split(h)
        seen = torch.cat((halo.to(h.dtype), clean), dim=1)                         # (B, r+1+T, D)
        parts = []
        if rows.clean:
            parts.append(self.conv.causal(seen[:, 1:]))                            # (B, T, D)
        if rows.count:
            if rows.valid is not None:
                noisy = noisy * rows.valid
            halos = seen.index_select(1, rows.halo)                                # (B, n*r, D)
            halos = halos.view(-1, self.conv.reach, h.shape[-1])
            parts.append(self.conv(noisy.flatten(0, 1), halos))                    # (B*n, S + 1, D)
        if rows.each:
            return rows.join(parts), seen
        return rows.join(parts), seen[:, -halo.shape[1]:]

    def streams(self, x, rows, num=None, halo=None):
        """Both streams, x (R, D), behind a frozen state, or at the beginning of a training row ->
        x, and the state behind the clean rows.
        """
        h = self.norm(x)
        if halo is None:
            halo = h.new_zeros(rows.batch, self.conv.reach + 1, h.shape[-1])
        h, halo_after = self.convolve(h, rows, halo)
        gate, up, q, v, s = self.project(h)
        q_clean, q_noisy = rows.split(q)
        v_clean, v_noisy = rows.split(v)
        s_clean, s_noisy = rows.split(s)

        num_after = num
        answers = []
        if rows.each:
            y, num_after = self.read_each(q_clean, v_clean, s_clean, num)          # (B, T, H*E)
            answers.append(y)
        elif rows.clean:
            y, num_after = self.read_causal(q_clean, v_clean, s_clean, num)        # (B, T, H*E)
            answers.append(y)
        if rows.count:
            if num is None:
                context = self.states_at(v_clean, s_clean, rows)                   # (B, n, H, M, E)
            else:
                context = num_after[:, None]
            own = self.write(v_noisy, s_noisy, rows.writes)                        # (B, n, H, M, E)
            answers.append(self.read(q_noisy, own + context))                      # (B, n, S+1, .)
        return self.mix(x, gate, up, rows.join(answers)), num_after, halo_after

    def forward(self, x, rows):
        """What training calls, compiles and recomputes."""
        return self.streams(x, rows)[0]


class EcoHybrid(Denoiser):
    """The denoiser; its methods are the protocol at the top of model.py."""
    layer_type = EcoLayer

    # ---- training --------------------------------------------------------------------------------

    def rows_of_step(self, x0, xt, block, first, with_clean):
        B, T = x0.shape
        read = shifted(x0, self.cfg.mask_id)                                       # (B, T)
        if xt is None:
            rows = Rows(B, T)
            return read.flatten(), lambda x: (rows.split(x)[0], None), rows
        reach = self.layers[0].conv.reach
        rows = Rows.of_training(B, T, block, first, with_clean, reach, x0.device)
        noisy = self.noisy_ids(xt, read, rows)                                     # (B, n, S + 1)
        ids = torch.cat((read[:, :rows.clean].flatten(), noisy.flatten()))         # (R,)

        def answers(x):
            clean, noisy = rows.split(x)
            noisy = noisy[:, :, :-1].flatten(1, 2)
            noisy = noisy[:, rows.before:rows.before + T]                          # (B, T, D)
            return (clean if with_clean else None), noisy
        return ids, answers, rows

    def rows_of_vectors(self, vectors):
        B, T, _ = vectors.shape
        reach = self.layers[0].conv.reach
        rows = Rows.of_training(B, T, T, T, False, reach, vectors.device)
        noisy = torch.cat((self.starts(vectors, 1), vectors), dim=1).unsqueeze(1)  # (B, 1, T+1, D)
        x = rows.join((self.starts(vectors, 1), noisy))                            # (R, D)
        return x, lambda x: rows.split(x)[1][:, 0, 1:], rows

    def noisy_ids(self, xt, read, rows):
        """The ids of the noisy blocks, (B, n, S + 1): in front the token behind which each opens.
        """
        after = -(rows.before + xt.shape[1]) % rows.block
        ids = F.pad(xt, (rows.before, after), value=self.cfg.pad_id)
        ids = ids.unflatten(1, (-1, rows.block))                                   # (B, n, S)
        ids = torch.cat((read[:, rows.opens].unsqueeze(-1), ids), dim=-1)
        ids[:, 0, rows.before] = self.cfg.mask_id  # the start stands right before the first token
        return ids

    # ---- decoding --------------------------------------------------------------------------------

    def states(self, xt, cache, depth=None):
        B, S = xt.shape
        rows = Rows.behind(B, 0, S, self.layers[0].conv.reach, xt.device)
        x = self.head.embed(torch.cat((cache.front, xt), dim=1).flatten())         # (B*(S + 1), D)
        for layer, num, halo in zip(self.layers[:depth], cache.num, cache.halo, strict=False):
            x, _, _ = layer.streams(x, rows, num, halo)
        return self.exits(rows.split(x)[1][:, 0, :-1], depth)                      # (B, S, D)

    def new_cache(self, batch, length=0):
        device = self.head.weight.device
        cache = EcoCache(self.cfg, batch, device, torch.float32)
        self.step(torch.full((batch, 1), self.cfg.mask_id, device=device), cache)
        return cache

    def step(self, x0, cache):
        rows = Rows(*x0.shape)
        x = self.read_on(x0.flatten(), x0, rows, cache)
        return self.exits(rows.split(x)[0])

    def try_step(self, x0, cache):
        rows = Rows(*x0.shape, each=True)
        x, nums, halos = self.rows_behind(x0.flatten(), rows, cache)
        cache.tried = (x0, torch.stack(nums), torch.stack(halos))
        return self.exits(rows.split(x)[0])

    def step_and_states(self, x0, xt, cache):
        B, S = xt.shape
        rows = Rows.behind(B, x0.shape[1], S, self.layers[0].conv.reach, xt.device)
        noisy = torch.cat((x0[:, -1:], xt), dim=1)                                 # (B, S + 1)
        x = self.read_on(torch.cat((x0.flatten(), noisy.flatten())), x0, rows, cache)
        return self.exits(rows.split(x)[1][:, 0, :-1])

    def read_on(self, ids, x0, rows, cache):
        """The rows of these ids (R,) behind the cache; the clean ones x0 (B, T) join it ->
        (R, D).
        """
        x, nums, halos = self.rows_behind(ids, rows, cache)
        cache.num = torch.stack(nums)
        cache.halo = torch.stack(halos)
        cache.front = x0[:, -1:]
        cache.length += x0.shape[1]
        return x

    def rows_behind(self, ids, rows, cache):
        """The rows of these ids (R,) behind the cache -> (R, D), and for each layer N and the halo
        behind the clean ones.
        """
        x = self.head.embed(ids)
        nums, halos = [], []
        for layer, num, halo in zip(self.layers, cache.num, cache.halo, strict=True):
            x, num_after, halo_after = layer.streams(x, rows, num, halo)
            nums.append(num_after)
            halos.append(halo_after)
        return x, nums, halos
