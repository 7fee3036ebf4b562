"""What the tests of the documents share: pages, their links and anchors, flags of all commands."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))  # as it is where its scripts are run
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
FOLDERS = ("benchmarks", "examples", "launch")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
FIGURES = re.compile(r"<!-- figures:.*?<!-- end -->", re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")
TAKEN = re.compile(r'"(--[a-z][\w-]*)"')
OTHERS = {
    *("--help", "--data", "--vocab"),  # of all commands; short for --data.paths and --data.vocab
    *("--nodes", "--ntasks-per-node"),  # of sbatch
}


def load(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


site_links = load("site_links")


def run_example(page, folder):
    """What a document's only example in Python prints; warnings are errors."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    script = folder / "example.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + example)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        check=True,
        env={"JAX_PLATFORMS": "cpu", "PATH": ""},
    )
    return done.stdout


def pages():
    """All documents that readers are led to, by their paths in the repository."""
    found = [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in OUTSIDE)]
    found += [ROOT / folder / "README.md" for folder in FOLDERS]
    return sorted(str(path.relative_to(ROOT)) for path in found if path.is_file())


def without_code(text):
    """Markdown without its code blocks."""
    return site_links.FENCE.sub("", text)


def anchors_of(text):
    """The anchors of a page's headings; those of headings that are there twice are left out."""
    plain = [re.sub(r"[`*]|\]\([^)]*\)|\[", "", h) for h in HEADING.findall(without_code(text))]
    found = [site_links.anchor(heading) for heading in plain]
    return {anchor for anchor in found if found.count(anchor) == 1}


def lost_links(path, text):
    """Of a page's relative links those that lead to no file, or to no heading of it."""
    lost = []
    for link in site_links.links_of(text):
        target, where = site_links.target_of(path, link)
        there = ROOT / target
        if not there.exists() or (where and not target.endswith(".md")):
            lost.append(link)
        elif where:
            page = text if target == path else there.read_text()
            lost += [link] * (where not in anchors_of(page))
    return lost


def navigation():
    """Pages of the site, in order, as mkdocs.yml names them."""

    def leaves(entry):
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict):
            yield from leaves(list(entry.values()))
        else:
            for part in entry:
                yield from leaves(part)

    return list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


def flags_by_command():
    """The flags of the scripts and of the commands with configurations, by their names."""
    import infer
    import train
    from moejax.cli import _flags
    from moejax.compress.config import CompressConfig
    from moejax.families.__main__ import ExportConfig
    from moejax.offload.fit_config import FitConfig
    from moejax.placement import __main__ as placement

    modes = [
        getattr(importlib.import_module(f"moejax.serving.{module}"), config)
        for module, config, _ in infer._MODES.values()
    ]
    configs = {
        "train.py": [train.TrainFlags()],
        "infer.py": [infer.InferConfig(), *(mode() for mode in modes)],
        "moejax.placement": [
            placement.PlanConfig(),
            placement.MeasureConfig(),
            placement.SweepConfig(),
        ],
        "moejax.compress": [CompressConfig("a", "b")],
        "moejax.offload": [FitConfig("a", "b")],
        "moejax.families": [ExportConfig("a", "b")],
    }
    found = {name: {f for one in of for f in _flags(one)} for name, of in configs.items()}
    tuning = (ROOT / "pallas_kernels" / "tuning" / "arguments.py").read_text()
    return found | {"pallas_kernels.tuning": set(TAKEN.findall(tuning))}


def flags_in_sources():
    """Flags that any script names: of those with an argparse parser of their own."""
    folders = ("benchmarks", "docs", "pallas_kernels", "moejax", "sharding", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {flag for path in files for flag in TAKEN.findall(path.read_text())}
