"""An OpenAI-compatible endpoint on this machine that misbehaves as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StubEndpoint:
    """Answers each prompt with `judge(prompt)`, after the misbehaviours in `script`, one for each request.

    A misbehaviour is a status, `(status, headers)`, `"slow"` (beyond any patience), `"cut"` (the connection is closed),
    or bytes as the body.
    """

    def __init__(self, judge: Callable[[str], str]) -> None:
        self.judge = judge
        self.script: list[object] = []
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    @contextmanager
    def serving(self) -> Iterator[StubEndpoint]:
        stub, ended = self, threading.Lock()
        ended.acquire()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.bodies.append(body)
                stub.headers.append({"path": self.path, **dict(self.headers)})
                told = stub.script.pop(0) if stub.script else None
                if told == "slow":
                    ended.acquire(timeout=20)
                    return
                if told == "cut":
                    self.connection.close()
                    return
                if isinstance(told, int | tuple):
                    status, headers = told if isinstance(told, tuple) else (told, {})
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(f"no, {self.headers.get('Authorization')}".encode())
                    return
                reply = stub.judge(body["messages"][0]["content"])
                whole = json.dumps(
                    {"choices": [{"message": {"role": "assistant", "content": reply}}]}
                ).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(told if isinstance(told, bytes) else whole)

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            ended.release()
            server.shutdown()
            server.server_close()
            thread.join()
