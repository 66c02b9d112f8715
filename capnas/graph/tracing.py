"""The dataflow graph of one forward pass, without memory and without computing.

``trace`` runs the model once with every operation replaced by its shape rule and records what PyTorch really executes: functional code,
shared modules, control flow and in-place operations included. Structural measures (layer algebra, receptive field, capacity propagation),
the cost of a candidate and its canonical hash all read this one graph.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from capnas.graph.dataflow import Trace
from capnas.graph.dispatch import CircularPadding, GatedHalves, GraphRecorder, stand_in
from capnas.measures.probing import swapped, tensor_of, tensors_in, untouched, unwrap_model


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Inside, attention and torch's transformer layers are taken apart into their products, gated linear units into theirs.

    Fused ones have no shape rule, and no operation that tells value from gate.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH), GatedHalves():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _without_values(model: nn.Module) -> dict[int, Tensor]:
    """Stand-ins on the meta device for all parameters and buffers, by the ``id`` of each."""
    empty = {id(b): stand_in(b.detach()) for b in model.buffers()}
    return empty | {id(p): nn.Parameter(stand_in(p.detach()), p.requires_grad) for p in model.parameters()}


@contextlib.contextmanager
def _watched(recorder: GraphRecorder) -> Iterator[None]:
    """The recorder is told inside which modules run, by global hooks."""
    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

    thread = threading.get_ident()

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            recorder.enter(module)

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        return recorder.leave(module, args, output) if threading.get_ident() == thread else None

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def needs_values(error: Exception) -> bool:
    """Whether a model failed because it asks for values of tensors that have none, which torch tells by the text of its errors alone.

    >>> try:
    ...     torch.ones(2, device="meta").sum().item()
    ... except RuntimeError as error:
    ...     needs_values(error)
    True
    """
    return "meta" in str(error).lower()


@torch.inference_mode(False)  # inside that mode torch takes operations apart before the recorder sees them
def trace(model: nn.Module, input_shape: tuple[int, ...], *, dtype: torch.dtype | None = None) -> Trace:
    """Record the dataflow graph of ``model(x)`` for an x of ``input_shape`` (B, C, H, W), in eval mode.

    Nothing is computed and nothing is allocated: the model runs with parameters and buffers on the meta device, and so alike on every
    device. Fused attention appears decomposed (bmm, softmax, bmm), circular padding as one operation, ``aten._pad_circular``. The model
    keeps its weights, buffers, modes, gradients and hooks, and the generators of torch, NumPy and Python their state, also when its forward
    raises; that error is passed on as it is.

    Args:
        model: any module that takes one tensor; of a compiled one the names are those that it had before.
        input_shape: with the batch axis.
        dtype: of the input; the default is that of the first floating-point parameter.

    Raises:
        UsageError: the model is a ``torch.jit.ScriptModule``, or puts out no tensor, alone or in tuples, lists and dictionaries.

    >>> graph = trace(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()), (1, 3, 9, 9))
    >>> [(n.op, n.inputs, n.params, n.module, n.shape) for n in graph.nodes]  # doctest: +NORMALIZE_WHITESPACE
    [('aten.convolution.default', (-1, None, None), ('0.weight', '0.bias'), '0', (1, 8, 4, 4)),
     ('aten.relu.default', (0,), (), '1', (1, 8, 4, 4))]
    >>> graph.nodes[0].attrs["stride"], graph.nodes[0].flops // 2, graph.output
    ((2, 2), 3456, (1,))
    """
    model = unwrap_model(model)
    dtype = dtype or next((t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()), None)
    with swapped(model, _without_values(model)):
        recorder = GraphRecorder(model)
        with untouched(model), unfused(), torch.no_grad(), _watched(recorder):
            x = torch.empty(input_shape, dtype=dtype, device="meta")
            recorder.start(x)
            with recorder, CircularPadding(recorder):
                out = model(x)
            # beyond what torch takes apart itself: also subclasses of its containers
            outputs = [recorder.producer(t) for leaf in tree_flatten(out)[0] for t in tensors_in(leaf)]
    if not outputs:
        tensor_of(out)  # says what a model has to put out
    known = [(i, port, place) for i, port, place in outputs if i is not None]
    return Trace(
        nodes=tuple(recorder.nodes),
        output=tuple(i for i, _, _ in known),
        output_ports=tuple(port for _, port, _ in known),
        output_places=tuple(place for *_, place in known),
        input_shape=tuple(input_shape),
        modules=tuple(recorder.calls),
        training_only=recorder.unmarked(model),
    )
