//! Sans-I/O. Which connections a peer gives up when it has more than it needs, so that a large swarm costs each peer a
//! bounded number: those that nothing runs on, the longest unused first.

use std::time::Duration;
use tokio::time::Instant;

/// How many connections a peer has at most when nothing runs on some of them. Connections in use are never given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watermarks {
    /// More than these and idle ones are given up.
    pub high: usize,
    /// Until so many are left.
    pub low: usize,
    /// A connection on which nothing ran for less than this may be about to be used.
    pub idle_min: Duration,
}

impl Watermarks {
    /// Of a peer in a run: twice a group, and as many again for newcomers and lookups.
    pub const PEER: Self = Self { high: 192, low: 160, idle_min: Duration::from_secs(2) };
    /// Of a node that others join through and are relayed by.
    pub const NODE: Self = Self { high: 2048, low: 1792, idle_min: Duration::from_secs(2) };

    /// Of `total` connections, those to give up; `idle` are the unused ones, each with the time since when.
    pub fn surplus<K: Copy + Ord>(
        &self,
        now: Instant,
        total: usize,
        idle: impl IntoIterator<Item = (Instant, K)>,
    ) -> Vec<K> {
        if total <= self.high {
            return Vec::new();
        }
        let mut old: Vec<(Instant, K)> =
            idle.into_iter().filter(|(since, _)| now >= *since + self.idle_min).collect();
        old.sort_unstable();
        old.into_iter().take(total - self.low).map(|(_, connection)| connection).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKS: Watermarks = Watermarks { high: 5, low: 3, idle_min: Duration::from_secs(2) };

    #[tokio::test(start_paused = true)]
    async fn the_longest_unused_go_and_those_in_use_stay() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let idle = [(at(3), 'c'), (at(1), 'a'), (at(2), 'b'), (at(9), 'd')];
        assert_eq!(MARKS.surplus(at(10), 5, idle), [], "not more than the high mark");
        assert_eq!(MARKS.surplus(at(10), 6, idle), ['a', 'b', 'c'], "down to the low mark");
        assert_eq!(
            MARKS.surplus(at(10), 9, idle),
            ['a', 'b', 'c'],
            "neither those in use nor the one of just now"
        );
        assert_eq!(MARKS.surplus(at(11), 9, idle), ['a', 'b', 'c', 'd']);
        assert_eq!(MARKS.surplus(at(10), 6, std::iter::empty::<(Instant, char)>()), []);
    }
}
