//! Which devices of two nodes talk to each other, and what they join by.
//!
//! The heads of a cache are shared equally and in order among a node's devices. For each pair of
//! devices, one of each end, that have heads in common there is a lane, a communicator of its own; a
//! lane carries these heads of every piece. So each byte goes straight from the device that has it to
//! the one that needs it, whatever the numbers of devices. Lanes are in the order of their heads, at
//! both ends.

use baton_kernels::cuda::{PieceShare, UniqueId};

use super::ChannelName;
use crate::staging::MAX_DEVICES;

/// One end of the connection of two devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lane {
    /// Which of this node's devices.
    pub(super) device: usize,
    /// The heads that it carries.
    pub(super) share: PieceShare,
}

/// The lanes of a node whose devices have `own` shares, to one with so many devices, or why those
/// cannot share the heads.
pub(super) fn lanes(own: &[PieceShare], devices: usize) -> Result<Vec<Lane>, String> {
    let kv_heads = own.first().map_or(0, |share| share.kv_heads);
    let counts = 1..=MAX_DEVICES;
    let can_share = counts.contains(&devices) && kv_heads.is_multiple_of(devices);
    if !can_share || !counts.contains(&own.len()) {
        let own = own.len();
        return Err(format!("{own} and {devices} devices cannot both share {kv_heads} heads"));
    }
    let heads = kv_heads / devices;
    let lanes = own.iter().enumerate().flat_map(|(device, share)| {
        let theirs =
            (0..devices).map(move |n| PieceShare { first_head: n * heads, heads, ..*share });
        theirs.filter_map(move |theirs| Some(Lane { device, share: share.common(&theirs)? }))
    });
    Ok(lanes.collect())
}

/// The lanes of a channel, and what each is named. The end that receives has made the name; to the other
/// one it may be anything.
pub(super) fn accept(
    own: &[PieceShare],
    name: &[u8],
    receives: bool,
) -> Result<(Vec<Lane>, Vec<UniqueId>), String> {
    let Invitation { devices, names } = Invitation::parse(name).ok_or("its name is none")?;
    let [receiving, sending] = devices;
    let (here, there) = if receives { (receiving, sending) } else { (sending, receiving) };
    let lanes = lanes(own, there)?;
    if here != own.len() || lanes.len() != names.len() {
        return Err(format!("it is for {here} devices here, and {} lanes", names.len()));
    }
    Ok((lanes, names))
}

/// What both ends join by.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Invitation {
    /// Devices of the end that receives, and of the one that sends.
    pub(super) devices: [usize; 2],
    /// One for each lane.
    pub(super) names: Vec<UniqueId>,
}

impl Invitation {
    pub(super) fn encode(&self) -> ChannelName {
        let devices = self.devices.map(|count| u8::try_from(count).expect("at most MAX_DEVICES"));
        [&devices[..], self.names.as_flattened()].concat()
    }

    /// `None` if it is none; what it says was said by a peer.
    pub(super) fn parse(name: &[u8]) -> Option<Self> {
        let (devices, names) = name.split_first_chunk::<2>()?;
        let (names, []) = names.as_chunks() else { return None };
        Some(Self { devices: devices.map(usize::from), names: names.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(kv_heads: usize, devices: usize) -> Vec<PieceShare> {
        let heads = kv_heads / devices;
        let share = |n| PieceShare { kv_heads, first_head: n * heads, heads, head_bytes: 16 };
        (0..devices).map(share).collect()
    }

    #[test]
    fn every_head_has_one_lane_and_both_ends_name_them_in_one_order() {
        for (kv_heads, here, there) in [(8, 1, 1), (8, 1, 8), (8, 4, 2), (8, 8, 8), (6, 2, 3)] {
            let own = lanes(&shares(kv_heads, here), there).unwrap();
            let theirs = lanes(&shares(kv_heads, there), here).unwrap();
            let carried = |lanes: &[Lane]| -> Vec<_> {
                lanes.iter().map(|lane| (lane.share.first_head, lane.share.heads)).collect()
            };
            assert_eq!(carried(&own), carried(&theirs));
            let heads = own
                .iter()
                .flat_map(|Lane { share, .. }| share.first_head..share.first_head + share.heads);
            assert!(heads.eq(0..kv_heads), "{here} and {there} devices: {own:?}");
            for lane in own {
                let own = shares(kv_heads, here)[lane.device];
                assert_eq!(own.common(&lane.share), Some(lane.share));
            }
        }
    }

    #[test]
    fn heads_that_cannot_be_shared_equally_have_no_lanes() {
        for devices in [0, 3, 16, 17, 255] {
            let error = lanes(&shares(8, 2), devices).unwrap_err();
            assert_eq!(error, format!("2 and {devices} devices cannot both share 8 heads"));
        }
        assert_eq!(lanes(&[], 1).unwrap_err(), "0 and 1 devices cannot both share 0 heads");
    }

    /// What a peer says is compared with what there is here.
    #[test]
    fn names_for_others_are_refused() {
        let name = |devices, names| Invitation { devices, names: vec![[7; 128]; names] }.encode();
        let refused = |devices, names| accept(&shares(8, 2), &name(devices, names), false).err();
        assert_eq!(refused([4, 2], 4), None);
        assert_eq!(accept(&shares(8, 2), &name([2, 4], 4), true).map(|(own, _)| own.len()), Ok(4));
        for (devices, names, reason) in [
            ([4, 2], 3, "it is for 2 devices here, and 3 lanes"),
            ([4, 2], 5, "it is for 2 devices here, and 5 lanes"),
            ([4, 1], 4, "it is for 1 devices here, and 4 lanes"),
            ([2, 4], 4, "it is for 4 devices here, and 4 lanes"),
            ([3, 2], 4, "2 and 3 devices cannot both share 8 heads"),
            ([0, 2], 0, "2 and 0 devices cannot both share 8 heads"),
        ] {
            assert_eq!(refused(devices, names).as_deref(), Some(reason));
        }
        let broken = accept(&shares(8, 2), &name([4, 2], 4)[1..], false).err();
        assert_eq!(broken.as_deref(), Some("its name is none"));
    }

    #[test]
    fn invitations_come_back() {
        let invitation = Invitation { devices: [2, 16], names: vec![[7; 128], [9; 128]] };
        let bytes = invitation.encode();
        assert_eq!(Invitation::parse(&bytes), Some(invitation));
        for broken in [&bytes[..1], &bytes[1..], &bytes[..100], &[]] {
            assert_eq!(Invitation::parse(broken), None, "{} bytes", broken.len());
        }
    }
}
