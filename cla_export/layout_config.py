"""Read the KV layout out of a model's config.json, whichever way its family spells it.

| key | family | rule |
|---|---|---|
| `kv_owner` | cla-export | the owner map itself |
| `sharing_pattern` | dolomite `gpt_crosslayer` | the owner map itself |
| `kv_source_layers` | Mistral-Large-4 | the owner map itself |
| `use_cla`, `cla_share_factor` | Hunyuan | layer i owns if i % factor == 0 |
| `num_kv_shared_layers`, `layer_types` | Gemma 3n, 4 | the last N read the last own of their type |
| `kv_reuse_group` | Hymba | lists of layers, the first of each its owner |
| `layer_types` as text, `0_0_2_2s` | LCKV | the owner map, `s` for a sliding window |
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from cla_export.errors import LayoutError

Config = Mapping[str, object]
Owners = tuple[int, ...]

# Sharing said in a way that no importer reads: passing it over would give every layer a cache.
UNREAD = (
    "cross_layer_attention_interval", "kv_reuse_every_i_layer", "kv_sharing_donors",
    "kv_sharing_map", "num_key_value_layers", "num_kv_reuse_layers",
)  # fmt: skip


class ConfigKV(NamedTuple):
    """What a config says of its caches, not yet checked as a layout; one entry per layer."""

    source: str  # the key the owner map was read from
    kv_owner: Owners
    kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    window: tuple[int | None, ...]


def read_config(config: Config) -> ConfigKV:
    """Owner map and cache shapes; LayoutError names the key that is missing, wrong or ambiguous.

    A nested `text_config` is read with the outer keys as its defaults.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {**config, **text}
    n = _whole(config, "num_hidden_layers", "n_layer", "num_layers")
    source, owners = _owners(config, n)
    return ConfigKV(source, owners, *_cache_shape(config, n), _windows(config, n))


def states_sharing(config: Config) -> bool:
    """Whether a config says which layers share, be it in a way that is not read."""
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {**config, **text}
    spelled = (key for key in SPELLINGS if key != "layer_types" or _is_lckv(config))
    return any(config.get(key) not in (None, False, 0, -1, [], {}) for key in (*spelled, *UNREAD))


def _owners(config: Config, n: int) -> tuple[str, Owners]:
    claims = [
        (key, importer(config, n))
        for key, importer in SPELLINGS.items()
        if config.get(key) is not None and (key != "layer_types" or _is_lckv(config))
    ]
    for key in UNREAD if not claims else ():
        if config.get(key) not in (None, False, 0, -1, [], {}):
            raise LayoutError(
                f"config {key} is {config[key]!r}: it shares KV in a way that is not read here; "
                f"add kv_owner, a list that gives for each of the {n} layers the layer it reads"
            )
    first, owners = claims[0] if claims else ("without kv_owner", tuple(range(n)))
    for key, other in claims[1:]:
        for layer, (a, b) in enumerate(zip(owners, other, strict=True)):
            if a != b:
                raise LayoutError(
                    f"config {first} and {key} disagree at layer {layer}: it reads layer {a} by "
                    f"{first}, layer {b} by {key}; remove the one that is wrong"
                )
    return first, owners


def _owner_list(key: str) -> Callable[[Config, int], Owners]:
    def read(config: Config, n: int) -> Owners:
        values = _list(config, key, n)
        return tuple(_whole_value(f"{key}[{i}]", v, 0) for i, v in enumerate(values))

    return read


def _hunyuan(config: Config, n: int) -> Owners:
    if not _flag(config, "use_cla"):  # real configs carry a factor beside `use_cla: false`
        return tuple(range(n))
    factor = _whole(config, "cla_share_factor")
    return tuple(i - i % factor for i in range(n))


def _gemma(config: Config, n: int) -> Owners:
    key = "num_kv_shared_layers"
    own = n - _whole(config, key, least=0)
    if own == n:
        return tuple(range(n))
    if own < 1:
        raise LayoutError(
            f"config {key} is {n - own} of {n} layers: none writes a cache, so it comes from "
            f"another model (a drafter); export the model that owns the cache"
        )
    types = _layer_types(config, n)
    if types is None:
        raise LayoutError(f"config {key} is {n - own} but there is no layer_types; add it")
    for i in range(own, n):
        if types[i] not in types[:own]:
            raise LayoutError(
                f"layer {i}: config {key} makes it a sharer, but no {types[i]!r} layer comes "
                f"before layer {own}; correct layer_types or {key}"
            )
    last = {kind: i for i, kind in enumerate(types[:own])}
    return tuple(i if i < own else last[types[i]] for i in range(n))


def _hymba(config: Config, n: int) -> Owners:
    key = "kv_reuse_group"
    owners: dict[int, int] = {}
    for group in _list(config, key):
        if not isinstance(group, list) or not group:
            raise LayoutError(f"config {key} holds {group!r}; expected lists of layers, [[1, 2]]")
        for item in group:
            layer = _whole_value(f"{key} layer", item, 0)
            if layer >= n or layer in owners:
                why = "is in two groups" if layer in owners else f"is not one of the {n} layers"
                raise LayoutError(f"layer {layer}: config {key} names it, but it {why}")
            owners[layer] = group[0]
    return tuple(owners.get(i, i) for i in range(n))


def _lckv(config: Config, n: int) -> Owners:
    items = _lckv_items(config, n)
    owners = tuple(int(item.rstrip("s")) for item in items)
    for layer, owner in enumerate(owners):
        if owner > layer:
            raise LayoutError(
                f"layer {layer}: config layer_types makes it read the later layer {owner}; such "
                f"a model repeats passes until its keys settle and has no single forward graph; "
                f"only models whose layers read earlier layers can be exported"
            )
    return owners


SPELLINGS: Mapping[str, Callable[[Config, int], Owners]] = {
    "kv_owner": _owner_list("kv_owner"),
    "sharing_pattern": _owner_list("sharing_pattern"),
    "kv_source_layers": _owner_list("kv_source_layers"),
    "use_cla": _hunyuan,
    "num_kv_shared_layers": _gemma,
    "kv_reuse_group": _hymba,
    "layer_types": _lckv,
}


def _is_lckv(config: Config) -> bool:
    return isinstance(config.get("layer_types"), str)


def _lckv_items(config: Config, n: int) -> list[str]:
    items = str(config["layer_types"]).split("_")
    if len(items) != n or not all(re.fullmatch(r"[0-9]+s?", item) for item in items):
        raise LayoutError(
            f"config layer_types is {config['layer_types']!r}; expected {n} layer numbers joined "
            f"by _, each with an optional s for a sliding window, such as 0_0_2_2s"
        )
    return items


def _layer_types(config: Config, n: int) -> list[str] | None:
    """The attention type of every layer, None where the config does not list them."""
    if config.get("layer_types") is None or _is_lckv(config):
        return None
    types = _list(config, "layer_types", n)
    for layer, kind in enumerate(types):
        if kind not in ("sliding_attention", "full_attention"):
            raise LayoutError(
                f"layer {layer}: config layer_types has {kind!r}; only sliding_attention and "
                f"full_attention can be exported"
            )
    return [str(kind) for kind in types]


def _cache_shape(config: Config, n: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """KV heads and head dim of every layer; Gemma 4's full-attention layers have their own."""
    if config.get("kv_lora_rank"):
        raise LayoutError(
            f"config kv_lora_rank is {config['kv_lora_rank']!r}: multi-head latent attention "
            f"caches a latent, not keys and values; such models cannot be exported"
        )
    heads = _whole(config, "num_attention_heads", "n_head")
    kv_heads, head_dim = [_kv_heads(config, heads)] * n, [_head_dim(config, heads)] * n
    for i, kind in enumerate(_layer_types(config, n) or ()):
        if kind == "full_attention":
            head_dim[i] = _whole(config, "global_head_dim", default=head_dim[i])
            if config.get("attention_k_eq_v", True):  # the family's switch for these heads
                kv_heads[i] = _whole(config, "num_global_key_value_heads", default=kv_heads[i])
    per_layer = config.get("per_layer_config")
    for name, override in per_layer.items() if isinstance(per_layer, Mapping) else ():
        layer = int(name) if str(name).isdecimal() else n
        if layer >= n or not isinstance(override, Mapping) or "sliding_window" in override:
            raise LayoutError(
                f"config per_layer_config[{name!r}] is {override!r}; expected, for a layer in "
                f"0..{n - 1}, a head_dim or num_key_value_heads of its own"
            )
        head_dim[layer] = _whole(override, "head_dim", default=head_dim[layer])
        kv_heads[layer] = _whole(override, "num_key_value_heads", default=kv_heads[layer])
    for i, count in enumerate(kv_heads):
        if heads % count:
            raise LayoutError(
                f"layer {i}: {heads} query heads cannot share {count} kv heads evenly; "
                f"correct num_attention_heads or num_key_value_heads in the config"
            )
    return tuple(kv_heads), tuple(head_dim)


def _kv_heads(config: Config, heads: int) -> int:
    kind = config.get("attention_head_type")  # dolomite
    by_kind = {None: heads, "mha": heads, "mqa": 1, "gqa": None}
    if not isinstance(kind, str | None) or kind not in by_kind:
        raise LayoutError(f"config attention_head_type is {kind!r}; expected mha, mqa or gqa")
    kv_heads = _whole(config, "num_key_value_heads", default=by_kind[kind])
    if kind in ("mha", "mqa") and kv_heads != by_kind[kind]:
        raise LayoutError(
            f"config attention_head_type is {kind} but num_key_value_heads is {kv_heads}; "
            f"expected {by_kind[kind]}: correct one of them"
        )
    return kv_heads


def _head_dim(config: Config, heads: int) -> int:
    names = ("head_dim", "attention_head_dim")
    if all(config.get(name) is None for name in names):
        hidden = _whole(config, "hidden_size", "n_embd")
        if hidden % heads:
            raise LayoutError(
                f"config has no head_dim and hidden_size {hidden} is not a multiple of "
                f"{heads} attention heads; add head_dim"
            )
        head_dim = hidden // heads
    else:
        head_dim = _whole(config, *names)
    if config.get("v_head_dim") not in (None, -1, head_dim):
        raise LayoutError(
            f"config v_head_dim is {config['v_head_dim']!r} and head_dim {head_dim}; keys and "
            f"values of unequal width cannot be exported"
        )
    return head_dim


def _windows(config: Config, n: int) -> tuple[int | None, ...]:
    """Sliding window of every layer in tokens, None for full attention."""
    on = config.get("use_sliding_window") is None or _flag(config, "use_sliding_window")
    found = config.get("sliding_window")
    window = None if found is None or not on else _whole(config, "sliding_window")
    if _is_lckv(config):
        slides = [item.endswith("s") for item in _lckv_items(config, n)]
    elif types := _layer_types(config, n):
        slides = [kind == "sliding_attention" for kind in types]
    elif config.get("global_attn_idx") is not None and window:  # Hymba
        full = {_whole_value("global_attn_idx", i, 0) for i in _list(config, "global_attn_idx")}
        slides = [i not in full for i in range(n)]
    else:
        partial = [k for k in ("sliding_window_pattern", "max_window_layers") if k in config]
        if window and (partial or str(config.get("model_type", "")).startswith("gemma")):
            raise LayoutError(
                f"config sliding_window is {window} for some layers only "
                f"({', '.join(partial) or config['model_type']}); add layer_types, one "
                f"sliding_attention or full_attention for each of the {n} layers"
            )
        slides = [window is not None] * n
    if window is None and True in slides:
        raise LayoutError(
            f"layer {slides.index(True)}: config layer_types makes it slide, but sliding_window is "
            f"{found!r}{'' if on else ' and use_sliding_window is false'}; give the window's tokens"
        )
    return tuple(window if slide else None for slide in slides)


def _whole(config: Config, *names: str, default: int | None = None, least: int = 1) -> int:
    """The whole number under any of `names`, which must agree where several are there."""
    found = {k: _whole_value(k, config[k], least) for k in names if config.get(k) is not None}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{key} {value}" for key, value in found.items())
        raise LayoutError(f"config has {said}, which mean the same; remove the one that is wrong")
    if not found and default is None:
        raise LayoutError(f"config has no {' or '.join(names)}; add it")
    return next(iter(found.values()), default or 0)


def _whole_value(name: str, value: object, least: int) -> int:
    if type(value) is not int or value < least:
        raise LayoutError(f"config {name} is {value!r}; expected a whole number, at least {least}")
    return value


def _flag(config: Config, key: str) -> bool:
    value = config[key]
    if not isinstance(value, bool):
        raise LayoutError(f"config {key} is {value!r}; expected true or false")
    return value


def _list(config: Config, key: str, n: int | None = None) -> list[object]:
    value = config.get(key)
    if not isinstance(value, list | tuple) or (n is not None and len(value) != n):
        got = f"has {len(value)} entries" if isinstance(value, list | tuple) else f"is {value!r}"
        wanted = "a list" if n is None else f"a list of {n}, one for each layer"
        raise LayoutError(f"config {key} {got}; expected {wanted}")
    return list(value)
