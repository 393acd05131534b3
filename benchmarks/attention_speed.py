"""What a training step of each attention variant takes, and what a token of its cache takes.

    python benchmarks/attention_speed.py
    python benchmarks/attention_speed.py --rounds 3 --blocks 1

The transformer at d 256, 4 layers, 4 heads, 8 rows of 256 tokens, one thread, bf16 products where
this machine is fast in them: forward, loss, backward and the update of the default optimizer, left
to right alone (1) and both streams (32). In a round every variant takes one step, one after the
other, so that a noisy neighbour hits all of them; the figure is the median of the processor's time,
and its range. Prints a table; the last line is one JSON document.
"""
import json
import statistics
import time
from functools import partial

import torch

from harness import arguments, in_turn  # first: it puts the repository on the path

import config
import masking
import model_config
from common import machine
from model import build_model
from training import optim

VOCAB = 4000
SHAPE = dict(d_model=256, n_layers=4, n_heads=4, d_ff=768, seq_len=256, batch_size=8, grad_accum=1)
VARIANTS = {
    "mha": dict(attn="mha"),
    "mha, null key": dict(attn="mha", null_attn=True),
    "gqa, 2 key heads": dict(attn="gqa", kv_heads=2),
    "gqa, 1 key head": dict(attn="gqa", kv_heads=1),
    "bottleneck": dict(attn="bottleneck"),
    "decoupled": dict(attn="decoupled"),
    "decoupled, null key, tied": dict(attn="decoupled", null_attn=True, tie_qk=True),
}


class Variant:
    """A model and its optimizer; step() takes one."""

    def __init__(self, changes):
        self.args = config.TrainArgs(model="backup", **SHAPE, **changes)
        self.cfg = model_config.model_config(self.args, VOCAB)
        torch.manual_seed(0)
        self.model = build_model(self.cfg)
        self.optimizer = optim.make_optimizer(self.model, self.args)
        self.count = 0

    def step(self, block, dtype):
        rows, length = self.args.batch_size, self.args.seq_len
        x0 = torch.randint(4, VOCAB, (rows, length))
        masks = masking.left_to_right(rows, length)
        if block > 1:
            masks = masking.corrupt(self.args, 1, self.count, rows, length, block)
            masks = masks._replace(clean_share=0.5)
        self.count += 1
        with machine.autocast(torch.device("cpu"), dtype):
            out = masking.denoising_loss(self.model, x0, masks, "masked_mean")
        out.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main():
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 32])
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if machine.cpu_bf16_units() else torch.float32
    variants = {name: Variant(changes) for name, changes in VARIANTS.items()}
    rows = []
    for block in args.blocks:
        runs = {name: partial(v.step, block, dtype) for name, v in variants.items()}
        taken = in_turn(runs, args.rounds, time.process_time)
        for name, variant in variants.items():
            rows.append(
                {
                    "variant": name,
                    "block": block,
                    "step_ms": 1e3 * statistics.median(taken[name]),
                    "step_ms_min": 1e3 * min(taken[name]),
                    "step_ms_max": 1e3 * max(taken[name]),
                    "params": model_config.count_params(variant.cfg),
                    "cache_bytes_bf16": model_config.cache_bytes_per_token(variant.cfg, "bf16"),
                    "gflop": model_config.train_flops(variant.cfg, 256, block, 0.5) * 2048 / 1e9,
                }
            )
            print(
                "{variant:28} {block:3} {step_ms:7.0f} ms ({step_ms_min:.0f}-{step_ms_max:.0f})  "
                "{params:,} parameters, {cache_bytes_bf16} cache bytes a token, "
                "{gflop:.1f} GFLOP".format(**rows[-1]),
                flush=True,
            )
    print(json.dumps({"dtype": str(dtype), "shape": SHAPE, "rows": rows}))


if __name__ == "__main__":
    main()
