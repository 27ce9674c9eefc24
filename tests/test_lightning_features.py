"""Features of Lightning's own either work with experience, or are refused in one sentence before anything starts."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.tuner import Tuner

import lightning_rft as rft
from lightning_rft.buffer.ledger import Ledger
from lightning_rft.run.checks import check_together
from tests.trainer_and_data import quiet_trainer, seeded_data

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture(scope="module")
def data() -> Iterator[rft.RFTDataModule]:
    """Its explorers serve most of the runs of this file."""
    with seeded_data() as data:
        yield data


class Noted(rft.RFTModule):
    """Notes what it is trained on, and which values are not finite."""

    def __init__(self, model: Path, **settings: Any) -> None:
        super().__init__(model, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), **settings)
        self.trained: list[tuple[int, list[str]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        assert torch.isfinite(loss)
        self.trained.append((batch.batch, sorted(group.task_id for group in batch.groups)))
        return loss

    def batches(self) -> list[int]:
        return [batch for batch, _ in self.trained]


def make_trainer(folder: Path, strategy: rft.SyncStrategy | None = None, **settings: Any) -> L.Trainer:
    callbacks = settings.pop("callbacks", [strategy or rft.Synchronous()])
    defaults: dict[str, Any] = {"max_epochs": 1, "devices": 1, "limit_val_batches": None}
    return quiet_trainer(folder, *callbacks, **defaults | settings)


def read_csv(trainer: L.Trainer) -> list[dict[str, str]]:
    assert isinstance(trainer.logger, CSVLogger)
    with open(Path(trainer.logger.log_dir) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# A hook that ends the epoch


class EndsEpochs(Noted):
    """Ends the first epoch before its second batch, or in the middle of it."""

    ends = ((0, 1),)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if (self.trainer.current_epoch, batch_idx) in self.ends else None


@pytest.mark.parametrize("strategy", [rft.Synchronous, lambda: rft.FullyAsynchronous(max_staleness=2)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_epoch_that_a_hook_ends_goes_on_in_the_next(
    strategy: Any, accumulate: int, data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    class Ends(EndsEpochs):
        ends = ((0, 1),) if accumulate == 1 else ((0, 3),)

    module = Ends(tiny_model_path)
    make_trainer(tmp_path, strategy(), max_epochs=3, accumulate_grad_batches=accumulate).fit(module, data)
    cut = [] if accumulate == 1 else [1]  # the half that is thrown away
    assert module.batches() == [0] * accumulate + cut + [batch for batch in range(1, 7) for _ in range(accumulate)]
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    with Ledger.open(tmp_path / "rft" / "buffer.sqlite") as ledger:
        groups = 4 + 4 + 2 + 4 + 4 + 2 + 4
        assert len(ledger.trained_tasks()) == groups
        assert ledger.counts()["leased"] == 0
    whole = [tasks for _, tasks in module.trained[accumulate + len(cut) :: accumulate]]
    assert sum(map(len, whole)) == groups - 4
    assert float(module.trainer.callback_metrics["rft/tokens_per_second"]) > 0


def test_what_the_last_epoch_did_not_train_goes_back(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    module = EndsEpochs(tiny_model_path)
    make_trainer(tmp_path).fit(module, data)
    assert module.batches() == [0]
    with Ledger.open(tmp_path / "rft" / "buffer.sqlite") as ledger:
        assert (len(ledger.trained_tasks()), ledger.counts()["leased"]) == (4, 0)
        assert ledger.counts()["ready"] >= 4


def test_metrics_of_half_a_batch_are_not_counted_twice(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    class Ends(EndsEpochs):
        ends = ((0, 1),)

    rewards = []
    for module in (Noted(tiny_model_path), Ends(tiny_model_path)):
        trainer = make_trainer(tmp_path / type(module).__name__, max_epochs=2, max_steps=1, accumulate_grad_batches=2)
        trainer.fit(module, data)
        rewards.append([float(trainer.callback_metrics[f"rft/{name}"]) for name in ("reward", "loss", "entropy")])
    assert rewards[0] == pytest.approx(rewards[1])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_resumed_after_an_epoch_that_a_hook_ended(
    accumulate: int, data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    def train(module: Noted, epochs: int, resume: Path | None = None) -> list[int]:
        saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
        make_trainer(
            tmp_path, max_epochs=epochs, callbacks=[rft.Synchronous(), saves], enable_checkpointing=True,
            accumulate_grad_batches=accumulate,
        ).fit(module, data, ckpt_path=resume)  # fmt: skip
        return module.batches()

    class Ends(EndsEpochs):
        ends = ((0, accumulate),)

    assert train(Ends(tiny_model_path), 1) == [0] * accumulate
    rest = train(Noted(tiny_model_path), 3, tmp_path / "epoch=0.ckpt")
    assert rest == [batch for batch in range(1, 7) for _ in range(accumulate)]


# Callbacks and settings that only look on


def test_what_looks_on_works(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Clips(Noted):
        """Notes the gradient's norm as the optimizer takes it."""

        def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
            super().configure_gradient_clipping(*args, **kwargs)
            norms.append(float(torch.stack([p.grad.norm() for p in self.parameters() if p.grad is not None]).norm()))

    class Estimates(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            estimated.append(trainer.estimated_stepping_batches)

    norms: list[float] = []
    estimated: list[float] = []
    saves = ModelCheckpoint(tmp_path, monitor="rft/reward", mode="max", filename="best", every_n_train_steps=1)
    looks_on = [RichProgressBar(), LearningRateMonitor("step"), DeviceStatsMonitor(cpu_stats=True), Estimates(), saves]
    trainer = make_trainer(
        tmp_path, callbacks=[rft.Synchronous(), *looks_on], max_epochs=2, gradient_clip_val=1e-3, profiler="simple",
        enable_checkpointing=True, enable_progress_bar=True, logger=CSVLogger(tmp_path),
    )  # fmt: skip
    trainer.fit(
        Clips(tiny_model_path, lr_scheduler=lambda given: torch.optim.lr_scheduler.ExponentialLR(given, 0.5)), data
    )
    assert estimated == [6] and trainer.global_step == 6
    assert len(norms) == 6 and all(norm == pytest.approx(1e-3, rel=1e-2) for norm in norms)
    logged = read_csv(trainer)
    rates = [float(row["lr-AdamW"]) for row in logged if row["lr-AdamW"]]
    assert rates == pytest.approx([1e-3 * 0.5**step for step in range(6)])
    assert any(row["DeviceStatsMonitor.on_train_batch_end/cpu_percent"] for row in logged)
    rewards = [float(row["rft/reward"]) for row in logged if row["rft/reward"]]
    assert float(saves.best_model_score) == pytest.approx(max(rewards))
    loaded = rft.RFTModule.load_from_checkpoint(saves.best_model_path)
    assert all(torch.isfinite(tensor).all() for _, tensor in loaded.weights())
    said = capsys.readouterr().out
    assert len(trainer.profiler.recorded_durations["[Strategy]SingleDeviceStrategy.training_step"]) == 6  # type: ignore[attr-defined]
    assert "Epoch 1/1" in said and "rft/reward" in said


def test_a_run_ends_when_its_time_is_up(data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    class LetsTimePass(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            (timer,) = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
            if trainer.global_step == 2:
                timer._offset = 3600  # seconds that count as passed

    module = Noted(tiny_model_path)
    callbacks = [rft.Synchronous(), LetsTimePass()]
    make_trainer(tmp_path, callbacks=callbacks, max_epochs=3, max_time="00:01:00:00").fit(module, data)
    assert module.batches() == [0, 1]
    with Ledger.open(tmp_path / "rft" / "buffer.sqlite") as ledger:
        assert (len(ledger.trained_tasks()), ledger.counts()["leased"]) == (8, 0)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_an_average_of_the_weights(data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path) -> None:
    class Notes(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            history.append([parameter.detach().clone() for parameter in pl_module.parameters()])

    history: list[list[torch.Tensor]] = []
    module = Noted(tiny_model_path)
    averages = EMAWeightAveraging(decay=0.5, use_buffers=False)
    make_trainer(tmp_path, callbacks=[averages, Notes(), rft.Synchronous()]).fit(module, data)
    assert module.batches() == [0, 1, 2]
    expected = history[0]
    for weights in history[1:]:
        expected = [0.5 * old + 0.5 * new for old, new in zip(expected, weights, strict=True)]
    for found, average in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), average)
    assert any(not torch.equal(found, last) for found, last in zip(module.parameters(), history[-1], strict=True))


# Checkpoints


def test_a_checkpoint_is_loaded_without_arguments(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    module = Noted(tiny_model_path, pass_threshold=0.5, gradient_checkpointing=True)
    trainer = make_trainer(tmp_path)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    for kind in (rft.RFTModule, Noted):
        loaded = kind.load_from_checkpoint(tmp_path / "end.ckpt")
        assert (loaded.model, loaded.pass_threshold, loaded.gradient_checkpointing) == (str(tiny_model_path), 0.5, True)
        weights = dict(module.weights())
        assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.weights())
        loaded.save_pretrained(tmp_path / kind.__name__)
    again = rft.RFTModule.load_from_checkpoint(tmp_path / "end.ckpt", pass_threshold=0.1)
    assert (again.pass_threshold, again.gradient_checkpointing) == (0.1, True)


def test_another_objective_than_the_checkpoints_is_said(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(Noted(tiny_model_path, objective=rft.GRPO(entropy=0.25)), data)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.warns(UserWarning, match=r"trained with GRPO\(.*entropy=0.25.*: set objective="):
        rft.RFTModule.load_from_checkpoint(tmp_path / "end.ckpt")


# What is asked of explorers without training


def test_test_does_what_validate_does(tiny_model_path: Path, tmp_path: Path) -> None:
    val_tasks = [rft.Task(f"{index} + 2 =", answer=float(index % 2)) for index in range(10)]
    with seeded_data(reward=lambda completion, task: task.answer or 0.0, val_tasks=val_tasks) as data:
        trainer, module = make_trainer(tmp_path), Noted(tiny_model_path)
        (validated,) = trainer.validate(module, data, verbose=False)
        (tested,) = trainer.test(module, data, verbose=False)
        assert tested == {
            **{f"test/{name}": 0.5 for name in ("reward", "pass_at_1", "pass@1")},
            **{
                f"test/{name}": pytest.approx(validated[f"val/{name}"])
                for name in ("completion_length", "truncated_share")
            },
            "test/version": 0.0,
        }
        assert list(tested) == [name.replace("val/", "test/") for name in validated]
        assert list(tested.values()) == list(validated.values())
        trainer.fit(module, data)
        (tested,) = trainer.test(module, data, verbose=False)
        assert tested["test/version"] == 3.0
        (tested,) = make_trainer(tmp_path, limit_test_batches=1).test(module, data, verbose=False)
        assert tested["test/reward"] == 0.5


# One set of batches again and again


@pytest.mark.parametrize("overfit", [1, 2])
def test_overfitting_trains_the_same_batches_every_epoch(
    overfit: int, data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    module = Noted(tiny_model_path)
    make_trainer(tmp_path, max_epochs=3, overfit_batches=overfit).fit(module, data)
    tasks = [tasks for _, tasks in module.trained]
    assert tasks == 3 * tasks[:overfit]
    assert module.batches() == list(range(3 * overfit))


# Where a run ends


@pytest.mark.parametrize(
    ("hook", "step"), [("on_train_batch_end", 1), ("on_train_batch_end", 3), ("on_train_epoch_end", 3)]
)
def test_a_resumed_run_explores_no_batch_after_its_end(
    hook: str, step: int, data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    def save(self: L.Callback, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == step:
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    saves = type("Saves", (L.Callback,), {hook: save})()
    make_trainer(tmp_path, max_epochs=2, callbacks=[rft.Synchronous(), saves]).fit(Noted(tiny_model_path), data)
    module, ahead = Noted(tiny_model_path), rft.FullyAsynchronous(max_staleness=8)
    make_trainer(tmp_path, ahead, max_epochs=2).fit(module, data, ckpt_path=tmp_path / "saved.ckpt")
    assert module.batches() == list(range(step, 6))
    rows = list(rft.read_buffer(tmp_path / "rft" / "buffer.sqlite", tokens=False))
    assert {row["batch"] for row in rows} == set(range(6))


def test_a_checkpoint_from_the_middle_of_a_batch_begins_it_anew(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == 2:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    settings: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": 2}
    make_trainer(tmp_path, callbacks=[rft.Synchronous(), Saves()], **settings).fit(Noted(tiny_model_path), data)
    module = Noted(tiny_model_path)
    make_trainer(tmp_path, **settings).fit(module, data, ckpt_path=tmp_path / "saved.ckpt")
    assert module.batches() == [1, 2, 2]
    assert len(module.trained[0][1]) == 4, "the whole batch in the one item that is left of it"


@pytest.mark.parametrize("strategy", [rft.Synchronous, lambda: rft.FullyAsynchronous(max_staleness=2)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_checkpoint_of_a_callback_in_front_of_the_strategy_is_resumed(
    strategy: Any, accumulate: int, data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2 and not (tmp_path / "saved.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    whole = Noted(tiny_model_path)
    settings: dict[str, Any] = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    make_trainer(tmp_path, callbacks=[Saves(), strategy()], **settings).fit(whole, data)
    rest = Noted(tiny_model_path)
    make_trainer(tmp_path, strategy(), **settings).fit(rest, data, ckpt_path=tmp_path / "saved.ckpt")
    assert rest.batches() == [batch for batch in range(2, 6) for _ in range(accumulate)]
    with Ledger.open(tmp_path / "rft" / "buffer.sqlite") as ledger:
        assert sorted(ledger.trained_tasks()) == sorted(2 * [str(index) for index in range(10)])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_checkpoint_of_a_step_that_failed_begins_it_anew(
    accumulate: int, tiny_model_path: Path, tmp_path: Path
) -> None:
    class Fails(Noted):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2 * accumulate - 1:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    class Saves(L.Callback):
        def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "failed.ckpt")

    settings: dict[str, Any] = {"max_epochs": 1, "accumulate_grad_batches": accumulate}
    callbacks = [rft.Synchronous(), Saves()]
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, callbacks=callbacks, **settings).fit(Fails(tiny_model_path), seeded_data())
    module = Noted(tiny_model_path)
    make_trainer(tmp_path, **settings).fit(module, seeded_data(), ckpt_path=tmp_path / "failed.ckpt")
    assert module.batches() == [1, *[2] * accumulate]


# What is refused before anything starts


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(*_: Any, **__: Any) -> None:
        pytest.fail("an explorer process was started")

    monkeypatch.setattr("lightning_rft.explorer.local.spawn", spawn)


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("find", [
    lambda trainer, *given: Tuner(trainer).lr_find(*given[:1], datamodule=given[1]),
    lambda trainer, *given: Tuner(trainer).scale_batch_size(*given[:1], datamodule=given[1]),
    lambda trainer, *given: trainer.fit(*given),
], ids=["lr_find", "scale_batch_size", "callback"])  # fmt: skip
def test_a_tuner_is_refused(find: Any, tiny_model_path: Path, tmp_path: Path) -> None:
    module = Noted(tiny_model_path)
    module.batch_size, module.lr = 1, 1.0  # type: ignore[assignment]
    trainer = make_trainer(tmp_path)
    if "fit" in find.__code__.co_names:
        trainer.callbacks.append(LearningRateFinder())  # type: ignore[attr-defined]
    with pytest.raises(rft.ConfigurationError, match=r"Finder, or Tuner, takes the sync strategy out .*max_steps=20"):
        find(trainer, module, seeded_data())


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_rename_weights_are_refused(strategy: type, tiny_model_path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    given = strategy.__new__(strategy)  # which only starts on a GPU
    given._lightning_module = Noted(tiny_model_path)
    trainer._accelerator_connector.strategy = given
    with pytest.raises(rft.ConfigurationError, match=rf"{strategy.__name__} gives .*'ddp'\), or ModelParallelStrategy"):
        check_together(trainer, explorers=1, buffer=rft.Buffer(), samples_per_task=2, validates=False)


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (StochasticWeightAveraging(swa_lrs=1e-2), r"StochasticWeightAveraging .* average nothing: take EMAWeightAv"),
        (EMAWeightAveraging(), r"EMAWeightAveraging swaps the average in .*: set Trainer\(limit_val_batches=0\)"),
    ],
)
def test_averages_that_would_not_be_what_they_seem_are_refused(
    callback: L.Callback, message: str, tiny_model_path: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, callbacks=[rft.Synchronous(), callback], limit_val_batches=1.0)
    with pytest.raises(rft.ConfigurationError, match=message):
        trainer.fit(Noted(tiny_model_path), seeded_data(val_tasks=["2 + 2 ="]))


@pytest.mark.usefixtures("no_process")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_compiled_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(rft.ConfigurationError, match=r"torch.compile\(module\) .* give the trainer"):
        make_trainer(tmp_path).fit(torch.compile(Noted(tiny_model_path)), seeded_data())  # type: ignore[arg-type]
    module = Noted(tiny_model_path)
    module.configure_model()
    module.policy = torch.compile(module.policy)  # type: ignore[assignment]
    with pytest.raises(rft.ConfigurationError, match=r"policy is a OptimizedModule, .* without a wrapper"):
        make_trainer(tmp_path).fit(module, seeded_data())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("part", ["", "model.layers.0"])
def test_a_policy_that_is_wrapped_while_it_is_loaded_is_refused(
    part: str, data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    class Wraps(Noted):
        def configure_model(self) -> None:
            super().configure_model()
            assert self.policy is not None
            if part:
                self.policy.set_submodule(part, torch.compile(self.policy.get_submodule(part)))  # type: ignore[arg-type]
            else:
                self.policy = torch.compile(self.policy)  # type: ignore[assignment]

    module = Wraps(tiny_model_path)
    with pytest.raises(rft.ConfigurationError, match=r"policy.* is a OptimizedModule, whose weights have other names"):
        make_trainer(tmp_path).fit(module, data)
    assert not (tmp_path / "rft" / "buffer.sqlite").exists()  # before the run began, and explorers were waited for


@pytest.mark.usefixtures("no_process")
def test_a_folder_that_cannot_be_written_is_named(tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(rft.ConfigurationError, match=r"folder '.*/file/rft' cannot be written \(Not a .*default_root"):
        make_trainer(tmp_path / "file").fit(Noted(tiny_model_path), seeded_data())
