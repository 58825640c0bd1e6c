//! What a caller decides about a session, checked once, at construction.

use crate::InviteError;
use potluck_averaging::Directory;
use potluck_compression::{Policy, TensorInfo};
use potluck_net::PeerId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Low-rank compression of matrices (PowerSGD, arXiv:1905.13727).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PowerSgd {
    /// Rank of the factors.
    pub rank: usize,
    /// Only tensors that shrink at least by this share are compressed.
    pub min_compression_ratio: f32,
}

/// When and what peers average. One file each in `policy/`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyKind {
    /// Gradients are averaged when `target_batch_size` samples are in; everybody waits for the average.
    #[default]
    Synchronous,
    /// Gradients are averaged while the next epoch's samples are already computed; applied one epoch late.
    DelayedGradient,
    /// The optimizer step runs beside the next samples; the average itself is waited for.
    DelayedOptimizer,
    /// Parameters are averaged beside the next samples; gradients as in `Synchronous`.
    DelayedState,
    /// Every peer applies its own gradients at once; parameters are averaged when the target is in.
    LocalUpdates,
    /// Like `LocalUpdates`, but averaged after `inner_steps` local steps, and the average is applied by an outer
    /// optimizer with Nesterov momentum (arXiv:2311.08105).
    DiLoCo {
        /// Local optimizer steps between two averages.
        inner_steps: u32,
        /// Learning rate of the outer step.
        outer_lr: f32,
        /// Nesterov momentum of the outer step.
        outer_momentum: f32,
    },
}

impl PolicyKind {
    /// Whether an epoch ends with an average of the state, not of gradients.
    pub(crate) fn ends_epochs_with_state(self) -> bool {
        matches!(self, Self::LocalUpdates | Self::DiLoCo { .. })
    }
}

/// When the parameters themselves are averaged, to undo what different hardware rounds differently.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateEvery {
    /// Every so many epochs.
    Epochs(u32),
    /// When the estimated distance between peers, relative to the norm of the parameters, exceeds this.
    Drift(f32),
    /// Never: all peers compute the same bits.
    #[default]
    Never,
}

/// Everything that a session needs to know. `SessionConfig::new` fills in defaults that fit most runs.
#[derive(Clone)]
pub struct SessionConfig {
    /// The run to take part in.
    pub run_id: String,
    /// Samples of one epoch, over all peers.
    pub target_batch_size: u64,
    /// The tensors of the gradient vector, in order.
    pub tensors: Vec<TensorInfo>,
    /// The tensors of the state vector, in order; empty if state is never averaged.
    pub state_tensors: Vec<TensorInfo>,
    /// How gradients travel.
    pub grad_compression: Policy,
    /// How parameters travel when they are averaged.
    pub state_compression: Policy,
    /// Low-rank compression of the gradients' matrices, on top of `grad_compression`.
    pub powersgd: Option<PowerSgd>,
    /// When and what peers average.
    pub policy: PolicyKind,
    /// When the parameters are averaged beside the gradients.
    pub average_state_every: StateEvery,
    /// Further things that must be equal on all peers (optimizer, scheduler, model revision), shown when they differ.
    pub manifest_extra: BTreeMap<String, String>,
    /// Peers that may already be in the run.
    pub bootstrap: Vec<PeerId>,
    /// Where to find more peers, such as the DHT.
    pub directory: Option<Arc<dyn Directory>>,
    /// This peer computes no gradients and only helps to average.
    pub auxiliary: bool,
    /// This peer expects not to be dialled by others.
    pub client_mode: bool,
    /// The owner of a closed run; `None` for an open one.
    pub owner: Option<PeerId>,
    /// The invite of a closed run, as text.
    pub invite: Option<String>,
    /// At most this long for one round, if it must be bounded by hand; normally it follows from observed rates.
    pub averaging_timeout: Option<Duration>,
    /// At most this long for one download of the state.
    pub load_state_timeout: Duration,
}

impl std::fmt::Debug for SessionConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SessionConfig({:?}, {:?}, {} samples)", self.run_id, self.policy, self.target_batch_size)
    }
}

impl SessionConfig {
    /// A session of an open run with the default policy.
    pub fn new(run_id: impl Into<String>, target_batch_size: u64, tensors: Vec<TensorInfo>) -> Self {
        Self {
            run_id: run_id.into(),
            target_batch_size,
            tensors,
            state_tensors: Vec::new(),
            grad_compression: Policy::default(),
            state_compression: Policy::default(),
            powersgd: None,
            policy: PolicyKind::Synchronous,
            average_state_every: StateEvery::Never,
            manifest_extra: BTreeMap::new(),
            bootstrap: Vec::new(),
            directory: None,
            auxiliary: false,
            client_mode: false,
            owner: None,
            invite: None,
            averaging_timeout: None,
            load_state_timeout: Duration::from_secs(600),
        }
    }

    /// Number of values of the gradient vector.
    pub fn gradient_len(&self) -> usize {
        total_len(&self.tensors)
    }

    /// Number of values of the state vector.
    pub fn state_len(&self) -> usize {
        total_len(&self.state_tensors)
    }

    /// Refuse what cannot work, naming the field, the value and what is allowed.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.run_id.is_empty() || self.run_id.len() > 200 {
            return Err(ConfigError::new("run_id", format!("{:?}", self.run_id), "1 to 200 bytes"));
        }
        if self.target_batch_size == 0 {
            return Err(ConfigError::new("target_batch_size", "0", "at least 1 sample"));
        }
        let averages_state = matches!(
            self.policy,
            PolicyKind::LocalUpdates | PolicyKind::DiLoCo { .. } | PolicyKind::DelayedState
        ) || self.average_state_every != StateEvery::Never;
        if averages_state && self.state_len() == 0 {
            return Err(ConfigError::new("state_tensors", "empty", "the tensors to average, in order"));
        }
        let averages_gradients = !matches!(self.policy, PolicyKind::LocalUpdates | PolicyKind::DiLoCo { .. });
        if averages_gradients && self.gradient_len() == 0 {
            return Err(ConfigError::new("tensors", "empty", "the gradients to average, in order"));
        }
        unique_names("tensors", &self.tensors)?;
        unique_names("state_tensors", &self.state_tensors)?;
        self.validate_compression()?;
        self.validate_policy()
    }

    fn validate_compression(&self) -> Result<(), ConfigError> {
        for (field, policy) in
            [("grad_compression", &self.grad_compression), ("state_compression", &self.state_compression)]
        {
            if let Err(error) = policy.validate() {
                return Err(ConfigError::new(field, error.to_string(), "a policy that nests less"));
            }
        }
        match self.powersgd {
            Some(PowerSgd { rank: 0, .. }) => Err(ConfigError::new("powersgd.rank", "0", "at least 1")),
            Some(PowerSgd { min_compression_ratio: ratio, .. }) if !(0.0..1.0).contains(&ratio) => {
                Err(ConfigError::new("powersgd.min_compression_ratio", ratio.to_string(), "0 <= ratio < 1"))
            }
            _ => Ok(()),
        }
    }

    fn validate_policy(&self) -> Result<(), ConfigError> {
        if let PolicyKind::DiLoCo { inner_steps, outer_lr, outer_momentum } = self.policy {
            if inner_steps == 0 {
                return Err(ConfigError::new("inner_steps", "0", "at least 1 local step"));
            }
            if !(outer_lr.is_finite() && outer_lr > 0.0) {
                return Err(ConfigError::new("outer_lr", outer_lr.to_string(), "a finite number above 0"));
            }
            if !(0.0..1.0).contains(&outer_momentum) {
                return Err(ConfigError::new("outer_momentum", outer_momentum.to_string(), "0 <= m < 1"));
            }
        }
        match self.average_state_every {
            StateEvery::Epochs(0) => {
                Err(ConfigError::new("average_state_every", "0 epochs", "at least 1 epoch, or Never"))
            }
            StateEvery::Drift(drift) if !(drift.is_finite() && drift > 0.0) => {
                Err(ConfigError::new("average_state_every", drift.to_string(), "a finite tolerance above 0"))
            }
            _ => Ok(()),
        }
    }
}

fn total_len(tensors: &[TensorInfo]) -> usize {
    tensors.iter().fold(0, |sum: usize, tensor| sum.saturating_add(tensor.numel()))
}

fn unique_names(field: &'static str, tensors: &[TensorInfo]) -> Result<(), ConfigError> {
    let mut seen = std::collections::BTreeSet::new();
    for tensor in tensors {
        if !seen.insert(tensor.key.as_str()) {
            return Err(ConfigError::new(field, format!("{:?} twice", tensor.key), "unique names"));
        }
    }
    Ok(())
}

/// A value that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} = {value}: allowed is {allowed}")]
pub struct ConfigError {
    /// Which field of the config.
    pub field: &'static str,
    /// What was given.
    pub value: String,
    /// What would do.
    pub allowed: &'static str,
}

impl ConfigError {
    fn new(field: &'static str, value: impl Into<String>, allowed: &'static str) -> Self {
        Self { field, value: value.into(), allowed }
    }

    /// A tensor that cannot have factors of this rank.
    pub(crate) fn powersgd(key: &str, error: &potluck_compression::low_rank::LowRankError) -> Self {
        Self::new("powersgd", format!("{key}: {error}"), "a smaller rank")
    }
}

/// Why a session could not start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// The config cannot work; nothing was sent.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The invite does not open this run.
    #[error("the invite does not open this run: {0}")]
    Invite(#[from] InviteError),
    /// The run is there, but it is configured differently.
    #[error("the run {run_id:?} is configured differently: {}", differences.join("; "))]
    Mismatch {
        /// Which run.
        run_id: String,
        /// One line per differing field: name, ours, theirs.
        differences: Vec<String>,
    },
    /// The network refused: one line per reason.
    #[error("could not join: {0}")]
    Network(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(key: &str) -> TensorInfo {
        TensorInfo::vector(key, 6, Default::default())
    }

    fn config() -> SessionConfig {
        SessionConfig::new("run", 64, vec![tensor("w")])
    }

    #[test]
    fn a_refusal_names_field_value_and_what_is_allowed() {
        let mut bad = config();
        bad.policy = PolicyKind::DiLoCo { inner_steps: 4, outer_lr: f32::NAN, outer_momentum: 0.9 };
        bad.state_tensors = vec![tensor("w")];
        let error = bad.validate().unwrap_err();
        assert_eq!(error.to_string(), "outer_lr = NaN: allowed is a finite number above 0");
    }

    #[test]
    fn what_cannot_have_an_effect_is_refused() {
        assert_eq!(config().validate(), Ok(()));
        let mut bad = config();
        bad.average_state_every = StateEvery::Epochs(3);
        assert_eq!(bad.validate().unwrap_err().field, "state_tensors");
        let mut bad = config();
        bad.target_batch_size = 0;
        assert_eq!(bad.validate().unwrap_err().field, "target_batch_size");
        let mut bad = config();
        bad.tensors.push(tensor("w"));
        assert_eq!(bad.validate().unwrap_err().field, "tensors");
    }
}
