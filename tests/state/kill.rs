//! A real process that is really killed while it writes.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rewake::state::{Archive, Local, Store};
use rewake::types::{Snapshot, StateId};

use super::{snapshot, tenant};

const FOLDER: &str = "STATE_TEST_FOLDER";

/// Large enough that a kill often comes in the middle of it.
fn large(n: u64) -> Snapshot {
    let mut large = snapshot(n);
    large.memory.segments[0].shape = vec![1 << 18];
    large.memory.segments[0].data = vec![n as f32; 1 << 18];
    large
}

/// The victim: keeps states without end and says so after each.
#[tokio::test]
#[ignore = "runs only as the process that the next test kills"]
async fn keep_states_until_killed() {
    let archive = Archive::new(Arc::new(Local::open(std::env::var(FOLDER).unwrap()).await.unwrap()));
    for n in 0.. {
        archive.keep(Arc::new(large(n))).await.unwrap();
        println!("kept {}", large(n).head.id);
        std::io::stdout().flush().unwrap();
    }
}

#[tokio::test]
async fn a_killed_process_loses_no_kept_state_and_leaves_no_torn_one() {
    let folder = tempfile::tempdir().unwrap();
    for kept_before in [1, 2, 5] {
        let folder = folder.path().join(kept_before.to_string());
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kill::keep_states_until_killed", "--ignored", "--nocapture"])
            .env(FOLDER, &folder)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(victim.stdout.take().unwrap()).lines();
        // The harness prints the test's name before the first line, without a line break.
        let ids = lines.filter_map(|line| StateId::parse(line.unwrap().split_once("kept ")?.1.to_string()).ok());
        let kept: Vec<StateId> = ids.take(kept_before).collect();
        victim.kill().unwrap();
        victim.wait().unwrap();
        assert_eq!(kept.len(), kept_before);

        let store = Arc::new(Local::open(&folder).await.unwrap());
        let archive = Archive::new(store.clone());
        let listed = store.children("t/a/states", None, usize::MAX).await.unwrap();
        let listed: Vec<StateId> = listed.into_iter().map(|name| StateId::parse(name).unwrap()).collect();
        assert!(listed.starts_with(&kept), "{kept:?} are not all in {listed:?}");
        for (n, id) in listed.iter().enumerate() {
            assert_eq!(archive.load(&tenant("a"), id, 0).await.unwrap(), Some(large(n as u64)));
        }
    }
}
