//! What had no room in memory: found on disk by the next process, and never believed when it is not what it should be.

use std::sync::Arc;

use bytes::Bytes;
use rewake::session::{PrefixLimits, Start, Turn};
use rewake::state::{InMemory, Put, Store};
use rewake::types::{SessionId, Tenant};

use super::{Answer, LIMITS, Side, prompt, side, side_of};

/// Room for few states, so that most are on disk.
const FEW: u64 = 100_000;

fn on_disk(disk: &Arc<InMemory>, disk_bytes: u64) -> Side {
    let limits = PrefixLimits { bytes: FEW, disk_bytes, ..PrefixLimits::default() };
    side_of(&limits, LIMITS, Some(disk.clone()))
}

fn of(tenant: &str, turn: Turn) -> Turn {
    Turn { tenant: Tenant::parse(tenant).expect("a tenant"), ..turn }
}

/// A text of 1,400 tokens, one of many.
fn text(n: usize) -> Turn {
    prompt(true, 100 + n, format!("{n}").repeat(1400 / n.to_string().len()))
}

async fn answer(side: &Side, turn: Turn) -> Answer {
    side.run(turn).await.expect("an answer")
}

/// Every file's key and size.
async fn files(disk: &InMemory) -> Vec<(String, u64)> {
    let (mut files, mut folders) = (Vec::new(), vec!["t".to_owned()]);
    while let Some(folder) = folders.pop() {
        for name in disk.children(&folder, None, usize::MAX).await.expect("a listing") {
            let key = format!("{folder}/{name}");
            match disk.get_start(&key, 0).await.expect("a file") {
                Some(start) => files.push((key, start.size)),
                None => folders.push(key),
            }
        }
    }
    files
}

/// A process that read `texts` and is gone.
async fn earlier(disk: &Arc<InMemory>, disk_bytes: u64, texts: usize) {
    let side = on_disk(disk, disk_bytes);
    for n in 0..texts {
        answer(&side, of("a", text(n))).await;
        side.sessions.prefix_settled().await;
    }
}

fn damaged() -> u64 {
    let metrics = rewake::telemetry::metrics::install().expect("the process's metrics").render();
    let line = metrics.lines().find_map(|line| line.strip_prefix("rewake_prefix_disk_damaged_total "));
    line.map_or(0, |n| n.parse().expect("a count"))
}

#[tokio::test]
async fn a_later_process_goes_on_from_what_an_earlier_one_read() {
    let disk = Arc::new(InMemory::default());
    earlier(&disk, 1 << 30, 12).await;
    let (side, plain) = (on_disk(&disk, 1 << 30), side(&PrefixLimits { enabled: false, ..PrefixLimits::default() }));
    side.sessions.prefix_settled().await;
    // The first texts had to go from memory before the last came.
    for n in 0..3 {
        let (with, without) = (answer(&side, of("a", text(n))).await, answer(&plain, of("a", text(n))).await);
        assert!(with.cached * 2 > with.prompt_tokens, "{} of {}", with.cached, with.prompt_tokens);
        assert_eq!((with.choices, with.prompt_tokens), (without.choices, without.prompt_tokens));
        // Now it is in memory, or still on disk.
        assert!(answer(&side, of("a", text(n))).await.cached >= with.cached);
    }
    for turn in [of("b", text(0)), of("a", prompt(false, 600, String::new()))] {
        assert_eq!(answer(&side, turn).await.cached, 0, "it is another tenant's, or another text");
    }
}

#[tokio::test]
async fn what_is_not_what_its_name_says_is_removed_and_not_believed() {
    let plain = side(&PrefixLimits { enabled: false, ..PrefixLimits::default() });
    let expected = answer(&plain, of("a", text(0))).await.choices;
    for how in ["a bit", "its end", "all of it", "another's"] {
        let disk = Arc::new(InMemory::default());
        earlier(&disk, 1 << 30, 12).await;
        let before = files(&disk).await;
        let contents: Vec<Bytes> = {
            let all = before.iter().map(async |(key, _)| disk.get(key).await.expect("a store").expect("a file"));
            futures::future::join_all(all).await
        };
        for (n, (key, _)) in before.iter().enumerate() {
            let whole = contents[n].clone();
            let changed = match how {
                "a bit" => {
                    let mut bytes = whole.to_vec();
                    let at = bytes.len() * 2 / 3;
                    bytes[at] ^= 1;
                    bytes.into()
                }
                "its end" => whole.slice(..whole.len() - 7),
                "all of it" => Bytes::from_static(b"not a state"),
                _ => contents[(n + 1) % contents.len()].clone(),
            };
            disk.delete(key).await.expect("a store");
            assert_eq!(disk.put_if_absent(key, changed).await, Ok(Put::Created));
        }
        let (side, counted) = (on_disk(&disk, 1 << 30), damaged());
        side.sessions.prefix_settled().await;
        let with = answer(&side, of("a", text(0))).await;
        assert_eq!((with.cached, &with.choices), (0, &expected), "{how}");
        assert!(damaged() > counted, "{how}");
        assert!(files(&disk).await.len() < before.len(), "{how}");
    }
}

#[tokio::test]
async fn it_takes_no_more_than_its_room_and_adopts_no_more_than_that() {
    let disk = Arc::new(InMemory::default());
    let total = async || files(&disk).await.iter().map(|(_, size)| size).sum::<u64>();
    let room = 100_000;
    earlier(&disk, room, 12).await;
    assert!((room / 2..=room).contains(&total().await), "{}", total().await);
    // A stranger's file is left alone and not counted.
    disk.put_if_absent("t/a/readme", Bytes::from_static(b"hello")).await.expect("a store");
    let less = on_disk(&disk, room / 4);
    less.sessions.prefix_settled().await;
    assert!(total().await <= room / 4 + 5 && disk.get("t/a/readme").await.expect("a store").is_some());
}

/// A turn of 1,400 tokens in a session.
fn said(session: &str, n: usize) -> Turn {
    let start = Start::Session { id: SessionId::parse(session).expect("a name"), if_match: None, begins: false };
    Turn { start, store: true, ..text(n) }
}

#[tokio::test]
async fn what_a_deleted_session_read_is_found_nowhere() {
    for bytes in [FEW, 1 << 30] {
        let disk = Arc::new(InMemory::default());
        let limits = PrefixLimits { bytes, disk_bytes: 1 << 30, ..PrefixLimits::default() };
        let side = side_of(&limits, LIMITS, Some(disk.clone()));
        answer(&side, of("local", text(50))).await;
        side.sessions.prefix_settled().await;
        let others = files(&disk).await;
        for n in [1, 2, 3] {
            answer(&side, said("secret", n)).await;
        }
        let id = SessionId::parse("secret").expect("a name");
        side.sessions.delete_session(&Tenant::local(), &id, None).await.expect("it is there");
        side.sessions.prefix_settled().await;
        // What others read is not given up for it.
        assert!(answer(&side, of("local", text(50))).await.cached > 700, "{bytes} bytes");
        side.sessions.drain();
        side.sessions.finish(std::time::Duration::from_secs(60)).await;
        // All that was in memory is on disk now. What continued states has folders of its own: there is none of it.
        let left = files(&disk).await;
        let folder = |key: &str| key.rsplit_once('/').expect("a folder").0.to_owned();
        assert!(!left.is_empty() && left.iter().all(|(key, _)| folder(key) == folder(&left[0].0)), "{left:?}");
        assert!(others.iter().all(|(key, _)| folder(key) == folder(&left[0].0)));
        let later = on_disk(&disk, 1 << 30);
        later.sessions.prefix_settled().await;
        assert!(answer(&later, of("local", text(50))).await.cached > 700);
        assert!(answer(&later, of("local", text(1))).await.cached < 200, "it shares its beginning with others only");
    }
}
