"""What a replica is told, as plain data: it goes into a Serve config and to other machines."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cla_export.errors import BadInput
from cla_export.planning import parse_bytes
from cla_export.serve.engine import Limits
from cla_export.serve.gate import read_keys
from cla_export.serve.server import Options


@dataclass(frozen=True, slots=True)
class ReplicaArgs:
    """How each replica serves a bundle; the options of `cla-export serve`, by their names.

    Paths are read where the replica runs, so they must be there on every machine. Times are
    seconds, but for the budget; sizes bytes, or text such as 8GiB.
    """

    bundle: str
    backend: str | None = None
    engine: str | None = None
    slots: int | None = None
    kv_memory: str | int | None = None
    max_len: int | None = None
    chunk: int | None = None
    prefill_budget: float | None = None  # milliseconds
    threads: int | None = None
    served_model_name: str | None = None
    chat_template: str | None = None
    api_key_file: str | None = None
    max_body: str | int = "4MiB"
    request_timeout: float = 600.0
    step_timeout: float = 60.0

    @classmethod
    def read(cls, given: dict[str, Any]) -> "ReplicaArgs":
        """From a Serve config's `args`; BadInput for names that there are not."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(given) - known)
        if unknown or not given.get("bundle"):
            wrong = f"has {unknown[0]!r}" if unknown else "has no bundle"
            raise BadInput(f"args {wrong}; expected bundle and any of {', '.join(sorted(known))}")
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults."""
        usual = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != usual[name]}

    def options(self) -> Options:
        """As the server takes them; BadInput where a file of keys has none."""
        keys = read_keys(Path(self.api_key_file)) if self.api_key_file else ()
        return Options(
            backend=self.backend,
            engine=Path(self.engine) if self.engine else None,
            slots=self.slots,
            kv_memory=None if self.kv_memory is None else parse_bytes(self.kv_memory),
            max_len=self.max_len,
            chunk=self.chunk,
            prefill_seconds=None if self.prefill_budget is None else self.prefill_budget / 1000,
            threads=self.threads,
            name=self.served_model_name,
            keys=keys,
            limits=Limits(step_seconds=self.step_timeout),
            most_body=parse_bytes(self.max_body),
            request_seconds=self.request_timeout,
            chat_template=Path(self.chat_template) if self.chat_template else None,
        )
