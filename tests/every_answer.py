"""A policy so small that every answer is enumerated: three tokens, the first of which ends an answer of at most three.

Expectations are sums over all answers, and gradients are with respect to its logits, a row per prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

END, VOCABULARY, LONGEST = 0, 3, 3
PREFIXES = [prefix for length in range(LONGEST) for prefix in product((1, 2), repeat=length)]
ANSWERS = [
    answer
    for length in range(1, LONGEST + 1)
    for answer in product(range(VOCABULARY), repeat=length)
    if END not in answer[:-1] and (answer[-1] == END or length == LONGEST)
]
#: Of each answer and place: the token, the row of its logits, and whether there is one.
TOKENS = torch.tensor([[*answer, *[END] * (LONGEST - len(answer))] for answer in ANSWERS])
ROWS = torch.tensor(
    [[PREFIXES.index(answer[:t]) if t < len(answer) else 0 for t in range(LONGEST)] for answer in ANSWERS]
)
LENGTHS = torch.tensor([len(answer) for answer in ANSWERS])
SAMPLED = torch.arange(LONGEST) < LENGTHS[:, None]
CUT_OFF = TOKENS[torch.arange(len(ANSWERS)), LENGTHS - 1] != END
REWARDS = torch.rand(len(ANSWERS), generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class TablePolicy:
    """A table of logits, and the exact numbers that follow from it, float64."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    @cached_property
    def logprobs(self) -> Tensor:
        """Of each token of each answer, 0 where there is none [answers, places]."""
        return self.logits.log_softmax(-1)[ROWS, TOKENS].masked_fill(~SAMPLED, 0.0)

    @cached_property
    def chances(self) -> Tensor:
        """Of each answer; they sum up to 1."""
        return self.logprobs.sum(-1).exp()

    @cached_property
    def visits(self) -> Tensor:
        """How often each row of logits is sampled from in an answer."""
        return torch.zeros(len(PREFIXES), dtype=torch.float64).index_add(
            0, ROWS.flatten(), (self.chances[:, None] * SAMPLED).flatten()
        )

    @cached_property
    def scores(self) -> Tensor:
        """Gradient of the log-prob of each token of each answer [answers, places, logits]."""
        of_row = torch.eye(VOCABULARY)[TOKENS] - self.logits.softmax(-1)[ROWS]
        scores = torch.eye(len(PREFIXES))[ROWS][..., None] * of_row[..., None, :]
        return (scores * SAMPLED[..., None, None]).flatten(2)

    def gradient(self, value: Callable[[TablePolicy], Tensor]) -> Tensor:
        """The exact gradient of a number that depends on the policy [logits]."""
        logits = self.logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(TablePolicy(logits)), logits)
        return gradient.flatten()


def some_policy(seed: int, near: TablePolicy | None = None, distance: float = 0.8) -> TablePolicy:
    """A random policy, or one at a distance from another."""
    noise = torch.randn(len(PREFIXES), VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return TablePolicy(distance * noise + (0 if near is None else near.logits))


def mean_reward(policy: TablePolicy) -> Tensor:
    return policy.chances @ REWARDS


#: The policy in training, an older one that samples where training is off policy, one in between, and a reference.
POLICY = some_policy(0)
OLDER = some_policy(29, near=POLICY, distance=0.6)
BETWEEN = TablePolicy((POLICY.logits + OLDER.logits) / 2)
REFERENCE = some_policy(2)
TRUTH = POLICY.gradient(mean_reward)
