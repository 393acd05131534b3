"""Properties of text/dataset.py: nothing is guessed at opening; windows are a pure, complete
function of a counter.
"""
import hashlib
import json
import random
import time

import numpy as np
import pytest

from common.console import UserError
from common.files import sealed, write_json
from text import dataset
from text.dataset import TokenData, Windows, permute


def write_data(folder, train, val=None, vocab=500, **changes):
    """A prepared folder by hand."""
    folder.mkdir(exist_ok=True)
    dtype = dataset.token_dtype(vocab)
    meta = dict(
        version=1,
        vocab_size=vocab,
        mask_token_id=vocab,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        dtype=dtype.name,
        tokenizer="tokenizer.model",
        tokenizer_sha256="0" * 64,
        normaliser="v1",
        source="files",
        scripts={},
        sources=[],
        settings_sha256="1" * 64,
        seed=1,
    )
    for split, ids in (("train", train), ("val", train if val is None else val)):
        raw = np.asarray(ids).astype(dtype).tobytes()
        (folder / f"{split}.bin").write_bytes(raw)
        meta |= {f"{split}_tokens": len(ids), f"{split}_docs": 1, f"{split}_bytes": 5 * len(ids),
                 f"{split}_sha256": hashlib.sha256(raw).hexdigest()}
    meta |= changes
    (folder / "meta.json").write_text(
        json.dumps({k: v for k, v in meta.items() if v is not None}), encoding="utf-8"
    )
    return folder


@pytest.fixture
def data(tmp_path):
    return TokenData(write_data(tmp_path / "d", np.arange(4, 404) % 496 + 4))


# ---- opening

def test_reads_what_was_written(tmp_path):
    for vocab in (500, 65535, 65536, 100_000):
        ids = np.random.default_rng(0).integers(4, vocab, 1000)
        ids[0] = vocab - 1
        folder = write_data(tmp_path / str(vocab), ids, ids[:10], vocab)
        for split, wanted in (("train", ids), ("val", ids[:10])):
            found = TokenData(folder, split, verify=True)
            assert found.tokens.tolist() == wanted.tolist() and len(found) == len(wanted)
            assert not found.tokens.flags.writeable and found.dtype.itemsize == (
                2 if vocab < 65536 else 4
            )


@pytest.mark.parametrize("key", list(dataset.KEYS))
def test_each_key_is_required_and_typed(tmp_path, key):
    for value, why in (
        (None, f"no '{key}'"),
        ([1], key),
        (True, key),
        (-1, key),
        (1e3, key),
        ("x" * 5, key),
    ):
        if type(value) is dataset.KEYS[key] and key != "dtype" and key != "normaliser":
            continue                                                # a right type
        with pytest.raises(UserError, match=why):
            TokenData(write_data(tmp_path / "d", range(4, 50), **{key: value}))


@pytest.mark.parametrize(
    "change, numbers",
    [
        (dict(train_tokens=47), ("92", "47", "94")),
        (dict(vocab_size=40, mask_token_id=40), ("49", "40")),
        (dict(vocab_size=49, mask_token_id=49), ("the mask", "49")),
        (dict(mask_token_id=501), ("501", "500")),
        (dict(dtype="uint32"), ("uint32", "uint16")),
        (dict(version=2), ("2", "1")),
        (dict(normaliser="v0"), ("v0", "v1")),
        (dict(vocab_size=70000, mask_token_id=70000), ("uint16", "uint32")),
        (dict(eos_id=500), ("500",)),
        (dict(vocab_size=70000, mask_token_id=70000, dtype="uint32"), ("92", "184")),
        (dict(eos_id=2), ("2, 2",)),
        (dict(train_tokens=2**70), ("train_tokens",)),
    ],
)
def test_contradictions_name_both_numbers_and_the_fix(tmp_path, change, numbers):
    with pytest.raises(UserError) as caught:
        TokenData(write_data(tmp_path / "d", range(4, 50), **change))
    assert all(number in str(caught.value) for number in numbers) and "python -m prepare" in str(
        caught.value
    )
    assert caught.value.code == 2


def test_damaged_files(tmp_path):
    folder = write_data(tmp_path / "d", range(4, 50))
    raw = (folder / "train.bin").read_bytes()
    for bad in (raw[:-2], raw[:-1], raw + b"\0\0", b"", raw * 2):
        (folder / "train.bin").write_bytes(bad)
        with pytest.raises(UserError, match=f"{len(bad)} bytes.*92 bytes"):
            TokenData(folder)
    # same size, valid ids: only the hash can tell
    (folder / "train.bin").write_bytes(raw[:-2] + b"\x05\x00")
    TokenData(folder, verify=False)
    for verify in (None, True):
        with pytest.raises(UserError, match="sha256"):
            TokenData(folder, verify=verify)
    (folder / "train.bin").unlink()
    with pytest.raises(UserError, match="train.bin"):
        TokenData(folder)
    for text in (
        "",
        "[]",
        "{",
        "null",
        '{"version": NaN}',
        "[" * 100_000,
        '{"version":1,"version":1}',
    ):
        (folder / "meta.json").write_text(text)
        with pytest.raises(UserError, match="meta.json"):
            TokenData(folder)
    with pytest.raises(UserError, match="python -m prepare"):
        TokenData(tmp_path / "nowhere")


def test_empty_split(tmp_path):
    folder = write_data(tmp_path / "d", range(4, 50), [])
    assert len(TokenData(folder)) == 46
    with pytest.raises(UserError, match="0 tokens"):
        TokenData(folder, "val")


def test_mutated_folders_only_raise_user_errors(tmp_path):
    folder, rnd = write_data(tmp_path / "d", range(4, 50)), random.Random(7)
    whole = {name: (folder / name).read_bytes() for name in ("meta.json", "train.bin")}
    refused = 0
    for _ in range(500):
        name = rnd.choice(list(whole))
        bad = bytearray(whole[name])
        for _ in range(rnd.randint(1, 4)):
            at = rnd.randrange(len(bad))
            bad[at : at + rnd.randint(0, 2)] = rnd.choice(
                [b"", b"9", b"-", b'"', b"\xff", b"\0", b"[", b"e5"]
            )
        (folder / name).write_bytes(bad)
        try:
            TokenData(folder).val_windows(2, 8)
        except UserError:
            refused += 1
        (folder / name).write_bytes(whole[name])
    assert refused > 400


def test_big_files_are_checked_as_they_are_read(tmp_path, monkeypatch):
    folder = write_data(tmp_path / "d", [*range(4, 400), 500, 5, 5, 5])
    with pytest.raises(UserError, match="the id 500, the mask"):
        TokenData(folder)
    monkeypatch.setattr(dataset, "SCAN_BYTES", 100)
    late = Windows(TokenData(folder), 10, seed=1)
    with pytest.raises(UserError, match="the id 500, the mask"):
        late.batch(0, late.per_epoch)


def test_a_changed_meta_is_refused(tmp_path):
    """Whatever bit of a sealed meta.json flips, it is refused, be it a figure that nothing else
    could check.
    """
    folder = write_data(tmp_path / "d", range(4, 50))
    path = folder / "meta.json"
    write_json(
        path, sealed({**json.loads(path.read_bytes()), "flags": "--source files --input 'क ख'"})
    )
    assert TokenData(folder).meta["val_bytes"] == 230
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"val_bytes": 230', b'"val_bytes": 232'))
    with pytest.raises(
        UserError, match="meta.json was changed after it was written.*python -m prepare"
    ):
        TokenData(folder)
    rnd, accepted = random.Random(3), []
    for at in range(0, len(whole), 3):
        bad = bytearray(whole)
        bad[at] ^= 1 << rnd.randrange(8)
        path.write_bytes(bad)
        try:
            if TokenData(folder, verify=False).meta != json.loads(whole):
                accepted.append(at)
        except UserError:
            pass
    assert not accepted


def test_tokenizer_path_needs_the_right_hash(tmp_path):
    folder = write_data(tmp_path / "d", range(4, 50), tokenizer="gone/t.model",
                        tokenizer_sha256=hashlib.sha256(b"right").hexdigest())
    with pytest.raises(UserError, match="missing"):
        TokenData(folder).tokenizer_path  # noqa: B018
    (folder / "t.model").write_bytes(b"wrong")
    with pytest.raises(UserError, match=hashlib.sha256(b"wrong").hexdigest()[:12]):
        TokenData(folder).tokenizer_path  # noqa: B018
    (folder / "t.model").write_bytes(b"right")  # the folder may move, if the tokenizer moves along
    assert TokenData(folder).tokenizer_path == folder / "t.model"


# ---- windows

@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097])
def test_permutation_is_a_bijection_and_depends_on_the_key(n):
    seen = set()
    for key in range(8):
        order = permute(np.arange(n), n, np.full(n, key, np.uint64))
        assert sorted(order.tolist()) == list(range(n))
        seen.add(tuple(order.tolist()))
    assert len(seen) > (1 if n == 2 else 4) or n == 1


def test_permutation_looks_random():
    """No fixed stride, no drift: neighbours in time are far apart, and positions are even over many
    keys.
    """
    n = 1000
    order = permute(np.arange(n), n, np.full(n, 99, np.uint64)).astype(int)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.1
    assert np.abs(np.diff(order)).mean() == pytest.approx(n / 3, rel=0.1)
    assert len(set(np.diff(order).tolist())) > n / 2
    first = permute(np.zeros(20_000, int), 10, dataset.hashed(3, np.arange(20_000)))
    counts = np.bincount(first.astype(int), minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 30  # chi-square, 9 degrees: p about 0.0004


@pytest.mark.parametrize(
    "size, seq_len", [(400, 7), (400, 8), (400, 400), (399, 200), (8, 8), (9, 8)]
)
def test_each_epoch_visits_disjoint_windows_once(tmp_path, size, seq_len):
    # every token is its own position
    data = TokenData(write_data(tmp_path / "d", np.arange(size) + 4))
    windows = Windows(data, seq_len, seed=5)
    assert windows.per_epoch == size // seq_len
    for epoch in range(4):
        rows = windows.batch(epoch * windows.per_epoch, windows.per_epoch).numpy() - 4      # (B, T)
        # no token twice
        assert len(set(rows.ravel().tolist())) == rows.size == windows.per_epoch * seq_len
        assert ((rows[:, 1:] - rows[:, :-1]) % size == 1).all()  # contiguous, on a ring


def test_offset_and_order_change_with_epoch_and_seed(data):
    windows = Windows(data, 8, seed=5)
    n = windows.per_epoch
    starts = [tuple(windows.starts(epoch * n, n).tolist()) for epoch in range(20)]
    assert len(set(starts)) == 20 and len({s[0] % 8 for s in starts}) > 3
    assert starts[0] != tuple(Windows(data, 8, seed=6).starts(0, n).tolist())
    assert (
        Windows(data, 8, 2**63 - 1).batch(0, 2).tolist() != Windows(data, 8, 0).batch(0, 2).tolist()
    )


def test_what_an_epoch_leaves_out_moves_through_the_whole_text(data):
    """The rest that fills no window is another part of the text each time, and no part is left out
    more than others.
    """
    # 2 windows of 150 leave 100 of the 400 tokens out
    windows, epochs = Windows(data, 150, seed=5), 2000
    starts = windows.starts(0, epochs * windows.per_epoch).reshape(epochs, windows.per_epoch)
    read = np.zeros((epochs, len(data)), bool)
    for i in range(150):
        np.put_along_axis(read, (starts + i) % len(data), True, axis=1)
    assert (read.sum(1) == 300).all()
    left_out = 1 - read.mean(0)
    assert left_out == pytest.approx(np.full(len(data), 0.25), abs=0.05)


def test_batch_is_a_pure_function_of_the_counter(data):
    """Any cut of the counter gives the same windows, over three epochs: resume is exact."""
    windows = Windows(data, 7, seed=11)
    whole = windows.batch(0, 3 * windows.per_epoch + 5)             # (B, T)
    rnd, at, parts = random.Random(0), 0, []
    while at < len(whole):
        count = min(rnd.randint(1, 40), len(whole) - at)
        parts += Windows(data, 7, seed=11).batch(at, count).tolist()
        at += count
    assert parts == whole.tolist()
    assert (
        whole.dtype.is_signed and whole.element_size() == 8 and windows.batch(3, 0).shape == (0, 7)
    )


def test_a_billion_windows_cost_nothing():
    class Huge:  # 2e9 tokens that are never stored
        def __len__(self):
            return 2 * 10**9

        def need(self, seq_len):
            pass

    began = time.perf_counter()
    windows = Windows(Huge(), 2, seed=1)
    took = time.perf_counter() - began
    assert windows.per_epoch == 10**9 and took < 0.01
    starts = windows.starts(10**9 - 500, 1000)                      # over the end of an epoch
    assert len(set(starts[:500].tolist())) == 500 and starts.max() > 1.9e9 and starts.min() < 1e8


def test_text_shorter_than_a_window(data):
    for make in (lambda: Windows(data, 401, 1), lambda: data.val_windows(3, 401)):
        with pytest.raises(UserError, match="400 tokens.*401"):
            make()


@pytest.mark.parametrize(
    "n, seq_len", [(1, 8), (2, 8), (5, 8), (50, 8), (49, 8), (1000, 8), (3, 400), (3, 133)]
)
def test_val_windows_are_fixed_disjoint_and_spread(data, n, seq_len):
    rows = data.val_windows(n, seq_len)                             # (n, T)
    assert len(rows) == min(n, 400 // seq_len) and (rows == data.val_windows(n, seq_len)).all()
    starts = rows[:, 0].numpy() - rows[0, 0].item()
    assert len(set(rows.flatten().tolist())) == rows.numel()
    if len(starts) > 1:
        # first to last token, even steps
        assert starts[-1] == 400 - seq_len and np.ptp(np.diff(starts)) <= 1
