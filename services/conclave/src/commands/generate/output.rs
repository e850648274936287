//! What is shown of an answer: text, or JSON lines.

use std::{
    io::{self, Write},
    time::Instant,
};

use conclave_proto::v1::{Delta, FinishReason, Finished, GenerateEvent, ScoredToken, Started, generate_event::Event};
use serde_json::{Value, json};

use crate::commands::{Speed, say};

/// From events to the characters to write.
#[derive(Debug)]
pub enum Printer {
    /// The choices' texts, one after another.
    Text(TextPrinter),
    /// One object a line.
    Json,
}

/// Writes the text of the first unfinished choice as it comes, and keeps that of the others until it is their turn.
#[derive(Debug)]
pub struct TextPrinter {
    choices: Vec<Choice>,
    /// The choice whose text is written now.
    current: usize,
}

#[derive(Debug, Default)]
struct Choice {
    /// Not written yet.
    text: String,
    /// The last character that was written.
    last: Option<char>,
    finished: bool,
}

impl Printer {
    /// Text of so many choices; several get a heading each.
    pub fn text(choices: u32) -> Self {
        Self::Text(TextPrinter { choices: (0..choices).map(|_| Choice::default()).collect(), current: 0 })
    }

    /// JSON lines.
    pub fn json() -> Self {
        Self::Json
    }

    /// The characters that an event leads to.
    pub fn print(&mut self, event: &GenerateEvent) -> String {
        let GenerateEvent { choice, event: Some(inner) } = event else { return String::new() };
        match self {
            Self::Text(printer) => printer.print(*choice as usize, inner),
            Self::Json => format!("{}\n", object(*choice, inner)),
        }
    }
}

impl TextPrinter {
    fn print(&mut self, choice: usize, event: &Event) -> String {
        let (several, Some(of)) = (self.choices.len() > 1, self.choices.get_mut(choice)) else { return String::new() };
        match event {
            Event::Started(_) if several => return heading(0),
            Event::Started(_) | Event::Prompt(_) => return String::new(),
            Event::Delta(delta) => of.text.push_str(&delta.text),
            Event::Finished(_) => of.finished = true,
        }
        self.ready()
    }

    /// What may be written now.
    fn ready(&mut self) -> String {
        let mut out = String::new();
        let all = self.choices.len();
        while let Some(choice) = self.choices.get_mut(self.current) {
            choice.last = choice.text.chars().next_back().or(choice.last);
            out.push_str(&std::mem::take(&mut choice.text));
            if !choice.finished {
                break;
            }
            if choice.last != Some('\n') {
                out.push('\n');
            }
            self.current += 1;
            if self.current < all {
                out.push_str(&heading(self.current));
            }
        }
        out
    }
}

fn heading(choice: usize) -> String {
    format!("--- choice {choice} ---\n")
}

fn object(choice: u32, event: &Event) -> Value {
    match event {
        Event::Started(Started { request_id, seed, prompt_tokens, model }) => json!({
            "event": "started", "request_id": request_id, "model": model, "seed": seed, "prompt_tokens": prompt_tokens,
        }),
        Event::Prompt(scores) => json!({"event": "prompt", "choice": choice, "tokens": tokens(&scores.tokens)}),
        Event::Delta(delta) => {
            json!({"event": "delta", "choice": choice, "text": delta.text, "tokens": tokens(&delta.tokens)})
        }
        Event::Finished(finished) => finish(choice, finished),
    }
}

fn finish(choice: u32, finished: &Finished) -> Value {
    let usage = finished.usage.unwrap_or_default();
    json!({
        "event": "finished",
        "choice": choice,
        "reason": reason(finished),
        "stop": finished.stop,
        "stop_token": finished.stop_token,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        "exact": finished.exact,
    })
}

fn reason(finished: &Finished) -> &'static str {
    if finished.reason() == FinishReason::Length { "length" } else { "stop" }
}

/// Logprobs as the shortest numbers that are the same `f32`.
fn tokens(tokens: &[ScoredToken]) -> Vec<Value> {
    let float = |logprob: f32| logprob.to_string().parse::<f64>().ok();
    let top = |token: &ScoredToken| -> Vec<Value> {
        let entries = token.top.iter();
        entries.map(|top| json!({"id": top.token, "logprob": float(top.logprob), "rank": top.rank})).collect()
    };
    let scored = |token: &ScoredToken| match token.logprob {
        Some(logprob) => json!({
            "id": token.token, "position": token.position, "logprob": float(logprob), "top": top(token),
        }),
        None => json!({"id": token.token, "position": token.position}),
    };
    tokens.iter().map(scored).collect()
}

/// Whether people read what is written.
#[derive(Debug, Clone, Copy)]
pub struct Terminals {
    /// The answer.
    pub out: bool,
    /// What is said besides.
    pub err: bool,
}

/// Writes an answer as it comes.
pub struct Output<W> {
    out: W,
    printer: Printer,
    terminals: Terminals,
    /// Whether a line of the answer has begun.
    mid_line: bool,
    speed: Speed,
    seed: u64,
}

impl<W: Write> Output<W> {
    /// Writes to `out`. A person gets a line of figures on standard error.
    pub fn new(out: W, printer: Printer, terminals: Terminals) -> Self {
        Self { out, printer, terminals, mid_line: false, speed: Speed::start(Instant::now()), seed: 0 }
    }

    /// Writes what an event leads to.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn event(&mut self, event: &GenerateEvent) -> io::Result<()> {
        match &event.event {
            Some(Event::Started(started)) => self.seed = started.seed,
            Some(Event::Delta(Delta { tokens, .. })) => self.speed.came(tokens.len(), Instant::now()),
            _ => {}
        }
        let text = self.printer.print(event);
        self.mid_line = text.chars().next_back().map_or(self.mid_line, |last| last != '\n');
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    /// Says something besides the answer.
    pub fn note(&mut self, text: &str) {
        self.begin_note();
        say(format_args!("conclave: {text}"));
    }

    /// Where answer and notes share a terminal, a note gets a line of its own.
    pub fn begin_note(&mut self) {
        if self.terminals.out && self.terminals.err && std::mem::take(&mut self.mid_line) {
            say("");
        }
    }

    /// The answer has come.
    pub fn end(&mut self) {
        if self.terminals.err {
            self.note(&format!("{} · seed {}", self.speed.summary(), self.seed));
        }
    }
}

#[cfg(test)]
mod tests {
    use conclave_proto::v1::{PromptScores, TokenLogprob, Usage};

    use super::*;

    fn delta(choice: u32, text: &str) -> GenerateEvent {
        let delta = Delta { text: text.to_owned(), tokens: Vec::new() };
        GenerateEvent { choice, event: Some(Event::Delta(delta)) }
    }

    fn finished(choice: u32) -> GenerateEvent {
        GenerateEvent { choice, event: Some(Event::Finished(Finished::default())) }
    }

    fn started() -> GenerateEvent {
        let started = Started { request_id: "r".into(), seed: u64::MAX, prompt_tokens: vec![1], model: "m".into() };
        GenerateEvent { choice: 0, event: Some(Event::Started(started)) }
    }

    #[test]
    fn one_choice_is_its_text_and_a_line_end() {
        let mut printer = Printer::text(1);
        let written = [started(), delta(0, "a"), delta(0, ""), delta(0, "b"), finished(0)].map(|e| printer.print(&e));
        assert_eq!(written, ["", "a", "", "b", "\n"]);
        let mut printer = Printer::text(1);
        assert_eq!([delta(0, "a\n"), delta(0, ""), finished(0)].map(|e| printer.print(&e)), ["a\n", "", ""]);
    }

    #[test]
    fn choices_come_one_after_another() {
        let mut printer = Printer::text(3);
        let events = [started(), delta(1, "b"), delta(0, "a"), finished(2), finished(0), delta(1, "B\n"), finished(1)];
        let written = events.map(|event| printer.print(&event));
        let expected = ["--- choice 0 ---\n", "", "a", "", "\n--- choice 1 ---\nb", "B\n", "--- choice 2 ---\n\n"];
        assert_eq!(written, expected);
    }

    #[test]
    fn every_event_is_a_json_line() {
        let mut printer = Printer::json();
        let top = vec![TokenLogprob { token: 6, logprob: -0.1, rank: 1 }];
        let token = ScoredToken { token: 5, position: 2, logprob: Some(-1.3), top };
        let scored = Delta { text: "é\n".to_owned(), tokens: vec![token] };
        let plain = PromptScores { tokens: vec![ScoredToken { token: 1, ..ScoredToken::default() }] };
        let usage = Usage { prompt_tokens: 1, completion_tokens: 1, cached_tokens: 0 };
        let length = Finished { reason: FinishReason::Length.into(), usage: Some(usage), ..Finished::default() };
        let of = |event| GenerateEvent { choice: 1, event: Some(event) };
        let events = [started(), of(Event::Prompt(plain)), of(Event::Delta(scored)), of(Event::Finished(length))];
        let lines: String = events.iter().map(|event| printer.print(event)).collect();
        let parsed: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        let expected = json!([
            {"event": "started", "request_id": "r", "model": "m", "seed": u64::MAX, "prompt_tokens": [1]},
            {"event": "prompt", "choice": 1, "tokens": [{"id": 1, "position": 0}]},
            {"event": "delta", "choice": 1, "text": "é\n", "tokens": [
                {"id": 5, "position": 2, "logprob": -1.3, "top": [{"id": 6, "logprob": -0.1, "rank": 1}]},
            ]},
            {"event": "finished", "choice": 1, "reason": "length", "stop": null, "stop_token": null, "exact": false,
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0}},
        ]);
        assert_eq!(Value::Array(parsed), expected);
    }
}
