"""A folder for transformers is the trained model: one file of code that needs no Aria, the same
ids, the same logits, the same text.
"""
import ast
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import aria, tree
from stand_in_models import models_hub
from tiny import tiny_model

import checkpoint
import cli
import config
from common.console import UserError
from common.files import ROOT, folder_aside, write_json
from hf import card, folder, join
from hf.awkward import awkward_strings
from hf.tokenizer_json import special_pieces, tokenizer_json
from sampling import decode
from sampling.settings import opening
from sampling.torch_model import TorchModel
from text.tokenizer import EOS, Tokenizer, normalise, train_tokenizer

BLOCK = 8


@pytest.fixture(scope="module")
def tokenizer(corpus_dir):
    return Tokenizer(corpus_dir / "data/tokenizer/aria_hindi.model")


# ---- one file ------------------------------------------------------------------------------------

def test_the_joined_file_needs_nothing_of_ours():
    source = join.joined(join.FILES, "head")
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    assert roots == {"copy", "math", "torch", "transformers", "types", "typing"}
    # undefined and unused names, redefinitions
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "-"],
        input=source, capture_output=True, text=True, encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_joined_file_has_what_it_uses_and_no_more():
    """The functions of training, which no exported model needs, stay at home."""
    source = join.joined(join.FILES, "head")
    at_home = {"first_weights"}     # for --fsdp
    assert "def attention_heads(" in source and "def build_model(" in source
    assert "def train_flops(" not in source and "class ModelConfig" not in source
    for name in ("layers", "eco_hybrid", "attention", "model"):
        tops = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")).body
        for node in tops:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
                kept = ast.get_source_segment(text, node) in source
                assert kept == (node.name not in at_home), node.name


def test_a_name_of_ours_that_is_missing_shows():
    with pytest.raises(AssertionError, match="build_model"):
        join.joined(["model_config.py", "layers.py", "hf/modeling.py"], "head")


# ---- ids -----------------------------------------------------------------------------------------

def exact(tokenizer, framed=False):
    """tokenizer.json as the package tokenizers reads it."""
    tokenizers = pytest.importorskip("tokenizers", reason="only a folder for transformers needs it")
    return tokenizers.Tokenizer.from_str(tokenizer_json(tokenizer, framed))


def test_ids_are_ours_on_awkward_strings(tokenizer):
    theirs = exact(tokenizer)
    strings = [*awkward_strings(5000, 7), "", " ", "\n\n", "\r", "a" * 3000, "कि" * 2000]
    for text in strings:
        assert theirs.normalizer.normalize_str(text) == normalise(text).replace(" ", "\u2581")
        assert theirs.encode(text).ids == [tokenizer.bos_id, *tokenizer.encode(text)], ascii(text)
    for text in strings[:500]:
        ids = tokenizer.encode(text)
        assert theirs.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)


def test_a_prompt_of_a_model_of_pairs_has_an_end(tokenizer):
    theirs = exact(tokenizer, framed=True)
    for text in awkward_strings(100, 2):
        assert theirs.encode(text).ids == opening(tokenizer, text, framed=True)


def test_no_text_is_a_special_piece(tokenizer):
    theirs = exact(tokenizer)
    names = special_pieces(tokenizer)
    assert set(names) == {0, 1, 2, 3, tokenizer.vocab_size}
    for number, name in names.items():
        assert theirs.token_to_id(name) == number
        for text in (name, f"क{name} {name}\n", name * 3):
            assert not set(names) & set(theirs.encode(text).ids[1:]), text


def test_gpt2s_tokenizer_too():
    gpt2 = pytest.importorskip("text.gpt2")
    pytest.importorskip("tokenizers", reason="GPT-2's text needs it")
    tokenizer = gpt2.Gpt2Tokenizer()
    theirs = exact(tokenizer)
    for text in ["<|endoftext|> <|mask|>", "Hello  world\n\n 123", *awkward_strings(300, 1)]:
        assert theirs.encode(text).ids == [tokenizer.bos_id, *tokenizer.encode(text)], ascii(text)


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    lines = ["मैं कल बाज़ार गया था और मिठाई लाया।", "the weather is nice today"] * 50
    tokenizer = train_tokenizer(lines, tmp_path / "u.model", 350, "unigram")
    with pytest.raises(UserError, match="unigram.*--format onnx"):
        tokenizer_json(tokenizer, False)


# ---- the folder ----------------------------------------------------------------------------------

def arguments(*words):
    return cli.parse(config.ExportArgs, ["--format", "hf", *map(str, words)], "export")[0]


def test_what_goes_wrong_leaves_nothing(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("whole")
    with pytest.raises(UserError, match="on purpose"), folder_aside(output) as aside:
        aside.mkdir()
        (aside / "new").write_text("half")
        raise UserError("on purpose")
    assert tree(tmp_path).keys() == {"out/old"}
    with folder_aside(output) as aside:
        aside.mkdir()
        (aside / "new").write_text("whole")
    assert tree(tmp_path).keys() == {"out/new"}


def test_apart_sees_every_difference():
    right = torch.tensor([[1.0, -2.0, -torch.inf]])
    assert folder.apart(right.clone(), right) == 0
    assert folder.apart(right + torch.tensor([0, 1e-3, 0]), right) == pytest.approx(5e-4, rel=1e-3)
    for other in (right[:, :2], torch.zeros(1, 3), right * torch.nan):
        assert folder.apart(other, right) == float("inf")


def test_the_card_says_what_is_known(here, tmp_path):
    args = arguments("checkpoints/eco_hybrid_hi", "--licence", "apache-2.0")
    model, tokenizer, saved = checkpoint.load_model(args.ckpt, "cpu", config.check_saved)
    figures = {"step": saved.step, "bound": {
        "1": {"documents": 3, "nats": 2.5, "bits_per_byte": 0.75},
        "32": {"documents": 3, "nats": 3.5, "bits_per_byte": 1.25},
    }}
    args.figures = str(tmp_path / "figures.json")
    write_json(args.figures, figures)
    text = card.model_card(args, "tiny", model, tokenizer, saved)
    assert text.startswith("---\nlanguage:\n- hi\n- en\nlicense: apache-2.0\n")
    assert "starter corpus" in text and "Written for Aria" in text
    assert "| 1 | exact, left to right | 3 | 2.5000 | 0.7500 |" in text
    assert "| 32 | upper bound | 3 | 3.5000 | 1.2500 |" in text
    assert "## हिन्दी" in text and "{" not in text

    write_json(args.figures, figures | {"step": saved.step + 1})
    with pytest.raises(UserError, match="--out_json"):
        card.model_card(args, "tiny", model, tokenizer, saved)
    args.licence = args.figures = None
    without = card.model_card(args, "tiny", model, tokenizer, saved)
    assert "license:" not in without and "No licence has been chosen" in without
    assert "exact, left to right" not in without


@pytest.mark.parametrize("words, wanted", [
    (("--licence", "mit"), "--licence is for the model card"),
    (("--figures", "x.json"), "--figures is for the model card"),
    (("--format", "hf", "--licence", "My Own"), "as the hub does"),
])
def test_usage_errors(words, wanted):
    with pytest.raises(UserError, match=wanted):
        cli.parse(config.ExportArgs, ["run", *words], "export")


# A user of transformers, in a process that cannot find Aria.
USER = """
import json, os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerFast

tensors, texts = {}, {}
for name in ("primary", "backup"):
    asked = json.load(open(name + ".json"))
    try:
        AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
        sys.exit("code of the folder ran without leave")
    except ValueError:
        pass
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    filling = AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=True)
    ids, masked = torch.tensor(asked["ids"]), torch.tensor(asked["masked"])
    with torch.no_grad():
        tensors[name + ".next"] = model(input_ids=ids).logits
        tensors[name + ".masked"] = filling(input_ids=masked).logits
    texts[name] = {}
    for block in asked["blocks"]:
        text = model.generate(ids[:, :9], max_new_tokens=20, block_size=block, temperature=0)
        texts[name][block] = text.tolist()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
    texts[name]["strings"] = tokenizer(asked["strings"])["input_ids"]
    texts[name]["drawn"] = [
        model.generate(ids[:, :9], generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in (1, 1, 2)
    ]
    pads = torch.ones_like(ids)
    pads[0, 0] = 0
    try:
        model.generate(ids, attention_mask=pads)
        sys.exit("pads were read as text")
    except ValueError:
        pass
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [parameter.grad is not None for parameter in model.parameters()]
    assert all(gradients)
    assert not any(module.startswith(("eco_hybrid", "hf", "checkpoint")) for module in sys.modules)
save_file(tensors, "found.safetensors")
json.dump(texts, open("found.json", "w"))
"""


@torch.no_grad()
def test_transformers_loads_the_trained_model(here, tmp_path):
    """The command's folder, which it also publishes, and one of the other model with another
    attention.
    """
    pytest.importorskip("transformers", reason="only a folder for it needs it")
    with models_hub("hf_secret", "me") as hub:
        done = aria(
            "export", "checkpoints/eco_hybrid_hi", "--format", "hf", "--output",
            tmp_path / "primary", "--push", "me/tiny", "--threads", 1,
            cwd=here, check=0, env=hub.environment(tmp_path / "home"),
        )
    assert "our ids for" in done.stderr and "apart at most" in done.stderr
    [(commit, files)] = hub.repositories["me/tiny"]
    assert done.stdout.split() == [str(tmp_path / "primary"), f"hf:me/tiny@{commit}"]
    assert files.keys() == {path.name for path in (tmp_path / "primary").iterdir()}
    assert "hf_secret" not in done.stdout + done.stderr
    assert (tmp_path / "primary/model.safetensors").stat().st_mode & 0o777 == 0o644
    primary, tokenizer, saved = checkpoint.load_model(
        "checkpoints/eco_hybrid_hi", "cpu", config.check_saved
    )
    backup = tiny_model("backup", tokenizer.vocab_size, away=0.1, n_heads=4, attn="gqa",
                        kv_heads=2, null_attn=True, learned_temp=True)
    saved.config["model"] = backup.cfg.to_dict()
    folder.write_folder(tmp_path / "backup", backup, tokenizer, saved, "a card")

    models = {"primary": primary, "backup": backup}
    rows = np.random.default_rng(0).integers(4, tokenizer.vocab_size, (3, 40))
    half = rows.copy()
    half[:, 1::3] = tokenizer.vocab_size
    asked = {"ids": rows.tolist(), "masked": half.tolist(), "blocks": [1, BLOCK],
             "strings": awkward_strings(300, 3)}
    for name in models:
        (tmp_path / f"{name}.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, "-I", "-c", USER], cwd=tmp_path, capture_output=True, text=True,
        encoding="utf-8", stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr[-3000:]

    from safetensors.torch import load_file
    logits = load_file(tmp_path / "found.safetensors")
    texts = json.loads((tmp_path / "found.json").read_text())
    for name, model in models.items():
        for kind, right in folder.our_logits(model, asked).items():
            assert folder.apart(logits[f"{name}.{kind}"], right) <= 1e-5, (name, kind)
        for block in asked["blocks"]:
            written = texts[name][str(block)]
            for row, theirs in zip(rows, written, strict=True):
                theirs = [token for token in theirs if token != tokenizer.pad_id]
                ours = our_text(model, row[:9].tolist(), block)
                assert theirs == ours, (name, block)
        for text, ids in zip(asked["strings"], texts[name]["strings"], strict=True):
            assert ids == [tokenizer.bos_id, *tokenizer.encode(text)], ascii(text)
        first, again, other = texts[name]["drawn"]
        assert first == again != other


def our_text(model, prompt, block):
    how = folder.settings.Settings(
        max_new_tokens=20, steps=block, mode="block_frozen", block_size=block, sampler="threshold",
        temperature=0, eos_id=EOS,
    )
    return prompt + decode.generate(TorchModel(model), prompt, how, [0]).full_rows[0]
