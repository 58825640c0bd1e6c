//! What goes out over control streams.

use super::{BEAT_PAUSE, Inner, State};
use crate::membership::Audience;
use crate::wire::{self, Control, RoundMessage};
use bytes::Bytes;
use potluck_net::PeerId;
use tokio::time::Instant;

impl Inner {
    /// To those of these peers to whom there is a control stream. What must arrive is repeated by its sender.
    pub(crate) fn send_round(&self, peers: &[PeerId], channel: &str, message: &RoundMessage) {
        if peers.is_empty() {
            return;
        }
        let frame = wire::encode_round(channel, message);
        let state = self.lock();
        peers.iter().for_each(|peer| state.send_frame(*peer, frame.clone()));
    }
}

impl State {
    pub(super) fn send(&self, peer: PeerId, message: &Control) {
        if self.links.contains_key(&peer) {
            self.send_frame(peer, wire::encode_control(message));
        }
    }

    fn send_frame(&self, peer: PeerId, frame: Bytes) {
        if let Some(link) = self.links.get(&peer).and_then(|links| links.first()) {
            let _full_or_gone = link.sender.try_send(frame);
        }
    }

    pub(super) fn send_beats(&mut self, now: Instant) {
        self.beat_due = None;
        self.last_beat = now;
        if self.membership.is_leaving() {
            return;
        }
        let (pulse, news, audience) = self.membership.next_beat(self.links.len());
        self.beat_due = self.membership.has_more_to_tell().then_some(now + BEAT_PAUSE);
        let incarnation = self.membership.incarnation();
        let frame = wire::encode_control(&Control::Beat { incarnation, pulse, news });
        let leads = self.leaders.as_ref().map(|leaders| leaders.contains(&self.membership.me()));
        for (at, (peer, links)) in self.links.iter().enumerate() {
            let hears = match audience {
                Audience::Everybody => true,
                Audience::Round(round) => {
                    leads.is_none_or(|leads| {
                        leads || self.leaders.iter().flatten().any(|leader| leader == peer)
                    }) && self.membership.meets(peer, round)
                }
                Audience::EveryNth { nth, first } => at % nth == first,
            };
            if let Some(link) = links.first().filter(|_| hears) {
                let _full_or_gone = link.sender.try_send(frame.clone());
            }
        }
    }
}
