"""A real S3 server in a process of its own (moto), which a test can make refuse, be slow, or go away in the middle.

    with s3_server() as server:
        storage = Storage(server.uri("folder"))
        with server.trouble("refuse", times=2):
            storage.write("name", b"content")

What it holds lives in its memory. It ends with the with block, and also when the process of the test is killed.
"""

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

BUCKET, KEY, SECRET = "nights", "test-key", "test-secret"
_CONTROL = "/-/trouble"
_SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


@dataclass
class Trouble:
    """What happens to the next requests.

    kind: "refuse" (503, SlowDown), "slow" (answered after so many seconds), "cut" (the connection closes after half of
    the request or of the answer), "lose" (done, but the connection closes instead of an answer). times: for how many
    requests, of these methods and with this text in their address; of those every n-th.
    """

    kind: str
    times: int = 1 << 30
    seconds: float = 0.0
    methods: str = "GET HEAD PUT POST DELETE"
    containing: str = ""
    every: int = 1
    met: int = 0

    def meets(self, method: str, address: str) -> bool:
        """Does it happen to this request? Each is asked about once."""
        if self.times <= 0 or method not in self.methods.split() or self.containing not in address:
            return False
        self.met += 1
        happens = self.met % self.every == 0
        self.times -= happens
        return happens


class Server:
    """A running server with one empty bucket."""

    def __init__(self, process: "subprocess.Popen[str]"):
        assert process.stdout is not None
        self.process, self.endpoint = process, f"127.0.0.1:{process.stdout.readline().strip()}"
        self._ask("PUT", f"/{BUCKET}")

    def uri(self, folder: str = "") -> str:
        """The address of a folder in the bucket, with its key, secret and options."""
        options = f"scheme=http&region=us-east-1&endpoint_override={self.endpoint}"
        return f"s3://{KEY}:{SECRET}@{BUCKET}/{quote(folder)}?{options}"

    @contextmanager
    def trouble(self, kind: str, **about: Any) -> Iterator[None]:
        """Trouble with requests until the with block ends: see Trouble."""
        self._ask("PUT", _CONTROL, asdict(Trouble(kind, **about)))
        try:
            yield
        finally:
            self._ask("DELETE", _CONTROL)

    def seen(self) -> list[tuple[str, str]]:
        """Method and address of every request since the last call."""
        return [(method, address) for method, address in json.loads(self._ask("GET", _CONTROL))]

    def _ask(self, method: str, path: str, content: Any = None) -> bytes:
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"http://{self.endpoint}{path}", body, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return bytes(answer.read())


@contextmanager
def s3_server() -> Iterator[Server]:
    """Start the server on a free port of this machine, and end it."""
    process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Server(process)
    finally:
        process.kill()
        process.communicate()


class Troubled:
    """The server's side: S3 as a WSGI application with trouble in front of it."""

    def __init__(self, application: Any):
        self.application, self.trouble = application, Trouble("refuse", times=0)
        self.lock, self.seen = threading.Lock(), list[tuple[str, str]]()

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        method, address = environ["REQUEST_METHOD"], f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
        if environ["PATH_INFO"] == _CONTROL:
            return self._control(method, environ, start)
        with self.lock:
            self.seen.append((method, address))
            trouble = self.trouble if self.trouble.meets(method, address) else None
        if trouble is None:
            return self.application(environ, start)
        if trouble.kind == "refuse":
            self._body(environ).read()
            start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(_SLOW_DOWN)))])
            return [] if method == "HEAD" else [_SLOW_DOWN]
        if trouble.kind == "slow":
            time.sleep(trouble.seconds)
            return self.application(environ, start)
        return self._gone(trouble.kind, method, environ, start)

    def _gone(self, kind: str, method: str, environ: dict[str, Any], start: Any) -> Iterator[bytes]:
        if kind == "lose":
            list(self.application(environ, lambda *_: None))
        elif method == "GET":
            answer = b"".join(self.application(environ, start))
            yield answer[: len(answer) // 2]
        elif method == "PUT":
            size = environ.get("HTTP_X_AMZ_DECODED_CONTENT_LENGTH") or environ["CONTENT_LENGTH"]
            self._body(environ).read(int(size) // 2)
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError("the server goes away, as the test wants it")

    @staticmethod
    def _body(environ: dict[str, Any]) -> Any:
        """The request's body, which ends where it ends: the bare stream would wait for more."""
        from werkzeug.wsgi import get_input_stream

        return get_input_stream(environ)

    def _control(self, method: str, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        with self.lock:
            answer = b""
            if method == "GET":
                answer, self.seen = json.dumps(self.seen).encode(), []
            elif method == "PUT":
                self.trouble = Trouble(**json.loads(self._body(environ).read()))
            else:
                self.trouble = Trouble("refuse", times=0)
        start("200 OK", [("Content-Length", str(len(answer)))])
        return [answer]


def serve() -> None:
    """In the server's process: say the port, and serve until the other end of stdin is closed."""
    import logging
    import os

    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    logging.disable()
    WSGIRequestHandler.protocol_version = "HTTP/1.1"  # else every PUT waits a second for a "100 Continue"
    server = make_server("127.0.0.1", 0, Troubled(create_backend_app("s3")), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    serve()
