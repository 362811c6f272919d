"""The best setting of a sweep: chosen by the selection score, among settings whose results are of the same data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pera_lightning.cli.sweeps.plan import setting_name
from pera_lightning.errors import listed

# Facts of a run's protocol that say what its scores are scores of: the task, its metric, and the contents of its data.
# Not the split seed, which may follow the run's. The name of a monitor is not enough: val/metric is Pearson's r in one
# task and accuracy in another. Contents of the training set count because validation may be cut from it.
_DATA = re.compile(
    r"task|selection|(data|evaluation)\.(task|name|dataset|source|split_protocol|selection|main_metric)"
    r"|(data|evaluation|training)\.sha256\..+"
)
_LOADING = ("batch_size", "num_workers")  # options of a data module that leave its data as they are


def data_of(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Facts that are equal for runs on the same data, each with its distinct values in the runs of one setting.

    They are those of the runs' protocols; where a data module gives none, the grid values of its options.
    """
    facts: dict[str, list[Any]] = {}
    for record in records:
        for key, value in record["protocol"].items():
            if _DATA.fullmatch(key) and value not in facts.setdefault(key, []):
                facts[key].append(value)
    if any("." in key for key in facts):
        return facts
    grid = {key: [value] for key, value in records[0]["values"].items() if _is_of_data(key)}
    return {**facts, **{key: values for key, values in grid.items() if key.rpartition(".")[2] not in _LOADING}}


def best_settings(summary: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The settings with the best mean selection score, one for each data; test scores choose nothing.

    A setting with a run whose selection score is not a number is not chosen: that is no better than the worst.

    Args:
        summary: statistics of `summarise`.

    Returns:
        For each data of which there are two settings or more, and one can be chosen: ``of`` (the data in words, None
        where all are of the same), ``values``, and ``mean`` of the selection score. And lines that say so, empty for
        less than two settings.
    """
    if len(summary) < 2:
        return [], ""
    # Scores of unlike data cannot be compared: a best setting for each data.
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for setting in summary:
        groups.setdefault(json.dumps(setting["data"], sort_keys=True), []).append(setting)
    chosen, lines = [], []
    for label, group in zip(_labels(list(groups.values())), groups.values(), strict=True):
        if len(group) > 1:
            setting, line = _best_of(group, label)
            lines.append(line)
            if setting is not None:
                chosen.append({"of": label, "values": dict(setting["values"]), "mean": setting["selection"]["mean"]})
    if not lines:
        return [], "No setting is named best: no two of them are of the same data."
    return chosen, "\n".join(lines)


def _best_of(group: Sequence[Mapping[str, Any]], label: str | None) -> tuple[Mapping[str, Any] | None, str]:
    """The best of several settings of the same data, or None, and a line that says so."""
    of = "" if label is None else f" of {label}"
    by = [setting["selection"] for setting in group]
    # One metric, in one direction, of all runs.
    kinds = {(one["name"], one["mode"]) for one in by if one is not None}
    if None in by or len(kinds) != 1:
        return None, f"No setting{of} is named best: the runs have no selection score that all of them share."
    ((name, mode),) = kinds
    left = [setting for setting in group if not setting["selection"]["not_finite"]]
    if not left:
        return None, f"No setting{of} is named best: each has a run whose {name} is not a number."
    setting = (max if mode == "max" else min)(left, key=lambda one: one["selection"]["mean"])
    mean = setting["selection"]["mean"]
    text = f"Best{of} by the mean of {name} ({mode}): {setting_name(setting['values'])}, {mean:.4f}"
    if len({one["n"] + one["not_finite"] for one in by}) > 1:
        text += "; the settings have unlike numbers of runs"
    if out := [setting_name(setting["values"]) for setting in group if setting["selection"]["not_finite"]]:
        text += f"; not chosen from, as {name} of a run is not a number: {listed(out)}"
    if any(setting["selected_on_test"] for setting in group):
        text += f"; {name} is measured on the test set itself, so its test scores are those of a chosen setting"
    return setting, text + "."


def _labels(groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[str | None]:
    """Words for the data of each group of settings, those of the grid where these tell them apart."""
    if len(groups) == 1:
        return [None]
    # Keys of the grid name the data where each group has one value of them, and not all the same.
    found = {key: [{setting["values"][key] for setting in group} for group in groups] for key in groups[0][0]["values"]}
    keys = [key for key, of in found.items() if _is_of_data(key) and all(len(one) == 1 for one in of)]
    keys = [key for key in keys if len(set().union(*found[key])) > 1]
    by_grid = [setting_name({key: group[0]["values"][key] for key in keys}) for group in groups]
    if keys and len(set(by_grid)) == len(groups):
        return list(by_grid)
    # Else the facts that differ do, in a few letters: digests are long.
    facts = [group[0]["data"] for group in groups]
    names = dict.fromkeys(key for one in facts for key in one)
    unlike = [key for key in names if any(one.get(key) != facts[0].get(key) for one in facts)]
    return [
        ", ".join(f"{key}={'|'.join(str(value)[:12] for value in one.get(key, [])) or 'none'}" for key in unlike)
        for one in facts
    ]


def _is_of_data(key: str) -> bool:
    return key.partition(".")[0] == "data"
