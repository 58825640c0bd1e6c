//! Codec benchmark.
fn main() {}
