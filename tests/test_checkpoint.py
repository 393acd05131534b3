"""Properties of checkpoint.py: killed or failing anywhere, damaged anyhow, named anyhow, it gives a
whole state or a sentence. Children are forked from this warm process; nothing here takes longer
than a few seconds.
"""
import errno
import json
import os
import random
import resource
import shutil
import signal
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save as safetensors_bytes
from tiny import scratch

import checkpoint as ck
from common.console import UserError
from common.files import rename, replace_file, to_json
from conftest import trap
from stress.faults import points

PARTS = ("model", "ema", "optimizer")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Forked children must not wait for the threads of their parent; and no test here can tell a
    real fsync (each takes milliseconds) from none: what they check is where it is called."""
    threads, fsync = torch.get_num_threads(), os.fsync
    torch.set_num_threads(1)
    os.fsync = os.fstat
    yield
    os.fsync = fsync
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ram():
    """The tests that try every operation copy thousands of files."""
    with scratch() as folder:
        yield Path(folder)


def put(run, step, value=None, **more):
    value = float(step if value is None else value)
    w = torch.full((3, 5), value)
    return ck.save(
        run,
        step,
        model_state={"embed.weight": w, "head.weight": w, "norm.weight": torch.ones(5)},
        ema_state={"embed.weight": w + 1},
        optimizer_state={"adamw.w.exp_avg": w + 2, "adamw.w.step": w[0, 0]},
        state={"value": value},
        config={"lr": 3e-4, "name": "हिन्दी"},
        tokenizer_bytes=b"pieces" * 9,
        **more,
    )


def value_of(path):
    saved = ck.load(path, parts=PARTS)
    assert torch.all(saved.model["embed.weight"] == saved.state["value"])
    assert torch.all(saved.ema["embed.weight"] == saved.state["value"] + 1)
    assert saved.optimizer is None or torch.all(
        saved.optimizer["adamw.w.exp_avg"] == saved.state["value"] + 2
    )
    return saved.step, saved.state["value"]


def leftovers(run):
    return [p.name for p in run.iterdir() if p.name.startswith((".tmp", ".trash", ".old"))]


# ----------------------------------------------------------------------------------------------
# every I/O operation

# the first replaces a step that exists
SAVES = [(10, 11, {}), (20, 20, {"best": True}), (30, 30, {})]
KEEP = {"keep_last": 2, "keep_full": 1}


@pytest.fixture(scope="module")
def template(ram):
    """A run with steps 5 and 10, and how many operations SAVES takes on it."""
    run, ops = ram / "run", []
    put(run, 5, best=True)
    put(run, 10)
    copy = shutil.copytree(run, run.with_name("dry"))
    with points(lambda *op: ops.append(op), ram):
        for step, value, more in SAVES:
            put(copy, step, value, **more, **KEEP)
    assert not leftovers(copy) and list(ck.list_steps(copy)) == [20, 30]
    return run, ops


def test_killed_before_every_operation(template, ram, capfd):
    source, ops = template
    history = [(10, 10.0)] + [(step, float(value)) for step, value, _ in SAVES]
    seen = set()
    assert len(ops) > 100
    for k in range(len(ops)):
        run, (read, write), left = ram / str(k), os.pipe(), [k]

        def die(*_, left=left):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
        shutil.copytree(source, run)
        pid = os.fork()
        if pid == 0:
            with points(die, ram):
                for step, value, more in SAVES:
                    put(run, step, value, **more, **KEEP)
                    os.write(write, b".")
            os._exit(0)
        os.close(write)
        done = len(os.read(read, 99))
        while more := os.read(read, 99):
            done += len(more)
        os.close(read)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        found = value_of(run)                         # a reader needs no clean-up by a writer
        assert found in history[done:done + 2], (k, ops[k], found)
        seen.add((done, found == history[done]))
        assert value_of(run / "best")[0] in (5, 20)
        for folder in ck.list_steps(run).values():
            ck.verify(folder)                         # whatever bears a step's name is whole
        put(run, 50, **KEEP)                          # and the next save works
        assert value_of(run) == (50, 50.0) and not leftovers(run)
        shutil.rmtree(run)
    assert len(seen) == 2 * len(SAVES)                # both outcomes of each save were met
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_every_operation_fails_once(template, ram, code, capfd):
    source, ops = template
    for k in range(len(ops)) if code == errno.ENOSPC else range(code % 3, len(ops), 3):
        run, left = shutil.copytree(source, ram / str(k)), [k]

        def fail(name, *_, left=left):
            left[0] -= 1
            if left[0] == -1:
                if name.endswith("tensor file"):
                    raise SafetensorError(
                        f"Error while serializing: I/O error: no luck (os error {code})"
                    )
                raise OSError(code, os.strerror(code))
        before = value_of(run)
        with points(fail, ram):
            for step, value, more in SAVES:
                try:
                    put(run, step, value, **more, **KEEP)
                except OSError as error:
                    assert error.errno == code
                    assert value_of(run) in (before, (step, value)), ops[k]
                    assert not [name for name in leftovers(run) if name.startswith(".tmp-step")], (
                        ops[k]
                    )
                    put(run, step, value, **more, **KEEP)  # one retry
                before = value_of(run)
                assert before == (step, value)
        assert left[0] < 0
        ck.sweep(run)
        assert not leftovers(run) and ck.load(run / "best").step == 20
        shutil.rmtree(run)


def test_everything_is_synced_before_it_is_published(tmp_path):
    log = []

    def note(name, *args):
        if name == "fsync":
            args = (os.readlink(f"/proc/self/fd/{args[0]}"),)
        log.append((name, *(os.path.basename(str(a)) for a in args)))
    with points(note, tmp_path):
        put(tmp_path / "run", 7, best=True)
    temp = f".tmp-step_000007-{os.getpid()}"
    published = log.index(("replace", temp, "step_000007"))
    files = os.listdir(tmp_path / "run" / "step_000007")
    assert {name for op, name, *_ in log[:published] if op == "fsync"} == {*files, temp}
    assert log[published - 1] == ("fsync", temp)  # the folder, after all that lies in it
    written = [
        name for op, name, *_ in log[:published] if op == "open" or op.endswith("tensor file")
    ]
    assert written[-1] == "MANIFEST.json"
    twin = f".tmp-latest-{os.getpid()}"
    between = log[published:log.index(("replace", twin, "latest"))]
    assert ("fsync", "run") in between and ("fsync", twin) in between


def test_a_disk_that_really_refuses(tmp_path):
    """The library's own error, not ours: a file size limit in a child."""
    put(tmp_path, 1)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        try:
            ck.save(
                tmp_path,
                2,
                model_state={"w": torch.zeros(100_000)},
                state={},
                config={},
                tokenizer_bytes=b"",
            )
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.EFBIG
    assert value_of(tmp_path) == (1, 1.0) and not leftovers(tmp_path)


# ----------------------------------------------------------------------------------------------
# damage

@pytest.fixture
def pair(tmp_path):
    run = tmp_path / "run"
    put(run, 10)
    return run, put(run, 20)


def check_damage(run, folder, name, capsys):
    with pytest.raises(ck.Damage, match=name.replace(".", r"\.")):
        ck.load(folder)                               # named itself: refused
    capsys.readouterr()
    assert ck.load(run).step == 10                    # meant as latest: the one before, loudly
    assert name in capsys.readouterr().err
    assert ck.load(run / "last.ckpt").path.name == "step_000010"


def test_flipped_bits(pair, capsys):
    run, folder = pair
    rng = random.Random(0)
    names = sorted(os.listdir(folder))
    for i in range(100):
        path = folder / names[i % len(names)]
        whole = path.read_bytes()
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        check_damage(run, folder, path.name, capsys)
        path.write_bytes(whole)
    assert ck.load(run).step == 20


def test_truncated_zeroed_and_replaced_files(pair, capsys):
    run, folder = pair
    rng = random.Random(1)
    names = sorted(os.listdir(folder))
    assert len(names) == 7
    for i in range(42):
        path = folder / names[i % 7]
        whole = path.read_bytes()
        cut = rng.randrange(len(whole))
        path.write_bytes(whole[:cut] + (b"" if i < 21 else bytes(len(whole) - cut)))
        check_damage(run, folder, path.name, capsys)
        path.write_bytes(whole)
    # those two are equal in both steps
    for name in set(names) - {"config.json", "tokenizer.model"}:
        whole = (folder / name).read_bytes()
        shutil.copy(run / "step_000010" / name, folder / name)
        check_damage(run, folder, name, capsys)
        (folder / name).write_bytes(whole)
    for name in names:
        (folder / name).rename(run / "aside")
        check_damage(run, folder, name, capsys)
        (run / "aside").rename(folder / name)
    for name in ("pytorch_model.bin", "optimizer.safetensors.1", ".hidden"):
        (folder / name).write_bytes(b"x")
        check_damage(run, folder, name, capsys)
        (folder / name).unlink()
    (folder / ".DS_Store").write_bytes(b"x")          # harmless and common
    assert ck.load(run).step == 20
    shutil.rmtree(folder)
    shutil.copytree(run / "step_000010", folder)      # a whole checkpoint under another's name
    check_damage(run, folder, "MANIFEST.json", capsys)


def test_damage_is_said_in_words(pair):
    """Which file, and how it differs: no dictionary."""
    _, folder = pair
    path = folder / "config.json"
    whole = path.read_bytes()
    for data, words in (
        (whole + b" ", f"it has {len(whole) + 1:,} bytes instead of {len(whole):,}"),
        (whole[:-1] + b"#", "its bytes have changed"),
    ):
        path.write_bytes(data)
        with pytest.raises(ck.Damage, match=r"config\.json is not what was saved: ") as caught:
            ck.verify(folder)
        assert words in str(caught.value) and "{" not in str(caught.value)


def test_quarantine_keeps_the_broken_one(pair, capsys):
    run, folder = pair
    (folder / "model.safetensors").write_bytes(b"")
    assert ck.load(run, quarantine=True).step == 10
    corrupt = [p for p in run.iterdir() if p.name.startswith(".corrupt-step_000020")]
    assert len(corrupt) == 1 and len(os.listdir(corrupt[0])) == 7
    assert ck.load(run, quarantine=True).step == 10 and "step_000020" in capsys.readouterr().err
    put(run, 20, 21)
    assert value_of(run) == (20, 21.0) and corrupt[0].exists()
    for s in (10, 20):
        (run / ck.step_name(s) / "MANIFEST.json").unlink()
    with pytest.raises(UserError, match="no usable checkpoint"):
        ck.load(run)


def reseal(folder, change):
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    change(manifest)
    (folder / "MANIFEST.json").write_bytes(to_json(ck.seal(manifest)))


def plant(folder, name, data):
    """A file with a correct entry in the manifest: what a forger would do."""
    (folder / name).write_bytes(data)
    reseal(
        folder,
        lambda m: m["files"].update(
            {name: {"size": len(data), "sha256": ck.file_sha256(folder / name)}}
        ),
    )


def header(entries, data=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_forged_tensor_files(pair):
    run, folder = pair
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for data in (
        safetensors_bytes({"w": torch.tensor([1.0, float("nan")])}),
        safetensors_bytes({"w": torch.tensor([float("inf")], dtype=torch.bfloat16)}),
        safetensors_bytes({"w": torch.zeros(0, 10**9)}),
        header({"w": {"dtype": "F32", "shape": [0, 10**18], "data_offsets": [0, 0]}}),
        header(
            {"w": {"dtype": "F32", "shape": [10**18], "data_offsets": [0, 4 * 10**18]}}, b"1234"
        ),
        header({"w": entry, "__metadata__": {"tied": '{"a": "nobody"}'}}, bytes(4)),
        header({"w": entry, "__metadata__": {"tied": "[1]"}}, bytes(4)),
        header({"w": entry, "__metadata__": {"tied": "[" * 100_000}}, bytes(4)),
        struct.pack("<Q", 100_000_000) + b"{" * 1000,
        struct.pack("<Q", 2**63) + b"{}",
        b"",
        b"PK\x03\x04",
    ):
        plant(folder, "model.safetensors", data)
        began = time.time()
        with pytest.raises(UserError, match=r"model\.safetensors"):
            ck.load(folder)
        assert time.time() - began < 2
    plant(folder, "model.safetensors", header({"w": entry}, bytes(4)))
    assert ck.load(folder).model["w"].item() == 0


def test_forged_json(pair):
    run, folder = pair
    for data in (
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": -Infinity}',
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b"[]",
        b"",
        b"\xff",
        b'{"a": ' * 50_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"format": "aria-checkpoint-2", "step": 21}',
    ):
        plant(folder, "state.json", data)
        with pytest.raises(ck.Damage, match=r"state\.json"):
            ck.load(folder)
    rng = random.Random(2)
    whole = (run / "step_000010" / "MANIFEST.json").read_bytes()
    odd = [
        None,
        True,
        -1,
        10**400,
        1.5,
        "",
        "../../x",
        [],
        {},
        [[]],
        {"size": 1},
        "step_000010",
        "\ud800",
    ]
    for _ in range(300):                              # only our error, whatever the manifest says
        manifest = json.loads(whole)
        place = rng.choice([manifest, manifest["files"], *manifest["files"].values()])
        key = rng.choice([*place, "new", "../x"])
        if rng.random() < 0.3:
            place.pop(key, None)
        else:
            place[key] = rng.choice(odd)
        (run / "step_000010" / "MANIFEST.json").write_text(json.dumps(ck.seal(manifest)))
        try:
            assert ck.load(run / "step_000010").step == 10
        except UserError:
            pass
    for other, said in (("aria-checkpoint-3", "aria-checkpoint-3"), ("aria-checkpoint-1", "older")):
        reseal(folder, lambda m, other=other: m.update(format=other))
        with pytest.raises(UserError, match=said) as caught:
            ck.load(run)  # of another Aria: that is no damage, so no silent fallback
        assert not isinstance(caught.value, ck.Damage)


def test_pickles_are_refused_and_never_run(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "run", 500)
    for name in (
        "latest.pt", "last.ckpt", "best.pt", "step_000500.pt", "model.pt", "step_000700",
        "last.safetensors",
    ):
        path = tmp_path / "run" / name
        path.write_bytes(trap(canary))
        with pytest.raises(UserError, match="is a file") as caught:
            ck.load(path)
        assert caught.value.code == 2
        path.unlink()
    for name in ("model.safetensors", "state.json", "config.json", "MANIFEST.json"):
        shutil.copytree("run/step_000500", "forged")
        if name == "MANIFEST.json":
            Path("forged", name).write_bytes(trap(canary))
        else:
            plant(Path("forged"), name, trap(canary))
        with pytest.raises(UserError):
            ck.load("forged", parts=PARTS)
        shutil.rmtree("forged")
    for pointer in ("latest", "best"):
        (tmp_path / "run" / pointer).write_bytes(trap(canary))
    assert ck.load("run").step == 500 and ck.load("run/latest").step == 500
    with pytest.raises(UserError):
        ck.load("run/best")
    assert not canary.exists()


# ----------------------------------------------------------------------------------------------
# names

@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run, steps in (("checkpoints/old", (500, 7000)), ("checkpoints/day1", (500, 1000, 5000))):
        for step in steps:
            put(run, step, best=step in (500, 1000))
    os.makedirs("checkpoints/empty")
    os.makedirs("nothing")
    return tmp_path


TABLE = {
    "checkpoints/day1/step_000500": "day1/step_000500",
    "checkpoints/day1/step_000500/": "day1/step_000500",
    "checkpoints/day1": "day1/step_005000",
    "checkpoints/day1/": "day1/step_005000",
    "checkpoints/day1/latest": "day1/step_005000",
    "checkpoints/day1/latest.pt": "day1/step_005000",
    "checkpoints/day1/last.pt": "day1/step_005000",
    "checkpoints/day1/last.ckpt": "day1/step_005000",
    "checkpoints/day1/last": "day1/step_005000",
    "checkpoints/old/latest.pt": "old/step_007000",
    "checkpoints/day1/best": "day1/step_001000",
    "checkpoints/day1/best.pt": "day1/step_001000",
    "checkpoints/day1/best-base.ckpt": "day1/step_001000",
    "checkpoints/day1/step_000500.pt": "day1/step_000500",
    "checkpoints/day1/step500.pt": "day1/step_000500",
    "checkpoints/day1/step=500.ckpt": "day1/step_000500",
    "checkpoints/day1/step_500": "day1/step_000500",
    "checkpoints/old/step_500.pt": "old/step_000500",
    "checkpoints/day1/best-step=500.ckpt": "day1/step_000500",
    "checkpoints/sunfish-epoch=00-step=5000.ckpt": "day1/step_005000",
    "checkpoints/last.ckpt": "day1/step_005000",
    "checkpoints/latest.pt": "day1/step_005000",
    "checkpoints/best-base.ckpt": "day1/step_001000",
    "checkpoints/step_000500.pt": "day1/step_000500",
    "checkpoints/step_007000.pt": "old/step_007000",
    "checkpoints/sunfish-epoch=00-step=7000.ckpt": "old/step_007000",
}
REFUSED = [
    "checkpoints/day1/step_000501.pt",
    "checkpoints/step_007001.pt",
    "checkpoints/day1/model.pt",
    "checkpoints",
    "checkpoints/empty",
    "checkpoints/empty/last.ckpt",
    "nothing/last.ckpt",
    "nowhere/last.ckpt",
    "last.ckpt",
    "",
    "checkpoints/day1/timestep500.pt",
    "checkpoints/day1/lastly.pt",
    "checkpoints/day1/x\0y",
    "x" * 5000,
    "checkpoints/day1/LOCK",
    "checkpoints/day1/step_000500/model.safetensors",
]


def test_every_spelling(runs, capsys):
    for typed, want in TABLE.items():
        assert ck.load(typed).path.as_posix() == f"checkpoints/{want}"
        out, err = capsys.readouterr()
        assert out == "" and err == ("" if "step_000500" == typed.strip("/").split("/")[-1] else
                                     f"checkpoint: {typed} -> checkpoints/{want}\n")
    for typed in REFUSED:
        with pytest.raises(UserError):
            ck.load(typed)
    with pytest.raises(
        UserError, match="checkpoints/day1/step_001000, checkpoints/day1/step_005000"
    ):
        ck.load("checkpoints/day1/step_000501.pt")
    # a checkpoint is whole under any name
    shutil.copytree("checkpoints/day1/step_000500", "my model")
    assert ck.load("my model").step == 500
    put("checkpoints/old", 7001)                      # now the newest run
    assert ck.load("checkpoints/last.ckpt").path.as_posix() == "checkpoints/old/step_007001"


def test_a_resume_does_not_choose_between_runs(runs):
    """It writes into the run: only `last` means the newest of several, any other name has to fit
    one run alone.
    """
    def resumed(typed):
        return ck.candidates(typed, guess=False)[0].as_posix()

    assert (
        resumed("checkpoints/last.ckpt")
        == resumed("checkpoints/latest.pt")
        == "checkpoints/day1/step_005000"
    )
    assert resumed("checkpoints/sunfish-epoch=00-step=7000.ckpt") == "checkpoints/old/step_007000"
    assert resumed("checkpoints/day1/best-base.ckpt") == "checkpoints/day1/step_001000"
    for typed in (
        "checkpoints/best-base.ckpt", "checkpoints/best.ckpt", "checkpoints/step_000500.pt",
    ):
        with pytest.raises(
            UserError, match=r"there is no checkpoint .*day1/step_005000.*old/step_000500"
        ):
            resumed(typed)
    shutil.rmtree("checkpoints/old")
    assert resumed("checkpoints/best.ckpt") == "checkpoints/day1/step_001000"
    with pytest.raises(UserError, match="there are: checkpoints/day1/step_000500"):
        resumed("checkpoints/best-base.ckpt")


@pytest.mark.parametrize("when", ["open", "listdir", "read_bytes"])
def test_a_reader_whose_checkpoint_is_pruned_reads_the_newer_one(tmp_path, monkeypatch, when):
    """A training saves and prunes between any two operations of a reader."""
    put(tmp_path, 1, keep_last=1)
    real, left = ck.verify, [1]

    def prune():
        if left and left.pop():
            put(tmp_path, 2, keep_last=1)

    def verify(folder):
        if when == "open":
            prune()
        manifest = real(folder)
        if when == "read_bytes":
            prune()
        return manifest
    monkeypatch.setattr(ck, "verify", verify)
    if when == "listdir":
        listdir = os.listdir
        monkeypatch.setattr(os, "listdir", lambda *a: prune() or listdir(*a))
    assert ck.load(tmp_path, parts=PARTS).step == 2


def test_a_link_in_the_way_is_removed_and_what_it_names_stays(tmp_path):
    """Names that a killed writer leaves, as links: the run starts, and only the links go."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("x")
    put(tmp_path / "run", 5)
    for name in (".trash-x-1", ".tmp-x-1", ".old-step_000005"):
        (tmp_path / "run" / name).symlink_to(mine)
    with ck.run_lock(tmp_path / "run"):
        assert (
            not leftovers(tmp_path / "run")
            and (mine / "file").exists()
            and value_of(tmp_path / "run")[0] == 5
        )


def test_best_is_named_before_latest(tmp_path, monkeypatch):
    """A kill between them: the resume saves that step again, and as the best again. The other way
    round, never.
    """
    put(tmp_path, 1, best=True)
    real = replace_file

    def killed(path, data, run):
        if path.name == "latest":
            raise KeyboardInterrupt
        real(path, data, run)
    monkeypatch.setattr(ck, "replace_file", killed)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path, 2, best=True)
    assert ck.read_pointer(tmp_path, "best")[0] == 2 and ck.read_pointer(tmp_path, "latest")[0] == 1


def test_a_file_that_shrinks_as_it_is_published_is_no_checkpoint(tmp_path, monkeypatch):
    """Some network file systems lose the end of a file: the sizes are looked at once more under the
    final name.
    """
    put(tmp_path, 1)
    real = rename

    def lossy(source, target):
        real(source, target)
        if target.name == "step_000002":
            os.truncate(target / "model.safetensors", 9)
    monkeypatch.setattr(ck, "rename", lossy)
    with pytest.raises(OSError, match="another size"):
        put(tmp_path, 2)
    assert (
        list(ck.list_steps(tmp_path)) == [1]
        and value_of(tmp_path)[0] == 1
        and not leftovers(tmp_path)
    )


def test_pointers_that_are_gone_or_stale(runs, capsys):
    os.unlink("checkpoints/day1/latest")
    assert (
        ck.load("checkpoints/day1").step == 5000 and "latest is missing" in capsys.readouterr().err
    )
    for text in ("", "step_9", "../old/step_000500\n", "step_000500/../../x", "\udcff"):
        with open("checkpoints/day1/latest", "w", errors="surrogateescape") as f:
            f.write(text)
        assert ck.load("checkpoints/day1/last.pt").step == 5000
    put("checkpoints/day1", 0)  # a run that was started again: latest decides, not the number
    assert ck.load("checkpoints/day1").step == 0
    (runs / "checkpoints/day1/step_001000/MANIFEST.json").unlink()
    put("checkpoints/day1", 1000)
    put("checkpoints/day1", 1001)
    shutil.rmtree("checkpoints/day1/step_001001")
    assert ck.load("checkpoints/day1").step == 1000   # the one before it, although 5000 is there


# ----------------------------------------------------------------------------------------------
# saving and keeping

def test_what_is_kept(tmp_path):
    for step in range(1, 8):
        put(tmp_path, step, best=step == 2, keep_last=3, keep_full=2)
    assert list(ck.list_steps(tmp_path)) == [2, 5, 6, 7]
    full = [
        s
        for s, folder in ck.list_steps(tmp_path).items()
        if (folder / "optimizer.safetensors").exists()
    ]
    assert full == [6, 7]
    for folder in ck.list_steps(tmp_path).values():
        ck.verify(folder)
    assert ck.load(tmp_path / "step_000005", parts=PARTS).optimizer is None
    (tmp_path / "step_000005" / "optimizer.safetensors").write_bytes(
        b"from a kill between the manifest and the file"
    )
    assert ck.load(tmp_path / "step_000005", parts=PARTS).optimizer is None
    put(tmp_path, 3, keep_last=2)  # rewound: what was just saved stays, and counts as the newest
    assert list(ck.list_steps(tmp_path)) == [2, 3] and value_of(tmp_path)[0] == 3
    for step in range(10, 14):
        put(tmp_path, step, keep_full=0)
    assert len(ck.list_steps(tmp_path)) == 6 and not list(tmp_path.glob("*/optimizer.safetensors"))


def test_tied_shared_and_unusual_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    model = {
        "a": base,
        "tied": base,
        "row": base[1],
        "t": base.T,
        "i": torch.tensor(3),
        "h": base.bfloat16(),
        "b": torch.tensor([True]),
        "param": torch.nn.Parameter(base * 2),
    }
    folder = ck.save(tmp_path, 1, model_state=model, state={}, config={}, tokenizer_bytes=b"")
    saved = ck.load(tmp_path).model
    assert saved.keys() == model.keys()
    assert all(torch.equal(saved[k], v) and saved[k].dtype == v.dtype for k, v in model.items())
    assert saved["a"] is saved["tied"]
    alone = ck.save(
        tmp_path,
        2,
        model_state={k: v for k, v in model.items() if k != "tied"},
        state={},
        config={},
        tokenizer_bytes=b"",
    )
    sizes = [(f / "model.safetensors").stat().st_size for f in (folder, alone)]
    assert sizes[0] - sizes[1] < base.nbytes
    saved["a"].zero_()                                # no map of the file
    ck.verify(folder)


def test_what_must_not_be_saved(tmp_path):
    put(tmp_path, 1)
    before = sorted(os.listdir(tmp_path))
    good = {"state": {}, "config": {}, "tokenizer_bytes": b""}
    nan = {"w": torch.tensor([0.0, float("nan")])}
    for parts in (
        {"model_state": nan},
        {"model_state": {"w": torch.ones(1)}, "optimizer_state": nan},
        {"model_state": {"w": torch.full((2,), -torch.inf, dtype=torch.bfloat16)}},
    ):
        with pytest.raises(FloatingPointError, match="w holds NaN"):
            ck.save(tmp_path, 2, **parts, **good)
    for model in ({}, {"_orig_mod.w": torch.ones(1)}, {"w": torch.ones(0)}):
        with pytest.raises(AssertionError):
            ck.save(tmp_path, 2, model_state=model, **good)
    with pytest.raises(ValueError):
        ck.save(
            tmp_path,
            2,
            model_state={"w": torch.ones(1)},
            **{**good, "state": {"best": float("inf")}},
        )
    assert sorted(os.listdir(tmp_path)) == before and value_of(tmp_path) == (1, 1.0)


def test_the_umask_decides_who_may_read(tmp_path):
    for mask in (0o022, 0o077):
        old = os.umask(mask)
        try:
            folder = put(tmp_path, mask)
        finally:
            os.umask(old)
        assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o666 & ~mask}


def test_load_into_is_strict():
    model = torch.nn.Linear(3, 2)
    good = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    ck.load_into(model, good)
    assert model.weight.sum() == 6
    for tensors, text in (
        ({**good, "bias": torch.zeros(3)}, r"bias is \(3,\) there and \(2,\) here"),
        ({"weight": good["weight"]}, "bias is missing there"),
        ({**good, "x": good["bias"]}, "x is .* missing here"),
    ):
        with pytest.raises(UserError, match=text):
            ck.load_into(model, tensors)


# ---------------------------------------------------------------------------------------------- one
# writer

def test_the_second_trainer_is_refused(tmp_path):
    ready, pid = os.pipe(), os.fork()
    if pid == 0:
        with ck.run_lock(tmp_path / "run"):
            os.write(ready[1], b".")
            time.sleep(60)
        os._exit(0)
    os.read(ready[0], 1)
    began = time.time()
    with pytest.raises(UserError, match=f"process {pid} ") as caught, ck.run_lock(tmp_path / "run"):
        raise AssertionError
    assert caught.value.code == 2 and time.time() - began < 2
    with ck.run_lock(tmp_path / "other"):
        pass
    os.kill(pid, signal.SIGKILL)                      # the lock dies with its holder
    os.waitpid(pid, 0)
    (tmp_path / "run" / ".tmp-step_000009-1").mkdir()
    for _ in range(2):
        with ck.run_lock(tmp_path / "run"):
            assert (tmp_path / "run" / "LOCK").read_text() == str(os.getpid()) and not leftovers(
                tmp_path / "run"
            )
    for end in ready:
        os.close(end)
