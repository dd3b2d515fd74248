//! Metrics as typed functions: a caller cannot misspell a name or forget a label.
//!
//! Before [`install`] every function does nothing. A call costs one look-up in a sharded map (about 0.1 µs).

use std::sync::OnceLock;
use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
pub use metrics_exporter_prometheus::PrometheusHandle;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};

use super::Error;

const REQUESTS: &str = "rewake_requests_total";
const REQUEST_DURATION: &str = "rewake_request_duration_seconds";
const TURNS: &str = "rewake_turns_total";
const TOKENS_PROMPT: &str = "rewake_prompt_tokens_total";
const TOKENS_CACHED: &str = "rewake_cached_tokens_total";
const TOKENS_COMPLETION: &str = "rewake_completion_tokens_total";
const FIRST_TOKEN: &str = "rewake_time_to_first_token_seconds";
const BETWEEN_TOKENS: &str = "rewake_time_between_tokens_seconds";
const QUEUE_WAITING: &str = "rewake_queue_waiting";
const SEATS_RUNNING: &str = "rewake_seats_running";
const SEATS_TOTAL: &str = "rewake_seats_total";
const DRAFTED: &str = "rewake_drafted_tokens_total";
const DRAFTED_RIGHT: &str = "rewake_drafted_tokens_accepted_total";
const STEPS: &str = "rewake_steps_total";
const STEP_TOKENS: &str = "rewake_step_tokens_total";
const STEP_DURATION: &str = "rewake_step_duration_seconds";
const STATES_STORED: &str = "rewake_states_stored_total";
const STATES_FAILED: &str = "rewake_states_failed_total";
const STATE_STORE_DURATION: &str = "rewake_state_store_duration_seconds";
const STATE_BYTES: &str = "rewake_state_stored_bytes_total";
const STATES_REBUILT: &str = "rewake_states_rebuilt_total";
const SWEPT: &str = "rewake_swept_total";
const PARKED: &str = "rewake_parked_jobs";
const PARKED_BYTES: &str = "rewake_parked_bytes";
const PREFIX_LOOKUPS: &str = "rewake_prefix_lookups_total";
const PREFIX_TOKENS: &str = "rewake_prefix_tokens_total";
const PREFIX_WAITS: &str = "rewake_prefix_waits_total";
const PREFIX_SPACING: &str = "rewake_prefix_spacing_tokens";
const PREFIX_BYTES: &str = "rewake_prefix_bytes";
const PREFIX_STATES: &str = "rewake_prefix_states";
const PREFIX_EVICTIONS: &str = "rewake_prefix_evictions_total";
const PREFIX_DISK_BYTES: &str = "rewake_prefix_disk_bytes";
const PREFIX_DISK_STATES: &str = "rewake_prefix_disk_states";
const PREFIX_DISK_HITS: &str = "rewake_prefix_disk_hits_total";
const PREFIX_DISK_WRITTEN: &str = "rewake_prefix_disk_written_total";
const PREFIX_DISK_LOST: &str = "rewake_prefix_disk_lost_total";
const PREFIX_DISK_DAMAGED: &str = "rewake_prefix_disk_damaged_total";
const PREFIX_DISK_EVICTIONS: &str = "rewake_prefix_disk_evictions_total";
const STREAMS_ACTIVE: &str = "rewake_streams_active";

/// Upper bounds in seconds, from a step of a tiny model to a very long answer.
const BUCKETS: [f64; 18] =
    [0.0001, 0.0003, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// How often samples are folded into buckets when nobody scrapes.
const UPKEEP: Duration = Duration::from_secs(5);

/// Installs the process's recorder, once, and returns what renders the Prometheus text.
///
/// Later calls return the same handle, so that several servers may live in one process.
pub fn install() -> Result<PrometheusHandle, Error> {
    static INSTALLED: OnceLock<Result<PrometheusHandle, String>> = OnceLock::new();
    INSTALLED.get_or_init(recorder).clone().map_err(Error::Metrics)
}

fn recorder() -> Result<PrometheusHandle, String> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &BUCKETS)
        .and_then(PrometheusBuilder::install_recorder)
        .map_err(|e| e.to_string())?;
    describe();
    // The recorder keeps raw samples until they are folded; an unscraped server must not grow.
    let upkeep = handle.clone();
    let run = move || loop {
        std::thread::sleep(UPKEEP);
        upkeep.run_upkeep();
    };
    std::thread::Builder::new().name("metrics".into()).spawn(run).map_err(|e| e.to_string())?;
    Ok(handle)
}

fn describe() {
    describe_counter!(REQUESTS, Unit::Count, "HTTP requests by method, route and status.");
    describe_histogram!(REQUEST_DURATION, Unit::Seconds, "Time from a request's head to the last byte of its reply.");
    describe_counter!(TURNS, Unit::Count, "Turns by outcome: ok, cancelled or failed.");
    describe_counter!(TOKENS_PROMPT, Unit::Count, "Tokens of the contexts that answers were conditioned on.");
    describe_counter!(TOKENS_CACHED, Unit::Count, "Those prompt tokens that were not computed again.");
    describe_counter!(TOKENS_COMPLETION, Unit::Count, "Tokens generated.");
    describe_histogram!(FIRST_TOKEN, Unit::Seconds, "Time from a request's head to its first text.");
    describe_histogram!(BETWEEN_TOKENS, Unit::Seconds, "Time between two pieces of text of one choice.");
    describe_gauge!(QUEUE_WAITING, Unit::Count, "Sequences admitted and waiting for a seat.");
    describe_gauge!(SEATS_RUNNING, Unit::Count, "Seats of the batch in use.");
    describe_gauge!(SEATS_TOTAL, Unit::Count, "Seats of the batch.");
    describe_counter!(DRAFTED, Unit::Count, "Tokens read as a draft before they were sampled.");
    describe_counter!(DRAFTED_RIGHT, Unit::Count, "Those of them that were sampled indeed.");
    describe_counter!(STEPS, Unit::Count, "Forward steps of the model.");
    describe_counter!(STEP_TOKENS, Unit::Count, "Tokens read by forward steps.");
    describe_histogram!(STEP_DURATION, Unit::Seconds, "Time of one forward step, sampling included.");
    describe_gauge!(PARKED, Unit::Count, "Answers that wait, without a seat, for a reader who was lost.");
    describe_gauge!(PARKED_BYTES, Unit::Bytes, "Bytes of the states of parked answers.");
    describe_counter!(STATES_STORED, Unit::Count, "States made durable.");
    describe_counter!(STATES_FAILED, Unit::Count, "States that could not be stored though their answer arrived.");
    describe_histogram!(STATE_STORE_DURATION, Unit::Seconds, "Time to make one state durable.");
    describe_counter!(STATE_BYTES, Unit::Bytes, "Bytes of states made durable.");
    describe_counter!(STATES_REBUILT, Unit::Count, "Lost or evicted states rebuilt from the token log.");
    describe_counter!(SWEPT, Unit::Count, "What the background sweep removed or set aside, by what it was.");
    describe_counter!(PREFIX_LOOKUPS, Unit::Count, "Texts looked up in the prefix cache by outcome: hit or miss.");
    describe_counter!(PREFIX_TOKENS, Unit::Count, "Tokens that the prefix cache saved reading.");
    describe_counter!(
        PREFIX_WAITS,
        Unit::Count,
        "Times a text waited for another request that was reading its beginning."
    );
    describe_gauge!(PREFIX_SPACING, Unit::Count, "Tokens between the first regular checkpoints of the last text.");
    describe_gauge!(PREFIX_BYTES, Unit::Bytes, "Bytes the prefix cache takes.");
    describe_gauge!(PREFIX_STATES, Unit::Count, "States in the prefix cache.");
    describe_counter!(PREFIX_EVICTIONS, Unit::Count, "States the prefix cache gave up for want of room.");
    describe_gauge!(PREFIX_DISK_BYTES, Unit::Bytes, "Bytes of the prefix cache's files on disk.");
    describe_gauge!(PREFIX_DISK_STATES, Unit::Count, "States of the prefix cache on disk.");
    describe_counter!(
        PREFIX_DISK_HITS,
        Unit::Count,
        "Texts of which the prefix cache found a longer beginning on disk."
    );
    describe_counter!(PREFIX_DISK_WRITTEN, Unit::Count, "States the prefix cache wrote to disk.");
    describe_counter!(
        PREFIX_DISK_LOST,
        Unit::Count,
        "States that could not be written to disk, or not quickly enough."
    );
    describe_counter!(PREFIX_DISK_DAMAGED, Unit::Count, "Files of the prefix cache that were not what they should be.");
    describe_counter!(PREFIX_DISK_EVICTIONS, Unit::Count, "Files the prefix cache removed for want of room.");
    describe_gauge!(STREAMS_ACTIVE, Unit::Count, "Event streams being written.");
}

/// An HTTP request is over. `route` is the pattern that matched, never the raw path.
pub fn request(method: &str, route: &str, status: u16, took: Duration) {
    let (method, route) = (method.to_owned(), route.to_owned());
    counter!(REQUESTS, "method" => method, "route" => route.clone(), "status" => status.to_string()).increment(1);
    histogram!(REQUEST_DURATION, "route" => route).record(took);
}

/// A turn is over; `outcome` is `ok`, `cancelled` or `failed`.
pub fn turn(model: &str, outcome: &'static str) {
    counter!(TURNS, "model" => model.to_owned(), "outcome" => outcome).increment(1);
}

/// Tokens of one turn.
pub fn tokens(model: &str, prompt: u64, cached: u64, completion: u64) {
    counter!(TOKENS_PROMPT, "model" => model.to_owned()).increment(prompt);
    counter!(TOKENS_CACHED, "model" => model.to_owned()).increment(cached);
    counter!(TOKENS_COMPLETION, "model" => model.to_owned()).increment(completion);
}

/// The first text of a request is there.
pub fn time_to_first_token(model: &str, took: Duration) {
    histogram!(FIRST_TOKEN, "model" => model.to_owned()).record(took);
}

/// More text of a choice is there.
pub fn time_between_tokens(model: &str, took: Duration) {
    histogram!(BETWEEN_TOKENS, "model" => model.to_owned()).record(took);
}

/// How full an engine is now.
pub fn occupancy(model: &str, waiting: usize, running: usize, seats: usize) {
    gauge!(QUEUE_WAITING, "model" => model.to_owned()).set(waiting as f64);
    gauge!(SEATS_RUNNING, "model" => model.to_owned()).set(running as f64);
    gauge!(SEATS_TOTAL, "model" => model.to_owned()).set(seats as f64);
}

/// An engine made one forward step over `tokens` tokens.
pub fn step(model: &str, tokens: usize, took: Duration) {
    counter!(STEPS, "model" => model.to_owned()).increment(1);
    counter!(STEP_TOKENS, "model" => model.to_owned()).increment(tokens as u64);
    histogram!(STEP_DURATION, "model" => model.to_owned()).record(took);
}

/// How many jobs wait for their readers without a seat, and what their states take.
pub fn parked(model: &str, jobs: usize, bytes: u64) {
    gauge!(PARKED, "model" => model.to_owned()).set(jobs as f64);
    gauge!(PARKED_BYTES, "model" => model.to_owned()).set(bytes as f64);
}

/// A draft of one answer was compared with what was sampled.
pub fn speculation(model: &str, drafted: usize, right: usize) {
    counter!(DRAFTED, "model" => model.to_owned()).increment(drafted as u64);
    counter!(DRAFTED_RIGHT, "model" => model.to_owned()).increment(right as u64);
}

/// A state is durable.
pub fn state_stored(bytes: u64, took: Duration) {
    counter!(STATES_STORED).increment(1);
    counter!(STATE_BYTES).increment(bytes);
    histogram!(STATE_STORE_DURATION).record(took);
}

/// A state could not be kept.
pub fn state_failed() {
    counter!(STATES_FAILED).increment(1);
}

/// A state was rebuilt from the token log.
pub fn state_rebuilt() {
    counter!(STATES_REBUILT).increment(1);
}

/// The sweep removed `count` objects; `what` is `expired`, `orphan`, `set_aside`, `torn` or `buried`.
pub fn swept(what: &'static str, count: u64) {
    counter!(SWEPT, "what" => what).increment(count);
}

/// A text was looked up in the prefix cache; `saved` tokens of it are not read again, and 0 is a miss.
pub fn prefix_looked_up(model: &str, saved: u64, spacing: usize) {
    let outcome = if saved > 0 { "hit" } else { "miss" };
    counter!(PREFIX_LOOKUPS, "model" => model.to_owned(), "outcome" => outcome).increment(1);
    counter!(PREFIX_TOKENS, "model" => model.to_owned()).increment(saved);
    gauge!(PREFIX_SPACING, "model" => model.to_owned()).set(spacing as f64);
}

/// A text waits for another request that is reading its beginning.
pub fn prefix_waited(model: &str) {
    counter!(PREFIX_WAITS, "model" => model.to_owned()).increment(1);
}

/// What the prefix cache holds now, and how many states were just given up for it.
pub fn prefix_holds(bytes: u64, states: usize, evicted: u64) {
    gauge!(PREFIX_BYTES).set(bytes as f64);
    gauge!(PREFIX_STATES).set(states as f64);
    counter!(PREFIX_EVICTIONS).increment(evicted);
}

/// What the prefix cache has on disk now, and how many files were just removed for want of room.
pub fn prefix_disk_holds(bytes: u64, states: usize, evicted: u64) {
    gauge!(PREFIX_DISK_BYTES).set(bytes as f64);
    gauge!(PREFIX_DISK_STATES).set(states as f64);
    counter!(PREFIX_DISK_EVICTIONS).increment(evicted);
}

/// A longer beginning of a text than in memory was found on disk.
pub fn prefix_disk_hit(model: &str) {
    counter!(PREFIX_DISK_HITS, "model" => model.to_owned()).increment(1);
}

/// A state of the prefix cache is on disk.
pub fn prefix_disk_written() {
    counter!(PREFIX_DISK_WRITTEN).increment(1);
}

/// A state that the prefix cache gave up did not come to disk.
pub fn prefix_disk_lost() {
    counter!(PREFIX_DISK_LOST).increment(1);
}

/// A file of the prefix cache is not what its name says.
pub fn prefix_disk_damaged() {
    counter!(PREFIX_DISK_DAMAGED).increment(1);
}

/// Counts one event stream for as long as it lives.
#[derive(Debug)]
pub struct StreamOpen(());

impl StreamOpen {
    pub fn new() -> Self {
        gauge!(STREAMS_ACTIVE).increment(1.0);
        Self(())
    }
}

impl Default for StreamOpen {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for StreamOpen {
    fn drop(&mut self) {
        gauge!(STREAMS_ACTIVE).decrement(1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rendered value of the first series that begins with `series`.
    fn value(text: &str, series: &str) -> Option<f64> {
        text.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok())
    }

    #[test]
    fn what_is_recorded_is_rendered() {
        let handle = install().unwrap();
        let again = install().unwrap();
        let took = Duration::from_millis(20);
        request("POST", "/v1/test", 200, took);
        turn("m", "cancelled");
        tokens("m", 10, 4, 6);
        time_to_first_token("m", took);
        time_between_tokens("m", took);
        occupancy("m", 3, 2, 8);
        step("m", 5, took);
        parked("m", 2, 70);
        speculation("m", 7, 3);
        state_stored(1000, took);
        state_failed();
        prefix_looked_up("m", 7, 48);
        prefix_looked_up("m", 0, 48);
        prefix_waited("m");
        prefix_holds(5, 1, 1);
        let text = again.render();
        for (series, expected) in [
            (r#"rewake_requests_total{method="POST",route="/v1/test",status="200"}"#, 1.0),
            (r#"rewake_request_duration_seconds_bucket{route="/v1/test",le="0.01"}"#, 0.0),
            (r#"rewake_request_duration_seconds_bucket{route="/v1/test",le="0.025"}"#, 1.0),
            (r#"rewake_turns_total{model="m",outcome="cancelled"}"#, 1.0),
            (r#"rewake_prompt_tokens_total{model="m"}"#, 10.0),
            (r#"rewake_cached_tokens_total{model="m"}"#, 4.0),
            (r#"rewake_completion_tokens_total{model="m"}"#, 6.0),
            (r#"rewake_time_to_first_token_seconds_count{model="m"}"#, 1.0),
            (r#"rewake_time_between_tokens_seconds_count{model="m"}"#, 1.0),
            (r#"rewake_queue_waiting{model="m"}"#, 3.0),
            (r#"rewake_seats_running{model="m"}"#, 2.0),
            (r#"rewake_seats_total{model="m"}"#, 8.0),
            (r#"rewake_steps_total{model="m"}"#, 1.0),
            (r#"rewake_step_tokens_total{model="m"}"#, 5.0),
            (r#"rewake_parked_jobs{model="m"}"#, 2.0),
            (r#"rewake_parked_bytes{model="m"}"#, 70.0),
            (r#"rewake_drafted_tokens_total{model="m"}"#, 7.0),
            (r#"rewake_drafted_tokens_accepted_total{model="m"}"#, 3.0),
            (r#"rewake_prefix_lookups_total{model="m",outcome="hit"}"#, 1.0),
            (r#"rewake_prefix_lookups_total{model="m",outcome="miss"}"#, 1.0),
            (r#"rewake_prefix_tokens_total{model="m"}"#, 7.0),
            (r#"rewake_prefix_waits_total{model="m"}"#, 1.0),
            (r#"rewake_prefix_spacing_tokens{model="m"}"#, 48.0),
            (r#"rewake_step_duration_seconds_sum{model="m"}"#, 0.02),
        ] {
            assert_eq!(value(&text, series), Some(expected), "{series}\n{text}");
        }
        for series in ["rewake_states_stored_total", "rewake_states_failed_total"] {
            assert!(value(&text, series).is_some_and(|n| n >= 1.0), "{series}");
        }
        assert!(text.contains("# HELP rewake_prompt_tokens_total Tokens"));
        assert!(handle.render().contains("rewake_state_stored_bytes_total"));
    }
}
