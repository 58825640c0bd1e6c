//! Who waits for a connection to whom, and how far that dial is. Sans-I/O: the driver does what this says.

use libp2p::Multiaddr;
use libp2p::kad::QueryId;
use potluck_net::PeerId;
use std::collections::BTreeMap;
use tokio::sync::oneshot;

type Reply = oneshot::Sender<Result<(), Vec<String>>>;

/// Lines of failure kept per dial.
const LINES_MAX: usize = 24;

#[derive(Default)]
struct Dial {
    waiting: Vec<Reply>,
    lines: Vec<String>,
    tried: Vec<Multiaddr>,
    looked_up: bool,
    query: Option<QueryId>,
    parked: bool,
}

/// The dials that callers wait for.
#[derive(Default)]
pub(crate) struct Dials {
    inner: BTreeMap<PeerId, Dial>,
}

impl Dials {
    /// Wait for a connection. True if this is the first to wait, so that somebody must dial.
    pub(crate) fn wait(&mut self, peer: PeerId, reply: Reply) -> bool {
        let first = !self.inner.contains_key(&peer);
        self.inner.entry(peer).or_default().waiting.push(reply);
        first
    }

    pub(crate) fn connected(&mut self, peer: PeerId) {
        self.finish(peer, |_| Ok(()));
    }

    /// Note a failure. True if somebody waits for this peer and no lookup is under way already.
    pub(crate) fn failed(&mut self, peer: PeerId, lines: impl Iterator<Item = String>) -> bool {
        let Some(dial) = self.inner.get_mut(&peer) else { return false };
        for line in lines {
            if !dial.lines.contains(&line) && dial.lines.len() < LINES_MAX {
                dial.lines.push(line);
            }
        }
        dial.query.is_none()
    }

    pub(crate) fn may_look_up(&self, peer: PeerId) -> bool {
        self.inner.get(&peer).is_some_and(|dial| !dial.looked_up)
    }

    pub(crate) fn looking_up(&mut self, peer: PeerId, query: QueryId) {
        if let Some(dial) = self.inner.get_mut(&peer) {
            dial.looked_up = true;
            dial.query = Some(query);
        }
    }

    /// These addresses are being dialled.
    pub(crate) fn trying(&mut self, peer: PeerId, addresses: &[Multiaddr]) {
        if let Some(dial) = self.inner.get_mut(&peer) {
            dial.tried = addresses.to_vec();
        }
    }

    /// The peer that a lookup was for, and where it has been looked for already.
    pub(crate) fn looked_up(&mut self, query: QueryId) -> Option<(PeerId, Vec<Multiaddr>)> {
        let (peer, dial) = self.inner.iter_mut().find(|(_, dial)| dial.query == Some(query))?;
        dial.query = None;
        Some((*peer, std::mem::take(&mut dial.tried)))
    }

    /// Nothing is known that has not been tried, but more may be learned soon.
    pub(crate) fn park(&mut self, peer: PeerId) {
        if let Some(dial) = self.inner.get_mut(&peer) {
            dial.parked = true;
        }
    }

    /// The parked dials, to be tried again from the start.
    pub(crate) fn unpark(&mut self) -> Vec<PeerId> {
        let parked = self.inner.iter_mut().filter(|(_, dial)| dial.parked);
        parked
            .map(|(peer, dial)| {
                dial.parked = false;
                dial.looked_up = false;
                *peer
            })
            .collect()
    }

    pub(crate) fn give_up(&mut self, peer: PeerId) {
        self.finish(peer, |lines| Err(lines.to_vec()));
    }

    /// Drop the dials that nobody waits for any more; a late result then finds nobody.
    pub(crate) fn forget_withdrawn(&mut self) {
        self.inner.retain(|_, dial| {
            dial.waiting.retain(|reply| !reply.is_closed());
            !dial.waiting.is_empty()
        });
    }

    fn finish(&mut self, peer: PeerId, result: impl Fn(&[String]) -> Result<(), Vec<String>>) {
        let Some(dial) = self.inner.remove(&peer) else { return };
        for reply in dial.waiting {
            // Whoever has given up gets no answer.
            let _gone = reply.send(result(&dial.lines));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_dial_serves_all_who_wait_and_the_lines_reach_them() {
        let peer = PeerId::from_ed25519(&[1; 32]);
        let mut dials = Dials::default();
        let (first, mut first_answer) = oneshot::channel();
        let (second, mut second_answer) = oneshot::channel();
        assert!(dials.wait(peer, first));
        assert!(!dials.wait(peer, second));
        assert!(dials.failed(peer, ["a: connect: refused".to_owned()].into_iter()));
        assert!(dials.may_look_up(peer));
        dials.give_up(peer);
        let lines = Err(vec!["a: connect: refused".to_owned()]);
        assert_eq!(first_answer.try_recv().unwrap(), lines);
        assert_eq!(second_answer.try_recv().unwrap(), lines);
        assert!(!dials.failed(peer, std::iter::empty()));
    }

    #[test]
    fn a_parked_dial_is_tried_again_from_the_start_once() {
        let peer = PeerId::from_ed25519(&[1; 32]);
        let mut dials = Dials::default();
        let (reply, mut answer) = oneshot::channel();
        dials.wait(peer, reply);
        assert!(dials.unpark().is_empty());
        if let Some(dial) = dials.inner.get_mut(&peer) {
            dial.looked_up = true;
        }
        dials.park(peer);
        assert!(answer.try_recv().is_err(), "nobody is told yet");
        assert_eq!(dials.unpark(), [peer]);
        assert!(dials.may_look_up(peer));
        assert!(dials.unpark().is_empty());
    }

    #[test]
    fn a_dial_that_nobody_waits_for_is_forgotten() {
        let peer = PeerId::from_ed25519(&[1; 32]);
        let mut dials = Dials::default();
        let (reply, answer) = oneshot::channel();
        dials.wait(peer, reply);
        drop(answer);
        dials.forget_withdrawn();
        let (reply, _answer) = oneshot::channel();
        assert!(dials.wait(peer, reply));
    }
}
