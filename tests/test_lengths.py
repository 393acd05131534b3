"""The length of training rows: the grammar of a schedule, token budgets, and trainings whose rows
change their length.

    python -m pytest tests/test_lengths.py
"""
import json
import os
import random
import shutil
import signal
from types import SimpleNamespace

import pytest

import checkpoint
import cli
import config
import conftest
import prepare
import train
from common.console import UserError
from common.files import read_json
from conftest import log
from evaluation import study_plan
from model_config import model_config
from sampling import settings
from text.dataset import Windows
from training import recovery, row_length, run_folder, step as training_step
from training.distributed import Ranks
from training.lengths import MOST_STEPS, Lengths, read_schedule, warnings


# ---- the grammar

def test_a_schedule_is_read():
    assert read_schedule("512@0,1024@2000,2048@12000") == ((0, 512), (2000, 1024), (12000, 2048))
    assert read_schedule(" 512 @ 7 , 16@8") == ((7, 512), (8, 16))
    assert read_schedule("4096@0", most=4096) == ((0, 4096),)


@pytest.mark.parametrize(
    "text, part",
    [
        ("", "''"),
        ("512", "'512'"),
        ("512@", "'512@'"),
        ("@0", "'@0'"),
        ("512@0,", "''"),
        (",512@0", "''"),
        ("512@0,,1024@9", "''"),
        ("512@0;1024@9", "'512@0;1024@9'"),
        ("+512@0", "'+512@0'"),
        ("512@-1", "'512@-1'"),
        ("512@0,1e3@9", "'1e3@9'"),
        ("512.0@0", "'512.0@0'"),
        ("512@0x10", "'512@0x10'"),
        ("5 12@0", "'5 12@0'"),
        ("5_12@0", "'5_12@0'"),
        ("512@0@1", "'512@0@1'"),
        ("512\t@0", r"'512\t@0'"),
        ("512@0\n", r"'512@0\n'"),
        ("٥١٢@0", "'٥١٢@0'"),
        ("1K@0", "'1K@0'"),
        ("15@0", "'15@0'"),
        ("0@0", "'0@0'"),
        ("512@0,1024@0", "'1024@0'"),
        ("512@0,1024@9,2048@8", "'2048@8'"),
        ("512@0,4097@9", "'4097@9'"),
        ("512@0,1024@" + "9" * 5000, "999"),
    ],
)
def test_a_malformed_schedule_is_refused_and_the_part_is_quoted(text, part):
    with pytest.raises(ValueError) as refusal:
        read_schedule(text, most=4096)
    assert part in str(refusal.value)


# ---- the length in force

def test_an_entry_holds_from_its_number_of_completed_steps_on():
    lengths = Lengths.of(256, "512@10,128@20")
    found = [lengths.at(step) for step in (0, 9, 10, 19, 20, 10**9)]
    assert found == [256, 256, 512, 512, 128, 128]
    assert Lengths.of(256, "512@0,1024@5").at(0) == 512
    assert {Lengths.of(256).at(step) for step in (0, 1, 10**6)} == {256}


def test_the_longest_length_is_one_that_the_run_comes_to():
    lengths = Lengths.of(64, "32@10,128@20")
    assert [lengths.longest(steps) for steps in (0, 1, 10, 20, 21)] == [64, 64, 64, 64, 128]


def test_warnings_name_the_step():
    found = warnings(Lengths.of(64, "32@10,128@20"), 20)
    assert len(found) == 2
    assert "step 10, 64 -> 32" in found[0]
    assert "128@20 is never reached, the run ends at step 20" in found[1]
    assert not warnings(Lengths.of(64, "128@19"), 20)
    assert len(warnings(Lengths.of(64, "32@20"), 20)) == 1, "nobody sees the shorter rows"


# ---- token budgets

@pytest.mark.parametrize(
    "schedule, target, steps",
    [
        ("1024@0,2048@10000,4096@80000", 10**10, 195_088),
        ("2048@0,4096@60000,8192@140000", 10**10, 161_294),
        ("1024@0,2048@10000", 10**10, 310_176),
        ("1024@0,2048@10000", 2 * 10**10, 615_352),
    ],
)
def test_the_budgets_of_the_launch_guide(schedule, target, steps):
    """16 rows a step, as the guide's launcher has them."""
    lengths = Lengths.of(1024, schedule)
    assert lengths.steps_for(target, 16) == steps
    assert lengths.tokens(steps - 1, 16) < target <= lengths.tokens(steps, 16)


def test_a_budget_takes_the_fewest_steps():
    """Random schedules, against adding up step by step."""
    pick = random.Random(3)
    for _ in range(300):
        steps = sorted(pick.sample(range(40), pick.randint(1, 4)))
        text = ",".join(f"{pick.choice((16, 32, 48, 96))}@{step}" for step in steps)
        lengths = Lengths.of(64, text, keep=pick.random() < 0.3)
        rows = pick.choice((1, 3, 12))
        target = pick.randint(1, 60 * 96 * rows)
        total, count = 0, 0
        while total < target:
            length = lengths.at(count)
            each = rows * length
            if lengths.keep:
                each = rows * lengths.at(0) // length * length
            if each == 0:
                break
            total += each
            count += 1
        if total < target:
            continue
        assert lengths.steps_for(target, rows) == count, (text, rows, target)
        assert lengths.tokens(count, rows) == total


def test_the_limit_of_a_budget():
    lengths = Lengths.of(16)
    assert lengths.steps_for(16 * MOST_STEPS, 1) == MOST_STEPS
    assert lengths.steps_for(16 * MOST_STEPS + 1, 1) is None


def test_tokens_per_step_are_kept():
    lengths = Lengths.of(64, "128@10,32@20", keep=True)
    assert [lengths.rows(length, 12) for length in (64, 128, 32)] == [12, 6, 24]
    assert {lengths.step_tokens(length, 12) for length in (64, 128, 32)} == {768}
    assert not lengths.uneven(12)
    assert lengths.uneven(3) == [(128, 192)]


def solved(*words):
    """The steps that a command line of train asks for."""
    return cli.parse(config.TrainArgs, [str(word) for word in words], "train")[0].max_steps


def test_a_budget_makes_the_number_of_steps():
    assert solved("--target_tokens", 16385) == 2, "4 x 8 rows of 512 tokens are 16,384 a step"
    assert solved("--target-tokens=0.016384m") == 1
    assert solved("--target_tokens", "1B", "--seq_len", 1000, "--grad_accum", 1) == 250_000
    assert solved("--preset", "tiny", "--target_tokens", 1) == 1, "a preset's steps give way"


@pytest.mark.parametrize(
    "words, told",
    [
        (("--target_tokens", "1B", "--max_steps", "5"), ["--max_steps 5", "--target_tokens 1B"]),
        (("--target_tokens", "0"), ["--target_tokens 0", "above 0"]),
        (("--target_tokens", "-5"), ["--target_tokens"]),
        (("--target_tokens", "1T"), ["--target_tokens 1T", "100M"]),
        (("--target_tokens", "1.5"), ["--target_tokens 1.5"]),
        (
            ("--target_tokens", "1000000B", "--batch_size", "1"),
            ["--target_tokens 1000000B", "204,800,000,000 tokens", "50,000,000 steps"],
        ),
    ],
)
def test_a_budget_that_cannot_be_is_a_usage_error(words, told, capsys):
    with pytest.raises(UserError) as refusal:
        solved(*words)
    assert refusal.value.code == 2
    for part in told:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    "words, told",
    [
        (("--seq_schedule", "512@0;1024@9"), "--seq_schedule '512@0;1024@9' is not LENGTH@STEP"),
        (("--seq_schedule", ""), "--seq_schedule '' is not LENGTH@STEP"),
        (("--seq_schedule", "512@9,64@9"), "step 9 does not come after step 9"),
        (("--seq_schedule", "8@0"), "a length of 8 is below 16"),
        (("--seq_schedule", "64@0,512@9", "--block", "256"), "'512@9': a length of 512 is above"),
        (("--seq_len", "512", "--max_seq_len", "256"), "--seq_len 512 is above --max_context 256"),
        (("--seq_len", "512", "--block", "256", "--seq_schedule", "64@0"), "--seq_len 512 is"),
        (("--max_context", "8"), "at least 16"),
        (("--keep_tokens",), "--keep_tokens needs a --seq_schedule"),
        (
            ("--keep_tokens", "--seq_schedule", "96@0,512@9", "--batch_size", "1"),
            "768 tokens of the first step (--batch_size 1 x --grad_accum 8 rows of 96)",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "run_experiments"])
def test_lengths_that_cannot_be_are_a_usage_error(command, words, told):
    with pytest.raises(UserError) as refusal:
        cli.parse(config.COMMANDS[command], list(words), command)
    assert refusal.value.code == 2 and told in str(refusal.value)


def test_a_schedule_from_the_first_step_makes_the_length_idle():
    args, origins = cli.parse(
        config.TrainArgs, ["--seq_len", "64", "--seq_schedule", "32@0"], "train"
    )
    assert "--seq_len does nothing here: --seq_schedule begins at step 0" in args.idle(origins)
    assert args.longest == 32 and args.block_choices == [32, 32, 16, 4]
    later, origins = cli.parse(
        config.TrainArgs, ["--seq_len", "64", "--seq_schedule", "32@9"], "train"
    )
    assert not later.idle(origins) and later.longest == 64
    assert later.block_rules_at(32) == [32, 16, 4, 1]


def test_the_budgets_of_the_launch_guide_on_the_command_line():
    words = ("--batch_size", 1, "--grad_accum", 16, "--target_tokens", "10B")
    schedule = "1024@0,2048@10000,4096@80000"
    assert solved(*words, "--block", 4096, "--seq-schedule", schedule) == 195_088
    schedule = "2048@0,4096@60000,8192@140000"
    assert solved(*words, "--block", 8192, "--seq-schedule", schedule) == 161_294


@pytest.mark.parametrize("keep", [False, True])
def test_the_rows_of_a_forward_follow_from_the_length(keep):
    """Not from what came before: so a resume has the same ones."""
    args = config.TrainArgs(
        seq_len=32, seq_schedule="64@4,16@8", batch_size=4, grad_accum=2, keep_tokens=keep
    )
    run = SimpleNamespace(args=args, ranks=Ranks(), fits=None)
    wanted = {32: 4, 64: 2, 16: 8} if keep else {32: 4, 64: 4, 16: 4}
    assert {length: row_length.micro_at(run, length) for length in wanted} == wanted
    run.length, run.micro = 64, wanted[64]
    row_length.found_to_fit(run, 1)
    assert [row_length.micro_at(run, length) for length in (64, 32, 16)] == [1, 2, 4]
    half = SimpleNamespace(args=args, ranks=Ranks(1, 4), fits=None)
    assert row_length.micro_at(half, 32) == 2, "8 rows over 4 processes"


# ---- trainings

SHAPE = (
    "--d_model", 16, "--n_layers", 2, "--n_heads", 2, "--d_ff", 32, "--memory_slots", 2,
    "--batch_size", 4, "--grad_accum", 2, "--train_block_sizes", "T,8", "--ar_fade", 0,
    "--block_size", 4, "--lr", 3e-3, "--eval_batches", 1, "--threads", 1, "--no_amp",
    "--no_show_samples", "--live", "off",
)


def call(*words):
    return conftest.call(train.main, *words)


def fresh(text, run, *more):
    return call("--data_dir", text, "--output_dir", run, *SHAPE, *more)


def test_a_run_ends_with_its_budget_and_a_resume_solves_it_again(text, tmp_path, capsys):
    """8 rows of 16 tokens are 128 a step. Twice the rows need half of the steps; a number of steps
    replaces the budget.
    """
    run = tmp_path / "run"
    assert fresh(text, run, "--seq_len", 16, "--target_tokens", 300, "--eval_interval", 0) == 0
    assert [line["tokens_seen"] for line in log(run)] == [128, 256, 384]
    assert log(run, "meta")[0]["planned_tokens"] == 384
    assert call("--resume", run) == 0
    assert "nothing to do: step 3 of 3" in capsys.readouterr().err

    assert call("--resume", run, "--target_tokens", 600, "--no_show_samples") == 0
    assert log(run)[-1]["step"] == 5
    assert "max_steps: 3 -> 5" in capsys.readouterr().err
    assert call("--resume", run, "--target_tokens", 2000, "--batch_size", 8) == 0
    assert log(run)[-1]["step"] == 8, "256 tokens a step"

    assert call("--resume", run, "--max_steps", 9, "--no_show_samples") == 0
    saved = read_json(run / "step_000009/config.json")["args"]
    assert (saved["max_steps"], saved["target_tokens"]) == (9, None)
    assert call("--resume", run) == 0
    assert "nothing to do: step 9 of 9" in capsys.readouterr().err


def test_the_command_of_a_plan_has_the_steps_and_no_budget(tmp_path):
    args, _ = cli.parse(config.TrainArgs, ["--target_tokens", "1M"], "train")
    words = study_plan.flags(args)
    assert words[words.index("--max_steps") + 1] == "62" and "--target_tokens" not in words
    assert solved(*words) == 62
    assert not study_plan.unlike(study_plan.terms(config.TrainArgs(max_steps=62)), args)


CASES = {
    "primary": ("--model", "primary", "--dropout", 0.1, "--ema", 0.9),
    "backup, tokens kept": ("--model", "backup", "--keep_tokens", "--optimizer", "adamw"),
    "left to right alone": ("--model", "backup", "--objective", "ar", "--lr_schedule", "constant"),
}


def figures(run):
    """{step: what must not depend on where one stopped}"""
    names = ("loss", "mask", "lr", "gnorm", "block", "seq_len", "global_batch", "tokens_seen")
    return {line["step"]: [line[name] for name in names] for line in log(run)}


def place(run, step):
    """How many tokens of the text the run had read after this step, as its checkpoint says."""
    state = read_json(run / f"step_{step:06d}/state.json")
    return state["position"] * state["window"]


@pytest.mark.parametrize("case", CASES)
def test_a_resume_around_a_change_of_length_equals_the_whole_run(text, tmp_path, case, capsys):
    """Bit for bit, from just before, at and after the steps where rows become longer and shorter;
    24 does not divide 32, so the place in the text is rounded.
    """
    whole = tmp_path / "whole"
    last = 16 if "kept" in case else 24
    schedule = f"32@5,{last}@10"
    words = ("--seq_len", 16, "--seq_schedule", schedule, "--max_steps", 14)
    every = ("--save_interval", 1, "--keep_full", 99, "--eval_interval", 6, "--log_interval", 1)
    assert fresh(text, whole, *CASES[case], *words, *every) == 0
    told = capsys.readouterr().err
    assert "rows become shorter at step 10, 32 -> " in told
    assert "rows of 32 tokens from step 6 on" in told and " | length 32\n" in told
    unit = "128 tokens" if "kept" in case else "8"
    summary = (whole / "summary.md").read_text()
    assert f"rows: {unit} a step, length by step 16@0,{schedule}" in summary

    lengths = [line["seq_len"] for line in log(whole)]
    assert lengths == [16] * 5 + [32] * 5 + [last] * 4
    rows = [line["global_batch"] for line in log(whole)]
    tokens = [a * b for a, b in zip(lengths, rows, strict=True)]
    assert rows == ([8] * 5 + [4] * 5 + [8] * 4 if "kept" in case else [8] * 14)
    assert log(whole)[-1]["tokens_seen"] == log(whole, "meta")[0]["planned_tokens"] == sum(tokens)
    for step in range(1, 14):
        read = place(whole, step + 1) - place(whole, step)
        assert tokens[step] <= read < tokens[step] + lengths[step], "rounded up, by no window"

    for step in (4, 5, 6, 10) if case == "primary" else (5, 6):
        cut = tmp_path / f"cut_{step}"
        name = f"step_{step:06d}"
        shutil.copytree(whole / name, cut / name)
        assert call("--resume", cut, "--no_show_samples", "--threads", 1) == 0
        assert figures(cut) == {n: line for n, line in figures(whole).items() if n > step}, step
        end = "step_000014"
        for file in (whole / end).glob("*.safetensors"):
            assert file.read_bytes() == (cut / end / file.name).read_bytes(), (step, file.name)
        assert place(cut, 14) == place(whole, 14)


def test_a_signal_at_a_change_of_length_changes_nothing(text, tmp_path, monkeypatch):
    """SIGTERM in the step behind the change: the step is given up, when the place in the text is
    counted in the new windows already.
    """
    words = ("--seq_len", 16, "--seq_schedule", "24@5", "--max_steps", 9, "--eval_interval", 0)
    assert fresh(text, tmp_path / "whole", *words) == 0
    real = training_step.gradients

    def stopped(run, x0, *rest, **more):
        if run.state.step == 5 and run.folder.name == "cut":
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, x0, *rest, **more)

    monkeypatch.setattr(training_step, "gradients", stopped)
    assert fresh(text, tmp_path / "cut", *words) == 0
    monkeypatch.setattr(training_step, "gradients", real)
    saved = read_json(tmp_path / "cut/step_000005/state.json")
    assert (saved["position"], saved["window"]) == (27, 24), "40 windows of 16, rounded up"
    assert call("--resume", tmp_path / "cut", "--no_show_samples") == 0
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


def test_a_step_back_across_a_change_keeps_the_place_in_the_text(text, tmp_path, monkeypatch):
    """After a loss spike the run goes back to shorter rows, and on with the windows behind the
    spike.
    """
    begins, spikes = [], [7]
    real = Windows.batch

    def batch(windows, index, count):
        begins.append((index * windows.seq_len, (index + count) * windows.seq_len))
        return real(windows, index, count)

    def spike(watch, loss, block):
        if len(begins) in spikes:
            spikes.clear()
            return loss / 9
        return None

    monkeypatch.setattr(Windows, "batch", batch)
    monkeypatch.setattr(recovery.SpikeWatch, "spike", spike)
    words = ("--seq_len", 16, "--seq_schedule", "24@5", "--max_steps", 8, "--eval_interval", 0)
    more = ("--save_interval", 4, "--spike_factor", 3, "--spike_rollback")
    assert fresh(text, tmp_path / "run", *words, *more) == 0
    assert log(tmp_path / "run", "rollback")[0]["to"] == 4
    assert [line["seq_len"] for line in log(tmp_path / "run")] == [16] * 5 + [24] + [16] + [24] * 3
    for (_, end), (begin, _) in zip(begins, begins[1:], strict=False):
        assert end <= begin < end + 24


def test_a_resume_may_bring_a_schedule(text, tmp_path, capsys):
    """A run of one length goes on with longer rows; the held-out windows are other ones, so `best`
    starts anew. What the checkpoints have learned from is what sample asks.
    """
    run = tmp_path / "run"
    words = ("--seq_len", 16, "--max_steps", 4, "--eval_interval", 2, "--save_interval", 2)
    assert fresh(text, run, *words, "--keep_full", 9) == 0
    assert call("--resume", run, "--seq_schedule", "32@6", "--max_steps", 8, "--threads", 1) == 0
    assert "seq_schedule: None -> 32@6" in capsys.readouterr().err
    assert [line["seq_len"] for line in log(run)] == [16] * 6 + [32] * 2
    assert (run / "best").read_text().startswith(("step_000006", "step_000008"))

    lengths = {}
    for step_name in ("step_000004", "step_000006", "step_000008"):
        saved = checkpoint.load_model(run / step_name, "cpu", config.check_saved)[2]
        lengths[saved.step] = (config.trained_length(saved), config.scored_length(saved))
        assert max(settings.trained_blocks(saved)) == config.trained_length(saved)
    assert lengths == {4: (16, 16), 6: (16, 32), 8: (32, 32)}
    assert "32@6" in (run / "summary.md").read_text()

    # state.json of before: its windows are as long as the rows
    del saved.state["window"]
    assert run_folder.counters(saved)["window"] == 16


def test_text_that_is_too_short_for_a_later_length_is_refused_at_once(text, tmp_path, capsys):
    words = ("--seq_len", 16, "--seq_schedule", "100000@3", "--max_steps", 4)
    assert fresh(text, tmp_path / "run", *words) == 2
    assert "fewer than one window of 100000" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_memory_is_probed_at_the_longest_length(text, tmp_path, monkeypatch, capsys):
    """And the steps before it have as many rows in a forward as --batch_size says."""
    asked = []
    real = training_step.gradients

    def counted(run, x0, masks, *rest, **more):
        asked.append(tuple(x0.shape))
        return real(run, x0, masks, *rest, **more)

    monkeypatch.setattr(training_step, "gradients", counted)
    words = ("--seq_len", 16, "--seq_schedule", "32@1", "--max_steps", 2, "--eval_interval", 0)
    assert fresh(text, tmp_path / "run", *words, "--auto_batch") == 0
    assert asked == [(4, 32)] * 3 + [(8, 16), (8, 32)]
    assert "memory: 4 x 32 tokens per forward" in capsys.readouterr().err


def test_the_plan_of_a_study_counts_each_length():
    """FLOPs of a token lie between those of its lengths; whole rows are T at the longest."""
    args = config.TrainArgs(seq_len=64, seq_schedule="1024@50", max_steps=100, model="backup")
    shape = model_config(args, 100)
    mixed = study_plan.flops(shape, args)
    short, long = (
        study_plan.flops(shape, config.TrainArgs(seq_len=length, model="backup", max_steps=100))
        for length in (64, 1024)
    )
    assert mixed == pytest.approx((64 * short + 1024 * long) / (64 + 1024))
    assert short < mixed < long


def test_pairs_have_one_length(tmp_path, capsys):
    """A row is one pair, whatever its length."""
    lines = [json.dumps({"prompt": f"kya {n}?", "response": f"haan {n}"}) for n in range(300)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    words = ("--source", "pairs", "--input", tmp_path / "pairs.jsonl", "--tokenizer_vocab", 320)
    places = ("--data_dir", tmp_path / "data", "--tokenizer", tmp_path / "t.model")
    assert conftest.call(prepare.main, *words, *places) == 0
    more = ("--seq_len", 32, "--max_steps", 2, "--seq_schedule", "64@1")
    capsys.readouterr()
    assert fresh(tmp_path / "data", tmp_path / "run", *more) == 2
    assert "--seq_schedule 64@1: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
