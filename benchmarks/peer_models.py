"""Networks of this project and of public peers at equal parameters, each trained its own way.

Used by train_peers.py (how fast they train) and bound_peers.py (what they have learned); needs the
folder of peers.py.

    setting = Setting(dict(d_model=128, n_layers=4, n_heads=4, d_ff=512, memory_slots=8,
                           seq_len=256), rows=8, vocab=4000, steps=500)
    student = mdlm("peers", setting, rate=3e-4)
    student.step(x, 0)         # one whole optimizer step, number 0, on ids x (B, T)
    student.logits(xt)         # (B, T, V or V + 1): its answer for every position; a masked one has
                               # the id V; a causal student is given the text itself

Each has the width, depth and heads of the shape and is brought to our backup's number of parameters
by its feed-forward width. A step: masks, forward, loss, backward, clipping to 1, update; under bf16
autocast where this CPU has bf16 units, float32 otherwise; no dropout, nothing compiled. Warm-up is
ours for all: 5 % of the steps, at most 300.

    ours       AdamW or Muon, cosine to a tenth; masked over whole rows; or both streams in a
               mixture of blocks, left to right alone at first; or left to right alone
    nanogpt    GPT, configure_optimizers, its loss; cosine to a tenth, as its train.py. Reads a
               start symbol (the mask's id) and all but the last token, so that it answers for as
               many tokens as everybody
    mdlm       DiT and Diffusion._loss (SUBS, log-linear noise, antithetic t, no time conditioning),
               AdamW without decay, averaged weights (0.9999, as it validates with). Its schedule is
               a constant rate; "cosine" is ours
    torchdiff  slm388-torchdiff: model, train_step (mean over the masked tokens: no bound),
               build_optimizer: Muon for matrices and AdamW at half the rate for the rest, or
               "adamw" for all; warm-up, stable, last tenth down to 0.12 of the rate
    telos      telos-ml: transformer, masking (t from a Beta), loss (1/t times a row's mean: no
               bound), AdamW, cosine to a tenth. Its mask is id 1, and it never masks ids below 4:
               our ids are moved up by 4, so that it learns all of them

Changed at run time, in memory only: the feed-forward width of nanoGPT, MDLM and telos after
construction (they derive it from the width), with their own initialisation. MDLM: head tied to the
embedding like everybody's here (untied, nothing is left for its feed-forward), logits to float32
before its loss, and flash-attn's calls go to torch's attention and our rotation. telos has no
autocast on a CPU: it gets ours.
"""
import contextlib
import dataclasses
import io
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import config
import masking
import model_config
from benchmarks import peers
from common import machine
from layers import rotate, shifted
from model import build_model
from training import optim
from training.step import mask_sample

CPU = torch.device("cpu")
DTYPE = machine.pick_precision("auto", "bf16", CPU)[0]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all have in common."""
    shape: dict
    rows: int                     # sequences of a step
    vocab: int                    # pieces; the mask is one more row
    steps: int = 10_000           # of the whole schedule
    seed: int = 1337

    @property
    def length(self):
        return self.shape["seq_len"]

    @property
    def warmup(self):
        return min(300, self.steps // 20)


@dataclasses.dataclass
class Student:
    net: nn.Module
    step: object                                   # (ids (B, T), number of the step)
    # ids (B, T) -> (B, T, V or V + 1); causal: of each token, from those before it
    logits: object
    causal: bool = False
    # inside, the net has the weights that its recipe is judged with
    averaged: object = contextlib.nullcontext

    @property
    def params(self):
        return size(self.net)


def target(setting):
    """The number of parameters that everybody is brought to: our backup's."""
    return model_config.count_params(
        model_config.model_config(config.TrainArgs(model="backup", **setting.shape), setting.vocab)
    )


def size(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def fit_width(make, wanted):
    """The feed-forward width, a multiple of 8, with which make(width) has closest to the wanted
    number of parameters.
    """
    low, high = size(make(8)), size(make(16))
    return max(8, 8 * round((8 + 8 * (wanted - low) / (high - low)) / 8))


def fitted(make, setting):
    with contextlib.redirect_stdout(io.StringIO()):  # some tell their size at every birth
        return make(fit_width(make, target(setting)))


def stepper(net, optimizer, loss, before=lambda n: None, after=lambda: None):
    """The step that nearly everybody takes; loss(ids (B, T)) -> scalar."""
    def step(x, n):
        before(n)
        with machine.autocast(CPU, DTYPE):
            out = loss(x)
        out.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after()
    return step


def rates(optimizer, setting, rate, schedule):
    """before of stepper: our schedule."""
    def set_rate(n):
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(n, setting.steps, rate, setting.warmup, schedule, 0.1)
    return set_rate


# --------------------------------------------------------------------------------------------------
# ours

# both streams, left to right alone at first: the product's own way
MIXTURE = {name: getattr(config.TrainArgs, name) for name in ("train_block_sizes", "ar_fade")}


def ours(setting, rate, model, **more):
    """model: primary or backup; more: settings of train. Without any: whole rows alone."""
    whole_rows = dict(train_block_sizes="T", ar_fade=0.0, optimizer="adamw")
    args = config.TrainArgs(
        model=model,
        batch_size=setting.rows,
        grad_accum=1,
        lr=rate,
        max_steps=setting.steps,
        seed=setting.seed,
        **setting.shape | whole_rows | more,
    )
    cfg = model_config.model_config(args, setting.vocab)
    if model == "primary":
        cfg = dataclasses.replace(cfg, d_ff=model_config.match_d_ff(cfg, target(setting)))
    net = build_model(cfg)
    moving = optim.make_optimizer(net, args)
    run = SimpleNamespace(
        args=args, rows=setting.rows, length=args.seq_len, mine=slice(None)
    )

    def step(x, n):
        moving.set_lr(
            optim.lr_at(
                n, args.max_steps, args.lr, args.warmup, args.lr_schedule, args.min_lr_ratio
            )
        )
        block, first = masking.pick_blocks(
            args.block_choices, args.seq_len, args.seed, n, args.single_chance(n)
        )
        masks = mask_sample(run, n, block, first)
        with machine.autocast(CPU, DTYPE):
            out = masking.denoising_loss(net, x, masks, args.loss)
        out.loss.backward()
        optim.clip_grad_norm(net, args.grad_clip)
        moving.step()
        moving.zero_grad()

    def logits(ids):
        if args.causal:
            return net.logits(net.clean_states(ids))
        return net.logits(net.block_states(ids, ids, setting.length))
    return Student(net, step, logits, args.causal)


# --------------------------------------------------------------------------------------------------
# theirs

def nanogpt(folder, setting, rate):
    peer, s = peers.load(peers.find(folder, "nanoGPT/model.py"), "nanogpt_model"), setting
    d, depth = s.shape["d_model"], s.shape["n_layers"]

    def make(ff):
        net = peer.GPT(
            peer.GPTConfig(
                block_size=s.length,
                vocab_size=s.vocab + 1,
                n_layer=depth,
                n_head=s.shape["n_heads"],
                n_embd=d,
                dropout=0.0,
                bias=False,
            )
        )
        for block in net.transformer.h:
            block.mlp.c_fc, block.mlp.c_proj = (
                nn.Linear(d, ff, bias=False),
                nn.Linear(ff, d, bias=False),
            )
            block.mlp.apply(net._init_weights)
            nn.init.normal_(block.mlp.c_proj.weight, std=0.02 / math.sqrt(2 * depth))
        return net
    net = fitted(make, s)
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = net.configure_optimizers(0.1, rate, (0.9, 0.95), "cpu")

    def answers(ids):  # -> logits, loss; without targets: the last position's only
        return net(shifted(ids, s.vocab), ids)
    return Student(
        net,
        stepper(net, optimizer, lambda ids: answers(ids)[1], rates(optimizer, s, rate, "cosine")),
        lambda ids: answers(ids)[0],
        causal=True,
    )


def rotate_qkv(qkv, cos, sin):
    """In the place of flash-attn's rotation: qkv (B, T, 3, H, E), cos, sin (T, E/2); q and k are
    turned.
    """
    q, k, v = qkv.unbind(2)  # (B, T, H, E) each
    q, k = (rotate(z.transpose(1, 2), (cos, sin)).transpose(1, 2) for z in (q, k))
    return torch.stack((q, k, v), dim=2)


def attend_qkv(qkv, starts, longest, dropout, causal):
    """In the place of flash-attn's packed attention: qkv (B T, 3, H, E), rows of equal length -> (B
    T, H, E).
    """
    q, k, v = qkv.unflatten(0, (len(starts) - 1, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, E) each
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def mdlm_objective(folder, setting, net):
    """MDLM's own Diffusion around the net, without its trainer, tokenizer and metrics."""
    path = peers.find(folder, "mdlm/diffusion.py")
    noise = peers.load(peers.find(folder, "mdlm/noise_schedule.py"), "mdlm_noise").LogLinearNoise()
    with peers.stand_ins(
        {
            "hydra": {},
            "hydra.utils": {},
            "lightning": dict(LightningModule=object),
            "dataloader": {},
            "torchmetrics": dict(aggregation=SimpleNamespace(MeanMetric=object)),
            "models": {},
            "transformers": dict(PreTrainedTokenizer=object),
            "noise_schedule": {},
            "utils": dict(print_nans=lambda *_: None),
        }
    ):
        peer = peers.load(path, "mdlm_diffusion").Diffusion
    own = peer.__new__(peer)
    vars(own).update(
        config=SimpleNamespace(model=SimpleNamespace(length=setting.length)),
        parameterization="subs",
        T=0,
        mask_index=setting.vocab,
        antithetic_sampling=True,
        importance_sampling=False,
        change_of_variables=False,
        sampling_eps=1e-3,
        time_conditioning=False,
        neg_infinity=-1e6,
        noise=noise,
        backbone=lambda x, sigma: net(x, sigma).float(),
    )
    return own


def mdlm(folder, setting, rate, schedule="constant"):
    path, s = peers.find(folder, "mdlm/models/dit.py"), setting
    peers.packages(folder, "pip")                                                  # einops
    flash = dict(layers=SimpleNamespace(rotary=SimpleNamespace(apply_rotary_emb_qkv_=rotate_qkv)),
                 flash_attn_interface=SimpleNamespace(flash_attn_varlen_qkvpacked_func=attend_qkv))
    with peers.stand_ins(
        {
            "flash_attn": flash,
            "flash_attn.layers": {},
            "flash_attn.layers.rotary": {},
            "omegaconf": {},
            "huggingface_hub": dict(PyTorchModelHubMixin=object),
        }
    ):
        peer = peers.load(path, "mdlm_dit")
    d = s.shape["d_model"]
    shape_of = SimpleNamespace(
        hidden_size=d,
        cond_dim=128,
        n_heads=s.shape["n_heads"],
        n_blocks=s.shape["n_layers"],
        dropout=0.0,
        scale_by_sigma=True,
    )

    def make(ff):
        net = peer.DIT(SimpleNamespace(model=shape_of), s.vocab + 1)
        for block in net.blocks:
            block.mlp = nn.Sequential(
                nn.Linear(d, ff), nn.GELU(approximate="tanh"), nn.Linear(ff, d)
            )
        net.output_layer.linear.weight = net.vocab_embed.embedding
        return net
    net = fitted(make, s)
    own, ema = mdlm_objective(folder, s, net), optim.EMA(net, 0.9999)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    return Student(net, stepper(net, optimizer, lambda x: own._loss(x, torch.ones_like(x)).loss,
                                rates(optimizer, s, rate, schedule), ema.update),
                   lambda ids: net(ids, torch.zeros(len(ids))), averaged=ema.swap)


def torchdiff(folder, setting, rate, optimizer="auto"):
    root, s = peers.find(folder, "pip/torchdiff"), setting
    peers.packages(folder, "hf"), peers.packages(folder, "pip")
    peers.bare("torchdiff", root)
    from torchdiff import model as peer, train
    d, mask = s.shape["d_model"], s.vocab

    def make(ff):
        return peer.MDLMModel(
            peer.MDLModelConfig(
                d=d,
                vocab_size=s.vocab + 1,
                num_heads=s.shape["n_heads"],
                mask_token_id=mask,
                head_dim=d // s.shape["n_heads"],
                mlp_hidden_dim=ff,
                diff_blocks_num=1,
                canvas_size=0,
                layers_per_block=s.shape["n_layers"],
                max_position_embeddings=s.length,
            )
        )

    net = fitted(make, s)
    with contextlib.redirect_stdout(io.StringIO()):
        muon, adamw, scheduler = train.build_optimizer(
            net,
            dict(
                optimizer=optimizer,
                inner_lr=rate,
                min_lr=0.12 * rate,
                total_steps=s.steps,
                warmup_steps=s.warmup,
            ),
        )

    def step(x, n):
        key = s.seed * 1_000_003 + n
        train.train_step(
            net, muon, adamw, x, key=key, step=n + 1, cfg=net.cfg, total_steps=s.steps, device=CPU
        )
        scheduler.step()

    def logits(ids):
        # (B,) its t, which it sees from 0.01 on
        share = (ids == mask).float().mean(1).clamp(min=0.01)
        return F.linear(net(ids, share)[0], net.get_vocab_projection_weight())
    return Student(net, step, logits)


def telos(folder, setting, rate):
    root, s = peers.find(folder, "pip/telos"), setting
    peers.packages(folder, "pip")
    peers.bare("telos", root)
    from telos.models.components import SwiGLU
    from telos.models.config import TelosConfig
    from telos.models.transformer import TelosTransformer
    from telos.training.trainer_pytorch import UnifiedPyTorchTrainer
    reserved, mask = 4, 1  # ids 0-3 are its own

    def make(ff):
        net = TelosTransformer(
            TelosConfig(
                vocab_size=s.vocab + reserved,
                d_model=s.shape["d_model"],
                n_layers=s.shape["n_layers"],
                n_heads=s.shape["n_heads"],
                max_seq_len=s.length,
            )
        )
        for layer in net.layers:
            layer.mlp = SwiGLU(s.shape["d_model"], ff)
            layer.mlp.apply(net._init_weights)
        return net
    net = fitted(make, s)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = UnifiedPyTorchTrainer(
            "mdlm",
            net,
            {
                "model": {"vocab_size": s.vocab + reserved, "seq_len": s.length},
                "seed": s.seed,
                "training": {
                    "max_steps": s.steps,
                    "max_lr": rate,
                    "min_lr": 0.1 * rate,
                    "warmup_steps": s.warmup,
                },
            },
            "cpu",
        )

    def logits(ids):
        # (B, T, V)
        return net(torch.where(ids == s.vocab, mask, ids + reserved), mask_override=False)[
            ..., reserved:
        ]

    return Student(
        net,
        stepper(
            net,
            trainer.optimizer,
            lambda x: trainer._execute_microbatch(x + reserved)[0],
            after=trainer.scheduler.step,
        ),
        logits,
    )
