//! The fingerprint of a checkpoint: what every member of a cluster must have in common.
//!
//! SHA-256 over the configuration, the tokenizer's documents and, for each tensor in order of name, its name, element
//! type, shape and a hash of a sample of its bytes. How tensors are spread over files does not matter. Samples are
//! read by position, not through the map, so that no page of a weight becomes resident.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::resume_unwind;
use std::thread;

use sha2::{Digest, Sha256};

use crate::tensors::Location;

/// Bytes of a tensor that are hashed, from its middle.
const SAMPLE: u64 = 4096;

/// Reads in flight at once: storage answers single small reads slowly and many together well.
const READERS: usize = 8;

/// Names everything that decides a hash; changes with its definition.
const VERSION: &[u8] = b"conclave-checkpoint-1";

/// A document of the checkpoint: its file name and, if there is one, its bytes.
pub(crate) type Document = (&'static str, Option<Vec<u8>>);

/// The fingerprint, in hexadecimal.
///
/// # Errors
/// The index of the file that could not be read, and why.
pub(crate) fn fingerprint(
    documents: &[Document],
    tensors: &BTreeMap<String, Location>,
    files: &[File],
) -> Result<String, (usize, io::Error)> {
    let mut hash = Sha256::new();
    hash.update(VERSION);
    for (name, bytes) in documents {
        field(&mut hash, name.as_bytes());
        match bytes {
            None => hash.update([0]),
            Some(bytes) => {
                hash.update([1]);
                field(&mut hash, bytes);
            }
        }
    }
    let samples = samples(tensors, files)?;
    for ((name, location), sample) in tensors.iter().zip(samples) {
        field(&mut hash, name.as_bytes());
        field(&mut hash, location.dtype.to_string().as_bytes());
        hash.update((location.shape.len() as u64).to_le_bytes());
        location.shape.iter().for_each(|dim| hash.update((*dim as u64).to_le_bytes()));
        hash.update(sample);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Bytes with their count before them, so that no two lists of fields hash alike.
fn field(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

/// Hashes of all samples, in order of name.
fn samples(tensors: &BTreeMap<String, Location>, files: &[File]) -> Result<Vec<[u8; 32]>, (usize, io::Error)> {
    let locations: Vec<&Location> = tensors.values().collect();
    let share = locations.len().div_ceil(READERS).max(1);
    let shares = thread::scope(|scope| {
        let readers: Vec<_> = locations
            .chunks(share)
            .map(|locations| scope.spawn(move || locations.iter().map(|location| sample(location, files)).collect()))
            .collect();
        readers.into_iter().map(|reader| reader.join().unwrap_or_else(|panic| resume_unwind(panic))).collect::<Vec<_>>()
    });
    let shares: Vec<Vec<[u8; 32]>> = shares.into_iter().collect::<Result<_, _>>()?;
    Ok(shares.concat())
}

fn sample(location: &Location, files: &[File]) -> Result<[u8; 32], (usize, io::Error)> {
    let count = location.bytes.min(SAMPLE);
    let mut bytes = [0; SAMPLE as usize];
    let bytes = &mut bytes[..count as usize];
    let begin = location.begin + (location.bytes - count) / 2;
    files[location.shard].read_exact_at(bytes, begin).map_err(|error| (location.shard, error))?;
    Ok(Sha256::digest(bytes).into())
}
