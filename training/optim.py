"""What moves the weights: parameter groups, AdamW, Muon or Lion, learning rates, averaged weights,
clipping, loss scaling.

Used by train.py; nothing here runs by itself. Notable:
* every trainable parameter is in exactly one group, by a rule on its name; only matrices decay;
* all optimizer state is a flat dict of named tensors, so it lives in safetensors and resumes bit
  for bit;
* no small update is rounded away. By default the weights are float32 (autocast casts them for each
  product); with --param_dtype bf16 they and the optimizer's state are bf16, and rounded at random
  (training/rounding.py). Gradients add up in float32 in both cases.

Bytes of a parameter: weight, gradient, state; of AdamW, of Muon (the embedding: as AdamW), of Lion
    fp32        4 + 4 + 8 = 16      4 + 4 + 4 = 12      4 + 4 + 4 = 12
    bf16        2 + 4 + 4 = 10      2 + 4 + 2 = 8       2 + 4 + 2 = 8
A bf16 weight beside a float32 master would be 2 + 4 + 4 + 8 = 18 with AdamW, more than float32
weights alone. In bf16 are the matrices and the embedding; --ema keeps 4 bytes more in both cases.
While an update is made, PIECE = 4M numbers of one weight are wide, which takes some 100 MB; with
Muon one whole matrix, 20 bytes a number. On float32 weights autocast keeps a second, 16-bit copy of
the matrices from forward to backward, 2 bytes more, which bf16 weights do not need.
"""
import contextlib
import functools
import inspect
import math
import re
from types import SimpleNamespace

import torch
from torch import nn

from common.console import UserError
from training.rounding import Rounded, local

BETAS = (0.9, 0.95)       # AdamW; the short second moment suits few, noisy steps
LION_BETAS = (0.9, 0.99)  # of the update; of the momentum
FALL = 0.2                # share of all steps in which the wsd schedule falls
# words in the names of parameters that neither decay nor go to Muon, whatever their shape
NOT_MATRICES = {"head", "conv", "norm", "decay", "slot", "null"}
SLOTS = {  # what torch's optimizers remember of each parameter
    "adamw": ("step", "exp_avg", "exp_avg_sq"),
    "muon": ("momentum_buffer",),
    "lion": ("exp_avg",),
}


def param_groups(model, weight_decay):
    """Two groups: matrices, which decay, and the rest (embeddings, norms, convolutions, scales),
    which does not.
    """
    # a tied weight appears once
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

    matrices, rest = [], []
    for name, p in named.items():
        plain = NOT_MATRICES.isdisjoint(re.split("[._]", name))
        if plain and p.ndim >= 2 and id(p) not in embeddings:
            matrices.append(name)
        else:
            rest.append(name)

    groups = []
    for kind, names, decay in (("matrices", matrices, weight_decay), ("rest", rest, 0.0)):
        if names:
            params = [named[name] for name in names]
            groups.append({"kind": kind, "names": names, "params": params, "weight_decay": decay})
    return groups


def without_compiler():
    """PyTorch asks its compiler to stay out of these methods, and imports it to ask: 1.5 s of the
    processor at each start of a training. Marked so, they are called as they are.
    """
    for name in ("add_param_group", "state_dict", "load_state_dict", "zero_grad"):
        method = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        method.__dynamo_disable = method


without_compiler()


class AdamW(torch.optim.AdamW):
    """PyTorch's, with the step under what imports the compiler."""
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(torch.optim.Muon):
    """The same for Muon."""
    step = torch.no_grad()(inspect.unwrap(torch.optim.Muon.step))


class Lion(torch.optim.Optimizer):
    """p -= lr * (sign(b1 m + (1-b1) g) + decay p), and only then m = b2 m + (1-b2) g, from the old
    m.
    """

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        b1, b2 = LION_BETAS
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                m = self.state[p]["exp_avg"]
                update = m.mul(b1).add_(p.grad, alpha=1 - b1).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


def one_optimizer(kind, fused, groups, lr):
    """The torch optimizer of that kind for these groups."""
    if kind == "adamw":
        return AdamW(groups, lr=lr, betas=BETAS, fused=fused)
    if kind == "muon":
        # match_rms_adamw makes Muon's updates as large as AdamW's: one --lr serves all
        return Muon(groups, lr=lr, adjust_lr_fn="match_rms_adamw")
    return Lion(groups, lr)


def accumulate_in_float32(p):
    """Let the gradients of a bf16 weight add up in float32."""
    p.grad_dtype = torch.float32
    if hasattr(p, "to_local"):  # --fsdp adds to a gradient that is there, and would make a bf16 one
        p.grad = torch.zeros_like(p, dtype=torch.float32)


class Optimizers:
    """One or two torch optimizers that act as one; their whole state is a flat dict of named
    tensors. Of args it reads optimizer, lr, weight_decay and opt_fused.
    """

    def __init__(self, model, args):
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.bf16 = [p for p in self.named.values() if p.dtype is torch.bfloat16]
        for p in self.bf16:
            accumulate_in_float32(p)
        others = "lion" if args.optimizer == "lion" else "adamw"  # of what Muon does not take

        # which optimizer gets which part of which group
        plans = {"adamw": [], "muon": [], "lion": []}
        for group in param_groups(model, args.weight_decay):
            muon = []
            if args.optimizer == "muon" and group["kind"] == "matrices":
                muon = [name for name in group["names"] if self.named[name].ndim == 2]
            rest = [name for name in group["names"] if name not in muon]
            for kind, names in (("muon", muon), (others, rest)):
                if names:
                    params = [self.named[name] for name in names]
                    plans[kind].append({**group, "names": names, "params": params})

        self.parts = {}
        able = all(p.device.type in ("cpu", "cuda") for p in self.named.values())
        for kind, groups in plans.items():
            if not groups:
                continue
            make = functools.partial(one_optimizer, kind, args.opt_fused and able)
            if self.bf16:
                self.parts[kind] = Rounded(groups, args.lr, make, SLOTS[kind], kind == "muon")
            else:
                self.parts[kind] = make(groups, args.lr)
        self.check(model)

    def check(self, model):
        """Every trainable parameter is in exactly one group."""
        held = []
        for part in self.parts.values():
            for group in part.param_groups:
                held += group["names"]
        held.sort()
        wanted = sorted(name for name, p in model.named_parameters() if p.requires_grad)
        assert held == wanted, f"in no group, or in two: {sorted(set(held) ^ set(wanted)) or held}"

    def step(self):
        for part in self.parts.values():
            part.step()

    def zero_grad(self):
        for p in self.named.values():
            p.grad = None
        for p in self.bf16:
            accumulate_in_float32(p)

    def set_lr(self, lr):
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = lr

    def set_seed(self, seed):
        """The seed of the next step's rounding; only bf16 weights need it."""
        for part in self.parts.values():
            part.seed = seed

    def state_tensors(self):
        """{"adamw.<parameter>.exp_avg": tensor, ...}: references, so save or copy them before the
        next step.
        """
        flat = {}
        for kind, part in self.parts.items():
            for group in part.param_groups:
                for name, p in zip(group["names"], group["params"], strict=True):
                    for slot, tensor in part.state.get(p, {}).items():
                        flat[f"{kind}.{name}.{slot}"] = tensor
        return flat

    @torch.no_grad()
    def load_state_tensors(self, tensors):
        """Restores what state_tensors gave, exactly; what does not fit is refused before anything
        has changed.
        """
        left = dict(tensors)  # what no parameter has taken yet

        def take(key, shape):
            found = tuple(left[key].shape) if key in left else "missing"
            if found != tuple(shape):
                raise UserError(
                    f"the optimizer state does not fit: {key} is {found}; use --reset_optimizer"
                )
            return left.pop(key).clone()

        # torch numbers the parameters of an optimizer through all of its groups
        states = {}
        for kind, part in self.parts.items():
            names = [name for group in part.param_groups for name in group["names"]]
            state = {}
            for index, name in enumerate(names):
                if not any(f"{kind}.{name}.{slot}" in left for slot in SLOTS[kind]):
                    continue  # it never had a gradient
                state[index] = {}
                for slot in SLOTS[kind]:
                    shape = () if slot == "step" else self.named[name].shape
                    state[index][slot] = take(f"{kind}.{name}.{slot}", shape)
            states[kind] = {"state": state, "param_groups": part.state_dict()["param_groups"]}
        if left:
            raise UserError(
                f"the optimizer state does not fit: {min(left)} is unknown here; use "
                "--reset_optimizer"
            )

        for kind, state in states.items():
            self.parts[kind].load_state_dict(state)


make_optimizer = Optimizers


class LossScaler:
    """float16 has no room for small gradients: the loss is scaled up before backward, the gradients
    down again after it.

    torch.amp.GradScaler over Optimizers: the scale halves at an overflow and doubles after 2,000
    steps without one. Works on CPU tensors too. Off, every method does nothing.
    """
    def __init__(self, optimizer, device, on):
        self.on = on
        self.overflows = 0  # steps that only their scale has spoiled
        self.scaler = torch.amp.GradScaler(device.type, enabled=on)
        self.work = SimpleNamespace(param_groups=[{"params": list(optimizer.named.values())}])

    def scale(self, loss):
        return self.scaler.scale(loss)

    def unscale(self):
        self.scaler.unscale_(self.work)

    def update(self, loss, gnorm):
        """After unscale(): sets the next scale. Returns whether this step was an overflow, which
        the lower scale mends, and not a bad number of the model's own.
        """
        before = self.scaler.get_scale()
        self.scaler.update()
        overflow = self.on and before > 1 and math.isfinite(loss) and not math.isfinite(gnorm)
        self.overflows += overflow
        return overflow

    def state(self):
        if not self.on:
            return None
        return {**self.scaler.state_dict(), "overflows": self.overflows}

    def load(self, state):
        if not self.on or not state:  # None: the run had no scaling until now
            return
        scaler_state = dict(state)
        self.overflows = scaler_state.pop("overflows")
        self.scaler.load_state_dict(scaler_state)


def clip_grad_norm(model, max_norm):
    """The gradient norm before clipping, as a tensor; max_norm 0 only measures."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    if hasattr(norm, "full_tensor"):  # of sharded gradients it is a sharded sum
        norm = norm.full_tensor()
    return norm


def lr_at(step, max_steps, lr, warmup, schedule, min_ratio):
    """The rate of the update that follows `step` finished ones; warmup None: automatic.

    cosine ends on min_ratio * lr with the last update; wsd stays at lr, then falls in a straight
    line to nearly 0.
    """
    if warmup is None:
        warmup = min(300, max_steps // 20)
    warmup = min(warmup, max_steps)
    now = min(step + 1, max_steps)                                    # 1 .. max_steps
    if now <= warmup:
        return lr * now / warmup
    if schedule == "constant":
        return lr
    if schedule == "wsd":
        falling = max(1, min(round(FALL * max_steps), max_steps - warmup))
        return lr * min(1.0, (max_steps - now + 1) / falling)
    assert schedule == "cosine", schedule
    done = (now - warmup) / (max_steps - warmup)                      # > 0 .. 1
    return lr * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


class EMA:
    """Averaged weights in float32. The decay starts small, min(decay, (1 + n) / (10 + n)) at update
    n, or a short run would be an average of its random start. Store `updates`, the n, beside
    state(), which has the model's keys.
    """

    def __init__(self, model, decay):
        self.model = model
        self.decay = decay
        self.updates = 0
        self.params = list(model.parameters())                        # tied ones once
        self.shadow = [p.detach().float().clone() for p in self.params]

    @torch.no_grad()
    def update(self):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [local(p).detach().float() for p in self.params]
        torch._foreach_lerp_([local(average) for average in self.shadow], weights, 1 - decay)
        self.updates += 1

    def state(self):
        averages = {}
        for p, average in zip(self.params, self.shadow, strict=True):
            averages[id(p)] = average
        weights = self.model.state_dict(keep_vars=True)
        return {name: averages.get(id(weight), weight) for name, weight in weights.items()}

    @torch.no_grad()
    def load(self, tensors, updates):
        state = self.state()
        own = {name: tensor.shape for name, tensor in state.items()}
        given = {name: tensor.shape for name, tensor in tensors.items()}
        if own != given:
            raise UserError(
                "the averaged weights do not fit the model: use --ema 0, or the old shape"
            )
        for name, tensor in state.items():
            tensor.copy_(tensors[name])
        self.updates = updates

    @contextlib.contextmanager
    def swap(self):
        """Inside, the model has the averaged weights; afterwards its own again, bit for bit."""
        # the same memory, without autograd
        params = [local(p).detach() for p in self.params]
        own = [p.clone() for p in params]
        torch._foreach_copy_(params, [local(average) for average in self.shadow])
        try:
            yield
        finally:
            torch._foreach_copy_(params, own)
