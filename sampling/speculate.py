"""Verified drafts (--sampler speculate): the text of one token at a time, in fewer forwards.

Used by sampling/decode.py. Someone drafts the next tokens; the clean stream verifies them: one
forward of [the last token, the drafts] gives the distribution p of each of them behind those before
it, and of one token more. Whoever drafts, every token is drawn from p. There are two who can:

FromTable: the engine has a table of what mostly follows the last few tokens (edge/drafts.py), which
costs nothing. From each p a token is drawn, with the random number that it would have had without
drafts; as long as it is the draft, the next p is right, too. So the text is that of one token at a
time, seed for seed (up to the rounding of many rows beside one).

FromNetwork: the noisy stream of the same network. One forward of [the last token, masks] gives a
distribution q of each masked token, independent of each other. A draft is kept with the chance
min(1, p/q); at the first that is not, the token comes from what p has more than q, max(0, p - q),
and the rest is thrown away. So every token is drawn from p, whatever q is (speculative sampling;
both sides in one network: S2D2). At temperature 0, p and q are certain, and the text is that of one
token at a time, token for token.

A round, a draft and its verification, costs as much as some steps of one token, the more the more
rows are verified, and gives 1 to S tokens. A table says how sure it is, which decides how many of
its drafts are worth their rows. Account decides whether there is a round at all, by counts alone:
never by the clock, as the same seed has to give the same text.

Legend: S tokens of a block, k drafts, V vocabulary rows.
"""
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sampling import unmasking
from sampling.unmasking import Look, must_be_finite, pick

LOSS = 0.03         # of the text's steps: what rounds may cost in all beyond what they give
MOST = 32           # drafts of a round: a forward holds 64 rows, a short prompt among them
ROUND_COST = 3.0    # steps of one token, if the engine does not say what a network's round takes

DAMAGED = (
    "the denoiser returned NaN or infinity: the checkpoint is damaged, or its training went wrong; "
    "use an earlier one"
)


class Account:
    """The steps that rounds have saved so far, on top of what they may lose. A round is allowed
    while the least that it can give, one token, is affordable.
    """

    def __init__(self, tokens):
        self.steps = LOSS * tokens

    def allows(self, cost):
        """May a round cost so many steps?"""
        return self.steps >= cost - 1

    def book(self, tokens, cost):
        """A round gave so many tokens."""
        self.steps += tokens - cost


class Draft(NamedTuple):
    tokens: list                      # (k,)
    q: np.ndarray | None              # (k, V) what they were drawn from; None: they are certain
    cost: float                       # steps of one token that the round takes
    layers: int = 0                   # of the network, run for the draft
    forwards: int = 0


@dataclass
class Written:
    """One text."""
    end: int                          # its positions, prompt included
    forwards: int = 0
    layers: int = 0
    rounds: int = 0                   # drafts that were verified
    accepted: int = 0                 # drafted tokens that were kept


def write_text(model, cache, canvas, start, settings, room, on_step=None, on_block=None):
    """Write the one row of the canvas from position `start` on, with all before it but the last
    token in the cache, which holds so many positions (`room`) -> Written.
    """
    ids = canvas.ids[0]                                                            # (T,)
    written = Written(start)
    account = Account(settings.max_new_tokens)
    drafter = FromTable(model)
    if not drafter.table:
        drafter = FromNetwork(model, settings)
    while written.end < len(ids) and not canvas.done[0]:
        lo = written.end
        # a round gives a token more than it drafts, and nothing may leave the cache for a draft
        most = min(settings.block_size - 1, MOST, len(ids) - lo - 1, room - lo)
        draft = None
        if most > 0:
            draft = drafter.draft(cache, canvas, lo, most, account)
        if draft is None:
            tokens, logits = one_token(model, cache, canvas, lo, settings)
        else:
            tokens, kept, logits = verify(model, cache, canvas, lo, draft, settings)
            account.book(len(tokens), draft.cost)
            written.rounds += len(draft.tokens) > 0
            written.accepted += kept
            written.forwards += draft.forwards
            written.layers += draft.layers
        written.forwards += 1
        written.layers += model.cfg.n_layers

        # Only tokens that stay are ever written
        hi = lo + len(tokens)
        ids[lo:hi] = tokens
        if canvas.keep_chance:
            canvas.chance[0, lo:hi] = Look(logits[:len(tokens)]).chance(slice(None), tokens)
        canvas.done[0] = settings.eos_id is not None and tokens[-1] == settings.eos_id
        written.end = hi
        if on_step:
            on_step(canvas, lo, hi, 0)
        if on_block:
            on_block(canvas, lo, hi)
    canvas.forwards[0] = written.forwards
    return written


# ---- who drafts ----------------------------------------------------------------------------------

class FromTable:
    """The engine's table, model.drafts; model.try_cost: the steps of one token that verifying the
    last token's row takes, and each draft's.

    A token without a draft takes the same way, as long as that is affordable: another graph has
    weights of its own, and those that lie in the processor's cache are the faster ones.
    """

    def __init__(self, model):
        self.table = getattr(model, "drafts", None)
        self.try_cost = getattr(model, "try_cost", None)

    def draft(self, cache, canvas, lo, most, account):
        """Up to `most` tokens from position lo on: as many as bring most a step; None: leave it."""
        first, _ = self.try_cost
        if not account.allows(first):
            return None
        text = canvas.ids[0, max(0, lo - 8):lo].tolist()
        tokens, chances = self.table.behind(text, most)
        count, cost = self.worth(chances)
        if not account.allows(cost):
            count, cost = 0, first
        return Draft(tokens[:count], None, cost)

    def worth(self, chances):
        """The chances that drafts are right -> (how many of them are worth a round, its cost)."""
        first, each = self.try_cost
        best = (0, first)
        most = 1 / first    # tokens a step, without a draft
        tokens = 1.0
        for count, chance in enumerate(chances, 1):
            tokens += chance
            cost = first + each * count
            if tokens / cost > most:
                most = tokens / cost
                best = (count, cost)
        return best


class FromNetwork:
    """The network's own noisy stream; model.round_cost: what a round with it takes."""

    def __init__(self, model, settings):
        self.model = model
        self.settings = settings
        self.cost = getattr(model, "round_cost", ROUND_COST)

    def draft(self, cache, canvas, lo, most, account):
        """`most` tokens from position lo on, or None."""
        if not account.allows(self.cost):
            return None
        model = self.model
        depth = self.settings.min_depth or None
        text = canvas.ids[0, :lo]
        block = np.full((1, most + 1), model.cfg.mask_id, dtype=np.int64)
        block[0, 0] = text[-1]
        states = model.states(block, cache, depth)
        q = law(read(model, states, 1, most), text, self.settings)                 # (k, V)
        tokens = pick(q, canvas.generators[0].random(most)).tolist()
        return Draft(tokens, q, self.cost, depth or model.cfg.n_layers, 1)


# ---- who verifies --------------------------------------------------------------------------------

def one_token(model, cache, canvas, lo, settings):
    """The token at position lo, left to right -> [token], its logits (1, V)."""
    states = model.step(canvas.ids[:, lo - 1:lo], cache)
    logits = read(model, states, 0, 1)
    p = law(logits, canvas.ids[0, :lo], settings)
    return pick(p, canvas.generators[0].random(1)).tolist(), logits


def verify(model, cache, canvas, lo, draft, settings):
    """A draft from position lo on -> (tokens, how many of them are drafts, the verifier's logits
    (k + 1, V)). The tokens but the last join the cache.
    """
    text = canvas.ids[0, :lo]
    drafts = np.array(draft.tokens, np.int64)                                      # (k,)
    count = len(drafts) + 1
    # the answer of each row is about the token behind it
    states = model.try_step(np.append(text[-1:], drafts)[None], cache)
    logits = read(model, states, 0, count)                                         # (k + 1, V)

    def p(number):
        before = np.concatenate((text, drafts[:number]))
        return law(logits[number:number + 1], before, settings)[0]                 # (V,)

    generator = canvas.generators[0]
    if draft.q is None:
        def next_token(number):
            if settings.temperature == 0:
                return int(p(number).argmax())
            return drawn(p(number), generator)
        tokens, kept = as_without(draft.tokens, next_token, settings.eos_id)
    else:
        tokens, kept = verified(draft.tokens, draft.q, p, settings.eos_id, generator)
    cache.keep(kept + 1)
    return tokens, kept, logits


def as_without(drafts, next_token, eos_id):
    """The tokens that are drawn anyway, as long as they are the drafts; next_token(number) draws
    the one behind so many of them -> (tokens, how many of them are drafts). An EOS is the last
    token.
    """
    for number, draft in enumerate(drafts):
        token = next_token(number)
        if token != draft:
            return [*drafts[:number], token], number
        if token == eos_id:
            return drafts[:number + 1], number + 1
    return [*drafts, next_token(len(drafts))], len(drafts)


def verified(drafts, q, p, eos_id, generator):
    """Drafts that were drawn from the rows of q (k, V); p(number) is the verifier's law (V,) behind
    so many of them -> (tokens, how many of them are drafts). An EOS is the last token.
    """
    for number, token in enumerate(drafts):
        wanted = p(number)
        if generator.random() * q[number, token] >= wanted[token]:
            rest = np.maximum(wanted - q[number], 0)
            if not rest.any():  # the two are equal up to rounding
                rest = wanted
            return [*drafts[:number], drawn(rest, generator)], number
        if token == eos_id:
            return drafts[:number + 1], number + 1
    return [*drafts, drawn(p(len(drafts)), generator)], len(drafts)


def drawn(p, generator):
    """One token of a law (V,), whose sum may be below 1."""
    return int(pick(p[None], generator.random(1))[0])


def law(logits, text, settings):
    """logits (N, V) behind a text (ids) -> (N, V), the chance of each token under the settings; at
    temperature 0 it is one token's.
    """
    if settings.repetition_penalty != 1:
        logits = unmasking.discourage(logits, np.unique(text), settings.repetition_penalty)
    if settings.temperature == 0:
        chances = np.zeros(logits.shape)
        chances[np.arange(len(logits)), logits.argmax(-1)] = 1
        return chances
    return unmasking.distribution(logits, settings.temperature, settings.top_k, settings.top_p)


def read(model, states, first, count):
    """The logits (count, V) of so many positions of the one row."""
    positions = np.arange(first, first + count)
    logits = model.logits(states, np.zeros_like(positions), positions)
    must_be_finite(logits, DAMAGED)
    return logits
