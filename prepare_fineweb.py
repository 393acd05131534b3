"""English web text as one token file in GPT-2's encoding, streamed from the hub: FILE.npy, and
FILE.npy.meta beside it.

    python -m prepare_fineweb --tokens 1B --output fineweb_1b.npy
    python -m prepare_fineweb --tokens 100M --output fineweb_100m.npy
    python -m train --data fineweb_100m.npy                # what it is for

Stopped at any moment, the same command goes on where it was. The work is text/fineweb.py's.
"""
import shlex

import cli
import config
from common.console import check_packages, printable, say

if __name__ == "__main__":
    # before the heavy imports: --help has to be instant
    cli.answer_help(config.FinewebArgs, "prepare_fineweb")
    check_packages()

from text import fineweb


def main(argv=None):
    args, _ = cli.parse(config.FinewebArgs, argv, "prepare_fineweb")
    fineweb.build(args.path, args.count, args.kind, args.force, say)
    print(printable(f"next: python -m train --data {shlex.quote(str(args.path))}"))


if __name__ == "__main__":
    cli.run(main)
