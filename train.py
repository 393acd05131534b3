"""Train a masked-diffusion language model.

    python -m train --preset starter                     # the built-in corpus, minutes on a laptop
    python -m train --data_dir data/processed            # your own text, after python -m prepare
    python -m train --resume checkpoints/eco_hybrid_hi   # continue exactly where a run stopped
    torchrun --nproc_per_node 8 -m train --fsdp          # several GPUs or machines: docs/SCALING.md

Reads from top to bottom: parse, set up (training/setup.py), then a loop of evaluate? save? stop?
step (training/step.py), log. Randomness is a function of (seed, step), never of history, so a
resumed run equals the uninterrupted one bit for bit on a CPU, and evaluating more often changes
nothing. One exception: --spike_rollback goes back to the last checkpoint, so a stop, which saves,
can change where to.
"""
import contextlib
import dataclasses
import time
from pathlib import Path

import cli
import config
import model_config
from common.console import say

NON_FINITE_LIMIT = 5   # steps in a row with a NaN or infinite loss or gradient, then the run stops
SAVE_LIMIT = 3         # saves in a row that failed, then the run stops


def advised(typed):
    """Settings for a command line that asks for no size: a CPU that has the starter corpus alone
    trains the starter preset.
    """
    starter = config.PRESETS["starter"]
    sizes = {*starter, "preset", "edge_profile", "config", "data_dir", "model"}
    sizes -= {"max_steps", "save_interval", "eval_interval", "eval_batches"}  # how long, how often
    sizes |= {"resume", "resume_latest", "ckpt"}                  # those have their own settings
    if typed.keys() & sizes or typed.get("objective") == "ar":
        return {}
    if Path(config.TrainArgs.data_dir, "meta.json").exists():
        return {}
    from common import machine
    if machine.pick_device(typed.get("device", "auto")).type != "cpu":
        return {}
    shape = model_config.model_config(config.TrainArgs(**starter), vocab_size=1)
    backup = dataclasses.replace(shape, model="backup")
    d_ff = model_config.match_d_ff(shape, model_config.count_params(backup))
    return starter | {"d_ff": d_ff}


def main(argv=None, pinned=None):
    # --help and usage errors end here, before torch is imported
    args, origins = cli.parse(config.TrainArgs, argv, "train", pinned, None if pinned else advised)
    return start(args, origins)[0]


def start(args, origins):
    """Train with these arguments, alone or as one of torchrun's processes -> exit code, the signal
    that stopped it.
    """
    from training import distributed, presets, run_folder
    if args.print_config:
        cli.announce(args, origins)
    stopped = None
    with distributed.process_group(args) as ranks:
        if args.list_presets:
            presets.show(args, ranks)
            return 0, None
        choice = run_folder.choose(args, origins) if ranks.main else None
        run_dir, source, resuming = ranks.broadcast_object(choice)
        if run_dir is None:
            say(f"skipped: {args.run_dir} already holds a run and --if_exists skip was given")
            ranks.code = 0
        else:
            with run_folder.locked(Path(run_dir)) if ranks.main else contextlib.nullcontext():
                ranks.code, stopped = train(args, origins, ranks, Path(run_dir), source, resuming)
    return ranks.code, stopped


def train(args, origins, ranks, run_dir, source, resuming):
    """-> exit code, the name of the signal that stopped it or None."""
    from training import ending, logs, setup, validation

    # ---- set up: machine, checkpoint, text, model, optimizer, memory
    run = setup.setup(args, origins, ranks, run_dir, source, resuming)
    if run is None:
        return 0, None

    # ---- train; a signal ends the loop, and the end of the log is written all the same
    title = f"{run.folder}: {run.args.model}, {run.params:,} parameters"
    run.progress = logs.Progress(run.args, run.state.first_step, title)
    with run.stop, run.progress, run.anomaly_detection():
        setup.open_log(run)
        code = loop(run)
        stopped = ending.close_log(run, code)

    # ---- what a person reads at the end
    ending.store_once_more(run)
    say(run.summary)
    if stopped:
        ending.say_how_to_go_on(run, stopped)
    elif run.speaks and not code:
        code = validation.print_samples(run)
    return code, stopped


def loop(run):
    """Evaluate? save? stop? step, log: one turn more than steps, so that the last evaluation and
    the last save are ordinary -> exit code.
    """
    from training import ending, saving, step, validation

    args, state, ranks = run.args, run.state, run.ranks
    state.saved_at = time.monotonic()
    while True:
        state.remember_good()
        last = state.step == args.max_steps
        # a resume does not repeat what its checkpoint holds; a step that was given up comes again
        new = state.step > state.held_step

        # ---- evaluate?
        on_schedule = args.eval_interval and (last or state.step % args.eval_interval == 0)
        state.eval_due = bool(new and on_schedule)
        if state.eval_due and not state.scored:
            validation.evaluate(run)                          # or a signal gives it up
        if new and run.samples and (last or state.step % args.sample_every == 0):
            validation.follow(run, last)

        # ---- save? one rank's clock and one rank's signal are everybody's
        late = args.save_minutes and ranks.broadcast_object(
            time.monotonic() - state.saved_at >= 60 * args.save_minutes
        )
        signal = ranks.all_reduce_max(run.stop.signal)
        ending_now = last or signal is not None
        save_due = new and (ending_now or state.step % (args.save_interval or 500) == 0 or late)
        if save_due and state.can_be_saved:
            # a stop has to be quick: then only weights under suspicion are asked, with one row
            ask = signal is None or state.bad_in_a_row
            rows = run.scoring_rows if signal is None else 1
            state.ruined_step = 0
            if ask and not validation.still_sound(run, rows):
                state.ruined_step = state.good.step
        if save_due and state.can_be_saved:
            is_best = state.scored and state.nats < state.kept
            state.saved_at = time.monotonic()
            if saving.save(run, is_best, state.nats if state.scored else None):
                state.unsaved = 0
                state.held_step = state.good.step
                if is_best:
                    state.kept = state.nats
            else:
                state.unsaved += 1

        # ---- stop?
        if state.unsaved == SAVE_LIMIT or state.cannot_be_kept and ending_now:
            ending.say_unsaved(run)
            return 1
        if ending_now:
            return 0

        # ---- step
        result = step.train_step(run)
        if result is None:                 # given up by a signal, or taken back after a loss spike
            continue

        # ---- log
        step.log_step(run, result)
        if state.bad_in_a_row == NON_FINITE_LIMIT:
            ending.give_up(run, result)
            return 1
        state.step += 1


if __name__ == "__main__":
    cli.run(main)
