"""A Hugging Face Hub on this machine for tests: models that huggingface_hub downloads over HTTP, and its cache."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FakeHub:
    """Serves the directories in `models` (id -> directory) and counts the GET requests of files in `served`."""

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.branches: dict[str, set[str]] = {}  # beside main
        self.refused: dict[str, tuple[int, str]] = {}  # id -> status and the code of the Hub for it
        self.served: list[str] = []
        self.sizes: dict[str, int | None] = {}  # name of a file -> the size that the Hub claims; None: no size

    def commit(self, name: str) -> str:
        listing = "".join(f"{path}{self.etag(path)}" for path in self.files(name).values())
        return hashlib.sha1(listing.encode()).hexdigest()

    def files(self, name: str) -> dict[str, Path]:
        root = self.models[name]
        return {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}

    @staticmethod
    def etag(path: Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Answer a request: status, headers, body."""
        match = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/([^/?]+)(?:/([^?]*))?.*", path)
        if match is None:
            return 404, {}, b""
        name, kind, revision, file = match.groups()
        if name in self.refused or name not in self.models:
            status, code = self.refused.get(name, (404, "RepoNotFound"))
            return status, {"X-Error-Code": code, "X-Error-Message": code}, b""
        commit = self.commit(name)
        if revision not in ("main", commit, *self.branches.get(name, ())):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        found = self.files(name)
        if kind == "revision":
            return 200, {}, json.dumps({"id": name, "sha": commit, "siblings": []}).encode()
        if kind == "tree":
            listing = [
                {"type": "file", "path": each, "oid": self.etag(at), "size": self.sizes.get(each, at.stat().st_size)}
                for each, at in found.items()
            ]
            return 200, {}, json.dumps(listing).encode()
        if file not in found:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        return 200, {"ETag": f'"{self.etag(found[file])}"', "X-Repo-Commit": commit}, found[file].read_bytes()


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _reply(self, with_body: bool) -> None:
            status, headers, body = hub.answer(self.path)
            name = self.path.rpartition("/")[2]
            if with_body and "/resolve/" in self.path:
                hub.served.append(name)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            size = hub.sizes.get(name, len(body)) if not with_body and "/resolve/" in self.path else len(body)
            if size is not None:
                self.send_header("Content-Length", str(size))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def do_GET(self) -> None:
            self._reply(with_body=True)

        def do_HEAD(self) -> None:
            self._reply(with_body=False)

        def log_message(self, *_) -> None:
            pass

    return Handler


@contextmanager
def serving(hub: FakeHub) -> Iterator[str]:
    """Serve `hub`; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def cached(model_dir: Path, cache: Path, name: str, revision: str = "a" * 40) -> Path:
    """Put a model into a cache as huggingface_hub lays it out: a snapshot of links into blobs; returns the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    for path in sorted(each for each in model_dir.rglob("*") if each.is_file()):
        blob = repository / "blobs" / FakeHub.etag(path)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(model_dir)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + len(path.relative_to(model_dir).parts) - 1), "blobs", blob.name))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(revision)
    return snapshot
