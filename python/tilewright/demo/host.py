"""What the demonstrations with models of transformers share: from finding it to generating with it."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

NO_SPECIAL_BYTES = {"vocab_size": 256, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_PROMPT_BYTES = 384


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


def swapped_copy(model: nn.Module, **options: Any) -> nn.Module:
    """A copy of a model after `tilewright.swap` with these options.

    Raises:
        ValueError: a layer of the transformers that is installed cannot be swapped.
    """
    import transformers

    from tilewright.swapping import swap

    twin = copy.deepcopy(model)
    report = swap(twin, **options)
    left = [layer for layer in report.skipped if layer.why != "swapped already"]
    if left or not report.swapped:
        raise ValueError(
            f"the layers of transformers {transformers.__version__} cannot be swapped:\n{report}"
        )
    return twin


class TokenClock:
    """A streamer for `generate` that notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called with the prompt, then with every token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""

    def gaps_ms(self) -> list[float]:
        """Between one token and the next; reading the prompt, which comes before the first, is left out."""
        return [(b - a) * 1e3 for a, b in itertools.pairwise(self.times[1:])]


def generate(model: Any, prompt: Tensor, count: int, **how: Any) -> tuple[list[int], list[float]]:
    """The tokens that the model appends to the prompt, and the milliseconds between them."""
    clock = TokenClock()
    output = model.eval().generate(prompt[None].long(), max_new_tokens=count, streamer=clock, **how)
    return output[0, len(prompt) :].tolist(), clock.gaps_ms()


def prompt_of(text: Tensor) -> Tensor:
    """The first lines of `text`."""
    return text[: bytes(text[:_PROMPT_BYTES].tolist()).rindex(b"\n") + 1]


def decoded(values: list[int]) -> str:
    """Text that is safe to print: an untrained model writes control characters, too."""
    text = bytes(values).decode(errors="replace")
    return "".join(
        char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text
    )
