"""A local HTTP server that fails in the ways that networks do, for the tests of downloads."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from lmtutorial.files.registry import DataFile

CONTENT = bytes(range(256)) * 1200  # 307,200 bytes: several reads


class Server(ThreadingHTTPServer):
    """Serves CONTENT. `plan` says how each request in turn is handled, its last entry all that follow."""

    daemon_threads = True

    def __init__(self, *plan):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.ranges, self.stop = list(plan) or ["serve"], [], threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def file(self, content=CONTENT):
        url = f"http://127.0.0.1:{self.server_port}/file.txt"
        return DataFile("file.txt", len(content), hashlib.sha256(content).hexdigest(), url)

    def handle_error(self, request, client_address):  # clients that hang up are part of the test
        pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        how = server.plan.pop(0) if len(server.plan) > 1 else server.plan[0]
        if isinstance(how, int):
            self.send_response(how)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(asked[6:-1]) if asked and "norange" not in how else 0
        body = (
            bytes(len(CONTENT))
            if "wrong" in how
            else (b"<html>sign in</html>" if "portal" in how else CONTENT)
        )
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if "nolength" not in how:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        if "truncate" in how:
            self.wfile.write(rest[: max(len(rest) // 2, 1)])
        elif "stall" in how:
            self.wfile.write(rest[:1000])
            self.wfile.flush()
            server.stop.wait(5)
        else:
            self.wfile.write(rest)
            if "long" in how:
                self.wfile.write(b"more")
