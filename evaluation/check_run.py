"""The runbook's acceptance: does a run work? Each criterion at steps 20, 100 and 500 with its
number, PASS or FAIL.

    python -m evaluate --check_run checkpoints/eco_hybrid_hi       # exit 0 only if every hard
                                                                   # criterion passes, else 1
    lines = verdict(log, folders, latest, samples)                 # the same, a pure function of
                                                                   # what was read

It says "it works", not "it is good": a model at step 500 is not fluent. Hard criteria decide the
exit code; soft ones (speed on a shared machine, the 20 % target) are told and do not. What a
shorter run has not reached is neither passed nor failed. CRITERIA lists all of them, each with the
function that decides it.
"""
import math
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import checkpoint
import config
from common import machine
from common.console import UserError, printable
from common.files import write_json
from common.flags import checked
from evaluation import sample_quality
from evaluation.run_report import read_log
from sampling.decode import generate
from sampling.settings import Settings, opening
from sampling.torch_model import writer_of

# the samples: of the four fixed prompts, with this seed
SETTINGS = dict(max_new_tokens=80, steps=12, temperature=1.0, top_k=50)
SEED = 1337

# the mask metric
MASK_RANGE = (0.15, 0.9)
MASK_STEPS = 20             # so many steps with blocks of several tokens are looked at
MASK_ERRORS = 5.0           # standard errors that are allowed,
MASK_SLACK = 0.003          # and rounding
TIMES = 400                 # points of the grid over which an expected mask rate is averaged

# speed: a step is slow that takes so many times the median; so many may be slow
SLOW = 3.0
SLOW_STEPS = 2

# loss at 500 / loss at 1: needed, hoped for
DROP = 0.90
TARGET = 0.80

# text: share of Devanagari and Latin letters, of distinct tokens, of the 5 commonest tokens
LETTERS = 0.70
DISTINCT = 0.25
COMMONEST = 0.60

ADVICE = {
    "finite": "loss not finite: halve --lr (--lr 2e-4 or less), or --no_amp",
    "mask": "mask out of range: more sequences per step (--grad_accum), --min_mask_rate and "
            "--max_mask_rate at their defaults",
    "speed": "uneven speed: something else ran here, or --compile was still compiling: see step_ms "
             "in train.jsonl",
    "flat": "loss not falling: look whether meta.json of --data_dir exists with train_tokens > 0; "
            "judge after 500-1000 steps; "
    "then --lr 2e-4",
    "files": "checkpoint missing or damaged: look for room on the disk, then the same command "
             "again (it resumes)",
    "text": "poor text: sample with --steps 16, --temperature 0.8, --top_k 30 to 80; then train "
            "2000-5000 steps",
}
WORDS = {True: "PASS", False: "FAIL", None: "not reached"}


class Evidence(NamedTuple):
    """What was read of a run; the criteria look at nothing else."""
    log: list           # the events of train.jsonl
    args: dict          # the saved settings of the last session
    train: dict         # step -> its "train" event; a step that was done again counts once
    curve: list         # [(step, loss)] of the steps with a finite loss
    folders: dict       # step -> is its checkpoint whole
    latest: int         # the step that `latest` names, or None
    samples: list       # [{"prompt", "text", "ids", "special"}]

    @property
    def last(self):
        return max(self.train, default=0)

    @property
    def early(self):
        return [event for step, event in self.train.items() if step <= 20]


class Line(NamedTuple):
    """One criterion and its outcome."""
    step: int            # by which it has to hold
    name: str
    hard: bool
    ok: bool             # None: not reached
    number: str
    advice: str          # a key of ADVICE


def share(part, whole):
    return part / whole if whole else 0.0


# ---- step 20 -------------------------------------------------------------------------------------

def loss_finite(evidence):
    early = evidence.early
    bad = sum(event["loss"] is None for event in early)
    skipped = max((event["skipped"] for event in early), default=0)
    told = f"{len(early) - bad} of {len(early)} losses finite, {skipped} steps skipped"
    return not bad and not skipped, told


def mask_in_range(evidence):
    """Is as much hidden as the settings ask for?

    Left to right every token is asked for: the metric has to be 1. The first MASK_STEPS steps with
    blocks, wherever in the run they are, show whether the corruption works
    (masks_of_longer_blocks).
    """
    args = train_args({})
    settings = {}
    for event in evidence.log:
        if event["event"] == "meta":
            args = train_args(event)
        elif event["event"] == "train":
            settings[event["step"]] = args
    single, longer = [], []
    for _, event in sorted(evidence.train.items()):
        if event.get("block") == 1:
            single.append(event)
        else:
            longer.append(event)

    partly = sum(abs(event["mask"] - 1) > 1e-6 for event in single)
    alone = f"{len(single)} steps ask for every token, {partly} of them hid fewer"
    if longer:
        within, told = masks_of_longer_blocks(longer[:MASK_STEPS], settings)
        if single:
            told += f"; {alone}"
        return within and not partly, told
    if partly:
        return False, alone
    only_single = args.block_rules == [1]
    return (True if only_single else None), f"{alone}; none has longer blocks yet"


def masks_of_longer_blocks(events, settings):
    """Each step has to lie in the runbook's range, or, where the settings lead outside of it, in a
    range around what they expect; and the mean of the steps has to be the expected one.
    """
    masks = [event["mask"] for event in events]
    within = True
    expected, errors = [], []
    least, most = MASK_RANGE
    for event in events:
        low, high = MASK_RANGE
        found = expected_mask(settings[event["step"]], event)
        if found:
            mean, error = found
            expected.append(mean)
            errors.append(error)
            margin = MASK_ERRORS * error + MASK_SLACK
            if mean - margin < low or mean + margin > high:
                low, high = mean - margin, mean + margin
        within = within and low <= event["mask"] <= high
        least = min(least, low)
        most = max(most, high)
    told = (
        f"{min(masks):.2f} to {max(masks):.2f} in {len(events)} steps with blocks of several "
        f"tokens; allowed {max(0.0, least):.2g} to {min(1.0, most):.2g}"
    )

    # an older log does not say enough to expect a mean
    if len(expected) == len(events):
        wanted = statistics.fmean(expected)
        mean = statistics.fmean(masks)
        error_of_mean = math.sqrt(sum(error**2 for error in errors)) / len(events)
        margin = MASK_ERRORS * error_of_mean + MASK_SLACK
        within = within and abs(mean - wanted) <= margin
        told += f"; mean {mean:.3f}, by the settings {wanted:.3f} +- {margin:.3f}"
    return within, told


def train_args(meta):
    """The settings in a "meta" event of train.jsonl; what an older log lacks has today's default.
    """
    saved = meta.get("config", {}).get("args", {})
    return config.TrainArgs(**checked(config.TrainArgs, saved, "the settings in train.jsonl"))


def expected_mask(args, event):
    """A step's mask metric by its settings alone -> (mean, standard error); None for an older log.

    It is worked out here and not with masking.py, which is what the criterion checks. The times
    count as independent, which is an upper limit: stratified ones scatter less.
    """
    if not {"block", "seq_len", "global_batch"} <= event.keys():
        return None
    length = event["seq_len"]
    block = min(event["block"], length)
    first = min(event.get("first") or block, block)
    whole, rest = divmod(length - first, block)
    blocks = Counter({block: whole})
    blocks[first] += 1
    blocks[rest] += 1
    mean = variance = 0.0
    for size, times in blocks.items():
        if size and times:
            masked = [masked_count(args, size, (i + 0.5) / TIMES) for i in range(TIMES)]
            mean += times * statistics.fmean(masked) / length
            variance += times * statistics.pvariance(masked) / length ** 2
    return mean, math.sqrt(variance / event["global_batch"])


def masked_count(args, size, time):
    """How many of a block's tokens the settings hide at this time in (0, 1)."""
    if args.time_mode == "discrete":
        time = math.ceil(time * args.timesteps) / args.timesteps
    if args.mask_schedule == "linear":
        share_of_range = time
    else:
        share_of_range = math.sin(time * math.pi / 2)
    rate = args.min_mask_rate + (args.max_mask_rate - args.min_mask_rate) * share_of_range
    return max(1, math.ceil(rate * size - 1e-9))


def throughput_stable(evidence):
    times = [event["step_ms"] for step, event in evidence.train.items() if 5 <= step <= 20]
    typical = statistics.median(times or [math.nan])
    slow = sum(time > SLOW * typical for time in times)
    told = (
        f"steps 5-20: median {typical:.0f} ms, {slow} slower than {SLOW:g} x that; allowed "
        f"{SLOW_STEPS}"
    )
    return slow <= SLOW_STEPS, told


# ---- step 100 ------------------------------------------------------------------------------------

def loss_falls(evidence):
    """The slope of a straight line through the losses, least squares."""
    points = [(step, loss) for step, loss in evidence.curve if step <= 100]
    slope = math.nan
    if len(points) > 1:
        slope = statistics.linear_regression(*zip(*points, strict=True)).slope
    return slope < 0, f"slope {100 * slope:+.3f} per 100 steps, over {len(points)} losses"


def checkpoint_files(evidence):
    """The checkpoint that was due by step 100, and the latest."""
    args, latest = evidence.args, evidence.latest
    if args.get("keep_last") or not args.get("save_interval", 1):
        due = latest            # an older one may be gone
    else:
        every = args.get("save_interval") or 500
        due = min(-(-100 // every) * every, evidence.last)

    missing = []
    for step in sorted({due, latest} - {None}):
        if step not in evidence.folders:
            missing.append(f"step_{step:06d} is missing")
        elif not evidence.folders[step]:
            missing.append(f"step_{step:06d} is damaged")
    if latest is None:
        missing.append("there is no latest")
    if missing:
        return False, ", ".join(missing)
    return True, f"step_{due:06d} and latest (step_{latest:06d}) are whole"


# ---- step 500 ------------------------------------------------------------------------------------

def loss_down(evidence, allowed):
    """The mean of the last five losses against the loss at step 1."""
    until = [(step, loss) for step, loss in evidence.curve if step <= 500]
    start = end = ratio = math.nan
    if until:
        first, start = until[0]
        end = statistics.fmean([loss for _, loss in until[-5:]])
        if first == 1:
            ratio = end / start
    told = f"{start:.3f} at step 1, {end:.3f} at the end, {100 * (1 - ratio):.1f} % lower"
    return ratio <= allowed, told


def loss_down_as_needed(evidence):
    return loss_down(evidence, DROP)


def loss_down_as_hoped(evidence):
    return loss_down(evidence, TARGET)


def text_valid(evidence):
    samples = evidence.samples
    special = sum(sample["special"] for sample in samples)
    broken = sum(sample["text"].count("\ufffd") for sample in samples)
    told = (
        f"{len(samples)} texts; {special} mask, pad or unknown tokens, {broken} broken characters"
    )
    return bool(samples) and not special and not broken, told


def right_script(evidence):
    text = "".join(sample["text"] for sample in evidence.samples)
    letters = [letter for letter in text if letter.isalpha()]
    found = share(sum(map(devanagari_or_latin, letters)), len(letters))
    told = (
        f"{100 * found:.0f} % of the letters are Devanagari or Latin; needed {100 * LETTERS:.0f} %"
    )
    return found >= LETTERS, told


def devanagari_or_latin(letter):
    return letter < "\u0250" or "\u0900" <= letter <= "\u097f" or "\u1e00" <= letter <= "\u1eff"


def no_repetition(evidence):
    distinct = [share(len(set(s["ids"])), len(s["ids"])) for s in evidence.samples] or [0.0]
    each = ", ".join(f"{100 * part:.0f} %" for part in distinct)
    return min(distinct) >= DISTINCT, f"distinct tokens {each}; needed {100 * DISTINCT:.0f} %"


def no_common_tokens(evidence):
    pool = Counter()
    for sample in evidence.samples:
        pool.update(sample["ids"])
    common = 1.0
    if pool:
        common = sum(count for _, count in pool.most_common(5)) / pool.total()
    told = f"the 5 commonest tokens are {100 * common:.0f} %; allowed {100 * COMMONEST:.0f} %"
    return common <= COMMONEST, told


def no_equal_texts(evidence):
    samples = evidence.samples
    twins = len(samples) - len({tuple(sample["ids"]) for sample in samples})
    return bool(samples) and not twins, f"{twins} of {len(samples)} texts repeat another"


# ---- the verdict ---------------------------------------------------------------------------------

class Criterion(NamedTuple):
    step: int            # by which it has to hold
    name: str
    hard: bool
    rule: Callable       # Evidence -> (ok or None if it cannot be said yet, the number in words)
    advice: str          # a key of ADVICE


CRITERIA = (
    Criterion(20, "loss finite", True, loss_finite, "finite"),
    Criterion(20, "mask metric in range", True, mask_in_range, "mask"),
    Criterion(20, "throughput stable", False, throughput_stable, "speed"),
    Criterion(100, "loss falls", True, loss_falls, "flat"),
    Criterion(100, "checkpoint files", True, checkpoint_files, "files"),
    Criterion(500, "loss down by 10 %", True, loss_down_as_needed, "flat"),
    Criterion(500, "loss down by 20 %, the target", False, loss_down_as_hoped, "flat"),
    Criterion(500, "text is valid", True, text_valid, "text"),
    Criterion(500, "script", True, right_script, "text"),
    Criterion(500, "no text repeats itself", True, no_repetition, "text"),
    Criterion(500, "no few tokens everywhere", True, no_common_tokens, "text"),
    Criterion(500, "no two texts equal", True, no_equal_texts, "text"),
)


def verdict(log, folders, latest, samples):
    """The events of train.jsonl, {step: is the checkpoint whole}, the step that `latest` names, the
    samples -> [Line].

    samples: [{"prompt", "text", "ids": new tokens, "special": how many of them are mask, pad or
    unk}], or None.
    """
    train = {}
    meta = {}
    for event in log:
        if event["event"] == "train":
            train[event["step"]] = event
        elif event["event"] == "meta":
            meta = event
    curve = []
    for step, event in sorted(train.items()):
        if event["loss"] is not None:
            curve.append((step, event["loss"]))
    args = meta.get("config", {}).get("args", {})
    evidence = Evidence(log, args, train, curve, folders, latest, samples or [])

    lines = []
    for criterion in CRITERIA:
        ok, number = None, f"the run is at step {evidence.last}"
        if evidence.last >= criterion.step:
            ok, number = criterion.rule(evidence)
        lines.append(
            Line(criterion.step, criterion.name, criterion.hard, ok, number, criterion.advice)
        )
    return lines


def passed(lines):
    """Every hard criterion passes; False as soon as one fails; None: some are not reached yet."""
    hard = [line.ok for line in lines if line.hard]
    if False in hard:
        return False
    return None if None in hard else True


def table(lines):
    width = max(len(line.name) for line in lines)
    yield f"by step  {'criterion':{width}}  {'verdict':11}        number"
    for line in lines:
        kind = "hard" if line.hard else "soft"
        yield f"{line.step:>7}  {line.name:{width}}  {WORDS[line.ok]:11}  {kind}  {line.number}"
    hard = [line.ok for line in lines if line.hard]
    word = WORDS[passed(lines)]
    yield f"verdict: {word} ({hard.count(True)} of {len(hard)} hard criteria pass)"
    for advice in dict.fromkeys(line.advice for line in lines if line.ok is False):
        yield f"advice: {ADVICE[advice]}"


# ---- reading a run -------------------------------------------------------------------------------

def write_samples(path, device):
    """The runbook's prompts continued by this checkpoint, with its settings and seed -> (samples,
    the checkpoint's step).
    """
    model, tokenizer, saved = checkpoint.load_model(path, device, config.check_saved)
    never = {model.cfg.mask_id, tokenizer.pad_id, tokenizer.unk_id}
    settings = Settings(**SETTINGS, eos_id=tokenizer.eos_id)
    writer = writer_of(model)
    samples = []
    for prompt in config.PROMPTS:
        ids = opening(tokenizer, prompt, model.cfg.framed)
        out = generate(writer, ids, settings, [SEED])
        [ids] = out.rows
        samples.append(
            {
                "prompt": prompt,
                "text": tokenizer.written(ids),
                "ids": ids,
                "special": sum(token in never for token in ids),
            }
        )
    return samples, saved.step


def whole_checkpoints(run):
    """{step: is its checkpoint whole}."""
    folders = {}
    for step, folder in checkpoint.list_steps(run).items():
        try:
            folders[step] = bool(checkpoint.verify(folder))
        except checkpoint.Damage:
            folders[step] = False
    return folders


def check(path, args, show_texts=True):
    """Read, sample, check and print a run; writes <run>/verdict.json, or args.out_json -> the
    lines.
    """
    run = Path(path)
    if not (run / "train.jsonl").is_file():
        run = checkpoint.candidates(path)[0].parent
    if not (run / "train.jsonl").is_file():
        raise UserError(
            f"{run} has no train.jsonl to judge: name the run folder, such as "
            "checkpoints/eco_hybrid_hi"
        )
    latest = checkpoint.read_pointer(run, "latest")[0]
    samples, step, folders = [], None, {}
    if checkpoint.is_run(run):
        samples, step = write_samples(path, machine.pick_device(args.device))
        folders = whole_checkpoints(run)
    if show_texts:
        for sample in samples:
            print(f"{sample['prompt']}{printable(sample['text'])}\n---", flush=True)

    lines = verdict(read_log(run / "train.jsonl"), folders, latest, samples)
    print("\n".join(table(lines)), flush=True)
    rows = [sample["ids"] for sample in samples]
    write_json(
        args.out_json or run / "verdict.json",
        {
            "version": 1,
            "run": str(run),
            "step": step,
            "passed": passed(lines),
            "criteria": [line._asdict() for line in lines],
            "settings": {**SETTINGS, "seed": SEED},
            "distinct_2": sample_quality.distinct(rows, 2),
            "repeat_rate": sample_quality.repeat_rate(rows),
            "samples": [{"prompt": s["prompt"], "text": s["text"]} for s in samples],
        },
    )
    return lines
