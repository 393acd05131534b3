"""The parts of gpu_check.py that say whether a GPU computes the right thing.

    machine     what it is: names, versions, the speed of products and of memory
    exact       loss and gradients of both models and all attention variants against the CPU; the
                cache against the text computed anew; caches in fewer bytes; the kernels that
                attention runs in
    tests       the tests of the suite that need a GPU

The CPU's figures are made with the plainest kernels there are (no oneDNN, attention as a table of
scores), so that on a machine without a GPU the comparison still is one of two computations.
Legend: B rows, T tokens, S block, D width, V vocabulary.
"""
import contextlib
import importlib.util
import os
import subprocess
import sys
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness import ROOT  # first: it puts the repository on the path

import attention
import config
import masking
from common import machine
from model import build_model
from model_config import ModelConfig, attention_heads

# bf16 without sparsity, TFLOP/s, as the vendor's sheets have it; the first name that fits counts
SHEETS = (
    ("H200", 989),
    ("GH200", 989),
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("A100", 312),
    ("L40S", 362),
    ("L4", 121),
    ("A10G", 70),
    ("A10", 125),
    ("RTX 4090", 165),
    ("RTX 3090", 71),
)
# how far float32 on a GPU may be from float32 on a CPU, and bf16 from both
LOSS = 2e-5             # of the loss
GRADIENT = 2e-4         # of the norm of all gradients together
ONE_GRADIENT = 5e-3     # of the norm of one parameter's gradient
CACHE = 1e-5            # of the logits' size
BF16_LOSS = 0.02
BF16_COSINE = 0.98      # of all gradients together
NATS = 0.01             # that a smaller cache may cost a token, in the mean

VARIANTS = {
    "mha": dict(attn="mha"),
    "gqa": dict(attn="gqa", kv_heads=2),
    "bottleneck": dict(attn="bottleneck", null_attn=True),
    "decoupled": dict(attn="decoupled", learned_temp=True, tie_qk=True),
}
MODELS = {
    "primary": dict(model="primary"),
    "primary, kernel 7": dict(model="primary", conv_kernel=7, exits=True),
}
for _name, _shape in VARIANTS.items():
    MODELS[f"backup {_name}"] = dict(model="backup", **_shape)


def sheet(name):
    """The bf16 peak of the vendor's sheet in FLOP/s for a GPU of this name, or None."""
    for part, teraflops in SHEETS:
        if part in name:
            return teraflops * 1e12
    return None


# ---- the machine ---------------------------------------------------------------------------------

def machine_part(figures):
    device = machine.pick_device("auto")
    found = machine.environment(device)
    found["packages"] = {}
    for name in ("tokenizers", "pytest", "triton", "tensorboard"):
        found["packages"][name] = importlib.util.find_spec(name) is not None
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found["memory_gb"] = about.total_memory / 1e9
        found["capability"] = [about.major, about.minor]
        found["multiprocessors"] = about.multi_processor_count
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
        found["sheet_tflops"] = (sheet(about.name) or 0) / 1e12 or None
    found["tf32"] = {
        "products": torch.backends.cuda.matmul.allow_tf32,
        "convolutions": torch.backends.cudnn.allow_tf32,
    }
    figures.put(**found)

    size = 512 if figures.tiny else 8192
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    speed = machine.matmul_flops(dtypes, device, size, runs=20, limit=3)
    figures.put(product_tflops={str(dtype): flops / 1e12 for dtype, flops in speed.items()})
    figures.put(copy_gb_s=copy_speed(device, figures.tiny) / 1e9)


def copy_speed(device, tiny):
    """Bytes read and written a second by a copy on the device."""
    count = 2**20 if tiny else 2**28
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        machine.synchronise(device)
        started = time.perf_counter()
        target.copy_(source)
        machine.synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * 4 * count / best


# ---- loss and gradients --------------------------------------------------------------------------

@contextlib.contextmanager
def plainest():
    """Inside, a CPU computes with its plainest kernels."""
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.backends.mkldnn.flags(enabled=False), math_only:
        yield


def built(shape, tiny):
    """A model on the CPU, away from its symmetric start: the same each time."""
    sizes = dict(d_model=256, n_layers=4, n_heads=4, d_ff=512)
    if tiny:
        sizes = dict(d_model=64, n_layers=2, n_heads=4, d_ff=96)
    torch.manual_seed(0)
    model = build_model(ModelConfig(vocab_size=300, memory_slots=8, **sizes, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


def copied(model, device):
    """The same model on the device."""
    other = build_model(model.cfg).to(device)
    other.load_state_dict(model.state_dict())
    return other


def text_of(tiny):
    length = 48 if tiny else 192
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, 300, (2, length), generator=generator)                 # (B, T)


def questions(length):
    """{name: masks} of the three sorts of steps; one begins with a shorter block."""
    args = config.TrainArgs(seq_len=length)
    return {
        "whole rows": masking.corrupt(args, 1, 0, 2, length, length),
        "blocks of 16": masking.corrupt(args, 1, 1, 2, length, 16),
        "blocks of 16, shorter first": masking.corrupt(args, 1, 2, 2, length, 16, 5),
        "left to right": masking.left_to_right(2, length),
    }


def learned(model, x0, masks, bf16=False):
    """-> the loss, {parameter: its gradient} on the CPU in float64."""
    device = model.device
    model.zero_grad(set_to_none=True)
    with machine.autocast(device, torch.bfloat16 if bf16 else None):
        loss = masking.denoising_loss(model, x0.to(device), masks, "elbo").loss
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.detach().cpu().double()
    return float(loss.detach()), gradients


def difference(found, wanted):
    """Gradients beside others -> the error of all together, the largest of one parameter, its name,
    the cosine of all together.
    """
    errors = {}
    squares = torch.zeros(4, dtype=torch.float64)     # of the error, found, wanted; their product
    for name, exact in wanted.items():
        mine = found[name]
        gap = (mine - exact).square().sum()
        squares += torch.stack(
            (gap, mine.square().sum(), exact.square().sum(), (mine * exact).sum())
        )
        errors[name] = float((gap / exact.square().sum().clamp(min=1e-30)).sqrt())
    worst = max(errors, key=errors.get)
    return {
        "all": float((squares[0] / squares[2]).sqrt()),
        "worst": errors[worst],
        "worst_name": worst,
        "cosine": float(squares[3] / (squares[1] * squares[2]).sqrt()),
    }


def loss_and_gradients(shape, device, tiny):
    """-> {the sort of step: loss and gradient errors in float32 and bf16}."""
    reference = built(shape, tiny)
    model = copied(reference, device)
    x0 = text_of(tiny)
    found = {}
    for name, masks in questions(x0.shape[1]).items():
        with plainest():
            loss, gradients = learned(reference, x0, masks)
        own_loss, own = learned(model, x0, masks)
        low_loss, low = learned(model, x0, masks, bf16=True)
        exact = difference(own, gradients)
        rough = difference(low, gradients)
        error = abs(own_loss / loss - 1)
        low_error = abs(low_loss / loss - 1)
        found[name] = {
            "float32": {
                "right": error <= LOSS
                and exact["all"] <= GRADIENT
                and exact["worst"] <= ONE_GRADIENT
                and own.keys() == gradients.keys(),
                "loss_error": error,
                "gradient_error": exact,
            },
            "bf16": {
                "right": low_error <= BF16_LOSS and rough["cosine"] >= BF16_COSINE,
                "loss_error": low_error,
                "gradient_error": rough,
            },
        }
    return found


# ---- the cache -----------------------------------------------------------------------------------

def logits_error(model, states, wanted):
    """The largest error of a logit, in units of the largest logit."""
    found, exact = model.logits(states), model.logits(wanted)
    finite = torch.isfinite(exact)
    if not torch.equal(finite, torch.isfinite(found)):
        return float("inf")
    return float((found - exact)[finite].abs().max() / exact[finite].abs().max())


@torch.no_grad()
def cached_and_uncached(shape, device, tiny):
    """-> the errors of logits behind the cache against those of the text computed anew."""
    model = copied(built(shape, tiny), device).eval()
    x0 = text_of(tiny).to(device)
    T = x0.shape[1]
    generator = torch.Generator().manual_seed(2)
    hidden = (torch.rand(x0.shape, generator=generator) < 0.5).to(device)
    xt = torch.where(hidden, model.cfg.mask_id, x0)

    # left to right, read in pieces of many sizes
    clean = model.clean_states(x0)                                                 # (B, T, D)
    cache = model.new_cache(2, T)
    states = []
    for part in x0.split([1, 7, 16, 1, T - 25], dim=1):
        states.append(model.step(part, cache))
    errors = {"left to right": logits_error(model, torch.cat(states, 1)[:, :-1], clean[:, 1:])}

    # a block behind the text before it
    for S in (1, 16):
        noisy = model.block_states(xt, x0, S)
        worst = 0.0
        for begin in (0, S, T - T % S - S):
            cache = model.new_cache(2, T)
            if begin:
                model.step(x0[:, :begin], cache)
            part = slice(begin, begin + S)
            error = logits_error(model, model.states(xt[:, part], cache), noisy[:, part])
            worst = max(worst, error)
        errors[f"blocks of {S}"] = worst

    # tokens that may be wrong, of which some are taken back
    cache = model.new_cache(2, T)
    model.step(x0[:, :9], cache)
    model.try_step(x0[:, 30:37], cache)         # none of these is kept
    model.try_step(x0[:, 9:14], cache)
    cache.keep(3)
    states = model.step(x0[:, 12:20], cache)
    errors["tried tokens"] = logits_error(model, states, clean[:, 13:21])
    worst = max(errors.values())
    return {"right": worst <= CACHE, "largest": worst, "errors": errors}


@torch.no_grad()
def smaller_caches(shape, device, tiny):
    """-> {how it is stored: what that costs a token in nats, left to right token by token}."""
    model = copied(built(shape, tiny), device).eval()
    x0 = text_of(tiny).to(device)[:, :64]
    nats = {}
    for stored, kind in attention.CACHES.items():
        model.cache_type = kind
        cache = model.new_cache(*x0.shape)
        states = [model.step(x0[:, i:i + 1], cache) for i in range(x0.shape[1] - 1)]
        logp = model.logits(torch.cat(states, dim=1)).log_softmax(-1)
        nats[stored] = -logp.gather(-1, x0[:, 1:, None]).double()
    found = {}
    for stored in ("bf16", "int8"):
        moved = nats[stored] - nats["fp32"]
        mean = float(moved.mean())
        found[stored] = {
            "right": abs(mean) <= NATS and bool(moved.any()),
            "mean_nats": mean,
            "mean_change": float(moved.abs().mean()),
        }
    return found


# ---- the kernels ---------------------------------------------------------------------------------

class Called(TorchDispatchMode):
    """The attention kernels that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if "attention" in name:
            self.names.add(name)
        return operator(*args, **(kwargs or {}))


def kernels(shape, device, tiny):
    """Attention of one 1B layer in bf16, forward and backward, in each form that a model asks for
    -> {form: its kernels, milliseconds, the memory it takes beyond its inputs}. No kernel with a
    name: a table of scores is made.
    """
    T = 64 if tiny else 2048
    large = dict(vocab_size=300, d_model=2048, n_layers=1, n_heads=32, d_ff=8)
    cfg = ModelConfig(model="backup", **large, **shape)
    heads = attention_heads(cfg)
    block = 32
    noisy = T + T // block + 1          # a shorter first block makes it uneven, as mostly
    mask = torch.rand(noisy, T + noisy, device=device) < 0.5
    mask[:, 0] = True
    forms = {
        "clean": (T, T, None, True),
        "noisy": (noisy, T + noisy, mask, False),
        "one token behind the cache": (1, T, None, True),
        "a block behind the cache": (block, T, None, False),
    }
    found = {}
    for name, (new, seen, seen_by, causal) in forms.items():
        make = dict(device=device, dtype=torch.bfloat16)
        q = torch.randn(1, heads.queries, new, heads.key, requires_grad=True, **make)
        k = torch.randn(1, heads.keys, seen, heads.key, requires_grad=True, **make)
        v = torch.randn(1, heads.keys, seen, heads.value, requires_grad=True, **make)
        if seen_by is not None:
            seen_by = attention.for_all_layers(seen_by, q)
        found[name] = timed_kernel(lambda a=(q, k, v, 0.1, seen_by, causal): attention.attend(*a))
    return found


def timed_kernel(forward):
    """-> its kernels, milliseconds of forward and backward (the best of 5), MB beyond its inputs.
    """
    with Called() as called:
        out = forward()
        out.sum().backward()
    device = out.device
    start = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
    best = float("inf")
    for _ in range(5):
        machine.synchronise(device)
        began = time.perf_counter()
        forward().sum().backward()
        machine.synchronise(device)
        best = min(best, time.perf_counter() - began)
    extra = None
    if device.type == "cuda":
        extra = (torch.cuda.max_memory_allocated(device) - start) / 1e6
    return {"kernels": sorted(called.names), "ms": 1e3 * best, "extra_mb": extra}


# ---- the parts -----------------------------------------------------------------------------------

def exact_part(figures):
    """Model by model, so that a broken one hides no other."""
    device = machine.pick_device("auto")
    found = {}
    for name, shape in MODELS.items():
        found[name] = {}
        asked = {"loss": loss_and_gradients, "cache": cached_and_uncached}
        if shape["model"] == "backup":
            asked["smaller caches"] = smaller_caches
        for what, function in asked.items():
            found[name][what] = attempt(function, shape, device, figures.tiny)
            figures.put(models=found)
    if device.type == "cuda":
        figures.put(without_tf32=convolutions_without_tf32(device, figures.tiny))
    layers = {}
    for name in ("mha", "gqa", "bottleneck", "decoupled"):
        layers[name] = attempt(kernels, dict(attn=name), device, figures.tiny)
        figures.put(kernels_of_a_1b_layer=layers)


def convolutions_without_tf32(device, tiny):
    """The primary's cache error with TF32 switched off in convolutions: a larger one above would be
    TF32's.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return attempt(cached_and_uncached, MODELS["primary"], device, tiny)
    finally:
        torch.backends.cudnn.allow_tf32 = before


def attempt(function, *args):
    """function(*args), or what went wrong, in words, as a check that is not right."""
    try:
        return function(*args)
    except Exception as error:  # a kernel that is missing raises what it likes
        first = (str(error).splitlines() or [""])[0]
        return {"right": False, "error": f"{type(error).__name__}: {first}"[:500]}


def tests_part(figures):
    """The suite's own tests that need a GPU; without one they skip themselves."""
    if importlib.util.find_spec("pytest") is None:
        figures.put(told="pytest is not installed: left out")
        return
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-rs", "-s"]
    done = subprocess.run(
        [sys.executable, *words, "tests/test_cuda_graphs.py", "-k", "on_a_gpu and not speed"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "4"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    print(done.stdout, done.stderr)
    figures.check("suite", done.returncode == 0, code=done.returncode, last_lines=lines[-15:])


PARTS = {"machine": machine_part, "exact": exact_part, "tests": tests_part}
