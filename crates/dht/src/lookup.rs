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
/// rest of what it alone named is passed over: whoever invents nodes must not set the pace. Nodes crash, too, so that this
/// lasts only until somebody else names them, and whoever is the only one to answer is followed in any case.
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
    /// Nodes that answered.
    answers: usize,
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
        let mut lookup = Self { target, beam, parallel, stalled_after, candidates, namers, answers: 0 };
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

    /// Whether the search may wait for a node.
    fn is_live(&self, candidate: &Candidate) -> bool {
        let named = candidate.namer.and_then(|namer| self.namers.get(&namer));
        match candidate.state {
            State::Failed => false,
            State::Answered => true,
            State::New | State::Asked { .. } => self.answers < 2 || !named.is_some_and(Named::is_invented),
        }
    }

    fn beam(&self) -> impl Iterator<Item = (&DhtId, &Candidate)> {
        self.candidates.iter().filter(|(_, candidate)| self.is_live(candidate)).take(self.beam)
    }

    /// The next node to ask, if there is one now; it counts as asked.
    pub fn next(&mut self, now: Moment) -> Option<Contact> {
        let stalled = self.stalled_after;
        let fresh = |state: State| matches!(state, State::Asked { since } if now < since + stalled);
        let fresh = |candidate: &&Candidate| fresh(candidate.state) && self.is_live(candidate);
        if self.candidates.values().filter(fresh).count() >= self.parallel {
            return None;
        }
        let (distance, _) = self.beam().find(|(_, candidate)| candidate.state == State::New)?;
        let distance = *distance;
        let candidate = self.candidates.get_mut(&distance)?;
        candidate.state = State::Asked { since: now };
        Some(candidate.contact.clone())
    }

    /// When [`Lookup::next`] may have something although nobody answered.
    pub fn next_wakeup(&self, now: Moment) -> Option<Moment> {
        let wakeups = self.candidates.values().filter_map(|candidate| match candidate.state {
            State::Asked { since } if self.is_live(candidate) => Some(since + self.stalled_after),
            _ => None,
        });
        wakeups.filter(|wakeup| *wakeup > now).min()
    }

    /// `id` answered and named these nodes, of which no more than a beam are heard. Returns its number of hops from us.
    pub fn answered(&mut self, id: &DhtId, mut nearest: Vec<Contact>) -> usize {
        let Some(candidate) = self.candidates.get_mut(&id.distance(&self.target)) else { return 0 };
        candidate.state = State::Answered;
        self.answers += 1;
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
        self.namers.entry(namer).or_default().failed += 1;
    }

    /// Whether the nearest live nodes have all answered.
    pub fn is_done(&self) -> bool {
        self.beam().all(|(_, candidate)| candidate.state == State::Answered)
    }

    /// The nearest nodes that answered, nearest first.
    pub fn nearest(&self) -> Vec<Contact> {
        let answered = self.candidates.values().filter(|candidate| candidate.state == State::Answered);
        answered.take(self.beam).map(|candidate| candidate.contact.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use potluck_net::PeerId;
    use std::sync::Arc;

    fn contact(n: u8) -> Contact {
        let peer = PeerId::from_ed25519(&[n; 32]);
        Contact { id: DhtId::of_peer(peer), peer, addresses: Arc::new([]) }
    }

    /// A search that knows these nodes and has asked all of them.
    fn search(seeds: &[u8]) -> Lookup {
        let seeds: Vec<Contact> = seeds.iter().map(|n| contact(*n)).collect();
        let count = seeds.len();
        let mut lookup = Lookup::new(DhtId::of_key(b"key"), 20, 64, Duration::from_secs(1), seeds);
        assert_eq!((0..count).filter_map(|_| lookup.next(Duration::ZERO)).count(), count);
        lookup
    }

    /// Ask the next nodes, of which none answers.
    fn lose(lookup: &mut Lookup, count: usize) {
        for _ in 0..count {
            let asked = lookup.next(Duration::ZERO).expect("there is one to ask");
            lookup.failed(&asked.id);
        }
    }

    #[test]
    fn what_was_passed_over_is_asked_when_somebody_else_names_it() {
        let mut lookup = search(&[1, 2, 3]);
        lookup.answered(&contact(1).id, Vec::new());
        lookup.answered(&contact(2).id, (10..20).map(contact).collect());
        lose(&mut lookup, INVENTED_MAX);
        assert_eq!(lookup.next(Duration::ZERO), None, "the others are passed over");
        lookup.answered(&contact(3).id, (10..20).map(contact).collect());
        let rest: Vec<Contact> = std::iter::from_fn(|| lookup.next(Duration::ZERO)).collect();
        assert_eq!(
            rest.len(),
            10 - INVENTED_MAX,
            "two named them, and those that failed are not asked again"
        );
        assert!(!lookup.is_done());
        for contact in &rest {
            lookup.answered(&contact.id, Vec::new());
        }
        assert!(lookup.is_done());
        assert_eq!(lookup.nearest().len(), 3 + rest.len());
    }

    #[test]
    fn the_only_node_that_answered_is_followed_however_many_have_gone() {
        let mut lookup = search(&[1]);
        lookup.answered(&contact(1).id, (10..20).map(contact).collect());
        lose(&mut lookup, 9);
        assert!(!lookup.is_done());
        let last = lookup.next(Duration::ZERO).expect("one is left");
        lookup.answered(&last.id, Vec::new());
        assert!(lookup.is_done());
        assert_eq!(lookup.nearest().len(), 2);
    }

    #[test]
    fn a_question_that_is_under_way_holds_up_nobody_once_its_node_is_passed_over() {
        let mut lookup = search(&[1, 2]);
        lookup.answered(&contact(1).id, Vec::new());
        lookup.answered(&contact(2).id, (10..20).map(contact).collect());
        let asked: Vec<Contact> = std::iter::from_fn(|| lookup.next(Duration::ZERO)).collect();
        asked[..INVENTED_MAX].iter().for_each(|contact| lookup.failed(&contact.id));
        assert!(lookup.is_done());
        assert_eq!(lookup.next_wakeup(Duration::ZERO), None);
        lookup.answered(&asked[INVENTED_MAX].id, Vec::new());
        assert_eq!(lookup.nearest().len(), 3, "an answer counts whenever it comes");
    }
}
