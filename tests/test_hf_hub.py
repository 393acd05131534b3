"""A model goes to the hub and comes back the same: the real package huggingface_hub against a local
server that speaks the hub's protocol.
"""
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import call, only_this_machine
from stand_in_models import models_hub

import checkpoint
import cli
import config
import evaluate
import sample
from common.console import Damage, UserError
from common.files import sealed, write_json
from hf import folder, hub, published

pytest.importorskip("huggingface_hub", reason="only a model on the hub needs it")
from huggingface_hub import constants  # noqa: E402

TOKEN = "hf_" + "secret" * 5
RUN = "checkpoints/eco_hybrid_hi"
NAME = "me/tiny-hindi"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Instead of conftest's: this machine may be connected to, and nothing else."""
    only_this_machine(monkeypatch)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The trained run as a folder for transformers."""
    made = tmp_path_factory.mktemp("exported") / "hindi"
    model, tokenizer, saved = checkpoint.load_model(trained / RUN, "cpu", config.check_saved)
    folder.write_folder(made, model, tokenizer, saved, "---\nlanguage: hi\n---\n# A card\n")
    return made


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The hub, and the package as its environment variables would set it up for it."""
    with models_hub(TOKEN, "me") as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # the package waits seconds between its tries
        sleep = time.sleep
        monkeypatch.setattr("time.sleep", lambda seconds: sleep(seconds / 100))
        yield found


def sentence(capsys, main, *words):
    """The one line in which a command ends -> (exit code, the line)."""
    capsys.readouterr()
    code = call(main, *words)
    shown = capsys.readouterr()
    assert TOKEN not in shown.out + shown.err
    return code, shown.err.strip().splitlines()[-1]


def text_of(capsys, ckpt):
    capsys.readouterr()
    words = ("--ckpt", ckpt, "--max_new_tokens", 12, "--threads", 1, "--precision", "fp32")
    assert call(sample.main, *words) == 0
    return capsys.readouterr().out


def test_a_model_goes_to_the_hub_and_comes_back_the_same(here, exported, server, capsys):
    commit = hub.push(exported, NAME)
    [(oid, files)] = server.repositories[NAME]
    assert oid == commit
    assert files == {path.name: path.read_bytes() for path in exported.iterdir()}

    # what comes back is what the run has, and no more than is needed came
    server.asked.clear()
    spelling = f"hf:{NAME}@{commit}"
    model, tokenizer, saved = checkpoint.load_model(spelling, "cpu", config.check_saved)
    asked = {line.rpartition("/")[2] for line in server.asked if "/resolve/" in line}
    assert asked == {"aria.json", "model.safetensors", "tokenizer.model"}
    assert saved.name == f"tiny-hindi@{commit}"
    right, own, run = checkpoint.load_model(RUN, "cpu", config.check_saved)
    assert saved.step == run.step and saved.config == run.config and own.sha256 == tokenizer.sha256
    theirs = model.state_dict()
    for name, tensor in right.state_dict().items():
        assert torch.equal(theirs[name], tensor), name

    # the commands; a local folder, too; the second time nothing is fetched
    server.asked.clear()
    assert text_of(capsys, spelling) == text_of(capsys, RUN) == text_of(capsys, exported)
    assert call(evaluate.main, "--ckpt", spelling, "--max_docs", 2, "--threads", 1) == 0
    assert not server.asked
    # main is looked up; without a network the copy is used
    assert text_of(capsys, f"hf:{NAME}") == text_of(capsys, RUN) and server.asked
    server.status = 503
    assert text_of(capsys, f"hf:{NAME}") == text_of(capsys, RUN)


def test_a_second_push_is_another_commit(exported, server):
    first = hub.push(exported, NAME)
    server.add(NAME, {"README.md": b"somebody's", "notes.txt": b"stay"})
    second = hub.push(exported, NAME)
    assert first != second
    files = dict(server.repositories[NAME])[second]
    assert files["notes.txt"] == b"stay" and files["README.md"] != b"somebody's"
    assert published.read_manifest(hub.fetched(f"hf:{NAME}"))["step"]


@pytest.mark.parametrize(
    "name, status, token, code, said",
    [
        ("me/none", None, TOKEN, 2, "the hub has no such model, or not for you"),
        (f"{NAME}@gone", None, TOKEN, 2, "there is no revision gone: name a branch"),
        ("me/other", None, TOKEN, 2, "there is no aria.json at main"),
        ("me/tiny", 500, TOKEN, 3, "HTTP status 500: try again later"),
        ("me/tiny", 429, TOKEN, 3, "HTTP status 429: try again later"),
        ("me/tiny", None, "नहीं", 2, "what is set as the token is none"),
        ("tiny", None, TOKEN, 2, "write hf:owner/name or hf:owner/name@revision"),
        ("a/../b", None, TOKEN, 2, "write hf:owner/name or hf:owner/name@revision"),
        ("me/tiny@../x", None, TOKEN, 2, "write hf:owner/name or hf:owner/name@revision"),
        ("me/tiny@", None, TOKEN, 2, "write hf:owner/name or hf:owner/name@revision"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(
    server, capsys, monkeypatch, name, status, token, code, said
):
    server.add(NAME, {"README.md": b""})
    server.add("me/other", {"README.md": b""})
    server.status = status
    monkeypatch.setenv("HF_TOKEN", token)
    found, line = sentence(capsys, sample.main, "--ckpt", f"hf:{name}")
    assert (found, line.count("error: hf:")) == (code, 1) and said in line, line
    assert token not in line


def test_a_hub_that_is_not_there_is_one_sentence(server, capsys, exported, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    template = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    code, line = sentence(capsys, sample.main, "--ckpt", f"hf:{NAME}")
    assert code == 3 and "the hub does not answer, and it was not fetched before" in line
    with pytest.raises(UserError, match="nothing was published") as error:
        hub.push(exported, NAME)
    assert error.value.code == 3
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, line = sentence(capsys, sample.main, "--ckpt", f"hf:{NAME}")
    assert code == 3 and "it was not fetched before" in line
    monkeypatch.setattr(hub, "huggingface_hub", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, line = sentence(capsys, sample.main, "--ckpt", f"hf:{NAME}")
    assert code == 3 and "the package huggingface_hub is needed" in line


@pytest.mark.parametrize("token, name", [("hf_wrong", NAME), (TOKEN, "others/tiny")])
def test_who_may_not_write_is_told_so(exported, server, monkeypatch, token, name):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match="does not let you write there: log in") as error:
        hub.push(exported, name)
    assert not server.repositories and token not in str(error.value)


def changed(files, name):
    """The same files, one with a bit flipped."""
    data = bytearray(files[name])
    data[len(data) // 2] ^= 1
    return files | {name: bytes(data)}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "aria.json"])
def test_what_is_not_what_was_written_is_not_used(exported, server, tmp_path, name):
    """On the hub, in the cache, in a local folder."""
    files = {path.name: path.read_bytes() for path in exported.iterdir()}
    server.add(NAME, changed(files, name))
    with pytest.raises(UserError, match=name):
        checkpoint.load_model(f"hf:{NAME}", "cpu", config.check_saved)
    fine = server.add(NAME, files)
    path = hub.fetched(f"hf:{NAME}@{fine}") / name
    path.resolve().write_bytes(changed(files, name)[name])
    with pytest.raises(UserError, match=name):
        hub.fetched(f"hf:{NAME}@{fine}")
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    (copy / name).write_bytes(changed(files, name)[name])
    with pytest.raises(UserError, match=name):
        checkpoint.load_model(copy, "cpu", config.check_saved)
    before = len(server.repositories[NAME])
    with pytest.raises(UserError, match=name):
        hub.push(copy, NAME)
    assert len(server.repositories[NAME]) == before


def test_a_list_of_files_that_leads_elsewhere_is_refused(exported, server, tmp_path):
    """Nothing is fetched by a name that another folder has."""
    manifest = json.loads((exported / "aria.json").read_text(encoding="utf-8"))
    for change in (
        {"files": manifest["files"] | {"../../evil": manifest["files"]["README.md"]}},
        {"files": {"README.md": manifest["files"]["README.md"]}},
    ):
        path = tmp_path / "aria.json"
        write_json(path, sealed(manifest | change))
        server.asked.clear()
        server.add(NAME, {"aria.json": path.read_bytes()})
        with pytest.raises(Damage, match="does not list the files of a model"):
            hub.fetched(f"hf:{NAME}")
        assert {Path(line).name for line in server.asked} == {"aria.json"}
    write_json(path, sealed(manifest | {"format": "aria-hf-1"}))
    server.add(NAME, {"aria.json": path.read_bytes()})
    with pytest.raises(UserError, match="has the format 'aria-hf-1'"):
        hub.fetched(f"hf:{NAME}")


@pytest.mark.parametrize("words, said", [
    (("--push", "me/x"), "--push is for --format hf"),
    (("--format", "hf", "--push", "x"), "name it owner/name"),
    (("--format", "hf", "--push", "me/a--b"), "name it owner/name"),
])
def test_usage_errors(words, said):
    with pytest.raises(UserError, match=said):
        cli.parse(config.ExportArgs, [RUN, *words], "export")
