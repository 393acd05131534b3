"""What moves the weights: parameter groups, AdamW, Muon or Lion, learning rates, averaged weights,
clipping, loss scaling.

Used by train.py; nothing here runs by itself. Notable:
* every trainable parameter is in exactly one group, by a rule on its name; only matrices decay;
* all optimizer state is a flat dict of named tensors, so it lives in safetensors and resumes bit
  for bit;
* bfloat16 weights get a float32 master copy: on their own they round away every small update.
"""
import contextlib
import math
import re
from types import SimpleNamespace

import torch
from torch import nn

from common.console import UserError

BETAS = (0.9, 0.95)       # AdamW; the short second moment suits few, noisy steps
LION_BETAS = (0.9, 0.99)  # of the update; of the momentum
FALL = 0.2                # share of all steps in which the wsd schedule falls
# words in names: no decay, no Muon
NOT_MATRICES = {"embed", "head", "conv", "norm", "decay", "slot", "null", "bias"}
SLOTS = {
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
    matrices = [name for name, p in named.items() if p.ndim >= 2 and id(p) not in embeddings
                and NOT_MATRICES.isdisjoint(re.split("[._]", name))]
    rest = [name for name in named if name not in matrices]
    return [
        {
            "kind": kind,
            "names": names,
            "params": [named[name] for name in names],
            "weight_decay": decay,
        }
        for kind, names, decay in (("matrices", matrices, weight_decay), ("rest", rest, 0.0))
        if names
    ]


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
            for p in (p for p in group["params"] if p.grad is not None):
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                m = self.state[p]["exp_avg"]
                update = m.mul(b1).add_(p.grad, alpha=1 - b1).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


class Optimizers:
    """One or two torch optimizers that act as one; their whole state is a flat dict of named
    tensors.
    """

    def __init__(self, model, args):
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {
            name: p.detach().float() for name, p in self.named.items() if p.dtype != torch.float32
        }
        self.fresh = True                      # the masters were not yet compared with the weights
        work = {**self.named, **self.masters}  # what the optimizers see
        fused = all(p.device.type in ("cpu", "cuda") for p in work.values())
        plans = {"adamw": [], "muon": [], "lion": []}
        for group in param_groups(model, args.weight_decay):
            flat = [n for n in group["names"] if work[n].ndim == 2]
            muon = flat if args.optimizer == "muon" and group["kind"] == "matrices" else []
            rest = [n for n in group["names"] if n not in muon]
            for kind, names in (
                ("muon", muon),
                ("lion" if args.optimizer == "lion" else "adamw", rest),
            ):
                if names:
                    plans[kind].append(
                        {**group, "names": names, "params": [work[n] for n in names]}
                    )
        make = {"adamw": lambda g: torch.optim.AdamW(g, lr=args.lr, betas=BETAS, fused=fused),
                # match_rms_adamw makes Muon's updates as large as AdamW's: one --lr serves all
                "muon": lambda g: torch.optim.Muon(g, lr=args.lr, adjust_lr_fn="match_rms_adamw"),
                "lion": lambda g: Lion(g, args.lr)}
        self.parts = {kind: make[kind](plan) for kind, plan in plans.items() if plan}
        self.check(model)

    def check(self, model):
        """Every trainable parameter is in exactly one group."""
        held = sorted(
            name
            for part in self.parts.values()
            for group in part.param_groups
            for name in group["names"]
        )
        wanted = sorted(name for name, p in model.named_parameters() if p.requires_grad)
        assert held == wanted, f"in no group, or in two: {sorted(set(held) ^ set(wanted)) or held}"

    @torch.no_grad()
    def step(self):
        for name, master in self.masters.items():
            p = self.named[name]
            # weights were loaded after masters were made
            if self.fresh and not torch.equal(master.to(p.dtype), p):
                master.copy_(p)
            master.grad = None if p.grad is None else p.grad.float()
        self.fresh = False
        for part in self.parts.values():
            part.step()
        for name, master in self.masters.items():
            self.named[name].copy_(master)

    def zero_grad(self, set_to_none=True):
        for p in self.named.values():
            p.grad = None if set_to_none or p.grad is None else p.grad.zero_()

    def set_lr(self, lr):
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = lr

    def state_tensors(self):
        """{"adamw.<parameter>.exp_avg": tensor, ...}: references, so save or copy them before the
        next step.
        """
        flat = {f"master.{name}.weight": master for name, master in self.masters.items()}
        for kind, part in self.parts.items():
            for group in part.param_groups:
                for name, p in zip(group["names"], group["params"], strict=True):
                    flat |= {
                        f"{kind}.{name}.{slot}": t for slot, t in part.state.get(p, {}).items()
                    }
        return flat

    @torch.no_grad()
    def load_state_tensors(self, tensors):
        """Restores what state_tensors gave, exactly; what does not fit is refused before anything
        has changed.
        """
        def take(key, shape):
            found = tuple(tensors[key].shape) if key in tensors else "missing"
            if found != tuple(shape):
                raise UserError(
                    f"the optimizer state does not fit: {key} is {found}; use --reset_optimizer"
                )
            return tensors.pop(key).clone()

        tensors, states = dict(tensors), {}
        weights = {
            name: take(f"master.{name}.weight", master.shape)
            for name, master in self.masters.items()
        }
        for kind, part in self.parts.items():
            state = {}
            for index, name in enumerate(
                name for group in part.param_groups for name in group["names"]
            ):
                slots, shape = SLOTS[kind], self.named[name].shape
                # none: it never had a gradient
                if any(f"{kind}.{name}.{slot}" in tensors for slot in slots):
                    state[index] = {
                        s: take(f"{kind}.{name}.{s}", () if s == "step" else shape) for s in slots
                    }
            states[kind] = {"state": state, "param_groups": part.state_dict()["param_groups"]}
        if tensors:
            raise UserError(
                f"the optimizer state does not fit: {min(tensors)} is unknown here; use "
                "--reset_optimizer"
            )
        for name, weight in weights.items():
            self.masters[name].copy_(weight)
        for kind, state in states.items():
            self.parts[kind].load_state_dict(state)
        self.fresh = False


make_optimizer = Optimizers  # (model, args); of args it reads optimizer, lr, weight_decay


class LossScaler:
    """float16 has no room for small gradients: the loss is scaled up before backward, the gradients
    down again after it.

    torch.amp.GradScaler over Optimizers: the scale halves at an overflow and doubles after 2,000
    steps without one. Works on CPU tensors too. Off, every method does nothing.
    """
    def __init__(self, optimizer, device, on):
        self.on, self.overflows = on, 0  # overflows: steps that only their scale has spoiled
        self.scaler = torch.amp.GradScaler(device.type, enabled=on)
        self.work = SimpleNamespace(param_groups=[{"params": list(optimizer.named.values())}])

    def scale(self, loss):
        return self.scaler.scale(loss)

    def unscale(self):
        self.scaler.unscale_(self.work)

    def update(self, loss, gnorm):
        """After unscale(): the next scale. -> was this an overflow, which the lower scale mends,
        and not a bad number?
        """
        before = self.scaler.get_scale()
        self.scaler.update()
        overflow = self.on and before > 1 and math.isfinite(loss) and not math.isfinite(gnorm)
        self.overflows += overflow
        return overflow

    def state(self):
        return {**self.scaler.state_dict(), "overflows": self.overflows} if self.on else None

    def load(self, state):
        if self.on and state:  # None: the run had no scaling until now
            self.overflows = state["overflows"]
            self.scaler.load_state_dict(
                {key: value for key, value in state.items() if key != "overflows"}
            )


def clip_grad_norm(model, max_norm):
    """The gradient norm before clipping, as a tensor; max_norm 0 only measures."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    # of sharded gradients it is a sharded sum
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def lr_at(step, max_steps, lr, warmup, schedule, min_ratio):
    """The rate of the update that follows `step` finished ones; warmup None: automatic.

    cosine ends on min_ratio * lr with the last update; wsd stays at lr, then falls in a straight
    line to nearly 0.
    """
    warmup = min(300, max_steps // 20) if warmup is None else min(warmup, max_steps)
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


def local(tensors):
    """What this process holds of them, in the same memory: with --fsdp a part, else all of it."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


class EMA:
    """Averaged weights in float32. The decay starts small, min(decay, (1 + n) / (10 + n)) at update
    n, or a short run would be an average of its random start. Store `updates`, the n, beside
    state(), which has the model's keys.
    """

    def __init__(self, model, decay):
        self.model, self.decay, self.updates = model, decay, 0
        self.params = list(model.parameters())                        # tied ones once
        self.shadow = [p.detach().float().clone() for p in self.params]

    @torch.no_grad()
    def update(self):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            local(self.shadow), [p.detach().float() for p in local(self.params)], 1 - decay
        )
        self.updates += 1

    def state(self):
        own = {id(p): s for p, s in zip(self.params, self.shadow, strict=True)}
        return {key: own.get(id(t), t) for key, t in self.model.state_dict(keep_vars=True).items()}

    @torch.no_grad()
    def load(self, tensors, updates):
        state = self.state()
        if {k: t.shape for k, t in state.items()} != {k: t.shape for k, t in tensors.items()}:
            raise UserError(
                "the averaged weights do not fit the model: use --ema 0, or the old shape"
            )
        for key, t in state.items():
            t.copy_(tensors[key])
        self.updates = updates

    @contextlib.contextmanager
    def swap(self):
        """Inside, the model has the averaged weights; afterwards its own again, bit for bit."""
        params = [p.detach() for p in local(self.params)]  # the same memory, without autograd
        own = [p.clone() for p in params]
        torch._foreach_copy_(params, local(self.shadow))
        try:
            yield
        finally:
            torch._foreach_copy_(params, own)
