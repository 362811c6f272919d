r"""The target language: which layers, and which slices of fused projections, an expression names.

- ``q_proj`` or ``attn.qkv``: the end of a module's path, component by component.
- ``blocks.*.attn.qkv``: a glob, also matched at the end of the path; ``*`` and ``?`` stay within one component, ``**``
  spans several.
- ``re:.*layers\.[0-3]\..*q_proj``: a regular expression that the full path must match.
- ``attn.qkv[q,v]``: slices of a fused projection (after a regular expression, with a space before the bracket).

A name must match linear layers only; a glob or an expression takes the linear ones among what it matches. Nothing in a
module whose attribute ``output_unused`` is true is taken: adapters there would get no gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from pera_lightning.adapters.adapted_layer import base_weight, check_slices, is_linear, used_modules
from pera_lightning.adapters.base import ALL, plain_name
from pera_lightning.adapters.method import Target
from pera_lightning.errors import ConfigurationError, NoTargetMatched, UnsupportedTarget, closest, listed
from pera_lightning.injection.compiled import is_wrapper
from pera_lightning.injection.fused_projections import interleaves_heads, known_sizes

Fused = Mapping[str, Mapping[str, int]]
_BRACKET = re.compile(r"^(?P<name>.*?)\s*\[(?P<slices>[^\[\]]*)\]$")


class Expression(NamedTuple):
    """One parsed target expression."""

    text: str  # as given
    pattern: re.Pattern[str]  # matches the full path of a module
    literal: bool  # a plain name, without wildcards
    slices: tuple[str, ...] = ()  # empty for the entire layer


def parse(text: str) -> Expression:
    """Parses one target expression, see the file's head."""
    if not isinstance(text, str) or not text.strip():
        raise ConfigurationError(f"target {text!r}: a module name, a glob or 're:EXPRESSION' is needed")
    # Without the names that torch.compile puts between, as the paths are matched.
    name, slices = re.sub(r"\\?\._orig_mod\b|\b_orig_mod\\?\.", "", text.strip()), ()
    regular = name.startswith("re:")
    found = _BRACKET.match(name)
    # In a regular expression "[qv]" is a character class unless a space sets it apart.
    if found and (not regular or re.search(r"\s\[[^\[\]]*\]$", name)):
        name = found["name"]
        slices = tuple(part.strip() for part in found["slices"].split(","))
        if not all(slices) or not name:
            raise ConfigurationError(f"target {text!r}: slices are written as name[slice,slice], e.g. qkv[q,v]")
        if ALL in slices:  # the name of the one slice of a plain layer
            raise ConfigurationError(f"target {text!r}: for the entire layer write {name!r} without brackets")
    if regular:
        try:
            return Expression(text, re.compile(name[3:].strip()), False, slices)
        except re.error as error:
            raise ConfigurationError(f"target {text!r}: not a regular expression: {error}") from None
    return Expression(text, _path_pattern(name), not re.search(r"[*?]", name), slices)


def _path_pattern(name: str) -> re.Pattern[str]:
    """A pattern that matches `name`, with its wildcards, at the end of a path and component by component."""
    wild = {"**": r".*", "*": r"[^.]*", "?": r"[^.]"}  # only ** passes over the dots between components
    parts = [wild.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*|\?)", name)]
    return re.compile(r"(?:.*\.)?" + "".join(parts))


def resolve(model: nn.Module, targets: Sequence[str], fused: Fused | None = None) -> list[Target]:
    """Finds the layers that the expressions name, in the model's order.

    Args:
        model: any module.
        targets: expressions, see the file's head.
        fused: sizes of the slices of fused projections whose layout this package does not know: module name to
            {slice name: output features}, in order.

    Raises:
        NoTargetMatched: where an expression, or a name in `fused`, matches nothing, or a slice is unknown.
        UnsupportedTarget: where a match cannot be adapted.
        ConfigurationError: where two expressions disagree about one layer.
    """
    modules = used_modules(model)  # a compiled module is named by its wrapper's path, and adapted inside of it
    modules = {path: module for path, module in modules.items() if not is_wrapper(module)}
    owners = {path: modules.get(path.rpartition(".")[0], model) for path in modules}  # path to the module around it
    # Path of each named layer to the slices that are wanted of it, each with the expression that wants it.
    chosen: dict[str, dict[str, str]] = {}
    for expression in map(parse, targets):
        for path in _linear_matches(expression, modules, owners):
            wanted = dict.fromkeys(expression.slices or (ALL,), expression.text)
            seen = chosen.setdefault(path, {})
            if seen and (ALL in seen) != (ALL in wanted):  # several expressions may add slices, not mix with all
                both = f"{next(iter(seen.values()))!r} and {expression.text!r}"
                raise ConfigurationError(f"{path} is targeted in full and by slices: {both}; keep one")
            seen.update(wanted)
    # The layouts given by the user; one that nothing needs is a mistake.
    layouts: dict[str, Mapping[str, int]] = {}
    for name, sizes in (fused or {}).items():
        named = [path for path in chosen if parse(name).pattern.fullmatch(plain_name(path))]
        if not named:
            raise NoTargetMatched(f"fused names {name!r}, which is not targeted; the targets are {listed(chosen)}")
        if all(ALL in chosen[path] for path in named):
            raise ConfigurationError(f"fused names {name!r}, which is targeted in full: name its slices, {name}[q,v]")
        layouts = {**dict.fromkeys(named, sizes), **layouts}  # the first of several counts
    # From names to ranges of output features, in the model's order.
    found = []
    for path in (path for path in modules if path in chosen):
        slices = _slices(path, modules[path], owners[path], chosen[path], layouts.get(path))
        found.append(Target(path=path, module=modules[path], slices=slices))
    return found


def match_modules(model: nn.Module, names: Sequence[str], what: str) -> tuple[str, ...]:
    """Paths of the modules that `names` (names, globs, 're:') match; of nested matches the outer one.

    Args:
        model: any module.
        names: expressions without slices.
        what: the argument's name, for messages.
    """
    paths = [path for path, _ in model.named_modules() if path]  # in the model's order
    found: set[str] = set()
    for name in names:
        expression = parse(name)
        if expression.slices:
            raise ConfigurationError(f"{what}: {name!r}: modules are trained in full; slices are for targets")
        hits = [path for path in paths if expression.pattern.fullmatch(plain_name(path))]
        if not hits:
            raise NoTargetMatched(f"{what}: {_matches_nothing(name, paths, 'modules')}")
        found.update(hits)
    return tuple(p for p in paths if p in found and not any(p.startswith(f"{q}.") for q in found))


def _matches_nothing(text: str, paths: Iterable[str], kind: str) -> str:
    """Says that an expression matches nothing, with the closest names or else with those that exist."""
    paths = list(paths)
    ends = dict.fromkeys(path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit())
    # Compared by last components, since these are what people type.
    wanted = text.removeprefix("re:").partition("[")[0].strip()
    near = closest(wanted, ends) or closest(wanted.rpartition(".")[2], ends) or f"; there are: {listed(ends, 12)}"
    return f"{text!r} matches none of the {len(paths)} {kind}{near}"


def _linear_matches(expression: Expression, modules: dict[str, nn.Module], owners: dict[str, nn.Module]) -> list[str]:
    """Paths of the linear layers that an expression names."""
    hits = [path for path in modules if expression.pattern.fullmatch(plain_name(path))]  # linear or not
    linear = [path for path in hits if is_linear(modules[path])]
    if not hits:
        names = [path for path, module in modules.items() if is_linear(module)]
        raise NoTargetMatched(f"targets: {_matches_nothing(expression.text, names, 'linear layers')}")
    # A glob may pass over norms and activations, but not over linear layers of a kind that cannot be adapted.
    for path in hits:
        meant = expression.literal or not linear or isinstance(modules[path], nn.Linear)
        if meant and (reason := _unsupported(modules[path], owners[path])):
            raise UnsupportedTarget(f"target {expression.text!r} names {path}: {reason}")
    return linear


def _unsupported(module: nn.Module, owner: nn.Module) -> str:
    """Why a module cannot be adapted, or the empty string."""
    if isinstance(owner, nn.MultiheadAttention):
        never = "nn.MultiheadAttention reads this layer's weight and never calls it, so an adapter would change nothing"
        return f"{never}; use an attention with separate linear layers"
    if is_linear(module):
        kind = module.weight.dtype
        usable = kind.is_floating_point and kind.itemsize > 1  # nor float8: no product of adapters has such a type
        return (
            ""
            if usable
            else f"its weight is {kind}, quantised, and has no product with an adapter's; load the base in bfloat16"
        )
    inside = [name for name, m in module.named_modules() if name and is_linear(m)]
    hint = f"; linear layers inside it: {listed(inside)}" if inside else ""
    kind = "a subclass of nn.Linear" if isinstance(module, nn.Linear) else "not a linear layer"
    return f"{type(module).__name__} is {kind}, and only nn.Linear and transformers' Conv1D can be adapted{hint}"


def _slices(
    path: str, module: nn.Module, owner: nn.Module, wanted: dict[str, str], sizes: Mapping[str, int] | None
) -> dict[str, slice]:
    """The output features of each slice of a layer that expressions want, in their order; `sizes` as the user gave."""
    features = base_weight(module).shape[0]  # out
    if ALL in wanted:
        return {ALL: slice(0, features)}
    # The sizes of all slices: as the user gives them, else as the owner's class has them.
    text, name = next(iter(wanted.values())), path.rpartition(".")[2]
    if sizes is not None and sum(sizes.values()) != features:
        raise ConfigurationError(f"fused: the slices of {path} add up to {sum(sizes.values())}, it has {features}")
    if sizes is None and interleaves_heads(owner, name):
        heads = f"{type(owner).__name__} interleaves its heads, so q, k and v are not slices of {path}"
        raise UnsupportedTarget(f"target {text!r}: {heads}; adapt it in full")
    sizes = sizes or known_sizes(owner, name, features)
    if sizes is None:
        raise NoTargetMatched(
            f"target {text!r}: the layout of {path} ({type(owner).__name__}) is not known; "
            f"give fused={{{name!r}: {{'q': …, 'k': …, 'v': …}}}} with sizes that add up to {features}"
        )
    # Each slice begins where the one before ends.
    every, first = {}, 0
    for slice_name, size in sizes.items():
        every[slice_name] = slice(first, first + size)
        first += size
    for slice_name, source in wanted.items():
        if slice_name not in every:
            raise NoTargetMatched(f"target {source!r}: {path} has no slice {slice_name!r}, it has {', '.join(every)}")
    found = {slice_name: rows for slice_name, rows in every.items() if slice_name in wanted}
    check_slices(found, features, path)
    return found
