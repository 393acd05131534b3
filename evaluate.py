"""How good is a checkpoint: what held-out text costs it, and what its own text is like.

    python -m evaluate --ckpt checkpoints/eco_hybrid_hi            # the run's own validation text
    python -m evaluate --ckpt checkpoints/eco_hybrid_hi --text my.txt --chain_docs 0
        --out_json e.json --out_png e.png
    python -m evaluate --ckpt checkpoints/eco_hybrid_hi --samples 64 --judge checkpoints/ar_hi
        --judge_text unread.jsonl
    python -m evaluate --check_run checkpoints/eco_hybrid_hi       # instead: does the run work?
                                                                   # (evaluation/check_run.py)
    python -m evaluate --ckpt checkpoints/eco_hybrid_hi --lengths 128 256 512 --needle
                                                                   # instead: what is a long context
                                                                   # worth? (long_context.py)

NLL         the exact -log p of writing left to right (block 1), from one pass
bound       the exact-count bound on -log p in each larger block rule
chain rule  -log p of writing the blocks left to right, one token at a time; of fewer documents
            (--chain_docs), as it costs a forward per token of a block; "its bound" is the bound of
            the same fewer documents

--out_json has the figures under their estimate and block: the NLL is bound["1"], with no curve, and
chain_rule has no "1", as it would be the same.

All in nats/token, bits/byte (UTF-8 bytes of the normalised text) and bits/char, with standard
errors over documents, per script. evaluation/estimators.py says how documents are cut. Masks are
fixed by the seed, documents by the text and by how many windows --batches are, so two checkpoints
of one --seq_len and --batch_size answer the same questions. A uniform guess scores ln V. Compare
bits/byte only within one script. Validation in training is another figure: its windows are cut out
of the running text, and BOS counts there, while here it is given.
"""
import dataclasses
import math

import cli
import config
from common.console import UserError, say
from common.files import can_write, write_json
from evaluation import plots
from sampling import settings


def main(argv=None):
    args, origins = cli.parse(config.EvaluateArgs, argv, "evaluate")
    cli.announce(args, origins)

    # what imports torch comes after parsing, so that --help is instant
    from common import machine
    from evaluation import check_run, continuations, held_out, loading, long_context

    machine.start(args.threads)
    can_write(args, "out_json", "out_png")
    if args.check_run:
        lines = check_run.check(args.check_run, args)
        return 0 if check_run.passed(lines) else 1
    if not args.samples:
        tell_without_effect(origins)

    # the checkpoint, and who else scores its samples
    args.sampler = settings.masked_sampler(args.sampler)
    device = machine.pick_device(args.device)
    loaded, tokenizer, saved = loading.load_model(args, device)
    model = loaded.model
    settings.refuse_interlaced(saved)
    if model.cfg.gaussian:
        refuse_of_gaussian(args, saved)
    if model.cfg.framed and args.samples:
        raise UserError(
            f"{saved.path} was trained on pairs: it answers prompts and continues no text, so "
            "leave --samples out"
        )
    ar_nats = None
    unread = []
    if args.judge:
        longest = continuations.PROMPT + args.max_new_tokens
        ar_nats = continuations.ar_model(args.judge, device, tokenizer, longest, saved)
    if args.judge_text:
        unread = held_out.read_text("judge_text", args.judge_text, tokenizer)

    # held-out documents
    trained = saved.config["args"]
    length = config.scored_length(saved)
    batch = trained["batch_size"]
    data_dir = args.data_dir or trained["data_dir"]
    documents, framed = held_out.read_documents(args, data_dir, tokenizer, saved)
    documents = [ids for ids in documents if len(ids) > 1]
    if not documents:
        raise UserError(f"{args.text or data_dir} holds no held-out text")
    about = {
        "checkpoint": str(saved.path),
        "step": saved.step,
        "seed": args.seed,
        "objective": trained.get("objective", "masked"),
    }
    if args.lengths or args.needle:
        result = long_context.examine(model, saved, documents, tokenizer, args)
        if args.out_json:
            write_json(args.out_json, about | {"cache_dtype": args.cache_dtype} | result)
        return 0
    chosen = held_out.choose(documents, length, args.batches * batch, args.max_docs)

    # their figures
    blocks = blocks_of(args, model.cfg, trained, length, framed)
    tokens = sum(map(len, chosen))
    uniform = math.log(model.cfg.vocab_size - 1)
    say(
        f"{saved.path}  step {saved.step}  {len(chosen)} of {len(documents)} documents, "
        f"{tokens:,} tokens in windows of {length}, {args.draws} draws each, uniform guess "
        f"{uniform:.3f} nats"
    )
    result = held_out.score(model, chosen, framed, tokenizer, blocks, args, length, batch)
    if args.out_png:
        name = f"{saved.name}, step {saved.step}"
        plots.mask_rate_curves(args.out_png, result["curve"], length, name)

    # the text that it writes itself
    if args.samples:
        result["samples"] = continuations.continue_documents(
            loaded.writer, documents, tokenizer, saved, args, data_dir, ar_nats, unread
        )
    if args.out_json:
        write_json(args.out_json, about | result)


def blocks_of(args, cfg, trained, length, framed):
    """The block rules in which the documents are scored, the largest first."""
    if cfg.gaussian:
        return [length]
    if framed:
        say(
            "notice: pairs: the responses are scored, left to right; training prints their bound "
            "in blocks"
        )
    if cfg.causal or framed:
        return [1]
    rules = {*config.block_sizes(args.blocks or trained["train_block_sizes"], length)}
    if not args.blocks and min(rules) < length:
        rules.add(1)
    return sorted(rules, reverse=True)


def refuse_of_gaussian(args, saved):
    """What has no meaning for --objective gaussian."""
    for name in ("samples", "lengths", "needle", "blocks", "out_png"):
        if getattr(args, name):
            raise UserError(
                f"{saved.path} was trained with --objective gaussian: its bound is all that "
                f"evaluate asks of it, so leave --{name} out"
            )


def tell_without_effect(origins):
    """A notice of typed flags that only samples heed."""
    typed = []
    for field in dataclasses.fields(config.DecodeFlags):
        if origins[field.name] == "flag":
            typed.append(f"--{field.name}")
    if typed:
        say(
            f"notice: without effect: {', '.join(typed)} (they are for the text that --samples "
            "64 asks for)"
        )


if __name__ == "__main__":
    cli.run(main)
