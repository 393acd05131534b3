"""A checkpoint for the commands that write text, in PyTorch.

    writer, tokenizer, saved = load(args)

Used by sample.py and serve.py; sampling/exported.py is the same for an exported model, without
torch.
"""
from pathlib import Path

import checkpoint
import config
import model_config
from common import machine
from common.console import UserError, say
from sampling import fast
from sampling.gaussian_writer import GaussianWriter
from sampling.torch_model import writer_of

NEWEST = "checkpoints/latest"  # the resolver takes the run there that saved last


def load(args, gaussian=False):
    """-> (writer, tokenizer, saved): the checkpoint that --ckpt names, or the newest one, prepared
    for decoding on --device. gaussian: one of --objective gaussian is read, too.
    """
    machine.start(args.threads)
    device = machine.pick_device(args.device)
    path = args.ckpt
    if not path:
        if not any(checkpoint.is_run(child) for child in Path(NEWEST).parent.glob("*")):
            raise UserError(
                "--ckpt is missing, and there is no run under checkpoints/: name a checkpoint or a "
                "run folder, or make one with python -m train --preset starter"
            )
        path = NEWEST
    model, tokenizer, saved = checkpoint.load_model(
        path,
        device,
        config.check_any if gaussian else config.check_saved,
        getattr(args, "model", "auto"),
        getattr(args, "tokenizer", None),
    )
    if model.cfg.gaussian:
        size = model_config.count_params(model.cfg)
        say(f"model: {model.cfg.model}, {size:,} parameters, continuous; products in fp32")
        return GaussianWriter(model), tokenizer, saved
    precision, why = fast.pick(args.precision, device)
    fast.prepare(model, precision)
    fast.store_cache(model, getattr(args, "cache_dtype", "auto"))
    say(
        f"model: {model.cfg.model}, {model_config.count_params(model.cfg):,} parameters; products "
        f"in {precision} ({why})"
    )
    return writer_of(model), tokenizer, saved
