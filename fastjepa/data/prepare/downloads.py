"""Fashion-MNIST and CIFAR-10, fetched into an empty folder from their servers, from Debian, or from an archive."""

import contextlib
import gzip
import hashlib
import http.client
import os
import re
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from PIL import Image
from rich.progress import track

from fastjepa.data.prepare.processes import console
from fastjepa.errors import UserError

CONNECT_TIMEOUT = 5  # seconds until a server counts as out of reach
ANSWER_TIMEOUT = 30  # seconds that a download may stand still

# SHA-256 of the uncompressed content: Debian and the authors compress the same files differently.
FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_PACKAGE, FASHION_FOLDER = "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"
FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_PER_CLASS = {"train": 5000, "test": 1000}
CIFAR10_MEMBER = re.compile(rf"(?:^|/)(train|test)/({'|'.join(CIFAR10_CLASSES)})/([^/.][^/]*\.(?:jpe?g|png))$")


def _one_line(error: BaseException | str) -> str:
    return " ".join(str(error).split())[:300]


def fetch_fashion_mnist(folder: Path, archive: Path | None) -> None:
    """Fill a folder from the authors' server, or from a Debian mirror, which some networks reach where the internet is shut."""
    if archive:
        raise UserError("fashion-mnist: --archive is for cifar10; copy the four idx .gz files into the data directory instead")
    reasons = []
    for fetch in (_fashion_from_torchvision, _fashion_from_debian):
        try:
            return fetch(folder)
        except (OSError, RuntimeError, ImportError, http.client.HTTPException, subprocess.SubprocessError) as error:
            reasons.append(_one_line(error))
            console.print(f"fashion-mnist: {reasons[-1]}", style="yellow", markup=False)
    raise OSError(
        f"fashion-mnist: no way to fetch it worked ({'; '.join(reasons)}); connect to the internet, or copy its four "
        f"*-ubyte.gz files into {folder.parent / 'fashion-mnist'}"
    )


def _fashion_from_torchvision(folder: Path) -> None:
    """Download with torchvision, whose own requests would wait for an answer without end."""
    from torchvision.datasets import FashionMNIST

    with _answers_within(ANSWER_TIMEOUT), tempfile.TemporaryDirectory(dir=folder) as work:
        _require_server(FashionMNIST.mirrors[0])
        console.print("fashion-mnist: downloading with torchvision (31 MB)", markup=False)
        FashionMNIST(work, download=True)
        for name in FASHION_MNIST:
            shutil.move(Path(work, "FashionMNIST", "raw", f"{name}.gz"), folder / f"{name}.gz")


@contextlib.contextmanager
def _answers_within(seconds: float) -> Iterator[None]:
    """Give up, inside the block, on every network request of this process that is not answered in time: TimeoutError."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _require_server(url: str) -> None:
    """Raise OSError where no server answers at an address within CONNECT_TIMEOUT, a search for its name included."""
    asked = threading.Thread(target=_ask_server, args=(url, said := []), daemon=True)
    asked.start()
    asked.join(CONNECT_TIMEOUT)
    if said != [""]:
        raise OSError(f"{url}: cannot be reached ({said[0] if said else f'no answer in {CONNECT_TIMEOUT} s'})")


def _ask_server(url: str, said: list[str]) -> None:
    """Append "" when a server answers, whatever it says, by the proxies of the environment; else the reason."""
    try:
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=CONNECT_TIMEOUT).close()
        said.append("")
    except (OSError, http.client.HTTPException) as error:
        said.append(_one_line(getattr(error, "reason", None) or error))


def _fashion_from_debian(folder: Path) -> None:
    """Unpack the Debian and Ubuntu package without installing it: no root needed."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise OSError("apt-get and dpkg are not here")
    console.print(f"fashion-mnist: apt-get download {FASHION_PACKAGE} (31 MB)", markup=False)
    with tempfile.TemporaryDirectory() as work:
        download = ["apt-get", "download", FASHION_PACKAGE]
        error = _run_command(download, work)
        if error and os.geteuid() == 0:
            error = _run_command(["apt-get", "update"], work) or _run_command(download, work)
        packages = sorted(Path(work).glob("*.deb"))
        error = error or _run_command(["dpkg", "-x", *map(str, packages), "unpacked"], work)
        if error:
            raise OSError(error)
        for name in FASHION_MNIST:
            shutil.copyfile(Path(work, "unpacked", FASHION_FOLDER, f"{name}.gz"), folder / f"{name}.gz")


def _run_command(command: list[str], cwd: str) -> str:
    """Run a command; return "" when it worked, else its last line of error."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
    return f"{' '.join(command[:2])}: {lines[-1]}" if done.returncode else ""


def fashion_mnist_complete(folder: Path) -> bool:
    """Return whether a folder holds the four published files, by the SHA-256 of their content."""
    try:
        return all(
            hashlib.sha256(gzip.decompress((folder / f"{name}.gz").read_bytes())).hexdigest() == digest
            for name, digest in FASHION_MNIST.items()
        )
    except (OSError, EOFError, ValueError, zlib.error):
        return False


def fetch_cifar10(folder: Path, archive: Path | None) -> None:
    """Fill a folder with PNG files from the authors' server, or with the images of an archive."""
    if archive:
        return _unpack_images(archive, folder)
    with tempfile.TemporaryDirectory(dir=folder) as work, _answers_within(ANSWER_TIMEOUT):
        try:
            from torchvision.datasets.utils import download_url

            console.print(f"cifar10: downloading {CIFAR10_URL} (162 MB)", markup=False)
            download_url(CIFAR10_URL, work, md5=CIFAR10_MD5)
        except (OSError, RuntimeError, ImportError, http.client.HTTPException) as error:
            raise OSError(
                f"cifar10: {CIFAR10_URL} cannot be downloaded ({_one_line(error)}); "
                "run: fastjepa data get cifar10 --archive FILE, with a zip or tar of its images in class folders"
            ) from error
        _write_cifar10_images(Path(work) / Path(CIFAR10_URL).name, folder)


def _unpack_images(archive: Path, folder: Path) -> None:
    """Copy every train|test/<class>/<image> of an archive; a member's own path is never used to write."""
    written = {split: 0 for split in CIFAR10_PER_CLASS}
    total = sum(CIFAR10_PER_CLASS.values()) * len(CIFAR10_CLASSES)
    try:
        for name, stream in track(_members(archive), "cifar10: unpacking", total, console=console):
            match = CIFAR10_MEMBER.search(name)
            if match:
                split, label, image = match.groups()
                _write_image(folder / split / label / image, stream.read())
                written[split] += 1
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise OSError(f"{archive}: cannot be unpacked ({_one_line(error)}); give a whole zip or tar with --archive") from error
    expected = {split: count * len(CIFAR10_CLASSES) for split, count in CIFAR10_PER_CLASS.items()}
    if written != expected:
        raise UserError(
            f"{archive}: holds {written['train']} of {expected['train']} train and {written['test']} of {expected['test']} "
            "test images of CIFAR-10; give an archive of train|test/<class>/<image>.jpg or .png"
        )


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield (name, open file) of every file in a zip, or in a tar of any compression."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                with opened.open(info) as stream:
                    yield info.filename, stream
    else:
        with tarfile.open(archive, "r|*") as opened:
            for member in opened:
                if member.isfile():
                    yield member.name, opened.extractfile(member)


def _write_cifar10_images(archive: Path, folder: Path) -> None:
    """Write the binary version as PNG files: records of one label byte and 3072 pixel bytes, channel by channel.

    Record 2 begins at byte 2 * 3073 = 6146 with its label; its red is bytes 6147 to 7171, its green the 1024 after them.
    """
    batches = ((name, stream.read()) for name, stream in _members(archive) if name.endswith(".bin"))
    for name, records in track(batches, "cifar10: writing PNG files", 6, console=console):
        split = "test" if Path(name).name.startswith("test") else "train"
        for number, start in enumerate(range(0, len(records), 3073)):
            pixels = records[start + 1 : start + 3073]
            planes = [Image.frombytes("L", (32, 32), pixels[c * 1024 : (c + 1) * 1024]) for c in range(3)]
            path = folder / split / CIFAR10_CLASSES[records[start]] / f"{Path(name).stem}_{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.merge("RGB", planes).save(path, compress_level=1)


def _write_image(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def cifar10_complete(folder: Path) -> bool:
    """Return whether a folder holds as many images of each split and class as were published."""
    try:
        return all(
            len(os.listdir(folder / split / name)) == count
            for split, count in CIFAR10_PER_CLASS.items()
            for name in CIFAR10_CLASSES
        )
    except OSError:
        return False
