"""What holds for every legal KV layout."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from cla_export.layout import (
    DTYPE_BITS,
    KVLayout,
    bits,
    dense_back,
    dense_front,
    identity,
    keep_ends,
    layout_from_config,
    one_owner,
    uniform,
)

DTYPES = st.sampled_from(sorted(DTYPE_BITS))
FEW = settings(max_examples=40, deadline=None)


@st.composite
def layouts(draw: st.DrawFn) -> KVLayout:
    """Any legal layout of up to 24 layers: sharers of any earlier owner, shapes by group."""
    owners: list[int] = []
    shapes: list[tuple[int, int, int | None]] = []
    for layer in range(draw(st.integers(1, 24))):
        owner = draw(st.sampled_from([*sorted(set(owners)), layer]))
        owners.append(owner)
        window = st.none() | st.integers(1, 4096)
        new = st.tuples(st.integers(1, 16), st.integers(1, 513), window)
        shapes.append(draw(new) if owner == layer else shapes[owner])
    heads, dims, windows = zip(*shapes, strict=True)
    return KVLayout.create(owners, heads, dims, windows)


@FEW
@given(layouts())
def test_groups_partition_the_layers(layout: KVLayout) -> None:
    groups = layout.groups
    assert sorted(i for g in groups for i in g.layers) == list(range(layout.num_layers))
    assert [g.index for g in groups] == list(range(layout.num_groups))
    assert [g.owner for g in groups] == sorted(g.owner for g in groups)
    for g in groups:
        assert (g.owner, *g.sharers) == g.layers == tuple(sorted(g.layers))
        for i in g.layers:
            assert layout.group_of(i) == g.index
            assert layout.is_owner(i) == (i == g.owner)
            shape = (layout.kv_heads[i], layout.head_dim[i], layout.window[i])
            assert shape == (g.kv_heads, g.head_dim, g.window)


@FEW
@given(layouts(), DTYPES)
def test_bytes_are_the_sum_over_groups(layout: KVLayout, dtype: str) -> None:
    rows = [g.kv_heads * g.head_dim * bits(dtype) for g in layout.groups]  # in bits
    assert layout.bytes_per_token(dtype) == sum(2 * ((row + 7) // 8) for row in rows)
    assert layout.bytes_per_token(dtype) <= layout.dense_twin().bytes_per_token(dtype)
    assert layout.dense_twin().num_groups == layout.num_layers


@FEW
@given(layouts(), DTYPES, st.integers(0, 1 << 40), st.integers(1, 1 << 17))
def test_what_fits_fits_and_no_more(layout: KVLayout, dtype: str, memory: int, count: int) -> None:
    slots = layout.slots_that_fit(memory, count, dtype)
    slot = layout.bytes_per_slot(count, dtype)
    assert slots * slot <= memory < (slots + 1) * slot
    capacity = layout.context_that_fits(memory, count, dtype)
    token = count * layout.bytes_per_token(dtype)
    assert capacity * token <= memory < (capacity + 1) * token


@FEW
@given(layouts())
def test_json_round_trip(layout: KVLayout) -> None:
    assert KVLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@FEW
@given(layouts())
def test_describe_counts(layout: KVLayout) -> None:
    assert layout.describe().startswith(f"{layout.num_layers} layer")
    assert ("no sharing" in layout.describe()) == (layout == layout.dense_twin())


@FEW
@given(st.integers(1, 80), st.integers(1, 90))
def test_owner_maps_are_legal(n: int, factor: int) -> None:
    named = [identity(n), one_owner(n), keep_ends(n), dense_front(n), dense_back(n)]
    both = [uniform(n, factor, "first"), uniform(n, factor, "last")]
    for owners in named + both:
        assert KVLayout.create(owners, 1, 8).num_layers == n
    for owners in both:
        assert len(set(owners)) == -(-n // factor)
    if n % factor == 0:
        assert both[0] == both[1] == uniform(n, factor)


@FEW
@given(layouts())
def test_config_with_the_owner_map(layout: KVLayout) -> None:
    config = {
        "num_hidden_layers": layout.num_layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
        "head_dim": 46,
        "kv_owner": list(layout.kv_owner),
    }
    assert layout_from_config(config) == KVLayout.create(layout.kv_owner, 3, 46)
