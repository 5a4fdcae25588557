"""The error for modules whose attention is not available, and the alternatives that messages suggest."""

from vitscope.errors import UnsupportedModelError

WITHOUT_ATTENTION = "use a method that needs no attention, such as vitscope.lime"
BLOCK_BY_BLOCK = "use vitscope.attention_map, which shows one block at a time"


def unsupported_attention(module: str, reason: str) -> UnsupportedModelError:
    """Return the error for a module whose attention weights cannot be determined.

    Args:
        module: path of the module, or the name of the model.
        reason: a clause that says what the module does.
    """
    return UnsupportedModelError(f"the attention of {module} is not available because {reason}: {WITHOUT_ATTENTION}")
