"""The command ``lightning-rft plan``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
from jsonargparse import ArgumentParser
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_rft.errors import ConfigurationError, RFTError
from lightning_rft.plan.advice import recommendation, recommended
from lightning_rft.plan.figures import Figures, cases
from lightning_rft.plan.measure import at_once, measure, sample_seconds
from lightning_rft.plan.planner import Row, plan
from lightning_rft.plan.printing import draw_plan, table
from lightning_rft.plan.settings import PlanSettings
from lightning_rft.trainer.module import RFTModule

if TYPE_CHECKING:
    from lightning_rft.datamodule import RFTDataModule

__all__ = ["main", "needs_config", "plan_run", "shown"]


def needs_config(options: Sequence[str]) -> bool:
    """Whether options of ``plan`` are about more than the plan itself."""
    names = [option for option in options if option.startswith("-") and not option[1:2].isdigit()]
    return any(not name.startswith("--plan") and name not in ("-h", "--help") for name in names)


def main(args: Sequence[str]) -> None:
    """Plans with the seconds that the options give, without trainer or engine."""
    parser = ArgumentParser(
        "lightning-rft plan",
        description="Say what each sync strategy would gain. With --config FILE, seconds left out are measured.",
    )
    parser.add_argument("--plan", type=PlanSettings, default=PlanSettings())
    given = parser.parse_args(list(args))
    try:
        settings = PlanSettings(**given.plan.as_dict())
        if settings.missing:
            options = ", ".join(f"--plan.{name}" for name in settings.missing)
            raise ConfigurationError(f"give {options}, or a --config to measure with")
        print(shown(_given(settings), settings))  # noqa: T201
    except RFTError as error:
        parser.error(str(error), error)


def plan_run(trainer: L.Trainer, module: RFTModule, data: RFTDataModule, settings: PlanSettings) -> None:
    """Measures what is not given, and prints the plan."""
    settings = replace(
        settings,
        tasks_per_step=data.tasks_per_step,
        samples_per_task=data.samples_per_task,
        explorers=settings.explorers or [data.explorers],
    )
    figures = _measured(trainer, module, data, settings) if settings.missing else _given(settings)
    if figures is not None:
        trainer.print(shown(figures, settings))


def shown(figures: Figures, settings: PlanSettings) -> str:
    """The plan as text; it is drawn as well if settings say where."""
    counts = settings.explorers or [1]
    lines: list[str] = []
    rows: list[Row] = []
    best: list[Row] = []
    for count in counts:
        of_count = plan(figures, cases([count], settings.intervals, settings.bounds))
        rows += of_count
        best.append(recommended(of_count, settings.threshold))
        several = f"With {count} explorer{'s' if count > 1 else ''}: " if len(counts) > 1 else ""
        lines.append(several + recommendation(figures, of_count, settings.threshold))
    if max(counts) == 1:
        lines.append("MultiExplorerAsynchronous takes two explorers or more: --plan.explorers '[1, 2]' compares.")
    if settings.picture is not None:
        _draw(rows, best, Path(settings.picture))
    return "\n".join([table(rows), "", *lines])


def _draw(rows: Sequence[Row], best: Sequence[Row], path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        rank_zero_warn(f"matplotlib is not installed, so there is no {path}: pip install 'lightning-rft[timeline]'")
    else:
        draw_plan(rows, best, path)


def _given(settings: PlanSettings) -> Figures:
    """The figures that settings give."""
    train_s, explore_s, push_s = settings.train_s, settings.explore_s, settings.push_s
    assert train_s is not None and explore_s is not None and push_s is not None
    groups, samples = settings.tasks_per_step or 8, settings.samples_per_task or 8
    return Figures(
        train_s=train_s,
        push_s=push_s,
        load_s=push_s if settings.load_s is None else settings.load_s,
        sample_s=[[explore_s] * samples],
        tasks_per_step=groups,
        at_once=settings.at_once or at_once(groups, samples, (settings.explorers or [1])[0]),
    )


def _measured(trainer: L.Trainer, module: RFTModule, data: RFTDataModule, settings: PlanSettings) -> Figures | None:
    """Those, and what is measured where they have none; on rank 0 alone."""
    found = measure(trainer, module, data, settings.seconds)
    if found is None:
        return None
    trainer.print(
        f"Measured: {found.explore_s:.2f} s to explore a batch, {found.train_s:.2f} s for the rest of a step, "
        f"{found.push_s:.2f} s for a push.\n"
    )
    groups, explorers = data.tasks_per_step, data.explorers
    ran = at_once(groups, data.samples_per_task, explorers, data.engine.max_num_seqs)
    explore_s = found.explore_s if settings.explore_s is None else settings.explore_s
    return Figures(
        train_s=found.train_s if settings.train_s is None else settings.train_s,
        push_s=found.push_s if settings.push_s is None else settings.push_s,
        load_s=found.load_s if settings.load_s is None else settings.load_s,
        sample_s=sample_seconds(found.tokens, explore_s, tasks_per_step=groups, explorers=explorers, at_once=ran),
        tasks_per_step=groups,
        at_once=settings.at_once or ran,
    )
