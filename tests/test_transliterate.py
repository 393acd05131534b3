"""Transliteration: how sentences are typed, the frame in which each letter stands beside its
answer, what a row asks, how its places are filled, and lines through prepare, train and sample.
"""
import contextlib
import json
import threading
import unicodedata
from http.client import HTTPConnection

import numpy as np
import pytest
import torch
from tiny import tiny_model

import checkpoint
import config
import export
import masking
import sample
import train
from common.console import UserError
from sampling.left_to_right import Guesses
from sampling.places import fill, places_of, words_of
from sampling.settings import Settings
from sampling.torch_model import TorchModel
from serving import paths, requests, server, worker
from serving.job import Cancelled
from serving.metrics import Metrics
from serving.typed import TypedJob, rule_of
from text import interlace, romanise, spell_back, transliterate
from text.build import build
from text.dataset import TokenData
from text.interlace import ROOM, InterlacedWindows, interlaced
from text.tokenizer import Tokenizer, script_of

BOS, SEP, EOS, MASK = 2, 0, 3, 40
WORDS = "मैं कल सुबह घर गया था और हम सब बहुत खुश थे लोग पानी आज मौसम".split()


class Ids:
    """The ids of a tokenizer."""
    pad_id = SEP
    bos_id = BOS
    eos_id = EOS


def prepared(folder, path, **changes):
    args = config.PrepareArgs(
        source="transliterate", input=(str(path),), data_dir=str(folder),
        tokenizer=str(folder / "tok.model"), **changes,
    )
    args.said = []
    build(args, args.said.append)
    return args


@pytest.fixture(scope="module")
def hindi(tmp_path_factory):
    """Sentences of a few words, as text and as rows."""
    home = tmp_path_factory.mktemp("typed")
    chance = np.random.default_rng(1)
    lines = [" ".join(chance.choice(WORDS, chance.integers(1, 7))) + "।" for _ in range(300)]
    (home / "hindi.txt").write_text("\n\n".join(lines), encoding="utf-8")
    prepared(home / "data", home / "hindi.txt", typists=3, val_doc_frac=0.1, pair_tokens=64)
    return home


# ---- what is typed -------------------------------------------------------------------------------

def test_a_text_is_cut_into_sentences_and_rows_and_no_word_is_lost():
    text = "ye 3.5 rupaye hai. kal milte hain\n" + "bahut " * 30
    found = list(transliterate.sentences(text))
    assert found[:2] == [["ye", "3.5", "rupaye", "hai."], ["kal", "milte", "hain"]]
    rows = interlace.cut(found[2], 64)
    assert sum(rows, []) == ["bahut"] * 30
    sizes = [1 + sum(interlace.tokens_of(len(word)) for word in row) for row in rows]
    assert max(sizes) <= 64 < sizes[0] + interlace.tokens_of(5)
    assert interlace.cut(["z" * 99, "a"], 64) == [["z" * 99], ["a"]]


def test_typists_differ_and_type_word_for_word():
    text = "मुझे कल सुबह दिल्ली जाना है। यह बहुत अच्छा समय है ।\nयह HTML है\nhello world"
    found = list(transliterate.typed_rows(text, 8, 1, 64))
    assert found == list(transliterate.typed_rows(text, 8, 1, 64))
    assert len({sentence for _, _, sentence in found}) == 2, "no sentence with a Latin letter"
    assert len({typed for typed, _, _ in found}) > 10
    for typed, meant, sentence in found:
        assert script_of(typed) == "latin" and meant in sentence and typed == typed.lower()
        assert len(typed.split(" ")) == len(meant.split(" "))
        # a full stop is typed where it is meant
        assert typed.endswith(".") == meant.endswith("।")


def test_a_word_can_be_guessed_without_a_model():
    """Half of the words that a typist types, though most are in no table, and all his letters but
    one in five.
    """
    known = "mujhe kal subah dilli jana hai. kya aap school gaye?".split()
    meant = "मुझे कल सुबह दिल्ली जना है। क्या आप स्कूल गये?".split()
    guesses = [spell_back.in_devanagari(word) for word in known]
    assert sum(guess == word for guess, word in zip(guesses, meant, strict=True)) >= 9
    assert spell_back.by_rule("ghar") == "घर" and spell_back.by_rule("hindi") == "हिंदी"
    assert spell_back.by_rule("logon") == "लोगों" and spell_back.by_rule("apne") == "अपने"
    assert spell_back.by_rule("rasta2024-x") and spell_back.by_rule("") == ""

    type_it = transliterate.typist(5)
    words = [unicodedata.normalize("NFC", word) for word in romanise.STARTER]
    right = [spell_back.by_rule(type_it(word)) == word for word in words]
    assert 0.2 < np.mean(right) < 1, "the rules alone"
    found = [spell_back.in_devanagari(type_it(word)) == word for word in words]
    assert np.mean(found) > 0.5 and len(words) > 500


# ---- the frame -----------------------------------------------------------------------------------

def test_each_letter_stands_beside_a_place():
    row = interlaced([[5, 6, 7], [8]], [[15, 16], [18, 19, 20]], Ids)
    assert row.tolist() == [
        BOS, 5, 15, 6, 16, 7, EOS, SEP, EOS, SEP, EOS, 8, 18, SEP, 19, SEP, 20,
    ]
    places = places_of([3, 1])
    assert words_of(row, places, EOS) == [[15, 16], [18, 19, 20]]
    assert interlaced([[5]], [[15] * (1 + ROOM)], Ids) is not None
    assert interlaced([[5]], [[15] * (2 + ROOM)], Ids) is None


def test_rows_ask_for_their_places_and_an_epoch_has_each_once(hindi):
    tok = Tokenizer(hindi / "data" / "tok.model")
    assert tok.of_letters
    data = TokenData(hindi / "data")
    windows = InterlacedWindows(data, 64, 5)
    x0 = windows.batch(0, windows.per_epoch)
    asked = windows.asked(0, windows.per_epoch)
    again = InterlacedWindows(data, 64, 5)
    assert np.array_equal(again.batch(7, 20), x0[7:27])
    lengths = 1 + np.where(asked, np.arange(64), 0).max(1)
    rows = [row[:length].tolist() for row, length in zip(x0, lengths, strict=True)]
    assert sorted(rows) == sorted(ids.tolist() for ids in data.documents())
    known = {word: set() for word in WORDS}
    for ids, where in zip(x0, asked, strict=True):
        typed = interlace.typed_in(ids, tok).split(" ")
        places = places_of([len(tok.encode(word)) for word in typed])
        assert np.array_equal(np.concatenate(places), np.flatnonzero(where))
        for word, answer in zip(typed, words_of(ids.numpy(), places, EOS), strict=True):
            known[tok.decode(answer).rstrip("।")].add(word.rstrip("."))
        assert (ids[len(where) - int(where.flip(0).int().argmax()):] == EOS).all()
    assert {"ghar"} <= known["घर"] and {"bahut"} <= known["बहुत"]

    # nothing but places is hidden, and in time all of them
    seen = np.zeros_like(asked[:2].numpy())
    for step in range(40):
        masks = masking.corrupt(
            config.TrainArgs(), 1, step, 2, 64, 64, asked=asked[:2], ends=False
        )
        seen |= masks.mask.numpy()
    assert np.array_equal(seen, asked[:2])

    with pytest.raises(UserError, match="the longest row .* give --seq_len"):
        InterlacedWindows(data, 16, 5)


def test_all_versions_of_a_sentence_are_on_one_side_of_the_split(hindi, tmp_path):
    tok = Tokenizer(hindi / "data" / "tok.model")
    meant = {}
    for split in ("train", "val"):
        documents = [ids.tolist() for ids in TokenData(hindi / "data", split).documents()]
        meant[split] = {tok.decode(ids[2::2]).strip("।") for ids in documents}
    # sentences; a part of one may be whole elsewhere
    long = {split: {text for text in found if len(text) > 12} for split, found in meant.items()}
    assert not long["train"] & long["val"] and len(long["val"]) > 5

    (tmp_path / "latin.txt").write_text("only English here\n", encoding="utf-8")
    with pytest.raises(UserError, match="no sentence of it is in Devanagari"):
        prepared(tmp_path / "none", tmp_path / "latin.txt")


def test_left_to_right_each_word_stands_behind_its_letters(hindi):
    row = interlaced([[5, 6, 7], [8]], [[15, 16], [18, 19, 20]], Ids)
    order = interlace.word_by_word(row, SEP)
    assert row[order].tolist() == [
        BOS, 5, 6, 7, SEP, SEP, 15, 16, EOS, EOS, EOS, 8, SEP, SEP, 18, 19, 20,
    ]
    data = TokenData(hindi / "data")
    mixed = InterlacedWindows(data, 64, 5)
    straight = InterlacedWindows(data, 64, 5, left_to_right=True)
    asked = mixed.asked(0, 9), straight.asked(0, 9)
    x0 = mixed.batch(0, 9), straight.batch(0, 9)
    assert not np.array_equal(*x0)
    for ids, where in ((x0[0], asked[0]), (x0[1], asked[1])):
        assert [row[at].tolist() for row, at in zip(ids, where, strict=True)] == [
            row[at].tolist() for row, at in zip(x0[0], asked[0], strict=True)
        ]


# ---- filling places ------------------------------------------------------------------------------

class Oracle:
    """An engine that knows each place's answer, with some chance."""

    class cfg:
        mask_id = MASK
        causal = False

    def __init__(self, answers, chance):
        self.answers = answers                                                     # (B, T)
        self.chance = chance
        self.passes = 0

    def new_cache(self, rows, length):
        return rows

    def states(self, ids, cache):
        self.passes += 1
        return ids

    def logits(self, states, rows, positions):
        logits = np.full((len(rows), MASK + 1), np.log((1 - self.chance) / 39), np.float32)
        for found, row, position in zip(logits, rows, positions, strict=True):
            # which row of all this is, its first letter says
            found[self.answers[states[row, 1] - 5, position]] = np.log(self.chance)
        logits[:, [SEP, MASK]] = -np.inf
        return logits


@pytest.mark.parametrize("rule, forwards", [
    (dict(sampler="threshold", threshold=0.9, steps=99), [1, 1]),
    (dict(sampler="threshold", threshold=0.99, steps=99), [5, 6]),
    (dict(sampler="confidence", steps=99), [5, 6]),
    (dict(sampler="confidence", steps=1), [1, 1]),
    (dict(sampler="entropy", threshold=0.0, steps=99), [2, 2]),
])
def test_places_are_filled_and_what_is_given_stays(rule, forwards):
    typed = [[[5, 9, 9], [9]], [[6, 9, 9], [9]]]
    answers = [[[15, 16], [17]], [[20, 21, 22], [23]]]
    whole = np.stack([interlaced(*row, Ids) for row in zip(typed, answers, strict=True)])
    rows = whole.copy()
    places = [places_of([3, 1]), places_of([3, 1])]
    for row, where in zip(rows, places, strict=True):
        row[np.concatenate(where)] = MASK
    engine = Oracle(whole, 0.95)
    settings = Settings(64, temperature=0.0, eos_id=EOS, **rule)
    found = fill(engine, rows, places, None, settings, [0, 0])
    assert np.array_equal(found.ids, whole)
    assert found.forwards.tolist() == forwards and engine.passes == max(forwards)

    # a word that is given is not asked
    rows[0] = whole[0]
    rows[0, places[0][1]] = MASK
    found = fill(engine, rows[:1], places[:1], None, settings, [0])
    assert np.array_equal(found.ids, whole[:1]) and found.forwards[0] <= 2


@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_left_to_right_each_letter_is_the_likeliest_behind_all_before_it(kind):
    net = tiny_model(kind, interlaced=True, causal=True, away=0.3)
    mask = net.cfg.mask_id
    rows = interlaced([[5, 9, 9], [6], [7, 8]], [[mask] * 5, [11, 12], [mask] * 4], Ids)[None]
    places = [places_of([3, 1, 2])]
    settings = Settings(64, 1, temperature=0.0, eos_id=EOS)
    found = fill(TorchModel(net), rows, places, None, settings, [0])
    order = interlace.word_by_word(found.ids[0], SEP)
    ids = found.ids[0][order]
    with torch.no_grad():
        likeliest = net.logits(net.clean_states(torch.tensor(ids[None])))[0].argmax(-1).numpy()
    forwards = 0
    for where in (places[0][0], places[0][2]):
        answer = found.ids[0][where]
        length = len(answer)
        if EOS in answer:
            length = answer.tolist().index(EOS) + 1
        at = np.flatnonzero(np.isin(order, where[:length]))
        assert np.array_equal(ids[at], likeliest[at])
        assert (answer[length:] == EOS).all()
        forwards += length
    assert found.forwards[0] == forwards
    assert np.array_equal(found.ids[0][places[0][1]], [11, 12, EOS])


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_guesses_change_no_letter_of_any_seed_and_right_ones_take_one_forward(kind, temperature):
    net = tiny_model(kind, interlaced=True, causal=True, away=0.3)
    model = TorchModel(net)
    mask = net.cfg.mask_id
    typed = [[5, 9, 9], [6], [7, 8]], [[9, 9, 5], [6], [8, 8]]
    rows = np.stack([interlaced(r, [[mask] * 5, [11, 12], [mask] * 4], Ids) for r in typed])
    places = [places_of([3, 1, 2])] * 2
    seeds = [4, 7]
    settings = Settings(64, 1, temperature=temperature, top_k=9, eos_id=EOS)
    plain = fill(model, rows, places, None, settings, seeds)
    right = [words_of(*row, EOS) for row in zip(plain.ids, places, strict=True)]
    settings.sampler = "speculate"
    nothing = [[[], [], []]] * 2
    wrong = [[[letter + 1 for letter in word] for word in row] for row in right]
    shifted = [[[13, *word] for word in row] for row in right]
    signs = frozenset(range(10, 20))
    for guesses in (right, nothing, wrong, shifted, [[[13] * 99] * 3] * 2):
        guesses = [Guesses(words, signs) for words in guesses]
        found = fill(model, rows, places, guesses, settings, seeds)
        assert np.array_equal(found.ids, plain.ids)
        assert (found.forwards <= plain.forwards).all()
        if guesses[0].words is right[0]:
            assert (found.forwards == 1).all()


def test_of_a_wrong_guess_the_rest_is_kept():
    """A letter too much, a sign too little, or another letter costs one forward more."""
    answers = [[20, 21, 22, 23], [24, 25]]
    signs = frozenset([21, 25])
    whole = interlaced([[5] * 4, [6] * 3], answers, Ids)[None]
    places = [places_of([4, 3])]
    rows = whole.copy()
    rows[0, np.concatenate(places[0])] = MASK
    settings = Settings(64, 1, sampler="speculate", temperature=0.0, eos_id=EOS)
    order = interlace.word_by_word(whole[0], SEP)
    begins = [1, 13]

    class Knows:
        """Each answer, but behind a wrong letter of the same word nothing but nonsense."""
        class cfg:
            mask_id, pad_id, causal = MASK, SEP, True

        def new_cache(self, rows, length):
            self.read = []
            return self

        def try_step(self, ids, cache):
            self.tried = self.read + ids[0].tolist()
            return ids

        def keep(self, tokens):
            self.read = self.tried[:len(self.read) + tokens]

        def logits(self, states, rows, positions):
            logits = np.zeros((len(rows), MASK), np.float32)
            answers = whole[0][order].tolist()
            for at, position in enumerate(positions + len(self.read)):
                word = slice(max(begin for begin in begins if begin <= position), position + 1)
                right = self.tried[word] == answers[word]
                logits[at, answers[position + 1] if right else 30] = 1
            return logits

    for guess, forwards in (
        ([[20, 21, 22, 23], [24, 25]], 1),
        ([[20, 19, 21, 22, 23], [24, 25]], 2),
        ([[20, 21, 19, 23], [24, 25]], 2),
        ([[20, 22, 23], [24, 25]], 2),
        ([[20, 19, 21, 22, 23], [25]], 3),
        ([[], [24, 25]], 5),
    ):
        found = fill(Knows(), rows, places, [Guesses(guess, signs)], settings, [0])
        assert np.array_equal(found.ids, whole) and found.forwards[0] == forwards, guess


def test_no_word_ends_before_a_letter_that_stands():
    whole = interlaced([[5, 9, 9]], [[15, EOS, 17]], Ids)[None]
    places = [places_of([3])]
    rows = whole.copy()
    rows[0, places[0][0]] = MASK
    rows[0, places[0][0][2]] = 17
    settings = Settings(64, 99, sampler="confidence", temperature=0.0, eos_id=EOS)
    found = fill(Oracle(whole, 0.9), rows, places, None, settings, [0])
    [answer] = words_of(found.ids[0], places[0], EOS)
    assert answer[0] == 15 and answer[1] not in (EOS, MASK, SEP) and answer[2:] == [17]


def test_rules_that_do_not_look_are_refused():
    with pytest.raises(UserError, match="--sampler random: transliteration takes confidence"):
        fill(Oracle(None, 1), np.zeros((1, 1)), [[]], None, Settings(1, 1, sampler="random"), [0])


# ---- prepare, train, sample ----------------------------------------------------------------------

TINY = (
    "--model", "primary", "--d_model", 32, "--n_layers", 2, "--n_heads", 2, "--d_ff", 64,
    "--conv_kernel", 7, "--seq_len", 64, "--batch_size", 16, "--grad_accum", 1,
    "--threads", 1, "--no_show_samples",
)


def words(*values):
    return [str(value) for value in values]


@pytest.fixture(scope="module")
def trained(hindi):
    """A model that has learned the few words, in seconds."""
    run = hindi / "run"
    flags = words(
        "--data_dir", hindi / "data", "--output_dir", run, *TINY, "--max_steps", 100,
        "--eval_interval", 100,
    )
    assert train.main(flags) == 0
    return run


def test_rows_that_are_mostly_hidden_are_learned(hindi, trained, tmp_path):
    """As sampling begins with masks alone; other rates are the user's, and stay on a resume."""
    def rates(run):
        args = checkpoint.load(run, parts=()).config["args"]
        return args["min_mask_rate"], args["max_mask_rate"]

    run = tmp_path / "run"
    data = ("--data_dir", hindi / "data", "--output_dir", run, *TINY, "--max_steps", 1)
    assert train.main(words(*data, "--max_mask_rate", 0.5)) == 0
    assert rates(trained) == (0.6, 1) and rates(run) == (0, 0.5)
    assert train.main(words("--resume", run, "--max_steps", 2, "--output_dir", run)) == 0
    assert rates(run) == (0, 0.5)


def test_lines_are_transliterated_as_they_come(hindi, trained, capsys, monkeypatch):
    path = hindi / "typed.txt"
    path.write_text("ghar pani\n\nsab 12 लोग log\n" + "aaj kal " * 40, encoding="utf-8")

    def shown(*flags):
        capsys.readouterr()
        sample.main(words(trained, "--transliterate", *flags))
        return capsys.readouterr().out.split("\n")

    whole = shown("--prompts_file", path)
    assert whole[0] == "घर पानी" and whole[1] == "" and len(whole) == 5
    assert whole[2] == "सब 12 लोग लोग"
    assert len(whole[3].split()) == 80 and whole[3].split().count("आज") > 30
    assert shown("--prompts_file", path, "--stream") == whole
    assert shown("--prompts_file", path, "--sampler", "confidence", "--steps", 99)[0] == "घर पानी"
    monkeypatch.setattr("sys.stdin", open(path, encoding="utf-8"))
    assert shown() == whole

    assert shown("GHAR")[0] == "घर"
    assert shown("g" * 60)[0].count(" ") == 0
    found = json.loads(shown("ghar pani", "--json")[0])
    assert found["forwards"] <= found["new_tokens"] == found["tokens_before_eos"] + 2


def test_left_to_right_guesses_are_verified(hindi, tmp_path, capsys):
    """python -m sample: the same text in fewer forwards, from the run and from its export."""
    run = tmp_path / "run"
    flags = words(
        "--data_dir", hindi / "data", "--output_dir", run, *TINY, "--max_steps", 150,
        "--objective", "ar", "--eval_interval", 0,
    )
    assert train.main(flags) == 0
    export.main(words("--ckpt", run, "--output", tmp_path / "exported", "--bits", 32))

    def records(path, *flags):
        capsys.readouterr()
        typed = ("--transliterate", "ghar pani subah mausam", "--json", "--temperature", 0)
        sample.main(words(path, *typed, *flags))
        return json.loads(capsys.readouterr().out)

    summary = (run / "summary.md").read_text(encoding="utf-8")
    page = (run / "report.html").read_text(encoding="utf-8")
    for text in (summary, page):
        assert "--transliterate" in text and "python -m evaluate" not in text

    verified = records(run)
    assert verified["text"] == "घर पानी सुबह मौसम"
    assert verified["forwards"] < verified["new_tokens"] / 2
    exported = records(tmp_path / "exported")
    assert exported["text"] == verified["text"] and exported["forwards"] == verified["forwards"]
    one_by_one = records(run, "--sampler", "confidence")
    assert one_by_one["text"] == verified["text"]
    assert one_by_one["forwards"] == one_by_one["new_tokens"] == verified["new_tokens"]


def test_a_bad_line_is_named(hindi, trained, capsys, monkeypatch):
    def answer(raw):
        (hindi / "bad.txt").write_bytes(raw)
        capsys.readouterr()
        sample.main(words(trained, "--transliterate", "--prompts_file", hindi / "bad.txt"))

    with pytest.raises(UserError, match="bad.txt, line 2: not valid UTF-8"):
        answer(b"ghar\n\xff\xfe\n")
    with pytest.raises(UserError, match="line 2 has 1,000,000 bytes, and 100,000 are the most"):
        answer(b"ghar\n" + b"a" * 1_000_000 + b"\n")
    assert capsys.readouterr().out == "घर\n", "the line before it was answered"
    answer("ghar\nवह लाल है\nयह भी\n".encode())
    out, err = capsys.readouterr()
    assert out == "घर\nवह लाल है\nयह भी\n"
    assert err.count("no Latin letter") == 1 and "line 2 has no Latin letter" in err


def test_what_does_not_belong_together_is_refused(hindi, trained, tmp_path):
    with pytest.raises(UserError, match="transliterates and continues no text"):
        sample.main(words(trained, "--prompt", "ghar"))
    data = ("--data_dir", hindi / "data", "--output_dir", tmp_path / "run", *TINY)
    with pytest.raises(UserError, match="--train_block_sizes 16: .* learned in whole rows"):
        train.main(words(*data, "--train_block_sizes", 16))
    args = prepared(hindi / "data", hindi / "hindi.txt", typists=3, val_doc_frac=0.1,
                    pair_tokens=64)
    assert "already there" in args.said[0]
    bpe = config.PrepareArgs(
        source="files", input=(str(hindi / "hindi.txt"),), data_dir=str(tmp_path / "plain"),
        tokenizer=str(tmp_path / "bpe.model"), tokenizer_vocab=330,
    )
    build(bpe, [].append)
    bpe.source = "transliterate"
    bpe.tokenizer_vocab = 0
    with pytest.raises(UserError, match="has pieces of several letters"):
        build(bpe, [].append)


# ---- serving -------------------------------------------------------------------------------------

@contextlib.contextmanager
def serving(run, max_work):
    """python -m serve of a run in this process -> (ask(method, path, body), the worker)."""
    model, tokenizer, saved = checkpoint.load_model(run, "cpu", config.check_saved)
    served = requests.Served("toy", TorchModel(model), tokenizer, saved, 2048, max_work)
    metrics = Metrics()
    owner = worker.Worker(served.model, 4, 16, metrics)
    listener = server.listen("127.0.0.1", 0, paths.Client)
    listener.offer(served, owner, metrics, None)
    threads = [threading.Thread(target=listener.serve_forever), threading.Thread(target=owner.run)]
    for thread in threads:
        thread.start()

    def ask(method, path, body=None):
        connection = HTTPConnection("127.0.0.1", listener.server_address[1], timeout=60)
        data = json.dumps(body).encode() if body is not None else None
        connection.request(method, path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        found = response.status, json.loads(response.read())
        connection.close()
        return found
    try:
        yield ask, owner
    finally:
        owner.close()
        listener.shutdown()
        listener.server_close()
        for thread in threads:
            thread.join(20)


def test_the_server_writes_what_is_typed_in_devanagari(hindi, trained, capsys, monkeypatch):
    text = "ghar pani\n\nsab 12 log\n" + "aaj kal " * 40
    path = hindi / "served.txt"
    path.write_text(text, encoding="utf-8")
    capsys.readouterr()
    sample.main([str(trained), "--transliterate", "--prompts_file", str(path)])
    wanted = capsys.readouterr().out.removesuffix("\n")

    monkeypatch.undo()              # conftest's no_network: this test asks a server of its own
    with serving(trained, 10**4) as (ask, owner):
        status, listed = ask("GET", "/v1/models")
        assert status == 200 and listed["data"][0]["aria"]["transliterates"] is True
        status, answer = ask("POST", "/v1/transliterate", {"text": text})
        assert status == 200, answer
        [choice] = answer["choices"]
        assert choice["text"] == wanted and wanted.startswith("घर पानी\n\n")
        assert answer["usage"]["completion_tokens"] > 80 and answer["aria"]["forwards"] > 2
        assert owner.metrics.counts["texts", ""] == 4
        # nothing to write is an answer, too
        assert ask("POST", "/v1/transliterate", {"text": "वह"})[1]["choices"][0]["text"] == "वह"
        for body, param in (
            ({"text": 3}, "text"),
            ({}, "text"),
            ({"text": "ghar", "temperature": 1}, "temperature"),
            ({"text": "ghar. " * 400}, "text"),               # more work than is allowed
        ):
            status, answer = ask("POST", "/v1/transliterate", body)
            assert (status, answer["error"]["param"]) == (400, param), answer
        status, answer = ask("POST", "/v1/completions", {"prompt": "ghar"})
        assert status == 400 and "transliterates alone" in answer["error"]["message"]


def test_a_transliteration_that_nobody_waits_for_ends_within_a_forward(trained):
    model, tokenizer, saved = checkpoint.load_model(trained, "cpu", config.check_saved)
    args, settings = rule_of(saved, tokenizer)
    job = TypedJob(["aaj kal"] * 20, args, settings, tokenizer, 64)
    job.started = 0
    after_forward = job.after_forward

    def leaves_at_the_third(*words):
        job.cancelled = job.forwards == 3
        after_forward(*words)
    job.after_forward = leaves_at_the_third
    with pytest.raises(Cancelled):
        job.write(TorchModel(model))
    assert job.forwards == 3
