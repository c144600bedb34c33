"""How far the shards of a local run are: small files that the launcher adds up.

A file for each shard works the same whether shards run in the launcher's process or in others,
and stays right when a shard is tried again.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple


class Progress(NamedTuple):
    """Images done, and how many of them gave no vector."""

    images: int = 0
    rejects: int = 0


def note_progress(folder: str | None, shard: int, images: int, rejects: int) -> None:
    """Notes how far a shard is; does nothing without a folder."""
    if folder is None:
        return
    final = Path(folder) / f"{shard}.json"
    temporary = final.with_suffix(f".{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps([images, rejects]))
        temporary.replace(final)
    except FileNotFoundError:
        # The launcher has gone and taken the folder with it: nobody is left to be told.
        return


def read_progress(folder: str) -> Progress:
    """Adds up what all shards have noted."""
    images = rejects = 0
    for file in Path(folder).glob("*.json"):
        done, rejected = json.loads(file.read_text())
        images += done
        rejects += rejected
    return Progress(images, rejects)
