"""Access to the model hub after one brief check, because its clients retry for half a minute if it is unreachable."""

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

TIMEOUT_SECONDS = 5

_lock = threading.Lock()
_offline_blocks = 0
_offline_before = False


def is_hub_reachable() -> bool:
    """Return whether the hub's host responds and no environment variable requests offline mode."""
    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "").lower() in ("1", "true", "yes"):
        return False
    return host_responds(constants.ENDPOINT)


def host_responds(url: str) -> bool:
    """Return whether the host responds with any status; proxies in environment variables are used."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def repository_folder(name: str, config: str, weights: Sequence[str]) -> Path | None:
    """Return a folder with a repository's configuration and its first weights file; None if it cannot be fetched.

    Args:
        name: ``org/name``, or ``org/name@revision``.
        config: the name of the configuration file, which is required.
        weights: names of weights files in order of preference.
    """
    repository, _, revision = name.partition("@")
    fetch = partial(hf_hub_download, repository, revision=revision or None, local_files_only=not is_hub_reachable())
    try:
        folder = Path(fetch(config)).parent
        for file in weights:
            with suppress(EntryNotFoundError):  # also raised offline for a file that is not in the cache
                fetch(file)
                return folder
    except (OSError, ValueError, RuntimeError):  # HTTP errors are OSErrors, a malformed name is a ValueError
        return None
    return folder


@contextmanager
def offline() -> Iterator[None]:
    """Restrict the hub's client to its cache, for libraries that have no argument for it.

    Contexts may overlap in threads: the flag is restored when the last context ends.
    """
    global _offline_blocks, _offline_before
    with _lock:
        if not _offline_blocks:
            _offline_before = constants.HF_HUB_OFFLINE
        _offline_blocks += 1
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        with _lock:
            _offline_blocks -= 1
            if not _offline_blocks:
                constants.HF_HUB_OFFLINE = _offline_before
