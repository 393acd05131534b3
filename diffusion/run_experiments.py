"""Older name of `python -m run_experiments`: matched trainings of both denoisers, and their report.

    python -m diffusion.run_experiments ...       or       python diffusion/run_experiments.py ...
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root, when run by its path

import cli
import run_experiments


def main(argv=None):
    return run_experiments.main(argv)


if __name__ == "__main__":
    cli.run(main)
