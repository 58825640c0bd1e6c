//! Whether anything of ours runs on a connection. One that is not used for long is closed, and sooner where there are too
//! many ([`potluck_net::Watermarks`]); what other protocols need, such as a place at a relay, they keep themselves.

use crate::shared::{Peers, lock};
use futures::task::AtomicWaker;
use potluck_net::{PeerId, Watermarks};
use std::sync::{Arc, Mutex};
use std::task::Context;
use std::time::Duration;
use tokio::time::Instant;

/// An unused connection is kept this long where there are not too many.
const IDLE_MAX: Duration = Duration::from_secs(15 * 60);

/// The use of one connection.
pub(crate) struct Usage {
    state: Mutex<State>,
    /// The connection's task, which closes it.
    task: AtomicWaker,
}

struct State {
    streams: usize,
    idle_since: Instant,
    given_up: bool,
}

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Use {
    /// It closes soon unless it is used, or other protocols need it.
    GivenUp,
    /// Since then, nothing runs on it.
    Idle(Instant),
    Used,
}

/// Something runs on the connection until this is dropped.
pub(crate) struct InUse(Arc<Usage>);

impl Usage {
    pub(crate) fn new() -> Arc<Self> {
        let state = State { streams: 0, idle_since: Instant::now(), given_up: false };
        Arc::new(Self { state: Mutex::new(state), task: AtomicWaker::new() })
    }

    pub(crate) fn begin(self: &Arc<Self>) -> InUse {
        let mut state = lock(&self.state);
        state.streams += 1;
        state.given_up = false;
        InUse(self.clone())
    }

    pub(crate) fn now(&self) -> Use {
        let state = lock(&self.state);
        match (state.streams, state.given_up) {
            (0, true) => Use::GivenUp,
            (0, false) => Use::Idle(state.idle_since),
            _ => Use::Used,
        }
    }

    /// Said again and again: what keeps the connection besides us may have let it go meanwhile.
    pub(crate) fn give_up(&self) {
        lock(&self.state).given_up = true;
        self.task.wake();
    }

    /// For the connection's task, whenever it looks.
    pub(crate) fn look(&self, cx: &Context<'_>) {
        self.task.register(cx.waker());
    }

    pub(crate) fn keeps_alive(&self) -> bool {
        match self.now() {
            Use::GivenUp => false,
            Use::Idle(since) => Instant::now() < since + IDLE_MAX,
            Use::Used => true,
        }
    }
}

impl Peers {
    /// Give up connections to the longest unused peers if there are too many; never to those that we seek ourselves.
    pub(crate) fn give_up_surplus(&self, now: Instant, marks: &Watermarks, sought: impl Fn(&PeerId) -> bool) {
        let uses = self.uses();
        let before = uses.iter().filter(|(_, all)| *all == Use::GivenUp).map(|(peer, _)| *peer);
        let before: Vec<PeerId> = before.collect();
        // Those that were given up are as good as gone.
        let total = uses.len() - before.len();
        let idle = uses.into_iter().filter_map(|(peer, all)| match all {
            Use::Idle(since) if !sought(&peer) => Some((since, peer)),
            _ => None,
        });
        let surplus = marks.surplus(now, total, idle);
        if !surplus.is_empty() {
            let (connected, given_up) = (total, surplus.len());
            tracing::debug!(target: "potluck::net", connected, given_up, "too many idle connections");
        }
        self.give_up(surplus.into_iter().chain(before));
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.streams -= 1;
        state.idle_since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_kept_while_something_runs_on_it() {
        let usage = Usage::new();
        let (first, second) = (usage.begin(), usage.begin());
        tokio::time::advance(IDLE_MAX * 2).await;
        usage.give_up();
        drop(first);
        assert!(usage.keeps_alive() && usage.now() == Use::Used, "the second still runs");
        drop(second);
        assert_eq!(usage.now(), Use::GivenUp);
        assert!(!usage.keeps_alive());
        drop(usage.begin());
        assert_eq!(usage.now(), Use::Idle(Instant::now()), "used again, it is as good as any");
        tokio::time::advance(IDLE_MAX - Duration::from_millis(1)).await;
        assert!(usage.keeps_alive());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(!usage.keeps_alive(), "not used for long");
    }
}
