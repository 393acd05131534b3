"""The benchmarks beside public peers, as far as they are ours: cache protocols, stand-ins, equal sizes. No peer is needed.

    python -m pytest tests/test_peers.py
"""
import copy
import json  # noqa: F401  (stands in for a module that is there)
import sys
from types import SimpleNamespace

import conftest  # noqa: F401  (puts the repository on the path)
import pytest
import torch

import shapes
from benchmarks import decode_peers, peers, train_peers
from model import build_model

CFG = shapes.ModelConfig(model="backup", vocab_size=60, d_model=32, n_layers=3, n_heads=4, d_ff=48)


@pytest.fixture
def net():
    torch.manual_seed(1)
    torch.set_grad_enabled(False)
    yield build_model(CFG).eval()
    torch.set_grad_enabled(True)


IDS = torch.arange(4, 44)[None] % 57 + 3                                           # (1, 40)


def same(a, b):
    return torch.allclose(a[..., 4:60], b[..., 4:60], atol=1e-5)


def test_without_a_cache_it_is_our_model(net):
    out = decode_peers.PeerModel(net)(IDS)
    assert same(out.logits, net(IDS)) and out.past_key_values is None


def test_prefix_and_dual_cache_of_the_same_ids_change_nothing(net):
    """What a cache holds was computed from these very ids, so that any other logits are an error of the protocol."""
    model = decode_peers.PeerModel(net)
    full = model(IDS, use_cache=True)
    prefix = [tuple(t[:, :, :16] for t in layer) for layer in full.past_key_values]
    assert same(model(IDS[:, 16:], past_key_values=prefix, use_cache=True).logits, full.logits[:, 16:])
    place = torch.zeros(1, 40, dtype=torch.bool)
    place[:, 16:24] = True
    dual = model(IDS[:, 16:24], past_key_values=full.past_key_values, replace_position=place, use_cache=True)
    assert same(dual.logits, full.logits[:, 16:24])
    assert full.past_key_values[0][0].shape[2] == 40


def test_dual_cache_replaces_in_place_and_prefix_does_not(net):
    """The next call sees the block's new keys, as in Fast-dLLM; a prefix stays what it was."""
    model = decode_peers.PeerModel(net)
    past = model(IDS, use_cache=True).past_key_values
    before, other, place = past[0][0].clone(), IDS[:, 16:24] // 2 + 4, torch.zeros(1, 40, dtype=torch.bool)
    place[:, 16:24] = True
    model(other, past_key_values=past, replace_position=place)
    assert torch.equal(past[0][0][:, :, :16], before[:, :, :16]) and not torch.equal(past[0][0][:, :, 16:24], before[:, :, 16:24])


def test_the_uncached_reference_of_the_block_rule(net):
    """dllm's protocol (mask in, past out), with and without a cache, and our own frozen context: one and the same logits."""
    cached, uncached = decode_peers.PeerModel(net), decode_peers.Forgetful(net)
    block = torch.arange(40) // 8
    rule = (block[None] <= block[:, None])[None, None]                             # (1, 1, 40, 40)
    logits = []
    for model in (cached, uncached):
        past = model(IDS[:, :32], attention_mask=rule[..., :32, :32], use_cache=True).past_key_values
        logits.append(model(IDS[:, 32:], past_key_values=copy.deepcopy(past), attention_mask=rule[..., 32:, :]).logits)
    cache = net.new_cache(1, 40)
    for lo in range(0, 32, 8):
        net.commit(IDS[:, lo:lo + 8], cache)
    assert same(logits[0], logits[1]) and same(logits[0], net(IDS[:, 32:], cache))


def test_stand_ins_leave_nothing_behind():
    before = sys.modules.get("json")
    with peers.stand_ins({"json": dict(x=1), "model.modeling_none": dict(Name=3)}):
        from model.modeling_none import Name
        assert Name == 3 and sys.modules["json"].x == 1
    assert sys.modules["json"] is before and "model.modeling_none" not in sys.modules


def test_missing_peers_are_skipped_with_a_line_each(tmp_path, capsys):
    args = SimpleNamespace(peers=tmp_path, only=["hf", *decode_peers.SAMPLERS, "llama.cpp"], new=32, precisions=["bf16"],
                           per_forward=[4])
    assert decode_peers.contestants(args, [2, 5], tmp_path) == {}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["skipped " + name for name in args.only]


def test_training_of_equal_sizes_is_compared(tmp_path, capsys):
    """Ours with no peer at hand: every arm has run, with the backup's number of parameters, and the rest is named as skipped."""
    rows = train_peers.compare("tiny", SimpleNamespace(peers=tmp_path, only=["aria", *train_peers.SOURCES], rounds=1))
    assert [row["name"] for row in rows] == list(train_peers.OURS)
    assert all(abs(row["params"] / train_peers.target("tiny") - 1) < 0.01 and row["tok_per_s"] > 0 for row in rows)
    assert next(row["backup_ahead"] for row in rows if row["name"] == "aria backup") == 1
    assert capsys.readouterr().out.count("skipped ") == len(train_peers.SOURCES)


@pytest.mark.parametrize("wide", [1, 3])
def test_a_width_is_found_for_equal_parameters(wide):
    """fit_width: the closest multiple of 8, for any model that grows with its width."""
    width = train_peers.fit_width(lambda ff: torch.nn.Linear(ff, wide, bias=False), 1000 * wide + 3)
    assert width == 1000
