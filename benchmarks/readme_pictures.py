"""The README's pictures, drawn from a finished starter run: what `sample --show_steps` prints, and quality against speed.

    python -m train --preset starter
    python benchmarks/readme_pictures.py --ckpt checkpoints/eco_hybrid_hi       # -> docs/pictures/

Both pictures show what the commands themselves print: the script runs them and draws their output. The
unmasking is an SVG with text, because a browser shapes Devanagari and matplotlib does not. The second
picture needs matplotlib. On a CPU without bf16 the texts differ in places.
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

PROMPT = "भारत में आज मौसम"
NEW_TOKENS = 19
OPENINGS = {                                # 32 beginnings: each time with each person of its script
    "कल|आज सुबह|एक दिन|बचपन में": "राहुल|मीना|दादी|एक किसान",
    "kal|aaj subah|ek din|bachpan me": "rahul|meena|dadi|ek kisan",
}
STEPS = ("8", "16", "32", "64")
THRESHOLDS = ("0.3", "0.5", "0.7", "0.9")
LINE = 25                                   # pixels from one forward to the next
MASK = "░"


def run(*words):
    """A command of Aria -> (stdout, stderr)."""
    there = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", *words], env=there, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout, done.stderr


def watched(ckpt):
    """The block after each forward, as --show_steps prints it: a list of lists of words and masks."""
    _, told = run("sample", "--ckpt", ckpt, "--prompt", PROMPT,
                  "--max_new_tokens", str(NEW_TOKENS), "--show_steps")
    lines = re.findall(r"^\[\d+-\d+ +\d+\] (.*)$", told, re.M)
    return [re.findall(rf"{MASK}|[^{MASK}\s]+", line) for line in lines]


def fresh(before, words):
    """The positions in `words` that this forward revealed."""
    found = set()
    for change, _, _, start, end in difflib.SequenceMatcher(None, before, words, False).get_opcodes():
        if change != "equal":
            found.update(range(start, end))
    return found


def unmasking(steps):
    """An SVG: a row for each forward; new words blue, masks grey."""
    rows = []
    before = [MASK] * NEW_TOKENS
    for number, words in enumerate(steps, 1):
        new = fresh(before, words)
        parts = [f'<tspan class="prompt">{escape(PROMPT)} </tspan>']
        for place, word in enumerate(words):
            kind = "mask" if word == MASK else "new" if place in new else "old"
            parts.append(f'<tspan class="{kind}">{escape(word)} </tspan>')
        y = 14 + LINE * number
        rows.append(f'<text x="38" y="{y}" text-anchor="end" class="number">{number}</text>')
        rows.append(f'<text x="52" y="{y}">{"".join(parts)}</text>')
        before = words
    height = 30 + LINE * len(steps)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" width="720" height="{height}">
<style>
text {{ font: 16px "Noto Sans Devanagari", "Nirmala UI", "Kohinoor Devanagari", sans-serif; fill: #222 }}
.number {{ font-size: 12px; fill: #888 }} .prompt {{ fill: #888 }} .mask {{ fill: #bbb }}
.new {{ fill: #0b57d0; font-weight: 600 }}
</style>
<rect width="100%" height="100%" fill="#fff"/>
{chr(10).join(rows)}
</svg>
"""


def measured(ckpt):
    """{rule: [(setting, tokens a forward, nats a token)]} and the nats of held-out text."""
    prompts = [f"{when} {who}" for times, people in OPENINGS.items()
               for when in times.split("|") for who in people.split("|")]
    grids = [["sampler=threshold", "threshold=" + ",".join(THRESHOLDS)],
             ["sampler=confidence", "steps=" + ",".join(STEPS)]]
    lines, real = {}, None
    for grid in grids:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
            path = Path(folder, "bench.json")
            run("edge_benchmark", "--ckpt", ckpt, "--modes", "block_frozen", "--block_size", "64",
                "--max_new_tokens", "64", "--temperature", "0.7", "--warmup_runs", "0",
                "--runs_per_prompt", "1", "--prompts_file", str(Path(folder, "prompts.txt")),
                "--out_json", str(path), "--grid", *grid)
            document = json.loads(path.read_text(encoding="utf-8"))
        real = document["judge_nats_of_held_out_text"]
        for name, result in document["results"].items():
            rule, setting = re.search(r"sampler=(\w+) \w+=([\d.]+)", name).groups()
            point = (setting, result["tokens_per_forward"], result["judge_nats"])
            lines.setdefault(rule, []).append(point)
            print(name, *point[1:], result["mean_tok_s"], result["repeat_rate"])
    print("held-out text", real)
    return lines, real


def quality(path, lines, real):
    """Quality against tokens a forward, a line for each reveal rule."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7.6, 3.9))
    for rule, points in lines.items():
        axes.plot([p[1] for p in points], [p[2] for p in points], "o-", markersize=4, label=rule)
        beside = (-18, 0) if rule == "confidence" else (6, -6)
        for setting, forward, nats in points:
            axes.annotate(setting, (forward, nats), fontsize=8, xytext=beside, textcoords="offset points")
    axes.axhline(real, linestyle="--", linewidth=1, color="gray", label="held-out text")
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set(xlabel="tokens a forward (fast to the right)",
             ylabel="nats/token, 4-gram model\n(good text is low)",
             title="Starter run, temperature 0.7; numbers: the threshold, or forwards for 64 tokens")
    axes.title.set_fontsize(10)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main():
    parser = arguments(__doc__)
    parser.add_argument("--ckpt", default="checkpoints/eco_hybrid_hi")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/pictures")
    args = parser.parse_args()
    ckpt = str(Path(args.ckpt).resolve())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "unmasking.svg").write_text(unmasking(watched(ckpt)), encoding="utf-8")
    quality(args.out / "quality.png", *measured(ckpt))


if __name__ == "__main__":
    main()
