"""LoRA: an adapter of peft in the layers of a frozen model, and the weights that the two make together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_rft.errors import ConfigurationError
from lightning_rft.trainer.logprobs import replaced_forward
from lightning_rft.trainer.sharding import whole

__all__ = [
    *("Base", "adapted", "adapter_settings", "adapter_weights", "add_adapter", "as_pushed", "base_state"),
    *("has_adapter", "lora_config", "merged", "save_adapter_alone", "switched_off"),
]

_ADAPTERS_OWN = re.compile(r"\.(lora_\w+|modules_to_save)\.default\b")  # peft's name of the first adapter
_KEPT = {
    *("r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "init_lora_weights"),
}
# read only beside a setting that is refused, or by a whole model of peft
_WITHOUT_EFFECT = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_core", "loftq_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
_INITIAL = (True, False, "gaussian", "orthogonal")


# Settings


def adapter_settings(given: Any) -> dict[str, Any]:
    """The settings of a ``peft.LoraConfig``, or of a mapping of them, that make an adapter, as plain values.

    A mapping may also be ``class_path`` and ``init_args``, as in a config file. Raises :class:`ConfigurationError` if
    peft is missing, or if a setting makes something that cannot be merged exactly into the model's own weights.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigurationError(
            "peft_config needs peft, which is not installed: `pip install 'lightning-rft[lora]'`"
        ) from error

    if isinstance(given, Mapping):
        named = {**given, **given.get("init_args", {})}
        named.pop("init_args", None)
        kind = named.pop("class_path", "peft.LoraConfig").rpartition(".")[2]
        if kind == LoraConfig.__name__:
            try:
                given = LoraConfig(**named)
            except (TypeError, ValueError) as error:
                raise ConfigurationError(f"peft_config is no set of settings of peft.LoraConfig: {error}") from error
    else:
        kind = type(given).__name__
    if type(given) is not LoraConfig:
        raise ConfigurationError(
            f"peft_config of type {kind}: give one peft.LoraConfig, or its settings. The weights of other adapters, or "
            "of several, cannot be merged into the model's own, which is how they reach explorers"
        )
    if given.init_lora_weights not in _INITIAL:
        raise ConfigurationError(
            f"LoraConfig(init_lora_weights={given.init_lora_weights!r}) changes the base model, which is frozen: set "
            "one of " + ", ".join(map(repr, _INITIAL))
        )
    if given.lora_dropout:
        raise ConfigurationError(
            f"LoraConfig(lora_dropout={given.lora_dropout}) would train tokens under other log-probs than they were "
            "sampled with: leave it at 0"
        )
    plain = LoraConfig()
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        if field.name not in _KEPT | _WITHOUT_EFFECT and value != getattr(plain, field.name):
            raise ConfigurationError(
                f"LoraConfig({field.name}={value!r}): leave it out, since only plain LoRA can be merged exactly into "
                "the model's own weights, which is how it reaches explorers"
            )
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name in sorted(_KEPT)
        if (value := getattr(given, name)) != getattr(plain, name)
    }


def lora_config(settings: Mapping[str, Any], **more: Any) -> Any:
    """A new ``peft.LoraConfig``: peft writes into those that it is given."""
    from peft import LoraConfig

    return LoraConfig(**settings, **more)


# The model


def add_adapter(policy: Any, settings: Mapping[str, Any]) -> None:
    """Freezes a model of transformers and puts an adapter into its layers; it stays the model that it is.

    Raises :class:`ConfigurationError` if it does not fit the model, or could not be merged into it.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora.layer import Embedding, Linear

    if getattr(policy, "_hf_peft_config_loaded", False):
        raise ConfigurationError("the model has an adapter already: merge it into the model, or leave peft_config out")
    before = policy.state_dict(keep_vars=True)
    ids = [id(tensor) for tensor in before.values()]
    tied = {name for name, tensor in before.items() if ids.count(id(tensor)) > 1}
    try:
        inject_adapter_in_model(lora_config(settings), policy)
    except ValueError as error:
        raise ConfigurationError(f"peft_config does not fit this model: {error}") from error
    after, layers = base_state(policy), adapted(policy)
    for name, layer in layers.items():
        if type(layer) not in (Linear, Embedding):
            raise ConfigurationError(
                f"peft_config adapts {name}, by a {type(layer).__name__} that cannot be merged: name only linear "
                "layers and embeddings in target_modules"
            )
    changed = layers.keys() | {name for name, tensor in after.items() if tensor is not before[name]}
    if both := sorted(changed & tied):
        raise ConfigurationError(
            f"peft_config trains {both[0]}, which is one tensor with another weight in this model, and would not be "
            "any more: take it out of target_modules and modules_to_save"
        )


def has_adapter(policy: Any) -> bool:
    return hasattr(policy, "peft_config")


def adapted(policy: Any) -> dict[str, Any]:
    """The layers of peft in a model, by the name that the weight in each has without them."""
    if not has_adapter(policy):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {f"{name}.weight": layer for name, layer in policy.named_modules() if isinstance(layer, BaseTunerLayer)}


def base_state(policy: Any) -> dict[str, Tensor]:
    """A model's state, not detached, under the names that it has without an adapter, whose own weights are left out.

    Of a module that is trained whole (``modules_to_save``) it holds the one that is trained.
    """
    state: dict[str, Tensor] = policy.state_dict(keep_vars=True)
    if not has_adapter(policy):
        return state
    return {
        name.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."): tensor
        for name, tensor in state.items()
        if ".lora_" not in name and ".original_module." not in name
    }


@torch.no_grad()
def merged(layer: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A layer's weight with its adapter's part, added in float32, in ``dtype`` or its own; a new tensor.

    All ranks of a sharded model must ask together. The layer stays as it is.
    """
    weight = whole(layer.base_layer.weight)
    if embeds := "default" in layer.lora_embedding_A:
        down, up = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    down, up = whole(down).float(), whole(up).float()
    left, right = (down.T, up.T) if embeds or layer.fan_in_fan_out else (up, down)
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmm(weight.float(), left, right, alpha=layer.scaling["default"]).to(dtype or weight.dtype)


@contextmanager
def switched_off(policy: Any) -> Iterator[None]:
    """Has a model compute as it does without its adapter."""
    # not by enable_adapters(), which also sets requires_grad: a sharded model keeps what that was at its first forward
    parts = [part for part in policy.modules() if hasattr(part, "_disable_adapters")]
    for part in parts:
        part._disable_adapters = True
    try:
        yield
    finally:
        for part in parts:
            part._disable_adapters = False


@contextmanager
def as_pushed(policy: Any, dtype: torch.dtype) -> Iterator[None]:
    """Has a model compute with each adapted weight as engines get it, in their dtype: merged, or switched off."""

    def forward(layer: Any, *inputs: Any, **settings: Any) -> Tensor:
        own = layer.base_layer.weight
        weight = own.to(dtype) if layer.disable_adapters else merged(layer, dtype)
        output: Tensor = functional_call(layer.base_layer, {"weight": weight.to(own.dtype)}, inputs, settings)
        return output

    with ExitStack() as stack:
        for layer in adapted(policy).values():
            stack.enter_context(replaced_forward(layer, partial(forward, layer)))
        yield


class Base:
    """A model without its adapter, to be computed with in the model's place: a reference that takes no memory."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def __call__(self, *inputs: Any, **settings: Any) -> Any:
        with switched_off(self._policy):
            return self._policy(*inputs, **settings)


# What is saved


def adapter_weights(policy: Any) -> dict[str, Tensor]:
    """What is trained, under the names that peft gives it in a file."""
    return {
        "base_model.model." + name.replace(".modules_to_save", "").replace(".default", ""): tensor
        for name, tensor in policy.state_dict().items()
        if _ADAPTERS_OWN.search(name)
    }


def save_adapter_alone(module: L.LightningModule) -> None:
    """Leaves all of ``module.policy`` but the adapter out of the module's state, and does not miss it there."""
    module.register_state_dict_post_hook(_leave_out)
    module.register_load_state_dict_post_hook(_not_missed)
    module.strict_loading = False  # a sharded strategy, which loads without load_state_dict, would miss it


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if _is_base(name, prefix)]:
        del state[name]


def _not_missed(module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if not _is_base(name)]


def _is_base(name: str, prefix: str = "") -> bool:
    return name.startswith(f"{prefix}policy.") and not _ADAPTERS_OWN.search(name)
