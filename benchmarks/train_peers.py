"""Training beside public peers: tokens/s at equal parameters, sequence length, precision, batch and machine, taken in turn.

    python benchmarks/train_peers.py --peers DIR                               # everything that is in DIR (benchmarks/peers.py)
    python benchmarks/train_peers.py --peers DIR --shapes d512 --only aria nanogpt hf_bert --rounds 9

    aria        primary and backup with the whole row as one block (what the peers train) and in blocks of 64; and --objective ar
    nanogpt     nanoGPT's GPT and its configure_optimizers: autoregressive
    mdlm        MDLM's DiT, masked diffusion
    torchdiff   slm388-torchdiff: its model, build_optimizer (AdamW) and train_step, one diffusion block, whole rows
    telos       telos-ml: its transformer, masking, loss and optimizer out of its trainer
    hf_bert     Hugging Face Trainer (accelerate) on BertForMaskedLM      hf_llama    ... on LlamaForCausalLM: autoregressive
Each has the width, depth and heads of the shape and is brought to our backup's number of parameters by its feed-forward width.
A step is: a batch of random ids, masks, forward, loss, backward, clipping to 1, AdamW; under bf16 autocast where this CPU has
bf16 units, float32 otherwise; no dropout, nothing compiled. All live in one process; in a round each takes one step, one after
the other, so that a noisy neighbour hits all; figures are medians over the rounds, and the first round is not counted.

What was changed at run time, in memory only: the feed-forward width of nanoGPT, MDLM and telos after construction (they derive it
from the width). MDLM: head tied to the embedding like everybody's here (untied, nothing is left for its feed-forward at d256),
flash-attn's calls go to torch's attention and our rotation, and the loss (SUBS, 1/t) is written here. telos: it has no autocast
on a CPU, it gets ours. torchdiff and telos call their own loss and optimizer; the Trainer runs its own loop, and its step is
measured from the end of one step to the end of the next.
Prints a table; the last line is one JSON document.
"""
import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch                                                     # noqa: E402
import torch.nn.functional as F                                  # noqa: E402
from torch import nn                                             # noqa: E402

import config                                                    # noqa: E402
import shapes
import masking                                                   # noqa: E402
import optim                                                     # noqa: E402
import runtime                                                   # noqa: E402
from benchmarks import peers                                     # noqa: E402
from layers import rotate                                        # noqa: E402
from model import build_model                                    # noqa: E402

VOCAB = 8000                                                     # the mask is one more row
DTYPE = runtime.pick_precision("auto", "bf16", torch.device("cpu"))[0]
SHAPES = {  # name: (arguments, sequences per step)
    "tiny": (dict(d_model=32, n_layers=2, n_heads=2, d_ff=96, memory_slots=4, seq_len=64), 4),
    "d256": (dict(d_model=256, n_layers=6, n_heads=4, d_ff=768, memory_slots=8, seq_len=256), 8),
    "d512": (dict(d_model=512, n_layers=10, n_heads=8, d_ff=1536, memory_slots=16, seq_len=512), 4),
}


def target(shape):
    """The number of parameters that everybody is brought to: our backup's."""
    return shapes.count_params(shapes.model_config(config.TrainArgs(model="backup", **SHAPES[shape][0]), VOCAB))


def size(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def fit_width(make, wanted):
    """The feed-forward width, a multiple of 8, with which make(width) has closest to the wanted number of parameters."""
    low, high = size(make(8)), size(make(16))
    return max(8, 8 * round((8 + 8 * (wanted - low) / (high - low)) / 8))


def fitted(make, shape):
    with contextlib.redirect_stdout(io.StringIO()):                                # some tell their size at every birth
        return make(fit_width(make, target(shape)))


@dataclasses.dataclass
class Contestant:
    parameters: list
    step: object                                                                   # function -> seconds of one whole step


def stepper(shape, model, optimizer, loss, extra=0):
    """The step that nearly everybody takes; loss(ids (B, T + extra)) -> scalar."""
    args, rows = SHAPES[shape]

    def step():
        started = time.perf_counter()
        x = torch.randint(4, VOCAB, (rows, args["seq_len"] + extra))
        with runtime.autocast(torch.device("cpu"), DTYPE):
            out = loss(x)
        out.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started
    return Contestant(list(model.parameters()), step)


# ---------------------------------------------------------------------------------------------------- ours

OURS = {"aria primary": ("primary", None, False), "aria backup": ("backup", None, False),
        "aria primary, blocks of 64": ("primary", 64, False), "aria backup, blocks of 64": ("backup", 64, False),
        "aria ar": ("backup", None, True)}


def ours(name, shape):
    kind, block, causal = OURS[name]
    settings, rows = SHAPES[shape]
    args = config.TrainArgs(model=kind, batch_size=rows, grad_accum=1, objective="ar" if causal else "masked", **settings)
    cfg, length = dataclasses.replace(shapes.model_config(args, VOCAB), causal=causal), args.seq_len
    if kind == "primary":
        cfg = dataclasses.replace(cfg, d_ff=shapes.match_d_ff(cfg, target(shape)))
    model = build_model(cfg)
    optimizer, count = optim.make_optimizer(model, args), iter(range(1 << 30))

    def step():
        started = time.perf_counter()
        x0 = torch.randint(4, VOCAB, (rows, length))
        draw = masking.whole_rows(rows, length) if causal else masking.draw(args, 1, next(count), rows, length, block or length)
        with runtime.autocast(torch.device("cpu"), DTYPE):
            out = masking.denoising_loss(model, x0, draw, "elbo", masking.normaliser("elbo", draw))
        out.loss.backward()
        optim.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started
    return Contestant(list(model.parameters()), step)


# ---------------------------------------------------------------------------------------------------- theirs

def nanogpt(folder, shape):
    peer, (s, _) = peers.load(peers.find(folder, "nanoGPT/model.py"), "nanogpt_model"), SHAPES[shape]

    def make(ff):
        net = peer.GPT(peer.GPTConfig(block_size=s["seq_len"], vocab_size=VOCAB + 1, n_layer=s["n_layers"], n_head=s["n_heads"],
                                      n_embd=s["d_model"], dropout=0.0, bias=False))
        for block in net.transformer.h:
            block.mlp.c_fc = nn.Linear(s["d_model"], ff, bias=False)
            block.mlp.c_proj = nn.Linear(ff, s["d_model"], bias=False)
            block.mlp.apply(net._init_weights)
        return net
    net = fitted(make, shape)
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = net.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    return {"nanoGPT": stepper(shape, net, optimizer, lambda x: net(x[:, :-1].contiguous(), x[:, 1:].contiguous())[1], extra=1)}


def rotate_qkv(qkv, cos, sin):
    """In the place of flash-attn's rotation: qkv (B, T, 3, H, E), cos, sin (T, E/2); q and k are turned."""
    q, k, v = qkv.unbind(2)                                                        # (B, T, H, E) each
    q, k = (rotate(z.transpose(1, 2), (cos, sin)).transpose(1, 2) for z in (q, k))
    return torch.stack((q, k, v), dim=2)


def attend_qkv(qkv, starts, longest, dropout, causal):
    """In the place of flash-attn's packed attention: qkv (B T, 3, H, E), rows of equal length -> (B T, H, E)."""
    q, k, v = qkv.unflatten(0, (len(starts) - 1, -1)).permute(2, 0, 3, 1, 4)       # (B, H, T, E) each
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def mdlm(folder, shape):
    path, (s, _) = peers.find(folder, "mdlm/models/dit.py"), SHAPES[shape]
    peers.packages(folder, "pip")                                                  # einops
    flash = dict(layers=SimpleNamespace(rotary=SimpleNamespace(apply_rotary_emb_qkv_=rotate_qkv)),
                 flash_attn_interface=SimpleNamespace(flash_attn_varlen_qkvpacked_func=attend_qkv))
    with peers.stand_ins({"flash_attn": flash, "flash_attn.layers": {}, "flash_attn.layers.rotary": {}, "omegaconf": {},
                          "huggingface_hub": dict(PyTorchModelHubMixin=object)}):
        peer = peers.load(path, "mdlm_dit")
    shape_of = SimpleNamespace(hidden_size=s["d_model"], cond_dim=128, n_heads=s["n_heads"], n_blocks=s["n_layers"], dropout=0.0,
                               scale_by_sigma=True)

    def make(ff):
        net = peer.DIT(SimpleNamespace(model=shape_of), VOCAB + 1)
        for block in net.blocks:
            block.mlp = nn.Sequential(nn.Linear(s["d_model"], ff), nn.GELU(approximate="tanh"), nn.Linear(ff, s["d_model"]))
        net.output_layer.linear.weight = net.vocab_embed.embedding
        return net
    net = fitted(make, shape)

    def loss(x):
        """The bound with linear time, stratified over rows; no time conditioning: sigma is 0, as its own default has it."""
        t = ((torch.rand(1) + torch.arange(len(x)) / len(x)) % 1).clamp(min=1e-3)[:, None]         # (B, 1)
        hidden = torch.rand(x.shape) < t
        logits = net(torch.where(hidden, VOCAB, x), torch.zeros(len(x)))           # (B, T, V)
        logits[..., VOCAB] = -1e6
        nll = -logits.log_softmax(-1).gather(-1, x[..., None])[..., 0]             # (B, T)
        return (nll * hidden / t).sum() / x.numel()
    return {"MDLM DiT": stepper(shape, net, torch.optim.AdamW(net.parameters(), lr=3e-4, weight_decay=0.0), loss)}


def torchdiff(folder, shape):
    root, (s, rows) = peers.find(folder, "pip/torchdiff"), SHAPES[shape]
    peers.packages(folder, "hf"), peers.packages(folder, "pip")
    peers.bare("torchdiff", root)
    from torchdiff import model as peer
    from torchdiff import train

    def settings(ff):
        return peer.MDLModelConfig(d=s["d_model"], vocab_size=VOCAB + 1, num_heads=s["n_heads"], mask_token_id=VOCAB,
                                   head_dim=s["d_model"] // s["n_heads"], mlp_hidden_dim=ff, diff_blocks_num=1, canvas_size=0,
                                   layers_per_block=s["n_layers"], max_position_embeddings=s["seq_len"])
    net = fitted(lambda ff: peer.MDLMModel(settings(ff)), shape)
    with contextlib.redirect_stdout(io.StringIO()):
        _, optimizer, scheduler = train.build_optimizer(net, {"optimizer": "adamw"})
    count = iter(range(1, 1 << 30))

    def step():
        started, n = time.perf_counter(), next(count)
        x = torch.randint(4, VOCAB, (rows, s["seq_len"]))
        train.train_step(net, None, optimizer, x, key=n, step=n, cfg=net.cfg, total_steps=85_000, device=x.device)
        scheduler.step()
        return time.perf_counter() - started
    return {"slm388-torchdiff": Contestant([p for p in net.parameters() if p.requires_grad], step)}


def telos(folder, shape):
    root, (s, _) = peers.find(folder, "pip/telos"), SHAPES[shape]
    peers.packages(folder, "pip")
    peers.bare("telos", root)
    from telos.models.components import SwiGLU
    from telos.models.config import TelosConfig
    from telos.models.transformer import TelosTransformer
    from telos.training.trainer_pytorch import UnifiedPyTorchTrainer

    def make(ff):
        net = TelosTransformer(TelosConfig(vocab_size=VOCAB + 1, d_model=s["d_model"], n_layers=s["n_layers"],
                                           n_heads=s["n_heads"], max_seq_len=s["seq_len"]))
        for layer in net.layers:
            layer.mlp = SwiGLU(s["d_model"], ff)
        return net
    net = fitted(make, shape)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = UnifiedPyTorchTrainer("mdlm", net, {"model": {"vocab_size": VOCAB + 1, "seq_len": s["seq_len"]}}, "cpu")
    return {"telos-ml": stepper(shape, net, trainer.optimizer, lambda x: trainer._execute_microbatch(x)[0])}


def hf(folder, shape, masked):
    peers.packages(folder, "hf")
    import transformers
    s, rows = SHAPES[shape]
    transformers.logging.set_verbosity_error()

    def make(ff):
        common = dict(vocab_size=VOCAB + 1, hidden_size=s["d_model"], num_hidden_layers=s["n_layers"], intermediate_size=ff,
                      num_attention_heads=s["n_heads"], max_position_embeddings=s["seq_len"])
        if masked:
            return transformers.BertForMaskedLM(transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                                                                        **common))
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **common))

    def collate(batch):
        x = torch.stack(batch)                                                     # (B, T)
        hidden = torch.rand(x.shape) < torch.rand(len(x), 1) if masked else torch.ones(x.shape, dtype=torch.bool)
        return dict(input_ids=x.masked_fill(hidden, VOCAB) if masked else x, labels=x.masked_fill(~hidden, -100))

    class Clock(transformers.TrainerCallback):
        ends = ()

        def on_step_end(self, *_, **__):
            self.ends = (*self.ends, time.perf_counter())
    net, clock = fitted(make, shape), Clock()
    args = transformers.TrainingArguments(
        tempfile.mkdtemp(), max_steps=2, per_device_train_batch_size=rows, use_cpu=True, bf16=DTYPE == torch.bfloat16,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False)
    data = list(torch.randint(4, VOCAB, (4 * rows, s["seq_len"])))
    trainer = transformers.Trainer(net, args, data_collator=collate, train_dataset=data, callbacks=[clock])
    trainer.remove_callback(transformers.PrinterCallback)

    def step():
        clock.ends = ()
        trainer.train()                                                            # two steps: the second is measured
        return clock.ends[1] - clock.ends[0]
    return {f"HF Trainer, {'BERT' if masked else 'Llama'}": Contestant(list(net.parameters()), step)}


SOURCES = {"nanogpt": nanogpt, "mdlm": mdlm, "torchdiff": torchdiff, "telos": telos,
           "hf_bert": lambda *a: hf(*a, masked=True), "hf_llama": lambda *a: hf(*a, masked=False)}


# ---------------------------------------------------------------------------------------------------- measuring

def compare(shape, args):
    sources = {"aria": lambda: {name: ours(name, shape) for name in OURS},
               **{name: lambda source=source: source(args.peers, shape) for name, source in SOURCES.items()}}
    torch.manual_seed(0)
    field = peers.collect([(name, source) for name, source in sources.items() if name in args.only])
    taken = {name: [] for name in field}
    for turn in range(-1, args.rounds):
        for name, contestant in field.items():
            seconds = contestant.step()
            if turn >= 0:
                taken[name].append(seconds)
    settings, batch = SHAPES[shape]
    tokens, rows = batch * settings["seq_len"], []
    for name, seconds in taken.items():
        params = sum(p.numel() for p in {id(p): p for p in field[name].parameters}.values())
        rows.append({"shape": shape, "name": name, "params": params, "tok_per_s": tokens / statistics.median(seconds),
                     "min": tokens / max(seconds), "max": tokens / min(seconds)})
    speed = {row["name"]: row["tok_per_s"] for row in rows}
    for row in rows:
        ahead = {kind: speed[f"aria {kind}"] / row["tok_per_s"] for kind in ("primary", "backup") if f"aria {kind}" in speed}
        row |= {f"{kind}_ahead": value for kind, value in ahead.items()}
        print("{shape} {name:27} {params:>11,} parameters {tok_per_s:8.0f} tok/s ({min:.0f}-{max:.0f})".format(**row)
              + "".join(f"   {kind} is {value:.2f}x" for kind, value in ahead.items()), flush=True)
    return rows


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--peers", default="peers", help="folder of the peers, see benchmarks/peers.py")
    p.add_argument("--only", nargs="+", default=["aria", *SOURCES], choices=["aria", *SOURCES])
    p.add_argument("--shapes", nargs="+", default=["d256", "d512"], choices=list(SHAPES))
    p.add_argument("--rounds", type=int, default=4)
    args = p.parse_args()
    told = runtime.start(0)
    warnings.simplefilter("ignore")                                                # the peers' deprecated calls
    print(f"training in {DTYPE or torch.float32}, {torch.get_num_threads()} threads; memory: {told}", flush=True)
    rows = [row for shape in args.shapes for row in compare(shape, args)]
    print(json.dumps({"rows": rows, "rounds": args.rounds, "dtype": str(DTYPE), **runtime.environment(torch.device("cpu"))}))


if __name__ == "__main__":
    main()
