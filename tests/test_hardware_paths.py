"""Every combination of precision, clipping, optimizer and accumulation trains, and resumes, on any machine.

A GPU or a CPU with units for bfloat16 makes users choose other settings than a CPU without. Here each path is set, with
a tiny model and stored experience, so that none depends on the machine that runs the tests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

import lightning_rft as rft
from lightning_rft.buffer.ledger import Ledger
from lightning_rft.experience import Experience, Group, GroupKey, Turn
from lightning_rft.hardware import fast_dtype, fast_precision
from tests.trainer_and_data import quiet_trainer, stored_data

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 4
CLIP = {"norm": 1e-3, "value": 1e-5}  # far below what comes, so that each clips in every step


@dataclass(frozen=True)
class Way:
    """What a machine may lead its user to."""

    precision: str
    clip: str
    optimizer: str
    accumulate: int
    resume: bool

    def __str__(self) -> str:
        return "-".join([self.precision, self.clip, self.optimizer, str(self.accumulate), "resume" * self.resume])


AXES: dict[str, list[Any]] = {
    "precision": ["32-true", "bf16-mixed", "bf16-true"],
    "clip": ["norm", "value", "none"],
    "optimizer": ["fused", "plain", "scheduled"],
    "accumulate": [1, 2],
    "resume": [False, True],
}
PRODUCT = [Way(*values) for values in itertools.product(*AXES.values())]


def pairwise(ways: Iterable[Way]) -> list[Way]:
    """Some of the ways, in which every two values of two axes meet; greedy, so the same on every machine."""

    def pairs(way: Way) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(vars(way).items(), 2))

    left, chosen = list(ways), list[Way]()
    missing = set().union(*map(pairs, left))
    while missing:
        best = max(left, key=lambda way: len(pairs(way) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


COVER = pairwise(PRODUCT)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A buffer with four batches of two groups."""
    path = tmp_path_factory.mktemp("stored") / "buffer.sqlite"
    generator = torch.Generator().manual_seed(0)
    with Ledger.open(path) as ledger:
        ledger.begin()
        for number in range(2 * STEPS):
            key = GroupKey(number // 2, number % 2)
            ledger.issue(key, str(number), epoch=0, explorer=0)
            samples = []
            for sample in range(4):
                ids = torch.randint(3, 40, (6 + sample,), generator=generator).tolist()
                turn = Turn((5, 6, 7), tuple(ids), (-3.6,) * len(ids), (0,) * len(ids), "stop")
                samples.append(Experience(str(number), sample, (turn,), float(sample % 2)))
            ledger.ready(Group(key, str(number), tuple(samples)))
    return path


class Note(L.Callback):
    """Notes what reaches the optimizer, and what is logged."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.largest: list[float] = []
        self.logged: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        self.seen = trainer.global_step
        optimizer.register_step_post_hook(self._stepped)  # the backward pass and the clipping are part of the step

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad.float() for group in optimizer.param_groups for p in group["params"]]
        self.norms.append(float(torch.cat([gradient.reshape(-1) for gradient in gradients]).norm()))
        self.largest.append(max(float(gradient.abs().max()) for gradient in gradients))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step > self.seen:
            self.seen = trainer.global_step
            self.logged.append(float(trainer.callback_metrics["rft/grad_norm"]))


def make_module(model: Path, optimizer: str) -> rft.RFTModule:
    if optimizer == "plain":
        return rft.RFTModule(model, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    make: Callable[..., torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)  # noqa: E731
    if optimizer == "fused":
        return rft.RFTModule(model, optimizer=make)
    return rft.RFTModule(
        model, optimizer=make, lr_scheduler=lambda one: torch.optim.lr_scheduler.ExponentialLR(one, 0.5)
    )


def fit(module: rft.RFTModule, stored: Path, folder: Path, **settings: Any) -> L.Trainer:
    ckpt_path, callbacks = settings.pop("ckpt_path", None), settings.pop("callbacks", [])
    trainer = quiet_trainer(folder, *callbacks, **{"devices": 1, "max_steps": STEPS} | settings)
    trainer.fit(module, stored_data(stored, tasks_per_step=2), ckpt_path=ckpt_path)
    return trainer


def weights(trainer: L.Trainer) -> torch.Tensor:
    """What the optimizer steps, and what is trained."""
    (optimizer,) = trainer.optimizers
    stepped = getattr(optimizer, "inner", optimizer)
    parameters = [p for group in stepped.param_groups for p in group["params"]]
    parameters += list(trainer.lightning_module.parameters())
    return torch.cat([p.detach().float().reshape(-1) for p in parameters])


def try_way(way: Way, model: Path, stored: Path, folder: Path) -> None:
    def train(steps: int = STEPS, ckpt_path: Path | None = None) -> tuple[L.Trainer, Note]:
        note = Note()
        trainer = fit(
            make_module(model, way.optimizer),
            stored,
            folder,
            precision=way.precision,
            accumulate_grad_batches=way.accumulate,
            max_steps=steps,
            gradient_clip_val=CLIP.get(way.clip),
            gradient_clip_algorithm=way.clip if way.clip in CLIP else None,
            callbacks=[note],
            ckpt_path=ckpt_path,
        )
        return trainer, note

    trainer, note = train()
    end = weights(trainer)
    assert torch.isfinite(end).all()
    (optimizer,) = trainer.optimizers
    assert optimizer.param_groups[0]["lr"] == pytest.approx(
        {"plain": 1.0, "fused": 1e-3, "scheduled": 1e-3 * 0.5**STEPS}[way.optimizer]
    )
    assert len(note.norms) == len(note.logged) == STEPS
    assert all(math.isfinite(norm) and norm > 2 * CLIP["norm"] for norm in note.logged), "as it is before clipping"
    if way.clip == "norm":
        assert note.norms == pytest.approx([CLIP["norm"]] * STEPS, rel=0.02)
    elif way.clip == "value":
        assert note.largest == pytest.approx([CLIP["value"]] * STEPS, rel=0.01)
    else:
        assert note.norms == pytest.approx(note.logged, rel=1e-3)
    if way.resume:
        half, _ = train(STEPS // 2)
        assert not torch.equal(weights(half), end)
        half.save_checkpoint(folder / "half.ckpt")
        resumed, _ = train(ckpt_path=folder / "half.ckpt")
        assert resumed.global_step == STEPS
        assert torch.equal(weights(resumed), end)


def test_the_cover_covers() -> None:
    for (a, values), (b, others) in itertools.combinations(AXES.items(), 2):
        for value, other in itertools.product(values, others):
            assert any(getattr(way, a) == value and getattr(way, b) == other for way in COVER)
    assert len(COVER) < len(PRODUCT) / 6


@pytest.mark.parametrize("way", COVER, ids=str)
def test_a_way_trains_and_resumes(way: Way, tiny_model_path: Path, stored: Path, tmp_path: Path) -> None:
    try_way(way, tiny_model_path, stored, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", [way for way in PRODUCT if way not in COVER], ids=str)
def test_every_way_trains_and_resumes(way: Way, tiny_model_path: Path, stored: Path, tmp_path: Path) -> None:
    try_way(way, tiny_model_path, stored, tmp_path)


def test_the_modules_own_optimizer_is_clipped(tiny_model_path: Path, stored: Path, tmp_path: Path) -> None:
    note = Note()
    fit(
        rft.RFTModule(tiny_model_path), stored, tmp_path,
        precision="bf16-mixed", gradient_clip_val=CLIP["norm"], callbacks=[note],
    )  # fmt: skip
    assert note.norms == pytest.approx([CLIP["norm"]] * STEPS, rel=0.02)


@pytest.mark.parametrize("clip", [None, CLIP["norm"]])
def test_a_scaler_and_a_fused_optimizer(
    clip: float | None, tiny_model_path: Path, stored: Path, tmp_path: Path
) -> None:
    """16-mixed as on a GPU: Lightning makes bf16-mixed of it on a CPU, so its plugin is given the scaler."""
    note = Note()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    trainer = fit(
        make_module(tiny_model_path, "fused"), stored, tmp_path,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)], gradient_clip_val=clip, callbacks=[note],
    )  # fmt: skip
    assert trainer.precision == "16-mixed"
    plain = Note()
    fit(make_module(tiny_model_path, "fused"), stored, tmp_path, gradient_clip_val=clip, callbacks=[plain])
    assert note.logged[0] == pytest.approx(plain.logged[0], rel=0.05), "the gradient, with the scale taken out"
    assert note.norms == pytest.approx(plain.norms if clip is None else [clip] * STEPS, rel=0.05)


def test_an_overflow_skips_the_step_and_lowers_the_scale(tiny_model_path: Path, stored: Path, tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=1000)
    before = torch.cat([p.reshape(-1) for p in _loaded(tiny_model_path)])
    trainer = fit(
        make_module(tiny_model_path, "fused"), stored, tmp_path,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)], gradient_clip_val=1.0, max_steps=1,
    )  # fmt: skip
    after = torch.cat([p.detach().reshape(-1) for p in trainer.lightning_module.parameters()])
    assert torch.equal(before, after)
    assert scaler.get_scale() == 2.0**59


def _loaded(model: Path) -> list[torch.Tensor]:
    module = rft.RFTModule(model)
    module.configure_model()
    return [p.detach() for p in module.parameters()]


def test_16_true_is_refused(tiny_model_path: Path, stored: Path, tmp_path: Path) -> None:
    with pytest.raises(rft.ConfigurationError, match=r"precision='16-true'\) .* '16-mixed', .*'bf16-mixed'"):
        fit(rft.RFTModule(tiny_model_path), stored, tmp_path, precision="16-true")


# What is chosen by the hardware


@pytest.mark.parametrize(
    ("device", "units", "dtype", "precision"),
    [
        ("cpu", "0", "float32", "32-true"),
        ("cpu", "1", "bfloat16", "bf16-mixed"),
        ("cuda", "0", "float16", "16-mixed"),
        ("cuda", "1", "bfloat16", "bf16-mixed"),
        ("mps", "1", "float32", "32-true"),
    ],
)
def test_what_a_device_is_fast_in(
    device: str, units: str, dtype: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_RFT_BF16", units)
    assert (fast_dtype(device), fast_precision(device)) == (dtype, precision)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("fpu avx2 avx512_bf16", "bfloat16"), ("fpu avx2 amx_bf16_not", "float32"), ("fpu avx2", "float32")],
)
def test_a_cpu_tells_by_its_flags(flags: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_RFT_BF16", raising=False)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n")
    assert fast_dtype("cpu") == dtype


def test_a_wrong_overrule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_RFT_BF16", "yes")
    with pytest.raises(rft.ConfigurationError, match="LIGHTNING_RFT_BF16=yes must be 0 or 1"):
        fast_dtype("cpu")
