//! What every transport must do; see `run_all`.
