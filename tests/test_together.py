"""Texts that join and leave a batch: each is the one that is written alone, bit for bit."""
import dataclasses

import numpy as np
import pytest
from tiny import tiny_model

from common.files import ROOT
from edge import engine
from sampling import decode
from sampling.decode import Result
from sampling.settings import Settings
from sampling.together import Batch, Text
from sampling.torch_model import TorchModel

LEFT_TO_RIGHT = Settings(max_new_tokens=20, steps=1, mode="block_frozen", block_size=1, eos_id=3)


def starter():
    pytest.importorskip("onnxruntime", reason="the starter model is exported")
    return engine.load(ROOT / "exports/starter", threads=1)


def cases(model, count):
    """(prompt, settings, seed): prompts of 1 to 40 tokens, several ways to draw."""
    random = np.random.default_rng(7)
    words = min(model.cfg.vocab_size - 2, 200)
    for seed in range(count):
        length = int(random.integers(0, 40))
        prompt = [2, *random.integers(4, words, length).tolist()]
        ways = dict(
            temperature=(0.0, 0.7, 1.0)[seed % 3],
            top_k=(0, 12)[seed % 2],
            repetition_penalty=(1.0, 1.3)[seed // 2 % 2],
            max_new_tokens=1 + seed % 7 * 4,
        )
        yield prompt, dataclasses.replace(LEFT_TO_RIGHT, **ways), seed


@pytest.mark.parametrize("make", [starter, lambda: TorchModel(tiny_model("primary", seed=3))])
def test_each_text_is_the_one_that_is_written_alone(make):
    """Three are there at first; the others join one by one, after each forward."""
    model = make()
    asked = list(cases(model, 18))
    batch = Batch(model)
    texts = []
    largest = 0
    for number, (prompt, settings, seed) in enumerate(asked):
        assert batch.takes(settings)
        result = Result([None], [None], row_forwards=[0])
        text = Text(number, 0, [prompt], settings, [seed], result, keep_chance=True)
        texts.append(text)
        batch.join(text)
        largest = max(largest, len(batch.texts))
        if number > 2 and batch.texts:
            batch.forward()
    while batch.texts:
        batch.forward()
    assert largest >= 5

    for text, (prompt, settings, seed) in zip(texts, asked, strict=True):
        alone, chance = written_alone(model, prompt, settings, seed)
        assert text.result.full_rows == alone.full_rows and text.result.rows == alone.rows
        assert text.result.row_forwards == alone.row_forwards
        # the chances of the chosen tokens say whether the logits were the same
        written = slice(len(prompt), text.end)
        assert np.allclose(text.canvas.chance[:, written], chance[:, written], atol=1e-6)


def written_alone(model, prompt, settings, seed):
    """-> (Result, the chance of each token when it was chosen (1, T))."""
    chances = []

    def after_forward(canvas, lo, hi, step):
        chances.append(canvas.chance.copy())
    return decode.generate(model, prompt, settings, [seed], after_forward), chances[-1]


def test_who_may_join():
    """Left to right, and only where a text's length is no shape of its cache."""
    batch = Batch(TorchModel(tiny_model("primary")))
    assert batch.takes(LEFT_TO_RIGHT)
    for other in (
        dict(block_size=4),
        dict(mode="full"),
        dict(guidance_scale=2.0),
        dict(sampler="speculate"),
        dict(min_depth=1),
    ):
        assert not batch.takes(dataclasses.replace(LEFT_TO_RIGHT, **other)), other
    assert not Batch(TorchModel(tiny_model("backup"))).takes(LEFT_TO_RIGHT)
