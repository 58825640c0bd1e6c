//! Sans-I/O. The control side of a channel's rounds: who is waited for, when a round begins, and what was agreed.
//!
//! Nothing here waits a fixed time: a round begins when everybody expected is ready, and the deadline that matters for
//! silent peers follows the spread of earlier arrivals.

mod groups;
mod leaders;

use self::groups::Groups;
use crate::plan::{self, coordinators};
use crate::view::View;
use crate::vote::majority;
use crate::wire::{Plan, Ready, RoundMessage};
use potluck_net::{FaultKind, PeerFault, PeerId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Peers whose readiness is remembered.
const READY_MAX: usize = 1024;
/// Rounds whose verdict is remembered for those who ask late.
const RECENT_MAX: usize = 16;
/// What is not acknowledged is repeated this often.
const REPEAT: Duration = Duration::from_millis(250);
/// Readiness that was not repeated for this long is void.
const READY_AGE_MAX: Duration = Duration::from_secs(3);
/// Whoever is still in a round is asked this often whether the others are: their farewell may have been lost.
const PROBE: Duration = Duration::from_secs(2);
/// Bounds of the adaptive time that silent peers are waited for.
const PATIENCE: std::ops::Range<Duration> = Duration::from_secs(2)..Duration::from_secs(30);

/// Messages to send. What goes to many is held, and encoded, once.
#[derive(Debug, Default)]
pub(crate) struct Out(Vec<(Vec<PeerId>, RoundMessage)>);

impl Out {
    fn tell(&mut self, peer: PeerId, message: RoundMessage) {
        self.0.push((vec![peer], message));
    }

    fn tell_all(&mut self, peers: impl Iterator<Item = PeerId>, message: RoundMessage) {
        self.0.push((peers.collect(), message));
    }
}

impl IntoIterator for Out {
    type Item = (Vec<PeerId>, RoundMessage);
    type IntoIter = std::vec::IntoIter<Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// Names a plan.
pub(crate) type PlanHash = [u8; 32];

/// What the group agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Agreed {
    pub(crate) digests: Vec<[u8; 32]>,
    pub(crate) holders: Vec<PeerId>,
}

/// How gathering goes.
#[derive(Debug, Clone)]
pub(crate) enum Gathering {
    /// Look again at this time or when something arrives.
    Wait(Instant),
    /// Nobody else is here.
    Alone,
    Begun(Arc<Plan>, PlanHash),
    /// The round goes on without us.
    LeftOut,
}

/// Our own wish to average.
#[derive(Debug, Clone)]
pub(crate) struct Wish {
    pub(crate) ready: Ready,
    pub(crate) started: Instant,
    pub(crate) patience: Option<Duration>,
    pub(crate) group_size_min: usize,
}

#[derive(Debug)]
struct Current {
    plan: Arc<Plan>,
    hash: PlanHash,
    /// Names the phase that is under way; the first is named as the plan.
    phase: PlanHash,
    /// What was agreed on in the phases before.
    earlier: Vec<(PlanHash, Agreed)>,
    withdrawn: BTreeSet<PeerId>,
    /// Members that are lost to us, and when they were last told so.
    disowned: BTreeMap<PeerId, Instant>,
    probed: Option<Instant>,
    done: BTreeMap<PeerId, Vec<[u8; 32]>>,
    own: Option<(Instant, Vec<[u8; 32]>)>,
    authority: Option<PeerId>,
    told_at: Option<Instant>,
    agreed: Option<Agreed>,
}

#[derive(Debug)]
pub(crate) struct Station {
    me: PeerId,
    run: String,
    channel: String,
    group_max: usize,
    /// Of a round.
    phases: usize,
    wish: Option<Wish>,
    groups: Groups,
    left_out: bool,
    skipped: BTreeSet<PeerId>,
    /// Since when the round is ours to coordinate.
    coordinating: Option<Instant>,
    /// From somebody whom we asked before: it was skipped, or has died.
    took_over: bool,
    asked: Option<(PeerId, Instant, Instant)>,
    ready: BTreeMap<PeerId, (Instant, Ready)>,
    current: Option<Current>,
    recent: VecDeque<(PlanHash, Agreed)>,
    /// The last epoch that this channel finished: there is no second round for it.
    finished_epoch: Option<u64>,
    last_members: (BTreeSet<PeerId>, Option<Instant>),
    next_attempt: (Option<u64>, u32),
    spread: Duration,
    pub(crate) faults: Vec<PeerFault>,
}

impl Station {
    pub(crate) fn new(me: PeerId, run: &str, channel: &str, group_max: usize, phases: usize) -> Self {
        Self {
            me,
            run: run.to_owned(),
            channel: channel.to_owned(),
            group_max,
            phases,
            wish: None,
            groups: Groups::default(),
            left_out: false,
            skipped: BTreeSet::new(),
            coordinating: None,
            took_over: false,
            asked: None,
            ready: BTreeMap::new(),
            current: None,
            recent: VecDeque::new(),
            last_members: (BTreeSet::new(), None),
            finished_epoch: None,
            next_attempt: (None, 0),
            spread: Duration::ZERO,
            faults: Vec::new(),
        }
    }

    /// The lowest attempt that we accept for an epoch.
    pub(crate) fn attempt(&self, epoch: Option<u64>) -> u32 {
        if self.next_attempt.0 == epoch { self.next_attempt.1 } else { 0 }
    }

    pub(crate) fn start(&mut self, wish: Wish) {
        if wish.ready.epoch <= self.finished_epoch {
            // Another history, loaded from others, has taken us back; those at our side are not late.
            self.finished_epoch = wish.ready.epoch.map_or(self.finished_epoch, |epoch| epoch.checked_sub(1));
        }
        self.wish = Some(wish);
        self.left_out = false;
        self.skipped.clear();
        (self.coordinating, self.took_over) = (None, false);
        self.asked = None;
        self.faults.clear();
    }

    /// The round is over for us, one way or the other. If it was not agreed on, the others are told.
    pub(crate) fn end(&mut self, now: Instant, out: &mut Out) {
        self.wish = None;
        let Some(current) = self.current.take() else { return };
        let others = current.plan.members.iter().map(|m| m.peer).filter(|peer| *peer != self.me);
        match current.agreed {
            Some(agreed) if current.earlier.len() + 1 == self.phases => {
                self.finished_epoch = self.finished_epoch.max(current.plan.epoch);
                self.last_members = (current.plan.members.iter().map(|m| m.peer).collect(), Some(now));
                for finished in current.earlier.into_iter().chain([(current.phase, agreed)]) {
                    self.recent.push_front(finished);
                }
                self.recent.truncate(RECENT_MAX);
                let disowned = current.disowned.into_keys();
                out.tell_all(disowned, RoundMessage::Withdraw { plan: current.hash });
            }
            _ => out.tell_all(others, RoundMessage::Withdraw { plan: current.hash }),
        }
        self.next_attempt = (current.plan.epoch, current.plan.attempt.saturating_add(1));
    }

    /// Whether this round waits for a peer of its group.
    fn expects(&self, now: Instant, view: &View, epoch: Option<u64>, peer: &PeerId) -> bool {
        let Some(epoch) = epoch else { return true };
        let just_ended = || self.last_members.1.is_some_and(|end| now < end + Duration::from_millis(2500));
        let reports = view.members.get(peer).filter(|member| member.ready);
        // Who was in the last round is about to come. In a large swarm it was a round of another group, whose end only that
        // group heard of at once: what we know is from the round before.
        let of_many = self.groups.of_many();
        let is_coming = || {
            self.last_members.0.contains(peer)
                || (of_many && reports.is_some_and(|m| m.epoch < epoch && epoch - m.epoch <= 2))
        };
        *peer == self.me
            || reports.is_some_and(|member| member.epoch == epoch)
            || (just_ended() && is_coming())
    }

    /// What a peer of the group is ready with.
    fn ready_of<'a>(&'a self, now: Instant, wish: &'a Wish, peer: &PeerId) -> Option<&'a Ready> {
        if *peer == self.me {
            return Some(&wish.ready);
        }
        let (at, ready) = self.ready.get(peer)?;
        let fits = ready.epoch == wish.ready.epoch && ready.layout == wish.ready.layout;
        (fits && *at + READY_AGE_MAX > now).then_some(ready)
    }

    /// Look at what is known and act on it.
    pub(crate) fn gather(&mut self, now: Instant, view: &View, out: &mut Out) -> Gathering {
        if let Some(current) = &self.current {
            return Gathering::Begun(current.plan.clone(), current.hash);
        }
        if std::mem::take(&mut self.left_out) {
            return Gathering::LeftOut;
        }
        let Some(wish) = self.wish.clone() else { return Gathering::LeftOut };
        let epoch = wish.ready.epoch;
        let group = self.group(view, epoch);
        let counts = |peer: &&PeerId| {
            self.expects(now, view, epoch, peer) || self.ready_of(now, &wish, peer).is_some()
        };
        let patience = wish.patience.unwrap_or_else(|| (self.spread * 4).clamp(PATIENCE.start, PATIENCE.end));
        let deadline = wish.started + patience;
        let alone = !group.iter().filter(|peer| **peer != self.me).any(|peer| counts(&peer));
        if alone && (wish.group_size_min <= 1 || now >= deadline) {
            return Gathering::Alone;
        }
        let mut candidates = group.iter().filter(|peer| !self.skipped.contains(peer));
        let chosen = candidates.find(counts).copied().unwrap_or(self.me);
        if chosen == self.me {
            return self.coordinate(now, view, &wish, &group, deadline, out);
        }
        // Somebody before us has come: when our turn comes again, the others take as long as ever to find that out.
        self.coordinating = None;
        self.ask(now, chosen, patience, &wish, out)
    }

    /// It is our turn: begin when everybody is ready, or time is up.
    fn coordinate(
        &mut self,
        now: Instant,
        view: &View,
        wish: &Wish,
        group: &[PeerId],
        deadline: Instant,
        out: &mut Out,
    ) -> Gathering {
        let asked = self.asked.is_some_and(|(peer, _, _)| peer != self.me);
        self.took_over |= asked || !self.skipped.is_empty();
        let since = *self.coordinating.get_or_insert(now);
        // Having taken over, the others need the time to find that out as well.
        let deadline = if self.took_over { deadline.max(since + REPEAT * 4) } else { deadline };
        let epoch = wish.ready.epoch;
        let mut missing = group
            .iter()
            .filter(|peer| self.ready_of(now, wish, peer).is_none() && self.expects(now, view, epoch, peer));
        let complete = missing.clone().next().is_none();
        if complete || now >= deadline {
            let of = |peer: &PeerId| Some((*peer, self.ready_of(now, wish, peer)?.clone()));
            let ready: BTreeMap<PeerId, Ready> = group.iter().filter_map(of).collect();
            if ready.len() >= wish.group_size_min.max(2) {
                return self.begin(now, wish, &ready, out);
            }
            if now >= deadline && ready.len() == 1 && wish.group_size_min <= 1 {
                return Gathering::Alone;
            }
        }
        // Those who do not know that it is our turn learn it; those who went on without us say so.
        if now >= since + REPEAT && self.asked.is_none_or(|(_, _, last)| now >= last + REPEAT) {
            out.tell_all(missing.by_ref().copied(), RoundMessage::Ready(wish.ready.clone()));
            self.asked = Some((self.me, now, now));
        }
        let again = now + REPEAT;
        Gathering::Wait(if now >= deadline { again } else { deadline.min(again) })
    }

    fn ask(
        &mut self,
        now: Instant,
        chosen: PeerId,
        patience: Duration,
        wish: &Wish,
        out: &mut Out,
    ) -> Gathering {
        let (since, last) = match self.asked {
            Some((peer, since, last)) if peer == chosen => (since, Some(last)),
            _ => (now, None),
        };
        // The coordinator itself waits for its patience, and answers meanwhile; when it is silent, or waits for longer than
        // anybody may, the next in order takes over.
        let answered = self.ready_of(now, wish, &chosen).and(self.ready.get(&chosen)).map(|(at, _)| *at);
        let heard = answered.map_or(since, |at| at.max(since));
        let until = (heard + patience).min(since + patience.max(PATIENCE.end));
        if now >= until + Duration::from_secs(1) {
            self.skipped.insert(chosen);
            self.asked = None;
            return Gathering::Wait(now);
        }
        if last.is_none_or(|last| now >= last + REPEAT) {
            out.tell(chosen, RoundMessage::Ready(wish.ready.clone()));
            self.asked = Some((chosen, since, now));
            return Gathering::Wait(now + REPEAT);
        }
        Gathering::Wait(last.unwrap_or(now) + REPEAT)
    }

    fn begin(
        &mut self,
        now: Instant,
        wish: &Wish,
        ready: &BTreeMap<PeerId, Ready>,
        out: &mut Out,
    ) -> Gathering {
        let epoch = wish.ready.epoch;
        let attempt = ready.values().map(|r| r.attempt).max().unwrap_or(0);
        let plan = Arc::new(plan::make(&self.run, &self.channel, epoch, attempt, self.me, ready));
        let others = plan.members.iter().map(|member| member.peer).filter(|peer| *peer != self.me);
        others.clone().for_each(|peer| _ = self.ready.remove(&peer));
        out.tell_all(others, RoundMessage::Begin(Box::new((*plan).clone())));
        let waited = now.saturating_duration_since(wish.started);
        self.spread = (self.spread * 3 + waited) / 4;
        self.accept(plan)
    }

    fn accept(&mut self, plan: Arc<Plan>) -> Gathering {
        let hash = plan.hash();
        for peer in &plan.implausible {
            let context = format!("norm out of proportion to the group's; {}", plan.round());
            self.faults.push(PeerFault::new(*peer, FaultKind::Implausible, context));
        }
        self.current = Some(Current {
            plan: plan.clone(),
            hash,
            phase: hash,
            earlier: Vec::new(),
            withdrawn: BTreeSet::new(),
            disowned: BTreeMap::new(),
            probed: None,
            done: BTreeMap::new(),
            own: None,
            authority: None,
            told_at: None,
            agreed: None,
        });
        Gathering::Begun(plan, hash)
    }

    /// A message of another peer.
    pub(crate) fn message(&mut self, now: Instant, from: PeerId, message: RoundMessage, out: &mut Out) {
        match message {
            RoundMessage::Ready(ready) => self.on_ready(now, from, ready, out),
            RoundMessage::Begin(plan) => self.on_begin(from, *plan, out),
            RoundMessage::LeftOut { nonce, .. } => {
                let ours = self.wish.as_ref().is_some_and(|wish| wish.ready.nonce == nonce);
                self.left_out |= ours && self.current.is_none();
            }
            RoundMessage::Withdraw { plan } => {
                if let Some(current) = self.current.as_mut().filter(|current| current.hash == plan) {
                    current.withdrawn.insert(from);
                }
            }
            RoundMessage::Done { plan, digests } => self.on_done(from, plan, digests, out),
            RoundMessage::Verdict { plan, digests, holders } => {
                if let Some(current) = self.current.as_mut().filter(|c| c.phase == plan && c.agreed.is_none())
                    && current.plan.index_of(from).is_some()
                    && digests.len() == current.plan.members.len()
                {
                    current.agreed = Some(Agreed { digests, holders });
                }
            }
            RoundMessage::Query { plan } => {
                if let Some(current) = self.current.as_ref().filter(|c| c.phase == plan) {
                    if let Some(agreed) = &current.agreed {
                        out.tell(from, verdict(plan, agreed));
                    } else if let Some((_, digests)) = &current.own {
                        out.tell(from, RoundMessage::Done { plan, digests: digests.clone() });
                    }
                } else if let Some(agreed) = self.past(&plan) {
                    out.tell(from, verdict(plan, agreed));
                } else if self.current.as_ref().is_none_or(|c| c.hash != plan) {
                    // A plan that never reached us, or one that we left: the number of our step shows which.
                    let gathering = self.wish.as_ref().filter(|_| self.current.is_none());
                    let answer = match gathering {
                        Some(wish) => RoundMessage::Ready(wish.ready.clone()),
                        None => RoundMessage::Withdraw { plan },
                    };
                    out.tell(from, answer);
                }
            }
        }
    }

    /// What was agreed on in a phase that is over for us.
    fn past(&self, phase: &PlanHash) -> Option<&Agreed> {
        let earlier = self.current.iter().flat_map(|current| &current.earlier);
        earlier.chain(&self.recent).find(|(name, _)| name == phase).map(|(_, agreed)| agreed)
    }

    fn on_ready(&mut self, now: Instant, from: PeerId, ready: Ready, out: &mut Out) {
        if let Some(current) = self.current.as_mut().filter(|c| c.plan.epoch == ready.epoch) {
            match current.plan.members.iter().find(|member| member.peer == from) {
                Some(member) if member.nonce == ready.nonce => {
                    out.tell(from, RoundMessage::Begin(Box::new((*current.plan).clone())));
                    return;
                }
                // It asks for a new round, so it is no longer in this one: it has restarted, faster than anybody could
                // miss it, and nobody may wait for what its predecessor owed.
                Some(_) => {
                    current.withdrawn.insert(from);
                }
                None => {}
            }
            if ready.epoch.is_some() {
                let attempt = current.plan.attempt;
                let (nonce, epoch) = (ready.nonce, ready.epoch);
                out.tell(from, RoundMessage::LeftOut { nonce, epoch, attempt });
                return;
            }
        }
        if self.current.is_none() && ready.epoch.is_some() && ready.epoch <= self.finished_epoch {
            let (nonce, epoch) = (ready.nonce, ready.epoch);
            out.tell(from, RoundMessage::LeftOut { nonce, epoch, attempt: 0 });
            return;
        }
        self.answer(now, from, out);
        if self.ready.len() < READY_MAX || self.ready.contains_key(&from) {
            self.ready.insert(from, (now, ready));
        }
    }

    fn on_begin(&mut self, from: PeerId, plan: Plan, out: &mut Out) {
        let hash = plan.hash();
        if self.current.as_ref().is_some_and(|current| current.hash == hash)
            || self.recent.iter().any(|(recent, _)| *recent == hash)
        {
            return;
        }
        let known = plan.run == self.run && plan.channel == self.channel && plan.index_of(from).is_some();
        let mine = plan.members.iter().find(|m| m.peer == self.me);
        let sound = known && mine.is_some() && plan.members.is_sorted_by(|a, b| a.peer < b.peer);
        if !sound {
            return;
        }
        let wanted = self.current.is_none()
            && self.wish.as_ref().zip(mine).is_some_and(|(wish, mine)| {
                wish.ready.nonce == mine.nonce
                    && wish.ready.epoch == plan.epoch
                    && plan.attempt >= wish.ready.attempt
            });
        if wanted {
            let _begun = self.accept(Arc::new(plan));
        } else {
            let others = plan.members.iter().map(|m| m.peer).filter(|peer| *peer != self.me);
            out.tell_all(others, RoundMessage::Withdraw { plan: hash });
        }
    }

    fn on_done(&mut self, from: PeerId, plan: PlanHash, digests: Vec<[u8; 32]>, out: &mut Out) {
        if let Some(current) = self.current.as_mut().filter(|c| c.phase == plan) {
            if let Some(agreed) = &current.agreed {
                out.tell(from, verdict(plan, agreed));
            } else if current.plan.index_of(from).is_some() {
                current.done.insert(from, digests);
            }
        } else if let Some(agreed) = self.past(&plan) {
            out.tell(from, verdict(plan, agreed));
        }
    }

    /// Messages about who is in the round get lost with links. Members that are lost to us are told: having noticed
    /// nothing, they may wait for us. The others are asked now and then: we may wait for one that has gone.
    pub(crate) fn keep_in_touch(&mut self, now: Instant, lost: &[PeerId], out: &mut Out) {
        let Some(current) = &mut self.current else { return };
        if now >= *current.probed.get_or_insert(now) + PROBE {
            current.probed = Some(now);
            let others = current.plan.members.iter().map(|m| m.peer).filter(|peer| *peer != self.me);
            let asked = others.filter(|peer| !lost.contains(peer));
            out.tell_all(asked, RoundMessage::Query { plan: current.hash });
        }
        for peer in lost {
            if current.disowned.get(peer).is_none_or(|at| now >= *at + REPEAT) {
                current.disowned.insert(*peer, now);
                out.tell(*peer, RoundMessage::Withdraw { plan: current.hash });
            }
        }
    }

    /// Members that gave the current round up.
    pub(crate) fn withdrawn(&self) -> Vec<PeerId> {
        self.current.as_ref().map(|c| c.withdrawn.iter().copied().collect()).unwrap_or_default()
    }

    /// The phase was agreed on; the next one of the same plan begins, under this name.
    pub(crate) fn next_phase(&mut self, name: PlanHash) {
        let Some(current) = &mut self.current else { return };
        let Some(agreed) = current.agreed.take() else { return };
        current.earlier.push((std::mem::replace(&mut current.phase, name), agreed));
        current.done.clear();
        current.own = None;
        current.authority = None;
        current.told_at = None;
    }

    /// There is nothing to agree on, as all members know from the plan.
    pub(crate) fn settle(&mut self) {
        if let Some(current) = &mut self.current {
            let holders = current.plan.members.iter().map(|member| member.peer).collect();
            current.agreed.get_or_insert(Agreed { digests: Vec::new(), holders });
        }
    }

    /// We hold every part.
    pub(crate) fn finished(&mut self, now: Instant, digests: Vec<[u8; 32]>) {
        if let Some(current) = &mut self.current {
            current.own.get_or_insert((now, digests));
        }
    }

    /// Work towards agreement on the current round; `patience` is how long stragglers are waited for.
    pub(crate) fn agree(
        &mut self,
        now: Instant,
        alive: impl Fn(&PeerId) -> bool,
        patience: Duration,
        out: &mut Out,
    ) -> Option<Agreed> {
        let me = self.me;
        let current = self.current.as_mut()?;
        if current.agreed.is_some() {
            return current.agreed.clone();
        }
        let lives = |peer: &PeerId| *peer == me || (alive(peer) && !current.withdrawn.contains(peer));
        let plan = &current.plan;
        // Whoever made the plan decides what was agreed, and after it the others in their order.
        let successor = || {
            let members = plan.members.iter().map(|member| member.peer);
            let order = coordinators(&self.run, &self.channel, plan.epoch, members);
            order.into_iter().find(lives).unwrap_or(me)
        };
        let authority = if lives(&plan.coordinator) { plan.coordinator } else { successor() };
        let mut others = plan.members.iter().map(|m| m.peer).filter(|p| *p != me && lives(p));
        if current.authority != Some(authority) {
            if current.authority.is_some() || authority != plan.coordinator {
                // Somebody may not know the plan: its coordinator is gone.
                out.tell_all(others.clone(), RoundMessage::Begin(Box::new((**plan).clone())));
                if authority == me {
                    out.tell_all(others.clone(), RoundMessage::Query { plan: current.phase });
                }
            }
            current.authority = Some(authority);
            current.told_at = None;
        }
        let (since, own) = current.own.clone()?;
        if authority != me {
            if current.told_at.is_none_or(|at| now >= at + REPEAT) {
                current.told_at = Some(now);
                out.tell(authority, RoundMessage::Done { plan: current.phase, digests: own });
            }
            return None;
        }
        let complete = others.all(|peer| current.done.contains_key(&peer));
        if !complete && now < since + patience {
            return None;
        }
        current.done.insert(me, own);
        let agreed = majority(me, &current.done);
        let members = plan.members.iter().map(|m| m.peer).filter(|peer| *peer != me);
        out.tell_all(members, verdict(current.phase, &agreed));
        current.agreed = Some(agreed.clone());
        Some(agreed)
    }
}

fn verdict(plan: PlanHash, agreed: &Agreed) -> RoundMessage {
    RoundMessage::Verdict { plan, digests: agreed.digests.clone(), holders: agreed.holders.clone() }
}
