"""Whole runs with LoRA: what explorers compute is what is trained, with one rank and with two, and after a resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_rft as rft
from lightning_rft.errors import AgreementError
from lightning_rft.sync.transports.transport import Weights
from tests.processes import Script
from tests.test_ranks import REWARDS, SHARDED, write_buffer
from tests.trainer_and_data import quiet_trainer, seeded_data

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

Start = Callable[[str], Script]
StartRanks = Callable[[str], list[Script]]
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def data() -> Iterator[rft.RFTDataModule]:
    """Its explorer, which computes one sequence at a time, and so the same in every run, serves most runs."""
    with seeded_data(engine=rft.TransformersEngine(dtype="float32", max_batch_size=1)) as data:
        yield data


class Note(L.Callback):
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def adapted(model: Path, objective: rft.Objective | None = None, **config: Any) -> rft.RFTModule:
    return rft.RFTModule(model, objective, lambda p: torch.optim.AdamW(p, lr=3e-3), peft_config=ADAPTER | config)


def train(
    folder: Path, module: rft.RFTModule, data: rft.RFTDataModule, steps: int, resume: Path | None = None
) -> list[dict[str, float]]:
    note = Note()
    checkpoints = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")
    quiet_trainer(folder, rft.Synchronous(), checkpoints, note, max_steps=steps).fit(module, data, ckpt_path=resume)
    return note.logged


def test_a_run_is_on_policy_and_resumed_bit_for_bit_from_a_checkpoint_without_the_model(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Any] = []
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: (loads.append(a), load(*a, **k))[1])

    torch.manual_seed(5)
    objective = rft.GRPO(kl=rft.KL(0.01))
    module = adapted(tiny_model_path, objective)
    logged = train(tmp_path / "whole", module, data, 4)
    assert len(loads) == 1  # the reference is the model itself
    assert max(step["rft/kl"] for step in logged) < 1e-8
    assert logged[0]["rft/reference_kl"] < 1e-8 < logged[-1]["rft/reference_kl"]
    assert all(step["rft/push_gap"] < 1e-4 and step["rft/grad_norm"] > 0 for step in logged)
    assert all(step["rft/weights_changed"] > 0.9 for step in logged[1:])  # of the layers that are adapted

    file = tmp_path / "whole" / "checkpoints" / "step=2.ckpt"
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert len(saved) == 2 * 2 * 7 and all(".lora_" in name for name in saved)

    torch.manual_seed(6)  # another adapter to begin with, which the checkpoint's replaces
    rest = adapted(tiny_model_path, objective)
    train(tmp_path / "whole", rest, data, 4, file)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, rest.state_dict()[name]), name

    loaded = rft.RFTModule.load_from_checkpoint(tmp_path / "whole" / "checkpoints" / "step=4.ckpt", objective=objective)
    weights = dict(module.weights())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.weights())


def test_an_adapter_that_is_not_delivered_is_an_error_at_the_first_push_of_one(
    data: rft.RFTDataModule, tiny_model_path: Path, tmp_path: Path
) -> None:
    """The first push, of an adapter that is still zero, is the base model's and right."""

    class Undelivered(rft.CollectiveTransport):
        base: list[tuple[str, torch.Tensor]] = []  # noqa: RUF012
        pushed: list[int] = []  # noqa: RUF012

        def push(self, weights: Any, version: int, explorers: Any, to: Any = None) -> None:
            self.pushed.append(version)
            tensors = [(name, tensor.clone()) for name, tensor in weights.tensors()]
            self.base[:] = self.base or tensors
            super().push(Weights(weights.manifest, weights.device, lambda: iter(self.base)), version, explorers, to)

    trainer = quiet_trainer(tmp_path, rft.Synchronous(transport=Undelivered()), max_steps=4)
    with pytest.raises(AgreementError, match="the base model, without the adapter, after the push of version 1"):
        trainer.fit(adapted(tiny_model_path), data)
    assert Undelivered.pushed == [0, 1]


TRAIN = """
    import os, torch
    import lightning as L
    from lightning.pytorch.strategies import ModelParallelStrategy
    import lightning_rft as rft
    from tests.processes import MODEL
    from tests.trainer_and_data import quiet_trainer, stored_data

    torch.set_num_threads(1)
    saved = "{folder}/middle.ckpt"
    def train(epochs, resume=None):
        torch.manual_seed(3)
        optimizer = lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5)  # with a state that is resumed
        module = rft.RFTModule(os.environ[MODEL], rft.GRPO(kl=rft.KL(0.1)), optimizer, peft_config={config},
                               gradient_checkpointing=True, max_tokens_per_micro_batch=60)
        trainer = quiet_trainer(os.getcwd(), devices={devices}, strategy={strategy}, max_epochs=epochs)
        trainer.fit(module, stored_data("{buffer}", tasks_per_step=3), ckpt_path=resume)
        return trainer, module

    train(1)[0].save_checkpoint(saved)
    if os.path.isdir(saved):
        found = torch.distributed.checkpoint.FileSystemReader(saved).read_metadata().state_dict_metadata
        names = [name for name in found if name.startswith("state_dict.")]
    else:
        names = list(torch.load(saved, weights_only=True)["state_dict"])
    assert len(names) == 28 and all(".lora_" in name for name in names), names
    train(2, saved)[1].save_pretrained("{folder}/{devices}")
"""


WHOLE_FILE = SHARDED.replace(")", ", save_distributed_checkpoint=False)")


@pytest.mark.parametrize("strategy", ["'ddp'", SHARDED, WHOLE_FILE], ids=["ddp", "sharded", "sharded, one file"])
def test_two_ranks_train_the_adapter_that_one_does(
    strategy: str, start: Start, start_ranks: StartRanks, tmp_path: Path
) -> None:
    """And go on from a checkpoint of their own."""
    from safetensors.torch import load_file

    buffer = write_buffer(tmp_path, REWARDS)
    for devices in (1, 2):
        source = TRAIN.format(
            folder=tmp_path,
            buffer=buffer,
            config=ADAPTER,
            devices=devices,
            strategy=strategy if devices == 2 else "'auto'",
        )
        for script in [start(source)] if devices == 1 else start_ranks(source):
            assert script.wait(240) == 0, script.stderr
    one, two = (load_file(tmp_path / str(devices) / "adapter_model.safetensors") for devices in (1, 2))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=1e-4, atol=1e-6), name
    assert all(bool(tensor.any()) for tensor in one.values()), "nothing was trained"


@pytest.mark.parametrize("strategy", ["'ddp'", SHARDED])
def test_what_explorers_get_is_what_the_ranks_have(strategy: str, start_ranks: StartRanks) -> None:
    """On-policy, sampled and trained log-probs agree in every step."""
    scripts = start_ranks(f"""
        import torch
        from lightning.pytorch.strategies import ModelParallelStrategy
        import lightning_rft as rft
        from tests.processes import fit

        kl, changed = [], []
        class Module(rft.RFTModule):
            def __init__(self, model):
                super().__init__(model, optimizer=lambda p: torch.optim.Adam(p, lr=5e-3), peft_config={ADAPTER})
            def on_train_batch_end(self, *_):
                kl.append(float(self.trainer.callback_metrics["rft/kl"]))
                changed.append(float(self.trainer.callback_metrics["rft/weights_changed"]))

        fit(Module, engine=rft.TransformersEngine(dtype="float32", device="cpu"), devices=2, parallel={strategy},
            samples_per_task=4, tasks_per_step=3, max_new_tokens=16, tasks=[f"{{i}} =" for i in range(12)],
            reward=lambda completion, task: float(sum(map(ord, completion)) % 7))
        print(len(kl), max(kl), min(changed[1:]))
    """)
    for script in scripts:
        assert script.wait(240) == 0, script.stderr
        steps, kl, changed = script.stdout.split()
        assert steps == "4"
        assert float(kl) < 1e-8
        assert float(changed) > 0.9
