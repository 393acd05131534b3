"""A run as one page: report.html with curves, samples, configuration, data and machine, from
train.jsonl alone.

    python -m report checkpoints/eco_hybrid_hi     # again: train.py writes it at each end

The page holds everything it shows: inline SVG, no script, no font and no picture from elsewhere, so
it works from a file and by mail. What a resume or a rollback took back is not drawn. Whatever
train.jsonl holds, a page comes out: lines and figures that are none are left out, texts are
escaped.
"""
from pathlib import Path

import cli
import config
from common.console import UserError, say
from common.files import write_text
from evaluation.run_report import page


def main(argv=None):
    args, _ = cli.parse(config.ReportArgs, argv, "report")
    run = Path(args.ckpt)
    if not (run / "train.jsonl").is_file():     # a checkpoint inside of the run folder
        run = run.parent
    if not (run / "train.jsonl").is_file():
        raise UserError(
            f"{args.ckpt} has no train.jsonl: name a run folder, such as checkpoints/eco_hybrid_hi"
        )
    out = Path(args.out or run / "report.html")
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: No such file or directory")
    write_text(out, page(run / "train.jsonl"))
    say(f"{out}: open it in a browser")


if __name__ == "__main__":
    cli.run(main)
