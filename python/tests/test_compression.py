"""Compression classes against hivemind's own bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import potluck
from potluck.compression import CompressionInfo, CompressionType, SerializedTensor, TensorRole

VECTORS = Path(__file__).parents[2] / "crates/compression/tests/data/vectors.json"
CLASSES = {
    "NONE": potluck.NoCompression,
    "FLOAT16": potluck.Float16Compression,
    "MEANSTD_16BIT": potluck.ScaledFloat16Compression,
    "MEANSTD": potluck.ScaledFloat16Compression,
    "UNIFORM_8BIT": potluck.Uniform8BitQuantization,
    "UNIFORM": potluck.Uniform8BitQuantization,
    "QUANTILE_8BIT": potluck.Quantile8BitQuantization,
    "QUANTILE": potluck.Quantile8BitQuantization,
    "BLOCKWISE_8BIT": potluck.BlockwiseQuantization,
    "BLOCKWISE": potluck.BlockwiseQuantization,
}
ALL = [
    potluck.NoCompression,
    potluck.Float16Compression,
    potluck.ScaledFloat16Compression,
    potluck.BFloat16Compression,
    potluck.Uniform8BitQuantization,
    potluck.Quantile8BitQuantization,
    potluck.BlockwiseQuantization,
    potluck.Blockwise4BitQuantization,
]


def golden() -> list[dict[str, object]]:
    return [v for v in json.loads(VECTORS.read_text())["codecs"] if v.get("buffer") and "[" in v["tensor"]]


def tensor_of(vector: dict[str, object]) -> torch.Tensor:
    text = str(vector["tensor"])
    values = json.loads(text[text.index("[") :])
    return torch.tensor(values, dtype=getattr(torch, str(vector["dtype"]))).reshape(vector["size"])


@pytest.mark.parametrize("vector", golden(), ids=lambda v: f"{v['codec']} {v['tensor']}")
def test_buffers_are_hiveminds(vector: dict[str, object]) -> None:
    try:
        tensor = tensor_of(vector)
    except ValueError:
        pytest.skip("this vector describes its input in words")
    message = CLASSES[str(vector["codec"])]().compress(tensor, CompressionInfo.from_tensor(tensor))
    assert message.dtype == vector["dtype"] and message.size == vector["size"]
    assert message.buffer.hex() == vector["buffer"]
    assert CompressionType(message.compression).name == vector["codec"]


def test_the_protobuf_form_is_hiveminds() -> None:
    tensor = torch.tensor([1.0, -2.0, 0.5])
    message = potluck.Float16Compression().compress(tensor, CompressionInfo.from_tensor(tensor))
    assert message.SerializeToString().hex() == "0a06003c00c000381201032207666c6f617433322802"
    assert SerializedTensor.FromString(message.SerializeToString()) == message
    needs = potluck.serialize_torch_tensor(torch.tensor([1.0], requires_grad=True))
    assert needs.SerializeToString().hex() == "0a040000803f12010118012207666c6f61743332"


@pytest.mark.parametrize("rule", ALL, ids=lambda c: c.__name__)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (4099,), (2, 3, 4)], ids=str)
def test_round_trip_keeps_shape_type_and_most_of_the_values(rule: type, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    tensor = torch.randn(shape)
    decoded = rule().extract(rule().compress(tensor, CompressionInfo.from_tensor(tensor)))
    assert decoded.shape == tensor.shape and decoded.dtype == tensor.dtype
    scale = tensor.abs().max()
    assert (decoded - tensor).abs().max() <= 0.2 * scale
    if rule is potluck.NoCompression:
        assert torch.equal(decoded, tensor)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"])
def test_every_type_travels_exactly_without_compression(dtype: str) -> None:
    tensor = torch.tensor([[0, 1], [1, 0]]).to(getattr(torch, dtype))
    message = potluck.serialize_torch_tensor(tensor)
    assert torch.equal(potluck.deserialize_torch_tensor(message), tensor)


def test_scalars_empty_and_strided_tensors() -> None:
    for tensor in (torch.tensor(3.25), torch.empty(0, 4), torch.arange(12.0).reshape(3, 4).t()):
        assert torch.equal(potluck.deserialize_torch_tensor(potluck.serialize_torch_tensor(tensor)), tensor)


def test_bytes_of_strangers_are_refused_with_the_field() -> None:
    message = potluck.serialize_torch_tensor(torch.ones(8), CompressionType.UNIFORM_8BIT)
    message.buffer = message.buffer[:-1]
    with pytest.raises(ValueError, match="buffer"):
        message.tensor()
    with pytest.raises(ValueError, match="dtype"):
        SerializedTensor(b"", [0], dtype="object").tensor()
    with pytest.raises(ValueError):
        SerializedTensor.FromString(b"\xff\xff\xff")
    with pytest.raises(ValueError, match="size"):
        SerializedTensor(b"\0\0\0\0", [2**31, 2**31], dtype="float32").tensor()


def test_values_that_a_scheme_cannot_express_are_refused() -> None:
    with pytest.raises(ValueError, match="value 1 is not finite"):
        potluck.serialize_torch_tensor(torch.tensor([0.0, float("nan")]), CompressionType.UNIFORM_8BIT)


def test_adaptive_rules_choose_by_size_role_and_key() -> None:
    half, byte = potluck.Float16Compression(), potluck.Uniform8BitQuantization()
    by_size = potluck.SizeAdaptiveCompression(threshold=8, less=half, greater_equal=byte)
    small, large = torch.ones(7), torch.ones(8)
    assert by_size.compress(small, CompressionInfo.from_tensor(small)).compression == CompressionType.FLOAT16
    assert (
        by_size.compress(large, CompressionInfo.from_tensor(large)).compression
        == CompressionType.UNIFORM_8BIT
    )
    by_role = potluck.RoleAdaptiveCompression(gradient=byte)
    info = CompressionInfo.from_tensor(small, role=TensorRole.GRADIENT)
    assert by_role.scheme_for(info) == CompressionType.UNIFORM_8BIT
    assert by_role.scheme_for(CompressionInfo.from_tensor(small)) == CompressionType.NONE
    by_key = potluck.PerTensorCompression([half, byte])
    assert by_key.scheme_for(CompressionInfo.from_tensor(small, key=1)) == CompressionType.UNIFORM_8BIT
    # One rule, wherever it stands: who is not named travels as it is.
    nested = potluck.RoleAdaptiveCompression(default=by_key)
    for rule in (by_key, nested, potluck.SizeAdaptiveCompression(0, by_key, nested)):
        for key, scheme in (
            (0, CompressionType.FLOAT16),
            ("1", CompressionType.UNIFORM_8BIT),
            (2, CompressionType.NONE),
        ):
            info = CompressionInfo.from_tensor(small, key=key)
            assert rule.scheme_for(info) == scheme == rule.choose_compression(info).scheme_for(info)
        assert rule.names() == {"0", "1"}
    with pytest.raises(TypeError, match="an instance, not the class"):
        potluck.SizeAdaptiveCompression(8, potluck.Float16Compression, byte)
    assert by_size.estimate_compression_ratio(CompressionInfo.from_tensor(large)) == 0.25


def test_what_was_clamped_is_counted() -> None:
    tensor = torch.tensor([1e6, -1e6, 1.0, float("nan"), float("inf")])
    message = potluck.Float16Compression().compress(tensor)
    assert (message.saturated, message.nan) == (3, 1)
    assert message.tensor()[:2].tolist() == [65504.0, -65504.0]
    # It is the sender's: a message that has travelled is equal without it.
    assert SerializedTensor.FromString(message.SerializeToString()) == message


@pytest.mark.parametrize("rule", ALL, ids=lambda c: c.__name__)
def test_decoded_tensors_own_their_memory(rule: type) -> None:
    # Large enough for memory that is used again.
    values = [torch.full((700, 500), float(number)) for number in range(1, 4)]
    messages = [rule().compress(tensor) for tensor in values]
    first, second = messages[0].tensor(), messages[1].tensor()
    view = first[350:]
    del first
    third = messages[2].tensor()
    third.add_(1.0)
    assert third.data_ptr() not in (view.data_ptr(), second.data_ptr())
    assert torch.equal(view, values[0][350:]) and torch.equal(second, values[1])
    assert torch.equal(third, values[2] + 1.0)
    del view, second, third
    for message, tensor in zip(messages, values, strict=True):
        decoded = message.tensor()
        assert torch.equal(decoded, tensor)
        decoded.zero_()
        del decoded


def test_memory_of_a_tensor_that_is_gone_is_used_for_the_next() -> None:
    message = potluck.Float16Compression().compress(torch.randn(1_000_000))
    address = message.tensor().data_ptr()
    assert all(message.tensor().data_ptr() == address for _ in range(5))
    # Not for a tensor that would waste most of it.
    small = potluck.Float16Compression().compress(torch.randn(300_000)).tensor()
    assert small.data_ptr() != address


@pytest.mark.parametrize("rule", ALL, ids=lambda c: c.__name__)
def test_a_message_of_a_slice_is_that_of_a_copy(rule: type) -> None:
    # Neither of these begins where the memory of a tensor usually does.
    base = torch.randn(10_001)
    assert rule().compress(base[1:]).buffer == rule().compress(base[1:].clone()).buffer
    if rule not in (potluck.Float16Compression, potluck.ScaledFloat16Compression):
        half = base.to(torch.bfloat16)
        assert rule().compress(half[1:]).buffer == rule().compress(half[1:].clone()).buffer
