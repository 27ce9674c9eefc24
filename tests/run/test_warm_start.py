"""While explorers start, the trainer does what its first step would have to do, and no longer than they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

import lightning_rft as rft
from lightning_rft.explorer.placement import Placement
from lightning_rft.run import session
from lightning_rft.trainer.warm_up import Texts
from tests.processes import LightEngine, until
from tests.trainer_and_data import fake_data, pool_of, quiet_trainer, seeded_data

pytestmark = pytest.mark.usefixtures("one_thread")


def gated(gate: Path) -> LightEngine:
    """An engine that starts when there is a file."""

    class Gated(LightEngine):  # here, so that an explorer need not import this module
        def start(self, *args: Any, **settings: Any) -> None:
            end = time.monotonic() + 60
            while not gate.exists():
                assert time.monotonic() < end
                time.sleep(0.01)
            super().start(*args, **settings)

    return Gated(mean_tokens=4)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Pieces of a warm-up, in place of the real ones."""
    made: list[Callable[[], None]] = []
    monkeypatch.setattr(session, "warm_up", lambda module, texts: list(made))
    return made


def fit(data: rft.RFTDataModule, model: Path, folder: Path) -> rft.RFTModule:
    module = rft.RFTModule(model)
    quiet_trainer(folder, rft.Synchronous(), max_steps=2).fit(module, data)
    return module


def test_no_piece_begins_once_explorers_are_ready(
    pieces: list[Callable[[], None]], tiny_model_path: Path, tmp_path: Path
) -> None:
    begun: list[str] = []
    with fake_data(engine=gated(tmp_path / "gate")) as data:

        def second() -> None:
            begun.append("second")
            (tmp_path / "gate").touch()
            until(lambda: pool_of(data).ready, "the start of the engine")

        pieces += [lambda: begun.append("first"), second, lambda: begun.append("third")]
        fit(data, tiny_model_path, tmp_path)
        assert begun == ["first", "second"]
        fit(data, tiny_model_path, tmp_path)  # they are ready from the beginning
        assert begun == ["first", "second"]


def test_an_error_in_a_piece_ends_the_run(
    pieces: list[Callable[[], None]], tiny_model_path: Path, tmp_path: Path
) -> None:
    data = fake_data(engine=gated(tmp_path / "gate"))
    pieces.append(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(ZeroDivisionError):
        fit(data, tiny_model_path, tmp_path)
    assert not pool_of(data).running


@pytest.mark.parametrize("where", ["here", "several ranks", "a shared GPU"])
def test_where_there_is_nothing_to_do(
    where: str,
    pieces: list[Callable[[], None]],
    tiny_model_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if where == "several ranks":
        monkeypatch.setattr(session, "ParallelStrategy", SingleDeviceStrategy)
    elif where == "a shared GPU":
        monkeypatch.setattr(session, "gpu_placement", lambda *_: Placement(("0",), (("0",),)))
    made, warm_up = [], session.Session._warm_up

    def noted(self: session.Session, settings: Any) -> list[Callable[[], None]]:
        made.append(list(warm_up(self, settings)))
        return []

    monkeypatch.setattr(session.Session, "_warm_up", noted)
    pieces.append(lambda: None)
    fit(fake_data(), tiny_model_path, tmp_path)
    assert made == [pieces if where == "here" else []]


def test_a_run_is_the_same_with_and_without(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm_up, asked = session.warm_up, []

    def whole(module: Any, texts: Texts) -> Iterator[Callable[[], None]]:
        asked.append(texts)
        with ExitStack() as ends:
            ends.callback((tmp_path / "gate").touch)
            yield from warm_up(module, texts)

    found = []
    for way in (whole, lambda *_: ()):
        monkeypatch.setattr(session, "warm_up", way)
        torch.manual_seed(1)
        module = fit(seeded_data(engine=gated(tmp_path / "gate")), tiny_model_path, tmp_path / str(len(found)))
        found.append((module.state_dict(), module.fast_path, torch.get_rng_state()))
    (weights, path, state), (others, other_path, other_state) = found
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
    assert path == other_path
    assert torch.equal(state, other_state)
    (texts,) = asked  # of sums that are encoded as characters, in a chat's frame or not
    assert texts.completion == 6 and texts.samples == 2
    assert len("9 + 1 =") <= texts.prompt < 30
