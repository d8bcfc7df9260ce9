"""A module of the user's own as a family: what `--module package.module:factory` makes.

Its forward takes `(input_ids, position_ids)` and returns logits. Parameters and persistent buffers
carry the names of the checkpoint's tensors; other buffers are constants, such as tables of RoPE.

Where it calls `scaled_dot_product_attention` once a layer, PyTorch can run it over caches, and each
layer can be looked into. Where it spells attention out, the traced graph alone says what a layer
is, and what PyTorch offers is the module itself, over whole rows.

From config.json it takes `vocab_size` and `max_position_embeddings`, and the KV layout where one is
stated. Where none is, the graph that the module is traced to says which layers share.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from cla_export.config import ConfigReader
from cla_export.errors import BadInput, GraphError
from cla_export.layout import KVLayout, identity, layout_from_config
from cla_export.layout_config import states_sharing
from cla_export.models.attention_calls import AttentionCalls, Call
from cla_export.models.decoder import KV, InFloat64, KVCache, StatelessDecoder
from cla_export.models.factory import find_factory, make_module
from cla_export.models.without_data import give_empty_data, parameters_without_data
from cla_export.spec import ModelSpec

_ROW = 5  # tokens of the rows that are tried


@dataclass(frozen=True, slots=True)
class ModuleFamily:
    """The family of one factory's modules. `layout`, if given, is not looked for."""

    name: str
    factory: Callable[..., object]
    layout: KVLayout | None = None

    @classmethod
    def named(cls, name: str, layout: KVLayout | None = None) -> "ModuleFamily":
        """Import what `package.module:factory` names."""
        return cls(name, find_factory(name), layout)

    def read_spec(self, config: Mapping[str, object]) -> ModelSpec:
        """Make the module without data, run it without data, and say what was seen.

        Raises:
            BadInput: the config lacks a key, or the module is not of the form above.
            GraphError: no layout is stated, and none can be read off the traced graph.
        """
        read = ConfigReader(config)
        vocab, positions = read.integer("vocab_size"), read.integer("max_position_embeddings")
        with FakeTensorMode(allow_non_fake_inputs=True):
            module = self._without_data(config)
            seen = self._try(module, vocab)
        shapes = {name: tuple(value.shape) for name, value in module.named_parameters()}
        kept = module.state_dict(keep_vars=True)
        shapes |= {n: tuple(b.shape) for n, b in module.named_buffers() if n in kept}
        first = {id(value): name for name, value in module.named_parameters()}
        widths = [shape[1] for shape in shapes.values() if len(shape) == 2 and shape[0] == vocab]
        spec = ModelSpec(
            model_type=str(config.get("model_type", self.name)),
            layout=self.layout or _unshared(seen.calls),
            vocab_size=vocab,
            hidden_size=widths[0] if widths else 0,
            q_heads=max((call.q_heads for call in seen.calls), default=0),
            max_positions=positions,
            norm_eps=0.0,
            epsilons=tuple(sorted(seen.epsilons)),
            tie_embeddings=False,
            stored=shapes,
            config=dict(config),
            tied={
                name: first[id(value)]
                for name, value in kept.items()
                if first.get(id(value), name) != name
            },
        )
        if self.layout is None:
            spec = self._with_layout(spec, config)
        return replace(spec, spelt_attention=len(seen.calls) < spec.num_layers)

    def build(self, spec: ModelSpec) -> "ModuleDecoder":
        """The module; under fake tensors its parameters are fake, and its buffers are not."""
        assert spec.config is not None
        with unset_fake_temporarily() as fake:
            if fake is None:
                return ModuleDecoder(make_module(self.name, self.factory, spec.config), spec)
        return ModuleDecoder(self._without_data(spec.config), spec)

    def constants(self, spec: ModelSpec) -> dict[str, Tensor]:
        """The buffers that are not persistent."""
        assert spec.config is not None
        with parameters_without_data():
            module = make_module(self.name, self.factory, spec.config)
        kept = set(module.state_dict())
        return {name: value for name, value in module.named_buffers() if name not in kept}

    def _without_data(self, config: Mapping[str, object]) -> nn.Module:
        """Under fake tensors: buffers are real, and parameters fake."""
        with unset_fake_temporarily(), parameters_without_data():
            module = make_module(self.name, self.factory, config)
        give_empty_data(module)
        return module

    def _try(self, module: nn.Module, vocab: int) -> AttentionCalls:
        """Run rows through it, under fake tensors."""
        ids = torch.zeros(2, _ROW, dtype=torch.int64)
        kind = type(module).__name__
        seen = AttentionCalls()
        with torch.no_grad(), seen:
            try:
                logits = module(input_ids=ids, position_ids=torch.arange(_ROW).repeat(2, 1))
            except Exception as error:
                raise BadInput(
                    f"--module {self.name}: forward of {kind} failed on input_ids and position_ids "
                    f"[2, {_ROW}] ({type(error).__name__}: {error}); what it does may depend on "
                    "shapes, and not on values, as for torch.export"
                ) from error
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if shape != (2, _ROW, vocab):
            raise BadInput(
                f"--module {self.name}: forward of {kind} returned {shape} for input_ids "
                f"[2, {_ROW}]; expected logits [2, {_ROW}, {vocab}], vocab_size of config.json last"
            )
        return seen

    def _with_layout(self, spec: ModelSpec, config: Mapping[str, object]) -> ModelSpec:
        """The layout that config.json states, or that of the traced graph."""
        stated = layout_from_config(config) if states_sharing(config) else None
        if stated is not None and spec.q_heads:
            return replace(spec, layout=stated)
        from cla_export.rewrite import rewrite
        from cla_export.rewrite.values import attention_nodes, heads_and_dim
        from cla_export.trace import trace

        done = rewrite(trace(self, spec, torch.float32))
        heads = max(
            heads_and_dim(query, node, "query")[0]
            for node in attention_nodes(done.model.graph)
            if (query := node.inputs[0]) is not None
        )
        return replace(spec, layout=stated or done.layout, q_heads=heads)


class ModuleDecoder(StatelessDecoder):
    """A module of the user's own, which must do what its KV layout says when it first runs."""

    def __init__(self, module: nn.Module, spec: ModelSpec) -> None:
        super().__init__(module, spec)
        self.checked = False

    def stateless(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        module = self.__dict__["module"]
        logits: Tensor = module(input_ids=input_ids, position_ids=position_ids)
        return logits

    def _run(
        self, input_ids: Tensor, position_ids: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, list[KV]]:
        if self.spec.spelt_attention:
            if cache is not None:
                raise BadInput(
                    "the module spells its attention out, so PyTorch has no place for a cache in "
                    "it and runs whole rows alone; it runs over caches once it calls "
                    "torch.nn.functional.scaled_dot_product_attention in every layer"
                )
            with InFloat64():
                return self.stateless(input_ids, position_ids), []
        if not self.checked:
            self._check(input_ids[:1, :_ROW])
            self.checked = True
        return super()._run(input_ids, position_ids, cache)

    def _check(self, input_ids: Tensor) -> None:
        """Sharers must attend to their owner's keys and values: over a cache, they will."""
        seen = AttentionCalls()
        with torch.no_grad(), seen:
            self.stateless(input_ids, torch.arange(input_ids.shape[1])[None])
        layout = self.spec.layout
        if len(seen.calls) != layout.num_layers:
            raise GraphError(
                f"the module calls scaled_dot_product_attention {len(seen.calls)} times; its KV "
                f"layout has {layout.num_layers} layers"
            )
        for layer, owner in enumerate(layout.kv_owner):
            own, other = (_heads(seen.calls[i], layout, i) for i in (layer, owner))
            for part, mine, theirs in zip(("keys", "values"), own, other, strict=True):
                if not torch.equal(mine, theirs):
                    raise GraphError(
                        f"layer {layer}: it attends to {part} that are not those of layer {owner}, "
                        "whose cache it reads by the KV layout; a sharer must attend to them as "
                        "they are (a norm or scale of its own belongs on the query)"
                    )


def _unshared(calls: list[Call]) -> KVLayout:
    """What the calls alone show; who shares and how far layers see comes later.

    Without any call it stands for a layout that is not known yet.
    """
    if not calls:
        return KVLayout.create([0], 1, 1)
    return KVLayout.create(
        identity(len(calls)), [c.kv_heads for c in calls], [c.head_dim for c in calls]
    )


def _heads(call: Call, layout: KVLayout, layer: int) -> KV:
    """Keys and values, each head once."""
    repeats = call.key.shape[1] // layout.kv_heads[layer]
    return call.key[:, ::repeats], call.value[:, ::repeats]
