"""The super-tree, and the packed layout that engines read."""

from echo.tree.accepted import Accepted
from echo.tree.packed import PackedTree, ancestors, pack
from echo.tree.supertree import Forest, Frontier, Layer, Status, SuperTree

__all__ = ["Accepted", "Forest", "Frontier", "Layer", "PackedTree", "Status", "SuperTree", "ancestors", "pack"]
