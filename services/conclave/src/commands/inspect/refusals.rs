//! Why a checkpoint would be refused, in as few lines as say it.

use std::{mem, path::Path};

use conclave_model::ModelError;

/// Of problems that are alike, so many are told.
const TOLD: usize = 3;

/// The problems, one a line, named within `dir`. Of many of one kind in one file, the first ones and how many more.
pub fn lines(problems: &[ModelError], dir: &Path) -> Vec<String> {
    let mut kinds: Vec<(&ModelError, Vec<&ModelError>)> = Vec::new();
    for problem in problems {
        match kinds.iter_mut().find(|(first, _)| alike(first, problem)) {
            Some((_, kind)) => kind.push(problem),
            None => kinds.push((problem, vec![problem])),
        }
    }
    kinds.iter().flat_map(|(_, kind)| told(kind, dir)).collect()
}

fn alike(one: &ModelError, other: &ModelError) -> bool {
    match (one, other) {
        (ModelError::Tensor { path, error }, ModelError::Tensor { path: other_path, error: other_error }) => {
            path == other_path && mem::discriminant(error) == mem::discriminant(other_error)
        }
        _ => false,
    }
}

fn told(kind: &[&ModelError], dir: &Path) -> Vec<String> {
    let (inside, itself) = (format!("{}/", dir.display()), format!("{}: ", dir.display()));
    let within = |text: String| text.strip_prefix(&itself).map(str::to_owned).unwrap_or(text).replace(&inside, "");
    let mut lines: Vec<String> = kind.iter().take(TOLD).map(|problem| within(problem.to_string())).collect();
    if let (more @ 1.., Some(last)) = (kind.len().saturating_sub(TOLD), lines.last_mut()) {
        last.push_str(&format!(" (and {more} more like it)"));
    }
    lines
}

#[cfg(test)]
mod tests {
    use conclave_model::TensorError;

    use super::*;

    fn missing(file: &str, tensor: &str) -> ModelError {
        let error = TensorError::Missing { tensor: tensor.into(), expected: vec![1] };
        ModelError::Tensor { path: Path::new("/m").join(file), error }
    }

    #[test]
    fn problems_are_named_within_the_directory() {
        let unknown = ModelError::NoSuchTensor { name: "x".into() };
        let nothing = ModelError::Tensor { path: "/m".into(), error: TensorError::EmptyIndex };
        let lines = lines(&[unknown, missing("f", "a"), nothing], Path::new("/m"));
        let expected = [
            "tensor x: not in the checkpoint",
            "f: tensor a: missing, expected shape [1]",
            "weight_map: found no tensors, expected at least one",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn of_many_alike_the_first_are_told_with_the_number_of_the_others() {
        let mut problems: Vec<ModelError> = (0..10).map(|i| missing("f", &i.to_string())).collect();
        problems.insert(5, missing("g", "other"));
        problems.push(ModelError::Tensor { path: "/m/f".into(), error: TensorError::EmptyIndex });
        let lines = lines(&problems, Path::new("/m"));
        assert_eq!(lines.len(), 5, "{lines:#?}");
        assert_eq!(lines[2], "f: tensor 2: missing, expected shape [1] (and 7 more like it)");
        assert_eq!(lines[3], "g: tensor other: missing, expected shape [1]");
    }
}
