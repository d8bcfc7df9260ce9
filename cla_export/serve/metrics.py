"""Metrics in Prometheus' text format. Names follow vLLM's, with our own prefix."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from cla_export.layout import KVLayout, bits
from cla_export.serve.engine import Engine, State
from cla_export.serve.sequence import Sequence

_FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_FINISHED = ("stop", "length")


class Metrics:
    """An `Observer` of the engine, and what is read off it at a scrape. One registry each."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, model: str, layout: KVLayout, dtype: str) -> None:
        self._registry = registry = CollectorRegistry()
        self._group_bytes = [
            2 * group.kv_heads * group.head_dim * bits(dtype) // 8 for group in layout.groups
        ]

        def counter(name: str, said: str, *labels: str) -> Counter:
            return Counter(f"cla_export_{name}", said, labels, registry=registry)

        def gauge(name: str, said: str, *labels: str) -> Gauge:
            return Gauge(f"cla_export_{name}", said, labels, registry=registry)

        def histogram(name: str, said: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"cla_export_{name}", said, labels, buckets=buckets, registry=registry)

        gauge("model_info", "The model that is served", "model").labels(model).set(1)
        self._running = gauge("num_requests_running", "Sequences in slots")
        self._waiting = gauge("num_requests_waiting", "Sequences in the queue")
        self._slots = gauge("num_slots", "Slots of the KV pool")
        self._usage = gauge("kv_cache_usage_perc", "Used share of the KV pool, 0 to 1")
        self._bytes = gauge("kv_cache_bytes", "Used bytes of the KV pool", "group")
        self._state = gauge("engine_state", "1 for the state that the engine is in", "state")
        self._prompt = counter("prompt_tokens", "Prompt tokens of ended sequences")
        self._generated = counter("generation_tokens", "Generated tokens of ended sequences")
        self._ends = counter("request_success", "Finished sequences", "finished_reason")
        self._failures = counter("request_failures", "Sequences ended early", "kind")
        self._refused = counter("error_responses", "Answers that are errors", "status", "code")
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked up")
        self._hits = counter("prefix_cache_hits", "Prompt tokens found")
        self._first = histogram("time_to_first_token_seconds", "From arrival", _SLOW)
        self._each = histogram("time_per_output_token_seconds", "After the first", _FAST)
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to end", _SLOW)
        self._queue = histogram("request_queue_time_seconds", "From arrival to a slot", _SLOW)
        self._prefill = histogram("request_prefill_time_seconds", "Slot to first token", _SLOW)
        self._decode = histogram("request_decode_time_seconds", "First to last token", _SLOW)
        self._step = histogram("step_seconds", "Time of a step", _FAST, "phase")
        self._rows = histogram("n_busy_slots_per_decode", "Rows of a decode step", _ROWS)
        self._tokens = counter("step_tokens", "Tokens that steps took", "phase")

    def stepped(self, phase: str, seconds: float, rows: int, tokens: int) -> None:
        self._step.labels(phase).observe(seconds)
        self._tokens.labels(phase).inc(tokens)
        if phase == "decode":
            self._rows.observe(rows)

    def admitted(self, sequence: Sequence) -> None:
        self._queue.observe(sequence.admitted - sequence.arrived)
        self._queries.inc(len(sequence.request.prompt))
        self._hits.inc(sequence.cached)

    def ended(self, sequence: Sequence, reason: str) -> None:
        if reason in _FINISHED:
            self._ends.labels(reason).inc()
        else:
            self._failures.labels(reason).inc()
        self._prompt.inc(len(sequence.request.prompt))
        self._generated.inc(sequence.made)
        if not sequence.made:
            return
        decoding = sequence.last_token - sequence.first_token
        self._first.observe(sequence.first_token - sequence.arrived)
        self._prefill.observe(sequence.first_token - sequence.admitted)
        self._whole.observe(sequence.last_token - sequence.arrived)
        self._decode.observe(decoding)
        if sequence.made > 1:
            self._each.observe(decoding / (sequence.made - 1))

    def refused(self, status: int, code: str | None) -> None:
        """Note an answer that is an error."""
        self._refused.labels(str(status), code or "").inc()

    def text(self, engine: Engine) -> str:
        """Everything, as of now."""
        self._look(engine)
        return generate_latest(self._registry).decode()

    def families(self, engine: Engine) -> list[Metric]:
        """The same as data."""
        self._look(engine)
        return list(self._registry.collect())

    def _look(self, engine: Engine) -> None:
        load = engine.load
        self._running.set(load.prefilling + load.decoding)
        self._waiting.set(load.waiting)
        self._slots.set(load.slots)
        self._usage.set(load.tokens / (load.slots * engine.executor.capacity))
        for group, size in enumerate(self._group_bytes):
            self._bytes.labels(str(group)).set(load.tokens * size)
        for state in State:
            self._state.labels(state.value).set(state == engine.state)
