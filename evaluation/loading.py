"""The model of evaluate.py and the models of edge_benchmark.py: a checkpoint in PyTorch, or an
exported folder.

    loaded, tokenizer, saved = load_model(args, device)
"""
import dataclasses
from typing import NamedTuple

import checkpoint
import config
from common.console import say
from evaluation.exported import ExportedModel
from sampling import exported, fast
from sampling.torch_model import writer_of


class Loaded(NamedTuple):
    """A model that writes and is scored, and how its products are computed."""
    writer: object          # an engine, as sampling/decode.py sees it; of gaussian there is none
    model: object           # the same as the estimators see it
    precision: str
    weights: int            # bytes


def load_model(args, device):
    """What --ckpt and --engine ask for, to be scored in float32 or as it was exported -> (Loaded,
    tokenizer, the checkpoint).
    """
    folder = exported.folder_of(args)
    if folder:
        return load_export(folder, args)
    model, tokenizer, saved = checkpoint.load_model(args.ckpt, device, config.check_any)
    writer = None if model.cfg.gaussian else writer_of(model)
    return Loaded(writer, model, "fp32", None), tokenizer, saved


def load_export(folder, args):
    writer, tokenizer, saved = exported.load(folder, args)
    precision = f"onnx {writer.manifest['bits']} bits"
    weights = writer.manifest["files"]["weights.bin"]["bytes"]
    return Loaded(writer, ExportedModel(writer), precision, weights), tokenizer, saved


def load_models(args, chosen, device):
    """Everything that the variants `chosen` ask for -> ({(engine, precision) as asked: Loaded},
    tokenizer, the checkpoint).
    """
    asked_for = {}
    for pairs in chosen.values():
        mine = dataclasses.replace(args, **pairs)
        folder = exported.folder_of(mine)
        key = mine.engine, mine.precision
        asked_for[key] = folder, mine
    found = {}
    for key, (folder, mine) in asked_for.items():
        if folder:
            found[key], tokenizer, saved = load_export(folder, mine)
            continue
        precision, why = fast.pick(mine.precision, device)
        same = [loaded for loaded in found.values() if loaded.precision == precision]
        if same:
            found[key] = same[0]
            continue
        model, tokenizer, saved = checkpoint.load_model(
            mine.ckpt, device, config.check_saved, mine.model, mine.tokenizer
        )
        weights = fast.prepare(model, precision)
        found[key] = Loaded(writer_of(model), model, precision, weights)
        say(f"precision: {precision} ({why}), {weights / 2**20:.1f} MB of weights")
    return found, tokenizer, saved
