//! Sans-I/O. The beam search for the nodes nearest to a key.

use crate::entry::Moment;
use crate::id::DhtId;
use crate::table::Contact;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Duration;

/// Candidates that are remembered at most, in multiples of the beam.
const CANDIDATES_PER_BEAM: usize = 16;
/// So many nodes that one node alone named may fail, if they are also more than twice those that answered, before the
/// rest of what it alone named is passed over: whoever invents nodes must not set the pace. Nodes crash, too.
const INVENTED_MAX: usize = 5;

/// Ask the nearest known nodes for nearer ones until the `beam` nearest live ones have all answered.
#[derive(Debug)]
pub struct Lookup {
    target: DhtId,
    beam: usize,
    parallel: usize,
    stalled_after: Duration,
    /// By distance to the target.
    candidates: BTreeMap<DhtId, Candidate>,
    /// What came of the nodes that each node alone named.
    namers: BTreeMap<DhtId, Named>,
}

#[derive(Debug, Default)]
struct Named {
    answered: usize,
    failed: usize,
}

impl Named {
    fn is_invented(&self) -> bool {
        self.failed >= INVENTED_MAX && self.failed > 2 * self.answered
    }
}

#[derive(Debug)]
struct Candidate {
    contact: Contact,
    state: State,
    /// Hops from us: 1 for a node of our own table.
    hops: usize,
    /// The only one who named it; `None` if it is ours or several did.
    namer: Option<DhtId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    New,
    Asked { since: Moment },
    Answered,
    Failed,
}

impl Lookup {
    /// A search that starts from `seeds`, with at most `parallel` unanswered questions younger than `stalled_after`:
    /// a dead node must not hold up the search until its deadline.
    pub fn new(
        target: DhtId,
        beam: usize,
        parallel: usize,
        stalled_after: Duration,
        seeds: Vec<Contact>,
    ) -> Self {
        let (beam, parallel) = (beam.max(1), parallel.max(1));
        let (candidates, namers) = (BTreeMap::new(), BTreeMap::new());
        let mut lookup = Self { target, beam, parallel, stalled_after, candidates, namers };
        lookup.add(seeds, 1, None);
        lookup
    }

    fn add(&mut self, contacts: Vec<Contact>, hops: usize, namer: Option<DhtId>) {
        for contact in contacts {
            let distance = contact.id.distance(&self.target);
            match self.candidates.entry(distance) {
                Entry::Occupied(mut known) if known.get().namer != namer => known.get_mut().namer = None,
                Entry::Occupied(_) => {}
                Entry::Vacant(place) => {
                    place.insert(Candidate { contact, state: State::New, hops, namer });
                }
            }
        }
        while self.candidates.len() > self.beam * CANDIDATES_PER_BEAM {
            self.candidates.pop_last();
        }
    }

    fn beam(&self) -> impl Iterator<Item = &Candidate> {
        self.candidates.values().filter(|candidate| candidate.state != State::Failed).take(self.beam)
    }

    /// The next node to ask, if there is one now; it counts as asked.
    pub fn next(&mut self, now: Moment) -> Option<Contact> {
        let stalled = self.stalled_after;
        let fresh = |state: State| matches!(state, State::Asked { since } if now < since + stalled);
        if self.candidates.values().filter(|candidate| fresh(candidate.state)).count() >= self.parallel {
            return None;
        }
        let live = self.candidates.values_mut().filter(|candidate| candidate.state != State::Failed);
        let candidate = live.take(self.beam).find(|candidate| candidate.state == State::New)?;
        candidate.state = State::Asked { since: now };
        Some(candidate.contact.clone())
    }

    /// When [`Lookup::next`] may have something although nobody answered.
    pub fn next_wakeup(&self, now: Moment) -> Option<Moment> {
        let wakeups = self.candidates.values().filter_map(|candidate| match candidate.state {
            State::Asked { since } => Some(since + self.stalled_after),
            _ => None,
        });
        wakeups.filter(|wakeup| *wakeup > now).min()
    }

    /// `id` answered and named these nodes, of which no more than a beam are heard. Returns its number of hops from us.
    pub fn answered(&mut self, id: &DhtId, mut nearest: Vec<Contact>) -> usize {
        let Some(candidate) = self.candidates.get_mut(&id.distance(&self.target)) else { return 0 };
        candidate.state = State::Answered;
        let hops = candidate.hops;
        if let Some(namer) = candidate.namer {
            self.namers.entry(namer).or_default().answered += 1;
        }
        nearest.sort_by_key(|contact| contact.id.distance(&self.target));
        nearest.truncate(self.beam);
        self.add(nearest, hops + 1, Some(*id));
        hops
    }

    /// `id` did not answer.
    pub fn failed(&mut self, id: &DhtId) {
        let Some(candidate) = self.candidates.get_mut(&id.distance(&self.target)) else { return };
        candidate.state = State::Failed;
        let Some(namer) = candidate.namer else { return };
        let named = self.namers.entry(namer).or_default();
        named.failed += 1;
        if named.is_invented() {
            for other in self.candidates.values_mut().filter(|other| other.namer == Some(namer)) {
                if other.state != State::Answered {
                    other.state = State::Failed;
                }
            }
        }
    }

    /// Whether the nearest live nodes have all answered.
    pub fn is_done(&self) -> bool {
        self.beam().all(|candidate| candidate.state == State::Answered)
    }

    /// The nearest nodes that answered, nearest first.
    pub fn nearest(&self) -> Vec<Contact> {
        let answered = self.candidates.values().filter(|candidate| candidate.state == State::Answered);
        answered.take(self.beam).map(|candidate| candidate.contact.clone()).collect()
    }
}
