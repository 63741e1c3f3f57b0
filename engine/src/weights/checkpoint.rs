//! Safetensors files of a folder, single or sharded, mapped into memory.

#![expect(unsafe_code, reason = "mapping a file is unsafe, because another process may change it")]

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Component, Path};

use baton_kernels::Dtype;
use memmap2::Mmap;
use safetensors::SafeTensors;
use serde_json::Value;

use super::expected::Expected;
use super::{Tensor, WeightsError};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The length of a safetensors header stands before it, as a `u64`.
const LENGTH_BYTES: usize = 8;

/// All tensors of a folder.
pub(crate) struct Checkpoint {
    files: Vec<(String, Mmap)>,
    tensors: BTreeMap<String, Entry>,
}

struct Entry {
    /// Index into `files`.
    file: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    /// Bytes of the file.
    range: Range<usize>,
}

impl Checkpoint {
    pub(crate) fn open(dir: &Path) -> Result<Self, WeightsError> {
        let mut checkpoint = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for file in files(dir)? {
            checkpoint.add(dir, file)?;
        }
        Ok(checkpoint)
    }

    fn add(&mut self, dir: &Path, name: String) -> Result<(), WeightsError> {
        let map = map(dir, &name)?;
        let malformed = |reason: String| WeightsError::Malformed { file: name.clone(), reason };
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|e| malformed(e.to_string()))?;
        let data = LENGTH_BYTES + header;
        for (tensor, info) in metadata.tensors() {
            let entry = Entry {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                range: data + info.data_offsets.0..data + info.data_offsets.1,
            };
            if let Some(other) = self.tensors.insert(tensor.clone(), entry) {
                let other = &self.files[other.file].0;
                return Err(malformed(format!("tensor {tensor} is also in {other}")));
            }
        }
        self.files.push((name, map));
        Ok(())
    }

    /// Compares what is here with what the model needs.
    pub(crate) fn check(
        &self,
        expected: &Expected,
        ignored: impl Fn(&str) -> bool,
    ) -> Result<(), WeightsError> {
        for (name, shape) in expected.iter() {
            let entry = self
                .tensors
                .get(name)
                .ok_or_else(|| WeightsError::MissingTensor(name.to_owned()))?;
            let wrong = |found: String, expected: String| WeightsError::WrongTensor {
                name: name.to_owned(),
                file: self.files[entry.file].0.clone(),
                found,
                expected,
            };
            if entry.shape != shape {
                return Err(wrong(format!("{:?}", entry.shape), format!("{shape:?}")));
            }
            if dtype(entry.dtype).is_none() {
                return Err(wrong(format!("{:?}", entry.dtype), "F32, BF16 or F16".to_owned()));
            }
        }
        let unknown = |name: &str| expected.shape(name).is_none() && !ignored(name);
        match self.tensors.iter().find(|(name, _)| unknown(name)) {
            Some((name, entry)) => Err(WeightsError::UnknownTensor {
                name: name.clone(),
                file: self.files[entry.file].0.clone(),
            }),
            None => Ok(()),
        }
    }

    pub(crate) fn tensor(&self, name: &str) -> Tensor<'_> {
        let bytes = self.bytes(&self.tensors[name]);
        Tensor { dtype: self.dtype(name), bytes: Cow::Borrowed(bytes) }
    }

    /// Whether both tensors are here and hold different bytes.
    pub(crate) fn differ(&self, one: &str, other: &str) -> bool {
        match (self.tensors.get(one), self.tensors.get(other)) {
            (Some(one), Some(other)) => self.bytes(one) != self.bytes(other),
            _ => false,
        }
    }

    fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.files[entry.file].1[entry.range.clone()]
    }

    pub(crate) fn shape(&self, name: &str) -> &[usize] {
        &self.tensors[name].shape
    }

    pub(crate) fn dtype(&self, name: &str) -> Dtype {
        dtype(self.tensors[name].dtype).expect("types were checked")
    }

    /// Feeds `hasher` every tensor's name, type and shape, and a sample of its data: all of a
    /// small one, slices spread evenly over a large one.
    pub(crate) fn identify(&self, hasher: &mut blake3::Hasher) {
        const SLICES: usize = 16;
        const SLICE_BYTES: usize = 4096;
        for (name, entry) in &self.tensors {
            hasher.update(format!("{name} {:?} {:?}\n", entry.dtype, entry.shape).as_bytes());
            let bytes = self.bytes(entry);
            if bytes.len() <= SLICES * SLICE_BYTES {
                hasher.update(bytes);
                continue;
            }
            let last = bytes.len() - SLICE_BYTES;
            for slice in 0..SLICES {
                let start = last / (SLICES - 1) * slice;
                hasher.update(&bytes[start..start + SLICE_BYTES]);
            }
        }
    }
}

fn dtype(dtype: safetensors::Dtype) -> Option<Dtype> {
    match dtype {
        safetensors::Dtype::F32 => Some(Dtype::F32),
        safetensors::Dtype::BF16 => Some(Dtype::Bf16),
        safetensors::Dtype::F16 => Some(Dtype::F16),
        _ => None,
    }
}

/// Names of the files that hold the weights, in a fixed order.
fn files(dir: &Path) -> Result<BTreeSet<String>, WeightsError> {
    // As in transformers, the single file wins.
    if dir.join(SINGLE).exists() {
        return Ok(BTreeSet::from([SINGLE.to_owned()]));
    }
    let malformed = |reason: &str| WeightsError::Malformed {
        file: INDEX.to_owned(),
        reason: reason.to_owned(),
    };
    let text = std::fs::read(dir.join(INDEX)).map_err(|source| match source.kind() {
        ErrorKind::NotFound => WeightsError::NoWeights,
        _ => WeightsError::Io { file: INDEX.to_owned(), source },
    })?;
    let index: Value = serde_json::from_slice(&text).map_err(|e| malformed(&e.to_string()))?;
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| malformed("weight_map is no object"))?;
    map.values()
        .map(|file| {
            let file = file.as_str().ok_or_else(|| malformed("weight_map holds no string"))?;
            // The folder may come from anyone; its index must not make us read other folders.
            let mut parts = Path::new(file).components();
            match (parts.next(), parts.next()) {
                (Some(Component::Normal(part)), None) if part == file => Ok(file.to_owned()),
                _ => Err(WeightsError::Escapes(file.to_owned())),
            }
        })
        .collect()
}

fn map(dir: &Path, name: &str) -> Result<Mmap, WeightsError> {
    let failed = |source| WeightsError::Io { file: name.to_owned(), source };
    let file = File::open(dir.join(name)).map_err(failed)?;
    // SAFETY: nobody may change the file while the model loads; the operator is told so. The bytes
    // are only ever read as plain numbers, of which every pattern is valid.
    unsafe { Mmap::map(&file) }.map_err(failed)
}
