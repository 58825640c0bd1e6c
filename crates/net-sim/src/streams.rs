//! The streams of a network. Every frame looks its stream up some ten times, so they are found by position.

use crate::flow::StreamState;
use std::collections::VecDeque;

/// Streams by their numbers, which are given out in rising order.
#[derive(Default)]
pub(crate) struct Streams {
    /// Number of the first slot.
    first: u64,
    slots: VecDeque<Option<Box<StreamState>>>,
    count: usize,
}

impl Streams {
    fn position(&self, stream: u64) -> Option<usize> {
        usize::try_from(stream.checked_sub(self.first)?).ok()
    }

    pub(crate) fn get(&self, stream: u64) -> Option<&StreamState> {
        self.slots.get(self.position(stream)?)?.as_deref()
    }

    pub(crate) fn get_mut(&mut self, stream: u64) -> Option<&mut StreamState> {
        let at = self.position(stream)?;
        self.slots.get_mut(at)?.as_deref_mut()
    }

    /// Add a stream; its number is higher than all before.
    pub(crate) fn push(&mut self, stream: u64, state: StreamState) {
        if self.slots.is_empty() {
            self.first = stream;
        }
        let at = self.position(stream).filter(|at| *at >= self.slots.len());
        let at = at.expect("numbers are given out in rising order");
        self.slots.resize_with(at, || None);
        self.slots.push_back(Some(Box::new(state)));
        self.count += 1;
    }

    pub(crate) fn remove(&mut self, stream: u64) -> Option<Box<StreamState>> {
        let at = self.position(stream)?;
        let removed = self.slots.get_mut(at).and_then(Option::take);
        self.count -= usize::from(removed.is_some());
        while let Some(None) = self.slots.front() {
            self.slots.pop_front();
            self.first += 1;
        }
        removed
    }

    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// In the order of their numbers.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = (u64, &StreamState)> {
        let numbered = self.slots.iter().enumerate();
        numbered.filter_map(|(at, state)| Some((self.first + at as u64, state.as_deref()?)))
    }

    /// In the order of their numbers.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut StreamState)> {
        let (first, numbered) = (self.first, self.slots.iter_mut().enumerate());
        numbered.filter_map(move |(at, state)| Some((first + at as u64, state.as_deref_mut()?)))
    }
}
