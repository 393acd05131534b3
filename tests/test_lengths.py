"""The length of training rows: the grammar of a schedule, token budgets, and a training whose rows
change their length.

    python -m pytest tests/test_lengths.py
"""
import random

import pytest

import cli
import config
import conftest
import train
from common.console import UserError
from common.files import read_json
from conftest import log
from evaluation import study_plan
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
