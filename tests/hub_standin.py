"""A stand-in for the hub on 127.0.0.1: the part of its HTTP interface that the official client uses to publish and to fetch."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import transformers
import yaml
from huggingface_hub import constants

TOKEN = "hf_standinstandinstandin"


class StandIn(ThreadingHTTPServer):
    """Repositories in memory. Small files are committed as they are; safetensors go through the large-file protocol."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = {}  # name -> list of (commit, {path: bytes}), the newest last
        self.objects = {}  # sha256 -> bytes
        self.log = []  # (method, path)
        self.parts = []  # (repository, file, bytes) of what was asked for in part
        self.private = {}
        self.tags = {}  # name -> tags, such as base_model:adapter:user/name
        self.broken_commits = False
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()  # seconds between looks at whether it is to stop

    @property
    def address(self):
        """Its endpoint."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, name):
        """The newest files of a repository."""
        return self.repositories[name][-1][1]

    def put(self, name, files):
        """Places files in a repository, as somebody else would have."""
        commits = self.repositories.setdefault(name, [])
        content = {**(commits[-1][1] if commits else {}), **files}
        sha = hashlib.sha1(json.dumps([len(commits), sorted(content)]).encode()).hexdigest()
        commits.append((sha, content))
        return sha

    def fetched(self, name):
        """Paths in a repository whose contents were asked for."""
        return {
            path.split("/resolve/")[1].split("/", 1)[1] for how, path in self.log if how == "GET" and path.startswith(f"/{name}/resolve/")
        }


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """A hub of one's own: the official client talks to it, with a cache and a token of its own."""
    server = StandIn()
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.address)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # it keeps the endpoint that it is made with
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def _answer(self, status=200, body=None, headers=None, head=False):
        data = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def _missing(self, code, status=404, head=False):
        self._answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code}, head=head)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _may_write(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _find(self, name, revision):
        for sha, files in reversed(self.server.repositories.get(name, [])):
            if revision in ("main", sha):
                return sha, files
        return None

    def do_HEAD(self):
        self._get(head=True)

    def do_GET(self):
        self._get(head=False)

    def _get(self, head):
        path = unquote(urlsplit(self.path).path)
        self.server.log.append(("HEAD" if head else "PART" if "Range" in self.headers else "GET", path))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = found.groups()
            commit = self._find(name, revision)
            if commit is None:
                return self._missing("RepoNotFound", head=head)
            if file not in commit[1]:
                return self._missing("EntryNotFound", head=head)
            data = commit[1][file]
            etag = hashlib.sha256(data).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit[0], "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            if not head and (asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
                part = data[int(asked[1]) : int(asked[2]) + 1]
                self.server.parts.append((name, file, len(part)))
                return self._answer(206, part, {**headers, "Content-Range": f"bytes {asked[1]}-{asked[2]}/{len(data)}"})
            return self._answer(body=data, headers=headers, head=head)
        if path == "/api/models":
            query = parse_qs(urlsplit(self.path).query)
            wanted, limit = query["filter"][0], int(query.get("limit", ["1000"])[0])
            names = [name for name in self.server.repositories if wanted in self.server.tags.get(name, ())]
            return self._answer(body=[{"id": name} for name in names[:limit]])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            commit = self._find(found[1], "main")
            if commit is None:
                return self._missing("RepoNotFound", status=401 if found[1] in self.server.tags else 404, head=head)
            card = commit[1].get("README.md", b"").decode(errors="replace").split("---\n")
            siblings = [{"rfilename": file, "size": len(data)} for file, data in commit[1].items()]
            body = {"id": found[1], "sha": commit[0], "siblings": siblings}
            return self._answer(body=body | ({"cardData": yaml.safe_load(card[1])} if len(card) > 2 else {}))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)(/.*)?", path):
            name, what, revision, below = found.groups()
            commit = self._find(name, revision)
            if commit is None:
                return self._missing("RepoNotFound" if name not in self.server.repositories else "RevisionNotFound", head=head)
            if what == "revision":
                return self._answer(body={"id": name, "sha": commit[0], "siblings": [{"rfilename": file} for file in commit[1]]})
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()} for file, data in commit[1].items()
            ]
            entries = [entry for entry in entries if below is None or entry["path"].startswith(f"{below[1:]}/")]
            return self._answer(body=entries)
        return self._missing("NotFound", head=head)

    def do_PUT(self):
        data = self._body()
        self.server.log.append(("PUT", self.path))
        self.server.objects[self.path.rsplit("/", 1)[1]] = data
        self._answer()

    def do_POST(self):
        body, path = self._body(), unquote(urlsplit(self.path).path)
        self.server.log.append(("POST", path))
        if not self._may_write():
            # A careless server might well repeat what it was sent.
            text = f"Invalid credentials: {self.headers.get('Authorization')}"
            return self._answer(401, {"error": text}, {"X-Error-Message": text})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.server.repositories
            self.server.repositories.setdefault(name, [])
            self.server.private.setdefault(name, asked.get("visibility") == "private")
            return self._answer(409 if known else 200, {"url": f"{self.server.address}/{name}"})
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---\n")[1]
            good = isinstance(yaml.safe_load(front), dict)
            return self._answer(200 if good else 400, {"warnings": [], "errors": [] if good else [{"message": "bad"}]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "authenticated": True, "actions": {"upload": {"href": f"{self.server.address}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._answer(body={"transfer": "basic", "objects": objects})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        name, what = found.groups()
        if what == "preupload":
            modes = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self._answer(body={"files": modes})
        if self.server.broken_commits:
            return self._answer(500, {"error": "out of order"})
        files = {}
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                data = self.server.objects[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                files[value["path"]] = data
        sha = self.server.put(name, files)
        return self._answer(body={"commitUrl": f"{self.server.address}/{name}/commit/{sha}", "commitOid": sha})
