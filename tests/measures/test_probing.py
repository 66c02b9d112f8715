from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from capnas.errors import UsageError
from capnas.measures.probing import cloned, linear_weights, reason, seeded, tensor_of, untouched, weight_gradients


def test_everything_comes_back_after_an_error() -> None:
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.Dropout())
    net[0].weight.requires_grad_(False)
    state, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()

    def probe() -> None:
        with untouched(net, statistics=True):
            net[0].weight.requires_grad_(True)
            net(torch.randn(4, 2, 5))
            assert not torch.equal(net[1].running_mean, state["1.running_mean"])
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        probe()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in net.modules()] == [True] * 4
    assert not net[0].weight.requires_grad


def test_weights_are_listed_once_and_parametrized_ones_by_their_originals() -> None:
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, shared, parametrizations.weight_norm(nn.Linear(3, 2)), nn.LayerNorm(2), nn.Embedding(5, 2))
    assert [tuple(w.shape) for w in linear_weights(net)] == [(3, 3), (2, 1), (2, 3)]


def test_gradients_of_weights_that_are_not_used_are_zero() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> dict[str, tuple[torch.Tensor, None]]:
            return {"logits": (self.used(x), None)}

    (_, used), (_, idle) = weight_gradients(Half(), torch.ones(4, 3), torch.zeros(4, dtype=torch.int64), None)
    assert used.abs().sum() > 0
    assert idle.abs().sum() == 0


def test_outputs_and_reasons() -> None:
    assert tensor_of([None, (torch.ones(3), 1)]).shape == (3,)
    with pytest.raises(UsageError, match="the model must put out a tensor, alone or in tuples, lists and dictionaries; got dict"):
        tensor_of({"out": 3})
    assert reason(RuntimeError()) == "the model failed: RuntimeError"
    assert len(reason(RuntimeError("x" * 500))) < 200


def test_untouched_restores_statistics_of_batch_norm() -> None:
    norm = nn.BatchNorm1d(3)
    with untouched(norm, training=True):
        norm(torch.randn(5, 3) + 7)
        assert norm.running_mean.abs().max() > 0.1
    assert norm.running_mean.abs().max() == 0
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
def test_a_backward_pass_under_way_goes_on(training: bool) -> None:
    net, x = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).train(training), torch.randn(4, 2)
    (expected,) = torch.autograd.grad(net(x).square().sum(), net[0].weight)
    loss = net(x).square().sum()
    with untouched(net, training=True), torch.no_grad():
        net(x + 1)
    (got,) = torch.autograd.grad(loss, net[0].weight)
    assert torch.equal(got, expected)


def test_a_copy_has_containers_of_its_own() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    net.shared = net[0].shared = {}
    fresh = cloned(net)
    kept = {id(held) for m in net.modules() for held in vars(m).values() if isinstance(held, (dict, set))}
    assert not kept & {id(held) for m in fresh.modules() for held in vars(m).values() if isinstance(held, (dict, set))}
    assert fresh.shared is fresh[0].shared
    seen: list[str] = []
    fresh[1][0].register_forward_hook(lambda *_: seen.append("copy"))
    net(torch.ones(1, 2))
    assert seen == []
    fresh(torch.ones(1, 2))
    assert seen == ["copy"]


def test_a_seed_holds_for_python_and_numpy_too_and_their_states_come_back() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()

    def drawn() -> tuple[float, float, float]:
        with seeded(3):
            return random.random(), np.random.random(), torch.rand(1).item()

    assert drawn() == drawn()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
