//! Sans-I/O. How far the epoch is, by the plain sum over live peers, and whether this peer has fallen behind.
//!
//! Nothing is extrapolated here: a peer that is gone counts nothing, and a live one what it last said.

use crate::Lineage;
use crate::dialect::{Offered, PeerView};
use crate::wire::Note;
use potluck_net::PeerId;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

/// A history of equal epoch that wins must be seen for so long before this peer reloads: a peer that has just
/// averaged its parameters is ahead of the others for the moment that the news takes (one heartbeat, and one spare).
const FORK_GRACE: Duration = Duration::from_secs(2);
/// How long what a peer says of its history counts nothing once its state could not be had or not be used; doubles with every
/// further time, up to `DOUBT_MAX`.
const DOUBT_MIN: Duration = Duration::from_secs(30);
const DOUBT_MAX: Duration = Duration::from_secs(600);
/// How much one observed step counts in the estimate of this peer's speed.
const RATE_GAIN: f32 = 0.3;

/// This peer's own samples.
#[derive(Debug, Clone)]
pub(crate) struct Own {
    /// Samples for the current epoch.
    pub(crate) samples: u64,
    /// Of these: already in a round that runs in the background.
    pub(crate) samples_under_way: u64,
    /// Calls with samples since the last epoch.
    pub(crate) steps: u32,
    pub(crate) samples_per_second: f32,
    /// `None`: unknown when the work on the next samples began.
    last_step: Option<Instant>,
}

impl Own {
    /// The first samples may have been computed before the run was joined, so how long they took is unknown.
    pub(crate) fn new() -> Self {
        Self { samples: 0, samples_under_way: 0, steps: 0, samples_per_second: 0.0, last_step: None }
    }

    pub(crate) fn add(&mut self, now: Instant, samples: u64) {
        let seconds = self.last_step.map_or(0.0, |before| now.duration_since(before).as_secs_f32());
        self.last_step = Some(now);
        if samples == 0 {
            return;
        }
        self.samples = self.samples.saturating_add(samples);
        self.steps = self.steps.saturating_add(1);
        if seconds > 0.0 {
            let rate = samples as f32 / seconds;
            let before = if self.samples_per_second > 0.0 { self.samples_per_second } else { rate };
            self.samples_per_second = before + RATE_GAIN * (rate - before);
        }
    }

    /// Time that was not spent on samples (a round) says nothing about speed.
    pub(crate) fn restart_clock(&mut self, now: Instant) {
        self.last_step = Some(now);
    }

    /// A download has ended. The next samples may have been computed before it, so how long they took is unknown.
    pub(crate) fn forget_clock(&mut self) {
        self.last_step = None;
    }

    /// The epoch ended with the samples that were in its round.
    pub(crate) fn end_epoch(&mut self) -> u64 {
        let used = if self.samples_under_way > 0 { self.samples_under_way } else { self.samples };
        self.samples = self.samples.saturating_sub(used);
        self.samples_under_way = 0;
        self.steps = 0;
        used
    }

    /// Samples for parameters that are no more.
    pub(crate) fn discard(&mut self) {
        self.samples = 0;
        self.samples_under_way = 0;
        self.steps = 0;
    }
}

/// Where the whole swarm is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Swarm {
    /// Samples of our epoch, over all live peers.
    pub(crate) samples: u64,
    /// Speed of all live peers together.
    pub(crate) samples_per_second: f32,
    /// Live peers, this one included.
    pub(crate) peers: usize,
}

pub(crate) fn sum<'a>(epoch: u64, own: &Own, peers: impl IntoIterator<Item = &'a PeerView>) -> Swarm {
    let mut swarm = Swarm { samples: own.samples, samples_per_second: own.samples_per_second, peers: 1 };
    for peer in peers {
        swarm.peers += 1;
        if peer.epoch == epoch {
            swarm.samples = swarm.samples.saturating_add(peer.samples);
        }
        swarm.samples_per_second += peer.samples_per_second.max(0.0);
    }
    swarm
}

/// Seconds until the target is in, at the speed of all; `None` if nobody is computing.
pub(crate) fn eta_seconds(swarm: &Swarm, target: u64) -> Option<f32> {
    let missing = target.saturating_sub(swarm.samples);
    if missing == 0 {
        return Some(0.0);
    }
    (swarm.samples_per_second > 0.0).then(|| missing as f32 / swarm.samples_per_second)
}

/// Notices that others are ahead or that another history has won.
#[derive(Debug, Default)]
pub(crate) struct Behind {
    fork_since: Option<Instant>,
    /// This peer has reason to think that its own history is the odd one: it has just joined, or its round failed.
    suspects_itself: bool,
    /// Until when nobody believes these peers, and the pause that it was.
    doubted: BTreeMap<PeerId, (Instant, Duration)>,
    /// What is expected of those whose state did not come when it was asked for.
    patience: BTreeMap<PeerId, Patience>,
}

/// A state that nobody offers is given up after so long, although somebody says that it is there ...
const UNSERVED_MAX: Duration = Duration::from_secs(20);
/// ... and one that breaks off, or is not what it was said to be, after so many attempts in a row ...
const BROKEN_MAX: u32 = 3;
/// ... that each had no more than this part of it more than the one before.
const PROGRESS_MIN: f32 = 0.05;
/// An attempt that is longer ago counts no more.
const PATIENCE_FOR: Duration = Duration::from_secs(600);

/// How often and for how long it was tried to load what one peer says that it has; whether in one call or in several.
#[derive(Debug)]
struct Patience {
    unserved_since: Option<Instant>,
    broken: u32,
    part: f32,
    last: Instant,
}

impl Patience {
    /// One more attempt has failed. Whether it was the last.
    fn is_over(&mut self, now: Instant, offered: Offered) -> bool {
        let since_last = now.duration_since(std::mem::replace(&mut self.last, now));
        match offered {
            Offered::Busy => false,
            Offered::No => {
                self.unserved_since.take_if(|_| since_last > UNSERVED_MAX);
                now.duration_since(*self.unserved_since.get_or_insert(now)) >= UNSERVED_MAX
            }
            Offered::Part(part) => {
                self.unserved_since = None;
                if part > self.part + PROGRESS_MIN {
                    (self.part, self.broken) = (part, 0);
                }
                self.broken += 1;
                self.broken >= BROKEN_MAX
            }
        }
    }
}

/// Why this peer must load the state of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Winner {
    pub(crate) peer: PeerId,
    pub(crate) lineage: Lineage,
}

impl Behind {
    pub(crate) fn suspect(&mut self) {
        self.suspects_itself = true;
    }

    pub(crate) fn trust(&mut self) {
        self.suspects_itself = false;
    }

    /// Another history was taken over. Its donor may have averaged the state meanwhile.
    pub(crate) fn start_anew(&mut self) {
        self.fork_since = None;
        self.suspects_itself = true;
    }

    /// The state of this history could not be had or not be used: whoever says that it has it is not believed for a while, or
    /// one peer that claims what it does not have would keep everybody from training.
    pub(crate) fn doubt(&mut self, now: Instant, winner: &Winner, peers: &[PeerView]) {
        self.doubted.retain(|_, (until, _)| now < *until + DOUBT_MAX);
        let says_so = |view: &&PeerView| {
            Note::decode(&view.note).is_some_and(|note| note.lineage.hash == winner.lineage.hash)
        };
        let mut who: BTreeSet<PeerId> = peers.iter().filter(says_so).map(|view| view.peer).collect();
        who.insert(winner.peer);
        for peer in who {
            let before = self.doubted.get(&peer);
            let pause = before.map_or(DOUBT_MIN, |(_, pause)| (*pause * 2).min(DOUBT_MAX));
            self.doubted.insert(peer, (now + pause, pause));
        }
    }

    /// The state of a winner did not come. Whether it is given up.
    pub(crate) fn failed(
        &mut self,
        now: Instant,
        winner: &Winner,
        offered: Offered,
        peers: &[PeerView],
    ) -> bool {
        self.patience.retain(|_, patience| now < patience.last + PATIENCE_FOR);
        let fresh = Patience { unserved_since: None, broken: 0, part: 0.0, last: now };
        let is_over = self.patience.entry(winner.peer).or_insert(fresh).is_over(now, offered);
        if is_over {
            self.patience.remove(&winner.peer);
            self.doubt(now, winner, peers);
        }
        is_over
    }

    /// A state has come.
    pub(crate) fn served(&mut self) {
        self.patience.clear();
    }

    /// Whether what this peer says of its history counts.
    pub(crate) fn believes(&self, now: Instant, peer: &PeerId) -> bool {
        self.doubted.get(peer).is_none_or(|(until, _)| now >= *until)
    }

    /// The best history that replaces ours, if it must be loaded now.
    pub(crate) fn check(&mut self, now: Instant, ours: &Lineage, peers: &[PeerView]) -> Option<Winner> {
        let others: Vec<(PeerId, Lineage)> = peers
            .iter()
            .filter(|view| self.believes(now, &view.peer))
            .filter_map(|view| Some((view, Note::decode(&view.note)?.lineage)))
            // Helpers and keepers take over the histories of others, late: only being ahead says anything.
            .filter(|(view, lineage)| !view.auxiliary || lineage.epoch > ours.epoch)
            .map(|(view, lineage)| (view.peer, lineage))
            .collect();
        self.notice_fork(now, ours, &others);
        let (peer, lineage) = others
            .into_iter()
            .filter(|(_, lineage)| lineage.beats(ours))
            .reduce(|best, next| if next.1.beats(&best.1) { next } else { best })?;
        if lineage.epoch > ours.epoch {
            return Some(Winner { peer, lineage });
        }
        let since = self.fork_since.unwrap_or(now);
        let sure = self.suspects_itself || now.duration_since(since) >= FORK_GRACE;
        sure.then_some(Winner { peer, lineage })
    }

    /// Only peers at our epoch are evidence: whoever is a round ahead or behind may well share our history.
    fn notice_fork(&mut self, now: Instant, ours: &Lineage, others: &[(PeerId, Lineage)]) {
        let mut level = others.iter().filter(|(_, lineage)| lineage.epoch == ours.epoch).peekable();
        if level.peek().is_none() {
            return;
        }
        if level.all(|(_, lineage)| lineage == ours) {
            self.fork_since = None;
        } else {
            self.fork_since.get_or_insert(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rates;

    fn peer(seed: u8, epoch: u64, samples: u64, lineage: Option<Lineage>) -> PeerView {
        let note = lineage.map(|lineage| {
            Note { lineage, contributed: 0, loss: None, state_due: None, sketch: None, waiting: None }
                .encode()
        });
        PeerView {
            peer: PeerId::from_ed25519(&[seed; 32]),
            epoch,
            samples,
            samples_per_second: 2.0,
            path: None,
            rates: Rates::default(),
            auxiliary: false,
            client: false,
            note: note.unwrap_or_default(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn progress_is_the_plain_sum_over_peers_of_our_epoch() {
        let mut own = Own::new();
        own.restart_clock(Instant::now());
        tokio::time::advance(Duration::from_secs(2)).await;
        own.add(Instant::now(), 8);
        let peers = [peer(1, 0, 10, None), peer(2, 1, 100, None), peer(3, 0, 5, None)];
        let swarm = sum(0, &own, &peers);
        assert_eq!((swarm.samples, swarm.peers), (23, 4));
        assert_eq!(swarm.samples_per_second, 10.0);
        assert_eq!(eta_seconds(&swarm, 43), Some(2.0));
        assert_eq!(eta_seconds(&swarm, 23), Some(0.0));
        let idle = Swarm { samples: 0, samples_per_second: 0.0, peers: 1 };
        assert_eq!(eta_seconds(&idle, 1), None);
    }

    #[tokio::test(start_paused = true)]
    async fn samples_that_waited_for_a_download_say_nothing_about_speed() {
        let mut own = Own::new();
        for download in 0..2 {
            // The batch was there before the join or the download: it is counted, and no speed is made of the moment since.
            tokio::time::advance(Duration::from_millis(1)).await;
            own.add(Instant::now(), 8);
            assert_eq!((own.samples, own.samples_per_second), (8 + 16 * download, 4.0 * download as f32));
            tokio::time::advance(Duration::from_secs(2)).await;
            own.add(Instant::now(), 8);
            assert_eq!((own.samples, own.samples_per_second), (16 + 16 * download, 4.0));
            own.forget_clock();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_higher_epoch_is_loaded_at_once_and_a_fork_after_a_moment() {
        let ours = Lineage::genesis("run", &[0; 32]).next_epoch(&[1; 32], 64);
        let fork = Lineage::genesis("run", &[0; 32]).next_epoch(&[2; 32], 65);
        let mut behind = Behind::default();
        let same = [peer(1, 1, 0, Some(ours)), peer(2, 1, 0, None)];
        assert_eq!(behind.check(Instant::now(), &ours, &same), None);
        let split = [peer(1, 1, 0, Some(fork))];
        assert_eq!(behind.check(Instant::now(), &ours, &split), None, "it may be about to reach us");
        tokio::time::advance(FORK_GRACE).await;
        let found = behind.check(Instant::now(), &ours, &split).unwrap();
        assert_eq!(found.lineage, fork);
        let mut doubtful = Behind::default();
        doubtful.suspect();
        assert!(doubtful.check(Instant::now(), &ours, &split).is_some(), "it knows that it is the odd one");
        let ahead = [peer(1, 1, 0, Some(fork)), peer(2, 2, 0, Some(ours.next_epoch(&[3; 32], 1)))];
        let found = behind.check(Instant::now(), &ours, &ahead).unwrap();
        assert_eq!(found.peer, ahead[1].peer);
        let winner = Lineage::genesis("run", &[0; 32]);
        assert_eq!(behind.check(Instant::now(), &ours, &[peer(1, 0, 0, Some(winner))]), None);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_has_not_what_it_claims_is_believed_ever_later() {
        let ours = Lineage::genesis("run", &[0; 32]);
        let (honest, claimed) =
            (ours.next_epoch(&[1; 32], 64), ours.next_epoch(&[2; 32], 64).next_epoch(&[3; 32], 64));
        let peers = [peer(1, 1, 0, Some(honest)), peer(2, 2, 0, Some(claimed)), peer(3, 2, 0, Some(claimed))];
        let mut behind = Behind::default();
        for pause in [30, 60, 120, 240, 480, 600, 600] {
            let winner = behind.check(Instant::now(), &ours, &peers).unwrap();
            assert_eq!(winner.lineage, claimed);
            behind.doubt(Instant::now(), &winner, &peers);
            let next = behind.check(Instant::now(), &ours, &peers).unwrap();
            assert_eq!(next.lineage, honest, "the best of what can be believed");
            behind.start_anew();
            assert_eq!(
                behind.check(Instant::now(), &honest, &peers),
                None,
                "a new history is no reason to believe them"
            );
            tokio::time::advance(Duration::from_secs(pause)).await;
        }
        tokio::time::advance(DOUBT_MAX).await;
        let stranger = Winner { peer: peers[0].peer, lineage: honest };
        behind.doubt(Instant::now(), &stranger, &peers);
        assert_eq!(behind.doubted.len(), 1, "old doubts are forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn samples_beside_a_round_belong_to_the_next_epoch() {
        let mut own = Own::new();
        own.add(Instant::now(), 8);
        own.samples_under_way = own.samples;
        own.add(Instant::now(), 3);
        assert_eq!(own.end_epoch(), 8);
        assert_eq!(own.samples, 3);
        assert_eq!(own.end_epoch(), 3);
        assert_eq!(own.samples, 0);
    }
}
