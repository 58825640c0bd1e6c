//! How a round that led from one history to the next is written for those who have missed it, and read by them.

use crate::dialect::{Channel, MissedRound, Sequel};
use crate::factors::Factors;
use bytes::Bytes;
use potluck_averaging::AveragerConfig;
use potluck_transfer::{Sequel as Stored, Snapshot};
use std::collections::BTreeMap;

/// Names of facts and buffers.
pub(crate) const CHANNEL: &str = "channel";
pub(crate) const PLAN: &str = "plan";
pub(crate) const SAMPLES: &str = "samples";
pub(crate) const CUT: &str = "cut";
pub(crate) const PHASES: [&str; 2] = ["first", "second"];

/// Nothing is copied before somebody asks.
pub(super) fn write(sequel: Sequel) -> Stored {
    let (before, bytes) = (sequel.before, sequel.record.bytes());
    let make = move || {
        let (cut, phases) = sequel.record.join();
        let plan: String = sequel.plan_hash.iter().map(|byte| format!("{byte:02x}")).collect();
        let facts = [
            (CHANNEL, name(sequel.channel).to_owned()),
            (PLAN, plan),
            (SAMPLES, sequel.samples.to_string()),
            (CUT, cut),
        ];
        Snapshot {
            epoch: sequel.epoch,
            lineage: sequel.after,
            meta: facts.map(|(name, fact)| (name.to_owned(), fact)).into(),
            blobs: PHASES.iter().map(|phase| (*phase).to_owned()).zip(phases).collect(),
        }
    };
    Stored { before, bytes, make: Box::new(make) }
}

pub(crate) fn name(channel: Channel) -> &'static str {
    match channel {
        Channel::Gradients => "gradients",
        Channel::State => "state",
    }
}

/// What a stranger's sequel says, before its values are decoded.
pub(crate) struct Read {
    pub(crate) channel: Channel,
    plan_hash: [u8; 32],
    samples: u64,
    after: [u8; 32],
    cut: String,
    phases: Vec<Bytes>,
}

impl Read {
    /// `None` if it is no sequel.
    pub(crate) fn new(snapshot: Snapshot) -> Option<Self> {
        let Snapshot { lineage, meta, mut blobs, .. } = snapshot;
        let channel = [Channel::Gradients, Channel::State];
        let channel = channel
            .into_iter()
            .find(|channel| meta.get(CHANNEL).is_some_and(|fact| fact == name(*channel)))?;
        let phases = PHASES.iter().map_while(|phase| blobs.remove(*phase)).collect();
        Some(Self {
            channel,
            plan_hash: *blake3::Hash::from_hex(fact(&meta, PLAN)?).ok()?.as_bytes(),
            samples: fact(&meta, SAMPLES)?.parse().ok()?,
            after: lineage,
            cut: fact(&meta, CUT)?.to_owned(),
            phases,
        })
    }

    /// Its values. CPU work, to be off-loaded.
    ///
    /// # Errors
    /// What is wrong with them.
    pub(super) fn decode(
        self,
        config: &AveragerConfig,
        factors: Option<&Factors>,
    ) -> Result<MissedRound, String> {
        let (first, second) = config.decode(&self.cut, &self.phases)?;
        let vector = match factors {
            Some(factors) => factors.replay(&first, &second)?,
            None => first,
        };
        let Self { channel, plan_hash, samples, after, .. } = self;
        Ok(MissedRound { channel, plan_hash, samples, after, vector })
    }
}

fn fact<'a>(meta: &'a BTreeMap<String, String>, name: &str) -> Option<&'a str> {
    meta.get(name).map(String::as_str)
}
