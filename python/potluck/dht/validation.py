"""Rules that records must obey: what this peer stores is signed by them, what it reads is checked by them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable


@dataclasses.dataclass(init=True, repr=True, frozen=True)
class DHTRecord:
    """One record: key, subkey (msgpack; ``c0`` is none), value (msgpack), and when it ends."""

    key: bytes
    subkey: bytes
    value: bytes
    expiration_time: float


class RecordValidatorBase(ABC):
    """A rule. Only :meth:`validate` is required."""

    @abstractmethod
    def validate(self, record: DHTRecord) -> bool:
        """Whether the record may be believed."""

    def sign_value(self, record: DHTRecord) -> bytes:
        """The value to store in place of ``record.value``."""
        return record.value

    def strip_value(self, record: DHTRecord) -> bytes:
        """The value without what :meth:`sign_value` added."""
        return record.value

    @property
    def priority(self) -> int:
        """Signing goes from the lowest priority to the highest; checking the other way."""
        return 0

    def merge_with(self, other: RecordValidatorBase) -> bool:
        """Take another rule of the same kind in; false to keep both."""
        return False


class CompositeValidator(RecordValidatorBase):
    """Several rules as one."""

    def __init__(self, validators: Iterable[RecordValidatorBase] = ()):
        self._validators: list[RecordValidatorBase] = []
        self.extend(validators)

    def extend(self, validators: Iterable[RecordValidatorBase]) -> None:
        """Add rules."""
        for validator in validators:
            if not isinstance(validator, RecordValidatorBase):
                raise TypeError(f"record_validators: expected a RecordValidatorBase, got {validator!r}")
            if not any(
                type(present) is type(validator) and present.merge_with(validator)
                for present in self._validators
            ):
                self._validators.append(validator)
        self._validators.sort(key=lambda validator: validator.priority)

    def validate(self, record: DHTRecord) -> bool:
        for index, validator in enumerate(reversed(self._validators)):
            if not validator.validate(record):
                return False
            if index + 1 < len(self._validators):
                record = dataclasses.replace(record, value=validator.strip_value(record))
        return True

    def sign_value(self, record: DHTRecord) -> bytes:
        for validator in self._validators:
            record = dataclasses.replace(record, value=validator.sign_value(record))
        return record.value

    def strip_value(self, record: DHTRecord) -> bytes:
        for validator in reversed(self._validators):
            record = dataclasses.replace(record, value=validator.strip_value(record))
        return record.value
