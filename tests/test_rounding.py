"""Properties of weights in bf16 (training/rounding.py): right on average, the same bits whoever
computes them, and they learn where plain bf16 stands still.
"""
import copy
from types import SimpleNamespace

import pytest
import torch
from test_distributed import BACKUP, SHAPE, alone, forked
from tiny import tiny_model
from torch import nn

import checkpoint
import config
import masking
from training import optim, rounding

KINDS = ("adamw", "lion", "muon")


def flat_optimizer(kind, params, lr, decay=0.0):
    """Rounded over these parameters, outside a model."""
    names = [str(i) for i in range(len(params))]
    groups = [{"names": names, "params": params, "weight_decay": decay}]
    for p in params:
        p.grad_dtype = torch.float32
    return rounding.Rounded(
        groups, lr, lambda *words: optim.one_optimizer(kind, True, *words), optim.SLOTS[kind],
        kind == "muon",
    )


# ---- the rounding --------------------------------------------------------------------------------

def test_the_bits_are_the_hash_of_the_place():
    """As in plain integers, from any place on."""
    def reference(place, key):
        x = (place * rounding.SPREAD + key) & 0xFFFFFFFF
        x = (x ^ (x >> 16)) * rounding.MIX[0] & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * rounding.MIX[1] & 0xFFFFFFFF
        return (x ^ (x >> 16)) & 0xFFFF
    key = rounding.key_of(7, "layers.0.in_proj.weight", "weight")
    bits = rounding.random_bits(key, 0, 5000, "cpu")
    assert bits.tolist() == [reference(i, key) for i in range(5000)]
    assert torch.equal(rounding.random_bits(key, 1234, 99, "cpu"), bits[1234:1333])

    # even over 16 ranges, and two keys have nothing in common
    many = rounding.random_bits(key, 0, 1 << 18, "cpu")
    counts = torch.bincount(many >> 12, minlength=16)
    assert (counts - (1 << 14)).abs().max() < 5 * (1 << 7)
    other = rounding.random_bits(rounding.key_of(8, "layers.0.in_proj.weight", "weight"), 0,
                                 1 << 18, "cpu")
    assert abs(float(torch.corrcoef(torch.stack((many, other)).float())[0, 1])) < 0.01


@pytest.mark.parametrize("value", [1.001, -1.001, 3e-8, -12345.678])
def test_rounding_is_right_on_average(value):
    wide = torch.full((1 << 16,), value)
    narrow = wide.bfloat16()
    bits = rounding.random_bits(rounding.key_of(1, "w", "weight"), 0, len(wide), "cpu")
    rounding.round_into(narrow, wide, bits)
    found = narrow.double()
    assert found.unique().numel() == 2, "the two neighbours"
    gap = float(found.max() - found.min())
    assert float(found.mean()) == pytest.approx(value, abs=5 * gap / 2 / 2 ** 8)
    kept = narrow.clone()
    rounding.round_into(narrow, kept.float(), bits)
    assert torch.equal(kept, narrow), "what bf16 can say stays as it is"


@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_small_updates_arrive(kind):
    """1,000 weights of 1 under 1,000 updates of 2e-4: plain bf16 does not move, these do, by 0.2 on
    average.
    """
    plain = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    rounded = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    bare = optim.one_optimizer(kind, False, [{"params": [plain], "weight_decay": 0.0}], 2e-4)
    ours = flat_optimizer(kind, [rounded], 2e-4)
    for step in range(1000):
        plain.grad = torch.ones(1000, dtype=torch.bfloat16)
        rounded.grad = torch.ones(1000)
        bare.step()
        ours.seed = step
        ours.step()
    assert torch.equal(plain, torch.ones_like(plain))
    assert 1 - float(rounded.detach().float().mean()) == pytest.approx(0.2, rel=0.05)


# ---- the optimizers ------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_float32_weights_get_the_ordinary_step(kind):
    torch.manual_seed(0)
    one = nn.Parameter(torch.randn(12, 20))
    two = nn.Parameter(one.detach().clone())
    bare = optim.one_optimizer(kind, True, [{"params": [one], "weight_decay": 0.1}], 1e-2)
    ours = flat_optimizer(kind, [two], 1e-2, 0.1)
    for _ in range(5):
        one.grad = torch.randn(12, 20)
        two.grad = one.grad.clone()
        bare.step()
        ours.step()
    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["adamw", "lion"])
def test_pieces_change_nothing(kind, monkeypatch):
    """And the bits of a step depend on its seed."""
    def weights(piece, seed):
        torch.manual_seed(0)
        monkeypatch.setattr(rounding, "PIECE", piece)
        p = nn.Parameter(torch.randn(13, 17).bfloat16())
        optimizer = flat_optimizer(kind, [p], 1e-2, 0.1)
        for step in range(5):
            p.grad = torch.randn(13, 17)
            optimizer.seed = seed + step
            optimizer.step()
        return [p.detach(), *optimizer.state[p].values()]
    whole = weights(1 << 22, 5)
    for one, other in zip(whole, weights(50, 5), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(whole[0], weights(50, 6)[0])


def trained(net, step_of, steps):
    """Train the model on one batch in float32 products -> its losses."""
    x0 = torch.randint(1, 40, (8, 24), generator=torch.Generator().manual_seed(1))
    masks = masking.left_to_right(8, 24)
    found = []
    for step in range(steps):
        loss = masking.denoising_loss(net, x0, masks, "elbo").loss
        loss.backward()
        step_of(step)
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("kind, lr", [("adamw", 1e-4), ("lion", 1e-4), ("muon", 3e-4)])
def test_they_learn_where_plain_bf16_stalls(kind, lr):
    """At a low rate and with all weights at a distance from 0, plain bf16 keeps most of the loss;
    rounded at random it falls as in float32.
    """
    net = tiny_model("backup", away=0.3).train()
    fall = {}
    for way in ("float32", "plain", "rounded"):
        other = copy.deepcopy(net)
        if way != "float32":
            rounding.store_in_bf16(other)
        args = SimpleNamespace(optimizer=kind, lr=lr, weight_decay=0.0, opt_fused=True)
        optimizer = optim.make_optimizer(other, args)
        if way == "plain":
            for part in optimizer.parts.values():
                nearest(part)

        def step_of(step, optimizer=optimizer):
            optimizer.set_seed(step)
            optimizer.step()
            optimizer.zero_grad()
        losses = trained(other, step_of, 25)
        fall[way] = losses[0] - losses[-1]
    assert fall["float32"] > 0.02, fall
    assert fall["plain"] < 0.6 * fall["float32"], fall
    assert fall["rounded"] == pytest.approx(fall["float32"], rel=0.15), fall


def nearest(part):
    """Let a Rounded optimizer round its weights as plain bf16 does."""
    rounded = part.update_piece

    def update_piece(group, name, begin, kept, grad, state):
        wide = {slot: tensor.float() for slot, tensor in kept.items()}
        rounded(group, name, begin, wide, grad, state)
        for slot, tensor in kept.items():
            tensor.copy_(wide[slot])
    part.update_piece = update_piece


@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_loss_and_gradients_are_those_of_the_same_weights_in_float32(kind):
    """Without autocast: bf16 is how a weight is kept, and its gradients add up in float32."""
    net = tiny_model(kind, away=0.1)
    rounding.store_in_bf16(net)
    wide = tiny_model(kind)
    wide.load_state_dict(net.state_dict())
    optim.make_optimizer(net, config.TrainArgs(optimizer="adamw", param_dtype="bf16"))
    assert trained(net, lambda _: None, 3) == trained(wide, lambda _: None, 3)
    for (name, p), q in zip(net.named_parameters(), wide.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-5, atol=1e-6, msg=name)
    kept = sum(p.numel() for p in net.parameters() if p.dtype is torch.bfloat16)
    assert kept > 0.9 * sum(p.numel() for p in net.parameters())


def test_a_frequent_token_has_its_whole_gradient():
    """Also under autocast: in bf16 a sum of ones ends at 256."""
    net = tiny_model("backup")
    rounding.store_in_bf16(net)
    net.head.weight.grad_dtype = torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        net.head.embed(torch.full((5, 1000), 7)).sum().backward()
    assert torch.equal(net.head.weight.grad[7], torch.full((32,), 5000.0))


# ---- whole trainings -----------------------------------------------------------------------------

BF16 = (*SHAPE, "--param_dtype", "bf16", "--eval_interval", 4)


def parts(run, step):
    saved = checkpoint.load(run / f"step_{step:06d}", parts=checkpoint.PARTS)
    return {**saved.model, **saved.optimizer, **{f"ema.{k}": t for k, t in saved.ema.items()}}


def nearly(one, other, share):
    """Of a weight in bf16, so many numbers at most were rounded the other way."""
    assert one.keys() == other.keys()
    for name, t in one.items():
        if t.dtype is torch.bfloat16 and not name.startswith("adamw."):
            assert float((t != other[name]).double().mean()) <= share, name
        torch.testing.assert_close(t.double(), other[name].double(), rtol=0.02, atol=1e-3)


def test_a_run_is_resumed_bit_for_bit_and_sampled(text, tmp_path):
    words = ("--data_dir", text, *BF16, "--model", "primary", "--optimizer", "muon")
    one, two = tmp_path / "one", tmp_path / "two"
    assert alone(*words, "--max_steps", 4, "--output_dir", one, "--show_samples") == 0
    assert alone(*words, "--max_steps", 2, "--output_dir", two) == 0
    assert alone("--resume", two, "--max_steps", 4, "--threads", 1) == 0
    straight, resumed = parts(one, 4), parts(two, 4)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    matrix = "layers.0.in_proj.weight"
    assert straight[matrix].dtype is torch.bfloat16
    assert straight["ema." + matrix].dtype is torch.float32
    assert {t.dtype for name, t in straight.items() if matrix in name and "step" not in name} == {
        torch.bfloat16, torch.float32}
    model, _, _ = checkpoint.load_model(one, torch.device("cpu"), config.check_saved)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.isfinite(model(torch.full((1, 4), 5))[..., 5]).all()


def test_two_ranks_agree_and_so_do_two_sharded_ones(text, tmp_path):
    """Sharded, a gradient is rounded to bf16 once for each forward, before it is added."""
    words = ("--data_dir", text, *BF16, *BACKUP, "--max_steps", 4)
    assert alone(*words, "--output_dir", tmp_path / "one") == 0
    one = parts(tmp_path / "one", 4)
    for name, more, share in (("two", (), 0.01), ("cut", ("--fsdp",), 0.05)):
        (tmp_path / f"job {name}").mkdir()
        codes, said = forked(
            2, tmp_path / f"job {name}", *words, *more, "--output_dir", tmp_path / name
        )
        assert codes == [0, 0], said[-3000:]
        nearly(one, parts(tmp_path / name, 4), share)
    assert alone("--resume", tmp_path / "cut", "--max_steps", 6, "--threads", 1) == 0
