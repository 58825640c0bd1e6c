//! One file per algorithm. `codebook` holds what the two 256-entry codebook formats share.

pub(crate) mod bfloat16;
pub(crate) mod blockwise4;
pub(crate) mod blockwise8;
mod codebook;
mod dynamic_map;
pub(crate) mod float16;
pub(crate) mod none;
pub(crate) mod quantile8;
pub(crate) mod scaled_float16;
pub(crate) mod uniform8;
