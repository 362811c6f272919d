"""Sequence classifiers of transformers, by hub id or folder, with a new head, and what is checked of them.

The head is all that lies outside of the model's base: BERT's `classifier`, RoBERTa's (a dense layer and the output),
DistilBERT's `pre_classifier` and `classifier`, DeBERTa's `pooler` and `classifier`. It is made anew, so that a head for
another task with as many classes does not survive; only what a pre-trained model (for masked tokens, say) has outside
of its base is kept, as ModernBERT's `head`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.injection.adapter_folder import read_adapter
from pera_lightning.injection.description import UNFROZEN
from pera_lightning.injection.inject import injection_of
from pera_lightning.injection.state import check_injection, check_state, take_as_unfrozen
from pera_lightning.training.checkpoint_io import checkpoint_adapters
from pera_lightning.training.sharding import sharded_like
from pera_lightning.training.transformers_models import check_complete, load_pretrained

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# What the dropout before a classifier is called; DeBERTa's configuration knows `cls_dropout` and does not list it.
_DROPOUTS = ("classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout", "summary_last_dropout")
_DEBERTA_DROPOUT = "cls_dropout"
# Classes of pre-trained models end so; others were trained on a task.
_PRETRAINED = ("Model", "ForMaskedLM", "ForPreTraining", "ForCausalLM")
_PROBE = 4099  # classes: a size that no other tensor has


def load_network(
    name: str, *, num_labels: int, head_dropout: float | None = None, weights: bool = True, **loading: Any
) -> tuple[PreTrainedModel, frozenset[str]]:
    """A sequence classifier, and the names of its parameters that are random.

    Args:
        name: hub id, or folder.
        num_labels: number of outputs of the head.
        head_dropout: probability of the dropout before the classifier; by default the configuration's.
        weights: False builds from the configuration alone, with random weights; the head's are named then.
        loading: further arguments of `load_pretrained`.

    Raises:
        ConfigurationError: for a model that cannot be had, or is not a classifier.
    """
    from transformers import AutoModelForSequenceClassification

    prepare = partial(_prepare, num_labels=num_labels, head_dropout=head_dropout)
    # A head for another number of classes may have other sizes; other tensors are refused below.
    loading |= {"weights": weights, "prepare": prepare, "ignore_mismatched_sizes": True}
    network, found = load_pretrained(AutoModelForSequenceClassification, name, **loading)
    # Whatever of the network would stay random is refused or named, so that it is trained.
    _check_kind(network, name)
    _check_dropout(network, head_dropout)
    head = head_parameters(network)  # names
    if not weights:
        return network, head
    missing, other = frozenset(found["missing_keys"]), frozenset(key for key, *_ in found["mismatched_keys"])
    check_complete(name, (key for key in missing - head if ".pooler." not in key))  # a pooler can be trained
    if wrong := sorted(other - head):
        raise ConfigurationError(
            f"model {name}: {len(wrong)} of its tensors have other shapes than its configuration says: "
            f"{listed(wrong, 2)}; fetch it again"
        )
    if _is_pretrained(network.config):  # what its files have outside of the base was not trained on a task
        return network, missing | other
    _renew(network)
    return network, missing | head


def _is_pretrained(config: PretrainedConfig) -> bool:
    kinds = getattr(config, "architectures", None) or ()
    return bool(kinds) and all(kind.endswith(_PRETRAINED) for kind in kinds)


def _prepare(config: PretrainedConfig, num_labels: int, head_dropout: float | None) -> None:
    """Sets what the head depends on in a model's configuration."""
    # transformers reads outputs, loss and names of the head from here.
    config.num_labels = num_labels
    config.id2label = {k: f"LABEL_{k}" for k in range(num_labels)}  # those of another task may be as many
    config.label2id = {label: k for k, label in config.id2label.items()}
    config.problem_type = "regression" if num_labels == 1 else "single_label_classification"
    if head_dropout is not None:
        deberta = str(getattr(config, "model_type", "")).startswith("deberta")
        for key in [_DEBERTA_DROPOUT] if deberta else [key for key in _DROPOUTS if hasattr(config, key)]:
            setattr(config, key, head_dropout)


def _check_kind(network: PreTrainedModel, name: str) -> None:
    if network.base_model is network or not head_parameters(network):
        raise ConfigurationError(
            f"model {name}: {type(network).__name__} has no head apart from its base; give an encoder such as BERT"
        )
    if network.config.get_text_config().pad_token_id is None:
        raise ConfigurationError(
            f"model {name} has no pad_token_id, by which {type(network).__name__} tells where a text ends: set it in "
            "its config.json, or give an encoder such as BERT"
        )


def _check_dropout(network: PreTrainedModel, head_dropout: float | None) -> None:
    """Raises `ConfigurationError` if a dropout was asked for, and none of the head has it."""
    base = {*network.base_model.modules()}
    there = [m.p for m in network.modules() if isinstance(m, nn.Dropout) and m not in base]  # probabilities
    if head_dropout is not None and head_dropout not in (there or [0.0]):
        raise ConfigurationError(
            f"head_dropout={head_dropout:g} would not act: {type(network).__name__} has no dropout before its "
            "classifier that its configuration sets; leave it out"
        )


def head_parameters(network: PreTrainedModel) -> frozenset[str]:
    """Names of the parameters outside of the base."""
    base = {id(p) for p in network.base_model.parameters()}
    return frozenset(name for name, p in network.named_parameters() if id(p) not in base)


@torch.no_grad()
def _renew(network: PreTrainedModel) -> None:
    """Initialises the head as the model's class does, whatever was loaded into it."""
    base = {*network.base_model.modules()}
    for module in network.modules():
        if module in base or module is network:
            continue
        for one in (module, *module.parameters(recurse=False)):
            one._is_hf_initialized = False  # by which transformers spares what it has loaded
        network._init_weights(module)


def check_trained(network: PreTrainedModel, random: Collection[str]) -> None:
    """Raises `ConfigurationError` if `random` parameters, which no file gave, are not trained."""
    idle = sorted(name for name in random if not network.get_parameter(name).requires_grad)
    if idle:
        modules = dict.fromkeys(_module_of(name, network) for name in sorted(random))
        raise ConfigurationError(
            f"{len(idle)} tensors of {type(network).__name__} are new and random and would stay so: "
            f"{listed(idle, 2)}; name their modules in trainable, e.g. trainable=[{', '.join(modules)}]"
        )


def _module_of(parameter: str, network: PreTrainedModel) -> str:
    """The module to train: the part of the head or of the base (its pooler) that a parameter lies in."""
    parts = parameter.split(".")  # "bert.pooler.dense.weight": pooler; "classifier.weight": classifier
    return parts[1] if parts[0] == network.base_model_prefix and len(parts) > 2 else parts[0]


def trained_labels(name: str, revision: str | None, state: Mapping[str, Tensor]) -> int | None:
    """How many outputs the head has in `state`, trained tensors by their names in the network; None without one."""
    # The output layer is the tensor that has the size which was asked for, whatever it is called.
    with torch.device("meta"):
        network, head = load_network(name, num_labels=_PROBE, dtype=torch.float32, revision=revision, weights=False)
    last = [n for n in sorted(head) if network.get_parameter(n).shape[0] == _PROBE and n in state]
    return len(state[last[0]]) if last else None


def start_from(network: PreTrainedModel, path: str) -> str | None:
    """Loads the adapters of another run, and not its head.

    Args:
        network: network that is injected as that run's was.
        path: Lightning checkpoint or adapter folder of that run.

    Returns:
        The task that it was trained on, where it says so.

    Raises:
        CheckpointError: for a path without such adapters, or with those of another method or base.
    """
    folder = Path(path).is_dir()
    state, spec = read_adapter(path) if folder else checkpoint_adapters(path)
    mark = injection_of(network)
    if mark is None:
        raise ConfigurationError(f"mnli_checkpoint={path}: this run has no adapters to start; add AdapterInjection")
    # Of the checkpoint everything but its heads, while this network keeps its own.
    heads = tuple(f"{module}." for module in spec["trained_modules"])
    taken = {name: value for name, value in state.items() if not name.startswith(heads)}
    own = tuple(f"{module}." for module in mark.trained_modules)
    spec = {**spec, "trained_modules": list(mark.trained_modules)}
    if "rest_of_base" in spec:  # what only one of the two trains in full is in no comparison
        spec["rest_of_base"] = {name: spec["rest_of_base"].get(name, own) for name, own in mark.rest_of_base.items()}
    check_injection(spec, mark, path, held=taken)
    check_state(network, taken, path, unfrozen=spec.get(UNFROZEN), kept=own)
    take_as_unfrozen(network, spec)
    present = network.state_dict()  # its tensors, which FSDP2 may have sharded already
    with torch.no_grad():
        for name, value in taken.items():
            present[name].copy_(sharded_like(value.to(present[name].dtype), present[name]))
    return (spec.get("trained_on") or {}).get("task")
