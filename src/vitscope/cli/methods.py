"""vitscope methods"""

from vitscope.cli.app import Json, app
from vitscope.cli.output import (
    print_json,
    print_table,
)


@app.command()
def methods(json_: Json = False) -> None:
    """Which methods explain takes."""
    from vitscope.methods.registry import METHODS

    rows = [
        {"method": name, "shows": row.summary, "forwards": row.forwards, "source": row.source}
        for name, row in METHODS.items()
    ]
    if json_:
        print_json(rows)
        return
    print_table(("method", "shows", "forwards", "source"), [tuple(row.values()) for row in rows], right=(2,))
