"""What the trainer holds on each GPU, by arithmetic: the tables of docs/memory.md.

    python -m benchmarks.memory_table

Models have the shapes of Qwen2.5 and are built on the meta device, which counts parameters and allocates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

GPU = 80e9
ENOUGH = 8e9  # left for activations and what CUDA itself takes
SLICE = 4 * (1 << 26)  # of float32 gradients under bf16-true
SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "14B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    "32B": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """Numbers of parameters."""

    all: int
    layer: int  # of the largest decoder layer
    rest: int  # embedding, head and final norm: FSDP2's root
    tensor: int  # of the largest

    @classmethod
    def count(cls, policy: torch.nn.Module) -> Model:
        """Counts those of a model of transformers; tied ones once."""
        whole = set(getattr(policy, "_no_split_modules", None) or ())
        layers = [
            sum(parameter.numel() for parameter in module.parameters())
            for module in policy.modules()
            if type(module).__name__ in whole
        ]
        sizes = [parameter.numel() for parameter in policy.parameters()]
        return cls(sum(sizes), max(layers), sum(sizes) - sum(layers), max(sizes))


@dataclass(frozen=True)
class Held:
    """Bytes on each GPU."""

    weights: float
    gradients: float
    optimizer: float
    step: float  # for as long as a step takes, beyond these
    push: float  # on rank 0, for as long as a push takes

    @property
    def peak(self) -> float:
        """The most at a time, without activations; a push comes between two steps, of which the gradients are left."""
        return self.weights + self.gradients + self.optimizer + max(self.step, self.push)


def held(model: Model, gpus: int, precision: str) -> Held:
    """AdamW's states are two numbers in float32 a parameter; several GPUs are FSDP2's."""
    if gpus > 1:
        own = model.all / gpus
        # The root's weights and their gradient; then that again to be summed, or before, two layers and one that
        # arrives, in bfloat16, and a layer's gradient, which is summed in float32.
        step = 8 * model.rest + max(4 * model.rest, (3 * 2 + 2 + 4) * model.layer)
        return Held(4 * own, 4 * own, 8 * own, step, push=3 * 2 * model.tensor)
    if precision == "bf16-true":
        sliced = max(SLICE, 4 * model.tensor)
        return Held(2 * model.all, 2 * model.all, (4 + 8) * model.all, sliced, push=0)
    copies = 2 * model.all if precision == "bf16-mixed" else 0  # those that autocast makes
    return Held(4 * model.all, 4 * model.all, 8 * model.all, copies, push=0)


def counted(name: str) -> Model:
    """The numbers of a model of this name in ``SHAPES``."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    with torch.device("meta"):
        return Model.count(AutoModelForCausalLM.from_config(Qwen2Config(**SHAPES[name])))


def rows() -> Iterator[str]:
    """The table as Markdown."""
    yield "| model | GPUs | precision | weights | gradients | optimizer | step | push | peak | left of 80 GB |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name in SHAPES:
        model = counted(name)
        for gpus in (1, 4, 8):
            for precision in ("bf16-mixed", "bf16-true") if gpus == 1 else ("bf16-mixed",):
                found = held(model, gpus, precision)
                parts = found.weights, found.gradients, found.optimizer, found.step, found.push, found.peak
                left = GPU - found.peak
                fits = f"**{left / 1e9:.0f}**" if left > ENOUGH else "does not fit" if left < 0 else f"{left / 1e9:.0f}"
                cells = " | ".join(f"{part / 1e9:.1f}" for part in parts)
                yield f"| {name} ({model.all / 1e9:.2f}) | {gpus} | `{precision}` | {cells} | {fits} |"


def fewest(name: str) -> int:
    """The fewest GPUs, of at most 64, that hold a model with room for activations."""
    model = counted(name)
    settings = ((gpus, precision) for gpus in range(1, 65) for precision in ("bf16-mixed", "bf16-true"))
    fitting = (gpus for gpus, precision in settings if held(model, gpus, precision).peak < GPU - ENOUGH)
    return next(fitting, math.inf)  # type: ignore[arg-type]


def main() -> None:
    """Prints the tables."""
    print("\n".join(rows()))
    for name in SHAPES:
        model = counted(name)
        print(f"{name}: {model}, at least {fewest(name)} GPUs; a push took {4 * model.all / 1e9:.0f} GB on rank 0")


if __name__ == "__main__":
    main()
