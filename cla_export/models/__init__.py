"""PyTorch side: the families cla-export knows, one file each.

A family is a module with two functions: `read_spec(config) -> ModelSpec` and
`build(spec) -> nn.Module`, where the module's stateless forward is
`(input_ids [B, S], position_ids [B, S]) -> logits [B, S, V]`. To add one, write the file and name
it in FAMILIES.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from cla_export.errors import BadInput
from cla_export.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from cla_export.models.cla import ClaDecoder

FAMILIES: Mapping[str, str] = {"cla": "cla_export.models.cla"}  # config's model_type -> module


class Family(Protocol):
    """What a family's module offers."""

    def read_spec(self, config: Mapping[str, object]) -> ModelSpec:
        """Read the family's config.json."""

    def build(self, spec: ModelSpec) -> "ClaDecoder":
        """Make the module, weights not yet loaded."""

    def constants(self, spec: ModelSpec) -> "Mapping[str, Tensor]":
        """Name -> value of each buffer that no checkpoint holds, such as RoPE tables."""


def family_of(config: Mapping[str, object]) -> Family:
    """Find the family by `model_type`; imports PyTorch."""
    return cast("Family", import_module(_module_name(config)))


def _module_name(config: Mapping[str, object]) -> str:
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    close = get_close_matches(str(model_type), FAMILIES, n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise BadInput(
        f"config.json: model_type is {model_type!r}, which is not supported{hint} "
        f"(supported: {', '.join(sorted(FAMILIES))})"
    )
