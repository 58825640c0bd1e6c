"""How tensors are packed before they travel. Every class is also at the top level of :mod:`potluck`."""

from potluck.compression.adaptive import (
    AdaptiveCompressionBase,
    ErrorFeedback,
    PerTensorCompression,
    RoleAdaptiveCompression,
    SizeAdaptiveCompression,
)
from potluck.compression.base import (
    CompressionBase,
    CompressionInfo,
    CompressionType,
    NoCompression,
    TensorRole,
)
from potluck.compression.floating import BFloat16Compression, Float16Compression, ScaledFloat16Compression
from potluck.compression.message import SerializedTensor
from potluck.compression.quantization import (
    Blockwise4BitQuantization,
    BlockwiseQuantization,
    Quantile8BitQuantization,
    Uniform8BitQuantization,
)
from potluck.compression.serialization import (
    deserialize_tensor_stream,
    deserialize_torch_tensor,
    serialize_torch_tensor,
)

__all__ = [
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
]
