//! How Hopper's copy engine (TMA) sees a tensor.

use cudarc::driver::sys::{
    self, CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle,
};

use super::error::{DeviceError, check};
use super::kernel::parameters;
use super::memory::{Element, Slice};

/// Most dimensions of a tensor.
const MAX_DIMENSIONS: usize = 5;

/// A tensor in device memory, and the box of it that one instruction moves. Kernels take it as
/// `const __grid_constant__ TensorMap`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct TensorMap(CUtensorMap);

parameters!(TensorMap);

/// One dimension of a tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Dimension {
    /// Elements.
    pub size: usize,
    /// Bytes from one to the next; of the first dimension always those of an element. A multiple
    /// of 16 for the others.
    pub stride_bytes: usize,
    /// Elements of a box, at most 256.
    pub box_size: u32,
}

/// How rows of a box lie in shared memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Swizzle {
    /// One after another.
    #[allow(dead_code, reason = "for kernels to come")]
    None,
    /// Rows of 128 bytes, their units of 16 bytes exchanged as `matrix_descriptor` expects it.
    Bytes128,
}

impl TensorMap {
    /// Describes a tensor, its fastest dimension first. Elements are moved as they are, so only
    /// their size matters.
    ///
    /// # Errors
    /// If the driver does not like it.
    ///
    /// # Panics
    /// If the tensor is not inside the slice, or has no or more than five dimensions.
    pub(crate) fn new<T: Element>(
        slice: Slice<'_, T>,
        dimensions: &[Dimension],
        swizzle: Swizzle,
    ) -> Result<Self, DeviceError> {
        let rank = dimensions.len();
        assert!((1..=MAX_DIMENSIONS).contains(&rank), "{rank} dimensions");
        let last = dimensions.iter().map(|d| (d.size - 1) * d.stride_bytes).sum::<usize>();
        assert!(last + size_of::<T>() <= slice.bytes(), "a tensor of {} bytes", slice.bytes());
        let (mut sizes, mut boxes) = ([1; MAX_DIMENSIONS], [1; MAX_DIMENSIONS]);
        let mut strides = [0; MAX_DIMENSIONS];
        for (i, dimension) in dimensions.iter().enumerate() {
            sizes[i] = dimension.size as u64;
            boxes[i] = dimension.box_size;
            strides[i] = dimension.stride_bytes as u64;
        }
        let mut map = CUtensorMap { opaque: [0; 16] };
        // SAFETY: each array has as many values as there are dimensions (strides without the
        // first); `map` is aligned as the type says.
        let status = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                data_type(size_of::<T>()),
                rank as u32,
                slice.address() as *mut _,
                sizes.as_ptr(),
                strides[1..].as_ptr(),
                boxes.as_ptr(),
                [1; MAX_DIMENSIONS].as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                match swizzle {
                    Swizzle::None => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
                    Swizzle::Bytes128 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                },
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", status).map(|()| Self(map))
    }
}

/// An unsigned integer of as many bytes.
fn data_type(bytes: usize) -> CUtensorMapDataType {
    match bytes {
        1 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
        4 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT32,
        _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT64,
    }
}
