//! Sans-I/O. Who is in the run: what heartbeats and gossip say, with incarnations that settle contradictions.
//!
//! A statement about a peer is ordered by `(incarnation, standing)`: at the same incarnation "dead" beats "alive", and
//! only the peer itself raises its incarnation, which is how a peer that was given up wrongly comes back.

use crate::detector::{Detector, HEARTBEAT, Opinion};
use crate::twin::{OwnTwin, Twin};
use crate::wire::{News, Progress, Pulse, Standing};
use bytes::Bytes;
use potluck_net::{Path, PeerId, Reachability};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// News items in one heartbeat.
const NEWS_MAX: usize = 24;
/// Peers remembered at most, alive or not.
const PEERS_MAX: usize = 4096;
/// A peer without a link of ours is dropped when no heartbeat of it was relayed for this long.
const RELAYED_SILENCE_MAX: Duration = Duration::from_secs(30);
/// Between attempts to reach a peer that was given up: partitions heal.
const RETRY: Duration = Duration::from_secs(5);

/// One live peer, as everybody above this crate sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// The epoch that it works on.
    pub epoch: u64,
    /// Samples accumulated in it.
    pub samples: u64,
    /// Its speed.
    pub samples_per_second: f64,
    /// Whether it could take part in a round.
    pub ready: bool,
    /// Measured upload rate in bytes per second, 0 if unknown.
    pub up_bytes_per_second: f64,
    /// Measured download rate in bytes per second, 0 if unknown.
    pub down_bytes_per_second: f64,
    /// Whether others can dial it.
    pub reachability: Reachability,
    /// How we are connected to it.
    pub path: Option<Path>,
    /// How often it came back.
    pub incarnation: u64,
    /// Random at each start of its program.
    pub process: u32,
    /// Two processes speak under this identity: the file that holds it was copied.
    pub twice: bool,
    /// Helps reducing, has no vector.
    pub auxiliary: bool,
    /// Dials out only.
    pub client: bool,
    /// The layer above's payload.
    pub app: Bytes,
    /// Whether this is ourselves.
    pub local: bool,
}

/// Every live peer, ourselves included.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// The peers.
    pub members: BTreeMap<PeerId, Member>,
}

impl View {
    /// Samples of all live peers that work on this epoch: the plain sum, nothing is extrapolated.
    pub fn samples(&self, epoch: u64) -> u64 {
        self.members.values().filter(|m| m.epoch == epoch).map(|m| m.samples).sum()
    }

    /// The highest epoch that anybody works on.
    pub fn epoch_max(&self) -> u64 {
        self.members.values().map(|m| m.epoch).max().unwrap_or(0)
    }
}

/// What the driver shall do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    Connect(PeerId),
    Ask {
        of: PeerId,
        about: PeerId,
    },
    /// Send a heartbeat to everybody now.
    Beat,
    /// The set of live peers or their reports changed.
    Changed,
    AddAddresses(PeerId, Vec<String>),
}

#[derive(Debug, Clone)]
struct Entry {
    standing: Standing,
    incarnation: u64,
    pulse: Pulse,
    addresses: Vec<String>,
    detector: Detector,
    twin: Twin,
    twice: bool,
    linked: bool,
    /// When its newest heartbeat came, directly or relayed.
    pulse_at: Instant,
    connect_at: Instant,
    /// Heartbeats that shall still carry this item first.
    fresh: u8,
}

/// The table of peers.
#[derive(Debug)]
pub(crate) struct Membership {
    me: PeerId,
    incarnation: u64,
    pulse: Pulse,
    twin: OwnTwin,
    peers: BTreeMap<PeerId, Entry>,
    next_beat: Instant,
    cursor: Option<PeerId>,
    /// Decides which live peers we keep a link to.
    mesh_max: usize,
    /// We have said farewell: others now say rightly that we are gone.
    leaving: bool,
}

impl Membership {
    pub(crate) fn new(me: PeerId, pulse: Pulse, mesh_max: usize, now: Instant) -> Self {
        let twin = OwnTwin::new(now);
        Self {
            me,
            incarnation: 1,
            pulse,
            twin,
            peers: BTreeMap::new(),
            next_beat: now,
            cursor: None,
            mesh_max,
            leaving: false,
        }
    }

    pub(crate) fn incarnation(&self) -> u64 {
        self.incarnation
    }

    pub(crate) fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// Our own report changed. A new epoch or readiness is told at once; samples wait for the next heartbeat.
    pub(crate) fn report(&mut self, progress: Progress, actions: &mut Vec<Action>) {
        let before = std::mem::replace(&mut self.pulse.progress, progress);
        let now = &self.pulse.progress;
        if before.epoch != now.epoch || before.ready != now.ready {
            actions.push(Action::Beat);
        }
        actions.push(Action::Changed);
    }

    pub(crate) fn measured(&mut self, up: f64, down: f64, reachability: Reachability) {
        (self.pulse.up, self.pulse.down, self.pulse.reachability) = (up, down, reachability);
    }

    fn entry(&mut self, now: Instant, peer: PeerId) -> Option<&mut Entry> {
        if peer == self.me || (self.peers.len() >= PEERS_MAX && !self.peers.contains_key(&peer)) {
            return None;
        }
        Some(self.peers.entry(peer).or_insert_with(|| Entry {
            standing: Standing::Dead,
            incarnation: 0,
            pulse: Pulse::default(),
            addresses: Vec::new(),
            detector: Detector::new(now),
            twin: Twin::default(),
            twice: false,
            linked: false,
            pulse_at: now,
            connect_at: now,
            fresh: 0,
        }))
    }

    /// A control stream to the peer stands and it has said hello.
    pub(crate) fn linked(
        &mut self,
        now: Instant,
        peer: PeerId,
        incarnation: u64,
        pulse: Pulse,
        addresses: Vec<String>,
        actions: &mut Vec<Action>,
    ) {
        let Some(entry) = self.entry(now, peer) else { return };
        entry.linked = true;
        actions.push(Action::AddAddresses(peer, addresses.clone()));
        entry.addresses = addresses;
        self.beat(now, peer, incarnation, pulse, actions);
        actions.push(Action::Beat);
    }

    pub(crate) fn unlinked(&mut self, now: Instant, peer: PeerId, actions: &mut Vec<Action>) {
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        entry.linked = false;
        if entry.standing == Standing::Alive {
            entry.detector.link_broke(now);
            entry.connect_at = now + RETRY;
            actions.push(Action::Connect(peer));
        }
    }

    /// Any sign of life.
    pub(crate) fn heard(&mut self, now: Instant, peer: PeerId) {
        if let Some(entry) = self.peers.get_mut(&peer) {
            entry.detector.heard(now);
        }
    }

    /// A frame of a round.
    pub(crate) fn heard_bulk(&mut self, now: Instant, peer: PeerId) {
        if let Some(entry) = self.peers.get_mut(&peer) {
            entry.detector.heard_bulk(now);
        }
    }

    /// A heartbeat from the peer itself.
    pub(crate) fn beat(
        &mut self,
        now: Instant,
        peer: PeerId,
        incarnation: u64,
        pulse: Pulse,
        actions: &mut Vec<Action>,
    ) {
        if let Some(entry) = self.peers.get_mut(&peer) {
            entry.twin.follows(now, entry.pulse.process, pulse.process);
            let twice = entry.twin.is_certain(now);
            if std::mem::replace(&mut entry.twice, twice) != twice {
                actions.push(Action::Changed);
            }
            if entry.pulse.process != pulse.process {
                // Its predecessor counted its heartbeats higher.
                entry.pulse.sequence = 0;
            }
        }
        self.hear_of(now, peer, incarnation, Standing::Alive, Some(pulse), actions);
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        entry.detector.heard(now);
        let given_up = entry.standing != Standing::Alive && entry.incarnation >= incarnation;
        if given_up || entry.incarnation > incarnation {
            // It does not know that it was given up, or that it has lived before and came back before anybody missed it:
            // the news in our heartbeat makes it raise its incarnation.
            entry.fresh = 3;
            actions.push(Action::Beat);
        }
    }

    pub(crate) fn news(&mut self, now: Instant, news: News, actions: &mut Vec<Action>) {
        if news.peer == self.me {
            // Believed dead; or remembered from an earlier life, whose statements would outrank all that we say.
            if self.leaving {
                return;
            }
            let believed_dead = news.standing != Standing::Alive && news.incarnation >= self.incarnation;
            if believed_dead || news.incarnation > self.incarnation {
                self.incarnation = news.incarnation.saturating_add(1);
                actions.push(Action::Beat);
            }
            if let Some(beat) = news.beat.filter(|beat| beat.process != self.pulse.process) {
                self.twin.heard_of(now, beat.process, beat.sequence);
                actions.push(Action::Changed);
            }
            return;
        }
        if !news.addresses.is_empty() {
            actions.push(Action::AddAddresses(news.peer, news.addresses.clone()));
        }
        // A peer that was cut off itself believes everybody dead. What we hear from somebody counts for more; the one who
        // was declared dead hears of it as well and raises its incarnation.
        let heard =
            |entry: &Entry| entry.standing == Standing::Alive && entry.detector.is_heard(now, entry.linked);
        if news.standing == Standing::Dead && self.peers.get(&news.peer).is_some_and(heard) {
            return;
        }
        self.hear_of(now, news.peer, news.incarnation, news.standing, news.beat, actions);
        if let Some(entry) = self.peers.get_mut(&news.peer)
            && entry.addresses.is_empty()
        {
            entry.addresses = news.addresses;
        }
    }

    fn hear_of(
        &mut self,
        now: Instant,
        peer: PeerId,
        incarnation: u64,
        standing: Standing,
        pulse: Option<Pulse>,
        actions: &mut Vec<Action>,
    ) {
        let mut newcomer = false;
        let Some(entry) = self.entry(now, peer) else { return };
        if (incarnation, standing) > (entry.incarnation, entry.standing) || entry.incarnation == 0 {
            let was_alive = entry.standing == Standing::Alive && entry.incarnation > 0;
            (entry.incarnation, entry.standing) = (incarnation, standing);
            entry.fresh = 4;
            if standing == Standing::Alive && !was_alive {
                entry.detector = Detector::new(now);
                entry.connect_at = now + RETRY;
                newcomer = !entry.linked;
            }
            actions.push(Action::Beat);
            actions.push(Action::Changed);
        } else if incarnation < entry.incarnation {
            return;
        }
        // Of a restarted peer, what others relay counts only where it does not speak for itself.
        if let Some(pulse) = pulse
            && if pulse.process == entry.pulse.process || entry.linked {
                pulse.sequence > entry.pulse.sequence
            } else {
                true
            }
        {
            entry.pulse = pulse;
            entry.pulse_at = now;
            actions.push(Action::Changed);
        }
        if newcomer && self.neighbours().contains(&peer) {
            actions.push(Action::Connect(peer));
        }
    }

    /// We leave: from here on, nothing that we say may contradict it.
    pub(crate) fn leave(&mut self) {
        self.leaving = true;
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving
    }

    pub(crate) fn left(&mut self, now: Instant, peer: PeerId, actions: &mut Vec<Action>) {
        let incarnation = self.peers.get(&peer).map_or(1, |entry| entry.incarnation);
        self.hear_of(now, peer, incarnation, Standing::Left, None, actions);
    }

    pub(crate) fn vouched(&mut self, now: Instant, peer: PeerId, incarnation: u64, age: Duration) {
        if let Some(entry) = self.peers.get_mut(&peer)
            && entry.incarnation <= incarnation
        {
            entry.detector.vouched(now, age);
        }
    }

    /// What we can vouch for.
    pub(crate) fn last_heard(&self, now: Instant, peer: PeerId) -> Option<(u64, Duration)> {
        let entry = self.peers.get(&peer).filter(|e| e.standing == Standing::Alive && e.linked)?;
        Some((entry.incarnation, entry.detector.silence(now)))
    }

    /// Live peers that we want a control stream to: all, or in a large swarm those of our grid row and column and a few
    /// more.
    pub(crate) fn neighbours(&self) -> Vec<PeerId> {
        let alive = self.alive();
        if alive.len() < self.mesh_max {
            return alive;
        }
        crate::grid::neighbours(self.me, &alive, self.mesh_max)
    }

    fn alive(&self) -> Vec<PeerId> {
        self.peers.iter().filter(|(_, e)| e.standing == Standing::Alive).map(|(peer, _)| *peer).collect()
    }

    pub(crate) fn tick(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if now >= self.next_beat {
            self.next_beat = now + HEARTBEAT;
            actions.push(Action::Beat);
            self.connect_missing(now, actions);
        }
        let helpers: Vec<PeerId> = self
            .peers
            .iter()
            .filter(|(_, e)| e.linked && e.standing == Standing::Alive)
            .map(|(p, _)| *p)
            .collect();
        let neighbours = self.neighbours();
        for (peer, entry) in self.peers.iter_mut().filter(|(_, e)| e.standing == Standing::Alive) {
            let dead = if entry.linked || neighbours.binary_search(peer).is_ok() {
                match entry.detector.judge(now) {
                    Opinion::Fine => false,
                    Opinion::Ask => {
                        entry.connect_at = now + RETRY;
                        actions.push(Action::Connect(*peer));
                        let ask = helpers.iter().filter(|of| *of != peer).take(2);
                        actions.extend(ask.map(|of| Action::Ask { of: *of, about: *peer }));
                        false
                    }
                    Opinion::Dead => true,
                }
            } else {
                now >= entry.pulse_at + RELAYED_SILENCE_MAX
            };
            if dead {
                entry.standing = Standing::Dead;
                entry.fresh = 4;
                entry.connect_at = now + RETRY;
                actions.push(Action::Beat);
                actions.push(Action::Changed);
            }
        }
    }

    fn connect_missing(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let wanted = self.neighbours();
        let mut dead_tried = 0;
        for (peer, entry) in &mut self.peers {
            let try_it = match entry.standing {
                Standing::Alive => wanted.binary_search(peer).is_ok(),
                Standing::Dead => {
                    dead_tried += 1;
                    dead_tried <= 16
                }
                Standing::Left => false,
            };
            if try_it && !entry.linked && now >= entry.connect_at {
                entry.connect_at = now + RETRY;
                actions.push(Action::Connect(*peer));
            }
        }
    }

    pub(crate) fn next_wakeup(&self) -> Instant {
        // Exactly the peers that `tick` judges: a deadline that nobody acts on would never pass.
        let neighbours = self.neighbours();
        let judged = self.peers.iter().filter(|(peer, e)| {
            e.standing == Standing::Alive && (e.linked || neighbours.binary_search(peer).is_ok())
        });
        judged.map(|(_, e)| e.detector.next_wakeup()).fold(self.next_beat, Instant::min)
    }

    /// The next heartbeat.
    pub(crate) fn next_beat(&mut self) -> (u64, Pulse, Vec<News>) {
        self.pulse.sequence += 1;
        let news = self.gossip();
        (self.incarnation, self.pulse.clone(), news)
    }

    /// The news for one heartbeat: what is fresh, then the others in turn.
    fn gossip(&mut self) -> Vec<News> {
        let mut chosen: Vec<PeerId> = Vec::new();
        for (peer, entry) in self.peers.iter_mut().filter(|(_, e)| e.fresh > 0).take(NEWS_MAX) {
            entry.fresh -= 1;
            chosen.push(*peer);
        }
        let start = self.cursor.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let later: Vec<PeerId> = self
            .peers
            .range((start, std::ops::Bound::Unbounded))
            .map(|(peer, _)| *peer)
            .take(NEWS_MAX / 2)
            .collect();
        self.cursor = later.last().copied();
        for peer in later {
            if chosen.len() < NEWS_MAX && !chosen.contains(&peer) {
                chosen.push(peer);
            }
        }
        chosen.into_iter().filter_map(|peer| self.news_of(peer)).collect()
    }

    fn news_of(&self, peer: PeerId) -> Option<News> {
        let entry = self.peers.get(&peer).filter(|entry| entry.incarnation > 0)?;
        Some(News {
            peer,
            incarnation: entry.incarnation,
            standing: entry.standing,
            addresses: entry.addresses.clone(),
            beat: (entry.standing == Standing::Alive).then(|| entry.pulse.clone()),
        })
    }

    pub(crate) fn view(&self, now: Instant, path: impl Fn(PeerId) -> Option<Path>) -> View {
        let mut members: BTreeMap<PeerId, Member> = self
            .peers
            .iter()
            .filter(|(_, entry)| entry.standing == Standing::Alive)
            .map(|(peer, entry)| {
                let other = member(&entry.pulse, entry.incarnation, path(*peer), false);
                (*peer, Member { twice: entry.twice, ..other })
            })
            .collect();
        let own = member(&self.pulse, self.incarnation, None, true);
        members.insert(self.me, Member { twice: self.twin.is_certain(now), ..own });
        View { members }
    }
}

fn member(pulse: &Pulse, incarnation: u64, path: Option<Path>, local: bool) -> Member {
    Member {
        epoch: pulse.progress.epoch,
        samples: pulse.progress.samples,
        samples_per_second: pulse.progress.samples_per_second,
        ready: pulse.progress.ready,
        up_bytes_per_second: pulse.up,
        down_bytes_per_second: pulse.down,
        reachability: pulse.reachability,
        path,
        incarnation,
        process: pulse.process,
        twice: false,
        auxiliary: pulse.auxiliary,
        client: pulse.client,
        app: pulse.progress.app.clone(),
        local,
    }
}
