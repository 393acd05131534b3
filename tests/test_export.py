"""An exported model is the trained one: its graphs, its cache, its coarser numbers, its folder; and
it runs without PyTorch.
"""
import dataclasses
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import older_cpu
import pytest
import torch
from conftest import aria_here, tree
from hypothesis import given, settings, strategies as st
from starter_model import STARTER
from tiny import tiny_model

import cli
import config
from common.console import Damage, UserError
from common.files import ROOT, write_json
from edge import blocks, engine

pytest.importorskip("onnxruntime", reason="only an exported model needs it")
pytest.importorskip("onnx", reason="only exporting needs it")

from edge import checks, folder  # noqa: E402
from sampling import exported as exported_files, speculate  # noqa: E402
from sampling.decode import generate, infill  # noqa: E402
from sampling.settings import Settings  # noqa: E402
from sampling.torch_model import TorchModel  # noqa: E402

MODELS = {
    "primary": ("primary", {}),
    "wide kernel": ("primary", {"conv_kernel": 5}),
    "slim heads": ("primary", {"d_mem": 4}),
    "left to right": ("primary", {"causal": True}),
    "early norms": ("primary", {"exits": True}),
    "fast slots": ("primary", {}),
    "backup": ("backup", {}),
    "backup, left to right": ("backup", {"causal": True}),
}
BOTH = ("primary", "backup")


def exported(path, model, bits=32, block=32):
    """Write a model's folder -> its engine."""
    path.mkdir()
    saved = SimpleNamespace(
        tokenizer_bytes=b"pieces",
        config={"model": model.cfg.to_dict(), "args": {}},
        step=7,
        state={},
    )
    folder.write_folder(model, saved, path, bits, block)
    return engine.load(path, 1)


def random_ids(batch=2, length=90, seed=0):
    return np.random.default_rng(seed).integers(4, 40, (batch, length))


@pytest.fixture(scope="module", params=BOTH)
def pair(request, tmp_path_factory):
    """A model, and its engine in float32."""
    model = tiny_model(request.param, away=0.1)
    path = tmp_path_factory.mktemp("edge") / request.param
    return model, exported(path, model)


def close(found, right):
    """Equal up to float32's rounding: to 1e-5 of their size."""
    return np.abs(found - right).max() <= 1e-5 * np.abs(right).max()


# ---- the graphs ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_float32_gives_pytorchs_logits(name, tmp_path):
    kind, changes = MODELS[name]
    model = tiny_model(kind, away=0.1, **changes)
    if name == "fast slots":        # as fast as any: what the sums of a chunk span is largest
        with torch.no_grad():
            for layer in model.layers:
                layer.decay -= 10
    runner = exported(tmp_path / "edge", model)
    largest, _ = checks.difference(runner, TorchModel(model), random_ids())
    assert largest <= 1e-5


@torch.no_grad()
def test_cached_equals_recomputed(pair):
    """However the text is cut, its states are those of PyTorch's one pass without a cache; so is a
    noisy block behind it.
    """
    model, runner = pair
    ids = random_ids(length=60)
    text = torch.tensor(ids)
    right = model.clean_states(text).numpy()[:, 1:]
    for cut in (1, 2, 31, 32, 33, 59):
        cache = runner.new_cache(2, 60)
        states = [runner.step(ids[:, i:i + cut], cache) for i in range(0, 59, cut)]
        states = np.concatenate(states, axis=1)[:, :59]
        assert close(states, right), cut

    xt = ids.copy()
    xt[:, 41::2] = model.cfg.mask_id
    right = model.block_states(torch.tensor(xt)[:, :60], text, 20).numpy()
    cache = runner.new_cache(2, 60)
    runner.step(ids[:, :20], cache)
    found = runner.step_and_states(ids[:, 20:40], xt[:, 40:], cache)
    assert close(found, right[:, 40:])
    assert close(runner.states(xt[:, 40:], cache), right[:, 40:])


@torch.no_grad()
def test_the_cache_holds_what_pytorchs_holds(pair):
    model, runner = pair
    ids = random_ids()
    mine, right = runner.new_cache(2, 90), model.new_cache(2, 90)
    runner.step(ids, mine)
    model.step(torch.tensor(ids), right)
    assert (mine.front == right.front.numpy()).all()
    assert mine.length == right.length and mine.nbytes == right.nbytes
    names = ("num", "halo") if model.cfg.model == "primary" else ("k", "v")
    for name in names:
        for i in range(model.cfg.n_layers):
            assert close(getattr(mine, name)[i], getattr(right, name)[i].numpy()), (name, i)


def test_states_change_nothing(pair):
    _, runner = pair
    cache = runner.new_cache(2, 30)
    runner.step(random_ids(length=20), cache)
    xt = np.full((2, 5), runner.cfg.mask_id)
    first = runner.states(xt, cache)
    assert (runner.states(xt, cache) == first).all() and cache.length == 21


def test_rows_may_leave(pair):
    """select keeps rows, which then go on as if they had always been alone."""
    _, runner = pair
    ids = random_ids(3, 40)
    together, alone = runner.new_cache(3, 40), runner.new_cache(1, 40)
    runner.step(ids[:, :30], together)
    together.select([2])
    runner.step(ids[2:, :30], alone)
    assert close(runner.step(ids[2:, 30:], together), runner.step(ids[2:, 30:], alone))


def test_what_is_tried_joins_only_as_far_as_it_is_kept(pair):
    """However much is kept of a few tokens that were tried, and whatever is asked next: the
    answers are those of a cache that never read more.
    """
    _, runner = pair
    ids = random_ids(1, 40)
    masks = np.full((1, 4), runner.cfg.mask_id)
    for kept in (1, 3, 6):
        for asked in ("step", "one step", "states", "both", "try"):
            mine, right = runner.new_cache(1, 60), runner.new_cache(1, 60)
            runner.step(ids[:, :20], mine)
            runner.step(ids[:, :20], right)
            tried = runner.try_step(ids[:, 20:26], mine)
            mine.keep(kept)
            read = runner.step(ids[:, 20:20 + kept], right)
            assert close(tried[:, :kept], read)
            assert mine.length == right.length and (mine.front == right.front).all()
            ways = {
                "step": lambda cache: runner.step(ids[:, 30:35], cache),
                "one step": lambda cache: runner.step(ids[:, 30:31], cache),
                "states": lambda cache: runner.states(masks, cache),
                "both": lambda cache: runner.step_and_states(ids[:, 30:33], masks, cache),
                "try": lambda cache: runner.try_step(ids[:, 30:33], cache),
            }
            assert close(ways[asked](mine), ways[asked](right)), (kept, asked)
            assert mine.length == right.length


def test_one_row_is_computed_in_place_and_apart(tmp_path):
    """Two texts at once, token by token: each has its own arrays, and no token moves them; what was
    answered before does not change.
    """
    runner = exported(tmp_path / "edge", tiny_model("primary", away=0.1))
    ids = random_ids(2, 20)
    both = [runner.new_cache(1, 20), runner.new_cache(1, 20)]
    for cache in both:
        runner.step(ids[:1, :1], cache)
    places = [array.ctypes.data for array in (*both[0].num, *both[0].halo)]
    answers = [[], []]
    for t in range(1, 20):
        for row, cache in enumerate(both):
            answers[row].append(runner.step(ids[row:row + 1, t:t + 1], cache))
    assert [array.ctypes.data for array in (*both[0].num, *both[0].halo)] == places
    for row, found in enumerate(answers):
        alone = runner.new_cache(1, 20)
        runner.step(ids[:1, :1], alone)
        right = runner.step(ids[row:row + 1, 1:], alone)
        assert close(np.concatenate(found, axis=1), right)


def test_blocks_hold_one_copy_of_the_weights(tmp_path):
    """A graph that nobody asks for is not opened: each open one keeps its own copy."""
    runner = exported(tmp_path / "edge", tiny_model("primary"))
    cache = runner.new_cache(1, 9)
    runner.step(random_ids(1, 20), cache)
    states = runner.step_and_states(random_ids(1, 5), random_ids(1, 5), cache)
    checks.all_logits(runner, states, random_ids(1, 5))
    assert set(runner.sessions) == {"rows", "head"}


def test_both_sides_of_guidance(tmp_path):
    runner = exported(tmp_path / "edge", tiny_model("primary", away=0.1))
    ids = random_ids(2, 20)
    cache, bare = runner.new_cache(2, 20), runner.new_cache(2, 20)
    runner.step(ids, cache)
    xt = np.full((2, 5), runner.cfg.mask_id)
    both = runner.states(np.concatenate((xt, xt)), cache.beside(bare))
    assert close(both, np.concatenate((runner.states(xt, cache), runner.states(xt, bare))))


@torch.no_grad()
def test_a_long_text_slides_as_in_pytorch(tmp_path):
    model = tiny_model("backup", away=0.1)
    runner = exported(tmp_path / "edge", model)
    ids = random_ids(2, 50)
    mine, right = runner.new_cache(2, 16), model.new_cache(2, 16)
    for first in range(0, 50, 5):
        found = runner.step(ids[:, first:first + 5], mine)
        wanted = model.step(torch.tensor(ids[:, first:first + 5]), right).numpy()
        assert close(found, wanted), first
    with pytest.raises(ValueError):
        runner.step(ids, mine)


def test_mask_and_pad_are_no_answer(pair):
    _, runner = pair
    masks = np.full((2, 5), runner.cfg.mask_id)
    logits = checks.all_logits(runner, runner.states(masks, runner.new_cache(2, 5)), masks)
    assert np.isneginf(logits[..., [0, runner.cfg.mask_id]]).all()
    assert np.isfinite(np.delete(logits, [0, runner.cfg.mask_id], axis=-1)).all()


def test_leaving_early_is_refused(pair):
    _, runner = pair
    xt = np.full((1, 5), runner.cfg.mask_id)
    assert runner.states(xt, runner.new_cache(1, 9), runner.cfg.n_layers).shape[1] == 5
    with pytest.raises(UserError, match="min_decode_layers"):
        runner.states(xt, runner.new_cache(1, 9), 1)


# ---- coarser numbers -----------------------------------------------------------------------------

@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from((16, 32, 128)), st.integers(1, 5), st.integers(1, 150), st.integers(0, 99),
)
def test_a_block_is_rounded_by_half_a_step(block, outputs, inputs, seed):
    weight = np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)
    weight[0] = 0
    codes, scale = blocks.pack(weight, block)
    back = blocks.unpack(codes, scale, 4, inputs)
    step = np.abs(scale).repeat(block, 1)[:, :inputs]
    # 4 bits end one step early on one side
    assert (np.abs(back - weight) <= step * 1.0001).all()
    assert (back[0] == 0).all()

    codes, scale = blocks.pack_rows(weight)
    back = blocks.unpack(codes, scale[:, None], 8, inputs)
    assert (np.abs(back - weight) <= 0.5001 * scale[:, None]).all()
    assert codes.min() >= 1 and (back[0] == 0).all()
    assert (blocks.turned(codes, inputs).T * scale[:, None] == back).all()


@pytest.mark.parametrize("kind", BOTH)
def test_coarser_numbers_stay_close(kind, tmp_path):
    """8 bits are close to float32, 4 bits are not as close, and both are what PyTorch computes with
    the same rounded weights, up to the rounding of what is multiplied.
    """
    model = tiny_model(kind)
    ids = random_ids()
    apart = {}
    for bits in (8, 4):
        runner = exported(tmp_path / str(bits), model, bits)
        _, apart[bits] = checks.difference(runner, TorchModel(model), ids)
        rounded = tiny_model(kind)
        as_kept(rounded, bits)
        _, rest = checks.difference(runner, TorchModel(rounded), ids)
        assert rest < 0.03
    assert apart[8] < 0.05 and 2 * apart[8] < apart[4] < 0.5


@torch.no_grad()
def as_kept(model, bits):
    """The layers' matrices of a model become what these bits stand for, and the head's those of 8.
    """
    own = {name: value.numpy() for name, value in model.state_dict().items()}
    kept = blocks.even_layers(model.cfg, own)
    head, factors = blocks.even(own["head.weight"])
    kept["head.weight"] = rounded_rows(head) * factors
    for name, weight in kept.items():
        if "proj" not in name:
            continue
        if bits == 8:
            kept[name] = rounded_rows(weight)
        else:
            codes, scale = blocks.pack(weight, 32)
            kept[name] = blocks.unpack(codes, scale, bits, weight.shape[1])
    model.load_state_dict({name: torch.tensor(value) for name, value in kept.items()})


def rounded_rows(weight):
    codes, scale = blocks.pack_rows(weight)
    return blocks.unpack(codes, scale[:, None], 8, weight.shape[1])


@pytest.mark.parametrize("kind", BOTH)
@torch.no_grad()
def test_even_columns_change_nothing_and_round_better(kind):
    """The evened parameters are the same function; and a matrix with a few large columns, which
    each row's scale has to reach, loses half as much when it is rounded.
    """
    model = tiny_model(kind, away=0.1)
    own = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    ids = torch.tensor(random_ids())
    before = model.clean_states(ids).numpy()
    kept = blocks.even_layers(model.cfg, own)
    assert all((model.state_dict()[name].numpy() == value).all() for name, value in own.items())
    model.load_state_dict({name: torch.tensor(value) for name, value in kept.items()})
    assert close(model.clean_states(ids).numpy(), before)

    weight = np.random.default_rng(0).standard_normal((40, 60)).astype(np.float32)
    weight[:, :3] *= 10
    lost = []
    for matrix, factors in ((weight, 1), blocks.even(weight)):
        lost.append(np.abs(rounded_rows(matrix) * factors - weight)[:, 3:].mean())
    assert lost[1] < lost[0] / 2


@pytest.mark.parametrize("kind", BOTH)
def test_a_row_does_not_know_its_neighbours(kind, tmp_path):
    """In 8 bits, too: each row of a product has a scale of its own."""
    runner = exported(tmp_path / "edge", tiny_model(kind, away=0.1), 8)
    ids = random_ids(5, 20)
    together = runner.step(ids, runner.new_cache(5, 20))
    alone = runner.step(ids[3:4], runner.new_cache(1, 20))
    assert close(together[3:4], alone)


@pytest.mark.parametrize("bits", (8, 4))
def test_what_is_tried_is_rounded_as_one_row_is(bits, tmp_path):
    """So a draft changes no text: the logits of most rows are those of one row at a time up to
    float32's rounding, where other products would be as far away as the bits are from float32.
    """
    model = tiny_model("primary", away=0.1)
    runner = exported(tmp_path / "edge", model, bits)
    if runner.machine.slow_row and bits == 8:
        pytest.skip("this CPU multiplies one row in the other way")
    ids = random_ids(1, 60)
    one, many = runner.new_cache(1, 70), runner.new_cache(1, 70)
    apart = []
    for first in range(0, 60, 6):
        rows = ids[:, first:first + 6]
        tried = checks.all_logits(runner, runner.try_step(rows, many), rows)
        many.keep(6)
        for number in range(6):
            row = rows[:, number:number + 1]
            single = checks.all_logits(runner, runner.step(row, one), row)[0]
            possible = np.isfinite(single)
            gap = single[possible] - tried[number][possible]
            apart.append(np.abs(gap).max() / np.abs(single[possible]).max())
    coarse, _ = checks.difference(runner, TorchModel(model), random_ids())
    assert np.median(apart) < 1e-5 and max(apart) < coarse / 3


# ---- older CPUs ----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", BOTH)
def test_unsigned_products_are_the_signed_ones(kind, tmp_path):
    """So a CPU that cuts signed ones off writes what others write."""
    ids = random_ids()
    runner = exported(tmp_path / "edge", tiny_model(kind, away=0.1), 8)
    if runner.machine.cuts_off:
        pytest.skip("this CPU cuts signed products off")
    right = checks.every_path(runner, ids)
    other = engine.load(tmp_path / "edge", 1)
    other.machine = dataclasses.replace(runner.machine, cuts_off=True)
    assert (checks.every_path(other, ids) == right).all()


def test_without_the_way_for_one_row_the_other_is_taken(tmp_path):
    """The logits are then those of rows that are read at once, and no graph is opened in vain."""
    ids = random_ids()
    runner = exported(tmp_path / "edge", tiny_model("primary", away=0.1), 8)
    runner.machine = engine.Machine(slow_row=True)
    at_once = checks.all_logits(runner, runner.step(ids, runner.new_cache(2, 90)), ids)
    cache = runner.new_cache(2, 90)
    alone = [runner.step(ids[:, i:i + 1], cache) for i in range(90)]
    alone = checks.all_logits(runner, np.concatenate(alone, axis=1), ids)
    assert close_where_possible(alone, at_once)
    assert set(runner.sessions) == {"rows", "head"}


def test_nor_are_drafts_verified_there(tmp_path, monkeypatch):
    """What verifies them multiplies as one row does."""
    told = []
    for slow in (False, True):
        monkeypatch.setattr(engine.Engine, "machine", engine.Machine(slow_row=slow))
        done = aria_here(
            "sample", "--ckpt", STARTER, "--prompt", "मैं कल", "--max_new_tokens", 120, "--seed", 1,
            cwd=tmp_path, check=0,
        )
        assert done.stdout.startswith("मैं कल")
        told.append("verified drafts" in done.stderr)
    assert told == [True, False]


def close_where_possible(found, right):
    possible = np.isfinite(right)
    return (np.isfinite(found) == possible).all() and close(found[possible], right[possible])


LOGITS = """
import sys
import numpy as np
from edge import checks, engine
runner = engine.load(sys.argv[1], 1)
ids = np.random.default_rng(0).integers(10, 400, (2, 90))
rows = checks.all_logits(runner, runner.step(ids, runner.new_cache(2, 90)), ids)
cache = runner.new_cache(1, 90)
one = [runner.step(ids[:1, i:i + 1], cache) for i in range(30)]
one = checks.all_logits(runner, np.concatenate(one, axis=1), ids[:1, :30])
machine = [runner.machine.cuts_off, runner.machine.slow_row]
np.savez(sys.argv[2], rows=rows, one=one, machine=machine)
"""


def test_an_older_cpu_gives_the_same_logits(tmp_path):
    """In processes to which this CPU says that it is an older one. The starter model, whose sums of
    two products do not fit into 16 bits.
    """
    library = older_cpu.build(tmp_path)
    if library is None or not {"avx2", "avx_vnni"} <= older_cpu.units():
        pytest.skip("cpuid does not trap here, there is no gcc, or this CPU is older itself")
    found = {}
    for kind in (*older_cpu.KINDS, None):
        path = tmp_path / f"{kind}.npz"
        env = older_cpu.environment(library, kind) if kind else {}
        command = [sys.executable, "-c", LOGITS, STARTER, path]
        subprocess.run(command, env=os.environ | env, cwd=ROOT, check=True)
        found[kind] = np.load(path)
    right = found[None]
    told = {kind: arrays["machine"].tolist() for kind, arrays in found.items()}
    assert told["avx2"] == told["avx512"] == [True, False]
    assert told["avx-vnni"] == [False, False] and told["sse"] == [False, True]
    for kind in older_cpu.KINDS:
        # bytes are added up exactly, but a last digit of float32 may round to another byte; what
        # one row rounds differs by the width of the registers. Cut off, rows are 0.027 away
        for way, most in (("rows", 0.005), ("one", 0.02)):
            possible = np.isfinite(right[way])
            size = right[way][possible]
            gap = found[kind][way][possible] - size
            assert math.sqrt((gap ** 2).mean() / (size ** 2).mean()) < most, (kind, way)


# ---- the folder ----------------------------------------------------------------------------------

@pytest.fixture
def whole(tmp_path):
    exported(tmp_path / "edge", tiny_model("primary"), 8)
    return tmp_path / "edge"


FILES = ("weights.bin", "config.json", "tokenizer.model", "next.onnx", "head.onnx")


@pytest.mark.parametrize("name", FILES)
def test_damage_is_named(name, whole):
    data = bytearray((whole / name).read_bytes())
    data[len(data) // 2] ^= 1
    (whole / name).write_bytes(data)
    with pytest.raises(Damage, match=f"{name} is damaged"):
        engine.load(whole)
    (whole / name).write_bytes(data[:-1])
    with pytest.raises(Damage, match=f"{name} is damaged"):
        engine.load(whole)
    (whole / name).unlink()
    with pytest.raises(Damage, match=f"{name} is missing"):
        engine.load(whole)


def test_another_version_is_refused(whole):
    manifest = json.loads((whole / "MANIFEST.json").read_text())
    write_json(whole / "MANIFEST.json", manifest | {"format": "aria-edge-0"})
    with pytest.raises(UserError, match=f"aria-edge-0, this version reads {engine.FORMAT}"):
        engine.load(whole)
    write_json(whole / "MANIFEST.json", manifest | {"files": {"../x": {}} | manifest["files"]})
    with pytest.raises(Damage, match="no file of it"):
        engine.load(whole)
    (whole / "MANIFEST.json").unlink()
    with pytest.raises(UserError, match="no exported model"):
        engine.load(whole)


def test_a_graph_that_the_runtime_cannot_read(whole):
    """The hashes hold, and yet it is no graph: one sentence, not the runtime's pages."""
    (whole / "tried.onnx").write_bytes(b"no graph")     # of no other name on an older CPU
    manifest = json.loads((whole / "MANIFEST.json").read_text())
    from common.files import file_sha256
    manifest["files"]["tried.onnx"] = {
        "bytes": 8, "sha256": file_sha256(whole / "tried.onnx")
    }
    write_json(whole / "MANIFEST.json", manifest)
    runner = engine.load(whole)
    with pytest.raises(UserError, match="cannot run .*tried.onnx"):
        runner.try_step(random_ids(1, 1), runner.new_cache(1, 9))


def test_without_the_runtime(whole, monkeypatch):
    monkeypatch.setattr(engine, "onnxruntime", None)
    with pytest.raises(UserError, match="requirements_edge.txt") as caught:
        engine.load(whole)
    assert caught.value.code == 3


ALONE = """
import sys
for name in ("torch", "onnx", "tqdm", "safetensors"):
    sys.modules[name] = None        # an import of it fails
import numpy as np
from common.console import say
from edge import engine
runner = engine.load(sys.argv[1])
cache = runner.new_cache(1, 8)
ids = np.array([[2]])
for _ in range(5):
    ids = runner.logits(runner.step(ids, cache), [0], [0]).argmax(-1)[:, None]
    print(ids[0, 0])
say("done")
"""


@torch.no_grad()
def test_it_runs_without_pytorch(tmp_path):
    """And writes what PyTorch writes."""
    model = tiny_model("primary", away=0.1)
    exported(tmp_path / "edge", model)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "edge")],
        cwd=ROOT, capture_output=True, text=True,
    )
    assert done.returncode == 0 and done.stderr == "done\n", done.stderr
    cache = model.new_cache(1, 8)
    ids = torch.tensor([[2]])
    wanted = []
    for _ in range(5):
        ids = model.logits(model.step(ids, cache)).argmax(-1)
        wanted.append(int(ids))
    assert list(map(int, done.stdout.split())) == wanted


# ---- the texts -----------------------------------------------------------------------------------

WAYS = (
    dict(mode="full", sampler="confidence", steps=6),
    dict(mode="full", sampler="entropy", steps=20, temperature=0.8),
    dict(mode="block", block_size=6, sampler="margin", steps=3),
    dict(mode="block", block_size=6, sampler="random", steps=3, temperature=1.0),
    dict(mode="block_frozen", block_size=6, sampler="threshold", steps=6, threshold=0.05),
    dict(mode="block_frozen", block_size=6, sampler="factor", steps=6, temperature=0.7, top_k=9),
    dict(mode="block_frozen", block_size=5, sampler="ancestral", steps=8, temperature=1.0),
    dict(mode="block_frozen", block_size=4, sampler="confidence", steps=2, guidance_scale=2.0),
    dict(mode="block_frozen", block_size=1, temperature=0.9, top_p=0.8, eos_id=7),
    dict(mode="block_frozen", block_size=1, window=16, repetition_penalty=1.3),
    dict(mode="block_frozen", block_size=8, sampler="speculate", temperature=0.0),
    dict(mode="block_frozen", block_size=5, sampler="speculate", temperature=0.8, top_k=9),
)


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_every_way_of_decoding_writes_what_pytorch_writes(pair, way, monkeypatch):
    """The loop and the rules exist once, and in float32 both engines answer alike: ids, forwards
    and all. Rows of different lengths leave the batch at different times.
    """
    model, runner = pair
    chosen = Settings(**({"max_new_tokens": 20, "steps": 1, "eos_id": None} | WAYS[way]))
    prompts = [row.tolist() for row in random_ids(3, 11)]
    prompts[1] = prompts[1][:4]
    monkeypatch.setattr(speculate, "LOSS", 100)      # a draft is always affordable
    results = []
    for writer in (TorchModel(model), runner):
        results.append(generate(writer, prompts, chosen, [1, 2, 3]))
    right, found = results
    assert found.full_rows == right.full_rows
    assert (found.forwards, found.row_forwards) == (right.forwards, right.row_forwards)
    assert found.cache_bytes == right.cache_bytes
    assert (found.rounds, found.accepted) == (right.rounds, right.accepted)
    assert found.rounds > 0 or not chosen.speculates


def test_gaps_are_filled_as_in_pytorch(pair):
    model, runner = pair
    ids = random_ids(1, 20)[0]
    ids[[3, 4, 11, 12, 13]] = model.cfg.mask_id
    chosen = Settings(max_new_tokens=5, eos_id=None, steps=5, sampler="confidence", mode="full")
    right = infill(TorchModel(model), ids.tolist(), chosen, [1, 2])
    assert infill(runner, ids.tolist(), chosen, [1, 2]).rows == right.rows


# ---- the commands --------------------------------------------------------------------------------

@pytest.mark.parametrize("run", ("eco_hybrid_hi", "diffusion_hi"))
def test_the_command(run, trained):
    """It writes a folder, says what it costs, and replaces an older export."""
    for bits in (8, 32):
        done = aria_here(
            "export", "--ckpt", f"checkpoints/{run}", "--format", "onnx", "--bits", bits,
            cwd=trained, check=0,
        )
        assert done.stdout == f"exports/{run}\n"
        for words in ("in float32 the logits are PyTorch's", "a forward in", "left to right",
                      "bound in blocks of 8", "drafts: ", "MB"):
            assert words in done.stderr
        manifest = engine.read_manifest(trained / "exports" / run)
        assert manifest["bits"] == bits
        lost = manifest["bits_per_byte"]["left to right"]["lost"]
        assert abs(lost) < (0.005 if bits == 8 else 1e-5)
        assert manifest["drafts"]["faster"] > 0 and min(manifest["try_cost"]) > 0
        assert engine.DRAFTS in manifest["files"]
    assert not list((trained / "exports").glob(".*")), "something is left aside"


NO_PYTORCH = """
import sys
for name in ("torch", "onnx", "tqdm", "safetensors", "datasets"):
    sys.modules[name] = None        # an import of it fails
import sample
sys.exit(sample.main())
"""


@pytest.mark.parametrize("run", ("eco_hybrid_hi", "diffusion_hi"))
def test_sample_needs_no_pytorch(run, trained):
    """A float32 export writes what the checkpoint writes, with the packages of
    requirements_edge.txt alone.
    """
    folder_of_run = f"exports/{run}"
    aria_here("export", f"checkpoints/{run}", "--bits", 32, cwd=trained, check=0)
    flags = ["--prompt", "mai kal", "--max_new_tokens", "24", "--num_samples", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", NO_PYTORCH, folder_of_run, *flags],
        cwd=trained, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "float32, ONNX Runtime" in done.stderr
    run = f"checkpoints/{run}"
    usual = aria_here("sample", run, "--precision", "fp32", *flags, cwd=trained, check=0)
    by_name = aria_here("sample", run, "--engine", "onnx", *flags, cwd=trained, check=0)
    texts = []
    for printed in (done.stdout, usual.stdout, by_name.stdout):
        texts.append([json.loads(line)["text"] for line in printed.splitlines()])
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 2


def test_long_drafts_behind_a_short_prompt_fit_the_graph(pair):
    """A prompt that waits, and as many drafts as a round may have, in one forward."""
    model, runner = pair
    prompt = random_ids(1, 16)[0].tolist()
    chosen = Settings(90, 1, mode="block_frozen", block_size=1, eos_id=None, temperature=0.0)
    right = generate(TorchModel(model), prompt, chosen, [1]).rows

    class Future:
        def behind(self, text, most):
            return right[0][:most], [1.0] * most
    runner.drafts, runner.try_cost = Future(), (1.0, 0.01)
    chosen.block_size, chosen.sampler = 80, "speculate"
    found = generate(runner, prompt, chosen, [1])
    del runner.drafts, runner.try_cost
    assert found.rows == right and found.accepted >= speculate.MOST


def test_a_text_alone_is_drafted_where_that_pays(trained):
    """Whatever the table says, the text is the same; several texts at once, or short ones, are
    written without it, and so is a text that asks for another way.
    """
    aria_here("export", "checkpoints/eco_hybrid_hi", "--bits", 32, cwd=trained, check=0)
    folder = trained / "exports" / "eco_hybrid_hi"
    manifest = engine.read_manifest(folder)
    drafts = "in verified drafts of 8"

    def sample(*more):
        return aria_here(
            "sample", folder, "--ignore_eos", "--prompt", "mai kal", *more, cwd=trained, check=0
        )

    texts = []
    for faster, more, drafted in (
        (1.5, ["--max_new_tokens", 120], True),
        (1.0, ["--max_new_tokens", 120], False),
        (1.5, ["--max_new_tokens", 120, "--block_size", 1, "--blockwise", "--frozen_context"],
         False),
        (1.5, ["--max_new_tokens", 20], False),
        (1.5, ["--max_new_tokens", 120, "--num_samples", 2], False),
    ):
        manifest["drafts"]["faster"] = faster
        write_json(folder / "MANIFEST.json", manifest)
        done = sample(*more)
        assert (drafts in done.stderr) == drafted, (faster, more, done.stderr)
        texts.append(done.stdout)
    assert texts[0] == texts[1] == texts[2]
    assert texts[4].startswith(texts[0])


def test_an_older_export_does_not_stand_in_for_the_run(trained, tmp_path, monkeypatch):
    """--engine onnx with a run asks for the export of the step that is meant."""
    folder_of = exported_files.folder_of
    aria_here("export", "checkpoints/eco_hybrid_hi", cwd=trained, check=0)
    monkeypatch.chdir(trained)
    run = "checkpoints/eco_hybrid_hi"
    steps = sorted(int(path.name[5:]) for path in (trained / run).glob("step_*"))
    newest = f"{run}/step_{steps[-1]:06d}"
    for name in (run, f"{run}/last.ckpt", newest):
        assert folder_of(SimpleNamespace(ckpt=name, engine="onnx")).name == "eco_hybrid_hi"
    older = f"{run}/step_{steps[-1] - 1:06d}"
    with pytest.raises(UserError, match=f"is of step {steps[-1]}, .* of step {steps[-1] - 1}"):
        folder_of(SimpleNamespace(ckpt=older, engine="onnx"))


def test_evaluate_scores_the_folder(trained):
    """Its bound and chain rule are those of the checkpoint, in float32 up to rounding; the text of
    its own is judged, too.
    """
    aria_here("export", "checkpoints/eco_hybrid_hi", "--bits", 32, cwd=trained, check=0)
    found = []
    for name in ("checkpoints/eco_hybrid_hi", "exports/eco_hybrid_hi"):
        aria_here(
            "evaluate", name, "--max_docs", 4, "--chain_docs", 2, "--draws", 1, "--samples", 2,
            "--max_new_tokens", 8, "--out_json", "found.json", cwd=trained, check=0,
        )
        found.append(json.loads((trained / "found.json").read_text()))
    checkpoint, exported_one = found
    assert set(checkpoint["bound"]) == set(exported_one["bound"]) > {"1"}
    for part in ("bound", "chain_rule"):
        for block, figures in checkpoint[part].items():
            assert exported_one[part][block]["nats"] == pytest.approx(figures["nats"], rel=1e-5)
    assert exported_one["infilling"] == checkpoint["infilling"]
    assert exported_one["samples"].keys() == checkpoint["samples"].keys()


def test_edge_benchmark_compares_the_engines(trained):
    aria_here("export", "checkpoints/eco_hybrid_hi", "--bits", 8, cwd=trained, check=0)
    done = aria_here(
        "edge_benchmark", "checkpoints/eco_hybrid_hi", "--modes", "block_frozen", "--grid",
        "engine=torch,onnx", "--precision", "fp32", "--max_new_tokens", 8, "--runs_per_prompt", 1,
        "--prompt", "mai kal", cwd=trained, check=2,
    )
    assert "--precision fp32: an exported model has" in done.stderr
    done = aria_here(
        "edge_benchmark", "checkpoints/eco_hybrid_hi", "--modes", "block_frozen", "--grid",
        "engine=torch,onnx", "--max_new_tokens", 8, "--runs_per_prompt", 1,
        "--prompt", "mai kal", "--out_json", "engines.json", cwd=trained, check=0,
    )
    results = json.loads((trained / "engines.json").read_text())["results"]
    torch_one = results["block_frozen engine=torch"]
    onnx_one = results["block_frozen engine=onnx"]
    assert onnx_one["precision"] == "onnx 8 bits" != torch_one["precision"]
    assert onnx_one["held_out_nats"] == pytest.approx(torch_one["held_out_nats"], rel=0.01)


@pytest.mark.parametrize("flags, words", (
    (("exports/x", "--engine", "torch"), "--engine torch: exports/x is an exported model"),
    (("exports/x", "--precision", "int8"), "export with other --bits"),
    (("exports/x", "--cache_dtype", "int8"), "has its cache in float32"),
    (("exports/x", "--device", "cuda"), "an exported model runs on the CPU"),
    (("exports/x", "--model", "backup"), "holds a primary model, --model says backup"),
    (("checkpoints/y", "--engine", "onnx"), "make it with python -m export checkpoints/y"),
))
def test_what_an_export_cannot_do_is_said(flags, words, trained, tmp_path, monkeypatch, capsys):
    import sample
    monkeypatch.chdir(tmp_path)
    exported_folder = trained / "exports" / "eco_hybrid_hi"
    if not exported_folder.exists():
        aria_here("export", "checkpoints/eco_hybrid_hi", cwd=trained, check=0)
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "x").symlink_to(exported_folder)
    with pytest.raises(UserError, match=words):
        sample.main([*flags, "--quiet"])


def test_the_starter_model_comes_with_the_code(tmp_path):
    """It is whole, small, of our own text and of the recipe that the README names; without a run
    and without PyTorch, `python -m sample` writes with it.
    """
    manifest = engine.read_manifest(exported_files.STARTER)
    assert sum(entry["bytes"] for entry in manifest["files"].values()) < 5e6
    assert manifest["bits"] == 8
    # the text that `prepare --source builtin` makes for the starter run
    assert manifest["data_sha256"] == (
        "3a75ee3c8f84b09751f4247565911c7049a6396f6e45741263cc5d6435d16559"
    )
    settings_of_run = engine.read_json(exported_files.STARTER / "config.json")["args"]
    recipe, _ = cli.parse(config.TrainArgs, ["--preset", "starter"], "train")
    for name in ("preset", "max_steps", "batch_size", "lr", "train_block_sizes", "ar_fade"):
        assert settings_of_run[name] == as_json(getattr(recipe, name)), name
    done = subprocess.run(
        [sys.executable, "-c", NO_PYTORCH, "--prompt", "mai kal bazaar", "--max_new_tokens", "20"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "the starter model that comes with Aria" in done.stderr
    assert len(done.stdout) > len("mai kal bazaar") + 15


def as_json(value):
    return json.loads(json.dumps(value))


def test_nothing_is_left_of_an_export_that_fails(trained, tmp_path, monkeypatch):
    import export
    monkeypatch.setattr(folder, "EXACT", 0.0)
    monkeypatch.chdir(trained)
    with pytest.raises(UserError, match="differ from PyTorch's logits"):
        export.main(["checkpoints/eco_hybrid_hi", "--output", str(tmp_path / "edge"), "--quiet"])
    assert not list(tmp_path.iterdir())


def test_another_folder_is_not_replaced(trained, tmp_path, monkeypatch):
    import export
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    before = tree(tmp_path)
    monkeypatch.chdir(trained)
    with pytest.raises(UserError, match="something else than an exported model"):
        export.main(["checkpoints/eco_hybrid_hi", "--output", str(tmp_path / "mine"), "--quiet"])
    assert tree(tmp_path) == before
