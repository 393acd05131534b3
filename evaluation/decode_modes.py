"""Decode modes side by side: timed runs by turns, peak memory, and the quality of what they write.

Used by edge_benchmark.py.
"""
import contextlib
import ctypes
import dataclasses
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import config
from common import machine
from common.console import UserError
from evaluation.estimators import Piece, bound, left_to_right, scored_tokens
from evaluation.held_out import open_text
from evaluation.ngram import NGram
from evaluation.sample_quality import distinct, repeat_rate
from sampling import decode
from sampling.settings import opening

HELD_OUT_ROWS = 64


def peak_rss(run, device):
    """Peak memory in MB while run() works: resident memory where Linux lets us reset its record,
    else of the process.
    """
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


def measure_all(tokenizer, prompts, variants, args, frozen, device, judges):
    """Speed and quality of variants {name: (Loaded, Settings)} -> {name: figures}. Their texts are
    compared with that of the mode full.
    """
    first, settings = next(iter(variants.values()))
    rule = "confidence" if settings.speculates else settings.sampler
    in_one_piece = (first, dataclasses.replace(settings, mode="full", sampler=rule))
    reference = variants.get("full", in_one_piece)
    results = measure(tokenizer, prompts, variants, reference, args, frozen, device)
    add_quality(results, variants, judges, tokenizer, prompts)
    return results


@torch.no_grad()
def measure(tokenizer, prompts, variants, reference, args, frozen, device):
    """variants {name: (Loaded, Settings)} -> {name: its figures}; reference: the variant whose
    text the others are compared with.
    """
    framed = reference[0].writer.cfg.framed
    contexts = [opening(tokenizer, prompt, framed) for prompt in prompts]
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
            nll += left_to_right(reference[0].model, context, row, frozen)
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
    loaded, asked = variant
    started = time.perf_counter()
    cpu_started = time.process_time()
    ids = opening(tokenizer, prompt, loaded.writer.cfg.framed)
    result = decode.generate(loaded.writer, ids, asked, [seed])
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


class Judges:
    """What stands beside speed and needs the prepared text: the n-gram judge and the held-out
    bound, each made once.
    """

    def __init__(self, data_dir, tokenizer, saved, device):
        self.args, self.device, self.ngram, self.known = saved.config["args"], device, None, {}
        try:
            train = open_text(data_dir, "train", saved)
            self.val = open_text(data_dir, "val", saved)
            if train.meta["tokenizer_sha256"] != tokenizer.sha256:
                raise UserError(f"{data_dir} was made with another tokenizer than the checkpoint")
        except UserError as error:
            print(
                f"notice: no judge and no held-out bound: {str(error).partition(';')[0]}",
                file=sys.stderr,
            )
            return
        self.ngram = NGram(train.tokens, train.vocab_size)
        length = config.scored_length(saved)
        self.rows = self.val.val_windows(HELD_OUT_ROWS, length).to(device)

    def real(self):
        """The judge's value of held-out text: what a perfect writer scores."""
        return None if self.ngram is None else self.ngram.nats(self.rows.tolist())

    def held_out(self, loaded, block):
        """Nats a token under a block rule."""
        if self.ngram is None:
            return None
        R, T = self.rows.shape
        key = loaded.precision, min(block, T)
        if key not in self.known:
            piece = Piece(self.rows, 0, torch.arange(R))
            nats, _, _ = bound(loaded.model, [piece], key[1], 1)
            self.known[key] = float(nats.sum()) / scored_tokens([piece])
        return self.known[key]


@torch.no_grad()
def add_quality(results, variants, judges, tokenizer, prompts):
    """The held-out bound and the judged text of every variant join its figures."""
    framed = next(iter(variants.values()))[0].writer.cfg.framed
    contexts = [opening(tokenizer, prompt, framed) for prompt in prompts]
    for name, (loaded, asked) in variants.items():
        figures = results[name]
        whole = 10**9
        block = asked.block_size if asked.mode == "block_frozen" else whole
        if asked.speculates:
            block = 1
        figures["precision"] = loaded.precision
        figures["held_out_nats"] = judges.held_out(loaded, block)
        rows = [tokenizer.encode(text) for text in figures["texts"]]
        figures["judge_nats"] = judges.ngram and judges.ngram.nats(rows, contexts)
        figures["judge_nats_each"] = []
        for row, context in zip(rows, contexts, strict=True):
            nats = judges.ngram and judges.ngram.nats([row], [context])
            figures["judge_nats_each"].append(nats)
