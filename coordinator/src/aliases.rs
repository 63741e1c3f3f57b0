//! Several models behind one name: which of them serves a request.
//!
//! The cheapest of those that would begin to answer in time; if none would, the one that begins
//! first. Pure: the caller says what each of them would take.

/// By so much the model that was chosen last counts as quicker and cheaper, so that two that are
/// equal do not take turns.
const HYSTERESIS: f64 = 0.1;

/// A name for several models.
#[derive(Clone, Debug, PartialEq)]
pub struct Alias {
    /// What clients ask for.
    pub name: String,
    /// Names of served models, the preferred one first; at least one.
    pub models: Vec<String>,
    /// What a second of device time of each costs, relative to the others.
    pub prices: Vec<f64>,
    /// Milliseconds within which an answer should begin.
    pub target_ttft_ms: f64,
}

/// What a prompt would take with one model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Milliseconds until a node could start with it.
    pub queue_ms: f64,
    /// Milliseconds of computing it.
    pub prefill_ms: f64,
}

impl Alias {
    /// The position of the model that serves a request. `estimates`: of each model, `None` if it is
    /// not ready; `last`: what was chosen before.
    #[must_use]
    pub fn choose(&self, estimates: &[Option<Estimate>], last: Option<usize>) -> usize {
        let ready = || {
            let all = estimates.iter().zip(&self.prices).enumerate();
            all.filter_map(|(at, (estimate, price))| {
                let Estimate { queue_ms, prefill_ms } = (*estimate)?;
                let favour = if last == Some(at) { 1.0 - HYSTERESIS } else { 1.0 };
                Some((at, favour * (queue_ms + prefill_ms), favour * price * prefill_ms))
            })
        };
        let in_time = ready().filter(|&(_, first_token, _)| first_token <= self.target_ttft_ms);
        // Of equals, the first is the least.
        let cheapest = in_time.min_by(|a, b| a.2.total_cmp(&b.2));
        let quickest = || ready().min_by(|a, b| a.1.total_cmp(&b.1));
        cheapest.or_else(quickest).map_or(0, |(at, ..)| at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The large model takes four times as long, at a quarter of the price per second.
    fn alias() -> Alias {
        Alias {
            name: "chat".to_owned(),
            models: vec!["large".to_owned(), "small".to_owned()],
            prices: vec![0.25, 1.5],
            target_ttft_ms: 2000.0,
        }
    }

    fn choose(queue_ms: [f64; 2], last: Option<usize>) -> usize {
        let [large, small] = queue_ms;
        let large = Estimate { queue_ms: large, prefill_ms: 400.0 };
        let small = Estimate { queue_ms: small, prefill_ms: 100.0 };
        alias().choose(&[Some(large), Some(small)], last)
    }

    #[test]
    fn what_the_cheap_one_cannot_begin_in_time_overflows() {
        let mut last = None;
        let queues = [0.0, 1500.0, 1700.0, 2500.0, 1900.0, 1700.0, 1500.0, 0.0];
        let chosen = queues.map(|queue_ms| {
            last = Some(choose([queue_ms, 0.0], last));
            last.unwrap()
        });
        // It keeps the name until 2000 / 0.9 ms, and gets it back below 2000.
        assert_eq!(chosen, [0, 0, 0, 1, 1, 1, 0, 0]);
    }

    #[test]
    fn when_none_is_in_time_the_quickest_serves() {
        assert_eq!(choose([9000.0, 5000.0], None), 1);
        assert_eq!(choose([4000.0, 5000.0], None), 0);
        assert_eq!(choose([4700.0, 5100.0], Some(0)), 0);
        assert_eq!(choose([4700.0, 5100.0], Some(1)), 1, "hardly slower");
        assert_eq!(choose([4000.0, 5100.0], Some(1)), 0);
    }

    #[test]
    fn equals_are_taken_in_order_and_the_last_one_is_kept() {
        let same = Some(Estimate { queue_ms: 0.0, prefill_ms: 100.0 });
        let alias = Alias { prices: vec![1.0; 2], ..alias() };
        assert_eq!(alias.choose(&[same, same], None), 0);
        assert_eq!(alias.choose(&[same, same], Some(1)), 1);
        let cheaper = Some(Estimate { queue_ms: 0.0, prefill_ms: 85.0 });
        assert_eq!(alias.choose(&[cheaper, same], Some(1)), 0, "more than a tenth cheaper");
    }

    #[test]
    fn models_that_are_not_ready_are_skipped() {
        let late = Some(Estimate { queue_ms: 9000.0, prefill_ms: 100.0 });
        assert_eq!(alias().choose(&[None, late], Some(0)), 1);
        assert_eq!(alias().choose(&[None, None], Some(1)), 0);
    }
}
