//! The code of kernels for a GPU: built in, or on disk.

use std::{io, path::Path};

use cudarc::driver::{result, sys::CUmodule};

use super::{CudaError, gpu::device};

/// Code of all kernels: file name, chip, cubin.
const CUBINS: &[(&str, &str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/cubins.rs"));

/// Code that is loaded.
pub(super) struct Module(pub(super) CUmodule);

// SAFETY: a handle that the CUDA driver lets any thread use.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// The code that runs on a chip of this compute capability.
pub(super) fn chip((major, minor): (i32, i32)) -> Result<&'static str, CudaError> {
    match major {
        8 => Ok("sm_80"),
        9 => Ok("sm_90a"),
        _ => {
            let detail = format!("this GPU is of compute capability {major}.{minor}, expected 8.x or 9.0");
            Err(CudaError::Missing { missing: "kernel code for this GPU", detail })
        }
    }
}

/// Loads the code for a chip, with what lies in `kernel_dir` in its place.
pub(super) fn load(chip: &str, kernel_dir: Option<&Path>) -> Result<Vec<Module>, CudaError> {
    let of_chip = CUBINS.iter().filter(|(_, of, _)| *of == chip);
    if let Some(directory) = kernel_dir {
        let files: Vec<&str> = of_chip.clone().map(|(file, ..)| *file).collect();
        check_replacements(directory, &files)
            .map_err(|source| CudaError::Code { path: directory.display().to_string(), source })?;
    }
    of_chip
        .map(|(file, _, built_in)| {
            let replacement = kernel_dir.map(|directory| directory.join(file)).filter(|path| path.exists());
            let code = match replacement {
                None => built_in.to_vec(),
                Some(path) => std::fs::read(&path)
                    .map_err(|source| CudaError::Code { path: path.display().to_string(), source })?,
            };
            // SAFETY: a whole cubin, which says how long it is.
            let module = unsafe { result::module::load_data(code.as_ptr().cast()) };
            module.map(Module).map_err(|error| device("load the code of kernels", &error))
        })
        .collect()
}

/// Refuses a directory that takes the place of none of `files`: whoever names one has got its path or its files wrong.
fn check_replacements(directory: &Path, files: &[&str]) -> io::Result<()> {
    std::fs::read_dir(directory)?;
    if files.iter().any(|file| directory.join(file).exists()) {
        return Ok(());
    }
    let expected = files.join(", ");
    Err(io::Error::new(io::ErrorKind::NotFound, format!("found no kernels in it, expected one or more of {expected}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chips_run_code_of_their_kind() {
        assert_eq!(chip((8, 6)).unwrap(), "sm_80");
        assert_eq!(chip((9, 0)).unwrap(), "sm_90a");
        let error = chip((7, 5)).unwrap_err().to_string();
        assert!(error.contains("compute capability 7.5, expected 8.x or 9.0"), "{error}");
    }

    #[test]
    fn a_directory_that_replaces_nothing_is_refused() {
        let refusal = |path: &Path, files: &[&str]| check_replacements(path, files).err();
        let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
        let files = ["linear.sm_90a.cubin", "argmax.sm_90a.cubin"];
        assert_eq!(refusal(&sources.join("nowhere"), &files).unwrap().kind(), io::ErrorKind::NotFound);
        assert_eq!(refusal(&sources.join("Cargo.toml"), &files).unwrap().kind(), io::ErrorKind::NotADirectory);
        let error = refusal(sources, &files).unwrap().to_string();
        assert_eq!(error, "found no kernels in it, expected one or more of linear.sm_90a.cubin, argmax.sm_90a.cubin");
        assert!(refusal(sources, &["linear.sm_90a.cubin", "Cargo.toml"]).is_none(), "one is enough");
    }

    /// Every cubin is an ELF file for NVIDIA's machine (190).
    #[test]
    fn code_is_built_in() {
        for chip in ["sm_80", "sm_90a"] {
            let of_chip: Vec<_> = CUBINS.iter().filter(|(_, of, _)| *of == chip).collect();
            assert!(of_chip.len() >= 10, "{} files for {chip}", of_chip.len());
            for (file, _, code) in of_chip {
                assert!(code.starts_with(b"\x7fELF") && code[18] == 190, "{file}");
            }
        }
    }
}
