//! Chunk, batch and snapshot law of one model: bit for bit.

use rewake::model::{Model, Pool};
use rewake::types::{Row, SeqId, SlotId, Want};

use super::{bits, flat, read, steps};

/// All bits of logits and states.
type Bits = (Vec<u32>, Vec<u32>);

/// Reads tokens in chunks of these sizes, and the rest in one.
pub fn read_in(model: &mut Model, tokens: &[u32], chunks: &[usize]) -> Bits {
    let mut pool = model.pool(1).expect("a pool");
    pool.reset(SlotId(0));
    let mut left = tokens;
    let mut logits = Vec::new();
    for &n in chunks.iter().chain([&usize::MAX]) {
        let at = tokens.len() - left.len();
        let (chunk, rest) = left.split_at(n.min(left.len()));
        left = rest;
        if !chunk.is_empty() {
            logits.extend(read(model, &mut pool, chunk, at, 0, 0));
        }
    }
    (bits(&logits), flat(&pool.snapshot(SlotId(0))))
}

/// Any split into chunks gives what the whole gives, which is the result. So do the logits of a part of a row.
pub fn chunks(model: &mut Model, tokens: &[u32], sizes: &[usize], name: &str) -> Bits {
    let whole = read_in(model, tokens, &[]);
    for &size in sizes {
        assert!(whole == read_in(model, tokens, &vec![size; tokens.len()]), "{name} in chunks of {size}");
    }
    let (mut pool, slot) = (model.pool(1).expect("a pool"), SlotId(0));
    pool.reset(slot);
    let first = tokens.len() / 2;
    let want = Want::From(first);
    let row = Row { seq: SeqId(0), from: slot, into: slot, at: 0, tokens: 0..tokens.len(), want };
    let part = steps(model, &mut pool, tokens, &[row]);
    let vocabulary = model.description().vocabulary;
    assert!(bits(&part) == whole.0[first * vocabulary..], "{name}, logits from token {first} on");
    if model.description().state_bytes_per_token == 0 {
        sizes.iter().for_each(|&size| on_the_way(model, tokens, size, &format!("{name}, states {size} apart")));
    }
    whole
}

/// In one step, with the states after every `size` tokens left in slots of their own and another text beside it: what reading
/// in as many steps gives.
fn on_the_way(model: &mut Model, tokens: &[u32], size: usize, name: &str) {
    let count = tokens.len().div_ceil(size) as u32;
    let mut pool = model.pool(count as usize + 2).expect("a pool");
    let fresh = |pool: &mut Pool| [0, 1].iter().for_each(|&slot| pool.reset(SlotId(slot)));
    fresh(&mut pool);
    let (mut logits, mut states, mut at) = (Vec::new(), Vec::new(), 0);
    for chunk in tokens.chunks(size) {
        logits.extend(read(model, &mut pool, chunk, at, 0, 0));
        states.push(flat(&pool.snapshot(SlotId(0))));
        at += chunk.len();
    }
    let beside = read(model, &mut pool, tokens, 0, 1, 1);
    fresh(&mut pool);
    // The last begins from its own slot and the first leaves it; then the other way round.
    for end in [0, count + 1] {
        let slot = |n: u32| {
            SlotId(if n == 0 {
                0
            } else if n == count {
                end
            } else {
                n + 1
            })
        };
        fresh(&mut pool);
        let chunk = |n: u32| n as usize * size..tokens.len().min((n as usize + 1) * size);
        let row = |n: u32| {
            let (from, into, tokens) = (slot(n), slot(n + 1), chunk(n));
            Row { seq: SeqId(0), from, into, at: tokens.start as u64, tokens, want: Want::All }
        };
        let own = tokens.len()..2 * tokens.len();
        let other = Row { seq: SeqId(1), from: SlotId(1), into: SlotId(1), at: 0, tokens: own, want: Want::All };
        let rows: Vec<Row> = (0..count).map(row).chain([other]).collect();
        let got = steps(model, &mut pool, &tokens.repeat(2), &rows);
        let (mine, others) = got.split_at(tokens.len());
        assert!(bits(mine) == bits(&logits) && bits(others) == bits(&beside), "{name}: logits");
        for (n, state) in states.iter().enumerate() {
            assert!(flat(&pool.snapshot(slot(n as u32 + 1))) == *state, "{name}: state {n}");
        }
    }
}

/// What each of many sequences gives is what it gives alone; these read the same tokens from another place on each.
pub fn batches(model: &mut Model, tokens: &[u32], name: &str) {
    for batch in [1usize, 3, 17, 64] {
        let mut pool = model.pool(batch + 1).expect("a pool");
        let texts: Vec<Vec<u32>> =
            (0..batch).map(|i| tokens.iter().cycle().skip(i).take(9 + i % 5).copied().collect()).collect();
        let mut alone = Vec::new();
        for text in &texts {
            pool.reset(SlotId(0));
            let logits = read(model, &mut pool, text, 0, 0, 0);
            alone.push((bits(&logits[logits.len() - 1..]), flat(&pool.snapshot(SlotId(0)))));
        }
        let together = batch_of(model, &mut pool, &texts);
        for i in 0..batch {
            assert!(together[i] == alone[i], "{name} sequence {i} of {batch}");
        }
    }
}

/// The last logits and the state of each text, read beside each other in uneven pieces: every step takes another number of
/// tokens from each.
fn batch_of(model: &mut Model, pool: &mut Pool, texts: &[Vec<u32>]) -> Vec<Bits> {
    (0..texts.len()).for_each(|i| pool.reset(SlotId(i as u32)));
    let mut done = vec![0usize; texts.len()];
    let mut last = vec![Vec::new(); texts.len()];
    for round in 0.. {
        let (mut ids, mut rows) = (Vec::new(), Vec::new());
        for (i, text) in texts.iter().enumerate() {
            let n = ((round + i) % 4 + 1).min(text.len() - done[i]);
            if n == 0 {
                continue;
            }
            let slot = SlotId(i as u32);
            let tokens = ids.len()..ids.len() + n;
            ids.extend(&text[done[i]..done[i] + n]);
            let (seq, at) = (SeqId(i as u64), done[i] as u64);
            rows.push(Row { seq, from: slot, into: slot, at, tokens, want: Want::Last });
            done[i] += n;
        }
        if rows.is_empty() {
            break;
        }
        for (row, logits) in rows.iter().zip(steps(model, pool, &ids, &rows)) {
            last[row.seq.0 as usize] = logits;
        }
    }
    let state = |i: usize| flat(&pool.snapshot(SlotId(i as u32)));
    last.into_iter().enumerate().map(|(i, logits)| (bits(&[logits]), state(i))).collect()
}

/// A state that is restored, copied or forked goes on as the one it was taken of.
pub fn snapshots(model: &mut Model, tokens: &[u32], name: &str) {
    let mut pool = model.pool(4).expect("a pool");
    (0..4).for_each(|s| pool.reset(SlotId(s)));
    let (head, tail) = tokens.split_at(tokens.len() / 2);
    read(model, &mut pool, head, 0, 0, 0);
    let snapshot = pool.snapshot(SlotId(0));
    pool.restore(SlotId(1), &snapshot).expect("its own snapshot fits");
    pool.copy(SlotId(0), SlotId(3));
    assert_eq!(flat(&pool.snapshot(SlotId(1))), flat(&snapshot));

    // Reading one slot and writing another leaves the first as it was and computes the same.
    let forked = read(model, &mut pool, tail, head.len(), 0, 2);
    assert_eq!(flat(&pool.snapshot(SlotId(0))), flat(&snapshot), "{name}");
    let restored = read(model, &mut pool, tail, head.len(), 1, 1);
    let copied = read(model, &mut pool, tail, head.len(), 3, 3);
    let went_on = read(model, &mut pool, tail, head.len(), 0, 0);
    for (other, slot) in [(forked, 2), (restored, 1), (copied, 3)] {
        assert!(bits(&other) == bits(&went_on), "{name} slot {slot}");
        assert_eq!(flat(&pool.snapshot(SlotId(slot))), flat(&pool.snapshot(SlotId(0))));
    }
}
