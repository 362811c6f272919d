"""What the runs of a sweep say together: statistics a setting, the setting to choose, a table and a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from math import isfinite
from statistics import fmean, median, stdev
from typing import Any

from pera_lightning.sweeps.plan import setting_name, short_keys

COMPLETE = "complete"


def statistics_of(values: Sequence[float]) -> dict[str, Any]:
    """n, mean, median, sd (of the sample, n - 1; None for one value), min and max; in the values' unit."""
    return {
        "n": len(values),
        "mean": fmean(values),
        "median": median(values),
        "sd": stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
    }


def summarise(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Statistics of the complete runs, setting by setting.

    Args:
        records: runs as `sweep.json` holds them.

    Returns:
        For each setting with a complete run: ``values``, ``seeds``, ``selection`` (statistics with ``name`` and
        ``mode``; None where the runs have none, or not the same), ``selected_on_test``, ``metrics`` (name to
        statistics), ``trainable_parameters`` (None where they differ).
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["status"] == COMPLETE:
            groups.setdefault(setting_name(record["values"]), []).append(record)
    rows = []
    for group in groups.values():
        names = dict.fromkeys(name for record in group for name in record["metrics"])
        parameters = {record["trainable_parameters"] for record in group}
        rows.append(
            {
                "values": dict(group[0]["values"]),
                "seeds": [record["seed"] for record in group],
                "selection": _selection(group),
                "selected_on_test": any(record["selected_on_test"] for record in group),
                "metrics": {
                    name: statistics_of([r["metrics"][name] for r in group if name in r["metrics"]]) for name in names
                },
                "trainable_parameters": parameters.pop() if len(parameters) == 1 else None,
            }
        )
    return rows


def _selection(group: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    chosen = [record["selection"] for record in group]
    if None in chosen or len({(one["name"], one["mode"]) for one in chosen}) > 1:
        return None
    of = {name: chosen[0][name] for name in ("name", "mode")}
    return {**of, **statistics_of([one["score"] for one in chosen])}


def best_setting(summary: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str] | None, str]:
    """The setting with the best mean selection score; the test scores choose nothing.

    Args:
        summary: of `summarise`.

    Returns:
        Its values (None where there is nothing to choose, or to choose by) and a line that says so, empty for less
        than two settings.
    """
    if len(summary) < 2:
        return None, ""
    by = [row["selection"] for row in summary]
    kinds = {(one["name"], one["mode"]) for one in by if one is not None}
    if None in by or len(kinds) != 1 or not all(isfinite(one["mean"]) for one in by):
        return None, "No setting is named best: the runs have no selection score that all of them share."
    ((name, mode),) = kinds
    choose = max if mode == "max" else min
    row = choose(summary, key=lambda row: row["selection"]["mean"])
    text = f"Best by the mean of {name} ({mode}): {setting_name(row['values'])}, {row['selection']['mean']:.4f}"
    if len({one["n"] for one in by}) > 1:
        text += "; the settings have unlike numbers of runs"
    if any(row["selected_on_test"] for row in summary):
        text += f"; {name} is measured on the test set itself, so its test scores are those of a chosen setting"
    return dict(row["values"]), text + "."


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """Lines up a summary: a line for each setting and metric, the selection score first."""
    cells = [["setting", "metric", "n", "mean ± sd", "median", "min", "max"]]
    for row in summary:
        lines = {} if row["selection"] is None else {f"{row['selection']['name']} (selection)": row["selection"]}
        setting = setting_name(row["values"])
        for metric, of in {**lines, **row["metrics"]}.items():
            spread = "-" if of["sd"] is None else f"{of['sd']:.4f}"
            cells.append(
                [setting, metric, str(of["n"]), f"{of['mean']:.4f} ± {spread}"]
                + [f"{of[key]:.4f}" for key in ("median", "min", "max")]
            )
            setting = ""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lined = [
        "  ".join(
            [f"{a:<{widths[0]}}", f"{b:<{widths[1]}}"] + [c.rjust(w) for c, w in zip(rest, widths[2:], strict=True)]
        )
        for a, b, *rest in cells
    ]
    return "\n".join(line.rstrip() for line in lined)


def scores(record: Mapping[str, Any]) -> str:
    """A complete run's selection score and test metrics in a line."""
    parts = []
    if record["selection"] is not None:
        parts.append(f"{record['selection']['name']} {record['selection']['score']:.4f}")
    parts += [f"{name} {value:.4f}" for name, value in record["metrics"].items()]
    return ", ".join(parts)


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """A row for each run, complete or not; what a run does not have is left empty."""
    keys = list(dict.fromkeys(key for record in records for key in record["values"]))
    metrics = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    short = short_keys(keys)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    about = ["name", "seed", *(short[key] for key in keys), "status", "selection", "selection_score"]
    writer.writerow([*about, *metrics, "trainable_parameters", "fit_seconds", "test_seconds"])
    for record in records:
        selection = record["selection"] or {"name": None, "score": None}
        row = [record["name"], record["seed"], *(record["values"].get(key) for key in keys), record["status"]]
        row += [selection["name"], selection["score"], *(record["metrics"].get(name) for name in metrics)]
        writer.writerow([*row, *(record[key] for key in ("trainable_parameters", "fit_seconds", "test_seconds"))])
    return out.getvalue()
