//! Matrix products by cuBLASLt.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::sys::{self, cublasLtMatmulAlgo_t, cublasStatus_t, cudaDataType};
use half::bf16;

use super::device::Device;
use super::error::DeviceError;
use super::memory::{Buffer, Element, Slice};
use super::stream::Stream;

mod plan;
mod shape;
mod tune;

use plan::Plan;
use shape::Shape;
pub use tune::Tuned;
use tune::Tuner;

/// What NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Most products of different shapes that are remembered. Prefill has as many as chunk lengths.
const MAX_PLANS: usize = 4096;

/// Matrix products. An algorithm is chosen once for all shapes of about as many rows.
///
/// For one stream at a time: products share a workspace.
pub struct Gemm {
    device: Arc<Device>,
    handle: sys::cublasLtHandle_t,
    workspace: Buffer<u8>,
    plans: Mutex<Plans>,
}

#[derive(Default)]
struct Plans {
    /// Descriptors, and the algorithm, of each shape.
    of_shapes: HashMap<Shape, Plan>,
    /// Algorithms of [buckets](Shape::bucket), which outlive plans.
    of_buckets: HashMap<Shape, cublasLtMatmulAlgo_t>,
    /// There is one while algorithms are to be tried.
    tuner: Option<Tuner>,
}

// SAFETY: the library's handle may be used by any thread.
unsafe impl Send for Gemm {}
// SAFETY: as above; plans are under a lock.
unsafe impl Sync for Gemm {}

/// `y = x wᵀ (+ bias) (+ y)`, summed in f32.
#[derive(Clone, Copy)]
pub struct Matmul<'a, Y: Output> {
    /// `x` and `w`.
    pub factors: Factors<'a>,
    /// Elements of a row of `x` and of a row of `w`.
    pub inputs: usize,
    /// `[rows, outputs]`
    pub y: Slice<'a, Y>,
    /// `[outputs]`
    pub bias: Option<Slice<'a, bf16>>,
    /// Whether the product is added to what `y` holds.
    pub add: bool,
}

/// What is multiplied, row-major.
#[derive(Clone, Copy)]
pub enum Factors<'a> {
    /// bf16.
    Bf16 {
        /// `[rows, inputs]`
        x: Slice<'a, bf16>,
        /// `[outputs, inputs]`
        w: Slice<'a, bf16>,
    },
    /// e4m3, each row with a scale that its elements are multiplied by. Inputs and outputs are
    /// multiples of 16, and `y` is bf16.
    E4m3 {
        /// `[rows, inputs]`
        x: Slice<'a, u8>,
        /// `[rows]`
        x_scales: Slice<'a, f32>,
        /// `[outputs, inputs]`
        w: Slice<'a, u8>,
        /// `[outputs]`
        w_scales: Slice<'a, f32>,
    },
}

/// What a product can be rounded to.
pub trait Output: Element {
    /// The library's name of it.
    #[doc(hidden)]
    const TYPE: cudaDataType;
}

impl Output for bf16 {
    const TYPE: cudaDataType = cudaDataType::CUDA_R_16BF;
}

impl Output for f32 {
    const TYPE: cudaDataType = cudaDataType::CUDA_R_32F;
}

/// Addresses of a product, by what the library calls them.
#[derive(Clone, Copy)]
struct Addresses {
    w: u64,
    x: u64,
    y: u64,
    bias: u64,
    w_scales: u64,
    x_scales: u64,
}

impl Gemm {
    /// Prepares for products on a device. Takes 32 MiB of its memory.
    ///
    /// # Errors
    /// If the device has not as much left, or the library fails.
    pub fn new(device: &Arc<Device>) -> Result<Self, DeviceError> {
        let workspace = Buffer::new(device, WORKSPACE_BYTES)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle; the device is the thread's, as `workspace` was allocated.
        check("cublasLtCreate", unsafe { sys::cublasLtCreate(&raw mut handle) })?;
        Ok(Self { device: device.clone(), handle, workspace, plans: Mutex::default() })
    }

    /// Queues a product.
    ///
    /// # Errors
    /// If the library has no algorithm for it, which names the product, or fails.
    ///
    /// # Panics
    /// If the slices are not of the sizes that belong together.
    pub fn multiply<Y: Output>(
        &self,
        stream: &Stream,
        product: &Matmul<'_, Y>,
    ) -> Result<(), DeviceError> {
        let (shape, addresses) = product.describe();
        if shape.rows == 0 {
            return Ok(());
        }
        self.device.bind()?;
        let mut plans = self.plans.lock().expect("nothing panics with the lock");
        if !plans.of_shapes.contains_key(&shape) {
            let plan = self.plan(&mut plans, stream, (&shape, &addresses))?;
            if plans.of_shapes.len() >= MAX_PLANS {
                plans.of_shapes.clear();
            }
            plans.of_shapes.insert(shape, plan);
        }
        let plan = &plans.of_shapes[&shape];
        plan.run(self.handle, stream.handle, &addresses, self.workspace.all())
    }

    /// A plan for a shape that there is none for.
    fn plan(
        &self,
        plans: &mut Plans,
        stream: &Stream,
        (shape, addresses): (&Shape, &Addresses),
    ) -> Result<Plan, DeviceError> {
        let bucket = shape.bucket();
        if !plans.of_buckets.contains_key(&bucket) {
            // A product that is added to what is there can be computed only once.
            let can_be_tried = *shape == bucket && !shape.add && !stream.is_capturing();
            let algorithm = match plans.tuner.as_mut().filter(|_| can_be_tried) {
                Some(tuner) => tuner.fastest(self, stream, (shape, addresses))?,
                None => Plan::new(self.handle, &bucket, WORKSPACE_BYTES, None)?.algorithm,
            };
            plans.of_buckets.insert(bucket, algorithm);
        }
        Plan::new(self.handle, shape, WORKSPACE_BYTES, plans.of_buckets.get(&bucket))
    }

    /// From now on products of new shapes try the library's algorithms and keep the fastest, until
    /// [`stop_tuning`](Self::stop_tuning). That waits for the stream, and takes as much memory as
    /// the device has cache. Numbers of rows that share the algorithm of a greater one do not try.
    ///
    /// # Errors
    /// If the driver fails, or there is no memory.
    pub fn start_tuning(&self) -> Result<(), DeviceError> {
        let tuner = Tuner::new(&self.device)?;
        self.plans.lock().expect("nothing panics with the lock").tuner = Some(tuner);
        Ok(())
    }

    /// Products of new shapes take the library's choice again. Gives what was tried.
    pub fn stop_tuning(&self) -> Vec<Tuned> {
        let mut plans = self.plans.lock().expect("nothing panics with the lock");
        plans.tuner.take().map(|tuner| tuner.found).unwrap_or_default()
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created by `new`.
            let _ = unsafe { sys::cublasLtDestroy(self.handle) };
        }
    }
}

impl<Y: Output> Matmul<'_, Y> {
    /// What a plan depends on, and the rest.
    fn describe(&self) -> (Shape, Addresses) {
        let inputs = self.inputs;
        let (x_len, w_len, x, w, scales, input) = match self.factors {
            Factors::Bf16 { x, w } => {
                (x.len(), w.len(), x.address(), w.address(), None, cudaDataType::CUDA_R_16BF)
            }
            Factors::E4m3 { x, x_scales, w, w_scales } => (
                x.len(),
                w.len(),
                x.address(),
                w.address(),
                Some((x_scales, w_scales)),
                cudaDataType::CUDA_R_8F_E4M3,
            ),
        };
        let whole = x_len.is_multiple_of(inputs) && w_len.is_multiple_of(inputs);
        assert!(inputs > 0 && w_len > 0 && whole, "rows of {inputs} inputs");
        let (rows, outputs) = (x_len / inputs, w_len / inputs);
        assert_eq!(self.y.len(), rows * outputs, "{rows} rows of {outputs} outputs");
        assert!(self.bias.is_none_or(|bias| bias.len() == outputs), "a bias for each output");
        // The library takes a bias of the output's type.
        assert!(self.bias.is_none() || Y::TYPE == cudaDataType::CUDA_R_16BF, "bf16 with a bias");
        if let Some((x_scales, w_scales)) = scales {
            assert_eq!((x_scales.len(), w_scales.len()), (rows, outputs), "a scale for each row");
        }
        let addresses = Addresses {
            w,
            x,
            y: self.y.address(),
            bias: self.bias.map_or(0, |bias| bias.address()),
            w_scales: scales.map_or(0, |(_, w)| w.address()),
            x_scales: scales.map_or(0, |(x, _)| x.address()),
        };
        let shape = Shape {
            rows,
            outputs,
            inputs,
            input,
            output: Y::TYPE,
            bias: self.bias.is_some(),
            add: self.add,
            alignment: [w, x, addresses.y].map(alignment),
        };
        (shape, addresses)
    }
}

/// The greatest power of two that divides an address, up to what algorithms make use of.
fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

/// Turns the library's status into a result.
fn check(call: &'static str, status: cublasStatus_t) -> Result<(), DeviceError> {
    match status {
        cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => Err(DeviceError::OutOfMemory { call }),
        cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED => {
            Err(DeviceError::Unsupported(format!("{call}: no algorithm for this product")))
        }
        // Whether the device is lost is found at the next wait.
        status => Err(DeviceError::Refused { call, error: format!("{status:?}") }),
    }
}
