"""The summary of a sweep: statistics of each setting, a table and a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import fmean, median, stdev
from typing import Any

from pera_lightning.cli.sweeps.choice import data_of
from pera_lightning.cli.sweeps.plan import setting_name, short_keys
from pera_lightning.errors import listed
from pera_lightning.training.tables import format_table

COMPLETE = "complete"


def statistics_of(values: Sequence[float | None]) -> dict[str, Any]:
    """Statistics of the values that are numbers; in the values' unit.

    Args:
        values: value of each run; None, NaN and infinite ones are counted, and left out of the rest.

    Returns:
        ``n`` and ``not_finite`` (counts), ``mean``, ``median``, ``sd`` (of the sample, n - 1; None for one value),
        ``min`` and ``max``; each None where no number is left.
    """
    numbers = [value for value in values if value is not None and isfinite(value)]
    return {
        "n": len(numbers),
        "not_finite": len(values) - len(numbers),
        "mean": fmean(numbers) if numbers else None,
        "median": median(numbers) if numbers else None,
        "sd": stdev(numbers) if len(numbers) > 1 else None,
        "min": min(numbers, default=None),
        "max": max(numbers, default=None),
    }


def summarise(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Statistics of the complete runs of `sweep.json`, setting by setting.

    Returns:
        For each setting with a complete run: ``values``, ``seeds``, ``selection`` (statistics with ``name`` and
        ``mode``; None where the runs have none, or not the same), ``selected_on_test``, ``metrics`` (name to
        statistics), ``trainable_parameters`` (None where they differ), ``data`` (see `choice.data_of`).
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["status"] == COMPLETE:
            groups.setdefault(setting_name(record["values"]), []).append(record)
    rows = []
    for group in groups.values():
        # A metric is summed up over the runs that have it.
        measured: dict[str, list[float | None]] = {}
        for name, value in (item for record in group for item in record["metrics"].items()):
            measured.setdefault(name, []).append(value)
        parameters = {record["trainable_parameters"] for record in group}  # one number, as a rule
        rows.append(
            {
                "values": dict(group[0]["values"]),
                "seeds": [record["seed"] for record in group],
                "selection": _selection(group),
                "selected_on_test": any(record["selected_on_test"] for record in group),
                "metrics": {name: statistics_of(values) for name, values in measured.items()},
                "trainable_parameters": parameters.pop() if len(parameters) == 1 else None,
                "data": data_of(group),
            }
        )
    return rows


def _selection(group: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    chosen = [record["selection"] for record in group]
    if None in chosen or len({(one["name"], one["mode"]) for one in chosen}) > 1:
        return None
    return {"name": chosen[0]["name"], "mode": chosen[0]["mode"], **statistics_of([one["score"] for one in chosen])}


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """Lines up a summary: a line for each setting and metric, the selection score first."""
    rows = []
    for row in summary:
        lines = {} if row["selection"] is None else {f"{row['selection']['name']} (selection)": row["selection"]}
        setting = setting_name(row["values"])
        for metric, of in {**lines, **row["metrics"]}.items():
            mean, spread, *rest = (
                "-" if of[key] is None else f"{of[key]:.4f}" for key in ("mean", "sd", "median", "min", "max")
            )
            n = f"{of['n']} of {of['n'] + of['not_finite']}" if of["not_finite"] else str(of["n"])
            rows.append([setting, metric, n, f"{mean} ± {spread}", *rest])
            setting = ""  # said in its first line only
    return format_table(["setting", "metric", "n", "mean ± sd", "median", "min", "max"], rows, text_columns=2)


def scores(record: Mapping[str, Any]) -> str:
    """A complete run's selection score and test metrics in a line."""
    return ", ".join(
        f"{name} {'is not a number' if value is None else f'{value:.4f}'}" for name, value in _measured(record)
    )


def without_number(records: Sequence[Mapping[str, Any]]) -> str:
    """A line that says which complete runs have a score that is not a number, and of what; empty where none has."""
    runs: dict[str, list[str]] = {}
    for record in records:
        for name, value in _measured(record) if record["status"] == COMPLETE else ():
            if value is None:
                runs.setdefault(name, []).append(record["name"])
    told = "; ".join(f"{name} of {listed(names, 20)}" for name, names in runs.items())
    return f"Not numbers (NaN or infinite), and left out of the statistics: {told}." if told else ""


def _measured(record: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    chosen = record["selection"]
    return [*([] if chosen is None else [(chosen["name"], chosen["score"])]), *record["metrics"].items()]


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """A row for each run, complete or not; what a run does not have is left empty."""
    # Earlier sweeps of the folder may have had other metrics.
    keys = list(dict.fromkeys(key for record in records for key in record["values"]))
    metrics = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    short = short_keys(keys)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    last = ["trainable_parameters", "fit_seconds", "test_seconds"]
    writer.writerow(
        ["name", "seed", *(short[key] for key in keys), "status", "selection", "selection_score", *metrics, *last]
    )
    for record in records:
        selection = record["selection"] or {"name": None, "score": None}
        row = [record["name"], record["seed"], *map(record["values"].get, keys), record["status"]]
        row += [selection["name"], selection["score"], *map(record["metrics"].get, metrics)]
        writer.writerow([*row, *map(record.get, last)])
    return out.getvalue()
