"""What a profile says of its own limits: flags of scores, reasons for empty columns, the method behind a capacity, gradients anywhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import small_cnn
from torch import Tensor, nn

from capnas._timm import timm
from capnas.capacity import capacity_map
from capnas.capacity.exact import affordable
from capnas.errors import UsageError
from capnas.graph.tracing import trace
from capnas.profile import MEASURES, enrich, profile_model
from capnas.recording import DirectProducts
from capnas.scoring import score
from capnas.weights import InitialWeights

CLASSES = torch.arange(16) % 2


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def dense(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(widths[:-1])]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.act, self.head = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.act(self.branch(x)))


class Tied(nn.Module):
    """Its second layer has the weight of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tied, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.tied.weight = self.stem.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.tied(torch.relu(self.stem(x)))))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.head, self.spare = nn.Linear(6, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 2), nn.Linear(3, 3)
        self.mixing = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.stem(x) @ self.mixing.weight).unsqueeze(0)
        return self.head((x + self.attention(x, x, x)[0])[0])


def test_a_remark_on_the_norms_goes_with_what_it_was_about() -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), noise(8, 1, 2, 2)
    profile = profile_model(model, x, measures=("saturation",))
    stale = dataclasses.replace(profile, flags={"log10_lipschitz": "of before", "other": "stays"})
    assert enrich(stale, model, x, measures=("norms",)).flags == {"other": "stays"}


def test_a_remark_goes_with_the_measure_that_made_it() -> None:
    model, x = Residual(), noise(16, 8)
    stale = dataclasses.replace(profile_model(model, x), flags=dict.fromkeys(("scaling", "coverage", "propagation", "params"), "of before"))
    again = enrich(stale, model, x, measures=("structure", "capacity"))
    assert "of before" not in again.flags.values()


def test_a_trace_of_several_images_gives_the_costs_of_one() -> None:
    model, x = small_cnn(), noise(4, 3, 32, 32)
    for measures in (("structure",), ("structure", "proxies"), ("proxies",)):
        one, two = (
            profile_model(model, x, CLASSES[:4], measures=measures, graph=trace(model, (images, 3, 32, 32)), blocks=r"\d")
            for images in (1, 2)
        )
        assert two.network["macs"] == one.network["macs"] > 0
        for reading in ("layers", "blocks"):
            assert [row.macs for row in getattr(two, reading)] == [row.macs for row in getattr(one, reading)]


def test_scores_by_blocks_take_the_layers_of_each_block_alone() -> None:
    model, x = dense(*[6] * 12, 2), noise(24, 6)  # 11 blocks: the name of the second begins that of the last
    profile = profile_model(model, x, measures=("capacity",), mode="eval", exact_capacity=False)
    found = capacity_map(model, x, mode="eval", exact=False)
    assert len(profile.blocks) == 11
    own = [[name for name in found.capacity if name.split(".")[0] == block.name] for block in profile.blocks]
    scores = found.scores(own)
    assert {name: profile.network[name] for name in scores} == pytest.approx(scores, nan_ok=True)


def test_a_layer_that_is_no_product_says_so_once() -> None:
    class Scaling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.sum() + self.bias

    skipped = profile_model(nn.Sequential(Scaling(4, 4), nn.Linear(4, 2)), noise(8, 4), measures=("norms",)).skipped
    assert skipped == {"0": "norm: Scaling computes something else than a product with one weight"}


def test_a_coherent_share_within_the_noise_bounds_propagation_and_is_said() -> None:
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = timm.create_model("resnet18", channels=(16, 16, 32, 32), num_classes=10)
        x = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        found.append(profile_model(model, x, mode="train", measures=("capacity",), pixels=False))
    assert len({profile.network["coherent"] < 0 for profile in found}) == 2  # it is noise
    values = [profile.network["propagation"] for profile in found]
    assert max(values) < 1.1 * min(values)
    assert all("noise of 64 images" in profile.flags["propagation"] for profile in found)
    clear = profile_model(Residual(), noise(64, 8), measures=("capacity",))
    assert clear.network["shattering"] == pytest.approx(-math.log(clear.network["coherent"]))
    assert "propagation" not in clear.flags


def test_flags_say_why_a_score_is_not_a_number() -> None:
    plain, residual = (profile_model(model, noise(16, 8), measures=("capacity",)) for model in (dense(8, 8, 2), Residual()))
    assert {name for name in ("scaling", "capacity_slack") if math.isnan(score(plain)[name])} <= set(plain.flags)
    assert "no residual additions" in plain.flags["scaling"]
    assert "scaling" not in residual.flags
    assert "training" in residual.flags["capacity_slack"]
    model = Residual()
    trained = enrich(profile_model(model, noise(16, 8)), model, noise(16, 8), measures=("capacity",), start=InitialWeights.of(model))
    assert trained.network["capacity_slack"] == 1  # nothing moved
    assert "capacity_slack" not in trained.flags
    assert "capacity_slack" not in enrich(trained, model, noise(16, 8), measures=("capacity",)).flags  # known from before
    assert [row.receptive_field for row in trained.layers] == [None, None]  # vectors have none


def test_coverage_of_a_near_linear_network_is_said_to_assume_full_decoupling() -> None:
    model, x = Residual(), noise(40, 8)
    profile, found = profile_model(model, x, measures=("capacity",), mode="eval"), capacity_map(model, x, mode="eval")
    assert found.near_linear
    assert "assumes full decoupling" in profile.flags["coverage"]
    for number in (found.coherent, found.decoupling["act"].out):
        assert f"{number:.2f}" in profile.flags["coverage"]


@pytest.mark.parametrize(
    ("measures", "lacking"),
    [(("structure",), "complexity, receptive field"), (("capacity",), "capacity"), (MEASURES, "complexity, receptive field, capacity")],
)
def test_every_absent_measure_of_a_shared_weight_is_explained(measures: tuple[str, ...], lacking: str) -> None:
    profile = profile_model(Tied(), noise(16, 6), CLASSES, measures=measures)
    assert dict(profile.skipped) == {"tied": f"{lacking}: Linear shares stem.weight"}
    again = enrich(profile, Tied(), noise(16, 6), CLASSES, measures=MEASURES)
    assert dict(again.skipped) == {"tied": "complexity, receptive field, capacity: Linear shares stem.weight"}


def test_a_weight_that_a_function_reads_is_not_said_to_be_idle() -> None:
    skipped = profile_model(Attends(), noise(16, 6)).skipped
    assert "another module or function uses mixing.weight" in skipped["mixing"]
    assert skipped["spare"] == "Linear was never called in the forward pass"


@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_attention_has_saturation_behind_its_output_projection(batch_first: bool) -> None:
    model, x = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first).eval(), noise(6, 6, 8)
    profile = profile_model(model, x, mode="eval")
    with torch.no_grad():
        outputs = model.self_attn(x, x, x)[0].flatten(0, 1).double().numpy()
    shares = np.linalg.eigvalsh(np.cov(outputs.T, bias=True))[::-1].cumsum()
    row = profile.layers[0]
    assert [r.name for r in profile.layers] == ["self_attn.out_proj", "linear1", "linear2"]
    assert (row.rows, row.k) == (36, 1 + int((shares / shares[-1] < 0.99).sum()))
    assert row.macs == 6 * 64
    with torch.no_grad(), DirectProducts(model, {"self_attn.out_proj": lambda layer, inputs, output: torch.zeros_like(output)}):
        assert torch.equal(model(x), without := model.norm2((y := model.norm1(x)) + model._ff_block(y)))
    assert not torch.equal(model(x), without)


def test_a_layer_whose_weight_its_attention_multiplies_with_has_every_measure() -> None:
    sizes = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 3}
    model, x = timm.create_model("beit_base_patch16_224", **sizes).eval(), noise(4, 3, 32, 32)
    tokens: list[Tensor] = []
    model.blocks[0].norm1.register_forward_hook(lambda _, args, output: tokens.append(output.detach()))
    profile = profile_model(model, x, CLASSES[:4], measures=MEASURES)
    qkv = model.blocks[0].attn.qkv
    outputs = (tokens[0] @ qkv.weight.detach().T).flatten(0, 1).double().numpy()  # its biases are 0, and constants anyway
    shares = np.linalg.eigvalsh(np.cov(outputs.T, bias=True))[::-1].cumsum()
    row = next(row for row in profile.layers if row.name == "blocks.0.attn.qkv")
    assert [r.name for r in profile.layers].index(row.name) == 1
    assert (row.rows, row.k, row.macs) == (20, 1 + int((shares / shares[-1] < 0.99).sum()), 5 * 24 * 72)
    assert row.norm == pytest.approx(float(torch.linalg.matrix_norm(qkv.weight.detach(), 2)), rel=1e-3)
    assert None not in (row.complexity, row.capacity, row.utilisation)
    assert not {row.name, "blocks.0.attn.proj"} & profile.skipped.keys()
    assert sum(r.macs or 0 for r in profile.layers) + 2 * 5 * 5 * 24 == profile.network["macs"]


def test_capacity_is_exact_where_that_is_cheap_and_the_rows_say_so() -> None:
    small, x = dense(5, 4, 2), noise(40, 5)

    def methods(model: nn.Module, **options: bool) -> set[str | None]:
        return {row.capacity_method for row in profile_model(model, x, measures=("capacity",), mode="eval", **options).layers}

    assert methods(small) == {"exact"}
    assert methods(small, exact_capacity=False) == {"k-fac"}
    large = dense(5, 50, 50)  # 2,800 parameters
    assert methods(large, exact_capacity=True) == methods(large) == {"k-fac"}
    between = dense(5, 12, 40)
    assert not affordable({"": sum(p.numel() for p in between.parameters())}, 40 * 40)
    assert methods(between) == {"k-fac"}
    assert methods(between, exact_capacity=True) == {"exact"}
    profile = profile_model(small, x, measures=("capacity",), mode="eval")
    assert [row.capacity for row in profile.layers] == list(capacity_map(small, x, mode="eval", exact=True).capacity.values())


@pytest.mark.parametrize("initialize", [False, True])
def test_inference_mode_changes_no_measure(initialize: bool) -> None:
    model, x = small_cnn(), noise(16, 3, 32, 32)
    plain = profile_model(model, x, CLASSES, measures=MEASURES, mode="train", initialize=initialize)
    with torch.inference_mode():
        inside = profile_model(model, x.clone(), CLASSES.clone(), measures=MEASURES, mode="train", initialize=initialize)
        assert torch.is_inference_mode_enabled()
    assert inside.to_dict() == plain.to_dict()


def test_a_model_made_in_inference_mode_is_refused_where_gradients_are_needed() -> None:
    x = noise(16, 3, 32, 32)
    with torch.inference_mode():
        model = small_cnn()
        assert profile_model(model, x).measures == ("saturation", "structure")
        with pytest.raises(UsageError, match=r"made under torch\.inference_mode.* Build or load it outside"):
            profile_model(model, x, measures=("capacity",))
        with pytest.raises(UsageError, match=r"made under torch\.inference_mode"):
            profile_model(model, x, CLASSES, measures=("proxies",))
    with pytest.raises(UsageError, match=r"made under torch\.inference_mode"):
        profile_model(model, x)


@pytest.mark.parametrize("kind", [list, np.array, lambda y: torch.tensor(y, dtype=torch.int32)])
def test_classes_may_be_any_whole_numbers(kind: Callable) -> None:
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.randn(6, 3, 2, 2), [0, 1, 2, 0, 1, 2]
    expected = profile_model(net, x, torch.tensor(y), measures=("saturation", "proxies"))
    found = profile_model(net, x, kind(y), measures=("saturation", "proxies"))
    assert score(found) == pytest.approx(score(expected), nan_ok=True)
    assert all(math.isfinite(v) for v in (score(found)[name] for name in ("snip", "grad_norm")))
