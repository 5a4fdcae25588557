"""The command ``vitscope models``."""

from importlib.metadata import PackageNotFoundError, version

from vitscope.cli.app import register
from vitscope.cli.json_output import print_results
from vitscope.cli.options import Json
from vitscope.cli.terminal import say


def models(json_: Json = False) -> None:
    """List the models that can be loaded on this machine."""
    from vitscope.models.catalogue import CATALOGUE

    rows = [
        {
            "library": entry.library,
            "installed": _version_or_none(entry.library),
            "families": entry.families,
            "example": entry.example,
        }
        for entry in CATALOGUE
    ]
    if json_:
        print_results("models", rows)
        return
    for row in rows:
        say(f"{row['library']} {row['installed'] or _how_to_install(row['library'])}")
        say(f"  {row['families']}")
        say(f"  --model {row['example']}")
        say("")


def _version_or_none(library: str) -> str | None:
    """Return the version of an installed library."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _how_to_install(library: str | None) -> str:
    return f"not installed: pip install 'vitscope[{library}]'"


register(models)
