//! How many connections there may be, and how many of one client's.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// Places for connections. One address may have half of them, so that it takes two to fill the
/// room; behind a proxy, half is enough. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Room(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    most: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_address: HashMap<IpAddr, usize>,
}

/// A place in the room, until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    room: Room,
    address: IpAddr,
}

impl Room {
    pub(crate) fn new(most: usize) -> Self {
        Self(Arc::new(Inner { most, taken: Mutex::default() }))
    }

    /// A place for a connection from `address`, if there is one.
    pub(crate) fn enter(&self, address: IpAddr) -> Option<Place> {
        let address = one_client(address);
        let mut taken = self.0.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.by_address.get(&address).copied().unwrap_or(0);
        if taken.all >= self.0.most || own >= self.0.most.div_ceil(2) {
            return None;
        }
        taken.all += 1;
        taken.by_address.insert(address, own + 1);
        Some(Place { room: self.clone(), address })
    }
}

/// What counts as one address: of IPv6, a network of 64 bits, as every client has all of its addresses.
fn one_client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
        v4 => v4,
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.room.0.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all -= 1;
        if let Some(own) = taken.by_address.get_mut(&self.address) {
            *own -= 1;
            if *own == 0 {
                taken.by_address.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_half_of_the_room() {
        let room = Room::new(4);
        let [a, b, c] = [1, 2, 3].map(|last| IpAddr::from([10, 0, 0, last]));
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().unwrap();
        let mut places: Vec<_> = [a, mapped].map(|address| room.enter(address).unwrap()).into();
        assert!(room.enter(a).is_none());
        places.extend([b, b].map(|address| room.enter(address).unwrap()));
        assert!(room.enter(c).is_none(), "it is full");
        places.remove(0);
        assert!(room.enter(c).is_some());
        drop(places);
        let taken = room.0.taken.lock().unwrap();
        assert_eq!((taken.all, taken.by_address.len()), (0, 0));
    }

    #[test]
    fn a_network_of_ipv6_is_one_address() {
        let room = Room::new(4);
        let [a, b, other]: [IpAddr; 3] = ["2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:1::1"]
            .map(|text| text.parse().unwrap());
        let places: Vec<_> = [a, b].map(|address| room.enter(address).unwrap()).into();
        assert!(room.enter(a).is_none() && room.enter(b).is_none());
        assert!(room.enter(other).is_some());
        drop(places);
        assert!(room.enter(b).is_some());
    }
}
