"""Verified drafts (--sampler speculate): the text of one token at a time, in fewer forwards.

Used by sampling/decode.py. One network is both sides. Its noisy stream drafts: one forward of
[the last token, masks] gives a distribution q of each masked token, independent of each other. Its
clean stream verifies: one forward of [the last token, the drafts] gives the distribution p of each
of them behind those before it, and of one token more. A draft is kept with the chance min(1, p/q);
at the first that is not, the token comes from what p has more than q, max(0, p - q), and the rest
is thrown away. So every token is drawn from p, whatever q is (speculative sampling; both sides in
one network: S2D2). At temperature 0, p and q are certain, and the text is that of one token at a
time, token for token.

A round is these two forwards. It costs about as much as `round_cost` steps of one token and gives
1 to S tokens. Account decides when one is worth it, by counts alone: never by the clock, as the
same seed has to give the same text.

Legend: S tokens of a block, k drafts, V vocabulary rows.
"""
from dataclasses import dataclass

import numpy as np

from sampling import unmasking
from sampling.unmasking import Look, must_be_finite, pick

LOSS = 0.03         # of the text's steps: what rounds may cost in all beyond what they give
ROUND_COST = 3.0    # steps of one token, if the engine does not say what a round takes

DAMAGED = (
    "the denoiser returned NaN or infinity: the checkpoint is damaged, or its training went wrong; "
    "use an earlier one"
)


class Account:
    """The steps that rounds have saved so far, on top of what they may lose. A round is allowed
    while the least that it can give, one token, is affordable.
    """

    def __init__(self, tokens, round_cost):
        self.steps = LOSS * tokens
        self.round_cost = round_cost

    def allows_a_round(self):
        return self.steps >= self.round_cost - 1

    def book(self, tokens):
        """A round gave so many tokens."""
        self.steps += tokens - self.round_cost


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
    account = Account(settings.max_new_tokens, getattr(model, "round_cost", ROUND_COST))
    while written.end < len(ids) and not canvas.done[0]:
        lo = written.end
        # a round gives a token more than it drafts, and nothing may leave the cache for a draft
        drafts = min(settings.block_size - 1, len(ids) - lo - 1, room - lo)
        if drafts > 0 and account.allows_a_round():
            tokens, kept, logits = one_round(model, cache, canvas, lo, drafts, settings)
            account.book(len(tokens))
            written.rounds += 1
            written.accepted += kept
            written.forwards += 2
            written.layers += (settings.min_depth or model.cfg.n_layers) + model.cfg.n_layers
        else:
            tokens, logits = one_token(model, cache, canvas, lo, settings)
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


def one_token(model, cache, canvas, lo, settings):
    """The token at position lo, left to right -> [token], its logits (1, V)."""
    states = model.step(canvas.ids[:, lo - 1:lo], cache)
    logits = read(model, states, 0, 1)
    p = law(logits, canvas.ids[0, :lo], settings)
    return pick(p, canvas.generators[0].random(1)).tolist(), logits


def one_round(model, cache, canvas, lo, count, settings):
    """So many drafts from position lo on, and their verification -> (tokens, how many of them are
    drafts, the verifier's logits (count + 1, V)).
    """
    text = canvas.ids[0, :lo]
    generator = canvas.generators[0]

    # The draft: the last token, and masks behind it
    block = np.full((1, count + 1), model.cfg.mask_id, dtype=np.int64)
    block[0, 0] = text[-1]
    states = model.states(block, cache, settings.min_depth or None)
    q = law(read(model, states, 1, count), text, settings)                         # (k, V)
    drafts = pick(q, generator.random(count))                                      # (k,)

    # The verification: the answer of each row is about the token behind it
    block[0, 1:] = drafts
    states = model.try_step(block, cache)
    logits = read(model, states, 0, count + 1)                                     # (k + 1, V)

    def p(number):
        before = np.concatenate((text, drafts[:number]))
        return law(logits[number:number + 1], before, settings)[0]                 # (V,)

    tokens, kept = verified(drafts.tolist(), q, p, settings.eos_id, generator)
    cache.keep(kept + 1)
    return tokens, kept, logits


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
