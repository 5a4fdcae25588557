"""Optional libraries that training needs."""

from importlib.util import find_spec

from vitscope.errors import ModelUnavailableError

TRAINING_LIBRARIES = ("accelerate", "datasets")


def check_training_libraries() -> None:
    """Check that the libraries of the extra ``tune`` are installed, without importing them.

    Raises:
        ModelUnavailableError: one of them is missing.
    """
    for name in TRAINING_LIBRARIES:
        if find_spec(name) is None:
            raise ModelUnavailableError(f"training needs {name}: pip install 'vitscope[tune]'")
