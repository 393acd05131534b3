"""What is exported, whatever the format: the trained model, and text for the export's proof.

    model, tokenizer, saved = load_checkpoint(args)
    output = output_of(args, saved, "weights.bin")
    windows = held_out_windows(data_dir, tokenizer, saved)

    tokens = training_tokens(data_dir, tokenizer, saved)

Used by export.py, edge/folder.py and hf/folder.py. Legend: L tokens of a row.
"""
from pathlib import Path

import numpy as np

import checkpoint
import config
from common import machine
from common.console import UserError, say
from evaluation import held_out

WINDOWS = 12           # of held-out text that are scored
LEAST = 80             # tokens of a text on which logits are compared


def load_checkpoint(args):
    """The trained model on the CPU, its tokenizer, its checkpoint."""
    machine.start(args.threads)
    device = machine.pick_device("cpu")
    return checkpoint.load_model(args.ckpt, device, config.check_saved)


def output_of(args, saved, mark):
    """The folder that --output names, or the run's; mark: a file that each export of this format
    has.
    """
    name = saved.name
    if args.format != "onnx":
        name += f"-{args.format}"
    output = Path(args.output or Path("exports") / name)
    if output.exists() and not (output / mark).is_file():
        raise UserError(
            f"--output {output} is something else than an exported model of --format "
            f"{args.format}: name another"
        )
    return output


def held_out_windows(data_dir, tokenizer, saved):
    """Beginnings of held-out documents, lists of ids, or [] without the run's data."""
    settings = saved.config["args"]
    data_dir = data_dir or settings["data_dir"]
    if not Path(data_dir, "meta.json").is_file() and not Path(data_dir).is_file():
        say(f"notice: {data_dir} is not there, so nothing is measured on held-out text")
        return []
    data = held_out.open_text(data_dir, "val", saved)
    held_out.same_tokenizer(data, tokenizer, saved)
    documents = [ids for ids in data.documents() if len(ids) > 1]
    windows = []
    for ids in held_out.spread_over(documents, WINDOWS, config.scored_length(saved)):
        windows.append(ids.tolist())
    return windows


def training_tokens(data_dir, tokenizer, saved):
    """The ids of the training text, or none without the run's data."""
    data_dir = data_dir or saved.config["args"]["data_dir"]
    if not Path(data_dir, "meta.json").is_file() and not Path(data_dir).is_file():
        return np.zeros(0, np.int64)
    data = held_out.open_text(data_dir, "train", saved)
    held_out.same_tokenizer(data, tokenizer, saved)
    return data.tokens


def text_for_logits(cfg, windows):
    """Two rows of ids (2, L): held-out text where there is enough of it, random pieces else."""
    rows = [window for window in windows if len(window) >= LEAST][:2]
    if len(rows) < 2:
        pieces = np.random.default_rng(0).integers(4, cfg.vocab_size, (2, LEAST))
        return pieces.astype(np.int64)
    return np.array([row[:LEAST] for row in rows])
