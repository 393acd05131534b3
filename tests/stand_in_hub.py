"""A local server that speaks the hub's protocol, for the real datasets library, and a command that
talks to it.

    with serving(FILES) as server:                     # {repository: {path: bytes}}
        child = started("prepare", folder, server.server_port, "--source", "hindi")

It holds real parquet and JSON lines files, can break a connection in the middle of a file (breaks),
be slow, refuse everything or hang, and knows no more of the hub than the requests that the library
makes.
"""
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common.files import ROOT
from text import hub

pytest.importorskip("datasets")
import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402

SHA = {
    source.repo: source.revision or "c0ffee" + 34 * "0"
    for sources in hub.SOURCES.values()
    for source in sources
}


def parquet(texts):
    out = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({"id": list(range(len(texts))), "text": texts}), out, row_group_size=50
    )
    return out.getvalue()


def lines(texts):
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def card(**configs):
    """A dataset card whose head names the files of each configuration."""
    parts = "".join(
        f"- config_name: {name!r}\n  data_files:\n  - split: {split}\n    path: {path}\n"
        for name, (split, path) in configs.items()
    )
    return f"---\nlicense: cc-by-4.0\nconfigs:\n{parts}---\n# A set\n".encode()


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def answer(self, value, code=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        key = urllib.parse.unquote(self.path)
        # the connection dies midway
        if code == 206 and self.server.breaks.get(key.rpartition("/")[2], 0) > 0:
            self.server.breaks[key.rpartition("/")[2]] -= 1
            body = body[:len(body) // 3]
            self.close_connection = True
        time.sleep(self.server.slow * (code == 206))
        self.wfile.write(body)

    def do_GET(self):
        if self.server.mode == "refuses":
            return self.answer({"error": "no"}, 404)
        if self.server.mode == "hangs" or self.server.mode == "hangs later" and self.path != "/":
            self.server.stopping.wait(60)
            return None
        path = urllib.parse.unquote(self.path.partition("?")[0])
        m = re.match(
            r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/(resolve|tree|revision)/(\w+)(?:/(.*))?)?$", path
        )
        files = self.server.files.get(m[1]) if m else None
        if files is None:
            return self.answer(
                {"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"}
            )
        name = m[4] or ""
        if m[2] == "resolve" and name in files:
            data, tag = (
                files[name],
                {
                    "ETag": f'"{name.replace("/", "-")}"',
                    "X-Repo-Commit": SHA[m[1]],
                    "Accept-Ranges": "bytes",
                },
            )
            if wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
                return self.answer(
                    data[first : last + 1],
                    206,
                    **tag,
                    **{"Content-Range": f"bytes {first}-{last}/{len(data)}"},
                )
            return self.answer(data, **tag)
        if m[2] == "tree":
            base = name + "/" if name else ""
            inside = dict.fromkeys(
                base + f[len(base) :].split("/")[0] for f in files if f.startswith(base)
            )
            if inside:
                return self.answer(
                    [
                        {
                            "type": "file" if f in files else "directory",
                            "oid": "0" * 40,
                            "path": f,
                            "size": len(files.get(f, b"")),
                        }
                        for f in inside
                    ]
                )
        if m[2] in (None, "revision"):
            return self.answer(
                {
                    "id": m[1],
                    "sha": SHA[m[1]],
                    "siblings": [{"rfilename": f} for f in files],
                    "tags": [],
                    "private": False,
                    "gated": False,
                    "disabled": False,
                    "downloads": 0,
                }
            )
        self.answer({"error": "Entry not found"}, 404, **{"X-Error-Code": "EntryNotFound"})


@contextlib.contextmanager
def serving(files):
    """The server while it runs. breaks: {name of a file: so many times}; slow: seconds an answer;
    mode: refuses, hangs, hangs later.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files = files
        server.breaks, server.slow, server.mode, server.stopping = {}, 0.0, "", threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.stopping.set()
        server.shutdown()


# Neither library has a setting for the waits before its new tries: in the child all of them, and
# ours, are a hundredth as long.
# How many tries there are and what each one does stays as it is.
FASTER = " sleep = time.sleep\n time.sleep = lambda seconds: sleep(seconds / 100)"


def started(command, folder, port, *argv, code=""):
    """`python -m command` in a folder, talking to the stand-in; code runs before it."""
    env = dict(
        os.environ,
        PYTHONPATH=str(ROOT),
        HF_ENDPOINT=f"http://127.0.0.1:{port}",
        HF_HOME=str(folder / "hf"),
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_XET="1",
        NO_PROXY="127.0.0.1",
    )
    run = (
        f"if True:\n import signal, sys, time, {command} as command\n"
        # a background job of a shell ignores SIGINT, and its children inherit that
        " signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f" from common import console\n from text import hub\n{FASTER}\n"
        f"{code}\n console.run(command.main)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", run, *map(str, argv)],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
