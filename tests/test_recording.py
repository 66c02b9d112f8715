from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scripts import module_of
from torch import nn
from torch.nn import functional as F

from capnas._timm import timm
from capnas.errors import UsageError
from capnas.layers import feature_axis, find_blocks
from capnas.measures.moments import covariance
from capnas.measures.saturation import saturation, spectrum, threshold_margin
from capnas.recording import Recorder


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def record(model: nn.Module, *batches: torch.Tensor, mode: str = "train", **options: object) -> dict:
    with Recorder(model.train(mode == "train"), **options) as recorder, torch.no_grad():  # type: ignore[arg-type]
        for batch in batches:
            model(batch)
    return recorder.pop(mode)  # type: ignore[arg-type]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def rows_of(output: torch.Tensor) -> np.ndarray:
    return output.permute(0, 2, 3, 1).reshape(-1, output.shape[1]).detach().double().numpy()


def test_rows_are_positions_before_norm_and_activation() -> None:
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
    x = noise(4, 2, 8, 8)
    seen = record(model, x, reading="modules", values_per_call=None)["0"]
    assert (seen.moments.count, seen.rows_seen, seen.moments.width) == (4 * 36, 4 * 36, 5)
    np.testing.assert_allclose(covariance(seen.moments).numpy(), np.cov(rows_of(model[0](x)).T, bias=True), rtol=1e-4, atol=1e-6)


def test_positions_are_those_of_one_image_whatever_is_folded_into_the_batch_axis() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.inner, self.head = nn.Conv2d(2, 5, 3), nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            maps = self.conv(x)
            windows = maps.permute(0, 2, 3, 1).reshape(-1, 4, 5)  # as windowed attention does
            return self.head(self.inner(windows).reshape(len(x), -1, 7).mean(1))

    seen = record(Windows(), noise(6, 2, 8, 8), noise(3, 2, 8, 8), reading="modules", values_per_call=64)
    assert {name: found.positions for name, found in seen.items()} == {"conv": 36, "inner": 36, "head": 1}


def test_every_batch_counts_and_the_split_does_not_matter() -> None:
    model, x = nn.Sequential(nn.Linear(6, 9)), noise(50, 6)
    whole = record(model, x)["0"].moments
    parts = record(model, *x.split([30, 17, 3]))["0"].moments
    assert parts.count == 50
    torch.testing.assert_close(parts.scatter, whole.scatter, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "interval", "width", "read"),
    [
        ("train", 2, 64, [0, 2, 4]),
        ("train", 3, 64, [0, 3]),
        ("train", 2, 63, range(5)),
        ("train", 2, 90, range(5)),
        ("eval", 2, 64, range(5)),
    ],
)
def test_training_reads_wide_layers_every_nth_pass(mode: str, interval: int, width: int, read: Sequence[int]) -> None:
    model, batches = nn.Sequential(nn.Linear(6, width)), noise(450, 6).split(90)
    part = record(model, *batches, mode=mode, train_interval=interval)["0"]
    whole = record(model, torch.cat([batches[i] for i in read]))["0"]
    assert (part.calls, part.moments.count) == (len(read), 90 * len(read))
    torch.testing.assert_close(part.moments.scatter, whole.moments.scatter, rtol=1e-4, atol=1e-3)


def test_narrow_maps_are_read_every_nth_pass_with_n_times_the_rows() -> None:
    model, batches = nn.Sequential(nn.Conv2d(1, 8, 1)), noise(6 * 32, 1, 64, 64).split(32)
    often = record(model, *batches, values_per_call=2**14)["0"]
    seldom = record(model, *batches, values_per_call=2**14, train_interval=3)["0"]
    assert (often.calls, seldom.calls) == (6, 2)
    for seen in (often, seldom):
        assert seen.moments.count == pytest.approx(6 * 2**14 / 8, rel=0.2)


def test_a_module_called_twice_is_read_at_both_calls_of_a_pass() -> None:
    layer = nn.Linear(64, 64)
    assert record(nn.Sequential(layer, nn.ReLU(), layer), *noise(240, 64).split(80), train_interval=2)["0"].calls == 4


def test_an_interval_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match=r"every pass.* or more, got 0"):
        Recorder(nn.Linear(2, 2), train_interval=0)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x)


@pytest.mark.parametrize("shape", [(3, 7, 6), (3, 5, 7, 6)], ids=["all tokens, not the last one", "NHWC maps keep their last axis"])
def test_linear_layers_read_the_last_axis(shape: tuple[int, ...]) -> None:
    model, x = Tokens(), noise(*shape)
    seen = record(model, x, reading="modules")["mlp"]
    assert (seen.moments.count, seen.moments.width) == (x.numel() // 6, 4)
    expected = np.cov(model(x).detach().double().reshape(-1, 4).numpy().T, bias=True)
    np.testing.assert_allclose(covariance(seen.moments).numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("layer", "shape", "width"),
    [(nn.Conv1d(2, 5, 3), (4, 2, 9), 5), (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4), 3), (nn.ConvTranspose2d(2, 6, 2), (2, 2, 4, 4), 6),
     (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 6), 8), (nn.Conv2d(2, 5, 3), (2, 7, 6), 5)],
    ids=["1-d", "3-d", "transposed", "grouped", "unbatched image is no sequence"],
)  # fmt: skip
def test_every_kind_of_convolution(layer: nn.Module, shape: tuple[int, ...], width: int) -> None:
    model = nn.Sequential(layer)
    seen = record(model, noise(*shape), reading="modules")["0"]
    output = layer(noise(*shape))
    assert seen.moments.width == width
    assert seen.moments.count == output.numel() // width


def test_channels_last_and_bfloat16_give_the_same_rows() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3)), noise(4, 3, 8, 8)
    plain = record(model, x, reading="modules")["0"].moments
    last = record(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), reading="modules")["0"].moments
    torch.testing.assert_close(plain.scatter, last.scatter, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = record(model, x, reading="modules")["0"].moments
    torch.testing.assert_close(plain.scatter, half.scatter, rtol=0.05, atol=2)


def test_train_and_eval_are_kept_apart_and_a_train_only_epoch_is_fine() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with Recorder(model, reading="modules") as recorder:
        model.train()(noise(8, 4))
        model.eval()(noise(5, 4))
        assert recorder.pop("train")["0"].moments.count == 8
        assert recorder.pop("train") == {}
        model.train()(noise(2, 4))
        assert recorder.pop("eval")["0"].moments.count == 5
        assert recorder.pop("train")["0"].moments.count == 2
    with pytest.raises(UsageError, match="mode must be one of eval, train; got 'test'"):
        recorder.pop("test")  # type: ignore[arg-type]


def test_hooks_come_off_and_nothing_stays_on_the_modules() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    before = {n: set(vars(m)) for n, m in model.named_modules()}
    recorder = Recorder(model)
    with pytest.raises(RuntimeError, match="expected"), recorder:
        model(noise(2, 3, 3))
    with recorder:
        assert hooks(model) > 0
    assert hooks(model) == 0
    assert {n: set(vars(m)) for n, m in model.named_modules()} == before


@pytest.mark.parametrize("saved", [False, True], ids=["copied", "saved"])
def test_a_copy_made_while_a_model_is_recorded_is_another_model(saved: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    with Recorder(model, blocks="1") as recorder:
        if saved:  # the reference tool's hooks cannot be saved, and those of a copy write into the original's sums
            torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False) if saved else copy.deepcopy(model)
        model(noise(5, 3))
        assert torch.equal(other(noise(7, 3)), model(noise(7, 3)))
    assert {name: row.rows for name, row in recorder.pop("train").items()} == {"0": 12, "1": 12, "block:1": 12}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_are_flagged(value: float) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4)), noise(6, 3)
    x[2, 1] = value
    seen = record(model, noise(6, 3), x)["0"]
    assert not seen.finite


def test_constant_layer_far_from_zero_has_no_variance() -> None:
    layer = nn.Linear(3, 4)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, 1234.567)
    seen = record(nn.Sequential(layer), noise(100, 3), noise(77, 3), reading="modules")["0"]
    assert saturation(covariance(seen.moments)) == 0


@pytest.mark.parametrize("level", [0.0, 1e3, 1e5])
def test_what_varies_little_beside_its_mean_still_varies(level: float) -> None:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
        layer.bias.fill_(level)
    seen = record(layer, noise(200, 4))[""]
    assert saturation(covariance(seen.moments)) == 1.0
    assert seen.moments.scatter.trace() / 800 == pytest.approx(1.0, rel=0.1)


def test_sampling_is_seeded_bounded_and_close() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1)), noise(64, 3, 32, 32)
    every = record(model, x, reading="modules", values_per_call=None)["0"]
    some = record(model, x, reading="modules", values_per_call=2**15)["0"]
    again = record(model, x, reading="modules", values_per_call=2**15)["0"]
    other = record(model, x, reading="modules", values_per_call=2**15, seed=1)["0"]
    assert some.rows_seen == every.rows_seen == 64 * 1024
    assert some.moments.count <= 2 * 2**15 / 24
    assert torch.equal(some.moments.scatter, again.moments.scatter)
    assert not torch.equal(some.moments.scatter, other.moments.scatter)
    assert saturation(covariance(some.moments)) == pytest.approx(saturation(covariance(every.moments)), abs=0.05)


def test_sampled_positions_cover_every_column() -> None:
    columns = torch.arange(32.0).expand(4, 1, 32, 32).contiguous()
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    few = [record(model, columns, reading="modules", values_per_call=256, seed=seed)["0"] for seed in range(4)]
    every = record(model, columns, reading="modules", values_per_call=None)["0"]
    assert all(seen.moments.count < every.moments.count / 8 for seen in few)
    for seen in few:  # a lattice in step with the map's width would see one value and no variance
        assert float(covariance(seen.moments)) == pytest.approx(float(covariance(every.moments)), rel=0.1)


def test_layer_called_twice_is_summed_and_checkpointing_counts_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(self.mix(x))

    assert record(Twice(), noise(5, 4))["mix"].moments.count == 10
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with Recorder(model, reading="modules") as recorder:
        checkpoint(model, noise(5, 4).requires_grad_(), use_reentrant=False).sum().backward()
    assert recorder.pop("train")["0"].moments.count == 5

    wide = nn.Sequential(nn.Linear(4, 64))
    with Recorder(wide, reading="modules", train_interval=2) as recorder:
        for batch in noise(360, 4).split(90):  # what runs again is no pass of its own
            checkpoint(wide, batch, use_reentrant=False).sum().backward()
    assert recorder.pop("train")["0"].calls == 2


def test_no_bound_takes_a_layer_below_three_rows_a_feature() -> None:
    seen = record(nn.Sequential(nn.Conv2d(1, 64, 1)), noise(8, 1, 32, 32), values_per_call=64)["0"]
    assert 3 * 64 <= seen.rows < 4 * 64


@pytest.mark.parametrize(
    ("name", "kinds", "count"),
    [("resnet18", {"BasicBlock"}, 8), ("vgg11_bn", {"ReLU"}, 8), ("efficientnet_b0", {"DepthwiseSeparableConv", "InvertedResidual"}, 16),
     ("vit_tiny_patch16_224", {"Block"}, 12), ("swin_tiny_patch4_window7_224", {"SwinTransformerBlock"}, 12),
     ("maxvit_rmlp_pico_rw_256", {"MaxxVitBlock"}, 11), ("poolformer_s12", {"MetaFormerBlock"}, 12), ("densenet121", {"DenseLayer"}, 58)],
)  # fmt: skip
def test_blocks_of_timm_families(name: str, kinds: set[str], count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    modules = dict(model.named_modules())
    found = list(find_blocks(model))
    assert len(found) == count
    assert {type(modules[n]).__name__ for n in found} == kinds


def test_block_features_are_found_in_both_layouts() -> None:
    shape = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    swin = timm.create_model("swin_tiny_patch4_window7_224", **shape)
    assert [r.moments.width for r in record(swin, noise(2, 3, 32, 32), reading="blocks").values()] == [12, 24]
    convnext = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    assert [r.moments.width for r in record(convnext, noise(2, 3, 64, 64), reading="blocks").values()] == [8, 16, 24, 32]


class Residual1d(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv1d(width, width, 3, padding=1), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.act(self.conv(x))


def test_blocks_of_sequences_are_read_along_their_channels() -> None:
    model = nn.Sequential(nn.Conv1d(2, 6, 3, padding=1), nn.Sequential(Residual1d(6), Residual1d(6)))
    x = noise(16, 2, 40)
    seen = record(model, x, reading="blocks", values_per_call=None)
    assert [(name, r.moments.width, r.moments.count, r.positions) for name, r in seen.items()] == [
        ("block:1.0", 6, 640, 40), ("block:1.1", 6, 640, 40)
    ]  # fmt: skip
    with torch.no_grad():
        rows = model(x).movedim(1, -1).flatten(0, 1).double()
    np.testing.assert_allclose(covariance(seen["block:1.1"].moments).numpy(), np.cov(rows.numpy().T, bias=True), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "widths", "axis"),
    [((2, 6, 40), {6}, 1), ((2, 40, 6), {6}, -1), ((2, 6, 6), {6}, -1), ((2, 6, 40), {6, 40}, -1), ((2, 6, 40), {5}, -1), ((2, 6), {6}, -1),
     ((2, 6, 4, 5), {6}, 1), ((2, 4, 5, 6), {6}, -1), ((2, 6, 5, 6), {6}, 1)],
)  # fmt: skip
def test_widths_tell_channels_from_positions(shape: tuple[int, ...], widths: set[int], axis: int) -> None:
    assert feature_axis(torch.zeros(shape), frozenset(widths), False) == axis


def test_blocks_by_pattern() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    assert list(find_blocks(model, r"0\.1")) == ["0.1"]
    assert set(record(model, noise(3, 4), blocks=r"0\.1", reading="blocks")) == {"block:0.1"}
    with pytest.raises(UsageError, match=r"^blocks must be a regular expression, '\(' is none: missing \), unterminated subpattern"):
        record(model, noise(3, 4), blocks="(")
    with pytest.raises(UsageError, match=r"full-matches the block pattern 'stage'; names look like 0, 0\.0"):
        list(find_blocks(model, "stage"))
    with pytest.raises(UsageError, match="reading must be one of blocks, both, modules"):
        Recorder(model, reading="all")  # type: ignore[arg-type]


# --------------------------------------------------------- reference numbers


def load_models(shared: Path) -> ModuleType:
    return module_of(shared / "tools" / "bench_saturation_overhead.py")


def fill(model: nn.Module) -> nn.Module:
    g = np.random.default_rng(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            z = g.standard_normal(tuple(p.shape))
            scaled = z * np.sqrt(2 / np.prod(p.shape[1:])) if p.dim() > 1 else 1 + 0.1 * z if name.endswith("weight") else 0.1 * z
            p.copy_(torch.from_numpy(np.asarray(scaled)))
    return model


def images(n: int) -> torch.Tensor:
    g = np.random.default_rng(1)
    coarse = g.standard_normal((n, 3, 8, 8)).repeat(4, 2).repeat(4, 3)
    return torch.from_numpy((coarse + 0.1 * g.standard_normal((n, 3, 32, 32))).astype(np.float32))


def vectors(n: int, seed: int = 1) -> torch.Tensor:
    g = np.random.default_rng(seed)
    return torch.from_numpy((g.standard_normal((n, 8)) @ g.standard_normal((8, 32)) + 0.05 * g.standard_normal((n, 32))).astype(np.float32))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["mlp", "vgg8", "resnet18_8"])
def test_reference_models(shared: Path, name: str, mode: str) -> None:
    tool = load_models(shared)
    reference = json.loads((shared / "theory" / "saturation_reference.json").read_text())["cases"][f"{name}/{mode}"]
    model = fill({"mlp": mlp, "vgg8": lambda: tool.VGGLike(8), "resnet18_8": lambda: tool.ResNet18Like(8)}[name]())
    seen = record(model, vectors(256) if name == "mlp" else images(32), mode=mode, reading="modules", values_per_call=None)
    assert set(seen) == set(reference["layers"])
    shares = [[saturation(covariance(found.moments), legacy=legacy) for found in seen.values()] for legacy in (False, True)]
    assert np.mean(shares[0]) == pytest.approx(reference["mean_saturation_textbook"], rel=1e-12)
    assert np.mean(shares[1]) == pytest.approx(reference["mean_saturation_delve"], rel=1e-12)
    compared = 0
    for layer, expected in reference["layers"].items():
        spec = spectrum(covariance(seen[layer].moments))
        assert seen[layer].moments.count == expected["rows"]
        assert spec.total == pytest.approx(expected["trace"], rel=1e-4)
        for threshold, row in expected["per_delta"].items():
            if min(row["margin"], threshold_margin(spec, float(threshold))) < 1e-4:
                continue  # a knife edge: the share is within rounding of the threshold
            compared += 1
            assert saturation(covariance(seen[layer].moments), float(threshold)) * spec.width == pytest.approx(row["textbook_k"])
            legacy = saturation(covariance(seen[layer].moments), float(threshold), legacy=True)
            assert legacy * spec.width == pytest.approx(row["delve_idim"])
    assert compared >= 12


def test_reference_three_batches(shared: Path) -> None:
    reference = json.loads((shared / "theory" / "saturation_reference.json").read_text())["three_batches_mlp"]["layers"]
    model = fill(mlp())
    batches = [vectors(200, 1), vectors(200, 2), vectors(20, 3)]
    for split in (batches, torch.cat(batches).split(111)):
        seen = record(model, *split, reading="modules")
        for layer, expected in reference.items():
            moments = seen[layer].moments
            assert moments.count == expected["rows_all"]
            assert round(saturation(covariance(moments)) * moments.width) == expected["textbook_all"]


@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_few_rows_are_decomposed_on_their_own_side(decay: float) -> None:
    model = nn.Linear(20, 300, bias=False)
    x = torch.randn(60, 20, generator=torch.Generator().manual_seed(0)) * decay ** torch.arange(20) + 5
    with torch.no_grad(), Recorder(model, reading="modules", values_per_call=None) as recorder:
        for few in x.split(20):
            model(few)
        record = recorder.pop("train")[""]
        every = torch.cat([model(few) for few in x.split(20)]).double()
        assert recorder.pop("train")[""].covariance.shape == (60, 60)
        for few in x.repeat(4, 1).split(20):
            model(few)
        most = recorder.pop("train")[""]
        for few in x.repeat(6, 1).split(20):
            model(few)
        many = recorder.pop("train")[""]
    assert record.covariance.shape == (60, 60)
    assert most.covariance.shape == (240, 240)  # the cheaper side still
    assert many.covariance.shape == (300, 300)  # folded once they were no longer few
    exact = torch.linalg.eigvalsh(torch.cov(every.T, correction=0))
    for found in (record.covariance, most.covariance, many.covariance, covariance(record.moments)):
        kept = torch.linalg.eigvalsh(found)[-20:]
        torch.testing.assert_close(kept, exact[-20:], rtol=1e-5, atol=1e-6 * float(exact[-1]))
    torch.testing.assert_close(record.moments.mean, every.mean(0), rtol=1e-5, atol=1e-5)


def test_a_compiled_model_is_recorded_as_it_was_before_and_a_scripted_one_is_refused() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 2)), noise(8, 1, 8, 8)
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph)
    with Recorder(compiled, reading="modules", train_interval=2) as recorder, torch.no_grad():
        for _ in range(3):
            compiled(x)
    assert not graphs
    compiled(x)
    assert len(graphs) == 1, "it compiles again outside"
    found = recorder.pop("train")
    assert {name: record.rows for name, record in found.items()} == {"0": 2 * 288, "3": 3 * 8}
    assert not hooks(model)
    with pytest.raises(UsageError, match=r"got a torch\.jit\.ScriptModule"):
        Recorder(torch.jit.script(model))


def test_double_precision_far_from_zero_is_not_constant() -> None:
    layer = nn.Linear(3, 4).double()
    nn.init.constant_(layer.bias, 1e8)
    with torch.no_grad():
        output = layer(noise(100, 3).double())
    got = record(nn.Sequential(layer), noise(100, 3).double())["0"]
    np.testing.assert_allclose(got.covariance.numpy(), np.cov(output.numpy().T, bias=True), atol=1e-6)
    nn.init.zeros_(layer.weight)
    assert not record(nn.Sequential(layer), noise(100, 3).double())["0"].covariance.any()


class Reads(nn.Module):
    """Multiplies with the weights of a layer and a convolution that it does not call; of a third layer with and without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.plain, self.idle = nn.Conv2d(2, 4, 3), nn.Linear(4, 6), nn.Linear(6, 6)
        self.both = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
        self.modes: list[int] = []
        self.failing: type[BaseException] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes.append(torch._C._len_torch_function_stack())
        maps = F.conv2d(x, weight=self.conv.weight)
        F.conv_transpose2d(maps, self.conv.weight)  # another product than the layer's
        tokens = F.linear(maps.flatten(2).transpose(1, 2), self.plain.weight, self.plain.bias)
        if self.failing:
            raise self.failing
        return self.both(tokens).mean(1)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_layer_whose_weight_is_used_without_a_call_is_read_there(mode: str) -> None:
    model, batches = Reads(), [noise(4, 2, 8, 8, seed=i) for i in range(3)]
    found = record(model, *batches, mode=mode, reading="modules", values_per_call=None)
    assert list(found) == ["conv", "plain", "both"]
    with torch.no_grad():
        maps = torch.cat([F.conv2d(x, model.conv.weight) for x in batches])
        rows = {"conv": rows_of(maps), "plain": rows_of(F.linear(maps.movedim(1, -1), model.plain.weight, model.plain.bias).movedim(-1, 1))}
    for name, expected in rows.items():
        assert (found[name].rows, found[name].calls, found[name].positions) == (12 * 36, 3, 36)
        np.testing.assert_allclose(found[name].covariance.numpy(), np.cov(expected.T, bias=True), rtol=1e-4, atol=1e-6)
    assert found["both"].calls == 3
    assert not hooks(model)
    every = record(model, *batches * 2, mode=mode, reading="modules", train_interval=2, values_per_call=256)["plain"]
    assert every.calls == (3 if mode == "train" else 6)


def test_nothing_is_looked_for_after_a_first_pass_without_products_outside_of_layers() -> None:
    model, layer = Reads(), nn.Linear(2, 3)
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(144, 6))
    plain.register_forward_pre_hook(lambda *_: model.modes.append(torch._C._len_torch_function_stack()))
    before = hooks(plain)
    with Recorder(plain):
        plain.register_forward_pre_hook(lambda *_: model.modes.append(torch._C._len_torch_function_stack()))
        for _ in range(3):
            plain(noise(4, 2, 8, 8))
    assert model.modes[1::2] == [1, 0, 0]
    assert hooks(plain) == before + 1
    assert record(layer, noise(5, 2))[""].rows == 5


@pytest.mark.parametrize("failing", [ValueError, KeyboardInterrupt])
def test_no_mode_is_left_where_a_pass_ends_early(failing: type[BaseException]) -> None:
    model, x = Reads(), noise(4, 2, 8, 8)
    model.failing = failing
    with pytest.raises(failing):
        record(model, x)
    assert not torch._C._len_torch_function_stack()
    assert not hooks(model)
    with Recorder(model, reading="modules") as recorder:
        with pytest.raises(failing):
            model(x)
        model.failing = None
        model(x)
    assert recorder.pop("train")["plain"].calls == 2
    assert model.modes == [1, 1, 1]
    assert not hooks(model)
