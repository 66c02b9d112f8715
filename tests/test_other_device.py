"""Everything that computes runs on a device that is not the CPU: a stand-in that refuses what CUDA refuses, in a process of its own.

That process is this file run as a script. Where two numbers are compared, the first is the CPU's.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_space import FILE, images, space, write_images
from torch import Tensor, nn

from capnas.data import ImageData, load_data
from capnas.profile import MEASURES, at_default_initialization, profile_model
from capnas.training import TrainConfig, evaluate, train

DEVICE = "pretend"
ABSENT = 77  # exit status where torch lacks what the stand-in is made of
CONFIG = TrainConfig(epochs=1, batch_size=32, lr=1e-2, device=DEVICE)


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)]
    layers += [nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 3))


class Transformer(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.position = nn.Conv2d(1, width, 4, 4), nn.Parameter(torch.zeros(1, 4, width))
        self.norm, self.last = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.head = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT + self.position
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.down(nn.functional.gelu(self.up(self.last(x))))).mean(1))


def data() -> ImageData:
    return load_data(images(120), validation=0.2, test=0.2)


def batch(device: str, count: int = 24) -> tuple[Tensor, Tensor]:
    return data().probe(count, device=device)


def same(found: Any, expected: Any, tolerance: float = 1e-3) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-5, equal_nan=True)


def check_the_stand_in_refuses_what_cuda_refuses() -> None:
    x, here = torch.ones(2, 3, device=DEVICE), torch.ones(2, 3)
    refused: list[Callable[[], Any]] = [
        lambda: x + here,
        lambda: torch.cat([x, here]),
        lambda: torch.tensor(0.0).add_(x.sum()),
        lambda: x.index_select(0, torch.tensor([0])),
        lambda: here[torch.zeros(1, dtype=torch.int64, device=DEVICE)],
        lambda: x.normal_(generator=torch.Generator()),
        lambda: x.long() @ x.long().T,
        x.numpy,
    ]
    for number, call in enumerate(refused):
        with pytest.raises((RuntimeError, TypeError), match=r"same device|device type|not implemented"):
            print(number, call())
    assert (x + torch.tensor(1.0))[torch.tensor([True, False])].tolist() == [[2.0] * 3]
    assert x.normal_(generator=torch.Generator(device=DEVICE)).cpu().isfinite().all()


def check_training() -> None:
    ours, other = net(), net()
    expected, found = (train(m, data(), replace(CONFIG, device=d)) for m, d in ((ours, "cpu"), (other, DEVICE)))
    assert (found.status, found.device) == ("complete", DEVICE)
    for key in set(expected.curve[0]) - {"seconds"}:
        same(found.curve[0][key], expected.curve[0][key])
    assert all(p.device.type == DEVICE for p in other.parameters())
    same(evaluate(other, data(), "validation")["loss"], evaluate(ours, data(), "validation")["loss"])  # each where its network is
    options = {"amp": "on", "channels_last": "on", "label_smoothing": 0.1, "clip_grad": 1.0}
    assert train(net(), data(), replace(CONFIG, **options)).status == "complete"  # type: ignore[arg-type]


def check_profiles() -> None:
    for make in (net, Transformer):
        expected, found = (profile_model(make().to(d), *batch(d), measures=MEASURES) for d in ("cpu", DEVICE))
        assert (found.flags, found.skipped) == (expected.flags, expected.skipped)
        same(found.network, expected.network)
        assert math.isfinite(found.network["coverage"])  # what comes last: it needs every operation recognised
        for row, other in zip(found.layers, expected.layers):
            same([row.k, row.capacity, row.norm, row.gate_decoupling], [other.k, other.capacity, other.norm, other.gate_decoupling])
    profile_model(net().to(DEVICE), [batch(DEVICE)[0]] * 2, initialize=True, mode="eval")
    ours, other = (at_default_initialization(net().to(d), seed=3).state_dict() for d in ("cpu", DEVICE))
    assert {t.device.type for t in other.values()} == {DEVICE}
    same({k: t.cpu() for k, t in other.items()}, ours, 0)


def check_measures() -> None:
    from capnas.capacity import capacity_map
    from capnas.graph.tracing import trace
    from capnas.measures import saturation
    from capnas.measures.moments import moments_of
    from capnas.measures.proxies import baseline_proxies, synflow
    from capnas.weights import InitialWeights, weight_norms

    small = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3))
    expected, found = (capacity_map(small.to(d), batch(d, 64)[0], exact=True, mode="train") for d in ("cpu", DEVICE))
    assert found.method == "exact"
    same(found.capacity, expected.capacity)
    values = {}
    for device in ("cpu", DEVICE):
        model, (x, y) = net().to(device), batch(device)
        start, graph = InitialWeights.of(model), trace(model, (1, 1, 8, 8))
        scores = baseline_proxies(model, x, y, names=["synflow", "naswot", "zico", "snip", "grad_norm"])
        values[device] = [s.value for s in scores.values()] + [synflow(model, x, variant="log").value]
        values[device] += [n.value for n in weight_norms(model, graph, bounded=True).values()] + list(start.distances(model).values())
    same(values[DEVICE], values["cpu"])
    flat = torch.randn(50, 20)
    for rows in (flat, flat * 2.0 ** -torch.arange(20)):  # of which eight directions hold little and nearly all
        sizes = [saturation.lossless_projection(moments_of(rows)).basis.shape]
        saturation.EXACT_EIGENVALUES = 8
        try:
            sizes += [saturation.lossless_projection(moments_of(rows.to(device))).basis.shape for device in ("cpu", DEVICE)]
        finally:
            saturation.EXACT_EIGENVALUES = 2048
        assert len(set(sizes)) == 1


def check_projection() -> None:
    from capnas.projection import project_model

    def accuracy(model: nn.Module) -> float:
        return evaluate(model, data(), "validation")["accuracy"]

    found = project_model(net().to(DEVICE), batch(DEVICE)[0].split(8), accuracy)
    assert 0 <= found.projected <= 1


def check_narrowing() -> None:
    from capnas.narrowing import calibration, narrowed
    from capnas.narrowing.planning import plan_widths
    from capnas.narrowing.survey import survey

    linear = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)]  # a stream to turn

    def outputs(device: str, widest: int, full: nn.Module) -> list[Tensor]:
        model, x = full.to(device).eval(), batch(device)[0]
        calibration.WIDEST = calibration.REFITTED = widest
        found = survey(model, x)
        assert bool(found.turns) is (full is turned)
        plans = [plan_widths(found, target_macs=0.6, round_to=2), plan_widths(found, widths={found.groups[0].name: 24})]
        return [narrowed(model, found, plan)(x).detach().cpu() for plan in plans]

    usual, turned = (calibration.WIDEST, calibration.REFITTED), nn.Sequential(*linear, *list(net())[5:])
    try:
        for widest, full in ((4608, net()), (9, net()), (4608, turned)):  # with the second, wide readers are mixed and not refitted
            same(outputs(DEVICE, widest, full), outputs("cpu", widest, full), 0.02)
    finally:
        calibration.WIDEST, calibration.REFITTED = usual


def check_pruning() -> None:
    from capnas.narrowing.pruning import PruneConfig, prune

    for model, options in ((net(), {"method": "lowrank"}), (Transformer(), {"round_to": 2, "finetune_epochs": 1})):
        done = prune(model, data(), PruneConfig(target_macs=0.8, images=32, device=DEVICE, **options))  # type: ignore[arg-type]
        assert done.report["latency_ms"]["batch 1"]["after"] > 0
        assert next(done.model.parameters()).device.type == DEVICE


def check_excess() -> None:
    from capnas.excess import Recipe, excess_capacity

    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    recipe = Recipe(epochs=2, batch_size=32, lr=0.2, project_every=3, final_sweeps=2)
    grid = {"lipschitz": (0.5,), "distance": (0.5,), "seeds": (0,), "recipe": recipe}
    expected, found = (excess_capacity(nn.Sequential(*layers), data(), device=d, **grid) for d in ("cpu", DEVICE))  # type: ignore[arg-type]
    assert len(found.runs) == 2
    for run, other in zip(found.runs, expected.runs):
        same([s.norm for s in run.layers], [s.norm for s in other.layers])


def check_resolution() -> None:
    from capnas.mixed_sizes import train_together
    from capnas.resolution import tune_resolution

    networks = {size: net() for size in (6, 8)}
    assert train_together(networks, data(), CONFIG, passes=1).passes == 1
    assert networks[6][0].weight is networks[8][0].weight  # type: ignore[index]
    assert tune_resolution(lambda size: net(), data(), (6, 8), epochs=4, config=CONFIG).runs


def check_streamed_images() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = str(write_images(Path(folder)))
        found = load_data(source, memory_limit=0, workers=0, in_chans=1, image_size=8, validation=0.2, test=0.2)
        for split in ("train", "validation"):
            x, y = next(iter(found.batches(split, 8, device=DEVICE)))
            assert (x.device.type, y.device.type) == (DEVICE, DEVICE)


def check_search() -> None:
    import optuna

    from capnas.objective import Objective
    from capnas.objective.evaluation import Evaluation

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for values in (("principled",), ("accuracy", "coverage", "capacity_slack", "log10_lipschitz", "init_naswot")):
        objective = Objective(space, data(), values=values, epochs=1, device=DEVICE, train=TrainConfig(batch_size=32), probe_images=16)
        study = optuna.create_study(directions=objective.directions, sampler=optuna.samplers.RandomSampler(seed=0))
        study.optimize(objective, n_trials=1)
        found = Evaluation.of(study.trials[0])
        assert found is not None
        assert found.status == "complete", found.reason


def check_inspection() -> None:
    from capnas.search import run_study
    from capnas.search.config import StudyConfig
    from capnas.search.inspection import inspect_target

    with tempfile.TemporaryDirectory() as folder:
        config = StudyConfig(
            space=FILE, data=str(write_images(Path(folder) / "images")), trials=1, epochs=1, device=DEVICE, sampler="random", pruner="off",
            out=f"{folder}/run", train={"batch_size": 32}, data_options={"image_size": 8, "in_chans": 1},
        )  # fmt: skip
        trial = inspect_target(f"{run_study(config).folder}:best", device=DEVICE, measures=MEASURES, project=0.99)
    assert trial.projection is not None
    assert all(row.distance is not None for row in trial.profile.layers)
    assert inspect_target("test_vit", batch=2, image_size=32, device=DEVICE).total_macs


def check_work_on_the_cpu_leaves_the_random_state_of_the_device() -> None:
    from pretend_device import SEEDS

    model, (x, y) = net(), batch("cpu")
    SEEDS.clear()
    profile_model(model, x, y, measures=MEASURES, initialize=True)
    train(copy.deepcopy(model), data(), replace(CONFIG, device="cpu"))
    assert SEEDS == []
    train(model, data(), CONFIG)
    assert set(SEEDS) == {CONFIG.seed}


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What each check raised, "" for nothing."""
    done = subprocess.run([sys.executable, "-W", "ignore", __file__], capture_output=True, text=True, check=False)
    if done.returncode == ABSENT:
        pytest.skip(f"NO STAND-IN FOR A GPU: this torch cannot have a device made in Python, nothing was run off the CPU ({done.stderr})")
    found = dict(json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("\0"))
    return {name: found.get(name, f"the process ended before it: {done.stderr[-2000:]}") for name in CHECKS}


@pytest.mark.parametrize("name", CHECKS)
def test_on_a_device_that_is_not_the_cpu(outcomes: dict[str, str], name: str) -> None:
    assert not outcomes[name], outcomes[name]


if __name__ == "__main__":
    try:
        from pretend_device import register

        register()
    except (ImportError, AttributeError) as error:
        print(error, file=sys.stderr)
        sys.exit(ABSENT)
    torch.set_num_threads(1)
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            check()
            failure = ""
        except (Exception, pytest.fail.Exception):
            failure = traceback.format_exc()
        print("\0" + json.dumps([name, failure]), flush=True)
