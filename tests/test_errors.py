"""The errors people make: each is one sentence that names the thing and the remedy, exit code 2, and no traceback."""

import os
import re
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastjepa.cli.main import main
from fastjepa.errors import is_users_to_mend
from tests.support.places import ROOT
from tests.support.runs import write_config

TRAIN = ["train", "--config", "CONFIG", "--output", "OUT"]
MISTAKES = {  # what is wrong: the command, what its sentence says
    "no such config": (["train", "--config", "no/such.yaml"], r"no/such\.yaml: cannot read the config .*cifar10, demo"),
    "a config's name misspelt": (["masks", "--config", "dmeo"], "dmeo: cannot read the config .*demo"),
    "a config that is none": (["train", "--config", "IMAGES/00.png"], "00.png: not a YAML file"),
    "a key misspelt": ([*TRAIN, "mask.patchsize=4"], "mask.patchsize: unknown key; did you mean 'patch_size'"),
    "a section misspelt": ([*TRAIN, "maks.patch_size=4"], "unknown section 'maks'; did you mean 'mask'"),
    "a value out of range": ([*TRAIN, "mask.patch_size=0"], "mask.patch_size: 0 must be greater than 0"),
    "a model misspelt": ([*TRAIN, "meta.model_name=vit_hug"], "did you mean 'vit_huge'"),
    "an override without a section": ([*TRAIN, "lr=1"], "override 'lr=1': write section.key=value"),
    "no such directory": ([*TRAIN, "data.source=/no/such"], "'/no/such' is neither a directory nor a data set's name"),
    "a directory without images": ([*TRAIN, "data.source=EMPTY"], "EMPTY: no image files in it"),
    "a data set not fetched": ([*TRAIN, "data.source=cifar10"], "run: fastjepa data get cifar10"),
    "a data set misspelt": (["data", "get", "fashion-mnis"], "did you mean 'fashion-mnist'"),
    "data without labels": (["eval", "knn", "--checkpoint", "RUN", "--data", "IMAGES"], "IMAGES: has no test split"),
    "too few images": ([*TRAIN, "data.batch_size=64"], "40 images, fewer than one global batch of 64 .*lower data.batch_size"),
    "masks that cannot be drawn": ([*TRAIN, "mask.min_keep=60"], "mask.min_keep"),
    "no GPU": ([*TRAIN, "runtime.device=cuda"], "finds no CUDA device; set runtime.device=cpu or auto"),
    "no GPU to evaluate on": (["eval", "knn", "--checkpoint", "RUN", "--data", "SPLITS", "--device", "cuda"], "no CUDA device"),
    "kernels without a GPU": ([*TRAIN, "runtime.kernels=triton"], "runtime.kernels: .*it needs a GPU"),
    "attention without a GPU": ([*TRAIN, "runtime.attention=varlen"], "runtime.attention: varlen .*CUDA"),
    "to resume a run of another size": (
        ["train", "--config", "CONFIG", "--output", "RUN", "meta.embed_dim=64"],
        r"encoder\.safetensors: \S+ is .*32.* in the checkpoint and .*64.* in this run; resume with the configuration",
    ),
    "to start from another size": ([*TRAIN, "--init", "RUN", "meta.embed_dim=64"], "RUN: the weights do not fit the config's"),
    "nothing to resume": ([*TRAIN, "--resume", "must"], "OUT/checkpoints: nothing to resume from; check --output"),
    "no such run": (["eval", "knn", "--checkpoint", "/no/run", "--data", "SPLITS"], "/no/run"),
    "a damaged checkpoint": (["train", "--config", "CONFIG", "--output", "DAMAGED"], r"encoder\.safetensors"),
    "a file in the way": (["train", "--config", "CONFIG", "--output", "CONFIG"], "CONFIG"),
    "to overwrite": (["convert", "RUN", "SPLITS", "--to", "timm"], "SPLITS: exists already; remove it"),
    "no such reference": (["verify", "no.safetensors"], r"no\.safetensors"),
}
MISSING = {  # module: what needs it, what to do
    "nvidia.dali": (["data.loader=dali"], r"pip install 'fastjepa\[dali\]', or set it to auto or torch"),
    "deepspeed": (["runtime.zero=1"], r"pip install 'fastjepa\[deepspeed\]' or set it to 0"),
    "lightly": (["loss.regularizer=sigreg"], r"loss.regularizer: sigreg needs lightly; pip install 'fastjepa\[lightly\]'"),
}
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB."


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """A config over 40 images, a run of one step, a copy of it that is damaged, and what else the list names."""
    root = tmp_path_factory.mktemp("errors")
    found = {name: root / name for name in ("IMAGES", "EMPTY", "RUN", "DAMAGED", "SPLITS")}
    for name in ("IMAGES", "EMPTY"):
        found[name].mkdir()
    config = write_config(found["IMAGES"])
    assert main(["train", "--config", str(config), "--output", str(found["RUN"]), "--max-steps", "1"]) == 0
    shutil.copytree(found["RUN"], found["DAMAGED"])
    (weights,) = found["DAMAGED"].rglob("encoder.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"????")
    for split in ("train", "test"):
        shutil.copytree(found["IMAGES"], found["SPLITS"] / split / "a", ignore=shutil.ignore_patterns("*.yaml"))
        shutil.copytree(found["IMAGES"], found["SPLITS"] / split / "b", ignore=shutil.ignore_patterns("*.yaml"))
    return {"CONFIG": str(config)} | {name: str(path) for name, path in found.items()}


@pytest.fixture
def sentence(places, tmp_path, monkeypatch, capsys):
    """Return what a command that must be refused says: its one sentence, with the places' names for their paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTJEPA_DATA", str(tmp_path / "data"))
    names = places | {"OUT": str(tmp_path / "OUT")}

    def say(command: list[str]) -> str:
        words = [re.sub(r"\b[A-Z]{3,}\b", lambda name: names[name[0]], word) for word in command]
        capsys.readouterr()
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert said.startswith(f"fastjepa {command[0]}: ") and said.count("\n") == 1, said
        with pytest.raises(Exception):  # noqa: B017  --debug shows whatever it was
            main([*words, "--debug"])
        for name in sorted(names, key=lambda name: -len(names[name])):
            said = said.replace(names[name], name)
        return said.strip()

    return say


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake, sentence):
    command, says = MISTAKES[mistake]
    said = sentence(command)
    assert re.search(says, said), said


@pytest.mark.parametrize("module", MISSING)
def test_a_missing_library_is_named_with_what_installs_it(module, sentence, monkeypatch):
    settings, says = MISSING[module]
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # Python's own way to make an import fail
    said = sentence([*TRAIN, *settings])
    assert re.search(says, said), said


def test_a_port_in_use(sentence, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert f"127.0.0.1:{port}: the port is in use; set MASTER_PORT to a free one" in sentence(TRAIN)


def raises(error: Exception):
    def run_out(*arguments, **named):
        raise error

    return run_out


def test_out_of_memory_in_training(sentence, monkeypatch):
    monkeypatch.setattr("fastjepa.model.jepa.Jepa.forward", raises(torch.OutOfMemoryError(OUT_OF_MEMORY)))
    said = sentence(TRAIN)
    assert said.startswith("fastjepa train: out of memory, 2.00 GiB more were asked for; lower runtime.micro_batch")


def test_what_counts_as_out_of_memory():
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert all(map(is_users_to_mend, (torch.OutOfMemoryError(OUT_OF_MEMORY), MemoryError(), cublas)))
    assert not is_users_to_mend(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_out_of_memory_in_an_evaluation(sentence, monkeypatch):
    monkeypatch.setattr("fastjepa.model.vit.Encoder.forward", raises(torch.OutOfMemoryError(OUT_OF_MEMORY)))
    said = sentence(["eval", "knn", "--checkpoint", "RUN", "--data", "SPLITS", "--encoder", "context", "--no-cache"])
    assert said.startswith("fastjepa eval: out of memory, 2.00 GiB more were asked for") and "--device cpu" in said


def test_another_error_keeps_its_traceback(monkeypatch, places, tmp_path):
    monkeypatch.setattr("fastjepa.model.jepa.Jepa.forward", raises(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", "--config", places["CONFIG"], "--output", str(tmp_path)])


def python(*words: object, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def test_a_process_ends_with_2_and_with_a_traceback_only_when_asked():
    command = ["-m", "fastjepa.cli", "masks", "--config", "none.yaml"]
    short, long = python(*command), python(*command, "--debug")
    assert short.returncode == 2 and short.stderr.count("\n") == 1
    assert long.returncode == 1 and "Traceback" in long.stderr


def test_an_option_misspelt_ends_with_2():
    assert python("-m", "fastjepa.cli", "train", "--confg", "demo").returncode == 2


@pytest.mark.slow
def test_without_triton_all_runs_but_what_needs_it(places, tmp_path):
    """macOS has none, and Windows lacks two modules of Python's besides: to import them fails there."""
    for name in ("triton", "resource", "fcntl"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('No module named {name}')")
    paths = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    command = ["-m", "fastjepa.cli", "train", "--config", places["CONFIG"], "--output", tmp_path / "run", "--max-steps", "1"]
    runs, refused = (python(*command, *asked, PYTHONPATH=paths) for asked in ([], ["runtime.kernels=triton"]))
    assert runs.returncode == 0, runs.stderr
    assert '"memory_gib": null' in (tmp_path / "run/metrics.jsonl").read_text()
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "runtime.kernels: " in refused.stderr and "triton is not installed" in refused.stderr


@pytest.mark.slow
def test_a_host_without_memory(places, tmp_path):
    """A process that may have 512 MiB more, and a network of gigabytes."""
    file = tmp_path / "limited.py"
    file.write_text("""import resource, sys
import torch, torchvision, fastjepa.train
from fastjepa.cli.main import main

pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 29),) * 2)
sys.exit(main(sys.argv[1:]))
""")
    large = ["meta.embed_dim=8192", "meta.num_heads=8", "data.num_workers=0"]
    ended = python(file, "train", "--config", places["CONFIG"], "--output", tmp_path / "run", *large)
    assert ended.returncode == 2, ended.stderr
    passed_over, said = ended.stderr.splitlines()
    assert said.startswith("fastjepa train: out of memory, ") and passed_over.endswith("passed over (.yaml 1)")


def test_a_sentence_is_written_in_one_piece(monkeypatch):
    """Under torchrun standard error is not buffered: what is written in parts runs into the lines of other ranks."""
    written = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    assert main(["train", "--config", "nowhere"]) == 2
    assert len(written) == 1 and written[0].startswith("fastjepa train: ") and written[0].endswith("\n")
