//! Sessions: one head, one winner of every race, and nothing left of what was deleted.

use std::sync::Arc;

use rewake::state::{Archive, At, Bounded, Commit, Error, Forking, InMemory, Local, Store, Tiered, is_state};
use rewake::types::{SessionId, TurnRecord};

use super::support::store::{Failing, Op, Recording};
use super::{id, made_by, session, snapshot, tenant, turn};

/// When every deletion of these tests is long ago.
const LATER: u64 = 1_000_000;

/// Begins `to` at a turn of `from`.
async fn fork_at(archive: &Archive, from: &SessionId, number: u64, to: &SessionId) -> Commit {
    let a = tenant("a");
    let head = archive.head(&a, from).await.unwrap().live.unwrap();
    let turn = archive.turn(&a, from, &head, &At::Number(number)).await.unwrap().unwrap();
    let forking = Forking { from, head: &head, turn: &turn, to };
    archive.fork(&a, forking, 150).await.unwrap()
}

fn in_memory() -> (Arc<InMemory>, Archive) {
    let store = Arc::new(InMemory::default());
    (store.clone(), Archive::new(store))
}

/// Commits `record` on top of the present head, its state (made by the session) kept first; the turn's number.
async fn run(archive: &Archive, session: &SessionId, record: &TurnRecord) -> u64 {
    let head = archive.head(&tenant("a"), session).await.unwrap();
    let mut state = made_by(0, session);
    state.head.id = record.state.clone().unwrap();
    archive.keep(Arc::new(state)).await.unwrap();
    assert_eq!(archive.commit(&tenant("a"), session, &head, record).await.unwrap(), Commit::Committed);
    head.next()
}

/// Which of the states 0 to 9 exist.
async fn states(archive: &Archive) -> Vec<u64> {
    let mut there = Vec::new();
    for n in 0..10 {
        if archive.load(&tenant("a"), &id(n), 0).await.unwrap().is_some() {
            there.push(n);
        }
    }
    there
}

/// The numbers and seeds (which tell the turns of a test apart) of a session's turns.
async fn turns(archive: &Archive, session: &SessionId, after: u64, limit: usize) -> (Vec<(u64, u64)>, bool) {
    let listed = archive.turns(&tenant("a"), session, after, limit).await.unwrap().unwrap();
    (listed.data.iter().map(|e| (e.turn, e.record.seed)).collect(), listed.has_more)
}

#[tokio::test]
async fn turns_follow_one_another_and_survive_closing() {
    let folder = tempfile::tempdir().unwrap();
    let (a, s) = (tenant("a"), session("s"));
    let archive = Archive::new(Arc::new(Local::open(folder.path()).await.unwrap()));
    let head = archive.head(&a, &s).await.unwrap();
    assert_eq!((head.next(), head.live), (1, None));
    assert_eq!(archive.turns(&a, &s, 0, 9).await.unwrap(), None);
    for n in 1..=5 {
        assert_eq!(run(&archive, &s, &turn(n)).await, n);
    }
    drop(archive);
    let archive = Archive::new(Arc::new(Local::open(folder.path()).await.unwrap()));
    let head = archive.head(&a, &s).await.unwrap();
    let entry = head.live.clone().unwrap();
    assert_eq!((head.next(), entry.turn, entry.first, entry.began), (6, 5, 1, 101));
    assert_eq!(entry.record, turn(5));
    assert_eq!(turns(&archive, &s, 0, 2).await, (vec![(1, 1), (2, 2)], true));
    assert_eq!(turns(&archive, &s, 2, 3).await, (vec![(3, 3), (4, 4), (5, 5)], false));
    assert_eq!(turns(&archive, &s, 5, 3).await, (vec![], false));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_turns_on_one_head_one_is_committed() {
    let folder = tempfile::tempdir().unwrap();
    let archive = Archive::new(Arc::new(Local::open(folder.path()).await.unwrap()));
    let (a, s) = (tenant("a"), session("s"));
    for round in 1..=10 {
        let head = archive.head(&a, &s).await.unwrap();
        assert_eq!(head.next(), round);
        let racers = (0..4).map(|n| {
            let (archive, a, s, head) = (archive.clone(), a.clone(), s.clone(), head.clone());
            tokio::spawn(async move { (n, archive.commit(&a, &s, &head, &turn(n)).await.unwrap()) })
        });
        let results = futures::future::join_all(racers).await.into_iter().map(Result::unwrap);
        let won: Vec<u64> = results.filter(|(_, c)| *c == Commit::Committed).map(|(n, _)| n).collect();
        assert_eq!(won.len(), 1);
        assert_eq!(archive.head(&a, &s).await.unwrap().live.unwrap().record.seed, won[0]);
    }
}

#[tokio::test]
async fn a_record_without_a_state_is_not_a_turn() {
    let (_, archive) = in_memory();
    let (a, s) = (tenant("a"), session("s"));
    let head = archive.head(&a, &s).await.unwrap();
    let stateless = TurnRecord { state: None, ..turn(1) };
    assert!(matches!(archive.commit(&a, &s, &head, &stateless).await, Err(Error::Unfit { .. })));
    assert_eq!(archive.head(&a, &s).await.unwrap(), head);
}

#[tokio::test]
async fn a_deleted_session_is_gone_with_its_states_and_its_name_can_begin_again() {
    let (store, archive) = in_memory();
    let (a, s) = (tenant("a"), session("s"));
    assert!(!archive.delete(&a, &s, 200).await.unwrap());
    run(&archive, &s, &turn(1)).await;
    run(&archive, &s, &turn(2)).await;
    let before = archive.head(&a, &s).await.unwrap();
    assert!(archive.delete(&a, &s, 200).await.unwrap());
    assert!(!archive.delete(&a, &s, 201).await.unwrap());

    assert_eq!(states(&archive).await, [0; 0]);
    assert_eq!(archive.turns(&a, &s, 0, 9).await.unwrap(), None);
    assert_eq!(archive.sessions(&a, None, 9).await.unwrap().data, []);
    let head = archive.head(&a, &s).await.unwrap();
    assert_eq!((head.next(), &head.live), (4, &None));
    assert_eq!(archive.commit(&a, &s, &before, &turn(3)).await.unwrap(), Commit::Taken, "a turn that was running");
    // The records stay as long as a turn may be running that began before.
    assert_eq!(store.children("t/a/sessions/s", None, 9).await.unwrap().len(), 3);
    archive.reclaim(&a, &s, LATER).await.unwrap();
    assert_eq!(store.children("t/a/sessions/s", None, 9).await.unwrap(), ["000000000003"], "only the tombstone stays");

    assert_eq!(run(&archive, &s, &turn(7)).await, 4);
    assert_eq!(run(&archive, &s, &turn(8)).await, 5);
    let entry = archive.head(&a, &s).await.unwrap().live.unwrap();
    assert_eq!((entry.first, entry.began), (4, 107));
    assert_eq!(turns(&archive, &s, 0, 9).await, (vec![(4, 7), (5, 8)], false));
    assert_eq!(turns(&archive, &s, 0, 1).await, (vec![(4, 7)], true));

    // Sweeping again finds nothing of the new life.
    archive.reclaim(&a, &s, 200).await.unwrap();
    assert_eq!(states(&archive).await, [7, 8]);
    assert!(archive.delete(&a, &s, 300).await.unwrap());
    assert_eq!(states(&archive).await, [0; 0]);
    archive.reclaim(&a, &s, LATER).await.unwrap();
    assert_eq!(store.children("t/a/sessions/s", None, 9).await.unwrap(), ["000000000006"]);
}

#[tokio::test]
async fn the_tombstone_is_durable_before_anything_is_removed() {
    let store = Arc::new(Recording::new(InMemory::default()));
    let archive = Archive::new(store.clone());
    let (a, s) = (tenant("a"), session("s"));
    run(&archive, &s, &turn(1)).await;
    store.forget();
    archive.delete(&a, &s, 200).await.unwrap();
    let changes: Vec<Op> =
        store.log().into_iter().filter(|op| matches!(op, Op::PutDone(..) | Op::Deleted(_))).collect();
    let keys: Vec<&str> = changes.iter().map(Op::key).collect();
    let state = format!("t/a/states/{}", id(1));
    assert_eq!(keys, ["t/a/sessions/s/000000000002", &state]);
}

#[tokio::test]
async fn an_interrupted_deletion_hides_and_can_be_finished() {
    let store = Arc::new(Failing::new(InMemory::default()));
    store.fail(false);
    let archive = Archive::new(store.clone());
    let (a, s) = (tenant("a"), session("s"));
    run(&archive, &s, &turn(1)).await;
    assert!(archive.bury(&a, &s, 200).await.unwrap());
    store.fail(true);
    assert!(archive.reclaim(&a, &s, 200).await.is_err());
    assert_eq!(archive.head(&a, &s).await.unwrap().live, None);
    assert_eq!(states(&archive).await, [1]);
    store.fail(false);
    assert!(!archive.delete(&a, &s, 300).await.unwrap());
    assert_eq!(states(&archive).await, [0; 0]);
}

#[tokio::test]
async fn states_that_others_need_outlive_the_session() {
    let (_, archive) = in_memory();
    let (a, s, fork) = (tenant("a"), session("s"), session("fork"));
    // A free-standing state that the session took as its first, then two turns of its own.
    archive.keep(Arc::new(snapshot(1))).await.unwrap();
    archive.commit(&a, &s, &archive.head(&a, &s).await.unwrap(), &turn(1)).await.unwrap();
    run(&archive, &s, &turn(2)).await;
    run(&archive, &s, &turn(3)).await;
    // A fork at turn 2 goes on by itself; a rewind names state 2 again.
    assert_eq!(fork_at(&archive, &s, 2, &fork).await, Commit::Committed);
    run(&archive, &fork, &turn(5)).await;
    let head = archive.head(&a, &s).await.unwrap();
    let back = archive.turn(&a, &s, head.live.as_ref().unwrap(), &At::Number(2)).await.unwrap().unwrap();
    assert_eq!(archive.commit_entry(&a, &s, &head.back(&back, 150)).await.unwrap(), Commit::Committed);
    assert_eq!(turns(&archive, &s, 0, 9).await, (vec![(1, 1), (4, 2)], false));

    for now in [200, LATER] {
        archive.delete(&a, &s, now).await.unwrap();
        assert_eq!(states(&archive).await, [1, 2, 5]);
        assert_eq!(turns(&archive, &fork, 0, 9).await, (vec![(1, 1), (1, 2), (2, 5)], false));
    }
    assert!(archive.delete(&a, &fork, 200).await.unwrap());
    assert_eq!(states(&archive).await, [1], "the last session that named state 2 took it along");
}

#[tokio::test]
async fn a_damaged_session_can_be_deleted() {
    let (store, archive) = in_memory();
    let (a, s) = (tenant("a"), session("s"));
    run(&archive, &s, &turn(1)).await;
    store.put_if_absent("t/a/sessions/s/000000000002", "not a record".into()).await.unwrap();
    let Err(Error::Damaged { key, .. }) = archive.head(&a, &s).await else { panic!("damage went unnoticed") };
    assert_eq!(key, "t/a/sessions/s/000000000002");
    assert!(archive.delete(&a, &s, 200).await.unwrap());
    assert_eq!(archive.head(&a, &s).await.unwrap().next(), 4);
    assert_eq!(states(&archive).await, [0; 0]);
    archive.reclaim(&a, &s, LATER).await.unwrap();
    assert_eq!(store.children("t/a/sessions/s", None, 9).await.unwrap(), ["000000000003"]);
}

#[tokio::test]
async fn a_record_moved_to_another_number_is_damage() {
    let (store, archive) = in_memory();
    let (a, s) = (tenant("a"), session("s"));
    run(&archive, &s, &turn(1)).await;
    let record = store.get("t/a/sessions/s/000000000001").await.unwrap().unwrap();
    store.put_if_absent("t/a/sessions/s/000000000002", record).await.unwrap();
    assert!(matches!(archive.head(&a, &s).await, Err(Error::Damaged { .. })));
}

#[tokio::test]
async fn sessions_are_listed_by_name_without_the_deleted() {
    let (store, archive) = in_memory();
    let a = tenant("a");
    for (n, name) in ["b", "d", "a", "c", "..", "B"].into_iter().enumerate() {
        run(&archive, &session(name), &turn(n as u64)).await;
    }
    archive.delete(&a, &session("b"), 200).await.unwrap();
    store.put_if_absent("t/a/sessions/broken/000000000001", "no record".into()).await.unwrap();
    store.put_if_absent("t/a/sessions/a/000000000009.bak", "a stranger".into()).await.unwrap();
    let page = async |after: Option<&str>, limit| {
        let listed = archive.sessions(&a, after.map(session).as_ref(), limit).await.unwrap();
        let names: Vec<String> = listed.data.iter().map(|(id, _)| id.to_string()).collect();
        (names.join(" "), listed.has_more)
    };
    assert_eq!(page(None, 9).await, (".. B a c d".into(), false));
    assert_eq!(page(None, 2).await, (".. B".into(), true));
    assert_eq!(page(Some("B"), 2).await, ("a c".into(), true));
    assert_eq!(page(Some("c"), 2).await, ("d".into(), false));
    assert_eq!(page(Some("a"), 0).await, (String::new(), true));
    let listed = archive.sessions(&a, None, 9).await.unwrap();
    assert_eq!((listed.data[2].1.turn, listed.data[2].1.record.seed), (1, 2));
}

/// What a store of `turns` turns is asked when the session is forked at its head.
async fn asked_for_a_fork(store: impl Store, turns: u64) -> Vec<Op> {
    let store = Arc::new(Recording::new(store));
    let (archive, a, s) = (Archive::new(store.clone()), tenant("a"), session("s"));
    for n in 0..turns {
        let head = archive.head(&a, &s).await.unwrap();
        assert_eq!(archive.commit(&a, &s, &head, &turn(n)).await.unwrap(), Commit::Committed);
    }
    store.forget();
    assert_eq!(fork_at(&archive, &s, turns, &session("fork")).await, Commit::Committed);
    let asked = store.log();
    assert_eq!(archive.head(&a, &session("fork")).await.unwrap().depth(), turns);
    asked
}

#[tokio::test]
async fn what_a_fork_asks_of_a_store_does_not_depend_on_the_turns_before_it() {
    let tiered = || Tiered::new(Bounded::new(InMemory::default(), 1 << 20), Arc::new(InMemory::default()), is_state);
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let local = async |n: usize| Local::open(folders[n].path()).await.unwrap();
    for [short, long] in [
        [asked_for_a_fork(InMemory::default(), 10).await, asked_for_a_fork(InMemory::default(), 1000).await],
        [asked_for_a_fork(tiered(), 10).await, asked_for_a_fork(tiered(), 1000).await],
        [asked_for_a_fork(local(0).await, 10).await, asked_for_a_fork(local(1).await, 200).await],
    ] {
        assert_eq!(short.len(), long.len());
        assert!(long.len() <= 14, "{long:?}");
        // Only the new name is looked up by a listing, of a folder that is not there.
        let listed: Vec<&str> = long.iter().filter(|op| matches!(op, Op::Listed(_))).map(Op::key).collect();
        assert_eq!(listed, ["t/a/sessions/fork"]);
    }
}

#[tokio::test]
async fn a_head_that_another_server_moved_is_found() {
    let store = Arc::new(InMemory::default());
    let servers = [(); 3].map(|()| Archive::new(store.clone()).with_grace(10));
    let (a, s) = (tenant("a"), session("s"));
    for n in 0..9 {
        assert_eq!(run(&servers[n as usize % 2], &s, &turn(n)).await, n + 1);
    }
    // What a server saw long ago is still there, as a fork needs it; what came after is gone, and the name is taken again.
    assert_eq!(servers[2].head(&a, &s).await.unwrap().last, 9);
    assert_eq!(run(&servers[0], &s, &turn(9)).await, 10);
    assert_eq!(fork_at(&servers[0], &s, 9, &session("fork")).await, Commit::Committed);
    assert!(servers[0].delete(&a, &s, 200).await.unwrap());
    assert_eq!(run(&servers[0], &s, &turn(3)).await, 12);
    let reclaimed = servers[0].reclaim(&a, &s, LATER).await.unwrap();
    assert!(reclaimed.records > 0);
    assert_eq!(servers[0].names("t/a/sessions/s", None, 99).await.unwrap().len(), 11, "of 12, the tenth is gone");
    for server in &servers {
        let head = server.head(&a, &s).await.unwrap();
        assert_eq!((head.last, head.depth()), (12, 1));
    }
}

/// A session of so many turns, made by nobody's process; what the first look at it asks the store.
async fn asked_at_first(turns: u64, act: impl AsyncFn(&Archive, &SessionId)) -> Vec<Op> {
    let store = Arc::new(Recording::new(InMemory::default()));
    let (a, s) = (tenant("a"), session("s"));
    let archive = Archive::new(store.clone());
    let mut head = archive.head(&a, &s).await.unwrap();
    for n in 1..=turns {
        let entry = head.turn(turn(n));
        assert_eq!(archive.commit_entry(&a, &s, &entry).await.unwrap(), Commit::Committed);
        head.last = n;
        head.live = Some(entry);
    }
    store.forget();
    act(&Archive::new(store.clone()), &s).await;
    store.log()
}

#[tokio::test]
async fn the_first_look_at_a_session_does_not_grow_with_it() {
    let listed =
        |log: &[Op]| log.iter().filter(|op| matches!(op, Op::Listed(folder) if folder.ends_with("/s"))).count();
    for turns in [1, 7, 300, 20_000] {
        let look = asked_at_first(turns, async |archive, s| {
            assert_eq!(archive.head(&tenant("a"), s).await.unwrap().last, turns);
        });
        let log = look.await;
        assert_eq!(listed(&log), 0, "{turns} turns");
        assert!(log.len() <= 110, "{turns} turns: {}", log.len());
        let fork = asked_at_first(turns, async |archive, s| {
            assert_eq!(fork_at(archive, s, turns, &session("t")).await, Commit::Committed);
        });
        let log = fork.await;
        assert_eq!(listed(&log), 0, "{turns} turns");
        assert!(log.len() <= 160, "{turns} turns: {}", log.len());
    }
}

#[tokio::test]
async fn a_record_that_was_lost_does_not_end_its_session() {
    for turns in [2, 3, 9, 65] {
        for lost in 1..turns {
            let (store, archive) = in_memory();
            let (a, s) = (tenant("a"), session("s"));
            for n in 1..=turns {
                let head = archive.head(&a, &s).await.unwrap();
                assert_eq!(archive.commit(&a, &s, &head, &turn(n)).await.unwrap(), Commit::Committed);
            }
            assert!(store.delete(&format!("t/a/sessions/s/{lost:012}")).await.unwrap());
            let head = Archive::new(store).head(&a, &s).await.unwrap();
            assert_eq!((head.last, head.depth()), (turns, turns), "record {lost} is lost");
        }
    }
}
