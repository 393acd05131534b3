"""The network of --objective gaussian: either denoiser of model.py, which reads noisy embeddings of
a whole row where it reads tokens otherwise.

    model = network_of(cfg)     # either of model.py's, for --objective gaussian inside this one

What gaussian.py, the trainer and sampling ask of it:
    model.cfg .head .layers .device     as of a denoiser
    model.embed(ids)                    (B, T) -> (B, T, E), each of mean square 1
    model.states(z, share, guess)       noisy embeddings (B, T, E), the share of noise of each
                                        (B, T), 0 of known ones, what was guessed before (B, T, E),
                                        zeros if nothing was -> (B, T, D), both sides seen
    model.log_p(states, z, share)       rows of these (N, D), (N, E), (N,) -> log p of each token
                                        (N, V)
    model.mean_embedding(p)             (N, V) -> (N, E)

A place has its order from inside the denoiser, by convolution or rotary positions, as with tokens.
The embeddings are narrow: noise has to hide a token before it drowns the sentence, and with D
numbers a token would be told from all others under nearly all of the noise.

Legend: B batch, T positions, E numbers of an embedding, D width, F features, V vocabulary rows.
"""
import torch
import torch.nn.functional as F
from torch import nn

from layers import Linear, recomputed, unit_rms
from model import build_model
from model_config import LEVEL_FEATURES

LEAST = 1e-4            # share of noise below which a token is as good as known


def network_of(cfg):
    """The network that is trained, saved and loaded."""
    net = build_model(cfg)
    return GaussianModel(net) if cfg.gaussian else net


class GaussianModel(nn.Module):
    """A denoiser behind embeddings of its own."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.cfg = net.cfg
        self.embedding = nn.Embedding(self.cfg.rows, self.cfg.embed_dim)
        self.in_proj = Linear(2 * self.cfg.embed_dim, self.cfg.d_model)
        self.level_proj = Linear(LEVEL_FEATURES, self.cfg.d_model)
        self.recompute = False          # train.py's --activation_checkpointing
        for matrix in (self.in_proj, self.level_proj):
            nn.init.normal_(matrix.weight, std=matrix.in_features ** -0.5)
        nn.init.normal_(self.embedding.weight)

    @property
    def head(self):
        return self.net.head

    @property
    def layers(self):
        return self.net.layers

    @property
    def device(self):
        return self.net.device

    @property
    def table(self):
        """All embeddings (V, E), each of mean square 1, whatever the weights are."""
        return unit_rms(self.embedding.weight.float())

    def embed(self, ids):
        return F.embedding(ids, self.table)                                        # (B, T, E)

    def mean_embedding(self, p):
        """In float32: where there is little noise, the bound weighs its error heavily."""
        with torch.autocast(p.device.type, enabled=False):
            return p @ self.table                                                  # (N, E)

    def states(self, z, share, guess):
        x = self.in_proj(torch.cat((z, guess), dim=-1)) + self.level_proj(level_of(share))
        x, answers, *rows = self.net.rows_of_vectors(x.float())
        for layer in self.layers:
            x = recomputed(self.recompute, layer, x, *rows)
        return answers(self.net.exits(x))                                          # (B, T, D)

    def log_p(self, states, z, share):
        """What the network expects, and what z itself says: with embeddings of one length,
        log p(z | token) is z . embedding x sqrt(1 - s) / s and a constant. So a network that knows
        nothing yet reads each token out of little noise as well as can be.
        """
        logits = self.net.logits(states)                                           # (N, V)
        with torch.autocast(z.device.type, enabled=False):
            share = share.clamp(min=LEAST)
            scale = (1 - share).sqrt() / share                                     # (N,)
            logits = logits + (z * scale.unsqueeze(-1)) @ self.table.T
            return logits.log_softmax(-1)


def level_of(share):
    """Features (B, T, F) of a share of noise (B, T): waves over the angle between the text and the
    noise, which turns evenly from none to all.
    """
    angle = 2 * torch.atan2(share.sqrt(), (1 - share).sqrt())                      # 0 to pi
    wave = torch.arange(LEVEL_FEATURES, device=share.device)
    return torch.cos(angle.unsqueeze(-1) * wave)                                   # (B, T, F)
