"""The LightningModule that turns experience into gradient steps on a policy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Group, Turn
from lightning_rft.model_folder import check_model
from lightning_rft.monitor.metrics import BatchMetrics
from lightning_rft.monitor.status import StatusLine
from lightning_rft.sync.transports.transport import under_all_names
from lightning_rft.trainer.gathering import Gathering
from lightning_rft.trainer.loader import MicroBatch
from lightning_rft.trainer.loading import load_policy, load_sharded
from lightning_rft.trainer.logprobs import token_logprobs
from lightning_rft.trainer.objectives.grpo import GRPO
from lightning_rft.trainer.objectives.objective import Objective
from lightning_rft.trainer.precision import MasterWeights, grad_norm, leave_unscaling_to_the_plugin
from lightning_rft.trainer.saving import write_model
from lightning_rft.trainer.scoring import Announcement, encoded_text, score
from lightning_rft.trainer.shortcuts import FastPath, probe
from lightning_rft.trainer.step_guard import StepGuard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RFTModule"]

_TOKEN = Turn((0,), (0,), (0.0,), (0,), "length")


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=True)


class RFTModule(L.LightningModule):
    """Trains a causal language model on experience.

    It is an ordinary LightningModule with automatic optimization: clipping, precision plugins, schedulers, loggers and
    ``accumulate_grad_batches`` work as anywhere. The loss is normalised over the whole batch, so neither it nor its
    gradient depends on the accumulation. A step whose loss or gradient is not finite is skipped; five in a row are a
    :class:`NonFiniteError`. ``load_from_checkpoint(path)`` restores all but objective, optimizer and scheduler.

    Args:
        model: Path of a folder, or hub name, of a causal language model of transformers.
        objective: What is optimised.
        optimizer: Makes the optimizer from the parameters. Left out: AdamW, learning rate 1e-6, no weight decay.
        lr_scheduler: Makes a scheduler from the optimizer; it steps once per batch. Left out: none.
        attn_implementation: Attention of transformers; left out, transformers' own choice where that is right for the
            model. ``"sdpa"`` and ``"eager"`` let the samples of a group share their prompt's computation.
        pass_threshold: Reward from which a validation sample counts as passed.
        gradient_checkpointing: Whether the activations within a layer are computed again in the backward pass instead
            of being kept: less memory, for about a third more time.

    Raises:
        ConfigurationError: The model folder is missing or has no tokenizer.

    Example::

        module = RFTModule("HuggingFaceTB/SmolLM2-135M-Instruct", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5))
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        objective: Objective | None = None,
        optimizer: OptimizerCallable = _adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        attn_implementation: str | None = None,
        pass_threshold: float = 1.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model = os.fspath(model)
        check_model(self.model)
        self.objective = objective or GRPO()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.attn_implementation = attn_implementation
        self.pass_threshold = pass_threshold
        self.gradient_checkpointing = gradient_checkpointing
        # plain values only, which torch.load reads without running code
        kept = ("model", "attn_implementation", "pass_threshold", "gradient_checkpointing")
        self.save_hyperparameters({name: getattr(self, name) for name in kept})
        self.metrics = BatchMetrics()
        self.policy: PreTrainedModel | None = None
        #: Mean difference, in nats, between the log-probs that the last batch's tokens were sampled and trained with,
        #: where both are of the same weights; ``None`` if no weights were pushed, or there was no such token.
        self.sampling_gap: float | None = None
        self._text_ids: tuple[int, ...] | None = None
        self._fast_path: FastPath | None = None
        self._gathers: Gathering | None = None
        self._guard = StepGuard()
        self._batch = 0
        self._batch_loss = 0.0

    @override
    def configure_model(self) -> None:
        if self.policy is not None:
            return
        with StatusLine(self._trainer) as status:
            status.say("loading the model")
            self.policy = self._load()

    def _load(self) -> PreTrainedModel:
        if self.device_mesh is None:
            policy = load_policy(self.model, self.attn_implementation)
        else:
            device = self.trainer.strategy.root_device
            half = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
            policy = load_sharded(self.model, self.attn_implementation, self.device_mesh, device, half)
        policy.train()
        if self.gradient_checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        return policy

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self.configure_model()  # no trainer has: in load_from_checkpoint, and after ddp_notebook
        return super().load_state_dict(state_dict, strict, assign)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["objective"] = repr(self.objective)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("objective", repr(self.objective))
        if self._trainer is None and saved != repr(self.objective):
            rank_zero_warn(f"the checkpoint was trained with {saved}: set objective=... to train on with that")

    @override
    def configure_optimizers(self) -> Any:
        half = any(parameter.dtype != torch.float32 for parameter in self.parameters())
        if half and self.device_mesh is not None:
            raise ConfigurationError(
                "ModelParallelStrategy with weights in half precision would lose small updates: set "
                "Trainer(precision='bf16-mixed') in place of 'bf16-true'"
            )
        optimizer = MasterWeights(self.parameters(), self.optimizer) if half else self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight as a checkpoint names it, aliases of tied weights included; all ranks must iterate together."""
        tensors = self._gathering.tensors(None)
        yield from under_all_names(self._gathering.manifest(), (tensor for _, tensor in tensors))

    def pushed(self, dtype: str) -> Iterator[Any]:
        """What to push, step by step: an ``Announcement``, and each weight but aliases; all ranks together.

        Sharded weights are cast to ``dtype`` before they are gathered.
        """
        if self._text_ids is None:
            self._text_ids = encoded_text(self.model)
        with self.trainer.precision_plugin.forward_context():
            scores = score(self._policy, self._text_ids, self.device)
        yield Announcement(self._gathering.manifest(dtype), self.device, scores)
        yield from self._gathering.tensors(dtype)

    @property
    def _gathering(self) -> Gathering:
        if self._gathers is None or self._gathers.policy is not self._policy:
            self._gathers = Gathering(self._policy)
        return self._gathers

    def save_pretrained(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Writes policy and tokenizer as a folder that transformers and vLLM load; to be called on every rank.

        Args:
            path: The folder.
            dtype: Dtype of the weights. Left out, the one that the model's config names.
        """
        write_model(self._policy, self.model, path, dtype, writes=self.global_rank == 0)

    @override
    def on_train_start(self) -> None:
        self.metrics.restart()
        self._guard = StepGuard()
        for optimizer in self.trainer.optimizers:
            leave_unscaling_to_the_plugin(optimizer)

    @override
    def on_train_epoch_start(self) -> None:
        self.metrics.clear()  # a batch that on_train_batch_start cut in two begins anew

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norm = float(grad_norm(self.parameters()))
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if self._guard.refuses(self._batch, self._batch_loss, norm, scaler):
            for parameter in self.parameters():
                parameter.grad = None  # which every optimizer passes over, its state included
        self.log_dict({"rft/grad_norm": norm, "rft/skipped_steps": float(self._guard.skipped)}, batch_size=1)

    @override
    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        self.metrics.update_groups(batch.groups, batch.batch)
        loss = self._loss(batch.groups, batch.batch) / max(1, batch.batch_tokens)
        self.metrics.update_loss(loss)
        if batch.last:
            values = self.metrics.collect()
            self._batch, self._batch_loss = batch.batch, values["rft/loss"]
            self.sampling_gap = values.get("rft/sampling_gap")
            self.log("rft/reward", values.pop("rft/reward"), prog_bar=True, batch_size=1)
            self.log_dict(values | {"rft/wait_experience_s": batch.wait_seconds}, batch_size=1)
        # Lightning divides by both
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    @override
    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        self._log_answers(batch, "val")

    @override
    def test_step(self, batch: MicroBatch, batch_idx: int) -> None:
        self._log_answers(batch, "test")

    def _log_answers(self, batch: MicroBatch, stage: str) -> None:
        experiences = [experience for group in batch.groups for experience in group.experiences]
        if not experiences:  # all of these failed after every retry, which is counted and bounded elsewhere
            return
        rewards = _float32(experience.reward for experience in experiences)
        passed = (rewards >= self.pass_threshold).float()
        version = float(max(experience.oldest_version for experience in experiences))
        size = len(experiences)
        self.log(f"{stage}/reward", rewards.mean(), batch_size=size, prog_bar=True, sync_dist=True)
        self.log(f"{stage}/pass@1", passed.mean(), batch_size=size, sync_dist=True)
        self.log(f"{stage}/version", version, batch_size=size, sync_dist=True)

    @override
    def predict_step(self, batch: MicroBatch, batch_idx: int) -> list[dict[str, Any]]:
        # named as in read_buffer, which has the tokens too
        return [
            {"task_id": group.task_id, "sample": sample.sample, "reward": sample.reward, "text": sample.text}
            for group in batch.groups
            for sample in group.experiences
        ]

    def _loss(self, groups: Sequence[Group], version: int) -> Tensor:
        """Loss summed over the sampled tokens of some groups, trained as a version."""
        if self._fast_path is None:  # also where this share has no work: the other ranks' may have
            turns = [[turn for experience in group.experiences for turn in experience.turns] for group in groups]
            self._fast_path = probe(self._policy, turns, attn_implementation=self._policy.config._attn_implementation)
        chosen, weight = self._with_advantages(groups), 1.0
        if not chosen:
            if self.trainer.world_size == 1:
                return self._zero()
            # what the other ranks do are collectives, in which this one takes part with a token that does not count
            chosen, weight = [[(_TOKEN, 0.0)]], 0.0
        turns = [[turn for turn, _ in group] for group in chosen]
        packed = self._fast_path.pack(turns).to(self.device)
        flat: list[tuple[Turn, float]] = [pair for group in chosen for pair in group]
        sampling = torch.from_numpy(np.concatenate([turn.logprobs for turn, _ in flat])).to(self.device)
        lengths = torch.tensor([turn.num_tokens for turn, _ in flat])
        advantages = _float32(advantage for _, advantage in flat).repeat_interleave(lengths).to(self.device)
        logprobs, entropy = token_logprobs(self._policy, packed, chunked_head=self._fast_path.chunked_head)
        losses, statistics = self.objective.token_loss(logprobs, sampling, advantages)
        self.metrics.update_tokens(entropy, statistics, weight)
        if self._text_ids is not None and weight:  # else the tokens are of another run, or do not count
            versions = torch.from_numpy(np.concatenate([turn.versions for turn, _ in flat])).to(self.device)
            scale = 1.0 if packed.temperature is None else packed.temperature  # as at temperature 1
            self.metrics.update_gap((logprobs.detach() - sampling).abs() * scale, versions == version)
        return losses.sum() * weight

    def _with_advantages(self, groups: Sequence[Group]) -> list[list[tuple[Turn, float]]]:
        """Each group's turns with their sample's advantage, without those that cannot contribute to the gradient."""
        rewards = [experience.reward for group in groups for experience in group.experiences]
        index = [i for i, group in enumerate(groups) for _ in group.experiences]
        scores = torch.tensor(rewards, dtype=torch.float64)
        advantages = iter(self.objective.advantages(scores, torch.tensor(index)).tolist())
        paired = [
            [
                (turn, advantage)
                for experience in group.experiences
                for advantage in [next(advantages)]
                for turn in experience.turns
                if turn.num_tokens and not (self.objective.skips_zero_advantage and advantage == 0.0)
            ]
            for group in groups
        ]
        return [group for group in paired if group]

    def _zero(self) -> Tensor:
        """A zero that touches every parameter, so that the optimizer counts this step, too."""
        return torch.stack([p.reshape(-1)[0] for p in self.parameters() if p.requires_grad]).sum() * 0.0

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RFTModule:
        # The policy's buffers are moved and not cast: they are rotary frequencies, and in bfloat16 they would turn the
        # tokens of a long text to other angles than the explorers do.
        buffers = [] if self.policy is None else list(self.policy.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in buffers:
            owner, _, own = name.rpartition(".")
            module = self._policy.get_submodule(owner)
            now = module.get_buffer(own)
            if now.dtype != buffer.dtype:
                module._buffers[own] = buffer.to(now.device)
        return self

    @property
    def _policy(self) -> PreTrainedModel:
        self.check_policy()
        assert self.policy is not None, "configure_model has not run"
        return self.policy

    def check_policy(self) -> None:
        """Raises :class:`ConfigurationError` if there is a policy whose weights have other names than its folder's."""
        from transformers import PreTrainedModel

        if self.policy is not None and not isinstance(self.policy, PreTrainedModel):
            raise ConfigurationError(
                f"policy is a {type(self.policy).__name__}, whose weights have other names than the model's: leave the "
                "model of transformers as it is, without a wrapper"
            )


def _float32(values: Iterable[float]) -> Tensor:
    # precision="bf16-true" has made another dtype the default
    return torch.tensor(list(values), dtype=torch.float32)
