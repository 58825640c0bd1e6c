"""Everything that a newcomer needs, as named raw tensors and JSON facts. Nothing from the wire is ever unpickled."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
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


def decode_value(value: Any) -> Any:
    """The inverse of :func:`encode_value`, with :data:`OWN` for what did not travel."""
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    if kind == "own":
        return OWN
    if kind == "dict":
        return {key: decode_value(item) for key, item in items}
    decoded = [decode_value(item) for item in items]
    return tuple(decoded) if kind == "tuple" else decoded


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
    """The blobs with compressed ones decoded."""
    if ENCODED not in meta:
        return blobs
    plain: dict[str, Any] = dict(blobs)
    for name in _parse(meta, ENCODED, list):
        if not isinstance(name, str) or name not in blobs:
            raise ValueError(f"the state lacks {name!r}, which it says is compressed")
        message = SerializedTensor.FromString(bytes(blobs[name]))
        plain[name] = _core.decode_bytes(
            message.buffer, message.size, message.dtype, int(message.compression)
        )
    return plain


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

        Raises ``ValueError`` if the state does not fit this model or optimizer.
        """
        described, groups = _parse(meta, "optimizer", dict), _parse(meta, "param_groups", list)
        blobs = plain_blobs(meta, blobs)
        places = [(f"param.{i:06}", p) for i, p in enumerate(self.parameters)]
        places += [(f"extra.{i:06}", t) for i, t in enumerate(self.extra_tensors)]
        values = [(place, tensor_of(blobs, name, place.dtype, place.shape)) for name, place in places]
        state = self._optimizer_state(described, blobs)
        mine = self.optimizer.param_groups
        if len(groups) != len(mine):
            raise ValueError(f"the state has {len(groups)} parameter groups, this optimizer {len(mine)}")
        for place, value in values:
            place.copy_(value)
        new = self.optimizer.state_dict()
        for group, received in zip(new["param_groups"], groups, strict=True):
            for name, value in received.items():
                if name in group and name != "params":
                    group[name] = _like(group[name], merged(group[name], decode_value(value)))
        self.optimizer.load_state_dict({"state": state, "param_groups": new["param_groups"]})
        if self.scheduler is not None and "scheduler" in meta:
            received = {k: decode_value(v) for k, v in _parse(meta, "scheduler", dict).items()}
            self.scheduler.load_state_dict(merged(self.scheduler.state_dict(), received))

    def _optimizer_state(self, described: Any, blobs: Mapping[str, Bytes]) -> dict[int, dict[str, Any]]:
        count = sum(len(group["params"]) for group in self.optimizer.param_groups)
        state: dict[int, dict[str, Any]] = {}
        for index, entries in described.items():
            if not index.isdecimal() or int(index) >= count:
                raise ValueError(f"the state has parameter {index}, this optimizer has {count}")
            state[int(index)] = {}
            for name, facts in entries.items():
                if "value" in facts:
                    state[int(index)][name] = facts["value"]
                    continue
                dtype, shape = getattr(torch, str(facts["dtype"]), None), list(map(int, facts["shape"]))
                if not isinstance(dtype, torch.dtype):
                    raise ValueError(f"{name}: unknown element type {facts['dtype']!r}")
                # The optimizer writes to it.
                value = tensor_of(blobs, f"opt.{index}.{name}", dtype, shape)
                state[int(index)][name] = value.clone()
        return state


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


def _parse(meta: Mapping[str, str], name: str, kind: type) -> Any:
    try:
        parsed = json.loads(meta[name])
    except (KeyError, ValueError) as error:
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
