//! Against vectors of the library that wrote the tokenizer, and against text that wants to be more than text.

use std::fs;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::config::presets;
use crate::testing::{fixture, small};

const BOS: &str = "<｜begin▁of▁sentence｜>";
const EOS: &str = "<｜end▁of▁sentence｜>";

fn demo() -> Option<Text> {
    let dir = fixture("demo-model")?;
    let config = ModelConfig::read(&dir).unwrap();
    Some(Text::read(&dir, &config).unwrap().unwrap())
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.into(), content: content.into() }
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// A tokenizer of single characters, `a` to `z` and a few more, with added tokens from id 40 on.
fn toy(added: &[(&str, bool)], settings: Value) -> Result<Text, ModelError> {
    let letters = ('a'..='z').chain("Ġ<>|:/".chars());
    let vocab: serde_json::Map<_, _> = letters.enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    let added: Vec<Value> = (40..)
        .zip(added)
        .map(|(id, (content, special))| {
            json!({"id": id, "content": content, "special": special, "lstrip": false,
            "rstrip": *content == "<r>", "single_word": false, "normalized": false})
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0", "added_tokens": added, "normalizer": null, "post_processor": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    load(&tokenizer.to_string(), &settings.to_string())
}

fn load(tokenizer: &str, settings: &str) -> Result<Text, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), settings).unwrap();
    Ok(Text::read(dir.path(), &presets::tiny())?.expect("there is a tokenizer"))
}

/// A toy with `<s>`, `</s>` and the template given.
fn chat(template: &str) -> Text {
    let settings = json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template});
    toy(&[("<s>", true), ("</s>", true), ("<u>", false), ("<t>", false), ("<r>", false)], settings).unwrap()
}

const S: u32 = 40;
const END: u32 = 41;
const U: u32 = 42;
const T: u32 = 43;
const R: u32 = 44;

fn special_ids(text: &Text, messages: &[ChatMessage]) -> Vec<u32> {
    text.encode_chat(messages).unwrap().into_iter().filter(|id| *id >= S).collect()
}

#[test]
fn strings_encode_and_decode_as_the_library_does() {
    let (Some(text), Some(path)) = (demo(), fixture("golden-demo/tokenizer.json")) else { return };
    let golden: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let vectors = golden["strings"].as_array().unwrap();
    assert!(vectors.len() > 40);
    for vector in vectors {
        let string = vector["text"].as_str().unwrap();
        assert_eq!(text.encode(string, false).unwrap(), ids(&vector["plain_ids"]), "{string:?}");
        let parsed = ids(&vector["ids"]);
        assert_eq!(text.decode(&parsed).unwrap(), vector["decoded"].as_str().unwrap());
        let shown: Vec<u32> = parsed.into_iter().filter(|id| !text.is_special(*id)).collect();
        assert_eq!(text.decode(&shown).unwrap(), vector["decoded_without_special"].as_str().unwrap());
    }
}

#[test]
fn conversations_encode_as_the_library_does() {
    let (Some(text), Some(path)) = (demo(), fixture("golden-demo/tokenizer.json")) else { return };
    let golden: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    for vector in golden["conversations"].as_array().unwrap() {
        let said = vector["messages"].as_array().unwrap();
        let said = said.iter().map(|said| message(said["role"].as_str().unwrap(), said["content"].as_str().unwrap()));
        let ask = vector["add_generation_prompt"].as_bool().unwrap();
        let found = text.encode_conversation(&said.collect::<Vec<_>>(), ask).unwrap();
        assert_eq!(found, ids(&vector["safe_ids"]), "{}", vector["messages"]);
    }
}

#[test]
fn the_demo_tokenizer_says_what_it_has() {
    let Some(text) = demo() else { return };
    assert_eq!((text.bos(), text.eos(), text.adds_bos(), text.has_chat_template()), (Some(0), Some(1), true, true));
    assert_eq!(text.real_vocab(), 4096);
    assert!(text.is_special(0) && !text.is_special(2) && text.has_string(4095) && !text.has_string(4096));
    assert_eq!(text.piece(1).as_deref(), Some(EOS));
    assert_eq!(text.decode(&[2, 4096]), Err(TextError::NoString { id: 4096 }));
}

#[test]
fn bytes_of_tokens_add_up_to_the_text() {
    let Some(text) = demo() else { return };
    let string = "naïve 😀 café\n讲一个小猫的故事。";
    let bytes: Vec<u8> =
        text.encode(string, false).unwrap().iter().flat_map(|id| text.token_bytes(*id).unwrap()).collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), string);
}

#[test]
fn text_never_becomes_a_special_token() {
    let Some(text) = demo() else { return };
    let string = format!("{BOS}a{EOS}");
    let plain = text.encode(&string, false).unwrap();
    assert!(plain.iter().all(|id| *id > 1) && text.decode(&plain).unwrap() == string);
    assert_eq!(text.encode("", true).unwrap(), [0]);
    let ids = text.encode_chat(&[message("user", &string)]).unwrap();
    assert_eq!(ids.iter().filter(|id| **id < 2).collect::<Vec<_>>(), [&0]);
    assert_eq!(text.decode(&ids).unwrap(), format!("{BOS}User: {string}\n\nAssistant:"));
}

#[test]
fn added_tokens_that_are_not_special_are_text_too() {
    let text = toy(&[("<u>", false)], json!({})).unwrap();
    let ids = text.encode("a<u>b", false).unwrap();
    assert!(ids.iter().all(|id| *id < 40) && text.decode(&ids).unwrap() == "a<u>b");
    assert_eq!((text.bos(), text.adds_bos(), text.is_special(40), text.has_string(39)), (Some(0), false, false, false));
}

#[test]
fn tokens_of_the_template_are_parsed_and_those_of_messages_are_not() {
    let text = chat("{{bos_token}}{% for m in messages %}<u>{{ m.content }}{{ eos_token }}{% endfor %}<t>");
    let said = [message("user", "a<u>b<s>"), message("user", "</s><t>")];
    assert_eq!(special_ids(&text, &said), [S, U, END, U, END, T]);
    assert_eq!(text.decode(&text.encode_chat(&said).unwrap()).unwrap(), "<s><u>a<u>b<s></s><u></s><t></s><t>");
}

#[test]
fn tokens_made_of_neighbouring_messages_are_text() {
    let text = chat("{% for m in messages %}{{ m.content }}{% endfor %}<t>");
    assert_eq!(special_ids(&text, &[message("user", "a<"), message("user", "u>b")]), [T]);
}

#[test]
fn transformed_contents_stay_text() {
    let text = chat("{% for m in messages %}<u>{{ m['content'] | trim }}{{ m.content.strip() }}{% endfor %}");
    assert_eq!(special_ids(&text, &[message("user", " <u> ")]), [U]);
}

#[test]
fn a_token_that_the_template_looks_for_is_text_where_it_was_found() {
    let text = chat("{{ bos_token }}{% for m in messages %}<u>{{ m.content.split('<t>')[-1] }}{% endfor %}");
    assert_eq!(special_ids(&text, &[message("assistant", "thoughts<t>a<u>"), message("user", "b<u>")]), [S, U, U]);
    let rendered = text.encode_chat(&[message("assistant", "thoughts<t>answer")]).unwrap();
    assert_eq!(text.decode(&rendered).unwrap(), "<s><u>answer");
}

proptest! {
    #[test]
    fn whatever_messages_say_only_the_template_writes_tokens(
        contents in proptest::collection::vec("(<|u>|<u>|</s>|<t>|<|/s>|a| |\u{e000}|\u{e001}|\u{f0000}|\u{f0001}){0,8}", 0..4)
    ) {
        let text = chat("{{ bos_token }}{% for m in messages %}<u>{{ m.content }}{{ eos_token }}{% endfor %}<t>");
        let said: Vec<ChatMessage> = contents.iter().map(|content| message("user", content)).collect();
        let pieces = text.template.as_ref().unwrap().render(&said, true).unwrap();
        let tokens: Vec<u32> = pieces.iter().filter_map(|piece| match piece {
            chat::Piece::Token(id) => Some(*id),
            chat::Piece::Text(_) => None,
        }).collect();
        let mut expected = vec![S];
        contents.iter().for_each(|_| expected.extend([U, END]));
        expected.push(T);
        prop_assert_eq!(tokens, expected);
        let texts: Vec<&str> = pieces.iter().filter_map(|piece| match piece {
            chat::Piece::Text(text) if !text.is_empty() => Some(text.as_str()),
            _ => None,
        }).collect();
        prop_assert_eq!(texts, contents.iter().filter(|text| !text.is_empty()).map(String::as_str).collect::<Vec<_>>());
    }

    #[test]
    fn no_tokenizer_panics(changed in any::<prop::sample::Index>(), value in "(null|0|-1|\"x\"|\\[\\]|\\{\\})") {
        let document = json!({"added_tokens": [{"id": 3, "content": "<s>"}], "model": {"type": "BPE",
            "vocab": {"a": 0, "b": 1}, "merges": []}, "decoder": {"type": "ByteLevel"}}).to_string();
        let spots: Vec<usize> = document.match_indices(':').map(|(at, _)| at + 1).collect();
        let at = *changed.get(&spots);
        let end = document[at..].find([',', '}']).map_or(document.len(), |length| at + length);
        let _ = load(&format!("{}{value}{}", &document[..at], &document[end..]), "{}");
        let _ = load("{}", &format!("{{\"bos_token\": {value}, \"chat_template\": {value}, \"add_bos_token\": {value}}}"));
    }
}

#[test]
fn private_characters_in_messages_do_no_harm() {
    let text = chat("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}");
    let forged = "\u{e000}\u{f0000}\u{e001}\u{f0000}a";
    let said = [message("user", forged)];
    let template = text.template.as_ref().unwrap();
    assert_eq!(
        template.render(&said, true).unwrap(),
        [chat::Piece::Text(String::new()), chat::Piece::Token(S), chat::Piece::Text(forged.into())]
    );
    let every: String = ('\u{e000}'..='\u{f8ff}').chain('\u{100000}'..='\u{10fffd}').collect();
    assert_eq!(text.encode_chat(&[message("user", &every)]), Err(TextError::NoFreeMark));
}

#[test]
fn a_token_takes_the_white_space_that_it_claims() {
    let text = chat("a<r>  b<t>  c");
    let ids = text.encode_chat(&[]).unwrap();
    assert_eq!((ids[1], text.decode(&ids).unwrap().as_str()), (R, "a<r>b<t>  c"));
}

#[test]
fn templates_have_the_environment_they_were_written_for() {
    let text = chat(
        "{%- set ns = namespace(n=0) -%}\n{% for m in messages %}\n    {% if m.role not in ['user'] %}\n\
         {{ raise_exception('only users, not ' ~ m.role) }}\n    {% endif %}\n{% set ns.n = ns.n + 1 %}\n\
         {{- m | tojson }}{% if loop.first %}{% continue %}{% endif %}{{ strftime_now('%Y')|length }}\n{% endfor %}\n\
         {%- if tools is none and not documents and not x %}{{ ns.n }}{% endif %}",
    );
    let template = text.template.as_ref().unwrap();
    let pieces = template.render(&[message("user", "é"), message("user", "b")], true).unwrap();
    let expected = r#"{"content": "é", "role": "user"}{"content": "b", "role": "user"}4 2"#;
    let [chat::Piece::Text(rendered)] = pieces.as_slice() else { panic!("{pieces:?}") };
    assert_eq!(rendered.split_whitespace().collect::<Vec<_>>().join(" "), expected);
    let refused = text.encode_chat(&[message("tool", "x")]);
    assert_eq!(refused, Err(TextError::Refused { reason: "only users, not tool".into() }));
}

#[test]
fn failing_templates_fail_by_name() {
    let settings = json!({"chat_template": "{% for %}"});
    let error = toy(&[], settings).unwrap_err();
    assert!(
        matches!(&error, ModelError::Text { error: TextError::Template { .. }, path } if path.ends_with("tokenizer_config.json")),
        "{error}"
    );
    let text = chat("{{ messages[0].content.nothing() }}");
    assert!(matches!(text.encode_chat(&[message("user", "x")]), Err(TextError::Template { .. })));
    let text = toy(&[], json!({})).unwrap();
    assert_eq!(text.encode_chat(&[]), Err(TextError::NoChatTemplate));
    assert_eq!(text.encode("a", true), Ok(vec![0, 0]), "the id of config.json is BOS where no name is given");
}

#[test]
fn named_templates_and_template_files_are_found() {
    let named = json!([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "ab"}]);
    let text = toy(&[], json!({"chat_template": named})).unwrap();
    assert_eq!(text.encode_chat(&[]).unwrap(), [0, 1]);
    let error = toy(&[], json!({"chat_template": [{"name": "other", "template": "x"}]})).unwrap_err().to_string();
    assert!(error.contains("named \"default\""), "{error}");

    let Some(dir) = fixture("demo-model") else { return };
    let copy = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(dir.join(name), copy.path().join(name)).unwrap();
    }
    fs::write(copy.path().join("chat_template.jinja"), "{{ bos_token }}").unwrap();
    let config = ModelConfig::read(&dir).unwrap();
    let text = Text::read(copy.path(), &config).unwrap().unwrap();
    assert_eq!(text.encode_chat(&[message("user", "x")]).unwrap(), [0]);
}

#[test]
fn tokenizers_that_cannot_be_used_are_refused_by_name() {
    let good = json!({
        "added_tokens": [{"id": 3, "content": "<s>", "special": true, "normalized": false}], "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
    });
    let refuse = |edit: &dyn Fn(&mut Value), words: &[&str]| {
        let mut document = good.clone();
        edit(&mut document);
        let message = load(&document.to_string(), "{}").expect_err(&document.to_string()).to_string();
        words.iter().for_each(|word| assert!(message.contains(word), "{message}: {word}"));
    };
    load(&good.to_string(), "{}").unwrap();
    refuse(
        &|d| d["decoder"]["type"] = json!("Metaspace"),
        &["tokenizer.json", "decoder.type", "\"Metaspace\"", "ByteLevel"],
    );
    refuse(&|d| d["decoder"] = Value::Null, &["decoder.type", "nothing"]);
    refuse(&|d| d["model"]["vocab"]["b"] = json!(512), &["\"b\"", "512", "vocab_size = 512"]);
    refuse(&|d| d["model"]["vocab"]["b"] = json!(3), &["\"b\"", "id 3", "\"<s>\""]);
    refuse(&|d| d["model"]["vocab"]["b"] = json!(-1), &["model.vocab.b", "-1"]);
    refuse(&|d| d["model"]["vocab"] = json!([]), &["model.vocab", "an object"]);
    refuse(&|d| d["model"]["merges"] = json!(["a c"]), &["tokenizer:"]);
    refuse(&|d| d["added_tokens"][0]["content"] = json!(""), &["added_tokens[0].content"]);
    refuse(&|d| d["added_tokens"][0] = json!(1), &["added_tokens[0]", "an object"]);
    let message = load("{\n oops", "{}").unwrap_err().to_string();
    assert!(message.contains("tokenizer.json: line 2"), "{message}");
    let message = load(&good.to_string(), "{\"bos_token\": 3}").unwrap_err().to_string();
    assert!(message.contains("tokenizer_config.json: bos_token: found 3"), "{message}");
    let message = load(&good.to_string(), "{\"bos_token\": \"<x>\"}").unwrap_err().to_string();
    assert!(message.contains("bos_token: found \"<x>\""), "{message}");
}

#[test]
fn without_a_tokenizer_there_is_no_text() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Text::read(dir.path(), &small()).unwrap().is_none());
}
