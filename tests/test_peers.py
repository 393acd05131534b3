"""The benchmarks beside public peers, as far as they are ours: protocols, stand-ins, equal sizes.
No peer is needed.

    python -m pytest tests/test_peers.py
"""
import copy
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model

import conftest  # noqa: F401  (puts the repository on the path)
import masking
from benchmarks import bound_peers, decode_peers, likelihood_peers, peer_models, peers, train_peers
from evaluation import estimators


@pytest.fixture
def net():
    torch.set_grad_enabled(False)
    yield tiny_model("backup", 60, seed=1, n_layers=3, n_heads=4)
    torch.set_grad_enabled(True)


IDS = torch.arange(4, 44)[None] % 57 + 3                                           # (1, 40)


def same(a, b):
    return torch.allclose(a[..., 4:60], b[..., 4:60], atol=1e-5)


def test_without_a_cache_it_is_our_model(net):
    out = decode_peers.PeerModel(net)(IDS)
    assert same(out.logits, net(IDS)) and out.past_key_values is None


def test_prefix_and_dual_cache_of_the_same_ids_change_nothing(net):
    """What a cache holds was computed from these very ids, so that any other logits are an error of
    the protocol.
    """
    model = decode_peers.PeerModel(net)
    full = model(IDS, use_cache=True)
    prefix = [tuple(t[:, :, :16] for t in layer) for layer in full.past_key_values]
    assert same(
        model(IDS[:, 16:], past_key_values=prefix, use_cache=True).logits, full.logits[:, 16:]
    )
    place = torch.zeros(1, 40, dtype=torch.bool)
    place[:, 16:24] = True
    dual = model(
        IDS[:, 16:24], past_key_values=full.past_key_values, replace_position=place, use_cache=True
    )
    assert same(dual.logits, full.logits[:, 16:24])
    assert full.past_key_values[0][0].shape[2] == 40


def test_dual_cache_replaces_in_place_and_prefix_does_not(net):
    """The next call sees the block's new keys, as in Fast-dLLM; a prefix stays what it was."""
    model = decode_peers.PeerModel(net)
    past = model(IDS, use_cache=True).past_key_values
    before, other, place = (
        past[0][0].clone(),
        IDS[:, 16:24] // 2 + 4,
        torch.zeros(1, 40, dtype=torch.bool),
    )
    place[:, 16:24] = True
    model(other, past_key_values=past, replace_position=place)
    assert torch.equal(past[0][0][:, :, :16], before[:, :, :16]) and not torch.equal(
        past[0][0][:, :, 16:24], before[:, :, 16:24]
    )


def test_the_uncached_reference_of_the_block_rule(net):
    """dllm's protocol (mask in, past out), with and without a cache: the same logits."""
    cached, uncached = decode_peers.PeerModel(net), decode_peers.Forgetful(net)
    block = torch.arange(40) // 8
    rule = (block[None] <= block[:, None])[None, None]                             # (1, 1, 40, 40)
    logits = []
    for model in (cached, uncached):
        past = model(
            IDS[:, :32], attention_mask=rule[..., :32, :32], use_cache=True
        ).past_key_values
        logits.append(
            model(
                IDS[:, 32:], past_key_values=copy.deepcopy(past), attention_mask=rule[..., 32:, :]
            ).logits
        )
    assert same(logits[0], logits[1])
    other = IDS.clone()
    other[:, 8] = 9
    past = uncached(
        other[:, :32], attention_mask=rule[..., :32, :32], use_cache=True
    ).past_key_values
    moved = uncached(IDS[:, 32:], past_key_values=past, attention_mask=rule[..., 32:, :]).logits
    assert not same(logits[1], moved)                           # the past is read


@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_the_uncached_reference_of_ours(kind):
    """Our frozen context, and the text behind it read again at each forward: the same states, also
    behind a text that is no multiple of the block.
    """
    model = tiny_model(kind, 60, seed=1, n_layers=3, n_heads=4)
    reference = decode_peers.Recomputing(model)
    with torch.no_grad():
        for known in (0, 5, 29):
            found = []
            for each in (model, reference):
                cache = each.new_cache(1, 40)
                for part in IDS[:, :known].split(3, dim=1):
                    if part.numel():
                        each.step(part, cache)
                found.append(each.states(IDS[:, known:known + 8], cache))
            torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    settings = decode_peers.Settings(
        24, 2, mode="block_frozen", block_size=8, temperature=0, eos_id=None
    )
    texts = [
        decode_peers.generate(decode_peers.TorchModel(each), [2, 7, 9], settings, [0]).rows
        for each in (model, reference)
    ]
    assert texts[0] == texts[1] and len(set(texts[0][0])) > 1


def test_stand_ins_leave_nothing_behind():
    before = sys.modules.get("json")
    with peers.stand_ins({"json": dict(x=1), "model.modeling_none": dict(Name=3)}):
        from model.modeling_none import Name
        assert Name == 3 and sys.modules["json"].x == 1
    assert sys.modules["json"] is before and "model.modeling_none" not in sys.modules


def test_missing_peers_are_skipped_with_a_line_each(tmp_path, capsys):
    args = SimpleNamespace(
        peers=tmp_path,
        only=["hf", *decode_peers.SAMPLERS, "llama.cpp"],
        new=32,
        precisions=["bf16"],
        per_forward=[4],
    )
    assert decode_peers.contestants(args, [2, 5], tmp_path) == {}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["skipped " + name for name in args.only]


def test_training_of_equal_sizes_is_compared(tmp_path, capsys):
    """Ours with no peer at hand: every arm has run, with the backup's number of parameters, and the
    rest is named as skipped.
    """
    rows = train_peers.compare(
        "tiny", SimpleNamespace(peers=tmp_path, only=["aria", *train_peers.SOURCES], rounds=1)
    )
    assert [row["name"] for row in rows] == list(train_peers.OURS)
    wanted = peer_models.target(train_peers.SHAPES["tiny"])
    assert all(abs(row["params"] / wanted - 1) < 0.01 and row["tok_per_s"] > 0 for row in rows)
    assert next(row["backup_ahead"] for row in rows if row["name"] == "aria backup") == 1
    assert capsys.readouterr().out.count("skipped ") == len(train_peers.SOURCES)


@pytest.mark.parametrize("wide", [1, 3])
def test_a_width_is_found_for_equal_parameters(wide):
    """fit_width: the closest multiple of 8, for any model that grows with its width."""
    width = peer_models.fit_width(lambda ff: torch.nn.Linear(ff, wide, bias=False), 1000 * wide + 3)
    assert width == 1000


# ---- what peers have learned: bound_peers.py -----------------------------------------------------

@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("more", [0, 1])                     # with and without a logit for the mask
def test_a_uniform_guess_scores_ln_v(causal, more):
    """Whatever it says of the mask: that is no answer."""
    guess = torch.zeros(60 + more)
    guess[60:] = 9.0
    student = peer_models.Student(
        None, None, lambda ids: guess.expand(*ids.shape, 60 + more), causal
    )
    nats = bound_peers.score(
        student, torch.arange(120).view(3, 40) % 60, vocab=60, draws=3, batch=2
    )
    assert nats.shape == (3,) and torch.allclose(nats, torch.full((3,), math.log(60)), atol=1e-4)


TINY = peer_models.Setting(
    dict(d_model=32, n_layers=2, n_heads=2, d_ff=64, memory_slots=4, seq_len=24),
    4,
    vocab=50,
    steps=10,
)


@pytest.mark.parametrize("model", ["primary", "backup"])
@pytest.mark.parametrize("settings", [{}, peer_models.MIXTURE, dict(objective="ar")])
def test_the_score_of_ours_is_the_bound_of_evaluate(model, settings):
    """Trained a little, so that the logits say something; an adapter that reads other ids than the
    masks' would score worse.
    """
    torch.manual_seed(3)
    rows = torch.randint(4, 50, (6, 24))
    student = peer_models.ours(TINY, 1e-2, model, **settings)
    block = 1 if student.causal else 24
    for n in range(3):
        student.step(rows[:4], n)
    student.net.eval()
    expected = torch.stack(
        [masking.bound(student.net, rows, block, seed=seed)[0] for seed in (5, 6)]
    ).mean(0)
    found = bound_peers.score(student, rows, TINY.vocab, seed=5, draws=2, batch=4)
    assert (
        torch.allclose(found, expected, atol=1e-4)
        and abs(float(found.mean()) - math.log(50)) > 0.02
    )
    assert float(found.mean()) == pytest.approx(
        estimators.held_out(student.net, rows, [block], 5, 4, 2)[block]["nats"], abs=1e-4
    )


@pytest.fixture
def study(corpus_dir, tmp_path):
    args = bound_peers.parser().parse_args(["--only", "aria backup", "aria ar", "nanoGPT"])
    vars(args).update(
        TINY.shape,
        peers=tmp_path,
        data_dir=corpus_dir / "data/processed",
        out=str(tmp_path / "out"),
        steps=6,
        judge=2,
        every=2,
        batch_size=2,
        curve_windows=2,
        windows=4,
        draws=1,
        rounds=2,
    )
    return args


def test_a_study_of_bounds_goes_on_where_it_stopped(study, capsys):
    """Rates until the best has neighbours; missing peers skipped; finished runs are kept, a line
    cut off comes out alike.
    """
    rows, budget = bound_peers.compare(study)
    assert [r["arm"] for r in rows] == [
        "aria backup",
        "aria ar",
    ] and "skipped nanoGPT" in capsys.readouterr().out
    for r in rows:
        rates = sorted(map(float, r["judged"]))
        assert len(rates) >= 3 and r["published_rate"] in rates
        assert (
            rates[0] < r["rate"] < rates[-1]
            or r["rate"] in (rates[0], rates[-1])
            and len(rates) >= 5
        )
        assert [step for step, *_ in r["curve"]] == [2, 4, 6] and r["equal_tokens"]["steps"] == 6
        assert r["equal_seconds"]["steps"] * r["step_s"] <= budget * 1.001
    results = bound_peers.Path(study.out) / "runs.jsonl"
    before = results.read_text()
    assert bound_peers.compare(study)[0] == rows and results.read_text() == before
    assert "run:" not in capsys.readouterr().out
    lines = before.splitlines()
    cut = next(i for i, text in enumerate(lines) if '"run"' in text and '"aria ar"' in text)
    results.write_text("\n".join(lines[:cut] + lines[cut + 1:] + [lines[cut][:80]]))
    again = bound_peers.compare(study)[0]
    assert capsys.readouterr().out.count("run:") == 1
    assert [r["equal_tokens"] for r in again] == [r["equal_tokens"] for r in rows]
    study.seed = 7  # other settings: nothing of it is taken over
    assert not bound_peers.Study(study).find(arm="aria ar")
    assert json.loads(results.read_text().splitlines()[-1])["kind"] == "run"


# ---- likelihood: the same tokens of the same model, whoever asks ---------------------------------

# (3, 12)
ROWS = torch.cat((torch.full((3, 1), likelihood_peers.BOS), torch.arange(4, 37).view(3, 11)), dim=1)
LLADA = """
import torch
from transformers import AutoModel
def get_log_likelihood(model, prompt, answer, mc_num, batch_size, mask_id):
    hidden = torch.cat((prompt, torch.full_like(answer, mask_id)))[None].repeat(batch_size, 1)
    logp = model(hidden).logits[:, len(prompt):].log_softmax(-1)
    return float(logp.gather(-1, answer.expand(batch_size, -1)[..., None]).sum() / batch_size)
"""
RADD = """
import torch
from noise_lib import LogLinearNoise
def get_loss_fn(noise, token_dim, train, loss_type):
    def loss(model, batch):
        model.eval()
        masked = torch.full_like(batch, token_dim - 1)
        return -model(masked).gather(-1, batch[..., None])[..., 0].sum(-1)
    return loss
"""


@pytest.fixture
def engines_there(tmp_path):
    """Files with the peers' interfaces and a known answer: the whole row hidden at once, no chance
    in it.
    """
    for name, text in (("LLaDA/get_log_likelihood.py", LLADA), ("RADD/losses.py", RADD),
                       ("RADD/noise_lib.py", "class LogLinearNoise:\n    pass\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_engines_are_given_exactly_our_logits(kind, net):
    """Both adapters where a token is hidden: the model's own logits up to rounding, and the CE that
    our estimators add up.
    """
    model = tiny_model(kind, 60, n_heads=4)
    counted = likelihood_peers.Counted(model)
    masked = (torch.arange(36).view(3, 12) % 3 == 1) & (torch.arange(12) > 0)
    xt = torch.where(masked, model.cfg.mask_id, ROWS)
    theirs = likelihood_peers.ForLLaDA(counted)(xt).logits
    right = model(xt)[masked]
    torch.testing.assert_close(theirs[masked], right)
    logp = likelihood_peers.ForRADD(counted).eval()(xt[:, 1:])
    torch.testing.assert_close(logp[masked[:, 1:]], right.log_softmax(-1))
    assert logp.shape == (3, 11, 61)
    piece = likelihood_peers.as_piece(ROWS)
    ours = estimators.surprise(counted, ROWS, masked, estimators.lay_out(piece, 12))
    assert torch.allclose(
        ours[masked], -theirs.log_softmax(-1).gather(-1, ROWS[..., None])[..., 0][masked], atol=1e-5
    )
    assert counted.rows == 3 * 3


def test_a_uniform_model_costs_ln_v_per_token(engines_there, net):
    """Through the whole path: who is asked, which tokens count, the sums. All but the time drawn
    iid leave nothing to chance.
    """
    net.head.weight.zero_()
    counted = likelihood_peers.Counted(net)
    found = likelihood_peers.measure(
        likelihood_peers.engines(engines_there, counted), counted, ROWS, 4, 3
    )
    assert len(found) == 3 + len(likelihood_peers.RADD_LOSSES)
    for m in found:
        exact = m["name"] != "aria t iid"
        assert abs(m["nats"] - math.log(59)) < (1e-4 if exact else 6 * m["se"]), m["name"]
        assert (m["variance"] < 1e-9) == exact
    assert {m["forwards"] for m in found} == {3 * 4 * 3}  # rows x copies x repeats, of each engine


def test_two_ways_to_give_bos_are_one(engines_there, net):
    """As a prompt, and put in front by the adapter: a model that reads its context says the same,
    and something else without.
    """
    counted = likelihood_peers.Counted(net)
    found = likelihood_peers.engines(engines_there, counted)
    a, b = (found[name](ROWS, 4, 0) for name in ("LLaDA get_log_likelihood", "RADD k_DCE"))
    assert torch.allclose(a, b, rtol=1e-6) and a.dtype == torch.float64 and a.shape == (3,)
    other = ROWS.clone()
    other[:, 0] = 9
    assert not torch.allclose(found["LLaDA get_log_likelihood"](other, 4, 0), a, rtol=1e-4)


@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_our_code_and_every_mask_by_hand(kind, tmp_path, capsys):
    """The bound of a tiny model from all 31 masks of 5 tokens: to 1e-6. Without any peer ours is
    still measured.
    """
    rows = likelihood_peers.brute_force(tmp_path, kind, 5, 3, copies=16)
    assert [r["name"] for r in rows] == ["aria exact count", "aria t iid"] and all(
        r["ours_off"] < 1e-6 for r in rows
    )
    assert (
        abs(rows[0]["nats"] - rows[0]["exact"]) < 6 * rows[0]["se"]
        and capsys.readouterr().out.count("skipped") == 2
    )


def test_the_laws_of_the_counts():
    """Strides that are whole numbers give every count its share; halves rounded to even do not.
    Times cut off lose their eps.
    """
    assert likelihood_peers.llada_counts(6, 3) == pytest.approx({k: 1 / 6 for k in range(1, 7)})
    odd = likelihood_peers.llada_counts(6, 4)
    assert sum(odd.values()) == pytest.approx(1) and odd[2] > 1.4 * odd[1]
    assert sum(likelihood_peers.radd_times(6).values()) == pytest.approx(0.999, abs=1e-5)


def test_a_gap_is_judged_by_both_errors():
    def engine(name, nats, se):
        return {
            "name": name,
            "nats": nats,
            "se": se,
            "variance": 1.0,
            "forwards": 1,
            "rows": [nats - 1, nats + 1.1],
        }

    close, far = (
        likelihood_peers.compare([engine("a", 5.0, 0.03), engine("b", b, 0.04)])[0]
        for b in (5.09, 5.11)
    )
    assert close["inside"] and not far["inside"] and close["allowed"] == pytest.approx(0.1)


def test_nothing_to_compare_with_is_exit_3(tmp_path, capsys):
    assert likelihood_peers.main(["--peers", str(tmp_path)]) == 3
    assert len(capsys.readouterr().out.splitlines()) == 1
