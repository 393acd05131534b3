"""The runbook's acceptance: does a run work? Each criterion at steps 20, 100 and 500 with its
number, PASS or FAIL.

    python -m evaluate --check_run checkpoints/eco_hybrid_hi       # exit 0 only if every hard
        criterion passes, else 1
    lines = verdict.judge(log, folders, latest, samples)           # the same, a pure function of
        what was read

It says "it works", not "it is good": a model at step 500 is not fluent. Hard criteria decide the
exit code; soft ones (speed on a shared machine, the 20 % target) are told and do not. What a
shorter run has not reached is neither passed nor failed.
"""
import dataclasses
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import config
from common.console import UserError, printable
from common.files import read_lines, write_json
from evaluation import sample_quality

# of the four fixed prompts, seed 1337
SETTINGS = dict(max_new_tokens=80, steps=12, temperature=1.0, top_k=50)
SEED = 1337
MASK_RANGE, SLOW, SLOW_STEPS = (0.15, 0.9), 3.0, 2
# judged steps; standard errors allowed, and rounding
MASK_STEPS, MASK_ERRORS, MASK_SLACK = 20, 5.0, 0.003
TIMES = 400  # points of the grid over which an expected mask rate is averaged
DROP, TARGET = 0.90, 0.80                  # loss at 500 / loss at 1: needed, hoped for
LETTERS, DISTINCT, COMMONEST = 0.70, 0.25, 0.60
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


class Line(NamedTuple):
    step: int            # by which it has to hold
    name: str
    hard: bool
    ok: bool             # None: not reached
    number: str
    advice: str          # a key of ADVICE


def devanagari_or_latin(text):
    """Share of the letters that are; None without letters."""
    letters = [c for c in text if c.isalpha()]
    good = sum(
        c < "\u0250" or "\u0900" <= c <= "\u097f" or "\u1e00" <= c <= "\u1eff" for c in letters
    )
    return good / len(letters) if letters else None


def slope(points):
    """Of a straight line through (x, y), least squares."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def share(part, whole):
    return part / whole if whole else 0.0


def train_args(meta):
    """The settings in a "meta" event of train.jsonl; what an older log lacks has today's default.
    """
    saved = meta.get("config", {}).get("args", {})
    names = [f.name for f in dataclasses.fields(config.TrainArgs)]
    return config.TrainArgs(**{name: saved[name] for name in names if name in saved})


def expected_mask(args, event):
    """A step's mask metric by its settings alone -> (mean, standard error); None for an older log.

    It is worked out here and not with masking.py, which is what the criterion judges. The times
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
            masked_counts = [masked_of(args, size, (i + 0.5) / TIMES) for i in range(TIMES)]
            mean += times * statistics.fmean(masked_counts) / length
            variance += times * statistics.pvariance(masked_counts) / length ** 2
    return mean, math.sqrt(variance / event["global_batch"])


def masked_of(args, size, time):
    """How many of a block's tokens the settings hide at this time in (0, 1)."""
    if args.time_mode == "discrete":
        time = math.ceil(time * args.timesteps) / args.timesteps
    share_of_range = time if args.mask_schedule == "linear" else math.sin(time * math.pi / 2)
    rate = args.min_mask_rate + (args.most_hidden - args.min_mask_rate) * share_of_range
    return max(1, math.ceil(rate * size - 1e-9))


def mask_verdict(log, train):
    """Is as much hidden as the settings ask for? -> (True or False or None, what was found).

    A block of one token is hidden whole, and so is a row of an autoregressive run: their metric has
    to be 1. The first MASK_STEPS steps with longer blocks, wherever in the run they are, show
    whether the corruption works. Each of them has to lie in the runbook's range, or, where the
    settings lead outside of it, in a range around what they expect; and their mean has to be the
    expected one. None: the run has had no such step yet.
    """
    args, settings = train_args({}), {}
    for event in log:
        if event["event"] == "meta":
            args = train_args(event)
        elif event["event"] == "train":
            settings[event["step"]] = args
    single, longer = [], []
    for step, event in sorted(train.items()):
        if event.get("block") == 1 or settings[step].causal:
            single.append(event)
        else:
            longer.append(event)
    longer = longer[:MASK_STEPS]
    partly = sum(abs(event["mask"] - 1) > 1e-6 for event in single)
    alone = f"{len(single)} steps ask for every token, {partly} of them hid fewer"
    if not longer:
        if partly:
            return False, alone
        return (
            True if args.causal or args.block_rules == [1] else None
        ), f"{alone}; none has longer blocks yet"
    masks = [event["mask"] for event in longer]
    within, expected, errors = True, [], []
    least, most = MASK_RANGE
    for event in longer:
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
        least, most = min(least, low), max(most, high)
    told = (
        f"{min(masks):.2f} to {max(masks):.2f} in {len(longer)} steps with blocks of several "
        "tokens; "
        f"allowed {max(0.0, least):.2g} to {min(1.0, most):.2g}"
    )
    if len(expected) == len(longer):
        wanted, mean = statistics.fmean(expected), statistics.fmean(masks)
        margin = (
            MASK_ERRORS * math.sqrt(sum(error**2 for error in errors)) / len(longer) + MASK_SLACK
        )
        within = within and abs(mean - wanted) <= margin
        told += f"; mean {mean:.3f}, by the settings {wanted:.3f} +- {margin:.3f}"
    if single:
        told += f"; {alone}"
    return within and not partly, told


def judge(log, folders, latest, samples):
    """The events of train.jsonl, {step: is the checkpoint whole}, the step that `latest` names, the
    samples -> [Line].

    samples: [{"prompt", "text", "ids": new tokens, "special": how many of them are mask, pad or
    unk}], or None.
    """
    meta = (
        next((e for e in reversed(log) if e["event"] == "meta"), {})
        .get("config", {})
        .get("args", {})
    )
    # a step that was done again counts once
    train = {e["step"]: e for e in log if e["event"] == "train"}
    last = max(train, default=0)
    lines = []

    def add(step, name, hard, ok, number, advice):
        reached = last >= step
        undecided = ok is None or not reached
        lines.append(Line(step, name, hard, None if undecided else bool(ok),
                          number if reached else f"the run is at step {last}", advice))

    early = [e for s, e in train.items() if s <= 20]
    bad, skipped = (
        sum(e["loss"] is None for e in early),
        max((e["skipped"] for e in early), default=0),
    )
    add(20, "loss finite", True, not bad and not skipped,
        f"{len(early) - bad} of {len(early)} losses finite, {skipped} steps skipped", "finite")
    add(20, "mask metric in range", True, *mask_verdict(log, train), "mask")
    times = [e["step_ms"] for s, e in train.items() if 5 <= s <= 20] or [math.nan]
    typical = statistics.median(times)
    slow = sum(t > SLOW * typical for t in times)
    add(
        20,
        "throughput stable",
        False,
        slow <= SLOW_STEPS,
        f"steps 5-20: median {typical:.0f} ms, {slow} slower than {SLOW:g} x that; allowed "
        f"{SLOW_STEPS}",
        "speed",
    )

    curve = [(s, e["loss"]) for s, e in sorted(train.items()) if e["loss"] is not None]
    trend = slope(curve[:n]) if (n := sum(s <= 100 for s, _ in curve)) > 1 else math.nan
    add(
        100,
        "loss falls",
        True,
        trend < 0,
        f"slope {100 * trend:+.3f} per 100 steps, over {n} losses",
        "flat",
    )
    every = meta.get("save_interval") or 500
    due = (
        latest
        if meta.get("keep_last") or not meta.get("save_interval", 1)
        else min(-(-100 // every) * every, last)
    )
    missing = [
        f"step_{s:06d} is {'damaged' if s in folders else 'missing'}"
        for s in sorted({due, latest} - {None})
        if not folders.get(s)
    ] + ["there is no latest"] * (latest is None)
    add(100, "checkpoint files", True, not missing,
        ", ".join(missing) or f"step_{due:06d} and latest (step_{latest:06d}) are whole", "files")

    until = [(s, loss) for s, loss in curve if s <= 500]
    end = statistics.fmean([loss for _, loss in until[-5:]]) if until else math.nan
    ratio = end / until[0][1] if until and until[0][0] == 1 else math.nan
    fall = f"{until[0][1] if until else math.nan:.3f} at step 1, {end:.3f} at the end, {100 * (1 - ratio):.1f} % lower"
    add(500, "loss down by 10 %", True, ratio <= DROP, fall, "flat")
    add(500, "loss down by 20 %, the target", False, ratio <= TARGET, fall, "flat")
    samples = samples or []
    special, broken = (
        sum(s["special"] for s in samples),
        sum(s["text"].count("\ufffd") for s in samples),
    )
    add(
        500,
        "text is valid",
        True,
        samples and not special and not broken,
        f"{len(samples)} texts; {special} mask, pad or unknown tokens, {broken} broken characters",
        "text",
    )
    letters = devanagari_or_latin("".join(s["text"] for s in samples))
    add(
        500,
        "script",
        True,
        letters is not None and letters >= LETTERS,
        f"{100 * (letters or 0):.0f} % of the letters are Devanagari or Latin; needed "
        f"{100 * LETTERS:.0f} %",
        "text",
    )
    distinct = [share(len(set(s["ids"])), len(s["ids"])) for s in samples] or [0.0]
    add(
        500,
        "no text repeats itself",
        True,
        min(distinct) >= DISTINCT,
        f"distinct tokens {', '.join(f'{100 * d:.0f} %' for d in distinct)}; needed "
        f"{100 * DISTINCT:.0f} %",
        "text",
    )
    pool = Counter(t for s in samples for t in s["ids"])
    common = share(sum(n for _, n in pool.most_common(5)), pool.total()) if pool else 1.0
    add(500, "no few tokens everywhere", True, common <= COMMONEST,
        f"the 5 commonest tokens are {100 * common:.0f} %; allowed {100 * COMMONEST:.0f} %", "text")
    twins = len(samples) - len({tuple(s["ids"]) for s in samples})
    add(
        500,
        "no two texts equal",
        True,
        samples and not twins,
        f"{twins} of {len(samples)} texts repeat another",
        "text",
    )
    return lines


def read_log(path):
    """The events of a train.jsonl."""
    return [e for e in read_lines(path) if "event" in e]


def write_samples(path, device):
    """The runbook's prompts continued by this checkpoint, with its settings and seed."""
    import checkpoint
    from sampling.decode import generate
    from sampling.settings import Settings
    model, tokenizer, saved = checkpoint.load_model(path, device, config.check_saved)
    never = {model.cfg.mask_id, tokenizer.pad_id, tokenizer.unk_id}
    samples = []
    settings = Settings(**SETTINGS, eos_id=tokenizer.eos_id)
    for prompt in config.PROMPTS:
        out = generate(model, [tokenizer.bos_id, *tokenizer.encode(prompt)], settings, [SEED])
        [ids] = out.rows
        samples.append(
            {
                "prompt": prompt,
                "text": tokenizer.written(ids),
                "ids": ids,
                "special": sum(t in never for t in ids),
            }
        )
    return samples, saved.step


def table(lines):
    words = {True: "PASS", False: "FAIL", None: "not reached"}
    width = max(len(line.name) for line in lines)
    yield f"by step  {'criterion':{width}}  {'verdict':11}        number"
    for line in lines:
        yield f"{line.step:>7}  {line.name:{width}}  {words[line.ok]:11}  {'hard' if line.hard else 'soft'}  {line.number}"
    hard = [line.ok for line in lines if line.hard]
    word = words[False if False in hard else None if None in hard else True]
    yield f"verdict: {word} ({hard.count(True)} of {len(hard)} hard criteria pass)"
    for key in dict.fromkeys(line.advice for line in lines if line.ok is False):
        yield f"advice: {ADVICE[key]}"


def check(path, args, show_texts=True):
    """Read, sample, judge and print a run; writes <run>/verdict.json, or args.out_json -> the
    lines.
    """
    import checkpoint
    from common import machine

    run = (
        Path(path)
        if (Path(path) / "train.jsonl").is_file()
        else checkpoint.candidates(path)[0].parent
    )
    if not (run / "train.jsonl").is_file():
        raise UserError(
            f"{run} has no train.jsonl to judge: name the run folder, such as "
            "checkpoints/eco_hybrid_hi"
        )
    samples, step, folders, latest = None, None, {}, checkpoint.read_pointer(run, "latest")[0]
    if checkpoint.is_run(run):
        samples, step = write_samples(path, machine.pick_device(args.device))
        for number, folder in checkpoint.list_steps(run).items():
            try:
                folders[number] = bool(checkpoint.verify(folder))
            except checkpoint.Damage:
                folders[number] = False
    for sample in samples if show_texts and samples else ():
        print(f"{sample['prompt']}{printable(sample['text'])}\n---", flush=True)
    lines = judge(read_log(run / "train.jsonl"), folders, latest, samples)
    print("\n".join(table(lines)), flush=True)
    rows = [s["ids"] for s in samples or []]
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
            "samples": [
                {key: sample[key] for key in ("prompt", "text")} for sample in samples or []
            ],
        },
    )
    return lines


def passed(lines):
    """Every hard criterion passes; False as soon as one fails; None: some are not reached yet."""
    hard = [line.ok for line in lines if line.hard]
    return False if False in hard else None if None in hard else True
