"""Reinforcement fine-tuning of language models with PyTorch Lightning and vLLM.

::

    Tasks ──► Explorers ──► Buffer ──► Trainer
                 ▲                        │
                 └──── weights (sync) ────┘

Explorers sample answers to tasks and score them, the buffer holds the scored experience, the trainer turns it into
gradient steps, and a sync strategy, a Lightning callback, decides when explorers explore and when they get new weights.

    import lightning as L
    import lightning_rft as rft

    module = rft.RFTModule(model="path-or-hub-name")
    data = rft.RFTDataModule(tasks=tasks, reward=reward)
    L.Trainer(max_steps=100, callbacks=[rft.Synchronous()]).fit(module, data)

Names are imported when they are first used, so that ``import lightning_rft`` is quick and needs neither vLLM nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rft.buffer.reader import read_buffer as read_buffer
    from lightning_rft.buffer.selection import Priority as Priority
    from lightning_rft.buffer.selection import Replay as Replay
    from lightning_rft.buffer.selection import has_signal as has_signal
    from lightning_rft.buffer.selection import recency as recency
    from lightning_rft.buffer.selection import reward_variance as reward_variance
    from lightning_rft.cli import RFTCLI as RFTCLI
    from lightning_rft.datamodule import RFTDataModule as RFTDataModule
    from lightning_rft.errors import AgreementError as AgreementError
    from lightning_rft.errors import ConfigurationError as ConfigurationError
    from lightning_rft.errors import ContextFull as ContextFull
    from lightning_rft.errors import DeadlineError as DeadlineError
    from lightning_rft.errors import ExplorerError as ExplorerError
    from lightning_rft.errors import NonFiniteError as NonFiniteError
    from lightning_rft.errors import RFTError as RFTError
    from lightning_rft.errors import ScheduleError as ScheduleError
    from lightning_rft.errors import StorageError as StorageError
    from lightning_rft.errors import TransportError as TransportError
    from lightning_rft.experience import Experience as Experience
    from lightning_rft.experience import Group as Group
    from lightning_rft.experience import Task as Task
    from lightning_rft.experience import Turn as Turn
    from lightning_rft.explorer.dial_in import DialIn as DialIn
    from lightning_rft.explorer.engines.engine import Engine as Engine
    from lightning_rft.explorer.engines.fake import FakeEngine as FakeEngine
    from lightning_rft.explorer.engines.transformers import TransformersEngine as TransformersEngine
    from lightning_rft.explorer.engines.vllm import VLLMEngine as VLLMEngine
    from lightning_rft.explorer.launcher import Launcher as Launcher
    from lightning_rft.explorer.on_ray.launcher import RayLauncher as RayLauncher
    from lightning_rft.explorer.pool import ExplorerPool as ExplorerPool
    from lightning_rft.explorer.workflows.endpoint import Endpoint as Endpoint
    from lightning_rft.explorer.workflows.environments import Environment as Environment
    from lightning_rft.explorer.workflows.policy import Policy as Policy
    from lightning_rft.explorer.workflows.reply import Reply as Reply
    from lightning_rft.explorer.workflows.single_turn import SingleTurn as SingleTurn
    from lightning_rft.explorer.workflows.tools import Tools as Tools
    from lightning_rft.monitor.samples import SamplesCallback as SamplesCallback
    from lightning_rft.monitor.timeline import TimelineCallback as TimelineCallback
    from lightning_rft.report.page import write_report as write_report
    from lightning_rft.reward_calls import RewardSum as RewardSum
    from lightning_rft.scores import Answer as Answer
    from lightning_rft.scores import Sample as Sample
    from lightning_rft.scores import Score as Score
    from lightning_rft.settings import Buffer as Buffer
    from lightning_rft.settings import Sampling as Sampling
    from lightning_rft.settings import Timeouts as Timeouts
    from lightning_rft.settings import Tolerance as Tolerance
    from lightning_rft.sync.fully_asynchronous import FullyAsynchronous as FullyAsynchronous
    from lightning_rft.sync.multi_explorer import MultiExplorerAsynchronous as MultiExplorerAsynchronous
    from lightning_rft.sync.one_step_off_policy import OneStepOffPolicy as OneStepOffPolicy
    from lightning_rft.sync.strategy import SyncStrategy as SyncStrategy
    from lightning_rft.sync.synchronous import Synchronous as Synchronous
    from lightning_rft.sync.transports.checkpoint import CheckpointTransport as CheckpointTransport
    from lightning_rft.sync.transports.collective import CollectiveTransport as CollectiveTransport
    from lightning_rft.tasks.curriculum import ByDifficulty as ByDifficulty
    from lightning_rft.tasks.curriculum import ByPassRate as ByPassRate
    from lightning_rft.tasks.mixture import Mixture as Mixture
    from lightning_rft.tasks.task_set import TaskSet as TaskSet
    from lightning_rft.trainer.module import RFTModule as RFTModule
    from lightning_rft.trainer.objectives.advantages import Advantage as Advantage
    from lightning_rft.trainer.objectives.advantages import BatchRelative as BatchRelative
    from lightning_rft.trainer.objectives.advantages import GroupRelative as GroupRelative
    from lightning_rft.trainer.objectives.advantages import LeaveOneOut as LeaveOneOut
    from lightning_rft.trainer.objectives.advantages import Raw as Raw
    from lightning_rft.trainer.objectives.corrections import Correction as Correction
    from lightning_rft.trainer.objectives.corrections import Masked as Masked
    from lightning_rft.trainer.objectives.corrections import Truncated as Truncated
    from lightning_rft.trainer.objectives.grpo import CISPO as CISPO
    from lightning_rft.trainer.objectives.grpo import DAPO as DAPO
    from lightning_rft.trainer.objectives.grpo import GRPO as GRPO
    from lightning_rft.trainer.objectives.grpo import GSPO as GSPO
    from lightning_rft.trainer.objectives.grpo import SAPO as SAPO
    from lightning_rft.trainer.objectives.grpo import VESPO as VESPO
    from lightning_rft.trainer.objectives.grpo import DrGRPO as DrGRPO
    from lightning_rft.trainer.objectives.objective import Objective as Objective
    from lightning_rft.trainer.objectives.penalties import KL as KL
    from lightning_rft.trainer.objectives.reinforce import OPMD as OPMD
    from lightning_rft.trainer.objectives.reinforce import REINFORCE as REINFORCE
    from lightning_rft.trainer.objectives.reinforce import RLOO as RLOO
    from lightning_rft.trainer.objectives.reinforce import TOPR as TOPR
    from lightning_rft.trainer.objectives.reinforce import AsymRE as AsymRE
    from lightning_rft.trainer.objectives.reinforce import REINFORCEPlusPlus as REINFORCEPlusPlus
    from lightning_rft.trainer.objectives.surrogates import Clip as Clip
    from lightning_rft.trainer.objectives.surrogates import Gamma as Gamma
    from lightning_rft.trainer.objectives.surrogates import Likelihood as Likelihood
    from lightning_rft.trainer.objectives.surrogates import Plain as Plain
    from lightning_rft.trainer.objectives.surrogates import SoftGate as SoftGate
    from lightning_rft.trainer.objectives.surrogates import Squared as Squared
    from lightning_rft.trainer.objectives.surrogates import StopGradient as StopGradient
    from lightning_rft.trainer.objectives.surrogates import Surrogate as Surrogate
    from lightning_rft.trainer.objectives.tokens import TokenBatch as TokenBatch

_MODULES = {
    "lightning_rft.buffer.selection": ["Priority", "Replay", "has_signal", "recency", "reward_variance"],
    "lightning_rft.buffer.reader": ["read_buffer"],
    "lightning_rft.cli": ["RFTCLI"],
    "lightning_rft.datamodule": ["RFTDataModule"],
    "lightning_rft.errors": [
        "AgreementError",
        "ConfigurationError",
        "ContextFull",
        "DeadlineError",
        "ExplorerError",
        "NonFiniteError",
        "RFTError",
        "ScheduleError",
        "StorageError",
        "TransportError",
    ],
    "lightning_rft.experience": ["Experience", "Group", "Task", "Turn"],
    "lightning_rft.explorer.dial_in": ["DialIn"],
    "lightning_rft.explorer.engines.engine": ["Engine"],
    "lightning_rft.explorer.engines.fake": ["FakeEngine"],
    "lightning_rft.explorer.launcher": ["Launcher"],
    "lightning_rft.explorer.on_ray.launcher": ["RayLauncher"],
    "lightning_rft.explorer.pool": ["ExplorerPool"],
    "lightning_rft.explorer.engines.transformers": ["TransformersEngine"],
    "lightning_rft.explorer.engines.vllm": ["VLLMEngine"],
    "lightning_rft.explorer.workflows.endpoint": ["Endpoint"],
    "lightning_rft.explorer.workflows.environments": ["Environment"],
    "lightning_rft.explorer.workflows.policy": ["Policy"],
    "lightning_rft.explorer.workflows.reply": ["Reply"],
    "lightning_rft.explorer.workflows.single_turn": ["SingleTurn"],
    "lightning_rft.explorer.workflows.tools": ["Tools"],
    "lightning_rft.monitor.samples": ["SamplesCallback"],
    "lightning_rft.monitor.timeline": ["TimelineCallback"],
    "lightning_rft.report.page": ["write_report"],
    "lightning_rft.reward_calls": ["RewardSum"],
    "lightning_rft.scores": ["Answer", "Sample", "Score"],
    "lightning_rft.settings": ["Buffer", "Sampling", "Timeouts", "Tolerance"],
    "lightning_rft.sync.transports.checkpoint": ["CheckpointTransport"],
    "lightning_rft.sync.transports.collective": ["CollectiveTransport"],
    "lightning_rft.sync.fully_asynchronous": ["FullyAsynchronous"],
    "lightning_rft.sync.multi_explorer": ["MultiExplorerAsynchronous"],
    "lightning_rft.sync.one_step_off_policy": ["OneStepOffPolicy"],
    "lightning_rft.sync.strategy": ["SyncStrategy"],
    "lightning_rft.sync.synchronous": ["Synchronous"],
    "lightning_rft.tasks.curriculum": ["ByDifficulty", "ByPassRate"],
    "lightning_rft.tasks.mixture": ["Mixture"],
    "lightning_rft.tasks.task_set": ["TaskSet"],
    "lightning_rft.trainer.module": ["RFTModule"],
    "lightning_rft.trainer.objectives.advantages": [
        "Advantage",
        "BatchRelative",
        "GroupRelative",
        "LeaveOneOut",
        "Raw",
    ],
    "lightning_rft.trainer.objectives.corrections": ["Correction", "Masked", "Truncated"],
    "lightning_rft.trainer.objectives.grpo": ["CISPO", "DAPO", "GRPO", "GSPO", "SAPO", "VESPO", "DrGRPO"],
    "lightning_rft.trainer.objectives.objective": ["Objective"],
    "lightning_rft.trainer.objectives.penalties": ["KL"],
    "lightning_rft.trainer.objectives.reinforce": ["OPMD", "REINFORCE", "RLOO", "TOPR", "AsymRE", "REINFORCEPlusPlus"],
    "lightning_rft.trainer.objectives.surrogates": [
        "Clip",
        "Gamma",
        "Likelihood",
        "Plain",
        "SoftGate",
        "Squared",
        "StopGradient",
        "Surrogate",
    ],
    "lightning_rft.trainer.objectives.tokens": ["TokenBatch"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
