"""TF-Hub image modules run over any number of images with Apache Beam.

The names below load on first use, so that ``import hubbeam`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hubbeam.modules.module import Module
    from hubbeam.transforms.embed import EmbedImages

__all__ = ["EmbedImages", "Module"]

_HOMES = {"Module": "hubbeam.modules.module", "EmbedImages": "hubbeam.transforms.embed"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hubbeam' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
