//! States by name: kept whole, found by their owner, gone when they expire.

use std::sync::Arc;

use rewake::state::{Archive, Error, InMemory, Local, Put, Store, Wanted, encode};
use rewake::types::{SegmentData, StateId};

use super::support::store::{Corrupting, Failing, Op, Recording, Torn};
use super::{id, made_by, session, snapshot, tenant, turn};

fn in_memory() -> (Arc<InMemory>, Archive) {
    let store = Arc::new(InMemory::default());
    (store.clone(), Archive::new(store))
}

fn wanted(limit: usize) -> Wanted {
    Wanted { limit, ..Wanted::default() }
}

/// The ids of a page, and whether more follows.
async fn page(archive: &Archive, wanted: &Wanted, now: u64) -> (Vec<StateId>, bool) {
    let listed = archive.list(&tenant("a"), wanted, now).await.unwrap();
    (listed.data.into_iter().map(|info| info.head.id).collect(), listed.has_more)
}

#[tokio::test]
async fn a_kept_snapshot_comes_back_after_the_folder_was_closed() {
    let folder = tempfile::tempdir().unwrap();
    let a = tenant("a");
    let archive = Archive::new(Arc::new(Local::open(folder.path()).await.unwrap()));
    assert_eq!(archive.keep(Arc::new(snapshot(1))).await.unwrap(), 20);
    drop(archive);
    let archive = Archive::new(Arc::new(Local::open(folder.path()).await.unwrap()));
    let back = archive.load(&a, &id(1), 0).await.unwrap().unwrap();
    assert_eq!(back, snapshot(1));
    assert!(back.memory.segments[0].data[1].is_sign_negative(), "-0.0 stays -0.0");
    let info = archive.info(&a, &id(1), 0).await.unwrap().unwrap();
    assert_eq!((info.head, info.tokens, info.bytes), (snapshot(1).head, 42, 20));
    let file = std::fs::read(folder.path().join(format!("t/a/states/{}", id(1)))).unwrap();
    assert_eq!(file, encode(&snapshot(1)).unwrap(), "the stored file is the export");

    assert!(archive.remove(&a, &id(1)).await.unwrap());
    assert!(!archive.remove(&a, &id(1)).await.unwrap());
    assert_eq!(archive.load(&a, &id(1), 0).await.unwrap(), None);
    assert_eq!(archive.info(&a, &id(1), 0).await.unwrap(), None);
}

#[tokio::test]
async fn an_id_names_one_snapshot_for_ever() {
    let (_, archive) = in_memory();
    archive.keep(Arc::new(snapshot(1))).await.unwrap();
    archive.keep(Arc::new(snapshot(1))).await.expect("keeping the same again is a repeated call");
    let mut other = snapshot(1);
    other.memory.consumed += 1;
    assert!(matches!(archive.keep(Arc::new(other)).await, Err(Error::Taken { .. })));
    assert_eq!(archive.load(&tenant("a"), &id(1), 0).await.unwrap(), Some(snapshot(1)));
}

#[tokio::test]
async fn a_state_that_is_not_finite_is_refused_and_leaves_nothing() {
    let (store, archive) = in_memory();
    let mut bad = snapshot(1);
    bad.memory.segments[0].data[0] = f32::NAN;
    let error = archive.keep(Arc::new(bad)).await.unwrap_err();
    assert!(
        error.to_string().ends_with("cannot be stored: segment `z.first` is not finite: value 0 is NaN"),
        "{error}"
    );
    assert_eq!(store.children("t", None, 9).await.unwrap(), [""; 0]);
}

#[tokio::test]
async fn metadata_longer_than_the_first_read_is_read_whole() {
    let (_, archive) = in_memory();
    let mut big = snapshot(1);
    big.memory.segments = (0..2000)
        .map(|i| SegmentData {
            name: format!("blocks.{i}.att.some_rather_long_name"),
            shape: vec![1],
            data: vec![i as f32],
        })
        .collect();
    assert!(encode(&big).unwrap().len() > 1 << 17);
    archive.keep(Arc::new(big.clone())).await.unwrap();
    assert_eq!(archive.info(&tenant("a"), &id(1), 0).await.unwrap().unwrap().bytes, 8000);
    assert_eq!(archive.load(&tenant("a"), &id(1), 0).await.unwrap(), Some(big));
}

#[tokio::test]
async fn expired_states_are_not_found_and_a_listing_removes_them() {
    let (store, archive) = in_memory();
    let a = tenant("a");
    for (n, expires_at) in [(1, Some(50)), (2, None), (3, Some(51))] {
        let mut snapshot = snapshot(n);
        snapshot.head.expires_at = expires_at;
        archive.keep(Arc::new(snapshot)).await.unwrap();
    }
    assert!(archive.load(&a, &id(1), 49).await.unwrap().is_some());
    assert_eq!(archive.load(&a, &id(1), 50).await.unwrap(), None);
    assert_eq!(archive.info(&a, &id(1), 50).await.unwrap(), None);
    assert_eq!(page(&archive, &wanted(9), 49).await, (vec![id(1), id(2), id(3)], false));
    assert_eq!(page(&archive, &wanted(9), 50).await, (vec![id(2), id(3)], false));
    assert_eq!(store.children("t/a/states", None, 9).await.unwrap(), [id(2).to_string(), id(3).to_string()]);
}

#[tokio::test]
async fn listings_page_by_time_and_can_be_of_one_session() {
    let (store, archive) = in_memory();
    for n in [5, 1, 4, 2, 3] {
        let snapshot = if n % 2 == 0 { made_by(n, &session("even")) } else { snapshot(n) };
        archive.keep(Arc::new(snapshot)).await.unwrap();
    }
    store.put_if_absent("t/a/states/a-stranger", Default::default()).await.unwrap();
    store.put_if_absent("t/a/states/zzz", Default::default()).await.unwrap();

    assert_eq!(page(&archive, &wanted(2), 0).await, (vec![id(1), id(2)], true));
    let after = |n| Wanted { after: Some(id(n)), limit: 2, ..Wanted::default() };
    assert_eq!(page(&archive, &after(2), 0).await, (vec![id(3), id(4)], true));
    assert_eq!(page(&archive, &after(3), 0).await, (vec![id(4), id(5)], false));
    assert_eq!(page(&archive, &after(5), 0).await, (vec![], false));
    assert!(!page(&archive, &wanted(5), 0).await.1);
    assert_eq!(page(&archive, &wanted(0), 0).await, (vec![], true));

    let even = |limit, after| Wanted { session: Some(session("even")), after, limit };
    assert_eq!(page(&archive, &even(1, None), 0).await, (vec![id(2)], true));
    assert_eq!(page(&archive, &even(1, Some(id(2))), 0).await, (vec![id(4)], false));
    assert_eq!(page(&archive, &even(9, None), 0).await, (vec![id(2), id(4)], false));
}

#[tokio::test]
async fn no_flipped_bit_of_a_stored_state_goes_unnoticed() {
    let store = Arc::new(Corrupting::new(InMemory::default()));
    let archive = Archive::new(store.clone());
    archive.keep(Arc::new(snapshot(1))).await.unwrap();
    let bits = encode(&snapshot(1)).unwrap().len() * 8;
    for bit in 0..bits {
        store.flip(bit);
        let error = archive.load(&tenant("a"), &id(1), 0).await.unwrap_err();
        assert!(
            matches!(&error, Error::Damaged { key, .. } if *key == format!("t/a/states/{}", id(1))),
            "{bit}: {error}"
        );
    }
    // A broken header is damage to those who read only that, too.
    store.flip(0);
    assert!(matches!(archive.info(&tenant("a"), &id(1), 0).await, Err(Error::Damaged { .. })));
    assert_eq!(page(&archive, &wanted(9), 0).await, (vec![], false));
    store.flip(bits);
    assert!(archive.load(&tenant("a"), &id(1), 0).await.unwrap().is_some());
}

#[tokio::test]
async fn on_a_store_that_tears_writes_the_damage_is_found_and_can_be_removed() {
    let archive = Archive::new(Arc::new(Torn::new(InMemory::default())));
    let (a, s) = (tenant("a"), session("s"));
    let error = archive.keep(Arc::new(snapshot(1))).await.unwrap_err();
    assert!(error.to_string().ends_with("the power went out"), "{error}");
    assert!(matches!(archive.load(&a, &id(1), 0).await, Err(Error::Damaged { .. })));
    assert!(matches!(archive.info(&a, &id(1), 0).await, Err(Error::Damaged { .. })));
    assert_eq!(page(&archive, &wanted(9), 0).await, (vec![], false));
    assert!(archive.remove(&a, &id(1)).await.unwrap());

    let head = archive.head(&a, &s).await.unwrap();
    archive.commit(&a, &s, &head, &turn(1)).await.unwrap_err();
    let error = archive.head(&a, &s).await.unwrap_err();
    assert!(error.to_string().starts_with("t/a/sessions/s/000000000001 is damaged"), "{error}");
    assert_eq!(archive.sessions(&a, None, 9).await.unwrap().data, []);
}

#[tokio::test]
async fn a_full_disk_is_an_error_that_says_so_and_the_next_try_works() {
    let store = Arc::new(Failing::new(InMemory::default()));
    let archive = Archive::new(store.clone());
    let (a, s) = (tenant("a"), session("s"));
    let error = archive.keep(Arc::new(snapshot(1))).await.unwrap_err().to_string();
    assert!(error.contains("No space left on device"), "{error}");
    assert_eq!(archive.load(&a, &id(1), 0).await.unwrap(), None);
    let head = archive.head(&a, &s).await.unwrap();
    let error = archive.commit(&a, &s, &head, &turn(1)).await.unwrap_err().to_string();
    assert!(error.contains("No space left on device"), "{error}");
    assert_eq!(archive.head(&a, &s).await.unwrap(), head);

    store.fail(false);
    archive.keep(Arc::new(snapshot(1))).await.unwrap();
    assert!(archive.load(&a, &id(1), 0).await.unwrap().is_some());
}

#[tokio::test]
async fn a_state_is_durable_before_the_record_that_names_it() {
    let store = Arc::new(Recording::new(InMemory::default()));
    let archive = Archive::new(store.clone());
    let (a, s) = (tenant("a"), session("s"));
    let head = archive.head(&a, &s).await.unwrap();
    archive.keep(Arc::new(made_by(1, &s))).await.unwrap();
    archive.commit(&a, &s, &head, &turn(1)).await.unwrap();
    let (state, record) = (format!("t/a/states/{}", id(1)), "t/a/sessions/s/000000000001".to_string());
    let puts: Vec<Op> = store.log().into_iter().filter(|op| matches!(op, Op::PutBegun(_) | Op::PutDone(..))).collect();
    assert_eq!(
        puts,
        [
            Op::PutBegun(state.clone()),
            Op::PutDone(state, Put::Created),
            Op::PutBegun(record.clone()),
            Op::PutDone(record, Put::Created),
        ]
    );
}

#[tokio::test]
async fn one_tenants_calls_never_touch_anothers_keys() {
    let store = Arc::new(Recording::new(InMemory::default()));
    let archive = Archive::new(store.clone());
    let (a, b, s) = (tenant("a"), tenant("b"), session("s"));
    let begin = archive.head(&a, &s).await.unwrap();
    archive.keep(Arc::new(made_by(1, &s))).await.unwrap();
    archive.commit(&a, &s, &begin, &turn(1)).await.unwrap();

    store.forget();
    assert_eq!(archive.load(&b, &id(1), 0).await.unwrap(), None);
    assert_eq!(archive.info(&b, &id(1), 0).await.unwrap(), None);
    assert!(!archive.remove(&b, &id(1)).await.unwrap());
    assert_eq!(archive.list(&b, &wanted(9), 0).await.unwrap().data, []);
    assert_eq!(archive.head(&b, &s).await.unwrap().last, 0);
    assert_eq!(archive.turns(&b, &s, 0, 9).await.unwrap(), None);
    assert_eq!(archive.sessions(&b, None, 9).await.unwrap().data, []);
    assert!(!archive.delete(&b, &s, 0).await.unwrap());
    let mut same_id = made_by(1, &s);
    same_id.head.owner = b.clone();
    archive.keep(Arc::new(same_id)).await.unwrap();
    archive.commit(&b, &s, &archive.head(&b, &s).await.unwrap(), &turn(1)).await.unwrap();
    assert!(archive.delete(&b, &s, 0).await.unwrap());
    for op in store.log() {
        assert!(op.key().starts_with("t/b/"), "{op:?}");
    }
    assert!(archive.load(&a, &id(1), 0).await.unwrap().is_some());
    assert_eq!(archive.head(&a, &s).await.unwrap().last, 1);
}

#[tokio::test]
async fn a_file_copied_under_another_name_or_tenant_is_damage() {
    let (store, archive) = in_memory();
    let file = encode(&snapshot(1)).unwrap();
    for key in [format!("t/b/states/{}", id(1)), format!("t/a/states/{}", id(2))] {
        store.put_if_absent(&key, file.clone().into()).await.unwrap();
    }
    for (owner, id) in [(tenant("b"), id(1)), (tenant("a"), id(2))] {
        assert!(matches!(archive.load(&owner, &id, 0).await, Err(Error::Damaged { .. })));
        assert!(matches!(archive.info(&owner, &id, 0).await, Err(Error::Damaged { .. })));
    }
}
