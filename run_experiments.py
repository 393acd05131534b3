"""Many trainings in turn: a matrix of denoisers, times and maskings, or a named study; matched,
resumable, with one report.

    python -m run_experiments                                           # the plan of 8 runs and
        their commands, nothing else
    python -m run_experiments --max_steps 2000 --execute                # run what is not finished;
        one failure stops no other
    python -m run_experiments --study memory_slots --halving --execute  # studies.py; only the
        better half goes on
    python -m run_experiments --report checkpoints/ablations            # report.html and results.md
        there, from results.jsonl

Every run is `python -m train --resume_latest` and then `python -m evaluate`, each in a process of
its own. Whatever stops this program, the same command again goes on: a finished run is one with a
line in results.jsonl that has the same settings. In the output root: experiment_plan.json,
results.jsonl (a line per finished run: all that the report needs), results.json (the state of every
run), summary.md, report.html; for each run its folder NAME/ and what it printed, NAME.log.
"""
import contextlib
import ctypes
import dataclasses
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import cli
import config
import model_config
from common import files
from common.console import UserError, say
from common.files import read_json, read_lines, write_json, write_text
from config import TrainArgs
from evaluation import study_plan, study_report
from evaluation.study_plan import flags, make_plan, rounds, scoring, terms, variants
from studies import STUDIES

PROBE_STEPS = 6       # of --match time for each block rule; the first two do not count
PATIENCE = 60         # seconds that a training of a killed run_experiments may take to save
OURS = {
    "output_dir": "--output_root",
    "run_name": "--output_root",
    "resume": "nothing: every run goes on where it stopped",
    "ckpt": "train itself",
    "drive": "train itself",
    "model": "--architectures",
    "time_mode": "--time_modes",
    "masking_strategy": "--masking_strategies",
}


# ---- running one ---------------------------------------------------------------------------------

@contextlib.contextmanager
def alone(root):
    """Only one run_experiments works in a folder. Its trainings hold the lock as well, so one that
    outlives it is waited for.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "LOCK", "w") as f:
        try:
            files.lock(f, wait=PATIENCE)
        except OSError:
            raise UserError(
                f"another run_experiments works in {root}: wait, or name another --output_root"
            ) from None
        yield f.fileno()


def die_with_parent():
    """In a child on Linux: when run_experiments dies, even by SIGKILL, the training is asked to
    save and leave.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def child(run, command, words, lock, enough=None):
    """Run one of our commands, its output appended to the run's log -> exit code. enough(): is it
    time to save and leave?
    """
    program = [*run.via, command] if run.via else [str(files.ROOT / f"{command}.py")]
    with open(run.log, "ab") as out:
        process = subprocess.Popen(
            [sys.executable, *program, *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,) if os.name == "posix" else (),
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
        told = False
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=0.5)
                if enough and not told and enough():
                    process.send_signal(signal.SIGTERM)
                    told = True
        # Ctrl-C reached the training as well: it saves, which is worth the wait
        except BaseException:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=PATIENCE)
            raise


def last_words(log):
    """Its last error, with the lines below it that say which."""
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    at = next(
        (i for i in range(len(lines) - 1, -1, -1) if "error" in lines[i].lower()), len(lines) - 1
    )
    return " ".join(lines[max(at, 0):])[:300]


def stopped(run):
    """Whether the last training was asked to save and leave, which it does with 0."""
    ends = [e for e in read_lines(run.folder / "train.jsonl") if e["event"] == "end"]
    return ends and ends[-1].get("stopped")


def score_at(run, step):
    """The validation of this run at a step, or None: {block rule: nats}, bits/byte per nat."""
    for event in reversed(read_lines(run.folder / "train.jsonl")):
        if event["event"] == "eval" and event["step"] == step:
            return event["by_block"], (event["val_bpb"] or event["val_nelbo"]) / event["val_nelbo"]


def occupied(run):
    """What is wrong with the run's folder, or None: what lies there has to be the beginning of this
    very run.
    """
    meta = [e for e in read_lines(run.folder / "train.jsonl") if e["event"] == "meta"]
    if meta and (
        other := study_plan.unlike(study_plan.trained(meta[-1]["config"]["args"]), run.args)
    ):
        return {
            "status": "failed",
            "code": 2,
            "error": f"{run.folder} holds a run with "
            + ", ".join(f"--{name} {value}" for name, value in other.items())
            + ": move it away, or name another --output_root",
        }


def train(run, lock, until=None):
    """Train to the end, or for --halving until the validation of a step is there -> what went
    wrong, or None.
    """
    def enough():
        return score_at(run, until) is not None

    if wrong := occupied(run):
        return wrong
    if until and enough():
        return None
    code = child(run, "train", flags(run.args), lock, enough if until else None)
    if code == 0 and not stopped(run) and not until or until and enough():
        return None
    if code == 0 and not stopped(run):
        return {
            "status": "failed",
            "code": 2,
            "error": f"it was trained without a validation at step {until}: move {run.folder} "
            "away, or leave out --halving",
        }
    return {"status": "failed", "code": code, "error": last_words(run.log)}


def evaluate(args, run, lock):
    """Score a trained run -> what went wrong, or None."""
    words = [
        "--ckpt",
        str(run.folder),
        "--repeats",
        "0",
        "--device",
        args.device,
        "--threads",
        str(args.threads),
    ]
    words += [
        word for name, value in scoring(args, run).items() for word in (f"--{name}", str(value))
    ]
    code = child(run, "evaluate", [*words, "--out_json", str(run.folder / "evaluate.json")], lock)
    return None if code == 0 else {"status": "failed", "code": code, "error": last_words(run.log)}


def figures(args, run, reference):
    """What a finished run has to say: its line of results.jsonl."""
    events = read_lines(run.folder / "train.jsonl")
    meta = [e for e in events if e["event"] == "meta"][-1]
    found = read_json(run.folder / "evaluate.json")
    length, a = run.args.seq_len, run.args
    c = model_config.ModelConfig.from_dict(meta["config"]["model"])

    def named(part):
        return {"T" if b == "T" or int(b) >= length else b: found for b, found in part.items()}

    def rules(part):
        return {
            b: {k: r[k] for k in ("nats", "se", "bits_per_byte", "bits_per_byte_se")}
            for b, r in named(found[part]).items()
        }

    bound, texts, curve = rules("bound"), found["documents"], study_report.curve(events)
    step, tokens, seconds = curve[-1][:3]
    return {
        "name": run.name,
        "study": args.study or "matrix",
        "variant": run.variant,
        "reference": reference,
        "seed": a.seed,
        "match": args.match,
        "model": a.model,
        "objective": a.objective,
        "flags": flags(a),
        "terms": terms(a),
        "scoring": scoring(args, run),
        "d_ff": c.d_ff,
        **run.sizes,
        "steps": step,
        "tokens": tokens,
        "corpus_tokens": meta["data"]["tokens"],
        "seconds": seconds,
        "tok_s": tokens / seconds,
        "bound": bound,
        "chain_rule": rules("chain_rule"),
        **{
            k: statistics.fmean(r[k] for r in bound.values())
            for k in ("nats", "bits_per_byte", "bits_per_byte_se")
            if None not in [r[k] for r in bound.values()]
        },
        "documents": {"bytes": texts["bytes"], "nats": named(texts["nats"])},
        "curve": curve,
        "data_sha256": meta["data"]["sha256"],
        "precision": meta["precision"],
        **{k: meta[k] for k in ("commit", "torch", "python", "device", "device_name", "threads")},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


# ---- running all ---------------------------------------------------------------------------------

class Book:
    """What is known of every run, written after each: results.jsonl (finished ones), results.json
    (all), summary.md, report.
    """

    def __init__(self, args, runs, root):
        self.args, self.runs, self.root = args, runs, root
        self.state, self.rungs, self.bad, self.new = (
            {run.name: {"status": "planned"} for run in runs},
            [],
            False,
            False,
        )

    def finished(self, run):
        """Its line, if there is one with these settings, this scoring and this text."""
        line = study_report.by_seed(self.root / "results.jsonl").get(
            (run.variant, run.args.seed), {}
        )
        meta = Path(run.args.data_dir, "meta.json")
        same = (
            "terms" in line
            and not study_plan.unlike(line["terms"], run.args)
            and line["scoring"] == scoring(self.args, run)
        )
        if same and meta.exists() and read_json(meta)["train_sha256"] != line["data_sha256"]:
            return None
        return line if same else None

    def note(self, run, state):
        self.state[run.name] = state
        self.bad = self.bad or state["status"] == "failed"
        found = {r.name: line for r in self.runs if (line := self.finished(r))}
        states = {
            r.name: {"status": "finished"} if r.name in found else self.state[r.name]
            for r in self.runs
        }
        lines, long = list(found.values()), ("name", "curve", "flags", "terms", "documents")
        brief = {
            name: {k: v for k, v in line.items() if k not in long} for name, line in found.items()
        }
        write_json(
            self.root / "results.json",
            {
                "version": 1,
                "study": self.args.study,
                "match": self.args.match,
                "halving": self.rungs,
                "runs": [
                    {"name": name, **state, **brief.get(name, {})} for name, state in states.items()
                ],
            },
        )
        title = (
            f"Study {self.args.study}: {STUDIES[self.args.study].question}"
            if self.args.study
            else "Matrix"
        )
        write_text(
            self.root / "summary.md", study_report.markdown(title, lines, states, self.rungs)
        )

    def complete(self, run, lock, number):
        """Train and evaluate what is not finished."""
        if self.finished(run):
            say(f"{number} {run.name}: finished before")
            return self.note(run, {"status": "finished"})
        say(f"{number} {run.name}: training, log {run.log}")
        wrong = train(run, lock) or evaluate(self.args, run, lock)
        if wrong:
            say(f"{number} {run.name}: FAILED with exit code {wrong['code']}: {wrong['error']}")
            return self.note(run, wrong)
        line = figures(self.args, run, self.runs[0].variant)
        study_report.append(self.root / "results.jsonl", line)
        self.new = True
        say(f"{number} {run.name}: {study_report.said(line)}")
        self.note(run, {"status": "finished"})


def halve(book, lock):
    """Successive halving -> the runs that are left. Nothing is trained twice: a run is stopped on
    its way to the last step when the validation of the round's step is there, and goes on exactly
    from there if it is kept. The learning rate is on its way, too, so a variant that lives from its
    last, slow steps is judged early.
    """
    left, total = (
        list({run.variant: run for run in book.runs}),
        rounds(len({run.variant for run in book.runs})),
    )
    unit = book.runs[0].args.eval_interval
    for i in range(total):
        step, scores = unit << i, {}
        for run in (r for r in book.runs if r.variant in left):
            wrong = None if book.finished(run) else train(run, lock, until=step)
            say(
                f"halving, step {step}, {run.name}: "
                + (f"FAILED: {wrong['error']}" if wrong else "there")
            )
            book.note(run, wrong or {"status": "trained", "step": step})
            if not wrong:
                scores.setdefault(run.variant, []).append(score_at(run, step))
        if not scores:
            return []
        common = set.intersection(*({*rules} for found in scores.values() for rules, _ in found))
        means = {
            v: [
                statistics.fmean(rules[b] for b in (common or rules)) * unit_bpb
                for rules, unit_bpb in found
            ]
            for v, found in scores.items()
        }
        left = keep(means)
        book.rungs.append({"step": step, "rules": sorted(common), "scores": means, "kept": left})
        for run in book.runs:
            if run.variant in means and run.variant not in left:
                book.note(run, {"status": "dropped", "step": step})
        say(f"halving, step {step}: kept {', '.join(left)}")
    return [run for run in book.runs if run.variant in left]


def keep(scores):
    """{variant: [score of each seed]} -> the better half, and whoever the noise of the seeds cannot
    tell from its last one.
    """
    order = sorted(scores, key=lambda v: statistics.fmean(scores[v]))
    half = math.ceil(len(order) / 2)
    spread = [statistics.variance(s) for s in scores.values() if len(s) > 1]
    least = min(map(len, scores.values()))
    noise = math.sqrt(2 * statistics.fmean(spread) / least) if spread else 0.0
    bar = statistics.fmean(scores[order[half - 1]]) + noise
    return [v for v in order[:half]] + [
        v for v in order[half:] if statistics.fmean(scores[v]) <= bar
    ]


def measure_speed(runs, root, lock):
    """--match time: {variant: milliseconds of a step}, from a short training by each of its block
    rules, weighed as a run is.
    """
    found = {}
    for run in {run.variant: run for run in runs}.values():
        found[run.variant] = 0.0
        for block, share in run.args.rule_shares.items():
            folder = root / f"probe_{run.variant}_{block}"
            # an old probe was of another day, or of another shape
            shutil.rmtree(folder, ignore_errors=True)
            probe = run._replace(
                name=folder.name,
                args=dataclasses.replace(
                    run.args,
                    output_dir=str(folder),
                    max_steps=PROBE_STEPS,
                    eval_interval=0,
                    show_samples=False,
                    train_block_sizes=str(block),
                    ar_fade=0.0,
                ),
            )
            if wrong := train(probe, lock):
                raise UserError(
                    f"the speed of {run.variant} cannot be measured: {wrong['error']}", code=1
                )
            steps = [
                e
                for e in read_lines(folder / "train.jsonl")
                if e["event"] == "train" and e["step"] > 2
            ]
            found[run.variant] += share * statistics.median(e["step_ms"] for e in steps)
        say(f"probe {run.variant}: {found[run.variant]:.0f} ms a step")
    return found


def execute(args, runs, root):
    for folder in dict.fromkeys(run.args.data_dir for run in runs):
        if folder != TrainArgs.data_dir and not Path(folder, "meta.json").exists():
            own, name = STUDIES[args.study].before if args.study else (), shlex.quote(folder)
            how = own or (
                f"python -m prepare --source files --input YOUR_TEXT.txt --data_dir {name}",
                f"or the starter corpus: python -m prepare --source builtin --data_dir {name}",
            )
            first = (
                "first (hindi.jsonl and hinglish.jsonl stand for your own text):"
                if own
                else "first:"
            )
            raise UserError("\n  ".join([f"{folder} holds no prepared text; {first}", *how]))
    with alone(root) as lock:
        path, step_ms = root / "experiment_plan.json", {}
        if args.match == "time":
            old = read_json(path) if path.exists() else {}
            asked = {run.variant: terms(run.args) for run in runs}
            step_ms = (
                old["step_ms"] if old.get("probed") == asked else measure_speed(runs, root, lock)
            )
            share = {v: step_ms[runs[0].variant] / ms for v, ms in step_ms.items()}
            for run in runs:
                run.args.max_steps = max(1, round(run.args.max_steps * share[run.variant]))
        write_json(
            path, study_plan.as_json(args, runs, step_ms) | ({"probed": asked} if step_ms else {})
        )
        book = Book(args, runs, root)
        chosen = halve(book, lock) if args.halving else runs
        for number, run in enumerate(chosen, 1):
            book.complete(run, lock, f"[{number}/{len(chosen)}]")
        if (root / "results.jsonl").exists() and (book.new or not (root / "report.html").exists()):
            study_report.build(root, root / "report.html")
        print((root / "summary.md").read_text(encoding="utf-8"))
        return 1 if book.bad else 0


def results_page(args):
    """Where --report writes its tables: beside the runs, but for the studies that this repository
    keeps itself.
    """
    folder, ours = Path(args.report), files.ROOT / "docs/studies"
    if args.results_page:
        return Path(args.results_page)
    if ours in (folder.resolve(), *folder.resolve().parents):
        return files.ROOT / "docs/results.md"
    return folder / "results.md"


def main(argv=None):
    args, origins = cli.parse(
        config.ExperimentArgs,
        argv,
        "run_experiments",
        tier=lambda typed: STUDIES[typed["study"]].base if typed.get("study") else {},
    )
    if args.report:
        return study_report.rebuild(Path(args.report), results_page(args))
    cli.announce(args, origins)
    varied = {key for diff in variants(args).values() for key in diff} if args.study else set()
    mine = [
        name
        for name in OURS
        if origins[name] == "flag" and (name in varied or not args.study or name in list(OURS)[:5])
    ]
    if mine or (mine := [name for name in varied if origins[name] == "flag"]):
        raise UserError(
            f"--{mine[0]} is set by run_experiments itself: use "
            f"{OURS.get(mine[0], 'another --study, or none')}"
        )
    root = Path(
        args.output_root
        or ("checkpoints/studies/" + args.study if args.study else "checkpoints/ablations")
    )
    return carry_out(args, make_plan(args, origins, root), root)


def carry_out(args, runs, root):
    """Tell the plan, and run or write it -> exit code."""
    study_plan.tell(args, runs, root)
    if args.execute:
        return execute(args, runs, root)
    if not (root / "results.json").exists():  # a finished matrix keeps the plan that it was run by
        write_json(root / "experiment_plan.json", study_plan.as_json(args, runs, {}))
    return 0


if __name__ == "__main__":
    cli.run(main)
