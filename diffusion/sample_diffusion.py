"""Older name of `python -m sample --model backup`: text from a checkpoint of the backup denoiser.

    python -m diffusion.sample_diffusion ...       or       python diffusion/sample_diffusion.py ...
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root, when run by its path

import cli
import sample


def main(argv=None):
    return sample.main(argv, pinned={"model": "backup"})


if __name__ == "__main__":
    cli.run(main)
