"""The command ``vitscope methods``."""

from vitscope.cli.app import app
from vitscope.cli.options import Json
from vitscope.cli.tables import print_json, print_table


@app.command()
def methods(json_: Json = False) -> None:
    """List the methods for explain --method."""
    from vitscope.methods.registry import METHODS

    rows = [
        {"method": name, "shows": method.summary, "forwards": method.forwards, "source": method.source}
        for name, method in METHODS.items()
    ]
    if json_:
        print_json(rows)
        return
    print_table(("method", "shows", "forwards", "source"), [tuple(row.values()) for row in rows], right=(2,))
