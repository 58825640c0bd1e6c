//! Invariant 1. Every value of an average is the weighted mean over some of the members' contributions: over all of
//! them in a round without faults, and part by part over those that were not lost in a round with faults.

use crate::record::Entry;
use potluck_net::PeerId;
use std::collections::BTreeMap;

/// Beyond this many members, subsets are not tried one by one; the value must then lie between the contributions.
const SUBSETS_MEMBERS_MAX: usize = 8;
/// Rounding of f32 sums in group order against f64.
const TOLERANCE: f64 = 1e-5;

type Contribution<'a> = (f64, &'a [f32]);

pub(super) fn check(entries: &[Entry]) -> Vec<String> {
    let mut contributions: BTreeMap<(PeerId, u64), Vec<Contribution<'_>>> = BTreeMap::new();
    let mut found = Vec::new();
    for entry in entries {
        match entry {
            Entry::Contribution { peer, epoch, weight, vector } => {
                contributions.entry((*peer, *epoch)).or_default().push((*weight, vector));
            }
            Entry::Round { peer, epoch, averaged, faults }
                if !averaged.alone && averaged.weight_total > 0.0 =>
            {
                let members = averaged.members.iter();
                let given: Option<Vec<_>> =
                    members.map(|member| contributions.get(&(*member, *epoch)).cloned()).collect();
                let Some(given) = given else { continue };
                let good = |chosen: &Vec<Contribution<'_>>| {
                    let values = averaged.vector.iter().enumerate();
                    values
                        .into_iter()
                        .all(|(index, value)| explained(index, f64::from(*value), chosen, faults.is_empty()))
                };
                if !choices(&given).iter().any(good) {
                    found.push(format!(
                        "epoch {epoch}, peer {}: {:?} of {} is no mean of {given:?}",
                        peer.short(),
                        averaged.vector,
                        averaged.weight_total
                    ));
                }
            }
            _ => {}
        }
    }
    found
}

/// A peer that reloads may average the same epoch twice, in two groups: all ways to choose one contribution of each.
fn choices<'a>(given: &[Vec<Contribution<'a>>]) -> Vec<Vec<Contribution<'a>>> {
    const CHOICES_MAX: usize = 4096;
    given.iter().fold(vec![Vec::new()], |chosen, candidates| {
        let with = |before: &Vec<Contribution<'a>>, next: &Contribution<'a>| {
            before.iter().chain([next]).copied().collect::<Vec<_>>()
        };
        let all = chosen.iter().flat_map(|before| candidates.iter().map(move |next| with(before, next)));
        all.take(CHOICES_MAX).collect()
    })
}

/// Whether the value is the mean over all members or, if faults were noticed (perhaps by others only), over some.
fn explained(index: usize, value: f64, given: &[(f64, &[f32])], clean: bool) -> bool {
    let given: Vec<(f64, f64)> =
        given.iter().map(|(weight, vector)| (*weight, f64::from(vector[index]))).collect();
    let finite: Vec<(f64, f64)> = given.into_iter().filter(|(_, value)| value.is_finite()).collect();
    let scale = finite.iter().map(|(_, value)| value.abs()).fold(1e-3, f64::max);
    let is_mean = |subset: u32| {
        let chosen = finite.iter().enumerate().filter(|(index, _)| subset & (1 << index) != 0);
        let (sum, weights) =
            chosen.fold((0.0, 0.0), |(sum, weights), (_, (w, v))| (sum + w * v, weights + w));
        weights > 0.0 && (sum / weights - value).abs() <= TOLERANCE * scale
    };
    if finite.len() > SUBSETS_MEMBERS_MAX {
        let (low, high) = finite
            .iter()
            .fold((f64::MAX, f64::MIN), |(low, high), (_, value)| (low.min(*value), high.max(*value)));
        return (low - TOLERANCE * scale..=high + TOLERANCE * scale).contains(&value);
    }
    let all = (1_u32 << finite.len()) - 1;
    is_mean(all) || (!clean && (1..all).any(is_mean))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_mean_is_found() {
        let given: [(f64, &[f32]); 3] = [(1.0, &[1.0]), (1.0, &[2.0]), (2.0, &[6.0])];
        assert!(explained(0, 3.75, &given, true));
        assert!(!explained(0, 3.0, &given, true), "an unweighted mean");
        assert!(explained(0, 1.5, &given, false), "one contribution was lost");
        assert!(!explained(0, 1.5, &given, true), "lost without a fault");
        assert!(!explained(0, 100.0, &given, false));
    }
}
