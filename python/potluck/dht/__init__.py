"""Records that peers share, and how peers find each other."""

from potluck.dht.crypto import RSASignatureValidator
from potluck.dht.dht import DHT
from potluck.dht.schema import SchemaValidator, conbytes
from potluck.dht.validation import CompositeValidator, DHTRecord, RecordValidatorBase
from potluck.dht.value import DHTValue
from potluck.utils.timed_storage import MAX_DHT_TIME_DISCREPANCY_SECONDS, DHTExpiration, ValueWithExpiration

__all__ = [
    "DHT",
    "MAX_DHT_TIME_DISCREPANCY_SECONDS",
    "BytesWithPublicKey",
    "CompositeValidator",
    "DHTExpiration",
    "DHTRecord",
    "DHTValue",
    "RSASignatureValidator",
    "RecordValidatorBase",
    "SchemaValidator",
    "ValueWithExpiration",
    "conbytes",
]


def __getattr__(name: str) -> object:
    # Made on first use: it needs pydantic.
    if name == "BytesWithPublicKey":
        from potluck.dht import schema

        return schema.BytesWithPublicKey
    raise AttributeError(f"module 'potluck.dht' has no attribute {name!r}")
