"""Tiny models and what tests feed them, and a folder for many small files: one place for all tests.

tiny_model(kind, ...) is the only builder; a test names what it needs to be different.
"""
import os
import tempfile

import torch

from model import build_model
from model_config import ModelConfig

SHAPE = dict(d_model=32, n_layers=2, n_heads=2, d_ff=48, memory_slots=4)
TINIER = dict(d_model=16, n_layers=2, n_heads=2, d_ff=24, memory_slots=2)


def tiny_config(kind, vocab_size=40, shape=SHAPE, **changes):
    return ModelConfig(model=kind, vocab_size=vocab_size, **shape | changes)


def tiny_model(kind, vocab_size=40, seed=0, shape=SHAPE, away=0.0, **changes):
    """A model in evaluation mode, the same for the same seed. away: how far every parameter is
    moved from the symmetric start, so that every path matters.
    """
    torch.manual_seed(seed)
    net = build_model(tiny_config(kind, vocab_size, shape, **changes))
    moved_away(net, away)
    return net.eval()


@torch.no_grad()
def moved_away(net, distance):
    """Change every parameter by a normal draw of this standard deviation."""
    if distance:
        for parameter in net.parameters():
            parameter += distance * torch.randn_like(parameter)


def half_masked(length, batch=2, vocab_size=40):
    """Random rows and the same with about half of the tokens masked -> x0, xt (B, T)."""
    generator = torch.Generator().manual_seed(length)
    x0 = torch.randint(1, vocab_size, (batch, length), generator=generator)
    mask = torch.rand(batch, length, generator=generator) < 0.5
    return x0, torch.where(mask, vocab_size, x0)


@torch.no_grad()
def nll_by_steps(net, x0):
    """-log p of every token (R, T) left to right, token by token behind the start."""
    cache = net.new_cache(len(x0), x0.shape[1])
    states = [net.clean_states(x0[:, :1])]      # what the start alone says
    for i in range(x0.shape[1] - 1):
        states.append(net.step(x0[:, i:i + 1], cache))
    logp = net.logits(torch.cat(states, dim=1)).log_softmax(-1)
    return -logp.gather(-1, x0[..., None])[..., 0]


def scratch():
    """A temporary folder, in memory if there is such a thing: for what writes thousands of small
    files.
    """
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
