"""What the demonstrations with models of transformers share: finding it, and keeping it quiet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NO_SPECIAL_BYTES = {"vocab_size": 256, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def transformers_for(demo: str) -> Any:
    """The module transformers; an ImportError that says what to do if it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"`tilewright demo {demo}` needs a model of transformers, which is not installed: "
            "pip install transformers"
        ) from error
    return transformers


@contextmanager
def without_warnings(demo: str) -> Iterator[None]:
    """Keeps transformers from warning, amidst the progress bars, of what a demonstration shows."""
    logging = transformers_for(demo).logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
