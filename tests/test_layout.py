"""Who imports whom, and how long a file may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ROOT

PACKAGES = ("model", "dataset", "trainer", "scripts")
FILES = [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(file: Path) -> str:
    """model/loss.py -> model.loss, trainer/runtime/__init__.py -> trainer.runtime"""
    parts = file.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in FILES}


def imported(source: str, file: Path) -> Iterator[str]:
    """Names of this repository's modules in every import statement of a file, wherever in it the statement stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(file.parts[: len(file.parts) - node.level]) if node.level else ""
            base = ".".join(filter(None, (package, node.module)))
            members = [f"{base}.{alias.name}" for alias in node.names]  # modules or what stands in the module
            names = [member if member in MODULES else base for member in members]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


def imports() -> dict[str, set[str]]:
    return {module_name(file): set(imported((ROOT / file).read_text(encoding="utf-8"), file)) for file in FILES}


@pytest.mark.parametrize(
    "source, names",
    [
        ("import model.loss, torch", {"model.loss"}),
        ("from model import loss, decoder", {"model.loss", "model.decoder"}),
        ("from model.loss import LOSS_CHUNK", {"model.loss"}),
        ("from .loss import LOSS_CHUNK", {"model.loss"}),
        ("from . import loss", {"model.loss"}),
        ("from ..dataset.chat import encode", {"dataset.chat"}),
        ("def f():\n    if x:\n        from dataset import scoring", {"dataset.scoring"}),
        ("if TYPE_CHECKING:\n    from .generation import Engine", {"model.generation"}),
        ("import torch\nfrom modelling import model", set()),
    ],
)
def test_import_statements_are_found(source, names):
    assert set(imported(source, Path("model/some.py"))) == names


def test_model_has_no_circle():
    """Those that import only what is placed already are placed, again and again: in the end nobody waits."""
    waiting = {name: names & MODULES for name, names in imports().items() if name.startswith("model.")}
    assert "model.attention" in waiting["model.model_minimind"]
    while ready := [name for name, needs in waiting.items() if not needs & waiting.keys()]:
        for name in ready:
            del waiting[name]
    assert not waiting


def test_nothing_but_scripts_imports_scripts():
    for name, names in imports().items():
        if not name.startswith("scripts."):
            assert not [other for other in names if other.startswith("scripts")], name


def test_files_are_short():
    others = [path.relative_to(ROOT) for pattern in ("*.py", "tests/*.py") for path in sorted(ROOT.glob(pattern))]
    lines = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in FILES + others}
    limits = {"tests": 600, "trainer": 350}
    assert not {str(file): n for file, n in lines.items() if n > limits.get(file.parts[0], 450)}


def test_stage_scripts_do_not_repeat_a_loop():
    """No run of six equal lines of code in three of them: what stands three times is plumbing."""
    places: dict[tuple[str, ...], set[str]] = {}
    scripts = sorted((ROOT / "trainer").glob("train_*.py"))
    assert len(scripts) >= 7
    for script in scripts:
        lines = [line.strip() for line in script.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line.strip("()[]{}, ") and not line.startswith(("#", "import ", "from "))]
        for begin in range(len(lines) - 5):
            places.setdefault(tuple(lines[begin : begin + 6]), set()).add(script.name)
    assert not {run: names for run, names in places.items() if len(names) > 2}
