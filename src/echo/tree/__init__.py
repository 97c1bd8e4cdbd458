"""The super-tree, and the packed layout that engines read."""

from echo.kernels.codes import Status
from echo.tree import cache, drafting, layouts, sampling
from echo.tree.accept import Accepted, Compaction, accept, compact
from echo.tree.build import Template
from echo.tree.cache import slot_mapping
from echo.tree.packed import PackedTree, ancestor_masks, buffer_size, pack
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
    "cache",
    "compact",
    "drafting",
    "layouts",
    "pack",
    "sampling",
    "slot_mapping",
]
