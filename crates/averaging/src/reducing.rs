//! The work on a part that we reduce: what can be done of one chunk goes to a blocking thread in one piece, so that its
//! values pass through the cache once and threads are woken once.

use crate::exchange::{Exchange, Shared};
use crate::pair::Payload;
use crate::reducer::{Next, Reducer};
use crate::store::Average;
use crate::sum::{ChunkSum, Refusal, Term};
use crate::wire::average_head;
use std::sync::atomic::Ordering;

/// A part that we reduce.
pub(crate) struct Reducing {
    pub(crate) order: Reducer<Payload>,
    /// The current chunk's sum; elsewhere while a thread works on it.
    sum: ChunkSum,
    /// What is in the sum next.
    due: Vec<Term<Payload>>,
}

impl Reducing {
    /// Reduce the chunks from `first` to `chunks` of a part.
    pub(crate) fn new(me: usize, senders: Vec<usize>, first: u32, chunks: u32) -> Self {
        Self { order: Reducer::new(me, senders, first, chunks), sum: ChunkSum::default(), due: Vec::new() }
    }

    /// Take up what the order allows; the chunk that is then whole, if one is.
    fn collect(&mut self, weights: &[f64], norm: impl Fn(usize) -> f64) -> Option<u32> {
        loop {
            match self.order.next() {
                Next::AddOwn { sender } => self.due.push(Term::Own { sender, weight: weights[sender] }),
                Next::Add { sender, payload } => {
                    let (weight, norm) = (weights[sender], norm(sender));
                    self.due.push(Term::Sent { sender, weight, norm, payload });
                }
                Next::Finish { chunk } => return Some(chunk),
                Next::Wait | Next::Complete => return None,
            }
        }
    }
}

/// Work on one chunk.
struct Job {
    part: usize,
    /// Of the layout.
    index: usize,
    generation: u16,
    sum: ChunkSum,
    terms: Vec<Term<Payload>>,
    /// It is whole then.
    finish: Option<u32>,
    vector: Vec<f32>,
}

/// What became of it.
struct Done {
    sum: ChunkSum,
    refused: Vec<Refusal>,
    /// `None` inside: it cannot be encoded.
    finished: Option<(u32, Option<Average>)>,
    vector: Vec<f32>,
}

impl Job {
    fn run(mut self, shared: &Shared) -> Done {
        let chunk = &shared.layout.chunks[self.index];
        let mut refused = Vec::new();
        for term in self.terms.drain(..) {
            refused.extend(self.sum.add(chunk, &term, &shared.vector).err());
        }
        let finished = self.finish.map(|number| {
            let pool = &shared.swarm.pool;
            let head = |mask| average_head(self.part as u16, self.generation, number, mask);
            let mut frame = pool.take(head(0).len() + chunk.encoded_bytes());
            frame.extend_from_slice(&head(0));
            let average = self.sum.finish(chunk, &mut frame).map(|(mask, saturated)| {
                shared.saturated.fetch_add(saturated as u64, Ordering::Relaxed);
                frame[..head(mask).len()].copy_from_slice(&head(mask));
                Average::open(pool.bytes(frame), mask, chunk, &mut self.vector)
            });
            (number, average)
        });
        Done { sum: self.sum, refused, finished, vector: self.vector }
    }
}

impl Exchange {
    /// Do what can be done of a part that we reduce.
    pub(crate) async fn reduce(&mut self, part: usize) {
        while let Some(job) = self.next_job(part) {
            let shared = self.shared.clone();
            let done = self.shared.swarm.env.offload(move || job.run(&shared)).await;
            self.vector = done.vector;
            if let Some(reducing) = self.reducers.get_mut(&part) {
                reducing.sum = done.sum;
            }
            for (sender, kind, reason) in done.refused {
                self.exclude(part, sender, kind, &reason);
            }
            match done.finished {
                Some((chunk, Some(average))) => {
                    self.shared.board().store.push(&self.shared.layout, part, chunk, average);
                    self.shared.wake_all();
                }
                Some((_, None)) => break,
                None => {}
            }
        }
        self.publish_needs();
    }

    fn next_job(&mut self, part: usize) -> Option<Job> {
        let members = &self.shared.plan.members;
        let reducing = self.reducers.get_mut(&part)?;
        let finish = reducing.collect(&self.weights, |member| members[member].norm);
        // Our own values alone can wait for those that they are added to.
        if finish.is_none() && !reducing.due.iter().any(|term| matches!(term, Term::Sent { .. })) {
            return None;
        }
        let board = self.shared.board();
        let held = &board.store.parts[part];
        Some(Job {
            part,
            index: held.range.start + held.done.len(),
            generation: held.generation,
            sum: std::mem::take(&mut reducing.sum),
            terms: std::mem::take(&mut reducing.due),
            finish,
            vector: std::mem::take(&mut self.vector),
        })
    }
}
