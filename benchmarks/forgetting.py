"""What a fine-tuning has learned and what it has forgotten: a base and the runs that began from it.

    python benchmarks/forgetting.py checkpoints/base checkpoints/tuned checkpoints/adapted

A line for each checkpoint, the base first. Old text is the base's held-out text, left to right and
in blocks, in bits/byte; beside each figure, how much more than the base's it is, with the standard
error of the difference over the same documents. New text is that of the last run: held-out
responses if it is pairs, in nats/token, left to right. Windows are as long as the base's rows for
all of them, which is what `evaluate --data_dir` lacks where a fine-tuning had shorter ones. Not
part of CI.
"""
import math
from typing import NamedTuple

from harness import arguments  # first: it puts the repository on the path

import checkpoint
import config
from common import machine
from evaluation import estimators, held_out

BLOCK = 64
ROW = "{:<30} {:>10} {:>18} {:>10} {:>18} {:>10}"


class Text(NamedTuple):
    """Held-out documents: their windows, their tokens and bytes."""
    pieces: list
    tokens: int
    bytes: int


def text_of(saved, tokenizer, count, length):
    """So many held-out documents of the text that a run was trained on."""
    asked = config.EvaluateArgs(ckpt=str(saved.path))
    data_dir = saved.config["args"]["data_dir"]
    documents, framed = held_out.read_documents(asked, data_dir, tokenizer, saved)
    documents = [ids for ids in documents if len(ids) > 1]
    chosen = held_out.choose(documents, length, 10**6, count)
    measured = held_out.measured(chosen, tokenizer, framed)
    pieces = estimators.cut(chosen, length, framed=framed)
    return Text(pieces, sum(measured["tokens"]), sum(measured["bytes"]))


def cost(model, text, block):
    """Nats of each document."""
    return estimators.bound(model, text.pieces, block, draws=2, seed=0, batch=16)[0]


def told(nats, before, text):
    """Bits/byte of all documents, and how much more that is than before."""
    per_byte = text.bytes * math.log(2)
    if nats is before:
        return f"{float(nats.sum()) / per_byte:.4f}", "-"
    more = nats - before
    error = float(more.std()) * math.sqrt(len(more)) / per_byte
    more = f"{float(more.sum()) / per_byte:+.4f} +- {error:.4f}"
    return f"{float(nats.sum()) / per_byte:.4f}", more


def main():
    parser = arguments(__doc__)
    parser.add_argument("base")
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    machine.start(args.threads)
    device = machine.pick_device("cpu")

    loaded = {}
    for path in (args.base, *args.runs):
        loaded[path] = checkpoint.load_model(path, device, config.check_saved)
    _, tokenizer, base = loaded[args.base]
    _, _, last = loaded[args.runs[-1]]
    length = config.scored_length(base)
    old = text_of(base, tokenizer, args.documents, length)
    new = text_of(last, tokenizer, args.documents, length)

    print(ROW.format("checkpoint", "old, NLL", "more", f"old, {BLOCK}", "more", "new, NLL"))
    before = {}
    for path, (model, _, _) in loaded.items():
        cells = []
        for block in (1, BLOCK):
            nats = cost(model, old, block)
            cells += told(nats, before.setdefault(block, nats), old)
        nats = float(cost(model, new, 1).sum()) / new.tokens
        print(ROW.format(path, *cells, f"{nats:.4f}"), flush=True)


if __name__ == "__main__":
    main()
