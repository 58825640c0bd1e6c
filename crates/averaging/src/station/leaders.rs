//! Sans-I/O. Who must hear at once that a peer begins an epoch.

use super::Station;
use crate::view::View;
use potluck_net::PeerId;

/// Peers of a group, in the order of coordinators, that hear at once who begins an epoch: the first, and who takes over
/// from it. Others hear it with the next heartbeat.
const LEADERS: usize = 2;

impl Station {
    /// The first of the group that could coordinate the round of an epoch, or the next one of the same group: as it begins,
    /// what they know of us is from this one.
    pub(crate) fn leaders(&mut self, view: &View, epoch: u64) -> Vec<PeerId> {
        let takes_part = |peer: &&PeerId| view.members.get(peer).is_some_and(|member| member.ready);
        let mut first = |epoch| -> Vec<PeerId> {
            self.group(view, Some(epoch)).iter().filter(takes_part).take(LEADERS).copied().collect()
        };
        let mut leaders = first(epoch.saturating_add(2));
        leaders.extend(first(epoch));
        leaders
    }
}
