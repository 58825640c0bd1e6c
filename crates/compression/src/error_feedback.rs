//! Error feedback (arXiv:1901.09847): what compression lost in one call is added to the next, so that the sum of what
//! is sent follows the sum of what was meant. Two phases, so that an aborted round changes nothing.

/// The residual of one tensor.
///
/// ```
/// # use potluck_compression::{ErrorFeedback, Scheme, Scratch};
/// let (mut feedback, mut scratch) = (ErrorFeedback::new(2), Scratch::new());
/// let mut values = [1.0, 0.01];
/// feedback.compensate(&mut values);
/// let (mut bytes, mut decoded) = (Vec::new(), [0.0; 2]);
/// Scheme::Blockwise4Bit.encode(&values, &mut bytes, &mut scratch)?;
/// Scheme::Blockwise4Bit.decode(&bytes, &mut decoded)?;
/// feedback.commit(&values, &decoded); // only if the round succeeded
/// assert_eq!(feedback.residual(), [0.0, 0.01]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ErrorFeedback {
    residual: Vec<f32>,
}

impl ErrorFeedback {
    /// No residual yet, for a tensor of `count` values.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self { residual: vec![0.0; count] }
    }

    /// Continue from a saved [`residual`](Self::residual); values that are not finite count as zero.
    #[must_use]
    pub fn from_residual(mut residual: Vec<f32>) -> Self {
        residual.iter_mut().filter(|v| !v.is_finite()).for_each(|v| *v = 0.0);
        Self { residual }
    }

    /// What is carried to the next call; save it with the model.
    #[must_use]
    pub fn residual(&self) -> &[f32] {
        &self.residual
    }

    /// Forget everything, as after loading other parameters.
    pub fn reset(&mut self) {
        self.residual.fill(0.0);
    }

    /// Add the residual to `values`, before they are encoded.
    ///
    /// # Panics
    /// If the length is not the one given to [`new`](Self::new).
    pub fn compensate(&self, values: &mut [f32]) {
        assert_eq!(values.len(), self.residual.len(), "error feedback belongs to a tensor of another size");
        for (value, residual) in values.iter_mut().zip(&self.residual) {
            *value += residual;
        }
    }

    /// The round succeeded: keep what was lost between `compensated` (after [`compensate`](Self::compensate)) and
    /// `decoded` (what the receivers read). Without this call the next round starts from the residual as it is.
    /// A difference that is not finite is dropped: it would never leave the residual again.
    ///
    /// # Panics
    /// If a length is not the one given to [`new`](Self::new).
    pub fn commit(&mut self, compensated: &[f32], decoded: &[f32]) {
        let count = self.residual.len();
        assert!(compensated.len() == count && decoded.len() == count, "lengths of one tensor differ");
        for (residual, (meant, sent)) in self.residual.iter_mut().zip(compensated.iter().zip(decoded)) {
            let lost = meant - sent;
            *residual = if lost.is_finite() { lost } else { 0.0 };
        }
    }
}
