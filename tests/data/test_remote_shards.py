"""Shards behind a real HTTP server, sound or faulty: the bytes, order and resumption of a local disk, or one sentence."""

import base64
import functools
import http.server
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastjepa.cli.main import main
from fastjepa.data import remote_files, remote_shards
from fastjepa.data.prepare.write_shards import ShardRequest, write_shards
from fastjepa.data.remote_files import Unreachable, _filesystem
from fastjepa.data.sources import open_source
from fastjepa.errors import UserError
from fastjepa.loader.loader import Loader
from fastjepa.ranks.world import World
from tests.support.batches import load, same_batch, settings
from tests.support.images import pack_shard, save_image
from tests.support.runs import TINY, without_times


class Server(http.server.ThreadingHTTPServer):
    """A static file server on a loopback port, with Range and with the faults that its attributes name."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(root)))
        self.ranges = True
        self.drops = self.halves = 0  # connections closed without an answer, or in the middle of one
        self.statuses: list[int] = []  # given to the next requests
        self.delay = 0.0  # seconds before an answer
        self.login: str | None = None
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is no news."""


class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else 40 ms go by between the header and the body

    def log_message(self, *args) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, wanted, path = self.server, self.headers.get("Range"), Path(self.translate_path(self.path))
        server.asked.append((self.command, self.path, wanted))
        time.sleep(server.delay)
        if server.drops:
            server.drops -= 1
            self.close_connection = True
        elif server.statuses:
            self.answer(server.statuses.pop(0), b"")
        elif server.login and self.headers.get("Authorization") != "Basic " + base64.b64encode(server.login.encode()).decode():
            self.answer(401, b"")
        elif not path.is_file():
            self.answer(404, b"")
        elif wanted and server.ranges:
            start, stop = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            self.answer(206 if start < path.stat().st_size else 416, path.read_bytes()[start : stop + 1])
        else:
            self.answer(200, path.read_bytes())

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.server.halves and self.command == "GET":
            self.server.halves -= 1
            self.close_connection, content = True, content[: len(content) // 2]
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """40 images in two classes, in images/, and the same in the same order as some ten shards in set/train/."""
    root = tmp_path_factory.mktemp("made")
    for i in range(40):
        save_image(root / "images" / ("cat", "dog")[i // 20] / f"{i:02}.png", seed=i)
    origin = {"path": "images", "split": "train"}
    write_shards(open_source(root / "images"), root / "set" / "train", origin, ShardRequest(20_000, keep_order=True))
    return root


@pytest.fixture
def local(made: Path, tmp_path: Path) -> Path:
    """A copy of set/ that a test may spoil; what the server serves."""
    return Path(shutil.copytree(made / "set", tmp_path / "served" / "set"))


@pytest.fixture
def server(local: Path, tmp_path: Path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("FASTJEPA_DATA", str(tmp_path / "kept"))
    monkeypatch.setattr(remote_files, "FIRST_WAIT", 0.001)
    with Server(local.parent) as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}).start()
        yield made
        made.shutdown()


def contents(where: str | Path, split: str = "train") -> list[tuple[bytes, int | None]]:
    source = open_source(where, split)
    return [(source.read(i), source.label(i)) for i in range(len(source))]


def foreign(folder: Path) -> list[str]:
    """Two tars without an index, as other tools write them; their members' names."""
    folder.mkdir(parents=True)
    for shard in range(2):
        members = {}
        for i in range(4):
            image = save_image(folder / "x.png", 4 * shard + i).read_bytes()
            members |= {f"{shard}{i}.png": image, f"{shard}{i}.cls": b"%d" % i}
        pack_shard(folder / f"shard-00000{shard}.tar", members)
    return [f"{shard}{i}.png" for shard in range(2) for i in range(4)]


@pytest.mark.parametrize("address", ["set/train/", "set/train", "set"])
def test_samples_labels_classes_and_names_are_those_of_the_disk(server: Server, local: Path, made: Path, address: str):
    source, disk = open_source(f"{server.url}/{address}"), open_source(local)
    assert contents(f"{server.url}/{address}") == contents(local) == contents(made / "images")
    assert source.classes == disk.classes == ("cat", "dog")
    assert source.name(7) == disk.name(7).replace(str(local.parent), server.url)


def test_a_sample_is_one_request_and_the_index_is_fetched_once(server: Server):
    open_source(f"{server.url}/set/train")
    first = [path for _, path, _ in server.asked]
    assert sum(path.endswith(".npz") for path in first) == sum(path.endswith(".tar") for path in first) - 1 > 5
    server.asked.clear()
    source = open_source(f"{server.url}/set/train")
    assert [path for _, path, _ in server.asked] == ["/set/train/manifest.json", "/set/train/000000.tar"]
    server.asked.clear()
    raw = source.read(5)
    (_, offset, size) = source._places[5]
    assert server.asked == [("GET", "/set/train/000001.tar", f"bytes={offset}-{offset + size - 1}")] and len(raw) == size


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_batches_made_in_worker_processes_are_those_of_the_disk(server: Server, local: Path, loader: str):
    near, far = (settings(where, num_workers=2, loader=loader) for where in (local, f"{server.url}/set"))
    open_source(far.data.address).read(0)  # its event loop is running when the workers are forked
    pairs = zip(load(near, range(12)), load(far, range(12)), strict=True)
    assert all(same_batch(a[0], b[0]) for a, b in pairs)


def test_it_reads_in_forked_spawned_and_again_in_the_first_process(server: Server, local: Path):
    source, expected = open_source(f"{server.url}/set"), contents(local)
    assert source.read(0) == expected[0][0]
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(source.read, range(8)) == [raw for raw, _ in expected[:8]]
    assert source.read(9) == expected[9][0]
    assert pickle.loads(pickle.dumps(source)).read(3) == expected[3][0]


def test_a_micro_batch_is_asked_for_at_once(server: Server, local: Path):
    server.delay = 0.1
    setting = settings(f"{server.url}/set", batch_size=16)
    source, start = open_source(setting.data.address), time.monotonic()
    (batch,) = load_of(setting, source)
    assert time.monotonic() - start < 1.4  # one after the other 1.6
    server.delay = 0.0
    assert same_batch(batch, load(settings(local, batch_size=16), range(1))[0][0])


def load_of(setting, source) -> list:
    with Loader(setting, source, World(0, 0, 1, torch.device("cpu")), 0, 1) as loader:
        return list(loader.micro_batches(0))


def trained(output: Path, source: Path | str, *arguments: object) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Log and final weights of a tiny run of four steps."""
    config = output.parent / f"{output.name}.yaml"
    data = TINY["data"] | {"batch_size": 8, "num_workers": 2, "source": str(source)}
    config.write_text(json.dumps(TINY | {"data": data, "optimization": {"epochs": 1, "warmup": 1}}))
    assert main(["train", "--config", str(config), "--output", str(output), *map(str, arguments)]) == 0
    (*_, last) = sorted((output / "checkpoints").iterdir())
    weights = {f"{file.stem}.{name}": value for file in last.glob("*.safetensors") for name, value in load_file(file).items()}
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()], weights


def test_a_run_over_http_stopped_and_resumed_is_the_run_from_the_disk(server: Server, local: Path, tmp_path: Path):
    near, near_weights = trained(tmp_path / "near", local)
    trained(tmp_path / "far", f"{server.url}/set", "--max-steps", 2)
    server.drops = 3
    far, far_weights = trained(tmp_path / "far", f"{server.url}/set", "--resume", "must")
    assert len(near) == 5 and without_times(near) == without_times(far)
    assert near_weights.keys() == far_weights.keys()
    assert all(torch.equal(near_weights[name], far_weights[name]) for name in near_weights)


def test_a_changed_remote_is_noticed_and_what_was_kept_is_not_used(server: Server, local: Path, made: Path):
    before = contents(f"{server.url}/set")
    shutil.rmtree(local / "train")
    origin = {"path": "images", "split": "train"}
    write_shards(open_source(made / "images"), local / "train", origin, ShardRequest(20_000))  # shuffled
    after = contents(f"{server.url}/set")
    assert after == contents(local) != before and sorted(after) == sorted(before)


def test_a_spoiled_copy_of_the_index_is_fetched_again(server: Server, local: Path, tmp_path: Path):
    open_source(f"{server.url}/set")
    for kept in (tmp_path / "kept").rglob("*.npz"):
        kept.write_bytes(kept.read_bytes()[:-300])
    assert contents(f"{server.url}/set") == contents(local)


@pytest.mark.parametrize("fault", [{"drops": 2}, {"halves": 2}, {"statuses": [503, 429]}, {"statuses": [500, 408]}])
def test_faults_that_pass_change_nothing(server: Server, local: Path, fault: dict):
    source, expected = open_source(f"{server.url}/set"), contents(local)
    vars(server).update(fault)
    assert [source.read(i) for i in range(3)] == [raw for raw, _ in expected[:3]]
    vars(server).update(fault)
    assert len(open_source(f"{server.url}/set")) == 40


def test_an_outage_ends_a_run_with_a_sentence_and_is_no_bad_image(server: Server):
    setting = settings(f"{server.url}/set", num_workers=1)
    source = open_source(setting.data.address)
    server.statuses = [503] * 1000
    sentence = rf"^{server.url}/set/train/\d+.tar: cannot be read, tried 9 times \(503, .*; mend the address or the network.*$"
    with pytest.raises(Unreachable, match=sentence):
        source.read(0)
    with (
        Loader(setting, source, World(0, 0, 1, torch.device("cpu")), 0, 4) as loader,
        pytest.raises(Unreachable, match=sentence),
    ):
        list(loader.micro_batches(0))


def test_a_shard_that_vanishes_is_a_bad_image_as_on_a_disk(server: Server, local: Path):
    far, near = open_source(f"{server.url}/set"), open_source(local)
    (local / "train" / "000003.tar").unlink()
    met = [{i for i in range(40) if not readable(source, i)} for source in (far, near)]
    assert met[0] == met[1] and len(met[0]) in range(2, 6)


def readable(source, i: int) -> bool:
    try:
        return bool(source.read(i))
    except FileNotFoundError:
        return False


def test_a_shard_that_is_cut_while_it_is_read(server: Server, local: Path):
    source = open_source(f"{server.url}/set")
    tar, (_, offset, size) = local / "train" / "000000.tar", source._places[2]
    os.truncate(tar, offset + size // 2)
    with pytest.raises(OSError, match=rf"000000.tar: {size // 2} bytes where its index has {size} at {offset}"):
        source.read(2)
    os.truncate(tar, 1)
    with pytest.raises(OSError, match="000000.tar: ends before what its index says"):
        source.read(2)


@pytest.mark.parametrize("address", ["set/train", "set/train/000000.tar"])
def test_a_server_without_ranges_is_refused_before_a_run(server: Server, address: str):
    server.ranges = False
    with pytest.raises(UserError, match=r"sends whole files where parts are asked for \(no HTTP Range\); serve"):
        open_source(f"{server.url}/{address}")


def test_a_server_that_loses_ranges_is_no_bad_image(server: Server):
    source = open_source(f"{server.url}/set")
    server.ranges = False
    with pytest.raises(Unreachable, match="sends whole files"):
        source.read(0)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda train: (train / "manifest.json").unlink(),
            r"set: no manifest.json in it or in its train/; give a dir",
        ),
        (
            lambda train: (train / "manifest.json").write_text("{}"),
            r"manifest.json: not of `fastjepa data shard`; name",
        ),
        (lambda train: (train / "manifest.json").write_text('{"format": "fastjepa shards 1"}'), r"manifest.json: damaged"),
        (lambda train: (train / "000002.npz").unlink(), r"train/000002.npz: not there"),
        (lambda train: (train / "000002.npz").write_bytes(b"text"), r"000002.npz: not the index of the tar beside it \("),
        (lambda train: shutil.copy(train / "000001.npz", train / "000002.npz"), r"000002.npz: not .* \(of another tar\); copy"),
        (lambda train: os.truncate(train / "000002.tar", 1024), r"000002.tar: (ends before|\d+ bytes where)"),
        (lambda train: (train / "000002.tar").unlink(), r"train/000002.tar: not there"),
    ],
)
def test_a_directory_that_is_not_whole_is_one_sentence(server: Server, local: Path, spoil, message: str):
    spoil(local / "train")
    with pytest.raises((UserError, OSError), match=message) as raised:
        open_source(f"{server.url}/set")
    assert str(raised.value).startswith(server.url) and "\n" not in str(raised.value)


def test_a_host_that_does_not_answer(server: Server, capsys):
    server.shutdown()
    server.server_close()
    assert main(["data", "check", f"{server.url}/set"]) == 2
    assert f"{server.url}/set/manifest.json: cannot be read, tried 3 times (Cannot connect to host" in capsys.readouterr().err


def test_a_server_that_hangs_is_given_up(server: Server, monkeypatch):
    monkeypatch.setattr(remote_files, "TIMEOUT", 0.1)
    server.delay = 1.0
    with pytest.raises(Unreachable, match=r"manifest.json: cannot be read, tried 3 times \(no answer\); mend"):
        open_source(f"{server.url}/set")


def test_a_login_comes_from_netrc_and_is_asked_for(server: Server, local: Path, tmp_path: Path, monkeypatch):
    server.login = "me:secret"
    with pytest.raises(UserError, match=r"access denied; for https write the login into ~/.netrc, for s3 set AWS_PROFILE"):
        open_source(f"{server.url}/set")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert contents(f"{server.url}/set") == contents(local)


def test_splits_stand_in_for_each_other(server: Server, local: Path):
    shutil.copytree(local / "train", local / "val")
    assert len(open_source(f"{server.url}/set", "test")) == 40
    with pytest.raises(UserError, match=r"train: no manifest.json in it or in its val or test/"):
        open_source(f"{server.url}/set/train", "val")


def test_tars_of_others_are_read_once_then_at_random(server: Server, local: Path, tmp_path: Path, monkeypatch, caplog):
    names = foreign(local.parent / "theirs")
    where = f"{server.url}/theirs/shard-{{000000..000001}}.tar"
    monkeypatch.setattr(remote_shards, "HEADER_BLOCK", 10_000)
    with caplog.at_level(logging.WARNING):
        assert contents(where) == contents(local.parent / "theirs")
    assert "2 tars (0.00 GB) are read once to know where their images lie" in caplog.text
    blocks = sum((local.parent / "theirs" / f"shard-00000{i}.tar").stat().st_size // 10_000 + 1 for i in range(2))
    assert len([wanted for _, _, wanted in server.asked if wanted]) <= 3 + blocks + 8  # proof and tails, scan, reads
    assert open_source(where).classes == ("0", "1", "2", "3")
    assert [open_source(where).name(i).rpartition("/")[2] for i in range(8)] == names
    caplog.clear()
    server.asked.clear()
    open_source(where)
    assert not caplog.text and len(server.asked) == 5  # of each tar the size and the tail, and one proof of ranges
    os.remove(next((tmp_path / "kept").rglob("000001.npz")))
    pack_shard(local.parent / "theirs" / "shard-000000.tar", {"new.png": save_image(tmp_path / "x.png", 99).read_bytes()})
    with caplog.at_level(logging.WARNING):
        assert contents(where) == contents(local.parent / "theirs")
    assert "2 tars" in caplog.text and len(open_source(where)) == 5


@pytest.mark.parametrize("damage", ["header", "links", "none"])
def test_what_is_damaged_is_what_it_is_on_a_disk(server: Server, local: Path, tmp_path: Path, damage: str, capsys):
    foreign(local.parent / "theirs")
    first, second = sorted((local.parent / "theirs").glob("*.tar"))
    if damage == "links":
        with tarfile.open(second, "a") as opened:
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.LNKTYPE, "0.png"
            opened.addfile(link)
    with tarfile.open(second) as opened:
        header = opened.getmembers()[4].offset
    if damage == "header":
        with open(second, "r+b") as file:
            file.seek(header)
            file.write(b"x")
    first.write_bytes(first.read_bytes() * 2)  # two joined
    where = f"{server.url}/theirs/shard-{{000000..000001}}.tar"
    disk = open_source(local.parent / "theirs")
    assert bool(disk.unreadable) == (damage != "none")
    for _ in range(2):  # with an index made now, and with the one that was kept
        far = open_source(where)
        assert len(far) == len(disk)
        assert far.unreadable == [(path.replace(str(local.parent), server.url), why) for path, why in disk.unreadable]
    assert contents(where) == contents(local.parent / "theirs")
    wrong = int(damage != "none")
    assert main(["data", "check", where, "--output", str(tmp_path / "bad.txt")]) == wrong
    assert f"bad: {wrong}" in capsys.readouterr().out
    assert main(["data", "shard", where, str(tmp_path / "out")]) == 2 * wrong


def test_one_tar_is_a_set_too(server: Server, local: Path):
    assert contents(f"{server.url}/set/train/000001.tar") == contents(local / "train" / "000001.tar")
    with pytest.raises(UserError, match="000001.tar: has no val split"):
        open_source(f"{server.url}/set/train/000001.tar", "val")


@pytest.mark.parametrize("content", [b"no tar" * 500, b"\x1f\x8b" + b"x" * 2000])
def test_what_is_no_tar_is_named(server: Server, local: Path, content: bytes):
    (local / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match="set/x.tar: not a tar shard that can be read"):
        open_source(f"{server.url}/set/x.tar")


@pytest.mark.parametrize(
    "where, message",
    [
        ("pipe:curl -s https://h/0.tar", "no command is run to read data; give an address, https:// or s3://"),
        ("gs://bucket/train", "gs://bucket/train: shards are read from https:// and s3://"),
        ("https://me:secret@h/train", "^https://h/train: give it without login"),
        ("https://h/0.tar?signature=x", "^https://h/0.tar: give it without login"),
        ("https://h/shard-{000..009.tar", "its braces do not match; write shard-{000000..000009}.tar"),
        ("https://h/0.tar.gz", "https://h/0.tar.gz: compressed; unpack each"),
        ("s3://bucket/*.tar", r"\* finds nothing there; name the shards: shard-{000000..000009}.tar"),
    ],
)
def test_what_cannot_be_an_address_is_refused(where: str, message: str):
    with pytest.raises(UserError, match=message):
        open_source(where)


@pytest.mark.parametrize("library, where", [("fsspec", "http://127.0.0.1/set"), ("s3fs", "s3://bucket/set"),
                                            ("braceexpand", "http://127.0.0.1/0.tar")])  # fmt: skip
def test_without_the_libraries_it_says_what_to_install(library: str, where: str, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    _filesystem.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'fastjepa\[remote\]'"):
        open_source(where)


def test_data_check_and_data_shard_take_an_address(server: Server, local: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "check", f"{server.url}/set", "--workers", "2"]) == 0
    assert "40 images read, smallest 40x30" in capsys.readouterr().out
    command = ["data", "shard", f"{server.url}/set", str(tmp_path / "fast"), "--keep-order", "--workers", "2"]
    assert main(command) == 0
    assert contents(tmp_path / "fast") == contents(local)


def test_data_check_names_a_bad_image_by_its_address(server: Server, local: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = open_source(f"{server.url}/set")
    with open(local / "train" / "000001.tar", "r+b") as tar:
        tar.seek(int(source._places[5][1]))
        tar.write(np.zeros(100, np.uint8).tobytes())
    assert main(["data", "check", f"{server.url}/set"]) == 1
    assert f"{server.url}/set/train/000001.tar/" in (tmp_path / "bad.txt").read_text()
