"""English web text in GPT-2's encoding: its tokenizer, `python -m prepare_fineweb` against the
local stand-in of the hub, and training on the token files that it writes.

    python -m pytest tests/test_fineweb.py
"""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.console import UserError
from text import gpt2
from text.tokenizer import Tokenizer

pytest.importorskip("tokenizers")
TOKENIZER = gpt2.Gpt2Tokenizer()


# ---- the tokenizer -------------------------------------------------------------------------------

def test_the_ids_are_gpt_2s():
    """Ids that are known from elsewhere, all bytes, and the end of text as text."""
    assert TOKENIZER.encode("Hello world") == [15496, 995]
    assert TOKENIZER.encode("Hello, I'm a language model,") == [
        15496, 11, 314, 1101, 257, 3303, 2746, 11,
    ]
    assert len(gpt2.pieces()) == len(set(gpt2.pieces())) == gpt2.VOCAB_SIZE == 50257
    assert sorted(gpt2.byte_letters()) == list(range(256))
    assert gpt2.pieces()[gpt2.END_ID] == "<|endoftext|>" and gpt2.END_ID == 50256
    assert gpt2.END_ID not in TOKENIZER.encode("one<|endoftext|>two")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_gpt_2s_text_comes_back_byte_for_byte(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert gpt2.piece_bytes()[ids].sum() == len(text.encode())
    assert TOKENIZER.decode([gpt2.END_ID, *ids, 50257]) == text


@given(st.text(st.sampled_from(" ab'sd1.\n\t\u00a0\u3000\u0939\u093f\U0001f469"), max_size=200))
def test_a_long_text_has_the_ids_of_the_whole(text):
    whole = TOKENIZER.bpe.encode(text).ids
    longest = gpt2.PART_CHARS
    gpt2.PART_CHARS = 7
    try:
        assert TOKENIZER.encode(text) == whole
    finally:
        gpt2.PART_CHARS = longest


def test_a_tokenizer_is_known_by_its_content(tmp_path, corpus_dir):
    """A path or bytes, SentencePiece's or GPT-2's; a changed list of merges is refused."""
    own = corpus_dir / "data/tokenizer/aria_hindi.model"
    assert isinstance(gpt2.open_tokenizer(own), Tokenizer)
    copy = tmp_path / "tokenizer.model"
    copy.write_bytes(TOKENIZER.model_bytes.replace(b"\n", b"\r\n"))      # a checkout on Windows
    for source in (copy, copy.read_bytes(), TOKENIZER.model_bytes):
        opened = gpt2.open_tokenizer(source)
        assert opened.sha256 == gpt2.SHA256 and opened.model_bytes == TOKENIZER.model_bytes
    copy.write_bytes(TOKENIZER.model_bytes.replace(b"h e", b"e h", 1))
    with pytest.raises(UserError, match="merges of GPT-2"):
        gpt2.open_tokenizer(copy)
    with pytest.raises(UserError, match="no tokenizer at"):
        gpt2.open_tokenizer(tmp_path / "missing")


def test_a_letter_that_a_limit_cut_is_left_out():
    ids = TOKENIZER.encode("ok \U0001f469")
    assert TOKENIZER.written(ids[:-1]) == "ok " and TOKENIZER.written(ids) == "ok \U0001f469"
    assert [TOKENIZER.opens_word(i) for i in TOKENIZER.encode("one two\nthree")] == [
        False, True, True, False,
    ]
    assert np.array_equal(TOKENIZER.encode_many(["a", ""])[1], [])
