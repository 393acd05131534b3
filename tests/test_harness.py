"""lm-evaluation-harness runs its tasks on a checkpoint: the scores are our exact likelihoods, and
the batch size changes none of them.
"""
import json

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="only its tasks need it")
pytest.importorskip("datasets", reason="lm_eval reads its tasks with it")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from evaluation import estimators, harness  # noqa: E402
from sampling.torch_model import writer_of  # noqa: E402
from text.starter import grammar  # noqa: E402

RUN = "checkpoints/eco_hybrid_hi"
TASK = """task: hindi_order
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def pages():
    found, number = [], 0
    while len(found) < 12:
        kind, text = grammar.starter_document(11, number, 0.5)
        number += 1
        if kind == "devanagari":
            found.append(text)
    return found


def model(here, **settings):
    return harness.Aria(ckpt=str(here / RUN), device="cpu", **settings)


def asked(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@torch.no_grad()
def by_definition(net, ids, scored):
    """log p of the last tokens, one forward for each, without any batch."""
    total = 0.0
    for place in range(len(ids) - scored, len(ids)):
        states = net.clean_states(torch.tensor([ids[:place + 1]]))
        total += float(net.logits(states)[0, -1].log_softmax(-1)[ids[place]])
    return total


def test_likelihoods_are_exact_and_no_batch_changes_them(here, pages):
    alone, together = model(here, batch_size=1), model(here, batch_size=5)
    tok, net = alone.tokenizer, alone.model
    pairs = [(page[:9], page[9:16]) for page in pages] + [("", "मैं कल"), ("नमस्ते ", "दुनिया")]
    requests = [asked("loglikelihood", *pair) for pair in pairs]
    found = alone.loglikelihood(requests)
    for (context, rest), (log_p, _) in zip(pairs, found, strict=True):
        # the package's own way to cut: what of the whole is behind as many ids as the context has
        before = tok.encode(context.rstrip())
        behind = tok.encode(context + rest)[len(before):]
        ids = [tok.bos_id, *before, *behind]
        assert len(ids) <= alone.longest
        assert log_p == pytest.approx(by_definition(net, ids, len(behind)), abs=1e-3)
    for one, other in zip(found, together.loglikelihood(requests), strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-5) and one[1] == other[1]


def test_greedy_is_what_it_writes_itself(here, pages):
    lm = model(here)
    text = lm.generate_until([asked("generate_until", pages[0][:20], {"max_gen_toks": 5})])[0]
    prompt = [lm.bos, *lm.tokenizer.encode(pages[0][:20])]
    ids = harness.decode.generate(
        writer_of(lm.model), prompt,
        harness.Settings(max_new_tokens=5, steps=1, mode="block_frozen", block_size=1,
                         temperature=0, eos_id=lm.tokenizer.eos_id),
        [0],
    ).rows[0]
    assert text == lm.tokenizer.written(ids)
    (_, greedy), (_, other) = lm.scores([
        ([*prompt, *ids], len(ids)), ([*prompt, *ids[:-1], ids[-1] - 1], len(ids)),
    ])
    assert greedy and not other
    stop = text[2]
    cut = lm.generate_until(
        [asked("generate_until", pages[0][:20], {"max_gen_toks": 5, "until": [stop, "zzz"]})]
    )[0]
    assert cut == text[:text.index(stop)]


def test_rolling_scores_every_token_once(here, pages):
    """Behind the first window the score is that of python -m evaluate, of a text that fits."""
    lm = model(here, batch_size=4)
    short = pages[0][:25]
    ids = [lm.bos, *lm.tokenizer.encode(short)]
    nats = estimators.bound(lm.model, estimators.cut([ids], lm.longest), 1, 1)[0]
    long = " ".join(pages)
    found = lm.loglikelihood_rolling([asked("loglikelihood_rolling", text)
                                      for text in (short, long)])
    assert found[0] == pytest.approx(-float(nats), rel=1e-5)
    ids = lm.tokenizer.encode(long)
    size = lm.longest - 1
    total = 0.0
    for start in range(0, len(ids), size):
        part = ids[start:start + size]
        before = [ids[start - 1]] if start else [lm.bos]
        if len(part) < size:                       # the last window is as long as the others
            before = ids[-size - 1:-len(part)]
        total += lm.scores([([*before, *part], len(part))])[0][0]
    assert len(ids) > 3 * size and found[1] == pytest.approx(total, rel=1e-5)


def test_a_local_hindi_task_by_the_package_itself(here, pages, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    lines = []
    for number, page in enumerate(pages):
        words = page.split()
        choices = [" ".join(words[4:8]), " ".join(words[7:3:-1])]
        label = number % 2
        lines.append({"context": " ".join(words[:4]), "choices": choices[::1 - 2 * label],
                      "label": label})
    path = tmp_path / "hindi.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "hindi_order.yaml").write_text(TASK.format(path=path))
    figures = []
    for rows in (1, 8):
        found = lm_eval.simple_evaluate(
            model="aria", model_args=f"ckpt={here / RUN}", tasks=["hindi_order"], batch_size=rows,
            device="cpu", task_manager=TaskManager(include_path=str(tmp_path)), log_samples=False,
            bootstrap_iters=0,
        )
        figures.append(found["results"]["hindi_order"]["acc,none"])
    assert figures[0] == figures[1] and 0 <= figures[0] <= 1
