"""Weights that are kept in bf16 (--param_dtype bf16): which ones, and how an update that is too
small for bf16 still arrives.

Used by training/setup.py (store_in_bf16) and training/optim.py (Rounded). Notable:
* bf16 has 8 bits: a weight of 1 cannot move by 2e-4, the next number is 0.004 away. So a result is
  rounded up or down at random, up as often as it is near the upper neighbour: right on average;
* the random bits are a function of (seed of the step, name, place in the tensor), never of history:
  a resumed run has the same ones, and so has every rank, whatever part of a tensor it holds.
"""
import hashlib

import torch
from torch import nn

from layers import Linear, TiedEmbedding

PIECE = 1 << 22     # numbers of a weight that are widened at a time
# how places become bits (the two factors of "lowbias32", a hash without visible bias)
SPREAD = 0x9E3779B1
MIX = (0x7FEB352D, 0x846CA68B)


def store_in_bf16(model):
    """Keep the matrices and the embedding in bf16, which is nearly all of a model. Norms,
    convolutions and what a layer's memory is made of stay in float32.
    """
    for module in model.modules():
        if isinstance(module, (Linear, TiedEmbedding)):
            module.weight = nn.Parameter(module.weight.detach().bfloat16())


def signed(number):
    """32 bits as the int32 that has them."""
    number &= 0xFFFFFFFF
    return number - (1 << 32) if number >= 1 << 31 else number


def key_of(seed, name, slot):
    """What makes the bits of one tensor in one step its own."""
    digest = hashlib.sha256(f"{seed} {name} {slot}".encode()).digest()
    return signed(int.from_bytes(digest[:4], "big"))


def random_bits(key, begin, count, device):
    """16 random bits for each of the places begin, begin + 1, ... of a tensor -> (count,) int32."""
    x = torch.arange(begin, begin + count, dtype=torch.int32, device=device)
    x.mul_(signed(SPREAD)).add_(key)
    for shift, factor in zip((16, 15), MIX, strict=True):
        x.bitwise_xor_(shifted_right(x, shift)).mul_(signed(factor))
    return x.bitwise_xor_(shifted_right(x, 16)).bitwise_and_(0xFFFF)


def shifted_right(x, shift):
    """x of 32 bits without its sign, so that zeros come in from the left."""
    return x.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1)


def round_into(narrow, wide, bits):
    """Round float32 numbers into bf16: a bf16 number is the upper half of a float32 number, so
    random bits are added to the lower half, and it is cut off.
    """
    number = wide.view(torch.int32) + bits
    narrow.copy_(number.bitwise_and_(-65536).view(torch.float32))


def local(tensor):
    """What this process holds of a tensor, in the same memory: with --fsdp a part, else all."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def first_place(tensor):
    """The place in the whole tensor of the first number that this process holds: --fsdp gives each
    rank equally many rows, the last ones fewer.
    """
    if not hasattr(tensor, "to_local"):
        return 0
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    return tensor.device_mesh.get_local_rank() * rows * tensor[0].numel()


class Rounded(torch.optim.Optimizer):
    """An optimizer of bf16 weights whose memory of them is in bf16 too. Piece by piece, weight and
    memory become float32, one of PyTorch's (or Lion) makes its ordinary step, and the result is
    rounded. Float32 weights among the groups get the ordinary step alone.

    make(groups, lr): that optimizer. slots: what it remembers of a weight. whole: it needs matrices
    as they are. Set `seed` before each step.
    """

    def __init__(self, groups, lr, make, slots, whole):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.make = make
        self.slots = slots
        self.whole = whole
        self.seed = 0

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                if p.grad is not None:
                    self.update(group, name, p)

    def update(self, group, name, p):
        state = self.state[p]
        for slot in self.slots:
            if slot not in state:
                state[slot] = torch.zeros(()) if slot == "step" else torch.zeros_like(p)
        kept = {"weight": local(p)}
        for slot in self.slots:
            if slot != "step":
                kept[slot] = local(state[slot])
        grad = local(p.grad).contiguous()

        size = kept["weight"].numel()
        offset = first_place(p)
        if self.whole:
            self.update_piece(group, name, offset, kept, grad, state)
        else:
            for begin in range(0, size, PIECE):
                part = slice(begin, begin + PIECE)
                pieces = {slot: tensor.view(-1)[part] for slot, tensor in kept.items()}
                self.update_piece(
                    group, name, offset + begin, pieces, grad.view(-1)[part], state
                )
        if "step" in state:
            state["step"] += 1

    def update_piece(self, group, name, begin, kept, grad, state):
        """kept: {slot: a piece of the weight or of what is remembered of it}, whose first number
        has the place `begin`.
        """
        wide = {slot: tensor.float() for slot, tensor in kept.items()}
        weight = nn.Parameter(wide.pop("weight"))
        weight.grad = grad.float()
        one = self.make([{"params": [weight], "weight_decay": group["weight_decay"]}], group["lr"])
        if "step" in state:
            wide["step"] = state["step"].to(weight.device, copy=True)
        one.state[weight] = wide
        one.step()

        for slot, narrow in kept.items():
            if narrow.dtype is torch.bfloat16:
                result = weight.detach() if slot == "weight" else wide[slot]
                key = key_of(self.seed, name, slot)
                bits = random_bits(key, begin, narrow.numel(), narrow.device)
                round_into(narrow, result, bits.view(narrow.shape))
