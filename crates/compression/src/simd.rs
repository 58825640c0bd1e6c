//! Run-time choice of instruction set. Every kernel is written once, as plain loops without reassociation or fused
//! multiply-add, and compiled once per [`Level`]; so the fast paths give the same bytes as the portable one by
//! construction. The only hand-written vector instructions are the half-precision conversions.
//!
//! On aarch64 NEON is part of the baseline: there the portable level *is* the NEON level.

use std::cell::Cell;
use std::sync::OnceLock;

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every CPU of this architecture has (SSE2 on x86-64, NEON on aarch64).
    Portable,
    /// x86-64 with AVX2 and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL on top of [`Level::Avx2`].
    Avx512,
}

thread_local! {
    static FORCED: Cell<Option<Level>> = const { Cell::new(None) };
}

/// The best level of this CPU. `POTLUCK_SIMD=portable` or `avx2` in the environment caps it.
#[must_use]
pub fn detected() -> Level {
    static DETECTED: OnceLock<Level> = OnceLock::new();
    *DETECTED.get_or_init(|| {
        let cap = match std::env::var("POTLUCK_SIMD").as_deref() {
            Ok("portable" | "scalar") => Level::Portable,
            Ok("avx2") => Level::Avx2,
            _ => Level::Avx512,
        };
        cpu_level().min(cap)
    })
}

#[cfg(target_arch = "x86_64")]
fn cpu_level() -> Level {
    use std::arch::is_x86_feature_detected as has;
    if !(has!("avx2") && has!("f16c")) {
        Level::Portable
    } else if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
        Level::Avx512
    } else {
        Level::Avx2
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn cpu_level() -> Level {
    Level::Portable
}

/// Run `work` on this thread with the kernels of `level` (or the best the CPU has, if that is lower).
/// For tests and benchmarks: results never depend on the level.
pub fn with_level<R>(level: Level, work: impl FnOnce() -> R) -> R {
    struct Restore(Option<Level>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let _restore = Restore(FORCED.replace(Some(level.min(detected()))));
    work()
}

fn level() -> Level {
    FORCED.get().unwrap_or_else(detected)
}

/// Operations that plain loops cannot express well, per instruction set.
pub(crate) trait Isa: Copy {
    /// Round to the nearest half, ties to even; NaN stays NaN (quiet, payload truncated); too large becomes infinity.
    fn narrow_halves(self, values: &[f32; 8]) -> [u16; 8];
    /// Widen exactly; a signalling NaN becomes quiet.
    fn widen_halves(self, halves: &[u16; 8]) -> [f32; 8];
    /// Copy to memory that is not read again soon: around the caches where there are instructions for it, so that the
    /// lines are not fetched only to be overwritten. The slices have equal lengths.
    #[inline(always)]
    fn stream(self, to: &mut [f32], from: &[f32]) {
        to.copy_from_slice(from);
    }
    /// Ask for the cache line of `values[at]` ahead of its use. A hint: `at` may be past the end.
    #[inline(always)]
    fn prefetch(self, _values: &[f32], _at: usize) {}
    /// Order what was [streamed](Self::stream) before everything that follows.
    #[inline(always)]
    fn stream_end(self) {}
}

/// The portable instruction set.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Isa for Portable {
    #[inline(always)]
    fn narrow_halves(self, values: &[f32; 8]) -> [u16; 8] {
        values.map(crate::half_float::to_half)
    }
    #[inline(always)]
    fn widen_halves(self, halves: &[u16; 8]) -> [f32; 8] {
        halves.map(crate::half_float::from_half)
    }
}

/// Proof that AVX2 and F16C are present: only `x86::run_*` makes one, and only `dispatch` calls those.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct F16c(());

#[cfg(target_arch = "x86_64")]
impl Isa for F16c {
    #[inline(always)]
    fn narrow_halves(self, values: &[f32; 8]) -> [u16; 8] {
        use std::arch::x86_64::{
            _MM_FROUND_TO_NEAREST_INT, _mm_storeu_si128, _mm256_cvtps_ph, _mm256_loadu_ps,
        };
        let mut halves = [0_u16; 8];
        // SAFETY: `self` proves AVX and F16C. The load reads the 8 floats of `values`, the store writes the 16 bytes
        // of `halves`; both are the unaligned forms.
        unsafe {
            let packed = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(values.as_ptr()));
            _mm_storeu_si128(halves.as_mut_ptr().cast(), packed);
        }
        halves
    }
    #[inline(always)]
    fn widen_halves(self, halves: &[u16; 8]) -> [f32; 8] {
        use std::arch::x86_64::{_mm_loadu_si128, _mm256_cvtph_ps, _mm256_storeu_ps};
        let mut values = [0.0_f32; 8];
        // SAFETY: `self` proves AVX and F16C. The load reads the 16 bytes of `halves`, the store writes the 8 floats
        // of `values`; both are the unaligned forms.
        unsafe {
            let wide = _mm256_cvtph_ps(_mm_loadu_si128(halves.as_ptr().cast()));
            _mm256_storeu_ps(values.as_mut_ptr(), wide);
        }
        values
    }
    #[inline(always)]
    fn stream(self, to: &mut [f32], from: &[f32]) {
        use std::arch::x86_64::{_mm_loadu_ps, _mm_stream_ps};
        assert_eq!(to.len(), from.len());
        // 16 bytes at a time: 32 have measured a quarter slower.
        let head = to.as_ptr().align_offset(16).min(to.len());
        let (to_head, to) = to.split_at_mut(head);
        let (from_head, from) = from.split_at(head);
        to_head.copy_from_slice(from_head);
        let ((to, to_tail), (from, from_tail)) = (to.as_chunks_mut::<4>(), from.as_chunks::<4>());
        for (to, from) in to.iter_mut().zip(from) {
            // SAFETY: SSE is part of x86-64. The load is the unaligned form; the store writes the 16 bytes of `to`,
            // which are aligned: `head` skipped what was not, and each group is 16 bytes.
            unsafe { _mm_stream_ps(to.as_mut_ptr(), _mm_loadu_ps(from.as_ptr())) };
        }
        to_tail.copy_from_slice(from_tail);
    }
    #[inline(always)]
    fn prefetch(self, values: &[f32], at: usize) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of x86-64, and a prefetch of any address has no effect but on the caches.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(values.as_ptr().wrapping_add(at).cast()) };
    }
    #[inline(always)]
    fn stream_end(self) {
        // SAFETY: SSE is part of x86-64, and the instruction only orders stores.
        unsafe { std::arch::x86_64::_mm_sfence() };
    }
}

/// A loop to be compiled once per level. `run` must be `#[inline(always)]`, or it keeps the baseline instructions.
pub(crate) trait Kernel {
    type Output;
    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{F16c, Kernel};

    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(F16c(()))
    }

    #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(F16c(()))
    }
}

/// Run `kernel` with the best instructions at hand.
#[inline]
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    match level() {
        // SAFETY: `level` never exceeds `detected`, which saw AVX2 and F16C on this CPU.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { x86::run_avx2(kernel) },
        // SAFETY: as above; `detected` saw the four AVX-512 features too.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { x86::run_avx512(kernel) },
        _ => kernel.run(Portable),
    }
}
