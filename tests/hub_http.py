"""How the loopback Hub speaks HTTP: what it notes of each request, and how it fails on demand."""

import hashlib
import json
import random
import re
import secrets
import socket
import struct
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, NamedTuple

from tests.hub_store import CHUNK_BYTES, Refused


class Request(NamedTuple):
    """A request that was answered, or cut off: bytes of bodies, the token it carried, the range it asked."""

    method: str
    host: str
    path: str
    status: int
    received: int
    sent: int
    token: str | None
    range: str | None


@dataclass
class Fault:
    """A fault for requests that match ``METHOD host path`` (host: "hub" or "storage").

    drop: the connection ends `at` bytes into the body, of the request for PUT, else of the answer, with the
    work done. reset: the same with a reset, as when a cable is cut; at 0, before anything is done. status:
    answered so, nothing done. slow: answered after `seconds`. etag: the file seems to be another one. whole:
    the range is ignored.
    """

    kind: Literal["reset", "drop", "status", "slow", "etag", "whole"]
    where: str
    times: int = 1
    skip: int = 0
    at: int = 0
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.2


def random_fault(dice: random.Random) -> Fault:
    kind = dice.choice(["reset", "drop", "drop", "status", "slow"])
    status, headers = dice.choice([(500, {}), (503, {}), (429, {"Retry-After": "0"}), (403, {})])
    at = dice.choice([0, int(10 ** dice.uniform(0, 6))])
    return Fault(kind, "", at=at, status=status, headers=headers, seconds=0.05)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, handler: type[BaseHTTPRequestHandler], hub: Any) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub

    def handle_error(self, *_: object) -> None:
        """Note what the hub itself did wrong."""
        self.hub.broken.append(traceback.format_exc())


class _Gone(ConnectionError):  # noqa: N818  no error
    """The connection is to end here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    host: ClassVar[str]
    fault: Fault | None = None
    server: Server

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            if self.fault and self.fault.kind == "reset":  # what is still in the buffers is lost as well
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    def do_GET(self) -> None:
        self.hub = self.server.hub
        self.route, _, self.query = self.path.partition("?")
        self.status = self.got = self.sent = 0
        self.fault = self.hub.fault_for(f"{self.command} {self.host} {self.route}")
        begun = self._request()
        self.hub.requests.append(begun)  # now: who has the answer may forget it before it is counted
        try:
            self._answer()
        finally:
            with suppress(StopIteration, IndexError):
                place = next(place for place, one in enumerate(self.hub.requests) if one is begun)
                self.hub.requests[place] = self._request()

    def _request(self) -> Request:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        said = token if scheme == "Bearer" else None
        span = self.headers.get("Range")
        return Request(self.command, self.host, self.route, self.status, self.got, self.sent, said, span)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  names that the base class calls

    def _answer(self) -> None:
        kind = self.fault.kind if self.fault else None
        if kind == "reset" and not self.fault.at:
            raise _Gone
        if kind == "slow":
            time.sleep(self.fault.seconds)
        try:
            if kind == "status":
                self._drain()
                raise Refused(self.fault.status, "", "a fault on demand")
            self.work()
        except Refused as refused:
            headers = {"X-Error-Message": str(refused)} | (self.fault.headers if kind == "status" else {})
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self.reply({"error": str(refused)}, refused.status, headers)

    def work(self) -> None:
        raise NotImplementedError

    def _dropping(self, of: str) -> int | None:
        """After how many bytes of the body of request or answer the connection is to end."""
        is_sent = "request" if self.command == "PUT" else "answer"
        is_cut = self.fault is not None and self.fault.kind in ("drop", "reset")
        return self.fault.at if is_cut and is_sent == of else None

    def chunks(self) -> Iterator[bytes]:
        left = int(self.headers.get("Content-Length", 0))
        limit = self._dropping("request")
        while left:
            size = min(left, CHUNK_BYTES) if limit is None else min(left, CHUNK_BYTES, limit - self.got)
            chunk = self.rfile.read(size)
            if not chunk:
                raise _Gone
            self.got += len(chunk)
            left -= len(chunk)
            yield chunk

    def _drain(self) -> None:
        for _ in self.chunks():
            pass

    def reply(self, answer: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(answer).encode()
        self.begin(status, {"Content-Type": "application/json", **(headers or {})}, len(data))
        if self.command != "HEAD":
            limit = self._dropping("answer")
            self.wfile.write(data[:limit])
            self.sent += len(data[:limit])
            if limit is not None and limit < len(data):
                raise _Gone

    def begin(self, status: int, headers: dict[str, str], length: int) -> None:
        self.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_file(self, path: Path, headers: dict[str, str]) -> None:
        """Send a file, or the range of it that is asked for."""
        size = path.stat().st_size
        begin, end, status = 0, size, 200
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked and not (self.fault and self.fault.kind == "whole"):
            begin = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
            end = min(size, int(asked[2]) + 1) if asked[1] and asked[2] else size
            if begin >= end:
                return self.begin(416, {"Content-Range": f"bytes */{size}"}, 0)
            status, headers = 206, {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{size}"}
        self.begin(status, {"Accept-Ranges": "bytes", **headers}, end - begin)
        if self.command == "HEAD" or begin == end:
            return None
        limit = self._dropping("answer")
        with path.open("rb") as file:
            count = end - begin if limit is None else min(limit, end - begin)
            self._send(file, begin, count)
        if limit is not None and limit < end - begin:
            raise _Gone
        return None

    def _send(self, file: BinaryIO, begin: int, count: int) -> None:
        """Send a range: where the line, which all share, has a speed, a tenth of a second's worth at once."""
        speed = self.hub.bytes_a_second
        step = max(1, int(speed / 10)) if speed else max(1, count)
        for start in range(begin, begin + count, step):
            with self.hub.line if speed else nullcontext():
                sent = self.connection.sendfile(file, start, min(step, begin + count - start))
                time.sleep(sent / speed if speed else 0)
            self.sent += sent

    def log_message(self, *_: object) -> None:
        """Nothing: the hub's `requests` say it all."""


class StorageHandler(Handler):
    """Large files, by signed URLs."""

    host = "storage"

    def work(self) -> None:
        if not self.hub.is_valid(self.route, self.query):
            self._drain()
            raise Refused(403, "", "Request has expired")
        kind, *repo, sha256 = self.route.strip("/").split("/")
        if kind == "upload":
            return self._receive("/".join(repo), sha256)
        etag = "changed" if self.fault and self.fault.kind == "etag" else sha256
        return self.send_file(self.hub.store.path(sha256), {"ETag": f'"{etag}"'})

    def _receive(self, repo: str, sha256: str) -> None:
        digest = hashlib.sha256()
        part = self.hub.store.folder / f"{secrets.token_hex(8)}.part"
        try:
            with part.open("wb") as file:
                for chunk in self.chunks():
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != sha256:
                raise Refused(400, "", "the body is not what was announced")
            part.rename(self.hub.store.path(sha256))
        finally:
            part.unlink(missing_ok=True)
        self.hub.repo(repo).held.add(sha256)
        self.begin(200, {"ETag": f'"{sha256}"'}, 0)
