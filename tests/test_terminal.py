"""What reaches a terminal: whole characters, no escape of a model's making, colours only around
whole words.
"""
import io
import json
import random
import re
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest

import cli
import config
from common.console import UserError, run, say
from common.files import json_text
from sampling.decode import Canvas
from sampling.terminal import GAP, Stream, Watch, painted, printable
from text.tokenizer import train_tokenizer

TEXTS = [
    "मैं कल बाज़ार गया था और क्षत्रिय की कहानी सुनी।",
    "mai kal bazaar gaya tha, yaar!",
    "ज्ञान श्रीमान् क्‍ष 👩‍🚀 1234",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("t") / "t.model"
    return train_tokenizer(TEXTS * 20, path, 420, "bpe", log=[].append)


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
    ids = np.array([[2, *tokenizer.encode(TEXTS[1])]])
    ids[0, -3:] = tokenizer.vocab_size
    out = io.StringIO()
    Watch(tokenizer, out)(Canvas(ids, [0], tokenizer.vocab_size, True), 1, ids.shape[1], 0)
    assert (
        out.getvalue().count("\n") == 1
        and out.getvalue().rstrip().endswith(GAP * 3)
        and "\x1b" not in out.getvalue()
    )


NAMES = ["a\x1b[31mb", "c\x9bd", "e\rf"]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_messages_do_not_move_the_cursor(name, capsys):
    say(f"checkpoint: {name}")
    with pytest.raises(SystemExit):
        run(lambda argv: cli.announce(*cli.parse(config.SampleArgs, ["--ckpt", name], "sample")))

    def fail(argv):
        raise UserError(f"there is no checkpoint {name}")
    with pytest.raises(SystemExit):
        run(fail)
    with pytest.raises(SystemExit):
        run(
            lambda argv: cli.announce(
                *cli.parse(config.SampleArgs, ["--ckpt", name, "--print_config"], "sample")
            )
        )
    out, err = capsys.readouterr()
    assert (
        err.count("\ufffd") == 3
        and out.count("\ufffd") == 1
        and not re.search(r"[\x1b\x9b\r]", out + err)
    )


def test_json_for_a_terminal_is_lossless_and_has_no_raw_control_character():
    value = {"text": "".join(map(chr, range(0xa1))) + "\ud800 \udcff नमस्ते 😀", "n": 1.5}
    text = json_text(value)
    assert (
        json.loads(text) == value
        and not re.search("[\x00-\x1f\x7f-\x9f]", text)
        and "नमस्ते 😀" in text
    )
    # half a surrogate pair is no UTF-8, and here it is escaped
    assert json.loads(text.encode()) == value


def test_an_escape_in_a_models_text_is_not_printed(text, tmp_path, monkeypatch, capsys):
    """In the samples that end a training, and in the verdict's."""
    import train
    from evaluation import check_run
    from text.tokenizer import Tokenizer
    monkeypatch.setattr(Tokenizer, "written", lambda self, ids: "x\x1b[2J\x9b")
    words = (
        "--data_dir {} --output_dir {} --d_model 16 --n_layers 1 --n_heads 2 --d_ff 16 "
        "--memory_slots 2 --seq_len 16 "
        "--batch_size 2 --grad_accum 1 --max_steps 1 --eval_interval 0 --threads 1 --no_amp --live "
        "off"
    )
    assert train.main(words.format(text, tmp_path / "run").split()) in (0, None)
    check_run.check(tmp_path / "run", SimpleNamespace(device="cpu", out_json=None))
    out, err = capsys.readouterr()
    assert (
        out.count("x\ufffd[2J\ufffd") == 2 * len(config.PROMPTS)
        and "\x1b" not in out + err
        and "\x9b" not in out + err
    )
