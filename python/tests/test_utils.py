"""The helpers that hivemind's users import: what each is for."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from potluck.compression import (
    CompressionInfo,
    Float16Compression,
    Uniform8BitQuantization,
    deserialize_tensor_stream,
    deserialize_torch_tensor,
)
from potluck.compression.serialization import BASE_COMPRESSION_TYPES
from potluck.p2p.multiaddr import Multiaddr
from potluck.utils import (
    PerformanceEMA,
    TensorDescriptor,
    TimedStorage,
    get_dht_time,
    nested_compare,
    nested_flatten,
    nested_map,
    nested_pack,
    use_hivemind_log_handler,
)
from potluck.utils.limits import increase_file_limit
from potluck.utils.math import get_flatten_greedy_dims, orthogonalize_
from potluck.utils.networking import choose_ip_address, log_visible_maddrs
from potluck.utils.streaming import combine_from_streaming, split_for_streaming


def test_a_tensor_in_pieces_is_the_tensor() -> None:
    first, second = torch.randn(300, 7), torch.randn(50)
    messages = [
        codec.compress(tensor, CompressionInfo.from_tensor(tensor))
        for codec, tensor in ((Float16Compression(), first), (Uniform8BitQuantization(), second))
    ]
    pieces = [list(split_for_streaming(message, 1000)) for message in messages]
    assert len(pieces[0]) == pieces[0][0].chunks == 5 and all(
        len(piece.buffer) <= 1000 for piece in pieces[0]
    )
    for message, parts in zip(messages, pieces, strict=True):
        assert torch.equal(
            deserialize_torch_tensor(combine_from_streaming(iter(parts))), deserialize_torch_tensor(message)
        )

    async def arriving() -> Any:
        for piece in (*pieces[0], *pieces[1]):
            yield [piece]

    found = asyncio.run(deserialize_tensor_stream(arriving()))
    assert [tensor.shape for tensor in found] == [first.shape, second.shape]
    assert torch.allclose(found[0], first, atol=1e-2)


def test_every_compression_type_has_its_codec() -> None:
    tensor = torch.randn(4096)
    for name, codec in BASE_COMPRESSION_TYPES.items():
        message = codec.compress(tensor, CompressionInfo.from_tensor(tensor))
        assert codec.compression_type.name == name
        assert torch.nn.functional.cosine_similarity(codec.extract(message), tensor, dim=0) > 0.97, name


def test_values_expire_and_the_longest_lived_one_stays() -> None:
    now, storage = get_dht_time(), TimedStorage(maxsize=2)
    assert not storage.store("old", 1, now - 1)
    assert storage.store("a", 1, now + 10) and not storage.store("a", 2, now + 5)
    assert storage.store("b", 2, now + 20) and storage.store("c", 3, now + 30)
    assert "a" not in storage and [key for key, _ in storage.items()] == ["b", "c"]
    assert storage.top() == ("b", (2, now + 20)) and storage.get("c").value == 3
    with storage.freeze():
        assert storage.store("d", 4, now - 1) and len(storage) == 3
    assert "d" not in storage and storage


def test_the_average_of_speed_forgets_slowly_and_leaves_pauses_out() -> None:
    speed = PerformanceEMA(alpha=0.5)
    assert speed.update(10, interval=1.0) == pytest.approx(10)
    # By Adam's correction the second of two counts twice.
    assert speed.update(10, interval=4.0) == pytest.approx(10 / 3)
    with speed.pause(), pytest.raises(RuntimeError):
        speed.update(1)
    with speed.update_threadsafe(5):
        pass
    assert speed.num_updates == 3
    for wrong in (0, -1):
        with pytest.raises(ValueError):
            speed.update(wrong)


class Pair(NamedTuple):
    left: Any
    right: Any


def test_nested_values_are_taken_apart_and_put_together_in_one_order() -> None:
    nested = {"b": [1, (2, 3)], "a": Pair(4, {"x": 5})}
    assert list(nested_flatten(nested)) == [4, 5, 1, 2, 3]
    assert nested_pack(iter([40, 50, 10, 20, 30]), nested) == {"b": [10, (20, 30)], "a": Pair(40, {"x": 50})}
    assert nested_map(lambda one, two: one + two, nested, nested)["a"] == Pair(8, {"x": 10})
    assert nested_compare(nested, {**nested, "b": [0, (0, 0)]}) and not nested_compare(nested, {"b": [1]})
    with pytest.raises(ValueError):
        nested_map(max, [1], [1, 2])


def test_the_address_for_strangers_is_a_public_one(caplog: pytest.LogCaptureFixture) -> None:
    addresses = [
        Multiaddr("/ip4/192.168.0.7/tcp/1"),
        Multiaddr("/ip6/2001:4860:4860::8888/tcp/1"),
        Multiaddr("/ip4/8.8.8.8/tcp/1"),
    ]
    assert choose_ip_address(addresses) == "8.8.8.8"
    assert choose_ip_address(addresses, protocol_priority=("ip6", "ip4")) == "2001:4860:4860::8888"
    assert choose_ip_address(addresses, prefer_global=False) == "192.168.0.7"
    with pytest.raises(ValueError, match="no address"):
        choose_ip_address([Multiaddr("/dns4/example.org/tcp/1")])
    peer = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    with caplog.at_level(logging.INFO):
        log_visible_maddrs([Multiaddr(f"{address}/p2p/{peer}") for address in addresses[:2]], only_p2p=True)
        log_visible_maddrs([Multiaddr(f"{addresses[2]}/p2p/{peer}")])
    said = [record.getMessage().split("--initial_peers ")[1] for record in caplog.records]
    assert said == [f"/p2p/{peer}", f"/ip4/8.8.8.8/tcp/1/p2p/{peer}"]


def test_powersgds_helpers() -> None:
    assert get_flatten_greedy_dims(torch.empty(2, 3, 50, 4)) == [6, 200]
    assert get_flatten_greedy_dims(torch.empty(7)) == [7]
    matrix = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    plane = matrix[:, :2].clone()
    orthogonalize_(matrix)
    assert torch.allclose(matrix.T @ matrix, torch.eye(5), atol=1e-5)
    # In order: the first columns still span what they did.
    assert torch.allclose(matrix[:, :2] @ (matrix[:, :2].T @ plane), plane, atol=1e-4)


def test_a_description_makes_tensors_of_its_kind() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.float16, requires_grad=True)
    described = TensorDescriptor.from_tensor(tensor)
    made = described.make_zeros()
    assert (made.shape, made.dtype, made.requires_grad) == (tensor.shape, tensor.dtype, True)
    assert described.numel() == 6 and described.make_zeros(dtype=torch.float32).dtype == torch.float32


@pytest.mark.skipif(sys.platform == "win32", reason="the limit is one of POSIX")
def test_the_limit_of_open_files_only_rises() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        increase_file_limit(before[0] + 1 if before[0] < before[1] else before[0], before[1])
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(before[0] + 1, before[1])
        increase_file_limit(1, 1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(before[0] + 1, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[0], resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


@pytest.fixture
def plain_logging() -> Iterator[None]:
    root = logging.getLogger()
    level, potlucks = root.level, logging.getLogger("potluck").level
    yield
    use_hivemind_log_handler("nowhere")
    root.setLevel(level)
    logging.getLogger("potluck").setLevel(potlucks)


def test_the_log_handler_is_where_it_was_put_last(
    plain_logging: None, capsys: pytest.CaptureFixture[str]
) -> None:
    use_hivemind_log_handler("in_root_logger")
    logging.getLogger("somebody.else").warning("one")
    use_hivemind_log_handler("in_hivemind")
    logging.getLogger("somebody.else").warning("two")
    logging.getLogger("potluck.part").warning("three")
    use_hivemind_log_handler("nowhere")
    logging.getLogger("potluck").warning("four")
    printed = capsys.readouterr().err
    assert [word for word in ("one", "two", "three", "four") if word in printed] == ["one", "three"]
    with pytest.raises(ValueError, match="expected one of"):
        use_hivemind_log_handler("everywhere")
