"""What a long context is worth to a model: for evaluate.py --lengths and --needle.

    result = examine(model, saved, documents, tokenizer, args)       # printed as it comes

Both read held-out text left to right through the model's own cache, as it is stored
(--cache_dtype), and look at the exact -log p of tokens.

by_position  bits/byte of the tokens at positions 1 to 127, 128 to 255, ... of rows as long as the
             last length, beside the same tokens in rows of the trained length, which begin anew:
             what the text before them is worth, or costs where the model never was
needles      a needle, KEY VALUE, stands somewhere in held-out text, and behind the text stands KEY
             again: what does VALUE cost now, and is it the best guess? Key and value are pieces of
             held-out text that have nothing to do with each other; without the needle the same
             question shows what can be guessed

Legend: R rows, T tokens of a row, D width, N tokens that are scored.
"""
import math

import numpy as np
import torch

import config
from attention import CACHES
from common.console import UserError, say
from evaluation.estimators import cross_entropy, ratio
from sampling import fast, settings

READ = 512              # tokens of a text that join the cache at once
LEAST_ROWS = 8          # for an error that means something
KEY = 4                 # tokens of a key, and of a value
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDLES = 32            # questions at each depth of each length


def examine(model, saved, documents, tokenizer, args):
    """What --lengths and --needle ask for -> what --out_json holds of it."""
    if not hasattr(model, "new_cache"):
        raise UserError("--lengths and --needle need a checkpoint, not an exported folder")
    if model.cfg.framed:
        raise UserError(
            "--lengths and --needle read running text, and this model was trained on pairs: leave "
            "them out"
        )
    reason = settings.cannot_freeze(saved)
    if reason:
        raise UserError(f"--lengths and --needle read left to right, and {reason}")
    fast.store_cache(model, args.cache_dtype)
    trained = config.scored_length(saved)
    batch = saved.config["args"]["batch_size"]
    lengths = args.lengths_asked or [trained // 2, trained, 2 * trained]
    longest = lengths[-1]
    rows = rows_of(documents, longest, args.batches * batch * trained // longest)
    say(
        f"{saved.path}  step {saved.step}  trained on {trained} tokens, reads {len(rows)} rows of "
        f"{longest:,} held-out tokens left to right"
    )
    result = {"trained_length": trained, "rows": len(rows)}
    if args.lengths:
        nats = costs(model, rows, batch)                                           # (R, T - 1)
        result["lengths"] = by_position(model, rows, nats, lengths, trained, tokenizer, batch)
        if not is_exact(model):
            result["cache"] = cost_of_storage(model, rows, nats, batch)
    if args.needle:
        result["needle"] = needles(model, rows, lengths, batch, args.seed)
    return result


# ---- held-out text -------------------------------------------------------------------------------

def rows_of(documents, length, most):
    """The documents, one behind the other, cut into rows of so many tokens (R, T), `most` at most,
    from all over the text.
    """
    ids = np.concatenate(documents)
    count = len(ids) // length
    if count < 2:
        raise UserError(
            f"the held-out text has {len(ids):,} tokens, and two rows of {length} need "
            f"{2 * length:,}: give shorter --lengths or a longer --text"
        )
    rows = ids[:count * length].reshape(count, length)
    chosen = np.linspace(0, count - 1, min(count, max(most, LEAST_ROWS))).round().astype(int)
    return torch.from_numpy(rows[chosen].astype(np.int64))


def bytes_up_to(row, ends, tokenizer):
    """The bytes of the text that the first so many ids of a row stand for."""
    ids = row.tolist()
    return [len(tokenizer.decode(ids[:end]).encode()) for end in ends]


# ---- reading -------------------------------------------------------------------------------------

def is_exact(model):
    """Whether the cache holds what was computed, so that it does not matter in how many pieces a
    text is read.
    """
    return model.cfg.model == "primary" or model.cache_type is CACHES["fp32"]


@torch.no_grad()
def costs(model, rows, batch):
    """-log p of each token of rows (R, T) behind those before it -> (R, T - 1), float64.

    A cache that rounds is read token by token, as when text is written: so each token sees all
    those before it rounded.
    """
    piece = READ if is_exact(model) else 1
    found = torch.zeros(len(rows), rows.shape[1] - 1, dtype=torch.float64)
    for start in range(0, len(rows), batch):
        part = rows[start:start + batch].to(model.device)
        cache = model.new_cache(*part.shape)
        begin = 0
        for read in part[:, :-1].split(piece, dim=1):
            states = model.step(read, cache)                                       # (B, t, D)
            end = begin + read.shape[1]
            asked = part[:, begin + 1:end + 1].flatten()
            nats = cross_entropy(model, states.flatten(0, 1), asked)
            found[start:start + batch, begin:end] = nats.view_as(read).double().cpu()
            begin = end
    return found


def begun_anew(rows, length):
    """Rows (R, T) cut into rows of so many tokens; they divide T."""
    return rows.reshape(-1, length)


# ---- bits/byte by position -----------------------------------------------------------------------

def by_position(model, rows, nats, lengths, trained, tokenizer, batch):
    """rows (R, T) and what their tokens cost (R, T - 1) -> [figures of the tokens between two of
    the lengths]; prints them as a table.

    The first token of a row is given, in the long rows and in those that begin anew.
    """
    longest = rows.shape[1]
    anew = None
    if longest > trained and longest % trained == 0:
        short = costs(model, begun_anew(rows, trained), batch)
        first = torch.full((len(short), 1), math.nan, dtype=torch.float64)
        anew = torch.cat((first, short), dim=1).reshape(rows.shape)[:, 1:]         # (R, T - 1)

    edges = [1, *lengths]
    sizes = torch.tensor([bytes_up_to(row, edges, tokenizer) for row in rows])     # (R, edges)
    print(f"{'positions':>15} {'nats/token':>20} {'bits/byte':>20} {f'anew each {trained}':>22}")
    found = []
    for number, (low, high) in enumerate(zip(edges, lengths, strict=False)):
        part = slice(low - 1, high - 1)
        mine = nats[:, part]
        size = sizes[:, number + 1] - sizes[:, number]
        per_token, error = ratio(mine.sum(1), torch.full((len(rows),), high - low))
        per_byte, byte_error = ratio(mine.sum(1) / math.log(2), size)
        figures = {
            "from": low,
            "to": high,
            "tokens": mine.numel(),
            "nats": per_token,
            "se": error,
            "bits_per_byte": per_byte,
            "bits_per_byte_se": byte_error,
        }
        told = "-"
        if anew is not None and high > trained:
            told = beside_anew(figures, mine, anew[:, part])
        found.append(figures)
        print(
            f"{f'{low} to {high - 1}':>15} {f'{per_token:.4f} +- {error:.4f}':>20} "
            f"{f'{per_byte:.4f} +- {byte_error:.4f}':>20} {told:>22}"
        )
    return found


def beside_anew(figures, nats, anew):
    """The same tokens in rows that begin anew: how many nats a token less they cost with all the
    text before them, into the figures -> in words. A row's first token is left out on both sides.
    """
    both = ~anew.isnan()
    gained = torch.where(both, anew - nats, 0).sum(1)
    gain, error = ratio(gained, both.sum(1))
    figures["gain_over_anew"] = gain
    figures["gain_se"] = error
    return f"{gain:+.4f} +- {error:.4f}"


# ---- needles -------------------------------------------------------------------------------------

class Questions:
    """Held-out texts, and for each a key and a value from another place of the held-out text."""

    def __init__(self, rows, length, seed):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randint(len(rows), (NEEDLES,), generator=generator)
        self.room = length - 3 * KEY            # the text, without needle and question
        self.texts = rows[order, :self.room]                                       # (N, room)
        self.keys = self.pieces(rows, generator)                                   # (N, KEY)
        self.values = self.pieces(rows, generator)

    @staticmethod
    def pieces(rows, generator):
        """KEY tokens from somewhere, for each question."""
        row = torch.randint(len(rows), (NEEDLES, 1), generator=generator)
        start = torch.randint(rows.shape[1] - KEY + 1, (NEEDLES, 1), generator=generator)
        return rows[row, start + torch.arange(KEY)]

    def with_needle(self, depth):
        """-> the texts with key and value behind this share of them (N, room + 2 KEY), the tokens
        from a value's end to the key that asks for it.
        """
        at = round(depth * self.room)
        before, after = self.texts[:, :at], self.texts[:, at:]
        return torch.cat((before, self.keys, self.values, after), dim=1), self.room - at


@torch.no_grad()
def answers(model, texts, questions, batch):
    """Behind each text its key, then its value -> nats of the value's tokens (N,), whether all of
    them are the best guesses (N,).

    The text joins the cache as a prompt does. The best guess of each token, the ones before it
    given, is right for all of them just when greedy decoding writes the value.
    """
    costs_of = []
    right = []
    for start in range(0, len(texts), batch):
        part = slice(start, start + batch)
        text = texts[part].to(model.device)
        key, value = questions.keys[part].to(model.device), questions.values[part].to(model.device)
        cache = model.new_cache(len(text), text.shape[1] + 2 * KEY)
        for read in text.split(READ, dim=1):
            model.step(read, cache)
        asked = torch.cat((key, value[:, :-1]), dim=1)                             # (B, 2 KEY - 1)
        states = model.step(asked, cache)[:, KEY - 1:]                             # (B, KEY, D)
        logits = model.logits(states)
        logp = logits.double().log_softmax(-1)
        costs_of.append(-logp.gather(-1, value[..., None])[..., 0].sum(1).cpu())
        right.append((logits.argmax(-1) == value).all(1).cpu())
    return torch.cat(costs_of), torch.cat(right)


def needles(model, rows, lengths, batch, seed):
    """-> [figures for each length and depth]; prints them as a table."""
    print(
        f"{'length':>7} {'depth':>6} {'distance':>9} {'nats/token of the value':>26} "
        f"{'less than without':>20} {'recalled':>9}"
    )
    found = []
    for length in lengths:
        questions = Questions(rows, length, seed)
        unknown, guessed = answers(model, questions.texts, questions, batch)
        count = torch.full((NEEDLES,), KEY)
        for depth in DEPTHS:
            texts, distance = questions.with_needle(depth)
            nats, right = answers(model, texts, questions, batch)
            value, error = ratio(nats, count)
            gain, gain_error = ratio(unknown - nats, count)
            found.append(
                {
                    "length": length,
                    "depth": depth,
                    "distance": distance,
                    "questions": NEEDLES,
                    "nats": value,
                    "se": error,
                    "gain": gain,
                    "gain_se": gain_error,
                    "recalled": float(right.double().mean()),
                    "guessed": float(guessed.double().mean()),
                }
            )
            print(
                f"{length:>7} {depth:>6.0%} {distance:>9} {f'{value:.3f} +- {error:.3f}':>26} "
                f"{f'{gain:+.3f} +- {gain_error:.3f}':>20} {right.double().mean():>9.0%}"
            )
    return found


# ---- what a smaller cache costs ------------------------------------------------------------------

def cost_of_storage(model, rows, nats, batch):
    """What tokens cost behind the model's cache (R, T - 1) beside an exact one -> figures; prints
    them in a line.
    """
    stored = model.cache_type
    model.cache_type = CACHES["fp32"]
    moved = nats - costs(model, rows, batch)
    model.cache_type = stored
    more, error = ratio(moved.sum(1), torch.full((len(rows),), moved.shape[1]))
    size = float(moved.square().mean().sqrt())
    print(
        f"cache in {stored.stored}: {more:+.1e} +- {error:.1e} nats a token against the exact one; "
        f"a single token's move by {size:.1e} (root mean square)"
    )
    return {"stored": stored.stored, "nats": more, "se": error, "rms": size}
