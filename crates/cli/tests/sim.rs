//! `potluck sim`: its whole output, and its figures against what averaging cannot do without.

mod support;

use support::{golden, run, stdout};

const SMALL: [&str; 9] = ["sim", "--peers", "4", "--values", "4e5", "--compute", "10", "--rounds", "3"];

fn sim(more: &[&str]) -> serde_json::Value {
    let output = run(&[&SMALL, more, &["--json"]].concat());
    serde_json::from_str(&stdout(&output)).expect("JSON")
}

fn figure(report: &serde_json::Value, name: &str) -> f64 {
    report[name].as_f64().unwrap_or_else(|| panic!("no {name} in {report}"))
}

#[test]
fn the_whole_output() {
    golden("sim", &run(&SMALL), &[], true);
    golden("sim-json", &run(&[&SMALL[..], &["--json"]].concat()), &[], true);
    golden("sim-churn", &run(&[&SMALL[..], &["--churn", "0.3", "--rounds", "6"]].concat()), &[], true);
    golden("sim-bad-compression", &run(&["sim", "--compression", "zip"]), &[], false);
    golden("sim-bad-churn", &run(&["sim", "--churn", "2"]), &[], false);
}

#[test]
fn the_same_seed_prints_the_same_and_another_one_does_not() {
    let figures =
        |seed: &str| stdout(&run(&[&SMALL[..], &["--churn", "0.3", "--seed", seed, "--json"]].concat()));
    assert_eq!(figures("5"), figures("5"));
    assert_ne!(figures("5"), figures("6"));
}

#[test]
fn an_all_reduce_moves_what_it_must_and_takes_as_long_as_the_link_needs() {
    let report = sim(&["--up", "20", "--down", "100", "--compression", "none"]);
    // Three quarters of the vector out to the reducers, and three quarters of it back.
    let least = 2.0 * 0.75 * 4e5 * 4.0;
    let sent = figure(&report, "bytes_sent");
    assert!((least..least * 1.05).contains(&sent), "{sent} of {least}");
    let seconds = figure(&report, "round_seconds");
    assert!(seconds > least / 2.5e6, "faster than the link: {seconds}");
    assert!(figure(&report, "up_used_in_round") > 0.5, "{report}");
    assert!(figure(&report, "up_used") < figure(&report, "up_used_in_round"), "{report}");
    assert_eq!((figure(&report, "members"), figure(&report, "rounds_failed")), (4.0, 0.0), "{report}");
    let half = figure(&sim(&["--up", "20", "--compression", "float16"]), "bytes_sent");
    assert!((0.49..0.52).contains(&(half / sent)), "{half} of {sent}");
    let twice = figure(&sim(&["--up", "10", "--compression", "none"]), "round_seconds");
    assert!(
        (1.7..2.1).contains(&(twice / seconds)),
        "half the upload, twice the time: {twice} and {seconds}"
    );
}

#[test]
fn what_is_extended_is_near_what_is_simulated_whole() {
    let large = ["--values", "12e6", "--rounds", "2", "--rtt", "20"];
    let (extended, whole) = (sim(&large), sim(&[&large[..], &["--full"]].concat()));
    assert_eq!(extended["simulated_values"].as_array().unwrap().len(), 2);
    for name in ["round_seconds", "bytes_sent", "epoch_seconds", "up_used_in_round"] {
        let ratio = figure(&extended, name) / figure(&whole, name);
        assert!((0.9..1.1).contains(&ratio), "{name}: {ratio} in {extended}\n{whole}");
    }
}
