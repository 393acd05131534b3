r"""What public trainers and ours have learned after the same text: one bound for all of them.

    python benchmarks/bound_peers.py --peers DIR --data_dir data/processed --out logs/bound_peers
    python benchmarks/bound_peers.py --peers DIR --only "aria primary" "MDLM DiT" \
        --steps 2000 --judge 300

Over tokens and over seconds. Same prepared text, windows in the same order, tokens, batch and
(within 1 %) parameters; each with its own network, objective, optimizer and schedule
(peer_models.py). One arm after another, in three stages:

1. rates: every arm at its published rate, 3 and 10 times it, for --judge steps of the whole
   schedule; as long as the best of them is at an edge, the next one beyond; only the best goes on
   to --steps. Every --every steps the bound of --curve_windows windows. (MDLM with our schedule
   takes the rate of MDLM with its own: they hardly differ by then.)
2. time: all arms take --rounds steps in turn. With one thread a second is a CPU second of the
   process, so that other programs on the machine do not count. The mean, as the steps of a mixture
   of blocks cost differently.
3. equal seconds: the arm that needs the fewest for --steps sets the budget; every other is trained
   anew with its best rate and a whole schedule of as many steps as the budget has.

An arm with more than 1 % more or fewer parameters than the backup of the shape is refused.

Score: the exact-count bound over whole rows (masking, with EXACT_COUNT) of held-out windows, all
arms on the same windows and masks, the mask's own logit at minus infinity, in float32; of
autoregressive arms the exact NLL of the same tokens. slm388-torchdiff and telos-ml minimise no
bound, but what they learn is p(token | the visible ones), whose bound this is. Differences to the
first arm are paired by window.

Every finished run is a line of runs.jsonl in --out: the same command goes on after a break. Prints
a table; writes curves.png there where matplotlib exists; the last line is one JSON document.
"""
import contextlib
import functools
import json
import math
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from harness import arguments  # first: it puts the repository on the path

import config
import masking
from benchmarks import peer_models, peers
from common import machine
from evaluation import plots
from evaluation.estimators import bits_per_byte
from text import dataset

FACTORS = (0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)               # times the published rate
FIRST = 3, 4, 5                                                  # of FACTORS, tried by everybody
WORST = 99.0  # nats of a run that has diverged: JSON knows no infinity


class Arm(NamedTuple):
    rate: float                                                  # published
    make: object  # (folder of the peers, Setting, rate) -> Student
    like: str = ""  # the arm whose best rate it takes, instead of asking for its own


def ours(model, rate=3e-4, **settings):
    return Arm(rate, lambda folder, setting, rate: peer_models.ours(
        setting, rate, model, **settings
    ))


MUON = dict(optimizer="muon", rate=config.PRESETS["starter"]["lr"])
ARMS = {
    "aria primary": ours("primary"),
    "aria backup": ours("backup"),
    "aria primary, both streams": ours("primary", **peer_models.MIXTURE),
    "aria primary, Muon": ours("primary", **MUON),
    "aria primary, both streams, Muon": ours("primary", **peer_models.MIXTURE, **MUON),
    "MDLM DiT": Arm(3e-4, peer_models.mdlm),
    "MDLM DiT, cosine": Arm(
        3e-4, functools.partial(peer_models.mdlm, schedule="cosine"), like="MDLM DiT"
    ),
    "slm388-torchdiff": Arm(2.5e-4, peer_models.torchdiff),
    "telos-ml": Arm(3e-4, peer_models.telos),
    "aria ar": ours("backup", objective="ar"),
    "aria primary ar": ours("primary", objective="ar"),
    "nanoGPT": Arm(6e-4, peer_models.nanogpt),
}


# --------------------------------------------------------------------------------------------------
# scoring

@torch.no_grad()
def score(student, rows, vocab, seed=0, draws=1, batch=8):
    """What held-out rows (R, T) cost in nats per token: (R,). The masks are masking.bound's of the
    same seed.
    """
    R, T = rows.shape
    total, draws = torch.zeros(R), 1 if student.causal else draws
    for i in range(draws):
        masks = (
            masking.left_to_right(R, T)
            if student.causal
            else masking.corrupt(masking.EXACT_COUNT, seed + i, 0, R, T, T)
        )
        for a in range(0, R, batch):
            x, masked = rows[a:a + batch], masks.mask[a:a + batch]
            xt = x if student.causal else torch.where(masked, vocab, x)
            z = student.logits(xt)[masked].float()  # (N, V) or (N, V + 1)
            z[:, vocab:] = -math.inf
            ce = torch.zeros(x.shape)
            ce[masked] = -z.log_softmax(-1).gather(1, x[masked][:, None])[:, 0]
            total[a:a + batch] += (ce * masks.weight[a:a + batch]).sum(1) / T
    return total / draws


# --------------------------------------------------------------------------------------------------
# one training

def clock():
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Study:
    """What all runs share: the text, the settings, the lines of finished runs."""

    def __init__(self, args):
        self.args, self.path = args, Path(args.out) / "runs.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        train, self.val = (
            dataset.TokenData(args.data_dir, "train"),
            dataset.TokenData(args.data_dir, "val"),
        )
        self.shape = {
            name: getattr(args, name)
            for name in ("d_model", "n_layers", "n_heads", "d_ff", "memory_slots", "seq_len")
        }
        self.windows, self.vocab = dataset.Windows(train, args.seq_len, args.seed), train.vocab_size
        self.held = self.val.val_windows(args.windows, args.seq_len)                # (R, T)
        self.few = self.val.val_windows(args.curve_windows, args.seq_len)
        told = ("batch_size", "judge", "every", "seed", "curve_windows", "windows", "draws")
        self.settings = {
            **self.shape,
            **{name: getattr(args, name) for name in told},
            "vocab": self.vocab,
            "text": train.meta["train_sha256"][:16],
            "dtype": str(peer_models.DTYPE),
        }

    def setting(self, steps):
        return peer_models.Setting(
            self.shape, self.args.batch_size, self.vocab, steps, self.args.seed
        )

    def batch(self, n):
        return self.windows.batch(n * self.args.batch_size, self.args.batch_size)  # (B, T)

    def find(self, **wanted):
        """The finished line of the same settings, or None; a line that was cut off is none."""
        for text in (
            self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ()
        ):
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if all(
                    line.get(key) == value
                    for key, value in {**wanted, "settings": self.settings}.items()
                ):
                    return line
        return None

    def add(self, **line):
        with open(self.path, "a", encoding="utf-8") as f:
            f.write("\n" * (f.tell() > 0) + json.dumps({**line, "settings": self.settings}))
        return line


class Run:
    """One arm in training; all its randomness is a function of the seed and the step."""

    def __init__(self, study, arm, rate, steps):
        self.study, self.arm, self.rate, self.steps = study, arm, rate, steps
        self.done, self.seconds, self.curve = 0, 0.0, []
        torch.manual_seed(study.args.seed)
        self.student = ARMS[arm].make(study.args.peers, study.setting(steps), rate)
        wanted = peer_models.target(study.setting(steps))
        assert abs(self.student.params / wanted - 1) < 0.01, (
            f"{arm}: {self.student.params:,} parameters, not {wanted:,}"
        )
        self.student.net.train()

    def to(self, last):
        """Train until step `last`; the curve gets [step, seconds, nats] -> nats there."""
        while self.done < last:
            x = self.study.batch(self.done)
            torch.manual_seed(
                masking.step_generator(self.study.args.seed, self.done, "peers").initial_seed()
            )
            started = clock()
            self.student.step(x, self.done)
            self.seconds, self.done = self.seconds + clock() - started, self.done + 1
            if self.done % self.study.args.every == 0 or self.done == last:
                self.curve.append(
                    [self.done, round(self.seconds, 3), self.nats(self.study.few, 1)[0]]
                )
        return self.curve[-1][2]

    def nats(self, rows, draws):
        """-> (mean, of each row), with the weights that the recipe is judged with."""
        self.student.net.eval()
        with self.student.averaged():
            each = score(self.student, rows, self.study.vocab, draws=draws)
        self.student.net.train()
        each = each.nan_to_num(WORST, WORST).clamp(max=WORST)
        return float(each.mean()), [round(v, 5) for v in each.tolist()]

    def line(self, kind):
        return {
            "kind": kind,
            "arm": self.arm,
            "rate": self.rate,
            "steps": self.steps,
            "params": self.student.params,
            "seconds": round(self.seconds, 2),
            "curve": self.curve,
            "causal": self.student.causal,
        }

    def finish(self, kind):
        self.to(self.steps)
        mean, each = self.nats(self.study.held, self.study.args.draws)
        print(f"{kind}: {self.arm}, rate {self.rate:g}, {self.steps} steps: {mean:.4f} nats/token, "
              f"{self.seconds:.0f} s in its steps", flush=True)
        return self.study.add(**self.line(kind), nats=mean, windows=each)


# --------------------------------------------------------------------------------------------------
# the stages

def trained(study, arm):
    """Stage 1 -> the line of the arm's whole training at the rate that was best after --judge
    steps.
    """
    scores, alive, steps, asked = {}, None, study.args.steps, ARMS[arm].like or arm
    todo = list(FIRST)
    while todo:
        at = todo.pop(0)
        rate = float(f"{ARMS[arm].rate * FACTORS[at]:.3g}")
        if not (line := study.find(kind="rate", arm=asked, rate=rate, steps=steps)):
            run = Run(study, asked, rate, steps)
            nats = run.to(study.args.judge)
            line = study.add(**run.line("rate"), nats=nats)
            print(
                f"rate: {asked}, {rate:g}: {line['nats']:.4f} after {study.args.judge} steps",
                flush=True,
            )
            alive = (
                run
                if line["nats"] <= min([s for s, _ in scores.values()], default=WORST)
                else alive
            )
        scores[at] = line["nats"], rate
        if not todo:
            best = min(scores, key=scores.get)
            todo = [i for i in (best - 1, best + 1) if i not in scores and 0 <= i < len(FACTORS)]
    rate = scores[best][1]
    line = study.find(kind="run", arm=arm, rate=rate, steps=steps)
    if not line:
        line = (
            alive
            if alive and (alive.arm, alive.rate) == (arm, rate)
            else Run(study, arm, rate, steps)
        ).finish("run")
    return {
        **line,
        "judged": {rate: nats for nats, rate in sorted(scores.values(), key=lambda s: s[1])},
    }


def measured(study, runs):
    """Stage 2 -> {arm: seconds of a step}."""
    if line := study.find(kind="time", arms=sorted(runs), rounds=study.args.rounds):
        return line["step_s"]
    field = {
        arm: Run(study, arm, line["rate"], study.args.steps).student for arm, line in runs.items()
    }
    taken = {arm: [] for arm in field}
    for n in range(-2, study.args.rounds):  # the first two are not counted
        for arm, student in field.items():
            x, started = study.batch(n + 2), clock()
            student.step(x, n + 2)
            taken[arm] += [clock() - started] * (n >= 0)
    step_s = {arm: sum(seconds) / len(seconds) for arm, seconds in taken.items()}
    return study.add(kind="time", arms=sorted(runs), rounds=study.args.rounds, step_s=step_s)[
        "step_s"
    ]


def within(study, arm, line, steps):
    """Stage 3 -> the arm's line of a whole schedule of these steps."""
    if steps >= study.args.steps:
        return line
    return (study.find(kind="equal seconds", arm=arm, rate=line["rate"], steps=steps)
            or Run(study, arm, line["rate"], steps).finish("equal seconds"))


def at_second(curve, second, step_s):
    """The curve's nats at that second, between its points; None before the first."""
    points = [(step * step_s, nats) for step, _, nats in curve]
    for (a, low), (b, high) in zip(points, points[1:], strict=False):
        if a <= second <= b * (1 + 1e-9):
            return low + (high - low) * (second - a) / (b - a)
    return None


def error(values):
    values = torch.tensor(values, dtype=torch.float64)
    return float(values.std() / math.sqrt(len(values)))


def table(study, runs, step_s, budget, short):
    """One dict for each arm, everything that the note needs."""
    rows, first = [], next(iter(runs))
    for arm, line in runs.items():
        found = {
            "arm": arm,
            "estimate": "NLL" if line["causal"] else "bound",
            "params": line["params"],
            "rate": line["rate"],
            "published_rate": ARMS[arm].rate,
            "judged": line["judged"],
            "step_s": step_s[arm],
            "tok_per_s": study.args.batch_size * study.args.seq_len / step_s[arm],
            "seconds": study.args.steps * step_s[arm],
            "run_seconds": line["seconds"],
            "curve": line["curve"],
            "curve_at_budget": at_second(line["curve"], budget, step_s[arm]),
        }
        for when, one, other in (
            ("tokens", line, runs[first]),
            ("seconds", short[arm], short[first]),
        ):
            apart = [a - b for a, b in zip(one["windows"], other["windows"], strict=True)]
            found[f"equal_{when}"] = {
                "steps": one["steps"], "nats": one["nats"], "se": error(one["windows"]),
                "bits_per_byte": bits_per_byte(one["nats"], study.val.meta),
                "bits_per_byte_se": bits_per_byte(error(one["windows"]), study.val.meta),
                "to_the_first": sum(apart) / len(apart), "to_the_first_se": error(apart)}
        rows.append(found)
    return rows


def show(rows, study, budget):
    n = study.args.steps * study.args.batch_size * study.args.seq_len
    print(
        f"\n{n:,} tokens each, then {budget:.0f} s each; {len(study.held)} windows of "
        f"{study.args.seq_len}, {study.args.draws} "
        "draws; +- is a standard error over windows; the last columns of each half: nats more "
        f"than {rows[0]['arm']}, paired\n"
    )
    print(
        "| | | parameters | rate (published) | nats/token | bits/byte | to the first | seconds | "
        "tokens/s "
        f"| steps in {budget:.0f} s | nats/token | bits/byte | to the first | full run's curve "
        "there |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        halves = [
            f"{e['nats']:.4f} +- {e['se']:.4f} | {e['bits_per_byte']:.4f} +- "
            f"{e['bits_per_byte_se']:.4f} | "
            f"{e['to_the_first']:+.4f} +- {e['to_the_first_se']:.4f}"
            for e in (r["equal_tokens"], r["equal_seconds"])
        ]
        there = "-" if r["curve_at_budget"] is None else f"{r['curve_at_budget']:.4f}"
        print(
            f"| {r['arm']} | {r['estimate']} | {r['params']:,} | {r['rate']:g} "
            f"({r['published_rate']:g}) | {halves[0]} | "
            f"{r['seconds']:.0f} | {r['tok_per_s']:.0f} | {r['equal_seconds']['steps']} | "
            f"{halves[1]} | {there} |"
        )
    print(flush=True)


def draw_curves(path, rows, study):
    """Two panels, over tokens and over seconds; without matplotlib a line instead."""
    plt = plots.pyplot()
    if plt is None:
        return
    figure, panels = plt.subplots(1, 2, figsize=(14, 5.5), sharey=True)
    for at, r in enumerate(rows):
        colour = f"C{at % 10}"
        style = dict(
            marker="o",
            markersize=3,
            color=colour,
            linestyle="--" if r["estimate"] == "NLL" else "-",
        )
        nats = [nats for _, _, nats in r["curve"]]
        tokens_of_step = study.args.batch_size * study.args.seq_len
        panels[0].plot(
            [step * tokens_of_step for step, _, _ in r["curve"]], nats, label=r["arm"], **style
        )
        panels[1].plot([step * r["step_s"] for step, _, _ in r["curve"]], nats, **style)
        panels[1].plot(
            r["equal_seconds"]["steps"] * r["step_s"],
            r["equal_seconds"]["nats"],
            "*",
            markersize=11,
            color=colour,
        )
    panels[0].set(xlabel="training tokens", ylabel="held-out nats/token: bound, dashed: exact NLL")
    panels[1].set(xlabel="seconds of training (stars: a schedule of its own that ends there)")
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=8)
    plots.save(plt, figure, path)


def compare(args):
    """The whole study -> (rows of the table, budget in seconds)."""
    study = Study(args)
    runs = peers.collect([(arm, lambda arm=arm: {arm: trained(study, arm)}) for arm in args.only])
    step_s = measured(study, runs)
    budget = args.steps * min(step_s.values())
    short = {
        arm: within(study, arm, line, int(budget / step_s[arm] + 1e-6))
        for arm, line in runs.items()
    }
    rows = table(study, runs, step_s, budget, short)
    show(rows, study, budget)
    draw_curves(study.path.parent / "curves.png", rows, study)
    return rows, budget


def parser():
    p = arguments(__doc__)
    p.add_argument("--peers", default="peers", help="folder of the peers, see benchmarks/peers.py")
    p.add_argument("--data_dir", default="data/processed", help="prepared text")
    p.add_argument(
        "--out",
        default="logs/bound_peers",
        help="runs.jsonl and curves.png; the same command goes on there",
    )
    p.add_argument("--only", nargs="+", default=list(ARMS), choices=list(ARMS))
    for name, value, what in (
        ("steps", 500, "of the whole training"),
        ("judge", 150, "steps after which the rates are compared"),
        ("every", 50, "steps between points of the curve"),
        ("batch_size", 8, "sequences of a step"),
        ("seed", 1337, ""),
        ("d_model", 128, ""),
        ("n_layers", 4, ""),
        ("n_heads", 4, ""),
        ("d_ff", 512, "of the backup, whose size all get"),
        ("memory_slots", 8, ""),
        ("seq_len", 256, ""),
        ("curve_windows", 64, "held-out, of the curve"),
        ("windows", 320, "held-out, at the end"),
        ("draws", 2, "masks of each of them"),
        ("rounds", 30, "steps of the timing"),
        ("threads", 1, ""),
    ):
        p.add_argument(f"--{name}", type=int, default=value, help=f"{what} ({value})".strip())
    return p


def main():
    args = parser().parse_args()
    machine.start(args.threads)
    warnings.simplefilter("ignore")  # the peers' deprecated calls
    rows, budget = compare(args)
    print(
        json.dumps(
            {
                "rows": rows,
                "budget_s": budget,
                "settings": vars(args),
                "dtype": str(peer_models.DTYPE),
                **machine.environment(torch.device("cpu")),
            }
        )
    )


if __name__ == "__main__":
    main()
