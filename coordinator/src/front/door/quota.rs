//! How much a key, or all keys of a tenant, may use: token buckets, pure functions of (state, input,
//! now).
//!
//! A bucket holds a minute's worth at most and fills evenly. A prompt is charged when its request
//! begins and refused before that if the bucket does not hold it. Output tokens are charged as they
//! are generated and never refused: a bucket may go into debt, and nothing new begins until the
//! debt is paid. To reserve `max_tokens` up front instead would charge clients that leave it open
//! for a whole context. So the overdraft is at most what the requests in flight generate.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What a bucket's limit is for.
const MINUTE_S: f64 = 60.0;
/// Nobody knows when a request in flight will end.
const IN_FLIGHT_RETRY: Duration = Duration::from_secs(1);

/// Whose use is counted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Account {
    /// A key, by its name.
    Key(String),
    /// All keys of a tenant.
    Tenant(String),
}

/// What an account may use; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Requests begun in a minute.
    pub(crate) requests_per_minute: Option<u32>,
    /// Tokens of prompts and outputs in a minute.
    pub(crate) tokens_per_minute: Option<u64>,
    /// Requests at a time.
    pub(crate) max_in_flight: Option<u32>,
}

/// An account is used up for now; nothing was charged.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{} may use {most} {unit}; try again in {:.1} s", whose(.account), retry_after.as_secs_f64())]
pub(crate) struct Exceeded {
    /// Whose.
    pub(crate) account: Account,
    /// The limit.
    pub(crate) most: u64,
    /// What it counts.
    pub(crate) unit: &'static str,
    /// When there will be enough, if nothing else is used until then.
    pub(crate) retry_after: Duration,
}

impl Exceeded {
    /// Whose quota, as `google.rpc.QuotaFailure` names subjects.
    pub(crate) fn subject(&self) -> String {
        match &self.account {
            Account::Key(name) => format!("key:{name}"),
            Account::Tenant(name) => format!("tenant:{name}"),
        }
    }
}

fn whose(account: &Account) -> String {
    match account {
        Account::Key(name) => format!("key {name:?}"),
        Account::Tenant(name) => format!("tenant {name:?}"),
    }
}

/// What every account has used. Pure.
#[derive(Debug, Default)]
pub(crate) struct Quotas(BTreeMap<Account, Used>);

#[derive(Debug)]
struct Used {
    requests: Bucket,
    tokens: Bucket,
    in_flight: u32,
}

/// What is left, as of `at`; below 0 it is a debt. `None` until the limit is known.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: Option<f64>,
    at: Instant,
}

impl Quotas {
    /// A request begins: it counts as in flight on all `accounts`, or on none. What it will charge is
    /// not known yet, but must be affordable if it is little.
    pub(crate) fn enter(
        &mut self,
        accounts: &[(Account, Limits)],
        now: Instant,
    ) -> Result<(), Exceeded> {
        self.check(accounts, 1, now)?;
        for (account, limits) in accounts {
            let in_flight = self.used(account, now).in_flight;
            if let Some(most) = limits.max_in_flight.filter(|&most| in_flight >= most) {
                return Err(Exceeded {
                    account: account.clone(),
                    most: most.into(),
                    unit: "requests at a time",
                    retry_after: IN_FLIGHT_RETRY,
                });
            }
        }
        accounts.iter().for_each(|(account, _)| self.used(account, now).in_flight += 1);
        Ok(())
    }

    /// Charges a request with a prompt of so many tokens, if all accounts can afford it. More than a
    /// minute's worth is affordable with a full bucket, or it would never be.
    pub(crate) fn charge_prompt(
        &mut self,
        accounts: &[(Account, Limits)],
        tokens: u64,
        now: Instant,
    ) -> Result<(), Exceeded> {
        self.check(accounts, tokens, now)?;
        self.charge(accounts, 1.0, tokens as f64, now);
        Ok(())
    }

    /// Gives back what was charged with a prompt of so many tokens, for which nothing was done.
    pub(crate) fn refund_prompt(
        &mut self,
        accounts: &[(Account, Limits)],
        tokens: u64,
        now: Instant,
    ) {
        self.charge(accounts, -1.0, -(tokens as f64), now);
    }

    /// Charges generated tokens, if need be as a debt.
    pub(crate) fn charge_output(
        &mut self,
        accounts: &[(Account, Limits)],
        tokens: u64,
        now: Instant,
    ) {
        self.charge(accounts, 0.0, tokens as f64, now);
    }

    fn charge(&mut self, accounts: &[(Account, Limits)], requests: f64, tokens: f64, now: Instant) {
        for (account, limits) in accounts {
            let used = self.used(account, now);
            used.requests.take(requests, limits.requests_per_minute.map(f64::from), now);
            used.tokens.take(tokens, limits.tokens_per_minute.map(|most| most as f64), now);
        }
    }

    /// A request that had entered ended.
    pub(crate) fn leave(&mut self, accounts: &[(Account, Limits)], now: Instant) {
        for (account, _) in accounts {
            let used = self.used(account, now);
            used.in_flight = used.in_flight.saturating_sub(1);
        }
    }

    /// Forgets accounts that are gone, as far as nothing of them is in flight.
    pub(crate) fn retain(&mut self, known: impl Fn(&Account) -> bool) {
        self.0.retain(|account, used| used.in_flight > 0 || known(account));
    }

    fn check(
        &mut self,
        accounts: &[(Account, Limits)],
        tokens: u64,
        now: Instant,
    ) -> Result<(), Exceeded> {
        for (account, limits) in accounts {
            let used = self.used(account, now);
            let buckets = [
                (
                    &mut used.requests,
                    limits.requests_per_minute.map(u64::from),
                    1,
                    "requests a minute",
                ),
                (&mut used.tokens, limits.tokens_per_minute, tokens, "tokens a minute"),
            ];
            for (bucket, most, wanted, unit) in buckets {
                let Some(most) = most else { continue };
                if let Some(retry_after) = bucket.wait(wanted as f64, most as f64, now) {
                    return Err(Exceeded { account: account.clone(), most, unit, retry_after });
                }
            }
        }
        Ok(())
    }

    fn used(&mut self, account: &Account, now: Instant) -> &mut Used {
        let empty = Bucket { left: None, at: now };
        let new = || Used { requests: empty, tokens: empty, in_flight: 0 };
        self.0.entry(account.clone()).or_insert_with(new)
    }
}

impl Bucket {
    /// What is left now, if `most` come in a minute. A first look finds the bucket full.
    fn refill(&mut self, most: f64, now: Instant) -> f64 {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        let left = self.left.map_or(most, |left| (left + since * most / MINUTE_S).min(most));
        (self.left, self.at) = (Some(left), self.at.max(now));
        left
    }

    /// How long until `wanted` can be taken; `None` is now.
    fn wait(&mut self, wanted: f64, most: f64, now: Instant) -> Option<Duration> {
        let lacking = wanted.min(most) - self.refill(most, now);
        (lacking > 0.0).then(|| Duration::from_secs_f64(lacking * MINUTE_S / most))
    }

    /// Without a limit nothing is counted.
    fn take(&mut self, wanted: f64, most: Option<f64>, now: Instant) {
        self.left = most.map(|most| self.refill(most, now) - wanted);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn accounts(key: Limits, tenant: Limits) -> [(Account, Limits); 2] {
        [(Account::Key("k".into()), key), (Account::Tenant("t".into()), tenant)]
    }

    fn tokens(most: u64) -> Limits {
        Limits { tokens_per_minute: Some(most), ..Limits::default() }
    }

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn output_makes_debts_that_are_waited_for() {
        let (mut quotas, start) = (Quotas::default(), Instant::now());
        let accounts = accounts(tokens(600), Limits::default());
        quotas.enter(&accounts, start).unwrap();
        quotas.charge_prompt(&accounts, 500, start).unwrap();
        quotas.charge_output(&accounts, 200, start);
        let refused = quotas.enter(&accounts, start).unwrap_err();
        assert_eq!(refused.retry_after, seconds(10.1), "100 in debt, and 1 to begin with");
        assert_eq!(
            refused.to_string(),
            "key \"k\" may use 600 tokens a minute; try again in 10.1 s"
        );
        quotas.enter(&accounts, start + refused.retry_after).unwrap();
        let refused = quotas.charge_prompt(&accounts, 101, start + seconds(10.0)).unwrap_err();
        assert_eq!(refused.retry_after, seconds(10.0));
        quotas.charge_prompt(&accounts, 101, start + seconds(20.1)).unwrap();
    }

    #[test]
    fn what_is_refused_is_not_charged_to_anybody() {
        let (mut quotas, now) = (Quotas::default(), Instant::now());
        let one = Limits { requests_per_minute: Some(60), max_in_flight: Some(1), ..tokens(60) };
        let accounts = accounts(one, Limits { tokens_per_minute: Some(30), ..one });
        for _ in 0..100 {
            quotas.enter(&accounts, now).unwrap();
            let refused = quotas.enter(&accounts, now).unwrap_err();
            assert_eq!((refused.most, refused.unit), (1, "requests at a time"));
            quotas.leave(&accounts, now);
        }
        quotas.charge_prompt(&accounts, 10, now).unwrap();
        let refused = quotas.charge_prompt(&accounts, 21, now).unwrap_err();
        assert_eq!(refused.account, Account::Tenant("t".into()));
        quotas.charge_prompt(&accounts, 20, now).unwrap();
        // What is given back can be had again, and no more than that.
        quotas.refund_prompt(&accounts, 20, now);
        quotas.refund_prompt(&accounts, 1000, now);
        assert!(quotas.charge_prompt(&accounts, 30, now).is_ok());
        assert!(quotas.charge_prompt(&accounts, 1, now).is_err());
    }

    #[test]
    fn a_prompt_of_more_than_a_minute_passes_when_the_bucket_is_full() {
        let (mut quotas, start) = (Quotas::default(), Instant::now());
        let accounts = accounts(tokens(60), Limits::default());
        quotas.charge_prompt(&accounts, 120, start).unwrap();
        let refused = quotas.charge_prompt(&accounts, 120, start).unwrap_err();
        assert_eq!(refused.retry_after, seconds(120.0));
        quotas.charge_prompt(&accounts, 120, start + seconds(120.0)).unwrap();
    }

    #[test]
    fn accounts_that_are_gone_are_forgotten_when_they_are_idle() {
        let (mut quotas, now) = (Quotas::default(), Instant::now());
        let accounts = accounts(tokens(60), tokens(60));
        quotas.enter(&accounts, now).unwrap();
        quotas.retain(|_| false);
        assert_eq!(quotas.0.len(), 2);
        quotas.leave(&accounts, now);
        quotas.retain(|account| matches!(account, Account::Key(_)));
        assert_eq!(quotas.0.len(), 1);
    }

    proptest! {
        /// Whatever comes when: over any time, no more begins than the bucket held and what came in.
        #[test]
        fn no_more_begins_than_comes_in(
            most in 1_u64..1000,
            steps in prop::collection::vec((0_u64..5000, 1_u64..400), 1..80),
        ) {
            let (mut quotas, start) = (Quotas::default(), Instant::now());
            let accounts = accounts(tokens(most), Limits::default());
            let (mut now, mut taken) = (start, 0);
            for (pause_ms, wanted) in steps {
                now += Duration::from_millis(pause_ms);
                let held = most as f64 * (1.0 + (now - start).as_secs_f64() / 60.0);
                match quotas.charge_prompt(&accounts, wanted, now) {
                    Ok(()) => {
                        taken += wanted.min(most);
                        prop_assert!(taken as f64 <= held + 1e-6, "{taken} of {held}");
                        taken += wanted - wanted.min(most);
                    }
                    Err(refused) => {
                        let when = now + refused.retry_after + Duration::from_nanos(100);
                        prop_assert!(quotas.check(&accounts, wanted, when).is_ok());
                        now = when;
                    }
                }
            }
        }
    }
}
