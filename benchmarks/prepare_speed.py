"""How fast prepare is: each pass in MB/s per core, beside SentencePiece alone, and its memory.

    python benchmarks/prepare_speed.py my_texts.jsonl [--gb 1]

One process, one thread, the passes in turn, medians of --rounds. The last line is one JSON
document. --gb also prepares that much in a process of its own and measures its memory; it repeats
the text with every word of a document changed a little, so that no document is a copy of another.
"""
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import ROOT, arguments, in_turn


def main():
    parser = arguments(__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--mb", type=float, default=4.0, help="text of the timed passes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gb", type=float, default=0.0)
    args = parser.parse_args()
    import sentencepiece

    from text.clean import Cleaner
    from text.documents import find_files, read_documents
    from text.romanise import Romaniser
    from text.tokenizer import Tokenizer, normalise, train_tokenizer
    texts, size = [], 0
    for path in find_files(args.files):
        for text in read_documents(path):
            if size < args.mb * 1e6:
                texts.append(text)
                size += len(text.encode())
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(texts, Path(folder, "t.model"), 8000, "bpe", log=lambda _: None)
        tok = Tokenizer(Path(folder, "t.model"))
        sp = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder, "t.model")))
    clean_texts = [normalise(text) for text in texts]
    passes = {
        "sentencepiece alone": lambda: sp.encode(clean_texts, num_threads=1, return_type="numpy"),
        "our encoding": lambda: [tok.encode_many(clean_texts[i:i + 64], normalised=True)
                                 for i in range(0, len(texts), 64)],
        "normalise": lambda: list(map(normalise, texts)),
        "clean": lambda: list(map(Cleaner(), clean_texts)),
        "romanise": lambda: list(map(Romaniser(1), clean_texts)),
    }
    seconds = in_turn(passes, args.rounds, time.process_time, warm_up=False)
    speed = {name: size / 1e6 / statistics.median(s) for name, s in seconds.items()}
    for name, s in seconds.items():
        print(
            f"{name:>20}: {speed[name]:6.2f} MB/s per core "
            f"({size / 1e6 / max(s):.2f}-{size / 1e6 / min(s):.2f})"
        )
    ratio = statistics.median(
        a / b for a, b in zip(seconds["sentencepiece alone"], seconds["our encoding"], strict=True)
    )
    print(f"our encoding / SentencePiece alone: {ratio:.2f}")
    result = dict(mb=size / 1e6, mb_s=speed, ratio=ratio)
    if args.gb:
        result |= large(texts, args.gb)
    print(json.dumps(result))


def large(texts, gb):
    """Prepare so many GB, and watch the memory of that process."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path, size, turn = Path(folder, "big.jsonl"), 0, 0
        with open(path, "w", encoding="utf-8") as f:
            while size < gb * 1e9:
                for text in texts:
                    line = json.dumps(
                        {
                            "text": text.replace(
                                " ", " " + "कखगघचछजझटठडढ"[turn % 12] + str(turn), turn + 1
                            )
                        },
                        ensure_ascii=False,
                    )
                    f.write(line + "\n")
                    size += len(line.encode())
                turn += 1
        started = time.perf_counter()
        subprocess.run(
            [
                sys.executable, "-m", "prepare", "--source", "files",
                "--input", str(path.resolve()), "--clean",
                "--data_dir", str(Path(folder, "out").resolve()),
                "--tokenizer", str(Path(folder, "t.model").resolve()), "--max_docs", "1000000000",
                "--max_chars", "100000000000",
            ],
            cwd=ROOT,
            check=True,
        )
        wall = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"{size / 1e9:.2f} GB in {wall:.0f} s = {size / 1e6 / wall:.2f} MB/s, peak memory "
        f"{peak:.0f} MB"
    )
    return dict(gb=size / 1e9, wall_s=wall, peak_mb=peak)


if __name__ == "__main__":
    main()
