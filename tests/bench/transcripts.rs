//! Chats whose clients send the whole transcript with each turn: the time to the first text, with the prefix cache and
//! without.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::Criterion;
use rewake::app::{App, load_models};
use rewake::config::{self, Config, Flags};
use rewake::session::{Event, Input, PrefixLimits, Sessions, Start, Turn};
use rewake::state::InMemory;
use rewake::types::{Message, Role, Sampling, Tenant};
use tokio::runtime::Runtime;

use crate::synthetic;

/// Turns of a chat.
const TURNS: usize = 8;

pub fn transcripts(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("model.safetensors");
    synthetic::SMALL.write(&file);
    for (name, file, words) in [("demo", None, 60), ("v7 0.1B f16", Some(file.as_path()), 20)] {
        let mut group = c.benchmark_group(format!("first text of a turn, {name}"));
        group.sample_size(10);
        for enabled in [true, false] {
            let (runtime, sessions) = (Runtime::new().expect("a runtime"), sessions(file, enabled));
            let (mut chat, mut read, mut saved) = (0, 0, 0);
            group.bench_function(if enabled { "with the cache" } else { "without" }, |b| {
                b.iter_custom(|times| {
                    let mut spent = Duration::ZERO;
                    for _ in 0..times {
                        chat += 1;
                        let told = runtime.block_on(converse(&sessions, chat, words));
                        (spent, read, saved) =
                            (spent + told.waited / TURNS as u32, read + told.read, saved + told.saved);
                    }
                    spent
                });
            });
            if read > 0 {
                println!("{saved} of {read} prompt tokens were not read again");
            }
        }
    }
}

fn sessions(file: Option<&Path>, enabled: bool) -> Arc<Sessions> {
    let defaults = Config::load(&Flags::default(), std::iter::empty()).expect("the defaults");
    let model = vec![config::Model {
        file: file.map(Path::to_path_buf),
        tokenizer: file.map(|_| "world".into()),
        ..config::Model::default()
    }];
    let prefix_cache = PrefixLimits { enabled, ..PrefixLimits::default() };
    let config = Config { model, prefix_cache, ..defaults };
    let app = App::with_store(&config, Arc::new(InMemory::default())).expect("the use-cases");
    app.sessions.open(load_models(&config, &|_, _, _| {}).expect("the model"));
    app.sessions
}

#[derive(Default)]
struct Told {
    /// From the requests to their first text, in all.
    waited: Duration,
    read: u64,
    saved: u64,
}

/// One chat that no other one shares more with than its system message.
async fn converse(sessions: &Sessions, chat: usize, words: usize) -> Told {
    let message = |role, content| Message { role, content, name: None };
    let long = |seed: usize| (0..words).map(|n| format!("word{} ", (seed * 31 + n * n) % 97)).collect::<String>();
    let mut messages = vec![message(Role::System, long(0))];
    let mut told = Told::default();
    for turn in 0..TURNS {
        messages.push(message(Role::User, format!("{chat} {turn} {}", long(chat * TURNS + turn))));
        let began = Instant::now();
        let mut running = sessions.start(request(messages.clone())).await.expect("a turn");
        let (mut answer, mut first) = (String::new(), None);
        while let Some(event) = running.next().await {
            first.get_or_insert_with(|| began.elapsed());
            if let Event::Text { text, .. } = event {
                answer.push_str(&text);
            }
        }
        told.waited += first.expect("a turn says something");
        told.read += running.facts.prompt_tokens;
        told.saved += running.facts.cached_tokens.get();
        messages.push(message(Role::Assistant, answer));
    }
    told
}

fn request(messages: Vec<Message>) -> Turn {
    Turn {
        tenant: Tenant::local(),
        response_id: "chatcmpl-bench".into(),
        model: None,
        start: Start::Fresh,
        anew: None,
        input: Input::Chat(messages),
        choices: 1,
        sampling: Sampling { temperature: 0.7, top_p: 0.9, ..Sampling::default() },
        stop: Vec::new(),
        max_tokens: Some(16),
        store: false,
        ttl_s: None,
        initial_state: None,
        idempotency_key: None,
        metadata: Default::default(),
        delivery: Default::default(),
    }
}
