r"""Measure a model of prepare --source transliterate: errors and speed of each decode rule.

    python benchmarks/transliterate_eval.py checkpoints/typed --text held_out.jsonl \
        --dictionary training_text.jsonl --ar checkpoints/typed_ar --words people.tsv

--text is Devanagari text that the model has not seen; a typist who is drawn for each sentence types
it, without slips unless --slips is given. Each row of the table writes the same sentences, one at a
time: words wrong and letters wrong (edit distance over the length of what is meant, in percent),
tokens a forward, sentences a second (processor time of one thread). --words adds words and their
spellings by people, with a tab between them: an answer is right that is the word of this spelling.
--dictionary is the baseline: the commonest word for each spelling that eight typists give the words
of this text. The last line is JSON.
"""
import json
import random
import time
from collections import Counter, defaultdict
from pathlib import Path

from harness import arguments  # first: it puts the repository on the path
from romanise_eval import distance

import checkpoint
import config
from common import machine
from sampling import decode, fast
from sampling.settings import Settings, opening, usual_block
from sampling.torch_model import writer_of
from text.documents import read_documents
from text.tokenizer import normalise, script_of
from text.transliterate import STYLES, parts, slipped, typist

TYPISTS = 8           # of the dictionary, which takes long
RULES = {                                   # name -> Settings that differ from one by one
    "one by one": dict(block_size=1, steps=1),
    "threshold 0.95": dict(sampler="threshold", threshold=0.95),
    "threshold 0.9": dict(sampler="threshold", threshold=0.9),
    "threshold 0.7": dict(sampler="threshold", threshold=0.7),
    "threshold 0.5": dict(sampler="threshold", threshold=0.5),
    "factor 0.9": dict(sampler="factor", threshold=0.9),
    "factor 0.5": dict(sampler="factor", threshold=0.5),
    "entropy 0.3": dict(sampler="entropy", threshold=0.3),
    "entropy 1": dict(sampler="entropy", threshold=1.0),
}


# ---- what is typed -------------------------------------------------------------------------------

def sentences_of(path):
    """The parts of Devanagari sentences that a text holds, each once."""
    found = {}
    for text in read_documents(Path(path)):
        for part in parts(normalise(text)):
            if script_of(part) == "devanagari":
                found[part] = True
    return list(found)


def typed_sentences(path, count, slips, seed=0):
    """[(typed, meant)] of so many of them."""
    chance = random.Random(seed)
    sentences = sentences_of(path)
    chance.shuffle(sentences)
    pairs = []
    for meant in sentences[:count]:
        typed = typist(chance.randrange(STYLES))(meant)
        if slips:
            typed = " ".join(slipped(word, chance) for word in typed.split())
        pairs.append((normalise(typed), meant))
    return pairs


def typed_words(path, count, seed=0):
    """[(spelling, word)] of so many words that people typed; the commoner spelling of each."""
    spellings = defaultdict(Counter)
    for line in open(path, encoding="utf-8"):
        cells = line.rstrip("\n").split("\t")
        word, spelling = cells[:2] if script_of(cells[0]) == "devanagari" else cells[1::-1]
        people = int(cells[2]) if len(cells) > 2 else 1
        spellings[normalise(word)][spelling.lower()] += people
    pairs = [(found.most_common(1)[0][0], word) for word, found in spellings.items()]
    random.Random(seed).shuffle(pairs)
    return pairs[:count]


# ---- who answers ---------------------------------------------------------------------------------

def load(path):
    """-> (engine, tokenizer, checkpoint), in float32."""
    model, tokenizer, saved = checkpoint.load_model(
        path, machine.pick_device("cpu"), config.check_saved
    )
    fast.prepare(model, "fp32")
    return writer_of(model), tokenizer, saved


class Model:
    """A checkpoint under one decode rule."""

    def __init__(self, loaded, rule):
        self.writer, self.tokenizer, saved = loaded
        self.length = saved.config["args"]["seq_len"]
        base = dict(mode="block_frozen", block_size=usual_block(saved), temperature=0.0)
        self.rule = base | rule
        self.tokens = 0
        self.forwards = 0

    def __call__(self, typed):
        ids = opening(self.tokenizer, typed, framed=True)
        room = max(8, self.length - len(ids))
        rule = dict(steps=self.rule["block_size"]) | self.rule
        null = tuple(opening(self.tokenizer, "", framed=True))
        settings = Settings(room, eos_id=self.tokenizer.eos_id, null_prompt=null, **rule)
        result = decode.generate(self.writer, ids, settings, [0])
        self.tokens += len(result.full_rows[0])
        self.forwards += result.row_forwards[0]
        return self.tokenizer.written(result.rows[0])

    def tokens_a_forward(self):
        return self.tokens / max(1, self.forwards)


class Dictionary:
    """The commonest word for each spelling that the typists give the words of a text."""

    def __init__(self, path):
        words = Counter(word for part in sentences_of(path) for word in part.split())
        votes = defaultdict(Counter)
        for word, count in words.items():
            for style in range(TYPISTS):
                votes[typist(style)(word)][word] += count
        self.known = {typed: found.most_common(1)[0][0] for typed, found in votes.items()}

    def __call__(self, typed):
        return " ".join(self.known.get(word, word) for word in typed.split())

    def tokens_a_forward(self):
        return None


# ---- figures -------------------------------------------------------------------------------------

def judge(answer, pairs):
    """Words and letters wrong, in percent; tokens a forward; sentences a second."""
    count = Counter()
    started = time.process_time()
    answers = [answer(typed) for typed, _ in pairs]
    seconds = time.process_time() - started
    for got, (_, meant) in zip(answers, pairs, strict=True):
        count.update(
            words=len(meant.split()),
            letters=len(meant),
            wrong_words=distance(got.split(), meant.split()),
            wrong_letters=distance(got, meant),
            right=got == meant,
        )
    return {
        "words wrong": 100 * count["wrong_words"] / count["words"],
        "letters wrong": 100 * count["wrong_letters"] / count["letters"],
        "all right": 100 * count["right"] / len(pairs),
        "tokens a forward": answer.tokens_a_forward(),
        "a second": len(pairs) / seconds,
    }


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", required=True, help="Devanagari text that the model has not seen")
    parser.add_argument("--count", type=int, default=500, help="sentences, and words of people")
    parser.add_argument("--slips", action="store_true", help="with slips of the fingers")
    parser.add_argument("--ar", help="a checkpoint of --objective ar")
    parser.add_argument("--dictionary", help="the training text, for the baseline")
    parser.add_argument("--words", nargs="*", default=[], help="words that people typed, .tsv")
    args = parser.parse_args(argv)

    loaded = load(args.checkpoint)
    answering = {name: Model(loaded, rule) for name, rule in RULES.items()}
    if args.ar:
        answering["autoregressive model"] = Model(load(args.ar), RULES["one by one"])
    if args.dictionary:
        answering["dictionary"] = Dictionary(args.dictionary)
    tests = {"sentences": typed_sentences(args.text, args.count, args.slips)}
    for path in args.words:
        tests[path.rpartition("/")[2]] = typed_words(path, args.count)

    figures = {}
    for test, pairs in tests.items():
        print(f"{test}: {len(pairs)}, such as {pairs[0]}")
        figures[test] = {}
        for name, answer in answering.items():
            found = judge(answer, pairs)
            figures[test][name] = found
            cells = [f"{key} {value:.2f}" for key, value in found.items() if value is not None]
            print(f"  {name:<22} {'  '.join(cells)}", flush=True)
    print(json.dumps(figures, ensure_ascii=False))


if __name__ == "__main__":
    machine.start(1)
    main()
