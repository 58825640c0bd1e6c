"""Records whose values have the shape that a pydantic model says. Needs the package ``pydantic``."""

from __future__ import annotations

import re
from typing import Any

from potluck.dht.validation import DHTRecord, RecordValidatorBase
from potluck.utils.serializer import MSGPackSerializer


class SchemaValidator(RecordValidatorBase):
    """Accepts a record if its value satisfies the field of ``schema`` (a pydantic model) that its key names.

    Keys are the field names, or ``prefix_name``. Values must already have the right types: nothing is converted.
    """

    def __init__(self, schema: Any, allow_extra_keys: bool = True, prefix: str | None = None):
        try:
            import pydantic
        except ImportError as error:
            raise ImportError("SchemaValidator needs the package pydantic: pip install pydantic") from error
        fields = getattr(schema, "model_fields", None) or getattr(schema, "__fields__", None)
        if fields is None:
            raise TypeError(f"schema={schema!r}: expected a pydantic model")
        self._adapters: dict[bytes, list[Any]] = {}
        self._allow_extra_keys = allow_extra_keys
        for name, field in fields.items():
            key = MSGPackSerializer.dumps(name if prefix is None else f"{prefix}_{name}")
            annotation = getattr(field, "annotation", None) or getattr(field, "outer_type_", Any)
            for extra in reversed(getattr(field, "metadata", [])):
                annotation = _annotated(annotation, extra)
            self._adapters.setdefault(key, []).append(pydantic.TypeAdapter(annotation))

    def validate(self, record: DHTRecord) -> bool:
        adapters = self._adapters.get(record.key)
        if adapters is None:
            return self._allow_extra_keys
        try:
            value = MSGPackSerializer.loads(record.value)
            subkey = MSGPackSerializer.loads(record.subkey)
        except ValueError:
            return False
        if subkey is None and isinstance(value, dict):
            return False
        checked = value if subkey is None else {subkey: value}
        return any(_accepts(adapter, checked) for adapter in adapters)

    def merge_with(self, other: RecordValidatorBase) -> bool:
        if not isinstance(other, SchemaValidator):
            return False
        for key, adapters in other._adapters.items():
            self._adapters.setdefault(key, []).extend(adapters)
        self._allow_extra_keys = self._allow_extra_keys or other._allow_extra_keys
        return True


def _accepts(adapter: Any, value: Any) -> bool:
    import pydantic

    try:
        return bool(adapter.dump_python(adapter.validate_python(value, strict=True)) == value)
    except pydantic.ValidationError:
        return False


def _annotated(annotation: Any, extra: Any) -> Any:
    from typing import Annotated

    return Annotated[annotation, extra]


def conbytes(*, regex: str | bytes | None = None, **kwargs: Any) -> Any:
    """The type of byte strings that match a pattern, for schemas."""
    from typing import Annotated

    import pydantic

    if regex is None:
        return Annotated[bytes, pydantic.Field(**kwargs)]
    pattern = re.compile(regex.encode() if isinstance(regex, str) else regex)

    def match(value: bytes) -> bytes:
        if pattern.match(value) is None:
            raise ValueError(f"does not match {pattern.pattern!r}")
        return value

    return Annotated[bytes, pydantic.Field(**kwargs), pydantic.AfterValidator(match)]


def __getattr__(name: str) -> Any:
    if name == "BytesWithPublicKey":
        return conbytes(regex=rb".*\[owner:(.+?)\].*")
    raise AttributeError(name)
