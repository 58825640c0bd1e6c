//! How long a round of ours waits for others, and others may be waited for.

use super::Inner;
use crate::Channel;
use std::time::Duration;

/// How long the news of a member's result may take to reach us: a heartbeat and a slow link.
const FINISHING_MAX: Duration = Duration::from_millis(1500);

/// A round whose other members have gone on is given up after at least this long.
const LEFT_BEHIND_MIN: Duration = Duration::from_secs(4);

/// While it lives the others know that we wait for them in a round, also if the wait is given up (Ctrl-C).
pub(super) struct Waiting<'a>(&'a Inner);

impl<'a> Waiting<'a> {
    pub(super) fn begin(inner: &'a Inner, channel: Channel) -> Self {
        inner.core().waiting = Some(channel);
        inner.tell(true);
        Self(inner)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.core().waiting = None;
    }
}

impl Inner {
    /// The members of the last round have their result now or in a moment; starting without them would split us.
    pub(super) async fn wait_for_members(&self) {
        let until = self.env.now() + FINISHING_MAX;
        loop {
            let finishing = {
                let mut core = self.core();
                self.look(&mut core);
                core.members_are_finishing()
            };
            if !finishing || self.env.now() >= until {
                return;
            }
            let _news_or_deadline = tokio::time::timeout_at(until, self.dialect.changed()).await;
        }
    }

    /// Resolves when others are epochs ahead and have been for as long as the round took until then (a slow link ends
    /// later than the others, but not for ever).
    pub(super) async fn left_behind(&self) {
        let begun = self.env.now();
        let mut ahead_since = None;
        loop {
            let _news_or_tick = tokio::time::timeout(LEFT_BEHIND_MIN / 4, self.dialect.changed()).await;
            let now = self.env.now();
            if !self.is_behind() {
                ahead_since = None;
                continue;
            }
            let since = *ahead_since.get_or_insert(now);
            if now.duration_since(since) >= LEFT_BEHIND_MIN.max(since.duration_since(begun)) {
                return;
            }
        }
    }

    pub(super) fn is_behind(&self) -> bool {
        let now = self.env.now();
        let mut core = self.core();
        self.look(&mut core);
        core.winner(now).is_some()
    }
}
