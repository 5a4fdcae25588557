"""Is the model hub in reach? Asked once and briefly, since its client retries for half a minute."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants

TIMEOUT_SECONDS = 5


def hub_in_reach() -> bool:
    """True when the hub's host answers at all; proxies and mirrors from the environment are honoured."""
    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "").lower() in ("1", "true", "yes"):
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


@contextmanager
def offline() -> Iterator[None]:
    """The hub's client answers from its cache alone, for libraries that offer no argument for it."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
