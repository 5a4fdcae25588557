"""Names of models as paths."""

from pathlib import Path

from vitscope.errors import UnknownModelError
from vitscope.models.foreign_errors import first_line


def model_path(name: str) -> Path:
    """Return the name of a model as a path.

    Raises:
        UnknownModelError: no system has a file or folder of this name.
    """
    try:
        path = Path(name)
        path.exists()
    except (OSError, ValueError) as error:  # too long, or with NUL in it
        raise UnknownModelError(
            f"unknown model {name[:40]!r}…: no name of a model or folder ({first_line(error)})"
        ) from None
    return path
