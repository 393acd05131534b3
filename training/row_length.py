"""The rows of a step: --seq_schedule changes their length in mid-run, and with it the windows of
the text that are read, and how many rows a step and a forward have.

    use_length(run, 512)        # what follows from a length
    follow_schedule(run)        # at the beginning of each step

Used by training/setup.py and training/step.py. All of it is a function of the length, and the
place in the text is carried over by one rule, so a resume at, before or after a change equals the
uninterrupted run bit for bit. (Rows that did not fit into memory are the exception, as ever.)
"""
from common.console import say
from text.pairs import windows_of


def use_length(run, length):
    """The rows of this length: their number, this rank's share, the windows, rows of a forward."""
    run.length = length
    run.rows = run.args.rows_at(length)
    run.mine = run.ranks.share(run.rows)
    run.step_tokens = run.rows * length
    run.windows = windows_at(run, length)
    run.micro = micro_at(run, length)


def windows_at(run, length):
    """The text in rows of this length."""
    args = run.args
    return windows_of(
        run.data, length, args.seed, args.conditioning_dropout, args.rows_at(length), args.causal
    )


def micro_at(run, length):
    """Rows of a forward with this length: --batch_size, as far as this rank has so many, and as far
    as they fit.
    """
    mine = run.ranks.share(run.args.rows_at(length))
    micro = min(run.args.batch_at(length), mine.stop - mine.start)
    if run.fits is None:
        return micro
    return max(1, min(micro, run.fits // length))


def found_to_fit(run, micro):
    """Remember that only so many rows of the present length fit; fewer of longer ones will."""
    if micro < run.micro:
        run.fits = micro * run.length
    run.micro = micro


def follow_schedule(run):
    """Use the length that is in force after the steps that are done. The place in the text is
    counted in windows, so it is converted, rounded up: the tokens that were read never become less.

    The windows of each length have an order of their own. So in the epoch in which the length
    changes, a part of the text may come twice, and another one not at all.
    """
    state = run.state
    length = run.args.lengths.at(state.step)
    if length != run.length:
        use_length(run, length)
        say(f"length: {run.rows} rows of {length} tokens from step {state.step + 1} on")
    if length != state.window:
        state.position = -(-state.position * state.window // length)
        state.window = length
