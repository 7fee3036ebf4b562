"""examples/: each is told and listed and imports what is there; `make check-wheel` runs them."""

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
OURS = ("moejax", "sharding", "pallas_kernels", "train", "infer")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_told_and_import_what_is_there(path):
    tree = ast.parse(path.read_text())
    assert (ast.get_docstring(tree) or "").splitlines()[0].endswith(".")
    assert len(path.read_text().splitlines()) <= 80, "short enough to be read"
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = {alias.name: () for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {node.module: [alias.name for alias in node.names]}
        else:
            continue
        for module, names in modules.items():
            if module.split(".")[0] in OURS:
                found = importlib.import_module(module)
                assert [name for name in names if not hasattr(found, name)] == [], module
                used.add(module.split(".")[0])
    # A server is started as a program.
    assert used or '"-m", "infer"' in path.read_text()


def test_the_table_lists_all():
    text = (ROOT / "examples" / "README.md").read_text()
    rows = re.findall(r"^\| \[`(\w+\.py)`\]\((\w+\.py)\) \| .+ \| \d+ \|$", text, re.MULTILINE)
    assert [name for name, link in rows if name != link] == []
    assert sorted(name for name, _ in rows) == [path.name for path in EXAMPLES]
    assert EXAMPLES


def test_the_version_is_that_of_the_changelog():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.fullmatch(rf"{re.escape(version)}( \(.+\))?", headings[0]), headings
