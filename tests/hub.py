"""Models as the hub has them: with code of their own, and in several revisions."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lightning_rft.testing import tiny_model

_CONFIG = """from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own"
"""
_MODEL = """from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    scale = {scale}

    def forward(self, *inputs, **settings):
        output = super().forward(*inputs, **settings)
        output.logits = output.logits * self.scale
        return output
"""


def use_cache(cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Makes a folder the hub's cache, here and in explorers; what is imported from models stays in it too."""
    from huggingface_hub import constants
    from transformers import dynamic_module_utils

    modules = str(cache / "modules")
    patch.setenv("HF_HUB_CACHE", str(cache))
    patch.setenv("HF_MODULES_CACHE", modules)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)
    patch.setattr(sys, "path", [*sys.path])  # to which modules is added


def with_own_code(folder: Path, scale: float | None = None, **settings: Any) -> Path:
    """A tiny llama whose config is code of its own, and its model too if that multiplies the logits by ``scale``."""
    tiny_model(folder, **settings)
    code = {"AutoConfig": "configuration_own.OwnConfig"}
    (folder / "configuration_own.py").write_text(_CONFIG)
    if scale is not None:
        code["AutoModelForCausalLM"] = "modeling_own.OwnForCausalLM"
        (folder / "modeling_own.py").write_text(_MODEL.format(scale=scale))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": code}))
    return folder


def on_the_hub(cache: Path, revisions: Mapping[str, Path]) -> str:
    """Puts folders into the hub's cache as the revisions of one model, and returns its name."""
    repository = cache / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    for index, (revision, folder) in enumerate(revisions.items()):
        commit = f"{index + 1:040x}"
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
    return "owner/name"
