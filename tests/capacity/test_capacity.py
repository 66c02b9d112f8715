"""Capacity of a network on a batch: against hand-made sweeps and full factors, on awkward modules and on timm's families."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capnas._timm import timm
from capnas.capacity import capacity_map
from capnas.capacity.capture import mean_square
from capnas.capacity.patches import input_rows
from capnas.capacity.taps import LayerTaps
from capnas.errors import UsageError
from capnas.measures.capacity_push import inject, push
from capnas.measures.decoupling import analytic_decoupling
from capnas.measures.layer_capacity import kfac_capacity, kfac_spectrum
from capnas.measures.pixel_map import exact_pixel_map, parameter_scales
from capnas.recording import hooked


def images(count: int = 12, size: int = 8, channels: int = 3) -> Tensor:
    offset = torch.arange(size) - (size - 1) / 2
    envelope = 0.2 + torch.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / 8)
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(5)) * envelope


def cnn(width: int = 6) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(width * 16, 4, bias=False),
    )


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        return (x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()).mean((2, 3))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        x = F.hardswish(self.norm(torch.cat([self.left(x), x + self.right(x)], 1)))
        return self.head(F.avg_pool2d(F.pad(x, (1, 0, 1, 0)), 2).amax((2, 3)) if x.shape[-1] > 99 else x.mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.place = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.randn(1, 5, 8) * 0.1)
        self.token, self.norm, self.qkv, self.proj = nn.Parameter(torch.zeros(1, 1, 8)), nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        q, k, v = self.qkv(self.norm(x)).reshape(len(x), 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), 5, 8))
        return self.head(x[:, 0])


class Caching(nn.Module):
    """Stores what it computed in eval mode, as timm's attention biases do."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.cache = nn.Linear(4, 4), {}

    def forward(self, x: Tensor) -> Tensor:
        if "w" not in self.cache:
            self.cache["w"] = self.mix.weight * 2
        return F.linear(self.mix(x), self.cache["w"])


def test_sweep_of_a_chain_equals_the_rules_applied_by_hand() -> None:
    model, x = cnn(), images()
    found = capacity_map(model, x, mode="eval", projections=4, rows=4096)
    layers = [model[0], model[2], model[5]]
    ops = [
        lambda s, w: F.conv2d(s, w, padding=1),
        lambda s, w: F.conv2d(s, w, padding=1, stride=2),
        lambda s, w: F.linear(s.flatten(-3), w),
    ]
    before, after, h = [], [], x.clone().requires_grad_()
    for layer, op in zip(layers, ops):
        before.append(h)
        z = op(h, layer.weight)
        after.append(z)
        h = torch.relu(z)
    responses = [torch.zeros(()) for _ in layers]
    for output in range(4):
        slopes = torch.autograd.grad(after[-1][:, output].sum(), after, retain_graph=True)
        responses = [r + g.square().mean(0) for r, g in zip(responses, slopes)]
    k = torch.zeros(4)
    for layer, op, b, h, name in reversed(list(zip(layers, ops, responses, before, ("0", "2", "5")))):
        weight, moment = layer.weight.detach(), h.detach().square().mean(0)
        (k,), _ = push(k, [moment], lambda s, op=op, w=weight: op(s, w.square()))
        k = k + inject(found.capacity[name], weight, b, moment, op)
    torch.testing.assert_close(found.pixels.float(), k, rtol=1e-3, atol=1e-4 * found.total)
    assert found.bias == pytest.approx(0, abs=1e-3)


def test_sweep_is_near_the_exact_map() -> None:
    model, x = cnn(width=8), images(60)
    found = capacity_map(model, x, mode="eval", rows=4096)
    double = model.double()
    params = {name: p.detach() for name, p in double.named_parameters()}
    inputs = x.double()
    exact = exact_pixel_map(
        lambda p, s: torch.func.functional_call(double, p, (s.unsqueeze(0),))[0], params, inputs, scales=parameter_scales(params)
    ).values.sum((0, 1))

    def variation(a: Tensor, b: Tensor) -> float:
        return float((a / a.sum() - b / b.sum()).abs().sum() / 2)

    assert variation(exact, found.pixels.sum(0)) < 0.1
    assert variation(exact, found.pixels.sum(0)) < 0.5 * variation(exact, torch.ones(8, 8))


def test_capacity_of_layers_is_that_of_the_full_factors() -> None:
    torch.manual_seed(2)
    model, x = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), torch.randn(40, 6)
    found = capacity_map(model, x, mode="eval", rows=4096)
    hidden = model[0](x)
    inner = torch.tanh(hidden)
    slopes = (1 - inner.square()).unsqueeze(1) * model[2].weight.unsqueeze(0)  # (B, 3, 9)

    def gram(values: Tensor) -> Tensor:
        return values.T @ values / 40

    ones = torch.ones(40, 1)
    spectra = {
        "0": kfac_spectrum(
            gram(torch.cat([x, ones], 1)).double(),
            sum(gram(slopes[:, o]) for o in range(3)).double(),
            float(model[0].weight.detach().square().mean().sqrt()),
        ),
        "2": kfac_spectrum(
            gram(torch.cat([inner, ones], 1)).double(), torch.eye(3).double(), float(model[2].weight.detach().square().mean().sqrt())
        ),
    }
    assert dict(found.capacity) == pytest.approx(kfac_capacity(spectra), rel=1e-3)
    assert dict(found.n_params) == {"0": 63, "2": 30}
    assert found.utilisation["2"] == pytest.approx(found.capacity["2"] / 30)


class Repeated(nn.Module):
    """One convolution called on maps of two sizes, so that its calls have other numbers of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Conv1d(3, 3, 3, bias=False), nn.Linear(3 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(torch.tanh(self.mix(x)))).flatten(1))


def test_capacity_of_a_layer_called_again_has_the_mean_of_the_responses_over_all_positions() -> None:
    torch.manual_seed(2)
    model, x = Repeated(), torch.randn(50, 3, 8)
    found = capacity_map(model, x, mode="eval", rows=10**6, pixels=False)
    first = model.mix(x)
    inner = torch.tanh(first)
    second = model.mix(inner)
    last = torch.tanh(second).flatten(1)
    out = model.head(last)
    patches = torch.cat([h.unfold(2, 3, 1).transpose(1, 2).reshape(-1, 9) for h in (x, inner)]).detach().double().numpy()
    slopes = np.zeros((3, 3))
    for o in range(2):
        gradients = torch.autograd.grad(out[:, o].sum(), [first, second], retain_graph=True)
        rows = torch.cat([g.transpose(1, 2).reshape(-1, 3) for g in gradients]).double().numpy()
        assert rows.shape == (50 * (6 + 4), 3)
        slopes += rows.T @ rows / len(rows)
    read = torch.cat([last, torch.ones(50, 1)], 1).detach().double().numpy()
    factors = {"mix": (patches.T @ patches / 50, slopes, model.mix), "head": (read.T @ read / 50, np.eye(2), model.head)}
    products = {
        name: np.outer(np.linalg.eigvalsh(a), np.linalg.eigvalsh(b)).ravel() * float(layer.weight.detach().double().square().mean())
        for name, (a, b, layer) in factors.items()
    }
    ridge = 1e-3 * np.sort(np.concatenate(list(products.values())))[-20:].mean()
    assert dict(found.capacity) == pytest.approx({name: (p / (p + ridge)).sum() for name, p in products.items()}, rel=1e-3)


def test_projections_dealt_over_the_samples_stand_for_every_output() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(512, 24))
    x = images(512)
    every = capacity_map(model, x, mode="train", projections=24, rows=4096)
    dealt = capacity_map(model, x, mode="train", projections=16, rows=4096)
    alone = capacity_map(model, x[:16], mode="train", projections=16, rows=4096)  # too few samples to share: a pass for each
    assert dealt.mu == pytest.approx(every.mu, rel=0.1)
    assert alone.mu == pytest.approx(every.mu, rel=0.3)
    assert dealt.capacity["0"] == pytest.approx(every.capacity["0"], rel=0.05)  # the head's factor has the rank of the projections
    assert dealt.coherent == pytest.approx(every.coherent, abs=0.05)
    assert 0.1 < every.coherent < 0.9
    assert dealt.pixels is not None
    assert every.pixels is not None
    assert torch.allclose(dealt.pixels / dealt.pixels.sum(), every.pixels / every.pixels.sum(), rtol=0.05)
    linear = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 24))
    assert capacity_map(linear, x[:64], mode="eval").coherent == pytest.approx(1.0)


@pytest.mark.parametrize("groups", [1, 2])
def test_input_rows_of_a_convolution_are_its_patches(groups: int) -> None:
    torch.manual_seed(3)
    conv = nn.Conv2d(4, 4, 3, stride=2, padding=1, dilation=2, groups=groups, bias=False)
    x = torch.randn(5, 4, 9, 7)
    found = capacity_map(nn.Sequential(conv, nn.Flatten()), x, mode="eval", projections=1, rows=4096, seed=4)
    patches = F.unfold(x, 3, stride=2, padding=1, dilation=2).transpose(1, 2).reshape(-1, groups, 4 // groups * 9)
    inputs = torch.einsum("rga,rgb->gab", patches, patches) / 5
    target = torch.randn(1, conv(x)[0].numel(), generator=torch.Generator().manual_seed(4)).view(4, -1).T  # one projection, alike for all
    slopes = target.reshape(-1, groups, 4 // groups)
    spectrum = kfac_spectrum(
        inputs.double(),
        (torch.einsum("rga,rgb->gab", slopes, slopes) / len(slopes)).double(),
        float(conv.weight.detach().square().mean().sqrt()),
    )
    assert found.capacity["0"] == pytest.approx(kfac_capacity({"0": spectrum})["0"], rel=1e-3)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_input_rows_of_a_padding_by_name_give_the_outputs(padding: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(3, 2, 4), torch.randn(2, 2, 7)
    out = F.conv1d(x, weight, padding=padding)
    rows = input_rows(F.conv1d, {"input": x, "weight": weight, "padding": padding}, out.shape, torch.arange(out[:, 0].numel()))[0]
    torch.testing.assert_close(rows @ weight.movedim(1, -1).flatten(1).T, out.transpose(1, 2).flatten(0, 1))


def test_one_unit_has_no_decoupling() -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2))
    assert set(capacity_map(model, torch.randn(20, 3), mode="eval").decoupling) == {"3"}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 3, 4)),
     (nn.ConvTranspose1d(2, 3, 4, stride=3, dilation=2), (2, 5)), (nn.Conv3d(2, 4, 3, stride=2, padding=1), (2, 4, 5, 4))],
    ids=["transposed", "transposed-1d", "3d"],
)  # fmt: skip
def test_inputs_of_transposed_and_3d_convolutions_are_their_tangents(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, *shape)
    taps = LayerTaps(model := nn.Sequential(layer), 5, rows=10**6, batch_statistics=False)
    with taps:
        out = model(x.clone())
    (tap,) = taps.taps.values()
    groups = getattr(layer, "groups", 1)
    for group in range(groups):  # one output channel of each group is enough: its tangents are the rows of the factor
        channel = group * out.shape[1] // groups
        factor = torch.zeros(())
        for z in out[:, channel].flatten():
            (tangent,) = torch.autograd.grad(z, layer.weight, retain_graph=True)
            row = tangent[:, 0] if isinstance(layer, nn.modules.conv._ConvTransposeNd) else tangent[channel]
            row = row.reshape(groups, -1)[group] if isinstance(layer, nn.modules.conv._ConvTransposeNd) else row.flatten()
            row = torch.cat([row, torch.ones(1)])
            factor = factor + torch.outer(row, row) / 5
        found = tap.inputs[0][group].T @ tap.inputs[0][group]
        expected = torch.linalg.eigvalsh(factor)
        torch.testing.assert_close(torch.linalg.eigvalsh(found), expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


def test_capacity_of_transposed_and_3d_convolutions_reaches_the_input() -> None:
    torch.manual_seed(0)
    up = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Flatten(), nn.Linear(144, 2))
    deep = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(768, 2))
    for model, layer in ((up, "2"), (deep, "1")):
        found = capacity_map(model, images())
        assert found.skipped == {}
        assert 0 < found.capacity[layer] <= found.n_params[layer]
        assert found.approximated == {}
        assert float(found.pixels.sum()) + found.bias == pytest.approx(found.total, rel=1e-4)
        assert float(found.pixels.sum()) > 0.2 * found.total


@pytest.mark.parametrize("build", [cnn, SqueezeExcite, Branches, Tokens])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_capacity_is_conserved_down_to_the_pixels(build, mode: str) -> None:
    torch.manual_seed(0)
    model = build()
    found = capacity_map(model, images(), mode=mode)
    assert found.approximated == {}
    assert found.pixels.shape == (3, 8, 8)
    assert found.pixels.min() >= 0
    assert float(found.pixels.sum()) + found.bias == pytest.approx(found.total, rel=1e-4)
    assert float(found.pixels.sum()) > 0.2 * found.total
    scores = found.scores()
    assert all(math.isnan(value) or 0 <= value <= 1 for value in scores.values())
    assert 0 < scores["coverage"] <= 1


@pytest.mark.parametrize("build", [Branches, Tokens])
def test_capacity_is_conserved_where_norms_have_biases(build) -> None:
    torch.manual_seed(0)
    model = build()
    for parameter in model.norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    found = capacity_map(model, images())
    assert float(found.pixels.sum()) + found.bias == pytest.approx(found.total, rel=1e-4)
    assert found.bias > 0.01 * found.total


def test_a_norm_that_starts_at_zero_passes_capacity_on_as_one_of_scale_one() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5, bias=False), nn.LayerNorm(5), nn.Linear(5, 2, bias=False)), torch.randn(20, 6)
    nn.init.zeros_(model[1].weight)
    nn.init.constant_(model[1].bias, 0.5)
    found = capacity_map(model, x)
    assert found.bias == pytest.approx(0.2 * found.capacity["2"], rel=1e-3)  # 0.5^2 / (1 + 0.5^2)


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x), self.right(x)
        return self.head(torch.where(a > 0, a, a * b))


def test_two_equal_factors_share_what_their_product_carries() -> None:
    torch.manual_seed(0)
    found = capacity_map(Products(), torch.randn(20, 6))
    assert found.approximated == {}
    assert float(found.pixels.sum()) + found.bias == pytest.approx(found.total, rel=1e-4)


class Affine(nn.Module):
    """A map without products of its data, whose constants are parameters or tensors of the code, before a head."""

    def __init__(self, apply: Callable[[Tensor, Tensor], Tensor], outputs: int) -> None:
        super().__init__()
        self.apply, self.start, self.head = apply, nn.Parameter(torch.rand(4) + 0.5), nn.Linear(outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.apply(x, self.start))


OUTSIDE = torch.tensor([[3.0, 1.0], [-2.0, 5.0]])  # neither parameter nor buffer


@pytest.mark.parametrize(
    ("apply", "outputs"),
    [(lambda x, start: x + 2, 4), (lambda x, start: torch.sub(x, 2, alpha=3), 4), (lambda x, start: 3 - x, 4),
     (lambda x, start: torch.lerp(x[:, :2], x[:, 2:], 0.25), 2),
     (lambda x, start: torch.addcmul(start, x, start.flip(0), value=2), 4),
     (lambda x, start: torch.addcmul(x[:, :1], x, start), 4),
     (lambda x, start: torch.addmm(start[:2], x[:, 2:], start.view(2, 2), beta=2, alpha=3), 2),
     (lambda x, start: torch.addmm(x[:, :2], x[:, 2:], start.view(2, 2), beta=2, alpha=3), 2),
     (lambda x, start: torch.baddbmm(x[:, None, :2], x[:, None, 2:], start.view(1, 2, 2).expand(len(x), 2, 2), beta=0.5, alpha=2)[:, 0], 2),
     (lambda x, start: x * OUTSIDE.flatten() + OUTSIDE.view(4), 4),
     (lambda x, start: torch.addmm(torch.arange(2).to(x), x[:, 2:], OUTSIDE), 2),
     (lambda x, start: F.channel_shuffle((x * start).view(-1, 4, 1), 2).flatten(1), 4)],
    ids=["number", "minus", "from", "lerp", "addcmul", "addcmul data", "addmm", "addmm data", "baddbmm data", "outside", "addmm outside",
         "shuffle"],
)  # fmt: skip
def test_affine_maps_hand_capacity_on_by_their_squared_coefficients(apply: Callable[..., Tensor], outputs: int) -> None:
    torch.manual_seed(0)
    model, x = Affine(apply, outputs), torch.randn(30, 4) * torch.tensor([0.5, 1, 2, 3])
    found = capacity_map(model, x, mode="eval")
    coefficients = torch.func.jacrev(lambda v: apply(v[None], model.start.detach())[0])(torch.zeros(4))
    shift, moment = apply(torch.zeros(1, 4), model.start.detach())[0].square(), x.square().mean(0)
    rate = found.total / outputs / (coefficients.square() @ moment + shift)  # the head reads each of its inputs once
    torch.testing.assert_close(found.pixels.float(), moment * (rate @ coefficients.square()), rtol=1e-4, atol=1e-6)
    assert found.bias == pytest.approx(float(rate @ shift), rel=1e-3, abs=1e-5)
    assert found.approximated == {}


def test_capacity_is_even_over_a_torus_whose_batch_holds_all_shifts_of_an_image() -> None:
    torch.manual_seed(0)
    around = [nn.Conv2d(c, 4, 3, padding=1, padding_mode="circular") for c in (1, 4)]
    model = nn.Sequential(around[0], nn.ReLU(), around[1], nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    x = torch.randn(1, 4, 5)
    found = capacity_map(model, torch.stack([x.roll((i, j), (1, 2)) for i in range(4) for j in range(5)]), mode="eval")
    assert found.approximated == {}
    torch.testing.assert_close(found.pixels, (found.pixels.mean()).expand(1, 4, 5), rtol=1e-4, atol=0)


class Joined(nn.Module):
    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.join, self.branch, self.head = join, nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
        nn.init.eye_(self.branch.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.join(x[:, :2], self.branch(x[:, 2:])))


@pytest.mark.parametrize(
    "join", [lambda x, y: torch.add(x, y, alpha=3), lambda x, y: torch.sub(x, y, alpha=3), lambda x, y: torch.rsub(y, x, alpha=3)],
    ids=["add", "sub", "rsub"],
)  # fmt: skip
def test_the_factor_of_a_sum_counts_in_the_split_of_capacity_and_in_the_residual_share(join: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Joined(join), torch.randn(30, 4)
    found = capacity_map(model, x)
    stream, branch = x.square().mean(0)[:2], 9 * x.square().mean(0)[2:]
    torch.testing.assert_close(found.pixels.float()[:2], found.capacity["head"] / 2 * stream / (stream + branch), rtol=1e-4, atol=0)
    assert all(share == pytest.approx(float(branch.sum() / (stream + branch).sum())) for share in found.residual.values())
    assert len(found.residual) == (float(join(torch.zeros(1), torch.ones(1))) > 0)  # differences are none


class Resize(nn.Module):
    def __init__(self, outputs: int, **options: object) -> None:
        super().__init__()
        self.options, self.head = options, nn.Linear(outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.interpolate(x, **self.options).flatten(1))


@pytest.mark.parametrize(
    ("sides", "options"),
    [((3, 3), {"size": (5, 5), "mode": "bilinear"}), ((3, 4), {"scale_factor": 2, "mode": "bilinear", "align_corners": True}),
     ((4, 3), {"size": (7, 5), "mode": "bicubic"}), ((5,), {"scale_factor": 1.6, "mode": "linear"}),
     ((2, 3, 2), {"size": (3, 4, 5), "mode": "trilinear"}), ((7, 6), {"size": (3, 4), "mode": "bicubic", "antialias": True}),
     ((3, 4), {"size": (6, 7), "mode": "nearest"})],
    ids=["bilinear", "corners", "bicubic", "linear", "trilinear", "antialiased", "nearest"],
)  # fmt: skip
def test_interpolation_hands_capacity_on_by_its_squared_coefficients(sides: tuple[int, ...], options: dict) -> None:
    torch.manual_seed(0)
    cells = math.prod(sides)
    taps = F.interpolate(torch.eye(cells).view(cells, 1, *sides), **options).flatten(1).T.double().numpy()  # (outputs, inputs)
    x = torch.randn(30, 1, *sides) * torch.linspace(0.5, 2, cells).view(1, 1, *sides)
    found = capacity_map(Resize(len(taps), **options), x, mode="eval")
    moment = x.double().square().mean(0).flatten().numpy()
    carried = np.full(len(taps), found.total / len(taps))  # the head reads each of its inputs once
    expected = moment * ((taps**2).T @ (carried / (taps**2 @ moment)))
    np.testing.assert_allclose(found.pixels.flatten().numpy(), expected, rtol=1e-4)
    assert found.approximated == {}
    assert found.bias == pytest.approx(0, abs=1e-4 * found.total)


class Reduce(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


POOLS: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True), nn.AdaptiveMaxPool2d(2), nn.MaxPool3d(2), nn.AdaptiveMaxPool3d(2)]
EXTREMES = [
    Reduce(lambda x: x.amax((2, 3))), Reduce(lambda x: x.amax(-1, keepdim=True)), Reduce(lambda x: x.amin(2)),
    Reduce(lambda x: x.max(3).values), Reduce(lambda x: x.min(2, keepdim=True).values),
]  # fmt: skip


@pytest.mark.parametrize("pool", POOLS + EXTREMES)
def test_maxima_hand_capacity_to_what_they_select(pool: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 1, *((3,) * (3 if "3d" in type(pool).__name__ else 2)))
    leaf = x.clone().requires_grad_()
    (chosen,) = torch.autograd.grad(pool(leaf).sum(), leaf)
    outputs = pool(x)[0].numel()
    found = capacity_map(nn.Sequential(pool, nn.Flatten(), nn.Linear(outputs, 1, bias=False)), x, mode="eval")
    assert found.approximated == {}
    torch.testing.assert_close(found.pixels.float(), found.total / outputs * chosen.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("join", [torch.maximum, torch.minimum, lambda x, y: torch.max(x, y), lambda x, y: torch.maximum(x, x)])
def test_the_greater_of_two_maps_hands_capacity_to_the_one_that_it_selects(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 2, 3, 3) * torch.tensor([1.0, 2.0]).view(2, 1, 1)
    leaf = x.clone().requires_grad_()
    (chosen,) = torch.autograd.grad(join(leaf[:, 0], leaf[:, 1]).sum(), leaf)
    found = capacity_map(nn.Sequential(Reduce(lambda x: join(x[:, 0], x[:, 1])), nn.Flatten(), nn.Linear(9, 1, bias=False)), x, mode="eval")
    assert found.approximated == {}
    torch.testing.assert_close(found.pixels.float(), found.total / 9 * chosen.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("floor", [lambda x: torch.zeros_like(x), lambda x: x.new_zeros(x.shape), lambda x: torch.zeros(())])
def test_the_greater_of_a_map_and_a_constant_is_an_activation(floor: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 4) * torch.tensor([0.5, 1, 2, 3])
    found = capacity_map(Affine(lambda x, start: torch.maximum(x * start, floor(x)), 4), x, mode="eval")
    torch.testing.assert_close(found.pixels, torch.full((4,), found.total / 4).double(), rtol=1e-4, atol=0)
    assert found.approximated == {}


def test_the_greater_of_a_map_and_a_smaller_one_is_approximated() -> None:
    torch.manual_seed(0)
    found = capacity_map(nn.Sequential(Reduce(lambda x: torch.maximum(x, x[:, :1])), nn.Linear(4, 1)), torch.randn(30, 4), mode="eval")
    assert found.approximated == {"aten.maximum.default": 1}
    assert float(found.pixels.sum()) + found.bias == pytest.approx(found.total)


@pytest.mark.parametrize("gated", [nn.GLU(1), lambda x: F.glu(x, dim=-3), lambda x: F.glu(input=x.movedim(1, -1)).movedim(-1, 1)])
def test_a_gated_linear_unit_is_its_two_halves(gated: Callable[[Tensor], Tensor]) -> None:
    def halves(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, 1)
        return value * gate.sigmoid()

    torch.manual_seed(0)
    x, head = torch.randn(12, 4, 3, 3), nn.Linear(18, 1, bias=False)
    found, expected = (capacity_map(nn.Sequential(Reduce(f), nn.Flatten(), head), x, mode="eval") for f in (gated, halves))
    torch.testing.assert_close(found.pixels, expected.pixels)
    assert found.pixels[2:].abs().max() == 0
    assert found.approximated == {}


@pytest.mark.parametrize("act", [nn.Softsign(), nn.LogSigmoid(), nn.Softshrink(0.1), nn.Hardshrink(0.1), nn.RReLU(), torch.sin, nn.ReLU()])
def test_activations_pass_capacity_on_to_the_unit_that_they_read(act: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 4) * torch.tensor([0.5, 1, 2, 3])
    found = capacity_map(Affine(lambda x, start: act(x * start), 4), x, mode="eval")
    torch.testing.assert_close(found.pixels, torch.full((4,), found.total / 4).double(), rtol=1e-4, atol=0)
    assert found.approximated == {}


def test_gates_get_nothing_from_what_they_multiply() -> None:
    torch.manual_seed(0)
    model, x = SqueezeExcite(), images()
    with torch.no_grad():
        model.conv.bias.zero_()
        model.gate.bias.zero_()
    with_gate = capacity_map(model, x)
    assert with_gate.capacity["gate"] > 0
    assert with_gate.bias == pytest.approx(0, abs=1e-3 * with_gate.total)


def test_gates_are_known_behind_views_and_attention_weights_too() -> None:
    torch.manual_seed(0)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(128, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x[:, :1].sigmoid().expand(-1, 2, -1, -1) * x[:, 1:]).flatten(1))

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = x.unbind(1)
            return self.head(F.scaled_dot_product_attention(query, key, value).flatten(1))

    gated = capacity_map(Gated(), images()).pixels
    assert gated[0].abs().max() == 0
    assert gated[1:].min() > 0
    attends = capacity_map(Attends(), images()).pixels
    assert attends[:2].abs().max() == 0
    assert attends[2].min() > 0


@pytest.mark.parametrize("build", [cnn, Branches, Tokens])
def test_model_is_left_untouched(build) -> None:
    torch.manual_seed(0)
    model = build().train()
    list(model.modules())[1].training = False
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    capacity_map(model, x := images())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not x.requires_grad
    assert torch.equal(x, images())


class Dressed(nn.Module):
    """A network that hands its output on in some other way."""

    def __init__(self, dress) -> None:
        super().__init__()
        self.net, self.dress = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), dress

    def forward(self, x: Tensor):
        return self.dress(self.net(x))


@pytest.mark.parametrize("dress", [lambda y: {"aux": None, "out": y}, lambda y: ((y, y),), lambda y: [None, {"x": y}]])
def test_outputs_in_dictionaries_and_tuples_are_read(dress) -> None:
    torch.manual_seed(0)
    plain = Dressed(lambda y: y)
    dressed = Dressed(dress)
    dressed.load_state_dict(plain.state_dict())
    found, expected = (capacity_map(m, images(), mode="eval") for m in (dressed, plain))
    assert found.utilisation == expected.utilisation
    for nothing in (lambda y: None, lambda y: {"out": 3}):
        with pytest.raises(UsageError, match="the model must put out a tensor, alone or in tuples, lists and dictionaries"):
            capacity_map(Dressed(nothing), images(), mode="eval")


def test_model_is_left_untouched_when_its_forward_raises() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 1:
                raise RuntimeError("midway")
            return self.norm(x)

    model = Breaks().train()
    with pytest.raises(RuntimeError, match="midway"):
        capacity_map(model, torch.randn(4, 4))
    assert model.training
    assert model.norm.training
    assert torch.is_grad_enabled()


def test_caches_of_the_model_stay_as_they_were() -> None:
    model = Caching().eval()
    first = capacity_map(model, torch.randn(6, 4))
    assert model.cache == {}
    assert list(first.capacity) == ["mix"]
    assert capacity_map(model, torch.randn(6, 4)).capacity.keys() == first.capacity.keys()


def test_batch_statistics_stand_in_for_running_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    model[0].bias.data.fill_(3.0)
    x = images(40)
    train, evaluated = capacity_map(model.train(), x), capacity_map(model.eval(), x)
    assert (train.mode, evaluated.mode) == ("train", "eval")
    assert train.decoupling["2"].gate == pytest.approx(analytic_decoupling("relu").gate, abs=0.1)
    assert evaluated.decoupling["2"].gate < 0.1


def test_decoupling_of_real_activations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    with torch.no_grad():
        model[0].weight /= model[0].weight.norm(dim=1, keepdim=True)
        model[0].bias.zero_()
    found = capacity_map(model, torch.randn(2000, 32), rows=64, pixels=False).decoupling
    assert list(found) == ["1", "3"]
    expected = analytic_decoupling("gelu")
    assert (found["1"].out, found["1"].gate) == pytest.approx((expected.out, expected.gate), abs=0.02)
    assert found["3"].out < 0.05


class Turned(nn.Module):
    """A layer or norm over channels that a permutation puts last, and back before the activation."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.act = inner, nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class Heads(nn.Module):
    """Tokens whose units are cut into heads before the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.act = nn.Linear(6, 12), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.mix(x).view(len(x), 5, 2, 6).transpose(1, 2))


TURNED = {
    "conv 1-d": (nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU()), (3, 7), 1),
    "conv 3-d": (nn.Sequential(nn.Conv3d(2, 6, 2), nn.ReLU()), (2, 4, 3, 4), 1),
    "batch norm 1-d": (nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6), nn.ReLU()), (3, 7), 1),
    "group norm 1-d": (nn.Sequential(nn.Conv1d(3, 6, 1), nn.GroupNorm(2, 6), nn.ReLU()), (3, 7), 1),
    "turned layer norm": (Turned(nn.LayerNorm(6)), (6, 5, 4), 1),
    "turned linear": (Turned(nn.Linear(6, 8)), (6, 5, 4), 1),
    "layer norm of timm": (timm.layers.LayerNormAct2d(6), (6, 5, 4), 1),
    "layer norm of maps": (nn.Sequential(nn.Conv2d(3, 6, 1), nn.LayerNorm((6, 5, 4)), nn.ReLU()), (3, 5, 4), 1),
    "tokens": (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU()), (5, 6), 2),
    "channels last": (nn.Sequential(nn.Linear(6, 8), nn.ReLU()), (5, 4, 6), 3),
    "heads": (Heads(), (5, 6), 3),
    "tokens of a map": (nn.Sequential(nn.Conv2d(3, 6, 2), nn.Flatten(2), nn.ReLU()), (3, 5, 4), 1),
}


@pytest.mark.parametrize("name", TURNED)
def test_decoupling_is_over_the_units_of_the_layer_wherever_they_lie(name: str) -> None:
    torch.manual_seed(0)
    model, shape, axis = TURNED[name]
    x = torch.randn(60, *shape) * torch.linspace(0.3, 3, shape[0]).view(-1, *[1] * (len(shape) - 1)) + 0.3
    model = nn.Sequential(model, nn.Flatten(), nn.Linear(model(x)[0].numel(), 2))
    seen: list[Tensor] = []
    act = next(n for n, m in model.named_modules() if isinstance(m, nn.ReLU))
    with hooked({act: lambda _, args: seen.append(args[0].detach().clone())}, model, before=True):
        model.eval()(x)
    found = capacity_map(model, x, mode="eval", pixels=False).decoupling
    z = np.moveaxis(seen[0].double().numpy(), axis, -1).reshape(60, -1, seen[0].shape[axis])
    flat, post = z.reshape(-1, z.shape[2]), np.maximum(z, 0).reshape(-1, z.shape[2])
    correlations = np.array([np.corrcoef(a, b)[0, 1] if a.std() > 0 and b.std() > 0 else 0 for a, b in zip(flat.T, post.T)])
    out = ((1 - correlations**2) * post.var(0)).sum() / post.var(0).sum()
    (decoupling,) = found.values()
    assert decoupling.out == pytest.approx(out, abs=1e-5)  # fewer rows and positions than are drawn: every one counts
    gates = (z > 0).astype(float)
    size = np.sqrt((gates**2).mean(0))  # (positions, units)
    places = []
    for q in range(z.shape[1]):
        live = [j for j in range(z.shape[2]) if size[q, j] > 0]
        pairs = [(gates[:, q, i] * gates[:, q, j]).mean() / (size[q, i] * size[q, j]) for i in live for j in live if i != j]
        places += [1 - np.mean(pairs)] if pairs else []
    if z.shape[1] <= 16:
        assert decoupling.gate == pytest.approx(np.mean(places), abs=1e-5)


def test_coherent_share_and_residual_sum() -> None:
    torch.manual_seed(0)
    linear = capacity_map(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)), images())
    assert linear.coherent == pytest.approx(1, abs=1e-5)
    assert linear.shattering == pytest.approx(0, abs=1e-5)
    assert linear.scores()["propagation"] < 0.01
    assert linear.residual == {}
    assert math.isnan(linear.scores()["scaling"])

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.shortcut = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            nn.init.eye_(self.branch.weight)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0.5 * self.branch(x)
            return self.shortcut(x) + self.branch(x)

    assert capacity_map(Scaled(), torch.randn(20, 4)).residual == {"model": pytest.approx(0.2)}


def test_error_of_the_coherent_share_counts_samples_and_directions() -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    one, many = (capacity_map(linear, images(count), pixels=False) for count in (12, 48))
    # every pair of samples is alike: 2 / (N (N - 1)), for three groups of 16 divided by three
    assert (one.coherent_error, many.coherent_error) == (pytest.approx((2 / 132) ** 0.5), pytest.approx((2 / 240 / 3) ** 0.5))
    assert (one.samples, many.samples) == (12, 48)
    assert not one.shattered
    pair = capacity_map(linear, images(2), pixels=False)
    assert pair.shattered  # one pair tells nothing
    assert pair.shattering == pytest.approx(0, abs=1e-6)


def test_zero_scales_are_read_as_one_and_zero_heads_are_looked_through() -> None:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(192, 2)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.norm(self.conv(x))).flatten(1))

    model = Block()
    assert capacity_map(model, images(), revive=False).capacity["conv"] == 0
    found = capacity_map(model, images())
    assert found.revived == ("norm.weight",)
    assert found.capacity["conv"] > 1
    assert not bool(model.norm.weight.any())
    nn.init.zeros_(model.head.weight)
    looked = capacity_map(model, images())
    assert looked.capacity["conv"] > 1
    assert looked.coherent == pytest.approx(1, abs=1e-3)


def test_every_parameter_without_capacity_is_named() -> None:
    torch.manual_seed(0)
    model = Tokens()
    model.unused = nn.Linear(2, 2)
    found = capacity_map(model, images())
    assert list(found.capacity) == ["patches", "qkv", "proj", "head"]
    assert found.skipped["norm"] == "LayerNorm rescales the layer before it"
    assert "not on the way" in found.skipped["unused"]
    assert "place" in found.skipped["model"] or "token" in found.skipped["model"]


def test_shared_layer_counts_once() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 5)
    found = capacity_map(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(30, 5))
    assert list(found.capacity) == ["0"]
    assert found.n_params["0"] == 30
    assert float(found.pixels.sum()) + found.bias == pytest.approx(found.total, rel=1e-4)


def test_operation_without_a_rule_is_approximated_and_listed() -> None:
    torch.manual_seed(0)

    class Sorts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.cumsum(1))

    found = capacity_map(Sorts(), torch.randn(10, 6))
    assert found.approximated == {"aten.cumsum.default": 1}
    assert float(found.pixels.sum()) + found.bias == pytest.approx(found.total, rel=1e-4)


def test_batch_is_found_where_axes_were_merged() -> None:
    windows = torch.arange(24.0).view(6, 4)  # 3 samples of 2 windows
    torch.testing.assert_close(mean_square(windows, (2, 4), 3), windows.view(3, 2, 4).square().mean(0))
    torch.testing.assert_close(mean_square(windows.T, (4, 2), 3), windows.T.reshape(4, 3, 2).square().mean(1))
    assert torch.equal(mean_square(windows, (6, 4), 3), windows.square())
    assert mean_square(windows, (4, 4), 3) is None
    assert mean_square(windows, (2, 4, 1), 3) is None


FAST = {"mobilenetv3_small_100", "convnextv2_atto", "vit_tiny_patch16_224", "ghostnet_100"}
FAMILIES = [
    *("resnet18", "resnet50", "vgg11_bn", "densenet121", "regnety_002", "efficientnet_b0", "mobilenetv3_small_100"),
    *("mobilenetv4_conv_small", "mobileone_s0", "repvgg_a0", "convnext_atto", "convnextv2_atto", "poolformer_s12", "ghostnet_100"),
    *("starnet_s1", "hgnet_tiny", "gernet_s", "edgenext_xx_small", "fastvit_t8", "vit_tiny_patch16_224", "deit3_small_patch16_224"),
    *("swin_tiny_patch4_window7_224", "mixer_s32_224", "maxvit_rmlp_pico_rw_256", "efficientformerv2_s0"),
]
SIZED = ("vit_tiny", "deit3", "swin", "mixer", "maxvit", "efficientformerv2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in FAMILIES])
def test_timm_families_give_capacity_and_pixels(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, **({"img_size": 64} if name.startswith(SIZED) else {}))
    found = capacity_map(model, torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), rows=32, projections=2)
    assert found.approximated == {}
    assert found.pixels is not None
    assert float(found.pixels.sum()) + found.bias == pytest.approx(found.total, rel=1e-3)
    assert all(0 <= value <= 1 for value in found.utilisation.values())
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert layers <= set(found.capacity) | set(found.skipped)
    assert found.decoupling


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: capacity_map(nn.Linear(2, 2), torch.zeros(1, 2)), r"at least two samples, got shape \(1, 2\)"),
        (lambda: capacity_map(nn.Embedding(5, 2), torch.ones(4, 2, dtype=torch.int64)), r"floating-point batch .* of torch.int64"),
        (lambda: capacity_map(nn.Linear(2, 2), torch.full((3, 2), float("nan"))), "finite"),
    ],
)
def test_errors_say_what_to_do(call, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_capacity_of_a_compiled_model_has_the_names_from_before() -> None:
    model, x = cnn(), images()
    assert capacity_map(torch.compile(model, backend="eager"), x).capacity == capacity_map(model, x).capacity


class FirstToken(nn.Module):
    """A linear layer on the first of the patches, which lie apart in a batch and not in one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(1, 4, 3, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, *, copied: bool = False) -> Tensor:
        first = self.patches(x).relu().flatten(2).transpose(1, 2).contiguous()[:, :1]
        return self.head(first.contiguous() if copied else first)[:, 0]


class ByChannelsLast(nn.Module):
    """A linear layer on what a convolution made of tokens: one sample's rows lie by channels, a batch's by positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mixing, self.head = nn.Conv2d(1, 4, 3, 3), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Linear(4, 3)

    def forward(self, x: Tensor, *, copied: bool = False) -> Tensor:
        tokens = self.patches(x).relu().flatten(2).transpose(1, 2).contiguous()
        mixed = self.mixing(tokens.transpose(1, 2).view(len(x), 4, 2, 2)).flatten(2).transpose(1, 2)
        return self.head(mixed.contiguous() if copied else mixed).mean(1)


class Copied(nn.Module):
    """A network that copies what its linear layer reads, in one sample as in a batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, copied=True)


@pytest.mark.parametrize("build", [FirstToken, ByChannelsLast])
def test_rows_that_lie_otherwise_in_a_batch_are_swept_as_their_copy_is(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net, x = build(), torch.randn(6, 1, 6, 6)
    found, expected = (capacity_map(m, x) for m in (net, Copied(net)))
    assert (found.unswept, found.approximated) == ("", {})
    assert torch.allclose(found.pixels, expected.pixels)
    assert float(found.pixels.sum()) + found.bias == pytest.approx(found.total)


class Window(nn.Module):
    """Overlapping windows of a map, by torch's own view or by slices."""

    def __init__(self, cut: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.head, self.cut = nn.Conv2d(1, 2, 3), nn.Linear(3, 2), cut

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cut(self.stem(x).relu())).flatten(1)


def test_views_of_overlapping_windows_are_swept_as_slices_are() -> None:
    torch.manual_seed(0)
    nets = [Window(lambda z: z.unfold(3, 3, 2)), Window(lambda z: torch.stack([z[..., i : i + z.shape[3] - 2 : 2] for i in range(3)], -1))]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(6, 1, 9, 9)
    found, expected = (capacity_map(net, x) for net in nets)
    assert found.approximated == {}
    assert torch.allclose(found.pixels, expected.pixels)


class PositionBias(nn.Module):
    """Scores of tokens with a learned bias behind activations, heads first in the end, that no image has a say in."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.act, self.bias = nn.Conv2d(1, 3, 3, 3), nn.ReLU(), nn.Linear(2, 3)
        self.register_buffer("places", torch.randn(4, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.act(self.patches(x)).flatten(2)
        return (tokens[..., None] * tokens[..., None, :] + self.bias(self.places).relu().permute(2, 0, 1).sigmoid()).flatten(1)


def test_activations_that_no_image_reaches_have_no_decoupling() -> None:
    torch.manual_seed(0)
    assert list(capacity_map(PositionBias(), torch.randn(4, 1, 6, 6)).decoupling) == ["act"]


class SamplesSecond(nn.Module):
    """An activation on a map whose channels come before the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(1, 3, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.stem(x).transpose(0, 1)).transpose(0, 1).flatten(1)


def test_activations_on_maps_with_the_samples_second_are_left_out_of_decoupling() -> None:
    torch.manual_seed(0)
    assert capacity_map(SamplesSecond(), torch.randn(4, 1, 6, 6)).decoupling == {}


class KeepsItsBias(nn.Module):
    """A bias that is drawn from a table in the first pass and kept, as the attentions of LeViT do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.table, self.kept = nn.Conv2d(1, 3, 3), nn.Linear(3, 2), nn.Parameter(torch.randn(5)), {}
        self.register_buffer("places", torch.tensor([0, 4, 2]))

    def forward(self, x: Tensor) -> Tensor:
        if x.device not in self.kept:
            self.kept[x.device] = self.table[self.places] * 2
        return self.head(self.stem(x).relu().mean((2, 3)) + self.kept[x.device])


def test_constants_that_a_pass_before_has_kept_change_nothing() -> None:
    torch.manual_seed(0)
    net, x = KeepsItsBias().eval(), torch.randn(4, 1, 6, 6)
    fresh = capacity_map(net, x)
    net(x)
    found = capacity_map(net, x)
    assert found.unswept == ""
    assert torch.equal(found.pixels, fresh.pixels)
    assert found.bias == fresh.bias > 0
