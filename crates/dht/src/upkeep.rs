//! What a node does unasked: join, meet newcomers, hand records on, keep its table fresh. One task, one timer.

use crate::entry::{Entry, Moment, Origin};
use crate::id::DhtId;
use crate::node::{News, Node};
use crate::search::Until;
use crate::server::{COPY_SLACK, store_cost};
use crate::table::Contact;
use crate::wire::{Ask, MESSAGE_BYTES_MAX, RECORDS_MAX, WireRecord};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use potluck_net::PeerId;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// First pause after nobody answered; doubles.
const REJOIN_FIRST: Duration = Duration::from_secs(1);
/// Longest pause between attempts to join, and pause between pings of initial peers that are missing from the table.
const REJOIN_MAX: Duration = Duration::from_secs(30);
/// An attempt to join is over by then: one question and one search.
const JOIN_MAX: Duration = Duration::from_secs(600);
/// Upkeep jobs (ping-backs, hand-overs) at a time; more wait in the bounded queue of news.
const JOBS_MAX: usize = 32;
/// A contact that was silent for this long is asked for a sign of life, one per tick.
const SILENT_MAX: Duration = Duration::from_secs(60);
/// Bytes of one hand-over message.
const HAND_OVER_BYTES: usize = MESSAGE_BYTES_MAX / 2;
/// Keys that are gathered at a time: each is compared with everybody in the table.
const GATHERED_MAX: usize = 256;
/// What upkeep takes of the rate that others allow us; the rest is for questions.
const RATE_SHARE: f64 = 0.5;
/// What a record costs on the wire besides its strings.
const RECORD_OVERHEAD: usize = 32;

/// When what is due.
struct Schedule {
    rejoin: Moment,
    rejoin_pause: Duration,
    refresh: Moment,
    tick: Moment,
    /// When each key is handed on next.
    republish: BTreeMap<DhtId, Moment>,
    /// Keys are being handed on; what is due meanwhile waits for the next tick.
    is_republishing: bool,
}

/// What a job came to.
enum Done {
    /// An attempt to join.
    Join {
        /// Whether we know anybody now.
        joined: bool,
    },
    /// What was due has been handed on.
    Republish,
    /// Anything else.
    Other,
}

impl Schedule {
    fn note(&mut self, node: &Node, done: Done) {
        match done {
            Done::Join { joined } => {
                self.rejoin_pause = if joined { REJOIN_MAX } else { (self.rejoin_pause * 2).min(REJOIN_MAX) };
                self.rejoin = node.now() + self.rejoin_pause.mul_f64(0.75 + 0.5 * fraction(node));
            }
            Done::Republish => self.is_republishing = false,
            Done::Other => {}
        }
    }
}

/// Run the upkeep of a node until it is dropped.
pub(crate) async fn run(node: Arc<Node>, mut news: mpsc::Receiver<News>) {
    let mut schedule = Schedule {
        rejoin: Moment::ZERO,
        rejoin_pause: REJOIN_FIRST,
        refresh: node.config.refresh_interval,
        tick: node.config.republish_interval.mul_f64(0.25 + 0.25 * fraction(&node)),
        republish: BTreeMap::new(),
        is_republishing: false,
    };
    let mut jobs: FuturesUnordered<BoxFuture<'static, Done>> = FuturesUnordered::new();
    loop {
        let due = schedule.rejoin.min(schedule.refresh).min(schedule.tick);
        tokio::select! {
            biased;
            Some(done) = jobs.next() => schedule.note(&node, done),
            () = tokio::time::sleep_until(node.instant(due)) => {}
            Some(item) = news.recv(), if jobs.len() < JOBS_MAX => jobs.push(Box::pin(react(node.clone(), item).map(|()| Done::Other))),
        }
        if node.now() >= due {
            on_time(&node, &mut schedule, &mut jobs);
        }
    }
}

/// A random number in [0, 1), so that nodes do not act in step.
fn fraction(node: &Node) -> f64 {
    (node.env.random_u64() >> 11) as f64 / (1u64 << 53) as f64
}

fn on_time(node: &Arc<Node>, schedule: &mut Schedule, jobs: &mut FuturesUnordered<BoxFuture<'static, Done>>) {
    let now = node.now();
    if now >= schedule.rejoin {
        // Its end sets the next one.
        schedule.rejoin = now + JOIN_MAX;
        let node = node.clone();
        jobs.push(Box::pin(async move { Done::Join { joined: join(&node).await } }));
    }
    if now >= schedule.refresh {
        schedule.refresh = now + node.config.refresh_interval.mul_f64(0.75 + 0.5 * fraction(node));
        let node = node.clone();
        jobs.push(Box::pin(async move {
            drop(node.search(node.id, None, Until::All).await);
            let anywhere = DhtId::of_key(&node.env.random_bytes::<20>());
            drop(node.search(anywhere, None, Until::All).await);
            Done::Other
        }));
    }
    if now >= schedule.tick {
        schedule.tick = now + node.config.republish_interval.mul_f64(0.2 + 0.1 * fraction(node));
        tick(node, schedule, jobs);
    }
}

/// Ask the initial peers that we do not know yet; once somebody answers, find our neighbours. True if we know anybody.
async fn join(node: &Arc<Node>) -> bool {
    let was_empty = node.state().table.is_empty();
    let missing = node.config.initial_peers.iter().filter(|peer| {
        **peer != node.transport.local_peer() && !node.state().table.contains(&DhtId::of_peer(**peer))
    });
    let asked: Vec<PeerId> = missing.copied().collect();
    let answers = asked.into_iter().map(|peer| {
        let contact = Contact { id: DhtId::of_peer(peer), peer, addresses: Arc::new([]) };
        async move {
            if let Err(fault) = node.ask(&contact, Ask::Ping).await {
                tracing::info!(target: "potluck::dht", %fault, "an initial peer does not answer; trying again later");
            }
        }
    });
    futures::future::join_all(answers).await;
    let joined = !node.state().table.is_empty();
    if was_empty && joined {
        drop(node.search(node.id, None, Until::All).await);
    }
    joined
}

/// The regular round: forget what expired, hand on what is due, ask the node that was silent for longest.
fn tick(node: &Arc<Node>, schedule: &mut Schedule, jobs: &mut FuturesUnordered<BoxFuture<'static, Done>>) {
    let now = node.now();
    let mut state = node.state();
    state.storage.expire(now);
    if let Some((contact, seen)) = state.table.oldest()
        && now.saturating_sub(seen) > SILENT_MAX
    {
        let (node, contact) = (node.clone(), contact.clone());
        jobs.push(Box::pin(async move {
            drop(node.ask(&contact, Ask::Ping).await);
            Done::Other
        }));
    }
    let ids: Vec<DhtId> = state.storage.iter().map(|(id, ..)| *id).collect();
    schedule.republish.retain(|id, _| state.storage.slot(id).is_some());
    let mut due = Vec::new();
    for id in ids {
        let at = *schedule.republish.entry(id).or_insert(now + node.config.republish_interval / 2);
        if now >= at && !schedule.is_republishing {
            let rank = state.table.rank(&id, node.config.num_replicas);
            let pause = node.config.republish_interval * (1 + rank as u32);
            schedule.republish.insert(id, now + pause);
            due.push(id);
        }
    }
    drop(state);
    if !due.is_empty() {
        schedule.is_republishing = true;
        jobs.push(Box::pin(republish(node.clone(), due).map(|()| Done::Republish)));
    }
}

/// Make sure that each key has its replicas, by what our own table says is near: the neighbourhood of a key is where a
/// holder's table is dense. Keys with the same replicas travel together.
async fn republish(node: Arc<Node>, due: Vec<DhtId>) {
    for ids in due.chunks(GATHERED_MAX) {
        let gathered = node.now();
        for (nearest, records) in gather(&node, ids) {
            for batch in batches(records) {
                let batch = aged(batch, node.now() - gathered);
                let count = batch.len();
                let mut faults = Vec::new();
                let origin = Origin::Holder(COPY_SLACK);
                node.place(&nearest, batch, Moment::MAX, origin, &mut faults).await;
                pause_after(&node, count).await;
            }
        }
    }
}

/// The records under these keys, by who should hold them.
fn gather(node: &Node, ids: &[DhtId]) -> Vec<(Vec<Contact>, Vec<WireRecord>)> {
    let now = node.now();
    let state = node.state();
    let mut groups = BTreeMap::new();
    for id in ids {
        let Some((name, entry)) = state.storage.slot(id) else { continue };
        let nearest = state.table.nearest(id, node.config.bucket_size, None);
        let mut replicas: Vec<PeerId> =
            nearest.iter().take(node.config.num_replicas).map(|contact| contact.peer).collect();
        replicas.sort_unstable();
        let (_, group) = groups.entry(replicas).or_insert_with(|| (nearest, Vec::new()));
        group.extend(records(name, entry, now));
    }
    groups.into_values().collect()
}

/// A long hand-over stays within the rate that a receiver allows, if its settings are like ours.
async fn pause_after(node: &Node, records: usize) {
    let requests = store_cost(records);
    tokio::time::sleep(Duration::from_secs_f64(requests / (node.config.requests_per_second * RATE_SHARE)))
        .await;
}

async fn react(node: Arc<Node>, item: News) {
    match item {
        News::Stranger(contact) => {
            let known = node.state().table.contains(&contact.id);
            if !known {
                // A success puts it into the table.
                drop(node.ask(&contact, Ask::Ping).await);
            }
        }
        // A failure removes it from the table and lets a replacement in.
        News::Doubtful(contact) => drop(node.ask(&contact, Ask::Ping).await),
        News::Joined(contact) => hand_over(&node, contact).await,
    }
}

/// hivemind's rule: the holder that is nearest to a key gives it to a newcomer that belongs among its replicas.
async fn hand_over(node: &Node, newcomer: Contact) {
    let ids: Vec<DhtId> = node.state().storage.iter().map(|(id, ..)| *id).collect();
    for ids in ids.chunks(GATHERED_MAX) {
        let gathered = node.now();
        for records in batches(share(node, &newcomer, ids)) {
            let records = aged(records, node.now() - gathered);
            let count = records.len();
            if node.ask(&newcomer, Ask::Store { handed_on: true, records }).await.is_err() {
                return;
            }
            pause_after(node, count).await;
        }
        tokio::task::yield_now().await;
    }
}

/// What of these keys belongs to a newcomer and is ours to give.
fn share(node: &Node, newcomer: &Contact, ids: &[DhtId]) -> Vec<WireRecord> {
    let now = node.now();
    let state = node.state();
    let mut share = Vec::new();
    for id in ids {
        let Some((name, entry)) = state.storage.slot(id) else { continue };
        let distance = |contact: &Contact| contact.id.distance(id);
        let neighbours = state.table.nearest(id, node.config.num_replicas, Some(&newcomer.id));
        let belongs = match (neighbours.first(), neighbours.last()) {
            (Some(first), Some(last)) => {
                node.id.distance(id) < distance(first) && distance(newcomer) < distance(last)
            }
            _ => true,
        };
        if belongs {
            share.extend(records(name, entry, now));
        }
    }
    share
}

fn records(name: &Bytes, entry: &Entry, now: Moment) -> Vec<WireRecord> {
    let items = entry.clone().live(now).map(Entry::into_items).unwrap_or_default();
    let record = |(subkey, item): (Option<Bytes>, crate::entry::Item)| WireRecord {
        key: name.clone(),
        subkey,
        value: item.value,
        left: item.expires.saturating_sub(now),
    };
    items.into_iter().map(record).collect()
}

/// What is left of records that waited for their turn: waiting must not prolong a life.
fn aged(mut records: Vec<WireRecord>, waited: Duration) -> Vec<WireRecord> {
    records.iter_mut().for_each(|record| record.left = record.left.saturating_sub(waited));
    records.retain(|record| !record.left.is_zero());
    records
}

/// Cut a list of records into messages.
fn batches(records: Vec<WireRecord>) -> Vec<Vec<WireRecord>> {
    let mut batches: Vec<Vec<WireRecord>> = Vec::new();
    let mut bytes = 0;
    for record in records {
        let subkey_len = record.subkey.as_ref().map_or(0, Bytes::len);
        let cost = record.key.len() + subkey_len + record.value.len() + RECORD_OVERHEAD;
        match batches.last_mut() {
            Some(batch) if bytes + cost <= HAND_OVER_BYTES && batch.len() < RECORDS_MAX => {
                bytes += cost;
                batch.push(record);
            }
            _ => {
                bytes = cost;
                batches.push(vec![record]);
            }
        }
    }
    batches
}
