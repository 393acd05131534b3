r"""Training beside public peers: tokens/s at equal parameters, batch, precision and machine.

    python benchmarks/train_peers.py --peers DIR
    python benchmarks/train_peers.py --peers DIR --shapes d512 \
        --only aria nanogpt hf_bert --rounds 9

The first command runs everything that lies in DIR (benchmarks/peers.py).

    aria        primary and backup with the whole row as one block (what the peers train); in blocks
                of 64 and left to right at once, the two streams; and left to right alone
    nanogpt, mdlm, torchdiff, telos
                public trainers, with AdamW all of them (peer_models.py says what each is)
    hf_bert     Hugging Face Trainer (accelerate) on BertForMaskedLM
    hf_llama    ... on LlamaForCausalLM: autoregressive

Each is brought to our backup's number of parameters by its feed-forward width and trains on random
ids; under bf16 autocast where this CPU has bf16 units, float32 otherwise. All live in one process;
in a round each takes one step, one after the other, so that a noisy neighbour hits all; figures are
medians over the rounds, and the first round is not counted. The Hugging Face Trainer runs its own
loop: its step is measured from the end of one step to the end of the next. What they have learned
after equal training: bound_peers.py. Prints a table; the last line is one JSON document.
"""
import dataclasses
import json
import statistics
import tempfile
import time
import warnings

import torch

from harness import arguments  # first: it puts the repository on the path

from benchmarks import peer_models, peers
from benchmarks.peer_models import DTYPE, Setting
from common import machine

VOCAB = 8000                                                     # the mask is one more row
SHAPES = {
    "tiny": Setting(
        dict(d_model=32, n_layers=2, n_heads=2, d_ff=96, memory_slots=4, seq_len=64), 4, VOCAB
    ),
    "d256": Setting(
        dict(d_model=256, n_layers=6, n_heads=4, d_ff=768, memory_slots=8, seq_len=256), 8, VOCAB
    ),
    "d512": Setting(
        dict(d_model=512, n_layers=10, n_heads=8, d_ff=1536, memory_slots=16, seq_len=512), 4, VOCAB
    ),
}


@dataclasses.dataclass
class Contestant:
    params: int
    step: object  # function -> seconds of one whole step


def timed(student, setting):
    count = iter(range(1 << 30))

    def step():
        started = time.perf_counter()
        student.step(torch.randint(4, VOCAB, (setting.rows, setting.length)), next(count))
        return time.perf_counter() - started
    return Contestant(student.params, step)


# --------------------------------------------------------------------------------------------------
# who

OURS = {
    "aria primary": dict(model="primary"),
    "aria backup": dict(model="backup"),
    "aria primary, blocks of 64": dict(model="primary", train_block_sizes="64"),
    "aria backup, blocks of 64": dict(model="backup", train_block_sizes="64"),
    "aria ar": dict(model="backup", objective="ar"),
    "aria primary ar": dict(model="primary", objective="ar"),
}


def hf(folder, shape, masked):
    peers.packages(folder, "hf")
    import transformers
    setting = SHAPES[shape]
    s, rows = setting.shape, setting.rows
    transformers.logging.set_verbosity_error()

    def make(ff):
        common = dict(
            vocab_size=VOCAB + 1,
            hidden_size=s["d_model"],
            num_hidden_layers=s["n_layers"],
            intermediate_size=ff,
            num_attention_heads=s["n_heads"],
            max_position_embeddings=s["seq_len"],
        )
        if masked:
            return transformers.BertForMaskedLM(
                transformers.BertConfig(
                    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **common
                )
            )
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(tie_word_embeddings=True, **common)
        )

    def collate(batch):
        x = torch.stack(batch)  # (B, T)
        mask = (
            torch.rand(x.shape) < torch.rand(len(x), 1)
            if masked
            else torch.ones(x.shape, dtype=torch.bool)
        )
        return dict(
            input_ids=x.masked_fill(mask, VOCAB) if masked else x,
            labels=x.masked_fill(~mask, -100),
        )

    class Clock(transformers.TrainerCallback):
        ends = ()

        def on_step_end(self, *_, **__):
            self.ends = (*self.ends, time.perf_counter())
    net, clock = peer_models.fitted(make, setting), Clock()
    args = transformers.TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=2,
        per_device_train_batch_size=rows,
        use_cpu=True,
        bf16=DTYPE == torch.bfloat16,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    data = list(torch.randint(4, VOCAB, (4 * rows, s["seq_len"])))
    trainer = transformers.Trainer(
        net, args, data_collator=collate, train_dataset=data, callbacks=[clock]
    )
    trainer.remove_callback(transformers.PrinterCallback)

    def step():
        clock.ends = ()
        trainer.train()  # two steps: the second is measured
        return clock.ends[1] - clock.ends[0]
    return {f"HF Trainer, {'BERT' if masked else 'Llama'}": Contestant(peer_models.size(net), step)}


PEERS = {"nanogpt": ("nanoGPT", peer_models.nanogpt), "mdlm": ("MDLM DiT", peer_models.mdlm),
         "telos": ("telos-ml", peer_models.telos),
         "torchdiff": ("slm388-torchdiff", lambda *a: peer_models.torchdiff(*a, optimizer="adamw"))}


def peer(folder, shape, name):
    title, make = PEERS[name]
    return {title: timed(make(folder, SHAPES[shape], 3e-4), SHAPES[shape])}


SOURCES = {**{name: lambda *a, name=name: peer(*a, name) for name in PEERS},
           "hf_bert": lambda *a: hf(*a, masked=True), "hf_llama": lambda *a: hf(*a, masked=False)}


# --------------------------------------------------------------------------------------------------
# measuring

def compare(shape, args):
    setting = SHAPES[shape]
    sources = {
        "aria": lambda: {
            name: timed(peer_models.ours(setting, 3e-4, **how), setting)
            for name, how in OURS.items()
        },
        **{
            name: lambda source=source: source(args.peers, shape)
            for name, source in SOURCES.items()
        },
    }
    torch.manual_seed(0)
    field = peers.collect([(name, source) for name, source in sources.items() if name in args.only])
    taken = {name: [] for name in field}
    for turn in range(-1, args.rounds):
        for name, contestant in field.items():
            seconds = contestant.step()
            if turn >= 0:
                taken[name].append(seconds)
    tokens, rows = setting.rows * setting.length, []
    for name, seconds in taken.items():
        rows.append(
            {
                "shape": shape,
                "name": name,
                "params": field[name].params,
                "tok_per_s": tokens / statistics.median(seconds),
                "min": tokens / max(seconds),
                "max": tokens / min(seconds),
            }
        )
    speed = {row["name"]: row["tok_per_s"] for row in rows}
    for row in rows:
        ahead = {
            kind: speed[f"aria {kind}"] / row["tok_per_s"]
            for kind in ("primary", "backup")
            if f"aria {kind}" in speed
        }
        row |= {f"{kind}_ahead": value for kind, value in ahead.items()}
        print(
            "{shape} {name:27} {params:>11,} parameters {tok_per_s:8.0f} tok/s "
            "({min:.0f}-{max:.0f})".format(
                **row
            )
            + "".join(f"   {kind} is {value:.2f}x" for kind, value in ahead.items()),
            flush=True,
        )
    return rows


def main():
    p = arguments(__doc__)
    p.add_argument("--peers", default="peers", help="folder of the peers, see benchmarks/peers.py")
    p.add_argument("--only", nargs="+", default=["aria", *SOURCES], choices=["aria", *SOURCES])
    p.add_argument("--shapes", nargs="+", default=["d256", "d512"], choices=list(SHAPES))
    p.add_argument("--rounds", type=int, default=4)
    args = p.parse_args()
    told = machine.start(0)
    warnings.simplefilter("ignore")  # the peers' deprecated calls
    print(
        f"training in {DTYPE or torch.float32}, {torch.get_num_threads()} threads; memory: {told}",
        flush=True,
    )
    rows = [row for shape in args.shapes for row in compare(shape, args)]
    print(
        json.dumps(
            {
                "rows": rows,
                "rounds": args.rounds,
                "dtype": str(DTYPE),
                **machine.environment(torch.device("cpu")),
            }
        )
    )


if __name__ == "__main__":
    main()
