"""English web text in GPT-2's encoding: its tokenizer, `python -m prepare_fineweb` against the
local stand-in of the hub, and training on the token files that it writes.

    python -m pytest tests/test_fineweb.py
"""
import hashlib
import json
import random
import re
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import TINY, aria_here, log
from hypothesis import given
from hypothesis import strategies as st
from stand_in_hub import SHA, card, parquet, serving
from stand_in_hub import started as started_command

import config
from common.console import UserError
from text import gpt2, token_file
from text.dataset import Windows
from text.starter import grammar
from text.tokenizer import Tokenizer

pytest.importorskip("tokenizers")
TOKENIZER = gpt2.Gpt2Tokenizer()
REPO = "HuggingFaceFW/fineweb-edu"


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


# ---- prepare_fineweb against the stand-in --------------------------------------------------------

def documents():
    """What the hub's set holds: short and long texts, an empty one, letters of several bytes."""
    texts = []
    for number in range(900):
        texts.append(f"{number}: {grammar.starter_document(5, number, 0.5)[1]}")
    texts[7] = ""
    texts[8] = "one word and \U0001f469\u200d\U0001f680"
    texts[9] = "a long one. " * 6000
    return texts


TEXTS = documents()
FILES = {
    REPO: {
        "README.md": card(**{"sample-10BT": ("train", "sample/10BT/*.parquet")}),
        "sample/10BT/000.parquet": parquet(TEXTS[:300]),
        "sample/10BT/001.parquet": parquet(TEXTS[300:]),
    }
}


def all_ids():
    """The ids of the whole set, made one text at a time."""
    ids = []
    for text in TEXTS:
        if text:
            ids += [gpt2.END_ID, *TOKENIZER.bpe.encode(text).ids]
    return np.array(ids, np.uint16)


IDS = all_ids()
COUNT = 90_000                             # of them, in the second file of the set
FEW = " from text import fineweb\n hub.SYNC_ROWS = 20\n hub.BATCH_ROWS = 10"
ASKED = ("--tokens", "90K", "--output", "web.npy")


@pytest.fixture
def server():
    with serving(FILES) as server:
        yield server


def started(folder, port, *argv, code=FEW):
    return started_command("prepare_fineweb", folder, port, *argv, code=code)


def prepare(folder, port, *argv, code=FEW):
    """`python -m prepare_fineweb` to its end -> CompletedProcess."""
    child = started(folder, port, *argv, code=code)
    out, err = child.communicate(timeout=120)
    assert "Traceback" not in err, err[-3000:]
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """web.npy as one run without trouble makes it."""
    folder = tmp_path_factory.mktemp("made")
    with serving(FILES) as server:
        done = prepare(folder, server.server_port, *ASKED)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "web.npy"


def same_file(path, made):
    """Is this file the untouched one, and is nothing of its making left?"""
    left = sorted(p.name for p in path.parent.iterdir() if made.name in p.name)
    assert left == [made.name, f"{made.name}.meta"]
    assert path.read_bytes() == made.read_bytes()
    assert token_file.meta_path(path).read_text() == token_file.meta_path(made).read_text()


def test_progress_without_a_terminal(tmp_path, server):
    """Lines with the speed and the time to go; nobody sees a bar there."""
    done = prepare(tmp_path, server.server_port, *ASKED, code=f"{FEW}\n fineweb.SAY_SECONDS = 0.01")
    lines = [line for line in done.stderr.splitlines() if line.endswith(" to go")]
    assert len(lines) > 3, done.stderr
    form = r"0\.\dM of 0\.1M tokens \(\d+\.\d%\), [\d,]+ tokens/s, \d+:\d\d:\d\d to go"
    assert all(re.fullmatch(form, line) for line in lines), lines


def test_the_file_has_exactly_the_tokens_asked_for(made):
    """They are those of the set, an end of text before each document; the .meta says what it is."""
    assert len(IDS) > COUNT > np.flatnonzero(IDS == gpt2.END_ID)[300]
    tokens = np.load(made)
    assert tokens.dtype == np.uint16 and np.array_equal(tokens, IDS[:COUNT])
    assert made.read_bytes()[:128] == token_file.npy_header(COUNT, np.dtype("<u2"))
    about = token_file.read_meta(made)
    assert (about["tokens"], about["documents"]) == (COUNT, (tokens == gpt2.END_ID).sum())
    assert (about["encoding"], about["vocab_size"], about["eot_id"]) == ("gpt2", 50257, 50256)
    assert about["sha256"] == hashlib.sha256(made.read_bytes()).hexdigest()
    assert (about["source"], about["revision"], about["format"]) == (REPO, SHA[REPO], "npy")
    text = "".join(text for text in TEXTS)
    head = TOKENIZER.decode(tokens)
    assert text.startswith(head.rstrip("\ufffd"))
    assert abs(about["bytes"] - len(head.encode())) < 4          # the last letter may be cut
    assert list(about)[-1] == "complete" and about["complete"] == "true"


def test_what_is_there_is_not_made_again(made):
    """Nothing is read from the hub; another number of tokens is refused with both."""
    before = made.read_bytes()
    done = prepare(made.parent, 1, *ASKED)
    assert done.returncode == 0 and "already there" in done.stderr
    assert "train --data web.npy" in done.stdout
    other = prepare(made.parent, 1, "--tokens", "80K", "--output", "web.npy")
    assert other.returncode == 2 and "90,000" in other.stderr and "80,000" in other.stderr
    assert made.read_bytes() == before


def test_a_kill_at_any_moment_loses_nothing(tmp_path, server, made):
    """SIGKILL from outside, again and again, a random time after tokens came in."""
    code = f"""{FEW}
 keep = fineweb.TokenStream.keep
 def slowly(self, texts):
  sleep(0.05)
  keep(self, texts)
 fineweb.TokenStream.keep = slowly"""
    rng = random.Random(time.time_ns())
    state = tmp_path / "web.npy.part.json"

    def saved():
        return state.read_bytes() if state.exists() else b""

    places = set()
    for _ in range(4):
        before = saved()
        child = started(tmp_path, server.server_port, *ASKED, code=code)
        while child.poll() is None and saved() == before:
            time.sleep(0.01)
        time.sleep(0.2 * rng.random())
        child.kill()
        err = child.communicate()[1]
        if child.returncode == 0:                  # it was too fast for this moment
            break
        assert child.returncode == -signal.SIGKILL, err[-2000:]
        if (tmp_path / "web.npy").exists():        # killed after its last name: it is whole
            break
        places.add(json.loads(saved())["tokens"])
    assert len(places) >= 2 and 0 < min(places) < COUNT, places
    assert prepare(tmp_path, server.server_port, *ASKED).returncode == 0
    same_file(tmp_path / "web.npy", made)


KILLS = """
 import os
 def killing(name, before, when):
  old, count = getattr(fineweb, name), [0]
  def new(*words):
   count[0] += 1
   if before and count[0] == when: os.kill(os.getpid(), signal.SIGKILL)
   old(*words)
   if count[0] == when: os.kill(os.getpid(), signal.SIGKILL)
  setattr(fineweb, name, new)
"""


@pytest.mark.parametrize(
    "where",
    [
        "'replace_file', True, 2",                 # a state in the middle
        "'rename', False, 1",                      # the part becomes the file
    ],
)
def test_a_kill_in_a_write_loses_nothing(tmp_path, server, made, where):
    child = started(tmp_path, server.server_port, *ASKED, code=f"{FEW}{KILLS} killing({where})")
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    if (tmp_path / "web.npy.part").exists():                       # what a kill in a write leaves
        with open(tmp_path / "web.npy.part", "ab") as file:
            file.write(b"\1\2\3")
    done = prepare(tmp_path, server.server_port, *ASKED)
    assert done.returncode == 0, done.stderr[-2000:]
    same_file(tmp_path / "web.npy", made)


def test_a_kill_before_the_last_name_is_met_by_the_meta(tmp_path, server, made):
    """Killed when all tokens are there: the next run needs no hub."""
    code = f"{FEW}{KILLS} killing('rename', True, 1)"
    child = started(tmp_path, server.server_port, *ASKED, code=code)
    child.communicate(timeout=60)
    with open(tmp_path / "web.npy.part", "ab") as file:            # nothing that counts
        file.write(b"\1\2\3")
    done = prepare(tmp_path, 1, *ASKED)
    assert done.returncode == 0, done.stderr[-2000:]
    same_file(tmp_path / "web.npy", made)


def test_a_hub_that_dies_midway(tmp_path, server, made):
    """A connection that breaks is tried again. One that stays dead ends in one sentence; what came
    is kept, and the same command goes on there.
    """
    server.breaks = {"001.parquet": 10_000}
    done = prepare(tmp_path, server.server_port, *ASKED)
    assert done.returncode == 3, done.stderr[-2000:]
    assert done.stderr.count("trying again") >= 3
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the hub gave no more") and "the same command goes on" in last
    state = json.loads((tmp_path / "web.npy.part.json").read_text())
    assert f"{state['tokens']:,} of 90,000 tokens are kept" in last and state["tokens"] > 10_000

    server.breaks = {"001.parquet": 2}
    done = prepare(tmp_path, server.server_port, *ASKED)
    assert done.returncode == 0 and f"going on at {state['tokens']:,}" in done.stderr
    same_file(tmp_path / "web.npy", made)


@pytest.mark.parametrize("mode", ["no network", "refuses"])
def test_without_a_hub_one_sentence_and_no_file(tmp_path, server, mode):
    server.mode = mode
    port = 1 if mode == "no network" else server.server_port
    done = prepare(tmp_path, port, *ASKED)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 3 and "check the network" in last, done.stderr[-2000:]
    assert not list(tmp_path.glob("web*"))


def test_ctrl_c_keeps_what_came(tmp_path, server, made):
    server.slow = 0.3
    child = started(tmp_path, server.server_port, *ASKED)
    while not (tmp_path / "web.npy.part.json").exists():
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    err = child.communicate(timeout=30)[1]
    assert child.returncode == 130 and "are kept in web.npy.part" in err and "Traceback" not in err
    server.slow = 0.0
    assert prepare(tmp_path, server.server_port, *ASKED).returncode == 0
    same_file(tmp_path / "web.npy", made)


def test_a_source_that_ends_early(tmp_path, server):
    """What there is becomes the file, with its true number; exit code 1, also the next time."""
    asked = ("--tokens", "5M", "--output", "all.npy")
    done = prepare(tmp_path, server.server_port, *asked)
    assert done.returncode == 1 and f"all {len(IDS):,} tokens" in done.stderr
    assert np.array_equal(np.load(tmp_path / "all.npy"), IDS)
    assert token_file.read_meta(tmp_path / "all.npy")["tokens"] == len(IDS)
    again = prepare(tmp_path, 1, *asked)
    assert again.returncode == 1 and "5,000,000 are asked for" in again.stderr
    token_file.open_split(tmp_path / "all.npy", "train", 0.01)


def test_a_full_disk(tmp_path, server, made):
    """One sentence with what is kept; with room, the same command goes on. Less room than the whole
    file needs is said at once.
    """
    limit = " import resource\n resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    done = prepare(tmp_path, server.server_port, *ASKED, code=f"{FEW}\n{limit}")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "make room, then the same command goes on" in last
    assert not (tmp_path / "web.npy").exists()
    assert prepare(tmp_path, server.server_port, *ASKED).returncode == 0
    same_file(tmp_path / "web.npy", made)

    done = prepare(tmp_path, 1, "--tokens", "900000B", "--output", "huge.npy")
    assert done.returncode == 2 and "1,800,000.00 GB" in done.stderr
    assert not list(tmp_path.glob("huge*"))


def test_bin_holds_the_same_ids(tmp_path, server, made):
    done = prepare(tmp_path, server.server_port, "--tokens", "90000", "--output",
                   "web.bin")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "web.bin").stat().st_size == 2 * COUNT
    ids = np.fromfile(tmp_path / "web.bin", "<u2")
    assert np.array_equal(ids, np.load(made))
    paths = (tmp_path / "web.bin", made)
    one, other = (token_file.open_split(path, "train", 0.1) for path in paths)
    assert np.array_equal(one.tokens, other.tokens)


def test_force_and_files_of_others(tmp_path, server, made):
    """A file without a .meta is not ours; --force replaces it, and begins anew where one was
    stopped.
    """
    (tmp_path / "web.npy").write_bytes(b"mine")
    done = prepare(tmp_path, 1, *ASKED)
    assert done.returncode == 2 and "--force" in done.stderr
    assert (tmp_path / "web.npy").read_bytes() == b"mine"
    done = prepare(tmp_path, server.server_port, *ASKED, "--force")
    assert done.returncode == 0, done.stderr[-2000:]
    same_file(tmp_path / "web.npy", made)


def test_a_part_of_a_longer_file_is_not_lost(tmp_path, server):
    """Killed at the end of 90,000 tokens, then fewer or more are asked for: both numbers."""
    code = f"{FEW}{KILLS} killing('rename', True, 1)"
    started(tmp_path, server.server_port, *ASKED, code=code).communicate(timeout=60)
    for tokens in ("80K", "95K"):
        done = prepare(tmp_path, 1, "--tokens", tokens, "--output", "web.npy")
        assert done.returncode == 2 and "90,000" in done.stderr and "--force" in done.stderr
    assert (tmp_path / "web.npy.part").exists()


def test_only_one_process_writes_a_file(tmp_path, server):
    server.slow = 0.5
    first = started(tmp_path, server.server_port, *ASKED)
    try:
        while not (tmp_path / "web.npy.part").exists():
            time.sleep(0.05)
        time.sleep(0.3)
        done = prepare(tmp_path, server.server_port, *ASKED)
        assert done.returncode == 2 and "another process is writing" in done.stderr
    finally:
        first.kill()
        first.communicate()


@pytest.mark.parametrize(
    "text, size",
    [
        ("100M", 10**8), ("1B", 10**9), ("1.5b", 1_500_000_000), ("0.5k", 500), ("7", 7),
        ("0", None), ("-1", None), ("1T", None), ("1.5", None), ("1e9", None), ("", None),
        ("0.0001K", None), ("1 M", None), ("nan", None), ("9999999999B", None),
    ],
)
def test_numbers_of_tokens(text, size):
    assert config.size_of(text) == size
    args = config.FinewebArgs(tokens=text)
    assert bool(list(args.problems())) == (size is None)


@pytest.mark.parametrize(
    "words, path, kind",
    [
        ({"tokens": "1B"}, "fineweb_1b.npy", "npy"),
        ({"tokens": "100M", "format": "bin"}, "fineweb_100m.bin", "bin"),
        ({"output": "a.bin"}, "a.bin", "bin"),
        ({"output": "a.dat", "format": "npy"}, "a.dat", "npy"),
        ({"output": "a.tokens"}, "a.tokens", None),
    ],
)
def test_the_name_of_the_file(words, path, kind):
    args = config.FinewebArgs(**words)
    assert (str(args.path), args.kind) == (path, kind)
    assert bool(list(args.problems())) == (kind is None)


# ---- token files ---------------------------------------------------------------------------------

def token_file_of(folder, ids, **about):
    """A token file of another tool: FILE.npy, and a .meta as the older one wrote it."""
    path = folder / "old.npy"
    np.save(path, ids)
    about = dict(tokens=len(ids), documents=3, encoding="gpt2", vocab_size=50257, source=REPO,
                 format="npy") | about
    lines = "".join(f"{key}: {value}\n" for key, value in about.items() if value is not None)
    token_file.meta_path(path).write_text(lines)
    return path


def test_a_file_is_split_at_a_document(made):
    """Both splits together are the file; the second one begins at a document, no id is lost."""
    splits = [token_file.open_split(made, split, 0.1) for split in ("train", "val")]
    train, val = splits
    assert np.array_equal(np.concatenate([train.tokens, val.tokens]), IDS[:COUNT])
    assert val.tokens[0] == gpt2.END_ID and abs(len(val) - 0.1 * COUNT) < 2000
    for data in splits:
        meta = data.meta
        assert meta["train_tokens"] + meta["val_tokens"] == COUNT
        text = TOKENIZER.bpe.decode(val.tokens[val.tokens < gpt2.END_ID].tolist())
        assert abs(meta["val_bytes"] - len(text.encode())) < 4
    assert train.meta == val.meta and train.meta["train_sha256"] != train.meta["val_sha256"]
    other = token_file.open_split(made, "train", 0.2)
    assert other.meta["train_sha256"] != train.meta["train_sha256"]
    found = val.documents()
    assert all(ids[0] == gpt2.END_ID for ids in found)
    assert all(ids[-1] == gpt2.END_ID for ids in found[:-1])
    rows = Windows(train, 64, 1).batch(0, 5)
    assert rows.shape == (5, 64) and int(rows.max()) < 50257


def test_the_older_meta_is_accepted(tmp_path):
    """Without sha256, bytes, eot_id and complete, and without an end of text in the file."""
    path = token_file_of(tmp_path, np.arange(5000, dtype=np.uint16))
    train = token_file.open_split(path, "train", 0.5, "npy", 50257)
    assert len(train) == 2500 and train.meta["source"] == REPO and train.meta["val_bytes"]
    val = token_file.open_split(path, "val", 0.5)
    assert sum(len(ids) - 1 for ids in val.documents()) == 2500
    assert len(Windows(train, 32, 1).batch(0, 3)) == 3


ZEROS = np.concatenate([np.ones(900, np.uint16), np.zeros(100, np.uint16)])
ONES = np.ones(1000, np.uint16)


@pytest.mark.parametrize(
    "ids, about, words",
    [
        (np.full(1000, 50257, np.uint16), {}, ("50257", "mask")),
        (np.full(1000, 60000, np.uint32), {}, ("60000", "50257")),
        (ONES, {"tokens": 999}, ("1,000", "999")),
        (ONES, {"tokens": None}, ("tokens",)),
        (ONES, {"tokens": "many"}, ("many",)),
        (ONES, {"encoding": "cl100k_base"}, ("cl100k_base", "gpt2")),
        (ONES, {"encoding": None}, ("encoding",)),
        (ONES, {"vocab_size": 32000}, ("32000", "50257")),
        (ONES, {"eot_id": 5}, ("eot_id", "50256")),
        (ONES, {"sha256": "0" * 64}, ("sha256",)),
        (ONES, {"complete": "false"}, ("complete",)),
        (ZEROS, {}, ("zeros", "stopped")),
        (np.ones((10, 100), np.uint16), {"tokens": 1000}, ("(10, 100)",)),
        (np.ones(1000, np.float32), {}, ("float32",)),
        (np.ones(1000, np.int16), {}, ("int16",)),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, ids, about, words):
    path = token_file_of(tmp_path, ids, **about)
    with pytest.raises(UserError) as caught:
        token_file.open_split(path, "train", 0.01)
    assert all(word in str(caught.value) for word in words), caught.value


def test_zeros_at_the_end_of_a_finished_file_are_text(tmp_path):
    path = token_file_of(tmp_path, ZEROS, complete="true")
    assert len(token_file.open_split(path, "train", 0)) == 1000


def test_damaged_files_are_refused(tmp_path, made):
    """Cut off, of objects (whose loading would run code), without a .meta, of another format."""
    path = token_file_of(tmp_path, ONES)
    meta = token_file.meta_path(path)
    whole = path.read_bytes()

    def refused(*words, **how):
        with pytest.raises(UserError) as caught:
            token_file.open_split(path, "train", 0.01, **how)
        assert all(word in str(caught.value) for word in words), caught.value

    path.write_bytes(whole[:-10])
    refused("no sound .npy file")
    path.write_bytes(whole + b"12")
    refused("2,130", "1,000 tokens")
    np.save(path, np.array([{"a": 1}] * 1000, dtype=object), allow_pickle=True)
    refused("no sound .npy file")
    path.write_bytes(whole[128:])
    refused("--data_format npy", data_format="npy")
    assert len(token_file.open_split(path, "train", 0, "bin")) == 1000
    path.write_bytes(whole)
    refused("--vocab_size 50304", "50257", vocab_size=50304)
    meta.write_text(meta.read_text() + "tokens: 1000\n")
    refused("once a key")
    meta.unlink()
    refused("old.npy.meta", "tokens: NUMBER")
    path.unlink()
    refused("prepare_fineweb --tokens 100M --output")
    with pytest.raises(UserError, match="no prepared text"):
        token_file.open_split(tmp_path / "nothing", "train", 0.01)


# ---- training ------------------------------------------------------------------------------------

def train(folder, data, run, *words, check=0):
    return aria_here(
        "train", "--data", data, "--run_name", run, "--model", "backup", *TINY, "--max_steps", 6,
        "--save_interval", 3, "--eval_interval", 3, "--log_interval", 1, *words, cwd=folder,
        check=check,
    )


def losses(folder, run):
    return [line["loss"] for line in log(folder / "checkpoints" / run)]


def test_a_run_on_a_token_file(tmp_path, made):
    """Trained, validated in bits/byte, resumed to the same numbers, sampled and evaluated, with no
    other file than the text; .bin gives the same run.
    """
    for suffix in ("", ".meta"):
        (tmp_path / f"web.npy{suffix}").write_bytes(
            (made.parent / f"web.npy{suffix}").read_bytes()
        )
    ids = np.load(made)
    (tmp_path / "web.bin").write_bytes(ids.tobytes())
    meta = token_file.meta_path(made).read_text().splitlines()
    lines = [line for line in meta if not line.startswith(("sha256", "format"))]
    (tmp_path / "web.bin.meta").write_text("\n".join(lines))

    whole = train(tmp_path, "web.npy", "whole", "--data_format", "npy", "--vocab_size", 50257)
    train(tmp_path, "web.bin", "bin", "--data-format=bin")
    assert len(losses(tmp_path, "whole")) == 6 and losses(tmp_path, "whole") == losses(
        tmp_path, "bin"
    )
    assert "50257 pieces" in whole.stderr
    run = tmp_path / "checkpoints/whole"
    shape = json.loads((run / "step_000006/config.json").read_text())["model"]
    assert (shape["vocab_size"], shape["pad"]) == (50257, False)
    best = log(run, "eval")[-1]
    assert best["val_bpb"] == pytest.approx(
        best["val_nelbo"] / np.log(2) * val_tokens(made) / val_bytes(made), rel=1e-3
    )

    before = losses(tmp_path, "whole")
    aria_here("train", "--resume", "checkpoints/whole/step_000003", cwd=tmp_path, check=0)
    assert losses(tmp_path, "whole")[-3:] == before[-3:]
    aria_here(
        "sample", "checkpoints/whole", "--prompt", "Hello! it", "--max_new_tokens", 8,
        cwd=tmp_path, check=0,
    )
    scored = aria_here(
        "evaluate", "checkpoints/whole", "--batches", 1, "--draws", 1, "--chain_docs", 2,
        "--repeats", 0, cwd=tmp_path, check=0,
    )
    assert "documents" in scored.stderr

    # other text under the same name ends a resume
    changed = ids.copy()
    changed[5] += 1
    np.save(tmp_path / "web.npy", changed)
    done = train(tmp_path, "web.npy", "whole", "--resume", "--max_steps", 9, check=2)
    assert "sha256" in done.stderr


def val_tokens(path):
    return token_file.open_split(path, "val", 0.01).meta["val_tokens"]


def val_bytes(path):
    return token_file.open_split(path, "val", 0.01).meta["val_bytes"]


def test_the_exclamation_mark_can_be_said(tmp_path):
    """Id 0 is a piece of GPT-2's: a text of nothing else is learned."""
    token_file_of(tmp_path, np.zeros(5000, np.uint16), complete="true")
    train(tmp_path, "old.npy", "marks", "--max_steps", 20, "--no_show_samples", "--lr", "3e-3")
    found = losses(tmp_path, "marks")
    assert all(np.isfinite(found)) and found[-1] < found[0] - 1


@pytest.mark.parametrize(
    "words, said",
    [
        (("--vocab_size", 50304), ("50304", "50257")),
        (("--val_frac", 0), ("--val_frac 0",)),
        (("--data_format", "text"), ("npy",)),
        (("--data", "missing.npy"), ("prepare_fineweb",)),
    ],
)
def test_wrong_flags_of_a_token_file(tmp_path, words, said):
    token_file_of(tmp_path, ONES)
    done = train(tmp_path, "old.npy", "none", *words, check=2)
    assert all(word in done.stderr for word in said) and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("checkpoints/*/*"))


def test_one_constant_has_one_value():
    assert config.GPT2_PIECES == gpt2.VOCAB_SIZE
