//! The report of a checkpoint as text.

use conclave_model::ModelConfig;

use super::{
    architecture::architecture,
    checkpoint::{FileEntry, Generation, Report, Special, Tokenizer, Weights},
    figures::{Basis, Figures, Memory, PartSize},
};
use crate::commands::print::{
    Cell, Column, Ink, Style, Table, fields, together,
    units::{bytes, count, short},
};

/// More tensor files than these are counted, not named.
const NAMED_FILES: usize = 4;

/// Characters of the longest name of a field, so that all sections are aligned.
pub const NAMES: usize = 13;

/// The whole report.
pub fn render(report: &Report, width: usize, style: Style) -> String {
    let directory = if report.model == report.directory { "" } else { &report.directory };
    let name = format!("{}  {directory}", style.paint(Ink::Title, &report.model));
    let mut text = format!("{}\n", name.trim_end());
    let mut section = |title: &str, body: String| {
        if !body.is_empty() {
            text.push_str(&format!("\n{}\n{body}", style.paint(Ink::Title, title)));
        }
    };
    let list = |entries: Vec<(&str, String)>| fields(&entries, NAMES, width, style);
    section("architecture", list(report.config.as_ref().map(architecture).unwrap_or_default()));
    let basis = report.figures.as_ref().map_or(Basis::Stored, |figures| figures.basis);
    section(sizes_title(basis), parts_table(&report.parts, width, style));
    section("figures", list(figures(report)));
    section("text", list(text_entries(report)));
    section("files", list(file_entries(report)));
    text.push('\n');
    text.push_str(&verdict(report, style));
    text
}

fn verdict(report: &Report, style: Style) -> String {
    if report.servable {
        if report.memory.as_ref().is_some_and(|memory| !memory.fits) {
            return format!("{}\n", style.paint(Ink::Warning, "can be served, but not by this machine alone"));
        }
        // A name of the hub's form was found in its cache.
        let location = if report.model.contains('/') { &report.model } else { &report.directory };
        return format!("{}: conclave serve --model {location}\n", style.paint(Ink::Good, "can be served"));
    }
    let refused = style.paint(Ink::Bad, "refused");
    report.refused.iter().map(|reason| format!("{refused}: {reason}\n")).collect()
}

fn sizes_title(basis: Basis) -> &'static str {
    match basis {
        Basis::Stored => "sizes, as stored",
        Basis::Bf16 => "sizes, as they would be in bf16",
    }
}

/// Parts with parameters, bytes and share; empty where there are none.
pub fn parts_table(parts: &[PartSize], width: usize, style: Style) -> String {
    if parts.is_empty() {
        return String::new();
    }
    let mut table = Table::new([
        Column::text("part"),
        Column::number("parameters"),
        Column::number("bytes"),
        Column::number("share"),
    ]);
    let total = |of: fn(&PartSize) -> u64| parts.iter().map(of).sum::<u64>();
    let whole = total(|part| part.bytes);
    for part in parts {
        let share = format!("{:.1} %", 100.0 * part.share);
        table.row([part.part.into(), count(part.parameters).into(), bytes(part.bytes).into(), share.into()]);
    }
    let bold = |text: String| Cell::new(text, Ink::Title);
    let parameters = total(|part| part.parameters);
    table.row([bold("total".into()), bold(count(parameters)), bold(bytes(whole))]);
    table.render(width, style)
}

fn figures(report: &Report) -> Vec<(&'static str, String)> {
    let Some(figures) = &report.figures else { return Vec::new() };
    let mut entries = size_figures(figures);
    entries.extend(report.memory.iter().map(|memory| ("this machine", fit(memory, figures))));
    entries
}

/// What the sizes come to in use.
pub fn size_figures(figures: &Figures) -> Vec<(&'static str, String)> {
    let mut entries = Vec::new();
    if figures.cells > 0 {
        let expert = (count(figures.expert_parameters), bytes(figures.expert_bytes));
        let cell = (count(figures.cell_parameters), bytes(figures.cell_bytes));
        let experts = match figures.cell_experts {
            1 => "1 expert".to_owned(),
            experts => format!("{experts} experts"),
        };
        entries.push(("one expert", format!("{} parameters, {}, in one layer", expert.0, expert.1)));
        entries.push(("one cell", format!("{experts} of every MoE layer: {} parameters, {}", cell.0, cell.1)));
        entries.push(("cells", format!("{}, beside a trunk of {}", figures.cells, bytes(figures.trunk_bytes))));
    }
    let (activated, all) = (short(figures.activated_parameters), short(figures.parameters));
    entries.push(("activated", format!("{activated} of {all} parameters a token")));
    entries.push(("decoding", format!("reads {} of weights a token at batch 1", bytes(figures.decoded_bytes))));
    let (latent, tokens) = (count(figures.latent_bytes_per_token), count(figures.latent_tokens_per_gib));
    entries.push(("latent cache", format!("{latent} bytes a token in bf16; {tokens} tokens fit into 1 GiB")));
    entries
}

fn fit(memory: &Memory, figures: &Figures) -> String {
    let verdict = if memory.fits { "fit into" } else { "do not fit into" };
    let (needed, free) = (bytes(memory.needed), bytes(memory.available));
    let cells = match figures.cells {
        0 => String::new(),
        all => format!("; {} of {all} cells do", memory.cells_that_fit),
    };
    format!("weights of {needed} {verdict} {free} of free memory ({}){cells}", memory.limited_by)
}

fn text_entries(report: &Report) -> Vec<(&'static str, String)> {
    let is_there = report.files.iter().any(|file| file.name == "tokenizer.json");
    let mut entries = match (&report.tokenizer, is_there) {
        (Some(tokenizer), _) => tokenizer_entries(tokenizer, report.config.as_ref()),
        (None, true) => vec![("tokenizer", "cannot be used".into())],
        (None, false) => vec![("tokenizer", "none: prompts are token ids only".into())],
    };
    entries.extend(report.generation.iter().map(|generation| ("generation", settings(generation))));
    entries
}

fn tokenizer_entries(tokenizer: &Tokenizer, config: Option<&ModelConfig>) -> Vec<(&'static str, String)> {
    let rows = config.map_or(String::new(), |config| format!(" of {} ids", count(config.vocab as u64)));
    let special = |token: &Option<Special>| match token {
        Some(token) => format!("{} {}", token.id, token.text),
        None => "none".into(),
    };
    let prompts = if tokenizer.adds_bos { "text prompts begin with it" } else { "not added to text prompts" };
    let template = if tokenizer.chat_template { "present" } else { "none: no chat completions" };
    vec![
        ("tokenizer", format!("{}{rows} have a string", count(tokenizer.strings as u64))),
        ("BOS", format!("{}; {prompts}", special(&tokenizer.bos))),
        ("EOS", special(&tokenizer.eos)),
        ("chat template", template.into()),
    ]
}

fn settings(generation: &Generation) -> String {
    let number = |name: &str, value: Option<f32>| value.map(|value| format!("{name} {value}"));
    let stated = [
        generation.do_sample.map(|sampled| if sampled { "sampled" } else { "greedy" }.to_owned()),
        number("temperature", generation.temperature),
        number("top-p", generation.top_p),
        generation.top_k.map(|top_k| format!("top-k {top_k}")),
        number("repetition penalty", generation.repetition_penalty),
    ];
    let stated: Vec<String> = stated.into_iter().flatten().collect();
    let stated = if stated.is_empty() { "nothing recommended".into() } else { stated.join(", ") };
    let ids: Vec<String> = generation.eos.iter().map(ToString::to_string).collect();
    match ids.as_slice() {
        [] => format!("{stated}; no end of sequence"),
        ids => format!("{stated}; ends at token {}", ids.join(", ")),
    }
}

fn file_entries(report: &Report) -> Vec<(&'static str, String)> {
    let mut entries = files(&report.files, &report.weights);
    entries.extend(report.fingerprint.iter().map(|fingerprint| ("fingerprint", fingerprint.clone())));
    entries
}

fn files(files: &[FileEntry], weights: &Weights) -> Vec<(&'static str, String)> {
    let of = |used: &str| files.iter().filter(|file| file.used == used).collect::<Vec<_>>();
    let named = |files: &[&FileEntry]| {
        let named = |file: &&FileEntry| together(&format!("{} {}", file.name, bytes(file.bytes)));
        files.iter().map(named).collect::<Vec<_>>().join(", ")
    };
    let (tensors, documents, unused) = (of("tensors"), of("document"), of("unused"));
    let shown = if tensors.len() > NAMED_FILES {
        let total = tensors.iter().map(|file| file.bytes).sum();
        format!("{} files, {}", tensors.len(), bytes(total))
    } else {
        named(&tensors)
    };
    let dtypes: Vec<String> = weights.dtypes.iter().map(|(dtype, size)| format!("{dtype} {}", bytes(*size))).collect();
    let read = match weights.unused_bytes {
        0 => String::new(),
        unused => format!("; {} of them not served", bytes(unused)),
    };
    let tensor_count = format!("{} tensors: {}{read}", count(weights.tensors as u64), dtypes.join(", "));
    let entries = [
        ("weights", (!tensors.is_empty()).then_some(shown)),
        ("", (weights.tensors > 0).then_some(tensor_count)),
        ("documents", (!documents.is_empty()).then(|| named(&documents))),
        ("not read", (!unused.is_empty()).then(|| named(&unused))),
    ];
    entries.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

#[cfg(test)]
mod tests {
    use conclave_kernels::Fp8Weights;
    use conclave_model::synth::Preset;

    use super::super::checkpoint::tests::{memory, survey};
    use super::*;

    fn text(config: Option<ModelConfig>) -> String {
        render(&Report::new(&survey(config), memory(10_000_000_000), Fp8Weights::Widened), 80, Style::PLAIN)
    }

    #[test]
    fn a_configuration_is_told_in_the_field_s_words() {
        let text = text(Some(Preset::V2.config()));
        for line in [
            "model          deepseek_v2: 60 layers (1 dense, 59 MoE), hidden 5,120,",
            "attention      MLA: 128 heads, key 128 + 64 rotary, value 128; kv latent 512,",
            "experts        160 routed + 2 shared of width 1,536, 6 a token",
            "gate           group_limited_greedy over softmax scores, from at most 3 of 8",
            "rope           theta 10000; yarn × 40 over 4,096, beta 32 to 1, mscale 0.707",
            "norm           RMS, eps 1e-6",
            "routed experts  222,717,542,400   445 GB  94.5 %",
            "total           235,741,434,880   471 GB",
            "activated      21.4 B of 236 B parameters a token",
            "latent cache   69,120 bytes a token in bf16; 15,488 tokens fit into 1 GiB",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }

    #[test]
    fn reasons_stand_at_the_end_and_what_is_not_known_is_left_out() {
        let mut report = Report::new(&survey(None), None, Fp8Weights::Widened);
        (report.servable, report.refused) = (false, vec!["config.json: line 1: broken".into()]);
        let text = render(&report, 80, Style::PLAIN);
        assert!(text.ends_with("\n\nrefused: config.json: line 1: broken\n"), "{text}");
        assert!(!text.contains("architecture") && !text.contains("figures"), "{text}");
        report.servable = true;
        assert!(render(&report, 80, Style::PLAIN).ends_with("can be served: conclave serve --model /models/m\n"));
    }

    #[test]
    fn settings_are_told_as_far_as_they_are_given() {
        let none = Generation {
            do_sample: None,
            temperature: None,
            top_p: None,
            top_k: None,
            repetition_penalty: None,
            eos: vec![],
        };
        assert_eq!(settings(&none), "nothing recommended; no end of sequence");
        let some =
            Generation { do_sample: Some(true), temperature: Some(0.3), top_p: Some(0.95), eos: vec![1, 2], ..none };
        assert_eq!(settings(&some), "sampled, temperature 0.3, top-p 0.95; ends at token 1, 2");
    }

    #[test]
    fn many_shards_are_counted() {
        let entry = |i: usize| FileEntry { name: format!("{i}"), bytes: 1000, used: "tensors" };
        let weights = Weights { files: 5, tensors: 5, bytes: 10, unused_bytes: 4, dtypes: [("BF16", 10)].into() };
        let listed = files(&(0..5).map(entry).collect::<Vec<_>>(), &weights);
        assert_eq!(listed[0], ("weights", "5 files, 5.00 kB".to_owned()));
        assert_eq!(listed[1], ("", "5 tensors: BF16 10 B; 4 B of them not served".to_owned()));
    }
}
