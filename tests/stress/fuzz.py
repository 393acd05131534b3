"""Malformed files and texts by the ten thousand: refused with a reason or read as what they say.

    python tests/stress/fuzz.py
    python tests/stress/fuzz.py --target meta --seed 123 --count 1

The first feeds about 30,000 inputs in some minutes; a failure prints its target and seed, with
which the second repeats it.

A target takes the bytes of one damaged file (or a text), puts them where they belong and reads them
the way the commands do. UserError is the only exception that may come out; no input may take 5 s,
200 MB or the process. Where a hash stands guard (raw, train.bin) every change has to be refused:
silent acceptances are counted. tests/test_fuzz.py drives the same targets.
"""
import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2]), str(HERE.parents[2] / "benchmarks")]

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import cli
import config
import model_config
import train
from common.console import UserError
from common.files import sealed, to_json
from harness import arguments, tiny_text
from sampling import settings, written
from text.dataset import TokenData, Windows
from text.documents import read_documents
from text.tokenizer import Tokenizer, normalise
from tiny import scratch
from training import run_folder

COUNTS = {
    "raw": 3000,
    "train.bin": 2000,
    "meta": 5000,
    "manifest": 2000,
    "state": 2500,
    "config": 2500,
    "header": 2500,
    "shard": 2500,
    "tokenizer": 600,
    "prompt": 3000,
    "prompts_file": 1000,
    "documents": 1500,
    "config_file": 1500,
}
SHARD = "model-00002-of-00002.safetensors"
GUARDED = ("raw", "train.bin")             # a changed byte must not go unnoticed
SECONDS, MEGABYTES = 5, 200
SHAPE = (
    "--d_model 16 --n_layers 1 --n_heads 2 --d_ff 16 --memory_slots 2 --seq_len 16 --batch_size 2 "
    "--grad_accum 1 --ema 0.9 "
    "--train_block_sizes T,8 --max_steps 2 --eval_interval 0 --threads 1 --no_amp "
    "--no_show_samples --live off"
).split()
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    7,
    2**31,
    2**63,
    10**400,
    1.5,
    -0.0,
    1e308,
    "",
    "x",
    "../../x",
    "\ud800",
    "०",
    [],
    {},
    [[]],
    {"size": 1},
    {"args": {}},
    [1e9] * 60,
    "T,0",
    "primary",
    "uint32",
    "9" * 5000,
]
ALPHABET = "aक़ि‌‍्ँ\u0301\u0000\n\t \ud800\ufeff\u202e▁_[MASK]<s>😀👩‍🚀e\u0301½ﬁ०9"


class Lab:
    """A prepared text and a checkpoint with all its files; copies of both that an input may ruin.
    """

    def __init__(self, folder):
        folder = Path(folder)
        self.text, self.run, self.spot = folder / "text", folder / "run", folder / "spot"
        tiny_text(self.text)
        assert (
            train.main(["--data_dir", str(self.text), "--output_dir", str(self.run), *SHAPE]) == 0
        )
        self.step = self.run / "step_000002"
        self.files = sorted(p.name for p in self.step.iterdir())
        self.tokenizer = Tokenizer(self.text / "t.model")
        shutil.copytree(self.text, self.spot / "text")
        shutil.copytree(self.step, self.spot / "ckpt")
        self.cut = Path(folder) / "cut" / self.step.name
        cut_in_two(self.step, self.cut)
        shutil.copytree(self.cut, self.spot / "cut")
        (self.spot / "in").mkdir()

    def seed(self, target, rng):
        """(name of the file or None, its sound bytes)."""
        if target == "raw":
            name = rng.choice(self.files)
            return name, (self.step / name).read_bytes()
        where = {
            "train.bin": "text/train.bin",
            "meta": "text/meta.json",
            "tokenizer": "text/t.model",
            "manifest": "run/step_000002/MANIFEST.json",
            "state": "run/step_000002/state.json",
            "header": "run/step_000002/model.safetensors",
            "shard": f"cut/step_000002/{SHARD}",
            "config": "run/step_000002/config.json",
        }
        if target.removesuffix("_file") in where:
            return None, (self.run.parent / where[target.removesuffix("_file")]).read_bytes()
        return None, {
            "documents": '{"text": "नमस्ते दुनिया", "prompt": "कहो"}\n\nmai kal gaya tha\n{"text": '
                         '1}\n',
            "prompts_file": "mai kal\nनमस्ते\n",
            "prompt": "",
        }[target].encode()


# ---- targets: bytes -> read ----------------------------------------------------------------------

def put(lab, name, data):
    (lab.spot / name).write_bytes(data)
    return lab.spot / name


def vouched(folder, *names):
    """The manifest names these files as they are, and no tensors that are not there."""
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    files = {name: entry for name, entry in manifest["files"].items() if (folder / name).exists()}
    for name in names:
        files[name] = {
            "size": (folder / name).stat().st_size,
            "sha256": checkpoint.file_sha256(folder / name),
        }
    (folder / "MANIFEST.json").write_bytes(to_json(checkpoint.seal({**manifest, "files": files})))


def cut_in_two(step, target):
    """A checkpoint whose weights lie in two files, as two ranks of --fsdp leave them."""
    shutil.copytree(step, target)
    tensors, names = (
        load_file(target / "model.safetensors"),
        [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)],
    )
    for i, name in enumerate(names):
        parts = {key: t.tensor_split(2)[i].contiguous() for key, t in tensors.items()}
        start = {
            key: {"saved_offsets": [i * len(t.tensor_split(2)[0])] + [0] * (t.ndim - 1)}
            for key, t in tensors.items()
        }
        save_file(parts, target / name, metadata={"DCP_SHARDING_INFO": json.dumps(start)})
    (target / "model.safetensors").unlink()
    vouched(target, *names)
    assert all(torch.equal(t, tensors[key]) for key, t in checkpoint.load(target).model.items())


def forged(lab, name, data, source="ckpt"):
    """A checkpoint with this file and a manifest that fits it, as a forger would leave it; read as
    train and sample do.
    """
    folder, step = lab.spot / source, lab.cut if source == "cut" else lab.step
    sound = (step / "MANIFEST.json").read_bytes()
    put(lab, f"{source}/{name}", data)
    vouched(folder, name)
    try:
        checkpoint.load_model(folder, "cpu", config.check_saved)
        saved = checkpoint.load(folder, parts=("model", "ema", "optimizer"))
        args, origins = cli.parse(config.TrainArgs, [], "train")
        args, _ = cli.resume_check({"args": checkpoint.section(saved, "args")}, args, origins)
        cfg = model_config.model_config(args, lab.tokenizer.vocab_size)
        checkpoint.may_fit(cfg, saved.model)
        run_folder.counters(saved)
    finally:
        put(lab, f"{source}/{name}", (step / name).read_bytes())
        put(lab, f"{source}/MANIFEST.json", sound)


def raw(lab, name, data):
    put(lab, f"ckpt/{name}", data)
    try:
        checkpoint.load_model(lab.spot / "ckpt", "cpu", config.check_saved)
    finally:
        put(lab, f"ckpt/{name}", (lab.step / name).read_bytes())


def prepared(lab, name, data):
    put(lab, f"text/{name}", data)
    try:
        found = TokenData(lab.spot / "text")
        found.tokenizer_path  # noqa: B018  (a property that checks a hash)
        Windows(found, 16, 1).batch(0, 2)
    finally:
        put(lab, f"text/{name}", (lab.text / name).read_bytes())


def meta(lab, data):
    prepared(lab, "meta.json", resealed(data, "seal", sealed))


def manifest(lab, data):
    raw(lab, "MANIFEST.json", resealed(data, "sha256", checkpoint.seal))


def resealed(data, key, seal):
    """A JSON object whose seal fits again, so that the checks behind the seal are reached; anything
    else, and an object that has lost its seal, stays as it is.
    """
    try:
        value = json.loads(data)
        if isinstance(value, dict) and key in value:
            return to_json(seal(value))
    except (ValueError, RecursionError, TypeError):
        pass
    return data


def tokenizer(lab, data):
    tok = Tokenizer(data)
    for text in ("मैं कल 12 ghar\n\tगया", "<s>\u0000😀"):
        assert tok.decode(tok.encode(text)) == normalise(text)


def prompt(lab, data):
    text = data.decode("utf-8", "surrogatepass")
    tok, whole = lab.tokenizer, normalise(text)
    ids = tok.encode(text)
    assert (
        normalise(whole) == whole
        and tok.decode(ids) == whole
        and all(3 < i < tok.vocab_size for i in ids)
    ), text
    args, _ = cli.parse(
        config.SampleArgs, ["--ckpt", "x", f"--prompt={text}", f"--text={text}"], "sample"
    )
    assert settings.read_prompts(args) == [text]
    if args.text is None:
        assert text.lower() == "none"  # the word for "no text", as with every flag of that default
        return
    fixed, sizes = written.with_gaps(args.text, tok)
    assert len(fixed) == len(sizes) + 1


def prompts_file(lab, data):
    path = put(lab, "in/prompts.txt", data)
    for text in settings.read_prompts(SimpleNamespace(prompt=(), prompts_file=path)):
        lab.tokenizer.encode(text)


def documents(lab, data):
    for name in ("in/a.txt.gz", "in/a.jsonl.xz", "in/a.txt", "in/a.jsonl"):
        try:
            for text in read_documents(put(lab, name, data), lambda _: None):
                normalise(text)
        except UserError:
            if name == "in/a.jsonl":
                raise


def config_file(lab, data):
    cli.parse(config.TrainArgs, ["--config", str(put(lab, "in/c.json", data))], "train")


TARGETS = {
    "raw": raw,
    "train.bin": lambda lab, data: prepared(lab, "train.bin", data),
    "meta": meta,
    "manifest": manifest,
    "state": lambda lab, data: forged(lab, "state.json", data),
    "config": lambda lab, data: forged(lab, "config.json", data),
    "header": lambda lab, data: forged(lab, "model.safetensors", data),
    "shard": lambda lab, data: forged(lab, SHARD, data, "cut"),
    "tokenizer": tokenizer,
    "prompt": prompt,
    "prompts_file": prompts_file,
    "documents": documents,
    "config_file": config_file,
}


# ---- damage --------------------------------------------------------------------------------------

def damage(data, rng):
    """A few random edits of bytes; never none."""
    out = bytearray(data)
    while bytes(out) == data:
        for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
            at, size, kind = (
                rng.randrange(len(out) + 1),
                rng.choice((1, 2, 8, 100)),
                rng.randrange(7),
            )
            if kind == 0 and at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del out[at:]
            elif kind == 2:
                del out[at:at + size]
            elif kind == 3:
                out[at:at] = rng.randbytes(size)
            elif kind == 4:
                out[at:] = bytes(len(out) - at)
            elif kind == 5:
                out[at : at + size] = rng.choice(
                    (b"\xff" * size, b"[" * 10_000, b'"', b"}{", b"\x00" * 8, b"\xef\xbb\xbf")
                )
            else:
                out[at:at] = out[at:at + size]
    return bytes(out)


def odd_json(data, rng):
    """The same JSON with a few values replaced, keys dropped, added or renamed."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = [value]
        for place in places:
            places += [
                v
                for v in (place.values() if isinstance(place, dict) else place)
                if isinstance(v, (dict, list)) and v
            ]
        place = rng.choice(places)
        key = (
            rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if place
            else None
        )
        if key is None or rng.random() < .15 and isinstance(place, dict):
            place[rng.choice(("new", "../x", "", "args", "model.safetensors"))] = copy.deepcopy(
                rng.choice(ODD)
            )
        elif rng.random() < .2:
            del place[key]
        else:
            place[key] = copy.deepcopy(rng.choice(ODD))
        if not value:
            break
    return json.dumps(value).encode()


def odd_header(data, rng):
    """A safetensors file whose header says something else; the length in front fits, mostly."""
    size = struct.unpack("<Q", data[:8])[0]
    head = odd_json(data[8:8 + size], rng)
    said = len(head) if rng.random() < .9 else rng.choice((0, 2 ** 63, len(data), 10 ** 8))
    return struct.pack("<Q", said) + head + data[8 + size:]


def odd_offsets(data, rng):
    """A part of a model whose header says that it lies elsewhere."""
    size = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8:8 + size])
    head["__metadata__"]["DCP_SHARDING_INFO"] = odd_json(
        head["__metadata__"]["DCP_SHARDING_INFO"], rng
    ).decode()
    head = json.dumps(head).encode()
    return struct.pack("<Q", len(head)) + head + data[8 + size:]


def make(lab, target, seed):
    """-> the arguments of the target for this seed."""
    rng = random.Random(f"{target} {seed}")
    name, data = lab.seed(target, rng)
    shaped = dict.fromkeys(("meta", "manifest", "state", "config", "config_file"), odd_json)
    shaped |= {"header": odd_header, "shard": odd_offsets if rng.random() < .5 else odd_header}
    if target == "prompt":
        data = "".join(rng.choice(ALPHABET) for _ in range(rng.choice((0, 1, 30, 3000)))).encode(
            "utf-8", "surrogatepass"
        )
        if rng.random() < .5:
            data += " ___".encode()
    elif target == "prompts_file" and rng.random() < .1:
        data = rng.randbytes(2000)
    elif target in shaped and rng.random() < .6:
        data = shaped[target](data, rng)
    else:
        data = damage(data, rng)
    return (name, data) if name else (data,)


def attempt(lab, target, arguments):
    """-> "refused" or "read"; anything but a UserError goes through. A hang is a TimeoutError."""
    def late(*_):
        raise TimeoutError(f"{SECONDS} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        TARGETS[target](lab, *arguments)
        return "read"
    except UserError as error:
        assert len(str(error)) > 10, "no reason given"
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def drive(lab, target, first, count):
    """In a forked child, so that a dead process is a finding too -> {refused, read, failures:
    [(seed, what)], mb, slowest}.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with os.fdopen(write, "w") as out:
            for seed in range(first, first + count):
                began = time.perf_counter()
                print(json.dumps({"start": seed}), file=out, flush=True)
                try:
                    result = attempt(lab, target, make(lab, target, seed))
                except BaseException as error:
                    result = f"{type(error).__name__}: {str(error)[:300]}"
                grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024
                line = {
                    "seed": seed,
                    "result": result,
                    "s": time.perf_counter() - began,
                    "mb": grown,
                }
                print(json.dumps(line), file=out, flush=True)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        lines = [json.loads(line) for line in told]
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    done = [line for line in lines if "seed" in line]
    failures = [
        (line["seed"], line["result"]) for line in done if line["result"] not in ("refused", "read")
    ]
    if status:
        failures.append((lines[-1].get("start"), f"the process ended with {status}"))
    return {
        **Counter(line["result"] for line in done if line["result"] in ("refused", "read")),
        "failures": failures,
        "mb": max(line["mb"] for line in done),
        "slowest_s": round(max(line["s"] for line in done), 2),
    }


def main():
    p = arguments(__doc__)
    p.add_argument("--target", choices=list(TARGETS), help="only this one")
    p.add_argument(
        "--count", type=int, default=0, help="inputs of each target; 0 = the default counts"
    )
    p.add_argument("--seed", type=int, default=0, help="the first seed")
    args = p.parse_args()
    torch.set_num_threads(1)
    results, began = {}, time.perf_counter()
    with scratch() as folder:
        lab = Lab(folder)
        for target in [args.target] if args.target else TARGETS:
            r = results[target] = drive(lab, target, args.seed, args.count or COUNTS[target])
            silent = r.get("read", 0) if target in GUARDED else 0
            print(
                f"{target:12} {r.get('refused', 0):6} refused {r.get('read', 0):6} read, {silent} "
                "silent; at most "
                f"{r['slowest_s']} s, +{r['mb']} MB; {len(r['failures'])} failures",
                flush=True,
            )
            for seed, what in r["failures"][:5]:
                print(f"    --target {target} --seed {seed} --count 1: {what}")
    total = {
        "inputs": sum(
            r.get("refused", 0) + r.get("read", 0) + len(r["failures"]) for r in results.values()
        ),
        "silent": sum(results[t].get("read", 0) for t in GUARDED if t in results),
        "failures": sum(len(r["failures"]) for r in results.values()),
        "seconds": round(time.perf_counter() - began),
    }
    fine = total["silent"] == total["failures"] == 0 and all(
        r["mb"] < MEGABYTES for r in results.values()
    )
    print(json.dumps({**total, "targets": results}))
    return not fine


if __name__ == "__main__":
    sys.exit(main())
