"""Attention calls that are not in a trace, and what is said about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Reason = Literal["other tokens", "one token", "learned queries", "not the image", "outside the backbone", "not read"]

_MEANING: dict[Reason, str] = {
    "other tokens": "between different sets of tokens or among tokens that are not those of the grid",
    "one token": "to a single token",
    "learned queries": "among learned queries",
    "not the image": "independent of the image",
    "outside the backbone": "outside the backbone",
    "not read": "without effect on the output",
}


@dataclass(frozen=True)
class OmittedCall:
    """An attention call that a trace does not hold.

    Attributes:
        module: the path of the module that called.
        queries, keys: the number of queries and keys.
        reason: why it is not a block of the trace.
    """

    module: str
    queries: int
    keys: int
    reason: Reason

    def __str__(self) -> str:
        return f"{self.module or 'the model itself'} ({self.queries} queries, {self.keys} keys)"


def of_the_image(omitted: Sequence[OmittedCall]) -> list[OmittedCall]:
    """Return the calls through which the image's tokens reach the output beside the blocks of the trace."""
    return [call for call in omitted if call.reason in ("other tokens", "learned queries")]


def warning(name: str, omitted: Sequence[OmittedCall], num_blocks: int) -> str | None:
    """Return the line that tells of omitted calls, or None if there is nothing to tell."""
    told = [call for call in omitted if call.reason not in ("outside the backbone", "not read")]
    if not told:
        return None
    kinds = []
    for reason in dict.fromkeys(call.reason for call in told):
        calls = [call for call in told if call.reason == reason]
        kinds.append(f"{len(calls)} {_MEANING[reason]}, e.g. {calls[0]}")
    verb = "is" if len(told) == 1 else "are"
    meaning = ", so rollout is not available" if of_the_image(told) else ""
    return (
        f"{len(told)} of {num_blocks + len(told)} attention calls of {name} {verb} not in the trace: "
        f"{'; '.join(kinds)}{meaning} (trace.omitted lists them)"
    )
