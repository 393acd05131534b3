"""The control arm, --objective ar: the clean stream alone of either network; exact, with the same
cache, trainer, resume and commands as the diffusion models.
"""
import json
import math
import shutil

import pytest
import torch
from test_train import curve, fresh, weights
from tiny import tiny_model

import checkpoint
import config
import edge_benchmark
import masking
import sample
import train
from common.console import UserError
from conftest import call
from evaluation import check_run, estimators, study_report
from sampling import decode
from sampling.decode import generate
from sampling.settings import Settings
from sampling.torch_model import TorchModel
from training.optim import make_optimizer

V = 23
MODELS = ("primary", "backup")
both = pytest.mark.parametrize("model", MODELS)


def tiny(model, **changes):
    return tiny_model(model, V, causal=True, away=0.1, **changes)


def some(rows, length):
    return torch.randint(4, V, (rows, length), generator=torch.Generator().manual_seed(1))


def whole(net, x0):
    """Logits (B, T, V + 1) of every token, in one pass without a cache."""
    return net.logits(net.clean_states(x0))


@both
@torch.no_grad()
def test_a_later_token_changes_no_earlier_answer(model):
    net, x = tiny(model), some(1, 12)
    before = whole(net, x)
    for i in range(12):
        y = x.clone()
        y[0, i] = 4 + (y[0, i] - 3) % (V - 4)
        after = whole(net, y)
        assert torch.equal(before[0, : i + 1, 4:V], after[0, : i + 1, 4:V]), (
            "token i was seen before or at its own place"
        )
        assert i == 11 or not torch.equal(before[0, i + 1], after[0, i + 1]), (
            "token i was never seen"
        )


@both
@torch.no_grad()
def test_nll_by_hand(model):
    """Each token from a text that ends before it, softmax written out, over all pieces but the mask
    and the pad; whatever the masks' seed, and in batches.
    """
    net, x = tiny(model), some(2, 7)
    by_hand = torch.zeros(2)
    for row in range(2):
        for i in range(7):
            ids = torch.tensor([[*x[row, :i].tolist(), 5]])     # the last one is not read
            h = net.clean_states(ids)[0, -1]
            z = [float(h @ net.head.weight[v]) for v in range(V) if v != 0]
            by_hand[row] += math.log(sum(map(math.exp, z))) - z[int(x[row, i]) - 1]
    for seed, batch in ((0, 8), (5, 1)):
        found, mean = masking.bound(net, x, 1, seed=seed, batch=batch)
        torch.testing.assert_close(found, by_hand / 7, atol=1e-5, rtol=1e-5)
        assert mean == pytest.approx(float(by_hand.sum()) / 14, rel=1e-5)


@both
@torch.no_grad()
@pytest.mark.parametrize("cuts", [[1] * 17, [17], [5, 1, 6, 5], [1, 16]])
def test_cached_equals_uncached(model, cuts):
    net, x = tiny(model), some(3, 17)
    cache = net.new_cache(3, 17)
    answers = [net.logits(net.step(part, cache)) for part in x.split(cuts, dim=1)]
    torch.testing.assert_close(
        torch.cat(answers, dim=1)[:, :-1], whole(net, x)[:, 1:], atol=1e-5, rtol=1e-5
    )
    assert cache.length == 18, "the start is read too"


def greedy(net, ids, count):
    """The likeliest tokens one after another, each from a pass over the whole text."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(whole(net, torch.tensor([[*ids, 4]]))[0, -1].argmax()))
    return ids[-count:]


@both
@torch.no_grad()
def test_decoding_is_the_greedy_path_and_one_forward_per_token(model):
    net, prompt = tiny(model), some(1, 5)[0].tolist()
    settings = Settings(max_new_tokens=9, steps=3, mode="full", temperature=0.0)
    out = generate(TorchModel(net), prompt, settings, [1, 2])
    assert out.rows == [greedy(net, prompt, 9)] * 2
    assert out.forwards == 9 and out.row_forwards == [9, 9]
    settings = Settings(max_new_tokens=9, steps=1, top_p=0.9)
    one = generate(TorchModel(net), prompt, settings, [3]).rows
    two = generate(TorchModel(net), prompt, settings, [7, 3]).rows
    assert one[0] == two[1], "a row depends on its batch"


@both
@torch.no_grad()
def test_the_cache_of_a_long_text(model):
    """The transformer's slides when the text outgrows it; the primary's is always as large."""
    net, prompt = tiny(model), some(1, 20)[0].tolist()
    settings = Settings(max_new_tokens=30, steps=1, window=8, temperature=0.0)
    out = generate(TorchModel(net), prompt, settings, [1])
    assert len(out.rows[0]) == 30
    if model == "backup":
        assert out.cache_bytes == 2 * 2 * 9 * 32 * 4, "the start, and the window"
    else:
        assert out.cache_bytes == net.new_cache(1).nbytes
        assert out.rows == [greedy(net, prompt, 30)]


@both
def test_a_gap_is_refused(model):
    settings = Settings(max_new_tokens=1, steps=1)
    with pytest.raises(UserError, match="--objective masked"):
        decode.infill(TorchModel(tiny(model)), [2, 5, V, 6], settings, [1])


@both
def test_training_reaches_the_entropy_of_its_source(model):
    """A chain of four equally likely successors has ln 4 nats per token; within 0.03 of it, and
    never below it.
    """
    net = tiny_model(model, V, causal=True, n_layers=1).train()
    g = torch.Generator().manual_seed(0)

    def source(rows, length):
        x = torch.empty(rows, length, dtype=torch.long)
        x[:, 0] = torch.randint(4, 20, (rows,), generator=g)
        for i in range(1, length):
            x[:, i] = 4 + (x[:, i - 1] * 7 + torch.randint(4, (rows,), generator=g)) % 16
        return x

    args = config.TrainArgs(lr=1e-2, optimizer="adamw", weight_decay=0.0)
    optimizer = make_optimizer(net, args)
    for step in range(150):
        optimizer.set_lr(2e-2 * (1 - step / 150))
        out = masking.denoising_loss(net, source(16, 24), masking.left_to_right(16, 24), "elbo")
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held, _ = masking.bound(net.eval(), source(200, 24), 1)
    entropy = (math.log(16) + 23 * math.log(4)) / 24  # the first token is uniform over 16
    assert -0.01 < float(held.mean()) - entropy < 0.03


@both
@pytest.mark.parametrize("kind", ["masked_mean", "elbo"])
def test_every_parameter_learns_and_the_mean_is_over_all_tokens(model, kind):
    net, x = tiny(model).train(), some(3, 9)
    out = masking.denoising_loss(net, x, masking.left_to_right(3, 9), kind)
    out.loss.backward()
    assert float(out.loss.detach()) == pytest.approx(float(out.nll.mean()), rel=1e-5)
    assert out.masked.all() and len(out.nll) == 27
    by_hand = -whole(net, x).log_softmax(-1).gather(2, x[..., None]).flatten()
    torch.testing.assert_close(out.nll, by_hand.detach(), atol=1e-5, rtol=1e-5)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.fixture(scope="module", params=MODELS)
def run(request, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ar") / "run"
    done = fresh(
        text, folder, "--model", request.param, "--objective", "ar", "--max_steps", 14,
        "--save_interval", 5, "--eval_interval", 7, "--keep_full", 9,
    )
    assert done == 0
    return folder


def test_resume_and_its_rules(text, run, tmp_path, capsys):
    half = tmp_path / "half"
    shutil.copytree(run / "step_000005", half / "step_000005")
    assert call(train.main, "--resume", half, "--objective", "masked") == 2
    assert "--objective masked (flag), but the checkpoint has ar" in capsys.readouterr().err
    assert (
        call(train.main, "--resume", half, "--threads", 1, "--no_show_samples", "--live", "off")
        == 0
    )
    assert weights(run / "step_000014") == weights(half / "step_000014")
    assert curve(half) == {step: line for step, line in curve(run).items() if step > 5}
    assert all(line[1] == line[4] == line[5] == 1 for line in curve(run).values()), (
        "every token is a question, in blocks of one token"
    )


def test_its_held_out_figure_is_called_nll(run):
    """The exact -log p is no bound: not in the summary, not in the report; and it is asked every
    token, which is no fault.
    """
    for name in ("summary.md", "report.html"):
        page = (run / name).read_text(encoding="utf-8")
        assert "best held-out NLL" in page and "held-out bound" not in page.lower(), name
    log = [
        {**e, "step": e["step"] + 10} if e["event"] == "train" else e
        for e in check_run.read_log(run / "train.jsonl")
    ]
    lines = check_run.verdict(log, {}, None, None)
    [mask] = [line for line in lines if line.name == "mask metric in range"]
    assert mask.ok, mask.number
    lines = [{"objective": "masked"}, {"objective": "ar"}]
    assert [study_report.measure(part) for part in (lines[:1], lines[1:], lines)] == [
        "bound", "NLL", "bound (of ar: the NLL)",
    ]


def test_the_commands_know_it(run, tmp_path, capsys):
    words = ("--prompt", "ek din", "--max_new_tokens", 11, "--ignore_eos", "--json", "--threads", 1)
    assert (
        call(
            sample.main, run, *words, "--temperature", 0, "--steps", 3, "--blockwise",
            "--frozen_context",
        )
        == 0
    )
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["text"].startswith("ek din") and record["new_tokens"] == record["forwards"] == 11
    assert record["cache_bytes"] > 0 and "--objective ar" in err and "--steps" in err
    assert call(sample.main, run, *words, "--num_samples", 2) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert (
        call(sample.main, run, "--text", "ek ____ din") == 2
        and "cannot" not in capsys.readouterr().out
    )
    assert (
        call(
            edge_benchmark.main, run, "--out_json", tmp_path / "b.json", "--max_new_tokens", 6,
            "--runs_per_prompt", 1, "--prompt", "ek", "--threads", 1,
        )
        == 0
    )
    found = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["results"]
    assert list(found) == ["block_frozen"] and 0 < found["block_frozen"]["nll_per_token"] < 20


@torch.no_grad()
def test_the_benchmarks_nll_is_the_models(run):
    net, _, _ = checkpoint.load_model(run, torch.device("cpu"), config.check_saved)
    x = some(1, 12)
    z = whole(net, x).log_softmax(-1)
    by_hand = -float(z[0, 5:].gather(1, x[0, 5:, None]).sum())
    found = estimators.left_to_right(net, x[0, :5].tolist(), x[0, 5:].tolist(), True)
    assert found == pytest.approx(by_hand, rel=1e-4)
    pieces = estimators.cut([x[0].tolist()], 12)                # its first token is given
    nats, curve_of_rates, _ = estimators.bound(net, pieces, 1, draws=1)
    by_hand = -float(z[0, 1:].gather(1, x[0, 1:, None]).sum())
    assert float(nats[0]) == pytest.approx(by_hand, rel=1e-4) and curve_of_rates == []
