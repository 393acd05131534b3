"""Kill training anywhere: a resumed run ends with the weights of a run that nobody touched.

    python tests/stress/crash.py
    python tests/stress/crash.py --kills 12 --cases 2 --every 70 --exhaustive 1 --stops 3 --real 0

The first makes 200 kills, at every operation of four saves, by signals and by a full disk; the
second is what tests/test_crash.py runs. Equal are the final weights, averages and moments after
--resume_latest.

Every kill is SIGKILL and comes at a point of progress, never by the clock: before an operation on
the disk, in the middle of a file or of a log line, inside an optimizer's step. The points are hooks
of this file in the child; the product has none. Children are forked from one process that has
imported torch and computed nothing; some are started as a user does. Compared bit for bit: model,
averages, optimizer, counters, the loss of each step, each evaluation. Prints a table, last line
JSON.
"""
import ctypes
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2]), str(HERE.parents[2] / "benchmarks")]

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
import torch._dynamo  # noqa: F401  (what train imports late, imported once)
import tqdm

import checkpoint
import evaluate  # noqa: F401
import train
from common import console
from common.console import UserError
from common.files import read_json
from harness import ROOT, arguments, tiny_text
from sampling import decode  # noqa: F401
from stress.faults import points
from tiny import scratch
from training import logs, optim

STEPS, SAVES = 8, 4
SHAPE = (
    "--d_model 16 --n_layers 2 --n_heads 2 --d_ff 32 --memory_slots 2 --seq_len 16 --batch_size 4 "
    "--block_size 4 "
    "--lr 3e-3 --eval_batches 1 --threads 1 --no_amp --no_show_samples --live off --resume_latest "
    f"--max_steps {STEPS} --save_interval {STEPS // SAVES} --eval_interval 3 --keep_last 2 "
    "--keep_full 1"
).split()
CASES = {
    name: flags.split()
    for name, flags in {
        "primary muon, EMA, blocks, "
        "accumulation": "--optimizer muon --ema .9 --grad_accum 2 --train_block_sizes T,8,4 "
                        "--dropout .1",
        "backup adamw, EMA, blocks, "
        "spans": "--model backup --optimizer adamw --ema .9 --grad_accum 1 --masking_strategy span"
        " --train_block_sizes T,8",
        "primary lion, EMA, "
        "accumulation": "--optimizer lion --ema 0.9 --grad_accum 3 --train_block_sizes T "
                        "--spike_factor 9",
        "backup muon, blocks, "
        "accumulation": "--model backup --optimizer muon --grad_accum 2 --train_block_sizes 8,4 "
                        "--dropout 0.1",
        "primary adamw, discrete "
        "time": "--optimizer adamw --grad_accum 1 --train_block_sizes T,4 --time_mode discrete"
        " --timestep_sampling uniform",
        "backup lion, EMA, "
        "cosine": "--model backup --optimizer lion --ema 0.5 --grad_accum 2 --mask_schedule cosine",
    }.items()
}
FIGURES = ("loss", "mask", "lr", "gnorm", "block", "first")
COUNTERS = (
    "position", "tokens_seen", "skipped", "ema_updates", "best", "kept", "losses", "rollbacks",
    "data_sha256",
)


# ---- in the child --------------------------------------------------------------------------------

class Bomb:
    """Counts the points that a child passes, by kind, and sends it `signals` at number `at` of
    `kind`; tells the parent.
    """

    def __init__(self, kind=None, at=0, signals=(signal.SIGKILL,)):
        self.kind, self.at, self.signals = kind, at, signals
        self.passed, self.saving, self.ops = Counter(), False, []

    def point(self, name, kind=None):
        kind = kind or ("save" if self.saving else "other")
        self.passed[kind] += 1
        self.ops.append(name)
        if kind == self.kind and self.passed[kind] == self.at + 1:
            os.write(self.pipe, json.dumps({"hit": name, "in_save": self.saving}).encode())
            for s in self.signals:
                os.kill(os.getpid(), s)

    def arm(self, pipe, folder):
        self.pipe = pipe
        self.disk = points(lambda name, *_: self.point(name), folder)
        self.disk.__enter__()                                     # until this process ends
        for owner, name in ((optim.Optimizers, "step"), (optim.EMA, "update")):
            setattr(owner, name, self.around(f"optim {name}", getattr(owner, name)))
        save, write_line = checkpoint.save, logs.JsonLines.write

        def watched_save(*args, **kwargs):
            self.saving = True
            try:
                return save(*args, **kwargs)
            finally:
                self.saving = False

        def watched_line(log, event, **values):
            self.point("before a log line", "line")
            size = os.fstat(log.file.fileno()).st_size
            write_line(log, event, **values)
            # tear it
            if (self.kind, self.passed["line"], self.signals[0]) == (
                "line",
                self.at,
                signal.SIGKILL,
            ):
                log.file.truncate((size + os.fstat(log.file.fileno()).st_size) // 2)
            self.point("after a log line", "line")
        checkpoint.save, logs.JsonLines.write = watched_save, watched_line

    def around(self, name, real):
        def call(*args, **kwargs):
            self.point(name, "step")
            result = real(*args, **kwargs)
            self.point(f"after {name}", "step")
            return result
        return call


def fork(work, out):
    """work(pipe) in a forked child, its output in the file `out` -> (exit status, what it wrote
    into the pipe).
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.close(read)
            fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            try:
                work(write)
            except SystemExit as end:
                code = end.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    told = b""
    while part := os.read(read, 65536):
        told += part
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), told


# ---- in the parent -------------------------------------------------------------------------------

class Lab:
    """A folder with prepared text, and for each case the run that nobody touched."""

    def __init__(self, folder):
        self.folder, self.number, self.references = Path(folder), itertools.count(), {}
        tqdm.tqdm.monitor_interval = 0  # no thread in the process that forks
        torch.set_num_threads(1)
        assert (
            fork(
                lambda _: sys.exit(not tiny_text(self.folder / "text")), self.folder / "prepare.out"
            )[0]
            == 0
        )

    def words(self, case, run):
        return [
            "--data_dir", str(self.folder / "text"), "--output_dir", str(run), *SHAPE, *CASES[case],
        ]

    def new(self):
        return self.folder / f"run{next(self.number)}"

    def launch(self, case, run, bomb=None, out=None):
        """One start of training -> (exit status, what the bomb said: {} if it was not reached)."""
        bomb = bomb or Bomb()

        def work(pipe):
            bomb.arm(pipe, self.folder)
            try:
                console.run(train.main, self.words(case, run))
            finally:
                if not bomb.kind:
                    os.write(pipe, json.dumps({"passed": bomb.passed, "ops": bomb.ops}).encode())
        status, told = fork(work, out or f"{run}.out")
        return status, json.loads(told or b"{}")

    def reference(self, case):
        if case not in self.references:
            run = self.new()
            status, told = self.launch(case, run)
            assert status == 0, Path(f"{run}.out").read_text()[-3000:]
            self.references[case] = outcome(run), told["passed"]
            shutil.rmtree(run)
        return self.references[case]

    def check(self, case, run):
        """Finish the run if it is not -> what differs from the reference, in words, or None."""
        status, _ = self.launch(case, run)
        if status != 0:
            return f"exit {status}: " + Path(f"{run}.out").read_text()[-300:]
        want, got = self.reference(case)[0], outcome(run)
        for key in want:
            # a kill in the last prune
            if got[key] != want[key] and not (key == "steps" and want[key] <= got[key]):
                return f"{key} differs: {got[key]} instead of {want[key]}"
        shutil.rmtree(run)
        os.unlink(f"{run}.out")


def outcome(run):
    """All that must not depend on kills."""
    end, lines = (
        run / checkpoint.step_name(STEPS),
        [json.loads(line) for line in (run / "train.jsonl").read_bytes().splitlines()],
    )
    state = read_json(end / "state.json")
    return {
        "files": {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(end.glob("*.safetensors"))
        },
        "state": {key: state[key] for key in COUNTERS},
        "curve": {
            line["step"]: [line[key] for key in FIGURES]
            for line in lines
            if line["event"] == "train"
        },
        "evals": {line["step"]: line["val_nelbo"] for line in lines if line["event"] == "eval"},
        "best": (run / "best").read_text().split()[0],
        "latest": (run / "latest").read_text().split()[0],
        "steps": set(checkpoint.list_steps(run)),
    }


def whole(run):
    """After a kill and before any clean-up: what bears a checkpoint's name is one."""
    try:
        for folder in checkpoint.list_steps(run).values():
            checkpoint.verify(folder)
    except UserError as damage:
        return str(damage)


def random_kills(lab, cases, wanted, rng, real):
    """Runs that are killed up to five times each, then finished; -> figures."""
    count, failures, runs = Counter(), [], 0
    for case in itertools.cycle(cases):
        if count["kills"] >= wanted:
            break
        run, passed, runs = lab.new(), lab.reference(case)[1], runs + 1
        for _ in range(rng.randint(1, 5)):
            kind = rng.choices(("save", "line", "step", "other"), (13, 3, 3, 1))[0]
            status, told = lab.launch(
                case,
                run,
                Bomb(
                    kind,
                    rng.randrange(
                        passed[kind] if rng.random() < 0.4 else max(1, passed[kind] // SAVES)
                    ),
                ),
            )
            if "hit" not in told:
                break  # it came to its end before the point
            assert status == -signal.SIGKILL, status
            count.update({"kills": 1, "in_save": told["in_save"], kind: 1})
            if problem := whole(run):
                failures.append(f"{case}: after {told['hit']}: {problem}")
        if problem := lab.check(case, run):
            failures.append(f"{case}: {problem}")
    for case in list(cases)[:real]:  # and as a user starts it: python -m train
        run, lines = lab.new(), rng.randint(5, 12)
        with (
            open(f"{run}.out", "ab") as out,
            subprocess.Popen(
                [sys.executable, "-m", "train", *lab.words(case, run)],
                cwd=ROOT,
                stderr=out,
                stdout=out,
            ) as process,
        ):
            while process.poll() is None:
                if (run / "train.jsonl").exists() and (run / "train.jsonl").read_bytes().count(
                    b"\n"
                ) >= lines:
                    process.kill()
                    break
                time.sleep(0.002)
            count.update({"kills": process.wait() == -signal.SIGKILL, "real": 1})
        if problem := lab.check(case, run):
            failures.append(f"{case}: python -m train: {problem}")
    return {
        **{
            key: count[key] for key in ("kills", "in_save", "save", "line", "step", "other", "real")
        },
        "runs": runs + real,
        "failures": failures,
    }


def every_operation(lab, case, stride):
    """One run per I/O operation of the first four saves, killed before it."""
    points = range(0, lab.reference(case)[1]["save"], stride)
    failures, names = [], Counter()
    for k in points:
        run = lab.new()
        status, told = lab.launch(case, run, Bomb("save", k))
        assert status == -signal.SIGKILL and told["in_save"], (k, status, told)
        names[told["hit"]] += 1
        problem = whole(run) or lab.check(case, run)
        failures += [f"{case}: operation {k} ({told['hit']}): {problem}"] if problem else []
    return {
        "case": case,
        "points": len(points),
        "of": lab.reference(case)[1]["save"],
        "operations": names,
        "failures": failures,
    }


TERM, INT = signal.SIGTERM, signal.SIGINT
# the signals, and the points at which they come, one start after another; a second SIGINT means now
STOPS = (
    ((TERM,), [("line", 4)] * 5),
    ((INT,), [("save", 20)]),
    ((INT, INT), [("step", 8), ("save", 50)]),
    ((INT,), [("line", 2)]),
    ((TERM,), [("line", 9)]),
    ((INT,), [("step", 5)]),
    ((TERM,), [("save", 3)]),
    ((TERM, INT), [("save", 50)]),
)


def stops(lab, case, some):
    """SIGINT and SIGTERM save and leave with 0, a second SIGINT at once with 130, wherever they
    come; many change nothing.
    """
    failures, slowest = [], 0.0
    for signals, plan in STOPS[:some]:
        run = lab.new()
        for kind, at in plan:
            began = time.perf_counter()
            status, told = lab.launch(case, run, Bomb(kind, at, signals))
            slowest = max(slowest, time.perf_counter() - began)
            lines = (run / "train.jsonl").read_text()
            # before step 1 there is nothing to save
            saved = '"save"' in lines or '"train"' not in lines or len(signals) == 2
            if (
                "hit" not in told
                or status != (130 if len(signals) == 2 else 0)
                or not saved
                or whole(run)
            ):
                failures.append(f"{signals} at {kind} {at}: exit {status}, {whole(run)}")
        if problem := lab.check(case, run):
            failures.append(f"{signals} at {plan}: {problem}")
    return {"plans": len(STOPS[:some]), "slowest_s": round(slowest, 2), "failures": failures}


# ---- a disk that is full -------------------------------------------------------------------------

def tmpfs(folder, size):
    """A small file system of our own at `folder`, seen by this process and its children alone -> is
    there one?
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_mount, new_user, private = 0x20000, 0x10000000, 1 << 18 | 1 << 14
    if libc.unshare(new_mount) and libc.unshare(new_mount | new_user):
        return False
    libc.mount(None, b"/", None, private, None)
    return libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) == 0


def full_disk(lab, case):
    """A ballast file leaves room for one checkpoint and a half: training goes on, says so, ends
    with 1; then room is made.
    """
    want, disk = lab.reference(case)[0], lab.folder / "disk"
    disk.mkdir()

    def work(pipe):
        if not tmpfs(disk, 8 << 20):
            os.write(pipe, b'{"skipped": "no tmpfs may be mounted here"}')
            return
        run, failures = disk / "run", []

        def launch(*bomb):
            out = lab.new().with_suffix(".out")
            return lab.launch(case, run, *bomb, out=out)[0], out.read_text()
        launch(Bomb("save", 9, (signal.SIGTERM,)))                # the first save, and a stop
        one = sum(p.stat().st_size for p in (run / "step_000002").iterdir())
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(bytes(max(0, free - one // 2 // 4096 * 4096)))
        before = {p: p.read_bytes() for p in (run / "step_000002").iterdir()}
        status, text = launch()
        if (
            status != 1
            or "No space left" not in text
            or "could not be saved" not in text
            or "Traceback" in text
        ):
            failures.append(f"exit {status}: {text[-600:]}")
        if {p: p.read_bytes() for p in (run / "step_000002").iterdir()} != before or whole(run):
            failures.append("the checkpoint before was touched")
        if list(run.glob(".tmp-step*")):
            failures.append("half a checkpoint was left")
        (disk / "ballast").unlink()
        status, text = launch()
        got = outcome(run) if status == 0 else {}
        failures += [f"{key} differs" for key in ("files", "state") if got.get(key) != want[key]]
        os.write(pipe, json.dumps({"by": "tmpfs of 8 MB", "failures": failures}).encode())
        shutil.rmtree(run)
    status, told = fork(work, lab.folder / "disk.out")
    return json.loads(
        told or json.dumps({"failures": [(lab.folder / "disk.out").read_text()[-600:]]})
    )


def main():
    p = arguments(__doc__)
    p.add_argument("--kills", type=int, default=200)
    p.add_argument(
        "--every",
        type=int,
        default=1,
        help="of the operations of four saves, kill before each n-th",
    )
    p.add_argument("--exhaustive", type=int, default=2, help="cases in which that is done")
    p.add_argument("--cases", type=int, default=len(CASES))
    p.add_argument("--stops", type=int, default=len(STOPS), help="plans of SIGINT and SIGTERM")
    p.add_argument("--real", type=int, default=6, help="further kills of python -m train")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    cases, began = list(CASES)[:args.cases], time.perf_counter()
    with scratch() as folder:
        lab = Lab(folder)
        result = {
            "random": random_kills(lab, cases, args.kills, random.Random(args.seed), args.real),
            "every": [every_operation(lab, case, args.every) for case in cases[: args.exhaustive]],
            "stops": stops(lab, cases[0], args.stops),
            "full_disk": full_disk(lab, cases[-1]),
        }
    kills = result["random"]
    result["kills"] = kills["kills"] + sum(e["points"] for e in result["every"])
    result["failures"] = [
        f
        for part in (kills, *result["every"], result["stops"], result["full_disk"])
        for f in part.get("failures", ())
    ]
    result["seconds"] = round(time.perf_counter() - began, 1)
    print(
        f"{kills['kills']} random kills in {kills['runs']} runs: {kills['in_save']} inside a save; "
        f"{kills['line']} at a log "
        f"line, {kills['step']} in an optimizer's step, {kills['other']} elsewhere, "
        f"{kills['real']} of python -m train"
    )
    for e in result["every"]:
        print(f"{e['points']} of the {e['of']} operations of {SAVES} saves, {e['case']}: " +
              ", ".join(f"{n} {name}" for name, n in e["operations"].most_common()))
    print(
        f"signals: the slowest stop took {result['stops']['slowest_s']} s with start-up; full "
        "disk: "
        f"{result['full_disk'].get('by') or result['full_disk']}"
    )
    print(
        "\n".join(result["failures"])
        or f"every run ended bit for bit as the one that nobody touched ({result['seconds']} s)"
    )
    print(json.dumps(result))
    return bool(result["failures"])


if __name__ == "__main__":
    sys.exit(main())
