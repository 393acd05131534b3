"""Plan a run of about a billion parameters on one GPU, and start it.

    python -m run_1b_launch --data fineweb_1b.npy                # the plan and the command, no more
    python -m run_1b_launch --data fineweb_1b.npy --run          # the same, and start it
    python -m run_1b_launch --data fineweb_1b.npy --tier 24gb --variant gqa --run

Trains the transformer of model.py by train.py, whose every flag may be given here, too. The guide
is docs/LAUNCH_1B.md; the plan is made by training/launch_plan.py.
"""
import os
import shlex
import subprocess

import cli
import config
from common.console import UserError, printable, say

if __name__ == "__main__":
    # before the other imports: --help has to be instant
    cli.answer_help(config.LaunchArgs, "run_1b_launch")

from training import launch_plan


def main(argv=None):
    args, origins = launch_plan.parse(argv)
    plan = launch_plan.Plan(args, origins)
    cli.announce(args, origins)
    for line in plan.lines():
        print(printable(line))
    for remark in plan.remarks:
        say(remark)
    print(printable(shlex.join(plan.command())), flush=True)
    if not args.run:
        print("dry run: add --run to start")
        return 0
    return start(plan)


def start(plan):
    """This process becomes the training, so signals and the exit code are its own."""
    words = plan.command()
    environment = launch_plan.environment(os.environ)
    try:
        if os.name == "nt":                     # there a process cannot become another one
            return subprocess.run(words, env=environment).returncode
        os.execvpe(words[0], words, environment)
    except OSError as error:
        raise UserError(f"--python {words[0]}: {error.strerror}") from None


if __name__ == "__main__":
    cli.run(main)
