"""Rules that choose a scheme per tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
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

    def rules(self) -> list[CompressionBase]:
        """The rules inside."""
        raise NotImplementedError

    def names(self) -> set[str]:
        return {name for rule in self.rules() for name in rule.names()}


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

    def rules(self) -> list[CompressionBase]:
        return [self.less, self.greater_equal]

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

    def rules(self) -> list[CompressionBase]:
        given = (self.activation, self.parameter, self.gradient, self.optimizer, self.default)
        return [rule for rule in given if rule is not None]

    def policy(self) -> Any:
        roles = ("activation", "parameter", "gradient", "optimizer")
        chosen: dict[str, Any] = {}
        for role in roles:
            rule = getattr(self, role)
            chosen[role] = None if rule is None else rule.policy()
        return {"RoleAdaptive": {**chosen, "default": self.default.policy()}}


class PerTensorCompression(AdaptiveCompressionBase):
    """A rule per tensor: a sequence (by position) or a mapping (by key).

    Tensors that are not named travel as they are. A rule for a tensor that does not exist is an error wherever the
    tensors are known: where an optimizer or an averager is made.
    """

    def __init__(self, tensor_compressions: Sequence[CompressionBase] | Mapping[Key, CompressionBase]):
        if isinstance(tensor_compressions, Mapping):
            pairs = list(tensor_compressions.items())
        else:
            pairs = list(enumerate(tensor_compressions))
        self.tensor_compressions = {key: _checked(f"[{key!r}]", rule) for key, rule in pairs}

    def choose_compression(self, info: CompressionInfo) -> CompressionBase:
        by_text = {key_text(key): rule for key, rule in self.tensor_compressions.items()}
        return by_text.get(key_text(info.key), NoCompression())

    def rules(self) -> list[CompressionBase]:
        return list(self.tensor_compressions.values())

    def names(self) -> set[str]:
        return super().names() | {key_text(key) for key in self.tensor_compressions}

    def policy(self) -> Any:
        tensors = {key_text(key): rule.policy() for key, rule in self.tensor_compressions.items()}
        return {"PerTensor": {"tensors": tensors, "default": NoCompression().policy()}}


class ErrorFeedback(CompressionBase):
    """Carry what rounding lost into the next round, so that the sum of what is sent follows what was meant."""

    def __init__(self, compression: CompressionBase):
        self.compression = _checked("compression", compression)

    def names(self) -> set[str]:
        return self.compression.names()

    def policy(self) -> Any:
        return {"ErrorFeedback": self.compression.policy()}

    def __repr__(self) -> str:
        return f"ErrorFeedback({self.compression!r})"


def check_names(
    argument: str, compression: CompressionBase, keys: Iterable[str], more: str | None = None
) -> None:
    """Refuse rules for tensors that do not exist: they would have no effect. ``more`` is a pattern of further keys."""
    known = list(keys)
    for name in sorted(compression.names() - set(known)):
        if not (more and re.fullmatch(more, name)):
            raise ValueError(
                f"{argument}: PerTensorCompression names {name!r} and there is no such tensor. The keys are "
                f"{', '.join(known[:8])}{', …' if len(known) > 8 else ''}"
            )


def _checked(name: str, rule: Any, optional: bool = False) -> Any:
    if isinstance(rule, CompressionBase) or (optional and rule is None):
        return rule
    hint = " (an instance, not the class)" if isinstance(rule, type) else ""
    raise TypeError(f"{name}={rule!r}: expected a compression{hint}, such as Float16Compression()")
