//! Sans-I/O. Who can connect to whom, and how.

use crate::NatClass;
use potluck_net::Path;

/// How `dialer` gets through to `target`, if a relay can be found for the ways that need one.
///
/// A full cone counts as dialable: its one mapping is known to everybody once the peer has talked to anybody.
pub(crate) fn way(dialer: NatClass, target: NatClass) -> Path {
    use NatClass::{FullCone, Open, PortRestricted, Symmetric};
    let dialable = |class| matches!(class, Open | FullCone);
    match (dialer, target) {
        (_, target) if dialable(target) => Path::Direct,
        // The relay tells the target to dial back: what libp2p's DCUtR does first.
        (dialer, _) if dialable(dialer) => Path::HolePunched,
        (PortRestricted, PortRestricted) => Path::HolePunched,
        // One side's port cannot be foreseen and the other side insists on it, or a firewall drops the punch.
        (PortRestricted | Symmetric | NatClass::OutboundOnly, _) | (Open | FullCone, _) => Path::Relayed,
    }
}

/// Whether this way needs a relay, if only to agree on the punch.
pub(crate) fn needs_relay(path: Path) -> bool {
    path != Path::Direct
}

#[cfg(test)]
mod tests {
    use super::*;
    use NatClass::{FullCone, Open, OutboundOnly, PortRestricted, Symmetric};

    #[test]
    fn every_pair_has_the_way_that_real_nats_allow() {
        let (d, p, r) = (Path::Direct, Path::HolePunched, Path::Relayed);
        let classes = [Open, FullCone, PortRestricted, Symmetric, OutboundOnly];
        let expected = [[d, d, p, p, p], [d, d, p, p, p], [d, d, p, r, r], [d, d, r, r, r], [d, d, r, r, r]];
        for (dialer, row) in classes.into_iter().zip(expected) {
            for (target, path) in classes.into_iter().zip(row) {
                assert_eq!(way(dialer, target), path, "{dialer:?} -> {target:?}");
            }
        }
    }
}
