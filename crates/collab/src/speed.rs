//! How fast two machines can talk: a few megabytes each way, for `potluck doctor`. Whoever answers gives only so much
//! of its link in any ten seconds, however many ask.

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use potluck_net::{FaultKind, PeerFault, PeerId, Protocol, Tasks, Transport, rpc};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

const PROTOCOL: &str = "/potluck/speed/1";
/// Bytes of one message.
pub(crate) const PIECE_BYTES: usize = 256 << 10;
/// Messages on the way at the same time: fills 20 MB/s at 50 ms.
const AT_A_TIME: usize = 4;
/// What is answered at the same time; the messages of one direction may still end when those of the other begin.
const PLACES: rpc::Places = rpc::Places { total: 4 * AT_A_TIME, per_peer: 2 * AT_A_TIME };
/// Bytes that are moved in one direction at most.
const BYTES_MAX: usize = 32 << 20;
/// What is given away at most in each window, in both directions together.
const WINDOW: Duration = Duration::from_secs(10);
const WINDOW_BYTES_MAX: usize = 96 << 20;
const BACKLOG: usize = 8;

/// What was measured between two peers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// From here to there, in Mbit/s.
    pub up_mbit_per_second: f64,
    /// From there to here, in Mbit/s.
    pub down_mbit_per_second: f64,
    /// One short question and its answer, with a stream for it.
    pub round_trip_seconds: f64,
}

/// Let others measure their way to us, until `tasks` ends. One session per process is enough.
pub fn serve_speed(transport: &dyn Transport, tasks: &Tasks) {
    let Ok(incoming) = transport.accept(Protocol::new(PROTOCOL), BACKLOG) else { return };
    let given = Arc::new(Mutex::new((Instant::now(), 0)));
    rpc::serve(incoming, tasks, PLACES, move |_, request| {
        let answer = answer(&request).filter(|(_, cost)| allowed(&given, *cost)).map(|(bytes, _)| bytes);
        async move { answer }
    });
}

/// The answer, and what the exchange costs.
pub(crate) fn answer(request: &[u8]) -> Option<(Bytes, usize)> {
    match request.split_first()? {
        (b'u', payload) if payload.len() <= PIECE_BYTES => Some((Bytes::new(), payload.len())),
        (b'd', []) => Some((Bytes::from(vec![0x5a; PIECE_BYTES]), PIECE_BYTES)),
        _ => None,
    }
}

fn allowed(given: &Mutex<(Instant, usize)>, cost: usize) -> bool {
    let mut given = given.lock().unwrap_or_else(PoisonError::into_inner);
    if given.0.elapsed() >= WINDOW {
        *given = (Instant::now(), 0);
    }
    given.1 = given.1.saturating_add(cost);
    given.1 <= WINDOW_BYTES_MAX
}

impl Speed {
    /// Measure the way to `peer`, within about `limit`.
    ///
    /// # Errors
    /// The fault of the peer: it does not let itself be measured, or it is gone.
    pub async fn measure(
        transport: &dyn Transport,
        peer: PeerId,
        limit: Duration,
    ) -> Result<Self, PeerFault> {
        let start = Instant::now();
        let call = |request: Bytes| async move {
            rpc::call(transport, peer, &Protocol::new(PROTOCOL), request, start + limit).await
        };
        // The first question may have to dial; it is not timed.
        call(Bytes::from_static(b"u")).await?;
        let asked = Instant::now();
        call(Bytes::from_static(b"u")).await?;
        let round_trip_seconds = asked.elapsed().as_secs_f64();
        let half = limit.saturating_sub(start.elapsed()) / 2;
        let mut piece = vec![0xa5; PIECE_BYTES + 1];
        piece[0] = b'u';
        let up = rate(&call, piece.into(), half).await?;
        let down = rate(&call, Bytes::from_static(b"d"), half).await?;
        Ok(Self { up_mbit_per_second: up, down_mbit_per_second: down, round_trip_seconds })
    }
}

/// Mbit/s of repeating one question until time is up, or the other side has given enough.
async fn rate<Fut>(call: &impl Fn(Bytes) -> Fut, request: Bytes, limit: Duration) -> Result<f64, PeerFault>
where
    Fut: Future<Output = Result<Bytes, PeerFault>>,
{
    let start = Instant::now();
    let mut running: FuturesUnordered<_> = (0..AT_A_TIME).map(|_| call(request.clone())).collect();
    let (mut moved, mut ended) = (0, start);
    while let Ok(Some(done)) = tokio::time::timeout_at(start + limit, running.next()).await {
        match done {
            Ok(answer) => {
                moved += PIECE_BYTES.max(answer.len());
                ended = Instant::now();
            }
            Err(fault) if matches!(fault.kind, FaultKind::Refused | FaultKind::Busy) && moved > 0 => break,
            Err(fault) => return Err(fault),
        }
        if moved >= BYTES_MAX {
            break;
        }
        running.push(call(request.clone()));
    }
    let seconds = ended.duration_since(start).as_secs_f64();
    Ok(if seconds > 0.0 { moved as f64 * 8e-6 / seconds } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_so_much_is_given_in_a_window() {
        let given = Mutex::new((Instant::now(), 0));
        let pieces = (0..1000).take_while(|_| allowed(&given, PIECE_BYTES)).count();
        assert_eq!(pieces, WINDOW_BYTES_MAX / PIECE_BYTES);
        tokio::time::advance(WINDOW).await;
        assert!(allowed(&given, PIECE_BYTES));
    }

    #[test]
    fn strange_questions_are_refused() {
        assert_eq!(answer(b"d").unwrap().0.len(), PIECE_BYTES);
        assert_eq!(answer(b"d1"), None);
        assert_eq!(answer(b""), None);
        assert_eq!(answer(&vec![b'u'; PIECE_BYTES + 2]), None);
    }
}
