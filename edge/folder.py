"""An exported folder is written, proved and put in its place. Used by export.py.

    path = export(args)
"""
import math
import shutil

import onnx

import config
from common.console import UserError, say
from common.files import file_sha256, folder_aside, sync, to_json, write_file
from edge import checks, drafts, engine, graphs
from edge.source import (
    held_out_windows, load_checkpoint, output_of, text_for_logits, training_tokens,
)
from evaluation import estimators
from evaluation.exported import ExportedModel
from model_config import ATTENTION_OPTIONS
from sampling.torch_model import TorchModel
from text.gpt2 import open_tokenizer

EXACT = 1e-5           # of the logits' size, between two ways to compute the same float32 numbers


def export(args):
    """Write the folder aside, and rename it when it has proved itself -> its path."""
    model, tokenizer, saved = load_checkpoint(args)
    refuse_other_attention(model.cfg)
    output = output_of(args, saved, engine.WEIGHTS)
    windows = held_out_windows(args.data_dir, tokenizer, saved)
    with folder_aside(output) as aside:
        manifest = write_and_check(args, model, saved, aside, windows)
        if not model.cfg.causal and not model.cfg.interlaced:
            tokens = training_tokens(args.data_dir, tokenizer, saved)
            prompts = [window[:checks.BEGINNING] for window in windows]
            add_drafts(aside, manifest, tokens, prompts, args.threads)
    return output


def add_drafts(folder, manifest, tokens, prompts, threads):
    """Count the training text's ids, put a table of drafts into an exported folder, and measure on
    a few beginnings what it is worth.
    """
    entries = drafts.count(tokens)
    if not len(entries.tokens):
        return
    path = folder / engine.DRAFTS
    manifest["drafts"] = drafts.write(path, entries)
    manifest["files"][engine.DRAFTS] = entry_of(path)
    write_file(folder / engine.MANIFEST, to_json(manifest))
    gain = checks.gain_of_drafts(engine.load(folder, threads), prompts)
    manifest["drafts"]["faster"] = gain
    write_file(folder / engine.MANIFEST, to_json(manifest))
    sync(path)
    say(
        f"drafts: {len(entries.tokens):,} contexts of the training text and what follows them; "
        f"verified, they make text {gain:.2f}x as fast"
    )


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


def write_and_check(args, model, saved, folder, windows):
    """Write the folder, compare it with PyTorch, measure what it costs -> its manifest."""
    bits = int(args.bits)
    reference = TorchModel(model)
    ids = text_for_logits(model.cfg, windows)

    # the graphs in float32 against PyTorch
    exact = folder
    if bits != 32:
        exact = folder / "float32"
    exact.mkdir(parents=True)
    manifest = write_folder(model, saved, exact, 32, args.weight_block)
    largest, _ = checks.difference(engine.load(exact, args.threads), reference, ids)
    if not largest <= EXACT:
        raise UserError(
            f"the exported graphs differ from PyTorch's logits by {largest:.1e} of their size, "
            f"more than {EXACT:g}: nothing was written; please report it with this checkpoint's "
            "config.json"
        )
    say(f"in float32 the logits are PyTorch's: {largest:.1e} of their size apart at most")
    runner = None
    if bits != 32:
        shutil.rmtree(exact)
        wide = args.format == "web"
        manifest = write_folder(model, saved, folder, bits, args.weight_block, wide)
        runner = engine.load(folder, args.threads)
        _, typical = checks.difference(runner, reference, ids)
        if not math.isfinite(typical):
            raise UserError(f"in {bits} bits the logits are not finite: use --bits 32")
        say(f"in {bits} bits the logits are {typical:.2%} of their size away, root mean square")
        manifest["logits_apart"] = typical
    runner = runner or engine.load(folder, args.threads)

    # what it costs
    manifest["milliseconds"] = checks.speed(runner, ids)
    if not model.cfg.causal:
        manifest["round_cost"] = checks.round_cost(manifest["milliseconds"])
        manifest["try_cost"] = checks.try_cost(runner, ids)
    times = [f"{what} {ms:.2f} ms" for what, ms in manifest["milliseconds"].items()]
    say(f"a forward in {runner.threads} threads: {', '.join(times)}")
    manifest["bits_per_byte"] = bits_lost(args, saved, runner, model, windows)
    write_file(folder / engine.MANIFEST, to_json(manifest))
    sync(folder)
    return manifest


def write_folder(model, saved, folder, bits, block, wide=False):
    """The files of an exported model -> its manifest, which is written, too. wide: see Products."""
    parameters = {name: value.float().numpy() for name, value in model.state_dict().items()}
    weights = graphs.Weights(folder / engine.WEIGHTS)
    try:
        built = graphs.build(model.cfg, parameters, graphs.Products(weights, bits, block, wide))
    finally:
        weights.close()
    for name, graph in built.items():
        write_file(folder / f"{name}.onnx", graph.SerializeToString())
    write_file(folder / engine.TOKENIZER, saved.tokenizer_bytes)
    write_file(folder / engine.CONFIG, to_json(saved.config))
    sync(folder / engine.WEIGHTS)

    files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            files[path.name] = entry_of(path)
    manifest = {
        "format": engine.FORMAT,
        "files": files,
        "bits": bits,
        "weight_block": block,
        "chunk": graphs.CHUNK,
        **weights.made,
        "step": saved.step,
        "data_sha256": saved.state.get("data_sha256"),
        "onnx": onnx.__version__,
    }
    write_file(folder / engine.MANIFEST, to_json(manifest))
    return manifest


def entry_of(path):
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def bits_lost(args, saved, runner, model, windows):
    """The bits/byte of the windows by PyTorch in float32 and by the exported model. None without
    windows, and of pairs, whose prompts are no text to score.
    """
    tokenizer = open_tokenizer(saved.tokenizer_bytes)
    size = sum(len(tokenizer.decode(window).encode()) for window in windows)
    if not size or model.cfg.answers:
        return None
    settings = saved.config["args"]
    length = config.scored_length(saved)
    ways = {"left to right": 1}
    if not model.cfg.causal:
        sizes = config.block_sizes(settings["train_block_sizes"], length)
        block = max((size for size in sizes if 1 < size < length), default=length)
        ways[f"bound in blocks of {block}"] = block
    pieces = estimators.cut(windows, length)
    found = {}
    for name, block in ways.items():
        bits = []
        for scored in (model, ExportedModel(runner)):
            # one draw of masks, the same for both
            nats, _, _ = estimators.bound(scored, pieces, block, 1, args.seed)
            bits.append(float(nats.sum()) / size / math.log(2))
        before, after = bits
        found[name] = {"checkpoint": before, "exported": after, "lost": after / before - 1}
        say(
            f"{name}: {before:.4f} bits/byte in PyTorch, {after:.4f} exported "
            f"({after / before - 1:+.2%}; {len(windows)} windows of held-out text)"
        )
    return found
