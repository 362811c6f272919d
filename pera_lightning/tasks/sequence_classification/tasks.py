"""The nine tasks of GLUE (Wang et al., arXiv 1804.07461) as the hub's ``nyu-mll/glue`` has them; no torch.

Labels are numbered as there. Metrics are those of the leaderboard, in its order; `selection` is the one that chooses
the best epoch in the papers of PERA and AuroRA (accuracy; CoLA Matthews, STS-B Pearson). Names of submission files and
what stands in them are those that the leaderboard asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pera_lightning.errors import ConfigurationError, UnknownNameError, closest

REPOSITORY = "nyu-mll/glue"
CUSTOM = "custom"


@dataclass(frozen=True)
class GLUETask:
    """What sets one task of sentence classification apart."""

    name: str  # in configs, on the command line and on the hub
    text_columns: tuple[str, ...]  # one, or the two that make a pair
    class_names: tuple[str, ...] = ()  # by label; empty for regression
    metrics: tuple[str, ...] = ("accuracy",)  # some of accuracy, f1 (of label 1), matthews, pearson and spearman
    selection: str = "accuracy"  # the metric that chooses the best epoch
    sets: tuple[str, ...] = ("",)  # of validation and test, by dataloader; the first is the one that selects
    submission_files: tuple[str, ...] = ()  # each set's, without its ending
    writes_names: bool = False  # whether a submission has names of classes, not numbers
    label_range: tuple[float, float] = (-math.inf, math.inf)  # least and largest label of a regression
    sizes: tuple[int, ...] = ()  # examples, as published, of each set's validation file, then of each set's test file

    @property
    def regression(self) -> bool:
        """Whether labels are numbers to predict, and no classes."""
        return not self.class_names

    @property
    def num_labels(self) -> int:
        """Outputs of the head: one a class, or the one of a regression."""
        return len(self.class_names) or 1

    @property
    def labels_in_words(self) -> str:
        """The labels that are allowed, for a message."""
        if self.regression:
            low, high = self.label_range
            return "finite numbers of 32 bits, except -100" if math.isinf(low) else f"numbers from {low:g} to {high:g}"
        return ", ".join(f"{k} ({name})" for k, name in enumerate(self.class_names))

    def named(self, kind: str, name: str) -> str:
        """A set in full, as the hub's splits are called: ``named("test", "mismatched")`` is ``test_mismatched``."""
        return f"{kind}_{name}" if name else kind

    def size(self, split: str) -> int | None:
        """Examples of a validation or test file, as published; None of the training file and of a custom task."""
        splits = [self.named(kind, name) for kind in ("validation", "test") for name in self.sets]
        return dict(zip(splits, self.sizes, strict=False)).get(split)

    def written(self, prediction: float) -> str:
        """A prediction as a submission has it.

        Args:
            prediction: a label, or the output of a regression, which is cut to the range of its labels. With a range
                it has three decimals; without one any unit is possible, and it has as many digits as float32 needs.
        """
        if self.regression:
            low, high = self.label_range
            value = min(max(float(prediction), low), high) + 0.0  # -0.0 becomes 0.0
            return str(np.float32(value)) if math.isinf(low) else f"{value:.3f}"
        return self.class_names[int(prediction)] if self.writes_names else str(int(prediction))


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_F1, _CORRELATIONS = ("f1", "accuracy"), ("pearson", "spearman")

# By default their files are those of nyu-mll/glue, see `sources.py`; the sizes are those of its dataset card.
_TASKS = (
    GLUETask(
        "cola",
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews",),
        "matthews",
        submission_files=("CoLA",),
        sizes=(1043, 1063),
    ),
    GLUETask("sst2", ("sentence",), ("negative", "positive"), submission_files=("SST-2",), sizes=(872, 1821)),
    GLUETask(
        "mrpc", _PAIR, ("not_equivalent", "equivalent"), metrics=_F1, submission_files=("MRPC",), sizes=(408, 1725)
    ),
    GLUETask(
        "stsb",
        _PAIR,
        (),
        _CORRELATIONS,
        "pearson",
        submission_files=("STS-B",),
        label_range=(0.0, 5.0),
        sizes=(1500, 1379),
    ),
    GLUETask(
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        metrics=_F1,
        submission_files=("QQP",),
        sizes=(40430, 390965),
    ),
    GLUETask(
        "mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        sets=("matched", "mismatched"),
        submission_files=("MNLI-m", "MNLI-mm"),
        writes_names=True,
        sizes=(9815, 9832, 9796, 9847),
    ),
    GLUETask(
        "qnli", ("question", "sentence"), _ENTAILMENT, submission_files=("QNLI",), writes_names=True, sizes=(5463, 5463)
    ),
    GLUETask("rte", _PAIR, _ENTAILMENT, submission_files=("RTE",), writes_names=True, sizes=(277, 3000)),
    GLUETask("wnli", _PAIR, ("not_entailment", "entailment"), submission_files=("WNLI",), sizes=(71, 146)),
)
TASKS = {task.name: task for task in _TASKS}


def find_task(name: str) -> GLUETask:
    """The task of a name; raises `UnknownNameError` for another, naming the closest."""
    if name not in TASKS:
        near = closest(name.lower().replace("-", ""), [*TASKS, CUSTOM])
        raise UnknownNameError(
            f"unknown task {name!r}; there are {', '.join(TASKS)}, and {CUSTOM!r} for files of your own{near}"
        )
    return TASKS[name]


def custom_task(text_columns: Sequence[str], class_names: Sequence[str]) -> GLUETask:
    """The task of somebody's own files, with one text column or a pair, and no class names for regression."""
    if len(text_columns) not in (1, 2) or len({*text_columns}) < len(text_columns):
        raise ConfigurationError(f"text_columns={list(text_columns)}: one column, or the two of a pair, are needed")
    if class_names:  # F1 is that of label 1, so three classes have none
        metrics = ("accuracy", "f1", "matthews") if len(class_names) == 2 else ("accuracy", "matthews")
    else:
        metrics = _CORRELATIONS
    names = {"submission_files": (CUSTOM,), "writes_names": True}
    return GLUETask(CUSTOM, tuple(text_columns), tuple(class_names), metrics, metrics[0], **names)
