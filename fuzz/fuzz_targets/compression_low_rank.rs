//! PowerSGD's factors as strangers may average them: any values either make a finite Q, or are refused and leave no trace.
#![no_main]

use libfuzzer_sys::fuzz_target;
use potluck_compression::first_non_finite;
use potluck_compression::low_rank::LowRank;

/// `count` floats from the bytes of a stranger; ones behind their end.
fn floats(bytes: &[u8], count: usize) -> Vec<f32> {
    let words = bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word));
    words.chain(std::iter::repeat(1.0)).take(count).collect()
}

fuzz_target!(|input: (u8, u8, u8, Vec<u8>, Vec<u8>)| {
    let (rows, columns, rank, p, q) = input;
    let (rows, columns, rank) = (usize::from(rows), usize::from(columns), usize::from(rank % 9));
    let Ok(mut state) = LowRank::new(rows, columns, rank, 1, 0) else { return };
    let memory = state.export_memory();
    let grad: Vec<f32> = (0..rows * columns).map(|number| (number as f32 * 0.37).sin()).collect();
    state.begin(&grad).expect("a finite gradient is taken");
    let mut out = vec![0.0; grad.len()];
    let done = state
        .phase_p_done(&floats(&p, rows * rank))
        .map(|own| assert_eq!(first_non_finite(own), None))
        .and_then(|()| state.finish(&floats(&q, columns * rank), &mut out));
    if done.is_err() {
        state.abort();
        assert_eq!(state.export_memory(), memory);
        assert_eq!(out, vec![0.0; grad.len()]);
    }
    assert_eq!(first_non_finite(&state.export_q()), None);
});
