//! Sans-I/O. Which chunk is asked of whom: a window for each donor that follows what it has to give, other newcomers before
//! donors, the rarest chunk first, and a second donor for a chunk whose first one has fallen silent.

use crate::download::FAILURES_MAX;
use crate::wire::{CHUNK_BYTES, Index, decode_bits};
use bytes::Bytes;
use potluck_net::{FaultKind, PeerFault, PeerId};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::time::Instant;

/// Chunks that are asked of one donor at the same time, at most: enough to fill a link of 100 ms at 100 MB/s.
pub(crate) const WINDOW_MAX: usize = 12;
/// A donor starts with this window: twenty newcomers at once must not ask it for everything twice over.
const WINDOW_START: usize = 2;
/// A chunk that takes less than this opens the donor's window by one; one that takes more than `SLOW` halves it.
const FAST: Duration = Duration::from_millis(400);
const SLOW: Duration = Duration::from_millis(1500);
/// How often joiners are asked which chunks they have got meanwhile.
pub(crate) const REFRESH: Duration = Duration::from_millis(500);
/// A chunk for which its donor takes longer than this, and `LATE_TIMES` as long as chunks take here, is asked of another
/// donor as well: links of very different speeds are normal, and what is asked twice may come twice.
const LATE: Duration = Duration::from_secs(5);
const LATE_TIMES: u32 = 4;
/// The same, when none has come yet.
const LATE_START: Duration = Duration::from_secs(30);
/// The rest of a state is given up when nobody has had any of it for so long: its last donor is gone, and those who are left
/// may have another one to offer.
const LOST_AFTER: Duration = Duration::from_secs(10);

/// What a donor has and how it does.
pub(crate) struct Donor {
    peer: PeerId,
    has: Vec<bool>,
    window: usize,
    pub(crate) failures: u32,
    pub(crate) asking: bool,
    pub(crate) asked: Instant,
}

/// A chunk that was asked of a donor.
struct Flight {
    peer: PeerId,
    chunk: usize,
    since: Instant,
    /// It was given to another donor as well.
    is_late: bool,
}

/// A download's state.
pub(crate) struct Work {
    pub(crate) donors: Vec<Donor>,
    /// To be asked; the last one is the next.
    missing: Vec<usize>,
    /// How many donors have each chunk.
    copies: Vec<usize>,
    /// Not here yet.
    pub(crate) wanted: BTreeSet<usize>,
    flights: Vec<Flight>,
    /// How long a chunk takes, over all donors; `None` before the first.
    usual: Option<Duration>,
    /// Since when nobody has what is missing.
    lost_since: Option<Instant>,
    faults: Vec<PeerFault>,
}

impl Work {
    /// The download of a snapshot of so many `chunks`, of which these are missing here.
    pub(crate) fn new(chunks: usize, missing: Vec<usize>, donors: Vec<Donor>) -> Self {
        let wanted = missing.iter().copied().collect();
        Self {
            donors,
            missing,
            copies: vec![0; chunks],
            wanted,
            flights: Vec::new(),
            usual: None,
            lost_since: None,
            faults: Vec::new(),
        }
    }

    fn donor(&mut self, peer: PeerId) -> Option<&mut Donor> {
        self.donors.iter_mut().find(|donor| donor.peer == peer)
    }

    /// Give each donor with room a missing chunk that it has, the one that fewest have: all that a donor sends before it dies is
    /// then somewhere. Other newcomers first, then the least busy donor.
    pub(crate) fn assign(&mut self, now: Instant) -> Vec<(PeerId, usize)> {
        let mut given = Vec::new();
        loop {
            let busy = |peer: PeerId| self.flights.iter().filter(|flight| flight.peer == peer).count();
            let mut order: Vec<(bool, usize, &Donor)> = self
                .donors
                .iter()
                .map(|donor| (donor.is_complete(), busy(donor.peer), donor))
                .filter(|(_, busy, donor)| *busy < donor.window && donor.failures < FAILURES_MAX)
                .collect();
            order.sort_by_key(|(is_complete, busy, donor)| (*is_complete, *busy, donor.peer));
            let found = order.into_iter().find_map(|(_, _, donor)| {
                let can = |chunk: usize| donor.has(chunk) && !self.flies(donor, chunk);
                let places = self.missing.iter().enumerate().rev().filter(|(_, chunk)| can(**chunk));
                let rarest = places.min_by_key(|(_, chunk)| self.copies.get(**chunk))?;
                Some((donor.peer, rarest.0))
            });
            let Some((peer, place)) = found else { return given };
            let chunk = self.missing.remove(place);
            self.flights.push(Flight { peer, chunk, since: now, is_late: false });
            given.push((peer, chunk));
        }
    }

    fn flies(&self, donor: &Donor, chunk: usize) -> bool {
        self.flights.iter().any(|flight| flight.chunk == chunk && flight.peer == donor.peer)
    }

    /// What has been under way for too long is missing again, if somebody else has it. Its donor gets nothing more to do
    /// until it answers.
    pub(crate) fn ask_others_too(&mut self, now: Instant) {
        let limit = self.usual.map_or(LATE_START, |usual| LATE.max(usual * LATE_TIMES));
        let (donors, missing) = (&mut self.donors, &mut self.missing);
        for flight in self.flights.iter_mut().filter(|flight| !flight.is_late && now > flight.since + limit) {
            let mut others = donors.iter().filter(|donor| donor.peer != flight.peer);
            if others.any(|donor| donor.has(flight.chunk) && donor.failures < FAILURES_MAX) {
                flight.is_late = true;
                missing.push(flight.chunk);
                if let Some(late) = donors.iter_mut().find(|donor| donor.peer == flight.peer) {
                    late.window = 1;
                }
            }
        }
    }

    /// Whether the rest is lost: nothing is under way, and of those who answer nobody has had any of it for a while.
    pub(crate) fn is_lost(&mut self, now: Instant) -> bool {
        let mut alive = self.donors.iter().filter(|donor| donor.failures < FAILURES_MAX);
        let comes =
            !self.flights.is_empty() || alive.any(|donor| self.missing.iter().any(|chunk| donor.has(*chunk)));
        if comes {
            self.lost_since = None;
            return false;
        }
        now >= *self.lost_since.get_or_insert(now) + LOST_AFTER
    }

    /// What is known of what a donor has changes.
    fn set_has(&mut self, peer: PeerId, has: Vec<bool>) {
        let Some(donor) = self.donors.iter_mut().find(|donor| donor.peer == peer) else { return };
        let before = std::mem::replace(&mut donor.has, has);
        for (copies, had) in self.copies.iter_mut().zip(before) {
            *copies -= usize::from(had);
        }
        for (copies, has) in self.copies.iter_mut().zip(&donor.has) {
            *copies += usize::from(*has);
        }
    }

    /// A donor said what it has.
    pub(crate) fn listed(&mut self, peer: PeerId, index: &Index, result: Result<Bytes, PeerFault>) {
        let Some(donor) = self.donor(peer) else { return };
        donor.asking = false;
        match result {
            Ok(bits) => {
                if let Some(has) = decode_bits(&bits, index.hashes.len()) {
                    donor.failures = 0;
                    self.set_has(peer, has);
                }
            }
            // "I do not have that snapshot": no fault, it may get it later.
            Err(fault) if fault.kind == FaultKind::Refused => {}
            Err(fault) => self.count(fault),
        }
    }

    /// The answer to a request for a chunk is here, whatever it is.
    pub(crate) fn landed(&mut self, peer: PeerId, chunk: usize) {
        self.flights.retain(|flight| (flight.peer, flight.chunk) != (peer, chunk));
    }

    /// A chunk came and is right.
    pub(crate) fn got(&mut self, peer: PeerId, chunk: usize, bytes: usize, took: Duration) {
        // The short end of a blob says nothing about how long a whole chunk takes.
        if bytes > CHUNK_BYTES / 2 {
            self.usual = Some(self.usual.map_or(took, |usual| (usual * 7 + took) / 8));
        }
        self.wanted.remove(&chunk);
        self.missing.retain(|other| *other != chunk);
        if let Some(donor) = self.donor(peer) {
            donor.pace(took);
            donor.failures = 0;
        }
    }

    /// A chunk did not come, or was wrong.
    pub(crate) fn failed(&mut self, chunk: usize, took: Duration, fault: PeerFault) {
        let is_asked = self.flights.iter().any(|flight| flight.chunk == chunk && !flight.is_late);
        if self.wanted.contains(&chunk) && !is_asked && !self.missing.contains(&chunk) {
            self.missing.push(chunk);
        }
        let Some(donor) = self.donor(fault.peer) else { return };
        donor.pace(took);
        match fault.kind {
            FaultKind::Mismatch => {
                donor.failures = FAILURES_MAX;
                self.set_has(fault.peer, Vec::new());
                self.faults.push(fault);
            }
            // Busy, or it has let the snapshot go: ask what it has before asking for more.
            FaultKind::Refused => self.set_has(fault.peer, Vec::new()),
            _ => self.count(fault),
        }
    }

    /// One fault is reported per donor and download: the first says what happened.
    fn count(&mut self, fault: PeerFault) {
        let Some(donor) = self.donor(fault.peer) else { return };
        donor.failures += 1;
        if donor.failures == FAILURES_MAX {
            self.set_has(fault.peer, Vec::new());
            self.faults.push(fault);
        }
    }

    /// Who failed us, those included who never answered.
    pub(crate) fn end(mut self, now: Instant) -> Vec<PeerFault> {
        for donor in self.donors.iter().filter(|donor| donor.failures < FAILURES_MAX) {
            let mut late = self.flights.iter().filter(|flight| flight.peer == donor.peer && flight.is_late);
            if let Some(flight) = late.next() {
                let (chunk, seconds) = (flight.chunk, (now - flight.since).as_secs_f64());
                let context = format!("state chunk {chunk} did not come in {seconds:.1} s");
                self.faults.push(PeerFault::new(donor.peer, FaultKind::Silent, context));
            }
        }
        self.faults
    }
}

impl Donor {
    pub(crate) fn new(peer: PeerId, now: Instant) -> Self {
        Self { peer, has: Vec::new(), window: WINDOW_START, failures: 0, asking: false, asked: now - REFRESH }
    }

    pub(crate) fn peer(&self) -> PeerId {
        self.peer
    }

    fn has(&self, chunk: usize) -> bool {
        self.has.get(chunk).copied().unwrap_or(false)
    }

    /// Let the window follow what this donor has to give.
    fn pace(&mut self, took: Duration) {
        if took < FAST {
            self.window = (self.window + 1).min(WINDOW_MAX);
        } else if took > SLOW {
            self.window = (self.window / 2).max(1);
        }
    }

    /// Whether everything can be had here: such a donor is asked last, for what nobody else has.
    fn is_complete(&self) -> bool {
        !self.has.is_empty() && self.has.iter().all(|has| *has)
    }

    /// Whether to ask what it has: not while everything is there anyway, and never twice at a time.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        !self.asking && !self.is_complete() && self.failures < FAILURES_MAX && now >= self.asked + REFRESH
    }
}
