//! Headers and indexes: every refusal by its name, agreement with the format's own writer, no panic on anything.

use std::collections::HashMap;

use proptest::prelude::*;
use safetensors::tensor::{Dtype as FileDtype, TensorView, serialize};
use serde_json::{Value, json};

use super::*;

fn parse(header: &Value, data_bytes: u64) -> Result<Vec<Entry>, TensorError> {
    parse_header(header.to_string().as_bytes(), data_bytes)
}

fn refused(header: Value, data_bytes: u64) -> TensorError {
    parse(&header, data_bytes).expect_err(&header.to_string())
}

/// Two tensors of 12 and 8 bytes.
fn two() -> Value {
    json!({
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]},
    })
}

#[test]
fn entries_come_in_the_order_of_their_bytes() {
    let entries = parse(&two(), 20).unwrap();
    let names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!((entries[1].dtype, entries[1].shape.as_slice(), entries[1].begin), ("F32", [2].as_slice(), 12));
}

#[test]
fn odd_offsets_are_read() {
    let header = json!({
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [3, 7]},
    });
    assert_eq!(parse(&header, 7).unwrap()[1].begin, 3);
}

#[test]
fn the_format_s_own_files_are_read() {
    let data: Vec<u8> = (0..40).collect();
    let view = |dtype, shape: Vec<usize>, bytes| TensorView::new(dtype, shape, bytes).unwrap();
    let tensors = HashMap::from([
        ("x".to_string(), view(FileDtype::F32, vec![2, 3], &data[..24])),
        ("y".to_string(), view(FileDtype::BF16, vec![5], &data[24..34])),
        ("z".to_string(), view(FileDtype::U8, vec![3], &data[34..37])),
        ("scalar".to_string(), view(FileDtype::U8, vec![], &data[37..38])),
        ("empty".to_string(), view(FileDtype::F32, vec![0, 4], &[])),
    ]);
    let file = serialize(&tensors, None).unwrap();
    let length = header_bytes(file[..8].try_into().unwrap(), file.len() as u64).unwrap() as usize;
    let entries = parse_header(&file[8..8 + length], (file.len() - 8 - length) as u64).unwrap();
    assert_eq!(entries.len(), 5);
    for entry in entries {
        let view = &tensors[&entry.name];
        assert_eq!(&file[8 + length..][entry.begin as usize..entry.end as usize], view.data(), "{}", entry.name);
    }
}

#[test]
fn a_file_that_ends_early_is_refused() {
    let error = header_bytes(100u64.to_le_bytes(), 50).unwrap_err();
    assert_eq!(error, TensorError::Truncated { found: 50, expected: 108, part: "header" });
    let error = refused(two(), 19);
    assert_eq!(error, TensorError::OutOfFile { tensor: "b".into(), found: 19, end: 20 });
}

#[test]
fn a_header_length_beyond_reason_is_refused() {
    let error = header_bytes(u64::MAX.to_le_bytes(), u64::MAX).unwrap_err();
    assert!(matches!(error, TensorError::HeaderTooLong { found: u64::MAX, .. }), "{error}");
}

#[test]
fn overlaps_gaps_and_trailing_bytes_are_refused() {
    let mut header = two();
    header["b"]["data_offsets"] = json!([10, 18]);
    let expected = TensorError::Overlap { tensor: "b".into(), other: "a".into(), begin: 10, expected: 12 };
    assert_eq!(refused(header.clone(), 20), expected);
    header["b"]["data_offsets"] = json!([14, 22]);
    assert_eq!(refused(header, 22), TensorError::Gap { tensor: "b".into(), begin: 14, expected: 12 });
    assert_eq!(refused(two(), 21), TensorError::TrailingData { found: 21, expected: 20 });
}

#[test]
fn offsets_that_do_not_hold_the_shape_are_refused() {
    for offsets in [[0, 11], [0, 13], [12, 0], [u64::MAX, 11]] {
        let mut header = two();
        header["a"]["data_offsets"] = json!(offsets);
        let error = refused(header, 20);
        assert!(matches!(&error, TensorError::Misaligned { tensor, expected: 12, .. } if tensor == "a"), "{error}");
    }
}

#[test]
fn unknown_types_and_endless_shapes_are_refused() {
    let mut header = two();
    header["a"]["dtype"] = json!("F7");
    assert_eq!(refused(header, 20), TensorError::UnknownDtype { tensor: "a".into(), found: "\"F7\"".into() });
    let mut header = two();
    header["a"]["shape"] = json!([u64::MAX, 2]);
    assert!(matches!(refused(header, 20), TensorError::ShapeTooLarge { .. }));
}

#[test]
fn a_tensor_given_twice_is_refused() {
    let text =
        br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    let error = parse_header(text, 2).unwrap_err().to_string();
    assert!(error.starts_with("header: line 1") && error.contains("\"a\" is given twice"), "{error}");
}

#[test]
fn wrong_types_name_the_field() {
    for (field, value) in
        [("dtype", json!(1)), ("shape", json!("x")), ("shape", json!([-1])), ("data_offsets", json!([0]))]
    {
        let mut header = two();
        header["a"][field] = value;
        let message = refused(header, 20).to_string();
        assert!(message.starts_with(&format!("header: a.{field}: found")), "{message}");
    }
    assert!(refused(json!({"a": 3}), 0).to_string().starts_with("header: a: found 3, expected an object"));
}

#[test]
fn an_index_leads_to_its_own_directory_only() {
    for file in ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "a\0b", "x/"] {
        let text = json!({"weight_map": {"a": file}}).to_string();
        let error = Index::parse(text.as_bytes()).expect_err(file);
        assert!(matches!(error, TensorError::UnsafeFileName { .. }), "{file}: {error}");
    }
}

#[test]
fn an_index_without_tensors_is_refused() {
    assert_eq!(Index::parse(br#"{"weight_map": {}}"#), Err(TensorError::EmptyIndex));
    let message = Index::parse(b"{}").unwrap_err().to_string();
    assert!(message.contains("weight_map: missing"), "{message}");
}

#[test]
fn a_shard_has_exactly_what_the_index_says() {
    let entries = parse(&two(), 20).unwrap();
    let index = |map: Value| Index::parse(json!({"weight_map": map}).to_string().as_bytes()).unwrap();
    index(json!({"a": "one", "b": "one", "c": "two"})).check_shard("one", &entries).unwrap();
    let lost = index(json!({"a": "one", "b": "one", "c": "one"})).check_shard("one", &entries);
    assert_eq!(lost, Err(TensorError::NotInShard { tensor: "c".into(), file: "one".into() }));
    for map in [json!({"a": "one"}), json!({"a": "one", "b": "two"})] {
        let error = index(map).check_shard("one", &entries).unwrap_err();
        assert!(matches!(&error, TensorError::NotInIndex { tensor, .. } if tensor == "b"), "{error}");
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), data in any::<u64>()) {
        let _ = parse_header(&bytes, data);
        let _ = Index::parse(&bytes);
    }

    #[test]
    fn no_changed_byte_panics_and_what_passes_is_in_bounds(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)
    ) {
        let mut header = two().to_string().into_bytes();
        for (at, byte) in changes {
            let at = at.index(header.len());
            header[at] = byte;
        }
        if let Ok(entries) = parse_header(&header, 20) {
            prop_assert_eq!(entries.last().map_or(0, |entry| entry.end), 20);
        }
        let mut index = json!({"weight_map": {"a": "one.safetensors"}}).to_string().into_bytes();
        let at = header[0] as usize % index.len();
        index[at] = header[1];
        let _ = Index::parse(&index);
    }

    #[test]
    fn no_entry_panics(dtype in "(BF16|F32|U8|.{0,3})", shape in proptest::collection::vec(any::<u64>(), 0..4), begin: u64, end: u64) {
        let header = json!({"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}});
        let _ = parse(&header, end);
    }
}
