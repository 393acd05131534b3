"""Properties of prepare.py and text/documents.py: every document arrives whole, on one side only,
or nothing changes.
"""
import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import cli
import config
import prepare
from common.console import UserError
from common.files import ROOT
from text import build as builder, documents, spool, starter, tokenizer
from text.build import build
from text.dataset import KEYS, TokenData
from text.documents import find_files, read_documents
from text.starter import grammar
from text.tokenizer import Tokenizer, normalise

SETTINGS = config.PrepareArgs(source="files", tokenizer_vocab=400)


def hindi(n):
    return (
        f"यह दस्तावेज़ क्रमांक {n} है।\n"
        f"पिताजी ने क़लम और सड़क देखी, फिर क\u094d\u200dष लिखा! {n * n}"
    )


def latin(n):
    return f"yaar document {n} hai,\nkal bazaar gaya tha 😀 \tand came  back {n * n}"


def texts(count):
    return [(hindi if n % 3 else latin)(n) for n in range(count)]


def write_txt(path, docs):
    path.write_text("\n\n".join(docs) + "\n", encoding="utf-8")
    return path


def prepared(tmp_path, docs, name="data", **changes):
    """Build from these documents; returns (folder, notices)."""
    source = write_txt(tmp_path / "in.txt", docs) if isinstance(docs, list) else docs
    folder, said = tmp_path / name, []
    settings = (
        dict(input=(str(source),), data_dir=str(folder), tokenizer=str(tmp_path / "t.model"))
        | changes
    )
    build(dataclasses.replace(SETTINGS, **settings), said.append)
    return folder, "\n".join(said)


def decoded(folder, split):
    """The documents of a .bin, by splitting at EOS."""
    data, docs = TokenData(folder, split, verify=True), []
    tok = Tokenizer(data.tokenizer_path)
    ids = np.array(data.tokens)
    assert ids[-1] == tok.eos_id
    for doc in np.split(ids, np.flatnonzero(ids == tok.eos_id) + 1)[:-1]:
        assert doc[0] == tok.bos_id and (doc[1:-1] > tok.eos_id).all()
        docs.append(tok.decode(doc))
    return docs


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


# ---- documents in, documents out

def test_documents_come_back_byte_for_byte(tmp_path):
    docs = texts(300)
    folder, _ = prepared(tmp_path, docs)
    train, val = decoded(folder, "train"), decoded(folder, "val")
    assert sorted(train + val) == sorted(map(normalise, docs))
    assert not set(train) & set(val)
    order = {normalise(doc): n for n, doc in enumerate(docs)}
    # order of the source
    assert [order[doc] for doc in train] == sorted(order[doc] for doc in train)


def test_meta_tells_the_truth(tmp_path):
    docs = texts(300)
    folder, said = prepared(tmp_path, docs)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert set(KEYS) | {"cleaning", "romanised_share", "flags", "seal"} == set(meta)
    assert meta["version"] == 1 and meta["dtype"] == "uint16" and meta["source"] == "files"
    assert meta["mask_token_id"] == meta["vocab_size"] == 400
    assert meta["tokenizer_sha256"] == Tokenizer(tmp_path / "t.model").sha256
    assert meta["sources"] == [
        dict(
            name=str(tmp_path / "in.txt"),
            licence=None,
            documents=300,
            sha256=hashlib.sha256((tmp_path / "in.txt").read_bytes()).hexdigest(),
            bytes=sum(len(normalise(doc).encode()) for doc in docs),
        )
    ]
    for split in ("train", "val"):
        found = decoded(folder, split)
        assert meta[f"{split}_docs"] == len(found) == sum(meta["scripts"][split].values())
        assert meta[f"{split}_bytes"] == sum(len(doc.encode()) for doc in found)
        assert meta["scripts"][split]["devanagari"] > 0 < meta["scripts"][split]["latin"]
    assert (
        "devanagari" in said
        and "latin" in said
        and "bytes/token" in said
        and "only 300 documents" in said
    )


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "txt.gz", "jsonl.xz", "JSONL.GZ"])
def test_each_format_gives_the_same_documents(tmp_path, suffix):
    docs = texts(30)
    path = tmp_path / f"x.{suffix}"
    body = (
        "\n\n".join(docs)
        if "txt" in suffix
        else "".join(json.dumps({"text": doc}) + "\n" for doc in docs)
    )
    pack = {"gz": gzip.compress, "xz": lzma.compress}.get(suffix.lower().split(".")[-1], bytes)
    path.write_bytes(pack(("\ufeff" + body).encode()))
    assert [doc.strip() for doc in read_documents(path)][:30] == docs


def test_prompt_comes_before_the_text(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"prompt": "नाम?", "text": "राम"}\n\n{"text": "a", "prompt": null}\n', encoding="utf-8"
    )
    assert list(read_documents(path))[:2] == ["नाम?\nराम", "a"]


def test_folders_are_read_in_order_and_once(tmp_path):
    for name in ("b/2.txt", "a.txt", "b/1.jsonl", "b/.hidden.txt", "b/readme.md", "c/d/e.txt.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [
        str(p.relative_to(tmp_path))
        for p in find_files([tmp_path, tmp_path / "b", tmp_path / "b/../a.txt"])
    ]
    assert found == ["a.txt", "b/1.jsonl", "b/2.txt", "c/d/e.txt.gz"]


def test_pipes_and_links_out_of_a_folder_are_left_out(tmp_path):
    """A pipe would be waited for without end; a link out of the folder would read what nobody
    named. Both are said.
    """
    (tmp_path / "secret/deep").mkdir(parents=True)
    for path in (tmp_path / "secret/passwd.txt", tmp_path / "secret/deep/x.txt"):
        path.write_text("root")
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    os.mkfifo(folder / "pipe.txt")
    (folder / "out.txt").symlink_to(tmp_path / "secret/passwd.txt")
    (folder / "sub/up").symlink_to(tmp_path / "secret")
    (folder / "gone.txt").symlink_to(folder / "nothing.txt")
    (folder / "b.txt").symlink_to("a.txt")  # inside: the same file, read once
    said = []
    assert [path.name for path in find_files([folder], said.append)] == ["a.txt"]
    assert len(said) == 1 and all(
        name in said[0] for name in ("pipe.txt", "out.txt", "sub/up", "gone.txt")
    )
    assert [path.name for path in find_files([folder, folder / "out.txt"], [].append)] == [
        "a.txt",
        "out.txt",
    ]
    (tmp_path / "alias").symlink_to(folder)
    assert [path.name for path in find_files([tmp_path / "alias"], [].append)] == ["a.txt"]
    with pytest.raises(UserError, match="not a plain file.*--input -"):
        find_files([folder / "pipe.txt"])


@pytest.mark.parametrize(
    "pack, name", [(gzip.compress, "x.txt.gz"), (lzma.compress, "x.txt.xz"), (bytes, "x.jsonl")]
)
def test_any_number_of_empty_lines_costs_little(tmp_path, pack, name):
    """Millions of line ends are a few thousand steps at most, and the line numbers after them are
    right.
    """
    path, many = tmp_path / name, 2_000_000
    path.write_bytes(
        pack(
            b'{"text": "a"}\n'
            + many * b"\n"
            + many // 4 * b" \r\n"
            + b'{"text": "b"}\n\n{"text": "c"}'
        )
    )
    lines = list(documents.read_lines(path))
    assert len(lines) < 10_000
    assert [(number, line.strip()) for number, line in lines if line.strip()] == [
        (1, '{"text": "a"}'),
        (many + many // 4 + 2, '{"text": "b"}'),
        (many + many // 4 + 4, '{"text": "c"}'),
    ]
    assert len([doc for doc in read_documents(path) if doc.strip()]) == 3


def test_a_file_name_that_is_no_utf8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    write_txt(path, texts(60))
    folder, _ = prepared(tmp_path, path)
    assert TokenData(folder).meta["sources"][0]["name"].endswith("caf\\udce9.txt")


@pytest.mark.parametrize("letter", ["a", "क", "😀"])
def test_a_huge_line_is_cut_between_characters(tmp_path, monkeypatch, letter):
    monkeypatch.setattr(documents, "LINE_BYTES", 100)
    path, said = tmp_path / "x.txt", []
    path.write_text(letter * 1000 + "\n\nsecond\nline\n\nthird", encoding="utf-8")
    docs = list(read_documents(path, said.append))
    assert docs[0] and "".join(docs[:-2]).strip() == letter * 1000
    assert [doc.strip() for doc in docs[-2:]] == [
        "second\nline",
        "third",
    ] and "is cut here" in said[0]
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "%s"}' % (letter * 200), encoding="utf-8")
    with pytest.raises(UserError, match="line 1: longer than 100 bytes"):
        list(read_documents(path))


# ---- the split

def test_copies_never_fall_on_both_sides(tmp_path):
    docs = [doc for doc in texts(100) for _ in range(3)]
    random.Random(0).shuffle(docs)
    folder, _ = prepared(tmp_path, docs, val_doc_frac=0.3)
    train, val = decoded(folder, "train"), decoded(folder, "val")
    assert not set(train) & set(val) and len(train) + len(val) == 300 and 30 < len(val) < 150


def test_the_split_depends_on_seed_and_text_only(tmp_path):
    docs = texts(300)
    vals = [
        set(decoded(prepared(tmp_path, some, name, val_doc_frac=0.1, **how)[0], "val"))
        for name, some, how in (("a", docs, {}), ("b", docs[::-1], {}), ("c", docs, {"seed": 2}))
    ]
    assert vals[0] == vals[1] != vals[2]
    more = set(
        decoded(prepared(tmp_path, docs + texts(400)[300:], "d", val_doc_frac=0.1)[0], "val")
    )
    assert len(vals[0] - more) <= 2 and len(more) > len(vals[0])    # old documents stay


@pytest.mark.parametrize("count", [2, 3, 5, 19, 20, 60, 200])
@pytest.mark.parametrize("frac", [0.0001, 0.02, 0.9999])
def test_no_split_is_ever_empty(tmp_path, count, frac):
    folder, _ = prepared(tmp_path, texts(count), val_doc_frac=frac)
    meta = TokenData(folder).meta
    assert (
        meta["train_docs"] + meta["val_docs"] == count
        and min(meta["train_docs"], meta["val_docs"]) > 0
    )
    if count >= 60:
        assert all(found["devanagari"] > 0 < found["latin"] for found in meta["scripts"].values())


def test_a_small_document_is_held_out_of_a_few(tmp_path):
    docs = [" ".join(map(hindi, range(n))) for n in (200, 3, 150)]
    folder, _ = prepared(tmp_path, docs)
    assert decoded(folder, "val") == [normalise(docs[1])]


@pytest.mark.parametrize("copies", [1, 3])
def test_a_single_document_is_cut(tmp_path, copies):
    doc = "\n".join(map(hindi, range(100)))
    folder, said = prepared(tmp_path, [doc] * copies)
    (train, *_), (val, *_) = decoded(folder, "train"), decoded(folder, "val")
    assert (
        f"{train}\n{val}" == normalise(doc)
        and 500 < len(val) < len(train) / 4
        and "only one document" in said
    )
    with pytest.raises(UserError, match="one document of 30 characters"):
        prepared(tmp_path, ["x" * 30], "other")


# ---- rebuilding

def test_same_settings_are_already_there(tmp_path):
    folder, _ = prepared(tmp_path, texts(60))
    before, stamp = contents(folder), (folder / "train.bin").stat().st_mtime_ns
    _, said = prepared(tmp_path, texts(60))
    assert "already there" in said and (folder / "train.bin").stat().st_mtime_ns == stamp
    _, said = prepared(tmp_path, texts(60), force=True)
    assert "already there" not in said and contents(folder) == before
    assert (folder / "train.bin").stat().st_mtime_ns > stamp


@pytest.mark.parametrize(
    "change", [dict(seed=5), dict(val_doc_frac=0.2), dict(max_docs=50), dict(max_chars=3000)]
)
def test_a_changed_setting_rebuilds(tmp_path, change):
    folder, _ = prepared(tmp_path, texts(60))
    old = TokenData(folder).meta
    prepared(tmp_path, texts(60), **change)
    new = TokenData(folder).meta
    assert (
        old["settings_sha256"] != new["settings_sha256"]
        and old["train_sha256"] != new["train_sha256"]
    )


def test_changed_text_or_damage_rebuilds(tmp_path):
    folder, _ = prepared(tmp_path, texts(60))
    prepared(tmp_path, texts(61))
    assert sum(TokenData(folder).meta[f"{split}_docs"] for split in ("train", "val")) == 61
    whole = contents(folder)
    (folder / "train.bin").write_bytes(whole["train.bin"][:-4])
    _, said = prepared(tmp_path, texts(61))
    assert "not usable" in said and contents(folder) == whole


def test_an_existing_tokenizer_is_reused_and_never_overwritten(tmp_path):
    prepared(tmp_path, texts(60))
    model = (tmp_path / "t.model").read_bytes()
    _, said = prepared(tmp_path, texts(90), "other", tokenizer_vocab=0, force=True)
    assert "reusing" in said and (tmp_path / "t.model").read_bytes() == model
    with pytest.raises(UserError, match="500.*400 pieces"):
        prepared(tmp_path, texts(60), "third", tokenizer_vocab=500)


def test_too_small_a_text_asked_twice(tmp_path):
    _, said = prepared(tmp_path, texts(20), tokenizer_vocab=30_000)
    assert "not 30000" in said
    _, said = prepared(tmp_path, texts(20), tokenizer_vocab=30_000, seed=2)
    assert "reusing" in said


def test_limits_are_announced(tmp_path):
    folder, said = prepared(tmp_path, texts(60), max_docs=40)
    meta = TokenData(folder).meta
    assert meta["train_docs"] + meta["val_docs"] == 40 and "stopped at the limit" in said
    folder, _ = prepared(tmp_path, texts(60), "b", max_chars=2000)
    assert 1000 < sum(map(len, decoded(folder, "train") + decoded(folder, "val"))) <= 2000


def test_the_tokenizer_sees_no_validation_text(tmp_path, monkeypatch):
    seen = []

    def spy(docs, *rest):
        seen.extend(docs := list(docs))
        return tokenizer.train_tokenizer(docs, *rest)
    monkeypatch.setattr(builder, "train_tokenizer", spy)
    folder, _ = prepared(tmp_path, texts(200), val_doc_frac=0.2)
    assert sorted(seen) == sorted(decoded(folder, "train"))
    monkeypatch.setattr(spool, "SAMPLE_BYTES", 3000)              # a part, and from everywhere
    seen.clear()
    prepared(tmp_path, texts(200), "b", val_doc_frac=0.2, tokenizer=str(tmp_path / "u.model"))
    places = [texts(200).index(doc) for doc in seen]
    assert (
        set(seen) < set(decoded(folder, "train"))
        and 10 < len(seen) < 60
        and min(places) < 60
        and max(places) > 140
    )


# ---- what is not prepare's own stays

@pytest.mark.parametrize("fails", [True, False])
def test_the_users_own_files_stay(tmp_path, fails):
    """Temporary files of other programs, in the data folder and even in prepare's work folder,
    outlive any run.
    """
    own = {
        name: tmp_path / "data" / name
        for name in (
            "draft.tmp",
            ".hidden.tmp",
            "train.bin.tmp",
            "spool.json.tmp",
            f"{builder.WORK}/letter.tmp",
            f"{builder.WORK}/.x.tmp.7.tmp",
        )
    }
    for name, path in own.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    if fails:
        (tmp_path / "bad.txt").write_bytes(b"\xff")
        with pytest.raises(UserError):
            prepared(tmp_path, tmp_path / "bad.txt")
    else:
        prepared(tmp_path, texts(60))
    assert {name: path.read_text() for name, path in own.items() if path.exists()} == {
        name: name for name in own
    }
    made = {"train.bin", "val.bin", "meta.json", ".lock"} if not fails else {".lock"}
    assert set(contents(tmp_path / "data")) == {*own, *made}, (
        "and nothing of prepare's own is left over"
    )


def test_token_files_of_another_program_are_not_replaced(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.bin").write_bytes(b"somebody's")
    for _ in range(2):
        with pytest.raises(UserError, match="holds train.bin.*--data_dir.*--force"):
            prepared(tmp_path, texts(60))
        assert contents(tmp_path / "data") == {"train.bin": b"somebody's"}
    folder, _ = prepared(tmp_path, texts(60), force=True)
    (folder / "meta.json").unlink()  # ours, as a run that died while renaming leaves it
    prepared(tmp_path, texts(60))
    assert TokenData(folder).meta["train_docs"] > 50


# ---- a run that was broken off

def broken_off(tmp_path, monkeypatch):
    """The folder as a kill just before the renames leaves it, and its work folder."""
    def die(*_):
        raise RuntimeError("killed")
    with monkeypatch.context() as patch:
        patch.setattr(builder, "publish", die)
        patch.setattr(builder, "clear", lambda work: None)
        patch.setattr(builder, "SYNC_BYTES", 4000)
        patch.setattr(spool, "BATCH_CHARS", 2000)
        with pytest.raises(RuntimeError):
            prepared(tmp_path, texts(200))
    return tmp_path / "data" / builder.WORK


def cut(path, at):
    os.truncate(path, int(at * path.stat().st_size))


def flipped(path, at):
    raw = bytearray(path.read_bytes())
    raw[int(at * len(raw))] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "name, says",
    [
        ("spool.bin", "damaged"),
        ("spool.json", ""),
        ("train.bin", ""),
        ("val.bin", ""),
        ("encode.json", ""),
        (None, "broken off"),
    ],
)
def test_what_a_broken_run_kept_is_used_only_if_it_is_whole(tmp_path, monkeypatch, name, says):
    whole, _ = prepared(tmp_path, texts(200), "whole")
    wanted = contents(whole)
    for at in (0.1, 0.5) if name else (0,):
        for damage in (flipped, cut):
            work = broken_off(tmp_path, monkeypatch)
            if name:
                damage(work / name, at)
            folder, said = prepared(tmp_path, texts(200))
            assert (
                TokenData(folder, verify=True).meta["train_sha256"]
                == json.loads(wanted["meta.json"])["train_sha256"]
            )
            assert contents(folder)["val.bin"] == wanted["val.bin"] and says in said
            for file in ("train.bin", "val.bin", "meta.json"):
                (folder / file).unlink()


# ---- the hint of a damaged folder

@pytest.mark.parametrize(
    "source",
    [
        ["builtin"],
        ["files", "--input", "my text.txt"],
        ["pairs", "--input", "my text.txt", "--cut_documents"],
    ],
    ids=lambda words: words[0],
)
def test_the_hint_of_a_damaged_folder_makes_it_again(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    write_txt(tmp_path / "my text.txt", texts(60))
    argv = [
        "--source", *source, "--tokenizer", "t/t.model", "--tokenizer_vocab", "400",
        "--max_chars", "60000", "--seed", "3",
    ]
    prepare.main([*argv, "--data_dir", "d"])
    before = contents(Path("d"))
    flipped(Path("d/val.bin"), 0.5)
    with pytest.raises(UserError) as caught:
        TokenData("d", "val")
    [command] = re.findall("python -m prepare (.*) builds it again", str(caught.value))
    prepare.main(shlex.split(command))
    assert contents(Path("d")) == before


def test_the_hint_of_a_damaged_starter_corpus_makes_it_again(tmp_path, monkeypatch):
    """Also when meta.json itself is what is damaged, and says nothing that can be trusted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(starter, "CHARS", 60_000)
    monkeypatch.setattr(starter, "VOCAB", 400)
    build(config.starter_args(), [].append)
    folder = Path(starter.FOLDER)
    before = contents(folder)
    meta = json.loads(before["meta.json"])
    (folder / "meta.json").write_text(
        json.dumps(meta | {"val_bytes": meta["val_bytes"] ^ 1}), encoding="utf-8"
    )
    with pytest.raises(UserError, match="meta.json was changed after it was written") as caught:
        TokenData(folder)
    [command] = re.findall("python -m prepare (.*) builds it again", str(caught.value))
    prepare.main(shlex.split(command))
    assert contents(folder) == before


def test_an_older_folder_is_sealed_when_it_is_prepared_again(tmp_path, capsys):
    folder, _ = prepared(tmp_path, texts(60))
    whole = contents(folder)
    meta = json.loads(whole["meta.json"])
    older = {key: value for key, value in meta.items() if key not in ("seal", "flags")}
    (folder / "meta.json").write_text(json.dumps(older), encoding="utf-8")
    for split in ("train", "val"):
        assert TokenData(folder, split).meta == older
    assert capsys.readouterr().err.count("has no seal") == 1
    _, said = prepared(tmp_path, texts(60))
    assert "older version" in said and contents(folder) == whole


# ---- failures leave what was there

@pytest.mark.parametrize(
    "data, why",
    [
        (b"good\n\nbad \xff\xfe here", "line 3, byte 4.*iconv"),
        ("नमस्ते".encode("utf-16"), "UTF-16"),
        (b"\xe0\xa4", "line 1, byte 0"),
        (b"", "every document is empty"),
        (b" \n\t\n\x00\n", "every document is empty"),
    ],
)
def test_bad_text_changes_nothing(tmp_path, data, why):
    folder, _ = prepared(tmp_path, texts(60))
    before = contents(folder)
    (tmp_path / "bad.txt").write_bytes(data)
    with pytest.raises(UserError, match=why):
        prepared(tmp_path, tmp_path / "bad.txt")
    assert contents(folder) == before


@pytest.mark.parametrize(
    "name, data, why",
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        ("x.jsonl", b'["text"]', 'no "text"'),
        ("x.jsonl", b'{"txt": "a"}', 'line 1: no "text"'),
        ("x.jsonl", b'{"text": 5}', "must be strings"),
        (
            "x.jsonl",
            b'{"text": "a", "prompt": []}\n{"text": "a", "prompt": 1}',
            "line 2: .*must be strings",
        ),
        ("x.jsonl", b"[" * 100_000, "not valid JSON"),
        ("x.txt.gz", b"not gzip at all", "cannot read"),
        ("x.txt.gz", gzip.compress(os.urandom(5000).hex().encode())[:-2000], "cannot read"),
        ("x.txt.xz", b"not xz", "cannot read"),
        ("x.pdf", b"", "unknown kind"),
        ("folder/x.pdf", b"", "no .txt, .jsonl or"),
    ],
)
def test_bad_files_are_named(tmp_path, name, data, why):
    (tmp_path / "folder").mkdir()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=why):
        prepared(tmp_path, tmp_path / name.split("/")[0])
    assert not list((tmp_path / "data").glob("*.bin")) and not (tmp_path / "t.model").exists()


def child(*argv, **more):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LC_ALL": "C"}
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=env,
        timeout=60,
        **more,
    )


@pytest.mark.parametrize(
    "argv, why",
    [
        (["--input", "nowhere.txt"], "nowhere.txt"),
        (["--input", "bad.txt"], "line 1, byte 0"),
        ([], "--input"),
        (["--input", "ok.txt", "--tokenizer", "bad.txt"], "bad.txt"),
        (["--input", "ok.txt", "--val_doc_frac", "1"], "frac"),
    ],
)
def test_command_line_slips(tmp_path, argv, why):
    (tmp_path / "bad.txt").write_bytes(b"\xff\x00")
    write_txt(tmp_path / "ok.txt", texts(30))
    done = child("-m", "prepare", "--source", "files", *argv, "--data_dir", "out", cwd=tmp_path)
    assert done.returncode == 2 and why in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/*.bin"))


def test_command_line_from_start_to_end(tmp_path, monkeypatch):
    write_txt(tmp_path / "मेरी फ़ाइल.txt", texts(60))
    done = child(
        "-m", "prepare", "--source", "files", "--input", "मेरी फ़ाइल.txt", "--data-dir=my data",
        "--tokenizer_vocab", "400", cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "next: python -m train" in done.stdout and "devanagari" in done.stdout
    monkeypatch.chdir(tmp_path)
    hint = shlex.split(re.search(r"next: python -m train (.*)", done.stdout)[1])
    assert Path(cli.parse(config.TrainArgs, hint, "train")[0].data_dir, "meta.json").exists()
    assert len(decoded("my data", "train") + decoded("my data", "val")) == 60


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_killed_at_each_file_operation(tmp_path):
    """SIGKILL before the n-th write, sync, rename or removal: old data or none at all, and the next
    run is whole.
    """
    old, _ = prepared(tmp_path, texts(60))
    before = contents(old)
    new, _ = prepared(tmp_path, texts(80), "new")
    wanted = contents(new)
    code = """if True:
        import json, os, pathlib, signal, sys
        import config, prepare
        left = int(sys.argv[1])
        def counted(function):
            def wrapper(*args, **named):
                global left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **named)
            return wrapper
        for name in ("replace", "fsync", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        pathlib.Path.unlink = counted(pathlib.Path.unlink)
        json.dump = counted(json.dump)
        prepare.main(sys.argv[2:])"""
    write_txt(tmp_path / "in.txt", texts(80))
    outcomes = []
    for n in range(40):
        done = child(
            "-c", code, n, "--source", "files", "--input", tmp_path / "in.txt", "--data_dir", old,
            "--tokenizer", tmp_path / "t.model", "--tokenizer_vocab", 400,
        )
        left = {
            name: raw
            for name, raw in contents(old).items()
            if not name.startswith((builder.WORK, ".lock"))
        }
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr[-500:]
        is_old = left == {name: raw for name, raw in before.items() if name != ".lock"}
        outcomes.append("old" if is_old else "none")
        if not is_old and (old / "meta.json").exists():
            assert left == {name: raw for name, raw in wanted.items() if name != ".lock"}
            outcomes[-1] = "new"
        for name, raw in before.items():
            (old / name).write_bytes(raw)
    assert outcomes[0] == "old" and outcomes.count("none") <= 8 and len(outcomes) >= 7, outcomes
    assert contents(old) == wanted and done.returncode == 0  # no temporary file is left either


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    """Killed while encoding: the next run reads no source and encodes the rest, and the files are
    those of one run.
    """
    folder, _ = prepared(tmp_path, texts(400), "whole")
    wanted = contents(folder)
    code = """if True:
        import os, signal, sys
        import prepare
        from text import build, spool
        spool.BATCH_CHARS, build.SYNC_BYTES = 2000, 4000
        write, left = build.write_json, 4
        def counted(path, value):
            global left
            write(path, value)
            left -= "encode" in str(path)
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        build.write_json = counted
        prepare.main(sys.argv[1:])"""
    argv = (
        "--source", "files", "--input", tmp_path / "in.txt", "--data_dir", tmp_path / "data",
        "--tokenizer", tmp_path / "t.model", "--tokenizer_vocab", 400,
    )
    assert child("-c", code, *argv).returncode == -signal.SIGKILL
    assert not (tmp_path / "data" / "meta.json").exists()
    done = child(
        "-c",
        "if True:\n import sys, prepare\n from text import build\n build.read = None\n "
        "prepare.main(sys.argv[1:])",
        *argv,
    )
    assert done.returncode == 0 and "broken off" in done.stdout, done.stderr[-500:]
    assert contents(tmp_path / "data") == wanted


def test_standard_input(tmp_path):
    docs = texts(60)
    done = subprocess.run(
        [
            sys.executable, "-m", "prepare", "--source", "files", "--input", "-",
            "--data_dir", tmp_path / "d", "--tokenizer", tmp_path / "t.model",
            "--tokenizer_vocab", "400",
        ],
        cwd=ROOT,
        text=True,
        input="\n\n".join(docs),
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert sorted(decoded(tmp_path / "d", "train") + decoded(tmp_path / "d", "val")) == sorted(
        map(normalise, docs)
    )


def test_parquet(tmp_path):
    pyarrow, table = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    docs = texts(60)
    table.write_table(
        pyarrow.table({"text": docs, "id": list(range(60))}),
        tmp_path / "a.parquet",
        row_group_size=7,
    )
    folder, _ = prepared(tmp_path, tmp_path / "a.parquet")
    assert sorted(decoded(folder, "train") + decoded(folder, "val")) == sorted(map(normalise, docs))
    table.write_table(pyarrow.table({"body": docs}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match='no column "text", but body'):
        prepared(tmp_path, tmp_path / "b.parquet")
    # no nulls, offsets, bytes
    parts = [None, pyarrow.py_buffer(b"\0\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xffb")]
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, parts)
    table.write_table(pyarrow.table({"text": text}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match="d.parquet.*not valid UTF-8"):
        prepared(tmp_path, tmp_path / "d.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read"):
        prepared(tmp_path, tmp_path / "c.parquet")


def test_cleaning_and_its_report(tmp_path):
    """--clean drops the copies and the junk, says so, and writes the page; without it every
    document stays.
    """
    docs = [grammar.starter_document(3, n, 0.0)[1] for n in range(80)]
    dirty = [*docs, docs[3], "?? 12 34 --", "नहीं " * 40]
    folder, said = prepared(tmp_path, dirty, clean="on", report=str(tmp_path / "r.html"))
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert meta["cleaning"]["dropped_docs"] == {
        "exact duplicate": 1,
        "too short": 1,
        "repeats itself": 1,
    }
    assert meta["train_docs"] + meta["val_docs"] == 80 and "80 of 83 documents kept" in said
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "exact duplicate" in page and "<script" not in page and "नहीं नहीं" in page
    folder, _ = prepared(tmp_path, dirty, "all")
    assert len(decoded(folder, "train") + decoded(folder, "val")) == 83


def test_romanise_makes_up_the_wanted_share(tmp_path):
    """--romanise types so many of the Hindi documents in Latin letters; none is there in both
    forms, each split has both.
    """
    docs = [hindi(n) + f"\nवह गाँव नंबर {n} में रहता था और रोज़ बाज़ार जाता था" for n in range(600)]
    folder, _ = prepared(tmp_path, docs, romanise="on", hinglish_ratio=0.4)
    scripts = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["scripts"]
    latin, deva = (scripts["train"][s] + scripts["val"][s] for s in ("latin", "devanagari"))
    assert latin + deva == 600 and 200 < latin < 280
    both = decoded(folder, "train") + decoded(folder, "val")
    numbers = [doc.split("\n")[-1].split()[3] for doc in both]
    assert len(set(numbers)) == 600  # each document once, in one script


def test_a_full_disk_is_a_message(tmp_path, monkeypatch):
    folder, _ = prepared(tmp_path, texts(60))
    before = contents(folder)

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left") as caught:
        prepared(tmp_path, texts(70))
    assert caught.value.code == 1 and contents(folder) == before


# ---- size, and the starter corpus

def test_memory_stays_bounded(tmp_path, monkeypatch):
    """12 MB in, of many documents and one endless line; less Python memory than text, the same as
    for a third of it.
    """
    monkeypatch.setattr(spool, "SAMPLE_BYTES", 200_000)
    monkeypatch.setattr(spool, "BATCH_CHARS", 50_000)
    monkeypatch.setattr(documents, "LINE_BYTES", 100_000)
    block = "\n\n".join(texts(400)) + "\n\n"
    with gzip.open(tmp_path / "big.txt.gz", "wt", encoding="utf-8", compresslevel=1) as f:
        for _ in range(6_000_000 // len(block.encode())):
            f.write(block)
        f.write("नमस्ते दुनिया " * 160_000)
    prepared(tmp_path, texts(60), "warm")
    tracemalloc.start()
    folder, _ = prepared(tmp_path, tmp_path / "big.txt.gz", max_docs=10**9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert TokenData(folder).meta["train_bytes"] > 10e6
    assert peak < 10e6, f"{peak / 1e6:.1f} MB"


def test_starter_corpus(tmp_path, monkeypatch):
    said = []
    folder = tmp_path / "builtin"
    build(config.starter_args(folder, 60_000), said.append)
    meta = TokenData(folder).meta
    assert (
        meta["source"] == "builtin"
        and "synthetic" in "".join(said)
        and meta["sources"][0]["documents"] > 50
    )
    assert TokenData(folder).tokenizer_path == Path(folder) / "tokenizer.model"
    for split in ("train", "val"):  # X1: both scripts in both splits
        assert meta["scripts"][split]["devanagari"] > 0 < meta["scripts"][split]["latin"]
    before = contents(Path(folder))
    monkeypatch.setattr(grammar, "starter_documents", None)  # nothing is generated a second time
    said.clear()
    build(config.starter_args(folder, 60_000), said.append)
    assert "already there" in said[0] and contents(Path(folder)) == before


def test_starter_corpus_is_the_same_in_two_folders(tmp_path):
    for name in "ab":
        build(config.starter_args(tmp_path / name, 40_000), [].append)
    metas = [TokenData(tmp_path / name).meta for name in "ab"]
    assert all(
        metas[0][key] == metas[1][key]
        for key in ("train_sha256", "settings_sha256", "tokenizer_sha256")
    )
