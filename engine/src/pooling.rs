//! From hidden states to an embedding.
//!
//! Sums are in double precision, so that where a prompt was cut into chunks does not show: sums of
//! single-precision numbers that are about alike are exact, and others hardly ever round to another
//! one.

use baton_proto::embedding::Pooling;

/// Adds a row to a sum, which is empty before the first one.
pub(crate) fn pool(sum: &mut Vec<f64>, row: impl ExactSizeIterator<Item = f64>) {
    if sum.is_empty() {
        return sum.extend(row);
    }
    assert_eq!(sum.len(), row.len(), "hidden states of one model are equally long");
    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
}

/// The embedding, of the sum over all rows that make it; `None` if it is not finite.
pub(crate) fn embedding(pooling: Pooling, sum: &[f64], tokens: usize) -> Option<Vec<f32>> {
    let rows = match pooling {
        Pooling::Last => 1.0,
        Pooling::Mean => tokens as f64,
    };
    let values: Vec<f32> = sum.iter().map(|sum| (sum / rows) as f32).collect();
    values.iter().all(|value| value.is_finite()).then_some(values)
}
