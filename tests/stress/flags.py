"""Odd values for every flag of every command: each must be taken, or refused in a sentence.

    python tests/stress/flags.py                            # an hour
    python tests/stress/flags.py --commands sample evaluate
    python tests/stress/flags.py --commands train --beside --objective gaussian

The commands run on a small text and model that they make first. Each case is a process forked from
this one, so that PyTorch is imported once. A case fails with a traceback, an exit code that has no
meaning (docs/commands.md), or after SECONDS without an end.
"""
import argparse
import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import config  # noqa: E402
import edge_benchmark  # noqa: E402
import evaluate  # noqa: E402
import export  # noqa: E402
import prepare  # noqa: E402
import report  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from common import console  # noqa: E402

SECONDS = 60
CODES = (0, 1, 2, 3)
WORDS = "lal nila hara nadi pahad ghar bazaar khush ladka pani".split()
HINDI = "लाल नीला हरा नदी पहाड़ घर बाज़ार खुश लड़का पानी".split()
VALUES = {
    "int": ["-1", "0", "1", "2", "3", "7", "1000000000000", "9223372036854775808", "1.5"],
    "float": ["-1", "0", "1e-12", "0.5", "0.999999", "1", "2", "1e29", "nan", "inf"],
    "str": ["", "x", "ä\n", "../../x", "/dev/null", "none", "0"],
    "bool": ["on", "off"],
}
# their large numbers rightly take for ever
LONG = {"max_steps", "benchmark_runs", "warmup_runs", "runs_per_prompt", "draws", "repeats",
        "samples"}
# they choose another size, machine, folder or network, or take minutes
LEFT_OUT = {
    "preset", "config", "edge_profile", "list_presets", "device", "data_dir", "output_dir", "live",
    "fsdp", "drive", "wandb", "compile",
}
QUICK = ["--device", "cpu", "--threads", "1"]
PREPARE = ["--data_dir", "OUT", "--tokenizer", "OUT/t.model", "--source"]
SHORT = ["--ckpt", "run", "--max_new_tokens", "6", *QUICK]
COMMANDS = {
    "prepare": (prepare.main, config.PrepareArgs, [*PREPARE, "files", "--input", "a.txt"]),
    "prepare pairs": (
        prepare.main, config.PrepareArgs,
        [*PREPARE, "pairs", "--cut_documents", "--input", "a.txt"],
    ),
    "prepare transliterate": (
        prepare.main, config.PrepareArgs, [*PREPARE, "transliterate", "--input", "hindi.txt"]
    ),
    "train": (
        train.main, config.TrainArgs,
        ["--data_dir", "data", "--preset", "nano", "--max_steps", "2", "--eval_interval", "0",
         "--save_interval", "0", "--no_show_samples", "--output_dir", "OUT/run", *QUICK],
    ),
    "sample": (sample.main, config.SampleArgs, [*SHORT, "--prompt", "lal nila"]),
    "evaluate": (
        evaluate.main, config.EvaluateArgs,
        ["--ckpt", "run", "--batches", "1", "--max_docs", "2", "--chain_docs", "1", "--draws", "1",
         *QUICK],
    ),
    "edge_benchmark": (
        edge_benchmark.main, config.BenchArgs,
        [*SHORT, "--runs_per_prompt", "1", "--warmup_runs", "0"],
    ),
    "export": (
        export.main, config.ExportArgs,
        ["--ckpt", "run", "--output", "OUT/exported", "--threads", "1"],
    ),
    "report": (report.main, config.ReportArgs, ["--ckpt", "run", "--out", "OUT/page.html"]),
}


def write_texts():
    """A text of three sentences a document, and one in Devanagari."""
    rng = random.Random(1)

    def sentence(words, count):
        return " ".join(rng.choices(words, k=count))

    documents = [
        f"{sentence(WORDS, 12).capitalize()}. {sentence(WORDS, 20)}. Phir {sentence(WORDS, 9)}."
        for _ in range(300)
    ]
    Path("a.txt").write_text("\n\n".join(documents))
    lines = [sentence(HINDI, 8) + "।" for _ in range(200)]
    Path("hindi.txt").write_text("\n".join(lines), encoding="utf-8")


def run(main, words):
    """One command in a process of its own -> (its exit code, None if it did not end; what it said).
    """
    shutil.rmtree("OUT", ignore_errors=True)
    os.mkdir("OUT")
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        said = os.open("said", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for file, number in ((nothing, 0), (said, 1), (said, 2)):
            os.dup2(file, number)
        code = 99
        try:
            console.run(main, words)
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    end = time.monotonic() + SECONDS
    code = None
    while code is None and time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    if code is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return code, Path("said").read_text(encoding="utf-8", errors="replace")


def cases(args_class):
    """The flags and the values that each is given."""
    for field in dataclasses.fields(args_class):
        if field.name in LEFT_OUT:
            continue
        choices = field.metadata.get("choices")
        if choices:
            values = [*map(str, choices() if callable(choices) else choices), "x"]
        else:
            kind = getattr(field.type, "__name__", str(field.type))
            values = VALUES.get(kind, ["x", "0", ""])
        for value in values:
            if field.name not in LONG or len(value) < 9:
                yield f"--{field.name}", value


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--beside", nargs=argparse.REMAINDER, default=[], help="flags of all cases")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bad = 0
    with tempfile.TemporaryDirectory() as home:
        os.chdir(home)
        write_texts()
        for command, words in (
            (prepare, "--source files --input a.txt --data_dir data --tokenizer data/t.model"),
            (train, "--data_dir data --preset nano --max_steps 60 --output_dir run --cpu"),
        ):
            code, said = run(command.main, words.split())
            assert code == 0, said
        for name in asked.commands:
            entry, args_class, base = COMMANDS[name]
            started = time.perf_counter()
            count = 0
            for flag, value in cases(args_class):
                code, said = run(entry, [*base, *asked.beside, flag, value])
                count += 1
                if code not in CODES or "Traceback" in said or code == 1 and "error:" not in said:
                    bad += 1
                    end = " / ".join(said.strip().splitlines()[-3:])
                    print(f"{name} {flag} {value!r}: exit code {code}: {end[-300:]}", flush=True)
            seconds = time.perf_counter() - started
            print(f"{name}: {count} cases in {seconds:.0f} s, {bad} bad so far", flush=True)
        os.chdir(ROOT)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
