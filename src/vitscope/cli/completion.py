"""Values of options for completion in the shell. They are read from files, because importing torch takes seconds."""

import ast
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer

PACKAGE = Path(__file__).parent.parent
BUNDLED = PACKAGE / "models" / "bundled"

Completion = tuple[str, str]  # a value, and what it is


def methods_for(incomplete: str) -> list[Completion]:
    """Return the methods of ``explain`` that continue the last item of a list."""
    return _continued(incomplete, _table("methods/registry.py", "METHODS"))


def tunings_for(incomplete: str) -> list[Completion]:
    """Return the tuning methods that continue the last item of a list."""
    return _continued(incomplete, _table("tune/methods.py", "TUNING_METHODS"))


def models_for(incomplete: str) -> list[Completion]:
    """Return bundled models, prefixes of libraries, downloaded models, and folders of models in this folder."""
    names = [(path.parent.name, "bundled, works offline") for path in sorted(BUNDLED.glob("*/config.json"))]
    names += [("timm:", "a model of timm"), ("torchvision:", "a model of torchvision")]
    names += [(name, "downloaded") for name in _downloaded()]
    names += [(path.parent.name, "folder") for path in sorted(Path().glob("*/config.json"))]
    return _continued(incomplete, names)


def labels_for(ctx: typer.Context, incomplete: str) -> list[Completion]:
    """Return the labels of the model, if it is bundled or a folder of transformers."""
    names = ctx.params.get("model") or "vit-nano"
    name = names if isinstance(names, str) else names[0]
    folder = BUNDLED / name if (BUNDLED / name).is_dir() else Path(name)
    try:
        labels = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
        return [(label, f"class {index}") for index, label in labels.items() if label.startswith(incomplete)]
    except (OSError, ValueError, KeyError, AttributeError):
        return []


def _continued(incomplete: str, values: Iterable[Completion]) -> list[Completion]:
    """Return the values that continue the text after the last comma, with the text before it."""
    earlier, comma, last = incomplete.rpartition(",")
    passed = set(earlier.split(","))
    return [
        (f"{earlier}{comma}{value}", text) for value, text in values if value.startswith(last) and value not in passed
    ]


def _downloaded() -> Iterator[str]:
    """Yield the hub ids of the models in the cache of Hugging Face."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    for folder in sorted(cache.glob("models--*")):
        yield folder.name.removeprefix("models--").replace("--", "/")


def _table(path: str, variable: str) -> Iterator[Completion]:
    """Yield the keys of a dictionary in a source file, with the first text of each value."""
    constants: dict[str, str] = {}
    for statement in ast.parse((PACKAGE / path).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            constants |= {
                name.id: str(statement.value.value) for name in statement.targets if isinstance(name, ast.Name)
            }
        elif isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == variable:
            assert isinstance(statement.value, ast.Dict), f"{variable} is a dictionary"
            for key, value in zip(statement.value.keys, statement.value.values, strict=True):
                name = constants[key.id] if isinstance(key, ast.Name) else ast.literal_eval(ast.unparse(key or value))
                yield name, _first_text(value)


def _first_text(call: ast.expr) -> str:
    """Return the summary of a method: the keyword ``summary``, or the first argument."""
    assert isinstance(call, ast.Call), "a row is a call"
    texts = [keyword.value for keyword in call.keywords if keyword.arg == "summary"] or call.args
    return str(ast.literal_eval(texts[0]))
