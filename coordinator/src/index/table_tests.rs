//! The table against the standard library's map.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn value(number: u32) -> NonZeroU32 {
    NonZeroU32::new(number).unwrap()
}

/// Keys of one shard, whose homes are few and at both ends of it.
fn keys() -> impl Strategy<Value = u64> {
    let home = prop_oneof![0..4_u64, (u64::MAX >> 54) - 4..=u64::MAX >> 54];
    (home, 0..8_u64).prop_map(|(home, low)| home << 54 | low << 10)
}

fn all(table: &Table) -> BTreeMap<u64, NonZeroU32> {
    let (mut found, mut at) = (BTreeMap::new(), Position::default());
    loop {
        found.extend(table.entry(at));
        at = table.after(at);
        if at == Position::default() {
            return found;
        }
    }
}

proptest! {
    #[test]
    fn it_holds_what_a_map_holds(ops in proptest::collection::vec((keys(), 0..4_u32), 1..400)) {
        let (mut table, mut map) = (Table::new(100_000), BTreeMap::new());
        for (key, number) in ops {
            match (number, table.find(key)) {
                (0, Some(at)) => {
                    table.remove(at);
                    map.remove(&key);
                }
                (0, None) => prop_assert!(!map.contains_key(&key)),
                (number, Some(at)) => {
                    table.set(at, value(number));
                    map.insert(key, value(number));
                }
                (number, None) => {
                    table.insert(key, value(number)).unwrap();
                    prop_assert_eq!(map.insert(key, value(number)), None);
                }
            }
            prop_assert_eq!(table.len(), map.len());
            for low in 0..8 {
                let other = key & !(7 << 10) | low << 10;
                prop_assert_eq!(table.value(other), map.get(&other).copied());
            }
        }
        prop_assert_eq!(all(&table), map);
    }
}

#[test]
fn entries_that_come_and_go_take_no_more_memory() {
    let mut table = Table::new(100_000);
    let key = |number: u64| number.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    (0..50_000).for_each(|number| table.insert(key(number), value(1)).unwrap());
    let before = table.bytes();
    assert!(before < 50_000 * 20, "{before} bytes");
    for number in 50_000..1_000_000 {
        let oldest = table.find(key(number - 50_000)).unwrap();
        table.remove(oldest);
        table.insert(key(number), value(1)).unwrap();
    }
    assert_eq!(table.len(), 50_000);
    // A shard is as large as it was when it was fullest.
    assert!(table.bytes() < before * 3 / 2, "{before} bytes, then {}", table.bytes());
}

#[test]
fn a_full_table_takes_no_more_memory() {
    let mut table = Table::new(100_000);
    let key = |number: u64| number.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    let taken = (0..400_000).filter(|&number| table.insert(key(number), value(1)).is_ok()).count();
    assert!(taken == table.len() && taken > 120_000, "{taken}");
    assert!(table.bytes() < 100_000 * 21, "{}", table.bytes());
}
