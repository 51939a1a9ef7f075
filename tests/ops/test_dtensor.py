"""The vocabulary ops with a head that lies in parts on two processes: what one process has, each its part of."""

import re
import tempfile

import pytest
import torch
import torch.distributed as dist
from torch import nn
from two_processes import run_on_two

from quietstar.ops import linear_cross_entropy, linear_sample, mix_logits, mixed_linear_cross_entropy

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

ROWS, SIZE, VOCABULARY = 6, 4, 11  # a vocabulary that two processes cannot share evenly
INPUTS = {
    "hidden": torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(0)),
    "thought": torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1)),
    "weight": torch.randn(VOCABULARY, SIZE, generator=torch.Generator().manual_seed(2)),
}
MIXING, TARGET = torch.linspace(0, 1, ROWS), torch.arange(ROWS)


def plain(hidden, thought, weight, rows):
    return linear_cross_entropy(hidden[rows], weight, TARGET[rows], softcap=3.0)


def mixed(hidden, thought, weight, rows):
    return mixed_linear_cross_entropy(hidden[rows], thought[rows], MIXING[rows], weight, TARGET[rows])


def solve(function, weight, rows=slice(None)):
    """Loss and gradients, of the weight as it lies."""
    inputs = [INPUTS[name].clone().requires_grad_() for name in ("hidden", "thought")]
    loss = function(*inputs, weight, rows)
    gradients = torch.autograd.grad(loss, [weight, inputs[0]])
    return loss.detach(), *gradients


def sharded_module():
    """FSDP with the head as its own unit, whose forward nobody calls."""
    from torch.distributed.fsdp import fully_shard

    head = nn.Linear(SIZE, VOCABULARY, bias=False)
    head.weight.data.copy_(INPUTS["weight"])
    return fully_shard(head).weight


def check_as_one_process(rank, weight, placements):
    assert type(weight.placements[0]) is type(placements[0])
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    for function in (plain, mixed):
        expected = solve(function, INPUTS["weight"].clone().requires_grad_())
        # The same rows on all processes, then half of them on each: a mean of means.
        for rows, share in ((slice(None), 1), (mine, 2)):
            loss, d_weight, d_hidden = solve(function, weight, rows)
            assert d_weight.placements == weight.placements
            torch.testing.assert_close(d_weight.full_tensor(), expected[1])
            torch.testing.assert_close(d_hidden[rows], expected[2][rows] * share)
            dist.all_reduce(loss)
            torch.testing.assert_close(loss / 2, expected[0])
    tokens = linear_sample(INPUTS["hidden"], weight, seed=3)
    assert torch.equal(tokens, linear_sample(INPUTS["hidden"], INPUTS["weight"], seed=3))


def check_errors(mesh):
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    whole = distribute_tensor(INPUTS["hidden"], mesh, [Replicate()])
    with pytest.raises(TypeError, match=re.escape("hidden must be a torch.Tensor of this process alone")):
        linear_cross_entropy(whole, INPUTS["weight"], TARGET)
    with pytest.raises(TypeError, match=re.escape("base_logits must be a torch.Tensor of this process alone")):
        mix_logits(whole, whole, MIXING)
    summands = DTensor.from_local(INPUTS["weight"], mesh, [Partial()])
    with pytest.raises(ValueError, match="weight must be sharded or replicated, got the placements"):
        linear_sample(INPUTS["hidden"], summands, seed=1)


def run(rank, file):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    try:
        for placement in (Shard(0), Shard(1), Replicate()):
            weight = distribute_tensor(INPUTS["weight"], mesh, [placement]).requires_grad_()
            check_as_one_process(rank, weight, [placement])
        check_as_one_process(rank, sharded_module(), [Shard(0)])
        check_errors(mesh)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_what_one_has():
    with tempfile.TemporaryDirectory() as folder:
        run_on_two(run, f"{folder}/meeting")
