"""What following a run costs: each level of --instrument, the texts of --sample_every, the picture.

    python benchmarks/following_cost.py [--preset starter] [--model primary] [--rounds 5]

Trains on the starter corpus in a temporary folder. One process takes the steps of all levels in
turn, each with an analysis (--analysis_every 1), and times them in process time, so that other work
on the machine counts little. The last line is one JSON document.
"""
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from harness import arguments, in_turn

import cli
import config
import prepare
from training import distributed, logs, setup, step, validation
from training.live import View

LEVELS = ("off", "basic", "medium", "full")


class Screen(io.StringIO):
    """A terminal that nobody sees."""

    def isatty(self):
        return True


def a_run(folder, words):
    """The Run of train with these words, as its loop has it before the first step."""
    args, origins = cli.parse(config.TrainArgs, words, "train")
    run = setup.setup(args, origins, distributed.Ranks(), Path(folder, "run"), None, False)
    run.folder.mkdir()
    run.progress = logs.Progress(run.args, 0, "a run")
    setup.open_log(run)
    return run


def steps(run, level):
    """One step of training at this level, as a function."""
    def one():
        run.args.instrument = level
        step.train_step(run)
        run.state.step += 1
    return one


def drawing(run):
    """One step's picture, drawn, as a function; a second one that is skipped as it comes too soon.
    """
    with contextlib.redirect_stderr(Screen()):
        view = View("a run")
    figures = dict(gnorm=1.0, mask=0.5, mfu=0.3, memory=500.0, lr=1e-3)
    run.progress.step(1, 1000, 1.0)

    def drawn():
        run.progress.done += 1
        view.drawn = 0.0
        view.show(run.progress, loss=3.0, **figures)

    def skipped():
        run.progress.done += 1
        view.drawn = time.monotonic() + 9
        view.show(run.progress, loss=3.0, **figures)
    return {"picture drawn": drawn, "picture skipped": skipped}


def main():
    parser = arguments(__doc__)
    parser.add_argument("--preset", default="starter")
    parser.add_argument("--model", default="primary")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ["COLUMNS"], os.environ["LINES"] = "100", "40"
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder, "data"))
        prepare.main(["--source", "builtin", "--max_chars", "1000000", "--data_dir", data,
                      "--tokenizer", str(Path(folder, "t.model"))])
        run = a_run(folder, [
            "--preset", options.preset, "--model", options.model, "--data_dir", data,
            "--analysis_every", "1", "--sample_every", "1", "--threads", "1", "--cpu",
            "--tensorboard", "off", "--train_block_sizes", "32", "--ar_fade", "0",
        ])
        work = {f"step, {level}": steps(run, level) for level in LEVELS}
        work["texts of four prompts"] = lambda: validation.follow(run, True)
        work |= drawing(run)
        taken = in_turn(work, options.rounds, time.process_time)
        run.log.close()
    found = {
        name: dict(
            median=round(statistics.median(each), 4), least=round(min(each), 4),
            most=round(max(each), 4),
        )
        for name, each in taken.items()
    }
    for name, figures in found.items():
        print(f"{name:24} {figures['median']:.4f} s ({figures['least']:.4f}-{figures['most']:.4f})")
    about = dict(preset=options.preset, model=options.model, params=run.params, seconds=found)
    print(json.dumps(about))


if __name__ == "__main__":
    main()
