r"""Decoding beside public peers: equal size, one machine, one run, taken in turn.

    python benchmarks/decode_peers.py --peers DIR
    python benchmarks/decode_peers.py --peers DIR --prompts 1024 --only aria dllm --rounds 5
    python benchmarks/decode_peers.py --peers DIR --agreement --ckpt checkpoints/diffusion_hi \
        --prompts 64 128
    python benchmarks/decode_peers.py --peers DIR --only llama.cpp --prompts 64 > llama.txt
    python -m edge_benchmark --ckpt RUN --grid steps=8,16,32 --peer llama.txt

The first command runs everything that lies in DIR (benchmarks/peers.py); the last two draw a peer's
speed beside a checkpoint's settings. Not part of CI; peers live outside the project.

    aria         both models, block_frozen: the exact cache
    llama.cpp    autoregressive with KV cache, Q8_0 and F16, by its own llama-bench
    hf           Hugging Face transformers' Llama, greedy generate with KV cache
    llada        LLaDA's generate on our backup's weights: recomputes the whole canvas each forward
    fast_dllm    Fast-dLLM's generate on our backup's weights: no cache, prefix cache, dual cache
    dllm         dllm's BD3LMSampler (block diffusion; re-encodes the prefix for each block) and its
                 Fast-dLLM sampler, likewise

All are about 38M parameters: d 512, 10 layers, 8,000 pieces; blocks of 32. Peers that sample run
their own loop on the *same transformer weights*, through PeerModel below, which speaks their cache
protocols with our kernels (keys kept rotated, so nothing is rotated twice: no slower than their own
model class). Weights are random: this measures speed; what a number of tokens per forward costs in
quality is a trained model's matter: `python -m edge_benchmark --grid`. tokens/s is new tokens /
wall time with the prompt.

--agreement asks instead whether each cache is exact: the share of greedy tokens, in float32, that
equal those of the same sampler without its cache. Prints a table (median of the rounds, min-max)
and one JSON document as the last line.
"""
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from harness import arguments  # first: it puts the repository on the path

import config
import model_config
from attention import attend
from benchmarks import peers
from common import machine
from layers import rotary_table
from model import build_model
from sampling import fast
from sampling.decode import generate
from sampling.settings import Settings
from sampling.torch_model import TorchModel

VOCAB, WIDTH, LAYERS, HEADS, FF, BLOCK = 8000, 512, 10, 8, 1536, 32


def shape(kind):
    cfg = model_config.ModelConfig(
        model=kind, vocab_size=VOCAB, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, d_ff=FF
    )
    if kind == "backup":
        return cfg
    target = model_config.count_params(shape("backup"))
    return model_config.ModelConfig.from_dict(
        {**cfg.to_dict(), "d_ff": model_config.match_d_ff(cfg, target)}
    )


def network(kind, precision):
    torch.manual_seed(0)
    model = build_model(shape(kind)).eval()
    fast.prepare(model, precision)
    return model


# --------------------------------------------------------------------------------------------------
# samplers on our weights

class PeerModel:
    """Our transformer as the peers' samplers call a model: ids (B, S) -> .logits of all positions,
    .past_key_values if asked.

    past_key_values     per layer keys and values (B, H, C, E) of the places 0 .. C - 1; the ids
        follow them,
    replace_position    or (Fast-dLLM's dual cache) stand at these places (1, C), whose keys and
        values they replace there
    attention_mask      (B, 1, S, C + S) bool is obeyed (dllm); (B, C + S) is all ones here, and not
        looked at

    The row that reads a token answers for the next one. So the last entry of past_key_values is
    what the rows said, (B, 1, C, D), kept and replaced as keys are; and the start, which answers
    for the first token, is here.
    """
    device = torch.device("cpu")

    def __init__(self, net):
        self.net, self.mask_id = net, net.cfg.mask_id
        self.start = net.new_cache(1, 0)
        self.tokenizer = SimpleNamespace(
            mask_token_id=self.mask_id,
            pad_token_id=net.cfg.pad_id,
            bos_token_id=2,
            eos_token_id=None,
        )  # all that dllm asks of one

    def __call__(
        self,
        x,
        past_key_values=None,
        replace_position=None,
        attention_mask=None,
        use_cache=False,
        position_ids=None,
    ):
        net, past = self.net, past_key_values
        first = past[0][0].shape[2] if past is not None else 0
        at = torch.arange(first, first + x.shape[1])
        if replace_position is not None:
            at = replace_position[0].nonzero()[:, 0]
        ids, position, mask = x, at + 1, None
        if attention_mask is not None and attention_mask.dim() == 4:
            # all see the start
            mask = torch.nn.functional.pad(attention_mask, (1, 0), value=True)
        if past is None:  # a row in front of the first token, which nobody sees
            ids = torch.nn.functional.pad(x, (1, 0), value=self.mask_id)
            position = torch.nn.functional.pad(position, (1, 0))
            if mask is not None:
                mask = torch.cat((mask[:, :, :1], mask), dim=2)

        table = rotary_table(position, net.cfg.d_model // net.cfg.n_heads)
        h, kept = net.head.embed(ids), []                                          # (B, S, D)
        for i, layer in enumerate(net.layers):
            q, k, v = layer.attn.project(layer.attn_norm(h), table)  # (B, H, S, E) each
            if past is None:
                k, v = k[:, :, 1:], v[:, :, 1:]
            kept.append(self.keep((k, v), past and past[i], replace_position, at))
            keys, values = layer.attn.behind(self.start.context(i), *kept[-1])
            h = layer.add(h, layer.attn.join(attend(q, keys, values, layer.attn.scale, mask)))
        states = net.exits(h)

        if past is None:
            answers, states = states[:, :-1], states[:, 1:]
            kept.append((states.unsqueeze(1),))
        else:
            kept.append(self.keep((states.unsqueeze(1),), past[-1], replace_position, at))
            answers = kept[-1][0][:, 0, at - 1]
        return SimpleNamespace(
            logits=net.logits(answers), past_key_values=kept if use_cache else None
        )

    @staticmethod
    def keep(new, old, replace_position, at):
        """New tensors (B, H, S, E) in the place of old ones, as theirs, or behind them."""
        if old is None:
            return new
        if replace_position is not None:
            for there, here in zip(old, new, strict=True):
                there[:, :, at] = here
            return old
        return tuple(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))


class Forgetful(PeerModel):
    """The same without a cache, for dllm's block sampler: the past is the ids and their mask,
    computed again at every call.
    """

    def __call__(
        self, x, past_key_values=None, attention_mask=None, use_cache=False, position_ids=None
    ):
        if past_key_values is None:
            whole, mask = x, attention_mask
        else:
            ids, before = past_key_values
            whole = torch.cat((ids, x), dim=1)
            # the past does not see the block
            unseen = before.new_zeros(*before.shape[:3], x.shape[1])
            mask = torch.cat((torch.cat((before, unseen), dim=3), attention_mask), dim=2)
        logits = super().__call__(whole, attention_mask=mask).logits[:, -x.shape[1]:]
        return SimpleNamespace(logits=logits, past_key_values=(whole, mask) if use_cache else None)


class Recomputing:
    """Our model without a cache, for our own sampler: what it has read is kept as ids, and each
    forward reads all of them again.
    """

    def __init__(self, net):
        self.net, self.cfg = net, net.cfg
        self.parameters, self.logits, self.head = net.parameters, net.logits, net.head

    def new_cache(self, batch, length):
        return Ids(torch.empty(batch, 0, dtype=torch.long))

    def step(self, x0, cache):
        cache.ids = torch.cat((cache.ids, x0), dim=1)

    def states(self, xt, cache, depth=None):
        size = xt.shape[1]
        text = torch.cat((cache.ids, xt), dim=1)
        first = text.shape[1] % size or size
        return self.net.block_states(text, text, size, first)[:, -size:]


class Ids:
    """What Recomputing has in the place of a cache."""
    nbytes = 0

    def __init__(self, ids):
        self.ids = ids

    def select(self, rows):
        self.ids = self.ids[rows]


def llada(folder):
    """{name: function(model, ids (1, P), new, forwards) -> ids (1, P + new)}; so do the next two.
    """
    path = peers.find(folder, "LLaDA/generate.py")
    with peers.stand_ins({"transformers": dict(AutoTokenizer=None, AutoModel=None)}):
        peer = peers.load(path, "llada_generate")

    def run(model, ids, new, forwards):
        return peer.generate(
            model,
            ids,
            steps=forwards,
            gen_length=new,
            block_length=BLOCK,
            temperature=0.0,
            cfg_scale=0.0,
            remasking="low_confidence",
            mask_id=model.mask_id,
        )

    return {"LLaDA generate": run}


def fast_dllm(folder):
    path = peers.find(folder, "Fast-dLLM/llada/generate.py")
    with peers.stand_ins({"transformers": dict(AutoTokenizer=None, AutoModel=None),
                          "model.modeling_llada": dict(LLaDAModelLM=None)}):
        peer = peers.load(path, "fast_dllm_generate")

    def runner(function):
        return lambda model, ids, new, forwards: function(
            model,
            ids,
            steps=forwards,
            gen_length=new,
            block_length=BLOCK,
            temperature=0.0,
            mask_id=model.mask_id,
        )[0]

    return {"Fast-dLLM generate, no cache": runner(peer.generate),
            "Fast-dLLM prefix cache": runner(peer.generate_with_prefix_cache),
            "Fast-dLLM dual cache": runner(peer.generate_with_dual_cache)}


def dllm(folder):
    root = peers.find(folder, "dllm/dllm")
    for name in (
        "", ".core", ".core.samplers", ".pipelines", ".pipelines.fastdllm",
        ".pipelines.fastdllm.llada",
    ):
        peers.bare(f"dllm{name}", root.joinpath(*name.split(".")[1:]))
    with peers.stand_ins(
        {"transformers": dict(PreTrainedModel=object, PreTrainedTokenizer=object)}
    ):
        block = peers.load(root / "core/samplers/bd3lm.py", "dllm.core.samplers.bd3lm")
        cached = peers.load(
            root / "pipelines/fastdllm/llada/sampler.py", "dllm.pipelines.fastdllm.llada.sampler"
        )

    def by_blocks(model, ids, new, forwards):
        sampler = block.BD3LMSampler(model=model, tokenizer=model.tokenizer)
        return sampler.sample(
            [ids[0]], max_new_tokens=new, block_size=BLOCK, steps=forwards, temperature=0.0
        )

    def as_fast_dllm(use_cache):
        def run(model, ids, new, forwards):
            # what the canvas is made of first
            tokenizer = SimpleNamespace(**{**vars(model.tokenizer), "eos_token_id": 3})
            sampler = cached.FastdLLMLLaDASampler(model=model, tokenizer=tokenizer)
            return sampler.sample(
                [ids[0]],
                max_new_tokens=new,
                block_size=BLOCK,
                steps=forwards,
                temperature=0.0,
                use_cache=use_cache,
            )

        return run

    return {
        "dllm BD3LMSampler": by_blocks,
        "dllm Fast-dLLM sampler, no cache": as_fast_dllm(None),
        "dllm Fast-dLLM sampler, prefix": as_fast_dllm("prefix"),
        "dllm Fast-dLLM sampler, dual": as_fast_dllm("dual"),
    }


SAMPLERS = {"llada": llada, "fast_dllm": fast_dllm, "dllm": dllm}
WITHOUT = {  # a sampler with a cache -> the same without
    "Fast-dLLM prefix cache": "Fast-dLLM generate, no cache",
    "Fast-dLLM dual cache": "Fast-dLLM generate, no cache",
    "dllm Fast-dLLM sampler, prefix": "dllm Fast-dLLM sampler, no cache",
    "dllm Fast-dLLM sampler, dual": "dllm Fast-dLLM sampler, no cache",
}


def sampled(run, model, prompt, new, forwards):
    """The new tokens of a peer's sampler."""
    out = run(model, torch.tensor([prompt]), new, forwards)[0, -new:].tolist()
    assert model.mask_id not in out, "a mask is left"
    return out


# --------------------------------------------------------------------------------------------------
# contestants

def aria(prompt, new, precisions, per_forward):
    """{name: a function that decodes once and returns the new tokens}; so do the next two."""
    runs = {}
    for kind in ("primary", "backup"):
        for precision in precisions:
            model = TorchModel(network(kind, precision))
            for n in per_forward:
                s = Settings(
                    new,
                    BLOCK // n,
                    mode="block_frozen",
                    block_size=BLOCK,
                    temperature=0,
                    eos_id=None,
                )
                runs[f"aria {kind} {precision}, {n} per forward"] = lambda m=model, s=s: generate(
                    m, prompt, s, [0]
                ).rows[0]
    return runs


def theirs(source, folder, prompt, new, precisions, per_forward):
    samplers = source(folder)
    models = {precision: PeerModel(network("backup", precision)) for precision in precisions}
    return {
        f"{name}, {precision}, {n} per forward": lambda run=run, m=m, n=n: sampled(
            run, m, prompt, new, new // n
        )
        for name, run in samplers.items()
        for precision, m in models.items()
        for n in per_forward
    }


def huggingface(folder, prompt, new, precisions):
    peers.packages(folder, "hf")
    from transformers import LlamaConfig, LlamaForCausalLM

    cfg = LlamaConfig(
        vocab_size=VOCAB + 1,
        hidden_size=WIDTH,
        intermediate_size=FF,
        num_hidden_layers=LAYERS,
        eos_token_id=None,
        num_attention_heads=HEADS,
        tie_word_embeddings=True,
        bos_token_id=2,
        pad_token_id=0,
    )
    ids, dtypes = torch.tensor([prompt]), {"fp32": torch.float32, "bf16": torch.bfloat16}

    def run(model):
        return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)[
            0, len(prompt) :
        ].tolist()

    models = {p: LlamaForCausalLM(cfg).eval().to(dtypes[p]) for p in precisions if p in dtypes}
    return {
        f"Hugging Face Llama AR, {name}": lambda model=model: run(model)
        for name, model in models.items()
    }


def write_gguf(folder, source, quantised):
    """A random Llama of the backup's shape as GGUF, without a tokenizer."""
    sys.path.insert(0, str(Path(source, "gguf-py")))
    import gguf
    import numpy as np
    path = Path(folder, "q8.gguf" if quantised else "f16.gguf")
    w, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    w.add_block_count(LAYERS)
    w.add_context_length(4096)
    w.add_embedding_length(WIDTH)
    w.add_feed_forward_length(FF)
    w.add_head_count(HEADS)
    w.add_head_count_kv(HEADS)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_dimension_count(WIDTH // HEADS)
    w.add_vocab_size(VOCAB)
    w.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType.Q8_0 if quantised else gguf.GGMLQuantizationType.F16
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if quantised else gguf.LlamaFileType.MOSTLY_F16)

    def matrix(name, rows, columns):
        x = rng.standard_normal((rows, columns), dtype=np.float32) * 0.02
        w.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
    matrix("token_embd.weight", VOCAB, WIDTH)
    matrix("output.weight", VOCAB, WIDTH)
    w.add_tensor("output_norm.weight", np.ones(WIDTH, dtype=np.float32))
    for i in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH, WIDTH),
            ("attn_v", WIDTH, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", FF, WIDTH),
            ("ffn_up", FF, WIDTH),
            ("ffn_down", WIDTH, FF),
        ):
            matrix(f"blk.{i}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{name}.weight", np.ones(WIDTH, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def llama_cpp(folder, scratch, prompt, new):
    """llama-bench as it is: prompt and generation in one timed test (-pg); its own median of 3
    repetitions is one run here.
    """
    source, runs = peers.find(folder, "llama.cpp"), {}
    bench = peers.find(source, "build/bin/llama-bench")
    for quantised in (True, False):
        path = write_gguf(scratch, source, quantised)
        command = [str(bench), "-m", str(path), "-p", "0", "-n", "0", "-r", "3", "-o", "json",
                   "-pg", f"{len(prompt)},{new}", "-t", str(torch.get_num_threads())]

        def run(command=command):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return new, statistics.median(json.loads(done.stdout)[0]["samples_ns"]) / 1e9
        runs[f"llama.cpp AR, {'Q8_0' if quantised else 'F16'}"] = run
    return runs


def contestants(args, prompt, scratch):
    fit = prompt, args.new, args.precisions, args.per_forward
    sources = {
        "aria": lambda: aria(*fit),
        "hf": lambda: huggingface(args.peers, *fit[:3]),
        **{
            name: lambda source=source: theirs(source, args.peers, *fit)
            for name, source in SAMPLERS.items()
        },
        "llama.cpp": lambda: llama_cpp(args.peers, scratch, *fit[:2]),
    }
    return peers.collect([(name, source) for name, source in sources.items() if name in args.only])


def speed(args):
    """Every contestant once per round, in turn; a crawl (the first run took longer than --crawl
    seconds) has only its first.
    """
    rows, scratch = [], tempfile.mkdtemp()
    for length in args.prompts:
        runs = contestants(args, random_prompt(length), scratch)
        speeds, first = {name: [] for name in runs}, {}
        for turn in range(-1, args.rounds):
            for name, run in runs.items():
                if turn >= 0 and first[name] > args.crawl:
                    continue
                started = time.perf_counter()
                made = run()
                count, seconds = (
                    made if isinstance(made, tuple) else (len(made), time.perf_counter() - started)
                )
                assert count == args.new, f"{name} made {count} tokens"
                # else the first run was the warm-up
                if first.setdefault(name, seconds) > args.crawl or turn >= 0:
                    speeds[name].append(count / seconds)
        for name, s in speeds.items():
            rows.append(
                {
                    "prompt": length,
                    "name": name,
                    "tok_per_s": statistics.median(s),
                    "min": min(s),
                    "max": max(s),
                    "runs": len(s),
                }
            )
            print(
                f"prompt {length:5}  {name:56} {rows[-1]['tok_per_s']:8.1f} tok/s "
                f"({min(s):.1f}-{max(s):.1f})",
                flush=True,
            )
    return rows


def random_prompt(length):
    return [2] + torch.randint(
        4, VOCAB, (length - 1,), generator=torch.Generator().manual_seed(0)
    ).tolist()


def starter_prompts(tokenizer, length):
    """Documents of the starter corpus end to end, of a seed that no preset trains on."""
    from text.starter import grammar
    ids = []
    for _, text in grammar.starter_documents(991, 0.35):
        ids += [tokenizer.bos_id, *tokenizer.encode(text)]
        if len(ids) >= length:
            return ids[:length]


def agreement(args):
    """Greedy tokens with a cache against the same sampler without, float32: how many are equal, and
    up to where all are.
    """
    rows, tokenizer, net = [], None, network("backup", "fp32")
    if args.ckpt:
        import checkpoint
        net, tokenizer, _ = checkpoint.load_model(args.ckpt, "cpu", config.check_saved, "backup")
    for length in args.prompts:
        prompt, n = (
            starter_prompts(tokenizer, length) if args.ckpt else random_prompt(length),
            args.per_forward[0],
        )
        forwards, peer_model, made = args.new // n, PeerModel(net), {}
        for name, run in peers.collect(
            [(s, lambda s=s: SAMPLERS[s](args.peers)) for s in SAMPLERS if s in args.only]
        ).items():
            if name != "LLaDA generate":
                made[name] = sampled(run, peer_model, prompt, args.new, forwards)
            if name == "dllm BD3LMSampler":
                made["recomputed"] = sampled(run, Forgetful(net), prompt, args.new, forwards)
        pairs = {name: (made[name], made[other]) for name, other in WITHOUT.items() if name in made}
        if "recomputed" in made:
            pairs["dllm BD3LMSampler"] = made["dllm BD3LMSampler"], made["recomputed"]
        if "aria" in args.only:
            s = Settings(
                args.new,
                BLOCK // n,
                mode="block_frozen",
                block_size=BLOCK,
                temperature=0,
                eos_id=None,
            )
            pairs["aria backup block_frozen"] = tuple(
                generate(TorchModel(model), prompt, s, [0]).rows[0]
                for model in (net, Recomputing(net))
            )
        for name, (a, b) in pairs.items():
            equal = [x == y for x, y in zip(a, b, strict=True)]
            rows.append(
                {
                    "prompt": length,
                    "name": name,
                    "per_forward": n,
                    "equal": sum(equal) / len(equal),
                    "first_difference": None if all(equal) else equal.index(False),
                    "distinct": len(set(b)),
                }
            )
            print(
                f"prompt {length:5}  {name:40} {sum(equal) / len(equal):7.1%} of greedy tokens as "
                "without the cache"
                + (
                    ""
                    if all(equal)
                    else f", the first other one is number {equal.index(False) + 1}"
                ),
                flush=True,
            )
    return rows


def main():
    p = arguments(__doc__)
    p.add_argument("--peers", default="peers", help="folder of the peers, see benchmarks/peers.py")
    p.add_argument("--only", nargs="+", default=["aria", "hf", *SAMPLERS, "llama.cpp"])
    p.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024])
    p.add_argument("--precisions", nargs="+", default=["bf16"], choices=["fp32", "bf16", "int8"])
    p.add_argument(
        "--per_forward",
        type=int,
        nargs="+",
        default=[4],
        help="tokens per forward, where it can be set",
    )
    p.add_argument("--new", type=int, default=128)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--crawl", type=float, default=2.0, help="seconds; what takes longer runs once")
    p.add_argument("--agreement", action="store_true", help="is each cache exact? no timing")
    p.add_argument(
        "--ckpt",
        help="with --agreement: trained weights of the backup model instead of random ones",
    )
    args = p.parse_args()
    machine.start(0)
    torch.set_grad_enabled(False)
    print(
        "parameters: "
        + ", ".join(f"{k} {model_config.count_params(shape(k)):,}" for k in ("primary", "backup")),
        flush=True,
    )
    rows = agreement(args) if args.agreement else speed(args)
    print(
        json.dumps(
            {
                "rows": rows,
                "new": args.new,
                "rounds": args.rounds,
                "params": model_config.count_params(shape("backup")),
                **machine.environment(torch.device("cpu")),
            }
        )
    )


if __name__ == "__main__":
    main()
