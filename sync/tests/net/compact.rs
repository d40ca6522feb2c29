//! Logs that lose tombstones which not every member has seen.

use crate::device::{Device, observed, until};
use vfs_core::model::{FileId, FileType, Location, LocationId};

fn list(owner: &Device, location: &Location, names: std::ops::Range<u64>) {
    let listing = names.map(|n| observed(&format!("{n:05}.jpg"), 100 + n, n)).collect();
    owner.index.observe_directory(location.no, FileId::ROOT, listing).unwrap();
}

fn entries(device: &Device, id: LocationId) -> Option<u64> {
    device.index.location_by_id(id).map(|l| device.index.counts(l.no).entries)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_was_away_for_too_long_begins_anew() {
    let (desk, mut nas) = (Device::first("desk").await, Device::new().await);
    desk.pair(&nas, "nas").await;
    let location = desk.add_location("photos", None);
    let mut root = observed("root", 1, 0);
    root.attr.file_type = FileType::Directory;
    desk.index.observe_root(location.no, &root).unwrap();
    list(&desk, &location, 0..100);
    until("the NAS has it", || entries(&nas, location.id) == Some(100)).await;
    let number = nas.index.location_by_id(location.id).unwrap().no;
    nas.node.shutdown().await;

    // Of the first fifty nothing is left that could tell the NAS.
    list(&desk, &location, 50..120);
    let dropped = desk.index.compact(location.no, desk.index.head(location.no)).unwrap();
    assert_eq!(dropped, 50);
    nas.renew_node().await;
    until("the NAS has what there is", || entries(&nas, location.id) == Some(70)).await;
    let here = nas.index.location_by_id(location.id).unwrap();
    assert_ne!(here.no, number, "what it had was not brought up to date");
    for (name, is_there) in [("00049.jpg", false), ("00050.jpg", true), ("00119.jpg", true)] {
        let entry = nas.index.view().unwrap().entry(here.no, FileId::ROOT, name.as_bytes());
        assert_eq!(entry.unwrap().is_some(), is_there, "{name}");
    }

    // It goes on as ever, and from there on nothing is sent again.
    desk.index.compact(location.no, desk.index.head(location.no)).unwrap();
    list(&desk, &location, 60..130);
    until("its news is there", || {
        let head = desk.index.head(location.no);
        nas.index.head(here.no) == head && entries(&nas, location.id) == Some(70)
    })
    .await;
    assert_eq!(nas.index.location_by_id(location.id).unwrap().no, here.no);
}
