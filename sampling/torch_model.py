"""A PyTorch denoiser as sampling/decode.py sees an engine: ids in and logits out are numpy arrays,
everything between stays on the model's device.

    writer = writer_of(model)           # once, where the model lies and as it is prepared
    result = decode.generate(writer, ids, settings, seeds)

Used by whatever writes text with a model of model.py: sample.py, train.py, evaluate.py,
edge_benchmark.py, the benchmarks. Nothing here records a gradient.

On CUDA the forwards of EcoHybrid are played back as CUDA graphs (GraphModel). The transformer's
cache grows, and with it every shape: it stays as it is. So does the writer of a training run, which
is a TorchModel: its memory belongs to the training, and a failed recording could leave the GPU's
random numbers, which dropout draws, unusable.
"""
import numpy as np
import torch

from sampling import fast
from sampling.cuda_graphs import Graphs


def writer_of(model):
    """The fastest engine for this model where it lies."""
    device = next(model.parameters()).device
    if device.type == "cuda" and model.cfg.model == "primary":
        return GraphModel(model, Graphs(device))
    return TorchModel(model)


class TorchModel:
    """The denoiser protocol on numpy arrays. Hidden states stay tensors: only the logits that are
    asked for are copied.
    """

    def __init__(self, model):
        self.model = model
        self.cfg = model.cfg
        self.device = next(model.parameters()).device
        # what a model may have is there only if it has it
        if hasattr(model, "step_and_states"):
            self.step_and_states = self.read_and_look
        # of EcoHybrid with 4M to 6M parameters on one CPU thread (docs/experiments/decoding.md)
        self.round_cost = 3.7
        if model.head.product:
            self.round_cost = 2.9       # packed: a few rows take little longer than one
        self.exact_rows = self.device.type == "cpu" and not isinstance(
            model.head.product, fast.PackedBF16
        )
        if self.device.type == "cuda":
            self.device_memory = self.memory_of_gpu

    def tensor(self, array):
        return torch.from_numpy(array).to(self.device)

    @torch.no_grad()
    def new_cache(self, rows, length):
        return TorchCache(self.model.new_cache(rows, length), self.device)

    @torch.no_grad()
    def step(self, x0, cache):
        return self.model.step(self.tensor(x0), cache.cache)

    @torch.no_grad()
    def states(self, xt, cache, depth=None):
        return self.model.states(self.tensor(xt), cache.cache, depth)

    @torch.no_grad()
    def read_and_look(self, x0, xt, cache):
        """step_and_states."""
        return self.model.step_and_states(self.tensor(x0), self.tensor(xt), cache.cache)

    @torch.no_grad()
    def try_step(self, x0, cache):
        return self.model.try_step(self.tensor(x0), cache.cache)

    @torch.no_grad()
    def logits(self, states, rows, positions):
        where = self.tensor(np.stack((rows, positions)))                           # (2, N)
        logits = self.model.logits(states[where[0], where[1]])                     # (N, V)
        return logits.cpu().numpy()

    def memory_of_gpu(self):
        """device_memory."""
        return self.device, torch.cuda.get_device_properties(self.device).total_memory


class GraphModel(TorchModel):
    """The same for a model whose cache is a few tensors of constant size: its forwards are
    functions of tensors, so the shapes that come back are recorded as CUDA graphs. The head's few
    operators run as ever: to copy their input in and their result out would take as long.
    """

    def __init__(self, model, graphs):
        super().__init__(model)
        self.graphs = graphs

    def step(self, x0, cache):
        return self.played("step", self.model.step, cache, x0)

    @torch.no_grad()
    def states(self, xt, cache, depth=None):
        context = cache.cache

        def forward(xt, *tensors):
            return (self.model.states(xt, context.holding(*tensors), depth),)
        found = self.graphs.call(
            ("states", depth), forward, (torch.from_numpy(xt), *context.tensors), xt.size
        )
        return found[0]

    def read_and_look(self, x0, xt, cache):
        """step_and_states."""
        return self.played("step_and_states", self.model.step_and_states, cache, x0, xt)

    @torch.no_grad()
    def played(self, name, method, cache, *ids):
        """method(*ids, cache), whose first ids join the context -> its states."""
        context = cache.cache
        count = len(ids)

        def forward(*tensors):
            after = context.holding(*tensors[count:])
            states = method(*tensors[:count], after)
            return states, *after.tensors
        arrays = [torch.from_numpy(array) for array in ids]
        tokens = sum(array.size for array in ids)
        states, *after = self.graphs.call(name, forward, (*arrays, *context.tensors), tokens)
        cache.cache = context.holding(*after)
        cache.cache.length += ids[0].shape[1]
        return states

    @torch.no_grad()
    def try_step(self, x0, cache):
        context = cache.cache

        def forward(x0, *tensors):
            after = context.holding(*tensors)
            states = self.model.try_step(x0, after)
            return states, *after.tried
        tokens = torch.from_numpy(x0)
        states, *context.tried = self.graphs.call(
            "try_step", forward, (tokens, *context.tensors)
        )
        return states


class TorchCache:
    """The cache of a PyTorch denoiser, whose rows are named by numpy arrays."""

    def __init__(self, cache, device):
        self.cache = cache
        self.device = device
        if hasattr(cache, "beside"):
            self.beside = self.in_one_batch

    @property
    def nbytes(self):
        return self.cache.nbytes

    @torch.no_grad()
    def select(self, rows):
        self.cache.select(torch.from_numpy(rows).to(self.device))

    @torch.no_grad()
    def keep(self, tokens):
        self.cache.keep(tokens)

    @torch.no_grad()
    def in_one_batch(self, other):
        """beside."""
        return TorchCache(self.cache.beside(other.cache), self.device)
