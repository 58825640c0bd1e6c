//! Once warm, no call allocates: counted by the allocator of this test program.

use potluck_compression::low_rank::LowRank;
use potluck_compression::{ErrorFeedback, Scheme, Scratch, first_non_finite, sum_values, tally};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, counting what each thread asks for.
struct Counting;

thread_local! {
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    CALLS.set(CALLS.get() + 1);
}

// SAFETY: every call is handed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the promises of `alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer is from `System`, which made all of them.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the pointer is from `System`, which made all of them.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often `work` allocates when it has run before.
fn allocations_once_warm(mut work: impl FnMut()) -> usize {
    for _ in 0..3 {
        work();
    }
    let before = CALLS.get();
    work();
    CALLS.get() - before
}

#[test]
fn the_counter_counts() {
    assert_eq!(allocations_once_warm(|| drop(std::hint::black_box(vec![0_u8; 10]))), 1);
}

#[test]
fn codecs_do_not_allocate() {
    let values: Vec<f32> = (0..50_000).map(|i| (i as f32).sin()).collect();
    for scheme in Scheme::ALL {
        let (mut bytes, mut scratch) = (Vec::new(), Scratch::new());
        let (mut decoded, mut sum) = (vec![0.0; values.len()], vec![0.0; values.len()]);
        let found = allocations_once_warm(|| {
            bytes.clear();
            scheme.encode(&values, &mut bytes, &mut scratch).unwrap();
            bytes.clear();
            scheme.encode_scaled(&values, 0.5, &mut bytes, &mut scratch).unwrap();
            scheme.decode(&bytes, &mut decoded).unwrap();
            scheme.decode_add(&bytes, 0.5, &mut sum).unwrap();
            scheme.decode_add_tally(&bytes, 0.5, &mut sum).unwrap();
            scheme.decode_sum(&bytes, 0.5, &sum, &mut decoded).unwrap();
        });
        assert_eq!(found, 0, "{scheme:?}");
    }
}

#[test]
fn sums_checks_and_error_feedback_do_not_allocate() {
    let mut values = vec![0.25_f32; 9000];
    let (sum, mut out) = (vec![1.0; 9000], vec![0.0; 9000]);
    let mut feedback = ErrorFeedback::new(9000);
    let found = allocations_once_warm(|| {
        sum_values(&values, 0.5, &sum, &mut out);
        assert_eq!((tally(&values).first_non_finite, first_non_finite(&values)), (None, None));
        feedback.compensate(&mut values);
        feedback.commit(&values, &out);
    });
    assert_eq!(found, 0);
}

#[test]
fn low_rank_rounds_do_not_allocate() {
    let (rows, columns, rank) = (40, 30, 5);
    let grad: Vec<f32> = (0..rows * columns).map(|i| (i as f32).sin()).collect();
    let mut state = LowRank::new(rows, columns, rank, 1, 0).unwrap();
    let (mut p, mut q) = (vec![0.0; rows * rank], vec![0.0; columns * rank]);
    let mut out = vec![0.0; grad.len()];
    let found = allocations_once_warm(|| {
        p.copy_from_slice(state.begin(&grad).unwrap());
        q.copy_from_slice(state.phase_p_done(&p).unwrap());
        state.finish(&q, &mut out).unwrap();
        state.commit().unwrap();
    });
    assert_eq!(found, 0);
}
