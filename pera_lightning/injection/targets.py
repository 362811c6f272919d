r"""The target language: which layers, and which rows of fused projections, an expression names.

- ``q_proj`` or ``attn.qkv``: the end of a module's path, in whole components.
- ``blocks.*.attn.qkv``: a glob, also matched at the end of the path; ``*`` and ``?`` stay within one component, ``**``
  spans several.
- ``re:.*layers\.[0-3]\..*q_proj``: a regular expression that the whole path must match.
- ``attn.qkv[q,v]``: rows of a fused projection (after a regular expression, with a space before the bracket).

A name must match linear layers only; a glob or an expression takes the linear ones among what it matches. Nothing in a
module whose attribute ``output_unused`` is true is taken: adapters there would get no gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from pera_lightning.adapters.base import WHOLE, base_weight, check_blocks, is_linear
from pera_lightning.adapters.method import Target
from pera_lightning.errors import ConfigurationError, NoTargetMatched, UnsupportedTarget, closest, listed
from pera_lightning.injection.fused_projections import interleaved_reason, known_layout, unsupported_reason

Fused = Mapping[str, Mapping[str, int]]
UNUSED = "output_unused"  # attribute of a part of a network that runs, and whose output the network does not use
_ROWS = re.compile(r"^(?P<name>.*?)\s*\[(?P<rows>[^\[\]]*)\]$")


@dataclass(frozen=True)
class Expression:
    """One parsed target expression.

    Attributes:
        text: as given.
        pattern: matches a module's whole path.
        literal: whether it is a plain name.
        rows: names of row blocks, empty for the whole layer.
    """

    text: str
    pattern: re.Pattern[str]
    literal: bool
    rows: tuple[str, ...] = ()


def parse(text: str) -> Expression:
    """Parses one target expression, see the file's head.

    Raises:
        ConfigurationError: where it is empty, not text, or no valid regular expression.
    """
    if not isinstance(text, str) or not text.strip():
        raise ConfigurationError(f"target {text!r}: a module name, a glob or 're:EXPRESSION' is needed")
    name, rows = text.strip(), ()
    regular = name.startswith("re:")
    found = _ROWS.match(name)
    # In a regular expression "[qv]" is a character class unless a space sets it apart.
    if found and (not regular or re.search(r"\s\[[^\[\]]*\]$", name)):
        name = found["name"]
        rows = tuple(row.strip() for row in found["rows"].split(","))
        if not all(rows) or not name:
            raise ConfigurationError(f"target {text!r}: row blocks are written as name[block,block], e.g. qkv[q,v]")
        if WHOLE in rows:
            raise ConfigurationError(f"target {text!r}: for all rows write {name!r} without brackets")
    if regular:
        try:
            return Expression(text, re.compile(name[3:].strip()), False, rows)
        except re.error as error:
            raise ConfigurationError(f"target {text!r}: not a regular expression: {error}") from None
    return Expression(text, _path_pattern(name), not re.search(r"[*?]", name), rows)


def _path_pattern(name: str) -> re.Pattern[str]:
    """A pattern that matches `name`, with its wildcards, at the end of a path and in whole components."""
    wild = {"**": r".*", "*": r"[^.]*", "?": r"[^.]"}
    parts = [wild.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*|\?)", name)]
    return re.compile(r"(?:.*\.)?" + "".join(parts))


def resolve(model: nn.Module, targets: Sequence[str], fused: Fused | None = None) -> list[Target]:
    """Finds the layers that the expressions name, in the model's order.

    Args:
        model: any module.
        targets: expressions, see the file's head.
        fused: sizes of the row blocks of fused projections whose layout this package does not know:
            module name to {block name: rows}, in order.

    Raises:
        NoTargetMatched: where an expression, or a name in `fused`, matches nothing, or a row block is unknown.
        UnsupportedTarget: where a match cannot be adapted.
        ConfigurationError: where two expressions disagree about one layer.
    """
    unused = tuple(f"{path}." for path, module in model.named_modules() if getattr(module, UNUSED, False))
    modules = {p: module for p, module in model.named_modules() if p and not f"{p}.".startswith(unused)}
    owners = {path: modules.get(path.rpartition(".")[0], model) for path in modules}
    chosen: dict[str, dict[str, str]] = {}
    for expression in (parse(text) for text in targets):
        for path in _matches(expression, modules, owners):
            wanted = dict.fromkeys(expression.rows or (WHOLE,), expression.text)
            seen = chosen.setdefault(path, {})
            if seen and (WHOLE in seen) != (WHOLE in wanted):
                raise ConfigurationError(
                    f"{path} is named as a whole and by row blocks: {next(iter(seen.values()))!r} and "
                    f"{expression.text!r}; keep one"
                )
            seen.update(wanted)
    for name in fused or {}:
        named = [path for path in chosen if parse(name).pattern.fullmatch(path)]
        if not named:
            raise NoTargetMatched(f"fused names {name!r}, which is no targeted layer: {listed(chosen)}")
        if all(WHOLE in chosen[path] for path in named):
            raise ConfigurationError(f"fused names {name!r}, which is targeted whole: name its blocks, {name}[q,v]")
    neighbours = _neighbours(model, modules)
    order = {path: k for k, path in enumerate(modules)}
    found = []
    for path in sorted(chosen, key=order.__getitem__):
        before, after = (modules.get(p) if p else None for p in neighbours[path])
        blocks = _blocks(path, modules[path], owners[path], chosen[path], fused or {})
        found.append(Target(path=path, module=modules[path], blocks=blocks, previous=before, next=after))
    return found


def match_modules(model: nn.Module, names: Sequence[str], what: str) -> tuple[str, ...]:
    """Paths of the modules that `names` (names, globs, 're:') match; of nested matches the outer one.

    Args:
        model: any module.
        names: expressions without row blocks.
        what: the argument's name, for messages.

    Raises:
        NoTargetMatched: where a name matches nothing.
    """
    paths = [path for path, _ in model.named_modules() if path]
    found: set[str] = set()
    for name in names:
        expression = parse(name)
        if expression.rows:
            raise ConfigurationError(f"{what}: {name!r}: modules are trained whole, row blocks are for targets only")
        hits = [path for path in paths if expression.pattern.fullmatch(path)]
        if not hits:
            raise NoTargetMatched(f"{what}: {_nothing(name, paths, 'modules')}")
        found.update(hits)
    outer = [p for p in found if not any(p.startswith(f"{q}.") for q in found)]
    return tuple(sorted(outer, key=paths.index))


def _nothing(text: str, paths: Iterable[str], kind: str) -> str:
    """The message for an expression that matches nothing: closest names, or what ends there are."""
    paths = list(paths)
    ends = dict.fromkeys(path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit())
    wanted = text.removeprefix("re:").partition("[")[0].strip()
    near = closest(wanted, ends) or closest(wanted.rpartition(".")[2], ends) or f"; there are: {listed(ends, 12)}"
    return f"{text!r} matches none of the {len(paths)} {kind}{near}"


def _matches(expression: Expression, modules: dict[str, nn.Module], owners: dict[str, nn.Module]) -> list[str]:
    """Paths of the linear layers that an expression names."""
    hits = [path for path in modules if expression.pattern.fullmatch(path)]
    linear = [path for path in hits if is_linear(modules[path])]
    if not hits:
        names = [path for path, module in modules.items() if is_linear(module)]
        raise NoTargetMatched(f"targets: {_nothing(expression.text, names, 'linear layers')}")
    # A glob may pass over norms and activations, but not over linear layers of a kind that cannot be adapted.
    for path in hits:
        meant = expression.literal or not linear or isinstance(modules[path], nn.Linear)
        if meant and (reason := _reason(path, modules[path], owners[path])):
            raise UnsupportedTarget(f"target {expression.text!r} names {path}: {reason}")
    return linear


def _reason(path: str, module: nn.Module, owner: nn.Module) -> str:
    """Why a module cannot be adapted, or the empty string."""
    if reason := unsupported_reason(owner, path.rpartition(".")[2], module):
        return reason
    if is_linear(module):
        return ""
    inside = [name for name, m in module.named_modules() if name and is_linear(m)]
    hint = f"; linear layers inside it: {listed(inside)}" if inside else ""
    kind = "a subclass of nn.Linear" if isinstance(module, nn.Linear) else "no linear layer"
    return f"{type(module).__name__} is {kind}, and only nn.Linear and transformers' Conv1D can be adapted{hint}"


def _blocks(
    path: str, module: nn.Module, owner: nn.Module, wanted: dict[str, str], fused: Fused
) -> dict[str, tuple[int, int]]:
    """First and last row of each wanted block."""
    rows = base_weight(module).shape[0]
    if WHOLE in wanted:
        return {WHOLE: (0, rows)}
    text = next(iter(wanted.values()))
    name = path.rpartition(".")[2]
    sizes = next((dict(v) for k, v in fused.items() if parse(k).pattern.fullmatch(path)), None)
    if sizes is not None and sum(sizes.values()) != rows:
        raise ConfigurationError(f"fused: the blocks of {path} add up to {sum(sizes.values())} rows, it has {rows}")
    if sizes is None:
        if reason := interleaved_reason(owner, name):
            raise UnsupportedTarget(f"target {text!r}: {path}: {reason}")
        sizes = known_layout(owner, name, module, rows)
    if sizes is None:
        raise NoTargetMatched(
            f"target {text!r}: the row layout of {path} ({type(owner).__name__}) is not known; "
            f"give fused={{{name!r}: {{'q': …, 'k': …, 'v': …}}}} whose rows add up to {rows}"
        )
    ends: dict[str, tuple[int, int]] = {}
    first = 0
    for block, size in sizes.items():
        ends[block] = (first, first + size)
        first += size
    for block, source in wanted.items():
        if block not in ends:
            raise NoTargetMatched(f"target {source!r}: {path} has no row block {block!r}, it has {', '.join(ends)}")
    blocks = {block: ends[block] for block in ends if block in wanted}
    check_blocks(blocks, rows, path)
    return blocks


def _repeats(container: nn.Module) -> bool:
    return len({type(child) for child in container.children()}) == 1


def _neighbours(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, tuple[str | None, str | None]]:
    """Path of each linear layer to the paths of the layers of the same role and shape before and after it.

    Two layers have one role where their paths differ only in the numbers of repeated blocks: containers whose children
    are all of one class.
    """
    roles: dict[tuple, list[str]] = {}
    for path, module in modules.items():
        if is_linear(module):
            parts = path.split(".")
            containers = [modules.get(".".join(parts[:k]), model) for k in range(len(parts))]
            role = tuple("*" if p.isdigit() and _repeats(c) else p for p, c in zip(parts, containers, strict=True))
            roles.setdefault((role, *base_weight(module).shape), []).append(path)
    around = {}
    for paths in roles.values():
        for k, path in enumerate(paths):
            around[path] = (paths[k - 1] if k else None, paths[k + 1] if k + 1 < len(paths) else None)
    return around
