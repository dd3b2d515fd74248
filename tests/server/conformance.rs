//! An OpenAI client that knows nothing of this server understands everything it says.

use std::sync::Arc;

use async_openai::Client;
use async_openai::config::OpenAIConfig;
use async_openai::error::{ApiErrorResponse, OpenAIError};
use async_openai::types::chat::{
    ChatCompletionRequestAssistantMessage, ChatCompletionRequestMessage, ChatCompletionRequestSystemMessage,
    ChatCompletionRequestUserMessage, ChatCompletionStreamOptions, CompletionFinishReason,
    CreateChatCompletionRequestArgs, FinishReason, Role,
};
use async_openai::types::completions::CreateCompletionRequestArgs;
use async_openai::types::responses::{
    CreateConversationItemsRequest, CreateConversationRequest, CreateResponseArgs, EasyInputContent, EasyInputMessage,
    ResponseStreamEvent, Role as InputRole, Status,
};
use futures::StreamExt;
use rewake::api::{Key, KeyHash};
use rewake::config::Config;
use rewake::state::InMemory;
use rewake::types::Tenant;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::server::{Server, config, expected, prepare_clients};

const KEY: &str = "sk-conformance";

/// A served app, until it is dropped, and a client of it.
struct Served {
    client: Client<OpenAIConfig>,
    address: String,
    _stop: oneshot::Sender<()>,
}

async fn served() -> Served {
    let tenant = Tenant::parse("clients").expect("a good name");
    let key = vec![Key { name: "conformance".into(), hash: KeyHash::of(KEY), tenant }];
    let app = Server::app(&Config { key, ..config() }, Arc::new(InMemory::default()));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("an address").to_string();
    let (stop, stopped) = oneshot::channel::<()>();
    tokio::spawn(app.run(listener, async move { stopped.await.unwrap_or_default() }));
    Served { client: client(&address, KEY), address, _stop: stop }
}

fn client(address: &str, key: &str) -> Client<OpenAIConfig> {
    prepare_clients();
    Client::with_config(OpenAIConfig::new().with_api_base(format!("http://{address}/v1")).with_api_key(key))
}

fn prompt() -> (String, String, u32) {
    let expected = expected();
    let text = |key: &str| expected[key].as_str().expect("text").to_owned();
    (text("prompt"), text("greedy_text"), expected["greedy_ids"].as_array().expect("ids").len() as u32)
}

fn api_error<T: std::fmt::Debug>(result: Result<T, OpenAIError>) -> ApiErrorResponse {
    match result {
        Err(OpenAIError::ApiError(error)) => error,
        other => panic!("not an error of the API: {other:?}"),
    }
}

#[tokio::test]
async fn models() {
    let served = served().await;
    let list = served.client.models().list().await.expect("a list");
    assert_eq!((list.object.as_str(), list.data.len()), ("list", 1));
    let model = served.client.models().retrieve(&list.data[0].id).await.expect("a model");
    assert_eq!(model, list.data[0]);
    assert_eq!((model.id.as_str(), model.object.as_str()), ("stories", "model"));
    let error = api_error(served.client.models().retrieve("gpt-4o").await);
    assert_eq!((error.status_code.as_u16(), error.api_error.code.as_deref()), (404, Some("model_not_found")));
}

#[tokio::test]
async fn completions() {
    let served = served().await;
    let (prompt, text, tokens) = prompt();
    let mut request = CreateCompletionRequestArgs::default();
    request.model("stories").prompt(prompt.as_str()).max_tokens(tokens).temperature(0.0).seed(-3).user("someone");
    let reply = served.client.completions().create(request.build().expect("a request")).await.expect("a reply");
    assert_eq!((reply.object.as_str(), reply.model.as_str()), ("text_completion", "stories"));
    assert_eq!(reply.choices[0].text, text);
    assert_eq!(reply.choices[0].finish_reason, Some(CompletionFinishReason::Length));
    let usage = reply.usage.expect("usage");
    assert_eq!((usage.completion_tokens, usage.total_tokens), (tokens, usage.prompt_tokens + tokens));

    let include_usage = ChatCompletionStreamOptions { include_usage: Some(true), include_obfuscation: None };
    let streamed = request.stream_options(include_usage).build().expect("a request");
    let mut stream = served.client.completions().create_stream(streamed).await.expect("a stream");
    let (mut said, mut finish, mut counted) = (String::new(), None, None);
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.expect("a chunk");
        assert_eq!(chunk.object, "text_completion");
        counted = chunk.usage;
        for choice in chunk.choices {
            said += &choice.text;
            finish = choice.finish_reason.or(finish);
        }
    }
    assert_eq!((said, finish, counted), (text, Some(CompletionFinishReason::Length), Some(usage)));
}

#[tokio::test]
async fn several_prompts_and_choices() {
    let served = served().await;
    let mut request = CreateCompletionRequestArgs::default();
    request.model("stories").prompt(["The cat", "The dog"]).n(2).max_tokens(6u32).seed(4).stop(["zebra", "yak"]);
    let reply = served.client.completions().create(request.build().expect("a request")).await.expect("a reply");
    assert_eq!(reply.choices.iter().map(|choice| choice.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
    request.prompt(vec![417u32, 429, 259]);
    let by_ids = served.client.completions().create(request.build().expect("a request")).await.expect("a reply");
    assert_eq!((by_ids.choices.len(), by_ids.usage.expect("usage").prompt_tokens), (2, 3));
}

fn chat() -> CreateChatCompletionRequestArgs {
    let messages: Vec<ChatCompletionRequestMessage> = vec![
        ChatCompletionRequestSystemMessage::from("You tell stories.").into(),
        ChatCompletionRequestUserMessage::from("Hello!").into(),
        ChatCompletionRequestAssistantMessage::from("Hi.").into(),
        ChatCompletionRequestUserMessage::from("Tell me a story about a cat and a boat.").into(),
    ];
    let mut request = CreateChatCompletionRequestArgs::default();
    request.model("stories").messages(messages).temperature(0.0).max_completion_tokens(30u32);
    request
}

#[tokio::test]
async fn chats() {
    let served = served().await;
    let reply = served.client.chat().create(chat().build().expect("a request")).await.expect("a reply");
    assert_eq!((reply.object.as_str(), reply.model.as_str(), reply.choices.len()), ("chat.completion", "stories", 1));
    let choice = &reply.choices[0];
    assert_eq!((choice.message.role, choice.finish_reason), (Role::Assistant, Some(FinishReason::Length)));
    let content = choice.message.content.clone().expect("content");
    assert!(!content.is_empty() && choice.message.refusal.is_none());
    let usage = reply.usage.expect("usage");
    assert_eq!(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);

    let include_usage = ChatCompletionStreamOptions { include_usage: Some(true), include_obfuscation: None };
    let streamed = chat().stream_options(include_usage).build().expect("a request");
    let mut stream = served.client.chat().create_stream(streamed).await.expect("a stream");
    let (mut said, mut finish, mut roles, mut counted) = (String::new(), None, Vec::new(), None);
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.expect("a chunk");
        assert_eq!(chunk.object, "chat.completion.chunk");
        counted = chunk.usage;
        for choice in chunk.choices {
            said += choice.delta.content.as_deref().unwrap_or_default();
            roles.extend(choice.delta.role);
            finish = choice.finish_reason.or(finish);
        }
    }
    assert_eq!((said, finish), (content, Some(FinishReason::Length)));
    assert_eq!((roles, counted), (vec![Role::Assistant], Some(usage)));
}

fn ask(input: &str) -> CreateResponseArgs {
    let mut request = CreateResponseArgs::default();
    request.model("stories").input(input).temperature(0.0).max_output_tokens(12u32);
    request
}

#[tokio::test]
async fn responses() {
    let served = served().await;
    let responses = served.client.responses();
    let first = responses.create(ask("A dog?").build().expect("a request")).await.expect("a response");
    assert_eq!((first.object.as_str(), &first.status), ("response", &Status::Incomplete));
    let text = first.output_text().expect("text");
    let usage = first.usage.clone().expect("usage");
    assert_eq!((usage.output_tokens, usage.total_tokens), (12, usage.input_tokens + 12));
    assert_eq!(responses.retrieve(&first.id).await.expect("a response"), first);
    let items = responses.list_input_items(&first.id).await.expect("items");
    assert_eq!((items.data.len(), items.has_more), (1, false));

    let on = ask("And a cat?").previous_response_id(first.id.as_str()).build().expect("a request");
    let second = responses.create(on).await.expect("a response");
    assert!(second.usage.expect("usage").input_tokens_details.cached_tokens > 0);

    let mut stream = responses.create_stream(ask("A dog?").build().expect("a request")).await.expect("a stream");
    let (mut said, mut last) = (String::new(), None);
    let mut sequence = 0;
    while let Some(event) = stream.next().await {
        match event.expect("an event") {
            ResponseStreamEvent::ResponseOutputTextDelta(delta) => {
                sequence = delta.sequence_number;
                said += &delta.delta;
            }
            ResponseStreamEvent::ResponseIncomplete(end) => last = Some(end.response),
            _ => {}
        }
    }
    assert!(sequence > 4);
    assert_eq!((said.as_str(), last.expect("an end").output_text().as_deref()), (text.as_str(), Some(text.as_str())));

    let background = ask("A dog?").background(true).max_output_tokens(900_000u32).build().expect("a request");
    let begun = responses.create(background).await.expect("a response");
    let ended = responses.cancel(&begun.id).await.expect("a response");
    assert!([Status::Cancelled, Status::Completed].contains(&ended.status), "{:?}", ended.status);
    assert!(responses.delete(&first.id).await.expect("it is gone").deleted);
    let error = api_error(responses.retrieve(&first.id).await);
    assert_eq!((error.status_code.as_u16(), error.api_error.code.as_deref()), (404, Some("response_not_found")));
}

#[tokio::test]
async fn conversations() {
    let served = served().await;
    let message = |text: &str| {
        let content = EasyInputContent::Text(text.into());
        EasyInputMessage { role: InputRole::User, content, ..Default::default() }.into()
    };
    let items = Some(vec![message("Hello.")]);
    let conversations = served.client.conversations();
    let created = conversations.create(CreateConversationRequest { metadata: None, items }).await.expect("one");
    assert_eq!(created.object, "conversation");
    assert_eq!(conversations.retrieve(&created.id).await.expect("it is there"), created);
    let request = ask("A dog?").conversation(created.id.as_str()).build().expect("a request");
    let response = served.client.responses().create(request).await.expect("a response");
    assert_eq!(response.conversation.expect("its conversation").id, created.id);
    let items = conversations.items(&created.id);
    let added = CreateConversationItemsRequest { items: vec![message("Listen.")] };
    assert_eq!(items.create(added).await.expect("it is added").data.len(), 1);
    let list = items.list().await.expect("items");
    assert_eq!(list.data.len(), 4);
    let last = list.last_id.expect("an id");
    items.retrieve(&last).await.expect("an item");
    assert_eq!(items.delete(&last).await.expect("the conversation").id, created.id);
    assert_eq!(items.list().await.expect("items").data.len(), 3);
    assert!(conversations.delete(&created.id).await.expect("it is gone").deleted);
    let error = api_error(conversations.retrieve(&created.id).await);
    assert_eq!(error.status_code.as_u16(), 404);
}

#[tokio::test]
async fn errors() {
    let served = served().await;
    let status = |error: ApiErrorResponse| {
        let ApiErrorResponse { status_code, api_error } = error;
        (status_code.as_u16(), api_error.code.unwrap_or_default(), api_error.param)
    };
    let sent = served.client.chat().create(chat().model("gpt-4o").build().expect("a request")).await;
    assert_eq!(status(api_error(sent)), (404, "model_not_found".into(), Some("model".into())));
    let sent = served.client.chat().create(chat().temperature(3.0).build().expect("a request")).await;
    assert_eq!(status(api_error(sent)), (400, "invalid_value".into(), Some("temperature".into())));
    let sent = served.client.chat().create(chat().logprobs(true).build().expect("a request")).await;
    assert_eq!(status(api_error(sent)), (400, "unsupported_parameter".into(), Some("logprobs".into())));
    let stranger = client(&served.address, "sk-wrong");
    let sent = stranger.chat().create(chat().build().expect("a request")).await;
    assert_eq!(status(api_error(sent)), (401, "invalid_api_key".into(), None));
    // A refused stream is an error at once, or the first thing that is read of it.
    let refused = match stranger.chat().create_stream(chat().build().expect("a request")).await {
        Ok(mut stream) => stream.next().await.expect("an item").map(|_| ()),
        Err(error) => Err(error),
    };
    assert!(refused.is_err(), "{refused:?}");
}
