//! What has been said so far.

use serde::Serialize;

/// One message as the API has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    pub role: &'static str,
    pub content: String,
}

/// A question and, if one has come, its answer.
#[derive(Debug, Clone)]
struct Turn {
    question: String,
    answer: Option<String>,
}

/// A system message and turns. Only the last turn may lack its answer.
#[derive(Debug, Clone, Default)]
pub struct Conversation {
    system: Option<String>,
    turns: Vec<Turn>,
}

impl Conversation {
    /// An empty one.
    pub fn new(system: Option<String>) -> Self {
        Self { system, turns: Vec::new() }
    }

    /// Sets the system message, or takes it away.
    pub fn set_system(&mut self, system: Option<String>) {
        self.system = system;
    }

    /// Forgets everything but the system message.
    pub fn clear(&mut self) {
        self.turns.clear();
    }

    /// Asks something. A question before it that was not answered is forgotten.
    pub fn ask(&mut self, question: String) {
        self.turns.retain(|turn| turn.answer.is_some());
        self.turns.push(Turn { question, answer: None });
    }

    /// Takes the last question up again, without its answer; whether there is one.
    pub fn retry(&mut self) -> bool {
        self.turns.last_mut().map(|turn| turn.answer = None).is_some()
    }

    /// The answer to the last question, or the part of it that came. Nothing at all leaves it unanswered.
    pub fn answer(&mut self, answer: String) {
        if let Some(turn) = self.turns.last_mut().filter(|_| !answer.is_empty()) {
            turn.answer = Some(answer);
        }
    }

    /// Forgets the last turn; its question.
    pub fn undo(&mut self) -> Option<String> {
        self.turns.pop().map(|turn| turn.question)
    }

    /// The messages in order.
    pub fn messages(&self) -> Vec<Message> {
        let message = |role: &'static str, content: &String| Message { role, content: content.clone() };
        let turns = self.turns.iter().flat_map(|turn| {
            let answer = turn.answer.as_ref().map(|answer| message("assistant", answer));
            [Some(message("user", &turn.question)), answer].into_iter().flatten()
        });
        self.system.iter().map(|system| message("system", system)).chain(turns).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(conversation: &Conversation) -> Vec<String> {
        conversation.messages().iter().map(|message| format!("{}: {}", message.role, message.content)).collect()
    }

    fn two_turns() -> Conversation {
        let mut conversation = Conversation::new(Some("be brief".to_owned()));
        for (question, answer) in [("a", "A"), ("b", "B")] {
            conversation.ask(question.to_owned());
            conversation.answer(answer.to_owned());
        }
        conversation
    }

    #[test]
    fn messages_alternate_behind_the_system_message() {
        let mut conversation = two_turns();
        let all = ["system: be brief", "user: a", "assistant: A", "user: b", "assistant: B"];
        assert_eq!(said(&conversation), all);
        conversation.set_system(None);
        assert_eq!(said(&conversation), all[1..]);
    }

    #[test]
    fn an_unanswered_question_gives_way() {
        let mut conversation = two_turns();
        conversation.ask("lost".to_owned());
        conversation.answer(String::new());
        assert_eq!(said(&conversation).last().map(String::as_str), Some("user: lost"));
        conversation.ask("c".to_owned());
        assert_eq!(said(&conversation)[4..], ["assistant: B", "user: c"]);
    }

    #[test]
    fn turns_can_be_taken_back() {
        let mut conversation = two_turns();
        assert!(conversation.retry());
        assert_eq!(said(&conversation)[2..], ["assistant: A", "user: b"]);
        assert_eq!(conversation.undo().as_deref(), Some("b"));
        conversation.clear();
        assert_eq!(said(&conversation), ["system: be brief"]);
        assert!(!conversation.retry() && conversation.undo().is_none());
    }
}
