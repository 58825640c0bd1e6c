//! The 256 levels of the blockwise 8-bit format ("dynamic tree quantization", arXiv:1511.04561, as used in
//! arXiv:2110.02861), as data: bitsandbytes' signed map with seven exponent bits, whose lowest level is -1.
//!
//! The map is symmetric but for its first entry, so the non-negative half is enough.

const NON_NEGATIVE: [u32; 129] = [
    0x00000000, 0x3513a3b7, 0x365a1a94, 0x370205ff, 0x37b24206, 0x38378034, 0x388aefb3, 0x38ba1f4b,
    0x3923d70b, 0x398ce705, 0x39c7e283, 0x3a016f01, 0x3a1eecc1, 0x3a3c6a80, 0x3a59e83e, 0x3a7765ff,
    0x3aa7ef9d, 0x3af1a9fc, 0x3b1db22d, 0x3b428f5c, 0x3b676c8a, 0x3b8624dd, 0x3b989374, 0x3bab020d,
    0x3bbd70a4, 0x3bcfdf3b, 0x3be24dd3, 0x3bf4bc6a, 0x3c039581, 0x3c0ccccd, 0x3c160418, 0x3c1f3b64,
    0x3c3ae148, 0x3c68f5c3, 0x3c8b851f, 0x3ca28f5d, 0x3cb9999a, 0x3cd0a3d7, 0x3ce7ae15, 0x3cfeb852,
    0x3d0ae148, 0x3d166667, 0x3d21eb85, 0x3d2d70a3, 0x3d38f5c3, 0x3d447ae1, 0x3d500000, 0x3d5b851f,
    0x3d670a3d, 0x3d728f5d, 0x3d7e147b, 0x3d84cccd, 0x3d8a8f5d, 0x3d9051eb, 0x3d96147b, 0x3d9bd70a,
    0x3da1999a, 0x3da75c2a, 0x3dad1eb8, 0x3db2e148, 0x3db8a3d7, 0x3dbe6667, 0x3dc428f7, 0x3dc9eb85,
    0x3ddb3334, 0x3df80000, 0x3e0a6666, 0x3e18cccd, 0x3e273333, 0x3e35999a, 0x3e440000, 0x3e526666,
    0x3e60cccd, 0x3e6f3333, 0x3e7d9999, 0x3e860000, 0x3e8d3334, 0x3e946666, 0x3e9b999a, 0x3ea2cccc,
    0x3eaa0000, 0x3eb13333, 0x3eb86666, 0x3ebf999a, 0x3ec6cccc, 0x3ece0000, 0x3ed53333, 0x3edc6666,
    0x3ee3999a, 0x3eeacccc, 0x3ef20000, 0x3ef93332, 0x3f003333, 0x3f03cccc, 0x3f076666, 0x3f0b0000,
    0x3f0e999a, 0x3f123334, 0x3f15cccd, 0x3f196666, 0x3f1d0000, 0x3f20999a, 0x3f243334, 0x3f27cccd,
    0x3f2b6666, 0x3f2f0000, 0x3f32999a, 0x3f363334, 0x3f39cccd, 0x3f3d6666, 0x3f410000, 0x3f44999a,
    0x3f483333, 0x3f4bcccd, 0x3f4f6666, 0x3f530000, 0x3f56999a, 0x3f5a3333, 0x3f5dcccd, 0x3f616666,
    0x3f650000, 0x3f68999a, 0x3f6c3333, 0x3f6fcccd, 0x3f736666, 0x3f770000, 0x3f7a999a, 0x3f7e3333,
    0x3f800000,
];

/// The codebook, ascending: entry 0 is -1, entry 127 is 0, entry 255 is 1.
pub(crate) const LEVELS: [f32; 256] = {
    let mut levels = [0.0; 256];
    let mut index = 0;
    while index < NON_NEGATIVE.len() {
        let value = f32::from_bits(NON_NEGATIVE[index]);
        levels[127 + index] = value;
        // Index 254 mirrors onto 0 and is overwritten below; 255 has no mirror.
        if index > 0 && index < 128 {
            levels[127 - index] = -value;
        }
        index += 1;
    }
    levels[0] = -1.0;
    levels
};

/// The borders between neighbours: a value belongs to the level whose number is the count of borders below it.
pub(crate) const BORDERS: [f32; 255] = {
    let mut borders = [0.0; 255];
    let mut index = 0;
    while index < 255 {
        borders[index] = ((LEVELS[index] as f64 + LEVELS[index + 1] as f64) * 0.5) as f32;
        index += 1;
    }
    borders
};
