"""vitscope models"""

from vitscope.cli.app import Json, app
from vitscope.cli.output import (
    print_json,
)
from vitscope.cli.terminal import say


@app.command()
def models(json_: Json = False) -> None:
    """Which models can be loaded here."""
    from importlib.metadata import PackageNotFoundError, version

    from vitscope.models.catalogue import CATALOGUE

    rows = []
    for entry in CATALOGUE:
        try:
            installed = version(entry.library)
        except PackageNotFoundError:
            installed = None
        rows.append(
            {"library": entry.library, "installed": installed, "families": entry.families, "example": entry.example}
        )
    if json_:
        print_json(rows)
        return
    for row in rows:
        state = row["installed"] or f"not installed: pip install 'vitscope[{row['library']}]'"
        say(f"{row['library']} {state}")
        say(f"  {row['families']}")
        say(f"  --model {row['example']}")
        say("")
