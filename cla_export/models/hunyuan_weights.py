"""How checkpoints of Hunyuan hold the parameters of `hunyuan.py`: one by one, or several in one.

In one layout `q_proj`, `k_proj`, `v_proj`, `gate_proj` and `up_proj` are tensors of their own. In
the other an owner has a `qkv_proj`, rows of which are each kv head's queries, its key, its value,
and an MLP has a `gate_and_up_proj`, up first. Experts are stored one by one in both.
"""

from cla_export.spec import ModelSpec, Rows


def ways_to_store(
    name: str, shape: tuple[int, ...], spec: ModelSpec
) -> tuple[tuple[Rows, ...], ...]:
    """The ways in which a checkpoint may hold a parameter, where there are several."""
    module, _, kind = name.rpartition(".")  # kind is weight or bias
    path, _, part = module.rpartition(".")
    if kind in ("gate_up_proj", "down_proj"):  # of experts
        return _ways_of_experts(module, kind, shape)
    own = (Rows(name, shape),)
    if part in ("gate_proj", "up_proj"):
        whole, half = (2 * shape[0], *shape[1:]), shape[0]
        start = half if part == "gate_proj" else 0
        return own, (Rows(f"{path}.gate_and_up_proj.{kind}", whole, start, start + half),)
    if part not in ("q_proj", "k_proj", "v_proj"):
        return ()
    layer = int(name.split(".")[2])
    if not spec.layout.is_owner(layer):
        return ()
    dim, kv_heads = spec.layout.head_dim[layer], spec.layout.kv_heads[layer]
    queries = spec.q_heads // kv_heads
    start, heads = {"q_proj": (0, queries), "k_proj": (queries, 1), "v_proj": (queries + 1, 1)}[
        part
    ]
    whole, stored = ((spec.q_heads + 2 * kv_heads) * dim, *shape[1:]), f"{path}.qkv_proj.{kind}"
    firsts = [(kv_head * (queries + 2) + start) * dim for kv_head in range(kv_heads)]
    return own, tuple(Rows(stored, whole, first, first + heads * dim) for first in firsts)


def _ways_of_experts(path: str, kind: str, shape: tuple[int, ...]) -> tuple[tuple[Rows, ...], ...]:
    """Experts are stored one by one: `mlp.experts.{n}.gate_proj.weight`."""
    count, rows, columns = shape
    experts = [f"{path}.{expert}" for expert in range(count)]
    if kind == "down_proj":
        return (tuple(Rows(f"{at}.down_proj.weight", (rows, columns)) for at in experts),)
    half = (rows // 2, columns)
    return (
        tuple(Rows(f"{at}.{p}_proj.weight", half) for at in experts for p in ("gate", "up")),
        tuple(
            Rows(f"{at}.gate_and_up_proj.weight", (rows, columns), start, start + rows // 2)
            for at in experts
            for start in (rows // 2, 0)
        ),
    )
