"""The reason why a Ray cluster has no room for explorers: what they ask for against what there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["described", "shortage"]


def described(bundle: Mapping[str, float]) -> str:
    """The resources of a bundle.

    Example:
        >>> described({"CPU": 1.0, "GPU": 0.5})
        '1 CPU and 0.5 GPU'
    """
    return " and ".join(f"{amount:g} {name}" for name, amount in bundle.items())


def shortage(
    count: int, bundle: Mapping[str, float], nodes: Sequence[Mapping[str, float]], free: Mapping[str, float]
) -> str:
    """What keeps ``count`` bundles from being reserved.

    Args:
        count: Number of bundles, each of which must be on one node.
        bundle: Resources of each.
        nodes: Resources of each node that is alive, whether or not they are taken.
        free: Resources that are free on all nodes together.

    Example:
        >>> shortage(4, {"CPU": 1, "GPU": 2}, [{"CPU": 8, "GPU": 2}, {"CPU": 8}], {"CPU": 15, "GPU": 2})
        '8 GPU are needed, but 2 nodes have 2 in all'
    """
    where = f"{len(nodes)} node{'s' * (len(nodes) != 1)} {'have' if len(nodes) != 1 else 'has'}"
    found = []
    for name, amount in bundle.items():
        there = [node.get(name, 0.0) for node in nodes]
        needed, total, largest = count * amount, sum(there), max(there, default=0.0)
        if total < needed:
            found.append(f"{needed:g} {name} are needed, but {where} {total:g} in all")
        elif largest < amount:
            found.append(f"{amount:g} {name} on one node are needed, but the largest has {largest:g}")
        elif free.get(name, 0.0) < needed:
            found.append(f"{needed:g} {name} are needed, but {free.get(name, 0.0):g} of {total:g} are free")
    if not found:
        fitting = sum(_fitting(bundle, node) for node in nodes)
        found.append(
            f"single nodes have room for {fitting}" if fitting < count else "no single nodes have as much free"
        )
    return "; ".join(found)


def _fitting(bundle: Mapping[str, float], node: Mapping[str, float]) -> int:
    """How many bundles an empty node holds."""
    return min(int(node.get(name, 0.0) / amount) for name, amount in bundle.items())
