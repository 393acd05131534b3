"""The held-out figures of evaluate.py: which documents are scored, what they cost, the lines of the
table.

    documents, framed = read_documents(args, data_dir, tokenizer, saved)   # lists of ids, BOS first
    chosen = choose(documents, length, budget, most)
    result = score(model, chosen, framed, tokenizer, blocks, args, length, batch)

The estimators themselves are in evaluation/estimators.py.
"""
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.console import UserError, say
from config import TrainArgs
from evaluation import estimators
from text import documents as text_files
from text.pairs import are_pairs
from text.token_file import open_split
from text.tokenizer import normalise, script_of

LEAST_WINDOWS = 8     # of a long document, before --batches spreads over others
ROW = "{:<6} {:<11} {:<11} {:>5} {:>20} {:>20} {:>20}"


# ---- documents -----------------------------------------------------------------------------------

def read_text(option, path, tokenizer):
    """The documents of a user's file as lists of ids, BOS first."""
    path = Path(path)
    if not path.is_file() or not text_files.kind_of(path):
        raise UserError(f"--{option} {path}: name a .txt or .jsonl file (also .gz, .xz)")
    documents = []
    for text in text_files.read_documents(path, say):
        text = normalise(text).strip()
        if text:
            documents.append([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
    return documents


def read_documents(args, data_dir, tokenizer, saved):
    """Held-out documents as lists of ids, BOS first -> (they, whether they are pairs)."""
    if args.text:
        return read_text("text", args.text, tokenizer), False
    data = open_text(data_dir, "val", saved)
    same_tokenizer(data, tokenizer, saved)
    return [part.tolist() for part in data.documents()], are_pairs(data)


def open_text(data_dir, split, saved):
    """The text that a checkpoint is scored on; a token file is split as in its training."""
    val_frac = saved.config["args"].get("val_frac", TrainArgs.val_frac)
    return open_split(data_dir, split, val_frac)


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
    order = np.random.default_rng(0).permutation(len(documents))[:most or None]
    cap = max(LEAST_WINDOWS, budget // len(order))
    chosen = {}
    for number in order.tolist():
        cuts = estimators.windows(len(documents[number]), length)[:min(cap, budget)]
        if not cuts:
            break
        budget -= len(cuts)
        start, size, _ = cuts[-1]
        chosen[number] = documents[number][:start + size]
    return [chosen[number] for number in sorted(chosen)]


def spread_over(documents, count, length):
    """So many of the documents, of each the first window; without a count all of them."""
    if not count:
        return documents
    step = max(1, len(documents) // count)
    return [ids[:length] for ids in documents[::step][:count]]


def measured(documents, tokenizer, framed=False):
    """What the figures are divided by: scored tokens, bytes and letters of each document, of a pair
    those of the response, and its script.
    """
    given = [estimators.given_tokens(ids) if framed else 1 for ids in documents]
    scored = [ids[start:] for ids, start in zip(documents, given, strict=True)]
    texts = [tokenizer.decode(ids) for ids in scored]
    return {
        "tokens": [len(ids) for ids in scored],
        "bytes": [len(text.encode()) for text in texts],
        "chars": [len(text) for text in texts],
        "script": [script_of(text) for text in texts],
    }


class HeldOut(NamedTuple):
    """Documents in the forms that are needed to score them."""
    pieces: list        # [estimators.Piece]
    texts: dict         # measured()

    def written_in(self, script):
        """(D,) bool: which documents are; "all" of them are."""
        return torch.tensor([script in ("all", own) for own in self.texts["script"]])


# ---- figures and their lines ---------------------------------------------------------------------

def by_script(nats, held_out):
    """{"all": figures, then each script that occurs}."""
    found = {}
    for script in ("all", *dict.fromkeys(held_out.texts["script"])):
        at = held_out.written_in(script)
        units = {}
        for unit in ("tokens", "bytes", "chars"):
            units[unit] = torch.tensor(held_out.texts[unit])[at]
        if units["bytes"].sum():
            found[script] = estimators.figures(nats[at], units)
    return {"all": found.pop("all"), **dict(sorted(found.items()))}


def with_error(value, error):
    told = "-" if error is None else f"{error:.4f}"
    return f"{value:.4f} +- {told}"


def show(rule, estimate, found):
    """A line of the table for all documents, and one for each script if there are several."""
    if len(found) == 2:         # one script: its figures are those of all
        found = {"all": found["all"]}
    for script, figures in found.items():
        cells = []
        for name, error in (
            ("nats", "se"),
            ("bits_per_byte", "bits_per_byte_se"),
            ("bits_per_char", "bits_per_char_se"),
        ):
            cells.append(with_error(figures[name], figures[error]))
        print(ROW.format(rule, estimate, script, figures["documents"], *cells))


def rule_name(block, length):
    return "T" if block >= length else str(block)


# ---- scoring -------------------------------------------------------------------------------------

def score(model, documents, framed, tokenizer, blocks, args, length, batch):
    """The held-out figures, printed as they come -> what --out_json holds. framed: the documents
    are pairs.
    """
    every = HeldOut(
        estimators.cut(documents, length, model.device, framed),
        measured(documents, tokenizer, framed),
    )
    # the costly figures: of fewer documents
    few = spread_over(documents, args.chain_docs, length)
    few = HeldOut(
        estimators.cut(few, length, model.device, framed), measured(few, tokenizer, framed)
    )
    gaussian = model.cfg.gaussian
    bound = estimators.gaussian_bound if gaussian else estimators.bound
    bound = partial(bound, draws=args.draws, seed=args.seed, batch=batch)

    result = {
        "bound": {},
        "chain_rule": {},
        "curve": {},
        "exits": {},
        "infilling": {},
        "compared": {},
        # so that two checkpoints can be compared document by document
        "documents": {**every.texts, "nats": {}},
    }
    print(ROW.format("block", "estimate", "script", "docs", "nats/token", "bits/byte", "bits/char"))
    for block in blocks:
        key, rule = str(block), rule_name(block, length)
        nats, curve, plain = bound(model, every.pieces, block)
        found = by_script(nats, every)
        result["bound"][key] = {**found["all"], "masked_mean": plain, "scripts": found}
        result["curve"][key] = curve
        result["documents"]["nats"][key] = nats.tolist()
        if block == 1:
            show(rule, "NLL", found)
        elif gaussian:
            show(rule, "bound", found)
        else:
            show(rule, "bound", found)
            found = by_script(estimators.chain_rule(model, few.pieces, block, batch), few)
            same = by_script(bound(model, few.pieces, block)[0], few)["all"]
            result["chain_rule"][key] = {
                **found["all"],
                "scripts": found,
                "bound_of_the_same": same,
            }
            show(rule, "chain rule", found)
            show(rule, "its bound", {"all": same})

    if model.cfg.exits and hasattr(model, "both_states"):  # an exported model never leaves early
        result["exits"] = exits(model, every, blocks, length, bound)
    if not model.cfg.causal and not framed and not gaussian:
        result["infilling"] = infilling(model, few, args.seed, batch)
        if args.repeats > 1:
            result["compared"] = compared(model, few.pieces, blocks, args, length, batch)
    return result


def exits(model, held_out, blocks, length, bound):
    """The bound of each early exit -> {depth: {block: figures}}."""
    result = {}
    for depth in range(1, model.cfg.n_layers):
        early = estimators.at_depth(model, depth)
        result[depth] = {}
        for block in blocks:
            nats, _, _ = bound(early, held_out.pieces, block)
            found = by_script(nats, held_out)["all"]
            result[depth][str(block)] = found
            show(rule_name(block, length), f"exit {depth}", {"all": found})
    return result


def infilling(model, held_out, seed, batch):
    """How often the best guess is right, both sides known -> {share hidden: {script: figures}}."""
    result = {}
    for rate, (right, asked) in estimators.infilling(model, held_out.pieces, seed, batch).items():
        found = {}
        told = []
        for script in ("all", *sorted(set(held_out.texts["script"]))):
            at = held_out.written_in(script)
            value, error = estimators.ratio(right[at], asked[at])
            found[script] = {"right": value, "se": error, "documents": int(at.sum())}
            margin = "" if error is None else f" +- {error:.1%}"
            told.append(f"{script} {value:.1%}{margin}")
        result[f"{rate:.2f}"] = found
        print(f"infilling, {rate:.0%} hidden: best guess right   " + "   ".join(told))
    return result


def compared(model, pieces, blocks, args, length, batch):
    """The estimators side by side, on the largest and the smallest block rule of those that leave
    something to chance.
    """
    by_chance = [block for block in blocks if block > 1]        # left to right is exact
    windows = sum(len(piece.x0) for piece in pieces)
    result = {}
    for block in sorted({*by_chance[:1], *by_chance[-1:]}, reverse=True):
        found = estimators.compare(model, pieces, block, args.repeats, args.seed, batch)
        result[str(block)] = found
        exact = found["exact count"]
        print(
            f"block {rule_name(block, length)}, {args.repeats} passes of each estimator over "
            f"{windows} windows: exact count {with_error(exact['nats'], exact['se'])}; "
            "at equal cost"
        )
        for name, figures in found.items():
            if name != "exact count":
                print(
                    f"    {name:<24} {with_error(figures['nats'], figures['se'])}   variance "
                    f"{figures['variance'] / exact['variance']:.1f}x"
                )
    return result
