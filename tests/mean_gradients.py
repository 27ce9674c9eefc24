"""What the package makes of many random batches, on a policy whose answers are all enumerated: the mean gradient.

Advantages and weights come from ``weighted_turns``, losses from ``token_loss``. Gradients are those of what is to rise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_rft.experience import Experience, Group, GroupKey, Turn
from lightning_rft.trainer.objectives.objective import Objective
from lightning_rft.trainer.objectives.tokens import TokenBatch
from lightning_rft.trainer.weighted import weighted_turns
from tests.every_answer import ANSWERS, CUT_OFF, LENGTHS, LONGEST, POLICY, REFERENCE, REWARDS, SAMPLED, TablePolicy


@dataclass(frozen=True)
class Sampled:
    """The mean of the gradients of many batches, and its standard error [logits]; where there are few, that of all."""

    mean: Tensor
    error: Tensor
    of_all: Tensor | None

    def standard_errors_from(self, exact: Tensor) -> float:
        return float((self.mean - exact).norm() / self.error.norm())

    def assert_near(self, exact: Tensor) -> None:
        assert self.error.norm() < exact.norm() / 20
        assert self.standard_errors_from(exact) < 3
        if self.of_all is not None:
            torch.testing.assert_close(self.of_all, exact, rtol=1e-4, atol=1e-6)

    def points_elsewhere_than(self, truth: Tensor) -> bool:
        """Whether it is no multiple of the true gradient."""
        return self.standard_errors_from(truth * (self.mean @ truth) / (truth @ truth)) > 3


def sampled(
    objective: Objective,
    by: TablePolicy = POLICY,
    groups: int = 1,
    samples: int = 2,
    batches: int = 20_000,
    proximal: TablePolicy | None = None,
) -> Sampled:
    """Trains the policy on batches of ``groups`` times ``samples`` answers that ``by`` sampled."""
    size = groups * samples
    answers = by.chances.multinomial(batches * size, replacement=True, generator=torch.Generator().manual_seed(0))
    found = gradients(objective, answers.view(batches, size), by, samples, proximal)
    of_all = None
    if size <= 3:
        every = torch.cartesian_prod(*[torch.arange(len(ANSWERS))] * size).view(-1, size)
        of_all = by.chances[every].prod(-1) @ gradients(objective, every, by, samples, proximal)
    return Sampled(found.mean(0), found.std(0) / batches**0.5, of_all)


def gradients(
    objective: Objective, answers: Tensor, by: TablePolicy, samples: int, proximal: TablePolicy | None
) -> Tensor:
    """That of each batch [batches, logits], all of them in one ``TokenBatch``."""
    # in a group, the order says nothing; sorted, more batches are alike
    answers = answers.view(len(answers), -1, samples).sort(-1).values.flatten(1)
    advantages, weights = advantages_and_weights(objective, answers, by, samples)
    here = SAMPLED[answers]

    def of_tokens(values: Tensor) -> Tensor:
        return values[..., None].expand_as(here)[here]

    def logprobs_under(policy: TablePolicy) -> Tensor:
        return policy.logprobs[answers][here].float()

    logprobs = logprobs_under(POLICY).requires_grad_()
    tokens = TokenBatch(
        logprobs=logprobs,
        sampling_logprobs=logprobs_under(by),
        advantages=of_tokens(advantages).float(),
        sample=of_tokens(torch.arange(answers.numel()).view_as(answers)),
        lengths=LENGTHS[answers].flatten(),
        proximal_logprobs=None if proximal is None else logprobs_under(proximal),
        reference_logprobs=logprobs_under(REFERENCE) if objective.needs_reference else None,
    )
    loss, _ = objective.token_loss(tokens)
    (of_logprobs,) = torch.autograd.grad((of_tokens(weights) * loss).sum(), logprobs)
    pulls = torch.zeros(here.shape, dtype=torch.float64).masked_scatter(here, -of_logprobs.double())
    total = torch.zeros(len(answers), POLICY.scores.shape[-1], dtype=torch.float64)
    for place, answer in enumerate(answers.unbind(-1)):  # all places at once would be large
        total += torch.einsum("bt,btl->bl", pulls[:, place], POLICY.scores[answer])
    return total


def advantages_and_weights(
    objective: Objective, answers: Tensor, by: TablePolicy, samples: int
) -> tuple[Tensor, Tensor]:
    """Those of each answer of each batch; batches that are alike are made once."""
    experiences = [
        Experience("task", 0, (turn_of(index, by),), reward=float(REWARDS[index])) for index in range(len(ANSWERS))
    ]
    references = [
        REFERENCE.logprobs[index, : LENGTHS[index]].numpy().astype("float32") for index in range(len(ANSWERS))
    ]
    places = len(ANSWERS) ** torch.arange(answers.shape[1])
    codes, which = torch.unique((answers * places).sum(-1), return_inverse=True)
    unlike = codes[:, None] // places % len(ANSWERS)
    made = torch.zeros(*unlike.shape, 2, dtype=torch.float64)
    for row, batch in zip(made, unlike.tolist(), strict=True):
        groups = [
            Group(GroupKey(0, slot), "task", tuple(experiences[answer] for answer in batch[slot : slot + samples]))
            for slot in range(0, len(batch), samples)
        ]
        reference = [references[answer] for answer in batch] if objective.needs_reference else None
        for turn in weighted_turns(groups, objective, max_new_tokens=LONGEST, reference=reference):
            row[turn.sample] = torch.tensor([turn.advantage, turn.weight])
    return made[which][..., 0], made[which][..., 1]


def turn_of(index: int, by: TablePolicy) -> Turn:
    tokens = ANSWERS[index]
    reason = "length" if CUT_OFF[index] else "stop"
    return Turn((7,), tokens, by.logprobs[index, : len(tokens)].tolist(), [0] * len(tokens), reason)
