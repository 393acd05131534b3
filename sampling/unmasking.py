"""Which masked positions are revealed now, and which token each gets: the rules of decoding, one
function each.

Used by sampling/decode.py; knows no model, only logits, as numpy arrays. A rule sees the masked
positions of ONE row of one block and returns indices into them, at least one, best first:

    rule(look, count, settings, generator) -> (n,) indices
    look: Look; count: what the reveal schedule asks for; settings: sampling.settings.Settings;
    generator: the row's own numpy.random.Generator

Rules that do not look at the logits (random, ancestral) choose before the forward, so the head sees
chosen positions only. Positions are chosen first, from the model's own untempered distribution;
tokens are drawn only there. Legend: N masked positions of a row, V vocabulary rows.
"""
import math
from functools import cached_property

import numpy as np

from common.console import UserError

FINE = 1e6             # scores that differ by less than one of so many parts are equal


class NotFinite(UserError, FloatingPointError):
    """The logits hold NaN or infinity: there is no answer, and the message says why."""


def must_be_finite(logits, message):
    """The largest of each row of logits (N, V) is a number: no NaN, no +inf, and something can be
    an answer.
    """
    if not np.isfinite(logits.max(-1)).all():
        raise NotFinite(message)


class Look:
    """What the model thinks of one row's masked positions; each statistic is computed when a rule
    asks for it, in float32.
    """

    def __init__(self, logits):
        self.logits = logits.astype(np.float32, copy=False)                        # (N, V)

    @cached_property
    def top(self):
        return self.logits.max(-1, keepdims=True)                                  # (N, 1)

    @cached_property
    def odds(self):
        """Each token's chance in multiples of the best token's."""
        odds = self.logits - self.top
        return np.exp(odds, out=odds)                                              # (N, V)

    @cached_property
    def mass(self):
        return self.odds.sum(-1)                                                   # (N,) >= 1

    @property
    def sure(self):
        """Probability of the best token: a calibrated number, unlike a raw logit, which has no
        scale.
        """
        return 1 / self.mass                                                       # (N,)

    @property
    def margin(self):
        others = self.odds.copy()
        others[np.arange(len(others)), others.argmax(-1)] = 0
        return (1 - others.max(-1)) / self.mass                                    # (N,)

    @property
    def entropy(self):
        below = np.maximum(self.logits - self.top, -1e4)                           # 0 * -inf is 0
        return np.log(self.mass) - (self.odds * below).sum(-1) / self.mass         # (N,) nats

    def chance(self, chosen, tokens):
        """The probability of one token for each chosen position."""
        odds = self.odds[chosen]
        return odds[np.arange(len(odds)), tokens] / self.mass[chosen]


def log_softmax(logits):
    """logits (N, V) -> logarithms of the probabilities."""
    z = logits - logits.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


# ---- the rules -----------------------------------------------------------------------------------

def noisy(score, settings, generator):
    """--alg_temp: draw positions without replacement with chances score^(1/alg_temp), by Gumbel
    noise on the logarithm.

    Below 1 the temperature multiplies the noise instead, which is the same order and cannot
    overflow.
    """
    heat = settings.alg_temp
    if not heat:
        return score
    uniform = np.maximum(generator.random(len(score)), 1e-300)
    gumbel = -np.log(-np.log(uniform))
    log_score = np.log(np.maximum(score.astype(np.float64), 1e-300))
    return log_score / max(1.0, heat) + min(1.0, heat) * gumbel


def best(score):
    """All positions, the highest score first; of equals the first. Positions that see the same
    differ by what this CPU rounds, which would choose another text on another one.
    """
    score = np.floor(score.astype(np.float64) * FINE + 0.5)
    return np.argsort(-score, kind="stable")


def confidence(look, count, settings, generator):
    return best(noisy(look.sure, settings, generator))[:count]


def margin(look, count, settings, generator):
    return best(noisy(look.margin, settings, generator))[:count]


def threshold(look, count, settings, generator):
    """Everything that is at least this sure; never nothing."""
    sure = look.sure
    enough = np.count_nonzero(sure >= settings.threshold)
    return best(sure)[:max(1, enough)]


def factor(look, count, settings, generator):
    """The largest n with (n + 1) (1 - sure_n) < 1 - threshold: more at once only where they are
    surer (Fast-dLLM).
    """
    order = best(look.sure)
    n = np.arange(1, len(order) + 1)
    fits = np.flatnonzero((n + 1) * (1 - look.sure[order]) < 1 - settings.threshold)
    return order[:fits[-1] + 1 if len(fits) else 1]


def entropy(look, count, settings, generator):
    """The most positions whose entropies, the largest left out, sum to at most 1 - threshold nats:
    a bound on the joint dependence that drawing them independently ignores (EB-Sampler)."""
    h = look.entropy
    order = best(-h)
    h = h[order]
    fits = np.flatnonzero(h.cumsum() - h <= 1 - settings.threshold + 1e-9)
    return order[:fits[-1] + 1]


def random(size, count, generator):
    """Uniform positions, as many as the schedule says: one per forward is the exact any-order
    sampler (first-hitting).
    """
    return generator.permutation(size)[:count]


def ancestral(size, stay, generator):
    """Every position by itself with the chance that the process has in this interval of time; maybe
    none.
    """
    return np.flatnonzero(generator.random(size) >= stay)


LOOKING = {rule.__name__: rule for rule in (confidence, threshold, factor, entropy, margin)}
NAMES = (*LOOKING, random.__name__, ancestral.__name__)


# ---- the schedule --------------------------------------------------------------------------------

def masked_share(step, steps, reveal):
    """Share of a block that is still masked after `step` of `steps` forwards. cosine: few at first,
    when little is known.
    """
    if reveal == "linear":
        return 1 - step / steps
    if step == steps:  # where the cosine is not quite 0
        return 0.0
    return math.cos(math.pi / 2 * step / steps)


def reveal_count(masked_count, step, steps, reveal):
    """How many of the positions that are left now to reveal at forward `step` of `steps`: never 0,
    and all at the last one.

    Each share is rounded up, from what is left now, so a row is never behind its schedule and
    mostly ahead of it: what does not divide comes first. linear: the shares differ by one at most,
    which puts a row at most steps / 4 tokens ahead; cosine: at most steps / 2, as its first shares
    are less than a token.
    """
    if reveal == "cosine":
        stay = masked_share(step + 1, steps, reveal) / masked_share(step, steps, reveal)
        return max(1, masked_count - math.floor(masked_count * stay + 1e-9))
    return math.ceil(masked_count / (steps - step))


# ---- the tokens ----------------------------------------------------------------------------------

def discourage(logits, seen, penalty):
    """--repetition_penalty: logits (N, V) of tokens that stand in `seen` (ids) lose, whatever their
    sign (CTRL's rule).
    """
    if penalty == 1:
        return logits
    z = logits[:, seen]
    kind = np.finfo(z.dtype)
    penalty = min(max(penalty, float(kind.tiny)), float(kind.max))  # an extreme one: infinities
    with np.errstate(over="ignore"):
        changed = np.where(z > 0, z / penalty, z * penalty).clip(-kind.max, kind.max)
    logits[:, seen] = np.where(np.isneginf(z), z, changed)  # what was no answer stays none
    return logits


def distribution(logits, temperature, top_k, top_p):
    """logits (N, V) -> float64 probabilities after temperature, top-k, top-p. float64: rare tokens
    keep their chance.
    """
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)  # the largest is 0: no temperature is too low
    with np.errstate(over="ignore"):
        z /= temperature
    if top_k and top_k < z.shape[-1]:
        least = np.partition(z, -top_k, axis=-1)[:, -top_k, None]                  # (N, 1)
        z[z < least] = -np.inf
    p = np.exp(z, out=z)
    p /= p.sum(-1, keepdims=True)
    if top_p < 1:
        # keep until the mass before a token reaches top_p
        order = np.argsort(-p, axis=-1, kind="stable")
        sorted_p = np.take_along_axis(p, order, -1)
        sorted_p[sorted_p.cumsum(-1) - sorted_p >= top_p] = 0.0
        np.put_along_axis(p, order, sorted_p, -1)
        p /= p.sum(-1, keepdims=True)
    return p


def draw(logits, temperature, settings, generator):
    """logits (N, V) -> (N,) tokens; temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    p = distribution(logits, temperature, settings.top_k, settings.top_p)
    return pick(p, generator.random(len(p)))


def pick(p, uniform):
    """Probabilities (N, V), uniform draws (N,) from [0, 1) -> (N,) tokens: the first whose mass,
    together with all before it, is above the draw; so never one without a chance.
    """
    mass = p.cumsum(-1)                                                            # (N, V)
    return (mass <= (uniform * mass[:, -1])[:, None]).sum(-1)
