"""Which releases of Hugging Face transformers the layers here are for.

How its layers cache and mask changes between minor releases, so each has to be tested.
"""

from __future__ import annotations

import sys

SCANS_SINCE, ATTENTION_SINCE = (4, 57), (5, 4)
NEWEST_TESTED = (5, 23)


def older(oldest: tuple[int, int]) -> str | None:
    """Why layers of the transformers here are left alone, if it is older."""
    if _release() >= oldest:
        return None
    return f"it is of transformers {_version()}; its kind is swapped from {oldest[0]}.{oldest[1]} on"


def newer() -> list[str]:
    """What a user has to know of a transformers that was not out when this was tested."""
    if _release() <= NEWEST_TESTED:
        return []
    tested = ".".join(map(str, NEWEST_TESTED))
    return [
        f"transformers {_version()} is newer than {tested}, the newest that tilewright was tested with: "
        "swap(..., verify=inputs) compares the outputs."
    ]


def _version() -> str:
    return str(sys.modules["transformers"].__version__)


def _release() -> tuple[int, ...]:
    return tuple(int(part) for part in _version().split(".")[:2])
