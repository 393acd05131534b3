r"""Measure text/romanise.py on pairs that people wrote, beside other ways to romanise.

    python benchmarks/romanise_eval.py test.tsv --exclude train.tsv dev.tsv \
        --text hindi.txt --typed hinglish.txt

The other ways: a transliteration without schwa rules, and libraries. test.tsv: one pair a line, the
Devanagari word and a spelling in either order, then perhaps how many people wrote it (the form of
the Dakshina lexicons). Words of --exclude, on which the rules were tuned, are left out. Each row of
the table is one romaniser: top1, its spelling is one that most people gave; any, somebody gave it;
k styles, one of the first k typists gives a spelling that somebody gave; error, edit distance over
letters, to the commonest spelling and to the nearest one. --text and --typed add, for running Hindi
text, the share of output words that occur twice or more in what people typed. A library that is not
installed is left out. The last line is JSON.
"""
import importlib
import json
import re
import time
from collections import Counter, defaultdict
from pathlib import Path

from harness import arguments  # first: it puts the repository on the path

from common.console import UserError
from text import romanise

STYLES = (8, 32)
DEVANAGARI = re.compile("[\u0900-\u097f]")
LIBRARIES = {                                    # name -> (module, its function of module and word)
    "anyascii 0.3.3": ("anyascii", lambda m, word: m.anyascii(word)),
    "hinlangpy 1.0.0": ("hinlang", lambda m, word: m.to_roman(word)),
    "indic-transliteration 2.3.82": ("indic_transliteration.sanscript",  # ITRANS, in small letters
                                     lambda m, word: m.transliterate(word, "devanagari", "itrans")),
}


def read_pairs(path):
    """{word: {spelling: people}}."""
    pairs = defaultdict(Counter)
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        cells = line.split("\t")
        if len(cells) < 2 or len(cells) > 2 and not cells[2].isdigit():
            raise UserError(
                f"{path}:{number}: give a word, a spelling and perhaps a count, with tabs between "
                "them"
            )
        word, spelling = cells[:2] if DEVANAGARI.search(cells[0]) else cells[1::-1]
        pairs[word][spelling.lower()] += int(cells[2]) if len(cells) > 2 else 1
    return pairs


def distance(a, b):
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def judge(say, pairs):
    """Scores of one romaniser, in percent."""
    n = Counter()
    for word, spellings in pairs.items():
        out, most = say(word), max(spellings.values())
        best = [s for s, count in spellings.items() if count == most]
        far, near = (
            min((distance(out, s), len(s)) for s in best),
            min((distance(out, s), len(s)) for s in spellings),
        )
        n.update(
            top1=out in best,
            any=out in spellings,
            far=far[0],
            far_letters=far[1],
            near=near[0],
            near_letters=near[1],
        )
    return {
        "top1": 100 * n["top1"] / len(pairs),
        "any": 100 * n["any"] / len(pairs),
        "error": 100 * n["far"] / n["far_letters"],
        "error_nearest": 100 * n["near"] / n["near_letters"],
    }


def people(pairs):
    """The same scores for the people themselves, each against all others who wrote that word: what
    can be hoped for.
    """
    n = Counter()
    for spellings in pairs.values():
        for spelling, count in spellings.items():
            others = Counter(spellings) - Counter([spelling])
            if others:
                top = others[spelling] == max(others.values())
                n.update({"all": count, "top1": count * top, "any": count * (spelling in others)})
    return {score: 100 * n[score] / n["all"] for score in ("top1", "any")} if n else None


def romanisers():
    yield "no schwa rules", lambda word: romanise.spell(romanise.units(word), romanise.COMMON)
    yield "rules, no word lists", lambda word: romanise.rules(word, romanise.COMMON)
    yield "romanise, style 0", romanise.Romaniser().word
    for name, (module, say) in LIBRARIES.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            continue
        yield name, lambda word, found=found, say=say: say(found, word).lower()


def typed_share(say, words, vocabulary):
    """Share of running words whose spelling is in the vocabulary, in percent; words are counted."""
    return (
        100 * sum(count for word, count in words.items() if say(word) in vocabulary) / words.total()
    )


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("pairs")
    parser.add_argument("--exclude", nargs="*", default=())
    parser.add_argument("--text")
    parser.add_argument("--typed")
    args = parser.parse_args(argv)
    pairs = read_pairs(args.pairs)
    seen = set().union(*map(read_pairs, args.exclude))
    pairs = {word: spellings for word, spellings in pairs.items() if word not in seen}
    print(f"{len(pairs)} words, {sum(map(len, pairs.values())) / len(pairs):.2f} spellings each")
    result = {"words": len(pairs), "excluded": len(seen)}
    columns = ("top1", "any", "error", "error_nearest")
    print(f"{'percent':32}" + "".join(f"{c:>15}" for c in columns))
    for name, say in romanisers():
        scores = result[name] = judge(say, pairs)
        print(f"{name:32}" + "".join(f"{scores[c]:15.1f}" for c in columns))
    if scores := people(pairs):
        result["people"] = scores
        print(f"{'one person, against the others':32}{scores['top1']:15.1f}{scores['any']:15.1f}")
    typists = [romanise.Romaniser(style) for style in range(max(STYLES))]
    given = {word: [typist.word(word) for typist in typists] for word in pairs}
    for k in STYLES:
        hits = sum(any(s in pairs[word] for s in said[:k]) for word, said in given.items())
        result[f"any_of_{k}_styles"] = 100 * hits / len(pairs)
        one = (
            sum(s in pairs[word] for word, said in given.items() for s in said[1:k])
            / len(pairs)
            / (k - 1)
        )
        print(f"one of {k} styles: {result[f'any_of_{k}_styles']:.1f}; "
              f"a typist among them on average: {100 * one:.1f}; different spellings: "
              f"{sum(len(set(said[:k])) for said in given.values()) / len(pairs):.2f} a word")
    if args.text and args.typed:
        text = Path(args.text).read_text(encoding="utf-8")
        words = Counter(re.findall("[\u0900-\u0963\u0971-\u097f]+", text))
        typed = Counter(re.findall("[a-z]+", Path(args.typed).read_text(encoding="utf-8").lower()))
        vocabulary = {word for word, count in typed.items() if count > 1}
        for name, say in (*romanisers(), *((f"style {t.style}", t.word) for t in typists[1:4])):
            result[f"typed: {name}"] = typed_share(say, words, vocabulary)
            print(
                f"{name:32}{result[f'typed: {name}']:15.1f} % of {words.total()} running words are "
                "typed by people"
            )
        started = time.process_time()
        romanise.Romaniser()(text)
        result["mb_per_s"] = len(text.encode()) / 1e6 / (time.process_time() - started)
        print(
            f"{result['mb_per_s']:.1f} MB of Devanagari a second, one core, nothing cached before"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
