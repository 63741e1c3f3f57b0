// Written by scripts/build-kernels.
/// Every image.
pub static IMAGES: &[Image] = &[
    Image { file: "norm.sm_90a.cubin", target: Target::Hopper, bytes: include_bytes!("norm.sm_90a.cubin") },
    Image { file: "norm.compute_80.ptx", target: Target::Portable, bytes: include_bytes!("norm.compute_80.ptx") },
    Image { file: "resolve.sm_90a.cubin", target: Target::Hopper, bytes: include_bytes!("resolve.sm_90a.cubin") },
    Image { file: "resolve.compute_80.ptx", target: Target::Portable, bytes: include_bytes!("resolve.compute_80.ptx") },
    Image { file: "tile.sm_90a.cubin", target: Target::Hopper, bytes: include_bytes!("tile.sm_90a.cubin") },
];
