"""What the scripts of this folder share: the repository on the path, a parser, taking turns.

They import it before the project's modules.
"""
import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def arguments(doc, **more):
    """A parser for a script with this docstring, whose first line describes it."""
    return argparse.ArgumentParser(description=doc.split("\n")[0], **more)


def in_turn(runs, rounds, clock=time.perf_counter, warm_up=True):
    """{name: function} -> {name: [seconds of each round]}. In a round each runs once, so that a
    noisy neighbour hits all of them; one untimed round comes first, unless nothing has to warm
    up."""
    taken = {name: [] for name in runs}
    for turn in range(-1 if warm_up else 0, rounds):
        for name, run in runs.items():
            started = clock()
            run()
            if turn >= 0:
                taken[name].append(clock() - started)
    return taken


def tiny_text(folder):
    """Five thousand tokens of the starter corpus in this folder, and their tokenizer, t.model ->
    the folder.
    """
    import prepare
    prepare.main(["--source", "builtin", "--max_chars", "7000", "--tokenizer_vocab", "400",
                  "--data_dir", str(folder), "--tokenizer", str(folder / "t.model")])
    return folder
