"""How good is a checkpoint: what held-out text costs it, and what its own text is like.

    python -m evaluate --ckpt checkpoints/eco_hybrid_hi                                # the run's
        own validation text
    python -m evaluate --ckpt checkpoints/eco_hybrid_hi --text my.txt --chain_docs 0 --out_json
    e.json --out_png e.png
    python -m evaluate --ckpt checkpoints/eco_hybrid_hi --samples 64 --judge checkpoints/ar_hi
    --judge_text unread.jsonl
    python -m evaluate --check_run checkpoints/eco_hybrid_hi                           # instead:
        does the run work? (evaluation/check_run.py)

bound       the exact-count bound on -log p in each block rule (for an autoregressive checkpoint:
    NLL, the exact -log p)
chain rule  -log p of writing left to right, one token at a time; of fewer documents (--chain_docs),
    as it costs a forward per
            token of a block; "its bound" is the bound of the same fewer documents
Both in nats/token, bits/byte (UTF-8 bytes of the normalised text) and bits/char, with standard
errors over documents, per script. evaluation/estimators.py says how documents are cut. Masks are
fixed by the seed, documents by the text and by how many windows --batches are, so two checkpoints
of one --seq_len and --batch_size answer the same questions. A uniform guess scores ln V. Compare
bits/byte only within one script. Validation in training is another figure: its windows are cut out
of the running text, and BOS counts there, while here it is given.
"""
import dataclasses
import math
from pathlib import Path

import cli
import config
from common.console import UserError, say
from common.files import can_write, write_json
from evaluation import plots
from sampling import settings

PROMPT = 16           # tokens of a held-out beginning, or half of a shorter document
READ_BEFORE = 0.05    # of a judge's text, that the judged model may know
LEAST_WINDOWS = 8     # of a long document, before --batches spreads over others
ROW = "{:<6} {:<11} {:<11} {:>5} {:>20} {:>20} {:>20}"


def read_text(option, path, tokenizer):
    """The documents of a user's file as lists of ids, BOS first."""
    from text import documents
    from text.tokenizer import normalise
    path = Path(path)
    if not path.is_file() or not documents.kind_of(path):
        raise UserError(f"--{option} {path}: name a .txt or .jsonl file (also .gz, .xz)")
    texts = [normalise(text).strip() for text in documents.read_documents(path, say)]
    return [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts if text]


def read_documents(args, data_dir, tokenizer, saved):
    """Held-out documents as lists of ids, BOS first."""
    import numpy as np

    from text.dataset import TokenData
    if args.text:
        return read_text("text", args.text, tokenizer)
    data = TokenData(data_dir, "val")
    same_tokenizer(data, tokenizer, saved)
    starts = np.flatnonzero(data.tokens == data.meta["bos_id"])
    return [part.tolist() for part in np.split(np.asarray(data.tokens), starts)[1:]]


def same_tokenizer(data, tokenizer, saved):
    if data.meta["tokenizer_sha256"] != tokenizer.sha256:
        remedy = data.for_run(saved.state.get("source"), saved.path / "tokenizer.model")
        raise UserError(
            f"{data.dir} was made with tokenizer {data.meta['tokenizer_sha256'][:12]}, the "
            f"checkpoint's is {tokenizer.sha256[:12]}: {remedy}, or give a text as --text FILE"
        )


def choose(documents, length, budget, most):
    """Documents at random (the same each time), long ones shortened to so many windows that the
    budget serves several.
    """
    import numpy as np

    from evaluation.estimators import windows
    order = np.random.default_rng(0).permutation(len(documents))[:most or None]
    cap, chosen, used = max(LEAST_WINDOWS, budget // len(order)), {}, 0
    for number in order.tolist():
        cuts = windows(len(documents[number]), length)[:min(cap, budget - used)]
        if not cuts:
            break
        used += len(cuts)
        chosen[number] = documents[number][:cuts[-1][0] + cuts[-1][1]]
    return [chosen[number] for number in sorted(chosen)]


def measured(documents, tokenizer):
    """What the figures are divided by: scored tokens, bytes and letters of each document, and its
    script.
    """
    from text.tokenizer import script_of
    texts = [tokenizer.decode(ids) for ids in documents]
    return {
        "tokens": [len(ids) - 1 for ids in documents],
        "bytes": [len(t.encode()) for t in texts],
        "chars": [len(t) for t in texts],
        "script": [script_of(t) for t in texts],
    }


def by_script(nats, texts):
    """{"all": figures, then each script that occurs}."""
    import torch

    from evaluation.estimators import figures
    found = {}
    for script in ("all", *dict.fromkeys(texts["script"])):
        at = torch.tensor([script in ("all", s) for s in texts["script"]])
        units = {unit: torch.tensor(texts[unit])[at] for unit in ("tokens", "bytes", "chars")}
        if units["bytes"].sum():
            found[script] = figures(nats[at], units)
    return {"all": found.pop("all"), **dict(sorted(found.items()))}


def with_error(value, error):
    return f"{value:.4f} +- " + ("-" if error is None else f"{error:.4f}")


def show(rule, estimate, found):
    scripts = found if len(found) > 2 else {"all": found["all"]}
    for script, r in scripts.items():
        print(ROW.format(rule, estimate, script, r["documents"], with_error(r["nats"], r["se"]),
                         with_error(r["bits_per_byte"], r["bits_per_byte_se"]),
                         with_error(r["bits_per_char"], r["bits_per_char_se"])))


def score(model, documents, tokenizer, blocks, args, length, batch):
    """The held-out figures, printed as they come -> what --out_json holds."""
    from evaluation import estimators

    pieces, texts = (
        estimators.cut(documents, length, model.head.weight.device),
        measured(documents, tokenizer),
    )
    few = documents
    if args.chain_docs:  # the costly figures: fewer documents, of each the first window
        few = [
            ids[:length]
            for ids in documents[:: max(1, len(documents) // args.chain_docs)][: args.chain_docs]
        ]
    few_pieces, few_texts = (
        estimators.cut(few, length, model.head.weight.device),
        measured(few, tokenizer),
    )
    result = {
        "bound": {},
        "chain_rule": {},
        "curve": {},
        "exits": {},
        "infilling": {},
        "compared": {},
        # so that two checkpoints can be compared document by document
        "documents": {**texts, "nats": {}},
    }
    print(ROW.format("block", "estimate", "script", "docs", "nats/token", "bits/byte", "bits/char"))
    for block in blocks:
        nats, curve, plain = estimators.bound(model, pieces, block, args.draws, args.seed, batch)
        found, rule = by_script(nats, texts), "T" if block >= length else str(block)
        result["bound"][str(block)] = {**found["all"], "masked_mean": plain, "scripts": found}
        result["curve"][str(block)], result["documents"]["nats"][str(block)] = curve, nats.tolist()
        show(rule, "NLL" if model.cfg.causal else "bound", found)
        if not model.cfg.causal:
            found = by_script(estimators.chain_rule(model, few_pieces, block, batch), few_texts)
            same = by_script(
                estimators.bound(model, few_pieces, block, args.draws, args.seed, batch)[0],
                few_texts,
            )
            result["chain_rule"][str(block)] = {
                **found["all"],
                "scripts": found,
                "bound_of_the_same": same["all"],
            }
            show(rule, "chain rule", found)
            show(rule, "its bound", {"all": same["all"]})
    for depth in range(1, model.cfg.n_layers) if model.cfg.exits else ():
        early, result["exits"][depth] = estimators.at_depth(model, depth), {}
        for block in blocks:
            nats = estimators.bound(early, pieces, block, args.draws, args.seed, batch)[0]
            result["exits"][depth][str(block)] = found = by_script(nats, texts)["all"]
            show("T" if block >= length else str(block), f"exit {depth}", {"all": found})
    if not model.cfg.causal:
        result["infilling"] = infilling(model, few_pieces, few_texts, args, batch)
        if args.repeats > 1:
            result["compared"] = compared(model, few_pieces, blocks, args, length, batch)
    return result


def infilling(model, pieces, texts, args, batch):
    import torch

    from evaluation import estimators
    result = {}
    for rate, (right, asked) in estimators.infilling(model, pieces, args.seed, batch).items():
        line = []
        for script in ("all", *sorted(set(texts["script"]))):
            at = torch.tensor([script in ("all", s) for s in texts["script"]])
            value, error = estimators.ratio(right[at], asked[at])
            result.setdefault(f"{rate:.2f}", {})[script] = {
                "right": value,
                "se": error,
                "documents": int(at.sum()),
            }
            line.append(f"{script} {value:.1%}" + ("" if error is None else f" +- {error:.1%}"))
        print(f"infilling, {rate:.0%} hidden: best guess right   " + "   ".join(line))
    return result


def compared(model, pieces, blocks, args, length, batch):
    """The estimators side by side, on the largest and the smallest block rule of those that leave
    something to chance.
    """
    from evaluation import estimators
    # a block of one token is hidden whole
    result, by_chance = {}, [block for block in blocks if block > 1]
    for block in sorted({*by_chance[:1], *by_chance[-1:]}, reverse=True):
        found = result[str(block)] = estimators.compare(
            model, pieces, block, args.repeats, args.seed, batch
        )
        exact = found.pop("exact count")
        print(
            f"block {'T' if block >= length else block}, {args.repeats} passes of each estimator "
            "over "
            f"{sum(len(p.x0) for p in pieces)} windows: exact count "
            f"{with_error(exact['nats'], exact['se'])}; at equal cost"
        )
        for name, r in found.items():
            print(
                f"    {name:<24} {with_error(r['nats'], r['se'])}   variance "
                f"{r['variance'] / exact['variance']:.1f}x"
            )
        result[str(block)] = {"exact count": exact, **found}
    return result


# ---- samples -------------------------------------------------------------------------------------

def ar_judge(path, device, tokenizer, longest, judged):
    """A checkpoint of --objective ar as a judge of another one: f(rows, contexts) -> nats per token
    of the rows.
    """
    import checkpoint
    from evaluation.estimators import left_to_right
    net, own, saved = checkpoint.load_model(path, device, config.check_saved)
    if not net.cfg.causal:
        raise UserError(
            f"--judge {path} is no autoregressive checkpoint: train one with --model backup "
            "--objective ar"
        )
    if own.sha256 != tokenizer.sha256:
        raise UserError(
            f"--judge {path} has another tokenizer than the checkpoint: train it on the same "
            "prepared text"
        )
    if (trained := saved.config["args"]["seq_len"]) < longest:
        say(
            f"notice: the judge {path} was trained on {trained} positions and reads up to "
            f"{longest}: its figures mean less there"
        )

    if saved.state.get("data_sha256") and saved.state["data_sha256"] == judged.state.get(
        "data_sha256"
    ):
        say(
            f"notice: the judge {path} has learned from the same text: it likes what both have read"
        )

    def nats(rows, contexts):
        total = 0.0
        for row, context in zip(rows, contexts, strict=True):
            total += left_to_right(net, context, row)
        return total / max(1, sum(map(len, rows)))
    return nats


def sample_quality(model, documents, tokenizer, saved, args, data_dir, judge, unread):
    """Continue held-out beginnings; every figure of the samples beside that of the text that really
    followed.

    judge: of ar_judge, or None. unread: documents of --judge_text, or none.
    """
    import numpy as np

    from evaluation.ngram import NGram, shared
    from evaluation.sample_quality import Text, quality, words
    from sampling.decode import generate
    from text.dataset import TokenData
    from text.tokenizer import script_of
    train = TokenData(data_dir, "train")
    same_tokenizer(train, tokenizer, saved)
    judges, found = {"ngram": NGram(train.tokens, train.vocab_size).nats}, {}
    if unread:
        ids = np.concatenate(unread)
        judges["unread"], known_part = NGram(ids, train.vocab_size).nats, shared(ids, train.tokens)
        found["judge_text"] = {
            "path": args.judge_text,
            "tokens": len(ids),
            "in_training_text": known_part,
        }
        say(
            f"judge: {len(ids):,} tokens of {args.judge_text}, of which {known_part:.1%} stand in "
            "the training text, too"
            + ": this judge is not independent" * (known_part > READ_BEFORE)
        )
    if judge:
        judges["ar"] = judge
    known, ids = set(), np.asarray(train.tokens)
    for part in np.split(ids, np.flatnonzero(ids == train.meta["bos_id"])[1:]):
        known.update(words(tokenizer.decode(part.tolist())))
    frozen, length = not settings.cannot_freeze(saved), saved.config["args"]["seq_len"]
    s = settings.decode_settings(
        args, saved, "block_frozen" if frozen else "full", tokenizer.eos_id
    )
    if not frozen and s.max_new_tokens > length - PROMPT:
        say(
            f"notice: trained on {length} positions and without blocks, so a continuation has "
            f"{length - PROMPT} tokens at most"
        )
        s = dataclasses.replace(s, max_new_tokens=max(1, length - PROMPT))
    elif frozen and model.cfg.model == "backup":  # as sample does: its cache slides
        s = dataclasses.replace(s, window=max(length, s.block_size))
    usable = [
        documents[i]
        for i in np.random.default_rng(1).permutation(len(documents))
        if len(documents[i]) >= 8
    ]
    if not usable:
        raise UserError("--samples: no held-out document has 8 tokens; give longer text")
    usable = [usable[i % len(usable)] for i in range(args.samples)]
    prompts = [d[:min(PROMPT, len(d) // 2)] for d in usable]
    made = []
    for a in range(0, len(prompts), 16):
        part = prompts[a:a + 16]
        made += generate(model, part, s, [args.seed + a + i for i in range(len(part))]).full_rows
    real = [d[len(p):len(p) + s.max_new_tokens] for d, p in zip(usable, prompts, strict=True)]
    for name, rows in (("samples", made), ("held_out", real)):
        texts = [
            Text(
                tokenizer.decode(p), tokenizer.written(row), p, row, row[-1:] == [tokenizer.eos_id]
            )
            for p, row in zip(prompts, rows, strict=True)
        ]
        found[name] = quality(texts, script_of, known, judges)
        found[f"{name}_texts"] = [[t.prompt, t.new] for t in texts]
    how = "one token at a time" if model.cfg.causal else f"{s.mode}, {s.steps} forwards a block"
    print(
        f"{len(made)} continuations of held-out beginnings ({PROMPT} tokens at most), up to "
        f"{s.max_new_tokens} tokens, {how}, "
        f"temperature {s.temperature:g}, top_k {s.top_k}, top_p {s.top_p:g}; a low NLL alone is no "
        "praise"
    )
    print(f"{'':28} {'samples':>9} {'real text':>10}")
    for key, value in found["samples"].items():
        both = (
            "-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v)
            for v in (value, found["held_out"][key])
        )
        print("{:28} {:>9} {:>10}".format(NAMES.get(key, key), *both))
    return found


NAMES = {
    "ngram_nats": "NLL, n-gram of training text",
    "unread_nats": "NLL, n-gram of --judge_text",
    "ar_nats": "NLL, autoregressive judge",
    "unigram_entropy": "unigram entropy, nats",
    "repeat_rate": "repeated 4-grams",
    "real_words": "words of the training text",
    "script_kept": "script of the prompt kept",
    "ended": "ended by EOS",
    "mean_tokens": "tokens per text, mean",
    "median_tokens": "tokens per text, median",
}


def main(argv=None):
    args, origins = cli.parse(config.EvaluateArgs, argv, "evaluate")
    cli.announce(args, origins)
    import checkpoint
    from common import machine
    machine.start(args.threads)
    can_write(args, "out_json", "out_png")
    if args.check_run:
        from evaluation import check_run
        return 0 if check_run.passed(check_run.check(args.check_run, args)) else 1
    if not args.samples:
        typed = [
            f"--{f.name}"
            for f in dataclasses.fields(config.DecodeFlags)
            if origins[f.name] == "flag"
        ]
        if typed:
            say(
                f"notice: without effect: {', '.join(typed)} (they are for the text that --samples "
                "64 asks for)"
            )
    args.sampler = settings.masked_sampler(args.sampler)
    device = machine.pick_device(args.device)
    model, tokenizer, saved = checkpoint.load_model(args.ckpt, device, config.check_saved)
    judge = (
        ar_judge(args.judge, device, tokenizer, PROMPT + args.max_new_tokens, saved)
        if args.judge
        else None
    )
    unread = read_text("judge_text", args.judge_text, tokenizer) if args.judge_text else []
    trained = saved.config["args"]
    length, batch = trained["seq_len"], trained["batch_size"]
    data_dir = args.data_dir or trained["data_dir"]
    documents = [d for d in read_documents(args, data_dir, tokenizer, saved) if len(d) > 1]
    if not documents:
        raise UserError(f"{args.text or data_dir} holds no held-out text")
    chosen = choose(documents, length, args.batches * batch, args.max_docs)
    blocks = [length] if model.cfg.causal else sorted(
        set(config.block_sizes(args.blocks or trained["train_block_sizes"], length)), reverse=True)
    say(
        f"{saved.path}  step {saved.step}  {len(chosen)} of {len(documents)} documents, "
        f"{sum(map(len, chosen)):,} tokens in "
        f"windows of {length}, {args.draws} draws each, uniform guess "
        f"{math.log(model.cfg.vocab_size - 1):.3f} nats"
    )
    result = score(model, chosen, tokenizer, blocks, args, length, batch)
    if args.out_png:
        name = f"{Path(saved.path).parent.name}, step {saved.step}"
        plots.mask_rate_curves(args.out_png, result["curve"], length, name)
    if args.samples:
        result["samples"] = sample_quality(
            model, documents, tokenizer, saved, args, data_dir, judge, unread
        )
    if args.out_json:
        write_json(
            args.out_json,
            {
                "checkpoint": str(saved.path),
                "step": saved.step,
                "seed": args.seed,
                "objective": "ar" if model.cfg.causal else "masked",
                **result,
            },
        )


if __name__ == "__main__":
    cli.run(main)
