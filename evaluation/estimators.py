"""What held-out text costs a model, in nats: the estimators behind evaluate.py, and what train.py
measures while it runs.

    pieces = cut(documents, 512)              # documents: lists of ids, each begins with BOS
    bound(model, pieces, 64, draws=4)         # -> nats of each document, mean CE by mask rate
    left_to_right(model, prompt, new)         # -> nats of the new tokens

Every document is scored by itself. BOS is given, as it is whenever text is sampled; EOS counts. A
document longer than the training length is cut into windows: each but the last starts where the one
before ended, without context; the last one ends with the document, and what it shares with the one
before is given, not scored. So every token counts once. An error is a standard error over documents
(of a ratio: nats of all / tokens, bytes or letters of all).

Legend: R rows, L tokens of a window, S block, n blocks, D documents, N scored tokens.
"""
import contextlib
import math
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

import gaussian
import masking
from masking import hide, step_generator, strata
from text.tokenizer import EOS, PAD

CHUNK = 512                   # logits that are there at once
BINS = 10                     # of the curve of CE by mask rate
RATES = (0.15, 0.5, 0.85)     # of infilling


# ---- windows of one stream, for training and for comparing settings ------------------------------

def held_out(
    model, rows, blocks, seed, batch, draws, ranks=None, piece=contextlib.nullcontext, asked=None
):
    """Held-out rows (R, T) -> {block: {"nats": bound per token, "se": standard error over rows,
    "masked_mean": plain CE}}.

    ranks: the processes that share the rows; each gets the figures of all of them. piece, asked: as
    in row_bounds.
    """
    result = {}
    part = ranks.shard_rows(len(rows)) if ranks else slice(None)
    row_bounds = gaussian.row_bounds if model.cfg.gaussian else masking.row_bounds
    for block in blocks:
        passes = []
        for draw in range(draws):
            passes.append(row_bounds(
                model, rows, block, None, seed + draw, batch, part, piece, asked
            ))
        sums = torch.stack(passes, dim=1)                                   # (R, draws, 3)
        if ranks:
            sums = ranks.gather_rows(sums, len(rows))
        per_row = sums[..., 0].mean(1)                                      # (R,)
        _, plain, masked_count = sums.sum(0).unbind(1)                      # (draws,) each
        error = 0.0
        if len(per_row) > 1:
            error = float(per_row.std() / math.sqrt(len(per_row)))
        result[block] = {
            "nats": float(per_row.mean()),
            "se": error,
            "masked_mean": float((plain / masked_count).mean()),
        }
    return result


def at_depth(model, depth):
    """The same model, leaving behind that many layers, as far as an estimator looks at it."""
    def early_states(xt, x0, block, first):
        return model.both_states(x0, xt, block, first, with_clean=False, early=depth)[1][1]

    def early_clean_states(x0):
        return model.both_states(x0, early=depth)[1][0]

    return SimpleNamespace(
        cfg=model.cfg,
        logits=model.logits,
        block_states=early_states,
        clean_states=early_clean_states,
    )


def bits_per_byte(nats_per_token, meta):
    """nats/token -> bits per byte of the raw validation text, of pairs that of the responses; None
    when the bytes were not recorded.
    """
    meta = meta | meta.get("pairs", {})
    if not meta.get("val_bytes"):
        return None
    return nats_per_token * meta["val_tokens"] / meta["val_bytes"] / math.log(2)


# ---- documents and their windows -----------------------------------------------------------------

class Piece(NamedTuple):
    """Windows of one length that are cut alike."""
    x0: torch.Tensor        # (R, L) ids
    given: int              # so many tokens at the beginning are known and not scored
    document: torch.Tensor  # (R,) the number of each window's document


def windows(tokens, length):
    """Where a document is cut: [(start, tokens of the window, how many of them are given)]."""
    if tokens <= length:
        return [(0, tokens, 1)]
    cuts = [(0, length, 1)]
    for start in range(length, tokens - length + 1, length):
        cuts.append((start, length, 0))
    rest = tokens % length
    if rest:
        cuts.append((tokens - length, length, length - rest))
    return cuts


def given_tokens(ids):
    """Tokens at the beginning of a document that are not scored: BOS, or the framed prompt of a
    pair, which ends with the pad's id (text/pairs.py).
    """
    return 1 + ids.index(PAD) if PAD in ids else 1


def cut(documents, length, device="cpu", framed=False):
    """Documents (lists of ids) -> [Piece]. framed: they are pairs, which are never cut."""
    groups = {}
    for number, ids in enumerate(documents):
        cuts = windows(len(ids), length)
        if framed:
            cuts = [(0, len(ids), given_tokens(ids))]
        for start, size, given in cuts:
            group = groups.setdefault((size, given), [])
            group.append((number, ids[start:start + size]))
    pieces = []
    for (_, given), group in sorted(groups.items()):
        x0 = torch.tensor([ids for _, ids in group], device=device)
        owners = torch.tensor([number for number, _ in group])
        pieces.append(Piece(x0, given, owners))
    return pieces


class Layout(NamedTuple):
    """How a window falls into blocks: the given tokens first, so that a block begins where scoring
    begins.
    """
    block: int
    first: int
    inside: torch.Tensor    # (n, S) bool: a token of the window
    scored: torch.Tensor    # (n, S) bool: one that is not given
    owner: torch.Tensor     # (L,) the block of each token


def lay_out(piece, block):
    L = piece.x0.shape[1]
    if block >= L:
        block = first = L
    else:
        first = piece.given % block or block
    before = block - first                      # empty places at the beginning of block 0
    n = 1 + math.ceil((L - first) / block)
    at = torch.arange(n * block) - before
    inside = (at >= 0) & (at < L)
    scored = (at >= piece.given) & (at < L)
    owner = (torch.arange(L) + before) // block
    return Layout(block, first, inside.view(n, block), scored.view(n, block), owner)


# ---- estimators ----------------------------------------------------------------------------------

@torch.no_grad()
def surprise(model, x0, masked, layout, score=None, batch=8):
    """CE (R, L) on the CPU at the scored positions (the masked ones, if none are named), 0
    elsewhere. In blocks of one token the clean stream is asked.
    """
    found = torch.zeros(x0.shape)
    if score is None:
        score = masked
    for start in range(0, len(x0), batch):
        part = slice(start, start + batch)
        x = x0[part]
        at = score[part].to(x0.device)
        if layout.block == 1:
            states = model.clean_states(x)[at]                                    # (N, D)
        else:
            xt = torch.where(masked[part].to(x.device), model.cfg.mask_id, x)
            states = model.block_states(xt, x, layout.block, layout.first)[at]
        found[part][at.cpu()] = cross_entropy(model, states, x[at]).cpu()
    return found


def cross_entropy(model, states, tokens):
    """-log p of tokens (N,) under states (N, D) -> (N,), the logits of CHUNK of them at once."""
    found = torch.empty(len(states), device=states.device)
    for start in range(0, len(states), CHUNK):
        part = states[start:start + CHUNK]
        end = start + len(part)
        # of few shapes, as oneDNN compiles and keeps a product for each
        part = F.pad(part, (0, 0, 0, -len(part) % masking.ROWS))
        z = model.logits(part).log_softmax(-1)[:end - start]                       # (N', V)
        found[start:end] = -z.gather(1, tokens[start:end, None])[:, 0]
    return found


def per_document(pieces, values):
    """values: per piece (R,) -> (D,) sums, float64."""
    documents = 1 + max(int(piece.document.max()) for piece in pieces)
    total = torch.zeros(documents, dtype=torch.float64)
    for piece, value in zip(pieces, values, strict=True):
        total.index_add_(0, piece.document, value.double())
    return total


def exact_counts(pieces, layouts, generator, part=0, parts=1, sampling="stratified"):
    """Masks of every piece: k of a block's L tokens, k uniform over 1..L and stratified over all
    windows and blocks.

    Yields (mask (R, L), weight (R, n), share hidden (R, n)). part of parts: that slice of the range
    of k, so that the draws of one window are strata too.
    """
    cells = []
    for piece, layout in zip(pieces, layouts, strict=True):
        cells.append(len(piece.x0) * len(layout.inside))
    grid = (part + strata(sum(cells), sampling, generator)) / parts
    for piece, layout, u in zip(pieces, layouts, grid.split(cells), strict=True):
        R = len(piece.x0)
        size = layout.scored.sum(-1)                                               # (n,)
        count = torch.ceil((1 - u.view(R, -1)) * size - 1e-9).long()               # (R, n)
        count = count.clamp(min=1).minimum(size)
        maskable = layout.scored.expand(R, *layout.scored.shape)                   # (R, n, S)
        mask = hide(count, maskable, 1.0, generator)
        yield mask[:, layout.inside], size / count.clamp(min=1), count / size.clamp(min=1)


def independent(pieces, layouts, generator, schedule):
    """The textbook estimator: t uniform for each window and block, each token hidden with chance 1
    - alpha(t), masking.weight.
    """
    for piece, layout in zip(pieces, layouts, strict=True):
        R = len(piece.x0)
        n, S = layout.inside.shape
        t = 1 - torch.rand(R, n, generator=generator, dtype=torch.float64)  # (R, n) in (0, 1]
        chance = (1 - masking.alpha(t, schedule))[..., None]
        mask = torch.rand(R, n, S, generator=generator) < chance
        mask &= layout.scored
        yield mask[:, layout.inside], masking.weight(t, schedule), None


def bound(model, pieces, block, draws, seed=0, batch=8):
    """The exact-count bound -> (nats of each document (D,), curve: [(mask rate up to, mean CE of
    masked tokens)], plain mean CE).

    Every token of a block weighs size / count, so the mean of the curve over the rates is the bound
    again. In blocks of one token: the exact NLL, and no curve.
    """
    layouts = [lay_out(piece, block) for piece in pieces]
    if block == 1:
        total = exact_nll(model, pieces, layouts, batch)
        return total, [], float(total.sum()) / scored_tokens(pieces)

    generator = step_generator(seed, 0, "bound")
    nats = 0
    sums, sizes = torch.zeros(BINS), torch.zeros(BINS)          # of the curve
    plain, masked_count = 0.0, 0
    for draw in range(draws):
        values = []
        masks = exact_counts(pieces, layouts, generator, draw, draws)
        for piece, layout, (mask, weight, share) in zip(pieces, layouts, masks, strict=True):
            ce = surprise(model, piece.x0, mask, layout, None, batch)              # (R, L)
            by_block = torch.zeros(weight.shape).index_add_(1, layout.owner, ce)
            by_block = by_block * weight                               # (R, n) size x mean CE
            values.append(by_block.sum(1))

            size = layout.scored.sum(-1).float().expand(share.shape)
            bin_of = (torch.ceil(share * BINS - 1e-6).long() - 1).clamp(min=0).flatten()
            sums.index_add_(0, bin_of, by_block.flatten())
            sizes.index_add_(0, bin_of, size.flatten())
            plain += float(ce.sum())
            masked_count += int(mask.sum())
        nats = nats + per_document(pieces, values) / draws
    curve = [((i + 1) / BINS, float(sums[i] / sizes[i])) for i in range(BINS) if sizes[i]]
    return nats, curve, plain / masked_count


def gaussian_bound(model, pieces, block, draws, seed=0, batch=8):
    """The bound of continuous diffusion, as `bound` gives the one of masks: nats of each document
    (D,), no curve, the plain mean of -log p over all shares of noise. Times are stratified over all
    windows, and the draws of one window are strata, too. There is one block, the whole window.
    Pairs were trained in rows of one length, with EOS behind the response, and so they are scored.
    """
    length = block if model.cfg.framed else 0
    generator = step_generator(seed, 0, "noisy bound")
    windows_of_pieces = [len(piece.x0) for piece in pieces]
    nats = 0
    plain = 0.0
    for draw in range(draws):
        u = strata(sum(windows_of_pieces), "stratified", generator)
        times = (1 - (draw + u) / draws).float().split(windows_of_pieces)
        values = []
        for piece, mine in zip(pieces, times, strict=True):
            end = piece.x0.shape[1]
            rows = F.pad(piece.x0, (0, max(0, length - end)), value=EOS)
            value = gaussian.window_nats(model, rows, piece.given, end, mine, generator, batch)
            values.append(value[:, :2].sum(1))
            plain += float(value[:, 2].sum()) / draws
        nats = nats + per_document(pieces, values) / draws
    return nats, [], plain / scored_tokens(pieces)


def exact_nll(model, pieces, layouts, batch):
    """-log p left to right -> nats of each document (D,)."""
    values = []
    for piece, layout in zip(pieces, layouts, strict=True):
        fresh = torch.arange(piece.x0.shape[1]) >= piece.given
        ce = surprise(model, piece.x0, fresh.expand(piece.x0.shape), layout, None, batch)
        values.append(ce.sum(1))
    return per_document(pieces, values)


def chain_rule(model, pieces, block, batch=8):
    """-log p left to right -> nats of each document (D,): a token is scored with all before it
    known and all after it in its block hidden; later blocks do not exist for it. One forward scores
    one token of every block, so it takes S of them.

    A real probability: the model that writes one token at a time in this order. In blocks of one
    token it is the clean stream's, in one pass.
    """
    if block == 1:
        return bound(model, pieces, 1, 1, batch=batch)[0]
    values = []
    for piece in pieces:
        layout = lay_out(piece, block)
        R, L = piece.x0.shape
        place = torch.arange(L) - piece.given
        fresh = place >= 0
        place = place % layout.block                            # (L,) inside its block
        value = torch.zeros(R)
        for i in range(min(layout.block, L - piece.given)):
            masked = (fresh & (place >= i)).expand(R, L)
            score = (fresh & (place == i)).expand(R, L)
            value += surprise(model, piece.x0, masked, layout, score, batch).sum(1)
        values.append(value)
    return per_document(pieces, values)


@torch.no_grad()
def infilling(model, pieces, seed=0, batch=8):
    """Hide a share of every window, both sides known -> {share: (best guesses that are right (D,),
    hidden tokens (D,))}.
    """
    found = {}
    for rate in RATES:
        generator = step_generator(seed, 0, f"{rate:.2f}")
        right, asked = [], []
        for piece in pieces:
            R, L = piece.x0.shape
            layout = lay_out(piece, L)
            size = int(layout.scored.sum())
            count = torch.full((R, 1), max(1, round(rate * size)))
            mask = hide(count, layout.scored.expand(R, 1, -1), 1.0, generator)[:, 0]   # (R, L)
            good = torch.zeros(mask.shape)
            for start in range(0, R, batch):
                part = slice(start, start + batch)
                x = piece.x0[part]
                m = mask[part].to(x.device)
                xt = torch.where(m, model.cfg.mask_id, x)
                states = model.block_states(xt, x, layout.block, layout.first)[m]     # (N, D)
                guesses = model.logits(states).argmax(-1)
                good[part][m.cpu()] = (guesses == x[m]).float().cpu()
            right.append(good.sum(1))
            asked.append(mask.sum(1))
        found[rate] = per_document(pieces, right), per_document(pieces, asked)
    return found


@torch.no_grad()
def left_to_right(model, prompt, new, frozen=True):
    """-log p of the new tokens, summed, everything before each of them known: the clean stream, in
    one pass.

    Not frozen (trained without blocks): the whole text is one block of the noisy stream, and what
    comes after token i is hidden.
    """
    ids = torch.tensor([[*prompt, *new]], device=model.device)                     # (1, P + N)
    P = len(prompt)
    if frozen:
        states = model.clean_states(ids)[0, P:]                                    # (N, D)
    else:
        canvas = ids.repeat(len(new), 1)
        for i in range(len(new)):
            canvas[i, P + i:] = model.cfg.mask_id
        states = model.block_states(canvas, canvas, ids.shape[1])                  # (N, P + N, D)
        at = torch.arange(len(new), device=ids.device)
        states = states[at, P + at]
    logp = model.logits(states).double().log_softmax(-1)                           # (N, V)
    return -float(logp.gather(1, ids[0, P:, None]).sum())


def scored_tokens(pieces):
    return sum(piece.x0.numel() - len(piece.x0) * piece.given for piece in pieces)


def compare(model, pieces, block, repeats, seed=0, batch=8):
    """The same bound in four ways, `repeats` times each, one forward per window -> {name: {"nats",
    "se", "variance"}}.

    All have the same mean. The variance is that of one pass over these windows: what the masks
    alone contribute. With t iid and tokens hidden independently it has no finite expectation:
    E[weight^2 x hidden] goes like the integral of 1/t.
    """
    layouts = [lay_out(piece, block) for piece in pieces]
    ways = {
        "exact count": exact_counts,
        "exact count, count iid": partial(exact_counts, sampling="uniform"),
    }
    for schedule in masking.SCHEDULES:
        ways[f"{schedule}, t iid"] = partial(independent, schedule=schedule)

    tokens = scored_tokens(pieces)
    found = {}
    for name, way in ways.items():
        generator = step_generator(seed, 0, "compar")
        passes = []
        for _ in range(repeats):
            total = 0.0
            masks = way(pieces, layouts, generator)
            for piece, layout, (mask, weight, _) in zip(pieces, layouts, masks, strict=True):
                ce = surprise(model, piece.x0, mask, layout, None, batch)
                total += float((ce * weight[:, layout.owner]).sum())
            passes.append(total / tokens)
        passes = torch.tensor(passes, dtype=torch.float64)
        found[name] = {
            "nats": float(passes.mean()),
            "se": float(passes.std() / math.sqrt(repeats)),
            "variance": float(passes.var()),
        }
    return found


# ---- from sums over documents to figures ---------------------------------------------------------

def ratio(values, units):
    """Sum of values / sum of units with its standard error over documents (delta method); no error
    from one document.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    units = torch.as_tensor(units, dtype=torch.float64)
    r = float(values.sum() / units.sum())
    n = len(values)
    if n < 2:
        return r, None
    squares = (values - r * units).square().sum()
    return r, float((squares * n / (n - 1)).sqrt() / units.sum())


def figures(nats, texts):
    """nats of each document, texts: {"tokens", "bytes", "chars": (D,) each} -> nats/token,
    bits/byte, bits/char with errors.
    """
    nats_per_token, error = ratio(nats, texts["tokens"])
    found = {
        "documents": len(nats),
        "tokens": int(sum(texts["tokens"])),
        "nats": nats_per_token,
        "se": error,
    }
    bits = nats / math.log(2)
    for name, unit in (("bits_per_byte", "bytes"), ("bits_per_char", "chars")):
        found[name], found[f"{name}_se"] = ratio(bits, texts[unit])
    return found
