//! PowerSGD: full rank is exact, error feedback follows the sum, an aborted round leaves no trace.
#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use potluck_compression::low_rank::{LowRank, LowRankError, orthogonalize};
use potluck_compression::simd::{Level, with_level};
use proptest::prelude::*;

/// Numbers in (-1, 1) from a seed.
fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// One round of a group of one.
fn round(state: &mut LowRank, grad: &[f32]) -> Vec<f32> {
    let p = state.begin(grad).unwrap().to_vec();
    let q = state.phase_p_done(&p).unwrap().to_vec();
    let mut out = vec![f32::NAN; grad.len()];
    state.finish(&q, &mut out).unwrap();
    out
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

proptest! {
    #[test]
    fn full_rank_is_exact(rows in 1_usize..40, columns in 1_usize..40, seed: u64) {
        let grad = random(rows * columns, seed);
        let mut state = LowRank::new(rows, columns, rows.min(columns), seed, 0).unwrap();
        let out = round(&mut state, &grad);
        for (found, expected) in out.iter().zip(&grad) {
            prop_assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        }
    }

    #[test]
    fn every_level_gives_the_same_bits(rows in 1_usize..70, columns in 1_usize..70, rank in 1_usize..7, seed: u64) {
        let grads = [random(rows * columns, seed), random(rows * columns, seed ^ 7)];
        let run = || {
            let mut state = LowRank::new(rows, columns, rank, seed, 3).unwrap();
            let outs: Vec<Vec<f32>> = grads.iter().map(|grad| {
                let out = round(&mut state, grad);
                state.commit().unwrap();
                out
            }).collect();
            (outs, state.export_memory(), state.export_q())
        };
        prop_assert_eq!(run(), with_level(Level::Portable, run));
    }

    #[test]
    fn columns_become_orthonormal(rows in 8_usize..100, rank in 1_usize..8, seed: u64) {
        let mut matrix = random(rows * rank, seed);
        orthogonalize(&mut matrix, rank);
        orthogonalize(&mut matrix, rank);
        for a in 0..rank {
            for b in 0..rank {
                let dot: f32 = matrix.chunks(rank).map(|row| row[a] * row[b]).sum();
                prop_assert!((dot - f32::from(u8::from(a == b))).abs() < 1e-4, "{a} {b} {dot}");
            }
        }
    }
}

#[test]
#[cfg_attr(
    not(target_arch = "x86_64"),
    ignore = "only x86-64 has such instructions; minutes under emulation"
)]
fn matrices_that_are_written_around_the_caches_have_the_same_bits() {
    // Above the threshold; rows of every alignment, of none but that of lines, and in between; ranks of two groups and of one.
    for (rows, columns, rank) in [(2047, 2053, 5), (2048, 2064, 4), (2049, 2052, 3), (2047, 2053, 2)] {
        let grads = [random(rows * columns, 5), random(rows * columns, 6)];
        let run = || {
            let mut state = LowRank::new(rows, columns, rank, 1, 0).unwrap();
            round(&mut state, &grads[0]);
            state.commit().unwrap();
            let out = round(&mut state.clone(), &grads[1]);
            (out, state.export_memory(), state.export_q())
        };
        let portable = with_level(Level::Portable, run);
        assert!(run() == portable && with_level(Level::Avx2, run) == portable, "{rows} x {columns}");
    }
}

#[test]
fn error_feedback_follows_the_sum_over_100_steps() {
    let (rows, columns) = (24, 16);
    let mut state = LowRank::new(rows, columns, 2, 1, 0).unwrap();
    let drift = random(rows * columns, 99);
    let (mut meant, mut sent) = (vec![0.0_f32; rows * columns], vec![0.0_f32; rows * columns]);
    for step in 0..100 {
        let noise = random(rows * columns, 1000 + step);
        let grad: Vec<f32> = drift.iter().zip(&noise).map(|(d, n)| d + 0.1 * n).collect();
        let out = round(&mut state, &grad);
        state.commit().unwrap();
        meant.iter_mut().zip(&grad).for_each(|(sum, v)| *sum += v);
        sent.iter_mut().zip(&out).for_each(|(sum, v)| *sum += v);
    }
    let missing: Vec<f32> = meant.iter().zip(&sent).map(|(a, b)| a - b).collect();
    // Nothing is lost: what was not sent is in the memory ...
    let memory = state.export_memory();
    let unaccounted: Vec<f32> = missing.iter().zip(&memory).map(|(a, b)| a - b).collect();
    assert!(norm(&unaccounted) < 1e-3 * norm(&meant), "{} of {}", norm(&unaccounted), norm(&meant));
    // ... and the memory stays bounded: it is the worth of a few steps, not of a hundred.
    assert!(norm(&missing) < 0.15 * norm(&meant), "{} of {}", norm(&missing), norm(&meant));
}

/// Each peer keeps what the factors lost of its own gradient: nothing of it lies in the span of P. Together that is what the
/// average lacks.
#[test]
fn a_peer_keeps_what_is_lost_of_its_own() {
    let (rows, columns, rank, peers) = (30, 40, 3, 4);
    let mean = |vectors: &[Vec<f32>]| -> Vec<f32> {
        (0..vectors[0].len()).map(|at| vectors.iter().map(|v| v[at]).sum::<f32>() / peers as f32).collect()
    };
    let grads: Vec<Vec<f32>> = (0..peers).map(|peer| random(rows * columns, 11 + peer)).collect();
    let mut states: Vec<LowRank> =
        (0..peers).map(|_| LowRank::new(rows, columns, rank, 5, 0).unwrap()).collect();
    let all =
        |states: &mut [LowRank], of: &mut dyn FnMut(usize, &mut LowRank) -> Vec<f32>| -> Vec<Vec<f32>> {
            states.iter_mut().enumerate().map(|(peer, state)| of(peer, state)).collect()
        };
    let mut p = mean(&all(&mut states, &mut |peer, state| state.begin(&grads[peer]).unwrap().to_vec()));
    let q = mean(&all(&mut states, &mut |_, state| state.phase_p_done(&p).unwrap().to_vec()));
    orthogonalize(&mut p, rank);
    orthogonalize(&mut p, rank);
    let mut out = vec![0.0; rows * columns];
    let memories = all(&mut states, &mut |_, state| {
        state.finish(&q, &mut out).unwrap();
        state.commit().unwrap();
        state.export_memory()
    });
    for (memory, grad) in memories.iter().zip(&grads) {
        let mut within = vec![0.0_f32; rank * columns];
        for (row, values) in p.chunks(rank).zip(memory.chunks(columns)) {
            for (at, factor) in row.iter().enumerate() {
                values
                    .iter()
                    .enumerate()
                    .for_each(|(column, value)| within[at * columns + column] += factor * value);
            }
        }
        assert!(norm(&within) < 1e-4 * norm(grad), "{} of {}", norm(&within), norm(grad));
    }
    let lacking: Vec<f32> = mean(&grads).iter().zip(&out).map(|(mean, out)| mean - out).collect();
    let off: Vec<f32> =
        mean(&memories).iter().zip(&lacking).map(|(found, lacking)| found - lacking).collect();
    assert!(norm(&off) < 1e-4 * norm(&lacking));
}

#[test]
fn an_aborted_round_changes_nothing() {
    let grads: Vec<Vec<f32>> = (0..4).map(|seed| random(60, seed + 5)).collect();
    let (mut clean, mut disturbed) =
        (LowRank::new(10, 6, 3, 7, 1).unwrap(), LowRank::new(10, 6, 3, 7, 1).unwrap());
    for (step, grad) in grads.iter().enumerate() {
        let other = random(60, 77 + step as u64);
        match step {
            0 => drop(disturbed.begin(&other).map(|_| ())),
            1 => {
                let p = disturbed.begin(&other).unwrap().to_vec();
                disturbed.phase_p_done(&p).unwrap();
            }
            2 => drop(round(&mut disturbed, &other)),
            _ => assert!(disturbed.begin(&[f32::NAN; 60]).is_err()),
        }
        disturbed.abort();
        assert_eq!(disturbed.export_memory(), clean.export_memory());
        assert_eq!(disturbed.export_q(), clean.export_q());
        assert_eq!(round(&mut disturbed, grad), round(&mut clean, grad));
        clean.commit().unwrap();
        disturbed.commit().unwrap();
    }
}

#[test]
fn a_zero_gradient_does_not_end_learning() {
    let mut state = LowRank::new(6, 5, 2, 3, 0).unwrap();
    assert_eq!(round(&mut state, &[0.0; 30]), [0.0; 30]);
    state.commit().unwrap();
    let out = round(&mut state, &random(30, 4));
    assert!(norm(&out) > 0.1);
}

#[test]
fn state_moves_to_another_peer() {
    let mut old = LowRank::new(7, 9, 2, 5, 0).unwrap();
    round(&mut old, &random(63, 8));
    old.commit().unwrap();
    let mut new = LowRank::new(7, 9, 2, 6, 0).unwrap();
    new.import_q(&old.export_q()).unwrap();
    new.import_memory(&old.export_memory()).unwrap();
    assert_eq!(new.export_memory(), old.export_memory());
    let (a, b) = (round(&mut new, &random(63, 9)), round(&mut old, &random(63, 9)));
    // The sums behind are the same up to rounding (the old peer takes its last approximation out while it adds).
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5));
}

#[test]
fn misuse_is_refused_by_name() {
    assert!(matches!(LowRank::new(0, 3, 1, 0, 0), Err(LowRankError::Shape { .. })));
    assert!(matches!(LowRank::new(usize::MAX, 3, 1, 0, 0), Err(LowRankError::Shape { .. })));
    let mut state = LowRank::new(2, 3, 1, 0, 0).unwrap();
    let order = LowRankError::Order { called: "phase_p_done", expected: "begin" };
    assert_eq!(state.phase_p_done(&[0.0; 2]), Err(order));
    let length = LowRankError::Length { what: "grad", expected: 6, found: 5 };
    assert_eq!(state.begin(&[0.0; 5]), Err(length));
    let mut grad = [1.0; 6];
    grad[4] = f32::INFINITY;
    assert_eq!(state.begin(&grad), Err(LowRankError::NotFinite { what: "grad", index: 4 }));
    state.begin(&[1.0; 6]).unwrap();
    assert!(matches!(
        state.phase_p_done(&[f32::NAN; 2]),
        Err(LowRankError::NotFinite { what: "P", index: 0 })
    ));
    assert!(state.commit().is_err());
}
