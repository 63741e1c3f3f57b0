//! Rotary position embedding: its parameters in `config.json`, its frequencies, its angles.
//!
//! Frequencies follow transformers' `modeling_rope_utils.py`, in single precision and in the same
//! order of operations, so that angles at far positions agree too.

use std::f32::consts::PI;

use serde_json::{Value, json};

use crate::config::{ConfigError, Keys};

/// Frequencies of a rotary embedding over whole heads.
#[derive(Clone, PartialEq, Debug)]
pub struct Rope {
    /// Radians per position of each pair of elements; `head_dim / 2` of them.
    pub frequencies: Vec<f32>,
    /// Factor on every sine and cosine (YaRN's attention factor; else 1).
    pub scale: f32,
}

impl Rope {
    /// Reads `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta` (before).
    pub(crate) fn parse(
        config: &Value,
        head_dim: usize,
        max_positions: usize,
    ) -> Result<Self, ConfigError> {
        let top = Keys::of(config, "")?;
        let nothing = json!({});
        // Where a file has both, transformers lets the old name win.
        let (inner, prefix) = match (top.get("rope_scaling"), top.get("rope_parameters")) {
            (Some(old), _) => (old, "rope_scaling."),
            (None, Some(new)) => (new, "rope_parameters."),
            (None, None) => (&nothing, "rope_parameters."),
        };
        let keys = Keys::of(inner, prefix)?;
        keys.only("partial_rotary_factor", &json!(1.0))?;
        for key in ["full_attention", "sliding_attention", "mrope_section"] {
            keys.only(key, &Value::Null)?;
        }
        let theta = match keys.positive("rope_theta")? {
            Some(theta) => theta,
            None => top.positive("rope_theta")?.unwrap_or(10_000.0),
        };
        let base = Bases::new(theta, head_dim);
        let kind_key = if keys.get("rope_type").is_some() { "rope_type" } else { "type" };
        match keys.text(kind_key)?.unwrap_or("default") {
            // Dynamic NTK scaling begins past max_position_embeddings, which no sequence passes.
            "default" | "dynamic" => Ok(base.plain()),
            "linear" => Ok(base.linear(keys.required_positive("factor")? as f32)),
            "llama3" => {
                let original = original_positions(top, keys, max_positions)?;
                Ok(base.llama3(&Llama3::parse(keys)?, original))
            }
            "yarn" => {
                let original = original_positions(top, keys, max_positions)?;
                Ok(base.yarn(&Yarn::parse(keys, original)?))
            }
            _ => Err(keys.unsupported(kind_key, "default, linear, dynamic, llama3, yarn")),
        }
    }

    /// Cosines and sines at each of `positions`: `[positions, head_dim / 2]` each.
    pub(crate) fn angles(&self, positions: &[usize], cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
        cos.clear();
        sin.clear();
        for position in positions {
            for frequency in &self.frequencies {
                // The product is rounded to single precision, as transformers has it.
                let angle = f64::from(*position as f32 * frequency);
                cos.push(angle.cos() as f32 * self.scale);
                sin.push(angle.sin() as f32 * self.scale);
            }
        }
    }
}

/// Positions that the model saw before its context was extended.
fn original_positions(
    top: Keys<'_>,
    keys: Keys<'_>,
    max_positions: usize,
) -> Result<f64, ConfigError> {
    const KEY: &str = "original_max_position_embeddings";
    Ok(match top.positive(KEY)? {
        Some(original) => original,
        None => keys.positive(KEY)?.unwrap_or(max_positions as f64),
    })
}

/// Parameters of Llama 3.1's scaling.
struct Llama3 {
    factor: f32,
    low: f32,
    high: f32,
}

impl Llama3 {
    fn parse(keys: Keys<'_>) -> Result<Self, ConfigError> {
        let low = keys.required_positive("low_freq_factor")? as f32;
        let high = keys.required_positive("high_freq_factor")? as f32;
        if high <= low {
            return Err(keys.invalid("high_freq_factor", "more than low_freq_factor"));
        }
        let factor = keys.required_positive("factor")? as f32;
        Ok(Self { factor, low, high })
    }
}

/// Parameters of YaRN (<https://arxiv.org/abs/2309.00071>).
struct Yarn {
    factor: f64,
    original: f64,
    attention_factor: f64,
    beta_fast: f64,
    beta_slow: f64,
    truncate: bool,
}

impl Yarn {
    fn parse(keys: Keys<'_>, original: f64) -> Result<Self, ConfigError> {
        let factor = keys.required_positive("factor")?;
        let magnitude = |weight: f64| {
            if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
        };
        // Zero means "not given" for these.
        let given = |key| match keys.get(key).and_then(Value::as_f64) {
            Some(0.0) => Ok(None),
            _ => keys.positive(key),
        };
        let by_magnitudes = match (given("mscale")?, given("mscale_all_dim")?) {
            (Some(some), Some(all)) => magnitude(some) / magnitude(all),
            _ => magnitude(1.0),
        };
        Ok(Self {
            factor,
            original,
            attention_factor: keys.positive("attention_factor")?.unwrap_or(by_magnitudes),
            beta_fast: given("beta_fast")?.unwrap_or(32.0),
            beta_slow: given("beta_slow")?.unwrap_or(1.0),
            truncate: keys.flag("truncate", true)?,
        })
    }
}

/// `theta ^ (2i / head_dim)` for each pair `i`: the wavelengths over 2 pi.
struct Bases {
    theta: f64,
    powers: Vec<f32>,
}

impl Bases {
    fn new(theta: f64, head_dim: usize) -> Self {
        let exponents = (0..head_dim).step_by(2).map(|i| i as f32 / head_dim as f32);
        let powers = exponents.map(|e| theta.powf(f64::from(e)) as f32).collect();
        Self { theta, powers }
    }

    fn plain(self) -> Rope {
        let frequencies = self.powers.into_iter().map(|power| 1.0 / power).collect();
        Rope { frequencies, scale: 1.0 }
    }

    fn linear(self, factor: f32) -> Rope {
        let mut rope = self.plain();
        rope.frequencies.iter_mut().for_each(|frequency| *frequency /= factor);
        rope
    }

    /// Long wavelengths are slowed by `factor`, short ones kept, those between blended.
    fn llama3(self, parameters: &Llama3, original: f64) -> Rope {
        let Llama3 { factor, low, high } = *parameters;
        let original = original as f32;
        let mut rope = self.plain();
        for frequency in &mut rope.frequencies {
            let wavelength = 2.0 * PI / *frequency;
            *frequency = if wavelength > original / low {
                *frequency / factor
            } else if wavelength < original / high {
                *frequency
            } else {
                let smooth = (original / wavelength - low) / (high - low);
                (1.0 - smooth) * *frequency / factor + smooth * *frequency
            };
        }
        rope
    }

    /// Blends interpolation into extrapolation by how often a dimension turns in the original
    /// context.
    fn yarn(self, yarn: &Yarn) -> Rope {
        let head_dim = 2 * self.powers.len();
        let dimension = |turns: f64| {
            let turn = 2.0 * std::f64::consts::PI;
            head_dim as f64 * (yarn.original / (turns * turn)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (dimension(yarn.beta_fast), dimension(yarn.beta_slow));
        if yarn.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min((head_dim - 1) as f64));
        if low == high {
            high += 0.001;
        }
        let frequency = |(i, power): (usize, &f32)| {
            let interpolated = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let kept = 1.0 - interpolated;
            1.0 / (yarn.factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
        };
        Rope {
            frequencies: self.powers.iter().enumerate().map(frequency).collect(),
            scale: yarn.attention_factor as f32,
        }
    }
}
