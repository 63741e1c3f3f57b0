//! Element types of weights and KV caches.

use half::{bf16, f16};

/// Element type of a tensor in memory, little endian.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// Widens the elements in `bytes` to single precision, which is exact.
    ///
    /// # Panics
    /// If `bytes` does not hold `out.len()` elements.
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), out.len() * self.bytes(), "one element for each output");
        match self {
            Self::F32 => read(bytes, out, f32::from_le_bytes),
            Self::Bf16 => read(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            Self::F16 => read(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        }
    }

    /// Rounds `values` to this type, to the nearest and ties to even, into `bytes`.
    ///
    /// # Panics
    /// If `bytes` does not hold `values.len()` elements.
    pub fn narrow(self, values: &[f32], bytes: &mut [u8]) {
        assert_eq!(bytes.len(), values.len() * self.bytes(), "room for each value");
        match self {
            Self::F32 => write(values, bytes, f32::to_le_bytes),
            Self::Bf16 => write(values, bytes, |v| bf16::from_f32(v).to_le_bytes()),
            Self::F16 => write(values, bytes, |v| f16::from_f32(v).to_le_bytes()),
        }
    }
}

fn read<const N: usize>(bytes: &[u8], out: &mut [f32], wide: impl Fn([u8; N]) -> f32) {
    for (value, element) in out.iter_mut().zip(bytes.as_chunks().0) {
        *value = wide(*element);
    }
}

fn write<const N: usize>(values: &[f32], bytes: &mut [u8], narrow: impl Fn(f32) -> [u8; N]) {
    for (element, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
        *element = narrow(*value);
    }
}
