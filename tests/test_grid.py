"""The grid of edge_benchmark, its picture and other engines' figures in it: no checkpoint, no
torch.
"""
import itertools
import json
import random

import pytest
from hypothesis import given, settings, strategies as st

from common.console import UserError
from evaluation import grid, plots, speed_picture
from evaluation.labels import Board
from evaluation.peer_figures import Peer, read_peers


def variants(*axes, speed=lambda **chosen: 100.0, nats=lambda **chosen: 2.0):
    """edge_benchmark's results for a grid, with made-up figures."""
    found = {}
    for label, chosen in grid.combinations(axes).items():
        found[f"block_frozen {label}"] = dict(
            mean_tok_s=speed(**chosen), judge_nats=nats(**chosen)
        )
    return found


# ---- the settings of a grid ----------------------------------------------------------------------

def test_a_line_for_each_rule():
    """Twelve settings are four lines, joined along the steps in the order of their number."""
    results = variants(
        "sampler=confidence,margin", "temperature=0,1", "steps=16,4,8",
        speed=lambda steps, **_: 100 / steps,
    )
    results["full"] = {"skipped": "no blocks"}
    lines = {line.name: line for line in grid.lines_of(results)}
    assert sorted(lines) == [
        f"{rule} temperature {heat}" for rule in ("confidence", "margin") for heat in ("0.0", "1.0")
    ]
    line = lines["margin temperature 1.0"]
    assert (line.rule, line.axis) == ("margin", "steps")
    assert line.points == [("4", 25, 2.0), ("8", 12.5, 2.0), ("16", 6.25, 2.0)]


def test_what_does_not_differ_is_not_in_a_name():
    [line] = grid.lines_of({"full a=x": dict(mean_tok_s=1, judge_nats=2)})
    assert line == grid.Line("full", "full", "", [("", 1, 2)])
    [one, two] = grid.lines_of(variants("block_size=16,64", "steps=4,8,16"))
    assert (one.name, two.name, one.axis) == ("block_size 16", "block_size 64", "steps")
    [line] = grid.lines_of(variants("block_size=16,64", "sampler=random"))
    assert (line.name, line.axis) == ("block_frozen", "block_size")
    # as many values of each: the line runs along the one that sets the pace
    assert {line.axis for line in grid.lines_of(variants("block_size=16,64", "steps=4,8"))} == {
        "steps"
    }


def test_a_rule_varies_by_its_own_pace():
    """In a grid over steps and thresholds no rule is run twice with the same meaning."""
    axes = ("sampler=confidence,threshold", "steps=4,8,16", "threshold=0.5,0.9")
    chosen = grid.combinations(axes)
    assert list(chosen) == [
        *(f"sampler=confidence steps={steps}" for steps in (4, 8, 16)),
        *(f"sampler=threshold threshold={bound}" for bound in (0.5, 0.9)),
    ]
    lines = grid.lines_of(variants(*axes))
    assert [(line.name, line.axis) for line in lines] == [
        ("confidence", "steps"), ("threshold", "threshold"),
    ]
    meaning = speed_picture.numbers_mean(lines)
    assert meaning == "steps (confidence), threshold (threshold)"
    # a bound on the forwards of an adaptive rule is an axis of its own
    assert len(grid.combinations(("sampler=threshold", "steps=4,8"))) == 2


# ---- the picture ---------------------------------------------------------------------------------

@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30))
def test_the_frontier_is_what_nothing_beats(places):
    points = [("", speed, nats) for speed, nats in places]
    kept = speed_picture.frontier(points)

    def beats(one, other):
        """As good in both, and better in one."""
        return one[1] >= other[1] and one[2] <= other[2] and one != other

    for point in points:
        assert (point in kept) != any(beats(other, point) for other in points)
    assert kept == sorted(kept, key=lambda point: (-point[1], -point[2]))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(0, 900), st.integers(0, 600)), min_size=1, max_size=25, unique=True
    )
)
def test_labels_cover_neither_each_other_nor_points(places):
    board = Board(0, 0, 1000, 700)
    for place in places:
        board.add_point(*place, 6)
    points = list(board.taken)
    boxes = [board.place(place, 120, 14) for place in places]
    assert None not in boxes, "there is room enough for all"
    for box, other in itertools.combinations([*points, *boxes], 2):
        if box in points and other in points:
            continue
        apart = (
            box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]
        )
        assert apart
    for left, bottom, right, top in boxes:
        assert 0 <= left and right <= 1000 and 0 <= bottom and top <= 700


def test_a_label_keeps_off_lines():
    """The place to the right has a line through it; above and below are free."""
    board = Board(0, 0, 400, 400)
    board.add_path([(0, 200), (400, 200)])
    left, bottom, right, top = board.place((200, 200), 80, 12)
    assert bottom > 200 or top < 200
    assert board.crossed((10, 190, 20, 210)) == 1 and board.crossed((10, 210, 20, 230)) == 0
    steep = Board(0, 0, 400, 400)
    steep.add_path([(100, 0), (100, 150), (300, 150)])
    assert steep.crossed((90, 100, 110, 200)) == 2 and steep.crossed((120, 0, 280, 140)) == 0


def drawn(lines, real, peers, caption="a run"):
    """The picture as a figure, and its labels: {text: extent in pixels}."""
    pytest.importorskip("matplotlib")
    plt = plots.pyplot()
    figure = speed_picture.figure_of(plt, lines, real, peers, caption)
    figure.canvas.draw()
    [axes] = figure.axes
    extents = [(text.get_text(), text.get_window_extent()) for text in axes.texts]
    plt.close(figure)
    return figure, [(text, extent) for text, extent in extents if text]


def test_every_line_and_engine_is_named_and_no_text_overlaps():
    rng = random.Random(0)
    lines = grid.lines_of(
        variants(
            "sampler=confidence,margin,random,ancestral", "temperature=0,0.5,1", "steps=4,8,16,32",
            speed=lambda steps, **_: 2000 / steps ** 0.8 * (1 + 0.1 * rng.random()),
            nats=lambda steps, temperature, **_: 1 + 8 / steps ** 0.5 + temperature + rng.random(),
        )
    )
    peers = [Peer("llama.cpp $Q8_0", 523, None, "prompt of 64"), Peer("hf_llama", 80, 3.0)]
    figure, labels = drawn(lines, 1.2, peers)
    texts = [text for text, _ in labels]
    assert {line.name for line in lines} <= set(texts) and len(lines) == 12
    assert "llama.cpp $Q8_0" in texts and "hf_llama" in texts
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()][2:] == [
        "llama.cpp $Q8_0: 523 tokens/s, prompt of 64 (speed only)", "hf_llama: 80 tokens/s",
    ]
    # the legend stands below the axes, and within the picture
    [axes] = figure.axes
    box = legend.get_window_extent()
    below = axes.xaxis.get_tightbbox()
    assert 0 <= box.y0 and box.y1 <= below.y0
    assert sum(text in ("4", "8", "16", "32") for text in texts) > 30, "most of 48 values"
    for (text, box), (other, other_box) in itertools.combinations(labels, 2):
        apart = (
            box.x1 <= other_box.x0 or other_box.x1 <= box.x0
            or box.y1 <= other_box.y0 or other_box.y1 <= box.y0
        )
        assert apart, (text, other)
    inside = figure.bbox
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for _, box in labels)


def test_pictures_of_little(tmp_path, capsys):
    """One point; speeds close together; a rule of one point beside a line; nothing judged."""
    one = {"full": dict(mean_tok_s=40, judge_nats=2.0)}
    two = one | {"block": dict(mean_tok_s=45, judge_nats=2.0)}
    for results, names in ((one, {"full"}), (two, {"full", "block"})):
        _, labels = drawn(grid.lines_of(results), None, [])
        assert {text for text, _ in labels} == names
    nothing = grid.lines_of({"full": dict(mean_tok_s=40, judge_nats=None)})
    speed_picture.draw(tmp_path / "n.png", nothing, None, [], "a run")
    assert "no picture" in capsys.readouterr().err and not (tmp_path / "n.png").exists()


def test_the_caption_says_what_was_measured():
    document = dict(
        ckpt="checkpoints/eco_hybrid_hi/step_000800", step=800, params=3_600_000, threads=1,
        device="cpu", prompts=["a", "b"], args=dict(max_new_tokens=64, temperature=0.7),
    )
    assert grid.caption(document) == (
        "eco_hybrid_hi, 3.6M parameters, step 800; 2 prompts, up to 64 new tokens, temperature "
        "0.7; 1 CPU thread"
    )


# ---- other engines -------------------------------------------------------------------------------

def peers_in(tmp_path, text):
    path = tmp_path / "peer.json"
    path.write_text(text, encoding="utf-8")
    return read_peers([str(path)])


def test_forms_of_a_peer_file(tmp_path):
    one = dict(name="llama.cpp Q8_0", tok_s=523, nats=2.5, note="38M")
    other = dict(name="other", tok_s=1.5, nats=None)
    assert peers_in(tmp_path, json.dumps(one)) == [Peer("llama.cpp Q8_0", 523, 2.5, "38M")]
    assert peers_in(tmp_path, json.dumps([one, other], indent=1)) == [
        Peer("llama.cpp Q8_0", 523, 2.5, "38M"), Peer("other", 1.5),
    ]


def test_what_decode_peers_prints(tmp_path):
    """Its last line, of the shortest prompt, without Aria's own rows."""
    rows = [
        dict(prompt=prompt, name=name, tok_per_s=speed, min=1, max=2, runs=3)
        for prompt in (1024, 64)
        for name, speed in (("aria primary bf16, 4 per forward", 300), ("llama.cpp AR, Q8_0", 523))
    ]
    document = json.dumps(dict(rows=rows, new=128, params=38_185_984, threads=2))
    note = "38.2M parameters, prompt of 64, 2 threads"
    wanted = [Peer("llama.cpp AR, Q8_0", 523, None, note)]
    assert peers_in(tmp_path, document) == wanted
    assert peers_in(tmp_path, f"parameters: primary 38\nprompt 64 ...\n{document}\n") == wanted


@pytest.mark.parametrize("text, words", [
    ("", "not valid JSON"),
    ("{", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('{"name": "a", "tok_s": NaN}', "not valid JSON"),
    ('{"name": "a", "tok_s": 1, "tok_s": 2}', "a key occurs twice"),
    ("3", "no JSON object"),
    ("[[]]", "no JSON object"),
    ('{"tok_s": 3}', '"name"'),
    ('{"name": " ", "tok_s": 3}', '"name"'),
    ('{"name": "a"}', '"tok_s" of a'),
    ('{"name": "a", "tok_s": true}', '"tok_s" of a'),
    ('{"name": "a", "tok_s": 0}', '"tok_s" of a'),
    ('{"name": "a", "tok_s": 1e400}', '"tok_s" of a'),
    ('{"name": "a", "tok_s": "3"}', '"tok_s" of a'),
    ('{"name": "a", "tok_s": 3, "nats": -1}', '"nats" of a'),
    ('{"name": "a", "tok_s": 3, "note": 1}', '"note" of a'),
    ('{"rows": 3}', '"rows"'),
    ('{"rows": []}', "no other engine"),
    ('{"rows": [{"name": "aria x", "prompt": 64, "tok_per_s": 1}]}', "no other engine"),
    ('{"rows": [{"name": "llama.cpp", "tok_per_s": 1}]}', '"prompt"'),
    ('{"rows": [{"name": "llama.cpp", "prompt": 64, "equal": 1}]}', '"tok_per_s"'),
])
def test_a_wrong_peer_file_is_one_sentence(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        peers_in(tmp_path, text)
    assert caught.value.code == 2
    message = str(caught.value)
    assert words in message and "peer.json" in message and "\n" not in message


def test_a_peer_file_that_cannot_be_read(tmp_path):
    for path, words in (
        (tmp_path / "none.json", "No such file"),
        (tmp_path, "is a folder: measure what lies in it"),
    ):
        with pytest.raises(UserError, match=words):
            read_peers([str(path)])
    path = tmp_path / "bytes"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        read_peers([str(path)])
