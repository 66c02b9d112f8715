"""What the command line shows: numbers short enough to read, tables, and JSON for machines. Results go to stdout, advice to stderr."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from capnas.documents import json_text
from capnas.errors import UsageError, counted

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
WIDE, _NARROW = 160, 60  # columns of a table that goes into a file or a pipe; of a terminal below which a column would hold single letters
_FRONT = 20  # trials of a front that are shown
_REFUSED = ("over_budget", "infeasible", "gated")  # ended before training
LONGER = "train for more epochs, with a smaller batch_size or on more images"
SAW_VALIDATION = "the network was trained on the validation images too: accuracies on them are of images that it has seen"


def number(text: str, option: str = "") -> int:
    """A whole number written as 8000000, 8e6, 8_000_000, 8M, 1.5G or 300k, with a sign or without.

    Args:
        text: what was written.
        option: where, for the error.

    Raises:
        UsageError: anything else.

    >>> number("8M"), number("8e6"), number("300k"), number("28"), number("-1")
    (8000000, 8000000, 300000, 28, -1)
    """
    match = re.fullmatch(r"\s*([+-]?[\d_.]+(?:e[+-]?\d+)?)\s*([kmgbt]?)\s*", text.lower())
    try:
        if match and not set(match[1]) & set(".e"):
            return int(match[1]) * _UNITS[match[2]]  # a float holds 15 digits only
        value = float(match[1]) * _UNITS[match[2]] if match else None
    except ValueError:
        value = None
    if value is None or not value.is_integer():
        where = f"{option}: " if option else ""
        raise UsageError(f"{where}a whole number is written like 8000000, 8e6, 8M or 300k, got {text!r}.")
    return int(value)


def short(value: float | None, digits: int = 4) -> str:
    """A number for a table; whole numbers from a thousand on with a unit.

    >>> short(8123456), short(0.91234), short(300), short(None), short(float("nan"))
    ('8.12M', '0.9123', '300', '-', '-')
    """
    if value is None or value != value:
        return "-"
    if abs(value) == float("inf"):
        return str(value)
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size and (size > 1e3 or abs(value) >= size):
            return f"{value / size:.3g}{unit}"
    return str(int(value)) if value == int(value) else f"{value:.{digits}f}"


def with_unit(name: str) -> str:
    """The name of a value or metric for people: latency, which alone has a unit, with it.

    >>> with_unit("latency"), with_unit("macs")
    ('latency (ms)', 'macs')
    """
    return f"{name} (ms)" if name == "latency" else name


def duration(seconds: float) -> str:
    """A time for people.

    >>> duration(42.2), duration(200), duration(7500)
    ('42 s', '3 min 20 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def time_left(seconds: float, ran: int, remaining: int, *, within: float = math.inf) -> str:
    """Time that the rest takes at the pace so far, or may take within so many seconds; empty where there is no pace yet or no rest.

    >>> time_left(60, 3, 6), time_left(60, 3, 6, within=70), time_left(60, 0, 6)
    ('about 2 min 0 s left', 'about 10 s left', '')
    """
    left = min(seconds / ran * remaining if ran else 0.0, within - seconds)
    return f"about {duration(left)} left" if left > 0 else ""


def pairs(given: Sequence[str], option: str) -> dict[str, Any]:
    """``NAME=VALUE`` texts (several to a text, with commas) as a mapping; values become numbers or truth values where they look like it.

    Raises:
        UsageError: a text without ``=``, or a name given twice.

    >>> pairs(["lr=0.01,amp=off", "clip_grad=none,batch_size=1e2"], "--train")
    {'lr': 0.01, 'amp': 'off', 'clip_grad': None, 'batch_size': 100}
    """
    found: dict[str, Any] = {}
    for part in (p.strip() for text in given for p in text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise UsageError(f"{option} takes NAME=VALUE, got {part!r}.")
        if (name := name.strip()) in found:
            raise UsageError(f"{option} takes each name once, got {name!r} twice.")
        found[name] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    known = {"true": True, "false": False, "none": None}
    if text.lower() in known:
        return known[text.lower()]
    try:
        value = float(text)
    except ValueError:
        return text
    if not value.is_integer():
        return value
    return int(text) if text.lstrip("+-").isdecimal() else int(value)  # a float holds 15 digits only


def out_json(document: Any) -> None:
    """One JSON document on stdout; what is not a finite number becomes null."""
    sys.stdout.write(json_text(document, indent=2))


def say(text: str) -> None:
    """A line of progress or advice on stderr."""
    print(text, file=sys.stderr, flush=True)


def remark(text: str, *, json: bool) -> None:
    """A closing line on stdout, or on stderr where that holds one document."""
    say(text) if json else print(text)


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", left: int = 1, texts: Sequence[str] = ()) -> None:
    """A table on stdout; the first ``left`` columns and those named in ``texts`` are texts, the others numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold", pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left or name in texts else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    console.width = console.width if sys.stdout.isatty() and console.width >= _NARROW else WIDE
    console.print(table)


def run_document(result: Any) -> dict[str, Any]:
    """A `capnas.search.RunResult` for machines."""

    def shown(trial: Any) -> dict[str, Any]:
        return {"trial": trial.number, "values": dict(zip(result.config.values, trial.values)), "params": trial.params}

    best = result.best
    return {
        "study": result.config.name,
        "folder": str(result.folder),
        "trials": result.config.trials,
        "finished": result.n_finished,
        "finished_before": result.finished_before,
        "complete": result.n_complete,
        "interrupted": result.interrupted,
        "best": None if best is None else shown(best),
        "front": [shown(trial) for trial in result.front],
        **result.finals_document(),
        "outcomes": _outcomes(result),
        "at_chance": guess(result, _accuracies(result)) is not None,
    }


def no_value(result: Any) -> str:
    """What to say of a run without a result."""
    return f"no trial gave a value; see why with: capnas report {shlex.quote(str(result.folder))}"


def guess(run: Any, accuracies: Iterable[float | None], split: str = "validation") -> dict[str, Any] | None:
    """What `at_chance` is told where none of these is clearly better than a guess, the commonest class for every image; None else.

    Args:
        run: a `capnas.search.RunResult`; None also where its images are unknown.
        accuracies: on a split of its images.
        split: which.
    """
    from capnas.measures.guessing import no_better_than_a_guess
    from capnas.search.opening import DATA

    facts, known = run.study.user_attrs.get(DATA), [a for a in accuracies if a is not None]
    if facts is None or not known:
        return None
    accuracy, images = max(known), facts["sizes"][split]
    chance = facts.get("guess") or 1 / facts["num_classes"]  # which studies did not keep before
    poor = no_better_than_a_guess(accuracy, chance=chance, images=images)
    return {"chance": chance, "accuracy": accuracy, "images": images, "split": split} if poor else None


def at_chance(
    what: str, chance: float, advice: str = LONGER, *, accuracy: float = 0.0, images: int | None = None, split: str = "validation"
) -> str:
    """What to say of what is no better than a guess, or better on so few images that luck may have done it.

    Args:
        what: the start of the sentence.
        chance: the accuracy of a guess.
        advice: what to do.
        accuracy: that of the network, where it is known.
        images: on how many it was measured.
        split: on which.

    >>> at_chance("this network is no", 0.1, "train it")
    'this network is no better than a guess (10.0 %): train it'
    >>> at_chance("this network is no", 0.1, "train it", accuracy=0.2, images=9)
    'this network is not clearly better than a guess (10.0 %) on 9 images: take more validation images to tell; train it'
    """
    bar = f"better than a guess ({100 * chance:.1f} %)"
    if accuracy <= chance or images is None:
        return f"{what} {bar}: {advice}"
    return f"{re.sub(' no$', ' not', what)} clearly {bar} on {counted(images, 'image')}: take more {split} images to tell; {advice}"


def _accuracies(result: Any) -> list[float | None]:
    """Of the trials and of the finals, on validation."""
    return [*(e.metrics.get("accuracy") for _, e in result.evaluations()), *(final["accuracy"] for _, final in result.finals)]


def _outcomes(result: Any) -> dict[str, int]:
    """Trials by status, in the order of the statuses."""
    from capnas.objective.evaluation import STATUSES

    found = Counter(e.status for _, e in result.evaluations())
    return {status: found[status] for status in STATUSES if found[status]}


def closing(result: Any) -> list[str]:
    """The last lines of a search: what came of the trials, what to do where most were refused or finals are owed, who only guesses."""
    from capnas.objective.gates import best_share, parse_gate

    found, config = _outcomes(result), result.config
    if not found:
        return []
    total, refused = sum(found.values()), sum(found.get(status, 0) for status in _REFUSED)
    counts = [f"{number} {status}".replace("_", " ") for status, number in found.items()]
    lines = [f"{counted(total, 'trial')}: {', '.join(counts)}"]
    if 2 * refused > total:
        given = {f"--max-{name}": getattr(config, f"max_{name}") and "over_budget" for name in ("macs", "params", "latency")}
        limits = given | {"--gate": "gated"}
        ease = " or ".join(option for option, status in limits.items() if status in found)
        more = ["raise --trials"] if best_share(parse_gate(config.gate)) is None else []  # with a share these trials do not count
        advice = ", or ".join(more + ([f"ease {ease}"] if ease else []))
        lines.append(f"{refused} of {total} were refused before training" + (f": {advice}" if advice else ""))
    different = len({e.hash for _, e in result.evaluations()} - {None})
    if (known := result.n_known) >= max(5, 2 * different):  # one more, as likely as these, would be missed in 1 of 5 cases at most
        lines.append(f"the last {known} draws repeat {different} known architectures: the space, or the sampler, has little new to offer")
    if (poor := guess(result, _accuracies(result))) is not None:
        lines.append(at_chance("no trial is", **poor))
    return lines + ([result.owed] if result.owed else [])


def show_run(result: Any) -> None:
    """The best trials of a `capnas.search.RunResult` and where to go on from there."""
    names, where = result.config.values, shlex.quote(str(result.folder))
    if not result.front:
        print(no_value(result))
        return
    beside = [] if "accuracy" in names else ["accuracy"]  # which everybody asks for
    metrics = {t.number: e.metrics for t, e in result.evaluations()}
    numbers = ((t, [*t.values, *(metrics.get(t.number, {}).get(n) for n in beside)]) for t in result.front[:_FRONT])
    rows = [[str(t.number), *map(short, values), ", ".join(f"{k}={v}" for k, v in t.params.items())] for t, values in numbers]
    several = f"Pareto set, {counted(len(result.front), 'trial')}"
    several += f", the {_FRONT} best by {with_unit(names[0])}" if len(result.front) > _FRONT else ""
    title = ("best value" if result.finals or result.owed else "best trial") if len(names) == 1 else several
    show_table(["trial", *map(with_unit, names), *beside, "parameters"], rows, title=title, texts=["parameters"])
    if result.finals:
        show_finals(result)
    print(f"best architecture: capnas best {where}\nreport: capnas report {where} --html report.html")


def show_finals(result: Any) -> None:
    """What the final trainings of a `capnas.search.RunResult` gave, best first value first, and who is named."""
    from capnas.objective.targets import TOLD

    left, named = result.n_finals_left, f"trial {result.best.number} is named" if result.named_by_finals else "none completed"
    rows = [
        [str(trial.number), short(trial.values[0]), *(short(final[name]) for name in TOLD), final["status"]]
        for trial, final in result.finals
    ]
    title = f"finals, {counted(result.config.finals_epochs, 'epoch')} each: {f'{left} still to be trained' if left else named}"
    show_table(["trial", result.config.values[0], *(f"final {name}" for name in TOLD), "outcome"], rows, title=title, texts=["outcome"])


def show_best(document: Mapping[str, Any], test: Mapping[str, Any] | None, code: str) -> None:
    """One trial: values, parameters, metrics, its accuracy in the finals, its code, and last the result of its retraining."""
    print(f"trial {document['trial']} of {document['study']}: {document['status']}, {document['image_size']} px")
    metrics = {k: v for k, v in document["metrics"].items() if v is not None and not k.startswith("init_")}
    values, metrics = ({with_unit(k): v for k, v in found.items()} for found in (document["values"], metrics))
    for name, rows in (("value", values), ("parameter", document["params"]), ("metric (see capnas scores)", metrics)):
        texts = [[k, short(v) if isinstance(v, int | float) and not isinstance(v, bool) else str(v)] for k, v in rows.items()]
        if texts:
            show_table([name, ""], texts)
    if (final := document.get("final")) is not None and final["status"] == "complete":
        print(f"accuracy {final['accuracy']:.4f} on validation after the {counted(final['epochs'], 'epoch')} of the finals")
    print(code)
    if test is not None and test["status"] == "complete":
        trained = f"{counted(test['epochs'], 'epoch')} on train + validation (seed {test['seed']})"
        print(f"test accuracy {test['test_accuracy']:.4f} after {trained}")
        print(f"trained network: {test['model']}" if test.get("model") else test["reason"])
    elif test is not None:
        print(f"the final training ended as {test['status']}: {test['reason']}")
