"""The command line: precedence, spellings, refusals, presets, resume rules. No torch but for the
parameter counts.

`python tests/test_config.py` rewrites tests/flags.txt, the frozen list of flags, after a wanted
change.
"""
import dataclasses
import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import config
import model_config
from common import flags as flags
from common.console import UserError, say
from common.files import ROOT, can_write, write_json
from common.flags import (
    LIMITS,
    checked,
    convert,
    defaults_of_later,
    describe,
    flag_names,
    help_text,
    read_flags,
    to_dict,
)
from config import BenchArgs, ColabArgs, EvaluateArgs, PrepareArgs, SampleArgs, TrainArgs
from model_config import ModelConfig

FLAGS = Path(__file__).with_name("flags.txt")


def parse(cls, line, prog=None, **more):
    prog = prog or next(name for name, c in config.COMMANDS.items() if c is cls)
    return cli.parse(cls, shlex.split(line) if isinstance(line, str) else line, prog, **more)


def refused(cls, line, *words, **more):
    with pytest.raises(UserError) as caught:
        parse(cls, line, **more)
    message = str(caught.value)
    assert caught.value.code == 2 and all(word in message for word in words), message
    return message


def spellings(name, text):
    kebab = name.replace("_", "-")
    return [[f"--{name}", text], [f"--{kebab}", text], [f"--{name}={text}"], [f"--{kebab}={text}"]]


def another(f):
    """A legal text for this flag that is not its default, and the value it means."""
    meta = f.metadata
    if f.type is bool:
        return str(not f.default), not f.default
    if "choices" in meta:
        others = [c for c in meta["choices"] if f.default not in (c, (c,))]
        choice = others[0] if others else f.default         # a flag that is there for later
        return choice, (choice,) if f.type is tuple else choice
    if f.type is int:
        value = max((f.default or 0) + 1, meta.get("at_least", 0))
        return str(value), value
    if f.type is float:
        return "0.625", 0.625
    return "Some/Path-x_y", ("Some/Path-x_y",) if f.type is tuple else "Some/Path-x_y"


@pytest.mark.parametrize("prog", config.COMMANDS)
def test_every_flag_in_four_spellings(prog):
    cls = config.COMMANDS[prog]
    for f in dataclasses.fields(cls):
        text, value = another(f)
        for name in (f.name, *f.metadata.get("aliases", ())):
            for argv in spellings(name, text):
                typed, problems, _ = read_flags(cls, argv, prog)
                assert (typed, problems) == ({f.name: value}, []), argv


@pytest.mark.parametrize("prog", config.COMMANDS)
def test_switches_have_three_forms(prog):
    cls = config.COMMANDS[prog]
    for f in dataclasses.fields(cls):
        if f.type is bool:
            x, no_x = f"--{f.name}", f"--no_{f.name}"
            for argv in ([x], [x, "True"], [x, "yes"], [x + "=True"], [x + "=1"]):
                assert read_flags(cls, argv, prog) == ({f.name: True}, [], set()), argv
            for argv in ([no_x], [f"--no-{f.name}"], [x, "false"], [x, "no"], [x + "=False"]):
                assert read_flags(cls, argv, prog) == ({f.name: False}, [], set()), argv
            assert read_flags(cls, [f"--no_{f.name}", "True"], prog)[1]


def test_amp_takes_all_forms():
    for line, value in (
        ("--amp", "on"),
        ("--no_amp", "off"),
        ("--amp True", "on"),
        ("--amp off", "off"),
        ("--amp auto", "auto"),
        ("--amp=False", "off"),
        ("", "auto"),
        ("--amp --lr 1e-3", "on"),
    ):
        assert parse(TrainArgs, line)[0].amp == value


def test_a_switch_does_not_eat_the_checkpoint():
    args, _ = parse(SampleArgs, "--blockwise runs/a --frozen_context True --ignore_eos")
    assert (args.ckpt, args.blockwise, args.frozen_context, args.ignore_eos) == (
        "runs/a", True, True, True,
    )


# ---- precedence (L1) -----------------------------------------------------------------------------

SETS = [(TrainArgs, "preset", name, diff) for name, diff in config.PRESETS.items()] + \
       [(TrainArgs, "edge_profile", name, diff) for name, diff in config.TRAIN_PROFILES.items()] + \
       [(SampleArgs, "edge_profile", name, diff) for name, diff in config.SAMPLE_PROFILES.items()]


@pytest.mark.parametrize(
    "cls, flag, name, diff", SETS, ids=[f"{c.__name__}-{f}-{n}" for c, f, n, _ in SETS]
)
def test_explicit_flags_beat_presets_and_profiles(cls, flag, name, diff):
    base = ["--ckpt", "x"] if cls is SampleArgs else ["--model", "backup"]
    for key, preset_value in diff.items():
        default = cls.__dataclass_fields__[key].default
        assert preset_value != default, f"{name} restates the default of {key}"
        for typed in spellings(key, str(default)):
            for argv in ([*typed, f"--{flag}", name], [f"--{flag}={name}", *typed]):
                args, origins = parse(cls, base + argv)
                assert getattr(args, key) == default and origins[key] == "flag"
                # a rate is of one
                others = {
                    k: v for k, v in diff.items() if k != key and (key, k) != ("optimizer", "lr")
                }
                assert {k: getattr(args, k) for k in others} == others
    args, origins = parse(cls, [*base, f"--{flag}", name])
    word = {"preset": "preset", "edge_profile": "profile"}[flag]
    assert all(origins[key] == f"{word} {name}" for key in diff)
    defaults = {k: cls.__dataclass_fields__[k].default for k in (*diff, flag)}
    assert parse(cls, base)[0] == dataclasses.replace(args, **defaults)


def test_the_config_of_an_older_run_is_refused_where_it_meant_something_else(tmp_path):
    """It has -1 where a value followed from the blocks; what it does not name has today's default.
    """
    file = tmp_path / "config.json"
    for args, words in (
        (dict(ar_fade=-1.0), ["ar_fade -1.0", "at least 0"]),
        (dict(max_mask_rate=-1.0), ["max_mask_rate -1.0", "at least 0"]),
    ):
        file.write_text(json.dumps({"args": args}))
        refused(TrainArgs, ["--config", str(file)], *words)
    file.write_text(json.dumps({"args": {"train_block_sizes": "T,4"}}))
    assert parse(TrainArgs, ["--config", str(file)])[0].ar_fade == TrainArgs.ar_fade


def test_whole_order_of_precedence(tmp_path):
    file = tmp_path / "a b.json"
    file.write_text(
        json.dumps(
            {
                "args": {"lr": 0.5, "d_ff": 640, "seed": 7, "resume": "latest", "preset": "nano"},
                "model": {"d_model": 1},
            }
        )
    )
    tier = {"batch_size": 3, "lr": 0.1, "seq_len": 999, "weight_decay": 0.3}
    args, origins = parse(
        TrainArgs, ["--config", str(file), "--size", "micro", "--weight-decay", "0.25"], tier=tier
    )
    assert (args.batch_size, args.seq_len, args.lr, args.weight_decay) == (3, 256, 0.5, 0.25)
    assert (args.d_ff, args.seed) == (640, 7)
    assert args.resume is None and args.preset == "micro"  # "ignore" flags never come from a file
    assert [origins[n] for n in ("batch_size", "seq_len", "lr", "weight_decay", "d_mem")] == \
        ["tier", "preset micro", f"config {file}", "flag", "default"]


def test_a_saved_config_reproduces_the_run(tmp_path):
    args, _ = parse(TrainArgs, "--preset tiny --lr 0.002 --dropout 0.125 --model eco")
    (tmp_path / "config.json").write_text(json.dumps({"args": to_dict(args), "model": {}}))
    again, _ = parse(TrainArgs, ["--config", str(tmp_path / "config.json")])
    assert dataclasses.replace(again, preset="tiny", config=args.config) == args


def test_tier_sees_the_typed_flags_and_is_not_asked_for_help(capsys):
    args, origins = parse(
        ColabArgs, "--batch_size 8", tier=lambda typed: config.gpu_tier(16e9, typed)
    )
    # 32 sequences per step, as before
    assert (args.batch_size, args.grad_accum, args.seq_len) == (8, 4, 1024)
    assert (args.n_layers, origins["grad_accum"]) == (10, "tier")
    with pytest.raises(SystemExit) as end:
        parse(ColabArgs, "--help", tier=lambda typed: 1 / 0)
    assert end.value.code == 0 and "--allow_cpu" in capsys.readouterr().out
    refused(ColabArgs, "--d_modle 3", "--d_model", tier=lambda typed: 1 / 0)


@pytest.mark.parametrize(
    "memory, row",
    [
        (80e9, (8, 4, 2048)),
        (40e9, (4, 8, 2048)),
        (15e9, (2, 16, 1024)),
        (8e9, (1, 32, 512)),
        (None, (1, 8, 256)),
    ],
)
def test_gpu_tiers(memory, row):
    tier = config.gpu_tier(memory)
    assert (tier["batch_size"], tier["grad_accum"], tier["seq_len"]) == row


# ---- refusals ------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "cls, line, words",
    [
        (TrainArgs, "--d_mode 3", ["--d_mode", "--d_model"]),
        (TrainArgs, "--grad-acum 3", ["--grad_accum"]),
        (TrainArgs, "--block_siz 64", ["unknown flag --block_siz", "--block_size"]),
        (TrainArgs, "--max 5", ["unknown flag --max"]),
        (TrainArgs, "--temperature 1", ["it belongs to sample"]),
        (TrainArgs, "--edge_profile max", ["that is a profile of sample"]),
        (SampleArgs, "x --edge_profile laptop", ["that is a profile of train"]),
        (TrainArgs, "--preset laptop", ["--edge_profile"]),
        (
            TrainArgs,
            "--preset micro --edge_profile laptop",
            ["--preset micro", "--edge_profile laptop"],
        ),
        (TrainArgs, "--config nan0", ["nan0", "micro"]),
        (TrainArgs, "--config micro --preset nano", ["micro", "nano"]),
        (TrainArgs, "--config missing.json", ["cannot read missing.json"]),
        (TrainArgs, ["--lr", "0.1", "\\"], ["use a single \\ at the line end"]),
        (TrainArgs, ["--lr", "0.1", "\\ "], ["use a single \\ at the line end"]),
        (TrainArgs, "--d_model 100", ["--d_model 100", "--n_heads 8"]),
        (
            TrainArgs,
            "--model backup --d_model 24 --n_heads 8",
            ["--d_model 24", "--n_heads 8", "even"],
        ),
        (TrainArgs, "--d_mem 100", ["--d_mem 100", "--n_heads 8"]),
        (TrainArgs, "--attn gqa", ["--attn gqa", "--model backup"]),
        (TrainArgs, "--null_attn --kv_heads 2", ["--null_attn", "--kv_heads 2", "--model backup"]),
        (TrainArgs, "--model backup --attn mla", ["--attn mla", "decoupled"]),
        (TrainArgs, "--model backup --kv_heads 2", ["--kv_heads 2", "--attn gqa", "not to mha"]),
        (TrainArgs, "--model backup --attn gqa --sem_dim 8", ["--sem_dim 8", "decoupled", "gqa"]),
        (TrainArgs, "--model backup --attn gqa --kv_heads 3", ["--n_heads 8", "3", "--kv_heads"]),
        (TrainArgs, "--model backup --attn gqa --tie_qk", ["--tie_qk", "--attn gqa"]),
        (TrainArgs, "--model backup --attn gqa_kv2 --tie_qk", ["--tie_qk", "gqa_kv2"]),
        (TrainArgs, "--model backup --attn gqa_kv2 --kv_heads 4", ["gqa_kv2", "--kv_heads 4"]),
        (TrainArgs, "--model backup --attn gqa_kv2 --n_heads 1", ["--n_heads 1", "2"]),
        (TrainArgs, "--model backup --attn bottleneck --attn_dim 60", ["--attn_dim 60", "8"]),
        (TrainArgs, "--model backup --attn bottleneck --attn_dim 24", ["--attn_dim 24", "even"]),
        (TrainArgs, "--model backup --attn decoupled --geo_dim 24", ["--geo_dim 24", "even"]),
        (TrainArgs, "--model backup --attn decoupled --sem_dim 9", ["--sem_dim 9", "--n_heads 8"]),
        (TrainArgs, "--conv_kernel 4", ["--conv_kernel 4", "odd"]),
        (TrainArgs, "--conv_kernel 1", ["--conv_kernel 1", "at least 3"]),
        (TrainArgs, "--memory_slots 1", ["--memory_slots 1", "at least 2"]),
        (TrainArgs, "--seq_len 15", ["--seq_len 15", "at least 16"]),
        (TrainArgs, "--batch_size 0", ["--batch_size 0", "at least 1"]),
        (TrainArgs, "--timesteps 1", ["--timesteps 1", "at least 2"]),
        # numbers that PyTorch, Python and SentencePiece answer with a traceback
        (TrainArgs, "--threads 1000000000000", ["--threads 1000000000000", "at most 1024"]),
        (SampleArgs, "a --num_samples 1000000000000", ["--num_samples", "at most 100000"]),
        (PrepareArgs, "--tokenizer_vocab 1000000000000", ["at most 1000000"]),
        (TrainArgs, "--lr 0", ["--lr 0", "above 0"]),
        (TrainArgs, "--lr nan", ["--lr nan", "finite"]),
        (TrainArgs, "--lr 1e999", ["finite"]),
        (TrainArgs, "--lr fast", ["--lr fast", "number"]),
        (TrainArgs, "--max_steps 1.5", ["--max_steps 1.5", "whole number"]),
        (TrainArgs, "--max_steps", ["--max_steps needs a value"]),
        (TrainArgs, "--lr --compile", ["--lr needs a value"]),
        (TrainArgs, "--ema 1", ["--ema 1", "below 1"]),
        (TrainArgs, "--min_mask_rate 0.6 --max_mask_rate 0.5", ["0.6", "0.5"]),
        (TrainArgs, "--max_mask_rate 1.5", ["--max_mask_rate 1.5", "at most 1"]),
        (TrainArgs, "--mask_schedule poly", ["poly", "cosine, linear"]),
        (TrainArgs, "--train_block_sizes T,0", ["'0'"]),
        (TrainArgs, "--train_block_sizes T,,4", ["''"]),
        (TrainArgs, "--train_block_sizes t", ["'t'"]),
        (TrainArgs, "--device gpu", ["--device gpu", "cuda"]),
        (TrainArgs, "--cpu yes", ["--cpu takes no value"]),
        (TrainArgs, "--device cpu --amp_dtype fp16", ["fp16", "--device cpu"]),
        (TrainArgs, "--name a --output_dir b", ["--run_name a", "--output_dir b"]),
        (TrainArgs, "--name ../a", ["--run_name ../a"]),
        (TrainArgs, "--resume a --ckpt b", ["--resume a", "--ckpt b"]),
        (TrainArgs, "--resume --resume_latest", ["--resume_latest"]),
        (TrainArgs, "stray", ["unexpected argument 'stray'"]),
        (TrainArgs, "-x", ["unexpected argument '-x'"]),
        (TrainArgs, "--compile maybe", ["unexpected argument 'maybe'"]),
        (TrainArgs, "--compile=maybe", ["--compile maybe", "True or False"]),
        (BenchArgs, "", ["--ckpt is missing"]),
        (SampleArgs, "a --ckpt b", ["a and --ckpt b"]),
        (SampleArgs, "a b", ["unexpected argument 'b'"]),
        (SampleArgs, "a --stream --json", ["--stream", "--json", "only one"]),
        (SampleArgs, "a --sampler best", ["confidence, threshold"]),
        (BenchArgs, "--ckpt a --modes full blok", ["blok", "block_frozen"]),
        (EvaluateArgs, "a --blocks T,x", ["'x'"]),
        (PrepareArgs, "--input a.txt", ["--source files", "1 inputs"]),
        (PrepareArgs, "--source files", ["--input", "0 inputs"]),
        (PrepareArgs, "--tokenizer_vocab 99", ["--tokenizer_vocab 99", "300"]),
        (ColabArgs, "--tokenizer_vocab 99 --allow_cpu", ["--tokenizer_vocab 99"]),
    ],
)
def test_refusals_name_the_flag_and_the_mend(cls, line, words):
    refused(cls, line, *words)


def test_all_mistakes_at_once_and_no_consequential_ones():
    message = refused(
        TrainArgs,
        "--d_mdel 3 --lr x --n_heads 7 --conv_kernel 8 --bach_size 2 --edge_profile max",
        "--d_model",
        "--lr x",
        "--d_model 512",
        "--n_heads 7",
        "--conv_kernel 8",
        "--batch_size",
        "profile",
    )
    assert message.count("\n") == 6 and "'2'" not in message
    assert "divisible" not in refused(TrainArgs, "--d_model 100 --n_heads eight", "--n_heads eight")


def test_every_one_letter_slip_gets_its_suggestion():
    for name in (
        "max_steps", "batch_size", "warmup_steps", "memory_slots", "learning_rate", "save_interval",
    ):
        for typo in (
            name[:3] + name[4:],
            name[:3] + "x" + name[3:],
            name[:2] + name[3] + name[2] + name[4:],
        ):
            refused(TrainArgs, [f"--{typo}", "1"], f"did you mean --{name}?")


ODD = ["--", "-", "\\", "=", "--=", "--lr=", "T", "1", "0.5", "micro", "none", "--no_"]
WORD = st.one_of(
    st.sampled_from([f"--{n}" for n in flag_names(TrainArgs)] + ODD), st.text(max_size=6)
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(WORD, max_size=6), st.sampled_from(sorted(config.COMMANDS)))
def test_no_command_line_ends_in_a_traceback(argv, prog):
    try:
        cli.parse(config.COMMANDS[prog], argv, prog)
    except UserError as error:
        assert error.code == 2 and str(error)
    except SystemExit as end:
        asked = {"-h", "--help", "--help_all"} & set(argv) or any(
            word.startswith("--version") for word in argv
        )
        assert end.code == 0 and asked


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    max_leaves=5,
    extend=lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
)
KEYS = st.sampled_from([*TrainArgs.__dataclass_fields__, "args", "vocab_size", "zzz"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, JSON, max_size=4))
def test_no_json_value_ends_in_a_traceback(saved):
    for read in (lambda: checked(TrainArgs, saved, "it"), lambda: ModelConfig.from_dict(saved)):
        try:
            read()
        except UserError:
            pass


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"lr": NaN}', ["NaN"]),
        ('{"lr": 1, "lr": 2}', ["twice"]),
        ('{"lr": "0.1"}', ["lr 0.1", "float"]),
        ('{"d_model": 8.0}', ["d_model"]),
        ('{"compile": 1}', ["compile"]),
        ('{"d_model": true}', ["d_model"]),
        ('{"d_modl": 8}', ["d_modl", "d_model"]),
        ('{"args": {"d_modl": 8}}', ["d_modl", "d_model"]),
        ("[1]", ["object"]),
        ('{"lr": -1}', ["above 0"]),
        ("{", ["JSON"]),
        ("[" * 100_000, ["JSON"]),
        ("\xff", ["JSON"]),
        ('{"lr": 1e999}', ["finite"]),
    ],
)
def test_config_files_are_strict(tmp_path, text, words):
    (tmp_path / "c.json").write_bytes(text.encode("latin-1"))
    refused(TrainArgs, ["--config", str(tmp_path / "c.json")], *words)


def test_run_turns_errors_into_exit_codes(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "pyarrow", raising=False)      # with it, Ctrl-C ends at once
    for error, code in (
        (UserError("mend it"), 2),
        (UserError("absent", 3), 3),
        (KeyboardInterrupt(), 130),
    ):

        def main(argv, error=error):
            raise error
        with pytest.raises(SystemExit) as end:
            cli.run(main)
        assert end.value.code == code
    assert "error: mend it" in capsys.readouterr().err


# ---- shapes and presets --------------------------------------------------------------------------

TABLE = [
    ("preset", "nano", 2048, 0.29),
    ("preset", "tiny", 2048, 1.05),
    ("preset", "micro", 8192, 37.8),
    ("preset", "micro", 16000, 41.8),
    ("preset", "medium", 50257, 359.8),
    ("preset", "full", 32768, 1375.8),
    ("preset", "none", 16000, 35.5),
    ("edge_profile", "tiny", 16000, 9.2),
    ("edge_profile", "laptop", 16000, 15.8),
]


@pytest.mark.parametrize("flag, name, vocab, millions", TABLE)
def test_presets_have_the_documented_size(flag, name, vocab, millions):
    args, _ = parse(TrainArgs, f"--model backup --{flag} {name}")
    backup = model_config.count_params(model_config.model_config(args, vocab)) / 1e6
    assert round(backup, 2 if millions < 2 else 1) == millions
    args, _ = parse(TrainArgs, f"--{flag} {name}")
    primary = model_config.count_params(model_config.model_config(args, vocab)) / 1e6
    if flag == "preset" and name != "none":
        assert abs(primary / backup - 1) < 0.02
    else:
        assert primary < backup  # at equal flags the leaner block may not be the larger


@pytest.mark.parametrize("name", [n for n in config.PRESETS if n != "none"])
def test_primary_is_matched_unless_its_width_is_typed(name):
    shape = "--n_layers 5 --memory_slots 4 --d_model 384 --n_heads 6"
    counts = [
        model_config.block_params(
            model_config.model_config(
                parse(TrainArgs, f"--preset {name} --model {m} {shape}")[0], 1
            )
        )
        for m in ("primary", "backup")
    ]
    assert abs(counts[0] / counts[1] - 1) < 0.02
    assert parse(TrainArgs, f"--preset {name} --d_ff 640")[0].d_ff == 640


def test_the_guides_slow_machine_shape():
    args, _ = parse(
        TrainArgs,
        "--preset micro --model backup --n_layers 6 --n_heads 6 --d_model 384 --d_ff 1536",
    )
    assert round(model_config.count_params(model_config.model_config(args, 8192)) / 1e6, 1) == 17.3


def test_model_config_round_trip_is_strict():
    c = ModelConfig(model="primary", vocab_size=300, d_model=64, n_heads=4)
    assert (c.rows, c.mask_id, c.pad_id, c.d_mem) == (301, 300, 0, 32)
    saved = json.loads(json.dumps(c.to_dict()))
    assert ModelConfig.from_dict(saved) == c
    for damage in (
        {"d_model": 63},
        {"d_model": "64"},
        {"n_heads": 0},
        {"vocab_size": 0},
        {"model": "x"},
        {"extra": 1},
    ):
        with pytest.raises(UserError):
            ModelConfig.from_dict({**saved, **damage})
    later = defaults_of_later(ModelConfig)
    for key in saved:
        fewer = {k: v for k, v in saved.items() if k != key}
        if key in later:
            assert ModelConfig.from_dict(fewer) == c
            continue
        with pytest.raises(UserError):
            ModelConfig.from_dict(fewer)


def test_without_a_pad_no_piece_is_forbidden():
    """GPT-2's id 0 is the exclamation mark: there the mask fills rows up, which is no answer."""
    c = ModelConfig(model="primary", vocab_size=300, d_model=64, n_heads=4, pad=False)
    assert c.pad_id == c.mask_id == 300


def test_settings_of_an_earlier_version_mean_the_defaults_of_today():
    """A checkpoint from before the attention variants is loaded and resumed as mha."""
    names = {*defaults_of_later(ModelConfig)}
    assert names >= {"attn", "kv_heads", "null_attn"}
    shape = ModelConfig(model="backup", vocab_size=300, d_model=64, n_heads=4)
    older = {k: v for k, v in shape.to_dict().items() if k not in names}
    assert ModelConfig.from_dict(older) == shape and shape.attn == "mha"

    args, origins = parse(TrainArgs, "--model backup --d_model 64 --resume x")
    older = {k: v for k, v in to_dict(args).items() if k not in defaults_of_later(TrainArgs)}
    found, changes = cli.resume_check(older, args, origins)
    assert (found.attn, changes) == ("mha", [])
    args, origins = parse(TrainArgs, "--model backup --d_model 64 --resume x --attn gqa")
    with pytest.raises(UserError, match="--attn gqa"):
        cli.resume_check(older, args, origins)


@pytest.mark.parametrize(
    "line, widths",
    [
        ("--attn baseline", ("mha", 0, 0, 0, 0)),
        ("--variant standard", ("mha", 0, 0, 0, 0)),
        ("--attn gqa", ("gqa", 2, 0, 0, 0)),
        ("--attn-mode gqa --kv-head 8", ("gqa", 8, 0, 0, 0)),
        ("--attn gqa --n_heads 2", ("gqa", 1, 0, 0, 0)),
        ("--attn gqa --n_heads 6 --d_model 384", ("gqa", 1, 0, 0, 0)),
        ("--attn gqa_kv2", ("gqa_kv2", 2, 0, 0, 0)),
        ("--attn bottleneck", ("bottleneck", 0, 0, 0, 96)),
        ("--attn bottleneck --attn_dim 64", ("bottleneck", 0, 0, 0, 64)),
        ("--attn decoupled", ("decoupled", 0, 32, 64, 96)),
        ("--attn decoupled --sem_dim 16 --geo_dim 16", ("decoupled", 0, 16, 16, 32)),
        ("--preset starter --attn decoupled", ("decoupled", 0, 12, 24, 36)),
        ("--preset starter --attn bottleneck", ("bottleneck", 0, 0, 0, 40)),
        ("--preset nano --attn bottleneck", ("bottleneck", 0, 0, 0, 16)),
    ],
)
def test_widths_of_attention_that_are_not_typed(line, widths):
    """A sixteenth and an eighth of the width, a quarter of the heads; up to what the heads divide,
    so that every preset has every variant. A saved shape keeps them.
    """
    args, _ = parse(TrainArgs, f"--model backup {line}")
    shape = model_config.model_config(args, 300)
    found = (shape.attn, shape.kv_heads, shape.sem_dim, shape.geo_dim, shape.attn_dim)
    assert found == widths
    assert ModelConfig.from_dict(json.loads(json.dumps(shape.to_dict()))) == shape


ODD_SHAPE = dict(
    d_model=48, n_heads=6, n_layers=2, d_ff=40, memory_slots=5, conv_kernel=3, d_mem=12
)


@pytest.mark.parametrize("shape", [dict(), ODD_SHAPE], ids=["default", "odd"])
@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_closed_form_counts_equal_the_real_models(kind, shape):
    torch = pytest.importorskip("torch")
    build = pytest.importorskip("model").build_model
    c = ModelConfig(model=kind, vocab_size=100, **shape)
    with torch.device("meta"):
        real = build(c)
    assert sum(p.numel() for p in real.parameters()) == model_config.count_params(c)


# ---- resume (S4) ---------------------------------------------------------------------------------

def resume(old_line, line):
    old = json.loads(json.dumps(to_dict(parse(TrainArgs, old_line)[0])))
    args, origins = parse(TrainArgs, line)
    return (*cli.resume_check(old, args, origins), origins)


def test_resume_takes_what_was_not_typed_from_the_checkpoint():
    args, changes, origins = resume("--preset nano --lr 0.25 --d_model 32",
                                    "--resume x --max_steps 900 --log_interval 7")
    assert (args.d_model, args.lr, args.max_steps, args.resume, args.preset) == (
        32, 0.25, 900, "x", "nano",
    )
    assert sorted(changes) == ["log_interval: 10 -> 7", "max_steps: 500 -> 900"]
    assert origins["d_model"] == "checkpoint" and origins["max_steps"] == "flag"


def test_resume_refuses_another_shape_and_names_it():
    for line, word in (
        ("--d_model 128", "--d_model 128"),
        ("--model backup", "--model"),
        ("--seed 8", "--seed 8"),
        ("--preset tiny", "--d_model 128"),
        ("--preset micro", "--n_layers 8"),
        ("--edge_profile tiny", "--d_model 256"),
        ("--optimizer muon", "muon"),
    ):
        with pytest.raises(UserError, match=word):
            resume("--preset nano", f"--resume {line}")
    assert (
        resume("--preset nano", "--resume --optimizer muon --reset_optimizer")[0].optimizer
        == "muon"
    )


def test_resume_with_the_runs_own_preset_keeps_what_was_changed_then():
    args, changes, _ = resume(
        "--config tiny --n_layers 6 --lr 0.25", "--config tiny --cpu --resume"
    )
    assert (args.n_layers, args.lr, changes, args.device) == (6, 0.25, [], "cpu")


def test_a_tier_never_overrules_a_checkpoint():
    saved = to_dict(parse(TrainArgs, "--preset nano --seq_len 32")[0])
    for line in ("--resume", "--resume --preset starter --model backup"):
        args, origins = parse(ColabArgs, line, tier={"seq_len": 2048, "batch_size": 3})
        if "starter" in line:
            # the shape of the other preset, not what a tier chose
            with pytest.raises(UserError) as caught:
                cli.resume_check(saved, args, origins)
            assert "--d_model 192 (preset starter)" in str(caught.value) and "2048" not in str(
                caught.value
            )
        else:
            args, changes = cli.resume_check(saved, args, origins)
            assert (args.seq_len, args.batch_size, args.n_layers, changes) == (32, 8, 3, [])


def test_resume_rejects_a_config_of_another_version():
    old = to_dict(TrainArgs())
    with pytest.raises(UserError, match="lacks lr"):
        cli.resume_check(
            {k: v for k, v in old.items() if k != "lr"}, TrainArgs(), dict.fromkeys(old, "default")
        )
    with pytest.raises(UserError, match="unknown setting zzz"):
        cli.resume_check({**old, "zzz": 1}, TrainArgs(), dict.fromkeys(old, "default"))


def test_every_flag_has_a_known_resume_rule_and_known_metadata():
    known = {
        "help",
        "resume",
        "choices",
        "values",
        "aliases",
        "shortcuts",
        "bare",
        "many",
        "positional",
        "rare",
        "elsewhere",
        "later",
        *LIMITS,
    }
    for cls in config.COMMANDS.values():
        for f in dataclasses.fields(cls):
            assert (
                f.metadata["resume"] in ("must", "may", "ignore")
                and set(f.metadata) <= known
                and f.metadata["help"]
            )
            if f.default not in (None, ()):                       # a default obeys its own limits
                assert convert(f, f.default) == f.default
        names = [name for _, names, *_ in describe(cls) for name in names]
        assert len(names) == len(set(names))


# ---- documented commands, the old names, the frozen list -----------------------------------------

COMMANDS = (
    r"""
python -m diffusion.colab_train_eco --max_steps 500 --save_interval 100 --log_interval 10 --compile
python -m colab_train_eco --max_steps 500 --save_interval 100 --log_interval 10 --compile
python -m diffusion.sample_eco_hybrid --ckpt checkpoints/eco_hybrid_hi/latest.pt \
  --tokenizer data/tokenizer/aria_hindi.model --prompt "mai kal bazaar gaya tha" \
  --max_new_tokens 80 --steps 12 --temperature 1.0 --top_k 50
python -m train --d_model 384 --n_layers 8 --memory_slots 8 --seq_len 384 --lr 2e-4
python -m sample --ckpt x --steps 16 --temperature 0.8 --top_k 30
python -m diffusion.train_diffusion --data_dir data/processed \
  --output_dir checkpoints/diffusion_hi --seq_len 512 --batch_size 4 --grad_accum 8 \
  --max_steps 5000 --time_mode continuous --timestep_sampling stratified --masking_strategy span
python -m diffusion.train_eco_hybrid --data_dir data/processed \
  --output_dir checkpoints/eco_hybrid_hi --seq_len 512 --batch_size 4 --grad_accum 8 \
  --max_steps 5000 --time_mode continuous \
  --timestep_sampling stratified --masking_strategy span
python -m diffusion.sample_diffusion --ckpt checkpoints/diffusion_hi/latest.pt \
  --tokenizer data/tokenizer/aria_hindi.model --prompt "mai kal bazaar gaya tha" \
  --max_new_tokens 128 --steps 16
python -m train --model primary --data_dir data/processed --output_dir checkpoints/eco_hybrid_hi \
  --edge_profile laptop --max_steps 5000
python -m train --model backup --data_dir data/processed --output_dir checkpoints/diffusion_hi \
  --edge_profile laptop --max_steps 5000
python -m sample --ckpt checkpoints/eco_hybrid_hi/latest.pt \
  --tokenizer data/tokenizer/aria_hindi.model --model primary --prompt "mai kal bazaar gaya tha" \
  --max_new_tokens 128 --edge_profile max --blockwise --frozen_context --min_decode_layers 3
python -m sample --ckpt checkpoints/eco_hybrid_hi/latest.pt \
  --tokenizer data/tokenizer/aria_hindi.model --model primary --prompt "namaste" \
  --max_new_tokens 128 --blockwise --frozen_context --benchmark_runs 5 --warmup_runs 1
python -m edge_benchmark --ckpt checkpoints/eco_hybrid_hi/latest.pt \
  --tokenizer data/tokenizer/aria_hindi.model --model primary --modes full block block_frozen \
  --runs_per_prompt 3
python -m diffusion.run_experiments --data_dir data/processed \
  --output_root checkpoints/ablations --max_steps 2000 --d_model 384 --n_layers 8 --n_heads 8 \
  --d_ff 1024 --execute
python train.py --config micro --cpu --name my-first-model
python sample.py checkpoints/last.ckpt --num_samples 3 --seq_len 128 --num_steps 20
python train.py --config micro --cpu --resume checkpoints/last.ckpt
python train.py --config micro --cpu --resume checkpoints/best-base.ckpt --name prompt-finetuning
python sample.py checkpoints/sunfish-epoch=00-step=5000.ckpt --num_samples 1 --seq_len 64 \
  --num_steps 10
""".replace("\\\n", "")
    .strip()
    .split("\n")
)


@pytest.mark.parametrize("line", COMMANDS)
def test_documented_commands_parse(line):
    words = shlex.split(line)[1:]
    name = words.pop(1) if words[0] == "-m" else words[0].removesuffix(".py")
    old, name = name.startswith("diffusion."), name.removeprefix("diffusion.")
    prog = {"train_": "train", "sample": "sample"}.get(name[:6], name)
    pinned = {"model": "backup" if name.endswith("_diffusion") else "primary"} if old else None
    args, origins = parse(config.COMMANDS[prog], words[1:], prog, pinned=pinned)
    assert sum(word.startswith("--") for word in words) <= sum(
        o == "flag" for o in origins.values()
    )
    if prog == "sample":
        assert args.ckpt == next(w for w in words[1:] if w != "--ckpt")


@pytest.mark.parametrize(
    "line, optimizer, rate",
    [
        ("", "muon", config.RATES["muon"]),
        ("--edge_profile laptop", "muon", config.RATES["muon"]),
        ("--optimizer lion", "lion", config.RATES["lion"]),
        ("--fsdp --optimizer lion", "lion", config.RATES["lion"]),
        ("--fsdp", "adamw", config.RATES["adamw"]),
        ("--optimizer adamw --lr 0.5", "adamw", 0.5),
        ("--preset tiny", "adamw", config.PRESETS["tiny"]["lr"]),
        ("--preset tiny --optimizer muon", "muon", config.RATES["muon"]),
        ("--preset starter --optimizer lion", "lion", config.RATES["lion"]),
        ("--preset starter --fsdp --lr 0.5", "adamw", 0.5),
    ],
)
def test_an_optimizer_brings_its_own_rate(line, optimizer, rate):
    """Unless a rate was given with it; --fsdp takes what works on cut matrices, unless told
    otherwise.
    """
    args, _ = parse(TrainArgs, line)
    assert (args.optimizer, args.lr) == (optimizer, rate)


def test_values_of_documented_commands():
    args, _ = parse(TrainArgs, "--edge_profile laptop --model eco_hybrid")
    assert (args.d_model, args.n_layers, args.n_heads, args.d_ff, args.memory_slots) == (
        320, 8, 8, 960, 12,
    )
    assert (args.timesteps, args.sample_steps, args.seq_len, args.time_mode) == (
        24, 10, 512, "continuous",
    )
    assert (args.timestep_sampling, args.masking_strategy, args.mean_span_length) == (
        "stratified", "token", 3.0,
    )
    args, _ = parse(SampleArgs, "x --edge_profile max --steps 9")
    assert (args.steps, args.temperature, args.temperature_end, args.top_k, args.block_size) == (
        9, 0, None, 0, 0,
    )
    assert (args.sampler, args.threshold, args.blockwise, args.frozen_context) == (
        "threshold", 0.9, True, True,
    )
    args, _ = parse(SampleArgs, "x --prompt एक --prompt='--दो' --seed=3")
    assert args.prompt == ("एक", "--दो") and args.seed == 3
    args, _ = parse(BenchArgs, "--ckpt x --modes full,block --prompt a")
    assert (args.modes, args.temperature, args.top_k, args.warmup_runs) == (
        ("full", "block"),
        0.0,
        0,
        1,
    )
    args, _ = parse(PrepareArgs, "--source files --input a,b.txt 'c d.jsonl' --force")
    assert args.input == ("a,b.txt", "c d.jsonl") and args.force
    assert parse(TrainArgs, "--warmup-steps -1 --train_block_sizes T,900,32")[0].block_choices == [
        512, 512, 32,
    ]
    assert [parse(TrainArgs, f"--max_steps {n}")[0].warmup for n in (100, 6000, 50_000)] == [
        5, 300, 300,
    ]


def test_run_folders():
    for line, folder in (
        ("", "checkpoints/eco_hybrid_hi"),
        ("--model diffusion", "checkpoints/diffusion_hi"),
        ("--name day1", "checkpoints/day1"),
        ("--out-dir 'a b'", "a b"),
    ):
        assert parse(TrainArgs, line)[0].run_dir == Path(folder)


def test_a_wrapper_cannot_be_contradicted():
    pinned = {"model": "backup"}
    args, origins = parse(TrainArgs, "--preset nano", pinned=pinned)
    assert (args.model, args.d_ff, origins["model"]) == ("backup", 192, "command")
    assert args.run_dir == Path("checkpoints/diffusion_hi")
    assert parse(TrainArgs, "--model diffusion", pinned=pinned)[0].model == "backup"
    refused(
        TrainArgs, "--model eco", "--model primary", "--model backup", "python -m train",
        pinned=pinned,
    )
    refused(SampleArgs, "x --model=primary", "--model backup", pinned=pinned)


def frozen_flags():
    return "".join(
        f"{prog} {' '.join(names)} {kind or 'switch'} [{default}]\n"
        for prog, cls in config.COMMANDS.items()
        for _, names, kind, default, _, _ in describe(cls)
    )


def test_flags_are_frozen():
    assert frozen_flags() == FLAGS.read_text(encoding="utf-8"), (
        "wanted? then python tests/test_config.py"
    )


def test_help_and_table_come_from_the_declarations():
    for prog, cls in config.COMMANDS.items():
        whole, table = help_text(cls, prog), flags.table(cls)
        words = " ".join(whole.split())                             # as the text is wrapped
        for f in dataclasses.fields(cls):
            assert (
                f"--{f.name}" in whole
                and f"`--{f.name}`" in table
                and " ".join(f.metadata["help"].split()) in words
            )
        assert all(line.count("|") == 5 for line in table.split("\n"))
    assert help_text(TrainArgs, "train", everything=False).count("\n  --") <= 42


@pytest.mark.parametrize("prog, cls", config.COMMANDS.items())
def test_help_begins_with_usage_and_examples_and_ends_with_what_all_share(prog, cls):
    for everything in (False, True):
        lines = help_text(cls, prog, everything).split("\n")
        assert max(map(len, lines)) <= 80 and lines[0].startswith(f"usage: python -m {prog} ")
        groups = [line for line in lines[1:] if re.match(r"[A-Z][\w ]+$", line)]
        own = cls.__doc__ if "__doc__" in vars(cls) and len(cls.__doc__) < 30 else groups[1]
        assert (
            groups[0] == "Examples"
            and groups[-1] == "Everywhere"
            and len(set(groups)) == len(groups)
        )
        assert own in groups[1:3], f"{own} is not the first: {groups}"
    commands = [shlex.split(command) for command, _ in cls.examples]
    assert 2 <= len(commands) <= 4
    for words in commands:
        assert words[:3] == ["python", "-m", prog]
        cli.parse(cls, words[3:], prog)                             # a usage error raises


@pytest.mark.parametrize("prog", config.COMMANDS)
def test_every_command_tells_its_version_and_can_be_quiet(prog, capsys, monkeypatch):
    cls = config.COMMANDS[prog]
    with pytest.raises(SystemExit) as end:
        cli.parse(cls, ["--no_such_flag", "--version"], prog)
    told = capsys.readouterr()
    assert (
        end.value.code == 0
        and re.fullmatch(r"Aria \d+\.\d+( \(commit [0-9a-f]{7,}\+?\))?\n", told.out)
        and not told.err
    )
    words = shlex.split(cls.examples[0][0])[3:]
    for typed, heard in (([], 3), (["--quiet"], 2)):
        cli.parse(cls, [*words, *typed], prog)
        for line in ("step 3 of 4", "warning: the disk is slow", "notice: synthetic text"):
            say(line)
        assert len(capsys.readouterr().err.splitlines()) == heard


def test_the_version_names_the_commit_only_inside_git(monkeypatch):
    monkeypatch.setattr(cli, "commit_hash", lambda folder: "unknown")
    assert cli.version() == f"Aria {config.VERSION}"
    monkeypatch.setattr(cli, "commit_hash", lambda folder: "0123abc")
    assert cli.version() == f"Aria {config.VERSION} (commit 0123abc)"


def test_announce_shows_origins_and_print_config_ends(capsys, tmp_path):
    args, origins = parse(TrainArgs, "--preset nano --lr 0.5")
    cli.announce(args, origins)
    err = capsys.readouterr().err
    assert err == "settings: preset=nano, lr=0.5 (all of them: --print_config)\n", (
        "a preset's own values are not repeated"
    )
    cli.announce(
        *parse(TrainArgs, "--preset starter --optimizer adamw --wandb --wandb_name 'a\x1b[2Jb'")
    )
    err = capsys.readouterr().err
    assert (
        "lr=0.002 (flag: that of adamw)" in err
        and "\x1b" not in err
        and "d_model" not in err
        and err.count("\n") == 1
    )
    cli.announce(*parse(TrainArgs, ""))
    assert "settings: all defaults" in capsys.readouterr().err
    (tmp_path / "meta.json").write_text('{"vocab_size": 2048}')
    args, origins = parse(
        TrainArgs, f"--preset nano --print_config --model backup --data_dir '{tmp_path}'"
    )
    with pytest.raises(SystemExit) as end:
        cli.announce(args, origins)
    out = capsys.readouterr().out
    assert end.value.code == 0 and "291,328" in out
    assert all(f"\n{f.name} " in "\n" + out for f in dataclasses.fields(args))


ENTRY = [prog for prog in config.COMMANDS if (ROOT / f"{prog}.py").exists()]


@pytest.mark.parametrize("prog", ENTRY)
def test_help_is_instant_and_needs_no_torch(prog):
    start = os.times()
    done = subprocess.run(
        [sys.executable, "-m", prog, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    end = os.times()  # of the processor: a busy machine is no fault of ours
    assert done.returncode == 0 and f"usage: python -m {prog}" in done.stdout, done.stderr
    assert (
        end.children_user + end.children_system - start.children_user - start.children_system < 0.5
    )
    code = "import runpy, sys\n" \
           "for flag in ('--help', '--version'):\n" \
           f"    sys.argv = ['{prog}', flag]\n" \
           f"    try: runpy.run_module('{prog}', run_name='__main__')\n" \
           "    except SystemExit: pass\n" \
           "assert not {'torch', 'numpy'} & set(sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True
        ).returncode
        == 0
    )


@pytest.mark.parametrize(
    "shim", sorted(p.stem for p in (ROOT / "diffusion").glob("[a-z]*.py"))
)
def test_old_names_run_as_module_and_as_file(shim):
    target = next(
        prog
        for prog in ("train", "sample", "colab_train_eco", "run_experiments")
        if shim.startswith(prog)
    )
    if target not in ENTRY:
        pytest.skip(f"{target}.py does not exist yet")
    outputs = {
        subprocess.run(
            [sys.executable, *how, "--help"], cwd=ROOT, capture_output=True, text=True
        ).stdout
        for how in (["-m", f"diffusion.{shim}"], [f"diffusion/{shim}.py"])
    }
    assert outputs == {help_text(config.COMMANDS[target], target, everything=False) + "\n"}
    if target in ("train", "sample"):
        wrong = "primary" if shim.endswith("_diffusion") else "backup"
        argv = [sys.executable, "-m", f"diffusion.{shim}", "--ckpt", "x", "--model", wrong]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert (
            done.returncode == 2 and "contradicts" in done.stderr and "Traceback" not in done.stderr
        )


if __name__ == "__main__":
    FLAGS.write_text(frozen_flags(), encoding="utf-8")
    print(f"wrote {FLAGS}")


def test_a_result_never_takes_the_place_of_a_link_a_device_or_a_pipe(tmp_path):
    """A file that is written aside and renamed would: as root, /dev/null would be a file from then
    on.
    """
    real, link, pipe, full = (
        tmp_path / name for name in ("real.json", "link.json", "pipe", "full.json")
    )
    real.write_text("old", encoding="utf-8")
    link.symlink_to(real)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    full.symlink_to("/dev/full")  # what stands for /dev/null: no test may touch the real one
    for path in (link, pipe):
        args = SimpleNamespace(out_json=path)
        can_write(args, "out_json")
        write_json(path, {"a": 1})
    assert link.is_symlink() and json.loads(real.read_text(encoding="utf-8")) == {"a": 1}
    assert stat.S_ISFIFO(pipe.stat().st_mode) and json.loads(os.read(reader, 99)) == {"a": 1}
    os.close(reader)
    with pytest.raises(UserError, match="full.json"):        # written into: there is no room in it
        write_json(full, {"a": 1})
    assert full.is_symlink()
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp-")]
    with pytest.raises(UserError, match="out_json"):
        can_write(SimpleNamespace(out_json=tmp_path), "out_json")


def test_a_run_folder_needs_a_name_in_utf8(capsys):
    """The library that reads tensors opens no other: said before the training, not after it."""
    for flag in ("--output_dir", "--run_name"):
        with pytest.raises(UserError, match=f"{flag} .*not UTF-8"):
            cli.parse(config.TrainArgs, [flag, "run\udcff"], "train")
    cli.parse(config.TrainArgs, ["--output_dir", "रन"], "train")
