"""The attention variants of the transformer: each is what its definition says, in both streams and
behind the frozen context; their caches, in float32, bf16 and int8; what they take.
"""
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from by_definition import by_definition
from safetensors.torch import load_file
from tiny import half_masked as texts, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import attention
import checkpoint
import config
import export
import masking
import model_config
import sample
import train
from attention import CACHES, VARIANTS, attend
from common.files import ROOT, to_json
from conftest import RUNS, TINY, call
from layers import rotary_table
from model import build_model
from model_config import ModelConfig
from sampling import fast
from training.optim import param_groups

V = 40           # the mask's id
ROUNDING = 1e-5  # of the size of what is compared
OPTIONS = ("null_attn", "tie_qk", "learned_temp")
# of a model with 4 heads and width 32; keys and values of different widths in the last two
SHAPES = {
    "mha": dict(attn="mha"),
    "gqa": dict(attn="gqa"),
    "gqa_kv2": dict(attn="gqa_kv2"),
    "bottleneck": dict(attn="bottleneck"),
    "decoupled": dict(attn="decoupled"),
    "wide_values": dict(attn="decoupled", sem_dim=8, geo_dim=8, attn_dim=32),
    "slim_values": dict(attn="decoupled", sem_dim=16, geo_dim=24, attn_dim=4),
}


def with_options(name):
    """Every sensible setting of the options for this shape."""
    for values in itertools.product((False, True), repeat=3):
        options = dict(zip(OPTIONS, values, strict=True))
        if not (options["tie_qk"] and name.startswith("gqa")):
            yield options


CASES = [
    pytest.param(dict(SHAPES[name], **options), id="-".join([name, *filter(options.get, OPTIONS)]))
    for name in SHAPES
    for options in with_options(name)
]
PLAIN = [pytest.param(shape, id=name) for name, shape in SHAPES.items()]
FULL = [
    pytest.param(
        dict(shape, null_attn=True, learned_temp=True, tie_qk=not name.startswith("gqa")), id=name
    )
    for name, shape in SHAPES.items()
]


def tiny(shape):
    return tiny_model("backup", seed=1, away=0.1, **dict(n_heads=4, n_layers=2) | shape)


def assert_same(found, wanted, tolerance=ROUNDING):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def assert_close(found, wanted, tolerance):
    """The same on average: the rms of the difference against the rms."""
    gap = (found.float() - wanted.float()).square().mean().sqrt()
    assert gap <= tolerance * wanted.float().square().mean().sqrt()


def edges(length, block, first):
    return list(itertools.pairwise([0, *range(first, length, block), length]))


# ---- what a variant is ---------------------------------------------------------------------------

def test_every_variant_is_in_every_table():
    choices = ModelConfig.__dataclass_fields__["attn"].metadata["choices"]
    assert set(choices) == set(VARIANTS) == set(model_config.ATTENTION_FLAGS)
    assert set(CACHES) == set(model_config.STORED)


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("length, block, first", [(13, 13, 13), (13, 5, 2), (7, 1, 1)])
@torch.no_grad()
def test_both_streams_are_what_their_definition_says(shape, length, block, first):
    """A second implementation in float64, row after row: no kernel, no mask, scores added up part
    by part.
    """
    net = tiny(shape)
    x0, xt = texts(length)
    (clean, noisy), = net.both_states(x0, xt, block, first)
    wanted, wanted_noisy = by_definition(net, x0[0], xt[0], block, first)
    assert_same(clean[0].double(), wanted)
    assert_same(noisy[0].double(), wanted_noisy)


@torch.no_grad()
def test_gqa_with_all_heads_is_mha():
    """The same weights, the same numbers to the last bit."""
    mha, gqa = tiny(SHAPES["mha"]), tiny(dict(attn="gqa", kv_heads=4))
    gqa.load_state_dict(mha.state_dict())
    x0, xt = texts(24)
    pairs = zip(gqa.both_states(x0, xt, 8)[0], mha.both_states(x0, xt, 8)[0], strict=True)
    for found, wanted in pairs:
        assert torch.equal(found, wanted)


@torch.no_grad()
def test_gqa_is_mha_whose_heads_share_their_keys():
    """Against another reading of the same rule: an mha with the rows of the shared heads twice."""
    gqa, mha = tiny(SHAPES["gqa_kv2"]), tiny(SHAPES["mha"])
    weights = gqa.state_dict()
    for name in weights:
        if "qkv_proj" in name:
            q, k, v = weights[name].split([32, 16, 16])
            k, v = (x.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for x in (k, v))
            weights[name] = torch.cat((q, k, v))
    mha.load_state_dict(weights)
    x0, xt = texts(24)
    pairs = zip(gqa.both_states(x0, xt, 8)[0], mha.both_states(x0, xt, 8)[0], strict=True)
    for found, wanted in pairs:
        assert_same(found, wanted)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["mha", "decoupled"])
@torch.no_grad()
def test_an_option_acts(name, option):
    """An untrained null key and temperature: the null key takes its share, the temperature is 1."""
    x0, _ = texts(16)
    plain = tiny(SHAPES[name])
    with_it = tiny(dict(SHAPES[name], **{option: True}))
    known = plain.state_dict()
    if option == "tie_qk":
        size = plain.layers[0].attn.parts[0]
        known = {key: w[size:] if "qkv_proj" in key else w for key, w in known.items()}
    with_it.load_state_dict(known, strict=False)
    for key, p in with_it.named_parameters():
        if key not in known:
            p.zero_()
    moved = (with_it.clean_states(x0) - plain.clean_states(x0)).abs().max()
    assert moved == 0 if option == "learned_temp" else moved > 1e-2
    for layer in with_it.layers:
        if option == "learned_temp":
            layer.attn.log_temperature += 0.5
    assert (with_it.clean_states(x0) - plain.clean_states(x0)).abs().max() > 1e-2


@pytest.mark.parametrize("shape", FULL)
@torch.no_grad()
def test_the_null_key_is_seen_by_all(shape):
    """Another null key moves every row's answer: clean rows, noisy blocks, whole rows, decoding."""
    net = tiny(dict(shape, n_layers=1))
    x0, xt = texts(19)

    def answers():
        clean, noisy = net.both_states(x0, xt, 5, 2)[0]
        cache = net.new_cache(2, 19)
        return [
            clean,
            noisy,
            net.block_states(xt, x0, 19),
            net.step(x0[:, :1], cache),
            net.step(x0[:, 1:7], cache),
            net.states(xt[:, 7:], cache),
        ]

    before = answers()
    net.layers[0].attn.null_key += torch.randn_like(net.layers[0].attn.null_key)
    for found, base in zip(answers(), before, strict=True):
        assert ((found - base).abs().amax(-1) > 1e-5).all()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_a_null_key_of_any_size_makes_no_nan(size):
    """Loved above all, or by nobody: numbers everywhere, the gradients included. A row that sees
    nothing else answers 0.
    """
    net = tiny(dict(attn="mha", null_attn=True))
    with torch.no_grad():
        for layer in net.layers:
            layer.attn.null_key.fill_(size)
    x0, xt = texts(19)
    for block in (19, 5, 1):
        found = net.both_states(x0, xt, block)[0]
        sum(states.square().mean() for states in found).backward()
        assert all(torch.isfinite(states).all() for states in found)
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())

    attn = net.layers[0].attn
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    keys, values = attn.behind(None, k, v)
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[:, 0] = True                                   # the null key alone
    assert (attend(q, keys, values, attn.scale, mask) == 0).all()


# ---- the one call of the kernel ------------------------------------------------------------------

def by_hand(q, k, v, scale, mask):
    """Scores, softmax and sum in float64; mask (Tq, Tk)."""
    groups = q.shape[1] // k.shape[1]
    k = k.double().repeat_interleave(groups, dim=1)
    v = v.double().repeat_interleave(groups, dim=1)
    scores = (q.double() @ k.mT * scale).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("heads, keys", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("size, value", [(8, 8), (8, 3), (3, 8)])
@pytest.mark.parametrize("old, new", [(0, 7), (1, 7), (9, 1), (9, 7), (3, 40)])
@torch.no_grad()
def test_attend_is_softmax_with_the_scale_that_is_given(
    monkeypatch, heads, keys, size, value, old, new
):
    """Causal behind any context, in pieces that do not divide the rows; with a mask and without."""
    monkeypatch.setattr(attention, "MASK", 1)           # 16 rows at a time
    q = torch.randn(2, heads, new, size)
    k, v = torch.randn(2, keys, old + new, size), torch.randn(2, keys, old + new, value)
    causal = torch.ones(new, old + new, dtype=torch.bool).tril(old)
    some = torch.rand(new, old + new) < 0.5
    some[:, 0] = True
    for scale in (0.3, 1.0):
        cases = [
            (attend(q, k, v, scale, causal=True), causal),
            (attend(q, k, v, scale, some), some),
            (attend(q, k, v, scale), torch.ones_like(some)),
        ]
        for found, mask in cases:
            assert_same(found.double(), by_hand(q, k, v, scale, mask))


@pytest.mark.parametrize("size, value", [(12, 12), (12, 3), (3, 12)])
@pytest.mark.parametrize("keys", [4, 2, 1])
def test_what_the_kernels_of_cuda_take(monkeypatch, keys, size, value):
    """With a mask: one number of heads, one width, a multiple of 8, and no copy of a shared key.
    Output and gradients are those of the definition.
    """
    met = []

    def kernel(q, k, v, **options):
        met.append((q, k, v, options))
        return plain(q, k, v, **options)

    plain = torch.nn.functional.scaled_dot_product_attention
    width = attention.kernel_width
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", kernel)
    monkeypatch.setattr(attention, "kernel_width", lambda key, val, device: width(key, val, "cuda"))
    tensors = [
        torch.randn(2, heads, rows, numbers, requires_grad=True)
        for heads, rows, numbers in ((4, 9, size), (keys, 11, size), (keys, 11, value))
    ]
    mask = torch.rand(9, 11) < 0.5
    mask[:, 0] = True
    found = attend(*tensors, 0.3, mask)

    (q, k, v, options), = met
    assert q.shape[1] == k.shape[1] == v.shape[1] and not options["enable_gqa"]
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 16
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert k.untyped_storage().nbytes() == 2 * keys * 11 * 16 * 4

    right = by_hand(*tensors, 0.3, mask)
    assert_same(found.double(), right)
    weights = torch.randn_like(found)
    asked = torch.autograd.grad((found * weights).sum(), tensors)
    defined = torch.autograd.grad((right * weights).sum(), tensors)
    for gradient, true in zip(asked, defined, strict=True):
        assert_same(gradient, true)


PEAK = """
import json, resource, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tiny import tiny_model

T, SMALL = 8192, dict(n_layers=1, n_heads=2, d_model=16, d_ff=16, seed=1, away=0.1)
torch.set_num_threads(1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def train(net, length):
    net.clean_states(torch.randint(1, 40, (1, length))).square().mean().backward()

@torch.no_grad()
def decode(net, length):
    cache = net.new_cache(1, length)
    net.step(torch.randint(1, 40, (1, length)), cache)

nets = {name: tiny_model("backup", **SMALL, **shape) for name, shape in SHAPES.items()}
for net in nets.values():
    train(net, 64)
    decode(net, 64)
base, grown = peak(), {}
for name, net in nets.items():
    train(net, T)
    grown[name, "train"] = peak() - base
    decode(net, T)
    grown[name, "decode"] = peak() - base
with sdpa_kernel(SDPBackend.MATH):
    train(nets["mha"], T)
grown["with a table of scores", "train"] = peak() - base
print(json.dumps([[*key, size / T / T] for key, size in grown.items()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory in these units is Linux's")
def test_nothing_in_the_causal_path_is_t_times_t():
    """Forward and backward over 8,192 clean rows, and 8,192 tokens read into a cache at once, in a
    process of its own: all of them together take less than one byte per pair of tokens, which is
    the smallest T x T tensor, a mask. A kernel that makes a table of scores shows in the figure.
    """
    shapes = {"mha": SHAPES["mha"]}
    for name in ("mha", "gqa", "bottleneck", "decoupled"):
        shapes[name + "_null"] = dict(SHAPES[name], null_attn=True)
    shapes["wide_values"] = dict(attn="decoupled", sem_dim=4, geo_dim=4, attn_dim=16)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"SHAPES = {shapes}\n{PEAK}"],
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"),
        capture_output=True,
        text=True,
        check=True,
    )
    *ours, (_, _, table) = json.loads(done.stdout)
    assert len(ours) == 2 * len(shapes)
    for name, what, bytes_per_pair in ours:
        assert bytes_per_pair < 1, (name, what)
    assert table > 4 * 2, "the measurement would not see a table of 2 heads"


@pytest.mark.parametrize("autocast", [False, True])
def test_all_layers_share_one_mask_of_the_noisy_rows(autocast):
    """The noisy rows see what a mask of (N, T + N) says. It is made once in the products' type: of
    a bool mask each layer would make, and keep, its own.
    """
    net = tiny_model("backup", n_heads=4, n_layers=3)
    x0, xt = texts(256, batch=1)
    rows = 256 + 256 // 16
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t        # held, so that no other has its place
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        net.both_states(x0, xt, 16)
    large = [t for t in kept.values() if t.numel() >= rows * rows]
    assert [t.shape for t in large] == [(rows, 256 + rows)]
    assert large[0].dtype == (torch.bfloat16 if autocast else torch.float32)


# ---- the frozen context --------------------------------------------------------------------------

@pytest.mark.parametrize("shape", CASES)
@torch.no_grad()
def test_cache_is_exact(shape):
    """Logits decoded behind the frozen context equal logits of the training form, for every size
    of a block and of the first one.
    """
    net = tiny(shape)
    length = 19
    x0, xt = texts(length)
    for block in (1, 2, 3, 7, 16, 19):
        for first in {1, (block + 1) // 2, block}:
            whole = net.logits(net.block_states(xt, x0, block, first))[..., 1:V]
            cache = net.new_cache(2, length)
            for lo, hi in edges(length, block, first):
                assert_same(net(xt[:, lo:hi], cache)[..., 1:V], whole[:, lo:hi])
                net.step(x0[:, lo:hi], cache)


@pytest.mark.parametrize("shape", PLAIN + FULL)
@torch.no_grad()
def test_the_context_does_not_know_how_it_was_cut(monkeypatch, shape):
    """At once, token by token and in odd pieces: the answers of training, and one cache. The pieces
    of the kernel's queries are shorter than the text.
    """
    monkeypatch.setattr(attention, "MASK", 1)           # 16 rows at a time
    net = tiny(shape)
    x0, xt = texts(45)
    wanted = net.clean_states(x0)[:, 1:]
    caches = []
    for cut in ([45], [1] * 45, [1, 20, 3, 21], [21, 3, 20, 1]):
        cache = net.new_cache(2, 45)
        answers = [net.step(part, cache) for part in x0.split(cut, dim=1)]
        assert_same(torch.cat(answers, dim=1)[:, :-1], wanted)
        caches.append(cache)
    for cache in caches[1:]:
        assert_same(cache.k, caches[0].k)
        assert_same(cache.v, caches[0].v)
        assert_same(net.states(xt[:, :8], cache), net.states(xt[:, :8], caches[0]))


@pytest.mark.parametrize("stored", CACHES)
@pytest.mark.parametrize("shape", FULL)
@torch.no_grad()
def test_tokens_that_are_tried_and_partly_kept_are_as_if_only_they_were_read(shape, stored):
    net = tiny(shape)
    net.cache_type = CACHES[stored]
    x0, xt = texts(24)
    one, other = net.new_cache(2, 24), net.new_cache(2, 24)
    for cache in (one, other):
        net.step(x0[:, :9], cache)
    net.try_step(torch.cat((x0[:, 9:12], xt[:, 12:15]), dim=1), one)
    one.keep(3)
    net.step(x0[:, 9:12], other)
    assert_same(net.states(xt[:, 12:], one), net.states(xt[:, 12:], other))


@pytest.mark.parametrize("shape", FULL)
@torch.no_grad()
def test_a_full_cache_slides(shape):
    """Each row sees the last nine, itself included, and the null key, which never leaves."""
    net = tiny(shape)
    x0, _ = texts(24, batch=1)
    cache = net.new_cache(1, 8)
    answers = [net.step(x0[:, i:i + 1], cache) for i in range(24)]
    read = torch.cat((x0, x0[:, :1]), dim=1)            # one more, so that the last is answered
    wanted, _ = by_definition(net, read[0], window=9)
    assert_same(torch.cat(answers, dim=1)[0].double(), wanted[1:])


# the 1B shapes of the launcher's guide: parameters, numbers per token and layer, bytes in 2 bytes
# a number
LARGE = dict(vocab_size=50_257, d_model=2048, n_layers=22, n_heads=32, d_ff=5632)
TABLE = [
    (dict(attn="mha"), 1_233_385_472, 4096, 180_224),
    (dict(attn="gqa"), 1_094_973_440, 1024, 45_056),
    (dict(attn="gqa_kv2"), 1_060_370_432, 256, 11_264),
    (dict(attn="bottleneck"), 933_492_736, 768, 33_792),
    (dict(attn="decoupled"), 933_492_736, 768, 33_792),
    (dict(attn="decoupled", tie_qk=True), 916_191_232, 768, 33_792),
]


@pytest.mark.parametrize("shape, params, numbers, nbytes", TABLE)
def test_the_table_of_the_1b_variants(shape, params, numbers, nbytes):
    """Against the model itself on the meta device, and a real cache of three positions."""
    cfg = ModelConfig(model="backup", **LARGE, **shape)
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(cfg).parameters()) == params
    assert model_config.count_params(cfg) == params
    cache = CACHES["bf16"](cfg, 1, 3, "cpu")
    assert cache.nbytes == 3 * nbytes == 3 * cache.bytes_per_token
    one_layer = sum(t[0, 0, :, 0].numel() for t in cache.all_tensors())
    assert one_layer == numbers


@pytest.mark.parametrize("stored", CACHES)
@pytest.mark.parametrize("shape", PLAIN)
def test_bytes_per_token_are_those_of_the_tensors(shape, stored):
    cfg = tiny_config("backup", **dict(n_heads=4, n_layers=3) | shape)
    for batch, room in ((1, 1), (3, 17)):
        cache = CACHES[stored](cfg, batch, room, "cpu")
        assert cache.nbytes == batch * room * cache.bytes_per_token
    one, more = CACHES["fp32"](cfg, 2, 5, "cpu"), CACHES[stored](cfg, 2, 5, "cpu")
    assert {"fp32": 1.0, "bf16": 0.5}.get(stored, 0.5) >= more.nbytes / one.nbytes


# ---- int8 ----------------------------------------------------------------------------------------

def test_a_number_is_rounded_by_the_scale_of_its_own_head_and_token():
    x = torch.randn(2, 3, 5, 8) * torch.logspace(-3, 4, 15).view(1, 3, 5, 1)
    x[0, 0, 0] = 0
    whole, scale = CACHES["int8"].rounded(x)
    assert whole.dtype == torch.int8 and scale.dtype == torch.float16
    error = (whole * scale.float() - x).abs()
    top = x.abs().amax(-1, keepdim=True)
    assert (error <= top / 127 * 0.505 + 4e-5).all(), "half of a step"
    assert (error[0, 0, 0] == 0).all()


def nll_by_steps(net, x0, stored):
    """-log p (B, T - 1) left to right, token by token behind a cache that is stored like this."""
    net.cache_type = CACHES[stored]
    cache = net.new_cache(*x0.shape)
    states = [net.step(x0[:, i:i + 1], cache) for i in range(x0.shape[1] - 1)]
    logp = net.logits(torch.cat(states, dim=1)).log_softmax(-1)
    return -logp.gather(-1, x0[:, 1:, None])[..., 0]


@pytest.mark.parametrize("stored, most", [("bf16", 2e-3), ("int8", 5e-3)])
@pytest.mark.parametrize("shape", PLAIN + FULL)
@torch.no_grad()
def test_what_a_smaller_cache_costs_in_nats(shape, stored, most):
    """A token's nats move a little, in both directions; blocks are asked behind it, too."""
    net = tiny(shape)
    x0, xt = texts(64, batch=8)
    exact, found = nll_by_steps(net, x0, "fp32"), nll_by_steps(net, x0, stored)
    moved = found - exact
    assert moved.any(), "nothing was rounded"
    assert moved.abs().mean() < 4 * most and abs(moved.mean()) < most

    caches = []
    for kind in ("fp32", stored):
        net.cache_type = CACHES[kind]
        cache = net.new_cache(8, 64)
        net.step(x0[:, :48], cache)
        cache.select(torch.tensor([3, 1]))
        caches.append(cache)
    whole, rounded = (net.states(xt[[3, 1], 48:], cache) for cache in caches)
    assert_close(rounded, whole, 0.02)
    assert caches[1].nbytes < caches[0].nbytes


@pytest.mark.parametrize("stored", ["bf16", "int8"])
@torch.no_grad()
def test_a_smaller_cache_slides_as_the_exact_one_does(stored):
    """In float32 the positions that stay are those of a text of their own; here up to rounding."""
    net = tiny(SHAPES["gqa"])
    x0, xt = texts(30)
    answers = []
    for kind in ("fp32", stored):
        net.cache_type = CACHES[kind]
        cache = net.new_cache(2, 8)
        for part in x0.split([3, 6, 1, 9, 5, 6], dim=1):
            net.step(part, cache)
        answers.append(net.states(xt[:, :5], cache))
    assert_close(answers[1], answers[0], 0.02)


# ---- positions in float32 ------------------------------------------------------------------------

def turned_once(x, positions, turned):
    """The last `turned` numbers of x (T, E) by the angle of their positions, in float64 throughout.
    """
    E = turned
    angle = positions.double()[:, None] * 10_000.0 ** (-torch.arange(0, E, 2).double() / E)
    still, moving = x.double().split([x.shape[-1] - E, E], dim=-1)
    z = torch.complex(*moving.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((still, z.real, z.imag), dim=-1)


@pytest.mark.parametrize("shape", PLAIN)
@torch.no_grad()
def test_positions_are_float32_whatever_the_parameters_are(shape):
    """A bf16 model turns a row as float64 would, rounded once at the end: all but the rare ties. A
    table in bf16 does not.
    """
    net = tiny(shape).to(torch.bfloat16)
    attn = net.layers[0].attn
    positions = torch.arange(5000, 5256)
    x = torch.randn(256, attn.heads.key).bfloat16()
    wanted = turned_once(x, positions, attn.heads.turned).bfloat16()

    def right(table):
        found = attn.turn(x, table)
        assert found.dtype == torch.bfloat16
        return (found == wanted).float().mean()

    table = net.table(net.positions(5000, 256))
    assert right(table) > 0.999
    assert right([part.bfloat16() for part in table]) < 0.95
    every = rotary_table(torch.arange(8192), attn.heads.turned)
    assert len(torch.unique(torch.cat(every, dim=1), dim=0)) == 8192


@pytest.mark.parametrize("shape", PLAIN + FULL)
@torch.no_grad()
def test_bf16_parameters_compute_the_same_up_to_their_rounding(shape):
    """In training's form and behind the cache, under autocast as training has it."""
    net = tiny(shape)
    x0, xt = texts(40)
    wanted = net.block_states(xt, x0, 16)
    net.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = net.block_states(xt, x0, 16)
        cache = net.new_cache(2, 40)
        net.step(x0[:, :16], cache)
        decoded = net.states(xt[:, 16:32], cache)
    assert_close(found, wanted, 2e-2)
    assert_close(decoded, found[:, 16:32], 2e-2)


# ---- parameters, FLOPs, gradients ----------------------------------------------------------------

@pytest.mark.parametrize("shape", CASES)
def test_parameters_are_the_formula_and_all_learn(shape):
    """From the first step on: every parameter gets a gradient in one step of the training loss."""
    torch.manual_seed(0)
    net = build_model(tiny_config("backup", **dict(n_heads=4) | shape))
    assert sum(p.numel() for p in net.parameters()) == model_config.count_params(net.cfg)
    x0, xt = texts(33)
    clean, noisy = net.both_states(x0, xt, 8)[0]
    net.logits(torch.cat((clean, noisy)))[..., 1:V].logsumexp(-1).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("block", [64, 16, 1])
@pytest.mark.parametrize("shape", PLAIN + FULL)
def test_the_flops_formula_counts_what_a_step_does(shape, block):
    """Against torch's counter with a kernel that counts its products, within 5 %."""
    length, rows = 64, 2
    cfg = ModelConfig(
        model="backup", vocab_size=300, d_model=64, n_layers=2, n_heads=4, d_ff=96, **shape
    )
    net = build_model(cfg)
    x0 = torch.randint(1, 300, (rows, length))
    masks = masking.left_to_right(rows, length)
    if block > 1:
        masks = masking.corrupt(config.TrainArgs(seq_len=length), 1, 1, rows, length, block)
        if block < length:
            masks = masks._replace(clean_share=0.5)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        masking.denoising_loss(net, x0, masks, "elbo").loss.backward()
    share = masks.masked_count / (rows * length)
    formula = rows * length * model_config.train_flops(cfg, length, block, share)
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_what_is_no_matrix_is_not_trained_as_one():
    """The null key and the temperature neither decay nor go to Muon."""
    net = tiny(dict(SHAPES["gqa"], null_attn=True, learned_temp=True))
    matrices, rest = param_groups(net, 0.1)
    own = [name for name, _ in net.named_parameters() if "null_key" in name or "temper" in name]
    assert len(own) == 4 and set(own) <= set(rest["names"])
    assert matrices["weight_decay"] == 0.1 and rest["weight_decay"] == 0


# ---- through the commands ------------------------------------------------------------------------

@pytest.mark.parametrize(
    "words",
    [
        ("--attn", "decoupled", "--null_attn", "--tie_qk", "--learned_temp"),
        ("--attn", "gqa", "--kv_heads", 1, "--null_attn", "--optimizer", "adamw"),
        ("--attn", "bottleneck", "--objective", "ar", "--activation_checkpointing"),
    ],
    ids=["decoupled", "gqa", "bottleneck"],
)
def test_a_variant_is_trained_resumed_and_sampled(here, tmp_path, capsys, words):
    """A run that stopped half way ends as one that did not; an export is refused in a sentence."""
    shape = ("--data_dir", "data/processed", "--model", "backup", *TINY, *words)
    quick = ("--no_show_samples", "--eval_interval", 0, "--max_steps", 6)
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert call(train.main, "--output_dir", whole, *shape, *quick) == 0
    assert call(train.main, "--output_dir", halved, *shape, *quick, "--save_interval", 3) == 0
    resumed = ("--resume", halved / "step_000003", "--no_show_samples", "--live", "off")
    assert call(train.main, *resumed) == 0
    one, two = (load_file(run / "step_000006/model.safetensors") for run in (whole, halved))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)

    assert call(train.main, *resumed, "--attn", "mha") == 2
    assert "--attn mha" in capsys.readouterr().err
    assert call(sample.main, halved, "--max_new_tokens", 9, "--ignore_eos", "--seed", 5) == 0
    assert "new=9" in capsys.readouterr().err

    if all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
        assert call(export.main, halved, "--output", tmp_path / "edge") == 2
        error = capsys.readouterr().err
        asked = [word for word in words if word in ("--null_attn", "--tie_qk", "--learned_temp")]
        assert f"trained with {' '.join([*words[:2], *asked])}, and the exported" in error
        assert not (tmp_path / "edge").exists()


@torch.no_grad()
def test_bf16_products_fill_a_bf16_cache_exactly():
    """The same states to the last bit as with a float32 cache, in half of its memory."""
    net = tiny(SHAPES["gqa"])
    assert net.cache_type is CACHES["fp32"]
    fast.prepare(net, "bf16")
    x0, xt = texts(40)
    answers = []
    for stored in ("auto", "fp32"):
        fast.store_cache(net, stored)
        cache = net.new_cache(2, 40)
        net.step(x0[:, :16], cache)
        answers.append(net.step(x0[:, 16:17], cache))
        answers.append(net.states(xt[:, 17:], cache))
        answers.append(cache.nbytes)
    assert torch.equal(answers[0], answers[3]) and torch.equal(answers[1], answers[4])
    assert answers[5] == 2 * answers[2]


def test_the_cache_of_sample_in_fewer_bytes(here, tmp_path, capsys):
    """--cache_dtype acts, and is refused where nothing has keys and values."""
    sizes = []
    for stored in CACHES:
        path = tmp_path / f"{stored}.json"
        words = ("--cache_dtype", stored, "--max_new_tokens", 16, "--ignore_eos", "--json")
        assert call(sample.main, RUNS["backup"], *words, "--out_json", path) == 0
        (found,) = json.loads(path.read_text(encoding="utf-8"))["samples"]
        sizes.append(found["cache_bytes"])
    assert sizes[1] == sizes[0] / 2 > sizes[2]
    capsys.readouterr()
    assert call(sample.main, RUNS["primary"], "--cache_dtype", "int8") == 2
    assert "--cache_dtype int8: EcoHybrid" in capsys.readouterr().err


def test_a_checkpoint_from_before_the_variants_goes_on(here, tmp_path):
    """Its config.json knows none of their flags: the same model, which is sampled and resumed."""
    run = tmp_path / "run"
    shutil.copytree(here / RUNS["backup"], run)
    device = torch.device("cpu")
    wanted, _, saved = checkpoint.load_model(run, device, config.check_saved)
    for folder in checkpoint.list_steps(run).values():
        older = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for name in ("attn", *model_config.ATTENTION_WIDTHS, *model_config.ATTENTION_OPTIONS):
            del older["model"][name], older["args"][name]
        data = to_json(older)
        (folder / "config.json").write_bytes(data)
        manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
        entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest["files"]["config.json"] = entry
        (folder / "MANIFEST.json").write_bytes(to_json(checkpoint.seal(manifest)))

    found, _, _ = checkpoint.load_model(run, device, config.check_saved)
    x0, xt = texts(24)
    with torch.no_grad():
        assert torch.equal(found.block_states(xt, x0, 8), wanted.block_states(xt, x0, 8))
    assert call(sample.main, run, "--max_new_tokens", 4) == 0
    more = saved.step + 2
    assert call(train.main, "--resume", run, "--max_steps", more, "--no_show_samples") == 0
    assert checkpoint.read_pointer(run, "latest")[0] == more
