"""The command ``vitscope methods``."""

from vitscope.cli.app import register
from vitscope.cli.json_output import print_results
from vitscope.cli.options import Json
from vitscope.cli.tables import WIDE, print_table


def methods(json_: Json = False) -> None:
    """List the methods for explain --method."""
    from vitscope.methods.registry import METHODS

    columns = ["method", "shows", "forwards", "source"]
    rows = [
        {
            "method": name,
            "shows": method.summary,
            "forwards": method.forwards,
            "source": method.source,
            "kind": method.kind,
            "takes_target": method.takes_target,
        }
        for name, method in METHODS.items()
    ]
    if json_:
        print_results("methods", rows)
        return
    from rich.console import Console

    if Console().width < WIDE:  # the summaries would be broken into many lines
        columns.remove("source")
    print_table(columns, [[row[name] for name in columns] for row in rows], right=(2,), unbroken=(0, 2))


register(methods)
