//! One chat: what is typed becomes commands, or questions whose answers are shown as they come.

use std::{fs::File, io::Write, path::PathBuf, time::Instant};

use anyhow::{Context, Result, bail};
use conclave_serve::id;
use futures::StreamExt;
use reqwest::header::CONTENT_TYPE;

use super::{
    answer::Answer,
    command::{self, Command, Input},
    conversation::Conversation,
    endpoint::{Endpoint, Failure},
    screen::Screen,
    sse::SseParser,
    wire::{ChatRequest, Resume, StreamOptions},
};
use crate::commands::{Pauses, SamplingArgs, cause};

/// The owner that a server of ours gives for its models: it says token ids, and resumes.
const OURS: &str = "conclave";
/// Why a question cannot be taken back or up again.
const NOTHING: &str = "nothing was asked yet";

/// What every request of the chat has.
#[derive(Debug, Clone)]
pub struct Settings {
    pub model: Option<String>,
    pub sampling: SamplingArgs,
    pub max_tokens: Option<u32>,
    pub stop: Vec<String>,
    pub retries: u32,
}

/// A chat with one endpoint.
pub struct Session {
    endpoint: Endpoint,
    settings: Settings,
    model: String,
    /// Whether the server can go on with an answer whose stream broke.
    resumes: bool,
    conversation: Conversation,
    screen: Screen,
    /// Files that this chat wrote, which it may write again.
    saved: Vec<PathBuf>,
    /// How many models the server lists.
    models: usize,
}

/// What follows a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    GoOn,
    End,
}

/// How an answer ended.
enum Ending {
    Whole,
    /// By Ctrl-C.
    Stopped,
    Failed(Failure),
}

impl Session {
    /// Finds out whom it talks to.
    ///
    /// # Errors
    /// When nobody answers, or no model is named and the server lists none.
    pub async fn start(endpoint: Endpoint, settings: Settings, system: Option<String>, screen: Screen) -> Result<Self> {
        let listed = match endpoint.models().await {
            // A server need not list its models where one is named.
            Err(Failure::Refused { status, .. }) if settings.model.is_some() && !matches!(status, 401 | 403) => {
                Vec::new()
            }
            listed => listed?,
        };
        let model = settings.model.clone().or_else(|| listed.first().map(|model| model.id.clone()));
        let model = model.with_context(|| format!("{} lists no models: --model names one", endpoint.base()))?;
        let ours = |owner: &Option<String>| owner.as_deref() == Some(OURS);
        let resumes = listed.iter().any(|listed| listed.id == model && ours(&listed.owned_by));
        let conversation = Conversation::new(system);
        let (models, saved) = (listed.len(), Vec::new());
        Ok(Self { endpoint, settings, model, resumes, conversation, screen, saved, models })
    }

    /// Whom it talks to, for people.
    pub fn greeting(&self) -> String {
        let more =
            if self.models > 1 { format!(", one of {} models (--model chooses)", self.models) } else { String::new() };
        format!("{} at {}{more}\n/help lists the commands", self.model, self.endpoint.base())
    }

    /// Where it is shown.
    pub fn screen(&mut self) -> &mut Screen {
        &mut self.screen
    }

    /// A line for a person: what goes wrong is shown, and Ctrl-C stops an answer.
    ///
    /// # Errors
    /// When nothing can be shown any more.
    pub async fn live(&mut self, typed: &str) -> Result<Flow> {
        match command::parse(typed) {
            Ok(Input::Exit) => return Ok(Flow::End),
            Ok(Input::Retry) if self.conversation.retry() => self.answer_live().await?,
            Ok(Input::Retry) => self.screen.error(NOTHING)?,
            Ok(Input::Command(command)) => self.command_live(command)?,
            Ok(Input::Message(text)) => {
                self.conversation.ask(text);
                self.answer_live().await?;
            }
            Ok(Input::Empty) => {}
            Err(wrong) => self.screen.error(&wrong)?,
        }
        Ok(Flow::GoOn)
    }

    /// A line of a script: what goes wrong ends it.
    ///
    /// # Errors
    /// When the command is wrong or the answer fails.
    pub async fn scripted(&mut self, typed: &str) -> Result<Flow> {
        match command::parse(typed).map_err(anyhow::Error::msg)? {
            Input::Exit => return Ok(Flow::End),
            Input::Retry if self.conversation.retry() => self.answer().await?,
            Input::Retry => bail!(NOTHING),
            Input::Command(command) => self.command(command).map(drop)?,
            Input::Message(text) => self.once(text).await?,
            Input::Empty => {}
        }
        Ok(Flow::GoOn)
    }

    /// Asks one question and shows its answer.
    ///
    /// # Errors
    /// When the answer fails.
    pub async fn once(&mut self, question: String) -> Result<()> {
        self.conversation.ask(question);
        self.answer().await
    }

    async fn answer(&mut self) -> Result<()> {
        let mut answer = Answer::start(self.resumes, Instant::now());
        let asked = self.ask(&mut answer).await;
        self.screen.end_answer()?;
        asked?;
        self.screen.aside(&answer.summary())?;
        self.conversation.answer(answer.into_text());
        Ok(())
    }

    async fn answer_live(&mut self) -> Result<()> {
        let mut answer = Answer::start(self.resumes, Instant::now());
        let ending = tokio::select! {
            asked = self.ask(&mut answer) => match asked.map_err(anyhow::Error::downcast::<Failure>) {
                Ok(()) => Ending::Whole,
                Err(Ok(failure)) => Ending::Failed(failure),
                Err(Err(error)) => return Err(error),
            },
            // Dropping the request closes its connection, which cancels it at the server.
            interrupted = tokio::signal::ctrl_c() => interrupted.map(|()| Ending::Stopped)?,
        };
        self.screen.end_answer()?;
        match ending {
            Ending::Whole => self.screen.aside(&answer.summary())?,
            Ending::Stopped => self.screen.aside(&format!("stopped after {}", answer.summary()))?,
            Ending::Failed(failure) => self.screen.error(&format!("{failure}; /retry asks again"))?,
        }
        self.conversation.answer(answer.into_text());
        Ok(())
    }

    fn command_live(&mut self, command: Command) -> Result<()> {
        match self.command(command) {
            Ok(done) => self.screen.aside(&done)?,
            Err(error) => self.screen.error(&format!("{error:#}"))?,
        }
        Ok(())
    }

    /// Does what a command says; what was done.
    fn command(&mut self, command: Command) -> Result<String> {
        Ok(match command {
            Command::Help => command::help(),
            Command::Clear => {
                self.conversation.clear();
                "a new conversation".to_owned()
            }
            Command::System(text) => {
                let said = if text.is_some() { "system message set" } else { "no system message" };
                self.conversation.set_system(text);
                said.to_owned()
            }
            Command::Undo => format!("forgotten: {}", self.conversation.undo().context(NOTHING)?),
            Command::Save(file) => self.save(file)?,
            Command::Seed(seed) => {
                self.settings.sampling.seed = seed;
                seed.map_or("a new seed each time".to_owned(), |seed| format!("seed {seed}"))
            }
            Command::Temperature(temperature) => {
                self.settings.sampling.temperature = temperature;
                temperature.map_or("the server's temperature".to_owned(), |value| format!("temperature {value}"))
            }
        })
    }

    /// Writes the messages to a new file, or to one that this chat wrote.
    fn save(&mut self, file: PathBuf) -> Result<String> {
        let named = || format!("/save {}", file.display());
        let mut opened = if self.saved.contains(&file) { File::create(&file) } else { File::create_new(&file) }
            .with_context(named)?;
        let messages = self.conversation.messages();
        serde_json::to_writer_pretty(&mut opened, &messages).with_context(named)?;
        opened.write_all(b"\n").with_context(named)?;
        let said = format!("{} messages written to {}", messages.len(), file.display());
        self.saved.push(file);
        Ok(said)
    }

    /// Asks the conversation's last question and shows the answer, over as many connections as it takes. Failures are
    /// [`Failure`]s.
    async fn ask(&mut self, answer: &mut Answer) -> Result<()> {
        let mut request = self.request()?;
        let mut pauses = Pauses::new(self.settings.retries);
        loop {
            let before = answer.tokens();
            let failure = match self.attempt(&request, answer).await {
                Ok(()) => return Ok(()),
                Err(error) => error.downcast::<Failure>()?,
            };
            let Some(resume) = answer.resume().filter(|_| may_pass(&failure)) else { return Err(failure.into()) };
            if answer.tokens() > before {
                pauses.reset();
            }
            let Some((pause, number)) = pauses.next() else { return Err(failure.into()) };
            let tries = format!("try {number} of {}", self.settings.retries);
            self.screen.notice(&format!("{failure}; going on after {} tokens ({tries})", answer.tokens()))?;
            request.resume = resume;
            tokio::time::sleep(pause).await;
        }
    }

    fn request(&self) -> Result<ChatRequest> {
        let Settings { sampling, max_tokens, stop, .. } = self.settings.clone();
        // To go on with an answer, its seed must be known: of 53 bits, as any JSON reader can take it.
        let drawn = if self.resumes { Some(id::random_u64().context("draw a seed")? >> 11) } else { None };
        Ok(ChatRequest {
            model: self.model.clone(),
            messages: self.conversation.messages(),
            stream: true,
            stream_options: StreamOptions { include_usage: true },
            sampling: SamplingArgs { seed: sampling.seed.or(drawn), ..sampling },
            max_tokens,
            stop,
            return_token_ids: self.resumes,
            resume: Vec::<Resume>::new(),
        })
    }

    /// One connection: takes in what comes and shows it.
    async fn attempt(&mut self, request: &ChatRequest, answer: &mut Answer) -> Result<()> {
        let response = self.endpoint.chat(request).await?;
        let json =
            response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
        if json {
            let body = response.text().await.map_err(|error| lost(&error))?;
            self.screen.text(&answer.take(&body, Instant::now())?)?;
            return Ok(answer.end()?);
        }
        let (mut pieces, mut parser) = (response.bytes_stream(), SseParser::default());
        while let Some(piece) = pieces.next().await {
            let piece = match piece {
                Ok(piece) => piece,
                // All of the answer may have come before.
                Err(error) => return Ok(answer.end().map_err(|_| lost(&error))?),
            };
            for data in parser.push(&piece).map_err(Failure::Wrong)? {
                let text = answer.take(&data, Instant::now())?;
                self.screen.text(&text)?;
                if answer.complete() {
                    return Ok(());
                }
            }
        }
        Ok(answer.end()?)
    }
}

fn lost(error: &reqwest::Error) -> Failure {
    Failure::Lost(format!("connection lost: {}", cause(error)))
}

/// Whether a server may go on a little later.
fn may_pass(failure: &Failure) -> bool {
    matches!(failure, Failure::Lost(_) | Failure::Refused { status: 429 | 503, .. })
}
