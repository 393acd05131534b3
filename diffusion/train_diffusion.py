"""Older name of `python -m train --model backup`: train the backup denoiser.

    python -m diffusion.train_diffusion ...       or       python diffusion/train_diffusion.py ...
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root, when run by its path

import cli
import train


def main(argv=None):
    return train.main(argv, pinned={"model": "backup"})


if __name__ == "__main__":
    cli.run(main)
