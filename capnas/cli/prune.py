"""`capnas prune`: a narrower network from a trained one."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capnas.cli.app import WEIGHTS, Device, Json, Pretrained, app, decimal, quiet, seeding, whole
from capnas.console import LONGER, SAW_VALIDATION, at_chance, out_json, pairs, remark, say, short, show_table
from capnas.errors import UsageError, counted

if TYPE_CHECKING:
    from torch import nn

    from capnas.narrowing.pruning import PruneConfig
    from capnas.search.target import Target


@app.command()
def prune(
    target: Annotated[str, typer.Argument(help="A timm model, RUN:NUMBER or RUN:best for a trial, or the folder of a saved model.")],
    data: Annotated[str | None, typer.Option(help="Images; default: those of the run or the saved model, else fashion-mnist-12k.")] = None,
    weights: Annotated[Path | None, WEIGHTS] = None,
    pretrained: Pretrained = False,
    image_size: Annotated[int | None, whole("Image size in pixels; default: the target's.")] = None,
    target_macs: Annotated[float | None, decimal("Share of the multiply-accumulates to keep.", "SHARE")] = None,
    lossless: Annotated[float | None, decimal("Instead: keep the width that this share of each layer's variance needs.", "SHARE")] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instead: widths from a file, the JSON of --dry-run --json after editing; wider is possible."),
    ] = None,
    method: Annotated[str, typer.Option(help="channels (remove them) or lowrank (split layers in two by their eigenspaces).")] = "channels",
    allocation: Annotated[
        str, typer.Option(help="How --target-macs is met: loss (least loss per MAC saved) or saturation (made even).")
    ] = "loss",
    round_to: Annotated[int, whole("Make channels a multiple of this, of half of it in groups narrower than twice that, and so on.")] = 8,
    calibration: Annotated[int, whole("Number of images to measure widths and corrections on.", "IMAGES")] = 1024,
    train_epochs: Annotated[int, whole("Epochs to train a target without weights first.")] = 0,
    finetune_epochs: Annotated[int, whole("Epochs to train the narrowed network.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan only.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the narrowed model and its report.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a model saved there before.")] = False,
    seed: Annotated[int, seeding("Seed of weights, sampling and training.")] = 0,
    device: Device = "auto",
    train: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Further settings of both trainings, e.g. lr=0.001; default of --train-epochs: the run's."),
    ] = None,
    data_option: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Further data settings, e.g. validation=0.2.")] = None,
    json: Json = False,
) -> None:
    """Narrow the over-wide layers of a network, correct the layers that read them, and save the narrower model.

    Coupled layers share a width. Which channels stay, and how many, is measured on training images; accuracy is reported on validation.
    capnas.load_model reads the folder.
    """
    with quiet():
        from capnas.narrowing.planning import read_widths
        from capnas.narrowing.pruning import PruneConfig, propose
        from capnas.narrowing.pruning import prune as prune_model
        from capnas.saved import check_free, save_model
        from capnas.search.opening import check_outside, data_record, input_record
        from capnas.search.target import open_target

        config = PruneConfig(
            target_macs=target_macs,
            lossless=lossless,
            widths=None if plan is None else read_widths(plan),
            method=method,  # type: ignore[arg-type]
            allocation=allocation,  # type: ignore[arg-type]
            round_to=round_to,
            images=calibration,
            finetune_epochs=finetune_epochs,
            train_epochs=train_epochs,
            train=pairs(train or [], "--train"),
            seed=seed,
            device=device,
        )
        if out is None and not dry_run:
            raise UsageError("give --out DIR for the narrowed model, or --dry-run to see the plan only.")
        place = None if out is None else out.absolute()  # a space may change the working directory
        if out is not None and not dry_run:
            check_free(out, force=force)
        options = pairs(data_option or [], "--data-option")
        found = open_target(target, data=data, image_size=image_size, data_options=options, pretrained=pretrained)
        if place is not None and not dry_run:
            check_outside(place, found.data.spec.source)
        model = _network(found, config, weights, dry_run)
        if dry_run:
            proposed = propose(model, found.data, config, image_size=found.image_size)
            document: dict[str, Any] = {"target": found.name, "plan": proposed.to_dict()}
        else:
            result = prune_model(model, found.data, config, image_size=found.image_size, say=say)
            report = result.report | {"saw_validation": found.saw_validation}
            document = {"target": found.name, "plan": result.plan.to_dict(), "report": report, "out": str(out)}
            extra = {"target": found.name, "data": data_record(found.data), "trained": True, "report": report}
            extra["inputs"] = input_record(found.data, found.image_size)
            if found.saw_validation:
                extra["retrained"] = True
            save_model(result.model.cpu(), place, found.recipe, extra=extra, force=force)  # type: ignore[arg-type]
    if json:
        out_json(document)
    else:
        show_plan(document["plan"])
    if "report" in document:
        if not json:
            show_report(document["report"])
            say(f"saved: {out}  (capnas.load_model({str(out)!r}))")
        if found.saw_validation:
            say(SAW_VALIDATION)
        measured = found.data.sizes["validation"]
        if line := guessed(document["report"]["accuracy"], document["report"]["at_chance"], found.data.guess, measured):
            remark(line, json=json)


def _network(found: Target, config: PruneConfig, weights: Path | None, dry_run: bool) -> nn.Module:
    """The network to be narrowed, with the weights given or, where it has none, trained first; a dry run may do without."""
    from capnas.narrowing.pruning import FINETUNE, FRESH, pretrain
    from capnas.search.inspection import load_weights

    epochs = config.train_epochs
    if epochs and (found.trained or weights is not None):
        say("this network has weights and is not trained first: --train-epochs is not used, --finetune-epochs trains it narrowed")
    model = found.build(config.seed)
    if weights is not None:
        load_weights(model, found, weights)
    elif not found.trained:
        if found.retrained is not None:
            say(f"best --retrain kept a trained network of it; to narrow that one: capnas prune {shlex.quote(str(found.retrained))}")
        has = "timm's weights with a fresh head for these classes" if found.pretrained else "no trained weights"
        if dry_run and not epochs:
            whose = "these" if found.pretrained else "random"
            say(f"{found.name} has {has}: groups, costs and what can be reached are its own, the widths are those of {whose} "
                "weights and will be others after training (--train-epochs N)")  # fmt: skip
            return model
        if epochs:
            say(f"{found.name} has {has}; it is trained first, {counted(epochs, 'epoch')} on {found.data.name}")
        elif found.pretrained:
            raise UsageError(f"{found.name} has {has}: give --train-epochs N to train it first.")
        recipe = FINETUNE if found.pretrained else replace(FRESH, **found.train)
        return pretrain(model, found.data, config, image_size=found.image_size, recipe=recipe, say=say)
    return model


def guessed(accuracy: dict[str, float], poor: dict[str, bool], chance: float, images: int | None = None) -> str:
    """What to say where the network is no better than a guess, before it is narrowed or at the end; else nothing.

    >>> guessed({"before": 0.1, "pruned": 0.1}, {"before": True, "pruned": True}, 0.1).partition(":")[0]
    'the network, with an accuracy of 0.1000 before and 0.1000 after narrowing, is no better than a guess (10.0 %)'
    """
    last = "finetuned" if "finetuned" in accuracy else "pruned"
    if poor["before"]:
        what = f"the network, with an accuracy of {accuracy['before']:.4f} before and {accuracy[last]:.4f} after narrowing, is no"
        advice = f"the two say nothing of what narrowing costs; first {LONGER}"
        return at_chance(what, chance, advice, accuracy=accuracy["before"], images=images)
    if poor[last]:
        what = f"the narrowed network, with an accuracy of {accuracy[last]:.4f} ({accuracy['before']:.4f} before), is no"
        advice = "keep more of it, or fine-tune it for more epochs (--finetune-epochs N)"
        return at_chance(what, chance, advice, accuracy=accuracy[last], images=images)
    return ""


_LEGEND = (
    "group: layers of one width; needed: directions that hold 0.99 of the variance, or --lossless of it; saturation: needed / width",
    "utilisation: capacity per parameter of the least used layer; over-wide: below half of the best used layers'",
)


def show_plan(plan: dict[str, Any]) -> None:
    """The plan as a table, with remarks below it."""
    ranks = bool(plan["groups"]) and "rank" in plan["groups"][0]
    after = "rank" if ranks else "planned"
    columns = ["layer" if ranks else "group", "width", "needed", after, "saturation", "variance kept" if ranks else "needed / planned"]
    rows = []
    for g in plan["groups"]:
        cells = [g["name"], short(g["width"]), short(g["needed"]), short(g[after]), short(g["saturation"], 2)]
        cells.append(short(g["kept" if ranks else "expected"], 2))
        if not ranks:
            cells.append(short(g["utilisation"], 2) + (" over-wide" if g["over_wide"] else ""))
            cells.append(short(len(g["layers"])))
        cells += [f"{short(g['macs'])} > {short(g['planned_macs'])}", f"{short(g['params'])} > {short(g['planned_params'])}"]
        rows.append(cells)
    columns += ([] if ranks else ["utilisation", "layers"]) + ["MACs", "params"]
    show_table(columns, rows, title=plan["goal"])
    for line in () if ranks else _LEGEND:
        typer.echo(line)
    typer.echo(
        f"MACs {short(plan['macs'])} > {short(plan['planned_macs'])} ({plan['planned_macs'] / plan['macs']:.1%}), "
        f"params {short(plan['params'])} > {short(plan['planned_params'])} ({plan['planned_params'] / plan['params']:.1%})"
    )
    if "least loss" in plan["goal"]:
        typer.echo("widths go by the loss and not by equal saturation, which keeps less accuracy at the same MACs in most networks "
                   "(results/pruning); --allocation saturation makes needed / planned even")  # fmt: skip
    if turned := [g["name"] for g in plan["groups"] if g.get("turned")]:
        typer.echo(f"cut by directions and not by channels, as linear layers alone write and read them: {', '.join(turned)}")
    if growing := [g["name"] for g in plan["groups"] if g.get("grow")]:
        typer.echo(f"candidates to grow (saturation at the ceiling): {', '.join(growing)}")
    if mixed := [g["name"] for g in plan["groups"] if g.get("grow") and g["over_wide"]]:
        typer.echo(f"evidence disagrees on {', '.join(mixed)}: the data fills its width (saturation), yet the parameters of one of its "
                   "layers are used far less than the best layers' (utilisation): train it wider before you believe either")  # fmt: skip
    reasons: dict[str, list[str]] = {}
    for name, reason in plan["fixed"].items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        say(f"{', '.join(names)} {'keeps its' if len(names) == 1 else 'keep their'} width: {reason}")


def show_report(report: dict[str, Any]) -> None:
    """Accuracy, cost and time, before and after."""
    accuracy, macs, params = report["accuracy"], report["macs"], report["params"]
    rows = [
        ["accuracy on validation", short(accuracy["before"]), short(accuracy["pruned"]), short(accuracy.get("finetuned"))],
        ["MACs", short(macs["before"]), short(macs["after"]), "-"],
        ["params", short(params["before"]), short(params["after"]), "-"],
    ]
    rows += [
        [f"saturation, {name}", short(report["saturation"]["before"][name], 2), short(report["saturation"]["after"][name], 2), "-"]
        for name in ("mean", "evenness")
    ]
    rows += [[f"ms, {name}", short(t["before"], 2), short(t["after"], 2), "-"] for name, t in report["latency_ms"].items()]
    show_table(["", "before", "pruned", "fine-tuned"], rows)
