"""The parts of gpu_check.py that say how fast a GPU is.

    decode          tokens/s at batch 1 and 64, left to right and in blocks, with and without CUDA
                    graphs
    text            token files for the trainings below
    d512            `python -m train`, d 512, 10 layers, 512 tokens: both models; the primary is
                    killed with SIGKILL and resumed
    d512_compiled   the same with --compile
    1b_gqa          a transformer of a billion parameters at 2,048 tokens; killed and resumed
    1b_decoupled    the same with decoupled attention

A training is the real command in a process of its own, and its figures are those of its
train.jsonl, so that a training that is ended too early has figures, too. Without a GPU, and with
--tiny, all sizes are small.
"""
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
import traceback

import numpy as np
import torch

from harness import ROOT  # first: it puts the repository on the path

import checkpoint
import config
import prepare
from common import machine
from gpu_exact import attempt, sheet
from model import build_model
from model_config import ModelConfig, count_params, train_flops
from sampling.cuda_graphs import Graphs
from sampling.decode import generate
from sampling.settings import Settings
from sampling.torch_model import GraphModel, TorchModel
from text import gpt2
from text.token_file import meta_path, meta_text

POLL = 0.1          # seconds between two looks at a training's log
WARM = 3            # first steps of a training that no figure counts
GPT2_TOKENS = 2_000_000

D512 = dict(d_model=512, n_layers=10, n_heads=8, d_ff=1536, seq_len=512)
ONE_B = dict(
    model="backup",
    d_model=2048,
    n_layers=22,
    n_heads=32,
    d_ff=5632,
    seq_len=2048,
    optimizer="adamw",
    lr=3e-4,
    train_block_sizes="T,64,32",
)
SMALL = dict(d_model=64, n_layers=2, n_heads=4, d_ff=96, seq_len=64)
QUIET = ["--eval_interval", "0", "--no_show_samples", "--live", "off", "--tensorboard", "off"]


# ---- decoding ------------------------------------------------------------------------------------

def decode_part(figures):
    """Random weights: the speed does not depend on them."""
    device = machine.pick_device("auto")
    large = {name: D512[name] for name in ("d_model", "n_layers", "n_heads", "d_ff")}
    models = {
        "primary d512": dict(model="primary", memory_slots=16, **large),
        "backup d512": dict(model="backup", **large),
    }
    new = 128
    if figures.tiny:
        small = {name: SMALL[name] for name in large}
        models = {name: shape | small for name, shape in models.items()}
        new = 16
    elif torch.cuda.get_device_properties(device).total_memory > 20e9:
        widths = {name: ONE_B[name] for name in large}
        models["backup 1b gqa"] = dict(model="backup", attn="gqa", kv_heads=8, **widths)
    found = {}
    for name, shape in models.items():
        found[name] = {}
        vocabulary = 300 if figures.tiny else 8000
        tokens = new
        cells = [(1, 1), (1, 32), (64, 1), (64, 32)]    # rows, block
        if "1b" in name:  # where 64 blocks of logits are a gigabyte a forward
            vocabulary = gpt2.VOCAB_SIZE
            tokens = new // 4
            cells.pop()
        with device:
            model = build_model(ModelConfig(vocab_size=vocabulary, **shape)).eval()
        for rows, block in cells:
            if time.monotonic() > figures.deadline:
                found[name]["told"] = "no time was left for the rest"
                figures.put(tokens_per_second=found)
                return
            key = f"batch {rows}, " + ("left to right" if block == 1 else f"blocks of {block}")
            many = tokens if rows == 1 else tokens // 2
            found[name][key] = attempt(decoded, model, rows, block, many)
            figures.put(tokens_per_second=found)
        del model


def decoded(model, rows, block, tokens):
    """-> tokens/s of this model without and with CUDA graphs, and whether both write the same."""
    device = model.device
    chosen = Settings(
        tokens, 8, temperature=0.0, eos_id=None, mode="block_frozen", block_size=block
    )
    prompts = [[2, *range(10, 25)]] * rows
    seeds = list(range(rows))
    writers = {"eager": TorchModel(model)}
    if model.cfg.model == "primary":
        writers["graphs"] = GraphModel(model, Graphs(device))
    found = {}
    texts = {}
    for name, writer in writers.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = []
        for _ in range(3):          # the first one warms up, and records
            machine.synchronise(device)
            started = time.perf_counter()
            texts[name] = generate(writer, prompts, chosen, seeds).full_rows
            machine.synchronise(device)
            seconds.append(time.perf_counter() - started)
        found[name] = {
            "tok_s": rows * tokens / min(seconds[1:]),
            "first_s": seconds[0],
            "peak_mb": machine.peak_memory_mb(device),
        }
    if "graphs" in writers:
        recorded = len(writers["graphs"].graphs.kept)
        found["same_text"] = {"right": texts["eager"] == texts["graphs"]}
        found["recorded"] = {"right": recorded > 0 or device.type == "cpu", "graphs": recorded}
        found["faster"] = found["graphs"]["tok_s"] / found["eager"]["tok_s"]
    return found


# ---- texts ---------------------------------------------------------------------------------------

def text_part(figures):
    """A starter corpus, and, where GPT-2's tokenizer can be had, a file of random ids of GPT-2's:
    what a step costs does not depend on the text.
    """
    chars, vocabulary = (7000, 400) if figures.tiny else (600_000, 4000)
    folder = figures.folder / "starter"
    prepare.main(
        [
            "--source", "builtin", "--max_chars", str(chars), "--tokenizer_vocab",
            str(vocabulary), "--data_dir", str(folder), "--tokenizer", str(folder / "t.model"),
        ]
    )
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    figures.put(starter={"tokens": meta["train_tokens"], "pieces": meta["vocab_size"]})
    if gpt2.tokenizers is None:
        figures.put(
            gpt2="the package tokenizers is not installed: the 1B models train on the starter "
            "corpus, whose vocabulary is smaller"
        )
        return
    count = GPT2_TOKENS // 100 if figures.tiny else GPT2_TOKENS
    ids = np.random.default_rng(0).integers(0, gpt2.END_ID, count).astype(np.uint16)
    ids[::1000] = gpt2.END_ID
    path = figures.folder / "gpt2.npy"
    np.save(path, ids)
    meta = {"tokens": count, "encoding": gpt2.ENCODING, "vocab_size": gpt2.VOCAB_SIZE}
    meta_path(path).write_text(meta_text(meta), encoding="utf-8")
    figures.put(gpt2={"tokens": count, "pieces": gpt2.VOCAB_SIZE})


def text_for(figures, large):
    """The text of a training; large: GPT-2's ids, if there are any."""
    path = figures.folder / "gpt2.npy"
    if large and path.exists():
        return path
    path = figures.folder / "starter"
    if not (path / "meta.json").exists():
        raise RuntimeError("there is no text: the part `text` has to come first, and to succeed")
    return path


# ---- a training ----------------------------------------------------------------------------------

class Training:
    """`python -m train` in a process of its own."""

    def __init__(self, run, words):
        self.run = run
        self.output = run.with_suffix(".txt")
        self.started = time.monotonic()
        self.file = open(self.output, "ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "train", *words, *QUIET],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self.file,
            stderr=subprocess.STDOUT,
        )

    def wait(self, deadline, until=None):
        """Until it ends, or until() is true -> seconds since its start; None: the deadline came."""
        while self.process.poll() is None:
            if until is not None and until():
                break
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL)
        return time.monotonic() - self.started

    def kill(self):
        """With SIGKILL, which no process can answer -> its exit code."""
        self.process.kill()
        code = self.process.wait()
        self.file.close()
        return code

    def lines(self, start=""):
        """What it printed, as far as it begins with `start`."""
        text = self.output.read_text(encoding="utf-8", errors="replace")
        return [line for line in text.splitlines() if line.strip() and line.startswith(start)]


def events(run, kind):
    """The whole lines of this event in a run's train.jsonl."""
    try:
        text = (run / "train.jsonl").read_text(encoding="utf-8")
    except OSError:
        return []
    found = []
    for line in text.split("\n")[:-1]:
        event = json.loads(line)
        if event["event"] == kind:
            found.append(event)
    return found


def last_step(run):
    steps = events(run, "train")
    return steps[-1]["step"] if steps else 0


def saved_step(run):
    """The step that `latest` points to, 0 before the first save."""
    try:
        return checkpoint.read_pointer(run, "latest")[0] or 0
    except Exception:  # it is just being written
        return 0


def words_of(settings):
    words = []
    for name, value in settings.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def trained(figures, name, settings, deadline, kill_after=0):
    """A training, put into the figures under this name; one of the 1B reads GPT-2's ids, if there
    are any. kill_after: it is killed with SIGKILL behind the checkpoint of this step, and resumed.
    """
    run = figures.folder / "runs" / name
    run.parent.mkdir(exist_ok=True)
    large = "attn" in settings
    words = ["--data_dir", str(text_for(figures, large)), "--output_dir", str(run)]
    words += words_of(settings)
    told = {"command": " ".join(words_of(settings))}
    training = Training(run, words)
    try:
        if kill_after:
            again = ["--auto_batch"] if settings.get("auto_batch") else []
            resumed_after_kill(training, run, deadline, kill_after, told, again)
        else:
            seconds = training.wait(deadline)
            told["ended"] = seconds is not None
            told["seconds"] = seconds
            told["code"] = training.process.poll()
        told |= speeds(run)
    except Exception as error:  # the next training is not to suffer from it
        traceback.print_exc()
        told["error"] = f"{type(error).__name__}: {error}"[:500]
    finally:
        training.kill()
        told["peak_tflops"] = peak_of(run)
        wanted = settings["max_steps"]
        told["right"] = told.get("last_step") == wanted and told.get("code") == 0
        if not told["right"]:
            told["last_lines"] = training.lines()[-8:]
        if "compile" in settings:
            said = training.lines("compile: ")
            done = any("every block rule in" in line for line in said)
            told["compiler"] = {"right": done, "said": said}
        figures.put(**{name: told})
        shutil.rmtree(run, ignore_errors=True)


def resumed_after_kill(training, run, deadline, step, told, again):
    """The training is killed two steps behind its checkpoint and goes on in a second process, which
    needs the flags `again`, too.
    """
    came = {}

    def past_the_save():
        now = last_step(run)
        if now >= step:
            came.setdefault("step", time.monotonic())
        if saved_step(run) >= step:
            came.setdefault("saved", time.monotonic())
        return "saved" in came and now >= step + 2

    told["code"] = None
    if training.wait(deadline, past_the_save) is None:
        told["ended"] = False
        return
    if training.process.poll() is not None:
        told["code"] = training.process.poll()
        told["killed"] = {"right": False, "error": "it ended before it could be killed"}
        return
    code = training.kill()
    before = {event["step"]: event["loss"] for event in events(run, "train")}
    lines = len(events(run, "train"))
    killed = {
        "code": code,
        "at_step": max(before),
        "checkpoint": saved_step(run),
        "save_s": came["saved"] - came["step"],
    }

    second = Training(run, ["--resume", str(run), *again])
    try:
        first_line = second.wait(deadline, lambda: len(events(run, "train")) > lines)
        if first_line is not None:
            killed["seconds_to_first_step"] = first_line
        seconds = second.wait(deadline)
    finally:
        second.kill()
    told["ended"] = seconds is not None
    told["seconds"] = seconds
    told["code"] = second.process.poll() if seconds is not None else None

    # the same steps again: on a CPU to the last digit, on a GPU as far as its kernels repeat
    repeated = events(run, "train")[lines:]
    gaps = []
    for event in repeated:
        if event["step"] in before:
            gaps.append(abs(event["loss"] - before[event["step"]]))
    killed["steps_again"] = len(gaps)
    killed["largest_loss_change"] = max(gaps, default=None)
    starts = bool(repeated) and repeated[0]["step"] == killed["checkpoint"] + 1
    killed["right"] = starts and bool(gaps) and max(gaps) < 0.02
    told["killed"] = killed


def peak_of(run):
    """What the training's MFU is measured against: the fastest product that it saw."""
    found = events(run, "meta")
    return found[-1]["peak_flops"] / 1e12 if found else None


def speeds(run):
    """Of train.jsonl: tokens/s, TFLOP/s and MFU, by block rule and in the proportions that a whole
    run has; the peak of memory. The first steps of a process, and the first one of each rule, are
    left out.
    """
    steps = events(run, "train")
    found = {"last_step": steps[-1]["step"] if steps else 0}
    if not steps:
        return found
    meta = events(run, "meta")[-1]
    shape = ModelConfig.from_dict(meta["config"]["model"])
    args = config.TrainArgs(**meta["config"]["args"])
    device = meta["device_name"]
    top = sheet(device) if meta["device"].startswith("cuda") else None

    groups = {}
    for number, event in enumerate(steps):
        groups.setdefault(event["block"], []).append((number, event))
    rules = {}
    for rule, members in sorted(groups.items(), reverse=True):
        kept = [event for number, event in members[1:] if number >= WARM] or [members[-1][1]]
        flops = []
        for event in kept:
            flops.append(train_flops(shape, args.seq_len, rule, event["mask"]) * event["tok_s"])
        rules[str(rule)] = {
            "steps": len(kept),
            "step_ms": statistics.median(event["step_ms"] for event in kept),
            "tok_s": statistics.median(event["tok_s"] for event in kept),
            "tflops": statistics.median(flops) / 1e12,
        }

    # a step of each rule as often as a whole run has it
    tokens = args.rows * args.seq_len
    seconds = flops = weight = 0.0
    for rule, share in args.rule_shares.items():
        if str(rule) in rules:
            mine = rules[str(rule)]
            weight += share
            seconds += share * tokens / mine["tok_s"]
            flops += share * tokens / mine["tok_s"] * mine["tflops"]
    tflops = flops / seconds
    found |= {
        "params": count_params(shape),
        "device": device,
        "precision": meta["precision"],
        "tokens_per_step": tokens,
        "rules": rules,
        "rules_seen": weight,
        "tok_s": weight * tokens / seconds,
        "tflops": tflops,
        "mfu_of_measured_peak": tflops * 1e12 / meta["peak_flops"],
        "mfu_of_sheet": tflops * 1e12 / top if top else None,
        "peak_mb": max(event["mem_mb"] for event in steps),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "finite": {"right": all(event["loss"] is not None for event in steps)},
        "skipped": steps[-1]["skipped"],
    }
    return found


# ---- the trainings -------------------------------------------------------------------------------

def d512_settings(tiny):
    shape = dict(SMALL, batch_size=4, grad_accum=1) if tiny else D512
    if not tiny:
        shape = shape | dict(batch_size=64, grad_accum=1, auto_batch=True)
    return shape | dict(max_steps=16 if tiny else 50)


def d512_part(figures):
    """Both models, with the block rules of a run; the primary is killed once."""
    shape = d512_settings(figures.tiny)
    half = shape["max_steps"] // 2
    now = time.monotonic()
    middle = now + 0.6 * (figures.deadline - now)
    saves = dict(save_interval=half)
    trained(figures, "primary", shape | saves, middle, half)
    trained(figures, "backup", shape | dict(model="backup"), figures.deadline)


def d512_compiled_part(figures):
    """The primary with --compile, and with fewer block rules, as each has forms to compile. Beside
    the part d512 by its rules.
    """
    shape = d512_settings(figures.tiny) | dict(compile=True)
    shape.pop("auto_batch", None)
    rules = dict(train_block_sizes="T,32")
    if figures.tiny:
        rules = dict(train_block_sizes="T", ar_fade=0)
    trained(figures, "primary", shape | rules, figures.deadline)


def large_settings(figures, attn):
    """The 1B shape with what fits: rows of a forward by the GPU's memory."""
    settings = ONE_B | attn
    if figures.tiny:
        small = dict(SMALL, train_block_sizes="T,16", max_steps=16, batch_size=4, grad_accum=1)
        return settings | small
    device = machine.pick_device("auto")
    memory = torch.cuda.get_device_properties(device).total_memory
    rows = 4 if memory >= 70e9 else 1
    settings |= dict(batch_size=rows, grad_accum=8 // rows, auto_batch=True, max_steps=50)
    if memory < 70e9:
        settings["activation_checkpointing"] = True
    return settings


def needs_disk(figures, settings, copies):
    """A checkpoint has 12 bytes a parameter; a run that can not save would fail late."""
    if figures.tiny:
        return
    params = 1.3e9
    free = shutil.disk_usage(figures.folder).free
    need = copies * 12 * params
    if free < need:
        raise RuntimeError(
            f"{figures.folder} has {free / 1e9:.0f} GB free, {copies} checkpoints of 1B need "
            f"{math.ceil(need / 1e9)}: name another --folder"
        )


def gqa_part(figures):
    settings = large_settings(figures, dict(attn="gqa"))
    if not figures.tiny:
        settings["kv_heads"] = 8
    half = settings["max_steps"] // 2
    needs_disk(figures, settings, 3)
    saves = dict(save_interval=half, keep_last=1, keep_full=1)
    trained(figures, "gqa", settings | saves, figures.deadline, half)


def decoupled_part(figures):
    settings = large_settings(figures, dict(attn="decoupled"))
    needs_disk(figures, settings, 2)
    trained(figures, "decoupled", settings, figures.deadline)


PARTS = {
    "decode": decode_part,
    "text": text_part,
    "d512": d512_part,
    "d512_compiled": d512_compiled_part,
    "1b_gqa": gqa_part,
    "1b_decoupled": decoupled_part,
}
