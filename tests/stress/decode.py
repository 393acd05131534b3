"""The promises of the decode loop on ten thousand random cases: prompts, settings, habits of a fake
denoiser. The tests run the first quarter of each part.

    python tests/stress/decode.py
"""
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from test_decode import check_cases  # noqa: E402


def main():
    for part in range(10):
        started = time.perf_counter()
        check_cases(part, 1000)
        print(f"part {part}: 1,000 cases in {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
