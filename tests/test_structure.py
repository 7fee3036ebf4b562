"""What holds for the source as a whole: where devices talk, and what an import brings along."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import moejax
import sharding

ROOT = Path(__file__).resolve().parents[1]
COLLECTIVE = re.compile(
    r"\b(psum|pmax|pmin|pmean|all_gather|all_to_all|ragged_all_to_all|ppermute|pshuffle"
    r"|psum_scatter|axis_index|axis_size)\b"
)


def collectives_of(text: str) -> list[str]:
    """Uses of JAX's own collectives: `lax.NAME`, or NAME imported from `jax.lax`."""
    found = [m[0] for m in re.finditer(r"\blax\s*\.\s*(\w+)", text) if COLLECTIVE.match(m[1])]
    for names in re.findall(r"^\s*from jax\.lax import (\([^)]*\)|.*)", text, re.M):
        found += COLLECTIVE.findall(names)
    return found


def test_the_search_finds_collectives():
    assert collectives_of("y = jax.lax.psum(x, 'data') + lax.psum_scatter(x)") == [
        "lax.psum",
        "lax.psum_scatter",
    ]
    assert collectives_of("from jax.lax import (\n    scan,\n    pmax,\n)\n") == ["pmax"]
    assert not collectives_of("psum_statistics(lax.scan(f, x), collectives.all_gather(x, a))")


def test_devices_talk_by_named_collectives_only():
    files = [*ROOT.glob("*.py"), *(ROOT / "moejax").rglob("*.py")]
    assert len(files) > 50
    found = {
        str(f.relative_to(ROOT)): calls for f in files if (calls := collectives_of(f.read_text()))
    }
    assert not found, "wrap these in sharding/collectives.py"
    assert collectives_of((ROOT / "sharding" / "collectives.py").read_text())


def test_importing_does_not_import_jax():
    program = (
        "import sys, moejax, sharding\n"
        "from moejax import MoEConfig, UserError\n"
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("package", [moejax, sharding])
def test_lazy_names(package):
    for name in package.__all__:
        assert name in dir(package) and getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'x'"):
        package.x  # noqa: B018
