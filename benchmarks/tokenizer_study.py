r"""BPE against unigram at several vocabulary sizes: cost of a word, training and encoding time.

    python benchmarks/tokenizer_study.py hindi.txt hinglish.txt english.txt \
        --mb 5 --vocab 4000 8000 16000

Each file is one script; a blank line, or a line break where there are no blank lines, ends a
document. The same share of each is taken up to --mb in all; every tenth document is held out and
only measured. Encoding is timed on one thread, and beside SentencePiece alone on the same
normalised text, in turn, median of 5. The last line is JSON.
"""
import json
import statistics
import tempfile
import time
from itertools import accumulate, takewhile
from pathlib import Path

from harness import arguments, in_turn
from text.tokenizer import normalise, train_tokenizer

ROUNDS = 5


def documents(path, limit):
    """Documents of one file, `limit` bytes of them."""
    text = Path(path).read_text(encoding="utf-8")
    docs = [doc for doc in text.split("\n\n" if "\n\n" in text else "\n") if doc.strip()]
    sizes = accumulate(len(doc.encode()) for doc in docs)
    return [doc for doc, _ in zip(docs, takewhile(lambda size: size <= limit, sizes), strict=False)]


def main(argv=None):
    parser = arguments(__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--mb", type=float, default=5)
    parser.add_argument("--vocab", type=int, nargs="+", default=[4000, 8000, 16000])
    args = parser.parse_args(argv)
    texts = {
        Path(path).stem: documents(path, args.mb * 1e6 / len(args.files)) for path in args.files
    }
    held_out = {name: docs[::10] for name, docs in texts.items()}
    training = [doc for docs in texts.values() for i, doc in enumerate(docs) if i % 10]
    size = sum(len(doc.encode()) for doc in training) / 1e6
    print(
        f"{size:.2f} MB to train on; held out: "
        + ", ".join(
            f"{name} {sum(len(d.encode()) for d in docs) / 1e6:.2f} MB"
            for name, docs in held_out.items()
        )
    )
    print(
        f"{'':16}{'train s':>9}{'MB/s':>7}{'of SP':>7}  tokens/word, bytes/token, letters cut % of "
        + ", ".join(texts)
    )
    rows = []
    for vocab in args.vocab:
        for kind in ("bpe", "unigram"):
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                tok = train_tokenizer(
                    training, Path(folder, "t.model"), vocab, kind, log=lambda *a: None
                )
                row = dict(kind=kind, vocab=vocab, train_s=time.perf_counter() - started)
            docs = [normalise(doc) for part in held_out.values() for doc in part]
            taken = in_turn(
                {
                    "ours": lambda docs=docs, tok=tok: [tok.encode(doc) for doc in docs],
                    "sentencepiece": lambda docs=docs, tok=tok: [
                        tok.sp.encode(doc) for doc in docs
                    ],
                },
                ROUNDS,
            )
            ours, alone = (statistics.median(taken[name]) for name in ("ours", "sentencepiece"))
            row |= dict(
                mb_per_s=sum(len(d.encode()) for d in docs) / 1e6 / ours,
                share_of_sentencepiece=alone / ours,
                scripts={name: tok.measure(part) for name, part in held_out.items()},
            )
            rows.append(row)
            costs = (
                f"{c['tokens_per_word']:.2f} {c['bytes_per_token']:.2f} "
                f"{100 * c['clusters_cut']:.1f}"
                for c in row["scripts"].values()
            )
            print(
                f"{kind:8}{vocab:8,}{row['train_s']:9.1f}{row['mb_per_s']:7.2f}"
                f"{row['share_of_sentencepiece']:7.0%}  "
                + "   ".join(costs),
                flush=True,
            )
    print(json.dumps({"training_mb": size, "rows": rows}))


if __name__ == "__main__":
    main()
