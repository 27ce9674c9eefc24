"""Pretrained models, in folders and on the hub: how they are loaded, and what they say of themselves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_rft.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

__all__ = ["Pretrained", "check_policy", "checkpoint_weights", "right_attention"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Pretrained:
    """A model and its tokenizer as the hub or a folder has them; the hub reads a token from the environment."""

    name: str  #: Path of a folder, or hub name.
    revision: str | None = None  #: Branch, tag or commit of a hub name.
    trust_remote_code: bool = False

    @classmethod
    def of(cls, model: str | os.PathLike[str] | Pretrained) -> Pretrained:
        """The value itself, or that of a name or path."""
        return model if isinstance(model, Pretrained) else cls(os.fspath(model))

    def other(self, name: str | None) -> Pretrained:
        """The model of that name, which is trusted alike; a revision is of its own model only."""
        return self if name in (None, self.name) else replace(self, name=name, revision=None)

    def check(self) -> None:
        """Raises :class:`ConfigurationError` if the folder is missing, or lacks a config or a tokenizer."""
        folder, name = Path(self.name), self.name
        if not folder.is_dir():
            if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
                raise ConfigurationError(
                    f"model={name!r} is no folder: give an existing folder or a hub name 'owner/name'"
                )
            return  # perhaps a hub name; loading the tokenizer, before any process starts, checks it
        if not (folder / "config.json").is_file():
            raise ConfigurationError(f"model={name!r} has no config.json: give a folder that save_pretrained() wrote")
        if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
            raise ConfigurationError(
                f"model={name!r} has no tokenizer: save it there too, with tokenizer.save_pretrained({name!r})"
            )
        if self.revision is not None:
            raise ConfigurationError(
                f"revision={self.revision!r} is for a model on the hub, and model={name!r} is a folder: leave it out"
            )

    def config(self) -> Any:
        """Its config."""
        from transformers import AutoConfig

        with self._explained("config"):
            return AutoConfig.from_pretrained(self.name, **self._settings)

    def tokenizer(self, **settings: Any) -> Any:
        """Its tokenizer."""
        from transformers import AutoTokenizer

        with self._explained("tokenizer"):
            return AutoTokenizer.from_pretrained(self.name, **self._settings, **settings)

    def load(self, **settings: Any) -> Any:
        """The model with its weights."""
        from transformers import AutoModelForCausalLM

        with self._explained("weights"):
            return AutoModelForCausalLM.from_pretrained(self.name, **self._settings, **settings)

    def made(self, config: Any, **settings: Any) -> Any:
        """The model that its config describes, without its weights."""
        from transformers import AutoModelForCausalLM
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        code = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
        if code and self.trust_remote_code:  # from_config would take the newest code, whatever the revision
            kind: Any = get_class_from_dynamic_module(code, self.name, revision=self.revision)
            return kind._from_config(config, **settings)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **settings)

    def context_length(self) -> int | None:
        """Maximum tokens of the context according to the config; ``None`` if that is silent."""
        from transformers import PreTrainedConfig

        try:
            config, _ = PreTrainedConfig.get_config_dict(self.name, revision=self.revision)
        except OSError:  # no such folder, and no hub
            return None
        config = config.get("text_config", config)
        length = config.get("max_position_embeddings", config.get("n_positions"))
        return int(length) if length else None

    def end_ids(self) -> frozenset[int]:
        """Token ids that end an answer: those of the generation config, of the config and of the tokenizer."""
        from transformers import GenerationConfig

        named = [self.config().get_text_config().eos_token_id]
        with contextlib.suppress(OSError):  # there need not be one
            named.append(GenerationConfig.from_pretrained(self.name, revision=self.revision or "main").eos_token_id)
        with contextlib.suppress(ConfigurationError):  # nor a tokenizer, for an engine alone
            named.append(self.tokenizer().eos_token_id)
        ids: set[int] = set()
        for one in named:
            ids.update(one if isinstance(one, list) else [] if one is None else [one])
        return frozenset(ids)

    @property
    def _settings(self) -> dict[str, Any]:
        # where trust is left out, transformers asks the terminal, and waits
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @contextlib.contextmanager
    def _explained(self, part: str) -> Iterator[None]:
        """Turns what transformers raises into errors that name our settings."""
        try:
            yield
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error) and not self.trust_remote_code:
                raise ConfigurationError(
                    f"model={self.name!r} brings code of its own, which would run here with all your rights: read it, "
                    "and set RFTModule(trust_remote_code=True) if you trust it"
                ) from error
            token = "" if Path(self.name).is_dir() else " (a private or gated one needs HF_TOKEN in the environment)"
            raise ConfigurationError(f"model={self.name!r} has no {part} that can be loaded{token}: {error}") from error


def check_policy(policy: Any) -> None:
    """Raises :class:`ConfigurationError` if there is a policy whose weights have other names than its folder's."""
    from transformers import PreTrainedModel

    if policy is not None and not isinstance(policy, PreTrainedModel):
        raise ConfigurationError(
            f"policy is a {type(policy).__name__}, whose weights have other names than the model's: leave the model of "
            "transformers as it is, without a wrapper"
        )


def checkpoint_weights(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Entries of a model's ``state_dict``, whole, under the names and in the shapes of a checkpoint.

    transformers holds some models in memory otherwise than checkpoints do: the experts of a layer, for example, as one
    tensor. vLLM knows a model by its checkpoint.
    """
    from transformers.core_model_loading import revert_weight_conversion

    converted: dict[str, torch.Tensor] = revert_weight_conversion(model, weights)
    return converted


def right_attention(config: Any) -> str | None:
    """The attention of transformers that computes what a model is; ``None`` where transformers' own choice does."""
    # sdpa has no soft cap, and leaves Gemma-2's out without a word
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None
