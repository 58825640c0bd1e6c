"""Helpers under hivemind's names."""

from potluck.p2p.multiaddr import Multiaddr
from potluck.utils.asyncio import (
    achain,
    aenumerate,
    aiter_with_timeout,
    amap_in_executor,
    anext,
    as_aiter,
    asingle,
    attach_event_on_finished,
    await_cancelled,
    azip,
    cancel_and_wait,
    cancel_task_if_running,
    enter_asynchronously,
    iter_as_aiter,
    switch_to_uvloop,
)
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
    "achain",
    "aenumerate",
    "aiter_with_timeout",
    "amap_in_executor",
    "anext",
    "as_aiter",
    "asingle",
    "attach_event_on_finished",
    "await_cancelled",
    "azip",
    "cancel_and_wait",
    "cancel_task_if_running",
    "choose_ip_address",
    "combine_from_streaming",
    "enter_asynchronously",
    "get_dht_time",
    "get_logger",
    "increase_file_limit",
    "iter_as_aiter",
    "log_visible_maddrs",
    "nested_compare",
    "nested_flatten",
    "nested_map",
    "nested_pack",
    "split_for_streaming",
    "switch_to_uvloop",
    "use_hivemind_log_handler",
]
