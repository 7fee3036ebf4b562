"""README and docs: figures up to date, links and file names resolve, the example runs."""

import json
import re
import sys
from pathlib import Path

import pytest
from docs_support import load, run_example

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "benchmarks" / "README.md",
    ROOT / "examples" / "README.md",
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"```.*?```", re.DOTALL)
FILE = re.compile(
    r"`((?:moejax|sharding|pallas_kernels|tests|benchmarks|docs)/[\w./-]*|[\w-]+\.py)`"
)


def is_there(name):
    """A path from the root, a pattern for one (NAME), or the bare name of a module."""
    if "NAME" in name or (ROOT / name).exists():
        return True
    folders = ("moejax", "sharding", "pallas_kernels", "tests", "benchmarks", "examples")
    return "/" not in name and any(any((ROOT / f).rglob(name)) for f in folders)


@pytest.fixture(scope="module")
def figures():
    return load("figures")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_files_resolve(path):
    text = FENCE.sub("", path.read_text())
    links = [link for link in LINK.findall(text) if "://" not in link]
    lost = [link for link in links if not (path.parent / link.partition("#")[0]).exists()]
    assert lost + [f for f in FILE.findall(text) if not is_there(f)] == []


def test_every_document_is_listed():
    listed = {Path(link).name for link in LINK.findall((ROOT / "docs" / "index.md").read_text())}
    assert {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"} <= listed


def test_figures_are_up_to_date(figures):
    used = set()
    for path in figures.documents():
        text = path.read_text()
        assert figures.filled(text) == text, f"{path}: run python docs/figures.py"
        used.update(match[2] for match in figures.BLOCK.finditer(text))
    assert used == set(figures.BLOCKS)


def test_stale_figures_are_noticed(figures, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    text = "before\n<!-- figures:cpu_default -->\nold\n<!-- end -->\nafter\n"
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "cpu_default.json").write_text(
        '{"device": "d", "jax": "j", "commit": "c", "command": "make it",'
        ' "rows": [{"bits_per_byte": 2.34567, "other": 1}, {"bits_per_byte": 1, "seconds": 61.7}]}'
    )
    monkeypatch.setattr(sys, "argv", ["figures.py", "--check"])
    assert figures.main() == 1 and (tmp_path / "README.md").read_text() == text
    assert "README.md: figures are stale" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    assert figures.main() == 0
    new = (tmp_path / "README.md").read_text()
    assert "| bits/byte | seconds |\n| --- | --- |\n| 2.346 |  |\n| 1.000 | 62 |\n" in new
    assert new.startswith("before\n<!--") and new.endswith("<!-- end -->\nafter\n")
    assert "`make it` on d, jax j, commit c (benchmarks/results/cpu_default.json)" in new
    monkeypatch.setattr(sys, "argv", ["figures.py", "--check"])
    assert figures.main() == 0


def kernel_row(shape, which, kernel, predicted, ms, tflops=None):
    values = {"predicted_ms": predicted, "ms": ms, "tflops": tflops, "bound": "memory", "gb": 1.0}
    return {"shape": shape, "pass": which, "kernel": kernel, **values}


KERNEL_ROWS = [
    kernel_row("qwen3_30b_a3b", "fwd", "top_k", 0.001, 0.1),
    kernel_row("qwen3_30b_a3b", "fwd", "experts_up", 2.0, 2.4, 650.4),
    kernel_row("qwen3_30b_a3b", "fwd", "other", None, 0.5),
    kernel_row("sonic_fine", "fwd", "experts_up", 6.0, None),
    kernel_row("qwen3_b16", "fwd", "experts_up", 0.15, 0.2, 3.0),
]


def test_layer_and_kernels_become_tables(figures, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert "Not measured yet" in figures.expert_layer("uniform")
    assert "Not measured yet" in figures.expert_kernels()
    head = {"device": "d", "jax": "j", "commit": "c", "command": "make it"}
    same = {"impl": "a", "shape": "qwen3_30b_a3b", "routing": "uniform"}
    layers = [
        {**same, "pass": "fwd", "ms": 4.0, "tflops": 612.3},
        {**same, "pass": "fwdbwd", "error": "out of memory"},
        {**same, "shape": "qwen3_b16", "pass": "fwd", "ms": 0.1234, "tflops": 1.0},
    ]
    for name, rows in (("expert_layer_h100", layers), ("expert_kernels_h100", KERNEL_ROWS)):
        (tmp_path / f"{name}.json").write_text(json.dumps({**head, "rows": rows}))
    layer = figures.expert_layer("uniform")
    assert "| `a` | – / – | 612 / – | – / – | – | – | – | 0.123 | – |\n| *aim* | 650" in layer
    assert "no rows of zipf routing" in figures.expert_layer("zipf")
    kernels = figures.expert_kernels()
    assert "| `top_k` | memory | <0.01 / 0.10 |  |\n" in kernels
    assert "| `experts_up` | memory | 2.00 / 2.40 (650) | 6.00 / – |\n" in kernels
    assert "| **sum** |  | 2.00 / 3.00 | 6.00 / – |\n" in kernels
    assert "| routing in it |  | 3.3% | – |\n" in kernels
    assert "| `experts_up` | memory | 150.0 / 200.0 |\n" in kernels


def test_kernels_are_drawn_the_same_twice(monkeypatch, tmp_path):
    draw = load("draw_kernels")
    monkeypatch.setattr(draw, "RESULT", tmp_path / "result.json")
    (tmp_path / "result.json").write_text(json.dumps({"rows": KERNEL_ROWS}))
    pictures = [tmp_path / "once.svg", tmp_path / "twice.svg"]
    for picture in pictures:
        monkeypatch.setattr(draw, "PICTURE", picture)
        draw.main()
    once, twice = (picture.read_bytes() for picture in pictures)
    assert once == twice and once.count(b"<path") > 50


@pytest.mark.parametrize("name", ["token", "waves", "offload_step"])
def test_pictures_are_drawn(monkeypatch, tmp_path, name):
    draw = load(f"draw_{name}")
    monkeypatch.setattr(draw, "PICTURE", tmp_path / "drawn.png")
    draw.main()
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "docs" / "img" / f"{name}.png").stat().st_size < 200_000


def test_the_picture_of_waves_shows_an_overflow():
    draw = load("draw_waves")
    counts = [len(tokens) for tokens in draw.rows_of_devices()]
    assert len(counts) == draw.DEVICES and min(counts) < draw.ROWS < max(counts) <= draw.TOKENS


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path):
    told = run_example("README.md", tmp_path)
    loss, assignments, home, away = map(float, re.findall(r"[\d.]+\d|\d", told))
    assert loss < 0.2 and assignments == 400
    # 2.91 devices a token, a quarter of them its own.
    assert 230 < home + away < 330 and 40 < home < 100
