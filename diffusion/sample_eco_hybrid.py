"""Older name of `python -m sample --model primary`: text from a checkpoint of the primary denoiser.

    python -m diffusion.sample_eco_hybrid ...       or       python diffusion/sample_eco_hybrid.py
        ...
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root, when run by its path

import cli
import sample


def main(argv=None):
    return sample.main(argv, pinned={"model": "primary"})


if __name__ == "__main__":
    cli.run(main)
