//! Which scheme a tensor travels in: plain data, so that it can be part of the run manifest and be compared by hash.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Scheme;

/// Policies may nest this deep; deeper ones are refused by [`Policy::validate`].
pub const POLICY_DEPTH_MAX: usize = 8;

/// What a tensor is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum TensorRole {
    /// An activation or an activation's gradient.
    Activation,
    /// A model parameter.
    Parameter,
    /// A parameter's gradient.
    Gradient,
    /// Optimizer statistics.
    Optimizer,
    /// Numbers that decisions hang on: under every policy they travel as they are.
    Exact,
    /// Not said.
    #[default]
    Unspecified,
}

/// What a policy may look at: never the values, so that all peers decide alike.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorInfo {
    /// The tensor's name in the run (hivemind: its number in the list).
    pub key: String,
    /// Its full shape; `[]` is a scalar.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: TensorRole,
}

impl TensorInfo {
    /// A vector of `count` values.
    #[must_use]
    pub fn vector(key: impl Into<String>, count: usize, role: TensorRole) -> Self {
        Self { key: key.into(), shape: vec![count], role }
    }

    /// Number of elements; saturates.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.shape.iter().fold(1, |count, dim| count.saturating_mul(*dim))
    }
}

/// Chooses a [`Scheme`] per tensor.
///
/// ```
/// use potluck_compression::{Policy, Scheme, TensorInfo, TensorRole};
/// let policy = Policy::SizeAdaptive {
///     threshold: 1 << 16,
///     less: Box::new(Policy::Fixed(Scheme::Float16)),
///     greater_equal: Box::new(Policy::Fixed(Scheme::Uniform8Bit)),
/// };
/// let bias = TensorInfo::vector("bias", 100, TensorRole::Gradient);
/// assert_eq!(policy.scheme_for(&bias), Scheme::Float16);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Policy {
    /// One scheme for all.
    Fixed(Scheme),
    /// By the full tensor's number of elements.
    SizeAdaptive {
        /// The smallest size that `greater_equal` takes.
        threshold: usize,
        /// For smaller tensors.
        less: Box<Policy>,
        /// For the others.
        greater_equal: Box<Policy>,
    },
    /// By role; `default` takes roles that are not named, and tensors without a role.
    RoleAdaptive {
        /// For activations.
        activation: Option<Box<Policy>>,
        /// For parameters.
        parameter: Option<Box<Policy>>,
        /// For gradients.
        gradient: Option<Box<Policy>>,
        /// For optimizer statistics.
        optimizer: Option<Box<Policy>>,
        /// For everything else.
        default: Box<Policy>,
    },
    /// By key; `default` takes the keys that are not listed.
    PerTensor {
        /// Policy per key.
        tensors: BTreeMap<String, Policy>,
        /// For everything else.
        default: Box<Policy>,
    },
    /// Carry what rounding lost into the next call (see [`ErrorFeedback`](crate::ErrorFeedback)).
    ErrorFeedback(Box<Policy>),
}

impl Default for Policy {
    fn default() -> Self {
        Self::Fixed(Scheme::None)
    }
}

impl From<Scheme> for Policy {
    fn from(scheme: Scheme) -> Self {
        Self::Fixed(scheme)
    }
}

/// A policy nests too deep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the compression policy nests {found} levels deep; at most {POLICY_DEPTH_MAX} are allowed")]
pub struct PolicyTooDeep {
    /// Levels found.
    pub found: usize,
}

impl Policy {
    /// The scheme of `tensor`.
    #[must_use]
    pub fn scheme_for(&self, tensor: &TensorInfo) -> Scheme {
        self.resolve(tensor).0
    }

    /// Whether `tensor` carries its rounding errors over.
    #[must_use]
    pub fn error_feedback_for(&self, tensor: &TensorInfo) -> bool {
        self.resolve(tensor).1
    }

    /// Whether any tensor may carry its rounding errors over.
    #[must_use]
    pub fn has_error_feedback(&self) -> bool {
        matches!(self, Self::ErrorFeedback(_)) || self.children().any(Self::has_error_feedback)
    }

    /// Refuse policies that nest too deep (they may come from a stranger's manifest).
    ///
    /// # Errors
    /// [`PolicyTooDeep`].
    pub fn validate(&self) -> Result<(), PolicyTooDeep> {
        match self.depth() {
            found if found > POLICY_DEPTH_MAX => Err(PolicyTooDeep { found }),
            _ => Ok(()),
        }
    }

    fn depth(&self) -> usize {
        1 + self.children().map(Self::depth).max().unwrap_or(0)
    }

    fn resolve(&self, tensor: &TensorInfo) -> (Scheme, bool) {
        match self {
            _ if tensor.role == TensorRole::Exact => (Scheme::None, false),
            Self::Fixed(scheme) => (*scheme, false),
            Self::ErrorFeedback(inner) => (inner.resolve(tensor).0, true),
            _ => self.child_for(tensor).resolve(tensor),
        }
    }

    /// The next policy on the way to a scheme.
    fn child_for(&self, tensor: &TensorInfo) -> &Self {
        match self {
            Self::Fixed(_) => self,
            Self::ErrorFeedback(inner) => inner,
            Self::SizeAdaptive { threshold, less, greater_equal } => {
                if tensor.numel() >= *threshold {
                    greater_equal
                } else {
                    less
                }
            }
            Self::RoleAdaptive { activation, parameter, gradient, optimizer, default } => {
                let chosen = match tensor.role {
                    TensorRole::Activation => activation,
                    TensorRole::Parameter => parameter,
                    TensorRole::Gradient => gradient,
                    TensorRole::Optimizer => optimizer,
                    TensorRole::Exact | TensorRole::Unspecified => &None,
                };
                chosen.as_deref().unwrap_or(default)
            }
            Self::PerTensor { tensors, default } => tensors.get(&tensor.key).unwrap_or(default),
        }
    }

    fn children(&self) -> Box<dyn Iterator<Item = &Self> + '_> {
        match self {
            Self::Fixed(_) => Box::new(std::iter::empty()),
            Self::ErrorFeedback(inner) => Box::new(std::iter::once(&**inner)),
            Self::SizeAdaptive { less, greater_equal, .. } => Box::new([&**less, greater_equal].into_iter()),
            Self::RoleAdaptive { activation, parameter, gradient, optimizer, default } => {
                let named = [activation, parameter, gradient, optimizer];
                Box::new(named.into_iter().flatten().map(|p| &**p).chain(std::iter::once(&**default)))
            }
            Self::PerTensor { tensors, default } => {
                Box::new(tensors.values().chain(std::iter::once(&**default)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixed(scheme: Scheme) -> Box<Policy> {
        Box::new(Policy::Fixed(scheme))
    }

    #[test]
    fn no_policy_touches_what_must_be_exact() {
        let exact = TensorInfo::vector("mask", 100, TensorRole::Exact);
        let tensors = BTreeMap::from([("mask".to_owned(), Policy::Fixed(Scheme::Float16))]);
        for policy in [
            Policy::Fixed(Scheme::Uniform8Bit),
            Policy::ErrorFeedback(fixed(Scheme::Blockwise4Bit)),
            Policy::PerTensor { tensors, default: fixed(Scheme::Float16) },
        ] {
            assert_eq!(policy.scheme_for(&exact), Scheme::None);
            assert!(!policy.error_feedback_for(&exact));
        }
    }

    #[test]
    fn size_boundary_belongs_to_greater_equal() {
        let policy = Policy::SizeAdaptive {
            threshold: 6,
            less: fixed(Scheme::Float16),
            greater_equal: fixed(Scheme::Blockwise8Bit),
        };
        let tensor = |shape: &[usize]| TensorInfo { shape: shape.to_vec(), ..TensorInfo::default() };
        assert_eq!(policy.scheme_for(&tensor(&[2, 3])), Scheme::Blockwise8Bit);
        assert_eq!(policy.scheme_for(&tensor(&[5])), Scheme::Float16);
        assert_eq!(policy.scheme_for(&tensor(&[])), Scheme::Float16);
    }

    #[test]
    fn role_key_and_feedback() {
        let feedback = Policy::ErrorFeedback(fixed(Scheme::Blockwise4Bit));
        let by_role = Policy::RoleAdaptive {
            activation: None,
            parameter: None,
            gradient: Some(Box::new(feedback)),
            optimizer: None,
            default: fixed(Scheme::Float16),
        };
        let policy = Policy::PerTensor {
            tensors: BTreeMap::from([("head".to_owned(), Policy::Fixed(Scheme::None))]),
            default: Box::new(by_role),
        };
        let gradient = TensorInfo::vector("body", 9, TensorRole::Gradient);
        let head = TensorInfo::vector("head", 9, TensorRole::Gradient);
        let parameter = TensorInfo::vector("body", 9, TensorRole::Parameter);
        assert_eq!(policy.scheme_for(&gradient), Scheme::Blockwise4Bit);
        assert_eq!(policy.scheme_for(&head), Scheme::None);
        assert_eq!(policy.scheme_for(&parameter), Scheme::Float16);
        assert!(policy.has_error_feedback() && policy.error_feedback_for(&gradient));
        assert!(!policy.error_feedback_for(&head) && !policy.error_feedback_for(&parameter));
        let json = serde_json::to_string(&policy).unwrap();
        assert_eq!(serde_json::from_str::<Policy>(&json).unwrap(), policy);
    }

    #[test]
    fn deep_nesting_is_refused() {
        let deep = (0..POLICY_DEPTH_MAX).fold(Policy::default(), |p, _| Policy::ErrorFeedback(Box::new(p)));
        assert_eq!(deep.validate(), Err(PolicyTooDeep { found: POLICY_DEPTH_MAX + 1 }));
        assert_eq!(Policy::default().validate(), Ok(()));
    }
}
