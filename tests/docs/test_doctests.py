"""The examples in docstrings run and print what they say."""

import doctest
import importlib
import importlib.util
import pkgutil
from pathlib import Path

import pytest

import vitscope

ROOT = Path(vitscope.__file__).parent


def modules_with_examples() -> list[str]:
    names = (module.name for module in pkgutil.walk_packages([str(ROOT)], "vitscope."))
    files = ((name, ROOT.joinpath(*name.split(".")[1:])) for name in names)
    sources = ((name, path.with_suffix(".py")) for name, path in files)
    return [name for name, path in sources if path.exists() and ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.slow
@pytest.mark.parametrize("name", modules_with_examples())
@pytest.mark.filterwarnings("ignore::vitscope.errors.VitscopeWarning")
def test_the_examples_of_a_module_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    failures = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        if test.examples:
            output: list[str] = []
            result = doctest.DocTestRunner(optionflags=flags).run(test, out=output.append)
            failures += output if result.failed else []
    assert not failures, "".join(failures)


def test_there_are_examples_to_run() -> None:
    assert len(modules_with_examples()) > 10
