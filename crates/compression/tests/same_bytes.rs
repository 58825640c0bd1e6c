//! The same bytes on every architecture: digests that were taken on x86-64 with AVX-512. The other tests compare the
//! paths of one machine with one another.
#![expect(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use potluck_compression::low_rank::LowRank;
use potluck_compression::simd::{Level, with_level};
use potluck_compression::{Scheme, Scratch};

/// FNV-1a.
fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Bell-shaped values with zeros, a denormal and an outlier among them; no library's mathematics.
fn values(count: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut values: Vec<f32> = (0..count).map(|_| (uniform() + uniform() + uniform()) * 1e-3).collect();
    values.iter_mut().step_by(17).for_each(|value| *value = 0.0);
    (values[3], values[4]) = (1e-41, -0.25);
    values
}

fn check_scheme(scheme: Scheme, expected: [u64; 3]) {
    // Longer than the sample of the quantile estimate, and no multiple of anything.
    let values = values(40_003);
    let (mut bytes, mut scaled, mut scratch) = (Vec::new(), Vec::new(), Scratch::new());
    scheme.encode(&values, &mut bytes, &mut scratch).unwrap();
    scheme.encode_scaled(&values, 0.3, &mut scaled, &mut scratch).unwrap();
    let mut sum = vec![0.5; values.len()];
    scheme.decode_add(&bytes, 0.7, &mut sum).unwrap();
    let found = [digest(&bytes), digest(&scaled), digest(&little_endian(&sum))];
    assert_eq!(found, expected, "{scheme:?}: {found:#x?}");
}

#[test]
fn schemes() {
    for level in [Level::Portable, Level::Avx2, Level::Avx512] {
        with_level(level, || {
            for scheme in Scheme::ALL {
                check_scheme(*scheme, expected(*scheme));
            }
        });
    }
}

fn expected(scheme: Scheme) -> [u64; 3] {
    match scheme {
        Scheme::None => [0x1782_880f_a2d4_2f06, 0xa104_f0cb_974f_ecab, 0x8255_0bc8_466c_25f5],
        Scheme::Float16 => [0xec88_56e1_bad0_c94f, 0x839c_70f5_3e1f_a3ef, 0xc230_c879_5071_6b85],
        Scheme::ScaledFloat16 => [0xcfa2_887f_feeb_8081, 0xe314_9765_013d_5571, 0xb357_21f4_592f_4a18],
        Scheme::Uniform8Bit => [0x8350_e433_2272_ff07, 0xb862_4555_63f3_c864, 0x56fb_99b5_9d20_d4e6],
        Scheme::Quantile8Bit => [0xb920_d4bc_f9b6_a5a2, 0xd9b7_2c48_3084_5846, 0xcc18_b41d_f8e9_bf9a],
        Scheme::Blockwise8Bit => [0x0ff9_72c2_d7a0_5fdb, 0xd815_cf4f_d09b_965f, 0x4d2a_91c9_9ded_99ae],
        Scheme::BFloat16 => [0xce94_c685_a990_0208, 0x7636_92c6_138c_49d6, 0xc119_692a_c484_6a6f],
        Scheme::Blockwise4Bit => [0x8094_9455_effc_4ce6, 0x54ea_b8b7_ba33_83bb, 0x4b11_673c_8a30_d0c0],
        other => panic!("no digests for {other:?}: take them"),
    }
}

#[test]
fn low_rank() {
    let grad = values(300 * 200);
    for level in [Level::Portable, Level::Avx2, Level::Avx512] {
        with_level(level, || {
            let mut state = LowRank::new(300, 200, 5, 42, 7).unwrap();
            let mut out = vec![0.0; grad.len()];
            for _ in 0..3 {
                let p = state.begin(&grad).unwrap().to_vec();
                let q = state.phase_p_done(&p).unwrap().to_vec();
                state.finish(&q, &mut out).unwrap();
                state.commit().unwrap();
            }
            let found = [&out, &state.export_memory(), &state.export_q()].map(|v| digest(&little_endian(v)));
            assert_eq!(
                found,
                [0x5b5b_f94e_dedb_91a8, 0xba53_c05b_237c_3e83, 0xdf1f_78dc_6048_8f15],
                "{found:#x?}"
            );
        });
    }
}
