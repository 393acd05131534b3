"""CUDA graphs: the buffers and the rules with a stand-in on the CPU, a proof on fake CUDA tensors
that nothing in a forward breaks a recording, and the real thing where there is a GPU.
"""
import contextlib
import ctypes
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pretended_gpu import rerun
from tiny import TINIER, tiny_model
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sampling.cuda_graphs import IDLE, KEPT, MANY, OFTEN, Graphs
from sampling.decode import generate
from sampling.settings import Settings
from sampling.torch_model import GraphModel, TorchModel, writer_of

V, EOS = 40, 3
CPU = torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


# ---- a stand-in for a graph ----------------------------------------------------------------------

def frozen(function, inputs):
    """Records the operators that function(*inputs) launches, as a graph does: with Python's numbers
    as they are now, reading the memory of its inputs, writing that of its results.
    """
    operators = make_fx(function)(*inputs)
    results = operators(*inputs)

    def launch():
        for result, value in zip(results, operators(*inputs), strict=True):
            result.copy_(value)
    return launch, results


def model_and_writers(record=frozen, **changes):
    net = tiny_model("primary", V, shape=TINIER, away=0.1, **changes)
    return TorchModel(net), GraphModel(net, Graphs(CPU, record))


def ids_of(rows, length, seed=0):
    return np.random.default_rng(seed).integers(4, V, (rows, length))


def all_logits(writer, states):
    rows, positions = np.indices(states.shape[:2])
    return writer.logits(states, rows.flatten(), positions.flatten())


SETTINGS = {
    "left to right": dict(mode="block_frozen", block_size=1),
    "blocks": dict(mode="block_frozen", block_size=4, steps=3),
    "sampled": dict(mode="block_frozen", block_size=4, steps=4, temperature=1.0),
    "odd last block": dict(mode="block_frozen", block_size=5, steps=5),
    "recomputed": dict(mode="block", block_size=6, steps=6),
    "whole": dict(mode="full", steps=8),
    "guided": dict(mode="block_frozen", block_size=4, steps=4, guidance_scale=2.0),
    "early": dict(mode="block_frozen", block_size=4, steps=4, min_depth=1),
    "verified": dict(mode="block_frozen", block_size=4, sampler="speculate"),
    "verified, sampled": dict(
        mode="block_frozen", block_size=4, sampler="speculate", temperature=1.0
    ),
}


def settings_of(max_new_tokens=24, steps=1, temperature=0.0, eos_id=None, **more):
    return Settings(max_new_tokens, steps, temperature=temperature, eos_id=eos_id, **more)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_text_is_the_same(name):
    plain, graphs = model_and_writers(exits=True)
    plain.round_cost = graphs.round_cost = 1.0      # drafts at every turn
    settings = settings_of(**SETTINGS[name])
    prompts = [[2, 7, 9], [2, 8, 5], [2, 4, 4]]
    expected = generate(plain, prompts, settings, [1, 2, 3])
    for _ in range(2):
        found = generate(graphs, prompts, settings, [1, 2, 3])
        assert found.full_rows == expected.full_rows
        assert found.forwards == expected.forwards
    assert graphs.graphs.kept, "nothing was recorded"
    assert graphs.graphs.record, "a recording failed"


def test_rows_that_end_leave_the_batch():
    """Prompts of two lengths, and an EOS that ends the rows one after the other."""
    plain, graphs = model_and_writers(rerun)
    prompts = [[2, *ids_of(1, 3 + row % 2, row)[0].tolist()] for row in range(8)]
    seeds = list(range(8))
    for settings in (
        settings_of(40, temperature=3.0, eos_id=EOS, mode="block_frozen", block_size=1),
        settings_of(40, 2, temperature=3.0, eos_id=EOS, mode="block_frozen", block_size=2),
    ):
        expected = generate(plain, prompts, settings, seeds)
        assert len({len(row) for row in expected.rows}) > 3, "the rows end together"
        assert generate(graphs, prompts, settings, seeds).rows == expected.rows
    rows = {key[1][0][0] for key in graphs.graphs.kept}
    assert len(rows) > 1, "one number of rows was recorded"


def logits_in_turn(writer, caches, rows, turns):
    """Every call of the protocol by turns on several contexts -> their logits."""
    masks = np.full((rows, 4), V)
    found = []
    for turn in range(turns):
        for number, cache in enumerate(caches):
            x0 = ids_of(rows, 2, 10 * turn + number)
            found.append(all_logits(writer, writer.states(masks, cache)))
            found.append(all_logits(writer, writer.step(x0, cache)))
            found.append(all_logits(writer, writer.step_and_states(x0, masks, cache)))
    return found


def test_two_caches_do_not_mix():
    """Every call of the protocol in turn on two contexts, to the last bit; rows leave, and two
    contexts become one.
    """
    plain, graphs = model_and_writers()
    found = []
    for writer in (plain, graphs):
        caches = [writer.new_cache(3, 0) for _ in range(2)]
        logits = logits_in_turn(writer, caches, 3, 12)
        for cache, rows in zip(caches, ([0, 2], [1]), strict=True):
            cache.select(np.array(rows))
        both = caches[0].beside(caches[1])
        for turn in range(6):
            logits.append(all_logits(writer, writer.step(ids_of(3, 1, turn), both)))
            logits.append(all_logits(writer, writer.step(ids_of(2, 1, turn), caches[0])))
        logits.append(all_logits(writer, writer.states(np.full((1, 4), V), caches[1])))
        assert [cache.cache.length for cache in (*caches, both)] == [55, 49, 55]
        found.append(logits)
    assert len(graphs.graphs.kept) == 5
    for expected, logits in zip(*found, strict=True):
        np.testing.assert_array_equal(expected, logits)


def test_results_stay():
    """States and a context are the caller's: later calls of the same shape do not change them."""
    _, graphs = model_and_writers()
    cache = graphs.new_cache(1, 0)
    held = []
    for turn in range(6):
        states = graphs.step(ids_of(1, 1, turn), cache)
        for tensor in (states, *cache.cache.tensors):
            held.append((tensor, tensor.clone()))
    for tensor, before in held:
        assert torch.equal(tensor, before)


class Launches(TorchDispatchMode):
    """Counts the operators that compute or copy something: each is a launch on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs))
                  if isinstance(leaf, torch.Tensor)}
        outputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(result)
                   if isinstance(leaf, torch.Tensor)}
        in_place = operator._schema.is_mutable
        self.count += bool(outputs - inputs) or in_place
        return result


def launches_of(writer):
    """Of step, states and step_and_states, when their shapes have come back."""
    cache = writer.new_cache(1, 0)
    xt = np.full((1, 32), V)
    forwards = (
        lambda: writer.step(xt[:, :1], cache),
        lambda: writer.states(xt, cache),
        lambda: writer.step_and_states(xt, xt, cache),
    )
    counts = []
    for forward in forwards:
        for _ in range(OFTEN):
            forward()
        with Launches() as launches:
            forward()
        counts.append(launches.count)
    return counts


def test_little_is_left_to_launch():
    """Around a graph: its inputs and its results are copied, nothing else."""
    net = tiny_model("primary", V)
    empty = Graphs(CPU, lambda function, inputs: (lambda: None, function(*inputs)))
    assert min(launches_of(TorchModel(net))) > 50
    # ids and the three tensors of a context in, states and the context out
    assert launches_of(GraphModel(net, empty)) == [4 + 4, 4 + 1, 5 + 4]


# ---- what is recorded ----------------------------------------------------------------------------

def doubled(x):
    return (2 * x,)


def ask(graphs, size, name="double"):
    x = torch.randn(size)
    [result] = graphs.call(name, doubled, (x,))
    assert torch.equal(result, 2 * x)


def test_a_shape_is_recorded_when_it_comes_back():
    graphs = Graphs(CPU, rerun)
    for turn in range(1, OFTEN + 2):
        ask(graphs, 5)
        assert len(graphs.kept) == (turn >= OFTEN)
    ask(graphs, 6)
    ask(graphs, 5, "another function")
    graphs.call("double", doubled, (torch.ones(5, dtype=torch.int64),))
    assert len(graphs.kept) == 1


def test_long_prompts_are_not_recorded():
    """Their memory would be held, and the GPU is busy anyway."""
    _, writer = model_and_writers(rerun)
    cache = writer.new_cache(1, 0)
    for length in (MANY + 1, 5):
        for turn in range(OFTEN):
            writer.step(ids_of(1, length, turn), cache)
    [key] = writer.graphs.kept
    assert key[1][0] == (1, 5)


def test_the_places_go_to_shapes_that_are_used():
    """While all recordings are in use a new shape waits; one that lies idle makes room."""
    graphs = Graphs(CPU, rerun)
    for size in range(1, KEPT + 1):
        for _ in range(OFTEN):
            ask(graphs, size)
    for _ in range(OFTEN):
        ask(graphs, 99)
    idle = [key[1][0][0] for key in graphs.kept][:2]
    assert len(graphs.kept) == KEPT and 99 not in idle
    for _ in range(IDLE):
        ask(graphs, KEPT)
    ask(graphs, 99)
    sizes = [key[1][0][0] for key in graphs.kept]
    assert len(sizes) == KEPT
    assert sizes[-1] == 99 and idle[0] not in sizes and idle[1] in sizes


def test_a_recording_that_fails_loses_no_text(capfd):
    """One notice, and no further attempt."""
    attempts = []

    def broken(function, inputs):
        attempts.append(function(*inputs))
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    plain, _ = model_and_writers()
    graphs = GraphModel(plain.model, Graphs(CPU, broken))
    settings = settings_of(**SETTINGS["blocks"])
    expected = generate(plain, [2, 7], settings, [0]).rows
    assert generate(graphs, [2, 7], settings, [0]).rows == expected
    assert len(attempts) == 1
    said = capfd.readouterr().err
    assert said.count("notice") == 1
    assert "without CUDA graphs (operation not permitted when stream is capturing)" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA GPU")
def test_without_a_gpu_the_real_recording_falls_back(capfd):
    """CudaRecorder itself, in a PyTorch or on a machine that cannot do it."""
    graphs = Graphs(CPU)
    for _ in range(OFTEN + 2):
        ask(graphs, 5)
    assert not graphs.kept
    assert capfd.readouterr().err.count("notice: decoding goes on without CUDA graphs") == 1


def test_who_writes_where():
    assert type(writer_of(tiny_model("primary", shape=TINIER))) is TorchModel
    assert type(writer_of(tiny_model("backup", shape=TINIER))) is TorchModel


# ---- the proof on fake CUDA tensors --------------------------------------------------------------
# A fake tensor has a shape and a device, but no numbers. The models' own code runs on tensors "on
# CUDA" on any machine, and a number that Python wants to read is an error.

DEVICE = "cuda:0"
# a Python number that is written into a slice: a kernel's argument, though it looks like a tensor
NUMBERS = {"aten.lift_fresh.default", "prim.device.default", "aten.fill_.Tensor"}


class OnlyOnTheGPU(TorchDispatchMode):
    """Collects the operators that touch a tensor on another device."""

    def __init__(self, allowed=()):
        super().__init__()
        self.allowed = {*NUMBERS, *allowed}
        self.elsewhere = []
        self.operators = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        tensors = [
            leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)
        ]
        devices = {tensor.device.type for tensor in tensors}
        if devices - {"cuda"} and str(operator) not in self.allowed:
            self.elsewhere.append((str(operator), devices))
        self.operators += 1
        return result


@pytest.fixture
def fake_cuda():
    """FakeTensorMode with a device "cuda" on every machine."""
    with contextlib.ExitStack() as stack:
        if not torch.backends.cuda.is_built():
            stack.enter_context(a_guard_for_cuda())
        stack.enter_context(FakeTensorMode())
        yield


@contextlib.contextmanager
def a_guard_for_cuda():
    """A PyTorch without CUDA does not know how to switch to such a device. Switching to "meta" does
    nothing, which is right for tensors without numbers: it answers for CUDA, too. (FakeTensorMode
    does the same for a PyTorch with CUDA on a machine without a GPU.)
    """
    cuda, meta = 1, 14                  # c10::DeviceType
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * (meta + 1)).in_dll(
            library, "_ZN3c104impl26device_guard_impl_registryE"
        )
    except (OSError, ValueError):
        pytest.skip("this PyTorch without CUDA has no table of devices that can be reached")
    before = guards[cuda]
    guards[cuda] = guards[meta]
    try:
        yield
    finally:
        guards[cuda] = before


def on_fake_cuda(net):
    """The model with all its parameters there."""
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, device=DEVICE)
            setattr(module, name, torch.nn.Parameter(fake))
    return net


def fake_ids(rows, length):
    return torch.zeros(rows, length, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("what", ["number", "tensor", "copy", "where", "back"])
def test_the_proof_can_fail(fake_cuda, what):
    x = torch.zeros(3, device=DEVICE)
    breaks = {
        "number": lambda: float(x.sum()),
        "tensor": lambda: x + torch.tensor([1.0], device=DEVICE),
        "copy": lambda: x.copy_(torch.zeros(3)),
        "where": lambda: x[x > 0],
        "back": lambda: x.cpu(),
    }
    watch = OnlyOnTheGPU()
    try:
        with watch:
            breaks[what]()
    except (DataDependentOutputException, RuntimeError):
        return
    assert watch.elsewhere


@pytest.mark.parametrize("kind", ["primary", "backup"])
@pytest.mark.parametrize("rows,tokens,block", [(1, 1, 1), (1, 5, 8), (3, 1, 1), (3, 70, 32)])
def test_a_forward_never_leaves_the_gpu(fake_cuda, kind, rows, tokens, block):
    """step, states, try_step, step_and_states: no number is read back, nothing comes from the CPU.
    """
    net = on_fake_cuda(tiny_model(kind, exits=True))
    watch = OnlyOnTheGPU()
    with torch.no_grad(), watch:
        cache = net.new_cache(rows, 200)
        for _ in range(2):
            states = net.step(fake_ids(rows, tokens), cache)
            net.logits(states)
            net.states(fake_ids(rows, block), cache)
            net.states(fake_ids(rows, block), cache, 1)
            net.logits(net.try_step(fake_ids(rows, min(tokens, 8)), cache))
            cache.keep(1)
            if kind == "primary":
                net.step_and_states(fake_ids(rows, tokens), fake_ids(rows, block), cache)
    assert not watch.elsewhere, watch.elsewhere
    assert watch.operators > 100


@pytest.mark.parametrize("kind", ["primary", "backup"])
@pytest.mark.parametrize("block,first", [(None, None), (1, 1), (4, 3), (8, 8), (24, 24), (7, 2)])
@pytest.mark.parametrize("with_clean", [True, False])
def test_both_streams_of_training_lie_on_the_gpu(fake_cuda, kind, block, first, with_clean):
    """Training is not recorded, but a tensor on another device would end it."""
    net = on_fake_cuda(tiny_model(kind, exits=True)).train()
    x0 = fake_ids(2, 24)
    xt = x0 if block else None
    # a number that is written by index is copied, which a GPU waits for: allowed, as it is eager
    watch = OnlyOnTheGPU(allowed=["aten.index_put_.default"])
    with watch:
        found = net.both_states(x0, xt, block, first, with_clean, 1)
    assert not watch.elsewhere, watch.elsewhere
    assert all(noisy is None or noisy.shape == (2, 24, 32) for _, noisy in found)


# ---- the real thing ------------------------------------------------------------------------------

@GPU
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_text_on_a_gpu(name, rows):
    net = tiny_model("primary", V, away=0.1, exits=True).cuda()
    writer = writer_of(net)
    assert type(writer) is GraphModel
    settings = settings_of(**SETTINGS[name])
    prompts = [[2, 7, 9 + row] for row in range(rows)]
    expected = generate(TorchModel(net), prompts, settings, list(range(rows)))
    found = generate(writer, prompts, settings, list(range(rows)))
    assert writer.graphs.record and writer.graphs.kept, "no recording"
    assert found.full_rows == expected.full_rows


@GPU
def test_logits_on_a_gpu():
    """float32, to 1e-5 of their size, with two contexts in turn."""
    net = tiny_model("primary", V, away=0.1).cuda()
    found = []
    for writer in (TorchModel(net), writer_of(net)):
        caches = [writer.new_cache(2, 0) for _ in range(2)]
        logits = logits_in_turn(writer, caches, 2, 8)
        found.append(np.concatenate([each[np.isfinite(each)] for each in logits]))
    assert np.abs(found[0] - found[1]).max() <= 1e-5 * np.abs(found[0]).max()


@GPU
@pytest.mark.parametrize("rows", [1, 64])
def test_speed_on_a_gpu(rows, capsys):
    """Tokens/s of 38 million parameters, left to right and in blocks of 32."""
    shape = dict(d_model=512, n_layers=10, n_heads=8, d_ff=1536)
    net = tiny_model("primary", 8000, shape=shape).cuda()
    prompts = [[2, 7, 9]] * rows
    for name, more in (("left to right", dict(block_size=1)), ("blocks", dict(block_size=32))):
        settings = settings_of(128, 8, mode="block_frozen", **more)
        speeds = {}
        for kind, writer in (("eager", TorchModel(net)), ("graphs", writer_of(net))):
            for _ in range(2):          # the first one records
                started = time.perf_counter()
                generate(writer, prompts, settings, list(range(rows)))
                speeds[kind] = rows * 128 / (time.perf_counter() - started)
        with capsys.disabled():
            print(f"\n{rows} rows, {name}: {speeds['eager']:.0f} tokens/s eager, "
                  f"{speeds['graphs']:.0f} with graphs")
        assert rows > 1 or speeds["graphs"] > speeds["eager"]
