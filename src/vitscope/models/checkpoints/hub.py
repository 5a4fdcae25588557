"""Is the place that weights come from in reach? Asked once and briefly: the clients retry for half a minute."""

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


def hub_in_reach() -> bool:
    """True when the hub's host answers at all and nobody said to stay offline."""
    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "").lower() in ("1", "true", "yes"):
        return False
    return answers(constants.ENDPOINT)


def answers(url: str) -> bool:
    """True when the host answers, whatever it says; proxies from the environment are honoured."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


_lock = threading.Lock()
_offline_runs = 0
_offline_before = False


def repository_folder(name: str, config: str, weights: Sequence[str]) -> Path | None:
    """Return a folder with a repository's configuration and its first file of weights, or None if it is out of reach.

    Args:
        name: ``org/name``, or ``org/name@revision``.
        config: the file that must be there.
        weights: names of files of weights, the best first.
    """
    repository, _, revision = name.partition("@")
    fetch = partial(hf_hub_download, repository, revision=revision or None, local_files_only=not hub_in_reach())
    try:
        folder = Path(fetch(config)).parent
        for file in weights:
            with suppress(EntryNotFoundError):  # also what is not in the cache while offline
                fetch(file)
                return folder
    except (OSError, ValueError, RuntimeError):  # HTTP errors are OSErrors, a malformed name is a ValueError
        return None
    return folder


@contextmanager
def offline() -> Iterator[None]:
    """Let the hub's client answer from its cache alone, for libraries that offer no argument for it.

    Blocks may overlap in threads: the flag is as before when the last of them ends.
    """
    global _offline_runs, _offline_before
    with _lock:
        if not _offline_runs:
            _offline_before = constants.HF_HUB_OFFLINE
        _offline_runs += 1
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        with _lock:
            _offline_runs -= 1
            if not _offline_runs:
                constants.HF_HUB_OFFLINE = _offline_before
