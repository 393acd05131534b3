"""Functions of tensors, recorded as CUDA graphs: one launch instead of one for each operator.

    graphs = Graphs(device)
    results = graphs.call(name, function, tensors)      # function(*tensors) -> tuple of tensors

Used by sampling/torch_model.py. A forward of a small model at batch 1 is some 500 operators of a
few microseconds each, and Python needs longer to launch them than a GPU to compute them.

A graph is bound to its shapes and to the memory that it was recorded with. So each name and shape
has a recording with input tensors of its own: what is asked for is copied into them, the graph is
launched, and its results are copied out. No tensor of a caller ever belongs to a graph.

What a function may do: launch operators on the GPU. What it must not do, as a graph would not
repeat it: read a number back from the GPU, copy from the CPU, change a Python value or a tensor
that it is given (tests/test_cuda_graphs.py proves this of the models without a GPU).
"""
import collections

import torch

from common.console import say

OFTEN = 3       # a shape is recorded when it is asked for so often: an odd last block never is
KEPT = 16       # recordings; each holds the memory of one forward
MANY = 4096     # tokens from which on a GPU computes longer than Python launches
IDLE = 64       # calls after which a recording may make room for another one
WARM_UPS = 2    # runs before the recording, in which libraries set themselves up


class Recording:
    """A recorded function: its own input tensors, what launches it, its own results."""

    def __init__(self, record, function, tensors, device):
        self.inputs = [tensor.to(device, copy=True) for tensor in tensors]
        self.launch, self.results = record(function, self.inputs)
        self.used = 0                   # the number of the last call

    def play(self, tensors):
        for own, tensor in zip(self.inputs, tensors, strict=True):
            own.copy_(tensor)
        self.launch()
        return tuple(result.clone() for result in self.results)


class Graphs:
    """Calls functions of tensors, and records those whose shapes come back.

    record: what records; a test without a GPU gives another one.
    """

    def __init__(self, device, record=None):
        self.device = device
        self.record = record or CudaRecorder(device)
        self.calls = 0
        self.asked = collections.Counter()          # how often each shape was asked for
        self.kept = {}                              # its recording, the longest idle one first

    def call(self, name, function, tensors, width=0):
        """function(*tensors) -> a tuple of tensors. The same name is the same function; tensors on
        the CPU are copied to the device. width: how many tokens the function computes.
        """
        self.calls += 1
        key = (name, *((tensor.shape, tensor.dtype) for tensor in tensors))
        recording = self.kept.pop(key, None)
        if recording is None and width <= MANY:
            recording = self.recorded(key, function, tensors)
        if recording is None:
            return function(*(tensor.to(self.device) for tensor in tensors))
        self.kept[key] = recording
        recording.used = self.calls
        return recording.play(tensors)

    def recorded(self, key, function, tensors):
        """A recording of this shape, or None: it is rare, all places are in use, or this machine
        cannot record.
        """
        self.asked[key] += 1
        if self.record is None or self.asked[key] < OFTEN:
            return None
        if len(self.kept) == KEPT:
            longest_idle = next(iter(self.kept))
            if self.calls - self.kept[longest_idle].used < IDLE:
                return None
            del self.kept[longest_idle]
        try:
            return Recording(self.record, function, tensors, self.device)
        except Exception as error:  # a driver and its libraries raise many types
            self.record = None
            cause = error.__context__ or error      # ending a broken recording is an error, too
            reason = (str(cause).splitlines() or [type(cause).__name__])[0]
            say(f"notice: decoding goes on without CUDA graphs ({reason})")
            return None


class CudaRecorder:
    """Records functions as CUDA graphs, all on one stream of its own: the libraries keep memory for
    each stream.
    """

    def __init__(self, device):
        self.device = device
        self.stream = None

    def __call__(self, function, inputs):
        """-> (what launches the graph, its results, which each launch overwrites)."""
        here = torch.cuda.current_stream(self.device)
        # whatever happens inside, the caller goes on with its own device and stream
        with torch.cuda.stream(here):
            if self.stream is None:
                self.stream = torch.cuda.Stream(self.device)
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UPS):
                    function(*inputs)
            here.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # memory of its own for each graph, as they are launched in any order
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                results = function(*inputs)
        return graph.replay, results
