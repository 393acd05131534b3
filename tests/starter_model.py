"""The starter model as a PyTorch model again, from its folder of bytes in exports/: what tests need
that export it in another way. Its training takes minutes, and its checkpoint is not kept.
"""
import math

import numpy as np
import onnx
import torch
from onnx import helper

from common.files import ROOT, read_json
from edge import blocks, engine, graphs
from model import build_model
from model_config import ModelConfig

STARTER = ROOT / "exports/starter"


def tensors(folder):
    """{name: array}: what the graphs of a folder have in its file of weights."""
    data = (folder / engine.WEIGHTS).read_bytes()
    found = {}
    for name in ("next", "rows", "head"):
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        for tensor in graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            made = tensor.name.endswith(tuple(f".{form}" for form in blocks.FORMS))
            if place.get("location") == engine.WEIGHTS and not made:
                kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
                array = np.frombuffer(data, kind, np.prod(tensor.dims), int(place["offset"]))
                found[tensor.name] = array.reshape(tensor.dims)
    return found


def starter_model():
    """The network of the starter model, its matrices rounded to bytes."""
    cfg = ModelConfig.from_dict(read_json(STARTER / engine.CONFIG)["model"])
    found = tensors(STARTER)

    def matrix(name, inputs):
        scales = found[f"{name}.scales"][:, None]
        return blocks.unpack(found[f"{name}.bytes"], scales, 8, inputs)

    parameters = {
        "head.weight": matrix("head.weight", cfg.d_model) * found["head.factors"],
        "exits.final_norm.weight": found["exits.final_norm.weight"],
    }
    for i in range(cfg.n_layers):
        p = f"layers.{i}."
        rows = matrix(p + "in_proj", cfg.d_model)
        rows[-cfg.n_heads * cfg.memory_slots:] *= graphs.SCORE_CAP
        rows[2 * cfg.d_ff + cfg.d_mem:][:cfg.d_mem] *= math.exp(-graphs.SHARED)
        taps = [found[f"{p}conv.{tap}"] for tap in range(cfg.conv_kernel)]
        parameters |= {
            p + "norm.weight": found[p + "norm.weight"],
            p + "conv.weight": np.stack(taps, axis=1),
            p + "in_proj.weight": rows,
            p + "out_proj.weight": matrix(p + "out_proj", cfg.d_ff + cfg.d_mem),
            p + "slot_key": found[p + "slot_key.short"] * math.sqrt(cfg.d_mem // cfg.n_heads),
            p + "decay": -np.log(-np.log(found[p + "fade"][..., 0])),
        }
    model = build_model(cfg)
    model.load_state_dict({name: torch.tensor(value) for name, value in parameters.items()})
    return model.eval()
