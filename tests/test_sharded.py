"""Policies that FSDP2 shards over two ranks: how they are loaded, gathered and pushed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.processes import Script

StartRanks = Callable[[str], list[Script]]


def test_a_shard_is_what_a_whole_policy_would_be(start_ranks: StartRanks, tmp_path: Path) -> None:
    """Loaded, computed with and gathered: tied and untied weights, experts that are merged in memory, GPT-2's norms."""
    scripts = start_ranks(f"""
        import os, torch
        import torch.distributed as dist
        from pathlib import Path
        from torch.distributed.device_mesh import init_device_mesh
        from lightning_rft.model_folder import Pretrained, checkpoint_weights
        from lightning_rft.trainer.gathering import Gathering
        from lightning_rft.trainer.loading import load_policy, load_sharded
        from tests.explorer.test_models import write

        rank = int(os.environ["LOCAL_RANK"])
        dist.init_process_group("gloo", rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        cpu, ids = torch.device("cpu"), torch.arange(5, 65)[None]

        def computed(policy, half=False):
            policy.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                logits = policy(ids, use_cache=False).logits
            logits.float().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).sum().backward()
            gradients = {{name: whole(p.grad) for name, p in policy.named_parameters() if p.grad is not None}}
            return logits.detach().float(), gradients

        def whole(tensor):
            return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

        for kind in ("qwen2", "gemma2", "gpt2", "mixtral"):
            folder = Path("{tmp_path}") / kind
            if rank == 0:
                folder.mkdir()
                write(kind, folder, 0)
            dist.barrier()
            model = Pretrained(str(folder))
            plain, policy = load_policy(model, None), load_sharded(model, None, mesh, cpu)
            expected, found = computed(plain), computed(policy)
            assert torch.equal(found[0], expected[0]), kind
            assert all(torch.allclose(found[1][name], g, rtol=1e-5, atol=1e-6) for name, g in expected[1].items())
            tied = [one.get_output_embeddings().weight is one.get_input_embeddings().weight for one in (plain, policy)]
            assert tied == [kind in ("gemma2", "gpt2")] * 2
            buffers = dict(policy.named_buffers())
            assert all(torch.equal(buffers[name], buffer) for name, buffer in plain.named_buffers())

            gathering, named = Gathering(policy), checkpoint_weights(plain, plain.state_dict())
            arrived = dict(gathering.tensors("bfloat16"))
            assert len(arrived) == len(named) - tied[0]
            assert {{info.name for info in gathering.manifest()}} == named.keys()
            for info in gathering.manifest("bfloat16"):
                assert torch.equal(arrived[info.same_as or info.name], named[info.name].bfloat16()), info

            policy = load_sharded(model, None, mesh, cpu, torch.bfloat16)
            expected, found = computed(plain, half=True), computed(policy, half=True)
            assert (found[0] - expected[0]).abs().mean() < 0.02 * expected[0].std(), kind
            for name, gradient in expected[1].items():
                assert found[1][name].dtype == torch.float32
                assert (found[1][name] - gradient).norm() < 0.2 * gradient.norm() + 1e-3, (kind, name)
        print("done")
    """)
    for script in scripts:
        assert script.wait(120) == 0, script.stderr
        assert script.stdout.splitlines()[-1] == "done"


def test_only_rank_0_holds_a_whole_copy_while_it_is_loaded(start_ranks: StartRanks, tmp_path: Path) -> None:
    scripts = start_ranks(f"""
        import os, torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from transformers import AutoModelForCausalLM, LlamaConfig
        from lightning_rft.model_folder import Pretrained
        from lightning_rft.trainer.loading import load_sharded

        def resident(name):
            text = open("/proc/self/status").read()
            return int(text.split(name + ":")[1].split()[0]) * 1024

        rank = int(os.environ["LOCAL_RANK"])
        dist.init_process_group("gloo", rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        folder = "{tmp_path / "large"}"
        config = LlamaConfig(vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                             num_attention_heads=8, num_key_value_heads=8)
        if rank == 0:
            # in float32, its file would be mapped into memory, and read only where it is looked at
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        dist.barrier()
        before = resident("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        policy = load_sharded(Pretrained(folder), None, mesh, torch.device("cpu"))
        whole = sum(parameter.numel() * 4 for parameter in policy.parameters())
        print(whole, (resident("VmHWM") - before) / whole)
    """)
    shares = []
    for script in scripts:
        assert script.wait(120) == 0, script.stderr
        whole, share = script.stdout.split()[-2:]
        assert int(whole) > 180e6
        shares.append(float(share))
    assert shares[0] > 1.0
    assert shares[1] < 0.7  # half of it is its shard


def test_a_push_that_breaks_off_in_the_middle_is_repeated_by_all_ranks(start_ranks: StartRanks) -> None:
    """On-policy, sampled and trained log-probs agree in every step: whatever was pushed is the whole new policy."""
    scripts = start_ranks("""
        import torch
        from lightning.pytorch.strategies import ModelParallelStrategy as FSDP2
        import lightning_rft as rft
        from lightning_rft.sync.transports.gloo import GlooSender
        from tests.processes import fit

        class Breaks(GlooSender):
            sent = 0
            def send(self, tensors, manifest):
                Breaks.sent += 1
                if Breaks.sent == 2:
                    coming = iter(tensors)
                    print("took", [next(coming)[0] for _ in range(3)])
                    raise RuntimeError("no route")
                super().send(tensors, manifest)

        class Transport(rft.CollectiveTransport):
            def _make_sender(self, device, explorers):
                return Breaks(self.timeout_s, 1 << 12)

        kl = []
        class Module(rft.RFTModule):
            def __init__(self, model):
                super().__init__(model, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3))
            def on_train_batch_end(self, *_):
                kl.append(float(self.trainer.callback_metrics["rft/kl"]))

        trainer = fit(Module, engine=rft.TransformersEngine(dtype="float32", device="cpu"), devices=2,
                      parallel=FSDP2(data_parallel_size=2, tensor_parallel_size=1), transport=Transport(),
                      samples_per_task=4, tasks_per_step=3, max_new_tokens=16, tasks=[f"{i} =" for i in range(12)],
                      reward=lambda completion, task: float(sum(map(ord, completion)) % 7))
        assert trainer.global_rank == 1 or Breaks.sent == 6, Breaks.sent
        print(len(kl), max(kl))
    """)
    for script in scripts:
        assert script.wait() == 0, script.stderr
        steps, kl = script.stdout.split()[-2:]
        assert steps == "4"
        assert float(kl) < 1e-8
    assert "took" in scripts[0].stdout


def test_an_error_in_the_middle_of_a_push_leaves_no_rank_in_a_collective(start_ranks: StartRanks) -> None:
    scripts = start_ranks("""
        from lightning.pytorch.strategies import ModelParallelStrategy as FSDP2
        import lightning_rft as rft
        from tests.processes import fit

        class Transport(rft.CheckpointTransport):
            def push(self, weights, version, explorers, to=None):
                if version == 1:
                    for number, _ in enumerate(weights.tensors()):
                        if number == 3:
                            raise LookupError("in the middle of a push")
                super().push(weights, version, explorers, to)

        fit(devices=2, parallel=FSDP2(data_parallel_size=2, tensor_parallel_size=1), transport=Transport())
    """)
    for script in scripts:
        assert script.wait() == 1
        assert script.stderr.splitlines()[-1].endswith("LookupError: in the middle of a push")
        assert "RuntimeError" not in script.stderr and "ends because it waits" not in script.stderr
