"""The package: it imports quickly, its public names exist, and its layers import only lower layers."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitscope

ROOT = Path(vitscope.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
HEAVY = ("torch", "transformers", "timm", "torchvision", "numpy", "matplotlib", "PIL", "skimage")

# From the lowest layer up: a file may import from its own folder and from the folders before it.
LAYERS = (
    "errors",
    "interrupts",
    "typing",
    "validation",
    "files",
    "grid",
    "progress",
    "docstrings",
    "display",
    "images",
    "estimators",
    "results",
    "attention",
    "models",
    "tracing",
    "interventions",
    "perturb",
    "methods",
    "window_tokens",
    "compositing",
    "metrics",
    "explanation",
    "tune",
    "batch",
    "views",
    "cli",
)
# The entry points may import everything, and no other file may import them.
FACE = {"vitscope", "vitscope.__main__"}
OWNERS = {
    "timm": "vitscope.models.backends.timm",
    "torchvision": "vitscope.models.backends.torchvision.backend",
    "pydicom": "vitscope.images.dicom",
    "nibabel": "vitscope.images.nifti",
    "cv2": "vitscope.compositing.grabcut",
}


def module_name(path: Path) -> str:
    parts = ["vitscope", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(name: str) -> Iterator[str]:
    """Yield every module that a module imports, also inside functions and for type checkers."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*above, *([source] if source else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in MODULES else source


def layer(name: str) -> int:
    part = name.split(".")[1]
    assert part in LAYERS, f"{name} belongs to no layer: add it to LAYERS"
    return LAYERS.index(part)


INNER = [name for name in MODULES if name not in FACE]


@pytest.mark.slow
@pytest.mark.parametrize("name", INNER)
def test_a_file_imports_only_from_its_layer_and_lower_ones(name: str) -> None:
    for other in imported(name):
        if other.partition(".")[0] == "vitscope":
            assert other not in FACE, f"{name} must not import {other}: import from the file that defines it"
            assert other in MODULES, f"{name} imports {other}, which does not exist"
            assert layer(other) <= layer(name), f"{name} must not import {other}, which is in a higher layer"


def test_there_are_no_import_cycles() -> None:
    graph = {name: {other for other in imported(name) if other in MODULES and other != name} for name in INNER}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(INNER) <= set(order)


@pytest.mark.slow
def test_an_optional_library_is_imported_by_one_module() -> None:
    for library, owner in OWNERS.items():
        users = {name for name in MODULES for other in imported(name) if other.partition(".")[0] == library}
        assert users
        assert {name for name in users if name != owner and not name.startswith(f"{owner}.")} == set()


def test_no_file_has_a_name_without_meaning() -> None:
    assert not {"utils", "util", "helpers", "helper", "common", "misc"} & {
        part for name in MODULES for part in name.split(".")
    }


def test_every_public_name_exists_and_has_a_docstring() -> None:
    assert len(set(vitscope.__all__)) == len(vitscope.__all__)
    for name in vitscope.__all__:
        value = getattr(vitscope, name)
        assert value.__name__ == name
        assert value.__doc__, f"{name} has no docstring"
    assert set(vitscope.__all__) | {"__version__"} == set(dir(vitscope))
    assert vitscope.__version__


def test_no_public_name_is_also_a_module() -> None:
    """Importing ``vitscope.x.y`` sets ``vitscope.x``, which would hide the public name x."""
    assert not set(vitscope.__all__) & {name.split(".")[1] for name in INNER}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'vitscope' has no attribute 'explain_everything'"):
        _ = vitscope.explain_everything
    assert not hasattr(vitscope, "torch")


def run(code: str) -> str:
    """Return the output of a new interpreter that runs this code."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADED = f"print(sorted({set(HEAVY)} & {{name.partition('.')[0] for name in sys.modules}}))"


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert run(f"import sys, vitscope; dir(vitscope); vitscope.__version__; {LOADED}") == "[]\n"


def test_the_errors_load_nothing_heavy() -> None:
    assert run(f"import sys, vitscope; vitscope.CallError; {LOADED}") == "[]\n"


def test_the_help_loads_nothing_heavy() -> None:
    code = f"""
import sys
from vitscope.cli import main
sys.argv = ["vitscope", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
{LOADED}
"""
    output = run(code)
    assert "rollout" in output
    assert not {"torch", "transformers"} & set(output.splitlines()[-1].strip("[]").replace("'", "").split(", "))
