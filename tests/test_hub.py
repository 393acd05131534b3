"""The hub path with the real datasets library, against a local server that speaks the hub's
protocol (tests/stand_in_hub.py).

    python -m pytest tests/test_hub.py

Everything runs as a user runs it: `python -m prepare --source hindi`.
"""
import json
import re
import signal
import subprocess
import time

import pytest
from stand_in_hub import SHA, card, lines, parquet, serving
from stand_in_hub import started as started_command

from text import hub
from text.dataset import TokenData
from text.starter import grammar


def rows(script, start, count):
    """Documents of the starter corpus in one script, each with its number, so that a lost or
    doubled row shows.
    """
    texts, i = [], 0
    while len(texts) < start + count:
        kind, text = grammar.starter_document(3, i, 0.5)
        i += 1
        if kind == script:
            texts.append(f"{text} {'क' if script == 'devanagari' else 'k'}{len(texts)}")
    return texts[start:]


DEVA, LATIN = rows("devanagari", 0, 600), rows("latin", 0, 500)
FILES = {
    "ai4bharat/sangraha": {
        "README.md": card(verified=("hin", "verified/hin/*.parquet")),
        "verified/hin/data-0.parquet": parquet(DEVA[:150]),
        "verified/hin/data-1.parquet": parquet(DEVA[150:300]),
    },
    "wikimedia/wikipedia": {
        "README.md": card(**{"20231101.hi": ("train", "20231101.hi/*.parquet")}),
        "20231101.hi/train-00000.parquet": parquet(DEVA[300:]),
    },
    "kartikagg98/HINMIX_hi-en": {
        "README.md": card(
            **{
                "lcsalign-hicmrom": ("train", "clean/*.jsonl"),
                "lcsalign-noisyhicmrom": ("train", "noisy/*.jsonl"),
            }
        ),
        "clean/a.jsonl": lines(LATIN[:250]),
        "noisy/a.jsonl": lines(LATIN[250:]),
    },
}


@pytest.fixture
def server():
    with serving(FILES) as server:
        yield server


def prepare(folder, server, *argv, **how):
    """`python -m prepare --source hindi` in a folder, talking to the stand-in, to its end."""
    child = started(folder, server, *argv, **how)
    out, err = child.communicate(timeout=120)
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def started(folder, server, *argv, code="", port=None):
    port = port or server.server_port
    words = ["--source", "hindi", "--tokenizer_vocab", "800", *argv]
    return started_command("prepare", folder, port, *words, code=code)


def raw(folder, name):
    return [
        json.loads(line)["text"]
        for line in open(folder / "data/raw" / f"{name}.jsonl", encoding="utf-8")
    ]


def test_sources_add_up_and_broken_ones_come_back(tmp_path, server):
    """Every row of every source once and in order, although connections die midway and one set is
    gone.
    """
    server.breaks = {"train-00000.parquet": 4, "a.jsonl": 3}
    done = prepare(tmp_path, server, "--max_chars", 400_000, "--no_romanise")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        raw(tmp_path, "hindi_sangraha") == DEVA[:300]
        and raw(tmp_path, "hindi_wikipedia") == DEVA[300:]
    )
    assert (
        raw(tmp_path, "hinglish_hinmix") == LATIN[:250]
        and raw(tmp_path, "hinglish_hinmix_noisy") == LATIN[250:]
    )
    assert re.search(r"fineweb-2 hin_Deva is left out", done.stdout) and "hindi: " in done.stdout
    meta = TokenData(tmp_path / "data/processed").meta
    assert meta["source"] == "hindi"
    assert [s["name"] for s in meta["sources"]] == [
        "sangraha", "wikipedia", "hinmix", "hinmix_noisy",
    ]
    assert [s["revision"] for s in meta["sources"]] == [SHA[s["repo"]] for s in meta["sources"]]
    assert all(s["licence"] and s["rows"] and len(s["sha256"]) == 64 for s in meta["sources"])
    for split in ("train", "val"):
        assert meta["scripts"][split]["devanagari"] > 0 < meta["scripts"][split]["latin"]
    assert meta["cleaning"]["kept_docs"] > 900
    # nothing needs the network now
    again = prepare(tmp_path, server, "--max_chars", 400_000, "--no_romanise", port=1)
    assert "already there" in again.stdout, again.stderr[-2000:]


def test_a_killed_download_goes_on(tmp_path, server):
    """SIGKILL in the middle: the next run starts from the last state and the files are those of one
    run.
    """
    code = """ import os, signal, json
 hub.SYNC_ROWS = 40
 write = hub.write_json
 def killing(path, value):
  write(path, value)
  if value.get('rows', 0) >= 120: os.kill(os.getpid(), signal.SIGKILL)
 hub.write_json = killing"""
    done = prepare(tmp_path, server, "--max_chars", 400_000, code=code)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    part = tmp_path / "data/raw/hindi_sangraha.jsonl.part"
    assert part.exists() and not part.with_suffix("").exists()
    with open(part, "ab") as f:
        f.write(b'{"text": "half a li')  # what a kill in a write leaves
    counting = """ opened = hub.open_stream
 def said(source, revision, at):
  print('OPEN', source.name, 'anew' if at is None else 'later')
  return opened(source, revision, at)
 hub.open_stream = said"""
    done = prepare(tmp_path, server, "--max_chars", 400_000, "--no_romanise", code=counting)
    assert (
        done.returncode == 0
        and "OPEN sangraha later" in done.stdout
        and "OPEN wikipedia anew" in done.stdout
    )
    assert raw(tmp_path, "hindi_sangraha") == DEVA[:300]
    assert not list((tmp_path / "data/raw").glob("*.part"))


def test_no_network_and_a_dead_hub(tmp_path, server):
    done = prepare(tmp_path, server, port=1)
    assert (
        done.returncode == 3
        and "--source builtin" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not list(tmp_path.glob("data/processed/*.bin"))
    done = prepare(tmp_path, server, "--offline", "--max_chars", 60_000)
    assert done.returncode == 0 and "--offline" in done.stdout
    assert TokenData(tmp_path / "data/processed").meta["source"] == "builtin"


# Less patience, as a test has to wait it out.
HASTE = " hub.QUIET, hub.PROBE, hub.PATIENCE = 0.3, 1, 3"


@pytest.mark.parametrize("mode, most", [("hangs", 4), ("hangs later", 20), ("refuses", 12)])
def test_a_dead_hub_costs_seconds_and_a_few_lines(tmp_path, server, mode, most):
    """Nothing answers, or nothing but the address, or all is refused: said early, no source takes
    long, few lines.
    """
    assert hub.QUIET <= 3 and hub.PROBE <= 5 and hub.PATIENCE <= 20
    server.mode, began = mode, time.monotonic()
    done = prepare(tmp_path, server, code=HASTE)
    took = time.monotonic() - began
    assert (
        done.returncode == 3
        and "--source builtin" in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) <= most and ("trying again" not in done.stdout or mode == "hangs later"), (
        done.stdout
    )
    assert took < 60
    assert "waiting for" in lines[0] or mode == "refuses"


@pytest.mark.parametrize("mode", ["hangs", "hangs later"])
@pytest.mark.parametrize("number, code", [("SIGINT", 130), ("SIGTERM", None)])
def test_signals_are_answered_while_a_hub_hangs(tmp_path, server, mode, number, code):
    server.mode = mode
    child = started(tmp_path, server, code=" hub.QUIET = 0.1\n hub.PROBE = hub.PATIENCE = 50")
    try:
        assert "waiting for" in child.stdout.readline()
        began = time.monotonic()
        child.send_signal(getattr(signal, number))
        child.wait(30)
        took = time.monotonic() - began
    finally:
        child.kill()
        err = child.communicate()[1]
    assert took < 5 and "Traceback" not in err, err[-2000:]
    assert (
        child.returncode == code or code is None and child.returncode in (-signal.SIGTERM, 130, 143)
    )


def test_the_table_is_plain():
    """Each source has a licence and a name of its own; nothing in it could make the library run
    code.
    """
    sources = [s for group in hub.SOURCES.values() for s in group]
    assert len({(s.kind, s.name) for s in sources}) == len(sources) and all(
        s.licence for s in sources
    )
    for s in sources:
        assert s.revision is None or re.fullmatch("[0-9a-f]{40}", s.revision)
