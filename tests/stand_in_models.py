"""A local server that speaks the hub's protocol for models, for the real package huggingface_hub.

    with models_hub(TOKEN, owner="me") as hub:      # hub.url, .repositories, .asked, .status
        ...

A repository is a list of commits (hash, {file: bytes}), the newest last. Large files go and come as
the hub has it without Xet: as LFS objects, by an upload of their own and a redirect to another
address. It knows no more of the hub than the requests that push and fetched make.
"""
import base64
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Answer(Exception):
    """An answer that is no success."""

    def __init__(self, status, code=""):
        super().__init__(status)
        self.status = status
        self.code = code


class Models(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do()

    def do_GET(self):
        self.do()

    def do_POST(self):
        self.do()

    def do_PUT(self):
        self.do()

    def do(self):
        """Find the path's function and call it."""
        hub = self.server.hub
        path = urllib.parse.unquote(self.path.partition("?")[0])
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.asked.append(f"{self.command} {path}")
        self.may_write = self.headers.get("Authorization") == f"Bearer {hub.token}"
        try:
            if hub.status:
                raise Answer(hub.status)
            for pattern, function in ROUTES.items():
                found = re.fullmatch(pattern, f"{self.command} {path}")
                if found:
                    return function(self, hub, body, *found.groups())
            raise Answer(501)
        except Answer as answer:
            self.send(b"{}", answer.status, **{"X-Error-Code": answer.code})

    def send(self, data, status=200, **headers):
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def must_be_allowed(self, hub, name):
        if not self.may_write:
            raise Answer(401)
        if name.split("/")[0] != hub.owner:
            raise Answer(403)

    # ---- to the hub ----------------------------------------------------------------------------

    def create(self, hub, body):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        self.must_be_allowed(hub, name)
        if name in hub.repositories:
            return self.send({"error": "it is there", "url": f"{hub.url}/{name}"}, 409)
        assert asked["visibility"] == "private"
        hub.repositories[name] = []
        self.send({"url": f"{hub.url}/{name}"})

    def check_card(self, hub, body):
        self.send({"errors": [], "warnings": []})

    def preupload(self, hub, body, name):
        self.must_be_allowed(hub, name)
        found = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith((".safetensors", ".model"))
            mode = "lfs" if large else "regular"
            found.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self.send({"files": found})

    def lfs(self, hub, body, name):
        self.must_be_allowed(hub, name)
        found = []
        for wanted in json.loads(body)["objects"]:
            upload = {"href": f"{hub.storage}/objects/{wanted['oid']}"}
            found.append(wanted | {"actions": {"upload": upload}})
        self.send({"transfer": "basic", "objects": found})

    def put(self, hub, body, oid):
        """To an address of its own, where no token is sent."""
        assert "Authorization" not in self.headers
        if hashlib.sha256(body).hexdigest() != oid:
            raise Answer(400)
        hub.objects[oid] = body
        self.send(b"")

    def commit(self, hub, body, name):
        self.must_be_allowed(hub, name)
        commits = hub.repositories[name]
        files = dict(commits[-1][1]) if commits else {}
        for line in body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif part["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
        commit = hub.add(name, files)
        self.send({"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit})

    # ---- from the hub --------------------------------------------------------------------------

    def resolve(self, hub, body, name, revision, file):
        commits = hub.repositories.get(name)
        if not commits:
            raise Answer(401, "RepoNotFound")
        known = dict(commits) | {"main": commits[-1][1]}
        if revision not in known:
            raise Answer(404, "RevisionNotFound")
        files = known[revision]
        if file not in files:
            raise Answer(404, "EntryNotFound")
        data = files[file]
        [commit] = [oid for oid, other in commits if other is files]
        tag = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}
        if not file.endswith(".safetensors"):
            return self.send(data, **headers)
        hub.objects[tag] = data
        headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(data))}
        self.send(b"", 302, Location=f"{hub.storage}/objects/{tag}", **headers)

    def fetch(self, hub, body, oid):
        assert "Authorization" not in self.headers
        self.send(hub.objects[oid], ETag=f'"{oid}"')


NAME = r"([^/]+/[^/]+)"
ROUTES = {
    "POST /api/repos/create": Models.create,
    "POST /api/validate-yaml": Models.check_card,
    f"POST /api/models/{NAME}/preupload/main": Models.preupload,
    rf"POST /{NAME}\.git/info/lfs/objects/batch": Models.lfs,
    f"POST /api/models/{NAME}/commit/main": Models.commit,
    "PUT /objects/(.+)": Models.put,
    f"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)": Models.resolve,
    "(?:GET|HEAD) /objects/(.+)": Models.fetch,
}


class Hub:
    """What the server has and was asked for."""

    def __init__(self, token, owner):
        self.token = token
        self.owner = owner
        self.repositories = {}
        self.objects = {}
        self.asked = []
        self.status = None              # every answer, if it is set

    def environment(self, home):
        """What a child process has to know of it."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def add(self, name, files):
        """A commit -> its hash."""
        commits = self.repositories.setdefault(name, [])
        commit = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits.append((commit, files))
        return commit


@contextlib.contextmanager
def serving(hub):
    """A server while it runs -> its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        server.daemon_threads = True
        server.hub = hub
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextlib.contextmanager
def models_hub(token, owner):
    """The hub while its two servers run: the hub itself, and the storage of large files."""
    hub = Hub(token, owner)
    with serving(hub) as hub.url, serving(hub) as hub.storage:
        yield hub
