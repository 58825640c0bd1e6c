//! The `Tensor` message and what it declares: never more memory than the limits allow, and a read message reads back.
#![no_main]

use libfuzzer_sys::fuzz_target;
use potluck_compression::{Limits, SerializedTensor, deserialize};

fuzz_target!(|message: &[u8]| {
    let limits = Limits { buffer_bytes_max: 1 << 16, elements_max: 1 << 16, dimensions_max: 8 };
    let Ok(tensor) = SerializedTensor::from_protobuf(message, &limits) else { return };
    assert!(tensor.buffer.len() <= limits.buffer_bytes_max && tensor.size.len() <= limits.dimensions_max);
    assert_eq!(SerializedTensor::from_protobuf(&tensor.to_protobuf(), &limits).as_ref(), Ok(&tensor));
    if let Ok(raw) = deserialize(&tensor, &limits) {
        assert_eq!(raw.bytes.len(), raw.shape.iter().product::<usize>() * raw.dtype.size());
    }
});
