//! Fairness between tenants, in predicted device time: a virtual token counter (Sheng et al.,
//! "Fairness in Serving Large Language Models", OSDI 2024) that counts milliseconds.

use std::collections::BTreeMap;

/// Most tenants that are told apart; beyond it the one served least is forgotten.
const MOST_TENANTS: usize = 4096;

/// Whose a request is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(pub u64);

impl TenantId {
    /// The tenant of this name. Names are told apart by FNV-1a hashes: a collision would make two
    /// tenants share their share.
    #[must_use]
    pub fn named(name: &str) -> Self {
        let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        Self(name.bytes().fold(0xcbf2_9ce4_8422_2325, step))
    }
}

/// Time that each tenant has had. Pure.
#[derive(Clone, Debug, Default)]
pub(super) struct Tenants {
    tenants: BTreeMap<TenantId, Tenant>,
    /// How many have requests that wait.
    active: usize,
    /// The time of the one that was served last: where all start who come while nobody waits.
    last_ms: f64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Tenant {
    served_ms: f64,
    waiting: u32,
}

impl Tenants {
    /// A request of the tenant waits. Whoever was away has saved nothing up.
    pub(super) fn arrive(&mut self, id: TenantId) {
        if self.tenants.get(&id).is_none_or(|tenant| tenant.waiting == 0) {
            let least = self.least();
            let tenant = self.known(id);
            tenant.served_ms = tenant.served_ms.max(least);
            self.active += 1;
        }
        self.known(id).waiting += 1;
    }

    /// A request of the tenant waits no more.
    pub(super) fn leave(&mut self, id: TenantId) {
        let Some(tenant) = self.tenants.get_mut(&id).filter(|tenant| tenant.waiting > 0) else {
            return;
        };
        tenant.waiting -= 1;
        self.active -= usize::from(tenant.waiting == 0);
    }

    /// A tenant got so much time; negative if less was needed than thought.
    pub(super) fn serve(&mut self, id: TenantId, ms: f64) {
        let tenant = self.known(id);
        tenant.served_ms += ms;
        self.last_ms = tenant.served_ms;
    }

    /// What the active tenant has had that had the least.
    fn least(&self) -> f64 {
        if self.active == 0 {
            return self.last_ms;
        }
        let active = self.tenants.values().filter(|tenant| tenant.waiting > 0);
        active.map(|tenant| tenant.served_ms).min_by(f64::total_cmp).unwrap_or(self.last_ms)
    }

    /// The account of a tenant, which is opened if there is none.
    fn known(&mut self, id: TenantId) -> &mut Tenant {
        if self.tenants.len() >= MOST_TENANTS && !self.tenants.contains_key(&id) {
            self.forget();
        }
        self.tenants.entry(id).or_default()
    }

    /// Time that a tenant has had, in milliseconds, from a beginning that all share.
    #[must_use]
    pub(super) fn served(&self, id: TenantId) -> f64 {
        self.tenants.get(&id).map_or(0.0, |tenant| tenant.served_ms)
    }

    fn forget(&mut self) {
        let idle = self.tenants.iter().filter(|(_, tenant)| tenant.waiting == 0);
        let least = idle.min_by(|(_, a), (_, b)| a.served_ms.total_cmp(&b.served_ms));
        if let Some(id) = least.map(|(&id, _)| id) {
            self.tenants.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_away_has_saved_nothing_up() {
        let mut tenants = Tenants::default();
        tenants.arrive(TenantId(1));
        tenants.serve(TenantId(1), 1000.0);
        tenants.arrive(TenantId(2));
        assert_eq!(tenants.served(TenantId(2)), 1000.0);
        tenants.serve(TenantId(2), -100.0);
        assert_eq!(tenants.served(TenantId(2)), 900.0);
    }

    #[test]
    fn who_comes_while_nobody_waits_starts_where_the_others_are() {
        let mut tenants = Tenants::default();
        let [old, new] = [TenantId(1), TenantId(2)];
        tenants.arrive(old);
        tenants.leave(old);
        tenants.serve(old, 1e6);
        tenants.arrive(new);
        tenants.arrive(old);
        assert_eq!(tenants.served(new), tenants.served(old));
    }

    #[test]
    fn who_never_waits_is_forgotten_too() {
        let mut tenants = Tenants::default();
        (0..2 * MOST_TENANTS as u64).for_each(|n| tenants.serve(TenantId(n), 1.0));
        assert_eq!(tenants.tenants.len(), MOST_TENANTS);
    }

    #[test]
    fn forgets_only_those_who_do_not_wait() {
        let mut tenants = Tenants::default();
        (0..2 * MOST_TENANTS as u64).for_each(|n| {
            tenants.arrive(TenantId(n));
            if n > 0 {
                tenants.leave(TenantId(n));
            }
        });
        assert_eq!(tenants.tenants.len(), MOST_TENANTS);
        assert!(tenants.tenants.contains_key(&TenantId(0)));
    }
}
