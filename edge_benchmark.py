"""How fast is each decode mode, and what does the speed cost: full, block and block_frozen on the
same prompts.

    python -m edge_benchmark --ckpt checkpoints/eco_hybrid_hi --runs_per_prompt 3
    python -m edge_benchmark --ckpt checkpoints/eco_hybrid_hi --modes block_frozen \\
        --grid steps=4,8,16,32 precision=fp32,bf16,int8
    python -m edge_benchmark --ckpt checkpoints/eco_hybrid_hi --profiles balanced max

--profiles measures what sample's profiles cost and give here. --grid takes every combination of the
named settings of sample, in every mode, and draws quality against speed. One line per variant for
people; the last line on stdout, and benchmarks/edge_benchmark.json, hold everything. Notable:
* the timed runs of all modes alternate, so that a slow minute of the machine hits each of them
  alike;
* a run is timed from the prompt's text to the new ids; only new tokens before EOS count;
* quality stands beside speed: nll_per_token is the checkpoint's own -log p of what the mode wrote,
  each token scored while it is hidden, left to right over the frozen text before it (the block rule
  with blocks of one token: a chain rule, no bound). judge is -log p under an n-gram model of the
  training text, which no network can flatter. A low value is no proof of good text, as repetition
  scores well too: read both together with distinct_2 and repeat_rate;
* held_out is the held-out bound of the same weights in the same precision under the mode's block
  rule, so what int8 costs stands beside what it gives; cpu_s_per_token, processor seconds, stands
  in for energy;
* peak_rss_mb is taken in an extra untimed run per mode, after memory that is only kept was given
  back.
"""
import contextlib
import ctypes
import dataclasses
import itertools
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import cli
import config
import model_config
from common.console import UserError, say
from common.files import can_write, json_text, write_json
from common.flags import convert, split_list, to_dict
from evaluation import plots
from sampling import settings

HELD_OUT_ROWS = 64
CAREFUL = " at one token a forward"
LIMIT = 0.05              # of judged quality, that a profile may cost


def peak_rss(run, device):
    """Peak memory in MB while run() works: resident memory where Linux lets us reset its record,
    else of the process.
    """
    import torch

    from common import machine
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")              # VmHWM starts again from here
    run()
    if device.type != "cuda":
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text().split("\n")
            return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    return machine.peak_memory_mb(device)


def agreement(row, reference):
    """Share of positions with the same token; a missing one differs."""
    longest = max(len(row), len(reference))
    return sum(a == b for a, b in zip(row, reference, strict=False)) / longest if longest else 1.0


def measure(tokenizer, prompts, variants, reference, args, frozen, device):
    """variants {name: (model, Settings)} -> {name: its figures}; reference: the variant whose text
    the others are compared with.
    """
    from evaluation.estimators import left_to_right
    from evaluation.sample_quality import distinct, repeat_rate

    contexts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    reference_rows = []
    for prompt in prompts:
        result, _, _ = timed(reference, prompt, tokenizer, args.seed)
        reference_rows.append(result.rows[0])
    longest = max(prompts, key=lambda prompt: len(tokenizer.encode(prompt)))
    memory = {}
    for name, variant in variants.items():
        def write_longest(variant=variant):
            return timed(variant, longest, tokenizer, args.seed)
        memory[name] = peak_rss(write_longest, device)

    figures = {}
    runs = take_turns(tokenizer, prompts, variants, args)
    for name, run in runs.items():
        rows = [result.rows[0] for result in run.results]
        count = sum(map(len, rows))
        ordered = sorted(run.seconds)
        nll = 0
        for context, row in zip(contexts, rows, strict=True):
            nll += left_to_right(reference[0], context, row, frozen)
        forwards = statistics.mean(result.forwards for result in run.results)
        figures[name] = {
            "mode": variants[name][1].mode,
            "runs": len(ordered),
            "warmup_runs": args.warmup_runs * len(prompts),
            "mean_latency_s": statistics.mean(run.seconds),
            "p50_latency_s": statistics.median(run.seconds),
            "p90_latency_s": ordered[math.ceil(0.9 * len(ordered)) - 1],
            "mean_tok_s": run.tokens / sum(run.seconds),
            "mean_generated_tokens": count / len(rows),
            "mean_forwards": forwards,
            "mean_layer_passes": statistics.mean(r.layer_passes for r in run.results),
            "tokens_per_forward": count / len(rows) / forwards if forwards else 0.0,
            "mean_context_passes": statistics.mean(r.context_passes for r in run.results),
            "cpu_s_per_token": run.cpu_seconds / run.tokens if run.tokens else None,
            "cache_bytes": max(r.cache_bytes for r in run.results),
            "peak_rss_mb": memory[name],
            "nll_per_token": nll / count if count else None,
            "distinct_2": distinct(rows, 2),
            "repeat_rate": repeat_rate(rows),
            "agree_with_full": statistics.mean(map(agreement, rows, reference_rows)),
            "texts": [tokenizer.written(row) for row in rows],
        }
    return figures


def timed(variant, prompt, tokenizer, seed):
    """Write one text, from the prompt's text to new ids -> (Result, seconds, processor seconds).
    """
    from sampling import decode
    model, asked = variant
    started = time.perf_counter()
    cpu_started = time.process_time()
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    result = decode.generate(model, ids, asked, [seed])
    # it ends with a copy to the CPU
    return result, time.perf_counter() - started, time.process_time() - cpu_started


@dataclass
class Runs:
    """What the timed runs of one variant took and gave."""
    results: list = field(default_factory=list)     # one Result per prompt
    seconds: list = field(default_factory=list)     # of every timed run
    cpu_seconds: float = 0.0
    tokens: int = 0


def take_turns(tokenizer, prompts, variants, args):
    """Every prompt as often as asked for, the variants by turns -> {name: Runs}."""
    runs = {name: Runs() for name in variants}
    for index, prompt in enumerate(prompts):
        for number in range(-args.warmup_runs, args.runs_per_prompt):
            for name, variant in variants.items():
                result, seconds, cpu_seconds = timed(variant, prompt, tokenizer, args.seed)
                run = runs[name]
                if len(run.results) == index:
                    run.results.append(result)
                before = run.results[index]
                if before.rows != result.rows or before.forwards != result.forwards:
                    print(f"warning: {name} gave another text with the same seed", file=sys.stderr)
                if number >= 0:
                    run.seconds.append(seconds)
                    run.cpu_seconds += cpu_seconds
                    run.tokens += len(result.rows[0])
    return runs


def show(value, form):
    return "-" if value is None else format(value, form)


def card(name, r, width):
    if "skipped" in r:
        return f"{name:{width}} skipped: {r['skipped']}"
    return (
        f"{name:{width}} {r['mean_tok_s']:8.1f} tok/s | p50 {r['p50_latency_s']:.3f} s | p90 "
        f"{r['p90_latency_s']:.3f} s | "
        f"{r['mean_generated_tokens']:.1f} tokens | {r['tokens_per_forward']:.2f} per forward | "
        f"{r['peak_rss_mb']:.0f} MB | "
        f"judge {show(r['judge_nats'], '.3f')} | nll {show(r['nll_per_token'], '.3f')} | held out "
        f"{show(r['held_out_nats'], '.4f')} | distinct_2 {show(r['distinct_2'], '.3f')} | repeat "
        f"{r['repeat_rate']:.1%} | "
        f"as full {r['agree_with_full']:.0%}"
    )


class Judges:
    """What stands beside speed and needs the prepared text: the n-gram judge and the held-out
    bound, each made once.
    """

    def __init__(self, data_dir, tokenizer, saved, device):
        from evaluation.ngram import NGram
        from text.dataset import TokenData
        self.args, self.device, self.ngram, self.known = saved.config["args"], device, None, {}
        try:
            train, self.val = TokenData(data_dir, "train"), TokenData(data_dir, "val")
            if train.meta["tokenizer_sha256"] != tokenizer.sha256:
                raise UserError(f"{data_dir} was made with another tokenizer than the checkpoint")
        except UserError as error:
            print(
                f"notice: no judge and no held-out bound: {str(error).partition(';')[0]}",
                file=sys.stderr,
            )
            return
        self.ngram = NGram(train.tokens, train.vocab_size)
        self.rows = self.val.val_windows(HELD_OUT_ROWS, self.args["seq_len"]).to(device)

    def real(self):
        """The judge's value of held-out text: what a perfect writer scores."""
        return None if self.ngram is None else self.ngram.nats(self.rows.tolist())

    def held_out(self, model, precision, block):
        if self.ngram is None:
            return None
        from evaluation.estimators import held_out
        key = precision, min(block, self.rows.shape[1])
        if key not in self.known:
            self.known[key] = held_out(model, self.rows, [key[1]], 0, 16, 1)[key[1]]["nats"]
        return self.known[key]


def combinations(grid):
    """--grid steps=4,8 sampler=random -> {"steps=4 sampler=random": {"steps": 4, "sampler":
    "random"}, ...}
    """
    fields = {f.name: f for f in dataclasses.fields(config.GenerateFlags)}
    axes = []
    for axis in grid:
        name, _, values = axis.partition("=")
        if name not in fields or not values:
            raise UserError(
                f"--grid {axis}: write NAME=VALUE,VALUE with a setting of sample such as steps, "
                "sampler, threshold, "
                "block_size, precision, min_decode_layers"
            )
        try:
            axes.append([(name, convert(fields[name], value)) for value in split_list(values)])
        except ValueError as error:
            raise UserError(f"--grid {axis}: {error}") from None
    found = [dict(pairs) for pairs in itertools.product(*axes)]
    return {" ".join(f"{k}={v}" for k, v in chosen.items()): chosen for chosen in found}


def profiles(names):
    """Each profile of sample, and beside it the slow and careful way: one token a forward, all
    layers, no 8-bit products.
    """
    known, found = {f.name for f in dataclasses.fields(config.GenerateFlags)}, {}
    for name in names:
        found[name] = {k: v for k, v in config.SAMPLE_PROFILES[name].items() if k in known}
        found[name + CAREFUL] = found[name] | dict(
            sampler="confidence", steps=config.SURE["steps"], min_decode_layers=0, precision="auto"
        )
    return found


def price(name, results):
    """What a profile costs and gives, against the careful way -> its figures, told on stderr."""
    fast, slow = (
        next(r for key, r in results.items() if key.endswith(end))
        for end in (" " + name, " " + name + CAREFUL)
    )
    # no judge, or a text that ended at once
    if "skipped" in fast or None in (fast["judge_nats"], slow["judge_nats"]):
        return None
    found = {
        "judged": fast["judge_nats"] / slow["judge_nats"] - 1,
        "faster": fast["mean_tok_s"] / slow["mean_tok_s"],
    }
    say(
        f"profile {name}: {found['judged']:+.1%} judged nats/token (limit +{LIMIT:.0%}), repeated "
        "4-grams "
        f"{fast['repeat_rate']:.1%} against {slow['repeat_rate']:.1%}, "
        f"{fast['tokens_per_forward']:.2f} tokens per forward, "
        f"{found['faster']:.2f}x as fast: "
        + ("justified" if found["judged"] <= LIMIT else "NOT justified for this checkpoint")
    )
    return found


def lines_of(results):
    """{"block_frozen sampler=margin steps=4": figures} -> (axis, {"block_frozen margin": [(value,
    tokens/s, nats)]}).

    A line joins what differs in one setting only: of the settings that are numbers, the one with
    the most values.
    """
    found = []
    for name, r in results.items():
        if r.get("judge_nats") is not None:
            mode, *pairs = name.split(" ")
            found.append(
                (mode, dict(pair.split("=", 1) for pair in pairs), r["mean_tok_s"], r["judge_nats"])
            )
    values = {}
    for _, chosen, _, _ in found:
        for key, value in chosen.items():
            values.setdefault(key, set()).add(value)
    numbers = [
        key for key, several in values.items() if len(several) > 1 and all(map(is_number, several))
    ]
    axis = max(numbers, key=lambda key: len(values[key]), default=None)
    modes, lines = {mode for mode, *_ in found}, {}
    for mode, chosen, speed, nats in found:
        words = [mode] if len(modes) > 1 else []
        for key, value in chosen.items():
            if key != axis and len(values[key]) > 1:
                words.append(f"{key} {value}" if is_number(value) else value)
        lines.setdefault(" ".join(words) or mode, []).append((chosen.get(axis), speed, nats))
    for points in lines.values():
        points.sort(key=lambda point: float(point[0] or 0))
    return axis, lines


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def main(argv=None):
    args, origins = cli.parse(config.BenchArgs, argv, "edge_benchmark")
    cli.announce(args, origins)
    if args.profiles:
        chosen = profiles(args.profiles)
        args.modes = ("block_frozen",)
    else:
        chosen = combinations(args.grid)

    # these import torch, which --help and a usage error do not wait for
    import torch

    from common import machine

    allocator = machine.start(args.threads)
    can_write(args, "out_json")
    device = machine.pick_device(args.device)
    prompts = list(config.BENCH_PROMPTS)
    if args.prompt or args.prompts_file:
        prompts = settings.read_prompts(args)
    args.sampler = settings.masked_sampler(args.sampler)

    # A model for each precision, and what is compared
    models, of_wanted, weights, tokenizer, saved = load_models(args, chosen, device)
    model = next(reversed(models.values()))
    causal = model.cfg.causal
    if causal:
        print(
            "notice: an autoregressive checkpoint has one mode, left to right over its cache: "
            "block_frozen",
            file=sys.stderr,
        )
        args.modes = ("block_frozen",)
    why_not_frozen = settings.cannot_freeze(saved)
    variants, results, idle = variants_of(
        args, origins, chosen, models, of_wanted, tokenizer, saved, why_not_frozen
    )
    if not causal:
        for line in idle:
            say(line)

    # The measurements: speed, then quality beside it
    data_dir = args.data_dir or saved.config["args"]["data_dir"]
    judges = Judges(data_dir, tokenizer, saved, device)
    if variants:
        first, first_settings = next(iter(variants.values()))
        reference = (first, dataclasses.replace(first_settings, mode="full"))
        reference = variants.get("full", reference)
        with torch.no_grad():
            results |= measure(
                tokenizer, prompts, variants, reference, args, not why_not_frozen, device
            )
            add_quality(results, variants, models, judges, tokenizer, prompts)

    # The answer: cards for people, one document, a picture of a grid
    real = judges.real()
    document = {
        "version": 1,
        "model": saved.config["model"]["model"],
        "ckpt": str(saved.path),
        "step": saved.step,
        **machine.environment(device),
        "allocator": allocator,
        "weights_bytes": weights,
        "batch": 1,
        "seed": args.seed,
        "prompts": prompts,
        "params": model_config.count_params(model.cfg),
        "args": to_dict(args),
        "judge_nats_of_held_out_text": real,
        "results": results,
    }
    width = max(map(len, results))
    for name, figures in results.items():
        print(card(name, figures, width))
    if args.profiles:
        document["profiles"] = {name: price(name, results) for name in args.profiles}
    write_json(args.out_json, document)
    if args.grid:
        axis, lines = lines_of(results)
        picture = Path(args.out_json).with_suffix(".png")
        plots.quality_against_speed(picture, axis, lines, real)
    print(json_text(document))


def load_models(args, chosen, device):
    """The checkpoint in every precision that is asked for -> (models by precision, precision by
    what was asked for, bytes of weights by precision, tokenizer, the checkpoint).
    """
    import checkpoint
    from sampling import fast
    models = {}
    weights = {}
    of_wanted = {}
    asked_for = [pairs.get("precision", args.precision) for pairs in chosen.values()]
    for wanted in dict.fromkeys(asked_for):
        precision, why = fast.pick(wanted, device)
        of_wanted[wanted] = precision
        if precision in models:
            continue
        model, tokenizer, saved = checkpoint.load_model(
            args.ckpt, device, config.check_saved, args.model, args.tokenizer
        )
        weights[precision] = fast.prepare(model, precision)
        models[precision] = model
        say(f"precision: {precision} ({why}), {weights[precision] / 2**20:.1f} MB of weights")
    return models, of_wanted, weights, tokenizer, saved


def variants_of(args, origins, chosen, models, of_wanted, tokenizer, saved, why_not_frozen):
    """Every mode with every choice of settings -> ({name: (model, Settings)}, {name: why it is
    skipped}, notices about flags that no variant heeds).
    """
    variants = {}
    skipped = {}
    without_effect = []
    for label, pairs in chosen.items():
        if "sampler" in pairs:
            pairs["sampler"] = settings.masked_sampler(pairs["sampler"])
        for mode in dict.fromkeys(args.modes):
            name = f"{mode} {label}".strip()
            if mode == "block_frozen" and why_not_frozen:
                skipped[name] = {"skipped": why_not_frozen}
                continue
            mine = dataclasses.replace(args, **pairs)
            asked = settings.decode_settings(mine, saved, mode, tokenizer.eos_id)
            variants[name] = (models[of_wanted[mine.precision]], asked)
            without_effect.append(set(settings.idle(mine, origins, asked)))
    if not without_effect:
        return variants, skipped, []
    return variants, skipped, sorted(set.intersection(*without_effect))


def add_quality(results, variants, models, judges, tokenizer, prompts):
    """The held-out bound and the judged text of every variant join its figures."""
    contexts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    for name, (model, asked) in variants.items():
        figures = results[name]
        whole = 10**9
        block = asked.block_size if asked.mode == "block_frozen" else whole
        figures["precision"] = next(key for key, value in models.items() if value is model)
        figures["held_out_nats"] = judges.held_out(model, figures["precision"], block)
        rows = [tokenizer.encode(text) for text in figures["texts"]]
        figures["judge_nats"] = judges.ngram and judges.ngram.nats(rows, contexts)


if __name__ == "__main__":
    cli.run(main)
