//! How rows and sums go between attention and experts.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use conclave_dispatch::pair::{BoardDevice, LinkDevice, NoPair, PairDevice, Pairs, Way};
use conclave_kernels::{Device, KernelError};

use super::device::{AnyDevice, on_device};

/// A way for rows and sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Payload {
    /// Within a host as ipc, if both sides have it; else in the messages.
    Auto,
    /// In the messages, through the memory of both hosts.
    Messages,
    /// Between the memory of two processes' GPUs on one host (CUDA IPC); one GPU may serve both.
    Ipc,
    /// Between the memory of GPUs of one host or two (NCCL), a link for every pair of processes; needs libnccl.so.
    Nccl,
}

impl Payload {
    /// A way past the messages that is asked for by name, and the name.
    fn by_name(self) -> Option<(Way, &'static str)> {
        match self {
            Self::Auto | Self::Messages => None,
            Self::Ipc => Some((Way::Ipc, "--payload ipc")),
            Self::Nccl => Some((Way::Nccl, "--payload nccl")),
        }
    }
}

/// The flag.
#[derive(Debug, Clone, Copy, Args)]
pub struct PayloadArgs {
    /// How rows and sums go between attention and experts. What is asked for by name has to be there.
    #[arg(long, env = "CONCLAVE_PAYLOAD", value_enum, default_value = "auto")]
    pub payload: Payload,
}

impl PayloadArgs {
    /// By which ways an expert on `device` grants pairs. `near`: it listens on a socket for members of its host.
    ///
    /// # Errors
    /// Naming what is missing for a way that is asked for by name.
    pub fn grants(self, near: bool, device: &AnyDevice) -> Result<Vec<Way>> {
        if let Some((way, flag)) = self.payload.by_name() {
            check_near(way, near)?;
            let checked = on_device!(device, device => match way {
                Way::Ipc => device.share(1).map(drop),
                Way::Nccl => device.check_links(),
            });
            checked.context(flag)?;
            return Ok(vec![way]);
        }
        // A caller that is asked for links asks here, whatever the expert itself would choose.
        Ok(if self.payload == Payload::Auto { vec![Way::Ipc, Way::Nccl] } else { Vec::new() })
    }

    /// The pairs of an attention process that itself dispatches steps of at most this many rows of this many elements.
    ///
    /// # Errors
    /// Naming what is missing for a way that is asked for by name.
    pub fn pairs(self, near: bool, device: &AnyDevice, sizes: (usize, usize)) -> Result<Pairs> {
        let pair_device = |way| on_device!(device, device => pair_device(way, device.clone(), sizes));
        if let Some((way, flag)) = self.payload.by_name() {
            check_near(way, near)?;
            return Ok(Pairs::Required(pair_device(way).context(flag)?));
        }
        Ok(match self.payload {
            Payload::Auto if near => match pair_device(Way::Ipc) {
                Ok(device) => Pairs::Offered(device),
                Err(error) => Pairs::Without(NoPair::NoDevice(error.to_string())),
            },
            Payload::Auto => Pairs::Without(NoPair::Far),
            _ => Pairs::Without(NoPair::Unasked),
        })
    }

    /// The same where a router dispatches.
    ///
    /// # Errors
    /// If a way is asked for by name.
    pub fn by_router(self) -> Result<Pairs> {
        if let Some((_, flag)) = self.payload.by_name() {
            bail!("{flag}: layers go to a router, which has no device; needed is --dispatch embedded");
        }
        Ok(Pairs::Without(NoPair::NoDevice("a router has none".to_owned())))
    }
}

fn check_near(way: Way, near: bool) -> Result<()> {
    if way == Way::Ipc && !near {
        bail!("--payload ipc: needs the sockets of members of one host, which --same-host off takes away");
    }
    Ok(())
}

fn pair_device<D: Device>(
    way: Way,
    device: Arc<D>,
    (rows, hidden): (usize, usize),
) -> Result<Arc<dyn PairDevice>, KernelError> {
    Ok(match way {
        Way::Ipc => Arc::new(BoardDevice::new(device, rows, hidden)?),
        Way::Nccl => Arc::new(LinkDevice::new(device, rows, hidden)?),
    })
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
        let refused = |error: Option<anyhow::Error>| format!("{:#}", error.expect("refused"));
        let device = device();
        let (shares_none, no_links) = ("device reference-1: shares no memory", "device reference-1: has no links");
        for (payload, flag, near, missing) in [
            (Payload::Ipc, "--payload ipc: ", true, shares_none),
            (Payload::Ipc, "--payload ipc: ", false, "--same-host off takes away"),
            (Payload::Nccl, "--payload nccl: ", true, no_links),
            (Payload::Nccl, "--payload nccl: ", false, no_links),
        ] {
            let args = PayloadArgs { payload };
            let (grants, pairs) = (args.grants(near, &device).err(), args.pairs(near, &device, (4, 8)).err());
            for error in [refused(grants), refused(pairs), refused(args.by_router().err())] {
                assert!(error.starts_with(flag), "{error}");
                assert!(error.contains(missing) || error.ends_with("needed is --dispatch embedded"), "{error}");
            }
        }
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
        assert_eq!(grants(Payload::Auto), [Way::Ipc, Way::Nccl]);
        assert!(grants(Payload::Messages).is_empty());
        assert!(PayloadArgs { payload: Payload::Auto }.by_router().is_ok());
    }
}
