"""Many trainings in turn: a matrix of denoisers, times and maskings, or a named study; matched,
resumable, with one report.

    python -m run_experiments                                   # the plan of 8 runs and their
                                                                # commands, nothing else
    python -m run_experiments --max_steps 2000 --execute        # run what is not finished; one
                                                                # failure stops no other
    python -m run_experiments --study memory_slots --halving --execute      # studies.py; only the
                                                                # better half goes on
    python -m run_experiments --report checkpoints/ablations    # report.html and results.md there,
                                                                # from results.jsonl

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
from config import TrainArgs, token_file_pieces
from evaluation import study_plan, study_report
from evaluation.study_plan import flags, make_plan, rounds, scoring, terms, variants
from studies import STUDIES

PROBE_STEPS = 6       # of --match time for each block rule; the first two do not count
PATIENCE = 60         # seconds that a training of a killed run_experiments may take to save
# flags of train that this program sets itself: what to use instead
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
OURS_IN_STUDIES = list(OURS)[:5]     # of a study also what it varies; the rest is the user's there
LONG = ("name", "curve", "flags", "terms", "documents")      # left out of results.json


# ---- running one ---------------------------------------------------------------------------------

@contextlib.contextmanager
def alone(root):
    """Only one run_experiments works in a folder. Its trainings hold the lock as well, so one that
    outlives it is waited for.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "LOCK", "w") as file:
        try:
            files.lock(file, wait=PATIENCE)
        except OSError:
            raise UserError(
                f"another run_experiments works in {root}: wait, or name another --output_root"
            ) from None
        yield file.fileno()


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
        # The training is told: Ctrl-C in a terminal reaches it, `kill -INT` does not. It saves,
        # which is worth the wait.
        except BaseException:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=PATIENCE)
            raise


def last_words(log):
    """Its last error, with the lines below it that say which."""
    lines = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.strip():
            lines.append(line.strip())
    for at in range(len(lines) - 1, -1, -1):
        if "error" in lines[at].lower():
            return " ".join(lines[at:])[:300]
    return " ".join(lines[-1:])[:300]


def events_of(run, name):
    """The events of this name in the run's train.jsonl."""
    return [event for event in read_lines(run.folder / "train.jsonl") if event["event"] == name]


def stopped(run):
    """Whether the last training was asked to save and leave, which it does with 0."""
    ends = events_of(run, "end")
    return ends and ends[-1].get("stopped")


def score_at(run, step):
    """The validation of this run at a step, or None: {block rule: nats}, bits/byte per nat."""
    for event in reversed(events_of(run, "eval")):
        if event["step"] == step:
            nats = event["val_nelbo"]
            return event["by_block"], (event["val_bpb"] or nats) / nats
    return None


def failure(code, error):
    return {"status": "failed", "code": code, "error": error}


def occupied(run):
    """What is wrong with the run's folder, or None: what lies there has to be the beginning of this
    very run.
    """
    meta = events_of(run, "meta")
    if not meta:
        return None
    other = study_plan.unlike(study_plan.trained(meta[-1]["config"]["args"]), run.args)
    if not other:
        return None
    words = []
    for name, value in other.items():
        words.append(f"without --{name}" if value is None else f"with --{name} {value}")
    return failure(
        2,
        f"{run.folder} holds a run {', '.join(words)}: move it away, or name another --output_root",
    )


def train(run, lock, until=None):
    """Train to the end, or for --halving until the validation of a step is there -> what went
    wrong, or None.
    """
    def enough():
        return score_at(run, until) is not None

    wrong = occupied(run)
    if wrong:
        return wrong
    if until and enough():
        return None
    code = child(run, "train", flags(run.args), lock, enough if until else None)
    reached = enough() if until else code == 0 and not stopped(run)
    if reached:
        return None
    if code == 0 and not stopped(run):
        return failure(
            2,
            f"it was trained without a validation at step {until}: move {run.folder} "
            "away, or leave out --halving",
        )
    return failure(code, last_words(run.log))


def evaluate(args, run, lock):
    """Score a trained run -> what went wrong, or None."""
    words = ["--ckpt", str(run.folder), "--repeats", "0"]
    words += ["--device", args.device, "--threads", str(args.threads)]
    for name, value in scoring(args, run).items():
        words += [f"--{name}", str(value)]
    words += ["--out_json", str(run.folder / "evaluate.json")]
    code = child(run, "evaluate", words, lock)
    if code:
        return failure(code, last_words(run.log))
    return None


def figures(args, run, reference):
    """What a finished run has to say: its line of results.jsonl."""
    events = read_lines(run.folder / "train.jsonl")
    meta = events_of(run, "meta")[-1]
    found = read_json(run.folder / "evaluate.json")
    train_args = run.args
    shape = model_config.ModelConfig.from_dict(meta["config"]["model"])

    def named(part):
        """A block rule of the whole row is called T."""
        by_rule = {}
        for block, value in part.items():
            whole = block == "T" or int(block) >= train_args.longest
            by_rule["T" if whole else block] = value
        return by_rule

    def rules(part):
        names = ("nats", "se", "bits_per_byte", "bits_per_byte_se")
        by_rule = named(found[part])
        return {rule: {name: row[name] for name in names} for rule, row in by_rule.items()}

    bound = rules("bound")
    means = {}
    for name in ("nats", "bits_per_byte", "bits_per_byte_se"):
        values = [row[name] for row in bound.values()]
        if None not in values:
            means[name] = statistics.fmean(values)

    documents = found["documents"]
    curve = study_report.curve(events)
    step, tokens, seconds = curve[-1][:3]
    machine = ("commit", "torch", "python", "device", "device_name", "threads")
    return {
        "name": run.name,
        "study": args.study or "matrix",
        "variant": run.variant,
        "reference": reference,
        "seed": train_args.seed,
        "match": args.match,
        "model": train_args.model,
        "objective": train_args.objective,
        "flags": flags(train_args),
        "terms": terms(train_args),
        "scoring": scoring(args, run),
        "d_ff": shape.d_ff,
        **run.sizes,
        "steps": step,
        "tokens": tokens,
        "corpus_tokens": meta["data"]["tokens"],
        "seconds": seconds,
        "tok_s": tokens / seconds,
        "bound": bound,
        "chain_rule": rules("chain_rule"),
        **means,
        "documents": {"bytes": documents["bytes"], "nats": named(documents["nats"])},
        "curve": curve,
        "data_sha256": meta["data"]["sha256"],
        "precision": meta["precision"],
        **{name: meta[name] for name in machine},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


# ---- running all ---------------------------------------------------------------------------------

class Book:
    """What is known of every run, written after each: results.jsonl (finished ones), results.json
    (all), summary.md, report.
    """

    def __init__(self, args, runs, root):
        self.args = args
        self.runs = runs
        self.root = root
        self.state = {run.name: {"status": "planned"} for run in runs}
        self.rungs = []         # the rounds of --halving
        self.bad = False        # has a run failed?
        self.new = False        # has a run finished now?

    def finished(self, run):
        """Its line, if there is one with these settings, this scoring and this text."""
        known = study_report.by_seed(self.root / "results.jsonl")
        line = known.get((run.variant, run.args.seed), {})
        if "terms" not in line or study_plan.unlike(line["terms"], run.args):
            return None
        if line["scoring"] != scoring(self.args, run):
            return None
        meta = Path(run.args.data_dir, "meta.json")
        if meta.exists() and read_json(meta)["train_sha256"] != line["data_sha256"]:
            return None
        return line

    def note(self, run, state):
        """Write down the state of a run, and with it that of all."""
        self.state[run.name] = state
        self.bad = self.bad or state["status"] == "failed"
        found = {}
        states = {}
        for other in self.runs:
            line = self.finished(other)
            states[other.name] = self.state[other.name]
            if line:
                found[other.name] = line
                states[other.name] = {"status": "finished"}

        entries = []
        for name, known in states.items():
            entry = {"name": name, **known}
            for key, value in found.get(name, {}).items():
                if key not in LONG:
                    entry[key] = value
            entries.append(entry)
        document = {
            "version": 1,
            "study": self.args.study,
            "match": self.args.match,
            "halving": self.rungs,
            "runs": entries,
        }
        write_json(self.root / "results.json", document)

        title = "Matrix"
        if self.args.study:
            title = f"Study {self.args.study}: {STUDIES[self.args.study].question}"
        page = study_report.markdown(title, list(found.values()), states, self.rungs)
        write_text(self.root / "summary.md", page)

    def complete(self, run, lock, number):
        """Train and evaluate what is not finished."""
        if self.finished(run):
            say(f"{number} {run.name}: finished before")
            return self.note(run, {"status": "finished"})
        say(f"{number} {run.name}: training, log {run.log}")
        wrong = train(run, lock)
        if not wrong:
            wrong = evaluate(self.args, run, lock)
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
    left = list({run.variant: run for run in book.runs})
    unit = book.runs[0].args.eval_interval
    for i in range(rounds(len(left))):
        step = unit << i
        scores = scores_at(book, left, step, lock)
        if not scores:
            return []
        common, means = means_of(scores)
        left = keep(means)
        book.rungs.append({"step": step, "rules": sorted(common), "scores": means, "kept": left})
        for run in book.runs:
            if run.variant in means and run.variant not in left:
                book.note(run, {"status": "dropped", "step": step})
        say(f"halving, step {step}: kept {', '.join(left)}")
    return [run for run in book.runs if run.variant in left]


def scores_at(book, left, step, lock):
    """Train what is left up to this step -> {variant: [score_at() of each seed]}."""
    scores = {}
    for run in book.runs:
        if run.variant not in left:
            continue
        wrong = None
        if not book.finished(run):
            wrong = train(run, lock, until=step)
        told = f"FAILED: {wrong['error']}" if wrong else "there"
        say(f"halving, step {step}, {run.name}: {told}")
        book.note(run, wrong or {"status": "trained", "step": step})
        if not wrong:
            scores.setdefault(run.variant, []).append(score_at(run, step))
    return scores


def means_of(scores):
    """-> the block rules that all have, {variant: [bits/byte of each seed, the mean over them]}."""
    every = []
    for found in scores.values():
        every += [set(rules) for rules, _ in found]
    common = set.intersection(*every)
    means = {}
    for variant, found in scores.items():
        means[variant] = []
        for rules, bits_per_nat in found:
            nats = statistics.fmean(rules[rule] for rule in (common or rules))
            means[variant].append(nats * bits_per_nat)
    return common, means


def keep(scores):
    """{variant: [score of each seed]} -> the better half, and whoever the noise of the seeds cannot
    tell from its last one.
    """
    means = {variant: statistics.fmean(found) for variant, found in scores.items()}
    order = sorted(scores, key=means.get)
    half = math.ceil(len(order) / 2)
    spread = [statistics.variance(found) for found in scores.values() if len(found) > 1]
    noise = 0.0
    if spread:
        fewest = min(map(len, scores.values()))
        noise = math.sqrt(2 * statistics.fmean(spread) / fewest)
    bar = means[order[half - 1]] + noise
    return order[:half] + [variant for variant in order[half:] if means[variant] <= bar]


def measure_speed(runs, root, lock):
    """--match time: {variant: milliseconds of a step}, from a short training by each of its block
    rules, weighed as a run is.
    """
    found = {}
    for run in {run.variant: run for run in runs}.values():
        found[run.variant] = 0.0
        for block, share in run.args.rule_shares.items():
            found[run.variant] += share * probe(run, root, block, lock)
        say(f"probe {run.variant}: {found[run.variant]:.0f} ms a step")
    return found


def probe(run, root, block, lock):
    """The median milliseconds of a step by one block rule, from a short training."""
    folder = root / f"probe_{run.variant}_{block}"
    # an old probe was of another day, or of another shape
    shutil.rmtree(folder, ignore_errors=True)
    short = dataclasses.replace(
        run.args,
        output_dir=str(folder),
        max_steps=PROBE_STEPS,
        eval_interval=0,
        show_samples=False,
        train_block_sizes=str(block),
        ar_fade=0.0,
    )
    short_run = run._replace(name=folder.name, args=short)
    wrong = train(short_run, lock)
    if wrong:
        raise UserError(f"the speed of {run.variant} cannot be measured: {wrong['error']}", code=1)
    steps = [event for event in events_of(short_run, "train") if event["step"] > 2]
    return statistics.median(event["step_ms"] for event in steps)


def need_text(args, runs):
    """A usage error when a run's folder of prepared text is not there, with how to make it."""
    for folder in dict.fromkeys(run.args.data_dir for run in runs):
        if folder == TrainArgs.data_dir or Path(folder, "meta.json").exists():
            continue
        if token_file_pieces(folder) and Path(folder).exists():
            continue
        how = STUDIES[args.study].before if args.study else ()
        first = "first (hindi.jsonl and hinglish.jsonl stand for your own text):"
        if not how:
            name = shlex.quote(folder)
            first = "first:"
            how = (
                f"python -m prepare --source files --input YOUR_TEXT.txt --data_dir {name}",
                f"or the starter corpus: python -m prepare --source builtin --data_dir {name}",
            )
        raise UserError("\n  ".join([f"{folder} holds no prepared text; {first}", *how]))


def write_plan(args, runs, root, lock):
    """experiment_plan.json; for --match time the speeds are measured first, and the runs get the
    steps that take equally long.
    """
    path = root / "experiment_plan.json"
    if args.match != "time":
        write_json(path, study_plan.as_json(args, runs, {}))
        return
    old = read_json(path) if path.exists() else {}
    asked = {run.variant: terms(run.args) for run in runs}
    if old.get("probed") == asked:
        step_ms = old["step_ms"]
    else:
        step_ms = measure_speed(runs, root, lock)
    reference = step_ms[runs[0].variant]
    for run in runs:
        steps = run.args.max_steps * (reference / step_ms[run.variant])
        run.args.max_steps = max(1, round(steps))
    write_json(path, study_plan.as_json(args, runs, step_ms) | {"probed": asked})


def execute(args, runs, root):
    """Train and evaluate all runs of the plan -> exit code."""
    need_text(args, runs)
    with alone(root) as lock:
        write_plan(args, runs, root, lock)
        book = Book(args, runs, root)
        chosen = halve(book, lock) if args.halving else runs
        for number, run in enumerate(chosen, 1):
            book.complete(run, lock, f"[{number}/{len(chosen)}]")

        report = root / "report.html"
        if (root / "results.jsonl").exists() and (book.new or not report.exists()):
            study_report.build(root, report)
        print((root / "summary.md").read_text(encoding="utf-8"))
        return 1 if book.bad else 0


def results_page(args):
    """Where --report writes its tables: beside the runs, but for the studies that this repository
    keeps itself.
    """
    if args.results_page:
        return Path(args.results_page)
    folder = Path(args.report)
    ours = files.ROOT / "docs/studies"
    if ours in (folder.resolve(), *folder.resolve().parents):
        return files.ROOT / "docs/results.md"
    return folder / "results.md"


def base_of_study(typed):
    """The settings that a named study puts just above the defaults."""
    return STUDIES[typed["study"]].base if typed.get("study") else {}


def refuse_our_flags(args, origins):
    """A usage error for a typed flag that the matrix or the study sets itself."""
    ours = list(OURS)
    varied = set()
    if args.study:
        for diff in variants(args).values():
            varied.update(diff)
        ours = [name for name in OURS if name in varied or name in OURS_IN_STUDIES]
    for name in dict.fromkeys([*ours, *varied]):
        if origins[name] == "flag":
            instead = OURS.get(name, "another --study, or none")
            raise UserError(f"--{name} is set by run_experiments itself: use {instead}")


def main(argv=None):
    args, origins = cli.parse(config.ExperimentArgs, argv, "run_experiments", tier=base_of_study)
    if args.report:
        return study_report.rebuild(Path(args.report), results_page(args))
    cli.announce(args, origins)
    refuse_our_flags(args, origins)
    root = "checkpoints/ablations"
    if args.output_root:
        root = args.output_root
    elif args.study:
        root = f"checkpoints/studies/{args.study}"
    root = Path(root)
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
