//! Sans-I/O. Who is in the run: what heartbeats and gossip say, with incarnations that settle contradictions.
//!
//! A statement about a peer is ordered by `(incarnation, standing)`: at the same incarnation "dead" beats "alive", and
//! only the peer itself raises its incarnation, which is how a peer that was given up wrongly comes back.

mod company;
mod gossip;

use crate::detector::{Detector, HEARTBEAT, Opinion};
use crate::grid::{Mesh, Place};
use crate::twin::{OwnTwin, Twin};
use crate::view::Member;
use crate::wire::{Hello, News, Progress, Pulse, Standing};
use potluck_net::{Path, PeerId, Reachability};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

/// Links that news of others goes to at once in a large swarm.
const FANOUT: usize = 8;
/// Peers remembered at most, alive or not.
const PEERS_MAX: usize = 4096;
/// Of these, peers that are gone, the last ones: in a run that goes on for months, most peers that ever came.
const GONE_MAX: usize = 256;
/// Whoever is gone for less than this is remembered in any case: somebody may still believe it alive, and say so.
const GONE_FOR: Duration = Duration::from_secs(300);
/// A peer without a link of ours is dropped when no heartbeat of it was relayed for this long.
const RELAYED_SILENCE_MAX: Duration = Duration::from_secs(30);
/// Between attempts to reach a peer that was given up: partitions heal.
const RETRY: Duration = Duration::from_secs(5);

/// To whom a heartbeat goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Audience {
    Everybody,
    /// In a large swarm, what we report of ourselves and cannot wait is for those who average with us in this round.
    Round(u64),
    /// News of others goes to every so-many-th link, beginning with one that differs from time to time: each of them
    /// tells it on, and everybody hears it often enough.
    EveryNth {
        nth: usize,
        first: usize,
    },
}

/// What the driver shall do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    Connect(PeerId),
    Ask {
        of: PeerId,
        about: PeerId,
    },
    /// Tell a newcomer of those whom we got to know since then; of everybody.
    Introduce(PeerId, Option<Instant>),
    /// Close the control streams to this peer: neither side needs them.
    Release(PeerId),
    /// Send a heartbeat to everybody now.
    Beat,
    AddAddresses(PeerId, Vec<String>),
}

#[derive(Debug, Clone)]
struct Entry {
    place: Place,
    standing: Standing,
    incarnation: u64,
    pulse: Pulse,
    addresses: Vec<String>,
    detector: Detector,
    twin: Twin,
    twice: bool,
    linked: bool,
    /// Since when, or since when not.
    linked_at: Instant,
    /// How we are connected to it, and when to look again.
    path: (Option<Path>, Instant),
    /// Since when we believe it to be alive; or gone.
    since: Instant,
    /// When its newest heartbeat came, directly or relayed.
    pulse_at: Instant,
    connect_at: Instant,
    /// It was looked for since it was given up.
    sought: bool,
    /// Heartbeats that shall still carry this item first.
    fresh: u8,
    /// It is in `reported`.
    reported: bool,
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
    /// The next heartbeat is not only for what has just changed.
    regular: bool,
    /// It says something of ourselves that cannot wait.
    urgent: bool,
    /// When the first of the peers may become suspect or dead, or earlier.
    next_look: Instant,
    cursor: Option<PeerId>,
    mesh: Mesh,
    /// Whom this message made known.
    newcomers: Vec<PeerId>,
    /// To whom we introduced everybody when, and since when we have nothing to add.
    introduced: BTreeMap<PeerId, (Instant, Instant)>,
    /// Peers with news that the next heartbeats carry first.
    fresh: BTreeSet<PeerId>,
    /// Peers of which the view must be made anew, ourselves included.
    changed: BTreeSet<PeerId>,
    /// Peers with whom we do not average and of whom only reports are newer than the view: made anew when somebody looks.
    reported: BTreeSet<PeerId>,
    /// How many of them were gone at the last heartbeat.
    gone: usize,
    /// When one of those who are gone may be looked for again.
    next_search: Instant,
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
            regular: true,
            urgent: false,
            next_look: now,
            // Not where all others begin.
            cursor: Some(me),
            newcomers: Vec::new(),
            introduced: BTreeMap::new(),
            mesh: Mesh::new(me, mesh_max),
            fresh: BTreeSet::new(),
            changed: BTreeSet::from([me]),
            reported: BTreeSet::new(),
            gone: 0,
            next_search: now,
            leaving: false,
        }
    }

    pub(crate) fn me(&self) -> PeerId {
        self.me
    }

    pub(crate) fn is_large(&self) -> bool {
        self.mesh.is_large()
    }

    /// Whether something of ourselves that cannot wait is still to be told.
    pub(crate) fn is_urgent(&self) -> bool {
        self.urgent
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
            self.urgent = true;
            actions.push(Action::Beat);
        }
        self.changed.insert(self.me);
    }

    /// As [`Self::report`], and the others are told at once.
    pub(crate) fn report_now(&mut self, progress: Progress, actions: &mut Vec<Action>) {
        self.report(progress, actions);
        self.urgent = true;
        actions.push(Action::Beat);
    }

    pub(crate) fn measured(&mut self, up: f64, down: f64, reachability: Reachability) {
        let measured = (up, down, reachability);
        if (self.pulse.up, self.pulse.down, self.pulse.reachability) != measured {
            (self.pulse.up, self.pulse.down, self.pulse.reachability) = measured;
            self.changed.insert(self.me);
        }
    }

    fn entry(&mut self, now: Instant, peer: PeerId) -> Option<&mut Entry> {
        if peer == self.me || (self.peers.len() >= PEERS_MAX && !self.peers.contains_key(&peer)) {
            return None;
        }
        Some(self.peers.entry(peer).or_insert_with(|| Entry {
            place: Place::of(peer),
            standing: Standing::Dead,
            incarnation: 0,
            pulse: Pulse::default(),
            addresses: Vec::new(),
            detector: Detector::new(now),
            twin: Twin::default(),
            twice: false,
            linked: false,
            linked_at: now,
            since: now,
            path: (None, now),
            pulse_at: now,
            connect_at: now,
            sought: false,
            fresh: 0,
            reported: false,
        }))
    }

    /// A control stream to the peer stands and it has said hello.
    pub(crate) fn linked(&mut self, now: Instant, peer: PeerId, hello: Hello, actions: &mut Vec<Action>) {
        let Hello { incarnation, addresses, pulse, peers, .. } = hello;
        let Some(entry) = self.entry(now, peer) else { return };
        (entry.linked, entry.linked_at, entry.path) = (true, now, (None, now));
        actions.push(Action::AddAddresses(peer, addresses.clone()));
        entry.addresses = addresses;
        let wakeup = entry.detector.next_wakeup();
        self.next_look = self.next_look.min(wakeup);
        self.changed.insert(peer);
        self.beat(now, peer, incarnation, pulse, actions);
        match self.mesh.is_large() {
            false => actions.push(Action::Beat),
            true if (peers as usize) < self.mesh.alive() / 2 => {
                actions.push(Action::Introduce(peer, None));
                self.introduced.insert(peer, (now, now));
            }
            // It knows as much as we do, and what is fresh is told anyway.
            true => {}
        }
    }

    pub(crate) fn unlinked(&mut self, now: Instant, peer: PeerId, actions: &mut Vec<Action>) {
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        (entry.linked, entry.linked_at) = (false, now);
        self.changed.insert(peer);
        // Who needs no link has no reason to miss it: those who do will say if the peer is gone.
        if entry.standing == Standing::Alive && self.mesh.wants(&peer, &entry.place) {
            entry.detector.link_broke(now);
            self.next_look = self.next_look.min(entry.detector.next_wakeup());
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
                self.changed.insert(peer);
            }
            if entry.pulse.process != pulse.process {
                // Its predecessor counted its heartbeats higher.
                entry.pulse.sequence = 0;
            }
        }
        self.hear_of(now, peer, incarnation, Standing::Alive, Some(pulse), true, actions);
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        entry.detector.heard(now);
        let given_up = entry.standing != Standing::Alive && entry.incarnation >= incarnation;
        if given_up || entry.incarnation > incarnation {
            // It does not know that it was given up, or that it has lived before and came back before anybody missed it:
            // the news in our heartbeat makes it raise its incarnation.
            entry.fresh = 3;
            self.fresh.insert(peer);
            actions.push(Action::Beat);
        }
    }

    /// What a peer says of another one; `spread`: to be told on.
    pub(crate) fn news(&mut self, now: Instant, news: News, spread: bool, actions: &mut Vec<Action>) {
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
                self.changed.insert(self.me);
            }
            return;
        }
        let Some(news) = self.only_newer(now, news).filter(|news| !self.is_past(news)) else { return };
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
        self.hear_of(now, news.peer, news.incarnation, news.standing, news.beat, spread, actions);
        if let Some(entry) = self.peers.get_mut(&news.peer)
            && entry.addresses.is_empty()
        {
            entry.addresses = news.addresses;
        }
    }

    /// In a large swarm most news is known but for a newer pulse, which is taken in here. The rest, if there is any.
    fn only_newer(&mut self, now: Instant, mut news: News) -> Option<News> {
        let Some(entry) = self.peers.get_mut(&news.peer) else { return Some(news) };
        let same_life = news.beat.as_ref().is_none_or(|beat| beat.process == entry.pulse.process);
        if (news.incarnation, news.standing) != (entry.incarnation, entry.standing) || !same_life {
            return Some(news);
        }
        if let Some(pulse) = news.beat.take_if(|beat| beat.sequence > entry.pulse.sequence) {
            (entry.pulse, entry.pulse_at) = (pulse, now);
            if self.mesh.wants(&news.peer, &entry.place) {
                self.changed.insert(news.peer);
            } else if !std::mem::replace(&mut entry.reported, true) {
                self.reported.insert(news.peer);
            }
        }
        let told = news.addresses.is_empty() || entry.addresses == news.addresses;
        (!told).then_some(news)
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of a statement")]
    fn hear_of(
        &mut self,
        now: Instant,
        peer: PeerId,
        incarnation: u64,
        standing: Standing,
        pulse: Option<Pulse>,
        spread: bool,
        actions: &mut Vec<Action>,
    ) {
        let mut unlinked = false;
        // In a large swarm a link to everybody who tells it on would carry the same news over and over.
        let repeats = if self.mesh.is_large() { 1 } else { 4 };
        let Some(entry) = self.entry(now, peer) else { return };
        if (incarnation, standing) > (entry.incarnation, entry.standing) || entry.incarnation == 0 {
            let was_alive = entry.standing == Standing::Alive && entry.incarnation > 0;
            (entry.incarnation, entry.standing) = (incarnation, standing);
            entry.fresh = if spread { repeats } else { 0 };
            let is_alive = standing == Standing::Alive;
            if is_alive != was_alive {
                (entry.since, entry.sought) = (now, false);
            }
            if is_alive && !was_alive {
                entry.detector = Detector::new(now);
                entry.connect_at = now + RETRY;
                unlinked = !entry.linked;
            }
            let wakeup = entry.detector.next_wakeup();
            self.next_look = self.next_look.min(wakeup);
            self.changed.insert(peer);
            if unlinked {
                self.newcomers.push(peer);
            }
            if spread {
                self.fresh.insert(peer);
                actions.push(Action::Beat);
            }
            match (was_alive, is_alive) {
                (false, true) => self.mesh.count(self.mesh.alive() + 1),
                (true, false) => self.mesh.count(self.mesh.alive().saturating_sub(1)),
                _ => {}
            }
        } else if incarnation < entry.incarnation {
            return;
        }
        let Some(entry) = self.peers.get_mut(&peer) else { return };
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
            self.changed.insert(peer);
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
        self.hear_of(now, peer, incarnation, Standing::Left, None, true, actions);
    }

    pub(crate) fn has_left(&self, peer: &PeerId) -> bool {
        self.peers.get(peer).is_some_and(|entry| entry.standing == Standing::Left)
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

    pub(crate) fn tick(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if now >= self.next_beat {
            self.next_beat = now + HEARTBEAT;
            self.regular = true;
            actions.push(Action::Beat);
            let alive = self.peers.iter().filter(|(_, entry)| entry.standing == Standing::Alive);
            self.mesh.renew(alive.map(|(peer, entry)| (peer, &entry.place)));
            self.introduce_more(now, actions);
            self.release_needless(now, actions);
            self.connect_missing(now, actions);
        }
        // Before, nobody's silence is long enough.
        if now >= self.next_look {
            self.look(now, actions);
        }
    }

    /// Who has been silent for too long.
    fn look(&mut self, now: Instant, actions: &mut Vec<Action>) {
        let (mut suspects, mut dead) = (Vec::new(), Vec::new());
        self.next_look = now + HEARTBEAT;
        for (peer, entry) in self.peers.iter_mut().filter(|(_, e)| e.standing == Standing::Alive) {
            if !entry.linked && !self.mesh.wants(peer, &entry.place) {
                if now >= entry.pulse_at + RELAYED_SILENCE_MAX {
                    dead.push(*peer);
                }
                continue;
            }
            match entry.detector.judge(now) {
                Opinion::Fine => {}
                Opinion::Ask => {
                    entry.connect_at = now + RETRY;
                    actions.push(Action::Connect(*peer));
                    suspects.push(*peer);
                }
                Opinion::Dead => dead.push(*peer),
            }
            self.next_look = self.next_look.min(entry.detector.next_wakeup());
        }
        for about in suspects {
            let helpers = self.peers.iter().filter(|(_, e)| e.linked && e.standing == Standing::Alive);
            let helpers = helpers.map(|(of, _)| *of).filter(|of| *of != about).take(2);
            actions.extend(helpers.map(|of| Action::Ask { of, about }));
        }
        for peer in dead {
            self.bury(now, peer, actions);
        }
    }

    fn bury(&mut self, now: Instant, peer: PeerId, actions: &mut Vec<Action>) {
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        (entry.standing, entry.since, entry.sought) = (Standing::Dead, now, false);
        entry.connect_at = now + RETRY;
        entry.fresh = 4;
        self.mesh.count(self.mesh.alive().saturating_sub(1));
        self.fresh.insert(peer);
        self.changed.insert(peer);
        actions.push(Action::Beat);
    }

    pub(crate) fn next_wakeup(&self) -> Instant {
        self.next_beat.min(self.next_look)
    }

    /// What has changed in the view since the last call, with the `reports` of those whom no round of ours waits for or
    /// without; `None` is gone.
    pub(crate) fn take_changes(
        &mut self,
        now: Instant,
        reports: bool,
        path: impl Fn(PeerId) -> Option<Path>,
    ) -> Vec<(PeerId, Option<Member>)> {
        let mut changed = std::mem::take(&mut self.changed);
        // With other lines, others average with us: what is known of them was no concern of ours before.
        if reports || self.mesh.take_shift() {
            changed.append(&mut self.reported);
        }
        let mut now_of = |peer: PeerId| {
            if peer == self.me {
                let own = member(&self.pulse, self.incarnation, self.mesh.place(), None, true);
                return Some(Member { twice: self.twin.is_certain(now), ..own });
            }
            let entry = self.peers.get_mut(&peer)?;
            entry.reported = false;
            if entry.standing != Standing::Alive {
                return None;
            }
            if entry.linked && now >= entry.path.1 {
                entry.path = (path(peer), now + HEARTBEAT / 2);
            }
            let path = entry.path.0.filter(|_| entry.linked);
            let other = member(&entry.pulse, entry.incarnation, entry.place, path, false);
            Some(Member { twice: entry.twice, ..other })
        };
        changed.into_iter().map(|peer| (peer, now_of(peer))).collect()
    }

    pub(crate) fn has_changes(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Whether there are reports that no view shows yet.
    pub(crate) fn has_reports(&self) -> bool {
        !self.reported.is_empty()
    }
}

fn member(pulse: &Pulse, incarnation: u64, place: Place, path: Option<Path>, local: bool) -> Member {
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
        place,
    }
}
