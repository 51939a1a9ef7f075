"""The model on two processes, with its weights copied or in parts: losses and gradients are those of one process."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from torch import nn
from two_processes import new_model, run_on_two, texts

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
    pytest.mark.slow,
]


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def fsdp(*names, **options):
    """FSDP of the layers, the modules named, and the rest."""

    def shard(model):
        from torch.distributed.fsdp import fully_shard

        for unit in (*model.model.layers, *map(model.get_submodule, names), model):
            fully_shard(unit, **options)
        return model

    return shard


WAYS = {
    "DDP": ddp,
    "FSDP": fsdp(),
    "FSDP, head by itself": fsdp("lm_head"),
    "FSDP, embedding and mixing head by themselves": fsdp("model.embed_tokens", "mixing_head"),
    "FSDP, first layer of the mixing head by itself": fsdp("mixing_head.0"),
    "FSDP, decoder by itself": fsdp("model"),
    "FSDP, everything by itself": fsdp(
        "model.embed_tokens",
        "model.norm",
        "model",
        "lm_head",
        "start_embedding",
        "end_embedding",
        "mixing_head",
        "gain_head",
    ),
    "FSDP, nothing is gathered twice": fsdp("lm_head", reshard_after_forward=False),
}


def gradients_of(model):
    """The gradients, by name; whole ones, wherever their parts lie."""
    module = getattr(model, "module", model)
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        yield name, gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def check(rank, way):
    whole = texts(4)
    single = new_model()
    optimizer = torch.optim.SGD(single.parameters(), lr=1e-3)
    model = way(new_model())
    sharded_optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    mine = whole[2 * rank : 2 * rank + 2]
    for tolerance in (1e-6, 1e-5):  # then with weights that were changed, and rounded in another order
        expected = single(whole, labels=whole).loss
        expected.backward()
        loss = model(mine, labels=mine).loss
        loss.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / 2, expected.detach(), rtol=1e-6, atol=1e-5)
        wanted = dict(gradients_of(single))
        for name, gradient in gradients_of(model):
            assert (gradient - wanted[name]).abs().max() <= tolerance * wanted[name].abs().max(), name
        for each in (optimizer, sharded_optimizer):
            each.step()
            each.zero_grad()
    with torch.no_grad():
        logits = single.eval()(mine).logits
        assert (model.eval()(mine).logits - logits).norm() <= 1e-5 * logits.norm()


def run(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        for name, way in WAYS.items():
            try:
                check(rank, way)
            except Exception as error:
                error.add_note(name)
                raise
    finally:
        dist.destroy_process_group()


def test_two_processes_learn_what_one_does():
    with tempfile.TemporaryDirectory() as folder:
        run_on_two(run, f"{folder}/meeting")
