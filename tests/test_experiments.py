"""run_experiments: the plan, equal sizes and arithmetic, halving, going on after SIGKILL, failures,
and the report in a browser.

    python -m pytest tests/test_experiments.py
"""
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import cli
import config
import model_config
import run_experiments as experiments
from browser import a_page
from common.console import UserError
from common.files import read_lines
from common.flags import to_dict
from config import ExperimentArgs, TrainArgs
from conftest import ROOT, aria_here, latest
from evaluation import plots, study_plan, study_report
from studies import STUDIES

A8 = """python -m diffusion.run_experiments \\
  --data_dir data/processed \\
  --output_root checkpoints/ablations \\
  --max_steps 2000 \\
  --d_model 384 \\
  --n_layers 8 \\
  --n_heads 8 \\
  --d_ff 1024
"""


def plan(line):
    args, origins = cli.parse(
        ExperimentArgs,
        shlex.split(line),
        "run_experiments",
        tier=lambda typed: STUDIES[typed["study"]].base if typed.get("study") else {},
    )
    return args, study_plan.make_plan(args, origins, Path("root"))


# ---- the plan ------------------------------------------------------------------------------------

def test_the_pasted_command_plans_eight_matched_runs_and_runs_none(tmp_path):
    words = shlex.split(A8.replace("\\\n", " "))[3:]
    done = aria_here("diffusion.run_experiments", *words, cwd=tmp_path, check=0)
    saved = json.loads((tmp_path / "checkpoints/ablations/experiment_plan.json").read_text())
    names = [
        f"{m}_{t}_{k}"
        for m in ("primary", "backup")
        for t in ("discrete", "continuous")
        for k in ("token", "span")
    ]
    assert (
        [run["name"] for run in saved["runs"]] == names
        and saved["seeds"] == [1337]
        and saved["match"] == "params"
    )
    assert done.stdout.count("python -m train ") == 8
    assert os.listdir(tmp_path / "checkpoints/ablations") == ["experiment_plan.json"]
    sizes = {run["params"] for run in saved["runs"]}
    assert max(sizes) / min(sizes) < 1.01
    for run in saved["runs"]:
        args, _ = cli.parse(TrainArgs, run["args"], "train")
        assert (args.model, args.time_mode, args.masking_strategy) == tuple(run["name"].split("_"))
        assert (
            args.timestep_sampling == "stratified"
            and str(args.run_dir) == f"checkpoints/ablations/{run['name']}"
        )
        assert args.d_ff == 1024 or args.model == "backup"  # the shape flags describe the primary


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_changes_what_it_says_and_nothing_else(name):
    args, runs = plan(f"--study {name}")
    study, first = STUDIES[name], runs[0].args
    assert len(runs) == 3 * len(study.variants) and runs[1].args.seed == first.seed == 1337, (
        "seed by seed"
    )
    base = {f.name: f.default for f in dataclasses.fields(TrainArgs)} | study.base
    for run in runs:
        diff = study.variants[run.variant]
        for f in dataclasses.fields(TrainArgs):
            if f.name not in ("d_ff", "seed", "output_dir", "resume_latest"):
                assert getattr(run.args, f.name) == diff.get(f.name, base[f.name]), (
                    run.name,
                    f.name,
                )
        if f"--data_dir {run.args.data_dir}" not in " ".join(study.before):
            assert run.args.data_dir == TrainArgs.data_dir
        shape, reference = (model_config.model_config(a, 8000) for a in (run.args, first))
        assert (
            abs(model_config.block_params(shape) / model_config.block_params(reference) - 1) < 0.01
        )
    assert study.variants[runs[0].variant].items() <= study.base.items(), (
        "the reference is the base"
    )
    for line in study.before:
        cli.parse(config.PrepareArgs, shlex.split(line)[3:], "prepare")


@pytest.mark.parametrize(
    "line",
    [
        "--study optimizer",
        "--preset nano",
        "--study epochs --amp on --lr 0.001953125",
        "--optimizer adamw --lr 0.01",
        "--wandb --wandb_tags a b",
        "--study rates --optimizer lion",
        "--train_block_sizes T --no_show_samples --edge_profile laptop --optimizer lion",
    ],
)
def test_the_flags_of_a_run_mean_that_run(line):
    for run in plan(line)[1]:
        parsed, _ = cli.parse(TrainArgs, study_plan.flags(run.args), "train")
        assert dataclasses.replace(parsed, resume_latest=False) == run.args


def test_what_makes_a_run_the_one_that_it_is():
    """What -1 means is written down, so that a default which changes later is another run; where
    and how often is not. A line that lacks a flag is of another version, and another run.
    """
    a = TrainArgs(max_steps=200)
    saved = json.loads(json.dumps(study_plan.terms(a)))
    assert saved["noisy_weight"] == 1 and saved["ar_fade"] == 0.6 and saved["warmup_steps"] == 10
    other = dataclasses.replace(
        a,
        output_dir="x",
        threads=1,
        eval_interval=7,
        save_interval=3,
        show_samples=False,
        wandb=True,
    )
    other.data_dir = "data/builtin"  # which train puts there itself, where nothing was prepared
    assert (
        study_plan.unlike(saved, other)
        == {}
        == study_plan.unlike(saved, dataclasses.replace(a, ar_fade=0.6))
    )
    assert study_plan.unlike(saved | {"max_mask_rate": 0.7}, a) == {"max_mask_rate": 0.7}
    assert study_plan.unlike(saved, dataclasses.replace(a, lr=0.5, train_block_sizes="T")) == {
        "lr": 0.01, "train_block_sizes": "T,32,16,4"}
    old = {key: value for key, value in to_dict(a).items() if key not in ("noisy_weight", "wandb")}
    trained = study_plan.trained(old | {"max_mask_rate": -1.0, "left_since": 1})
    assert study_plan.unlike(trained, a) == {"noisy_weight": None, "max_mask_rate": -1.0}


def test_a_run_of_an_older_version_is_named_and_left_alone(tmp_path):
    """Its settings are in its log: what they lack and what they mean otherwise."""
    own = TrainArgs(output_dir=str(tmp_path))
    older = {key: value for key, value in to_dict(own).items() if key != "noisy_weight"}
    meta = {"event": "meta", "config": {"args": older | {"ar_fade": -1.0}}}
    (tmp_path / "train.jsonl").write_text(json.dumps(meta) + "\n")
    wrong = experiments.occupied(study_plan.Run("a", "a", own))
    assert wrong["code"] == 2
    assert "holds a run with --ar_fade -1.0, without --noisy_weight: move it" in wrong["error"]


def test_time_is_matched_by_every_block_rule_at_its_share(tmp_path, monkeypatch):
    """Each rule is measured by itself, so none is missing and none counts more than it will."""
    def train(probe, lock):
        cost, steps = (
            {256: 10, 32: 20, 16: 30, 4: 40, 1: 80}[int(probe.args.train_block_sizes)],
            range(1, probe.args.max_steps + 1),
        )
        probe.folder.mkdir(parents=True)
        assert probe.args.ar_fade == 0 and probe.args.model == "primary"
        assert len(set(probe.args.block_choices)) == 1, "1 is left to right alone"
        (probe.folder / "train.jsonl").write_text(
            "".join(
                json.dumps({"event": "train", "step": s, "step_ms": cost if s > 2 else 9e9}) + "\n"
                for s in steps
            )
        )

    monkeypatch.setattr(experiments, "train", train)
    _, runs = plan("--study conv_kernel --seeds 1")
    (tmp_path / "probe_3_256").mkdir()                    # of another day
    found = experiments.measure_speed(runs[:1], tmp_path, None)
    assert found == {"3": pytest.approx(0.3 * 80 + 0.7 * (10 + 20 + 30 + 40) / 4)}


def line_of(variant, seed, **bound):
    rules = {
        rule: {"nats": n, "se": 0.1, "bits_per_byte": n / 4, "bits_per_byte_se": 0.01}
        for rule, n in bound.items()
    }
    return {
        "name": f"{variant}_{seed}",
        "variant": variant,
        "reference": "a",
        "seed": seed,
        "bound": rules,
        "chain_rule": {},
        "params": 1,
        "params_blocks": 1,
        "flops_per_token": 1,
        "tokens": 1,
        "tok_s": 1,
        "bits_per_byte": 9.0,
        "nats": 9.0,
        "documents": {
            "bytes": [10, 30],
            "nats": {rule: [n * 10, n * 30 + seed] for rule, n in bound.items()},
        },
    }


def test_variants_are_compared_by_the_block_rules_that_both_were_scored_by():
    """One that knows single tokens alone is not ahead by what whole rows cost the other."""
    a, b = line_of("a", 1, T=5.2, B1=4.8), line_of("b", 1, B1=4.4)
    table = {row[0]: row for row in study_report.rows([a, b])}
    assert (
        table["b"][9].startswith("-0.1000 ± ")
        and table["a"][9] == "reference"
        and table["b"][7] == "B1 4.400"
    )
    assert study_report.paired(b, a) == pytest.approx(0, abs=1e-12), (
        "the same gap per byte in every document"
    )
    old = a | {"documents": {"bytes": [10, 30], "nats": [50.0, 150.0]}}
    assert study_report.paired(b, old) is None, "the mean over other rules"


def test_a_run_under_two_names_counts_once(tmp_path):
    lines = [line_of("a", 1, T=5.0), line_of("a", 1, T=5.1) | {"name": "a"}, line_of("a", 2, T=5.2)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [(_, found)] = study_report.sections(tmp_path)
    assert sorted(line["bound"]["T"]["nats"] for line in found) == [5.1, 5.2]


@pytest.mark.parametrize(
    "match, cost", [("params", model_config.block_params), ("flops", None), ("tokens", None)]
)
def test_what_is_matched(match, cost):
    _, runs = plan(f"--match {match} --n_layers 4 --seq_len 256")
    found = {}
    for run in runs:
        c = model_config.model_config(run.args, 8000)
        found[run.args.model] = (cost(c) if cost else study_plan.flops(c, run.args), run.args.d_ff)
    (p, p_ff), (b, b_ff) = found["primary"], found["backup"]
    assert p_ff == 1024 and (
        b_ff == 1024 if match == "tokens" else b_ff != 1024 and abs(b / p - 1) < 0.01
    )


def test_only_keeps_the_reference_and_the_sizes():
    _, some = plan("--study memory_slots --only 64 --seeds 3 4")
    _, all_ = plan("--study memory_slots --seeds 3 4")
    assert [run.name for run in some] == ["16_s3", "64_s3", "16_s4", "64_s4"]
    assert [run for run in all_ if run.variant in ("16", "64")] == some


def test_a_seed_has_its_folder_whatever_else_is_asked():
    """One seed today and two more tomorrow, in one output root."""
    today, tomorrow = (
        plan(f"--study memory_slots --only 64 {words}")[1]
        for words in ("--seeds 1337", "--seeds 1338 1337")
    )
    assert [run.name for run in today] == ["16", "64"] and [run.name for run in tomorrow] == [
        "16_s1338", "64_s1338", "16", "64",
    ]


@pytest.mark.parametrize(
    "line, word",
    [
        ("--model backup", "--architectures"),
        ("--output_dir x", "--output_root"),
        ("--time_mode discrete", "--time_modes"),
        ("--study loss --mask_schedule cosine", "--mask_schedule"),
        ("--seeds one", "--seeds one"),
        ("--ckpt x", "train itself"),
        ("--report x --execute", "--execute"),
        ("--halving --match time", "--match time"),
        ("--study losses", "loss"),
        ("--halving --max_steps 7", "--max_steps 7"),
        ("--report nowhere", "results.jsonl"),
        ("--study loss --only elbo cosines", "uniform_times"),
    ],
)
def test_slips_name_the_way_out(line, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        experiments.main(shlex.split(line))
    assert word in str(caught.value) and caught.value.code == 2 and not os.listdir(tmp_path)


# ---- halving and curves --------------------------------------------------------------------------

SCORES = st.dictionaries(
    st.sampled_from("abcdefgh"), st.lists(st.floats(1, 3), min_size=2, max_size=2), min_size=1
)


@given(SCORES)
def test_halving_keeps_the_better_half_and_whoever_is_within_the_noise(scores):
    kept = experiments.keep(scores)
    mean = {v: sum(s) / len(s) for v, s in scores.items()}
    assert len(kept) >= (len(scores) + 1) // 2 and min(mean, key=mean.get) in kept
    assert all(mean[k] <= mean[v] for k in kept for v in set(scores) - set(kept))
    assert len(experiments.keep({v: s[:1] for v, s in scores.items()})) == (
        len(scores) + 1
    ) // 2 or len(set(s[0] for s in scores.values())) < len(scores), "one seed knows no noise"
    assert set(experiments.keep({"a": [1.0, 1.2], "b": [1.1, 1.3], "c": [3.0, 3.1]})) == {"a", "b"}
    assert set(experiments.keep({"a": [1.0, 1.5], "b": [1.1, 1.6]})) == {"a", "b"}, (
        "indistinguishable"
    )


def test_who_learned_left_to_right_alone_is_asked_by_that_rule(monkeypatch):
    """Its bound in blocks says nothing, as it never saw them: its figure is its exact NLL, which
    the others have, too.
    """
    asked = {}
    monkeypatch.setattr(experiments, "child", lambda run, command, words, lock: asked.update(
        {run.variant: words[words.index("--blocks") + 1]}) or 0)
    args, runs = plan("--study objective --seeds 1")
    assert [experiments.evaluate(args, run, None) for run in runs] == [None] * 4
    every = "T,32,16,4,1"
    assert asked == {"primary": every, "backup": every, "ar": "1", "eco_ar": "1"}
    assert runs[3].args.model == "primary" and runs[3].args.block_rules == [1]


def test_a_curve_counts_a_repeated_step_once():
    train = [
        {"event": "train", "step": s, "step_ms": 100, "tokens_seen": 10 * s}
        for s in (1, 2, 4, 6, 8)
    ]
    again = [{"event": "train", "step": s, "step_ms": 200, "tokens_seen": 10 * s} for s in (6, 8)]
    evals = [{"event": "eval", "step": s, "val_nelbo": 9.0 - s, "val_bpb": None} for s in (3, 8)]
    assert study_report.curve(train + evals[:1] + again + evals[1:]) == [
        [3, 30, 0.3, 6.0, None],
        [8, 80, 1.2, 1.0, None],
    ]


def test_a_torn_line_is_neither_read_nor_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"name": "a", "x": 1}\n{"name": "b", "x"')
    assert read_lines(path) == [{"name": "a", "x": 1}]
    study_report.append(path, {"name": "a", "x": 2})
    assert read_lines(path) == [{"name": "a", "x": 1}, {"name": "a", "x": 2}]


# ---- for real ------------------------------------------------------------------------------------

WORDS = """
    --time_modes continuous --masking_strategies token
    --d_model 16 --n_layers 1 --n_heads 2 --d_ff 32 --memory_slots 2
    --seq_len 32 --batch_size 2 --grad_accum 1 --train_block_sizes T,8 --max_steps 40
    --eval_interval 20 --eval_batches 2 --save_interval 5 --log_interval 5
    --threads 1 --no_show_samples --batches 2 --draws 1 --chain_docs 1 --output_root out
""".split()


@pytest.fixture(scope="module")
def folder(corpus_dir, tmp_path_factory):
    here = tmp_path_factory.mktemp("experiments")
    shutil.copytree(corpus_dir / "data", here / "data")
    return here


def test_halving_goes_on_after_a_sigkill_and_drops_one(folder):
    """Killed in the middle of the first training; again: it resumes, one of two reaches the end,
    the other stops half-way.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "run_experiments", *WORDS, "--halving", "--execute"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run = folder / "out/primary_continuous_token"
    end = time.monotonic() + 100
    while not (run / "latest").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = aria_here("run_experiments", *WORDS, "--halving", "--execute", cwd=folder, check=0)
    events = read_lines(run / "train.jsonl")
    resumed = [e["step"] for e in events if e["event"] == "resume"]
    assert resumed and resumed[0] >= 5 and not list(run.glob("previous_*")), "it began again"
    states = {r["name"]: r for r in json.loads((folder / "out/results.json").read_text())["runs"]}
    assert sorted(s["status"] for s in states.values()) == ["dropped", "finished"]
    lines = latest(folder / "out/results.jsonl")
    (name,) = lines
    assert states[name]["status"] == "finished" and lines[name]["steps"] == 40
    assert (
        states[name]["bits_per_byte"] == pytest.approx(lines[name]["bits_per_byte"])
        and "(out)" in done.stdout
    )
    assert "kept " + lines[name]["variant"] in done.stderr


def test_without_halving_the_dropped_one_is_finished_from_where_it_stopped(folder):
    before = (folder / "out/results.jsonl").read_bytes()
    done = aria_here("run_experiments", *WORDS, "--execute", cwd=folder, check=0)
    assert "finished before" in done.stderr and (
        folder / "out/results.jsonl"
    ).read_bytes().startswith(before)
    lines = latest(folder / "out/results.jsonl")
    assert len(lines) == 2 and before.count(b"\n") == 1
    for name, line in lines.items():
        saved = json.loads((folder / "out" / name / "evaluate.json").read_text())
        assert line["bound"]["T"]["nats"] == saved["bound"]["32"]["nats"]
        assert line["bound"]["8"]["bits_per_byte_se"] == saved["bound"]["8"]["bits_per_byte_se"]
        assert line["params"] > line["params_blocks"] > 0 and line["tok_s"] * line[
            "seconds"
        ] == pytest.approx(40 * 64)
        assert [row[0] for row in line["curve"]] == [0, 20, 40]
        assert set(line["bound"]) == {"T", "8", "1"}
    dropped, = set(lines) - {json.loads(before)["name"]}
    events = read_lines(folder / "out" / dropped / "train.jsonl")
    ends = [e["step"] for e in events if e["event"] == "end"]  # stopped at 20, or too fast for that
    resumed = [e["step"] for e in events if e["event"] == "resume"]
    assert (
        ends[-1] == 40
        and resumed == ends[:-1]
        and not list((folder / "out" / dropped).glob("previous_*"))
    ), "it began again"


def test_a_folder_with_another_run_is_neither_gone_on_with_nor_relabelled(folder, monkeypatch):
    """Nothing is trained: the settings are in the line and in the run's own log, and so is how it
    was scored.
    """
    before = (folder / "out/results.jsonl").read_bytes()
    done = aria_here(
        "run_experiments", *WORDS, "--weight_decay", "0.5", "--execute", cwd=folder, check=1
    )
    assert done.stderr.count("holds a run with --weight_decay 0.05: move it away") == 2
    assert (folder / "out/results.jsonl").read_bytes() == before
    args, origins = cli.parse(ExperimentArgs, [*WORDS, "--batches", "3"], "run_experiments")
    runs = study_plan.make_plan(args, origins, folder / "out")
    monkeypatch.chdir(folder)
    assert [experiments.Book(args, runs, folder / "out").finished(run) for run in runs] == [
        None,
        None,
    ]
    args.batches = 2
    assert all(experiments.Book(args, runs, folder / "out").finished(run) for run in runs)


def test_halving_needs_the_validations_of_its_rounds(folder, monkeypatch):
    monkeypatch.setattr(experiments, "child", lambda *a: 0)                        # "nothing to do"
    _, runs = plan(" ".join(WORDS))
    run = runs[0]._replace(
        args=dataclasses.replace(runs[0].args, output_dir=str(folder / "out" / runs[0].name))
    )
    assert (
        experiments.train(run, None, until=20) is None
        and "--halving" in experiments.train(run, None, until=13)["error"]
    )


def test_a_failed_run_is_recorded_and_stops_no_other(folder):
    """The folder of runs was moved, and a file lies in the first one's place: the other is still
    known as finished.
    """
    shutil.copytree(
        folder / "out", folder / "again", ignore=shutil.ignore_patterns("primary_*", "results.json")
    )
    lines = latest(folder / "again/results.jsonl")
    (folder / "again/results.jsonl").write_text(json.dumps(lines["backup_continuous_token"]) + "\n")
    (folder / "again/primary_continuous_token").write_text("in the way")
    done = aria_here("run_experiments", *WORDS[:-1], "again", "--execute", cwd=folder, check=1)
    states = {r["name"]: r for r in json.loads((folder / "again/results.json").read_text())["runs"]}
    assert (
        states["primary_continuous_token"]["code"] == 2
        and "again/primary" in states["primary_continuous_token"]["error"]
    )
    assert (
        states["backup_continuous_token"]["status"] == "finished"
        and "failed with exit code 2" in done.stdout
    )


def test_a_training_that_somebody_stopped_is_not_finished(folder):
    """It has saved and left with 0; the study says so, evaluates nothing, and goes on next time."""
    words = [
        sys.executable, "-m", "run_experiments", *WORDS[:-1], "stopped",
        "--architectures", "backup", "--execute",
    ]
    run = folder / "stopped/backup_continuous_token"
    with subprocess.Popen(
        [*words, "--max_steps", "5000"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        end = time.monotonic() + 100
        while not (run / "latest").exists() and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(int((run / "LOCK").read_text().split()[0]), signal.SIGTERM)
        said = process.communicate(timeout=100)[1]
    assert (
        process.returncode == 1
        and "stopped by SIGTERM at step" in said
        and not (run / "evaluate.json").exists()
    )
    assert not (folder / "stopped/results.jsonl").exists()
    assert read_lines(run / "train.jsonl")[-1]["stopped"] == "SIGTERM"


def test_an_interrupted_study_stops_its_training(folder):
    """`kill -INT` reaches run_experiments alone: it tells the training, which saves at once."""
    words = [
        sys.executable, "-m", "run_experiments", *WORDS[:-1], "interrupted",
        "--architectures", "backup", "--execute", "--max_steps", "50000",
    ]
    run = folder / "interrupted/backup_continuous_token"
    with subprocess.Popen(
        words,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # a background job of a shell ignores SIGINT, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        end = time.monotonic() + 100
        while not (run / "latest").exists() and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=50) == 130
    assert read_lines(run / "train.jsonl")[-1]["stopped"] == "SIGTERM"


def test_the_advice_about_missing_text_makes_it(tmp_path, monkeypatch):
    import prepare
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        experiments.main([*WORDS, "--data_dir", "my text", "--execute"])
    [hint] = re.findall(r"python -m prepare (--source builtin .*)", str(caught.value))
    prepare.main([*shlex.split(hint), "--max_chars", "60000", "--tokenizer_vocab", "400"])
    assert Path("my text/meta.json").exists()


def test_the_page_of_results_lies_beside_the_runs(folder, monkeypatch):
    """Only this repository's own studies go to its docs/results.md, from wherever the command is
    typed.
    """
    def page(*words):
        return experiments.results_page(
            cli.parse(ExperimentArgs, ["--report", *map(str, words)], "run_experiments")[0]
        )

    monkeypatch.chdir(folder)
    shutil.copytree(folder / "out", "docs/studies/mine", ignore=shutil.ignore_patterns("*_token*"))
    assert (
        experiments.main(["--report", "docs/studies"]) == 0 and not Path("docs/results.md").exists()
    )
    assert Path("docs/studies/results.md").read_text().count("| backup_continuous_token |") == 1
    assert page(folder / "out", "--results_page", "a.md") == Path("a.md")
    for ours in (ROOT / "docs/studies", ROOT / "docs/studies/ema"):
        assert page(ours) == ROOT / "docs/results.md"


def test_a_matrix_without_matplotlib_is_no_failure(folder, monkeypatch, capsys):
    """All has run: one line says which pictures are missing, and the command in it makes the
    report.
    """
    monkeypatch.chdir(folder)
    words = [*WORDS[:-1], "a plain one"]
    Path("a plain one").mkdir()
    shutil.copy("out/results.jsonl", "a plain one")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert experiments.main([*words, "--execute"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "matplotlib" in line]
    report = Path("a plain one/report.html").read_text()
    assert (
        len(told) == 1
        and "pip install matplotlib" in told[0]
        and "<img" not in report
        and report.count("<tr>") == 3
    )
    hint = shlex.split(re.search(r"-m run_experiments (.*)", told[0])[1])
    assert experiments.main(hint) == 0, "it says it again, and the tables are there"
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    if plots.pyplot():
        assert (
            experiments.main(hint) == 0
            and Path("a plain one/report.html").read_text().count("<img") == 2
        )


def test_the_report_opens_in_a_browser_and_the_page_of_results_is_renewed(folder):
    pytest.importorskip("matplotlib")
    (folder / "out/results.md").write_text(
        "# Kept\n\n<!-- begin out -->\nold\n<!-- end out -->\n\nKept, too.\n"
    )
    (folder / "out/report.html").unlink()
    aria_here("run_experiments", "--report", "out", cwd=folder, check=0)
    page_text = (folder / "out/results.md").read_text()
    assert (
        "old" not in page_text
        and page_text.count("Kept") == 2
        and page_text.count("| backup_continuous_token |") == 1
    )
    asked = []
    with a_page() as (page, trouble):
        page.on("request", lambda request: asked.append(request.url))
        page.goto((folder / "out/report.html").as_uri())
        widths = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth)")
        cells = page.locator("tbody tr").all_inner_texts()
        overflow = page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
    assert len(widths) == 2 and min(widths) > 400 and not trouble and overflow <= 0
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    lines = latest(folder / "out/results.jsonl").values()
    assert len(cells) == 2 and all(
        any(f"{line['bits_per_byte']:.4f}" in cell for cell in cells) for line in lines
    )
