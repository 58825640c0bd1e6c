//! Time, randomness and CPU work as parameters: the three things that a simulation must control.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Threads of the runtime that a peer runs on. One moves more than any link of 1 Gbit/s brings (docs/performance.md); with a
/// second one, connections and those who read from them wake each other across threads, which costs more processor time than
/// it saves. Computing has threads of its own ([`Env::offload`]).
pub const RUNTIME_THREADS: usize = 1;

/// The outside world of one peer: clock, seeded randomness, CPU off-loading. Cheap to clone; clones share the stream
/// of random numbers.
#[derive(Clone)]
pub struct Env {
    inner: Arc<Inner>,
}

struct Inner {
    rng: Mutex<StdRng>,
    unix_base: Duration,
    base: Instant,
    inline: bool,
}

impl Env {
    /// The real world: system clock, randomness from the operating system, CPU work on blocking threads.
    ///
    /// Must be called inside a tokio runtime.
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place where the wall clock enters, for display only"
    )]
    pub fn real() -> Self {
        let unix_base =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self::build(rand::make_rng(), unix_base, false)
    }

    /// A reproducible world: every random number follows from `seed`, CPU work runs inline, and the wall clock starts
    /// at `unix_base` (give peers different ones to simulate skewed clocks). Combine with tokio's paused time.
    pub fn simulated(seed: u64, unix_base: Duration) -> Self {
        Self::build(StdRng::seed_from_u64(seed), unix_base, true)
    }

    fn build(rng: StdRng, unix_base: Duration, inline: bool) -> Self {
        Self { inner: Arc::new(Inner { rng: Mutex::new(rng), unix_base, base: Instant::now(), inline }) }
    }

    /// Monotonic time; pauses with tokio's clock.
    pub fn now(&self) -> Instant {
        Instant::now()
    }

    /// Time since 1970 by this peer's own clock. For people and for hivemind's dialect; nothing native decides by it.
    pub fn unix_time(&self) -> Duration {
        self.inner.unix_base + self.inner.base.elapsed()
    }

    /// Whether this is a simulated world.
    pub fn is_simulated(&self) -> bool {
        self.inner.inline
    }

    /// The next 64 random bits.
    pub fn random_u64(&self) -> u64 {
        self.inner.rng.lock().unwrap_or_else(PoisonError::into_inner).next_u64()
    }

    /// Random bytes, for nonces and identities.
    pub fn random_bytes<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.inner.rng.lock().unwrap_or_else(PoisonError::into_inner).fill_bytes(&mut bytes);
        bytes
    }

    /// A generator of its own for one component, so that its draws do not depend on what others draw in between.
    pub fn fork_rng(&self) -> StdRng {
        StdRng::seed_from_u64(self.random_u64())
    }

    /// Run CPU-heavy work without holding up the network: on a blocking thread, or inline when simulated.
    ///
    /// # Panics
    /// If the work panics: that is our own bug and must be loud.
    pub async fn offload<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        if self.inner.inline {
            return work();
        }
        match tokio::task::spawn_blocking(work).await {
            Ok(value) => value,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // Only a runtime that is shutting down cancels blocking work; this future is then dropped as well.
                Err(_) => futures::future::pending().await,
            },
        }
    }
}

impl std::fmt::Debug for Env {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Env").field("simulated", &self.inner.inline).finish_non_exhaustive()
    }
}
