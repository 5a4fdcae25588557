"""Attention calls that are not blocks of a trace, and the warning about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Reason = Literal["other tokens", "one token", "learned queries", "not the image", "outside the backbone", "not read"]

_DESCRIPTIONS: dict[Reason, str] = {
    "other tokens": "between different sets of tokens or among tokens outside the token grid",
    "one token": "to a single token",
    "learned queries": "among learned queries",
    "not the image": "independent of the image",
    "outside the backbone": "outside the backbone",
    "not read": "without effect on the output",
}


@dataclass(frozen=True)
class OmittedCall:
    """An attention call that is not a block of the trace.

    Attributes:
        module: path of the module that made the call; empty for the model itself.
        queries: number of queries.
        keys: number of keys.
        reason: why the call is not a block.
    """

    module: str
    queries: int
    keys: int
    reason: Reason

    def __str__(self) -> str:
        return f"{self.module or 'the model itself'} ({self.queries} queries, {self.keys} keys)"


def image_token_calls(omitted: Sequence[OmittedCall]) -> list[OmittedCall]:
    """Return the calls through which image tokens reach the output outside the blocks of the trace."""
    return [call for call in omitted if call.reason in ("other tokens", "learned queries")]


def omission_warning(name: str, omitted: Sequence[OmittedCall], num_blocks: int) -> str | None:
    """Return the warning about omitted calls of a model, or None if none needs one."""
    reported = [call for call in omitted if call.reason not in ("outside the backbone", "not read")]
    if not reported:
        return None
    kinds = []
    for reason in dict.fromkeys(call.reason for call in reported):
        calls = [call for call in reported if call.reason == reason]
        kinds.append(f"{len(calls)} {_DESCRIPTIONS[reason]}, e.g. {calls[0]}")
    verb = "is" if len(reported) == 1 else "are"
    consequence = ", so rollout is not available" if image_token_calls(reported) else ""
    return (
        f"{len(reported)} of {num_blocks + len(reported)} attention calls of {name} {verb} not in the trace: "
        f"{'; '.join(kinds)}{consequence} (see trace.omitted)"
    )
