"""`methods`: what each registered method can do after training: merge, and leave as a LoRA, exactly or by SVD."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pera_lightning.adapters  # noqa: F401  registers the methods
from pera_lightning.adapters.method import LinearMethod, Method
from pera_lightning.adapters.registry import registered_methods
from pera_lightning.errors import ConfigurationError
from pera_lightning.training.tables import format_table

RANK = 8
NONE = "–"
_HEAD = ("method", "merge", f"exact LoRA of rank={RANK}", "LoRA by SVD")
_MERGE = {"exact": "exact", "approximate": "static or calibrated", "none": NONE}
# The rank of the LoRA in terms of the method's own rank r.
_RANKS = {"LoRA": "r *", "PERA": "r(r+3)/2 *", "AuroRA": "r *"}  # the star leads to the notes below the table
_MEANING = """\
exact: equal to rounding. static or calibrated: AuroRA with dynamic inference is
not linear, and --mode says which linear map takes its place (with
inference_mode=static it merges exactly). LoRA by SVD: --rank says the rank; the
error of every layer is reported.
* LoRA: 2r with init=pissa, milora. PERA: terms=square 2r, cross r(r+1)/2,
linear r. AuroRA: of the merged map."""


def run(args: Sequence[str]) -> None:
    """Prints the table; takes nothing but ``--help``."""
    if args and args[0] not in ("--help", "-h"):
        raise ConfigurationError(f"methods takes no options; given {' '.join(args)}")
    print(table(), flush=True)


def example(cls: type[Method], rank: int = RANK) -> Method:
    """A method with its rank, or each of its ranks, set; otherwise as it is by default."""
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: rank for name in ("rank", "hira_rank", "lora_rank") if name in names})


def capabilities(cls: type[Method]) -> tuple[str, str, str]:
    """The cells of a method's row after its name: merge, exact LoRA, LoRA by SVD."""
    method = example(cls)
    rank = method.export_rank  # None: its update has no low rank
    words = _RANKS.get(cls.__name__, "r" if rank == RANK else "")
    exact = NONE if rank is None else f"{rank} ({words})" if words else str(rank)
    return _MERGE[method.merging], exact, NONE if method.merging == "none" else "any rank"


def table() -> str:
    """All registered methods, and what the columns mean."""
    rows = [[name, *capabilities(cls)] for name, cls in registered_methods().items()]
    own = ", ".join(name for name, cls in registered_methods().items() if not issubclass(cls, LinearMethod))
    return f"""\
{format_table(_HEAD, rows, text_columns=4)}

{_MEANING}
{own}: the network's own weights are trained, so there is
nothing to merge or to export as a LoRA; `export --format merged` writes them."""
