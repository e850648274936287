//! From a prompt to token ids.

use conclave_proto::v1::{Message, Prompt, prompt};
use conclave_serve::{Error, ErrorKind};
use tokio::time::{Instant, timeout_at};

use super::{Front, resolve};

/// Most messages of a chat.
const MAX_MESSAGES: usize = 4096;
/// Roles that chat templates know.
const ROLES: [&str; 3] = ["system", "user", "assistant"];

impl Front {
    /// Checks a prompt and tokenises it off the request threads. `param` names it in errors.
    pub(super) async fn encode(
        &self,
        param: &str,
        prompt: Option<Prompt>,
        deadline: Instant,
    ) -> Result<Vec<u32>, Error> {
        let empty = || resolve::invalid(param, "nothing", "a text, a chat or token ids");
        let ids = match prompt.and_then(|prompt| prompt.prompt).ok_or_else(empty)? {
            prompt::Prompt::Tokens(tokens) => {
                resolve::check_ids(param, &tokens.ids, self.model.config.vocab)?;
                tokens.ids
            }
            prompt::Prompt::Text(text) => {
                check_text(param, &text, self.config.max_prompt_bytes)?;
                let codec = self.codec(param)?.clone();
                self.off_thread(deadline, move || codec.encode(&text)).await?
            }
            prompt::Prompt::Chat(chat) => {
                check_chat(&chat.messages, self.config.max_prompt_bytes)?;
                let codec = self.codec("messages")?.clone();
                self.off_thread(deadline, move || codec.encode_chat(&chat.messages)).await?
            }
        };
        if ids.is_empty() {
            return Err(resolve::invalid(param, "no tokens", "at least one"));
        }
        Ok(ids)
    }

    /// Runs `work` on the blocking pool, at most `tokenizer_threads` at a time.
    async fn off_thread<F>(&self, deadline: Instant, work: F) -> Result<Vec<u32>, Error>
    where
        F: FnOnce() -> Result<Vec<u32>, Error> + Send + 'static,
    {
        let late = |_| Error::new(ErrorKind::DeadlineExceeded, "deadline exceeded while the prompt was tokenised");
        let gone = |what: String| Error::new(ErrorKind::Internal, format!("tokenizer: {what}"));
        let done = async {
            let _permit = self.tokenizers.acquire().await.map_err(|e| gone(e.to_string()))?;
            tokio::task::spawn_blocking(work).await.map_err(|e| gone(e.to_string()))?
        };
        timeout_at(deadline, done).await.map_err(late)?
    }
}

fn check_text(param: &str, text: &str, most: usize) -> Result<(), Error> {
    match text.len() {
        0 => Err(resolve::invalid(param, "an empty text", "at least one character")),
        bytes if bytes > most => Err(too_large(param, bytes, most)),
        _ => Ok(()),
    }
}

fn check_chat(messages: &[Message], most: usize) -> Result<(), Error> {
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        let found = format!("{} messages", messages.len());
        return Err(resolve::invalid("messages", found, format!("1 to {MAX_MESSAGES}")));
    }
    if let Some((i, message)) = messages.iter().enumerate().find(|(_, message)| !ROLES.contains(&message.role.as_str()))
    {
        let param = format!("messages[{i}].role");
        return Err(resolve::invalid(&param, format!("{:?}", message.role), format!("one of {}", ROLES.join(", "))));
    }
    let bytes = messages.iter().map(|message| message.content.len()).sum();
    if bytes > most { Err(too_large("messages", bytes, most)) } else { Ok(()) }
}

fn too_large(param: &str, bytes: usize, most: usize) -> Error {
    resolve::invalid(param, format!("{bytes} bytes of text"), format!("at most {most}"))
}
