//! Sans-I/O. Do two machines live under one identity? Every process draws a random number, and a restart replaces its
//! predecessor's for good: a number that returns after it was replaced belongs to a process that was never gone.

use std::time::Duration;
use tokio::time::Instant;

/// Returns before anybody is accused: heartbeats of a dead process may arrive late, behind those of its successor.
const RETURNS: u32 = 5;
/// ... and the least time between the first and the last of them: what is late arrives in one burst.
const SPAN: Duration = Duration::from_secs(4);
/// After so long without one, the count begins anew.
const FORGET: Duration = Duration::from_secs(60);
/// What others relay of our own predecessor has faded away after this time.
const PREDECESSOR: Duration = Duration::from_secs(60);

/// What speaks for two processes under one identity.
#[derive(Debug, Clone, Default)]
pub(crate) struct Twin {
    /// The process that the present one replaced.
    former: u32,
    returns: u32,
    /// When the first and the last of them were.
    span: Option<(Instant, Instant)>,
}

impl Twin {
    /// A heartbeat of `next` came after one of `present`.
    pub(crate) fn follows(&mut self, now: Instant, present: u32, next: u32) {
        if present == next || present == 0 {
            return;
        }
        if next == self.former {
            self.count(now);
        }
        self.former = present;
    }

    fn count(&mut self, now: Instant) {
        match &mut self.span {
            Some((_, last)) if *last + FORGET >= now => *last = now,
            span => {
                *span = Some((now, now));
                self.returns = 0;
            }
        }
        self.returns = self.returns.saturating_add(1);
    }

    /// Whether there are two.
    pub(crate) fn is_certain(&self, now: Instant) -> bool {
        let fresh = |(first, last): (Instant, Instant)| last >= first + SPAN && last + FORGET >= now;
        self.returns >= RETURNS && self.span.is_some_and(fresh)
    }
}

/// The same question about ourselves, from what others say of us.
#[derive(Debug, Clone)]
pub(crate) struct OwnTwin {
    began: Instant,
    /// The other process and its newest heartbeat.
    other: (u32, u64),
    twin: Twin,
}

impl OwnTwin {
    pub(crate) fn new(now: Instant) -> Self {
        Self { began: now, other: (0, 0), twin: Twin::default() }
    }

    /// Somebody relays a heartbeat under our identity that is not ours.
    pub(crate) fn heard_of(&mut self, now: Instant, process: u32, sequence: u64) {
        let (known, newest) = self.other;
        if known == process && sequence <= newest {
            return;
        }
        self.other = (process, sequence);
        if known == process && now >= self.began + PREDECESSOR {
            self.twin.count(now);
        }
    }

    pub(crate) fn is_certain(&self, now: Instant) -> bool {
        self.twin.is_certain(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(start: Instant, seconds: f64) -> Instant {
        start + Duration::from_secs_f64(seconds)
    }

    #[test]
    fn two_that_speak_in_turn_are_two() {
        let (start, mut twin) = (Instant::now(), Twin::default());
        for beat in 0..8u32 {
            twin.follows(after(start, f64::from(beat)), 1 + beat % 2, 2 - beat % 2);
            assert_eq!(twin.is_certain(after(start, f64::from(beat))), beat >= 5, "beat {beat}");
        }
        assert!(!twin.is_certain(after(start, 100.0)), "the other one is gone");
    }

    #[test]
    fn restarts_and_late_heartbeats_of_the_dead_are_not_two() {
        let (start, mut twin) = (Instant::now(), Twin::default());
        for life in 1..100u32 {
            twin.follows(after(start, f64::from(life)), life, life + 1);
        }
        for beat in 0..20u32 {
            twin.follows(after(start, 100.0 + f64::from(beat) / 10.0), 100 - beat % 2, 99 + beat % 2);
        }
        assert!(!twin.is_certain(after(start, 102.0)), "what is late comes at once");
    }

    #[test]
    fn our_predecessor_is_no_second_holder_but_whoever_goes_on_is() {
        let (start, mut own) = (Instant::now(), OwnTwin::new(Instant::now()));
        for beat in 0..50 {
            own.heard_of(after(start, beat as f64), 7, beat);
        }
        for beat in 61..100 {
            own.heard_of(after(start, beat as f64), 7, 49);
        }
        assert!(!own.is_certain(after(start, 100.0)));
        for beat in 100..107 {
            own.heard_of(after(start, beat as f64), 7, beat);
        }
        assert!(own.is_certain(after(start, 107.0)));
    }
}
