"""The report of an injection: which layers were adapted, what is trained, and what a reader should know."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class InjectionReport:
    """What an injection did.

    Attributes:
        method: the method, as its constructor call.
        matched: path of each adapted layer to the names of its slices.
        trained_modules: paths of the modules trained in full (heads).
        adapter_parameters: number of parameters in adapters.
        trainable_parameters: number of all trained parameters, heads included.
        total_parameters: number of parameters of base, adapters and heads, shared ones counted once.
        shapes: path of each adapted layer to (out, in).
        notes: one line for each thing that a reader should know.
    """

    method: str
    matched: dict[str, tuple[str, ...]] = field(default_factory=dict)
    trained_modules: tuple[str, ...] = ()
    adapter_parameters: int = 0
    trainable_parameters: int = 0
    total_parameters: int = 0
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def percent(self) -> float:
        """Trained parameters as a percentage of all (base and trained)."""
        return 100.0 * self.trainable_parameters / max(1, self.total_parameters)

    def __str__(self) -> str:
        lines = [f"Injected {self.method}"]
        # A line for each kind of layer, in columns as wide as their longest cell.
        kinds = self._kinds().items()
        table = [(name, f"{n} x" if n > 1 else "", f"{o} x {i}", slices) for (name, o, i, slices), n in kinds]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
        # Modules trained in full, and the count of what is trained.
        heads = self.trainable_parameters - self.adapter_parameters
        if self.trained_modules:
            lines.append(f"  trained in full: {', '.join(self.trained_modules)}")
        trained = f"{self.trainable_parameters:,} (adapters {self.adapter_parameters:,}, other {heads:,})"
        lines.append(f"  trainable {trained} of {self.total_parameters:,}: {self.percent:.4f} %")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def _kinds(self) -> Counter[tuple[str, int, int, str]]:
        """Counts layers by name, shape and slices; those that differ in their layer number only are of one kind."""
        kinds: Counter[tuple[str, int, int, str]] = Counter()
        for path, slices in self.matched.items():
            name = ".".join("*" if piece.isdigit() else piece for piece in path.split("."))  # layers.*.q_proj
            kinds[name, *self.shapes[path], "" if slices == ("all",) else f"slices {', '.join(slices)}"] += 1
        return kinds
