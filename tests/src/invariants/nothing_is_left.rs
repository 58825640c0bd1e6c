//! Invariant 7. When all sessions have ended, no stream is left.

pub(super) fn check(streams_left: usize) -> Vec<String> {
    if streams_left == 0 { Vec::new() } else { vec![format!("{streams_left} streams are left at the end")] }
}
