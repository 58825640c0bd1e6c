//! What must be equal on all peers of a run. A mismatch is refused with the differing fields, on both sides.

use crate::SessionConfig;
use potluck_compression::TensorInfo;
use std::collections::BTreeMap;

/// The version of what sessions say to one another; part of the manifest.
const SESSION_VERSION: &str = "1";
/// At most this many differing fields are named.
const DIFFERENCES_MAX: usize = 20;

/// The manifest of a session: field name to value, readable by people, hashed in this order.
pub fn manifest(config: &SessionConfig) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    let mut put = |name: &str, value: String| fields.insert(name.to_owned(), value);
    put("session_version", SESSION_VERSION.to_owned());
    put("target_batch_size", config.target_batch_size.to_string());
    put("policy", format!("{:?}", config.policy));
    put("average_state_every", format!("{:?}", config.average_state_every));
    put("gradients", describe(&config.tensors));
    put("state", describe(&config.state_tensors));
    put("grad_compression", format!("{:?}", config.grad_compression));
    put("state_compression", format!("{:?}", config.state_compression));
    put("powersgd", format!("{:?}", config.powersgd));
    if let Some(owner) = config.owner {
        put("owner", owner.to_string());
    }
    for (name, value) in &config.manifest_extra {
        fields.insert(format!("extra.{name}"), value.clone());
    }
    fields
}

/// The hash of a manifest.
pub fn manifest_hash(fields: &BTreeMap<String, String>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("potluck manifest v1");
    for text in fields.iter().flat_map(|(name, value)| [name, value]) {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// One line per field that differs, at most 20.
pub fn differences(ours: &BTreeMap<String, String>, theirs: &BTreeMap<String, String>) -> Vec<String> {
    let names: std::collections::BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
    names
        .into_iter()
        .filter_map(|name| {
            let (our, their) = (ours.get(name), theirs.get(name));
            let show = |value: Option<&String>| value.map_or("(absent)".to_owned(), |text| clip(text));
            (our != their).then(|| format!("{name}: ours {}, theirs {}", show(our), show(their)))
        })
        .take(DIFFERENCES_MAX)
        .collect()
}

fn clip(text: &str) -> String {
    const SHOWN: usize = 80;
    if text.chars().count() <= SHOWN {
        return text.to_owned();
    }
    text.chars().take(SHOWN).chain("...".chars()).collect()
}

/// Count, size and a hash over names and shapes: long lists stay one short line.
fn describe(tensors: &[TensorInfo]) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("potluck tensors v1");
    for tensor in tensors {
        hasher.update(&(tensor.key.len() as u64).to_le_bytes());
        hasher.update(tensor.key.as_bytes());
        hasher.update(&(tensor.shape.len() as u64).to_le_bytes());
        for side in &tensor.shape {
            hasher.update(&(*side as u64).to_le_bytes());
        }
    }
    let values: usize = tensors.iter().map(TensorInfo::numel).sum();
    format!("{} tensors, {values} values, {}", tensors.len(), &hasher.finalize().to_hex()[..16])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(key: &str, shape: [usize; 2]) -> TensorInfo {
        TensorInfo { key: key.into(), shape: shape.into(), ..TensorInfo::default() }
    }

    #[test]
    fn differing_fields_are_named_with_both_values() {
        let mut config = SessionConfig::new("run", 64, vec![tensor("w", [2, 1])]);
        let ours = manifest(&config);
        config.target_batch_size = 128;
        config.manifest_extra.insert("optimizer".into(), "Adam(lr=1)".into());
        let theirs = manifest(&config);
        assert_eq!(
            differences(&ours, &theirs),
            ["extra.optimizer: ours (absent), theirs Adam(lr=1)", "target_batch_size: ours 64, theirs 128"]
        );
        assert!(differences(&ours, &ours).is_empty());
        assert_ne!(manifest_hash(&ours), manifest_hash(&theirs));
    }

    #[test]
    fn tensors_differ_by_name_shape_and_order() {
        let config = |tensors| manifest(&SessionConfig::new("run", 1, tensors))["gradients"].clone();
        let one = config(vec![tensor("a", [2, 3]), tensor("b", [1, 1])]);
        assert_ne!(one, config(vec![tensor("b", [1, 1]), tensor("a", [2, 3])]));
        assert_ne!(one, config(vec![tensor("a", [3, 2]), tensor("b", [1, 1])]));
    }
}
