"""ClaAttention for TensorRT and TensorRT-RTX: a Python IPluginV3, found by ONNX domain and name.

Call `register` with the flavour's module before parsing a graph and before opening an engine: the
engine keeps the attributes, not the code. Building needs no GPU where the flavour's does not; the
kernel is compiled when an engine first runs.
"""

from types import ModuleType
from typing import Any

import numpy as np

from cla_export.errors import BadInput
from cla_export.plugin.contract import DOMAIN, NAME, VERSION, Problem, check
from cla_export.plugin.launch import Launcher, Pointers
from cla_export.plugin.plan import Plan, make_plan, workspace_bound
from cla_export.plugin.prompt import PromptPlan

ATTRIBUTES = ("scale", "window", "softcap")
# What a tactic means: shares of rows, in multiples of what runs at a time; None: the plan's choice.
TACTICS: dict[int, float | None] = {1: None, 2: 0.0, 3: 0.5, 4: 1.0, 5: 2.0}


def register(trt: ModuleType, *, time_layouts: bool = False) -> Any:  # noqa: ANN401
    """Register the plugin's creator with `trt` (tensorrt or tensorrt_rtx), once; returns it.

    time_layouts: let the builder time the layouts in TACTICS. It times them on lengths of its own
    making, so the default is the plan's choice, which was measured on real ones.
    """
    registry = trt.get_plugin_registry()
    present = registry.get_creator(NAME, VERSION, DOMAIN)
    if present is not None:
        return present
    creator = _creator_class(trt, _plugin_class(trt), time_layouts)()
    if not registry.register_creator(creator, DOMAIN):
        raise BadInput(f"{trt.__name__} did not take the plugin {DOMAIN}.{NAME}; see its log")
    _creators.append(creator)
    return creator


_creators: list[Any] = []  # the registry holds bare pointers; these keep them alive


def _creator_class(trt: ModuleType, plugin: type, time_layouts: bool) -> type:
    class ClaAttentionCreator(trt.IPluginCreatorV3One):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = NAME, DOMAIN, VERSION
            self.field_names = _fields(trt, {"scale": None, "window": None, "softcap": None})

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:  # noqa: ANN401, ARG002
            given = {field.name: np.array(field.data).ravel() for field in fields}
            missing = "scale" if given.get("scale") is None or not given["scale"].size else None
            if missing:
                raise BadInput(f"{name}: {DOMAIN}.{NAME} has no attribute {missing!r}")
            attributes = {n: given[n][0].item() for n in ATTRIBUTES if n in given}
            return plugin(attributes, time_layouts)

    return ClaAttentionCreator


def _fields(trt: ModuleType, values: dict[str, float | None]) -> Any:  # noqa: ANN401
    """A field collection; None: a field without a value, as creators describe theirs."""
    integer, real = trt.PluginFieldType.INT32, trt.PluginFieldType.FLOAT32
    fields = []
    for name, value in values.items():
        kind, dtype = (integer, np.int32) if name == "window" else (real, np.float32)
        data = np.array([] if value is None else [value], dtype)
        fields.append(trt.PluginField(name, data, kind))
    return trt.PluginFieldCollection(fields)


def _plugin_class(trt: ModuleType) -> type:
    bases = (
        trt.IPluginV3,
        trt.IPluginV3OneCore,
        trt.IPluginV3OneBuild,
        trt.IPluginV3OneRuntime,
    )

    class ClaAttention(*bases):  # type: ignore[misc]
        def __init__(self, attributes: dict[str, float], time_layouts: bool) -> None:
            for base in bases:
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = NAME, DOMAIN, VERSION
            self.num_outputs = 1
            self.timing_cache_id = ""
            self.attributes = {"window": 0, "softcap": 0.0} | attributes
            self.time_layouts = time_layouts
            self.waves: float | None = None
            self.launcher: Launcher | None = None
            self.plans: dict[Problem, Plan | PromptPlan] = {}

        def clone(self) -> Any:  # noqa: ANN401
            other = ClaAttention(self.attributes, self.time_layouts)
            other.waves = self.waves
            return other

        def get_capability_interface(self, kind: Any) -> Any:  # noqa: ANN401, ARG002
            return self

        def get_fields_to_serialize(self) -> Any:  # noqa: ANN401
            return _fields(trt, {name: self.attributes[name] for name in ATTRIBUTES})

        # Building.

        def get_output_data_types(self, types: list[Any]) -> list[Any]:
            return [types[0]]

        def get_output_shapes(self, inputs: Any, shapes: Any, builder: Any) -> Any:  # noqa: ANN401, ARG002
            return [trt.DimsExprs(inputs[0])]

        def supports_format_combination(self, pos: int, tensors: Any, inputs: int) -> bool:  # noqa: ANN401, ARG002
            desc = tensors[pos].desc
            if desc.format != trt.TensorFormat.LINEAR:
                return False
            if pos == 3:
                return bool(desc.type == trt.int32)
            if pos == 0:
                return desc.type in {trt.float16, trt.bfloat16}
            return bool(desc.type == tensors[0].desc.type)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:  # noqa: ANN401, ARG002
            check(self.problem([tensor.desc for tensor in inputs], [t.max for t in inputs]))

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:  # noqa: ANN401, ARG002
            problem = self.problem([tensor.desc for tensor in inputs], [t.max for t in inputs])
            return workspace_bound(problem)

        def get_valid_tactics(self) -> list[int]:
            return list(TACTICS) if self.time_layouts else []

        # Running.

        def set_tactic(self, tactic: int) -> None:
            self.waves = TACTICS.get(tactic)

        def attach_to_context(self, context: Any) -> Any:  # noqa: ANN401, ARG002
            other = self.clone()
            other.launcher = Launcher(None)
            return other

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:  # noqa: ANN401, ARG002
            self.plan_of(self.problem(inputs, [tensor.dims for tensor in inputs]))

        def enqueue(
            self,
            input_desc: Any,  # noqa: ANN401
            output_desc: Any,  # noqa: ANN401, ARG002
            inputs: list[int],
            outputs: list[int],
            workspace: int,
            stream: int,
        ) -> None:
            problem = self.problem(input_desc, [tensor.dims for tensor in input_desc])
            plan = self.plan_of(problem)
            assert self.launcher is not None
            q, keys, values, lengths = inputs
            pointers = Pointers(q, keys, values, lengths, outputs[0], workspace)
            self.launcher.launch(problem, plan, pointers, stream)

        def plan_of(self, problem: Problem) -> Plan | PromptPlan:
            """The layout of a call, made once a shape; its kernel is compiled here."""
            if self.launcher is None:
                self.launcher = Launcher(None)
            if problem not in self.plans:
                plan = make_plan(problem, self.launcher.gpu, waves=self.waves)
                self.launcher.prepare(plan.variant)
                self.plans[problem] = plan
            return self.plans[problem]

        def problem(self, descriptions: Any, dims: list[Any]) -> Problem:  # noqa: ANN401
            """The call that these inputs make."""
            batch, query_heads, queries, head_dim = tuple(dims[0])
            _, kv_heads, capacity, _ = tuple(dims[1])
            dtype = "bfloat16" if descriptions[0].type == trt.bfloat16 else "float16"
            return Problem(
                batch, query_heads, kv_heads, head_dim, capacity, queries,
                float(self.attributes["scale"]), int(self.attributes["window"]),
                float(self.attributes["softcap"]), dtype,
            )  # fmt: skip

    return ClaAttention
