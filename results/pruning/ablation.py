"""What the widths, the choice of channels and the refit each do for a network of half the MACs, without fine-tuning.

    python results/pruning/ablation.py fashion --seeds 0 1 2            # models as in run.py; rows to raw_ablation/
    python results/pruning/ablation.py cifar --cifar cifar10.zip
    python results/pruning/ablation.py --table-only                     # ablation.md from raw_ablation/

All networks are made by capnas' `narrowed`; what differs is the order in which channels leave, the plan of widths, and `refit`. Streams are
turned for capnas' choice alone (`capnas.narrowing.turning`); only MBConv has such, and a choice without: what holds of the others' widths.
Networks of Torch-Pruning are rebuilt from the channels that they keep, which gives the same outputs, and then refitted like ours. A line
is one network as in run.py, `method` the choice and `scope` the widths; `accuracy` is with the refit. What is there is not computed again.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import replace

import torch
from run import EPOCHS, HERE, MODELS, arguments, benches, cell, environment, read, rival, rows_of

from capnas.measures.narrowing import RemovalPath
from capnas.narrowing import narrowed, plan_widths, survey

ROWS, HALF, ROUND = HERE / "raw_ablation", 0.5, 4
WIDTHS = ("loss", "uniform")
AS_THEY_ARE = "capnas, streams as they are"  # its choice of channels, which is the default's where no stream can be turned
CHOICES = ("capnas", AS_THEY_ARE, "group magnitude", "filter magnitude", "random")
SCOPES = ("layer", "global")
ERROR = 0.8  # one standard error of an accuracy, in points
FACTORS = ("refit", "refit of the simplest", "widths", "streams", *(f"channels: {c}" for c in CHOICES[2:]), "both", "Torch-Pruning")
RIVALS = ("group magnitude", "BN scale", "Taylor", "LAMP")  # of which one is the best rival of each network in table.md, without the refit
NOTES = """\
Half the MACs, no fine-tuning; 2,000 test images (one standard error is about 0.8 points), means over seeds; the models are trained again
with the recipe and seeds of `run.py`. Widths: `loss` is a plan of least loss, the default's where capnas turns streams and one for streams
as they are elsewhere, `uniform` one share of all widths, in whole channels; all keep {} to {} of the MACs. Channels: capnas' choice is for
the refit that follows, with streams turned where they can be (MBConv) and as they are; group magnitude sums the squared weights of all
layers and norms that write, carry or read a channel; filter magnitude the absolute weights that write it; random is one draw for each seed.
The refit is capnas' for all: 1,024 training images without labels. The rows of Torch-Pruning are its own networks, widths and channels;
they keep {} to {} of the MACs, and stand in the scope that is better with the refit, by the mean over seeds."""
EFFECTS = """\
Points, means over seeds of differences paired by seed, all refitted. Refit: what it adds to the default, and to the simplest, random
channels in uniform widths. Widths: those of the loss less uniform ones, with capnas' channels. Streams: turned less as they are. Channels:
capnas', with streams as they are, less the others, in the widths of the loss. Both: the default less the simplest. Torch-Pruning: the
default less its network that is best by the mean over seeds of its test accuracy. In brackets: within the spread of the seeds or one
standard error of an accuracy, 0.8 points. The last row is the mean over the networks and its standard error."""


def group_magnitude(group, modules):
    """(U,) squared weights of all that writes, carries and reads a unit, as Torch-Pruning sums them for p = 2."""
    total = torch.zeros(group.units)
    for port in group.ports:
        weight = getattr(modules.get(port.module), "weight", None)
        if weight is not None:  # no activation, no bare parameter
            weight = weight.detach().transpose(0, 1) if port.side == "in" else weight.detach()
            total += weight.square().reshape(len(weight), -1).sum(1)[port.positions].sum(1)
    return total


def filter_magnitude(group, modules):
    """(U,) absolute weights of the filters that write a unit (Li et al., arXiv 1608.08710)."""
    return sum(modules[p.module].weight.detach().abs().flatten(1).sum(1)[p.positions].sum(1) for p in group.writers())


def in_order(found, orders):
    """The survey with other orders of removal."""
    return replace(found, paths=tuple(RemovalPath(order=tuple(o), losses=p.losses) for o, p in zip(orders, found.paths)))


def chosen(found, model, choice, seed):
    """The survey with the channels in the order of a choice, the first to go first."""
    modules, generator = dict(model.named_modules()), torch.Generator().manual_seed(seed)
    if choice in CHOICES[:2]:
        return found
    if choice == "random":
        return in_order(found, [torch.randperm(g.units, generator=generator).tolist() for g in found.groups])
    score = group_magnitude if choice == "group magnitude" else filter_magnitude
    return in_order(found, [score(g, modules).argsort().tolist() for g in found.groups])


def of_choice(here, widths, choice):
    """The lines of one choice in some widths; the default's where no stream can be turned."""
    return rows_of(here, scope=widths, method=choice) or (rows_of(here, scope=widths, method=CHOICES[0]) if choice == AS_THEY_ARE else [])


def planned(found, widths):
    """The default's plan, or the one share of all widths, in whole channels, with the most MACs that are at most half."""
    if widths == "loss":
        return plan_widths(found, target_macs=HALF, round_to=ROUND)
    for thousandths in range(999, 0, -1):
        units = [max(1, round(g.units * thousandths / 1000)) for g in found.groups]
        if float(found.cost.total_macs(torch.tensor([units], dtype=torch.float64))) <= HALF * float(found.cost.macs.sum()):
            return plan_widths(found, widths={g.name: n * g.unit_channels for g, n in zip(found.groups, units)})
    raise ValueError("no share of the widths leaves half the MACs")


def units_left(group, model, pruned):
    """The units of a group that a pruned copy still has, told by biases and norms, whose values pruning does not change."""
    for port in (p for p in group.ports if p.side != "in" and p.positions.shape[1] == 1):
        before, after = ([v for v in m.get_submodule(port.module).state_dict().values() if v.dim() == 1] for m in (model, pruned))
        if before:
            rows = iter(enumerate(torch.stack(before, 1)[port.positions[:, 0]]))
            return [next(unit for unit, row in rows if torch.equal(row, left)) for left in torch.stack(after, 1)]
    raise ValueError(f"no vector tells the units of {group.name}")


def rebuilt(bench, found, pruned):
    """A survey and a plan that keep the channels that a network of Torch-Pruning keeps."""
    left = [units_left(g, bench.model, pruned) for g in found.groups]
    plan = plan_widths(found, widths={g.name: len(u) * g.unit_channels for g, u in zip(found.groups, left)})
    found = in_order(found, [[*sorted(set(range(g.units)) - set(u)), *u] for g, u in zip(found.groups, left)])
    with torch.no_grad():
        torch.testing.assert_close(
            narrowed(bench.model, found, plan, refit=False)(bench.images), pruned(bench.images), rtol=1e-3, atol=1e-3
        )
    return found, plan


def measure(bench, names):
    """All networks of one model that are not in its lines."""
    if not bench.known(method="unpruned"):
        bench.note(method="unpruned", scope="", ratio=1.0, epochs=0, accuracy=bench.accuracy(bench.model))
    rule = {CHOICES[0]: bench.rule} if "streams" in bench.rule else {}
    choices = [c for c in CHOICES if rule or c != AS_THEY_ARE]
    own = [(w, c) for w in WIDTHS for c in choices if not bench.known(scope=w, method=c, **rule.get(c, {}))]
    others = [(s, n) for s in SCOPES for n in names if not bench.known(scope=s, method=f"Torch-Pruning {n}")]
    if not own + others:
        return

    def note(method, scope, found, plan):
        small, bare = (narrowed(bench.model, found, plan, refit=refit) for refit in (True, False))
        bench.note(method=method, scope=scope, ratio=HALF, kept=bench.kept(small), epochs=0, accuracy=bench.accuracy(small),
                   without_refit=bench.accuracy(bare), **rule.get(method, {}))  # fmt: skip

    default = survey(bench.model, bench.images)
    found = replace(default, turns={})
    for widths, choice in own:
        of = default if choice == CHOICES[0] else found
        note(choice, widths, chosen(of, bench.model, choice, bench.key["seed"]), planned(of, widths))
    for scope, name in others:
        import torch_pruning as tp

        made = rival(bench, tp, name, scope, HALF)
        if made is None:  # as BN scale, which finds no batch norm in ConvNeXt
            bench.note(method=f"Torch-Pruning {name}", scope=scope, ratio=HALF, epochs=0, accuracy=None, reason="no ratio meets the target")
        else:
            note(f"Torch-Pruning {name}", scope, *rebuilt(bench, found, made[0].eval()))


def best_of_rivals(lines):
    """Of each model and importance the networks of Torch-Pruning in the scope that is better with the refit, by the mean over seeds."""
    of = defaultdict(list)
    for x in lines:
        if x["scope"] in SCOPES and x["accuracy"] is not None:
            of[x["data"], x["model"], x["method"], x["scope"]].append(x)
    best = {}
    for key in sorted(of, key=lambda k: (len(of[k]), statistics.mean(x["accuracy"] for x in of[k]))):
        best[key[:3]] = of[key]
    return best


def by_seed(rows, what="accuracy"):
    return {x["seed"]: 100 * x[what] for x in rows}


def gains(lines):
    """By data and model the points of each seed that one factor adds with the others held, see EFFECTS."""
    found = {}
    for data, model in [(d, m) for d in EPOCHS for m in MODELS if rows_of(lines, data=d, model=m)]:
        here = rows_of(lines, data=data, model=model)
        default, simplest = rows_of(here, scope="loss", method="capnas"), rows_of(here, scope="uniform", method="random")
        rivals = max(best_of_rivals(here).values(), key=lambda rows: (len(rows), statistics.mean(x["accuracy"] for x in rows)))
        ours, simple = by_seed(default), by_seed(simplest)
        plain = by_seed(of_choice(here, "loss", AS_THEY_ARE))
        others = {c: by_seed(rows_of(here, scope="loss", method=c)) for c in CHOICES[2:]}
        pairs = {"refit": (ours, by_seed(default, "without_refit")), "refit of the simplest": (simple, by_seed(simplest, "without_refit")),
                 "widths": (ours, by_seed(rows_of(here, scope="uniform", method="capnas"))),
                 "streams": (ours, plain), **{f"channels: {c}": (plain, other) for c, other in others.items()},
                 "both": (ours, simple), "Torch-Pruning": (ours, by_seed(rivals))}  # fmt: skip
        found[data, model] = {name: [one[s] - other[s] for s in one if s in other] for name, (one, other) in pairs.items()}
    return found


def within(points):
    """Whether a mean difference is within the spread of its seeds, or one standard error of an accuracy."""
    return round(abs(statistics.mean(points)), 6) <= max(ERROR, statistics.stdev(points) if len(points) > 1 else 0.0)


def signed(value):
    return f"{round(value, 1) + 0.0:+.1f}"  # no minus before a zero


def derived(lines):
    """The text of ablation.md."""
    best, found = [x for rows in best_of_rivals(lines).values() for x in rows], gains(lines)
    kept = [x["kept"] for x in lines if x["scope"] in WIDTHS], [x["kept"] for x in best]
    text = ["# What the widths, the choice of channels and the refit each do", ""]
    text += [NOTES.format(*(f"{end(shares):.2f}" for shares in kept for end in (min, max))), "", "## Gains", "", EFFECTS, ""]
    text += ["| data | model | " + " | ".join(FACTORS) + " |", "|---|---|" + "---|" * len(FACTORS)]
    for (data, model), by in found.items():
        cells = [f"[{signed(statistics.mean(by[f]))}]" if within(by[f]) else signed(statistics.mean(by[f])) for f in FACTORS]
        text.append(f"| {data} | {model} | " + " | ".join(cells) + " |")
    means = [[statistics.mean(by[f]) for by in found.values()] for f in FACTORS]
    text.append(
        "| mean | | " + " | ".join(f"{signed(statistics.mean(m))} ± {statistics.stdev(m) / len(m) ** 0.5:.1f}" for m in means) + " |"
    )
    for data in dict.fromkeys(data for data, _ in found):
        here, models = rows_of(lines, data=data), [m for d, m in found if d == data]
        text += ["", f"## {data}: accuracy, mean ± standard deviation over seeds", ""]
        text += ["| widths | channels | refit | " + " | ".join(models) + " |", "|---|---|---|" + "---|" * len(models)]
        rows = [("all", "all", rows_of(here, method="unpruned"), (("-", "accuracy"),))]
        both = ("yes", "accuracy"), ("no", "without_refit")
        rows += [(w, c, [x for m in models for x in of_choice(rows_of(here, model=m), w, c)], both) for w in WIDTHS for c in CHOICES]
        rows += [("its own", n, rows_of(best, data=data, method=n), both) for n in sorted({x["method"] for x in best})]
        for widths, choice, of, columns in rows:
            for refit, what in columns:
                cells = [cell([x[what] for x in rows_of(of, model=m)], len(rows_of(here, method="unpruned", model=m))) for m in models]
                text.append(f"| {widths} | {choice} | {refit} | " + " | ".join(cells) + " |")
    return "\n".join([*text, ""])


def main():
    parser = arguments(__doc__)
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), help="importances of Torch-Pruning")
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only:
        ROWS.mkdir(exist_ok=True)
        for bench in benches(args):
            bench.raw = ROWS / bench.raw.name
            measure(bench, args.rivals)
        environment(ROWS / "environment.json")
    lines = [line for path in sorted(ROWS.glob("*.jsonl")) for line in read(path)]
    (HERE / "ablation.md").write_text(derived(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
