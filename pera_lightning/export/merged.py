"""Export of merged weights: a folder that the network's own library loads, with no trace of this package.

What is the same for every library: the merge, its error, and the output folder. Who writes the files is in
`transformers.py`, `timm.py` and `diffusers_pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

from torch import nn

from pera_lightning.errors import ConfigurationError, listed, megabytes
from pera_lightning.export.folder import check_output_folder, output_folder
from pera_lightning.merging.merge import MergeOptions, MergeReport, adapted_layers, merge, merge_and_unload
from pera_lightning.validation import renamed

_BESIDES = 32 << 20  # bytes of configuration and tokenizer, at most
# Called with the folder to write into; gives notes, one line each.
Write = Callable[[Path], list[str]]


@dataclass
class MergedReport:
    """What an export of merged weights wrote."""

    folder: Path
    size: int  # bytes of its files
    merge: MergeReport
    notes: list[str] = field(default_factory=list)  # one line for each thing that a reader should know

    def __str__(self) -> str:
        wrote = f"Wrote {self.folder} ({megabytes(self.size)})"
        return "\n".join([str(self.merge), wrote, *(f"  note: {note}" for note in self.notes)])


@renamed("method", "mode")
def export_merged(
    model: nn.Module, folder: str | Path, write: Write, *, overwrite: bool = False, **options: Unpack[MergeOptions]
) -> MergedReport:
    """Merges a model and writes it. The model is plain afterwards, also where the writing fails: hand over a copy.

    Args:
        model: injected, or a model that contains an injected one; merged already or not.
        folder: made, in full or not at all.
        write: writes the files of the plain model.
        overwrite: replaces an earlier export.
        options: `mode`, `batches`, `measure_on` and `forward`, as in `pera_lightning.merge`.

    Returns:
        What was done, to print.

    Raises:
        NotMergeableError: where no matrix equals an update.
        ConfigurationError: where nothing was injected, or `folder` exists.
        CheckpointError: where the disk has no room.
    """
    check_output_folder(folder, overwrite=overwrite)
    # Merged in place, since a second copy of a large model may not fit.
    if any(adapted_layers(model)):
        report = merge(model, keep_base=False, **options)
    elif unknown := set(options) - set(MergeOptions.__annotations__):
        raise TypeError(f"export_merged has no argument {listed(sorted(unknown))}")
    elif options.get("mode") is not None:
        raise ConfigurationError(f"mode={options['mode']!r} acts on AuroRA only, and no layers are adapted")
    else:
        report = MergeReport(0, notes=["its method adapts no layers: the weights are written as they were trained"])
    merge_and_unload(model)  # raises for a model that was never injected
    # The disk's room is checked before anything is written.
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}  # tied weights count once
    with output_folder(folder, overwrite=overwrite, needed=sum(sizes.values()) + _BESIDES) as made:
        notes = write(made)  # by the network's own library
        size = sum(file.stat().st_size for file in made.rglob("*") if file.is_file())
    return MergedReport(Path(folder), size, report, notes)
