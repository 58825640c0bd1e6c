//! What nobody holds goes back to the system.
//!
//! Peers come and go for days. The C library keeps a page that was once in use, between two pieces that are held, for the
//! next time: by itself a program's memory grows to the sum of all peaks. Once a minute the free pages are given back.
#![cfg(all(target_os = "linux", target_env = "gnu"))]
#![expect(unsafe_code, reason = "a function of the C library; the block states why it holds")]

use std::time::Duration;

/// Rarely enough that touching the pages anew costs nothing that can be measured.
const PERIOD: Duration = Duration::from_secs(60);

/// For as long as the runtime lives.
pub(crate) async fn give_memory_back() {
    loop {
        tokio::time::sleep(PERIOD).await;
        // It takes milliseconds, for which no network thread should stand still.
        // SAFETY: may be called at any time from any thread; what is held is not touched.
        let trimmed = tokio::task::spawn_blocking(|| unsafe { libc::malloc_trim(0) }).await;
        if trimmed.is_err() {
            return;
        }
    }
}
