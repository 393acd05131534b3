"""Fine-tuning from a base: adapters that begin as nothing, are merged into nothing else than what
was trained, and leave the base as it is; or all weights.
"""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from tiny import half_masked, tiny_model

import checkpoint
import config
import conftest
import evaluate
import export
import lora
import sample
import train
from conftest import log, tree
from edge import checks, engine
from sampling.torch_model import TorchModel
from text.build import build

SHAPE = ("--d_model", 16, "--n_layers", 2, "--n_heads", 2, "--d_ff", 32, "--memory_slots", 2)
RUN = (
    "--seq_len", 32, "--batch_size", 4, "--grad_accum", 2, "--train_block_sizes", "T,8",
    "--ar_fade", 0, "--lr", 3e-3, "--eval_batches", 1, "--threads", 1, "--no_amp", "--live", "off",
    "--no_show_samples", "--save_interval", 2, "--eval_interval", 2,
)
KINDS = ("primary", "backup")


def call(*words, main=train.main):
    return conftest.call(main, *words)


@pytest.fixture(scope="module")
def bases(text, tmp_path_factory):
    """A trained model of each kind, which no test may change."""
    home = tmp_path_factory.mktemp("bases")
    for kind in KINDS:
        words = ("--model", kind, *SHAPE, *RUN, "--max_steps", 2)
        assert call("--data_dir", text, "--output_dir", home / kind, *words) == 0
    before = tree(home)
    yield home
    assert tree(home) == before, "the base was written to"


@pytest.fixture(scope="module")
def tuned(bases, text, tmp_path_factory):
    """Adapters beside each of them, four steps in one go."""
    home = tmp_path_factory.mktemp("tuned")
    for kind in KINDS:
        words = ("--ckpt", bases / kind, "--lora_rank", 3, *RUN, "--max_steps", 4)
        assert call("--data_dir", text, "--output_dir", home / kind, *words) == 0
    return home


# ---- the adapters --------------------------------------------------------------------------------

def outputs(net):
    """The logits of both streams."""
    x0, xt = half_masked(20)
    (clean, noisy), = net.both_states(x0, xt, 8, 5)
    return net.logits(torch.cat((clean, noisy)))[..., 1:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_begin_as_nothing_and_merge_into_what_they_computed(kind):
    net = tiny_model(kind, away=0.1)
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    before = outputs(net)
    lora.adapt(net, 3)
    after = outputs(net)
    assert torch.equal(after, before)

    # only they learn, and each of them can
    after.square().mean().backward()
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    assert learning == set(lora.own_tensors(net)) and len(learning) >= 4 * net.cfg.n_layers
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == (
        lora.trained_parameters(net.cfg, 3)
    )
    for name, p in net.named_parameters():
        assert (p.grad is not None) == (name in learning)
        assert not name.endswith("lora_b") or p.grad.any()

    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("lora_b"):
                p.normal_()
    moved = outputs(net)
    plain = tiny_model(kind)
    checkpoint.load_into(plain, lora.merged(base, lora.own_tensors(net)))
    assert (moved - before).abs().max() > 0.1
    assert (outputs(plain) - moved).abs().max() <= 1e-5 * moved.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_begins_with_its_base_and_holds_the_adapters_alone(bases, tuned, kind):
    """The shape comes with the base; held-out text costs the same at step 0, to the last digit."""
    first, *_, last = [event["val_nelbo"] for event in log(tuned / kind, "eval")]
    assert first == log(bases / kind, "eval")[-1]["val_nelbo"] != last

    saved = checkpoint.load(tuned / kind)
    assert all(".lora_" in name for name in saved.model)
    net, _, _ = checkpoint.load_model(tuned / kind, "cpu", config.check_saved)
    base, _, _ = checkpoint.load_model(bases / kind, "cpu", config.check_saved)
    assert net.cfg == base.cfg
    different = set()
    for name, tensor in net.state_dict().items():
        if not torch.equal(tensor, base.state_dict()[name]):
            different.add(name)
    matrices = {name.rsplit(".", 1)[0] + ".weight" for name in saved.model}
    assert different == matrices


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_holds_the_adapters(tuned, tmp_path, kind):
    """What they have learned, merged: its logits are the run's."""
    pytest.importorskip("onnx", reason="only exporting needs it")
    folder = tmp_path / "exported"
    words = ("--ckpt", tuned / kind, "--bits", 32, "--output", folder, "--threads", 1)
    assert call(*words, main=export.main) == 0
    net, _, _ = checkpoint.load_model(tuned / kind, "cpu", config.check_saved)
    ids = np.arange(4, 20)[None]
    largest, _ = checks.difference(engine.load(folder, 1), TorchModel(net), ids)
    assert largest < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_adapters_are_those_of_one_go(tuned, tmp_path, kind):
    run = tmp_path / "run"
    words = ("--output_dir", run, "--threads", 1, "--no_show_samples")
    assert call("--resume", tuned / kind / "step_000002", *words) == 0
    whole = sorted((tuned / kind / "step_000004").glob("*.safetensors"))
    assert [path.stem for path in whole] == ["model", "optimizer"]
    for path in whole:
        assert (run / "step_000004" / path.name).read_bytes() == path.read_bytes()


# ---- what is refused -----------------------------------------------------------------------------

def refused(capsys, *words, main=train.main):
    """The one sentence that a command ends with."""
    capsys.readouterr()
    assert call(*words, main=main) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return error


@pytest.mark.parametrize("words, says", [
    (("--lora_rank", 3), "name it with --ckpt PATH"),
    (("--resume", "BASE", "--lora_rank", 3), "--ckpt instead of --resume"),
    (("--ckpt", "BASE", "--lora_rank", 3, "--run_name", "primary"), "add --run_name NEW"),
    (("--ckpt", "TUNED", "--lora_rank", 3), "is adapters itself"),
    (("--resume", "TUNED", "--lora_rank", 2), "but the checkpoint has 3"),
    (("--ckpt", "BASE", "--d_model", 32), "does not fit the model"),
])
def test_what_does_not_fit_together_is_said(bases, tuned, text, monkeypatch, tmp_path, capsys,
                                            words, says):
    (tmp_path / "checkpoints").symlink_to(bases)
    monkeypatch.chdir(tmp_path)
    paths = {"BASE": bases / "primary", "TUNED": tuned / "primary"}
    words = [paths.get(word, word) for word in words]
    if "--run_name" not in words:
        words += ["--run_name", "new"]
    capsys.readouterr()
    assert call("--data_dir", text, *words) == 2
    assert says in capsys.readouterr().err
    assert not (bases / "new").exists()


@pytest.mark.parametrize("flag", [("--ema", 0.9), ("--param_dtype", "bf16"), ("--fsdp",)])
def test_what_adapters_do_not_go_with_is_said(bases, capsys, flag):
    with pytest.raises(train.cli.UserError, match=f"--lora_rank and {flag[0]}: give only one"):
        train.main(["--ckpt", str(bases / "primary"), "--lora_rank", "3", *map(str, flag)])


def test_a_base_that_is_gone_or_has_changed_is_said(bases, text, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(bases / "primary", base)
    train_words = ("--data_dir", text, *RUN, "--max_steps", 2, "--eval_interval", 0)
    run = tmp_path / "run"
    assert call(*train_words, "--ckpt", base, "--lora_rank", 2, "--output_dir", run) == 0
    assert call(run, "--max_new_tokens", 2, main=sample.main) == 0

    base.rename(tmp_path / "elsewhere")
    for main, words in ((sample.main, (run,)), (train.main, ("--resume", run, "--max_steps", 4))):
        error = refused(capsys, *words, main=main)
        assert "their base cannot be read: there is no checkpoint" in error
    assert call(*train_words, *SHAPE, "--output_dir", base, "--seed", 5) == 0
    assert "whose weights are others now" in refused(capsys, run, main=sample.main)


# ---- pairs beside a base of documents ------------------------------------------------------------

def pairs_for(folder, tokenizer):
    """A few pairs in the pieces of this tokenizer."""
    lines = []
    for number in range(60):
        pair = {"prompt": f"ek {number}", "response": f"do {number} aur teen"}
        lines.append(json.dumps(pair))
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    args = config.PrepareArgs(
        source="pairs", input=(str(folder / "pairs.jsonl"),), data_dir=str(folder),
        tokenizer=str(tokenizer), pair_tokens=32,
    )
    build(args, [].append)
    return folder


def test_pairs_in_the_pieces_of_the_base(bases, text, tmp_path, capsys):
    base = bases / "primary"
    own = pairs_for(tmp_path / "own", tmp_path / "own.model")
    words = ("--ckpt", base, "--output_dir", tmp_path / "run", *RUN, "--max_steps", 2)
    error = refused(capsys, *words, "--data_dir", own)
    assert re.search(r"own has a tokenizer of .* --tokenizer \S+step_000002/tokenizer.model", error)

    # both ways of fine-tuning; how much of the base's text is forgotten is asked of each
    pairs = pairs_for(tmp_path / "pairs", base / "step_000002/tokenizer.model")
    assert call(*words, "--data_dir", pairs) == 0
    lora_words = ("--lora_rank", 2, "--output_dir", tmp_path / "adapters")
    assert call(*words, *lora_words, "--data_dir", pairs) == 0

    found = {}
    for run in (base, tmp_path / "run", tmp_path / "adapters"):
        for data in (text, pairs):
            out = tmp_path / "out.json"
            flags = ("--data_dir", data, "--blocks", "8,1", "--chain_docs", 1, "--out_json", out)
            flags += ("--repeats", 1, "--draws", 1, "--max_docs", 10)
            assert call("--ckpt", run, *flags, main=evaluate.main) == 0
            bound = json.loads(out.read_text())["bound"]
            found[run.name, data.name] = {b: figures["nats"] for b, figures in bound.items()}
    for name in ("run", "adapters"):
        summary = (tmp_path / name / "summary.md").read_text(encoding="utf-8")
        assert f"forgotten: python -m evaluate --data_dir {text} --ckpt" in summary
        assert set(found[name, pairs.name]) == {"1"}
        assert found[name, pairs.name]["1"] < found["primary", pairs.name]["1"]
        assert 0 < abs(found[name, text.name]["8"] - found["primary", text.name]["8"]) < 1


def test_a_fork_restores_everything_and_may_change_the_text(bases, tmp_path):
    """--resume with a new folder, and pairs: the optimizer goes on, unless it is told not to."""
    pairs = pairs_for(tmp_path / "pairs", bases / "primary/step_000002/tokenizer.model")
    words = ("--resume", bases / "primary", "--data_dir", pairs, "--max_steps", 3, "--threads", 1)
    steps = {}
    for name, more in (("fork", ()), ("fresh", ("--reset_optimizer",))):
        assert call(*words, *more, "--output_dir", tmp_path / name, "--no_show_samples") == 0
        saved = checkpoint.load(tmp_path / name, parts=checkpoint.PARTS)
        assert saved.step == 3
        [steps[name]] = {int(t) for key, t in saved.optimizer.items() if key.endswith(".step")}
    assert steps == {"fork": 3, "fresh": 1}
