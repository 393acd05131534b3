"""The ablation of EcoHybrid's block: every changed block learns, keeps the block rule and has the
size and effect that it claims.

    python -m pytest tests/test_variants.py
"""
import itertools
import json
import math
import shlex

import pytest
import torch
from safetensors import safe_open
from tiny import half_masked as texts, moved_away, tiny_config

import model_config
import run_experiments
from benchmarks import eco_variants
from benchmarks.eco_variants import VARIANTS
from common.console import UserError
from conftest import latest
from eco_hybrid import SHARED
from layers import rotary_table, rotate, unit_rms
from studies import STUDIES

VOCAB = 40
STUDY = dict(
    model="primary", vocab_size=4000, d_model=128, n_layers=4, n_heads=4, d_ff=512, memory_slots=8
)


def tiny(name, **changes):
    torch.manual_seed(1)
    shape = dict(n_layers=3, n_heads=4, conv_kernel=5)
    net = VARIANTS[name](tiny_config("primary", VOCAB, **shape | changes))
    moved_away(net, 0.1)
    return net.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name):
    """From both streams, and from each alone. In one block of the whole text there is nothing that
    a slot could forget.
    """
    x0, xt = texts(33)
    for block, idle in ((8, ()), (1, ()), (33, ("decay",))):
        net = tiny(name)
        noisy = None if block == 1 else xt
        (found,) = net.both_states(x0, noisy, block, with_clean=block < 33)
        asked = torch.cat([states for states in found if states is not None])
        net.logits(asked)[..., 1:VOCAB].logsumexp(-1).sum().backward()
        assert [
            n
            for n, p in net.named_parameters()
            if not n.endswith(idle) and (p.grad is None or not p.grad.any())
        ] == []


def other_token(ids, position):
    changed = ids.clone()
    changed[:, position] = changed[:, position] % (VOCAB - 1) + 1
    return changed


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_clean_stream_is_causal(name):
    """A clean token moves the answers for later ones only, that for the next one above all, and
    the noisy stream moves nothing here.
    """
    net = tiny(name)
    x0, xt = texts(39)
    base = net.clean_states(x0)
    for position in (0, 17, 37):
        moved = (net.clean_states(other_token(x0, position)) - base).abs().amax(-1)
        assert (moved[:, :position + 1] == 0).all() and (moved[:, position + 1] > 0).all()
        cut = net.clean_states(x0[:, :position + 1])  # as if the text ended here
        torch.testing.assert_close(cut, base[:, :position + 1], atol=1e-5, rtol=1e-5)
    ((clean, _),) = net.both_states(x0, xt, 8, 5)
    torch.testing.assert_close(clean, base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_block_rule(name):
    """A clean token moves later blocks only, a noisy one its own block only; with padding on both
    sides, which nobody sees.
    """
    net, block, first, length = tiny(name), 8, 5, 39
    x0, xt = texts(length)
    edges = [0, *range(first, length, block), length]
    base = net.block_states(xt, x0, block, first)
    for lo, hi in itertools.pairwise(edges):
        for position in (lo, hi - 1):
            moved = net.block_states(xt, other_token(x0, position), block, first) - base
            moved = moved.abs().amax(-1)
            assert (moved[:, :hi] == 0).all()
            assert (
                hi == length or name == "no_memory" and position == lo or (moved[:, hi:] > 0).any()
            )
            moved = net.block_states(other_token(xt, position), x0, block, first) - base
            moved = moved.abs().amax(-1)
            assert (
                (moved[:, lo:hi] > 0).any()
                and (moved[:, :lo] == 0).all()
                and (moved[:, hi:] == 0).all()
            )
        cut = net.block_states(xt[:, :hi], x0[:, :hi], block, first)  # as if the text ended here
        torch.testing.assert_close(cut, base[:, :hi], atol=1e-5, rtol=1e-5)
    (net.head.inputs if name == "untied" else net.head.weight)[0] += 1.0  # the padding's embedding
    torch.testing.assert_close(net.block_states(xt, x0, block, first), base, atol=0, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_context_does_not_know_the_cut(name):
    """A block's answers are the same behind another cut of the text before it."""
    net = tiny(name)
    x0, xt = texts(37)
    answers = [
        net.block_states(xt, x0, block, first)[:, 29:]
        for block, first in ((8, 5), (16, 13), (32, 29))
    ]
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], atol=2e-5, rtol=1e-4)
    alone = net.block_states(xt[:, 29:], x0[:, 29:], 8)
    assert not torch.allclose(alone, answers[0], atol=1e-3)         # the context is read


@pytest.mark.parametrize("name", VARIANTS)
def test_layers_are_of_one_size_and_counted_truly(name):
    c = model_config.ModelConfig(**STUDY)
    c = model_config.ModelConfig(**STUDY | dict(d_ff=eco_variants.match_d_ff(name, c)))
    net = VARIANTS[name](c)
    size = sum(p.numel() for p in net.layers.parameters())
    assert abs(size / model_config.block_params(model_config.ModelConfig(**STUDY)) - 1) < 0.02
    assert eco_variants.counts(name, c) == (sum(p.numel() for p in net.parameters()), size)
    if name == "reference":
        assert (
            eco_variants.counts(name, c)
            == (model_config.count_params(c), model_config.block_params(c))
            and c.d_ff == 512
        )


@pytest.mark.parametrize("block", [1, 16, 128])
def test_arithmetic_of_the_reference_is_the_formula(block):
    c = model_config.ModelConfig(**STUDY)
    counted = eco_variants.train_flops("reference", c, 128, block, 0.5)
    assert counted == pytest.approx(model_config.train_flops(c, 128, block, 0.5), rel=0.05)


# ---- what each changes ---------------------------------------------------------------------------

@pytest.mark.parametrize("block, first", [(64, 64), (32, 5), (8, 8), (1, 1)])
@torch.no_grad()
def test_states_made_one_by_one_are_the_layer(block, first):
    """What the variants that change a read or a write begin with is the reference."""
    nets = [eco_variants.changed(eco_variants.EveryState), VARIANTS["reference"]]
    torch.manual_seed(1)
    config = tiny_config("primary", VOCAB, n_layers=3, n_heads=4, conv_kernel=5)
    nets = [build(config).eval() for build in nets]
    moved_away(nets[1], 0.1)
    nets[0].load_state_dict(nets[1].state_dict())
    x0, xt = texts(64)
    noisy = None if block == 1 else xt
    for found, expected in zip(
        *[net.both_states(x0, noisy, block, first)[0] for net in nets], strict=True
    ):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_without_convolution_a_block_is_a_bag_and_a_rotary_memory_orders_it_again():
    """Two tokens change their places, and so do the answers of the rows that read them."""
    x0, xt = texts(16)
    swapped = xt.clone()
    swapped[:, 9], swapped[:, 14] = xt[:, 14], xt[:, 9]
    gaps = {}
    for name in ("no_conv", "no_conv_rotary"):
        net = tiny(name)
        a, b = net.block_states(xt, x0, 8), net.block_states(swapped, x0, 8)
        gaps[name] = (a[:, 10] - b[:, 15]).abs().max()
    assert gaps["no_conv"] < 1e-5 and gaps["no_conv_rotary"] > 1e-3


@torch.no_grad()
def test_rotary_read_is_a_sum_over_relative_places():
    """Against loops: what three tokens wrote, read by three others behind them."""
    layer = tiny("rotary_read").layers[0]
    H, M, E, S = 4, 4, 4, 3
    q, v, s = torch.randn(1, S, H * E), torch.randn(1, 2 * S, H * E), torch.randn(1, 2 * S, H * M)
    place = torch.arange(20, 20 + 2 * S)
    num = layer.write_at(v, s, place)
    found = layer.read_at(q, num, place[S:])[0].view(S, H, E)
    w = torch.exp(8 * torch.tanh(s / 8)).view(2 * S, H, M)
    for i, h in itertools.product(range(S), range(H)):
        num = torch.zeros(M, E)
        for j in range(2 * S):
            # (1, E)
            turned = rotate(
                v.view(2 * S, H, E)[j, h][None], rotary_table(torch.tensor([j - S - i]), E)
            )
            num += w[j, h][:, None] * turned
        value = unit_rms(num)
        share = ((value + layer.slot_key[h]) @ q[0].view(S, H, E)[i, h] * E ** -0.5).softmax(0)
        torch.testing.assert_close(found[i, h], share @ value, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_mean_read_reads_means_uncapped_writes_more_and_no_decay_forgets_nothing():
    q, v, s = torch.randn(1, 1, 16), torch.randn(1, 1, 16), torch.full((1, 1, 16), 20.0)
    layer = tiny("mean_read").layers[0]
    torch.testing.assert_close(layer.read(q, layer.write(v, s)), v)  # of one token: its own v
    ratio = tiny("uncapped_write").layers[0].write(v, s) / tiny("reference").layers[0].write(v, s)
    assert float(ratio.mean()) == pytest.approx(
        math.exp(20) / math.exp(8 * math.tanh(20 / 8) + SHARED), rel=1e-4
    )
    own = torch.randn(1, 5, 4, 4, 4)
    torch.testing.assert_close(tiny("no_decay").layers[0].prefix(own, 8)[:, 4], own[:, :4].sum(1))


@torch.no_grad()
def test_attention_stands_in_every_nth_layer():
    for n, layers in ((2, [False, True, False]), (3, [False, False, True])):
        assert [hasattr(layer, "attn") for layer in tiny(f"attn_every_{n}").layers] == layers


# ---- for real ------------------------------------------------------------------------------------

WORDS = """
    --only attn_every_2 --seeds 7
    --d_model 16 --n_layers 2 --n_heads 2 --d_ff 64 --memory_slots 2
    --seq_len 32 --batch_size 2 --grad_accum 1 --train_block_sizes T,8 --max_steps 4
    --eval_interval 2 --eval_batches 2 --save_interval 2 --log_interval 2
    --threads 1 --batches 2 --draws 1 --chain_docs 1
    --output_root variants --data_dir data/processed --execute
""".split()


def test_a_study_runs_once_and_is_reported(corpus_dir, monkeypatch, capfd):
    monkeypatch.chdir(corpus_dir)
    monkeypatch.setitem(STUDIES, "eco_variants", None)  # it is in the table only while it runs
    assert eco_variants.main(WORDS) == 0, capfd.readouterr().err
    lines = latest(corpus_dir / "variants/results.jsonl")
    assert set(lines) == {"reference_s7", "attn_every_2_s7"} and not capfd.readouterr().err.count(
        "finished before"
    )
    assert eco_variants.main(WORDS) == 0 and capfd.readouterr().err.count("finished before") == 2
    for name, line in lines.items():
        assert (line["study"], line["variant"], line["reference"], line["steps"]) == (
            "eco_variants",
            name[:-3],
            "reference",
            4,
        )
        (path,) = (corpus_dir / "variants" / name).glob("step_000004/model.safetensors")
        with safe_open(path, "pt") as f:
            found = {key: math.prod(f.get_slice(key).get_shape()) for key in f.keys()}
        assert line["params"] == sum(found.values()) and any("attn" in key for key in found) == (
            line["variant"] != "reference"
        )
        assert line["params_blocks"] == sum(
            n for key, n in found.items() if key.startswith("layers")
        )
        meta = json.loads(
            (corpus_dir / "variants" / name / "train.jsonl").read_text().splitlines()[0]
        )
        assert meta["params_total"] == line["params"]
    assert run_experiments.main(["--report", "variants", "--results_page", "page.md"]) == 0
    assert (corpus_dir / "page.md").read_text().count("| attn_every_2 |") == 1


@pytest.mark.parametrize(
    "line", ["--model backup", "--study loss", "--match flops", "--show_samples", "--output_dir x"]
)
def test_what_the_script_sets_itself_is_refused(line):
    with pytest.raises(UserError, match=line.split()[0]):
        eco_variants.main(shlex.split(line))
