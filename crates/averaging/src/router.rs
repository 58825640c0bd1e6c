//! Streams of rounds: accepted once per run, handed to the round that their first frame names.

use crate::swarm::{Inner, run_protocol};
use crate::wire::PairFrame;
use potluck_net::{Incoming, Protocol, Stream};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Streams that arrived before their plan; more are refused.
const PARKED_MAX: usize = 128;
/// How long they may wait for it.
const PARKED_FOR: Duration = Duration::from_secs(5);
/// Time for a stream's first frame.
const FIRST_FRAME_TIMEOUT: Duration = Duration::from_secs(5);

/// A round and its phase.
pub(crate) type RoundKey = ([u8; 32], u8);

/// A stream with its first frame.
pub(crate) struct Arrival {
    pub(crate) stream: Stream,
    pub(crate) contributions: Vec<(u16, u32)>,
    pub(crate) averages: Vec<(u16, u32)>,
}

#[derive(Default)]
pub(crate) struct Router {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    rounds: BTreeMap<RoundKey, mpsc::Sender<Arrival>>,
    parked: Vec<(Instant, RoundKey, Arrival)>,
}

impl Router {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Streams of a round, from now until [`Router::remove`].
    pub(crate) fn register(&self, key: RoundKey) -> mpsc::Receiver<Arrival> {
        let (sender, receiver) = mpsc::channel(PARKED_MAX);
        let mut state = self.lock();
        let (ours, others) = std::mem::take(&mut state.parked).into_iter().partition(|(_, of, _)| *of == key);
        state.parked = others;
        for (_, _, arrival) in ours {
            let _too_many = sender.try_send(arrival);
        }
        state.rounds.insert(key, sender);
        receiver
    }

    pub(crate) fn remove(&self, key: &RoundKey) {
        self.lock().rounds.remove(key);
    }

    fn route(&self, now: Instant, key: RoundKey, arrival: Arrival) {
        let mut state = self.lock();
        state.parked.retain(|(since, _, _)| *since + PARKED_FOR > now);
        match state.rounds.get(&key) {
            Some(round) => {
                let _too_many = round.try_send(arrival);
            }
            None if state.parked.len() < PARKED_MAX => state.parked.push((now, key, arrival)),
            None => {}
        }
    }
}

pub(crate) fn protocol(run: &str) -> Protocol {
    run_protocol("round", run)
}

pub(crate) async fn accept(inner: Arc<Inner>, mut incoming: Incoming) {
    while let Some(mut stream) = incoming.next().await {
        let routing = inner.clone();
        inner.spawn(async move {
            let Ok(Ok(Some(frame))) = tokio::time::timeout(FIRST_FRAME_TIMEOUT, stream.recv()).await else {
                return;
            };
            if let Ok(PairFrame::Hello { plan, phase, contributions, averages }) = PairFrame::decode(frame) {
                let arrival = Arrival { stream, contributions, averages };
                routing.router.route(routing.env.now(), (plan, phase), arrival);
            }
        });
    }
}
