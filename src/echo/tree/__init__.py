"""The super-tree, and the packed layout that engines read."""

from echo.kernels.codes import Status
from echo.tree import layouts
from echo.tree.accept import Accepted, Compaction, accept, compact
from echo.tree.build import Template
from echo.tree.packed import PackedTree, ancestor_masks, buffer_size, pack, slot_mapping
from echo.tree.supertree import Forest, Frontier, Layer, SuperTree

__all__ = [
    "Accepted",
    "Compaction",
    "Forest",
    "Frontier",
    "Layer",
    "PackedTree",
    "Status",
    "SuperTree",
    "Template",
    "accept",
    "ancestor_masks",
    "buffer_size",
    "compact",
    "layouts",
    "pack",
    "slot_mapping",
]
