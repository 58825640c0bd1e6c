//! What the native protocol promises (P1 to P13), measured in the simulator: each property is a
//! scenario that gives a figure, and the figure is compared with the target. `make sim` prints them as a table.

mod faults;
mod group;
mod members;
mod newcomers;
mod reach;
mod rounds;
mod scale;

pub use scale::in_groups;
use std::fmt;

/// One line of the table.
#[derive(Debug, Clone)]
pub struct Property {
    /// The figure to reach.
    pub target: &'static str,
    /// What was measured, or why nothing could be.
    pub measured: String,
    /// Whether the target is met.
    pub holds: bool,
}

/// What a scenario measured and whether that is good enough, or why it could not be measured.
pub type Found = Result<(String, bool), String>;

impl Property {
    fn new(target: &'static str, found: Found) -> Self {
        let (measured, holds) = found.unwrap_or_else(|reason| (format!("failed: {reason}"), false));
        Self { target, measured, holds }
    }
}

impl fmt::Display for Property {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<52} {}", self.target, self.measured)
    }
}

/// Measures one property.
pub type Measure = fn() -> Property;

/// Every property, by number and name.
pub const ALL: &[(&str, Measure)] = &[
    ("P1 joining", members::joining),
    ("P2 detection", members::detection),
    ("P2 no false death", members::no_false_death),
    ("P3 overhead, near", rounds::overhead_near),
    ("P3 overhead, far", rounds::overhead_far),
    ("P4 completeness", faults::completeness),
    ("P5 fault cost", faults::fault_cost),
    ("P6 agreement", faults::agreement),
    ("P6 one lineage", reach::one_lineage),
    ("P7 bytes", rounds::bytes),
    ("P8 bandwidth", rounds::bandwidth),
    ("P9 dial-out only", reach::dial_out),
    ("P9 hole punching", reach::hole_punching),
    ("P10 newcomers", newcomers::several_donors),
    ("P10 twenty at once", newcomers::twenty_at_once),
    ("P10 donors go on", newcomers::donors_go_on),
    ("P11 time", reach::clocks),
    ("P12 safety", faults::safety),
    ("P13 scale", scale::large),
    ("P13 at rest", scale::at_rest),
];
