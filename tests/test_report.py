"""report.html: what a resume took back is not drawn, any log gives a page, nothing in a text is
code, a real browser shows it.

    python -m pytest tests/test_report.py
"""
import html
import json
import math
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import BROWSER
from hypothesis import given, settings, strategies as st

import config
import evaluate
import report
import sample
import train
from common.console import UserError
from evaluation import check_run, run_report
from training import logs

META = dict(
    event="meta",
    argv=["train"],
    params_total=7,
    device="cpu",
    data={"source": "files", "sha256": "ab"},
    config={"args": {"max_steps": 100, "model": "primary"}},
)


def train_line(step, loss=1.0, **more):
    return dict(event="train", step=step, loss=loss, **more)


def test_what_was_taken_back_is_not_drawn():
    log = [
        META,
        *(train_line(s, 10 + s) for s in range(1, 60)),
        dict(event="eval", step=50, val_nelbo=3.0),
        dict(event="sample", step=50, prompt="a", text="gone"),
        META,
        dict(event="resume", step=40),
        *(train_line(s, -s) for s in range(41, 46)),
        dict(event="rollback", step=46, to=43),
        train_line(44, 99.0),
    ]
    kept = run_report.history(log)
    assert list(kept["train"]) == list(range(1, 45)) and not kept["eval"] and not kept["sample"]
    assert [kept["train"][s]["loss"] for s in (40, 41, 43, 44)] == [50, -41, -43, 99.0]
    page = run_report.render(log, "run")
    assert "gone" not in page and "2 sessions" in page and "step 44 of 100" in page


class Tags(HTMLParser):
    """What a browser would make of a page: its elements, and whether each is closed."""

    def __init__(self, page):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "circle", "polygon", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "circle", "polygon", "polyline"):
            assert self.open.pop() == tag


def well_formed(page):
    tags = Tags(page)
    assert tags.open == [] and not {"script", "img", "link", "iframe"} & {
        tag for tag, _ in tags.seen
    }
    assert not re.search(
        r"\b(nan|inf)\b",
        "".join(str(a) for tag, a in tags.seen if tag in ("path", "polygon", "polyline")),
    )
    assert all(
        not key.startswith("on") and key not in ("src", "href") for _, a in tags.seen for key in a
    )


def test_a_text_is_never_code():
    evil = '<script>alert(1)</script>"\'><img src=x onerror=alert(1)>&amp;'
    log = [
        {
            **META,
            "argv": [evil],
            "device": evil,
            "data": {evil: evil},
            "config": {"args": {"model": evil, "max_steps": evil}},
        },
        train_line(1),
        dict(event="sample", step=1, prompt=evil, text=evil),
        dict(event="warn", step=evil, message=evil),
        dict(event="eval", step=1, val_nelbo=evil),
    ]
    page = run_report.render(log, evil)
    well_formed(page)
    assert "<script>" not in page and page.count("&lt;script&gt;") >= 8


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(max_size=3), x, max_size=2),
    max_leaves=4,
)
KEYS = (
    "step", "loss", "to", "val_nelbo", "val_ci", "gnorm", "prompt", "text", "message", "config",
    "data", "argv", "code", "seconds", "tok_s", "params_total",
)
NUMBER = (
    st.floats()
    | st.integers(-5, 1000)
    | st.sampled_from([5e-324, 1e17, 1e17 + 16, -1e300, 10**400])
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "event": st.sampled_from(
                    ["meta", "train", "eval", "sample", "resume", "rollback", "warn", "end"]
                )
                | JUNK
            },
            optional={key: NUMBER | JUNK for key in KEYS},
        ),
        max_size=8,
    )
)
def test_any_log_gives_a_page(log):
    well_formed(run_report.render(log, "run"))


def test_torn_lines_and_strange_bytes_are_left_out(tmp_path):
    good = json.dumps(train_line(3, 2.5, text="a\u2028b"), ensure_ascii=False).encode()
    (tmp_path / "train.jsonl").write_bytes(
        b'\xff\xfe\n[1]\n{"step": 1}\n' + b"[" * 100_000 + b"\n" + good + b'\n{"event": "tra'
    )
    assert check_run.read_log(tmp_path / "train.jsonl") == [train_line(3, 2.5, text="a\u2028b")]
    assert "step 3 of" in run_report.page(tmp_path / "train.jsonl")


def test_a_long_run_is_thinned_without_losing_its_extremes():
    points = [(s, math.sin(s) + (50 if s == 777 else 0)) for s in range(1, 20_001)]
    rows = run_report.thinned(points)
    assert (
        len(rows) <= run_report.BUCKETS
        and max(r[3] for r in rows) > 49
        and min(r[2] for r in rows) < -0.999
    )
    assert len(run_report.chart("x", points)) < 10_000
    assert run_report.thinned(points[:100]) == [(x, y, y, y) for x, y in points[:100]]


def test_ticks_are_round_and_inside():
    for low, high in ((0, 1), (4.93, 6.7), (0, 160), (1e-5, 3e-4), (-2, 1e6)):
        found = run_report.ticks(low, high)
        assert 2 <= len(found) <= 7 and low <= found[0] and found[-1] <= high * (1 + 1e-9)


def test_the_command(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    (run / "step_000001").mkdir(parents=True)
    with pytest.raises(UserError, match="no train.jsonl"):
        report.main([str(run)])
    (run / "train.jsonl").write_text("\n".join(map(json.dumps, (META, train_line(1)))))
    assert report.main([str(run)]) is None
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page == run_report.page(run / "train.jsonl")
    report.main([str(run / "step_000001"), "--out", str(tmp_path / "a.html")])
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == page
    with pytest.raises(UserError, match="cannot write"):
        report.main([str(run), "--out", str(tmp_path / "no/such/a.html")])


@pytest.mark.skipif(BROWSER is None, reason="there is no browser here")
def test_a_real_browser_shows_it(tmp_path):
    """As a file, with a text in Devanagari; the page that the browser holds afterwards has every
    curve and the text.
    """
    log = [
        META,
        *(
            train_line(s, 5 / s, gnorm=1.0, lr=1e-3, tok_s=1e3, mfu=0.4, mask=0.5, mem_mb=300)
            for s in range(1, 400)
        ),
        *(dict(event="eval", step=s, val_nelbo=4.0, val_ci=0.1) for s in (100, 200)),
        dict(event="sample", step=200, prompt="भारत में", text=" आज <b>क्या</b>"),
    ]
    (tmp_path / "report.html").write_text(run_report.render(log, "हिन्दी"), encoding="utf-8")
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-sync", "--disable-background-networking",
            "--disable-component-update", f"--user-data-dir={tmp_path / 'b'}",
            "--dump-dom", (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.count("<figure>") == 8 == done.stdout.count('class="curve"')
    assert (
        "<title>हिन्दी: training "
        "report</title>" in done.stdout and "आज &lt;b&gt;क्या" in done.stdout
    )
    assert "Refused" not in done.stderr


def test_a_run_leaves_its_report(here):
    run = here / "checkpoints/eco_hybrid_hi"
    assert (run / "report.html").read_text(encoding="utf-8") == run_report.page(run / "train.jsonl")


def test_the_best_bound_is_shown_in_bits_per_byte():
    bounds = ((1, 4.0, 2.5), (2, 3.0, 1.875), (3, 3.5, 2.2))
    log = [
        META,
        *(
            dict(event="eval", step=step, val_nelbo=nats, val_bpb=bits)
            for step, nats, bits in bounds
        ),
    ]
    assert ">1.8750</b>" in run_report.render(log, "run") and ">3.0000</b>" in run_report.render(
        log, "run"
    )
    unknown = [META, dict(event="eval", step=1, val_nelbo=4.0, val_bpb=None)]
    assert ">4.0000</b>" in run_report.render(unknown, "run"), "a text whose bytes are not known"


LESS = {"sample": ["--max_new_tokens", "4"],
        "evaluate": ["--batches", "1", "--draws", "1", "--chain_docs", "1", "--repeats", "0"],
        "train": ["--no_show_samples"]}


@pytest.mark.parametrize("name", ["eco_hybrid_hi", "diffusion_hi"])
def test_every_command_that_a_run_names_works(trained, tmp_path, monkeypatch, name):
    """Of the page and of summary.md, typed where the run was trained, with a run folder whose name
    needs quotes.
    """
    for part in ("data", f"checkpoints/{name}"):
        shutil.copytree(trained / part, tmp_path / part)
    monkeypatch.chdir(tmp_path)
    run = Path("checkpoints/my 'first' run")
    Path("checkpoints", name).rename(run)
    page = run_report.page(run / "train.jsonl")
    named = [
        html.unescape(command) for command in re.findall(r"<code>(python -m .*?)</code>", page)
    ]
    summary = re.findall(
        r"^- [\w ]+: (python -m .*)$", (run / "summary.md").read_text(encoding="utf-8"), re.M
    )
    assert (
        [words.split()[2] for words in named]
        == [words.split()[2] for words in summary]
        == ["sample", "evaluate", "train"]
    )
    assert [c.replace(shlex.quote(str(run)), f"checkpoints/{name}") for c in named] == summary
    mains = {"sample": sample.main, "evaluate": evaluate.main, "train": train.main}
    for command in named:
        _, _, program, *words = shlex.split(command)
        assert not mains[program]([*words, *LESS[program]]), command
    steps = run_report.history(check_run.read_log(run / "train.jsonl"))["train"]
    assert steps.keys() == set(range(1, 25)), "it went on to twice the steps"


def test_a_run_without_a_checkpoint_names_no_command(tmp_path):
    page = run_report.render([META, train_line(3)], "run")
    assert "python -m" not in page and "No checkpoint" in page
    data = SimpleNamespace(meta={"source": "files", "train_tokens": 9})
    told = (
        config.TrainArgs(),
        tmp_path,
        7,
        data,
        math.inf,
        None,
        SimpleNamespace(speeds=[], elapsed=1.0),
        0,
        0,
    )
    assert "python -m" not in logs.summary(*told)
    (tmp_path / "latest").write_text("step_000001\n")
    assert logs.summary(*told).count("python -m") == 3


@pytest.mark.parametrize(
    "name, words", [("SIGINT", "Ctrl-C"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGHUP")]
)
def test_a_run_that_was_stopped_is_not_finished(name, words):
    assert (
        run_report.ending([{"event": "end", "code": 0, "stopped": name}]) == f"stopped by {words}"
    )
