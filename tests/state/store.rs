//! The contract of a store, kept by every implementation, and what a folder adds to it.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use rewake::state::{Bounded, Bucket, Error, InMemory, Local, Put, Store, Tiered, is_state};
use tempfile::TempDir;

/// Every implementation, with what keeps it alive.
async fn stores() -> Vec<(Arc<dyn Store>, Option<TempDir>)> {
    let folder = tempfile::tempdir().unwrap();
    let local = Local::open(folder.path()).await.unwrap();
    let bucket = |prefix| Bucket::over(Arc::new(object_store::memory::InMemory::new()), prefix);
    let near = Bounded::new(InMemory::default(), 1 << 20);
    vec![
        (Arc::new(InMemory::default()), None),
        (Arc::new(local), Some(folder)),
        (Arc::new(bucket("")), None),
        (Arc::new(bucket("a/prefix")), None),
        (Arc::new(Tiered::new(near, Arc::new(bucket("")), is_state)), None),
    ]
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

#[tokio::test]
async fn an_object_is_written_once_and_read_until_it_is_deleted() {
    for (store, _folder) in stores().await {
        assert_eq!(store.get("t/a/x").await.unwrap(), None);
        assert_eq!(store.get_start("t/a/x", 3).await.unwrap(), None);
        assert!(!store.delete("t/a/x").await.unwrap());

        assert_eq!(store.put_if_absent("t/a/x", bytes("first")).await.unwrap(), Put::Created);
        assert_eq!(store.put_if_absent("t/a/x", bytes("second")).await.unwrap(), Put::Exists);
        assert_eq!(store.get("t/a/x").await.unwrap(), Some(bytes("first")));
        let start = store.get_start("t/a/x", 3).await.unwrap().unwrap();
        assert_eq!((start.bytes, start.size), (bytes("fir"), 5));
        let start = store.get_start("t/a/x", 99).await.unwrap().unwrap();
        assert_eq!((start.bytes, start.size), (bytes("first"), 5));

        assert_eq!(store.put_if_absent("t/a/empty", Bytes::new()).await.unwrap(), Put::Created);
        assert_eq!(store.get("t/a/empty").await.unwrap(), Some(Bytes::new()));
        assert_eq!(store.get_start("t/a/empty", 8).await.unwrap().unwrap().size, 0);

        assert!(store.delete("t/a/x").await.unwrap());
        assert!(!store.delete("t/a/x").await.unwrap());
        assert_eq!(store.get("t/a/x").await.unwrap(), None);
        assert_eq!(store.put_if_absent("t/a/x", bytes("third")).await.unwrap(), Put::Created);
    }
}

#[tokio::test]
async fn children_are_names_in_ascending_order_page_by_page() {
    for (store, _folder) in stores().await {
        for key in ["s/a-b/1", "s/a/1", "s/a/2", "s/B", "s/c", "s/a.b/x/y", "sa/other", "s/a:b"] {
            store.put_if_absent(key, bytes(key)).await.unwrap();
        }
        let all = ["B", "a", "a-b", "a.b", "a:b", "c"];
        assert_eq!(store.children("s", None, usize::MAX).await.unwrap(), all);
        assert_eq!(store.children("s", None, 2).await.unwrap(), all[..2]);
        assert_eq!(store.children("s", Some("a"), 2).await.unwrap(), all[2..4]);
        assert_eq!(store.children("s", Some("aa"), 9).await.unwrap(), all[5..]);
        assert_eq!(store.children("s", Some("c"), 9).await.unwrap(), [""; 0]);
        assert_eq!(store.children("s", None, 0).await.unwrap(), [""; 0]);
        assert_eq!(store.children("s/a", None, 9).await.unwrap(), ["1", "2"]);
        assert_eq!(store.children("nothing/here", None, 9).await.unwrap(), [""; 0]);
    }
}

#[tokio::test]
async fn every_id_is_a_name_of_its_own_that_stays_in_its_folder() {
    // Letter case is told apart only where the file system does.
    let names = [".", "..", "...", ":", "a:b", "-", "_", ".hidden", "a.", "CON", "Chat", "chat", "2E"];
    for (store, folder) in stores().await {
        for name in names {
            assert_eq!(
                store.put_if_absent(&format!("t/in/{name}/1"), bytes(name)).await.unwrap(),
                Put::Created,
                "{name}"
            );
        }
        for name in names {
            assert_eq!(store.get(&format!("t/in/{name}/1")).await.unwrap(), Some(bytes(name)), "{name}");
            assert_eq!(store.children(&format!("t/in/{name}"), None, 9).await.unwrap(), ["1"], "{name}");
        }
        let mut sorted = names;
        sorted.sort_unstable();
        assert_eq!(store.children("t/in", None, 99).await.unwrap(), sorted);
        assert_eq!(store.children("t", None, 99).await.unwrap(), ["in"], "nothing climbed out");
        if let Some(folder) = folder {
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
            assert_eq!(std::fs::read_dir(folder.path().join("t")).unwrap().count(), 1);
        }
    }
}

#[tokio::test]
async fn what_is_not_a_key_is_refused() {
    let long = "x".repeat(201);
    for (store, _folder) in stores().await {
        for key in ["", "/", "/a", "a/", "a//b", "a b", "a\\b", "a\0", "ü", "a#1", "a%2Eb", "~", "a/*", &long] {
            let refused = Error::Key(key.into());
            assert_eq!(store.put_if_absent(key, bytes("x")).await.unwrap_err(), refused);
            assert_eq!(store.get(key).await.unwrap_err(), refused);
            assert_eq!(store.get_start(key, 1).await.unwrap_err(), refused);
            assert_eq!(store.delete(key).await.unwrap_err(), refused);
            assert_eq!(store.children(key, None, 1).await.unwrap_err(), refused);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_puts_at_once_exactly_one_creates() {
    let folder = tempfile::tempdir().unwrap();
    // Two openings of one folder stand for two servers that share it.
    let (one, other) = (Local::open(folder.path()).await.unwrap(), Local::open(folder.path()).await.unwrap());
    let shared: [Arc<dyn Store>; 2] = [Arc::new(one), Arc::new(other)];
    let memory: Arc<dyn Store> = Arc::new(InMemory::default());
    let objects = Arc::new(object_store::memory::InMemory::new());
    let bucket = || -> Arc<dyn Store> { Arc::new(Bucket::over(objects.clone(), "p")) };
    for stores in [shared.as_slice(), &[memory], &[bucket(), bucket()]] {
        for round in 0..20 {
            let key = format!("race/{round}/x");
            let puts = (0..8).map(|n| {
                let (store, key) = (stores[n % stores.len()].clone(), key.clone());
                tokio::spawn(async move { (n, store.put_if_absent(&key, bytes(&n.to_string().repeat(1000))).await) })
            });
            let results = futures::future::join_all(puts).await;
            let created = results.into_iter().map(Result::unwrap).filter(|(_, put)| *put == Ok(Put::Created));
            let winners: Vec<usize> = created.map(|(n, _)| n).collect();
            assert_eq!(winners.len(), 1, "{winners:?}");
            let winner = bytes(&winners[0].to_string().repeat(1000));
            assert_eq!(stores[0].get(&key).await.unwrap(), Some(winner));
            assert_eq!(stores[0].children(&format!("race/{round}"), None, 9).await.unwrap(), ["x"]);
        }
    }
}

#[tokio::test]
async fn a_folder_holds_what_it_held_when_it_was_closed() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("made/for us");
    let store = Local::open(&folder).await.unwrap();
    store.put_if_absent("t/a/x", bytes("kept")).await.unwrap();
    drop(store);
    let store = Local::open(&folder).await.unwrap();
    assert_eq!(store.get("t/a/x").await.unwrap(), Some(bytes("kept")));
    assert_eq!(store.put_if_absent("t/a/x", bytes("other")).await.unwrap(), Put::Exists);
    let names: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["t"], "opening leaves nothing behind");
}

#[cfg(unix)]
#[tokio::test]
async fn a_new_folder_is_its_owners_alone_and_an_old_one_keeps_its_mode() {
    use std::os::unix::fs::PermissionsExt;
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let parent = tempfile::tempdir().unwrap();
    Local::open(parent.path().join("new")).await.unwrap();
    assert_eq!(mode(&parent.path().join("new")), 0o700);
    let old = parent.path().join("old");
    std::fs::create_dir(&old).unwrap();
    std::fs::set_permissions(&old, PermissionsExt::from_mode(0o750)).unwrap();
    Local::open(&old).await.unwrap();
    assert_eq!(mode(&old), 0o750);
}

#[tokio::test]
async fn a_folder_that_cannot_be_used_is_named_with_the_reason() {
    let parent = tempfile::tempdir().unwrap();
    let file = parent.path().join("a file");
    std::fs::write(&file, "in the way").unwrap();
    for unusable in [file.clone(), file.join("below")] {
        let Err(Error::Open { folder, cause }) = Local::open(&unusable).await else {
            panic!("{unusable:?} was opened")
        };
        assert_eq!(folder, unusable.display().to_string());
        assert!(["File exists", "Not a directory"].iter().any(|text| cause.contains(text)), "{cause}");
    }
}

#[tokio::test]
async fn what_a_killed_writer_left_behind_is_never_seen() {
    let folder = tempfile::tempdir().unwrap();
    let states = folder.path().join("t/a/states");
    std::fs::create_dir_all(&states).unwrap();
    // Killed while it wrote the first, the second time, and between linking the third and removing its staging file.
    std::fs::write(states.join("one#1"), "hal").unwrap();
    std::fs::write(states.join("two#1"), "").unwrap();
    std::fs::write(states.join("two#2"), "ha").unwrap();
    std::fs::write(states.join("three#1"), "whole").unwrap();
    std::fs::hard_link(states.join("three#1"), states.join("three")).unwrap();
    std::fs::write(states.join("a stranger's file"), "").unwrap();

    let store = Local::open(folder.path()).await.unwrap();
    assert_eq!(store.children("t/a/states", None, 9).await.unwrap(), ["three"]);
    assert_eq!(store.get("t/a/states/one").await.unwrap(), None);
    assert_eq!(store.put_if_absent("t/a/states/one", bytes("whole one")).await.unwrap(), Put::Created);
    assert_eq!(store.put_if_absent("t/a/states/two", bytes("whole two")).await.unwrap(), Put::Created);
    assert_eq!(store.put_if_absent("t/a/states/three", bytes("other")).await.unwrap(), Put::Exists);
    assert_eq!(store.get("t/a/states/one").await.unwrap(), Some(bytes("whole one")));
    assert_eq!(store.get("t/a/states/three").await.unwrap(), Some(bytes("whole")));
    assert_eq!(store.children("t/a/states", None, 9).await.unwrap(), ["one", "three", "two"]);
}

#[tokio::test]
async fn folders_that_somebody_removed_are_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let store = Local::open(folder.path()).await.unwrap();
    store.put_if_absent("t/a/x", bytes("x")).await.unwrap();
    std::fs::remove_dir_all(folder.path().join("t")).unwrap();
    assert_eq!(store.put_if_absent("t/a/x", bytes("again")).await.unwrap(), Put::Created);
    assert_eq!(store.get("t/a/x").await.unwrap(), Some(bytes("again")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn puts_into_folders_that_are_just_being_made_all_arrive() {
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(Local::open(folder.path()).await.unwrap());
    let puts = (0..32).map(|n| {
        let store = store.clone();
        tokio::spawn(async move { store.put_if_absent(&format!("t/new/deep/{n}"), bytes("x")).await })
    });
    for put in futures::future::join_all(puts).await {
        assert_eq!(put.unwrap().unwrap(), Put::Created);
    }
    let names: HashSet<String> = store.children("t/new/deep", None, 99).await.unwrap().into_iter().collect();
    assert_eq!(names, (0..32).map(|n| n.to_string()).collect());
}
