"""Model names as paths, and names of files in model folders."""

from pathlib import Path

from vitscope.errors import UnknownModelError, first_line
from vitscope.validation import short_repr

# The file in which transformers saves the settings of an image processor.
PROCESSOR_FILE = "preprocessor_config.json"


def model_path(name: str) -> Path:
    """Return the name of a model as a path, which need not exist.

    Raises:
        UnknownModelError: no file system can have a file or folder of this name.
    """
    try:
        path = Path(name)
        path.exists()
    except (OSError, ValueError) as error:  # the name is too long or contains NUL
        raise UnknownModelError(
            f"unknown model {short_repr(name, 40)}: no model or folder can have this name ({first_line(error)})"
        ) from None
    return path
