//! The properties that the native protocol holds and that are measured in a second; `make sim` prints them all.

use potluck_tests::properties;

/// Those that hold today. A line of the table that is missed is no test: it is printed until it holds, then listed here.
const HELD: &[&str] = &[
    "P1 joining",
    "P2 detection",
    "P3 overhead, near",
    "P3 overhead, far",
    "P5 fault cost",
    "P6 agreement",
    "P6 one lineage",
    "P7 bytes",
    "P8 bandwidth",
    "P9 dial-out only",
    "P9 hole punching",
    "P10 newcomers",
    "P10 twenty at once",
    "P10 donors go on",
    "P11 time",
    "P12 safety",
    "P13 at rest",
];

#[test]
fn what_the_protocol_held_it_still_holds() {
    for wanted in HELD {
        let (name, measure) =
            properties::ALL.iter().find(|(name, _)| name == wanted).expect("it is in the table");
        let property = measure();
        assert!(property.holds, "{name}: {property}");
    }
}
