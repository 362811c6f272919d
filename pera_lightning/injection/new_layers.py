"""Finds frozen parameters that no file gave: they are random, would stay so, and are other ones in the next process."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from pera_lightning.adapters.adapted_layer import AdaptedLayer

_HEADS = {"head", "classifier", "score", "fc"}


def new_and_frozen(model: nn.Module) -> list[str]:
    """Paths of modules of an injected model whose parameters are frozen and, as far as can be told, newly initialised.

    Models of transformers mark what they have loaded, timm's say for how many classes; of others a last linear layer
    that is called head, classifier, score or fc is named, which may be a trained one.
    """
    adapted = {path for path, module in model.named_modules() if isinstance(module, AdaptedLayer)}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad and n.rpartition(".")[0] not in adapted}
    for path, module in model.named_modules():
        names = {f"{path}.{name}" if path else name for name, _ in module.named_parameters()}
        if (loaded := _loaded_by_transformers(module)) is not None:
            new = names - {f"{path}.{name}" if path else name for name in loaded}
        elif (heads := _new_heads_of_timm(module)) is not None:
            prefixes = tuple(f"{path}.{head}." if path else f"{head}." for head in heads)
            new = {name for name in names if name.startswith(prefixes)}
        else:
            continue
        return modules_of(model, new & frozen)
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    last = linears[-1] if linears and not _HEADS.isdisjoint(linears[-1].split(".")) else None
    return [last] if last is not None and f"{last}.weight" in frozen else []


def modules_of(model: nn.Module, names: Collection[str]) -> list[str]:
    """The outermost modules all of whose parameters are among `names`: what to put into `trainable`."""
    found: dict[str, None] = {}
    for name in (n for n, _ in model.named_parameters() if n in names):  # in the model's order
        path = name.rpartition(".")[0]
        above = path.rpartition(".")[0]
        while above and all(f"{above}.{n}" in names for n, _ in model.get_submodule(above).named_parameters()):
            path, above = above, above.rpartition(".")[0]
        found[path or name] = None
    return [*found]


def _loaded_by_transformers(module: nn.Module) -> set[str] | None:
    """Names of the parameters that `from_pretrained` has read; None for a module that it did not make."""
    parameters = dict(module.named_parameters())
    loaded = {name for name, p in parameters.items() if getattr(p, "_is_hf_initialized", False)}
    # A few marks alone are of ties: earlier versions of transformers set no others.
    return loaded if hasattr(module, "config") and 2 * len(loaded) > len(parameters) else None


def _new_heads_of_timm(module: nn.Module) -> tuple[str, ...] | None:
    """Paths of the classifiers that are not those of the pretrained weights; None for a module that is not timm's."""
    config = getattr(module, "pretrained_cfg", None)
    if not isinstance(config, dict) or "classifier" not in config:
        return None
    if getattr(module, "num_classes", None) == config.get("num_classes"):
        return ()
    heads = config["classifier"] or ()
    return (heads,) if isinstance(heads, str) else tuple(heads)
