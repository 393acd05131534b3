"""A trained model for others: graphs for machines without PyTorch, a folder for transformers, or a
page that needs no server.

    python -m export --ckpt checkpoints/eco_hybrid_hi --format onnx
    python -m export checkpoints/eco_hybrid_hi --bits 32 --output exports/exact
    python -m export checkpoints/eco_hybrid_hi --format hf --output exports/hindi
    python -m export checkpoints/eco_hybrid_hi --format hf --push owner/name
    python -m export checkpoints/eco_hybrid_hi --format web

onnx: one weights file that all graphs share, the graphs, the tokenizer, the settings and a manifest
with every file's hash; edge/engine.py reads it. Then it says what a forward takes, and how many
bits/byte the coarser numbers lose on held-out text of the run's own data, if that is there.
hf: safetensors, the network and its decoding in one Python file, an exact tokenizer.json and a
model card; transformers loads it where there is no Aria. --push publishes it on the hub, and --ckpt
hf:owner/name@revision reads it there.
web: the folder of onnx, and beside it a page and the runtime's build for browsers; any host of
files serves it, and the model runs in the visitor's browser.

A folder gets its name only when it has proved itself: its logits are PyTorch's to 1e-5 of their
size (onnx: those of the same graphs in float32, whatever the bits).
"""
import cli
import config
from common.console import need, say

WHY = "to export a model; requirements_export.txt has all that it takes"
WHY_HF = "to prove the folder; requirements_hf.txt has all that it takes"
WHY_HUB = "to publish the folder; requirements_hf.txt has all that it takes"


def main(argv=None):
    args, origins = cli.parse(config.ExportArgs, argv, "export")
    say(f"settings: {cli.changed(args, origins)}")

    # each imports torch and more, which --help and a usage error do not wait for
    if args.push:
        need("huggingface_hub", WHY_HUB)
    if args.format == "hf":
        need("transformers", WHY_HF)
        need("tokenizers", WHY_HF)
        from hf import folder, hub
    else:
        need("onnx", WHY)
        need("onnxruntime", WHY)
        from web import folder      # that of edge/, and for web what a browser needs beside it

    output = folder.export(args)
    size = sum(path.stat().st_size for path in output.iterdir())
    say(f"{output}: {size / 1e6:.1f} MB")
    print(output)
    if args.push:
        commit = hub.push(output, args.push)
        print(f"hf:{args.push}@{commit}")


if __name__ == "__main__":
    cli.run(main)
