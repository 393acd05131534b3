"""The README's pictures: what `sample --sampler threshold --show_steps` prints, and quality
against speed.

    python -m train --preset starter
    python benchmarks/readme_pictures.py --ckpt checkpoints/eco_hybrid_hi    # -> docs/pictures/

Both show what the commands print about a finished starter run: the script runs them and draws
their output, which takes about four minutes. The unmasking is an SVG with text, because a browser
shapes Devanagari and matplotlib does not. On a CPU without bf16 the texts differ in places.
"""
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

from harness import ROOT, arguments

from evaluation.plots import pyplot

PROMPT = "भारत में आज मौसम"
NEW_TOKENS = 19
MASK = "░"
LINE = 25                                   # pixels from one forward to the next

OPENINGS = {                                # 32 beginnings: each time with each person
    "कल|आज सुबह|एक दिन|बचपन में": "राहुल|मीना|दादी|एक किसान",
    "kal|aaj subah|ek din|bachpan me": "rahul|meena|dadi|ek kisan",
}
LEFT_TO_RIGHT = "left to right"             # the default of sample: blocks of one token
GRIDS = [
    ["block_size=1"],
    ["sampler=threshold", "threshold=0.3,0.5,0.7,0.9"],
    ["sampler=confidence", "steps=8,16,32,64"],
]
BENCHMARK = [
    "--modes", "block_frozen",
    "--block_size", "64",
    "--max_new_tokens", "64",
    "--temperature", "0.7",
    "--warmup_runs", "0",
    "--runs_per_prompt", "1",
]

SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{height}"
     viewBox="0 0 720 {height}">
<style>
text {{
  font: 16px "Noto Sans Devanagari", "Nirmala UI", "Kohinoor Devanagari", sans-serif;
  fill: #222;
}}
.number {{ font-size: 12px; fill: #888 }}
.prompt {{ fill: #888 }}
.mask {{ fill: #bbb }}
.new {{ fill: #0b57d0; font-weight: 600 }}
</style>
<rect width="100%" height="100%" fill="#fff"/>
{rows}
</svg>
"""


def run(*words):
    """A command of Aria -> (stdout, stderr)."""
    there = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, env=there, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout, done.stderr


def watched(ckpt):
    """The block after each forward, as --show_steps prints it: [[word or mask, ...], ...]."""
    _, told = run(
        "sample", "--ckpt", ckpt, "--prompt", PROMPT, "--sampler", "threshold", "--show_steps",
        "--max_new_tokens", str(NEW_TOKENS),
    )
    lines = re.findall(r"^\[\d+-\d+ +\d+\] (.*)$", told, re.M)
    return [re.findall(rf"{MASK}|[^{MASK}\s]+", line) for line in lines]


def revealed(before, words):
    """The positions in `words` that the last forward revealed."""
    found = set()
    changes = difflib.SequenceMatcher(None, before, words, autojunk=False).get_opcodes()
    for change, _, _, start, end in changes:
        if change != "equal":
            found.update(range(start, end))
    return found


def marked(word, is_new):
    """One word of a row, with the class that gives it its colour."""
    kind = "old"
    if word == MASK:
        kind = "mask"
    elif is_new:
        kind = "new"
    return f'<tspan class="{kind}">{escape(word)} </tspan>'


def unmasking(steps):
    """An SVG: a row for each forward; new words blue, masks grey."""
    rows = []
    before = [MASK] * NEW_TOKENS
    for number, words in enumerate(steps, 1):
        new = revealed(before, words)
        y = 14 + LINE * number
        text = "".join(marked(word, place in new) for place, word in enumerate(words))
        rows.append(f'<text x="38" y="{y}" text-anchor="end" class="number">{number}</text>')
        prompt = f'<tspan class="prompt">{PROMPT} </tspan>'
        rows.append(f'<text x="52" y="{y}">{prompt}{text}</text>')
        before = words
    return SVG.format(height=30 + LINE * len(steps), rows="\n".join(rows))


def beginnings():
    found = []
    for times, people in OPENINGS.items():
        for when in times.split("|"):
            for who in people.split("|"):
                found.append(f"{when} {who}")
    return found


def measured(ckpt):
    """{rule: [(setting, tokens a forward, nats a token)]} and the nats of held-out text."""
    lines = {}
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.txt")
        prompts.write_text("\n".join(beginnings()), encoding="utf-8")
        path = Path(folder, "bench.json")
        for grid in GRIDS:
            run(
                "edge_benchmark", "--ckpt", ckpt, *BENCHMARK, "--prompts_file", str(prompts),
                "--out_json", str(path), "--grid", *grid,
            )
            document = json.loads(path.read_text(encoding="utf-8"))
            for name, result in document["results"].items():
                found = re.search(r"sampler=(\w+) \w+=([\d.]+)", name)
                rule, setting = found.groups() if found else (LEFT_TO_RIGHT, "")
                point = (setting, result["tokens_per_forward"], result["judge_nats"])
                lines.setdefault(rule, []).append(point)
                print(name, *point[1:], result["mean_tok_s"], result["repeat_rate"])
    return lines, document["judge_nats_of_held_out_text"]


def quality(path, lines, held_out):
    """Quality against tokens a forward: a line for each reveal rule, a point for left to right."""
    figure, axes = pyplot().subplots(figsize=(7.6, 3.9))
    for rule, points in lines.items():
        forwards = [point[1] for point in points]
        nats = [point[2] for point in points]
        marker = "o-"
        if rule == LEFT_TO_RIGHT:
            marker = "kD"
        axes.plot(forwards, nats, marker, markersize=4, label=rule)
        beside = (6, -6)
        if rule == "confidence":
            beside = (-18, 0)
        for setting, *place in points:
            axes.annotate(setting, place, fontsize=8, xytext=beside, textcoords="offset points")
    axes.axhline(held_out, linestyle="--", linewidth=1, color="gray", label="held-out text")
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.7, 9)
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set_xlabel("tokens a forward (fast to the right)")
    axes.set_ylabel("nats/token, 4-gram model\n(low is likely text)")
    title = "Starter run, temperature 0.7; numbers: the threshold, or forwards for 64 tokens"
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main():
    parser = arguments(__doc__)
    parser.add_argument("--ckpt", default="checkpoints/eco_hybrid_hi")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/pictures")
    args = parser.parse_args()
    if pyplot() is None:        # it has said why
        sys.exit(2)
    ckpt = str(Path(args.ckpt).resolve())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "unmasking.svg").write_text(unmasking(watched(ckpt)), encoding="utf-8")
    quality(args.out / "quality.png", *measured(ckpt))


if __name__ == "__main__":
    main()
