"""A hub on this machine: it makes repositories, takes commits and keeps what it was sent."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_known"


class _Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self._answer(200, {})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kept = self.server.kept
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            kept[name] = {"private": asked["visibility"] == "private", "files": {}, "commits": []}
            self._answer(200, {"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            if self.server.broken:
                return  # hangs up without a word
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        else:
            name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            lines = [json.loads(line) for line in body.splitlines()]
            kept[name]["commits"].append(lines[0]["value"]["summary"])
            for line in lines[1:]:
                kept[name]["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/{name}/commit/{'0' * 40}"
            self._answer(200, {"commitUrl": url, "commitOid": "0" * 40, "success": True})

    def _answer(self, code, content):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def hub(broken=False):
    """Give the address of a hub, and what it keeps by repository."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.kept, server.broken = {}, broken
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.kept
    finally:
        server.shutdown()
        server.server_close()
