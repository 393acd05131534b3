"""Older name of `python -m colab_train_eco`: data, tokenizer and training in one command.

    python -m diffusion.colab_train_eco ...       or       python diffusion/colab_train_eco.py ...
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the root, when run by its path

import cli
import colab_train_eco


def main(argv=None):
    return colab_train_eco.main(argv)


if __name__ == "__main__":
    cli.run(main)
