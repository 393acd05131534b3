"""Properties of text/tokenizer.py: lossless for any string, nothing skipped in training, no special
id out of user text.
"""
import json
import os
import random
import subprocess
import sys
import unicodedata

import pytest
import sentencepiece

from common.console import UserError
from text import tokenizer
from text.tokenizer import (
    BOS,
    EOS,
    LINE_BYTES,
    Tokenizer,
    normalise,
    script_of,
    sentences,
    train_tokenizer,
)

HINDI = "मुझे एक अच्छी कहानी सुनाओ। भारत में आज मौसम कैसा है? पिताजी ने क़लम और सड़क देखी।"
HINGLISH = "yaar mujhe samajh nahi aa raha, kal 25 log bazaar gaye the! Tum kahan ho?"
DOCS = [f"{HINDI}\n{HINGLISH} {n}\n\n{HINDI[n:]} {HINGLISH[n:]}" for n in range(40)]

# what ECOSYSTEM's table says other settings lose, and what a normaliser must keep
KEPT = [
    "क़लम",
    "ड़",
    "क्\u200dष",
    "क्\u200cष",
    "र्\u200dय",
    "ન\u0acdદ ગુજરાતી ક\u0acdષ",
    "👩\u200d🚀",
    "❤️\u200d🔥",
    "🏳️\u200d🌈",
    "👨\u200d👩\u200d👧",
    "a\tb\n\n\n c",
    "  two  spaces  ",
    "ｆｕｌｌ",
    "ﬁ ½ ²",
    "\u2028\u2029\u200e\u200f",
    "▅ ⁇ <0x0A> \x7f\x85",
    "𝒳 𑀓 \U0010ffff",
    "é",
    "",
    " ",
    "\n",
    "日本語" * 30,
]


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return train_tokenizer(DOCS, tmp_path_factory.mktemp("tok") / "aria_hindi.model", 700, "bpe")


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def each(request, tok, tmp_path_factory):
    """A tokenizer of each type."""
    return (
        tok
        if request.param == "bpe"
        else train_tokenizer(DOCS, tmp_path_factory.mktemp("uni") / "t.model", 420, "unigram")
    )


def child(code, path):
    return subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def random_text(rnd):
    pools = [
        lambda: chr(rnd.randrange(0x110000)),
        lambda: chr(rnd.randrange(0x900, 0x980)),
        lambda: chr(rnd.randrange(0x300, 0x370)),
        lambda: chr(rnd.randrange(32, 127)),
        lambda: chr(rnd.randrange(0xA80, 0xB00)),
        lambda: rnd.choice(
            "\u200c\u200d\u094d\u093c\ufe0f\u0301\u0327क\u0929र👩♂ "
            "\n\r\t\x00\ufeff\u202e▁\u00a0❤↚\u0338"
        ),
        lambda: rnd.choice(["<s>", "</s>", "<mask>", "<pad>", "<unk>", "<0x41>", HINDI, HINGLISH]),
    ]
    chosen = rnd.sample(pools, rnd.randint(1, 3))
    return "".join(rnd.choice(chosen)() for _ in range(rnd.randint(0, 25)))


def test_random_unicode_survives(each):
    tok, rnd = each, random.Random(1)
    for _ in range(5000):
        text = random_text(rnd)
        once = normalise(text)
        assert normalise(once) == once, ascii(text)
        ids = tok.encode(text)
        assert tok.decode(ids) == once, ascii(text)
        assert all(EOS < i < tok.vocab_size for i in ids), ascii(text)


@pytest.mark.parametrize("text", KEPT)
def test_kept_exactly(each, text):
    assert normalise(text) == unicodedata.normalize("NFC", text)
    assert each.decode(each.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    "before, after",
    [
        ("a\r\nb\rc", "a\nbc"),
        ("a\u00a0b", "a b"),
        ("a▁b", "a_b"),
        ("\ud800x\udfff", "\ufffdx\ufffd"),
        ("\ufeffa\ufffeb", "ab"),
        ("a\x00\x07\x1f\x0bb", "ab"),
        ("\u202aa\u202db\u202ec\u202c", "abc"),
        ("e\u0301", "é"),
        ("\u0958", "\u0915\u093c"),
        ("\u0928\u093c", "\u0929"),
        ("क\u200dख a\u200cb \u200d", "कख ab "),
        ("क्\u200d", "क्"),
        ("क्\u200d\u200d\u200cष", "क्\u200dष"),
        ("क\u093c्\u200dष", "क\u093c्\u200dष"),
        ("👩\u200c👩", "👩👩"),
        ("👩\u200da", "👩a"),
        ("\u0995\u09cd\u200d\u09af", "\u0995\u09cd\u09af"),
    ],
)
def test_normaliser_rules(before, after):
    assert normalise(before) == after


@pytest.mark.parametrize(
    "text",
    ["<s>", "</s>", "<mask>", "[MASK]", "<pad>", "<unk>", "<0x41>", "\n<s>\n", "<s></s>" * 50],
)
def test_no_special_id_from_text(each, text):
    tok, ids = each, each.encode(text)
    assert tok.decode(ids) == text and min(ids) > EOS and max(ids) < tok.vocab_size
    assert not any(tok.sp.is_control(i) or tok.sp.is_unknown(i) for i in ids)


def test_decode_leaves_out_specials_mask_and_nonsense(tok):
    ids = tok.encode("नमस्ते")
    assert tok.decode([BOS, 0, 1, *ids, tok.vocab_size, EOS, -1, 10**9]) == "नमस्ते"


@pytest.mark.parametrize("text", ["नमस्ते 👩\u200d🚀 日本語 \U0010ffff", HINDI, "é"])
def test_text_cut_by_its_length_ends_in_a_whole_character(each, text):
    ids, cut = each.encode(text), 0
    for n in range(len(ids) + 1):
        seen = each.written(ids[:n])
        assert "\ufffd" not in seen and text.startswith(seen)
        cut += seen != each.decode(ids[:n])
    assert seen == text and (cut > 0) == any(map(each.sp.is_byte, ids))


def test_hard_strings_do_not_crash(tok):
    for text in (
        "क" + "\u0301\u0327" * 2500,
        "\ud800" * 1000,
        "\x00" * 1000,
        "नमस्ते " * 100_000,
        "क" * 300_000,
    ):
        assert tok.decode(tok.encode(text)) == normalise(text)


@pytest.mark.parametrize("unit", ["नमस्ते दुनिया ", "क़्षत्रिय", "👨\u200d👩\u200d👧"])
def test_a_line_of_a_megabyte(each, unit):
    """No line break anywhere: cut for the trainer and for the encoder, and nothing lost."""
    text = normalise(unit * (1_000_000 // len(unit.encode())))
    assert each.decode(each.encode_many([text])[0]) == text
    assert (
        max(len(part.encode()) for part in sentences(text)) <= LINE_BYTES
        and "".join(sentences(text)) == text
    )


def test_long_text_has_the_ids_of_one_piece(tok, monkeypatch):
    text = "\n".join(DOCS * 20) + "   " + " ".join(DOCS)
    monkeypatch.setattr(tokenizer, "PART_CHARS", 1000)
    assert tok.encode(text) == tok.sp.encode(normalise(text))


def test_encode_many_equals_encode(tok):
    rnd = random.Random(2)
    texts = ["", *(random_text(rnd) for _ in range(300)), "शब्द " * 30_000, HINDI]
    assert [ids.tolist() for ids in tok.encode_many(texts)] == [tok.encode(text) for text in texts]
    assert tok.encode_many([]) == []


def test_newline_and_digits_are_their_own_pieces(tok):
    assert [tok.sp.id_to_piece(i) for i in tok.encode("\n\n")] == ["\n", "\n"]
    assert not any(
        sum(c.isdigit() for c in tok.sp.id_to_piece(i)) > 1 for i in range(260, tok.vocab_size)
    )


def test_sentences_keep_everything_and_stay_short():
    rnd = random.Random(3)
    hard = "क" * 10_000, "क्" * 9000, "कि" * 8000, "😀" * 5000, "a b" * 5000, "!" * 10_000
    for text in (*hard, *(random_text(rnd) for _ in range(500))):
        parts = list(sentences(text))
        assert "".join(parts) == text
        assert all(0 < len(part.encode("utf-8", "surrogatepass")) <= LINE_BYTES for part in parts)
    for lead in range(4):  # never in the middle of a conjunct or syllable
        text = "क" * lead + "क्षि" * 3000
        assert {part[0] for part in sentences(text)} == {"क"}


def test_trainer_skips_nothing(tmp_path):
    """The C++ trainer's own log, from a corpus of 10,000-letter lines: it says so when it skips."""
    code = """if True:
        import sys, sentencepiece
        from text import tokenizer
        train = sentencepiece.SentencePieceTrainer.train
        sentencepiece.SentencePieceTrainer.train = lambda **k: train(**{**k, "minloglevel": 0})
        docs = ["कखगघ ङचछज" * 1200 + "▅", "x" * 10_000, "a\\tb"]
        tokenizer.train_tokenizer(docs, sys.argv[1], 400, "bpe")"""
    done = child(code, tmp_path / "t.model")
    assert done.returncode == 0, done.stderr[-500:]
    assert "trainer_interface" in done.stderr                       # the log was on
    assert "kipped" not in done.stderr and "too long" not in done.stderr.lower()
    lines = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["lines"]
    assert f"Loaded all {lines} sentences" in done.stderr


def test_training_is_deterministic_and_reported(tok, tmp_path):
    again = train_tokenizer(iter(DOCS), tmp_path / "deep" / "t.model", 700, "bpe")
    assert again.model_bytes == tok.model_bytes == (tmp_path / "deep" / "t.model").read_bytes()
    report = json.loads((tmp_path / "deep" / "t.json").read_text(encoding="utf-8"))
    assert (
        report["sha256"] == tok.sha256
        and report["normaliser"] == "v1"
        and report["vocab_size"] == tok.vocab_size
    )
    assert all(entry["round_trip"] for entry in report["scripts"].values())
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["t.json", "t.model"]


def test_costs_per_script_are_counted_stored_and_said(tmp_path):
    """Against a count by hand: bytes of letters cut into pieces, words, tokens."""
    said = []
    docs = [HINDI * 3] * 20 + [HINGLISH * 3] * 20
    tok = train_tokenizer(docs, tmp_path / "t.model", 600, "bpe", log=said.append)
    scripts = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["scripts"]
    assert set(scripts) == {"devanagari", "latin"} and [
        line.split(":")[0].strip() for line in said[-2:]
    ] == list(scripts)
    for script, text in (("devanagari", HINDI * 3), ("latin", HINGLISH * 3)):
        cost, tokens = scripts[script], len(tok.encode(text))
        assert (
            cost["tokens_per_word"] == round(tokens / len(text.split()), 3)
            and cost["documents"] == 20
        )
        assert (
            cost["bytes_per_token"] == round(len(text.encode()) / tokens, 3)
            and cost["byte_fallback_share"] == 0
        )
        assert any(f"{cost['tokens_per_word']:.2f} tokens a word" in line for line in said)
    assert scripts["latin"]["clusters_cut"] == 0                     # a Latin letter is one byte


@pytest.mark.parametrize("text, letters, cut", [
    ("", 0, 0),
    ("ab", 2, 0),
    ("日本", 2, 2),
    ("a日", 2, 1),
    ("👩\u200d🚀", 1, 1),
    ("e\u0323", 1, 1),
])
def test_cut_letters(tmp_path, text, letters, cut):
    """A model that knows only the letters a to e: every other one is spelled in bytes, and so is
    cut.
    """
    tok = train_tokenizer(["abcde ab cd"] * 3, tmp_path / "t.model", 270, "bpe")
    assert tok.clusters(text) == (letters, cut)


def test_a_syllable_is_one_letter(tok):
    assert [i for i in range(len("क्षि कि")) if tokenizer.opens_cluster("क्षि कि", i)] == [0, 4, 5]
    assert tok.clusters("क्षि")[0] == 1 and tok.clusters("नमस्ते")[0] == 3


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("docs", [["a"], ["नमस्ते"], ["1 2 3"], ["日本語" * 50], ["😀"]])
def test_tiny_corpora_give_what_they_can(tmp_path, docs, model_type):
    said = []
    tok = train_tokenizer(docs, tmp_path / "t.model", 2000, model_type, log=said.append)
    assert 260 < tok.vocab_size < 2000 and str(tok.vocab_size) in said[0]
    for text in (" a b\n\tनमस्ते 😀 12", "▁"):
        # a space can be spelled, although none was seen
        assert tok.decode(tok.encode(text)) == normalise(text)


def test_vocabulary_too_small_or_text_missing(tmp_path):
    letters = ["".join(map(chr, range(0x4e00, 0x5e00)))] * 2
    with pytest.raises(UserError, match=r"300 is too small.* [45]\d{3}"):
        train_tokenizer(letters, tmp_path / "t.model", 300, "bpe")
    for docs in ([], ["", " \n"], ["▅"]):
        with pytest.raises(UserError, match="no text"):
            train_tokenizer(docs, tmp_path / "t.model", 300, "bpe")
    assert not list(tmp_path.iterdir())
    tok = train_tokenizer(letters, tmp_path / "t.model", 0, "bpe")  # 0: room is made
    assert tok.vocab_size > 4000


def test_sample_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "SAMPLE_BYTES", 20_000)
    seen = []
    endless = (seen.append(n) or DOCS[0] for n in range(10**9))
    train_tokenizer(endless, tmp_path / "t.model", 400, "bpe")
    assert len(seen) < 100


@pytest.mark.parametrize(
    "change",
    [
        dict(normalization_rule_name="nmt_nfkc"),
        dict(normalization_rule_name="nfkc"),
        dict(remove_extra_whitespaces=True),
        dict(byte_fallback=False),
        dict(pad_id=-1, unk_id=0, bos_id=1, eos_id=2),
        dict(user_defined_symbols=["x"]),
    ],
)
def test_foreign_models_are_refused(tmp_path, change):
    settings = (
        dict(
            vocab_size=400,
            model_type="bpe",
            normalization_rule_name="identity",
            byte_fallback=True,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=["\n"],
            hard_vocab_limit=False,
            minloglevel=2,
        )
        | change
    )
    docs = [doc.replace("\n", " ") for doc in DOCS]
    with open(tmp_path / "m.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(docs), model_writer=f, **settings
        )
    with pytest.raises(UserError, match="m.model.*identity.*prepare"):
        Tokenizer(tmp_path / "m.model")


def test_missing_and_damaged_files(tok, tmp_path):
    with pytest.raises(UserError, match="no tokenizer.*prepare"):
        Tokenizer(tmp_path / "none.model")
    with pytest.raises(UserError, match="no tokenizer"):
        Tokenizer(tmp_path)
    for number, data in enumerate((b"", b"hello" * 100, tok.model_bytes[:100], b"\x80\x04K\x01.")):
        (tmp_path / f"{number}.model").write_bytes(data)
        with pytest.raises(UserError, match=f"{number}.model is"):
            Tokenizer(tmp_path / f"{number}.model")


def test_mutated_models_never_kill_the_process(tok, tmp_path):
    """Byte flips and cuts, in one child: UserError or a tokenizer that works, but no signal."""
    code = """if True:
        import random, sys
        from common.console import UserError
        from text.tokenizer import Tokenizer
        data, rnd = open(sys.argv[1], "rb").read(), random.Random(5)
        for _ in range(200):
            bad = bytearray(data[:rnd.randrange(len(data))] if rnd.random() < 0.2 else data)
            for _ in range(rnd.randint(1, 20)):
                bad[rnd.randrange(len(bad))] = rnd.randrange(256)
            try:
                tok = Tokenizer(bytes(bad))
                tok.decode(tok.encode("नमस्ते abc 12"))
            except UserError:
                pass"""
    (tmp_path / "t.model").write_bytes(tok.model_bytes)
    done = child(code, tmp_path / "t.model")
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])


def test_bytes_and_file_agree(tok, tmp_path):
    (tmp_path / "t.model").write_bytes(tok.model_bytes)
    assert Tokenizer(tmp_path / "t.model").sha256 == Tokenizer(tok.model_bytes).sha256 == tok.sha256
    assert (tok.pad_id, tok.unk_id, tok.bos_id, tok.eos_id) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    "text, script",
    [
        (HINDI, "devanagari"),
        (HINGLISH, "latin"),
        ("Où êtes-vous, cœur?", "latin"),
        (HINDI + HINGLISH, "mixed"),
        ("", "other"),
        ("123 !", "other"),
        ("日本語です", "other"),
        ("ગુજરાતી", "other"),
    ],
)
def test_scripts(text, script):
    assert script_of(text) == script
