"""Attention of the transformer: its variants behind one table, the one call of the kernel, and the
caches of keys and values.

    attention_of(cfg)               # the module that cfg.attn names
    CACHES["fp32"](cfg, rows, room, device)

Used by model.py. A variant says how rows become queries, keys and values; what they see is the same
for all. mha, gqa and bottleneck are one class: their widths, which model_config.attention_heads
gives, are all that differs. Options that each of them may have:
    null_attn       a learned key of no token, with the value 0, in front of all others: who finds
                    nothing attends to it. It is not turned, as it stands nowhere
    tie_qk          queries are the keys of their rows: one projection for both
    learned_temp    each head multiplies its scores by a learned number, 1 at the start

Legend: B batch, N rows of any kind, T clean rows, S block, C positions of the frozen context, D
width, H heads of queries, K heads of keys, E numbers of a head's key, F of its value.
"""
import torch
import torch.nn.functional as F
from torch import nn

from layers import Linear, rotate
from model_config import attention_heads, cache_bytes_per_token

MASK = 2**21        # numbers of a mask at most, unless 16 rows need more


def for_all_layers(mask, weight):
    """A bool mask as what is added to scores, 0 or -inf, in the type of the products with weight.
    Of a bool mask the kernel makes the same in every layer, and the backward pass keeps each.
    """
    device = mask.device.type
    dtype = weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def attend(q, k, v, scale, mask=None, causal=False):
    """q (N,H,Tq,E), k (N,K,Tk,E), v (N,K,Tk,F) -> (N,H,Tq,F). mask (Tq,Tk): bool, or what
    for_all_layers makes of it.

    causal: a query sees the keys up to its own, which are the last Tq ones.
    """
    new = q.shape[2]
    old = k.shape[2] - new
    if not causal or not old or new == 1:
        return kernel(q, k, v, scale, mask, causal and not old)

    # the kernel's own causal mask would begin at the first key; a mask of few rows at a time
    parts = []
    rows = max(16, MASK // k.shape[2])
    for lo in range(0, new, rows):
        hi = min(new, lo + rows)
        seen = old + hi
        mask = torch.ones(hi - lo, seen, dtype=torch.bool, device=q.device).tril(old + lo)
        part = kernel(q[:, :, lo:hi], k[:, :, :seen], v[:, :, :seen], scale, mask, False)
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, dim=2)


def kernel(q, k, v, scale, mask, causal):
    """The one call of the attention kernel. Those that make no table of scores are choosy:

    - they want keys and values of one width, on CUDA a multiple of 8: zeros fill up what is
      missing, which changes nothing;
    - they want neighbouring numbers: a tensor whose last stride is not 1, as torch.cat of single
      numbers makes it, is copied;
    - with a mask, CUDA's know no heads that share a key: each group of heads becomes a row of its
      own, in which all heads have the one key without a copy of it.
    """
    width = v.shape[-1]
    filled = kernel_width(q.shape[-1], width, q.device.type)
    q, k, v = (fill_up(x, filled) for x in (q, k, v))
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        mask = mask.to(q.dtype)
    groups = q.shape[1] // k.shape[1]
    apart = mask is not None and groups > 1
    if apart:
        rows = len(q)
        q = q.unflatten(1, (-1, groups)).flatten(0, 1)                 # (N x K, H / K, Tq, E)
        k, v = (x.flatten(0, 1)[:, None].expand(-1, groups, -1, -1) for x in (k, v))
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    if apart:
        y = y.unflatten(0, (rows, -1)).flatten(1, 2)                   # (N, H, Tq, F)
    return y[..., :width]


def kernel_width(key, value, device):
    """Numbers of a head that the kernel gets."""
    width = max(key, value)
    if device == "cuda":
        width += -width % 8
    return width


def fill_up(x, width):
    """x (..., E) with zeros behind it, (..., width), its last numbers beside each other."""
    if x.shape[-1] < width:
        return F.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


# --------------------------------------------------------------------------------------------------
# the variants

class MultiHead(nn.Module):
    """All heads in one projection in and one out; no bias and no norm on q and k, so that
    llama.cpp's graph can run mha and gqa. Positions turn the whole of q and k.
    """

    def __init__(self, cfg):
        super().__init__()
        self.heads = attention_heads(cfg)
        queries = self.heads.queries * self.heads.key
        keys = self.heads.keys * self.heads.key
        values = self.heads.keys * self.heads.value
        self.parts = [keys, values] if cfg.tie_qk else [queries, keys, values]
        self.qkv_proj = Linear(cfg.d_model, sum(self.parts))
        self.out_proj = Linear(self.heads.queries * self.heads.value, cfg.d_model)
        self.scale = self.heads.key ** -0.5
        self.null_key = None
        if cfg.null_attn:
            self.null_key = nn.Parameter(torch.zeros(self.heads.keys, self.heads.key))
        self.log_temperature = None
        if cfg.learned_temp:
            self.log_temperature = nn.Parameter(torch.zeros(self.heads.queries))

    def project(self, x, table):
        """x (N, T, D) -> q (N, H, T, E), k (N, K, T, E), v (N, K, T, F), q and k at their places.
        """
        *q, k, v = self.qkv_proj(x).split(self.parts, dim=-1)
        k = self.turn(self.apart(k, self.heads.keys), table)
        v = self.apart(v, self.heads.keys)
        q = self.turn(self.apart(q[0], self.heads.queries), table) if q else k
        return self.tempered(q), k, v

    @staticmethod
    def apart(x, heads):
        """(N, T, heads x E) -> (N, heads, T, E)."""
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def turn(self, x, table):
        """Give the rows of x (N, H, T, E) their positions."""
        return rotate(x, table)

    def tempered(self, q):
        """q (N, H, T, E), times each head's own number."""
        if self.log_temperature is None:
            return q
        factor = self.log_temperature.exp().to(q.dtype)
        return q * factor[:, None, None]

    def join(self, y):
        """(N, H, T, F) -> (N, T, D)."""
        return self.out_proj(y.transpose(1, 2).flatten(2))

    # ---- what a row sees -------------------------------------------------------------------------

    def behind(self, context, k, v):
        """The null key, old keys and values, then the new ones (B, K, C + S, E)."""
        keys, values = [k], [v]
        if context is not None:
            old_k, old_v = context
            keys.insert(0, old_k.to(k.dtype))
            values.insert(0, old_v.to(k.dtype))
        if self.null_key is not None:
            null = self.null_key.to(k.dtype).unsqueeze(1)                          # (K, 1, E)
            keys.insert(0, null.expand(len(k), -1, -1, -1))
            values.insert(0, v.new_zeros(*v.shape[:2], 1, v.shape[3]))             # (B, K, 1, F)
        if len(keys) == 1:
            return k, v
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def read_text(self, q, k, v):
        """Clean rows with nothing before them, causal -> (B, H, T, F)."""
        if self.null_key is None:
            return attend(q, k, v, self.scale, causal=True)
        # a row in front, which sees the null key alone: without it the kernel would need a mask
        q = F.pad(q, (0, 0, 1, 0))
        return attend(q, *self.behind(None, k, v), self.scale, causal=True)[:, :, 1:]

    def next_rows(self, x, table, context=None):
        """The next clean rows x (B, T, D) behind a frozen context -> (output, their k, their v)."""
        q, k, v = self.project(x, table)
        if context is None:
            y = self.read_text(q, k, v)
        else:
            y = attend(q, *self.behind(context, k, v), self.scale, causal=True)
        return self.join(y), k, v

    def block(self, x, table, context):
        """One noisy block with its front row x (B, S + 1, D) behind a frozen context -> output."""
        q, k, v = self.project(x, table)
        keys, values = self.behind(context, k[:, :, 1:], v[:, :, 1:])
        return self.join(attend(q, keys, values, self.scale))

    def streams(self, x, table, clean, mask):
        """Training: x (B, T + N, D), T clean rows, then the noisy ones, which see what mask says:
        of the null key, the clean rows and the noisy ones.
        """
        q, k, v = self.project(x, table)
        sizes = [clean, x.shape[1] - clean]
        q_clean, q_noisy = q.split(sizes, dim=2)
        k_clean, k_noisy = k.split(sizes, dim=2)
        v_clean, v_noisy = v.split(sizes, dim=2)
        y = self.read_text(q_clean, k_clean, v_clean)                              # (B, H, T, F)
        if not sizes[1]:
            return self.join(y)
        if mask is None:  # one block: its front row leaves
            k = torch.cat((k_clean, k_noisy[:, :, 1:]), dim=2)
            v = torch.cat((v_clean, v_noisy[:, :, 1:]), dim=2)
        noisy = attend(q_noisy, *self.behind(None, k, v), self.scale, mask)        # (B, H, N, F)
        return self.join(torch.cat((y, noisy), dim=2))


class Decoupled(MultiHead):
    """A score is the sum of two, each with its own scale: one of what tokens mean, without
    positions, and one that positions turn. Both are parts of one q and one k, the semantic first.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        positional = self.heads.turned
        semantic = self.heads.key - positional
        self.widths = [semantic, positional]
        self.scale = 1.0                                    # the queries carry both scales

    def project(self, x, table):
        q, k, v = super().project(x, table)
        semantic, positional = q.split(self.widths, dim=-1)
        semantic = semantic * self.widths[0] ** -0.5
        positional = positional * self.widths[1] ** -0.5
        return torch.cat((semantic, positional), dim=-1), k, v                     # (N, H, T, E)

    def turn(self, x, table):
        semantic, positional = x.split(self.widths, dim=-1)
        return torch.cat((semantic, rotate(positional, table)), dim=-1)


VARIANTS = {
    "mha": MultiHead,
    "gqa": MultiHead,
    "gqa_kv2": MultiHead,
    "bottleneck": MultiHead,
    "decoupled": Decoupled,
}


def attention_of(cfg):
    """The attention of one layer that the configuration names."""
    return VARIANTS[cfg.attn](cfg)


# --------------------------------------------------------------------------------------------------
# the frozen context

class KVCache:
    """The frozen context, preallocated: keys (L, B, K, room, E) and values (L, B, K, room, F) of L
    layers. A text that is longer than the room slides: the oldest positions leave. `held` counts
    the positions that are there; `length` counts all rows that were ever read, the start included,
    which is where rotary positions go on.
    """
    stored = "fp32"                 # of model_config.STORED
    dtype = torch.float32
    tensors = ("k", "v")            # the names of those that hold something for each position

    def __init__(self, cfg, batch, room, device):
        heads = attention_heads(cfg)
        shape = (cfg.n_layers, batch, heads.keys, room)
        self.cfg = cfg
        self.k = torch.zeros(*shape, heads.key, device=device, dtype=self.dtype)
        self.v = torch.zeros(*shape, heads.value, device=device, dtype=self.dtype)
        self.front = None               # the last token that was read (B, 1)
        self.tried = None               # the tokens that try_step read (B, T)
        self.length = 0
        self.held = 0

    def all_tensors(self):
        return [getattr(self, name) for name in self.tensors]

    @property
    def nbytes(self):
        return sum(t.numel() * t.element_size() for t in self.all_tensors())

    @property
    def bytes_per_token(self):
        """Of one row of the batch, in all layers."""
        return cache_bytes_per_token(self.cfg, self.stored)

    def select(self, rows):
        """Keep only these rows of the batch."""
        for name in self.tensors:
            setattr(self, name, getattr(self, name)[:, rows])
        self.front = self.front[rows]

    def context(self, layer):
        """What a layer sees of it: keys (B, K, C, E) and values (B, K, C, F), or None while nothing
        is held.
        """
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
            for t in self.all_tensors():
                t[:, :, :, :self.held] = t[:, :, :, gone:gone + self.held].clone()

    def write(self, layer, k, v):
        """Behind what is held; it counts only after advance(), when all layers have written."""
        end = self.held + k.shape[2]
        self.k[layer, :, :, self.held:end] = k
        self.v[layer, :, :, self.held:end] = v

    def keep(self, tokens):
        """The first so many tokens of the last try_step join the context: they stand behind it."""
        self.advance(self.tried[:, :tokens])
        self.tried = None

    def advance(self, x0):
        self.length += x0.shape[1]
        self.held += x0.shape[1]
        self.front = x0[:, -1:]


class BF16Cache(KVCache):
    """Half of the memory: what bf16 products made fits exactly, what float32 made is rounded."""
    stored = "bf16"
    dtype = torch.bfloat16


class Int8Cache(KVCache):
    """A byte a number: each head's key, and each head's value, has a scale of its own in every
    position. An approximation; docs/experiments/decoding.md says what it costs.
    """
    stored = "int8"
    dtype = torch.int8
    tensors = ("k", "v", "k_scale", "v_scale")

    def __init__(self, cfg, batch, room, device):
        super().__init__(cfg, batch, room, device)
        shape = (*self.k.shape[:4], 1)
        self.k_scale = torch.zeros(shape, device=device, dtype=torch.float16)      # (L,B,K,room,1)
        self.v_scale = torch.zeros(shape, device=device, dtype=torch.float16)

    @staticmethod
    def rounded(x):
        """x (B, K, S, E) -> (int8 of the same shape, scales (B, K, S, 1) float16)."""
        x = x.float()
        scale = x.abs().amax(-1, keepdim=True) / 127
        scale = scale.clamp(min=torch.finfo(torch.float16).tiny).half()
        # divided by the scale that is kept, so that its own rounding costs nothing
        whole = (x / scale.float()).round().clamp(-127, 127)
        return whole.to(torch.int8), scale

    def write(self, layer, k, v):
        k, k_scale = self.rounded(k)
        v, v_scale = self.rounded(v)
        super().write(layer, k, v)
        end = self.held + k.shape[2]
        self.k_scale[layer, :, :, self.held:end] = k_scale
        self.v_scale[layer, :, :, self.held:end] = v_scale

    def context(self, layer):
        held = super().context(layer)
        if held is None:
            return None
        k, v = held
        k_scale = self.k_scale[layer, :, :, :self.held].float()                    # (B, K, C, 1)
        v_scale = self.v_scale[layer, :, :, :self.held].float()
        return k * k_scale, v * v_scale


CACHES = {cache.stored: cache for cache in (KVCache, BF16Cache, Int8Cache)}
