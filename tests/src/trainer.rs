//! One peer's training program: what a user's loop does, against the toy models, in virtual time.

use crate::models::{Model, Optimizer};
use crate::record::{Entry, Record, hash_of};
use potluck_collab::{Averaged, Loaded, PolicyKind, Session, Snapshot, Step};
use potluck_net::{Env, Outcome, PeerId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::time::Duration;
use tokio::time::Instant;

/// What a peer does to its contributions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mischief {
    /// Nothing.
    #[default]
    None,
    /// One value is not a number.
    NotANumber,
    /// One value is infinite.
    Infinite,
    /// All values are a million times too large.
    Huge,
}

/// How a peer trains.
#[derive(Debug, Clone)]
pub struct Training {
    /// What.
    pub model: Model,
    /// Under which policy (the session's).
    pub policy: PolicyKind,
    /// Samples of one step.
    pub batch: usize,
    /// Virtual time of one step.
    pub step_time: Duration,
    /// Seed of this peer's data.
    pub data_seed: u64,
    /// Seed of everybody's initial parameters.
    pub initial_seed: u64,
    /// It computes no gradients.
    pub auxiliary: bool,
    /// What it does to its contributions.
    pub mischief: Mischief,
    /// In so many of a hundred epochs an error comes between the average and the end of the epoch, as from a user's hook.
    pub fumbles: u64,
    /// It stops training after this many epochs.
    pub epochs: u64,
}

/// A peer's parameters and optimizer, and the gradients it has gathered.
pub struct Trainer {
    pub(crate) session: Session,
    training: Training,
    env: Env,
    record: Record,
    rng: StdRng,
    /// When it fumbles.
    clumsiness: StdRng,
    params: Vec<f32>,
    optimizer: Optimizer,
    sum: Vec<f32>,
    count: u64,
    /// Under a delayed optimizer: the parameters that are being computed.
    next_params: Option<Vec<f32>>,
    sent_state: Vec<f32>,
}

impl Trainer {
    /// A peer at the start.
    pub fn new(session: Session, env: Env, training: Training, record: Record) -> Self {
        let params = training.model.initial(training.initial_seed);
        let len = params.len();
        Self {
            rng: StdRng::seed_from_u64(training.data_seed),
            clumsiness: StdRng::seed_from_u64(!training.data_seed),
            session,
            env,
            record,
            params,
            optimizer: Optimizer::new(len),
            sum: vec![0.0; len],
            count: 0,
            next_params: None,
            sent_state: Vec::new(),
            training,
        }
    }

    /// Train until the epochs are done.
    pub async fn run(mut self) {
        self.session.publish(self.snapshot());
        let mut samples = 0;
        while self.session.epoch() < self.training.epochs {
            let step = self.timed("step", async |trainer: &mut Self| trainer.session.step(samples)).await;
            samples = 0;
            match step {
                Step::Accumulate if self.training.auxiliary => {
                    let _news = tokio::time::timeout(self.training.step_time, self.session.changed()).await;
                }
                Step::Accumulate => samples = self.accumulate().await,
                Step::Average => self.average().await,
                Step::AverageState => self.average_state().await,
                Step::Apply => self.apply(),
                Step::LoadState => self.load_state().await,
            }
        }
        // A peer that is done stays until its task is ended, so that others can load its state, and it gives way if
        // another history has won.
        loop {
            match self.session.step(0) {
                Step::LoadState => self.load_state().await,
                _ => {
                    let _news = tokio::time::timeout(self.training.step_time, self.session.changed()).await;
                }
            }
        }
    }

    /// Do something and note how long it took.
    async fn timed<T>(&mut self, call: &'static str, work: impl AsyncFnOnce(&mut Self) -> T) -> T {
        let begun = Instant::now();
        let value = work(self).await;
        self.record.push(Entry::Call { peer: self.me(), call, took: begun.elapsed() });
        value
    }

    fn me(&self) -> PeerId {
        self.session.local_peer()
    }

    async fn accumulate(&mut self) -> u64 {
        tokio::time::sleep(self.training.step_time).await;
        let model = self.training.model;
        let samples = model.samples(&mut self.rng, self.training.batch);
        self.session.report_loss(model.loss(&self.params, &samples));
        model.add_gradients(&self.params, &samples, &mut self.sum);
        self.count += samples.len() as u64;
        if matches!(self.training.policy, PolicyKind::LocalUpdates | PolicyKind::DiLoCo { .. }) {
            let (gradient, _) = self.take_gradient();
            self.optimizer.step(&mut self.params, &gradient);
        }
        samples.len() as u64
    }

    fn take_gradient(&mut self) -> (Vec<f32>, u64) {
        let count = std::mem::take(&mut self.count);
        let mut gradient = std::mem::replace(&mut self.sum, vec![0.0; self.params.len()]);
        gradient.iter_mut().for_each(|value| *value /= count.max(1) as f32);
        match self.training.mischief {
            Mischief::None => {}
            Mischief::NotANumber => gradient[0] = f32::NAN,
            Mischief::Infinite => gradient[0] = f32::INFINITY,
            Mischief::Huge => gradient.iter_mut().for_each(|value| *value *= 1e6),
        }
        (gradient, count)
    }

    async fn average(&mut self) {
        let (gradient, count) = self.take_gradient();
        let epoch = self.session.epoch();
        self.record.push(Entry::Contribution {
            peer: self.me(),
            epoch,
            weight: count as f64,
            vector: gradient.clone(),
        });
        match self.training.policy {
            PolicyKind::DelayedGradient => self.session.start_gradients(gradient, count as f64),
            PolicyKind::DelayedOptimizer => {
                let averaged = self.averaged(epoch, gradient, count).await;
                if averaged.value.missed {
                    return;
                }
                if self.fumbles(|it| it.optimizer.step(&mut it.params, &averaged.value.vector)) {
                    return;
                }
                let mut params = self.params.clone();
                self.optimizer.step(&mut params, &averaged.value.vector);
                self.next_params = Some(params);
                self.session.optimizer_ready();
            }
            _ => {
                let averaged = self.averaged(epoch, gradient, count).await;
                if averaged.value.missed
                    || self.fumbles(|it| it.optimizer.step(&mut it.params, &averaged.value.vector))
                {
                    return;
                }
                self.optimizer.step(&mut self.params, &averaged.value.vector);
                self.end_epoch();
            }
        }
    }

    async fn averaged(&mut self, epoch: u64, gradient: Vec<f32>, count: u64) -> Outcome<Averaged> {
        let averaged = self
            .timed("average_gradients", async |trainer: &mut Self| {
                trainer.session.average_gradients(gradient, count as f64).await
            })
            .await;
        self.note_round(epoch, &averaged);
        averaged
    }

    fn note_round(&self, epoch: u64, averaged: &Outcome<Averaged>) {
        self.record.push(Entry::Round {
            peer: self.me(),
            epoch,
            averaged: averaged.value.clone(),
            faults: averaged.faults.clone(),
        });
    }

    async fn average_state(&mut self) {
        let params = self.params.clone();
        if self.training.policy == PolicyKind::DelayedState {
            self.sent_state.clone_from(&params);
            return self.session.start_state(params);
        }
        let averaged = self
            .timed("average_state", async |trainer: &mut Self| trainer.session.average_state(params).await)
            .await;
        if averaged.value.missed {
            return;
        }
        let ends_epoch = matches!(self.training.policy, PolicyKind::LocalUpdates | PolicyKind::DiLoCo { .. });
        if ends_epoch && self.fumbles(|it| it.params.clone_from(&averaged.value.vector)) {
            return;
        }
        self.params = averaged.value.vector;
        if ends_epoch {
            self.end_epoch();
        } else {
            self.session.publish(self.snapshot());
            self.note_epoch();
        }
    }

    fn apply(&mut self) {
        if let Some(params) = self.next_params.take() {
            self.params = params;
            return self.end_epoch();
        }
        let Some(started) = self.session.take_started() else { return };
        if started.averaged.value.missed {
            return;
        }
        if started.channel == potluck_collab::Channel::State {
            let averaged = started.averaged.value.vector;
            if self.params == self.sent_state {
                // To the bit what everybody has.
                self.params = averaged;
            } else {
                for ((param, averaged), sent) in self.params.iter_mut().zip(averaged).zip(&self.sent_state) {
                    *param += averaged - sent;
                }
            }
            return self.session.publish(self.snapshot());
        }
        self.note_round(self.session.epoch(), &started.averaged);
        let averaged = &started.averaged.value.vector;
        if self.fumbles(|it| it.optimizer.step(&mut it.params, averaged)) {
            return;
        }
        self.optimizer.step(&mut self.params, averaged);
        self.end_epoch();
    }

    /// Whether an error comes before the end of the epoch: before the average was applied, or behind it.
    fn fumbles(&mut self, apply: impl FnOnce(&mut Self)) -> bool {
        if self.clumsiness.next_u64() % 100 >= self.training.fumbles {
            return false;
        }
        if self.clumsiness.next_u64().is_multiple_of(2) {
            apply(self);
        }
        let epoch = self.session.epoch();
        assert!(self.session.abandon(), "there was an average to give up");
        self.record.push(Entry::GaveUp { peer: self.me(), epoch });
        self.sum.iter_mut().for_each(|value| *value = 0.0);
        self.count = 0;
        self.session.publish(self.snapshot());
        self.note_epoch();
        true
    }

    fn end_epoch(&mut self) {
        let snapshot = self.snapshot();
        self.session.epoch_done(Some(snapshot));
        self.session.observe_state(&self.params);
        self.note_epoch();
    }

    fn note_epoch(&self) {
        self.record.push(Entry::Epoch {
            peer: self.me(),
            lineage: self.session.lineage(),
            params: hash_of(&self.params),
            values: self.params.clone(),
            at: self.env.now(),
        });
    }

    async fn load_state(&mut self) {
        let from = self.session.epoch();
        let loaded =
            self.timed("load_state", async |trainer: &mut Self| trainer.session.load_state().await).await;
        let ends_epochs =
            matches!(self.training.policy, PolicyKind::LocalUpdates | PolicyKind::DiLoCo { .. });
        match loaded.value {
            Loaded::Nothing if self.training.auxiliary => {}
            Loaded::Nothing => return,
            Loaded::State(snapshot) => {
                let read = |name: &str| snapshot.blobs.get(name).map(|blob| floats(blob)).unwrap_or_default();
                let (params, velocity) = (read("params"), read("velocity"));
                if params.len() != self.params.len() || velocity.len() != self.optimizer.velocity.len() {
                    assert!(self.session.refuse_state("it is of another model", true), "it was loaded");
                    return self.session.publish(self.snapshot());
                }
                self.forget_samples();
                (self.params, self.optimizer.velocity) = (params, velocity);
            }
            Loaded::Gradients(average) => {
                self.forget_samples();
                if self.fumbles(|it| it.optimizer.step(&mut it.params, &average)) {
                    return;
                }
                self.optimizer.step(&mut self.params, &average);
                self.session.epoch_done(Some(self.snapshot()));
            }
            Loaded::Parameters(average) => {
                self.forget_samples();
                self.params = average;
                match ends_epochs {
                    true => self.session.epoch_done(Some(self.snapshot())),
                    false => self.session.publish(self.snapshot()),
                }
            }
        }
        self.record.push(Entry::Loaded { peer: self.me(), from, to: self.session.epoch() });
        self.note_epoch();
    }

    /// They were computed at parameters that are gone.
    fn forget_samples(&mut self) {
        self.sum.iter_mut().for_each(|value| *value = 0.0);
        self.count = 0;
        self.next_params = None;
    }

    fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (name, values) in [("params", &self.params), ("velocity", &self.optimizer.velocity)] {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            snapshot.blobs.insert(name.to_owned(), bytes.into());
        }
        snapshot
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
}
