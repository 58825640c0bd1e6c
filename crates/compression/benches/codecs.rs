//! GB/s of f32 input per scheme, encode and decode, on one thread and on all, next to memcpy in the same run; and
//! PowerSGD. Prints one JSON object. `cargo bench -p potluck-compression [-- SCHEME]`
#![expect(clippy::print_stdout, reason = "the result of a benchmark is what it prints")]
#![expect(clippy::disallowed_methods, reason = "a benchmark measures real time")]
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot run should say where")]

use std::hint::black_box;
use std::time::Instant;

use potluck_compression::low_rank::LowRank;
use potluck_compression::{Scheme, Scratch, simd};
use rayon::prelude::*;
use serde_json::{Value, json};

/// 64 MB: beyond every cache, as real gradients are.
const COUNT: usize = 1 << 24;
const REPEATS: usize = 7;

/// Sums of three uniform numbers: bell-shaped, like gradients.
fn gradient(count: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count).map(|_| (uniform() + uniform() + uniform()) * 1e-3).collect()
}

/// Seconds of the fastest call: other processes only ever add time.
fn fastest(mut work: impl FnMut()) -> f64 {
    work();
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

fn gb_per_second(values: usize, seconds: f64) -> f64 {
    ((values * 4) as f64 / seconds / 1e9 * 100.0).round() / 100.0
}

/// One thread's buffers.
#[derive(Default)]
struct Lane {
    bytes: Vec<u8>,
    scratch: Scratch,
    decoded: Vec<f32>,
    sum: Vec<f32>,
}

fn measure(scheme: Scheme, values: &[f32], lanes: &mut [Lane]) -> Value {
    let share = values.len().div_ceil(lanes.len());
    let single = lanes.len() == 1;
    let each = |lanes: &mut [Lane], work: &(dyn Fn(&mut Lane, &[f32]) + Sync)| {
        if single {
            work(&mut lanes[0], values);
        } else {
            lanes.par_iter_mut().zip(values.par_chunks(share)).for_each(|(lane, part)| work(lane, part));
        }
    };
    let encode = fastest(|| {
        each(lanes, &|lane, part| {
            lane.bytes.clear();
            black_box(scheme.encode(part, &mut lane.bytes, &mut lane.scratch).unwrap());
        });
    });
    let decode = fastest(|| {
        each(lanes, &|lane, part| {
            lane.decoded.resize(part.len(), 0.0);
            scheme.decode(&lane.bytes, black_box(&mut lane.decoded)).unwrap();
        });
    });
    let decode_add = fastest(|| {
        each(lanes, &|lane, _| scheme.decode_add(&lane.bytes, 0.5, black_box(&mut lane.decoded)).unwrap());
    });
    let decode_sum = fastest(|| {
        each(lanes, &|lane, part| {
            lane.sum.resize(part.len(), 0.0);
            black_box(scheme.decode_sum(&lane.bytes, 0.5, &lane.sum, &mut lane.decoded).unwrap());
        });
    });
    let encode_scaled = fastest(|| {
        each(lanes, &|lane, part| {
            lane.bytes.clear();
            black_box(scheme.encode_scaled(part, 0.5, &mut lane.bytes, &mut lane.scratch).unwrap());
        });
    });
    json!({
        "encode": gb_per_second(values.len(), encode),
        "decode": gb_per_second(values.len(), decode),
        "decode_add": gb_per_second(values.len(), decode_add),
        "decode_sum": gb_per_second(values.len(), decode_sum),
        "encode_scaled": gb_per_second(values.len(), encode_scaled),
    })
}

fn memcpy(values: &[f32], threads: usize) -> f64 {
    let mut copy = vec![0.0_f32; values.len()];
    let share = values.len().div_ceil(threads);
    let seconds = fastest(|| {
        if threads == 1 {
            black_box(&mut copy).copy_from_slice(black_box(values));
        } else {
            let parts = copy.par_chunks_mut(share).zip(values.par_chunks(share));
            parts.for_each(|(to, from)| to.copy_from_slice(from));
        }
    });
    gb_per_second(values.len(), seconds)
}

/// Milliseconds of one round of a group of one, without the network, and of its steps.
fn power_sgd(side: usize, rank: usize) -> Value {
    let grad = gradient(side * side);
    let mut out = vec![0.0_f32; grad.len()];
    let mut state = LowRank::new(side, side, rank, 1, 0).unwrap();
    let mut best = [f64::INFINITY; 4];
    for _ in 0..=REPEATS {
        let start = Instant::now();
        let p = state.begin(&grad).unwrap().to_vec();
        let begun = start.elapsed();
        let q = state.phase_p_done(&p).unwrap().to_vec();
        let projected = start.elapsed();
        state.finish(&q, black_box(&mut out)).unwrap();
        state.commit().unwrap();
        let done = start.elapsed();
        for (slot, time) in best.iter_mut().zip([done, begun, projected - begun, done - projected]) {
            *slot = slot.min(time.as_secs_f64());
        }
    }
    let [total, begin, project, finish] = best.map(|seconds| (seconds * 1e5).round() / 100.0);
    json!({"side": side, "rank": rank, "ms": total, "begin_ms": begin, "phase_p_done_ms": project, "finish_ms": finish})
}

fn main() {
    let only = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let values = gradient(COUNT);
    let threads = rayon::current_num_threads();
    let mut schemes = serde_json::Map::new();
    for scheme in Scheme::ALL.iter().filter(|s| only.as_deref().is_none_or(|name| s.name().contains(name))) {
        let single = measure(*scheme, &values, &mut [Lane::default()]);
        let mut lanes: Vec<Lane> = (0..threads).map(|_| Lane::default()).collect();
        let all = measure(*scheme, &values, &mut lanes);
        let bytes = scheme.encoded_len(COUNT) as f64 / COUNT as f64;
        schemes.insert(
            scheme.name().to_owned(),
            json!({"bytes_per_value": (bytes * 1e4).round() / 1e4, "one_thread": single, "all_threads": all}),
        );
    }
    let report = json!({
        "benchmark": "compression",
        "unit": "GB/s of f32 input, best of 7",
        "values": COUNT,
        "threads": threads,
        "simd": format!("{:?}", simd::detected()),
        "memcpy": {"one_thread": memcpy(&values, 1), "all_threads": memcpy(&values, threads)},
        "schemes": schemes,
        "power_sgd": power_sgd(4096, 4),
    });
    println!("{}", serde_json::to_string_pretty(&report).unwrap());
}
