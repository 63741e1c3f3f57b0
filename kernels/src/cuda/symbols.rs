//! Every function of NVIDIA's libraries that is used, so that one that is missing is found before
//! it is called: cudarc panics then. A test compares the lists with the code.

use std::ffi::CStr;

/// Of `libcuda.so.1`.
pub(super) const DRIVER_SYMBOLS: &[&CStr] = &[
    c"cuCtxSetCurrent",
    c"cuDeviceGet",
    c"cuDeviceGetAttribute",
    c"cuDeviceGetCount",
    c"cuDeviceGetName",
    c"cuDeviceGetUuid_v2",
    c"cuDevicePrimaryCtxRelease_v2",
    c"cuDevicePrimaryCtxRetain",
    c"cuDeviceTotalMem_v2",
    c"cuDriverGetVersion",
    c"cuEventCreate",
    c"cuEventDestroy_v2",
    c"cuEventElapsedTime_v2",
    c"cuEventQuery",
    c"cuEventRecord",
    c"cuEventSynchronize",
    c"cuFuncGetParamInfo",
    c"cuFuncSetAttribute",
    c"cuGetErrorName",
    c"cuGetErrorString",
    c"cuGraphDestroy",
    c"cuGraphExecDestroy",
    c"cuGraphInstantiateWithFlags",
    c"cuGraphLaunch",
    c"cuGraphUpload",
    c"cuInit",
    c"cuIpcCloseMemHandle",
    c"cuIpcGetMemHandle",
    c"cuIpcOpenMemHandle_v2",
    c"cuLaunchKernel",
    c"cuMemAlloc_v2",
    c"cuMemFreeHost",
    c"cuMemFree_v2",
    c"cuMemGetAddressRange_v2",
    c"cuMemGetInfo_v2",
    c"cuMemHostAlloc",
    c"cuMemcpyDtoDAsync_v2",
    c"cuMemcpyDtoHAsync_v2",
    c"cuMemcpyHtoDAsync_v2",
    c"cuMemsetD8Async",
    c"cuModuleGetFunction",
    c"cuModuleLoadData",
    c"cuModuleUnload",
    c"cuStreamBeginCapture_v2",
    c"cuStreamCreateWithPriority",
    c"cuStreamDestroy_v2",
    c"cuStreamEndCapture",
    c"cuStreamQuery",
    c"cuStreamSynchronize",
    c"cuStreamWaitEvent",
    c"cuTensorMapEncodeTiled",
];

/// Of `libcublasLt.so.13`.
pub(super) const BLAS_SYMBOLS: &[&CStr] = &[
    c"cublasLtCreate",
    c"cublasLtDestroy",
    c"cublasLtMatmul",
    c"cublasLtMatmulAlgoCheck",
    c"cublasLtMatmulAlgoGetHeuristic",
    c"cublasLtMatmulDescCreate",
    c"cublasLtMatmulDescDestroy",
    c"cublasLtMatmulDescSetAttribute",
    c"cublasLtMatmulPreferenceCreate",
    c"cublasLtMatmulPreferenceDestroy",
    c"cublasLtMatmulPreferenceSetAttribute",
    c"cublasLtMatrixLayoutCreate",
    c"cublasLtMatrixLayoutDestroy",
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    /// Functions of the libraries that a folder's sources call.
    fn called(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                called(&path, found);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            for rest in text.split("sys::cu").skip(1) {
                let name = rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
                // Types and constants are named otherwise.
                if !name.ends_with("_t") && name != "lib" && rest[name.len()..].starts_with('(') {
                    found.insert(format!("cu{name}"));
                }
            }
        }
    }

    #[test]
    fn every_function_that_is_called_is_looked_for() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda");
        let mut found = BTreeSet::new();
        called(&folder, &mut found);
        let listed = super::DRIVER_SYMBOLS.iter().chain(super::BLAS_SYMBOLS);
        let listed: BTreeSet<_> = listed.map(|name| name.to_str().unwrap().to_owned()).collect();
        assert_eq!(found, listed);
    }
}
