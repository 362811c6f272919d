"""The precision of a module's network: a base in a low one, with what is trained in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pera_lightning.errors import ConfigurationError, listed
from pera_lightning.injection.inject import injection_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def keep_heads_float32(network: nn.Module) -> None:
    """Casts the modules trained in full to float32 over a base in low precision, and their inputs with them."""
    mark = injection_of(network)
    for path in mark.trained_modules if mark else ():
        head = network.get_submodule(path)
        # Its inputs come from a base in low precision: a hook casts them, and marks what `release_heads` undoes.
        low = any(p.is_floating_point() and p.dtype != torch.float32 for p in head.parameters())
        if low:
            head.float()
            head.register_forward_pre_hook(_cast_inputs)


def release_heads(network: nn.Module, dtype: torch.dtype) -> list[str]:
    """Undoes `keep_heads_float32`, for a base in `dtype`; gives the paths of the heads that were cast."""
    cast = []
    for path, module in network.named_modules():
        hooks = [key for key, hook in module._forward_pre_hooks.items() if hook is _cast_inputs]
        for key in hooks:
            del module._forward_pre_hooks[key]  # inputs come in the base's type again
        if hooks:
            module.to(dtype)  # as the base, so that libraries load it in one type
            cast.append(path)
    return cast


def check_trained_float32(network: nn.Module) -> None:
    """Raises `ConfigurationError` for base parameters trained in low precision, in which small updates vanish."""
    low = [n for n, p in network.named_parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if low:
        raise ConfigurationError(
            f"{len(low)} trained parameters are in low precision, in which small updates vanish: {listed(low, 2)}; set "
            "base_dtype=float32"
        )


def _cast_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
