from __future__ import annotations

import csv
import gzip
import io
import itertools
import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capnas.errors import UsageError
from capnas.measures.flows import flows
from capnas.measures.proxies import PROXIES, baseline_proxies, grad_norm, macs, naswot, params, snip, synflow, zico


class Small(nn.Module):
    """Convolutions, batch norm, a skip, dropout; ``act`` as a module or a function."""

    def __init__(self, act: Callable[[Tensor], Tensor] | None = None, *, fail: bool = False) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.drop, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Dropout(0.5), nn.Linear(6, 4)
        self.act: Callable[[Tensor], Tensor] = act or nn.ReLU(inplace=True)
        self.fail = fail

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv1(x)))
        x = self.act(self.conv2(x) + x)
        if self.fail:
            raise RuntimeError("half-way")
        return self.head(self.drop(x).mean((2, 3)))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    return torch.randn(8, 3, 6, 6, generator=rng), torch.arange(8) % 4


def test_synflow_of_a_chain_is_its_depth_times_its_flow() -> None:
    widths = [3, 5, 4, 2]
    net = nn.Sequential(*[m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b, bias=False), nn.ReLU())][:-1])
    flow = np.ones(3)
    for layer in net[::2]:
        flow = np.abs(layer.weight.detach().double().numpy()) @ flow
    assert synflow(net, torch.zeros(2, 3)).value == pytest.approx(math.log(3 * flow.sum()), rel=1e-12)  # Euler: each layer gives R


def test_synflow_does_not_overflow() -> None:
    net = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(60)])
    logs, flow = 0.0, np.ones(8)
    with torch.no_grad():
        for layer in net:
            layer.weight.mul_(1e9)
            flow = np.abs(layer.weight.double().numpy()) @ flow
            logs, flow = logs + math.log(flow.sum()), flow / flow.sum()
    assert logs > 1200 > math.log(1e308)
    result = synflow(net, torch.zeros(1, 8))
    assert result.value == pytest.approx(math.log(60) + logs, rel=1e-9)
    assert result.flag == ""
    with torch.no_grad():
        for layer in net:
            layer.weight.mul_(1e20)
    assert math.isnan(synflow(net, torch.zeros(1, 8)).value)
    assert "not finite at any scale" in synflow(net, torch.zeros(1, 8)).flag


def test_synflow_is_alike_at_every_scale(batch: tuple[Tensor, Tensor]) -> None:
    net = Small()
    plain = sum(float((w * g).sum()) for w, g in flows(net, batch[0], torch.float64, 1.0))
    small = sum(float((w * g).sum()) for w, g in flows(net, batch[0], torch.float64, 1e-120))
    assert math.log(plain) == pytest.approx(math.log(small) + 240 * math.log(10), rel=1e-9)
    assert synflow(net, batch[0]).value == pytest.approx(math.log(plain))


def test_synflow_sees_neither_data_nor_signs_nor_the_kind_of_rectifier(batch: tuple[Tensor, Tensor]) -> None:
    net = Small()
    values = [synflow(net, batch[0]).value, synflow(net, 100 * batch[0][:1]).value]
    net.act = nn.Hardswish()
    values.append(synflow(net, batch[0]).value)
    with torch.no_grad():
        net.conv1.weight.neg_()
        net.norm.running_mean.fill_(3.0)
        values.append(synflow(net, batch[0]).value)
    assert values == pytest.approx([values[0]] * 4)
    assert synflow(net, batch[0], variant="log").value > 0


def flow(weights: list[np.ndarray]) -> float:
    """R of a chain of matrices."""
    found = np.ones(weights[0].shape[1])
    for weight in weights:
        found = np.abs(weight) @ found
    return float(found.sum())


def test_synflow_of_computed_weights_is_that_of_what_is_applied() -> None:
    from capnas._timm import timm

    torch.manual_seed(0)
    spectral, weight = nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm
    std, scaled = timm.layers.StdConv2d(3, 4, 1), timm.layers.ScaledStdConv2d(4, 5, 1, bias=False)
    nn.init.uniform_(scaled.gain, -2, 2)
    net = nn.Sequential(std, nn.ReLU(), scaled, nn.ReLU(), nn.Flatten(), spectral(nn.Linear(5, 6, bias=False)), nn.ReLU(),
                        weight(nn.Linear(6, 4, bias=False)), nn.Linear(4, 2, bias=False)).eval()  # fmt: skip

    def standardised(conv: nn.Conv2d, gain: np.ndarray) -> np.ndarray:
        raw = conv.weight.detach().double().flatten(1).numpy()
        return (raw - raw.mean(1, keepdims=True)) / np.sqrt(raw.var(1, keepdims=True) + conv.eps) * gain

    gain = (scaled.gain * scaled.scale).detach().double().numpy().reshape(-1, 1)
    dense = [layer.weight.detach().double().numpy() for layer in net if isinstance(layer, nn.Linear)]
    weights = [standardised(std, np.ones((4, 1))), standardised(scaled, gain), *dense]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    found = synflow(net, torch.zeros(1, 3, 1, 1))
    assert found.flag == ""
    assert found.value == pytest.approx(math.log(5 * flow(weights)), rel=1e-6)  # Euler: each layer gives R
    slopes = 0.0
    for i in range(len(weights)):  # "log": |w| ln(1 + dR/d|w|), each slope by its entry alone
        for at in np.ndindex(*weights[i].shape):
            unit = np.zeros_like(weights[i])
            unit[at] = 1
            slopes += abs(weights[i][at]) * math.log1p(flow([*weights[:i], unit, *weights[i + 1 :]]))
    assert synflow(net, torch.zeros(1, 3, 1, 1), variant="log").value == pytest.approx(slopes, rel=1e-6)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_flow_that_signed_constants_cancel_is_said_to_be_cancelled() -> None:
    class Signed(nn.Module):
        def __init__(self, factors: tuple[float, ...]) -> None:
            super().__init__()
            self.layer, self.factors = nn.Linear(2, 2, bias=False), torch.tensor(factors, dtype=torch.float64)
            nn.init.constant_(self.layer.weight, 2.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.factors

    for factors in ((1.0, -3.0), (1.0, -1.0), (1.0, -1.0 + 1e-9)):
        found = synflow(Signed(factors), torch.zeros(1, 2))
        assert math.isnan(found.value)
        assert found.flag == "the model's own constants or computed weights, of both signs, cancel the flow"
    assert "cancel the flow" in synflow(Signed((1.0, -3.0)), torch.zeros(1, 2), variant="log").flag
    assert synflow(Signed((1.0, -0.5)), torch.zeros(1, 2)).value == pytest.approx(math.log(2 * 2 * (1 - 0.5)))
    assert synflow(Signed((0.0, 0.0)), torch.zeros(1, 2)).flag == "no flow reaches the output"


def test_naswot_against_a_slow_derivation(batch: tuple[Tensor, Tensor]) -> None:
    net = Small()
    x = batch[0]
    with torch.no_grad():
        first = F.batch_norm(net.conv1(x), None, None, net.norm.weight, net.norm.bias, training=True)
        second = net.conv2(first.relu()) + first.relu()
    codes = torch.cat([first.flatten(1), second.flatten(1)], 1).numpy() > 0
    kernel = np.array([[np.sum(a == b) for b in codes] for a in codes])
    value = naswot(net, x).value
    assert value == pytest.approx(np.linalg.slogdet(kernel)[1], rel=1e-9)
    assert naswot(net, x.flip(0)).value == pytest.approx(value, rel=1e-9)
    alike = (F.relu, torch.relu_, lambda t: t.clamp(min=0), lambda t: t.clamp(min=0 * t))
    for act in (*alike, nn.GELU(), nn.ReLU6(), nn.LeakyReLU(0.9)):
        same = Small(act)
        same.load_state_dict(net.state_dict())
        other = naswot(same, x)
        assert math.isfinite(other.value), other.flag
        if act in alike:
            assert other.value == value


def reference_gradients(net: Small, x: Tensor, y: Tensor) -> list[np.ndarray]:
    """Witness: backward() with batch norm alone in train mode."""
    import copy

    twin = copy.deepcopy(net).eval()
    twin.norm.train()
    F.cross_entropy(twin(x), y).backward()
    return [m.weight.grad.double().numpy() for m in (twin.conv1, twin.conv2, twin.head)]


@pytest.mark.parametrize("seed", [0, 4, 5])
def test_a_kernel_that_rounding_alone_makes_regular_is_singular(seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2, (12, 8))  # 12 samples of 8 rectifiers: rank 9 at most
    kernel = codes @ codes.T + (1 - codes) @ (1 - codes).T
    assert np.linalg.matrix_rank(kernel) <= 9
    found = naswot(nn.Sequential(nn.ReLU()), torch.from_numpy(2.0 * codes - 1).float())
    assert found.flag == "singular kernel: some inputs share all their codes"


def test_gradient_scores_against_backward(batch: tuple[Tensor, Tensor]) -> None:
    net, (x, y) = Small().train(), batch
    grads = reference_gradients(net, x, y)
    weights = [m.weight.detach().double().numpy() for m in (net.conv1, net.conv2, net.head)]
    assert grad_norm(net, x, y).value == pytest.approx(sum(np.linalg.norm(g.ravel()) for g in grads), rel=1e-6)
    assert snip(net, x, y).value == pytest.approx(sum(np.abs(g * w).sum() for g, w in zip(grads, weights)), rel=1e-6)
    halves = [reference_gradients(net, x[i : i + 4], y[i : i + 4]) for i in (0, 4)]
    expected = 0.0
    for pair in zip(*halves):
        stack = np.stack(pair)
        moves = stack.std(0) > 0
        expected += math.log((np.abs(stack).mean(0)[moves] / stack.std(0)[moves]).sum())
    assert zico(net, x, y).value == pytest.approx(expected, rel=1e-5)
    assert zico(net, x, y, parts=4).value != zico(net, x, y).value
    double = grad_norm(net, x, y, loss=lambda a, b: 2 * F.cross_entropy(a, b)).value
    assert double == pytest.approx(2 * grad_norm(net, x, y).value, rel=1e-6)


def test_one_pass_for_several_gives_what_each_gives_alone(batch: tuple[Tensor, Tensor]) -> None:
    net, (x, y) = Small().train(), batch
    calls = []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    together = baseline_proxies(net, x, y, names=["naswot", "snip", "grad_norm"])
    assert len(calls) == 1
    assert {n: p.value for n, p in together.items()} == {
        "naswot": naswot(net, x).value, "snip": pytest.approx(snip(net, x, y).value, rel=1e-6),
        "grad_norm": pytest.approx(grad_norm(net, x, y).value, rel=1e-6),
    }  # fmt: skip
    net.head.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("midway")))
    assert all("midway" in proxy.flag for proxy in baseline_proxies(net, x, y, names=["naswot", "snip"]).values())


def test_counts() -> None:
    shared = nn.Linear(4, 4)
    assert params(nn.Sequential(shared, shared)).value == 20
    assert macs(Small(), torch.zeros(5, 3, 6, 6)).value == 36 * 6 * 9 * (3 + 6) + 24
    attention = nn.MultiheadAttention(4, 1, bias=False, batch_first=True)

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = attention

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x, need_weights=False)[0]

    assert macs(Attend(), torch.zeros(2, 6, 4)).value == 6 * 4 * 16 + 2 * 6 * 6 * 4  # four projections, two products of tokens


def snapshot(net: nn.Module) -> list[object]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    grads = [None if p.grad is None else p.grad.tolist() for p in net.parameters()]
    state = [v.tolist() for v in net.state_dict().values()]
    flags = [p.requires_grad for p in net.parameters()]
    return [state, grads, flags, hooks, [m.training for m in net.modules()], torch.get_rng_state().tolist()]


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_untouched(fail: bool, batch: tuple[Tensor, Tensor]) -> None:
    net = Small(fail=fail)
    net.head.eval()
    net.conv1.weight.requires_grad_(False)
    net.conv2.weight.grad = torch.full_like(net.conv2.weight, 7.0)
    inputs = batch[0].clone()
    before = snapshot(net)
    first = baseline_proxies(net, *batch)
    assert snapshot(net) == before
    assert torch.equal(batch[0], inputs)
    assert list(first) == list(PROXIES)
    for name, score in first.items():
        assert math.isnan(score.value) == (fail and name != "params"), name
        assert ("half-way" in score.flag) == (fail and name != "params"), name
    if not fail:
        assert baseline_proxies(net, *batch) == first  # no randomness left


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_flagged(value: float, batch: tuple[Tensor, Tensor]) -> None:
    net = Small()
    nn.init.constant_(net.conv2.weight, value)
    for name, score in baseline_proxies(net, *batch, names=["synflow", "naswot", "zico", "snip", "grad_norm"]).items():
        assert math.isnan(score.value), name
        assert "not finite" in score.flag, name


def test_what_cannot_be_had_is_flagged(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    line = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    assert naswot(line, x).flag == "no rectifier in the model"
    assert grad_norm(nn.Flatten(), x, y).flag.startswith(("no convolution or dense layer", "the model failed"))
    assert "the model failed: RuntimeError" in grad_norm(line, x[:, :2], y).flag
    assert snip(line, x, y[:3]).flag.startswith("the model failed: ValueError")
    assert zico(line, x[:1], y[:1]).flag == "1 inputs do not make 2 parts"
    assert zico(line, torch.zeros_like(x), y % 1).flag == "no gradient varies between the parts"
    assert "share all their codes" in naswot(Small(), x[:1].repeat(3, 1, 1, 1)).flag
    dead = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    nn.init.zeros_(dead[1].weight)
    assert synflow(dead, x).flag == "no flow reaches the output"
    assert synflow(nn.ReLU(), x).flag == "no convolution or dense layer in the model"


def test_without_targets_random_classes_stand_in(batch: tuple[Tensor, Tensor]) -> None:
    net = Small()
    assert grad_norm(net, batch[0]).value == grad_norm(net, batch[0]).value > 0
    assert math.isfinite(zico(net, batch[0]).value)


def test_random_classes_are_others_in_each_part_of_a_batch(batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    twice = torch.cat([batch[0][:4], batch[0][:4]])
    assert math.isfinite(zico(model, twice).value)  # of equal classes too, gradients would not vary at all
    assert not math.isfinite(zico(model, twice, torch.arange(8) % 4).value)


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "mobilenetv3_small_050", "convnextv2_atto", "swin_tiny_patch4_window7_224", "resnet10t", "nf_resnet26"],
)
def test_other_families_have_finite_scores(name: str) -> None:
    from capnas._timm import timm

    small = {"vit_tiny_patch16_224": {"depth": 2, "img_size": 32}, "convnextv2_atto": {"depths": (1, 1, 1, 1)}}
    swin = {"swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 24, "img_size": 32, "window_size": 4, "patch_size": 2}}
    model = timm.create_model(name, num_classes=5, **{**small, **swin}.get(name, {}))
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for key, score in baseline_proxies(model, x).items():
        assert math.isfinite(score.value), (key, score.flag)
        assert score.flag == ""


def test_errors(batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(UsageError, match="variant must be one of log, sum; got 'ln'"):
        synflow(Small(), batch[0], variant="ln")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="parts must be at least 2, got 1"):
        zico(Small(), *batch, parts=1)
    with pytest.raises(UsageError, match=r"names must be one of .*; got 'synflw'. Did you mean 'synflow'"):
        baseline_proxies(Small(), *batch, names=["synflw"])


def test_published_scores_of_nas_bench_201(shared: Path) -> None:
    """Eight cells spread over the published range: ours against the published columns (networks of the benchmark's full size)."""
    import optuna
    from capnas.search_spaces import nasbench201
    from PIL import Image
    from scipy.stats import spearmanr

    from capnas._timm import timm  # noqa: F401  (spaces import it plainly)

    with gzip.open(shared / "data/nasbench201_cifar10_dev.csv.gz", "rt") as file:
        table = sorted((r for r in csv.DictReader(file) if float(r["c10_naswot"]) > 0), key=lambda r: float(r["c10_naswot"]))
    cells = [table[i] for i in np.linspace(30, len(table) - 1, 8).astype(int)]
    archive = zipfile.ZipFile(shared / "data/cifar10_jpeg.zip")
    files = sorted(n for n in archive.namelist() if n.startswith("train/") and n.endswith(".jpg"))[:: 50_000 // 64][:64]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(n)))) for n in files])
    x = torch.tensor(pixels).permute(0, 3, 1, 2) / 255.0
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    ours: dict[str, list[float]] = {"naswot": [], "synflow": [], "log": []}
    for cell in cells:
        torch.manual_seed(0)
        trial = optuna.trial.FixedTrial(nasbench201.parameters(cell["arch"]))
        net = nasbench201.space(trial, num_classes=10, in_chans=3, image_size=32, cells=5, channels=16)
        ours["naswot"].append(naswot(net, x).value)
        ours["synflow"].append(synflow(net, x).value)
        ours["log"].append(synflow(net, x, variant="log").value)
    for name, column in (("naswot", "c10_naswot"), ("synflow", "c10_synflow"), ("log", "c10_logsynflow")):
        assert spearmanr(ours[name], [float(c[column]) for c in cells])[0] > 0.9, name
    for value, cell in zip(ours["naswot"], cells):
        if "none" not in cell["arch"]:  # the benchmark also runs edges that lead nowhere, and counts their rectifiers
            assert value == pytest.approx(float(cell["c10_naswot"]), rel=0.02)


@pytest.mark.parametrize("measure", [grad_norm, snip])
def test_no_inputs_have_no_gradient(measure) -> None:
    found = measure(nn.Linear(3, 2), torch.zeros(0, 3))
    assert math.isnan(found.value)
    assert found.flag.endswith("the batch holds no inputs.")
