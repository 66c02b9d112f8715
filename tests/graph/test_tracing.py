from __future__ import annotations

import copy
import random
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import Attention, CalledTwice, Counts, Functional, InPlace, Raises, Residual, Shared, small_cnn
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from capnas._timm import timm
from capnas.errors import UsageError
from capnas.graph.dataflow import INPUT, Node, Trace, is_shape_only
from capnas.graph.tracing import trace

FAMILIES = [
    ("resnet18", {}, 32),
    ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}, 32),
    ("convnext_atto", {}, 32),
    ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (2, 2), "num_heads": (3, 6)}, 56),
    ("densenet121", {"block_config": (2, 2)}, 32),
    ("efficientnet_b0", {}, 32),
    ("maxvit_rmlp_pico_rw_256", {"img_size": 64}, 64),
]


def only(graph: Trace, op: str) -> list[Node]:
    return [n for n in graph.nodes if n.op.startswith(f"aten.{op}.")]


def test_inference_mode_leaves_no_trace() -> None:
    model = small_cnn()
    plain = trace(model, (1, 3, 8, 8))
    with torch.inference_mode():
        assert trace(model, (1, 3, 8, 8)) == plain
        assert len(trace(small_cnn(), (1, 3, 8, 8)).nodes) == len(plain.nodes)


def test_residual_block_dataflow() -> None:
    conv, norm, relu, add = trace(Residual(), (2, 4, 6, 6)).nodes
    assert [n.op for n in (conv, norm, relu, add)] == [
        "aten.convolution.default",
        "aten.native_batch_norm.default",
        "aten.relu_.default",
        "aten.add.Tensor",
    ]
    assert (conv.inputs, conv.input_names, conv.input_params) == ((INPUT, None), ("input", "weight"), (None, "conv.weight"))
    assert (conv.module, norm.module, relu.module) == ("conv", "norm", "")
    assert norm.params == ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    assert norm.attrs["training"] is False
    assert norm.attrs["eps"] == pytest.approx(1e-5)
    assert relu.inputs == (norm.index,)
    assert add.inputs == (INPUT, relu.index), "the reader of an in-place result must see the in-place node"
    assert (add.input_shapes, add.shape) == (((2, 4, 6, 6), (2, 4, 6, 6)), (2, 4, 6, 6))
    assert conv.attrs == {
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "transposed": False,
        "output_padding": (0, 0),
        "groups": 1,
    }
    assert conv.flops == 2 * (2 * 4 * 6 * 6) * (4 * 3 * 3)  # two for each multiply-accumulate


def test_module_called_twice_and_shared_names() -> None:
    first, second = only(trace(CalledTwice(), (1, 6)), "addmm")
    assert (first.module, first.call, second.module, second.call) == ("mix", 0, "mix", 1)
    assert first.params == second.params == ("mix.bias", "mix.weight"), "the transposed weight keeps its name"
    graph = trace(Shared(), (1, 6))
    assert only(graph, "mm")[0].module == "first"
    assert only(graph, "addmm")[0].params == ("third.bias", "first.weight")


def test_functional_code_constants_and_dead_branch() -> None:
    graph = trace(Functional(), (1, 3, 16, 16))
    dead, conv = only(graph, "convolution")
    assert dead.index not in graph.live()
    assert conv.index in graph.live()
    assert conv.params == ("weight",)
    assert conv.attrs["stride"] == (2, 2)
    assert only(graph, "mul")[0].params == ("scale",)
    (arange,) = only(graph, "arange")
    assert arange.index in graph.live() - graph.fed()
    assert arange.attrs["end"] == 5.0
    (pool,) = only(graph, "max_pool2d_with_indices")
    assert pool.attrs["kernel_size"] == (2, 2)
    assert pool.shapes == ((1, 5, 3, 3), (1, 5, 3, 3))


def test_views_written_in_place_reach_the_readers_of_the_base() -> None:
    graph = trace(InPlace(), (1, 4, 5, 5))
    (write,), (relu,), (split,), (cat,) = only(graph, "add_"), only(graph, "relu_"), only(graph, "split"), only(graph, "cat")
    assert split.inputs == (write.index,), "the base was written through a view"
    assert cat.inputs[1] == relu.index
    assert cat.input_names == ("tensors", "tensors")
    assert graph.nodes[graph.output[0]].inputs[0] == cat.index
    view = graph.nodes[graph.nodes[graph.output[0]].inputs[1] or 0]
    assert view.inputs == (relu.index,)
    assert only(graph, "mul")[0].attrs["other"] == 2, "a number in the place of a tensor is an attribute"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_buffer_written_in_the_forward(device: str) -> None:
    model = Counts().to(device)
    total, add, mul = trace(model, (2, 3)).nodes
    assert (add.op, add.inputs, add.params) == ("aten.add_.Tensor", (None, total.index), ("count",))
    assert mul.inputs == (INPUT, add.index)
    assert model.count.is_meta or not model.count.any(), "the buffer itself is not written"


def test_ports_attention_and_shape_only() -> None:
    graph = trace(Attention(), (1, 5, 8))
    ports = {n.input_ports for n in graph.nodes if n.inputs and graph.nodes[n.inputs[0] or 0].op == "aten.split.Tensor"}
    assert ports == {(0,), (1,), (2,)}
    assert sum("softmax" in n.op for n in graph.nodes) == 1, "attention is decomposed"
    assert sum(n.flops for n in graph.nodes) == 2 * (5 * 8 * 24 + 2 * 5 * 5 * 8)
    addmm = only(graph, "addmm")[0]
    reader = next(n for n in graph.nodes if n.index > addmm.index and not n.shape_only)
    assert graph.source(reader.inputs[0]) == addmm.index
    assert is_shape_only("aten.view.default")
    assert not is_shape_only("aten.relu.default")
    assert not is_shape_only("prim.device.default")


def test_what_writes_to_its_argument() -> None:
    class Shifts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bits = x.long() << 1
            bits <<= 1
            return (bits + 1).relu_()

    writing = {n.op.split(".")[1]: n.writes for n in trace(Shifts(), (1, 4)).nodes if not n.shape_only}
    assert writing == {"__lshift__": False, "__ilshift__": True, "add": False, "relu_": True}


@pytest.mark.parametrize(("name", "options", "size"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_timm_families(name: str, options: dict, size: int) -> None:
    model = timm.create_model(name, num_classes=7, **options)
    real = trace(model, (1, 3, size, size))
    meta = trace(copy.deepcopy(model).to("meta"), (1, 3, size, size))
    assert real.nodes[real.output[0]].shape == (1, 7)
    assert {p for n in real.nodes for p in n.params} >= {n for n, _ in model.named_parameters()}
    assert all(i is None or INPUT <= i < n.index for n in real.nodes for i in n.inputs)
    assert real.output[0] in real.fed()
    assert real == meta
    model = model.to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    assert sum(n.flops for n in real.nodes) == sum(n.flops for n in meta.nodes) == counter.get_total_flops()


def snapshot(model: nn.Module) -> dict:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "ids": [id(p) for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "grads": [(p.requires_grad, p.grad) for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()],
        "global": (len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)),
        "rng": torch.get_rng_state(),
        "fast": torch.backends.mha.get_fastpath_enabled(),
        "grad": torch.is_grad_enabled(),
        "sdp": torch.backends.cuda.flash_sdp_enabled(),
    }


@pytest.mark.parametrize("kind", [small_cnn, Raises])
@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_untouched(kind: type, training: bool) -> None:
    model = kind().train(training)
    model[0].eval() if kind is small_cnn else model.norm.eval()  # a mixed mode must survive too
    before = snapshot(model)
    if kind is Raises:
        with pytest.raises(KeyError, match="midway"):
            trace(model, (2, 3, 8, 8))
    else:
        trace(model, (2, 3, 8, 8))
    after = snapshot(model)
    torch.testing.assert_close(after.pop("state"), before.pop("state"), rtol=0, atol=0)
    assert torch.equal(after.pop("rng"), before.pop("rng"))
    assert after == before


def test_no_memory_for_a_model_that_would_not_fit() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(10**6, 10**6), nn.ReLU(), nn.Linear(10**6, 10))
    graph = trace(model, (4, 10**6))
    assert sum(n.flops for n in graph.nodes) == 2 * 4 * (10**12 + 10**7)


def test_half_precision_input_follows_the_model() -> None:
    assert {n.dtype for n in trace(small_cnn().bfloat16(), (1, 3, 8, 8)).nodes[:1]} == {"bfloat16"}
    assert trace(nn.Embedding(5, 3), (2, 4), dtype=torch.long).nodes[0].shape == (2, 4, 3)


def test_constant_attributes_beside_a_meta_model() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(3, 3)
            self.mask = torch.zeros(3, device="cpu")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(x) + self.mask

    graph = trace(Masked().to("meta"), (2, 3))
    assert graph.nodes[-1].inputs[1] is None
    assert graph.nodes[-1].input_params == (None, None)


def test_dropout_leaves_a_node_or_a_note() -> None:
    graph = trace(small_cnn(drop=0.25), (1, 3, 8, 8))
    (mark,) = [n for n in graph.nodes if "training_only" in n.attrs]
    assert (mark.op, mark.module, mark.attrs["training_only"]) == ("aten.alias.default", "4", "Dropout(p=0.25)")
    assert mark.shape_only
    assert graph.source(mark.index) == graph.source(mark.inputs[0]), "readers that skip shape-only nodes do not see it"
    assert graph.training_only == {}
    assert not [n for n in trace(small_cnn(drop=0.0), (1, 3, 8, 8)).nodes if n.op == "aten.alias.default"]
    assert trace(Attention(drop=0.1), (1, 5, 8)).training_only == {"": "drop=0.1"}


def test_output_may_be_the_input() -> None:
    graph = trace(nn.Identity(), (1, 2))
    assert (graph.nodes, graph.output, graph.modules) == ((), (INPUT,), ("",))


def test_a_convolution_without_padding_has_one_zero_for_each_axis_however_it_is_written() -> None:
    for kind, shape in ((nn.Conv1d, (1, 2, 6)), (nn.Conv2d, (1, 2, 6, 5)), (nn.Conv3d, (1, 2, 6, 5, 4))):
        valid, zero = (trace(kind(2, 3, 3, padding=padding), shape).nodes[0].attrs for padding in ("valid", 0))
        assert valid == zero
        assert valid["padding"] == (0,) * (len(shape) - 2)


def test_outputs_in_subclasses_of_containers_are_outputs() -> None:
    class Output(OrderedDict):
        pass

    class Wrapped(nn.Module):
        def __init__(self, wrap) -> None:
            super().__init__()
            self.head, self.wrap = nn.Linear(3, 2), wrap

        def forward(self, x: torch.Tensor):
            return self.wrap(self.head(x))

    graph = trace(Wrapped(lambda y: Output(none=None, logits=[y])), (1, 3))
    assert graph.output == trace(Wrapped(lambda y: y), (1, 3)).output != ()
    with pytest.raises(UsageError, match="must put out a tensor"):  # else it would have no layers on the way, and no cost
        trace(Wrapped(lambda y: SimpleNamespace(logits=y)), (1, 3))


def test_generators_that_a_network_draws_from_are_left_as_they_were() -> None:
    class Draws(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (random.random() + float(np.random.rand()))

    before = random.getstate(), np.random.get_state()[1].tolist()
    trace(Draws(), (1, 3))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
