"""The rules of the house, checked by machine: layout, imports, sizes, words, configs, README."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from fastjepa.config.load import load_config
from tests.support.places import CONFIGS, ROOT, files

pytest_plugins = ["pytester"]

# files of fastjepa_kernels that are no op
OPS_SUPPORT = {"__init__", "cases", "dense_attention", "dispatch", "layers", "inspect"}
COMMON_PACKAGES = {
    "accelerate",
    "datasets",
    "evaluate",
    "kernels",
    "tokenizers",
    "transformers",
}  # met without being a dependency


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def below(folder: str) -> list[Path]:
    return [path for path in files(".py") if Path(folder) in path.parents]


def imports(path: Path) -> set[str]:
    """Top-level names of everything a file imports absolutely."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def body(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.stmt]:
    """The statements of a function without its docstring."""
    return function.body[1:] if ast.get_docstring(function) is not None else function.body


# The law of the house: an import goes down this list or stays in its folder.
FOLDERS = ("errors", "cores", "files", "rng", "config", "ranks", "data", "masks", "loader", "model", "loss", "engine",
           "checkpoint", "weights", "plan", "run", "evals", "monitoring", "train", "visualize", "report", "studies",
           "cli")  # fmt: skip
SHARED_NAMES = {"main", "register"}  # what every command and program has
NO_NOUN = re.compile(r"(What|Of|By|Its|Those)\b")  # beginnings of a docstring that leave the noun out

CONFIG_READERS = 20  # modules outside of config/ that may import from it, at most

Sources = dict[str, str]  # module -> text


def package() -> Sources:
    """Return the text of every module of fastjepa by its dotted name."""
    names = {path: ".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in below("fastjepa")}
    return {name: (ROOT / path).read_text() for path, name in names.items()}


def folder(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def imported(sources: Sources) -> dict[str, set[str]]:
    """Return the modules of the package that each module imports, also those it imports inside of functions."""
    found = {}
    for module, text in sources.items():
        found[module] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastjepa":
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                found[module] |= {name if name in sources else node.module for name in full}
            elif isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names if alias.name in sources}
        found[module] -= {module, "fastjepa"}
    return found


def upward(sources: Sources) -> list[str]:
    """Return the imports that go up, as "importer -> imported"."""
    place = {name: number for number, name in enumerate(FOLDERS)}
    pairs = [
        (module, other) for module, others in imported(sources).items() for other in sorted(others) if module != "fastjepa"
    ]
    return [f"{module} -> {other}" for module, other in pairs if place[folder(other)] > place[folder(module)]]


def config_readers(sources: Sources) -> list[str]:
    """Return the modules outside of config/ that import from it, whatever they take and wherever they do."""
    found = imported(sources).items()
    outside = [module for module, others in found if "config" in map(folder, others) and folder(module) != "config"]
    return sorted(outside)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return a circle of imports for each module that closes one, by a walk in depth."""
    done: set[str] = set()
    found: list[list[str]] = []

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append(path[path.index(module) :] + [module])
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                walk(other, [*path, module])
            done.add(module)

    for module in graph:
        walk(module, [])
    return found


def top_level_names(text: str) -> set[str]:
    """Return the names that a module defines itself."""
    names = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def crowded_names(sources: Sources) -> dict[str, list[str]]:
    """Return the top-level names that more than two modules have, and where."""
    where: dict[str, list[str]] = {}
    for module, text in sources.items():
        for name in top_level_names(text) - SHARED_NAMES:
            where.setdefault(name, []).append(module)
    return {name: modules for name, modules in where.items() if len(modules) > 2}


def long_signatures(text: str) -> list[str]:
    """Return the functions with more than six parameters, self and cls not counted."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if len([name for name in given if name not in ("self", "cls")]) > 6:
                found.append(node.name)
    return found


def nounless(text: str) -> list[str]:
    """Return the docstrings of a module that begin without their noun."""
    kinds = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    found = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return [docstring.splitlines()[0] for docstring in found if NO_NOUN.match(docstring)]


def test_imports_go_down():
    assert {folder(module) for module in package()} - {"fastjepa"} == set(FOLDERS)
    assert upward(package()) == []


def test_few_modules_know_the_config():
    """The others take the values they need, or the object that was made of the config in one place."""
    readers = config_readers(package())
    assert len(readers) <= CONFIG_READERS, readers


def test_no_imports_go_in_circles():
    assert circles(imported(package())) == []


def test_a_name_has_one_meaning():
    assert crowded_names(package()) == {}


def test_functions_have_at_most_six_parameters():
    texts = {path: (ROOT / path).read_text() for path in (*below("fastjepa"), *below("benchmarks"))}
    assert {str(path): found for path, text in texts.items() if (found := long_signatures(text))} == {}


def test_docstrings_begin_with_a_verb_or_a_noun():
    folders = ("fastjepa", "kernels", "benchmarks", "tests")
    texts = {path: (ROOT / path).read_text() for folder in folders for path in below(folder)}
    assert {str(path): found for path, text in texts.items() if (found := nounless(text))} == {}


def test_the_law_sees_planted_faults():
    """Each check above fails on a package with the one fault that it is for."""
    sound = {
        "fastjepa.rng": "def draw(): return 1",
        "fastjepa.masks.draw": "from fastjepa.rng import draw\ndef draw_masks(): return draw()",
    }
    assert upward(sound) == [] and circles(imported(sound)) == [] and crowded_names(sound) == {}
    up = sound | {"fastjepa.rng": "def draw():\n    from fastjepa.masks.draw import draw_masks"}
    assert upward(up) == ["fastjepa.rng -> fastjepa.masks.draw"]
    assert circles(imported(up)) == [["fastjepa.rng", "fastjepa.masks.draw", "fastjepa.rng"]]
    reads = {name: "def f():\n    from fastjepa.config.schema import Config" for name in ("fastjepa.loss.a", "fastjepa.train")}
    schema = {"fastjepa.config.schema": "Config = dict", "fastjepa.config.load": "from fastjepa.config.schema import Config"}
    whole = {
        "fastjepa.config": "",
        "fastjepa.cli.a": "from fastjepa import config",
        "fastjepa.cli.b": "import fastjepa.config.load",
    }
    assert config_readers(sound | schema) == [] and config_readers(reads | schema) == list(reads)
    assert config_readers(whole | schema) == ["fastjepa.cli.a", "fastjepa.cli.b"]
    thrice = {f"fastjepa.masks.{name}": "def load(): return 1\ndef main(): return 2" for name in "abc"}
    assert set(crowded_names(thrice)) == {"load"}
    assert long_signatures("class A:\n    def f(self, a, b, c, d, e, *, g): pass") == []
    assert long_signatures("def f(a, b, c, d, e, f, *, g): pass") == ["f"]
    assert nounless('"""Packed rows."""\ndef f():\n    "What it is."\nclass A:\n    "Of the rows."') == [
        "What it is.",
        "Of the rows.",
    ]


def test_no_trainer_file_shadows_a_module():
    """`deepspeed fastjepa/train.py` puts fastjepa/ first on sys.path: its names must be nobody else's."""
    names = {path.parts[1].removesuffix(".py") for path in below("fastjepa")} - {"__init__", "__main__"}  # files and folders
    assert {"train", "config"} <= names
    assert not names & (sys.stdlib_module_names | packages_distributions().keys() | COMMON_PACKAGES)


def test_kernels_is_no_package():
    """kernels/__init__.py would shadow Hugging Face's `kernels`."""
    assert (ROOT / "kernels" / "fastjepa_kernels" / "__init__.py").is_file()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_only_the_engine_imports_deepspeed():
    assert {str(path) for path in below("fastjepa") if "deepspeed" in imports(path)} <= {"fastjepa/engine/zero.py"}


def test_kernels_import_only_torch_and_triton():
    """varlen_attention is the door to two libraries more, which it imports where they are asked for."""
    allowed = sys.stdlib_module_names | {"torch", "triton"}
    behind_the_door = {"varlen_attention.py": {"flash_attn", "xformers"}}
    extra = {
        path: imports(path) - allowed - behind_the_door.get(path.name, set()) for path in below("kernels/fastjepa_kernels")
    }
    assert {str(path): names for path, names in extra.items() if names} == {}


def test_files_stay_short():
    lengths = {path: (ROOT / path).read_text().count("\n") for path in files(".py")}
    limits = {path: 500 if path.parts[0] == "tests" else 400 for path in lengths}  # a test file is a list, read in pieces
    assert {str(path): lines for path, lines in lengths.items() if lines > limits[path]} == {}


def test_functions_stay_short():
    def start(f: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        """A kernel names each argument on a line of its own, with its shape: they do not count."""
        return f.body[0].lineno if any(getattr(d, "id", "") == "jit" for d in f.decorator_list) else f.lineno

    lengths = {f"{path}:{f.name}": f.end_lineno - start(f) + 1 for path in files(".py") for f in functions(path)}
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}


def test_no_error_is_swallowed():
    """A broad `except` must do something with what it caught."""

    def broad(handler: ast.ExceptHandler) -> bool:
        return handler.type is None or bool(
            {"Exception", "BaseException"} & {getattr(n, "id", "") for n in ast.walk(handler.type)}
        )

    def idle(statement: ast.stmt) -> bool:
        constant = isinstance(getattr(statement, "value", None), ast.Constant | None)
        return isinstance(statement, ast.Pass | ast.Continue) or (isinstance(statement, ast.Return | ast.Expr) and constant)

    handlers = [(path, node) for path in files(".py") for node in ast.walk(tree(path)) if isinstance(node, ast.ExceptHandler)]
    assert [f"{path}:{node.lineno}" for path, node in handlers if broad(node) and all(map(idle, node.body))] == []


def test_no_function_is_a_stub():
    """A body of `...` belongs to a Protocol alone."""

    def stub(statement: ast.stmt) -> bool:
        ellipsis = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        return ellipsis or isinstance(statement, ast.Pass) or "NotImplementedError" in ast.dump(statement)

    def declared(path: Path) -> set[ast.AST]:
        classes = [node for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)]
        return {
            item for node in classes if "Protocol" in {getattr(base, "id", "") for base in node.bases} for item in node.body
        }

    shipped = [path for folder in ("fastjepa", "kernels", "benchmarks") for path in below(folder)]
    written = [(path, f) for path in shipped for f in functions(path) if f not in declared(path)]
    assert [f"{path}:{f.name}" for path, f in written if all(map(stub, body(f)))] == []


def test_every_op_has_a_definition_a_test_and_a_bench():
    ops = {path.stem for path in below("kernels/fastjepa_kernels")} - OPS_SUPPORT
    tested = {path.stem.removeprefix("test_") for path in below("tests/ops") if path.stem.startswith("test_")}
    assert tested == ops | {"dispatch", "paths"}  # what all ops share, tried on each of them
    assert {path.stem.removeprefix("bench_") for path in below("benchmarks/ops") if path.stem.startswith("bench_")} == ops
    for op in ops:
        assert f"{op}_ref" in {f.name for f in functions(Path(f"kernels/fastjepa_kernels/{op}.py"))}


def test_import_is_instant():
    """`import fastjepa` costs no torch: under 0.3 s, the best of three."""
    code = "import sys, time; t = time.perf_counter(); import fastjepa; print(time.perf_counter() - t, 'torch' in sys.modules)"
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(3)
    ]
    seconds, torch_loaded = zip(*(run.stdout.split() for run in runs), strict=True)
    assert set(torch_loaded) == {"False"}
    assert min(map(float, seconds)) < 0.3


@pytest.mark.parametrize("folder, package", [(".", "fastjepa"), ("kernels", "kernels/fastjepa_kernels")])
def test_setup_takes_the_version_from_the_package(folder: str, package: str):
    printed = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "--version"], cwd=ROOT / folder, capture_output=True, text=True, check=True
    )
    assert f'\n__version__ = "{printed.stdout.strip()}"\n' in (ROOT / package / "__init__.py").read_text()


def test_nothing_private_is_tracked():
    """No path of one machine, no note to oneself: built from pieces, so that this file does not name them."""
    words = ["TO" + "DO", "FIX" + "ME", "cl" + "aude", "FACTS" + r"\.md", "(?:agent|this|previous) ses" + "sion"]
    pattern = re.compile(r"(?<![\w.)}>])/(?:work|root|shared)(?![\w-])|\b(?:" + "|".join(words) + r")\b", re.IGNORECASE)
    text = [path for path in files() if path.suffix not in (".safetensors", ".png", ".jpg", ".gz")]
    found = [(str(path), match.group()) for path in text for match in pattern.finditer((ROOT / path).read_text())]
    assert found == []


def test_every_preset_is_there():
    official = {"vit_base16", "vit_large16", "vit_huge14", "vit_huge16_448", "vit_giant16"}
    assert {path.stem for path in CONFIGS} >= official | {"demo", "cifar10"}


def test_every_config_that_is_named_exists():
    named = {
        match for path in files(".py") + files(".md") for match in re.findall(r"configs/\w+\.yaml", (ROOT / path).read_text())
    }
    assert {name for name in named if not (ROOT / name).is_file()} == set()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_and_says_what_it_costs(path: Path):
    load_config(path)
    header = path.read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    stated = dict(re.findall(r"^# (Command|Card|Hours|Accuracy): +(.+(?:\n#  .+)*)", header, re.MULTILINE))
    assert stated.keys() == {"Command", "Card", "Hours", "Accuracy"}
    assert f"--config configs/{path.name}" in stated["Command"]
    for number in ("Hours", "Accuracy"):
        assert re.search("published|estimate|measured", stated[number]), f"{number}: say where the number comes from"


def readme_commands() -> list[list[str]]:
    """The command lines of README.md's shell blocks, prompts, comments and continuations removed."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def test_readme_opens_with_its_two_commands():
    names = [words[:2] for words in readme_commands() if words[0] == "make"]
    assert names[:2] == [["make", "demo"], ["make", "test"]]


def test_readme_names_only_what_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = readme_commands()
    assert {words[1] for words in commands if words[0] == "make"} <= targets
    named = {
        word for words in commands for word in words if word.startswith(("fastjepa/", "benchmarks/", "configs/", "tests/"))
    }
    assert {word for word in named if not (ROOT / word).exists()} == set()


def test_readme_subcommands_exist():
    used = {words[1] for words in readme_commands() if Path(words[0]).name == "fastjepa" and not words[1].startswith("-")}
    for name in sorted(used):
        shown = subprocess.run([sys.executable, "-m", "fastjepa.cli", name, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert shown.returncode == 0, f"README.md shows `fastjepa {name}`: {shown.stderr}"


@pytest.mark.parametrize(
    "test",
    [
        "def test_x(): pytest.skip('no reason')",
        "@pytest.mark.skip\ndef test_x(): pass",
        "@pytest.mark.xfail\ndef test_x(): assert False",
        "@pytest.mark.xfail\ndef test_x(): pass",
        "pytest.importorskip('no_such_module')\ndef test_x(): pass",
    ],
)
def test_a_skip_is_a_failure(pytester: pytest.Pytester, test: str):
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyfile("import pytest\n" + test)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    assert result.ret != pytest.ExitCode.OK
    assert {"skipped", "xfailed", "xpassed", "passed"}.isdisjoint(result.parseoutcomes())
    assert "only tests marked gpu may be skipped" in result.stdout.str()


def test_a_gpu_test_may_be_skipped(pytester: pytest.Pytester):
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text())
    pytester.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_x(): pytest.skip('needs two devices')")
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(skipped=1)
