"""Memory of a GPU that two processes have open (CUDA IPC), by what ``torch.multiprocessing`` itself is made of.

A handle is for one process that opens it. Torch counts the handles of a tensor that were given out and not returned,
and keeps its memory for as long as there are any, whatever becomes of the tensor. A process that dies returns none:
:func:`take_back` does so in its place.
"""

from __future__ import annotations

import msgspec
import torch

from lightning_rft.errors import TransportError

__all__ = ["gpu_name", "open_handle", "share", "take_back"]

_Handle = tuple[int, bytes, int, int, bytes, int, bytes, bool]  # as UntypedStorage._share_cuda_ makes it


def gpu_name(index: int) -> str:
    """The name of a GPU that every process knows it by, whatever ``CUDA_VISIBLE_DEVICES`` shows to it (its UUID)."""
    return str(torch.cuda.get_device_properties(index).uuid)


def share(bucket: torch.Tensor) -> bytes:
    """A handle with which one other process can open a tensor of bytes."""
    try:
        return msgspec.msgpack.encode(bucket.untyped_storage()._share_cuda_())
    except RuntimeError as error:
        raise _refused("shared", error) from error


def open_handle(handle: bytes, device: torch.device) -> torch.Tensor:
    """The tensor of bytes that another process shares; the handle is returned when nothing refers to the tensor."""
    _, *place = msgspec.msgpack.decode(handle, type=_Handle)  # the device has another index there
    try:
        storage = torch.UntypedStorage._new_shared_cuda(device.index, *place)
    except RuntimeError as error:
        raise _refused("opened", error) from error
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


def take_back(handle: bytes) -> None:
    """Returns a handle in place of a process that has not done so and is gone."""
    *_, counter, offset, _, _ = msgspec.msgpack.decode(handle, type=_Handle)
    torch.UntypedStorage._release_ipc_counter_cuda(counter, offset)


def _refused(what: str, error: RuntimeError) -> TransportError:
    return TransportError(
        f"memory of a GPU could not be {what} between trainer and explorer ({error}): set "
        "CollectiveTransport(backend='gloo')"
    )
