"""Schemes that send 8 or 4 bits per value."""

from __future__ import annotations

from potluck.compression.base import CompressionType, FixedCompression


class Uniform8BitQuantization(FixedCompression):
    """256 equally wide buckets over six standard deviations; each decodes to the mean of its values."""

    compression_type = CompressionType.UNIFORM_8BIT


class Quantile8BitQuantization(FixedCompression):
    """256 equally full buckets; each decodes to the mean of its values."""

    compression_type = CompressionType.QUANTILE_8BIT


class BlockwiseQuantization(FixedCompression):
    """Blocks of 4096 values, each scaled by its largest magnitude, on a codebook that is finest near zero."""

    compression_type = CompressionType.BLOCKWISE_8BIT


class Blockwise4BitQuantization(FixedCompression):
    """Blocks of 64 values, each scaled by its largest magnitude, on 16 levels. Not known to hivemind peers."""

    compression_type = CompressionType.BLOCKWISE_4BIT
