"""How good is a checkpoint: the bound on -log p of held-out text, in nats per token and bits per byte.

    python -m evaluate --ckpt checkpoints/eco_hybrid_hi --data_dir data/builtin
    python -m evaluate --check_run checkpoints/eco_hybrid_hi          # instead: does the run work? (verdict.py)

The bound is the exact-count form of masking.bound: every count of hidden tokens weighs the same, strata over rows and blocks,
masks fixed by the seed, so that two checkpoints are scored on the same questions. It is printed for each block rule; a
uniform guess scores ln V. bits/byte divides by the UTF-8 bytes of the raw text; compare it only within one script.
"""
import math
import sys
from types import SimpleNamespace

import config
import knobs


def held_out(model, rows, blocks, seed, batch, draws):
    """Held-out rows (R, T) -> {block: {"nats": bound per token, "se": standard error over rows, "masked_mean": plain CE}}."""
    import torch

    from masking import bound
    result = {}
    for block in blocks:
        parts = [bound(model, rows, block, None, seed + i, batch) for i in range(draws)]
        per_row = torch.stack([p[0] for p in parts]).mean(0)                       # (R,)
        error = float(per_row.std() / math.sqrt(len(per_row))) if len(per_row) > 1 else 0.0
        result[block] = {"nats": float(per_row.mean()), "se": error,
                         "masked_mean": sum(p[1] for p in parts) / draws}
    return result


def at_depth(model, depth):
    """The same model, leaving behind that many layers, as far as masking.bound looks at it."""
    return SimpleNamespace(cfg=model.cfg, head=model.head,
                           hidden_blocks=lambda xt, x0, block, first: model.hidden_blocks(xt, x0, block, first, depth)[1])


def bits_per_byte(nats_per_token, meta):
    """nats/token -> bits per byte of the raw validation text; None when the bytes were not recorded."""
    if not meta.get("val_bytes"):
        return None
    return nats_per_token * meta["val_tokens"] / meta["val_bytes"] / math.log(2)


def main(argv=None):
    args, origins = config.parse(config.EvaluateArgs, argv, "evaluate")
    config.announce(args, origins)
    import checkpoint
    import runtime
    from tokens import TokenData
    runtime.start(args.threads)
    if args.check_run:
        import verdict
        return 0 if verdict.passed(verdict.check(args.check_run, args)) else 1
    device = runtime.pick_device(args.device)
    model, tokenizer, saved = checkpoint.load_model(args.ckpt, device)
    data = TokenData(args.data_dir, "val")
    if data.meta["tokenizer_sha256"] != tokenizer.sha256:
        raise config.UserError(f"{args.data_dir} was made with tokenizer {data.meta['tokenizer_sha256'][:12]}, the checkpoint's "
                               f"is {tokenizer.sha256[:12]}: prepare the text with --tokenizer {saved.path / 'tokenizer.model'}")
    length = saved.config["args"]["seq_len"]
    batch = saved.config["args"]["batch_size"]
    rows = data.val_windows(args.batches * batch, length).to(device)
    blocks = sorted(set(config.block_sizes(args.blocks or saved.config["args"]["train_block_sizes"], length)), reverse=True)
    result = held_out(model, rows, blocks, args.seed, batch, args.draws)
    print(f"{saved.path}  step {saved.step}  {len(rows)} rows of {length} tokens, {args.draws} draws each, "
          f"uniform guess {math.log(model.cfg.vocab_size - 1):.3f} nats", file=sys.stderr)
    for block, r in result.items():
        r["bits_per_byte"] = bits_per_byte(r["nats"], data.meta)
        name = "T" if block >= length else str(block)
        bpb = "-" if r["bits_per_byte"] is None else f"{r['bits_per_byte']:.4f}"
        print(f"block {name:>4}   bound {r['nats']:.4f} +- {r['se']:.4f} nats/token   {bpb} bits/byte   "
              f"masked CE {r['masked_mean']:.4f}")
    exits = {}
    if model.cfg.exits:
        for depth in range(1, model.cfg.n_layers):
            exits[depth] = held_out(at_depth(model, depth), rows, blocks, args.seed, batch, args.draws)
            text = "   ".join(f"{'T' if b >= length else b}: {r['nats']:.4f} +- {r['se']:.4f}" for b, r in exits[depth].items())
            print(f"exit after layer {depth:2} of {model.cfg.n_layers}   {text} nats/token")
    if args.out_json:
        knobs.write_json(args.out_json, {"checkpoint": str(saved.path), "step": saved.step, "seed": args.seed, "bound": result,
                                            "exits": exits}, fix=": name another --out_json")


if __name__ == "__main__":
    config.run(main)
