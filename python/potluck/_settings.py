"""The optimizer's arguments: checked once, and turned into what the Rust session needs."""

from __future__ import annotations

import functools
import json
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

from potluck.compression import CompressionBase, NoCompression, PerTensorCompression
from potluck.compression.base import key_text

# Accepted and without effect, because potluck measures what they guess. hivemind's scripts set them.
TIMING = frozenset(
    {
        "allreduce_timeout",
        "declare_state_period",
        "min_matchmaking_time",
        "next_chunk_timeout",
        "reducer_timeout",
        "request_timeout",
        "sender_timeout",
        "shutdown_timeout",
    }
)
TRACKER_TIMING = frozenset(
    {
        "default_refresh_period",
        "expected_drift_peers",
        "expected_drift_rate",
        "max_refresh_period",
        "metadata_expiration",
        "min_refresh_period",
        "performance_ema_alpha",
    }
)
# What a factory of the gradient averager may set; the rest belongs to the session of the optimizer.
FACTORY = frozenset({"accumulate_grads_on", "averager_rank", "min_compression_ratio", *TIMING})
REASONS = {
    "bandwidth": "potluck measures every peer's bandwidth",
    "part_size_bytes": "potluck sizes parts by measured bandwidth",
    "min_vector_size": "potluck divides the work by measured bandwidth",
    "target_group_size": "potluck averages with every live peer",
    "initial_group_bits": "potluck averages with every live peer",
    "averaging_alpha": "the average replaces the values",
    "compression": "use grad_compression and state_averaging_compression of the optimizer",
    "state_compression": "use load_state_compression of the optimizer",
    "client_mode": "use client_mode of the optimizer",
    "auxiliary": "use auxiliary of the optimizer",
    "tensor_infos": "the optimizer describes its tensors itself",
    "min_group_size": "alone the optimizer goes on with its own gradients",
    "averaged_grads": "the optimizer takes the average from where it arrives",
    "allow_state_sharing": "the optimizer shares its whole state",
    "reuse_grad_buffers": "use reuse_grad_buffers of the optimizer",
    "warn": "the optimizer uses every average",
}


def check_keys(name: str, rule: Any, tensors: Sequence[Mapping[str, Any]], more: str | None = None) -> None:
    """Refuse a rule for a tensor that there is not: it would have no effect. ``more`` is a pattern of further keys."""
    # What is exact is so under every rule.
    keys = {tensor["key"] for tensor in tensors if tensor["role"] != "Exact"}
    if isinstance(rule, PerTensorCompression):
        unknown = [
            key
            for key in map(key_text, rule.tensor_compressions)
            if key not in keys and not (more and re.fullmatch(more, key))
        ]
        if unknown:
            raise ValueError(
                f"{name}: PerTensorCompression names {unknown[0]!r} and there is no such tensor. The keys are "
                f"{', '.join(sorted(keys)[:8])}{', …' if len(keys) > 8 else ''}"
            )
    for inner in _rules_within(rule):
        check_keys(name, inner, tensors, more)


def _rules_within(rule: Any) -> list[CompressionBase]:
    parts = list(vars(rule).values()) if isinstance(rule, CompressionBase) else []
    parts += [value for part in parts if isinstance(part, dict) for value in part.values()]
    return [part for part in parts if isinstance(part, CompressionBase)]


def check_opts(name: str, opts: Mapping[str, Any] | None, allowed: frozenset[str]) -> None:
    """Refuse options that could have no effect, with the reason."""
    for key in opts or {}:
        if key in allowed:
            continue
        reason = REASONS.get(key, f"expected one of {', '.join(sorted(allowed))}")
        raise ValueError(f"{name}[{key!r}] cannot have an effect: {reason}")


def check_factory(averager: Any, given: Mapping[str, Any]) -> None:
    """The same for a function as factory, whose arguments nobody sees: by what the averager it made has of them.

    ``given`` is what the function was told to hand on.
    """
    none = NoCompression()
    plain: dict[str, Any] = {"averaging_alpha": 1.0, "auxiliary": False, "min_group_size": 2}
    plain.update(compression=none, state_compression=none)
    plain.update({name: given[name] for name in ("client_mode", "reuse_grad_buffers", "warn")})
    set_differently = {name for name, value in plain.items() if getattr(averager, name) != value}
    set_differently |= averager.not_as_usual()
    check_opts("grad_averager_factory", dict.fromkeys(sorted(set_differently)), FACTORY)


def check_compression(name: str, value: Any) -> CompressionBase:
    """A compression, or an error that says what is expected."""
    if not isinstance(value, CompressionBase):
        raise TypeError(f"{name}={value!r}: expected a compression such as Float16Compression()")
    return value


def positive(name: str, value: Any, optional: bool = False, most: int = 2**63 - 1) -> Any:
    """A whole number of at least 1 and at most ``most``, by default what 64 bits with a sign hold."""
    if optional and value is None:
        return None
    try:
        # NumPy's and torch's whole numbers are some too.
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
    if number > most:
        raise ValueError(f"{name}={value!r}: expected at most {most}")
    return number


def check_arguments(**given: Any) -> None:
    """Refuse combinations in which an argument of the optimizer cannot have an effect."""
    check_opts("averager_opts", given["averager_opts"], TIMING)
    check_opts("tracker_opts", given["tracker_opts"], TRACKER_TIMING)
    if isinstance(given["grad_averager_factory"], functools.partial):
        check_opts("grad_averager_factory", given["grad_averager_factory"].keywords, FACTORY)
    for name in ("grad_compression", "state_averaging_compression", "load_state_compression"):
        check_compression(name, given[name])
    _check_local_updates(given)
    _check_delays(given)
    _check_roles(given)


def _check_local_updates(given: Mapping[str, Any]) -> None:
    if given["use_local_updates"]:
        for name in (
            "delay_grad_averaging",
            "reuse_grad_buffers",
            "grad_averager_factory",
            "delay_optimizer_step",
        ):
            if given[name]:
                raise ValueError(
                    f"{name} cannot have an effect with use_local_updates=True: gradients stay local"
                )
        if given["delay_state_averaging"]:
            raise ValueError(
                "delay_state_averaging cannot have an effect with use_local_updates=True: the average of the "
                "parameters ends the epoch, and everybody waits for it"
            )
        if given["grad_compression"] != NoCompression():
            raise ValueError(
                "grad_compression cannot have an effect with use_local_updates=True: use state_averaging_compression"
            )
        if given["average_state_every"] != 1:
            raise ValueError(
                "average_state_every cannot have an effect with use_local_updates=True: the average of the parameters "
                "ends every epoch. Raise target_batch_size to average less often"
            )


def _check_delays(given: Mapping[str, Any]) -> None:
    if given["delay_state_averaging"] and (given["delay_grad_averaging"] or given["delay_optimizer_step"]):
        raise ValueError(
            "delay_state_averaging=True cannot have an effect beside a delayed step: one thing at a time runs beside the "
            "training, and the state is averaged between the epochs"
        )
    if given["delay_grad_averaging"] and not given["delay_optimizer_step"]:
        raise ValueError(
            "delay_grad_averaging=True implies a delayed optimizer step: leave delay_optimizer_step out"
        )
    if given["delay_optimizer_step"] and not given["offload_optimizer"]:
        raise ValueError(
            "delay_optimizer_step needs offload_optimizer=True: the step changes copies of the parameters while the "
            "model still computes with the old ones. Give params= and a function as optimizer="
        )
    if given["delay_optimizer_step"] and given["reuse_grad_buffers"]:
        raise ValueError(
            "reuse_grad_buffers cannot work with a delayed step: the next gradients would gather in the same memory"
        )


def _check_roles(given: Mapping[str, Any]) -> None:
    if given["client_mode"] is False and getattr(given["dht"], "client_mode", False):
        raise ValueError(
            "client_mode=False cannot have an effect: the DHT is in client mode, where nobody can dial it"
        )
    if given["auxiliary"]:
        useless = {
            "batch_size_per_step": "it has no samples",
            "scheduler": "it makes no steps",
            "reuse_grad_buffers": "it has no gradients",
        }
        for name, reason in useless.items():
            if given[name]:
                raise ValueError(f"{name} cannot have an effect with auxiliary=True: {reason}")
        if given["load_state_compression"] != NoCompression():
            raise ValueError(
                "load_state_compression cannot have an effect with auxiliary=True: it has no state to offer"
            )
        if given["client_mode"]:
            raise ValueError(
                "client_mode=True and auxiliary=True contradict: an auxiliary peer is there for others"
            )


def choose_policy(
    *, use_local_updates: bool, delay_grad: bool, delay_optimizer: bool, delay_state: bool
) -> str:
    """The name of the session's policy."""
    if use_local_updates:
        return "local_updates"
    if delay_grad:
        return "delayed_gradient"
    if delay_optimizer:
        return "delayed_optimizer"
    return "delayed_state" if delay_state else "synchronous"


def tensor_infos(names: Sequence[str], shapes: Sequence[Sequence[int]], role: str) -> list[dict[str, Any]]:
    """Descriptions as the Rust side reads them."""
    return [
        {"key": name, "shape": list(shape), "role": role} for name, shape in zip(names, shapes, strict=True)
    ]


def session_options(**options: Any) -> str:
    """The options of the session as JSON."""
    defaults: dict[str, Any] = {
        "tensors": [],
        "state_tensors": [],
        "grad_compression": NoCompression().policy(),
        "state_compression": NoCompression().policy(),
        "powersgd": None,
        "policy": "synchronous",
        "average_state_every": "never",
        "manifest_extra": {},
        "auxiliary": False,
        "client_mode": False,
        "averaging_timeout": None,
        "load_state_timeout": 600.0,
        "owner": None,
        "invite": None,
    }
    unknown = options.keys() - defaults.keys() - {"run_id", "target_batch_size"}
    if unknown:
        raise TypeError(f"unknown session options: {', '.join(sorted(unknown))}")
    return json.dumps({**defaults, **options})
