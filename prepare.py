"""Text to token files: train.bin, val.bin and meta.json, and a tokenizer when there is none yet.

    python -m prepare --source files --input my_texts/ more.jsonl.gz --data_dir data/processed
    python -m prepare --source hindi --report report.html  # Hindi and Hinglish, cleaned
    python -m prepare --source builtin                     # the synthetic starter corpus, offline
    python -m prepare --source pairs --input pairs.jsonl   # {"prompt": ..., "response": ...}

text/documents.py says which files are read; "-" is standard input. An existing --tokenizer is
reused and never overwritten: to train one on the new text, delete it or name another path. The work
is text/build.py's.
"""
import shlex
from pathlib import Path

import cli
import config
from common.console import check_packages, printable, say

if __name__ == "__main__":
    # before the heavy imports: --help has to be instant
    cli.answer_help(config.PrepareArgs, "prepare")
    check_packages()

from text.build import build


def print_line(text):
    print(printable(text))


def main(argv=None):
    args, origins = cli.parse(config.PrepareArgs, argv, "prepare")
    if args.source == "transliterate" and origins["tokenizer"] == "default":
        # one of single letters, which no other text would be well served with
        args.tokenizer = str(Path(args.data_dir, "tokenizer.model"))
    cli.announce(args, origins)
    meta = build(args, say if args.quiet else print_line)
    length = f" --seq_len {max(16, meta['pairs']['longest'])}" if "pairs" in meta else ""
    print_line(f"next: python -m train --data_dir {shlex.quote(args.data_dir)}{length}")


if __name__ == "__main__":
    cli.run(main)
