//! What this machine brings along: processor, memory, disk, graphics cards, clock.

use serde::Serialize;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use sysinfo::{Disks, MemoryRefreshKind, RefreshKind, System};

/// How long `nvidia-smi` may take; a wedged driver makes it hang.
const GPU_LIMIT: Duration = Duration::from_secs(4);
/// Less free memory or disk than this is worth a word.
const MEMORY_LOW_BYTES: u64 = 1 << 30;
const DISK_LOW_BYTES: u64 = 2 << 30;

/// See the module.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) processors: usize,
    /// 0 if the system does not say.
    pub(crate) memory_bytes: u64,
    pub(crate) memory_free_bytes: u64,
    pub(crate) disk_free_bytes: Option<u64>,
    pub(crate) gpus: Vec<String>,
    /// By this machine's own clock. Reported, not required: nothing decides by it.
    pub(crate) unix_seconds: u64,
}

impl Machine {
    /// Look at it.
    pub(crate) async fn look(unix_seconds: u64) -> Self {
        let kinds = RefreshKind::nothing().with_memory(MemoryRefreshKind::everything());
        let system = System::new_with_specifics(kinds).ok();
        Self {
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: system.as_ref().map_or(0, System::total_memory),
            memory_free_bytes: system.as_ref().map_or(0, System::available_memory),
            disk_free_bytes: std::env::current_dir().ok().and_then(|here| disk_free(&here)),
            gpus: gpus().await,
            unix_seconds,
        }
    }

    /// What will get in the way.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.memory_bytes > 0 && self.memory_free_bytes < MEMORY_LOW_BYTES {
            warnings
                .push("less than 1 GB of memory is free: training may be killed by the system".to_owned());
        }
        if self.disk_free_bytes.is_some_and(|free| free < DISK_LOW_BYTES) {
            warnings.push("less than 2 GB of disk is free here: checkpoints may not fit".to_owned());
        }
        warnings
    }
}

/// Free bytes of the disk that holds `path`.
fn disk_free(path: &Path) -> Option<u64> {
    let disks = Disks::new_with_refreshed_list().ok()?;
    let holders = disks.iter().filter(|disk| path.starts_with(disk.mount_point()));
    holders.max_by_key(|disk| disk.mount_point().components().count()).map(sysinfo::Disk::available_space)
}

/// Names and memory of NVIDIA's cards, if their tool is there.
async fn gpus() -> Vec<String> {
    let asked = tokio::process::Command::new("nvidia-smi")
        .args(["--query-gpu=name,memory.total", "--format=csv,noheader"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(GPU_LIMIT, asked).await {
        Ok(Ok(output)) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).lines().take(64).map(str::to_owned).collect()
        }
        _ => Vec::new(),
    }
}
