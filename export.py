"""A trained model for machines without PyTorch: a folder with graphs that ONNX Runtime runs.

    python -m export --ckpt checkpoints/eco_hybrid_hi --format onnx
    python -m export checkpoints/eco_hybrid_hi --bits 32 --output exports/exact

Writes one weights file that all graphs share, the graphs, the tokenizer, the settings and a
manifest with every file's hash; edge/engine.py reads it. The folder gets its name only when it has
proved itself: the same graphs in float32 give PyTorch's logits to 1e-5 of their size, whatever the
bits. Then it says what a forward takes, and how many bits/byte the coarser numbers lose on held-out
text of the run's own data, if that is there.
"""
from pathlib import Path

import cli
import config
from common.console import UserError, need, say
from model_config import ATTENTION_OPTIONS

WHY = "to export a model; requirements_export.txt has all that it takes"


def main(argv=None):
    args, origins = cli.parse(config.ExportArgs, argv, "export")
    say(f"settings: {cli.changed(args, origins)}")
    need("onnx", WHY)
    need("onnxruntime", WHY)

    # it imports torch and onnx, which --help and a usage error do not wait for
    from edge import folder

    model, tokenizer, saved = folder.load_checkpoint(args)
    refuse_other_attention(model.cfg)
    output = Path(args.output or Path("exports") / saved.path.parent.name)
    if output.exists() and not (output / "weights.bin").is_file():
        raise UserError(f"--output {output} is something else than an exported model: name another")
    windows = folder.held_out_windows(args.data_dir, tokenizer, saved)
    manifest = folder.export(args, model, saved, windows, output)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    say(f"{output}: {size / 1e6:.1f} MB")
    print(output)


def refuse_other_attention(cfg):
    """The graphs hold the transformer's mha, as it is without options."""
    asked = [f"--attn {cfg.attn}"] if cfg.attn != "mha" else []
    for name in ATTENTION_OPTIONS:
        if getattr(cfg, name):
            asked.append(f"--{name}")
    if asked:
        raise UserError(
            f"this model was trained with {' '.join(asked)}, and the exported graphs know --attn "
            "mha without options alone: write text from its checkpoint with python -m sample"
        )


if __name__ == "__main__":
    cli.run(main)
