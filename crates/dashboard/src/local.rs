//! Which runs have a peer on this machine: each posts a notice for its user while it runs, so that `potluck status` finds it by
//! name. On Linux it is in memory; elsewhere, or where a folder is named, it is a file there. That is held by the process that
//! wrote it; one that nobody holds is left over, and removed by whoever starts or looks next: a user's killed peers leave
//! one file each until then, and nothing after it.

#[cfg(target_os = "linux")]
mod memory;

use serde::{Deserialize, Serialize};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::SocketAddr;
#[cfg(unix)]
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
#[cfg(windows)]
use std::os::windows::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Longest notice that is read.
const NOTICE_BYTES_MAX: u64 = 64 << 10;
/// Notices of one process.
const NOTICES_MAX: u32 = 100;

#[cfg(windows)]
const SHARE_READ_AND_DELETE: u32 = 0x1 | 0x4;
#[cfg(windows)]
const SHARING_VIOLATION: i32 = 32;

/// What a peer says of itself to others of its user on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalRun {
    /// The run.
    pub run_id: String,
    /// The process.
    pub pid: u32,
    /// Where its dashboard is, if it has one.
    pub dashboard: Option<SocketAddr>,
    /// A token that leads to the run, if it has one.
    pub token: Option<String>,
}

/// A notice that is there for as long as this value.
#[derive(Debug)]
pub struct Notice {
    /// Where it is; one in memory is nowhere.
    path: Option<PathBuf>,
    // Held for its lock, or because it is all that there is.
    _file: File,
}

impl Drop for Notice {
    fn drop(&mut self) {
        let Some(path) = &self.path else { return };
        // If it is gone already, that is what is wanted.
        let _gone = std::fs::remove_file(path);
        // The last one takes the folder along; it is only removed when it is empty.
        let _kept = path.parent().map(std::fs::remove_dir);
    }
}

/// The folder that the user names.
fn named_folder() -> Option<PathBuf> {
    std::env::var_os("POTLUCK_RUNTIME_DIR").filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// `$POTLUCK_RUNTIME_DIR`, `$XDG_RUNTIME_DIR/potluck`, or `potluck-USER` in the folder for temporary files.
fn folder() -> PathBuf {
    let of_session = || std::env::var_os("XDG_RUNTIME_DIR").filter(|value| !value.is_empty());
    named_folder().or_else(|| of_session().map(|dir| PathBuf::from(dir).join("potluck"))).unwrap_or_else(
        || {
            let user = std::env::var("USER").unwrap_or_else(|_| "user".to_owned());
            std::env::temp_dir().join(format!("potluck-{}", user.replace('/', "_")))
        },
    )
}

impl Notice {
    /// Post a notice for this process. Not being able to is no reason not to run.
    ///
    /// # Errors
    /// The folder cannot be written, or belongs to somebody else.
    pub fn post(run_id: &str, dashboard: Option<SocketAddr>, token: Option<String>) -> Result<Self> {
        let about = LocalRun { run_id: run_id.to_owned(), pid: std::process::id(), dashboard, token };
        #[cfg(target_os = "linux")]
        if named_folder().is_none()
            && let Ok(file) = memory::post(&about)
        {
            return Ok(Self { path: None, _file: file });
        }
        Self::post_in(&folder(), &about)
    }

    fn post_in(folder: &Path, about: &LocalRun) -> Result<Self> {
        let mut builder = DirBuilder::new();
        let mut options = OpenOptions::new();
        #[cfg(unix)]
        {
            builder.mode(0o700);
            options.mode(0o600);
        }
        #[cfg(windows)]
        options.share_mode(SHARE_READ_AND_DELETE);
        builder.recursive(true);
        for number in 0..NOTICES_MAX {
            // Each time: whoever left last may have taken it along.
            builder.create(folder)?;
            let path = folder.join(format!("{}-{number}.json", about.pid));
            let mut file = match options.write(true).create_new(true).open(&path) {
                // Of another run of this process, or of a dead one that had the same number.
                Err(error) if matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::NotFound) => {
                    continue;
                }
                opened => opened?,
            };
            // Only a file of ours can be trusted to stay ours: in a shared folder somebody else may have made it.
            #[cfg(unix)]
            if std::fs::metadata(folder)?.uid() != file.metadata()?.uid() {
                std::fs::remove_file(&path)?;
                return Err(Error::new(ErrorKind::PermissionDenied, "the folder belongs to somebody else"));
            }
            #[cfg(not(windows))]
            file.lock()?;
            serde_json::to_writer(&file, about)?;
            file.flush()?;
            // Whoever starts removes what others left when they were killed. Not before it is known that the folder is ours.
            let _others = runs_in(folder);
            return Ok(Self { path: Some(path), _file: file });
        }
        Err(Error::new(ErrorKind::AlreadyExists, "too many notices of one process"))
    }
}

/// The runs with a peer on this machine, by name; what dead processes left is removed.
pub fn local_runs() -> Vec<LocalRun> {
    let mut runs = runs_in(&folder());
    #[cfg(target_os = "linux")]
    if named_folder().is_none() {
        runs.append(&mut memory::runs());
    }
    runs.sort_by(|one, other| (&one.run_id, one.pid).cmp(&(&other.run_id, other.pid)));
    runs
}

fn runs_in(folder: &Path) -> Vec<LocalRun> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths
        .filter(|path| path.extension().is_some_and(|end| end == "json"))
        .filter_map(|path| read(&path))
        .collect()
}

fn read(path: &Path) -> Option<LocalRun> {
    let file = File::open(path).ok()?;
    let mut text = String::new();
    (&file).take(NOTICE_BYTES_MAX).read_to_string(&mut text).ok()?;
    match is_held(&file, path) {
        // A file that is just being written has no lock yet, but no text either.
        Some(false) if !text.is_empty() => {
            // Somebody else may have been faster.
            let _gone = std::fs::remove_file(path);
            None
        }
        Some(true) => serde_json::from_str(&text).ok(),
        _ => None,
    }
}

/// Whether the process that wrote it still runs; None if that cannot be told.
#[cfg(not(windows))]
fn is_held(file: &File, _path: &Path) -> Option<bool> {
    match file.try_lock_shared() {
        Ok(()) => Some(false),
        Err(std::fs::TryLockError::WouldBlock) => Some(true),
        Err(std::fs::TryLockError::Error(_)) => None,
    }
}

/// A lock would keep others from reading there. Instead, nobody else may write while the file is held open.
#[cfg(windows)]
fn is_held(_file: &File, path: &Path) -> Option<bool> {
    match OpenOptions::new().write(true).open(path) {
        Ok(_) => Some(false),
        Err(error) if error.raw_os_error() == Some(SHARING_VIOLATION) => Some(true),
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn post(folder: &Path, run_id: &str, dashboard: Option<SocketAddr>, token: Option<String>) -> Notice {
        let about = LocalRun { run_id: run_id.into(), pid: std::process::id(), dashboard, token };
        Notice::post_in(folder, &about).unwrap()
    }

    #[test]
    fn a_notice_is_found_while_it_lasts() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("new");
        assert_eq!(runs_in(&folder), []);
        let address = SocketAddr::from(([127, 0, 0, 1], 8080));
        let first = post(&folder, "b", Some(address), None);
        let second = post(&folder, "a", None, Some("token".into()));
        let mut found = runs_in(&folder);
        found.sort_by_key(|run| run.run_id.clone());
        assert_eq!(found.iter().map(|run| run.run_id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((found[1].dashboard, found[0].token.as_deref()), (Some(address), Some("token")));
        assert_eq!(std::fs::metadata(&folder).unwrap().mode() & 0o777, 0o700, "a token is not for everybody");
        drop(first);
        assert_eq!(runs_in(&folder).len(), 1);
        drop(second);
        assert!(!folder.exists(), "nothing stays behind");
    }

    #[test]
    fn what_the_dead_left_is_removed_and_nonsense_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let left = dir.path().join("7-0.json");
        std::fs::write(&left, r#"{"run_id":"gone","pid":7,"dashboard":null,"token":null}"#).unwrap();
        assert_eq!(runs_in(dir.path()), []);
        assert!(!left.exists());
        std::fs::write(&left, r#"{"run_id":"gone","pid":7,"dashboard":null,"token":null}"#).unwrap();
        let living = post(dir.path(), "a", None, None);
        assert!(!left.exists(), "a start removes it, even if nobody ever looks");
        let other = post(dir.path(), "b", None, None);
        assert_eq!(runs_in(dir.path()).len(), 2, "and leaves alone what belongs to somebody");
        drop((living, other));
        std::fs::create_dir_all(dir.path()).unwrap();
        let nonsense = dir.path().join("8-0.json");
        std::fs::write(&nonsense, "{").unwrap();
        let held = File::open(&nonsense).unwrap();
        held.lock().unwrap();
        assert_eq!(runs_in(dir.path()), []);
    }
}
