"""A PyTorch denoiser as sampling/decode.py sees an engine: ids in and logits out are numpy arrays,
everything between stays on the model's device.

    writer = TorchModel(model)          # once, where the model lies and as it is prepared
    result = decode.generate(writer, ids, settings, seeds)

Used by whatever writes text with a model of model.py: sample.py, train.py, evaluate.py,
edge_benchmark.py, the benchmarks. Nothing here records a gradient.
"""
import numpy as np
import torch


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
    def logits(self, states, rows, positions):
        where = self.tensor(np.stack((rows, positions)))                           # (2, N)
        logits = self.model.logits(states[where[0], where[1]])                     # (N, V)
        return logits.cpu().numpy()

    def memory_of_gpu(self):
        """device_memory."""
        return self.device, torch.cuda.get_device_properties(self.device).total_memory


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
    def in_one_batch(self, other):
        """beside."""
        return TorchCache(self.cache.beside(other.cache), self.device)
