"""An exported folder for a static host is written, proved and put in its place. Used by export.py.

    path = export(args)

It is the folder of edge/folder.py, proved as that one is, and beside it the server's page, the
JavaScript of this room, the tokenizer as JSON, and ONNX Runtime's build for browsers, so that a
browser asks no other host for anything.
"""
import dataclasses
import shutil
from pathlib import Path

import config
from common.console import UserError
from common.files import folder_aside, to_json, write_file
from edge import folder as edge_folder, source
from hf.tokenizer_json import tokenizer_json
from sampling.settings import refuse_interlaced
from serving import page, requests
from text.gpt2 import Gpt2Tokenizer

HERE = Path(__file__).parent
PAGE = "index.html"
SCRIPTS = ("transport.js", "worker.js", "model.js", "decode.js", "shown.js", "tokenizer.js")
PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"          # with which it was tested
RUNTIME = {                 # file of the package -> its name in the folder
    "dist/ort.wasm.bundle.min.mjs": "onnxruntime.js",
    "dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
}


def export(args):
    """Write the folder aside, and rename it when it has proved itself -> its path. In --format onnx
    that of edge/ is all there is.
    """
    if args.format == "onnx":
        return edge_folder.export(args)
    runtime = runtime_of(args)
    model, tokenizer, saved = source.load_checkpoint(args)
    must_suit_browsers(model.cfg, tokenizer)
    refuse_interlaced(saved)
    output = source.output_of(args, saved, PAGE)
    windows = source.held_out_windows(args.data_dir, tokenizer, saved)
    with folder_aside(output) as aside:
        edge_folder.write_and_check(args, model, saved, aside, windows)
        name = saved.path.parent.name
        write_page(aside, served_of(name, model, tokenizer, saved))
        for there, here in RUNTIME.items():
            shutil.copyfile(runtime / there, aside / here)
    return output


def runtime_of(args):
    """Where ONNX Runtime's package for browsers lies."""
    package = Path(args.web_runtime or Path("node_modules") / PACKAGE)
    for name in RUNTIME:
        if not (package / name).is_file():
            raise UserError(
                f"--format web puts ONNX Runtime's build for browsers into the folder, and "
                f"{package / name} is not there: npm install {PACKAGE}@{VERSION}, or name the "
                "folder of that package with --web_runtime",
                code=3,
            )
    return package


def must_suit_browsers(cfg, tokenizer):
    """Refuses what web/ has no JavaScript for."""
    if cfg.model != "primary":
        raise UserError(
            "--format web knows EcoHybrid (--model primary) alone: export the transformer with "
            "--format onnx or hf"
        )
    if isinstance(tokenizer, Gpt2Tokenizer):
        raise UserError(
            "--format web knows our own tokenizers, not GPT-2's: export this model with --format "
            "onnx or hf"
        )


def served_of(name, model, tokenizer, saved):
    """What a server of this model would know, for its settings and limits."""
    limits = config.ServeArgs()
    return requests.Served(name, model, tokenizer, saved, limits.max_length, limits.max_work)


def write_page(folder, served):
    """All that is ours and that the browser needs beside the model."""
    for name in SCRIPTS:
        shutil.copyfile(HERE / name, folder / name)
    write_file(folder / PAGE, page_without_server().encode())
    text = tokenizer_json(served.tokenizer, served.framed)
    write_file(folder / "tokenizer.json", text.encode())
    write_file(folder / "model.json", to_json(about(served)))


def about(served):
    """model.json: what GET /v1/models tells, the network's shape, and the settings of a text of
    which nothing is asked.
    """
    described = requests.described(served)
    mode = None
    if not served.causal:
        mode = "block_frozen" if described["can_freeze"] else "full"
    settings, _ = requests.settings_of(served, {}, 1, mode)
    return {
        "id": served.name,
        "aria": described,
        "shape": served.model.cfg.to_dict(),
        "settings": dataclasses.asdict(settings),
    }


def page_without_server():
    """The server's page, with the model in the browser instead of behind it. Its policy, which a
    server sends, stands in the page.
    """
    text = page.PAGE.decode()
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src 'self' {page.hash_of('script', text)}",
            f"style-src {page.hash_of('style', text)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    first = '<meta charset="utf-8">\n'
    script = "<script>\n"
    assert text.count(first) == text.count(script) == 1
    text = text.replace(
        first, f'{first}<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    )
    return text.replace(script, f'<script src="transport.js"></script>\n{script}')
