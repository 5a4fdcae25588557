"""Fine-tuning and comparing: one data set, models of any library, ways to tune them, and what that did to attention."""

from importlib.util import find_spec

from vitscope.errors import ModelUnavailableError

for _needed in ("accelerate", "datasets"):
    if find_spec(_needed) is None:
        raise ModelUnavailableError(f"training needs {_needed}: pip install 'vitscope[tune]'")
