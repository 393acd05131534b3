"""Decoding in bf16 and int8: the same function within a stated error, smaller weights, and no
silent fallback.
"""
import pytest
import torch
from tiny import tiny_model

from common.console import UserError
from layers import Linear
from sampling import fast
from sampling.decode import generate
from sampling.settings import Settings
from sampling.torch_model import TorchModel

KINDS = (fast.PackedBF16, fast.PackedInt8)


def net(kind):
    model = tiny_model(kind, 300, seed=1, d_model=64, n_layers=3, n_heads=4, d_ff=128)
    with torch.no_grad():
        model.head.weight.mul_(5)
    return model


def answers(model, ids):
    """Log-probabilities of the block behind a context, and of the token behind it, so that every
    product runs: of one row and of several, of the block and of the head.
    """
    with torch.no_grad():
        cache = model.new_cache(2, 48)
        model.step(ids[:, :20], cache)
        model.step(ids[:, 20:31], cache)
        behind = model.logits(model.step(ids[:, 31:32], cache))
        logits = torch.cat((behind, model(ids[:, 32:], cache)), dim=1)
        return logits[..., 1:-1].log_softmax(-1)


@pytest.mark.parametrize("precision, limit", [("bf16", 2e-3), ("int8", 1e-2)])
@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_products_in_few_bits_are_close(kind, precision, limit):
    ids = torch.randint(4, 300, (2, 48), generator=torch.Generator().manual_seed(0))
    exact, model = answers(net(kind), ids), net(kind)
    whole = fast.prepare(net(kind), "fp32")
    matrices = {name for name, m in model.named_modules() if isinstance(m, Linear)}
    few = fast.prepare(model, precision)
    replaced = {name for name, m in model.named_modules() if type(m) in KINDS}
    assert replaced == {*matrices, "head.product"}, "every matrix, and nothing else"
    got = answers(model, ids)
    divergence = (exact.exp() * (exact - got)).sum(-1)
    assert 0 < float(divergence.mean()) < limit  # 0 would mean that nothing was replaced
    assert few < whole * {"bf16": 0.52, "int8": 0.27}[precision]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_end_of_a_branch_is_added_to_what_it_began_with(precision):
    model = net("primary")
    width = model.layers[0].out_proj.in_features
    fast.prepare(model, precision)
    product = model.layers[0].out_proj
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 64, generator=g), torch.randn(5, width, generator=g)
    added = product.residual_add(x, y, None).float()
    torch.testing.assert_close(added, x + product(y).float())


def test_fp32_changes_nothing_and_int8_says_where_it_works():
    ids = torch.randint(4, 300, (2, 48))
    model = net("primary")
    before = answers(model, ids)
    fast.prepare(model, "fp32")
    assert torch.equal(before, answers(model, ids))
    with pytest.raises(UserError, match="only on|CPU only"):
        fast.pick("int8", torch.device("cuda"))
    assert fast.pick("fp32", torch.device("cpu"))[0] == "fp32"


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_whole_texts(kind, precision):
    model = net(kind)
    fast.prepare(model, precision)
    writer = TorchModel(model)
    for mode, size in (("full", 8), ("block", 8), ("block_frozen", 8), ("block_frozen", 1)):
        out = generate(
            writer, [2, 5, 7], Settings(20, 4, mode=mode, block_size=size, eos_id=None), [0, 1]
        )
        assert [len(row) for row in out.rows] == [20, 20]


def test_int8_rows_do_not_mix():
    """A token's scale is its own: an outlier in one row of a batch moves no other row, and costs
    that row's precision alone.
    """
    torch.manual_seed(0)
    product = fast.PackedInt8(torch.randn(48, 64))
    x = torch.randn(3, 5, 64)
    alone, loud = product(x[:1]), x.clone()
    loud[1] *= 1000
    loud[2] = 0
    got = product(loud)
    assert torch.equal(got[:1], alone) and (got[2] == 0).all()
    torch.testing.assert_close(got[1] / 1000, product(x)[1], rtol=1e-4, atol=1e-4)
