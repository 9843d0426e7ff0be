"""Where `tilewright bench` and `tilewright demo` put what they found."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Replaces a file at once: whoever reads or interrupts finds the old one whole, or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # as any other file; mkstemp's are the owner's alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def check_writable(out: Path) -> None:
    """Makes the folder; an OSError that names it if nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        reason = "it is a file" if out.is_file() else error.strerror or error
        raise OSError(f"--out {out}: results cannot be written there: {reason}") from None
