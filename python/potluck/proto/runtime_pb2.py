"""hivemind's ``runtime_pb2``: the tensor message and the numbers of the schemes."""

from potluck.compression.base import CompressionType
from potluck.compression.message import SerializedTensor as Tensor

NONE = CompressionType.NONE
MEANSTD_16BIT = CompressionType.MEANSTD_16BIT
FLOAT16 = CompressionType.FLOAT16
QUANTILE_8BIT = CompressionType.QUANTILE_8BIT
UNIFORM_8BIT = CompressionType.UNIFORM_8BIT
BLOCKWISE_8BIT = CompressionType.BLOCKWISE_8BIT

__all__ = [
    "BLOCKWISE_8BIT",
    "FLOAT16",
    "MEANSTD_16BIT",
    "NONE",
    "QUANTILE_8BIT",
    "UNIFORM_8BIT",
    "CompressionType",
    "Tensor",
]
