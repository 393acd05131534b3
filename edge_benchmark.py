"""How fast is each decode mode, and what does the speed cost: full, block and block_frozen on the
same prompts.

    python -m edge_benchmark --ckpt checkpoints/eco_hybrid_hi --modes full block block_frozen
    --runs_per_prompt 3
    python -m edge_benchmark --ckpt checkpoints/eco_hybrid_hi --modes block_frozen --grid
    steps=4,8,16,32 precision=fp32,bf16,int8
    python -m edge_benchmark --ckpt checkpoints/eco_hybrid_hi --profiles balanced max    # what do
        sample's profiles cost here?

--grid takes every combination of the named settings of sample, in every mode, and draws quality
against speed. One line per variant for people; the last line on stdout, and
benchmarks/edge_benchmark.json, hold everything. Notable:
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
from pathlib import Path

import cli
import config
import model_config
from common.console import UserError, say
from common.files import can_write, json_text, write_json
from common.flags import convert, split_list, to_dict
from evaluation import plots

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
    """variants {name: (model, decode.Settings)} -> {name: the figures of COMMANDS 4.6 and more};
    reference: a variant.
    """
    from evaluation.estimators import left_to_right
    from evaluation.sample_quality import distinct, repeat_rate
    from sampling.decode import generate

    def decode(variant, prompt):
        model, settings = variant
        started = time.perf_counter(), time.process_time()
        result = generate(
            model, [tokenizer.bos_id, *tokenizer.encode(prompt)], settings, [args.seed]
        )
        # it ends with a copy to the CPU
        return result, time.perf_counter() - started[0], time.process_time() - started[1]

    model_rows = [decode(reference, prompt)[0].rows[0] for prompt in prompts]
    longest = max(prompts, key=lambda prompt: len(tokenizer.encode(prompt)))
    memory = {
        name: peak_rss(lambda v=v: decode(v, longest), device) for name, v in variants.items()
    }
    kept, seconds, cpu, tokens = (
        {},
        {n: [] for n in variants},
        dict.fromkeys(variants, 0.0),
        dict.fromkeys(variants, 0),
    )
    for index, prompt in enumerate(prompts):
        for number in range(-args.warmup_runs, args.runs_per_prompt):
            for name, variant in variants.items():
                result, took, worked = decode(variant, prompt)
                before = kept.setdefault((name, index), result)
                if before.rows != result.rows or before.forwards != result.forwards:
                    print(f"warning: {name} gave another text with the same seed", file=sys.stderr)
                if number >= 0:
                    seconds[name].append(took)
                    cpu[name] += worked
                    tokens[name] += len(result.rows[0])
    contexts = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in prompts]
    figures = {}
    for name, times in seconds.items():
        model, settings = variants[name]
        results = [kept[name, index] for index in range(len(prompts))]
        rows, ordered = [r.rows[0] for r in results], sorted(times)
        count = sum(map(len, rows))
        scores = [
            left_to_right(reference[0], context, row, frozen)
            for context, row in zip(contexts, rows, strict=True)
        ]
        forwards = statistics.mean(r.forwards for r in results)
        figures[name] = {
            "mode": settings.mode,
            "runs": len(times),
            "warmup_runs": args.warmup_runs * len(prompts),
            "mean_latency_s": statistics.mean(times),
            "p50_latency_s": statistics.median(times),
            "p90_latency_s": ordered[math.ceil(0.9 * len(ordered)) - 1],
            "mean_tok_s": tokens[name] / sum(times),
            "mean_generated_tokens": count / len(rows),
            "mean_forwards": forwards,
            "mean_layer_passes": statistics.mean(r.layer_passes for r in results),
            "tokens_per_forward": count / len(rows) / forwards if forwards else 0.0,
            "mean_context_passes": statistics.mean(r.context_passes for r in results),
            "cpu_s_per_token": cpu[name] / tokens[name] if tokens[name] else None,
            "cache_bytes": max(r.cache_bytes for r in results),
            "peak_rss_mb": memory[name],
            "nll_per_token": sum(scores) / count if count else None,
            "distinct_2": distinct(rows, 2),
            "repeat_rate": repeat_rate(rows),
            "agree_with_full": statistics.mean(map(agreement, rows, model_rows)),
            "texts": [tokenizer.written(row) for row in rows],
        }
    return figures


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
    settings_of = profiles(args.profiles) if args.profiles else combinations(args.grid)
    args.modes = ("block_frozen",) if args.profiles else args.modes
    import torch

    import checkpoint
    from common import machine
    from sampling import fast, settings
    allocator = machine.start(args.threads)
    can_write(args, "out_json")
    device = machine.pick_device(args.device)
    prompts = (
        settings.read_prompts(args)
        if args.prompt or args.prompts_file
        else list(config.BENCH_PROMPTS)
    )
    args.sampler = settings.masked_sampler(args.sampler)
    models, weights, precisions, saved = {}, {}, {}, None
    for wanted in dict.fromkeys(s.get("precision", args.precision) for s in settings_of.values()):
        precisions[wanted], why = fast.pick(wanted, device)
        if precisions[wanted] not in models:
            model, tokenizer, saved = checkpoint.load_model(
                args.ckpt, device, config.check_saved, args.model, args.tokenizer
            )
            weights[precisions[wanted]] = fast.prepare(model, precisions[wanted])
            models[precisions[wanted]] = model
            say(
                f"precision: {precisions[wanted]} ({why}), "
                f"{weights[precisions[wanted]] / 2**20:.1f} MB of weights"
            )
    why_not = settings.cannot_freeze(saved)
    if model.cfg.causal:
        print(
            "notice: an autoregressive checkpoint has one mode, left to right over its cache: "
            "block_frozen",
            file=sys.stderr,
        )
        args.modes = ("block_frozen",)
    variants, skipped, without_effect = {}, {}, []
    for named, chosen in settings_of.items():
        if "sampler" in chosen:
            chosen["sampler"] = settings.masked_sampler(chosen["sampler"])
        for mode in dict.fromkeys(args.modes):
            name = f"{mode} {named}".strip()
            if mode == "block_frozen" and why_not:
                skipped[name] = {"skipped": why_not}
                continue
            mine = dataclasses.replace(args, **chosen)
            variants[name] = (
                models[precisions[mine.precision]],
                settings.decode_settings(mine, saved, mode, tokenizer.eos_id),
            )
            without_effect.append(set(settings.idle(mine, origins, variants[name][1])))
    for line in (
        sorted(set.intersection(*without_effect)) if without_effect and not model.cfg.causal else ()
    ):
        say(line)                                             # only what no variant heeds
    judges = Judges(args.data_dir or saved.config["args"]["data_dir"], tokenizer, saved, device)
    results = dict(skipped)
    if variants:
        model, s = next(iter(variants.values()))
        reference = variants.get("full", (model, dataclasses.replace(s, mode="full")))
        contexts = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in prompts]
        with torch.no_grad():
            results |= measure(tokenizer, prompts, variants, reference, args, not why_not, device)
            for name, (model, s) in variants.items():
                r = results[name]
                block = s.block_size if s.mode == "block_frozen" else 10 ** 9
                r["precision"] = next(p for p, m in models.items() if m is model)
                r["held_out_nats"] = judges.held_out(model, r["precision"], block)
                rows = [tokenizer.encode(text) for text in r["texts"]]
                r["judge_nats"] = judges.ngram and judges.ngram.nats(rows, contexts)
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
        "judge_nats_of_held_out_text": judges.real(),
        "results": results,
    }
    for name, r in results.items():
        print(card(name, r, max(map(len, results))))
    if args.profiles:
        document["profiles"] = {name: price(name, results) for name in args.profiles}
    write_json(args.out_json, document)
    if args.grid:
        picture = Path(args.out_json).with_suffix(".png")
        axis, lines = lines_of(results)
        real = document["judge_nats_of_held_out_text"]
        plots.quality_against_speed(picture, axis, lines, real)
    print(json_text(document))


if __name__ == "__main__":
    cli.run(main)
