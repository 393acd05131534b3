"""Which masked positions are revealed now, and which token each gets: the rules of decoding, one
function each.

Used by sampling/decode.py; knows no model, only logits. A rule sees the masked positions of ONE row
of one block and returns indices into them, at least one, best first:

    rule(look, count, settings, generator) -> (n,) indices
    look: Look; count: what the reveal schedule asks for; settings: sampling.settings.Settings

Rules that do not look at the logits (random, ancestral) choose before the forward, so the head sees
chosen positions only. Positions are chosen first, from the model's own untempered distribution;
tokens are drawn only there. Legend: N masked positions of a row, V vocabulary rows.
"""
import math

import torch


class Look:
    """What the model thinks of one row's masked positions; each statistic is computed when a rule
    asks for it.
    """

    def __init__(self, logits):
        self.logp = logits.float().log_softmax(-1)                                 # (N, V)

    @property
    def sure(self):
        """Probability of the best token: a calibrated number, unlike a raw logit, which has no
        scale.
        """
        return self.logp.amax(-1).exp()                                            # (N,)

    @property
    def margin(self):
        best = self.logp.topk(2, dim=-1).values.exp()                              # (N, 2)
        return best[:, 0] - best[:, 1]

    @property
    def entropy(self):
        return -(self.logp.exp() * self.logp.clamp(min=-1e4)).sum(-1)  # (N,) nats; 0 * -inf is 0


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
    uniform = torch.rand(score.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    gumbel = -(-uniform.to(score.device).log()).log()
    log_score = score.double().clamp(min=1e-300).log()
    return log_score / max(1.0, heat) + min(1.0, heat) * gumbel


def confidence(look, count, settings, generator):
    return noisy(look.sure, settings, generator).topk(count).indices


def margin(look, count, settings, generator):
    return noisy(look.margin, settings, generator).topk(count).indices


def threshold(look, count, settings, generator):
    """Everything that is at least this sure; never nothing."""
    sure, order = look.sure.sort(descending=True, stable=True)
    return order[:max(1, int((sure >= settings.threshold).sum()))]


def factor(look, count, settings, generator):
    """The largest n with (n + 1) (1 - sure_n) < 1 - threshold: more at once only where they are
    surer (Fast-dLLM).
    """
    sure, order = look.sure.sort(descending=True, stable=True)
    n = torch.arange(1, len(sure) + 1, device=sure.device)
    fits = ((n + 1) * (1 - sure) < 1 - settings.threshold).nonzero()
    return order[:int(fits[-1]) + 1 if len(fits) else 1]


def entropy(look, count, settings, generator):
    """The most positions whose entropies, the largest left out, sum to at most 1 - threshold nats:
    a bound on the joint dependence that drawing them independently ignores (EB-Sampler)."""
    h, order = look.entropy.sort(stable=True)
    fits = (h.cumsum(0) - h <= 1 - settings.threshold + 1e-9).nonzero()
    return order[:int(fits[-1]) + 1]


def random(size, count, generator):
    """Uniform positions, as many as the schedule says: one per forward is the exact any-order
    sampler (first-hitting).
    """
    return torch.randperm(size, generator=generator)[:count]


def ancestral(size, stay, generator):
    """Every position by itself with the chance that the process has in this interval of time; maybe
    none.
    """
    return (torch.rand(size, generator=generator) >= stay).nonzero()[:, 0]


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
    kind = torch.finfo(z.dtype)
    penalty = min(max(penalty, kind.tiny), kind.max)  # an extreme one would make infinities
    changed = torch.where(z > 0, z / penalty, z * penalty).clamp(-kind.max, kind.max)
    logits[:, seen] = torch.where(torch.isneginf(z), z, changed)  # what was no answer stays none
    return logits


def distribution(logits, temperature, top_k, top_p):
    """logits (N, V) -> float64 probabilities after temperature, top-k, top-p. float64: rare tokens
    keep their chance.
    """
    z = logits.double()
    z = (z - z.amax(-1, keepdim=True)) / temperature  # the largest is 0: no temperature is too low
    if top_k and top_k < z.shape[-1]:
        least = z.topk(top_k, dim=-1).values[..., -1:]
        z = z.masked_fill(z < least, -math.inf)
    p = z.softmax(-1)
    if top_p < 1:
        # keep until the mass before a token reaches top_p
        sorted_p, order = p.sort(-1, descending=True)
        drop = sorted_p.cumsum(-1) - sorted_p >= top_p
        p = p.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def draw(logits, temperature, settings, generator):
    """logits (N, V) -> (N,) tokens; temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    p = distribution(logits, temperature, settings.top_k, settings.top_p)
    return torch.multinomial(p.cpu(), 1, generator=generator)[:, 0].to(logits.device)
