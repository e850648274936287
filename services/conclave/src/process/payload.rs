//! How rows and sums go between attention and experts.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use conclave_dispatch::pair::{BoardDevice, NoPair, PairDevice, Pairs};
use conclave_kernels::{Device, KernelError};

use super::device::{AnyDevice, on_device};

/// A way for rows and sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Payload {
    /// The best that both sides have.
    Auto,
    /// In the messages, through the memory of both hosts.
    Messages,
    /// Between the memory of two processes' GPUs on one host (CUDA IPC); one GPU may serve both.
    Ipc,
}

/// The flag.
#[derive(Debug, Clone, Copy, Args)]
pub struct PayloadArgs {
    /// How rows and sums go between attention and experts. What is asked for by name has to be there.
    #[arg(long, env = "CONCLAVE_PAYLOAD", value_enum, default_value = "auto")]
    pub payload: Payload,
}

impl PayloadArgs {
    /// Whether an expert on `device` grants pairs. `near`: it listens on a socket for members of its host.
    ///
    /// # Errors
    /// Naming what ipc lacks, if that is asked for.
    pub fn grants(self, near: bool, device: &AnyDevice) -> Result<bool> {
        if self.payload == Payload::Ipc {
            check_near(near)?;
            on_device!(device, device => device.share(1).map(drop)).context("--payload ipc")?;
        }
        Ok(self.payload != Payload::Messages)
    }

    /// The pairs of an attention process that itself dispatches steps of at most this many rows of this many elements.
    ///
    /// # Errors
    /// Naming what ipc lacks, if that is asked for.
    pub fn pairs(self, near: bool, device: &AnyDevice, (rows, hidden): (usize, usize)) -> Result<Pairs> {
        let board = || on_device!(device, device => board(device.clone(), rows, hidden));
        Ok(match self.payload {
            Payload::Messages => Pairs::Without(NoPair::Unasked),
            Payload::Auto if !near => Pairs::Without(NoPair::Far),
            Payload::Auto => match board() {
                Ok(device) => Pairs::Offered(device),
                Err(error) => Pairs::Without(NoPair::NoDevice(error.to_string())),
            },
            Payload::Ipc => {
                check_near(near)?;
                Pairs::Required(board().context("--payload ipc")?)
            }
        })
    }

    /// The same where a router dispatches.
    ///
    /// # Errors
    /// If ipc is asked for.
    pub fn by_router(self) -> Result<Pairs> {
        if self.payload == Payload::Ipc {
            bail!("--payload ipc: layers go to a router, which has no device; needed is --dispatch embedded");
        }
        Ok(Pairs::Without(NoPair::NoDevice("a router has none".to_owned())))
    }
}

fn check_near(near: bool) -> Result<()> {
    if !near {
        bail!("--payload ipc: needs the sockets of members of one host, which --same-host off takes away");
    }
    Ok(())
}

fn board<D: Device>(device: Arc<D>, rows: usize, hidden: usize) -> Result<Arc<dyn PairDevice>, KernelError> {
    Ok(Arc::new(BoardDevice::new(device, rows, hidden)?))
}

#[cfg(test)]
mod tests {
    use conclave_kernels::{Pool, Reference};

    use super::*;

    fn device() -> AnyDevice {
        AnyDevice::Reference(Arc::new(Reference::new(Pool::new(1).unwrap())))
    }

    #[test]
    fn what_is_asked_for_by_name_and_missing_is_named() {
        let ipc = PayloadArgs { payload: Payload::Ipc };
        let refused = |error: Option<anyhow::Error>| format!("{:#}", error.expect("refused"));
        let device = device();
        for near in [true, false] {
            let (grants, pairs) = (ipc.grants(near, &device).err(), ipc.pairs(near, &device, (4, 8)).err());
            let missing = if near { "device reference-1: shares no memory" } else { "--same-host off takes away" };
            for error in [refused(grants), refused(pairs)] {
                assert!(error.starts_with("--payload ipc: ") && error.contains(missing), "{error}");
            }
        }
        assert!(refused(ipc.by_router().err()).ends_with("needed is --dispatch embedded"));
    }

    #[test]
    fn without_a_name_it_is_the_best_there_is_and_says_why_not_better() {
        let why = |payload, near| match (PayloadArgs { payload }).pairs(near, &device(), (4, 8)).unwrap() {
            Pairs::Without(why) => why.name(),
            Pairs::Offered(_) | Pairs::Required(_) => "pairs",
        };
        assert_eq!(why(Payload::Messages, true), "unasked");
        assert_eq!((why(Payload::Auto, false), why(Payload::Auto, true)), ("far", "no-device"));
        let grants = |payload| PayloadArgs { payload }.grants(true, &device()).unwrap();
        assert!(grants(Payload::Auto) && !grants(Payload::Messages));
        assert!(PayloadArgs { payload: Payload::Auto }.by_router().is_ok());
    }
}
