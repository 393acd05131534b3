"""What reaches a terminal: whole characters, no escape of a model's making, colours only around whole words."""
import io
import random
import re
import unicodedata

import pytest
import torch

from decode import Canvas
from terminal import GAP, Stream, Watch, painted, printable
from tokenizer import train_tokenizer

TEXTS = ["मैं कल बाज़ार गया था और क्षत्रिय की कहानी सुनी।", "mai kal bazaar gaya tha, yaar!", "ज्ञान श्रीमान् क्‍ष 👩‍🚀 1234"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS * 20, tmp_path_factory.mktemp("t") / "t.model", 420, log=[].append)


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\r\x07c\x9bd\n\te") == "a\ufffd[2Jb\ufffd\ufffdc\ufffdd\n\te"


def test_streaming_prints_the_text_and_never_half_a_character(tokenizer):
    rnd = random.Random(0)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for _ in range(50):
            out, at = io.StringIO(), 0
            stream = Stream(out)
            while at < len(ids):
                at = min(len(ids), at + rnd.randint(1, 4))
                stream.grow(tokenizer.written(ids[:at]))
                assert "\ufffd" not in out.getvalue() and text.startswith(out.getvalue())
            stream.grow(text, final=True)
            assert out.getvalue() == text + "\n"


def test_no_colour_cuts_a_cluster_and_the_text_is_whole(tokenizer):
    rnd, mask = random.Random(1), tokenizer.vocab_size
    for text in TEXTS:
        ids = tokenizer.encode(text)
        chance = [rnd.random() for _ in ids]
        assert re.sub(r"\x1b\[[\d;]*m", "", painted(ids, chance, tokenizer, mask, True)) == text
        for after in re.findall(r"\x1b\[[\d;]*m(.)", painted(ids, chance, tokenizer, mask, True)):
            assert not unicodedata.category(after).startswith("M") and after not in "\u200c\u200d"
        holes = [mask if rnd.random() < 0.4 else i for i in ids]
        assert painted(holes, chance, tokenizer, mask, False).count(GAP) == holes.count(mask)


def test_watching_prints_a_line_for_each_forward(tokenizer):
    ids = torch.tensor([[2, *tokenizer.encode(TEXTS[1])]])
    ids[0, -3:] = tokenizer.vocab_size
    out = io.StringIO()
    Watch(tokenizer, out)(Canvas(ids, [0], tokenizer.vocab_size, True), 1, ids.shape[1], 0)
    assert out.getvalue().count("\n") == 1 and out.getvalue().rstrip().endswith(GAP * 3) and "\x1b" not in out.getvalue()
