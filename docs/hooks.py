"""Hook of mkdocs: pages take tables of keys and presets, help texts and other files from the code when they are built.

A page asks with a comment on a line of its own: `<!-- keys: data -->`, `<!-- presets -->`, `<!-- help: eval knn -->` or
`<!-- file: kernels/README.md -->`.
"""

import contextlib
import dataclasses
import io
import os
import re
import typing
from pathlib import Path
from typing import Any, Literal

from fastjepa.cli.main import main
from fastjepa.config.fields import type_name
from fastjepa.config.schema import Config

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)\)")  # a link to a file of the repository that is no page
REQUEST = re.compile(r"^<!-- (keys|presets|help|file)(?:: ([^>]+?))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **about: Any) -> str:
    """Return a page's source with every request answered; mkdocs calls this with each page."""
    made = {"keys": keys, "presets": presets, "help": help_of, "file": file}
    markdown = OUTSIDE.sub(lambda link: f"`{link[2]}`" if (ROOT / link[2]).exists() else link[0], markdown)
    return REQUEST.sub(lambda asked: made[asked[1]](*filter(None, [asked[2]])), markdown)


def keys(section: str) -> str:
    """Return a table of a section's keys, from the dataclass that the trainer reads them into."""
    cls = typing.get_type_hints(Config)[section]
    hints = typing.get_type_hints(cls)
    rows = [f"| `{field.name}` | {kind(hints[field.name])} | {shown(field.default)} | {meaning(field)} |"
            for field in dataclasses.fields(cls)]  # fmt: skip
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])


def kind(hint: Any) -> str:
    """Return the type of a key's value as the table shows it."""
    if typing.get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(hint))
    return type_name(hint).replace("[", r"\[")


def shown(value: Any) -> str:
    """Return a default as YAML writes it."""
    plain = list(value) if isinstance(value, tuple) else value
    return f"`{ {None: 'null', True: 'true', False: 'false'}[plain] if plain is None or isinstance(plain, bool) else plain }`"


def meaning(field: dataclasses.Field) -> str:
    """Return a key's sentence, with its range where the sentence does not say it, and what is not supported."""
    check, unsupported = field.metadata["check"], field.metadata["unsupported"]
    bounds = f"; {check[1]}" if check and check[1] not in field.metadata["doc"] else ""
    return f"{field.metadata['doc']}{bounds}{f': {unsupported}' if unsupported else ''}"


def presets() -> str:
    """Return a table of the configs that come with the package, from the comments they begin with."""
    rows = []
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        text = path.read_text()
        said = dict(re.findall(r"^# (Card|Hours|Accuracy): +(.+(?:\n#  .+)*)", text.partition("\n\n")[0] + "\n", re.MULTILINE))
        cells = [re.sub(r"\n#\s+", " ", said[name]) for name in ("Card", "Hours", "Accuracy")]
        rows.append(f"| `{path.stem}` | {' | '.join(cells)} |")
    return "\n".join(["| name | card | hours | accuracy |", "|---|---|---|---|", *rows])


def help_of(command: str) -> str:
    """Return what `fastjepa COMMAND --help` prints, as a block of text."""
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    return f"```text\n{printed.getvalue().rstrip()}\n```"


def file(path: str) -> str:
    """Return the text of a file of the repository."""
    return (ROOT / path).read_text()
