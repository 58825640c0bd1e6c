"""Rules that choose a scheme per tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from potluck.compression.base import (
    CompressionBase,
    CompressionInfo,
    Key,
    NoCompression,
    TensorRole,
    key_text,
)


class AdaptiveCompressionBase(CompressionBase):
    """A rule that hands each tensor to another rule."""

    def choose_compression(self, info: CompressionInfo) -> CompressionBase:
        """The rule that takes this tensor."""
        raise NotImplementedError


class SizeAdaptiveCompression(AdaptiveCompressionBase):
    """``less`` below ``threshold`` elements of the whole tensor, ``greater_equal`` from there on."""

    def __init__(self, threshold: int, less: CompressionBase, greater_equal: CompressionBase):
        if isinstance(threshold, bool) or not isinstance(threshold, int) or threshold < 0:
            raise ValueError(f"threshold={threshold!r}: expected a number of elements >= 0")
        self.threshold = threshold
        self.less = _checked("less", less)
        self.greater_equal = _checked("greater_equal", greater_equal)

    def choose_compression(self, info: CompressionInfo) -> CompressionBase:
        return self.greater_equal if info.descriptor.numel() >= self.threshold else self.less

    def policy(self) -> Any:
        return {
            "SizeAdaptive": {
                "threshold": self.threshold,
                "less": self.less.policy(),
                "greater_equal": self.greater_equal.policy(),
            }
        }

    def __repr__(self) -> str:
        return f"SizeAdaptiveCompression({self.threshold}, {self.less!r}, {self.greater_equal!r})"


class RoleAdaptiveCompression(AdaptiveCompressionBase):
    """A rule per :class:`TensorRole`; ``default`` takes the roles that are not given."""

    def __init__(
        self,
        *,
        activation: CompressionBase | None = None,
        parameter: CompressionBase | None = None,
        gradient: CompressionBase | None = None,
        optimizer: CompressionBase | None = None,
        default: CompressionBase = NoCompression(),  # noqa: B008 - immutable
    ):
        self.activation = _checked("activation", activation, optional=True)
        self.parameter = _checked("parameter", parameter, optional=True)
        self.gradient = _checked("gradient", gradient, optional=True)
        self.optimizer = _checked("optimizer", optimizer, optional=True)
        self.default = _checked("default", default)

    def choose_compression(self, info: CompressionInfo) -> CompressionBase:
        by_role = {
            TensorRole.ACTIVATION: self.activation,
            TensorRole.PARAMETER: self.parameter,
            TensorRole.GRADIENT: self.gradient,
            TensorRole.OPTIMIZER: self.optimizer,
        }
        return by_role.get(info.role) or self.default

    def policy(self) -> Any:
        roles = ("activation", "parameter", "gradient", "optimizer")
        chosen: dict[str, Any] = {}
        for role in roles:
            rule = getattr(self, role)
            chosen[role] = None if rule is None else rule.policy()
        return {"RoleAdaptive": {**chosen, "default": self.default.policy()}}


class PerTensorCompression(AdaptiveCompressionBase):
    """A rule per tensor: a sequence (by position) or a mapping (by key). Other keys are an error."""

    def __init__(self, tensor_compressions: Sequence[CompressionBase] | Mapping[Key, CompressionBase]):
        if isinstance(tensor_compressions, Mapping):
            pairs = list(tensor_compressions.items())
        else:
            pairs = list(enumerate(tensor_compressions))
        self.tensor_compressions = {key: _checked(f"[{key!r}]", rule) for key, rule in pairs}

    def choose_compression(self, info: CompressionInfo) -> CompressionBase:
        return self.tensor_compressions[info.key]

    def scheme_for(self, info: CompressionInfo) -> Any:
        return self.choose_compression(info).scheme_for(info)

    def policy(self) -> Any:
        tensors = {key_text(key): rule.policy() for key, rule in self.tensor_compressions.items()}
        return {"PerTensor": {"tensors": tensors, "default": NoCompression().policy()}}


class ErrorFeedback(CompressionBase):
    """Carry what rounding lost into the next round, so that the sum of what is sent follows what was meant."""

    def __init__(self, compression: CompressionBase):
        self.compression = _checked("compression", compression)

    def policy(self) -> Any:
        return {"ErrorFeedback": self.compression.policy()}

    def __repr__(self) -> str:
        return f"ErrorFeedback({self.compression!r})"


def _checked(name: str, rule: Any, optional: bool = False) -> Any:
    if isinstance(rule, CompressionBase) or (optional and rule is None):
        return rule
    hint = " (an instance, not the class)" if isinstance(rule, type) else ""
    raise TypeError(f"{name}={rule!r}: expected a compression{hint}, such as Float16Compression()")
