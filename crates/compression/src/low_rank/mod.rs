//! Low-rank compression.
