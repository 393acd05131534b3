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
    """In blocks all; in one block of the whole text there is nothing that a slot could forget, and
    no clean stream.
    """
    for block, idle in ((8, ()), (33, ("decay",))):
        net = tiny(name)
        x0, xt = texts(33)
        net.logits(net.block_states(xt, x0, block))[..., 1:VOCAB].logsumexp(-1).sum().backward()
        assert [
            n
            for n, p in net.named_parameters()
            if not n.endswith(idle) and (p.grad is None or not p.grad.any())
        ] == []


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
            other, noisy = x0.clone(), xt.clone()
            other[:, position] = other[:, position] % 39 + 1
            moved = (net.block_states(xt, other, block, first) - base).abs().amax(-1)
            assert (moved[:, :hi] == 0).all()
            assert (
                hi == length or name == "no_memory" and position == lo or (moved[:, hi:] > 0).any()
            )
            noisy[:, position] = noisy[:, position] % 39 + 1
            moved = (net.block_states(noisy, x0, block, first) - base).abs().amax(-1)
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


@pytest.mark.parametrize("block", [16, 128])
def test_arithmetic_of_the_reference_is_the_formula(block):
    c = model_config.ModelConfig(**STUDY)
    counted = eco_variants.train_flops("reference", c, 128, block, 0.5)
    assert counted == pytest.approx(model_config.train_flops(c, 128, block, 0.5), rel=0.05)


# ---- what each changes ---------------------------------------------------------------------------

@torch.no_grad()
def test_without_convolution_a_block_is_a_bag_and_a_rotary_memory_orders_it_again():
    x0, xt = texts(16)
    swapped = xt.clone()
    swapped[:, 9], swapped[:, 14] = xt[:, 14], xt[:, 9]
    gaps = {}
    for name in ("no_conv", "no_conv_rotary"):
        net = tiny(name)
        a, b = net.block_states(xt, x0, 8), net.block_states(swapped, x0, 8)
        gaps[name] = (a[:, 9] - b[:, 14]).abs().max()
    assert gaps["no_conv"] < 1e-5 and gaps["no_conv_rotary"] > 1e-3


@torch.no_grad()
def test_rotary_read_is_a_sum_over_relative_places():
    """Against loops: the state of two blocks, read by every token of the second."""
    layer = tiny("rotary_read").layers[0]
    H, M, E, S = 4, 4, 4, 3
    q, v, s = torch.randn(1, 2, S, H * E), torch.randn(1, 2, S, H * E), torch.randn(1, 2, S, H * M)
    own = layer.write(v, s)
    found = layer.read(q, own + layer.prefix(own, S))[0, 1].view(S, H, E)
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
        share = ((value + layer.slot_key[h]) @ q[0, 1].view(S, H, E)[i, h] * E ** -0.5).softmax(0)
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


@pytest.mark.parametrize(
    "block, first", [(64, None), (32, None), (32, 5), (16, 9), (8, None), (1, None)]
)
@torch.no_grad()
def test_cells_differ_by_what_their_slots_forget(block, first):
    """Slots that forget nothing see a block's cells as one bag, as the reference does; else the
    nearer cell counts more.
    """
    nets, (x0, xt) = [tiny(name) for name in ("cells_8", "reference")], texts(64)
    for layer in nets[1].layers:
        layer.decay.fill_(60.0)
    nets[0].load_state_dict(nets[1].state_dict())
    torch.testing.assert_close(
        *[net.block_states(xt, x0, block, first) for net in nets], atol=2e-5, rtol=1e-4
    )
    cells = tiny("cells_8").layers[0]
    # of the third of five
    around = cells.around(torch.eye(5).view(5, 5, 1, 1, 1).expand(5, 5, 4, 4, 4))[2, :, 0, 0, 0]
    assert (
        around[2] == around[1] == around[3] == 1
        and around[0] == around[4] == float(cells.decay_factor(8)[0, 0, 0]) < 1
    )


@torch.no_grad()
def test_attention_stands_in_every_nth_layer_and_time_is_the_blocks_own():
    for n, layers in ((2, [False, True, False]), (3, [False, False, True])):
        assert [hasattr(layer, "attn") for layer in tiny(f"attn_every_{n}").layers] == layers
    head = tiny("time_conditioning").head
    told = head.embed(
        torch.tensor(
            [[VOCAB, 5, 0, 0], [VOCAB, 5, 6, VOCAB], [7, 5, 6, 8], [5, VOCAB, VOCAB, VOCAB]]
        )
    )[:, 0]
    # (4, D): half (of what is there), half, 0, 3/4
    extra = told - head.weight[[VOCAB, VOCAB, 7, 5]]
    torch.testing.assert_close(extra[0], extra[1])
    assert all((extra[0] - extra[i]).abs().max() > 1e-3 for i in (2, 3))


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
