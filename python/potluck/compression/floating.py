"""Schemes that send 16-bit floats."""

from __future__ import annotations

from potluck.compression.base import CompressionType, FixedCompression


class Float16Compression(FixedCompression):
    """IEEE half precision, clamped to its range."""

    compression_type = CompressionType.FLOAT16


class ScaledFloat16Compression(FixedCompression):
    """Half precision after subtracting the mean and dividing by the deviation of the last axis."""

    compression_type = CompressionType.MEANSTD_16BIT


class BFloat16Compression(FixedCompression):
    """The upper half of a float32: its range, 8 bits of precision. Not known to hivemind peers."""

    compression_type = CompressionType.BFLOAT16
