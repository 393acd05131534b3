"""Text out of checkpoints: the documented commands word for word, what sampling promises, and the
mode comparison.
"""
import io
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import cli
import config
import edge_benchmark
import evaluate
import sample
import train
from common.files import write_json
from conftest import RUNS, TINY, aria_here, call
from evaluation import check_run, decode_modes, estimators, profiles, sample_quality
from sampling import decode, proved, settings
from sampling.torch_model import TorchModel
from text.dataset import TokenData

MODES = {"full": (), "block": ("--blockwise",), "block_frozen": ("--blockwise", "--frozen_context")}
EDGE = """python -m sample \\
  --ckpt checkpoints/eco_hybrid_hi/latest.pt \\
  --tokenizer data/tokenizer/aria_hindi.model \\
  --model primary \\
  --prompt "mai kal bazaar gaya tha" \\
  --max_new_tokens 128 \\
  --edge_profile max \\
  --blockwise \\
  --frozen_context \\
  --min_decode_layers 3
"""
BENCH = """python -m sample \\
  --ckpt checkpoints/eco_hybrid_hi/latest.pt \\
  --tokenizer data/tokenizer/aria_hindi.model \\
  --model primary \\
  --prompt "namaste" \\
  --max_new_tokens 128 \\
  --blockwise \\
  --frozen_context \\
  --benchmark_runs 5 \\
  --warmup_runs 1
"""
COMPARE = """python -m edge_benchmark \\
  --ckpt checkpoints/eco_hybrid_hi/latest.pt \\
  --tokenizer data/tokenizer/aria_hindi.model \\
  --model primary \\
  --modes full block block_frozen \\
  --runs_per_prompt 3
"""


def words(document, kind="primary"):
    """A command of the user's document -> its arguments after `python -m`; for the backup, with the
    backup's names.
    """
    if kind == "backup":
        document = document.replace("eco_hybrid_hi", "diffusion_hi").replace(
            "--model primary", "--model backup"
        )
    return shlex.split(document.replace("\\\n", " "))[2:]


def stats(errors):
    """The [stats] lines as dicts."""
    return [
        dict(pair.split("=", 1) for pair in line.split()[1:])
        for line in re.findall(r"^\[stats\].*", errors, re.M)
    ]


def draw(capsys, kind, *arguments):
    """One sampling run -> (text on stdout, the [stats] lines)."""
    capsys.readouterr()
    assert call(sample.main, "--ckpt", RUNS[kind], "--threads", 1, *arguments) == 0
    out, err = capsys.readouterr()
    return out.removesuffix("\n"), stats(err)


# ---- the documents' commands, word for word ------------------------------------------------------

@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_edge_sampling(trained, kind):
    name, *arguments = words(EDGE, kind)
    done = aria_here(name, *arguments, cwd=trained, check=0)
    assert done.stdout.startswith("mai kal bazaar gaya tha") and "\ufffd" not in done.stdout[:23]
    [figures] = stats(done.stderr)
    assert 0 <= int(figures["before_eos"]) <= int(figures["new"]) <= 128
    size = 8  # that of the checkpoint; what a block reveals after an EOS is no new token
    blocks = -(-int(figures["new"]) // size)
    assert blocks <= int(figures["forwards"]) <= blocks * size and figures["mode"] == "block_frozen"
    assert int(figures["context"]) <= blocks
    assert "latest.pt -> " in done.stderr and "notice: --min_decode_layers" in done.stderr


def test_sampling_benchmark(trained):
    name, *arguments = words(BENCH)
    done = aria_here(name, *arguments, cwd=trained, check=0)
    assert done.stdout.startswith("namaste")
    [line] = re.findall(
        r"^\[bench\] runs=5 warmup=1 mean=([\d.]+)s p50=([\d.]+)s tok/s=([\d.]+) "
        r"tokens=(\d+) forwards=(\d+)$",
        done.stderr,
        re.M,
    )
    mean, _, speed, tokens, forwards = map(float, line)
    [figures] = stats(done.stderr)
    assert int(figures["before_eos"]) == tokens and int(figures["forwards"]) == forwards
    assert speed == pytest.approx(tokens / mean, rel=0.05, abs=2)


KEYS = """
    runs warmup_runs mean_latency_s p50_latency_s p90_latency_s mean_tok_s mean_generated_tokens
    mean_forwards mean_layer_passes peak_rss_mb nll_per_token distinct_2 agree_with_full
""".split()
TOP_KEYS = (
    "version model ckpt step device threads torch seed prompts args results batch commit".split()
)


def check_document(document, kind, runs):
    assert (
        set(TOP_KEYS) <= set(document)
        and document["model"] == kind
        and document["prompts"] == list(config.BENCH_PROMPTS)
    )
    assert list(document["results"]) == list(MODES)
    for mode, r in document["results"].items():
        assert set(KEYS) <= set(r), mode
        assert (
            r["runs"] == runs * 3
            and 0 < r["p50_latency_s"] <= r["p90_latency_s"]
            and r["peak_rss_mb"] > 50
        )
        assert r["mean_layer_passes"] == 2 * r["mean_forwards"] and 0 <= r["agree_with_full"] <= 1
        assert (r["nll_per_token"] is None) == (r["mean_generated_tokens"] == 0)
    assert (
        document["results"]["full"]["agree_with_full"] == 1
        and document["results"]["full"]["cache_bytes"] == 0
    )
    assert document["results"]["block_frozen"]["cache_bytes"] > 0


def test_mode_comparison(trained):
    name, *arguments = words(COMPARE)
    done = aria_here(name, *arguments, cwd=trained, check=0)
    *cards, last = done.stdout.rstrip("\n").split("\n")
    assert [card.split()[0] for card in cards] == list(MODES)
    written = (trained / "benchmarks/edge_benchmark.json").read_text(encoding="utf-8")
    assert json.loads(last) == json.loads(written)
    check_document(json.loads(last), "primary", 3)
    assert [path.name for path in (trained / "benchmarks").iterdir()] == ["edge_benchmark.json"]


# ---- what sampling promises ----------------------------------------------------------------------

@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_promises_of_a_sample(here, capsys, tmp_path, kind, mode):
    prompt, path = "भारत में आज  मौसम\tkaisa", tmp_path / "new" / "out.json"
    arguments = (
        *MODES[mode], "--prompt", prompt, "--max_new_tokens", 20, "--steps", 5, "--seed", 3,
    )
    text, [figures] = draw(capsys, kind, *arguments, "--out_json", path)
    assert draw(capsys, kind, *arguments)[0] == text, "the same seed gave another text"
    assert draw(capsys, kind, *arguments, "--seed", 4)[0] != text
    assert text.startswith(prompt) and figures["mode"] == mode
    assert int(figures["new"]) <= 20 and int(figures["forwards"]) <= 5 * (
        1 if mode == "full" else 3
    )
    assert (int(figures["context"]) > 0) == (mode == "block_frozen")
    [record] = json.loads(path.read_text(encoding="utf-8"))["samples"]
    assert (
        record["text"] == text
        and record["new_tokens"] == int(figures["new"])
        and record["seconds"] > 0
    )


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("mode", MODES)
def test_ids_of_a_sample(here, kind, mode):
    """No mask, no pad, the promised number; greedy decoding does not depend on the seed."""
    net, tokenizer, _ = checkpoint.load_model(RUNS[kind], torch.device("cpu"), config.check_saved)
    prompt = [tokenizer.bos_id, *tokenizer.encode("namaste")]
    for length, temperature in ((1, 0.0), (13, 1e-6), (13, 10.0)):
        s = settings.Settings(
            max_new_tokens=length, steps=4, mode=mode, block_size=8, temperature=temperature
        )
        out = decode.generate(TorchModel(net), prompt, s, [1, 2])
        assert all(
            len(row) == length and not {net.cfg.mask_id, net.cfg.pad_id} & set(row)
            for row in out.full_rows
        )
        assert out.forwards <= 4 * (1 if mode == "full" else -(-length // 8))
        if temperature == 0:
            assert out.rows[0] == out.rows[1]


def test_no_half_letter_at_the_end(here, capsys, monkeypatch):
    """A row whose length cut a letter of four bytes: printed, streamed, as JSON and before the
    verdict it ends before it.
    """
    real = decode.generate

    def cut(model, ids, settings, seeds, watch=None, grow=None):
        out = real(model, ids, settings, seeds)
        tokenizer = checkpoint.load_model(
            RUNS["primary"], torch.device("cpu"), config.check_saved
        )[1]
        out.full_rows = out.rows = [tokenizer.encode("कल 🚀")[:-1] for _ in out.rows]
        assert tokenizer.decode(out.rows[0]).endswith("\ufffd")
        return out
    monkeypatch.setattr(decode, "generate", cut)
    monkeypatch.setattr(check_run, "generate", cut)
    for flags in ((), ("--stream",)):
        assert draw(capsys, "primary", "--prompt", "आज ", *flags)[0] == "आज कल "
    assert json.loads(draw(capsys, "primary", "--prompt", "आज ", "--json")[0])["text"] == "आज कल "
    samples, _ = check_run.write_samples(RUNS["primary"], torch.device("cpu"))
    assert {s["text"] for s in samples} == {"कल "}


def boosted(eos_logit):
    """checkpoint.load_model with a model that loves or hates EOS."""
    real = checkpoint.load_model

    def load(*args):
        net, tokenizer, saved = real(*args)
        logits = net.logits

        def changed(h):
            z = logits(h)
            z[..., tokenizer.eos_id] += eos_logit
            return z
        net.logits = changed
        return net, tokenizer, saved
    return load


@pytest.mark.parametrize("mode", MODES)
def test_eos_ends_the_text_and_the_count(here, capsys, monkeypatch, mode):
    arguments = ("--prompt", "namaste", "--max_new_tokens", 24, "--temperature", 0, *MODES[mode])
    load = checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model", boosted(1000.0))
    text, [figures] = draw(capsys, "primary", *arguments)
    assert (
        text == "namaste"
        and (figures["before_eos"], figures["new"]) == ("0", "1")
        and figures["tok/s"] == "0.0"
    )
    assert int(figures["forwards"]) <= 12, "blocks after the end were decoded"
    text, [figures] = draw(capsys, "primary", *arguments, "--ignore_eos")
    assert figures["new"] == "24"
    monkeypatch.setattr(checkpoint, "load_model", load)
    monkeypatch.setattr(checkpoint, "load_model", boosted(-1000.0))
    text, [figures] = draw(capsys, "primary", *arguments)
    assert figures["before_eos"] == figures["new"] == "24"


def test_several_prompts_and_samples(here, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("namaste\n\nमुझे एक\n", encoding="utf-8")
    text, figures = draw(
        capsys, "primary", "--prompts_file", tmp_path / "prompts.txt", "--prompt", "ek",
        "--prompt", "do", "--num_samples", 2, "--seed", 5, "--max_new_tokens", 3, "--ignore_eos",
    )
    parts = text.split("\n---\n")
    assert len(parts) == 8 and [int(line["seed"]) for line in figures] == [*range(5, 13)]
    for part, prompt in zip(
        parts, [p for p in ("ek", "do", "namaste", "मुझे एक") for _ in "ab"], strict=True
    ):
        assert part.startswith(prompt)
    alone = draw(
        capsys, "primary", "--prompt", "do", "--seed", 8, "--max_new_tokens", 3, "--ignore_eos"
    )[0]
    assert alone == parts[3], "a sample depends on its neighbours"
    assert draw(capsys, "primary", "--max_new_tokens", 3)[1], (
        "no prompt at all is an unconditional sample"
    )


def test_the_bare_command(here, capsys, tmp_path, monkeypatch):
    """The run that saved last, named; left to right, no more tokens than it was trained for."""
    assert call(sample.main) == 0
    out, err = capsys.readouterr()
    assert (
        "checkpoint: checkpoints/latest -> checkpoints/diffusion_hi/step_000012" in err
        and out.strip()
    )
    assert (
        "text: up to 31 tokens one token at a time; left to right, temperature 0.7 (the default; "
        "--sampler threshold writes in blocks, in any order)\n"
        in err
    )
    assert stats(err)[0]["mode"] == "block_frozen" and "warning" not in err and "notice" not in err
    # without a run the starter model writes, unless PyTorch is asked for
    monkeypatch.chdir(tmp_path)
    assert call(sample.main, "--max_new_tokens", "4") == 0
    assert "the starter model that comes with Aria" in capsys.readouterr().err
    assert call(sample.main, "--engine", "torch") == 2
    assert "no run under checkpoints/" in capsys.readouterr().err


def resolved(line, blocks="T,8", length=32, stored=64, prompt=1, exits=False):
    """A command line on a checkpoint trained like this -> its decode.Settings."""
    args, origins = cli.parse(config.SampleArgs, ["x", *shlex.split(line)], "sample")
    args.sampler = settings.masked_sampler(args.sampler)
    saved = SimpleNamespace(
        path="x",
        step=10,
        config={
            "model": dict(block_size=stored, n_layers=2, exits=exits, causal=False),
            "args": dict(train_block_sizes=blocks, seq_len=length, sample_steps=12),
        },
    )
    return settings.settings_of_sample(
        settings.suited(args, origins, saved, prompt), origins, saved, SimpleNamespace(eos_id=3)
    )


ONE = "--blockwise --frozen_context --block_size 1 "
BEST, OLD = ("threshold", 0.7, 0), ("confidence", 1.0, 50)


@pytest.mark.parametrize("line, mode, block, rule", [
    ("", "block_frozen", 1, BEST),
    ("--temperature 0.7 --top_p 0.9 --num_samples 3", "block_frozen", 1, BEST),
    ("--steps 12", "full", 8, OLD),
    ("--num_steps 12 --sampler margin", "full", 8, ("margin", 1.0, 50)),
    ("--steps 12 --temperature 0.8 --top_k 30", "full", 8, ("confidence", 0.8, 30)),
    ("--threshold 0.8", "block_frozen", 8, BEST),
    ("--steps 8 --blockwise --frozen_context", "block_frozen", 8, OLD),
    ("--blockwise", "block", 8, BEST),
    ("--blockwise --frozen_context", "block_frozen", 8, BEST),
    ("--no_blockwise", "full", 8, BEST),
    ("--no_frozen_context", "block", 8, BEST),
    ("--block_size 4", "block_frozen", 4, BEST),
    ("--remask 0.2", "block_frozen", 8, ("confidence", 0.7, 0)),
    ("--text a__b", "full", 8, ("confidence", 0.7, 0)),
    ("--sampler threshold", "block_frozen", 8, BEST),
    ("--guidance_scale 2", "block_frozen", 8, BEST),
    ("--min_decode_layers 1", "block_frozen", 8, BEST),
    ("--temperature_end 0.5", "block_frozen", 8, BEST),
    ("--edge_profile max", "block_frozen", 1, ("threshold", 0.0, 0)),
    ("--edge_profile balanced", "block_frozen", 1, BEST),
    ("--edge_profile balanced --temperature 0.5", "block_frozen", 1, ("threshold", 0.5, 0)),
    ("--edge_profile max --threshold 0.8", "block_frozen", 8, ("threshold", 0.0, 0)),
    ("--edge_profile balanced --blockwise", "block_frozen", 8, ("threshold", 0.8, 0)),
    ("--scheduler ddim", "block_frozen", 8, ("confidence", 0.7, 0)),
    ("--num_steps 100 --scheduler ddpm", "full", 8, ("ancestral", 1.0, 50))])
def test_what_is_not_typed_suits_the_checkpoint(line, mode, block, rule):
    """Left to right if no flag asks for another way. --steps alone is a command of the older guides
    and means what it meant; what is typed always wins.
    """
    s = resolved(line)
    assert (s.mode, s.block_size) == (mode, block) and (s.sampler, s.temperature, s.top_k) == rule
    assert s.max_new_tokens == 31 and resolved("--max_new_tokens 50 " + line).max_new_tokens == 50


def test_length_and_block_are_those_of_the_training():
    for blocks, stored, wanted in (
        ("T,32,4,1", 64, 32),
        ("T,64,32", 64, 64),
        ("T,64,32", 16, 32),
        ("T", 64, 64),
    ):
        assert resolved("--sampler threshold", blocks, 512, stored).block_size == wanted
        if blocks != "T":
            assert resolved("", blocks, 512, stored).left_to_right
    assert resolved("", "T").mode == "full", "no block was trained"
    for length, prompt, wanted in ((2048, 1, 128), (64, 20, 44), (64, 60, 32), (64, 500, 32)):
        assert resolved("", "T,8", length, prompt=prompt).max_new_tokens == wanted


@pytest.mark.parametrize(
    "line, flags, why",
    [
        ("--steps 31 --block_size 4", "--block_size", "in one piece"),
        ("--sampler confidence --threshold 0.5 --steps 31", "--threshold", "no bound"),
        ("--sampler random --steps 31 --alg_temp 1", "--alg_temp", "rank"),
        ("--remask_rule conf", "--remask_rule", "--remask is 0"),
        ("--sampler threshold --reveal cosine", "--reveal", "no schedule"),
        ("--temperature 0 --top_k 5 --top_p 0.5", "--top_k, --top_p", "temperature 0"),
        ("--text a__b --blockwise --stream", "--blockwise, --stream", "fills gaps"),
        (ONE + "--steps 4 --sampler random", "--steps, --sampler", "one token at a time"),
        (ONE + "--threshold 0.5", "--threshold", "one token at a time"),
        (
            ONE + "--sampler confidence --alg_temp 1 --remask 0.1 --remask_rule conf",
            "--sampler, --alg_temp, --remask, --remask_rule",
            "no order and no schedule",
        ),
        (ONE + "--reveal cosine --temperature_end 0.0", "--reveal, --temperature_end", "order"),
        (ONE + "--temperature 0 --top_k 5", "--top_k", "temperature 0"),
        (ONE + "--guidance_scale 2 --sampler random --alg_temp 1", "--alg_temp", "rank"),
    ],
)
def test_a_flag_without_effect_is_named(capsys, line, flags, why):
    resolved(line)
    [said] = re.findall("^notice: without effect: (.*)$", capsys.readouterr().err, re.M)
    assert said.startswith(flags + " (") and why in said


@pytest.mark.parametrize(
    "line, words",
    [
        ("--block_size 3", "not trained in blocks of 3 (but of 8)"),
        ("--steps 4", "4 forwards for 31 tokens"),
        ("--sampler ancestral --steps 20", "20 forwards for 31"),
        ("--sampler margin --blockwise --steps 5", "5 forwards for 8"),
        ("--sampler threshold --steps 4", "reveals all that is left"),
    ],
)
def test_settings_that_make_poor_text_are_named(capsys, line, words):
    resolved(line)
    [said] = re.findall("^warning: (.*)$", capsys.readouterr().err, re.M)
    assert words in said and "leave" in said
    for fine in ("", "--edge_profile max", "--steps 31", "--temperature 0 --top_k 0",
                 "--sampler confidence --blockwise --steps 8"):
        resolved(fine)
        assert not re.findall("^(?:warning|notice).*", capsys.readouterr().err, re.M), fine


def test_blocks_of_one_token_are_called_by_their_name(capsys):
    """Not where the noisy stream is asked, and not where all before a block is computed again."""
    for line in (ONE, ONE + "--edge_profile max", ONE + "--temperature 0.5 --top_p 0.9"):
        words = settings.in_words(resolved(line), False)
        assert "one token at a time; left to right" in words, line
        assert not re.findall("^(?:warning|notice).*", capsys.readouterr().err, re.M), line
    early = "--min_decode_layers 1 --sampler confidence"
    for line, where in (
        (ONE + "--guidance_scale 2", "in blocks of 1 over the exact cache; threshold 0.9"),
        (ONE + early, "in blocks of 1 over the exact cache; confidence"),
        ("--blockwise --block_size 1", "in blocks of 1, with all before"),
        ("--blockwise --frozen_context --block_size 2", "in blocks of 2 over the exact cache"),
    ):
        assert where in settings.in_words(resolved(line, exits=True), False), line


@pytest.mark.parametrize("kind", RUNS)
def test_one_token_at_a_time_from_the_commands(here, capsys, tmp_path, kind):
    """A forward a token; the comparison takes it as a setting, with its exact NLL as held-out
    figure.
    """
    words = (*ONE.split(), "--prompt", "namaste", "--max_new_tokens", 12, "--ignore_eos")
    capsys.readouterr()
    assert call(sample.main, RUNS[kind], *words, "--steps", 4, "--threads", 1) == 0
    err = capsys.readouterr().err
    assert "text: up to 12 tokens one token at a time; left to right, temperature 1" in err
    assert "notice: without effect: --steps (one token at a time" in err and "warning" not in err
    [figures] = stats(err)
    assert (figures["new"], figures["forwards"], figures["context"]) == ("12", "12", "1")
    document = compare(
        capsys, tmp_path, kind, "--modes", "block_frozen", "--runs_per_prompt", 1, "--warmup_runs",
        0, "--prompt", "ek", "--grid", "block_size=1,8", "--temperature", 0, "--precision", "fp32",
    )
    one, eight = (document["results"][f"block_frozen block_size={size}"] for size in (1, 8))
    assert one["mean_forwards"] in (one["mean_generated_tokens"] + 1, 12)
    net, _, saved = checkpoint.load_model(RUNS[kind], torch.device("cpu"), config.check_saved)
    rows = TokenData("data/processed", "val").val_windows(
        decode_modes.HELD_OUT_ROWS, saved.config["args"]["seq_len"]
    )
    with torch.no_grad():
        logp = net.logits(net.clean_states(rows)).log_softmax(-1)
    exact = -float(logp.gather(-1, rows[..., None]).mean())
    assert one["held_out_nats"] == pytest.approx(exact, rel=1e-4)
    assert eight["held_out_nats"] != one["held_out_nats"]


def test_a_scheduler_of_gaussian_models_is_translated_once(here, capsys):
    for name, ours in (("ddim", "confidence"), ("ddpm", "ancestral")):
        assert (
            call(
                sample.main, RUNS["primary"], "--num_steps", 50, "--scheduler", name,
                "--max_new_tokens", 12,
            )
            == 0
        )
        err = capsys.readouterr().err
        assert (
            re.findall(f"^notice: --scheduler {name}.*--sampler {ours} is used$", err, re.M)
            and err.count("notice") == 1
        )
        assert int(stats(err)[0]["forwards"]) <= 12


def test_statistics_stand_with_their_sample(here, monkeypatch):
    both = io.StringIO()
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    assert (
        call(
            sample.main, RUNS["primary"], "--prompt", "ek", "--prompt", "do", "--num_samples", 2,
            "--max_new_tokens", 3,
        )
        == 0
    )
    lines = [
        line[:2]
        for line in both.getvalue().split("\n")
        if line.startswith(("[stats]", "ek", "do", "---"))
    ]
    assert lines == ["ek", "[s", "--", "ek", "[s", "--", "do", "[s", "--", "do", "[s"]


def test_every_spelling_of_a_checkpoint(here, capsys):
    run = RUNS["primary"]
    for spelling, step in (
        ("", 12),
        ("/", 12),
        ("/latest.pt", 12),
        ("/last.ckpt", 12),
        ("/latest", 12),
        ("/step_000005.pt", 5),
        ("/step_000005", 5),
        ("/ckpt-step=10.ckpt", 10),
        ("/best.pt", None),
    ):
        assert call(sample.main, run + spelling, "--max_new_tokens", 1) == 0, spelling
        if step:
            assert f"step_{step:06d}" in capsys.readouterr().err + run + spelling
    assert call(sample.main, "checkpoints/last.ckpt", "--max_new_tokens", 1) == 0
    assert "-> checkpoints/" in capsys.readouterr().err
    assert call(sample.main, run + "/step_000007.pt") == 2
    assert "step_000010" in capsys.readouterr().err, "the message lists what there is"


def test_wrong_model_and_wrong_tokenizer(here, text, capsys):
    assert call(sample.main, RUNS["primary"], "--model", "backup") == 2
    assert "use --model primary" in capsys.readouterr().err
    assert call(sample.main, RUNS["primary"], "--tokenizer", text / "t.model") == 2
    assert "leave the flag out" in capsys.readouterr().err
    # as after a starter run
    assert call(sample.main, RUNS["primary"], "--tokenizer", "data/tokenizer/nowhere.model") == 2
    assert "leave the flag out, the checkpoint carries its own" in capsys.readouterr().err
    assert call(evaluate.main, RUNS["primary"], "--data_dir", text) == 2


# ---- the mode comparison -------------------------------------------------------------------------

def compare(capsys, tmp_path, kind, *arguments):
    capsys.readouterr()
    assert (
        call(
            edge_benchmark.main, RUNS.get(kind, kind), "--out_json", tmp_path / "b.json",
            "--max_new_tokens", 12, "--threads", 1, *arguments,
        )
        == 0
    )
    out = capsys.readouterr().out
    return json.loads(out.rstrip("\n").split("\n")[-1])


def test_comparison_repeats_for_both_models(here, capsys, tmp_path):
    for kind in RUNS:
        one, two = (compare(capsys, tmp_path, kind, "--runs_per_prompt", 2) for _ in "ab")
        check_document(one, kind, 2)
        for mode in MODES:
            for key in (
                "texts", "mean_forwards", "nll_per_token", "distinct_2", "agree_with_full",
                "mean_generated_tokens",
            ):
                assert one["results"][mode][key] == two["results"][mode][key]


def test_timed_runs_alternate(here, capsys, tmp_path, monkeypatch):
    order, real = [], decode.generate
    monkeypatch.setattr(
        decode,
        "generate",
        lambda model, ids, s, seeds: order.append(s.mode) or real(model, ids, s, seeds),
    )
    compare(
        capsys, tmp_path, "primary", "--prompt", "ek", "--runs_per_prompt", 3, "--warmup_runs", 2
    )
    assert order[-15:] == [*MODES] * 5, "2 warm-up and 3 timed turns, modes in turn"


def test_a_text_without_tokens_is_counted_as_such(here, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", boosted(1000.0))
    for r in compare(capsys, tmp_path, "primary", "--runs_per_prompt", 1)["results"].values():
        assert (
            r["mean_generated_tokens"] == r["mean_tok_s"] == 0
            and r["nll_per_token"] is r["distinct_2"] is None
        )
        assert r["agree_with_full"] == 1


@pytest.mark.parametrize("kind", RUNS)
@torch.no_grad()
def test_nll_is_the_exact_chain_rule(here, kind):
    """Of the clean stream, as the cache gives it token by token; of a checkpoint without blocks, of
    the whole text with a mask at each token and at all behind it.
    """
    net, _, _ = checkpoint.load_model(RUNS[kind], torch.device("cpu"), config.check_saved)
    ids = torch.randint(4, net.cfg.vocab_size, (1, 17), generator=torch.Generator().manual_seed(0))
    context, continuation = ids[0, :5].tolist(), ids[0, 5:].tolist()

    def logp_of(states, token):
        return float(net.logits(states)[0, -1].double().log_softmax(-1)[token])

    cache, exact = net.new_cache(1, 17), 0.0
    net.step(ids[:, :4], cache)
    for i in range(5, 17):
        exact -= logp_of(net.step(ids[:, i - 1:i], cache), ids[0, i])
    found = estimators.left_to_right(net, context, continuation, frozen=True)
    assert found == pytest.approx(exact, rel=1e-5)

    whole, empty = 0.0, net.new_cache(1, 0)
    for i in range(5, 17):
        canvas = ids.clone()
        canvas[:, i:] = net.cfg.mask_id
        whole -= logp_of(net.states(canvas, empty)[:, :i + 1], ids[0, i])
    found = estimators.left_to_right(net, context, continuation, frozen=False)
    assert found == pytest.approx(whole, rel=1e-5) and abs(whole - exact) > 1e-3


def test_figures_by_hand():
    assert (
        decode_modes.agreement([1, 2, 3], [1, 5, 3, 4]) == 0.5
        and decode_modes.agreement([], []) == 1
    )
    assert (
        sample_quality.distinct([[1, 2, 1, 2], [2, 1]], 2) == 0.5
        and sample_quality.distinct([[1], []], 2) is None
    )
    assert (
        sample_quality.repeat_rate([[1, 2, 3, 4] * 2, [1, 2, 3, 4]]) == 1 / 6
        and sample_quality.repeat_rate([[1]]) == 0
    )


@pytest.mark.parametrize(
    "blocks, size, whole", [("1", 1, False), ("4,2", 4, False), ("T,1", 1, True)]
)
def test_a_checkpoint_is_decoded_as_it_was_trained(here, capsys, tmp_path, blocks, size, whole):
    """In blocks no larger than those it knows; whoever asks for a whole text of one that never saw
    any is told.
    """
    run = tmp_path / "run"
    assert (
        call(
            train.main, "--data_dir", "data/processed", "--output_dir", run, *TINY,
            "--max_steps", 1, "--eval_interval", 0, "--train_block_sizes", blocks,
            "--no_show_samples",
        )
        == 0
    )
    saved = checkpoint.load(run)
    for given, wanted in (([], size), (["--block_size", "2"], 2)):
        args, origins = cli.parse(
            config.SampleArgs,
            ["--ckpt", str(run), "--blockwise", "--frozen_context", *given],
            "sample",
        )
        s = settings.settings_of_sample(
            settings.suited(args, origins, saved, 1), origins, saved, SimpleNamespace(eos_id=3)
        )
        assert (s.mode, s.block_size) == ("block_frozen", wanted)
    capsys.readouterr()
    for words in (
        ["--prompt", "namaste", "--max_new_tokens", 4],
        ["--text", "mai ____ gaya", "--guidance_scale", 2],
    ):
        assert call(sample.main, "--ckpt", run, *words) == 0
        said = capsys.readouterr().err
        assert ("never saw a whole text" in said) == (not whole and "--text" in words)
        assert ("without effect: --guidance_scale" in said) == ("--text" in words)


def test_a_checkpoint_without_blocks(here, capsys, tmp_path):
    """Its context cannot be frozen: sample says so and goes on, the comparison records the mode as
    skipped.
    """
    run = tmp_path / "whole"
    assert (
        call(
            train.main, "--output_dir", run, "--train_block_sizes", "T", "--d_model", 16,
            "--n_layers", 1, "--n_heads", 2, "--d_ff", 32, "--seq_len", 16, "--max_steps", 1,
            "--eval_interval", 0, "--no_show_samples", "--threads", 1,
        )
        == 0
    )
    capsys.readouterr()
    assert call(sample.main, run, "--blockwise", "--frozen_context", "--max_new_tokens", 4) == 0
    err = capsys.readouterr().err
    assert "not trained in blocks" in err and "mode=block\n" in err
    document = compare(capsys, tmp_path, run, "--runs_per_prompt", 1)
    assert "not trained in blocks" in document["results"]["block_frozen"]["skipped"]
    assert document["results"]["block"]["nll_per_token"] > 0


# ---- evaluate ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", RUNS)
def test_evaluate_gives_one_number_twice(here, capsys, tmp_path, kind):
    found = []
    for blocks in ((), ("--blocks", "T,8,1")):
        assert (
            call(
                evaluate.main, RUNS[kind], "--batches", 2, "--draws", 1, "--chain_docs", 2,
                "--repeats", 0, "--out_json", tmp_path / "e.json", *blocks,
            )
            == 0
        )
        found.append(json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["bound"])
        out = capsys.readouterr().out
        assert re.findall(r"^(T|8|1) +(bound|NLL) +all ", out, re.M) == [
            ("T", "bound"), ("8", "bound"), ("1", "NLL"),
        ]
    assert found[0] == found[1]
    assert all(0 < r["nats"] < 20 and r["bits_per_byte"] > 0 for r in found[0].values())


def test_a_grid_of_settings(here, capsys, tmp_path):
    """Every combination is a row; what is quantised says what it costs; a misspelt axis is a
    sentence.
    """
    write_json(tmp_path / "p.json", dict(name="another engine", tok_s=500))
    one = compare(
        capsys, tmp_path, "primary", "--modes", "block_frozen", "--runs_per_prompt", 1,
        "--prompt", "ek", "--peer", tmp_path / "p.json",
        "--grid", "steps=2,4", "precision=fp32,int8",
    )
    rows = one["results"]
    assert one["peers"] == [dict(name="another engine", tok_s=500, nats=None, note="")]
    assert (tmp_path / "b.png").stat().st_size > 10_000
    assert list(rows) == [
        f"block_frozen steps={s} precision={p}" for s in (2, 4) for p in ("fp32", "int8")
    ]
    assert len({r["held_out_nats"] for r in rows.values()}) == 2 and all(
        r["judge_nats"] > 0 for r in rows.values()
    )
    assert one["weights_bytes"]["int8"] < 0.5 * one["weights_bytes"]["fp32"]
    assert one["judge_nats_of_held_out_text"] > 0
    for bad in ("steps", "speed=4", "steps=x", "precision=int4"):
        assert call(edge_benchmark.main, RUNS["primary"], "--grid", bad) == 2
    assert call(edge_benchmark.main, RUNS["primary"], "--peer", tmp_path / "p.json") == 2
    assert "--grid" in capsys.readouterr().err
    assert call(
        edge_benchmark.main, RUNS["primary"], "--grid", "steps=2", "--peer", tmp_path
    ) == 2
    assert "is a folder" in capsys.readouterr().err


def test_what_the_profiles_are_proved_to_be(here, capsys, tmp_path):
    """Each in blocks and left to right; what was measured is what sample takes here, and nowhere
    else.
    """
    kept = Path(RUNS["primary"], proved.FILE)
    asked = ("--edge_profile", "max", "--max_new_tokens", 2)
    try:
        assert (
            call(
                edge_benchmark.main, RUNS["primary"], "--out_json", tmp_path / "p.json",
                "--max_new_tokens", 12, "--prompt", "ek", "--prompt", "भारत में", "--prompt",
                "namaste", "--runs_per_prompt", 1, "--warmup_runs", 0, "--profiles", "balanced",
                "max", "--block_size", 12,
            )
            == 0
        )
        err = capsys.readouterr().err
        document = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
        for name in ("balanced", "max"):
            blocks = document["results"][f"block_frozen {name}{profiles.IN_BLOCKS}"]
            single = document["results"][f"block_frozen {name}{profiles.LEFT_TO_RIGHT}"]
            assert blocks["mean_forwards"] <= 12 and single["tokens_per_forward"] <= 1
            assert document["profiles"][name]["faster"] == pytest.approx(
                blocks["mean_tok_s"] / single["mean_tok_s"]
            )
        assert len(re.findall(r"^profile (?:balanced|max): blocks are", err, re.M)) == 2
        assert str(kept) in err

        # what was kept, and what sample makes of it
        content = json.loads(kept.read_text(encoding="utf-8"))
        content["step_000012"]["profiles"]["max"]["settings"] = {"block_size": 8, "threshold": 0.8}
        write_json(kept, content)
        assert call(sample.main, RUNS["primary"], *asked) == 0
        said = capsys.readouterr().err
        assert "in blocks of 8 over the exact cache; threshold 0.8, temperature 0 (" in said
        assert "as measured here" in said
        for other in (("--threads", 1), ("--precision", "fp32"), ("--edge_profile", "none")):
            assert call(sample.main, RUNS["primary"], *asked, *other) == 0
            said = capsys.readouterr().err
            assert "left to right" in said and "as measured here" not in said, other
        assert call(sample.main, RUNS["primary"], *asked, "--threshold", 0.7) == 0
        assert "threshold 0.7" in capsys.readouterr().err
        kept.write_text("{", encoding="utf-8")
        assert call(sample.main, RUNS["primary"], *asked) == 2
        assert f"{kept} is not valid JSON" in capsys.readouterr().err
    finally:
        kept.unlink(missing_ok=True)
    assert call(edge_benchmark.main, RUNS["primary"], "--profiles", "max", "--grid", "steps=2") == 2


@pytest.mark.parametrize("speed, nats, block", [
    (2.0, (5.0, 5.1, 4.9, 5.0), 16),        # faster, and as good
    (1.02, (5.0, 5.1, 4.9, 5.0), 0),        # no faster than noise
    (2.0, (5.4, 5.5, 5.3, 5.4), 0),         # faster, and worse
    (2.0, (5.0, 9.0, 1.0, 5.0), 0),         # perhaps as good
    (2.0, (None, None, None, 5.0), None),   # wrote nothing but ends
])
def test_blocks_are_taken_if_they_are_proved(capsys, speed, nats, block):
    blocks = dict(mean_tok_s=speed, judge_nats_each=nats, repeat_rate=0.0)
    single = dict(mean_tok_s=1.0, judge_nats_each=(5.0, 5.0, 5.0, 5.0), repeat_rate=0.0)
    results = {
        f"block_frozen max{profiles.IN_BLOCKS}": blocks,
        f"block_frozen max{profiles.LEFT_TO_RIGHT}": single,
    }
    found = profiles.price("max", results, SimpleNamespace(block_size=16, threshold=0.9))
    assert capsys.readouterr().err.startswith("profile max: ")
    if block is None:
        assert found is None
    else:
        assert found["settings"].get("block_size", 0) == block


def test_blocks_are_compared_with_what_sample_writes():
    """With verified drafts, where an export says that they pay."""
    plain = profiles.profiles(["max"])
    drafted = profiles.with_drafts(plain, SimpleNamespace(drafts_pay=True))
    assert profiles.with_drafts(plain, SimpleNamespace()) == plain
    blocks, single = f"max{profiles.IN_BLOCKS}", f"max{profiles.LEFT_TO_RIGHT}"
    assert drafted[blocks] == plain[blocks]
    assert plain[single]["block_size"] == 1
    wanted = dict(sampler="speculate", block_size=settings.DRAFT)
    assert drafted[single] == plain[single] | wanted


def test_a_prompt_that_no_terminal_should_see_raw(here, capsys, tmp_path):
    """Half a surrogate pair, as a byte that is no UTF-8 comes in, and a C1 control: in --json and
    --out_json as escapes.
    """
    prompt, path = "a\udcff\x9bb", tmp_path / "o.json"
    text, _ = draw(
        capsys, "primary", "--prompt", prompt, "--max_new_tokens", 2, "--json", "--out_json", path
    )
    for written in (text, path.read_text(encoding="utf-8")):
        assert "a\\udcff\\u009bb" in written and "\x9b" not in written
    [record] = json.loads(path.read_text(encoding="utf-8"))["samples"]
    assert record["prompt"] == json.loads(text)["prompt"] == prompt
