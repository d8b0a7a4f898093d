"""The Hub on loopback: what huggingface_hub asks of it to create, upload, commit and resolve, with faults on demand."""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, USER = "hf_good", "ann"
LICENSES = ("apache-2.0", "mit", "other")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    """Messages, in order; the sha of the n-th is n in 40 digits."""
    history: list[dict[str, bytes]] = field(default_factory=list)
    """The files after each commit."""

    @property
    def sha(self) -> str:
        return f"{len(self.commits):040}"

    def oid(self, path: str) -> str:
        """As git has it: sha256 of a large file, else sha1 of the blob."""
        content = self.files[path]
        header = f"blob {len(content)}\0".encode()
        return hashlib.sha256(content).hexdigest() if path in self.lfs else hashlib.sha1(header + content).hexdigest()


class Hub:
    """A server in a thread: `with Hub() as hub`.

    Attributes:
        repositories: by id.
        blobs: uploaded large files, by repository and sha256.
        parts: the file of each request for a part of one.
        uploads: for each attempt to upload one, "whole" or "dropped".
        drop: as many of the next uploads lose their connection in the middle.
        hold: while it is not set, uploads hang.
        uploading: set by the first upload that comes.
        creations: how often somebody asked for a repository to be made.
        port: to start again at the same place.
    """

    def __init__(self, port: int = 0):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[tuple[str, str], bytes] = {}
        self.parts: list[str] = []
        self.uploads: list[str] = []
        self.drop, self.creations = 0, 0
        self.hold, self.uploading = threading.Event(), threading.Event()
        self.hold.set()
        handler = type("Bound", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Hub":
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.hold.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def free_port() -> int:
    """A port at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def repository(self, repo_id: str) -> Repository | None:
        """None, and answered, where it is not there for the one who asks."""
        found = self.hub.repositories.get(repo_id)
        if found is None or (found.private and not self.is_known()):
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(found[1], found[3])
        pattern = r"/api/(?:model|dataset)s/([^/]+/[^/]+)(?:(/tree/[^/]+)/?(.*)|(?:/revision/[^/]+)?)"
        if found := re.fullmatch(pattern, path):
            if repository := self.repository(found[1]):
                if found[2]:
                    return self.answer(200, self.tree(repository, found[3] and f"{found[3]}/"))
                siblings = [{"rfilename": name} for name in sorted(repository.files)]
                about = {"id": found[1], "sha": repository.sha, "private": repository.private, "siblings": siblings}
                self.answer(200, {**about, "tags": [], "downloads": 0, "likes": 0})
            return None
        return self.answer(404, {"error": f"no {path}"}, X_Error_Code="EntryNotFound")

    def tree(self, repository: Repository, folder: str) -> list[dict[str, Any]]:
        """The entries of a folder ("" or with a slash at its end), and of the folders in it if they are asked for."""
        names = [name for name in sorted(repository.files) if name.startswith(folder)]
        inside = {name.removeprefix(folder).partition("/")[0] for name in names if "/" in name.removeprefix(folder)}
        folders = [{"type": "directory", "path": folder + name, "size": 0, "oid": "0"} for name in sorted(inside)]
        if "recursive=true" not in self.path.lower():
            names = [name for name in names if "/" not in name.removeprefix(folder)]
        return folders + [self.entry(repository, name) for name in names]

    def entry(self, repository: Repository, name: str) -> dict[str, Any]:
        size, oid = len(repository.files[name]), repository.oid(name)
        lfs = {"lfs": {"oid": oid, "size": size, "pointerSize": 134}} if name in repository.lfs else {}
        return {"type": "file", "path": name, "size": size, "oid": oid, **lfs}

    def resolve(self, repo_id: str, name: str) -> None:
        if not (repository := self.repository(repo_id)):
            return None
        if name not in repository.files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        about = {"ETag": f'"{repository.oid(name)}"', "X_Repo_Commit": repository.sha}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            self.hub.parts.append(name)
            return self.answer(206, repository.files[name][int(asked[1]) : int(asked[2]) + 1], **about)
        return self.answer(200, repository.files[name], **about)

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.read()
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if not self.is_known():
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        for pattern, act in {
            r"/api/models/([^/]+/[^/]+)/preupload/main": self.preupload,
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": self.batch,
            r"/api/models/([^/]+/[^/]+)/commit/main": self.commit,
        }.items():
            if (found := re.fullmatch(pattern, path)) and (repository := self.repository(found[1])):
                return act(found[1], repository, body)
        return self.answer(404, {"error": f"no {path}"})

    def validate(self, card: str) -> None:
        found = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
        values = yaml.safe_load(found[1]) if found else {}
        errors = [] if values.get("license") in LICENSES else [{"message": f'"license" must be one of {LICENSES}'}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self, asked: dict[str, Any]) -> None:
        self.hub.creations += 1
        owner = asked.get("organization") or USER
        repo_id = f"{owner}/{asked['name']}"
        if owner != USER:
            return self.answer(403, {"error": f"You don't have the rights to create a model under {owner!r}"})
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", **url})
        attributes = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.hub.repositories[repo_id] = Repository(asked.get("visibility") == "private", attributes)
        return self.answer(200, url)

    def preupload(self, repo_id: str, repository: Repository, body: bytes) -> None:
        files = []
        for asked in json.loads(body)["files"]:
            name = asked["path"]
            mode = "lfs" if name.endswith((".safetensors", ".png", ".pt", ".bin")) else "regular"
            oid = repository.oid(name) if name in repository.files else None
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def batch(self, repo_id: str, repository: Repository, body: bytes) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/blob/{repo_id}/{asked['oid']}"}}}
            objects.append({**asked, **({} if (repo_id, asked["oid"]) in self.hub.blobs else upload)})
        self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def do_PUT(self) -> None:
        self.hub.uploading.set()
        self.hub.hold.wait()
        if self.hub.drop:
            self.hub.drop -= 1
            self.hub.uploads.append("dropped")
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            linger = struct.pack("ii", 1, 0)  # a reset, as of a line that is cut
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return self.connection.close()
        content = self.read()
        repo_id, _, oid = self.path.removeprefix("/blob/").rpartition("/")
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400, {"error": "not the content that was announced"})
        self.hub.uploads.append("whole")
        self.hub.blobs[repo_id, oid] = content
        return self.answer(200)

    def commit(self, repo_id: str, repository: Repository, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files, lfs = dict(repository.files), set(repository.lfs)
        for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
            if (repo_id, value["oid"]) not in self.hub.blobs:
                return self.answer(400, {"error": f"{value['path']}: its content was never uploaded"})
            files[value["path"]] = self.hub.blobs[repo_id, value["oid"]]
            lfs.add(value["path"])
        for value in (line["value"] for line in lines if line["key"] == "file"):
            files[value["path"]] = base64.b64decode(value["content"])
        for value in (line["value"] for line in lines if line["key"] == "deletedFile"):
            if value["path"] not in files:
                return self.answer(404, {"error": "A file with this name doesn't exist"})
            del files[value["path"]]
            lfs.discard(value["path"])
        repository.files, repository.lfs = files, lfs
        repository.history.append(files)
        repository.commits.append(next(line["value"]["summary"] for line in lines if line["key"] == "header"))
        url = f"{self.hub.url}/{repo_id}/commit/{repository.sha}"
        return self.answer(200, {"success": True, "commitOid": repository.sha, "commitUrl": url})
