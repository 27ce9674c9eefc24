"""Collective transports with buckets that are smaller than can be set."""

from __future__ import annotations

from typing import Any

import torch

import lightning_rft as rft

__all__ = ["with_buckets"]


def with_buckets(transport: rft.CollectiveTransport, size: int) -> rft.CollectiveTransport:
    """The transport, with buckets of so many bytes."""
    make_sender = transport._make_sender

    def smaller(device: torch.device, explorers: Any) -> Any:
        sender = make_sender(device, explorers)
        sender._bucket_bytes = size  # type: ignore[attr-defined]
        return sender

    transport._make_sender = smaller  # type: ignore[method-assign]
    return transport
