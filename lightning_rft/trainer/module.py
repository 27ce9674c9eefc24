"""The LightningModule that turns experience into gradient steps on a policy."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from typing_extensions import override

from lightning_rft.errors import ConfigurationError
from lightning_rft.experience import Turn
from lightning_rft.model_folder import Pretrained, check_policy
from lightning_rft.monitor.metrics import BatchMetrics
from lightning_rft.monitor.status import StatusLine
from lightning_rft.rewards import last_number_or_text
from lightning_rft.sync.transports.transport import under_all_names
from lightning_rft.trainer.buffers import uncast_buffers
from lightning_rft.trainer.checkpoints import check_settings, hyperparameters, note_settings
from lightning_rft.trainer.default_optimizer import adamw
from lightning_rft.trainer.evaluation import Evaluation
from lightning_rft.trainer.gathering import Gathering
from lightning_rft.trainer.loader import BatchPart
from lightning_rft.trainer.loading import load_policy
from lightning_rft.trainer.logprobs import token_logprobs
from lightning_rft.trainer.lora import Base, adapter_settings, save_adapter_alone
from lightning_rft.trainer.micro_batches import Cut, by_group
from lightning_rft.trainer.objectives.grpo import GRPO
from lightning_rft.trainer.objectives.objective import Objective
from lightning_rft.trainer.plan import planned
from lightning_rft.trainer.precision import grad_norm, leave_unscaling_to_the_plugin, optimizer_for, zero_gradient
from lightning_rft.trainer.saving import write_policy
from lightning_rft.trainer.scoring import Announcement, ProofText, Scores
from lightning_rft.trainer.shortcuts import FastPath, settled
from lightning_rft.trainer.step_guard import StepGuard
from lightning_rft.trainer.weighted import WeightedTurn, token_batch, versions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RFTModule"]

_NOTHING = WeightedTurn(Turn((0,), (0,), (0.0,), (0,), "length"), 0, 0, 1)


class RFTModule(L.LightningModule):
    """Trains a causal language model on experience.

    It is an ordinary LightningModule with automatic optimization: clipping, precision plugins, schedulers, loggers and
    ``accumulate_grad_batches`` work as anywhere. The loss is normalised over the whole batch, so neither it nor its
    gradient depends on the accumulation. A step whose loss or gradient is not finite is skipped; five in a row are a
    :class:`NonFiniteError`. ``load_from_checkpoint(path)`` restores all but ``objective``, ``final_answer``,
    ``trust_remote_code``, optimizer and scheduler.

    Args:
        model: Path of a folder, or hub name, of a causal language model of transformers.
        objective: What is optimised. Left out: :class:`GRPO`.
        optimizer: Makes the optimizer from the parameters. Left out: AdamW, learning rate 1e-6, no weight decay.
        lr_scheduler: Makes a scheduler from the optimizer; it steps once per batch. Left out: none.
        attn_implementation: Attention of transformers; left out, transformers' own choice where that is right for the
            model. ``"sdpa"`` and ``"eager"`` let the samples of a group share their prompt's computation.
        pass_threshold: Reward from which a validation sample counts as passed.
        final_answer: ``final_answer(text)``, what counts as a validation sample's answer where the majority decides
            (``val/maj_at_4``): a hashable value, equal for equal answers. Left out, the last number in the text, or the
            whole text if there is none.
        max_tokens_per_micro_batch: Maximum columns, padding included, that are computed at a time. A batch is trained
            in as many micro-batches as that takes, which changes only memory and time; a row that is longer is trained
            alone. Left out: the whole batch at a time.
        reference: Path or hub name of the model that a :class:`KL` penalty keeps the policy close to. Left out: the
            model itself, as it was.
        gradient_checkpointing: Whether the activations within a layer are computed again in the backward pass instead
            of being kept: less memory, for about a third more time.
        peft_config: A ``peft.LoraConfig``, or a dict of its settings, of an adapter that is trained in place of the
            model. Checkpoints hold it alone, explorers get it merged into the model, and the model is the reference.
        revision: Branch, tag or commit of a model on the hub, for trainer and explorers; left out, its newest. For a
            private or gated model, set ``HF_TOKEN`` in the environment.
        trust_remote_code: Whether code that comes with model or reference may run, here and in explorers.
        offload_optimizer: Whether its state lies in the CPU's memory while explorers on the trainer's GPUs explore.

    Raises:
        ConfigurationError: A model folder is missing or has no tokenizer, or has a ``revision``; there is no room for a
            token; or ``peft_config`` makes what cannot be merged.

    Example::

        module = RFTModule("HuggingFaceTB/SmolLM2-135M-Instruct", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5))
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        objective: Objective | None = None,
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        attn_implementation: str | None = None,
        max_tokens_per_micro_batch: int | None = None,
        reference: str | os.PathLike[str] | None = None,
        pass_threshold: float = 1.0,
        gradient_checkpointing: bool = False,
        final_answer: Callable[[str], Hashable] | None = None,
        peft_config: dict[str, Any] | Any | None = None,  # not a type of peft, which the parser would import
        revision: str | None = None,
        trust_remote_code: bool = False,
        offload_optimizer: bool = True,
    ) -> None:
        super().__init__()
        self.model = os.fspath(model)
        self.reference = self.model if reference is None else os.fspath(reference)
        self.revision = revision
        #: How trainer and explorers load the model.
        self.pretrained = Pretrained(self.model, revision, trust_remote_code)
        self.pretrained.check()
        self.pretrained.other(self.reference).check()
        if max_tokens_per_micro_batch is not None and max_tokens_per_micro_batch < 1:
            raise ConfigurationError(f"max_tokens_per_micro_batch={max_tokens_per_micro_batch} must be at least 1")
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.objective = objective or GRPO()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.attn_implementation = attn_implementation
        self.pass_threshold = pass_threshold
        self.gradient_checkpointing = gradient_checkpointing
        self.offload_optimizer = offload_optimizer
        self.final_answer = final_answer or last_number_or_text
        self.peft_config = None if peft_config is None else adapter_settings(peft_config)
        if self.peft_config is not None:
            save_adapter_alone(self)
        self.save_hyperparameters(hyperparameters(self))
        self.metrics = BatchMetrics()
        self.policy: PreTrainedModel | None = None
        self._references: list[PreTrainedModel | Base] = []  # one or none; a module of ours would be trained and saved
        #: Mean difference, in nats, between the log-probs that the last batch's tokens were sampled and trained with,
        #: where both are of the same weights; ``None`` if no weights were pushed, or there was no such token.
        self.sampling_gap: float | None = None
        self._text: ProofText | None = None  # once weights were pushed
        #: The shortcuts that steps take, once they were tried.
        self.fast_path: FastPath | None = None
        self._gathers: Gathering | None = None
        self._guard = StepGuard()
        self._objective = self.objective  # with the correction that goes with the strategy
        self._shares: list[Cut] = []  # this rank's, of each part of the batch that is being trained

    @override
    def configure_model(self) -> None:
        if self.policy is not None:
            return
        with StatusLine(self._trainer) as status:
            status.say("loading the model")
            self.policy = self._load(self.pretrained, self.peft_config)

    def _load(self, model: Pretrained, adapter: dict[str, Any] | None = None) -> Any:
        sharding = None if self.device_mesh is None else self.trainer
        return load_policy(model, self.attn_implementation, sharding, adapter, self.gradient_checkpointing)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self.configure_model()  # no trainer has: in load_from_checkpoint, and after ddp_notebook
        return super().load_state_dict(state_dict, strict or self.peft_config is not None, assign)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        note_settings(checkpoint, self)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_settings(checkpoint, self, resumes=self._trainer is not None)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = optimizer_for(self.parameters(), self.optimizer, sharded=self.device_mesh is not None)
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
        self._text = self._text or ProofText(self.pretrained)
        yield Announcement(self._gathering.manifest(dtype), self.device, self._text.ids, self._gathering.trained)
        yield from self._gathering.tensors(dtype)

    def scored(self, dtype: str) -> Iterator[Scores]:
        """What the policy makes of the text that explorers score after a push in ``dtype``; all ranks together."""
        assert self._text is not None, "scored before the first push"
        with self.trainer.precision_plugin.forward_context():
            scores = self._text.score(self._policy, self.device, dtype)
        yield scores

    @property
    def _gathering(self) -> Gathering:
        if self._gathers is None or self._gathers.policy is not self._policy:
            self._gathers = Gathering(self._policy)
        return self._gathers

    def save_pretrained(
        self, path: str | os.PathLike[str], dtype: torch.dtype | None = None, merged: bool = False
    ) -> None:
        """Writes policy and tokenizer as a folder that transformers and vLLM load; to be called on every rank.

        Args:
            path: The folder.
            dtype: Dtype of the weights. Left out, the one that the model's config names, or that of the adapter.
            merged: Whether a policy with an adapter is written as a whole model, not the adapter alone as peft does.
        """
        adapter = None if merged else self.peft_config
        write_policy(self._policy, self.pretrained, path, dtype, adapter, writes=self.global_rank == 0)

    @override
    def on_train_start(self) -> None:
        if self.objective.needs_reference and not self._references:
            own = self.peft_config is not None and self.reference == self.model
            other = None if own else self._load(self.pretrained.other(self.reference)).to(self.device)
            self._references = [Base(self._policy) if other is None else other.requires_grad_(False)]
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
        if self._guard.refuses(norm, getattr(self.trainer.precision_plugin, "scaler", None)):
            for parameter in self.parameters():
                parameter.grad = None  # which every optimizer passes over, its state included
        self.log_dict({"rft/grad_norm": norm, "rft/skipped_steps": float(self._guard.skipped)}, batch_size=1)

    @override
    def optimizer_zero_grad(self, *args: Any) -> None:
        """Does nothing: gradients are zeroed where a batch begins, before its first micro-batch."""

    @override
    def training_step(self, batch: BatchPart, batch_idx: int) -> Tensor:
        if batch.first:
            self._begin(batch)
        *before, last = self._shares[batch.part]
        trained = torch.zeros((), dtype=torch.float32, device=self.device)
        for turns in before:
            loss = self._loss(turns, batch.batch)
            self._backward(loss)
            trained += loss.detach()
        loss = self._loss(last, batch.batch) + trained
        self.metrics.update_loss(loss)
        if batch.last:
            values = self.metrics.collect()
            self._guard.trained(batch.batch, values["rft/loss"])
            self.sampling_gap = values.get("rft/sampling_gap")
            self.log("rft/reward", values.pop("rft/reward", float("nan")), prog_bar=True, batch_size=1)
            self.log_dict(values | {"rft/wait_experience_s": batch.wait_seconds}, batch_size=1)
        # Lightning divides by both
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def _begin(self, batch: BatchPart) -> None:
        """Has rank 0 make what depends on the whole batch, and cut it; all ranks together."""
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()
        agree = batch.ranks.agree
        self.metrics.update_groups(batch.groups, batch.batch, agree)
        self.fast_path = settled(self.fast_path, self._policy, batch.groups, agree)
        self._objective = self.objective.on_policy(batch.on_policy)
        self._shares = planned(
            batch,
            self._objective,
            self.fast_path,
            self._policy,
            *self._references,
            max_tokens=self.max_tokens_per_micro_batch,
        )

    def _backward(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch that is not the last, on this rank alone."""
        strategy = self.trainer.strategy
        alone = strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
        with torch.autocast(self.device.type, enabled=False), alone:
            strategy.backward(loss * self.trainer.world_size, None)

    @override
    def validation_step(self, batch: BatchPart, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == dataloader_idx == 0:
            stage = "test" if self.trainer.testing else "val"
            self._evaluation = Evaluation(stage, self.pass_threshold, self.final_answer)
        for name, value in self._evaluation.add(batch).items():
            shown = name in ("val/reward", "test/reward")
            self.log(name, value, batch_size=1, prog_bar=shown, sync_dist=True, add_dataloader_idx=False)

    test_step = validation_step

    @override
    def predict_step(self, batch: BatchPart, batch_idx: int) -> list[dict[str, Any]]:
        # named as in read_buffer, which has the tokens too
        return [
            {"task_id": group.task_id, "sample": sample.sample, "reward": sample.reward, "text": sample.text}
            for group in batch.groups
            for sample in group.experiences
        ]

    def _loss(self, turns: Sequence[WeightedTurn], version: int) -> Tensor:
        """Weighted sum of the losses of some turns' tokens, trained as a version."""
        assert self.fast_path is not None, "a batch begins before its loss"
        counts = bool(turns)
        if not counts:
            if self.trainer.world_size == 1:
                return zero_gradient(self.parameters())
            # what the other ranks do are collectives, in which this one takes part with a token that does not count
            turns = [_NOTHING]
        packed = self.fast_path.pack(by_group(turns)).to(self.device)
        logprobs, entropy = token_logprobs(
            self._policy,
            packed,
            chunked_head=self.fast_path.chunked_head,
            entropy_gradient=bool(self._objective.entropy),
        )
        tokens, weights = token_batch(turns, logprobs, entropy)
        losses, statistics = self._objective.token_loss(tokens)
        self.metrics.update_tokens(entropy.detach(), statistics, float(counts))
        if self._text is not None and counts:  # else the tokens are of another run, or do not count
            scale = 1.0 if packed.temperature is None else packed.temperature  # as at temperature 1
            gap = (logprobs.detach() - tokens.sampling_logprobs).abs()
            self.metrics.update_gap(gap * scale, versions_of(turns, self.device) == version)
        return (losses * weights).sum()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RFTModule:
        with uncast_buffers(self.policy):
            super()._apply(fn, recurse)
        return self

    @property
    def _policy(self) -> PreTrainedModel:
        assert self.policy is not None, "configure_model has not run"
        check_policy(self.policy)
        return self.policy
