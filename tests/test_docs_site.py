"""The book: links, anchors, flags and names that it tells are there, and mkdocs builds it."""

import ast
import dataclasses
import importlib
import importlib.util
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from docs_support import (
    FIGURES,
    FLAG,
    OTHERS,
    ROOT,
    anchors_of,
    flags_by_command,
    flags_in_sources,
    load,
    lost_links,
    navigation,
    pages,
    run_example,
    site_links,
    without_code,
)

import moejax
import sharding

PAGES = pages()
CODE = re.compile(r"`([^`]+)`")
LISTED = re.compile(r"^ *(?:[-*]|\d+\.) ")
MODULE = re.compile(r"^::: ([\w.]+)\n((?:    .*\n)*)", re.MULTILINE)


@pytest.fixture(scope="module")
def flags():
    return flags_by_command()


# ---- links --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES)
def test_links_and_anchors_lead_somewhere(path):
    assert lost_links(path, (ROOT / path).read_text()) == []


def test_lost_links_are_found():
    text = (
        "# One `--flag`, two\n## Twice\n## Twice\n[a](#one---flag-two) [b](#two) [c](nowhere.md)\n"
        "[d](../README.md#what-this-is) [e](../README.md#what) [f](#twice) [g](https://x/y.md)\n"
        "```\n[h](nowhere.md)\n# no heading\n```\n[i](#no-heading) [j](figures.py#l1)\n"
    )
    lost = ["#two", "nowhere.md", "../README.md#what", "#twice", "#no-heading", "figures.py#l1"]
    assert lost_links("docs/index.md", text) == lost
    assert anchors_of("## Gradients inside `shard_map`\n## [A](b.md), **c**: d\n") == {
        "gradients-inside-shard_map",
        "a-c-d",
    }


def test_links_in_the_site():
    """Those that leave docs/ lead to where the site has the files, and so do those back."""

    def changed(place, text):
        page = SimpleNamespace(file=SimpleNamespace(src_uri=place))
        return site_links.on_page_markdown(text, page=page, config=None, files=None)

    text = "[a](../CONTRIBUTING.md#x) ![b](img/token.png) [c](#d) [e](https://f/g.md) [h](lost.md)"
    same = text.partition(" ")[2]
    assert changed("index.md", text) == f"[a](repository/CONTRIBUTING.md#x) {same}"
    api = changed("api/layer.md", "[a](../../launch/jobset.yaml) [b](../token.md)")
    assert api == "[a](../repository/launch/jobset.yaml.txt) [b](../token.md)"
    fenced = "```\n[a](docs/token.md)\n```\n"
    readme = changed("repository/README.md", f"[a](docs/token.md#x) [b](LICENSE)\n{fenced}")
    assert readme == f"[a](../token.md#x) [b](LICENSE.txt)\n{fenced}"
    launch = changed("repository/launch/README.md", "[a](../docs/many_hosts.md) [b](slurm.sbatch)")
    assert launch == "[a](../../many_hosts.md) [b](slurm.sbatch.txt)"


def test_every_page_is_in_the_navigation():
    inside = [path for path in PAGES if path.startswith("docs/")]
    outside = [path for path in site_links.files_outside(iter(inside)) if path.endswith(".md")]
    named = navigation()
    assert len(set(named)) == len(named)
    assert set(named) == {site_links.place_in_site(path) for path in (*inside, *outside)}
    assert set(outside) >= {"CONTRIBUTING.md", "benchmarks/README.md", "launch/README.md"}


# ---- Markdown that all dialects read alike ------------------------------------------------------


@pytest.mark.parametrize("path", PAGES)
def test_lists_and_tables_stand_apart(path):
    """Python-Markdown reads a list or a table behind a line of text as text."""
    before, wrong = "", []
    for line in without_code((ROOT / path).read_text()).splitlines():
        text = before.strip() and not before.startswith(("#", "<!--", "|", " "))
        if text and not LISTED.match(before) and (LISTED.match(line) or line.startswith("|")):
            wrong.append(line)
        before = line
    assert wrong == []


# ---- flags and names ----------------------------------------------------------------------------


def test_flags_in_documents_exist(flags):
    known = set().union(*flags.values(), flags_in_sources(), OTHERS)
    groups = {flag.rpartition(".")[0] for flag in known}
    for path in PAGES:
        told = set(FLAG.findall(FIGURES.sub("", (ROOT / path).read_text())))
        assert told - known - groups == set(), path


def is_there(name):
    """A member of a public class, such as `RouterConfig.top_k`, or a dotted name of the library."""
    first, _, member = name.partition(".")
    if not first.islower():
        owner = getattr(moejax, first)
        return hasattr(owner, member) or member in {f.name for f in dataclasses.fields(owner)}
    module, _, attribute = name.rpartition(".")
    parent = importlib.import_module(module)
    inside = hasattr(parent, "__path__") and importlib.util.find_spec(name) is not None
    return inside or hasattr(parent, attribute)


def test_knobs_of_techniques_exist(flags):
    """Flags are those of the command that is named before them."""
    text = (ROOT / "docs" / "techniques.md").read_text()
    sections = without_code(FIGURES.sub("", text)).split("\n### ")[1:]
    seen = 0
    for section in sections:
        title, command = section.partition("\n")[0], ""
        assert "\n- Page: [" in section, title
        for code in CODE.findall(section):
            if code in flags:
                command = code
            elif code.startswith("--"):
                seen += 1
                assert code.split()[0] in flags[command], f"{title}: {command} {code}"
            elif re.fullmatch(r"[A-Z]\w+\.\w+|(?:moejax|sharding|pallas_kernels)(?:\.\w+)+", code):
                seen += 1
                assert is_there(code), f"{title}: {code}"
    assert seen > 80


def test_every_technique_has_its_section():
    techniques = load("figures_techniques")
    text = (ROOT / "docs" / "techniques.md").read_text()
    titles = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert [technique.name for technique in techniques.TECHNIQUES] == titles[1:]
    assert titles[0] == "One row a device"  # always there, so with nothing to compare


def test_techniques_say_what_was_not_measured():
    techniques = load("figures_techniques")
    rows = techniques.techniques(lambda name: None)[1]
    assert len(rows) == len(techniques.TECHNIQUES)
    assert all(row[2:] == ["not measured", "not measured", ""] for row in rows)
    empty = techniques.techniques(lambda name: {"rows": []})[1]
    assert [row[2] for row in empty if row[0].startswith("[Chunks]")] == [
        "not measured: a row lacks in ep_layer_h200x4"
    ]
    case = {"case": "small", "memory_bytes": 2e9, "step_ms": 10.0, "compile_seconds": 3.0}
    steps = {
        "rows": [case, {**case, "case": "small:remat=local", "memory_bytes": 1e9, "step_ms": 12.4}]
    }
    told = techniques.techniques(lambda name: steps if name == "train_step_h100" else None)[1]
    (row,) = [row for row in told if row[0].startswith("[Recomputing layers]")]
    assert row[2:] == ["`small`: 2.0 → 1.0 GB", "step 10 → 12 ms", "H100"]


# ---- the API reference --------------------------------------------------------------------------


def reference():
    """Module → members that are listed, None for all, of all pages under docs/api."""
    found = {}
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for module, options in MODULE.findall(page.read_text()):
            assert module not in found, f"{module} is there twice"
            members = re.findall(r"^ {8}- (\w+)$", options, re.MULTILINE)
            found[module] = members or None
    return found


def test_the_reference_names_what_is_there():
    for module, members in reference().items():
        path = ROOT / f"{module.replace('.', '/')}.py"
        tree = ast.parse(path.read_text())
        defined = {n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
        assigned = (n for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign))
        defined |= {ast.unparse(getattr(n, "target", None) or n.targets[0]) for n in assigned}
        assert set(members or ()) <= defined, module


def test_the_reference_has_what_is_public():
    shown = reference()
    apis = [*(ROOT / "pallas_kernels").glob("*/api.py")]
    assert {f"pallas_kernels.{path.parent.name}.api" for path in apis} <= shown.keys()
    for package in (moejax, sharding):
        for name in package.__all__:
            module = getattr(package, name).__module__
            assert module in shown and (shown[module] is None or name in shown[module]), name


def test_fields_get_a_heading():
    with_heading = load("api_fields").with_heading
    text = "Sizes.\n\nrows: C,\n    of a pair.   slots: S.\nmode: one: two.\n\nMore: of it."
    want = (
        "Sizes.\n\nAttributes:\n    rows: C,\n        of a pair.\n    slots: S.\n"
        "    mode: one: two.\n\nMore: of it."
    )
    assert with_heading(text, ["rows", "slots", "mode"]) == want
    assert with_heading("It.\n\nExample:\n    >>> a", []) == "It.\n\nExamples:\n    >>> a"
    for same in (
        "rows: C.",
        "Sizes.\n\nAttributes:\n    rows: C.",
        "Sizes.\n\nrows: C.\nother words.",
    ):
        assert with_heading(same, ["rows"]) == same


# ---- building -----------------------------------------------------------------------------------


def mkdocs(*argv):
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.slow
def test_mkdocs_builds_the_site(tmp_path):
    done = mkdocs("--site-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    html = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*.html")}
    assert {"index.html", "token.html", "api/kernels.html", "repository/CONTRIBUTING.html"} <= set(
        html
    )
    for name, text in html.items():
        loaded = re.findall(r"<(?:script|link|img|source)\b[^>]*(?:src|href)=\"?(https?:)?//", text)
        assert not loaded, f"{name} loads something from another host"
    assert "<!-- figures:presets -->" in html["training.html"]
    assert 'id="gradients-inside-shard_map"' in html["architecture.html"]
    assert "reserve_sms" in html["api/kernels.html"] and "<table>" in html["techniques.html"]
    assert not [*tmp_path.rglob("*.py")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[a](other.md#there)", ""),
        ("[a](lost.md)", "lost.md"),
        ("[a](other.md#nowhere)", "nowhere"),
        ("[a](/other.md)", "absolute"),
        ("[a](other)", "unrecognized"),
    ],
)
def test_mkdocs_refuses_links_that_lead_nowhere(tmp_path, text, word):
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# A\n\n{text}\n")
    (tmp_path / "docs" / "other.md").write_text("# B\n\n## There\n")
    config |= {"docs_dir": str(tmp_path / "docs"), "site_dir": str(tmp_path / "site")}
    config |= {"nav": ["index.md", "other.md"], "plugins": [], "extra_css": []}
    config |= {"theme": {"name": "mkdocs"}, "hooks": []}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    done = mkdocs("--config-file", tmp_path / "mkdocs.yml")
    assert (done.returncode == 0) == (not word), done.stderr
    assert word in done.stderr


@pytest.mark.slow
def test_the_example_of_the_start_runs(tmp_path):
    told = run_example("docs/start.md", tmp_path)
    shape, assignments, rows = re.fullmatch(r"(.*): (\d+) \w+, (\d+) rows\n", told).groups()
    assert shape == "(100, 64)" and int(assignments) == 400
    assert 230 < int(rows) < 340  # 291 expected
