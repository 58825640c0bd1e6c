//! Linux: a notice is a file in memory that only its process holds, and others of the same user find it through `/proc`. It is
//! gone with its process, however that ends.
#![cfg(target_os = "linux")]

use super::{LocalRun, NOTICE_BYTES_MAX};
use rustix::fs::MemfdFlags;
use std::fs::{DirEntry, File};
use std::io::{Read, Result, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const NAME: &str = "potluck-notice";
/// How `/proc` shows it.
const LINK: &str = "/memfd:potluck-notice (deleted)";

/// A notice that lasts as long as this file is open.
pub(super) fn post(about: &LocalRun) -> Result<File> {
    let mut file = File::from(rustix::fs::memfd_create(NAME, MemfdFlags::CLOEXEC)?);
    serde_json::to_writer(&file, about)?;
    file.flush()?;
    Ok(file)
}

/// The notices of this user's processes, as far as this one may see them.
pub(super) fn runs() -> Vec<LocalRun> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    processes.filter_map(|entry| of_process(&entry.ok()?)).flatten().collect()
}

fn of_process(process: &DirEntry) -> Option<Vec<LocalRun>> {
    let pid: u32 = process.file_name().to_str()?.parse().ok()?;
    // Root may look at everybody's, and is asked for its own.
    let ours = process.metadata().ok()?.uid() == rustix::process::geteuid().as_raw();
    let files = std::fs::read_dir(process.path().join("fd")).ok().filter(|_| ours)?;
    let notices = files.filter_map(|file| read(&file.ok()?.path()));
    // Whoever a process has forked holds its files too.
    Some(notices.filter(|about| about.pid == pid).collect())
}

fn read(path: &Path) -> Option<LocalRun> {
    let link = std::fs::read_link(path).ok()?;
    if link != Path::new(LINK) {
        return None;
    }
    let mut text = Vec::new();
    File::open(path).ok()?.take(NOTICE_BYTES_MAX).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_notice_in_memory_is_found_while_it_lasts() {
        let pid = std::process::id();
        let about =
            |pid| LocalRun { run_id: format!("in memory of {pid}"), pid, dashboard: None, token: None };
        let found = |pid| runs().contains(&about(pid));
        let notice = post(&about(pid)).unwrap();
        assert!(found(pid));
        let inherited = post(&about(pid + 1)).unwrap();
        assert!(!found(pid + 1), "it is another process's");
        drop((notice, inherited));
        assert!(!found(pid));
    }
}
