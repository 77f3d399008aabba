"""Every command and every block of Python in the README and the documentation runs, at toy size, where its files would be.

Launchers are given to their own parsers and what they would start is run here, as one rank. ONLY_PARSED says what is not run
at all, and why.
"""

import dataclasses
import functools
import importlib
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from fastjepa import cli
from fastjepa.cli.main import build_parser, main
from fastjepa.config.schema import Config
from fastjepa.data.prepare.catalog import CIFAR10_CLASSES
from tests.support.arrays import write_shapes
from tests.support.images import write_idx
from tests.support.places import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^ *```(bash|sh|python|yaml)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)  # indented where it is in a list
ONLY_PARSED = {  # how a command begins: why it is only parsed
    "make": "it is the whole work of a developer's machine; `make -n` says that the target is there",
    "pip install": "it would change this environment; the extras it names exist",
    "python -m fastjepa_kernels.inspect": "it compiles for minutes; tests/test_inspect.py runs it",
    "python benchmarks/": "it measures for minutes; tests/test_bench_*.py and tests/test_gpu_hours.py run them small",
    "fastjepa data get": "it fetches or renders; tests/test_catalog.py and tests/test_scenes.py run it",
    "fastjepa sweep": "it trains for hours; tests/studies runs it small",
    "fastjepa eval lowlevel": "it needs rendered scenes; tests/test_lowlevel.py runs it",
    "fastjepa eval dense": "it needs label images; tests/evals/test_dense_table.py runs it",
}
# Before the settings of the page, which therefore win.
SMALL = [f"meta.{key}" for key in ("model_name=vit_tiny", "embed_dim=32", "depth=4", "num_heads=2", "pred_depth=1",
                                   "pred_emb_dim=24", "pred_num_heads=2")]  # fmt: skip
SMALL += [f"data.{key}" for key in ("crop_size=32", "batch_size=4", "num_workers=0")]
SMALL += [f"mask.{key}" for key in ("patch_size=4", "min_keep=2", "truncate_group=4")]
SMALL += ["optimization.epochs=1", "optimization.warmup=0", "loss.regularizer=none"]
SMALL += [f"runtime.{key}" for key in ("dtype=fp32", "device=cpu", "micro_batch=null", "threads=1", "compile=false")]
TOY = {  # after a command's own words, which therefore lose
    "train": ["--max-steps", "1", "runtime.zero=0"],
    "masks": ["--groups", "2"],
    "eval attentive": ["--epochs", "1"],
    "eval finetune": ["--epochs", "1"],
    "eval lowshot": ["--fraction", "0.5"],
    "data check": ["--workers", "1"],
    "data stats": ["--workers", "1"],
    "data shard": ["--workers", "1"],
    "visualize": ["--images", "2", "--k", "2", "--n-test", "4"],
    "decoder": ["--steps", "2", "--batch", "4"],
}


def blocks(page: Path, *languages: str) -> list[str]:
    return [textwrap.dedent(code) for language, code in BLOCK.findall(page.read_text()) if language in languages]


def commands() -> list[str]:
    """The command lines of all pages, each once; continuations joined, comments cut."""
    lines = [line for page in PAGES for code in blocks(page, "bash", "sh") for line in code.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))))


def inline_commands() -> list[str]:
    """The whole commands within the text: those that say their config or files, and hold no placeholder in capitals."""
    whole = r"`(fastjepa (?:(?:train|masks|plan) --config |(?:verify|convert|data check|data stats|data shard) )[^`\n]+)`"
    found = [code for page in PAGES for code in re.findall(whole, page.read_text())]
    return list(dict.fromkeys(code for code in found if not re.search(r"\b[A-Z]+\b", code)))


def examples() -> list[str]:
    """Return the examples that end the help of a command."""
    modules = [importlib.import_module(f"fastjepa.cli.{module.name}") for module in pkgutil.iter_modules(cli.__path__)]
    found = [value for module in modules for name, value in vars(module).items() if name.endswith("_EXAMPLES")]
    texts = [text for value in found for text in (value.values() if isinstance(value, dict) else [value])]
    lines = [line for text in texts for line in text.splitlines()]
    shown = [line.strip() for line in lines if re.match("  (fastjepa|torchrun|deepspeed|python) ", line)]
    return list(dict.fromkeys(command for line in shown for command in line.split(" && ") if not command.endswith("--help")))


def only_parsed(command: str) -> bool:
    return command.startswith(tuple(ONLY_PARSED))


def started(command: str) -> list[str]:
    """The words after `fastjepa` of what a command starts; its launcher's options are checked by the launcher's parser."""
    first, *words = shlex.split(command)
    if first == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(words)
        return [*_train(launch.training_script), *launch.training_script_args]
    if first == "deepspeed":
        from deepspeed.launcher.runner import parse_args

        launch = parse_args(words)
        return [*_train(launch.user_script), *launch.user_args]
    if first == "sbatch":
        script = next(i for i, word in enumerate(words) if word.endswith(".sh"))
        subprocess.run(["bash", "-n", ROOT / words[script]], check=True)
        return ["train", *words[script + 1 :]]
    if first == "python":
        return [*_train(words[0]), *words[1:]]
    assert first == "fastjepa", f"{command}: say in tests/test_docs.py how it is run"
    return words


def _train(script: str) -> list[str]:
    assert script == "fastjepa/train.py", f"{script}: say in tests/test_docs.py how it is run"
    return ["train"]


def accepted(words: list[str]) -> None:
    """Whether the command line takes these words, as `cli.main` reads them."""
    args, rest = build_parser().parse_known_args(words)
    assert not [word for word in rest if word.startswith("-")] and (not rest or "overrides" in args), rest


@functools.cache
def help_of(script: str) -> str:
    """Return what a script of benchmarks/ says of its options."""
    asked = [sys.executable, script, "--help"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", commands())
def test_a_command_is_accepted(command: str):
    """The parser of a command accepts its words, and everything of this repository that it reads is there."""
    subprocess.run(["bash", "-n", "-c", command], check=True)
    words = shlex.split(command)
    read = [word for before, word in zip(["", *words], words, strict=False) if before not in ("--write", "--output")]
    paths = [word for word in read if word.startswith(("fastjepa/", "benchmarks/", "configs/", "tests/", "docs/", "./"))]
    assert [path for path in paths if not (ROOT / path.partition("[")[0]).exists()] == []
    if words[0] == "make":
        assert all(re.search(f"^{word}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for word in words[1:])
    elif words[:2] == ["pip", "install"]:
        extras = {extra for found in re.findall(r"\[([\w,]+)\]", command) for extra in found.split(",")}
        assert all(f'"{extra}": [' in (ROOT / "setup.py").read_text() for extra in extras)
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / "kernels" / f"{words[2].replace('.', '/')}.py").is_file()
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        assert [word for word in words[2:] if word.startswith("--") and word not in help_of(words[1])] == []
    elif words[:2] != ["python", "docs/curves.py"]:
        accepted(started(command))


@pytest.mark.parametrize("command", [*inline_commands(), *examples()])
def test_a_command_within_a_text_is_accepted(command: str):
    accepted(started(command))


def test_what_is_only_parsed_is_listed():
    """No reason without a command."""
    assert [start for start in ONLY_PARSED if not any(command.startswith(start) for command in commands())] == []


@pytest.fixture(scope="module")
def place(tmp_path_factory, request) -> Path:
    """A directory with what the pages suppose: this repository's files, images, two data sets, runs and an official file."""
    root = tmp_path_factory.mktemp("docs")
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.chdir(root)
    patch.setenv("FASTJEPA_DATA", str(root / "sets"))
    for name in ("configs", "docs", "fastjepa"):
        (root / name).symlink_to(ROOT / name)
    draw = np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 20)):
        write_idx(root / f"sets/fashion-mnist/{prefix}-images-idx3-ubyte.gz", draw.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(root / f"sets/fashion-mnist/{prefix}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 4)
    for split, count in (("train", 12), ("test", 2)):
        for label in CIFAR10_CLASSES:
            folder = root / "sets/cifar10" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
    for split in ("train", "test"):
        write_shapes(root / "sets/sentinel2", 24, 40, split=split)
    (config,) = (block for block in blocks(ROOT / "docs/data.md", "yaml") if "# sentinel2.yaml" in block)
    (root / "sentinel2.yaml").write_text(config)
    for name in ("demo", "cifar10", "multiblock"):
        toy(["train", "--config", name], root, Path("runs") / name)
    toy(["train", "--config", "sentinel2.yaml"], root, Path("runs/sentinel2"))
    own = [f"data.{name}" for name in ("channels=3", "bands=[3,2,1]", "mean=[0.3,0.3,0.3]", "std=[0.2,0.2,0.2]")]
    toy(["train", "--config", "sentinel2.yaml", *own], root, Path("runs/rgb"))
    toy(["decoder", "runs/demo", "--data", "fashion-mnist"], root, root)
    for copy in ("runs/h14", "runs/salt-teacher", "runs/mine"):
        shutil.copytree("runs/cifar10", copy)
    shutil.copyfile("runs/h14/config.yaml", "in1k_vith14_ep300.yaml")
    for name in ("IN1K-vit.h.14-300e.pth.tar", "jepa-ep100.pth.tar"):
        assert main(["convert", "runs/h14", name, "--to", "meta", "--steps-per-epoch", "1"]) == 0
    return root


def toy(words: list[str], place: Path, output: Path) -> None:
    """Run a command of the trainer with its paths moved into `place`, and so little of everything that it takes a second."""
    names = {"/data/sentinel2": place / "sets/sentinel2", "/data/": place / "sets/cifar10", "/fast/": output}
    words = [next((str(path) for start, path in names.items() if word.startswith(start)), word) for word in words]
    words = [re.sub(r"^data\.source=/.*", f"data.source={place / 'sets/cifar10'}", word) for word in words]
    if words[0] in ("train", "masks"):
        own = [word for word in words[1:] if not re.match(r"[a-z]+\.\w+=", word)]
        settings = [word for word in words if word not in own and re.match(r"[a-z]+\.\w+=", word)]
        known = any(word in " ".join(own) for word in ("demo", "cifar10", "multiblock"))
        images = place / "sets" / ("sentinel2" if "sentinel2.yaml" in own else "cifar10")
        where = [] if known else [f"data.source={images}", "data.root_path=", "data.image_folder="]
        words = [words[0], *own, *SMALL, *where, *settings]
    kind = " ".join(words[:2]) if words[0] in ("eval", "data") else words[0]
    more = ["--output", str(output)] if words[0] == "train" else []
    if words[0] == "convert":
        for old in (Path(words[2]), Path(words[2]).with_suffix(".pt2")):
            shutil.rmtree(old, ignore_errors=True)
            old.unlink(missing_ok=True)
    assert main([*words, *TOY.get(kind, []), *more]) in (None, 0)


def kind(command: str) -> str:
    """Return the subcommand, for `eval`, `data` and `convert` with what it does; the launchers all train."""
    words = shlex.split(command)
    if words[0] == "python" and words[1] != "fastjepa/train.py":
        return words[1]
    name, *rest = started(command)
    return f"{name} {rest[0]}" if name in ("eval", "data") else name


def runs() -> list:
    """Return the commands that are run: the first of each kind among the slow tests, the others among the long ones."""
    met, found = set(), []
    for command in (command for command in commands() if not only_parsed(command)):
        mark = pytest.mark.long if kind(command) in met else pytest.mark.slow
        found.append(pytest.param(command, marks=mark, id=command))
        met.add(kind(command))
    return found


@pytest.mark.xdist_group("docs")  # what the pages suppose is made once
@pytest.mark.parametrize("command", runs())
def test_a_command_runs(command: str, place: Path):
    words = shlex.split(command)
    if words[0] == "python" and words[1] != "fastjepa/train.py":
        subprocess.run([sys.executable, *words[1:]], check=True, timeout=120)
    else:
        ran(tuple(without_output(started(command))), place)


def without_output(words: list[str]) -> list[str]:
    at = words.index("--output") if words[0] == "train" and "--output" in words else len(words)
    return words[:at] + words[at + 2 :]


@functools.cache
def ran(words: tuple[str, ...], place: Path) -> None:
    """Once for all launchers that start the same."""
    toy(list(words), place, Path(tempfile.mkdtemp(dir=place)) / "out")


def python_blocks() -> list[tuple[str, str]]:
    return [(f"{page.name}-{number}", code) for page in PAGES for number, code in enumerate(blocks(page, "python"))]


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
@pytest.mark.parametrize("code", [code for _, code in python_blocks()], ids=[name for name, _ in python_blocks()])
def test_a_block_of_python_runs(code: str, place: Path):
    """`images` is a batch as the demo's network takes it."""
    exec(compile(code, "page", "exec"), {"images": torch.zeros(2, 1, 32, 32, dtype=torch.uint8)})


def test_the_kernels_page_is_tested_elsewhere():
    """The Python of the page is that of kernels/README.md: tests/test_conversions.py."""
    assert "<!-- file: kernels/README.md -->" in (ROOT / "docs/kernels.md").read_text()


@pytest.mark.parametrize("name, runs", [("runs", "healthy collapsing"), ("small", "base over-the-batch vicreg")])
def test_the_picture_is_of_the_runs_beside_it(name: str, runs: str, tmp_path: Path):
    drawn, files = tmp_path / "drawn.svg", [f"docs/metrics/{run}.jsonl" for run in runs.split()]
    subprocess.run([sys.executable, "docs/curves.py", drawn, *files], cwd=ROOT, check=True, timeout=60)
    ElementTree.parse(drawn)
    assert drawn.read_text() == (ROOT / f"docs/pictures/{name}.svg").read_text()


def test_the_picture_of_the_scenes_is_of_their_labels(tmp_path: Path):
    drawn, headings = tmp_path / "drawn.png", 24  # rows of text, which another version of Pillow may draw otherwise
    subprocess.run([sys.executable, "docs/scene_labels.py", drawn], cwd=ROOT, check=True, timeout=60)
    with Image.open(drawn) as new, Image.open(ROOT / "docs/pictures/scene-labels.png") as old:
        assert new.size == old.size and np.array_equal(np.array(new)[headings:], np.array(old)[headings:])


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link_and_with_every_key(tmp_path: Path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir"]
    done = subprocess.run([*build, tmp_path / "site"], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/configs/index.html").read_text()
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.default):
            assert f"<code>{field.name}</code>" in page, f"{section.name}.{field.name}"
    assert "patchify_tokens" in (tmp_path / "site/kernels/index.html").read_text()
    assert "--temperature" not in (tmp_path / "site/index.html").read_text()
    assert "usage: fastjepa eval linear" in (tmp_path / "site/evaluation/index.html").read_text()
