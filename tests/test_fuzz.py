"""Malformed files and texts through the targets of tests/stress/fuzz.py, and damage that nobody may
accept, counted.

    python -m pytest tests/test_fuzz.py

hypothesis chooses the edits here and shrinks what fails; the benchmark makes tens of thousands with
a plain generator.
"""
import os
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from test_train import call, fresh

import checkpoint
import config
import conftest
from common.console import UserError
from common.files import sealed, to_json
from conftest import trap
from stress import fuzz
from text import dataset

FAST = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
EDITS = st.lists(
    st.tuples(
        st.sampled_from("flip cut drop put zero".split()),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)
JSON = {
    "meta": ("text", "meta.json"),
    "manifest": ("ckpt", "MANIFEST.json"),
    "state": ("ckpt", "state.json"),
    "config": ("ckpt", "config.json"),
    "config_file": ("ckpt", "config.json"),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    torch.set_num_threads(1)
    with fuzz.scratch() as folder:
        yield fuzz.Lab(folder)


def edited(data, edits):
    out = bytearray(data)
    for kind, where, payload in edits:
        at = int(where * len(out))
        if kind == "flip" and out:
            out[at] ^= payload[0] or 1
        elif kind == "put":
            out[at:at] = payload
        elif kind != "flip":
            out[at:] = {"cut": b"", "drop": out[at + len(payload) :], "zero": bytes(len(out) - at)}[
                kind
            ]
    return bytes(out)


@pytest.mark.parametrize(
    "target",
    [
        "train.bin", "meta", "manifest", "state", "config", "header", "shard", "tokenizer",
        "documents", "prompts_file", "config_file",
    ],
)
def test_damaged_bytes(lab, target):
    sound = lab.seed(target, random.Random(0))[1]

    @settings(max_examples=40, **FAST)
    @given(EDITS)
    def check(edits):
        data = edited(sound, edits)
        result = fuzz.attempt(lab, target, (data,))
        assert result == "refused" or target not in fuzz.GUARDED or data == sound
    check()


@pytest.mark.parametrize("target", JSON)
def test_any_value_anywhere(lab, target):
    folder, name = JSON[target]
    sound = checkpoint.read_json(lab.spot / folder / name)

    @settings(max_examples=60, **FAST)
    @given(st.data())
    def check(data):
        value = fuzz.copy.deepcopy(sound)
        place = value["args"] if "args" in value and data.draw(st.booleans()) else value
        place[data.draw(st.sampled_from([*place, "new"]))] = data.draw(VALUES)
        fuzz.attempt(lab, target, (fuzz.json.dumps(value).encode(),))
    check()


@settings(max_examples=200, **FAST)
@given(st.text(max_size=60) | st.text(fuzz.ALPHABET, max_size=60))
def test_any_prompt(lab, prompt):
    fuzz.attempt(lab, "prompt", (prompt.encode("utf-8", "surrogatepass"),))


# ---- damage that has to be found: counted --------------------------------------------------------

def test_no_damage_is_accepted(lab):
    """Every file of a trained checkpoint and of a prepared text: flipped at many places, cut,
    zeroed, emptied, swapped.
    """
    tried, silent = 0, []
    for folder, names in (("ckpt", lab.files), ("text", ["train.bin"])):
        for name in names:
            sound = (lab.spot / folder / name).read_bytes()
            places = sorted(
                {0, 1, 7, 8, len(sound) - 1, *range(0, len(sound), max(1, len(sound) // 20))}
            )
            damaged = [sound[:a] + bytes([sound[a] ^ 1 << a % 8]) + sound[a + 1:] for a in places]
            damaged += [sound[:a] for a in places[1::3]] + [
                sound[:a] + bytes(len(sound) - a) for a in places[1:-1:5]
            ]
            damaged += [
                b"",
                sound + b"\0",
                sound + sound,
                sound[::-1],
                sound[:-1],
                sound + b"\n",
                sound.replace(b": ", b":"),
            ]
            for data in damaged:
                if data == sound:
                    continue
                tried += 1
                arguments = (name, data) if folder == "ckpt" else (data,)
                if (
                    fuzz.attempt(lab, "raw" if folder == "ckpt" else "train.bin", arguments)
                    != "refused"
                ):
                    silent.append((name, len(data)))
    assert tried > 200 and not silent, f"{len(silent)} of {tried} silent acceptances: {silent[:9]}"


def refused(*words, capsys, say):
    capsys.readouterr()
    assert call(*words) == 2
    error = capsys.readouterr().err
    error = error[error.rfind("error:"):]
    assert all(word in error for word in say) and "Traceback" not in error, error


@pytest.fixture
def run(text, tmp_path):
    assert fresh(text, tmp_path / "run", "--max_steps", 2, "--eval_interval", 0) == 0
    return tmp_path / "run"


def test_a_checkpoint_from_another_model(text, run, capsys):
    from test_checkpoint import plant
    go = ("--resume", run, "--max_steps", 4, "--threads", 1)
    refused(*go, "--model", "backup", capsys=capsys, say=("--model backup", "primary"))
    refused(*go, "--optimizer", "lion", capsys=capsys, say=("--optimizer lion", "muon"))
    other = run.with_name("other")  # its tensors, under a manifest that fits
    assert (
        fresh(
            text, other, "--max_steps", 2, "--eval_interval", 0, "--model", "backup",
            "--optimizer", "lion",
        )
        == 0
    )
    for name, say in (
        ("model.safetensors", "does not fit the model"),
        ("optimizer.safetensors", "optimizer state does not fit"),
    ):
        sound = (run / "step_000002" / name).read_bytes()
        plant(run / "step_000002", name, (other / "step_000002" / name).read_bytes())
        refused(*go, capsys=capsys, say=(say,))
        plant(run / "step_000002", name, sound)


def test_a_swapped_tokenizer_of_the_same_size(text, run, tmp_path, capsys):
    """The ids would fit and mean other words: refused for a resume, a fork and first weights alike.
    """
    import prepare
    folder = tmp_path / "other"
    prepare.main(
        [
            "--source", "builtin", "--max_chars", "9000", "--tokenizer_vocab", "400",
            "--data_dir", str(folder), "--tokenizer", str(folder / "o.model"), "--seed", "5",
        ]
    )
    sizes = [checkpoint.read_json(f / "meta.json")["vocab_size"] for f in (text, folder)]
    assert sizes[0] == sizes[1]
    for words in (
        ("--resume", run),
        ("--resume", run, "--run_name", "fork"),
        ("--ckpt", run, "--output_dir", tmp_path / "new"),
    ):
        refused(
            *words,
            "--data_dir",
            folder,
            "--max_steps",
            4,
            "--threads",
            1,
            "--d_model",
            16,
            "--n_layers",
            2,
            "--n_heads",
            2,
            "--d_ff",
            32,
            "--memory_slots",
            2,
            "--seq_len",
            16,
            capsys=capsys,
            say=("tokenizer", "--tokenizer"),
        )
    data = tmp_path / "swapped"
    shutil.copytree(text, data)
    meta = checkpoint.read_json(data / "meta.json")
    (data / "t.model").write_bytes((folder / "o.model").read_bytes())
    (data / "meta.json").write_bytes(to_json(sealed({**meta, "tokenizer": str(data / "t.model")})))
    refused(
        "--resume",
        run,
        "--data_dir",
        data,
        "--max_steps",
        4,
        "--threads",
        1,
        capsys=capsys,
        say=("made with tokenizer",),
    )


def test_train_bin_of_another_dtype(text, run, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(text, data)
    ids = np.fromfile(data / "train.bin", "<u2")
    for wrong in (
        ids.astype("<u4"),
        ids.astype(">u2"),
        ids[: len(ids) // 2].astype("<u4"),
        ids.astype("<f4")[: len(ids) // 2],
    ):
        (data / "train.bin").write_bytes(wrong.tobytes())
        refused(
            "--resume",
            run,
            "--data_dir",
            data,
            "--max_steps",
            4,
            "--threads",
            1,
            capsys=capsys,
            say=("train.bin",),
        )
    ids[0] += 1  # a valid id: only the hash can tell
    (data / "train.bin").write_bytes(ids.tobytes())
    refused(
        "--resume",
        run,
        "--data_dir",
        data,
        "--max_steps",
        4,
        "--threads",
        1,
        capsys=capsys,
        say=("train.bin", "sha256"),
    )
    with pytest.raises(UserError, match="sha256"):
        dataset.TokenData(data)


def test_pickles_named_like_a_checkpoint(run, tmp_path, capsys):
    canary = tmp_path / "canary"
    for name in ("latest.pt", "best.pt", "last.ckpt", "step_000002.pt", "model.pt"):
        (run / name).write_bytes(trap(canary))
        refused(
            "--resume",
            run / name,
            "--max_steps",
            4,
            "--threads",
            1,
            capsys=capsys,
            say=(name, "foreign"),
        )
        (run / name).unlink()
    (run / "step_000002/model.safetensors").write_bytes(trap(canary))
    refused(
        "--resume",
        run / "step_000002",
        "--max_steps",
        4,
        "--threads",
        1,
        capsys=capsys,
        say=("model.safetensors",),
    )
    assert not canary.exists()


def test_a_forged_state_is_refused_before_anything_is_touched(run, capsys):
    """Sealed with fitting hashes, so that only what it says can be wrong."""
    from test_checkpoint import plant
    step = run / "step_000002"
    sound = checkpoint.read_json(step / "state.json")
    for change in (
        {"position": -1},
        {"position": True},
        {"best": "x"},
        {"losses": [None]},
        {"scaler": {"scale": 1}},
        {"skipped": 2**70},
        {"losses": 5},
        {"precision": None},
    ):
        plant(step, "state.json", to_json({**sound, **change}))
        refused(
            "--resume",
            step,
            "--max_steps",
            4,
            "--threads",
            1,
            capsys=capsys,
            say=("state.json", next(iter(change))),
        )
    plant(step, "state.json", to_json({k: v for k, v in sound.items() if k != "position"}))
    refused(
        "--resume",
        step,
        "--max_steps",
        4,
        "--threads",
        1,
        capsys=capsys,
        say=("state.json", "position"),
    )


def test_a_shape_beyond_the_file_takes_no_memory(run, capsys):
    from test_checkpoint import plant
    step = run / "step_000002"
    saved = checkpoint.read_json(step / "config.json")
    for part in ("args", "model"):
        huge = {**saved, part: {**saved[part], "n_layers": 10 ** 9}}
        plant(step, "config.json", to_json(huge))
        if part == "args":
            words = ("--resume", step, "--max_steps", 4, "--threads", 1)
            refused(*words, capsys=capsys, say=("cannot fit", "parameters"))
        else:
            with pytest.raises(UserError, match="does not fit"):
                checkpoint.load_model(step, "cpu", config.check_saved)
    for forged in (
        {**saved, "model": {**saved["model"], "args": {}}},
        {**saved, "model": []},
        {"args": saved["args"]},
    ):
        plant(step, "config.json", to_json(forged))
        with pytest.raises(UserError, match="config"):
            checkpoint.load_model(step, "cpu", config.check_saved)


def test_a_tokenizer_name_that_no_file_can_have(lab):
    """What the fuzzer found: the operating system refuses such a name, and that is no traceback
    either.
    """
    meta = checkpoint.read_json(lab.text / "meta.json")
    for name in ("x" * 5000, "a\0b", "../" * 3000):
        assert fuzz.attempt(lab, "meta", (to_json({**meta, "tokenizer": name}),)) == "refused"


# ---- what is not damaged, but cannot be meant ----------------------------------------------------

IMPOSSIBLE = [("seq_len", value) for value in (0, -1, 1, True, "x", None)]
IMPOSSIBLE += [
    ("batch_size", 0),
    ("batch_size", "x"),
    ("sample_steps", 0),
    ("sample_steps", -1),
    ("sample_steps", 1.5),
    ("train_block_sizes", "T,0"),
    ("train_block_sizes", ""),
    ("train_block_sizes", None),
    ("data_dir", 7),
]


@pytest.mark.parametrize("command", ["sample", "evaluate", "edge_benchmark"])
def test_settings_that_no_run_can_have(lab, capsys, tmp_path, command):
    """A config.json that somebody edited, with a manifest that fits it: one sentence that names the
    setting.
    """
    import edge_benchmark
    import evaluate
    import sample
    main = {"sample": sample, "evaluate": evaluate, "edge_benchmark": edge_benchmark}[command].main
    more = ("--out_json", tmp_path / "e.json") if command == "edge_benchmark" else ()
    sound = checkpoint.read_json(lab.step / "config.json")
    folder = tmp_path / "ckpt"
    shutil.copytree(lab.step, folder)
    for name, value in [
        *IMPOSSIBLE,
        *((name, "absent") for name in ("seq_len", "sample_steps", "data_dir")),
    ]:
        changed = {**sound["args"], name: value}
        if value == "absent":
            del changed[name]
        (folder / "config.json").write_bytes(to_json({**sound, "args": changed}))
        fuzz.vouched(folder, "config.json")
        capsys.readouterr()
        assert conftest.call(main, "--ckpt", folder, "--threads", 1, *more) == 2, (name, value)
        error = capsys.readouterr().err
        error = error[error.rfind("error:"):]
        assert name in error and "config.json" in error, error


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_a_manifest_that_never_ends(lab, tmp_path, kind):
    folder = tmp_path / "run" / "step_000002"
    shutil.copytree(lab.step, folder)
    manifest = folder / "MANIFEST.json"
    manifest.unlink()
    if kind == "pipe":
        os.mkfifo(manifest)
    elif kind == "device":
        manifest.symlink_to("/dev/zero")
    else:
        with open(manifest, "wb") as f:
            f.truncate(1 << 40)  # holes only: it takes no room
    (folder.parent / "latest").write_text("step_000002\n", encoding="utf-8")
    for path in (folder, folder.parent):
        with pytest.raises(UserError, match="MANIFEST.json"):
            checkpoint.load_model(path, "cpu", config.check_saved)


def test_a_pointer_and_a_listed_file_that_are_pipes(lab, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(lab.step, run / "step_000002")
    os.mkfifo(run / "latest")
    assert checkpoint.load(run).step == 2  # as if there were no pointer
    (run / "step_000002/state.json").unlink()
    os.mkfifo(run / "step_000002/state.json")
    with pytest.raises(UserError, match="state.json"):
        checkpoint.load(run)
