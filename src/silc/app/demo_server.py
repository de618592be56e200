"""The web server under the demo: who may ask, how much, and in which form; nothing about models.

Gives: Server, Routes, Reply, Refusal, LARGEST.
Used by: app/demo. A page that another site shows in the same browser can reach this address too, so every request is
checked: the name it was sent to (a foreign name may be pointed here), where it comes from, its length and its kind. No
part of a request is ever a path of the file system, and none is ever fetched.
"""

from __future__ import annotations

import http
import ipaddress
import json
import os
import re
import socket
import socketserver
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

LARGEST = 32 << 20
"""Bytes of a picture's file."""
LONGEST = 1 << 16
"""Bytes of a question."""
PATIENCE = 20.0
"""Seconds that a client may keep silent, and three times that for all of a body."""
LOCAL = {"localhost", "127.0.0.1", "::1"}
ANYWHERE = {"", "0.0.0.0", "::"}
NUMBERED = re.compile(r"(/[a-z]+)/([0-9]{1,9})")
SEALED = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; sandbox"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Connection": "close",
}


class Refusal(Exception):
    """A request that gets no answer: an HTTP status, and one sentence that says why."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


@dataclass(frozen=True)
class Reply:
    body: bytes
    kind: str
    policy: str = SEALED
    """What a browser may do with it (Content-Security-Policy)."""
    status: int = 200


@dataclass(frozen=True)
class Routes:
    """What can be asked. A ValueError of any of them is told as a wrong request, a Refusal as it says."""

    pages: Mapping[str, Callable[[], Reply]]
    """GET PATH"""
    numbered: Mapping[str, Callable[[int], Reply]]
    """GET PATH/NUMBER"""
    uploads: Mapping[str, Callable[[bytes], dict[str, Any]]]
    """POST PATH with a file as its body"""
    questions: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]
    """POST PATH with a JSON object as its body"""

    @property
    def posts(self) -> set[str]:
        return {*self.uploads, *self.questions}


class Server(ThreadingHTTPServer):
    """Bound, and listening, when it is made. ValueError says why it cannot be, in a sentence for the command line."""

    daemon_threads = True  # a client that is slow to go does not keep the process
    request_queue_size = 64
    allow_reuse_address = os.name == "posix"  # on Windows two servers would share a port

    def __init__(self, host: str, port: int, routes: Routes | None = None, patience: float = PATIENCE) -> None:
        """Without `routes` nothing is there yet: an address may be had before what takes long is made."""
        self.routes, self.patience, self.host = routes or Routes({}, {}, {}, {}), patience, host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        if not 0 <= port < 1 << 16:
            raise ValueError("--port is a number from 0 to 65535; 0 takes any that is free.")
        try:
            super().__init__((host, port), Handler)
        except socket.gaierror:
            raise ValueError(f"--host {host} is no address of this machine.") from None
        except OSError as error:
            raise ValueError(
                f"port {port} at {host} cannot be had ({error.strerror}): choose another with --port, "
                "or --port 0 for any that is free."
            ) from None

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own would ask the network for this machine's name
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.host in ANYWHERE else f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}"

    def knows(self, name: str) -> bool:
        """Is this one of the names that the demo goes by? Open to all addresses, it cannot know its own: then any
        address will do, since one cannot be pointed elsewhere, but of names only this machine's."""
        if name in LOCAL or name == self.host.lower():
            return True
        if self.host not in ANYWHERE:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name == socket.gethostname().lower()
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is."""
        if not isinstance(sys.exception(), OSError):
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    """One request on one connection (HTTP/1.0, so that no rest of a refused body is taken for the next request)."""

    server: Server
    default_request_version = "HTTP/1.0"  # a status line also for what is no HTTP
    unread = False
    """Is a body, or a part of it, still to come?"""

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.patience)

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self.unread = True
        self._answer(self._post)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses by itself: broken requests, and methods that there are not."""
        if code == http.HTTPStatus.NOT_IMPLEMENTED:
            self._send(_told(Refusal(405, "this method is not known here: use GET or POST.")))
        else:
            self._send(_told(Refusal(code, f"this is no request that can be read ({http.HTTPStatus(code).phrase}).")))

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal belongs to the user; only failures are told there."""

    def version_string(self) -> str:
        return "silc"

    # ---------------------------------------------------------------- answers

    def _answer(self, work: Callable[[], Reply]) -> None:
        try:
            self._check_sender()
            reply = work()
        except Refusal as refusal:
            reply = _told(refusal)
        except ValueError as error:
            reply = _told(Refusal(400, str(error)))
        except TimeoutError:
            reply = _told(Refusal(408, "the request took too long to arrive."))
        except OSError:
            raise  # the client is gone
        except Exception:  # one broken answer must not end the demo
            traceback.print_exc()
            reply = _told(Refusal(500, "this could not be answered: the terminal of the demo says why."))
        self._send(reply)

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        about = {"Content-Type": reply.kind, "Content-Length": str(len(reply.body)),
                 "Content-Security-Policy": reply.policy, **HEADERS}  # fmt: skip
        if reply.status == 405:
            about["Allow"] = "POST" if getattr(self, "path", "") in self.server.routes.posts else "GET"
        for name, value in about.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)
        self.close_connection = True
        if self.unread:
            self._swallow()

    def _swallow(self) -> None:
        """Read what still comes of a refused body: closing over it would make the system cut off the answer too."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(min(2.0, self.server.patience))
        end, left = time.monotonic() + self.server.patience, 2 * LARGEST
        while left > 0 and time.monotonic() < end and (part := self.rfile.read1(1 << 16)):
            left -= len(part)

    # ---------------------------------------------------------------- requests

    def _check_sender(self) -> None:
        hosts = self.headers.get_all("Host", [])
        try:
            name = (urlsplit(f"//{hosts[0]}").hostname or "") if len(hosts) == 1 else ""
        except ValueError:
            name = ""
        if not self.server.knows(name):
            raise Refusal(403, f"the demo does not go by this name: open {self.server.url}")
        origin = self.headers.get("Origin")
        own = origin is None or origin.lower() == f"http://{hosts[0]}".lower()
        # a link from elsewhere may open the page, and nothing else
        foreign = self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and self.path != "/"
        if not own or foreign:
            raise Refusal(403, "another site may not ask the demo.")

    def _get(self) -> Reply:
        routes, numbered = self.server.routes, NUMBERED.fullmatch(self.path)
        if self.path in routes.pages:
            return routes.pages[self.path]()
        if numbered and numbered[1] in routes.numbered:
            return routes.numbered[numbered[1]](int(numbered[2]))
        if self.path in routes.posts:
            raise Refusal(405, "this is asked by POST.")
        raise Refusal(404, "there is nothing here.")

    def _post(self) -> Reply:
        routes = self.server.routes
        upload, question = routes.uploads.get(self.path), routes.questions.get(self.path)
        if upload:
            return as_json(upload(self._body("application/octet-stream", LARGEST)))
        if question:
            return as_json(question(_parsed(self._body("application/json", LONGEST))))
        numbered = NUMBERED.fullmatch(self.path)
        known = self.path in routes.pages or (numbered and numbered[1] in routes.numbered)
        raise Refusal(405, "this is asked by GET.") if known else Refusal(404, "there is nothing here.")

    def _body(self, kind: str, most: int) -> bytes:
        if self.headers.get_content_type() != kind:
            raise Refusal(415, f"this must be sent as {kind}.")
        lengths = self.headers.get_all("Content-Length", [])
        if not lengths or "Transfer-Encoding" in self.headers:
            raise Refusal(411, "the request must tell its length.")
        if len(lengths) > 1 or not re.fullmatch("[0-9]{1,15}", lengths[0]):
            raise Refusal(400, "the length of the request is no number.")
        left = int(lengths[0])
        if left > most:
            raise Refusal(413, f"this is too large: at most {most >> 20} MB." if most >> 20 else "this is too long.")
        parts, end = [], time.monotonic() + 3 * self.server.patience
        while left:
            part = self.rfile.read1(min(left, 1 << 16))
            if not part:
                raise ConnectionError("the client left in the middle of its request")
            if time.monotonic() > end:
                raise TimeoutError
            parts.append(part)
            left -= len(part)
        self.unread = False
        return b"".join(parts)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "the question is no JSON.") from None
    if not isinstance(found, dict):
        raise Refusal(400, "the question must be a JSON object.")
    return found


def as_json(value: dict[str, Any], status: int = 200) -> Reply:
    return Reply(json.dumps(value).encode(), "application/json", status=status)


def _told(refusal: Refusal) -> Reply:
    return as_json({"error": refusal.sentence}, refusal.status)
