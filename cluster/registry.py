"""The gate and the promotion: which day's model serves.

A candidate is judged by what is known of it in the morning: how yesterday's model of the same chain scored the new day.
A rejected candidate is a value, not an exception.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Decision:
    """state: promoted or held. reason: one readable line."""

    state: str
    reason: str


def judge(
    candidate: Mapping[str, Mapping[str, Any]],
    champion: Mapping[str, Mapping[str, Any]] | None,
    addresses: tuple[str, ...],
    tolerance: float,
) -> Decision:
    """Promote unless the AUC at one of the addresses is undefined or below the champion's by more than tolerance.

    candidate, champion: metrics by address, of the day on which each was made, None where undefined. champion None:
    there is none yet.
    """
    if champion is None:
        return Decision("promoted", "the first model")
    for address in addresses:
        before, now = champion.get(address, {}).get("auc"), candidate.get(address, {}).get("auc")
        if now is None:
            return Decision("held", f"{address}: AUC is undefined")
        if before is not None and now < before - tolerance:
            return Decision(
                "held", f"{address}: AUC {now:.4f} is below the champion's {before:.4f} by more than {tolerance}"
            )
    return Decision("promoted", f"not worse than the champion by more than {tolerance}")
