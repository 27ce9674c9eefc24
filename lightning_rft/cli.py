"""The command line: Lightning's, with this package's module, datamodule and short class paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import lightning_rft
from lightning_rft.datamodule import RFTDataModule
from lightning_rft.errors import ConfigurationError
from lightning_rft.renamed import moved_in_config
from lightning_rft.trainer.module import RFTModule

__all__ = ["RFTCLI", "ExploringTrainer", "main"]

# Lightning's own would list every option of the trainer, sixty lines above each message.
_USAGE = "%(prog)s [--config FILE] [--KEY VALUE ...]"


class ExploringTrainer(L.Trainer):
    """Lightning's trainer, which can also explore without training."""

    # LightningCLI runs a subcommand by the trainer's method of that name.

    def explore(
        self,
        model: RFTModule,
        datamodule: RFTDataModule,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Explore every task once with the weights as they are, into the buffer.

        It is ``predict``, whose predictions are not kept since the buffer has them.

        Args:
            model: The module.
            datamodule: The tasks, and who explores them.
            ckpt_path: Checkpoint whose weights explore; left out, those of the module's model.
            weights_only: As for ``torch.load``.
        """
        self.predict(
            model, datamodule=datamodule, return_predictions=False, ckpt_path=ckpt_path, weights_only=weights_only
        )


class _Parser(LightningArgumentParser):
    """Lightning's, which also says where a setting has moved."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        super().error(moved_in_config(message) or message, ex)


class RFTCLI(LightningCLI):
    """:class:`~lightning.pytorch.cli.LightningCLI` for reinforcement fine-tuning: ``fit``, ``validate``, ``explore``.

    A config has the blocks ``model`` (:class:`RFTModule`), ``data`` (:class:`RFTDataModule`) and ``trainer``, and the
    sync strategy is one of ``trainer.callbacks``. What this package exports needs no more than its name as
    ``class_path``::

        trainer:
          callbacks:
            - class_path: Synchronous
              init_args: {sync_interval: 2}

    Its defaults differ from Lightning's: runs are seeded with 0, the config that is saved beside the logs
    may replace that of an earlier run, and the module makes its own optimizer (``model.optimizer``).

    Args:
        model_class: A subclass of :class:`RFTModule`, for settings of your own.
        datamodule_class: A subclass of :class:`RFTDataModule`.
        args: What to parse in place of the command line.
        run: Whether to run the subcommand; if not, there are no subcommands and objects are only made.
        kwargs: Anything else that ``LightningCLI`` takes; wins over what is set here. A function as ``trainer_class``
            has to make an :class:`ExploringTrainer`; a class of yours is made one.

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
        usage = {name: {"usage": _USAGE} for name in self.subcommands()} if run else {"usage": _USAGE}
        defaults: dict[str, Any] = {
            "save_config_kwargs": {"overwrite": True},
            "seed_everything_default": 0,
            "auto_configure_optimizers": False,
            "parser_class": _Parser,
        }
        trainer_class = kwargs.pop("trainer_class", ExploringTrainer)
        if isinstance(trainer_class, type) and not issubclass(trainer_class, ExploringTrainer):
            trainer_class = type(trainer_class.__name__, (ExploringTrainer, trainer_class), {})
        defaults["trainer_class"] = trainer_class
        defaults["parser_kwargs"] = usage | kwargs.pop("parser_kwargs", {})
        # jsonargparse finds a class by its short name only once it is imported
        for name in lightning_rft.__all__:
            getattr(lightning_rft, name)
        super().__init__(model_class, datamodule_class, args=args, run=run, **defaults | kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """What can be run: a test is a validation here, and a prediction is what explorers sample."""
        lightnings = LightningCLI.subcommands()
        return {
            "fit": lightnings["fit"],
            "validate": lightnings["validate"],
            "explore": {"model", "datamodule"},
        }

    def instantiate_classes(self) -> None:
        """Makes the objects; a setting that one of them refuses ends the program as a parser's error does."""
        try:
            super().instantiate_classes()
        except Exception as error:
            refusal = _refusal(error)
            if refusal is None:
                raise
            self._parser(self.subcommand).error(str(refusal), error)


def main(args: ArgsType = None) -> None:
    """Runs the command line.

    Args:
        args: What to parse in place of the command line.

    Raises:
        SystemExit: With status 2, after a message, if the config cannot be used.
    """
    about = {"prog": "lightning-rft", "description": "Reinforcement fine-tuning of language models."}
    RFTCLI(args=args, parser_kwargs=about)


def _refusal(error: BaseException | None) -> BaseException | None:
    """What a setting was refused with; jsonargparse wraps an error in its own where an argument has a union type."""
    while error is not None and not isinstance(error, (ConfigurationError, MisconfigurationException)):
        error = error.__cause__
    return error
