"""What a pass did and, where it did not fire, why: data, not log lines."""

from dataclasses import dataclass, field

import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Skip:
    """A place where a pass looked and did not fire."""

    node: str
    reason: str
    got: str


@dataclass(slots=True)
class PassReport:
    """One pass over one graph: how often it fired, and where it did not."""

    name: str
    fired: int = 0
    skips: list[Skip] = field(default_factory=list)

    def skip(self, node: ir.Node, reason: str, got: object = "") -> None:
        self.skips.append(Skip(describe(node), reason, str(got)))


def describe(node: ir.Node) -> str:
    """Name a node for a person: its own name, and the module it was traced from where known."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    module = [scope for scope in scopes.strip("[]").replace("'", "").split(", ") if "." in scope]
    origin = f" (in {module[-1]})" if module else ""
    return f"{node.op_type} node {node.name or node.outputs[0].name!r}{origin}"
