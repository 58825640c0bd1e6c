//! Invariant 9. No wall clock decides anything: with clocks up to an hour apart, a run is frame for frame what it is with
//! clocks that agree.

use potluck_net_sim::TraceName;

pub(super) fn check(apart: &TraceName, together: &TraceName) -> Vec<String> {
    let frames = |trace: &TraceName| format!("{} lines, hash {}", trace.total, trace.hash);
    let differs = format!("{} with clocks apart, {} with equal ones", frames(apart), frames(together));
    if apart == together { Vec::new() } else { vec![differs] }
}
