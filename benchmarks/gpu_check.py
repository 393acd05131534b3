"""Is it right on a GPU, and how fast? One prepared script of less than 8 minutes, without network.

    python benchmarks/gpu_check.py --out_json gpu_check.json
    python benchmarks/gpu_check.py --tiny                      # small sizes; by itself on a CPU
    python benchmarks/gpu_check.py --parts machine exact decode
    python benchmarks/gpu_check.py --seconds 240               # every part's share in proportion

Each part is a process of its own with a time limit, and writes its figures as it goes: a part that
fails, hangs or breaks the GPU's context stops no other, and keeps what it had found. What a part
does not use of its time is left to those after it. The last line of the output, and the file of
--out_json, which is rewritten after every part, are one JSON document; docs/GPU.md says what it
holds. The exit code is 0 if every part is done and nothing in it is wrong, else 1.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from harness import ROOT, arguments  # first: it puts the repository on the path

from common.console import commit_hash

SECONDS = 465           # the whole; the parts below have as many together
PARTS = {               # name: seconds that it may count on. In this order
    "machine": 20,
    "exact": 50,
    "tests": 20,
    "decode": 50,
    "text": 20,
    "d512": 75,
    "1b_gqa": 105,
    "1b_decoupled": 50,
    "d512_compiled": 75,
}
PATIENCE = 0.85         # of its limit, after which a part ends by itself what it has started
LINES = 12              # of the end of a part's output that a failure tells


class Figures:
    """What a part has found so far, in a file that is whole at every moment."""

    def __init__(self, path, tiny, deadline):
        self.path = path
        self.found = {}
        self.tiny = tiny
        self.deadline = deadline            # time.monotonic() at which the part ends by itself
        self.folder = path.parent

    def put(self, **values):
        from training.logs import finite     # late, as the process that counts time needs no torch
        self.found |= finite(values)
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(self.found), encoding="utf-8")
        os.replace(fresh, self.path)

    def check(self, name, right, **values):
        """A figure that can be wrong."""
        self.put(**{name: {"right": bool(right), **values}})


# ---- a part, in its own process ------------------------------------------------------------------

def be_part(args):
    """Runs the part --child -> exit code."""
    import torch

    import gpu_exact
    import gpu_speed
    tiny = args.tiny or not torch.cuda.is_available()
    deadline = time.monotonic() + PATIENCE * args.seconds
    figures = Figures(Path(args.folder, f"{args.child}.json"), tiny, deadline)
    figures.put(tiny=tiny)
    part = (gpu_exact.PARTS | gpu_speed.PARTS)[args.child]
    try:
        part(figures)
    except Exception as error:  # whatever it is, it is told in words
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        figures.put(error=f"{type(error).__name__}: {first}"[:500])
        return 1
    return 0


# ---- the parts, one after the other --------------------------------------------------------------

def end(process):
    """End a part and all that it has started; they are one process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_part(name, seconds, args, folder):
    """-> what the document says of this part."""
    words = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    words += ["--seconds", str(seconds)]
    if args.tiny:
        words.append("--tiny")
    output = folder / f"{name}.txt"
    started = time.monotonic()
    state = "done"
    with open(output, "wb") as file:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
            if code:
                state = "failed"
        except subprocess.TimeoutExpired:
            state = "cut"
            code = None
        finally:
            end(process)

    found = {"state": state, "seconds": round(time.monotonic() - started, 1), "limit_s": seconds}
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        figures = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        figures = {}
    error = figures.pop("error", None)
    if state == "cut":
        found["error"] = f"ended after its {seconds:.0f} seconds; what it had found by then is kept"
    elif state == "failed":
        found["error"] = error or f"ended with code {code}"
    if state != "done":
        found["last_lines"] = lines[-LINES:]
    found["wrong"] = wrong_in(figures)
    found["notices"] = [line for line in lines if line.startswith(("notice", "warning"))][:LINES]
    found["figures"] = figures
    return found


def wrong_in(figures, path=""):
    """The names of the figures, however deep, that are checks and are not right."""
    found = []
    if isinstance(figures, dict):
        if figures.get("right") is False:
            found.append(path)
        for key, value in figures.items():
            found += wrong_in(value, f"{path}/{key}".lstrip("/"))
    return found


class Ended(Exception):
    """Somebody ends the whole."""


def ended(number, _frame):
    raise Ended(signal.Signals(number).name)


def run_parts(args, folder, document):
    """All parts, each told in a line; document grows with them."""
    began = time.monotonic()
    left_out = set(PARTS) - set(args.parts)
    total = sum(PARTS[name] for name in args.parts)
    later = total
    for name in args.parts:
        # its own share, and what those before it did not use
        later -= PARTS[name]
        share = args.seconds / total
        seconds = args.seconds - (time.monotonic() - began) - share * later
        if seconds < 1:
            document["parts"][name] = {"state": "skipped", "error": "no time was left for it"}
        else:
            print(f"{name}: up to {seconds:.0f} s", flush=True)
            document["parts"][name] = run_part(name, round(seconds, 1), args, folder)
        told = document["parts"][name]
        tell(name, told)
        document["seconds"] = round(time.monotonic() - began, 1)
        write(args, document)
    for name in left_out:
        document["parts"][name] = {"state": "skipped", "error": "--parts does not name it"}


def tell(name, told):
    words = [f"{name}: {told['state']}"]
    if "seconds" in told:
        words.append(f"{told['seconds']:.0f} s")
    if told.get("error"):
        words.append(told["error"])
    if told.get("wrong"):
        words.append(f"WRONG: {', '.join(told['wrong'])}")
    print(" | ".join(words), flush=True)


def write(args, document):
    if args.out_json:
        fresh = Path(f"{args.out_json}.new")
        fresh.write_text(json.dumps(document, indent=1), encoding="utf-8")
        os.replace(fresh, args.out_json)


def is_good(document):
    """Whether every part that was asked for is done and right."""
    for told in document["parts"].values():
        asked = told.get("error") != "--parts does not name it"
        if asked and (told["state"] != "done" or told.get("wrong")):
            return False
    return True


def main():
    p = arguments(__doc__)
    p.add_argument("--tiny", action="store_true", help="small sizes; by itself without CUDA")
    p.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    p.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    p.add_argument("--out_json", help="the document, rewritten after every part")
    p.add_argument("--folder", help="for texts and checkpoints: 30 GB free; none = a temporary one")
    p.add_argument("--child", help="for its own use: the part that this process is")
    args = p.parse_args()
    if args.child:
        return be_part(args)

    args.parts = [name for name in PARTS if name in args.parts]     # some need those before them
    document = {
        "what": "gpu_check",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "commit": commit_hash(ROOT),
        "limit_s": args.seconds,
        "seconds": 0.0,
        "ended_by": None,
        "parts": {},
    }
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="gpu_check_", dir=args.folder))
    signal.signal(signal.SIGTERM, ended)
    signal.signal(signal.SIGINT, ended)
    try:
        run_parts(args, folder, document)
    except Ended as error:
        document["ended_by"] = str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    document["good"] = is_good(document) and not document["ended_by"]
    write(args, document)
    print(json.dumps(document))
    return 0 if document["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
