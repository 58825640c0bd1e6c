//! What a round does once it is wished for: gather the group, move the bytes of each phase, agree, decode.
//!
//! A round has one phase, or two that average two vectors with the same plan: the second vector follows from what the
//! group agreed on in the first, and the name of the second phase from that agreement, so that peers which went on with
//! different averages never mix. While the second phase runs, the first is still served to whoever lacks some of it.

use crate::averager::{Averager, Between, RoundErrorKind, RoundRequest, RoundStats};
use crate::detector::HEARTBEAT;
use crate::exchange::Exchange;
use crate::pair::Event;
use crate::record::{Cut, Record};
use crate::spans::{Chunk, Layout};
use crate::station::{Agreed, Gathering, Out, PlanHash};
use crate::view::Member;
use crate::wire::{Plan, PlanMember};
use bytes::Bytes;
use potluck_compression::TensorInfo;
use potluck_net::{FaultKind, PeerFault, PeerId};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// While a round is under way, this often at least its members are looked after.
const LOOK: Duration = Duration::from_millis(250);

/// What we put into a round.
pub(crate) struct Own {
    pub(crate) vector: Arc<Vec<f32>>,
    /// Memory for the average.
    pub(crate) spare: Vec<f32>,
    /// It is not finite: we take part without it.
    pub(crate) bad: bool,
    pub(crate) between: Option<Arc<Between>>,
}

pub(crate) enum Finished {
    Alone,
    /// Everybody has the same vector.
    Unchanged {
        plan: Arc<Plan>,
        hash: PlanHash,
        stats: RoundStats,
    },
    Averaged {
        average: Vec<f32>,
        second: Vec<f32>,
        plan: Arc<Plan>,
        hash: PlanHash,
        result: [u8; 32],
        contributors: u64,
        record: Record,
        stats: RoundStats,
    },
}

/// A phase that the group has agreed on.
struct Phase {
    average: Vec<f32>,
    /// Members that are in every chunk.
    contributors: u64,
    agreed: Agreed,
    encoded: Vec<Bytes>,
}

/// Whether another process than the one that promised to take part is there now. It owes nothing, and nobody may wait
/// for its predecessor. A plan may also be ahead of the heartbeats, so these get the time to follow.
fn is_restarted(now: &Member, nonce: u64, age: Duration) -> bool {
    let promised = nonce >> 32;
    // 0: not known yet.
    age > HEARTBEAT * 2 && now.process != 0 && promised != 0 && u64::from(now.process) != promised
}

/// Whether all who have a vector named the same one. Everybody sees the same plan and so comes to the same answer.
fn have_the_same(plan: &Plan) -> bool {
    let mut named = plan.members.iter().filter(|member| !member.auxiliary).map(|member| &member.gathered);
    let first = named.next();
    first.is_some_and(|first| !first.is_empty() && named.all(|other| other == first))
}

/// A bit for each member.
pub(crate) fn everybody(plan: &Plan) -> u64 {
    u64::MAX >> (64 - plan.members.len().clamp(1, 64))
}

impl Averager {
    pub(crate) async fn round(
        &self,
        request: &RoundRequest,
        own: Own,
        started: Instant,
        deadline: Instant,
        faults: &mut Vec<PeerFault>,
    ) -> Result<Finished, RoundErrorKind> {
        let env = &self.channel.swarm.env;
        let Some((plan, hash)) = self.gather(deadline).await? else {
            return if own.bad { Err(RoundErrorKind::Empty) } else { Ok(Finished::Alone) };
        };
        if plan.members.iter().all(|member| member.weight == 0.0) {
            return Err(RoundErrorKind::Empty);
        }
        tracing::debug!(target: "potluck::round", channel = %self.channel.name, epoch = ?request.epoch,
            members = plan.members.len(), "round begins");
        let mut stats =
            RoundStats { gather_seconds: (env.now() - started).as_secs_f64(), ..RoundStats::default() };
        if request.gather_names_vector && have_the_same(&plan) {
            self.channel.station().settle();
            return Ok(Finished::Unchanged { plan, hash, stats });
        }
        let mut first = self.start(&plan, (hash, 0), &self.config.tensors, own.vector, own.spare);
        let phase = self.phase(&mut first, None, &plan, deadline, &mut stats, faults).await?;
        let (average, mut contributors) = (phase.average, phase.contributors);
        let mut agreed = phase.agreed.digests.clone();
        let mut phases = vec![phase.encoded];
        let mut second = Vec::new();
        if let Some(tensors) = &self.config.second {
            let (average, between) = (average.clone(), own.between);
            let made = match between {
                Some(between) => env.offload(move || between(&average)).await,
                None => Ok(Vec::new()),
            };
            let made = made.map_err(|reason| RoundErrorKind::Unusable { reason })?;
            self.check_second(made.len(), tensors)?;
            let hash = second_name(&hash, &phase.agreed);
            self.channel.station().next_phase(hash);
            let mut exchange = self.start(&plan, (hash, 1), tensors, Arc::new(made), Vec::new());
            self.inherit_losses(&first, &mut exchange).await;
            let phase =
                self.phase(&mut exchange, Some(&mut first), &plan, deadline, &mut stats, faults).await?;
            second = phase.average;
            contributors &= phase.contributors;
            agreed.extend(phase.agreed.digests);
            phases.push(phase.encoded);
        }
        let contributors = contributors & everybody(&plan);
        let result = result_name(&hash, &agreed);
        let shares = plan.members.iter().map(|member| member.share).collect();
        let record = Record { cut: Cut { shares, chunk_bytes: plan.chunk_bytes }, phases };
        Ok(Finished::Averaged { average, second, plan, hash, result, contributors, record, stats })
    }

    fn check_second(&self, values: usize, tensors: &[TensorInfo]) -> Result<(), RoundErrorKind> {
        let auxiliary = self.channel.swarm.config.auxiliary;
        let expected: usize = if auxiliary { 0 } else { tensors.iter().map(TensorInfo::numel).sum() };
        if values == expected {
            return Ok(());
        }
        let reason = format!("{values} values, {expected} expected");
        Err(RoundErrorKind::Request { field: "second", reason })
    }

    fn start(
        &self,
        plan: &Arc<Plan>,
        name: (PlanHash, u8),
        tensors: &[TensorInfo],
        vector: Arc<Vec<f32>>,
        output: Vec<f32>,
    ) -> Exchange {
        let shares: Vec<u32> = plan.members.iter().map(|member| member.share).collect();
        let cut = Layout::cut(tensors, &self.config.compression, &shares, plan.chunk_bytes);
        let swarm = &self.channel.swarm;
        // Our own part's averages last for the round; to each member a contribution or two are on their way.
        let layout = &cut.0;
        let (members, chunk) = (plan.members.len(), layout.chunks.first().map_or(0, Chunk::encoded_bytes));
        swarm.pool.keep(layout.encoded_bytes() / members.max(1) + 2 * chunk * members);
        Exchange::start(swarm, plan, name, cut, vector, output)
    }

    /// Whoever was lost in the first phase may have gone on with another average of it: not a member of the second.
    async fn inherit_losses(&self, first: &Exchange, second: &mut Exchange) {
        let lost = first.shared.board().lost.clone();
        for (member, _) in lost.iter().enumerate().filter(|(_, lost)| **lost) {
            second.lose(member, FaultKind::Left, "").await;
        }
        // They were reported once.
        second.faults.clear();
    }

    /// One phase from its first byte to the decoded average; adds its figures to those of the round.
    async fn phase(
        &self,
        exchange: &mut Exchange,
        earlier: Option<&mut Exchange>,
        plan: &Plan,
        deadline: Instant,
        stats: &mut RoundStats,
        faults: &mut Vec<PeerFault>,
    ) -> Result<Phase, RoundErrorKind> {
        let env = &self.channel.swarm.env;
        let begun = env.now();
        let ended = self.exchange(exchange, earlier, plan, deadline).await;
        faults.append(&mut exchange.faults);
        let (finished_at, agreed) = ended?;
        stats.transfer_seconds += (finished_at - begun).as_secs_f64();
        let auxiliary = self.channel.swarm.config.auxiliary;
        let average = std::mem::take(&mut exchange.vector);
        let contributors = {
            let store = &exchange.shared.board().store;
            if !auxiliary {
                let checked = store.check(&exchange.shared.layout);
                checked.map_err(|reason| RoundErrorKind::Diverged { reason })?;
            }
            let masks = store.parts.iter().flat_map(|part| &part.done).map(|average| average.mask);
            masks.fold(u64::MAX, |all, mask| all & mask)
        };
        stats.agree_seconds += (env.now() - finished_at).as_secs_f64();
        stats.encoded_bytes += exchange.shared.layout.encoded_bytes() as u64;
        stats.parts_reassigned += exchange.reassigned;
        stats.saturated += exchange.shared.saturated.load(Ordering::Relaxed);
        let board = exchange.shared.board();
        stats.bytes_sent += board.traffic.sent;
        stats.bytes_received += board.traffic.received;
        let encoded = if auxiliary { Vec::new() } else { board.store.encoded() };
        Ok(Phase { average, contributors, agreed, encoded })
    }

    async fn gather(&self, deadline: Instant) -> Result<Option<(Arc<Plan>, PlanHash)>, RoundErrorKind> {
        let channel = &self.channel;
        loop {
            let now = channel.swarm.env.now();
            let mut out = Out::default();
            let state = {
                let view = channel.swarm.current_view();
                channel.station().gather(now, &view, &mut out)
            };
            channel.deliver(out);
            let wakeup = match state {
                Gathering::Wait(at) => at,
                Gathering::Alone => return Ok(None),
                Gathering::Begun(plan, hash) => return Ok(Some((plan, hash))),
                Gathering::LeftOut => return Err(RoundErrorKind::LeftOut),
            };
            if now >= deadline {
                return Err(RoundErrorKind::TimedOut { phase: "waiting for the group" });
            }
            tokio::select! {
                biased;
                () = channel.changed.notified() => {}
                () = tokio::time::sleep_until(wakeup.min(deadline)) => {}
            }
        }
    }

    /// Move the bytes until the group has agreed and we hold what it agreed on. Returns when we first held everything.
    async fn exchange(
        &self,
        exchange: &mut Exchange,
        mut earlier: Option<&mut Exchange>,
        plan: &Plan,
        deadline: Instant,
    ) -> Result<(Instant, Agreed), RoundErrorKind> {
        let channel = &self.channel;
        let begun = channel.swarm.env.now();
        let mut finished_at = None;
        let (mut looked, mut generation) = (None, 0);
        let mut known = vec![false; plan.members.len()];
        exchange.kick().await;
        loop {
            let now = channel.swarm.env.now();
            // Most events are frames, which make nobody leave.
            let withdrawn = channel.station().withdrawn();
            let newest = channel.swarm.current_view().generation;
            let due = looked.is_none_or(|looked| now >= looked + LOOK) || generation != newest;
            if due || !withdrawn.is_empty() {
                (looked, generation) = (Some(now), newest);
                self.lose_the_gone(exchange, plan, &withdrawn, &mut known, now - begun).await;
                if let Some(earlier) = &mut earlier {
                    self.lose_the_gone(earlier, plan, &withdrawn, &mut known, now - begun).await;
                }
            }
            if finished_at.is_none() && exchange.is_complete() {
                finished_at = Some(now);
                let auxiliary = channel.swarm.config.auxiliary;
                let digests = if auxiliary { Vec::new() } else { exchange.shared.board().store.digests() };
                channel.station().finished(now, digests);
            }
            let spent = finished_at.unwrap_or(now) - begun;
            let lost = exchange.lost();
            if lost.len() * 2 > plan.members.len() {
                return Err(RoundErrorKind::CutOff { lost: lost.len(), members: plan.members.len() });
            }
            if let Some(part) = exchange.out_of_reach() {
                let reason = format!("whoever holds part {part} as it was agreed on is lost");
                return Err(RoundErrorKind::Diverged { reason });
            }
            let mut out = Out::default();
            channel.station().keep_in_touch(now, &lost, &mut out);
            let agreed = {
                let view = channel.swarm.current_view();
                // Not those who were lost, even if they are back: they may wait for what nobody sends them any more, or
                // have another first phase.
                let lives = |peer: &PeerId| view.members.contains_key(peer) && !lost.contains(peer);
                channel.station().agree(now, lives, spent.max(Duration::from_secs(2)) * 2, &mut out)
            };
            channel.deliver(out);
            if let (Some(agreed), Some(finished)) = (agreed, finished_at)
                && self.conforms(exchange, plan, &agreed)?
            {
                return Ok((finished, agreed));
            }
            if now >= deadline {
                return Err(RoundErrorKind::TimedOut { phase: "averaging" });
            }
            let tick = (now + LOOK).min(deadline);
            tokio::select! {
                biased;
                event = exchange.next_event() => exchange.handle(event).await,
                event = event_of(&mut earlier) => if let Some(earlier) = &mut earlier {
                    earlier.handle(event).await;
                },
                () = channel.changed.notified() => {}
                () = tokio::time::sleep_until(tick) => {}
            }
        }
    }

    async fn lose_the_gone(
        &self,
        exchange: &mut Exchange,
        plan: &Plan,
        withdrawn: &[PeerId],
        known: &mut [bool],
        age: Duration,
    ) {
        let channel = &self.channel;
        let gone: Vec<(usize, FaultKind)> = {
            let view = channel.swarm.current_view();
            let mut kind = |at: usize, member: &PlanMember| {
                if withdrawn.contains(&member.peer) {
                    return Some(FaultKind::Left);
                }
                let gone = match view.members.get(&member.peer) {
                    Some(now) => {
                        known[at] = true;
                        is_restarted(now, member.nonce, age)
                    }
                    // A newcomer, of whom the plan says more than has come to us yet, or one whom we lost.
                    None => known[at] || age > HEARTBEAT * 2,
                };
                gone.then_some(FaultKind::Silent)
            };
            let others =
                plan.members.iter().enumerate().filter(|(_, member)| member.peer != channel.swarm.me);
            others.filter_map(|(at, member)| Some((at, kind(at, member)?))).collect()
        };
        for (at, kind) in gone {
            exchange.lose(at, kind, "").await;
        }
    }

    /// Whether we hold what was agreed; parts that differ are fetched again.
    fn conforms(
        &self,
        exchange: &mut Exchange,
        plan: &Plan,
        agreed: &Agreed,
    ) -> Result<bool, RoundErrorKind> {
        if self.channel.swarm.config.auxiliary {
            return Ok(true);
        }
        if !exchange.is_complete() {
            return Ok(false);
        }
        let own = exchange.shared.board().store.digests();
        let mut conforms = true;
        for (part, (ours, theirs)) in own.iter().zip(&agreed.digests).enumerate() {
            if ours == theirs {
                continue;
            }
            conforms = false;
            let holder = agreed.holders.get(part).and_then(|peer| plan.index_of(*peer));
            match holder.filter(|holder| *holder != exchange.shared.me) {
                Some(holder) => exchange.refetch(part, holder),
                None => {
                    let reason = format!("nobody is named for part {part}");
                    return Err(RoundErrorKind::Diverged { reason });
                }
            }
        }
        Ok(conforms)
    }
}

async fn event_of(exchange: &mut Option<&mut Exchange>) -> Event {
    match exchange {
        Some(exchange) => exchange.next_event().await,
        None => futures::future::pending().await,
    }
}

/// Names the plan and what came out of it. A peer that was cut off may have finished the same plan with fewer senders,
/// and must then have another history.
fn result_name(plan: &PlanHash, agreed: &[[u8; 32]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("potluck round result v2");
    hasher.update(plan);
    for digest in agreed {
        hasher.update(digest);
    }
    *hasher.finalize().as_bytes()
}

/// Names the second phase of a plan after what the group agreed on in the first.
fn second_name(plan: &PlanHash, agreed: &Agreed) -> PlanHash {
    let mut hasher = blake3::Hasher::new_derive_key("potluck second phase 1");
    hasher.update(plan);
    for digest in &agreed.digests {
        hasher.update(digest);
    }
    *hasher.finalize().as_bytes()
}
