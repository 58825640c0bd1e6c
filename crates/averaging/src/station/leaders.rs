//! Sans-I/O. Who must hear at once that a peer begins an epoch, and who hears that we wait as well.

use super::{Out, REPEAT, Station};
use crate::view::View;
use crate::wire::RoundMessage;
use potluck_net::PeerId;
use tokio::time::Instant;

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

    /// Who is ready learns that we are here and wait as well, so that nobody takes a coordinator that waits for others, or
    /// one that has just taken over, for silent: each has a patience of its own.
    pub(super) fn answer(&self, now: Instant, from: PeerId, out: &mut Out) {
        let Some(wish) = self.wish.as_ref().filter(|_| self.current.is_none()) else { return };
        let heard = self.ready.get(&from).map(|(at, _)| now >= *at + REPEAT / 2);
        // Most rounds begin before anybody asks twice.
        let is_due = heard.unwrap_or(self.coordinating.is_none());
        if is_due && self.asked.is_none_or(|(chosen, _, _)| chosen != from) {
            out.tell(from, RoundMessage::Ready(wish.ready.clone()));
        }
    }
}
