"""Models by their names on the hub, from a server on this machine that stands in for it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from checkpoints import as_packed, hugging_face, tiny

COMMIT = "a" * 40
DIVIDES = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}


def handler(root: Path, asked: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """What huggingface_hub asks for one repository."""

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            if "/owner/name" not in path:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif "/tree/" in path:
                files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in root.iterdir()]
                self.answer(200, json.dumps(files).encode(), {})
            elif path.startswith("/api/"):
                siblings = [{"rfilename": file.name} for file in root.iterdir()]
                info = {"id": "owner/name", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
                self.answer(200, json.dumps(info).encode(), {})
            else:
                content = (root / path.rpartition("/")[2]).read_bytes()
                tag = hashlib.sha256(content).hexdigest()
                self.answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'})

        def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    return Handler


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The environment of a process for which the server is the hub, and what it has been asked for."""
    model = tiny("llama", scales="tensor")
    source = hugging_face(tmp_path / "repository", model, as_packed(model, True), DIVIDES)
    (source / "pytorch_model.bin").write_bytes(b"not wanted")
    vocabulary = {"a": 0, "b": 1}
    tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(source, asked))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    places = {"HF_HOME": str(tmp_path / "hub"), "BITLAB_CACHE": str(tmp_path / "cache")}
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1", **places}
    yield {**os.environ, **own}, asked
    server.shutdown()
    thread.join()
    server.server_close()


def generate(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bitlab", "generate", *arguments, "--max-tokens", "3"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.medium
def test_a_name_of_the_hub(hub: tuple[dict[str, str], list[str]]) -> None:
    """Fetched and converted once; afterwards it needs no hub."""
    environment, asked = hub
    first = generate(environment, "owner/name", "ab")
    assert first.returncode == 0, first.stderr
    assert "bits per parameter" in first.stderr
    assert any(path.endswith("model.safetensors") for path in asked)
    assert not any(path.endswith("pytorch_model.bin") for path in asked)
    asked.clear()
    again = generate(environment, "owner/name", "ab", "--offline")
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert "bits per parameter" not in again.stderr
    assert asked == []


@pytest.mark.medium
def test_what_the_hub_does_not_have(hub: tuple[dict[str, str], list[str]]) -> None:
    environment, asked = hub
    missing = generate(environment, "other/thing", "ab")
    assert missing.returncode == 1
    assert missing.stderr.startswith("bitlab: other/thing: no such file or directory, and ")
    assert missing.stderr.count("\n") == 1
    asked.clear()
    never = generate(environment, "owner/name", "ab", "--offline")
    assert "it has not been fetched before" in never.stderr
    assert asked == []
