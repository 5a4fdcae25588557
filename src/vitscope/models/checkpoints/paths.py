"""Names of models as paths, and of files in their folders."""

from pathlib import Path

from vitscope.errors import UnknownModelError, first_line

# Where transformers keeps the settings of an image processor.
PROCESSOR_FILE = "preprocessor_config.json"


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
