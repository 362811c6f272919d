"""Downloads: whole or not at all, the same at every later load, and every failure one line."""

import contextlib
import errno
import hashlib
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pera_lightning.data import downloads
from pera_lightning.data.downloads import fetch, record_path, verified
from pera_lightning.errors import DataError
from tests.tasks.causal_lm.text_helpers import one_line


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        if callable(content):
            content(self)
        elif isinstance(content, int):
            self.send_error(content)
        elif content is None:
            self.send_error(404)
        else:
            body, announced = content if isinstance(content, tuple) else (content, len(content))
            self.send_response(200)
            self.send_header("Content-Length", str(announced))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files, server.asked = {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def sha(content):
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_downloaded_once_and_its_checksum_recorded(server, tmp_path):
    server.files["/a/rows.json"] = content = os.urandom(3 << 20)
    path = tmp_path / "deep" / "rows.json"
    assert fetch(f"{server.url}/a/rows.json", path) == path
    assert path.read_bytes() == content
    assert record_path(path).read_text() == f"{sha(content)}  rows.json\n"
    del server.files["/a/rows.json"]
    fetch(f"{server.url}/a/rows.json", path)
    assert server.asked == ["/a/rows.json"]
    assert names(tmp_path) == ["rows.json", "rows.json.sha256"]


def test_a_published_checksum(server, tmp_path):
    server.files["/f"] = b"content"
    path = tmp_path / "f"
    with pytest.raises(DataError) as error:
        fetch(f"{server.url}/f", path, sha256=sha(b"other"))
    one_line(error, sha(b"content"), sha(b"other"), "was expected", f"put the right file at {path}")
    assert names(tmp_path) == []
    fetch(f"{server.url}/f", path, sha256=sha(b"content"))
    fetch(f"{server.url}/f", path, sha256=sha(b"content"))
    with pytest.raises(DataError, match="was expected"):
        fetch(f"{server.url}/f", path, sha256=sha(b"other"))


def test_a_changed_file_is_refused_by_name(server, tmp_path):
    server.files["/f"] = b"content"
    path = fetch(f"{server.url}/f", tmp_path / "f")
    path.write_bytes(b"c0ntent")
    for again in (partial(fetch, f"{server.url}/f", path), partial(verified, path)):
        with pytest.raises(DataError) as error:
            again()
        one_line(error, str(path), sha(b"content"), sha(b"c0ntent"), "delete it to download it again")
    path.unlink()
    fetch(f"{server.url}/f", path)
    assert path.read_bytes() == b"content"
    path.unlink()
    server.files["/f"] = b"new content"  # the record outlives the file: what the net has now is not what it had
    with pytest.raises(DataError, match="the file there has changed"):
        fetch(f"{server.url}/f", path)
    assert names(tmp_path) == ["f.sha256"]


def test_a_file_put_there_by_hand_is_taken_and_recorded(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"content")
    assert fetch("http://nowhere.invalid/f", path) == path
    assert record_path(path).read_text().startswith(sha(b"content"))
    record_path(path).write_text("nonsense\n")
    with pytest.raises(DataError) as error:
        verified(path)
    one_line(error, "f.sha256 holds no sha256; delete it")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["/f cannot be had (404 ", "put the file at"]),
        (503, ["/f cannot be had (503 Service Unavailable)", "try again"]),
        ((b"half", 8), ["broke off after 4 of 8 bytes", "try again"]),
    ],
)
def test_what_a_server_may_do(server, tmp_path, content, words):
    server.files["/f"] = content
    with pytest.raises(DataError) as error:
        fetch(f"{server.url}/f", tmp_path / "f")
    one_line(error, server.url, *words)
    assert names(tmp_path) == []


def drip(handler, data, then=b"x"):
    """Sends bytes one by one for two seconds, or until nobody reads them."""
    handler.wfile.write(data)
    with contextlib.suppress(OSError):
        for _ in range(100):
            handler.wfile.write(then)
            time.sleep(0.02)


@pytest.mark.parametrize("data", [b"HTTP/1.0 200 OK\r\nContent-Length: 100000\r\n\r\n", b"HTTP/1.0 200 OK\r\nX: "])
def test_a_server_that_drips_is_given_up(server, tmp_path, monkeypatch, data):
    monkeypatch.setattr(downloads, "_TIMEOUT", 0.2)
    server.files["/f"] = partial(drip, data=data)
    start = time.monotonic()
    with pytest.raises(DataError) as error:
        fetch(f"{server.url}/f", tmp_path / "f")
    one_line(error, "/f cannot be had (fewer than 64 kB in 0.2 seconds", f"put the file at {tmp_path / 'f'}")
    assert time.monotonic() - start < 1.5
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_web_page_is_not_taken_for_the_file(server, tmp_path, kind):
    def page(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", kind)
        handler.end_headers()
        handler.wfile.write(b"Log in" if kind.startswith("text") else b"\n<!DOCTYPE HTML><p>Log in")

    server.files["/f"] = page
    with pytest.raises(DataError) as error:
        fetch(f"{server.url}/f", tmp_path / "f.json")
    one_line(error, "/f is a web page and not the file", "log in")
    assert names(tmp_path) == []


def test_hosts_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DataError) as error:
        fetch(f"http://127.0.0.1:{port}/f", tmp_path / "f")
    one_line(error, f"127.0.0.1:{port}/f cannot be had", "refused", f"at {tmp_path / 'f'} by other means")
    with pytest.raises(DataError) as error:
        fetch("data/commonsense", tmp_path / "f")
    one_line(error, "data/commonsense cannot be had (unknown url type")


def test_a_connection_that_breaks(server, tmp_path, monkeypatch):
    server.files["/f"] = b"x" * 100

    def broken(*_):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    monkeypatch.setattr("http.client.HTTPResponse.read", broken)
    with pytest.raises(DataError) as error:
        fetch(f"{server.url}/f", tmp_path / "f")
    one_line(error, "cannot be had", "Connection reset by peer")
    assert names(tmp_path) == []


def test_a_disk_that_takes_nothing(server, tmp_path, monkeypatch):
    server.files["/f"] = b"content"
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as error:
        fetch(f"{server.url}/f", tmp_path / "file" / "f")
    one_line(error, "file/f cannot be written", "another cache_dir")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(DataError) as error:
        fetch(f"{server.url}/f", tmp_path / "f")
    one_line(error, "No space left on device", "MiB are free", "make room")
    assert names(tmp_path) == ["file"]


def test_many_at_once_do_no_harm(server, tmp_path):
    server.files["/f"] = content = os.urandom(1 << 20)
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda _: fetch(f"{server.url}/f", tmp_path / "f"), range(24)))
    assert set(done) == {tmp_path / "f"}
    assert (tmp_path / "f").read_bytes() == content
    assert names(tmp_path) == ["f", "f.sha256"]
