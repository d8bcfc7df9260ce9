"""Typed reading of a config.json: a wrong or missing key is an error that names the key."""

from collections.abc import Mapping
from typing import cast

from cla_export.errors import BadInput

_MISSING = object()


class ConfigReader:
    """Reads typed values out of a JSON object. `null` counts as absent, as in Hugging Face."""

    def __init__(self, config: Mapping[str, object], where: str = "config.json") -> None:
        self._config = config
        self._where = where

    def integer(self, key: str, default: object = _MISSING) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self._wrong(key, value, "a positive integer")
        return value

    def number(self, key: str, default: object = _MISSING) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self._wrong(key, value, "a positive number")
        return float(value)

    def boolean(self, key: str, default: object = _MISSING) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def mapping(self, key: str) -> Mapping[str, object] | None:
        value = self._config.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return cast("Mapping[str, object] | None", value)

    def _get(self, key: str, default: object) -> object:
        value = self._config.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise BadInput(f"{self._where}: key {key!r} is missing; a model of this type needs it")
        return default

    def _wrong(self, key: str, value: object, expected: str) -> BadInput:
        return BadInput(f"{self._where}: {key} is {value!r}; expected {expected}")
