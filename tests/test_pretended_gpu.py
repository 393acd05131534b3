"""The commands on a pretended GPU (pretended_gpu.py): every line of ours that moves a tensor runs,
and the numbers are the CPU's.
"""
import contextlib
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import TINY, log
from pretended_gpu import THERE, There, pretended_gpu, rerun
from tiny import TINIER, tiny_model

import edge_benchmark
import evaluate
import masking
import sample
import train
from common import machine
from evaluation import loading
from sampling import trained
from sampling.cuda_graphs import Graphs
from sampling.decode import generate
from sampling.settings import Settings
from sampling.torch_model import GraphModel, TorchModel
from training import optim

OPTIMIZERS = ("adamw", "muon", "lion")
KINDS = ("primary", "backup")


def test_what_a_gpu_refuses_is_refused():
    with pytest.raises(RuntimeError, match="same device"), pretended_gpu():
        torch.ones(3).to(THERE) + torch.ones(3)


def test_numbers_and_views_and_gradients():
    """The pretence itself: a sum in parts, written in place, through autograd."""
    with pretended_gpu():
        x = torch.arange(6.0).view(2, 3).to(THERE).requires_grad_()
        y = x * torch.tensor([1.0, 2.0, 3.0], device=THERE)
        z = torch.zeros(2, 3, device=THERE)
        z[:, [0, 2]] += y[:, torch.tensor([0, 2])]
        z[0, 1] = 7
        z.sum().backward()
        assert isinstance(z, There) and isinstance(x.grad, There)
        assert z.tolist() == [[0, 7, 6], [3, 0, 15]]
        assert x.grad.tolist() == [[1, 0, 3], [1, 0, 3]]


def steps(net, optimizer, device):
    """(loss, gradient norm) of a step under each block rule, with averaged weights and exits."""
    wanted = SimpleNamespace(optimizer=optimizer, lr=1e-3, weight_decay=0.1, opt_fused=True)
    parts = optim.Optimizers(net, wanted)
    averages = optim.EMA(net, 0.9)
    x0 = torch.randint(1, 40, (4, 24), generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for block, first, share in ((24, 24, 0.0), (8, 3, 0.5), (1, 1, 1.0)):
        if block == 1:
            masks = masking.left_to_right(4, 24)
        else:
            masks = masking.corrupt(masking.EXACT_COUNT, 0, 0, 4, 24, block, first)
            masks = masks._replace(clean_share=share)
        out = masking.denoising_loss(net, x0, masks, "elbo", early=1, early_weight=0.3)
        out.loss.backward()
        norm = optim.clip_grad_norm(net, 1.0)
        found += [float(out.loss.detach()), float(norm)]
        parts.step()
        parts.zero_grad()
        averages.update()
    with averages.swap():
        found += masking.bound(net, x0, 8)[0].tolist()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_steps(kind, optimizer):
    """Loss, backward, clipping, update, averages, bound."""
    options = dict(shape=TINIER, exits=True, away=0.05)
    expected = steps(tiny_model(kind, **options).train(), optimizer, torch.device("cpu"))
    with pretended_gpu():
        net = tiny_model(kind, **options).train().to(THERE)
        assert all(isinstance(parameter, There) for parameter in net.parameters())
        found = steps(net, optimizer, THERE)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def graph_writer(net):
    return GraphModel(net, Graphs(THERE, rerun))


@pytest.mark.parametrize("kind,writer", [("primary", graph_writer), ("backup", TorchModel)])
@pytest.mark.parametrize("more", [
    dict(block_size=1), dict(block_size=4, steps=3), dict(block_size=4, steps=4, guidance_scale=2.0)
])
def test_decoding(kind, writer, more):
    settings = Settings(**dict(max_new_tokens=16, steps=1, mode="block_frozen", eos_id=3) | more)
    net = tiny_model(kind, shape=TINIER, away=0.1)
    prompts = [[2, 7, 9], [2, 7], [2, 8]]
    expected = generate(TorchModel(net), prompts, settings, [1, 2, 3]).rows
    with pretended_gpu():
        assert generate(writer(net.to(THERE)), prompts, settings, [1, 2, 3]).rows == expected


@contextlib.contextmanager
def on_the_gpu():
    """The commands find it, and EcoHybrid writes with what stands in for graphs."""
    def writer_of(net):
        return graph_writer(net) if net.cfg.model == "primary" else TorchModel(net)

    with (
        mock.patch.object(machine, "pick_device", lambda name: THERE),
        mock.patch.object(trained, "writer_of", writer_of),
        mock.patch.object(loading, "writer_of", writer_of),
        pretended_gpu(),
    ):
        yield


def train_and_go_on(kind, run):
    """Four steps and two more, with evaluations, checkpoints, exits and averaged weights -> the
    losses of all steps and the last bound.
    """
    words = [
        *map(str, TINY), "--model", kind, "--run_name", run.name, "--no_amp", "--max_steps", "4",
        "--optimizer", "muon", "--ema", "0.9", "--save_interval", "2", "--eval_interval", "2",
        "--eval_batches", "1", "--exit_loss_weight", "0.1", "--no_show_samples",
    ]
    assert train.main(words) == 0
    assert train.main(["--resume", str(run), "--max_steps", "6", "--no_show_samples"]) == 0
    losses = [line["loss"] for line in log(run)]
    assert len(losses) == 6
    return [*losses, log(run, "eval")[-1]["val_nelbo"]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_commands(kind, corpus_dir, monkeypatch, capsys):
    """train, a resume, sample, edge_benchmark, evaluate from their first line to their last."""
    monkeypatch.chdir(corpus_dir)
    expected = train_and_go_on(kind, corpus_dir / "checkpoints" / f"cpu_{kind}")
    run = corpus_dir / "checkpoints" / f"pretended_{kind}"
    of_run = ["--ckpt", str(run)]
    few = ["--max_new_tokens", "8"]
    with on_the_gpu():
        np.testing.assert_allclose(train_and_go_on(kind, run), expected, rtol=1e-4)
        sample.main([*of_run, *few, "--blockwise", "--frozen_context"])
        sample.main([*of_run, "--text", "mai kal ____ gaya"])
        edge_benchmark.main([*of_run, *few, "--runs_per_prompt", "1", "--modes", "block_frozen"])
        capsys.readouterr()
        evaluate.main([
            *of_run, "--max_docs", "2", "--blocks", "8", "--draws", "1", "--chain_docs", "1",
            "--samples", "2", *few,
        ])
    assert "chain rule" in capsys.readouterr().out
