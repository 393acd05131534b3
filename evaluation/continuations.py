"""Samples of a checkpoint, for evaluate.py --samples: it continues held-out beginnings, and every
figure of its text stands beside that of the text that really followed.

    nats = ar_model(path, device, tokenizer, longest, saved)         # --judge
    found = continue_documents(writer, documents, tokenizer, saved, args, data_dir, nats, unread)

The figures themselves are in evaluation/sample_quality.py.
"""
import dataclasses

import numpy as np

import checkpoint
import config
from common.console import UserError, say
from evaluation.estimators import left_to_right
from evaluation.held_out import open_text, same_tokenizer
from evaluation.ngram import NGram, shared
from evaluation.sample_quality import Text, quality, words
from sampling import settings
from sampling.decode import generate
from text.tokenizer import script_of

PROMPT = 16           # tokens of a held-out beginning, or half of a shorter document
SHORTEST = 8          # tokens of a document that is continued
READ_BEFORE = 0.05    # of the text of --judge_text, that the scored model may know
BATCH = 16
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


# ---- who scores the samples ----------------------------------------------------------------------

def ar_model(path, device, tokenizer, longest, scored):
    """A checkpoint of --objective ar that scores the text of another one: f(rows, contexts) -> nats
    per token of the rows. scored: the other checkpoint.
    """
    model, own, saved = checkpoint.load_model(path, device, config.check_saved)
    if not model.cfg.causal:
        raise UserError(
            f"--judge {path} is no autoregressive checkpoint: train one with --model backup "
            "--objective ar"
        )
    if own.sha256 != tokenizer.sha256:
        raise UserError(
            f"--judge {path} has another tokenizer than the checkpoint: train it on the same "
            "prepared text"
        )
    trained = config.trained_length(saved)
    if trained < longest:
        say(
            f"notice: the judge {path} was trained on {trained} positions and reads up to "
            f"{longest}: its figures mean less there"
        )
    data = saved.state.get("data_sha256")
    if data and data == scored.state.get("data_sha256"):
        say(
            f"notice: the judge {path} has learned from the same text: it likes what both have read"
        )

    def nats(rows, contexts):
        total = 0.0
        for row, context in zip(rows, contexts, strict=True):
            total += left_to_right(model, context, row)
        return total / max(1, sum(map(len, rows)))

    return nats


def unread_model(unread, path, train):
    """The n-gram model of --judge_text -> it, and what --out_json says of its text."""
    ids = np.concatenate(unread)
    model = NGram(ids, train.vocab_size)
    known = shared(ids, train.tokens)
    told = (
        f"judge: {len(ids):,} tokens of {path}, of which {known:.1%} stand in the training text, "
        "too"
    )
    if known > READ_BEFORE:
        told += ": this judge is not independent"
    say(told)
    return model, {"path": path, "tokens": len(ids), "in_training_text": known}


def words_of(train, tokenizer):
    """The words of the training text."""
    known = set()
    for part in train.documents():
        known.update(words(tokenizer.decode(part.tolist())))
    return known


# ---- writing -------------------------------------------------------------------------------------

def decoding(args, writer, saved, tokenizer):
    """The decoding settings: with a frozen context, if the checkpoint was trained for it."""
    length = config.trained_length(saved)
    if settings.cannot_freeze(saved):
        chosen = settings.decode_settings(args, saved, "full", tokenizer.eos_id)
        room = length - PROMPT
        if chosen.max_new_tokens > room:
            say(
                f"notice: trained on {length} positions and without blocks, so a continuation has "
                f"{room} tokens at most"
            )
            chosen = dataclasses.replace(chosen, max_new_tokens=max(1, room))
        return chosen

    chosen = settings.decode_settings(args, saved, "block_frozen", tokenizer.eos_id)
    if writer.cfg.model == "backup":  # as sample does: its cache slides
        chosen = dataclasses.replace(chosen, window=max(length, chosen.block_size))
    return chosen


def beginnings(documents, count):
    """-> [(prompt, what really followed)] of random documents, the same each time."""
    order = np.random.default_rng(1).permutation(len(documents))
    usable = [documents[i] for i in order if len(documents[i]) >= SHORTEST]
    if not usable:
        raise UserError("--samples: no held-out document has 8 tokens; give longer text")
    found = []
    for i in range(count):
        ids = usable[i % len(usable)]
        size = min(PROMPT, len(ids) // 2)
        found.append((ids[:size], ids[size:]))
    return found


def write(writer, prompts, chosen, seed):
    rows = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start:start + BATCH]
        seeds = [seed + start + i for i in range(len(part))]
        rows += generate(writer, part, chosen, seeds).full_rows
    return rows


# ---- the figures ---------------------------------------------------------------------------------

def continue_documents(writer, documents, tokenizer, saved, args, data_dir, ar_nats, unread):
    """-> what --out_json holds of the samples; prints them as a table.

    ar_nats: of ar_model, or None. unread: documents of --judge_text, or none.
    """
    train = open_text(data_dir, "train", saved)
    same_tokenizer(train, tokenizer, saved)
    found = {}
    scorers = {"ngram": NGram(train.tokens, train.vocab_size).nats}
    if unread:
        unread_ngram, found["judge_text"] = unread_model(unread, args.judge_text, train)
        scorers["unread"] = unread_ngram.nats
    if ar_nats:
        scorers["ar"] = ar_nats
    known = words_of(train, tokenizer)

    chosen = decoding(args, writer, saved, tokenizer)
    begun = beginnings(documents, args.samples)
    prompts = [prompt for prompt, _ in begun]
    made = write(writer, prompts, chosen, args.seed)
    real = [rest[:chosen.max_new_tokens] for _, rest in begun]
    for name, rows in (("samples", made), ("held_out", real)):
        texts = []
        for prompt, row in zip(prompts, rows, strict=True):
            ended = row[-1:] == [tokenizer.eos_id]
            new = tokenizer.written(row)
            texts.append(Text(tokenizer.decode(prompt), new, prompt, row, ended))
        found[name] = quality(texts, script_of, known, scorers)
        found[f"{name}_texts"] = [[text.prompt, text.new] for text in texts]

    if writer.cfg.causal or chosen.left_to_right:
        how = "one token at a time"
    else:
        how = f"{chosen.mode}, {chosen.steps} forwards a block"
    print(
        f"{len(made)} continuations of held-out beginnings ({PROMPT} tokens at most), up to "
        f"{chosen.max_new_tokens} tokens, {how}, temperature {chosen.temperature:g}, top_k "
        f"{chosen.top_k}, top_p {chosen.top_p:g}; a low NLL alone is no praise"
    )
    print(f"{'':28} {'samples':>9} {'real text':>10}")
    for key, value in found["samples"].items():
        other = found["held_out"][key]
        print(f"{NAMES.get(key, key):28} {in_words(value):>9} {in_words(other):>10}")
    return found


def in_words(value):
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
