"""genai_config.json: what onnxruntime-genai needs to open a bundle as it is.

It finds the caches by the graph's input names, so groups are all it has to know: its
`num_hidden_layers` is the number of groups. Source: onnxruntime-genai 0.18.
"""

from collections.abc import Mapping

from cla_export.bundle import GRAPH
from cla_export.spec import ModelSpec


def genai_config(
    spec: ModelSpec, config: Mapping[str, object], generation: Mapping[str, object]
) -> dict[str, object]:
    """Build genai_config.json from the model's config.json and generation_config.json."""

    def token(key: str) -> object:
        value = generation.get(key)
        return config.get(key) if value is None else value

    eos = token("eos_token_id")
    first_eos = eos[0] if isinstance(eos, list) and eos else eos
    pad = token("pad_token_id")
    tokens = {
        "bos_token_id": token("bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": first_eos if pad is None else pad,
    }
    first = spec.layout.groups[0]
    return {
        "model": {
            "type": "llama",  # any decoder type it knows; the graph holds the real architecture
            "vocab_size": spec.vocab_size,
            "context_length": spec.max_positions,
            **{key: value for key, value in tokens.items() if value is not None},
            "decoder": {
                "filename": GRAPH,
                "head_size": first.head_dim,
                **({"hidden_size": spec.hidden_size} if spec.hidden_size else {}),
                "num_attention_heads": spec.q_heads,
                "num_key_value_heads": first.kv_heads,
                "num_hidden_layers": spec.layout.num_groups,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "session_options": {"provider_options": []},
            },
        },
        "search": {
            "max_length": spec.max_positions,
            "do_sample": False,
            "past_present_share_buffer": True,
        },
    }
