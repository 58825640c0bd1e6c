//! Whole-system checks: toy models, a harness for simulated runs, the invariants that every run is checked against,
//! named scenarios, the exploration of random faults, and every decoder of strangers' bytes.

pub mod decoders;
pub mod explore;
pub mod harness;
pub mod hub;
pub mod invariants;
pub mod models;
pub mod properties;
pub mod record;
pub mod reference;
pub mod trainer;
