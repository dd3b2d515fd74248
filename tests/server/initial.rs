//! Initial states by name: the same as configured for all sequences, remembered by sessions, and refused where a sequence
//! has another beginning.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use rewake::app::load_models;
use rewake::config::{Config, InitialState, Model, ProfileChoice};
use rewake::state::{Archive, InMemory};
use rewake::text::Profile;
use rewake::types::{InitialName, Memory, SessionId, StateId, Tenant};
use serde_json::{Value, json};

use crate::server::{CHAT, COMPLETIONS, Client, Process, Reply, Server, config, forgetful, said};
use crate::{user, with};

/// A model of a generation, without a state of its own, and two state-tuned files of it.
struct Files {
    /// Holds what was made for the test.
    folder: tempfile::TempDir,
    model: PathBuf,
    poet: PathBuf,
    lawyer: PathBuf,
}

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

impl Files {
    fn v7() -> Self {
        let folder = case("v7_state_bf16");
        Self::new(folder.join("model.safetensors"), &load(&folder.join("state.safetensors")))
    }

    /// Its case has the state inside the model.
    fn v6() -> Self {
        let all = load(&case("v6_state_bf16").join("model.safetensors"));
        let (states, base): (HashMap<_, _>, _) = all.into_iter().partition(|(name, _)| name.ends_with(".time_state"));
        let mut files = Self::new(PathBuf::new(), &states);
        files.model = files.folder.path().join("base.safetensors");
        save(&base, &files.model);
        files
    }

    fn new(model: PathBuf, states: &HashMap<String, Tensor>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        save(states, &at("poet.safetensors"));
        let negated = states.iter().map(|(name, state)| (name.clone(), state.neg().expect("a tensor")));
        save(&negated.collect(), &at("lawyer.safetensors"));
        // The embedded model's first ids are the end of a document and single bytes: these models have 200 ids.
        let tokenizer = include_str!("../../assets/demo/tokenizer.json");
        let mut tokenizer: Value = serde_json::from_str(tokenizer).expect("JSON");
        tokenizer["model"]["merges"] = json!([]);
        let ids = tokenizer["model"]["vocab"].as_object_mut().expect("a vocabulary");
        ids.retain(|_, id| id.as_u64().is_some_and(|id| id < 200));
        std::fs::write(at("tokenizer.json"), tokenizer.to_string()).expect("a file");
        Self { model, poet: at("poet.safetensors"), lawyer: at("lawyer.safetensors"), folder }
    }

    fn tokenizer(&self) -> String {
        self.folder.path().join("tokenizer.json").to_string_lossy().into_owned()
    }

    /// The model with these initial states and, for all sequences, `state`. Every fresh text begins with token 0.
    fn served(&self, states: &[(&str, &Path)], state: Option<&Path>) -> Config {
        let initial = |(name, file): &(&str, &Path)| InitialState {
            name: InitialName::parse(*name).expect("a good name"),
            file: file.to_path_buf(),
        };
        let profile = rewake::text::builtin("world").expect("a built-in profile");
        let model = Model {
            name: "tuned".into(),
            file: Some(self.model.clone()),
            tokenizer: Some(self.tokenizer()),
            profile: Some(ProfileChoice::Own(Box::new(Profile { bos: true, ..profile }))),
            state: state.map(Path::to_path_buf),
            initial_state: states.iter().map(initial).collect(),
            ..Model::default()
        };
        Config { model: vec![model], ..config() }
    }

    fn both(&self) -> Config {
        self.served(&[("poet", &self.poet), ("lawyer", &self.lawyer)], None)
    }
}

fn load(file: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(file, &Device::Cpu).expect("tensors")
}

fn save(tensors: &HashMap<String, Tensor>, file: &Path) {
    candle_core::safetensors::save(tensors, file).expect("a file");
}

fn client(config: &Config, store: &Arc<InMemory>) -> Client {
    Server::with(config, store.clone()).client()
}

/// What a stored state remembers.
async fn memory(store: &Arc<InMemory>, id: &str) -> Memory {
    let id = StateId::parse(id).expect("an id");
    let snapshot = Archive::new(store.clone()).load(&Tenant::local(), &id, 0).await;
    snapshot.expect("a store").expect("it is there").memory
}

/// The texts of all choices.
fn texts(reply: &Reply) -> Vec<String> {
    let reply = reply.json();
    let choices = reply["choices"].as_array().expect("choices");
    let text = |choice: &Value| choice["text"].as_str().or(choice["message"]["content"].as_str()).map(String::from);
    choices.iter().map(|choice| text(choice).expect("text")).collect()
}

/// Two ways of asking, at rules that never reach the end of a document.
fn ways() -> [(&'static str, Value); 2] {
    let rules = json!({"temperature": 0.8, "seed": 11, "max_tokens": 24, "logit_bias": {"0": -100}});
    let chat = with(rules.clone(), json!({"messages": user("Sing!")}));
    [(COMPLETIONS, with(rules, json!({"prompt": "Sing of the sea"}))), (CHAT, chat)]
}

fn poet(body: &Value) -> Value {
    with(body.clone(), json!({"initial_state": "poet"}))
}

fn refused(reply: &Reply, param: &str) -> String {
    assert_eq!((reply.status, reply.error()["param"].as_str()), (400, Some(param)), "{}", reply.text);
    reply.error()["message"].as_str().expect("a message").to_owned()
}

#[tokio::test]
async fn a_named_state_is_the_same_as_one_configured_for_all() {
    for files in [Files::v7(), Files::v6()] {
        let (by_name, for_all) = (Arc::new(InMemory::default()), Arc::new(InMemory::default()));
        let named = client(&files.both(), &by_name);
        let tuned = client(&files.served(&[], Some(&files.poet)), &for_all);
        for (path, body) in ways() {
            let kept = with(body.clone(), json!({"store_state": true}));
            let (a, b) = (named.ok(path, poet(&kept)).await, tuned.ok(path, kept.clone()).await);
            assert_eq!(a.answer(), b.answer(), "{path}");
            assert_eq!(a.json()["usage"], b.json()["usage"]);
            assert_eq!(a.json()["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
            let (left, right) = (memory(&by_name, &a.state_id()).await, memory(&for_all, &b.state_id()).await);
            assert_eq!(left, right, "{path}: every value of the state");
            let streamed = named.stream(path, poet(&body)).await.all().await;
            assert_eq!(said(&streamed, 0), named.ok(path, poet(&body)).await.answer());

            // It matters, and it is gone with its request.
            let plain = named.ok(path, kept.clone()).await;
            let lawyer = named.ok(path, with(kept.clone(), json!({"initial_state": "lawyer"}))).await;
            let answers = [a.answer(), plain.answer(), lawyer.answer()];
            assert!(answers[0] != answers[1] && answers[0] != answers[2] && answers[1] != answers[2], "{answers:?}");
            assert_eq!(texts(&named.ok(path, poet(&kept)).await), texts(&a));

            // It goes on from its own state, which needs no name.
            let rest = if path == CHAT { json!({"messages": []}) } else { json!({"prompt": ""}) };
            let whole = named.ok(path, with(poet(&kept), json!({"max_tokens": 30}))).await;
            let rest = with(with(kept, rest), json!({"state_id": a.state_id(), "max_tokens": 6}));
            let rest = named.ok(path, rest).await;
            assert_eq!(a.answer() + &rest.answer(), whole.answer());
        }

        let many =
            json!({"prompt": ["The sea", "A wave", "Foam"], "n": 2, "seed": 5, "max_tokens": 9, "store_state": true});
        let (a, b) = (named.ok(COMPLETIONS, poet(&many)).await, tuned.ok(COMPLETIONS, many.clone()).await);
        assert_eq!(texts(&a), texts(&b));
        assert_ne!(texts(&a), texts(&named.ok(COMPLETIONS, many).await));
        for n in 0..6 {
            let id = |reply: &Reply| reply.json()["choices"][n]["state"]["id"].as_str().expect("an id").to_owned();
            assert_eq!(memory(&by_name, &id(&a)).await, memory(&for_all, &id(&b)).await, "choice {n}");
        }
        // An empty prompt is the beginning of a document from here too.
        let nothing = json!({"prompt": "", "temperature": 0, "max_tokens": 4});
        assert_eq!(texts(&named.ok(COMPLETIONS, poet(&nothing)).await), texts(&tuned.ok(COMPLETIONS, nothing).await));
    }
}

#[tokio::test]
async fn a_model_s_own_state_gives_way_to_a_named_one() {
    let files = Files::v7();
    let (own, none) = (Arc::new(InMemory::default()), Arc::new(InMemory::default()));
    let own = client(&files.served(&[("poet", &files.poet)], Some(&files.lawyer)), &own);
    let none = client(&files.both(), &none);
    for (path, body) in ways() {
        assert_eq!(own.ok(path, poet(&body)).await.answer(), none.ok(path, poet(&body)).await.answer());
        let lawyer = with(body.clone(), json!({"initial_state": "lawyer"}));
        assert_eq!(own.ok(path, body).await.answer(), none.ok(path, lawyer).await.answer());
    }
}

#[tokio::test]
async fn only_what_begins_can_name_its_beginning() {
    let files = Files::v7();
    let store = Arc::new(InMemory::default());
    let client = client(&files.both(), &store);
    let shown = client.get("/v1/models/tuned").await.json();
    assert_eq!(shown["rewake"]["initial_states"], json!(["lawyer", "poet"]));
    for (path, body) in ways() {
        for stream in [false, true] {
            let ask = |more: Value| client.post(path, with(with(body.clone(), json!({"stream": stream})), more));
            for unknown in ["novelist", "", "Poet", "poet "] {
                let session = json!({"initial_state": unknown, "session_id": "never-begun"});
                for more in [json!({"initial_state": unknown}), session] {
                    let message = refused(&ask(more).await, "initial_state");
                    assert!(message.contains("`lawyer`, `poet`"), "it names the known ones: {message}");
                }
            }
            assert_eq!(client.get("/v1/sessions/never-begun").await.status, 404, "a refused turn begins no session");

            let session = format!("begun-{}-{stream}", path.len());
            let begin = with(poet(&body), json!({"session_id": session}));
            let begun = client.ok(path, begin).await;
            refused(&ask(json!({"initial_state": "poet", "session_id": session})).await, "initial_state");
            refused(&ask(json!({"initial_state": "poet", "state_id": begun.state_id()})).await, "initial_state");
            assert_eq!(client.get(&format!("/v1/sessions/{session}")).await.json()["turn"], 1);
            // A session that was deleted begins anew, from whatever it likes.
            assert_eq!(client.delete(&format!("/v1/sessions/{session}")).await.status, 200);
            let anew = with(body.clone(), json!({"session_id": session, "initial_state": "lawyer"}));
            assert_ne!(client.ok(path, anew).await.answer(), begun.answer());
        }
    }

    let none = Server::shared().client();
    let message =
        refused(&none.post(COMPLETIONS, json!({"prompt": "a", "initial_state": "poet"})).await, "initial_state");
    assert!(message.contains("[[model.initial_state]]"), "it says how to have one: {message}");
    assert_eq!(none.get("/v1/models/stories").await.json()["rewake"]["initial_states"], json!([]));
}

/// A session of three turns, which loses its last snapshot before turn `lost`; the answers and its last state's id.
async fn conversation(client: &Client, session: &str, lost: Option<usize>) -> (Vec<String>, String) {
    let mut answers = Vec::new();
    let mut last = String::new();
    for (n, (path, body)) in [&ways()[1], &ways()[0], &ways()[1]].into_iter().enumerate() {
        if lost == Some(n) {
            assert_eq!(client.delete(&format!("/v1/states/{last}")).await.status, 200);
        }
        let body = if n == 0 { poet(body) } else { body.clone() };
        let reply = client.ok(path, with(body, json!({ "session_id": session }))).await;
        let cached = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count");
        assert_eq!(cached == 0, n == 0 || lost == Some(n), "turn {n} of {session}");
        answers.push(reply.answer());
        last = reply.state_id();
    }
    (answers, last)
}

#[tokio::test]
async fn a_session_is_read_again_from_where_it_began() {
    for files in [Files::v7(), Files::v6()] {
        let store = Arc::new(InMemory::default());
        let client = client(&forgetful(files.both()), &store);
        let (kept, state) = conversation(&client, "kept", None).await;
        let kept_memory = memory(&store, &state).await;
        for lost in [1, 2] {
            let (answers, state) = conversation(&client, &format!("lost-{lost}"), Some(lost)).await;
            assert_eq!(answers, kept);
            assert_eq!(memory(&store, &state).await, kept_memory, "every value of the state");
        }
        // And the next turn is what one request over the same ids says.
        let next = json!({"prompt": " and", "temperature": 0, "max_tokens": 8, "logit_bias": {"0": -100}});
        let turn = client.ok(COMPLETIONS, with(next.clone(), json!({"session_id": "kept"}))).await;
        let mut ids = Vec::new();
        for turn in client.get("/v1/sessions/kept/turns?token_ids=true").await.json()["data"].as_array().expect("turns")
        {
            ids.truncate(ids.len() - turn["takes_back"].as_u64().expect("a count") as usize);
            ids.extend(turn["token_ids"].as_array().expect("ids").iter().cloned());
        }
        ids.truncate(turn.json()["usage"]["prompt_tokens"].as_u64().expect("a count") as usize);
        // The profile puts it there, once.
        assert_eq!(ids.remove(0), 0);
        let once = with(poet(&next), json!({"prompt": ids, "store_state": true}));
        let once = client.ok(COMPLETIONS, once).await;
        assert_eq!((once.answer(), once.finish()), (turn.answer(), turn.finish()));
    }
}

/// What the records of a session's turns say of its beginning.
async fn beginnings(store: &Arc<InMemory>, session: &str) -> Vec<Option<Option<String>>> {
    let session = SessionId::parse(session).expect("a name");
    let turns = Archive::new(store.clone()).turns(&Tenant::local(), &session, 0, usize::MAX).await;
    let turns = turns.expect("a store").expect("a session").data;
    turns.into_iter().map(|entry| entry.record.beginning.map(|beginning| beginning.name)).collect()
}

#[tokio::test]
async fn a_session_whose_beginning_is_gone_is_not_made_up() {
    let files = Files::v7();
    let store = Arc::new(InMemory::default());
    let before = client(&files.both(), &store);
    let mut heads = Vec::new();
    for (session, initial) in [("named", json!("poet")), ("unnamed", Value::Null)] {
        for (n, (path, body)) in ways().into_iter().enumerate() {
            let initial = if n == 0 { initial.clone() } else { Value::Null };
            let body = with(body, json!({"session_id": session, "initial_state": initial}));
            heads.push(before.ok(path, body).await.state_id());
        }
    }
    assert_eq!(beginnings(&store, "named").await, [Some(Some("poet".into())), None]);
    assert_eq!(beginnings(&store, "unnamed").await, [Some(None), None]);

    let next = |session: &str| with(ways()[0].1.clone(), json!({"session_id": session, "max_tokens": 3}));
    let renamed = files.served(&[("bard", &files.poet)], None);
    let gone = files.served(&[], None);
    let other = files.served(&[("poet", &files.lawyer)], None);
    let own = files.served(&[("poet", &files.poet)], Some(&files.lawyer));
    // As long as the snapshot is there, nobody asks where it came from.
    let fork = json!({"state_id": heads[1], "prompt": " and", "temperature": 0, "max_tokens": 5, "store_state": false});
    let expected = before.ok(COMPLETIONS, fork.clone()).await.answer();
    for config in [&gone, &other, &own] {
        assert_eq!(client(config, &store).ok(COMPLETIONS, fork.clone()).await.answer(), expected);
    }

    for head in [&heads[1], &heads[3]] {
        assert_eq!(before.delete(&format!("/v1/states/{head}")).await.status, 200);
    }
    for (config, session, why) in [
        (&gone, "named", "`poet`, which is not configured any more"),
        (&other, "named", "`poet`, which has other contents now"),
        (&own, "unnamed", "the model's own initial state"),
    ] {
        let reply = client(config, &store).post(COMPLETIONS, next(session)).await;
        assert_eq!((reply.status, reply.code().as_str()), (409, "initial_state_mismatch"), "{}", reply.text);
        assert_eq!(
            (reply.error()["param"].as_str(), reply.header("x-should-retry")),
            (Some("session_id"), Some("false"))
        );
        assert!(reply.text.contains(why), "{}", reply.text);
    }
    // The values decide, whatever they are called by now.
    let answer = client(&renamed, &store).ok(COMPLETIONS, next("named")).await;
    assert_eq!(answer.json()["state"]["turn"], 3);
    client(&gone, &store).ok(COMPLETIONS, next("unnamed")).await;
}

#[tokio::test]
async fn a_repeated_key_must_name_the_same_beginning() {
    let files = Files::v7();
    let client = client(&files.both(), &Arc::new(InMemory::default()));
    for (path, body) in ways() {
        let session = format!("again-{}", path.len());
        let begin = with(poet(&body), json!({ "session_id": session }));
        let key = [("idempotency-key", "k1")];
        let first = client.post_with(path, &key, begin.clone()).await;
        assert_eq!(first.status, 200, "{}", first.text);
        assert_eq!(client.post_with(path, &key, begin.clone()).await.json(), first.json());
        for other in [Value::Null, json!("lawyer"), json!("novelist")] {
            let reply = client.post_with(path, &key, with(begin.clone(), json!({ "initial_state": other }))).await;
            refused(&reply, "idempotency-key");
        }
    }
}

#[test]
fn a_file_that_is_no_initial_state_of_the_model_is_named() {
    let files = Files::v7();
    let loaded = |config: &Config| load_models(config, &|_, _, _| {}).map(|_| ());
    let whole = files.served(&[("poet", &files.poet), ("whole", &files.model)], None);
    let half: HashMap<_, _> = load(&files.poet).into_iter().filter(|(name, _)| name.starts_with("blocks.0.")).collect();
    let file = files.folder.path().join("half.safetensors");
    save(&half, &file);
    let half = files.served(&[("half", &file)], None);
    let mut early = files.both();
    early.model[0].file = Some(case("v5_2_bf16").join("model.safetensors"));
    for (config, names) in [
        (&whole, ["`whole`", "time_state"]),
        (&half, ["`half`", "blocks.1.att.time_state"]),
        (&early, ["`poet`", "no part of a v5.2 model"]),
    ] {
        let error = format!("{:#}", loaded(config).expect_err("it does not fit"));
        assert!(names.iter().all(|name| error.contains(name)), "{error}");
    }
    let missing = files.served(&[("poet", Path::new("/not/there.pth"))], None);
    let error = rewake::app::check(&missing).expect_err("there is no such file");
    assert!(format!("{error:#}").contains("/not/there.pth"));
    rewake::app::check(&files.both()).expect("all files are there");
}

#[tokio::test]
async fn a_flag_gives_the_state_of_all_sequences() {
    let files = Files::v7();
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let (model, tokenizer, state) = (text(&files.model), files.tokenizer(), text(&files.poet));
    let flags = ["--model", &model, "--tokenizer", &tokenizer, "--profile", "world", "--state", &state];
    let process = Process::start(&files.folder.path().join("states"), &flags);
    let mut named = files.both();
    named.model[0].profile = Some(ProfileChoice::Named("world".into()));
    let expected = client(&named, &Arc::new(InMemory::default()));
    for (path, body) in ways() {
        assert_eq!(
            process.client().ok(path, body.clone()).await.answer(),
            expected.ok(path, poet(&body)).await.answer()
        );
    }
}
