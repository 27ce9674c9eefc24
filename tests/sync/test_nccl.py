"""What NCCL can be asked of without a GPU: how a group is invited."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from lightning_rft.errors import TransportError
from lightning_rft.sync.transports.nccl import NCCLLink, NCCLSender

UNIQUE_ID = bytes(range(128))


class Explorers:
    def __init__(self) -> None:
        self.links: dict[int, NCCLLink] = {}

    def connect(self, explorer: int, link: NCCLLink) -> None:
        self.links[explorer] = link


def test_other_engines_refuse() -> None:
    with pytest.raises(TransportError, match="backend='gloo'"):
        NCCLLink({}).open(0)


@pytest.mark.vllm
def test_the_unique_id_goes_by_our_own_channel_and_no_store_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    common = pytest.importorskip("vllm.distributed.weight_transfer.nccl_common")
    wrapper = pytest.importorskip("vllm.distributed.device_communicators.pynccl_wrapper")
    joined: list[Any] = []

    class Library:
        def ncclGetUniqueId(self) -> ctypes.Structure:
            return wrapper.ncclUniqueId.from_buffer_copy(UNIQUE_ID)

    monkeypatch.setattr(wrapper, "NCCLLibrary", Library)
    monkeypatch.setattr(common, "uid_init_process_group", lambda *group: joined.append(group) or object())
    explorers, sender, device = Explorers(), NCCLSender(torch.device("cuda:1")), torch.device("cuda:1")
    sender.join(explorers, {3: 1, 5: 2})  # type: ignore[arg-type]
    assert sender.joined
    assert joined == [(UNIQUE_ID, 0, 4, device)]
    received = {explorer: common.NCCLWeightTransferInitInfo(**link.nccl) for explorer, link in explorers.links.items()}
    assert {explorer: info.rank_offset for explorer, info in received.items()} == {3: 1, 5: 2}
    for info in received.values():
        assert (info.nccl_unique_id_bytes, info.world_size, info.packed) == (UNIQUE_ID, 4, True)
        assert info.master_address is None
