"""Modules whose parameters have a shape and no data: what a model is made of, at no cost."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def parameters_without_data() -> Iterator[None]:
    """Modules made here have buffers as they are, and parameters on the meta device."""
    register = nn.Module.register_parameter

    def shape_only(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":  # a tied one is there already
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = shape_only  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def give_empty_data(module: nn.Module) -> None:
    """Put parameters on the CPU that are on the meta device; under fake tensors it takes none."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, old in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if id(old) not in made:
                empty = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                made[id(old)] = nn.Parameter(empty, requires_grad=False)
            setattr(part, name, made[id(old)])
