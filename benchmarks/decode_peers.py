"""Decoding beside public peers: equal size, one machine, one run, taken in turn. Not part of CI; peers live outside the project.

    python benchmarks/decode_peers.py --llama_cpp DIR --llada FILE --hf        # each flag is one peer; all are optional

    --llama_cpp DIR   llama.cpp's source with build/bin/llama-bench and gguf-py (autoregressive, Q8_0 and F16, KV cache)
    --llada FILE      LLaDA's generate.py: its sampler over our transformer's weights (no cache)
    --hf              Hugging Face transformers' Llama, greedy generate with KV cache, float32 and bfloat16
Ours: both models at d 512, 10 layers, 8,000 pieces, about 38M parameters, block_frozen with blocks of 32, at 1, 2, 4 and 8 tokens
per forward, in each precision. Weights are random on both sides: this measures speed. What a number of tokens per forward costs
in quality is a trained model's matter: `python -m edge_benchmark --grid`. tokens/s is new tokens / wall time with the prompt.
Prints a table (median of the rounds, min-max) and one JSON document as the last line.
"""
import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch                                                     # noqa: E402

import shapes
import fast                                                      # noqa: E402
import runtime                                                   # noqa: E402
from decode import Settings, generate                            # noqa: E402
from model import build_model                                    # noqa: E402

VOCAB, WIDTH, LAYERS, HEADS, FF, BLOCK = 8000, 512, 10, 8, 1536, 32


def shape(kind):
    cfg = shapes.ModelConfig(model=kind, vocab_size=VOCAB, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, d_ff=FF)
    if kind == "backup":
        return cfg
    target = shapes.count_params(shape("backup"))
    return shapes.ModelConfig.from_dict({**cfg.to_dict(), "d_ff": shapes.match_d_ff(cfg, target)})


def ours(prompt, new):
    """name -> a function that decodes once and returns the number of new tokens."""
    runs = {}
    for kind in ("primary", "backup"):
        for precision in ("fp32", "bf16", "int8"):
            torch.manual_seed(0)
            model = build_model(shape(kind)).eval()
            fast.prepare(model, precision)
            for per_forward in (1, 2, 4, 8):
                if per_forward > 1 and precision == "fp32" and kind == "backup":
                    continue
                s = Settings(new, BLOCK // per_forward, mode="block_frozen", block_size=BLOCK, temperature=0, eos_id=None)
                runs[f"aria {kind} {precision}, {per_forward} per forward"] = (
                    lambda model=model, s=s: len(generate(model, prompt, s, [0]).rows[0]))
    return runs


def llada(path, prompt, new):
    """LLaDA's own loop on our backup's weights, float32 and bf16: it recomputes the whole text at every forward."""
    spec = importlib.util.spec_from_file_location("llada_generate", path)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    ids = torch.tensor([prompt])

    class Adapter:
        device = torch.device("cpu")

        def __init__(self, precision):
            torch.manual_seed(0)
            self.net = build_model(shape("backup")).eval()
            fast.prepare(self.net, precision)

        def __call__(self, x, attention_mask=None):
            return SimpleNamespace(logits=self.net(x))

    def run(adapter, per_forward):
        out = peer.generate(adapter, ids, steps=new // per_forward, gen_length=new, block_length=BLOCK, temperature=0.0,
                            cfg_scale=0.0, remasking="low_confidence", mask_id=adapter.net.cfg.mask_id)
        return out.shape[1] - len(prompt)
    adapters = {precision: Adapter(precision) for precision in ("fp32", "bf16")}
    return {f"LLaDA generate, our backup {p}, {n} per forward": lambda a=a, n=n: run(a, n)
            for p, a in adapters.items() for n in (1, 4)}


def huggingface(prompt, new):
    from transformers import LlamaConfig, LlamaForCausalLM
    cfg = LlamaConfig(vocab_size=VOCAB + 1, hidden_size=WIDTH, intermediate_size=FF, num_hidden_layers=LAYERS, eos_token_id=None,
                      num_attention_heads=HEADS, tie_word_embeddings=True, bos_token_id=2, pad_token_id=0)
    ids = torch.tensor([prompt])

    def run(model):
        return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False).shape[1] - len(prompt)
    models = {name: LlamaForCausalLM(cfg).eval().to(dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    return {f"Hugging Face Llama AR, {name}": lambda model=model: run(model) for name, model in models.items()}


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
        for name, rows, columns in (("attn_q", WIDTH, WIDTH), ("attn_k", WIDTH, WIDTH), ("attn_v", WIDTH, WIDTH),
                                    ("attn_output", WIDTH, WIDTH), ("ffn_gate", FF, WIDTH), ("ffn_up", FF, WIDTH),
                                    ("ffn_down", WIDTH, FF)):
            matrix(f"blk.{i}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{name}.weight", np.ones(WIDTH, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def llama_cpp(source, folder, prompt, new):
    """llama-bench as it is: prompt and generation in one timed test (-pg); its own median of 3 repetitions is one run here."""
    runs = {}
    for quantised in (True, False):
        path = write_gguf(folder, source, quantised)
        command = [str(Path(source, "build/bin/llama-bench")), "-m", str(path), "-p", "0", "-n", "0", "-r", "3", "-o", "json",
                   "-pg", f"{len(prompt)},{new}", "-t", str(torch.get_num_threads())]

        def run(command=command):
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return new, statistics.median(json.loads(done.stdout)[0]["samples_ns"]) / 1e9
        runs[f"llama.cpp AR, {'Q8_0' if quantised else 'F16'}"] = run
    return runs


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024])
    p.add_argument("--new", type=int, default=128)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--llama_cpp")
    p.add_argument("--llada")
    p.add_argument("--hf", action="store_true")
    args = p.parse_args()
    runtime.start(0)
    torch.set_grad_enabled(False)
    rows, folder = [], tempfile.mkdtemp()
    print("parameters: " + ", ".join(f"{k} {shapes.count_params(shape(k)):,}" for k in ("primary", "backup")), flush=True)
    for length in args.prompts:
        prompt = [2] + torch.randint(4, VOCAB, (length - 1,), generator=torch.Generator().manual_seed(0)).tolist()
        runs = ours(prompt, args.new)
        if args.hf:
            runs |= huggingface(prompt, args.new)
        if args.llada:
            runs |= llada(args.llada, prompt, args.new)
        if args.llama_cpp:
            runs |= llama_cpp(args.llama_cpp, folder, prompt, args.new)
        speeds, first = {name: [] for name in runs}, {}
        for turn in range(-1, args.rounds):
            for name, run in runs.items():
                if turn >= 0 and first[name] < 40:                                 # one run of a crawl is enough
                    speeds[name] = [first[name]]
                    continue
                started = time.perf_counter()
                made = run()
                count, seconds = made if isinstance(made, tuple) else (made, time.perf_counter() - started)
                first.setdefault(name, count / seconds)
                if turn >= 0:
                    speeds[name].append(count / seconds)
        for name, s in speeds.items():
            rows.append({"prompt": length, "name": name, "tok_per_s": statistics.median(s), "min": min(s), "max": max(s)})
            print(f"prompt {length:5}  {name:52} {statistics.median(s):8.1f} tok/s ({min(s):.1f}-{max(s):.1f})", flush=True)
    print(json.dumps({"rows": rows, "new": args.new, "rounds": args.rounds, **runtime.environment(torch.device("cpu"))}))


if __name__ == "__main__":
    main()
