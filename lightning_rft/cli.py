"""The command line: Lightning's, with the module and datamodule of this package, and short class paths."""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

import lightning_rft
from lightning_rft.datamodule import RFTDataModule
from lightning_rft.errors import ConfigurationError, ExplorerError
from lightning_rft.plan.command import main as plan_of_figures
from lightning_rft.plan.command import needs_config, plan_run
from lightning_rft.plan.measure import MEASURING
from lightning_rft.plan.settings import PlanSettings
from lightning_rft.renamed import moved_in_config
from lightning_rft.run.debug import debug, folder_to_remove
from lightning_rft.run.evaluate import evaluate, trainer_settings
from lightning_rft.run.folder import check_checkpoints, check_run, config_of
from lightning_rft.run.placement import devices_beside
from lightning_rft.trainer.module import RFTModule

__all__ = ["RFTCLI", "ExploringTrainer", "main"]

# Lightning's own would list every option of the trainer, sixty lines above each message.
_USAGE = "%(prog)s [--config FILE] [--KEY VALUE ...]"


class ExploringTrainer(L.Trainer):
    """Lightning's trainer, which can also explore without training, show a sample, and evaluate a run's checkpoints."""

    # LightningCLI runs a subcommand by calling the trainer's method of that name.

    def explore(
        self,
        model: RFTModule,
        datamodule: RFTDataModule,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Explore every task once with the current weights, into the buffer.

        This is ``predict`` without its predictions, which are in the buffer.

        Args:
            model: The module.
            datamodule: The tasks and the explorers.
            ckpt_path: Checkpoint to take the weights from; left out, those of the module's model.
            weights_only: As for ``torch.load``.
        """
        self.predict(
            model, datamodule=datamodule, return_predictions=False, ckpt_path=ckpt_path, weights_only=weights_only
        )

    def evaluate(
        self,
        model: RFTModule,
        datamodule: RFTDataModule,
        run: str | Path,
        checkpoints: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Validate the model as it was, and every checkpoint of a run, into one table and a picture.

        They are written into the run's folder, as ``evaluation.csv`` and ``evaluation.png``.

        Args:
            model: The module, with nothing trained.
            datamodule: The held-out tasks and the explorers.
            run: Folder of the run, which holds ``rft/``.
            checkpoints: Folder of the checkpoints; left out, ``checkpoints/`` in the run's.
            weights_only: As for ``torch.load``.

        Raises:
            SystemExit: With status 1, after all others, if a checkpoint could not be loaded.
        """
        folder = Path(run) / "checkpoints" if checkpoints is None else Path(checkpoints)
        broken = evaluate(self, model, datamodule, Path(run), folder, weights_only)
        if broken:
            raise SystemExit("\n".join(["These checkpoints could not be loaded:", *broken]))

    def debug(
        self,
        model: RFTModule,
        datamodule: RFTDataModule,
        task: str = "0",
        samples: int = 1,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Have one task answered, and show every turn, what it earned, and what would be trained of it.

        One explorer and the real engine, workflow and reward are used; nothing is trained or kept.

        Args:
            model: The module.
            datamodule: The tasks and the explorers.
            task: Id of the task, or its place among the tasks, from 0.
            samples: How many times it is answered.
            ckpt_path: Checkpoint to take the weights from; left out, those of the module's model.
            weights_only: As for ``torch.load``.
        """
        debug(self, model, datamodule, task, samples, ckpt_path, weights_only)

    def plan(self, model: RFTModule, datamodule: RFTDataModule, plan: PlanSettings | None = None) -> None:
        """Say what each sync strategy would gain, from a few steps that are measured.

        The schedule of real runs is driven with the measured seconds on a fake clock. Nothing is kept but the picture.

        Args:
            model: The module.
            datamodule: The tasks and the explorers.
            plan: What is compared, and seconds that are known.
        """
        try:
            plan_run(self, model, datamodule, plan or PlanSettings())
        finally:
            if not isinstance(sys.exc_info()[1], ExplorerError):  # whose log is to be read
                shutil.rmtree(self.default_root_dir, ignore_errors=True)


class _Parser(LightningArgumentParser):
    """Lightning's, which also says where a setting has moved."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(moved_in_config(message) or message, ex)


class RFTCLI(LightningCLI):
    """:class:`~lightning.pytorch.cli.LightningCLI` for reinforcement fine-tuning.

    Its subcommands are ``fit``, ``validate``, ``explore``, ``debug``, ``plan`` and ``evaluate``, which takes the folder
    of a run. A config has the blocks ``model`` (:class:`RFTModule`), ``data`` (:class:`RFTDataModule`) and ``trainer``,
    and the sync strategy is one of ``trainer.callbacks``. The name alone is the ``class_path`` of a class that this
    package exports::

        trainer:
          callbacks:
            - class_path: Synchronous
              init_args: {sync_interval: 2}

    Its defaults differ from Lightning's: runs are seeded with 0, the config that is saved beside the logs
    may replace that of an earlier run, and the module makes its own optimizer (``model.optimizer``).

    Args:
        model_class: A subclass of :class:`RFTModule`, for settings of your own.
        datamodule_class: A subclass of :class:`RFTDataModule`.
        args: Arguments to parse in place of the command line's.
        run: Whether to run a subcommand; if not, there are no subcommands and objects are only made.
        kwargs: Other arguments of ``LightningCLI``, which override the defaults above. A ``trainer_class`` that is a
            function must make an :class:`ExploringTrainer`; a class becomes one.

    Raises:
        SystemExit: With status 2, after a message, if the config cannot be used.

    Example::

        RFTCLI(args=["fit", "--config", "examples/synchronous.yaml", "--trainer.max_steps", "3"])
    """

    def __init__(
        self,
        model_class: type[RFTModule] = RFTModule,
        datamodule_class: type[RFTDataModule] = RFTDataModule,
        args: ArgsType = None,
        run: bool = True,
        **kwargs: Any,
    ) -> None:
        usage: dict[str, Any] = {"usage": _USAGE}
        if run:
            usage = {name: {"usage": _USAGE} for name in self.subcommands()}
            usage["evaluate"] = {"usage": "%(prog)s RUN [--config FILE] [--KEY VALUE ...]"}
        trainer_class = kwargs.get("trainer_class", ExploringTrainer)
        if isinstance(trainer_class, type) and not issubclass(trainer_class, ExploringTrainer):
            trainer_class = type(trainer_class.__name__, (ExploringTrainer, trainer_class), {})
        settings: dict[str, Any] = {
            "save_config_kwargs": {"overwrite": True},
            "seed_everything_default": 0,
            "auto_configure_optimizers": False,
            "parser_class": _Parser,
            **kwargs,
            "trainer_class": trainer_class,
            "parser_kwargs": usage | kwargs.get("parser_kwargs", {}),
        }
        self._chosen = _chosen(args)
        # jsonargparse finds a class by its short name only once it is imported
        for name in lightning_rft.__all__:
            getattr(lightning_rft, name)
        super().__init__(model_class, datamodule_class, args=args, run=run, **settings)

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        # no test, which would be a validation, and no predict, which is what explorers do
        lightnings, given = LightningCLI.subcommands(), {"model", "datamodule"}
        return {
            "fit": lightnings["fit"],
            "validate": lightnings["validate"],
            "explore": given,
            "debug": given,
            "evaluate": given,
            "plan": given,
        }

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self._chosen not in (None, subcommand):
            return self.init_parser(**kwargs)  # only its name is needed, and its options are most of the start's time
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        options = sys.argv[1:] if args is None else args
        if isinstance(options, list) and options[:1] == ["evaluate"] and not {"-h", "--help"} & set(options):
            try:
                self.config = parser.parse_args(_with_config_of_run(options[1:]))
            except ConfigurationError as error:
                self._parser("evaluate").error(str(error), error)
        else:
            super().parse_arguments(parser, args)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        if self.subcommand == "evaluate":
            folder: Path | None = Path(self._get(self.config_init, "run")) / "rft" / "evaluation"
        else:
            folder = folder_to_remove() if self.subcommand in ("debug", "plan") else None
        if folder is not None:
            self.save_config_callback = None  # it would replace the config of the run
            kwargs |= trainer_settings(self._get(self.config_init, "trainer"), folder)
            if self.subcommand == "plan":
                kwargs |= MEASURING
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        auto = config.get("devices") == "auto" and config.get("accelerator") in ("auto", "gpu", "cuda")
        if auto and self.datamodule.explorers:
            kwargs["devices"] = devices_beside(self.datamodule._pool)  # which Lightning itself does not know of
        return super().instantiate_trainer(**kwargs)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:  # a refused setting ends the program as the parser's own errors do
            refusal = _refusal(error)
            if refusal is None:
                raise
            self._parser(self.subcommand).error(str(refusal), error)


def main(args: ArgsType = None) -> None:
    """Runs the command line, or ``args`` in its place."""
    options = sys.argv[1:] if args is None else args
    if isinstance(options, list) and options[:1] == ["plan"] and not needs_config(options[1:]):
        return plan_of_figures(options[1:])
    about = {
        "prog": "lightning-rft",
        "description": "Reinforcement fine-tuning of language models. `lightning-rft report RUN` makes a run's page.",
    }
    RFTCLI(args=args, parser_kwargs=about)


def _chosen(args: ArgsType) -> str | None:
    """The subcommand, or ``--help``, which needs none; ``None`` where options before it, or a file, may choose it."""
    options = sys.argv[1:] if args is None else args
    first = options[0] if isinstance(options, list) and options else "-"
    return first if first in ("-h", "--help") or not first.startswith("-") else None


def _with_config_of_run(options: list[str]) -> list[str]:
    """The command line of ``evaluate`` with the config of its run, in place of a file that may be named."""
    parser = ArgumentParser(prog="lightning-rft evaluate", add_help=False, allow_abbrev=False)
    parser.add_argument("run", nargs="?")
    parser.add_argument("-c", "--config")
    parser.add_argument("--checkpoints")
    given, rest = parser.parse_known_args(options)
    if given.run is None:
        raise ConfigurationError("RUN is missing: lightning-rft evaluate RUN [--config FILE] [--KEY VALUE ...]")
    check_run(Path(given.run))
    config = yaml.safe_dump(config_of(Path(given.run), given.config))
    folder = given.checkpoints or str(Path(given.run) / "checkpoints")
    check_checkpoints(Path(folder))
    return ["evaluate", "--config", config, *rest, "--checkpoints", folder, "--run", given.run]


def _refusal(error: BaseException | None) -> BaseException | None:
    """The error that refused a setting, which jsonargparse wraps in its own where an argument has a union type."""
    while error is not None and not isinstance(error, (ConfigurationError, MisconfigurationException)):
        error = error.__cause__
    return error
