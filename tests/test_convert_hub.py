"""push_to_hub against a server that speaks the Hub's protocol, in a process of its own."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from golden_numbers import GOLDEN

from sqllava.checkpoint.convert import Options, convert

_PUSH = """
import sys, sqllava
model, processor = sqllava.load(sys.argv[1])
model.config.figures = {"vqa_accuracy": 0.875}
model.push_to_hub("someone/sqllava-tiny", token="hf_test")
processor.push_to_hub("someone/sqllava-tiny", token="hf_test")
"""


class Hub(BaseHTTPRequestHandler):
    """Keeps the files of every commit, and gives them back; all of them come with the commit."""

    def log_message(self, *_):
        pass

    def _answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        held = self.server.files.get(self.path.rpartition("/resolve/main/")[2].partition("?")[0])
        if held is None:
            return self._answer(404, {"error": "nothing here"})
        self.send_response(200)
        for name, value in (("ETag", '"1"'), ("X-Repo-Commit", "0" * 40)):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(held)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(held)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}/someone/sqllava-tiny"
        if self.path.endswith("/create"):
            return self._answer(200, {"url": address, "name": "someone/sqllava-tiny"})
        if self.path.endswith("/validate-yaml"):
            return self._answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            modes = [{"path": f["path"]} | plain for f in asked]
            return self._answer(200, {"files": modes})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.server.files[value["path"]] = base64.b64decode(value["content"])
        commit = {"commitOid": "0" * 40, "commitUrl": f"{address}/commit/0", "success": True}
        return self._answer(200, commit | {"pullRequestUrl": None})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_push_to_hub_uploads_the_model_with_its_card(hub, tmp_path):
    merged = tmp_path / "merged"
    convert(GOLDEN / "sqllava-lora", merged, "merged", Options(check=False))
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", _PUSH, str(merged)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.files
    assert {"config.json", "model.safetensors", "chat_template.jinja"} <= files.keys()
    card = files["README.md"].decode()
    assert "| vqa_accuracy | 0.875 |" in card and "vicuna-tiny" in card
    assert files["chat_template.jinja"] == (merged / "chat_template.jinja").read_bytes()
