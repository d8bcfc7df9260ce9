"""PyTorch side: the families cla-export knows, one file each.

A family is a module with three functions: `read_spec(config) -> ModelSpec`, `build(spec) ->
Decoder`, and `constants(spec)`, the buffers that no checkpoint holds. To add one, write the file
and name it in FAMILIES. What is not named there is looked for in transformers.
"""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from cla_export.errors import BadInput
from cla_export.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from cla_export.models.decoder import Decoder

FAMILIES: Mapping[str, str] = {  # config's model_type -> module
    "cla": "cla_export.models.cla",
    "gpt_crosslayer": "cla_export.models.gpt_crosslayer",
    "hunyuan": "cla_export.models.hunyuan",
}
# Types that transformers has too, but without `use_cla`, which it passes over.
SHARING: Mapping[str, str] = {
    "hunyuan_v1_dense": "cla_export.models.hunyuan",
    "hunyuan_v1_moe": "cla_export.models.hunyuan",
}


class Family(Protocol):
    """What a family's module offers."""

    def read_spec(self, config: Mapping[str, object]) -> ModelSpec:
        """Read the family's config.json."""

    def build(self, spec: ModelSpec) -> "Decoder":
        """Make the module, weights not yet loaded."""

    def constants(self, spec: ModelSpec) -> "Mapping[str, Tensor]":
        """Name -> value of each buffer that no checkpoint holds, such as RoPE tables."""


def family_of(config: Mapping[str, object]) -> Family:
    """Find the family by `model_type`; imports PyTorch, and transformers where it is installed.

    Raises:
        BadInput: no family has that type; close ones are named.
    """
    model_type = config.get("model_type")
    own = {**FAMILIES, **SHARING} if config.get("use_cla") else FAMILIES
    if isinstance(model_type, str) and model_type in own:
        return cast("Family", import_module(own[model_type]))
    known = _known_to_transformers()
    if isinstance(model_type, str) and model_type in known:
        return cast("Family", import_module("cla_export.models.hugging_face"))
    close = get_close_matches(str(model_type), {*FAMILIES, *known}, n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    supported = ", ".join(sorted(FAMILIES))
    supported += (
        ", and causal language models of transformers"
        if known
        else ", and with transformers installed its causal language models: pip install "
        "'cla-export[hf]'"
    )
    own_code = (
        "; its auto_map names code of the checkpoint, which is never run"
        if "auto_map" in config
        else ""
    )
    raise BadInput(
        f"config.json: model_type is {model_type!r}, which is not supported{hint} (supported: "
        f"{supported}){own_code}. Any other model has two ways in: --module package.module:factory "
        "names a function of yours that makes its PyTorch module, and `cla-export rewrite` takes "
        "an ONNX graph that you traced"
    )


def _known_to_transformers() -> Collection[str]:
    try:
        auto = import_module("transformers.models.auto.modeling_auto")
    except ImportError:
        return ()
    return cast("Mapping[str, str]", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
