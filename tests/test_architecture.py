"""The import law: a file imports what stands above it, never below, and --help stays light."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jaxattn", "sweeps", "plots")

# A module may import those before it; a folder counts as one module.
ORDER = (
    "jaxattn.command",
    "jaxattn.formats",
    "jaxattn.rounding",
    "jaxattn.block_rules",
    "jaxattn.fields",
    "jaxattn.recipe",
    "jaxattn.kernels",
    "jaxattn.half_tables",
    "jaxattn.exponentials",
    "jaxattn.contraction",
    "jaxattn.lanes",
    "jaxattn.scores",
    "jaxattn.tiles",
    "jaxattn.accumulation",
    "jaxattn.online_softmax",
    "jaxattn.arguments",
    "jaxattn.attention",
    "jaxattn.reference",
    "jaxattn.metrics",
    "jaxattn.regimes",
    "jaxattn.inputs",
    "jaxattn.capture_files",
    "jaxattn.captures",
    "jaxattn.pages",
    "jaxattn.exact",
    "jaxattn.passes",
    "jaxattn.errors",
    "jaxattn.walk",
    "jaxattn.curves",
    "jaxattn.attribution",
    "jaxattn.outputs",
    "jaxattn.agreement",
    "jaxattn.remarks",
    "jaxattn.compare",
    "jaxattn.compare_text",
    "jaxattn.practice",
    "jaxattn.trials",
    "jaxattn.thresholds",
    "jaxattn.verdicts",
    "jaxattn.theory",
    "jaxattn.atlas",
    "jaxattn.cost",
    "jaxattn.lattice",
    "jaxattn.candidates",
    "jaxattn.advise",
    "jaxattn.advice_text",
    "jaxattn",  # the lazy exports: for users and the command line, not for the modules above
    "jaxattn.__main__",
)
RANK = {unit: rank for rank, unit in enumerate(ORDER)}

# Modules that may name nothing of the project but themselves: the judge shares no code with the
# judged, and a figure needs stored rows alone.
APART = ("jaxattn.reference", "plots")
WITHOUT_JAX = ("jaxattn.reference", "plots")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    """`jaxattn/kernels/metal.py` -> `jaxattn.kernels.metal`; a package's `__init__` is itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    """The part of a module's name that the law orders: `jaxattn.kernels.metal` -> its folder.

    A name exported by `jaxattn/__init__.py` belongs to that file.
    """
    package, *rest = module.split(".")
    if package != "jaxattn":
        return package
    if not rest:
        return "jaxattn"
    unit = f"jaxattn.{rest[0]}"
    path = ROOT / "jaxattn" / rest[0]
    exists = unit in RANK or path.is_dir() or path.with_suffix(".py").is_file()
    return unit if exists else "jaxattn"


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Dotted names a source imports, wherever it does so; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = node.level - is_package
            parent = module.split(".")[: -up or None] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a source imports against the law, as sentences."""
    unit = unit_of(module)
    found = []
    for target in imports(source, module, is_package):
        package, other = target.split(".")[0], unit_of(target)
        if package in ("jax", "jaxlib") and unit in WITHOUT_JAX:
            found.append(f"{module} imports {target}: {unit} does without jax")
        if package not in PACKAGES or other == unit:
            continue
        if unit in APART:
            found.append(f"{module} imports {target}: {unit} uses nothing else of the project")
        elif PACKAGES.index(package) > PACKAGES.index(module.split(".")[0]):
            found.append(f"{module} imports {target}: {package} stands below it")
        elif unit in RANK and RANK.get(other, 0) > RANK[unit]:
            found.append(f"{module} imports {target}: {other} stands below {unit}")
    return found


FILES = [path for package in PACKAGES for path in sources(package)]


def test_every_module_has_its_place_in_the_order() -> None:
    units = {unit_of(module_of(path)) for path in sources("jaxattn")}
    assert units, "no modules found"
    assert units <= set(ORDER), f"give a place in ORDER to {sorted(units - set(ORDER))}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_only_what_stands_above_it(path: Path) -> None:
    module, is_package = module_of(path), path.name == "__init__.py"
    assert violations(path.read_text(encoding="utf-8"), module, is_package) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxattn.rounding", "import jaxattn.recipe"),
        ("jaxattn.rounding", "from jaxattn.recipe import Recipe"),
        ("jaxattn.rounding", "from jaxattn import recipe"),
        ("jaxattn.rounding", "from . import recipe"),
        ("jaxattn.rounding", "from .recipe import Recipe"),
        ("jaxattn.rounding", "def late():\n    from .recipe import Recipe"),
        ("jaxattn.kernels.metal", "from ..attention import dot_product_attention"),
        ("jaxattn.attention", "from jaxattn import round_to"),
        ("jaxattn.attention", "import jaxattn"),
        ("jaxattn.attention", "import jaxattn.__main__"),
        ("jaxattn.reference", "from jaxattn.rounding import round_to"),
        ("jaxattn.reference", "import jax.numpy as jnp"),
        ("jaxattn.curves", "import sweeps.store"),
        ("jaxattn.__main__", "from plots import style"),
        ("sweeps.run", "from plots import hexagon"),
        ("plots.hexagon", "from jaxattn import theory"),
        ("plots.hexagon", "from sweeps.store import load"),
        ("plots.__main__", "from jax import numpy"),
    ],
)
def test_the_law_sees_a_breach(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        ("jaxattn.rounding", False, "import jax.numpy as jnp\nfrom .formats import Format"),
        ("jaxattn.kernels", True, "from . import metal\nfrom ..recipe import Recipe"),
        ("jaxattn.kernels.metal", False, "from .hexagon import x\nfrom ..recipe import Recipe"),
        ("jaxattn", True, "from .curves import error_curves\nfrom jaxattn.theory import bound"),
        ("jaxattn.__main__", False, "from jaxattn import __version__, kernels"),
        ("sweeps.run", False, "import jaxattn\nfrom sweeps import store\nfrom .plan import plan"),
        ("plots.hexagon", False, "import pandas\nfrom . import style"),
    ],
)
def test_the_law_lets_pass(module: str, is_package: bool, source: str) -> None:
    assert violations(source, module, is_package) == []


IMPORTED_AS = {"fla_core": "fla"}


def declared(*groups: str) -> set[str]:
    """Import names of the runtime dependencies and of the named groups in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = list(project["project"]["dependencies"])
    for group in groups:
        wanted += project["dependency-groups"][group]
    names = {re.split(r"[^\w-]", line, maxsplit=1)[0].replace("-", "_") for line in wanted}
    return {IMPORTED_AS.get(name, name) for name in names}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_only_declared_dependencies(path: Path) -> None:
    module, is_package = module_of(path), path.name == "__init__.py"
    in_wheel = module.split(".")[0] == "jaxattn"
    beside = module.startswith(("sweeps.peers.", "sweeps.speed.peers"))
    groups = ("sweeps", "peers") if beside else ("sweeps",)
    known = declared() if in_wheel else declared(*groups) | set(PACKAGES)
    roots = {name.split(".")[0] for name in imports(path.read_text("utf-8"), module, is_package)}
    assert roots - known - {"jaxattn"} <= set(sys.stdlib_module_names)


HELP = """
import runpy, sys
package, *forbidden = sys.argv[1:]
sys.argv = [package, "--help"]
try:
    runpy.run_module(package, run_name="__main__", alter_sys=True)
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = [name for name in forbidden if name in sys.modules]
assert not loaded, f"python -m {package} --help imports {loaded}"
"""


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("jaxattn", ["jax", "jaxlib", "matplotlib"]),
        ("sweeps", ["jax", "jaxlib", "matplotlib"]),
        ("plots", ["jax", "jaxlib", "jaxattn", "sweeps"]),
    ],
)
def test_help_is_light(package: str, forbidden: list[str]) -> None:
    if not (ROOT / package / "__main__.py").is_file():
        pytest.skip(f"{package} has no command line yet")
    done = subprocess.run(
        [sys.executable, "-c", HELP, package, *forbidden], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_import_jaxattn_is_light() -> None:
    if not (ROOT / "jaxattn" / "__init__.py").is_file():
        pytest.skip("jaxattn exports nothing yet")
    code = "import sys, jaxattn; assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
