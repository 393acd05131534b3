"""Prompts that are typed: sample --interactive, --prompt -, and the tab key.

    python -m pytest tests/test_conversation.py
"""
import dataclasses
import io
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, aria, call

import checkpoint
import cli
import config
import sample
from common import completion
from common.console import UserError
from sampling import conversation
from sampling.settings import read_prompts
from sampling.torch_model import writer_of

RUN = "checkpoints/eco_hybrid_hi"
START = (RUN, "--max_new_tokens", "12", "--ignore_eos")


@pytest.fixture(scope="module")
def loaded(trained):
    model, tokenizer, saved = checkpoint.load_model(trained / RUN, "cpu", config.check_saved)
    return writer_of(model), tokenizer, saved


@pytest.fixture
def talk(loaded, monkeypatch, capsys):
    """Lines typed -> (what is printed, what is said)."""
    def talk(*lines, argv=START):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        conversation.hold(argv, None, *loaded)
        return capsys.readouterr()
    return talk


def alone(capsys, *words):
    """The text of the same settings without a conversation."""
    assert call(sample.main, *START, "--precision", "fp32", "--quiet", *words) == 0
    return capsys.readouterr().out


def test_each_text_is_the_one_of_its_seed(talk, here, capsys):
    out, err = talk("mai kal", "/again")
    first = alone(capsys, "--prompt", "mai kal", "--seed", 1337)
    second = alone(capsys, "--prompt", "mai kal", "--seed", 1338)
    assert out == first + second and first != second
    assert "seed 1337]" in err and "seed 1338]" in err


def test_settings_change_and_change_back(talk, here, capsys):
    out, _ = talk("/settings temperature 0 max-new-tokens 5", "mai kal", "/again")
    greedy = alone(capsys, "--prompt", "mai kal", "--temperature", 0, "--max_new_tokens", 5)
    assert out == greedy * 2
    out, err = talk("/settings temperature 0", "/settings temperature default", "mai kal")
    assert out == alone(capsys, "--prompt", "mai kal")
    assert "temperature 0" in err.splitlines()[1] and "temperature 0.7" in err.splitlines()[2]
    out, _ = talk("mai kal", "/settings seed 7", "mai kal")
    assert out.endswith(alone(capsys, "--prompt", "mai kal", "--seed", 7))
    out, _ = talk("/settings --top_k 3", "/settings")
    assert "top_k                3                        flag" in out.splitlines()


@pytest.mark.parametrize("line, wanted", [
    ("/settings temperature", "names and values"),
    ("/settings ckpt other", "it is none of"),
    ("/settings sampler best", "must be one of"),
    ("/settings top_p 2", "at most 1"),
    ("/settings temperature '", "No closing quotation"),
    ("/nonsense", "/help lists them"),
    ("/again", "no prompt yet"),
    ("/settings remask 0.5 sampler threshold", "needs a schedule"),
])
def test_a_mistake_is_told_and_changes_nothing(talk, here, capsys, line, wanted):
    out, err = talk(line, "mai kal")
    assert "error: " in err and wanted in err
    assert out == alone(capsys, "--prompt", "mai kal")


def test_lines_that_go_on_and_gaps(talk, here, capsys):
    out, _ = talk("mai \\", "kal", "mai kal ____ gaya", "/quit", "never read")
    assert out.startswith(alone(capsys, "--prompt", "mai \nkal"))
    filled = out.splitlines()[-1]
    assert filled.startswith("mai kal") and filled.endswith("gaya") and "__" not in filled
    assert "never" not in out


def test_a_terminal_stops_a_text_and_keeps_what_was_typed(here, tmp_path):
    """Ctrl-C ends a text of a hundred thousand tokens, not the conversation; the history is kept
    for its owner alone.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's & has it ignored
        os.environ.update(HOME=str(tmp_path), PYTHONPATH=str(ROOT), TERM="dumb")
        words = ["-m", "sample", RUN, "--interactive", "--ignore_eos", "--precision", "fp32",
                 "--max_new_tokens", "100000", "--threads", "1"]
        os.execv(sys.executable, [sys.executable, *words])
    shown = b""

    def until(text):
        nonlocal shown
        end = time.monotonic() + 120
        while text not in shown and time.monotonic() < end:
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 65536)
        assert text in shown, shown[-2000:]
        shown = shown[shown.index(text) + len(text):]

    try:
        until(b"> ")
        os.write(terminal, "मैं कल\n".encode())
        until("मैं कल".encode())          # the echo, which may come twice
        until(b"\r\n")
        until("मैं कल".encode())          # the text
        os.write(terminal, b"\x03")
        until(b"stopped")
        os.write(terminal, b"/settings max_new_tokens 4\n")
        until(b"up to 4 tokens")
        os.write(terminal, b"mai kal\n")
        until(b"[4 tokens")
        until(b"> ")                      # before that, an end of input would get lost
        os.write(terminal, b"\x04")
        _, status = os.waitpid(pid, 0)
        assert status == 0
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(terminal)
    history = tmp_path / ".aria_history"
    lines = history.read_text(encoding="utf-8").splitlines()
    assert lines == ["मैं कल", "/settings max_new_tokens 4", "mai kal"]
    assert history.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name, value", [("prompt", "a"), ("text", "a ____"), ("json", "on"),
                                         ("stream", "on"), ("prompts_file", "x.txt")])
def test_interactive_stands_alone(name, value):
    with pytest.raises(UserError, match=f"leave --{name} out"):
        cli.parse(config.SampleArgs, ["--interactive", f"--{name}", value], "sample")


# ---- --prompt - ----------------------------------------------------------------------------------

def prompts(monkeypatch, data, *words):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
    args, _ = cli.parse(config.SampleArgs, list(words), "sample")
    return read_prompts(args)


def test_a_prompt_from_standard_input(monkeypatch):
    text = "पहली पंक्ति\n\n  दूसरी "
    assert prompts(monkeypatch, (text + "\n").encode(), "--prompt", "-") == [text]
    assert prompts(monkeypatch, b"b\r\n", "--prompt", "a", "--prompt=-") == ["a", "b"]
    for data, words, wanted in (
        (b" \n", ["--prompt", "-"], "is empty"),
        (b"ok \xff", ["--prompt", "-"], "byte 3"),
        (b"x", ["--prompt", "-", "--prompt", "-"], "once"),
    ):
        with pytest.raises(UserError, match=wanted):
            prompts(monkeypatch, data, *words)


# ---- the tab key ---------------------------------------------------------------------------------

def completed(script, *words):
    """What bash offers for the last of these words."""
    ask = f'COMP_WORDS=("$@"); COMP_CWORD={len(words) - 1}; _aria; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{script}\n{ask}", "bash", *words],
        capture_output=True, text=True, check=True,
    )
    return done.stdout.split()


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """As the command prints it; it needs no checkpoint."""
    done = aria("sample", "--completion", "bash", cwd=tmp_path_factory.mktemp("none"), check=0)
    assert not done.stderr
    return done.stdout


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash here")
def test_bash_completes_every_flag_and_its_choices(script):
    assert completed(script, "python", "-m", "sam") == ["sample"]
    assert completed(script, ".venv/bin/python", "-u", "-m", "train", "--max_st") == ["--max_steps"]
    assert completed(script, "python", "-m", "sample", "--sampler", "th") == ["threshold"]
    assert completed(script, "python", "-m", "sample", "--sampler", "=", "th") == ["threshold"]
    assert completed(script, "python", "-m", "sample", "--sampler", "=") == list(config.SAMPLERS)
    assert completed(script, "python", "-m", "sample", "--kv-cache", "in") == ["int8"]
    assert completed(script, "python", "-m", "sample", "--prompt", "") == []    # then files
    assert completed(script, "python", "other.py", "--") == []
    for name, cls in config.COMMANDS.items():
        offered = completed(script, "python", "-m", name, "--")
        assert {f"--{field.name}" for field in dataclasses.fields(cls)} <= set(offered), name


@pytest.mark.skipif(not shutil.which("zsh"), reason="there is no zsh here")
def test_zsh_completes_on_a_terminal(tmp_path):
    (tmp_path / "script").write_text(completion.script(config.COMMANDS, "zsh"))
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(HOME=str(tmp_path), ZDOTDIR=str(tmp_path), TERM="dumb", PS1="READY")
        os.chdir(tmp_path)
        os.execvp("zsh", ["zsh", "-f", "-i"])
    shown = b""
    try:
        for text, answer in (
            ("source ./script; print SOUR''CED\n", b"SOURCED"),
            ("python -m sample --sampler thr\t", b"--sampler threshold"),
        ):
            end = time.monotonic() + 30
            os.write(terminal, text.encode())
            while answer not in shown and time.monotonic() < end:
                if select.select([terminal], [], [], 1)[0]:
                    shown += os.read(terminal, 65536)
            assert answer in shown, shown
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)
