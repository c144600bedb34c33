"""What runs a module's graph: TensorFlow, the reference, and others that agree with it."""

from hubbeam.modules.engines.base import Engine, EngineChoice
from hubbeam.modules.engines.choose import ENGINES, choose_engine, import_engine, load_engine

__all__ = [
    "ENGINES",
    "Engine",
    "EngineChoice",
    "choose_engine",
    "import_engine",
    "load_engine",
]
