//! Sans-I/O. The bookkeeping of one part at its reducer: whose contribution comes next, in group order, chunk by chunk.

use std::collections::BTreeMap;

/// What the reducer of a part does next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next<P> {
    /// Add this member's contribution to the current chunk.
    Add { sender: usize, payload: P },
    /// Add our own values.
    AddOwn { sender: usize },
    /// The chunk holds every contribution that it will get: encode it and go on with the next.
    Finish { chunk: u32 },
    /// Nothing until more arrives.
    Wait,
    /// Every chunk is finished.
    Complete,
}

/// One part that we reduce.
#[derive(Debug)]
pub(crate) struct Reducer<P> {
    me: usize,
    /// Members that contribute, in group order.
    senders: Vec<usize>,
    lost: u64,
    chunks: u32,
    chunk: u32,
    at: usize,
    inbox: BTreeMap<(u32, usize), P>,
}

impl<P> Reducer<P> {
    /// Reduce the chunks from `first` to `chunks` of a part.
    pub(crate) fn new(me: usize, senders: Vec<usize>, first: u32, chunks: u32) -> Self {
        Self { me, senders, lost: 0, chunks, chunk: first, at: 0, inbox: BTreeMap::new() }
    }

    /// A contribution arrived. Repeated and unknown ones are ignored: false.
    pub(crate) fn offer(&mut self, sender: usize, chunk: u32, payload: P) -> bool {
        let Some(position) = self.senders.iter().position(|s| *s == sender) else { return false };
        let passed =
            chunk < self.chunk || (chunk == self.chunk && position < self.at) || chunk >= self.chunks;
        if passed || self.is_lost(sender) || sender == self.me || self.inbox.contains_key(&(chunk, sender)) {
            return false;
        }
        self.inbox.insert((chunk, sender), payload);
        true
    }

    /// The sender gives nothing more; what arrived of it counts.
    pub(crate) fn lose(&mut self, sender: usize) {
        self.lost |= 1 << sender;
    }

    /// The sender gives nothing more and what waits of it is thrown away.
    pub(crate) fn exclude(&mut self, sender: usize) {
        self.lose(sender);
        self.inbox.retain(|(_, of), _| *of != sender);
    }

    fn is_lost(&self, sender: usize) -> bool {
        self.lost & (1 << sender) != 0
    }

    /// The first chunk that we still need of a sender.
    pub(crate) fn needs_from(&self, sender: usize) -> u32 {
        let Some(position) = self.senders.iter().position(|s| *s == sender) else { return self.chunks };
        let mut next = if position < self.at { self.chunk + 1 } else { self.chunk };
        while self.inbox.contains_key(&(next, sender)) {
            next += 1;
        }
        next
    }

    pub(crate) fn next(&mut self) -> Next<P> {
        if self.chunk >= self.chunks {
            return Next::Complete;
        }
        while let Some(&sender) = self.senders.get(self.at) {
            if sender == self.me && !self.is_lost(sender) {
                self.at += 1;
                return Next::AddOwn { sender };
            }
            if let Some(payload) = self.inbox.remove(&(self.chunk, sender)) {
                self.at += 1;
                return Next::Add { sender, payload };
            }
            if !self.is_lost(sender) {
                return Next::Wait;
            }
            self.at += 1;
        }
        let chunk = self.chunk;
        self.chunk += 1;
        self.at = 0;
        Next::Finish { chunk }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contributions_are_taken_in_group_order_whatever_the_arrival() {
        let mut reducer = Reducer::new(1, vec![0, 1, 2], 0, 1);
        assert!(reducer.offer(2, 0, "two"));
        assert_eq!(reducer.next(), Next::Wait);
        assert!(reducer.offer(0, 0, "zero") && !reducer.offer(0, 0, "again"));
        assert_eq!(reducer.next(), Next::Add { sender: 0, payload: "zero" });
        assert_eq!(reducer.next(), Next::AddOwn { sender: 1 });
        assert_eq!(reducer.next(), Next::Add { sender: 2, payload: "two" });
        assert_eq!(reducer.next(), Next::Finish { chunk: 0 });
        assert_eq!(reducer.next(), Next::Complete);
    }

    #[test]
    fn a_lost_sender_keeps_what_arrived_and_blocks_nothing() {
        let mut reducer = Reducer::new(0, vec![0, 1], 0, 2);
        assert!(reducer.offer(1, 0, ()));
        reducer.lose(1);
        assert!(!reducer.offer(1, 1, ()));
        let steps: Vec<_> = std::iter::from_fn(|| match reducer.next() {
            Next::Complete | Next::Wait => None,
            next => Some(next),
        })
        .collect();
        assert_eq!(
            steps,
            [
                Next::AddOwn { sender: 0 },
                Next::Add { sender: 1, payload: () },
                Next::Finish { chunk: 0 },
                Next::AddOwn { sender: 0 },
                Next::Finish { chunk: 1 },
            ]
        );
    }
}
