"""The model in a browser: tokens/s in a real Chromium, and the size of the folder.

    python benchmarks/web_speed.py                       # 5M and 38M parameters, 8 bits
    python benchmarks/web_speed.py --sizes 5M --bits 32 --package node_modules/onnxruntime-web

128 new tokens behind a prompt of 64, left to right, and in blocks of 32 that take 8 forwards each;
the same by the engine of python -m sample in one thread, in turn. Medians of --rounds, behind one
untimed round. Seconds until the page can write are those of files on this machine. Random weights:
this measures speed alone. --isolated sends the two headers with which a page may use several
threads. Needs npm's package onnxruntime-web and Chromium. The last line is a JSON document. Not
part of CI.
"""
import dataclasses
import gzip
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from harness import ROOT, arguments  # first: it puts the repository on the path

sys.path.append(str(ROOT / "tests"))

from browser import a_page, hosted
from edge_speed import IN_BLOCKS, LEFT_TO_RIGHT, NEW, SIZES, VOCAB, engine_of
from sampling import exported
from sampling.decode import generate
from web import folder as web_folder

PROMPT = 64
WAYS = {"left to right": LEFT_TO_RIGHT, "blocks of 32": IN_BLOCKS}
ISOLATED = (("Cross-Origin-Opener-Policy", "same-origin"),
            ("Cross-Origin-Embedder-Policy", "require-corp"))
OPEN = """async () => {
  const { openModel } = await import("/model.js");
  const read = async (name) => (await fetch("/" + name)).arrayBuffer();
  globalThis.model = await openModel(await import("/onnxruntime.js"), read);
  globalThis.generate = (await import("/decode.js")).generate;
}"""
WRITE = """async ({ prompt, settings }) => {
  const started = performance.now();
  await generate(model, prompt, settings);
  return (performance.now() - started) / 1000;
}"""


def folder_of(size, bits, home, package):
    """The folder of a model of this size with random weights -> (its path, the engine of python -m
    sample for the same weights).
    """
    path = engine_of(f"onnx{bits}", size, home, 1, wide=True).folder
    loaded = exported.load(path, SimpleNamespace(device="auto", threads=1))
    web_folder.write_page(path, web_folder.served_of(size, *loaded))
    for there, here in web_folder.RUNTIME.items():
        shutil.copyfile(package / there, path / here)
    return path, engine_of(f"onnx{bits}", size, home, 1)


def sizes_of(path):
    """Megabytes of the folder: all, the runtime's part, all as a host sends it that compresses."""
    runtime = sum((path / name).stat().st_size for name in web_folder.RUNTIME.values())
    sizes = [file.stat().st_size for file in path.iterdir()]
    sent = [len(gzip.compress(file.read_bytes(), 6)) for file in path.iterdir()]
    return {"mb": sum(sizes) / 1e6, "runtime_mb": runtime / 1e6, "gzip_mb": sum(sent) / 1e6}


def speeds(page, engine, rounds):
    """{way: {"browser", "python": tokens/s}}."""
    prompt = np.random.default_rng(0).integers(4, VOCAB, PROMPT).tolist()
    found = {}
    for way, settings in WAYS.items():
        given = {"prompt": prompt, "settings": dataclasses.asdict(settings) | {"seed": 0}}
        taken = {"browser": [], "python": []}
        for _ in range(rounds + 1):
            taken["browser"].append(page.evaluate(WRITE, given))
            started = time.perf_counter()
            generate(engine, prompt, settings, [0])
            taken["python"].append(time.perf_counter() - started)
        found[way] = {name: NEW / statistics.median(all_of[1:]) for name, all_of in taken.items()}
    return found


def main():
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["5M", "38M"])
    parser.add_argument("--bits", type=int, choices=(4, 8, 32), default=8)
    parser.add_argument("--package", default=ROOT / "node_modules" / web_folder.PACKAGE)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isolated", action="store_true")
    args = parser.parse_args()
    document = {}
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as home:
            path, engine = folder_of(size, args.bits, Path(home), Path(args.package))
            found = document[size] = sizes_of(path)
            with hosted(path, ISOLATED if args.isolated else ()) as url, a_page() as (page, _):
                page.goto(url + "model.json")
                started = time.perf_counter()
                page.evaluate(OPEN)
                found["ready_s"] = time.perf_counter() - started
                found["isolated"] = page.evaluate("crossOriginIsolated")
                found |= speeds(page, engine, args.rounds)
        print(size, found, flush=True)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
