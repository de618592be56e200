"""The demo: what the page is sent is what the Predictor says, who may ask and how, and the page itself in a browser.

Gives: tests of `silc demo`.
Used by: pytest. The last part skips without Chromium or the package playwright.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw
from PIL import Image

import silc
from silc.app import demo
from silc.app.demo import Demo
from silc.app.demo_examples import EXAMPLES
from silc.app.demo_server import LARGEST, LONGEST, Routes, Server
from silc.app.searching import Index
from silc.cli import main
from silc.config import CatSegConfig, ImageTowerConfig, ModelConfig, PreprocessConfig, TextTowerConfig
from silc.data.tokenizer import byte_tokenizer
from silc.model.silc import Silc

HOSTILE = "<img src=x onerror=alert(1)>.png"
TEXTS = ["a panda", "a strawberry", "the sky"]


def serving(routes: Routes, patience: float = 20.0, host: str = "127.0.0.1") -> Server:
    server = Server(host, 0, routes, patience)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("photos")
    (home / "in").mkdir()
    for name, colour in ((HOSTILE, "red"), ("blue.png", "blue"), ("in/green.png", "green")):
        draw(colour, "circle", 200, (96, 64)).save(home / name)
    return home


@pytest.fixture(scope="module")
def held(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    model = silc.load("small")
    return Demo(model, "small", Index.of(model, folder, cache=tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def server(held: Demo) -> Iterator[Server]:
    made = serving(held.routes())
    yield made
    made.shutdown()
    made.server_close()


def request(
    server: Server, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """With `_` for `-` in the names of headers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body or None, {k.replace("_", "-"): v for k, v in headers.items()})
    reply = connection.getresponse()
    found = reply.status, reply.headers, reply.read()
    connection.close()
    return found


def ask(server: Server, path: str, **question: Any) -> dict[str, Any]:
    status, _, body = request(server, "POST", path, json.dumps(question).encode(), Content_Type="application/json")
    found = json.loads(body)
    assert status == 200, found
    return found


def refused(server: Server, path: str, body: bytes, kind: str = "application/json") -> tuple[int, str]:
    status, _, said = request(server, "POST", path, body, Content_Type=kind)
    return status, json.loads(said)["error"]


def send(server: Server, picture: Image.Image) -> str:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    kind = "application/octet-stream"
    status, _, body = request(server, "POST", "/picture", buffer.getvalue(), Content_Type=kind)
    found = json.loads(body)
    assert status == 200 and (found["width"], found["height"]) == picture.size
    return found["picture"]


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["data"]), packed["type"]).reshape(packed["shape"])


def example(number: int = 0) -> Image.Image:
    return Image.open(BytesIO(demo.example(number).body)).convert("RGB")


# ---------------------------------------------------------------- the same numbers as the Predictor's


@pytest.mark.parametrize("detail", [1, 2])
def test_maps_are_those_of_the_predictor(server: Server, held: Demo, detail: int) -> None:
    picture = example()
    found = ask(server, "/heat", picture=send(server, picture), texts=TEXTS, detail=detail)
    maps = torch.from_numpy(unpacked(found["maps"]).copy())
    assert list(maps.shape) == [3, *found["grid"]] and found["texts"] == TEXTS and 0 < found["seconds"] < 60
    assert maps.element_size() * maps.numel() < 10_000
    wide = F.interpolate(maps[None], picture.size[::-1], mode="bilinear", align_corners=False)[0]
    wanted = held.predictor.heatmap(picture, TEXTS, how=held._protocol(detail))
    torch.testing.assert_close(wide, wanted, atol=1e-5, rtol=0)
    if detail == 1:
        torch.testing.assert_close(wanted, held.predictor.heatmap(picture, TEXTS), atol=1e-5, rtol=0)


def test_patches_are_told_apart_as_their_features_are(server: Server, held: Demo) -> None:
    picture = example(1)
    found = ask(server, "/patches", picture=send(server, picture), detail=2)
    features = unpacked(found["features"]).astype(np.float64)
    exact = held.predictor.answer(picture, held.predictor.question(["x"], how=held._protocol(2))).seen.features[0]
    exact = exact.flatten(1).T.double().numpy()
    assert features.shape == exact.shape and len(exact) == found["grid"][0] * found["grid"][1]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    assert np.abs(features @ features.T - exact @ exact.T).max() < 0.01

    colours = unpacked(found["colours"]).astype(np.float64)
    left, spread, _ = np.linalg.svd(exact - exact.mean(0), full_matrices=False)
    assert found["shares"] == pytest.approx((spread**2 / (spread**2).sum())[:3].tolist(), abs=1e-6)
    for c in range(3):  # a colour follows its direction, but for the outermost patches
        assert np.corrcoef(colours[:, c], left[:, c] * np.sign(left[np.abs(left[:, c]).argmax(), c]))[0, 1] > 0.98
    flat, none = demo.main_directions(torch.ones(1, 8))
    assert flat.tolist() == [[0, 0, 0]] and none == [0, 0, 0]


def test_labels_are_those_of_the_predictor_with_and_without_a_background(server: Server, held: Demo) -> None:
    picture, names = example(5), ["mushroom", "balloon", "panda"]
    small = picture.resize((240, 180))
    found = ask(server, "/segment", picture=send(server, small), texts=names, detail=2)
    label, score = unpacked(found["label"]), unpacked(found["score"]) / 255
    how = held._protocol(2)
    assert (label == held.predictor.segment(small, names, how=how).numpy()).all() and len(set(label.ravel())) > 1
    assert found["ruled"] and len(found["colours"]) == 3
    floor = float(np.median(score)) + 1e-3
    ruled = held.predictor.segment(small, ["background", *names], how=how, background=floor).numpy()
    sure = np.abs(score - floor) > 1 / 255
    assert (np.where(score < floor, 0, label + 1.0) == ruled)[sure].all() and sure.mean() > 0.1
    assert not ask(server, "/segment", picture=send(server, small), texts=["house"], detail=1)["ruled"]
    assert max(ask(server, "/segment", picture=send(server, picture), texts=names)["label"]["shape"]) == demo.SIDE


def test_scores_are_those_of_the_predictor(server: Server, held: Demo) -> None:
    wanted = held.predictor.classify(example(2), TEXTS)[0]
    found = ask(server, "/classify", picture=send(server, example(2)), texts=TEXTS)["scores"]
    assert [row.pop("text") for row in found] == list(wanted) and found == list(wanted.values())


def test_search_finds_what_the_index_finds_by_number(server: Server, held: Demo, folder: Path) -> None:
    assert held.index
    hits = ask(server, "/search", texts=["a red circle"])["hits"]
    assert [(h["name"], h["cosine"]) for h in hits] == [(h.path, h.cosine) for h in held.index.find("a red circle")]
    for hit in hits:
        status, headers, body = request(server, "GET", f"/pictures/{hit['number']}")
        assert status == 200 and headers["Content-Type"] == "image/png" and body == (folder / hit["name"]).read_bytes()
        thumb = Image.open(BytesIO(request(server, "GET", f"/thumbs/{hit['number']}")[2]))
        assert thumb.format == "WEBP" and max(thumb.size) <= 420
    examples = held.about()["examples"]
    assert {e["name"] for e in examples[len(EXAMPLES) :]} == {HOSTILE, "blue.png", "in/green.png"}


def test_a_picture_goes_through_the_model_once_and_is_asked_for_again_when_it_was_let_go(
    held: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    dense = held.predictor.model.encode_dense
    monkeypatch.setattr(held.predictor.model, "encode_dense", lambda *a: passes.append(1) or dense(*a))
    new = Demo(held.predictor.model, "small")
    server = serving(new.routes())
    key = send(server, draw("red", "square", 3))
    for path, question in (("/heat", {"texts": ["a"]}), ("/patches", {}), ("/segment", {"texts": ["a", "b"]})):
        ask(server, path, picture=key, detail=2, **question)
    assert len(passes) == 1
    for shade in range(demo.PICTURES):
        send(server, draw("red", "square", shade + 10))
    body = json.dumps({"picture": key, "texts": ["a"]}).encode()
    assert refused(server, "/heat", body) == (410, "the demo does not hold this picture: send it again.")
    assert len(new.files) == demo.PICTURES
    assert request(server, "POST", "/search", b"{}", Content_Type="application/json")[0] == 404  # no folder
    server.shutdown()
    server.server_close()


def test_a_trained_head_answers_what_is_where() -> None:
    head = CatSegConfig(width=16, layers=1, heads=2, window=4, classes=6, decoder=(16, 16), guides=(12, 10),
                        guide_widths=(4, 3))  # fmt: skip
    tokenizer = byte_tokenizer(12)
    torch.manual_seed(0)
    model = Silc(ModelConfig(
        image=ImageTowerConfig(image_size=32, patch=8, width=16, depth=3, heads=2, mlp=16),
        text=TextTowerConfig(vocab=tokenizer.vocab, length=12, width=16, depth=1, heads=2, mlp=16),
        preprocess=PreprocessConfig(size=32), embed_dim=16, catseg=head,
    )).eval()  # fmt: skip
    model.tokenizer = tokenizer
    one = Demo(model, "headed")
    picture = draw("red", "square", 3)
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    key = one.receive(buffer.getvalue())["picture"]
    found = one.segment({"picture": key, "texts": ["red", "blue"]})
    assert (unpacked(found["label"]) == one.predictor.segment(picture, ["red", "blue"]).numpy()).all()
    wanted = one.predictor.scores(picture, ["red", "blue"]).amax(0).numpy()
    assert np.abs(unpacked(found["score"]) / 255 - wanted).max() < 1 / 255 and found["grid"] is None
    assert one.segment({"picture": key, "texts": ["red"]})["ruled"] and one.about()["head"]
    assert len(unpacked(one.heat({"picture": key, "texts": ["red"], "detail": 1})["maps"])) == 1


# ---------------------------------------------------------------- what it refuses


def test_the_page_is_one_file_that_may_fetch_from_its_own_server_alone(server: Server) -> None:
    status, headers, body = request(server, "GET", "/")
    page, policy = body.decode(), headers["Content-Security-Policy"]
    assert status == 200 and not re.search(r"https?://|@import|url\(|<link[^>]+stylesheet|<script[^>]+src", page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert {rules[name] for name in ("default-src", "frame-ancestors", "form-action", "base-uri")} == {"'none'"}
    assert rules["connect-src"] == "'self'" and "unsafe" not in policy
    assert rules["img-src"] == "'self' blob: data:" and rules["script-src"].startswith("'sha256-")
    for path in ("/", "/about", "/examples/0", "/thumbs/0", "/nothing"):
        headers = request(server, "GET", path)[1]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
        assert headers["X-Frame-Options"] == "DENY" and headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Server"] == "silc"
        assert "Access-Control-Allow-Origin" not in headers
    assert "&lt;b&gt;" in demo.page("<b>").body.decode() and "<b>" not in demo.page("<b>").body.decode().split("<p")[0]


@pytest.mark.parametrize("path", [
    "/../pyproject.toml", "/pictures/../../etc/passwd", "/pictures/%2e%2e/%2e%2e/etc/passwd", "/pictures//etc/passwd",
    "/etc/passwd", "//etc/passwd", "/pictures/blue.png", "/pictures/-1", "/pictures/3", "/pictures/0/",
    "/pictures/0x1", "/pictures/999999999999", "/examples/99", "/thumbs/1e0", "/pictures/٣".encode().decode("latin-1"),
    "/?x=/etc/passwd", "http://127.0.0.1/about", "/ABOUT", "/templates/demo.html", "/pictures/0%00",
])  # fmt: skip
def test_no_path_of_a_request_reaches_a_file(server: Server, path: str) -> None:
    status, said = raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode("latin-1"))
    assert status == 404 and "root:" not in said


def raw(server: Server, message: bytes, patience: float = 20) -> tuple[int, str]:
    """What comes back for these bytes; status 0 for nothing."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=patience) as link:
        link.sendall(message)
        parts = []
        while part := link.recv(1 << 16):
            parts.append(part)
    said = b"".join(parts).decode("latin-1")
    return int(said.split(" ", 2)[1]) if said.startswith("HTTP/") else 0, said


@pytest.mark.parametrize("host, status", [
    ("localhost", 200), ("LocalHost:9000", 200), ("127.0.0.1:7860", 200), ("[::1]:7860", 200), ("evil.example", 403),
    ("evil.example:7860", 403), ("localhost.evil.example", 403), ("192.168.0.1", 403), ("", 403), ("[::1", 403),
    ("localhost\r\nHost: evil.example", 403), ("127.0.0.1@evil.example", 403),
])  # fmt: skip
def test_only_this_machines_names_are_answered(server: Server, host: str, status: int) -> None:
    for path in ("/", "/about", "/thumbs/0"):
        assert raw(server, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())[0] == status
    assert raw(server, b"GET /about HTTP/1.0\r\n\r\n")[0] == 403


def test_open_to_all_addresses_it_takes_addresses_but_no_foreign_names(held: Demo) -> None:
    server = serving(held.routes(), host="0.0.0.0")
    for host, status in (("192.168.0.7:7860", 200), ("localhost", 200), ("evil.example", 403)):
        assert raw(server, f"GET /about HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())[0] == status
    assert server.url.startswith("http://127.0.0.1:")
    server.shutdown()
    server.server_close()


def test_other_sites_may_not_ask(server: Server) -> None:
    key, own = send(server, example()), f"127.0.0.1:{server.server_port}"
    body = json.dumps({"picture": key, "texts": ["a"]}).encode()

    def status(**headers: str) -> int:
        return request(server, "POST", "/heat", body, Content_Type="application/json", **headers)[0]

    assert status() == 200 and status(Origin=f"http://{own}", Sec_Fetch_Site="same-origin") == 200
    foreign = ("http://evil.example", "null", "http://127.0.0.1:1", f"https://{own}", f"http://{own}.evil.example", "")
    assert {status(Origin=origin) for origin in foreign} == {403}
    assert status(Sec_Fetch_Site="cross-site") == status(Sec_Fetch_Site="same-site") == 403
    # a page elsewhere may neither show a picture nor send a form, which browsers let through unasked
    assert request(server, "GET", "/thumbs/0", Sec_Fetch_Site="cross-site")[0] == 403
    assert request(server, "GET", "/", Sec_Fetch_Site="cross-site")[0] == 200
    assert request(server, "POST", "/heat", body, Content_Type="text/plain")[0] == 415
    assert request(server, "OPTIONS", "/heat", Origin="http://evil.example")[0] == 405


def test_methods_and_routes_that_there_are_not(server: Server) -> None:
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "CONNECT", "XYZ"):
        assert request(server, method, "/about")[0] == 405
    status, headers, _ = request(server, "GET", "/heat")
    assert status == 405 and headers["Allow"] == "POST"
    for path in ("/", "/about", "/examples/0"):
        status, headers, _ = request(server, "POST", path, b"{}", Content_Type="application/json")
        assert status == 405 and headers["Allow"] == "GET"
    assert refused(server, "/nothing", b"{}")[0] == 404


POST = b"POST /heat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BROKEN = {
    "no length": (POST + b"\r\n", 411),
    "chunks": (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 9\r\n\r\n{}", 400),
    "negative length": (POST + b"Content-Length: -1\r\n\r\n", 400),
    "length in words": (POST + b"Content-Length: two\r\n\r\n{}", 400),
    "endless length": (POST + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n", 400),
    "too long": (POST + b"Content-Length: %d\r\n\r\n" % (LONGEST + 1), 413),
    "too large a picture": (POST.replace(b"/heat", b"/picture").replace(b"json", b"octet-stream")
                            + b"Content-Length: %d\r\n\r\n" % (LARGEST + 1), 413),
    "no request": (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    "no version": (b"GET / HTTP/x\r\n\r\n", 400),
    "too long a line": (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
    "too many headers": (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
    "nothing": (b"\r\n\r\n", 0),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_requests_are_refused_and_the_server_goes_on(server: Server, what: str) -> None:
    message, wanted = BROKEN[what]
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as link:
        link.sendall(message)
        link.shutdown(socket.SHUT_WR)
        said = link.makefile("rb").read().decode()
    assert (int(re.search(r"HTTP/1.0 (\d+)", said)[1]) if said else 0) == wanted  # type: ignore[index]
    assert not said or json.loads(said.split("\r\n\r\n")[1])["error"].endswith((".", ")."))
    assert request(server, "GET", "/about")[0] == 200


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"1", b"\xff\xfe\xff", b"[" * 60_000, b"1" * 60_000, b'{"texts": "a"}', b'{"texts": [1]}',
    b'{"texts": []}', b'{"texts": [" "]}', b'{"texts": ["\\ud800"]}',
    json.dumps({"texts": ["a" * 201]}).encode(), json.dumps({"texts": [str(i) for i in range(33)]}).encode(),
], ids=str)  # fmt: skip
def test_broken_questions_are_told_in_a_sentence(server: Server, body: bytes) -> None:
    for path in ("/heat", "/segment", "/classify", "/search"):
        status, said = refused(server, path, body)
        assert status == 400 and said[-1] == "."


def test_questions_about_a_picture_are_checked_too(server: Server) -> None:
    key = send(server, example())
    for wrong in ({"detail": 3}, {"detail": True}, {"detail": "2"}, {"texts": ["a", "a"]}):
        assert refused(server, "/heat", json.dumps({"picture": key, "texts": ["a"], **wrong}).encode())[0] == 400
    for picture in (None, 1, ["x"], "../../etc/passwd", "0" * 64):
        assert refused(server, "/heat", json.dumps({"picture": picture, "texts": ["a"]}).encode())[0] == 410


def test_a_grid_too_fine_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    key = send(server, draw("blue", "square", 9, (200, 50)))
    monkeypatch.setattr(demo, "PATCHES", 100)
    status, said = refused(server, "/patches", json.dumps({"picture": key, "detail": 4}).encode())
    assert status == 400 and "16 x 64 patches" in said


def picture_bytes(size: tuple[int, int]) -> bytes:
    buffer = BytesIO()
    Image.new("1", size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("make, why", [
    (lambda: b"no picture", "not an image"), (lambda: demo.example(0).body[:3000], "truncated"),
    (lambda: picture_bytes((20_000, 6000)), "too large"), (lambda: b"<svg xmlns='x'/>", "not an image"),
], ids=["text", "cut", "pixels", "svg"])  # fmt: skip
def test_a_broken_picture_is_told_in_a_sentence(server: Server, make: Callable[[], bytes], why: str) -> None:
    said = refused(server, "/picture", make(), "application/octet-stream")
    assert said == (400, f"this file cannot be read as a picture ({why}).")


def test_a_picture_that_went_or_grew_since_the_index(held: Demo, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert held.index
    server, number = serving(held.routes()), list(held.index.paths).index("blue.png")
    kept = (folder / "blue.png").read_bytes()
    try:
        (folder / "blue.png").write_bytes(b"<html>")
        assert request(server, "GET", f"/pictures/{number}")[0] == 404
        (folder / "blue.png").unlink()
        assert request(server, "GET", f"/pictures/{number}")[0] == 404
    finally:
        (folder / "blue.png").write_bytes(kept)
    monkeypatch.setattr(demo, "LARGEST", 10)
    assert request(server, "GET", f"/pictures/{number}")[0] == 413
    server.shutdown()
    server.server_close()


def test_a_refused_upload_still_hears_why(server: Server) -> None:
    """A client that sends all before it listens must not find the line cut off."""
    head = b"POST /picture HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
    status, said = raw(server, head + b"Content-Length: %d\r\n\r\n" % (LARGEST + 1) + bytes(LARGEST + 1))
    assert status == 413 and "at most 32 MB" in said


def test_slow_and_vanishing_clients_hold_nobody_up(
    server: Server, held: Demo, capfd: pytest.CaptureFixture[str]
) -> None:
    begun = POST + b"Content-Length: 100\r\n\r\n{"
    patient = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(20)]
    patient[0].sendall(begun)
    assert request(server, "GET", "/about")[0] == 200
    for link in patient:
        link.close()

    strict = serving(held.routes(), patience=0.3)
    silent, slow = (socket.create_connection(("127.0.0.1", strict.server_port), timeout=60) for _ in range(2))
    slow.sendall(begun)
    assert b" 408 " in slow.makefile("rb").readline()
    assert silent.recv(1) == b""  # hung up on
    silent.close()
    slow.close()
    strict.shutdown()
    strict.server_close()
    assert "Traceback" not in capfd.readouterr().err


def test_a_failure_is_told_and_the_server_goes_on(
    server: Server, held: Demo, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: Any) -> None:
        raise RuntimeError("secret of the inside")

    key = send(server, example(4))
    with monkeypatch.context() as patch:
        patch.setattr(held.predictor, "classify", fail)
        status, said = refused(server, "/classify", json.dumps({"picture": key, "texts": ["a"]}).encode())
    assert status == 500 and "secret" not in said and "secret of the inside" in capfd.readouterr().err
    assert ask(server, "/classify", picture=key, texts=["a"])["scores"]


# ---------------------------------------------------------------- the command


def heard() -> None:
    """A job that a shell put into the background ignores SIGINT, and what it starts does too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "a service manager"])
def test_the_command_ends_with_one_line(ending: signal.Signals) -> None:
    command = [sys.executable, "-m", "silc", "demo", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    assert process.stdout
    line = process.stdout.readline()
    found = re.match(r"http://127\.0\.0\.1:(\d+)   shows what small sees", line)
    assert found, line
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20)
    connection.request("GET", "/about")
    about = json.loads(connection.getresponse().read())
    assert about["model"] == "small" and "toy" in about["limits"] and about["detail"] == 2 and not about["pictures"]
    process.send_signal(ending)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip(), err) == (0, "The demo has ended.", "")


def test_mistakes_on_the_command_line_are_one_sentence(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistakes = {
        ("--port", str(server.server_port)): "choose another with --port",
        ("--port", "70000"): "from 0 to 65535",
        ("--host", "no such host", "--port", "0"): "--host no such host",
        ("--pictures", str(tmp_path / "nowhere")): "nowhere",
        ("no-such-model",): "no-such-model",
    }
    for given, said in mistakes.items():
        with pytest.raises(SystemExit) as stop:
            main(["demo", *given])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and said in err and len(err.strip().splitlines()) == 1


def test_another_host_is_warned_of_and_the_browser_opened_if_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: Server) -> None:
        raise KeyboardInterrupt

    opened: list[str] = []
    monkeypatch.setattr(Server, "serve_forever", interrupt)
    monkeypatch.setattr(demo.webbrowser, "open", opened.append)
    main(["demo", "--port", "0", "--host", "0.0.0.0"])
    told = capsys.readouterr()
    assert told.err == "Warning: whoever reaches 0.0.0.0 can use the demo; there is no password.\n" and not opened
    main(["demo", "small", "--port", "0", "--open"])
    told = capsys.readouterr()
    assert not told.err and told.out.startswith(opened[0]) and "The demo has ended." in told.out


# ---------------------------------------------------------------- in a browser

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="playwright is not installed: pip install 'silc[dev]'")
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium or Chrome on this machine: apt-get install chromium")
    with sync_playwright() as play:
        made = play.chromium.launch(executable_path=found, args=FLAGS)
        yield made
        made.close()


class Visit:
    """The page in a context of its own, and what went wrong meanwhile."""

    def __init__(self, browser: Any, server: Server, scheme: str = "light", wide: int = 1280) -> None:
        self.context = browser.new_context(color_scheme=scheme, viewport={"width": wide, "height": 900})
        self.page, self.complaints, self.hosts = self.context.new_page(), [], set()
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("request", lambda r: self.hosts.add(r.url.split("/")[2]) if r.url.startswith("http") else None)
        self.page.set_default_timeout(20_000)
        self.own = server.url.split("/")[2]
        self.page.goto(server.url)
        self.page.wait_for_selector("#heats button")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None:
        self.context.close()
        if error[0] is None:
            assert not self.complaints and self.hosts == {self.own}

    def drawn(self, canvas: str = "view") -> str:
        return self.page.evaluate(f"document.getElementById('{canvas}').toDataURL()")

    def tab(self, name: str, until: str) -> None:
        self.page.click(f"#tab-{name}")
        self.page.wait_for_selector(until)

    def hover(self, x: float, y: float, canvas: str = "#view") -> None:
        box = self.page.locator(canvas).bounding_box()
        self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])

    def until(self, condition: str) -> None:
        """Playwright's own way to wait for a condition evaluates text, which the page's policy forbids."""
        end = time.monotonic() + 20
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, f"this did not come true: {condition}"
            time.sleep(0.05)

    def text(self, where: str) -> str:
        return self.page.inner_text(where)


def test_where_is_it(browser: Any, server: Server, held: Demo) -> None:
    with Visit(browser, server) as visit:
        page = visit.page
        assert page.title() == "What small sees" and "toy" in visit.text("#limits")
        first = visit.drawn()
        page.get_by_role("button", name=EXAMPLES[2].name).click()
        visit.until("document.getElementById('heats').textContent.includes('a house')")
        second = visit.drawn()
        page.fill("#texts", "a house, <b>bold</b>")
        page.press("#texts", "Enter")
        visit.until("document.querySelector('#heats').innerText.includes('bold')")
        assert len({first, second, visit.drawn()}) == 3
        picture, how = example(2), held._protocol(2)
        maps = held.predictor.heatmap(picture, ["a house", "<b>bold</b>"], how=how)
        grid = unpacked(held.heat({"picture": send(server, picture), "texts": ["a house", "<b>bold</b>"], "detail": 2})
                        ["maps"])  # fmt: skip
        assert page.locator("#heats small").all_inner_texts() == [f"{m.min():.2f} to {m.max():.2f}" for m in grid]
        assert page.locator("#heats b").all_inner_texts() == ["a house", "<b>bold</b>"]
        visit.hover(0.7, 0.6)
        shown = [float(text) for text in page.locator("#heats span").all_inner_texts()]
        assert shown == pytest.approx(maps[:, int(0.6 * 480), int(0.7 * 640)].tolist(), abs=0.02)
        assert page.is_visible("#mark") and f"{shown[0]:.3f}" in visit.text("#readout")
        for change in (lambda: page.locator("#heats button").nth(1).click(), lambda: page.fill("#opacity", "0"),
                       lambda: page.fill("#opacity", "100"), lambda: page.uncheck("#smooth")):  # fmt: skip
            before = visit.drawn()
            change()
            assert visit.drawn() != before
        page.select_option("#detail", "4")
        visit.until("document.getElementById('status').textContent.includes('16 × 21 patches')")
        with page.expect_download() as saved:
            page.click("#save")
        assert saved.value.suggested_filename == "A-house-by-a-tree-b-bold-b.png"
        assert Image.open(saved.value.path()).size == (800, 600)


def test_what_looks_like_this(browser: Any, server: Server, held: Demo) -> None:
    with Visit(browser, server) as visit:
        page = visit.page
        visit.tab("alike", "#directions:not(:empty)")
        page.wait_for_timeout(100)
        before, colours = visit.drawn(), visit.drawn("colours")
        visit.hover(0.7, 0.55)
        after = visit.drawn()
        assert after != before and visit.drawn("colours") != colours  # the patch is outlined on both
        grid = unpacked(held.patches({"picture": send(server, example()), "detail": 2})["features"]).astype(float)
        grid /= np.linalg.norm(grid, axis=1, keepdims=True)
        at = 4 * 8 + 5
        like = np.delete(grid @ grid[at], at)
        assert "Patch 5, 6" in visit.text("#readout") and f"by {like.max():.3f}" in visit.text("#readout")
        assert visit.text("#low") == f"{(grid @ grid[at]).min():.2f}" and visit.text("#high") == "1.00"
        page.mouse.down()
        page.mouse.up()
        visit.hover(0.2, 0.2, "#colours")
        assert visit.drawn() == after and "Held" in visit.text("#readout")
        page.focus("#view")
        for key in ("Enter", "ArrowUp", "ArrowLeft"):
            page.keyboard.press(key)
        assert "Patch 4, 5" in visit.text("#readout") and visit.drawn() != after


def test_a_picture_that_is_slow_to_come_is_waited_for_and_the_last_one_chosen_stays(
    browser: Any, server: Server, held: Demo
) -> None:
    with Visit(browser, server) as visit:
        page, waiting = visit.page, []
        page.route("**/picture", lambda route: waiting.append(route), times=1)
        page.get_by_role("button", name=EXAMPLES[5].name).click()
        page.click("#tab-parts")  # a question while the picture is under way
        visit.until("document.body.classList.contains('busy')")
        assert not page.locator("#classes button").count()
        waiting[0].continue_()
        page.wait_for_selector("#classes button")
        assert sorted(page.locator("#classes b").all_inner_texts()) == ["balloon", "mushroom", "panda"]
        label = unpacked(held.segment({"picture": send(server, example(5)), "detail": 2,
                                       "texts": ["mushroom", "balloon", "panda"]})["label"])  # fmt: skip
        shares = sorted((100 * np.bincount(label.ravel(), minlength=3) / label.size).tolist(), reverse=True)
        assert page.locator("#classes span").all_inner_texts() == [f"{share:.1f}%" for share in shares]

        waiting.clear()
        page.route("**/examples/1", lambda route: waiting.append(route), times=1)
        page.get_by_role("button", name=EXAMPLES[1].name).click()  # slow, and thought better of
        page.get_by_role("button", name=EXAMPLES[3].name).click()
        chosen = "document.querySelector('[data-url][aria-pressed=true]').title"
        visit.until(f"{chosen} === '{EXAMPLES[3].name}'")
        waiting[0].continue_()
        page.wait_for_timeout(300)
        assert page.evaluate(chosen) == EXAMPLES[3].name and not page.evaluate("document.body.classList.length")


def test_what_is_where_and_what_is_it(browser: Any, server: Server, held: Demo) -> None:
    with Visit(browser, server) as visit:
        page = visit.page
        page.get_by_role("button", name=EXAMPLES[5].name).click()
        visit.tab("parts", "#classes button")
        page.fill("#labels", "mushroom, balloon, panda")
        page.press("#labels", "Enter")
        visit.until("document.querySelector('#classes').innerText.includes('panda')")
        label = unpacked(held.segment({"picture": send(server, example(5)), "detail": 2,
                                       "texts": ["mushroom", "balloon", "panda"]})["label"])  # fmt: skip
        shares = sorted((100 * np.bincount(label.ravel(), minlength=3) / label.size).tolist(), reverse=True)
        assert page.locator("#classes span").all_inner_texts() == [f"{share:.1f}%" for share in shares]
        before = visit.drawn()
        page.locator("#classes button").first.hover()
        assert visit.drawn() != before
        visit.hover(0.5, 0.5)
        assert re.fullmatch(r"(mushroom|balloon|panda): \d+%", visit.text("#readout"))
        page.fill("#floor", "70")
        assert "70%" in visit.text("#floor-value") and "none of them" in visit.text("#classes")
        visit.tab("what", "#scores li")
        page.fill("#names", "mushroom, dog")
        page.press("#names", "Enter")
        visit.until("document.querySelector('#scores').innerText.includes('dog')")
        scores = held.predictor.classify(example(5), ["mushroom", "dog"])[0]
        wanted = [f"{100 * score['probability']:.1f}%" for score in scores.values()]
        assert page.locator("#scores span").all_inner_texts() == wanted
        assert page.locator("#scores b").all_inner_texts() == list(scores) and page.is_hidden("#save")


def test_own_pictures_search_and_errors(browser: Any, server: Server, tmp_path: Path) -> None:
    draw("blue", "triangle", 90, (120, 80)).save(tmp_path / "mine.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with Visit(browser, server) as visit:
        page = visit.page
        before = visit.drawn()
        page.set_input_files("#file", tmp_path / "mine.png")
        visit.until("document.getElementById('view').height === 533")
        page.wait_for_selector("#heats button")
        assert visit.drawn() != before
        page.set_input_files("#file", tmp_path / "broken.png")
        page.wait_for_selector("#error:not([hidden])")
        assert visit.text("#error") == "This file cannot be read as a picture (not an image)."
        assert len(visit.complaints) == 1 and "400" in visit.complaints.pop()  # the browser's own note of it
        visit.tab("search", "#folder:not(:empty)")
        page.fill("#query", "a red circle")
        page.press("#query", "Enter")
        page.wait_for_selector("#hits button")
        names = page.locator("#hits button").evaluate_all("all => all.map(one => one.title)")
        assert set(names) == {HOSTILE, "blue.png", "in/green.png"} and page.is_hidden("#error")
        assert page.locator("[onerror]").count() == 0
        page.locator("#hits button").nth(names.index(HOSTILE)).click()
        page.wait_for_selector("#hits [aria-pressed=true]")
        # dropped and pasted pictures come in the same way; an address does not
        page.evaluate("""() => {
          const bring = (type, name, fill) => {
            const data = new DataTransfer(); fill(data);
            document.dispatchEvent(Object.assign(new Event(type, { cancelable: true }), { [name]: data }));
          };
          bring("drop", "dataTransfer", (data) => data.setData("text/uri-list", "http://evil.example/x.png"));
        }""")
        visit.until("document.getElementById('error').textContent.includes('opens no addresses')")
        page.evaluate("""async () => {
          const blob = await new Promise((done) => document.getElementById("colours").toBlob(done));
          const data = new DataTransfer(); data.items.add(new File([blob], "pasted.png", { type: "image/png" }));
          document.dispatchEvent(Object.assign(new Event("paste"), { clipboardData: data }));
        }""")
        page.wait_for_selector("#error", state="hidden")


def test_a_picture_that_was_let_go_is_sent_again_and_an_end_is_told(browser: Any, held: Demo) -> None:
    one = Demo(held.predictor.model, "small")
    server = serving(one.routes())
    with Visit(browser, server) as visit:
        one.files.clear()
        visit.tab("alike", "#directions:not(:empty)")
        assert len(one.files) == 1 and "410" in visit.complaints.pop()
        assert visit.page.is_hidden("#tab-search")
        server.shutdown()
        server.server_close()
        visit.page.click("#tab-what")
        visit.page.wait_for_selector("#error:not([hidden])")
        assert visit.text("#error") == "The demo does not answer. Is it still running?"
        assert "ERR_CONNECTION" in visit.complaints.pop()


def test_phone_and_dark_and_keys(browser: Any, server: Server) -> None:
    with Visit(browser, server, "dark", 390) as visit:
        page = visit.page
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.emulate_media(color_scheme="light")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
        for name in ("where", "alike", "parts", "what", "search"):
            page.focus("#tab-where") if name == "where" else page.keyboard.press("ArrowRight")
            page.wait_for_selector(f"#panel-{name}:not([hidden])")
            assert page.evaluate("document.activeElement.id") == f"tab-{name}"
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        unnamed = page.evaluate("""[...document.querySelectorAll("button, input, select, canvas[tabindex]")]
            .filter((one) => !one.textContent.trim() && !one.labels?.length && !one.ariaLabel)
            .filter((one) => !one.querySelector("img[alt]")).map((one) => one.outerHTML)""")
        assert unnamed == []
