"""What transformers calls the parameters of a model when it saves them, and which it takes apart.

Read off its own conversion, run on a model without data: a tensor that is saved is a parameter or
rows of one.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import revert_weight_conversion

from cla_export.errors import BadInput
from cla_export.spec import Rows


def stored_as(
    model: Any,  # noqa: ANN401
    part: str,
) -> tuple[dict[str, str], dict[str, tuple[tuple[Rows, ...], ...]]]:
    """How transformers saves the parameters of a model on the meta device.

    Returns the names of those that it calls otherwise, and of those that it saves in pieces, such
    as the experts of a mixture, the pieces in order. `part` comes in place of the leading `model.`
    where the model is part of another.
    """
    own = model.state_dict()
    names = {id(tensor): name for name, tensor in own.items()}
    held = {_storage(tensor): name for name, tensor in own.items()}
    renamed: dict[str, str] = {}
    pieces: dict[str, dict[int, Rows]] = {}
    with _ViewsStayViews():
        saved = revert_weight_conversion(model, own)
    for stored, tensor in saved.items():
        name = names.get(id(tensor), held.get(_storage(tensor)))
        if name is None or not tensor.is_contiguous():
            raise BadInput(
                f"config.json: models of type {model.config.model_type!r} store {stored}, which is "
                "no parameter of their code, nor rows of one; such weights cannot be read"
            )
        if part and stored.startswith("model."):
            stored = part + stored.removeprefix("model.")  # noqa: PLW2901
        if tensor.shape != own[name].shape:
            rows = Rows(stored, tuple(tensor.shape))
            pieces.setdefault(name, {})[tensor.storage_offset()] = rows
        elif name != stored:
            renamed[name] = stored
    return renamed, {name: (_in_order(name, own[name], found),) for name, found in pieces.items()}


def _in_order(name: str, whole: Tensor, pieces: dict[int, Rows]) -> tuple[Rows, ...]:
    """Pieces by where they start in a parameter, which they must fill."""
    end = 0
    for start in sorted(pieces):
        assert start == end, f"{name}: nothing is saved of {end}..{start}"
        end += math.prod(pieces[start].shape)
    assert end == whole.numel(), f"{name}: nothing is saved of {end}.."
    return tuple(pieces[start] for start in sorted(pieces))


class _ViewsStayViews(TorchFunctionMode):
    """Rows that are to be saved as a tensor of their own still show where they come from."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001
