"""A GPU that is none: tensors that say they lie on another device, and have numbers on the CPU.

    with pretended_gpu():
        train.main([...])       # where common.machine.pick_device answers THERE

What a GPU refuses is refused: an operator on tensors of two devices. So any command can be run from
its first line to its last as it would on a GPU, on a machine without one, with real numbers. The
device is called "meta", the only one besides the CPU that every PyTorch can name and that autograd
knows; autocast does not know it and is switched off. What this cannot show: CUDA's own kernels.
"""
import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

CPU = torch.device("cpu")
THERE = torch.device("meta")
MOVES = {"aten._to_copy.default", "aten.copy_.default"}      # from one device to another
INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
MADE_OF_PYTHON = (torch.tensor, torch.as_tensor)


class There(torch.Tensor):
    """A tensor of the pretended device; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=THERE,
        )

    def __init__(self, inner):
        self.inner = inner

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        raise RuntimeError(f"{operator} outside of the pretended GPU")


class Operators(TorchDispatchMode):
    """Runs every operator on the numbers, and refuses tensors of two devices. A single number may
    come from the CPU, as a kernel's argument.
    """

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator)
        kwargs = dict(kwargs or {})
        tensors = [
            leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        ]
        there = [tensor for tensor in tensors if isinstance(tensor, There)]
        here = [tensor for tensor in tensors if not isinstance(tensor, There)]
        assert all(tensor.device == CPU for tensor in here), f"{name} lost its numbers"
        if there and name not in MOVES and any(tensor.dim() for tensor in here):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")

        # Where the result lies
        goes_there = bool(there)
        if kwargs.get("device") is not None:
            goes_there = torch.device(kwargs["device"]) == THERE
            kwargs["device"] = CPU
        if name == "aten.copy_.default":
            goes_there = isinstance(args[0], There)

        # The numbers; what is changed in place stays the tensor that it is
        args, kwargs = tree_map_only(There, lambda tensor: tensor.inner, (args, kwargs))
        result = operator(*args, **kwargs)
        if not goes_there:
            return result
        known = {id(tensor.inner): tensor for tensor in there}

        def wrapped(leaf):
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return known[id(leaf)] if id(leaf) in known else There(leaf)
        return tree_map(wrapped, result)


class Conversions(TorchFunctionMode):
    """What PyTorch moves to a device by itself, below its operators: lists and numbers of Python,
    and the CPU's tensors as indices.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in INDEXING and isinstance(args[0], There):
            index = args[1]
            moved = tuple(map(self.moved, index)) if isinstance(index, tuple) else self.moved(index)
            args = (args[0], moved, *args[2:])
        if function in MADE_OF_PYTHON and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)

    @staticmethod
    def moved(index):
        if isinstance(index, list):
            index = torch.tensor(index)
        if isinstance(index, torch.Tensor) and not isinstance(index, There):
            index = index.to(THERE)
        return index


@contextlib.contextmanager
def pretended_gpu():
    """Inside, THERE is a device."""
    with (
        mock.patch("torch.autocast", lambda *args, **kwargs: contextlib.nullcontext()),
        mock.patch("torch.is_autocast_enabled", lambda *args: False),
        Conversions(),
        Operators(),
    ):
        yield


def rerun(function, inputs):
    """In the place of a CUDA graph: the function runs again on the same memory."""
    results = function(*inputs)

    def launch():
        for result, value in zip(results, function(*inputs), strict=True):
            result.copy_(value)
    return launch, results
