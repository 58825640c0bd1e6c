//! Sans-I/O. What a round gave, as it travelled: whoever missed the round decodes from it, bit for bit, what its members
//! have.

use crate::averager::AveragerConfig;
use crate::plan::GROUP_MAX;
use crate::spans::{CHUNK_BYTES, Layout};
use bytes::{Bytes, BytesMut};
use potluck_compression::{TensorInfo, first_non_finite};

/// How the vectors of a round were cut into chunks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Cut {
    pub(crate) shares: Vec<u32>,
    pub(crate) chunk_bytes: u32,
}

/// The averages of a finished round. Cloning shares the buffers, which are those that the round received.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    pub(crate) cut: Cut,
    /// The encoded chunks of each phase, in order.
    pub(crate) phases: Vec<Vec<Bytes>>,
}

impl Cut {
    fn to_text(&self) -> String {
        let shares: Vec<String> = self.shares.iter().map(u32::to_string).collect();
        format!("{} {}", self.chunk_bytes, shares.join(","))
    }

    /// `None` if a stranger's text is no cut.
    fn from_text(text: &str) -> Option<Self> {
        let (chunk_bytes, shares) = text.split_once(' ')?;
        let chunk_bytes = chunk_bytes.parse().ok().filter(|bytes| CHUNK_BYTES.contains(bytes))?;
        let shares: Vec<u32> =
            shares.split(',').take(GROUP_MAX + 1).map(|share| share.parse().ok()).collect::<Option<_>>()?;
        (shares.len() <= GROUP_MAX).then_some(Self { shares, chunk_bytes })
    }
}

impl Record {
    /// Bytes of all chunks together.
    pub fn bytes(&self) -> u64 {
        self.phases.iter().flatten().map(|chunk| chunk.len() as u64).sum()
    }

    /// How the vectors were cut, as text, and the encoded vector of each phase in one piece.
    pub fn join(&self) -> (String, Vec<Bytes>) {
        let join = |chunks: &Vec<Bytes>| {
            let mut joined = BytesMut::with_capacity(chunks.iter().map(Bytes::len).sum());
            chunks.iter().for_each(|chunk| joined.extend_from_slice(chunk));
            joined.freeze()
        };
        (self.cut.to_text(), self.phases.iter().map(join).collect())
    }
}

impl AveragerConfig {
    /// Bytes of the encoded vectors, cut for one reducer.
    pub fn encoded_bytes(&self) -> usize {
        let of = |tensors: &Vec<TensorInfo>| Layout::new(tensors, &self.compression).encoded_bytes();
        of(&self.tensors) + self.second.as_ref().map_or(0, of)
    }

    /// The average, and that of the second vector if there is one, of a round of which [`Record::join`] made this text
    /// and these bytes elsewhere.
    ///
    /// # Errors
    /// What is wrong with them: they come from others.
    pub fn decode(&self, cut: &str, phases: &[Bytes]) -> Result<(Vec<f32>, Vec<f32>), String> {
        let cut = Cut::from_text(cut).ok_or_else(|| format!("{cut:?} is no cut of a vector"))?;
        let expected = 1 + usize::from(self.second.is_some());
        if phases.len() != expected {
            return Err(format!("{} phases, {expected} expected", phases.len()));
        }
        let decode = |tensors: Option<&Vec<TensorInfo>>, bytes: Option<&Bytes>| match (tensors, bytes) {
            (Some(tensors), Some(bytes)) => self.decode_phase(tensors, &cut, bytes),
            _ => Ok(Vec::new()),
        };
        Ok((decode(Some(&self.tensors), phases.first())?, decode(self.second.as_ref(), phases.get(1))?))
    }

    fn decode_phase(&self, tensors: &[TensorInfo], cut: &Cut, bytes: &Bytes) -> Result<Vec<f32>, String> {
        let layout = Layout::cut(tensors, &self.compression, &cut.shares, cut.chunk_bytes).0;
        if bytes.len() != layout.encoded_bytes() {
            return Err(format!("{} bytes, {} expected", bytes.len(), layout.encoded_bytes()));
        }
        let mut vector = vec![0.0; layout.values];
        let mut rest = bytes.as_ref();
        for chunk in &layout.chunks {
            let (encoded, after) = rest.split_at(chunk.encoded_bytes());
            rest = after;
            let decoded = chunk.scheme.decode(encoded, &mut vector[chunk.range.clone()]);
            decoded.map_err(|error| format!("values {:?}: {error}", chunk.range))?;
        }
        match first_non_finite(&vector) {
            None => Ok(vector),
            Some(at) => Err(format!("value {at} is {}", vector[at])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use potluck_compression::{Policy, Scheme, TensorRole};
    use proptest::prelude::*;

    fn config(scheme: Scheme, values: usize) -> AveragerConfig {
        let tensors = vec![TensorInfo::vector("w", values, TensorRole::Gradient)];
        AveragerConfig::new(tensors, Policy::Fixed(scheme))
    }

    #[test]
    fn what_is_no_record_of_these_tensors_is_refused() {
        let config = config(Scheme::None, 50_000);
        let whole = Bytes::from(vec![0; 200_000]);
        let decode = |cut: &str, phases: &[Bytes]| config.decode(cut, phases);
        assert_eq!(decode("65536 1,3", std::slice::from_ref(&whole)).unwrap().0.len(), 50_000);
        for cut in ["", "65536", "1 1", "65536 ", "65536 1,x", "99999999 1", "65536 -1"] {
            assert!(decode(cut, std::slice::from_ref(&whole)).is_err(), "{cut}");
        }
        assert!(decode(&format!("65536 {}", ["1"; 65].join(",")), std::slice::from_ref(&whole)).is_err());
        assert!(decode("65536 1,3", &[]).is_err());
        assert!(decode("65536 1,3", &[whole.clone(), whole.clone()]).is_err());
        assert!(decode("65536 1,3", &[whole.slice(1..)]).is_err());
        let odd = Bytes::from(f32::NAN.to_le_bytes().repeat(50_000));
        assert!(decode("65536 1,3", &[odd]).unwrap_err().contains("value 0 is NaN"));
    }

    proptest! {
        #[test]
        fn cuts_survive_as_text(
            shares in proptest::collection::vec(any::<u32>(), 1..=GROUP_MAX),
            chunk_bytes in CHUNK_BYTES,
        ) {
            let cut = Cut { shares, chunk_bytes };
            prop_assert_eq!(Cut::from_text(&cut.to_text()), Some(cut));
        }

        #[test]
        fn strangers_records_are_refused_or_finite(
            shares in proptest::collection::vec(0u32..9, 1..6),
            values in 1usize..80,
            bytes in proptest::collection::vec(any::<u8>(), 4000),
        ) {
            let cut = Cut { shares, chunk_bytes: *CHUNK_BYTES.start() }.to_text();
            for scheme in Scheme::ALL {
                let config = config(*scheme, values);
                let exact = Bytes::copy_from_slice(&bytes[..config.encoded_bytes()]);
                if let Ok((vector, _)) = config.decode(&cut, std::slice::from_ref(&exact)) {
                    prop_assert_eq!(vector.len(), values);
                    prop_assert!(first_non_finite(&vector).is_none());
                }
                prop_assert!(config.decode(&cut, &[exact.slice(1..)]).is_err());
            }
        }
    }
}
