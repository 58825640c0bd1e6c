//! What a node does unasked: join, meet newcomers, hand records on, keep its table fresh. One task, one timer.

use crate::entry::{Entry, Moment, Origin};
use crate::id::DhtId;
use crate::node::{News, Node};
use crate::search::Until;
use crate::server::COPY_SLACK;
use crate::table::Contact;
use crate::wire::{Ask, MESSAGE_BYTES_MAX, WireRecord};
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
/// Records of one hand-over message.
const HAND_OVER_RECORDS: usize = 4096;
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
}

/// What a job came to.
enum Done {
    /// An attempt to join.
    Join {
        /// Whether we know anybody now.
        joined: bool,
    },
    /// Anything else.
    Other,
}

impl Schedule {
    fn note(&mut self, node: &Node, done: Done) {
        if let Done::Join { joined } = done {
            self.rejoin_pause = if joined { REJOIN_MAX } else { (self.rejoin_pause * 2).min(REJOIN_MAX) };
            self.rejoin = node.now() + self.rejoin_pause.mul_f64(0.75 + 0.5 * fraction(node));
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
        if now >= at {
            let rank = state.table.rank(&id, node.config.num_replicas);
            let pause = node.config.republish_interval * (1 + rank as u32);
            schedule.republish.insert(id, now + pause);
            due.push(id);
        }
    }
    drop(state);
    if !due.is_empty() {
        jobs.push(Box::pin(republish(node.clone(), due).map(|()| Done::Other)));
    }
}

/// Make sure that each key has its replicas, by what our own table says is near: the neighbourhood of a key is where a
/// holder's table is dense.
async fn republish(node: Arc<Node>, due: Vec<DhtId>) {
    for id in due {
        let (nearest, batches) = {
            let state = node.state();
            let nearest = state.table.nearest(&id, node.config.bucket_size, None);
            let Some((name, entry)) = state.storage.slot(&id) else { continue };
            (nearest, batches(records(name, entry, node.now())))
        };
        for batch in batches {
            let mut faults = Vec::new();
            let origin = Origin::Holder(COPY_SLACK);
            node.place(&nearest, batch, Moment::MAX, origin, &mut faults).await;
        }
    }
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
    let now = node.now();
    let mut share = Vec::new();
    {
        let state = node.state();
        for (id, name, entry) in state.storage.iter() {
            let distance = |contact: &Contact| contact.id.distance(id);
            let neighbours = state.table.nearest(id, node.config.num_replicas, Some(&newcomer.id));
            let belongs = match (neighbours.first(), neighbours.last()) {
                (Some(first), Some(last)) => {
                    node.id.distance(id) < distance(first) && distance(&newcomer) < distance(last)
                }
                _ => true,
            };
            if belongs {
                share.extend(records(name, entry, now));
            }
        }
    }
    for records in batches(share) {
        if node.ask(&newcomer, Ask::Store { handed_on: true, records }).await.is_err() {
            return;
        }
    }
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

/// Cut a list of records into messages.
fn batches(records: Vec<WireRecord>) -> Vec<Vec<WireRecord>> {
    let mut batches: Vec<Vec<WireRecord>> = Vec::new();
    let mut bytes = 0;
    for record in records {
        let subkey_len = record.subkey.as_ref().map_or(0, Bytes::len);
        let cost = record.key.len() + subkey_len + record.value.len() + RECORD_OVERHEAD;
        match batches.last_mut() {
            Some(batch) if bytes + cost <= HAND_OVER_BYTES && batch.len() < HAND_OVER_RECORDS => {
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
