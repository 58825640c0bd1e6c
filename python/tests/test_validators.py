"""hivemind's record validators: what they sign, and what they refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from potluck.dht import DHT, CompositeValidator, DHTRecord, RSASignatureValidator, SchemaValidator
from potluck.dht.schema import BytesWithPublicKey, conbytes
from potluck.utils import MSGPackSerializer, get_dht_time
from potluck.utils.crypto import RSAPrivateKey, RSAPublicKey

pydantic = pytest.importorskip("pydantic")
pytest.importorskip("cryptography")


def record(key: object, value: object, subkey: object = None) -> DHTRecord:
    return DHTRecord(
        MSGPackSerializer.dumps(key), MSGPackSerializer.dumps(subkey), MSGPackSerializer.dumps(value), 1e12
    )


def test_only_the_owner_writes_under_its_key() -> None:
    owner, thief = RSASignatureValidator(RSAPrivateKey()), RSASignatureValidator(RSAPrivateKey())
    plain = record("scores", 3, subkey=owner.local_public_key)
    signed = dataclasses.replace(plain, value=owner.sign_value(plain))
    assert owner.validate(signed) and thief.validate(signed), "everybody can check"
    assert owner.strip_value(signed) == plain.value
    assert not thief.validate(plain), "not signed"
    assert not thief.validate(dataclasses.replace(plain, value=thief.sign_value(plain)))
    changed = dataclasses.replace(signed, value=signed.value.replace(b"\x03", b"\x04", 1))
    assert not owner.validate(changed)
    moved = dataclasses.replace(signed, key=MSGPackSerializer.dumps("other"))
    assert not owner.validate(moved)
    assert thief.validate(dataclasses.replace(signed, expiration_time=1.0)), "a copy has less time left"
    in_key = record([owner.local_public_key, "scores"], 3)
    signed = dataclasses.replace(in_key, value=owner.sign_value(in_key))
    assert thief.validate(signed) and not thief.validate(in_key)
    assert thief.validate(record("scores", 3)), "nobody's record is everybody's"
    assert not owner.validate(record("scores", 3, subkey=b"[owner:rubbish]"))


def test_one_key_for_the_process_and_its_forms() -> None:
    key = RSAPrivateKey.process_wide()
    assert RSAPrivateKey.process_wide() is key and len(key.to_bytes()) > 1000
    public = RSAPublicKey.from_bytes(key.get_public_key().to_bytes())
    assert public.verify(b"data", key.sign(b"data")) and not public.verify(b"date", key.sign(b"data"))


class Schema(pydantic.BaseModel):
    """What a run's records look like."""

    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    experiment: conbytes(regex=rb"run-\d+")
    steps: dict[BytesWithPublicKey, pydantic.StrictInt]


@pytest.mark.parametrize("prefix", [None, "lm"])
def test_records_have_the_shape_of_the_schema(prefix: str | None) -> None:
    validator = SchemaValidator(Schema, allow_extra_keys=False, prefix=prefix)
    name = (lambda field: field) if prefix is None else (lambda field: f"{prefix}_{field}")
    assert validator.validate(record(name("experiment"), b"run-12"))
    assert not validator.validate(record(name("experiment"), b"other"))
    assert not validator.validate(record(name("experiment"), 12))
    owner = RSASignatureValidator(RSAPrivateKey()).local_public_key
    assert validator.validate(record(name("steps"), 5, subkey=owner))
    assert not validator.validate(record(name("steps"), "5", subkey=owner)), "nothing is converted"
    assert not validator.validate(record(name("steps"), 5, subkey=b"nobody"))
    assert not validator.validate(record(name("unknown"), 5))
    assert SchemaValidator(Schema, prefix=prefix).validate(record(name("unknown"), 5))


def test_both_together_sign_last_and_check_first() -> None:
    rsa = RSASignatureValidator(RSAPrivateKey())
    both = CompositeValidator([rsa, SchemaValidator(Schema, allow_extra_keys=False)])
    plain = record("steps", 5, subkey=rsa.local_public_key)
    signed = dataclasses.replace(plain, value=both.sign_value(plain))
    assert both.validate(signed) and both.strip_value(signed) == plain.value
    assert not both.validate(plain)


def test_peers_sign_and_check_what_they_share(loopback_dht: Callable[..., DHT]) -> None:
    rules = [RSASignatureValidator(RSAPrivateKey()) for _ in range(2)]
    schema = SchemaValidator(Schema, allow_extra_keys=False, prefix="lm")
    owner, reader = (loopback_dht(record_validators=[rule, schema]) for rule in rules)
    careless = loopback_dht()
    mine, expires = rules[0].local_public_key, get_dht_time() + 60
    assert owner.store("lm_steps", 5, expires, subkey=mine)
    assert {k: v.value for k, v in reader.get("lm_steps", latest=True).value.items()} == {mine: 5}
    raw = careless.node.get(MSGPackSerializer.dumps("lm_steps"), True)
    assert raw is not None and b"[signature:" in raw[0][1], "what travels is signed"
    assert reader.store("lm_steps", 7, expires, subkey=rules[1].local_public_key)
    assert sorted(v.value for v in owner.get("lm_steps", latest=True).value.values()) == [5, 7]
    # Nobody else writes under a key that names its owner, and nobody writes what the schema does not know.
    assert careless.store("lm_steps", 6, expires + 60, subkey=mine)
    assert {v.value for v in reader.get("lm_steps", latest=True).value.values()} == {7}
    assert (
        careless.store("lm_experiment", 12, expires)
        and careless.get("lm_experiment", latest=True).value == 12
    )
    assert reader.get("lm_experiment", latest=True) is None
    assert owner.store("lm_experiment", b"run-1", expires + 60)
    assert reader.get("lm_experiment", latest=True).value == b"run-1"
