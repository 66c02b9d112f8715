"""The exact capacity of small networks: its tangents against torch.func's, its rule of use, and what becomes of the map."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from capnas.capacity import capacity_map
from capnas.capacity.exact import layer_tangents
from capnas.measures.layer_capacity import exact_layer_capacity, population_ridge
from capnas.measures.pixel_map import parameter_scales, tangents


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def convolutions() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), nn.Tanh(),
        nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(196, 3),
    )  # fmt: skip


def shared() -> nn.Sequential:
    torch.manual_seed(1)
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.ReLU(inplace=True), layer, nn.Tanh(), nn.Linear(5, 2, bias=False))


@pytest.mark.parametrize(("build", "shape"), [(convolutions, (2, 6, 6)), (shared, (5,))])
def test_tangents_are_the_derivatives_by_weight_and_bias(build, shape: tuple[int, ...]) -> None:
    model, x = build(), noise(7, *shape)
    found = layer_tangents(model, x, "eval")
    for module in model:
        if hasattr(module, "inplace"):
            module.inplace = False  # torch.func's derivatives refuse it
    params = {name: p.detach() for name, p in model.named_parameters()}
    expected = tangents(lambda p, s: torch.func.functional_call(model, p, (s.unsqueeze(0),))[0], params, x, parameter_scales(params))
    assert set(found) == {name for name in params if name.endswith("weight")}
    for name, block in found.items():
        blocks = [expected[n] for n in (name, name.replace("weight", "bias")) if n in expected]
        gram = sum(part @ part.T for part in blocks)  # parameters come in another order
        torch.testing.assert_close(block.double() @ block.double().T, gram, rtol=1e-4, atol=1e-5 * float(gram.max()))
        assert block.shape[1] == sum(part.shape[1] for part in blocks)


def test_exact_capacity_is_the_share_of_the_effective_dimension() -> None:
    model, x = shared(), noise(90, 5)
    found = capacity_map(model, x, mode="eval", exact=True)
    params = {name: p.detach() for name, p in model.named_parameters()}
    blocks = tangents(lambda p, s: torch.func.functional_call(model, p, (s.unsqueeze(0),))[0], params, x, parameter_scales(params))
    layers = {"0": torch.cat([blocks["0.weight"], blocks["0.bias"]], 1), "4": blocks["4.weight"]}
    expected = exact_layer_capacity(layers, mu=population_ridge(layers, outputs=2))
    assert found.method == "exact"
    assert dict(found.capacity) == pytest.approx(expected.share, rel=1e-4)
    assert found.total == pytest.approx(expected.effective, rel=1e-4)
    assert found.mu == pytest.approx(expected.mu / 90, rel=1e-4)
    assert float(found.pixels.sum()) + found.bias == pytest.approx(found.total, rel=1e-4)
    estimate = capacity_map(model, x, mode="eval")
    assert estimate.method == "k-fac"
    assert estimate.total > 1.1 * found.total  # the estimate counts what layers share once for each


@pytest.mark.parametrize(
    ("model", "x"),
    [(nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 2)), noise(100, 5)), (nn.Linear(60, 40), noise(80, 60))],
    ids=["fewer responses than parameters", "too many parameters"],
)
def test_the_estimate_stands_in_where_the_exact_form_does_not_apply(model: nn.Module, x: Tensor) -> None:
    found, plain = capacity_map(model, x, exact=True), capacity_map(model, x)
    assert found.method == "k-fac"
    assert dict(found.capacity) == dict(plain.capacity)


@pytest.mark.parametrize("wrap", [lambda out: {"logits": out}, lambda out: (None, (out,))], ids=["a dictionary", "nested tuples"])
def test_outputs_are_found_where_the_estimate_finds_them(wrap: Callable[[Tensor], object]) -> None:
    class Wrapped(nn.Sequential):
        def forward(self, x: Tensor) -> object:
            return wrap(super().forward(x))

    plain, x = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)), noise(90, 5)
    found, expected = (capacity_map(m, x, mode="eval", exact=True) for m in (Wrapped(*plain), plain))
    assert found.method == expected.method == "exact"
    assert dict(found.capacity) == dict(expected.capacity)


def test_a_head_of_zeros_is_looked_through_by_the_estimate() -> None:
    model, x = shared(), noise(90, 5)
    nn.init.zeros_(model[4].weight)
    found = capacity_map(model, x, mode="eval", exact=True)
    assert found.method == "k-fac"
    assert found.capacity["0"] > 1


def test_batch_statistics_are_constants_and_dead_norms_are_read_as_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2, bias=False))
    x = noise(80, 1, 6, 6)
    train = layer_tangents(model, x, "train")
    h = model[0](x)
    mean, variance = h.mean((0, 2, 3)).detach(), h.var((0, 2, 3), unbiased=False).detach()
    first, scale = h[3], float(model[0].weight.detach().square().mean().sqrt())
    output = (torch.relu((first - mean.view(3, 1, 1)) / (variance.view(3, 1, 1) + 1e-5).sqrt()).flatten() @ model[4].weight.T)[1]
    (slope,) = torch.autograd.grad(output, model[0].weight)
    torch.testing.assert_close(train["0.weight"][3 * 2 + 1].sort().values, (slope * scale).flatten().sort().values, rtol=1e-3, atol=1e-5)
    before = capacity_map(model, x, exact=True).capacity["0"]
    nn.init.zeros_(model[1].weight)
    assert capacity_map(model, x, exact=True).capacity["0"] == pytest.approx(before, rel=1e-4)
    assert not bool(layer_tangents(model, x, "train", revive=False)["0.weight"].any())


def test_responses_beyond_the_limit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = shared(), noise(90, 5)
    whole, first = (capacity_map(model, part, mode="eval", exact=True).capacity for part in (x, x[:50]))
    monkeypatch.setattr("capnas.capacity.exact._ROWS", 100)
    cut = capacity_map(model, x, mode="eval", exact=True).capacity
    assert dict(cut) == pytest.approx(dict(first), rel=1e-5)
    assert dict(cut) != pytest.approx(dict(whole), rel=1e-2)


def test_a_computed_weight_has_the_capacity_of_the_weight_it_gives() -> None:
    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), noise(60, 4)
    normed = nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2))
    with torch.no_grad():
        for a, b in zip(plain[::2], normed[::2]):
            a.weight.copy_(b.weight)
            a.bias.copy_(b.bias)
    first, second = (capacity_map(m, x, mode="eval", exact=True) for m in (plain, normed))
    assert first.method == second.method == "exact"
    assert dict(first.capacity) == pytest.approx(dict(second.capacity), rel=1e-5)


def test_the_exact_form_reads_the_first_output_wherever_it_lies() -> None:
    class Wrapped(nn.Module):
        def __init__(self, wrap) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.body, self.head, self.aux, self.wrap = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2), wrap

        def forward(self, x: Tensor):
            x = self.body(x).tanh()
            return self.wrap(self.head(x), self.aux(x))

    x = noise(40, 3)
    expected = capacity_map(Wrapped(lambda y, aux: y), x, exact=True)
    for wrap in (lambda y, aux: {"logits": y, "aux": aux}, lambda y, aux: ((y,), aux)):
        found = capacity_map(Wrapped(wrap), x, exact=True)
        assert (found.method, found.capacity) == ("exact", expected.capacity)
