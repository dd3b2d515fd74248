//! `rewake health`: for the health checks of containers, whose images have no HTTP client.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, ensure};

/// A server that lives answers within this.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the server listens
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    url: String,
}

/// Succeeds when the server answers `GET /health` with 200.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let status = status(&args.url).with_context(|| format!("no answer from {}", args.url))?;
    ensure!(status.split(' ').nth(1) == Some("200"), "{} answered `{}`", args.url, status.trim_end());
    Ok(())
}

/// The status line of the answer.
fn status(url: &str) -> anyhow::Result<String> {
    let authority = url.strip_prefix("http://").context("the URL must begin with http://")?.trim_end_matches('/');
    let address = authority.to_socket_addrs()?.next().context("the name has no address")?;
    let mut connection = TcpStream::connect_timeout(&address, PATIENCE)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.set_write_timeout(Some(PATIENCE))?;
    write!(connection, "GET /health HTTP/1.1\r\nhost: {authority}\r\nconnection: close\r\n\r\n")?;
    let mut line = String::new();
    BufReader::new(connection.take(200)).read_line(&mut line)?;
    Ok(line)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// What the check says of a server that answers so, and what the server was asked.
    fn check(answer: &'static str) -> (Result<(), String>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let server = thread::spawn(move || {
            let (connection, _) = listener.accept().unwrap();
            let mut asked = String::new();
            let mut lines = BufReader::new(&connection);
            while !asked.ends_with("\r\n\r\n") {
                lines.read_line(&mut asked).unwrap();
            }
            (&connection).write_all(answer.as_bytes()).unwrap();
            asked
        });
        let result = run(&Args { url }).map_err(|e| format!("{e:#}"));
        (result, server.join().unwrap())
    }

    #[test]
    fn a_server_that_answers_200_is_alive() {
        let (result, asked) = check("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
        assert_eq!(result, Ok(()));
        assert!(asked.starts_with("GET /health HTTP/1.1\r\nhost: 127.0.0.1:"), "{asked}");
    }

    #[test]
    fn every_other_answer_is_a_failure_that_says_why() {
        for (answer, says) in [
            ("HTTP/1.1 503 Service Unavailable\r\n\r\n", "`HTTP/1.1 503 Service Unavailable`"),
            ("", "answered ``"),
            ("200", "answered `200`"),
        ] {
            let error = check(answer).0.unwrap_err();
            assert!(error.contains(says), "{answer:?}: {error}");
        }
    }

    #[test]
    fn no_server_is_a_failure() {
        // Nobody listens on port 1.
        for url in ["http://127.0.0.1:1", "https://127.0.0.1:1", "http://127.0.0.1"] {
            let error = run(&Args { url: url.into() }).unwrap_err().to_string();
            assert!(error.contains(&format!("no answer from {url}")), "{error}");
        }
    }
}
