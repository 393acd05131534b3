"""Properties of training/optim.py: exact resume, groups by name, Lion against five lines,
schedules, averages in closed form.
"""
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from torch import nn

import checkpoint
from common.console import UserError
from common.files import ROOT
from training import optim


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for models this small a second thread only waits
    yield
    torch.set_num_threads(threads)


class Fake(nn.Module):
    """The names and shapes of the real models: a tied embedding, a 2-D convolution, slots, norms,
    fused matrices.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Module()
        self.conv.weight = nn.Parameter(torch.randn(8, 3))
        self.slot_key = nn.Parameter(torch.randn(2, 3, 4))
        self.decay = nn.Parameter(torch.randn(2, 3))
        self.in_proj = nn.Linear(8, 20, bias=False)
        self.stack = nn.Parameter(torch.randn(2, 10, 8) * 0.1)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        h = (
            self.norm(self.embed(ids))
            + self.conv.weight.sum(-1)
            + self.slot_key.mean()
            + self.decay.mean()
        )
        h = self.in_proj(h)
        return self.head(
            torch.tanh(h[..., :10]) @ self.stack[0] + torch.tanh(h[..., 10:]) @ self.stack[1]
        )


def args(optimizer):
    return SimpleNamespace(optimizer=optimizer, lr=3e-3, weight_decay=0.05, opt_fused=True)


def build(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = Fake().to(dtype)
    return model, optim.make_optimizer(model, args(kind))


def train(model, opt, start, stop):
    for step in range(start, stop):
        g = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 11, (4, 6), generator=g)
        opt.set_lr(optim.lr_at(step, 20, 3e-3, None, "cosine", 0.1))
        opt.set_seed(step)
        opt.zero_grad()
        loss = nn.functional.cross_entropy(
            model(ids).float().flatten(0, 1), (ids.flatten() + 1) % 11
        )
        loss.backward()
        optim.clip_grad_norm(model, 1.0)
        opt.step()
    return float(loss.detach())


def bits(model, opt):
    tensors = {**model.state_dict(), **opt.state_tensors()}
    return {key: t.clone() for key, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "muon", "lion"])
def test_2n_steps_equal_n_save_load_n(kind, dtype, tmp_path):
    model, opt = build(kind, dtype)
    first = train(model, opt, 0, 1)
    train(model, opt, 1, 5)
    checkpoint.save(
        tmp_path,
        5,
        model_state=model.state_dict(),
        optimizer_state=opt.state_tensors(),
        state={},
        config={},
        tokenizer_bytes=b"t",
    )
    assert train(model, opt, 5, 10) < first
    straight = bits(model, opt)
    for _ in range(2):  # resumed twice, and once from a resumed run's own save
        model, opt = build(kind, dtype)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        saved = checkpoint.load(tmp_path, parts=("model", "optimizer"))
        checkpoint.load_into(model, saved.model)
        opt.load_state_tensors(saved.optimizer)
        if saved.step < 7:
            train(model, opt, 5, 7)
            checkpoint.save(
                tmp_path,
                7,
                model_state=model.state_dict(),
                optimizer_state=opt.state_tensors(),
                state={},
                config={},
                tokenizer_bytes=b"t",
            )
        train(model, opt, 7, 10)
        resumed = bits(model, opt)
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[key], resumed[key]) for key in straight)


NO_COMPILER = """
import sys, torch
sys.path.insert(0, "tests")
from test_optim import build, train
for kind in ("adamw", "muon", "lion"):
    for dtype in (torch.float32, torch.bfloat16):
        model, opt = build(kind, dtype)
        train(model, opt, 0, 2)
        opt.load_state_tensors({key: t.clone() for key, t in opt.state_tensors().items()})
        train(model, opt, 2, 3)
sys.exit("torch._dynamo" in sys.modules)
"""


def test_no_step_imports_the_compiler():
    """It would take 1.5 s at each start of a training."""
    done = subprocess.run([sys.executable, "-c", NO_COMPILER], cwd=ROOT)
    assert done.returncode == 0


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_step_is_that_of_pytorch(kind, monkeypatch):
    mine = build(kind)
    train(*mine, 0, 4)
    for name in ("AdamW", "Muon"):
        monkeypatch.setattr(optim, name, getattr(torch.optim, name))
    theirs = build(kind)
    train(*theirs, 0, 4)
    mine = bits(*mine)
    theirs = bits(*theirs)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_without_the_state_the_result_differs():
    """The test above can fail."""
    model, opt = build("adamw")
    train(model, opt, 0, 5)
    other, fresh = build("adamw")
    other.load_state_dict(model.state_dict())
    train(model, opt, 5, 10)
    train(other, fresh, 5, 10)
    assert not torch.equal(model.in_proj.weight, other.in_proj.weight)


def test_groups_by_name():
    groups = optim.param_groups(Fake(), 0.05)
    by_name = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert {name for name, decay in by_name.items() if decay} == {"in_proj.weight", "stack"}
    assert set(by_name) == {name for name, _ in Fake().named_parameters()}
    _, opt = build("muon")
    assert [g["names"] for g in opt.parts["muon"].param_groups] == [["in_proj.weight"]]
    assert opt.parts["muon"].param_groups[0]["weight_decay"] == 0.05
    _, opt = build("lion")
    assert [(g["weight_decay"], len(g["names"])) for g in opt.parts["lion"].param_groups] == [
        (0.05, 2),
        (0.0, 6),
    ]


@pytest.mark.parametrize("name", ["primary", "backup"])
def test_groups_of_the_real_models(name):
    net = tiny_model(name, 97, n_heads=4)
    decayed = {n for g in optim.param_groups(net, 0.1) for n in g["names"] if g["weight_decay"]}
    linears = {f"{n}.weight" for n, m in net.named_modules() if isinstance(m, nn.Linear)}
    # every Linear, and neither the tied head nor a convolution
    assert decayed == linears and linears
    opt = optim.make_optimizer(net, args("muon"))
    assert {n for g in opt.parts["muon"].param_groups for n in g["names"]} == linears


def test_a_stray_parameter_is_noticed():
    model, opt = build("muon")
    model.stray = nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="stray"):
        opt.check(model)


def test_frozen_parameters_are_left_alone():
    model = Fake()
    model.stack.requires_grad_(False)
    opt = optim.make_optimizer(model, args("adamw"))
    before = model.stack.clone()
    train(model, opt, 0, 2)
    assert torch.equal(before, model.stack) and not any(
        "stack" in key for key in opt.state_tensors()
    )


def test_lion_is_the_five_line_reference():
    torch.manual_seed(1)
    p = nn.Parameter(torch.randn(40))
    w, m, lr, wd = p.detach().clone(), torch.zeros(40), 1e-2, 0.1
    opt = optim.Lion([{"params": [p], "weight_decay": wd}], lr)
    for _ in range(100):
        p.grad = torch.randn(40)
        opt.step()
        # sign first, from the old momentum
        w = w * (1 - lr * wd) - lr * m.mul(0.9).add(p.grad, alpha=1 - 0.9).sign()
        m = m.mul(0.99).add(p.grad, alpha=1 - 0.99)
    assert torch.equal(p.detach(), w)


@pytest.mark.parametrize("spoil", ["shape", "missing slot", "unknown", "other optimizer"])
def test_state_that_does_not_fit_is_refused_and_changes_nothing(spoil):
    model, opt = build("adamw")
    train(model, opt, 0, 2)
    before, tensors = bits(model, opt), dict(opt.state_tensors())
    key = "adamw.in_proj.weight.exp_avg"
    if spoil == "shape":
        tensors[key] = torch.zeros(3)
    elif spoil == "missing slot":
        del tensors[key]
    elif spoil == "unknown":
        tensors["adamw.nobody.exp_avg"] = torch.zeros(3)
    else:
        tensors = {"lion.in_proj.weight.exp_avg": torch.zeros(20, 8)}
    with pytest.raises(UserError, match="reset_optimizer"):
        opt.load_state_tensors(tensors)
    after = bits(model, opt)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_clip_returns_the_norm_before_and_leaves_the_norm_after():
    model = nn.Linear(3, 3)
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    norm = optim.clip_grad_norm(model, 0)
    assert norm.item() == pytest.approx(2 * math.sqrt(12)) and model.weight.grad[0, 0] == 2.0
    assert optim.clip_grad_norm(model, 1.0).item() == pytest.approx(norm.item())
    assert optim.clip_grad_norm(model, 0).item() == pytest.approx(1.0, rel=1e-4)
    model.weight.grad[0, 0] = math.nan
    assert not torch.isfinite(optim.clip_grad_norm(model, 0))


@pytest.mark.parametrize("max_steps", [1, 2, 19, 20, 500, 20_000])
@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [None, 0, 7, 10**6])
def test_rates(max_steps, schedule, warmup):
    rates = [optim.lr_at(s, max_steps, 2.0, warmup, schedule, 0.1) for s in range(max_steps)]
    assert all(0 < r <= 2.0 for r in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(
        rates[top:], reverse=True
    )
    ramp = min(300, max_steps // 20) if warmup is None else min(warmup, max_steps)
    assert sum(r < 2.0 for r in rates[:ramp]) == max(0, ramp - 1)
    if ramp < max_steps and max_steps > 1:
        end = {"cosine": 0.2, "constant": 2.0}.get(schedule)
        assert end is None or rates[-1] == pytest.approx(end)
        if schedule == "wsd" and max_steps >= 20:
            assert rates[-1] < 0.6 and rates[max_steps // 2] == 2.0


def test_ema_is_the_closed_form():
    torch.manual_seed(0)
    model, decay, n = nn.Linear(5, 4), 0.9, 60
    ema, history = optim.EMA(model, decay), [model.weight.detach().double().clone()]
    for _ in range(n):
        with torch.no_grad():
            model.weight.add_(torch.randn(4, 5))
        ema.update()
        history.append(model.weight.detach().double().clone())
    weights = [1.0]
    for i in range(n):
        d = min(decay, (1 + i) / (10 + i))
        weights = [w * d for w in weights] + [1 - d]
    assert sum(weights) == pytest.approx(1)
    expected = sum(w * h for w, h in zip(weights, history, strict=True))
    assert torch.allclose(ema.state()["weight"].double(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_swaps_saves_and_resumes_exactly(dtype, tmp_path):
    model, opt = build("adamw", dtype)
    ema = optim.EMA(model, 0.99)
    for step in range(4):
        train(model, opt, step, step + 1)
        ema.update()
    state = ema.state()
    assert (
        state.keys() == model.state_dict().keys() and state["head.weight"] is state["embed.weight"]
    )
    before = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), ema.swap():
        assert torch.equal(model.in_proj.weight, state["in_proj.weight"].to(dtype))
        assert not torch.equal(model.in_proj.weight, before["in_proj.weight"])
        1 / 0  # noqa: B018
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    checkpoint.save(
        tmp_path,
        4,
        model_state=model.state_dict(),
        ema_state=state,
        state={"ema": ema.updates},
        config={},
        tokenizer_bytes=b"t",
    )
    saved = checkpoint.load(tmp_path, parts=("model", "ema"))
    other, _ = build("adamw", dtype)
    again = optim.EMA(other, 0.99)
    checkpoint.load_into(other, saved.model)
    again.load(saved.ema, saved.state["ema"])
    for e, m in ((ema, model), (again, other)):
        with torch.no_grad():
            m.in_proj.weight.mul_(1.5)
        e.update()
    assert all(torch.equal(t, again.state()[k]) for k, t in ema.state().items())
    with pytest.raises(UserError):
        again.load({"x": torch.ones(1)}, 1)


def test_ema_keeps_what_bf16_would_round_away():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    ema = optim.EMA(model, 0.9999)
    ema.updates = 10**6
    nn.init.constant_(model.weight, 2.0)
    for _ in range(100):
        ema.update()
    assert ema.state()["weight"].item() == pytest.approx(2 - 0.9999 ** 100, rel=1e-4)
