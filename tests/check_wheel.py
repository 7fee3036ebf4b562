"""Checks what is released: `make check-wheel` builds dist/ and runs this.

Installs the wheel with the extra `serve` into an empty environment and runs the examples there,
from a folder in which nothing of the repository can be imported.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parents[1]
PACKAGES, MODULES = ("moejax", "sharding", "pallas_kernels"), ("train", "infer")
INSTALLED = """
import importlib, pathlib, sys
for name in sys.argv[1:]:
    file = pathlib.Path(importlib.import_module(name).__file__)
    assert file.is_relative_to(sys.prefix), f"{name} comes from {file}"
from moejax.inference.source import open_model
from pallas_kernels.tuning.lookup import package_table
from pallas_kernels.tuning.table import read_table
assert open_model(None).tokenizer is not None
assert read_table(package_table("NVIDIA H100 80GB HBM3")).entries
"""


def run(what: str, *command: str | Path, **options) -> None:
    """Runs a command; what it printed is shown if it fails."""
    began = time.monotonic()
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    print(f"{what:<36}{time.monotonic() - began:>6.1f} s", flush=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{what}: exit code {done.returncode}")


def check_wheel(wheel: Path, version: str) -> None:
    """Every file of the packages, nothing else, and metadata that an index accepts."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = Metadata.from_email(archive.read(f"{info}/METADATA"), validate=True)
    assert (metadata.name, str(metadata.version)) == ("moejax", version), metadata
    assert metadata.license_expression == "Apache-2.0" and metadata.license_files == ["LICENSE"]
    assert f"{info}/licenses/LICENSE" in names and f"{info}/entry_points.txt" in names
    files = [file for name in PACKAGES for file in (ROOT / name).rglob("*") if file.is_file()]
    wanted = {str(file.relative_to(ROOT)) for file in files if "__pycache__" not in file.parts}
    wanted |= {f"{name}.py" for name in MODULES}
    differ = wanted ^ {name for name in names if not name.startswith(info)}
    assert not differ, f"in the wheel or in the repository, not in both: {sorted(differ)}"


def check_sdist(sdist: Path) -> None:
    """Every file that git knows; the wheel has been built from it."""
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    known = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    missing = known - inside - {".gitignore"}
    assert not missing, f"not in the source distribution; see MANIFEST.in: {sorted(missing)}"


def main() -> None:
    """Checks dist/."""
    began = time.monotonic()
    (wheel,) = (ROOT / "dist").glob("*.whl")
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    check_wheel(wheel, version)
    check_sdist(sdist)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        binaries, limits = work / "env" / "bin", ROOT / "constraints.txt"
        python, wanted = binaries / "python", f"{wheel}[serve]"
        if uv := shutil.which("uv"):
            run("an empty environment", uv, "venv", "-q", "--python", sys.executable, work / "env")
            install = (uv, "pip", "install", "-q", "--python", python)
        else:
            run("an empty environment", sys.executable, "-m", "venv", work / "env")
            install = (python, "-m", "pip", "install", "-q")
        run("install the wheel", *install, "-c", limits, wanted)
        shutil.copytree(ROOT / "examples", work / "examples")
        # Nothing of the caller's environment, and no programs compiled before.
        here = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "XLA", "JAX"))}
        alone = {"cwd": work, "env": here | {"HOME": folder}}
        run("packages and their data", python, "-c", INSTALLED, *PACKAGES, *MODULES, **alone)
        for command in ("moejax-train --help", "moejax-infer --help", "moejax-infer serve --help"):
            name, *flags = command.split()
            run(command, binaries / name, *flags, **alone)
        for example in sorted((work / "examples").glob("*.py")):
            path = f"examples/{example.name}"
            run(path, python, path, **alone)
    print(f"{wheel.name} and {sdist.name} are good; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
