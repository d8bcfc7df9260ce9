"""Any causal language model of transformers, by its own code: Llama, Qwen, Mistral, Phi, Gemma.

The KV layout comes from the config, and the traced graph is checked against it. Angles of RoPE are
computed once, by the model's own module, and looked up by position: computed in the graph, they
would drift. No code of a checkpoint is executed; a config's `auto_map` is not read.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.initialization import no_init_weights

from cla_export.errors import BadInput
from cla_export.layout import layout_from_config
from cla_export.models import hugging_face_attention, hugging_face_experts
from cla_export.models.decoder import StatelessDecoder
from cla_export.models.hugging_face_experts import routed
from cla_export.models.hugging_face_weights import stored_as
from cla_export.models.without_data import parameters_without_data
from cla_export.spec import ModelSpec

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_PART = "model.language_model."  # of a checkpoint's names, in models that see or hear too
_NEEDED = ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings")
_BY_LENGTH = ("dynamic", "longrope")  # angles that depend on how long the row is


def read_spec(config: Mapping[str, object]) -> ModelSpec:
    """Read the config of any causal language model that transformers has a class for.

    Of a model that sees or hears too, its language model is read.
    """
    own, part = _config_of(config), _PART if "text_config" in config else ""
    for key in _NEEDED:
        if not isinstance(getattr(own, key, None), int):
            raise BadInput(
                f"config.json: models of type {own.model_type!r} have no {key} (got "
                f"{getattr(own, key, None)!r}); expected a decoder of tokens with a whole number"
            )
    layout = layout_from_config(own.to_dict())
    with torch.device("meta"):
        model = _model_of(own)
    if "position_ids" not in signature(model.forward).parameters:
        raise BadInput(
            f"config.json: models of type {own.model_type!r} take no position_ids, so a step would "
            "not know where it stands"
        )
    stored = {name: tuple(value.shape) for name, value in model.named_parameters()}
    constants = {name for name, _ in model.named_buffers()} - set(model.state_dict())
    stored |= {n: tuple(b.shape) for n, b in model.named_buffers() if n not in constants}
    renamed, assembled = stored_as(model, part)
    epsilon = next((getattr(own, name) for name in _EPSILONS if hasattr(own, name)), 0.0)
    return ModelSpec(
        model_type=own.model_type,
        layout=layout,
        vocab_size=own.vocab_size,
        hidden_size=own.hidden_size,
        q_heads=own.num_attention_heads,
        max_positions=own.max_position_embeddings,
        norm_eps=epsilon,
        tie_embeddings=bool(getattr(own, "tie_word_embeddings", False)),
        stored=stored,
        config=dict(config),
        renamed=renamed,
        part=part,
        assembled=assembled,
        routed=routed(model, own),
    )


def build(spec: ModelSpec) -> "HuggingFaceDecoder":
    """The model's own module, weights uninitialised until a checkpoint is loaded into it."""
    assert spec.config is not None
    own = _config_of(spec.config)
    with no_init_weights():
        model = _model_of(own)
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RotaryEmbedding"):
            parent, _, name = path.rpartition(".")
            stored = StoredAngles.of(type(module), own, spec.max_positions)
            setattr(model.get_submodule(parent), name, stored)
    return HuggingFaceDecoder(model.eval(), spec)


def constants(spec: ModelSpec) -> dict[str, Tensor]:
    """The buffers that a checkpoint does not hold, such as tables of angles."""
    with parameters_without_data():
        model = build(spec)
    kept = set(model.state_dict())
    return {name: value for name, value in model.named_buffers() if name not in kept}


class HuggingFaceDecoder(StatelessDecoder):
    """A causal language model of transformers."""

    def stateless(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        module = self.__dict__["module"]
        logits: Tensor = module(
            input_ids=input_ids, position_ids=position_ids, use_cache=False
        ).logits
        return logits


class StoredAngles(nn.Module):
    """In place of a model's rotary embedding: cosines and sines of every position, as it made them.

    Args:
        tables: kind of layer ("" where all are alike) -> cosines, sines: float32 [positions, D], or
            [positions, D / 2] where both halves are the same.
        doubled: whether rows are handed out as two such halves.
    """

    def __init__(self, tables: Mapping[str, tuple[Tensor, Tensor]], doubled: bool) -> None:
        super().__init__()
        self._doubled = doubled
        for kind, pair in tables.items():
            for part, table in zip(("cos", "sin"), pair, strict=True):
                self.register_buffer(f"{kind}{part}", table, persistent=False)

    @classmethod
    def of(cls, rotary: type[nn.Module], config: Any, positions: int) -> "StoredAngles":  # noqa: ANN401
        """Of a class of rotary embeddings and a config."""
        with unset_fake_temporarily(), torch.device("cpu"), torch.no_grad():
            module: Any = rotary(config=config)
            kinds = sorted(set(config.layer_types)) if hasattr(module, "layer_types") else [""]
            types = (
                module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
            )
            for kind in types.values():
                if kind in _BY_LENGTH:
                    raise BadInput(
                        f"config.json: RoPE of type {kind!r} depends on how long a row is; a graph "
                        "with a cache needs angles that depend on the position alone, such as "
                        "'default', 'linear', 'llama3' or 'yarn'"
                    )
            place = torch.arange(positions)[None]
            tables = {}
            for kind in kinds:
                cos, sin = module(torch.zeros(1), place, **({"layer_type": kind} if kind else {}))
                tables[f"{kind}_" if kind else ""] = (cos[0], sin[0])
            halves = [table.chunk(2, -1) for pair in tables.values() for table in pair]
            doubled = all(torch.equal(first, second) for first, second in halves)
            if doubled:
                tables = {
                    kind: (c[:, : c.shape[1] // 2].clone(), s[:, : s.shape[1] // 2].clone())
                    for kind, (c, s) in tables.items()
                }
            return cls(tables, doubled)

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        kind = f"{layer_type}_" if layer_type else ""
        rows = []
        for part in ("cos", "sin"):
            row = self.get_buffer(f"{kind}{part}")[position_ids].to(x.dtype)  # [B, S, D or D/2]
            rows.append(torch.cat((row, row), -1) if self._doubled else row)
        return rows[0], rows[1]


def _config_of(config: Mapping[str, object]) -> Any:  # noqa: ANN401
    """The config object of transformers, with its defaults."""
    text = config.get("text_config")
    if isinstance(text, Mapping):
        kind = text.get("model_type", f"{config['model_type']}_text")
        config = {**text, "model_type": kind}
    fields = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    try:
        return transformers.AutoConfig.for_model(cast("str", config["model_type"]), **fields)
    except Exception as error:  # strict configs raise types of their own
        raise BadInput(
            f"config.json: transformers {transformers.__version__} refuses it as a config of type "
            f"{config['model_type']!r}: {error}"
        ) from error


def _model_of(config: Any) -> Any:  # noqa: ANN401
    auto: Any = transformers.AutoModelForCausalLM
    try:
        model = auto.from_config(
            config,
            attn_implementation=hugging_face_attention.implementation(config),
            experts_implementation=hugging_face_experts.IMPLEMENTATION,
            dtype=torch.float32,
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(
            f"config.json: transformers {transformers.__version__} cannot build a model of type "
            f"{config.model_type!r} over scaled_dot_product_attention, by which layers are told "
            f"apart: {error}"
        ) from error
    model.tie_weights()
    return model
