"""Which GPUs trainer and explorers get, whatever torch and Lightning say there is."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_only

import lightning_rft as rft
from lightning_rft.cli import RFTCLI
from lightning_rft.errors import ConfigurationError
from lightning_rft.explorer.placement import Placement, place
from lightning_rft.hardware import available_cpus
from lightning_rft.run.memory import Held, check_fit, check_memory
from lightning_rft.run.nodes import check_nodes
from lightning_rft.run.placement import cpu_threads, devices_beside, gpu_placement
from lightning_rft.trainer.loading import without_memory
from lightning_rft.trainer.ranks import Ranks

Machine = Callable[..., None]

UUIDS = ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-1f", "GPU-2e", "GPU-3d"]
PARTS = ["MIG-aa", "MIG-bb", "MIG-cc"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Has so many GPUs, as far as torch says, under the names of ``CUDA_VISIBLE_DEVICES``."""

    def machine(count: int, names: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        if names is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)

    return machine


def pool(explorers: int = 1, size: int = 1, **settings: Any) -> rft.ExplorerPool:
    return rft.ExplorerPool(rft.VLLMEngine(tensor_parallel_size=size), explorers, **settings)


def planned(
    of: rft.ExplorerPool, devices: Any = 1, accelerator: str = "gpu", strategy: rft.SyncStrategy | None = None
) -> Placement:
    return gpu_placement(trainer_on(devices, accelerator), strategy or rft.Synchronous(), of)


def trainer_on(devices: Any, accelerator: str = "gpu", nodes: int = 1) -> L.Trainer:
    return L.Trainer(
        accelerator=accelerator, devices=devices, num_nodes=nodes, logger=False, enable_checkpointing=False
    )


TABLE = [
    (gpus, devices)
    for gpus in (1, 2, 4, 8)
    for devices in ("auto", 1, 2, 4, [gpus - 1])
    if not isinstance(devices, int) or devices <= gpus
]


@pytest.mark.parametrize(("gpus", "devices"), TABLE)
def test_a_plan_or_the_arithmetic(gpus: int, devices: Any, machine: Machine) -> None:
    machine(gpus)
    trainer, strategy = trainer_on(devices), rft.Synchronous()
    used = devices if isinstance(devices, list) else list(range(gpus if devices == "auto" else devices))
    for explorers, size in itertools.product([1, 2, 3, 4], [1, 2, 4]):
        needed, shared = explorers * size, gpus == explorers * size == 1
        if needed > gpus - len(used) and not shared:
            with pytest.raises(ConfigurationError, match=rf"makes {needed} GPU.* has {len(used)} of {gpus} GPU"):
                gpu_placement(trainer, strategy, pool(explorers, size))
            continue
        plan = gpu_placement(trainer, strategy, pool(explorers, size))
        assert plan.trainer == tuple(map(str, used))
        assert [len(each) for each in plan.explorers] == [size] * explorers
        everyone = [*plan.trainer, *itertools.chain(*plan.explorers)]
        assert set(everyone) <= set(map(str, range(gpus)))
        assert len(set(everyone)) == len(everyone) - shared
        assert plan.nccl is not shared and bool(plan.apart) is not shared
        assert plan.devices == [",".join(each) for each in plan.explorers]


@pytest.mark.parametrize(
    ("gpus", "devices", "explorers", "size", "text"),
    [
        (4, 2, 2, 1, "trainer: GPUs 0-1; explorers: 2, 3"),
        (8, 4, 2, 2, "trainer: GPUs 0-3; explorers: 4-5, 6-7"),
        (8, [0, 7], 1, 4, "trainer: GPUs 0, 7; explorers: 1-4"),
        (2, [1], 1, 1, "trainer: GPU 1; explorers: 0"),
        (2, [1, 0], 2, 1, None),
    ],
)
def test_what_is_said(gpus: int, devices: Any, explorers: int, size: int, text: str | None, machine: Machine) -> None:
    machine(gpus)
    if text is None:  # in either order, the trainer has both
        with pytest.raises(ConfigurationError, match="the trainer has 2 of 2 GPUs and leaves 0"):
            planned(pool(explorers, size), devices)
    else:
        assert str(planned(pool(explorers, size), devices)) == text


@pytest.mark.parametrize(
    ("gpus", "devices", "explorers", "size", "advice"),
    [
        (4, "auto", 2, 1, r'\(devices="auto" takes all\): set Trainer\(devices=2\), or .*placement="shared"'),
        (4, 2, 3, 1, r"set Trainer\(devices=1\)"),
        (2, 1, 2, 1, r"2 explorers x 1 GPU makes 2 GPUs, .* leaves 1: set explorers=1, or"),
        (2, "auto", 2, 1, r"set explorers=1 and Trainer\(devices=1\)"),
        (2, 1, 1, 2, r"1 explorer x 2 GPUs makes 2 GPUs, .* leaves 1: use fewer explorers, or smaller ones"),
        (1, 1, 2, 1, r'leaves 0 .*: ExplorerPool\(placement="shared"\)'),
    ],
)
def test_the_arithmetic_says_what_to_set(
    gpus: int, devices: Any, explorers: int, size: int, advice: str, machine: Machine
) -> None:
    machine(gpus)
    with pytest.raises(ConfigurationError, match=advice):
        planned(pool(explorers, size), devices)


@given(
    gpus=st.integers(1, 9), used=st.integers(1, 9), explorers=st.integers(1, 6), each=st.integers(1, 4),
    sharing=st.sampled_from(["auto", "separate", "shared"]),
)  # fmt: skip
def test_no_one_shares_without_being_told(gpus: int, used: int, explorers: int, each: int, sharing: Any) -> None:
    visible, trainer = [str(i) for i in range(gpus)], range(min(used, gpus))
    try:
        plan = place(visible, trainer, explorers, each, sharing)
    except ConfigurationError:
        free = gpus - len(trainer)
        assert each > len(trainer) if sharing == "shared" else free < explorers * each
        return
    assert all(len(set(own)) == each for own in plan.explorers)
    if sharing == "shared":
        assert all(set(own) <= set(plan.trainer) for own in plan.explorers)
        assert not plan.nccl and not plan.apart
    elif (gpus, explorers, each, sharing) != (1, 1, 1, "auto"):
        assert plan.tenants == 1 and plan.nccl and plan.apart


# One GPU for both sides


def test_one_gpu_is_shared_and_both_have_room(machine: Machine) -> None:
    machine(1)
    shares = pool()
    plan = planned(shares)
    assert shares.engine.memory_share == 0.45
    assert plan.described(shares.engine.memory_share) == (
        "trainer: GPU 0; explorers: 0 (shared: explorers sleep while the trainer trains, weights go by CUDA IPC "
        "or checkpoint, since NCCL refuses two processes on a GPU, and each engine takes 0.45 of its GPU's memory)"
    )
    with pytest.raises(ConfigurationError, match=r"placement='separate'|makes 1 GPU, but the trainer has 1 of 1"):
        planned(pool(placement="separate"))


def test_several_gpus_are_shared_only_if_told_to(machine: Machine) -> None:
    machine(4)
    shares = pool(3, 2, placement="shared")
    assert str(planned(shares, 4)) == "trainer: GPUs 0-3; explorers: 0-1, 2-3, 0-1"
    assert shares.engine.memory_share == 0.3
    with pytest.raises(ConfigurationError, match=r"4 GPUs cannot share the trainer's, which are 2: set .*devices=4"):
        planned(pool(1, 4, placement="shared"), 2)


def test_a_share_that_leaves_the_trainer_nothing_is_refused(machine: Machine) -> None:
    machine(1)
    takes = rft.ExplorerPool(rft.VLLMEngine(gpu_memory_utilization=0.9))
    with pytest.raises(
        ConfigurationError, match=r"0\.9 of a GPU's memory .* leave gpu_memory_utilization out, or .* 0.8"
    ):
        planned(takes)
    machine(2)
    planned(takes)
    assert takes.engine.memory_share == 0.9


@pytest.mark.parametrize("make", [rft.Synchronous, rft.FullyAsynchronous])
def test_nccl_is_refused_where_a_gpu_is_shared_and_chosen_where_none_is(make: Any, machine: Machine) -> None:
    strategy = make(transport=rft.CollectiveTransport("nccl"))
    machine(2)
    planned(pool(), strategy=strategy)
    machine(1)
    with pytest.raises(
        ConfigurationError, match=r"backend='nccl'\) needs the trainer and vLLM engines on GPUs of their"
    ):
        planned(pool(), strategy=strategy)


@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_ipc_is_refused_where_nothing_is_shared_and_says_why(machine: Machine) -> None:
    strategy = rft.Synchronous(transport=rft.CollectiveTransport("ipc"))
    for count, devices, shares in [(1, 1, pool()), (4, 4, pool(3, 2, placement="shared"))]:
        machine(count)
        assert planned(shares, devices, strategy=strategy).apart == ""
    machine(2)
    for refused, accelerator, why in [
        (pool(), "gpu", r"some have others \(trainer: GPU 0; explorers: 1\): use backend='auto', or .*'shared'"),
        (pool(2, placement="shared", devices=["0", "1"]), "gpu", r"some have others \(.*explorers: 0, 1\)"),
        (pool(), "cpu", r"not both sides are on GPUs \(trainer: CPU; explorers: 0\)"),
        (rft.ExplorerPool(rft.FakeEngine()), "gpu", r"not both sides are on GPUs \(trainer: GPU 0; explorers: CPU\)"),
    ]:
        with pytest.raises(ConfigurationError, match=rf"needs explorers on the trainer's own GPUs, but {why}"):
            planned(refused, accelerator=accelerator, strategy=strategy)
    machine(0)
    with pytest.raises(ConfigurationError, match="not both sides are on GPUs"):
        planned(pool(), accelerator="cpu", strategy=strategy)
    machine(1, "MIG-aa")
    with pytest.raises(ConfigurationError, match=r"what they share are parts of a GPU \(MIG\)"):
        planned(pool(), strategy=strategy)


# Names


def test_names_are_handed_on(machine: Machine) -> None:
    machine(4, ",".join(UUIDS))
    assert planned(pool(2)).devices == UUIDS[1:3]
    machine(2, " 5, 3 ")
    assert str(planned(pool())) == "trainer: GPU 5; explorers: 3"
    machine(1, "2,-1,3")  # CUDA stops at the first that it does not know
    assert str(planned(pool())) == "trainer: GPU 2; explorers: 2"


def test_parts_of_a_gpu_go_to_explorers_though_a_process_sees_one(machine: Machine) -> None:
    machine(1, ",".join(PARTS))
    plan = planned(pool(2))
    assert (plan.trainer, plan.devices) == (("MIG-aa",), ["MIG-bb", "MIG-cc"])
    assert plan.tenants == 1 and not plan.nccl
    with pytest.raises(ConfigurationError, match="2 GPUs cannot run on parts of a GPU"):
        planned(pool(1, 2))


@pytest.mark.filterwarnings("ignore:GPU available but not used")
def test_without_gpus_nothing_is_placed(machine: Machine) -> None:
    for names in (None, "", "-1"):
        machine(0, names)
        assert planned(pool(2, 2), accelerator="cpu") == Placement()
    machine(2)
    assert str(planned(pool(2), accelerator="cpu")) == "trainer: CPU; explorers: 0, 1"
    with pytest.raises(ConfigurationError, match="3 explorers x 1 GPU makes 3 GPUs, but there are 2: set explorers=2"):
        planned(pool(3), accelerator="cpu")


def test_engines_that_need_no_gpu_take_none(machine: Machine) -> None:
    machine(1)
    for engine in (rft.FakeEngine(), rft.TransformersEngine(device="cpu")):
        assert str(planned(rft.ExplorerPool(engine, 3))) == "trainer: GPU 0; explorers: CPU"
    assert planned(rft.ExplorerPool(rft.TransformersEngine())).devices == ["0"]


# GPUs that the user names


@pytest.mark.parametrize(
    ("names", "devices", "size", "text"),
    [
        (None, ["1", "0"], 1, r"both have GPU 0: choose others, lower Trainer\(devices=...\)"),
        (None, ["1", "1"], 1, "several explorers have GPU 1: give each GPUs of its own"),
        (None, ["1,2", "3"], 2, "'3' names 1 GPU, but each explorer takes 2"),
        (None, ["GPU-1f"], 1, "named in two ways"),
        (",".join(UUIDS), ["GPU-8932"], 1, "both have GPU GPU-8932"),
    ],
)
def test_named_gpus_that_cannot_work_are_refused(
    names: str | None, devices: list[str], size: int, text: str, machine: Machine
) -> None:
    machine(4, names)
    with pytest.raises(ConfigurationError, match=text):
        planned(pool(len(devices), size, devices=devices))


def test_named_gpus(machine: Machine) -> None:
    machine(4)
    assert str(planned(pool(2, devices=["3", "2"]))) == "trainer: GPU 0; explorers: 3, 2"
    assert str(planned(pool(1, 2, devices=["4, 5"]))) == "trainer: GPU 0; explorers: 4-5"  # hidden from the trainer
    shares = pool(2, devices=["0", "0"], placement="shared")
    assert planned(shares).tenants == 3
    with pytest.raises(ConfigurationError, match="placement='both': choose one of auto, separate, shared"):
        pool(placement="both")


# Processes


@pytest.fixture
def launched(tmp_path: Path) -> Any:
    pools: list[rft.ExplorerPool] = []

    def launch(**settings: Any) -> rft.ExplorerPool:
        pools.append(rft.ExplorerPool(rft.VLLMEngine(), log_dir=tmp_path, **settings))
        pools[-1]._spawn = lambda slot: slot  # type: ignore[method-assign]
        pools[-1].launch()
        return pools[-1]

    yield launch
    for one in pools:
        one.stop()


def test_a_pool_that_was_launched_by_hand_must_name_its_gpus(launched: Any, machine: Machine) -> None:
    machine(2)
    with pytest.raises(ConfigurationError, match=r"launch\(\) came before .*: set ExplorerPool\(devices=\['1'\]\)"):
        planned(launched())
    planned(launched(devices=["1"]))
    machine(1)  # which each process sees anyway
    planned(launched())
    machine(0)
    planned(launched(), accelerator="cpu")


@pytest.mark.parametrize("transport", ["auto", "nccl", "ipc"])
def test_explorers_on_other_machines_take_none_of_this_ones(machine: Machine, transport: Any) -> None:
    machine(2)
    elsewhere = pool(explorers=8, size=4, launcher=rft.DialIn())
    strategy = rft.Synchronous(transport=rft.CollectiveTransport(backend=transport))
    if transport == "nccl":
        with pytest.raises(ConfigurationError, match="needs the trainer and vLLM engines on GPUs"):
            planned(elsewhere, devices=2, strategy=strategy)
        return
    if transport == "ipc":
        with pytest.raises(ConfigurationError, match="on the trainer's own GPUs, but they are on other machines: use"):
            planned(elsewhere, devices=2, strategy=strategy)
        return
    plan = planned(elsewhere, devices=2, strategy=strategy)
    assert (plan.trainer, plan.explorers, plan.nccl) == (("0", "1"), (), False)
    assert elsewhere.engine.tenants == 1
    assert devices_beside(elsewhere) == "auto"
    machine(0)
    trainer = trainer_on(1, "cpu")
    trainer.state.fn = TrainerFn.FITTING
    assert cpu_threads(trainer, rft.OneStepOffPolicy(), elsewhere)[1] == available_cpus()


def test_each_process_gets_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[str | None] = []
    monkeypatch.setattr(
        "lightning_rft.explorer.local.LocalProcess",
        lambda environment, log: started.append(environment.get("CUDA_VISIBLE_DEVICES")),
    )
    for placed in (Placement(("0",), (("1", "2"), ("3", "4"))), Placement()):
        explorers = rft.ExplorerPool(rft.VLLMEngine(), 2, log_dir=tmp_path)
        monkeypatch.setattr(explorers, "send", lambda *_: None)
        explorers.placed = placed
        explorers._launch(None, placed.devices)
        explorers._members.clear()
        explorers.stop()
    assert started == ["1,2", "3,4", None, None]


@pytest.mark.parametrize(
    ("gpus", "explorers", "devices"), [(4, 1, 3), (4, 2, 2), (2, 2, "auto"), (1, 1, "auto"), (0, 1, "auto")]
)
def test_the_command_line_leaves_gpus_for_explorers(
    gpus: int, explorers: int, devices: int | str, machine: Machine
) -> None:
    machine(gpus)
    assert devices_beside(pool(explorers)) == devices
    assert devices_beside(pool(explorers, placement="shared")) == "auto"
    assert devices_beside(rft.ExplorerPool(rft.FakeEngine(), explorers)) == "auto"


@pytest.mark.usefixtures("no_seed_left_behind")
def test_the_command_line_trains_on_the_others(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(sys, "argv", ["lightning-rft"])
    machine(4)
    given = ["--config", "examples/gpu.yaml", "--data.explorers", "2", "--trainer.devices"]
    for devices, count in (("auto", 2), ("3", 3)):
        trainer = RFTCLI(args=[*given, devices], run=False).trainer
        assert trainer.num_devices == count


# Turns on shared GPUs


@pytest.mark.parametrize("strategy", [rft.OneStepOffPolicy(), rft.FullyAsynchronous(), rft.MultiExplorerAsynchronous()])
def test_only_strategies_that_take_turns_share(strategy: rft.SyncStrategy, machine: Machine) -> None:
    machine(1)
    trainer, engine = trainer_on(1), rft.VLLMEngine()
    trainer.state.fn = TrainerFn.FITTING
    with pytest.raises(ConfigurationError, match=rf"{type(strategy).__name__} has both work at the same time: set"):
        gpu_placement(trainer, strategy, rft.ExplorerPool(engine))
    gpu_placement(trainer, rft.Synchronous(), rft.ExplorerPool(engine))
    assert engine.sleeps
    machine(2)
    gpu_placement(trainer, strategy, rft.ExplorerPool(engine))
    assert not engine.sleeps


def test_who_sleeps(machine: Machine) -> None:
    machine(4, ",".join(UUIDS))
    for devices, placement, sleeps in (
        (["GPU-8932"], "shared", True),  # the beginning of a name is one, too
        (["GPU-1f", "GPU-1f"], "shared", False),  # with each other alone
        (["GPU-1f"], "auto", False),
    ):
        shares = pool(len(devices), devices=devices, placement=placement)
        planned(shares)
        assert shares.engine.sleeps is sleeps
    engine = rft.FakeEngine()
    planned(rft.ExplorerPool(engine, placement="shared"))
    assert not engine.sleeps  # it takes none of a GPU


def test_allocator_settings_that_sleep_does_not_go_with(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    machine(2)
    trainer = trainer_on(1)
    trainer.state.fn = TrainerFn.FITTING
    gpu_placement(trainer, rft.Synchronous(), pool())
    machine(1)
    with pytest.raises(ConfigurationError, match="take expandable_segments out"):
        gpu_placement(trainer, rft.Synchronous(), pool())


@pytest.mark.parametrize(
    ("half", "reference", "ranks", "weights", "gradients"),
    [(False, False, 1, 404, 400), (True, False, 1, 202, 200), (False, True, 1, 808, 400), (False, False, 2, 202, 200)],
)
def test_what_the_trainer_holds(half: bool, reference: bool, ranks: int, weights: int, gradients: int) -> None:
    policy = torch.nn.ParameterList([torch.empty(100), torch.nn.Parameter(torch.empty(1), requires_grad=False)])
    held = Held.count(policy, half=half, reference=reference, ranks=ranks)
    assert held == Held(weights, gradients)


def test_figures_that_do_not_fit_are_refused() -> None:
    assert "36.0 for engines and 44.0 for the trainer" in check_fit(Held(44e9, 30e9), total=80e9, share=0.45, engines=1)
    with pytest.raises(ConfigurationError, match=r"2 x 0.3 for engines makes 48.0 GB, .* 44.0 GB: set .* below 0.23"):
        check_fit(Held(44e9, 30e9), total=80e9, share=0.3, engines=2)
    with pytest.raises(ConfigurationError, match=r"weights and gradients take 81.0 GB of a GPU, which has 80.0: use"):
        check_fit(Held(44e9, 37e9), total=80e9, share=0.3, engines=1)


@pytest.mark.parametrize("total", [10, 10**9])
def test_figures_are_checked_before_anything_starts(
    total: int, machine: Machine, monkeypatch: pytest.MonkeyPatch, tiny_model_path: Path, capsys: Any
) -> None:
    machine(1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total))
    trainer, shares = trainer_on(1), pool()
    trainer.state.fn = TrainerFn.FITTING
    trainer.strategy.connect(rft.RFTModule(tiny_model_path))
    placed = gpu_placement(trainer, rft.Synchronous(), shares)
    if total == 10:
        with pytest.raises(ConfigurationError, match="weights and gradients take"):
            check_memory(trainer, shares, placed)
    else:
        check_memory(trainer, shares, placed)
    check_memory(trainer, rft.ExplorerPool(rft.FakeEngine()), placed)  # whose engine takes none


def test_validation_needs_no_room_for_gradients(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tiny_model_path: Path
) -> None:
    machine(1)
    module, trainer, shares = rft.RFTModule(tiny_model_path), trainer_on(1), pool()
    trainer.state.fn = TrainerFn.FITTING
    trainer.strategy.connect(module)
    weights = Held.count(without_memory(module.pretrained, None, None), half=False, reference=False, ranks=1).weights
    properties = SimpleNamespace(total_memory=1.9 * weights)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    placed = gpu_placement(trainer, rft.Synchronous(), shares)
    with pytest.raises(ConfigurationError, match="weights and gradients take"):
        check_memory(trainer, shares, placed)
    trainer.state.fn = TrainerFn.VALIDATING
    check_memory(trainer, shares, placed)


# Several nodes


def test_explorers_of_several_nodes_are_planned_for_the_first(machine: Machine) -> None:
    machine(4)
    trainer = trainer_on(3, nodes=2)
    assert str(gpu_placement(trainer, rft.Synchronous(), pool())) == "trainer: GPUs 0-2; explorers: 3"
    with pytest.raises(ConfigurationError, match=r"leaves 1: set .*; that is of the first of 2 nodes.*launcher=DialIn"):
        gpu_placement(trainer, rft.Synchronous(), pool(2))


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize(
    ("devices", "of", "idle"),
    [
        (2, pool(), "GPUs 2, 3 of node 1"),
        (4, pool(placement="shared"), ""),
        (2, pool(launcher=rft.DialIn()), ""),
        (2, rft.ExplorerPool(rft.FakeEngine()), ""),
        (2, None, ""),
    ],
    ids=["left", "none", "dial-in", "no GPUs", "stored"],
)
def test_gpus_that_no_explorer_takes_on_another_node_are_told_of_there(
    node: int, devices: int, of: rft.ExplorerPool | None, idle: str,
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    machine(4)
    monkeypatch.setenv("NODE_RANK", str(node))
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # which the trainer sets, for the whole process
    trainer = trainer_on(devices, nodes=2)
    trainer.strategy._lightning_module = SimpleNamespace(objective=rft.GRPO())  # type: ignore[assignment]
    caplog.clear()  # of what Lightning said
    check_nodes(Ranks(), trainer, of)
    assert bool(caplog.messages) == bool(node and idle)
    assert not caplog.messages or f"nobody uses {idle}" in caplog.text
