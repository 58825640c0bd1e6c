//! A run's state on disk: `epoch-000000000012/state.safetensors` with all tensors, and `checkpoint.json` with the rest.
//!
//! A checkpoint appears whole or not at all: it is written beside its place, synced, and renamed. Reading checks a hash
//! over the tensors, so what a failing disk returns is never taken for a state.
//!
//! Whoever is in a run can offer states, also invented ones, as many as it likes. So the newest ones alone are no backup: some
//! stay because of their age.

use crate::failure::Failure;
use crate::tensors;
use anyhow::{Context, Result};
use bytes::Bytes;
use potluck_collab::{Lineage, Snapshot};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

const FORMAT: u32 = 1;
const TENSORS: &str = "state.safetensors";
const FACTS: &str = "checkpoint.json";
const PARTIAL: &str = ".partial-";
const HINT: &str = "it was left as it is; take an older one (epoch-...) of the same folder";
/// For each of these ages the youngest checkpoint that has reached it stays, and the oldest that has not, which will follow it.
const AGES: [Duration; 2] = [Duration::from_secs(3600), Duration::from_secs(24 * 3600)];
/// Larger descriptions are not read.
const FACTS_BYTES_MAX: u64 = 256 << 20;

/// A state with what is needed to restart its run.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Checkpoint {
    pub(crate) run_id: String,
    pub(crate) manifest: BTreeMap<String, String>,
    pub(crate) snapshot: Snapshot,
}

/// What every format has.
#[derive(Deserialize)]
struct Written {
    format: u32,
}

/// A checkpoint and where it lies.
pub(crate) type Found = Option<(PathBuf, Checkpoint)>;

#[derive(Serialize, Deserialize)]
struct Facts {
    format: u32,
    run_id: String,
    epoch: u64,
    samples: u64,
    /// Hash of the history that made it, in hex.
    lineage: String,
    /// What must be equal on all peers of the run.
    manifest: BTreeMap<String, String>,
    /// Optimizer, scheduler and the like, as the training program published them.
    facts: BTreeMap<String, String>,
    /// BLAKE3 of the file of tensors, in hex.
    tensors_blake3: String,
    /// BLAKE3 of all of the above as JSON without spaces, in hex.
    facts_blake3: String,
}

impl Facts {
    fn hash(&self) -> serde_json::Result<String> {
        let mut value = serde_json::to_value(self)?;
        if let Some(fields) = value.as_object_mut() {
            fields.remove("facts_blake3");
        }
        Ok(blake3::hash(value.to_string().as_bytes()).to_hex().to_string())
    }
}

impl Checkpoint {
    /// Turn tensors that travelled compressed (`load_state_compression`) back into plain ones.
    pub(crate) fn decode(&mut self) -> Result<()> {
        tensors::decode(&mut self.snapshot.meta, &mut self.snapshot.blobs)
    }

    /// Write it into `dir` and let go of all but the newest `keep` and those that stay by their age. Older ones stay until
    /// this one is safe.
    pub(crate) fn save(&self, dir: &Path, keep: usize) -> Result<PathBuf> {
        let name = format!("epoch-{:012}", self.snapshot.epoch);
        let place = dir.join(&name);
        let partial = dir.join(format!("{PARTIAL}{name}"));
        let what = || format!("cannot save the checkpoint {}", place.display());
        let written = self.write_into(&partial).and_then(|()| {
            if place.exists() {
                fs::remove_dir_all(&place)?;
            }
            fs::rename(&partial, &place)?;
            Ok(sync_folder(dir)?)
        });
        if let Err(error) = written {
            // What is half there is of no use; the error is what matters.
            let _removed = fs::remove_dir_all(&partial);
            return Err(error).with_context(what);
        }
        // Newer ones are left alone: they are damaged, or the run would have gone on from them.
        let older = list(dir)?.into_iter().filter(|(epoch, _)| *epoch < self.snapshot.epoch);
        // Both times are the disk's, so that no clock has to be right now.
        let now = modified(&place)?;
        // One of the future is as young as one can be: the clock was put back.
        let aged =
            older.map(|(_, path)| Ok((now.duration_since(modified(&path)?).unwrap_or_default(), path)));
        for path in outdated(aged.collect::<Result<_>>()?, keep) {
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        Ok(place)
    }

    fn write_into(&self, folder: &Path) -> Result<()> {
        if folder.is_dir() {
            fs::remove_dir_all(folder)?;
        }
        fs::create_dir(folder)?;
        let snapshot = &self.snapshot;
        let bytes = tensors::write(&snapshot.meta, &snapshot.blobs)?;
        let hash = blake3::hash(&bytes).to_hex().to_string();
        write_synced(&folder.join(TENSORS), &bytes)?;
        let mut facts = Facts {
            format: FORMAT,
            run_id: self.run_id.clone(),
            epoch: snapshot.epoch,
            samples: Lineage::of(snapshot).map_or(0, |lineage| lineage.samples),
            lineage: hex(&snapshot.lineage),
            manifest: self.manifest.clone(),
            facts: snapshot.meta.clone(),
            tensors_blake3: hash,
            facts_blake3: String::new(),
        };
        facts.facts_blake3 = facts.hash()?;
        write_synced(&folder.join(FACTS), &serde_json::to_vec_pretty(&facts)?)?;
        Ok(sync_folder(folder)?)
    }

    /// Read one checkpoint.
    pub(crate) fn load(folder: &Path) -> Result<Self> {
        let broken = || format!("the checkpoint {} is damaged", folder.display());
        let path = folder.join(FACTS);
        let size = fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?.len();
        if size > FACTS_BYTES_MAX {
            return Err(Failure::new(format!("{}: {FACTS} has {size} bytes", broken()), HINT).into());
        }
        let read = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let malformed =
            |error: serde_json::Error| Failure::new(format!("{}: {FACTS}: {error}", broken()), HINT);
        let Written { format } = serde_json::from_slice(&read).map_err(malformed)?;
        if format != FORMAT {
            let message = format!(
                "the checkpoint {} has format {format}, this version reads {FORMAT}",
                folder.display()
            );
            return Err(Failure::new(message, "read it with the version of potluck that wrote it").into());
        }
        let facts: Facts = serde_json::from_slice(&read).map_err(malformed)?;
        if facts.hash()? != facts.facts_blake3 {
            return Err(Failure::new(format!("{}: {FACTS} does not match its hash", broken()), HINT).into());
        }
        let path = folder.join(TENSORS);
        let bytes = Bytes::from(fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?);
        if blake3::hash(&bytes).to_hex().as_str() != facts.tensors_blake3 {
            return Err(Failure::new(format!("{}: {TENSORS} does not match its hash", broken()), HINT).into());
        }
        let blobs = tensors::read(&bytes).with_context(broken)?;
        let lineage = unhex(&facts.lineage).with_context(broken)?;
        let snapshot = Snapshot { epoch: facts.epoch, lineage, meta: facts.facts, blobs };
        Ok(Self { run_id: facts.run_id, manifest: facts.manifest, snapshot })
    }
}

/// The newest checkpoint of `dir` that can be read, and what was wrong with newer ones.
pub(crate) fn newest(dir: &Path) -> Result<(Found, Vec<anyhow::Error>)> {
    let mut wrong = Vec::new();
    for (_, path) in list(dir)?.into_iter().rev() {
        match Checkpoint::load(&path) {
            Ok(checkpoint) => return Ok((Some((path, checkpoint)), wrong)),
            Err(error) => wrong.push(error),
        }
    }
    Ok((None, wrong))
}

/// Make `dir` ready: it is there, it can be written to, and nothing half-written is left in it.
pub(crate) fn prepare(dir: &Path) -> Result<()> {
    let what = || format!("cannot write into {}", dir.display());
    fs::create_dir_all(dir).with_context(what)?;
    for entry in fs::read_dir(dir).with_context(what)? {
        let entry = entry.with_context(what)?;
        if entry.file_name().to_string_lossy().starts_with(PARTIAL) {
            fs::remove_dir_all(entry.path()).with_context(what)?;
        }
    }
    let probe = dir.join(format!("{PARTIAL}probe"));
    fs::create_dir(&probe).and_then(|()| fs::remove_dir(&probe)).with_context(what)
}

/// The checkpoints of `dir` with their epochs, oldest first. What somebody has renamed is not ours any more.
fn list(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut found: Vec<(u64, PathBuf)> = entries
        .filter_map(|entry| entry.ok())
        .filter_map(|entry| {
            let epoch = entry.file_name().to_str()?.strip_prefix("epoch-")?.parse().ok()?;
            Some((epoch, entry.path()))
        })
        .collect();
    found.sort();
    Ok(found)
}

/// When a checkpoint was written.
fn modified(folder: &Path) -> Result<SystemTime> {
    let known = fs::metadata(folder).and_then(|facts| facts.modified());
    known.with_context(|| format!("cannot read {}", folder.display()))
}

/// Those that may go, of the ones older than what was just saved; given with their ages, lowest epoch first.
fn outdated(older: Vec<(Duration, PathBuf)>, keep: usize) -> Vec<PathBuf> {
    let by_age = |age: &Duration| {
        // Of two that are equally old, the higher epoch has reached it, and the lower one will.
        let reached = older.iter().rev().filter(|(old, _)| old >= age).min_by_key(|(old, _)| *old);
        let will = older.iter().rev().filter(|(old, _)| old < age).max_by_key(|(old, _)| *old);
        [reached, will].into_iter().flatten().map(|(_, path)| path.clone())
    };
    let stay: BTreeSet<PathBuf> = AGES.iter().flat_map(by_age).collect();
    let surplus = (older.len() + 1).saturating_sub(keep.max(1));
    older.into_iter().take(surplus).map(|(_, path)| path).filter(|path| !stay.contains(path)).collect()
}

fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn sync_folder(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<[u8; 32]> {
    let bytes = blake3::Hash::from_hex(text).context("lineage")?;
    Ok(*bytes.as_bytes())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::tensors::ENCODED;
    use safetensors::tensor::{Dtype, SafeTensors};

    pub(crate) fn checkpoint(epoch: u64) -> Checkpoint {
        let meta = BTreeMap::from([
            ("potluck.samples".to_owned(), "640".to_owned()),
            ("potluck.state_averages".to_owned(), "3".to_owned()),
            ("tensors".to_owned(), r#"{"param.000000": {"dtype": "float32", "shape": [2, 3]}}"#.to_owned()),
            (
                "optimizer".to_owned(),
                r#"{"0": {"step": {"value": 3}, "m": {"dtype": "float32", "shape": [1]}}}"#.to_owned(),
            ),
        ]);
        let blobs = BTreeMap::from([
            (
                "param.000000".to_owned(),
                Bytes::from((0..6).flat_map(|x| (x as f32).to_le_bytes()).collect::<Vec<u8>>()),
            ),
            ("opt.0.m".to_owned(), Bytes::from_static(&[0; 4])),
            ("potluck.agreed".to_owned(), Bytes::from_static(&[1, 2, 3])),
        ]);
        let snapshot = Snapshot { epoch, lineage: [9; 32], meta, blobs };
        Checkpoint {
            run_id: "run".into(),
            manifest: BTreeMap::from([("policy".into(), "x".into())]),
            snapshot,
        }
    }

    #[test]
    fn what_is_saved_is_loaded_and_only_the_newest_and_the_first_stay() {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path()).unwrap();
        for epoch in [3, 12, 7, 20] {
            checkpoint(epoch).save(dir.path(), 2).unwrap();
        }
        let (found, wrong) = newest(dir.path()).unwrap();
        assert_eq!(found.unwrap().1, checkpoint(20));
        assert!(wrong.is_empty());
        assert_eq!(epochs(dir.path()), [3, 12, 20], "the first has yet to become an hour old");
        let bytes = fs::read(list(dir.path()).unwrap()[2].1.join(TENSORS)).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let param = tensors.tensor("param.000000").unwrap();
        assert_eq!((param.dtype(), param.shape()), (Dtype::F32, &[2, 3][..]));
    }

    #[test]
    fn a_tensor_that_travelled_compressed_is_plain_again() {
        let plain = checkpoint(1);
        let raw = &plain.snapshot.blobs["param.000000"];
        let (message, _) = potluck_compression::serialize(
            potluck_compression::DType::Float32,
            &[2, 3],
            raw,
            potluck_compression::Scheme::Float16,
        )
        .unwrap();
        let mut encoded = plain.clone();
        encoded.snapshot.meta.insert(ENCODED.into(), r#"["param.000000"]"#.into());
        encoded.snapshot.blobs.insert("param.000000".into(), message.to_protobuf().into());
        let dir = tempfile::tempdir().unwrap();
        let mut loaded = Checkpoint::load(&encoded.save(dir.path(), 1).unwrap()).unwrap();
        assert_eq!(loaded, encoded, "kept as it came, so that it can be handed on");
        loaded.decode().unwrap();
        assert_eq!(loaded, plain, "small whole numbers survive 16 bits");
        encoded.snapshot.blobs.insert("param.000000".into(), Bytes::from_static(b"rubbish"));
        assert!(encoded.decode().is_err());
    }

    #[test]
    fn what_was_just_saved_stays_beside_a_damaged_newer_one() {
        let dir = tempfile::tempdir().unwrap();
        let damaged = checkpoint(20).save(dir.path(), 1).unwrap();
        fs::write(damaged.join(TENSORS), "").unwrap();
        for epoch in [7, 8, 9] {
            checkpoint(epoch).save(dir.path(), 1).unwrap();
        }
        assert_eq!(epochs(dir.path()), [7, 9, 20]);
        let (found, wrong) = newest(dir.path()).unwrap();
        assert_eq!((found.unwrap().1.snapshot.epoch, wrong.len()), (9, 1));
    }

    fn epochs(dir: &Path) -> Vec<u64> {
        list(dir).unwrap().into_iter().map(|(epoch, _)| epoch).collect()
    }

    #[test]
    fn epochs_are_in_the_order_of_their_numbers_and_what_was_renamed_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let renamed = dir.path().join("epoch-000000000001-good");
        fs::rename(checkpoint(1).save(dir.path(), 1).unwrap(), &renamed).unwrap();
        for epoch in [999_999_999_999, 1_000_000_000_000, u64::MAX] {
            checkpoint(epoch).save(dir.path(), 1).unwrap();
        }
        assert_eq!(epochs(dir.path()), [999_999_999_999, u64::MAX]);
        assert_eq!(newest(dir.path()).unwrap().0.unwrap().1, checkpoint(u64::MAX));
        assert!(renamed.is_dir());
    }

    #[test]
    fn a_burst_of_states_leaves_those_of_an_hour_and_of_a_day_ago() {
        let dir = tempfile::tempdir().unwrap();
        let saved = |epoch| checkpoint(epoch).save(dir.path(), 3).unwrap();
        let aged = |epoch: u64, hours: u64| {
            let place = saved(epoch);
            let then = modified(&place).unwrap() - Duration::from_secs(hours * 3600);
            File::open(&place).unwrap().set_modified(then).unwrap();
        };
        for (epoch, hours) in [(1, 90), (2, 50), (3, 30), (4, 20), (5, 3), (6, 2)] {
            aged(epoch, hours);
        }
        for epoch in 7..20 {
            saved(1_000_000_000_000 * epoch);
        }
        assert_eq!(epochs(dir.path())[..4], [3, 4, 6, 7_000_000_000_000]);
        assert_eq!(epochs(dir.path()).len(), 4 + 3);
    }

    #[test]
    fn in_a_long_run_there_is_always_a_state_of_an_hour_and_of_a_day_ago() {
        const MINUTE: u64 = 60;
        let (keep, every) = (2, 7 * MINUTE);
        let mut there: Vec<u64> = Vec::new();
        for now in (0..5 * 24 * 60 * MINUTE).step_by(every as usize) {
            let place = |then: u64| PathBuf::from(format!("{then:012}"));
            let aged = there.iter().map(|then| (Duration::from_secs(now - then), place(*then)));
            let gone = outdated(aged.collect(), keep);
            there.retain(|then| !gone.contains(&place(*then)));
            there.push(now);
            assert!(there.len() <= keep + 2 * AGES.len(), "{there:?}");
            for age in AGES.map(|age| age.as_secs()).into_iter().filter(|age| *age <= now) {
                let youngest = there.iter().map(|then| now - then).filter(|old| *old >= age).min();
                assert!(youngest.is_some_and(|old| old < 2 * age + every), "{age}: {youngest:?} at {now}");
            }
        }
    }

    #[test]
    fn a_changed_letter_anywhere_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let place = checkpoint(1).save(dir.path(), 9).unwrap();
        for file in [FACTS, TENSORS] {
            let good = fs::read(place.join(file)).unwrap();
            for at in 0..good.len() {
                let mut bad = good.clone();
                // Any other letter; a space that JSON may have anywhere means nothing.
                bad[at] = if bad[at] == b'7' { b'8' } else { b'7' };
                fs::write(place.join(file), &bad).unwrap();
                let read = Checkpoint::load(&place);
                assert!(read.is_err(), "{file}: byte {at} of {}", good.len());
            }
            fs::write(place.join(file), good).unwrap();
        }
        assert_eq!(Checkpoint::load(&place).unwrap(), checkpoint(1));
    }

    #[test]
    fn a_damaged_checkpoint_is_named_and_the_one_before_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        checkpoint(1).save(dir.path(), 9).unwrap();
        let bad = checkpoint(2).save(dir.path(), 9).unwrap();
        let path = bad.join(TENSORS);
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, bytes).unwrap();
        let (found, wrong) = newest(dir.path()).unwrap();
        assert_eq!(found.unwrap().1.snapshot.epoch, 1);
        assert!(wrong[0].to_string().contains("does not match its hash"), "{wrong:?}");
    }

    #[test]
    fn whatever_a_stranger_calls_or_shapes_its_tensors_a_checkpoint_is_read_or_the_old_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        let old = checkpoint(1).save(dir.path(), 1).unwrap();
        let mut named = checkpoint(2);
        named.snapshot.blobs.insert(tensors::RESERVED.into(), Bytes::from_static(&[1]));
        let error = named.save(dir.path(), 1).unwrap_err();
        assert!(format!("{error:#}").ends_with("a tensor cannot be called \"__metadata__\""), "{error:#}");
        assert_eq!(newest(dir.path()).unwrap().0, Some((old, checkpoint(1))));
        let mut shaped = checkpoint(3);
        let huge = r#"{"potluck.none": {"dtype": "float32", "shape": [4294967296, 4294967296]}}"#;
        shaped.snapshot.meta.insert("tensors".into(), huge.into());
        shaped.snapshot.blobs.insert("potluck.none".into(), Bytes::new());
        assert_eq!(Checkpoint::load(&shaped.save(dir.path(), 1).unwrap()).unwrap(), shaped);
    }

    #[test]
    fn a_save_that_fails_leaves_the_old_ones_and_no_rubbish() {
        let dir = tempfile::tempdir().unwrap();
        let old = checkpoint(1).save(dir.path(), 1).unwrap();
        // A file in the way of the folder.
        let way = dir.path().join(".partial-epoch-000000000002");
        fs::write(&way, "").unwrap();
        let error = checkpoint(2).save(dir.path(), 1).unwrap_err();
        assert!(format!("{error:#}").starts_with("cannot save the checkpoint"), "{error:#}");
        assert_eq!(Checkpoint::load(&old).unwrap(), checkpoint(1));
        assert_eq!(list(dir.path()).unwrap(), [(1, old)]);
    }
}
