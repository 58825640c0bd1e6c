"""Train one neural network on whatever machines turn up.

Names and arguments are hivemind's. Nothing here imports torch until a class that needs it is used.
"""

# ruff: noqa: F401 - the imports below are for type checkers; __all__ is made from the table.

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Name -> module that holds it. Loaded on first use (PEP 562), so that `import potluck` stays quick.
_NAMES = {
    **dict.fromkeys(
        (
            "AdaptiveCompressionBase",
            "BFloat16Compression",
            "Blockwise4BitQuantization",
            "BlockwiseQuantization",
            "CompressionBase",
            "CompressionInfo",
            "CompressionType",
            "ErrorFeedback",
            "Float16Compression",
            "NoCompression",
            "PerTensorCompression",
            "Quantile8BitQuantization",
            "RoleAdaptiveCompression",
            "ScaledFloat16Compression",
            "SerializedTensor",
            "SizeAdaptiveCompression",
            "TensorRole",
            "Uniform8BitQuantization",
            "deserialize_tensor_stream",
            "deserialize_torch_tensor",
            "serialize_torch_tensor",
        ),
        "potluck.compression",
    ),
    "DHT": "potluck.dht",
    "DecentralizedAverager": "potluck.averaging",
    "GradScaler": "potluck.optim",
    "GradientAverager": "potluck.optim",
    "Optimizer": "potluck.optim",
    "PowerSGDGradientAverager": "potluck.optim",
    "ProgressTracker": "potluck.optim",
    "TrainingAverager": "potluck.optim",
    "TrainingStateAverager": "potluck.optim",
    "get_dht_time": "potluck.utils",
    "get_logger": "potluck.utils",
    "use_hivemind_log_handler": "potluck.utils",
}
_MODULES = ("averaging", "compression", "dht", "lightning", "optim", "p2p", "proto", "utils")

__all__ = [*sorted(_NAMES), "__version__"]

if TYPE_CHECKING:
    from potluck._core import __version__
    from potluck.averaging import DecentralizedAverager
    from potluck.compression import (
        AdaptiveCompressionBase,
        BFloat16Compression,
        Blockwise4BitQuantization,
        BlockwiseQuantization,
        CompressionBase,
        CompressionInfo,
        CompressionType,
        ErrorFeedback,
        Float16Compression,
        NoCompression,
        PerTensorCompression,
        Quantile8BitQuantization,
        RoleAdaptiveCompression,
        ScaledFloat16Compression,
        SerializedTensor,
        SizeAdaptiveCompression,
        TensorRole,
        Uniform8BitQuantization,
        deserialize_tensor_stream,
        deserialize_torch_tensor,
        serialize_torch_tensor,
    )
    from potluck.dht import DHT
    from potluck.optim import (
        GradientAverager,
        GradScaler,
        Optimizer,
        PowerSGDGradientAverager,
        ProgressTracker,
        TrainingAverager,
        TrainingStateAverager,
    )
    from potluck.utils import get_dht_time, get_logger, use_hivemind_log_handler


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"potluck.{name}")
    if name == "__version__":
        from potluck._core import __version__

        return __version__
    raise AttributeError(f"module 'potluck' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
