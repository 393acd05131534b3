"""Pairs: what is read and refused, what a row asks, which tokens a loss sees, and what guidance
moves.
"""
import io
import json
import math
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_model

import checkpoint
import config
import evaluate
import gaussian
import masking
import prepare
import sample
import train
from common.console import UserError
from sampling import decode
from sampling.decode import generate
from sampling.settings import Settings, opening
from sampling.torch_model import TorchModel
from sampling.unmasking import Look
from text import pairs, topics
from text.build import build
from text.dataset import TokenData
from text.pairs import PairWindows, held_out_rows
from text.starter import grammar
from text.tokenizer import Tokenizer, normalise

WORDS = {"lal": "लाल", "nila": "नीला", "hara": "हरा", "kala": "काला", "bada": "बड़ा", "naya": "नया"}
BOS, SEP, EOS = 2, 0, 3


def toy_pairs(count):
    """So many prompts of one to three colours, each with its only right answer."""
    chance = np.random.default_rng(0)
    for _ in range(count):
        words = chance.choice(list(WORDS), chance.integers(1, 4)).tolist()
        yield " ".join(words), " ".join(WORDS[word] for word in words)


def write_pairs(path, pairs):
    lines = [json.dumps({"prompt": p, "response": r}, ensure_ascii=False) for p, r in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def prepared(folder, source, path, vocab=320, **changes):
    args = config.PrepareArgs(
        source=source, input=(str(path),), data_dir=str(folder),
        tokenizer=str(folder / "tok.model"), tokenizer_vocab=vocab, **changes,
    )
    args.said = []
    build(args, args.said.append)
    return args


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    home = tmp_path_factory.mktemp("pairs")
    write_pairs(home / "pairs.jsonl", toy_pairs(600))
    prepared(home / "data", "pairs", home / "pairs.jsonl")
    return home


@pytest.fixture(scope="module")
def data(toy):
    return TokenData(toy / "data")


# ---- what is refused -----------------------------------------------------------------------------

GOOD = '{"prompt": "lal", "response": "लाल"}'


@pytest.mark.parametrize("line, says", [
    ('{"prompt": "lal"}', 'line 2: no "response"'),
    ('{"prompt": "lal", "response": "  "}', 'line 2: the "response" is empty'),
    ('{"prompt": 3, "response": "लाल"}', 'line 2: no "prompt"'),
    ("[1]", 'line 2: no "prompt"'),
    ("{", "line 2: not valid JSON"),
    ("", "line 2: an empty line"),
    (json.dumps({"prompt": "lal " * 250_000, "response": "x"}), "line 2: this pair has"),
])
def test_a_bad_line_is_named_and_nothing_is_lost(toy, tmp_path, line, says):
    folder = tmp_path / "data"
    write_pairs(tmp_path / "good.jsonl", toy_pairs(30))
    args = prepared(folder, "pairs", tmp_path / "good.jsonl")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([GOOD, line, GOOD, ""]), encoding="utf-8")
    args.input = (str(bad),)
    with pytest.raises(UserError, match=f"bad.jsonl, {says}"):
        build(args, args.said.append)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after == before and len(TokenData(folder)) > 0


def test_the_line_of_a_long_pair_is_counted_over_all_files(tmp_path):
    write_pairs(tmp_path / "a.jsonl", toy_pairs(40))
    write_pairs(tmp_path / "b.jsonl", [*toy_pairs(7), ("lal " * 40, "लाल")])
    args = config.PrepareArgs(
        source="pairs", input=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")),
        data_dir=str(tmp_path / "d"), tokenizer=str(tmp_path / "t.model"), pair_tokens=32,
    )
    with pytest.raises(UserError, match="b.jsonl, line 8: this pair has .* give --pair_tokens"):
        build(args, [].append)


def test_a_row_that_is_too_short_names_the_pair(data):
    with pytest.raises(UserError, match="has .* tokens, but --seq_len is 8"):
        PairWindows(data, 8, 0, 0.0, 1)


# ---- cut out of documents ------------------------------------------------------------------------

@pytest.mark.parametrize("text, pair", [
    ("नदी का गीत\nनदी बहती है। वह गाती है।", ["नदी का गीत", "नदी बहती है। वह गाती है।"]),
    ("Kal 3.5 kilo aam liye. Bahut meethe the!\nSab khush hue.",
     ["Kal 3.5 kilo aam liye.", "Bahut meethe the!\nSab khush hue."]),
    ("  ek hi vakya hai.\n\n", []),
    ("", []),
])
def test_a_document_is_cut_behind_its_title_or_first_sentence(text, pair):
    assert pairs.cut_document(text) == pair


def test_pairs_of_documents_end_with_a_sentence_and_keep_to_the_length(tmp_path):
    chance = np.random.default_rng(3)
    documents = ["sirf ek vakya."]
    for number in range(120):
        title = f"kahani {number % 40}"
        sentences = [" ".join(chance.choice(list(WORDS), 4)) + "." for _ in range(number % 9 + 1)]
        documents.append(title + "\n" + " ".join(sentences))
    documents.append("lambi kahani\n" + "lal " * 200 + ". nila.")
    (tmp_path / "a.txt").write_text("\n\n".join(documents), encoding="utf-8")
    folder = tmp_path / "data"
    args = prepared(folder, "pairs", tmp_path / "a.txt", cut_documents=True, pair_tokens=40)
    said = "\n".join(args.said)
    assert "1 documents of one sentence are left out" in said
    assert "1 pairs of more than 40 tokens are left out" in said

    tok = Tokenizer(folder / "tok.model")
    prompts = {"train": set(), "val": set()}
    shorter = 0
    for split in prompts:
        for ids in TokenData(folder, split).documents():
            assert len(ids) <= 40
            ids = ids.tolist()
            prompt, response = tok.decode(ids[:ids.index(SEP)]), tok.decode(ids[ids.index(SEP):])
            prompts[split].add(prompt)
            [whole] = [text for text in documents if text.startswith(f"{prompt}\n{response}")]
            assert response.endswith(".")
            shorter += len(whole) > len(prompt) + 1 + len(response)
    assert 0 < shorter < 120 and not prompts["train"] & prompts["val"]

    with pytest.raises(UserError, match="no document has a second sentence"):
        (tmp_path / "b.txt").write_text("ek.\n\ndo.\n", encoding="utf-8")
        prepared(tmp_path / "none", "pairs", tmp_path / "b.txt", cut_documents=True)
    with pytest.raises(UserError, match="--cut_documents makes pairs: add --source pairs"):
        prepare.main(["--source", "files", "--input", "x.txt", "--cut_documents"])


def test_a_limit_that_leaves_no_pair_for_a_split_is_named_and_nothing_is_lost(tmp_path):
    def built(held_out, **flags):
        """Pairs of 40 documents; the held-out ones with a long sentence behind the title."""
        documents = []
        for number in range(40):
            title = f"kahani {number}"
            long = "lal nila " * 40 if title in held_out else "lal nila"
            documents.append(f"{title}\n{long.strip()}.")
        (tmp_path / "a.txt").write_text("\n\n".join(documents), encoding="utf-8")
        prepared(
            tmp_path / "data", "pairs", tmp_path / "a.txt", cut_documents=True, **flags
        )
        return tmp_path / "data"

    folder = built((), pair_tokens=40)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    tok = Tokenizer(folder / "tok.model")
    held_out = [
        tok.decode(ids.tolist()[:ids.tolist().index(SEP)])
        for ids in TokenData(folder, "val").documents()
    ]
    with pytest.raises(UserError, match="no pair for validation has at most --pair_tokens 40"):
        built(held_out, pair_tokens=40)
    with pytest.raises(UserError, match="no pair for training has at most --pair_tokens 8"):
        built((), pair_tokens=8)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- topics of documents -------------------------------------------------------------------------

PLACES = "nadi pahad jangal bazaar gaanv shahar dariya maidan".split()
COMMON = "wahan ek din sab log mile aur khush hue".split()


def documents_of_places(count, sentences):
    """Documents about one place each; the other words are in all of them, but one, which is its
    own and a number.
    """
    chance = np.random.default_rng(1)
    for number in range(count):
        place = PLACES[number % len(PLACES)]
        said = [f"{number} mein {place} akela{letters_of(number)}."]
        said += [" ".join(chance.choice(COMMON, 5)) + "." for _ in range(sentences - 1)]
        yield " ".join(said)


def letters_of(number):
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


def prompts_and_responses(folder, split):
    tok = Tokenizer(folder / "tok.model")
    for ids in TokenData(folder, split).documents():
        ids = ids.tolist()
        yield tok.decode(ids[:ids.index(SEP)]), tok.decode(ids[ids.index(SEP):])


def starter_topics(folder, **changes):
    """Pairs with topics out of the starter corpus."""
    texts = [text for _, text in islice(grammar.starter_documents(7, 0.35), 700)]
    path = folder.with_suffix(".jsonl")
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    changes = dict(cut_documents=True, prompt_words=3, pair_tokens=64) | changes
    return texts, prepared(folder, "pairs", path, vocab=1000, **changes)


def test_a_topic_is_of_words_that_the_response_has_and_few_documents_have(tmp_path):
    folder = tmp_path / "data"
    texts, args = starter_topics(folder)
    has = Counter(word for text in texts for word in set(topics.words_of(normalise(text))))
    lengths = Counter()
    cut = 0
    for split in ("train", "val"):
        for prompt, response in prompts_and_responses(folder, split):
            asked = prompt.split(", ")
            lengths[len(asked)] += 1
            words = topics.words_of(response)
            places = [words.index(word) for word in asked]
            assert places == sorted(set(places)), "in their order, each once"
            assert all(2 <= has[word] <= 0.02 * len(texts) for word in asked)
            whole = {text for text in map(normalise, texts) if text.startswith(response)}
            assert whole and (response in whole or response[-1] in "।.?!\"")
            cut += response not in whole
    assert set(lengths) == {1, 2, 3} and min(lengths.values()) > 0.1 * lengths.total()
    assert 0 < cut < lengths.total()
    assert TokenData(folder).meta["pairs"]["longest"] <= 64
    assert "--prompt_words 3" in TokenData(folder).meta["flags"]


def test_topics_are_the_same_again_and_others_with_another_seed_or_number(tmp_path):
    def prompts(name, **changes):
        folder = tmp_path / name
        starter_topics(folder, **changes)
        return sorted(prompts_and_responses(folder, "train"))

    first = prompts("a")
    assert prompts("b") == first
    assert {len(prompt.split(", ")) for prompt, _ in prompts("one", prompt_words=1)} == {1}
    known = {"nadi", "pahad", "jangal"}
    text = "nadi, pahad aur Jangal."
    drawn = [topics.topic_of(text, known, 3, seed, 100) for seed in range(50)]
    assert len(set(drawn)) == 7, "each choice of some of three words comes"


def test_other_numbers_of_words_are_other_pairs(tmp_path):
    _, args = starter_topics(tmp_path / "data")
    build(args, args.said.append)
    assert "already there" in args.said[-1]
    starter_topics(tmp_path / "data", prompt_words=2)
    lengths = {len(prompt.split(", "))
               for prompt, _ in prompts_and_responses(tmp_path / "data", "train")}
    assert lengths == {1, 2}


def test_a_word_that_does_not_fit_is_not_asked_for(tmp_path):
    """Topics are chosen before there is a tokenizer; what the cut takes away goes from them."""
    mark = pairs.MARK
    assert topics.still_asked(f"nadi, pahad{mark}Nadi bahti hai.") == f"nadi{mark}Nadi bahti hai."
    assert topics.still_asked(f"pahad{mark}Nadi bahti hai.") == ""
    # a word at the border is not taken for another one that it begins with
    assert topics.topic_of("nadi ke paas", {"nadi", "paa"}, 1, 0, 11) == "nadi"

    chance = np.random.default_rng(2)
    documents = []
    for number in range(400):
        name = letters_of(number // 4)
        filler = [" ".join(chance.choice(COMMON, 4)) + "." for _ in range(number % 7)]
        documents.append(" ".join([*filler, f"wahan naam{name} tha. phir ghar{name} gaya."]))
    (tmp_path / "a.txt").write_text("\n\n".join(documents), encoding="utf-8")
    folder = tmp_path / "data"
    args = prepared(
        folder, "pairs", tmp_path / "a.txt", cut_documents=True, prompt_words=2, pair_tokens=32,
        val_doc_frac=0.2,
    )
    assert "pairs of more than 32 tokens are left out" in "\n".join(args.said)
    known = topics.topic_words(documents, 1000, 10**9)
    fewer = 0
    for split in ("train", "val"):
        for prompt, response in prompts_and_responses(folder, split):
            assert set(prompt.split(", ")) <= set(topics.words_of(response))
            letters = topics.LETTERS * args.pair_tokens
            chosen = {topics.topic_of(text, known, 2, args.seed, letters) for text in documents
                      if text.startswith(response)}
            fewer += prompt not in chosen
    assert fewer


def test_common_words_and_words_of_one_document_are_no_topics():
    documents = list(documents_of_places(80, 4))
    known = topics.topic_words(documents, 1000, 10**9)
    assert known == set(PLACES)
    assert topics.topic_words(documents[:8], 1000, 10**9) >= {"mein"}, "few documents: most words"
    assert topics.topic_words(iter(documents), 3, 10**9) == topics.topic_words(
        documents[:3], 1000, 10**9
    )
    chars = sum(map(len, documents[:5])) + 1
    assert topics.topic_words(documents, 1000, chars) == topics.topic_words(
        documents[:5], 1000, 10**9
    )
    words = topics.words_of("Nadi, 3.5 kilo: हाथी। नदी! ab a-b-c x2y")
    assert words == ["nadi", "kilo", "हाथी", "नदी"]


def test_a_long_text_is_counted_in_little_memory(monkeypatch):
    documents = list(documents_of_places(400, 4))
    whole = topics.topic_words(documents, 1000, 10**9)
    monkeypatch.setattr(topics, "REMEMBERED", 40)      # each document has a word of its own
    assert topics.topic_words(documents, 1000, 10**9) == whole == set()
    monkeypatch.setattr(topics, "MOST", 0.2)
    assert topics.topic_words(documents, 1000, 10**9) == set(PLACES)


def test_documents_from_a_pipe_have_topics_too(tmp_path, monkeypatch):
    texts = "\n\n".join(documents_of_places(80, 3))
    (tmp_path / "a.txt").write_text(texts, encoding="utf-8")
    changes = dict(cut_documents=True, prompt_words=1)
    prepared(tmp_path / "file", "pairs", tmp_path / "a.txt", **changes)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(texts.encode())))
    prepared(tmp_path / "pipe", "pairs", "-", **changes)
    for split in ("train", "val"):
        assert list(prompts_and_responses(tmp_path / "pipe", split)) == list(
            prompts_and_responses(tmp_path / "file", split)
        )


def test_topics_that_cannot_be_are_refused_in_a_sentence(tmp_path):
    for words in (["--source", "pairs"], ["--source", "files"]):
        with pytest.raises(UserError, match="--prompt_words 3 takes .* --cut_documents"):
            prepare.main([*words, "--input", "x.jsonl", "--prompt_words", "3"])
    (tmp_path / "a.txt").write_text("nadi bahti hai.\n\npahad ooncha tha.\n", encoding="utf-8")
    with pytest.raises(UserError, match="no word of it is in several .*leave --prompt_words out"):
        prepared(tmp_path / "d", "pairs", tmp_path / "a.txt", cut_documents=True, prompt_words=2)


# ---- rows ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("rows", [1, 7, 32])
def test_an_epoch_has_each_pair_once_and_asks_for_its_response(toy, data, rows):
    tok = Tokenizer(toy / "data" / "tok.model")
    windows = PairWindows(data, 64, 5, 0.0, rows)
    # an epoch is whole where it is whole chunks; the sorting stays inside a chunk
    size = math.lcm(windows.per_epoch, 64 * rows)
    numbers, _ = windows.chosen(0, size)
    assert (np.bincount(numbers, minlength=windows.per_epoch) == size // windows.per_epoch).all()

    x0 = windows.batch(3 * rows, rows)
    asked = windows.asked(3 * rows, rows)
    for ids, where in zip(x0, asked, strict=True):
        response = ids[where]
        prompt = ids[:where.int().argmax()]
        assert prompt[0] == BOS and prompt[-1] == SEP and response[-1] == EOS
        answer = " ".join(WORDS[word] for word in tok.decode(prompt).split())
        assert tok.decode(response) == answer
        assert (ids[len(prompt) + len(response):] == EOS).all()


def test_rows_are_a_function_of_their_number_and_blocks_begin_with_responses(data):
    windows = PairWindows(data, 64, 5, 0.3, 8)
    again = PairWindows(data, 64, 5, 0.3, 8)
    assert torch.equal(windows.batch(4, 40)[20:], again.batch(24, 20))
    assert torch.equal(windows.asked(4, 40)[20:], again.asked(24, 20))

    begins = PairWindows(data, 64, 5, 0.0, 8)
    right = 0
    for step in range(64):
        first = begins.first_block(8 * step, 8, 16, 3)
        starts = begins.asked(8 * step, 8).int().argmax(1)
        right += int(((starts - first) % 16 == 0).sum())
    assert right > 0.8 * 64 * 8
    assert begins.first_block(0, 8, 64, 64) == 64


def test_the_null_prompt_comes_as_often_as_asked(data):
    windows = PairWindows(data, 64, 5, 0.25, 16)
    x0 = windows.batch(0, 3200)
    without = x0[:, 1] == SEP
    assert 0.21 < without.float().mean() < 0.29
    assert (windows.asked(0, 3200).int().argmax(1)[without] == 2).all()
    held, asked = held_out_rows(TokenData(data.dir, "val"), 100, 64)
    assert len(held) == len(asked) and not (held[:, 1] == SEP).any()


# ---- the loss ------------------------------------------------------------------------------------

def a_row(length=24):
    """BOS prompt SEP response EOS, EOS ... -> (ids (1, T), asked (1, T))."""
    ids = [BOS, 5, 6, 7, SEP, 11, 12, 13, 14, EOS]
    x0 = torch.tensor([ids + [EOS] * (length - len(ids))])
    asked = torch.zeros(1, length, dtype=torch.bool)
    asked[0, 5:10] = True
    return x0, asked


@pytest.mark.parametrize("block, first", [(24, 24), (8, 5), (8, 8), (4, 2)])
def test_only_responses_are_hidden_and_what_stands_behind_one_in_its_block(block, first):
    _, asked = a_row()
    seen = torch.zeros(24, dtype=torch.bool)
    for step in range(60):
        masks = masking.corrupt(
            config.TrainArgs(), 1, step, 1, 24, block, first, asked=asked
        )
        assert masks.tokens == 5
        seen |= masks.mask[0]
    end = next(edge for edge in range(first, 24 + block, block) if edge >= 10)
    expected = torch.zeros(24, dtype=torch.bool)
    expected[5:min(end, 24)] = True
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("kind", ["primary", "backup"])
@pytest.mark.parametrize("block, first", [(8, 5), (8, 8), (1, 1)])
def test_padding_is_never_seen(kind, block, first):
    net = tiny_model(kind, framed=True, away=0.1)
    x0, asked = a_row()
    other = x0.clone()
    last = 13 if first == 5 else 16
    other[0, last:] = 21                                # behind the block of the first EOS
    if block == 1:
        other[0, 10:] = 21
    found = []
    for rows in (x0, other):
        found.append(masking.row_bounds(net, rows, block, first, asked=asked)[0, 0])
    assert found[0].isfinite() and found[0] == pytest.approx(float(found[1]), abs=1e-6)


@pytest.mark.parametrize("kind", ["primary", "backup"])
def test_left_to_right_it_is_the_exact_cost_of_the_response(kind):
    net = tiny_model(kind, framed=True, away=0.1)
    x0, asked = a_row()
    found = masking.row_bounds(net, x0, 1, asked=asked)[0]
    with torch.no_grad():
        logp = net.logits(net.clean_states(x0)).log_softmax(-1)[0]
    exact = -logp[torch.arange(5, 10), x0[0, 5:10]].mean()
    assert found[0] == pytest.approx(float(exact), rel=1e-5)


# ---- sampling ------------------------------------------------------------------------------------

MODES = {
    "full": dict(mode="full", steps=12),
    "block": dict(mode="block", block_size=4, steps=4),
    "block_frozen": dict(mode="block_frozen", block_size=4, steps=4),
    "left to right": dict(mode="block_frozen", block_size=1, steps=1),
}


@pytest.mark.parametrize("kind", ["primary", "backup"])
@pytest.mark.parametrize("mode", MODES)
def test_guidance_goes_from_the_null_prompt_to_the_prompt(kind, mode):
    net = TorchModel(tiny_model(kind, framed=True, away=0.3))
    prompt = [BOS, 5, 6, 7, 8, SEP]
    null = [BOS, SEP]

    def write(ids, scale):
        settings = Settings(
            12, **MODES[mode], temperature=0.0, guidance_scale=scale, null_prompt=tuple(null)
        )
        return generate(net, ids, settings, [1, 2]).rows

    plain = write(prompt, 1.0)
    bare = write(null, 1.0)
    assert plain != bare
    assert write(prompt, 0.0) == bare
    assert write(prompt, 1.0 + 1e-9) == plain
    assert write(null, 3.0) == bare, "nothing to be guided by"


@pytest.mark.parametrize("guesses, sure, wanted", [
    ([7, EOS, EOS, EOS], [0.3, 0.5, 0.6, 0.99], [0]),         # not the end, nor what is behind it
    ([7, EOS, EOS, EOS], [0.95, 0.95, 0.6, 0.99], [0, 1]),    # the end, with all before it
    ([EOS, 7, 7, EOS], [0.4, 0.99, 0.99, 0.99], [0]),
    ([7, 8, 9, 7], [0.99, 0.2, 0.95, 0.3], [0, 2]),           # no end in sight
])
def test_an_answer_is_not_told_early_where_it_ends(guesses, sure, wanted):
    p = np.full((4, 20), 1e-9)
    for row, guess, chance in zip(p, guesses, sure, strict=True):
        row[:] = (1 - chance) / 19
        row[guess] = chance
    logits = np.log(p).astype(np.float32)
    settings = Settings(4, 4, sampler="threshold", eos_id=EOS, null_prompt=(BOS, SEP))
    chosen = decode.choose(Look(logits), logits, 1, settings, None)
    assert sorted(chosen.tolist()) == wanted


@pytest.fixture(scope="module")
def trained(toy):
    """A model that has learned the colours, in seconds."""
    run = toy / "run"
    words = [
        "--data_dir", toy / "data", "--output_dir", run, "--model", "backup", "--d_model", 48,
        "--n_layers", 2, "--n_heads", 4, "--d_ff", 96, "--seq_len", 32, "--batch_size", 24,
        "--grad_accum", 1, "--max_steps", 120, "--train_block_sizes", "16", "--max_mask_rate", 1,
        "--ar_fade", 0.3, "--conditioning_dropout", 0.2, "--eval_interval", 120, "--threads", 1,
        "--no_show_samples",
    ]
    assert train.main([*map(str, words)]) == 0
    return run


def test_trained_prompts_are_answered_and_guided(toy, trained, capsys):
    prompts = ["lal nila", "hara kala", "naya lal bada", "nila", "bada kala", "kala nila hara"]
    (toy / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")

    def answers(*flags):
        words = (trained, "--prompts_file", toy / "prompts.txt", "--temperature", 0, *flags)
        capsys.readouterr()
        sample.main([*map(str, words), "--blockwise", "--frozen_context", "--json"])
        records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        right = 0
        for record in records:
            wanted = [WORDS[word] for word in record["prompt"].split()]
            got = record["text"].split()
            right += sum(a == b for a, b in zip(wanted, got, strict=False)) / len(wanted)
        return right / len(records), {record["text"] for record in records}

    assert answers("--block_size", 1)[0] > 0.9
    assert answers("--sampler", "threshold")[0] > 0.7
    share, texts = answers("--sampler", "threshold", "--guidance_scale", 0)
    assert len(texts) == 1 and share < 0.5
    # left to right, both sides are the clean stream's
    share, texts = answers("--block_size", 1, "--guidance_scale", 0)
    assert len(texts) == 1 and share < 0.5
    assert answers("--block_size", 1, "--guidance_scale", 3)[0] > 0.9


def test_a_prompt_that_no_row_holds_is_named(toy, trained):
    path = toy / "long.txt"
    path.write_text("lal\n\n" + "nila " * 100 + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="long.txt, line 3: with its frame this prompt has .* toke"):
        sample.main([str(trained), "--prompts_file", str(path)])


def test_what_a_model_of_pairs_was_not_trained_for_is_refused(toy, trained, capsys):
    with pytest.raises(UserError, match="answers prompts: it fills no gaps"):
        sample.main([str(trained), "--text", "lal ____"])
    with pytest.raises(UserError, match="continues no text"):
        evaluate.main(["--ckpt", str(trained), "--samples", "4"])
    capsys.readouterr()
    evaluate.main(["--ckpt", str(trained)])
    lines = capsys.readouterr().out.splitlines()
    [line] = [line for line in lines if "NLL" in line and " all " in line]
    logged = [json.loads(line) for line in (trained / "train.jsonl").open()]
    by_block = [event for event in logged if event["event"] == "eval"][-1]["by_block"]
    assert float(line.split()[4]) == pytest.approx(by_block["1"], rel=0.15)


def test_the_responses_of_a_gaussian_model_are_scored(tmp_path):
    """evaluate's bound is that of training, which finds the responses in another way and fills each
    row behind them.
    """
    write_pairs(tmp_path / "pairs.jsonl", toy_pairs(300))
    prepared(tmp_path / "data", "pairs", tmp_path / "pairs.jsonl", val_doc_frac=0.4)
    run = tmp_path / "run"
    words = [
        "--data_dir", tmp_path / "data", "--output_dir", run, "--objective", "gaussian",
        "--d_model", 32, "--n_layers", 1, "--n_heads", 2, "--d_ff", 64, "--embed_dim", 8,
        "--seq_len", 32, "--batch_size", 16, "--grad_accum", 1, "--max_steps", 30,
        "--eval_interval", 0, "--threads", 1, "--no_show_samples",
    ]
    assert train.main([*map(str, words)]) == 0
    found = tmp_path / "found.json"
    evaluate.main(["--ckpt", str(run), "--draws", "24", "--out_json", str(found)])
    [bound] = json.loads(found.read_text(encoding="utf-8"))["bound"].values()

    net, _, _ = checkpoint.load_model(run, torch.device("cpu"), config.check_any)
    held_out = TokenData(tmp_path / "data", "val")
    rows, asked = held_out_rows(held_out, held_out.meta["val_docs"], 32)
    draws = [gaussian.row_bounds(net, rows, asked=asked, seed=seed)[:, 0] for seed in range(24)]
    assert bound["nats"] == pytest.approx(float(torch.stack(draws).mean()), rel=0.1)


def test_an_empty_prompt_is_the_null_prompt(toy):
    tok = Tokenizer(toy / "data" / "tok.model")
    assert opening(tok, "", framed=True) == [BOS, SEP]
    assert opening(tok, "", framed=False) == [BOS]
