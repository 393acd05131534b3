"""Low-rank adapters: a model learns something new, and the weights that it has stay as they are.

    adapt(model, rank)                # from here on only the adapters learn
    own_tensors(model)                # what a checkpoint of it holds: the adapters alone
    merged(base, adapters)            # the tensors of a plain model that computes the same

Each matrix W (O, I) of the layers gets A (R, I) and B (O, R) beside it and answers W x + B A x
(Hu et al. 2021). B begins at zero, so the first forward is the base's, bit for bit. The embedding,
the norms and the convolutions are frozen as they are.

Used by training/. checkpoint.py merges when it loads a model, so no other command knows of
adapters.

Legend: I numbers in, O numbers out, R rank.
"""
import hashlib

import torch
from torch import nn

from common.console import UserError
from layers import Linear, product
from model import build_model
from model_config import count_params


class AdaptedLinear(Linear):
    """A matrix that is frozen, and its adapter."""

    def __init__(self, frozen, rank):
        inputs = frozen.in_features
        outputs = frozen.out_features
        super().__init__(inputs, outputs)
        self.weight = frozen.weight                                                # (O, I)
        self.lora_a = nn.Parameter(torch.randn(rank, inputs) * inputs ** -0.5)     # (R, I)
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank))                     # (O, R)

    def forward(self, x):
        return super().forward(x) + product(product(x, self.lora_a), self.lora_b)


def adapt(model, rank):
    """Freeze the model, and put an adapter beside each matrix of its layers."""
    model.requires_grad_(False)
    for module in list(model.layers.modules()):
        for name, child in module.named_children():
            if type(child) is Linear:
                setattr(module, name, AdaptedLinear(child, rank))


def trained_parameters(cfg, rank):
    """How many parameters learn: those of the adapters, or all without them (rank 0)."""
    if not rank:
        return count_params(cfg)
    with torch.device("meta"):                  # in no memory
        model = build_model(cfg)
        adapt(model, rank)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def own_tensors(model):
    """{name: tensor} for a checkpoint: the adapters if the model has some, else all."""
    tensors = model.state_dict()
    adapters = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    return adapters or tensors


def merged(base, adapters):
    """{name: tensor} of the base's model and of its adapters -> those of a plain model."""
    tensors = dict(base)
    try:
        for name, a in adapters.items():
            if name.endswith("lora_a"):
                matrix = name.removesuffix("lora_a") + "weight"
                b = adapters[name.removesuffix("a") + "b"]
                tensors[matrix] = base[matrix] + b @ a                             # (O, I)
    except (KeyError, RuntimeError):
        raise UserError(f"the adapters do not fit their base at {name}") from None
    return tensors


def fingerprint(tensors):
    """The sha256 of named tensors, however many files they lie in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
