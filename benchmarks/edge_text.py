"""The text of coarser numbers beside float32's, and what verified drafts give.

    python benchmarks/edge_text.py checkpoints/eco_hybrid_hi exports/eco_hybrid_hi [exports/...]

1. Greedy text of 64 tokens behind held-out beginnings of 12 tokens, left to right: how many texts
   and how many tokens are those of the checkpoint in float32, for the checkpoint in int8 and bf16
   and for each export. Beside it: by how little the first other token lost, in nats, and how often
   the float32 model itself prefers a token by less than that.
2. With --drafts, of the first export, by the longest draft and the temperature: tokens that a round
   of --sampler speculate gives, of its table and of its network, when every round is allowed; and
   tokens/s with the table beside left to right without it, in turn, as sample writes it.

The last line is a JSON document. Not part of CI.
"""
import dataclasses
import itertools
import json
import statistics

import numpy as np

from harness import arguments  # first: it puts the repository on the path

import checkpoint
import config
from common import machine
from edge import engine
from evaluation import held_out
from sampling import fast, speculate
from sampling.decode import generate
from sampling.settings import Settings
from sampling.torch_model import TorchModel

NEW = 64
LONG = 128             # tokens of a text whose speed is measured
BEGINNING = 12
DRAFTS = (4, 8, 16)
TEMPERATURES = (0.0, 0.7, 1.0)
ALWAYS = 1e9           # what rounds may lose, in parts of the text: every round is allowed


def load_run(path, precision):
    model, tokenizer, saved = checkpoint.load_model(
        path, machine.pick_device("cpu"), config.check_saved
    )
    fast.prepare(model, precision)
    return TorchModel(model), tokenizer, saved


def beginnings(args, tokenizer, saved):
    """The first tokens of held-out documents."""
    data_dir = args.data_dir or saved.config["args"]["data_dir"]
    data = held_out.open_text(data_dir, "val", saved)
    held_out.same_tokenizer(data, tokenizer, saved)
    long_enough = [ids for ids in data.documents() if len(ids) > 2 * BEGINNING]
    found = held_out.spread_over(long_enough, args.prompts, BEGINNING)
    return [ids.tolist() for ids in found[:args.prompts]]


def greedy(writer, prompts):
    """Left to right, the likeliest token each time -> the new tokens of each prompt."""
    settings = Settings(
        max_new_tokens=NEW, steps=1, mode="block_frozen", block_size=1, temperature=0.0, eos_id=None
    )
    return generate(writer, prompts, settings, [0] * len(prompts)).rows


def preferred_by(writer, prompt, text):
    """By how many nats the float32 model prefers each of its own tokens to the next best (NEW,)."""
    cache = writer.new_cache(1, len(prompt) + NEW)
    ids = np.array([prompt + text], np.int64)
    states = writer.step(ids, cache)
    positions = np.arange(len(prompt) - 1, ids.shape[1] - 1)
    logits = writer.logits(states, np.zeros_like(positions), positions)
    best = np.sort(logits, axis=-1)
    return best[:, -1] - best[:, -2]


def compare(reference, others, prompts):
    """{name: {"texts", "tokens": shares, "margin": nats}}, printed as they come."""
    right = greedy(reference, prompts)
    margins = [preferred_by(reference, *pair) for pair in zip(prompts, right, strict=True)]
    every = np.concatenate(margins)
    print(f"float32 prefers a token by {np.median(every):.2f} nats (median)")
    found = {}
    for name, writer in others.items():
        same_tokens = []
        at = []
        for text, mine, margin in zip(right, greedy(writer, prompts), margins, strict=True):
            same = np.array(text) == np.array(mine)
            same_tokens.append(same.mean())
            if not same.all():
                at.append(float(margin[same.argmin()]))
        texts = len(prompts) - len(at)
        margin = statistics.median(at) if at else 0.0
        closer = float((every <= margin).mean())
        found[name] = {
            "texts": texts / len(prompts), "tokens": float(np.mean(same_tokens)),
            "margin": margin, "closer": closer,
        }
        print(
            f"{name}: {texts} of {len(prompts)} texts, {np.mean(same_tokens):.0%} of the tokens; "
            f"the first other token lost by {margin:.3f} nats (median), {closer:.1%} of all are so "
            "close"
        )
    return found


def in_drafts(size, temperature):
    return Settings(
        max_new_tokens=LONG, steps=1, mode="block_frozen", block_size=size, sampler="speculate",
        temperature=temperature, eos_id=None,
    )


def tokens_a_round(writer, prompts):
    """{"table, T 0.7, S 8": tokens that a round gives}, when every round is allowed."""
    usual = speculate.LOSS
    speculate.LOSS = ALWAYS
    found = {}
    table = writer.drafts
    for source in ("table", "network"):
        writer.drafts = table if source == "table" else None
        for temperature, size in itertools.product(TEMPERATURES, DRAFTS):
            tokens = rounds = 0
            for seed, prompt in enumerate(prompts):
                written = generate(writer, prompt, in_drafts(size, temperature), [seed])
                tokens += written.accepted + written.rounds
                rounds += written.rounds
            found[f"{source}, T {temperature}, S {size}"] = tokens / max(1, rounds)
            print(
                f"{source}, T {temperature}, drafts of {size}: {tokens / max(1, rounds):.2f} "
                "tokens a round"
            )
    writer.drafts = table
    speculate.LOSS = usual
    return found


def speed_of_drafts(writer, prompts, rounds):
    """{"T 0.7, S 8": {"plain", "drafted": tokens/s, "faster": median, least, most; "same": share of
    the texts, "distinct": pairs of tokens that are, plain and drafted}}.
    """
    found = {}
    for temperature, size in itertools.product(TEMPERATURES, DRAFTS):
        drafted = in_drafts(size, temperature)
        plain = dataclasses.replace(drafted, block_size=1, sampler="confidence")
        seconds = {"plain": [], "drafted": []}
        texts = {"plain": [], "drafted": []}
        for seed in range(-1, rounds):
            for name, settings in (("plain", plain), ("drafted", drafted)):
                results = [generate(writer, prompt, settings, [seed]) for prompt in prompts]
                if seed >= 0:   # the first turn opens what is used
                    seconds[name].append(sum(result.seconds for result in results))
                    texts[name] += [result.full_rows[0] for result in results]
        faster = [a / b for a, b in zip(*seconds.values(), strict=True)]
        same = [a == b for a, b in zip(*texts.values(), strict=True)]
        figures = {
            name: LONG * len(prompts) / statistics.median(taken) for name, taken in seconds.items()
        }
        figures |= {
            "faster": [statistics.median(faster), min(faster), max(faster)],
            "same": statistics.mean(same),
            "distinct": [distinct_pairs(rows) for rows in texts.values()],
        }
        found[f"T {temperature}, S {size}"] = figures
        before, after = figures["distinct"]
        print(
            f"T {temperature}, drafts of {size}: {figures['plain']:.0f} -> {figures['drafted']:.0f}"
            f" tokens/s, {statistics.median(faster):.2f}x ({min(faster):.2f} to {max(faster):.2f});"
            f" {statistics.mean(same):.0%} of the texts are the same, distinct pairs {before:.3f} "
            f"and {after:.3f}"
        )
    return found


def distinct_pairs(rows):
    """The share of different pairs of tokens in texts."""
    pairs = [pair for row in rows for pair in zip(row, row[1:], strict=False)]
    return len(set(pairs)) / len(pairs)


def main():
    parser = arguments(__doc__)
    parser.add_argument("run")
    parser.add_argument("exports", nargs="+")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--drafts", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()

    machine.start(args.threads)
    reference, tokenizer, saved = load_run(args.run, "fp32")
    prompts = beginnings(args, tokenizer, saved)
    others = {name: load_run(args.run, name)[0] for name in ("int8", "bf16")}
    for path in args.exports:
        others[path] = engine.load(path, args.threads or None)
    result = {"prompts": len(prompts), "greedy": compare(reference, others, prompts)}
    if args.drafts:
        writer = others[args.exports[0]]
        result["costs"] = {"network's round": writer.round_cost, "try": writer.try_cost}
        result["tokens_a_round"] = tokens_a_round(writer, prompts[:20])
        result["speed"] = speed_of_drafts(writer, prompts[:20], args.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
