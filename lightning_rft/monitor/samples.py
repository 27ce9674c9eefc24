"""A callback that shows what the policy answers, as a table in every logger."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Experience, Group
from lightning_rft.monitor.texts import harmless, markdown, plain, shortened

__all__ = ["SamplesCallback"]

_KEY = "rft/samples"
_MOST_CHARACTERS = 4000  # of a prompt or completion
_WIDTH = 100  # maximum columns in a terminal

_Row = dict[str, Any]


class SamplesCallback(Callback):
    """Logs a table of samples every few steps: what the policy was asked and answered, and what that earned.

    Its columns are ``step``, ``task_id``, ``prompt`` (as the policy read it, special tokens included), ``completion``,
    ``reward``, a ``reward_<name>`` for each of its parts, ``version`` (of the oldest token), ``staleness`` (in
    batches), ``finish_reason`` and ``tokens``. Of a sample with several turns, prompt and completion are the last
    turn's. Of a text of more than 4,000 characters the middle is left out.

    Every logger of the trainer gets the table in its own way: Weights & Biases and MLflow as a table, TensorBoard as
    text, all of them under ``rft/samples``; for any other, or none, ``samples.jsonl`` is written beside its files,
    with a line per sample.

    Args:
        every_n_steps: Batches between two tables; the first batch has one.
        samples: Samples in a table, of as many tasks as possible.
        terminal: Whether to print them too.

    Raises:
        ConfigurationError: A number is below 1, or there is no ``RFTDataModule``.

    Example::

        trainer = L.Trainer(max_steps=100, callbacks=[Synchronous(), SamplesCallback(every_n_steps=20)])
    """

    def __init__(self, every_n_steps: int = 10, samples: int = 4, terminal: bool = False) -> None:
        for setting, value in {"every_n_steps": every_n_steps, "samples": samples}.items():
            if value < 1:
                raise ConfigurationError(f"{setting}={value} must be at least 1")
        self.every_n_steps = every_n_steps
        self.samples = samples
        self.terminal = terminal
        self._folder = Path()
        self._tokenizer: Any = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not hasattr(trainer.datamodule, "observers"):  # type: ignore[attr-defined]
            raise ConfigurationError(
                "SamplesCallback needs an RFTDataModule: call trainer.fit(module, datamodule=RFTDataModule(...))"
            )
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: every rank asks

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not (batch.last and batch.batch % self.every_n_steps == 0 and trainer.is_global_zero):
            return
        if self._tokenizer is None:
            model: Any = pl_module.pretrained
            self._tokenizer = model.tokenizer()
        rows = [self._row(experience, batch.batch) for experience in _chosen(batch.groups, self.samples)]
        columns = list(dict.fromkeys(chain.from_iterable(rows)))
        files = set() if trainer.loggers else {self._folder}
        for logger in trainer.loggers:
            if not _log(logger, columns, rows, batch.batch):
                files.add(Path(logger.log_dir or self._folder))
        for folder in files:
            _append(folder / "samples.jsonl", rows)
        if self.terminal:
            pl_module.print(_printed(rows))

    def _row(self, experience: Experience, batch: int) -> _Row:
        turn = experience.turns[-1]
        prompt = self._tokenizer.decode(turn.prompt_ids.tolist(), skip_special_tokens=False)
        return {
            "step": batch,
            "task_id": harmless(experience.task_id),
            "prompt": _shown(prompt),
            "completion": _shown(experience.text),
            "reward": experience.reward,
            **{f"reward_{name}": part for name, part in experience.rewards.items()},
            "version": experience.oldest_version,
            "staleness": batch - experience.oldest_version,
            "finish_reason": turn.finish_reason,
            "tokens": experience.num_tokens,
        }


def _chosen(groups: Sequence[Group], count: int) -> list[Experience]:
    """The first sample of each group, then the second of each, and so on."""
    in_turn = chain.from_iterable(zip_longest(*(group.experiences for group in groups)))
    return list(islice((experience for experience in in_turn if experience is not None), count))


def _shown(text: str) -> str:
    return harmless(shortened(text, _MOST_CHARACTERS))


def _log(logger: Any, columns: Sequence[str], rows: Sequence[Mapping[str, Any]], step: int) -> bool:
    """Gives a logger the table in the way it has for tables; False if it has none."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_table"):  # Weights & Biases
        logger.log_table(_KEY, columns=columns, data=[[row.get(name) for name in columns] for row in rows], step=step)
    elif hasattr(experiment, "log_table") and hasattr(logger, "run_id"):  # MLflow, which appends
        data = {name: [row.get(name) for row in rows] for name in columns}
        experiment.log_table(logger.run_id, data=data, artifact_file=f"{_KEY}.json")
    elif hasattr(experiment, "add_text"):  # TensorBoard
        experiment.add_text(_KEY, markdown(columns, rows), step)
    else:
        return False
    return True


def _append(path: Path, rows: Sequence[_Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _printed(rows: Sequence[_Row]) -> str:
    width = min(_WIDTH, shutil.get_terminal_size().columns - 1)
    blocks = []
    for row in rows:
        parts = [f"{name.removeprefix('reward_')} {row[name]:g}" for name in row if name.startswith("reward_")]
        reward = f"reward {row['reward']:g}" + (f" ({', '.join(parts)})" if parts else "")
        about = [f"step {row['step']}", f"task {row['task_id']}", reward, f"version {row['version']}"]
        tokens = f"{row['tokens']} token{'s' * (row['tokens'] != 1)}"
        about += [f"staleness {row['staleness']}", f"{tokens}, {row['finish_reason']}"]
        texts = {"  prompt": row["prompt"], "  completion": row["completion"]}
        blocks.append(plain(" · ".join(about), texts, width))
    return "\n".join(blocks)
