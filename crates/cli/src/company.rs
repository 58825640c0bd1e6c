//! Whether a node has company. One that has lost everybody says so loudly, and dials those again whom it knew: they may
//! have no address of it left, or none that they can dial.

use futures::future::join_all;
use potluck_net::{PeerId, Protocol, Transport};
use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::Instant;

/// How often it looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A connection that breaks is often there again in a moment.
const ALONE_AFTER: Duration = Duration::from_secs(3);
/// A node is there before the others are.
const NOBODY_AFTER: Duration = Duration::from_secs(60);
const DIAL_FIRST: Duration = Duration::from_secs(2);
const DIAL_MAX: Duration = Duration::from_secs(60);
/// Peers that are dialled again: the last ones that were connected.
const KNOWN_MAX: usize = 32;

/// What is to be done.
#[derive(Debug, PartialEq)]
enum Act {
    Tell(String),
    Dial(Vec<PeerId>),
}

/// Sans-I/O: what was seen, and what follows.
struct Company {
    /// Whether the node was told whom to join; then how that goes is said elsewhere.
    joins: bool,
    /// Whoever was connected last comes last.
    known: VecDeque<PeerId>,
    alone_since: Option<Instant>,
    told: bool,
    dial_at: Option<Instant>,
    pause: Duration,
}

impl Company {
    fn new(joins: bool) -> Self {
        let pause = DIAL_FIRST;
        Self { joins, known: VecDeque::new(), alone_since: None, told: false, dial_at: None, pause }
    }

    fn look(&mut self, now: Instant, connected: &[PeerId]) -> Vec<Act> {
        if connected.is_empty() {
            return self.alone(now);
        }
        let before = self.known.len();
        self.known.retain(|peer| !connected.contains(peer));
        self.known.extend(connected.iter().take(KNOWN_MAX));
        let first = before == 0 && !self.joins;
        let over = self.known.len().saturating_sub(KNOWN_MAX);
        self.known.drain(..over);
        (self.alone_since, self.dial_at, self.pause) = (None, None, DIAL_FIRST);
        if first && !self.told {
            return vec![Act::Tell("somebody has come".to_owned())];
        }
        if std::mem::take(&mut self.told) {
            let peers = if connected.len() == 1 { "1 peer is" } else { "others are" };
            return vec![Act::Tell(format!("not alone any more: {peers} connected"))];
        }
        Vec::new()
    }

    fn alone(&mut self, now: Instant) -> Vec<Act> {
        let since = *self.alone_since.get_or_insert(now);
        let nobody_yet = self.known.is_empty();
        let patience = if nobody_yet { NOBODY_AFTER } else { ALONE_AFTER };
        if now < since + patience || (nobody_yet && self.joins) {
            return Vec::new();
        }
        let mut acts = Vec::new();
        if !std::mem::replace(&mut self.told, true) {
            acts.push(Act::Tell(if nobody_yet {
                "ALONE: nobody has come yet; `potluck doctor TOKEN` on another machine says whether it gets here"
                    .to_owned()
            } else {
                let known = self.known.len();
                format!(
                    "ALONE: every other peer is gone; dialling the last {known} of them, check this machine's network"
                )
            }));
        }
        if !nobody_yet && self.dial_at.is_none_or(|at| now >= at) {
            self.dial_at = Some(now + self.pause);
            self.pause = (self.pause * 2).min(DIAL_MAX);
            acts.push(Act::Dial(self.known.iter().copied().collect()));
        }
        acts
    }
}

/// Keep looking, for ever.
pub(crate) async fn keep(transport: &dyn Transport, joins: bool) {
    let mut company = Company::new(joins);
    loop {
        for act in company.look(Instant::now(), &transport.connected()) {
            match act {
                Act::Tell(text) => eprintln!("potluck: {text}"),
                Act::Dial(peers) => dial(transport, peers).await,
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// All at once; the first who answers ends it.
async fn dial(transport: &dyn Transport, peers: Vec<PeerId>) {
    let reach = |peer| async move {
        // Whether it speaks this is all the same: what counts is the connection.
        let opened = transport.open(peer, Protocol::new(crate::probe::PROTOCOL)).await;
        if transport.path(peer).is_none()
            && let Err(error) = opened
        {
            tracing::debug!(target: "potluck::net", %error, "a peer of before is still gone");
        }
    };
    let somebody = async {
        while transport.connected().is_empty() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    tokio::select! {
        _ = join_all(peers.into_iter().map(reach)) => {}
        () = somebody => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peers(count: u8) -> Vec<PeerId> {
        (1..=count).map(|seed| PeerId::from_ed25519(&[seed; 32])).collect()
    }

    #[test]
    fn who_has_lost_everybody_says_so_once_and_dials_less_and_less_often() {
        let (start, mut company) = (Instant::now(), Company::new(true));
        assert_eq!(company.look(start, &peers(2)), []);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(company.look(at(1), &[]), [], "it may be back in a moment");
        let acts = company.look(at(4), &[]);
        assert!(
            matches!(&acts[0], Act::Tell(text) if text.starts_with("ALONE: every other peer")),
            "{acts:?}"
        );
        assert_eq!(acts[1], Act::Dial(peers(2)));
        let dials = (5..200).filter(|second| !company.look(at(*second), &[]).is_empty()).count();
        assert!((4..9).contains(&dials), "{dials} times in 200 s");
        assert_eq!(
            company.look(at(201), &peers(1)),
            [Act::Tell("not alone any more: 1 peer is connected".into())]
        );
        assert_eq!(company.look(at(202), &peers(1)), []);
        assert_eq!(company.look(at(203), &[]), []);
        let again = company.look(at(207), &[]);
        assert_eq!(again.last(), Some(&Act::Dial(vec![peers(2)[1], peers(1)[0]])), "the last one comes last");
    }

    #[test]
    fn nobody_yet_is_said_by_those_who_wait_and_not_by_those_who_join() {
        let (start, later) = (Instant::now(), Instant::now() + Duration::from_secs(100));
        for (joins, said) in [(false, 1), (true, 0)] {
            let mut company = Company::new(joins);
            assert_eq!(company.look(start, &[]), []);
            assert_eq!(company.look(later, &[]).len(), said, "joins: {joins}");
            assert_eq!(company.look(later, &[]), []);
        }
    }

    #[test]
    fn the_first_who_comes_is_announced() {
        let mut company = Company::new(false);
        assert_eq!(company.look(Instant::now(), &peers(1)), [Act::Tell("somebody has come".into())]);
        assert_eq!(company.look(Instant::now(), &peers(2)), []);
    }

    #[test]
    fn only_the_last_peers_are_remembered() {
        let mut company = Company::new(false);
        for peer in peers(200) {
            company.look(Instant::now(), &[peer]);
        }
        assert_eq!(company.known.len(), KNOWN_MAX);
        assert_eq!(company.known.back(), peers(200).last());
    }
}
