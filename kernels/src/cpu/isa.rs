//! Instruction sets of the CPU device.

use std::{fmt, str::FromStr};

use super::kernels;
use crate::KernelError;

/// An instruction set that the CPU device has kernels for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// x86-64 with AMX tiles of bf16, beside all that [`Isa::Avx512`] needs.
    Amx,
    /// x86-64 with AVX-512 and its dot products of bf16, beside all that [`Isa::Avx2`] needs.
    Avx512,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// Plain Rust, on any machine.
    Portable,
}

impl Isa {
    /// All there are, best first.
    pub const ALL: [Self; 4] = [Self::Amx, Self::Avx512, Self::Avx2, Self::Portable];

    /// Those of this machine, best first; never empty.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| kernels::have(*isa)).collect()
    }

    /// This one, if the machine has it.
    ///
    /// # Errors
    /// When it has not; the error names those it has.
    pub(crate) fn check(self) -> Result<Self, KernelError> {
        match kernels::have(self) {
            true => Ok(self),
            false => Err(KernelError::MissingIsa { asked: self.to_string(), found: names(&Self::available()) }),
        }
    }
}

fn names(of: &[Isa]) -> String {
    of.iter().map(Isa::to_string).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Amx => "amx",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        })
    }
}

impl FromStr for Isa {
    type Err = KernelError;

    fn from_str(name: &str) -> Result<Self, KernelError> {
        let unknown = || KernelError::UnknownIsa { asked: name.to_owned(), known: names(&Self::ALL) };
        Self::ALL.into_iter().find(|isa| isa.to_string() == name).ok_or_else(unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse::<Isa>().unwrap(), isa);
        }
        assert_eq!(Isa::available().last(), Some(&Isa::Portable));
        let error = "sse9".parse::<Isa>().unwrap_err().to_string();
        assert_eq!(error, "instruction set: found sse9, expected one of amx, avx512, avx2, portable");
    }
}
