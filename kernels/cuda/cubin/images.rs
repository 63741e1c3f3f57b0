// Written by scripts/build-kernels.
/// Every image.
pub static IMAGES: &[Image] = &[
    Image { file: "activation.sm_90a.cubin", target: Target::Hopper, bytes: include_bytes!("activation.sm_90a.cubin") },
    Image { file: "activation.compute_80.ptx", target: Target::Portable, bytes: include_bytes!("activation.compute_80.ptx") },
    Image { file: "advance.sm_90a.cubin", target: Target::Hopper, bytes: include_bytes!("advance.sm_90a.cubin") },
    Image { file: "advance.compute_80.ptx", target: Target::Portable, bytes: include_bytes!("advance.compute_80.ptx") },
    Image { file: "blocks.sm_90a.cubin", target: Target::Hopper, bytes: include_bytes!("blocks.sm_90a.cubin") },
    Image { file: "blocks.compute_80.ptx", target: Target::Portable, bytes: include_bytes!("blocks.compute_80.ptx") },
    Image { file: "decode_attention.sm_90a.cubin", target: Target::Hopper, bytes: include_bytes!("decode_attention.sm_90a.cubin") },
    Image { file: "decode_attention.compute_80.ptx", target: Target::Portable, bytes: include_bytes!("decode_attention.compute_80.ptx") },
    Image { file: "embedding.sm_90a.cubin", target: Target::Hopper, bytes: include_bytes!("embedding.sm_90a.cubin") },
    Image { file: "embedding.compute_80.ptx", target: Target::Portable, bytes: include_bytes!("embedding.compute_80.ptx") },
    Image { file: "norm.sm_90a.cubin", target: Target::Hopper, bytes: include_bytes!("norm.sm_90a.cubin") },
    Image { file: "norm.compute_80.ptx", target: Target::Portable, bytes: include_bytes!("norm.compute_80.ptx") },
    Image { file: "prefill_attention.sm_90a.cubin", target: Target::Hopper, bytes: include_bytes!("prefill_attention.sm_90a.cubin") },
    Image { file: "quantize.sm_90a.cubin", target: Target::Hopper, bytes: include_bytes!("quantize.sm_90a.cubin") },
    Image { file: "quantize.compute_80.ptx", target: Target::Portable, bytes: include_bytes!("quantize.compute_80.ptx") },
    Image { file: "resolve.sm_90a.cubin", target: Target::Hopper, bytes: include_bytes!("resolve.sm_90a.cubin") },
    Image { file: "resolve.compute_80.ptx", target: Target::Portable, bytes: include_bytes!("resolve.compute_80.ptx") },
    Image { file: "rope.sm_90a.cubin", target: Target::Hopper, bytes: include_bytes!("rope.sm_90a.cubin") },
    Image { file: "rope.compute_80.ptx", target: Target::Portable, bytes: include_bytes!("rope.compute_80.ptx") },
    Image { file: "tile.sm_90a.cubin", target: Target::Hopper, bytes: include_bytes!("tile.sm_90a.cubin") },
];
