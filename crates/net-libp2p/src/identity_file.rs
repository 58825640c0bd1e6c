//! The one file per machine that holds the identity, and the lock that keeps two processes from being one peer.
//!
//! The file is text: `potluck-identity-1 <64 hex digits of the secret seed>`. Mode 0600, and readable by nobody else or
//! it is refused. While a [`Lock`] is held, a second process is refused: two holders of one identity would steal each
//! other's streams, and the swarm would see one peer flicker. The lock is the operating system's and goes with the
//! process, however it ends.

use potluck_net::{Env, Identity};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

const HEADER: &str = "potluck-identity-1 ";
const FILE_BYTES_MAX: u64 = 200;

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityFileError {
    /// Another live process uses this identity.
    #[error(
        "the identity in {} is in use by another process; stop that one, or give this one its own file (--identity)",
        path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// Others can read the secret.
    #[error("{} can be read by others (mode {mode:o}); run `chmod 600` on it", path.display())]
    Readable {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It holds something else.
    #[error("{} is no identity file of potluck; it was left as it is", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
}

/// Holds the identity for this process until dropped.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// `$POTLUCK_IDENTITY`, or `potluck/identity` in the user's data folder (`$XDG_DATA_HOME`, or `~/.local/share`).
pub fn default_path() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = set("POTLUCK_IDENTITY") {
        return path;
    }
    let data = set("XDG_DATA_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".local/share")))
        .unwrap_or_else(|| PathBuf::from("."));
    data.join("potluck/identity")
}

/// Read the identity, or make one with mode 0600; hold it for this process.
///
/// # Errors
/// [`IdentityFileError`], saying what to do.
pub fn load_or_create(path: impl AsRef<Path>, env: &Env) -> Result<(Identity, Lock), IdentityFileError> {
    let path = path.as_ref();
    let io = |action| move |source| IdentityFileError::Io { action, path: path.to_owned(), source };
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(io("create the folder of"))?;
    }
    let mut file = open(path).map_err(io("open"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(IdentityFileError::InUse { path: path.to_owned() }),
        Err(TryLockError::Error(source)) => return Err(io("lock")(source)),
    }
    check_mode(&file, path)?;
    let mut text = String::new();
    let read = (&mut file).take(FILE_BYTES_MAX).read_to_string(&mut text);
    read.map_err(|_| IdentityFileError::Malformed { path: path.to_owned() })?;
    // Empty: just made, by us or by a process that died before it wrote. The lock makes this ours to fill.
    if text.is_empty() {
        let seed: [u8; 32] = env.random_bytes();
        let hex: String = seed.iter().map(|byte| format!("{byte:02x}")).collect();
        file.write_all(format!("{HEADER}{hex}\n").as_bytes()).map_err(io("write"))?;
        file.sync_all().map_err(io("write"))?;
        return Ok((Identity::from_seed(&seed), Lock { _file: file }));
    }
    let seed = parse(&text).ok_or_else(|| IdentityFileError::Malformed { path: path.to_owned() })?;
    Ok((Identity::from_seed(&seed), Lock { _file: file }))
}

fn open(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

#[cfg(unix)]
fn check_mode(file: &File, path: &Path) -> Result<(), IdentityFileError> {
    let metadata = file.metadata().map_err(|source| IdentityFileError::Io {
        action: "inspect",
        path: path.to_owned(),
        source,
    })?;
    let mode = std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o777;
    if mode & 0o077 != 0 {
        return Err(IdentityFileError::Readable { path: path.to_owned(), mode });
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_mode(_file: &File, _path: &Path) -> Result<(), IdentityFileError> {
    Ok(())
}

fn parse(text: &str) -> Option<[u8; 32]> {
    let hex = text.strip_prefix(HEADER)?.trim_end();
    if hex.len() != 64 || !hex.is_ascii() {
        return None;
    }
    let mut seed = [0; 32];
    for (byte, digits) in seed.iter_mut().zip(hex.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn made_once_with_mode_0600_and_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/identity");
        let (made, lock) = load_or_create(&path, &Env::real()).unwrap();
        #[cfg(unix)]
        {
            let mode = std::fs::metadata(&path).unwrap().permissions();
            assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o600);
        }
        drop(lock);
        let (read, _lock) = load_or_create(&path, &Env::real()).unwrap();
        assert_eq!(made.peer_id(), read.peer_id());
    }

    #[tokio::test]
    async fn a_second_live_holder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity");
        let (_identity, lock) = load_or_create(&path, &Env::real()).unwrap();
        let refused = load_or_create(&path, &Env::real()).unwrap_err();
        assert!(matches!(refused, IdentityFileError::InUse { .. }), "{refused}");
        drop(lock);
        assert!(load_or_create(&path, &Env::real()).is_ok());
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_readable_or_foreign_file_is_refused_and_left_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity");
        std::fs::write(&path, "something else").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let refused = load_or_create(&path, &Env::real()).unwrap_err();
        assert!(matches!(refused, IdentityFileError::Readable { mode: 0o644, .. }), "{refused}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let refused = load_or_create(&path, &Env::real()).unwrap_err();
        assert!(matches!(refused, IdentityFileError::Malformed { .. }), "{refused}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "something else");
    }
}
