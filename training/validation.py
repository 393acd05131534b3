"""Held-out text during a training: the figure, sample texts, and whether weights are still sound.

Used by the loop in train.py. Everything here has randomness of its own, so that evaluating more
often changes nothing in the training.
"""
import contextlib

import torch

import config
from common import machine
from common.console import UserError, printable, say
from evaluation.estimators import bits_per_byte, held_out
from sampling import continuous
from sampling.decode import generate
from sampling.gaussian_writer import GaussianWriter
from sampling.settings import SPECULATE, Settings, opening
from sampling.torch_model import TorchModel
from sampling.transliteration import answer_to
from training import recovery

LENGTH = 48     # tokens of a continuation that a person reads


def evaluate(run):
    """Score the held-out windows in every block rule; the mean becomes run.state.nats.

    A signal gives it up; the resume of such a run evaluates this step.
    """
    args, state = run.args, run.state
    run.model.eval()
    try:
        with torch.no_grad(), run.autocast(), run.averaged():
            scores = held_out(
                run.model, run.held, run.blocks, 0, run.scoring_rows, 1, run.ranks, run.stop.piece,
                run.held_asked,
            )
    except machine.Stopped:
        return
    finally:
        run.ranks.reshard(run.model)
    nats = sum(score["nats"] for score in scores.values()) / len(scores)
    error = max(score["se"] for score in scores.values())
    bpb = bits_per_byte(nats, run.val.meta)
    run.log.write(
        "eval",
        step=state.step,
        val_nelbo=nats,
        val_ci=1.96 * error,
        val_bpb=bpb,
        best=nats < state.best,
        val_masked_mean=sum(score["masked_mean"] for score in scores.values()) / len(scores),
        by_block={block_name(run, b): score["nats"] for b, score in scores.items()},
    )
    bits = "" if bpb is None else f"{bpb:.4f} bits/byte | "
    by_block = " ".join(f"{block_name(run, b)}: {score['nats']:.4f}" for b, score in scores.items())
    say(
        f"eval {state.step}/{args.max_steps} | {args.measure} {nats:.4f} +- {1.96 * error:.4f} "
        f"nats/token | {bits}{by_block}"
    )
    log_samples(run)
    state.nats = nats
    state.best = min(state.best, nats)
    state.scored_step = state.step
    run.progress.scored(nats)


def block_name(run, block):
    """A block rule as the flags call it."""
    return "T" if block >= run.args.longest else str(block)


def log_samples(run):
    """Short continuations of two fixed prompts for the log, unless --sample_every asks for more."""
    if run.speaks and not run.args.sample_every:
        write_samples(run, run.prompts[:2], 24)


def follow(run, last):
    """--sample_every: the same prompts with the same seed again, for the console and every log. The
    end of a run prints them anyway.
    """
    for prompt, text in write_samples(run, run.prompts, LENGTH):
        if not last or not run.speaks:
            say(f"sample {run.state.step}/{run.args.max_steps} | {prompt} ▸ {one_line(text)}")


def one_line(text):
    return " ".join(text.split())


def write_samples(run, prompts, length):
    """Continuations of prompts into the log -> those that came about: [(prompt, text)]."""
    run.model.eval()
    found = []
    for prompt in prompts:
        try:
            text = speak(run, prompt, length)
        except (FloatingPointError, UserError) as error:  # NaN logits, a prompt that cannot be
            run.log.write("warn", step=run.state.step, message=f"no sample: {error}")
            continue
        except machine.Stopped:
            break
        run.log.write("sample", step=run.state.step, prompt=prompt, text=text)
        found.append((prompt, text))
    return found


def speak(run, prompt, length):
    """The model's continuation of a prompt as sample writes it: left to right, if it was trained in
    blocks.
    """
    args, tokenizer = run.args, run.tokenizer
    if run.cfg.interlaced:
        return transliterated(run, prompt)
    if args.gaussian:
        return speak_out_of_noise(run, prompt, length)
    in_blocks = min(run.blocks) < args.longest
    settings = Settings(
        max_new_tokens=length,
        steps=length,
        mode="block_frozen" if in_blocks else "full",
        block_size=1 if in_blocks else args.block_size,
        temperature=config.NEWER["temperature"],
        eos_id=tokenizer.eos_id,
    )
    ids = opening(tokenizer, prompt, run.cfg.framed)
    with run.averaged(), run.stop.at_once():
        result = generate(TorchModel(run.model), ids, settings, [args.seed])
        return tokenizer.written(result.rows[0])


def transliterated(run, prompt):
    """The model's answer to what was typed, as sample --transliterate gives it."""
    settings = Settings(
        max_new_tokens=run.args.longest,
        steps=run.args.longest,
        sampler=SPECULATE if run.cfg.causal else "threshold",
        temperature=0.0,
        eos_id=run.tokenizer.eos_id,
    )
    with run.averaged(), run.stop.at_once():
        model = TorchModel(run.model)
        line = answer_to(model, run.tokenizer, prompt, settings, run.args.longest)
        return line.text_so_far()


def speak_out_of_noise(run, prompt, length):
    """The same of --objective gaussian."""
    settings = continuous.Settings(max_new_tokens=length, eos_id=run.tokenizer.eos_id)
    writer = GaussianWriter(run.model)
    with run.averaged(), run.stop.at_once():
        result = continuous.continued(writer, run.tokenizer, prompt, settings, [run.args.seed])
        return run.tokenizer.written(result.rows[0])


def print_samples(run):
    """The end of a finished run: continuations of the fixed prompts -> the exit code."""
    args = run.args
    run.model.eval()
    run.stop.answer = "leaving out the samples; the run is finished and saved"
    try:
        with run.stop, contextlib.suppress(machine.Stopped):
            for prompt in run.prompts:
                between = "\n-> " if run.cfg.answers else ""
                print(f"{prompt}{between}{printable(speak(run, prompt, LENGTH))}\n---", flush=True)
    except FloatingPointError:  # NaN logits
        say(
            "error: the trained weights give no finite answer, so there are no samples: --lr "
            f"{args.lr:g} is too high; "
            f"train again with a lower one, such as {config.RATES[args.optimizer]:g}"
        )
        return 1
    except UserError as error:              # as it was logged each time
        say(f"warning: no sample: {error}")
    return 0


def still_sound(run, rows):
    """Whether training can go on from the weights after the last finite step: its update may have
    ruined them. Else it says so.

    One of autocast and float32 is enough. Replicas would add up what backward leaves, parts have
    none of their own, and a compiled layer has its graphs for training only: there the loss alone
    is asked.
    """
    loss_only = run.args.compile or run.ranks.world > 1
    test = recovery.sound if loss_only else recovery.can_learn
    contexts = (run.autocast(), contextlib.nullcontext())
    held, asked = run.held_part(rows)
    sound = any(test(run.model, held, run.blocks[-1], context, asked) for context in contexts)
    run.ranks.reshard(run.model)
    if not sound:
        step = run.state.good.step
        message = (
            f"step {step} is not saved: its update ruined the weights, held-out text has no "
            "finite gradient any more"
        )
        run.log.write("warn", step=step, message=message)
        say(f"warning: {message}; the checkpoints before it are intact")
    return sound
