"""Named data sets: fetched whole or not at all, checked, and every failure says what to do. No network but loopback."""

import gzip
import hashlib
import http.server
import io
import os
import shutil
import subprocess
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import FashionMNIST
from torchvision.datasets.utils import download_url

from fastjepa.data.prepare import downloads
from fastjepa.data.prepare.catalog import data_dir, get_dataset
from fastjepa.data.prepare.downloads import CIFAR10_CLASSES, FASHION_FOLDER, FASHION_MNIST
from fastjepa.data.sources import open_source
from fastjepa.errors import UserError


def idx(*shape: int) -> bytes:
    """An idx file of zeros."""
    return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes() + bytes(int(np.prod(shape)))


COUNTS = {"train": 3, "t10k": 2}
CONTENT = {n: idx(COUNTS[n.partition("-")[0]], *((28, 28) if "images" in n else ())) for n in FASHION_MNIST}
PACKED = {name: gzip.compress(content, mtime=0) for name, content in CONTENT.items()}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch) -> Path:
    """An empty data directory, two images a class, and no way to reach anything."""
    monkeypatch.setenv("FASTJEPA_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(downloads, "CIFAR10_PER_CLASS", {"train": 2, "test": 1})
    monkeypatch.setattr(downloads, "FASHION_MNIST", {n: hashlib.sha256(c).hexdigest() for n, c in CONTENT.items()})
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: pytest.fail(f"ran {command}"))
    monkeypatch.setattr("torchvision.datasets.utils.download_url", offline)
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:1/"])  # a port at which nothing listens
    monkeypatch.setattr(FashionMNIST, "resources", [(f"{n}.gz", hashlib.md5(raw).hexdigest()) for n, raw in PACKED.items()])
    return tmp_path / "data"


def offline(*_, **__):
    raise OSError("no\nnetwork")


def debian(monkeypatch, *, content: dict[str, bytes] = CONTENT, fail: tuple[str, ...] = (), root: bool = False) -> list[str]:
    """A stand-in for apt-get and dpkg; returns the commands it is given. A command in `fail` fails once."""
    commands, failing = [], list(fail)

    def run(command: list[str], cwd: str, **_) -> subprocess.CompletedProcess:
        commands.append(" ".join(command[:2]))
        if commands[-1] in failing:
            failing.remove(commands[-1])
            return subprocess.CompletedProcess(command, 100, "", "W: x\nE: Unable to locate package")
        if command[:2] == ["apt-get", "download"]:
            Path(cwd, f"{command[2]}_1_all.deb").write_bytes(b"package")
        if command[0] == "dpkg":
            assert Path(cwd, command[2]).read_bytes() == b"package"
            (Path(cwd, command[3]) / FASHION_FOLDER).mkdir(parents=True)
            for name, raw in content.items():
                (Path(cwd, command[3]) / FASHION_FOLDER / f"{name}.gz").write_bytes(gzip.compress(raw))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    return commands


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_fashion_mnist_from_debian_without_root(store: Path, monkeypatch):
    commands = debian(monkeypatch)
    path = get_dataset("fashion-mnist")
    assert path == store / "fashion-mnist"
    assert names(path) == sorted(f"{name}.gz" for name in CONTENT)
    assert names(store) == ["fashion-mnist"]
    assert get_dataset("fashion-mnist") == path and commands == ["apt-get download", "dpkg -x"]


def test_directory_replaces_the_default(tmp_path: Path, monkeypatch):
    debian(monkeypatch)
    assert get_dataset("fashion-mnist", directory=tmp_path / "mine") == tmp_path / "mine" / "fashion-mnist"


@pytest.mark.parametrize("root", [False, True])
def test_empty_package_lists_are_updated_by_root_only(root: bool, monkeypatch):
    commands = debian(monkeypatch, fail=("apt-get download",), root=root)
    if root:
        assert get_dataset("fashion-mnist").is_dir()
        assert commands == ["apt-get download", "apt-get update", "apt-get download", "dpkg -x"]
    else:
        with pytest.raises(OSError, match="worked .*cannot be reached.*Unable to locate package.*copy its four"):
            get_dataset("fashion-mnist")
        assert commands == ["apt-get download"]


class Mirror(http.server.BaseHTTPRequestHandler):
    """The authors' server: sound, silent, one that stands still in the middle, or one that sends a page for every file."""

    kind = "sound"

    def do_HEAD(self) -> None:
        if self.kind == "silent":
            time.sleep(5)
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        raw = b"<html>Log in first</html>" if self.kind == "page" else PACKED[self.path[1:].removesuffix(".gz")]
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw[:5])
        if self.kind == "stands still":
            time.sleep(5)
        self.wfile.write(raw[5:])

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def mirror(monkeypatch) -> Iterator[type[Mirror]]:
    """A mirror on loopback in place of the authors'; torchvision is the real one."""
    handler = type("OneMirror", (Mirror,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setattr("torchvision.datasets.utils.download_url", download_url)
        monkeypatch.setattr(FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        yield handler
        server.shutdown()


def test_fashion_mnist_from_its_server_whatever_else_there_is(mirror: type[Mirror], store: Path):
    path = get_dataset("fashion-mnist")  # apt-get, which the fixture has at hand, would fail the test
    assert {p.name.removesuffix(".gz"): p.read_bytes() for p in path.iterdir()} == PACKED
    assert names(store) == ["fashion-mnist"]


@pytest.mark.parametrize("kind", ["silent", "stands still", "page"])
def test_debians_package_where_the_server_is_no_use(mirror: type[Mirror], monkeypatch, capsys, kind: str):
    mirror.kind = kind
    commands, before = debian(monkeypatch), time.monotonic()
    monkeypatch.setattr(downloads, "CONNECT_TIMEOUT", 0.5)
    monkeypatch.setattr(downloads, "ANSWER_TIMEOUT", 0.5)
    assert len(names(get_dataset("fashion-mnist"))) == 4 and commands == ["apt-get download", "dpkg -x"]
    assert time.monotonic() - before < 4
    shown = capsys.readouterr()
    assert not shown.out


def test_wrong_content_never_becomes_visible(store: Path, monkeypatch):
    debian(monkeypatch, content=CONTENT | {"t10k-labels-idx1-ubyte": b"other labels"})
    with pytest.raises(OSError, match="not the published data set"):
        get_dataset("fashion-mnist")
    assert names(store) == []


def test_another_process_may_be_first(store: Path, monkeypatch):
    debian(monkeypatch)
    whole = get_dataset("fashion-mnist").rename(store / "theirs")

    def late(command: list[str], **_) -> subprocess.CompletedProcess:
        whole.rename(store / "fashion-mnist")
        return subprocess.CompletedProcess(command, 100, "", "E: no connection")

    monkeypatch.setattr(subprocess, "run", late)
    assert len(names(get_dataset("fashion-mnist"))) == 4 and names(store) == ["fashion-mnist"]


def test_damaged_files_are_named_and_left_alone(store: Path, monkeypatch):
    debian(monkeypatch)
    path = get_dataset("fashion-mnist")
    (path / "train-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    with pytest.raises(OSError, match=f"{path}: incomplete or damaged; delete it and run: fastjepa data get fashion-mnist"):
        get_dataset("fashion-mnist")
    assert len(names(path)) == 4


def jpeg(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def cifar10_members() -> dict[str, bytes]:
    """A small CIFAR-10: two train images and one test image a class."""
    counts = {"train": 2, "test": 1}
    places = [f"cifar10/{s}/{c}/{i:04d}.jpg" for s, n in counts.items() for c in CIFAR10_CLASSES for i in range(n)]
    return {place: jpeg(seed) for seed, place in enumerate(places)}


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as opened:
            for name, content in members.items():
                opened.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as opened:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz"])
def test_cifar10_from_an_archive(tmp_path: Path, store: Path, kind: str):
    members = cifar10_members()
    extra = {"cifar10/README.txt": b"x", "__MACOSX/cifar10/train/cat/._0000.jpg": b"x", "../train/elephant/0.jpg": b"x"}
    path = get_dataset("cifar10", archive=write_archive(tmp_path / kind, members | extra))
    assert names(store) == ["cifar10"]
    written = {str(file.relative_to(store)): file.read_bytes() for file in path.rglob("*.*")}
    assert written == members
    train, test = open_source("cifar10"), open_source("cifar10", "test")
    assert (len(train), len(test)) == (20, 10)
    assert train.classes == test.classes == CIFAR10_CLASSES
    assert [train.label(i) for i in range(20)] == [i // 2 for i in range(20)]
    assert get_dataset("cifar10") == path


def test_incomplete_archive_leaves_nothing(tmp_path: Path, store: Path):
    members = cifar10_members()
    del members["cifar10/train/ship/0001.jpg"]
    message = "a.zip: holds 19 of 20 train and 10 of 10 test images of CIFAR-10; give an archive of"
    with pytest.raises(UserError, match=message):
        get_dataset("cifar10", archive=write_archive(tmp_path / "a.zip", members))
    assert names(store) == []


@pytest.mark.parametrize("spoil", ["missing", "truncated", "text"])
def test_unreadable_archive_says_what_to_give(tmp_path: Path, store: Path, spoil: str):
    archive = write_archive(tmp_path / "a.tar.gz", cifar10_members())
    if spoil == "missing":
        archive.unlink()
    else:
        archive.write_bytes(archive.read_bytes()[:3000] if spoil == "truncated" else b"text")
    with pytest.raises(OSError, match=r"a\.tar\.gz: cannot be unpacked .*; give a whole zip or tar with --archive"):
        get_dataset("cifar10", archive=archive)
    assert names(store) == []


def test_cifar10_from_its_binary_version(store: Path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(30) % 10
    records = [bytes([label]) + image.tobytes() for label, image in zip(labels, pixels, strict=True)]

    def download(url: str, root: str, md5: str) -> None:
        halves = {"data_batch_1": records[:10], "data_batch_2": records[10:20], "test_batch": records[20:]}
        members = {f"cifar-10-batches-bin/{name}.bin": b"".join(part) for name, part in halves.items()}
        write_archive(Path(root, url.rpartition("/")[2]), members | {"cifar-10-batches-bin/readme.html": b"x"})

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    get_dataset("cifar10")
    test = open_source("cifar10", "test")
    assert [test.label(i) for i in range(10)] == list(range(10))
    decoded = np.stack([np.array(Image.open(test.name(i))) for i in range(10)])
    assert np.array_equal(decoded, pixels[20:].transpose(0, 2, 3, 1))
    assert len(open_source("cifar10")) == 20


def test_offline_cifar10_asks_for_an_archive(store: Path):
    message = r"cannot be downloaded \(no network\); run: fastjepa data get cifar10 --archive FILE"
    with pytest.raises(OSError, match=message):
        get_dataset("cifar10")
    assert names(store) == []


def test_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match="unknown data set 'cifar-10'; did you mean 'cifar10'"):
        get_dataset("cifar-10")
    with pytest.raises(UserError, match="unknown data set 'x'; data sets: fashion-mnist, cifar10"):
        get_dataset("x")


def test_archive_for_fashion_mnist_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="--archive is for cifar10"):
        get_dataset("fashion-mnist", archive=tmp_path / "a.zip")


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="cannot be written .*; set FASTJEPA_DATA"):
        get_dataset("cifar10", directory=tmp_path / "file" / "below")


def test_data_dir(monkeypatch):
    monkeypatch.delenv("FASTJEPA_DATA")
    monkeypatch.setenv("HOME", "/home/someone")
    assert data_dir() == Path("/home/someone/.cache/fastjepa")
