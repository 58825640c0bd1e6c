//! What newcomers load: a snapshot with the history that it belongs to, sealed here and taken over there.

use super::Core;
use crate::past::Past;
use crate::policy::Background;
use crate::progress::{Own, Winner};
use crate::sketch::Sketch;
use crate::{Lineage, Snapshot};
use bytes::Bytes;
use potluck_net::PeerId;
use tokio::time::Instant;

/// Name of the blob that a session adds to a snapshot.
pub(crate) const AGREED_BLOB: &str = "potluck.agreed";
/// Name of the outer optimizer's blob.
pub(crate) const VELOCITY_BLOB: &str = "potluck.velocity";
/// Name of the blob with PowerSGD's Q.
pub(crate) const Q_BLOB: &str = "potluck.powersgd.q";
/// Name of the past in a snapshot.
pub(crate) const PAST_META: &str = "potluck.past";
/// Name of the lineage's samples in a snapshot.
pub(crate) const SAMPLES_META: &str = "potluck.samples";
/// Name of the number of its state averages.
pub(crate) const STATE_AVERAGES_META: &str = "potluck.state_averages";

/// What a loaded state has replaced, as long as the program may refuse it; and what was loaded.
pub(super) struct Replaced {
    pub(super) lineage: Lineage,
    past: Past,
    q: Option<Bytes>,
    agreed: Option<Vec<f32>>,
    velocity: Vec<f32>,
    own: Own,
    sketch: Option<Sketch>,
    state_due: bool,
    state_averaged_at: Option<u64>,
    unsettled: bool,
    abandoned: bool,
    /// An average that ran in the background is dropped, which the others have.
    lost_average: bool,
    /// Who had said that its history is better.
    winner: Winner,
    loaded: Snapshot,
}

impl Core {
    /// Make a snapshot of this lineage ready for newcomers. The first one names the initial parameters: peers that
    /// start from different ones then have different histories, and one of them wins.
    pub(crate) fn seal(&mut self, mut snapshot: Snapshot) -> Snapshot {
        self.own_alone();
        if self.lineage.epoch == 0 && self.lineage.samples == 0 && self.applied.is_none() {
            let mut hasher = blake3::Hasher::new();
            for (name, blob) in &snapshot.blobs {
                hasher.update(name.as_bytes());
                hasher.update(blob);
            }
            let genesis = crate::manifest_hash(&crate::manifest(&self.config));
            let genesis = Lineage::genesis(&self.config.run_id, &genesis);
            self.lineage = genesis.state_averaged(hasher.finalize().as_bytes());
        }
        snapshot.epoch = self.lineage.epoch;
        snapshot.lineage = self.lineage.hash;
        snapshot.meta.insert(SAMPLES_META.to_owned(), self.lineage.samples.to_string());
        let state_averages = self.lineage.state_averages.to_string();
        snapshot.meta.insert(STATE_AVERAGES_META.to_owned(), state_averages);
        snapshot.meta.insert(PAST_META.to_owned(), self.past.to_text());
        if let Some(agreed) = &self.agreed {
            snapshot.blobs.insert(AGREED_BLOB.to_owned(), to_bytes(agreed));
        }
        if let Some(outer) = self.outer.as_ref().filter(|outer| !outer.velocity.is_empty()) {
            snapshot.blobs.insert(VELOCITY_BLOB.to_owned(), to_bytes(&outer.velocity));
        }
        if let Some(factors) = &self.factors {
            snapshot.blobs.insert(Q_BLOB.to_owned(), factors.q());
        }
        snapshot
    }

    /// Take over the history of a downloaded state of a winner, unless it is no better than ours: an epoch never falls. Answers
    /// whether epochs of ours are lost by it.
    pub(crate) fn adopt(
        &mut self,
        snapshot: &mut Snapshot,
        from: PeerId,
        now: Instant,
    ) -> Result<bool, String> {
        let lineage = Lineage::of(snapshot).ok_or("the state has no lineage that is one")?;
        let whole = snapshot.clone();
        snapshot.meta.remove(SAMPLES_META);
        snapshot.meta.remove(STATE_AVERAGES_META);
        let past =
            snapshot.meta.remove(PAST_META).and_then(|text| Past::from_text(&text)).unwrap_or_default();
        if !lineage.beats(&self.lineage) {
            return Err(format!("the state of {lineage} does not replace ours of {}", self.lineage));
        }
        let length = self.config.state_len();
        let read = |what: &str, blob: Option<Bytes>| match blob {
            None => Ok(None),
            Some(blob) => {
                from_bytes(&blob).filter(|values| values.len() == length).map(Some).ok_or_else(|| {
                    format!("the state's {what} are no {length} finite values in {} bytes", blob.len())
                })
            }
        };
        let agreed = read("agreed parameters", snapshot.blobs.remove(AGREED_BLOB))?;
        let velocity = read("outer velocities", snapshot.blobs.remove(VELOCITY_BLOB))?;
        let q = snapshot.blobs.remove(Q_BLOB);
        let q_before = self.factors.as_ref().map(|factors| factors.q());
        if let Some(factors) = &self.factors {
            factors.import(&q.ok_or("the state has no Q of low-rank compression")?)?;
        }
        let before = Replaced {
            lineage: self.lineage,
            past: self.past.clone(),
            q: q_before,
            agreed: self.agreed.take(),
            velocity: self
                .outer
                .as_mut()
                .map(|outer| std::mem::take(&mut outer.velocity))
                .unwrap_or_default(),
            own: self.own.clone(),
            sketch: self.sketch,
            state_due: self.state_due,
            state_averaged_at: self.state_averaged_at,
            unsettled: self.unsettled,
            abandoned: self.abandoned,
            lost_average: self.background != Background::Idle
                || self.state_next.is_some()
                || self.applied.is_some(),
            winner: Winner { peer: from, lineage },
            loaded: whole,
        };
        self.adopt_lineage(lineage, now);
        self.behind.served();
        self.replaced = Some(before);
        self.agreed = agreed;
        if let Some(outer) = &mut self.outer {
            outer.velocity = velocity.unwrap_or_default();
        }
        let lost = self.past.differs_from(&past);
        self.past = past;
        Ok(lost)
    }

    /// The program goes on with the state that was handed to it last: what is offered to others from now on.
    pub(crate) fn accept(&mut self) -> Option<Snapshot> {
        self.replaced.take().map(|before| before.loaded)
    }

    /// The program does not go on with the state that was handed to it last. If it has `kept` its own, everything is as it was
    /// before; else nobody knows what it has, and whoever has the state of before replaces it. Whether there was such a state.
    pub(crate) fn refuse(&mut self, now: Instant, kept: bool) -> bool {
        let Some(before) = self.replaced.take() else { return false };
        if kept {
            self.distrust(now, &before.winner);
        }
        self.adopt_lineage(before.lineage, now);
        (self.past, self.own, self.agreed) = (before.past, before.own, before.agreed);
        self.own.forget_clock();
        (self.sketch, self.state_due) = (before.sketch, before.state_due);
        self.state_averaged_at = before.state_averaged_at;
        (self.unsettled, self.abandoned) = (before.unsettled, before.abandoned);
        if let Some(outer) = &mut self.outer {
            outer.velocity = before.velocity;
        }
        if let Some((factors, q)) = self.factors.as_ref().zip(before.q) {
            factors.import(&q).expect("it was this peer's own");
        }
        if before.lost_average || !kept {
            // What the others have agreed on meanwhile never came here.
            self.given_up += 1;
            self.lineage = self.lineage.spoiled(&self.alone_hash());
            self.agreed = None;
            self.outer.iter_mut().for_each(|outer| outer.velocity.clear());
        }
        true
    }

    /// Take over a history without its parameters (a peer that only helps has none).
    pub(crate) fn adopt_lineage(&mut self, lineage: Lineage, now: Instant) {
        if lineage.epoch > self.lineage.epoch {
            self.retry = None;
        }
        self.lineage = lineage;
        self.unsettled = false;
        self.abandoned = false;
        self.background = Background::Idle;
        self.own.discard();
        self.own.restart_clock(now);
        self.applied = None;
        self.void = false;
        self.state_due = false;
        self.state_averaged_at = None;
        self.state_next = None;
        self.agreed_next = None;
        self.sketch = None;
        self.behind.start_anew();
        self.replaced = None;
    }
}

fn to_bytes(values: &[f32]) -> Bytes {
    values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
}

fn from_bytes(bytes: &[u8]) -> Option<Vec<f32>> {
    let (words, rest) = bytes.as_chunks::<4>();
    let values: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
    (rest.is_empty() && values.iter().all(|value| value.is_finite())).then_some(values)
}
