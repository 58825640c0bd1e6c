"""Everything that a newcomer needs, as named raw tensors and JSON facts. Nothing from the wire is ever unpickled."""

from __future__ import annotations

import inspect
import json
import math
import numbers
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from potluck import _core
from potluck.compression import (
    CompressionBase,
    CompressionInfo,
    CompressionType,
    NoCompression,
    SerializedTensor,
    TensorRole,
)

# What arrives: plain bytes where they were decoded, else the memory in which they came.
Bytes = bytes | _core.Elements

SCALARS = (bool, int, float, str, type(None))
# What a state of others may say.
_NESTING_MAX = 32
_INTEGER_MAX = 2**64
_DIMENSIONS_MAX = 64
_NAME_LENGTH_MAX = 256
# Not all that torch has: of bytes for a quantized type it makes a tensor that ends the process.
_ELEMENT_TYPES = {
    name: getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("bfloat16", "float16", "float32", "float64", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    )
    if hasattr(torch, name)
}


# What is said of a state that does not fit: the run, which state, and why.
REFUSED = "%s: the state%s that others have does not fit, and this peer keeps its own: %s"


class _Own:
    """Stands where something could not travel: functions and objects stay what they are at the receiver."""


OWN = _Own()


def encode_value(value: Any) -> Any:
    """A value as JSON that keeps tuples and non-text keys apart. What is not plain leaves only its place."""
    if type(value) in SCALARS:
        return value
    if type(value) in (list, tuple):
        return {"list" if type(value) is list else "tuple": [encode_value(item) for item in value]}
    if type(value) is dict and all(type(key) in SCALARS for key in value):
        return {"dict": [[key, encode_value(item)] for key, item in value.items()]}
    return {"own": []}


def decode_value(value: Any, depth: int = 0) -> Any:
    """The inverse of :func:`encode_value`, with :data:`OWN` for what did not travel.

    Raises ``ValueError`` for anything else that JSON can hold.
    """
    if type(value) in SCALARS:
        if isinstance(value, int) and abs(value) > _INTEGER_MAX:
            raise ValueError("a number that is too large")
        return value
    if depth >= _NESTING_MAX:
        raise ValueError(f"nested deeper than {_NESTING_MAX}")
    kind, items = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (None, None)
    if kind == "own":
        return OWN
    if kind in ("list", "tuple") and isinstance(items, list):
        decoded = [decode_value(item, depth + 1) for item in items]
        return tuple(decoded) if kind == "tuple" else decoded
    if kind == "dict" and isinstance(items, list) and all(map(_is_pair, items)):
        return {key: decode_value(item, depth + 1) for key, item in items}
    raise ValueError(f"no value: {_shown(value)}")


def _is_pair(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and type(item[0]) in SCALARS


def _shown(value: Any) -> str:
    """A few words of it, whatever it is and however long."""
    return reprlib.repr(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)


def _suits(mine: Any, received: Any) -> bool:
    """Whether code that works with ``mine`` can be expected to work with ``received``."""
    if mine is None or received is OWN:
        return True
    if isinstance(mine, (bool, str)):
        return type(received) in SCALARS
    if isinstance(mine, numbers.Integral):
        return _is_number(received) and math.isfinite(received)
    if isinstance(mine, (numbers.Real, torch.Tensor)):
        return _is_number(received)
    if isinstance(mine, dict):
        return isinstance(received, dict) and all(_suits(mine.get(key), v) for key, v in received.items())
    if isinstance(mine, (list, tuple)):
        if not isinstance(received, (list, tuple)):
            return False
        if len(mine) == len(received):
            return all(map(_suits, mine, received))
        # A list may be a history of any length.
        return isinstance(mine, list) and (not all(map(_is_number, mine)) or all(map(_is_number, received)))
    return not callable(mine)


def _taken(name: str, mine: Any, encoded: Any) -> Any:
    """A received value for the place of ``mine``, with this side's own where something did not travel.

    Raises ``ValueError`` if it is nothing of that kind.
    """
    try:
        received = decode_value(encoded)
        if not _suits(mine, received):
            raise ValueError(f"{_shown(received)} cannot take the place of {_shown(mine)}")
        return _like(mine, merged(mine, received))
    except (ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name}: {error}") from error


def merged(mine: Any, received: Any) -> Any:
    """What was received, with this side's own values at the places of those that could not travel."""
    if received is OWN:
        return mine
    if isinstance(received, dict):
        mine = mine if isinstance(mine, dict) else {}
        taken = {key: merged(mine.get(key, OWN), value) for key, value in received.items()}
        return {**mine, **{key: value for key, value in taken.items() if value is not OWN}}
    if isinstance(received, (list, tuple)) and any(map(_lacks, received)):
        # Places mean the same only in a list of one length.
        if not isinstance(mine, (list, tuple)) or len(mine) != len(received):
            return mine
        return type(received)(merged(a, b) for a, b in zip(mine, received, strict=True))
    return received


def _lacks(value: Any) -> bool:
    """Whether something in it did not travel."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return value is OWN or any(map(_lacks, items))


def _names(value: Any) -> set[str]:
    """The text keys of all dictionaries in it, but those whose values did not travel."""
    if isinstance(value, dict):
        own = {key for key, item in value.items() if isinstance(key, str) and item is not OWN}
        return own.union(*map(_names, value.values()))
    return set().union(*map(_names, value)) if isinstance(value, (list, tuple)) else set()


def _copied(value: Any) -> Any:
    """Containers anew, with what is in them as it is."""
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def plain_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that can travel, or the parts of them that can."""
    return {name: encode_value(value) for name, value in values.items()}


# The fact that lists which blobs are compressed messages instead of the plain values.
ENCODED = "encoded"
# Larger tensors are refused by decoders, so they travel as they are.
_ENCODED_VALUES_MAX = 1 << 28


def encode_blobs(
    blobs: dict[str, torch.Tensor],
    infos: Iterable[tuple[str, CompressionInfo]],
    compression: CompressionBase,
) -> dict[str, str]:
    """Compress the named blobs in place, and answer the facts that the receiver needs for :func:`plain_blobs`.

    Numbers (step counters and the like) and integers stay exact, and so do values that the scheme cannot express.
    """
    if compression == NoCompression():
        return {}
    encoded = []
    for name, info in infos:
        tensor = blobs[name]
        if not tensor.is_floating_point() or not 1 < tensor.numel() <= _ENCODED_VALUES_MAX:
            continue
        try:
            if compression.scheme_for(info) == CompressionType.NONE:
                continue
            message = compression.compress(tensor, info).SerializeToString()
        except (KeyError, ValueError):
            # Without a rule for it (or one that can express it) a tensor travels as it is, as in rounds.
            continue
        blobs[name] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        encoded.append(name)
    return {ENCODED: json.dumps(encoded)}


def plain_blobs(meta: Mapping[str, str], blobs: Mapping[str, Bytes]) -> Mapping[str, Bytes]:
    """The blobs with compressed ones decoded.

    Raises ``ValueError`` for what is no compressed tensor.
    """
    if ENCODED not in meta:
        return blobs
    plain: dict[str, Any] = dict(blobs)
    waiting = set(blobs)
    for name in parsed(meta, ENCODED, list):
        if not isinstance(name, str) or name not in waiting:
            raise ValueError(f"the state lacks {_shown(name)}, which it says is compressed")
        waiting.remove(name)
        try:
            message = SerializedTensor.FromString(bytes(blobs[name]))
            plain[name] = _core.decode_bytes(
                message.buffer, message.size, message.dtype, int(message.compression)
            )
        except ValueError as error:
            raise ValueError(f"{_shown(name)}: {error}") from error
    return plain


def count_of(meta: Mapping[str, str], name: str) -> int:
    """A count among the facts. Raises ``ValueError`` if there is none."""
    text = meta.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) <= 18):
        raise ValueError(f"the state has no valid {name}: {_shown(text)}")
    return int(text)


class StateCodec:
    """Captures and restores parameters, extra tensors, optimizer and scheduler."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[torch.Tensor],
        extra_tensors: Sequence[torch.Tensor],
        scheduler: Any,
        compression: CompressionBase = NoCompression(),  # noqa: B008 - immutable
    ):
        self.compression = compression
        self.optimizer, self.parameters = optimizer, list(parameters)
        self.extra_tensors, self.scheduler = list(extra_tensors), scheduler

    @torch.no_grad()
    def capture(self) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
        """Facts and tensors. The tensors are copied by whoever sends them."""
        tensors = {f"param.{i:06}": p for i, p in enumerate(self.parameters)}
        tensors.update({f"extra.{i:06}": t for i, t in enumerate(self.extra_tensors)})
        saved = self.optimizer.state_dict()
        described: dict[str, dict[str, Any]] = {}
        for index, entries in saved["state"].items():
            facts = described.setdefault(str(index), {})
            for name, value in entries.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"opt.{index}.{name}"] = value
                    facts[name] = {"dtype": _dtype_name(value.dtype), "shape": list(value.shape)}
                elif type(value) in SCALARS:
                    facts[name] = {"value": value}
        groups = [
            plain_part({k: _number(v) for k, v in group.items() if k != "params"})
            for group in saved["param_groups"]
        ]
        # Whoever keeps the state without torch (`potluck keeper`) stores it with these.
        shapes = {
            name: {"dtype": _dtype_name(t.dtype), "shape": list(t.shape)}
            for name, t in tensors.items()
            if not name.startswith("opt.")
        }
        meta = {
            "optimizer": json.dumps(described),
            "param_groups": json.dumps(groups),
            "tensors": json.dumps(shapes),
        }
        if self.scheduler is not None:
            meta["scheduler"] = json.dumps(plain_part(self.scheduler.state_dict()))
        blobs = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
        meta.update(encode_blobs(blobs, map(_describe, tensors.items()), self.compression))
        return meta, blobs

    @torch.no_grad()
    def restore(self, meta: Mapping[str, str], blobs: Mapping[str, Bytes]) -> None:
        """Replace everything, or nothing: all of it is checked before the first change.

        Raises ``ValueError`` if the state does not fit this model, optimizer or schedule. What they have then is what
        they had before.
        """
        described, groups = parsed(meta, "optimizer", dict), parsed(meta, "param_groups", list)
        blobs = plain_blobs(meta, blobs)
        values = self._values(meta, blobs)
        saved = {
            "state": self._optimizer_state(described, blobs),
            "param_groups": self._param_groups(groups),
        }
        schedule = None
        if self.scheduler is not None and "scheduler" in meta:
            schedule = self._schedule(parsed(meta, "scheduler", dict))
        try:
            with self._as_before_if_it_fails():
                self.optimizer.load_state_dict(saved)
                if schedule is not None:
                    self.scheduler.load_state_dict(schedule)
                # What could fail has not.
                for place, value in values:
                    place.copy_(value)
        except Exception as error:
            raise ValueError(f"the optimizer or its schedule does not take the state: {error!r}") from error

    @contextmanager
    def _as_before_if_it_fails(self) -> Iterator[None]:
        """Optimizer and schedule, of whatever class they are."""
        optimizer, scheduler = self.optimizer, self.scheduler
        groups, state = optimizer.param_groups, optimizer.state
        contents = [(group, dict(group)) for group in groups]
        entries = {key: _copied(value) for key, value in state.items()}
        attributes = dict(getattr(scheduler, "__dict__", {}))
        schedule = None if scheduler is None else _copied(scheduler.state_dict())
        try:
            yield
        except BaseException:
            groups[:] = [group for group, _ in contents]
            for group, content in contents:
                group.clear()
                group.update(content)
            state.clear()
            state.update(entries)
            optimizer.param_groups, optimizer.state = groups, state
            if scheduler is not None:
                # It may have been given names of its own, and may be made of others.
                getattr(scheduler, "__dict__", {}).clear()
                getattr(scheduler, "__dict__", {}).update(attributes)
                scheduler.load_state_dict(schedule)
            raise

    def _values(
        self, meta: Mapping[str, str], blobs: Mapping[str, Bytes]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Parameters and extra tensors with what is to be copied to them."""
        places = [(f"param.{i:06}", p) for i, p in enumerate(self.parameters)]
        places += [(f"extra.{i:06}", t) for i, t in enumerate(self.extra_tensors)]
        # Older versions do not say; then the length must do.
        described = parsed(meta, "tensors", dict) if "tensors" in meta else {}
        for name, place in places:
            if name in described:
                dtype, shape = _described(name, described[name])
                if dtype != place.dtype or shape != list(place.shape):
                    raise ValueError(
                        f"{name}: expected {tuple(place.shape)} of {place.dtype}, found {tuple(shape)} of {dtype}"
                    )
        values = [(place, tensor_of(blobs, name, place.dtype, place.shape)) for name, place in places]
        for (name, place), (_, value) in zip(places, values, strict=True):
            # A buffer may hold infinities on purpose, and float8 cannot be asked.
            askable = name.startswith("param.") and place.is_floating_point() and place.element_size() > 1
            if askable and not torch.isfinite(value).all():
                raise ValueError(f"{name}: not all of its values are finite")
        return values

    def _param_groups(self, received: list[Any]) -> list[dict[str, Any]]:
        """This optimizer's groups with the settings that were received."""
        groups: list[dict[str, Any]] = self.optimizer.state_dict()["param_groups"]
        if len(received) != len(groups):
            raise ValueError(f"the state has {len(received)} parameter groups, this optimizer {len(groups)}")
        for index, (group, values) in enumerate(zip(groups, received, strict=True)):
            if not isinstance(values, dict):
                raise ValueError(f"parameter group {index}: no settings: {_shown(values)}")
            for name, value in values.items():
                if name in group and name != "params":
                    group[name] = _taken(f"parameter group {index}, {name}", group[name], value)
        return groups

    def _schedule(self, received: dict[str, Any]) -> dict[str, Any]:
        """This schedule's own state with what was received."""
        mine = self.scheduler.state_dict()
        found = {
            name: _taken(f"scheduler, {_shown(name)}", mine.get(name, OWN), value)
            for name, value in received.items()
        }
        schedule = {**mine, **{name: value for name, value in found.items() if value is not OWN}}
        for name in _names(schedule) - _names(mine):
            # torch's schedules make an attribute of every name.
            replaced = inspect.getattr_static(self.scheduler, name, None)
            if callable(replaced) or isinstance(replaced, torch.optim.Optimizer):
                raise ValueError(f"scheduler, {_shown(name)}: no part of a scheduler's state")
        return schedule

    def _optimizer_state(
        self, described: dict[str, Any], blobs: Mapping[str, Bytes]
    ) -> dict[int, dict[str, Any]]:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        indices = {str(index): index for index in range(len(parameters))}
        state: dict[int, dict[str, Any]] = {}
        for index, entries in described.items():
            if index not in indices:
                raise ValueError(
                    f"the state has parameter {_shown(index)}, this optimizer has {len(parameters)}"
                )
            if not isinstance(entries, dict):
                raise ValueError(f"parameter {index}: no statistics: {_shown(entries)}")
            mine = self.optimizer.state.get(parameters[indices[index]])
            mine = mine if isinstance(mine, dict) else {}
            for name in entries:
                if len(name) > _NAME_LENGTH_MAX or not name.isprintable():
                    raise ValueError(f"parameter {index}: no name of a statistic: {_shown(name)}")
            state[indices[index]] = {
                name: self._statistic(f"opt.{index}.{name}", facts, blobs, mine.get(name))
                for name, facts in entries.items()
            }
        return state

    @staticmethod
    def _statistic(name: str, facts: Any, blobs: Mapping[str, Bytes], mine: Any) -> Any:
        if isinstance(facts, dict) and "value" in facts:
            value = facts["value"]
            # Some optimizers write None for what they do not keep.
            if type(value) not in SCALARS or not (value is None or _suits(mine, decode_value(value))):
                raise ValueError(f"{name}: {_shown(value)} cannot take the place of {_shown(mine)}")
            return value
        dtype, shape = _described(name, facts)
        if isinstance(mine, torch.Tensor) and shape != list(mine.shape):
            raise ValueError(f"{name}: expected {tuple(mine.shape)}, found {tuple(shape)}")
        # The optimizer writes to it.
        return tensor_of(blobs, name, dtype, shape).clone()


def _described(name: str, facts: Any) -> tuple[torch.dtype, list[int]]:
    """Element type and shape of a tensor. Raises ``ValueError`` for what no tensor here can have."""
    if not isinstance(facts, dict):
        raise ValueError(f"{name}: no description of a tensor: {_shown(facts)}")
    dtype, shape = facts.get("dtype"), facts.get("shape")
    if not isinstance(dtype, str) or dtype not in _ELEMENT_TYPES:
        raise ValueError(f"{name}: unknown element type {_shown(dtype)}")
    fits = isinstance(shape, list) and len(shape) <= _DIMENSIONS_MAX
    if not fits or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise ValueError(f"{name}: no shape of a tensor: {_shown(shape)}")
    # Where one side is 0 the others take no bytes, and torch multiplies them all the same.
    if math.prod(max(size, 1) for size in shape) >= 2**48:
        raise ValueError(f"{name}: too large for a tensor: {_shown(shape)}")
    return _ELEMENT_TYPES[dtype], shape


def tensor_of(
    blobs: Mapping[str, Bytes], name: str, dtype: torch.dtype, shape: Sequence[int]
) -> torch.Tensor:
    """A blob as a tensor that is only to be read: it may lie on the memory that others are served from.

    Raises ``ValueError`` if the length of the blob does not fit.
    """
    blob, size = blobs.get(name), math.prod(shape) * dtype.itemsize
    if blob is None or len(blob) != size:
        found = "nothing" if blob is None else f"{len(blob)} bytes"
        raise ValueError(f"{name}: expected {size} bytes for {tuple(shape)} of {dtype}, found {found}")
    if size == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    if isinstance(blob, bytes):
        flat = torch.frombuffer(bytearray(blob), dtype=dtype)
    else:
        values = torch.from_dlpack(blob)
        # A blob that came in one piece begins wherever it lay in its message.
        flat = (values.clone() if values.data_ptr() % dtype.itemsize else values).view(dtype)
    return flat.reshape(tuple(shape))


def _describe(item: tuple[str, torch.Tensor]) -> tuple[str, CompressionInfo]:
    """What a policy may look at, under the keys that state averaging uses too."""
    name, tensor = item
    kind, _, rest = name.partition(".")
    if kind == "opt":
        index, _, statistic = rest.partition(".")
        return name, CompressionInfo.from_tensor(
            tensor, key=f"{statistic}.{int(index):06}", role=TensorRole.OPTIMIZER
        )
    role = TensorRole.PARAMETER if kind == "param" else TensorRole.UNSPECIFIED
    return name, CompressionInfo.from_tensor(tensor, key=name, role=role)


def parsed(meta: Mapping[str, str], name: str, kind: type) -> Any:
    """A fact that is JSON of this kind. Raises ``ValueError`` if it is not."""
    try:
        parsed = json.loads(meta[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"the state has no valid {name}: {error!r}") from error
    if not isinstance(parsed, kind):
        raise ValueError(f"the state's {name} is a {type(parsed).__name__}, not a {kind.__name__}")
    return parsed


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _like(mine: Any, received: Any) -> Any:
    """A learning rate may be a tensor here: keep it one."""
    return (
        torch.full_like(mine, received)
        if isinstance(mine, torch.Tensor) and received is not mine
        else received
    )
