r"""Measure a model of prepare --source transliterate: errors and speed of each decode rule.

    python benchmarks/transliterate_eval.py checkpoints/typed checkpoints/typed_in_any_order \
        --text held_out.jsonl --dictionary training_text.jsonl --words people.tsv

--text is Devanagari text that the model has not seen; a typist who is drawn for each sentence types
it, with the slips of training. Each row of the table writes the same parts of sentences, one at a
time: words wrong and letters wrong (edit distance over the length of what is meant, in percent),
tokens a forward (letters, and the end of each word; the places behind an end are no tokens), parts
a second (processor time of one thread). --words adds words and their spellings by people, with a
tab between them: an answer is right that is the word of this spelling. The dictionary has the
commonest word for each spelling that eight typists give the words of this text, and guesses all
others by text/spell_back.py. The last line is JSON.
"""
import importlib
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
from sampling import fast
from sampling.settings import SPECULATE, Settings
from sampling.torch_model import writer_of
from sampling.transliteration import answer_to
from text.documents import read_documents
from text.spell_back import in_devanagari
from text.tokenizer import normalise, script_of
from text.transliterate import typed_rows, typist

TYPISTS = 8           # of the dictionary, which takes long
RULES = {                                   # name -> Settings that differ from one by one
    "one by one": dict(sampler="confidence"),
    "threshold 0.95": dict(sampler="threshold", threshold=0.95),
    "threshold 0.9": dict(sampler="threshold", threshold=0.9),
    "threshold 0.8": dict(sampler="threshold", threshold=0.8),
    "threshold 0.7": dict(sampler="threshold", threshold=0.7),
    "threshold 0.5": dict(sampler="threshold", threshold=0.5),
    "factor 0.9": dict(sampler="factor", threshold=0.9),
    "factor 0.5": dict(sampler="factor", threshold=0.5),
    "entropy 0.9": dict(sampler="entropy", threshold=0.9),
    "entropy 0.5": dict(sampler="entropy", threshold=0.5),
    "all at once": dict(sampler="confidence", steps=1),
}
LEFT_TO_RIGHT = {                           # of a model of --objective ar
    "left to right, one by one": dict(sampler="confidence"),
    "left to right, verified": dict(sampler=SPECULATE),
}


# ---- what is typed -------------------------------------------------------------------------------

def rows_of(path, typists, length):
    """(typed, meant) of the rows of a text, those of each meaning once a typist."""
    seen = set()
    for text in read_documents(Path(path)):
        for typed, meant, _ in typed_rows(normalise(text), typists, 1337, length):
            if (typed, meant) not in seen:
                seen.add((typed, meant))
                yield typed, meant


def typed_parts(path, count, length):
    """[(typed, meant)] of so many of them, drawn at random."""
    pairs = list(rows_of(path, 1, length))
    random.Random(0).shuffle(pairs)
    return pairs[:count]


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
        self.length = config.trained_length(saved)
        base = dict(steps=self.length, temperature=0.0, eos_id=self.tokenizer.eos_id)
        self.settings = Settings(self.length, **base | rule)
        self.tokens = 0
        self.forwards = 0

    def __call__(self, typed):
        line = answer_to(self.writer, self.tokenizer, typed, self.settings, self.length)
        self.tokens += line.decided
        self.forwards += line.forwards
        return line.text_so_far()

    def tokens_a_forward(self):
        return self.tokens / max(1, self.forwards)


class Dictionary:
    """The commonest word for each spelling that the typists give the words of a text."""

    def __init__(self, path):
        words = Counter()
        for text in read_documents(Path(path)):
            words.update(normalise(text).split())
        votes = defaultdict(Counter)
        for word, count in words.items():
            for style in range(TYPISTS):
                votes[typist(style)(word).lower()][word] += count
        self.known = {typed: found.most_common(1)[0][0] for typed, found in votes.items()}

    def __call__(self, typed):
        return " ".join(self.known.get(word) or in_devanagari(word) for word in typed.split())

    def tokens_a_forward(self):
        return None


class Library:
    """indic-transliteration, which reads ITRANS."""

    def __init__(self, module):
        self.module = module

    def __call__(self, typed):
        return self.module.transliterate(typed, self.module.ITRANS, self.module.DEVANAGARI)

    def tokens_a_forward(self):
        return None


# ---- figures -------------------------------------------------------------------------------------

def judge(answer, pairs):
    """Words and letters wrong, in percent; tokens a forward; parts a second."""
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


def who_answers(args):
    """{name: what answers}."""
    found = {}
    for path in args.checkpoints:
        loaded = load(path)
        rules = LEFT_TO_RIGHT if loaded[0].cfg.causal else RULES
        found |= {name: Model(loaded, rule) for name, rule in rules.items()}
    if args.dictionary:
        found["dictionary, else a guess"] = Dictionary(args.dictionary)
    try:
        module = importlib.import_module("indic_transliteration.sanscript")
    except ImportError:
        return found
    return found | {"indic-transliteration (ITRANS)": Library(module)}


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("checkpoints", nargs="+", help="of --objective ar, masked or both")
    parser.add_argument("--text", required=True, help="Devanagari text that the model has not seen")
    parser.add_argument("--count", type=int, default=500, help="parts, and words of people")
    parser.add_argument("--dictionary", help="the training text, for the baseline")
    parser.add_argument("--words", nargs="*", default=[], help="words that people typed, .tsv")
    parser.add_argument("--length", type=int, default=96, help="tokens of a row")
    args = parser.parse_args(argv)

    tests = {"parts": typed_parts(args.text, args.count, args.length)}
    for path in args.words:
        tests[path.rpartition("/")[2]] = typed_words(path, args.count)
    figures = {}
    for test, pairs in tests.items():
        print(f"{test}: {len(pairs)}, such as {pairs[0]}")
        figures[test] = {}
        for name, answer in who_answers(args).items():
            found = judge(answer, pairs)
            figures[test][name] = found
            cells = [f"{key} {value:.2f}" for key, value in found.items() if value is not None]
            print(f"  {name:<30} {'  '.join(cells)}", flush=True)
    print(json.dumps(figures, ensure_ascii=False))


if __name__ == "__main__":
    machine.start(1)
    main()
