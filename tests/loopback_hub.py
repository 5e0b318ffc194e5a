"""
The Hub on loopback: what huggingface_hub asks for when a model is pushed and loaded, kept on disk.

Repositories are `state.json` and, by SHA-256, the bytes of all files in `objects/`. Xet is not offered: clients run
with HF_HUB_DISABLE_XET=1 and send large files by LFS, in parts where they are longer than `part_bytes`.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN, USER = "hf_loopback", "someone"
_COMMIT_BYTES = 1 << 16  # read from an upload before it is dropped


class LoopbackHub(ThreadingHTTPServer):
    """
    Serves until [`close`]; `with LoopbackHub(folder) as hub` does both.

    Args:
        folder (`Path`): Where everything is stored.
        part_bytes (`int`): Longer files are uploaded in parts of this many bytes.

    Attributes:
        requests (`list[tuple[str, str]]`): Method and path of every request.
        sent (`int`): Bytes of all answers.
        drop (`dict[str, int]`): Part of a path -> how many requests to such a path are cut off in the middle. With
            `"after:"` before it the request is carried out and only its answer is cut off.
    """

    daemon_threads = True

    def __init__(self, folder: Path, part_bytes: int = 1 << 30):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.part_bytes = Path(folder), part_bytes
        self.requests: list[tuple[str, str]] = []
        self.drop: dict[str, int] = {}
        self.sent = 0  # bytes of answers
        self.lock = threading.RLock()
        (self.folder / "objects").mkdir(parents=True)
        self.repositories: dict[str, dict] = {}  # id -> private, branches: name -> commits, newest last
        self.parts: dict[str, dict[int, bytes]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """What a client in a process of its own is started with."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Everything a revision holds."""
        return {path: self.read(entry["sha256"]) for path, entry in self.commit(repo, revision)["files"].items()}

    def commit(self, repo: str, revision: str) -> dict:
        branches = self.repositories[repo]["branches"]
        if revision in branches:
            return branches[revision][-1]
        return next(commit for commits in branches.values() for commit in commits if commit["oid"] == revision)

    def add_commit(self, repo: str, branch: str, files: dict[str, dict], title: str) -> str:
        commits = self.repositories[repo]["branches"].setdefault(branch, [])
        content = json.dumps([files, title, commits[-1]["oid"] if commits else None], sort_keys=True)
        oid = hashlib.sha1(content.encode()).hexdigest()
        commits.append({"oid": oid, "title": title, "files": files})
        (self.folder / "state.json").write_text(json.dumps(self.repositories))
        return oid

    def store(self, data: bytes) -> str:
        sha = hashlib.sha256(data).hexdigest()
        (self.folder / "objects" / sha).write_bytes(data)
        return sha

    def read(self, sha: str) -> bytes:
        return (self.folder / "objects" / sha).read_bytes()

    def has(self, sha: str) -> bool:
        return (self.folder / "objects" / sha).is_file()

    def is_dropped(self, path: str, after: bool = False) -> bool:
        with self.lock:
            for part, times in self.drop.items():
                if times and part.startswith("after:") == after and part.removeprefix("after:") in path:
                    self.drop[part] -= 1
                    return True
        return False

    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""

    def __enter__(self) -> "LoopbackHub":
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        hub, url = self.server, urlsplit(self.path)
        hub.requests.append((self.command, self.path))
        length = int(self.headers.get("Content-Length") or 0)
        if hub.is_dropped(self.path):
            self.rfile.read(min(length, _COMMIT_BYTES) // 2)
            self._hang_up()
            return
        body = self.rfile.read(length)
        words = [unquote(word) for word in url.path.strip("/").split("/")]
        if words[0] != "lfs" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            said = "Invalid credentials in Authorization header"
            self._send(*_as_json({"error": said}, 401, {"X-Error-Message": said}))
            return
        with hub.lock:
            answer = self._answer(words, parse_qs(url.query), body)
        if hub.is_dropped(self.path, after=True):
            self._hang_up()
            return
        self._send(*answer)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.server.sent += len(data)
            self.wfile.write(data)

    def _answer(self, words: list[str], query: dict, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if words == ["api", "whoami-v2"]:
            return _as_json({"name": USER, "type": "user"})
        if words == ["api", "validate-yaml"]:
            return _as_json({"errors": [], "warnings": []})
        if words == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if words[0] == "lfs":
            return self._large_file(words[1], query, body)
        if words[:2] == ["api", "models"]:
            return self._of_repository("/".join(words[2:4]), words[4:], body)
        if words[2:] == ["info", "lfs", "objects", "batch"]:
            return self._batch(json.loads(body)["objects"])
        return self._resolve("/".join(words[:2]), words[3], "/".join(words[4:]))

    def _create(self, asked: dict) -> tuple:
        repo = f"{asked['organization'] or USER}/{asked['name']}"
        known = repo in self.server.repositories
        if not known:
            private = asked.get("visibility") == "private" or asked.get("private", False)
            self.server.repositories[repo] = {"private": private, "branches": {}}
            attributes = {"sha256": self.server.store(b"*.safetensors filter=lfs\n"), "large": False}
            self.server.add_commit(repo, "main", {".gitattributes": attributes}, "initial commit")
        return _as_json({"url": f"{self.server.url}/{repo}", "id": repo}, 409 if known else 200)

    def _of_repository(self, repo: str, words: list[str], body: bytes) -> tuple:
        hub = self.server
        if repo not in hub.repositories:
            return _missing("RepoNotFound")
        what, revision, *rest = [*words, *[None, "main"][len(words) :]]
        if what == "branch":
            if revision in hub.repositories[repo]["branches"]:
                return _as_json({"error": "exists"}, 409)
            hub.repositories[repo]["branches"][revision] = list(hub.repositories[repo]["branches"]["main"])
            return _as_json({})
        try:
            commit = hub.commit(repo, revision)
        except StopIteration:
            return _missing("RevisionNotFound")
        files = commit["files"]
        if what == "preupload":
            return _as_json({"files": [self._mode(file, files) for file in json.loads(body)["files"]]})
        if what == "commit":
            oid = self._commit(repo, revision, dict(files), [json.loads(line) for line in body.splitlines()])
            return _as_json({"commitUrl": f"{hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})
        if what == "tree":
            folder = "/".join(rest)
            if folder and not any(path.startswith(f"{folder}/") for path in files):
                return _missing("EntryNotFound", commit["oid"])
            return _as_json([self._entry(path, files[path]) for path in files if path.startswith(folder)])
        if what == "paths-info":
            asked = parse_qs(body.decode()).get("paths") or json.loads(body)["paths"]
            return _as_json([self._entry(path, files[path]) for path in asked if path in files])
        siblings = [{"rfilename": path} for path in files]
        private = hub.repositories[repo]["private"]
        return _as_json({"id": repo, "sha": commit["oid"], "private": private, "tags": [], "siblings": siblings})

    def _mode(self, file: dict, files: dict) -> dict:
        large = file["path"].endswith(".safetensors") or file["size"] > 10_000_000
        held = files.get(file["path"])
        oid = held and (held["sha256"] if held["large"] else _git_oid(self.server.read(held["sha256"])))
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def _commit(self, repo: str, branch: str, files: dict, lines: list[dict]) -> str:
        title = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                sha = self.server.store(base64.b64decode(value["content"]))
                files[value["path"]] = {"sha256": sha, "large": False}
            elif line["key"] == "lfsFile":
                assert self.server.has(value["oid"]), "committed before it was uploaded"
                files[value["path"]] = {"sha256": value["oid"], "large": True}
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return self.server.add_commit(repo, branch, files, title)

    def _entry(self, path: str, file: dict) -> dict:
        data = self.server.read(file["sha256"])
        entry = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
        if file["large"]:
            entry["lfs"] = {"oid": file["sha256"], "size": len(data), "pointerSize": 130}
        return entry

    def _batch(self, objects: list[dict]) -> tuple:
        answer = []
        for each in objects:
            oid, size = each["oid"], each["size"]
            answer.append({"oid": oid, "size": size})
            if self.server.has(oid):
                continue
            href, header = f"{self.server.url}/lfs/{oid}", {}
            if size > self.server.part_bytes:
                count = -(-size // self.server.part_bytes)
                header = {f"{part + 1:05d}": f"{href}?part={part}" for part in range(count)}
                header["chunk_size"] = str(self.server.part_bytes)
            answer[-1]["actions"] = {"upload": {"href": href, "header": header}}
        return _as_json({"transfer": "basic", "objects": answer})

    def _large_file(self, oid: str, query: dict, body: bytes) -> tuple:
        if self.command == "POST":  # all parts are there
            parts = self.server.parts.pop(oid)
            body = b"".join(parts[number] for number in sorted(parts))
        elif "part" in query:
            self.server.parts.setdefault(oid, {})[int(query["part"][0])] = body
            return 200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
        if hashlib.sha256(body).hexdigest() != oid:
            return _as_json({"error": "other bytes than announced"}, 400)
        self.server.store(body)
        return 200, b"", {}

    def _resolve(self, repo: str, revision: str, path: str) -> tuple:
        if repo not in self.server.repositories:
            return _missing("RepoNotFound")
        try:
            commit = self.server.commit(repo, revision)
        except StopIteration:
            return _missing("RevisionNotFound")
        if path not in commit["files"]:
            return _missing("EntryNotFound", commit["oid"])
        data = self.server.read(commit["files"][path]["sha256"])
        etag = commit["files"][path]["sha256"] if commit["files"][path]["large"] else _git_oid(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit["oid"], "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            return 200, data, headers
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) if last else len(data) - 1, len(data) - 1)
        return 206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}


def connect(monkeypatch, hub: LoopbackHub, home: Path) -> None:
    """Has this process talk to it; huggingface_hub reads its environment when it is imported."""
    constants = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
    }
    for name, value in constants.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def _as_json(content, status: int = 200, headers: dict[str, str] | None = None) -> tuple[int, bytes, dict[str, str]]:
    return status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}


def _missing(code: str, commit: str | None = None) -> tuple[int, bytes, dict[str, str]]:
    headers = {"X-Error-Code": code} | ({"X-Repo-Commit": commit} if commit else {})
    return _as_json({"error": code}, 404, headers)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
