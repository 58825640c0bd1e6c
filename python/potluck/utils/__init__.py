"""Helpers under hivemind's names."""

from potluck.p2p.multiaddr import Multiaddr
from potluck.utils.limits import increase_file_limit
from potluck.utils.logging import get_logger, use_hivemind_log_handler
from potluck.utils.nested import nested_compare, nested_flatten, nested_map, nested_pack
from potluck.utils.networking import choose_ip_address, log_visible_maddrs
from potluck.utils.performance_ema import PerformanceEMA
from potluck.utils.serializer import MSGPackSerializer, SerializerBase
from potluck.utils.streaming import combine_from_streaming, split_for_streaming
from potluck.utils.tensor_descr import BatchTensorDescriptor, DescriptorBase, TensorDescriptor
from potluck.utils.timed_storage import (
    MAX_DHT_TIME_DISCREPANCY_SECONDS,
    DHTExpiration,
    TimedStorage,
    ValueWithExpiration,
    get_dht_time,
)

__all__ = [
    "MAX_DHT_TIME_DISCREPANCY_SECONDS",
    "BatchTensorDescriptor",
    "DHTExpiration",
    "DescriptorBase",
    "MSGPackSerializer",
    "Multiaddr",
    "PerformanceEMA",
    "SerializerBase",
    "TensorDescriptor",
    "TimedStorage",
    "ValueWithExpiration",
    "choose_ip_address",
    "combine_from_streaming",
    "get_dht_time",
    "get_logger",
    "increase_file_limit",
    "log_visible_maddrs",
    "nested_compare",
    "nested_flatten",
    "nested_map",
    "nested_pack",
    "split_for_streaming",
    "use_hivemind_log_handler",
]
