//! Forks, rewinds and deletions in any order: every session has the turns that a plain list of them would have, and
//! nothing that one of them needs is ever removed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;
use rewake::state::{Archive, At, Commit, Forking, InMemory, Store};
use rewake::types::{SessionId, TurnRecord};

use super::{id, made_by, session, tenant, turn};

const SESSIONS: usize = 5;

#[derive(Clone, Debug)]
enum Action {
    Turn(usize),
    /// From, to, at which part of its turns.
    Fork(usize, usize, u8),
    Rewind(usize, u8),
    /// To any state that the session ever had.
    Return(usize, u8),
    Delete(usize),
    /// A state without a session is made from a session's head.
    Child(usize),
    /// Long after everything before.
    Sweep,
}

/// Long sessions, and few of them, so that forks meet in their lineages.
fn actions() -> impl Strategy<Value = Vec<Action>> {
    let session = || prop_oneof![2 => Just(0_usize), 2 => 0..SESSIONS];
    let action = prop_oneof![
        9 => session().prop_map(Action::Turn),
        4 => (session(), 0..SESSIONS, any::<u8>()).prop_map(|(a, b, at)| Action::Fork(a, b, at)),
        2 => (session(), any::<u8>()).prop_map(|(a, at)| Action::Rewind(a, at)),
        1 => (session(), any::<u8>()).prop_map(|(a, at)| Action::Return(a, at)),
        1 => (0..SESSIONS).prop_map(Action::Delete),
        1 => session().prop_map(Action::Child),
        1 => Just(Action::Sweep),
    ];
    prop::collection::vec(action, 1..80)
}

/// What should be: a session's turns, and every list of turns that ended where it has been since it began.
#[derive(Clone, Debug, Default)]
struct Told {
    turns: Vec<u64>,
    been: Vec<Vec<u64>>,
}

struct World {
    store: Arc<InMemory>,
    /// Two servers, which do not tell each other what they have seen.
    servers: [Archive; 2],
    told: BTreeMap<usize, Told>,
    /// States without a session, each with the state that it was made from.
    children: Vec<(u64, u64)>,
    made: u64,
    now: u64,
}

fn name(n: usize) -> SessionId {
    session(&format!("s{n}"))
}

impl World {
    fn new() -> Self {
        let store = Arc::new(InMemory::default());
        let servers = [(); 2].map(|()| Archive::new(store.clone()).with_grace(100));
        Self { store, servers, told: BTreeMap::new(), children: Vec::new(), made: 0, now: 1_000 }
    }

    /// The one whose turn it is.
    fn archive(&self) -> &Archive {
        &self.servers[(self.now / 3 % 2) as usize]
    }

    async fn act(&mut self, action: &Action) {
        let a = tenant("a");
        self.now += 1;
        match *action {
            Action::Turn(s) => {
                self.made += 1;
                let head = self.archive().head(&a, &name(s)).await.unwrap();
                let mut snapshot = made_by(0, &name(s));
                (snapshot.head.id, snapshot.head.record) = (id(self.made), Some(head.next()));
                snapshot.head.turn = head.depth() + 1;
                self.archive().keep(Arc::new(snapshot)).await.unwrap();
                let record = TurnRecord { created: self.now, ..turn(self.made) };
                let commit = self.archive().commit(&a, &name(s), &head, &record).await.unwrap();
                assert_eq!(commit, Commit::Committed);
                let told = self.told.entry(s).or_default();
                told.turns.push(self.made);
                told.been.push(told.turns.clone());
            }
            Action::Fork(s, to, at) => {
                let Some(from) = self.told.get(&s).cloned() else { return };
                let depth = at as usize % from.turns.len() + 1;
                let head = self.archive().head(&a, &name(s)).await.unwrap().live.unwrap();
                let at = At::Number(depth as u64);
                let turn = self.archive().turn(&a, &name(s), &head, &at).await.unwrap().expect("it has as many");
                let forking = Forking { from: &name(s), head: &head, turn: &turn, to: &name(to) };
                let commit = self.archive().fork(&a, forking, self.now).await.unwrap();
                assert_eq!(commit == Commit::Taken, self.told.contains_key(&to));
                if commit == Commit::Committed {
                    let turns = from.turns[..depth].to_vec();
                    self.told.insert(to, Told { been: vec![turns.clone()], turns });
                }
            }
            Action::Rewind(s, at) => {
                let Some(told) = self.told.get_mut(&s) else { return };
                let depth = at as usize % told.turns.len() + 1;
                told.turns.truncate(depth);
                told.been.push(told.turns.clone());
                self.go_back(s, At::Number(depth as u64)).await;
            }
            Action::Return(s, at) => {
                let Some(told) = self.told.get_mut(&s) else { return };
                told.turns = told.been[at as usize % told.been.len()].clone();
                told.been.push(told.turns.clone());
                let state = id(*told.turns.last().expect("a turn at least"));
                self.go_back(s, At::State(state)).await;
            }
            Action::Delete(s) => {
                let deleted = self.archive().delete(&a, &name(s), self.now).await.unwrap();
                assert_eq!(deleted, self.told.remove(&s).is_some());
            }
            Action::Child(s) => {
                let Some(told) = self.told.get(&s) else { return };
                self.made += 1;
                let (child, parent) = (self.made, *told.turns.last().expect("a turn at least"));
                let by = self.archive().origin_of(&a, &id(parent)).await.unwrap().expect("a session made it").session;
                self.archive().note_child(&a, &by, (&id(parent), &id(child)), self.now).await.unwrap();
                let mut snapshot = super::snapshot(0);
                (snapshot.head.id, snapshot.head.parent) = (id(child), Some(id(parent)));
                self.archive().keep(Arc::new(snapshot)).await.unwrap();
                self.children.push((child, parent));
            }
            Action::Sweep => self.sweep().await,
        }
    }

    async fn go_back(&self, s: usize, at: At) {
        let (a, s) = (tenant("a"), name(s));
        let head = self.archive().head(&a, &s).await.unwrap();
        let turn = self.archive().turn(&a, &s, head.live.as_ref().unwrap(), &at).await.unwrap().expect("it had it");
        let entry = head.back(&turn, self.now);
        assert_eq!(self.archive().commit_entry(&a, &s, &entry).await.unwrap(), Commit::Committed);
    }

    /// The sweep when everything that was done is long ago.
    async fn sweep(&mut self) {
        let a = tenant("a");
        self.now += 1_000;
        for name in self.store.children("t/a/sessions", None, 99).await.unwrap() {
            self.archive().reclaim(&a, &session(&name), self.now).await.unwrap();
        }
        for name in self.store.children("t/a/states", None, 999).await.unwrap() {
            let id = rewake::types::StateId::parse(name).unwrap();
            let found = self.archive().remnant(&a, &id, u64::MAX / 2).await.unwrap();
            assert_eq!(found, None, "{id}: nothing was cut off here");
        }
    }

    async fn check(&self) {
        let a = tenant("a");
        let mut needed = BTreeSet::new();
        for (s, told) in &self.told {
            let s = name(*s);
            let head = self.archive().head(&a, &s).await.unwrap().live.expect("it lives");
            assert_eq!((head.depth, head.record.seed), (told.turns.len() as u64, *told.turns.last().unwrap()));
            // A server that has seen nothing yet sees the same.
            let cold = Archive::new(self.store.clone()).head(&a, &s).await.unwrap().live;
            assert_eq!(cold.as_ref(), Some(&head));
            let all = self.archive().turns(&a, &s, 0, 99).await.unwrap().unwrap();
            let seeds: Vec<u64> = all.data.iter().map(|entry| entry.record.seed).collect();
            assert_eq!((&seeds, all.has_more), (&told.turns, false));
            assert!(all.data.iter().zip(1..).all(|(entry, depth)| entry.depth == depth));
            // Page by page it is the same.
            let mut pages = Vec::new();
            for after in (0..told.turns.len() as u64).step_by(2) {
                let page = self.archive().turns(&a, &s, after, 2).await.unwrap().unwrap();
                assert_eq!(page.has_more, after + 2 < told.turns.len() as u64);
                pages.extend(page.data);
            }
            assert_eq!(pages, all.data);
            for turn in &told.turns {
                let found = self.archive().turn(&a, &s, &head, &At::State(id(*turn))).await.unwrap();
                assert_eq!(found.map(|turn| turn.entry.record.seed), Some(*turn));
            }
            needed.extend(told.turns.iter().copied());
        }
        needed.extend(self.children.iter().flat_map(|(child, parent)| [*child, *parent]));
        for state in needed {
            assert!(self.archive().info(&a, &id(state), 0).await.unwrap().is_some(), "state {state} is needed");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn sessions_are_lists_of_turns_however_they_came_by_them(actions in actions()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut world = World::new();
            for action in &actions {
                world.act(action).await;
                world.check().await;
            }
            // In the end nothing is left of what nobody has: a tombstone for each name, and the free-standing states.
            for s in 0..SESSIONS {
                world.archive().delete(&tenant("a"), &name(s), world.now).await.unwrap();
            }
            world.told.clear();
            // A source may be freed by a fork that only this sweep frees.
            for _ in 0..SESSIONS {
                world.sweep().await;
            }
            world.check().await;
            let free: BTreeSet<u64> = world.children.iter().flat_map(|(child, parent)| [*child, *parent]).collect();
            let left = world.store.children("t/a/states", None, 999).await.unwrap();
            assert_eq!(left, free.iter().map(|n| id(*n).to_string()).collect::<Vec<_>>());
            for s in 0..SESSIONS {
                let left = world.store.children(&format!("t/a/sessions/s{s}"), None, 99).await.unwrap();
                assert!(left.len() <= 1, "s{s}: {left:?}");
            }
        });
    }
}
