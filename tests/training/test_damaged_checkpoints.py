"""Checkpoints that are damaged, made up or come by URL: one line, and nothing runs."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import BinaryIO

import pytest
import torch
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)
from torch import nn

from pera_lightning import load_adapted
from pera_lightning.errors import CheckpointError
from pera_lightning.training import checkpoint_files
from pera_lightning.training.checkpoint_io import read_checkpoint
from tests.training.foreign import Plain, train_loader, val_loader
from tests.training.short_fits import callback, fitted, trainer


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "x.ckpt")
    (tmp_path / "y.ckpt").write_text("text")
    for name, message in (("x", "holds a Tensor, not a Lightning"), ("y", "is damaged, or another kind of file")):
        with pytest.raises(CheckpointError, match=message):
            trainer(tmp_path, callback()).test(Plain(), val_loader(), ckpt_path=str(tmp_path / f"{name}.ckpt"))


def flipped(file: Path, content: torch.Tensor) -> None:
    """Flips a bit of a tensor where it lies in a file."""
    data = bytearray(file.read_bytes())
    place = data.find(content.contiguous().numpy().tobytes())
    assert place > 0
    data[place + 1] ^= 1
    file.write_bytes(bytes(data))


def test_a_flipped_bit_in_an_optimizer_is_found(tmp_path: Path) -> None:
    """torch compares no CRC; a file that was saved without any still loads."""
    fitted(tmp_path)
    file, whole = tmp_path / "best.ckpt", (tmp_path / "best.ckpt").read_bytes()
    checkpoint = torch.load(file, weights_only=True)
    flipped(file, checkpoint["optimizer_states"][0]["state"][0]["exp_avg"])
    for read in (
        lambda: load_adapted(Plain, file),
        lambda: trainer(tmp_path, callback()).fit(Plain(), train_loader(), ckpt_path=str(file)),
    ):
        with pytest.raises(CheckpointError, match=r"is damaged.*Bad CRC-32"):
            read()
    file.write_bytes(whole)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(checkpoint, file)
    finally:
        torch.serialization.set_crc32_options(True)
    load_adapted(Plain, file)


class Evil:
    """A pickle that writes a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple:
        return exec, (f"open({self.mark!r}, 'w').close()",)


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Where a server gives the files of the test's folder, and 20 bytes less of what is called cut.ckpt."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def copyfile(self, source: BinaryIO, target: BinaryIO) -> None:
            data = source.read()
            target.write(data[:-20] if self.path.endswith("cut.ckpt") else data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_checkpoint_by_url(tmp_path: Path, url: str) -> None:
    """It is read as it is now, in full, and runs nothing."""
    model, _ = fitted(tmp_path)
    x = torch.randn(3, 8)
    assert torch.equal(load_adapted(Plain, f"{url}/best.ckpt")(x), model.eval()(x))
    checkpoint = torch.load(tmp_path / "best.ckpt", weights_only=True)
    shutil.copy(tmp_path / "best.ckpt", tmp_path / "cut.ckpt")
    # Another file under the same name, which Lightning would take from its cache.
    torch.save({**checkpoint, "more": Evil(tmp_path / "mark")}, tmp_path / "best.ckpt")
    fit = lambda name: trainer(tmp_path, callback()).fit(Plain(), train_loader(), ckpt_path=f"{url}/{name}")  # noqa: E731
    test = lambda name: trainer(tmp_path, callback()).test(Plain(), val_loader(), ckpt_path=f"{url}/{name}")  # noqa: E731
    for read in (fit, test, lambda name: load_adapted(Plain, f"{url}/{name}")):
        # What it asks for is named, and not torch's advice to have it run.
        with pytest.raises(
            CheckpointError, match=r"another kind of file .*primitives are read, and it asks for exec\)$"
        ):
            read("best.ckpt")
        with pytest.raises(CheckpointError, match=r"cannot be had \(HTTPError: HTTP Error 404: File not found\)"):
            read("none.ckpt")
        with pytest.raises(CheckpointError, match=r"cannot be had .*IncompleteRead|broke off after"):
            read("cut.ckpt")
    assert not (tmp_path / "mark").exists()


HEAD = b"HTTP/1.1 200 OK\r\n"
DRIPS = {  # at once, and then again and again
    "header": (HEAD + b"X-Header: ", b"x"),
    "size of a chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "body": (HEAD + b"Content-Length: 100000\r\n\r\n", b"x"),
}


@pytest.mark.parametrize(("first", "drop"), DRIPS.values(), ids=DRIPS)
def test_a_server_that_drips_is_given_up(first: bytes, drop: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of its answer it drips: urllib alone waits for a line of a header, or of a chunk, for ever."""
    for name, value in {"_PATIENCE": 0.3, "_LOOK": 0.1}.items():
        monkeypatch.setattr(checkpoint_files, name, value)

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(first)
            with suppress(OSError):  # the reader has gone
                for _ in range(200):  # ten seconds
                    self.request.sendall(drop)
                    time.sleep(0.05)

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        begun = time.monotonic()
        with pytest.raises(CheckpointError, match=r"cannot be had \(TimeoutError: \S+ MB in 0 seconds\)"):
            read_checkpoint(f"http://127.0.0.1:{server.server_address[1]}/best.ckpt")
        assert time.monotonic() - begun < 5
        server.shutdown()


JUNK = {
    "an extra key": (
        ("state_dict", "body.0.weight"),
        torch.zeros(16, 8),
        r"1 frozen weights of the base \(body",
    ),
    "not finite": (
        ("state_dict", "head.bias"),
        torch.full((3,), torch.nan),
        "head.bias has values that are not finite",
    ),
    "no description": (("pera_lightning",), [1], "where an injection is described"),
    "no tensors": (("state_dict",), [1], "a list is where tensors by name belong"),
    "a moment": (("optimizer_states", 0, "state", 0, "exp_avg"), torch.full((2, 8), torch.inf), "exp_avg has values"),
    "its shape": (("optimizer_states", 0, "state", 0, "exp_avg"), torch.zeros(2), "exp_avg does not have the shape"),
    "a setting": (("optimizer_states", 0, "param_groups", 0, "lr"), "fast", r"param_groups\.lr is a str"),
    "a counter": (
        ("loops", "fit_loop", "epoch_progress", "total", "ready"),
        1.5,
        "total.ready is a float",
    ),
    "no counters": (("loops", "fit_loop", "epoch_progress", "total"), {}, "has no"),
    "no loops": (("loops",), None, "cannot be gone on from"),
    "a callback's": (("callbacks", "ModelCheckpoint", "best_k_models"), 3, "best_k_models is a int, not a dict"),
    "random numbers": (("loops", "fit_loop", "state_dict", "combined_loader", 0, "ranks"), "x", "ranks is a str"),
}


@pytest.mark.parametrize(("path", "junk", "match"), JUNK.values(), ids=JUNK)
def test_a_checkpoint_that_was_changed(tmp_path: Path, path: tuple, junk: object, match: str) -> None:
    """A fit that would go on from it says one line before it trains; a plain module is as it was."""
    fitted(tmp_path)
    checkpoint = place = torch.load(tmp_path / "best.ckpt", weights_only=True)
    for key in path[:-1]:  # a callback's key begins with its class
        place = place[next(k for k in place if k.startswith(key)) if key == "ModelCheckpoint" else key]
    place[path[-1]] = junk
    torch.save(checkpoint, tmp_path / "best.ckpt")
    keep = ModelCheckpoint(tmp_path, filename="best")
    with pytest.raises(CheckpointError, match=match) as caught:
        trainer(tmp_path, callback(), keep, max_epochs=2).fit(
            Plain(), train_loader(), val_loader(), ckpt_path=str(tmp_path / "best.ckpt")
        )
    assert len(str(caught.value).splitlines()) == 1
    if path[0] in ("state_dict", "pera_lightning"):
        module = Plain()
        with pytest.raises(CheckpointError, match=match):
            load_adapted(module, tmp_path / "best.ckpt")
        assert type(module.body[0]) is nn.Linear
        assert all(p.requires_grad for p in module.parameters())


def test_fewer_epochs_than_were_trained(tmp_path: Path) -> None:
    """The checkpoint is in order, and not called damaged."""
    fitted(tmp_path, max_epochs=4)
    with pytest.raises(CheckpointError, match=r"with these settings: .*current_epoch=\d, but .*\(max_epochs=1\)"):
        trainer(tmp_path, callback(), max_epochs=1).fit(Plain(), train_loader(), ckpt_path=str(tmp_path / "best.ckpt"))


def test_an_optimizer_with_other_groups(tmp_path: Path) -> None:
    """As where the first fit has added one in its course: it is said in words, and not as what zip() says."""

    class TwoGroups(Plain):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = super().configure_optimizers()
            last = optimizer.param_groups[0]["params"].pop()
            optimizer.add_param_group({"params": [last]})
            return optimizer

    fitted(tmp_path)
    count = len(
        torch.load(tmp_path / "best.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"][0]["params"]
    )
    words = (
        rf"has 1 group\(s\) of {count} parameters, this fit's 2 group\(s\) of {count - 1}, 1 parameters: make the same"
    )
    with pytest.raises(CheckpointError, match=words):
        trainer(tmp_path, callback(), max_epochs=2).fit(
            TwoGroups(), train_loader(), ckpt_path=str(tmp_path / "best.ckpt")
        )
