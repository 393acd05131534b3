"""Text out of noise, with a model of --objective gaussian: the known tokens of a row stay, the
others come out of noise all at once.

    writer = GaussianWriter(model)
    result = writer.write(ids, settings, seeds)         # settings: sampling/continuous.py

ids is one row, with the mask's id where text is wanted. Every seed makes a row of its own, which
does not depend on the other rows of its batch.

Used by sample.py and train.py. gaussian.py has the samplers.
Legend: B rows, T positions, S wanted ones, K those of the null prompt, E numbers of an embedding,
V vocabulary rows.
"""
import time

import torch
import torch.nn.functional as F

import gaussian
from sampling.decode import Result



class GaussianWriter:
    """A trained model, as sample.py and train.py write with it."""

    def __init__(self, model):
        self.model = model
        self.cfg = model.cfg
        self.device = model.device

    @torch.no_grad()
    def write(self, ids, settings, seeds, on_step=None):
        """-> Result; on_step: as of decode.generate, with the likeliest token of each position."""
        started = time.perf_counter()
        row = torch.tensor(ids, device=self.device)
        known = row != self.cfg.mask_id                                            # (T,)
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        canvas = Canvas(self.model, row, known, settings, len(seeds))

        def noise():
            shape = (len(ids), self.cfg.embed_dim)
            rows = [torch.randn(shape, generator=draw) for draw in draws]
            return torch.stack(rows).to(self.device)                               # (B, T, E)

        def denoise(z, share, before):
            guess = canvas.guess(z, share, before)
            if on_step:
                on_step(canvas, 0, len(ids), canvas.forwards - 1)
            return guess

        shares = gaussian.levels(settings.steps)
        gaussian.sample(denoise, noise(), shares, settings.sampler, noise, settings.eta)
        rows = canvas.ids[:, ~known].tolist()
        return Result(
            rows=[cut(row, settings.eos_id) for row in rows],
            full_rows=rows,
            forwards=canvas.forwards,
            row_forwards=[canvas.forwards] * len(rows),
            seconds=time.perf_counter() - started,
        )


class Canvas:
    """The rows while they are written: their likeliest tokens, and the chance of each (B, T)."""

    def __init__(self, model, row, known, settings, rows):
        self.model = model
        self.settings = settings
        self.mask_id = model.cfg.mask_id
        self.forwards = 0
        self.known = known.expand(rows, -1)                                        # (B, T)
        self.ids = row.repeat(rows, 1)
        self.chance = torch.ones(self.ids.shape)
        self.x0 = model.embed(self.ids)                                            # (B, T, E)
        self.null = None
        if settings.guidance_scale != 1:
            self.null = torch.tensor(settings.null_prompt, device=row.device)      # (K,)
            self.null = model.embed(self.null).expand(rows, -1, -1)                # (B, K, E)

    def guess(self, z, share, before):
        """One forward, or two with guidance -> the mean embedding of each position (B, T, E)."""
        if before is None:
            before = torch.zeros_like(z)
        settings = self.settings
        wanted = ~self.known[0]
        states = self.states(z, share, before)[:, wanted]                          # (B, S, D)
        bare = None
        if self.null is not None:
            bare = self.states_without_prompt(z[:, wanted], share, before[:, wanted])
        found = []
        for row in range(len(z)):
            log_p = self.log_p(states[row], z[row, wanted], share)                 # (S, V)
            if bare is not None:
                without = self.log_p(bare[row], z[row, wanted], share)
                log_p = guided(log_p, without, settings.guidance_scale)
            p = sharpened(log_p, settings.temperature)
            chance, token = p.max(-1)
            self.ids[row, wanted] = token
            self.chance[row, wanted.cpu()] = chance.cpu()
            found.append(self.model.mean_embedding(p))
        guess = self.x0.clone()
        guess[:, wanted] = torch.stack(found)
        return guess

    def states(self, z, share, before):
        known = self.known.unsqueeze(-1)
        shares = torch.full(self.known.shape, share, device=z.device)
        shares = shares.masked_fill(self.known, 0)
        self.forwards += 1
        z = torch.where(known, self.x0, z)
        return self.model.states(z, shares, torch.where(known, self.x0, before))

    def states_without_prompt(self, z, share, before):
        """The same for the wanted tokens (B, S, E) behind the null prompt."""
        K = self.null.shape[1]
        shares = F.pad(torch.full(z.shape[:2], share, device=z.device), (K, 0))
        z = torch.cat((self.null, z), dim=1)
        self.forwards += 1
        return self.model.states(z, shares, torch.cat((self.null, before), dim=1))[:, K:]

    def log_p(self, states, z, share):
        """(S, D), (S, E) -> (S, V)."""
        return self.model.log_p(states, z, torch.full(z.shape[:1], share, device=z.device))


def guided(log_p, without, scale):
    """u + s (c - u), where neither is -infinity: 1 is plain conditional, 0 ignores the prompt."""
    answer = torch.isfinite(log_p)
    mixed = without + scale * (log_p - without)
    return torch.where(answer, mixed, log_p).log_softmax(-1)


def sharpened(log_p, temperature):
    """log p (S, V) -> p at this temperature; 0: all of it on the likeliest token."""
    if not temperature:
        return F.one_hot(log_p.argmax(-1), log_p.shape[-1]).float()
    return (log_p / temperature).softmax(-1)


def cut(ids, eos_id):
    """A row before its first EOS."""
    return ids[:ids.index(eos_id)] if eos_id in ids else ids
