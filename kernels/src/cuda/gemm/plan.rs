//! What the library is told about a product, kept for the next one of the same shape.
//!
//! The library is column-major: it computes `yᵀ = w xᵀ`, where a row-major matrix is its own
//! transpose. So its A is `w`, transposed; its B is `x`; its rows are outputs.

use std::ffi::c_void;

use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtEpilogue_t, cublasLtMatmulAlgo_t,
    cublasLtMatmulDescAttributes_t as Attribute, cublasLtMatmulHeuristicResult_t as Heuristic,
    cublasLtMatmulMatrixScale_t, cublasLtMatmulPreferenceAttributes_t as Preference,
    cublasStatus_t, cudaDataType,
};
use cudarc::driver::sys::CUstream;

use super::shape::Shape;
use super::{Addresses, check};
use crate::cuda::error::DeviceError;
use crate::cuda::memory::Slice;

/// `CUBLAS_OP_T`.
const OPERATION_TRANSPOSE: i32 = 1;

/// Descriptors of a product, and the algorithm that computes it.
pub(super) struct Plan {
    pub(super) descriptors: Descriptors,
    pub(super) algorithm: cublasLtMatmulAlgo_t,
    scaled: bool,
    bias: bool,
    beta: f32,
}

// SAFETY: descriptors are plain memory of the library, used by one thread at a time.
unsafe impl Send for Plan {}

/// Of A = `w`, B = `x` and D = `y`.
pub(super) struct Descriptors {
    product: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
}

impl Plan {
    /// A plan with an algorithm of the shape's [bucket](Shape::bucket), if it is one for the shape
    /// too, else with the one that the library likes best.
    pub(super) fn new(
        handle: sys::cublasLtHandle_t,
        shape: &Shape,
        workspace_bytes: usize,
        of_bucket: Option<&cublasLtMatmulAlgo_t>,
    ) -> Result<Self, DeviceError> {
        let descriptors = Descriptors::new(shape)?;
        let usable = |algorithm: &&cublasLtMatmulAlgo_t| {
            descriptors.accept(handle, algorithm, workspace_bytes)
        };
        let algorithm = match of_bucket.filter(usable) {
            Some(algorithm) => *algorithm,
            None => descriptors.algorithms(handle, shape, workspace_bytes, 1)?[0],
        };
        Ok(Self {
            descriptors,
            algorithm,
            scaled: shape.input == cudaDataType::CUDA_R_8F_E4M3,
            bias: shape.bias,
            beta: if shape.add { 1.0 } else { 0.0 },
        })
    }

    /// Queues the product at these addresses.
    pub(super) fn run(
        &self,
        handle: sys::cublasLtHandle_t,
        stream: CUstream,
        addresses: &Addresses,
        workspace: Slice<'_, u8>,
    ) -> Result<(), DeviceError> {
        let Descriptors { product, w, x, y } = self.descriptors;
        if self.bias {
            set(product, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &addresses.bias)?;
        }
        if self.scaled {
            set(product, Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &addresses.w_scales)?;
            set(product, Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &addresses.x_scales)?;
        }
        let alpha = 1.0_f32;
        // SAFETY: descriptors are of memory as long as the product's slices, which were checked;
        // alpha and beta are read before it returns.
        let status = unsafe {
            sys::cublasLtMatmul(
                handle,
                product,
                (&raw const alpha).cast(),
                addresses.w as *const c_void,
                w,
                addresses.x as *const c_void,
                x,
                (&raw const self.beta).cast(),
                addresses.y as *const c_void,
                y,
                addresses.y as *mut c_void,
                y,
                &raw const self.algorithm,
                workspace.address() as *mut c_void,
                workspace.len(),
                stream.cast(),
            )
        };
        check("cublasLtMatmul", status)
    }
}

impl Descriptors {
    fn new(shape: &Shape) -> Result<Self, DeviceError> {
        // From here on dropping it gives back what was made.
        let mut all = Self {
            product: std::ptr::null_mut(),
            w: std::ptr::null_mut(),
            x: std::ptr::null_mut(),
            y: std::ptr::null_mut(),
        };
        let compute = cublasComputeType_t::CUBLAS_COMPUTE_32F;
        // SAFETY: writes one handle.
        let status = unsafe {
            sys::cublasLtMatmulDescCreate(&raw mut all.product, compute, cudaDataType::CUDA_R_32F)
        };
        check("cublasLtMatmulDescCreate", status)?;
        // The library may name no algorithm while these are null; `run` says where they are.
        let somewhere = 256_u64;
        let transposed = OPERATION_TRANSPOSE;
        set(all.product, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed)?;
        if shape.bias {
            let bias = cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            set(all.product, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &bias)?;
            set(all.product, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &somewhere)?;
        }
        if shape.input == cudaDataType::CUDA_R_8F_E4M3 {
            let mode = cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
            set(all.product, Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode)?;
            set(all.product, Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode)?;
            set(all.product, Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &somewhere)?;
            set(all.product, Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &somewhere)?;
        }
        all.w = layout(shape.input, shape.inputs, shape.outputs)?;
        all.x = layout(shape.input, shape.inputs, shape.rows)?;
        all.y = layout(shape.output, shape.outputs, shape.rows)?;
        Ok(all)
    }

    /// Up to so many algorithms, the library's favourites first.
    pub(super) fn algorithms(
        &self,
        handle: sys::cublasLtHandle_t,
        shape: &Shape,
        workspace_bytes: usize,
        count: usize,
    ) -> Result<Vec<cublasLtMatmulAlgo_t>, DeviceError> {
        let preference = Preferences::new(workspace_bytes, shape.alignment)?;
        // SAFETY: plain data, of which the library fills in as many as it finds.
        let mut found: Vec<Heuristic> = vec![unsafe { std::mem::zeroed() }; count];
        let mut returned = 0;
        // SAFETY: there is room for `count`.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                self.product,
                self.w,
                self.x,
                self.y,
                self.y,
                preference.0,
                count as i32,
                found.as_mut_ptr(),
                &raw mut returned,
            )
        };
        if status != cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED {
            check("cublasLtMatmulAlgoGetHeuristic", status)?;
        }
        found.truncate(usize::try_from(returned).unwrap_or_default());
        found.retain(|heuristic| heuristic.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        if found.is_empty() {
            return Err(DeviceError::Unsupported(format!("cuBLASLt has no algorithm for {shape}")));
        }
        Ok(found.into_iter().map(|heuristic| heuristic.algo).collect())
    }

    /// Whether an algorithm that was chosen for another number of rows is one for this too.
    fn accept(
        &self,
        handle: sys::cublasLtHandle_t,
        algorithm: &cublasLtMatmulAlgo_t,
        workspace_bytes: usize,
    ) -> bool {
        // SAFETY: plain data, which the library fills in.
        let mut found: Heuristic = unsafe { std::mem::zeroed() };
        // SAFETY: descriptors and algorithm live; writes one result.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                handle,
                self.product,
                self.w,
                self.x,
                self.y,
                self.y,
                std::ptr::from_ref(algorithm),
                &raw mut found,
            )
        };
        status == cublasStatus_t::CUBLAS_STATUS_SUCCESS && found.workspaceSize <= workspace_bytes
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: each was made by the library, or is null.
        unsafe {
            for layout in [self.w, self.x, self.y] {
                if !layout.is_null() {
                    let _ = sys::cublasLtMatrixLayoutDestroy(layout);
                }
            }
            if !self.product.is_null() {
                let _ = sys::cublasLtMatmulDescDestroy(self.product);
            }
        }
    }
}

/// What algorithms may count on.
struct Preferences(sys::cublasLtMatmulPreference_t);

impl Preferences {
    fn new(workspace_bytes: usize, [w, x, y]: [u32; 3]) -> Result<Self, DeviceError> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle.
        let status = unsafe { sys::cublasLtMatmulPreferenceCreate(&raw mut handle) };
        check("cublasLtMatmulPreferenceCreate", status)?;
        let preferences = Self(handle);
        let bytes = workspace_bytes as u64;
        preferences.set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes)?;
        preferences.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &w)?;
        preferences.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &x)?;
        preferences.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &y)?;
        preferences.set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &y)?;
        Ok(preferences)
    }

    fn set<T>(&self, attribute: Preference, value: &T) -> Result<(), DeviceError> {
        // SAFETY: copies a value of the size that belongs to the attribute.
        let status = unsafe {
            let value = std::ptr::from_ref(value).cast();
            sys::cublasLtMatmulPreferenceSetAttribute(self.0, attribute, value, size_of::<T>())
        };
        check("cublasLtMatmulPreferenceSetAttribute", status)
    }
}

impl Drop for Preferences {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        let _ = unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

fn set<T>(
    product: sys::cublasLtMatmulDesc_t,
    attribute: Attribute,
    value: &T,
) -> Result<(), DeviceError> {
    // SAFETY: copies a value of the size that belongs to the attribute.
    let status = unsafe {
        let value = std::ptr::from_ref(value).cast();
        sys::cublasLtMatmulDescSetAttribute(product, attribute, value, size_of::<T>())
    };
    check("cublasLtMatmulDescSetAttribute", status)
}

/// A dense column-major matrix.
fn layout(
    element: cudaDataType,
    rows: usize,
    columns: usize,
) -> Result<sys::cublasLtMatrixLayout_t, DeviceError> {
    let mut layout = std::ptr::null_mut();
    let (rows, columns) = (rows as u64, columns as u64);
    // SAFETY: writes one handle.
    let status = unsafe {
        sys::cublasLtMatrixLayoutCreate(&raw mut layout, element, rows, columns, rows as i64)
    };
    check("cublasLtMatrixLayoutCreate", status).map(|()| layout)
}
