//! Sans-I/O. Which chunk is asked of whom: a window for each donor that follows what it has to give, other newcomers before
//! donors, the rarest chunk first, and a second donor for a chunk whose first one has fallen silent.

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
/// It is given up as well when no chunk has come for so long, whatever is promised: a chunk of a home's uplink of 1 Mbit/s that
/// twelve share takes 100 s.
const STALLED_AFTER: Duration = Duration::from_secs(120);
/// A donor that failed this often in a row is given up for this download.
const FAILURES_MAX: u32 = 3;
/// Whoever has nothing of this snapshot is asked less and less often whether it has.
const REFRESH_MAX: Duration = Duration::from_secs(4);

/// What a donor has and how it does.
pub(crate) struct Donor {
    peer: PeerId,
    has: Vec<bool>,
    window: usize,
    /// Questions in a row what it has that it did not answer.
    silent: u32,
    /// How often in a row it did not give a chunk that it said it has, and when the last time was: what is under way when a
    /// connection breaks fails together.
    broken: u32,
    broke: Instant,
    /// It is asked for nothing more.
    is_out: bool,
    asking: bool,
    asked: Instant,
    /// Until it is asked again what it has.
    pause: Duration,
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
    donors: Vec<Donor>,
    /// To be asked; the last one is the next.
    missing: Vec<usize>,
    /// How many donors have each chunk.
    copies: Vec<usize>,
    /// Not here yet.
    wanted: BTreeSet<usize>,
    flights: Vec<Flight>,
    /// How long a chunk takes, over all donors; `None` before the first.
    usual: Option<Duration>,
    /// Since when nobody has what is missing.
    lost_since: Option<Instant>,
    /// When the last chunk came.
    came: Instant,
    faults: Vec<PeerFault>,
}

impl Work {
    /// The download of a snapshot of so many `chunks`, of which these are missing here.
    pub(crate) fn new(chunks: usize, missing: Vec<usize>, donors: Vec<Donor>, now: Instant) -> Self {
        let wanted = missing.iter().copied().collect();
        Self {
            donors,
            missing,
            copies: vec![0; chunks],
            wanted,
            flights: Vec::new(),
            usual: None,
            lost_since: None,
            came: now,
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
        // Only what is late is missing and under way.
        let late: Vec<(PeerId, usize)> = self
            .flights
            .iter()
            .filter(|flight| flight.is_late)
            .map(|flight| (flight.peer, flight.chunk))
            .collect();
        loop {
            let busy = |peer: PeerId| self.flights.iter().filter(|flight| flight.peer == peer).count();
            let mut order: Vec<(bool, usize, &Donor)> = self
                .donors
                .iter()
                .map(|donor| (donor.is_complete(), busy(donor.peer), donor))
                .filter(|(_, busy, donor)| *busy < donor.window && !donor.is_out)
                .collect();
            order.sort_by_key(|(is_complete, busy, donor)| (*is_complete, *busy, donor.peer));
            let found = order.into_iter().find_map(|(_, _, donor)| {
                let can = |chunk: usize| donor.has(chunk) && !late.contains(&(donor.peer, chunk));
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

    /// Whom to ask now what they have.
    pub(crate) fn due_questions(&mut self, now: Instant) -> Vec<PeerId> {
        let due = self.donors.iter_mut().filter(|donor| donor.is_due(now));
        due.map(|donor| {
            (donor.asking, donor.asked) = (true, now);
            donor.peer
        })
        .collect()
    }

    /// What has been under way for too long is missing again, if somebody else has it. Its donor gets nothing more to do
    /// until it answers.
    pub(crate) fn ask_others_too(&mut self, now: Instant) {
        let limit = self.usual.map_or(LATE_START, |usual| LATE.max(usual * LATE_TIMES));
        let (donors, missing) = (&mut self.donors, &mut self.missing);
        for flight in self.flights.iter_mut().filter(|flight| !flight.is_late && now > flight.since + limit) {
            let mut others = donors.iter().filter(|donor| donor.peer != flight.peer);
            if others.any(|donor| donor.has(flight.chunk) && !donor.is_out) {
                flight.is_late = true;
                missing.push(flight.chunk);
                if let Some(late) = donors.iter_mut().find(|donor| donor.peer == flight.peer) {
                    late.window = 1;
                }
            }
        }
    }

    /// Why there is nothing more to wait for, if there is not.
    pub(crate) fn is_over(&mut self, now: Instant) -> Option<&'static str> {
        if self.wanted.is_empty() {
            return Some("finished");
        }
        if self.donors.iter().all(|donor| donor.is_out) {
            return Some("every donor was lost");
        }
        if now >= self.came + STALLED_AFTER {
            return Some("nothing came any more");
        }
        self.is_lost(now).then_some("nobody has the rest any more")
    }

    /// Whether the rest is lost: nothing is under way, and of those who answer nobody has had any of it for a while.
    fn is_lost(&mut self, now: Instant) -> bool {
        let mut alive = self.donors.iter().filter(|donor| !donor.is_out);
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
                (donor.silent, donor.pause) = (0, REFRESH);
                if let Some(has) = decode_bits(&bits, index.hashes.len()) {
                    self.set_has(peer, has);
                }
            }
            // "I do not have that snapshot": no fault, it may get it later.
            Err(fault) if fault.kind == FaultKind::Refused => {
                donor.pause = (donor.pause * 2).min(REFRESH_MAX)
            }
            // Whether it has anything is not known.
            Err(fault) if fault.kind == FaultKind::Busy => self.lost_since = None,
            Err(fault) => {
                donor.silent += 1;
                let is_last = donor.silent >= FAILURES_MAX;
                self.give_up(fault, is_last);
            }
        }
    }

    /// The answer to a request for a chunk is here, whatever it is.
    pub(crate) fn landed(&mut self, peer: PeerId, chunk: usize) {
        self.flights.retain(|flight| (flight.peer, flight.chunk) != (peer, chunk));
    }

    /// Whether a chunk is still to come.
    pub(crate) fn wants(&self, chunk: usize) -> bool {
        self.wanted.contains(&chunk)
    }

    /// A chunk came and is right.
    pub(crate) fn got(&mut self, now: Instant, peer: PeerId, chunk: usize, bytes: usize, took: Duration) {
        self.came = now;
        // The short end of a blob says nothing about how long a whole chunk takes.
        if bytes > CHUNK_BYTES / 2 {
            self.usual = Some(self.usual.map_or(took, |usual| (usual * 7 + took) / 8));
        }
        self.wanted.remove(&chunk);
        self.missing.retain(|other| *other != chunk);
        if let Some(donor) = self.donor(peer) {
            donor.pace(took);
            donor.broken = 0;
        }
    }

    /// A chunk did not come, or was wrong.
    pub(crate) fn failed(&mut self, now: Instant, chunk: usize, took: Duration, fault: PeerFault) {
        let is_asked = self.flights.iter().any(|flight| flight.chunk == chunk && !flight.is_late);
        if self.wanted.contains(&chunk) && !is_asked && !self.missing.contains(&chunk) {
            self.missing.push(chunk);
        }
        let Some(donor) = self.donor(fault.peer) else { return };
        donor.pace(took);
        let kind = fault.kind;
        if kind != FaultKind::Busy && now >= donor.broke + took {
            (donor.broken, donor.broke) = (donor.broken + 1, now);
        }
        let is_last = kind == FaultKind::Mismatch || donor.broken >= FAILURES_MAX;
        // It has let the snapshot go, or has too much to do: ask what it has before asking for more.
        if matches!(kind, FaultKind::Refused | FaultKind::Busy) {
            self.set_has(fault.peer, Vec::new());
        }
        if kind == FaultKind::Busy {
            self.lost_since = None;
        }
        self.give_up(fault, is_last);
    }

    /// A donor that has failed is given up if that was the last time. One fault is reported per donor and download.
    fn give_up(&mut self, fault: PeerFault, is_last: bool) {
        let Some(donor) = self.donor(fault.peer).filter(|donor| is_last && !donor.is_out) else { return };
        donor.is_out = true;
        self.set_has(fault.peer, Vec::new());
        self.faults.push(fault);
    }

    /// Who failed us, those included who never answered.
    pub(crate) fn end(mut self, now: Instant) -> Vec<PeerFault> {
        for donor in self.donors.iter().filter(|donor| !donor.is_out) {
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
        Self {
            peer,
            has: Vec::new(),
            window: WINDOW_START,
            silent: 0,
            broken: 0,
            broke: now,
            is_out: false,
            asking: false,
            asked: now - REFRESH,
            pause: REFRESH,
        }
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
    fn is_due(&self, now: Instant) -> bool {
        !self.asking && !self.is_complete() && !self.is_out && now >= self.asked + self.pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const CHUNKS: usize = 40;

    fn peer(number: u8) -> PeerId {
        PeerId::from_ed25519(&[number; 32])
    }

    fn index() -> Index {
        let blobs = BTreeMap::from([("w".to_owned(), (CHUNKS * CHUNK_BYTES) as u64)]);
        Index { epoch: 1, lineage: [1; 32], meta: BTreeMap::new(), blobs, hashes: vec![[0; 32]; CHUNKS] }
    }

    /// A download from so many donors that say that they have everything.
    fn promised(now: Instant, donors: u8) -> Work {
        let all = (1..=donors).map(|number| Donor::new(peer(number), now)).collect();
        let mut work = Work::new(CHUNKS, (0..CHUNKS).collect(), all, now);
        (1..=donors).for_each(|number| promise(&mut work, number));
        work
    }

    fn promise(work: &mut Work, number: u8) {
        work.listed(peer(number), &index(), Ok(crate::wire::encode_bits(&[true; CHUNKS])));
    }

    fn fault(number: u8, kind: FaultKind) -> PeerFault {
        PeerFault::new(peer(number), kind, "")
    }

    /// What is asked for now fails a second later.
    fn fails(work: &mut Work, now: &mut Instant, kind: FaultKind) {
        let took = Duration::from_secs(1);
        let asked = work.assign(*now);
        *now += took;
        for (peer, chunk) in asked {
            work.landed(peer, chunk);
            work.failed(*now, chunk, took, PeerFault::new(peer, kind, ""));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_that_it_has_everything_and_gives_nothing_is_out_after_three_times() {
        for kind in [FaultKind::Refused, FaultKind::Silent, FaultKind::Reset] {
            let mut now = Instant::now();
            let mut work = promised(now, 1);
            for time in 1..=FAILURES_MAX {
                assert_eq!(work.is_over(now), None, "{kind:?}, before the {time}th time");
                promise(&mut work, 1);
                fails(&mut work, &mut now, kind);
            }
            promise(&mut work, 1);
            assert_eq!(work.is_over(now), Some("every donor was lost"));
            assert_eq!(work.end(now).iter().map(|fault| fault.kind).collect::<Vec<_>>(), [kind]);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_breaks_together_breaks_once() {
        let mut now = Instant::now();
        let mut work = promised(now, 1);
        for _ in 0..WINDOW_MAX {
            work.donors[0].pace(Duration::ZERO);
        }
        fails(&mut work, &mut now, FaultKind::Reset);
        promise(&mut work, 1);
        assert_eq!((work.donors[0].broken, work.is_over(now)), (1, None));
        let (from, chunk) = work.assign(now)[0];
        work.landed(from, chunk);
        work.got(now, from, chunk, CHUNK_BYTES, Duration::ZERO);
        assert_eq!(work.donors[0].broken, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_liar_stays_out_whatever_it_says_later() {
        let mut now = Instant::now();
        let mut work = promised(now, 2);
        let (from, chunk) = work.assign(now)[0];
        work.landed(from, chunk);
        work.failed(now, chunk, Duration::ZERO, PeerFault::new(from, FaultKind::Mismatch, ""));
        for number in [1, 2] {
            promise(&mut work, number);
        }
        now += REFRESH;
        assert!(!work.due_questions(now).contains(&from));
        assert!(work.assign(now).iter().all(|(peer, _)| *peer != from));
        work.failed(now, chunk, Duration::ZERO, PeerFault::new(from, FaultKind::Mismatch, ""));
        assert_eq!(work.end(now).len(), 1, "named once");
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_too_much_to_do_is_waited_for_but_not_for_ever() {
        let mut now = Instant::now();
        let mut work = promised(now, 1);
        let begun = now;
        while work.is_over(now).is_none() {
            work.listed(peer(1), &index(), Err(fault(1, FaultKind::Busy)));
            fails(&mut work, &mut now, FaultKind::Busy);
            now += REFRESH;
        }
        assert_eq!(work.is_over(now), Some("nothing came any more"));
        assert!((STALLED_AFTER..STALLED_AFTER + LOST_AFTER).contains(&(now - begun)));
        assert!(work.end(now).is_empty(), "that is no fault");
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_nothing_is_asked_less_and_less_often() {
        let mut now = Instant::now();
        let mut work = Work::new(CHUNKS, vec![0], vec![Donor::new(peer(1), now)], now);
        let mut asked = 0;
        for _ in 0..60 * 10 {
            for peer in work.due_questions(now) {
                asked += 1;
                work.listed(peer, &index(), Err(PeerFault::new(peer, FaultKind::Refused, "")));
            }
            now += Duration::from_millis(100);
        }
        assert!((15..20).contains(&asked), "{asked} times in a minute");
        promise(&mut work, 1);
        assert_eq!(work.donors[0].pause, REFRESH);
    }
}
