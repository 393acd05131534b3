"""Many trainings in turn: a matrix of denoisers, times and maskings, or a named study; matched, resumable, with one report.

    python -m run_experiments                                           # the plan of 8 runs and their commands, nothing else
    python -m run_experiments --max_steps 2000 --execute                # run what is not finished; one failure stops no other
    python -m run_experiments --study memory_slots --halving --execute  # studies.py; only the better half goes on
    python -m run_experiments --report checkpoints/ablations            # report.html and docs/results.md, from results.jsonl

Every run is `python -m train --resume_latest` and then `python -m evaluate`, each in a process of its own. Whatever stops this
program, the same command again goes on: a finished run is one with a line in results.jsonl that has the same settings.
In the output root: experiment_plan.json, results.jsonl (a line per finished run: all that the report needs), results.json
(the state of every run), summary.md, report.html; for each run its folder NAME/ and what it printed, NAME.log.
"""
import contextlib
import ctypes
import dataclasses
import itertools
import math
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import cli
import config
import knobs
import study_report
import shapes
from config import TrainArgs
from knobs import UserError, say
from studies import STUDIES

try:
    import fcntl
except ImportError:  # Windows: there a second one goes unnoticed
    fcntl = None

PROBE_STEPS = 12      # of --match time; the first two do not count
ROUNDS = 3            # of --halving at most: an eighth, a quarter, half
PATIENCE = 60         # seconds that a training of a killed run_experiments may take to save
OURS = {"output_dir": "--output_root", "run_name": "--output_root", "resume": "nothing: every run goes on where it stopped",
        "ckpt": "train itself", "drive": "train itself", "model": "--architectures", "time_mode": "--time_modes",
        "masking_strategy": "--masking_strategies"}


class Run(NamedTuple):
    name: str
    variant: str
    args: TrainArgs
    via: tuple = ()              # words in front of its commands: a script that changes the model before it runs them ...
    counted: dict | None = None  # ... and what the changed model really has, of sizes

    @property
    def folder(self):
        return self.args.run_dir

    @property
    def log(self):
        return self.folder.with_name(f"{self.name}.log")

    @property
    def sizes(self):
        c = shapes.model_config(self.args, vocabulary(self.args.data_dir))
        return self.counted or {"params": shapes.count_params(c), "params_blocks": shapes.block_params(c),
                                "flops_per_token": flops(c, self.args)}


# ---- the plan ---------------------------------------------------------------------------------------------------------

def variants(args):
    """name -> the settings that make it."""
    if args.study:
        return STUDIES[args.study].variants
    return {f"{m}_{t}_{k}": dict(model=m, time_mode=t, masking_strategy=k) for m, t, k in
            itertools.product(args.architectures, args.time_modes, args.masking_strategies)}


def asked(a):
    """The mean share of tokens that are hidden in training."""
    mean = {"linear": 1 / 2, "cosine": 2 / math.pi}[a.mask_schedule]
    return 1.0 if a.causal else a.min_mask_rate + mean * (a.most_hidden - a.min_mask_rate)


def vocabulary(data_dir):
    meta = Path(data_dir, "meta.json")
    return knobs.read_json(meta).get("vocab_size", 0) if meta.exists() else 0


def flops(c, a):
    return shapes.flops_per_token(c, a.seq_len, a.block_choices, asked(a), a.fade / 2)


def settings(args):
    """variant -> its TrainArgs, the size matched to that of the first."""
    base = TrainArgs(**{f.name: getattr(args, f.name) for f in dataclasses.fields(TrainArgs)})
    base = dataclasses.replace(base, preset="none", edge_profile="none", config=None)       # their values are in it
    found, problems, vocab = {}, [], vocabulary(base.data_dir)
    for name, diff in variants(args).items():
        a = found[name] = dataclasses.replace(base, **diff)
        problems += [f"{name}: {p}" for p in knobs.problems_of(a)]
        if args.match == "tokens" or problems:
            continue
        first = next(iter(found.values()))
        cost = shapes.block_params if args.match != "flops" else lambda c, a=a: flops(c, a)
        goal = flops(shapes.model_config(first, vocab), first) if args.match == "flops" else \
            shapes.block_params(shapes.model_config(first, vocab))
        shape = shapes.model_config(a, vocab)
        if cost(shape) != goal:
            a.d_ff = shapes.match_d_ff(shape, goal, cost)
            if abs(gap := cost(shapes.model_config(a, vocab)) / goal - 1) > 0.01:
                say(f"notice: {name} has {gap:+.1%} of the {args.match} of {next(iter(found))}, even with --d_ff {a.d_ff}")
    if problems:
        raise UserError("\n  ".join(problems))
    return found


def seeds_of(args, origins):
    given = args.seeds or (STUDIES[args.study].seeds if args.study and origins["seed"] == "default" else (str(args.seed),))
    return list(dict.fromkeys(map(int, given)))


def make_plan(args, origins, root):
    """-> [Run], seed by seed, so that what has run so far can be compared."""
    seeds, found = seeds_of(args, origins), settings(args)
    if args.halving:
        unit = args.max_steps >> rounds(len(found))
        if not unit:
            raise UserError(f"--halving of {len(found)} variants needs more than --max_steps {args.max_steps}")
        for a in found.values():
            a.eval_interval = unit
    return [Run(name, variant, dataclasses.replace(a, seed=seed, output_dir=str(root / name)))
            for seed in seeds for variant, a in found.items() for name in [variant + f"_s{seed}" * (len(seeds) > 1)]]


def rounds(count):
    return min(ROUNDS, math.ceil(math.log2(count))) if count > 1 else 0


def flags(a):
    """TrainArgs as the flags that make them: what differs from the defaults, presets resolved."""
    words = []
    for f in dataclasses.fields(TrainArgs):
        value = getattr(a, f.name)
        if f.name == "resume_latest" or value == f.default:
            continue
        words += [f"--{f.name}" if value else f"--no_{f.name}"] if f.type is bool else [f"--{f.name}", str(value)]
    return [*words, "--resume_latest"]


def identity(a):
    """What makes a run the one that it is: its flags, but for where it lies."""
    return flags(dataclasses.replace(a, output_dir=None, device=TrainArgs.device, threads=TrainArgs.threads))


def plan_file(args, runs, step_ms):
    entries = []
    for run in runs:
        entries.append({"name": run.name, "variant": run.variant, "seed": run.args.seed, "module": "train", "via": run.via,
                        "args": flags(run.args), **run.sizes})
    return {"version": 1, "study": args.study, "architectures": args.architectures, "time_modes": args.time_modes,
            "masking_strategies": args.masking_strategies, "seeds": sorted({run.args.seed for run in runs}),
            "match": args.match, "step_ms": step_ms, "runs": entries}


def tell(args, runs, root):
    """The plan for people, on stdout: shapes, then commands."""
    if args.study:
        study = STUDIES[args.study]
        print(f"study {args.study}: {study.question}\nmeasured: {study.measure}")
    first, vocab = runs[0], vocabulary(runs[0].args.data_dir)
    tokens = first.args.max_steps * first.args.batch_size * first.args.grad_accum * first.args.seq_len
    print(f"{len(runs)} runs of {first.args.max_steps} steps, {tokens / 1e6:.1f}M tokens each; matched: {args.match}; plan: "
          f"{root / 'experiment_plan.json'}{'' if vocab else '; no prepared text yet, so parameters are without embedding'}")
    for run in {run.variant: run for run in runs}.values():
        print(f"  {run.variant:28} {run.args.model}, d_ff {run.args.d_ff}, {run.sizes['params']:,} parameters, "
              f"{run.sizes['flops_per_token'] / 1e6:.1f} MFLOP/token")
    for run in runs:
        print(shlex.join(["python", *(run.via or ("-m",)), "train", *flags(run.args)]))


# ---- running one ------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def alone(root):
    """Only one run_experiments works in a folder. Its trainings hold the lock as well, so one that outlives it is waited for."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "LOCK", "w") as f:
        end = time.monotonic() + PATIENCE
        while fcntl:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    raise UserError(f"another run_experiments works in {root}: wait, or name another --output_root") from None
                time.sleep(0.5)
        yield f.fileno()


def die_with_parent():
    """In a child on Linux: when run_experiments dies, even by SIGKILL, the training is asked to save and leave."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def child(run, command, words, lock, enough=None):
    """Run one of our commands, its output appended to the run's log -> exit code. enough(): is it time to save and leave?"""
    program = [*run.via, command] if run.via else [str(config.ROOT / f"{command}.py")]
    with open(run.log, "ab") as out:
        process = subprocess.Popen([sys.executable, *program, *words], stdin=subprocess.DEVNULL,
                                   stdout=out, stderr=subprocess.STDOUT, pass_fds=(lock,) if fcntl else (),
                                   preexec_fn=die_with_parent if sys.platform == "linux" else None)
        told = False
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=0.5)
                if enough and not told and enough():
                    process.send_signal(signal.SIGTERM)
                    told = True
        except BaseException:                 # Ctrl-C reached the training as well: it saves, which is worth the wait
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=PATIENCE)
            raise


def last_words(log):
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in lines[::-1] if "error" in line.lower()), lines[-1] if lines else "")[-300:]


def stopped(run):
    """Whether the last training was asked to save and leave, which it does with 0."""
    ends = [e for e in study_report.read_lines(run.folder / "train.jsonl") if e["event"] == "end"]
    return ends and ends[-1].get("stopped")


def score_at(run, step):
    """The validation of this run at a step, or None: {block rule: nats}, bits/byte per nat."""
    for event in reversed(study_report.read_lines(run.folder / "train.jsonl")):
        if event["event"] == "eval" and event["step"] == step:
            return event["by_block"], (event["val_bpb"] or event["val_nelbo"]) / event["val_nelbo"]


def train(run, lock, until=None):
    """Train to the end, or for --halving until the validation of a step is there -> what went wrong, or None."""
    def enough():
        return score_at(run, until) is not None

    if until and enough():
        return None
    code = child(run, "train", flags(run.args), lock, enough if until else None)
    if code == 0 and not stopped(run) or until and enough():
        return None
    return {"status": "failed", "code": code, "error": last_words(run.log)}


def evaluate(args, run, lock):
    """Score a trained run, by its base's block rules unless it learned single tokens alone -> what went wrong, or None."""
    rules = "1" if set(run.args.block_choices) == {1} else args.train_block_sizes
    words = ["--ckpt", str(run.folder), "--blocks", rules, "--batches", str(args.batches), "--draws", str(args.draws),
             "--repeats", "0", "--chain_docs", str(args.chain_docs), "--device", args.device, "--threads", str(args.threads)]
    code = child(run, "evaluate", [*words, "--out_json", str(run.folder / "evaluate.json")], lock)
    return None if code == 0 else {"status": "failed", "code": code, "error": last_words(run.log)}


def figures(args, run, reference):
    """What a finished run has to say: its line of results.jsonl."""
    events = study_report.read_lines(run.folder / "train.jsonl")
    meta = [e for e in events if e["event"] == "meta"][-1]
    found = knobs.read_json(run.folder / "evaluate.json")
    length, a = run.args.seq_len, run.args
    c = shapes.ModelConfig.from_dict(meta["config"]["model"])

    def rules(part):
        return {"T" if int(b) >= length else b: {k: r[k] for k in ("nats", "se", "bits_per_byte", "bits_per_byte_se")}
                for b, r in found[part].items()}
    bound, texts, curve = rules("bound"), found["documents"], study_report.curve(events)
    step, tokens, seconds = curve[-1][:3]
    return {"name": run.name, "study": args.study or "matrix", "variant": run.variant, "reference": reference, "seed": a.seed,
            "match": args.match, "model": a.model, "objective": a.objective, "flags": identity(a), "d_ff": c.d_ff,
            **run.sizes, "steps": step, "tokens": tokens, "corpus_tokens": meta["data"]["tokens"], "seconds": seconds,
            "tok_s": tokens / seconds, "bound": bound, "chain_rule": rules("chain_rule"),
            **{k: statistics.fmean(r[k] for r in bound.values()) for k in ("nats", "bits_per_byte", "bits_per_byte_se")
               if None not in [r[k] for r in bound.values()]},
            "documents": {"bytes": texts["bytes"],
                          "nats": [statistics.fmean(nats) for nats in zip(*texts["nats"].values(), strict=True)]},
            "curve": curve, "data_sha256": meta["data"]["sha256"], "precision": meta["precision"],
            **{k: meta[k] for k in ("commit", "torch", "python", "device", "device_name", "threads")},
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S")}


# ---- running all ------------------------------------------------------------------------------------------------------

class Book:
    """What is known of every run, written after each: results.jsonl (finished ones), results.json (all), summary.md, report."""

    def __init__(self, args, runs, root):
        self.args, self.runs, self.root = args, runs, root
        self.state, self.rungs, self.bad, self.new = {run.name: {"status": "planned"} for run in runs}, [], False, False

    def finished(self, run):
        """Its line, if there is one with these settings and this text."""
        line = study_report.latest(self.root / "results.jsonl").get(run.name)
        meta = Path(run.args.data_dir, "meta.json")
        same = line and line["flags"] == identity(run.args)
        if same and meta.exists() and knobs.read_json(meta)["train_sha256"] != line["data_sha256"]:
            return None
        return line if same else None

    def note(self, run, state):
        self.state[run.name] = state
        self.bad = self.bad or state["status"] == "failed"
        lines = [line for r in self.runs if (line := self.finished(r))]
        states = {r.name: {"status": "finished"} if self.finished(r) else self.state[r.name] for r in self.runs}
        brief = {line["name"]: {k: v for k, v in line.items() if k not in ("curve", "flags", "documents")} for line in lines}
        knobs.write_json(self.root / "results.json", {
            "version": 1, "study": self.args.study, "match": self.args.match, "halving": self.rungs,
            "runs": [{"name": name, **state, **brief.get(name, {})} for name, state in states.items()]})
        title = f"Study {self.args.study}: {STUDIES[self.args.study].question}" if self.args.study else "Matrix"
        study_report.publish(self.root / "summary.md", study_report.markdown(title, lines, states, self.rungs))

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
    """Successive halving -> the runs that are left. Nothing is trained twice: a run is stopped on its way to the last step
    when the validation of the round's step is there, and goes on exactly from there if it is kept. The learning rate is on
    its way, too, so a variant that lives from its last, slow steps is judged early.
    """
    left, total = list({run.variant: run for run in book.runs}), rounds(len({run.variant for run in book.runs}))
    unit = book.runs[0].args.eval_interval
    for i in range(total):
        step, scores = unit << i, {}
        for run in (r for r in book.runs if r.variant in left):
            wrong = None if book.finished(run) else train(run, lock, until=step)
            say(f"halving, step {step}, {run.name}: " + (f"FAILED: {wrong['error']}" if wrong else "there"))
            book.note(run, wrong or {"status": "trained", "step": step})
            if not wrong:
                scores.setdefault(run.variant, []).append(score_at(run, step))
        if not scores:
            return []
        common = set.intersection(*({*rules} for found in scores.values() for rules, _ in found))
        means = {v: [statistics.fmean(rules[b] for b in (common or rules)) * unit_bpb for rules, unit_bpb in found]
                 for v, found in scores.items()}
        left = keep(means)
        book.rungs.append({"step": step, "rules": sorted(common), "scores": means, "kept": left})
        for run in book.runs:
            if run.variant in means and run.variant not in left:
                book.note(run, {"status": "dropped", "step": step})
        say(f"halving, step {step}: kept {', '.join(left)}")
    return [run for run in book.runs if run.variant in left]


def keep(scores):
    """{variant: [score of each seed]} -> the better half, and whoever the noise of the seeds cannot tell from its last one."""
    order = sorted(scores, key=lambda v: statistics.fmean(scores[v]))
    half = math.ceil(len(order) / 2)
    spread = [statistics.variance(s) for s in scores.values() if len(s) > 1]
    least = min(map(len, scores.values()))
    noise = math.sqrt(2 * statistics.fmean(spread) / least) if spread else 0.0
    bar = statistics.fmean(scores[order[half - 1]]) + noise
    return [v for v in order[:half]] + [v for v in order[half:] if statistics.fmean(scores[v]) <= bar]


def measure_speed(runs, root, lock):
    """--match time: milliseconds of a step of every variant, from a short training with the same draws."""
    found = {}
    for run in {run.variant: run for run in runs}.values():
        folder = root / f"probe_{run.variant}"
        short = dataclasses.replace(run.args, output_dir=str(folder), max_steps=PROBE_STEPS, eval_interval=0, show_samples=False)
        probe = run._replace(name=folder.name, args=short)
        if wrong := train(probe, lock):
            raise UserError(f"the speed of {run.variant} cannot be measured: {wrong['error']}", code=1)
        by_rule = {}
        for e in study_report.read_lines(folder / "train.jsonl"):
            if e["event"] == "train" and e["step"] > 2:
                by_rule.setdefault(e["block"], []).append(e["step_ms"])
        found[run.variant] = statistics.fmean(map(statistics.median, by_rule.values()))
        say(f"probe {run.variant}: {found[run.variant]:.0f} ms a step")
    return found


def execute(args, runs, root):
    for folder in dict.fromkeys(run.args.data_dir for run in runs):
        if folder != TrainArgs.data_dir and not Path(folder, "meta.json").exists():
            how = STUDIES[args.study].before if args.study else ()
            how = how or (f"python -m prepare --data_dir {folder}", "or the one-shot: python -m colab_train_eco")
            raise UserError("\n  ".join([f"{folder} holds no prepared text; first:", *how]))
    with alone(root) as lock:
        path, step_ms = root / "experiment_plan.json", {}
        if args.match == "time":
            old = knobs.read_json(path).get("step_ms", {}) if path.exists() else {}
            step_ms = old if {run.variant for run in runs} <= set(old) else measure_speed(runs, root, lock)
            share = {v: step_ms[runs[0].variant] / ms for v, ms in step_ms.items()}
            for run in runs:
                run.args.max_steps = max(1, round(run.args.max_steps * share[run.variant]))
        knobs.write_json(path, plan_file(args, runs, step_ms))
        book = Book(args, runs, root)
        chosen = halve(book, lock) if args.halving else runs
        for number, run in enumerate(chosen, 1):
            book.complete(run, lock, f"[{number}/{len(chosen)}]")
        if (root / "results.jsonl").exists() and (book.new or not (root / "report.html").exists()):
            study_report.build(root, root / "report.html")
        print((root / "summary.md").read_text(encoding="utf-8"))
        return 1 if book.bad else 0


def main(argv=None):
    args, origins = cli.parse(config.ExperimentArgs, argv, "run_experiments",
                                 tier=lambda typed: STUDIES[typed["study"]].base if typed.get("study") else {})
    if args.report:
        return study_report.rebuild(Path(args.report), Path(args.results_page))
    cli.announce(args, origins)
    varied = {key for diff in variants(args).values() for key in diff} if args.study else set()
    mine = [name for name in OURS if origins[name] == "flag" and (name in varied or not args.study or name in list(OURS)[:5])]
    if mine or (mine := [name for name in varied if origins[name] == "flag"]):
        raise UserError(f"--{mine[0]} is set by run_experiments itself: use {OURS.get(mine[0], 'another --study, or none')}")
    root = Path(args.output_root or ("checkpoints/studies/" + args.study if args.study else "checkpoints/ablations"))
    return carry_out(args, make_plan(args, origins, root), root)


def carry_out(args, runs, root):
    """Tell the plan, and run or write it -> exit code."""
    tell(args, runs, root)
    if args.execute:
        return execute(args, runs, root)
    if not (root / "results.json").exists():       # a finished matrix keeps the plan that it was run by
        knobs.write_json(root / "experiment_plan.json", plan_file(args, runs, {}))
    return 0


if __name__ == "__main__":
    cli.run(main)
