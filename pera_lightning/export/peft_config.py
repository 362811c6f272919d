"""peft's config of an exported adapter, and its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pera_lightning.adapters.adapted_layer import AdaptedConv1D
from pera_lightning.adapters.base import LowRankUpdate
from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.export.peft_names import PREFIX, alpha_of, exact_patterns, heads, plain_modules, shortest_targets
from pera_lightning.injection.inject import Injection
from pera_lightning.merging.merge import adapted_layers

if TYPE_CHECKING:
    from peft import LoraConfig

_CAUSAL = ("ForCausalLM", "LMHeadModel")
_CLASSIFIERS = ["classifier", "score"]  # peft adds them to the heads of every SEQ_CLS model


def lora_config(
    root: nn.Module, mark: Injection, updates: Mapping[str, LowRankUpdate], base_name: str, revision: str | None
) -> LoraConfig:
    """peft's own config of the updates by layer, and of the base's name; checked by peft's own matching."""
    try:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists
    except ImportError:
        raise ConfigurationError("the export to PEFT needs peft: pip install 'pera-lightning[peft]'") from None
    modules = plain_modules(root)  # as peft will see them
    targets = shortest_targets(updates, modules)
    # The most frequent rank and alpha are the config's, the others go into its patterns.
    ranks = {path: update.rank for path, update in updates.items()}
    alphas = {path: alpha_of(update) for path, update in updates.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    # lora_bias and modules_to_save hold for the entire adapter, rank and alpha can differ by layer.
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=getattr(mark.method, "dropout", 0.0),
        target_modules=targets,
        rank_pattern=exact_patterns(ranks, rank),
        alpha_pattern=exact_patterns(alphas, alpha),
        fan_in_fan_out=any(isinstance(layer, AdaptedConv1D) for _, layer in adapted_layers(root)),
        lora_bias=any(update.bias is not None for update in updates.values()),
        modules_to_save=list(mark.trained_modules) or None,
        task_type=_task_type(root, mark, modules),
        base_model_name_or_path=str(base_name),
        revision=revision,
        inference_mode=True,
    )
    config.target_modules = targets  # peft makes a set of it, which is written in another order each time
    # peft's own matching has to find the layers that are adapted here, and no others.
    taken_by_peft = {path for path in modules if check_target_module_exists(config, path)}
    if taken_by_peft != set(updates):
        other = sorted(taken_by_peft ^ set(updates))
        same = f"by name peft cannot tell {listed(other, 3)} from the heads {list(mark.trained_modules)}"
        raise ConfigurationError(f"{same}: export merged weights")
    # Within a head, or instead of one, peft would adapt nothing.
    saved = heads(mark.trained_modules, modules)
    inside = [path for path in [*updates, *saved] if any(path.startswith(f"{head}.") for head in saved)]
    if clash := sorted({*inside, *(set(saved) & set(updates))}):
        names = list(mark.trained_modules)
        raise ConfigurationError(f"peft takes {listed(clash, 3)} for a head, by {names}: export merged weights")
    return config


def _task_type(root: nn.Module, mark: Injection, modules: Iterable[str]) -> str | None:
    """peft's name of the task, where it is known and peft makes no more heads of it than there are."""
    name = type(root).__name__
    if name.endswith(_CAUSAL) and hasattr(root, "prepare_inputs_for_generation"):
        return "CAUSAL_LM"
    if name.endswith("ForSequenceClassification"):
        modules = list(modules)
        ours = heads(mark.trained_modules, modules)
        return "SEQ_CLS" if heads([*mark.trained_modules, *_CLASSIFIERS], modules) == ours else None
    return None


def lora_tensors(root: nn.Module, updates: Mapping[str, LowRankUpdate], saved: Iterable[str]) -> dict[str, Tensor]:
    """What the folder holds, by peft's names: A (R, in), B (out, R), constants (out,), and the heads."""
    tensors = {}
    # lora_bias=True wants a constant of every layer, zero where it has none.
    constants = any(update.bias is not None for update in updates.values())
    for path, update in updates.items():
        name = f"{PREFIX}{path}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = update.A, update.B
        if constants:
            # peft multiplies it by the scale.
            bias = update.B.new_zeros(len(update.B)) if update.bias is None else update.bias / update.scale
            tensors[f"{name}.lora_B.bias"] = bias
    for path in saved:
        state = root.get_submodule(path).state_dict()
        tensors |= {f"{PREFIX}{path}.{name}": value for name, value in state.items()}
    # safetensors refuses shared memory.
    return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
