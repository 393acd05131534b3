"""An exported model (python -m export) for the commands that write or score text. No torch.

    folder = folder_of(args)        # None: --ckpt is for PyTorch, see sampling/trained.py
    writer, tokenizer, saved = load(folder, args)

Used by sample.py, serve.py, evaluate.py and edge_benchmark.py. `saved` is what checkpoint.load
gives, as far as anybody asks: path, name, step, config, state.
"""
from pathlib import Path
from types import SimpleNamespace

import config
import model_config
from common.console import UserError, say
from common.files import ROOT
from edge import engine
from text.gpt2 import check_tokenizer, open_tokenizer

DRAFTS_PAY = 1.05             # how many times as fast text has to be with verified drafts
FOLDER = Path("exports")      # where python -m export writes if nothing else is asked
STARTER = ROOT / "exports" / "starter"      # comes with the code


def folder_of(args):
    """The exported folder that --ckpt and --engine ask for, or None. Without --ckpt and without a
    run it is the starter model.
    """
    if not args.ckpt and args.engine != "torch" and not runs_here() and engine.onnxruntime:
        say(
            "notice: there is no run under checkpoints/, so this is the starter model that comes "
            "with Aria; it knows the text of a small grammar, no more"
        )
        return STARTER
    if args.ckpt and engine.is_export(args.ckpt):
        if args.engine == "torch":
            raise UserError(
                f"--engine torch: {args.ckpt} is an exported model, which PyTorch does not read: "
                "name the checkpoint that it was made of"
            )
        return Path(args.ckpt)
    if args.engine != "onnx":
        return None
    if not args.ckpt:
        raise UserError("--engine onnx: name an exported folder with --ckpt")
    run, step = run_and_step(Path(args.ckpt))
    folder = FOLDER / run.name
    if not engine.is_export(folder):
        raise UserError(
            f"--engine onnx: {args.ckpt} has no export at {folder}: make it with python -m export "
            f"{args.ckpt}"
        )
    made_of = engine.read_manifest(folder)["step"]
    if step not in (None, made_of):
        raise UserError(
            f"--engine onnx: {folder} is of step {made_of}, {args.ckpt} of step {step}: write it "
            f"again with python -m export {args.ckpt}"
        )
    return folder


def model_of(args, gaussian=False):
    """-> (engine, tokenizer, saved): whatever --ckpt and --engine name, exported or a run.
    gaussian: a run of --objective gaussian is read, too.
    """
    folder = folder_of(args)
    if folder:
        return load(folder, args)
    from sampling import trained  # torch, which an exported model does without
    return trained.load(args, gaussian)


def runs_here():
    """Is there a run of train under checkpoints/?"""
    return any(Path("checkpoints").glob("*/latest")) or any(Path("checkpoints").glob("*/step_*"))


def run_and_step(path):
    """A spelling of a checkpoint -> (its run folder, its step: None if there is none)."""
    if path.name.startswith("step_"):
        return path.parent, int(path.name.removeprefix("step_"))
    pointer = "latest"
    if path.name in ("last.ckpt", "best.ckpt"):
        if path.name == "best.ckpt":
            pointer = "best"
        path = path.parent
    try:
        name = (path / pointer).read_text(encoding="utf-8").split("\n")[0]
        return path, int(name.removeprefix("step_"))
    except (OSError, ValueError):
        return path, None


def load(folder, args):
    """-> (engine, tokenizer, saved); flags of a checkpoint that cannot be had are refused."""
    if args.device not in ("auto", "cpu"):
        raise UserError(
            f"--device {args.device}: an exported model runs on the CPU; leave the flag out, or "
            "name the checkpoint"
        )
    if getattr(args, "precision", "auto") != "auto":
        raise UserError(
            f"--precision {args.precision}: an exported model has the precision that it was "
            "exported in; leave the flag out, or export with other --bits"
        )
    if getattr(args, "cache_dtype", "auto") not in ("auto", "fp32"):
        raise UserError(
            f"--cache_dtype {args.cache_dtype}: an exported model has its cache in float32; leave "
            "the flag out, or name the checkpoint"
        )
    runner = engine.load(folder, args.threads)
    config.check_saved(runner.config["args"], folder / engine.CONFIG)
    wanted = getattr(args, "model", "auto")
    if wanted not in ("auto", runner.cfg.model):
        raise UserError(
            f"{folder} holds a {runner.cfg.model} model, --model says {wanted}: use --model "
            f"{runner.cfg.model}"
        )
    tokenizer = open_tokenizer(runner.tokenizer_bytes())
    if getattr(args, "tokenizer", None):
        check_tokenizer(args.tokenizer, tokenizer)
    manifest = runner.manifest
    faster = manifest.get("drafts", {}).get("faster", 0)
    saved = SimpleNamespace(
        path=folder,
        name=folder.resolve().name,
        step=manifest["step"],
        config=runner.config,
        drafts_pay=faster >= DRAFTS_PAY and not runner.machine.slow_row,
        state={"data_sha256": manifest.get("data_sha256")},
    )
    say(
        f"model: {runner.cfg.model}, {model_config.count_params(runner.cfg):,} parameters; "
        f"exported at step {saved.step}, {in_words(runner)}"
    )
    return runner, tokenizer, saved


def in_words(runner):
    """How it computes."""
    bits = runner.manifest["bits"]
    numbers = "float32" if bits == 32 else f"{bits} bits"
    return f"{numbers}, ONNX Runtime in {runner.threads} threads"
