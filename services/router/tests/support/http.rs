//! A plain HTTP client: version 1.0, so that an answer ends with its connection.

use std::time::Duration;

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

const PATIENCE: Duration = Duration::from_secs(30);

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    head: String,
    pub(crate) text: String,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        Self { status, head: head.to_ascii_lowercase(), text: body.to_owned() }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let line = self.head.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
        line.map(str::trim)
    }

    /// The data of server-sent events.
    pub(crate) fn events(&self) -> Vec<&str> {
        self.text.lines().filter_map(|line| line.strip_prefix("data: ")).collect()
    }

    /// The chunks before `[DONE]`.
    pub(crate) fn chunks(&self) -> Vec<Value> {
        let events = self.events();
        let (last, chunks) = events.split_last().expect("events");
        assert_eq!(*last, "[DONE]");
        chunks.iter().map(|chunk| serde_json::from_str(chunk).expect("JSON")).collect()
    }

    /// Status, message, param and code of an error.
    pub(crate) fn error(&self) -> (u16, String, Option<String>, Option<String>) {
        let error = &self.json()["error"];
        assert!(error["type"].is_string(), "{error}");
        let text = |name: &str| error[name].as_str().map(str::to_owned);
        (self.status, text("message").expect("a message"), text("param"), text("code"))
    }
}

/// One connection: one request, one answer.
pub(crate) struct Connection(TcpStream);

impl Connection {
    pub(crate) async fn send(address: &str, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Self {
        let mut stream = TcpStream::connect(address).await.expect("a listener");
        let mut head = format!("{method} {path} HTTP/1.0\r\nhost: test\r\ncontent-length: {}\r\n", body.len());
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        stream.write_all(format!("{head}\r\n").as_bytes()).await.expect("open");
        stream.write_all(body).await.expect("the whole body is taken");
        Self(stream)
    }

    pub(crate) async fn answer(mut self) -> Answer {
        let mut bytes = Vec::new();
        timeout(PATIENCE, self.0.read_to_end(&mut bytes)).await.expect("an answer in time").expect("readable");
        Answer::parse(&bytes)
    }

    /// Reads until `text` has come.
    pub(crate) async fn read_until(&mut self, text: &str) {
        let mut read = String::new();
        while !read.contains(text) {
            let mut part = [0; 4096];
            let n = timeout(PATIENCE, self.0.read(&mut part)).await.expect("data in time").expect("readable");
            assert!(n > 0, "ended before {text:?}: {read}");
            read.push_str(&String::from_utf8_lossy(&part[..n]));
        }
    }
}

impl super::Router {
    pub(crate) async fn get(&self, path: &str) -> Answer {
        Connection::send(&self.http, "GET", path, &[], b"").await.answer().await
    }

    pub(crate) async fn post(&self, path: &str, body: &str) -> Answer {
        self.begin(path, body).await.answer().await
    }

    /// Sends a request without waiting for its answer.
    pub(crate) async fn begin(&self, path: &str, body: &str) -> Connection {
        Connection::send(&self.http, "POST", path, &[("content-type", "application/json")], body.as_bytes()).await
    }
}
