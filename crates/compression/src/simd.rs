//! Run-time choice of instruction set. Every kernel is written once, without reassociation or fused multiply-add, and
//! compiled once per [`Level`]; so the fast paths give the same bytes as the portable one by construction. Most are plain
//! loops. Written in vector instructions are the half-precision conversions, and the sixteen lanes of PowerSGD.
//!
//! On aarch64 NEON is part of the baseline: there the portable level *is* the NEON level.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256, __m512, _mm_stream_ps, _mm256_add_ps, _mm256_castps256_ps128, _mm256_extractf128_ps,
    _mm256_loadu_ps, _mm256_mul_ps, _mm256_set1_ps, _mm256_storeu_ps, _mm256_stream_ps, _mm512_add_ps,
    _mm512_castps512_ps256, _mm512_extractf32x8_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_set1_ps,
    _mm512_storeu_ps, _mm512_stream_ps,
};
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
    /// Sixteen floats, in registers. Loops over more than one array of them are written with these: the compiler makes
    /// scalars of some, and which ones changes from release to release.
    type Lanes: Copy;
    /// Round to the nearest half, ties to even; NaN stays NaN (quiet, payload truncated); too large becomes infinity.
    fn narrow_halves(self, values: &[f32; 8]) -> [u16; 8];
    /// Widen exactly; a signalling NaN becomes quiet.
    fn widen_halves(self, halves: &[u16; 8]) -> [f32; 8];
    /// Load sixteen floats.
    fn load(self, line: &[f32; 16]) -> Self::Lanes;
    /// Store them.
    fn store(self, line: &mut [f32; 16], lanes: Self::Lanes);
    /// Sixteen times the same.
    fn splat(self, value: f32) -> Self::Lanes;
    /// Lane by lane.
    fn add(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// Lane by lane.
    fn multiply(self, a: Self::Lanes, b: Self::Lanes) -> Self::Lanes;
    /// Store to a cache line that is not read again soon: around the caches where there are instructions for it, so that
    /// it is not fetched only to be overwritten.
    #[inline(always)]
    fn stream(self, line: &mut [f32; 16], lanes: Self::Lanes) {
        self.store(line, lanes);
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
    type Lanes = [f32; 16];
    #[inline(always)]
    fn load(self, line: &[f32; 16]) -> [f32; 16] {
        *line
    }
    #[inline(always)]
    fn store(self, line: &mut [f32; 16], lanes: [f32; 16]) {
        *line = lanes;
    }
    #[inline(always)]
    fn splat(self, value: f32) -> [f32; 16] {
        [value; 16]
    }
    #[inline(always)]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }
    #[inline(always)]
    fn multiply(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|lane| a[lane] * b[lane])
    }
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
    type Lanes = [__m256; 2];
    #[inline(always)]
    fn load(self, line: &[f32; 16]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX. The unaligned loads read the two halves of `line`.
        unsafe { [_mm256_loadu_ps(line.as_ptr()), _mm256_loadu_ps(line[8..].as_ptr())] }
    }
    #[inline(always)]
    fn store(self, line: &mut [f32; 16], [low, high]: [__m256; 2]) {
        // SAFETY: `self` proves AVX. The unaligned stores write the two halves of `line`.
        unsafe {
            _mm256_storeu_ps(line.as_mut_ptr(), low);
            _mm256_storeu_ps(line[8..].as_mut_ptr(), high);
        }
    }
    #[inline(always)]
    fn splat(self, value: f32) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_set1_ps(value); 2] }
    }
    #[inline(always)]
    fn add(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn multiply(self, a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: `self` proves AVX.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn stream(self, line: &mut [f32; 16], lanes: [__m256; 2]) {
        let address = line.as_ptr().addr();
        let [low, high] = line.as_chunks_mut::<8>().0 else { return };
        for (to, half) in [low, high].into_iter().zip(lanes) {
            // SAFETY: `self` proves AVX. The stores write the 32 bytes of `to`: the first at once, which is for
            // addresses that are a multiple of 32 only; the second 16 at a time, for multiples of 16; the third
            // wherever that is.
            unsafe {
                if address.is_multiple_of(32) {
                    _mm256_stream_ps(to.as_mut_ptr(), half);
                } else if address.is_multiple_of(16) {
                    _mm_stream_ps(to.as_mut_ptr(), _mm256_castps256_ps128(half));
                    _mm_stream_ps(to[4..].as_mut_ptr(), _mm256_extractf128_ps::<1>(half));
                } else {
                    _mm256_storeu_ps(to.as_mut_ptr(), half);
                }
            }
        }
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

/// Proof that AVX-512 F, BW, DQ and VL are present as well.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512(F16c);

#[cfg(target_arch = "x86_64")]
impl Isa for Avx512 {
    type Lanes = __m512;
    #[inline(always)]
    fn narrow_halves(self, values: &[f32; 8]) -> [u16; 8] {
        self.0.narrow_halves(values)
    }
    #[inline(always)]
    fn widen_halves(self, halves: &[u16; 8]) -> [f32; 8] {
        self.0.widen_halves(halves)
    }
    #[inline(always)]
    fn load(self, line: &[f32; 16]) -> __m512 {
        // SAFETY: `self` proves AVX-512 F. The unaligned load reads the 16 floats of `line`.
        unsafe { _mm512_loadu_ps(line.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, line: &mut [f32; 16], lanes: __m512) {
        // SAFETY: `self` proves AVX-512 F. The unaligned store writes the 16 floats of `line`.
        unsafe { _mm512_storeu_ps(line.as_mut_ptr(), lanes) }
    }
    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn multiply(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves AVX-512 F.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn stream(self, line: &mut [f32; 16], lanes: __m512) {
        if line.as_ptr().addr().is_multiple_of(64) {
            // SAFETY: `self` proves AVX-512 F. The store writes the 64 bytes of `line`, whose address is a multiple of 64.
            unsafe { _mm512_stream_ps(line.as_mut_ptr(), lanes) };
        } else {
            // SAFETY: `self` proves AVX-512 DQ.
            let halves = unsafe { [_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes)] };
            self.0.stream(line, halves);
        }
    }
    #[inline(always)]
    fn prefetch(self, values: &[f32], at: usize) {
        self.0.prefetch(values, at);
    }
    #[inline(always)]
    fn stream_end(self) {
        self.0.stream_end();
    }
}

/// A loop to be compiled once per level. `run` must be `#[inline(always)]`, or it keeps the baseline instructions.
pub(crate) trait Kernel {
    type Output;
    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Avx512, F16c, Kernel};

    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(F16c(()))
    }

    #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
        kernel.run(Avx512(F16c(())))
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
