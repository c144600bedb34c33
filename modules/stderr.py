"""Standard error of the whole process, below what Python's `sys.stderr` can reach."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO


@contextmanager
def stderr_into(file: BinaryIO) -> Iterator[None]:
    """Sends to a file what this process, its libraries and its children write to stderr meanwhile.

    Nothing happens where there is no stderr.
    """
    try:
        kept = os.dup(2)
    except OSError:
        yield
        return
    sys.stderr.flush()
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
