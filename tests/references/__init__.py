"""The models token by token in fp64: their equations, with nothing fast about them.

The independent references of the tests. They read checkpoints with the hub's names, as `tests.checkpoints` writes them.
"""

from tests.references.bailing import BailingReference
from tests.references.kimi_linear import KimiReference
from tests.references.minimax import MiniMaxReference
from tests.references.minimax_m2 import MiniMaxM2Reference

__all__ = ["BailingReference", "KimiReference", "MiniMaxM2Reference", "MiniMaxReference"]
