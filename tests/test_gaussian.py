"""Continuous diffusion on embeddings: schedules, samplers and the bound against closed forms; the
network, training and the commands on tiny runs.
"""
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_train import curve, fresh, weights
from tiny import TINIER, tiny_config

import checkpoint
import config
import edge_benchmark
import evaluate
import export
import gaussian
import model_config
import sample
import serve
import train
from conftest import call, log
from gaussian_model import GaussianModel, network_of
from sampling.continuous import Settings
from sampling.gaussian_writer import GaussianWriter, guided

SCHEDULES = tuple(gaussian.SCHEDULES)
MEAN = torch.tensor([0.7, -0.3], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.5], [0.5, 0.6]], dtype=torch.float64)


# ---- schedules -----------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_begins_with_the_text_and_ends_with_noise_alone(schedule):
    """Exactly: the terminal SNR is 0, so two texts under one noise cannot be told apart."""
    for dtype in (torch.float32, torch.float64):
        ends = gaussian.noise_at(torch.tensor([0.0, 1.0], dtype=dtype), schedule)
        assert ends.tolist() == [0, 1]
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert (gaussian.noise_at(t, schedule).diff() > 0).all()
    noise = torch.randn(5, 3)
    texts = [gaussian.mixed(torch.randn(5, 3), noise, ends[1].float()) for _ in range(2)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_weight_is_the_slope_of_the_ratio(schedule):
    """Its integral between two times is the difference of the signal-to-noise ratios there."""
    t = torch.linspace(0.2, 0.9, 20_001, dtype=torch.float64)
    share = gaussian.noise_at(t[[0, -1]], schedule)
    ratio = (1 - share) / share
    integral = torch.trapezoid(gaussian.snr_slope(t, schedule), t)
    assert float(integral) == pytest.approx(float(ratio[0] - ratio[1]), rel=1e-6)


# ---- samplers, where everything is Gaussian ------------------------------------------------------

def exact_guess(z, share, _):
    """E[x0 | z] for x0 of MEAN and COVARIANCE."""
    signal = math.sqrt(1 - share)
    of_z = signal * signal * COVARIANCE + share * torch.eye(2, dtype=torch.float64)
    gain = signal * COVARIANCE @ torch.linalg.inv(of_z)
    return MEAN + (z - signal * MEAN) @ gain.T


def outcome(sampler, steps, eta=0.0):
    """Mean and covariance of what a sampler makes of normal noise, without a random number: its
    result is affine in all noise that it draws, so unit vectors of the noise, one a row of the
    batch, give the whole map.
    """
    noises = 2 * (steps + 1)
    rows = torch.eye(noises + 1, noises, dtype=torch.float64)   # the last row is zero: the offset
    parts = iter(rows.split(2, dim=1))
    z = next(parts)
    shares = gaussian.levels(steps)
    out = gaussian.sample(exact_guess, z, shares, sampler, lambda: next(parts), eta)
    mean = out[-1]
    factors = out[:-1] - mean
    return mean, factors.T @ factors


def error(found):
    """The largest relative error of mean and covariance."""
    mean, covariance = found
    return max(
        float(((mean - MEAN) / MEAN).abs().max()),
        float(((covariance - COVARIANCE) / COVARIANCE).abs().max()),
    )


def test_ddpm_with_all_steps_has_the_mean_and_the_covariance():
    assert error(outcome("ddpm", 1000)) < 0.01
    assert 0.05 < error(outcome("ddpm", 50)) < 0.1


def test_ddim_is_of_first_order_and_dpmpp_of_second():
    """ddim has 5 % too little variance in 50 steps, and the error falls with the steps; dpmpp has
    them within 1 %, and in 10 steps comes as near as ddim in 50.
    """
    assert error(outcome("ddim", 50)) < 0.06
    assert error(outcome("ddim", 500)) < 0.01
    assert error(outcome("dpmpp", 50)) < 0.01
    assert error(outcome("dpmpp", 10)) < error(outcome("ddim", 10)) / 3


def test_ddim_of_unit_variance_loses_what_it_has_to(monkeypatch):
    """Of the unit covariance every step multiplies by the cosine of its angle. No spacing of so
    many steps loses less, as the angles add up to a right one: 1 % needs 250 steps.
    """
    monkeypatch.setitem(globals(), "COVARIANCE", torch.eye(2, dtype=torch.float64))
    def kept(steps):
        return math.cos(math.pi / 2 / steps) ** (2 * steps)

    for steps in (1, 10, 50):
        _, covariance = outcome("ddim", steps)
        torch.testing.assert_close(covariance, kept(steps) * COVARIANCE)
    assert kept(50) < 0.96 and kept(250) > 0.99


def test_ddim_with_all_noise_is_ddpm():
    for steps in (3, 20):
        mean, covariance = outcome("ddim", steps, eta=1.0)
        expected_mean, expected = outcome("ddpm", steps)
        torch.testing.assert_close(mean, expected_mean)
        torch.testing.assert_close(covariance, expected)


def test_the_posterior_is_bayes_rule():
    """In one dimension: q(z_after | z, x0) is proportional to q(z | z_after) q(z_after | x0)."""
    share, after, x0, z = 0.7, 0.4, 0.9, -0.2
    at = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    kept = (1 - share) / (1 - after)
    forward = (z - math.sqrt(kept) * at).square() / (share - kept * after)
    before = (at - math.sqrt(1 - after) * x0).square() / after
    density = torch.exp(-(forward + before) / 2)
    density = density / density.sum()
    mean = float((density * at).sum())
    variance = float((density * (at - mean).square()).sum())
    found_mean, found_variance = gaussian.posterior(z, x0, share, after)
    assert (found_mean, found_variance) == (pytest.approx(mean), pytest.approx(variance))


# ---- the bound, where it can be computed ---------------------------------------------------------

class Frequencies(torch.nn.Module):
    """A network that knows how frequent each token is, and looks at nothing."""

    def __init__(self, log_q, embed_dim):
        super().__init__()
        self.cfg = SimpleNamespace(
            rows=len(log_q), embed_dim=embed_dim, d_model=2, gaussian=True, mask_id=None
        )
        self.log_q = log_q
        self.layers = []
        self.exits = torch.nn.Identity()

    def rows_of_vectors(self, x):
        return x, lambda x: x

    def logits(self, states):
        return self.log_q.expand(len(states), -1)


def test_the_bound_of_frequencies_is_the_exact_cross_entropy():
    """With infinitely small steps the reverse of the noise is exact for independent tokens of these
    frequencies: no text may cost more or less than -log q of its tokens.
    """
    torch.manual_seed(0)
    log_q = torch.tensor([0.5, 0.25, 0.2, 0.05]).log()
    model = GaussianModel(Frequencies(log_q, 6))
    for token in range(4):
        rows = torch.full((1500, 32), token)
        nats = gaussian.row_bounds(model, rows, batch=500)[:, 0]
        assert float(nats.mean()) == pytest.approx(-float(log_q[token]), rel=0.015), token


def test_a_network_that_knows_nothing_costs_the_uniform_guess():
    torch.manual_seed(0)
    model = GaussianModel(Frequencies(torch.zeros(50), 16))
    rows = torch.randint(50, (800, 32))
    nats = gaussian.row_bounds(model, rows, batch=400)[:, 0]
    assert float(nats.mean()) == pytest.approx(math.log(50), rel=0.01)


# ---- the network ---------------------------------------------------------------------------------

MODELS = ("primary", "backup")
both = pytest.mark.parametrize("kind", MODELS)


def tiny(kind, **changes):
    """A network moved away from its symmetric start."""
    torch.manual_seed(0)
    cfg = tiny_config(kind, 40, TINIER, gaussian=True, embed_dim=8, **changes)
    model = network_of(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def some(rows, length):
    return torch.randint(4, 40, (rows, length), generator=torch.Generator().manual_seed(1))


@both
@torch.no_grad()
def test_a_place_is_known_inside_the_network(kind):
    """Two far inputs change places: the answers are not the same ones in other places. And every
    input matters to every answer.
    """
    model = tiny(kind)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 12, 8, generator=generator)
    share = torch.full((1, 12), 0.5)
    order = torch.arange(12)
    order[[1, 10]] = order[[10, 1]]
    answers = model.states(z, share, torch.zeros_like(z))
    changed = model.states(z[:, order], share, torch.zeros_like(z))
    assert not torch.allclose(changed, answers[:, order], atol=1e-4)
    other = z.clone()
    other[:, 11] += 1
    differences = (model.states(other, share, torch.zeros_like(z)) - answers).abs().amax(-1)[0]
    assert (differences > 1e-7).all()
    assert differences.argmax() == 11, "an answer is about its own place"


@both
@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(kind):
    model = tiny(kind)
    z = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0))
    share = torch.full((3, 9), 0.4)
    together = model.states(z, share, z)
    alone = torch.cat([model.states(z[i:i + 1], share[i:i + 1], z[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@both
def test_parameters_are_counted(kind):
    model = tiny(kind)
    assert sum(p.numel() for p in model.parameters()) == model_config.count_params(model.cfg)


def settings(**changes):
    known = dict(timestep_sampling="stratified", noise_schedule="cosine", embed_dim=8)
    return SimpleNamespace(**known | changes)


@both
@pytest.mark.parametrize("loss", ["elbo", "masked_mean"])
def test_every_parameter_learns(kind, loss):
    """Also in mixed precision, where the first guess, made without a gradient, casts the weights.
    """
    model = tiny(kind).train()
    ids = some(4, 16)
    sample = gaussian.noisy_sample(settings(), 0, 0, 4, 16)._replace(again=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=loss == "masked_mean"):
        found = gaussian.gaussian_loss(model, ids, sample, loss)
    found.loss.backward()
    for name, parameter in model.named_parameters():
        if "decay" in name:         # of the past of a block, which a whole row does not have
            continue
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@both
def test_the_gradient_of_a_step_does_not_depend_on_its_parts(kind):
    model = tiny(kind)
    ids = some(6, 10)
    sample = gaussian.noisy_sample(settings(), 3, 5, 6, 10)
    gradients = []
    for micro in (6, 2):
        model.zero_grad()
        for start in range(0, 6, micro):
            rows = slice(start, start + micro)
            gaussian.gaussian_loss(model, ids[rows], sample, "masked_mean", rows).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_a_prompt_of_a_pair_costs_nothing():
    """It ends with the pad's id, which is never an answer; the response's cost is finite."""
    model = tiny("primary")
    ids = some(2, 10)
    ids[:, 3] = model.cfg.pad_id
    asked = (torch.arange(10) > 3).expand(2, -1)
    sample = gaussian.noisy_sample(settings(), 0, 0, 2, 10, asked=asked)
    loss = gaussian.gaussian_loss(model, ids, sample, "masked_mean").loss
    loss.backward()
    gradients = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    assert torch.isfinite(loss) and torch.isfinite(gradients).all()
    nats = gaussian.row_bounds(model, ids, asked=asked)
    assert torch.isfinite(nats).all() and nats[:, 2].tolist() == [6, 6]


def test_what_a_step_draws_is_a_function_of_seed_and_step():
    whole = gaussian.noisy_sample(settings(), 1, 2, 8, 12)
    part = gaussian.noisy_sample(settings(), 1, 2, 8, 12, slice(4, 8))
    assert torch.equal(whole.noise[4:], part.noise) and torch.equal(whole.known[4:], part.known)
    assert torch.equal(whole.t, part.t) and whole.masked_count == part.masked_count
    other = gaussian.noisy_sample(settings(), 1, 3, 8, 12)
    assert not torch.equal(whole.noise, other.noise)
    strata = (whole.t * 8).ceil().sort().values
    assert strata.tolist() == list(range(1, 9)), "one time in every eighth"


def test_some_rows_are_whole_some_have_a_beginning_and_some_have_gaps():
    sample = gaussian.noisy_sample(settings(), 0, 0, 4000, 16)
    known = sample.known
    beginning = (known.int().diff(dim=1) <= 0).all(1) & known.any(1)
    gaps = known.any(1) & ~beginning
    shares = [float(x.float().mean()) for x in (~known.any(1), beginning, gaps)]
    assert shares[0] == pytest.approx(0.53, abs=0.05), shares
    assert min(shares[1:]) > 0.15, shares
    assert (~known).any(1).all(), "every row is asked something"


def test_nothing_noisy_tells_what_the_text_is_at_the_end_of_time():
    """At t = 1 two texts give one input, so they get one answer."""
    model = tiny("backup")
    known = torch.zeros(1, 10, dtype=torch.bool)
    noise = torch.randn(1, 10, 8)
    share = gaussian.noise_at(torch.ones(1), "sqrt")
    texts = [model.embed(some(2, 10)[i:i + 1]) for i in range(2)]
    noisy = [gaussian.noisy_text(x0, noise, share, known).z for x0 in texts]
    assert not torch.equal(*texts) and torch.equal(*noisy)


# ---- text ----------------------------------------------------------------------------------------

@both
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp"])
def test_known_tokens_stay_and_a_row_does_not_depend_on_its_batch(kind, sampler):
    writer = GaussianWriter(tiny(kind))
    mask = writer.cfg.mask_id
    ids = [2, 7, mask, mask, 9, mask, 5]
    settings = Settings(max_new_tokens=3, steps=4, sampler=sampler, eta=0.5)
    seen = []
    both_rows = writer.write(
        ids, settings, [3, 4], lambda canvas, *_: seen.append(canvas.ids.clone())
    )
    assert len(seen) == both_rows.forwards == 4
    for rows in seen:
        assert rows[:, [0, 1, 4, 6]].tolist() == [[2, 7, 9, 5]] * 2
        assert not (rows == mask).any() and not (rows == writer.cfg.pad_id).any()
    assert [len(row) for row in both_rows.rows] == [3, 3]
    alone = [writer.write(ids, settings, [seed]).rows[0] for seed in (3, 4)]
    assert alone == both_rows.rows
    assert writer.write(ids, settings, [3]).rows[0] == alone[0]


def test_guidance_at_one_is_plain_and_at_zero_the_null_prompt():
    model = tiny("backup")
    prompt = [2, 7, 8, 9]
    ids = prompt + [model.cfg.mask_id] * 5
    settings = Settings(max_new_tokens=5, steps=3, null_prompt=(2,))

    def text(ids, scale):
        settings.guidance_scale = scale
        return GaussianWriter(model).write(ids, settings, [1])

    generator = torch.Generator().manual_seed(0)
    with_prompt, without = torch.randn(2, 6, 40, generator=generator).log_softmax(-1)
    torch.testing.assert_close(guided(with_prompt, without, 1.0), with_prompt)
    torch.testing.assert_close(guided(with_prompt, without, 0.0), without)
    assert text(ids, 1.0).forwards == 3 and text(ids, 2.0).forwards == 6
    others = [2, 11, 12, 13] + ids[4:]
    assert text(ids, 0.0).rows == text(others, 0.0).rows, "0 ignores the prompt"


# ---- the commands --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gaussian") / "run"
    done = fresh(
        text, folder, "--objective", "gaussian", "--max_steps", 12, "--save_interval", 5,
        "--eval_interval", 6, "--keep_full", 9, "--dropout", 0.1, "--ema", 0.9, "--embed_dim", 8,
    )
    assert done == 0
    return folder


def test_a_resume_is_the_uninterrupted_run(run, tmp_path, capsys):
    half = tmp_path / "half"
    shutil.copytree(run / "step_000005", half / "step_000005")
    assert call(train.main, "--resume", half, "--embed_dim", 16) == 2
    assert "--embed_dim 16 (flag), but the checkpoint has 8" in capsys.readouterr().err
    words = ("--threads", 1, "--no_show_samples", "--live", "off")
    assert call(train.main, "--resume", half, *words) == 0
    assert weights(run / "step_000012") == weights(half / "step_000012")
    assert curve(half) == {step: line for step, line in curve(run).items() if step > 5}
    files = {path.name for path in (run / "step_000012").iterdir()}
    assert {"model.safetensors", "ema.safetensors", "optimizer.safetensors"} <= files


def test_embeddings_keep_their_size(run):
    net, _, _ = checkpoint.load_model(run, torch.device("cpu"), config.check_any)
    squares = net.table.square().mean(-1)
    torch.testing.assert_close(squares, torch.ones_like(squares))
    bounds = [line["val_nelbo"] for line in log(run, "eval")]
    assert bounds[-1] < bounds[0], "nothing was learned"


def test_sample_writes_behind_a_prompt_and_in_gaps(run, capsys):
    words = ("--json", "--threads", 1)
    for scheduler, steps in (("ddim", 5), ("ddpm", 6), ("dpmpp", 4)):
        assert call(
            sample.main, run, *words, "--prompt", "ek din", "--num_steps", steps, "--scheduler",
            scheduler, "--seq_len", 9, "--ignore_eos",
        ) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["text"].startswith("ek din") and record["new_tokens"] == 9
        assert record["forwards"] == steps
    gaps = ("--text", "ek ____ din", "--num_steps", 3)
    assert call(sample.main, run, *words, *gaps, "--num_samples", 2) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 2
    for record in records:
        assert record["text"].startswith("ek ") and record["text"].endswith(" din")


def test_evaluate_gives_the_bound(run, tmp_path, capsys):
    words = ("--threads", 1, "--draws", 2, "--batches", 8)
    assert call(evaluate.main, run, *words, "--out_json", tmp_path / "e.json") == 0
    assert "bound" in capsys.readouterr().out
    found = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert found["objective"] == "gaussian" and found["chain_rule"] == {}
    [bound] = found["bound"].values()
    assert 0 < bound["nats"] < 7 and bound["bits_per_byte"] > 0


@pytest.mark.parametrize("words, reason", [
    ((sample, "--blockwise", "--frozen_context"), "leave --blockwise, --frozen_context out"),
    ((sample, "--sampler", "speculate"), "give --sampler ddim, ddpm or dpmpp"),
    ((sample, "--interactive"), "leave --interactive out"),
    ((sample, "--precision", "int8"), "leave --precision int8 out"),
    ((evaluate, "--samples", 4), "leave --samples out"),
    ((evaluate, "--needle"), "leave --needle out"),
    ((export,), "which only train, sample and evaluate read"),
    ((serve, "--port", 0), "which only train, sample and evaluate read"),
    ((edge_benchmark, "--runs_per_prompt", 1), "which only train, sample and evaluate read"),
])
def test_what_needs_masks_is_refused(run, tmp_path, monkeypatch, capsys, words, reason):
    monkeypatch.chdir(tmp_path)
    command, *flags = words
    assert call(command.main, run, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "--objective gaussian" in error and reason in error


@pytest.mark.parametrize("flag", ["--fsdp", "--compile", "--exit_loss_weight=0.1"])
def test_train_refuses_what_works_with_masks_only(text, tmp_path, capsys, flag):
    assert fresh(text, tmp_path / "run", "--objective", "gaussian", flag) == 2
    assert "works with masks only" in capsys.readouterr().err
