"""Where public peers lie and how their files are loaded: outside the project, never committed.

Used by decode_peers.py, train_peers.py, bound_peers.py and likelihood_peers.py, whose --peers names
a folder with one sub-folder for each peer. Their files run unchanged. What is not there is skipped
with one line.

    llama.cpp/           a source tree with build/bin/llama-bench and gguf-py (the one that
                         llama-cpp-python bundles, say)
    LLaDA/generate.py    ML-GSAI/LLaDA, with get_log_likelihood.py beside it
    RADD/losses.py       ML-GSAI/RADD, with noise_lib.py beside it (nothing else of it, and none of
                         its packages)
    Fast-dLLM/           NVlabs/Fast-dLLM
    dllm/                ZHZisZZ/dllm
    nanoGPT/             karpathy/nanoGPT
    mdlm/                kuleshov-group/mdlm
    pip/                 pip install --no-deps -t pip slm388-torchdiff telos-ml einops
    hf/                  pip install --no-deps -t hf transformers accelerate huggingface_hub ...
                         (what is missing, never torch)
"""
import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


class Missing(Exception):
    """A peer that is not here: its line says what was looked for."""


def find(folder, *parts):
    """The path of a peer's file or folder, or Missing."""
    path = Path(folder, *parts).resolve()
    if not path.exists():
        raise Missing(f"{path} is not there")
    return path


@contextlib.contextmanager
def stand_ins(modules):
    """While a peer's file is imported, these names are modules with these attributes: what it
    imports and we never call.
    """
    before = {name: sys.modules.get(name) for name in modules}
    for name, attributes in modules.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(attributes, __path__=[])
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def bare(name, folder):
    """A package whose own __init__ is not run (they import command lines, graphics, data sets):
    only its modules are wanted.
    """
    package = sys.modules[name] = ModuleType(name)
    package.__path__ = [str(folder)]


def load(path, name):
    """A peer's file as the module `name`."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def packages(folder, name):
    """A pip target folder behind everything that is installed here, then the package; ours stay
    first.
    """
    path = str(find(folder, name))
    if path not in sys.path:
        sys.path.append(path)


def collect(sources):
    """[(name, function -> dict)] -> all their entries; a missing peer costs one printed line."""
    found = {}
    for name, source in sources:
        try:
            found |= source()
        except Missing as why:
            print(f"skipped {name}: {why}", flush=True)
    return found
