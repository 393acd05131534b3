"""Text from a checkpoint: left to right, in blocks over an exact frozen context, in blocks, or in
one piece; and gaps in a text.

    python -m sample               # the newest run, and what suits its checkpoint
    python -m sample --ckpt checkpoints/eco_hybrid_hi --prompt "mai kal bazaar gaya tha"
    python -m sample --ckpt checkpoints/eco_hybrid_hi --text "mai kal ____ gaya tha"
    python -m sample --interactive              # prompts one after the other

A checkpoint needs nothing but itself: shape, tokenizer and defaults come out of its folder.
Whatever is not typed is chosen for it (sampling/settings.py); the texts are written in
sampling/written.py. Text goes to stdout, statistics to stderr: new tokens before EOS, forwards,
seconds with the prompt's encoding included.
"""
import sys

import cli
import config
from common import completion
from common.console import printable, say
from common.files import can_write, json_text, write_json
from sampling.settings import (
    in_words,
    masked_sampler,
    must_fit_row,
    nothing_else_asked,
    opening,
    read_prompts,
    refuse_interlaced,
    settings_of_sample,
    suited,
    why_so,
)

STATISTICS = (
    "[stats] new={new_tokens} before_eos={tokens_before_eos} forwards={forwards} "
    "context={context_passes} seconds={seconds:.3f} tok/s={tok_per_s:.1f} seed={seed} mode={mode}"
)


def main(argv=None, pinned=None):
    args, origins = cli.parse(config.SampleArgs, argv, "sample", pinned=pinned)
    if args.completion:
        print(completion.script(config.COMMANDS, args.completion), end="")
        return
    cli.announce(args, origins)

    # What is asked for, before anything is loaded
    can_write(args, "out_json")
    typed = args.transliterate is not None
    prompts = [""] if typed else read_prompts(args)

    # The model; what imports numpy or torch comes now, so that --help is instant
    from sampling import continuous, conversation, exported, terminal, transliteration, written
    writer, tokenizer, saved = exported.model_of(args, gaussian=True)
    watch = terminal.Watch(tokenizer) if args.show_steps else None
    if continuous.is_gaussian(saved):
        show(args, saved, continuous.asked(args, origins, writer, tokenizer, saved, prompts, watch))
        return
    args.sampler = masked_sampler(args.sampler)
    if origins["eta"] == "flag":
        say("notice: without effect: --eta (it is for checkpoints of --objective gaussian)")
    if args.interactive:
        words = sys.argv[1:] if argv is None else argv
        conversation.hold(words, pinned, writer, tokenizer, saved)
        return

    # The settings
    trained_length = config.trained_length(saved)
    framed = writer.cfg.framed
    if framed:
        must_fit_row(args, prompts, tokenizer, trained_length)
    longest_prompt = max(len(opening(tokenizer, prompt, framed)) for prompt in prompts)
    if typed:
        transliteration.refuse_other_models(saved)
        args, origins = transliteration.with_rule(args, origins, saved)
    else:
        refuse_interlaced(saved)
    alone = len(prompts) == args.num_samples == 1
    args = suited(args, origins, saved, longest_prompt, alone)
    settings = settings_of_sample(args, origins, saved, tokenizer)
    if not args.text:
        told = transliteration.in_words if typed else in_words
        line = told(settings, writer.cfg.causal)
        if nothing_else_asked(origins, saved):
            line += f" ({why_so(args, saved)})"
        say(line)
        length = longest_prompt + settings.max_new_tokens
        if length > trained_length:
            say_too_long(writer, settings, length, trained_length)

    # The texts, each with its statistics
    if typed:
        texts = transliteration.lines(args)
        records = transliteration.transliterate(
            args, writer, tokenizer, settings, texts, trained_length
        )
    elif args.text:
        records = written.fill_text(args, writer, tokenizer, settings, watch)
    else:
        records = written.continue_prompts(
            args, writer, tokenizer, settings, prompts, watch, trained_length
        )
    show(args, saved, records)


def show(args, saved, records):
    """Print the texts and their statistics as they come, and keep them for --out_json."""
    shown = []
    for record in records:
        if args.json:
            print(json_text(record), flush=True)
        elif args.text or not args.stream:
            if shown and args.transliterate is None:
                print("---")
            print(printable(record["text"]), flush=True)
        say(STATISTICS.format(**record))
        shown.append(record)
    if args.out_json:
        write_json(args.out_json, {"checkpoint": str(saved.path), "samples": shown})


def say_too_long(writer, settings, length, trained_length):
    """What becomes of a text that is longer than those of the training."""
    if settings.mode != "block_frozen":
        say(
            f"warning: prompt and new tokens are {length} positions, the model was trained on "
            f"{trained_length}: --blockwise --frozen_context goes on without a limit"
        )
    elif writer.cfg.model == "backup":
        say(
            f"notice: {length} positions, trained on {trained_length}: the cache slides, the "
            "oldest text leaves it"
        )


if __name__ == "__main__":
    cli.run(main)
